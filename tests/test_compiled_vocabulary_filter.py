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
NUCLEI = (
    "thresholds p", "thresholds p fp16", "thresholds p of 50257", "thresholds p of 50257 fp16", "thresholds p long",
)  # fmt: skip
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
    for name in NUCLEI:
        assert figures[name]["sm_90"]["registers"] * 32 * 16 <= 2**16, name


@pytest.mark.slow
def test_so_they_do_on_blackwell_where_nothing_spills():
    """13 programs of one warp on a B200."""
    for name, of_name in compiled.figures(OPERATION, dict.fromkeys(NUCLEI, ("sm_100", "sm_120"))).items():
        for target, figure in of_name.items():
            assert_nothing_spills({name: of_name}, target)
            warps = 13 if target == "sm_100" and figure["num_warps"] == 1 else 16
            assert figure["registers"] * 32 * warps <= 2**16, (name, target)


@pytest.mark.parametrize("target", compiled.TARGETS)
def test_a_launch_of_16_bit_logits_asks_for_few_registers_from_hopper_on(kernel, target):
    """Of a nucleus alone; launches are recorded, nothing runs."""
    filter = kernel.module("vocabulary_filter")
    for vocabulary in (8192, 50257):
        asked = []
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            with compiled.recorded(compiled.hardware(target)) as launches:
                F.sample_tokens(torch.zeros(1, 2, vocabulary, dtype=dtype), top_p=0.9, seed=0, backend="triton")
            asked += [launch.arguments.get("maxnreg") for launch in launches if launch.name == "_thresholds_kernel"]
        most = filter._REGISTERS if target in ("sm_90", "sm_100", "sm_120") else None
        if target == "sm_100" and vocabulary == 8192:
            most = filter._REGISTERS_OF_WARP_ON_B200
        assert asked == [most, most, None]
