"""Random calls of the operations against float64 oracles: some hundreds; ``fuzz_operations.py`` runs more."""

from __future__ import annotations

import fuzz_tail
import pytest
from fuzz_operations import OPERATIONS, run_case

CALLS, SLOW_CALLS = 60, 100


@pytest.mark.parametrize("operation", OPERATIONS)
def test_reference(operation):
    for number in range(CALLS):
        run_case(number, "reference", operation)


@pytest.mark.slow
def test_kernels(kernel):
    for number in range(SLOW_CALLS):
        run_case(number, "triton")


@pytest.mark.slow
def test_tail():
    """Two million draws of a law with ids of 1e-8; the first are the public function's own."""
    row, _ = fuzz_tail.logits()
    whole, races = (fuzz_tail.sampler(row, 1, whole) for whole in (True, False))
    assert whole(3).tolist() == races(3).tolist()
    figures = fuzz_tail.figures(fuzz_tail.tail_ids(2_000_000, seed=1), 2_000_000)
    assert figures["total_pvalue"] > 1e-5, figures
    assert figures["pvalue"] > 1e-5, figures
    assert figures["effect"] < 0.15, figures
