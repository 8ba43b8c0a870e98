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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from fastmask import _streams as streams
from fastmask.reference import philox
from fastmask.reference.top_k_filter import thresholds

# Logits worked on at once, as many as were fastest on a CPU; behind a head so many rows at least, for its product.
_CHUNK_ELEMENTS = 2**21
HEAD_CHUNK_ROWS = 128


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
        return self._replace(row_indices=self.row_indices[part])

    def of(self, values: Tensor, part: slice) -> Tensor:
        """What belongs to a part of the rows; some other's where there is no row."""
        return values[part] if self.is_compact else values[self.row_indices[part].clamp(min=0)]

    @property
    def samples(self) -> Tensor:
        return self.row_indices // self.seq_len + self.sample_offset

    @property
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
    chunk = max(1, _CHUNK_ELEMENTS // _padded(logits.shape[-1]))
    parts = []
    for start in range(0, max(1, len(rows.row_indices)), chunk):
        part = slice(start, start + chunk)
        z = rows.of(logits, part).to(torch.float32, copy=rows.is_compact)  # indexing has made a copy
        parts.append(_sample_chunk(z, rows.chunk(part), None if kept_ids is None else kept_ids[part], sampling))
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
    chunk = max(HEAD_CHUNK_ROWS, _CHUNK_ELEMENTS // _padded(len(weight)))
    parts = []
    for start in range(0, max(1, len(rows.row_indices)), chunk):
        part = slice(start, start + chunk)
        z = F.linear(rows.of(embeddings, part), weight, bias).float()
        parts.append(_sample_chunk(z, rows.chunk(part), None if kept_ids is None else kept_ids[part], sampling))
    return _gathered(parts, rows, out)


def _gathered(parts: list[Sampled], rows: Rows, out: Sampled | None) -> Sampled:
    """The chunks' results as one, or where they belong in ``out``."""
    sampled = Sampled(*(None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True)))  # type: ignore[arg-type]
    if out is None:
        return sampled
    for canvas, values in ((out.ids, sampled.ids), (out.log_probs, sampled.log_probs)):
        padded = F.pad(canvas.flatten(), (0, 1))  # the last place is for what is no row
        canvas.copy_(padded.index_put_((rows.row_indices,), values)[:-1].view_as(canvas))
    return out


def _sample_chunk(z: Tensor, rows: Rows, kept_ids: Tensor | None, sampling: Sampling) -> Sampled:
    temperature, num_tokens = sampling.temperature, z.shape[-1]
    if excludes(sampling.mask_id, num_tokens):
        z[:, sampling.mask_id] = -torch.inf
    if sampling.forbidden is not None:
        z.masked_fill_(sampling.forbidden, -torch.inf)
    threshold = thresholds(z, sampling.filter_thres, sampling.top_p)
    if threshold is not None:
        z.masked_fill_(z < threshold, -torch.inf)
    z_max = z.amax(dim=-1, keepdim=True)
    valid = z_max.isfinite()
    z.sub_(z_max)

    unheated = _weights(z, 1.0)
    total = unheated.sum(dim=-1, keepdim=True)
    if temperature == 0.0:
        ids = z.argmax(dim=-1, keepdim=True)
    else:
        ids = _race(unheated if temperature == 1.0 else _weights(z, temperature), rows)
    ids = ids.where(valid, _lowest_allowed(sampling, num_tokens))
    if kept_ids is not None:
        ids = torch.where(kept_ids[:, None] >= 0, kept_ids[:, None], ids)

    figures = [z.gather(-1, ids) - total.log(), None, None]
    if sampling.with_margin:
        figures[1] = _margins(z) / total
    if sampling.with_entropy:
        energy = (unheated * z.clamp(min=-1e30)).sum(dim=-1, keepdim=True)  # 0 times infinity is NaN
        figures[2] = (total.log() - energy / total).clamp(min=0.0)
    is_row = rows.row_indices[:, None] >= 0
    figures = [None if x is None else x.where(valid, torch.nan).where(is_row, 0.0).squeeze(-1) for x in figures]
    return Sampled(ids.where(is_row, -1).squeeze(-1), *figures)  # type: ignore[arg-type]


def _lowest_allowed(sampling: Sampling, num_tokens: int) -> Tensor | int:
    """The lowest id that may be sampled; 0 where none may."""
    if sampling.forbidden is None:
        return int(sampling.mask_id == 0 and num_tokens > 1)
    excluded = sampling.forbidden.int()
    if sampling.mask_id is not None and excludes(sampling.mask_id, num_tokens):
        excluded[sampling.mask_id] = 1
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


def _race(weights: Tensor, rows: Rows) -> Tensor:
    """Ids [M, 1], each with probability weights / sum of weights, [M, V]."""
    num_rows, num_tokens = weights.shape
    padded = _padded(num_tokens)
    tiles = math.ceil(num_tokens / streams.TILE)
    if padded > num_tokens:
        weights = F.pad(weights, (0, padded - num_tokens))
    weights = rearrange(weights, "m (tile sub id) -> m tile sub id", tile=tiles, id=streams.SUB_TILE)

    row = torch.arange(num_rows, device=weights.device)
    tile = _winner(weights.sum(dim=(2, 3)), streams.TILE_RACE, rows, torch.zeros_like(row))
    sub_tiles = weights[row, tile]
    first = tile * (streams.TILE // streams.SUB_TILE)
    sub_tile = _winner(sub_tiles.sum(dim=-1), streams.SUB_TILE_RACE, rows, first)
    first = (first + sub_tile) * streams.SUB_TILE
    return (first + _winner(sub_tiles[row, sub_tile], streams.ELEMENT_RACE, rows, first))[:, None]


def _padded(num_tokens: int) -> int:
    """num_tokens up to whole tiles; a single tile only up to whole sub-tiles."""
    unit = streams.SUB_TILE if num_tokens <= streams.TILE else streams.TILE
    return math.ceil(num_tokens / unit) * unit


def _winner(weights: Tensor, stream: int, rows: Rows, first: Tensor) -> Tensor:
    """argmax_i weights_i / E_i, [M], over weights [M, G] whose counters start at ``first`` [M]."""
    if weights.shape[-1] == 1:
        return torch.zeros_like(first)
    element = first[:, None] + torch.arange(weights.shape[-1], device=weights.device)
    high, low, _, _ = philox.draw(
        rows.seed,
        stream,
        rows.step,
        sample=rows.samples[:, None],
        position=rows.positions[:, None],
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
