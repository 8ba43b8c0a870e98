"""Random calls of ``mask_sampling``: times, counts, weights of the loss, and what the network sees."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import float64_oracles as oracle
import numpy as np
import torch
from fuzz_cases import Case, exactly, run_twice
from torch import Tensor

from fastmask import functional

SCHEDULES: dict[str, tuple[Any, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "linear": ("linear", lambda t: 1 - t, lambda t: torch.full_like(t, -1.0)),
    "cosine": (
        "cosine",
        lambda t: torch.cos(t.double() * math.pi / 2),
        lambda t: -math.pi / 2 * torch.sin(t.double() * math.pi / 2),
    ),
    "square": (lambda t: 1 - t**2, lambda t: 1 - t**2, lambda t: -2 * t),
    "constant": (0.15, lambda t: torch.full_like(t, 0.15), lambda t: torch.zeros_like(t)),
}  # fmt: skip


def possible_counts(name: str, ratio: float, num_maskable: int) -> set[int]:
    """k; the cosine's last bit is the library's own, so there both neighbours where it decides."""
    slacks = (-(2.0**-22), 0.0, 2.0**-22) if name == "cosine" else (0.0,)
    return {oracle.exact_count(np.float32(ratio + slack), num_maskable) for slack in slacks}


def mask_sampling(case: Case) -> None:
    batch, length = case.pick(1, 2, 4, 0) if case.chance(0.2) else case.pick(1, 2, 4), case.pick(1, 2, 7, 20, 64)
    vocabulary = case.pick(2, 3, 12, 100)
    mask_id = case.pick(vocabulary - 1, 0, vocabulary + 5)
    clean = np.setdiff1d(np.arange(vocabulary), [mask_id])
    tokens = case.laid_out(clean[case.ids(len(clean), batch, length)], case.pick(torch.int64, torch.int32))
    name = case.pick(*SCHEDULES)
    schedule, ratio_of, slope_of = SCHEDULES[name]
    options: dict[str, Any] = {"schedule": schedule, "mode": case.pick("exact", "exact", "bernoulli")}
    is_bernoulli = options["mode"] == "bernoulli"
    given_times = given_counts = maskable = excludes = None
    options["stratified"] = case.chance(0.3)
    if case.chance(0.3):
        given_times = case.numbers.random(batch).astype(np.float32)
        given_times[case.flags(0.2, batch)] = case.pick(0.0, 1.0, 0.5)
        options["times"] = torch.from_numpy(given_times)
    if case.chance(0.3) and not is_bernoulli:
        given_counts = case.numbers.integers(-1, length + 3, batch)
        options["counts"] = torch.from_numpy(given_counts).to(case.pick(torch.int32, torch.int64))
    if case.chance(0.4):
        maskable = case.flags(case.pick(0.0, 0.5, 0.9), batch, length)
        options["maskable"] = case.laid_out(maskable, torch.bool)
    keep, rand = case.pick((0.0, 0.0), (0.15, 0.1), (0.1, 0.1), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5), (0.3, 0.0))
    options["no_replace_prob"], options["random_token_prob"] = keep, rand
    gate = "batch"
    if case.chance(0.3):
        gate = options["gate"] = case.pick("batch", "token")
    may_be_mask = options["random_may_be_mask"] = case.chance(0.2)
    if case.chance(0.3):
        excludes = case.flags(0.3, vocabulary)
        excludes[clean[0]] = False
        as_list = case.chance(0.5)
        options["random_excludes"] = np.flatnonzero(excludes).tolist() if as_list else torch.from_numpy(excludes)
    draws = {"seed": case.seed(), "sample_offset": case.pick(0, 0, 3), "backend": case.backend}
    if case.chance(0.3):
        options["global_batch_size"] = max(1, batch + draws["sample_offset"] + case.pick(0, 4))
    fixed = {"mask_id": mask_id, "num_tokens": vocabulary}
    out = run_twice(case, functional.mask_sampling, tokens, **fixed, **options, **draws)
    candidate = np.ones((batch, length), dtype=bool) if maskable is None else maskable
    num_maskable = candidate.sum(-1)
    is_masked, token = out.is_masked.numpy(), tokens.numpy()
    counts = out.counts.tolist()
    assert out.masked_ids.dtype == tokens.dtype
    assert out.times.dtype == out.loss_weights.dtype == torch.float32
    assert not (is_masked & ~candidate).any(), "masked what is not maskable"
    assert (is_masked.sum(-1) == counts).all() if batch else counts == [], "counts"
    check_times(options, given_times, out.times, draws["sample_offset"], batch)
    ratios, slopes = (exactly(f(out.times)) for f in (ratio_of, slope_of))
    for b in range(batch):
        n = int(num_maskable[b])
        if given_counts is not None:
            assert counts[b] == min(max(0, int(given_counts[b])), n), "counts that were given"
        elif not is_bernoulli:
            assert counts[b] in possible_counts(name, float(ratios[b]), n), ("count", counts[b], ratios[b], n)
        elif ratios[b] >= 1 + 2.0**-22 * (name == "cosine"):
            assert counts[b] == n, "a ratio of 1 masks everything"
        elif ratios[b] <= 0:
            assert counts[b] == 0, "a ratio of 0 masks nothing"
    check_loss_weights(name, is_bernoulli, ratios, slopes, num_maskable, out)
    rows = np.flatnonzero(is_masked.reshape(-1)).tolist()
    assert out.row_indices.tolist() == rows + [-1] * (batch * length - len(rows)), "row_indices"
    assert int(out.num_masked) == len(rows), "num_masked"
    check_visible(options, out, token, excludes, mask_id, vocabulary, gate, may_be_mask)
    if batch > 1 and (not options["stratified"] or "global_batch_size" in options) and case.chance(0.3):
        parts = {**options}
        for key in ("times", "counts", "maskable"):
            if key in parts:
                parts[key] = parts[key][1:]
        offset = {**draws, "sample_offset": draws["sample_offset"] + 1}
        part = functional.mask_sampling(tokens[1:], **fixed, **parts, **offset)
        assert torch.equal(part.masked_ids, out.masked_ids[1:]), "a split of the batch"
        assert torch.equal(part.loss_weights, out.loss_weights[1:]), "a split of the batch"
    if case.chance(0.3):
        other = functional.mask_sampling(tokens, **fixed, **options, **draws, complement=True)
        assert (other.is_masked.numpy() == (candidate & ~is_masked)).all(), "complement"
        assert torch.equal(other.counts, other.is_masked.sum(-1)), "counts of the complement"
        assert torch.equal(other.times, out.times)
        check_loss_weights(name, is_bernoulli, 1.0 - ratios, slopes, num_maskable, other)
        check_visible(options, other, token, excludes, mask_id, vocabulary, gate, may_be_mask)


def check_times(options: dict[str, Any], given: np.ndarray | None, times: Tensor, offset: int, batch: int) -> None:
    t = exactly(times)
    if given is not None:
        assert (t == given).all(), "times that were given"
        return
    assert ((t >= 0) & (t < 1)).all(), "times in [0, 1)"
    if options["stratified"] and batch:
        whole = options.get("global_batch_size", batch)
        strata = (np.arange(batch) + offset) % whole / whole
        distance = (t - t[0] - (strata - strata[0])) % 1.0
        assert np.minimum(distance, 1 - distance).max() < 2.0**-22, ("strata", t, strata)
    elif batch > 1:
        assert len(np.unique(t)) == batch, "one time for several sequences"


def check_loss_weights(
    name: str, is_bernoulli: bool, ratios: np.ndarray, slopes: np.ndarray, num_maskable: np.ndarray, out: Any
) -> None:
    """|schedule'| over the share that is masked; 0 where nothing is."""
    counts = exactly(out.counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = ratios if is_bernoulli else counts / np.maximum(num_maskable, 1)
        weights = np.where(counts > 0, np.abs(slopes) / shares, 0.0)
        # The slope's rounding, and the ratio's: absolute, since 1 - t loses what t had.
        bound = 2.0**-22 * (1 + np.abs(weights)) * (1 + (1 / shares if is_bernoulli else 0.0))
    oracle.assert_within(out.loss_weights, weights, np.nan_to_num(bound), "weights of the loss")


def check_visible(
    options: dict[str, Any], out: Any, token: np.ndarray, excludes: np.ndarray | None, mask_id: int,
    vocabulary: int, gate: str, may_be_mask: bool,
) -> None:  # fmt: skip
    """What the network sees: how many are kept, how many random, and which ids these are."""
    is_masked, visible = out.is_masked.numpy(), out.masked_ids.numpy()
    keep, rand = options["no_replace_prob"], options["random_token_prob"]
    assert (visible == token)[~is_masked].all(), "changed what is not masked"
    may_appear = np.ones(vocabulary, dtype=bool)
    if excludes is not None:
        may_appear &= ~excludes
    if mask_id < vocabulary and not may_be_mask:
        may_appear[mask_id] = False
    strange = visible[is_masked & (visible != token) & (visible != mask_id)]
    assert ((strange >= 0) & (strange < vocabulary)).all(), "random ids"
    assert may_appear[strange].all(), "random ids"
    assert rand > 0 or len(strange) == 0, "random ids where none were asked for"
    masks, same = (is_masked & (visible == mask_id)).sum(-1), (is_masked & (visible == token)).sum(-1)
    odd = is_masked.sum(-1) - masks - same
    if gate == "token":
        if keep == 0 and rand == 0:
            assert (masks == is_masked.sum(-1)).all()
        if keep == 1.0:
            assert (same == is_masked.sum(-1)).all()
        if rand == 1.0 and not may_be_mask:
            assert (masks == 0).all()
        return
    coins = [(keeps, replaces) for keeps in (False, True) for replaces in (False, True)]
    random_mask = may_be_mask and mask_id < vocabulary and may_appear[mask_id]

    def fits(keeps: bool, replaces: bool) -> bool:
        for b, count in enumerate(out.counts.tolist()):
            a, r = oracle.gate_counts(count, keeps, replaces, keep, rand)
            left = count - a - r
            if not (same[b] >= a and odd[b] <= r and masks[b] >= left):
                return False
            if not random_mask and masks[b] != left:
                return False
        return True

    assert any(fits(*coin) for coin in coins), ("kept and random", out.counts, masks, same, odd)
