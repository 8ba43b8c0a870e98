"""``python -m benchmarks``: every operation and both tasks end to end on this machine, correctness first.

Writes benchmarks/results/<gpu-or-cpu>-<date>.json and plots beside it. ``report`` rebuilds README's tables from the
results files; ``static`` tells what the compilers make of the kernels, without a GPU.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
import time

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

MODULES = (
    bench_mask_sampling,
    bench_masked_cross_entropy,
    bench_linear_masked_cross_entropy,
    bench_demask,
    bench_training,
    bench_generate,
)


def main(arguments: list[str] | None = None) -> int:
    """1 if fastmask was refused anywhere."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "report", "static"], default="run")
    parser.add_argument(
        "--quick", action="store_true", help="a large and a small shape of each operation, fewer rounds; no scaling"
    )
    parser.add_argument(
        "--output", type=pathlib.Path, default=results_file.DIRECTORY, help="directory of results files"
    )
    chosen = parser.parse_args(arguments)
    if chosen.command == "report":
        return report.rewrite_readme(chosen.output)
    if chosen.command == "static":
        return static.main(chosen.output)
    return run(chosen.quick, chosen.output)


def run(quick: bool, directory: pathlib.Path) -> int:
    """Measures everything this machine can, prints tables, writes results and plots."""
    device, start = harness.default_device(), time.monotonic()
    rows = harness.show([module.BENCHMARK for module in MODULES], quick)
    measured = results_file.about(device, quick) | {
        "rows": rows,
        "scaling": [] if quick else scaling.show(device),
        "largest_batches": [] if quick or device.type == "cpu" else end_to_end.show_largest_batches(),
        "seconds": time.monotonic() - start,
    }
    file = results_file.write(measured, directory)
    print(f"\nwritten to {file} after {measured['seconds']:.0f} s")
    report.plot(measured, file)
    return int(harness.any_of_ours_refused(rows))


if __name__ == "__main__":
    sys.exit(main())
