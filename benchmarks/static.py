"""What the compilers make of the kernels, without a GPU: ``python -m benchmarks static``.

The programs are the launch plans that the tests keep bounds for (tests/test_*.py, tests/offline.py; needs the "test"
extra). Instructions an element are those of the two loops over a row where a program has two passes, else of the
whole program; each counts once, rare branches included. Where every element passes each of them once at most, they
imply a bandwidth that the program reaches at least, if nothing but instructions held it up.
"""

from __future__ import annotations

import importlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from benchmarks import harness

TESTS = pathlib.Path(__file__).parents[1] / "tests"

Plan = dict[str, Any]
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


def _dense(tests: ModuleType) -> list[Plan]:
    """The loss's programs without options, and what backward runs."""
    plans = {name: plan for name, plan in tests.PROGRAMS.items() if "plain, bf16" in name or name == "backward"}
    changes = {"backward": tests.BACKWARD}
    return [tests.launch_plan(*plan, **changes.get(name, {})) | {"name": name} for name, plan in plans.items()]


def _masking(tests: ModuleType) -> list[Plan]:
    return [*(tests.launch_plan(name, **plan) for name, plan in tests.PLANS.items()), tests.row_list_plan(1024)]


def _demasking(tests: ModuleType) -> list[Plan]:
    return [plan for plan in tests.offline_plans() if plan["name"].split()[-1] not in ("fp16", "fp32", "fp64")]


# Of each operation: its plans; and by how a program's name begins, the bytes that it moves an element, where its
# instructions imply a bandwidth.
OPERATIONS: dict[str, tuple[Callable[[ModuleType], list[Plan]], dict[str, int]]] = {
    "mask_sampling": (_masking, {}),
    "masked_cross_entropy": (_dense, {"split, plain, bf16, records": 4, "split": 2, "": 4}),
    "demask": (_demasking, {"tiles": 2}),
}


def plans() -> Iterator[tuple[str, Plan]]:
    """Operation and launch plan of each program."""
    for operation, (collect, _) in OPERATIONS.items():
        for plan in collect(_load(f"test_{operation}")):
            yield operation, plan


def _load(name: str) -> ModuleType:
    """A module of tests/, which is no package."""
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    return importlib.import_module(name)


def describe(operation: str, plan: Plan, target: str, figures: dict[str, Any]) -> Row:
    """A row of the table, from what tests/offline.py tells of a compiled program."""
    gpu, (_, bytes_of) = GPUS[target], OPERATIONS[operation]
    changed = plan.get(target, {})
    args = plan["args"] | changed.get("args", {})
    warps = (plan["options"] | changed.get("options", {}))["num_warps"]
    block = next((args[name] for name in ("BLOCK_V", "BLOCK_N", "BLOCK") if name in args), None)
    row = {"operation": operation, "program": plan["name"], "kernel": plan["kernel"], "target": target} | {
        name: figures.get(name) for name in ("registers", "spills", "shared", "load_bits", "instructions")
    }
    moved = next((size for prefix, size in bytes_of.items() if plan["name"].startswith(prefix)), None)
    counted = figures["instructions"] if operation != "masked_cross_entropy" else sum(figures.get("loops", [])[:2])
    if block and counted:
        row["per_element"] = counted / (block / (warps * gpu.warp_size))
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


def main(directory: pathlib.Path) -> int:
    """Compiles, prints the table, and writes static.json."""
    os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when it is imported, which is below
    offline = _load("offline")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        for operation, plan in plans():
            for target in GPUS:
                print(f"{operation}, {plan['name']}, {target}", file=sys.stderr, flush=True)
                figures = offline._figures(plan, target)
                figures["shared"] = offline._compile(plan, target).metadata.shared  # from the cache
                rows.append(describe(operation, plan, target, figures))
    print(table(rows))
    directory.mkdir(exist_ok=True)
    (directory / "static.json").write_text(
        json.dumps({"versions": harness.versions(), "rows": rows}, indent=1) + "\n"
    )
    return 0
