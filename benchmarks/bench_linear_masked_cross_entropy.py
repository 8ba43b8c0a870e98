"""Head and loss with gradients, against eager PyTorch (the baseline), every peer, and three bare products.

``python -m benchmarks --only linear_masked_cross_entropy``.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import losses, machine, peers
from benchmarks.benchmark import Benchmark
from benchmarks.losses import LossProblem
from benchmarks.records import WITH_MASK, Ceilings, Contender, Floor, Runs
from fastmask import _dispatch, functional
from fastmask.reference import linear_masked_cross_entropy as reference

MASK_RATIOS = (0.15, 0.5, 1.0)
CUDA_SHAPES = ((16384, 32768), (8192, 50304), (8192, 50257), (8192, 128256), (4096, 151936))
CUDA_WIDTHS = (768, 2048, 4096)
CPU_SHAPES = ((512, 8192), (256, 2048))
CPU_WIDTHS = (256,)


@dataclass(frozen=True)
class Case:
    """R rows of width D and a head over V ids; a share of the rows is masked. bfloat16 on CUDA, float32 on a CPU."""

    num_rows: int
    num_tokens: int
    dim: int
    mask_ratio: float
    device: torch.device

    def __str__(self) -> str:
        return f"{self.num_rows}x{self.num_tokens}, D {self.dim}, mask ratio {self.mask_ratio}"

    @property
    def num_masked(self) -> int:
        return round(self.mask_ratio * self.num_rows)


def cases(quick: bool) -> list[Case]:
    """Every shape, width and mask ratio; ``quick``: the largest and the smallest product at mask ratio .5."""
    device = machine.default_device()
    shapes, widths = (CUDA_SHAPES, CUDA_WIDTHS) if device.type == "cuda" else (CPU_SHAPES, CPU_WIDTHS)
    everything = [Case(*shape, dim, ratio, device) for shape in shapes for dim in widths for ratio in MASK_RATIOS]
    if quick:
        half = [case for case in everything if case.mask_ratio == 0.5]
        half.sort(key=lambda case: case.num_rows * case.num_tokens * case.dim, reverse=True)
        return list(dict.fromkeys((half[0], half[-1])))
    return everything


def problem(case: Case) -> LossProblem:
    """Embeddings and head of which the logits are spread as in the dense benchmark."""
    generator = torch.Generator(case.device).manual_seed(0)
    draw = functools.partial(
        torch.randn, generator=generator, device=case.device, dtype=machine.default_dtype(case.device)
    )
    x = draw(case.num_rows, case.dim)
    weight = draw(case.num_tokens, case.dim).mul_(losses.LOGIT_SPREAD / case.dim**0.5)
    targets = torch.randint(case.num_tokens, (case.num_rows,), generator=generator, device=case.device)
    is_masked = losses.draw_mask(case.num_rows, case.mask_ratio, case.device, generator)
    return LossProblem(x, (weight,), targets, is_masked)


def ours(x: Tensor, weight: Tensor, targets: Tensor, is_masked: Tensor) -> Tensor:
    return functional.linear_masked_cross_entropy(x, weight, targets, is_masked).loss


def contenders() -> list[Contender]:
    return [Contender("fastmask", WITH_MASK, lambda: ours, is_ours=True), *peers.linear()]


def floor(case: Case, limits: Ceilings) -> Floor:
    """6 m rows D V FLOP: three products on the masked rows, whatever a contender is given."""
    return Floor(6.0 * case.num_masked * case.dim * case.num_tokens, limits.product, "TFLOP/s")


def bounds(case: Case, problem: LossProblem) -> Runs:
    return {"three bare products": bare_products(case, problem)}


def bare_products(case: Case, problem: LossProblem) -> Callable[[], None]:
    """logits = X W^T, dX = G W and dW += G^T X on the masked rows, in the chunks and the dW dtype of our operation.

    G stands for the logits' gradient; its rows are padded to 16 bytes, as our chunk's are.
    """
    x = problem.rows[problem.is_masked]
    weight = problem.parameters[0]
    chunk = min(len(x), _chunk_rows(case.device))
    padded = -(-case.num_tokens // 8) * 8
    buffer = torch.randn(chunk, padded, device=x.device, dtype=x.dtype)
    logits, gradient = torch.empty_like(buffer)[:, : case.num_tokens], buffer[:, : case.num_tokens]
    grad_x = torch.empty_like(x)
    is_single = len(x) <= chunk
    grad_weight = torch.empty_like(weight, dtype=weight.dtype if is_single else torch.float32)
    # cuBLAS accumulates into float32 from bfloat16 operands; a CPU has operands of float32 already.
    mixed: dict[str, Any] = {"out_dtype": grad_weight.dtype} if grad_weight.dtype != x.dtype else {}

    def run() -> None:
        for start in range(0, len(x), chunk):
            rows = x[start : start + chunk]
            part = gradient[: len(rows)]
            torch.mm(rows, weight.T, out=logits[: len(rows)])
            torch.mm(part, weight, out=grad_x[start : start + chunk])
            if start == 0:
                torch.mm(part.T, rows, **mixed, out=grad_weight)
            else:
                torch.addmm(grad_weight, part.T, rows, **mixed, out=grad_weight)

    return run


def _chunk_rows(device: torch.device) -> int:
    """How many rows our operation takes at once there."""
    loss = _dispatch.implementation(reference.linear_masked_cross_entropy, device)
    rows: int = sys.modules[loss.__module__].CHUNK_ROWS
    return rows


BENCHMARK = Benchmark(
    "linear_masked_cross_entropy", cases, contenders, problem, floor, bounds=bounds, published=peers.QUACK_LINEAR
)
