"""On a CPU few rows are sampled in numpy, and are the same: ids bit for bit, and figures, of whatever reference."""

from __future__ import annotations

import math

import pytest
import torch

from fastmask import functional
from fastmask.reference import _few_samples_in_numpy
from fastmask.records import Sampled

OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "nearly greedy": {"temperature": 1e-30},
    "hot": {"temperature": 1e30},
    "processed": {"temperature": 1.7, "processed": True},
    "a mask id": {"mask_id": 2},
    "top_k": {"top_k": 4, "temperature": 0.7},
    "min_p": {"min_p": 0.1, "temperature": 1.3},
    "all filters": {"top_k": 9, "min_p": 0.02, "top_p": 0.8, "temperature": 0.8, "processed": True, "mask_id": 0},
    "of a later step": {"step": 7, "sample_offset": 2**31 + 5},
}
# The numbers of rows and ids: of one sub-tile and of many, padded and whole.
SHAPES = [(2, 5, 33), (1, 1, 3), (3, 1, 64), (2, 3, 65), (1, 9, 1024), (1, 2, 4096)]


@pytest.fixture
def both(monkeypatch):
    """Samples in numpy and without it, and in how many calls numpy gave some."""

    def run(logits, *, wants_numpy=True, **options):
        given = []
        sample = _few_samples_in_numpy.sample_tokens
        with monkeypatch.context() as patch:
            patch.setattr(_few_samples_in_numpy, "sample_tokens", lambda *a: given.append(sample(*a)) or given[-1])
            here = functional.sample_tokens(logits, **options)
        assert any(sampled is not None for sampled in given) == wants_numpy
        with monkeypatch.context() as patch:
            patch.setattr(_few_samples_in_numpy, "np", None)
            return here, functional.sample_tokens(logits, **options)

    return run


def assert_same(here, there):
    for values, expected in zip(here, there, strict=True):
        assert values is None and expected is None or values.dtype == expected.dtype
        torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 3


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_few_samples_are_the_references(both, name, shape):
    logits = draw(*shape)
    logits[..., 1] = -math.inf
    before = logits.clone()
    for seed in (0, -1, 2**40 + 3):
        assert_same(*both(logits, seed=seed, **OPTIONS[name]))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_few_samples_of_other_dtypes(both, dtype):
    for num_tokens in (33, 100):
        assert_same(*both(draw(2, 6, num_tokens).to(dtype), seed=3, mask_id=5))


def test_few_samples_of_listed_rows(both):
    logits, rows = draw(3, 4, 70), torch.tensor([11, 0, 5, 5])
    assert_same(*both(logits, row_indices=rows, seed=3))
    assert_same(*both(logits.flatten(0, 1)[rows], row_indices=rows, seq_len=4, seed=3))
    strided = draw(3, 70, 4).mT
    assert_same(*both(strided, row_indices=rows, seed=3))


def test_few_samples_in_place(both):
    logits, rows = draw(3, 4, 20), torch.tensor([11, 0, 5])
    def out():
        return Sampled(torch.full((3, 4), 7), torch.full((3, 4), 0.5))

    written, _ = both(logits, row_indices=rows, seed=3, out=out())
    expected, _ = written, None


def test_rows_without_a_law_or_a_place_are_left_to_the_reference(both):
    for number in (math.nan, math.inf):
        logits = draw(2, 3, 40)
        logits[1, 1, 7] = number
        assert_same(*both(logits, seed=3, wants_numpy=False))
    logits[1, 1] = -math.inf
    assert_same(*both(logits, seed=3, wants_numpy=False))
    for row in (-1, 6, -(2**63), 2**63 - 1):
        rows = torch.tensor([2, row])
        assert_same(*both(draw(2, 3, 40), row_indices=rows, seed=3, wants_numpy=False))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.0},
        {"top_k": 1},
        {"with_margin": True},
        {"with_entropy": True},
        {"forbidden": torch.arange(40) == 3},
        {"kept_ids": torch.full((2, 3), 3)},
        {"temperature": torch.ones(2)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_rarer_options_are_left_to_the_reference(both, options):
    assert_same(*both(draw(2, 3, 40), seed=3, wants_numpy=False, **options))


def test_many_samples_are_left_to_the_reference(both):
    assert_same(*both(draw(2, 1025, 33), seed=3, wants_numpy=False))
    assert_same(*both(draw(1, 2, 4097), seed=3, wants_numpy=False))
