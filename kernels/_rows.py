"""Rows of logits as a kernel reads them: 16 bytes at a time, wherever a row begins and whatever V is."""

import triton
import triton.language as tl
from torch import Tensor

_TWO_LEAST = tl.constexpr(-8323200)  # -inf and -inf in bfloat16


@triton.jit
def row_start(row, N, lead, stride_b, stride_n):
    """Flat index of a row's first element, counted from a pointer aligned to 16 bytes."""
    sequence = (row // N).to(tl.int64)
    position = (row % N).to(tl.int64)
    return lead + sequence * stride_b + position * stride_n


@triton.jit
def body(start, V, VECTOR: tl.constexpr):
    """The part of a row that begins and ends at 16 bytes: first column, flat index of it, length.

    Everything else, fewer than VECTOR elements at either end, is the row's edges.
    """
    first = (start + VECTOR - 1) // VECTOR * VECTOR
    last = tl.maximum((start + V) // VECTOR * VECTOR, first)
    length = tl.multiple_of((last - first).to(tl.int32), VECTOR)
    return (first - start).to(tl.int32), tl.multiple_of(first, VECTOR), length


@triton.jit
def edges(V, body_column, body_length, VECTOR: tl.constexpr):
    """Columns before and after the body, and which of these 2 VECTOR lanes are columns at all."""
    return edges_of_lanes(tl.arange(0, 2 * VECTOR), V, body_column, body_length, VECTOR)


@triton.jit
def edges_of_lanes(lane, V, body_column, body_length, VECTOR: tl.constexpr):
    """Likewise, of at least as many lanes."""
    is_head = lane < VECTOR
    offs_v = tl.where(is_head, lane, body_column + body_length + lane - VECTOR)
    return offs_v, offs_v < tl.where(is_head, tl.minimum(body_column, V), V)


@triton.jit
def load_words(x_ptr, word, mask):
    """Words of two bfloat16, int32; -inf and -inf where masked. x_ptr: aligned to 16 bytes."""
    words_ptr = tl.multiple_of(x_ptr.to(tl.pointer_type(tl.int32), bitcast=True), 16)
    return tl.load(words_ptr + word, mask=mask, other=_TWO_LEAST)


@triton.jit
def halves(words):
    """Both halves of words of two bfloat16, float32.

    Either half takes one instruction, where a conversion of both takes three.
    """
    return (words << 16).to(tl.float32, bitcast=True), (words & -65536).to(tl.float32, bitcast=True)


@triton.jit
def without_excluded(
    z,
    offs_v,
    in_v,
    first,
    last,
    mask_id,
    forbidden_ptr,
    HAS_MASK_ID: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
):
    """The logits z at columns offs_v, all in [first, last): -inf at the mask's and at forbidden ones."""
    if HAS_MASK_ID:
        if (mask_id >= first) & (mask_id < last):  # a block without it spends nothing on it
            z = tl.where(offs_v == mask_id, -float("inf"), z)
    if HAS_FORBIDDEN:
        z = tl.where(tl.load(forbidden_ptr + offs_v, mask=in_v, other=0) != 0, -float("inf"), z)
    return z


def lead(x: Tensor) -> int:
    """Elements between the last address divisible by 16 bytes and the tensor."""
    return x.data_ptr() % 16 // x.element_size()
