"""Every benchmark's cases and contenders under pytest-benchmark: the same gate and step as ``python -m benchmarks``.

A case's contenders follow each other, since one case's tensors are kept at a time.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.benchmark import Benchmark, kept_problem
from benchmarks.comparison import fresh_compilers
from benchmarks.gate import NEEDS_CUDA, Refused, admit
from benchmarks.records import Contender
from benchmarks.suite import BENCHMARKS
from benchmarks.timing import CPU_VISITS, FULL


@pytest.mark.parametrize(
    ("operation", "case", "contender"),
    [
        pytest.param(operation, case, contender, id=f"{operation.name}-{case}-{contender}")
        for operation in BENCHMARKS
        for case in operation.cases(False)
        for contender in operation.contenders()
    ],
)
def test_contender(benchmark: Any, operation: Benchmark, case: Any, contender: Contender) -> None:
    """Skips what another contender cannot do here, fails where fastmask is refused."""
    fresh_compilers()
    problem = kept_problem(operation, case)
    try:
        step, _ = admit(contender, problem)
    except Refused as refusal:
        if contender.is_ours and refusal.status != NEEDS_CUDA:
            raise
        pytest.skip(str(refusal))

    def run() -> None:
        step.run()
        if problem.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{operation.name}, {case}"
    benchmark.pedantic(run, setup=step.restore, rounds=CPU_VISITS * FULL.min_rounds, warmup_rounds=1)
