"""How cost grows with rows, vocabulary, positions and batch: fastmask and the baseline, with the fitted exponent."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks import (
    bench_demask,
    bench_generate,
    bench_linear_masked_cross_entropy,
    bench_mask_sampling,
    bench_masked_cross_entropy,
    end_to_end,
)
from benchmarks.harness import QUICK, Benchmark, Row


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
    is_cuda = device.type == "cuda"
    rows, vocabulary = ((8192, 50257), (512, 8192))[not is_cuda]
    many_rows, many_ids = ((512, 2048, 8192, 32768), (2048, 8192, 32768, 131072)) if is_cuda else (
        (32, 128, 512), (2048, 8192, 32768)
    )  # fmt: skip
    masks = bench_mask_sampling.Case(16, 1024, False, device)
    dense = bench_masked_cross_entropy.Case(rows, vocabulary, 0.5, device)
    linear = bench_linear_masked_cross_entropy.Case(rows, vocabulary, 768 if is_cuda else 256, 0.5, device)
    sample = bench_demask.Case(rows, vocabulary, None, device)
    network = (*end_to_end.NETWORKS[0],) if is_cuda else (64, 2)
    generation = end_to_end.Case("generate", 16 if is_cuda else 4, 256 if is_cuda else 64, 8192, *network, device)
    return [
        Sweep(bench_mask_sampling.BENCHMARK, masks, "seq_len", (256, 1024, 4096, 16384, 65536)),
        Sweep(bench_mask_sampling.BENCHMARK, masks, "batch", (4, 16, 64, 256)),
        *(
            Sweep(benchmark, case, field, values)
            for benchmark, case in (
                (bench_masked_cross_entropy.BENCHMARK, dense),
                (bench_linear_masked_cross_entropy.BENCHMARK, linear),
                (bench_demask.BENCHMARK, sample),
            )
            for field, values in (("num_rows", many_rows), ("num_tokens", many_ids))
        ),
        Sweep(bench_generate.BENCHMARK, generation, "batch", (4, 16, 64) if is_cuda else (1, 2, 4)),
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
