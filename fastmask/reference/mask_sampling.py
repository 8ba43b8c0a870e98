"""Choosing masks: what each sequence shows the network, and what it is weighted with.

The mask ratio is ``schedule(t)`` with t ~ U(0, 1) for each sequence. Sources: MaskGIT
(https://arxiv.org/abs/2202.04200) for exact counts, MDLM (https://arxiv.org/abs/2406.07524, eq. 10) for
the weight and for Bernoulli masks, BERT (https://arxiv.org/abs/1810.04805) for kept and random tokens.

One random key a position decides everything: the k smallest keys are the masked set, and since the
rank inside that set is itself a uniform permutation, ranks [0, a) keep their token, [a, a + b) get
a random one and [a + b, k) get the mask. The complement is the ranks from k on, by the same rule.
A rank is below r where the key is below the r-th of the sorted keys.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmask import _streams as streams
from fastmask._devices import is_readable
from fastmask.records import Draws, MaskedTokens, Masking, RandomIds, ScheduleValues
from fastmask.reference import philox

try:
    import numpy as np
except ImportError:  # torch runs without it
    np = None  # type: ignore[assignment]

_BEYOND = torch.iinfo(torch.int64).max


def draw_times(draws: Draws, batch: int, masking: Masking) -> Tensor:
    """t of each sequence, [B] float32 in [0, 1).

    Stratified: t_b = u + b / B mod 1 over the global batch, one u for all (the antithetic sampler of
    "Variational Diffusion Models", https://arxiv.org/abs/2107.00630, appendix I): one time in each of B
    strata, and each t_b on its own is uniform, so that the estimate for any one row is unbiased.
    """
    samples = torch.arange(batch, device=draws.seed.device) + draws.sample_offset
    if not masking.stratified:
        return philox.uniform(philox.draw(draws.seed, streams.TIMES, sample=samples)[0])
    offset = philox.uniform(philox.draw(draws.seed, streams.STRATUM)[0])
    # Divided by a tensor: CUDA multiplies by the reciprocal of a number, which rounds differently.
    stratum = (samples % masking.global_batch_size).float()
    return (offset + stratum / torch.full_like(stratum, masking.global_batch_size)) % 1.0


def _evaluate(schedule: str | None, times: Tensor) -> tuple[Tensor, Tensor]:
    """schedule(t) and its derivative for a schedule that the kernel evaluates itself."""
    if schedule == "linear":
        return 1.0 - times, torch.full_like(times, -1.0)
    return _quarter_sine(1.0 - times), -math.pi / 2 * _quarter_sine(times)


def _quarter_sine(x: Tensor) -> Tensor:
    """sin(pi x / 2) for x in [0, 1]: its Taylor series, the kernel's own, so that both round alike.

    Libraries' cosines differ in the last bit. Remainder 7e-10, below float32's rounding.
    """
    square = x * x
    total = torch.zeros_like(x)
    for power in range(13, 0, -2):
        sign = -1 if power % 4 == 3 else 1
        total = total * square + sign * (math.pi / 2) ** power / math.factorial(power)
    return total * x


def mask_sampling(
    tokens: Tensor,
    draws: Draws,
    masking: Masking,
    values: ScheduleValues,
    counts: Tensor | None,
    maskable: Tensor | None,
    random_ids: RandomIds,
) -> MaskedTokens:
    """The specification of ``kernels/mask_sampling.py``.

    Args:
        tokens: [B, N] int32|int64.
        values: the times, and the schedule at them; by default drawn, and evaluated, here.
        counts: [B] int64, the exact count of masked positions in place of the schedule's, or None.
        maskable: [B, N] bool, or None for all.
        random_ids: what random tokens are drawn from, or nothing for every id (but the mask's).
    """
    times, ratios, slopes = values
    if times is None or ratios is None or slopes is None:
        times = draw_times(draws, len(tokens), masking)
        ratios, slopes = _evaluate(masking.schedule, times)
    batch, length = tokens.shape
    position = torch.arange(length, device=tokens.device)
    sample = torch.arange(batch, device=tokens.device) + draws.sample_offset
    words = philox.draw(draws.seed, streams.KEYS, sample=sample[:, None], position=position)
    key_word, id_high, id_low, bernoulli_word = words
    key = (key_word << 31) | position  # ties broken by position

    candidate = torch.ones_like(tokens, dtype=torch.bool) if maskable is None else maskable
    num_candidates = candidate.sum(dim=-1)
    first = ordered = None  # where the complement's ranks begin; the keys in order, where they are known
    if masking.bernoulli:
        # Compared as 32-bit integers: ratio 1 masks everything, ratio 0 nothing.
        threshold = (ratios.clamp(0.0, 1.0) * 2.0**32).long()
        is_below = bernoulli_word < threshold[:, None]
        is_masked = candidate & (~is_below if masking.complement else is_below)
        counts = is_masked.sum(dim=-1)
        ratios = 1.0 - ratios if masking.complement else ratios
    else:
        if counts is None:
            counts = exact_counts(ratios, num_candidates)
        counts = counts.clamp(min=0).minimum(num_candidates)
        ordered = _sorted(key, candidate)
        is_masked = candidate & _are_first(key, ordered, counts)
        if masking.complement:
            first, counts = counts, num_candidates - counts
            is_masked = candidate & ~is_masked

    if masking.no_replace_prob == 0.0 and masking.random_token_prob == 0.0:
        masked_ids = tokens.masked_fill(is_masked, masking.mask_id)
    else:
        if masking.gates_tokens:  # by the word that decided nothing yet
            kept, random = ((key_word if masking.bernoulli else bernoulli_word) < end for end in masking.gate_ends)
        else:
            ordered = _sorted(key, is_masked) if ordered is None else ordered
            ends = _ends_of_parts(counts, draws.seed, masking)
            kept, random = (_are_first(key, ordered, end if first is None else first + end) for end in ends)
        ids = _draw_ids((id_high, id_low), masking, random_ids).to(tokens.dtype)
        visible = torch.where(kept, tokens, torch.where(random, ids, masking.mask_id))
        masked_ids = torch.where(is_masked, visible, tokens)
    return MaskedTokens(
        masked_ids,
        is_masked,
        times,
        counts,
        loss_weights(slopes, ratios, counts, num_candidates, bernoulli=masking.bernoulli),
        _listed(is_masked.flatten()),
        counts.sum(),
    )


def _listed(is_masked: Tensor) -> Tensor:
    """The masked positions of [R], in order, then -1: [R] int64."""
    if np is not None and is_readable(is_masked):  # four times as fast as PyTorch's
        row_indices = np.full(is_masked.shape, -1, np.int64)
        positions = np.flatnonzero(is_masked.numpy())
        row_indices[: positions.size] = positions
        return torch.from_numpy(row_indices)
    return torch.nonzero_static(is_masked, size=is_masked.numel()).squeeze(-1)


def exact_counts(ratios: Tensor, num_candidates: Tensor) -> Tensor:
    """k = max(1, ceil(float32(schedule(t) * n))), and 0 where nothing can be masked."""
    return (ratios * num_candidates).ceil().long().clamp(min=1).minimum(num_candidates)


def loss_weights(
    slopes: Tensor, ratios: Tensor, counts: Tensor, num_candidates: Tensor, *, bernoulli: bool
) -> Tensor:
    """w = |schedule'(t)| / ratio, [B] float32 (MDLM eq. 10); 0 where nothing is masked.

    The ratio is the realised k / n for exact counts and schedule(t) for Bernoulli masks; each makes
    sum_b w_b sum_{i masked} CE_{b,i} / sum_b n_b an unbiased estimate of the any-order NLL.
    """
    if bernoulli:
        weights = slopes.abs() / ratios
    else:
        weights = slopes.abs() * num_candidates / counts
    return weights.where(counts > 0, 0.0)


def gate_counts(
    counts: Tensor, keep_coin: Tensor, random_coin: Tensor, no_replace_prob: float, random_token_prob: float
) -> tuple[Tensor, Tensor]:
    """How many masked positions keep their token, and how many get a random one: [B] int64 each.

    a = ceil(float32(k p_keep)); b = ceil(float32(r (p_random f))) of the r = k - a that are remaining, with
    f = 1 - p_keep, p_random f a double rounded to float32. Where a coin is False its count is 0, and f is
    1 where the first is.
    """
    kept = (counts.float() * no_replace_prob).ceil().long().minimum(counts).where(keep_coin, 0)
    remaining = counts - kept
    after_keep = remaining.float() * (random_token_prob * (1.0 - no_replace_prob))
    random = torch.where(keep_coin, after_keep, remaining.float() * random_token_prob).ceil().long()
    return kept, random.minimum(remaining).where(random_coin, 0)


def _sorted(key: Tensor, candidate: Tensor) -> Tensor:
    """The keys of each row's candidates in order [B, N + 1], and behind them what no key reaches."""
    keys = key.new_full((key.shape[0], key.shape[1] + 1), _BEYOND)
    keys[:, :-1] = key.where(candidate, _BEYOND)
    if np is not None and is_readable(keys):  # six times as fast as PyTorch's
        keys.numpy().sort(axis=-1)
        return keys
    return keys.sort(dim=-1).values


def _are_first(key: Tensor, ordered: Tensor, counts: Tensor) -> Tensor:
    """Which candidates' keys [B, N] are among the first counts [B] of their row's, in order."""
    return key < ordered.gather(-1, counts[:, None])


def _ends_of_parts(counts: Tensor, seed: Tensor, masking: Masking) -> tuple[Tensor, Tensor]:
    """The ranks [B] where those of the masked set end that keep their token, and those that get a random one."""
    keep_word, random_word, _, _ = philox.draw(seed, streams.COINS)
    coins = keep_word < 2**31, random_word < 2**31
    kept, random = gate_counts(counts, *coins, masking.no_replace_prob, masking.random_token_prob)
    return kept, kept + random


def _draw_ids(words: tuple[Tensor, Tensor], masking: Masking, random_ids: RandomIds) -> Tensor:
    """A random id of each position, int64, from two words: uniform over what may be drawn."""
    if random_ids.ids is not None and random_ids.num_ids is not None:
        return random_ids.ids[philox.below(random_ids.num_ids, *words)]
    skips_mask = not masking.random_may_be_mask and masking.mask_id < masking.num_tokens
    ids = philox.below(masking.num_tokens - skips_mask, *words)
    return ids.add_(ids >= masking.mask_id) if skips_mask else ids
