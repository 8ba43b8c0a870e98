"""Cross-entropy at the masked rows of the logits, and nothing at the others.

For one masked row with logits z over the allowed columns A, target y, L = logsumexp_A z, p = softmax_A z,
q = 1 - p_y, label smoothing e and z-loss l,

    nll  = L - z_y
    loss = w ((1 - e) nll + e (L - mean_A z) + l L^2)
    d loss / d z_v = w (p_v (1 + 2 l L) - e / |A|)              v in A, v != y
    d loss / d z_y = w ((1 - e) (-q) + e (p_y - 1 / |A|) + 2 l L p_y)

in float32 (float64 for float64 logits). With a softcap c, z = c tanh(x / c) of the logits x given, and
d loss / d x = (1 - (z / c)^2) d loss / d z. A leaves out ``exclude_id`` (the SUBS parametrisation of MDLM,
https://arxiv.org/abs/2406.07524, section 3.2.3). As p_y -> 1, L - z_y and 1 - p_y cancel; nll and q are
taken from the sum over the other columns instead and keep their relative accuracy.

Where the vocabulary is split over ranks (``fastmask/vocabulary_parallel.py``), maxima and sums over columns are taken
over the ranks' too: the equations are the same.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask._autograd import first_order_only
from fastmask._devices import is_readable
from fastmask.records import CrossEntropy, LossOptions, LossRows, Reduction
from fastmask.reference.vocabulary_filter import first_largest
from fastmask.vocabulary_parallel import Columns

# A chunk's temporaries stay in a CPU's cache, and its small operations are few beside the large ones.
_CHUNK_ELEMENTS = 2**20
# Rows of which ranks that split the vocabulary speak at once: enough for messages and matrix products, few enough for
# memory (1024 x 50257 float32: 196 MiB).
CHUNK_ROWS = 1024


class RowLosses(NamedTuple):
    """Unweighted losses of M rows, and the gradient by the logits where asked for."""

    loss: Tensor
    nll: Tensor
    correct: Tensor
    gradient: Tensor | None = None


def chunk_rows(logits: Tensor, columns: Columns | None = None) -> int:
    """How many rows of [R, V] logits are worked on at once."""
    return max(1, _CHUNK_ELEMENTS // logits.shape[-1]) if columns is None else CHUNK_ROWS


def chunk_losses_(
    logits: Tensor,
    targets: Tensor,
    options: LossOptions,
    columns: Columns | None = None,
    coefficients: Tensor | None = None,
    out: Tensor | None = None,
) -> RowLosses:
    """The module's equations with w = 1, for logits [M, V] and targets [M]. A row whose target is no id is NaN.

    Args:
        columns: which they are; None for all.
        coefficients: [M], for the gradient of sum_m coefficients_m loss_m; None for no gradient.
        out: [M, V], overwritten, where the gradient lies; None for the logits, where they are float32 or float64.
    """
    columns = Columns.whole(logits.shape[-1]) if columns is None else columns
    label_smoothing, excluded = options.label_smoothing, columns.place(options.exclude_id)
    num_allowed = columns.num_tokens - (options.exclude_id is not None)
    target, is_here, is_id = _places(targets[:, None], columns)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    out = z if out is None else out
    if columns.width == 0:  # stands for none, and is left out
        z, excluded = z.new_zeros(len(z), 1), 0
        out = z
    slope = None
    if options.softcap is not None:
        z = torch.div(z, options.softcap, out=out).tanh_()
        slope = (1.0 - z) * (1.0 + z) if coefficients is not None else None  # 1 - z^2 would cancel near 1
        z *= options.softcap
    if excluded is not None:
        z = z if z is out else out.copy_(z)
        z[:, excluded] = -torch.inf
    z_max = columns.largest(z.amax(dim=-1, keepdim=True))
    z_target = _where(z.gather(-1, target), is_here, 0.0)
    largest_ids = None
    if options.with_correct:
        largest_ids = first_largest(z) if columns.group is None else columns.argmax(z)

    gaps = []
    if label_smoothing > 0.0:
        gap = z - z_max
        if excluded is not None:
            gap[:, excluded] = 0.0
        gaps = [gap.sum(dim=-1, keepdim=True)]
    # e is exp(z - z_max), or all of a row a unit times as much: what the fused softmax's own sum has missed is in the
    # total, by which e is divided.
    if columns.group is None:
        e = torch.softmax(z, dim=-1, out=out)
        unit = e.amax(dim=-1, keepdim=True)
    else:
        e, unit = torch.sub(z, z_max, out=out).exp_(), torch.ones_like(z_max)
    e = e.scatter_(-1, target, 0.0 if is_here is None else e.gather(-1, target).where(~is_here, 0.0))
    others, z_target, *gaps = columns.totals(e.sum(dim=-1, keepdim=True), z_target, *gaps)
    gap_of_target = _where(z_target, is_id, torch.nan) - z_max
    e_target = unit * gap_of_target.exp()
    total = others + e_target

    log_total = (total / unit).log()
    ratio = others / e_target
    nll = torch.where(ratio <= 0.5, ratio.log1p(), log_total - gap_of_target)
    loss = nll
    if label_smoothing > 0.0:
        loss = (1.0 - label_smoothing) * nll + label_smoothing * (log_total - gaps[0] / num_allowed)
    by_lse: Tensor | float = 0.0  # what z-loss grows by with L
    if options.z_loss > 0.0:
        lse = z_max + log_total
        loss, by_lse = loss + options.z_loss * lse.square(), 2.0 * options.z_loss * lse
    if largest_ids is None:
        correct = torch.zeros_like(target, dtype=torch.bool)
    else:
        correct = (largest_ids == targets[:, None]) & ~total.isnan()

    gradient = None
    if coefficients is not None:
        c = coefficients[:, None]
        over_total = c / total
        at_target = (label_smoothing - 1.0) * c * (others / total)
        if label_smoothing > 0.0:
            at_target += label_smoothing * (over_total * e_target - c / num_allowed)
        if options.z_loss > 0.0:
            at_target += by_lse * over_total * e_target
        gradient = e.mul_((1.0 + by_lse) * over_total if options.z_loss > 0.0 else over_total)
        if label_smoothing > 0.0:
            gradient -= label_smoothing / num_allowed * c
        gradient.scatter_(
            -1, target, at_target if is_here is None else at_target.where(is_here, gradient.gather(-1, target))
        )
        if slope is not None:
            gradient *= slope
        if excluded is not None:
            gradient[:, excluded] = 0.0
        gradient = gradient[:, : columns.width]
    return RowLosses(loss.squeeze(-1), nll.squeeze(-1), correct.squeeze(-1), gradient)


def _places(targets: Tensor, columns: Columns) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The columns here of targets [M, 1], int64; which are here, and which are ids at all, None for all of them."""
    if columns.group is None and len(targets) > 0 and is_readable(targets):
        least, largest = targets.aminmax()
        if least.item() >= 0 and largest.item() < columns.num_tokens:
            return targets.long(), None, None
    return *columns.local(targets), columns.has(targets)


def _where(values: Tensor, condition: Tensor | None, otherwise: float) -> Tensor:
    """The values where a condition holds; None for everywhere."""
    return values if condition is None else values.where(condition, otherwise)


def joined(parts: list[RowLosses]) -> RowLosses:
    """The losses of some rows after those of others; no gradients."""
    if len(parts) == 1:
        return parts[0]._replace(gradient=None)
    losses, nlls, corrects, _ = zip(*parts, strict=True)
    return RowLosses(torch.cat(losses), torch.cat(nlls), torch.cat(corrects))


class _MaskedRows(torch.autograd.Function):
    """coefficients_m * loss_m over the rows ``indices`` [M] of logits [R, V]: their sum where is_reduced, else [M].

    A row is read once, in forward, where its gradient is formed too, [R, V] of a sum. One of 16 bits, whose gradient
    would underflow before a loss scale arrives, is read again in backward; so is any for a second backward, since the
    first gave its gradient away.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        indices: Tensor,
        coefficients: Tensor,
        options: LossOptions,
        is_reduced: bool,
        inplace_grad: bool,
        columns: Columns | None,
        with_grad: bool,
    ) -> Any:
        in_forward = with_grad and ctx.needs_input_grad[0] and logits.dtype == coefficients.dtype
        rows = (len(logits) if is_reduced and not inplace_grad else len(indices)) if in_forward else None
        out = _pass(logits, targets, indices, coefficients, options, columns, rows)
        ctx.save_for_backward(logits, targets, indices, coefficients, out.gradient)
        ctx.options, ctx.inplace_grad, ctx.columns, ctx.is_spent = options, inplace_grad, columns, False
        ctx.mark_non_differentiable(out.nll, out.correct)
        loss = out.loss * coefficients
        return loss.sum() if is_reduced else loss, out.nll, out.correct

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        logits, targets, indices, coefficients, gradient = ctx.saved_tensors
        if gradient is None or ctx.is_spent:
            options = ctx.options._replace(with_correct=False)
            coefficients = coefficients * grad
            gradient = _pass(logits, targets, indices, coefficients, options, ctx.columns, len(indices)).gradient
        else:  # under detach() it would be known by its version
            ctx.is_spent, gradient = True, scaled(gradient.data, grad)
        if ctx.inplace_grad or len(gradient) < len(logits):
            place = logits.detach().zero_() if ctx.inplace_grad else torch.zeros_like(logits)
            gradient = place.index_copy_(0, indices, gradient)
        return gradient, *[None] * 8


def _pass(
    logits: Tensor,
    targets: Tensor,
    indices: Tensor,
    coefficients: Tensor,
    options: LossOptions,
    columns: Columns | None,
    gradient_rows: int | None,
) -> RowLosses:
    """Losses of the M rows, unweighted, and the gradient of sum_m coefficients_m loss_m: [R, V] or [M, V], as many
    rows as are asked for; None for none."""
    size, takes_all = chunk_rows(logits, columns), len(indices) == len(logits)
    is_exact = logits.dtype == coefficients.dtype
    is_spread = gradient_rows is not None and gradient_rows > len(indices)
    gradient = None
    if gradient_rows is not None:
        gradient = torch.zeros_like(logits) if is_spread else logits.new_empty(len(indices), logits.shape[-1])
    losses = []
    for first in range(0, max(1, len(indices)), size):
        chunk = slice(first, first + size)
        part, place = indices[chunk], None
        if gradient is not None and is_exact and not is_spread:
            place = gradient[chunk]
        if takes_all and place is not None:
            rows = logits[chunk]
        else:
            rows, place = torch.index_select(logits, 0, part, out=place), None
        c = None if gradient is None else coefficients[chunk]
        found = chunk_losses_(rows, targets.index_select(0, part), options, columns, c, place)
        losses.append(found._replace(gradient=None))
        if gradient is None or found.gradient is None:
            continue
        if is_spread:
            gradient.index_copy_(0, part, found.gradient)
        elif not is_exact:
            gradient[chunk] = found.gradient
    return joined(losses)._replace(gradient=gradient)


def scaled(gradient: Tensor, grad: Tensor) -> Tensor:
    """A gradient [M, ...] times that of a sum, or [M] of its parts; itself where that is known to be 1."""
    if grad.ndim == 0:
        return gradient if is_readable(grad) and grad.item() == 1.0 else gradient * grad
    return gradient * grad[:, None]


def masked_cross_entropy(
    logits: Tensor, rows: LossRows, reduction: Reduction, options: LossOptions, inplace_grad: bool
) -> CrossEntropy:
    """What ``kernels/masked_cross_entropy.py`` is held to.

    Args:
        logits: [..., V] floating point.
        rows: of shape [...]; targets are read at masked rows only, and weight 0 is unmasked.
        inplace_grad: backward writes the gradient where the logits lie.
    """
    return of_columns(logits, rows, reduction, options, inplace_grad, None)


def of_columns(
    logits: Tensor,
    rows: LossRows,
    reduction: Reduction,
    options: LossOptions,
    inplace_grad: bool,
    columns: Columns | None,
) -> CrossEntropy:
    """The same of logits [..., width], those columns of them that this rank has; None for all."""
    shape = rows.targets.shape
    indices = counted_indices(rows)
    accumulator = torch.promote_types(logits.dtype, torch.float32)
    loss, nll, correct = _MaskedRows.apply(
        logits.flatten(0, -2),
        rows.targets.flatten(),
        indices,
        coefficients_of(rows, indices, reduction, accumulator),
        options,
        reduction.kind != "none",
        inplace_grad and logits.is_contiguous(),
        columns,
        torch.is_grad_enabled(),
    )
    return CrossEntropy(
        loss if reduction.kind != "none" else scatter_rows(loss, indices, shape),
        scatter_rows(nll, indices, shape),
        scatter_rows(correct, indices, shape) if options.with_correct else None,
    )


def counted_indices(rows: LossRows) -> Tensor:
    """Flat indices [M] of the rows that count."""
    return rows.counted().flatten().nonzero().squeeze(-1)


def mean_denominator(indices: Tensor, reduction: Reduction) -> Tensor | float:
    """What a mean divides by: the number of rows that count (1 where none does), or what the caller gave."""
    return max(1, len(indices)) if reduction.denominator is None else reduction.denominator


def coefficients_of(rows: LossRows, indices: Tensor, reduction: Reduction, dtype: torch.dtype) -> Tensor:
    """What the loss of each row that counts is multiplied by, [M]."""
    denominator = mean_denominator(indices, reduction) if reduction.kind == "mean" else 1
    if rows.weights is not None:
        return rows.weights.flatten()[indices].to(dtype) / denominator
    if isinstance(denominator, Tensor):
        return torch.ones_like(indices, dtype=dtype) / denominator
    return torch.full_like(indices, 1.0 / denominator, dtype=dtype)


def scatter_rows(values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    """values [M] at flat positions indices [M] of a zero tensor of that shape."""
    if len(indices) == shape.numel():  # in order
        return values.view(shape)
    return values.new_zeros(shape.numel()).index_copy_(0, indices, values).view(shape)
