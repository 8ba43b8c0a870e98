"""Losses and gradient of rows that are so short that a program does several: a tile of them, read once."""

from __future__ import annotations

import triton
import triton.language as tl

from fastmask.kernels import _logit_rows as logit_rows
from fastmask.kernels import _math
from fastmask.kernels import _row_softmax as row_softmax


@triton.jit
def _reduce(row, x, offs_v, in_v, label_smoothing, WITH_CORRECT: tl.constexpr):
    """The records of rows, all columns of which are one row of x [rows, columns]."""
    z = tl.where(in_v, row_softmax.capped(x, row.softcap), -float("inf"))
    others = tl.where(offs_v != row.target[:, None], z, -float("inf"))
    if row.exclude_id is not None:
        in_v = in_v & (offs_v != row.exclude_id)
        others = tl.where(offs_v != row.exclude_id, others, -float("inf"))
    largest = tl.max(others, 1)
    shift = row_softmax.finite(largest)
    total = tl.sum(_math.exp_from(others, shift[:, None]), 1) * _math.over_exp_from(shift)
    gaps, columns, largest_before = None, None, None
    if label_smoothing is not None:
        gaps = tl.sum(tl.where(in_v, z - shift[:, None], 0.0), 1)
        columns = tl.sum(in_v.to(tl.float32), 1)
    if WITH_CORRECT:
        largest_before = tl.max(tl.where(offs_v < row.target[:, None], others, -float("inf")), 1)
    return row_softmax.Record(largest, total, gaps, columns, largest_before, row_softmax.target_logit(row))


@triton.jit
def _gradient(row, parts, x, offs_v):
    """The gradient of rows by their logits x [rows, columns]."""
    row = row_softmax.Row(row.x_ptr, row.start, row.V, row.target[:, None], row.softcap, row.exclude_id)
    uniform = parts.uniform[:, None] if parts.uniform is not None else None
    parts = row_softmax.GradientParts(parts.shift[:, None], parts.factor[:, None], uniform, parts.at_target[:, None])
    return row_softmax.gradient_tile(x, offs_v, 0, None, row, parts)


@triton.jit(do_not_specialize=["offset_x", "offset_g", "stride_u", "num_rows", "N", "V", "exclude_id"])
def short_rows_kernel(
    x_ptr,
    offset_x,
    stride_xb,
    stride_xn,
    targets_ptr,
    is_masked_ptr,
    weights_ptr,
    losses_ptr,  # with nll_ptr; None where only the gradient is wanted
    nll_ptr,
    correct_ptr,
    gradient_ptr,
    offset_g,
    stride_gb,
    stride_gn,
    upstream_ptr,
    stride_u,
    denominator_ptr,
    num_rows,
    N,
    V,
    exclude_id,
    label_smoothing,
    z_loss,
    softcap,
    HOLDS_UNIT: tl.constexpr,  # the gradient buffer holds what an upstream gradient of 1 asks for
    ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # This program, one warp, does ROWS rows: losses and gradient. Unmasked rows are not read, and their gradient is
    # zeroed. One warp has read all rows when it begins to write, perhaps in place.
    index = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = index < num_rows
    index = tl.minimum(index, num_rows - 1)
    if HOLDS_UNIT:
        if tl.load(upstream_ptr) == 1.0:
            return
    scale = row_softmax.load_scale(index, upstream_ptr, stride_u, denominator_ptr)
    counts, weight, target = row_softmax.load_target(index, targets_ptr, is_masked_ptr, weights_ptr, V)
    x_ptr -= offset_x
    start = logit_rows.row_start(index, N, offset_x, stride_xb, stride_xn)
    row = row_softmax.Row(x_ptr, start, V, target, softcap, exclude_id)
    offs_v = tl.arange(0, BLOCK_V)[None, :]
    in_v = offs_v < V
    x = tl.load(x_ptr + start[:, None] + offs_v, mask=counts[:, None] & in_v, other=0.0)
    record = _reduce(row, x, offs_v, in_v, label_smoothing, correct_ptr is not None)
    num_allowed = V - 1 if exclude_id is not None else V
    loss, nll, parts = row_softmax.loss_and_parts(record, num_allowed, label_smoothing, z_loss)
    if losses_ptr is not None:
        tl.store(losses_ptr + index, tl.where(counts, loss * weight, 0.0), mask=in_rows)
        tl.store(nll_ptr + index, tl.where(counts, nll, 0.0), mask=in_rows)
        if correct_ptr is not None:
            tl.store(correct_ptr + index, counts & row_softmax.is_correct(record, nll), mask=in_rows)
    if gradient_ptr is not None:
        gradient = _gradient(row, row_softmax.times(parts, scale * weight), x, offs_v)
        gradient = _math.rounded(tl.where(counts[:, None], gradient, 0.0), gradient_ptr.dtype.element_ty)
        g_start = logit_rows.row_start(index, N, offset_g, stride_gb, stride_gn)
        tl.store(gradient_ptr - offset_g + g_start[:, None] + offs_v, gradient, mask=in_rows[:, None] & in_v)
