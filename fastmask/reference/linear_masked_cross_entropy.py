"""Head and masked cross-entropy in one: logits exist for one chunk of masked rows at a time.

The loss is that of ``masked_cross_entropy`` at logits = embeddings weight^T + bias. For ``sum`` and
``mean`` the gradients are formed in forward while the chunk's logits are alive (three matrix products
in all); for ``none`` the incoming gradient is not known then and backward recomputes the logits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask._autograd import first_order_only
from fastmask.reference.masked_cross_entropy import (
    CrossEntropy,
    active_rows,
    chunk_losses_,
    chunk_rows,
    mean_denominator,
    scatter_rows,
)

# Rows of a chunk: enough for the matrix products, few enough for memory (1024 x 50257 float32: 196 MiB).
CHUNK_ROWS = 1024


class _Pass(NamedTuple):
    """One pass over the masked rows: losses [M] each, then gradients (None where not wanted)."""

    loss: Tensor
    nll: Tensor
    correct: Tensor
    grad_rows: Tensor | None
    grad_weight: Tensor | None
    grad_bias: Tensor | None


def _head_pass(
    embeddings: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    rows: Tensor,
    coefficients: Tensor,
    dtype: torch.dtype,
    wants: tuple[bool, bool, bool],
    options: dict[str, Any],
) -> _Pass:
    """Losses of the masked rows, and sum_m coefficients_m d loss_m by (rows, weight, bias) as wanted.

    The products are taken in ``dtype``; weight and bias gradients accumulate in the coefficients' dtype.
    """
    wants_rows, wants_weight, wants_bias = wants
    accumulator = coefficients.dtype
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    grad_rows = weight.new_empty(len(rows), embeddings.shape[-1]) if wants_rows else None
    grad_weight = torch.zeros_like(weight, dtype=accumulator) if wants_weight else None
    grad_bias = weight.new_zeros(len(weight), dtype=accumulator) if wants_bias else None
    losses = []
    for start in range(0, max(1, len(rows)), CHUNK_ROWS):
        chunk = slice(start, start + CHUNK_ROWS)
        x, y = embeddings[rows[chunk]].to(dtype), targets[rows[chunk]]
        logits = F.linear(x, weight, bias)
        size = chunk_rows(logits)
        for z_part, y_part, c_part in zip(
            logits.split(size), y.split(size), coefficients[chunk].split(size), strict=True
        ):
            out = chunk_losses_(z_part, y_part, with_gradient=any(wants), **options)
            losses.append((out.loss, out.nll, out.correct))
            if out.gradient is not None:  # it takes the place of the logits
                z_part.copy_(out.gradient.mul_(c_part[:, None]))
        if grad_rows is not None:
            grad_rows[chunk] = logits @ weight
        if grad_weight is not None:
            grad_weight += logits.mT @ x
        if grad_bias is not None:
            grad_bias += logits.sum(dim=0, dtype=accumulator)
    loss, nll, correct = map(torch.cat, zip(*losses, strict=True))
    return _Pass(loss, nll, correct, grad_rows, grad_weight, grad_bias)


class _LinearRows(torch.autograd.Function):
    """coefficients_m * loss_m over the masked rows: summed where ``reduce``, else [M]."""

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        rows: Tensor,
        coefficients: Tensor,
        dtype: torch.dtype,
        reduce: bool,
        with_grad: bool,
        options: dict[str, Any],
    ) -> Any:
        ctx.wants = tuple(needed and with_grad for needed in ctx.needs_input_grad[:3])
        ctx.dtype, ctx.options = dtype, options
        # A float16 gradient formed before the loss scale arrives would underflow.
        ctx.in_forward = reduce and dtype != torch.float16
        wants = ctx.wants if ctx.in_forward else (False, False, False)
        out = _head_pass(embeddings, weight, bias, targets, rows, coefficients, dtype, wants, options)
        if ctx.in_forward:
            ctx.save_for_backward(rows, out.grad_rows, out.grad_weight, out.grad_bias)
            ctx.like = embeddings.shape, embeddings.dtype, weight.dtype
        else:
            ctx.save_for_backward(embeddings, weight, bias, targets, rows, coefficients)
        loss = out.loss * coefficients
        ctx.mark_non_differentiable(out.nll, out.correct)
        return loss.sum() if reduce else loss, out.nll, out.correct

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        if ctx.in_forward:
            rows, *gradients = ctx.saved_tensors
            shape, embeddings_dtype, weight_dtype = ctx.like
            grad_rows, grad_weight, grad_bias = (g if g is None else g * grad for g in gradients)
        else:
            embeddings, weight, bias, targets, rows, coefficients = ctx.saved_tensors
            shape, embeddings_dtype, weight_dtype = embeddings.shape, embeddings.dtype, weight.dtype
            options = {**ctx.options, "with_correct": False}
            out = _head_pass(
                embeddings, weight, bias, targets, rows, coefficients * grad, ctx.dtype, ctx.wants, options
            )
            grad_rows, grad_weight, grad_bias = out.grad_rows, out.grad_weight, out.grad_bias
        if grad_rows is not None:
            grad_rows = grad_rows.new_zeros(shape, dtype=embeddings_dtype).index_copy_(
                0, rows, grad_rows.to(embeddings_dtype)
            )
        return (
            grad_rows,
            None if grad_weight is None else grad_weight.to(weight_dtype),
            None if grad_bias is None else grad_bias.to(weight_dtype),
            *[None] * 7,
        )


def linear_masked_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    is_masked: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    row_indices: Tensor | None,
    num_masked: int | None,
    reduction: str,
    denominator: Tensor | float | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    exclude_id: int | None,
    with_correct: bool,
) -> CrossEntropy:
    """The twin of ``kernels/linear_masked_cross_entropy.py``.

    Args:
        embeddings: [..., D] floating point.
        weight, bias: [V, D] and [V] of the same dtype, or no bias. Under autocast the products are
            taken in its dtype, and the gradients come back in the arguments' own.
        targets, is_masked, weights: as in ``masked_cross_entropy``.
        row_indices: [K] int64, in place of is_masked: flat positions of the masked rows, then -1.
        num_masked: an upper bound of their number; the loss is NaN where there are more.
    """
    if row_indices is not None:
        row_indices = row_indices[row_indices >= 0]
        is_masked = torch.zeros_like(targets, dtype=torch.bool).flatten()
        is_masked = is_masked.index_fill_(0, row_indices, True).view(targets.shape)
    rows, row_weights = active_rows(targets, is_masked, weights)
    accumulator = torch.promote_types(embeddings.dtype, torch.float32)
    coefficients = embeddings.new_ones(len(rows), dtype=accumulator)
    if row_weights is not None:
        coefficients = row_weights.to(accumulator)
    if reduction == "mean":
        coefficients = coefficients / mean_denominator(rows, denominator)
    options = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "exclude_id": exclude_id,
        "with_correct": with_correct,
    }
    device_type = embeddings.device.type
    autocast = torch.is_autocast_enabled(device_type) and embeddings.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device_type) if autocast else embeddings.dtype
    # Autocast itself would leak into the float32 parts.
    with torch.autocast(device_type, enabled=False):
        loss, nll, correct = _LinearRows.apply(
            embeddings.flatten(0, -2),
            weight,
            bias,
            targets.flatten(),
            rows,
            coefficients,
            dtype,
            reduction != "none",
            torch.is_grad_enabled(),
            options,
        )
    if reduction == "none":
        loss = scatter_rows(loss, rows, targets.shape)
    if num_masked is not None and len(rows if row_indices is None else row_indices) > num_masked:
        loss = loss * torch.nan  # and so are its gradients
    return CrossEntropy(
        loss,
        scatter_rows(nll, rows, targets.shape),
        scatter_rows(correct, rows, targets.shape) if with_correct else None,
    )
