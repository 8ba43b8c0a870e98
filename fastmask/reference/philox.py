"""Philox4x32-10, the counter-based generator behind every random number of fastmask.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011);
constants and known answers from its companion library Random123. Words are unsigned 32-bit values
held in int64 tensors, since PyTorch has few operations on uint32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastmask._devices import is_readable
from fastmask._streams import STEP_BITS
from fastmask.reference import _philox_in_numpy

_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor, k0: Tensor, k1: Tensor) -> Words:
    """Ten rounds of Philox on counter (c0, c1, c2, c3) and key (k0, k1): four words, broadcast."""
    counters = torch.broadcast_tensors(c0, c1, c2, c3)
    # In place: on a CPU new memory for each result takes longer than the arithmetic.
    c0, c1, c2, c3 = (c.clone(memory_format=torch.contiguous_format) for c in counters)
    high = torch.empty_like(c0)
    for round_a, round_b in zip(_round_keys(k0, _KEY_A), _round_keys(k1, _KEY_B), strict=True):
        # Signed products wrap, but their 64 bits are those of the unsigned ones. The high half counts at
        # once, the low half (c1, c3) only in the next round, where it is cut to 32 bits.
        product_a, product_b = c0.mul_(_ROUND_A), c2.mul_(_ROUND_B)
        c0 = c1.bitwise_xor_(torch.bitwise_right_shift(product_b, 32, out=high))
        c0 = c0.bitwise_xor_(round_a).bitwise_and_(_WORD)
        c2 = c3.bitwise_xor_(torch.bitwise_right_shift(product_a, 32, out=high))
        c2 = c2.bitwise_xor_(round_b).bitwise_and_(_WORD)
        c1, c3 = product_b, product_a
    return c0, c1.bitwise_and_(_WORD), c2, c3.bitwise_and_(_WORD)


def _round_keys(key: Tensor, increment: int) -> tuple[Tensor, ...]:
    return ((key + increment * torch.arange(10, device=key.device)) & _WORD).unbind()


def draw(
    seed: Tensor,
    stream: int,
    step: int = 0,
    *,
    sample: Tensor | int = 0,
    position: Tensor | int = 0,
    element: Tensor | int = 0,
) -> Words:
    """Four words for each counter of a stream (see ``fastmask/_streams.py``); shapes broadcast.

    Args:
        seed: [] int64, the key.
        stream, step: which stream, and the step within it (below 2**24).
        sample, position, element: int64 tensors or ints, the counter's coordinates.
    """
    counter = element, position, sample, (stream << STEP_BITS) | step
    tensors = [c for c in counter if isinstance(c, Tensor)]
    if is_readable(seed) and not tensors:
        return tuple(seed.new_full((), word) for word in _of_numbers(counter, int(seed)))  # type: ignore[return-value]
    if all(map(is_readable, (seed, *tensors))) and _philox_in_numpy.takes(*tensors):
        return _philox_in_numpy.philox4x32(counter, seed)  # type: ignore[return-value]
    # Numbers are filled in on the device: copying them there would wait for it.
    element, position, sample, c3 = ((c if isinstance(c, Tensor) else seed.new_full((), c)) & _WORD for c in counter)
    return philox4x32(element, position, sample, c3, seed & _WORD, (seed >> 32) & _WORD)


def _of_numbers(counter: tuple[Any, ...], seed: int) -> tuple[int, ...]:
    """The words of one counter: as above, without a hundred operations on tensors of one element."""
    c0, c1, c2, c3 = (c & _WORD for c in counter)
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        a, b = c0 * _ROUND_A, c2 * _ROUND_B
        c0, c1, c2, c3 = b >> 32 ^ c1 ^ k0, b & _WORD, a >> 32 ^ c3 ^ k1, a & _WORD
        k0, k1 = k0 + _KEY_A & _WORD, k1 + _KEY_B & _WORD
    return c0, c1, c2, c3


def uniform(word: Tensor) -> Tensor:
    """A word as a float32 in [0, 1): its 24 leading bits."""
    return (word >> 8).to(torch.float32) * 2.0**-24


def _unit_interval(high: Tensor, low: Tensor) -> Tensor:
    # The middle of a 2**-64 cell, so that neither 0 nor 1 occurs.
    return high.to(torch.float32) * 2.0**-32 + (low.to(torch.float32) + 0.5) * 2.0**-64


def exponential(high: Tensor, low: Tensor) -> Tensor:
    """E = -log1p(-v) ~ Exponential(1), float32, from the 64-bit uniform v of two words.

    Above one half, 1 - v is formed from the complemented bits: both tails are as deep as 64 bits allow.
    """
    if is_readable(high) and is_readable(low) and _philox_in_numpy.takes(high, low):
        return _philox_in_numpy.exponential(high, low)
    v = _unit_interval(high, low)
    complement = _unit_interval(high ^ _WORD, low ^ _WORD)
    return torch.where(v < 0.5, -torch.log1p(-v), -torch.log(complement))


def gumbel(high: Tensor, low: Tensor) -> Tensor:
    """G = -log E ~ Gumbel(0, 1), float32, from the 64-bit uniform of two words."""
    return -torch.log(exponential(high, low))


def below(n: int | Tensor, high: Tensor, low: Tensor) -> Tensor:
    """An integer uniform on [0, n), n <= 2**31: the leading bits of n times a 64-bit fraction."""
    return (low * n).bitwise_right_shift_(32).add_(high * n).bitwise_right_shift_(32)
