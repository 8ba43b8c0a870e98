"""The benchmarks' harness: what the gate refuses, what a table shows, and the floor's arithmetic."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

ROOT = pathlib.Path(__file__).parents[1]
if not (ROOT / "benchmarks").exists():
    pytest.skip("needs the checkout around the tests, not an installed wheel", allow_module_level=True)
if "benchmarks" not in sys.modules:  # the root is not on pytest's path
    spec = importlib.util.spec_from_file_location("benchmarks", ROOT / "benchmarks" / "__init__.py")
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)

from benchmarks import bench_linear_masked_cross_entropy as linear  # noqa: E402
from benchmarks import bench_masked_cross_entropy as dense  # noqa: E402
from benchmarks import harness, peers  # noqa: E402
from benchmarks.harness import ALL_ROWS, COMPACTED, WITH_MASK, Contender, Floor  # noqa: E402

CPU = torch.device("cpu")
FLOORS = dict.fromkeys((WITH_MASK, ALL_ROWS, COMPACTED), Floor(1e6, 10.0, "GB/s"))


def contender(loss, given=WITH_MASK, **options) -> Contender:
    return Contender(getattr(loss, "__name__", "lambda"), given, lambda: loss, **options)


def right(logits, targets, is_masked):
    return F.cross_entropy(logits[is_masked], targets[is_masked])


def slow(logits, targets, is_masked):
    time.sleep(0.02)
    return right(logits, targets, is_masked)


def mask_ignored(logits, targets, is_masked):
    return F.cross_entropy(logits, targets)


def wrong_row(logits, targets, is_masked):
    return right(logits, targets.roll(1), is_masked)


def wrong_mean(logits, targets, is_masked):
    return right(logits, targets, is_masked) * 1.01


def not_a_number(logits, targets, is_masked):
    return right(logits, targets, is_masked) * float("nan")


def gradient_lost(logits, targets, is_masked):
    loss = right(logits, targets, is_masked)
    return loss.detach() + 0.0 * logits.sum()


def raising(logits, targets, is_masked):
    raise RuntimeError("no kernel for this shape")


@pytest.fixture(scope="module")
def problem() -> harness.Problem:
    return dense.problem(dense.Case(32, 67, 0.5, CPU))


@pytest.mark.parametrize("loss", [mask_ignored, wrong_row, wrong_mean, not_a_number, gradient_lost])
def test_gate_refuses_a_wrong_contender(problem, loss):
    (row,) = harness.compare("case", [contender(loss)], problem, FLOORS, {})
    assert row["status"] == "wrong"
    assert "ms" not in row
    assert not all(error <= harness.LIMITS[torch.float32] for error in row["errors"].values())
    assert f"not timed, wrong ({row['reason']}): {loss.__name__} [given the mask]" in harness.table([row], None)


@pytest.mark.parametrize("given", [WITH_MASK, ALL_ROWS, COMPACTED])
def test_gate_admits_eager_whatever_it_is_given(given):
    for case in (dense.Case(32, 67, 0.3, CPU), linear.Case(32, 67, 16, 0.3, CPU)):
        module = dense if isinstance(case, dense.Case) else linear
        (eager,) = [c for c in module.contenders() if c.name == "PyTorch" and c.given == given]
        _, errors = harness.admit(eager, module.problem(case))
        assert max(errors.values()) < 1e-6


def test_a_slow_contender_is_seen_in_the_ratio(problem):
    rows = harness.compare("case", [contender(right, is_baseline=True), contender(slow)], problem, FLOORS, {})
    fast_row, slow_row = rows
    assert fast_row["ratio"]["eager"] == 1.0
    assert slow_row["ratio"]["eager"] < 0.5
    assert slow_row["ms"] > 20
    assert slow_row["percent_of_floor"] < 1
    table = harness.table(rows, None).splitlines()
    assert table[-1].startswith("slow")
    assert json.loads(json.dumps(rows)) == rows


def test_a_contender_that_raises_or_does_not_import_is_reported(problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    liger = [c for c in peers.dense() if c.name.startswith("Liger")]
    rows = harness.compare(
        "case", [contender(raising), *liger, *(replace(c, needs_cuda=False) for c in liger)], problem, FLOORS, {}
    )
    assert [row["status"] for row in rows] == ["raises", *["needs CUDA"] * 2, *["does not import"] * 2]
    table = harness.table(rows, None)
    assert "not timed, raises (RuntimeError: no kernel for this shape): raising [given the mask]" in table
    assert "liger_kernel" in table
    assert "Liger (in place) [all rows, compacted rows]" in table


def test_a_contender_that_overwrites_gets_its_rows_back_and_spoils_nobody_elses(problem):
    def overwriting(logits, labels):
        loss = F.cross_entropy(logits, labels)
        logits.data.zero_()
        return loss

    def other(logits, labels):
        return F.cross_entropy(logits.clone(), labels)

    before = problem.rows.clone()
    both = [contender(overwriting, ALL_ROWS, overwrites=True), contender(other, ALL_ROWS)]
    step, first = harness.admit(both[0], problem)
    assert not step.problem.scratch(ALL_ROWS).any()
    step.restore()
    assert problem.errors(ALL_ROWS, step.run()) == first
    assert [row["status"] for row in harness.compare("case", both, problem, FLOORS, {})] == ["ok", "ok"]
    assert torch.equal(problem.rows, before)


def test_floor_of_the_dense_loss_is_one_plus_mask_ratio_times_the_logits():
    case = dense.Case(16384, 32768, 0.5, torch.device("cuda"))
    floors = dense.floors(case, copy=4000.0)
    assert floors[WITH_MASK].amount == floors[ALL_ROWS].amount == 1.5 * 2**30
    assert floors[COMPACTED].amount == 2**30
    assert floors[WITH_MASK].milliseconds == pytest.approx(1.5 * 2**30 / 4e12 * 1e3)
    assert floors[WITH_MASK].achieved(floors[WITH_MASK].milliseconds) == pytest.approx(4000.0)


def test_floor_of_the_linear_loss_is_three_products_of_the_masked_rows():
    case = linear.Case(8192, 50257, 2048, 0.15, torch.device("cuda"))
    floors = linear.floors(case, product=800.0)
    assert {floor.amount for floor in floors.values()} == {6.0 * 1229 * 2048 * 50257}
    assert floors[ALL_ROWS].milliseconds == pytest.approx(6.0 * 1229 * 2048 * 50257 / 800e12 * 1e3)


@pytest.mark.parametrize("module", [dense, linear])
def test_cases_and_contenders(module):
    quick, everything = module.cases(quick=True), module.cases(quick=False)
    assert set(quick) <= set(everything)
    assert {case.mask_ratio for case in everything} == {0.15, 0.5, 1.0}
    contenders = module.contenders()
    assert len({str(c) for c in contenders}) == len(contenders)
    assert sum(c.is_baseline for c in contenders) == 1
    given: dict[str, set[str]] = {}
    for c in contenders:
        given.setdefault(c.name, set()).add(c.given)
    for name, kinds in given.items():
        assert {ALL_ROWS, COMPACTED} <= kinds or name in ("fastmask", "fastmask (in place)", "x-transformers")


def test_bare_products_leave_the_inputs_alone():
    case = linear.Case(2500, 33, 8, 0.5, CPU)  # two chunks of the reference's
    x, weight = linear.problem(case).rows.clone(), linear.problem(case).parameters[0].clone()
    linear.bare_products(case)()
    assert torch.equal(linear.problem(case).rows, x)
    assert torch.equal(linear.problem(case).parameters[0], weight)


def test_a_published_figure_is_told_apart_from_ours(problem):
    rows = harness.compare("case", [contender(right, is_ours=True)], problem, FLOORS, {})
    last = harness.table(rows, peers.QUACK_DENSE).splitlines()[-1]
    assert "published, not measured here: 3000 GB/s" in last


def test_the_script_runs_as_a_module():
    command = [sys.executable, "-m", "benchmarks.bench_masked_cross_entropy", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout


def weight_forgotten(x, weight, targets, is_masked):
    return F.cross_entropy(F.linear(x[is_masked], weight.detach()), targets[is_masked]) + 0.0 * weight.sum()


def test_gate_refuses_a_wrong_gradient_of_the_weight():
    with pytest.raises(harness.Refused, match=r"wrong: relative error .* weight's gradient 1\.0e"):
        harness.admit(contender(weight_forgotten), linear.problem(linear.Case(32, 67, 16, 0.3, CPU)))


def unmasked_rows_pulled(logits, targets, is_masked):
    """The right loss, with a gradient where there is none."""
    return right(logits, targets, is_masked) + (logits - logits.detach())[~is_masked].sum()


def test_gate_refuses_a_gradient_of_unmasked_rows(problem):
    with pytest.raises(harness.Refused, match="wrong"):
        harness.admit(contender(unmasked_rows_pulled), problem)


def test_ratios_are_to_the_best_of_the_others():
    def timed(ms, given, *, is_ours=False, is_baseline=False, status="ok"):
        return {"ms": ms, "given": given, "is_ours": is_ours, "is_baseline": is_baseline, "status": status}

    rows = [
        timed(2.0, WITH_MASK, is_ours=True),
        timed(12.0, WITH_MASK, is_baseline=True),
        timed(8.0, ALL_ROWS),
        timed(10.0, ALL_ROWS),
        timed(4.0, COMPACTED),
        timed(6.0, COMPACTED),
        timed(1.0, "", status="bound"),
        {"given": ALL_ROWS, "is_ours": False, "is_baseline": False, "status": "wrong"},
    ]
    harness._add_ratios(rows)
    assert rows[0]["ratio"] == {"eager": 6.0, "best on all rows": 4.0, "best on compacted": 2.0, "bare products": 0.5}
    assert rows[4]["ratio"]["best on compacted"] == 1.0
    assert "ratio" not in rows[-1]


def test_a_row_is_the_median_of_its_times_against_its_own_floor(problem, monkeypatch):
    monkeypatch.setattr(harness, "time_rounds", lambda runs, *_: {name: [9.0, 1.0, 2.0] for name in runs})
    floors = {WITH_MASK: Floor(1e9, 1e3, "GB/s"), ALL_ROWS: None, COMPACTED: Floor(5e8, 1e3, "GB/s")}
    row, bound = harness.compare("case", [contender(right)], problem, floors, {"bound": lambda: None})
    assert (row["ms"], row["spread"], row["floor_ms"]) == (2.0, [1.0, 9.0], 1.0)
    assert row["percent_of_floor"] == bound["percent_of_floor"] * 2 == 50.0
    assert row["rate"] == 500.0


@pytest.mark.parametrize("refused", [[0], [1], []], ids=str)
def test_the_script_fails_if_ours_was_refused_anywhere(refused, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark"])
    monkeypatch.setattr(harness, "ceilings", lambda *_: harness.Ceilings(1.0, 1.0))

    def measure(case):
        row = {"case": str(case), "contender": "c", "name": "c", "given": WITH_MASK, "reason": "", "is_ours": True}
        return [row | {"status": "wrong" if case in refused else "needs CUDA", "is_ours": case in refused}]

    assert harness.main(None, lambda quick: [0, 1], measure, peers.QUACK_DENSE) == int(bool(refused))
    assert capsys.readouterr().out.count("not timed") == 2


@pytest.mark.parametrize(("is_ours", "outcome"), [(False, pytest.skip.Exception), (True, harness.Refused)])
def test_pytest_benchmark_skips_others_and_fails_ours(problem, is_ours, outcome):
    with pytest.raises((pytest.skip.Exception, harness.Refused), match="wrong") as refusal:
        harness.run_benchmark(None, contender(wrong_row, is_ours=is_ours), problem, "group")
    assert refusal.type is outcome


@pytest.mark.parametrize("mask_ratio", [0.0, 0.15, 0.5, 1.0])
def test_as_many_rows_are_masked_as_the_floor_says(mask_ratio):
    is_masked = harness.draw_mask(33, mask_ratio, CPU, torch.Generator().manual_seed(0))
    assert is_masked.sum() == linear.Case(33, 67, 16, mask_ratio, CPU).num_masked == round(33 * mask_ratio)
