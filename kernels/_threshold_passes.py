"""Thresholds of a row inside a kernel: where each probably lies, and the passes over the row that find it.

See ``kernels/vocabulary_filter.py``; the mathematics is in ``docs/nucleus.md``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastmask.kernels import _float_order as float_order
from fastmask.kernels import _logit_rows as logit_rows
from fastmask.kernels import _math
from fastmask.kernels import _threshold_search as threshold_search

# A lane lists its own candidates, so that a pass needs no communication between threads; where there are more than
# places (a power of two) the last ones stay.
CAPACITY = tl.constexpr(16)
_INEXACT = tl.constexpr(16.0)  # weights relative to a logit so far from the largest are; from 44 on they may overflow


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
def row_at(x_ptr, start, V, excluded, VECTOR: tl.constexpr):
    """The row that begins at a flat index, counted from a pointer aligned to 16 bytes."""
    body = logit_rows.body(start, V, VECTOR)
    return Row(tl.multiple_of(x_ptr + body.start, 16), body.column, body.length, excluded)


@triton.jit
def load_edges(x_ptr, start, V, row, VECTOR: tl.constexpr, LANES: tl.constexpr):
    """What of a row is not its body [LANES], float32, -inf where there is no more."""
    offs_v, in_v = logit_rows.edges_of_lanes(tl.arange(0, LANES), V, row.body_column, row.body_length, VECTOR)
    edges = tl.load(x_ptr + start + offs_v, mask=in_v, other=-float("inf")).to(tl.float32)
    return logit_rows.without_excluded(edges, offs_v, in_v, 0, V, row.excluded)


@triton.jit
def fetch(row, offset, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row's body [lanes, VECTOR], or of its words of two bfloat16; -inf where it has ended."""
    lane = tl.arange(0, BLOCK // VECTOR)[:, None]
    if row.body_ptr.dtype.element_ty == tl.bfloat16:
        word = offset // 2 + lane * (VECTOR // 2) + tl.arange(0, VECTOR // 2)[None, :]
        return logit_rows.load_words(row.body_ptr, word, word < tl.multiple_of(row.body_length // 2, 4))
    else:
        block = offset + lane * VECTOR + tl.arange(0, VECTOR)[None, :]
        return tl.load(row.body_ptr + block, mask=block < row.body_length, other=-float("inf"))


@triton.jit
def block_of(fetched, row, offset, VECTOR: tl.constexpr):
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
    list_address = (candidates_ptr + lane * CAPACITY).to(tl.int64)  # divisible by a list's size
    tl.debug_barrier()  # every thread has read the candidates of the pass before
    is_candidate, is_high = _sorted_out(edges, z_low, z_high)
    tl.store(candidates_ptr + lane * CAPACITY, edges, mask=is_candidate)
    above_high = threshold_search.counted(is_high, threshold_search.weights(edges, law)).to(tl.float32)
    size = tl.where(is_candidate, 4, 0)  # of the lane's candidates, in bytes
    largest = edges
    fetched = fetch(row, 0, VECTOR, BLOCK)
    for offset in range(0, row.body_length, BLOCK):
        z = block_of(fetched, row, offset, VECTOR)
        fetched = fetch(row, offset + BLOCK, VECTOR, BLOCK)  # while this one is sorted
        columns = logit_rows.columns(z, VECTOR)
        for i in tl.static_range(VECTOR):
            is_inside, is_above = _sorted_out(columns[i], z_low, z_high)
            place = list_address | (size & (4 * CAPACITY - 4)).to(tl.int64)  # an addition of 64 bits takes two
            tl.store(place.to(tl.pointer_type(tl.float32)), columns[i], mask=is_inside)
            size += tl.where(is_inside, 4, 0)
            above_high += threshold_search.counted(is_above, threshold_search.weights(columns[i], law)).to(tl.float32)
            if WITH_LARGEST:
                largest = tl.maximum(largest, columns[i])
    tl.debug_barrier()  # every thread sees all candidates
    return size // 4, tl.sum(above_high), tl.max(largest)


@triton.jit
def _listed(candidates_ptr, number):
    """The candidates that lanes have listed [LANES, CAPACITY], -inf where a place is free."""
    place = tl.arange(0, CAPACITY)[None, :]
    lane = tl.arange(0, number.shape[0])[:, None]
    return tl.load(candidates_ptr + lane * CAPACITY + place, mask=place < number[:, None], other=-float("inf"))


@triton.jit
def select(row, edges, search, candidates_ptr, WITH_LARGEST: tl.constexpr, SPACING: tl.constexpr,
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
        is_full = tl.max(number) > CAPACITY
        num_listed = tl.maximum(tl.sum(tl.minimum(number, CAPACITY)), 1).to(tl.float32)
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
def search_of_count(row, V, num_kept, SPACING: tl.constexpr, VECTOR: tl.constexpr, SAMPLE: tl.constexpr):
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
    fetched = fetch(row, 0, VECTOR, BLOCK)
    for offset in range(0, row.body_length, BLOCK):
        z = block_of(fetched, row, offset, VECTOR)
        fetched = fetch(row, offset + BLOCK, VECTOR, BLOCK)  # while this one is summed
        largest = tl.maximum(largest, tl.max(z, 1))
        weights = threshold_search.weights(z, law)
        if floor is not None:
            weights = tl.where(z >= z_floor, weights, 0.0)
        total += tl.sum(weights, 1)
        above += tl.sum((z >= z_middle).to(tl.float32) * weights, 1)  # fused: one less than to choose and add
    return tl.max(largest), tl.sum(total), tl.sum(above)


@triton.jit
def search_of_mass(row, edges, V, top_p, factor, floor, SPACING: tl.constexpr, VECTOR: tl.constexpr,
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
def largest_of(row, edges, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit of a row."""
    largest = edges
    fetched = fetch(row, 0, VECTOR, BLOCK)
    for offset in range(0, row.body_length, BLOCK):
        z = block_of(fetched, row, offset, VECTOR)
        fetched = fetch(row, offset + BLOCK, VECTOR, BLOCK)
        largest = tl.maximum(largest, tl.max(z, 1))
    return tl.max(largest)


@triton.jit
def find_in_registers(logits, target, floor, SPACING: tl.constexpr):
    """The order of the threshold at which logits in registers reach the target; the floor, if they do not."""
    found = threshold_search.search(logits, threshold_search.ends(logits), target, 0.0, SPACING)
    return tl.where(found.above_low < target, floor, found.low)
