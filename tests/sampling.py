"""The law of a sampler, how it is shown, and the exponential race by hand; what of a selection may be a tie."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from oracles import filtered
from scipy import stats

from fastmask import _streams as streams
from fastmask import functional
from fastmask.reference import philox


class Door:
    """The public functions on one backend."""

    def __init__(self, backend):
        self.backend = backend

    def __getattr__(self, name):
        return partial(self.backend.run, getattr(functional, name))

    def rows(self, wanted: int, few: int = 3) -> int:
        """As many as a test wants; few in the interpreter, which takes a fiftieth of a second for each."""
        return few if self.backend.name == "interpreter" else wanted


def number_kept(filter_thres: float | None, vocabulary: int) -> int | None:
    """The wrapper's filter as the samplers' top_k."""
    return None if filter_thres is None else math.ceil((1 - filter_thres) * vocabulary)


def probabilities(logits, temperature=1.0, **filters) -> np.ndarray:
    """The law of one row [V] in float64."""
    z = filtered(logits, **filters)
    if filters.get("top_k") == 1:  # of those that tie the first alone
        return (np.arange(len(z)) == z.argmax()).astype(float)
    weights = np.exp((z - z.max()) / temperature)
    return weights / weights.sum()


NUM_LAW_TESTS = 300  # Bonferroni: what all calls of assert_law of all files share


def assert_law(counts, law, effect=0.1):
    """Observed counts follow the law: a chi-square that does not reject, and a small effect besides.

    The effect (Cohen's w, less what chance alone adds) keeps it honest where there are few draws, and tells
    how wrong a law is that fails.
    """
    counts, law = np.asarray(counts, dtype=float), np.asarray(law, dtype=float)
    assert counts[law == 0].sum() == 0, "an impossible outcome"
    total = counts.sum()
    order = np.argsort(law)
    counts, expected = counts[order], law[order] / law.sum() * total
    # Outcomes too rare for a chi-square are pooled, rarest first.
    rare = max(int(np.searchsorted(expected, 5.0)), int(np.searchsorted(expected.cumsum(), 5.0)) + 1)
    counts, expected = (np.append(x[rare:], x[:rare].sum()) for x in (counts, expected))
    if len(counts) == 1:
        return
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = len(counts) - 1
    pvalue = stats.chi2.sf(statistic, freedom)
    assert pvalue > 1e-3 / NUM_LAW_TESTS, (pvalue, counts, expected)
    assert math.sqrt(max(0.0, statistic - freedom) / total) < effect, (counts, expected)


def assert_independent(a, b, num_a, num_b):
    table = np.zeros((num_a, num_b))
    np.add.at(table, (np.asarray(a), np.asarray(b)), 1)
    table = table[table.sum(1) > 0][:, table.sum(0) > 0]
    result = stats.chi2_contingency(table, correction=False)
    assert result.pvalue > 1e-3 / NUM_LAW_TESTS, table
    assert math.sqrt(max(0.0, result.statistic - result.dof) / table.sum()) < 0.1


def sample_ids(door, logits, draws, *, per_sequence=200, **options) -> np.ndarray:
    """Draws from one row's law, at ``draws`` different positions and samples."""
    rows = logits.expand(draws // per_sequence, per_sequence, len(logits))
    return door.sample_tokens(rows, **{"seed": 1, **options}).ids.flatten().numpy()


def race(row, seed, position, sample, step):
    """docs/randomness.md word for word, on float64 weights [V]: tiles, sub-tiles and ids race for argmax w / E.

    The winner, and how near the nearest of the three runners-up came: 1 is a tie.
    """
    seed = torch.tensor(seed)
    nearest = [0.0]

    def winner(weights, stream, first):
        if len(weights) == 1:
            return 0
        elements = first + torch.arange(len(weights))
        high, low, _, _ = philox.draw(seed, stream, step, sample=sample, position=position, element=elements)
        uniform = [(int(h) * 2**32 + int(low_) + 0.5) / 2**64 for h, low_ in zip(high, low, strict=True)]
        exponentials = np.array([-math.log1p(-v) for v in uniform])
        second, first = np.sort(weights / exponentials)[-2:]
        nearest.append(second / first)
        return int(np.argmax(weights / exponentials))

    padded = np.append(row, np.zeros(-len(row) % 4096)).reshape(-1, 64, 64)
    tile = winner(padded.sum((1, 2)), streams.TILE_RACE, 0)
    sub_tile = winner(padded[tile].sum(1), streams.SUB_TILE_RACE, tile * 64)
    first = (tile * 64 + sub_tile) * 64
    return first + winner(padded[tile, sub_tile], streams.ELEMENT_RACE, first), max(nearest)


def assert_same_selection(ours, theirs, scores):
    """ids, is_masked and row_indices are equal; or what differs is as much as level in score. How many differ."""
    if all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)):
        return 0
    differs = ours[1] != theirs[1]
    for b in differs.any(-1).nonzero().flatten():
        level = scores[b][differs[b]]
        assert level.max() - level.min() < 1e-5 * (1 + level.abs().max()), (b, level)
    return int(differs.sum())
