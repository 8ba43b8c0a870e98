"""Which logits of a row stay: the k largest; of those the ones at least min_p times as likely as the likeliest
(Nguyen et al., https://arxiv.org/abs/2407.01082); of those the nucleus, the fewest likeliest ids that together have
at least the share p of the probability (Holtzman et al., https://arxiv.org/abs/1904.09751, eq. 2). Ties with the last
stay."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmask._devices import is_readable

try:
    import numpy as np
except ImportError:  # torch runs without it
    np = None  # type: ignore[assignment]


def thresholds(
    z: Tensor,
    top_k: int | Tensor | None,
    min_p: float | Tensor | None,
    top_p: float | Tensor | None,
    temperature: float | Tensor = 1.0,
) -> Tensor | None:
    """What the logits of each row of z [M, V] float32 must not be below, [M, 1]; None where all stay.

    Each option is a number, or [M, 1], one a row: int64, and in the precision of :func:`exact`. There V, 0 and 1 keep
    all.

    Args:
        top_k: keeps the k largest, and what ties with the last of them; None keeps all.
        min_p: in (0, 1]: of those, keeps what is so likely beside the likeliest; None keeps all.
        top_p: of those, keeps the nucleus; see the module.
        temperature: T of the probabilities softmax(z / T).
    """
    threshold = _top_k_threshold(z, top_k)
    if min_p is not None:
        gap = temperature * (min_p.log() if isinstance(min_p, Tensor) else math.log(min_p))
        least = z.amax(dim=-1, keepdim=True) + (gap.float() if isinstance(gap, Tensor) else gap)
        threshold = least if threshold is None else threshold.maximum(least)
    if top_p is None:
        return threshold
    kept = z if threshold is None else z.where(z >= threshold, -torch.inf)
    nucleus = _top_p_threshold(kept, top_p, temperature)
    if not isinstance(top_p, Tensor):
        return nucleus
    # Summed, all of the probability may be reached before the last id is.
    return nucleus.where(top_p < 1.0, -torch.inf if threshold is None else threshold)


def first_largest(x: Tensor) -> Tensor:
    """Where each row of x [M, V] has its largest, of those that tie the first, [M, 1]; NaN is larger than all."""
    if np is not None and is_readable(x):  # many times as fast as PyTorch's
        return torch.from_numpy(x.numpy().argmax(axis=-1)[:, None])
    return x.argmax(dim=-1, keepdim=True)


def known_to_hold(x: Tensor) -> bool:
    """Whether all of x [...] bool is True, and the host knows it without waiting for a device."""
    return np is not None and is_readable(x) and bool(x.numpy().all())


def exact(values: Tensor) -> Tensor:
    """Numbers as precise as Python's, where the device has such."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def _top_k_threshold(z: Tensor, top_k: int | Tensor | None) -> Tensor | None:
    """The k-th largest of each row."""
    if isinstance(top_k, Tensor):
        return z.sort(dim=-1, descending=True).values.gather(-1, top_k.clamp(1, z.shape[-1]) - 1)
    if top_k is None or top_k >= z.shape[-1]:
        return None
    if np is not None and is_readable(z):  # six times as fast as topk
        first_kept = z.shape[-1] - top_k
        return torch.from_numpy(np.partition(z.numpy(), first_kept, axis=-1)[:, first_kept, None])
    return z.topk(top_k, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)


def _top_p_threshold(z: Tensor, top_p: float | Tensor, temperature: float | Tensor) -> Tensor:
    """The least likely id of each row's nucleus: with all that are likelier it first reaches the share top_p."""
    is_long = z.shape[-1] > _SORTED
    if is_long and np is not None and is_readable(z):
        return _top_p_threshold_without_sort(z, top_p, temperature)
    z = z.sort(dim=-1, descending=True).values
    gaps = exact(z - z[:, :1])
    is_heated = isinstance(temperature, Tensor) or temperature != 1.0
    weights = (gaps / temperature if is_heated else gaps).exp()
    mass = weights.cumsum(dim=-1)
    last = (mass < top_p * mass[:, -1:]).sum(dim=-1, keepdim=True)
    return z.gather(-1, last.clamp(max=z.shape[-1] - 1))


# Rows of up to so many ids are sorted all at once.
_SORTED = 1024


def _top_p_threshold_without_sort(z: Tensor, top_p: float | Tensor, temperature: float | Tensor) -> Tensor:
    """The same; sorted are only ids at least as likely as (1 - p) / V: the others together have less than 1 - p."""
    columns = (np.broadcast_to(np.asarray(option), (len(z), 1)).flat for option in (top_p, temperature))
    thresholds = np.empty((len(z), 1), np.float32)
    with np.errstate(invalid="ignore", divide="ignore"):  # NaN in, NaN out
        for row, threshold, p, t in zip(z.numpy(), thresholds, *columns, strict=True):
            top = row.max()
            weights = np.exp((row - top).astype(np.float64) / t)
            is_unlikely = weights < (1.0 - p) * (weights.sum() / len(row))
            likely = np.sort(row[~is_unlikely])[::-1]
            mass = np.exp((likely - top).astype(np.float64) / t).cumsum()
            last = np.sum(mass < p * (mass[-1] + weights[is_unlikely].sum()))
            threshold[0] = likely[min(last, len(likely) - 1)]
    return torch.from_numpy(thresholds)
