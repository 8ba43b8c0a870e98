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

from fastmask._autograd import first_order_only, without_autocast
from fastmask.records import CrossEntropy, LinearLogits, LossOptions, LossRows, Reduction
from fastmask.reference.masked_cross_entropy import (
    CHUNK_ROWS,
    CountedRows,
    RowLosses,
    chunk_losses_,
    chunk_rows,
    scaled,
)
from fastmask.vocabulary_parallel import Columns


class _Wanted(NamedTuple):
    """Which gradients are wanted."""

    embeddings: bool
    weight: bool
    bias: bool


_NOTHING = _Wanted(False, False, False)


class _Pass(NamedTuple):
    """One pass over the rows: losses [M, 1], unweighted, then gradients (None where not wanted) of embeddings [M, D],
    weight and bias."""

    losses: RowLosses
    by_embeddings: Tensor | None
    by_weight: Tensor | None
    by_bias: Tensor | None


def _head_pass(logits: LinearLogits, rows: CountedRows, wanted: _Wanted, dtype: torch.dtype) -> _Pass:
    """Losses of the rows, and the gradients wanted of sum_m coefficients_m loss_m, by products of that dtype. The
    gradients of weight and bias are summed in the coefficients'."""
    embeddings, accumulator, with_gradient = logits.embeddings, rows.coefficients.dtype, any(wanted)
    weight, bias = logits.weight.to(dtype), None if logits.bias is None else logits.bias.to(dtype)
    by_embeddings = weight.new_empty(rows.targets.shape[0], weight.shape[-1]) if wanted.embeddings else None
    by_weight = by_bias = None
    losses = []
    with without_autocast(embeddings.device.type):  # it would leak into the float32 parts, of backward too
        for chunk, of_chunk in rows.parts(CHUNK_ROWS):
            x = embeddings[chunk] if of_chunk.indices is None else embeddings.index_select(0, of_chunk.indices)
            x = x.to(dtype)
            z = torch.nn.functional.linear(x, weight, bias)
            for part, of_part in of_chunk.parts(chunk_rows(z, rows.columns)):
                logits_of_part = z[part]
                found, gradient = chunk_losses_(
                    logits_of_part, of_part, with_gradient, logits_of_part if dtype == accumulator else None
                )
                losses.append(found)
                if gradient is not None and dtype != accumulator:  # else it lies there
                    logits_of_part.copy_(gradient)
            if by_embeddings is not None:
                torch.mm(z, weight, out=by_embeddings[chunk])
            if wanted.weight:
                by_weight = _added(by_weight, z.mT, x, accumulator)
            if wanted.bias:
                by_bias = z.sum(dim=0, dtype=accumulator) + (0.0 if by_bias is None else by_bias)
    if by_embeddings is not None and rows.columns is not None:
        rows.columns.add_up_(by_embeddings)
    return _Pass(RowLosses.joined(losses), by_embeddings, by_weight, by_bias)


def _added(total: Tensor | None, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """total + a b, in place of a total of that dtype; None for 0."""
    if total is None:
        return (a @ b).to(dtype)
    return total.addmm_(a, b) if a.dtype == dtype else total.add_(a @ b)


class _LinearRows(torch.autograd.Function):
    """coefficients_m * loss_m over the rows: their sum where is_reduced, else [M, 1]. Products are of ``dtype``.

    Gradients of a sum are formed in forward; anew for a second backward, since the first gave them away.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: CountedRows,
        dtype: torch.dtype,
        is_reduced: bool,
        with_grad: bool,
    ) -> Any:
        by_embeddings, by_weight, by_bias, *_ = ctx.needs_input_grad
        ctx.wanted = _Wanted(by_embeddings, by_weight, by_bias) if with_grad else _NOTHING
        # A float16 gradient formed before the loss scale arrives would underflow.
        ctx.has_gradients = is_reduced and dtype != torch.float16
        out = _head_pass(
            LinearLogits(embeddings, weight, bias), rows, ctx.wanted if ctx.has_gradients else _NOTHING, dtype
        )
        gradients = out.by_embeddings, out.by_weight, out.by_bias
        ctx.save_for_backward(embeddings, weight, bias, rows.indices, rows.targets, rows.coefficients, *gradients)
        ctx.dtype, ctx.options, ctx.columns = dtype, rows.options, rows.columns
        ctx.like = embeddings.shape, embeddings.dtype, weight.dtype
        ctx.mark_non_differentiable(out.losses.nll)
        loss = out.losses.loss * rows.coefficients
        return loss.sum() if is_reduced else loss, out.losses.nll, out.losses.correct

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        embeddings, weight, bias, indices, targets, coefficients, *gradients = ctx.saved_tensors
        if ctx.has_gradients:  # under detach() they would be known by their versions
            by_embeddings, by_weight, by_bias = (g if g is None else scaled(g.data, grad) for g in gradients)
            ctx.has_gradients = False
        else:
            options = ctx.options._replace(with_correct=False)
            rows = CountedRows(indices, targets, coefficients * grad, options, ctx.columns)
            out = _head_pass(LinearLogits(embeddings, weight, bias), rows, ctx.wanted, ctx.dtype)
            by_embeddings, by_weight, by_bias = out.by_embeddings, out.by_weight, out.by_bias
        shape, embeddings_dtype, weight_dtype = ctx.like
        if by_embeddings is not None:
            by_embeddings = by_embeddings.to(embeddings_dtype)
            if indices is not None:
                by_embeddings = by_embeddings.new_zeros(shape).index_copy_(0, indices, by_embeddings)
        return (
            by_embeddings,
            None if by_weight is None else by_weight.to(weight_dtype),
            None if by_bias is None else by_bias.to(weight_dtype),
            None,
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
    device_type = embeddings.device.type
    autocast = torch.is_autocast_enabled(device_type) and embeddings.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device_type) if autocast else embeddings.dtype
    is_reduced, accumulator = reduction.kind != "none", torch.promote_types(embeddings.dtype, torch.float32)
    counted = CountedRows.of(rows, reduction, options, columns, accumulator)
    loss, nll, correct = _LinearRows.apply(
        embeddings.flatten(0, -2), logits.weight, logits.bias, counted, dtype, is_reduced, torch.is_grad_enabled()
    )
    if not is_reduced:
        loss = counted.scattered(loss, targets.shape)
    if num_masked is not None:
        falls_short = len(nll) > num_masked if row_indices is None else bool((row_indices[num_masked:] >= 0).any())
        loss = loss * torch.nan if falls_short else loss  # and so are its gradients
    return CrossEntropy(
        loss,
        counted.scattered(nll, targets.shape),
        None if correct is None else counted.scattered(correct, targets.shape),
    )
