"""Which positions are selected, each by a coin of its own, in one launch.

A position is selected where a uniform of 64 bits lies below its probability.
``fastmask/reference/select_at_random.py`` is the specification, bit for bit.

Bytes for each position: reads whether it is eligible (1) and its probability, if each has its own; writes whether it
is selected (1).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask import _streams as streams
from fastmask.kernels import _launch, philox
from fastmask.kernels._operator import operator
from fastmask.records import Draws

_SELECTION = tl.constexpr(streams.SELECTION)
_BLOCK = 512  # four positions for each thread of four warps: Philox alone holds them busy


@triton.jit
def _is_below(high, low, p):
    """Whether a 64-bit integer of two words lies below p 2^64; every product and difference is exact in float32."""
    is_certain = p >= 1.0
    p = tl.where((p > 0.0) & (is_certain == 0), p, 0.0)
    scaled = p * 4294967296.0
    high_end = scaled.to(tl.int64)
    low_end = tl.ceil((scaled - high_end.to(tl.float32)) * 4294967296.0).to(tl.int64)
    high = high.to(tl.int64)
    return is_certain | (high < high_end) | ((high == high_end) & (low.to(tl.int64) < low_end))


@triton.jit(do_not_specialize=["num_elements", "N", "stride_pb", "stride_pn", "sample_offset", "step"])
def _selection_kernel(
    eligible_ptr,
    probabilities_ptr,  # None where all positions have one, as are its strides
    stride_pb,
    stride_pn,
    probability,  # None where each position has its own
    seed_ptr,
    selected_ptr,
    num_elements,
    N,
    sample_offset,
    step,
    BLOCK: tl.constexpr,
):
    # This program selects among a block of positions of the flat [B, N].
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = offsets < num_elements
    row, position = offsets // N, offsets % N
    if probabilities_ptr is None:
        p = tl.full((BLOCK,), probability, tl.float32)  # the interpreter has no `or` of a scalar and a block
    else:
        p_ptr = probabilities_ptr + row * stride_pb + position * stride_pn
        p = tl.load(p_ptr, mask=is_in, other=0.0).to(tl.float32)
    high, low, _, _ = philox.draw(tl.load(seed_ptr), _SELECTION, sample_offset + row, position, 0, step)
    is_eligible = tl.load(eligible_ptr + offsets, mask=is_in, other=0) != 0
    tl.store(selected_ptr + offsets, is_eligible & _is_below(high, low, p), mask=is_in)


def _empty(eligible: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(eligible, memory_format=torch.contiguous_format)


@operator("select_at_random", _empty)
def select_at_random(
    eligible: Tensor, probability: float | None, probabilities: Tensor | None, draws: Draws
) -> Tensor:
    """See the reference: the eligible positions whose uniforms lie below their probabilities, [B, N] bool."""
    selected = _empty(eligible)
    if selected.numel():
        strides = (None, None) if probabilities is None else probabilities.stride()
        _launch.launch(
            _selection_kernel,
            (_launch.cdiv(selected.numel(), _BLOCK),),
            selected,
            eligible_ptr=eligible.contiguous(),
            probabilities_ptr=probabilities,
            stride_pb=strides[0],
            stride_pn=strides[1],
            probability=probability,
            seed_ptr=draws.seed,
            selected_ptr=selected,
            num_elements=selected.numel(),
            N=eligible.shape[1],
            sample_offset=draws.sample_offset,
            step=draws.step,
            BLOCK=_BLOCK,
        )
    return selected
