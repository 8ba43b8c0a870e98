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
from torch import Tensor

from fastmask._autograd import first_order_only, without_autocast
from fastmask.kernels import _launch
from fastmask.kernels._losses import is_plain, reduced, scale_, with_denominator
from fastmask.kernels._operator import differentiable, operator
from fastmask.kernels.masked_cross_entropy import losses_and_gradient
from fastmask.records import CrossEntropy, LinearLogits, LossOptions, LossRows, Reduction

# Masked rows at once, at most; the chunks of a call are of one size, so more than half as many where there are
# several: enough to keep the tensor cores busy, and adding a chunk's dW to the sum (8 V D bytes) stays a small
# part of its products (6 V D flops a row).
CHUNK_ROWS = 8192


class MaskedRows(NamedTuple):
    """Which of the rows of a head are computed: those that count, or those listed.

    row_indices: [K] int64, in place of is_masked, -1 for none. num_masked: what their number does not exceed.
    """

    row_indices: Tensor | None
    num_masked: int | None


class Products(NamedTuple):
    """How a head's products are taken, and which gradients are wanted of them."""

    dtype: torch.dtype
    wants_embeddings: bool
    wants_weight: bool
    wants_bias: bool

    @property
    def wants_any(self) -> bool:
        """Whether a gradient is wanted at all."""
        return self.wants_embeddings or self.wants_weight or self.wants_bias


class Outputs(NamedTuple):
    """What the operation gives.

    loss: w loss of every row [R], or reduced to []. nll: [R]. correct: [R] bool, None where not asked for. Then the
    gradients wanted, in the dtypes of what they are by; None where not wanted. Of an operator that is watched, empty
    tensors in place of None.
    """

    loss: Tensor
    nll: Tensor
    correct: Tensor | None
    by_embeddings: Tensor | None
    by_weight: Tensor | None
    by_bias: Tensor | None


def chunk_sizes(num_rows: int) -> list[int]:
    """How many rows each chunk has."""
    num_chunks = _launch.cdiv(num_rows, CHUNK_ROWS)
    return [num_rows // num_chunks + (i < num_rows % num_chunks) for i in range(num_chunks)]


def _masked_rows(rows: LossRows, masked: MaskedRows) -> tuple[Tensor, Tensor | None]:
    """The rows that are computed, [M], with -1 where num_masked exceeds them, and whether it falls short, [] bool.

    Without num_masked the host waits for the device to count; in a capture, where it cannot, no row is left out.
    """
    targets, (row_indices, num_masked) = rows.targets, masked
    if num_masked is None and _is_captured(targets):
        num_masked = len(targets)
    if row_indices is not None:
        if num_masked is None:
            return row_indices[row_indices >= 0], None
        return row_indices[:num_masked], (row_indices[num_masked:] >= 0).any()
    if num_masked is None and rows.is_masked is None and rows.weights is None:
        return torch.arange(len(targets), device=targets.device), None
    counted = rows.counted()
    if num_masked is None:
        return counted.nonzero().squeeze(-1), None
    num_masked = min(num_masked, len(counted))
    found = torch.nonzero_static(counted, size=num_masked, fill_value=-1).squeeze(-1)
    return found, counted.sum() > num_masked


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
    logits: LinearLogits,
    rows: LossRows,
    masked: MaskedRows,
    denominator: Tensor | None,
    upstream: Tensor | None,
    options: LossOptions,
    products: Products,
) -> Outputs:
    """The losses of every row, and the gradients wanted of sum upstream w loss / denominator."""
    embeddings, weight, bias = logits.embeddings, logits.weight, logits.bias
    targets, weights, dtype = rows.targets, rows.weights, products.dtype
    num_rows, num_ids = len(targets), len(weight)
    listed, falls_short = _masked_rows(rows, masked)
    sizes = chunk_sizes(len(listed))
    cast_weight, cast_bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    if upstream is not None:
        weights = upstream.expand(num_rows) if weights is None else weights * upstream
    if falls_short is not None:  # losses and gradients are NaN where the bound cuts rows off
        weights = torch.ones_like(targets, dtype=torch.float32) if weights is None else weights
        weights = weights.masked_fill(falls_short, torch.nan)

    # What belongs to no row goes to one row more than there are.
    num_slots = num_rows if falls_short is None else num_rows + 1
    losses = embeddings.new_zeros(num_slots, dtype=torch.float32)
    nll = torch.zeros_like(losses)
    correct = torch.zeros_like(losses, dtype=torch.bool) if options.with_correct else None
    by_embeddings = embeddings.new_zeros(num_slots, embeddings.shape[1]) if products.wants_embeddings else None
    new_total = torch.empty_like if sizes else torch.zeros_like
    total_dtype = dtype if len(sizes) == 1 and weight.dtype == dtype else torch.float32
    by_weight = new_total(weight, dtype=total_dtype) if products.wants_weight else None
    by_bias = new_total(bias, dtype=torch.float32) if bias is not None and products.wants_bias else None
    # Rows of logits begin at 16 bytes whatever V is.
    vector = 16 // dtype.itemsize
    buffer = cast_weight.new_empty(max(sizes, default=0), _launch.cdiv(num_ids, vector) * vector)

    for index, part in enumerate(listed.split(sizes)):
        source, slot, counts = part, part, None
        if falls_short is not None:
            counts, source, slot = part >= 0, part.clamp(min=0), part.where(part >= 0, num_rows)
        part_weights = None if weights is None else weights.index_select(0, source)
        if masked.row_indices is not None and part_weights is not None:
            counts = part_weights != 0 if counts is None else counts & (part_weights != 0)
        x = embeddings.index_select(0, source).to(dtype)
        if counts is not None:  # what is no masked row may hold NaN, and 0 NaN would reach dW
            x.masked_fill_(~counts[:, None], 0.0)
        z = buffer[: len(part), :num_ids]
        if cast_bias is None:
            torch.mm(x, cast_weight.mT, out=z)
        else:
            torch.addmm(cast_bias, x, cast_weight.mT, out=z)
        part_rows = LossRows(targets.index_select(0, source), counts, part_weights)
        out = losses_and_gradient(z, part_rows, denominator, options, z if products.wants_any else None)
        losses.index_copy_(0, slot, out.loss)
        nll.index_copy_(0, slot, out.nll)
        if correct is not None and out.correct is not None:
            correct.index_copy_(0, slot, out.correct)
        if by_embeddings is not None:
            by_embeddings.index_copy_(0, slot, torch.mm(z, cast_weight).to(embeddings.dtype))
        if by_weight is not None:
            _add_product(by_weight, z.mT, x, is_first=index == 0)
        if by_bias is not None:
            part_bias = z.sum(dim=0, dtype=torch.float32)
            by_bias = part_bias if index == 0 else by_bias.add_(part_bias)
    if falls_short is not None:
        losses.masked_fill_(falls_short, torch.nan)
        if not sizes:  # no row has brought NaN to the gradients
            for total in (by_embeddings, by_weight, by_bias):
                if total is not None:
                    total.masked_fill_(falls_short, torch.nan)
        losses, nll = losses[:num_rows], nll[:num_rows]
        correct = None if correct is None else correct[:num_rows]
        by_embeddings = None if by_embeddings is None else by_embeddings[:num_rows]
    return Outputs(
        losses,
        nll,
        correct,
        by_embeddings,
        None if by_weight is None else by_weight.to(weight.dtype),
        None if by_bias is None else by_bias.to(weight.dtype),
    )


def _fake(
    logits: LinearLogits,
    rows: LossRows,
    masked: MaskedRows,
    reduction: Reduction,
    upstream: Tensor | None,
    options: LossOptions,
    products: Products,
) -> Outputs:
    embeddings, weight, bias = logits.embeddings, logits.weight, logits.bias
    num_rows = rows.targets.shape[0]  # symbolic, as len() is not
    losses = embeddings.new_empty(num_rows, dtype=torch.float32)
    return Outputs(
        losses if reduction.kind == "none" else losses.new_empty(()),
        torch.empty_like(losses),
        losses.new_empty(num_rows, dtype=torch.bool) if options.with_correct else None,
        embeddings.new_empty(embeddings.shape) if products.wants_embeddings else None,
        torch.empty_like(weight) if products.wants_weight else None,
        torch.empty_like(bias) if bias is not None and products.wants_bias else None,
    )


@operator("linear_masked_cross_entropy", _fake)
def _operation(
    logits: LinearLogits,
    rows: LossRows,
    masked: MaskedRows,
    reduction: Reduction,
    upstream: Tensor | None,
    options: LossOptions,
    products: Products,
) -> Outputs:
    """The losses of flat rows, embeddings [R, D], and the gradients wanted.

    upstream: None for gradients by the loss; else [], or [R] for "none", and gradients by what it is the gradient of.
    """
    with without_autocast(logits.embeddings.device.type):  # it would reach the float32 parts
        out = _chunked(logits, rows, masked, reduction.denominator, upstream, options, products)
    return out._replace(loss=reduced(out.loss, reduction))


def _setup_context(ctx: Any, inputs: Any, output: Outputs) -> None:
    logits, rows, masked, reduction, _, options, products = inputs
    tensors = logits.embeddings, logits.weight, logits.bias, *rows, masked.row_indices, reduction.denominator
    ctx.save_for_backward(*tensors, output.by_embeddings, output.by_weight, output.by_bias)
    ctx.call = masked._replace(row_indices=None), reduction._replace(denominator=None), options, products
    ctx.has_gradients = products.wants_any


@first_order_only
def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
    embeddings, weight, bias, targets, is_masked, weights, row_indices, denominator, *gradients = ctx.saved_tensors
    wants_embeddings, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    has_gradients, ctx.has_gradients = ctx.has_gradients, False
    if has_gradients and is_plain(grad_loss):
        # Given away once: a second backward makes its own. Under detach() it would find a changed version.
        gradients = [None if gradient is None else gradient.data for gradient in gradients]
        for gradient in gradients:
            if gradient is not None:
                scale_(gradient, grad_loss)
    elif has_gradients:
        gradients = [None if gradient is None else gradient * grad_loss for gradient in gradients]
    else:
        masked, reduction, options, products = ctx.call
        out = _operation(
            LinearLogits(embeddings, weight, bias),
            LossRows(targets, is_masked, weights),
            masked._replace(row_indices=row_indices),
            reduction._replace(denominator=denominator),
            grad_loss,
            options._replace(with_correct=False),
            Products(products.dtype, wants_embeddings, wants_weight, wants_bias),
        )
        gradients = [out.by_embeddings, out.by_weight, out.by_bias]
    by_embeddings, by_weight, by_bias = gradients
    return (
        by_embeddings if wants_embeddings else None,
        by_weight if wants_weight else None,
        by_bias if wants_bias else None,
    )


differentiable(_operation, 3, _backward, _setup_context)


def linear_masked_cross_entropy(
    logits: LinearLogits,
    rows: LossRows,
    reduction: Reduction,
    options: LossOptions,
    row_indices: Tensor | None,
    num_masked: int | None,
) -> CrossEntropy:
    """See the reference, ``fastmask.reference.linear_masked_cross_entropy``: same arguments, same outputs."""
    shape, rows, embeddings = rows.targets.shape, rows.flat(), logits.embeddings
    counted = rows
    if row_indices is not None:
        weights = None if rows.weights is None else rows.weights[row_indices.clamp(min=0)]
        counted = LossRows(row_indices, row_indices >= 0, weights)
    reduction = with_denominator(reduction, counted)
    device_type = embeddings.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else embeddings.dtype
    # A float16 gradient formed before the loss scale arrives would underflow, and that of single losses needs
    # what comes from above.
    in_forward = torch.is_grad_enabled() and reduction.kind != "none" and dtype != torch.float16
    leaves = embeddings, logits.weight, logits.bias
    wants = (in_forward and x is not None and x.requires_grad for x in leaves)
    out = _operation(
        logits._replace(embeddings=embeddings.flatten(0, -2)),
        rows,
        MaskedRows(row_indices, num_masked),
        reduction,
        None,
        options,
        Products(dtype, *wants),
    )
    loss = out.loss.view(shape) if reduction.kind == "none" else out.loss
    correct = out.correct.view(shape) if options.with_correct and out.correct is not None else None
    return CrossEntropy(loss, out.nll.view(shape), correct)
