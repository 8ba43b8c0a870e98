"""A whole training step, against x-transformers' own (the baseline), the network's own time shown apart.

``pytest benchmarks`` or ``python -m benchmarks --only train``.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import end_to_end
from benchmarks.harness import Contender

BENCHMARK = end_to_end.benchmark("train")


@pytest.mark.parametrize("contender", BENCHMARK.contenders(), ids=str)
@pytest.mark.parametrize("case", BENCHMARK.cases(False), ids=str)
def test_training(benchmark: Any, case: end_to_end.Case, contender: Contender) -> None:
    BENCHMARK.run_pytest(benchmark, case, contender)
