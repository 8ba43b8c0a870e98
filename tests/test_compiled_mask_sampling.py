"""What the compilers make of the mask sampler."""

from __future__ import annotations

import pytest
from benchmark_helpers import assert_nothing_spills

from benchmarks.compiled import THREE_TARGETS as TARGETS
from benchmarks.programs import PROGRAMS

OPERATION = "mask_sampling"
SAMPLERS = [name for name in PROGRAMS[OPERATION] if name != "row list"]

# Measured with Triton 3.7.1; the bounds leave about a tenth for other versions. Instructions are the whole
# program's, of which a thread of "1024" has 4 positions: 1030 on sm_90, 72 a round of the search.
MOST_REGISTERS = {
    "128": 62,
    "1024": 56,
    "4096 gated": 196,
    "65536 gated": 106,
    "1024 complement": 53,
    "4096 complement gated": 240,
    "1024 by token": 70,
    "65536 complement by token": 84,
}
MOST_INSTRUCTIONS = {
    "128": {"sm_80": 1180, "sm_90": 1180, "gfx942": 900},
    "1024": {"sm_80": 1110, "sm_90": 1140, "gfx942": 1010},
    "4096 gated": {"sm_80": 4700, "sm_90": 4730, "gfx942": 3490},
    "65536 gated": {"sm_80": 2700, "sm_90": 2720, "gfx942": 2100},
    "1024 complement": {"sm_80": 1120, "sm_90": 1150, "gfx942": 990},
    "4096 complement gated": {"sm_80": 4180, "sm_90": 4210, "gfx942": 3070},
    "1024 by token": {"sm_80": 1300, "sm_90": 1330, "gfx942": 1110},
    "65536 complement by token": {"sm_80": 1690, "sm_90": 1690, "gfx942": 1170},
}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(figures, target):
    assert_nothing_spills(figures, target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_instructions_and_registers(figures, name, target):
    figure = figures[name][target]
    assert figure["registers"] <= MOST_REGISTERS[name]
    assert figure["instructions"] <= MOST_INSTRUCTIONS[name][target]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_tokens_move_16_bytes_at_a_time(figures, name, target):
    assert figures[name][target]["load_bits"] == 128
    assert figures[name][target]["store_bits"] == 128


@pytest.mark.slow
def test_a_round_of_the_search_is_short(figures):
    """At 1024 positions four rounds on average: rows' counts and the search are the program's two loops."""
    assert max(figures["1024"]["sm_90"]["loops"]) <= 115
    assert len(figures["1024"]["sm_90"]["loops"]) == 2
