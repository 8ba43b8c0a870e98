"""Which logits of a row stay: the k largest; of those the ones at least min_p times as likely as the likeliest
(Nguyen et al., https://arxiv.org/abs/2407.01082); of those the nucleus, the fewest likeliest ids that together have
at least the share p of the probability (Holtzman et al., https://arxiv.org/abs/1904.09751, eq. 2). Ties with the last
stay."""

from __future__ import annotations

import math

import torch
from torch import Tensor

try:
    import numpy as np
except ImportError:  # torch runs without it
    np = None  # type: ignore[assignment]


def thresholds(
    z: Tensor, top_k: int | None, min_p: float | None, top_p: float | None, temperature: float = 1.0
) -> Tensor | None:
    """What the logits of each row of z [M, V] float32 must not be below, [M, 1]; None where all stay.

    Args:
        top_k: keeps the k largest, and what ties with the last of them; None keeps all.
        min_p: in (0, 1]: of those, keeps what is so likely beside the likeliest; None keeps all.
        top_p: of those, keeps the nucleus; see the module.
        temperature: T of the probabilities softmax(z / T).
    """
    threshold = _top_k_threshold(z, top_k)
    if min_p is not None:
        least = z.amax(dim=-1, keepdim=True) + temperature * math.log(min_p)
        threshold = least if threshold is None else threshold.maximum(least)
    if top_p is None:
        return threshold
    kept = z if threshold is None else z.where(z >= threshold, -torch.inf)
    return _top_p_threshold(kept, top_p, temperature)


def _top_k_threshold(z: Tensor, top_k: int | None) -> Tensor | None:
    """The k-th largest of each row."""
    if top_k is None or top_k >= z.shape[-1]:
        return None
    if z.device.type == "cpu" and np is not None and not torch.compiler.is_compiling():  # six times as fast as topk
        first_kept = z.shape[-1] - top_k
        return torch.from_numpy(np.partition(z.numpy(), first_kept, axis=-1)[:, first_kept, None])
    return z.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)


def _top_p_threshold(z: Tensor, top_p: float, temperature: float) -> Tensor:
    """The least likely id of each row's nucleus: with all that are likelier it first reaches the share top_p."""
    z = z.sort(dim=-1, descending=True).values
    gaps = (z - z[:, :1]).to(torch.float32 if z.device.type == "mps" else torch.float64)
    weights = (gaps if temperature == 1.0 else gaps / temperature).exp()
    mass = weights.cumsum(dim=-1)
    last = (mass < top_p * mass[:, -1:]).sum(dim=-1, keepdim=True)
    return z.gather(-1, last.clamp(max=z.shape[-1] - 1))
