"""Results files: benchmarks/results/<gpu-or-cpu>-<date>.json, and what is known of the machine they came from."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import platform
import re
import subprocess
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import machine
from benchmarks.records import Ceilings, Row

Results = dict[str, Any]

SECTIONS = ("rows", "scaling", "largest_batches")

DIRECTORY = pathlib.Path(__file__).parent / "results"


def about(device: torch.device, quick: bool) -> Results:
    """Where, when and with what: the head of a results file."""
    return {
        "device": device.type,
        "name": machine.device_name(device),
        "date": str(datetime.date.today()),
        "quick": quick,
        "commit": _output("git", "describe", "--always", "--dirty"),
        "versions": machine.versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        **state(device),
    }


def state(device: torch.device) -> Results:
    """What changes during a run."""
    limits = machine.ceilings(device)
    return {"clocks": _clocks() if device.type == "cuda" else None, "ceilings": dataclasses.asdict(limits)}


def begin(device: torch.device, quick: bool, directory: pathlib.Path) -> Results:
    """The results of a run that has measured nothing yet; what today's file has, where machine and versions are the
    same and the commit is, too, without changes."""
    results = about(device, quick) | {section: [] for section in SECTIONS} | {"seconds": 0.0}
    file = path(results, directory)
    if not file.exists() or not results["commit"] or results["commit"].endswith("-dirty"):
        return results
    earlier = json.loads(file.read_text())
    if any(earlier[key] != results[key] for key in ("name", "threads", "versions", "commit")):
        return results
    machine.remember_ceilings(device, Ceilings(**earlier["ceilings"]))
    return results | {key: earlier[key] for key in (*SECTIONS, "seconds")} | state(device)


def part(row: Row) -> tuple[str, ...]:
    """What is measured as one: a case, or a sweep of a case."""
    return row["operation"], row["case"], row.get("field", "")


def replace_parts(rows: list[Row], found: Sequence[Row]) -> None:
    """Rows of some parts in place of what there was of them."""
    parts = {part(row) for row in found}
    place = next((place for place, row in enumerate(rows) if part(row) in parts), len(rows))
    after = [row for row in rows[place:] if part(row) not in parts]
    rows[place:] = [*found, *after]


def _clocks() -> dict[str, str] | None:
    """What nvidia-smi tells of clocks and power, right after the runs."""
    names = ("clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "driver_version")
    told = _output("nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader", "--id=0")
    return dict(zip(names, told.split(", "), strict=True)) if told.count(",") == len(names) - 1 else None


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=DIRECTORY.parent).stdout.strip()
    except OSError:
        return ""


def path(results: Results, directory: pathlib.Path) -> pathlib.Path:
    name = "cpu" if results["device"] == "cpu" else re.sub(r"\W+", "-", results["name"].lower())
    return directory / f"{name}-{results['date']}{'-quick' * results['quick']}.json"


def write(results: Results, directory: pathlib.Path = DIRECTORY) -> pathlib.Path:
    directory.mkdir(exist_ok=True)
    file = path(results, directory)
    file.write_text(json.dumps(rounded(results), indent=1) + "\n")
    return file


def rounded(value: Any) -> Any:
    """Four significant digits, which is more than two runs agree in."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list | tuple) else value


def newest_of_each_machine(directory: pathlib.Path = DIRECTORY) -> list[Results]:
    """The latest results of each machine, GPUs first, then by date; of one day a full run rather than a quick one."""
    found = [json.loads(file.read_text()) for file in sorted(directory.glob("*-????-??-??*.json"))]
    found.sort(key=lambda results: (results["date"], not results["quick"]))
    newest = {results["name"]: results for results in found}.values()
    return sorted(newest, key=lambda results: (results["device"] == "cuda", results["date"]), reverse=True)
