"""The draws of ``fastmask/reference/philox.py``, bit for bit, where they are few and on a CPU.

There each of a hundred operations takes longer to be called than to run, and numpy calls them in a third of PyTorch's
time. Constants are arrays without dimensions: numpy converts a number at each call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import numpy as np
except ImportError:  # torch runs without it
    np = None  # type: ignore[assignment]

# From so many counters on PyTorch shares the work among its threads.
_MOST = 2**15

if np is not None:
    _ROUND_A, _ROUND_B = np.array(0xD2511F53, np.uint64), np.array(0xCD9E8D57, np.uint64)
    _WORD, _HALF = np.array(0xFFFFFFFF, np.uint64), np.array(32, np.uint64)
    _KEY_STEPS = np.arange(10, dtype=np.uint64)[:, None] * np.array([0x9E3779B9, 0xBB67AE85], np.uint64)
    _HIGH_UNIT, _LOW_UNIT = np.array(2.0**-32, np.float32), np.array(2.0**-64, np.float32)
    _ONE_HALF, _SIGN = np.array(0.5, np.float32), np.array(31, np.int32)


def takes(*tensors: Tensor) -> bool:
    """Whether readable tensors, which broadcast, are so few numbers that they are drawn, or transformed, here."""
    if np is None:
        return False
    shape = np.broadcast(*(x.numpy() for x in tensors))
    return bool(shape.ndim > 0 and 0 < shape.size <= _MOST)


def philox4x32(counter: tuple[Tensor | int, ...], seed: Tensor) -> tuple[Tensor, ...]:
    """Ten rounds of Philox on a counter of four tensors int64, or numbers, that broadcast: four words int64."""
    c0, c1, c2, c3 = (_words(c) & _WORD for c in counter)
    c0, c1, c2, c3, key_a, key_b = _before_the_last_round(c0, c1, c2, c3, seed)
    a, b = c0 * _ROUND_A, c2 * _ROUND_B
    c0, c2 = b >> _HALF ^ c1 ^ key_a, a >> _HALF ^ c3 ^ key_b
    return tuple(torch.from_numpy(c.view(np.int64)) for c in (c0, b & _WORD, c2, a & _WORD))


def exponentials(c0: Any, c1: Any, c2: Any, c3: Any, seed: Tensor) -> Any:
    """Of words 0 and 1 of a counter of four arrays uint64 below 2**32 that broadcast."""
    _, c1, c2, _, key_a, _ = _before_the_last_round(c0, c1, c2, c3, seed)
    b = c2 * _ROUND_B
    return _exponential(b >> _HALF ^ c1 ^ key_a, b)


def _before_the_last_round(c0: Any, c1: Any, c2: Any, c3: Any, seed: Tensor) -> tuple[Any, ...]:
    """Four words after nine rounds, and the keys of the tenth, of which not all need each product."""
    multiply, xor, shift, cut = np.multiply, np.bitwise_xor, np.right_shift, np.bitwise_and
    key = int(seed.numpy())
    table = cut(np.array([key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF], np.uint64) + _KEY_STEPS, _WORD)
    keys = [(table[number, 0, ...], table[number, 1, ...]) for number in range(10)]
    for key_a, key_b in keys[:3]:
        a, b = multiply(c0, _ROUND_A), multiply(c2, _ROUND_B)
        c0, c2 = shift(b, _HALF) ^ xor(c1, key_a), shift(a, _HALF) ^ xor(c3, key_b)  # keys to what is small yet
        c1, c3 = cut(b, _WORD), cut(a, _WORD)
    for key_a, key_b in keys[3:9]:  # each word depends on all coordinates now, and nothing broadcasts
        a, b = multiply(c0, _ROUND_A), multiply(c2, _ROUND_B)
        shift(b, _HALF, c0)
        xor(c0, c1, c0)
        xor(c0, key_a, c0)
        shift(a, _HALF, c2)
        xor(c2, c3, c2)
        xor(c2, key_b, c2)
        c1, c3 = cut(b, _WORD, b), cut(a, _WORD, a)
    return c0, c1, c2, c3, *keys[9]


def exponential(high: Tensor, low: Tensor) -> Tensor:
    """E = -log1p(-v) of the 64-bit uniform v of two words."""
    return torch.from_numpy(_exponential(_words(high), _words(low)))


def _exponential(high: Any, low: Any) -> Any:
    """Of words in the low halves of arrays uint64."""
    words = np.empty((2, 2, *np.broadcast(high, low).shape), np.uint32)
    words[0, 0], words[1, 0] = high, low
    np.invert(words[:, 0], words[:, 1])
    units, rests = words.astype(np.float32)
    np.multiply(units, _HIGH_UNIT, units)
    np.add(rests, _ONE_HALF, rests)
    np.multiply(rests, _LOW_UNIT, rests)
    v, complement = np.add(units, rests, units)
    is_below = np.right_shift(np.subtract(v, _ONE_HALF).view(np.int32), _SIGN)  # all bits or none
    torch.from_numpy(np.negative(v, v)).log1p_()
    torch.from_numpy(complement).log_()
    # By bits, a fourth of the time that a choice by element takes.
    v, chosen = v.view(np.int32), complement.view(np.int32)
    np.bitwise_xor(v, chosen, v)
    np.bitwise_and(v, is_below, v)
    np.bitwise_xor(chosen, v, chosen)
    return np.negative(complement, complement)


def _words(x: Tensor | int) -> Any:
    """Numbers as unsigned ones, of one dimension at least: numpy has no arrays of none as results."""
    if not isinstance(x, Tensor):
        return np.array([x & 0xFFFFFFFF], np.uint64)
    words = x.numpy().view(np.uint64)
    return words if words.ndim else words.reshape(1)
