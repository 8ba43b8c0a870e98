"""Mask sampling with BERT gating, against x-transformers' own lines (five argsorts).

``python -m benchmarks --only mask_sampling``.
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

MASK_ID = 8191
NO_REPLACE_PROB, RANDOM_TOKEN_PROB = 0.15, 0.1
CUDA_SHAPES = ((64, 1024), (8, 256), (16, 4096), (4, 16384), (4, 65536))
CPU_SHAPES = ((64, 1024), (8, 256), (4, 16384))

MIN_DRAWS = 64  # sequences
MAX_STANDARD_ERRORS = 5.0
# Of a position the token is read; its id, whether it is masked and an entry of the list of masked rows are written.
# x-transformers' lines make no list: 8 less, though held to the same.
BYTES_PER_POSITION = 8 + 8 + 1 + 8


@dataclass(frozen=True)
class Case:
    """B sequences of N positions; where padded, the last positions of each are not maskable."""

    batch: int
    seq_len: int
    is_padded: bool
    device: torch.device

    def __str__(self) -> str:
        return f"B {self.batch}, N {self.seq_len}" + ", padded" * self.is_padded


def cases(quick: bool) -> list[Case]:
    """Every shape, with and without padding; ``quick``: the aim's shape and a small one, without."""
    device = machine.default_device()
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    if quick:
        return [Case(*shape, False, device) for shape in shapes[:2]]
    return [Case(*shape, is_padded, device) for shape in shapes for is_padded in (False, True)]


@dataclass(frozen=True)
class MaskingProblem:
    """Tokens [B, N] without the mask's id, times [B], and where a token may be masked ([B, N], None: everywhere)."""

    tokens: Tensor
    times: Tensor
    maskable: Tensor | None

    @property
    def limits(self) -> dict[str, float]:
        return {
            "wrong counts": 0.0,
            "changed or masked where it may not be": 0.0,
            "kept, random and masked in other numbers": 0.0,
            "standard errors of the mean position": MAX_STANDARD_ERRORS,
        }

    @property
    def device(self) -> torch.device:
        return self.tokens.device

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.tokens,)

    def restore(self, contender: Contender) -> None:
        pass

    def run(self, contender: Contender, function: peers.Function) -> tuple[Tensor, Tensor]:
        ids, is_masked = function(self.tokens, self.times, self.maskable)
        return ids, is_masked

    def errors(self, step: Step) -> dict[str, float]:
        """Of at least MIN_DRAWS sequences: how many are wrong, and whether the masked positions are uniform."""
        torch.manual_seed(1)  # not the seed of the inputs: their noise would be correlated
        allowed = torch.ones_like(self.tokens, dtype=torch.bool) if self.maskable is None else self.maskable
        sizes = allowed.sum(dim=-1)
        counts = ((1 - self.times) * sizes).ceil().clamp(min=1).long()
        positions = torch.arange(self.tokens.shape[1], device=self.device, dtype=torch.float64).expand_as(allowed)
        center = (positions * allowed).sum(dim=-1) / sizes
        spread = ((positions - center[:, None]).square() * allowed).sum(dim=-1) / sizes
        # Of a mean of k out of n without replacement; nothing is uncertain where all are masked.
        variance = spread / counts * (sizes - counts) / (sizes - 1).clamp(min=1)
        figures = torch.zeros(4, dtype=torch.float64, device=self.device)
        repeats = -(-MIN_DRAWS // len(self.tokens))
        for _ in range(repeats):
            ids, is_masked = step.run()
            figures[0] += (is_masked.sum(dim=-1) != counts).sum()
            figures[1] += (is_masked & ~allowed).sum() + (~is_masked & (ids != self.tokens)).sum()
            figures[2] += self._gated_otherwise(ids, is_masked, counts)
            figures[3] += ((positions * is_masked).sum(dim=-1) / counts - center).sum()
        figures[3] = (figures[3] / (repeats * variance.sum()).sqrt()).abs()
        return dict(zip(self.limits, figures.tolist(), strict=True))

    def _gated_otherwise(self, ids: Tensor, is_masked: Tensor, counts: Tensor) -> Tensor:
        """In how many sequences no fall of the two coins explains how many positions show the mask's id.

        A random token may be the mask's id by chance, at upstream, so some more may.
        """
        shown = (is_masked & (ids == MASK_ID)).sum(dim=-1)
        explained = torch.zeros_like(shown, dtype=torch.bool)
        for keeps, replaces in itertools.product((False, True), repeat=2):
            kept = (counts.float() * NO_REPLACE_PROB).ceil().long() * keeps
            probability = RANDOM_TOKEN_PROB * (1 - NO_REPLACE_PROB * keeps)
            random = ((counts - kept).float() * probability).ceil().long() * replaces
            least, chance = counts - kept - random, random / (MASK_ID + 1)
            explained |= (shown >= least) & (shown <= least + random.minimum(chance + 6 * chance.sqrt() + 2))
        return (~explained).sum()


def problem(case: Case) -> MaskingProblem:
    generator = torch.Generator(case.device).manual_seed(0)
    shape = case.batch, case.seq_len
    tokens = torch.randint(0, MASK_ID, shape, generator=generator, device=case.device)
    times = torch.rand(case.batch, generator=generator, device=case.device)
    maskable = None
    if case.is_padded:
        lengths = torch.randint(1, case.seq_len + 1, (case.batch, 1), generator=generator, device=case.device)
        maskable = torch.arange(case.seq_len, device=case.device) < lengths
    return MaskingProblem(tokens, times, maskable)


def ours() -> peers.Function:
    seeds = itertools.count()

    def mask(tokens: Tensor, times: Tensor, maskable: Tensor | None) -> tuple[Tensor, Tensor]:
        return functional.mask_sampling(
            tokens,
            mask_id=MASK_ID,
            num_tokens=MASK_ID + 1,
            times=times,
            maskable=maskable,
            no_replace_prob=NO_REPLACE_PROB,
            random_token_prob=RANDOM_TOKEN_PROB,
            seed=next(seeds),
        )[:2]

    return mask


def contenders() -> list[Contender]:
    return [
        Contender("fastmask", "", ours, is_ours=True),
        *peers.maskers(NO_REPLACE_PROB, RANDOM_TOKEN_PROB, MASK_ID),
    ]


def floor(case: Case, limits: Ceilings) -> Floor:
    """Bytes; with padding it is read which positions may be masked."""
    amount = (BYTES_PER_POSITION + case.is_padded) * case.batch * case.seq_len
    return Floor(amount, limits.copy, "GB/s")


BENCHMARK = Benchmark("mask_sampling", cases, contenders, problem, floor)
