"""A step of decoding, made of the doors of sampling and of remasking."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastmask import _check
from fastmask.ops.judging import Judge, put_back
from fastmask.ops.remask import check_windows, checked_remasking, remask_checked_
from fastmask.ops.sample_tokens import (
    check_per_sequence,
    checked_logits,
    checked_options,
    sample_checked,
    sampled_rows,
)
from fastmask.ops.seeds import as_draws
from fastmask.records import Demasked, LinearLogits, RowList, Windows
from fastmask.reference.remask import is_inside


def demask_step(
    logits: Tensor | LinearLogits,
    ids: Tensor,
    is_masked: Tensor,
    counts: Tensor | int | None = None,
    *,
    mask_id: int,
    commits: Tensor | int | None = None,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    min_p: float | Tensor | None = None,
    top_p: float | Tensor | None = None,
    processed: bool = False,
    forbidden: Tensor | Sequence[int] | None = None,
    score: str | Tensor = "confidence",
    choice_temperature: float = 0.0,
    threshold: float | None = None,
    factor: float | None = None,
    entropy_bound: float | None = None,
    editing_threshold: float | None = None,
    editable: Tensor | None = None,
    block: Tensor | None = None,
    next_block: Tensor | None = None,
    row_indices: Tensor | None = None,
    max_masked: int | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    step: int = 0,
    sample_offset: int = 0,
    backend: str = "auto",
) -> Demasked:
    """One step of decoding: every masked position is sampled, and the least sure are masked again.

    With several of counts, commits and a rule (threshold, factor or entropy_bound), what any of them commits is.

    Args:
        logits: [B, N, V] floating point; or [M, V], compact rows of the positions ``row_indices``. Or
            :class:`LinearLogits`, with embeddings [B, N, D] or [M, D] likewise.
        ids: [B, N] int64, the tokens that the network saw.
        is_masked: [B, N] bool, which of them are masked.
        counts: [B] int32|int64, how many of each sequence stay masked at most, or one number for all; None for as
            many as commits and rule leave.
        mask_id: the id of the mask token, never sampled.
        commits: how many of each sequence are committed at least, likewise; not with counts.
        temperature, top_k, min_p, top_p, processed, forbidden: as in :func:`sample_tokens`; the first four may be
            tensors [B], one for each sequence.
        score: what is committed first: "confidence", the highest log p; "margin", the likeliest id the furthest ahead
            of the next; "entropy", the lowest; "random"; or [B, N] floating point, the highest of it, as of an order
            its negative.
        choice_temperature: c >= 0, of noise on the score: score + c G, G ~ Gumbel(0, 1). "random" has its own.
        threshold: a rule: a position is committed whose probability or margin is above it, or whose entropy is
            below it, whatever ``counts`` say, and at least one of each sequence is. In [0, 1]; of entropies, nats.
        factor, entropy_bound: rules of "confidence" and of "entropy", as in :func:`remask_`.
        editing_threshold: in [0, 1]: an editable id is overwritten by another that is proposed there with a
            probability above it.
        editable: [B, N] bool, with editing_threshold: what of the committed may be overwritten, the prompt not.
        block: [B, 2] int64, the first position and the end of what is decoded in each sequence: what is masked
            outside stays so and is not counted. By default everything is.
        next_block: likewise, of which positions row_indices is returned; by default of ``block``.
        row_indices: [M] int64, the flat positions b N + i of what is masked or editable in the block, -1 for none:
            the step before lists what is masked. By default every position is looked at.
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
        - log_probs: [B, N] float32, nats, of the id proposed at each position that was masked, or that took its place
          in an edit, else 0;
        - row_indices: [B max_masked] int64, the flat positions of what is masked now, sequence after sequence, each
          followed by -1.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number; no counts, commits or rule; several rules, or
            one of another score; one of editing_threshold and editable alone.

    Randomness: as :func:`sample_tokens` and, with choice_temperature or at random,
    :func:`confidence_remask_keys`.

    Source: MaskGIT (https://arxiv.org/abs/2202.04200), section 3.2; threshold and factor: Fast-dLLM
    (https://arxiv.org/abs/2505.22618), section 3.3; margin and entropy: Dream (https://arxiv.org/abs/2508.15487);
    entropy_bound: EB-Sampler (https://arxiv.org/abs/2505.24857), algorithm 1; editing: LLaDA2.1
    (https://arxiv.org/abs/2602.08676).

    Example:
        A whole MaskGIT loop, with any ``net(ids) -> logits``:

        >>> import math
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
    name, source, num_ids = checked_logits(logits)
    _check.same_device(**{
        name: source, "ids": ids, "is_masked": is_masked, "editable": editable, "block": block,
        "next_block": next_block,
    })  # fmt: skip
    if isinstance(score, Tensor):
        _check.tensor("score", score, _check.FLOATING)
        _check.shape("score", score, ids.shape, "B, N")
    if (editing_threshold is None) != (editable is None):
        raise ValueError("expected editing_threshold and editable together, received one of them; give both")
    if editable is not None:
        _check.number("editing_threshold", editing_threshold, 0.0, 1.0)
        _check.tensor("editable", editable, [torch.bool])
        _check.shape("editable", editable, ids.shape, "B, N")
    judge = Judge(score, choice_temperature, threshold, factor, entropy_bound).checked()
    if counts is None and commits is None and not judge.has_rule:
        raise ValueError("expected counts, commits or a rule, received none; say how many positions stay masked")
    (batch, length), device = ids.shape, ids.device
    check_windows(Windows(block, next_block), batch)
    max_masked = length if max_masked is None else _check.integer("max_masked", max_masked, 0, length + 1)
    draws = as_draws(seed, device, generator, step, sample_offset)
    may_edit = editable if block is None or editable is None else editable & is_inside(block, ids)
    if source.ndim == 3:
        letters = "B, N, D" if isinstance(logits, LinearLogits) else "B, N, V"
        _check.shape(name, source, [batch, length, source.shape[-1]], letters)
    if row_indices is None:
        is_open = is_masked if block is None else is_masked & is_inside(block, ids)
        is_open = is_open if may_edit is None else is_open | may_edit
        row_indices = torch.arange(ids.numel(), device=device).where(is_open.flatten(), -1)
    new = Demasked(
        ids.clone(memory_format=torch.contiguous_format),
        is_masked.clone(memory_format=torch.contiguous_format),
        ids.new_zeros(ids.shape, dtype=torch.float32),
        row_indices.new_empty(batch * max_masked),
    )
    sampled = judge.room(new.ids, new.log_probs)
    with_margin, with_entropy = sampled.margins is not None, sampled.entropies is not None
    sampling, per_sequence = checked_options(
        (temperature, top_k, min_p, top_p), forbidden, device, num_ids, mask_id, with_margin, with_entropy, processed
    )
    rows, _ = sampled_rows(name, source, row_indices, length)
    rows = check_per_sequence(name, source, per_sequence, rows._replace(num_places=ids.numel()), sampled)
    sample_checked(logits, rows, draws, sampling, None, sampled, per_sequence, backend)
    if may_edit is not None and editing_threshold is not None:
        put_back(sampled, ids, torch.zeros_like(new.log_probs), is_masked, may_edit, editing_threshold)
    options = judge.remasking(sampled)
    values = options.pop("values")
    remasking = checked_remasking(counts, commits, mask_id=mask_id, **options)
    listed, counts = RowList(new.row_indices), commits if counts is None else counts
    windows = Windows(block, block if next_block is None else next_block)
    remask_checked_(new.ids, new.is_masked, listed, values, counts, None, windows, draws, remasking, backend)
    return new
