"""What the compilers make of the kernels, without a GPU: ``python -m benchmarks static``.

The programs are those of ``benchmarks/programs.py``, for which the tests keep bounds (``tests/test_compiled_*.py``).
Instructions an element are those of the two loops over a row where a program has two passes, else of the whole
program; each counts once, rare branches included. Where every element passes each of them once at most, they imply a
bandwidth that the program reaches at least, if nothing but instructions held it up.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks import compiled, machine
from benchmarks.compiled import Figures
from benchmarks.programs import DTYPES, PROGRAMS, STEPS, step

Row = dict[str, Any]


@dataclass(frozen=True)
class Gpu:
    """lanes: instructions of single lanes a second, all schedulers issuing; memory: bytes a second."""

    name: str
    lanes: float
    memory: float
    warp_size: int = 32


# The H200's memory as copies were measured there, the others' by data sheet.
GPUS = {
    "sm_80": Gpu("A100 80 GB", 108 * 128 * 1.41e9, 2.0e12),
    "sm_90": Gpu("H200", 132 * 128 * 1.755e9, 4.3e12),
    "gfx942": Gpu("MI300X", 304 * 64 * 2.1e9, 5.3e12, warp_size=64),
}


# Where instructions imply a bandwidth: the bytes that a program moves an element, by how its name begins.
BYTES_OF_AN_ELEMENT = {
    "masked_cross_entropy": {"split, plain, bf16, records": 4, "split": 2, "": 4},
    "sample_tokens": {"tiles": 2},
}


def programs() -> Iterator[tuple[str, list[str]]]:
    """Operation and names of its programs: of bfloat16, and of the loss those without options."""
    for operation, of_operation in PROGRAMS.items():
        names = [name for name in of_operation if name.split()[-1] not in DTYPES]
        if operation == "masked_cross_entropy":
            names = [name for name in of_operation if "plain, bf16" in name or name == "backward"]
        yield operation, names


def describe(operation: str, program: str, target: str, figures: Figures) -> Row:
    """A row of the table, from what ``benchmarks/compiled.py`` tells of a program."""
    gpu = GPUS[target]
    row = {"operation": operation, "program": program, "kernel": figures["kernel"], "target": target} | {
        name: figures.get(name) for name in ("registers", "spills", "shared", "load_bits", "instructions")
    }
    sizes = BYTES_OF_AN_ELEMENT.get(operation, {})
    moved = next((size for prefix, size in sizes.items() if program.startswith(prefix)), None)
    counted = figures["instructions"] if operation != "masked_cross_entropy" else sum(figures.get("loops", [])[:2])
    if figures["block"] and counted:
        row["per_element"] = counted / (figures["block"] / (figures["num_warps"] * gpu.warp_size))
        if moved is not None:
            row["ceiling"] = gpu.lanes / row["per_element"] * moved
    return row


def table(rows: list[Row]) -> str:
    """Markdown: a row for each program and target."""
    head = ("operation", "program", "target", "registers", "spills", "shared, bytes", "load, bits",
            "instructions an element", "ceiling, TB/s (of the memory's)")  # fmt: skip
    lines = [head, ("---",) * len(head), *(_cells(row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cells(row: Row) -> tuple[str, ...]:
    facts = ("registers", "spills", "shared", "load_bits")
    per_element = f"{row['per_element']:.1f}" if "per_element" in row else "-"
    ceiling = "-"
    if "ceiling" in row:
        ceiling = f"{row['ceiling'] / 1e12:.1f} ({row['ceiling'] / GPUS[row['target']].memory:.0%})"
    told = ("-" if row[name] is None else str(row[name]) for name in facts)
    return row["operation"], row["program"], row["target"], *told, per_element, ceiling


def launches_of_steps(target: str) -> dict[str, list[str]]:
    """The kernels of ours that each of ``programs.STEPS`` launches."""
    found = {}
    for name, options in STEPS.items():
        with compiled.recorded(compiled.hardware(target)) as launches:
            step(**options)
        found[name] = [launch.name.strip("_").removesuffix("_kernel") for launch in launches]
    return found


def main(directory: pathlib.Path) -> int:
    """Compiles, prints the table, and writes static.json."""
    rows: list[Row] = []
    for operation, names in programs():
        print(f"{operation}, {len(names)} programs", file=sys.stderr, flush=True)
        found = compiled.figures(operation, {name: list(GPUS) for name in names})
        rows += [describe(operation, name, target, found[name][target]) for name in names for target in GPUS]
    print(table(rows))
    steps = launches_of_steps("sm_90")
    print("\n| a step by | launches on an H200 |\n|---|---|")
    print("\n".join(f"| {name} | {len(kernels)}: {', '.join(kernels)} |" for name, kernels in steps.items()))
    directory.mkdir(exist_ok=True)
    (directory / "static.json").write_text(
        json.dumps({"versions": machine.versions(), "rows": rows, "steps": steps}, indent=1) + "\n"
    )
    return 0
