"""A step of decoding, made of the doors of sampling and of remasking."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastmask import _check
from fastmask.ops.remask import as_counts, remask_
from fastmask.ops.sample_tokens import checked_logits, sample_tokens
from fastmask.ops.seeds import as_seed
from fastmask.records import Demasked, LinearLogits, Sampled


def demask_step(
    logits: Tensor | LinearLogits,
    ids: Tensor,
    is_masked: Tensor,
    counts: Tensor | int | None = None,
    *,
    mask_id: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    min_p: float | None = None,
    top_p: float | None = None,
    processed: bool = False,
    forbidden: Tensor | Sequence[int] | None = None,
    choice_temperature: float = 0.0,
    threshold: float | None = None,
    row_indices: Tensor | None = None,
    max_masked: int | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    step: int = 0,
    sample_offset: int = 0,
    backend: str = "auto",
) -> Demasked:
    """One step of confidence-based decoding: every masked position is sampled, the least confident masked again.

    Args:
        logits: [B, N, V] floating point; or [M, V], compact rows of the positions ``row_indices``. Or
            :class:`LinearLogits`, with embeddings [B, N, D] or [M, D] likewise.
        ids: [B, N] int64, the tokens that the network saw.
        is_masked: [B, N] bool, which of them are masked.
        counts: [B] int32|int64, how many of each sequence stay masked at most, or one number for all; None for as
            many as the threshold leaves.
        mask_id: the id of the mask token, never sampled.
        temperature, top_k, min_p, top_p, processed, forbidden: as in :func:`sample_tokens`.
        choice_temperature: as in :func:`confidence_remask_keys`.
        threshold: in [0, 1]: a token whose probability is above it is committed whatever ``counts`` say, and at least
            one of each sequence is. With choice_temperature log p + c G is held to log(threshold).
        row_indices: [M] int64, the flat positions b N + i of what is masked, -1 for none: the step before lists
            them. By default every position is looked at.
        max_masked: a number that no sequence's masked positions exceed after this step, if the host knows one: how
            many places each has in the list returned.
        seed, generator: see the module; one seed serves a whole generation.
        step: index of the step. Random numbers belong to a position and a step: two slices of one sequence (blocks)
            that are decoded by themselves with the same seed and the same step draw the same. Number the steps
            through all blocks.
        sample_offset: global index of the first sequence.
        backend: see the module.

    Returns:
        Demasked, which nothing has waited for:

        - ids: [B, N] int64, mask_id where masked;
        - is_masked: [B, N] bool;
        - log_probs: [B, N] float32, nats, of the id proposed at each position that was masked, else 0;
        - row_indices: [B max_masked] int64, the flat positions of what is masked now, sequence after sequence, each
          followed by -1.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, neither counts nor threshold.

    Randomness: as :func:`sample_tokens` and, with choice_temperature, :func:`confidence_remask_keys`.

    Source: MaskGIT (https://arxiv.org/abs/2202.04200), section 3.2; the threshold: Fast-dLLM
    (https://arxiv.org/abs/2505.22618), section 3.3.

    Example:
        A whole MaskGIT loop, with any ``net(ids) -> logits``:

        >>> net, mask_id, steps = torch.nn.Embedding(10, 10), 9, 8
        >>> ids = torch.full((2, 16), mask_id)
        >>> is_masked, seed = ids == mask_id, 1
        >>> for step in range(steps):
        ...     share = (steps - 1 - step) / steps  # of what stays masked
        ...     ids, is_masked, *_ = demask_step(
        ...         net(ids), ids, is_masked, int(16 * math.sin(math.pi / 2 * share)), mask_id=mask_id,
        ...         temperature=share, choice_temperature=4.5 * share, seed=seed, step=step,
        ...     )
        >>> bool(is_masked.any() | (ids == mask_id).any())
        False
    """
    _check.tensor("ids", ids, [torch.int64], ndim=2)
    _check.tensor("is_masked", is_masked, [torch.bool])
    _check.shape("is_masked", is_masked, ids.shape, "B, N")
    name, source, _ = checked_logits(logits)
    _check.same_device(**{name: source, "ids": ids, "is_masked": is_masked})
    if threshold is not None:
        _check.number("threshold", threshold, 0.0, 1.0)
    elif counts is None:
        raise ValueError("expected counts or threshold, received neither; say how many positions stay masked")
    _check.number("choice_temperature", choice_temperature, 0.0)
    (batch, length), device = ids.shape, ids.device
    max_masked = length if max_masked is None else _check.integer("max_masked", max_masked, 0, length + 1)
    seed = as_seed(seed, device, generator)
    if row_indices is None:
        if source.ndim == 3:
            letters = "B, N, D" if isinstance(logits, LinearLogits) else "B, N, V"
            _check.shape(name, source, [batch, length, source.shape[-1]], letters)
        row_indices = torch.arange(ids.numel(), device=device).where(is_masked.flatten(), -1)
    counters: dict[str, Any] = {"seed": seed, "step": step, "sample_offset": sample_offset, "backend": backend}
    new = Demasked(
        ids.clone(memory_format=torch.contiguous_format),
        is_masked.clone(memory_format=torch.contiguous_format),
        torch.zeros(ids.shape, dtype=torch.float32, device=device),
        row_indices.new_empty(batch * max_masked),
    )
    sample_tokens(
        logits,
        temperature=temperature,
        top_k=top_k,
        min_p=min_p,
        top_p=top_p,
        processed=processed,
        mask_id=mask_id,
        forbidden=forbidden,
        row_indices=row_indices,
        seq_len=length,
        out=Sampled(new.ids, new.log_probs),
        **counters,
    )
    counts = is_masked.sum(dim=-1) if counts is None else as_counts(counts, ids)
    if threshold is not None:
        counts = counts_that_commit(counts, is_masked)
    remask_(
        new.ids,
        new.is_masked,
        new.row_indices,
        torch.arange(batch + 1, device=device) * max_masked,
        new.log_probs,
        counts,
        mask_id=mask_id,
        noise_scale=choice_temperature,
        min_remask_key=None if threshold is None else remask_key_of_threshold(threshold),
        **counters,
    )
    return new


def counts_that_commit(counts: Tensor, is_masked: Tensor) -> Tensor:
    """counts [B], or less: at least one of what is masked [B, N] does not stay so."""
    return counts.minimum(is_masked.sum(dim=-1) - 1)


def remask_key_of_threshold(threshold: float) -> float:
    """The remask key from which on a token's probability does not exceed a threshold: -log(threshold)."""
    return -math.log(threshold) if threshold > 0.0 else math.inf
