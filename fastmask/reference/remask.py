"""Which positions are masked again: those of the highest remask keys.

A remask key says how little a token deserves to stay: minus its confidence (MaskGIT,
https://arxiv.org/abs/2202.04200, section 3.2), or a token critic's logit that it is wrong
(https://arxiv.org/abs/2209.04439); Gumbel noise on either makes the choice a random one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _streams as streams
from fastmask.records import Draws, Remasking, RowList, Windows
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
    windows: Windows,
    draws: Draws,
    remasking: Remasking,
) -> None:
    """Selects by values [B, N], and writes ids, is_masked [B, N] and the list of masked positions in place.

    Args:
        eligible: [B, N] bool, what may be masked again; by default what is masked.
        windows: where.
    """
    sign = -1.0 if remasking.is_confidence else 1.0
    figures = values.float()  # without noise, as rules hold them
    eligible = is_masked if eligible is None else eligible
    commits_one = eligible is is_masked  # where a rule is given
    in_block = None if windows.block is None else is_inside(windows.block, values)
    if in_block is not None:
        eligible = eligible & in_block
    num_eligible = eligible.sum(dim=-1)
    if remasking.counts_commit:
        counts = num_eligible - counts.clamp(min=1)
    if remasking.has_prefix_rule:
        committed = _prefix_length(sign * figures, eligible, remasking).clamp(min=1)
        counts = counts.minimum(num_eligible - committed)
    if remasking.min_remask_key is not None:
        counts = counts.minimum(num_eligible - 1) if commits_one else counts
        eligible = eligible & ~(sign * figures < remasking.min_remask_key)
    if remasking.noise_scale:
        figures = figures + remasking.noise_scale * gumbel_noise(draws, *values.shape)
    chosen = select_to_remask(sign * figures, eligible, counts, None)
    ids.masked_fill_(chosen, remasking.mask_id)
    is_masked.copy_(chosen if in_block is None else chosen.where(in_block, is_masked))
    _list(listed, is_masked if windows.next_block is None else is_masked & is_inside(windows.next_block, values))


def is_inside(window: Tensor, values: Tensor) -> Tensor:
    """Which positions [B, N] lie in a window [B, 2]."""
    position = torch.arange(values.shape[1], device=values.device)
    return (position >= window[:, :1]) & (position < window[:, 1:])


def _prefix_length(remask_keys: Tensor, eligible: Tensor, remasking: Remasking) -> Tensor:
    """How many of each row's eligible positions a rule commits [B], those of the lowest keys."""
    nowhere = torch.full_like(remask_keys, torch.inf)
    keys = remask_keys.where(eligible & ~remask_keys.isnan(), nowhere).sort(dim=-1, stable=True).values
    is_known = (eligible & ~remask_keys.isnan()).sort(dim=-1, descending=True, stable=True).values
    if remasking.factor is not None:
        length = torch.arange(1, keys.shape[-1] + 1, dtype=torch.float32, device=keys.device)
        holds = (-keys).exp() >= 1.0 - remasking.factor / (length + 1.0)
    else:
        assert remasking.fixed_point_bound is not None
        # In multiples of 2^-32 nats, whose sums do not depend on the order.
        entropies = (keys.clamp(-1024.0, 1024.0) * 2.0**32).long()
        holds = entropies.cumsum(dim=-1) - entropies <= remasking.fixed_point_bound
    return (holds & is_known).long().cummin(dim=-1).values.sum(dim=-1)


def _list(listed: RowList, is_listed: Tensor) -> None:
    """Writes the list of positions [B, N]."""
    row_indices, row_starts = listed
    if row_starts is None:
        batch, device = len(is_listed), is_listed.device
        row_starts = torch.arange(batch + 1, device=device) * (len(row_indices) // max(1, batch))
    row_starts = row_starts.clamp(0, len(row_indices))
    slots = row_starts[:-1, None] + is_listed.cumsum(dim=-1) - 1
    slots = slots.where(is_listed & (slots < row_starts[1:, None]), len(row_indices))  # the place behind the last
    flat = torch.arange(is_listed.numel(), device=is_listed.device)
    found = torch.full((len(row_indices) + 1,), -1, dtype=torch.int64, device=is_listed.device)
    row_indices.copy_(found.index_put_((slots.flatten(),), flat)[:-1])
