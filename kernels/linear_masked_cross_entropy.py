"""Head and masked cross-entropy in one: logits exist for one chunk of masked rows at a time.

Per chunk three matrix products, which are cuBLAS's, around the kernels of ``masked_cross_entropy``, which put
the gradient in the logits' place: z = x W^T + b, dx = g W, dW += g^T x. Where the gradient that comes from
above is needed first (reduction none, float16) backward goes through the chunks again, a fourth product.

``fastmask/reference/linear_masked_cross_entropy.py`` is the specification. Memory besides what goes in and out:
one chunk of logits, of embeddings and of their gradient; dW in float32 where it is a sum over chunks. Saved for
backward: the arguments and the gradients.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastmask._autograd import first_order_only
from fastmask.kernels._operator import differentiable, operator
from fastmask.kernels.masked_cross_entropy import (
    Options,
    as_denominator,
    is_plain,
    losses_and_gradient,
    rows_that_count,
    scale_,
)

# Masked rows at once, at most; the chunks of a call are of one size, so more than half as many where there are
# several: enough to keep the tensor cores busy, and adding a chunk's dW to the sum (8 V D bytes) stays a small
# part of its products (6 V D flops a row).
CHUNK_ROWS = 8192


class Arguments(NamedTuple):
    """The operation's tensors: R rows of which those masked are in the loss."""

    embeddings: Tensor  # [R, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    targets: Tensor  # [R]
    is_masked: Tensor | None  # [R]
    weights: Tensor | None  # [R] float32
    denominator: Tensor | None  # [] float32
    row_indices: Tensor | None  # [K] int64, in place of is_masked


class Gradients(NamedTuple):
    """By embeddings, weight and bias, in their dtypes; empty where not wanted."""

    embeddings: Tensor
    weight: Tensor
    bias: Tensor


def chunk_sizes(num_rows: int) -> list[int]:
    """How many rows each chunk has."""
    num_chunks = triton.cdiv(num_rows, CHUNK_ROWS)
    return [num_rows // num_chunks + (i < num_rows % num_chunks) for i in range(num_chunks)]


def _masked_rows(arguments: Arguments, num_masked: int | None) -> tuple[Tensor, Tensor | None]:
    """The rows that count, [M], with -1 where ``num_masked`` exceeds them, and whether it falls short, [] bool.

    Without ``num_masked`` the host waits for the device to count; in a capture, where it cannot, no row is left out.
    """
    targets, row_indices = arguments.targets, arguments.row_indices
    if num_masked is None and _is_captured(targets):
        num_masked = len(targets)
    if row_indices is not None:
        if num_masked is None:
            return row_indices[: int((row_indices >= 0).sum())], None
        return row_indices[:num_masked], (row_indices[num_masked:] >= 0).any()
    if num_masked is None and arguments.is_masked is None and arguments.weights is None:
        return torch.arange(len(targets), device=targets.device), None
    counts = rows_that_count(targets, arguments.is_masked, arguments.weights)
    if num_masked is None:
        return counts.nonzero().squeeze(-1), None
    num_masked = min(num_masked, len(counts))
    return torch.nonzero_static(counts, size=num_masked, fill_value=-1).squeeze(-1), counts.sum() > num_masked


def _is_captured(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def _multiplies_into_float32(device_type: str, dtype: torch.dtype) -> bool:
    """Whether this torch adds a product of 16-bit factors to a float32 sum (not on a CPU, nor before torch 2.10)."""
    factor = torch.zeros(16, 16, dtype=dtype, device=device_type)
    total = torch.zeros(16, 16, dtype=torch.float32, device=device_type)
    try:
        torch.addmm(total, factor, factor, total.dtype, out=total)
    except (RuntimeError, TypeError):
        return False
    return True


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, is_first: bool) -> None:
    """total (+)= a b, kept in the total's dtype if that is wider than the factors'."""
    beta = 0.0 if is_first else 1.0
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=beta)
    elif _multiplies_into_float32(total.device.type, a.dtype):
        torch.addmm(total, a, b, total.dtype, beta=beta, out=total)
    elif is_first:
        total.copy_(a @ b)
    else:
        total += a @ b


def _chunked(
    arguments: Arguments,
    upstream: Tensor | None,
    options: Options,
    dtype: torch.dtype,
    num_masked: int | None,
    wants: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Gradients]:
    """w loss, nll and correctness of every row, [R] each, and the gradients wanted of sum upstream w loss / d."""
    embeddings, weight, bias, targets, _, weights, denominator, row_indices = arguments
    wants_embeddings, wants_weight, wants_bias = wants
    num_rows, num_ids = len(targets), len(weight)
    rows, falls_short = _masked_rows(arguments, num_masked)
    sizes = chunk_sizes(len(rows))
    cast_weight, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if upstream is not None:
        weights = upstream.expand(num_rows) if weights is None else weights * upstream
    if falls_short is not None:  # losses and gradients are NaN where the bound cuts rows off
        weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights
        weights = weights.masked_fill(falls_short, torch.nan)

    # One row more than there are: what belongs to no row goes there.
    losses, nll = (embeddings.new_zeros(num_rows + 1, dtype=torch.float32) for _ in range(2))
    correct = embeddings.new_zeros(num_rows + 1 if options.with_correct else 1, dtype=torch.bool)
    grad_embeddings = embeddings.new_zeros(num_rows + 1 if wants_embeddings else 1, embeddings.shape[1])
    new_total = torch.empty_like if sizes else torch.zeros_like
    total_dtype = dtype if len(sizes) == 1 and weight.dtype == dtype else torch.float32
    grad_weight = new_total(weight, dtype=total_dtype) if wants_weight else None
    grad_bias = new_total(bias, dtype=torch.float32) if bias is not None and wants_bias else None
    # Rows of logits begin at 16 bytes whatever V is.
    vector = 16 // dtype.itemsize
    buffer = cast_weight.new_empty(max(sizes, default=0), triton.cdiv(num_ids, vector) * vector)

    for index, part in enumerate(rows.split(sizes)):
        source, slot, counts = part, part, None
        if falls_short is not None:
            counts, source, slot = part >= 0, part.clamp(min=0), part.where(part >= 0, num_rows)
        part_weights = None if weights is None else weights.index_select(0, source)
        if row_indices is not None and part_weights is not None:
            counts = part_weights != 0 if counts is None else counts & (part_weights != 0)
        x = embeddings.index_select(0, source).to(dtype)
        if counts is not None:  # what is no masked row may hold NaN, and 0 NaN would reach dW
            x.masked_fill_(~counts[:, None], 0.0)
        logits = buffer[: len(part), :num_ids]
        if cast_bias is None:
            torch.mm(x, cast_weight.mT, out=logits)
        else:
            torch.addmm(cast_bias, x, cast_weight.mT, out=logits)
        part_losses, part_nll, part_correct, _ = losses_and_gradient(
            logits,
            targets.index_select(0, source),
            counts,
            part_weights,
            denominator,
            options,
            gradient=logits if any(wants) else None,
        )
        losses.index_copy_(0, slot, part_losses)
        nll.index_copy_(0, slot, part_nll)
        if options.with_correct:
            correct.index_copy_(0, slot, part_correct)
        if wants_embeddings:
            grad_embeddings.index_copy_(0, slot, torch.mm(logits, cast_weight).to(embeddings.dtype))
        if grad_weight is not None:
            _add_product(grad_weight, logits.mT, x, is_first=index == 0)
        if grad_bias is not None:
            part_bias = logits.sum(dim=0, dtype=torch.float32)
            grad_bias = part_bias if index == 0 else grad_bias.add_(part_bias)
    if falls_short is not None:
        losses.masked_fill_(falls_short, torch.nan)
    gradients = Gradients(
        grad_embeddings[:num_rows] if wants_embeddings else grad_embeddings[:0],
        weight.new_empty(0) if grad_weight is None else grad_weight.to(weight.dtype),
        weight.new_empty(0) if grad_bias is None else grad_bias.to(weight.dtype),
    )
    return losses[:num_rows], nll[:num_rows], correct[:num_rows] if options.with_correct else correct[:0], gradients


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _fake(embeddings: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *args: Any) -> Outputs:
    with_correct, reduction, *_, wants_embeddings, wants_weight, wants_bias = args[9:]
    num_rows = targets.shape[0]  # symbolic, as len() is not
    losses = embeddings.new_empty(num_rows, dtype=torch.float32)
    return (
        losses if reduction == "none" else losses.new_empty(()),
        torch.empty_like(losses),
        losses.new_empty(num_rows if with_correct else 0, dtype=torch.bool),
        embeddings.new_empty(embeddings.shape if wants_embeddings else (0, embeddings.shape[1])),
        torch.empty_like(weight) if wants_weight else weight.new_empty(0),
        torch.empty_like(bias) if bias is not None and wants_bias else weight.new_empty(0),
    )


@operator("linear_masked_cross_entropy", _fake)
def _operation(
    embeddings: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    is_masked: Tensor | None,
    weights: Tensor | None,
    denominator: Tensor | None,
    row_indices: Tensor | None,
    upstream: Tensor | None,
    label_smoothing: float,
    z_loss: float,
    softcap: float,
    exclude_id: int,
    with_correct: bool,
    reduction: str,
    dtype: torch.dtype,
    num_masked: int | None,
    wants_embeddings: bool,
    wants_weight: bool,
    wants_bias: bool,
) -> Outputs:
    """loss by the reduction, nll, correct; then the gradients wanted: by the loss, or with ``upstream`` ([], or
    [R] for none) by what that is the gradient of."""
    arguments = Arguments(embeddings, weight, bias, targets, is_masked, weights, denominator, row_indices)
    options = Options(label_smoothing, z_loss, softcap, exclude_id, with_correct)
    wants = wants_embeddings, wants_weight, wants_bias
    with torch.autocast(embeddings.device.type, enabled=False):  # it would reach the float32 parts
        losses, nll, correct, gradients = _chunked(arguments, upstream, options, dtype, num_masked, wants)
    loss = losses if reduction == "none" else losses.sum()
    return loss if denominator is None else loss / denominator, nll, correct, *gradients


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
    *tensors, _, label_smoothing, z_loss, softcap, exclude_id, _, reduction, dtype, num_masked = inputs[:17]
    _, nll, correct, *gradients = output
    ctx.mark_non_differentiable(nll, correct, *gradients)
    ctx.save_for_backward(*tensors, *gradients)
    ctx.options = label_smoothing, z_loss, softcap, exclude_id, False, reduction, dtype, num_masked
    ctx.has_gradients = any(inputs[17:])
    ctx.num_inputs = len(inputs)


@first_order_only
def _backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    arguments, gradients = saved[:-3], saved[-3:]
    wants = ctx.needs_input_grad[:3]
    has_gradients, ctx.has_gradients = ctx.has_gradients, False
    if has_gradients and is_plain(grad_loss):
        # Given away once: a second backward makes its own. Under detach() it would find a changed version.
        gradients = [gradient.data for gradient in gradients]
        for gradient in gradients:
            scale_(gradient, grad_loss)
    elif has_gradients:
        gradients = [gradient * grad_loss for gradient in gradients]
    else:
        gradients = _operation(*arguments, grad_loss, *ctx.options, *wants)[3:]
    wanted = [gradient if wants[i] else None for i, gradient in enumerate(gradients)]
    return *wanted, *[None] * (ctx.num_inputs - 3)


differentiable(_operation, _backward, _setup_context)


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """See the twin, ``fastmask.reference.linear_masked_cross_entropy``: same arguments, same outputs."""
    flat_targets, is_masked, weights = (x if x is None else x.flatten() for x in (targets, is_masked, weights))
    if row_indices is not None and flat_targets.shape[0] == 0:
        row_indices = row_indices[:0]
    if reduction == "mean" and row_indices is not None:
        listed = None if weights is None else weights[row_indices.clamp(min=0)]
        denominator = as_denominator(denominator, row_indices, row_indices >= 0, listed)
    elif reduction == "mean":
        denominator = as_denominator(denominator, flat_targets, is_masked, weights)
    device_type = embeddings.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else embeddings.dtype
    # A float16 gradient formed before the loss scale arrives would underflow, and that of single losses needs
    # what comes from above.
    in_forward = torch.is_grad_enabled() and reduction != "none" and dtype != torch.float16
    loss, nll, correct, *_ = _operation(
        embeddings.flatten(0, -2),
        weight,
        bias,
        flat_targets,
        is_masked,
        weights,
        denominator,
        row_indices,
        None,
        label_smoothing,
        z_loss,
        softcap or 0.0,
        -1 if exclude_id is None else exclude_id,
        with_correct,
        reduction,
        dtype,
        num_masked,
        *(in_forward and x is not None and x.requires_grad for x in (embeddings, weight, bias)),
    )
    loss = loss.view(targets.shape) if reduction == "none" else loss
    return loss, nll.view(targets.shape), correct.view(targets.shape) if with_correct else None
