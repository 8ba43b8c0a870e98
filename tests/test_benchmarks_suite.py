"""``python -m benchmarks`` and ``pytest benchmarks``: what is run, resumed, kept and refused."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from benchmark_helpers import CPU, ROOT, THRICE, a_row, contender, loss_problem, right, wrong_row

from benchmarks import bench_mask_sampling as masking
from benchmarks import bench_masked_cross_entropy as dense
from benchmarks import bench_sample_tokens as sampling
from benchmarks import end_to_end, gate, machine, report, results_file, scaling, suite, test_all, timing
from benchmarks.__main__ import main
from benchmarks.benchmark import Benchmark
from benchmarks.records import Ceilings
from fastmask import functional


@pytest.fixture
def tiny_suite(monkeypatch) -> Benchmark:
    """``python -m benchmarks --quick`` of one small case; sampling made wrong or slow is seen there."""
    monkeypatch.setattr(machine, "_best", {CPU: Ceilings(10.0, 1.0)})
    monkeypatch.setattr(machine, "measure_ceilings", lambda *_: None)
    monkeypatch.setattr(machine, "default_device", lambda: CPU)
    monkeypatch.setattr(timing, "QUICK", THRICE)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    benchmark = replace(sampling.BENCHMARK, cases=lambda quick: [sampling.Case(64, 500, None, CPU)])
    monkeypatch.setattr(suite, "BENCHMARKS", [benchmark])
    return benchmark


@pytest.fixture
def recorded(tiny_suite, monkeypatch) -> list[int]:
    """Two cases of which every run is said to take 1 ms at the first visit of any, 2 ms at the second, and so on."""
    benchmark = replace(tiny_suite, cases=lambda quick: [sampling.Case(rows, 500, None, CPU) for rows in (32, 64)])
    monkeypatch.setattr(suite, "BENCHMARKS", [benchmark])
    monkeypatch.setattr(scaling, "sweeps", lambda device: [])
    visits: list[int] = []

    def time_rounds(runs, *_):
        visits.append(len(visits) + 1)
        return {name: [float(visits[-1])] * 3 for name in runs}

    monkeypatch.setattr(timing, "time_rounds", time_rounds)
    monkeypatch.setattr(timing, "peak_mib", lambda *_: None)
    return visits


class CutShort(BaseException):
    """As Ctrl-C or a time limit would."""


@pytest.fixture
def cut_short(recorded, monkeypatch, tmp_path) -> list[int]:
    """A quick run of a clean commit that was cut short at the second of its two cases."""
    monkeypatch.setattr(results_file, "_output", lambda *command: "abc1234")
    time_rounds = timing.time_rounds

    def cut_at_the_second(*given):
        if len(recorded) == 1:
            raise CutShort
        return time_rounds(*given)

    with monkeypatch.context() as patched:
        patched.setattr(timing, "time_rounds", cut_at_the_second)
        with pytest.raises(CutShort):
            main(["--quick", "--output", str(tmp_path)])
    return recorded


def cases_and_times(directory) -> list[tuple[str, float]]:
    rows = results_file.newest_of_each_machine(directory)[0]["rows"]
    return [(row["case"].partition("x")[0], row["ms"]) for row in rows if row["contender"] == "fastmask"]


@pytest.mark.slow
def test_the_suite_runs_as_a_module():
    command = [sys.executable, "-m", "benchmarks", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout


def test_the_suite_has_every_operation(monkeypatch):
    from fastmask import _dispatch

    names = {benchmark.name for benchmark in suite.BENCHMARKS}
    assert names == {*_dispatch.OPERATIONS, *end_to_end.TASKS}
    for is_cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_cuda=is_cuda: is_cuda)
        for benchmark in suite.BENCHMARKS:
            quick, everything = benchmark.cases(True), benchmark.cases(False)
            assert set(quick) <= set(everything), benchmark.name
            assert len({replace(case, device=CPU) for case in quick}) >= 2
            assert {case.device.type for case in everything} == {"cuda" if is_cuda else "cpu"}


@pytest.mark.parametrize("refused", [[7], [8], []], ids=str)
def test_the_suite_fails_if_ours_was_refused_anywhere(refused, tiny_suite, monkeypatch, tmp_path, capsys):

    def loss(logits, targets, is_masked):
        return right(logits, targets, is_masked) * (2.0 if logits.shape[1] in refused else 1.0)

    benchmark = replace(
        dense.BENCHMARK,
        cases=lambda quick: [dense.Case(4, num_tokens, 0.5, CPU) for num_tokens in (7, 8)],
        contenders=lambda: [contender(loss, is_ours=True), contender(wrong_row)],
    )
    monkeypatch.setattr(suite, "BENCHMARKS", [benchmark])
    assert main(["--quick", "--output", str(tmp_path)]) == int(bool(refused))
    assert capsys.readouterr().out.count("not timed, wrong") == 2 + len(refused)


@pytest.mark.parametrize(("is_ours", "outcome"), [(False, pytest.skip.Exception), (True, gate.Refused)])
def test_pytest_benchmark_skips_others_and_fails_ours(is_ours, outcome):
    operation = replace(dense.BENCHMARK, problem=lambda case: loss_problem())
    with pytest.raises((pytest.skip.Exception, gate.Refused), match="wrong") as refusal:
        test_all.test_contender(None, operation, "case", contender(wrong_row, is_ours=is_ours))
    assert refusal.type is outcome


def test_pytest_has_every_contender_of_every_case_once():
    (parametrized,) = test_all.test_contender.pytestmark
    _, given = parametrized.args
    parameters = [(operation.name, case, str(one)) for operation, case, one in (each.values for each in given)]
    assert parameters == [
        (operation.name, case, str(one))
        for operation in suite.BENCHMARKS
        for case in operation.cases(False)
        for one in operation.contenders()
    ]
    assert len({each.id for each in given}) == len(parameters)


def test_a_kernel_made_wrong_is_refused_by_the_suite(tiny_suite, monkeypatch, tmp_path, capsys):
    right_sample = functional.sample_tokens
    monkeypatch.setattr(functional, "sample_tokens", lambda *given, temperature, **options: right_sample(
        *given, temperature=0.0, **options
    ))  # fmt: skip
    assert main(["--quick", "--output", str(tmp_path)]) == 1
    assert "not timed, wrong (ids that are not allowed 0.0e+00 (limit 0e+00)" in capsys.readouterr().out
    found = results_file.newest_of_each_machine(tmp_path)[0]
    assert [row["status"] for row in found["rows"] if row["is_ours"]] == ["wrong"] * 2
    assert "`sample_tokens`" not in report.everything(results_file.newest_of_each_machine(tmp_path))


def test_a_kernel_made_slow_is_seen_in_the_report(tiny_suite, monkeypatch, tmp_path):
    right_sample = functional.sample_tokens

    def slow_sample(*given, **options):
        time.sleep(0.2)
        return right_sample(*given, **options)

    monkeypatch.setattr(functional, "sample_tokens", slow_sample)
    assert main(["--quick", "--output", str(tmp_path)]) == 0
    told = report.everything(results_file.newest_of_each_machine(tmp_path))
    (line,) = [line for line in told.splitlines() if "64x500" in line]
    _, ours, _, _, faster_than_eager, _, faster_than_others, *_ = line.strip("| ").split(" | ")
    assert float(ours.removesuffix(" ms")) > 200
    assert max(float(ratio.removesuffix("x")) for ratio in (faster_than_eager, faster_than_others)) < 0.5


def test_a_full_run_comes_to_each_case_twice_with_all_others_between(recorded, tmp_path):
    """What the machine does in the minutes between belongs into the spread."""
    assert main(["--output", str(tmp_path)]) == 0
    rows = results_file.newest_of_each_machine(tmp_path)[0]["rows"]
    timed = [row for row in rows if "ms" in row]
    assert {row["case"] for row in timed} == {row["case"] for row in rows}
    for row in timed:
        first = 1 + (row["shape"]["num_rows"] == 64)
        assert (row["ms"], row["spread"], row["rounds"]) == (first + 1, [first, first + 2], 6)
        assert "times" not in row


def test_a_run_is_held_to_the_best_ceiling_of_all_its_visits(recorded, monkeypatch, tmp_path):
    def measure_ceilings(device):
        rate = {1: 20.0, 3: 50.0}.get(len(recorded), 10.0)  # best before the last visit of four
        machine._best[device] = Ceilings(max(rate, machine._best[device].copy), 1.0)

    monkeypatch.setattr(machine, "measure_ceilings", measure_ceilings)
    assert main(["--output", str(tmp_path)]) == 0
    found = results_file.newest_of_each_machine(tmp_path)[0]
    assert found["ceilings"] == {"copy": 50.0, "product": 1.0}
    for row in found["rows"]:
        if "ms" in row:
            num_rows, num_tokens = row["shape"]["num_rows"], row["shape"]["num_tokens"]
            assert row["floor_ms"] == pytest.approx(num_rows * num_tokens * 4 / 50e9 * 1e3, rel=1e-3)
            assert row["percent_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["ms"], rel=1e-3)


def test_a_quick_run_comes_to_each_case_once(recorded, tmp_path):
    assert main(["--quick", "--output", str(tmp_path)]) == 0
    assert recorded == [1, 2]


def test_a_run_that_is_cut_short_leaves_what_it_has_and_is_resumed(cut_short, monkeypatch, tmp_path):
    assert cases_and_times(tmp_path) == [("32", 1.0)]
    monkeypatch.setattr(machine, "_best", {CPU: Ceilings(50.0, 0.5)})  # of another process
    assert main(["--quick", "--resume", "--output", str(tmp_path)]) == 0
    assert cases_and_times(tmp_path) == [("32", 1.0), ("64", 2.0)]
    found = results_file.newest_of_each_machine(tmp_path)[0]
    assert found["ceilings"] == {"copy": 50.0, "product": 1.0}
    for row in found["rows"]:
        if "ms" in row:
            assert row["floor_ms"] == pytest.approx(row["shape"]["num_rows"] * 500 * 4 / 50e9 * 1e3, rel=1e-3)
    assert main(["--quick", "--resume", "--output", str(tmp_path)]) == 0
    assert cut_short == [1, 2]  # nothing was left to do


def test_a_run_of_some_operations_keeps_the_others_where_they_were(recorded, monkeypatch, tmp_path):
    monkeypatch.setattr(results_file, "_output", lambda *command: "abc1234")
    monkeypatch.setattr(suite, "BENCHMARKS", [suite.BENCHMARKS[0], replace(suite.BENCHMARKS[0], name="another")])
    assert main(["--quick", "--output", str(tmp_path)]) == 0
    assert main(["--quick", "--only", "sample_tokens", "--output", str(tmp_path)]) == 0
    assert cases_and_times(tmp_path) == [("32", 5.0), ("64", 6.0), ("32", 3.0), ("64", 4.0)]


@pytest.mark.parametrize("commit", ["", "abc1234-dirty", "def5678"])
def test_only_results_of_the_same_commit_are_resumed(cut_short, monkeypatch, tmp_path, commit):
    monkeypatch.setattr(results_file, "_output", lambda *command: commit)
    for _ in range(2):
        assert main(["--quick", "--resume", "--output", str(tmp_path)]) == 0
    first = 2 if commit == "def5678" else 4  # of another commit: measured anew, and resumed; unknown: anew each time
    assert cases_and_times(tmp_path) == [("32", first), ("64", first + 1)]


@pytest.mark.parametrize("wrong_visit", [0, 1])
def test_wrong_at_one_visit_is_wrong(recorded, monkeypatch, tmp_path, wrong_visit):
    right_sample = functional.sample_tokens

    def sample(*given, temperature, **options):
        is_wrong = (len(recorded) >= 2) == wrong_visit
        return right_sample(*given, temperature=0.0 if is_wrong else temperature, **options)

    monkeypatch.setattr(functional, "sample_tokens", sample)
    assert main(["--output", str(tmp_path)]) == 1
    ours = [row for row in results_file.newest_of_each_machine(tmp_path)[0]["rows"] if row["is_ours"]]
    assert [row["status"] for row in ours] == ["wrong"] * 4
    assert not any("ms" in row for row in ours)


# ---- how cost grows ----


def test_exponent_of_a_power():
    assert scaling.exponent([(n, 3 * n**1.5) for n in (2, 8, 32)]) == pytest.approx(1.5)


def test_a_sweep_fits_the_upper_half_of_each_contender(monkeypatch):
    def measure(self, case, effort, only):
        ms = max(64, case.seq_len) / 64
        rows = [a_row("mask_sampling", "", name, ms) for name in ("fastmask", "x-transformers") if case.seq_len < 999]
        return [*rows, {"contender": "refused", "status": "wrong"}]

    monkeypatch.setattr(Benchmark, "measure", measure)
    case = masking.Case(2, 8, False, CPU)
    rows = scaling.measure(scaling.Sweep(masking.BENCHMARK, case, "seq_len", (16, 64, 128, 256, 1024)))
    assert [row["contender"] for row in rows] == ["fastmask", "x-transformers"]
    assert [row["points"] for row in rows] == [[(16, 1.0), (64, 1.0), (128, 2.0), (256, 4.0)]] * 2
    assert all(row["exponent"] == pytest.approx(1.0) for row in rows)


def test_sweeps_are_resumed_too(recorded, monkeypatch, tmp_path):
    monkeypatch.setattr(results_file, "_output", lambda *command: "abc1234")
    sweeps = [scaling.Sweep(sampling.BENCHMARK, "rows", field, (1, 2)) for field in ("num_rows", "num_tokens")]
    monkeypatch.setattr(scaling, "sweeps", lambda device: sweeps)
    monkeypatch.setattr(suite, "BENCHMARKS", [replace(suite.BENCHMARKS[0], cases=lambda quick: [])])
    shown = []

    def show(sweep):
        shown.append(sweep.field)
        if len(shown) == 2:
            raise CutShort
        return [
            {"operation": "sample_tokens", "case": "rows", "field": sweep.field, "contender": name} for name in "ab"
        ]

    monkeypatch.setattr(scaling, "show", show)
    with pytest.raises(CutShort):
        main(["--output", str(tmp_path)])
    assert main(["--resume", "--output", str(tmp_path)]) == 0
    assert shown == ["num_rows", "num_tokens", "num_tokens"]
    found = results_file.newest_of_each_machine(tmp_path)[0]["scaling"]
    assert [row["field"] for row in found] == ["num_rows", "num_rows", "num_tokens", "num_tokens"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sweeps_reach_what_they_promise(device):
    found = scaling.sweeps(torch.device(device))
    assert {sweep.field for sweep in found} == {"seq_len", "batch", "num_rows", "num_tokens"}
    assert max(case.seq_len for sweep in found if sweep.field == "seq_len" for case in sweep.cases()) == 65536
    assert all(len(sweep.values) > 2 for sweep in found)
