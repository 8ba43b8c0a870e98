"""What the compilers make of noise and selection."""

from __future__ import annotations

import benchmark_helpers  # noqa: F401
import pytest

from benchmarks.compiled import TARGETS
from benchmarks.programs import PROGRAMS


@pytest.fixture(scope="module")
def figures(compiled_figures):
    return compiled_figures("remask", dict.fromkeys(PROGRAMS["remask"], TARGETS))


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(figures, target):
    for name, figure in figures.items():
        # AMD's scalar registers spill to lanes of vector registers: to no memory.
        spills = {key: figure[target][key] for key in ("stack", "spills")}
        assert not any(spills.values()), (name, spills)
