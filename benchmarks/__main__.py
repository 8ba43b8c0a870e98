"""``python -m benchmarks``: every operation and both tasks end to end on this machine, correctness first.

Writes benchmarks/results/<gpu-or-cpu>-<date>.json, anew after each case, and plots beside it. What today's file has
else stays, where machine, versions and commit are the same. ``report`` rebuilds the tables of README.md and of
benchmarks/README.md, and the plots, from the results files. Without a GPU ``static`` tells what the compilers make of
the kernels, ``host`` what calls cost the host, and ``predict`` how long a GPU should take.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

from benchmarks import host_time, predict, report, results_file, static, suite


def main(arguments: list[str] | None = None) -> int:
    """1 if fastmask was refused anywhere."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("command", nargs="?", choices=["run", "report", "static", "host", "predict"], default="run")
    parser.add_argument(
        "--quick", action="store_true", help="a large and a small shape of each operation, fewer rounds; no scaling"
    )
    names = [benchmark.name for benchmark in suite.BENCHMARKS]
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
    if chosen.command == "host":
        return host_time.main()
    if chosen.command == "predict":
        return predict.main()
    return suite.run(chosen.quick, chosen.only, chosen.resume, chosen.output)


if __name__ == "__main__":
    sys.exit(main())
