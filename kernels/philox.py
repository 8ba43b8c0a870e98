"""Philox4x32-10 inside a kernel: the same counters, words and numbers as ``fastmask/reference/philox.py``.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Nothing is
read or written: a draw is a function of its counter, so a kernel recomputes numbers rather than stores them.
"""

import triton
import triton.language as tl

from fastmask import _streams as streams
from fastmask.kernels import _math

_STEPS = tl.constexpr(1 << streams.STEP_BITS)  # of one stream


@triton.jit
def draw(seed, stream: tl.constexpr, sample=0, position=0, element=0, step=0):
    """Four uint32 words for each counter of a stream; the coordinates are integers that broadcast.

    seed: int64 scalar. Scalars stay scalars: the first rounds are then shared by a whole block.
    """
    # Philox4x32 is selected by the counter's type; wider coordinates count modulo 2**32, as in the reference.
    zero = tl.full((), 0, tl.int64)
    c0 = (zero + element).to(tl.uint32)
    c1 = (zero + position).to(tl.uint32)
    c2 = (zero + sample).to(tl.uint32)
    c3 = (zero + (_STEPS * stream + step)).to(tl.uint32)
    return tl.philox_impl(c0, c1, c2, c3, seed.to(tl.uint32), (seed >> 32).to(tl.uint32))


@triton.jit
def uniform(word):
    """A word as a float32 in [0, 1): its 24 leading bits."""
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def below(n, high, low):
    """An integer uniform on [0, n), n <= 2**31, int64: the leading bits of n times a 64-bit fraction."""
    n = tl.full((), n, tl.uint64)
    return ((high.to(tl.uint64) * n + ((low.to(tl.uint64) * n) >> 32)) >> 32).to(tl.int64)


@triton.jit
def _unit_interval(high, low):
    # The middle of a 2**-64 cell, so that neither 0 nor 1 occurs.
    return high.to(tl.float32) * 2.3283064365386963e-10 + (low.to(tl.float32) + 0.5) * 5.421010862427522e-20


@triton.jit
def exponential(high, low):
    """E = -log(1 - v) ~ Exponential(1), float32, from the 64-bit uniform v of two words, tails as deep as they."""
    v = _unit_interval(high, low)
    ones = tl.full((), 0xFFFFFFFF, tl.uint32)
    complement = _unit_interval(high ^ ones, low ^ ones)
    return tl.where(v < 0.25, -_math.log1p(tl.maximum(-v, -0.25)), -_math.log(complement))
