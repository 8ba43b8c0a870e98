"""``sample_tokens`` where each rank has some columns of the logits, by whole tiles of 4096 ids.

Every tile races in the rank that has it, by its own number in the vocabulary; each rank plays on in the best of its
tiles, and of what the ranks found the one of the highest key is taken. That is the race of one process: the same ids
from the same seed, up to floating-point ties. Of a row ranks tell each other 16 bytes (the largest logit, its id), 40
(sums, key and id) and 4 (the logit of what was taken); and to find a threshold, of top_k or top_p, 32 times 8.
"""

from __future__ import annotations

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask import _streams as streams
from fastmask.records import Draws, LinearLogits, PerSequence, Sampled, SampledRows, Sampling
from fastmask.reference.laws import is_one, over, sub_tiles_of
from fastmask.reference.sample_tokens import Options, Race, by_chunks, lowest_allowed, race_in_tile
from fastmask.reference.vocabulary_filter import exact
from fastmask.vocabulary_parallel import Columns

# Rows at once: as many on all ranks, however many columns each has, since they speak of a chunk together.
CHUNK_ROWS = 1024


@torch.no_grad()
def sample_tokens(
    logits: Tensor | LinearLogits,
    rows: SampledRows,
    draws: Draws,
    sampling: Sampling,
    kept_ids: Tensor | None,
    out: Sampled | None,
    per_sequence: PerSequence | None,
    columns: Columns,
) -> Sampled:
    """As ``fastmask/reference/sample_tokens.py``, of the columns that this rank has; the same on all ranks."""
    run = partial(_sample_chunk_, columns=columns)
    return by_chunks(logits, rows, draws, sampling, kept_ids, out, per_sequence, CHUNK_ROWS, run)


def _sample_chunk_(
    z: Tensor, rows: SampledRows, draws: Draws, options: Options, kept_ids: Tensor | None, *, columns: Columns
) -> Sampled:
    """Of logits z [M, width] float32, behind which -inf may lie."""
    sampling = options.sampling
    z = F.pad(z, (0, -z.shape[-1] % streams.SUB_TILE if columns.width else streams.SUB_TILE), value=-torch.inf)
    mask = columns.place(sampling.mask_id)
    if mask is not None:
        z[:, mask] = -torch.inf
    if sampling.forbidden is not None:
        here = sampling.forbidden[columns.first : columns.first + columns.width]
        z.masked_fill_(F.pad(here, (0, z.shape[-1] - len(here)), value=True), -torch.inf)

    first = z.argmax(dim=-1, keepdim=True)
    maxima, ids = columns.gathered(z.gather(-1, first), first + columns.first)
    owner = maxima.argmax(dim=0, keepdim=True)  # of those that tie the first: the lower ids
    largest, ids = maxima.gather(0, owner)[0].float(), ids.gather(0, owner)[0].long()
    is_first = torch.zeros_like(z, dtype=torch.bool).scatter_(-1, first, ids == first + columns.first)
    is_valid = largest.isfinite() if options.is_lawful is None else largest.isfinite() & options.is_lawful
    if options.keeps_one is not False:
        z.masked_fill_(~is_first & options.keeps_one, -torch.inf)
    z = _filtered(z, largest, options, columns)
    z = (z - largest) * over(options.figures_at)

    others = z.masked_fill(is_first, -torch.inf)  # without the largest's own 1, which would round them away
    weights = others.exp()
    energy = (weights * others.clamp(min=-1e30)).sum(dim=-1, keepdim=True)  # 0 times infinity is NaN
    sums, seconds, keys, raced, energies = columns.gathered(
        weights.sum(dim=-1, keepdim=True),
        others.amax(dim=-1, keepdim=True),
        *_race(z, options, rows, draws, columns),
        energy,
    )
    totals = sums.sum(dim=0)
    log_totals = totals.log1p()
    winner = raced.gather(0, keys.argmax(dim=0, keepdim=True))[0].long()
    if isinstance(options.is_greedy, Tensor):
        ids = ids.where(options.is_greedy, winner)
    elif not options.is_greedy:
        ids = winner
    ids = ids.where(is_valid, lowest_allowed(sampling, columns.num_tokens))
    if kept_ids is not None:
        ids = torch.where(kept_ids[:, None] >= 0, kept_ids[:, None], ids)

    column, is_here = columns.local(ids)
    z_of_ids = columns.add_up_(z.gather(-1, column).where(is_here, 0.0))
    log_probs = (z_of_ids - log_totals).where(columns.has(ids), torch.nan)
    margins = -torch.expm1(seconds.amax(dim=0)) / (1.0 + totals) if sampling.with_margin else None
    entropies = (log_totals - energies.sum(dim=0) / (1.0 + totals)).clamp(min=0.0) if sampling.with_entropy else None
    is_row = rows.row_indices[:, None] >= 0
    figures = [
        None if x is None else x.float().where(is_valid, torch.nan).where(is_row, 0.0).squeeze(-1)
        for x in (log_probs, margins, entropies)
    ]
    return Sampled(ids.where(is_row, -1).squeeze(-1), *figures)  # type: ignore[arg-type]


def _race(z: Tensor, options: Options, rows: SampledRows, draws: Draws, columns: Columns) -> tuple[Tensor, Tensor]:
    """The highest key of this rank's tiles, and the id that wins there, [M, 1] each; 0 where nothing races."""
    if options.is_greedy is True:
        return torch.zeros_like(z[:, :1]), torch.zeros_like(rows.row_indices[:, None])
    weights = (z if is_one(options.heat) else z * over(options.heat)).exp()
    sub_tiles, per_tile = sub_tiles_of(weights), streams.TILE // streams.SUB_TILE
    sub_tiles = F.pad(sub_tiles, (0, -sub_tiles.shape[-1] % per_tile)).unflatten(-1, (-1, per_tile))
    first_tile, race = columns.first // streams.TILE, Race.of(rows, draws)
    keys = race.keys(sub_tiles.sum(dim=-1), streams.TILE_RACE, torch.full_like(race.sample, first_tile))
    tile = keys.argmax(dim=-1, keepdim=True)
    return keys.gather(-1, tile), race_in_tile(z, sub_tiles, tile, options.heat, race, first_tile)


def _filtered(z: Tensor, largest: Tensor, options: Options, columns: Columns) -> Tensor:
    """z [M, width] with -inf for what top_k, min_p and top_p leave out; as ``thresholds`` of one process has it."""
    temperature = options.figures_at
    if options.keeps_one is True:
        return z
    if options.top_k is not None:
        z = _at_least(z, _threshold(z, torch.ones_like(z), options.top_k, largest, columns))
    if options.min_p is not None:
        log = options.min_p.log() if isinstance(options.min_p, Tensor) else math.log(options.min_p)
        gap = temperature * log
        z = _at_least(z, largest + (gap.float() if isinstance(gap, Tensor) else gap))
    if options.top_p is None:
        return z
    weights = (exact(z - largest) / temperature).exp()
    total = columns.add_up_(weights.sum(dim=-1, keepdim=True))
    threshold = _threshold(z, weights, options.top_p * total, largest, columns)
    if isinstance(options.top_p, Tensor):
        threshold = threshold.where(options.top_p < 1.0, -torch.inf)
    return _at_least(z, threshold)


def _at_least(z: Tensor, threshold: Tensor) -> Tensor:
    return z.where(z >= threshold, -torch.inf)


def _threshold(z: Tensor, weights: Tensor, needed: float | Tensor, largest: Tensor, columns: Columns) -> Tensor:
    """The largest number [M, 1], up to ``largest``, at or above which all ranks' z weigh as much as is needed.

    By bisection over float32 numbers in their order, that of their bits as integers.
    """
    keys = _ordered(z).long()
    low, end = torch.full_like(largest, -torch.inf), _ordered(largest).long() + 1
    low = _ordered(low).long()
    for _ in range(32):
        middle = (low + end) // 2
        mass = columns.add_up_(exact(weights * (keys >= middle)).sum(dim=-1, keepdim=True))
        is_enough = mass >= needed
        low, end = middle.where(is_enough, low), end.where(is_enough, middle)
    return _ordered(low.int().view(torch.float32)).view(torch.float32)


def _ordered(x: Tensor) -> Tensor:
    """The bits of float32 numbers as int32 that are in the numbers' order; and back."""
    bits = x.view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
