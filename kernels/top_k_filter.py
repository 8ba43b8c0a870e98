"""Which logits of a row stay: the k largest, or the nucleus; as a threshold for each row, found without a sort.

Both are the largest threshold above which lies enough, enough being k logits (ties stay), or a share p of the
probability (the nucleus of Holtzman et al., https://arxiv.org/abs/1904.09751, with the token that crosses p). A
sample of the row brackets the threshold; one pass over the row counts what lies above the bracket and lists what lies
inside it, a few hundred or thousand candidates, among which the threshold is then searched in registers. For p a pass
before measures the row's weight, and how much of it the sample's own nucleus has: few logits may have most of it, so
that the sample misses them, but between that threshold and the row's lie many. A bracket that misses, or holds too
many, is moved or narrowed and the pass repeated. A row of at most 2048 logits is searched in registers at once.

Bytes for each row: its V logits, as a rule once for k and twice for p; a sample, and the candidates, which stay in
L2. Of a short row its logits once for each.
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

# A lane lists its own candidates, so that a pass needs no communication between threads; where there are more than
# places (a power of two) the last ones stay. Of a block a thread has 16 logits, in lanes of a 16-byte vector each.
_CAPACITY = tl.constexpr(16)
_WARP_BLOCK = 512
# By how much the sample's weight may be wrong at either end of the bracket, which may miss: its standard deviations,
# and logits of it, which count where few have most of the weight.
_SIGMAS, _GRANULES = tl.constexpr(2.0), tl.constexpr(2.0)
_INEXACT = tl.constexpr(16.0)  # weights relative to a logit so far from the largest are; from 44 on they may overflow

# A turn of a search costs a warp a hundred instructions, and three for each of a thread's logits: few warps with many
# logits do it for less. Longest row, warps. Where rows are few, up to four times as many finish sooner: not for p, of
# which the sums, and rarely an id at the nucleus's edge, depend on how they are spread.
_WARPS = ((8192, 1), (32768, 2), (65536, 4), (math.inf, 8))
_FEW_ROWS, _MOST_WARPS = 264, 8
_RESIDENT_WARPS = 132 * 32  # of all SMs of an H200; the candidates of so many stay in L2
# A sample for k is so large that a lane expects so many candidates, at which one row in ten has one without a place
# and is read again; but a warp has registers for so many logits only. For p fewer do.
_EXPECTED = 6.8
_LEAST_SAMPLE, _WARP_SAMPLE = 1024, (2048, 512)
# So many registers for each thread of a nucleus's program do on Hopper, without a spill, for logits of 16 bits: 16
# warps find room in a multiprocessor, where of its own accord the compiler leaves it to 12 of one warp, or to 8.
_REGISTERS, _HOPPER = 128, (9, 0)
# A shorter row is searched in registers at once; its block holds its edges too.
_SHORT, _SHORT_BLOCK = 2048, 128


@triton.jit
def _weight(z, top):
    """What logits count for in the nucleus: their probability relative to that of a logit top, or for all of them so
    many times as much, see ``exp_from``."""
    return elementary.exp_from(z, top)


@triton.jit
def _finite(top):
    """The largest logit, or 0 where there is none, or a row has no law."""
    return tl.where(tl.abs(top) < float("inf"), top, 0.0)


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
            edge_weight=None, sign=None, ceiling=None, top=None, anchor=None, doubt=None):  # fmt: skip
    """The order of a threshold: base and the weight of what of z is not below it reach the target, and hardly more;
    that weight; and the order above it at which they do not.

    It lies in [low, high), the weights of both of which are known. The search ends where the weight is the target or
    no more than ``slack`` lies between the two ends, or where no number of the logits' dtype does. low, where even
    all of it does not reach the target. A sign asks for the weight and its error, see ``_error``, at either side;
    above the ceiling the error no longer grows.
    """
    high = tl.where(above_low < target, low, high)
    turn = tl.full((), 0 if weight is None else 1, tl.int32)
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
        z_probe = ordered.value(probe)
        above = base + _above(z, weight, edges, edge_weight, z_probe)
        if sign is not None:
            above += sign * _error(above, tl.minimum(z_probe, ceiling), top, anchor, doubt)
        is_low = above >= target
        low = tl.where(is_low, probe, low)
        above_low = tl.where(is_low, above, above_low)
        high = tl.where(is_low, high, probe)
        above_high = tl.where(is_low, above_high, above)
    return low, above_low, high


@triton.jit
def _error(above, bound, top, anchor, doubt):
    """By how much a sample may misjudge the weight above a bound, where that above another, the anchor, is known:
    2 sqrt(doubt |above - anchor| w) + 2 w, of logits of the bound's weight w.

    What lies between the two varies as a sum of independent logits, each sampled or not. doubt: 1; less where they
    are a large part of the row.
    """
    granule = 1.0 if top is None else _weight(bound, top)
    return tl.sqrt(tl.abs(above - anchor) * doubt * granule) * _SIGMAS + granule * _GRANULES


@triton.jit
def _bracket(z, weight, top, base, middle, anchor, target, doubt, floor, most, SPACING: tl.constexpr):
    """Between which orders a row's threshold probably lies; from a sample z of it, in units of its weight.

    anchor: the weight that is known to lie above middle. base: of that, what no logit of the sample stands for.
    floor, most: the ends where the sample does not tell.
    """
    least, above_least, largest, nothing = _ends(z, weight, base)
    # Less its error the weight still reaches the target at the lower end; with its error no longer at the upper one.
    above_least -= _error(above_least, ordered.value(least), top, anchor, doubt)
    middle = tl.minimum(middle, largest)
    z_middle = ordered.value(middle)
    above_middle = anchor - _error(anchor, z_middle, top, anchor, doubt)
    is_low = above_middle >= target
    low, above, _ = _search(
        z, weight, base, tl.where(is_low, middle, least), tl.where(is_low, above_middle, above_least),
        tl.where(is_low, largest, middle), tl.where(is_low, nothing, above_middle), target,
        0.5 * _error(target, z_middle, top, anchor, doubt), SPACING, None, None, -1.0, float("inf"), top, anchor,
        doubt,
    )  # fmt: skip
    z_low = ordered.value(low)
    above_low = base + _above(z, weight, None, None, z_low)
    above_low += _error(above_low, z_low, top, anchor, doubt)
    _, _, high = _search(
        z, weight, base, low, above_low, largest, nothing, target, 0.5 * _error(target, z_low, top, anchor, doubt),
        SPACING, None, None, 1.0, z_low + 2.0, top, anchor, doubt,
    )  # fmt: skip
    is_most = base + _error(base, z_low, top, anchor, doubt) >= target
    return tl.where(above < target, floor, low), tl.where(is_most, most, high)


@triton.jit
def _fetched(body_ptr, body_length, offset, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row's body [lanes, VECTOR], or of its words of two bfloat16; -inf where it has ended."""
    lane = tl.arange(0, BLOCK // VECTOR)[:, None]
    if body_ptr.dtype.element_ty == tl.bfloat16:
        word = offset // 2 + lane * (VECTOR // 2) + tl.arange(0, VECTOR // 2)[None, :]
        return logit_rows.load_words(body_ptr, word, word < tl.multiple_of(body_length // 2, 4))
    else:
        block = offset + lane * VECTOR + tl.arange(0, VECTOR)[None, :]
        return tl.load(body_ptr + block, mask=block < body_length, other=-float("inf"))


@triton.jit
def _block(fetched, body_column, body_length, offset, mask_id, forbidden_ptr, HAS_MASK_ID: tl.constexpr,
           HAS_FORBIDDEN: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """The logits of a block that was fetched [lanes, VECTOR], float32."""
    LANES: tl.constexpr = fetched.shape[0]
    block = offset + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    if fetched.dtype == tl.int32:
        even, odd = logit_rows.halves(fetched)
        z = tl.reshape(tl.join(even, odd), (LANES, VECTOR))
    else:
        z = fetched.to(tl.float32)
    first = body_column + offset
    return logit_rows.without_excluded(
        z, body_column + block, block < body_length, first, first + LANES * VECTOR, mask_id, forbidden_ptr,
        HAS_MASK_ID, HAS_FORBIDDEN,
    )  # fmt: skip


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
    """One pass over a row: each lane lists its candidates in [low, high); how many it has, and the weight above."""
    LANES: tl.constexpr = BLOCK // VECTOR
    z_low, z_high = ordered.value(low), ordered.value(high)
    lane = tl.arange(0, LANES)
    list_address = (candidates_ptr + lane * _CAPACITY).to(tl.int64)  # divisible by a list's size
    tl.debug_barrier()  # every thread has read the candidates of the pass before
    is_candidate, is_high = _sorted_out(edges, z_low, z_high)
    tl.store(candidates_ptr + lane * _CAPACITY, edges, mask=is_candidate)
    above_high = _counted(is_high, _weight(edges, top) if BY_MASS else None).to(tl.float32)
    size = tl.where(is_candidate, 4, 0)  # of the lane's candidates, in bytes
    fetched = _fetched(body_ptr, body_length, 0, VECTOR, BLOCK)
    for offset in range(0, body_length, BLOCK):
        z = _block(
            fetched, body_column, body_length, offset, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, VECTOR
        )
        fetched = _fetched(body_ptr, body_length, offset + BLOCK, VECTOR, BLOCK)  # while this one is sorted
        columns = _columns(z, VECTOR)
        for i in tl.static_range(VECTOR):
            is_inside, is_above = _sorted_out(columns[i], z_low, z_high)
            place = list_address | (size & (4 * _CAPACITY - 4)).to(tl.int64)  # an addition of 64 bits takes two
            tl.store(place.to(tl.pointer_type(tl.float32)), columns[i], mask=is_inside)
            size += tl.where(is_inside, 4, 0)
            above_high += _counted(is_above, _weight(columns[i], top) if BY_MASS else None).to(tl.float32)
    tl.debug_barrier()  # every thread sees all candidates
    return size // 4, tl.sum(above_high)


@triton.jit
def _listed(candidates_ptr, number):
    """The candidates that lanes have listed [LANES, _CAPACITY], -inf where a place is free."""
    place = tl.arange(0, _CAPACITY)[None, :]
    lane = tl.arange(0, number.shape[0])[:, None]
    return tl.load(candidates_ptr + lane * _CAPACITY + place, mask=place < number[:, None], other=-float("inf"))


@triton.jit
def _select(body_ptr, body_column, body_length, edges, least, most, low, high, target, top, candidates_ptr,
            mask_id, forbidden_ptr, HAS_MASK_ID: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, BY_MASS: tl.constexpr,
            SPACING: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The order of the largest threshold in [least, most) whose weight reaches the target; least where none above it
    does. [low, high) is the first guess of where it lies."""
    is_found = tl.full((), 0, tl.int1)
    turn = tl.full((), 0, tl.int32)
    while (ordered.distance(least, most) > SPACING) & (is_found == 0):
        number, above_high = _pass(
            body_ptr, body_column, body_length, edges, low, high, top, candidates_ptr, mask_id,
            forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, BY_MASS, VECTOR, BLOCK,
        )  # fmt: skip
        z = _listed(candidates_ptr, number)
        weight = _weight(z, top) if BY_MASS else None
        lowest, above_low, highest, above_highest = _ends(z, weight, above_high)
        # Full lists are a sample of the candidates, which weigh at least above_low then, and probably in proportion.
        is_full = tl.max(number) > _CAPACITY
        num_listed = tl.maximum(tl.sum(tl.minimum(number, _CAPACITY)), 1).to(tl.float32)
        listed = tl.where(is_full, num_listed / tl.sum(number), 1.0)
        if BY_MASS:
            all_low = above_high + (above_low - above_high) / listed
            is_known = (is_full == 0) | (ordered.distance(low, high) <= SPACING)  # that is so of one number, too
        else:
            all_low = above_high + tl.sum(number)
            is_known = tl.full((), 1, tl.int1)
        is_above = above_high >= target
        is_short = all_low < target
        is_below = is_known & is_short
        is_inside = (above_low >= target) | (is_known & (is_short == 0))
        is_found = (is_above | is_below | is_full) == 0
        threshold = lowest
        if (is_above | is_short) == 0:
            wanted = tl.where(is_full, above_high + (target - above_high) * listed, target)
            threshold = _search(
                z, weight, above_high, lowest, above_low, highest, above_highest, wanted, 0.0, SPACING
            )[0]  # fmt: skip
        most = tl.where(is_below, low, tl.where(is_above, most, high))
        least = tl.where(is_found, threshold, tl.where(is_above, high, tl.where(is_inside, low, least)))
        # Next: one number, if all of the lists is; every other time the middle third of all numbers left; or else the
        # neighbour as wide, or a quarter about where the lists have the threshold.
        width = ordered.value(high) - ordered.value(low)
        if (ordered.distance(lowest, highest) == 1) & is_full & (turn % 4 < 3):
            low, high = lowest, highest
        elif (turn % 2 == 1) | (width == float("inf")):
            third = (ordered.distance(least, most) // 3).to(tl.int32)
            low, high = least + third, most - third
        elif is_above:
            low, high = high, ordered.order(ordered.value(high) + width)
        elif is_below:
            low, high = ordered.order(ordered.value(low) - width), low
        else:
            low = ordered.order(ordered.value(threshold) - 0.125 * width)
            high = ordered.order(ordered.value(threshold) + 0.125 * width)
        low = tl.minimum(tl.maximum(low, least), most - 1)
        high = tl.minimum(tl.maximum(high, low + SPACING), most)
        turn += 1
    return least


@triton.jit
def _sample(body_ptr, body_column, body_length, V, mask_id, forbidden_ptr, HAS_MASK_ID: tl.constexpr,
            HAS_FORBIDDEN: tl.constexpr, VECTOR: tl.constexpr, SAMPLE: tl.constexpr):  # fmt: skip
    """Logits that are spread over a row [lanes, VECTOR], float32, -inf where excluded."""
    LANES: tl.constexpr = SAMPLE // VECTOR
    lane = tl.arange(0, LANES)[:, None]
    vector = (lane.to(tl.int64) * (body_length // VECTOR) // LANES).to(tl.int32)
    column = vector * VECTOR + tl.arange(0, VECTOR)[None, :]
    z = tl.load(body_ptr + column).to(tl.float32)
    return logit_rows.without_excluded(
        z, body_column + column, column >= 0, 0, V, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN
    )


@triton.jit
def _measure(body_ptr, body_column, body_length, edges, floor, middle, top, mask_id, forbidden_ptr,
             HAS_MASK_ID: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, HAS_FLOOR: tl.constexpr, VECTOR: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """The largest logit of a row, and the weight of all that are not below the floor, and not below the middle."""
    z_floor, z_middle = ordered.value(floor), ordered.value(middle)
    largest = edges
    weight = _weight(edges, top)
    if HAS_FLOOR:
        weight = tl.where(edges >= z_floor, weight, 0.0)
    total, above = weight, tl.where(edges >= z_middle, weight, 0.0)
    fetched = _fetched(body_ptr, body_length, 0, VECTOR, BLOCK)
    for offset in range(0, body_length, BLOCK):
        z = _block(
            fetched, body_column, body_length, offset, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, VECTOR
        )
        fetched = _fetched(body_ptr, body_length, offset + BLOCK, VECTOR, BLOCK)  # while this one is summed
        largest = tl.maximum(largest, tl.max(z, 1))
        weights = _weight(z, top)
        if HAS_FLOOR:
            weights = tl.where(z >= z_floor, weights, 0.0)
        total += tl.sum(weights, 1)
        above += tl.sum((z >= z_middle).to(tl.float32) * weights, 1)  # fused: one less than to choose and add
    return tl.max(largest), tl.sum(total), tl.sum(above)


@triton.jit
def _bracket_of_mass(body_ptr, body_column, body_length, edges, z, floor, num_ids, top_p, mask_id, forbidden_ptr,
                     HAS_MASK_ID: tl.constexpr, HAS_FORBIDDEN: tl.constexpr, HAS_FLOOR: tl.constexpr,
                     SPACING: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr,
                     SAMPLE: tl.constexpr):  # fmt: skip
    """Between which orders the threshold of a nucleus probably lies, by a sample z and a measure of the row; between
    which certainly; the weight that it needs, and the logit relative to which logits have weights."""
    if HAS_FLOOR:
        z = tl.where(z >= ordered.value(floor), z, -float("inf"))
    top = _finite(tl.max(z))
    weight = _weight(z, top)
    low, total, high, nothing = _ends(z, weight, 0.0)
    target = top_p * total
    middle = _search(z, weight, 0.0, low, total, high, nothing, target, 0.05 * target, SPACING)[0]
    is_empty = total <= 0.0
    middle = tl.where(is_empty, floor, middle)
    # All that is less likely than an even share of 1 - p is together less likely than 1 - p.
    even_share = (1.0 - top_p) / num_ids
    sampled = SAMPLE / num_ids
    largest, anchor, base = top, nothing, nothing  # for their types
    turn = tl.full((), 0, tl.int32)
    while turn < 3:
        largest, total, above = _measure(
            body_ptr, body_column, body_length, edges, floor, middle, top, mask_id, forbidden_ptr, HAS_MASK_ID,
            HAS_FORBIDDEN, HAS_FLOOR, VECTOR, BLOCK,
        )  # fmt: skip
        largest = _finite(largest)
        anchor = above * sampled
        weight = _weight(z, top)  # again: kept, it would take registers of the measure
        base = anchor - _above(z, weight, None, None, ordered.value(middle))
        target = total * top_p * sampled
        turn += 1
        if tl.abs(largest - top) > _INEXACT:
            top = largest
            middle = ordered.order(top + elementary.log(even_share))
        elif (anchor < target) & (_weight(ordered.value(middle), top) > 0.01 * target):
            # Few logits have most of the weight, and the sample has too many of them: not so of those below.
            middle = _search(
                z, weight, base, low, base + tl.sum(weight), middle, anchor, target, 0.02 * target, SPACING
            )[0]  # fmt: skip
        else:
            turn += 3  # this was the last
    even = top + elementary.log(total / _weight(top, top) * even_share)
    even = tl.minimum(ordered.order(even), ordered.order(largest))
    floor = tl.where(total > 0.0, tl.maximum(even, floor), floor)
    most = tl.maximum(ordered.order(largest), floor) + 1
    low, high = _bracket(z, _weight(z, top), top, base, middle, anchor, target, 1.0, floor, most, SPACING)
    low, high = tl.where(is_empty, floor, low), tl.where(is_empty, most, high)
    target = tl.maximum(total * top_p, 1e-30)
    return low, high, floor, most, target, top


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
    HAS_FLOOR: tl.constexpr,
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
        _fetched(body_ptr, body_length, 0, VECTOR, BLOCK), body_column, body_length, 0, mask_id, forbidden_ptr,
        HAS_MASK_ID, HAS_FORBIDDEN, VECTOR,
    )  # fmt: skip
    edges = _edges(
        x_ptr, start, V, body_column, body_length, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, VECTOR,
        BLOCK // VECTOR,
    )  # fmt: skip
    floor = tl.full((), _LOWEST, tl.int32)
    top = 0.0
    target = num_kept.to(tl.float32)
    if HAS_FLOOR:
        z_floor = tl.load(thresholds_ptr + row)
        floor = ordered.order(z_floor)
        z = tl.where(z >= z_floor, z, -float("inf"))
        edges = tl.where(edges >= z_floor, edges, -float("inf"))
    if BY_MASS:
        top = _finite(tl.maximum(tl.max(z), tl.max(edges)))
    weight = _weight(z, top) if BY_MASS else None
    edge_weight = _weight(edges, top) if BY_MASS else None
    if BY_MASS:
        target = tl.maximum((tl.sum(weight) + tl.sum(edge_weight)) * top_p, 1e-30)
    low, above_low, high, above_high = _ends(z, weight, 0.0, edges, edge_weight)
    threshold, above, _ = _search(
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
    HAS_FLOOR: tl.constexpr,  # whether thresholds are given
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
            floor, most = tl.full((), _LOWEST, tl.int32), tl.full((), _BEYOND, tl.int32)
            z = _sample(
                body_ptr, body_column, body_length, V, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, VECTOR,
                SAMPLE,
            )  # fmt: skip
            top = 0.0
            if BY_MASS:
                if HAS_FLOOR:
                    floor = ordered.order(tl.load(thresholds_ptr + row))
                low, high, floor, most, target, top = _bracket_of_mass(
                    body_ptr, body_column, body_length, edges, z, floor, V.to(tl.float32), top_p, mask_id,
                    forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN, HAS_FLOOR, SPACING, VECTOR, BLOCK, SAMPLE,
                )  # fmt: skip
            else:
                target = num_kept.to(tl.float32)
                share = target / V.to(tl.float32)  # what is excluded or -inf is an id, too
                low, high = _bracket(z, None, None, 0.0, most, 0.0, share * SAMPLE, 1.0 - share, floor, most, SPACING)
            low = tl.maximum(low, floor)
            high = tl.where(high > low, tl.minimum(tl.maximum(high, low + SPACING), most), most)  # it was misled
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
    out = x.new_empty(num_rows, dtype=torch.float32)
    logits = logits | {"SPACING": _SPACING.get(x.dtype, 1)}
    filters = {"thresholds_ptr": out, "num_kept": num_kept, "top_p": top_p or 0.0}
    launch = _launch_short if num_ids <= _SHORT else _launch_long
    if num_kept < num_ids:
        launch(logits, filters | {"BY_MASS": False, "HAS_FLOOR": False})
    if top_p is not None:
        launch(logits, filters | {"BY_MASS": True, "HAS_FLOOR": num_kept < num_ids})
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
        sample = _sample_size(num_ids / lanes, filters["num_kept"] / num_ids, sample)
    programs = min(num_rows, _RESIDENT_WARPS // num_warps)
    x = logits["x_ptr"]
    options = {"maxnreg": _REGISTERS} if by_mass and x.element_size() == 2 and _is_hopper(x.device) else {}
    candidates = x.new_empty((programs, lanes, _CAPACITY.value), dtype=torch.float32)
    assert candidates.data_ptr() % (4 * _CAPACITY.value) == 0, "the last bits of a list's address tell its places"
    _thresholds_kernel[(programs,)](
        **logits,
        **filters,
        candidates_ptr=candidates,
        BLOCK=_WARP_BLOCK * num_warps,
        SAMPLE=sample,
        num_warps=num_warps,
        **options,
    )


def _is_hopper(device: torch.device) -> bool:
    is_nvidia = device.type == "cuda" and torch.version.hip is None
    return is_nvidia and torch.cuda.get_device_capability(device) == _HOPPER


def _sample_size(lane: float, share: float, most: int) -> int:
    """The least sample at which a lane of so many logits expects few enough candidates."""
    sample = _LEAST_SAMPLE
    while sample < most and lane * 2.5 * _spread(sample, share) / sample > _EXPECTED:
        sample *= 2
    return sample


def _spread(sample: int, share: float) -> float:
    """See ``_error``; the bracket is two of these wide and up to one more."""
    return _SIGMAS.value * math.sqrt(sample * share * (1.0 - share)) + _GRANULES.value
