"""Triton's interpreter, quickened: its language is replaced while a launch lasts, its answers are what they were."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = triton.language


@triton.jit
def _square(x):
    return x * x + 1


@triton.jit
def _kernel(out_ptr, x_ptr, size: tl.constexpr, fails: tl.constexpr):
    columns = tl.arange(0, size)
    squares = _square(tl.load(x_ptr + columns))
    if fails:
        squares += tl.arange(0, 2 * size)
    tl.store(out_ptr + columns, squares + tl.max(squares, 0))


def test_the_language_is_tritons_own_before_and_after_a_launch(kernel):
    if kernel.name != "interpreter":
        pytest.skip("of the interpreter")

    def language():
        return tl.load, tl.arange, tl.range, tl.tensor.__add__, tl.dtype.to_ir

    own, x = language(), torch.tensor([3, 65536, -2, 46341], dtype=torch.int32)
    squares = (x.long() ** 2 + 1).to(torch.int32)  # of which two overflow, as on a GPU
    for _ in range(2):
        out = torch.empty_like(x)
        _kernel[(1,)](out, x, 4, False)
        assert torch.equal(out, squares + squares.max())
        assert language() == own
        with pytest.raises(triton.runtime.errors.InterpreterError):
            _kernel[(1,)](out, x, 4, True)
        assert language() == own
