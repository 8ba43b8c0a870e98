"""The operations of fastmask as plain functions, for people with loops of their own.

Every function checks its arguments, then runs the Triton kernel or the pure-PyTorch reference:
``backend="auto"`` takes the kernel on a GPU that has one, and the environment variable
FASTMASK_BACKEND overrides "auto". Checks never read a tensor's values (that would wait for the GPU)
unless ``check=True``.

Randomness is Philox with a 64-bit seed: given as ``seed=`` (an int, or an int64 scalar tensor on the
device), else drawn from ``generator=`` or torch's generator of the device. The same seed gives the same
result for every split of a batch, when ``sample_offset`` says which samples the rows are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask import _check, _dispatch
from fastmask._copies import moved
from fastmask.reference.demask import Remasking, Rows, Sampled, Sampling
from fastmask.reference.mask_sampling import MaskedTokens, draw_times
from fastmask.reference.masked_cross_entropy import CrossEntropy
from fastmask.schedules import Schedule, TensorFn, as_schedule

__all__ = [
    "CrossEntropy",
    "Demasked",
    "MaskedTokens",
    "Sampled",
    "confidence_scores",
    "critic_scores",
    "demask_step",
    "draw_seed",
    "linear_masked_cross_entropy",
    "linear_sample_tokens",
    "mask_sampling",
    "masked_cross_entropy",
    "remask_",
    "sample_tokens",
    "select_to_remask",
]


_dispatch.preload()


class Demasked(NamedTuple):
    """Between two steps of a generation; see :func:`demask_step`."""

    ids: Tensor
    is_masked: Tensor
    log_probs: Tensor
    row_indices: Tensor


def draw_seed(device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
    """A 64-bit seed, [] int64, drawn on ``device`` and kept there: no synchronisation.

    Args:
        device: where the seed is wanted.
        generator: default torch's own of the device. One of another device is drawn from there.

    Randomness: four integers of the generator, so ``torch.manual_seed`` reproduces all that follows.
    """
    home = torch.device(device) if generator is None else generator.device
    # Four words of 16 bits: not every backend draws 64 bits at once.
    words = torch.randint(2**16, (4,), device=home, generator=generator)
    seed = (words << torch.arange(0, 64, 16, device=home)).sum()
    return moved(seed, device)


def _as_seed(seed: int | Tensor | None, device: torch.device, generator: torch.Generator | None) -> Tensor:
    if seed is None:
        return draw_seed(device, generator)
    if isinstance(seed, Tensor):
        _check.tensor("seed", seed, [torch.int64], ndim=0)
        return moved(seed, device)
    seed = _check.integer("seed", seed, -(2**63), 2**64)
    seed = seed - 2**64 if seed >= 2**63 else seed
    return torch.full((), seed, dtype=torch.int64, device=device)


def mask_sampling(
    tokens: Tensor,
    *,
    mask_id: int,
    num_tokens: int,
    schedule: str | TensorFn | Schedule = "linear",
    mode: str = "exact",
    stratified: bool = False,
    times: Tensor | None = None,
    counts: Tensor | None = None,
    maskable: Tensor | None = None,
    no_replace_prob: float = 0.0,
    random_token_prob: float = 0.0,
    random_may_be_mask: bool = False,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int = 0,
    global_batch_size: int | None = None,
    check: bool = False,
    backend: str = "auto",
) -> MaskedTokens:
    r"""Chooses the masked positions of a batch, and what the network sees there.

    .. math::
        t_b \sim U(0, 1), \quad k_b = \max(1, \lceil \mathrm{schedule}(t_b)\, n_b \rceil), \quad
        w_b = |\mathrm{schedule}'(t_b)| \, n_b / k_b

    Args:
        tokens: [B, N] int32|int64, clean ids.
        mask_id: the id of the mask token. One outside [0, num_tokens) is allowed.
        num_tokens: V, the size of the vocabulary.
        schedule: t to the mask ratio: "linear" (1 - t), "cosine" (cos(pi t / 2)), a callable on a
            float32 tensor that autograd can differentiate, or a :class:`fastmask.Schedule`.
        mode: "exact" masks exactly k_b of the n_b maskable positions, a uniformly random subset;
            "bernoulli" masks each with probability schedule(t_b), and w_b = |schedule'| / schedule.
        stratified: t_b = (u + b / B) mod 1 over the global batch, one u for all.
        times: [B] float32, t_b in place of drawn ones; no gradient reaches them.
        counts: [B] int32|int64, k_b in place of the schedule's ("exact" only); clamped to [0, n_b].
        maskable: [B, N] bool, False where a token is never masked (padding, prompts); None for all.
        no_replace_prob: with probability 1/2 per call, ceil(k_b no_replace_prob) of the masked
            positions keep their token.
        random_token_prob: independently with probability 1/2 per call, ceil(r random_token_prob f) of
            the remaining r get a random token; f is 1 - no_replace_prob if the first coin fell so, else 1.
        random_may_be_mask: whether a random token may be mask_id; uniform over the other ids by default.
        seed, generator: see the module.
        sample_offset: global index of the first row (data parallelism, split batches).
        global_batch_size: B of the whole batch, for ``stratified``; default the rows given.
        check: also refuse tokens outside [0, num_tokens) or equal to mask_id (synchronises).
        backend: see the module.

    Returns:
        MaskedTokens of
        masked_ids: [B, N] as tokens, what the network sees;
        is_masked: [B, N] bool, the positions in the loss, kept and random ones included;
        times: [B] float32;
        counts: [B] int64, how many are masked;
        loss_weights: [B] float32, w_b (0 where nothing is masked);
        row_indices: [B N] int64, the flat indices b N + i of the masked positions in rising order, then -1;
        num_masked: [] int64, how many of row_indices are masked positions.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, tensors on several devices,
        counts with mode "bernoulli", no id left to draw random tokens from, a schedule without
        derivative; under check=True unclean tokens.

    Randomness: streams TIMES or STRATUM, COINS and KEYS of the seed.

    Source: k and the subset, MaskGIT (https://arxiv.org/abs/2202.04200); w, MDLM
    (https://arxiv.org/abs/2406.07524, eq. 10, alpha = 1 - schedule); kept and random tokens, BERT
    (https://arxiv.org/abs/1810.04805).

    Example:
        >>> tokens = torch.arange(8)[None]
        >>> out = mask_sampling(tokens, mask_id=8, num_tokens=9, counts=torch.tensor([3]), seed=0)
        >>> int(out.is_masked.sum()), bool((out.masked_ids[out.is_masked] == 8).all())
        (3, True)
    """
    _check.tensor("tokens", tokens, _check.INTEGER, ndim=2)
    batch, length = tokens.shape
    if length == 0:
        raise ValueError("expected tokens [B, N] with N of at least 1, received N = 0")
    num_tokens = _check.integer("num_tokens", num_tokens, 1, 2**31)
    mask_id = _check.integer("mask_id", mask_id, 0, 2**31)
    _check.option("mode", mode, ["exact", "bernoulli"])
    _check.number("no_replace_prob", no_replace_prob, 0.0, 1.0)
    _check.number("random_token_prob", random_token_prob, 0.0, 1.0)
    _check.integer("sample_offset", sample_offset, 0, 2**32)
    global_batch_size = batch if global_batch_size is None else global_batch_size
    _check.integer("global_batch_size", global_batch_size, min(1, batch))
    if random_token_prob > 0.0 and not random_may_be_mask and num_tokens - (mask_id < num_tokens) < 1:
        raise ValueError(
            f"expected an id besides mask_id {mask_id} to draw random tokens from, received "
            f"num_tokens {num_tokens}; set random_token_prob=0"
        )
    if times is not None:
        _check.tensor("times", times, [torch.float32])
        _check.shape("times", times, [batch], "B")
    if counts is not None:
        if mode == "bernoulli":
            raise ValueError("expected counts with mode='exact', received mode='bernoulli'; leave counts out")
        _check.tensor("counts", counts, _check.INTEGER)
        _check.shape("counts", counts, [batch], "B")
    if maskable is not None:
        _check.tensor("maskable", maskable, [torch.bool])
        _check.shape("maskable", maskable, [batch, length], "B, N")
    _check.same_device(tokens=tokens, times=times, counts=counts, maskable=maskable)
    if check:
        _check.clean_tokens("tokens", tokens, num_tokens, mask_id)

    schedule = as_schedule(schedule)
    seed = _as_seed(seed, tokens.device, generator)
    ratios = slopes = None
    if times is None and schedule.name is None:
        times = draw_times(
            seed,
            batch,
            stratified=stratified,
            sample_offset=sample_offset,
            global_batch_size=global_batch_size,
        )
    if times is not None:
        times = times.detach()  # masks are no function of them that has a derivative
        ratios, slopes = _evaluate(schedule, times)
    run = _dispatch.module("mask_sampling", tokens.device, backend).mask_sampling
    return MaskedTokens(
        *run(
            tokens,
            seed,
            times,
            ratios,
            slopes,
            None if counts is None else counts.long(),
            maskable,
            schedule=schedule.name or "",
            mask_id=mask_id,
            num_tokens=num_tokens,
            bernoulli=mode == "bernoulli",
            stratified=stratified,
            no_replace_prob=float(no_replace_prob),
            random_token_prob=float(random_token_prob),
            random_may_be_mask=random_may_be_mask,
            sample_offset=sample_offset,
            global_batch_size=global_batch_size,
        )
    )


def _evaluate(schedule: Schedule, times: Tensor) -> tuple[Tensor, Tensor]:
    """schedule(t) and its slope, [B] float32 each."""
    ratios, slopes = schedule(times), schedule.slope(times)
    for name, value in (("schedule(t)", ratios), ("the schedule's derivative", slopes)):
        if not isinstance(value, Tensor) or value.shape != times.shape:
            received = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"expected {name} to be a tensor of t's shape {list(times.shape)}, received {received}")
    return ratios.detach().float(), slopes.detach().float()


def _check_loss_rows(
    logits: Tensor,
    targets: Tensor,
    is_masked: Tensor | None,
    weights: Tensor | None,
    reduction: str,
    denominator: Tensor | float | None,
) -> tuple[Tensor | None, Tensor | float | None]:
    """The checks that both losses share, on logits (or embeddings) [..., V]; weights in the targets' shape
    and the denominator without dimensions, both in the loss's dtype."""
    shape, dtype = logits.shape[:-1], torch.promote_types(logits.dtype, torch.float32)
    _check.tensor("targets", targets, _check.INTEGER)
    _check.shape("targets", targets, shape, "...")
    if is_masked is not None:
        _check.tensor("is_masked", is_masked, [torch.bool])
        _check.shape("is_masked", is_masked, shape, "...")
    _check.option("reduction", reduction, ["none", "sum", "mean"])
    if denominator is not None and reduction != "mean":
        raise ValueError(f"expected denominator with reduction='mean', received reduction={reduction!r}")
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"expected denominator to be one number, received shape {list(denominator.shape)}")
        _check_constant("denominator", denominator)
        denominator = moved(denominator.reshape(()), logits.device, dtype)
    elif denominator is not None:
        _check.number("denominator", denominator, 0.0)
    if weights is None:
        return None, denominator
    _check.tensor("weights", weights, [torch.float64, torch.float32])
    _check_constant("weights", weights)
    weights = weights.to(dtype)
    if len(shape) == 2 and weights.shape == shape[:1]:
        weights = weights[:, None].expand(shape)
    if weights.shape != shape:
        raise ValueError(
            f"expected weights of the targets' shape {list(shape)}, or [B] for targets [B, N]; "
            f"received {list(weights.shape)}"
        )
    return weights, denominator


def _check_constant(name: str, value: Tensor) -> None:
    if value.requires_grad:
        raise ValueError(f"expected {name} without gradient, received requires_grad=True; use {name}.detach()")


def _check_targets(
    targets: Tensor, is_masked: Tensor | None, weights: Tensor | None, num_tokens: int, exclude_id: int | None
) -> None:
    """Targets that are read are ids, and not the excluded one. Reads values: synchronises."""
    where = is_masked
    if weights is not None:
        where = weights != 0 if is_masked is None else is_masked & (weights != 0)
    _check.clean_tokens("targets", targets, num_tokens, exclude_id, where)


def _check_row_indices(row_indices: Tensor, num_rows: int) -> None:
    """Rows, each once, then -1. Reads values: synchronises."""
    ends = (row_indices < 0).cumsum(dim=0) > 0
    rows = row_indices[~ends]
    if bool((row_indices[ends] != -1).any()) or bool((rows >= num_rows).any()) or len(rows.unique()) < len(rows):
        raise ValueError(
            f"expected row_indices to be rows below {num_rows}, each once, then -1; received "
            f"{row_indices[:8].tolist()}...; take those of mask_sampling, or is_masked.flatten().nonzero()"
        )


def _check_head(embeddings: Tensor, weight: Tensor, bias: Tensor | None) -> None:
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


def _check_loss_options(
    num_tokens: int, label_smoothing: float, z_loss: float, softcap: float | None, exclude_id: int | None
) -> None:
    _check.number("label_smoothing", label_smoothing, 0.0, 1.0)
    _check.number("z_loss", z_loss, 0.0)
    if softcap is not None:
        _check.number("softcap", softcap, 0.0)
        if softcap == 0.0:
            raise ValueError("expected softcap above 0, received 0; leave it out for logits as they are")
    if exclude_id is not None:
        _check.integer("exclude_id", exclude_id, 0, num_tokens)
        if num_tokens == 1:
            raise ValueError("expected a column besides exclude_id, received logits with V = 1")


def masked_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    is_masked: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    reduction: str = "mean",
    denominator: Tensor | float | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    exclude_id: int | None = None,
    with_correct: bool = False,
    inplace_grad: bool = False,
    check: bool = False,
    backend: str = "auto",
) -> CrossEntropy:
    r"""Cross-entropy at the masked positions, in nats, float32 whatever the logits are.

    .. math::
        \ell_i = w_i \left[(1 - \epsilon)(L_i - z_{i,y_i}) + \epsilon (L_i - \bar z_i) + \lambda L_i^2\right],
        \quad L_i = \log \sum_{v \in A} e^{z_{i,v}}, \quad \bar z_i = \mathrm{mean}_{v \in A} z_{i,v}

    with z the logits, or c tanh(logits / c) under a softcap c.

    With everything left at its default this is ``F.cross_entropy(logits[is_masked].float(),
    targets[is_masked])``, and 0 where nothing is masked.

    Args:
        logits: [..., V] float16|bfloat16|float32|float64, unnormalised.
        targets: [...] int32|int64; never read where unmasked (for labels with -100, is_masked=labels != -100).
        is_masked: [...] bool, the positions in the loss; None for all.
        weights: [...] float32|float64, w of each position, or [B] of each sequence of targets [B, N];
            constant; 0 is as good as unmasked. None for 1.
        reduction: "none", "sum", or "mean": the sum divided by the number of masked positions.
        denominator: what "mean" divides by instead (gradient accumulation, data parallelism; B N with
            MDLM weights). A number or a tensor of one.
        label_smoothing: epsilon in [0, 1], spread over the columns A.
        z_loss: lambda >= 0.
        softcap: c > 0, or None for none.
        exclude_id: a column that leaves A and gets gradient 0 (mask_id, for MDLM's SUBS). A target equal
            to it costs +inf.
        with_correct: also compare the argmax over A (ties to the lower id) with the target.
        inplace_grad: let the gradient take the logits' memory, in forward or backward: the caller reads them
            no more (nor recomputes them from a checkpoint) and runs backward once; what comes from above, if not
            1, then scales the rounded gradient. A permission: where it cannot be had (torch.compile, logits
            that are not contiguous) the gradient gets memory of its own.
        check: also refuse targets outside [0, V) or equal to exclude_id at masked positions (synchronises).
        backend: see the module.

    Returns:
        CrossEntropy of
        loss: [] or, for "none", [...], 0 where unmasked; float32 (float64 for float64 logits), nats;
        nll: [...], L - z_y of each position, unweighted, 0 where unmasked; not differentiable;
        correct: [...] bool, False where unmasked; None unless asked for.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape, reduction or number, weights that require
        grad, a denominator without "mean"; under check=True targets out of range. RuntimeError on
        double backward, and on a second backward with inplace_grad.

    Randomness: none.

    Source: label smoothing, Szegedy et al. (https://arxiv.org/abs/1512.00567, section 7); z-loss, PaLM
    (https://arxiv.org/abs/2204.02311, section 5); softcap, Gemma 2
    (https://arxiv.org/abs/2408.00118, section 2); SUBS, MDLM (https://arxiv.org/abs/2406.07524, section 3.2.3).

    Example:
        >>> logits = torch.zeros(1, 3, 4)
        >>> is_masked = torch.tensor([[True, False, True]])
        >>> masked_cross_entropy(logits, torch.tensor([[0, 1, 2]]), is_masked).loss
        tensor(1.3863)
    """
    _check.tensor("logits", logits, _check.FLOATING)
    if logits.ndim < 2 or logits.shape[-1] == 0:
        raise ValueError(f"expected logits of shape [..., V] with V of at least 1, received {list(logits.shape)}")
    weights, denominator = _check_loss_rows(logits, targets, is_masked, weights, reduction, denominator)
    _check_loss_options(logits.shape[-1], label_smoothing, z_loss, softcap, exclude_id)
    _check.same_device(logits=logits, targets=targets, is_masked=is_masked, weights=weights)
    if check:
        _check_targets(targets, is_masked, weights, logits.shape[-1], exclude_id)
    run = _dispatch.module("masked_cross_entropy", logits.device, backend, logits.dtype).masked_cross_entropy
    return CrossEntropy(
        *run(
            logits,
            targets,
            is_masked,
            weights,
            reduction=reduction,
            denominator=denominator,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            exclude_id=exclude_id,
            with_correct=with_correct,
            inplace_grad=inplace_grad,
        )
    )


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
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    exclude_id: int | None = None,
    with_correct: bool = False,
    check: bool = False,
    backend: str = "auto",
) -> CrossEntropy:
    r"""Head and :func:`masked_cross_entropy` in one, without logits of unmasked positions.

    .. math::
        z_i = W e_i + b

    Equals ``masked_cross_entropy(F.linear(embeddings, weight, bias), ...)``; only masked positions go
    through the head, and only one chunk of their logits exists at a time. Under autocast the products
    are taken in its dtype.

    Args:
        embeddings: [..., D] float16|bfloat16|float32|float64.
        weight: [V, D], the head's weight, of the embeddings' dtype (any under autocast).
        bias: [V] of the weight's dtype, or None.
        row_indices: [K] int64, in place of is_masked: the flat indices of the masked positions, each once,
            then -1; as ``mask_sampling`` returns them. Looked at under check=True only.
        num_masked: how many positions are masked, if the host knows, or a number that they do not exceed:
            then nothing waits for the device to count them. Loss and gradients are NaN where there are more.
            In a CUDA graph's capture, where nothing can wait, every position is computed without it.
        targets, is_masked, weights, reduction, denominator, label_smoothing, z_loss, softcap, exclude_id,
            with_correct, check, backend: as in :func:`masked_cross_entropy`.

    Returns, Raises, Randomness, Source: as :func:`masked_cross_entropy`; gradients reach embeddings
    (0 where unmasked), weight and bias, in their own dtypes, accumulated in float32.

    Example:
        >>> embeddings, weight = torch.ones(1, 3, 2), torch.zeros(4, 2)
        >>> is_masked = torch.tensor([[True, False, True]])
        >>> linear_masked_cross_entropy(embeddings, weight, torch.tensor([[0, 1, 2]]), is_masked).loss
        tensor(1.3863)
    """
    _check_head(embeddings, weight, bias)
    weights, denominator = _check_loss_rows(embeddings, targets, is_masked, weights, reduction, denominator)
    _check_loss_options(len(weight), label_smoothing, z_loss, softcap, exclude_id)
    if row_indices is not None:
        if is_masked is not None:
            raise ValueError("expected is_masked or row_indices, received both; leave one out")
        _check.tensor("row_indices", row_indices, [torch.int64], ndim=1)
    if num_masked is not None:
        num_masked = _check.integer("num_masked", num_masked, 0)
    _check.same_device(
        embeddings=embeddings,
        weight=weight,
        bias=bias,
        targets=targets,
        is_masked=is_masked,
        weights=weights,
        row_indices=row_indices,
    )
    if check:
        listed = is_masked
        if row_indices is not None:
            _check_row_indices(row_indices, targets.numel())
            listed = torch.zeros(targets.numel(), dtype=torch.bool, device=targets.device)
            listed = listed.index_fill_(0, row_indices[row_indices >= 0], True).view(targets.shape)
        _check_targets(targets, listed, weights, len(weight), exclude_id)
    operation = "linear_masked_cross_entropy"
    run = _dispatch.module(operation, embeddings.device, backend, embeddings.dtype).linear_masked_cross_entropy
    return CrossEntropy(
        *run(
            embeddings,
            weight,
            bias,
            targets,
            is_masked,
            weights,
            row_indices=row_indices,
            num_masked=num_masked,
            reduction=reduction,
            denominator=denominator,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            softcap=softcap,
            exclude_id=exclude_id,
            with_correct=with_correct,
        )
    )


def sample_tokens(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    filter_thres: float | None = None,
    top_p: float | None = None,
    mask_id: int | None = None,
    forbidden: Tensor | Sequence[int] | None = None,
    row_indices: Tensor | None = None,
    seq_len: int | None = None,
    kept_ids: Tensor | None = None,
    with_margin: bool = False,
    with_entropy: bool = False,
    out: Sampled | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    step: int = 0,
    sample_offset: int = 0,
    backend: str = "auto",
) -> Sampled:
    r"""Samples ids from logits, exactly, and gives the probability of each.

    .. math::
        \mathrm{id}_i \sim \mathrm{softmax}(z_i / T) \text{ over } A_i, \qquad
        \log p_i = z_{i,\mathrm{id}_i} - \log \sum_{v \in A_i} e^{z_{i,v}}

    A_i are the ids that are neither excluded nor filtered out; no figure but the sample itself is heated.

    Args:
        logits: [B, N, V] float16|bfloat16|float32|float64 (worked on in float32), one row for each
            position; or [M, V], compact rows, with ``row_indices`` and ``seq_len``.
        temperature: T >= 0; 0 takes the argmax, ties to the lower id.
        filter_thres: in [0, 1): keeps the ceil((1 - filter_thres) V) largest logits, and all that tie
            with the last of them (for exactly k: 1 - (k - 0.5) / V). None keeps all.
        top_p: in [0, 1]: of those, keeps the nucleus at temperature 1: the fewest likeliest ids that together have
            at least this share of the probability, at least one, and all that tie with the last. None keeps all.
        mask_id: never sampled. None, or an id outside [0, V), excludes nothing.
        forbidden: [V] bool, True at more ids that are never sampled; or a sequence of those ids, no tensor (copied
            to the device at each call).
        row_indices: [M] int64, flat positions b N + i: those of compact rows, or the only ones of [B, N, V] to be
            sampled. -1 is no row: id -1, figures 0.
        seq_len: N, for compact rows.
        kept_ids: as the ids returned, int64, below V: where >= 0 that id is kept, not sampled, and its probability
            given.
        with_margin: also give how much more likely the likeliest id is than the next.
        with_entropy: also give the entropy.
        out: ids [B, N] int64 and log_probs [B, N] float32, contiguous, to be written in place at the rows'
            positions, and returned; other positions stay as they are.
        seed, generator: see the module.
        step: index of the demasking step, so that one seed serves a whole generation.
        sample_offset: global index of the first sequence.
        backend: see the module.

    Returns:
        Sampled of ids, int64; log_probs, float32, nats; margins, float32, in [0, 1], and entropies, float32, nats,
        or None; [B, N] or [M] each. A row with NaN, +inf or no finite logit gives the lowest allowed id and NaN; a
        kept id that is filtered out gives -inf.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number.

    Randomness: streams TILE_RACE, SUB_TILE_RACE and ELEMENT_RACE of the seed at ``step``.

    Source: the exponential race, equal in law to Gumbel-max (Maddison et al.,
    https://arxiv.org/abs/1411.0030), in three levels of 4096, 64 and 1 ids. The nucleus: Holtzman et al.,
    https://arxiv.org/abs/1904.09751, eq. 2.

    Example:
        >>> logits = torch.tensor([[[0.0, 5.0, 1.0]]])
        >>> sample_tokens(logits, temperature=0.0).ids
        tensor([[1]])
    """
    _check.tensor("logits", logits, _check.FLOATING)
    rows, shape = _demask_rows("logits", logits, row_indices, seq_len, seed, generator, step, sample_offset)
    sampling = _sampling(
        logits.shape[-1],
        temperature,
        filter_thres,
        top_p,
        mask_id,
        forbidden,
        with_margin,
        with_entropy,
        logits.device,
    )
    kept_ids = _check_canvas("logits", logits, rows, shape, kept_ids, out, sampling)
    run = _dispatch.module("demask", logits.device, backend).sample_tokens
    return _shaped(run(logits.flatten(0, -2), rows, kept_ids, sampling, out), shape, out)


def linear_sample_tokens(
    embeddings: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    filter_thres: float | None = None,
    top_p: float | None = None,
    mask_id: int | None = None,
    forbidden: Tensor | Sequence[int] | None = None,
    row_indices: Tensor | None = None,
    seq_len: int | None = None,
    kept_ids: Tensor | None = None,
    with_margin: bool = False,
    with_entropy: bool = False,
    out: Sampled | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    step: int = 0,
    sample_offset: int = 0,
    backend: str = "auto",
) -> Sampled:
    r"""Head and :func:`sample_tokens` in one: logits exist for one chunk of the rows at a time.

    .. math::
        z_i = W e_i + b

    Args:
        embeddings: [B, N, D], of which ``row_indices`` may say which rows are wanted; or [M, D] with
            ``row_indices`` and ``seq_len``.
        weight: [V, D], the head's weight; bias: [V] or None; of the embeddings' dtype unless autocast.
        temperature, filter_thres, top_p, mask_id, forbidden, row_indices, seq_len, kept_ids, with_margin,
            with_entropy, out, seed, generator, step, sample_offset, backend: as in :func:`sample_tokens`.

    Returns, Raises, Randomness, Source: as :func:`sample_tokens`.

    Example:
        >>> embeddings, weight = torch.ones(1, 1, 2), torch.tensor([[0.0, 0.0], [2.0, 1.0], [1.0, 0.0]])
        >>> linear_sample_tokens(embeddings, weight, temperature=0.0).ids
        tensor([[1]])
    """
    _check_head(embeddings, weight, bias)
    rows, shape = _demask_rows("embeddings", embeddings, row_indices, seq_len, seed, generator, step, sample_offset)
    sampling = _sampling(
        len(weight), temperature, filter_thres, top_p, mask_id, forbidden, with_margin, with_entropy, weight.device
    )
    kept_ids = _check_canvas("embeddings", embeddings, rows, shape, kept_ids, out, sampling)
    run = _dispatch.module("demask", embeddings.device, backend).linear_sample_tokens
    sampled = run(embeddings.flatten(0, -2), weight, bias, rows, kept_ids, sampling, out)
    return _shaped(sampled, shape, out)


def _demask_rows(
    name: str,
    rows: Tensor,
    row_indices: Tensor | None,
    seq_len: int | None,
    seed: int | Tensor | None,
    generator: torch.Generator | None,
    step: int,
    sample_offset: int,
) -> tuple[Rows, torch.Size]:
    """Which rows are sampled, and the shape of what is returned."""
    shape = rows.shape[:-1]
    if row_indices is not None:
        _check.tensor("row_indices", row_indices, [torch.int64], ndim=1)
        shape = row_indices.shape
    if row_indices is None or rows.ndim == 3:
        if rows.ndim != 3 or (seq_len is not None and seq_len != rows.shape[1]):
            raise ValueError(
                f"expected {name} [B, N, ...], received shape {list(rows.shape)}"
                + (f" and seq_len={seq_len}" if rows.ndim == 3 else "; compact rows need row_indices= and seq_len=")
            )
        seq_len = rows.shape[1]
    elif rows.ndim != 2 or row_indices.shape != rows.shape[:1] or seq_len is None:
        raise ValueError(
            f"expected compact {name} [M, ...] with row_indices [M] and seq_len, received "
            f"{list(rows.shape)}, {list(row_indices.shape)} and seq_len={seq_len}"
        )
    is_compact = row_indices is None or rows.ndim == 2
    if row_indices is None:  # every row is listed
        row_indices = torch.arange(rows.shape[0] * rows.shape[1], device=rows.device)
    _check.same_device(**{name: rows, "row_indices": row_indices})
    _check.integer("seq_len", seq_len, 0)
    _check.integer("step", step, 0, 2**24)
    _check.integer("sample_offset", sample_offset, 0, 2**32)
    seed = _as_seed(seed, rows.device, generator)
    return Rows(row_indices, max(1, seq_len), is_compact, seed, sample_offset, step), shape


def _sampling(
    num_tokens: int,
    temperature: float,
    filter_thres: float | None,
    top_p: float | None,
    mask_id: int | None,
    forbidden: Tensor | Sequence[int] | None,
    with_margin: bool,
    with_entropy: bool,
    device: torch.device,
) -> Sampling:
    """The checks of a sampler's options."""
    if num_tokens == 0:
        raise ValueError("expected a vocabulary of at least 1 id, received 0")
    if mask_id is not None:
        mask_id = _check.integer("mask_id", mask_id, -(2**63), 2**63)
    _check.number("temperature", temperature, 0.0)
    if filter_thres is not None:
        _check.number("filter_thres", filter_thres, 0.0, 1.0, below_high=True)
    if top_p is not None:
        _check.number("top_p", top_p, 0.0, 1.0)
        top_p = None if top_p == 1.0 else top_p
    forbidden = as_forbidden(forbidden, num_tokens, device)
    return Sampling(temperature, filter_thres, top_p, mask_id, forbidden, with_margin, with_entropy)


def as_forbidden(
    forbidden: Tensor | Sequence[int] | None, num_tokens: int, device: torch.device | str
) -> Tensor | None:
    """Forbidden ids as the samplers take them without copying: [num_tokens] bool on the device.

    Raises:
        TypeError, ValueError: neither such a tensor nor ids in [0, num_tokens).
    """
    if forbidden is None or isinstance(forbidden, Tensor):
        if forbidden is not None:
            if forbidden.dtype != torch.bool:
                raise TypeError(
                    "expected forbidden as [V] bool or as a sequence of ids, received a tensor of "
                    f"{forbidden.dtype}; give ids as forbidden.tolist()"
                )
            _check.shape("forbidden", forbidden, [num_tokens], "V")
            if forbidden.device != torch.empty(0, device=device).device:
                raise ValueError(
                    f"expected forbidden on {device}, received {forbidden.device}; move it with .to(device)"
                )
        return forbidden
    is_forbidden = torch.zeros(num_tokens, dtype=torch.bool, device="cpu")
    for id in forbidden:
        is_forbidden[_check.integer("forbidden ids", id, 0, num_tokens)] = True
    return moved(is_forbidden, device)


def _check_canvas(
    name: str,
    source: Tensor,
    rows: Rows,
    shape: torch.Size,
    kept_ids: Tensor | None,
    out: Sampled | None,
    sampling: Sampling,
) -> Tensor | None:
    """The checks of what a sampler keeps and of what it writes; the kept ids, flat."""
    if kept_ids is not None:
        _check.tensor("kept_ids", kept_ids, [torch.int64])
        _check.shape("kept_ids", kept_ids, shape, "as the rows")
        _check.same_device(**{name: source, "kept_ids": kept_ids})
        kept_ids = kept_ids.flatten()
    if out is not None:
        if sampling.with_margin or sampling.with_entropy:
            raise ValueError("expected out= without with_margin=True and with_entropy=True; leave one out")
        _check.tensor("out.ids", out.ids, [torch.int64], ndim=2)
        _check.tensor("out.log_probs", out.log_probs, [torch.float32])
        _check.shape("out.log_probs", out.log_probs, out.ids.shape, "B, N")
        if source.ndim == 3:
            _check.shape("out.ids", out.ids, source.shape[:2], "B, N")
        if max(1, out.ids.shape[1]) != rows.seq_len or not (
            out.ids.is_contiguous() and out.log_probs.is_contiguous()
        ):
            raise ValueError(
                f"expected out.ids and out.log_probs [B, {rows.seq_len}] and contiguous, received "
                f"{list(out.ids.shape)}, strides {list(out.ids.stride())} and {list(out.log_probs.stride())}"
            )
        _check.same_device(**{name: source, "out.ids": out.ids, "out.log_probs": out.log_probs})
    return kept_ids


def _shaped(values: Sequence[Tensor | None], shape: torch.Size, out: Sampled | None) -> Sampled:
    return out or Sampled(*(None if value is None else value.view(shape) for value in values))  # type: ignore[arg-type]


def confidence_scores(
    log_probs: Tensor,
    *,
    choice_temperature: float = 0.0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    step: int = 0,
    sample_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    r"""How little confidence each token deserves: the higher, the sooner it is masked again.

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
        >>> confidence_scores(torch.tensor([[0.5, 0.25]]).log())
        tensor([[0.6931, 1.3863]])
    """
    _check.tensor("log_probs", log_probs, [torch.float32], ndim=2)
    _check.number("choice_temperature", choice_temperature, 0.0)
    if choice_temperature == 0.0:
        return -log_probs
    seed = _as_seed(seed, log_probs.device, generator)
    return -(log_probs + choice_temperature * _score_noise(log_probs, seed, step, sample_offset, backend))


def critic_scores(
    critic_logits: Tensor,
    *,
    noise_scale: float = 0.0,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    step: int = 0,
    sample_offset: int = 0,
    backend: str = "auto",
) -> Tensor:
    r"""A token critic's scores with annealed noise: the higher, the sooner a token is masked again.

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
        >>> critic_scores(torch.tensor([[0.5, -0.5]]))
        tensor([[ 0.5000, -0.5000]])
    """
    _check.tensor("critic_logits", critic_logits, _check.FLOATING, ndim=2)
    _check.number("noise_scale", noise_scale, 0.0)
    scores = critic_logits.float()
    if noise_scale == 0.0:
        return scores
    seed = _as_seed(seed, critic_logits.device, generator)
    return scores + noise_scale * _score_noise(scores, seed, step, sample_offset, backend)


def _score_noise(scores: Tensor, seed: Tensor, step: int, sample_offset: int, backend: str) -> Tensor:
    _check.integer("step", step, 0, 2**24)
    _check.integer("sample_offset", sample_offset, 0, 2**32)
    run = _dispatch.module("demask", scores.device, backend).score_noise
    noise: Tensor = run(seed, scores.shape, sample_offset, step)
    return noise


def select_to_remask(
    scores: Tensor,
    eligible: Tensor,
    counts: Tensor | int,
    *,
    min_score: float | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""The ``counts`` eligible positions of highest score in each sequence: those masked again.

    Args:
        scores: [B, N] floating point.
        eligible: [B, N] bool, the positions that may be masked again.
        counts: [B] int32|int64, how many, or one number for all; clamped to how many are eligible.
        min_score: positions of a lower score are not eligible (NaN is).
        backend: see the module.

    Returns:
        [B, N] bool. The order is total: NaN first, then falling score (-0.0 equals 0.0), ties by rising
        position.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape, tensors on several devices.

    Randomness: none.

    Source: MaskGIT (https://arxiv.org/abs/2202.04200), section 3.2, step 4.

    Example:
        >>> eligible = torch.tensor([[True, True, False, True]])
        >>> select_to_remask(torch.tensor([[0.1, 0.7, 0.9, 0.7]]), eligible, 1)
        tensor([[False,  True, False, False]])
    """
    _check.tensor("scores", scores, _check.FLOATING, ndim=2)
    _check.tensor("eligible", eligible, [torch.bool])
    _check.shape("eligible", eligible, scores.shape, "B, N")
    counts = _as_counts(counts, scores)
    _check_score(min_score)
    _check.same_device(scores=scores, eligible=eligible, counts=counts)
    run = _dispatch.module("demask", scores.device, _of_length(backend, scores), scores.dtype).select_to_remask
    chosen: Tensor = run(scores, eligible, counts, min_score)
    return chosen


def _as_counts(counts: Tensor | int, scores: Tensor) -> Tensor:
    if not isinstance(counts, Tensor):
        counts = _check.integer("counts", counts, 0)
        return torch.full(scores.shape[:1], counts, device=scores.device)
    _check.tensor("counts", counts, _check.INTEGER)
    _check.shape("counts", counts, scores.shape[:1], "B")
    return counts


def _check_score(min_score: float | None) -> None:
    if min_score is not None and math.isnan(min_score):
        raise ValueError("expected min_score to be a number, received nan")


def _of_length(backend: str, scores: Tensor) -> str:
    """The kernel's keys hold 16 bits of position."""
    return "reference" if backend == "auto" and scores.shape[1] > 2**16 else backend


def remask_(
    ids: Tensor,
    is_masked: Tensor,
    row_indices: Tensor,
    row_starts: Tensor,
    values: Tensor,
    counts: Tensor | int,
    *,
    mask_id: int,
    is_confidence: bool = True,
    noise_scale: float = 0.0,
    min_score: float | None = None,
    eligible: Tensor | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    step: int = 0,
    sample_offset: int = 0,
    backend: str = "auto",
) -> None:
    r"""Scores, :func:`select_to_remask`, and what follows from it, in place and in one launch.

    .. math::
        s = \pm(\mathrm{value} + c\, G), \quad G \sim \mathrm{Gumbel}(0, 1)

    Args:
        ids: [B, N] int64, every position filled; mask_id is written where a position is masked again.
        is_masked: [B, N] bool, before and after.
        row_indices: [R] int64, where the flat positions b N + i of what is masked are listed: those of sequence b
            from row_starts[b] on, below row_starts[b + 1], then -1. What does not fit is left out.
        row_starts: [B + 1] int64, rising, from 0 to R.
        values: [B, N] floating point, log_probs or a critic's logits.
        counts: as in :func:`select_to_remask`.
        mask_id: the id of the mask token.
        is_confidence: whether a high value keeps a token (the sign above is -), as a critic's does not (+).
        noise_scale: c >= 0.
        min_score: as in :func:`select_to_remask`.
        eligible: [B, N] bool, the positions that may be masked again; by default those that were masked.
        seed, generator, step, sample_offset, backend: as in :func:`sample_tokens`.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, tensors on several devices or, of those that
        are written, not contiguous.

    Randomness: stream SCORE_NOISE of the seed at ``step``, where c > 0.

    Source: as :func:`confidence_scores`, :func:`critic_scores` and :func:`select_to_remask`.

    Example:
        >>> ids, is_masked = torch.tensor([[5, 6, 7]]), torch.tensor([[True, True, False]])
        >>> rows, starts = torch.empty(2, dtype=torch.int64), torch.tensor([0, 2])
        >>> remask_(ids, is_masked, rows, starts, torch.tensor([[-0.1, -2.0, 0.0]]), 1, mask_id=9)
        >>> ids, rows
        (tensor([[5, 9, 7]]), tensor([ 1, -1]))
    """
    _check.tensor("values", values, _check.FLOATING, ndim=2)
    written = {"ids": ids, "is_masked": is_masked, "row_indices": row_indices}
    dtypes = {"ids": torch.int64, "is_masked": torch.bool, "row_indices": torch.int64}
    for name, tensor in written.items():
        _check.tensor(name, tensor, [dtypes[name]])
        if not tensor.is_contiguous():
            raise ValueError(f"expected {name} to be contiguous, received strides {list(tensor.stride())}")
    _check.tensor("row_starts", row_starts, [torch.int64])
    _check.shape("ids", ids, values.shape, "B, N")
    _check.shape("is_masked", is_masked, values.shape, "B, N")
    _check.shape("row_starts", row_starts, [len(values) + 1], "B + 1")
    if eligible is not None:
        _check.tensor("eligible", eligible, [torch.bool])
        _check.shape("eligible", eligible, values.shape, "B, N")
    counts = _as_counts(counts, values)
    _check_score(min_score)
    mask_id = _check.integer("mask_id", mask_id, -(2**63), 2**63)
    _check.number("noise_scale", noise_scale, 0.0)
    _check.integer("step", step, 0, 2**24)
    _check.integer("sample_offset", sample_offset, 0, 2**32)
    _check.same_device(**written, row_starts=row_starts, values=values, counts=counts, eligible=eligible)
    run = _dispatch.module("demask", values.device, _of_length(backend, values), values.dtype).remask_
    run(
        ids,
        is_masked,
        row_indices,
        row_starts.contiguous(),
        values,
        eligible,
        counts,
        _as_seed(seed, values.device, generator) if noise_scale else counts.new_zeros((), dtype=torch.int64),
        Remasking(is_confidence, float(noise_scale), min_score, mask_id, sample_offset, step),
    )


def demask_step(
    logits: Tensor,
    ids: Tensor,
    is_masked: Tensor,
    counts: Tensor | int | None = None,
    *,
    mask_id: int,
    temperature: float = 1.0,
    filter_thres: float | None = None,
    top_p: float | None = None,
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
        logits: [B, N, V] floating point; or [M, V], compact rows of the positions ``row_indices``.
        ids: [B, N] int64, the tokens that the network saw.
        is_masked: [B, N] bool, which of them are masked.
        counts: [B] int32|int64, how many of each sequence stay masked at most, or one number for all; None for as
            many as the threshold leaves.
        mask_id: the id of the mask token, never sampled.
        temperature, filter_thres, top_p, forbidden: as in :func:`sample_tokens`.
        choice_temperature: as in :func:`confidence_scores`.
        threshold: in [0, 1]: a token whose probability is above it is committed whatever ``counts`` say, and at least
            one of each sequence is. With choice_temperature log p + c G is held to log(threshold).
        row_indices: [M] int64, the flat positions b N + i of what is masked, -1 for none: the step before lists
            them. By default every position is looked at.
        max_masked: a number that no sequence's masked positions exceed after this step, if the host knows one: how
            many places each has in the list returned.
        seed, generator: see the module; one seed serves a whole generation.
        step: index of the step.
        sample_offset: global index of the first sequence.
        backend: see the module.

    Returns:
        Demasked of ids [B, N] int64, mask_id where masked; is_masked [B, N] bool; log_probs [B, N] float32, nats, of
        the id proposed at each position that was masked, else 0; row_indices [B max_masked] int64, the flat
        positions of what is masked now, sequence after sequence, each followed by -1. Nothing waits for the device.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number, neither counts nor threshold.

    Randomness: as :func:`sample_tokens` and, with choice_temperature, :func:`confidence_scores`.

    Source: MaskGIT (https://arxiv.org/abs/2202.04200), section 3.2; the threshold: Fast-dLLM
    (https://arxiv.org/abs/2505.22618), section 3.3.

    Example:
        A whole MaskGIT loop, with any ``net(ids) -> logits``:

        >>> net, mask_id, steps = torch.nn.Embedding(10, 10), 9, 8
        >>> ids = torch.full((2, 16), mask_id)
        >>> is_masked, seed = ids == mask_id, draw_seed(ids.device)
        >>> for step in range(steps):
        ...     left = (steps - 1 - step) / steps
        ...     ids, is_masked, *_ = demask_step(
        ...         net(ids), ids, is_masked, int(16 * math.sin(math.pi / 2 * left)), mask_id=mask_id,
        ...         temperature=left, choice_temperature=4.5 * left, seed=seed, step=step,
        ...     )
        >>> bool(is_masked.any() | (ids == mask_id).any())
        False
    """
    _check.tensor("ids", ids, [torch.int64], ndim=2)
    _check.tensor("is_masked", is_masked, [torch.bool])
    _check.shape("is_masked", is_masked, ids.shape, "B, N")
    _check.same_device(logits=logits, ids=ids, is_masked=is_masked)
    if threshold is not None:
        _check.number("threshold", threshold, 0.0, 1.0)
    elif counts is None:
        raise ValueError("expected counts or threshold, received neither; say how many positions stay masked")
    _check.number("choice_temperature", choice_temperature, 0.0)
    (batch, length), device = ids.shape, ids.device
    max_masked = length if max_masked is None else _check.integer("max_masked", max_masked, 0, length + 1)
    seed = _as_seed(seed, device, generator)
    if row_indices is None:
        if logits.ndim == 3:
            _check.shape("logits", logits, [batch, length, logits.shape[-1]], "B, N, V")
        row_indices = torch.arange(ids.numel(), device=device).where(is_masked.flatten(), -1)
    counters: dict[str, Any] = {"seed": seed, "step": step, "sample_offset": sample_offset, "backend": backend}
    new = Demasked(
        ids.clone(memory_format=torch.contiguous_format),
        is_masked.clone(memory_format=torch.contiguous_format),
        torch.zeros(ids.shape, device=device),
        row_indices.new_empty(batch * max_masked),
    )
    sample_tokens(
        logits,
        temperature=temperature,
        filter_thres=filter_thres,
        top_p=top_p,
        mask_id=mask_id,
        forbidden=forbidden,
        row_indices=row_indices,
        seq_len=length,
        out=Sampled(new.ids, new.log_probs),
        **counters,
    )
    counts = is_masked.sum(dim=-1) if counts is None else _as_counts(counts, ids)
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
        min_score=None if threshold is None else confidence_floor(threshold),
        **counters,
    )
    return new


def counts_that_commit(counts: Tensor, is_masked: Tensor) -> Tensor:
    """counts [B], or less: at least one of what is masked [B, N] does not stay so."""
    return counts.minimum(is_masked.sum(dim=-1) - 1)


def confidence_floor(threshold: float) -> float:
    """The score of :func:`confidence_scores` from which on a token is not confident enough: -log(threshold)."""
    return -math.log(threshold) if threshold > 0.0 else math.inf
