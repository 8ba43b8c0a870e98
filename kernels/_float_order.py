"""Float32 numbers as integers in the same order, so that a search can halve what lies between two of them."""

import triton
import triton.language as tl


@triton.jit
def order(x):
    """int32 that orders as float32 does; above infinity for a positive NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def value(order):
    """The float32 of that order."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def distance(low, high):
    """int64 by which the order high lies above low, which may be twice as far as an int32 counts."""
    return high.to(tl.int64) - low
