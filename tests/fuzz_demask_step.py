"""Random calls of ``demask_step``: sampling and remasking in one."""

from __future__ import annotations

import math

import float64_oracles as oracle
import numpy as np
import torch
from fuzz_cases import Case, exactly, run_twice
from fuzz_remask import counts_of, expected_masks, unsure
from fuzz_sample_tokens import Row, sampled_logits, sampling_options, sizes
from torch import Tensor

from fastmask import functional


def demask_step(case: Case) -> None:
    batch, length, vocabulary = sizes(case)
    length, vocabulary = case.pick(length, 9, 16), max(2, min(vocabulary, 100))
    options, _ = sampling_options(case, vocabulary)
    options.pop("mask_id", None)
    mask_id = case.pick(case.choices.randrange(vocabulary), vocabulary - 1, vocabulary + 3)
    forbidden = None
    if "forbidden" in options:
        given = options["forbidden"]
        forbidden = np.zeros(vocabulary, dtype=bool)
        forbidden[given.numpy() if isinstance(given, Tensor) else np.array(given, dtype=int)] = True
        if not oracle.allowed_ids(vocabulary, mask_id, forbidden).any():
            forbidden, _ = None, options.pop("forbidden")
    is_masked = case.flags(case.pick(0.0, 0.6, 1.0), batch, length)
    ids = np.where(is_masked, mask_id, case.ids(vocabulary, batch, length))
    counts, numbers = counts_of(case, batch, length)
    threshold = case.pick(None, None, 0.0, 1.0, 0.1, 0.3, case.choices.random())
    if threshold is not None and case.chance(0.5):
        counts, numbers = None, is_masked.sum(-1).tolist()
    scale = case.pick(0.0, 0.0, 0.5, 4.5)
    draws = {"seed": case.seed(), "step": case.pick(0, 3), "sample_offset": case.pick(0, 2), "backend": case.backend}
    listed = np.arange(batch * length)
    if case.chance(0.4):
        listed = np.flatnonzero(is_masked.reshape(-1))
        listed = np.append(listed, np.full(case.pick(0, 2), -1)).astype(np.int64)
        options["row_indices"] = torch.from_numpy(listed)
    is_compact = "row_indices" in options and case.chance(0.6)
    if is_compact:
        logits, exact = sampled_logits(case, len(listed), vocabulary)
    else:
        logits, exact = sampled_logits(case, batch, length, vocabulary)
        exact = exact.reshape(-1, vocabulary)
    effective = [
        count if threshold is None else min(count, int(n) - 1)
        for count, n in zip(numbers, is_masked.sum(-1), strict=True)
    ]
    places = length
    if case.chance(0.3):
        places = options["max_masked"] = min(length, max([0, *effective]))
    given_ids, given_masked = case.laid_out(ids, torch.int64), case.laid_out(is_masked, torch.bool)
    out = run_twice(
        case, functional.demask_step, logits, given_ids, given_masked, counts, mask_id=mask_id,
        choice_temperature=scale, threshold=threshold, **options, **draws,
    )  # fmt: skip
    assert (given_ids.numpy() == ids).all(), "wrote what it was given"
    assert (given_masked.numpy() == is_masked).all(), "wrote what it was given"
    log_probs, got_masked, got_ids = exactly(out.log_probs), out.is_masked.numpy(), out.ids.numpy()
    min_key = None
    if threshold is not None:
        min_key = -math.log(threshold) if threshold > 0 else math.inf
    keys, slack = -log_probs, 0.0
    if scale:
        noise = functional.confidence_remask_keys(torch.zeros(batch, length), choice_temperature=1.0, **draws)
        keys = -(log_probs - scale * exactly(noise))
        finite = np.abs(keys[np.isfinite(keys)]).max(initial=0.0)
        slack = 2.0**-21 * (1.0 + finite + scale * 4.6)
    expected_masks(keys, unsure(-log_probs, is_masked, min_key), effective, got_masked, slack)
    row_of = {int(place): m for m, place in enumerate(listed)}
    for b in range(batch):
        for i in range(length):
            place = b * length + i
            if not is_masked[b, i]:
                left = got_ids[b, i], log_probs[b, i], got_masked[b, i]
                assert left == (ids[b, i], 0.0, False), "not masked"
                continue
            row = Row(exact[row_of[place] if is_compact else place], options, mask_id, forbidden)
            if got_masked[b, i]:
                assert got_ids[b, i] == mask_id, "masked again"
                assert row.is_some_log_prob(float(log_probs[b, i])), ("a log-probability of no id", log_probs[b, i])
            else:
                row.check(int(got_ids[b, i]), float(log_probs[b, i]), None, None)
    starts = [b * places for b in range(batch + 1)]
    assert out.row_indices.tolist() == oracle.row_list(got_masked, starts, batch * places), "the list of rows"
