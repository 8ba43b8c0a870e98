"""Random calls of every operation, each held to ``float64_oracles.py``.

A case is its number: ``python tests/fuzz_operations.py --first 17 --calls 1`` runs one again. A long run over two
processes, by hand: ``python tests/fuzz_operations.py --calls 1000000 --processes 2``.
"""

from __future__ import annotations

import argparse
import collections
import math
import multiprocessing
import os
import random
import time
from collections.abc import Callable
from typing import Any

import float64_oracles as oracle
import numpy as np
import torch
from torch import Tensor

from fastmask import functional

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Case:
    """Everything that a numbered case draws from."""

    def __init__(self, number: int, backend: str) -> None:
        self.number, self.backend = number, backend
        self.choices = random.Random(number)
        self.numbers = np.random.default_rng(number)
        self.options: dict[str, Any] = {}

    def chance(self, share: float) -> bool:
        return self.choices.random() < share

    def pick(self, *values: Any) -> Any:
        return self.choices.choice(values)

    def normal(self, *shape: int) -> np.ndarray:
        return self.numbers.standard_normal(shape)

    def ids(self, high: int, *shape: int) -> np.ndarray:
        return self.numbers.integers(0, high, shape)

    def flags(self, share: float, *shape: int) -> np.ndarray:
        return self.numbers.random(shape) < share

    def dtype(self) -> str:
        names = ["float32"] * 4 + ["bfloat16", "float16"] + ["float64"] * (self.backend == "reference")
        return self.pick(*names)

    def seed(self) -> int:
        return self.choices.getrandbits(64) - 2 ** self.pick(0, 63)

    def laid_out(self, values: np.ndarray, dtype: torch.dtype) -> Tensor:
        """The values as a tensor of that dtype, in one of many layouts."""
        dense = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
        if not self.chance(0.4):
            return dense
        layout = self.pick("sliced", "transposed", "misaligned", "spread")
        if layout == "transposed" and dense.ndim > 1:
            return dense.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "misaligned":
            flat = torch.zeros(dense.numel() + 1, dtype=dtype)
            flat[1:] = dense.flatten()
            return flat[1:].view(dense.shape)
        if layout == "spread" and dense.ndim > 1:  # rows apart
            wide = torch.zeros(*dense.shape[:-1], dense.shape[-1] + 3, dtype=dtype)
            wide[..., : dense.shape[-1]] = dense
            return wide[..., : dense.shape[-1]]
        wide = torch.zeros(*dense.shape, 2, dtype=dtype)
        wide[..., 0] = dense
        return wide[..., 0]

    def logits(self, *shape: int) -> np.ndarray:
        """Values of one of many kinds, the rarities among them."""
        kind = self.pick("normal", "normal", "wide", "narrow", "ties", "ties", "certain", "far")
        if kind == "ties":
            return self.numbers.integers(-2, 3, shape).astype(float)
        scale = {"normal": 3.0, "wide": 30.0, "narrow": 0.1, "certain": 2.0, "far": 3.0}[kind]
        values = scale * self.normal(*shape)
        if kind == "certain" and values.size:
            values[..., 0] += self.choices.uniform(5.0, 60.0)
        if kind == "far":
            values += self.pick(-1000.0, 300.0)
        return values

    def with_rarities(self, values: np.ndarray, *, plus: bool = True) -> np.ndarray:
        """Some of the rows of values [..., V] with -inf, NaN or +inf among them, or nothing else."""
        if values.size == 0 or not self.chance(0.3):
            return values
        rows = values.reshape(-1, values.shape[-1])
        for _ in range(self.pick(1, 2)):
            row = rows[self.choices.randrange(len(rows))]
            kind = self.pick("some", "some", "most", "all", "nan", "plus")
            if kind == "some":
                row[self.flags(0.3, len(row))] = -np.inf
            elif kind == "most":
                kept = self.choices.randrange(len(row))
                row[np.arange(len(row)) != kept] = -np.inf
            elif kind == "all":
                row[:] = -np.inf
            elif plus:
                row[self.choices.randrange(len(row))] = np.nan if kind == "nan" else np.inf
        return values


def exactly(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def run_twice(case: Case, function: Callable, *arguments: Any, **options: Any) -> Any:
    """The call's result; now and then, that a second call gives the same."""
    out = function(*arguments, **options)
    if case.chance(0.05):
        again = function(*arguments, **options)
        for x, y in zip(out, again, strict=True):
            assert (x is None) == (y is None)
            assert x is None or torch.equal(torch.nan_to_num(x, nan=7.5), torch.nan_to_num(y, nan=7.5)), (
                "not the same"
            )
    return out


# Losses


def loss_options(case: Case, vocabulary: int) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if case.chance(0.3):
        options["label_smoothing"] = case.pick(0.0, 0.1, 0.5, 1.0, case.choices.random())
    if case.chance(0.3):
        options["z_loss"] = case.pick(0.0, 1e-4, 0.1, 1.0)
    if case.chance(0.3):
        options["softcap"] = case.pick(1.0, 5.0, 30.0)
    if case.chance(0.4) and vocabulary > 1:
        options["exclude_id"] = case.choices.randrange(vocabulary)
    return options


class Loss:
    """What both losses share: their rows, their reduction, and what is expected of each."""

    def __init__(self, case: Case, max_vocabulary: int) -> None:
        self.case = case
        few = case.backend != "reference"
        self.shape = case.pick((case.pick(1, 3, 7),), (case.pick(1, 2, 3), case.pick(1, 2, 5)), (2, 1, 3))
        if case.chance(0.04):
            self.shape = case.pick((0,), (0, 4), (2, 0))
        self.vocabulary = case.pick(1, 2, 3, 7, 16, case.choices.randint(2, max_vocabulary))
        if case.chance(0.02):
            self.vocabulary = case.pick(1025, 2050) if few else case.pick(1025, 5000)
        self.row_options = loss_options(case, self.vocabulary)
        self.with_correct = case.chance(0.5)
        self.num_rows = math.prod(self.shape)
        self.targets = case.ids(self.vocabulary, *self.shape)
        self.is_masked = case.pick(None, case.flags(0.5, *self.shape), case.flags(case.pick(0.0, 1.0), *self.shape))
        self.ignore_index = (
            case.pick(-100, -1, case.choices.randrange(self.vocabulary)) if case.chance(0.25) else None
        )
        if self.ignore_index is not None:
            self.targets[case.flags(0.3, *self.shape)] = self.ignore_index
        if self.is_masked is not None and case.chance(0.3):  # never read
            self.targets[~self.is_masked] = case.pick(-100, self.vocabulary, 2**31 - 1)
        if case.chance(0.02) and self.num_rows:  # no column: NaN
            self.targets.reshape(-1)[case.choices.randrange(self.num_rows)] = case.pick(-7, self.vocabulary)
        self.weights = None
        if case.chance(0.4):
            whole = len(self.shape) == 2 and case.chance(0.4)
            self.weights = case.normal(*(self.shape[:1] if whole else self.shape)) * case.pick(1.0, 10.0)
            self.weights[case.flags(0.2, *self.weights.shape)] = 0.0
        self.reduction = case.pick("none", "sum", "mean")
        self.denominator = case.pick(None, 0.5, 7, 64.0) if self.reduction == "mean" else None
        self.weights_dtype = case.pick(torch.float32, torch.float64)

    def arguments(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        case = self.case
        targets = case.laid_out(self.targets, case.pick(torch.int64, torch.int64, torch.int32))
        is_masked = None if self.is_masked is None else case.laid_out(self.is_masked, torch.bool)
        weights = None if self.weights is None else case.laid_out(self.weights, self.weights_dtype)
        return targets, is_masked, weights

    def keywords(self) -> dict[str, Any]:
        denominator: Any = self.denominator
        if denominator is not None and self.case.chance(0.4):
            denominator = torch.tensor(denominator, dtype=self.case.pick(torch.float32, torch.float64, torch.float32))
        keywords = {
            **self.row_options, "reduction": self.reduction, "denominator": denominator,
            "with_correct": self.with_correct, "backend": self.case.backend,
        }  # fmt: skip
        if self.ignore_index is not None:
            keywords["ignore_index"] = self.ignore_index
        return keywords

    def row_weights(self, precision: type) -> np.ndarray:
        """The weight of every row, [R], in the loss's precision; 0 where it is not in the loss."""
        weights = np.ones(self.shape)
        if self.weights is not None:
            given = self.weights.astype(np.float32 if self.weights_dtype == torch.float32 else np.float64)
            given = given.astype(precision).astype(np.float64)
            weights = np.broadcast_to(given[:, None] if given.shape != self.shape else given, self.shape).copy()
        if self.is_masked is not None:
            weights[~self.is_masked] = 0.0
        if self.ignore_index is not None:
            weights[self.targets == self.ignore_index] = 0.0
        return weights.reshape(-1)

    def upstream(self, loss: Tensor) -> Tensor:
        if self.reduction == "none":
            return torch.from_numpy(self.case.normal(*self.shape)).to(loss.dtype)
        return torch.tensor(self.case.pick(1.0, 1.0, -2.0, 1024.0), dtype=loss.dtype)


def check_figures(
    loss: Loss,
    out: Any,
    rows: dict[int, oracle.RowLoss],
    weights: np.ndarray,
    rounding: float,
    is_short: bool = False,
) -> np.ndarray:
    """The loss, nll and correct; what each row's gradient is multiplied with, [R], without what comes from above."""
    nll, nll_bound = np.zeros(loss.num_rows), np.zeros(loss.num_rows)
    weighted, weighted_bound = np.zeros(loss.num_rows), np.zeros(loss.num_rows)
    for row, figures in rows.items():
        nll[row], nll_bound[row] = figures.nll, figures.nll_bound
        weighted[row] = weights[row] * figures.loss
        weighted_bound[row] = abs(weights[row]) * (figures.loss_bound + rounding * abs(figures.loss))
    weighted_bound = np.where(np.isfinite(weighted_bound), weighted_bound, 0.0)
    if is_short:  # says that it left rows out
        assert bool(out.loss.isnan().all()), "a loss of more rows than num_masked"
        return weights
    oracle.assert_within(out.nll, nll.reshape(loss.shape), nll_bound.reshape(loss.shape), "nll")
    if loss.with_correct:
        correct = out.correct.flatten().tolist()
        for row in range(loss.num_rows):
            assert correct[row] in (rows[row].may_be_correct if row in rows else {False}), ("correct", row)
    else:
        assert out.correct is None
    denominator = 1.0
    if loss.reduction == "mean":
        denominator = max(1, len(rows)) if loss.denominator is None else float(loss.denominator)
    if loss.reduction == "none":
        expected, bound = weighted.reshape(loss.shape), weighted_bound.reshape(loss.shape)
    else:
        with np.errstate(invalid="ignore"):
            expected = np.float64(weighted.sum() / denominator)
        finite = np.abs(weighted[np.isfinite(weighted)]).sum()
        bound = (weighted_bound.sum() + rounding * (len(rows) + 4) * finite) / denominator
    oracle.assert_within(out.loss.detach(), expected, bound, "loss")
    return weights / denominator


def masked_cross_entropy(case: Case) -> None:
    loss = Loss(case, 40)
    name = case.dtype()
    values = case.with_rarities(case.logits(*loss.shape, loss.vocabulary))
    logits = case.laid_out(values, FLOATS[name]).detach()
    exact = exactly(logits).reshape(-1, loss.vocabulary)
    logits.requires_grad_()
    arguments, keywords = loss.arguments(), loss.keywords()
    inplace_grad = case.chance(0.15)
    out = functional.masked_cross_entropy(logits, *arguments, inplace_grad=inplace_grad, **keywords)
    is_double = name == "float64"
    assert out.loss.dtype == out.nll.dtype == (torch.float64 if is_double else torch.float32)
    rounding = oracle.ROUNDING["float64" if is_double else "float32"]
    weights = loss.row_weights(np.float64 if is_double else np.float32)
    rows = {
        int(row): oracle.row_loss(
            exact[row], int(loss.targets.reshape(-1)[row]), rounding=rounding, **loss.row_options
        )
        for row in np.flatnonzero(weights)
    }
    factors = check_figures(loss, out, rows, weights, rounding)
    above = loss.upstream(out.loss)
    (gradient,) = torch.autograd.grad(out.loss, logits, above)
    got = exactly(gradient).reshape(-1, loss.vocabulary)
    assert gradient.dtype == logits.dtype
    assert gradient.shape == logits.shape
    above = exactly(above).reshape(-1) if loss.reduction == "none" else np.full(loss.num_rows, float(above))
    for row in range(loss.num_rows):
        if row not in rows:
            assert (got[row] == 0).all(), ("gradient of a row that is not in the loss", row)
            continue
        if np.isnan(rows[row].nll):
            continue
        factor = factors[row] * above[row]
        expected = rows[row].gradient * factor
        bound = rows[row].gradient_bound * abs(factor) + 4 * rounding * np.abs(expected)
        size = max(1.0, abs(above[row]))
        bound += 2 * oracle.MARGIN * (oracle.ROUNDING[name] * np.abs(expected) + oracle.SMALLEST[name] * size)
        too_large = np.abs(expected) > float(torch.finfo(FLOATS[name]).max) / 2
        if not too_large.any():
            oracle.assert_within(got[row], expected, bound, f"gradient of row {row}")
            if "exclude_id" in loss.row_options:
                assert got[row][loss.row_options["exclude_id"]] == 0.0


def linear_masked_cross_entropy(case: Case) -> None:
    loss = Loss(case, 24)
    name, width = case.dtype(), case.pick(1, 2, 5, 16)
    dtype, half = FLOATS[name], name in ("bfloat16", "float16")
    rounding = oracle.ROUNDING["float64" if name == "float64" else "float32"]
    leaves = [
        case.laid_out(case.normal(*loss.shape, width), dtype),
        case.laid_out(case.normal(loss.vocabulary, width) * case.pick(0.3, 3.0) / math.sqrt(width), dtype),
    ]
    if case.chance(0.5):
        leaves.append(case.laid_out(case.normal(loss.vocabulary), dtype))
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    e, w = exactly(leaves[0]).reshape(-1, width), exactly(leaves[1])
    b = exactly(leaves[2]) if len(leaves) > 2 else np.zeros(loss.vocabulary)
    targets, is_masked, row_weights = loss.arguments()
    keywords = loss.keywords()
    is_short = False
    if case.chance(0.4):
        listed = np.arange(loss.num_rows) if loss.is_masked is None else np.flatnonzero(loss.is_masked.reshape(-1))
        padded = np.append(listed, np.full(case.pick(0, 1, 5), -1))
        keywords["row_indices"] = torch.from_numpy(padded.astype(np.int64))
        num_masked, is_masked = len(listed), None
    else:
        num_masked = None
    weights = loss.row_weights(np.float64 if name == "float64" else np.float32)
    counted = np.flatnonzero(weights)
    if case.chance(0.3):
        least = len(counted) if num_masked is None else num_masked
        keywords["num_masked"] = case.pick(least, least + 2, loss.num_rows + 9)
        if num_masked is None and len(counted) and case.chance(0.1):
            keywords["num_masked"] = len(counted) - 1
            is_short = True
    out = functional.linear_masked_cross_entropy(
        leaves[0], leaves[1], targets, is_masked, row_weights, bias=leaves[2] if len(leaves) > 2 else None, **keywords
    )
    z = e @ w.T + b
    reach = np.abs(e) @ np.abs(w).T + np.abs(b)
    error = rounding * (width + 2) * reach
    if half:
        error += 2 * oracle.ROUNDING[name] * (np.abs(z) + np.abs(z - b)) + oracle.SMALLEST[name]
    rows = {
        int(row): oracle.row_loss(
            z[row], int(loss.targets.reshape(-1)[row]), error=error[row], rounding=rounding, **loss.row_options
        )
        for row in counted
    }
    factors = check_figures(loss, out, rows, weights, rounding, is_short)
    above = loss.upstream(out.loss)
    gradients = torch.autograd.grad(out.loss, leaves, above, allow_unused=False)
    for gradient, leaf in zip(gradients, leaves, strict=True):
        assert gradient.dtype == leaf.dtype
        assert gradient.shape == leaf.shape
    if is_short:
        assert bool(gradients[1].isnan().any()), "gradients of more rows than num_masked"
        return
    if any(np.isnan(figures.nll) for figures in rows.values()):
        return
    above = exactly(above).reshape(-1) if loss.reduction == "none" else np.full(loss.num_rows, float(above))
    g, g_bound = np.zeros_like(z), np.zeros_like(z)
    for row, figures in rows.items():
        factor = factors[row] * above[row]
        g[row] = figures.gradient * factor
        g_bound[row] = figures.gradient_bound * abs(factor) + 4 * rounding * np.abs(g[row])
        if half:  # before the factor or after it
            g_bound[row] += 2 * oracle.ROUNDING[name] * np.abs(g[row]) + oracle.SMALLEST[name] * (1 + abs(factor))
    expected = [g @ w, g.T @ e, g.sum(0)]
    bounds = [
        g_bound @ np.abs(w) + rounding * (loss.vocabulary + 4) * (np.abs(g) @ np.abs(w)),
        g_bound.T @ np.abs(e) + rounding * (len(rows) + 4) * (np.abs(g).T @ np.abs(e)),
        g_bound.sum(0) + rounding * (len(rows) + 4) * np.abs(g).sum(0),
    ]
    largest = float(torch.finfo(dtype).max) / 4
    for what, gradient, exact, bound in zip(
        ("embeddings", "weight", "bias"), gradients, expected, bounds, strict=False
    ):
        if np.abs(exact).max(initial=0.0) > largest or np.abs(g).max(initial=0.0) > largest:
            continue
        bound = oracle.MARGIN * bound + 2 * oracle.ROUNDING[name] * np.abs(exact) + 2 * oracle.SMALLEST[name]
        oracle.assert_within(exactly(gradient).reshape(exact.shape), exact, bound, f"gradient of {what}")
    unmasked = np.setdiff1d(np.arange(loss.num_rows), counted)
    assert (exactly(gradients[0]).reshape(-1, width)[unmasked] == 0).all()


# Sampling


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


# Remasking


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


def expected_masks(
    keys: np.ndarray, eligible: np.ndarray, counts: list[int], min_key: float | None, got: np.ndarray, slack: float
) -> None:
    """The masks [B, N] that remasking leaves; where noise was rounded (slack) any of equal keys."""
    for b in range(len(keys)):
        expected = oracle.expected_selection(keys[b], eligible[b], counts[b], min_key)
        if slack == 0.0 or (got[b] == expected).all():
            assert (got[b] == expected).all(), (b, keys[b], eligible[b], counts[b], min_key, got[b])
            continue
        assert not (got[b] & ~eligible[b]).any()
        bounds = [
            oracle.expected_selection(keys[b] + shift, eligible[b], counts[b], min_key) for shift in (-slack, slack)
        ]
        assert min(x.sum() for x in bounds) <= got[b].sum() <= max(x.sum() for x in bounds), "how many"
        last = np.nan_to_num(keys[b], nan=np.inf)[got[b]].min(initial=np.inf)
        left = eligible[b] & ~got[b] & ~(keys[b] < (-np.inf if min_key is None else min_key - slack))
        full = got[b].sum() >= counts[b]
        assert full or not left.any(), "one that could be masked again was not"
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
    if noise_scale:
        noise = functional.confidence_remask_keys(torch.zeros(batch, length), choice_temperature=1.0, **draws)
        keys = exact - noise_scale * exactly(noise)
        finite = np.abs(keys[np.isfinite(keys)]).max(initial=0.0)
        slack = 2.0**-21 * (1.0 + finite + noise_scale * 46.0 * 0.1)
    keys = -keys if is_confidence else keys
    got_ids, got_masked, listed = (x.numpy() for x in written)
    expected_masks(keys, is_masked if eligible is None else eligible, numbers, min_key, got_masked, slack)
    assert (got_ids == np.where(got_masked, case_mask_id(case), ids)).all(), "ids"
    assert listed.tolist() == oracle.row_list(got_masked, [min(max(0, x), num_places) for x in starts], num_places), (
        "the list of rows"
    )


def case_mask_id(case: Case) -> int:
    return (3, 60, -5)[case.number % 3]


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
    elif min_key is not None and np.isfinite(min_key):
        slack = 2.0**-23 * (1 + min_key)  # the threshold as float32 has it
    expected_masks(keys, is_masked, effective, min_key, got_masked, slack)
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


# Masks


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


OPERATIONS: dict[str, Callable[[Case], None]] = {
    function.__name__: function
    for function in (
        masked_cross_entropy, linear_masked_cross_entropy, sample_tokens, remask_keys, select_to_remask, remask_,
        demask_step, mask_sampling,
    )
}  # fmt: skip
SHARES = {"remask_keys": 1, "select_to_remask": 2, "remask_": 3}


def run_case(number: int, backend: str = "reference", only: str | None = None) -> str:
    """Runs one case, and says which operation it was of."""
    case = Case(number, backend)
    names, shares = list(OPERATIONS), [SHARES.get(name, 4) for name in OPERATIONS]
    name = case.choices.choices(names, shares)[0] if only is None else only
    try:
        OPERATIONS[name](case)
    except Exception as error:
        raise AssertionError(f"case {number} ({name}, {backend}): {type(error).__name__}: {error}") from error
    return name


# A long run by hand


def _failures(
    first: int, calls: int, stride: int, backend: str, only: str | None
) -> tuple[collections.Counter, list]:
    torch.set_num_threads(1)
    counted: collections.Counter = collections.Counter()
    failed: list[str] = []
    began = time.monotonic()
    for done, number in enumerate(range(first, first + calls, stride)):
        try:
            counted[run_case(number, backend, only)] += 1
        except AssertionError as error:
            failed.append(str(error))
            print(str(error)[:1500], flush=True)
        if done and done % 20_000 == 0:
            print(f"{done} calls in {time.monotonic() - began:.0f} s, {len(failed)} failed", flush=True)
    return counted, failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=int(os.environ.get("FASTMASK_FUZZ_CALLS", 1000)))
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--backend", default="reference", choices=["reference", "triton"])
    parser.add_argument("--only", choices=list(OPERATIONS))
    given = parser.parse_args()
    began = time.monotonic()
    shares = [
        (given.first + i, given.calls - i, given.processes, given.backend, given.only) for i in range(given.processes)
    ]
    if given.processes == 1:
        results = [_failures(*shares[0])]
    else:
        with multiprocessing.get_context("spawn").Pool(given.processes) as pool:
            results = pool.starmap(_failures, shares)
    counted, failed = sum((c for c, _ in results), collections.Counter()), [f for _, fs in results for f in fs]
    print(
        f"{given.calls} calls on {given.backend}, {time.monotonic() - began:.0f} s, "
        f"{len(failed)} failed: {dict(counted)}"
    )
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
