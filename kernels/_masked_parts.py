"""The parts of the masked set of a row: where each ends, as a rank, and the search for the thresholds there.

Three brackets shrink together, one pass over the keys a round for all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastmask import _streams as streams
from fastmask.kernels import _smallest_keys as smallest_keys
from fastmask.kernels import philox

_COINS = tl.constexpr(streams.COINS)

# Three counts, each at most 65536, fit an int64.
_COUNT_BITS = tl.constexpr(20)
_COUNT_MASK = tl.constexpr((1 << 20) - 1)


class Parts(NamedTuple):
    """Where the parts of the masked set end, in the order of its keys: first those that keep their token, then those
    that get a random one, then those that get the mask. An end is a rank, and found as a threshold of keys.

    kept, random: None where no parts do. masked: of a complement, where it begins.
    """

    kept: tl.tensor | None
    random: tl.tensor | None
    masked: tl.tensor


@triton.jit
def ends_of_parts(seed, count, keep_prob, random_prob, random_prob_after_keep):
    """The ranks, int32, at which the parts of ``count`` masked positions end."""
    kept = None
    random = None
    if keep_prob is not None:
        keep_word, random_word, _, _ = philox.draw(seed, _COINS)
        keep_coin = keep_word < 2147483648
        kept = tl.where(keep_coin, tl.ceil(count.to(tl.float32) * keep_prob).to(tl.int32), 0)
        remaining = count - kept
        share = tl.where(keep_coin, random_prob_after_keep, random_prob)
        num_random = tl.minimum(tl.ceil(remaining.to(tl.float32) * share).to(tl.int32), remaining)
        random = kept + tl.where(random_word < 2147483648, num_random, 0)
    return Parts(kept, random, count)


@triton.jit
def of_complement(ends, first):
    """The ends of a complement's parts, which begins at the rank ``first``."""
    kept = None
    random = None
    if ends.kept is not None:
        kept = ends.kept + first
        random = ends.random + first
    return Parts(kept, random, first)


@triton.jit
def start(ends, num_keys):
    """The brackets of all ends."""
    kept = None
    random = None
    if ends.kept is not None:
        kept = smallest_keys.start(ends.kept, num_keys, 0, smallest_keys.END)
        random = smallest_keys.start(ends.random, num_keys, 0, smallest_keys.END)
    return Parts(kept, random, smallest_keys.start(ends.masked, num_keys, 0, smallest_keys.END))


@triton.jit
def are_found(brackets, ends):
    """Whether all of them are."""
    found = smallest_keys.is_found(brackets.masked, ends.masked)
    if ends.kept is not None:
        found = found & smallest_keys.is_found(brackets.kept, ends.kept)
        found = found & smallest_keys.is_found(brackets.random, ends.random)
    return found


@triton.jit
def _probe(bracket, end):
    """A probe in one bracket; where it is found its low, without which AMD's compiler spills scalar registers."""
    probe = smallest_keys.probe(bracket, smallest_keys.interpolated(bracket, end))
    return tl.where(smallest_keys.is_found(bracket, end), bracket.low, probe)


@triton.jit
def probes(brackets, ends):
    """A probe in each bracket; keys are uniform."""
    kept = None
    random = None
    if ends.kept is not None:
        kept = _probe(brackets.kept, ends.kept)
        random = _probe(brackets.random, ends.random)
    return Parts(kept, random, _probe(brackets.masked, ends.masked))


@triton.jit
def count_below(key, thresholds):
    """How many keys lie below each threshold: three counts share an int64, and so one reduction."""
    counts = (key < thresholds.masked).to(tl.int32)
    if thresholds.kept is not None:
        counts = counts.to(tl.int64)
        counts += (key < thresholds.random).to(tl.int64) << _COUNT_BITS
        counts += (key < thresholds.kept).to(tl.int64) << (2 * _COUNT_BITS)
    return tl.sum(counts)


@triton.jit
def narrow(brackets, ends, thresholds, counts):
    """All brackets, after a count at their probes."""
    kept = None
    random = None
    if ends.kept is not None:
        below = (counts >> (2 * _COUNT_BITS)).to(tl.int32)
        kept = smallest_keys.narrow(brackets.kept, ends.kept, thresholds.kept, below)
        below = ((counts >> _COUNT_BITS) & _COUNT_MASK).to(tl.int32)
        random = smallest_keys.narrow(brackets.random, ends.random, thresholds.random, below)
    below = (counts & _COUNT_MASK).to(tl.int32)
    return Parts(kept, random, smallest_keys.narrow(brackets.masked, ends.masked, thresholds.masked, below))
