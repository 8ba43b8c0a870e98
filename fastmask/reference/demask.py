"""One demasking step: sample every masked row, score the samples, choose what to mask again.

Sampling is a hierarchical exponential race. If E_i ~ Exponential(1) independently, then argmax_i w_i / E_i
is i with probability w_i / sum w (the exponential form of the Gumbel-max trick, e.g. Maddison, Tarlow,
Minka, "A* sampling", https://arxiv.org/abs/1411.0030). Weights of a group add up, so the 4096-id tiles
race with their sums, then the winning tile's 64 sub-tiles, then that sub-tile's 64 ids: exact, one read
of the row, independent of the order of summation up to rounding.

Scores are those of MaskGIT (https://arxiv.org/abs/2202.04200, section 3.2) or of a token critic
(https://arxiv.org/abs/2209.04439).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask import _streams as streams
from fastmask.reference import philox
from fastmask.reference.top_k_filter import thresholds

# Logits held at once, as many as were fastest on a CPU.
_CHUNK_ELEMENTS = 2**22
# Behind a head so many rows at least, for its product.
HEAD_CHUNK_ROWS = 128
# Of a chunk's logits so many are worked on at once by each of a CPU's threads: 256 KiB, which a core's cache holds.
_BLOCK_ELEMENTS = 2**16


class Sampled(NamedTuple):
    """One id for each row, int64, and figures of the filtered, unheated softmax, float32, None where not asked for.

    log_probs: nats, of ``ids``. margins: how much more likely the likeliest id is than the next. entropies: nats.
    """

    ids: Tensor
    log_probs: Tensor
    margins: Tensor | None = None
    entropies: Tensor | None = None


class Rows(NamedTuple):
    """Which M rows of logits are sampled, and which counters they draw from.

    row_indices: [M] int64, flat positions b N + i; -1 for no row. seq_len: N. is_compact: whether there are logits
    of these rows only, [M, V], or of every position, [B N, V]. seed: [] int64.
    """

    row_indices: Tensor
    seq_len: int
    is_compact: bool
    seed: Tensor
    sample_offset: int
    step: int

    def chunk(self, part: slice) -> Rows:
        """A part of the rows, to go with logits of these only."""
        return Rows(self.row_indices[part], self.seq_len, True, self.seed, self.sample_offset, self.step)

    def of(self, values: Tensor, part: slice) -> Tensor:
        """What belongs to a part of the rows; some other's where there is no row."""
        return values[part] if self.is_compact else values[self.row_indices[part].clamp(min=0)]

    def samples(self) -> Tensor:
        return self.row_indices // self.seq_len + self.sample_offset

    def positions(self) -> Tensor:
        return self.row_indices % self.seq_len


class Sampling(NamedTuple):
    """How ids are sampled; see ``fastmask.functional.sample_tokens``."""

    temperature: float
    filter_thres: float | None
    top_p: float | None
    mask_id: int | None
    forbidden: Tensor | None
    with_margin: bool
    with_entropy: bool


class Remasking(NamedTuple):
    """How positions are scored and masked again; see ``fastmask.functional.remask_``."""

    is_confidence: bool
    noise_scale: float
    min_score: float | None
    mask_id: int
    sample_offset: int
    step: int


@torch.no_grad()
def sample_tokens(
    logits: Tensor, rows: Rows, kept_ids: Tensor | None, sampling: Sampling, out: Sampled | None = None
) -> Sampled:
    """The twin of ``kernels/demask.py``.

    Args:
        logits: [M, V] or [B N, V] floating point.
        rows: which of them, and their counters.
        kept_ids: [M] integer: an id >= 0 is not sampled but kept, and its probability returned.
        sampling: how.
        out: ids and log_probs [B, N] to write in place, at the rows' positions.

    A row with NaN, +inf or no finite logit gives the lowest allowed id and NaN; no row gives id -1 and zeros.
    """
    chunk = max(1, _CHUNK_ELEMENTS // logits.shape[-1])
    parts = []
    for start in range(0, max(1, len(rows.row_indices)), chunk):
        part = slice(start, start + chunk)
        z = rows.of(logits, part).to(torch.float32, copy=rows.is_compact)  # indexing has made a copy
        parts.append(_sample_chunk_(z, rows.chunk(part), None if kept_ids is None else kept_ids[part], sampling))
    return _gathered(parts, rows, out)


@torch.no_grad()
def linear_sample_tokens(
    embeddings: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    kept_ids: Tensor | None,
    sampling: Sampling,
    out: Sampled | None = None,
) -> Sampled:
    """``sample_tokens`` at logits = embeddings [M, D] weight^T + bias, one chunk of logits at a time."""
    chunk = max(HEAD_CHUNK_ROWS, _CHUNK_ELEMENTS // len(weight))
    parts = []
    for start in range(0, max(1, len(rows.row_indices)), chunk):
        part = slice(start, start + chunk)
        z = F.linear(rows.of(embeddings, part), weight, bias).float()
        parts.append(_sample_chunk_(z, rows.chunk(part), None if kept_ids is None else kept_ids[part], sampling))
    return _gathered(parts, rows, out)


def _gathered(parts: list[Sampled], rows: Rows, out: Sampled | None) -> Sampled:
    """The chunks' results as one, or where they belong in ``out``."""
    sampled = Sampled(*_joined(parts))
    if out is None:
        return sampled
    for canvas, values in ((out.ids, sampled.ids), (out.log_probs, sampled.log_probs)):
        padded = F.pad(canvas.flatten(), (0, 1))  # the last place is for what is no row
        canvas.copy_(padded.index_put_((rows.row_indices,), values)[:-1].view_as(canvas))
    return out


def _joined(parts: Sequence[Iterable[Tensor | None]]) -> Iterator[Any]:
    """Each field of the parts, their rows together; None where there is none."""
    return (None if field[0] is None else torch.cat(field) for field in zip(*parts, strict=True))


class _Figures(NamedTuple):
    """What is known of rows of logits before a race: sums of unheated and heated exp(z - max z), all float32.

    is_valid: [M, 1] bool, whether the largest logit is finite. totals: [M, 1]. sub_tiles: [M, S], heated, None where
    nothing races. margins, entropies: [M, 1], None where not asked for.
    """

    is_valid: Tensor
    totals: Tensor
    sub_tiles: Tensor | None
    margins: Tensor | None
    entropies: Tensor | None


def _sample_chunk_(z: Tensor, rows: Rows, kept_ids: Tensor | None, sampling: Sampling) -> Sampled:
    """Of logits z [M, V] float32, which are filtered in place."""
    blocks = [_figures(part, _filter_(part, sampling), sampling) for part in z.split(_block_rows(z))]
    is_valid, totals, sub_tiles, margins, entropies = _joined(blocks)
    ids = z.argmax(dim=-1, keepdim=True) if sub_tiles is None else _race(z, sub_tiles, sampling.temperature, rows)
    ids = ids.where(is_valid, _lowest_allowed(sampling, z.shape[-1]))
    if kept_ids is not None:
        ids = torch.where(kept_ids[:, None] >= 0, kept_ids[:, None], ids)

    is_row = rows.row_indices[:, None] >= 0
    figures: list[Any] = [z.gather(-1, ids) - totals.log(), margins, entropies]
    figures = [None if x is None else x.where(is_valid, torch.nan).where(is_row, 0.0).squeeze(-1) for x in figures]
    return Sampled(ids.where(is_row, -1).squeeze(-1), *figures)


def _block_rows(z: Tensor) -> int:
    """How many rows of a chunk are worked on at once: all, but for a CPU's caches."""
    if z.device.type != "cpu" or torch.compiler.is_compiling():
        return max(1, len(z))
    return max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // z.shape[-1])


def _filter_(z: Tensor, sampling: Sampling) -> Tensor:
    """Leaves in z [M, V] what may be sampled, less the row's largest, else -inf; whether that is finite, [M, 1]."""
    if excludes(sampling.mask_id, z.shape[-1]):
        z[:, sampling.mask_id] = -torch.inf
    if sampling.forbidden is not None:
        z.masked_fill_(sampling.forbidden, -torch.inf)
    threshold = thresholds(z, sampling.filter_thres, sampling.top_p)
    stays = None if threshold is None else torch.ge(z, threshold, out=torch.empty_like(z))
    largest = z.amax(dim=-1, keepdim=True)
    z.sub_(largest)
    if stays is not None:  # made 1 or -inf, where z is at most 0: many times as fast on a CPU as masked_fill_
        torch.minimum(z, F.threshold(stays, 0.5, -torch.inf, inplace=True), out=z)
    return largest.isfinite()


def _figures(z: Tensor, is_valid: Tensor, sampling: Sampling) -> _Figures:
    """Of z [M, V] as :func:`_filter_` leaves it."""
    unheated = _weights(z, 1.0)
    totals = unheated.sum(dim=-1, keepdim=True)
    margins = _margins(z) / totals if sampling.with_margin else None
    entropies = None
    if sampling.with_entropy:
        energy = (unheated * z.clamp(min=-1e30)).sum(dim=-1, keepdim=True)  # 0 times infinity is NaN
        entropies = (totals.log() - energy / totals).clamp(min=0.0)
    sub_tiles = None
    if sampling.temperature != 0.0:
        heated = unheated if sampling.temperature == 1.0 else _weights(z, sampling.temperature)
        missing = -z.shape[-1] % streams.SUB_TILE
        heated = F.pad(heated, (0, missing)) if missing else heated
        sub_tiles = heated.unflatten(-1, (-1, streams.SUB_TILE)).sum(dim=-1)
    return _Figures(is_valid, totals, sub_tiles, margins, entropies)


def _lowest_allowed(sampling: Sampling, num_tokens: int) -> Tensor | int:
    """The lowest id that may be sampled; 0 where none may."""
    if sampling.forbidden is None:
        return int(sampling.mask_id == 0 and num_tokens > 1)
    excluded = sampling.forbidden.int()
    if sampling.mask_id is not None and excludes(sampling.mask_id, num_tokens):
        excluded[sampling.mask_id : sampling.mask_id + 1] = (
            1  # a slice is filled; a single element waits for a copy of the 1
        )
    return excluded.argmin()


def _margins(z: Tensor) -> Tensor:
    """1 - exp(second largest) of each row of z [M, V] whose largest is 0, [M, 1]; 1 where nothing else stays."""
    return torch.ones_like(z) if z.shape[-1] == 1 else -torch.expm1(z.topk(2, dim=-1).values[:, 1:])


def _weights(z: Tensor, temperature: float) -> Tensor:
    """exp(z / temperature), [M, V], of z <= 0."""
    # Base 2: on a CPU several times as fast as exp, and not slowed by underflow.
    # The factor stays finite, infinity times the maximum's 0 being NaN, and above 0, for the sake of -inf.
    limits = torch.finfo(torch.float32)
    factor = max(limits.tiny, min(math.log2(math.e) / temperature, limits.max))
    return (z * factor).exp2_()


def excludes(mask_id: int | None, num_tokens: int) -> bool:
    """Whether mask_id is one of the ids that the logits speak of."""
    return mask_id is not None and 0 <= mask_id < num_tokens


def _race(z: Tensor, sub_tiles: Tensor, temperature: float, rows: Rows) -> Tensor:
    """Ids [M, 1] of z [M, V], likely in proportion to their heated weights, of which sub_tiles [M, S] are sums."""
    per_tile = min(streams.TILE // streams.SUB_TILE, sub_tiles.shape[-1])
    sub_tiles = F.pad(sub_tiles, (0, -sub_tiles.shape[-1] % per_tile)).unflatten(-1, (-1, per_tile))
    row = torch.arange(len(z), device=z.device)
    tile = _winner(sub_tiles.sum(dim=-1), streams.TILE_RACE, rows, torch.zeros_like(row))
    first = tile * per_tile
    sub_tile = first + _winner(sub_tiles[row, tile], streams.SUB_TILE_RACE, rows, first)
    first = sub_tile * streams.SUB_TILE
    ids = first[:, None] + torch.arange(streams.SUB_TILE, device=z.device)
    is_id = ids < z.shape[-1]
    weights = _weights(z.gather(-1, ids.where(is_id, 0)), temperature).where(is_id, 0.0)
    return (first + _winner(weights, streams.ELEMENT_RACE, rows, first))[:, None]


def _winner(weights: Tensor, stream: int, rows: Rows, first: Tensor) -> Tensor:
    """argmax_i weights_i / E_i, [M], over weights [M, G] whose counters start at ``first`` [M]."""
    if weights.shape[-1] == 1:
        return torch.zeros_like(first)
    element = first[:, None] + torch.arange(weights.shape[-1], device=weights.device)
    high, low, _, _ = philox.draw(
        rows.seed,
        stream,
        rows.step,
        sample=rows.samples()[:, None],
        position=rows.positions()[:, None],
        element=element,
    )
    return (weights / philox.exponential(high, low)).argmax(dim=-1)


def score_noise(seed: Tensor, shape: torch.Size, sample_offset: int, step: int) -> Tensor:
    """Gumbel(0, 1) noise of the score of each position [B, N], float32."""
    sample, position = (torch.arange(size, device=seed.device) for size in shape)
    high, low, _, _ = philox.draw(
        seed, streams.SCORE_NOISE, step, sample=sample[:, None] + sample_offset, position=position
    )
    return philox.gumbel(high, low)


def select_to_remask(scores: Tensor, eligible: Tensor, counts: Tensor, min_score: float | None) -> Tensor:
    """The ``counts`` eligible positions of highest score in each row.

    Order: NaN first, then by falling score (-0.0 equals 0.0), ties by rising position.

    Args:
        scores: [B, N] float32.
        eligible: [B, N] bool.
        counts: [B] integer; more than are eligible selects all of them.
        min_score: a lower score is not eligible; NaN is.

    Returns:
        [B, N] bool.
    """
    if min_score is not None:
        eligible = eligible & ~(scores < min_score)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    in_order = eligible.gather(-1, order)
    chosen = in_order & (in_order.cumsum(dim=-1) <= counts[:, None])
    return torch.zeros_like(eligible).scatter_(-1, order, chosen)


@torch.no_grad()
def remask_(
    ids: Tensor,
    is_masked: Tensor,
    row_indices: Tensor,
    row_starts: Tensor,
    values: Tensor,
    eligible: Tensor | None,
    counts: Tensor,
    seed: Tensor,
    remasking: Remasking,
) -> None:
    """Selects by values [B, N] and writes ids, is_masked [B, N] and the list of masked positions in place.

    Sequence b lists its flat positions in row_indices[row_starts[b] : row_starts[b + 1]], then -1; what does not
    fit is left out. ``eligible`` is by default what is masked.
    """
    scores = values.float()
    if remasking.noise_scale:
        noise = score_noise(seed, values.shape, remasking.sample_offset, remasking.step)
        scores = scores + remasking.noise_scale * noise
    scores = -scores if remasking.is_confidence else scores
    chosen = select_to_remask(scores, is_masked if eligible is None else eligible, counts, remasking.min_score)
    is_masked.copy_(chosen)
    ids.masked_fill_(chosen, remasking.mask_id)
    slots = row_starts[:-1, None] + chosen.cumsum(dim=-1) - 1
    slots = slots.where(chosen & (slots < row_starts[1:, None]), len(row_indices))  # the place behind the last
    flat = torch.arange(ids.numel(), device=ids.device)
    listed = torch.full((len(row_indices) + 1,), -1, device=ids.device)
    row_indices.copy_(listed.index_put_((slots.flatten(),), flat)[:-1])
