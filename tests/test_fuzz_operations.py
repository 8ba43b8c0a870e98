"""Random calls: operations against float64 oracles, steps on the kernels and on their twins; some hundreds.

``fuzz_operations.py`` and ``fuzz_combinations.py`` run more.
"""

from __future__ import annotations

from collections import Counter

import fuzz_combinations
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
@pytest.mark.parametrize(("is_filtered", "calls"), [(False, 15), (True, 3)])
def test_combinations(kernel, reference, is_filtered, calls):
    """Every part of a step with every other; ties to rounding: none of these are today."""
    ties = Counter()
    for number in range(calls):
        ties += fuzz_combinations.run_case(number, kernel, reference, is_filtered)
    assert ties.total() <= 1, ties


@pytest.mark.ptx
@pytest.mark.slow
@pytest.mark.parametrize("block", range(6))
def test_combinations_of_few_rows(kernel, reference, block):
    """Ten each, two of them filtered."""
    ties = Counter()
    for number in range(10 * block, 10 * block + 10):
        ties += fuzz_combinations.run_case(number, kernel, reference, number % 5 == 0, is_tiny=True)
    assert ties.total() <= 1, ties


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
