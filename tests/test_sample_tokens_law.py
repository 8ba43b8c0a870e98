"""The law of the samples, and that these tests can tell."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import draw
from sampling import NUM_LAW_TESTS, Door, assert_independent, assert_law, number_kept, probabilities, sample_ids
from scipy import stats
from x_transformers import nonautoregressive_wrapper as upstream

OPERATION = "sample_tokens"


@pytest.fixture
def law_door(reference):
    """Laws are shown on the reference; a kernel is held to it id by id."""
    return Door(reference)


@pytest.mark.parametrize("filter_thres", [None, 0.7])
@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("vocabulary", [2, 5, 64, 65])
def test_law_of_small_vocabularies(law_door, vocabulary, temperature, filter_thres):
    logits = draw(vocabulary, seed=vocabulary)
    options = {"temperature": temperature, "top_k": number_kept(filter_thres, vocabulary), "mask_id": vocabulary // 2}
    ids = sample_ids(law_door, logits, 8000, **options)
    assert_law(np.bincount(ids, minlength=vocabulary), probabilities(logits, **options))


@pytest.mark.parametrize("filter_thres", [None, 0.5])
@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0])
@pytest.mark.parametrize(("vocabulary", "top_p"), [(6, 0.8), (65, 0.5), (65, 0.95)])
def test_law_of_the_nucleus(law_door, vocabulary, top_p, temperature, filter_thres):
    """At temperature 1 whatever the sample's, and of what the other filter keeps."""
    logits = draw(vocabulary, seed=vocabulary)
    top_k = number_kept(filter_thres, vocabulary)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "forbidden": [1, 4]}
    ids = sample_ids(law_door, logits, 8000, **options)
    law = probabilities(logits, **options)
    assert (law > 0).sum() < vocabulary - 2
    assert_law(np.bincount(ids, minlength=vocabulary), law)


def test_law_of_the_nucleus_where_the_tail_has_the_mass(law_door):
    """A third of it lies on twenty ids, the rest on 50237 of p ~ 1e-5."""
    logits = torch.zeros(50257)
    logits[::2513] = math.log(50257 / 40)
    for top_p, number in ((0.1, 20), (0.9, 50257)):
        options = {"top_p": top_p, "temperature": 1.5}
        ids, law = sample_ids(law_door, logits, 600, **options), probabilities(logits, **options)
        assert (law > 0).sum() == number  # of ties all stay
        bins = np.where(np.arange(50257) % 2513 == 0, 8, np.arange(50257) * 8 // 50257)
        assert_law(np.bincount(bins[ids], minlength=9), np.bincount(bins, law))


def test_the_joint_law_of_two_positions(law_door):
    logits = torch.stack([draw(5, seed=5), draw(5, seed=6)])
    options = {"temperature": 0.7, "top_p": 0.9}
    ids = law_door.sample_tokens(logits.expand(10000, 2, 5), seed=2, **options).ids.numpy()
    laws = [probabilities(row, **options) for row in logits]
    assert_law(np.bincount(ids[:, 0] * 5 + ids[:, 1], minlength=25), np.outer(*laws).flatten())


LARGE = [
    *itertools.product([4096, 4097, 8192], [0.1, 0.7, 1.0, 2.0], [None], [4000]),
    *itertools.product([4097, 8192], [0.7], [0.7], [4000]),
    *itertools.product([50257], [1.0], [None, 0.9], [1400]),
]


@pytest.mark.parametrize(("vocabulary", "temperature", "filter_thres", "draws"), LARGE)
def test_law_over_tiles_sub_tiles_and_elements(law_door, vocabulary, temperature, filter_thres, draws):
    logits = draw(vocabulary, seed=vocabulary, scale=1.5)
    options = {"temperature": temperature, "top_k": number_kept(filter_thres, vocabulary), "mask_id": 100}
    ids = sample_ids(law_door, logits, draws, **options)
    law = probabilities(logits, **options)
    assert (law[ids] > 0).all()
    every = np.arange(vocabulary)
    for level in (every // 4096, every // 64 % 64, every % 64, every // 64, every):
        bins = level.max() + 1
        assert_law(np.bincount(level[ids], minlength=bins), np.bincount(level, law, minlength=bins))


@pytest.mark.parametrize("level", ["tiles", "sub-tiles", "elements"])
def test_law_where_the_mass_is_spread_over_one_level(law_door, level):
    """Two ids in each of three groups hold nearly all the mass: the groups race with their sums."""
    vocabulary = 3 * 4096
    places = {"tiles": [5, 6, 4096, 8000, 8192, 12287], "sub-tiles": [0, 63, 64, 127, 640, 641]}
    places = {**places, "elements": [4096, 4100, 4110, 4120, 4130, 4159]}[level]
    logits = torch.full((vocabulary,), -14.0)  # 12288 e^-14 = 1 % of the mass of one of the places
    logits[places] = torch.tensor([0.0, -0.5, 0.3, 0.3, -1.0, 0.5])
    ids = sample_ids(law_door, logits, 4000)
    index = np.full(vocabulary, len(places))
    index[places] = np.arange(len(places))
    law = np.bincount(index, probabilities(logits))
    assert_law(np.bincount(index[ids], minlength=len(law)), law)


def test_levels_are_independent(law_door):
    ids = sample_ids(law_door, torch.zeros(2 * 4096), 4000)
    tile, sub_tile, element = ids // 4096, ids // 64 % 64, ids % 64
    assert_independent(tile, sub_tile // 4, 2, 16)
    assert_independent(tile, element // 4, 2, 16)
    assert_independent(sub_tile // 8, element // 8, 8, 8)
    assert_independent(sub_tile % 8, element % 8, 8, 8)


def assert_rate(hits, draws, rate):
    """A tail of this mass was drawn so often."""
    assert stats.binomtest(int(hits), draws, rate).pvalue > 1e-3 / NUM_LAW_TESTS, (hits, rate * draws)
    assert 0.5 < hits / (rate * draws) < 2.0


@pytest.mark.parametrize(
    ("vocabulary", "gap", "draws"),
    [
        (64, 9.21, 20000),  # 63 ids of p 1e-4 in the head's own sub-tile: about 125 of 20000 draws
        (64, 11.51, 50000),  # of p 1e-5: about 31 of 50000
        (4096, 13.82, 10000),  # 4095 ids of p 1e-6, nearly all in other sub-tiles: about 41 of 10000
        (131072, 16.12, 2000),  # 131071 ids of p 1e-7, nearly all in other tiles: about 26 of 2000
    ],
)
def test_the_tail_is_drawn_at_its_rate(law_door, vocabulary, gap, draws):
    logits = torch.full((vocabulary,), -gap)
    logits[1] = 0.0
    ids = sample_ids(law_door, logits, draws, seed=3)
    assert_rate((ids != 1).sum(), draws, 1 - probabilities(logits)[1])
    # And evenly over the vocabulary, not at a few ids that one uniform's steps favour.
    quarter = np.arange(vocabulary) * 4 // vocabulary
    tail = np.bincount(quarter) - (np.arange(4) == 0)
    assert_law(np.bincount(quarter[ids[ids != 1]], minlength=4), tail / tail.sum(), effect=0.5)


def test_draws_are_independent(law_door):
    """Of positions, samples, steps, seeds, and of the noise on the scores."""
    logits, rows = draw(5, seed=5), 6000

    def ids(**options):
        return law_door.sample_tokens(logits.expand(rows, 2, 5), **{"seed": 1, **options}).ids

    first = ids()
    others = [
        (first[:, 0], first[:, 1]),
        (first[:-1, 0], first[1:, 0]),
        (first[:, 0], ids(step=1)[:, 0]),
        (first[:, 0], ids(seed=2)[:, 0]),
        (first[:, 0], ids(sample_offset=rows)[:, 0]),
    ]
    for a, b in others:
        assert_independent(a, b, 5, 5)
    noise = law_door.critic_remask_keys(torch.zeros(rows, 2), noise_scale=1.0, seed=1)
    quartile = np.searchsorted([-0.327, 0.367, 1.246], noise[:, 0].numpy())
    assert_independent(first[:, 0], quartile, 5, 4)


# ---- the gate can tell ----


def gumbel_ids(logits, draws, chunk=40):
    """Upstream's sampler: one Gumbel variable for each logit, in the logits' dtype."""
    torch.manual_seed(0)
    return torch.cat([upstream.gumbel_sample(logits.expand(chunk, -1)) for _ in range(draws // chunk)]).numpy()


def test_the_gate_can_tell(law_door):
    """Upstream's sampler on bfloat16 logits, all equal over 50257 ids, fails what ours passes."""
    logits, draws = torch.zeros(50257, dtype=torch.bfloat16), 1200
    bins = np.arange(50257) * 8 // 50257
    law = np.bincount(bins) / 50257
    ours, theirs = sample_ids(law_door, logits, draws), gumbel_ids(logits, draws)
    error = 50257 / math.sqrt(12 * draws)  # of the mean of so many uniform ids
    assert abs(ours.mean() - 25128) < 4 * error
    assert abs(theirs.mean() - 25128) > 50 * error
    assert_law(np.bincount(bins[ours], minlength=8), law)
    with pytest.raises(AssertionError):
        assert_law(np.bincount(bins[theirs], minlength=8), law)


def gumbel(uniform):
    return -np.log(-np.log(uniform))


def float32_gumbel_hits(tail, gap, draws, bits):
    """How often one of ``tail`` ids beats a head ``gap`` above them, by Gumbel-max of uniforms of so many bits.

    The largest of the tail's uniforms is drawn at once, by its own law: the same outcome as of a uniform for each id.
    """
    random, steps = np.random.default_rng(0), 2.0**bits
    largest = np.floor(random.random(draws) ** (1 / tail) * steps) / steps
    return (gumbel(largest.clip(max=1 - 1 / steps)) - gap > gumbel(random.random(draws))).sum()


def test_the_gate_can_tell_24_bit_uniforms(law_door):
    """At a logit gap of 18 they give a twelfth of the tail's mass: their Gumbel noise ends at 16.6."""
    tail, gap, draws = 131071, 18.0, 10000
    rate = 1 / (1 + math.exp(gap) / tail)  # about 20 of the draws
    logits = torch.full((tail + 1,), -gap)
    logits[1] = 0.0
    assert_rate((sample_ids(law_door, logits, draws, seed=3) != 1).sum(), draws, rate)
    assert_rate(float32_gumbel_hits(tail, gap, draws, bits=50), draws, rate)
    with pytest.raises(AssertionError):
        assert_rate(float32_gumbel_hits(tail, gap, draws, bits=24), draws, rate)


@pytest.mark.parametrize("wrong", ["temperature", "shifted", "mask_id"])
def test_the_gate_can_tell_small_errors(law_door, wrong):
    logits = draw(5, seed=5)
    ids = sample_ids(law_door, logits, 20000, temperature=0.7)
    law = {
        "temperature": probabilities(logits, 0.75),
        "shifted": np.roll(probabilities(logits, 0.7), 1),
        "mask_id": probabilities(logits, 0.7, mask_id=0),
    }[wrong]
    with pytest.raises(AssertionError):
        assert_law(np.bincount(ids, minlength=5), law)
