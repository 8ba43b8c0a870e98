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
# Odds against the target of which it may be a subnormal number: its logarithm is then taken from the logits.
_FAR = 2.0**100


class CountedRows(NamedTuple):
    """The M rows that count, of R, and what is made of their losses.

    indices: [M] int64, which rows; None for all. targets: [M, 1]. coefficients: [M, 1], what each loss is multiplied
    by, in the dtype that sums are taken in. columns: those of this rank; None for all.
    """

    indices: Tensor | None
    targets: Tensor
    coefficients: Tensor
    options: LossOptions
    columns: Columns | None

    @classmethod
    def of(
        cls, rows: LossRows, reduction: Reduction, options: LossOptions, columns: Columns | None, dtype: torch.dtype
    ) -> CountedRows:
        """Those of the rows, with coefficients of that dtype."""
        indices, targets, weights = None, rows.targets.flatten(), rows.weights
        weights = None if weights is None else weights.flatten()
        if rows.is_masked is not None or weights is not None:
            counted = rows.counted().flatten().nonzero().squeeze(-1)
            indices = None if counted.shape == targets.shape else counted
        if indices is not None:
            targets = targets.index_select(0, indices)
            weights = None if weights is None else weights.index_select(0, indices)
        targets = targets.unsqueeze(-1)
        denominator: Tensor | float = 1
        if reduction.kind == "mean":
            denominator = max(1, targets.shape[0]) if reduction.denominator is None else reduction.denominator
        if weights is not None:
            coefficients = weights.unsqueeze(-1).to(dtype) / denominator
        elif isinstance(denominator, Tensor):
            coefficients = torch.ones_like(targets, dtype=dtype) / denominator
        else:
            coefficients = torch.full_like(targets, 1.0 / denominator, dtype=dtype)
        return cls(indices, targets, coefficients, options, columns)

    def parts(self, size: int) -> list[tuple[slice, CountedRows]]:
        """That many of the M at once, at least one part of them."""
        count = self.targets.shape[0]
        if count <= size:
            return [(slice(0, count), self)]
        return [(part, self._part(part)) for part in (slice(i, i + size) for i in range(0, count, size))]

    def _part(self, part: slice) -> CountedRows:
        indices = None if self.indices is None else self.indices[part]
        return self._replace(indices=indices, targets=self.targets[part], coefficients=self.coefficients[part])

    def scattered(self, values: Tensor, shape: torch.Size) -> Tensor:
        """values [M, 1] at their places of zeros of that shape, whose elements are the R rows."""
        if self.indices is None:
            return values.view(shape)
        return values.new_zeros(shape.numel(), 1).index_copy_(0, self.indices, values).view(shape)


class RowLosses(NamedTuple):
    """Of M rows, [M, 1] each: unweighted losses, and whether they are correct, where asked for."""

    loss: Tensor
    nll: Tensor
    correct: Tensor | None

    @classmethod
    def joined(cls, parts: list[RowLosses]) -> RowLosses:
        """Those of some rows after those of others."""
        if len(parts) == 1:
            return parts[0]
        losses, nlls, corrects = zip(*parts, strict=True)
        return cls(torch.cat(losses), torch.cat(nlls), None if corrects[0] is None else torch.cat(corrects))


def chunk_rows(logits: Tensor, columns: Columns | None = None) -> int:
    """How many rows of [R, V] logits are worked on at once."""
    return max(1, _CHUNK_ELEMENTS // logits.shape[-1]) if columns is None else CHUNK_ROWS


def chunk_losses_(
    logits: Tensor, rows: CountedRows, with_gradient: bool, out: Tensor | None = None
) -> tuple[RowLosses, Tensor | None]:
    """The module's equations with w = 1, for the rows' logits [M, V]; and [M, V], the gradient of
    sum_m coefficients_m loss_m, where asked for. A row whose target is no id is NaN.

    Args:
        out: [M, V], overwritten, where the gradient lies, float32 (float64 of float64); may be the logits. None
            for memory of its own.
    """
    options = rows.options
    columns = Columns.whole(logits.shape[-1]) if rows.columns is None else rows.columns
    label_smoothing, excluded = options.label_smoothing, columns.place(options.exclude_id)
    num_allowed = columns.num_tokens - (options.exclude_id is not None)
    target, is_here, is_id = _places(rows.targets, columns)
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if out is None:
        out = torch.empty_like(z) if z is logits else z
    if columns.width == 0:  # stands for none, and is left out
        z, excluded = z.new_zeros(len(z), 1), 0
        out = z
    slope = None
    if options.softcap is not None:
        z = torch.div(z, options.softcap, out=out).tanh_()
        slope = (1.0 - z) * (1.0 + z) if with_gradient else None  # 1 - z^2 would cancel near 1
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
    e = torch.softmax(z, dim=-1, out=out) if columns.group is None else torch.sub(z, z_max, out=out).exp_()
    e_there = e.gather(-1, target)
    e.scatter_(-1, target, 0.0 if is_here is None else e_there.where(~is_here, 0.0))
    others, z_target, *gaps = columns.totals(e.sum(dim=-1, keepdim=True), z_target, *gaps)
    e_target = _where(e_there if columns.group is None else (z_target - z_max).exp(), is_id, torch.nan)
    total, ratio = others + e_target, others / e_target

    nll = ratio.log1p()
    loss, by_lse = nll, None
    if label_smoothing > 0.0 or options.z_loss > 0.0 or is_id is not None or not ratio.amax().item() <= _FAR:
        unit = torch.maximum(e.amax(dim=-1, keepdim=True), e_target) if columns.group is None else 1.0
        log_total = (total / unit).log()
        nll = nll.where(ratio <= _FAR, log_total - (z_target - z_max))
        loss = nll
        if label_smoothing > 0.0:
            loss = (1.0 - label_smoothing) * nll + label_smoothing * (log_total - gaps[0] / num_allowed)
        if options.z_loss > 0.0:
            lse = z_max + log_total
            loss, by_lse = loss + options.z_loss * lse.square(), 2.0 * options.z_loss * lse
    correct = None
    if largest_ids is not None:
        correct = (largest_ids == rows.targets) & ~total.isnan()

    gradient = None
    if with_gradient:
        over_total = rows.coefficients / total
        at_target = -rows.coefficients * (others / total)
        if label_smoothing > 0.0:
            at_target = (1.0 - label_smoothing) * at_target + label_smoothing * (over_total * e_target)
        if by_lse is not None:
            at_target += by_lse * over_total * e_target
        gradient = e.mul_(over_total if by_lse is None else (1.0 + by_lse) * over_total)
        gradient.scatter_(
            -1, target, at_target if is_here is None else at_target.where(is_here, gradient.gather(-1, target))
        )
        if label_smoothing > 0.0:
            gradient -= label_smoothing / num_allowed * rows.coefficients
        if slope is not None:
            gradient *= slope
        if excluded is not None:
            gradient[:, excluded] = 0.0
        if columns.width == 0:
            gradient = gradient[:, :0]
    return RowLosses(loss, nll, correct), gradient


def _places(targets: Tensor, columns: Columns) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The columns here of targets [M, 1], int64; which are here, and which are ids at all, None for all of them."""
    if columns.group is None and targets.shape[0] > 0 and is_readable(targets):
        least, largest = targets.aminmax()
        if least.item() >= 0 and largest.item() < columns.num_tokens:
            return targets.long(), None, None
    return *columns.local(targets), columns.has(targets)


def _where(values: Tensor, condition: Tensor | None, otherwise: float) -> Tensor:
    """The values where a condition holds; None for everywhere."""
    return values if condition is None else values.where(condition, otherwise)


class _MaskedRows(torch.autograd.Function):
    """coefficients_m * loss_m over the rows of logits [R, V]: their sum where is_reduced, else [M, 1].

    A row is read once, in forward, where its gradient is formed too, [R, V] of a sum. One of 16 bits, whose gradient
    would underflow before a loss scale arrives, is read again in backward; so is any for a second backward, since the
    first gave its gradient away.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: CountedRows, is_reduced: bool, inplace_grad: bool, with_grad: bool
    ) -> Any:
        in_forward = with_grad and ctx.needs_input_grad[0] and logits.dtype == rows.coefficients.dtype
        losses, gradient = _pass(logits, rows, in_forward, is_spread=is_reduced and not inplace_grad)
        ctx.save_for_backward(logits, rows.indices, rows.targets, rows.coefficients, gradient)
        ctx.options, ctx.columns, ctx.inplace_grad, ctx.is_spent = rows.options, rows.columns, inplace_grad, False
        ctx.mark_non_differentiable(losses.nll)
        loss = losses.loss * rows.coefficients
        return loss.sum() if is_reduced else loss, losses.nll, losses.correct

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        logits, indices, targets, coefficients, gradient = ctx.saved_tensors
        if gradient is None or ctx.is_spent:
            options = ctx.options._replace(with_correct=False)
            rows = CountedRows(indices, targets, coefficients * grad, options, ctx.columns)
            _, gradient = _pass(logits, rows, True, is_spread=False)
        else:  # under detach() it would be known by its version
            ctx.is_spent, gradient = True, scaled(gradient.data, grad)
        if ctx.inplace_grad:
            place = logits.detach()
            gradient = place.copy_(gradient) if indices is None else place.zero_().index_copy_(0, indices, gradient)
        elif gradient.shape[0] < logits.shape[0]:
            gradient = torch.zeros_like(logits).index_copy_(0, indices, gradient)
        return gradient, None, None, None, None


def _pass(
    logits: Tensor, rows: CountedRows, with_gradient: bool, *, is_spread: bool
) -> tuple[RowLosses, Tensor | None]:
    """Losses of the M rows of logits [R, V], unweighted, and the gradient of sum_m coefficients_m loss_m where asked
    for: [M, V], or [R, V] where it is spread."""
    is_spread, is_exact = is_spread and rows.indices is not None, logits.dtype == rows.coefficients.dtype
    gradient = None
    if with_gradient:
        count = rows.targets.shape[0]
        gradient = torch.zeros_like(logits) if is_spread else logits.new_empty(count, logits.shape[-1])
    losses = []
    for chunk, part in rows.parts(chunk_rows(logits, rows.columns)):
        place = gradient[chunk] if gradient is not None and is_exact and not is_spread else None
        if part.indices is None:
            z = logits[chunk]
        else:
            z = torch.index_select(logits, 0, part.indices, out=place)
            place = z if is_exact else None
        found, by_logits = chunk_losses_(z, part, with_gradient, place)
        losses.append(found)
        if gradient is not None and by_logits is not None:
            if is_spread and part.indices is not None:
                gradient.index_copy_(0, part.indices, by_logits)
            elif not is_exact:
                gradient[chunk] = by_logits
    return RowLosses.joined(losses), gradient


def scaled(gradient: Tensor, grad: Tensor) -> Tensor:
    """A gradient [M, ...] times that of a sum, or [M, 1] of its parts; itself where that is known to be 1."""
    return gradient if grad.ndim == 0 and is_readable(grad) and grad.item() == 1.0 else gradient * grad


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
    shape, dtype = rows.targets.shape, torch.promote_types(logits.dtype, torch.float32)
    counted = CountedRows.of(rows, reduction, options, columns, dtype)
    is_reduced = reduction.kind != "none"
    loss, nll, correct = _MaskedRows.apply(
        logits.flatten(0, -2), counted, is_reduced, inplace_grad and logits.is_contiguous(), torch.is_grad_enabled()
    )
    return CrossEntropy(
        loss if is_reduced else counted.scattered(loss, shape),
        counted.scattered(nll, shape),
        None if correct is None else counted.scattered(correct, shape),
    )
