"""Logits, and in float64 which of them the vocabulary's filters keep."""

from __future__ import annotations

import numpy as np
import torch


def draw(*shape, seed=0, scale=1.0, dtype=torch.float32) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def kept_by(z: np.ndarray, top_k: int | None) -> np.ndarray:
    """Which logits [V] stay: the k largest and what ties with the last of them."""
    return z >= np.sort(z)[::-1][min(top_k or len(z), len(z)) - 1]


def nucleus(z: np.ndarray, top_p: float | None) -> np.ndarray:
    """Which logits [V] stay: the fewest largest with the share top_p of the mass, and what ties with the last."""
    if top_p is None or top_p >= 1:
        return np.ones(len(z), dtype=bool)
    falling = np.sort(z)[::-1]
    mass = np.exp(falling - falling[0]).cumsum()
    return z >= falling[(mass < top_p * mass[-1]).sum()]


def filtered(logits, top_k=None, top_p=None, mask_id=None, forbidden=None, min_p=None, temperature=1.0) -> np.ndarray:
    """One row [V] in float64, -inf at what is excluded or does not stay by the law softmax(z / temperature)."""
    z = logits.double().numpy().copy()
    if mask_id is not None and 0 <= mask_id < len(z):
        z[mask_id] = -np.inf
    if forbidden is not None:
        z[np.asarray(forbidden)] = -np.inf
    z[~kept_by(z, top_k)] = -np.inf
    if min_p:
        z[np.exp((z - z.max()) / temperature) < min_p] = -np.inf
    z[~nucleus(z / temperature, top_p)] = -np.inf
    return z
