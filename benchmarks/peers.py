"""The peers, each with its exact call: of the two losses, on all rows (labels -100) and on compacted rows; of the
sampler; of the masking; of the choice of what is masked again, or at random.

Nothing is imported before a contender is loaded. Signatures were read in liger-kernel 0.8.5, cut-cross-entropy
25.1.1, fla-core 0.6.0, quack-kernels 0.6.5, flash-attention's and FlashInfer's repositories and torch 2.13.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.losses import IGNORE_INDEX, Loss
from benchmarks.records import ALL_ROWS, COMPACTED, WITH_MASK, Contender, Published

Function = Callable[..., Any]
Sampler = Callable[[Tensor, float, int | None], tuple[Tensor, Tensor]]
Remasker = Callable[[Tensor, Tensor, Tensor, Tensor, int], tuple[Tensor, Tensor]]
Selector = Callable[[Tensor, Tensor], Tensor]

QUACK_DENSE = Published(
    "QuACK's cross-entropy on an H100",
    3000,
    "GB/s",
    "about 3 TB/s, https://github.com/Dao-AILab/quack/blob/main/media/2025-07-10-membound-sol.md",
)
QUACK_LINEAR = Published(
    "QuACK's linear cross-entropy on all rows on an H100",
    769,
    "TFLOP/s",
    "as it was quoted to us; no public page with it was found",
)


def _both(name: str, load: Callable[[], Loss], overwrites: bool = False, needs_cuda: bool = True) -> list[Contender]:
    """A peer that takes labels: on all rows, and on rows compacted beforehand."""
    return [
        Contender(name, given, load, overwrites=overwrites, needs_cuda=needs_cuda) for given in (ALL_ROWS, COMPACTED)
    ]


def _plain(function: Function) -> Callable[[], Function]:
    return lambda: function


def _compiled(load: Callable[[], Function]) -> Callable[[], Function]:
    return lambda: torch.compile(load(), dynamic=False)


def _with_pytorch(with_mask: Loss, with_labels: Loss) -> list[Contender]:
    """Eager and compiled. Compiling takes minutes on a CPU, so only eager is timed there."""
    return [
        Contender("PyTorch", WITH_MASK, _plain(with_mask), is_baseline=True),
        *_both("PyTorch", _plain(with_labels), needs_cuda=False),
        Contender("torch.compile", WITH_MASK, _compiled(_plain(with_mask)), needs_cuda=True),
        *_both("torch.compile", _compiled(_plain(with_labels))),
    ]


# --- from logits ------------------------------------------------------------------------------------------------


def dense_with_mask(logits: Tensor, targets: Tensor, is_masked: Tensor) -> Tensor:
    """The line of x-transformers' wrapper with PyTorch's loss, in the logits' dtype as there."""
    return F.cross_entropy(logits[is_masked], targets[is_masked])


def _dense_with_labels(logits: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)


def _x_transformers() -> Loss:
    """The same line with the loss that x-transformers 2.31.10 calls."""
    from torch_einops_utils import cross_entropy

    def loss(logits: Tensor, targets: Tensor, is_masked: Tensor) -> Tensor:
        out: Tensor = cross_entropy(logits[is_masked], targets[is_masked])
        return out

    return loss


def _liger() -> Loss:
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = LigerCrossEntropyFunction.apply(logits, labels, None, IGNORE_INDEX)[0]
        return out

    return loss


def _mean(losses: Tensor, labels: Tensor) -> Tensor:
    """The mean that fla-core's and flash-attention's own modules take of their losses, 0 where ignored."""
    return losses.sum() / (labels != IGNORE_INDEX).sum()


def _fla(inplace: bool) -> Loss:
    from fla.modules.fused_cross_entropy import cross_entropy_loss

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        losses, _ = cross_entropy_loss(logits, labels, ignore_index=IGNORE_INDEX, inplace_backward=inplace)
        return _mean(losses, labels)

    return loss


def _flash_attention(inplace: bool) -> Loss:
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        losses, _ = cross_entropy_loss(logits, labels, ignore_index=IGNORE_INDEX, inplace_backward=inplace)
        return _mean(losses, labels)

    return loss


def _quack(inplace: bool) -> Loss:
    from quack.cross_entropy import cross_entropy

    return functools.partial(cross_entropy, ignore_index=IGNORE_INDEX, inplace_backward=inplace)


def dense() -> list[Contender]:
    """The peers of ``masked_cross_entropy``; those with the option both with a new buffer and in place."""
    contenders = _with_pytorch(dense_with_mask, _dense_with_labels)
    contenders.append(Contender("x-transformers", WITH_MASK, _x_transformers))
    contenders += _both("Liger (in place)", _liger, overwrites=True)
    for name, load in (("fla-core", _fla), ("flash-attention", _flash_attention), ("QuACK", _quack)):
        contenders += _both(name, functools.partial(load, inplace=False))
        contenders += _both(f"{name} (in place)", functools.partial(load, inplace=True), overwrites=True)
    return contenders


# --- from embeddings and head -----------------------------------------------------------------------------------


def linear_with_mask(x: Tensor, weight: Tensor, targets: Tensor, is_masked: Tensor) -> Tensor:
    """As x-transformers: logits of all rows, then the masked ones."""
    return dense_with_mask(F.linear(x, weight), targets, is_masked)


def _linear_with_labels(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _dense_with_labels(F.linear(x, weight), labels)


def _linear_x_transformers() -> Loss:
    dense_loss = _x_transformers()
    return lambda x, weight, targets, is_masked: dense_loss(F.linear(x, weight), targets, is_masked)


def _torch_linear(chunked: bool) -> Loss:
    """Missing before torch 2.13: then it does not import."""
    from torch.nn import LinearCrossEntropyOptions
    from torch.nn.functional import linear_cross_entropy

    options = LinearCrossEntropyOptions() if chunked else None
    return functools.partial(linear_cross_entropy, ignore_index=IGNORE_INDEX, options=options)


def _liger_linear(accumulator: torch.dtype | None) -> Loss:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    # Positions: bias, ce_weight, ignore_index, lse_square_scale, label_smoothing, reduction, softcap,
    # return_z_loss, accum_dtype.
    options = (None, None, IGNORE_INDEX, 0.0, 0.0, "mean", None, False, accumulator)

    def loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = LigerFusedLinearCrossEntropyFunction.apply(x, weight, labels, *options)[0]
        return out

    return loss


def _cut_cross_entropy(filter_eps: str | None) -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return functools.partial(linear_cross_entropy, ignore_index=IGNORE_INDEX, filter_eps=filter_eps, impl="cce")


def _fla_linear() -> Loss:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    return lambda x, weight, labels: fused_linear_cross_entropy_loss(x, labels, weight, ignore_index=IGNORE_INDEX)


def _quack_linear() -> Loss:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy, linear_cross_entropy_func

    def loss(x: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        # The condition of its own module: the chunked kernels need sizes divisible by 8.
        if all(size % 8 == 0 for size in (*x.shape, len(weight))):
            out: Tensor = chunked_linear_cross_entropy(x, weight, labels, ignore_index=IGNORE_INDEX)
        else:
            out = linear_cross_entropy_func(x, weight, None, labels, ignore_index=IGNORE_INDEX, inplace_backward=True)
        return out

    return loss


def linear() -> list[Contender]:
    """The peers of ``linear_masked_cross_entropy``."""
    return [
        *_with_pytorch(linear_with_mask, _linear_with_labels),
        Contender("x-transformers", WITH_MASK, _linear_x_transformers),
        *_both("F.linear_cross_entropy", functools.partial(_torch_linear, chunked=False), needs_cuda=False),
        *_both("F.linear_cross_entropy (chunked)", functools.partial(_torch_linear, chunked=True), needs_cuda=False),
        *_both("Liger", functools.partial(_liger_linear, accumulator=None)),
        *_both("Liger (dW in float32)", functools.partial(_liger_linear, accumulator=torch.float32)),
        *_both("Cut Cross-Entropy (exact)", functools.partial(_cut_cross_entropy, filter_eps=None)),
        *_both("Cut Cross-Entropy (filtered, its default)", functools.partial(_cut_cross_entropy, filter_eps="high")),
        *_both("fla-core", _fla_linear),
        *_both("QuACK", _quack_linear),
    ]


# --- sampling ---------------------------------------------------------------------------------------------------
# From logits [1, M, V], a temperature and top_k: ids [1, M], and the probability of each under the softmax that
# is filtered and not heated.


def _probability(probs: Tensor, ids: Tensor) -> Tensor:
    return probs.gather(-1, ids[..., None]).squeeze(-1)


def _filtered(logits: Tensor, top_k: int | None) -> Tensor:
    """The largest logits and their ties; the others -inf."""
    if top_k is None:
        return logits
    least = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf)


def _upstream_step(precision: torch.dtype | None) -> Sampler:
    """The lines of its ``generate``, without the softmax there that nothing uses."""
    from x_transformers import nonautoregressive_wrapper as upstream

    def sample(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor]:
        if precision is not None:
            logits = logits.to(precision)
        if top_k is not None:
            # It keeps ceil((1 - thres) V) logits: exactly top_k.
            logits = upstream.top_k(logits, 1 - (top_k - 0.5) / logits.shape[-1])
        ids = upstream.gumbel_sample(logits, temperature=temperature)
        return ids, _probability(logits.softmax(dim=-1), ids)

    return sample


def _float64_gumbel(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """Of LLaDA's generation: argmax exp(z) / (-log u)^T, and the confidence, in float64."""
    wide = _filtered(logits, top_k).double()
    noise = (-torch.rand_like(wide).log()) ** temperature
    ids = (wide.exp() / noise).argmax(dim=-1)
    return ids, _probability(wide.softmax(dim=-1), ids)


def _multinomial(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    kept = _filtered(logits, top_k).float()
    ids = torch.multinomial((kept / temperature).softmax(dim=-1).squeeze(0), 1).T
    return ids, _probability(kept.softmax(dim=-1), ids)


def _flashinfer() -> Sampler:
    from flashinfer import sampling

    def sample(logits: Tensor, temperature: float, top_k: int | None) -> tuple[Tensor, Tensor]:
        rows = logits.squeeze(0).float()  # which it would do itself, several times
        probs = sampling.softmax(rows)
        if top_k is None:
            ids = sampling.sampling_from_logits(rows / temperature)
        else:
            ids = sampling.top_k_sampling_from_probs(sampling.softmax(rows, temperature), top_k)
            probs = sampling.top_k_renorm_probs(probs, top_k)
        ids = ids.long()
        return ids[None], _probability(probs, ids)[None]

    return sample


def samplers() -> list[Contender]:
    """The peers of ``sample_tokens``. Upstream's bfloat16 noise has 256 values: its own float32 stands beside it."""
    own, in_float32 = (functools.partial(_upstream_step, precision) for precision in (None, torch.float32))
    return [
        Contender("x-transformers", "", own, is_baseline=True, timed_if_wrong=True),
        Contender("x-transformers, torch.compile", "", _compiled(own), needs_cuda=True, timed_if_wrong=True),
        Contender("x-transformers in float32", "", in_float32, needs_cuda=True),
        Contender("x-transformers in float32, torch.compile", "", _compiled(in_float32), needs_cuda=True),
        Contender("float64 Gumbel (LLaDA)", "", _plain(_float64_gumbel)),
        Contender("torch.multinomial", "", _plain(_multinomial)),
        Contender("FlashInfer", "", _flashinfer, needs_cuda=True),
    ]


# --- masking ----------------------------------------------------------------------------------------------------
# From tokens [B, N], times [B], maskable [B, N] or None: what the network sees, and what is masked.


def _upstream_masking(no_replace_prob: float, random_token_prob: float, mask_id: int) -> Function:
    """The lines of its ``forward``, both coins fallen; padding as one would add it."""
    from x_transformers.nonautoregressive_wrapper import get_mask_subset_prob

    def mask(tokens: Tensor, times: Tensor, maskable: Tensor | None) -> tuple[Tensor, Tensor]:
        keys, length = torch.rand(tokens.shape, device=tokens.device), tokens.new_full((1, 1), tokens.shape[1])
        order = keys.argsort(dim=-1)
        if maskable is not None:
            order = keys.masked_fill(~maskable, 2.0).argsort(dim=-1).argsort(dim=-1)
            length = maskable.sum(dim=-1, keepdim=True)
        is_masked = order.float() < ((1 - times)[:, None] * length).clamp(min=1.0)
        replaced = is_masked & ~get_mask_subset_prob(is_masked, no_replace_prob)
        random = get_mask_subset_prob(replaced, random_token_prob * (1 - no_replace_prob))
        ids = tokens.where(~random, torch.randint(0, mask_id + 1, tokens.shape, device=tokens.device))
        return ids.masked_fill(replaced & ~random, mask_id), is_masked

    return mask


def maskers(no_replace_prob: float, random_token_prob: float, mask_id: int) -> list[Contender]:
    """The peers of ``mask_sampling``."""
    load = functools.partial(_upstream_masking, no_replace_prob, random_token_prob, mask_id)
    return [
        Contender("x-transformers", "", load, is_baseline=True),
        Contender("x-transformers, torch.compile", "", _compiled(load), needs_cuda=True),
    ]


# --- remasking --------------------------------------------------------------------------------------------------
# From ids [B, N], whether each was masked, its probability, and how many of each sequence are masked again ([B], and
# as the one int that they all are): ids, and what is masked.


def _upstream_remasking(mask_id: int) -> Remasker:
    """The lines of its ``generate`` after the probabilities of the sampled ids."""

    def remask(
        ids: Tensor, is_masked: Tensor, confidences: Tensor, counts: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        scores = 1 - confidences
        scores = scores.masked_fill(~is_masked, -torch.finfo(scores.dtype).max)
        chosen = scores.topk(count, dim=-1).indices
        is_masked = torch.zeros_like(scores, dtype=torch.bool).scatter(1, chosen, True)
        return ids.masked_fill(is_masked, mask_id), is_masked

    return remask


def _ranks(mask_id: int) -> Remasker:
    """A number of its own for each sequence, by ranks."""

    def remask(
        ids: Tensor, is_masked: Tensor, confidences: Tensor, counts: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        ranks = confidences.masked_fill(~is_masked, torch.inf).argsort(dim=-1).argsort(dim=-1)
        chosen = (ranks < counts[:, None]) & is_masked
        return ids.masked_fill(chosen, mask_id), chosen

    return remask


def _kth_value(mask_id: int) -> Remasker:
    """Whatever is at most as probable as the last that is masked again, ties too."""

    def remask(
        ids: Tensor, is_masked: Tensor, confidences: Tensor, counts: Tensor, count: int
    ) -> tuple[Tensor, Tensor]:
        eligible = confidences.masked_fill(~is_masked, torch.inf)
        chosen = (eligible <= eligible.kthvalue(count, dim=-1, keepdim=True).values) & is_masked
        return ids.masked_fill(chosen, mask_id), chosen

    return remask


def remaskers(mask_id: int) -> list[Contender]:
    """The peers of ``remask_`` and ``select_to_remask``."""
    upstream, ranks, kth_value = (
        functools.partial(load, mask_id) for load in (_upstream_remasking, _ranks, _kth_value)
    )
    return [
        Contender("x-transformers", "", upstream, is_baseline=True),
        Contender("x-transformers, torch.compile", "", _compiled(upstream), needs_cuda=True),
        Contender("PyTorch, ranks", "", ranks),
        Contender("PyTorch, kthvalue", "", kth_value),
    ]


# --- selecting at random ----------------------------------------------------------------------------------------
# From what is eligible [B, N] and the probability of each sequence [B]: what is selected.


def _float32_uniforms(eligible: Tensor, probability: Tensor) -> Tensor:
    """What public decoding loops have: 24 bits, so that nothing is rarer than one in 2^24."""
    return eligible & (torch.rand(eligible.shape, device=eligible.device) < probability[:, None])


def _bernoulli(eligible: Tensor, probability: Tensor) -> Tensor:
    return eligible & torch.bernoulli(probability[:, None].expand(eligible.shape)).bool()


def selectors() -> list[Contender]:
    """The peers of ``select_at_random``."""
    return [
        Contender("torch.rand", "", _plain(_float32_uniforms), is_baseline=True),
        Contender("torch.bernoulli", "", _plain(_bernoulli)),
        Contender("torch.rand, torch.compile", "", _compiled(_plain(_float32_uniforms)), needs_cuda=True),
    ]
