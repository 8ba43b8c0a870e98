"""What the kernels of sample_tokens are made of: the weights of logits, their sums over a tile, and the race.

See ``fastmask/reference/sample_tokens.py``, the specification of the race.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

from fastmask import _streams as streams
from fastmask.kernels import _logit_rows as logit_rows
from fastmask.kernels import _math, philox

_SUB_TILE = tl.constexpr(streams.SUB_TILE)
LOG2E = tl.constexpr(math.log2(math.e))
_LN2 = tl.constexpr(math.log(2.0))


class TileSums(NamedTuple):
    """Sums over logits z of one tile, relative to its shift: w = exp(z - shift), exp((z - shift) / T), w (z - shift);
    or, where the figures are processed, w = exp((z - shift) / T).

    energy: None where no entropy is asked for.
    """

    total: tl.tensor
    heated: tl.tensor
    energy: tl.tensor | None


class Row(NamedTuple):
    """One row of logits: V of them from a flat index on, and which of its ids never count."""

    x_ptr: tl.tensor
    start: tl.tensor
    V: tl.tensor
    excluded: logit_rows.Excluded


class Counter(NamedTuple):
    """Which random numbers a row draws."""

    seed: tl.tensor
    sample: tl.tensor
    position: tl.tensor
    step: tl.tensor


@triton.jit
def finite(x):
    """x, or 0 for -inf: what may be subtracted from -inf."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def of_figures(figure_factor):
    """log2(e) / T of the figures."""
    return LOG2E if figure_factor is None else figure_factor


@triton.jit
def inverse_temperature(figure_factor):
    """1 / T of the figures; None for 1."""
    return None if figure_factor is None else figure_factor * _LN2


@triton.jit
def nats(gap, over_temperature):
    """A difference of logits, divided by the figures' temperature."""
    return gap if over_temperature is None else gap * over_temperature


@triton.jit
def weights(z, shift, factor, threshold):
    """2^((z - shift) factor) of logits, 0 below the threshold, if any; what a NaN weighs stays NaN."""
    weight = _math.exp2((z - shift) * factor)
    return weight if threshold is None else tl.where(z < threshold, 0.0, weight)


@triton.jit
def load_body(x_ptr, first, length, SIZE: tl.constexpr):
    """SIZE elements of a body from ``first`` on, float32; -inf from ``length`` elements on, which is a multiple of
    16 bytes."""
    if x_ptr.dtype.element_ty == tl.bfloat16:
        word = tl.arange(0, SIZE // 2)
        first = tl.multiple_of(first // 2, 4)
        words = logit_rows.load_words(x_ptr, first + word, word < tl.multiple_of(length // 2, 4))
        even, odd = logit_rows.halves(words)
        return tl.interleave(even, odd)
    else:
        lane = tl.arange(0, SIZE)
        return tl.load(x_ptr + first + lane, mask=lane < length, other=-float("inf")).to(tl.float32)


@triton.jit
def tile_sums(z, shift, figure_factor, factor, threshold, WITH_ENTROPY: tl.constexpr, sub_tiles_ptr=None,
              is_same=None):  # fmt: skip
    """Sums over a block of logits; the heated ones of its sub-tiles too, where there is a place to store them.

    figure_factor: log2(e) / T of the figures, None for 1. factor: of the samples, None where that is the same.
    is_same: whether it turns out to be: then both are summed by sub-tiles, to round as if that were known.
    """
    unheated = weights(z, shift, of_figures(figure_factor), threshold)
    heated = unheated if factor is None else weights(z, shift, factor, threshold)
    if sub_tiles_ptr is None:
        heated_total = tl.sum(heated)
    else:
        SUB_TILES: tl.constexpr = z.shape[0] // _SUB_TILE
        sub_tiles = tl.sum(tl.reshape(heated, (SUB_TILES, _SUB_TILE)), 1)
        tl.store(sub_tiles_ptr + tl.arange(0, SUB_TILES), sub_tiles)
        heated_total = tl.sum(sub_tiles)
    total = heated_total if factor is None else tl.sum(unheated)
    if is_same is not None:
        total = tl.where(is_same, heated_total, tl.sum(unheated))
    energy = None
    if WITH_ENTROPY:
        energy = tl.sum(unheated * tl.maximum(z - shift, -1e30))  # 0 times infinity is NaN
    return TileSums(total, heated_total, energy)


@triton.jit
def second_largest(z, largest):
    """The second largest of a block, the largest itself where two are."""
    is_largest = z == largest
    second = tl.max(tl.where(is_largest, -float("inf"), z))
    return tl.where(tl.sum(is_largest.to(tl.int32)) > 1, largest, second)


@triton.jit
def logits_at(row, offs_v, first, last, VECTOR: tl.constexpr, LOADED: tl.constexpr):
    """A row's logits at columns in [first, last), float32; -inf where there is none, or one excluded.

    Where rows begin at 16 bytes VECTOR columns are loaded or left together: what lies behind the last is dropped.
    """
    in_v = offs_v < row.V
    in_row = tl.max_constancy(offs_v // VECTOR * VECTOR < row.V, LOADED)
    z = tl.load(row.x_ptr + row.start + offs_v, mask=in_row, other=-float("inf")).to(tl.float32)
    mask_id = row.excluded.mask_id
    is_special = last > row.V
    if mask_id is not None:
        is_special |= (mask_id >= first) & (mask_id < last)
    if is_special:  # other blocks spend nothing on it
        z = tl.where(in_v if mask_id is None else in_v & (offs_v != mask_id), z, -float("inf"))
    forbidden = logit_rows.Excluded(None, row.excluded.forbidden_ptr)
    return logit_rows.without_excluded(z, offs_v, in_v, first, last, forbidden)


@triton.jit
def others(row, first, SIZE: tl.constexpr, largest, figure_factor, threshold, VECTOR: tl.constexpr):
    """The sum of exp((z - largest) / T) over the logits below ``largest`` among SIZE columns from ``first`` on."""
    LANES: tl.constexpr = min(SIZE, 256)
    sums = tl.zeros((LANES,), tl.float32)
    for start in range(first, min(first + SIZE, row.V), LANES):
        z = logits_at(row, start + tl.arange(0, LANES), start, start + LANES, VECTOR, [VECTOR])
        sums += tl.where(z < largest, weights(z, largest, of_figures(figure_factor), threshold), 0.0)
    return tl.sum(sums)


@triton.jit
def first_at(row, first, SIZE: tl.constexpr, value, VECTOR: tl.constexpr):
    """The lowest id of that logit among SIZE columns from ``first`` on; one past all ids where there is none."""
    LANES: tl.constexpr = min(SIZE, 256)
    ids = tl.full((LANES,), 0x7FFFFFFF, tl.int32)
    for start in range(first, min(first + SIZE, row.V), LANES):
        offs_v = start + tl.arange(0, LANES)
        z = logits_at(row, offs_v, start, start + LANES, VECTOR, [VECTOR])
        ids = tl.minimum(ids, tl.where(z == value, offs_v, 0x7FFFFFFF))
    return tl.min(ids)


@triton.jit
def winner(weight, lane, num_lanes, counter, stream: tl.constexpr, first):
    """argmax_i weight_i / E_i over the first num_lanes; ties to the lower lane, and 0 where there is but one.

    first: what the counters of element i begin at.
    """
    best = tl.full((), 0, tl.int32)
    if num_lanes > 1:
        high, low, _, _ = philox.draw(
            counter.seed, stream, counter.sample, counter.position, first + lane, counter.step
        )
        # Triton 3.9's interpreter raises at an argmax of NaN alone.
        race = tl.where((lane < num_lanes) & (weight >= 0.0), weight / philox.exponential(high, low), -1.0)
        best = tl.argmax(race, 0).to(tl.int32)
    return best


@triton.jit
def lowest_allowed(V, excluded):
    """The lowest id that may be sampled; 0 where none may."""
    lowest = tl.full((), 0, tl.int32)
    if excluded.forbidden_ptr is not None:
        is_forbidden = tl.load(excluded.forbidden_ptr) != 0
        if excluded.mask_id is not None:
            is_forbidden |= excluded.mask_id == 0
        while is_forbidden & (lowest < V):
            lowest += 1
            is_forbidden = tl.load(excluded.forbidden_ptr + lowest, mask=lowest < V, other=0) != 0
            if excluded.mask_id is not None:
                is_forbidden |= lowest == excluded.mask_id
    elif excluded.mask_id is not None:
        lowest += (excluded.mask_id == 0).to(tl.int32)
    return tl.where(lowest < V, lowest, 0)
