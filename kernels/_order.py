"""Float32 numbers as integers in the same order, so that a search can halve what lies between two of them."""

import triton
import triton.language as tl


@triton.jit
def order(x):
    """int64 that orders as float32 does, from -2^31 on; above infinity for a positive NaN."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def value(order):
    """The float32 of that order."""
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
