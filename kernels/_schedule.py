"""Times and the named schedules at them, inside a kernel: the same numbers as the reference's."""

import triton
import triton.language as tl

from fastmask import _streams as streams
from fastmask.kernels import philox

_TIMES = tl.constexpr(streams.TIMES)
_STRATUM = tl.constexpr(streams.STRATUM)


@triton.jit
def drawn(seed, samples, global_batch_size):
    """t in [0, 1) of each global sample; stratified where there is a size of the global batch."""
    if global_batch_size is not None:
        offset = philox.uniform(philox.draw(seed, _STRATUM)[0])
        stratum = (samples % global_batch_size).to(tl.float32)
        time = offset + tl.div_rn(stratum, tl.full((), global_batch_size, tl.float32))
        time -= tl.floor(time)
    else:
        time = philox.uniform(philox.draw(seed, _TIMES, samples)[0])
    return time


@triton.jit
def _quarter_sine(x):
    """sin(pi x / 2) for x in [0, 1]: seven terms of its Taylor series, remainder 7e-10; the reference's own.

    The library's cosine keeps a table for huge arguments on the stack, and rounds unlike torch's.
    """
    square = x * x
    total = 5.692172921967926e-08 * square - 3.598843235212085e-06
    total = total * square + 1.6044118478735982e-04
    total = total * square - 4.6817541353186881e-03
    total = total * square + 7.9692626246167046e-02
    total = total * square - 0.64596409750624625
    total = total * square + 1.5707963267948966
    return total * x


@triton.jit
def ratio(time, SCHEDULE: tl.constexpr):
    """schedule(t), t in [0, 1]."""
    tl.static_assert(SCHEDULE == "linear" or SCHEDULE == "cosine")
    ratio = 1.0 - time
    if SCHEDULE == "cosine":
        ratio = _quarter_sine(ratio)
    return ratio


@triton.jit
def steepness(time, SCHEDULE: tl.constexpr):
    """abs(schedule'(t))."""
    steepness = tl.full((), 1.0, tl.float32)
    if SCHEDULE == "cosine":
        steepness = 1.5707963267948966 * _quarter_sine(time)
    return steepness
