"""min_p, and figures and filters of the law that is sampled: softmax(z / T)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import draw, filtered
from sampling import Door, sample_ids

from fastmask.functional import LinearLogits

FIGURES = {"with_margin": True, "with_entropy": True}


@pytest.fixture
def door(backend):
    return Door(backend)


@pytest.fixture
def law_door(reference):
    return Door(reference)


def figures_of_law(row: torch.Tensor, id: int, temperature: float, **filters) -> tuple[float, float, float]:
    """log p of an id, margin and entropy of a row [V] by softmax(z / T), in float64."""
    z = filtered(row, temperature=temperature, **filters) / temperature
    p = np.exp(z - z.max())
    p /= p.sum()
    first, second = np.sort(np.append(p, 0.0))[::-1][:2]
    with np.errstate(divide="ignore"):
        return np.log(p[id]), first - second, -(p[p > 0] * np.log(p[p > 0])).sum()


ALL_FILTERS = {"top_k": 40, "min_p": 0.01, "top_p": 0.9, "mask_id": 2}


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"top_k": 4},
        {"min_p": 0.05},
        pytest.param({"top_p": 0.8}, marks=pytest.mark.ptx),
        pytest.param(ALL_FILTERS, marks=pytest.mark.ptx),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("vocabulary", "dtype", "temperature"),
    [
        (5, torch.float32, 0.2),
        (301, torch.bfloat16, 0.2),
        (301, torch.bfloat16, 1.0),
        (301, torch.float32, 3.0),
        (5003, torch.float32, 0.2),
        (5003, torch.bfloat16, 3.0),
    ],
)
@pytest.mark.slow_interpreted
def test_figures_are_of_the_law_that_is_sampled(door, vocabulary, dtype, temperature, filters):
    logits = draw(1, 3, vocabulary, seed=vocabulary, scale=2.0, dtype=dtype)
    out = door.sample_tokens(logits, temperature=temperature, processed=True, seed=3, **filters, **FIGURES)
    expected = [
        figures_of_law(row, id, temperature, **filters)
        for row, id in zip(logits[0].float(), out.ids[0].tolist(), strict=True)
    ]
    got = torch.stack([out.log_probs[0], out.margins[0], out.entropies[0]], -1).double()
    torch.testing.assert_close(got, torch.tensor(expected).double(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("vocabulary", [33, 2500, pytest.param(70000, marks=pytest.mark.slow_interpreted)])
def test_what_is_sampled_stays_the_same_without_a_filter(door, vocabulary):
    """softmax(z / T) is sampled anyway; behind a head too."""
    logits = draw(1, 4, vocabulary, seed=1, scale=3.0)
    options = {"temperature": 0.6, "seed": 2, "mask_id": 1}
    plain = door.sample_tokens(logits, **options)
    processed = door.sample_tokens(logits, processed=True, **options)
    assert torch.equal(plain.ids, processed.ids)
    assert not torch.equal(plain.log_probs, processed.log_probs)
    if vocabulary == 33:
        head = door.sample_tokens(LinearLogits(logits, torch.eye(33)), processed=True, **options)
        assert torch.equal(head.ids, processed.ids)
        torch.testing.assert_close(head.log_probs, processed.log_probs)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 1.0}, {"top_k": 1, "temperature": 0.3}], ids=str
)
@pytest.mark.slow_interpreted
def test_at_0_and_1_it_changes_nothing(door, options):
    logits = draw(2, 3, 50, seed=4)
    plain = door.sample_tokens(logits, min_p=0.1, top_p=0.9, seed=5, **FIGURES, **options)
    processed = door.sample_tokens(logits, min_p=0.1, top_p=0.9, seed=5, processed=True, **FIGURES, **options)
    for a, b in zip(plain, processed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("temperature", [1e-40, 1e-6, 1e6, 1e38])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.5}, {"min_p": 0.5}], ids=str)
@pytest.mark.parametrize("vocabulary", [30, 3000])
@pytest.mark.slow_interpreted
def test_extreme_temperatures_leave_figures_finite(door, vocabulary, temperature, filters):
    logits = draw(1, 2, vocabulary, seed=6, scale=20.0)
    out = door.sample_tokens(logits, temperature=temperature, processed=True, seed=1, **filters, **FIGURES)
    assert all(values.isfinite().all() for values in out[1:])
    if temperature < 1.0:
        assert torch.equal(out.ids, logits.argmax(-1))
        assert out.log_probs.abs().max() < 1e-6
    elif not filters:
        torch.testing.assert_close(out.entropies, torch.full((1, 2), math.log(vocabulary)), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("vocabulary", [7, pytest.param(2048, marks=pytest.mark.ptx), 2049, 9001])
@pytest.mark.parametrize("filters", [{"min_p": 0.2}, {"min_p": 1.0}, {"min_p": 0.02, "top_k": 6}], ids=str)
@pytest.mark.slow_interpreted
def test_min_p_keeps_what_is_so_likely_beside_the_likeliest(door, vocabulary, filters):
    """By asking for the probability of each id in question."""
    row = draw(vocabulary, seed=vocabulary).where(torch.arange(vocabulary) % 11 != 3, -math.inf)
    expected = np.isfinite(filtered(row, **filters))
    rows = torch.from_numpy(np.argsort(-row.numpy())[: expected.sum() + 3].copy())
    out = door.sample_tokens(
        row.expand(len(rows), -1), row_indices=rows, seq_len=vocabulary, kept_ids=rows, seed=0, **filters
    )
    assert (out.log_probs > -math.inf).tolist() == expected[rows].tolist()


def test_samples_come_from_what_min_p_leaves(law_door):
    logits = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04]).log()
    assert set(sample_ids(law_door, logits, 500, min_p=0.5, temperature=5.0)) == {0, 1, 2}
    # At T = 1/2 the squares: .16 .09 .04, of which the last is a quarter of the first.
    assert set(sample_ids(law_door, logits, 500, min_p=0.5, temperature=0.5, processed=True)) == {0, 1}


@pytest.mark.parametrize("content", [math.nan, math.inf, -math.inf])
@pytest.mark.slow_interpreted
def test_min_p_of_rows_without_a_law(door, content):
    for vocabulary in (40, 3000):
        logits = draw(1, 1, vocabulary)
        logits[..., 1:] = content
        out = door.sample_tokens(logits, seed=1, mask_id=0, min_p=0.1, processed=True, temperature=0.5)
        assert out.ids.item() == 1
        assert out.log_probs.isnan().all()


def test_min_p_of_0_keeps_all(door):
    logits = draw(1, 3, 40)
    for a, b in zip(door.sample_tokens(logits, min_p=0.0, seed=1), door.sample_tokens(logits, seed=1), strict=True):
        assert a is b or torch.equal(a, b)
