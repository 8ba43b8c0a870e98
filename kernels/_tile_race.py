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
# What a tile is reduced by, before its lanes are: as many as two warps have threads.
LANES = tl.constexpr(64)


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
def inverse_temperature(figure_factor, IS_OWN: tl.constexpr):
    """1 / T of the figures; None for 1. IS_OWN: of a sequence's own, which may be 1, and is exact then."""
    if figure_factor is None:
        return None
    else:
        over_temperature = figure_factor * _LN2
        return tl.where(figure_factor == LOG2E, 1.0, over_temperature) if IS_OWN else over_temperature


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
def kept(z, threshold):
    """The logits that are not below the threshold, if any, and -inf elsewhere; a NaN stays."""
    return z if threshold is None else tl.where(z < threshold, -float("inf"), z)


@triton.jit
def load_body(x_ptr, first, length, left_out, VECTOR: tl.constexpr, SIZE: tl.constexpr):
    """SIZE elements of a body from ``first`` on, float32; -inf from ``length`` elements on, which is a multiple of
    16 bytes, and in the vector that is left out, if any."""
    if x_ptr.dtype.element_ty == tl.bfloat16:
        word = tl.arange(0, SIZE // 2)
        first = tl.multiple_of(first // 2, 4)
        in_body = word < tl.multiple_of(length // 2, 4)
        if left_out is not None:
            in_body &= word // (VECTOR // 2) != left_out
        even, odd = logit_rows.halves(logit_rows.load_words(x_ptr, first + word, in_body))
        return tl.interleave(even, odd)
    else:
        lane = tl.arange(0, SIZE)
        in_body = lane < length
        if left_out is not None:
            in_body &= lane // VECTOR != left_out
        return tl.load(x_ptr + first + lane, mask=in_body, other=-float("inf")).to(tl.float32)


@triton.jit
def edges(length, body, left_out, VECTOR: tl.constexpr):
    """Columns [64] of a tile that its body does not hold, and which of them are any: those before it, those after
    it, and the vector that is left out."""
    lane = tl.arange(0, LANES)
    is_head, is_tail = lane < VECTOR, lane < 2 * VECTOR
    after = body.column + body.length
    offs_v = lane + tl.where(is_head, 0, after - VECTOR)
    in_v = offs_v < tl.where(is_head, tl.minimum(body.column, length), length)
    if left_out is None:
        return offs_v, in_v & is_tail
    else:
        first = tl.where(is_left_out(left_out, body, VECTOR), body.column + left_out * VECTOR, length)
        offs_v = tl.where(is_tail, offs_v, first + lane - 2 * VECTOR)
        return offs_v, tl.where(is_tail, in_v, (offs_v < length) & (lane < 3 * VECTOR))


@triton.jit
def is_left_out(left_out, body, VECTOR: tl.constexpr):
    """Whether the body has the vector that is left out."""
    return (left_out >= 0) & (left_out * VECTOR < body.length)


@triton.jit
def by_lane(x, VECTOR: tl.constexpr):
    """A block by what each of 64 lanes holds, [., 64, .]: the first VECTOR elements are the first lane's, and so on,
    around.

    One warp or two, where vectors of so many are loaded, find what a lane holds in one thread's registers.
    """
    PER_LANE: tl.constexpr = min(VECTOR, x.shape[0] // LANES)
    return tl.reshape(x, (x.shape[0] // (PER_LANE * LANES), LANES, PER_LANE))


@triton.jit
def sum_by_lane(x, VECTOR: tl.constexpr):
    """The sum of what each lane holds of a block, [64]."""
    return tl.sum(tl.sum(by_lane(x, VECTOR), 2), 0)


@triton.jit
def max_by_lane(x, VECTOR: tl.constexpr):
    """Its maximum, likewise."""
    return tl.max(tl.max(by_lane(x, VECTOR), 2), 0)


@triton.jit
def sum_of_lanes(x):
    """The sum over lanes, in the same order by one warp and by two."""
    return tl.sum(tl.sum(tl.reshape(x, (2, LANES // 2)), 0))


@triton.jit
def sum_of_sub_tiles(x):
    """Likewise of a whole tile's sub-tiles."""
    if x.shape[0] == 64:
        x = tl.sum(tl.reshape(x, (8, 8)), 0)
        x = tl.sum(tl.reshape(x, (2, 4)), 0)
    return tl.sum(x)


@triton.jit
def gap(z, shift):
    """z - shift, finite: 0 times infinity is NaN."""
    return tl.maximum(z - shift, -1e30)


@triton.jit
def below(z, largest):
    """The logits that are not the largest, -inf where they are, and how many are: 1 or 0."""
    is_largest = z == largest
    return tl.where(is_largest, -float("inf"), z), is_largest.to(tl.int32)


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
        race = tl.where(lane < num_lanes, keys(weight, lane, counter, stream, first), -1.0)
        best = tl.argmax(race, 0).to(tl.int32)
    return best


@triton.jit
def keys(weight, lane, counter, stream: tl.constexpr, first):
    """weight_i / E_i, of which the largest wins; -1 of what weighs NaN: Triton 3.9's interpreter raises at an argmax
    of NaN alone."""
    high, low, _, _ = philox.draw(counter.seed, stream, counter.sample, counter.position, first + lane, counter.step)
    return tl.where(weight >= 0.0, weight / philox.exponential(high, low), -1.0)


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
