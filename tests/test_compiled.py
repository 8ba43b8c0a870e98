"""Launches are recorded, and compiled as Triton would compile them (``benchmarks/compiled.py``)."""

from __future__ import annotations

import benchmark_helpers  # noqa: F401
import pytest
import torch

from benchmarks import compiled, programs

pytest.importorskip("triton")


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_every_program_is_a_launch(target):
    for operation, of_operation in programs.PROGRAMS.items():
        for name, program in of_operation.items():
            with compiled.recorded(compiled.hardware(target)) as launches:
                program.call()
            of_kernel = [launch for launch in launches if launch.name == program.kernel]
            assert len(of_kernel) > program.number, (operation, name)
            for launch in of_kernel:
                warps = launch.arguments.get("num_warps", 4)
                assert warps <= compiled.hardware(target).max_warps, (operation, name)


def test_nothing_runs_and_nothing_is_left_replaced():
    from fastmask.kernels import _launch

    before = _launch.launch, _launch.hardware
    with compiled.recorded(compiled.hardware("gfx942")) as launches:
        tokens = torch.zeros(2, 5, dtype=torch.int64)
        programs.F.mask_sampling(tokens, mask_id=9, num_tokens=10, seed=0, backend="triton")
        assert _launch.hardware(tokens.device).warp_size == 64
    (launch,) = launches
    assert (launch.name, launch.grid[0]) == ("_mask_sampling_kernel", 2)
    assert launch.arguments["tokens_ptr"].data_ptr() == tokens.data_ptr()
    assert (_launch.launch, _launch.hardware) == before


def test_loops_and_widths_are_told_from_machine_code():
    code = [
        (0x00, "LDG.E.128.CONSTANT R4, [R2.64]"),
        (0x10, "FADD R4, R4, R5"),
        (0x20, "LDG.E.U16 R6, [R2.64]"),
        (0x30, "@P0 BRA 0x10"),
        (0x40, "STG.E.64 [R2.64], R4"),
        (0x50, "@!P1 BRA `(.L_x) 0x0"),
        (0x60, "BRA 0x80"),
    ]
    assert [len(loop) for loop in compiled._loops(code)] == [6, 3]
    assert compiled._widest(code, "LDG") == 128
    assert compiled._widest(code[1:], "LDG") == 16
    assert compiled._widest(code, "STG") == 64
    assert compiled._widest(code[:1], "STG") == 0


def test_a_program_that_is_not_there_says_so():
    with pytest.raises(RuntimeError, match=r"remask were not compiled[\s\S]*no such program"):
        compiled.figures("remask", {"no such program": ["sm_90"]})
