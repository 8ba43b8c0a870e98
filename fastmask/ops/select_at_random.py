"""Selecting each position by a coin of its own: what is accepted, refused and promised."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _check, _dispatch
from fastmask.ops.seeds import as_draws
from fastmask.reference import select_at_random as reference


def select_at_random(
    eligible: Tensor,
    probability: Tensor | float,
    *,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    step: int = 0,
    sample_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    r"""Selects each eligible position with a probability, independently of all others.

    .. math::
        \mathrm{selected}_{b,i} = \mathrm{eligible}_{b,i} \wedge (u_{b,i} < p_{b,i}), \quad u_{b,i} \sim U(0, 1)

    Args:
        eligible: [B, N] bool, the positions that may be selected.
        probability: p, a number in [0, 1], or of each sequence [B] or [B, 1], or of each position [B, N],
            float16|bfloat16|float32|float64, worked on in float32. A tensor's values are not read: what is not above
            0, NaN too, selects nothing, and 1 or more everything. A number that changes from call to call is for
            torch.compile better a tensor: the kernel's graph holds the number.
        seed, generator, step, sample_offset, backend: as in :func:`sample_tokens`.

    Returns:
        [B, N] bool. u has 64 bits: the probability is p rounded up to a multiple of 2^-64, so that one of 2^-41
        (4.5e-13) or more is exact, and none but 0 becomes 0. With one seed and step a higher p selects those of a
        lower one, and more.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, tensors on several devices.

    Randomness: stream SELECTION of the seed at ``step``.

    Source: the ancestral step of MDLM (https://arxiv.org/abs/2406.07524), p = 1 - s / t where masked, from time t to
    time s of the linear schedule; that of ReMDM (https://arxiv.org/abs/2503.00307); Dream's "origin" decoding.

    Example:
        >>> eligible = torch.tensor([[True, True, False]])
        >>> select_at_random(eligible, 1.0)
        tensor([[ True,  True, False]])
        >>> select_at_random(eligible, torch.tensor([[1.0, 0.0, 1.0]]))
        tensor([[ True, False, False]])
    """
    _check.tensor("eligible", eligible, [torch.bool], ndim=2)
    number, values = None, None
    if isinstance(probability, Tensor):
        values = _of_positions(probability, eligible)
    else:
        _check.number("probability", probability, 0.0, 1.0)
        number = float(probability)
    draws = as_draws(seed, eligible.device, generator, step, sample_offset)
    run = _dispatch.implementation(reference.select_at_random, eligible.device, backend)
    return run(eligible, number, values, draws)


def _of_positions(probability: Tensor, eligible: Tensor) -> Tensor:
    """The probability of each position [B, N], without a copy."""
    _check.tensor("probability", probability, _check.FLOATING)
    batch, length = eligible.shape
    of_each = {1: [batch], 2: [batch, 1] if probability.shape[-1:] == (1,) else [batch, length]}
    expected = of_each.get(probability.ndim)
    if expected is None or list(probability.shape) != expected:
        raise ValueError(
            f"expected probability to be a number or of shape [B], [B, 1] or [B, N] with B = {batch} and "
            f"N = {length}, received {list(probability.shape)}; expand it"
        )
    _check.same_device(eligible=eligible, probability=probability)
    probability = probability.detach()
    return (probability if probability.ndim == 2 else probability[:, None]).expand(batch, length)
