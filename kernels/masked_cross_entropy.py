"""Cross-entropy of the masked rows, and its gradient, from logits.

For one masked row with logits z over the allowed columns A, target y, L = logsumexp_A z, p = softmax_A z,
q = 1 - p_y, label smoothing e and z-loss l,

    loss         = w ((1 - e) nll + e (L - mean_A z) + l L^2),      nll = L - z_y
    d loss / d z = w (p (1 + 2 l L) - e / |A|), and at the target w ((1 - e) (-q) + e (p_y - 1 / |A|) + 2 l L p_y)

``fastmask/reference/masked_cross_entropy.py`` is the specification. As p_y -> 1, L - z_y and 1 - p_y cancel; a
row is reduced to the maximum and the sum of its *other* columns, which keep the relative accuracy of both
(``kernels/_row_softmax.py``).

Bytes: a masked row is read once from DRAM (its gradient reads it again, backwards, from L2, where the last use of a
logit and the gradient itself make room first) and its gradient is written once; an unmasked row is never read, its
gradient is zeroed. Saved for backward: the gradient if it was formed in forward, the logits and six float32 a row,
from which any other is formed without another reduction. Rows of few columns are read once (``_short_losses.py``),
and reduced again where another gradient is wanted.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask._autograd import first_order_only
from fastmask.kernels import _launch
from fastmask.kernels import _logit_rows as logit_rows
from fastmask.kernels import _row_softmax as row_softmax
from fastmask.kernels._loss_plan import Plan, pieces_of_a_row, plan
from fastmask.kernels._losses import is_plain, reduced, scale_, with_denominator
from fastmask.kernels._operator import differentiable, operator
from fastmask.kernels._short_losses import short_rows_kernel
from fastmask.records import CrossEntropy, LossOptions, LossRows, Reduction


@triton.jit(do_not_specialize=["offset_x", "N", "V", "exclude_id", "tiles_per_piece"])
def _records_kernel(
    x_ptr,
    offset_x,
    stride_xb,
    stride_xn,
    targets_ptr,
    is_masked_ptr,
    weights_ptr,
    records_ptr,
    N,
    V,
    exclude_id,
    softcap,
    tiles_per_piece,
    label_smoothing,
    WITH_CORRECT: tl.constexpr,
    LANES: tl.constexpr,  # threads of a program
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # This program reduces one piece of one masked row to its record.
    index = tl.program_id(0)
    piece = tl.program_id(1)
    x_ptr = tl.multiple_of(x_ptr - offset_x, 16)
    start = logit_rows.row_start(index, N, offset_x, stride_xb, stride_xn)
    counts, _, target = row_softmax.load_target(index, targets_ptr, is_masked_ptr, weights_ptr, V)
    if counts:
        row = row_softmax.Row(x_ptr, start, V, target, softcap, exclude_id)
        first_tile = piece * tiles_per_piece
        record = row_softmax.reduce_piece(
            row, first_tile, first_tile + tiles_per_piece, label_smoothing, WITH_CORRECT, LANES, VECTOR, BLOCK_V
        )
        row_softmax.store_record(records_ptr, index.to(tl.int64) * tl.num_programs(1) + piece, record)


@triton.jit(
    do_not_specialize=["offset_x", "offset_g", "stride_u", "N", "V", "exclude_id", "tiles_per_piece", "num_pieces"]
)
def _rows_kernel(
    x_ptr,
    offset_x,
    stride_xb,
    stride_xn,
    targets_ptr,
    is_masked_ptr,
    weights_ptr,
    records_ptr,
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
    N,
    V,
    exclude_id,
    label_smoothing,
    z_loss,
    softcap,
    tiles_per_piece,
    num_pieces,  # of the records at hand; None: the row is reduced here
    PIECE_LANES: tl.constexpr,
    HOLDS_UNIT: tl.constexpr,  # the gradient buffer holds what an upstream gradient of 1 asks for
    SAME_PHASE: tl.constexpr,  # rows of gradient and logits begin at the same place within 16 bytes
    LANES: tl.constexpr,  # threads of a program
    VECTOR: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    # This program does one row, or with several programs along axis 1 one piece of it: the losses (once a row)
    # and the gradient. An unmasked row is zeroed.
    index = tl.program_id(0)
    piece = tl.program_id(1)
    if HOLDS_UNIT:
        if tl.load(upstream_ptr) == 1.0:
            return
    scale = row_softmax.load_scale(index, upstream_ptr, stride_u, denominator_ptr)

    x_ptr = tl.multiple_of(x_ptr - offset_x, 16)
    start = logit_rows.row_start(index, N, offset_x, stride_xb, stride_xn)
    counts, weight, target = row_softmax.load_target(index, targets_ptr, is_masked_ptr, weights_ptr, V)
    row = row_softmax.Row(x_ptr, start, V, target, softcap, exclude_id)
    first_tile = piece * tiles_per_piece
    last_tile = first_tile + tiles_per_piece
    if gradient_ptr is not None:
        g_ptr = tl.multiple_of(gradient_ptr - offset_g, 16)
        g_start = logit_rows.row_start(index, N, offset_g, stride_gb, stride_gn)
    if not counts:
        if losses_ptr is not None:
            if piece == 0:
                tl.store(losses_ptr + index, 0.0)
                tl.store(nll_ptr + index, 0.0)
                if correct_ptr is not None:
                    tl.store(correct_ptr + index, 0)
        if gradient_ptr is not None:
            row_softmax.write_gradient(row, None, g_ptr, g_start, first_tile, last_tile, SAME_PHASE, VECTOR, BLOCK_V)
        return

    WITH_CORRECT: tl.constexpr = correct_ptr is not None
    if num_pieces is None:
        record = row_softmax.reduce_piece(
            row, 0, tiles_per_piece, label_smoothing, WITH_CORRECT, LANES, VECTOR, BLOCK_V
        )
        row_softmax.store_record(records_ptr, index.to(tl.int64), record)
        if gradient_ptr is not None:  # perhaps in place: every warp reads the target's logit, so none may be behind
            tl.debug_barrier()
    else:  # the record keeps the target's logit, whose place another program's gradient may have taken
        record = row_softmax.load_record(records_ptr, index, num_pieces, label_smoothing, WITH_CORRECT, PIECE_LANES)
    num_allowed = V - 1 if exclude_id is not None else V
    loss, nll, parts = row_softmax.loss_and_parts(record, num_allowed, label_smoothing, z_loss)
    if losses_ptr is not None:
        if piece == 0:
            tl.store(losses_ptr + index, loss * weight)
            tl.store(nll_ptr + index, nll)
            if correct_ptr is not None:
                tl.store(correct_ptr + index, row_softmax.is_correct(record, nll))
    if gradient_ptr is not None:
        parts = row_softmax.times(parts, scale * weight)
        row_softmax.write_gradient(row, parts, g_ptr, g_start, first_tile, last_tile, SAME_PHASE, VECTOR, BLOCK_V)


class _Place(NamedTuple):
    """Where rows [B, N, V] or [R, V] lie: elements from a 16-byte boundary to them; strides of sequence, position."""

    offset: int
    stride_b: int
    stride_n: int

    def is_in_phase(self, other: _Place, vector: int) -> bool:
        """Whether rows here and there begin at the same place among ``vector`` elements, 16 bytes."""
        return not any([(here - there) % vector for here, there in zip(self, other, strict=True)])


def _place(offset: int, strides: tuple[int, ...]) -> _Place:
    """Of rows that lie so far from a boundary, at strides of their tensor."""
    return _Place(offset, strides[0] if len(strides) == 3 else 0, strides[-2])


class RowLosses(NamedTuple):
    """What a pass over rows [...] gives; of an operator that is watched, empty tensors in place of None.

    loss: w loss [...], or reduced to []. nll: [...]. correct: [...] bool, None where not asked for. records: [R,
    pieces, RECORD_SIZE] float32, as ``_row_softmax`` lays them, of masked rows alone; None for short rows. gradient:
    as the logits, None where there is none, or where it took another tensor's memory.
    """

    loss: Tensor
    nll: Tensor
    correct: Tensor | None
    records: Tensor | None
    gradient: Tensor | None


def _allocate(rows: LossRows, options: LossOptions, num_pieces: int, gradient: Tensor | None) -> RowLosses:
    """Room for them."""
    targets = rows.targets
    loss = targets.new_empty(targets.shape, dtype=torch.float32)
    return RowLosses(
        loss,
        torch.empty_like(loss),
        torch.empty_like(loss, dtype=torch.bool) if options.with_correct else None,
        loss.new_empty(targets.numel(), num_pieces, row_softmax.RECORD_SIZE) if num_pieces else None,
        gradient,
    )


class _Prepared(NamedTuple):
    """What launches over rows of one shape have in common: arguments are those of all kernels that are no tensors."""

    plan: Plan
    place: _Place
    arguments: dict[str, Any]


def _prepare(logits: Tensor, num_rows: int, options: LossOptions) -> _Prepared:
    offset, hardware = logit_rows.offset_from_boundary(logits), _launch.hardware(logits.device)
    return _prepared(num_rows, logits.shape, logits.stride(), offset, logits.dtype, options, hardware)


@functools.lru_cache(maxsize=1024)  # nothing here is traced, and options are plain numbers
def _prepared(
    num_rows: int,
    shape: torch.Size,
    strides: tuple[int, ...],
    offset: int,
    dtype: torch.dtype,
    options: LossOptions,
    hardware: _launch.Hardware,
) -> _Prepared:
    planned, place = plan(num_rows, shape[-1], dtype, options, hardware), _place(offset, strides)
    arguments = {
        "offset_x": place.offset,
        "stride_xb": place.stride_b,
        "stride_xn": place.stride_n,
        "N": shape[-2],
        "V": shape[-1],
        "exclude_id": options.exclude_id,
        "softcap": options.softcap,
        "label_smoothing": options.label_smoothing or None,
    }
    return _Prepared(planned, place, arguments | planned.arguments)


def _arguments(logits: Tensor, rows: LossRows, prepared: _Prepared) -> dict[str, Any]:
    """The arguments that all kernels take."""
    targets, is_masked, weights = rows.contiguous()
    return prepared.arguments | {
        "x_ptr": logits,
        "targets_ptr": targets,
        "is_masked_ptr": is_masked,
        "weights_ptr": weights,
    }


def _launch_rows(
    logits: Tensor,
    rows: LossRows,
    records: Tensor | None,
    options: LossOptions,
    prepared: _Prepared,
    num_pieces: int | None,
    gradient: Tensor | None,
    denominator: Tensor | None,
    *,
    losses: RowLosses | None = None,
    upstream: Tensor | None = None,
    holds_unit: bool = False,
) -> None:
    """Losses and gradient, where there is room for them; ``num_pieces`` of the records at hand, None for none."""
    num_rows, of_logits = rows.targets.numel(), prepared.place
    of_gradient = of_logits
    if gradient is not None and gradient is not logits:
        of_gradient = _place(logit_rows.offset_from_boundary(gradient), gradient.stride())
    arguments = _arguments(logits, rows, prepared) | {
        "losses_ptr": None if losses is None else losses.loss,
        "nll_ptr": None if losses is None else losses.nll,
        "correct_ptr": None if losses is None else losses.correct,
        "gradient_ptr": gradient,
        "offset_g": of_gradient.offset,
        "stride_gb": of_gradient.stride_b,
        "stride_gn": of_gradient.stride_n,
        "upstream_ptr": upstream,
        "stride_u": upstream.stride(0) if upstream is not None and upstream.ndim else 0,
        "denominator_ptr": denominator,
        "z_loss": options.z_loss or None,
        "HOLDS_UNIT": holds_unit,
    }
    if prepared.plan.rows is not None:
        grid = (_launch.cdiv(num_rows, prepared.plan.rows),)
        _launch.launch(short_rows_kernel, grid, logits, **arguments, num_rows=num_rows)
        return
    _launch.launch(
        _rows_kernel,
        (num_rows, 1 if num_pieces is None or gradient is None else num_pieces),
        logits,
        **arguments,
        records_ptr=records,
        num_pieces=num_pieces,
        PIECE_LANES=_launch.next_power_of_2(num_pieces or 1),
        SAME_PHASE=of_gradient is of_logits or of_gradient.is_in_phase(of_logits, arguments["VECTOR"]),
    )


def losses_and_gradient(
    logits: Tensor, rows: LossRows, denominator: Tensor | None, options: LossOptions, gradient: Tensor | None
) -> RowLosses:
    """Losses of the rows, of any shape, of logits [B, N, V] or [R, V].

    gradient: (the logits themselves, if need be) is filled with that of sum w loss / denominator.
    """
    num_rows = rows.targets.numel()
    prepared = _prepare(logits, num_rows, options)
    losses = _allocate(rows, options, prepared.plan.num_pieces, gradient)
    if num_rows:
        num_pieces = prepared.plan.num_pieces if prepared.plan.num_pieces > 1 else None
        if num_pieces is not None:
            _launch.launch(
                _records_kernel,
                (num_rows, num_pieces),
                logits,
                **_arguments(logits, rows, prepared),
                records_ptr=losses.records,
                WITH_CORRECT=options.with_correct,
            )
        records = losses.records
        _launch_rows(logits, rows, records, options, prepared, num_pieces, gradient, denominator, losses=losses)
    return losses


# The operators


def _new_gradient(logits: Tensor) -> Tensor:
    """Room for it, contiguous: rows of logits may overlap."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _reduced(
    logits: Tensor, rows: LossRows, reduction: Reduction, options: LossOptions, gradient: Tensor | None
) -> RowLosses:
    """The rows' losses, the loss by the reduction; ``gradient`` is filled with that of a sum or mean."""
    losses = losses_and_gradient(logits, rows, reduction.denominator, options, gradient)
    return RowLosses(reduced(losses.loss, reduction), *losses[1:])


def _fake(
    logits: Tensor, rows: LossRows, reduction: Reduction, options: LossOptions, with_gradient: bool = False, *_: Any
) -> RowLosses:
    hardware = _launch.hardware(logits.device)
    num_pieces = pieces_of_a_row(rows.targets.numel(), logits.shape[-1], logits.dtype, options, hardware)
    losses = _allocate(rows, options, num_pieces, _new_gradient(logits) if with_gradient else None)
    return losses if reduction.kind == "none" else losses._replace(loss=losses.loss.new_empty(()))


@operator("masked_cross_entropy", _fake)
def _operation(
    logits: Tensor,
    rows: LossRows,
    reduction: Reduction,
    options: LossOptions,
    with_gradient: bool,
    inplace_grad: bool,
) -> RowLosses:
    """The losses of the rows, and where asked for the gradient of their sum or mean."""
    return _reduced(logits, rows, reduction, options, _new_gradient(logits) if with_gradient else None)


@operator("masked_cross_entropy_gradient_", mutates=("gradient",))
def _write_gradient(
    gradient: Tensor,
    logits: Tensor | None,
    rows: LossRows,
    denominator: Tensor | None,
    records: Tensor | None,
    upstream: Tensor,
    options: LossOptions,
    holds_unit: bool,
) -> None:
    """The gradient for what comes from above, [] or of the rows' shape.

    logits: None where they lie where it goes. holds_unit: the buffer holds what an upstream gradient of 1 asks for,
    and is left alone if that is what comes.
    """
    num_rows = rows.targets.numel()
    if num_rows:
        logits = gradient if logits is None else logits
        prepared = _prepare(logits, num_rows, options)
        _launch_rows(
            logits,
            rows,
            records,
            options,
            prepared,
            prepared.plan.num_pieces,
            gradient,
            denominator,
            upstream=upstream if upstream.ndim <= 1 else upstream.flatten(),
            holds_unit=holds_unit,
        )


def _setup_context(ctx: Any, inputs: Any, output: RowLosses) -> None:
    logits, rows, reduction, ctx.options, ctx.holds_unit, ctx.inplace_grad = inputs
    ctx.save_for_backward(logits, *rows, reduction.denominator, output.records, output.gradient)


@first_order_only
def _backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor]:
    logits, *rows, denominator, records, gradient = ctx.saved_tensors
    holds_unit, ctx.holds_unit = ctx.holds_unit and is_plain(gradient), False
    if holds_unit:
        # Given away once: a second backward makes its own. Under detach() it would find a changed version.
        gradient = gradient.data
    elif ctx.inplace_grad:
        gradient, logits = logits.detach(), None
    else:
        gradient = _new_gradient(logits)
    _write_gradient(gradient, logits, LossRows(*rows), denominator, records, grad_loss, ctx.options, holds_unit)
    return (gradient,)


differentiable(_operation, 1, _backward, _setup_context)


@operator("masked_cross_entropy_", _fake, mutates=("logits",))
def _inplace_operation(logits: Tensor, rows: LossRows, reduction: Reduction, options: LossOptions) -> RowLosses:
    """The losses of the rows, with the gradient of their sum or mean where the logits were."""
    return _reduced(logits, rows, reduction, options, logits)._replace(gradient=None)


class _InPlace(torch.autograd.Function):
    """An operation that writes to its input cannot register a derivative of its own."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, rows: LossRows, reduction: Reduction, options: LossOptions, others: list[Any]
    ) -> Tensor:
        losses = _inplace_operation(logits, rows, reduction, options)
        ctx.save_for_backward(logits)
        ctx.is_spent = False
        others.extend(losses[1:])
        return losses.loss

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_spent:
            raise RuntimeError(
                "inplace_grad=True gave the logits' memory to the first backward; leave it out to run a second one"
            )
        ctx.is_spent = True
        gradient = ctx.saved_tensors[0].detach()
        scale_(gradient, grad_loss)
        return gradient, None, None, None, None


def masked_cross_entropy(
    logits: Tensor, rows: LossRows, reduction: Reduction, options: LossOptions, inplace_grad: bool
) -> CrossEntropy:
    """See the reference, ``fastmask.reference.masked_cross_entropy``: same arguments, same outputs."""
    reduction = with_denominator(reduction, rows)
    is_compiling = torch.compiler.is_compiling()
    # A float16 gradient formed before the loss scale arrives would underflow, and that of single losses needs
    # what comes from above. Compiled, a buffer that backward corrects in place would be copied first.
    in_forward = (
        logits.requires_grad
        and torch.is_grad_enabled()
        and reduction.kind != "none"
        and logits.dtype != torch.float16
        and not is_compiling
    )
    inplace_grad = inplace_grad and logits.is_contiguous() and not is_compiling
    logits = logits if logits.ndim <= 3 else logits.flatten(0, -2)
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    rows = rows.contiguous()  # copied, if they must be, once: backward has them too
    if in_forward and inplace_grad:
        others: list[Any] = []
        out = RowLosses(_InPlace.apply(logits, rows, reduction, options, others), *others)
    else:
        out = _operation(logits, rows, reduction, options, in_forward, inplace_grad)
    return CrossEntropy(out.loss, out.nll, out.correct if options.with_correct else None)
