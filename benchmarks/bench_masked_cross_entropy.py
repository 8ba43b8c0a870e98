"""Loss and gradient from logits, against eager PyTorch (the baseline) and every peer.

``python -m benchmarks --only masked_cross_entropy``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import losses, machine, peers
from benchmarks.benchmark import Benchmark
from benchmarks.losses import Loss, LossProblem
from benchmarks.records import WITH_MASK, Ceilings, Contender, Floor
from fastmask import functional

MASK_RATIOS = (0.15, 0.5, 1.0)
CUDA_SHAPES = ((16384, 32768), (8192, 50304), (8192, 50257), (8192, 128256), (4096, 151936))
CPU_SHAPES = ((512, 8192), (128, 50257))
# Half masked only: small vocabularies (characters, proteins, codebooks), and few rows.
CUDA_SMALL_SHAPES = ((65536, 33), (65536, 64), (65536, 256), (32, 50257), (2, 126464))
CPU_SMALL_SHAPES = ((2048, 33), (2048, 64), (2048, 256), (8, 50257))


@dataclass(frozen=True)
class Case:
    """R rows over V ids, of which a share is masked; bfloat16 on CUDA, float32 on a CPU."""

    num_rows: int
    num_tokens: int
    mask_ratio: float
    device: torch.device

    def __str__(self) -> str:
        return f"{self.num_rows}x{self.num_tokens}, mask ratio {self.mask_ratio}"


def cases(quick: bool) -> list[Case]:
    """Every shape and mask ratio; ``quick``: at mask ratio .5 a large and a small shape, the smallest vocabulary, and
    the fewest rows."""
    device = machine.default_device()
    is_cuda = device.type == "cuda"
    shapes, small = (CUDA_SHAPES, CUDA_SMALL_SHAPES) if is_cuda else (CPU_SHAPES, CPU_SMALL_SHAPES)
    if quick:
        by_size = sorted(shapes, key=lambda shape: shape[0] * shape[1])
        return [Case(*shape, 0.5, device) for shape in (by_size[-1], by_size[0], small[0], small[-1])]
    large = [Case(*shape, ratio, device) for shape in shapes for ratio in MASK_RATIOS]
    return large + [Case(*shape, 0.5, device) for shape in small]


def problem(case: Case) -> LossProblem:
    """Logits so spread that the softmax weighs in the gradient's norm, beside the targets' ones."""
    generator = torch.Generator(case.device).manual_seed(0)
    shape, dtype = (case.num_rows, case.num_tokens), machine.default_dtype(case.device)
    logits = torch.randn(shape, generator=generator, device=case.device, dtype=dtype).mul_(losses.LOGIT_SPREAD)
    targets = torch.randint(case.num_tokens, shape[:1], generator=generator, device=case.device)
    is_masked = losses.draw_mask(case.num_rows, case.mask_ratio, case.device, generator)
    return LossProblem(logits, (), targets, is_masked)


def _ours(inplace_grad: bool) -> Loss:
    def loss(logits: Tensor, targets: Tensor, is_masked: Tensor) -> Tensor:
        return functional.masked_cross_entropy(logits, targets, is_masked, inplace_grad=inplace_grad).loss

    return loss


def contenders() -> list[Contender]:
    return [
        Contender("fastmask", WITH_MASK, lambda: _ours(inplace_grad=False), is_ours=True),
        Contender("fastmask (in place)", WITH_MASK, lambda: _ours(inplace_grad=True), is_ours=True, overwrites=True),
        *peers.dense(),
    ]


def floor(case: Case, limits: Ceilings) -> Floor:
    """Bytes: masked rows read once and written once, unmasked rows only zeroed: 1 + m times the logits."""
    row = case.num_tokens * machine.default_dtype(case.device).itemsize
    masked = round(case.mask_ratio * case.num_rows)
    return Floor((case.num_rows + masked) * row, limits.copy, "GB/s")


BENCHMARK = Benchmark("masked_cross_entropy", cases, contenders, problem, floor, published=peers.QUACK_DENSE)
