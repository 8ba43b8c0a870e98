"""How kernels are launched."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from fastmask.kernels import _launch, _losses  # noqa: E402


@pytest.mark.parametrize("n", [1, 2, 3, 31, 32, 33, 2**31 + 1])
def test_sizes_are_as_tritons(n):
    assert _launch.next_power_of_2(n) == triton.next_power_of_2(n)
    assert [_launch.cdiv(n, m) for m in (1, 2, 7)] == [triton.cdiv(n, m) for m in (1, 2, 7)]


@pytest.mark.ptx
def test_what_triton_tells_apart_is_compiled_once_each(kernel):
    """A dtype, an alignment, a number that 16 divides; and then launched as it was compiled."""
    if kernel.name == "interpreter":
        pytest.skip("the interpreter compiles nothing: pytest --ptx both, or a GPU")
    whole, factor = torch.arange(64.0, device=kernel.device), torch.tensor(3.0, device=kernel.device)
    _launch._compiled.clear()
    for _ in range(2):
        for x in (whole, whole[4:], whole[:33], whole.bfloat16(), whole[1:]):
            x = x if x.data_ptr() % 16 else x.clone()
            expected = x * 3
            _losses.scale_(x, factor)
            assert torch.equal(x, expected)
        assert len(_launch._compiled) == 4  # of 60 and 33 numbers, one


def test_a_launch_that_is_watched_is_tritons_own(kernel, monkeypatch):
    """As by Proton, which adds hooks, or by a hook of a kernel's."""
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)

    @triton.jit
    def nothing_kernel():
        pass

    assert _launch._is_quick(nothing_kernel)
    for name in ("launch_enter_hook", "launch_exit_hook"):
        with monkeypatch.context() as patch:
            patch.setattr(triton.knobs.runtime, name, triton.knobs.HookChain())
            assert _launch._is_quick(nothing_kernel)
            getattr(triton.knobs.runtime, name).add(print)
            assert not _launch._is_quick(nothing_kernel)
    nothing_kernel.add_pre_run_hook(print)
    assert not _launch._is_quick(nothing_kernel)
