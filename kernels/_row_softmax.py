"""A masked row of logits inside a kernel: reduced to a record, and its gradient written from that.

A row is reduced by lanes, each of which keeps a record of its own columns, so that no thread waits for another before
the row ends. It may be reduced in pieces, by several programs. Either way the records are put together at the end.
The maximum and the sum are of the columns *other* than the target, so that what is left of p_y near 1 keeps its
relative accuracy.
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
    """What some of a row's columns are reduced to, float32; a tensor of each part's for several parts of a row.

    largest: maximum of the others than the target. total: their sum of exp(z - largest). gaps: the sum of z - largest
    over the allowed columns, and columns: how many those are; None but for label smoothing. largest_before: maximum
    of the others before the target, which take the argmax from it where they tie; None where nobody asks. z_target:
    the target's logit.
    """

    largest: tl.tensor
    total: tl.tensor
    gaps: tl.tensor | None
    columns: tl.tensor | None
    largest_before: tl.tensor | None
    z_target: tl.tensor


# How records lie in memory: by field.
RECORD_SIZE = len(Record._fields)
_SIZE = tl.constexpr(RECORD_SIZE)
_LARGEST = tl.constexpr(Record._fields.index("largest"))
_TOTAL = tl.constexpr(Record._fields.index("total"))
_GAPS = tl.constexpr(Record._fields.index("gaps"))
_COLUMNS = tl.constexpr(Record._fields.index("columns"))
_LARGEST_BEFORE = tl.constexpr(Record._fields.index("largest_before"))
_Z_TARGET = tl.constexpr(Record._fields.index("z_target"))


class GradientParts(NamedTuple):
    """The gradient of a row by its logits: exp_from(z, shift) * factor - uniform, and at_target at the target.

    uniform: label smoothing's part, None without it.
    """

    shift: tl.tensor
    factor: tl.tensor
    uniform: tl.tensor | None
    at_target: tl.tensor


@triton.jit
def finite(largest):
    """What is taken from logits before exp: where all of them are -inf, 0 - 0 and not NaN."""
    return tl.where(largest == -float("inf"), 0.0, largest)


@triton.jit
def loss_and_parts(record, num_allowed, label_smoothing, z_loss):
    """Loss and nll of a row for weight 1, and the parts of its gradient."""
    top = tl.maximum(record.largest, record.z_target)
    at_target = _math.exp_exactly(record.z_target - top)
    rest = _math.exp_exactly(record.largest - top)
    others = record.total * rest
    total = others + at_target
    log_total = _math.log(total)
    ratio = others / at_target
    nll = tl.where(ratio <= 0.5, _math.log1p(tl.minimum(ratio, 0.5)), top - record.z_target + log_total)
    loss = nll
    shift = finite(record.largest)
    factor = rest / total * _math.over_exp_from(shift)
    gradient = -others / total
    if label_smoothing is not None:
        loss = (1.0 - label_smoothing) * nll
        loss += label_smoothing * (top - shift + log_total - record.gaps / num_allowed)
        gradient = (1.0 - label_smoothing) * gradient + label_smoothing * (at_target / total - 1.0 / num_allowed)
    if z_loss is not None:
        lse = top + log_total
        loss += z_loss * lse * lse
        by_lse = 2.0 * z_loss * lse
        gradient += by_lse * at_target / total
        factor *= 1.0 + by_lse
    uniform = label_smoothing / num_allowed if label_smoothing is not None else None
    return loss, nll, GradientParts(shift, factor, uniform, gradient)


@triton.jit
def is_correct(record, nll):
    """Whether the target is the argmax: the first of the largest columns."""
    return (record.largest <= record.z_target) & (record.largest_before < record.z_target) & (nll == nll)


@triton.jit
def times(parts, scale):
    """The gradient's parts, scaled."""
    uniform = parts.uniform * scale if parts.uniform is not None else None
    return GradientParts(parts.shift, parts.factor * scale, uniform, parts.at_target * scale)


@triton.jit
def load_scale(index, upstream_ptr, stride_u, denominator_ptr):
    """What the gradient of a row's loss is multiplied by: what comes from above, over the mean's denominator."""
    scale = tl.full((), 1.0, tl.float32)
    if upstream_ptr is not None:
        scale *= tl.load(upstream_ptr + index.to(tl.int64) * stride_u)
    if denominator_ptr is not None:
        scale /= tl.load(denominator_ptr)
    return scale


@triton.jit
def load_target(index, targets_ptr, is_masked_ptr, weights_ptr, V):
    """Whether a row counts, its weight and, only if it counts, its target, int32: -1 where that is no column."""
    counts = index >= 0
    weight = tl.full((), 1.0, tl.float32)
    if is_masked_ptr is not None:
        counts = tl.load(is_masked_ptr + index) != 0
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + index)
        counts = counts & (weight != 0.0)
    target = tl.load(targets_ptr + index, mask=counts, other=-1)
    return counts, weight, tl.where((target >= 0) & (target < V), target, -1).to(tl.int32)


@triton.jit
def capped(z, softcap):
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
def target_logit(row):
    """The target's logit: NaN where the target is no column, -inf where it is the excluded one."""
    z_target = tl.load(row.x_ptr + row.start + row.target, mask=row.target >= 0, other=float("nan"))
    z_target = capped(z_target, row.softcap)
    if row.exclude_id is not None:
        z_target = tl.where(row.target == row.exclude_id, -float("inf"), z_target)
    return z_target


@triton.jit
def _put_together(records):
    """One record of the lanes or pieces that each has one of."""
    largest = tl.max(records.largest)
    shift = finite(largest)
    total = tl.sum(records.total * _math.exp(records.largest - shift))
    gaps, columns, largest_before = records.gaps, records.columns, records.largest_before
    if gaps is not None:
        gaps = tl.sum(gaps + columns * (finite(records.largest) - shift))
        columns = tl.sum(columns)
    if largest_before is not None:
        largest_before = tl.max(largest_before)
    return Record(largest, total, gaps, columns, largest_before, records.z_target)


@triton.jit
def _reduce_edges(
    row,
    body,
    has_edges,
    label_smoothing,
    WITH_CORRECT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A record for each lane: of one column of the row's edges, or of none."""
    offs_v, in_v = logit_rows.edges_of_lanes(tl.arange(0, LANES), row.V, body.column, body.length, VECTOR)
    in_v = in_v & has_edges
    z = capped(tl.load(row.x_ptr + row.start + offs_v, mask=in_v, other=0.0), row.softcap)
    if row.exclude_id is not None:
        in_v = in_v & (offs_v != row.exclude_id)
    largest = tl.where(in_v & (offs_v != row.target), z, -float("inf"))
    shift = finite(largest)
    gaps, columns, largest_before = None, None, None
    if label_smoothing is not None:
        gaps = tl.where(in_v, z - shift, 0.0)
        columns = in_v.to(tl.float32)
    if WITH_CORRECT:
        largest_before = tl.where(offs_v < row.target, largest, -float("inf"))
    return Record(largest, _math.exp(largest - shift), gaps, columns, largest_before, target_logit(row))


@triton.jit
def _by_lane(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A tile as [n, LANES, columns]: the columns that a thread loads are one lane's."""
    COLUMNS: tl.constexpr = min(VECTOR, x.shape[0] // LANES)
    return tl.reshape(x, (x.shape[0] // (LANES * COLUMNS), LANES, COLUMNS))


@triton.jit
def _max_of_lanes(z, LANES: tl.constexpr, VECTOR: tl.constexpr):
    return tl.max(tl.max(_by_lane(z, LANES, VECTOR), 2), 0)


@triton.jit
def _sum_of_lanes(x, LANES: tl.constexpr, VECTOR: tl.constexpr):
    return tl.sum(tl.sum(_by_lane(x, LANES, VECTOR), 2), 0)


@triton.jit
def _of_each_column(x, TILE: tl.constexpr, VECTOR: tl.constexpr):
    """What each lane has, at each of its columns of a tile."""
    COLUMNS: tl.constexpr = min(VECTOR, TILE // x.shape[0])
    SHAPE: tl.constexpr = (TILE // (x.shape[0] * COLUMNS), x.shape[0], COLUMNS)
    return tl.reshape(tl.broadcast_to(x[None, :, None], SHAPE), (TILE,))


@triton.jit
def _reduce_tile(records, z, offs_v, in_v, first, row, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The lanes' records with one more tile of the row's logits, the columns from ``first`` on."""
    TILE: tl.constexpr = z.shape[0]
    others = z
    before = tl.full((LANES,), -float("inf"), tl.float32)
    if _has_special(row, first, TILE):
        is_other = offs_v != row.target
        if row.exclude_id is not None:
            is_other = is_other & (offs_v != row.exclude_id)
            if records.gaps is not None:
                in_v = in_v & (offs_v != row.exclude_id)
        others = tl.where(is_other, z, -float("inf"))
        if records.largest_before is not None:
            before = _max_of_lanes(tl.where(offs_v < row.target, others, -float("inf")), LANES, VECTOR)
    tile_max = _max_of_lanes(others, LANES, VECTOR)
    largest = tl.maximum(records.largest, tile_max)
    shift = finite(largest)
    shift_at = _of_each_column(shift, TILE, VECTOR)
    exps = _sum_of_lanes(_math.exp_from(others, shift_at), LANES, VECTOR)
    total = records.total * _math.exp(records.largest - shift) + exps * _math.over_exp_from(shift)
    gaps, columns, largest_before = records.gaps, records.columns, records.largest_before
    if gaps is not None:
        gaps += columns * (finite(records.largest) - shift)
        gaps += _sum_of_lanes(tl.where(in_v, z - shift_at, 0.0), LANES, VECTOR)
        # Where z is NaN all is lost; without it these would be counted in another layout, and moved.
        columns += _sum_of_lanes((in_v & (z == z)).to(tl.float32), LANES, VECTOR)
    if largest_before is not None:
        before = tl.where(first + TILE <= row.target, tile_max, before)
        largest_before = tl.maximum(largest_before, before)
    return Record(largest, total, gaps, columns, largest_before, records.z_target)


@triton.jit
def reduce_piece(
    row,
    first_tile,
    last_tile,
    label_smoothing,
    WITH_CORRECT: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The record of tiles [first_tile, last_tile) of the row; those from 0 on come with the row's edges.

    LANES: the program's threads. The next tile is asked for before one is reduced.
    """
    body = logit_rows.body(row.start, row.V, VECTOR)
    records = _reduce_edges(row, body, first_tile == 0, label_smoothing, WITH_CORRECT, LANES, VECTOR)
    last_tile = tl.minimum(last_tile, tl.cdiv(body.length, BLOCK_V))
    end = tl.minimum(last_tile * BLOCK_V, body.length)
    block = tl.arange(0, BLOCK_V)
    body_ptr = row.x_ptr + body.start
    offs_body = first_tile * BLOCK_V + block
    x = tl.load(body_ptr + offs_body, mask=offs_body < end, other=-float("inf"))
    for tile in range(first_tile, last_tile):
        offs_body = tile * BLOCK_V + block
        after = offs_body + BLOCK_V
        following = tl.load(body_ptr + after, mask=after < end, other=-float("inf"))
        in_v = offs_body < body.length
        z = capped(x, row.softcap)
        if row.softcap is not None:
            z = tl.where(in_v, z, -float("inf"))
        first = body.column + tile * BLOCK_V
        records = _reduce_tile(records, z, first + block, in_v, first, row, LANES, VECTOR)
        x = following
    return _put_together(records)


@triton.jit
def store_record(records_ptr, index, record):
    """Puts a record where the one of that index lies."""
    records_ptr += index * _SIZE
    tl.store(records_ptr + _LARGEST, record.largest)
    tl.store(records_ptr + _TOTAL, record.total)
    if record.gaps is not None:
        tl.store(records_ptr + _GAPS, record.gaps)
        tl.store(records_ptr + _COLUMNS, record.columns)
    if record.largest_before is not None:
        tl.store(records_ptr + _LARGEST_BEFORE, record.largest_before)
    tl.store(records_ptr + _Z_TARGET, record.z_target)


@triton.jit
def load_record(records_ptr, index, num_pieces, label_smoothing, WITH_CORRECT: tl.constexpr, LANES: tl.constexpr):
    """The record of a row, put together from those of its pieces."""
    piece = tl.arange(0, LANES)
    in_pieces = piece < num_pieces
    records_ptr += index.to(tl.int64) * num_pieces * _SIZE
    z_target = tl.load(records_ptr + _Z_TARGET)
    pieces_ptr = records_ptr + piece * _SIZE
    largest = tl.load(pieces_ptr + _LARGEST, mask=in_pieces, other=-float("inf"))
    total = tl.load(pieces_ptr + _TOTAL, mask=in_pieces, other=0.0)
    gaps, columns, largest_before = None, None, None
    if label_smoothing is not None:
        gaps = tl.load(pieces_ptr + _GAPS, mask=in_pieces, other=0.0)
        columns = tl.load(pieces_ptr + _COLUMNS, mask=in_pieces, other=0.0)
    if WITH_CORRECT:
        largest_before = tl.load(pieces_ptr + _LARGEST_BEFORE, mask=in_pieces, other=-float("inf"))
    return _put_together(Record(largest, total, gaps, columns, largest_before, z_target))


@triton.jit
def _at_special(gradient, offs_v, row, parts):
    gradient = tl.where(offs_v == row.target, parts.at_target, gradient)
    return gradient if row.exclude_id is None else tl.where(offs_v == row.exclude_id, 0.0, gradient)


@triton.jit
def gradient_tile(x, offs_v, first, TILE: tl.constexpr, row, parts):
    """The gradient at one tile of raw logits x, in float32. TILE: None where any of its columns may be special."""
    z = x.to(tl.float32)
    if row.softcap is not None:
        ratio = _math.tanh(tl.div_rn(z, tl.full((), row.softcap, tl.float32)))
        z = row.softcap * ratio
    gradient = _math.exp_from(z, parts.shift) * parts.factor
    if parts.uniform is not None:
        gradient -= parts.uniform
    if TILE is None:
        gradient = _at_special(gradient, offs_v, row, parts)
    else:
        if _has_special(row, first, TILE):
            gradient = _at_special(gradient, offs_v, row, parts)
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
            x = tl.load(row.x_ptr + (body_start + tile * BLOCK_V) + block, mask=in_v, eviction_policy="evict_first")
            first = body_column + tile * BLOCK_V
            gradient = gradient_tile(x, first + block, first, BLOCK_V, row, parts)
        gradient = _math.rounded(gradient, dtype)
        out_ptr = g_ptr + (g_body_start + tile * BLOCK_V) + block
        tl.store(out_ptr, gradient, mask=in_v, eviction_policy="evict_first")
    if (first_tile == 0) & (body_length < row.V):
        offs_v, in_v = logit_rows.edges(row.V, body_column, body_length, VECTOR)
        gradient = tl.zeros((2 * VECTOR,), tl.float32)
        if parts is not None:
            x = tl.load(row.x_ptr + row.start + offs_v, mask=in_v)
            gradient = gradient_tile(x, offs_v, 0, None, row, parts)
        tl.store(g_ptr + g_start + offs_v, _math.rounded(gradient, dtype), mask=in_v)
