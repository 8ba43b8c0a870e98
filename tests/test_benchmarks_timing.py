"""What is measured of a contender: times, ratios, floors, memory, ceilings; and the table that shows it."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch
from benchmark_helpers import CPU, ONCE, compare, contender, loss_problem, right, slow

from benchmarks import bench_masked_cross_entropy as dense
from benchmarks import comparison, losses, machine, peers, tables, timing
from benchmarks.records import ALL_ROWS, GATHERED, IDS_ONLY, WITH_MASK, Ceilings, Floor, Step


@pytest.fixture(scope="module")
def problem() -> losses.LossProblem:
    return loss_problem()


def test_a_slow_contender_is_seen_in_the_ratio(problem):
    rows = compare([contender(right, is_baseline=True), contender(slow)], problem)
    fast_row, slow_row = rows
    assert fast_row["ratio"]["eager"] == 1.0
    assert slow_row["ratio"]["eager"] < 0.5
    assert slow_row["ms"] > 20
    assert slow_row["percent_of_floor"] < 1
    table = tables.table(rows, None).splitlines()
    assert table[-1].startswith("slow")
    assert json.loads(json.dumps(rows)) == rows


def test_ratios_are_to_the_best_of_the_others():
    def timed(ms, given, *, is_ours=False, is_baseline=False, status="ok"):
        return {"ms": ms, "given": given, "is_ours": is_ours, "is_baseline": is_baseline, "status": status}

    rows = [
        timed(2.0, WITH_MASK, is_ours=True),
        timed(12.0, WITH_MASK, is_baseline=True),
        timed(8.0, ALL_ROWS),
        timed(10.0, ALL_ROWS),
        timed(4.0, GATHERED),
        timed(6.0, IDS_ONLY),
        timed(5.0, IDS_ONLY),
        timed(1.0, "", status="bound"),
        {"given": ALL_ROWS, "is_ours": False, "is_baseline": False, "status": "wrong"},
    ]
    comparison.add_ratios(rows)
    assert rows[0]["ratio"] == {"eager": 6.0, "best peer": 2.0, "bound": 0.5}
    assert rows[4]["ratio"]["best peer"] == rows[6]["ratio"]["best peer"] == 1.0
    assert "ratio" not in rows[-1]


def test_a_row_is_the_median_of_its_times_against_the_floor(problem, monkeypatch):
    monkeypatch.setattr(timing, "time_rounds", lambda runs, *_: {name: [9.0, 1.0, 2.0] for name in runs})
    row, bound = compare([contender(right)], problem, Floor(1e9, 1e3, "GB/s"), {"bound": lambda: None})
    assert (row["ms"], row["spread"], row["floor_ms"]) == (2.0, [1.0, 9.0], 1.0)
    assert row["percent_of_floor"] == bound["percent_of_floor"] == 50.0
    assert row["rate"] == 500.0


def test_a_published_figure_is_told_apart_from_ours(problem):
    rows = compare([contender(right, is_ours=True)], problem, effort=ONCE)
    last = tables.table(rows, peers.QUACK_DENSE).splitlines()[-1]
    assert "published, not measured here: 3000 GB/s" in last


def test_memory_of_a_cpu_is_the_growth_of_the_resident_set():
    def run():
        return torch.ones(2**24) + 1  # 64 MiB, twice

    if (peak := timing.peak_mib(run, CPU)) is None:
        pytest.skip("only Linux tells it")
    assert 64 <= peak < 160


def test_the_hosts_time_is_told_of_a_gpu_only(monkeypatch):
    """The median of a tenth of a second's runs, of one that takes longer; each is given back what it overwrites."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    class Sleep:
        def __init__(self, device, seconds):
            self.device, self.seconds, self.done = torch.device(device), seconds, []

        def restore(self, contender):
            self.done.append("restored")

        def run(self, contender, function):
            self.done.append("run")
            time.sleep(self.seconds)

    def told(device, seconds):
        problem = Sleep(device, seconds)
        return timing.host_ms(Step(contender(right), None, problem)), problem.done

    assert told("cpu", 0.0) == (None, [])
    milliseconds, done = told("cuda", 0.01)
    assert 10 <= milliseconds < 100
    assert 3 <= len(done) // 2 <= 10
    assert done == ["restored", "run"] * (len(done) // 2)
    milliseconds, done = told("cuda", 0.1)
    assert milliseconds >= 100
    assert done == ["restored", "run"]


def test_a_contender_that_keeps_memory_has_no_peak_of_a_run(problem):
    rows = compare([contender(right), contender(slow, keeps_memory=True)], problem, effort=ONCE)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert rows[1]["peak_mib"] is None
    assert rows[0]["peak_mib"] is not None or timing.peak_mib(lambda: None, CPU) is None


def test_a_case_that_does_not_fit_is_told_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(machine, "ceilings", lambda *_: Ceilings(1.0, 1.0))

    def too_large(case):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    rows = replace(dense.BENCHMARK, problem=too_large).measure(dense.Case(8, 7, 0.5, CPU), ONCE)
    assert {row["status"] for row in rows} == {"out of memory"}
    assert "not timed, out of memory (the case itself: OutOfMemoryError: tried" in tables.table(rows, None)


def test_ceilings_are_the_best_of_all_that_was_measured(monkeypatch):
    monkeypatch.setattr(machine, "_best", {})
    rounds = iter([{"copy": [1.0, 3.0], "product": [4.0]}, {"copy": [2.0], "product": [2.0, 5.0]}])
    monkeypatch.setattr(timing, "time_rounds", lambda *_: next(rounds))
    first = machine.ceilings(CPU)
    assert first == machine.ceilings(CPU) == Ceilings(2**28 / 1e6, 2 * 1024**3 / 4e9)
    machine.measure_ceilings(CPU)
    assert machine.ceilings(CPU) == Ceilings(first.copy, 2 * first.product)
