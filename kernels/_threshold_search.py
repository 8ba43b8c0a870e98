"""The search for a threshold among logits in registers, and where a sample of a row says that the row's own lies.

The mathematics is in ``docs/nucleus.md``. A bound is held as the order of a float32, see ``_float_order``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

from fastmask.kernels import _float_order as float_order
from fastmask.kernels import _math

_LOG2E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-2139095040)  # the order of -FLT_MAX
BEYOND = tl.constexpr(0x7F800001)  # above the order of infinity

# By how much the sample's weight may be wrong at either end of the bracket, which may miss: its standard deviations,
# and logits of it, which count where few have most of the weight.
SIGMAS, GRANULES = tl.constexpr(2.0), tl.constexpr(2.0)


class Logits(NamedTuple):
    """Logits among which a threshold is searched, and what they count for.

    z: [lanes, n], -inf where there is none. weight: what each counts for; None for one.
    edges, edge_weight: more of them, [lanes]; or None. base: the weight of what lies above them all;
    None for none.
    """

    z: tl.tensor
    weight: tl.tensor | None
    edges: tl.tensor | None
    edge_weight: tl.tensor | None
    base: tl.tensor | None


class Bracket(NamedTuple):
    """The orders low and high, between which a threshold lies, and the weight of what is not below each of them."""

    low: tl.tensor
    above_low: tl.tensor
    high: tl.tensor
    above_high: tl.tensor


class Law(NamedTuple):
    """What logits count for in the nucleus: their probability relative to that of a logit top.

    factor: log2(e) / T, of probabilities at a temperature; None for 1.
    """

    top: tl.tensor
    factor: tl.tensor | None


class SampleError(NamedTuple):
    """What the error of a sample's weights depends on, see ``error``.

    anchor: the weight above one bound, which is known. variance: of one logit's being sampled or not, 1; less where
    what lies above is a large part of the row. law: None where logits only count.
    """

    anchor: tl.tensor
    variance: tl.tensor
    law: Law | None


@triton.jit
def weights(z, law):
    """What logits count for, or for all of them so many times as much, see ``exp_from``; None where they only
    count."""
    if law is None:
        return None
    elif law.factor is None:
        return _math.exp_from(z, law.top)
    else:
        return _math.exp2((z - law.top) * law.factor)


@triton.jit
def distance(gap, law):
    """How far two logits are apart whose logarithms of weights are."""
    factor = None if law is None else law.factor
    return gap if factor is None else 1.0 / factor * (gap * _LOG2E)


@triton.jit
def weighed(z, law, base=None, edges=None):
    """Logits and their weights."""
    return Logits(z, weights(z, law), edges, None if edges is None else weights(edges, law), base)


@triton.jit
def finite(top):
    """The largest logit, or 0 where there is none, or a row has no law."""
    return tl.where(tl.abs(top) < float("inf"), top, 0.0)


@triton.jit
def counted(stays, weight):
    """The weight of what stays, or one for each where logits only count."""
    return stays.to(tl.int32) if weight is None else tl.where(stays, weight, 0.0)


@triton.jit
def above(logits, bound):
    """The weight, or the number, of what is not below a bound, float32."""
    inside = counted(logits.z >= bound, logits.weight)
    if logits.edges is None:
        number = tl.sum(inside).to(tl.float32)
    else:
        of_lanes = tl.sum(inside, 1)
        number = tl.sum(of_lanes + counted(logits.edges >= bound, logits.edge_weight)).to(tl.float32)
    return number if logits.base is None else logits.base + number


@triton.jit
def total(logits):
    """The weight of all of them."""
    number = tl.sum(logits.weight) if logits.base is None else logits.base + tl.sum(logits.weight)
    return number if logits.edges is None else number + tl.sum(logits.edge_weight)


@triton.jit
def _least(z):
    """The least of z that is a logit; infinity where none is."""
    return tl.min(tl.where(z > -float("inf"), z, float("inf")))


@triton.jit
def ends(logits):
    """The bracket in which a search starts: from the lowest order to one above the highest. -inf is no logit."""
    least, largest = _least(logits.z), tl.max(logits.z)
    if logits.edges is not None:
        least = tl.minimum(least, _least(logits.edges))
        largest = tl.maximum(largest, tl.max(logits.edges))
    above_low = above(logits, least) if logits.weight is None else total(logits)
    high = tl.minimum(float_order.order(largest), BEYOND - 1) + 1  # of a NaN too
    above_high = tl.full((), 0.0, tl.float32)
    if logits.base is not None:
        above_high += logits.base
    return Bracket(float_order.order(least), above_low, high, above_high)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def search(logits, bracket, target, slack, SPACING: tl.constexpr, sample_error=None, sign=None, ceiling=None):
    """The bracket, narrowed until its low end is the threshold: there the weight reaches the target, and hardly more.

    The search ends where the weight is the target, or no more than ``slack`` lies between the two ends, or no number
    of the logits' dtype does. The low end stays where even all of the weight does not reach the target.

    Of a sample the weight counts with its error times the sign, 1 or -1; above the ceiling the error no longer grows.
    """
    low, above_low, high, above_high = bracket
    high = tl.where(above_low < target, low, high)
    turn = tl.full((), 0 if logits.weight is None else 1, tl.int32)
    while (float_order.distance(low, high) > SPACING) & (above_low - above_high > slack) & (above_low != target):
        # As if the weight fell exponentially between the two ends (a number's bits are about its logarithm); midway;
        # as if it were spread evenly; and half of all numbers on, which bounds the turns. Of 8192 normal logits the
        # 820 largest take ten turns, where the last two ways alone take twenty; half of them take ten, not eight.
        z_low, z_high = float_order.value(low), float_order.value(high)
        over, under = above_low - target, above_low - above_high
        if turn % 4 == 0:
            rest = tl.maximum(above_high, 0.5 * tl.minimum(target, 1.0))
            over = (_bits(above_low) - _bits(target)).to(tl.float32)
            under = (_bits(above_low) - _bits(rest)).to(tl.float32)
        share = tl.where(turn % 4 == 1, 0.5, over / under)
        probe = float_order.order(z_low + (z_high - z_low) * share)
        probe = tl.where(turn % 4 == 3, low + (float_order.distance(low, high) // 2).to(tl.int32), probe)
        probe = tl.minimum(tl.maximum(probe, low + 1), high - 1)
        turn += 1
        z_probe = float_order.value(probe)
        above_probe = above(logits, z_probe)
        if sign is not None:
            above_probe += sign * error(above_probe, tl.minimum(z_probe, ceiling), sample_error)
        is_low = above_probe >= target
        low = tl.where(is_low, probe, low)
        above_low = tl.where(is_low, above_probe, above_low)
        high = tl.where(is_low, high, probe)
        above_high = tl.where(is_low, above_high, above_probe)
    return Bracket(low, above_low, high, above_high)


@triton.jit
def error(above_bound, bound, sample_error):
    """By how much a sample may misjudge the weight above a bound, where that above another, the anchor, is known:
    2 sqrt(variance |above - anchor| w) + 2 w, of logits of the bound's weight w.

    What lies between the two varies as a sum of independent logits, each sampled or not.
    """
    granule = 1.0 if sample_error.law is None else weights(bound, sample_error.law)
    spread = tl.abs(above_bound - sample_error.anchor) * sample_error.variance * granule
    return tl.sqrt(spread) * SIGMAS + granule * GRANULES


@triton.jit
def probable(sample, sample_error, middle, target, least, most, SPACING: tl.constexpr):
    """The orders between which a row's threshold probably lies, by a sample of it; in units of the sample's weight.

    middle: the order above which the anchor lies. least, most: the ends where the sample does not tell.
    """
    lowest, above_lowest, highest, above_highest = ends(sample)
    # Less its error the weight still reaches the target at the lower end; with its error no longer at the upper one.
    above_lowest -= error(above_lowest, float_order.value(lowest), sample_error)
    middle = tl.minimum(middle, highest)
    z_middle = float_order.value(middle)
    above_middle = sample_error.anchor - error(sample_error.anchor, z_middle, sample_error)
    is_low = above_middle >= target
    start = Bracket(
        tl.where(is_low, middle, lowest),
        tl.where(is_low, above_middle, above_lowest),
        tl.where(is_low, highest, middle),
        tl.where(is_low, above_highest, above_middle),
    )
    slack = 0.5 * error(target, z_middle, sample_error)
    lower = search(sample, start, target, slack, SPACING, sample_error, -1.0, float("inf"))
    z_low = float_order.value(lower.low)
    above_low = above(sample, z_low)
    above_low += error(above_low, z_low, sample_error)
    start = Bracket(lower.low, above_low, highest, above_highest)
    slack = 0.5 * error(target, z_low, sample_error)
    ceiling = z_low + distance(2.0, sample_error.law)
    upper = search(sample, start, target, slack, SPACING, sample_error, 1.0, ceiling)
    is_most = above_highest + error(above_highest, z_low, sample_error) >= target
    return tl.where(lower.above_low < target, least, lower.low), tl.where(is_most, most, upper.high)
