"""What the compilers make of noise and selection."""

from __future__ import annotations

import pytest
from benchmark_helpers import assert_nothing_spills

from benchmarks.compiled import THREE_TARGETS as TARGETS

OPERATION = "remask"


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_spills(figures, target):
    assert_nothing_spills(figures, target, may_spill_scalars=True)
