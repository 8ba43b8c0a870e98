"""The peers, each with its exact call by its best path: of the two losses, on all rows (labels -100) and on gathered
rows; of the masking; of the choice of what is masked again, or at random. Those of the sampler: sampler_peers.py.

Nothing is imported before a contender is loaded. Signatures were read in liger-kernel 0.8.5, cut-cross-entropy
25.1.1, fla-core 0.6.0, quack-kernels 0.6.5, flash-attention 2.8.4's repository and torch 2.13.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.losses import IGNORE_INDEX, Loss
from benchmarks.records import ALL_ROWS, GATHERED, WITH_MASK, Contender, Published

Function = Callable[..., Any]
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
    """A peer that takes labels: on all rows, and on the masked rows, of which it overwrites what was gathered."""
    return [
        Contender(name, ALL_ROWS, load, overwrites=overwrites, needs_cuda=needs_cuda),
        Contender(name, GATHERED, load, needs_cuda=needs_cuda),
    ]


def plain(function: Function) -> Callable[[], Function]:
    """Of what needs no import."""
    return lambda: function


def compiled(load: Callable[[], Function]) -> Callable[[], Function]:
    """By torch.compile, for each shape anew."""
    return lambda: torch.compile(load(), dynamic=False)


def _with_pytorch(with_mask: Loss, with_labels: Loss) -> list[Contender]:
    """Eager and compiled; given the mask they gather. Compiling takes minutes on a CPU: only eager is timed there."""
    return [
        Contender("PyTorch", WITH_MASK, plain(with_mask), is_baseline=True),
        Contender("PyTorch", ALL_ROWS, plain(with_labels)),
        Contender("torch.compile", WITH_MASK, compiled(plain(with_mask)), needs_cuda=True),
        *_both("torch.compile", compiled(plain(with_labels))),
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


def _liger(dsl: str) -> Loss:
    """By default it takes Triton's for logits; CuTe's, of the same interface, is for Hopper and later."""
    if dsl == "Triton":
        from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    else:
        from liger_kernel.ops.cutedsl.ops.cross_entropy import LigerCrossEntropyFunction

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
    for dsl in ("Triton", "CuTe"):
        contenders += _both(f"Liger ({dsl}, in place)", functools.partial(_liger, dsl), overwrites=True)
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
    """On Hopper and later, where nvidia-cutlass-dsl is installed, it takes CuTe's loss by itself."""
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
        # The condition of its own module: the chunked kernels need sizes divisible by 8. Where V is of 128 they are
        # the scaled-exp products on Hopper.
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


# --- masking ----------------------------------------------------------------------------------------------------
# From tokens [B, N], times [B], maskable [B, N] or None: what the network sees, and what is masked.


def _upstream_masking(no_replace_prob: float, random_token_prob: float, mask_id: int) -> Function:
    """The lines of its ``forward``, its coins falling as they do; padding as one would add it."""
    from x_transformers.nonautoregressive_wrapper import coin_flip, get_mask_subset_prob

    def mask(tokens: Tensor, times: Tensor, maskable: Tensor | None) -> tuple[Tensor, Tensor]:
        keys, length = torch.rand(tokens.shape, device=tokens.device), tokens.new_full((1, 1), tokens.shape[1])
        order = keys.argsort(dim=-1)
        if maskable is not None:
            order = keys.masked_fill(~maskable, 2.0).argsort(dim=-1).argsort(dim=-1)
            length = maskable.sum(dim=-1, keepdim=True)
        is_masked = order.float() < ((1 - times)[:, None] * length).clamp(min=1.0)
        ids, replaced, share_left = tokens, is_masked, 1.0
        if coin_flip():
            share_left -= no_replace_prob
            replaced = replaced & ~get_mask_subset_prob(is_masked, no_replace_prob)
        if coin_flip():
            random = get_mask_subset_prob(replaced, random_token_prob * share_left)
            ids = torch.where(random, torch.randint(0, mask_id + 1, tokens.shape, device=tokens.device), ids)
            replaced = replaced & ~random
        return ids.masked_fill(replaced, mask_id), is_masked

    return mask


def maskers(no_replace_prob: float, random_token_prob: float, mask_id: int) -> list[Contender]:
    """The peers of ``mask_sampling``."""
    load = functools.partial(_upstream_masking, no_replace_prob, random_token_prob, mask_id)
    return [
        Contender("x-transformers", "", load, is_baseline=True),
        Contender("x-transformers, torch.compile", "", compiled(load), needs_cuda=True),
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
        Contender("x-transformers, torch.compile", "", compiled(upstream), needs_cuda=True),
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
        Contender("torch.rand", "", plain(_float32_uniforms), is_baseline=True),
        Contender("torch.bernoulli", "", plain(_bernoulli)),
        Contender("torch.rand, torch.compile", "", compiled(plain(_float32_uniforms)), needs_cuda=True),
    ]
