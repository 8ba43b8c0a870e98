"""Cross-entropy of the masked rows, and its gradient, from logits.

For one masked row with logits z over the allowed columns A, target y, L = logsumexp_A z, p = softmax_A z,
q = 1 - p_y, label smoothing e and z-loss l,

    loss         = w ((1 - e) nll + e (L - mean_A z) + l L^2),      nll = L - z_y
    d loss / d z = w (p (1 + 2 l L) - e / |A|), and at the target w ((1 - e) (-q) + e (p_y - 1 / |A|) + 2 l L p_y)

``fastmask/reference/masked_cross_entropy.py`` is the specification. As p_y -> 1, L - z_y and 1 - p_y cancel; a
row is reduced to the maximum and the sum of its *other* columns, which keep the relative accuracy of both.

Bytes: a masked row is read once from DRAM (its gradient reads it again, backwards, from L2) and its gradient
is written once; an unmasked row is never read, its gradient is zeroed. Saved for backward: the gradient if it was
formed in forward, the logits and six float32 a row, from which any other is formed without another reduction.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._autograd import first_order_only
from fastmask.kernels import _elementary as elementary
from fastmask.kernels import _rows as rows
from fastmask.kernels._operator import differentiable, operator

# What a piece of a row is reduced to: the maximum of the others than the target, their sum of exponentials and
# (for label smoothing) the sum of gaps, both relative to that maximum, how many columns the gaps are of, 1 where
# an other takes the argmax from the target, and the target's logit.
_MAX = tl.constexpr(0)
_SUM = tl.constexpr(1)
_GAPS = tl.constexpr(2)
_COLUMNS = tl.constexpr(3)
_BEATEN = tl.constexpr(4)
_TARGET = tl.constexpr(5)
_RECORD = tl.constexpr(6)


@triton.jit
def _capped(z, softcap, HAS_SOFTCAP: tl.constexpr):
    """A logit in float32 as the softmax sees it."""
    z = z.to(tl.float32)
    if HAS_SOFTCAP:
        z = softcap * elementary.tanh(tl.div_rn(z, tl.full((), softcap, tl.float32)))
    return z


@triton.jit
def _reduce_tile(
    z,
    offs_v,
    in_v,
    first,
    TILE: tl.constexpr,
    target,
    z_target,
    exclude_id,
    record,
    SMOOTHS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    WITH_CORRECT: tl.constexpr,
):
    """The record of a row after one more tile of its logits: TILE columns from ``first`` on at most."""
    largest, total, gaps, columns, beaten = record
    others = z
    before = tl.full((), -float("inf"), tl.float32)  # ties with a lower id take the argmax
    is_special = (target >= first) & (target < first + TILE)
    if HAS_EXCLUDE:
        is_special = is_special | ((exclude_id >= first) & (exclude_id < first + TILE))
    if is_special:
        is_other = offs_v != target
        if HAS_EXCLUDE:
            is_other = is_other & (offs_v != exclude_id)
            if SMOOTHS:
                in_v = in_v & (offs_v != exclude_id)
        others = tl.where(is_other, z, -float("inf"))
        if WITH_CORRECT:
            before = tl.max(tl.where(offs_v < target, others, -float("inf")))
    tile_max = tl.max(others)
    if WITH_CORRECT:
        before = tl.where(first + TILE <= target, tile_max, before)
        beaten = tl.maximum(beaten, ((tile_max > z_target) | (before == z_target)).to(tl.float32))
    new_max = tl.maximum(largest, tile_max)
    shift = tl.where(new_max == -float("inf"), 0.0, new_max)  # where all so far are -inf, 0 - 0 and not NaN
    total = total * elementary.exp(largest - shift) + tl.sum(elementary.exp(others - shift))
    if SMOOTHS:
        old_shift = tl.where(largest == -float("inf"), 0.0, largest)
        gaps += columns * (old_shift - shift) + tl.sum(tl.where(in_v, z - shift, 0.0))
        columns += tl.sum(in_v.to(tl.float32))
    return new_max, total, gaps, columns, beaten


@triton.jit
def _reduce_piece(
    x_ptr,
    start,
    V,
    first_tile,
    last_tile,
    target,
    z_target,
    softcap,
    exclude_id,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTHS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    WITH_CORRECT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The record of tiles [first_tile, last_tile) of a row; those from 0 on come with the row's edges."""
    zero = tl.full((), 0.0, tl.float32)
    record = (tl.full((), -float("inf"), tl.float32), zero, zero, zero, zero)
    body_column, body_start, body_length = rows.body(start, V, VECTOR)
    block = tl.arange(0, BLOCK_V)
    for tile in range(first_tile, tl.minimum(last_tile, tl.cdiv(body_length, BLOCK_V))):
        in_v = tile * BLOCK_V + block < body_length
        z = tl.load(x_ptr + (body_start + tile * BLOCK_V) + block, mask=in_v, other=-float("inf"))
        z = _capped(z, softcap, HAS_SOFTCAP)
        if HAS_SOFTCAP:
            z = tl.where(in_v, z, -float("inf"))
        record = _reduce_tile(
            z,
            body_column + tile * BLOCK_V + block,
            in_v,
            body_column + tile * BLOCK_V,
            BLOCK_V,
            target,
            z_target,
            exclude_id,
            record,
            SMOOTHS,
            HAS_EXCLUDE,
            WITH_CORRECT,
        )
    if (first_tile == 0) & (body_length < V):
        offs_v, in_v = rows.edges(V, body_column, body_length, VECTOR)
        z = tl.load(x_ptr + start + offs_v, mask=in_v, other=-float("inf"))
        z = tl.where(in_v, _capped(z, softcap, HAS_SOFTCAP), -float("inf"))
        # These columns are no range, so every special case is looked for.
        record = _reduce_tile(
            z,
            tl.where(in_v, offs_v, V),
            in_v,
            0,
            1 << 30,
            target,
            z_target,
            exclude_id,
            record,
            SMOOTHS,
            HAS_EXCLUDE,
            WITH_CORRECT,
        )
    return record


@triton.jit
def _store_record(records_ptr, index, record, z_target):
    records_ptr += index * _RECORD
    largest, total, gaps, columns, beaten = record
    tl.store(records_ptr + _MAX, largest)
    tl.store(records_ptr + _SUM, total)
    tl.store(records_ptr + _GAPS, gaps)
    tl.store(records_ptr + _COLUMNS, columns)
    tl.store(records_ptr + _BEATEN, beaten)
    tl.store(records_ptr + _TARGET, z_target)


@triton.jit
def _load_record(records_ptr, row, num_pieces, LANES: tl.constexpr):
    """A row's record, put together from its pieces', and the target's logit."""
    piece = tl.arange(0, LANES)
    in_pieces = piece < num_pieces
    records_ptr += row.to(tl.int64) * num_pieces * _RECORD
    z_target = tl.load(records_ptr + _TARGET)
    offsets = piece * _RECORD
    each_max = tl.load(records_ptr + offsets + _MAX, mask=in_pieces, other=-float("inf"))
    largest = tl.max(each_max)
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    each_sum = tl.load(records_ptr + offsets + _SUM, mask=in_pieces, other=0.0)
    each_shift = tl.where(each_max == -float("inf"), 0.0, each_max)
    each_gaps = tl.load(records_ptr + offsets + _GAPS, mask=in_pieces, other=0.0)
    each_columns = tl.load(records_ptr + offsets + _COLUMNS, mask=in_pieces, other=0.0)
    beaten = tl.max(tl.load(records_ptr + offsets + _BEATEN, mask=in_pieces, other=0.0))
    total = tl.sum(each_sum * elementary.exp(each_shift - shift))
    gaps = tl.sum(each_gaps + each_columns * (each_shift - shift))
    return (largest, total, gaps, tl.sum(each_columns), beaten), z_target


@triton.jit
def _finish(record, z_target, num_allowed, label_smoothing, z_loss, SMOOTHS: tl.constexpr, HAS_Z_LOSS: tl.constexpr):
    """loss and nll of a row for weight 1, and the parts of its gradient.

    That is exp(z - shift) * factor - floor, and the last of them at the target.
    """
    largest, total, gaps, _, _ = record
    top = tl.maximum(largest, z_target)
    at_target = elementary.exp_exactly(z_target - top)
    rest = elementary.exp_exactly(largest - top)
    others = total * rest
    total = others + at_target
    log_total = elementary.log(total)
    ratio = others / at_target
    nll = tl.where(ratio <= 0.5, elementary.log1p(tl.minimum(ratio, 0.5)), top - z_target + log_total)
    loss = nll
    shift = tl.where(largest == -float("inf"), 0.0, largest)
    factor = rest / total
    floor = tl.full((), 0.0, tl.float32)
    gradient = -others / total
    if SMOOTHS:
        loss = (1.0 - label_smoothing) * nll
        loss += label_smoothing * (top - shift + log_total - gaps / num_allowed)
        floor += label_smoothing / num_allowed
        gradient = (1.0 - label_smoothing) * gradient + label_smoothing * (at_target / total - 1.0 / num_allowed)
    if HAS_Z_LOSS:
        lse = top + log_total
        loss += z_loss * lse * lse
        gradient += 2.0 * z_loss * lse * at_target / total
        factor *= 1.0 + 2.0 * z_loss * lse
    return loss, nll, shift, factor, floor, gradient


@triton.jit
def _gradient_tile(
    x,
    offs_v,
    first,
    TILE: tl.constexpr,
    target,
    exclude_id,
    softcap,
    shift,
    factor,
    floor,
    at_target,
    SMOOTHS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """The gradient at one tile of raw logits x, in float32."""
    z = x.to(tl.float32)
    if HAS_SOFTCAP:
        ratio = elementary.tanh(tl.div_rn(z, tl.full((), softcap, tl.float32)))
        z = softcap * ratio
    gradient = elementary.exp(z - shift) * factor
    if SMOOTHS:
        gradient -= floor
    is_special = (target >= first) & (target < first + TILE)
    if HAS_EXCLUDE:
        is_special = is_special | ((exclude_id >= first) & (exclude_id < first + TILE))
    if is_special:
        gradient = tl.where(offs_v == target, at_target, gradient)
        if HAS_EXCLUDE:
            gradient = tl.where(offs_v == exclude_id, 0.0, gradient)
    if HAS_SOFTCAP:
        slope = (1.0 - ratio) * (1.0 + ratio)
        gradient *= tl.where(offs_v == exclude_id, 0.0, slope) if HAS_EXCLUDE else slope
    return gradient


@triton.jit
def _write_gradient(
    x_ptr,
    x_start,
    g_ptr,
    g_start,
    V,
    first_tile,
    last_tile,
    target,
    exclude_id,
    softcap,
    shift,
    factor,
    floor,
    at_target,
    IS_ZERO: tl.constexpr,
    SMOOTHS: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SAME_PHASE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The gradient at tiles [first_tile, last_tile) of a row; those from 0 on come with the row's edges."""
    dtype = g_ptr.dtype.element_ty
    body_column, body_start, body_length = rows.body(x_start, V, VECTOR)
    g_body_start = g_start + body_column
    if SAME_PHASE:
        g_body_start = tl.multiple_of(g_body_start, VECTOR)
    block = tl.arange(0, BLOCK_V)
    last_tile = tl.minimum(last_tile, tl.cdiv(body_length, BLOCK_V))
    for step in range(0, last_tile - first_tile):
        tile = last_tile - 1 - step  # backwards: the tiles that were read last are in L2 still
        in_v = tile * BLOCK_V + block < body_length
        if IS_ZERO:
            gradient = tl.zeros((BLOCK_V,), tl.float32)
        else:
            x = tl.load(x_ptr + (body_start + tile * BLOCK_V) + block, mask=in_v)
            gradient = _gradient_tile(
                x,
                body_column + tile * BLOCK_V + block,
                body_column + tile * BLOCK_V,
                BLOCK_V,
                target,
                exclude_id,
                softcap,
                shift,
                factor,
                floor,
                at_target,
                SMOOTHS,
                HAS_EXCLUDE,
                HAS_SOFTCAP,
            )
        tl.store(g_ptr + (g_body_start + tile * BLOCK_V) + block, elementary.rounded(gradient, dtype), mask=in_v)
    if (first_tile == 0) & (body_length < V):
        offs_v, in_v = rows.edges(V, body_column, body_length, VECTOR)
        gradient = tl.zeros((2 * VECTOR,), tl.float32)
        if not IS_ZERO:
            x = tl.load(x_ptr + x_start + offs_v, mask=in_v)
            gradient = _gradient_tile(
                x,
                offs_v,
                0,
                1 << 30,
                target,
                exclude_id,
                softcap,
                shift,
                factor,
                floor,
                at_target,
                SMOOTHS,
                HAS_EXCLUDE,
                HAS_SOFTCAP,
            )
        tl.store(g_ptr + g_start + offs_v, elementary.rounded(gradient, dtype), mask=in_v)


@triton.jit
def _load_row(row, targets_ptr, is_masked_ptr, weights_ptr, HAS_MASK: tl.constexpr, HAS_WEIGHTS: tl.constexpr):
    """Whether a row counts, its weight and, only if it counts, its target."""
    counts = row >= 0
    weight = tl.full((), 1.0, tl.float32)
    if HAS_MASK:
        counts = tl.load(is_masked_ptr + row) != 0
    if HAS_WEIGHTS:
        weight = tl.load(weights_ptr + row)
        counts = counts & (weight != 0.0)
    return counts, weight, tl.load(targets_ptr + row, mask=counts, other=0)


@triton.jit
def _load_target(x_ptr, start, V, target, softcap, exclude_id, HAS_SOFTCAP: tl.constexpr, HAS_EXCLUDE: tl.constexpr):
    """The target's logit; NaN where the target is no column, -inf where it is the excluded one."""
    z_target = tl.load(x_ptr + start + target, mask=(target >= 0) & (target < V), other=float("nan"))
    z_target = _capped(z_target, softcap, HAS_SOFTCAP)
    if HAS_EXCLUDE:
        z_target = tl.where(target == exclude_id, -float("inf"), z_target)
    return z_target


@triton.jit(do_not_specialize=["lead_x", "N", "V", "exclude_id", "tiles_per_piece"])
def _records_kernel(
    x_ptr,
    lead_x,
    stride_xb,
    stride_xn,
    targets_ptr,
    is_masked_ptr,
    weights_ptr,
    records_ptr,
    N,
    V,
    exclude_id,
    softcap,
    tiles_per_piece,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    SMOOTHS: tl.constexpr,
    WITH_CORRECT: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # This program reduces one piece of one masked row to its record.
    row = tl.program_id(0)
    piece = tl.program_id(1)
    x_ptr = tl.multiple_of(x_ptr - lead_x, 16)
    start = rows.row_start(row, N, lead_x, stride_xb, stride_xn)
    counts, _, target = _load_row(row, targets_ptr, is_masked_ptr, weights_ptr, HAS_MASK, HAS_WEIGHTS)
    if counts:
        z_target = _load_target(x_ptr, start, V, target, softcap, exclude_id, HAS_SOFTCAP, HAS_EXCLUDE)
        record = _reduce_piece(
            x_ptr, start, V, piece * tiles_per_piece, (piece + 1) * tiles_per_piece, target, z_target, softcap,
            exclude_id, HAS_SOFTCAP, SMOOTHS, HAS_EXCLUDE, WITH_CORRECT, VECTOR, BLOCK_V,
        )  # fmt: skip
        _store_record(records_ptr, row.to(tl.int64) * tl.num_programs(1) + piece, record, z_target)


@triton.jit(
    do_not_specialize=["lead_x", "lead_g", "stride_u", "N", "V", "exclude_id", "tiles_per_piece", "num_pieces"]
)
def _rows_kernel(
    x_ptr,
    lead_x,
    stride_xb,
    stride_xn,
    targets_ptr,
    is_masked_ptr,
    weights_ptr,
    records_ptr,
    losses_ptr,
    nll_ptr,
    correct_ptr,
    gradient_ptr,
    lead_g,
    stride_gb,
    stride_gn,
    upstream_ptr,
    stride_u,
    denominator_ptr,
    N,
    V,
    exclude_id,
    label_smoothing,
    z_loss,
    softcap,
    tiles_per_piece,
    num_pieces,  # of the records at hand
    HAS_MASK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_DENOMINATOR: tl.constexpr,
    HAS_UPSTREAM: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_EXCLUDE: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    SMOOTHS: tl.constexpr,
    HAS_RECORDS: tl.constexpr,  # else the row is reduced here
    PIECE_LANES: tl.constexpr,
    HOLDS_UNIT: tl.constexpr,  # the gradient buffer holds what an upstream gradient of 1 asks for
    WITH_LOSSES: tl.constexpr,
    WITH_CORRECT: tl.constexpr,
    WITH_GRADIENT: tl.constexpr,
    SAME_PHASE: tl.constexpr,  # rows of gradient and logits begin at the same place within 16 bytes
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # This program does one row, or with several programs along axis 1 one piece of it: the losses (once a row)
    # and the gradient. An unmasked row is zeroed.
    row = tl.program_id(0)
    piece = tl.program_id(1)
    scale = tl.full((), 1.0, tl.float32)
    if HAS_UPSTREAM:
        scale *= tl.load(upstream_ptr + row.to(tl.int64) * stride_u)
        if HOLDS_UNIT:
            if scale == 1.0:
                return
    if HAS_DENOMINATOR:
        scale /= tl.load(denominator_ptr)

    x_ptr = tl.multiple_of(x_ptr - lead_x, 16)
    start = rows.row_start(row, N, lead_x, stride_xb, stride_xn)
    counts, weight, target = _load_row(row, targets_ptr, is_masked_ptr, weights_ptr, HAS_MASK, HAS_WEIGHTS)
    first_tile = piece * tiles_per_piece
    last_tile = first_tile + tiles_per_piece
    if WITH_GRADIENT:
        g_ptr = tl.multiple_of(gradient_ptr - lead_g, 16)
        g_start = rows.row_start(row, N, lead_g, stride_gb, stride_gn)
    if not counts:
        if WITH_LOSSES:
            if piece == 0:
                tl.store(losses_ptr + row, 0.0)
                tl.store(nll_ptr + row, 0.0)
                if WITH_CORRECT:
                    tl.store(correct_ptr + row, 0)
        if WITH_GRADIENT:
            _write_gradient(
                x_ptr, start, g_ptr, g_start, V, first_tile, last_tile, target, exclude_id, softcap, 0.0, 0.0, 0.0,
                0.0, True, SMOOTHS, HAS_EXCLUDE, HAS_SOFTCAP, SAME_PHASE, VECTOR, BLOCK_V,
            )  # fmt: skip
        return

    if not HAS_RECORDS:
        z_target = _load_target(x_ptr, start, V, target, softcap, exclude_id, HAS_SOFTCAP, HAS_EXCLUDE)
        record = _reduce_piece(
            x_ptr, start, V, 0, tiles_per_piece, target, z_target, softcap, exclude_id,
            HAS_SOFTCAP, SMOOTHS, HAS_EXCLUDE, WITH_CORRECT, VECTOR, BLOCK_V,
        )  # fmt: skip
        _store_record(records_ptr, row.to(tl.int64), record, z_target)
        if WITH_GRADIENT:  # perhaps in place: every warp reads and reduces the edges, so none may be behind
            tl.debug_barrier()
    else:  # the record keeps the target's logit, whose place another program's gradient may have taken
        record, z_target = _load_record(records_ptr, row, num_pieces, PIECE_LANES)
    num_allowed = V - 1 if HAS_EXCLUDE else V
    loss, nll, shift, factor, floor, at_target = _finish(
        record, z_target, num_allowed, label_smoothing, z_loss, SMOOTHS, HAS_Z_LOSS
    )
    if WITH_LOSSES:
        if piece == 0:
            tl.store(losses_ptr + row, loss * weight)
            tl.store(nll_ptr + row, nll)
            if WITH_CORRECT:
                tl.store(correct_ptr + row, (record[4] == 0.0) & (nll == nll))
    if WITH_GRADIENT:
        scale *= weight
        _write_gradient(
            x_ptr, start, g_ptr, g_start, V, first_tile, last_tile, target, exclude_id, softcap, shift,
            factor * scale, floor * scale, at_target * scale, False, SMOOTHS, HAS_EXCLUDE, HAS_SOFTCAP, SAME_PHASE,
            VECTOR, BLOCK_V,
        )  # fmt: skip


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, num_elements, BLOCK: tl.constexpr):
    # This program multiplies a block by the factor, unless that is 1.
    factor = tl.load(factor_ptr)
    if factor == 1.0:
        return
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < num_elements)
    scaled = elementary.rounded(x.to(tl.float32) * factor, x_ptr.dtype.element_ty)
    tl.store(x_ptr + offsets, scaled, mask=offsets < num_elements)


# Largest V, then (columns of a tile, warps): for cross-entropy alone; where some tiles hold a special case
# (exclude_id, the argmax); and where every element costs more (softcap, label smoothing). A row costs each of its
# threads about 400 instructions besides: the shorter it is, the fewer they are.
_TILES = (
    (1024, (1024, 1), (1024, 2), (1024, 4)),  # the row is one tile
    (2048, (2048, 2), (2048, 4), (2048, 8)),  # likewise
    (16384, (4096, 4), (4096, 8), (2048, 8)),  # on Hopper an SM runs four programs: some load, some reduce
    (65536, (8192, 8), (4096, 8), (2048, 8)),  # and here two, so that all rows in flight fit its L2
    (2**31, (16384, 32), (16384, 32), (2048, 8)),  # and here one, for the same reason
)
# Fewer rows leave SMs idle: the tiles of each are spread over several programs, by a launch more.
_FEW_ROWS = 128
_MANY_PROGRAMS = 512
_SPLIT_TILES = ((4096, 8), (4096, 8), (2048, 8))

_SCALE_BLOCK = 8192


class Options(NamedTuple):
    """What is computed besides cross-entropy; 0, and -1 for exclude_id, where it is not."""

    label_smoothing: float
    z_loss: float
    softcap: float
    exclude_id: int
    with_correct: bool


class Plan(NamedTuple):
    """How a row is spread over programs: num_pieces of them, tiles_per_piece tiles of block_v columns each."""

    block_v: int
    num_warps: int
    num_pieces: int
    tiles_per_piece: int


def plan(num_rows: int, vocabulary: int, options: Options, is_amd: bool = bool(torch.version.hip)) -> Plan:
    """The launch plan of logits [num_rows, vocabulary]; the pieces are the same with and without the argmax."""
    is_special = options.with_correct or options.exclude_id >= 0
    is_dear = options.softcap != 0.0 or options.label_smoothing != 0.0
    column = 2 if is_dear else int(is_special)
    if num_rows < _FEW_ROWS and vocabulary > 2 * _SPLIT_TILES[column][0]:
        block_v, num_warps = _SPLIT_TILES[column]
        num_tiles = triton.cdiv(vocabulary, block_v)
        tiles_per_piece = triton.cdiv(num_tiles, triton.cdiv(_MANY_PROGRAMS, max(1, num_rows)))
        return Plan(block_v, num_warps, triton.cdiv(num_tiles, tiles_per_piece), tiles_per_piece)
    block_v, num_warps = next(row for row in _TILES if vocabulary <= row[0])[1 + column]
    if is_amd:  # whose warps have 64 lanes, and whose programs 1024 at most
        block_v, num_warps = min(block_v, 8192), min(num_warps, 16)
    return Plan(block_v, num_warps, 1, triton.cdiv(vocabulary, block_v))


def _strides(logits: Tensor) -> tuple[int, int]:
    """Of the sequences and of the positions of logits [B, N, V] or [R, V]."""
    return logits.stride(0) if logits.ndim == 3 else 0, logits.stride(-2)


def _arguments(
    logits: Tensor,
    targets: Tensor,
    is_masked: Tensor | None,
    weights: Tensor | None,
    records: Tensor,
    options: Options,
) -> dict[str, Any]:
    """The arguments that both kernels take."""
    stride_b, stride_n = _strides(logits)
    block_v, num_warps, _, tiles_per_piece = plan(targets.numel(), logits.shape[-1], options)
    return {
        "x_ptr": logits,
        "lead_x": rows.lead(logits),
        "stride_xb": stride_b,
        "stride_xn": stride_n,
        "targets_ptr": targets.contiguous(),
        "is_masked_ptr": None if is_masked is None else is_masked.contiguous(),
        "weights_ptr": None if weights is None else weights.contiguous(),
        "records_ptr": records,
        "N": logits.shape[-2],
        "V": logits.shape[-1],
        "exclude_id": options.exclude_id,
        "softcap": options.softcap,
        "tiles_per_piece": tiles_per_piece,
        "HAS_MASK": is_masked is not None,
        "HAS_WEIGHTS": weights is not None,
        "HAS_SOFTCAP": options.softcap != 0.0,
        "HAS_EXCLUDE": options.exclude_id >= 0,
        "SMOOTHS": options.label_smoothing != 0.0,
        "WITH_CORRECT": options.with_correct,
        "VECTOR": 16 // logits.element_size(),
        "BLOCK_V": block_v,
        "num_warps": num_warps,
    }


def _launch_rows(
    arguments: dict[str, Any],
    options: Options,
    *,
    num_pieces: int,
    losses: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    gradient: Tensor | None,
    denominator: Tensor | None,
    upstream: Tensor | None = None,
    holds_unit: bool = False,
) -> None:
    """Losses and gradient, where there is room for them; ``num_pieces`` of the records at hand, or 0."""
    same_phase, lead_g, stride_gb, stride_gn = True, 0, 0, 0
    if gradient is not None:
        stride_gb, stride_gn = _strides(gradient)
        lead_g = rows.lead(gradient)
        apart = (
            lead_g - arguments["lead_x"],
            stride_gb - arguments["stride_xb"],
            stride_gn - arguments["stride_xn"],
        )
        same_phase = all(difference % arguments["VECTOR"] == 0 for difference in apart)
    num_rows = arguments["targets_ptr"].numel()
    _rows_kernel[(num_rows, max(1, num_pieces) if gradient is not None else 1)](
        **arguments,
        losses_ptr=losses[0],
        nll_ptr=losses[1],
        correct_ptr=losses[2],
        gradient_ptr=gradient,
        lead_g=lead_g,
        stride_gb=stride_gb,
        stride_gn=stride_gn,
        upstream_ptr=upstream,
        stride_u=upstream.stride(0) if upstream is not None and upstream.ndim else 0,
        denominator_ptr=denominator,
        label_smoothing=options.label_smoothing,
        z_loss=options.z_loss,
        HAS_DENOMINATOR=denominator is not None,
        HAS_UPSTREAM=upstream is not None,
        HAS_Z_LOSS=options.z_loss != 0.0,
        num_pieces=num_pieces,
        HAS_RECORDS=num_pieces > 0,
        PIECE_LANES=triton.next_power_of_2(max(1, num_pieces)),
        HOLDS_UNIT=holds_unit,
        WITH_LOSSES=losses[0] is not None,
        WITH_GRADIENT=gradient is not None,
        SAME_PHASE=same_phase,
    )


def _allocate(logits: Tensor, num_rows: int, options: Options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """losses, nll, correct, records."""
    num_pieces = plan(num_rows, logits.shape[-1], options).num_pieces
    return (
        logits.new_empty(num_rows, dtype=torch.float32),
        logits.new_empty(num_rows, dtype=torch.float32),
        logits.new_empty(num_rows if options.with_correct else 0, dtype=torch.bool),
        logits.new_zeros((num_rows, num_pieces, _RECORD.value), dtype=torch.float32),  # unmasked rows write none
    )


def losses_and_gradient(
    logits: Tensor,
    targets: Tensor,
    is_masked: Tensor | None,
    weights: Tensor | None,
    denominator: Tensor | None,
    options: Options,
    gradient: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w loss, nll and correctness of the rows, [R] each, and their records.

    ``gradient`` (the logits themselves, if need be) is filled with that of sum w loss / denominator.
    """
    losses, nll, correct, records = _allocate(logits, targets.numel(), options)
    if targets.numel():
        num_pieces = records.shape[1]
        arguments = _arguments(logits, targets, is_masked, weights, records, options)
        with torch.cuda.device_of(logits):  # Triton launches on the current device
            if num_pieces > 1:
                _records_kernel[(targets.numel(), num_pieces)](**arguments)
            _launch_rows(
                arguments,
                options,
                num_pieces=num_pieces if num_pieces > 1 else 0,
                losses=(losses, nll, correct),
                gradient=gradient,
                denominator=denominator,
            )
    return losses, nll, correct, records


def is_plain(x: Tensor) -> bool:
    """Whether x may be written in place unseen: not while something traces it."""
    return type(x) is Tensor


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a float32 scalar on the device; x, contiguous, is not touched where it is 1."""
    if x.numel():
        with torch.cuda.device_of(x):
            _scale_kernel[(triton.cdiv(x.numel(), _SCALE_BLOCK),)](x, factor, x.numel(), BLOCK=_SCALE_BLOCK)


def _new_gradient(logits: Tensor) -> Tensor:
    """Room for it, contiguous: rows of logits may overlap."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


def _forward(
    logits: Tensor,
    targets: Tensor,
    is_masked: Tensor | None,
    weights: Tensor | None,
    denominator: Tensor | None,
    options: Options,
    reduction: str,
    gradient: Tensor | None,
) -> Outputs:
    """loss by the reduction, nll, correct, records."""
    losses, *others = losses_and_gradient(logits, targets, is_masked, weights, denominator, options, gradient)
    loss = losses if reduction == "none" else losses.sum()
    return loss if denominator is None else loss / denominator, *others


def _fake(logits: Tensor, targets: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    *_, reduction, with_gradient, _ = args
    losses, nll, correct, records = _allocate(logits, targets.numel(), Options(*args[3:8]))
    loss = losses if reduction == "none" else losses.new_empty(())
    return loss, nll, correct, records, _new_gradient(logits) if with_gradient else logits.new_empty(0)


@operator("masked_cross_entropy", _fake)
def _operation(
    logits: Tensor,
    targets: Tensor,
    is_masked: Tensor | None,
    weights: Tensor | None,
    denominator: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    exclude_id: int,
    with_correct: bool,
    reduction: str,
    with_gradient: bool,
    inplace_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = Options(label_smoothing, z_loss, softcap, exclude_id, with_correct)
    gradient = _new_gradient(logits) if with_gradient else None
    outputs = _forward(logits, targets, is_masked, weights, denominator, options, reduction, gradient)
    return *outputs, logits.new_empty(0) if gradient is None else gradient


@operator("masked_cross_entropy_gradient_", mutates=("gradient",))
def _gradient_operation(
    gradient: Tensor,
    logits: Tensor | None,
    targets: Tensor,
    is_masked: Tensor | None,
    weights: Tensor | None,
    denominator: Tensor | None,
    records: Tensor,
    upstream: Tensor,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    exclude_id: int,
    holds_unit: bool,
) -> None:
    """The gradient for what comes from above, [] or [R]. Logits None: they lie where it goes. ``holds_unit``:
    the buffer holds what an upstream gradient of 1 asks for, and is left alone if that is what comes."""
    if targets.numel():
        options = Options(label_smoothing, z_loss, softcap, exclude_id, with_correct=False)
        logits = gradient if logits is None else logits
        with torch.cuda.device_of(gradient):
            _launch_rows(
                _arguments(logits, targets, is_masked, weights, records, options),
                options,
                num_pieces=records.shape[1],
                gradient=gradient,
                denominator=denominator,
                upstream=upstream,
                holds_unit=holds_unit,
            )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, label_smoothing, z_loss, softcap, exclude_id, _, _, with_gradient, inplace_grad = inputs
    _, nll, correct, records, gradient = output
    ctx.mark_non_differentiable(nll, correct, records, gradient)
    ctx.save_for_backward(*tensors, records, gradient)
    ctx.options = label_smoothing, z_loss, softcap, exclude_id
    ctx.holds_unit = with_gradient
    ctx.inplace_grad = inplace_grad


@first_order_only
def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    logits, targets, is_masked, weights, denominator, records, gradient = ctx.saved_tensors
    holds_unit, ctx.holds_unit = ctx.holds_unit and is_plain(gradient), False
    if holds_unit:
        # Given away once: a second backward makes its own. Under detach() it would find a changed version.
        gradient = gradient.data
    elif ctx.inplace_grad:
        gradient, logits = logits.detach(), None
    else:
        gradient = _new_gradient(logits)
    _gradient_operation(
        gradient, logits, targets, is_masked, weights, denominator, records, grad_loss, *ctx.options, holds_unit
    )
    return gradient, *[None] * 12


differentiable(_operation, _backward, _setup_context)


def _inplace_fake(logits: Tensor, targets: Tensor, *args: Any) -> Outputs:
    losses, nll, correct, records = _allocate(logits, targets.numel(), Options(*args[3:8]))
    return losses.new_empty(()), nll, correct, records


@operator("masked_cross_entropy_", _inplace_fake, mutates=("logits",))
def _inplace_operation(
    logits: Tensor,
    targets: Tensor,
    is_masked: Tensor | None,
    weights: Tensor | None,
    denominator: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    exclude_id: int,
    with_correct: bool,
) -> Outputs:
    """The losses' sum (over the denominator), with its gradient where the logits were."""
    options = Options(label_smoothing, z_loss, softcap, exclude_id, with_correct)
    return _forward(logits, targets, is_masked, weights, denominator, options, "sum", logits)


class _InPlace(torch.autograd.Function):
    """An operation that writes to its input cannot register a derivative of its own."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        loss, nll, correct, _ = _inplace_operation(logits, *arguments)
        ctx.save_for_backward(logits)
        ctx.mark_non_differentiable(nll, correct)
        ctx.num_arguments = len(arguments)
        ctx.is_spent = False
        return loss, nll, correct

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.is_spent:
            raise RuntimeError(
                "inplace_grad=True gave the logits' memory to the first backward; leave it out to run a second one"
            )
        ctx.is_spent = True
        gradient = ctx.saved_tensors[0].detach()
        scale_(gradient, grad_loss)
        return gradient, *[None] * ctx.num_arguments


def masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    is_masked: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    reduction: str,
    denominator: Tensor | float | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    exclude_id: int | None,
    with_correct: bool,
    inplace_grad: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See the twin, ``fastmask.reference.masked_cross_entropy``: same arguments, same outputs."""
    if reduction == "mean":
        denominator = as_denominator(denominator, targets, is_masked, weights)
    exclude_id = -1 if exclude_id is None else exclude_id
    options = Options(label_smoothing, z_loss, softcap or 0.0, exclude_id, with_correct)
    # A float16 gradient formed before the loss scale arrives would underflow, and that of single losses needs
    # what comes from above. Compiled, a buffer that backward corrects in place would be copied first.
    in_forward = (
        logits.requires_grad
        and torch.is_grad_enabled()
        and reduction != "none"
        and logits.dtype != torch.float16
        and not torch.compiler.is_compiling()
    )
    inplace_grad = inplace_grad and logits.is_contiguous() and not torch.compiler.is_compiling()
    logits = logits if logits.ndim <= 3 else logits.flatten(0, -2)
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    flat = [x if x is None else x.flatten() for x in (targets, is_masked, weights)]
    if in_forward and inplace_grad:
        loss, nll, correct = _InPlace.apply(logits, *flat, denominator, *options)
    else:
        loss, nll, correct, _, _ = _operation(
            logits, *flat, denominator, *options, reduction, in_forward, inplace_grad
        )
    loss = loss.view(targets.shape) if reduction == "none" else loss
    return loss, nll.view(targets.shape), correct.view(targets.shape) if with_correct else None


def rows_that_count(targets: Tensor, is_masked: Tensor | None, weights: Tensor | None) -> Tensor:
    """Which rows are masked and of a weight other than 0; bool, as targets."""
    if weights is None:
        return torch.ones_like(targets, dtype=torch.bool) if is_masked is None else is_masked
    return weights != 0 if is_masked is None else is_masked & (weights != 0)


def as_denominator(
    denominator: Tensor | float | None, targets: Tensor, is_masked: Tensor | None, weights: Tensor | None
) -> Tensor:
    """What a mean divides by, [] float32 on the device: the number of rows that count, or what was given."""
    if isinstance(denominator, Tensor):
        return denominator
    if denominator is None:
        return rows_that_count(targets, is_masked, weights).sum().clamp(min=1).float()
    return torch.full((), float(denominator), dtype=torch.float32, device=targets.device)
