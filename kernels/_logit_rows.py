"""Rows of logits as a kernel reads them: 16 bytes at a time, wherever a row begins and whatever V is.

A kernel counts elements from the last boundary of 16 bytes at or before the tensor: ``x_ptr - offset_x``.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

VECTOR_BYTES = 16
_TWO_LEAST = tl.constexpr(-8323200)  # -inf and -inf in bfloat16


class LogitRows(NamedTuple):
    """Which rows of logits a sampler's kernels read, and which ids never count there.

    logits: [M, V] of compact rows, else [B N, V]; of one last stride 1. row_indices: [M] int64, a row's place among
    num_places positions (None: any); outside of these is no row. mask_id: in [0, V), None for no
    mask. forbidden: [V] bool or None.
    """

    logits: Tensor
    row_indices: Tensor
    is_compact: bool
    mask_id: int | None = None
    forbidden: Tensor | None = None
    num_places: int | None = None

    @property
    def num_rows(self) -> int:
        """M."""
        return self.row_indices.shape[0]

    @property
    def num_ids(self) -> int:
        """V."""
        return self.logits.shape[-1]

    @property
    def vector(self) -> int:
        """Logits in 16 bytes."""
        return vector(self.logits)

    def arguments(self) -> dict[str, object]:
        """What every kernel over these rows is launched with."""
        return {
            "x_ptr": self.logits,
            "offset_x": offset_from_boundary(self.logits),
            "stride_x": self.logits.stride(0),
            "row_indices_ptr": self.row_indices,
            "num_places": self.num_places,
            "forbidden_ptr": self.forbidden,
            "V": self.num_ids,
            "mask_id": self.mask_id,
            "IS_COMPACT": self.is_compact,
            "VECTOR": self.vector,
        }


def vector(x: Tensor) -> int:
    """Elements in 16 bytes."""
    return VECTOR_BYTES // x.element_size()


def offset_from_boundary(x: Tensor) -> int:
    """Elements between the last address divisible by 16 bytes and the tensor."""
    return x.data_ptr() % VECTOR_BYTES // x.element_size()


class Excluded(NamedTuple):
    """Which ids never count, inside a kernel: the mask's, and those where a table [V] is not 0. None for none."""

    mask_id: tl.tensor | None
    forbidden_ptr: tl.tensor | None


class Body(NamedTuple):
    """The part of a row that begins and ends at 16 bytes: its first column, that one's flat index, its length."""

    column: tl.tensor
    start: tl.tensor
    length: tl.tensor


@triton.jit
def is_stray(flat, num_places):
    """Whether a listed position is none: -1, or outside of the positions there are (None: any)."""
    if num_places is not None:
        return (flat < 0) | (flat >= num_places)
    return flat < 0


@triton.jit
def row_start(row, N, offset_x, stride_b, stride_n):
    """Flat index of a row's first element, counted from a pointer aligned to 16 bytes."""
    sequence = (row // N).to(tl.int64)
    position = (row % N).to(tl.int64)
    return offset_x + sequence * stride_b + position * stride_n


@triton.jit
def body(start, V, VECTOR: tl.constexpr):
    """The body of a row that begins at a flat index.

    Everything else, fewer than VECTOR elements at either end, is the row's edges.
    """
    first = (start + VECTOR - 1) & -VECTOR
    last = tl.maximum((start + V) & -VECTOR, first)
    length = tl.multiple_of((last - first).to(tl.int32), VECTOR)
    return Body((first - start).to(tl.int32), tl.multiple_of(first, VECTOR), length)


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
def _split(z):
    """[lanes, n] as two [lanes, n / 2] of the same threads."""
    return tl.split(tl.reshape(z, (z.shape[0], z.shape[1] // 2, 2)))


@triton.jit
def columns(z, VECTOR: tl.constexpr):
    """The columns of a block [lanes, VECTOR], each with its lanes, in the threads that hold them."""
    if VECTOR == 2:
        return tl.split(z)
    elif VECTOR == 4:
        even, odd = _split(z)
        a, b = tl.split(even)
        c, d = tl.split(odd)
        return a, b, c, d
    else:
        even, odd = _split(z)
        a, b = _split(even)
        c, d = _split(odd)
        a, e = tl.split(a)
        b, f = tl.split(b)
        c, g = tl.split(c)
        d, h = tl.split(d)
        return a, b, c, d, e, f, g, h


@triton.jit
def without_excluded(z, offs_v, in_v, first, last, excluded):
    """The logits z at columns offs_v, all in [first, last): -inf at the mask's and at forbidden ones."""
    if excluded.mask_id is not None:
        if (excluded.mask_id >= first) & (excluded.mask_id < last):  # a block without it spends nothing on it
            z = tl.where(offs_v == excluded.mask_id, -float("inf"), z)
    if excluded.forbidden_ptr is not None:
        is_forbidden = tl.load(excluded.forbidden_ptr + offs_v, mask=in_v, other=0) != 0
        z = tl.where(is_forbidden, -float("inf"), z)
    return z
