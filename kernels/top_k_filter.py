"""Which logits of a row stay: the k largest, or the nucleus; as a threshold for each row, found without a sort.

Both are the largest threshold above which lies enough, enough being k logits (ties stay), or a share p of the
probability (the nucleus of Holtzman et al., https://arxiv.org/abs/1904.09751, with the token that crosses p). A
sample of the row brackets the threshold; one pass over the row counts what lies above the bracket and compacts what
lies inside it, a few thousand candidates, among which the threshold is then searched in registers. A bracket that
misses, or holds too many, is moved or narrowed and the pass repeated. A row of at most 8192 logits is searched in
registers at once.

Bytes for each row: its V logits, as a rule once for k and three to six times for p, a sample and its candidates; of a
short row its logits once for each.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels import _elementary as elementary
from fastmask.kernels import _order as ordered
from fastmask.kernels import _rows as logit_rows

_LOWEST = tl.constexpr(-2139095040)  # the order of -FLT_MAX
_BEYOND = tl.constexpr(0x7F800001)  # above the order of infinity

# A program reads a block of logits at once: so many lanes of a 16-byte vector each. A lane counts and lists its own
# candidates, so that a pass needs no communication between threads.
_BLOCK = tl.constexpr(8192)
_LISTED = tl.constexpr(2 * 8192)  # candidates of all lanes: two for each logit of a block
_SIGMAS = tl.constexpr(2.0)  # of the sample's weight, at either end of the bracket, which may miss
_WARPS = 16
_PROGRAMS = 528  # four for each SM of an H200, of which one runs at a time; their candidates stay in L2

# Largest vocabulary; logits sampled for k, and warps; logits sampled for p. A larger sample makes a narrower bracket,
# of 1 % to 4 % of a row. One or two rows in a hundred lie outside; and from V 100,000 on up to a quarter of float32
# rows has candidates that find no place, if half of all logits are kept.
_SAMPLES = ((2**16, 4096, 2, 8192), (math.inf, 16384, 16, 16384))
# A turn of a search costs a warp a hundred instructions, and three for each of a thread's logits: few warps with many
# logits do it for less. So many logits has a warp of a short row, where they count and where they have a weight.
_SHORT_WARP = 2048, 1024
_SHORT_BLOCK = 128  # holds a row's edges too


@triton.jit
def _weight(z, top):
    """What logits count for in the nucleus: their probability relative to the largest; -inf for nothing."""
    return elementary.exp(z - top)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _counted(stays, weight):
    """The weight of what stays, or one for each where logits only count."""
    return stays.to(tl.int32) if weight is None else tl.where(stays, weight, 0.0)


@triton.jit
def _above(z, weight, edges, edge_weight, bound):
    """The weight, or the number, of what is not below a bound, float32."""
    counted = _counted(z >= bound, weight)
    if edges is None:
        return tl.sum(counted).to(tl.float32)
    else:
        return tl.sum(tl.sum(counted, 1) + _counted(edges >= bound, edge_weight)).to(tl.float32)


@triton.jit
def _search(z, weight, base, target, slack, SPACING: tl.constexpr, edges=None, edge_weight=None):
    """The order of a threshold: base and the weight of what of z is not below it reach the target, and hardly more;
    and that weight.

    It ends where the weight is the target or no more than ``slack`` lies between the two ends, or where no number of
    the logits' dtype does. The lowest of z where even all of it does not reach the target. -inf is no logit.
    z: [lanes, n]; what is left over of it, [lanes], may come as edges. Without weights logits only count.
    """
    least, largest = tl.min(tl.where(z > -float("inf"), z, float("inf"))), tl.max(z)
    if edges is not None:
        least = tl.minimum(least, tl.min(tl.where(edges > -float("inf"), edges, float("inf"))))
        largest = tl.maximum(largest, tl.max(edges))
    low = ordered.order(least)
    high = ordered.order(largest) + 1
    if weight is None:
        above_low = base + _above(z, None, edges, None, least)
    elif edges is None:
        above_low = base + tl.sum(weight)
    else:
        above_low = base + tl.sum(weight) + tl.sum(edge_weight)
    above_high = base
    high = tl.where(above_low < target, low, high)
    turn = tl.full((), 0, tl.int32)
    while (high - low > SPACING) & (above_low - above_high > slack) & (above_low != target):
        # As if the weight fell exponentially between the two ends (a number's bits are about its logarithm); midway;
        # as if it were spread evenly; and half of all numbers on, which bounds the turns. Of 8192 normal logits the
        # 820 largest take ten turns, where the last two ways alone take twenty; half of them take ten, not eight.
        z_low, z_high = ordered.value(low), ordered.value(high)
        over, under = above_low - target, above_low - above_high
        if turn % 4 == 0:
            rest = tl.maximum(above_high, 0.5 * tl.minimum(target, 1.0))
            over = (_bits(above_low) - _bits(target)).to(tl.float32)
            under = (_bits(above_low) - _bits(rest)).to(tl.float32)
        share = tl.where(turn % 4 == 1, 0.5, over / under)
        probe = ordered.order(z_low + (z_high - z_low) * share)
        probe = tl.where(turn % 4 == 3, (low + high) >> 1, probe)
        probe = tl.minimum(tl.maximum(probe, low + 1), high - 1)
        turn += 1
        above = base + _above(z, weight, edges, edge_weight, ordered.value(probe))
        is_low = above >= target
        low = tl.where(is_low, probe, low)
        above_low = tl.where(is_low, above, above_low)
        high = tl.where(is_low, high, probe)
        above_high = tl.where(is_low, above_high, above)
    return low, above_low


@triton.jit
def _block(x_ptr, body_start, body_column, body_length, offset, mask_id, forbidden_ptr, HAS_MASK_ID: tl.constexpr,
           HAS_FORBIDDEN: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A block of a row's body [lanes, VECTOR], float32, -inf where it has ended."""
    LANES: tl.constexpr = BLOCK // VECTOR
    block = offset + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    in_body = block < body_length
    z = tl.load(x_ptr + body_start + block, mask=in_body, other=-float("inf")).to(tl.float32)
    first = body_column + offset
    return logit_rows.without_excluded(
        z, body_column + block, in_body, first, first + BLOCK, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN
    )


@triton.jit
def _sorted_out(z, z_low, z_high):
    """Which logits are in [z_low, z_high), and which above."""
    is_high = z >= z_high  # never of a NaN, which is beyond infinity
    return (z >= z_low) & (is_high == 0), is_high


@triton.jit
def _halves(z):
    """[lanes, n] as two [lanes, n / 2] of the same threads."""
    return tl.split(tl.reshape(z, (z.shape[0], z.shape[1] // 2, 2)))


@triton.jit
def _columns(z, VECTOR: tl.constexpr):
    """The columns of a block [lanes, VECTOR], each with its lanes, in the threads that hold them."""
    if VECTOR == 2:
        return tl.split(z)
    elif VECTOR == 4:
        even, odd = _halves(z)
        a, b = tl.split(even)
        c, d = tl.split(odd)
        return a, b, c, d
    else:
        even, odd = _halves(z)
        a, b = _halves(even)
        c, d = _halves(odd)
        a, e = tl.split(a)
        b, f = tl.split(b)
        c, g = tl.split(c)
        d, h = tl.split(d)
        return a, b, c, d, e, f, g, h


@triton.jit
def _pass(x_ptr, body_start, body_column, body_length, edges, low, high, top, candidates_ptr, mask_id, forbidden_ptr,
          HAS_MASK_ID: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, BY_MASS: tl.constexpr,
          VECTOR: tl.constexpr):  # fmt: skip
    """One pass over a row: each lane lists its candidates in [low, high); how many a lane has, the weight above high,
    and that of the candidates."""
    LANES: tl.constexpr = _BLOCK // VECTOR
    CAPACITY: tl.constexpr = _LISTED // LANES
    z_low, z_high = ordered.value(low), ordered.value(high)
    lane = tl.arange(0, LANES)
    tl.debug_barrier()  # every thread has read the candidates of the pass before
    # A lane's first place is for its edge.
    is_candidate, is_high = _sorted_out(edges, z_low, z_high)
    tl.store(candidates_ptr + lane * CAPACITY, tl.where(is_candidate, edges, -float("inf")))
    edge_weight = _weight(edges, top) if BY_MASS else None
    edge_above = tl.sum(_counted(is_high, edge_weight)).to(tl.float32)
    edge_between = tl.sum(_counted(is_candidate, edge_weight)).to(tl.float32)
    slot = lane * CAPACITY + 1
    end = lane * CAPACITY + CAPACITY
    above_high = tl.full((LANES,), 0.0, tl.float32)
    between = tl.full((LANES,), 0.0, tl.float32)
    for offset in range(0, body_length, _BLOCK):
        z = _block(
            x_ptr, body_start, body_column, body_length, offset, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN,
            VECTOR, _BLOCK,
        )  # fmt: skip
        columns = _columns(z, VECTOR)
        for i in tl.static_range(VECTOR):
            is_inside, is_above = _sorted_out(columns[i], z_low, z_high)
            tl.store(candidates_ptr + slot, columns[i], mask=is_inside & (slot < end))
            slot += is_inside.to(tl.int32)
            if BY_MASS:
                weight = _weight(columns[i], top)
                above_high += tl.where(is_above, weight, 0.0)
                between += tl.where(is_inside, weight, 0.0)
            else:
                above_high += is_above.to(tl.float32)
    number = slot - lane * CAPACITY
    if not BY_MASS:
        between = (number - 1).to(tl.float32)
    tl.debug_barrier()  # every thread sees all candidates
    return number, tl.sum(above_high) + edge_above, tl.sum(between) + edge_between


@triton.jit
def _select(x_ptr, body_start, body_column, body_length, edges, floor, most, low, high, target, top, candidates_ptr,
            mask_id, forbidden_ptr, HAS_MASK_ID: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, BY_MASS: tl.constexpr,
            SPACING: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """The order of the largest threshold below most whose weight reaches the target; floor where none above it does.

    [low, high) is the first guess of where it lies.
    """
    LANES: tl.constexpr = _BLOCK // VECTOR
    CAPACITY: tl.constexpr = _LISTED // LANES
    least = floor  # the threshold lies in [least, most), and so much weight is not below most
    above_most = tl.full((), 0.0, tl.float32)
    number = tl.full((LANES,), CAPACITY + 1, tl.int32)
    is_listed = tl.full((), 0, tl.int1)
    turn = tl.full((), 0, tl.int32)
    while (most - least > SPACING) & (is_listed == 0):
        number, above_high, between = _pass(
            x_ptr, body_start, body_column, body_length, edges, low, high, top, candidates_ptr, mask_id,
            forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, BY_MASS, VECTOR,
        )  # fmt: skip
        is_above = above_high >= target
        is_below = above_high + between < target
        is_inside = (is_above | is_below) == 0
        is_listed = is_inside & (tl.max(number) <= CAPACITY)
        above_most = tl.where(is_below, above_high + between, tl.where(is_above, above_most, above_high))
        most = tl.where(is_below, low, tl.where(is_above, most, high))
        least = tl.where(is_above, high, tl.where(is_below, least, low))
        # Next: the neighbouring four times as much, or the middle third; or the middle third of all numbers left.
        z_low, z_high = ordered.value(low), ordered.value(high)
        width = (z_high - z_low) * tl.where(is_inside, -0.3333333, 4.0)
        third = (most - least) // 3
        is_even = turn % 2 == 0
        low = tl.where(is_even, ordered.order(tl.where(is_above, z_high, z_low - width)), least + third)
        high = tl.where(is_even, ordered.order(tl.where(is_below, z_low, z_high + width)), most - third)
        low = tl.minimum(tl.maximum(low, least), most - 1)
        high = tl.minimum(tl.maximum(high, low + 1), most)
        turn += 1
    if is_listed:
        place = tl.arange(0, CAPACITY)[None, :]
        z = tl.load(
            candidates_ptr + tl.arange(0, LANES)[:, None] * CAPACITY + place, mask=place < number[:, None],
            other=-float("inf"),
        )  # fmt: skip
        least, _ = _search(z, _weight(z, top) if BY_MASS else None, above_most, target, 0.0, SPACING)
    return least


@triton.jit
def _bracket(x_ptr, body_start, body_column, body_length, V, floor, even, most, share, top, mask_id, forbidden_ptr,
             HAS_MASK_ID: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, BY_MASS: tl.constexpr, SPACING: tl.constexpr,
             VECTOR: tl.constexpr, SAMPLE: tl.constexpr):  # fmt: skip
    """Between which orders the threshold of a row probably lies, above which its share of the weight is; from a
    sample of logits that is spread over the row. It is known to lie in [even, most)."""
    LANES: tl.constexpr = SAMPLE // VECTOR
    lane = tl.arange(0, LANES)[:, None]
    column = lane * (body_length // VECTOR) // LANES * VECTOR + tl.arange(0, VECTOR)[None, :]
    z = tl.load(x_ptr + body_start + column).to(tl.float32)
    z = logit_rows.without_excluded(
        z, body_column + column, column >= 0, 0, V, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN
    )
    # The error of the share above the threshold, by each weight's own part in it.
    if BY_MASS:
        weight = tl.where(z >= ordered.value(floor), _weight(z, top), 0.0)
        target = share * tl.sum(weight)
        middle, _ = _search(z, weight, 0.0, target, 0.02 * target, SPACING)
        part = tl.where(z >= ordered.value(middle), 1.0 - share, share) * weight
        spread = _SIGMAS * tl.sqrt(tl.sum(part * part))
    else:  # the share is that of all V ids: what is excluded or -inf is one of them
        weight = None
        target = share * SAMPLE
        spread = _SIGMAS * tl.sqrt(target * (1.0 - share)) + 1.0
    slack = 0.5 * spread
    low, above = _search(z, weight, 0.0, target + spread, slack, SPACING)
    low = tl.where(above < target + spread, floor, low)
    target = tl.maximum(target - spread - slack, 0.0)  # the search stops at most a slack above it
    high, above = _search(z, weight, 0.0, target, slack, SPACING)
    high = tl.where((above < target) | (target == 0.0), most, high)
    if BY_MASS:  # a peaked row, of whose weight the sample knows little, has but few logits above the even share
        num_above_even = tl.sum((z >= ordered.value(even)).to(tl.float32)) * (V.to(tl.float32) / SAMPLE)
        is_peaked = num_above_even < _LISTED // 8
        low = tl.where(is_peaked, even, tl.maximum(low, even))
        high = tl.where(is_peaked, most, tl.minimum(high, most))
    return low, tl.maximum(high, low + 1)


@triton.jit
def _total(x_ptr, body_start, body_column, body_length, edges, threshold, mask_id, forbidden_ptr,
           HAS_MASK_ID: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """The largest logit of a row, and the weight relative to it of all that are not below the threshold."""
    maxima = edges
    for offset in range(0, body_length, _BLOCK):
        z = _block(
            x_ptr, body_start, body_column, body_length, offset, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN,
            VECTOR, _BLOCK,
        )  # fmt: skip
        maxima = tl.maximum(maxima, tl.max(z, 1))
    top = tl.max(maxima)
    top = tl.where(tl.abs(top) < float("inf"), top, 0.0)  # a row without a law
    z_threshold = ordered.value(threshold)
    sums = tl.where(edges >= z_threshold, _weight(edges, top), 0.0)
    for offset in range(0, body_length, _BLOCK):
        z = _block(
            x_ptr, body_start, body_column, body_length, offset, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN,
            VECTOR, _BLOCK,
        )  # fmt: skip
        sums += tl.sum(tl.where(z >= z_threshold, _weight(z, top), 0.0), 1)
    return top, tl.sum(sums)


@triton.jit
def _edges(x_ptr, start, V, body_column, body_length, mask_id, forbidden_ptr, HAS_MASK_ID: tl.constexpr,
           HAS_FORBIDDEN: tl.constexpr, VECTOR: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    """What of a row is not its body [LANES], float32, -inf where there is no more."""
    offs_v, in_v = logit_rows.edges_of_lanes(tl.arange(0, LANES), V, body_column, body_length, VECTOR)
    edges = tl.load(x_ptr + start + offs_v, mask=in_v, other=-float("inf")).to(tl.float32)
    return logit_rows.without_excluded(edges, offs_v, in_v, 0, V, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN)


@triton.jit(do_not_specialize=["lead_x", "num_rows", "V", "num_kept", "mask_id"])
def _short_thresholds_kernel(
    x_ptr,
    lead_x,
    stride_x,
    row_indices_ptr,
    forbidden_ptr,
    thresholds_ptr,
    num_rows,
    V,
    num_kept,
    top_p,
    mask_id,
    IS_COMPACT: tl.constexpr,
    BY_MASS: tl.constexpr,
    HAS_MASK_ID: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    SPACING: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # This program finds the threshold of one row, which it holds in registers.
    row = tl.program_id(0)
    flat = tl.load(row_indices_ptr + row)
    if flat < 0:
        return
    x_ptr = tl.multiple_of(x_ptr - lead_x, 16)
    start = lead_x + (row.to(tl.int64) if IS_COMPACT else flat) * stride_x
    body_column, body_start, body_length = logit_rows.body(start, V, VECTOR)
    z = _block(
        x_ptr, body_start, body_column, body_length, 0, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, VECTOR,
        BLOCK,
    )  # fmt: skip
    edges = _edges(
        x_ptr, start, V, body_column, body_length, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, VECTOR,
        BLOCK // VECTOR,
    )  # fmt: skip
    floor = tl.full((), _LOWEST, tl.int64)
    top = 0.0
    target = num_kept.to(tl.float32)
    if BY_MASS:
        z_floor = tl.load(thresholds_ptr + row)
        floor = ordered.order(z_floor)
        z = tl.where(z >= z_floor, z, -float("inf"))
        edges = tl.where(edges >= z_floor, edges, -float("inf"))
        top = tl.maximum(tl.max(z), tl.max(edges))
        top = tl.where(tl.abs(top) < float("inf"), top, 0.0)  # a row without a law
    weight = _weight(z, top) if BY_MASS else None
    edge_weight = _weight(edges, top) if BY_MASS else None
    if BY_MASS:
        target = tl.maximum((tl.sum(weight) + tl.sum(edge_weight)) * top_p, 1e-30)
    threshold, above = _search(z, weight, 0.0, target, 0.0, SPACING, edges, edge_weight)
    tl.store(thresholds_ptr + row, ordered.value(tl.where(above < target, floor, threshold)))


@triton.jit(do_not_specialize=["lead_x", "num_rows", "V", "num_kept", "mask_id"])
def _brackets_kernel(
    x_ptr,
    lead_x,
    stride_x,
    row_indices_ptr,
    forbidden_ptr,
    brackets_ptr,
    num_rows,
    V,
    num_kept,
    mask_id,
    IS_COMPACT: tl.constexpr,
    HAS_MASK_ID: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    SPACING: tl.constexpr,
    VECTOR: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    # This program brackets the threshold of one row by its sample, with few warps: a turn of a search costs as much
    # again in each of them.
    row = tl.program_id(0)
    flat = tl.load(row_indices_ptr + row)
    if flat < 0:
        return
    x_ptr = tl.multiple_of(x_ptr - lead_x, 16)
    start = lead_x + (row.to(tl.int64) if IS_COMPACT else flat) * stride_x
    body_column, body_start, body_length = logit_rows.body(start, V, VECTOR)
    floor, most = tl.full((), _LOWEST, tl.int64), tl.full((), _BEYOND, tl.int64)
    low, high = _bracket(
        x_ptr, body_start, body_column, body_length, V, floor, floor, most, num_kept / V.to(tl.float32), 0.0, mask_id,
        forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, False, SPACING, VECTOR, SAMPLE,
    )  # fmt: skip
    tl.store(brackets_ptr + 2 * row, low)
    tl.store(brackets_ptr + 2 * row + 1, high)


@triton.jit(do_not_specialize=["lead_x", "num_rows", "V", "num_kept", "mask_id"])
def _thresholds_kernel(
    x_ptr,
    lead_x,
    stride_x,
    row_indices_ptr,
    forbidden_ptr,
    thresholds_ptr,
    brackets_ptr,
    candidates_ptr,
    num_rows,
    V,
    num_kept,
    top_p,
    mask_id,
    IS_COMPACT: tl.constexpr,
    BY_MASS: tl.constexpr,  # the nucleus, of what lies above the thresholds given, rather than the num_kept largest
    HAS_MASK_ID: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    SPACING: tl.constexpr,  # least distance in order of two numbers of the logits' dtype
    VECTOR: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    # This program finds the thresholds of one row after another, each num_programs rows on.
    x_ptr = tl.multiple_of(x_ptr - lead_x, 16)
    candidates_ptr += tl.program_id(0).to(tl.int64) * _LISTED
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        flat = tl.load(row_indices_ptr + row)
        if flat >= 0:
            x_row = flat * 0 + row if IS_COMPACT else flat  # row is an int in the interpreter
            start = lead_x + x_row * stride_x
            body_column, body_start, body_length = logit_rows.body(start, V, VECTOR)
            edges = _edges(
                x_ptr, start, V, body_column, body_length, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, VECTOR,
                _BLOCK // VECTOR,
            )  # fmt: skip
            if BY_MASS:
                floor = ordered.order(tl.load(thresholds_ptr + row))
                top, total = _total(
                    x_ptr, body_start, body_column, body_length, edges, floor, mask_id, forbidden_ptr, HAS_MASK_ID,
                    HAS_FORBIDDEN, VECTOR,
                )  # fmt: skip
                # All that is less likely than an even share of 1 - p is together less likely than 1 - p.
                even = ordered.order(top + elementary.log(total * (1.0 - top_p) / V.to(tl.float32)))
                even = tl.maximum(even, floor)
                most = tl.maximum(ordered.order(top), even) + 1
                target = tl.maximum(total * top_p, 1e-30)
                low, high = _bracket(
                    x_ptr, body_start, body_column, body_length, V, floor, even, most, top_p, top, mask_id,
                    forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, True, SPACING, VECTOR, SAMPLE,
                )  # fmt: skip
            else:
                floor, most = tl.full((), _LOWEST, tl.int64), tl.full((), _BEYOND, tl.int64)
                top = 0.0
                target = num_kept.to(tl.float32)
                low = tl.load(brackets_ptr + 2 * row)
                high = tl.load(brackets_ptr + 2 * row + 1)
            threshold = _select(
                x_ptr, body_start, body_column, body_length, edges, floor, most, low, high, target, top,
                candidates_ptr, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, BY_MASS, SPACING, VECTOR,
            )  # fmt: skip
            tl.store(thresholds_ptr + row, ordered.value(threshold))


# Least distance in the order of float32 between two numbers of the logits' dtype.
_SPACING = {torch.bfloat16: 1 << 16, torch.float16: 1 << 13}


def thresholds(logits: dict[str, Any], filter_thres: float | None, top_p: float | None) -> Tensor | None:
    """What the logits of each row must not be below, [M] float32: both filters; None where all stay.

    Args:
        logits: how a kernel reads them: its arguments as ``kernels/demask.py`` gives them.
        filter_thres, top_p: see ``fastmask.functional.sample_tokens``.
    """
    x, num_ids, num_rows = logits["x_ptr"], logits["V"], logits["num_rows"]
    num_kept = num_ids if filter_thres is None else math.ceil((1.0 - filter_thres) * num_ids)
    if num_kept == num_ids and top_p is None:
        return None
    lowest = torch.finfo(torch.float32).min
    out = torch.full((num_rows,), lowest, dtype=torch.float32, device=x.device)
    logits = logits | {"SPACING": _SPACING.get(x.dtype, 1)}
    filters = {"thresholds_ptr": out, "num_kept": num_kept, "top_p": top_p or 0.0}
    launch = _launch_short if num_ids <= _BLOCK.value else _launch_long
    if num_kept < num_ids:
        launch(logits, filters | {"BY_MASS": False})
    if top_p is not None:
        launch(logits, filters | {"BY_MASS": True})
    return out


def _launch_short(logits: dict[str, Any], filters: dict[str, Any]) -> None:
    block = max(_SHORT_BLOCK, triton.next_power_of_2(logits["V"]))
    num_warps = max(1, block // _SHORT_WARP[filters["BY_MASS"]])
    _short_thresholds_kernel[(logits["num_rows"],)](**logits, **filters, BLOCK=block, num_warps=num_warps)


def _launch_long(logits: dict[str, Any], filters: dict[str, Any]) -> None:
    x, num_rows = logits["x_ptr"], logits["num_rows"]
    of_count, num_warps, of_mass = next(samples for most, *samples in _SAMPLES if logits["V"] <= most)
    brackets = None
    if not filters["BY_MASS"]:
        brackets = torch.empty((num_rows, 2), dtype=torch.int64, device=x.device)
        _brackets_kernel[(num_rows,)](
            **logits,
            brackets_ptr=brackets,
            num_kept=filters["num_kept"],
            SAMPLE=of_count,
            num_warps=num_warps,
        )
    programs = min(num_rows, _PROGRAMS)
    _thresholds_kernel[(programs,)](
        **logits,
        **filters,
        brackets_ptr=brackets,
        candidates_ptr=torch.empty((programs, _LISTED.value), dtype=torch.float32, device=x.device),
        SAMPLE=of_mass,
        num_warps=_WARPS,
    )
