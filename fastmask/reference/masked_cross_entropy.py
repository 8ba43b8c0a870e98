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
from fastmask.records import CrossEntropy, LossOptions, LossRows, Reduction
from fastmask.vocabulary_parallel import Columns

# A chunk's temporaries stay in a CPU core's cache.
_CHUNK_ELEMENTS = 2**19
# Rows of which ranks that split the vocabulary speak at once: enough for messages and matrix products, few enough for
# memory (1024 x 50257 float32: 196 MiB).
CHUNK_ROWS = 1024


class RowLosses(NamedTuple):
    """Unweighted losses of M rows, and the gradient of ``loss`` by the logits where asked for."""

    loss: Tensor
    nll: Tensor
    correct: Tensor
    gradient: Tensor | None = None


def chunk_rows(logits: Tensor, columns: Columns | None = None) -> int:
    """How many rows of [R, V] logits are worked on at once."""
    return max(1, _CHUNK_ELEMENTS // logits.shape[-1]) if columns is None else CHUNK_ROWS


def chunk_losses_(
    logits: Tensor, targets: Tensor, options: LossOptions, columns: Columns | None = None, *, with_gradient: bool
) -> RowLosses:
    """The module's equations with w = 1, for logits [M, V] and targets [M]; float32 logits are overwritten, and the
    gradient lies there. A row whose target is no id is NaN. columns: which they are; None for all."""
    columns = Columns.whole(logits.shape[-1]) if columns is None else columns
    label_smoothing, excluded = options.label_smoothing, columns.place(options.exclude_id)
    num_allowed = columns.num_tokens - (options.exclude_id is not None)
    target, is_here = columns.local(targets[:, None])
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if columns.width == 0:  # stands for none, and is left out
        z, excluded = z.new_zeros(len(z), 1), 0
    slope = None
    if options.softcap is not None:
        z = z.div_(options.softcap).tanh_()
        slope = (1.0 - z) * (1.0 + z) if with_gradient else None  # 1 - z^2 would cancel near 1
        z *= options.softcap
    if excluded is not None:
        z[:, excluded] = -torch.inf
    z_max = columns.largest(z.amax(dim=-1, keepdim=True))
    z_target = z.gather(-1, target).where(is_here, 0.0)
    correct = torch.zeros_like(is_here)
    if options.with_correct:
        correct = columns.argmax(z) == targets[:, None]

    z -= z_max
    gaps = []
    if label_smoothing > 0.0:
        if excluded is not None:
            z[:, excluded] = 0.0
        gaps = [z.sum(dim=-1, keepdim=True)]
        if excluded is not None:
            z[:, excluded] = -torch.inf
    e = z.exp_()
    others = e.scatter_(-1, target, e.gather(-1, target).where(~is_here, 0.0)).sum(dim=-1, keepdim=True)
    others, z_target, *gaps = columns.totals(others, z_target, *gaps)
    e_target = (z_target - z_max).exp()
    total = (others + e_target).where(columns.has(targets[:, None]), torch.nan)

    correct &= ~total.isnan()
    log_total = total.log()
    lse = z_max + log_total
    ratio = others / e_target
    nll = torch.where(ratio <= 0.5, ratio.log1p(), z_max - z_target + log_total)
    loss = nll
    if label_smoothing > 0.0:
        loss = (1.0 - label_smoothing) * nll + label_smoothing * (log_total - gaps[0] / num_allowed)
    if options.z_loss > 0.0:
        loss = loss + options.z_loss * lse.square()

    gradient = None
    if with_gradient:
        by_lse = 2.0 * options.z_loss * lse  # what z-loss grows by with L
        gradient = e.mul_((1.0 + by_lse) / total).sub_(label_smoothing / num_allowed)
        p_target = e_target / total
        at_target = (1.0 - label_smoothing) * -others / total + label_smoothing * (p_target - 1.0 / num_allowed)
        at_target += by_lse * p_target
        gradient.scatter_(-1, target, at_target.where(is_here, gradient.gather(-1, target)))
        if slope is not None:
            gradient *= slope
        if excluded is not None:
            gradient[:, excluded] = 0.0
        gradient = gradient[:, : columns.width]
    return RowLosses(loss.squeeze(-1), nll.squeeze(-1), correct.squeeze(-1), gradient)


def joined(parts: list[RowLosses]) -> RowLosses:
    """The losses of some rows after those of others; no gradients."""
    losses, nlls, corrects, _ = zip(*parts, strict=True)
    return RowLosses(torch.cat(losses), torch.cat(nlls), torch.cat(corrects))


class _MaskedRows(torch.autograd.Function):
    """Losses of the rows ``indices`` [M] of logits [R, V]; the gradient is recomputed in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        targets: Tensor,
        indices: Tensor,
        options: LossOptions,
        inplace_grad: bool,
        columns: Columns | None,
    ) -> Any:
        ctx.save_for_backward(logits, targets, indices)
        ctx.options, ctx.inplace_grad, ctx.columns = options, inplace_grad, columns
        out = joined(
            [
                chunk_losses_(logits.index_select(0, part), targets[part], options, columns, with_gradient=False)
                for part in indices.split(chunk_rows(logits, columns))
            ]
        )
        ctx.mark_non_differentiable(out.nll, out.correct)
        return out.loss, out.nll, out.correct

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
        logits, targets, indices = ctx.saved_tensors
        options = ctx.options._replace(with_correct=False)
        grad_logits = logits.detach() if ctx.inplace_grad else torch.empty_like(logits)
        chunk = chunk_rows(logits, ctx.columns)
        for part, grad_part in zip(indices.split(chunk), grad_loss.split(chunk), strict=True):
            out = chunk_losses_(logits.index_select(0, part), targets[part], options, ctx.columns, with_gradient=True)
            assert out.gradient is not None
            grad_logits.index_copy_(0, part, out.gradient.mul_(grad_part[:, None]).to(logits.dtype))
        is_unmasked = torch.ones_like(targets, dtype=torch.bool).index_fill_(0, indices, False)
        grad_logits.index_fill_(0, is_unmasked.nonzero().squeeze(-1), 0.0)
        return grad_logits, None, None, None, None, None


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
    inplace_grad = inplace_grad and logits.is_contiguous()
    loss, nll, correct = _MaskedRows.apply(
        logits.flatten(0, -2), rows.targets.flatten(), indices, options, inplace_grad, columns
    )
    if rows.weights is not None:
        loss = loss * rows.weights.flatten()[indices]
    loss = scatter_rows(loss, indices, shape) if reduction.kind == "none" else loss.sum()
    if reduction.kind == "mean":
        loss = loss / mean_denominator(indices, reduction)
    return CrossEntropy(
        loss,
        scatter_rows(nll, indices, shape),
        scatter_rows(correct, indices, shape) if options.with_correct else None,
    )


def counted_indices(rows: LossRows) -> Tensor:
    """Flat indices [M] of the rows that count."""
    return rows.counted().flatten().nonzero().squeeze(-1)


def mean_denominator(indices: Tensor, reduction: Reduction) -> Tensor | float:
    """What a mean divides by: the number of rows that count (1 where none does), or what the caller gave."""
    return max(1, len(indices)) if reduction.denominator is None else reduction.denominator


def scatter_rows(values: Tensor, indices: Tensor, shape: torch.Size) -> Tensor:
    """values [M] at flat positions indices [M] of a zero tensor of that shape."""
    return values.new_zeros(shape.numel()).index_put((indices,), values).view(shape)
