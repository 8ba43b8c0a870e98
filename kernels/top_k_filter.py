"""Which logits of a row stay: the k largest, or the nucleus; as a threshold for each row, found without a sort.

Both are the largest threshold above which lies enough, enough being k logits (ties stay), or a share p of the
probability (the nucleus of Holtzman et al., https://arxiv.org/abs/1904.09751, with the token that crosses p). A
sample of the row brackets the threshold; one pass over the row counts what lies above the bracket and lists what lies
inside it, a few hundred or thousand candidates, among which the threshold is then searched in registers. A bracket
that misses, or holds too many, is moved or narrowed and the pass repeated. A row of at most 2048 logits is searched
in registers at once.

Bytes for each row: its V logits, as a rule once for k and twice to five times for p; a sample, and the candidates,
which stay in L2. Of a short row its logits once for each.
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

# A lane lists its own candidates, so that a pass needs no communication between threads; its first place is for an
# edge. In a block of logits a thread has 16, in its lanes of a 16-byte vector each.
_CAPACITY = tl.constexpr(16)
_WARP_BLOCK = 512
_SIGMAS = tl.constexpr(2.0)  # of the sample's weight, at either end of the bracket, which may miss

# A turn of a search costs a warp a hundred instructions, and three for each of a thread's logits: few warps with many
# logits do it for less. Longest row, warps. Where rows are few, up to four times as many finish sooner: not for p, of
# which the sums, and rarely an id at the nucleus's edge, depend on how they are spread.
_WARPS = ((8192, 1), (32768, 2), (65536, 4), (math.inf, 8))
_FEW_ROWS, _MOST_WARPS = 264, 8
_RESIDENT_WARPS = 132 * 32  # of all SMs of an H200; the candidates of so many stay in L2
# A sample for k is so large that a lane expects so many candidates, at which one row in ten has one without a place
# and is read again; but a warp has registers for so many logits only, half as many where each has a weight.
_EXPECTED = 6.5
_LEAST_SAMPLE, _WARP_SAMPLE = 1024, (2048, 1024)
# A shorter row is searched in registers at once; its block holds its edges too.
_SHORT, _SHORT_BLOCK = 2048, 128


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
def _least(z):
    """The least of z that is a logit; infinity where none is."""
    return tl.min(tl.where(z > -float("inf"), z, float("inf")))


@triton.jit
def _ends(z, weight, base, edges=None, edge_weight=None):
    """Where a search in z starts: its lowest order and, with it, the weight of base and z; one above its highest, and
    base. -inf is no logit.

    z: [lanes, n]; what is left over of it, [lanes], may come as edges. Without weights logits only count.
    """
    least, largest = _least(z), tl.max(z)
    if edges is not None:
        least = tl.minimum(least, _least(edges))
        largest = tl.maximum(largest, tl.max(edges))
    if weight is None:
        above_low = base + _above(z, None, edges, None, least)
    elif edges is None:
        above_low = base + tl.sum(weight)
    else:
        above_low = base + tl.sum(weight) + tl.sum(edge_weight)
    high = tl.minimum(ordered.order(largest), _BEYOND - 1) + 1  # of a NaN too
    return ordered.order(least), above_low, high, tl.full((), 0.0, tl.float32) + base


@triton.jit
def _search(z, weight, base, low, above_low, high, above_high, target, slack, SPACING: tl.constexpr, edges=None,
            edge_weight=None):  # fmt: skip
    """The order of a threshold: base and the weight of what of z is not below it reach the target, and hardly more;
    and that weight.

    It lies in [low, high), the weights of both of which are known. The search ends where the weight is the target or
    no more than ``slack`` lies between the two ends, or where no number of the logits' dtype does. low, where even
    all of it does not reach the target.
    """
    high = tl.where(above_low < target, low, high)
    turn = tl.full((), 0, tl.int32)
    while (ordered.distance(low, high) > SPACING) & (above_low - above_high > slack) & (above_low != target):
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
        probe = tl.where(turn % 4 == 3, low + (ordered.distance(low, high) // 2).to(tl.int32), probe)
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
def _block(body_ptr, body_column, body_length, offset, mask_id, forbidden_ptr, HAS_MASK_ID: tl.constexpr,
           HAS_FORBIDDEN: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A block of a row's body [lanes, VECTOR], float32, -inf where it has ended."""
    LANES: tl.constexpr = BLOCK // VECTOR
    block = offset + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    in_body = block < body_length
    z = tl.load(body_ptr + block, mask=in_body, other=-float("inf")).to(tl.float32)
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
def _pass(body_ptr, body_column, body_length, edges, low, high, top, candidates_ptr, mask_id, forbidden_ptr,
          HAS_MASK_ID: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, BY_MASS: tl.constexpr, VECTOR: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """One pass over a row: each lane lists its candidates in [low, high); how many a lane has, the weight above high,
    and that of the candidates."""
    LANES: tl.constexpr = BLOCK // VECTOR
    z_low, z_high = ordered.value(low), ordered.value(high)
    lane = tl.arange(0, LANES)
    tl.debug_barrier()  # every thread has read the candidates of the pass before
    is_candidate, is_high = _sorted_out(edges, z_low, z_high)
    tl.store(candidates_ptr + lane * _CAPACITY, tl.where(is_candidate, edges, -float("inf")))
    edge_weight = _weight(edges, top) if BY_MASS else None
    edge_above = tl.sum(_counted(is_high, edge_weight)).to(tl.float32)
    edge_between = tl.sum(_counted(is_candidate, edge_weight)).to(tl.float32)
    slot = lane * _CAPACITY + 1
    end = lane * _CAPACITY + _CAPACITY
    above_high = tl.full((LANES,), 0.0, tl.float32)
    between = tl.full((LANES,), 0.0, tl.float32)
    for offset in range(0, body_length, BLOCK):
        z = _block(
            body_ptr, body_column, body_length, offset, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN,
            VECTOR, BLOCK,
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
    number = slot - lane * _CAPACITY
    if not BY_MASS:
        between = (number - 1).to(tl.float32)
    tl.debug_barrier()  # every thread sees all candidates
    return number, tl.sum(above_high) + edge_above, tl.sum(between) + edge_between


@triton.jit
def _listed(candidates_ptr, number):
    """The candidates that lanes have listed [LANES, _CAPACITY], -inf where a place is free."""
    place = tl.arange(0, _CAPACITY)[None, :]
    lane = tl.arange(0, number.shape[0])[:, None]
    return tl.load(candidates_ptr + lane * _CAPACITY + place, mask=place < number[:, None], other=-float("inf"))


@triton.jit
def _select(body_ptr, body_column, body_length, edges, floor, most, low, high, target, top, candidates_ptr,
            mask_id, forbidden_ptr, HAS_MASK_ID: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, BY_MASS: tl.constexpr,
            SPACING: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The order of the largest threshold below most whose weight reaches the target; floor where none above it does.

    [low, high) is the first guess of where it lies.
    """
    LANES: tl.constexpr = BLOCK // VECTOR
    least = floor  # the threshold lies in [least, most)
    above_low, above_high = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    number = tl.full((LANES,), 0, tl.int32)
    is_listed = tl.full((), 0, tl.int1)
    turn = tl.full((), 0, tl.int32)
    while (ordered.distance(least, most) > SPACING) & (is_listed == 0):
        number, above_high, between = _pass(
            body_ptr, body_column, body_length, edges, low, high, top, candidates_ptr, mask_id,
            forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, BY_MASS, VECTOR, BLOCK,
        )  # fmt: skip
        above_low = above_high + between
        is_above = above_high >= target
        is_below = above_low < target
        is_inside = (is_above | is_below) == 0
        most = tl.where(is_below, low, tl.where(is_above, most, high))
        least = tl.where(is_above, high, tl.where(is_below, least, low))
        # Next: the neighbouring four times as much, or a third about where the threshold would be of a bracket filled
        # evenly; or the middle third of all numbers left.
        z_low, z_high = ordered.value(low), ordered.value(high)
        width = z_high - z_low
        middle = z_high - width * ((target - above_high) / between)
        next_low = tl.where(is_inside, middle - 0.1666667 * width, tl.where(is_above, z_high, z_low - 4.0 * width))
        next_high = tl.where(is_inside, middle + 0.1666667 * width, tl.where(is_below, z_low, z_high + 4.0 * width))
        third = (ordered.distance(least, most) // 3).to(tl.int32)
        is_even = (turn % 2 == 0) & (width < float("inf"))
        low = tl.where(is_even, ordered.order(next_low), least + third)
        high = tl.where(is_even, ordered.order(next_high), most - third)
        turn += 1
        is_listed = is_inside & (tl.max(number) <= _CAPACITY)
        if is_inside & (is_listed == 0):
            z = _listed(candidates_ptr, number)
            lowest = _least(z)
            is_tie = lowest == tl.max(z)  # more than have places, probably all
            low = tl.where(is_tie, ordered.order(lowest), low)
            high = tl.where(is_tie, low + SPACING, high)
        low = tl.minimum(tl.maximum(low, least), most - 1)
        high = tl.minimum(tl.maximum(high, low + SPACING), most)
    if is_listed:
        z = _listed(candidates_ptr, number)
        weight = _weight(z, top) if BY_MASS else None
        base = above_high
        if (least == floor) | (most == _BEYOND):  # too far apart for what is between
            least, above_low, most, above_high = _ends(z, weight, base)
        least, _ = _search(z, weight, base, least, above_low, most, above_high, target, 0.0, SPACING)
    return least


@triton.jit
def _bracket(body_ptr, body_column, body_length, V, floor, even, most, share, top, mask_id, forbidden_ptr,
             HAS_MASK_ID: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, BY_MASS: tl.constexpr, SPACING: tl.constexpr,
             VECTOR: tl.constexpr, BLOCK: tl.constexpr, SAMPLE: tl.constexpr):  # fmt: skip
    """Between which orders the threshold of a row probably lies, above which its share of the weight is; from a
    sample of logits that is spread over the row. It is known to lie in [even, most)."""
    LANES: tl.constexpr = SAMPLE // VECTOR
    lane = tl.arange(0, LANES)[:, None]
    vector = (lane.to(tl.int64) * (body_length // VECTOR) // LANES).to(tl.int32)
    column = vector * VECTOR + tl.arange(0, VECTOR)[None, :]
    z = tl.load(body_ptr + column).to(tl.float32)
    z = logit_rows.without_excluded(
        z, body_column + column, column >= 0, 0, V, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN
    )
    # The error of the share above the threshold, by each weight's own part in it.
    if BY_MASS:
        # A peaked row, of whose weight the sample knows little, has but few logits above the even share.
        num_above_even = tl.sum((z >= ordered.value(even)).to(tl.int32)) * (V.to(tl.float32) / SAMPLE)
        is_peaked = num_above_even < BLOCK // VECTOR * _CAPACITY // 8
        weight = tl.where(z >= ordered.value(floor), _weight(z, top), 0.0)
        least, total, largest, nothing = _ends(z, weight, 0.0)
        target = share * total
        middle, above = _search(z, weight, 0.0, least, total, largest, nothing, target, 0.02 * target, SPACING)
        part = tl.where(z >= ordered.value(middle), 1.0 - share, share) * weight
        spread = _SIGMAS * tl.sqrt(tl.sum(part * part))
        # Whichever side of it the lower end is.
        is_low = above >= target + spread
        least, total = tl.where(is_low, middle, least), tl.where(is_low, above, total)
        middle, above = tl.where(is_low, largest, middle), tl.where(is_low, 0.0, above)
    else:  # the share is that of all V ids: what is excluded or -inf is one of them
        weight = None
        least, total, largest, nothing = _ends(z, None, 0.0)
        middle, above = largest, nothing
        target = share * SAMPLE
        spread = _SIGMAS * tl.sqrt(target * (1.0 - share)) + 1.0
    slack = 0.5 * spread
    low, above = _search(z, weight, 0.0, least, total, middle, above, target + spread, slack, SPACING)
    target_high = tl.maximum(target - spread - slack, 0.0)  # the search stops at most a slack above it
    high, above_high = _search(z, weight, 0.0, low, above, largest, nothing, target_high, slack, SPACING)
    high = tl.where(above_high > target - spread, high + SPACING, high)  # it stopped at a tie
    low = tl.where(above < target + spread, floor, low)
    high = tl.where((above_high < target_high) | (target_high == 0.0), most, high)
    if BY_MASS:
        low = tl.where(is_peaked, even, tl.maximum(low, even))
        high = tl.where(is_peaked, most, tl.minimum(high, most))
    return low, tl.minimum(tl.maximum(high, low + SPACING), most)


@triton.jit
def _total(body_ptr, body_column, body_length, edges, threshold, mask_id, forbidden_ptr,
           HAS_MASK_ID: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, VECTOR: tl.constexpr,
           BLOCK: tl.constexpr):  # fmt: skip
    """The largest logit of a row, and the weight relative to it of all that are not below the threshold."""
    z_threshold = ordered.value(threshold)
    tops = tl.maximum(edges, ordered.value(tl.full((), _LOWEST, tl.int32)))  # of each lane, finite
    sums = tl.where(edges >= z_threshold, _weight(edges, tops), 0.0)
    largest = tops
    for offset in range(0, body_length, BLOCK):
        z = _block(
            body_ptr, body_column, body_length, offset, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN,
            VECTOR, BLOCK,
        )  # fmt: skip
        # Relative to a number that is left behind by 4 at most: to change it costs accuracy.
        largest = tl.maximum(largest, tl.max(z, 1))
        new_tops = tl.where(largest > tops + 4.0, largest, tops)
        weights = tl.where(z >= z_threshold, _weight(z, new_tops[:, None]), 0.0)
        sums = sums * _weight(tops, new_tops) + tl.sum(weights, 1)
        tops = new_tops
    top = tl.max(largest)
    total = tl.sum(sums * _weight(tops, top))
    return tl.where(top < float("inf"), top, 0.0), total  # a row without a law


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
    body_ptr = tl.multiple_of(x_ptr + body_start, 16)
    z = _block(
        body_ptr, body_column, body_length, 0, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, VECTOR,
        BLOCK,
    )  # fmt: skip
    edges = _edges(
        x_ptr, start, V, body_column, body_length, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, VECTOR,
        BLOCK // VECTOR,
    )  # fmt: skip
    floor = tl.full((), _LOWEST, tl.int32)
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
    low, above_low, high, above_high = _ends(z, weight, 0.0, edges, edge_weight)
    threshold, above = _search(
        z, weight, 0.0, low, above_low, high, above_high, target, 0.0, SPACING, edges, edge_weight
    )
    tl.store(thresholds_ptr + row, ordered.value(tl.where(above < target, floor, threshold)))


@triton.jit(do_not_specialize=["lead_x", "num_rows", "V", "num_kept", "mask_id"])
def _thresholds_kernel(
    x_ptr,
    lead_x,
    stride_x,
    row_indices_ptr,
    forbidden_ptr,
    thresholds_ptr,
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
    BLOCK: tl.constexpr,
    SAMPLE: tl.constexpr,
):
    # This program finds the thresholds of one row after another, each num_programs rows on.
    x_ptr = tl.multiple_of(x_ptr - lead_x, 16)
    candidates_ptr += tl.program_id(0).to(tl.int64) * (BLOCK // VECTOR * _CAPACITY)
    for row in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        flat = tl.load(row_indices_ptr + row)
        if flat >= 0:
            x_row = flat * 0 + row if IS_COMPACT else flat  # row is an int in the interpreter
            start = lead_x + x_row * stride_x
            body_column, body_start, body_length = logit_rows.body(start, V, VECTOR)
            body_ptr = tl.multiple_of(x_ptr + body_start, 16)
            edges = _edges(
                x_ptr, start, V, body_column, body_length, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, VECTOR,
                BLOCK // VECTOR,
            )  # fmt: skip
            floor, even = tl.full((), _LOWEST, tl.int32), tl.full((), _LOWEST, tl.int32)
            most = tl.full((), _BEYOND, tl.int32)
            top = 0.0
            target, share = num_kept.to(tl.float32), num_kept / V.to(tl.float32)
            if BY_MASS:
                floor = ordered.order(tl.load(thresholds_ptr + row))
                top, total = _total(
                    body_ptr, body_column, body_length, edges, floor, mask_id, forbidden_ptr, HAS_MASK_ID,
                    HAS_FORBIDDEN, VECTOR, BLOCK,
                )  # fmt: skip
                # All that is less likely than an even share of 1 - p is together less likely than 1 - p.
                even = ordered.order(top + elementary.log(total * (1.0 - top_p) / V.to(tl.float32)))
                even = tl.minimum(tl.maximum(even, floor), _BEYOND - 1)
                most = tl.maximum(ordered.order(top), even) + 1
                target, share = tl.maximum(total * top_p, 1e-30), top_p
            low, high = _bracket(
                body_ptr, body_column, body_length, V, floor, even, most, share, top, mask_id,
                forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, BY_MASS, SPACING, VECTOR, BLOCK, SAMPLE,
            )  # fmt: skip
            threshold = _select(
                body_ptr, body_column, body_length, edges, floor, most, low, high, target, top,
                candidates_ptr, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, BY_MASS, SPACING, VECTOR, BLOCK,
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
    launch = _launch_short if num_ids <= _SHORT else _launch_long
    if num_kept < num_ids:
        launch(logits, filters | {"BY_MASS": False})
    if top_p is not None:
        launch(logits, filters | {"BY_MASS": True})
    return out


def _launch_short(logits: dict[str, Any], filters: dict[str, Any]) -> None:
    block = max(_SHORT_BLOCK, triton.next_power_of_2(logits["V"]))
    _short_thresholds_kernel[(logits["num_rows"],)](**logits, **filters, BLOCK=block, num_warps=1)


def _launch_long(logits: dict[str, Any], filters: dict[str, Any]) -> None:
    num_rows, num_ids, by_mass = logits["num_rows"], logits["V"], filters["BY_MASS"]
    num_warps = next(warps for longest, warps in _WARPS if num_ids <= longest)
    sample = _WARP_SAMPLE[by_mass] * num_warps
    if num_rows <= _FEW_ROWS and not by_mass:
        num_warps = min(4 * num_warps, _MOST_WARPS)
    lanes = _WARP_BLOCK * num_warps // logits["VECTOR"]
    if not by_mass:
        sample = _sample(num_ids / lanes, filters["num_kept"] / num_ids, sample)
    programs = min(num_rows, _RESIDENT_WARPS // num_warps)
    _thresholds_kernel[(programs,)](
        **logits,
        **filters,
        candidates_ptr=logits["x_ptr"].new_empty((programs, lanes * _CAPACITY.value), dtype=torch.float32),
        BLOCK=_WARP_BLOCK * num_warps,
        SAMPLE=sample,
        num_warps=num_warps,
    )


def _sample(lane: float, share: float, most: int) -> int:
    """The least sample at which a lane of so many logits expects few enough candidates."""
    sample = _LEAST_SAMPLE
    while sample < most and lane * 2.5 * _spread(sample, share) / sample > _EXPECTED:
        sample *= 2
    return sample


def _spread(sample: int, share: float) -> float:
    """See ``_bracket``, where the bracket is two of these wide and up to one more."""
    return _SIGMAS.value * math.sqrt(sample * share * (1.0 - share)) + 1.0
