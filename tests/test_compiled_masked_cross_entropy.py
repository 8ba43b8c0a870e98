"""What the compilers make of the loss."""

from __future__ import annotations

import pytest
from benchmark_helpers import assert_nothing_spills

from benchmarks.compiled import TARGETS, THREE_TARGETS
from benchmarks.programs import PROGRAMS

OPERATION = "masked_cross_entropy"
# What is not bfloat16 differs in its loads and stores alone.
WANTED = {name: tuple(TARGETS) if "bf16" in name else THREE_TARGETS for name in PROGRAMS[OPERATION]}
SHORT = ("eight rows", "four rows")

# 4.3 TB/s at 4 bytes an element (bfloat16, all masked: read once, written once) are 1.075e12 elements a second; an
# H200's 132 x 4 x 32 lanes at 1.755 GHz do 29.6e12 instructions: 28 an element, 41 at half masked, twice that for
# float32. Options cost more than that, softcap several times. Counted on sm_90 with Triton 3.7.1: everything that
# lies between the ends of the two loops (reduction, gradient), over the columns a thread has in a tile. So the
# branch for the tile that holds the target, which runs once a row and is else jumped over, counts in full; what is
# run, with all that a row costs besides, is counted in test_costs.py.
MOST_INSTRUCTIONS_AN_ELEMENT = {"plain": 24, "special": 32, "costly": 160}  # measured: 21.7, 28.9, 143.7
# Where rows are split, of the gradient, and of the reduction.
MOST_OF_THE_GRADIENT = {"plain": 12, "special": 14.5, "costly": 73}  # measured: 10.7, 13.1, 66.9
MOST_OF_THE_REDUCTION = {"plain": 13, "special": 19, "costly": 85}  # measured: 11.6, 17.0, 77.0
# Sixteen warps are to share an SM's 65536, or twelve that do short rows.
MOST_REGISTERS, MOST_REGISTERS_OF_SHORT_ROWS = 128, 168


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(figures, target):
    assert_nothing_spills(figures, target, may_spill_scalars=True)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", [name for name in WANTED if not name.startswith(SHORT)])
def test_logits_move_16_bytes_at_a_time(figures, name, target):
    assert figures[name][target]["load_bits"] == 128
    if name != "backward" and not name.endswith("records"):
        assert figures[name][target]["store_bits"] == 128


@pytest.mark.slow
@pytest.mark.parametrize("target", [target for target in TARGETS if target.startswith("sm_")])
def test_no_warp_waits_for_another_before_a_row_ends(figures, target):
    for name, of_target in figures.items():
        if name != "backward" and target in of_target:
            assert of_target[target]["barriers"] == 0, name


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WANTED if name != "backward"])
def test_instructions_and_registers(figures, name):
    figure, kind = figures[name]["sm_90"], name.split(", ")[1]
    assert figure["registers"] <= (MOST_REGISTERS_OF_SHORT_ROWS if name.startswith(SHORT) else MOST_REGISTERS)
    if not name.startswith(SHORT):
        most, loops = MOST_INSTRUCTIONS_AN_ELEMENT[kind], 2
        if name.startswith("split"):
            most, loops = MOST_OF_THE_GRADIENT[kind], 1
        if name.endswith("records"):
            most = MOST_OF_THE_REDUCTION[kind]
        columns_a_thread = figure["block"] / (32 * figure["num_warps"])
        assert sum(figure["loops"][:loops]) / columns_a_thread <= most
