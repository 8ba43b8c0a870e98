"""What both losses share besides the kernels of a row: a mean's denominator, and a gradient formed in forward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels import _launch, _math
from fastmask.records import LossRows, Reduction

_BLOCK = 8192


@triton.jit
def _scale_kernel(x_ptr, factor_ptr, num_elements, BLOCK: tl.constexpr):
    # This program multiplies a block by the factor, unless that is 1.
    factor = tl.load(factor_ptr)
    if factor == 1.0:
        return
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < num_elements)
    scaled = _math.rounded(x.to(tl.float32) * factor, x_ptr.dtype.element_ty)
    tl.store(x_ptr + offsets, scaled, mask=offsets < num_elements)


def scale_(x: Tensor, factor: Tensor) -> None:
    """x *= factor, a float32 scalar on the device; x, contiguous, is not touched where it is 1."""
    num_elements = x.numel()
    if num_elements:
        grid = (_launch.cdiv(num_elements, _BLOCK),)
        _launch.launch(_scale_kernel, grid, x, x_ptr=x, factor_ptr=factor, num_elements=num_elements, BLOCK=_BLOCK)


def is_plain(x: Tensor) -> bool:
    """Whether x may be written in place unseen: not while something traces it."""
    return type(x) is Tensor


def reduced(losses: Tensor, reduction: Reduction) -> Tensor:
    """The loss by the reduction, of the rows' losses."""
    if reduction.kind == "none":
        return losses
    total = losses.sum()
    return total if reduction.denominator is None else total.div_(reduction.denominator)


def with_denominator(reduction: Reduction, rows: LossRows) -> Reduction:
    """The reduction, a mean's denominator put in where it is the number of rows that count."""
    if reduction.kind != "mean" or reduction.denominator is not None:
        return reduction
    if rows.is_masked is None and rows.weights is None:
        num_rows = rows.targets.new_full((), max(1, rows.targets.numel()), dtype=torch.float32)
        return Reduction("mean", num_rows)
    # As exact as an integer up to 2**24 rows, beyond to the rounding of the loss, and an operation less.
    return Reduction("mean", rows.counted().sum(dtype=torch.float32).clamp_min_(1.0))
