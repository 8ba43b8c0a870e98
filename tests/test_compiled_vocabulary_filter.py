"""What the compilers make of the vocabulary's filters."""

from __future__ import annotations

import pytest
import torch
from benchmark_helpers import assert_nothing_spills

from benchmarks import compiled
from benchmarks.compiled import THREE_TARGETS as TARGETS
from fastmask import functional as F

OPERATION = "vocabulary_filter"

# Of the loops over a row, 16 logits a thread, the largest first: of the pass for k 14.7, of p 17.4, of its measure
# before 11.6, of which the mask's column (3) is mostly jumped over. At 25 % of 4.3 TB/s a bf16 logit leaves 55: for
# these passes, the tiles and the searches.
MOST_INSTRUCTIONS_A_PASS = {"thresholds k of 50257": [15.5], "thresholds p of 50257": [18.2, 12.3]}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(figures, target):
    held = {name: figure for name, figure in figures.items() if not name.endswith("fp64")}
    assert_nothing_spills(held, target, may_spill_scalars=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_logits_are_read_16_bytes_at_a_time(figures, target):
    for name, figure in figures.items():
        if "small" not in name:
            assert figure[target]["load_bits"] == 128, name


@pytest.mark.slow
@pytest.mark.parametrize("name", MOST_INSTRUCTIONS_A_PASS)
def test_instructions_of_a_pass_of_the_filter(figures, name):
    passes = [instructions / 16 for instructions in figures[name]["sm_90"]["passes"]]
    for instructions, most in zip(passes, MOST_INSTRUCTIONS_A_PASS[name], strict=True):
        assert instructions <= most, passes


@pytest.mark.slow
def test_16_warps_of_a_nucleus_fit_into_a_multiprocessor(figures):
    for name in ("thresholds p", "thresholds p fp16", "thresholds p of 50257", "thresholds p of 50257 fp16",
                 "thresholds p long"):  # fmt: skip
        assert figures[name]["sm_90"]["registers"] * 32 * 16 <= 2**16, name


@pytest.mark.parametrize("target", TARGETS)
def test_a_launch_of_16_bit_logits_asks_for_few_registers_on_hopper(kernel, target):
    """Of a nucleus alone; launches are recorded, nothing runs."""
    asked = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        with compiled.recorded(compiled.hardware(target)) as launches:
            F.sample_tokens(torch.zeros(1, 2, 8192, dtype=dtype), top_p=0.9, seed=0, backend="triton")
        asked += [launch.arguments.get("maxnreg") for launch in launches if launch.name == "_thresholds_kernel"]
    most = kernel.module("vocabulary_filter")._HOPPER_REGISTERS if target == "sm_90" else None
    assert asked == [most, most, None]
