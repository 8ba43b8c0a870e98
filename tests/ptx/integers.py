"""Integers as PTX means them: shifts, quotients, products' upper halves, bytes and fields.

Functions of numpy arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def shifted_left(a: Any, amount: Any) -> Any:
    width = a.dtype.itemsize * 8
    amount = np.asarray(amount, np.uint32)
    return np.where(amount < width, a << np.minimum(amount, width - 1).astype(a.dtype), a.dtype.type(0))


def shifted_right(a: Any, amount: Any) -> Any:
    """Signs fill what a signed number leaves, zeros an unsigned one."""
    width = a.dtype.itemsize * 8
    amount = np.asarray(amount, np.uint32)
    shifted = a >> np.minimum(amount, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(amount < width, shifted, a.dtype.type(0))


def integer_quotient(a: Any, b: Any) -> Any:
    """Integer division toward zero, which C and PTX mean."""
    if a.dtype.kind == "u":
        return a // b
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a))


def high_half(a: Any, b: Any) -> Any:
    """The upper half of a product."""
    if a.dtype.itemsize == 4:
        wide = np.dtype(f"{a.dtype.kind}8")
        return (a.astype(wide) * np.asarray(b).astype(wide) >> wide.type(32)).astype(a.dtype)
    a, b = np.broadcast_arrays(a, b)
    products = [int(x) * int(y) >> 64 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    return np.array(products, dtype=object).astype(a.dtype)


def permuted(a: Any, b: Any, selector: Any) -> Any:
    """prmt.b32, its default mode: each nibble of the selector picks a byte of b:a, or, with its top bit, its sign."""
    pool = a.astype(np.uint64) | (np.asarray(b).astype(np.uint64) << np.uint64(32))
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (pool >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(nibble & np.uint32(8), sign, byte)
        out = out | (byte.astype(np.uint32) << np.uint32(8 * i))
    return out


def bit_field(a: Any, position: Any, length: Any) -> Any:
    """bfe: so many bits from a position on, with the sign of the last; none give 0."""
    width = np.uint32(8 * a.dtype.itemsize)
    position, length = position & np.uint32(255), length & np.uint32(255)
    length = np.minimum(length, width - np.minimum(position, width))
    raised = shifted_left(a, width - position - length)
    return np.where(length == 0, a.dtype.type(0), shifted_right(raised, width - length))
