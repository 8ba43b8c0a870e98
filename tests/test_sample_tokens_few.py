"""On a CPU few rows are sampled in numpy; ids and figures are the reference's bit for bit."""

from __future__ import annotations

import math

import pytest
import torch

from fastmask import functional
from fastmask.records import Sampled, Sampling
from fastmask.reference import _few_samples_in_numpy

OPTIONS = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "nearly greedy": {"temperature": 1e-30},
    "as cold as can be": {"temperature": 1e-300},
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
    """A call's samples in numpy and without it; numpy has to have given the first, or not to."""

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
        assert (values is None and expected is None) or values.dtype == expected.dtype
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


def test_few_samples_of_the_largest_numbers(both):
    logits = torch.tensor([-3e38, 3e38, 0.0, 2.9e38, -math.inf]).expand(1, 4, 5)
    for options in ({}, {"top_k": 3}, {"temperature": 1e38}, {"temperature": 1e-38, "processed": True}):
        assert_same(*both(logits, seed=3, **options))


def test_few_samples_in_place(both):
    logits, rows = draw(3, 4, 20), torch.tensor([11, 0, 5])
    out = Sampled(torch.full((3, 4), 7), torch.full((3, 4), 0.5))
    is_sampled = torch.zeros(12, dtype=torch.bool).index_fill(0, rows, True).view(3, 4)
    sampled = functional.sample_tokens(logits, row_indices=rows, seed=3)
    assert both(logits, row_indices=rows, seed=3, out=out)[0] is out
    for written, values, before in zip(out[:2], sampled[:2], (7, 0.5), strict=True):
        assert torch.equal(written.flatten()[rows], values)
        assert (written[~is_sampled] == before).all()


def test_few_samples_of_logits_with_a_gradient(both):
    assert_same(*both(draw(2, 3, 40).requires_grad_(), seed=3))


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_rows_without_a_law_are_left_to_the_reference(both, number):
    logits = draw(2, 3, 40)
    logits[1, 1, 7] = number
    if number < 0:
        logits[1, 1] = number
    assert_same(*both(logits, seed=3, wants_numpy=False))


@pytest.mark.parametrize("row", [-1, 6, -(2**63), 2**63 - 1])
def test_what_is_no_row_among_few(both, row):
    logits, rows = draw(2, 3, 70), torch.tensor([2, row, 5])
    assert_same(*both(logits, row_indices=rows, seed=3))
    assert_same(*both(logits[0], row_indices=rows, seq_len=3, seed=3))
    outs = [Sampled(torch.full((2, 3), 7), torch.full((2, 3), 0.5)) for _ in range(2)]
    functional.sample_tokens(logits, row_indices=rows, seed=3, out=outs[0])
    functional.sample_tokens(logits, row_indices=torch.tensor([2, 5]), seed=3, out=outs[1])
    assert_same(*outs)


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


def test_every_option_is_sampled_here_or_refused():
    """A new one is not forgotten: ``takes`` refuses it, or it is among the options above."""
    sampled = {name for options in OPTIONS.values() for name in options} - {"step", "sample_offset"}
    refused = {"with_margin", "with_entropy", "forbidden"}
    assert sampled | refused == set(Sampling._fields)
