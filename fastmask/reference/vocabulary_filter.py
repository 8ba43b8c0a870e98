"""Which logits of a row stay: the k largest, and of those the nucleus, the fewest likeliest ids that together have at
least the share p of the probability (Holtzman et al., https://arxiv.org/abs/1904.09751, eq. 2); ties with the last
stay."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    import numpy as np
except ImportError:  # torch runs without it
    np = None  # type: ignore[assignment]


def thresholds(z: Tensor, top_k: int | None, top_p: float | None) -> Tensor | None:
    """What the logits of each row of z [M, V] float32 must not be below, [M, 1]; None where all stay.

    Args:
        top_k: keeps the k largest, and what ties with the last of them; None keeps all.
        top_p: of those, keeps the nucleus; see the module.
    """
    threshold = _top_k_threshold(z, top_k)
    if top_p is None:
        return threshold
    kept = z if threshold is None else z.where(z >= threshold, -torch.inf)
    return _top_p_threshold(kept, top_p)


def _top_k_threshold(z: Tensor, top_k: int | None) -> Tensor | None:
    """The k-th largest of each row."""
    if top_k is None or top_k >= z.shape[-1]:
        return None
    if z.device.type == "cpu" and np is not None and not torch.compiler.is_compiling():  # six times as fast as topk
        first_kept = z.shape[-1] - top_k
        return torch.from_numpy(np.partition(z.numpy(), first_kept, axis=-1)[:, first_kept, None])
    return z.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)


def _top_p_threshold(z: Tensor, top_p: float) -> Tensor:
    """The least likely id of each row's nucleus: with all that are likelier it first reaches the share top_p."""
    z = z.sort(dim=-1, descending=True).values
    weights = (z - z[:, :1]).to(torch.float32 if z.device.type == "mps" else torch.float64).exp()
    mass = weights.cumsum(dim=-1)
    last = (mass < top_p * mass[:, -1:]).sum(dim=-1, keepdim=True)
    return z.gather(-1, last.clamp(max=z.shape[-1] - 1))
