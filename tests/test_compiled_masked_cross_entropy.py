"""What the compilers make of the loss."""

from __future__ import annotations

import pytest
from benchmark_helpers import assert_nothing_spills

from benchmarks.compiled import TARGETS
from benchmarks.programs import PROGRAMS

OPERATION = "masked_cross_entropy"

# 4.3 TB/s at 4 bytes an element (bfloat16, all masked: read once, written once) are 1.075e12 elements a second; an
# H200's 132 x 4 x 32 lanes at 1.755 GHz do 29.6e12 instructions: 28 an element, 41 at half masked, twice that for
# float32. Options cost more than that, softcap several times. Counted on sm_90 with Triton 3.7.1: everything that
# lies between the ends of the two loops (reduction, gradient), over the columns a thread has in a tile. So the
# branch for the tile that holds the target, which runs once a row and is else jumped over, counts in full; what is
# run, with all that a row costs besides, is counted in test_costs.py.
MOST_INSTRUCTIONS_AN_ELEMENT = {  # measured: bfloat16, float32
    "one warp, plain": 30,  # 27.2, 26.2
    "one warp, special": 46,  # 41.8, 40.4
    "two warps, plain": 31,  # 28.0, 27.0
    "two warps, special": 47,  # 42.1, 40.8
    "four programs an SM, plain": 31,  # 28.1, 27.1
    "four programs an SM, special": 47,  # 42.6, 40.8
    "two programs an SM, plain": 31,  # 28.0, 27.2
    "two programs an SM, special": 47,  # 42.6, 40.8
    "one program an SM, plain": 35,  # 31.9, 31.0
    "one program an SM, special": 48,  # 43.3, 42.1
}
# Programs that are to share an SM's 65536 registers, and the rest as it was measured with room for a tenth.
MOST_REGISTERS = {
    "one warp, plain": 128,  # sixteen of 32 threads
    "one warp, special": 80,
    "two warps, plain": 128,  # eight of 64
    "two warps, special": 80,
    "four programs an SM, plain": 128,  # of 128
    "four programs an SM, special": 80,
    "two programs an SM, plain": 128,  # two of 256 threads
    "two programs an SM, special": 80,
    "one program an SM, plain": 64,  # one of 1024 threads
    "one program an SM, special": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(figures, target):
    assert_nothing_spills(figures, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", PROGRAMS[OPERATION])
def test_logits_move_16_bytes_at_a_time(figures, name, target):
    assert figures[name][target]["load_bits"] == 128
    if name != "backward" and not name.endswith("records"):
        assert figures[name][target]["store_bits"] == 128


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("name", MOST_REGISTERS)
def test_instructions_and_registers(figures, name, dtype):
    figure = figures[f"{name}, {dtype}"]["sm_90"]
    columns_a_thread = figure["block"] / (32 * figure["num_warps"])
    assert sum(figure["loops"][:2]) / columns_a_thread <= MOST_INSTRUCTIONS_AN_ELEMENT[name]
    assert figure["registers"] <= MOST_REGISTERS[name]
