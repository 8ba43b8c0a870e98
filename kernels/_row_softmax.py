"""A masked row of logits inside a kernel: reduced to a record, and its gradient written from that.

A row may be reduced in pieces, by several programs, whose records are put together again. The maximum and the sum are
of the columns *other* than the target, so that what is left of p_y near 1 keeps its relative accuracy.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastmask.kernels import _logit_rows as logit_rows
from fastmask.kernels import _math


class Row(NamedTuple):
    """One row of logits as a program sees it.

    x_ptr: divisible by 16 bytes, at or before the logits. start: flat index of the row's first logit, counted from
    there. softcap, exclude_id: None for none.
    """

    x_ptr: tl.tensor
    start: tl.tensor
    V: tl.tensor
    target: tl.tensor
    softcap: tl.tensor | None
    exclude_id: tl.tensor | None


class Record(NamedTuple):
    """What some of a row's columns are reduced to, float32.

    largest: maximum of the others than the target. total: their sum of exp(z - largest). gaps: the sum of z - largest
    over the allowed columns, and columns: how many those are; None but for label smoothing. other_takes_argmax: 1
    where an other takes the argmax from the target, else 0; None where nobody asks. z_target: the target's logit.
    """

    largest: tl.tensor
    total: tl.tensor
    gaps: tl.tensor | None
    columns: tl.tensor | None
    other_takes_argmax: tl.tensor | None
    z_target: tl.tensor


# How records lie in memory: by field.
RECORD_SIZE = len(Record._fields)
_SIZE = tl.constexpr(RECORD_SIZE)
_LARGEST = tl.constexpr(Record._fields.index("largest"))
_TOTAL = tl.constexpr(Record._fields.index("total"))
_GAPS = tl.constexpr(Record._fields.index("gaps"))
_COLUMNS = tl.constexpr(Record._fields.index("columns"))
_OTHER_TAKES_ARGMAX = tl.constexpr(Record._fields.index("other_takes_argmax"))
_Z_TARGET = tl.constexpr(Record._fields.index("z_target"))


class GradientParts(NamedTuple):
    """The gradient of a row by its logits: exp(z - shift) * factor - uniform, and at_target at the target.

    uniform: label smoothing's part, None without it.
    """

    shift: tl.tensor
    factor: tl.tensor
    uniform: tl.tensor | None
    at_target: tl.tensor


@triton.jit
def times(parts, scale):
    """The gradient's parts, scaled."""
    uniform = parts.uniform * scale if parts.uniform is not None else None
    return GradientParts(parts.shift, parts.factor * scale, uniform, parts.at_target * scale)


@triton.jit
def load_target(index, targets_ptr, is_masked_ptr, weights_ptr):
    """Whether a row counts, its weight and, only if it counts, its target."""
    counts = index >= 0
    weight = tl.full((), 1.0, tl.float32)
    if is_masked_ptr is not None:
        counts = tl.load(is_masked_ptr + index) != 0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + index)
        counts = counts & (weight != 0.0)
    return counts, weight, tl.load(targets_ptr + index, mask=counts, other=0)


@triton.jit
def _capped(z, softcap):
    """A logit in float32 as the softmax sees it."""
    z = z.to(tl.float32)
    if softcap is not None:
        z = softcap * _math.tanh(tl.div_rn(z, tl.full((), softcap, tl.float32)))
    return z


@triton.jit
def _has_special(row, first, TILE: tl.constexpr):
    """Whether the target or the excluded column is one of TILE columns from ``first`` on."""
    has_special = (row.target >= first) & (row.target < first + TILE)
    if row.exclude_id is not None:
        has_special = has_special | ((row.exclude_id >= first) & (row.exclude_id < first + TILE))
    return has_special


@triton.jit
def empty_record(row, label_smoothing, WITH_CORRECT: tl.constexpr):
    """The record of none of a row's columns.

    The target's logit is NaN where the target is no column, -inf where it is the excluded one.
    """
    is_column = (row.target >= 0) & (row.target < row.V)
    z_target = tl.load(row.x_ptr + row.start + row.target, mask=is_column, other=float("nan"))
    z_target = _capped(z_target, row.softcap)
    if row.exclude_id is not None:
        z_target = tl.where(row.target == row.exclude_id, -float("inf"), z_target)
    zero = tl.full((), 0.0, tl.float32)
    return Record(
        tl.full((), -float("inf"), tl.float32),
        zero,
        zero if label_smoothing is not None else None,
        zero if label_smoothing is not None else None,
        zero if WITH_CORRECT else None,
        z_target,
    )


@triton.jit
def _reduce_tile(z, offs_v, in_v, first, TILE: tl.constexpr, row, record):
    """The record with one more tile of the row's logits: TILE columns from ``first`` on at most."""
    others = z
    before = tl.full((), -float("inf"), tl.float32)  # ties with a lower id take the argmax
    if _has_special(row, first, TILE):
        is_other = offs_v != row.target
        if row.exclude_id is not None:
            is_other = is_other & (offs_v != row.exclude_id)
            if record.gaps is not None:
                in_v = in_v & (offs_v != row.exclude_id)
        others = tl.where(is_other, z, -float("inf"))
        if record.other_takes_argmax is not None:
            before = tl.max(tl.where(offs_v < row.target, others, -float("inf")))
    tile_max = tl.max(others)
    other_takes_argmax = record.other_takes_argmax
    if other_takes_argmax is not None:
        before = tl.where(first + TILE <= row.target, tile_max, before)
        takes_argmax = (tile_max > record.z_target) | (before == record.z_target)
        other_takes_argmax = tl.maximum(other_takes_argmax, takes_argmax.to(tl.float32))
    largest = tl.maximum(record.largest, tile_max)
    shift = tl.where(largest == -float("inf"), 0.0, largest)  # where all so far are -inf, 0 - 0 and not NaN
    total = record.total * _math.exp(record.largest - shift) + tl.sum(_math.exp(others - shift))
    gaps, columns = record.gaps, record.columns
    if gaps is not None:
        old_shift = tl.where(record.largest == -float("inf"), 0.0, record.largest)
        gaps += columns * (old_shift - shift) + tl.sum(tl.where(in_v, z - shift, 0.0))
        columns += tl.sum(in_v.to(tl.float32))
    return Record(largest, total, gaps, columns, other_takes_argmax, record.z_target)


@triton.jit
def reduce_piece(row, record, first_tile, last_tile, VECTOR: tl.constexpr, BLOCK_V: tl.constexpr):
    """The record with tiles [first_tile, last_tile) of the row; those from 0 on come with the row's edges."""
    body_column, body_start, body_length = logit_rows.body(row.start, row.V, VECTOR)
    block = tl.arange(0, BLOCK_V)
    for tile in range(first_tile, tl.minimum(last_tile, tl.cdiv(body_length, BLOCK_V))):
        in_v = tile * BLOCK_V + block < body_length
        z = tl.load(row.x_ptr + (body_start + tile * BLOCK_V) + block, mask=in_v, other=-float("inf"))
        z = _capped(z, row.softcap)
        if row.softcap is not None:
            z = tl.where(in_v, z, -float("inf"))
        first = body_column + tile * BLOCK_V
        record = _reduce_tile(z, first + block, in_v, first, BLOCK_V, row, record)
    if (first_tile == 0) & (body_length < row.V):
        offs_v, in_v = logit_rows.edges(row.V, body_column, body_length, VECTOR)
        z = tl.load(row.x_ptr + row.start + offs_v, mask=in_v, other=-float("inf"))
        z = tl.where(in_v, _capped(z, row.softcap), -float("inf"))
        # These columns are no range, so every special case is looked for.
        record = _reduce_tile(z, tl.where(in_v, offs_v, row.V), in_v, 0, 1 << 30, row, record)
    return record


@triton.jit
def store_record(records_ptr, index, record):
    """Puts a record where the one of that index lies."""
    records_ptr += index * _SIZE
    tl.store(records_ptr + _LARGEST, record.largest)
    tl.store(records_ptr + _TOTAL, record.total)
    if record.gaps is not None:
        tl.store(records_ptr + _GAPS, record.gaps)
        tl.store(records_ptr + _COLUMNS, record.columns)
    if record.other_takes_argmax is not None:
        tl.store(records_ptr + _OTHER_TAKES_ARGMAX, record.other_takes_argmax)
    tl.store(records_ptr + _Z_TARGET, record.z_target)


@triton.jit
def load_record(records_ptr, index, num_pieces, label_smoothing, WITH_CORRECT: tl.constexpr, LANES: tl.constexpr):
    """The record of a row, put together from those of its pieces."""
    piece = tl.arange(0, LANES)
    in_pieces = piece < num_pieces
    records_ptr += index.to(tl.int64) * num_pieces * _SIZE
    z_target = tl.load(records_ptr + _Z_TARGET)
    pieces_ptr = records_ptr + piece * _SIZE
    each_max = tl.load(pieces_ptr + _LARGEST, mask=in_pieces, other=-float("inf"))
    largest = tl.max(each_max)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    each_total = tl.load(pieces_ptr + _TOTAL, mask=in_pieces, other=0.0)
    each_shift = tl.where(each_max == -float("inf"), 0.0, each_max)
    gaps, columns, other_takes_argmax = None, None, None  # all are asked for before any is waited for
    if label_smoothing is not None:
        each_gaps = tl.load(pieces_ptr + _GAPS, mask=in_pieces, other=0.0)
        each_columns = tl.load(pieces_ptr + _COLUMNS, mask=in_pieces, other=0.0)
    if WITH_CORRECT:
        other_takes_argmax = tl.max(tl.load(pieces_ptr + _OTHER_TAKES_ARGMAX, mask=in_pieces, other=0.0))
    total = tl.sum(each_total * _math.exp(each_shift - shift))
    if label_smoothing is not None:
        gaps = tl.sum(each_gaps + each_columns * (each_shift - shift))
        columns = tl.sum(each_columns)
    return Record(largest, total, gaps, columns, other_takes_argmax, z_target)


@triton.jit
def _gradient_tile(x, offs_v, first, TILE: tl.constexpr, row, parts):
    """The gradient at one tile of raw logits x, in float32."""
    z = x.to(tl.float32)
    if row.softcap is not None:
        ratio = _math.tanh(tl.div_rn(z, tl.full((), row.softcap, tl.float32)))
        z = row.softcap * ratio
    gradient = _math.exp(z - parts.shift) * parts.factor
    if parts.uniform is not None:
        gradient -= parts.uniform
    if _has_special(row, first, TILE):
        gradient = tl.where(offs_v == row.target, parts.at_target, gradient)
        if row.exclude_id is not None:
            gradient = tl.where(offs_v == row.exclude_id, 0.0, gradient)
    if row.softcap is not None:
        slope = (1.0 - ratio) * (1.0 + ratio)
        gradient *= tl.where(offs_v == row.exclude_id, 0.0, slope) if row.exclude_id is not None else slope
    return gradient


@triton.jit
def write_gradient(
    row,
    parts,
    g_ptr,
    g_start,
    first_tile,
    last_tile,
    SAME_PHASE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Writes the gradient at tiles [first_tile, last_tile) of the row; those from 0 on come with the row's edges.

    parts: None for zeros. g_ptr, g_start: where it goes, as the row's x_ptr and start.
    """
    dtype = g_ptr.dtype.element_ty
    body_column, body_start, body_length = logit_rows.body(row.start, row.V, VECTOR)
    g_body_start = g_start + body_column
    if SAME_PHASE:
        g_body_start = tl.multiple_of(g_body_start, VECTOR)
    block = tl.arange(0, BLOCK_V)
    last_tile = tl.minimum(last_tile, tl.cdiv(body_length, BLOCK_V))
    for step in range(0, last_tile - first_tile):
        tile = last_tile - 1 - step  # backwards: the tiles that were read last are in L2 still
        in_v = tile * BLOCK_V + block < body_length
        if parts is None:
            gradient = tl.zeros((BLOCK_V,), tl.float32)
        else:
            x = tl.load(row.x_ptr + (body_start + tile * BLOCK_V) + block, mask=in_v)
            first = body_column + tile * BLOCK_V
            gradient = _gradient_tile(x, first + block, first, BLOCK_V, row, parts)
        tl.store(g_ptr + (g_body_start + tile * BLOCK_V) + block, _math.rounded(gradient, dtype), mask=in_v)
    if (first_tile == 0) & (body_length < row.V):
        offs_v, in_v = logit_rows.edges(row.V, body_column, body_length, VECTOR)
        gradient = tl.zeros((2 * VECTOR,), tl.float32)
        if parts is not None:
            x = tl.load(row.x_ptr + row.start + offs_v, mask=in_v)
            gradient = _gradient_tile(x, offs_v, 0, 1 << 30, row, parts)
        tl.store(g_ptr + g_start + offs_v, _math.rounded(gradient, dtype), mask=in_v)
