"""What the compilers make of the sampler."""

from __future__ import annotations

import pytest
from benchmark_helpers import assert_nothing_spills

from benchmarks.compiled import TARGETS

OPERATION = "sample_tokens"

# Of the whole program over the 64 logits of a thread, addresses, reductions and branches included. Of those the
# mask's column (3.9 a logit) is mostly jumped over, and so are the edges (2.3) where rows begin at 16 bytes, as
# they do behind a linear head. Measured with Triton 3.7.1: 12.7, 16.3, 16.2, 19.4, 23.8, 18.7, 26.5, 12.8, 15.3,
# 19.4, 27.6. On an H200 (29.6e12 instructions of lanes a second) a bf16 logit at 80 % of 4.3 TB/s leaves 17.2, at
# 50 % 27.5.
MOST_INSTRUCTIONS_A_LOGIT = {
    "tiles": 14.0,
    "tiles T": 17.5,
    "tiles T sub-tiles": 17.5,
    "tiles T filtered": 21.0,
    "tiles T margin": 25.5,
    "tiles T entropy": 20.5,
    "tiles T margin entropy": 28.5,
    "tiles T processed": 14.0,
    "tiles T processed entropy": 16.5,
    "tiles T min_p": 21.0,
    "tiles T forbidden": 28.0,
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
