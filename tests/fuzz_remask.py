"""Random calls of remasking: its keys, what is selected by them, and ``remask_``."""

from __future__ import annotations

import math
from typing import Any

import float64_oracles as oracle
import numpy as np
import torch
from fuzz_cases import FLOATS, Case, exactly

from fastmask import functional


def remask_keys(case: Case) -> None:
    batch, length = case.pick(0, 1, 3), case.pick(1, 4, 9)
    scale = case.pick(0.0, 0.5, 4.5)
    draws = {"seed": case.seed(), "step": case.pick(0, 3), "sample_offset": case.pick(0, 2), "backend": case.backend}
    values = -np.abs(case.logits(batch, length)).astype(np.float32)
    if case.chance(0.5):
        sign, keys = (
            -1,
            functional.confidence_remask_keys(
                case.laid_out(values, torch.float32), choice_temperature=scale, **draws
            ),
        )
    else:
        logits = case.laid_out(values, FLOATS[case.dtype()])
        values = exactly(logits)
        sign, keys = 1, functional.critic_remask_keys(logits, noise_scale=scale, **draws)
    assert keys.dtype == torch.float32
    assert keys.shape == (batch, length)
    if scale == 0:
        oracle.assert_within(keys, sign * values, 2.0**-24 * np.abs(values), "key")
        return
    zeros = torch.zeros(batch, length)
    noise = -exactly(functional.confidence_remask_keys(zeros, choice_temperature=1.0, **draws))
    assert ((noise > -4.0) & (noise < 46.0)).all(), "not Gumbel's"
    assert len(np.unique(noise)) == noise.size, "the same noise twice"
    bound = 2.0**-23 * (np.abs(values) + scale * np.abs(noise))
    oracle.assert_within(keys, sign * (values + scale * noise), bound, "key")


def keys_with_ties(case: Case, batch: int, length: int) -> np.ndarray:
    keys = case.pick(case.normal(batch, length), case.numbers.integers(-2, 3, (batch, length)).astype(float))
    if case.chance(0.3):
        keys[case.flags(0.2, batch, length)] = case.pick(np.nan, np.inf, -np.inf, 0.0, -0.0)
    return keys


def counts_of(case: Case, batch: int, length: int) -> tuple[Any, list[int]]:
    if case.chance(0.3):
        count = case.choices.randint(0, length + 2)
        return count, [count] * batch
    counts = case.ids(length + 2, batch)
    return torch.from_numpy(counts).to(case.pick(torch.int32, torch.int64)), counts.tolist()


def select_to_remask(case: Case) -> None:
    batch, length = case.pick(0, 1, 2, 4), case.pick(1, 3, 8, 33)
    keys = case.laid_out(keys_with_ties(case, batch, length), FLOATS[case.dtype()])
    exact = exactly(keys)
    eligible = case.flags(case.pick(0.0, 0.6, 1.0), batch, length)
    counts, numbers = counts_of(case, batch, length)
    min_key = case.pick(None, None, 0.0, 1.0, -math.inf, math.inf, 0.25)
    chosen = functional.select_to_remask(
        keys, case.laid_out(eligible, torch.bool), counts, min_remask_key=min_key, backend=case.backend
    )
    for b in range(batch):
        expected = oracle.expected_selection(exact[b], eligible[b], numbers[b], min_key)
        assert (chosen[b].numpy() == expected).all(), (exact[b], eligible[b], numbers[b], min_key, chosen[b])


def unsure(figures: np.ndarray, eligible: np.ndarray, min_key: float | None) -> np.ndarray:
    """What of the eligible may be masked again, by its remask key without noise."""
    return eligible if min_key is None else eligible & ~(figures < np.float32(min_key))


def expected_masks(keys: np.ndarray, eligible: np.ndarray, counts: list[int], got: np.ndarray, slack: float) -> None:
    """The masks [B, N] that remasking leaves; where noise was rounded (slack) any of equal keys."""
    for b in range(len(keys)):
        expected = oracle.expected_selection(keys[b], eligible[b], counts[b], None)
        if slack == 0.0 or (got[b] == expected).all():
            assert (got[b] == expected).all(), (b, keys[b], eligible[b], counts[b], got[b])
            continue
        assert not (got[b] & ~eligible[b]).any()
        assert got[b].sum() == expected.sum(), "how many"
        last = np.nan_to_num(keys[b], nan=np.inf)[got[b]].min(initial=np.inf)
        left = eligible[b] & ~got[b]
        assert np.nan_to_num(keys[b], nan=np.inf)[left].max(initial=-np.inf) <= last + slack, "the wrong ones"


def remask_(case: Case) -> None:
    batch, length = case.pick(0, 1, 2, 4), case.pick(1, 3, 8, 33)
    ids = case.ids(50, batch, length)
    is_masked = case.flags(case.pick(0.0, 0.6, 1.0), batch, length)
    values = case.laid_out(keys_with_ties(case, batch, length), FLOATS[case.dtype()])
    exact = exactly(values).astype(np.float32).astype(float)
    counts, numbers = counts_of(case, batch, length)
    is_confidence, noise_scale = case.chance(0.5), case.pick(0.0, 0.0, 0.5, 4.5)
    min_key = case.pick(None, None, 0.0, 1.0, -math.inf, math.inf)
    eligible = case.flags(0.7, batch, length) if case.chance(0.3) else None
    spaces = case.numbers.integers(0, length + 2, batch)
    starts = [0, *spaces.cumsum().tolist()]
    num_places = starts[-1]
    if case.chance(0.1):  # as good as 0 and R
        starts[0], starts[-1] = case.pick(0, -3), num_places + case.pick(0, 2)
    draws = {"seed": case.seed(), "step": case.pick(0, 3), "sample_offset": case.pick(0, 2), "backend": case.backend}
    written = [torch.from_numpy(ids.copy()), torch.from_numpy(is_masked.copy()), torch.full((num_places,), 99)]
    functional.remask_(
        *written, torch.tensor(starts), values, counts, mask_id=case_mask_id(case), is_confidence=is_confidence,
        noise_scale=noise_scale, min_remask_key=min_key,
        eligible=None if eligible is None else case.laid_out(eligible, torch.bool), **draws,
    )  # fmt: skip
    keys, slack = exact, 0.0
    may_go = is_masked if eligible is None else eligible
    if min_key is not None and eligible is None:
        numbers = [min(count, int(n) - 1) for count, n in zip(numbers, is_masked.sum(-1), strict=True)]
    may_go = unsure(-exact if is_confidence else exact, may_go, min_key)
    if noise_scale:
        noise = functional.confidence_remask_keys(torch.zeros(batch, length), choice_temperature=1.0, **draws)
        keys = exact - noise_scale * exactly(noise)
        finite = np.abs(keys[np.isfinite(keys)]).max(initial=0.0)
        slack = 2.0**-21 * (1.0 + finite + noise_scale * 46.0 * 0.1)
    keys = -keys if is_confidence else keys
    got_ids, got_masked, listed = (x.numpy() for x in written)
    expected_masks(keys, may_go, numbers, got_masked, slack)
    assert (got_ids == np.where(got_masked, case_mask_id(case), ids)).all(), "ids"
    assert listed.tolist() == oracle.row_list(got_masked, [min(max(0, x), num_places) for x in starts], num_places), (
        "the list of rows"
    )


def case_mask_id(case: Case) -> int:
    return (3, 60, -5)[case.number % 3]
