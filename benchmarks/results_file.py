"""Results files: benchmarks/results/<gpu-or-cpu>-<date>.json, and what is known of the machine they came from."""

from __future__ import annotations

import dataclasses
import datetime
import json
import pathlib
import platform
import re
import subprocess
from typing import Any

import torch

from benchmarks import harness

Results = dict[str, Any]

DIRECTORY = pathlib.Path(__file__).parent / "results"


def about(device: torch.device, quick: bool) -> Results:
    """Where, when and with what: the head of a results file."""
    limits = harness.ceilings(device, harness.default_dtype(device))
    return {
        "device": device.type,
        "name": harness.device_name(device),
        "date": str(datetime.date.today()),
        "quick": quick,
        "commit": _output("git", "describe", "--always", "--dirty"),
        "versions": harness.versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "clocks": _clocks() if device.type == "cuda" else None,
        "ceilings": dataclasses.asdict(limits),
    }


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


def path(results: Results, directory: pathlib.Path = DIRECTORY) -> pathlib.Path:
    name = "cpu" if results["device"] == "cpu" else re.sub(r"\W+", "-", results["name"].lower())
    return directory / f"{name}-{results['date']}{'-quick' * results['quick']}.json"


def write(results: Results, directory: pathlib.Path = DIRECTORY) -> pathlib.Path:
    directory.mkdir(exist_ok=True)
    file = path(results, directory)
    file.write_text(json.dumps(_rounded(results), indent=1) + "\n")
    return file


def _rounded(value: Any) -> Any:
    """Four significant digits, which is more than two runs agree in."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list | tuple) else value


def newest(is_cuda: bool, directory: pathlib.Path = DIRECTORY) -> Results | None:
    """The latest results of a kind of device; of one day a full run rather than a quick one."""
    found = [json.loads(file.read_text()) for file in sorted(directory.glob("*-????-??-??*.json"))]
    found = [results for results in found if (results["device"] == "cuda") == is_cuda]
    return max(found, key=lambda results: (results["date"], not results["quick"]), default=None)
