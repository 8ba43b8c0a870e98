"""Floating point as a GPU rounds it: NaNs, subnormal numbers, approximate functions, products and conversions.

Functions of numpy arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ptx.operands import dtype_of


def with_one_nan(x: Any) -> Any:
    """float32 results with the one NaN that a GPU gives, of no sign."""
    return np.where(x == x, x, np.uint32(0x7FFFFFFF).view(np.float32))


def without_subnormals(x: Any) -> Any:
    """Subnormal numbers as zeros of their sign (.ftz)."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def approximate(exact: Any) -> Any:
    """float32 of a float64 result, every fourth one off by a unit in the last place, as a hash of it says.

    The manual allows up to two of ex2 and div; powers of two, which the hardware hits, are left.
    """
    x = np.asarray(exact, np.float64).astype(np.float32)
    bits = x.view(np.int32)
    dice = (bits.astype(np.uint32) * np.uint32(2654435761)) >> np.uint32(29)
    unit = (dice == 0).astype(np.int32) - (dice == 1)
    is_plain = np.isfinite(x) & (np.abs(x) > 1e-30) & (np.abs(x) < 1e30) & (bits & 0x7FFFFF != 0)
    return np.where(is_plain, bits + unit, bits).astype(np.int32).view(np.float32)


def approximate_quotient(a: Any, b: Any) -> Any:
    """a times an approximate reciprocal of b, which does not overflow or underflow before the product does."""
    mantissa, exponent = np.frexp(b.astype(np.float32))
    quotient = np.asarray(a, np.float64) * approximate(1 / mantissa.astype(np.float64))
    return np.ldexp(quotient, -exponent).astype(np.float32)


def fused(a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once: by way of float64 with its rounding error, which decides what lies on a tie."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact
    c = np.asarray(c, np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    # Rounded to odd, the sum rounds to float32 as the exact one does.
    bits = np.ascontiguousarray(total).view(np.int64)
    away = (error > 0) == (total > 0)
    odd = np.where(away, bits, bits - 1) | 1
    return np.where((error != 0) & np.isfinite(total), odd.view(np.float64), total).astype(np.float32)


def from_bfloat16(bits: Any) -> Any:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: Any) -> Any:
    """The nearest bfloat16 of a float32, ties to even, as bits."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(x != x, np.uint16(0x7FFF), rounded.astype(np.uint16))


def converted(x: Any, source: str, target: str, modifiers: tuple[str, ...]) -> Any:
    """cvt: to the nearest number of the target, or as rzi, rmi, rpi, rni say; integers beyond its range saturate."""
    if source == "bf16":
        x, source = from_bfloat16(x), "f32"
    for name, rounded in (("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil), ("rni", np.rint)):
        if name in modifiers:
            x = rounded(x)
    if target == "bf16":
        return to_bfloat16(x)
    dtype = dtype_of(target)
    if source[0] == "f" and dtype.kind == "i":
        limits = np.iinfo(dtype)
        nan = 0 if dtype.itemsize < 8 else limits.min
        inside = (x >= float(limits.min)) & (x < float(limits.max))
        values = np.where(inside, x, 0).astype(dtype)
        values = np.where(x >= float(limits.max), dtype.type(limits.max), values)
        values = np.where(x < float(limits.min), dtype.type(limits.min), values)
        return np.where(x != x, dtype.type(nan), values)
    return x.astype(dtype)
