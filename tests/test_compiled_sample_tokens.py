"""What the compilers make of the sampler."""

from __future__ import annotations

import pytest
from benchmark_helpers import assert_nothing_spills

from benchmarks.compiled import TARGETS

OPERATION = "sample_tokens"

# Of the whole program over the 128 or 64 logits of a thread, addresses, reductions and branches included; edges, and
# the vector of the mask's column, are a logit or two more. Measured with Triton 3.7.1: 7.6, 10.8, 12.8, 12.8, 19.8,
# 14.0, 23.6, 7.5, 10.8, 12.8, 23.4. On an H200 (29.6e12 instructions of lanes a second) a bf16 logit at 80 % of
# 4.3 TB/s leaves 17.2, at 50 % 27.5.
MOST_INSTRUCTIONS_A_LOGIT = {
    "tiles": 8.0,
    "tiles T": 11.5,
    "tiles T sub-tiles": 13.5,
    "tiles T filtered": 13.5,
    "tiles T margin": 20.5,
    "tiles T entropy": 14.5,
    "tiles T margin entropy": 24.5,
    "tiles T processed": 8.0,
    "tiles T processed entropy": 11.5,
    "tiles T min_p": 13.5,
    "tiles T forbidden": 24.5,
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(figures, target):
    held = {name: figure for name, figure in figures.items() if "small" in name or not name.endswith("fp64")}
    assert_nothing_spills(held, target, may_spill_scalars=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_logits_are_read_16_bytes_at_a_time(figures, target):
    for name, figure in figures.items():
        if name.startswith("tiles") and "small" not in name:
            assert figure[target]["load_bits"] == 128, name


@pytest.mark.slow
@pytest.mark.parametrize("name", MOST_INSTRUCTIONS_A_LOGIT)
def test_instructions_a_logit(figures, name):
    figure = figures[name]["sm_90"]
    per_logit = figure["instructions"] / (figure["block"] / (32 * figure["num_warps"]))
    assert per_logit <= MOST_INSTRUCTIONS_A_LOGIT[name], per_logit


@pytest.mark.slow
def test_a_choice_costs_little_beside_its_row(figures):
    """129,000 instructions of lanes a row, of which 33,000 are mostly jumped over; 227,000 with every option; 48,000
    where the sums of sub-tiles are known. Of those 10,000, 17,000 and 8,000 are of sure rows alone, whose 16 rounds
    over a tile others jump over. The tiles of 50257 bf16 logits take 0.7 million, those of 8192 0.1."""
    assert figures["choice plain"]["sm_90"]["instructions"] * 64 <= 135_000
    assert figures["choice"]["sm_90"]["instructions"] * 64 <= 237_000
    assert figures["choice sub-tiles"]["sm_90"]["instructions"] * 32 <= 51_000
    assert figures["choice"]["sm_90"]["load_bits"] == 128
