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
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask._autograd import first_order_only

# A chunk's temporaries stay in a CPU core's cache.
_CHUNK_ELEMENTS = 2**19


class CrossEntropy(NamedTuple):
    """The loss by the reduction asked for, and of every row: its unweighted nll, and whether the argmax
    (ties to the lower id) is the target, or None where not asked for; 0 and False where unmasked."""

    loss: Tensor
    nll: Tensor
    correct: Tensor | None


class RowLosses(NamedTuple):
    """Unweighted losses of M rows, and the gradient of ``loss`` by the logits where asked for."""

    loss: Tensor
    nll: Tensor
    correct: Tensor
    gradient: Tensor | None


def row_losses(
    logits: Tensor,
    targets: Tensor,
    rows: Tensor,
    options: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """Unweighted loss, nll and correctness, [M] each, of the rows ``rows`` of logits [R, V]."""
    parts = [
        chunk_losses_(logits.index_select(0, part), targets[part], with_gradient=False, **options)
        for part in rows.split(chunk_rows(logits))
    ]
    loss, nll, correct = map(torch.cat, zip(*((out.loss, out.nll, out.correct) for out in parts), strict=True))
    return loss, nll, correct


def chunk_rows(logits: Tensor) -> int:
    """How many rows of [R, V] logits are worked on at once."""
    return max(1, _CHUNK_ELEMENTS // logits.shape[-1])


def chunk_losses_(
    logits: Tensor,
    targets: Tensor,
    *,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    exclude_id: int | None,
    with_correct: bool,
    with_gradient: bool,
) -> RowLosses:
    """The module's equations with w = 1, for logits [M, V] and targets [M]; float32 logits are overwritten, and the
    gradient lies there."""
    target = targets.long()[:, None]
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    num_allowed = z.shape[-1] - (exclude_id is not None)
    slope = None
    if softcap is not None:
        z = z.div_(softcap).tanh_()
        slope = (1.0 - z) * (1.0 + z) if with_gradient else None  # 1 - z^2 would cancel near 1
        z *= softcap
    if exclude_id is not None:
        z[:, exclude_id] = -torch.inf
    z_max = z.amax(dim=-1, keepdim=True)
    z_target = z.gather(-1, target)
    correct = torch.zeros_like(target, dtype=torch.bool)
    if with_correct:
        correct = z.argmax(dim=-1, keepdim=True) == target

    z -= z_max
    if label_smoothing > 0.0:
        if exclude_id is not None:
            z[:, exclude_id] = 0.0
        mean_gap = z.sum(dim=-1, keepdim=True) / num_allowed
        if exclude_id is not None:
            z[:, exclude_id] = -torch.inf
    e = z.exp_()
    e_target = e.gather(-1, target)
    others = e.scatter_(-1, target, 0.0).sum(dim=-1, keepdim=True)
    total = others + e_target

    correct &= ~total.isnan()
    log_total = total.log()
    lse = z_max + log_total
    ratio = others / e_target
    nll = torch.where(ratio <= 0.5, ratio.log1p(), z_max - z_target + log_total)
    loss = nll
    if label_smoothing > 0.0:
        loss = (1.0 - label_smoothing) * nll + label_smoothing * (log_total - mean_gap)
    if z_loss > 0.0:
        loss = loss + z_loss * lse.square()

    gradient = None
    if with_gradient:
        gradient = e.mul_((1.0 + 2.0 * z_loss * lse) / total).sub_(label_smoothing / num_allowed)
        p_target = e_target / total
        at_target = (1.0 - label_smoothing) * -others / total + label_smoothing * (p_target - 1.0 / num_allowed)
        gradient.scatter_(-1, target, at_target + 2.0 * z_loss * lse * p_target)
        if slope is not None:
            gradient *= slope
        if exclude_id is not None:
            gradient[:, exclude_id] = 0.0
    return RowLosses(loss.squeeze(-1), nll.squeeze(-1), correct.squeeze(-1), gradient)


class _MaskedRows(torch.autograd.Function):
    """Losses of the rows ``rows`` of logits [R, V]; the gradient is recomputed in backward."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, rows: Tensor, inplace_grad: bool, options: dict[str, Any]
    ) -> Any:
        ctx.save_for_backward(logits, targets, rows)
        ctx.inplace_grad, ctx.options = inplace_grad, options
        loss, nll, correct = row_losses(logits, targets, rows, options)
        ctx.mark_non_differentiable(nll, correct)
        return loss, nll, correct

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> Any:
        logits, targets, rows = ctx.saved_tensors
        grad_logits = logits.detach() if ctx.inplace_grad else torch.empty_like(logits)
        chunk = chunk_rows(logits)
        for part, grad_part in zip(rows.split(chunk), grad_loss.split(chunk), strict=True):
            options = {**ctx.options, "with_correct": False}
            out = chunk_losses_(logits.index_select(0, part), targets[part], with_gradient=True, **options)
            assert out.gradient is not None
            grad_logits.index_copy_(0, part, out.gradient.mul_(grad_part[:, None]).to(logits.dtype))
        is_unmasked = torch.ones_like(targets, dtype=torch.bool).index_fill_(0, rows, False)
        grad_logits.index_fill_(0, is_unmasked.nonzero().squeeze(-1), 0.0)
        return grad_logits, None, None, None, None


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
) -> CrossEntropy:
    """The twin of ``kernels/masked_cross_entropy.py``.

    Args:
        logits: [..., V] floating point.
        targets: [...] int32|int64, read at masked rows only.
        is_masked: [...] bool, or None for every row.
        weights: [...] float32, or None for 1; weight 0 is unmasked.
        with_correct: whether to compare the argmax with the target.
        inplace_grad: backward writes the gradient where the logits lie.
    """
    rows, row_weights = active_rows(targets, is_masked, weights)
    options = {
        "label_smoothing": label_smoothing,
        "z_loss": z_loss,
        "softcap": softcap,
        "exclude_id": exclude_id,
        "with_correct": with_correct,
    }
    inplace_grad = inplace_grad and logits.is_contiguous()
    loss, nll, correct = _MaskedRows.apply(logits.flatten(0, -2), targets.flatten(), rows, inplace_grad, options)
    if row_weights is not None:
        loss = loss * row_weights
    loss = scatter_rows(loss, rows, targets.shape) if reduction == "none" else loss.sum()
    if reduction == "mean":
        loss = loss / mean_denominator(rows, denominator)
    return CrossEntropy(
        loss,
        scatter_rows(nll, rows, targets.shape),
        scatter_rows(correct, rows, targets.shape) if with_correct else None,
    )


def active_rows(targets: Tensor, is_masked: Tensor | None, weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Flat indices [M] of the rows that count, and their weights [M]."""
    active = torch.ones_like(targets, dtype=torch.bool) if is_masked is None else is_masked
    if weights is None:
        return active.flatten().nonzero().squeeze(-1), None
    rows = (active & (weights != 0)).flatten().nonzero().squeeze(-1)
    return rows, weights.flatten()[rows]


def mean_denominator(rows: Tensor, denominator: Tensor | float | None) -> Tensor | float:
    """What a mean divides by: the number of rows (1 where there is none), or what the caller gave."""
    return max(1, len(rows)) if denominator is None else denominator


def scatter_rows(values: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    """values [M] at flat positions rows [M] of a zero tensor of that shape."""
    return values.new_zeros(shape.numel()).index_put((rows,), values).view(shape)
