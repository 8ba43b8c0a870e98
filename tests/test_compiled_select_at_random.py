"""What the compilers make of a coin for each position."""

from __future__ import annotations

import pytest
from benchmark_helpers import assert_nothing_spills

from benchmarks.compiled import THREE_TARGETS as TARGETS

OPERATION = "select_at_random"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(figures, target):
    assert_nothing_spills(figures, target)
