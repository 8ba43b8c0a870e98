"""``python -m benchmarks``: every operation and both tasks end to end on this machine, correctness first.

Writes benchmarks/results/<gpu-or-cpu>-<date>.json, anew after each case, and plots beside it. What today's file has
else stays, where machine, versions and commit are the same. ``report`` rebuilds README's tables and the plots from
the results files; ``static`` tells what the compilers make of the kernels, without a GPU.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time
from collections.abc import Sequence
from typing import Any

from benchmarks import (
    bench_demask,
    bench_generate,
    bench_linear_masked_cross_entropy,
    bench_mask_sampling,
    bench_masked_cross_entropy,
    bench_training,
    end_to_end,
    harness,
    report,
    results_file,
    scaling,
    static,
)
from benchmarks.harness import Benchmark, Row

BENCHMARKS = (
    bench_mask_sampling.BENCHMARK,
    bench_masked_cross_entropy.BENCHMARK,
    bench_linear_masked_cross_entropy.BENCHMARK,
    bench_demask.BENCHMARK,
    bench_training.BENCHMARK,
    bench_generate.BENCHMARK,
)


def main(arguments: list[str] | None = None) -> int:
    """1 if fastmask was refused anywhere."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "report", "static"], default="run")
    parser.add_argument(
        "--quick", action="store_true", help="a large and a small shape of each operation, fewer rounds; no scaling"
    )
    names = [benchmark.name for benchmark in BENCHMARKS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="OPERATION", help=", ".join(names))
    parser.add_argument("--resume", action="store_true", help="leave out what today's results file has")
    parser.add_argument(
        "--output", type=pathlib.Path, default=results_file.DIRECTORY, help="directory of results files"
    )
    chosen = parser.parse_args(arguments)
    if chosen.command == "report":
        return report.main(chosen.output)
    if chosen.command == "static":
        return static.main(chosen.output)
    return run(chosen.quick, chosen.only, chosen.resume, chosen.output)


def run(quick: bool, only: Sequence[str], resume: bool, directory: pathlib.Path) -> int:
    """Measures everything this machine can, prints tables, writes results and plots."""
    device = harness.default_device()
    results = results_file.begin(device, quick, directory)
    file, start = results_file.path(results, directory), time.monotonic() - results["seconds"]
    cases: dict[tuple[str, ...], tuple[Benchmark, Any]] = {
        (benchmark.name, str(case), ""): (benchmark, case)
        for benchmark in BENCHMARKS
        for case in benchmark.cases(quick)
    }

    def is_due(section: str, *part: str) -> bool:
        return part[0] in only and not (resume and part in map(results_file.part, results[section]))

    def keep(section: str, found: Sequence[Row]) -> None:
        """Written each time: a run that is cut short leaves what it has."""
        results_file.put(results[section], found)
        for row in results["rows"]:
            benchmark, case = cases[results_file.part(row)]
            benchmark.hold(case, row)
        results.update(results_file.state(device), seconds=time.monotonic() - start)
        results_file.write(results, directory)

    for rows in harness.show([found for part, found in cases.items() if is_due("rows", *part)], quick):
        keep("rows", rows)
    for sweep in [] if quick else scaling.sweeps(device):
        if is_due("scaling", sweep.benchmark.name, str(sweep.case), sweep.field):
            keep("scaling", scaling.show(sweep))
    for case in [] if quick or device.type == "cpu" else end_to_end.memory_cases():
        if is_due("largest_batches", case.task, str(case), ""):
            keep("largest_batches", end_to_end.show_largest_batches(case))
    print(f"\nwritten to {file}; {results['seconds']:.0f} s in all")
    report.plot(results, file)
    return int(harness.any_of_ours_refused(results["rows"]))


if __name__ == "__main__":
    sys.exit(main())
