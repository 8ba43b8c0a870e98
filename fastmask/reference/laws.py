"""Laws of rows of logits, and sums over them, that round by nothing but the row."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _streams as streams


def heated(z: Tensor, temperature: float | Tensor, out: Tensor | None = None) -> Tensor:
    """softmax(z / temperature), [M, V], of z <= 0. Of what a CPU has, softmax alone rounds by nothing but the row."""
    law = torch.mul(z, over(temperature), out=out)
    return torch.softmax(law, dim=-1, out=law)


def over(temperature: float | Tensor) -> float | Tensor:
    """1 / T, but finite, infinity times the maximum's 0 being NaN, and above 0, for the sake of -inf."""
    limits = torch.finfo(torch.float32)
    if isinstance(temperature, Tensor):
        return (1.0 / temperature).clamp(limits.tiny, limits.max).float()
    return max(limits.tiny, min(1.0 / temperature, limits.max))


def is_one(temperature: float | Tensor) -> bool:
    """Whether it is 1 for all."""
    return not isinstance(temperature, Tensor) and temperature == 1.0


def sub_tiles_of(x: Tensor) -> Tensor:
    """The sums of x [M, 64 S] over sub-tiles, [M, S]."""
    return x.unflatten(-1, (-1, streams.SUB_TILE)).sum(dim=-1)


def sum_of(x: Tensor) -> Tensor:
    """The sum of each row of x [M, V], [M, 1]: by sub-tiles, since a CPU splits a row that is alone."""
    return (x if x.shape[-1] <= streams.SUB_TILE else sub_tiles_of(x)).sum(dim=-1, keepdim=True)
