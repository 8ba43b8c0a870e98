"""How cost grows with rows, vocabulary, positions and batch: fastmask and the baseline, with the fitted exponent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import bench_generate, bench_mask_sampling, bench_remask, bench_sample_tokens, end_to_end
from benchmarks import bench_linear_masked_cross_entropy as linear
from benchmarks import bench_masked_cross_entropy as dense
from benchmarks.benchmark import Benchmark
from benchmarks.records import Row
from benchmarks.timing import QUICK


@dataclass(frozen=True)
class Sweep:
    """Cases that differ in one field, which takes ``values``."""

    benchmark: Benchmark
    case: Any
    field: str
    values: tuple[int, ...]

    def cases(self) -> list[Any]:
        return [replace(self.case, **{self.field: value}) for value in self.values]


def sweeps(device: torch.device) -> list[Sweep]:
    """Sizes by powers of 4; a CPU's end where a GPU's begin to be interesting."""
    lengths = (256, 1024, 4096, 16384, 65536)
    many_rows: tuple[int, ...]
    many_tokens: tuple[int, ...]
    if device.type == "cuda":
        num_rows, num_tokens, dim = 8192, 50257, 768
        many_rows, many_tokens = (512, 2048, 8192, 32768), (2048, 8192, 32768, 131072)
        generation, batches = (16, 256, 8192, *end_to_end.NETWORKS[0]), (4, 16, 64)
    else:
        num_rows, num_tokens, dim = 512, 8192, 256
        many_rows, many_tokens = (32, 128, 512), (2048, 8192, 32768)
        generation, batches = (4, 64, 8192, 64, 2), (1, 2, 4)
    masking = bench_mask_sampling.BENCHMARK, bench_mask_sampling.Case(16, 1024, False, device)
    remasking = bench_remask.BENCHMARK, bench_remask.Case(16, 1024, device)
    on_rows: list[tuple[Benchmark, Any]] = [
        (dense.BENCHMARK, dense.Case(num_rows, num_tokens, 0.5, device)),
        (linear.BENCHMARK, linear.Case(num_rows, num_tokens, dim, 0.5, device)),
        (bench_sample_tokens.BENCHMARK, bench_sample_tokens.Case(num_rows, num_tokens, None, device)),
    ]
    return [
        Sweep(*masking, "seq_len", lengths),
        Sweep(*masking, "batch", (4, 16, 64, 256)),
        *(
            Sweep(*of_rows, field, values)
            for of_rows in on_rows
            for field, values in (("num_rows", many_rows), ("num_tokens", many_tokens))
        ),
        Sweep(*remasking, "seq_len", lengths),
        Sweep(bench_generate.BENCHMARK, end_to_end.Case("generate", *generation, device), "batch", batches),
    ]


def measure(sweep: Sweep) -> list[Row]:
    """A row for each contender: milliseconds at each value, and the exponent of the upper half."""
    points: dict[str, list[tuple[int, float]]] = {}
    for value, case in zip(sweep.values, sweep.cases(), strict=True):
        rows = sweep.benchmark.measure(case, QUICK, only=lambda contender: contender.is_ours or contender.is_baseline)
        for row in rows:
            if "ms" in row:
                points.setdefault(row["contender"], []).append((value, row["ms"]))
    about = {"operation": sweep.benchmark.name, "case": str(sweep.case), "field": sweep.field}
    return [
        about | {"contender": contender, "points": found, "exponent": exponent(found[len(found) // 2 - 1 :])}
        for contender, found in points.items()
        if len(found) > 1
    ]


def show(sweep: Sweep) -> list[Row]:
    """Measures a sweep and prints a line for each contender."""
    rows = measure(sweep)
    for row in rows:
        told = ", ".join(f"{value}: {ms:.3g} ms" for value, ms in row["points"])
        print(
            "{operation} against {field}, {contender}: exponent {exponent:.2f}".format(**row), f"({told})", flush=True
        )
    return rows


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """b of ms = a x^b, fitted to the logarithms."""
    x, y = ([math.log(value) for value in values] for values in zip(*points, strict=True))
    return statistics.linear_regression(x, y).slope
