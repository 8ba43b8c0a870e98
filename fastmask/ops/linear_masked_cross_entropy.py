"""Head and masked cross-entropy in one: what is accepted, refused and promised.

What is computed is said in ``fastmask/reference/linear_masked_cross_entropy.py``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastmask import _check, _dispatch, vocabulary_parallel
from fastmask.ops.masked_cross_entropy import (
    LossKeywords,
    check_num_tokens,
    checked_loss_options,
    loss_reduction,
    loss_rows,
    not_ignored,
    shows_loss_options,
)
from fastmask.records import CrossEntropy, LinearLogits, LossOptions
from fastmask.reference import linear_masked_cross_entropy as reference
from fastmask.vocabulary_parallel import Columns

if TYPE_CHECKING:
    from typing_extensions import Unpack


@shows_loss_options
def linear_masked_cross_entropy(
    embeddings: Tensor,
    weight: Tensor,
    targets: Tensor,
    is_masked: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    row_indices: Tensor | None = None,
    num_masked: int | None = None,
    reduction: str = "mean",
    denominator: Tensor | float | None = None,
    ignore_index: int | None = None,
    num_tokens: int | None = None,
    check: bool = False,
    backend: str = "auto",
    **options: Unpack[LossKeywords],
) -> CrossEntropy:
    r"""Head and :func:`masked_cross_entropy` in one, without logits of unmasked positions.

    .. math::
        z_i = W e_i + b

    Equals ``masked_cross_entropy(F.linear(embeddings, weight, bias), ...)``; only masked positions go
    through the head, and only one chunk of their logits exists at a time. Under autocast the products
    are taken in its dtype.

    Args:
        embeddings: [..., D] float16|bfloat16|float32|float64.
        weight: [V, D], the head's weight, of the embeddings' dtype (any under autocast). A DTensor that is Shard(0),
            split over the ranks of a mesh of one dimension, stays split: so is its gradient. The result and the
            embeddings' gradient are those of the whole on each rank. All other tensors are plain, and equal on these
            ranks (docs/distributed.md).
        bias: [V] of the weight's dtype, or None; beside such a weight plain, or a DTensor on its mesh.
        row_indices: [K] int64, in place of is_masked: the flat indices of the masked positions, each once,
            then -1; as ``mask_sampling`` returns them. What is no position counts as -1, which may stand anywhere.
        num_masked: how many positions are masked, if the host knows, or a number that they do not exceed:
            then nothing waits for the device to count them. Loss and gradients are NaN where there are more, or where
            row_indices lists one past its first num_masked entries.
            In a CUDA graph's capture, where nothing can wait, every position is computed without it.
        targets, is_masked, weights, reduction, denominator, ignore_index, num_tokens, check, backend, and the
            options: as in :func:`masked_cross_entropy`.

    Returns, Raises, Compiled, Randomness, Source: as :func:`masked_cross_entropy`; gradients reach embeddings
    (0 where unmasked), weight and bias, in their own dtypes, accumulated in float32.

    Example:
        >>> embeddings, weight = torch.ones(1, 3, 2), torch.zeros(4, 2)
        >>> is_masked = torch.tensor([[True, False, True]])
        >>> linear_masked_cross_entropy(embeddings, weight, torch.tensor([[0, 1, 2]]), is_masked).loss
        tensor(1.3863)
    """
    check_head(embeddings, weight, bias)
    _check.flag("check", check)
    rows = loss_rows(embeddings, targets, is_masked, weights)
    reducing = loss_reduction(embeddings, reduction, denominator)
    num_tokens = check_num_tokens(num_tokens, len(weight))
    loss_options = checked_loss_options(num_tokens, *LossOptions(**options))
    if row_indices is not None:
        if is_masked is not None:
            raise ValueError("expected is_masked or row_indices, received both; leave one out")
        _check.tensor("row_indices", row_indices, [torch.int64], ndim=1)
    if num_masked is not None:
        num_masked = _check.integer("num_masked", num_masked, 0)
    tensors = {"embeddings": embeddings, "weight": weight, "bias": bias, **rows._asdict(), "row_indices": row_indices}
    _check.same_device(**tensors)
    _check.plain(**tensors, denominator=reducing.denominator)
    is_target = None if ignore_index is None else not_ignored(targets, ignore_index)
    if row_indices is None:
        if is_target is not None:
            rows = rows._replace(is_masked=is_target if is_masked is None else is_masked & is_target)
    else:
        if check:
            _check_row_indices(row_indices, targets.numel())
        row_indices = _rows_in_loss(row_indices, targets.numel(), is_target)
    if check:
        listed = rows
        if row_indices is not None:
            is_listed = torch.zeros(targets.numel(), dtype=torch.bool, device=targets.device)
            is_listed = is_listed.index_fill_(0, row_indices[row_indices >= 0], True).view(targets.shape)
            listed = rows._replace(is_masked=is_listed)
        _check.clean_tokens("targets", targets, num_tokens, loss_options.exclude_id, listed.counted())
    logits = LinearLogits(embeddings, weight, bias, num_tokens=num_tokens)
    if vocabulary_parallel.is_split(weight):
        plain = {name: tensors[name] for name in ("embeddings", *rows._fields, "row_indices")}
        vocabulary_parallel.check(backend, **plain, denominator=reducing.denominator)
        logits, columns = local_head(logits)
        return reference.of_columns(logits, rows, reducing, loss_options, row_indices, num_masked, columns)
    operation = reference.linear_masked_cross_entropy
    run = _dispatch.implementation(operation, embeddings.device, backend, embeddings.dtype)
    return run(logits.cut(), rows, reducing, loss_options, row_indices, num_masked)


def local_head(logits: LinearLogits) -> tuple[LinearLogits, Columns]:
    """The logits of those ids that this rank has, of a weight that is split over ranks."""
    weight, columns = vocabulary_parallel.local_part("weight", logits.weight, 0, logits.num_ids)
    bias = vocabulary_parallel.local_bias(logits.bias, logits.weight, columns)
    return logits._replace(weight=weight, bias=bias, num_tokens=None), columns


def _rows_in_loss(row_indices: Tensor, num_rows: int, is_target: Tensor | None) -> Tensor:
    """The rows listed [K], -1 at what is none or, of targets [...], ignored: never read or written through."""
    if num_rows == 0:
        return row_indices[:0]
    is_row = (row_indices >= 0) & (row_indices < num_rows)
    if is_target is not None:
        is_row &= is_target.flatten()[row_indices.clamp(0, num_rows - 1)]
    return row_indices.where(is_row, -1)


def _check_row_indices(row_indices: Tensor, num_rows: int) -> None:
    """Rows, each once, then -1. Reads values: synchronises."""
    ends = (row_indices < 0).cumsum(dim=0) > 0
    rows = row_indices[~ends]
    if bool((row_indices[ends] != -1).any()) or bool((rows >= num_rows).any()) or len(rows.unique()) < len(rows):
        raise ValueError(
            f"expected row_indices to be rows below {num_rows}, each once, then -1; received "
            f"{row_indices[:8].tolist()}...; take those of mask_sampling, or is_masked.flatten().nonzero()"
        )


def check_head(embeddings: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """The checks of a linear head that losses and samplers share."""
    _check.tensor("embeddings", embeddings, _check.FLOATING)
    _check.tensor("weight", weight, _check.FLOATING, ndim=2)
    if embeddings.ndim < 2 or embeddings.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"expected embeddings [..., D] and weight [V, D] of one D, received {list(embeddings.shape)} "
            f"and {list(weight.shape)}"
        )
    if len(weight) == 0:
        raise ValueError("expected weight [V, D] with V of at least 1, received V = 0")
    if bias is not None:
        _check.tensor("bias", bias, [weight.dtype])
        _check.shape("bias", bias, weight.shape[:1], "V")
    if embeddings.dtype != weight.dtype and not torch.is_autocast_enabled(embeddings.device.type):
        raise TypeError(
            f"expected embeddings and weight of one dtype, received {embeddings.dtype} and {weight.dtype}; "
            f"convert one, or use torch.autocast"
        )
    _check.same_device(embeddings=embeddings, weight=weight, bias=bias)
