"""The peers of ``sample_tokens``, each with its exact call by its best path; and those that tell ids only.

From logits [1, M, V], a temperature and top_k: ids [1, M], and the probability of each under the softmax that is
filtered and not heated; None from those of IDS_ONLY.

Signatures were read in flashinfer-python 0.6.18 and 0.7.4 and vLLM 0.33.0. Both want float32 in places: what that
costs is theirs. They have no probability of the kind, so that each is told once with the least that makes one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import compiled, plain
from benchmarks.records import IDS_ONLY, Contender

Sampler = Callable[[Tensor, float, int | None], tuple[Tensor, Tensor | None]]


def probability(probs: Tensor, ids: Tensor) -> Tensor:
    return probs.gather(-1, ids[..., None]).squeeze(-1)


def filtered(logits: Tensor, top_k: int | None) -> Tensor:
    """The largest logits and their ties; the others -inf."""
    if top_k is None:
        return logits
    least = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def _upstream_step(precision: torch.dtype | None, ids_only: bool = False) -> Sampler:
    """The lines of its ``generate``, without the softmax there that nothing uses."""
    from x_transformers import nonautoregressive_wrapper as upstream

    def sample(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor | None]:
        if precision is not None:
            logits = logits.to(precision)
        if top_k is not None:
            # It keeps ceil((1 - thres) V) logits: exactly top_k.
            logits = upstream.top_k(logits, 1 - (top_k - 0.5) / logits.shape[-1])
        ids = upstream.gumbel_sample(logits, temperature=temperature)
        return ids, None if ids_only else probability(logits.softmax(dim=-1), ids)

    return sample


def _float64_gumbel(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Of LLaDA's generation: argmax exp(z) / (-log u)^T, and the confidence, in float64."""
    wide = filtered(logits, top_k).double()
    noise = (-torch.rand_like(wide).log()) ** temperature
    ids = (wide.exp() / noise).argmax(dim=-1)
    return ids, probability(wide.softmax(dim=-1), ids)


def _multinomial(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    kept = filtered(logits, top_k).float()
    ids = torch.multinomial((kept / temperature).softmax(dim=-1).squeeze(0), 1).T
    return ids, probability(kept.softmax(dim=-1), ids)


def _multinomial_ids(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, None]:
    kept = filtered(logits, top_k).float()
    return torch.multinomial((kept / temperature).softmax(dim=-1).squeeze(0), 1).T, None


def _flashinfer(ids_only: bool = False) -> Sampler:
    """Its filter of logits by radix select, its race, and its softmax for the probability."""
    from flashinfer import sampling

    def sample(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor | None]:
        rows = logits.squeeze(0)
        if top_k is not None:
            rows = sampling.top_k_mask_logits(rows, top_k)
        rows = rows.float()  # which both of the next would do
        ids = sampling.sampling_from_logits(rows / temperature).long()
        return ids[None], None if ids_only else probability(sampling.softmax(rows), ids)[None]

    return sample


def _flashinfer_rejection() -> Sampler:
    """Its kernel that filters while it samples, by rejection."""
    from flashinfer import sampling

    def sample(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, None]:
        probs = sampling.softmax(logits.squeeze(0), temperature)
        if top_k is None:
            return sampling.sampling_from_probs(probs).long()[None], None
        return sampling.top_k_sampling_from_probs(probs, top_k).long()[None], None

    return sample


def _vllm(ids_only: bool = False) -> Sampler:
    """Its GPU runner's: Triton's filter (Qrita), Gumbel noise and log-probabilities."""
    from vllm.v1.sample.ops.topk_topp_triton import apply_top_k_top_p_triton
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
    from vllm.v1.worker.gpu.sample.logprob import compute_token_logprobs

    draws = itertools.count()

    @functools.lru_cache(maxsize=1)
    def requests(rows: int, temperature: float, top_k: int | None, device: torch.device) -> tuple[Tensor, ...]:
        """Of each row its place, seed, temperature and k, and positions of many draws: all lie on the GPU there."""
        places = torch.arange(rows, device=device)
        temperatures = torch.full((rows,), temperature, device=device)
        kept = torch.full((rows,), top_k or 0, dtype=torch.int32, device=device)
        positions = torch.arange(256, device=device)[:, None].expand(-1, rows).contiguous()
        return places.int(), places, temperatures, kept, positions

    def sample(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor | None]:
        rows = logits.squeeze(0)
        places, seeds, temperatures, kept, positions = requests(len(rows), temperature, top_k, rows.device)
        if top_k is not None:
            rows = apply_top_k_top_p_triton(rows.float(), kept, None)
        position = positions[next(draws) % len(positions)]
        ids = gumbel_sample(rows, places, temperatures, seeds, position, apply_temperature=True, is_drafting=False)
        if ids_only:
            return ids[None], None
        return ids[None], compute_token_logprobs(rows, ids[:, None]).squeeze(-1).exp()[None]

    return sample


def samplers() -> list[Contender]:
    """Upstream's bfloat16 noise has 256 values: its own float32 stands beside it."""
    own, in_float32 = (functools.partial(_upstream_step, precision) for precision in (None, torch.float32))
    return [
        Contender("x-transformers", "", own, is_baseline=True, timed_if_wrong=True),
        Contender("x-transformers, torch.compile", "", compiled(own), needs_cuda=True, timed_if_wrong=True),
        Contender("x-transformers in float32", "", in_float32, needs_cuda=True),
        Contender("x-transformers in float32, torch.compile", "", compiled(in_float32), needs_cuda=True),
        Contender("float64 Gumbel (LLaDA)", "", plain(_float64_gumbel)),
        Contender("torch.multinomial", "", plain(_multinomial)),
        Contender("FlashInfer", "", _flashinfer, needs_cuda=True),
        Contender("vLLM", "", _vllm, needs_cuda=True),
        Contender("x-transformers", IDS_ONLY, functools.partial(own, ids_only=True), timed_if_wrong=True),
        Contender("torch.multinomial", IDS_ONLY, plain(_multinomial_ids)),
        Contender("FlashInfer", IDS_ONLY, functools.partial(_flashinfer, ids_only=True), needs_cuda=True),
        Contender("FlashInfer (rejection)", IDS_ONLY, _flashinfer_rejection, needs_cuda=True),
        Contender("vLLM", IDS_ONLY, functools.partial(_vllm, ids_only=True), needs_cuda=True),
    ]
