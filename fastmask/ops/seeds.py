"""Seeds, and which random numbers an operation draws."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _check
from fastmask._devices import to_device
from fastmask.records import Draws


def draw_seed(device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
    """A 64-bit seed, [] int64, drawn on ``device`` and kept there: no synchronisation.

    Args:
        device: where the seed is wanted.
        generator: default torch's own of the device. One of another device is drawn from there.

    Randomness: four integers of the generator, so ``torch.manual_seed`` reproduces all that follows.
    """
    check_generator(generator)
    home = torch.device(device) if generator is None else generator.device
    # Four words of 16 bits: not every backend draws 64 bits at once.
    words = torch.randint(2**16, (4,), device=home, generator=generator)
    seed = (words << torch.arange(0, 64, 16, device=home)).sum()
    return to_device(seed, device)


def check_generator(generator: object) -> None:
    """Refuses what draws no numbers of torch's."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(
            f"expected generator to be a torch.Generator, received {type(generator).__name__}; "
            "torch.Generator().manual_seed(seed) makes one"
        )


def as_seed(seed: int | Tensor | None, device: torch.device, generator: torch.Generator | None) -> Tensor:
    if seed is None:
        return draw_seed(device, generator)
    if isinstance(seed, Tensor):
        _check.tensor("seed", seed, [torch.int64], ndim=0)
        return seed if seed.device == device else to_device(seed, device)
    seed = _check.integer("seed", seed, -(2**63), 2**64)
    seed = seed - 2**64 if seed >= 2**63 else seed
    return torch.full((), seed, dtype=torch.int64, device=device)


def as_draws(
    seed: int | Tensor | None,
    device: torch.device,
    generator: torch.Generator | None,
    step: int,
    sample_offset: int,
) -> Draws:
    """What a door was asked to draw, checked; a seed is drawn where none is given."""
    step = _check.integer("step", step, 0, 2**24)
    sample_offset = _check.integer("sample_offset", sample_offset, 0, 2**32)
    return Draws(as_seed(seed, device, generator), sample_offset, step)
