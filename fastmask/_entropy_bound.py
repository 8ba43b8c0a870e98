"""What an entropy bound accepts, for other libraries' samplers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import functional

_MORE_THAN_ANY_SUM_OF_ENTROPIES = 2.0**30  # nats


def accepted_positions(entropies: Tensor, entropy_bound: float) -> Tensor:
    """Those of the lowest entropies [B, N] float32 in nats, [B, N] bool: as many as sum to at most the bound without
    the last, at least one; of equal entropies the first.

    Source: EB-Sampler (https://arxiv.org/abs/2505.24857), algorithm 1.
    """
    is_open = torch.ones_like(entropies, dtype=torch.bool)
    ids = torch.zeros_like(entropies, dtype=torch.int64)  # gets a mask where nothing is accepted
    functional.remask_(
        ids,
        is_open,
        ids.new_empty(0),
        ids.new_zeros(len(ids) + 1),
        entropies,
        mask_id=0,
        is_confidence=False,
        entropy_bound=min(float(entropy_bound), _MORE_THAN_ANY_SUM_OF_ENTROPIES),
    )
    return ~is_open
