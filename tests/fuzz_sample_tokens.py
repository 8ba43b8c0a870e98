"""Random calls of ``sample_tokens``, and what may be said of an id sampled."""

from __future__ import annotations

import math
from typing import Any

import float64_oracles as oracle
import numpy as np
import torch
from fuzz_cases import FLOATS, Case, exactly, run_twice
from torch import Tensor

from fastmask import functional


def sampling_options(case: Case, vocabulary: int) -> tuple[dict[str, Any], np.ndarray | None]:
    options: dict[str, Any] = {}
    forbidden = None
    if case.chance(0.7):
        options["temperature"] = case.pick(0.0, 0, 0.5, 1.0, 2.5, 1e-3, 1e-10)
    if case.chance(0.4):
        options["top_k"] = case.pick(1, 2, case.choices.randint(1, vocabulary + 2))
    if case.chance(0.4):
        options["top_p"] = case.pick(0.0, 1.0, 0.5, 0.9, case.choices.random())
    if case.chance(0.5) and vocabulary > 1:
        options["mask_id"] = case.pick(case.choices.randrange(vocabulary), vocabulary - 1, 0, vocabulary, -1)
    if case.chance(0.3) and vocabulary > 2:
        forbidden = case.flags(0.3, vocabulary)
        allowed = oracle.allowed_ids(vocabulary, options.get("mask_id"), forbidden)
        if not allowed.any():
            forbidden[(options.get("mask_id", -1) + 1) % vocabulary] = False
        as_list = case.chance(0.5)
        options["forbidden"] = np.flatnonzero(forbidden).tolist() if as_list else torch.from_numpy(forbidden)
    return options, forbidden


def sampled_logits(case: Case, *shape: int) -> tuple[Any, np.ndarray]:
    """Logits [..., V] or what gives them, and their values as float32 has them, float64."""
    if case.chance(0.25):  # on a lattice that even bfloat16 multiplies exactly
        width, dtype = case.pick(1, 3, 8), FLOATS[case.pick("float32", "float32", "bfloat16", "float16")]
        embeddings = case.numbers.integers(-1, 2, (*shape[:-1], width)).astype(float)
        weight = case.numbers.integers(-3, 4, (shape[-1], width)) / 2
        bias = case.numbers.integers(-2, 3, shape[-1]) / 2 if case.chance(0.5) else None
        scale = case.pick(1.0, 1.0, 0.5, 2.0)
        exact = scale * embeddings @ weight.T + (0.0 if bias is None else bias)
        logits = functional.LinearLogits(
            case.laid_out(embeddings, dtype),
            case.laid_out(weight, dtype),
            None if bias is None else case.laid_out(bias, dtype),
            scale,
        )
        return logits, exact
    values = case.with_rarities(case.logits(*shape)).astype(np.float32)
    logits = case.laid_out(values, FLOATS[case.dtype()])
    return logits, exactly(logits)


class Row:
    """A row of logits [V], and what may be said of an id sampled there."""

    def __init__(
        self, logits: np.ndarray, options: dict[str, Any], mask_id: int | None, forbidden: np.ndarray | None
    ) -> None:
        allowed = oracle.allowed_ids(len(logits), mask_id, forbidden)
        self.logits, self.temperature = logits, options.get("temperature", 1.0)
        self.is_greedy = self.temperature == 0 or options.get("top_k") == 1
        self.lowest = int(np.flatnonzero(allowed)[0]) if allowed.any() else 0
        seen = np.where(allowed, logits, -np.inf)
        self.is_valid = bool(np.isfinite(seen.max())) and not np.isnan(logits[allowed]).any()
        if self.is_valid:
            self.best = int(seen.argmax())
            sets = oracle.vocabularies(logits, options.get("top_k"), options.get("top_p"), mask_id, forbidden)
            self.answers = [(kept, oracle.row_figures(logits, kept)) for kept in sets]

    def check(self, id: int, log_prob: float, margin: float | None, entropy: float | None, kept_id: int = -1) -> None:
        if not self.is_valid:
            assert id == (self.lowest if kept_id < 0 else kept_id), ("the lowest allowed id", id, self.lowest)
            for value in (log_prob, margin, entropy):
                assert value is None or math.isnan(value), ("NaN of a row that says nothing", value)
            return
        assert any(self._agrees(*answer, id, log_prob, margin, entropy, kept_id) for answer in self.answers), (
            id, kept_id, log_prob, margin, entropy,
            [(np.flatnonzero(kept)[:9], f.log_probs[id : id + 1], f.margin, f.entropy) for kept, f in self.answers],
        )  # fmt: skip

    def _agrees(
        self, kept: np.ndarray, figures: oracle.RowFigures, id: int, log_prob: float, margin: float | None,
        entropy: float | None, kept_id: int,
    ) -> bool:  # fmt: skip
        if kept_id >= len(kept):
            if id != kept_id or not math.isnan(log_prob):
                return False
            id, log_prob = self.best, figures.log_probs[self.best]
        elif kept_id >= 0:
            if id != kept_id:
                return False
        elif self.is_greedy:
            if id != self.best:
                return False
        elif not kept[id] or (self.logits[id] - self.logits[self.best]) / self.temperature < -104.0:
            return False
        return (
            self.is_log_prob(log_prob, id, figures)
            and (margin is None or abs(margin - figures.margin) <= figures.margin_bound)
            and (entropy is None or abs(entropy - figures.entropy) <= figures.entropy_bound)
        )

    @staticmethod
    def is_log_prob(value: float, id: int, figures: oracle.RowFigures) -> bool:
        expected = figures.log_probs[id]
        if not np.isfinite(expected):
            return value == expected
        return abs(value - expected) <= figures.log_probs_bound[id]

    def is_some_log_prob(self, value: float) -> bool:
        """Whether an id that may be sampled has that log-probability."""
        if not self.is_valid:
            return math.isnan(value)
        if self.is_greedy:
            return any(self.is_log_prob(value, self.best, figures) for _, figures in self.answers)
        return any(
            bool((np.abs(value - figures.log_probs[kept]) <= figures.log_probs_bound[kept]).any())
            for kept, figures in self.answers
        )


def sizes(case: Case) -> tuple[int, int, int]:
    batch, length = case.pick(1, 2, 3), case.pick(1, 2, 5)
    vocabulary = case.pick(1, 2, 3, 12, 65, case.choices.randint(2, 50))
    if case.chance(0.02):
        vocabulary = case.pick(1000, 4096, 4100, 8195)
    if case.chance(0.03):
        batch = 0
    return batch, length, vocabulary


def sample_tokens(case: Case) -> None:
    batch, length, vocabulary = sizes(case)
    options, forbidden = sampling_options(case, vocabulary)
    draws = {
        "seed": case.seed(),
        "step": case.pick(0, 1, 77),
        "sample_offset": case.pick(0, 5),
        "backend": case.backend,
    }
    mask_id = options.get("mask_id")
    listed, is_compact = np.arange(batch * length), False
    if case.chance(0.5):
        listed = case.numbers.permutation(batch * length)[: case.choices.randint(0, batch * length)]
        if case.chance(0.5):
            listed = np.sort(listed)
        is_compact = case.chance(0.5)
        none = -1 if is_compact else case.pick(-1, -1, batch * length, 2**40)
        places = np.append(listed, np.full(case.pick(0, 0, 2), none)).astype(np.int64)
        options["row_indices"] = torch.from_numpy(places)
        listed = np.where(places < batch * length, places, -1)
    if is_compact:
        logits, exact = sampled_logits(case, len(listed), vocabulary)
        options["seq_len"] = length
        flat = exact
    else:
        logits, exact = sampled_logits(case, batch, length, vocabulary)
        flat = exact.reshape(-1, vocabulary)[np.maximum(listed, 0)] if batch else np.zeros((len(listed), vocabulary))
    shape = listed.shape if "row_indices" in options else (batch, length)
    kept = None
    if case.chance(0.3):
        kept = np.where(case.flags(0.5, *shape), case.ids(vocabulary, *shape), -1)
        if case.chance(0.1):
            kept[case.flags(0.3, *shape)] = case.pick(vocabulary, 2**40)  # no id
        options["kept_ids"] = case.laid_out(kept, torch.int64)
    written = None
    if case.chance(0.3):
        written = functional.Sampled(torch.full((batch, length), 77), torch.full((batch, length), 9.5))
        options["out"] = written
    else:
        options["with_margin"], options["with_entropy"] = case.chance(0.4), case.chance(0.4)
    out = run_twice(case, functional.sample_tokens, logits, **options, **draws)
    if written is not None:
        assert out.ids is written.ids
        is_listed = np.zeros(batch * length, dtype=bool)
        is_listed[listed[listed >= 0]] = True
        ids, log_probs = out.ids.flatten().numpy(), out.log_probs.flatten().numpy()
        assert (ids[~is_listed] == 77).all(), "written beside its rows"
        assert (log_probs[~is_listed] == 9.5).all(), "written beside its rows"
        ids = np.where(listed >= 0, ids[listed] if batch else -1, -1)
        log_probs = np.where(listed >= 0, log_probs[listed] if batch else 0.0, 0.0)
    else:
        assert out.ids.shape == shape
        assert out.ids.dtype == torch.int64
        assert out.log_probs.dtype == torch.float32
        ids, log_probs = out.ids.flatten().numpy(), out.log_probs.flatten().numpy()
    margins = None if out.margins is None else out.margins.flatten().tolist()
    entropies = None if out.entropies is None else out.entropies.flatten().tolist()
    assert (margins is not None) == options.get("with_margin", False)
    assert (entropies is not None) == options.get("with_entropy", False)
    kept_flat = None if kept is None else kept.reshape(-1)
    for m, place in enumerate(listed):
        margin = None if margins is None else margins[m]
        entropy = None if entropies is None else entropies[m]
        if place < 0:
            figures = ids[m], log_probs[m], margin or 0.0, entropy or 0.0
            assert figures == (-1, 0.0, 0.0, 0.0), "figures of no row"
            continue
        kept_id = -1 if kept_flat is None else int(kept_flat[m])
        Row(flat[m], options, mask_id, forbidden).check(int(ids[m]), float(log_probs[m]), margin, entropy, kept_id)
    is_plain = "row_indices" not in options and kept is None and written is None and isinstance(logits, Tensor)
    if is_plain and batch > 1:  # a part of the batch gives the same
        part = functional.sample_tokens(
            logits[1:], **options, **{**draws, "sample_offset": draws["sample_offset"] + 1}
        )
        assert torch.equal(part.ids, out.ids[1:]), "a split of the batch"
