"""Head and masked cross-entropy in one: logits exist for one chunk of masked rows at a time.

The loss is that of ``masked_cross_entropy`` at logits = embeddings weight^T + bias. For ``sum`` and
``mean`` the gradients are formed in forward while the chunk's logits are alive (three matrix products
in all); for ``none`` the incoming gradient is not known then and backward recomputes the logits.

Where the vocabulary is split over ranks, each has its rows of weight and bias, and their gradients; the embeddings'
gradient is summed over the ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask._autograd import first_order_only
from fastmask.records import CrossEntropy, LinearLogits, LossOptions, LossRows, Reduction
from fastmask.reference.masked_cross_entropy import (
    CHUNK_ROWS,
    RowLosses,
    chunk_losses_,
    chunk_rows,
    coefficients_of,
    counted_indices,
    joined,
    scaled,
    scatter_rows,
)
from fastmask.vocabulary_parallel import Columns


class _HeadRows(NamedTuple):
    """The M rows that count, and what is made of their losses.

    targets: [R]. indices: [M], which rows. coefficients: [M], what each loss is multiplied by, in the dtype that the
    gradients of weight and bias are summed in. dtype: of the products. columns: those of this rank; None for all.
    """

    targets: Tensor
    indices: Tensor
    coefficients: Tensor
    dtype: torch.dtype
    options: LossOptions
    columns: Columns | None


class _Wanted(NamedTuple):
    """Which gradients are wanted."""

    embeddings: bool
    weight: bool
    bias: bool


class _Pass(NamedTuple):
    """One pass over the rows: losses [M], unweighted, then gradients (None where not wanted) of embeddings [M, D],
    weight and bias."""

    losses: RowLosses
    by_embeddings: Tensor | None
    by_weight: Tensor | None
    by_bias: Tensor | None


def _head_pass(logits: LinearLogits, rows: _HeadRows, wanted: _Wanted) -> _Pass:
    """Losses of the rows, and the gradients wanted of sum_m coefficients_m loss_m."""
    embeddings, indices, accumulator = logits.embeddings, rows.indices, rows.coefficients.dtype
    weight, bias = logits.weight.to(rows.dtype), None if logits.bias is None else logits.bias.to(rows.dtype)
    by_embeddings = weight.new_empty(len(indices), embeddings.shape[-1]) if wanted.embeddings else None
    by_weight = by_bias = None
    losses = []
    for start in range(0, max(1, len(indices)), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        x, y = embeddings.index_select(0, indices[chunk]).to(rows.dtype), rows.targets.index_select(0, indices[chunk])
        z = torch.nn.functional.linear(x, weight, bias)
        size = chunk_rows(z, rows.columns)
        coefficients = rows.coefficients[chunk].split(size)
        for z_part, y_part, c_part in zip(z.split(size), y.split(size), coefficients, strict=True):
            out = chunk_losses_(z_part, y_part, rows.options, rows.columns, c_part if any(wanted) else None)
            losses.append(out._replace(gradient=None))
            if out.gradient is not None and out.gradient.dtype != z_part.dtype:  # else it lies there
                z_part.copy_(out.gradient)
        if by_embeddings is not None:
            by_embeddings[chunk] = z @ weight
        if wanted.weight:
            by_weight = _added(by_weight, z.mT, x, accumulator)
        if wanted.bias:
            by_bias = z.sum(dim=0, dtype=accumulator) + (0.0 if by_bias is None else by_bias)
    if by_embeddings is not None and rows.columns is not None:
        rows.columns.add_up_(by_embeddings)
    return _Pass(joined(losses), by_embeddings, by_weight, by_bias)


def _added(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a b, in place of a total of that dtype; None for 0."""
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if a.dtype == dtype else total.add_(a @ b)


class _LinearRows(torch.autograd.Function):
    """coefficients_m * loss_m over the rows: their sum where is_reduced, else [M].

    Gradients of a sum are formed in forward; anew for a second backward, since the first gave them away.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: _HeadRows,
        is_reduced: bool,
        with_grad: bool,
    ) -> Any:
        by_embeddings, by_weight, by_bias, *_ = (needed and with_grad for needed in ctx.needs_input_grad)
        ctx.wanted = _Wanted(by_embeddings, by_weight, by_bias)
        # A float16 gradient formed before the loss scale arrives would underflow.
        ctx.has_gradients = is_reduced and rows.dtype != torch.float16
        wanted = ctx.wanted if ctx.has_gradients else _Wanted(False, False, False)
        out = _head_pass(LinearLogits(embeddings, weight, bias), rows, wanted)
        gradients = out.by_embeddings, out.by_weight, out.by_bias
        ctx.save_for_backward(embeddings, weight, bias, rows.targets, rows.indices, rows.coefficients, *gradients)
        ctx.dtype, ctx.options, ctx.columns = rows.dtype, rows.options._replace(with_correct=False), rows.columns
        ctx.like = embeddings.shape, embeddings.dtype, weight.dtype
        loss = out.losses.loss * rows.coefficients
        ctx.mark_non_differentiable(out.losses.nll, out.losses.correct)
        return loss.sum() if is_reduced else loss, out.losses.nll, out.losses.correct

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        embeddings, weight, bias, targets, indices, coefficients, *gradients = ctx.saved_tensors
        if ctx.has_gradients:  # under detach() they would be known by their versions
            by_embeddings, by_weight, by_bias = (g if g is None else scaled(g.data, grad) for g in gradients)
            ctx.has_gradients = False
        else:
            rows = _HeadRows(targets, indices, coefficients * grad, ctx.dtype, ctx.options, ctx.columns)
            out = _head_pass(LinearLogits(embeddings, weight, bias), rows, ctx.wanted)
            by_embeddings, by_weight, by_bias = out.by_embeddings, out.by_weight, out.by_bias
        shape, embeddings_dtype, weight_dtype = ctx.like
        if by_embeddings is not None:
            by_embeddings = by_embeddings.new_zeros(shape, dtype=embeddings_dtype).index_copy_(
                0, indices, by_embeddings.to(embeddings_dtype)
            )
        return (
            by_embeddings,
            None if by_weight is None else by_weight.to(weight_dtype),
            None if by_bias is None else by_bias.to(weight_dtype),
            None,
            None,
            None,
        )


def linear_masked_cross_entropy(
    logits: LinearLogits,
    rows: LossRows,
    reduction: Reduction,
    options: LossOptions,
    row_indices: Tensor | None,
    num_masked: int | None,
) -> CrossEntropy:
    """What ``kernels/linear_masked_cross_entropy.py`` is held to.

    Args:
        logits: embeddings [..., D] floating point, weight and bias of the same dtype; scale 1. Under autocast the
            products are taken in its dtype, and the gradients come back in the arguments' own.
        rows: of shape [...], as in ``masked_cross_entropy``.
        row_indices: [K] int64, in place of is_masked: flat positions of the masked rows, and -1.
        num_masked: an upper bound of their number, or of the entries that list them; the loss is NaN where there are
            more.
    """
    return of_columns(logits, rows, reduction, options, row_indices, num_masked, None)


def of_columns(
    logits: LinearLogits,
    rows: LossRows,
    reduction: Reduction,
    options: LossOptions,
    row_indices: Tensor | None,
    num_masked: int | None,
    columns: Columns | None,
) -> CrossEntropy:
    """The same of a weight [width, D] and a bias [width], for those columns that this rank has; None for all."""
    targets, embeddings = rows.targets, logits.embeddings
    if row_indices is not None:
        listed = row_indices[row_indices >= 0]
        is_masked = torch.zeros_like(targets, dtype=torch.bool).flatten()
        rows = rows._replace(is_masked=is_masked.index_fill_(0, listed, True).view(targets.shape))
    indices = counted_indices(rows)
    accumulator = torch.promote_types(embeddings.dtype, torch.float32)
    device_type = embeddings.device.type
    autocast = torch.is_autocast_enabled(device_type) and embeddings.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device_type) if autocast else embeddings.dtype
    is_reduced = reduction.kind != "none"
    coefficients = coefficients_of(rows, indices, reduction, accumulator)
    head_rows = _HeadRows(targets.flatten(), indices, coefficients, dtype, options, columns)
    # Autocast itself would leak into the float32 parts.
    with torch.autocast(device_type, enabled=False):
        loss, nll, correct = _LinearRows.apply(
            embeddings.flatten(0, -2), logits.weight, logits.bias, head_rows, is_reduced, torch.is_grad_enabled()
        )
    if not is_reduced:
        loss = scatter_rows(loss, indices, targets.shape)
    if num_masked is not None:
        falls_short = (
            len(indices) > num_masked if row_indices is None else bool((row_indices[num_masked:] >= 0).any())
        )
        loss = loss * torch.nan if falls_short else loss  # and so are its gradients
    return CrossEntropy(
        loss,
        scatter_rows(nll, indices, targets.shape),
        scatter_rows(correct, indices, targets.shape) if options.with_correct else None,
    )
