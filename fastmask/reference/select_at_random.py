"""Which positions are selected, each by a coin of its own.

A position is selected where a uniform of 64 bits lies below its probability: in the ancestral steps of MDLM
(https://arxiv.org/abs/2406.07524) and ReMDM (https://arxiv.org/abs/2503.00307) what is committed, and what is masked
again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _streams as streams
from fastmask.records import Draws
from fastmask.reference import philox


def select_at_random(
    eligible: Tensor, probability: float | None, probabilities: Tensor | None, draws: Draws
) -> Tensor:
    """The eligible positions whose uniforms lie below their probabilities.

    Args:
        eligible: [B, N] bool.
        probability: of all positions, None where each has its own.
        probabilities: [B, N] floating point, of each; rounded to float32. NaN is as good as 0.

    Returns:
        [B, N] bool.
    """
    batch, length = eligible.shape
    sample = torch.arange(batch, device=eligible.device) + draws.sample_offset
    position = torch.arange(length, device=eligible.device)
    high, low, _, _ = philox.draw(
        draws.seed, streams.SELECTION, draws.step, sample=sample[:, None], position=position
    )
    if probabilities is None:
        assert probability is not None
        probabilities = torch.full((), probability, dtype=torch.float32, device=eligible.device)
    return eligible & _is_below(high, low, probabilities.float())


def _is_below(high: Tensor, low: Tensor, p: Tensor) -> Tensor:
    """Whether a 64-bit integer of two words lies below p 2^64: with probability p, rounded up to a multiple of 2^-64.

    Every product and difference here is exact in float32.
    """
    is_certain = p >= 1.0
    p = p.where((p > 0.0) & ~is_certain, 0.0)  # what is NaN has no integer
    scaled = p * 2.0**32
    high_end = scaled.long()
    low_end = ((scaled - high_end.float()) * 2.0**32).ceil().long()
    return is_certain | (high < high_end) | ((high == high_end) & (low < low_end))
