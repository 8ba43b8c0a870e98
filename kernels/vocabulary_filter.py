"""Which logits of a row stay: the k largest, what is likely enough beside the likeliest, or the nucleus; as a
threshold for each row, found without a sort.

A threshold is the largest bound above which lies enough: k logits (ties stay), or a share p of the probability (the
nucleus of Holtzman et al., https://arxiv.org/abs/1904.09751, with the token that crosses p). A sample of the row
brackets it. One pass over the row counts what lies above the bracket, and lists what lies inside; among these few
candidates the threshold is searched in registers. For p a pass before measures the row. A row of at most 2048 logits
is searched in registers at once. The mathematics is in ``docs/nucleus.md``. For min_p (Nguyen et al.,
https://arxiv.org/abs/2407.01082) the threshold lies so far below the row's largest logit, which the pass for k finds
beside. One launch finds them all.

Bytes for each row: its V logits, as a rule once for k or min_p or both, and twice for p; a sample, and the
candidates, which stay in L2. Of a short row its logits once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels import _float_order as float_order
from fastmask.kernels import _launch, _math
from fastmask.kernels import _logit_rows as logit_rows
from fastmask.kernels import _sequences as sequences
from fastmask.kernels import _threshold_search as threshold_search
from fastmask.kernels._logit_rows import LogitRows
from fastmask.kernels._sequences import OwnOptions

# A lane lists its own candidates, so that a pass needs no communication between threads; where there are more than
# places (a power of two) the last ones stay. Of a block a thread has 16 logits, in lanes of a 16-byte vector each.
_CAPACITY = tl.constexpr(16)
_WARP_BLOCK = 512
_INEXACT = tl.constexpr(16.0)  # weights relative to a logit so far from the largest are; from 44 on they may overflow

# A turn of a search costs a warp a hundred instructions, and three for each of a thread's logits: few warps with many
# logits do it for less. Longest row, warps. Where rows are few, up to four times as many finish sooner: not for p, of
# which the sums, and rarely an id at the nucleus's edge, depend on how they are spread.
_WARPS = (
    (8192, 1),  # up to 16 blocks
    (32768, 2),  # 8 to 32
    (65536, 4),  # 16 to 32
    (math.inf, 8),  # 16 or more
)
_FEW_ROWS, _MOST_WARPS = 2, 8  # rows for each multiprocessor
_RESIDENT_WARPS = 32  # of a multiprocessor: their candidates, 17 MB on an H100, or 35 of float32, stay in its L2
# A sample for k is so large that a lane expects so many candidates, at which one row in ten has one without a place
# and is read again; but a warp has registers for so many logits only. For p a block of them does.
_EXPECTED = 6.8
_LEAST_SAMPLE, _MOST_SAMPLE_OF_WARP = 1024, 2048
# So many registers for each thread of a nucleus's program do from Hopper on, without a spill, for logits of 16 bits:
# 16 warps find room in a multiprocessor, where of its own accord the compiler leaves it to 12 of one warp, or to 8.
# With k before they do not. On a B200 one warp takes more: 13 find room there, and float16 does not spill as it would
# of its own accord. An A100's and an RTX 4090's programs would spill.
_REGISTERS, _REGISTERS_OF_WARP_ON_B200 = 128, 152
# A shorter row is searched in registers at once; its block holds its edges too.
_SHORT, _SHORT_BLOCK = 2048, 128
# Least distance in the order of float32 between two numbers of the logits' dtype.
_SPACING = {torch.bfloat16: 1 << 16, torch.float16: 1 << 13}


class Row(NamedTuple):
    """The body of a row of logits, which its program reads by blocks; see ``_logit_rows.Body``.

    body_ptr: aligned to 16 bytes. excluded: see ``_logit_rows.Excluded``.
    """

    body_ptr: tl.tensor
    body_column: tl.tensor
    body_length: tl.tensor
    excluded: logit_rows.Excluded


class Search(NamedTuple):
    """Which threshold of a row is searched, and where: the largest above which the weight reaches the target.

    law: what logits count for; None where they only count. least, most: the orders between which it certainly lies;
    it is least where no other reaches the target. low, high: between which it probably lies.
    """

    target: tl.tensor
    law: threshold_search.Law | None
    least: tl.tensor
    most: tl.tensor
    low: tl.tensor
    high: tl.tensor


@triton.jit
def _row(x_ptr, start, V, excluded, VECTOR: tl.constexpr):
    """The row that begins at a flat index, counted from a pointer aligned to 16 bytes."""
    body = logit_rows.body(start, V, VECTOR)
    return Row(tl.multiple_of(x_ptr + body.start, 16), body.column, body.length, excluded)


@triton.jit
def _edges(x_ptr, start, V, row, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """What of a row is not its body [LANES], float32, -inf where there is no more."""
    offs_v, in_v = logit_rows.edges_of_lanes(tl.arange(0, LANES), V, row.body_column, row.body_length, VECTOR)
    edges = tl.load(x_ptr + start + offs_v, mask=in_v, other=-float("inf")).to(tl.float32)
    return logit_rows.without_excluded(edges, offs_v, in_v, 0, V, row.excluded)


@triton.jit
def _fetched(row, offset, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row's body [lanes, VECTOR], or of its words of two bfloat16; -inf where it has ended."""
    lane = tl.arange(0, BLOCK // VECTOR)[:, None]
    if row.body_ptr.dtype.element_ty == tl.bfloat16:
        word = offset // 2 + lane * (VECTOR // 2) + tl.arange(0, VECTOR // 2)[None, :]
        return logit_rows.load_words(row.body_ptr, word, word < tl.multiple_of(row.body_length // 2, 4))
    else:
        block = offset + lane * VECTOR + tl.arange(0, VECTOR)[None, :]
        return tl.load(row.body_ptr + block, mask=block < row.body_length, other=-float("inf"))


@triton.jit
def _block(fetched, row, offset, VECTOR: tl.constexpr):
    """The logits of a block that was fetched [lanes, VECTOR], float32."""
    LANES: tl.constexpr = fetched.shape[0]
    block = offset + tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    if fetched.dtype == tl.int32:
        even, odd = logit_rows.halves(fetched)
        z = tl.reshape(tl.join(even, odd), (LANES, VECTOR))
    else:
        z = fetched.to(tl.float32)
    first = row.body_column + offset
    return logit_rows.without_excluded(
        z, row.body_column + block, block < row.body_length, first, first + LANES * VECTOR, row.excluded
    )


@triton.jit
def _sample(row, V, VECTOR: tl.constexpr, SAMPLE: tl.constexpr):
    """Logits that are spread over a row [lanes, VECTOR], float32, -inf where excluded."""
    LANES: tl.constexpr = SAMPLE // VECTOR
    lane = tl.arange(0, LANES)[:, None]
    vector = (lane.to(tl.int64) * (row.body_length // VECTOR) // LANES).to(tl.int32)
    column = vector * VECTOR + tl.arange(0, VECTOR)[None, :]
    z = tl.load(row.body_ptr + column).to(tl.float32)
    return logit_rows.without_excluded(z, row.body_column + column, column >= 0, 0, V, row.excluded)


@triton.jit
def _sorted_out(z, z_low, z_high):
    """Which logits are in [z_low, z_high), and which above."""
    is_high = z >= z_high  # never of a NaN, which is beyond infinity
    return (z >= z_low) & (is_high == 0), is_high


@triton.jit
def _pass(row, edges, low, high, law, candidates_ptr, WITH_LARGEST: tl.constexpr, VECTOR: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """One pass over a row, in which each lane lists its candidates, the logits in [low, high).

    Returns the number of each lane's candidates, the weight of what is not below high, and the row's largest logit,
    or, where nobody asks for it, another.
    """
    LANES: tl.constexpr = BLOCK // VECTOR
    z_low, z_high = float_order.value(low), float_order.value(high)
    lane = tl.arange(0, LANES)
    list_address = (candidates_ptr + lane * _CAPACITY).to(tl.int64)  # divisible by a list's size
    tl.debug_barrier()  # every thread has read the candidates of the pass before
    is_candidate, is_high = _sorted_out(edges, z_low, z_high)
    tl.store(candidates_ptr + lane * _CAPACITY, edges, mask=is_candidate)
    above_high = threshold_search.counted(is_high, threshold_search.weights(edges, law)).to(tl.float32)
    size = tl.where(is_candidate, 4, 0)  # of the lane's candidates, in bytes
    largest = edges
    fetched = _fetched(row, 0, VECTOR, BLOCK)
    for offset in range(0, row.body_length, BLOCK):
        z = _block(fetched, row, offset, VECTOR)
        fetched = _fetched(row, offset + BLOCK, VECTOR, BLOCK)  # while this one is sorted
        columns = logit_rows.columns(z, VECTOR)
        for i in tl.static_range(VECTOR):
            is_inside, is_above = _sorted_out(columns[i], z_low, z_high)
            place = list_address | (size & (4 * _CAPACITY - 4)).to(tl.int64)  # an addition of 64 bits takes two
            tl.store(place.to(tl.pointer_type(tl.float32)), columns[i], mask=is_inside)
            size += tl.where(is_inside, 4, 0)
            above_high += threshold_search.counted(is_above, threshold_search.weights(columns[i], law)).to(tl.float32)
            if WITH_LARGEST:
                largest = tl.maximum(largest, columns[i])
    tl.debug_barrier()  # every thread sees all candidates
    return size // 4, tl.sum(above_high), tl.max(largest)


@triton.jit
def _listed(candidates_ptr, number):
    """The candidates that lanes have listed [LANES, _CAPACITY], -inf where a place is free."""
    place = tl.arange(0, _CAPACITY)[None, :]
    lane = tl.arange(0, number.shape[0])[:, None]
    return tl.load(candidates_ptr + lane * _CAPACITY + place, mask=place < number[:, None], other=-float("inf"))


@triton.jit
def _select(row, edges, search, candidates_ptr, WITH_LARGEST: tl.constexpr, SPACING: tl.constexpr,
            VECTOR: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """The order of the threshold that is searched, by passes over the row until a bracket holds it; and what else a
    pass finds."""
    target, law, least, most, low, high = search
    low = tl.maximum(low, least)
    high = tl.where(high > low, tl.minimum(tl.maximum(high, low + SPACING), most), most)  # it was misled
    is_found = tl.full((), 0, tl.int1)
    largest = tl.full((), -float("inf"), tl.float32)
    turn = tl.full((), 0, tl.int32)
    while (float_order.distance(least, most) > SPACING) & (is_found == 0):
        number, above_high, largest = _pass(row, edges, low, high, law, candidates_ptr, WITH_LARGEST, VECTOR, BLOCK)
        listed = threshold_search.weighed(_listed(candidates_ptr, number), law, above_high)
        bracket = threshold_search.ends(listed)
        # Full lists are a sample of the candidates, which weigh at least above_low then, and probably in proportion.
        is_full = tl.max(number) > _CAPACITY
        num_listed = tl.maximum(tl.sum(tl.minimum(number, _CAPACITY)), 1).to(tl.float32)
        share_listed = tl.where(is_full, num_listed / tl.sum(number), 1.0)
        if law is None:
            above_low = above_high + tl.sum(number)
            is_known = tl.full((), 1, tl.int1)
        else:
            above_low = above_high + (bracket.above_low - above_high) / share_listed
            is_known = (is_full == 0) | (float_order.distance(low, high) <= SPACING)  # that is so of one number, too
        is_above = above_high >= target
        is_short = above_low < target
        is_below = is_known & is_short
        is_inside = (bracket.above_low >= target) | (is_known & (is_short == 0))
        is_found = (is_above | is_below | is_full) == 0
        threshold = bracket.low
        if (is_above | is_short) == 0:
            wanted = tl.where(is_full, above_high + (target - above_high) * share_listed, target)
            threshold = threshold_search.search(listed, bracket, wanted, 0.0, SPACING).low
        most = tl.where(is_below, low, tl.where(is_above, most, high))
        least = tl.where(is_found, threshold, tl.where(is_above, high, tl.where(is_inside, low, least)))
        # Next: one number, if all of the lists is; every other time the middle third of all numbers left; or else the
        # neighbour as wide, or a quarter about where the lists have the threshold.
        width = float_order.value(high) - float_order.value(low)
        if (float_order.distance(bracket.low, bracket.high) == 1) & is_full & (turn % 4 < 3):
            low, high = bracket.low, bracket.high
        elif (turn % 2 == 1) | (width == float("inf")):
            third = (float_order.distance(least, most) // 3).to(tl.int32)
            low, high = least + third, most - third
        elif is_above:
            low, high = high, float_order.order(float_order.value(high) + width)
        elif is_below:
            low, high = float_order.order(float_order.value(low) - width), low
        else:
            low = float_order.order(float_order.value(threshold) - 0.125 * width)
            high = float_order.order(float_order.value(threshold) + 0.125 * width)
        low = tl.minimum(tl.maximum(low, least), most - 1)
        high = tl.minimum(tl.maximum(high, low + SPACING), most)
        turn += 1
    return least, largest


@triton.jit
def _search_of_count(row, V, num_kept, SPACING: tl.constexpr, VECTOR: tl.constexpr, SAMPLE: tl.constexpr):
    """The search for the num_kept-th largest logit of a row, by a sample of it."""
    target = num_kept.to(tl.float32)
    share = target / V.to(tl.float32)  # what is excluded or -inf is an id, too
    least = tl.full((), threshold_search.LOWEST, tl.int32)
    most = tl.full((), threshold_search.BEYOND, tl.int32)
    sample = threshold_search.weighed(_sample(row, V, VECTOR, SAMPLE), None)
    sample_error = threshold_search.SampleError(tl.full((), 0.0, tl.float32), 1.0 - share, None)
    low, high = threshold_search.probable(sample, sample_error, most, share * SAMPLE, least, most, SPACING)
    return Search(target, None, least, most, low, high)


@triton.jit
def _measure(row, edges, floor, middle, law, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """What a row weighs, of what is not below the floor (an order, or None).

    Returns the largest logit, the weight of all, and the weight of what is not below the middle, an order.
    """
    z_middle = float_order.value(middle)
    z_floor = None if floor is None else float_order.value(floor)
    largest = edges
    weight = threshold_search.weights(edges, law)
    if floor is not None:
        weight = tl.where(edges >= z_floor, weight, 0.0)
    total, above = weight, tl.where(edges >= z_middle, weight, 0.0)
    fetched = _fetched(row, 0, VECTOR, BLOCK)
    for offset in range(0, row.body_length, BLOCK):
        z = _block(fetched, row, offset, VECTOR)
        fetched = _fetched(row, offset + BLOCK, VECTOR, BLOCK)  # while this one is summed
        largest = tl.maximum(largest, tl.max(z, 1))
        weights = threshold_search.weights(z, law)
        if floor is not None:
            weights = tl.where(z >= z_floor, weights, 0.0)
        total += tl.sum(weights, 1)
        above += tl.sum((z >= z_middle).to(tl.float32) * weights, 1)  # fused: one less than to choose and add
    return tl.max(largest), tl.sum(total), tl.sum(above)


@triton.jit
def _search_of_mass(row, edges, V, top_p, factor, floor, SPACING: tl.constexpr, VECTOR: tl.constexpr,
                    BLOCK: tl.constexpr):  # fmt: skip
    """The search for a row's nucleus, of what is not below the floor, by a sample and a measure of the row."""
    z = _sample(row, V, VECTOR, BLOCK)
    least = tl.full((), threshold_search.LOWEST, tl.int32) if floor is None else floor
    if floor is not None:
        z = tl.where(z >= float_order.value(floor), z, -float("inf"))
    num_ids = V.to(tl.float32)
    top = threshold_search.finite(tl.max(z))
    sample = threshold_search.weighed(z, threshold_search.Law(top, factor))
    all_of_it = threshold_search.ends(sample)
    total = all_of_it.above_low
    target = top_p * total
    middle = threshold_search.search(sample, all_of_it, target, 0.05 * target, SPACING).low
    is_empty = total <= 0.0
    middle = tl.where(is_empty, least, middle)
    # All that is less likely than an even share of 1 - p is together less likely than 1 - p.
    even_share = (1.0 - top_p) / num_ids
    sampled = BLOCK / num_ids
    largest, anchor, base = top, all_of_it.above_high, all_of_it.above_high  # for their types
    turn = tl.full((), 0, tl.int32)
    while turn < 3:
        law = threshold_search.Law(top, factor)
        largest, total, above = _measure(row, edges, floor, middle, law, VECTOR, BLOCK)
        largest = threshold_search.finite(largest)
        anchor = above * sampled
        again = threshold_search.weighed(z, law)  # kept, it would take registers of the measure
        base = anchor - threshold_search.above(again, float_order.value(middle))
        target = total * top_p * sampled
        turn += 1
        if tl.abs(largest - top) > threshold_search.distance(_INEXACT, law):
            top = largest
            middle = float_order.order(top + threshold_search.distance(_math.log(even_share), law))
        elif (anchor < target) & (threshold_search.weights(float_order.value(middle), law) > 0.01 * target):
            # Few logits have most of the weight, and the sample has too many of them: not so of those below.
            below = threshold_search.weighed(z, law, base)
            below_middle = threshold_search.Bracket(all_of_it.low, threshold_search.total(below), middle, anchor)
            middle = threshold_search.search(below, below_middle, target, 0.02 * target, SPACING).low
        else:
            turn += 3  # this was the last
    law = threshold_search.Law(top, factor)
    even = _math.log(total / threshold_search.weights(top, law) * even_share)
    even = top + threshold_search.distance(even, law)
    even = tl.minimum(float_order.order(even), float_order.order(largest))
    least = tl.where(total > 0.0, tl.maximum(even, least), least)
    most = tl.maximum(float_order.order(largest), least) + 1
    sample_error = threshold_search.SampleError(anchor, tl.full((), 1.0, tl.float32), law)
    sample = threshold_search.weighed(z, law, base)
    low, high = threshold_search.probable(sample, sample_error, middle, target, least, most, SPACING)
    low, high = tl.where(is_empty, least, low), tl.where(is_empty, most, high)
    return Search(tl.maximum(total * top_p, 1e-30), law, least, most, low, high)


@triton.jit
def _narrows(value, end, values_ptr):
    """Whether a filter is not at its end, where it keeps all. Of one for all sequences that is known: it is not."""
    return True if values_ptr is None else value < end


@triton.jit
def _largest(row, edges, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of a row."""
    largest = edges
    fetched = _fetched(row, 0, VECTOR, BLOCK)
    for offset in range(0, row.body_length, BLOCK):
        z = _block(fetched, row, offset, VECTOR)
        fetched = _fetched(row, offset + BLOCK, VECTOR, BLOCK)
        largest = tl.maximum(largest, tl.max(z, 1))
    return tl.max(largest)


@triton.jit
def _found(logits, target, floor, SPACING: tl.constexpr):
    """The order of the threshold at which logits in registers reach the target; the floor, if they do not."""
    found = threshold_search.search(logits, threshold_search.ends(logits), target, 0.0, SPACING)
    return tl.where(found.above_low < target, floor, found.low)


@triton.jit(do_not_specialize=["offset_x", "num_places", "V", "num_kept", "mask_id", "seq_len"])
def _short_thresholds_kernel(
    x_ptr,
    offset_x,
    stride_x,
    row_indices_ptr,
    num_places,
    forbidden_ptr,
    thresholds_ptr,
    V,
    num_kept,
    gap,
    top_p,
    factor,
    num_kept_ptr,
    gaps_ptr,
    top_ps_ptr,
    factors_ptr,
    seq_len,
    mask_id,
    IS_COMPACT: tl.constexpr,
    SPACING: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # This program finds the threshold of one row, which it holds in registers. Arguments: see _thresholds_kernel.
    row_index = tl.program_id(0)
    flat = tl.load(row_indices_ptr + row_index)
    if logit_rows.is_stray(flat, num_places):
        return
    num_kept = sequences.own(num_kept_ptr, num_kept, flat, seq_len)
    gap = sequences.own(gaps_ptr, gap, flat, seq_len)
    top_p = sequences.own(top_ps_ptr, top_p, flat, seq_len)
    factor = sequences.own(factors_ptr, factor, flat, seq_len)
    x_ptr = tl.multiple_of(x_ptr - offset_x, 16)
    start = offset_x + (row_index.to(tl.int64) if IS_COMPACT else flat) * stride_x
    row = _row(x_ptr, start, V, logit_rows.Excluded(mask_id, forbidden_ptr), VECTOR)
    z = _block(_fetched(row, 0, VECTOR, BLOCK), row, 0, VECTOR)
    edges = _edges(x_ptr, start, V, row, VECTOR, BLOCK // VECTOR)
    floor = tl.full((), threshold_search.LOWEST, tl.int32)
    if num_kept is not None:
        if _narrows(num_kept, V, num_kept_ptr):
            logits = threshold_search.weighed(z, None, None, edges)
            floor = _found(logits, num_kept.to(tl.float32), floor, SPACING)
    if gap is not None or top_p is not None:
        largest = tl.maximum(tl.max(z), tl.max(edges))
    if gap is not None:
        # A least number such as 1e-40 is a float64 where it is interpreted.
        floor = tl.maximum(floor, float_order.order((largest + gap).to(tl.float32)))
    if top_p is not None:
        if _narrows(top_p, 1.0, top_ps_ptr):
            z_floor = float_order.value(floor)
            z = tl.where(z >= z_floor, z, -float("inf"))
            edges = tl.where(edges >= z_floor, edges, -float("inf"))
            law = threshold_search.Law(threshold_search.finite(largest), factor)
            logits = threshold_search.weighed(z, law, None, edges)
            target = tl.maximum(threshold_search.total(logits) * top_p, 1e-30)
            floor = _found(logits, target, floor, SPACING)
    tl.store(thresholds_ptr + row_index, float_order.value(floor))


@triton.jit(do_not_specialize=["offset_x", "num_places", "num_rows", "V", "num_kept", "mask_id", "seq_len"])
def _thresholds_kernel(
    x_ptr,
    offset_x,
    stride_x,
    row_indices_ptr,
    num_places,
    forbidden_ptr,
    thresholds_ptr,
    candidates_ptr,  # None where no threshold is searched
    num_rows,
    V,
    num_kept,  # the num_kept largest stay; of these
    gap,  # what is not further from the largest: T log(min_p); of these
    top_p,  # the nucleus
    factor,  # at log2(e) / T; None for T = 1. None where a filter is off
    num_kept_ptr,  # of each sequence its own; None: the number is for all
    gaps_ptr,
    top_ps_ptr,
    factors_ptr,
    seq_len,
    mask_id,
    IS_COMPACT: tl.constexpr,
    SPACING: tl.constexpr,  # least distance in order of two numbers of the logits' dtype
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLE: tl.constexpr,  # logits by which the num_kept-th is bracketed; the nucleus is by a block
):
    # This program finds the thresholds of one row after another, each num_programs rows on.
    x_ptr = tl.multiple_of(x_ptr - offset_x, 16)
    excluded = logit_rows.Excluded(mask_id, forbidden_ptr)
    if candidates_ptr is not None:
        candidates_ptr += tl.program_id(0).to(tl.int64) * (BLOCK // VECTOR * _CAPACITY)
    for row_index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        flat = tl.load(row_indices_ptr + row_index)
        if not logit_rows.is_stray(flat, num_places):
            k = sequences.own(num_kept_ptr, num_kept, flat, seq_len)
            own_gap = sequences.own(gaps_ptr, gap, flat, seq_len)
            p = sequences.own(top_ps_ptr, top_p, flat, seq_len)
            x_row = flat * 0 + row_index if IS_COMPACT else flat  # row_index is an int in the interpreter
            start = offset_x + x_row * stride_x
            row = _row(x_ptr, start, V, excluded, VECTOR)
            edges = _edges(x_ptr, start, V, row, VECTOR, BLOCK // VECTOR)
            floor = tl.full((), threshold_search.LOWEST, tl.int32)
            largest = tl.full((), -float("inf"), tl.float32)
            if k is not None:
                if _narrows(k, V, num_kept_ptr):
                    search = _search_of_count(row, V, k, SPACING, VECTOR, SAMPLE)
                    floor, largest = _select(
                        row, edges, search, candidates_ptr, own_gap is not None, SPACING, VECTOR, BLOCK
                    )
                elif own_gap is not None:
                    largest = _largest(row, edges, VECTOR, BLOCK)
            elif own_gap is not None:
                largest = _largest(row, edges, VECTOR, BLOCK)
            if own_gap is not None:
                floor = tl.maximum(floor, float_order.order((largest + own_gap).to(tl.float32)))
            if p is not None:
                if _narrows(p, 1.0, top_ps_ptr):
                    own_factor = sequences.own(factors_ptr, factor, flat, seq_len)
                    least = None if k is None and own_gap is None else floor
                    search = _search_of_mass(row, edges, V, p, own_factor, least, SPACING, VECTOR, BLOCK)
                    floor, _ = _select(row, edges, search, candidates_ptr, False, SPACING, VECTOR, BLOCK)
            tl.store(thresholds_ptr + row_index, float_order.value(floor))


def thresholds(
    rows: LogitRows,
    top_k: int | None,
    min_p: float | None,
    top_p: float | None,
    temperature: float = 1.0,
    own: OwnOptions | None = None,
    seq_len: int | None = None,
) -> Tensor | None:
    """What the logits of each row must not be below, [M] float32; None where all stay. See the reference.

    own: of which options each sequence, of seq_len positions, has its own.
    """
    own = OwnOptions() if own is None else own
    if top_k is None and min_p is None and top_p is None and not own.are_any:  # told quickly, as it is at most calls
        return None
    filters = _Filters(num_kept_ptr=own.num_kept, gaps_ptr=own.gaps, top_ps_ptr=own.top_ps, seq_len=seq_len)
    if own.num_kept is None and top_k is not None and top_k < rows.num_ids:
        filters = filters._replace(num_kept=top_k)
    if own.gaps is None and min_p is not None:
        filters = filters._replace(gap=temperature * math.log(min_p))
    if own.top_ps is None and top_p is not None:
        filters = filters._replace(top_p=float(top_p))
    if filters.has_nucleus:
        factor = None if temperature == 1.0 else _math.over_temperature(temperature)
        filters = filters._replace(factor=factor, factors_ptr=own.figure_factors)
    if not (filters.counts or filters.has_nucleus or filters.has_gap):
        return None
    out = rows.logits.new_empty(rows.num_rows, dtype=torch.float32)
    launch = _launch_short if rows.num_ids <= _SHORT else _launch_long
    launch(rows, out, filters)
    return out


class _Filters(NamedTuple):
    """What a launch searches, by the kernels' names: a number for all sequences, or of each its own. None is off."""

    num_kept: int | None = None
    gap: float | None = None
    top_p: float | None = None
    factor: float | None = None
    num_kept_ptr: Tensor | None = None
    gaps_ptr: Tensor | None = None
    top_ps_ptr: Tensor | None = None
    factors_ptr: Tensor | None = None
    seq_len: int | None = None

    @property
    def counts(self) -> bool:
        """Whether the k largest stay."""
        return self.num_kept is not None or self.num_kept_ptr is not None

    @property
    def has_gap(self) -> bool:
        """Whether what is likely enough beside the likeliest does."""
        return self.gap is not None or self.gaps_ptr is not None

    @property
    def has_nucleus(self) -> bool:
        """Whether the nucleus does."""
        return self.top_p is not None or self.top_ps_ptr is not None


def _launch_short(rows: LogitRows, out: Tensor, filters: _Filters) -> None:
    """Of rows that a program holds in registers."""
    _launch.launch(
        _short_thresholds_kernel,
        (rows.num_rows,),
        out,
        **rows.arguments(),
        **filters._asdict(),
        thresholds_ptr=out,
        SPACING=_SPACING.get(rows.logits.dtype, 1),
        BLOCK=max(_SHORT_BLOCK, _launch.next_power_of_2(rows.num_ids)),
        num_warps=2 if filters.counts and filters.has_nucleus else 1,  # one would have too few registers for both
    )


def _launch_long(rows: LogitRows, out: Tensor, filters: _Filters) -> None:
    """Of longer ones."""
    x, hardware = rows.logits, _launch.hardware(rows.logits.device)
    num_warps = next(warps for longest, warps in _WARPS if rows.num_ids <= longest)
    most_sample = _MOST_SAMPLE_OF_WARP * num_warps
    options: dict[str, int] = {}
    if filters.has_nucleus:
        if x.element_size() == 2 and not filters.counts:
            options = _registers(hardware, num_warps)
    elif filters.counts and rows.num_rows <= _FEW_ROWS * hardware.num_multiprocessors:
        num_warps = min(4 * num_warps, _MOST_WARPS)
    sample = None
    if filters.counts:
        logits_of_lane = rows.num_ids * rows.vector / (_WARP_BLOCK * num_warps)
        share = 0.5 if filters.num_kept is None else filters.num_kept / rows.num_ids  # 0.5 takes the largest sample
        sample = _sample_size(logits_of_lane, share, most_sample)
    programs = min(rows.num_rows, hardware.num_multiprocessors * _RESIDENT_WARPS // num_warps)
    candidates = None
    if filters.counts or filters.has_nucleus:
        lanes = _WARP_BLOCK * num_warps // rows.vector
        candidates = x.new_empty((programs, lanes, _CAPACITY.value), dtype=torch.float32)
        assert candidates.data_ptr() % (4 * _CAPACITY.value) == 0, "the last bits of a list's address tell its places"
    _launch.launch(
        _thresholds_kernel,
        (programs,),
        out,
        **rows.arguments(),
        **filters._asdict(),
        thresholds_ptr=out,
        candidates_ptr=candidates,
        num_rows=rows.num_rows,
        SPACING=_SPACING.get(x.dtype, 1),
        BLOCK=_WARP_BLOCK * num_warps,
        SAMPLE=sample,
        num_warps=num_warps,
        **options,
    )


def _registers(hardware: _launch.Hardware, num_warps: int) -> dict[str, int]:
    """Triton's option that bounds the registers of a nucleus's program; none where it would spill."""
    major = hardware.capability[0] if hardware.capability is not None else 0
    if major < 9:
        return {}
    return {"maxnreg": _REGISTERS_OF_WARP_ON_B200 if major == 10 and num_warps == 1 else _REGISTERS}


def _sample_size(logits_of_lane: float, share: float, most: int) -> int:
    """The least sample at which a lane of so many logits expects few enough candidates."""
    sample = _LEAST_SAMPLE
    while sample < most and logits_of_lane * 2.5 * _spread(sample, share) / sample > _EXPECTED:
        sample *= 2
    return sample


def _spread(sample: int, share: float) -> float:
    """See ``_threshold_search.error``; the bracket is two of these wide and up to one more."""
    sigmas, granules = threshold_search.SIGMAS.value, threshold_search.GRANULES.value
    return sigmas * math.sqrt(sample * share * (1.0 - share)) + granules
