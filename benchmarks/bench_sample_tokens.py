"""Sampling and scoring of logit rows, against x-transformers' own step (the baseline) and every peer.

``python -m benchmarks --only sample_tokens``.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from benchmarks import machine, sampler_peers
from benchmarks.benchmark import Benchmark
from benchmarks.records import IDS_ONLY, Ceilings, Contender, Floor, Step
from fastmask import functional

TEMPERATURE = 0.7
KEPT_SHARE = 1 - 0.9  # of the logits, by the default of upstream's top_k
# Of small vocabularies (characters, proteins, codebooks) and of one row, too.
SMALL_SHAPES = ((64, 33), (8192, 33), (8192, 64), (8192, 256))
CUDA_SHAPES = (
    *itertools.product((32, 256, 2048, 8192), (8192, 50257, 126464, 152064)),
    *SMALL_SHAPES,
    (1, 50257),
    (1, 152064),
    (32, 1024),
)
CPU_SHAPES = ((512, 8192), (64, 50257), (32, 8192), (32, 1024), (64, 33), (64, 64), (64, 256), (1, 50257))
CUDA_QUICK, CPU_QUICK = ((2048, 50257), (32, 8192), (8192, 33), (1, 50257)), ((64, 50257), (32, 8192), (64, 33))

# So spread that the argmax, a sample at another temperature and ours have other mean log-probabilities: at 256 draws
# the first is 20 standard errors off, a sample at temperature 1 13, x-transformers' in bfloat16 9 and more.
LOGIT_SPREAD = 2.0
MIN_DRAWS = 256
MAX_STANDARD_ERRORS = 5.0
# Relative error of a probability: a softmax rounded to bfloat16 is within 2^-8 of the float64 one.
PROBABILITY_LIMITS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}


@dataclass(frozen=True)
class Case:
    """M masked rows over V ids; bfloat16 on CUDA, float32 on a CPU."""

    num_rows: int
    num_tokens: int
    top_k: int | None
    device: torch.device

    def __str__(self) -> str:
        kept = "" if self.top_k is None else f", top_k {self.top_k}"
        return f"{self.num_rows}x{self.num_tokens}{kept}, T {TEMPERATURE}"


def cases(quick: bool) -> list[Case]:
    """Every shape, filtered and not; ``quick``: a large and a small shape, a small vocabulary, and one row."""
    device = machine.default_device()
    shapes = CUDA_SHAPES if device.type == "cuda" else CPU_SHAPES
    if quick:
        shapes = CUDA_QUICK if device.type == "cuda" else CPU_QUICK
    return [
        Case(num_rows, num_tokens, top_k, device)
        for num_rows, num_tokens in shapes
        for top_k in (None, math.ceil(KEPT_SHARE * num_tokens))
    ]


@dataclass
class SamplingProblem:
    """Logits [1, M, V] with -inf at the mask's id, the last, and what is known of a right sample.

    Ids and probabilities are judged by the float64 softmax of the same logits. Upstream's filter keeps exactly k
    logits, ours also those that tie with the last of them: an id that ties is allowed, and a probability may be of
    either normaliser.

    least_kept: [M] the least logit that the filter keeps. log_totals: [M, 2] log-sum-exp with ties and without.
    mean, variance: [M] of the log-probability of an id sampled at TEMPERATURE.
    """

    logits: Tensor
    top_k: int | None
    least_kept: Tensor = field(init=False)
    log_totals: Tensor = field(init=False)
    mean: Tensor = field(init=False)
    variance: Tensor = field(init=False)

    def __post_init__(self) -> None:
        parts = [_expect(chunk, self.top_k) for chunk in self.logits[0].split(256)]
        self.least_kept, self.log_totals, self.mean, self.variance = map(torch.cat, zip(*parts, strict=True))

    @property
    def device(self) -> torch.device:
        return self.logits.device

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return (self.logits,)

    @property
    def limits(self) -> dict[str, float]:
        return {
            "ids that are not allowed": 0.0,
            "probability": PROBABILITY_LIMITS[self.logits.dtype],
            "standard errors of the mean log-probability": MAX_STANDARD_ERRORS,
        }

    def restore(self, contender: Contender) -> None:
        pass

    def run(self, contender: Contender, function: sampler_peers.Sampler) -> tuple[Tensor, Tensor | None]:
        return function(self.logits, TEMPERATURE, self.top_k)

    def errors(self, step: Step) -> dict[str, float]:
        """Of at least MIN_DRAWS samples: how many are not allowed, the distribution, and the worst probability, which
        IDS_ONLY do not tell."""
        torch.manual_seed(1)  # not the seed of the inputs: their noise would be correlated
        repeats = -(-MIN_DRAWS // self.logits.shape[1])
        not_allowed, worst, deviation = (torch.zeros((), dtype=torch.float64, device=self.device) for _ in range(3))
        for _ in range(repeats):
            ids, probs = step.run()
            ids = ids.squeeze(0)
            in_range = (ids >= 0) & (ids < self.logits.shape[-1])
            chosen = self.logits[0].gather(-1, ids.where(in_range, 0)[:, None]).squeeze(-1).double()
            not_allowed += (~in_range | chosen.isneginf() | (chosen < self.least_kept)).sum()
            log_probs = chosen[:, None] - self.log_totals
            if step.contender.given != IDS_ONLY:
                relative = (probs.squeeze(0).double()[:, None] / log_probs.exp() - 1).abs().amin(dim=-1)
                worst = torch.maximum(worst, relative.max())  # NaN stays
            deviation += (log_probs[:, 0] - self.mean).sum()
        standard_error = (repeats * self.variance.sum()).sqrt()
        figures = not_allowed, worst, (deviation / standard_error).abs()
        found = dict(zip(self.limits, (figure.item() for figure in figures), strict=True))
        if step.contender.given == IDS_ONLY:
            del found["probability"]
        return found


def _expect(logits: Tensor, top_k: int | None) -> tuple[Tensor, ...]:
    """The fields of SamplingProblem for some rows [M, V]."""
    z = logits.double()
    largest = z.topk(z.shape[-1] if top_k is None else top_k, dim=-1).values
    least_kept = largest[:, -1]
    z = z.masked_fill(z < least_kept[:, None], -torch.inf)
    log_total = z.logsumexp(dim=-1)
    heated = (z / TEMPERATURE).softmax(dim=-1)
    log_probs = (z - log_total[:, None]).where(heated > 0, 0.0)
    mean = (heated * log_probs).sum(dim=-1)
    variance = (heated * (log_probs - mean[:, None]).square()).sum(dim=-1)
    return least_kept, torch.stack([log_total, largest.logsumexp(dim=-1)], dim=-1), mean, variance


def problem(case: Case) -> SamplingProblem:
    generator = torch.Generator(case.device).manual_seed(0)
    shape, dtype = (1, case.num_rows, case.num_tokens), machine.default_dtype(case.device)
    logits = torch.randn(shape, generator=generator, device=case.device, dtype=dtype).mul_(LOGIT_SPREAD)
    logits[..., -1] = -torch.inf
    return SamplingProblem(logits, case.top_k)


def ours(ids_only: bool = False) -> sampler_peers.Sampler:
    """Of ids only it is asked for the probability that costs least: of what was sampled from."""
    seeds = itertools.count()

    def sample(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor | None]:
        sampled = functional.sample_tokens(
            logits,
            temperature=temperature,
            top_k=top_k,
            processed=ids_only,
            mask_id=logits.shape[-1] - 1,
            seed=next(seeds),
        )
        return sampled.ids, None if ids_only else sampled.log_probs.exp()

    return sample


def contenders() -> list[Contender]:
    ids_only = functools.partial(ours, ids_only=True)
    return [
        Contender("fastmask", "", ours, is_ours=True),
        Contender("fastmask", IDS_ONLY, ids_only, is_ours=True),
        *sampler_peers.samplers(),
    ]


def floor(case: Case, limits: Ceilings) -> Floor:
    """Bytes: the rows read once."""
    logits = case.num_rows * case.num_tokens
    return Floor(logits * machine.default_dtype(case.device).itemsize, limits.copy, "GB/s", logits)


BENCHMARK = Benchmark("sample_tokens", cases, contenders, problem, floor)
