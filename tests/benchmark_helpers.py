"""What the tests of the benchmarks share: contenders, and results as a run leaves them.

Imported before ``benchmarks``, which it puts where it can be imported.
"""

from __future__ import annotations

import importlib.util
import pathlib
import sys
import time

import pytest
import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).parents[1]
if not (ROOT / "benchmarks").exists():
    pytest.skip("needs the checkout around the tests, not an installed wheel", allow_module_level=True)
if "benchmarks" not in sys.modules:  # the root is not on pytest's path
    spec = importlib.util.spec_from_file_location("benchmarks", ROOT / "benchmarks" / "__init__.py")
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)

from benchmarks import bench_masked_cross_entropy as dense  # noqa: E402
from benchmarks import comparison, losses  # noqa: E402
from benchmarks.records import WITH_MASK, Contender, Floor, Row  # noqa: E402
from benchmarks.timing import Effort  # noqa: E402

CPU = torch.device("cpu")
FLOOR = Floor(1e6, 10.0, "GB/s")
ONCE, THRICE = Effort(1, 1, 0.0), Effort(3, 3, 0.0)


def compare(contenders, problem, floor=FLOOR, bounds=None, effort=THRICE) -> list[Row]:
    rows = comparison.compare(contenders, problem, floor, bounds or {}, effort)
    return [{"operation": "operation", "case": "case", "shape": {}} | row for row in rows]


def contender(loss, given=WITH_MASK, **options) -> Contender:
    return Contender(getattr(loss, "__name__", "lambda"), given, lambda: loss, **options)


def right(logits, targets, is_masked):
    return F.cross_entropy(logits[is_masked], targets[is_masked])


def slow(logits, targets, is_masked):
    time.sleep(0.02)
    return right(logits, targets, is_masked)


def wrong_row(logits, targets, is_masked):
    return right(logits, targets.roll(1), is_masked)


def loss_problem() -> losses.LossProblem:
    return dense.problem(dense.Case(32, 67, 0.5, CPU))


def assert_nothing_spills(figures, target, *, may_spill_scalars=False) -> None:
    """AMD's scalar registers spill to lanes of vector registers: to no memory."""
    kinds = ("stack", "spills") if may_spill_scalars else ("stack", "spills", "scalar_spills")
    for name, of_target in figures.items():
        spills = {kind: of_target.get(target, {}).get(kind, 0) for kind in kinds}
        assert not any(spills.values()), (name, spills)


def a_row(operation, case, contender, ms, **changes):
    is_ours, is_eager = contender.startswith("fastmask"), contender == "x-transformers"
    row = {"operation": operation, "case": case, "contender": contender, "name": contender, "given": "", "ms": ms}
    row |= {"status": "ok", "is_ours": is_ours, "is_baseline": is_eager, "percent_of_floor": 50.0, "rate": 1e4 / ms}
    row |= {"peak_mib": 10.0 * ms, "outside_ms": ms / 2, "shape": {"num_rows": 8, "num_tokens": 9, "mask_ratio": 0.5}}
    return row | changes


def some_results(date="2026-11-22", quick=False, **changes):
    half, whole = ({"num_rows": 8, "num_tokens": 9, "mask_ratio": ratio} for ratio in (0.5, 1.0))
    rows = [
        a_row(operation, case, contender, ms)
        for operation, case in (("train", "small"), ("generate", "small"), ("sample_tokens", "8x9"))
        for contender, ms in (("fastmask", 2.0), ("x-transformers", 5.0), ("torch.multinomial", 1234.5))
    ]
    rows += [
        a_row("masked_cross_entropy", f"8x9, mask ratio {shape['mask_ratio']}", name, 1.5, shape=shape)
        for shape in (half, whole)
        for name in ("fastmask", "x-transformers")
    ]
    found = {"device": "cpu", "name": "A CPU", "date": date, "quick": quick, "commit": "abc", "clocks": None}
    found |= {"versions": {"torch": "2"}, "threads": 2, "ceilings": {"copy": 10.0, "product": 1.0}, "rows": rows}
    return found | {"scaling": [], "largest_batches": []} | changes
