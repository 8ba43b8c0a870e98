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

try:
    import numpy as np
except ImportError:  # torch runs without it
    np = None  # type: ignore[assignment]

# A chunk's temporaries stay in a CPU core's cache; a head's chunk is larger, for its matrix product.
_CHUNK_ELEMENTS = 2**20
HEAD_CHUNK_ROWS = 1024


class Sampled(NamedTuple):
    """ids: [M] int64. log_probs: [M] float32, nats, of ``ids`` under the filtered, unheated softmax."""

    ids: Tensor
    log_probs: Tensor


class Rows(NamedTuple):
    """Which counters M rows draw from: seed [] int64; samples, positions [M] int64; the step."""

    seed: Tensor
    samples: Tensor
    positions: Tensor
    step: int

    def chunk(self, part: slice) -> Rows:
        return self._replace(samples=self.samples[part], positions=self.positions[part])


@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    rows: Rows,
    kept_ids: Tensor | None = None,
    *,
    temperature: float,
    filter_thres: float | None,
    mask_id: int | None,
) -> Sampled:
    """The twin of ``kernels/demask.py``.

    Args:
        logits: [M, V] floating point.
        rows: the counters of the M rows.
        kept_ids: [M] integer: an id >= 0 is not sampled but kept, and its probability returned.
        temperature: 0 for the argmax, ties to the lower id.
        filter_thres: keeps the ceil((1 - filter_thres) V) largest logits and their ties; None keeps all.
        mask_id: never sampled; None or an id outside [0, V) excludes nothing.

    A row with NaN, +inf or no finite logit gives the lowest allowed id and log-probability NaN.
    """
    chunk = max(1, _CHUNK_ELEMENTS // _padded(logits.shape[-1]))
    parts = []
    for start in range(0, max(1, len(logits)), chunk):
        part = slice(start, start + chunk)
        parts.append(
            _sample_chunk(
                logits[part],
                rows.chunk(part),
                None if kept_ids is None else kept_ids[part],
                temperature=temperature,
                filter_thres=filter_thres,
                mask_id=mask_id,
            )
        )
    return Sampled(*map(torch.cat, zip(*parts, strict=True)))


@torch.no_grad()
def linear_sample_tokens(
    embeddings: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    kept_ids: Tensor | None = None,
    *,
    temperature: float,
    filter_thres: float | None,
    mask_id: int | None,
) -> Sampled:
    """``sample_tokens`` at logits = embeddings [M, D] weight^T + bias, one chunk of logits at a time."""
    parts = []
    for start in range(0, max(1, len(embeddings)), HEAD_CHUNK_ROWS):
        part = slice(start, start + HEAD_CHUNK_ROWS)
        parts.append(
            sample_tokens(
                F.linear(embeddings[part], weight, bias),
                rows.chunk(part),
                None if kept_ids is None else kept_ids[part],
                temperature=temperature,
                filter_thres=filter_thres,
                mask_id=mask_id,
            )
        )
    return Sampled(*map(torch.cat, zip(*parts, strict=True)))


def _sample_chunk(
    logits: Tensor,
    rows: Rows,
    kept_ids: Tensor | None,
    *,
    temperature: float,
    filter_thres: float | None,
    mask_id: int | None,
) -> Sampled:
    z = logits.to(torch.float32, copy=True)
    if excludes(mask_id, z.shape[-1]):
        z[:, mask_id] = -torch.inf
    threshold = filter_threshold(z, filter_thres)
    z_max = z.amax(dim=-1, keepdim=True)
    valid = z_max.isfinite()

    unheated = _weights(z, z_max, threshold, 1.0)
    if temperature == 0.0:
        ids = z.argmax(dim=-1, keepdim=True)
    elif temperature == 1.0:
        ids = _race(unheated, rows)
    else:
        ids = _race(_weights(z, z_max, threshold, temperature), rows)
    ids = ids.where(valid, 1 if mask_id == 0 and z.shape[-1] > 1 else 0)
    if kept_ids is not None:
        ids = torch.where(kept_ids[:, None] >= 0, kept_ids[:, None], ids)

    z_sampled = z.gather(-1, ids)
    log_probs = (z_sampled - z_max) - unheated.sum(dim=-1, keepdim=True).log()
    if threshold is not None:  # a kept id may lie below it
        log_probs = log_probs.where(z_sampled >= threshold, -torch.inf)
    return Sampled(ids.squeeze(-1), log_probs.where(valid, torch.nan).squeeze(-1))


def filter_threshold(z: Tensor, filter_thres: float | None) -> Tensor | None:
    """The ceil((1 - filter_thres) V)-th largest of each row of z [M, V], [M, 1]; None where all stay."""
    num_kept = z.shape[-1] if filter_thres is None else math.ceil((1.0 - filter_thres) * z.shape[-1])
    first_kept = z.shape[-1] - num_kept
    if first_kept <= 0:
        return None
    if z.device.type == "cpu" and np is not None and not torch.compiler.is_compiling():  # six times as fast as topk
        return torch.from_numpy(np.partition(z.numpy(), first_kept, axis=-1)[:, first_kept, None])
    return z.topk(num_kept, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)


def _weights(z: Tensor, z_max: Tensor, threshold: Tensor | None, temperature: float) -> Tensor:
    """exp((z - max z) / temperature), [M, V], 0 below the threshold."""
    # Base 2: on a CPU several times as fast as exp, and not slowed by underflow.
    # The factor stays finite, infinity times the maximum's 0 being NaN, and above 0, for the sake of -inf.
    limits = torch.finfo(torch.float32)
    factor = max(limits.tiny, min(math.log2(math.e) / temperature, limits.max))
    weights = (z - z_max).mul_(factor).exp2_()
    return weights if threshold is None else weights.mul_(z >= threshold)


def excludes(mask_id: int | None, num_tokens: int) -> bool:
    """Whether mask_id is one of the ids that the logits speak of."""
    return mask_id is not None and 0 <= mask_id < num_tokens


def _race(weights: Tensor, rows: Rows) -> Tensor:
    """Ids [M, 1], each with probability weights / sum of weights, [M, V]."""
    num_rows, num_tokens = weights.shape
    padded = _padded(num_tokens)
    tiles = math.ceil(num_tokens / streams.TILE)
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


def score_noise(rows: Rows) -> Tensor:
    """Gumbel(0, 1) noise of each row's score, [M] float32."""
    high, low, _, _ = philox.draw(
        rows.seed, streams.SCORE_NOISE, rows.step, sample=rows.samples, position=rows.positions
    )
    return philox.gumbel(high, low)


def select_to_remask(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """The ``counts`` eligible positions of highest score in each row.

    Order: NaN first, then by falling score (-0.0 equals 0.0), ties by rising position.

    Args:
        scores: [B, N] float32.
        eligible: [B, N] bool.
        counts: [B] integer; more than are eligible selects all of them.

    Returns:
        [B, N] bool.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    in_order = eligible.gather(-1, order)
    chosen = in_order & (in_order.cumsum(dim=-1) <= counts[:, None])
    return torch.zeros_like(eligible).scatter_(-1, order, chosen)
