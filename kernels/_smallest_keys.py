"""The k smallest keys of a row: a threshold that has k keys below it, found by counting and not by sorting.

A bracket holds two thresholds around the one that is sought. Each round counts the keys below a probe between them,
which then takes the place of one. Keys are distinct, so that a threshold exists for every k. Several may, between two
neighbouring keys; since the same keys lie below each, results do not depend on the path of the search.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

# A key and its position form one integer, so that keys are distinct: ties break by position.
_POSITION_BITS = tl.constexpr(16)
MAX_LENGTH = 1 << _POSITION_BITS.value
END = tl.constexpr(1 << (32 + _POSITION_BITS.value))  # above every key; the key of what is no candidate


class Bracket(NamedTuple):
    """Thresholds low < high, int64, and how many keys lie below either, int32: at most k, and at least k."""

    low: tl.tensor
    high: tl.tensor
    below_low: tl.tensor
    below_high: tl.tensor


def check_length(length: int) -> None:
    """Refuses sequences whose positions a key does not hold."""
    if length > MAX_LENGTH:
        raise ValueError(
            f"expected sequences of at most {MAX_LENGTH} tokens, received {length}; "
            'use backend="reference" for longer ones'
        )


@triton.jit
def keys_of(order, position, is_candidate):
    """Distinct int64 keys that rise with the order, integers below 2^32, then with the position; END where there is
    no candidate."""
    return tl.where(is_candidate, first_key(order) | position, END)


@triton.jit
def first_key(order):
    """The least key of that order."""
    return order.to(tl.int64) << _POSITION_BITS


@triton.jit
def order_of(key):
    """The order that a key was made of."""
    return key >> _POSITION_BITS


@triton.jit
def start(k, num_keys, least, end):
    """The bracket of k among num_keys keys in [least, end)."""
    is_all = k == num_keys
    return Bracket(
        tl.where(is_all, end, least).to(tl.int64),
        tl.full((), 1, tl.int64) + end,  # above ``end``, which is the threshold where all are asked for
        tl.where(is_all, num_keys, 0),
        num_keys,
    )


@triton.jit
def is_found(bracket, k):
    """Whether the bracket's low is a threshold that is sought."""
    return bracket.below_low == k


@triton.jit
def interpolated(bracket, k):
    """How far into the bracket, of 1, its threshold lies if keys are uniform.

    It needs a third of the rounds that halving does. Any share will do, so the division may be an approximate one.
    """
    above = (k - bracket.below_low).to(tl.float32) + 0.5
    return above / (bracket.below_high - bracket.below_low + 1).to(tl.float32)


@triton.jit
def probe(bracket, share):
    """Where to count next: so far into the bracket, between its ends."""
    size = bracket.high - bracket.low
    step = (size.to(tl.float32) * share).to(tl.int64)
    return bracket.low + tl.minimum(tl.maximum(step, 1), size - 1)


@triton.jit
def narrow(bracket, k, threshold, below):
    """The bracket with the probed threshold, that has so many keys below it, as one of its ends.

    One that is found stays so.
    """
    is_low = below <= k
    return Bracket(
        tl.where(is_low, threshold, bracket.low),
        tl.where(is_low, bracket.high, threshold),
        tl.where(is_low, below, bracket.below_low),
        tl.where(is_low, bracket.below_high, below),
    )
