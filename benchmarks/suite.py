"""Every benchmark, and a run of them: what is measured, in which order, and what is kept of it."""

from __future__ import annotations

import pathlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from benchmarks import (
    bench_generate,
    bench_linear_masked_cross_entropy,
    bench_mask_sampling,
    bench_masked_cross_entropy,
    bench_remask,
    bench_sample_tokens,
    bench_select_at_random,
    bench_training,
    end_to_end,
    machine,
    plots,
    results_file,
    scaling,
    tables,
    timing,
)
from benchmarks.benchmark import Benchmark
from benchmarks.gate import NEEDS_CUDA
from benchmarks.records import Row

BENCHMARKS = (
    bench_mask_sampling.BENCHMARK,
    bench_masked_cross_entropy.BENCHMARK,
    bench_linear_masked_cross_entropy.BENCHMARK,
    bench_sample_tokens.BENCHMARK,
    bench_remask.BENCHMARK,
    bench_select_at_random.BENCHMARK,
    bench_training.BENCHMARK,
    bench_generate.BENCHMARK,
)


def run(quick: bool, only: Sequence[str], resume: bool, directory: pathlib.Path) -> int:
    """Measures everything this machine can, prints tables, writes results and plots; 1 if fastmask was refused."""
    device = machine.default_device()
    results = results_file.begin(device, quick, directory)
    file, start = results_file.path(results, directory), time.monotonic() - results["seconds"]
    cases: dict[tuple[str, ...], tuple[Benchmark, Any]] = {
        (benchmark.name, str(case), ""): (benchmark, case)
        for benchmark in BENCHMARKS
        for case in benchmark.cases(quick)
    }

    def is_due(section: str, *part: str) -> bool:
        return part[0] in only and not (resume and part in map(results_file.part, results[section]))

    def save(section: str, found: Sequence[Row]) -> None:
        """Written each time: a run that is cut short leaves what it has."""
        results_file.replace_parts(results[section], found)
        for row in results["rows"]:
            benchmark, case = cases[results_file.part(row)]
            benchmark.update_floor(case, row)
        results.update(results_file.state(device), seconds=time.monotonic() - start)
        results_file.write(results, directory)

    for rows in measure([found for part, found in cases.items() if is_due("rows", *part)], quick):
        save("rows", rows)
    for sweep in [] if quick else scaling.sweeps(device):
        if is_due("scaling", sweep.benchmark.name, str(sweep.case), sweep.field):
            save("scaling", scaling.show(sweep))
    for case in [] if quick or device.type == "cpu" else end_to_end.memory_cases():
        if is_due("largest_batches", case.task, str(case), ""):
            save("largest_batches", end_to_end.show_largest_batches(case))
    print(f"\nwritten to {file}; {results['seconds']:.0f} s in all")
    plots.plot(results_file.rounded(results), file)  # as report draws them from the file
    return int(any_of_ours_refused(results["rows"]))


def measure(cases: Sequence[tuple[Benchmark, Any]], quick: bool) -> Iterator[list[Row]]:
    """Measures cases, prints a table of each visit, and yields a case's rows after the last one.

    A CPU's ceilings are measured again before each visit, since its speed drifts.
    """
    device, start = machine.default_device(), time.monotonic()
    print(machine.describe(device), flush=True)
    found: list[list[Row]] = [[] for _ in cases]
    num_visits = timing.CPU_VISITS if device.type == "cpu" and not quick else 1
    effort = timing.QUICK if quick else timing.FULL
    for number, place in enumerate(list(range(len(cases))) * num_visits, 1):
        benchmark, case = cases[place]
        progress = f"\n[{number}/{num_visits * len(cases)}, {time.monotonic() - start:.0f} s]"
        print(f"{progress} {benchmark.name}, {case}", flush=True)
        if device.type == "cpu":
            machine.measure_ceilings(device)
        found[place] = benchmark.measure(case, effort, earlier=found[place])
        print(tables.table(found[place], benchmark.published if case.device.type == "cuda" else None), flush=True)
        if number > (num_visits - 1) * len(cases):
            yield [{key: value for key, value in row.items() if key != "times"} for row in found[place]]
    print(f"\nin all: {machine.describe(device)}", flush=True)


def any_of_ours_refused(rows: Iterable[Row]) -> bool:
    return any(row["is_ours"] and row["status"] not in ("ok", NEEDS_CUDA) for row in rows)
