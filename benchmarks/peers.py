"""The peers of the two losses, each with its exact call, on all rows (labels -100) and on compacted rows.

Nothing is imported before a contender is loaded. Signatures were read in liger-kernel 0.8.5, cut-cross-entropy
25.1.1, fla-core 0.6.0, quack-kernels 0.6.5, flash-attention's repository and torch 2.13.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.harness import ALL_ROWS, COMPACTED, IGNORE_INDEX, WITH_MASK, Contender, Loss, Published

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
    "as quoted in fastmask's issue 3; no public page with it was found",
)


def _both(name: str, load: Callable[[], Loss], overwrites: bool = False, needs_cuda: bool = True) -> list[Contender]:
    """A peer that takes labels: on all rows, and on rows compacted beforehand."""
    return [
        Contender(name, given, load, overwrites=overwrites, needs_cuda=needs_cuda) for given in (ALL_ROWS, COMPACTED)
    ]


def _plain(loss: Loss) -> Callable[[], Loss]:
    return lambda: loss


def _compiled(loss: Loss) -> Callable[[], Loss]:
    return lambda: torch.compile(loss, dynamic=False)


def _with_pytorch(with_mask: Loss, with_labels: Loss) -> list[Contender]:
    """Eager and compiled. Compiling takes minutes on a CPU, so only eager is timed there."""
    return [
        Contender("PyTorch", WITH_MASK, _plain(with_mask), is_baseline=True),
        *_both("PyTorch", _plain(with_labels), needs_cuda=False),
        Contender("torch.compile", WITH_MASK, _compiled(with_mask), needs_cuda=True),
        *_both("torch.compile", _compiled(with_labels)),
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
