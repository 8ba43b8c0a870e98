"""Random calls of the operations against float64 oracles: a few hundred each time, more where asked (``-m slow``)."""

from __future__ import annotations

import numpy as np
import pytest
from fuzz_operations import OPERATIONS, run_case

from fastmask import functional

CALLS, SLOW_CALLS = 60, 2000


@pytest.mark.parametrize("operation", OPERATIONS)
def test_reference(operation):
    for number in range(CALLS):
        run_case(number, "reference", operation)


@pytest.mark.slow
def test_kernels(kernel):
    for number in range(SLOW_CALLS):
        run_case(number, "triton")
