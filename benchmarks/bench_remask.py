"""What is masked again between two steps, against x-transformers' own selection (the baseline) and eager PyTorch.

``python -m benchmarks --only remask``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import machine, peers
from benchmarks.benchmark import Benchmark
from benchmarks.records import Ceilings, Contender, Floor, Step
from fastmask import functional

MASK_ID = 8191
CUDA_SHAPES = ((64, 1024), (8, 256), (16, 4096), (4, 16384), (4, 65536))
CPU_SHAPES = ((64, 1024), (8, 256), (4, 16384))

# A position's confidence and whether it was masked are read, whether it is masked is written; its id, where it is.
BYTES_PER_POSITION, BYTES_PER_ID = 4 + 1 + 1, 8


@dataclass(frozen=True)
class Case:
    """B sequences of N positions, half of them masked before, of which half are masked again."""

    batch: int
    seq_len: int
    device: torch.device

    def __str__(self) -> str:
        return f"B {self.batch}, N {self.seq_len}"

    @property
    def count(self) -> int:
        """How many positions of each sequence are masked again."""
        return self.seq_len // 4


def cases(quick: bool) -> list[Case]:
    """Every shape; ``quick``: a large and a small one."""
    device = machine.default_device()
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    return [Case(*shape, device) for shape in (shapes[:2] if quick else shapes)]


@dataclass
class RemaskProblem:
    """Ids [B, N] at every position, where they were masked, and how probable each is: no two alike in a sequence.

    Every confidence is a multiple of 2^-17, so that upstream's ``1 - p`` is exact too, and one choice is right.

    count: how many of each sequence are masked again. counts: [B] int64, the same.
    """

    ids: Tensor
    is_masked: Tensor
    confidences: Tensor
    count: int
    counts: Tensor = field(init=False)
    _expected: tuple[Tensor, Tensor] = field(init=False)
    _overwritten: tuple[Tensor, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.counts = torch.full_like(self.ids[:, 0], self.count)
        eligible = self.confidences.masked_fill(~self.is_masked, torch.inf)
        chosen = eligible <= eligible.sort(dim=-1).values[:, self.count - 1, None]
        self._expected = self.ids.masked_fill(chosen, MASK_ID), chosen
        self._overwritten = self.ids.clone(), self.is_masked.clone()

    @property
    def device(self) -> torch.device:
        return self.ids.device

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.ids, self.confidences

    @property
    def limits(self) -> dict[str, float]:
        return {"wrong ids": 0.0, "wrongly masked or not": 0.0}

    def restore(self, contender: Contender) -> None:
        if contender.overwrites:
            for overwritten, original in zip(self._overwritten, (self.ids, self.is_masked), strict=True):
                overwritten.copy_(original)

    def run(self, contender: Contender, function: peers.Remasker) -> tuple[Tensor, Tensor]:
        ids, is_masked = self._overwritten if contender.overwrites else (self.ids, self.is_masked)
        return function(ids, is_masked, self.confidences, self.counts, self.count)

    def errors(self, step: Step) -> dict[str, float]:
        """At how many positions the results are others than they must be."""
        pairs = zip(step.run(), self._expected, strict=True)
        return {name: (out != right).sum().item() for name, (out, right) in zip(self.limits, pairs, strict=True)}


def problem(case: Case) -> RemaskProblem:
    generator = torch.Generator(case.device).manual_seed(0)
    shape = case.batch, case.seq_len
    ids = torch.randint(0, MASK_ID, shape, generator=generator, device=case.device)
    drawn = torch.rand((2, *shape), generator=generator, device=case.device).argsort(dim=-1)
    return RemaskProblem(ids, drawn[0] < case.seq_len // 2, drawn[1].float() / 2**17, case.count)


def in_place(
    ids: Tensor, is_masked: Tensor, confidences: Tensor, counts: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """``remask_``, which writes the list of what is masked, too."""
    listed = _row_list(len(ids), count, ids.device)
    functional.remask_(ids, is_masked, *listed, confidences, counts, mask_id=MASK_ID)
    return ids, is_masked


@functools.lru_cache(maxsize=1)
def _row_list(batch: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """row_indices [B K] and row_starts [B + 1], which a generation allocates once."""
    row_starts = torch.arange(batch + 1, device=device) * count
    return torch.empty(batch * count, dtype=torch.int64, device=device), row_starts


def selected(
    ids: Tensor, is_masked: Tensor, confidences: Tensor, counts: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """``select_to_remask``, and what follows from it."""
    remask_keys = functional.confidence_remask_keys(confidences)
    chosen = functional.select_to_remask(remask_keys, is_masked, counts)
    return ids.masked_fill(chosen, MASK_ID), chosen


def contenders() -> list[Contender]:
    return [
        Contender("fastmask", "", lambda: in_place, is_ours=True, overwrites=True),
        Contender("fastmask (select_to_remask)", "", lambda: selected, is_ours=True),
        *peers.remaskers(MASK_ID),
    ]


def floor(case: Case, limits: Ceilings) -> Floor:
    """Bytes: in place, ids are written where they change only."""
    amount = case.batch * (case.seq_len * BYTES_PER_POSITION + case.count * BYTES_PER_ID)
    return Floor(amount, limits.copy, "GB/s")


BENCHMARK = Benchmark("remask", cases, contenders, problem, floor)
