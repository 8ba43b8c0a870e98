"""Which positions are masked again: those of the highest remask keys.

A remask key says how little a token deserves to stay: minus its confidence (MaskGIT,
https://arxiv.org/abs/2202.04200, section 3.2), or a token critic's logit that it is wrong
(https://arxiv.org/abs/2209.04439); Gumbel noise on either makes the choice a random one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _streams as streams
from fastmask.records import Draws, Remasking, RowList
from fastmask.reference import philox


def gumbel_noise(draws: Draws, batch: int, length: int) -> Tensor:
    """Gumbel(0, 1) noise of each position [B, N], float32."""
    sample = torch.arange(batch, device=draws.seed.device) + draws.sample_offset
    position = torch.arange(length, device=draws.seed.device)
    high, low, _, _ = philox.draw(
        draws.seed, streams.SCORE_NOISE, draws.step, sample=sample[:, None], position=position
    )
    return philox.gumbel(high, low)


def select_to_remask(remask_keys: Tensor, eligible: Tensor, counts: Tensor, min_remask_key: float | None) -> Tensor:
    """The ``counts`` eligible positions of the highest remask keys in each row.

    Order: NaN first, then by falling key (-0.0 equals 0.0), ties by falling position: of equally sure positions the
    first are committed first.

    Args:
        remask_keys: [B, N] floating point.
        eligible: [B, N] bool.
        counts: [B] integer; more than are eligible selects all of them.
        min_remask_key: what has a lower key is not eligible; NaN is.

    Returns:
        [B, N] bool.
    """
    if min_remask_key is not None:
        eligible = eligible & ~(remask_keys < min_remask_key)
    order = remask_keys.sort(dim=-1, stable=True).indices  # from its end on, where NaN is
    in_order = eligible.gather(-1, order)
    behind = in_order.sum(dim=-1, keepdim=True) - in_order.cumsum(dim=-1)
    chosen = in_order & (behind < counts[:, None])
    return torch.zeros_like(eligible).scatter_(-1, order, chosen)


@torch.no_grad()
def remask_(
    ids: Tensor,
    is_masked: Tensor,
    listed: RowList,
    values: Tensor,
    counts: Tensor,
    eligible: Tensor | None,
    draws: Draws,
    remasking: Remasking,
) -> None:
    """Selects by values [B, N], and writes ids, is_masked [B, N] and the list of masked positions in place.

    Args:
        eligible: [B, N] bool, what may be masked again; by default what is masked.
    """
    remask_keys = values.float()
    if remasking.noise_scale:
        remask_keys = remask_keys + remasking.noise_scale * gumbel_noise(draws, *values.shape)
    remask_keys = -remask_keys if remasking.is_confidence else remask_keys
    eligible = is_masked if eligible is None else eligible
    chosen = select_to_remask(remask_keys, eligible, counts, remasking.min_remask_key)
    is_masked.copy_(chosen)
    ids.masked_fill_(chosen, remasking.mask_id)
    row_indices, row_starts = listed
    row_starts = row_starts.clamp(0, len(row_indices))
    slots = row_starts[:-1, None] + chosen.cumsum(dim=-1) - 1
    slots = slots.where(chosen & (slots < row_starts[1:, None]), len(row_indices))  # the place behind the last
    flat = torch.arange(ids.numel(), device=ids.device)
    found = torch.full((len(row_indices) + 1,), -1, dtype=torch.int64, device=ids.device)
    row_indices.copy_(found.index_put_((slots.flatten(),), flat)[:-1])
