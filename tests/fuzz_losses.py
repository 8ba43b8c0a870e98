"""Random calls of both losses, their figures and gradients."""

from __future__ import annotations

import math
from typing import Any

import float64_oracles as oracle
import numpy as np
import torch
from fuzz_cases import FLOATS, Case, exactly
from torch import Tensor

from fastmask import functional


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
