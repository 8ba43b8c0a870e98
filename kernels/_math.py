"""Elementary functions inside a kernel, to relative accuracy where the hardware's are not, and in the interpreter."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from fastmask._memoised import memoised

_LN2 = tl.constexpr(0.6931471805599453)
_LN2_HIGH = tl.constexpr(0.693145751953125)  # 16 bits: times an integer below 2^8 it is exact
_LN2_LOW = tl.constexpr(1.4286068203094172e-06)
_LOG2E = tl.constexpr(1.4426950408889634)
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)

_INTERPRETS = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def exp2(x):
    """2**x, 0 below the normal numbers: tl.exp2 spends three instructions on those at every element."""
    return tl.exp2(x) if _INTERPRETS else libdevice.exp2(x)


@memoised
def over_temperature(temperature: float) -> float:
    """log2(e) / T: what a difference of logits is multiplied by before exp2.

    It stays finite, infinity times the maximum's 0 being NaN, and above 0, for the sake of -inf.
    """
    limits = torch.finfo(torch.float32)
    return max(limits.tiny, min(math.log2(math.e) / temperature, limits.max))


@triton.jit
def exp(x):
    """exp, likewise; x log2(e) rounds, so that the result is off by up to abs(x) 2^-24 of itself."""
    return exp2(x * _LOG2E)


@triton.jit
def exp_from(x, origin):
    """exp(x - origin) in one operation less, times what is the same for all x: exp(+-r), r below abs(origin) 2^-24.

    From 2^30 on, where that would overflow, the next number is 64 or more away: any base does, and 2 leaves r at 0.
    """
    scale = tl.where(tl.abs(origin) < 2.0**30, _LOG2E, 1.0)
    return exp2(_fused(x, scale, origin * scale))


class Line(NamedTuple):
    """(x - origin) factor as a kernel forms it in one operation, x slope - offset: less ``rest``, whatever x is."""

    slope: tl.tensor
    offset: tl.tensor
    rest: tl.tensor


@triton.jit
def line(origin, factor):
    """(x - origin) factor of x <= origin, as exponents of 2.

    From 2^31 on, where the offset may overflow, the next number is 2^7 or more away, and weighs 0. There a power of
    two is as good a factor, and leaves the offset exact.
    """
    exponent = (origin.to(tl.int32, bitcast=True) >> 23) & 0xFF
    power = (tl.minimum(285 - exponent, 254) << 23).to(tl.float32, bitcast=True)  # origin times it: from 2^31 to 2^32
    slope = tl.where(tl.abs(origin * factor) < 2.0**31, factor, power).to(tl.float32)
    offset = origin * slope
    return Line(slope, offset, _fused(origin, slope, offset))


@triton.jit
def exp2_at(x, line, BY_POLYNOMIAL: tl.constexpr = False):
    """2 to the x-th number of a line, times 2^rest. BY_POLYNOMIAL: of a vector, every fourth so."""
    exponent = _fused(x, line.slope, line.offset)
    if BY_POLYNOMIAL:
        N: tl.constexpr = x.shape[0]
        even, odd = tl.split(tl.reshape(exponent, (N // 4, 2, 2)))
        first, third = tl.split(even)
        even = tl.join(exp2_by_polynomial(first), exp2(third))
        return tl.reshape(tl.join(even, exp2(odd)), (N,))
    else:
        return exp2(exponent)


@triton.jit
def exp2_by_polynomial(x):
    """2**x to 1e-7 of itself for x <= 127, 0 below -127 and of NaN, without the unit for exponentials: 2^whole times
    a polynomial on [-1/2, 1/2], least in relative error."""
    x = tl.maximum(x, -127.0)
    shifted = x + 12582912.0  # 1.5 2^23: its last bits are the whole part
    rest = x - (shifted - 12582912.0)
    power = rest * 0.00015345810970757157 + 0.0013399930903688073
    power = power * rest + 0.009618489071726799
    power = power * rest + 0.05550328642129898
    power = power * rest + 0.24022646248340607
    power = power * rest + 0.6931471824645996
    power = power * rest + 1.0
    bits = power.to(tl.int32, bitcast=True) + (shifted.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _fused(x, slope, offset):
    """x slope - offset, rounded once."""
    if _INTERPRETS:  # its tl.fma rounds the product too
        return (x.to(tl.float64) * slope - offset).to(tl.float32)
    else:
        return tl.fma(x, slope, -offset)


@triton.jit
def over_exp_from(origin):
    """What makes of a sum of exp_from(x, origin) one of exp(x - origin), to relative accuracy."""
    scale = tl.where(tl.abs(origin) < 2.0**30, _LOG2E, 1.0)
    return exp2(_fused(-origin, scale, -origin * scale))


@triton.jit
def exp_exactly(x):
    """exp of x <= 0 to relative accuracy: a power of two times the exp of less than .35."""
    whole = tl.floor(x * _LOG2E + 0.5)
    rest = x - whole * _LN2_HIGH - whole * _LN2_LOW
    return tl.where(x < -126.0, 0.0, exp(rest) * exp2(whole))


@triton.jit
def log(x):
    """log of a positive normal float32, within two units in the last place; NaN of NaN and infinity.

    The hardware's own is off by 2^-22 absolute. x = 2^e m with m in [sqrt(1/2), sqrt(2)).
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    mantissa = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    return exponent.to(tl.float32) * _LN2 + log1p(mantissa - 1.0) + (x - x)


@triton.jit
def log1p(r):
    """log(1 + r) for r in [-.3, .5], to relative accuracy: 2 artanh(s) by its series, s = r / (2 + r)."""
    s = tl.div_rn(r, 2.0 + r)
    square = s * s
    series = square * (1.0 / 11.0) + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    return 2.0 * s + 2.0 * s * square * series


@triton.jit
def tanh(x):
    """tanh to relative accuracy: Lambert's continued fraction near 0, exponentials further out."""
    square = x * x
    above = 3465.0 + square * (189.0 + square)
    below = 10395.0 + square * (4725.0 + square * (210.0 + square))
    near = x - x * square * (above / below)
    size = tl.abs(x)
    far = 1.0 - 2.0 / (exp(2.0 * size) + 1.0)
    return tl.where(size < 1.0, near, tl.where(x < 0.0, -far, far))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in the dtype of the logits, to nearest, ties to even; the interpreter would truncate to bfloat16."""
    if _INTERPRETS and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)
