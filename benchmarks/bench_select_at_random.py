"""A coin for each position, against PyTorch's own uniforms (the baseline).

``python -m benchmarks --only select_at_random``.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import machine, peers
from benchmarks.benchmark import Benchmark
from benchmarks.records import Ceilings, Contender, Floor, Step
from fastmask import functional

CUDA_SHAPES = ((64, 1024), (8, 256), (16, 4096), (4, 65536))
CPU_SHAPES = ((64, 1024), (8, 256))
MAX_STANDARD_ERRORS = 5.0
MIN_DRAWS = 100_000

# Whether a position is eligible is read, whether it is selected is written.
BYTES_PER_POSITION = 1 + 1


@dataclass(frozen=True)
class Case:
    """B sequences of N positions, half of them eligible, each sequence with a probability of its own."""

    batch: int
    seq_len: int
    device: torch.device

    def __str__(self) -> str:
        return f"B {self.batch}, N {self.seq_len}"


def cases(quick: bool) -> list[Case]:
    """Every shape; ``quick``: a large and a small one."""
    device = machine.default_device()
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    return [Case(*shape, device) for shape in (shapes[:2] if quick else shapes)]


@dataclass
class SelectionProblem:
    """What is eligible [B, N], and the probability of each sequence [B] float32."""

    eligible: Tensor
    probability: Tensor

    @property
    def device(self) -> torch.device:
        return self.eligible.device

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.probability,)

    @property
    def limits(self) -> dict[str, float]:
        return {
            "selected where it may not be": 0.0,
            "standard errors of the number": MAX_STANDARD_ERRORS,
            "standard errors of the mean position": MAX_STANDARD_ERRORS,
        }

    def restore(self, contender: Contender) -> None:
        pass

    def run(self, contender: Contender, function: peers.Selector) -> Tensor:
        return function(self.eligible, self.probability)

    def errors(self, step: Step) -> dict[str, float]:
        """Of at least MIN_DRAWS coins: where they fell wrongly, how many there are, and where they lie."""
        torch.manual_seed(1)  # not the seed of the inputs
        p = self.probability.double()[:, None].expand(self.eligible.shape) * self.eligible
        position = torch.linspace(-1.0, 1.0, p.shape[1], dtype=torch.float64, device=self.device)
        figures = torch.zeros(3, dtype=torch.float64, device=self.device)
        repeats = -(-MIN_DRAWS // p.numel())
        for _ in range(repeats):
            selected: Tensor = step.run()
            figures[0] += (selected & ~self.eligible).sum()
            figures[1] += (selected.double() - p).sum()
            figures[2] += ((selected.double() - p) * position).sum()
        variance = p * (1 - p) * repeats
        figures[1] = (figures[1] / variance.sum().sqrt()).abs()
        figures[2] = (figures[2] / (variance * position.square()).sum().sqrt()).abs()
        return dict(zip(self.limits, figures.tolist(), strict=True))


def problem(case: Case) -> SelectionProblem:
    generator = torch.Generator(case.device).manual_seed(0)
    shape = case.batch, case.seq_len
    eligible = torch.rand(shape, generator=generator, device=case.device) < 0.5
    return SelectionProblem(eligible, torch.rand(case.batch, generator=generator, device=case.device))


def ours() -> peers.Selector:
    seeds = itertools.count()

    def select(eligible: Tensor, probability: Tensor) -> Tensor:
        return functional.select_at_random(eligible, probability, seed=next(seeds))

    return select


def contenders() -> list[Contender]:
    return [Contender("fastmask", "", ours, is_ours=True), *peers.selectors()]


def floor(case: Case, limits: Ceilings) -> Floor:
    return Floor(BYTES_PER_POSITION * case.batch * case.seq_len, limits.copy, "GB/s")


BENCHMARK = Benchmark("select_at_random", cases, contenders, problem, floor)
