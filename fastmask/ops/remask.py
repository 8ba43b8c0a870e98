"""Remasking: what is accepted, refused and promised.

A remask key says how little a token deserves to stay: those of the highest keys are masked again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmask import _check, _dispatch
from fastmask._memoised import memoised
from fastmask.ops.seeds import as_draws
from fastmask.records import Draws, Remasking, RowList, Windows
from fastmask.reference import remask as reference


def confidence_remask_keys(
    log_probs: Tensor,
    *,
    choice_temperature: float = 0.0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    step: int = 0,
    sample_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    r"""The remask key of each token by its probability: the higher, the sooner it is masked again.

    .. math::
        s = -(\log p + c\, G), \quad G \sim \mathrm{Gumbel}(0, 1)

    Args:
        log_probs: [B, N] float32, nats.
        choice_temperature: c >= 0, annealed by the caller (MaskGIT: 4.5 times the share of steps left).
        seed, generator, step, sample_offset, backend: as in :func:`sample_tokens`.

    Returns:
        [B, N] float32.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number.

    Randomness: stream SCORE_NOISE of the seed at ``step``, where c > 0.

    Source: MaskGIT (https://arxiv.org/abs/2202.04200), section 3.2 and its released sampler.

    Example:
        >>> confidence_remask_keys(torch.tensor([[0.5, 0.25]]).log())
        tensor([[0.6931, 1.3863]])
    """
    _check.tensor("log_probs", log_probs, [torch.float32], ndim=2)
    _check.number("choice_temperature", choice_temperature, 0.0)
    if choice_temperature == 0.0:
        return -log_probs
    draws = as_draws(seed, log_probs.device, generator, step, sample_offset)
    return -(log_probs + choice_temperature * _gumbel_noise(log_probs, draws, backend))


def critic_remask_keys(
    critic_logits: Tensor,
    *,
    noise_scale: float = 0.0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    step: int = 0,
    sample_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    r"""The remask key of each token by a token critic: the higher, the sooner it is masked again.

    .. math::
        s = \mathrm{critic} + c\, G, \quad G \sim \mathrm{Gumbel}(0, 1)

    Args:
        critic_logits: [B, N] floating point, the critic's logit that the token is wrong.
        noise_scale: c >= 0, annealed by the caller.
        seed, generator, step, sample_offset, backend: as in :func:`sample_tokens`.

    Returns:
        [B, N] float32.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number.

    Randomness: stream SCORE_NOISE of the seed at ``step``, where c > 0.

    Source: Token-Critic (https://arxiv.org/abs/2209.04439), section 3.2.

    Example:
        >>> critic_remask_keys(torch.tensor([[0.5, -0.5]]))
        tensor([[ 0.5000, -0.5000]])
    """
    _check.tensor("critic_logits", critic_logits, _check.FLOATING, ndim=2)
    _check.number("noise_scale", noise_scale, 0.0)
    remask_keys = critic_logits.float()
    if noise_scale == 0.0:
        return remask_keys
    draws = as_draws(seed, critic_logits.device, generator, step, sample_offset)
    return remask_keys + noise_scale * _gumbel_noise(remask_keys, draws, backend)


def _gumbel_noise(values: Tensor, draws: Draws, backend: str) -> Tensor:
    """Gumbel noise of each value [B, N]."""
    batch, length = values.shape
    return _dispatch.implementation(reference.gumbel_noise, values.device, backend)(draws, batch, length)


def select_to_remask(
    remask_keys: Tensor,
    eligible: Tensor,
    counts: Tensor | int,
    *,
    min_remask_key: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""The ``counts`` eligible positions of the highest remask keys in each sequence: those masked again.

    Args:
        remask_keys: [B, N] floating point, as of :func:`confidence_remask_keys` or :func:`critic_remask_keys`.
        eligible: [B, N] bool, the positions that may be masked again.
        counts: [B] int32|int64, how many, or one number for all; clamped to how many are eligible.
        min_remask_key: positions of a lower key are not eligible (NaN is).
        backend: see the module.

    Returns:
        [B, N] bool. The order is total: NaN first, then falling key (-0.0 equals 0.0), ties by falling position: of
        equally sure positions the first are committed first.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape, tensors on several devices.

    Randomness: none.

    Source: MaskGIT (https://arxiv.org/abs/2202.04200), section 3.2, step 4.

    Example:
        >>> eligible = torch.tensor([[True, True, False, True]])
        >>> select_to_remask(torch.tensor([[0.1, 0.7, 0.9, 0.7]]), eligible, 1)
        tensor([[False, False, False,  True]])
    """
    _check.tensor("remask_keys", remask_keys, _check.FLOATING, ndim=2)
    _check.tensor("eligible", eligible, [torch.bool])
    _check.shape("eligible", eligible, remask_keys.shape, "B, N")
    counts = as_counts(counts, remask_keys)
    _check_key(min_remask_key)
    _check.same_device(remask_keys=remask_keys, eligible=eligible, counts=counts)
    backend = _of_length(backend, remask_keys)
    run = _dispatch.implementation(reference.select_to_remask, remask_keys.device, backend, remask_keys.dtype)
    return run(remask_keys, eligible, counts, min_remask_key)


def as_counts(counts: Tensor | int, values: Tensor, name: str = "counts") -> Tensor:
    """How many positions of each sequence of values [B, N], as a tensor [B]."""
    if not isinstance(counts, Tensor):
        counts = _check.integer(name, counts, 0, 2**63)
        return torch.full(values.shape[:1], counts, dtype=torch.int64, device=values.device)
    _check.tensor(name, counts, _check.INTEGER)
    _check.shape(name, counts, values.shape[:1], "B")
    return counts


def _check_key(min_remask_key: float | None) -> None:
    if min_remask_key is None:
        return
    if isinstance(min_remask_key, bool) or not isinstance(min_remask_key, (int, float)):
        raise TypeError(f"expected min_remask_key to be a number, received {type(min_remask_key).__name__}")
    if math.isnan(min_remask_key):
        raise ValueError("expected min_remask_key to be a number, received nan")


def _of_length(backend: str, values: Tensor) -> str:
    """The kernel's keys hold 16 bits of position."""
    return "reference" if backend == "auto" and values.shape[1] > 2**16 else backend


def remask_(
    ids: Tensor,
    is_masked: Tensor,
    row_indices: Tensor,
    row_starts: Tensor,
    values: Tensor,
    counts: Tensor | int | None = None,
    *,
    mask_id: int,
    commits: Tensor | int | None = None,
    is_confidence: bool = True,
    noise_scale: float = 0.0,
    min_remask_key: float | None = None,
    factor: float | None = None,
    entropy_bound: float | None = None,
    eligible: Tensor | None = None,
    block: Tensor | None = None,
    next_block: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    step: int = 0,
    sample_offset: int = 0,
    backend: str = "auto",
) -> None:
    r"""Remask keys, :func:`select_to_remask`, and what follows from it, in place.

    .. math::
        s = \pm(\mathrm{value} + c\, G), \quad G \sim \mathrm{Gumbel}(0, 1)

    With several of counts, commits and a rule, what any of them commits is committed.

    Args:
        ids: [B, N] int64, every position filled; mask_id is written where a position is masked again.
        is_masked: [B, N] bool, before and after.
        row_indices: [R] int64, where the flat positions b N + i of what is masked are listed: those of sequence b
            from row_starts[b] on, below row_starts[b + 1], then -1. What does not fit is left out.
        row_starts: [B + 1] int64, rising, from 0 to R. What lies outside is as good as 0 or R.
        values: [B, N] floating point, log_probs, entropies or a critic's logits.
        counts: how many of each sequence stay masked at most: [B] int32|int64, or one number for all.
        mask_id: the id of the mask token.
        commits: how many are committed at least, likewise; at least one is. Not with counts.
        is_confidence: whether a high value keeps a token (the sign above is -), as an entropy or a critic's logit
            does not (+).
        noise_scale: c; below 0 for noise that keeps a token of low value.
        min_remask_key: a rule: what has a lower key is committed, by its value alone, without the noise; at least one
            position is, unless ``eligible`` is given.
        factor: f >= 0, a rule: the surest n are committed, for the largest n whose least sure one has a probability
            of at least 1 - f / (n + 1), at least one. values: log_probs.
        entropy_bound: nats, a rule: those of the lowest entropies are committed, as many as sum to at most this
            without the last, at least one. values: entropies.
        eligible: [B, N] bool, the positions that may be masked again; by default those that were masked.
        block: [B, 2] int64, the first position and the end of what takes part in each sequence: outside of it nothing
            changes or is counted. By default everything does.
        next_block: likewise, of which positions the list is; by default of all.
        seed, generator, step, sample_offset, backend: as in :func:`sample_tokens`.

    Writes, and returns nothing:

        - ids: mask_id where a position is masked again, else as they were;
        - is_masked: True at the positions that are masked again, False at all others;
        - row_indices: the list of these positions.

    One launch up to 4096 positions; of longer sequences the noise is drawn before, by another.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, tensors on several devices or, of those that
        are written, not contiguous.

    Randomness: stream SCORE_NOISE of the seed at ``step``, where c > 0.

    Source: as :func:`confidence_remask_keys`, :func:`critic_remask_keys` and :func:`select_to_remask`.

    Example:
        >>> ids, is_masked = torch.tensor([[5, 6, 7]]), torch.tensor([[True, True, False]])
        >>> rows, starts = torch.empty(2, dtype=torch.int64), torch.tensor([0, 2])
        >>> remask_(ids, is_masked, rows, starts, torch.tensor([[-0.1, -2.0, 0.0]]), 1, mask_id=9)
        >>> ids, rows
        (tensor([[5, 9, 7]]), tensor([ 1, -1]))
    """
    _check.tensor("values", values, _check.FLOATING, ndim=2)
    _check_written("ids", ids, torch.int64)
    _check_written("is_masked", is_masked, torch.bool)
    _check_written("row_indices", row_indices, torch.int64)
    _check.tensor("row_starts", row_starts, [torch.int64])
    _check.shape("ids", ids, values.shape, "B, N")
    _check.shape("is_masked", is_masked, values.shape, "B, N")
    _check.shape("row_starts", row_starts, [values.shape[0] + 1], "B + 1")
    windows = Windows(block, next_block)
    check_windows(windows, values.shape[0])
    if eligible is not None:
        _check.tensor("eligible", eligible, [torch.bool])
        _check.shape("eligible", eligible, values.shape, "B, N")
        _check_not_with("eligible", commits=commits, factor=factor, entropy_bound=entropy_bound)
    remasking = checked_remasking(
        counts,
        commits,
        mask_id=mask_id,
        is_confidence=is_confidence,
        noise_scale=noise_scale,
        min_remask_key=min_remask_key,
        factor=factor,
        entropy_bound=entropy_bound,
    )
    # Without noise nothing is drawn, no seed either.
    draws = as_draws(
        seed if noise_scale or isinstance(seed, Tensor) else 0, values.device, generator, step, sample_offset
    )
    listed, counts = RowList(row_indices, row_starts), commits if counts is None else counts
    remask_checked_(ids, is_masked, listed, values, counts, eligible, windows, draws, remasking, backend)


def remask_checked_(
    ids: Tensor,
    is_masked: Tensor,
    listed: RowList,
    values: Tensor,
    counts: Tensor | int | None,
    eligible: Tensor | None,
    windows: Windows,
    draws: Draws,
    remasking: Remasking,
    backend: str,
) -> None:
    """What :func:`remask_` does once all is checked but its counts, or commits, and devices."""
    counts = as_counts(1 if counts is None else counts, values, "commits" if remasking.counts_commit else "counts")
    _check.same_device(
        ids=ids, is_masked=is_masked, row_indices=listed.row_indices, block=windows.block,
        next_block=windows.next_block, row_starts=listed.row_starts, values=values, counts=counts, eligible=eligible,
    )  # fmt: skip
    backend = _of_length(backend, values)
    run = _dispatch.implementation(reference.remask_, values.device, backend, values.dtype)
    run(ids, is_masked, listed, values, counts, eligible, windows, draws, remasking)


def _check_written(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Of what is written in place."""
    _check.tensor(name, tensor, [dtype])
    if not tensor.is_contiguous():
        raise ValueError(f"expected {name} to be contiguous, received strides {list(tensor.stride())}")


def check_windows(windows: Windows, batch: int) -> None:
    """Refuses what is no window of each sequence."""
    for name, window in zip(windows._fields, windows, strict=True):
        if window is not None:
            _check.tensor(name, window, [torch.int64])
            _check.shape(name, window, [batch, 2], "B, 2")


def _check_not_with(given: str, **others: object) -> None:
    for name, value in others.items():
        if value is not None:
            raise ValueError(f"expected {given} or {name}, received both; leave one out")


def checked_remasking(
    counts: Tensor | int | None,
    commits: Tensor | int | None,
    *,
    mask_id: int,
    is_confidence: bool = True,
    noise_scale: float = 0.0,
    min_remask_key: float | None = None,
    factor: float | None = None,
    entropy_bound: float | None = None,
) -> Remasking:
    """The options of :func:`remask_`; counts, commits or a rule say how many positions stay masked."""
    if counts is not None:
        _check_not_with("counts", commits=commits)
    elif commits is None and min_remask_key is None and factor is None and entropy_bound is None:
        raise ValueError("expected counts, commits or a rule, received none; say how many positions stay masked")
    return _checked_remasking(
        mask_id, is_confidence, noise_scale, min_remask_key, factor, entropy_bound, counts is None
    )


@memoised
def _checked_remasking(
    mask_id: int,
    is_confidence: bool,
    noise_scale: float,
    min_remask_key: float | None,
    factor: float | None,
    entropy_bound: float | None,
    counts_commit: bool,
) -> Remasking:
    """Refuses numbers out of range, and rules beside one another, or beside figures that they are not of."""
    _check.flag("is_confidence", is_confidence)
    _check_key(min_remask_key)
    mask_id = _check.integer("mask_id", mask_id, -(2**63), 2**63)
    _check.number("noise_scale", noise_scale, -math.inf)
    for name, value, of_confidence in (("factor", factor, True), ("entropy_bound", entropy_bound, False)):
        if value is None:
            continue
        _check.number(name, value, 0.0)
        if is_confidence is not of_confidence:
            raise ValueError(f"expected is_confidence={of_confidence} with {name}, received {is_confidence}")
        if noise_scale != 0.0:
            raise ValueError(f"expected no noise with {name}, whose order is by the values, received {noise_scale}")
        _check_not_with(name, min_remask_key=min_remask_key)
    if factor is not None:
        _check_not_with("factor", entropy_bound=entropy_bound)
    return Remasking(mask_id, is_confidence, float(noise_scale), min_remask_key, factor, entropy_bound, counts_commit)
