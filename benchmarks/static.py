"""What the compilers make of the kernels, without a GPU: ``python -m benchmarks static``.

Three tables. The programs of ``benchmarks/programs.py``, for which the tests keep bounds
(``tests/test_compiled_*.py``), by what their machine code takes. The launches of decoding steps. And the loss and the
sampler at some vocabularies: what they take where they run (``benchmarks/executed.py``: a branch that is not taken
counts nothing), and the share of the floor that their bounds leave (``benchmarks/ceilings.py``: barriers and latency
are among them).
"""

from __future__ import annotations

import functools
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks import bench_masked_cross_entropy as dense
from benchmarks import bench_sample_tokens as sampling
from benchmarks import ceilings, compiled, executed, machine, predict
from benchmarks.benchmark import Benchmark
from benchmarks.ceilings import GPUS
from benchmarks.compiled import Figures
from benchmarks.executed import Call
from benchmarks.programs import DTYPES, PROGRAMS, STEPS, step
from benchmarks.records import Ceilings

Row = dict[str, Any]

TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
LOSS_VOCABULARIES = (33, 64, 256, 1024, 8192, 32768, 50257, 126464, 151936)
SAMPLER_VOCABULARIES = (33, 256, 8192, 50257, 126464)
MANY_ROWS = 4096


def programs() -> Iterator[tuple[str, list[str]]]:
    """Operation and names of its programs: of bfloat16, and of the loss those without options."""
    for operation, of_operation in PROGRAMS.items():
        names = [name for name in of_operation if name.split()[-1] not in DTYPES]
        if operation == "masked_cross_entropy":
            names = [name for name in of_operation if "plain, bf16" in name or name == "backward"]
        yield operation, names


def describe(operation: str, program: str, target: str, figures: Figures) -> Row:
    """A row of the first table, from what ``benchmarks/compiled.py`` tells of a program."""
    row = {"operation": operation, "program": program, "kernel": figures["kernel"], "target": target}
    return row | {name: figures.get(name) for name in ("registers", "spills", "shared", "load_bits", "instructions")}


def table(rows: list[Row]) -> str:
    """Markdown: a row for each program and target."""
    names = ("operation", "program", "target", "registers", "spills", "shared", "load_bits", "instructions")
    head = (*names[:5], "shared, bytes", "load, bits", names[7])
    return _markdown(head, [["-" if row[name] is None else str(row[name]) for name in names] for row in rows])


def _markdown(head: tuple[str, ...], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


Case = dense.Case | sampling.Case


def cases() -> list[Case]:
    """Of the last table: many rows, for the loss half of them masked."""
    cuda = torch.device("cuda")
    losses = [dense.Case(MANY_ROWS, num_tokens, 0.5, cuda) for num_tokens in LOSS_VOCABULARIES]
    return [*losses, *(sampling.Case(MANY_ROWS, num_tokens, None, cuda) for num_tokens in SAMPLER_VOCABULARIES)]


def _benchmark(case: Case) -> Benchmark:
    return dense.BENCHMARK if isinstance(case, dense.Case) else sampling.BENCHMARK


def describe_ceilings(case: Case, call: Call) -> Row:
    """A row of the last table: what a row and a logit take of the launches together, and the bounds on each GPU."""
    benchmark = _benchmark(case)
    launches = call.launches["sm_90"]
    share = case.mask_ratio if isinstance(case, dense.Case) else 1.0
    logits = case.num_rows * case.num_tokens * share
    row: Row = {"operation": benchmark.name, "case": str(case)}
    row["warp_instructions"] = sum(launch.statements for launch in launches) / (case.num_rows * share)
    row["per_logit"] = 32 * sum(launch.statements for launch in launches) / logits
    row["special_per_logit"] = 32 * sum(launch.special for launch in launches) / logits
    warps = sum(launch.barriers / launch.num_warps for launch in launches)
    row["barriers_of_row"] = warps / (case.num_rows * share)
    for name, gpu in GPUS.items():
        seconds, bound = ceilings.predict(call.launches[gpu.target], call.num_others, gpu)
        floor = benchmark.floor(case, Ceilings(gpu.memory / 1e9, gpu.product / 1e12)).milliseconds
        assert floor is not None
        row[name] = {"percent_of_floor": floor / seconds / 10, "bound": bound}
    return row


def ceilings_table(rows: list[Row]) -> str:
    """Markdown: a row for each case."""
    head = ("operation", "case", "warp instructions a row", "instructions a logit", "special functions a logit",
            "barriers a row", *GPUS)  # fmt: skip
    lines = []
    for row in rows:
        figures = [f"{row['warp_instructions']:.0f}"]
        figures += [f"{row[name]:.1f}" for name in ("per_logit", "special_per_logit", "barriers_of_row")]
        on_gpus = [f"{row[name]['percent_of_floor']:.0f} %, {row[name]['bound']}" for name in GPUS]
        lines.append([row["operation"], row["case"], *figures, *on_gpus])
    return _markdown(head, lines)


def launches_of_steps(target: str) -> dict[str, list[str]]:
    """The kernels of ours that each of ``programs.STEPS`` launches."""
    found = {}
    for name, options in STEPS.items():
        with compiled.recorded(compiled.hardware(target)) as launches:
            step(**options)
        found[name] = [launch.name.strip("_").removesuffix("_kernel") for launch in launches]
    return found


def main(directory: pathlib.Path) -> int:
    """Compiles and counts, prints the tables, and writes static.json."""
    rows: list[Row] = []
    for operation, names in programs():
        print(f"{operation}, {len(names)} programs", file=sys.stderr, flush=True)
        found = compiled.figures(operation, {name: list(TARGETS) for name in names})
        rows += [describe(operation, name, target, found[name][target]) for name in names for target in TARGETS]
    print(table(rows))
    steps = launches_of_steps("sm_90")
    print("\n| a step by | launches on an H200 |\n|---|---|")
    print("\n".join(f"| {name} | {len(kernels)}: {', '.join(kernels)} |" for name, kernels in steps.items()))
    preparations = [functools.partial(predict.prepare, _benchmark(case), case) for case in cases()]
    targets = list(dict.fromkeys(gpu.target for gpu in GPUS.values()))
    bounds = [*map(describe_ceilings, cases(), executed.count(preparations, targets))]
    print(f"\n{ceilings_table(bounds)}")
    directory.mkdir(exist_ok=True)
    told = {"versions": machine.versions(), "rows": rows, "steps": steps, "ceilings": bounds}
    (directory / "static.json").write_text(json.dumps(told, indent=1) + "\n")
    return 0
