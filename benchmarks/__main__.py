"""``python -m benchmarks``: end to end on this machine; writes benchmarks/results/<machine>-<date>.json."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys

import torch

import fastmask
from benchmarks import end_to_end

RESULTS = pathlib.Path(__file__).parent / "results"


def main() -> int:
    """Verifies, measures, prints a table and, unless --quick, writes the results."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds of each task")
    parser.add_argument("--quick", action="store_true", help="the first size only, three rounds, nothing written")
    arguments = parser.parse_args()
    sizes = end_to_end.SIZES[:1] if arguments.quick else end_to_end.SIZES
    rounds = 3 if arguments.quick else arguments.rounds
    rows = []
    for size in sizes:
        end_to_end.verify(size)
        for task in end_to_end.TASKS:
            rows.append(end_to_end.measure(size, task, rounds))
            print(_line(rows[-1]), flush=True)
    if arguments.quick:
        return 0
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"cpu-{datetime.date.today()}.json"
    path.write_text(json.dumps({"machine": _machine(), "rounds": rounds, "end_to_end": rows}, indent=1) + "\n")
    print(f"written to {path}")
    return 0


def _line(row: dict) -> str:
    seconds, peaks = row["seconds"], row["peak_mib"]
    return (
        f"{row['size']:<42} {row['task']:<9} {seconds['fastmask']:8.3f} s, upstream {seconds['upstream']:8.3f} s "
        f"({row['speedup']:.2f}x)   peak {peaks['fastmask']} MiB, upstream {peaks['upstream']} MiB"
    )


def _machine() -> dict:
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "fastmask": fastmask.__version__,
        "commit": commit.stdout.strip(),
        **{name: importlib.metadata.version(name) for name in ("torch", "x-transformers")},
    }


def _cpu_name() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    sys.exit(main())
