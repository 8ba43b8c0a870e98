"""A demasking step: the law of the samples, their probabilities, the scores and the choice of what to remask."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import draw, filtered
from scipy import stats
from x_transformers import nonautoregressive_wrapper as upstream

from fastmask import _streams as streams
from fastmask import functional
from fastmask.reference import philox

OPERATION = "demask"


class Door:
    """The public functions on one backend."""

    def __init__(self, backend):
        self.backend = backend

    def __getattr__(self, name):
        return partial(self.backend.run, getattr(functional, name))

    def rows(self, wanted: int, few: int = 3) -> int:
        """As many as a test wants; few in the interpreter, which takes a fiftieth of a second for each."""
        return few if self.backend.name == "interpreter" else wanted


@pytest.fixture
def door(backend):
    return Door(backend)


@pytest.fixture
def law_door(reference):
    """Laws are shown on the reference; a kernel is held to it id by id."""
    return Door(reference)


def probabilities(logits, temperature=1.0, **filters) -> np.ndarray:
    """The law of one row [V] in float64."""
    z = filtered(logits, **filters)
    weights = np.exp((z - z.max()) / temperature)
    return weights / weights.sum()


NUM_LAW_TESTS = 300  # Bonferroni: what all calls of assert_law of this file share


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


# ---- the law ----


@pytest.mark.parametrize("filter_thres", [None, 0.7])
@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0])
@pytest.mark.parametrize("vocabulary", [2, 5, 64, 65])
def test_law_of_small_vocabularies(law_door, vocabulary, temperature, filter_thres):
    logits = draw(vocabulary, seed=vocabulary)
    options = {"temperature": temperature, "filter_thres": filter_thres, "mask_id": vocabulary // 2}
    ids = sample_ids(law_door, logits, 8000, **options)
    assert_law(np.bincount(ids, minlength=vocabulary), probabilities(logits, **options))


@pytest.mark.parametrize("filter_thres", [None, 0.5])
@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0])
@pytest.mark.parametrize(("vocabulary", "top_p"), [(6, 0.8), (65, 0.5), (65, 0.95)])
def test_law_of_the_nucleus(law_door, vocabulary, top_p, temperature, filter_thres):
    """At temperature 1 whatever the sample's, and of what the other filter keeps."""
    logits = draw(vocabulary, seed=vocabulary)
    options = {"temperature": temperature, "filter_thres": filter_thres, "top_p": top_p, "forbidden": [1, 4]}
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
    options = {"temperature": temperature, "filter_thres": filter_thres, "mask_id": 100}
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
    noise = law_door.critic_scores(torch.zeros(rows, 2), noise_scale=1.0, seed=1)
    quartile = np.searchsorted([-0.327, 0.367, 1.246], noise[:, 0].numpy())
    assert_independent(first[:, 0], quartile, 5, 4)


# ---- the contract of the random numbers ----


def race(row, seed, position, sample, step):
    """DESIGN 3.6 word for word, on float64 weights [V]: tiles, sub-tiles and ids race for argmax w / E.

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


@pytest.mark.parametrize(("vocabulary", "temperature"), [(50, 1.0), (300, 0.5), (9000, 2.0), (8192, 1.0)])
def test_ids_are_those_of_the_contract(door, vocabulary, temperature):
    seed, step, offset = 2**40 + 12345, 7, 2**33 % (2**32) + 2**31  # words beyond 31 bits
    logits = draw(2, 8, vocabulary, seed=vocabulary)
    options = {"temperature": temperature, "mask_id": 3}
    ids = door.sample_tokens(logits, seed=seed, step=step, sample_offset=offset, **options).ids
    for b, n in itertools.product(range(2), range(8)):
        row = probabilities(logits[b, n], **options)
        assert ids[b, n] == race(row, seed, n, offset + b, step)[0]


@pytest.mark.parametrize("position", [398339, 499918])
def test_a_race_is_decided_by_64_bits(door, position):
    """At these positions of seed 0 one id has an exponential near 3e-9 or 1e-8, found by search over 2**25 ids.

    A uniform of 24 or 32 bits would move the gap to the head at which that id stops winning.
    """
    rare = {398339: 42, 499918: 2}[position]
    elements = torch.tensor([0, rare])
    high, low, _, _ = philox.draw(torch.tensor(0), streams.ELEMENT_RACE, position=position, element=elements)
    uniform = [(int(h) * 2**32 + int(low_) + 0.5) / 2**64 for h, low_ in zip(high, low, strict=True)]
    assert int(high[1]) < 64
    head, tail = (-math.log1p(-v) for v in uniform)
    for margin, winner in ((-0.001, rare), (0.001, 0)):
        logits = torch.full((1, 64), -math.inf)
        logits[0, 0], logits[0, rare] = 0.0, -(math.log(head / tail) + margin)
        out = door.sample_tokens(logits, row_indices=torch.tensor([position]), seq_len=2**20, seed=0)
        assert out.ids.item() == winner


def test_the_same_seed_gives_the_same_ids(door):
    logits = draw(3, door.rows(50, few=5), 100)

    def ids(**options):
        return door.sample_tokens(logits, **options).ids

    first = ids(seed=5)
    assert torch.equal(first, ids(seed=5))
    assert torch.equal(first, ids(seed=torch.tensor(5)))
    for other in ({"seed": 6}, {"seed": 5 + 2**32}, {"seed": 5, "step": 1}, {"seed": 5, "sample_offset": 3}):
        assert (first != ids(**other)).float().mean() > 0.5
    # Nor do rows of one law repeat each other.
    ids_of_one_law = door.sample_tokens(torch.zeros_like(logits), seed=5).ids
    assert ids_of_one_law.unique().numel() > 0.4 * ids_of_one_law.numel()


def test_any_split_of_a_batch_gives_the_same_ids(door):
    length = door.rows(9, few=2)
    logits = draw(6, length, 5000)
    options = {"temperature": 0.8, "filter_thres": 0.5, "mask_id": 7, "seed": 11, "step": 2}
    whole = door.sample_tokens(logits, sample_offset=40, **options)
    parts = [
        door.sample_tokens(logits[start:stop], sample_offset=40 + start, **options)
        for start, stop in [(0, 1), (1, 4), (4, 6)]
    ]
    assert torch.equal(whole.ids, torch.cat([part.ids for part in parts]))
    assert torch.equal(whole.log_probs, torch.cat([part.log_probs for part in parts]))
    rows = torch.tensor([6 * length - 1, 0, length + 1, length])  # any order
    compact = door.sample_tokens(
        logits.flatten(0, 1)[rows], row_indices=rows, seq_len=length, sample_offset=40, **options
    )
    assert torch.equal(compact.ids, whole.ids.flatten()[rows])
    assert torch.equal(compact.log_probs, whole.log_probs.flatten()[rows])


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_rows_across_the_references_chunks_and_blocks(law_door, temperature, monkeypatch):
    """Seven rows of all kinds in chunks of three and blocks of two are the seven rows at once."""
    logits, kept = draw(1, 7, 5000), torch.full((1, 7), -1)
    logits[0, 2, 9], logits[0, 5], kept[0, 4] = math.nan, -math.inf, 8
    options = {"temperature": temperature, "filter_thres": 0.5, "with_margin": True, "with_entropy": True, "seed": 4}
    at_once = law_door.sample_tokens(logits, kept_ids=kept, **options)
    module = law_door.backend.module("demask")
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 3 * 5000)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 2 * 5000 // torch.get_num_threads())
    for ours, theirs in zip(law_door.sample_tokens(logits, kept_ids=kept, **options), at_once, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert at_once.ids[0, 4] == 8
    assert at_once.log_probs[0].isnan().nonzero().flatten().tolist() == [2, 5]


def test_the_filter_where_small_numbers_are_flushed_to_0(law_door):
    """What goes may differ from what stays by less than the smallest normal number."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        out = law_door.sample_tokens(torch.tensor([[[1.2e-38, 1.3e-38, 0.0, -1.0]]]), filter_thres=0.75, seed=0)
    finally:
        torch.set_flush_denormal(False)
    assert (out.ids.item(), out.log_probs.item()) == (1, 0.0)


# ---- temperature 0, and rows without a law ----


def test_temperature_0_is_the_argmax_with_ties_to_the_lower_id(door):
    logits = torch.tensor([[[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 2.0, 5.0]]])

    def ids(**options):
        return door.sample_tokens(logits, temperature=0.0, **options).ids.tolist()

    assert ids() == ids(seed=9, filter_thres=0.9) == [[1, 0, 3]]
    assert ids(mask_id=1) == [[2, 0, 3]]
    assert ids(mask_id=0) == [[1, 1, 3]]
    assert ids(mask_id=3) == [[1, 0, 2]]
    out = door.sample_tokens(logits, temperature=0.0)
    torch.testing.assert_close(out.log_probs, logits.log_softmax(-1).amax(-1))


def test_a_tie_far_apart_goes_to_the_lower_id(door):
    logits = torch.zeros(1, 1, 9000)
    logits[0, 0, [4095, 4096, 8999]] = 1.0
    assert door.sample_tokens(logits, temperature=0.0).ids.item() == 4095


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-45, 5e-324])
def test_a_temperature_near_0_is_uniform_over_the_largest(door, temperature):
    logits = draw(1, door.rows(60, few=8), 300).clamp(max=3.0)
    logits[..., 0], logits[..., [7, 250]] = 9.5, 9.0
    out = door.sample_tokens(logits, temperature=temperature, mask_id=0, seed=0)
    assert out.ids.unique().tolist() == [7, 250]


LAWLESS = {
    "nan": [0.0, 1.0, math.nan, 2.0],
    "all -inf": [-math.inf] * 4,
    "+inf": [0.0, math.inf, 1.0, 2.0],
    "two +inf": [math.inf, 0.0, math.inf, 0.0],
    "nan and -inf": [-math.inf, -math.inf, -math.inf, math.nan],
}


@pytest.mark.parametrize("filter_thres", [None, 0.5])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("mask_id", "lowest"), [(None, 0), (3, 0), (0, 1), (4, 0), (-1, 0)])
def test_a_row_without_a_law_gives_the_lowest_allowed_id(door, mask_id, lowest, temperature, filter_thres):
    healthy = [0.0, 0.5, 5.0, 1.0]
    logits = torch.tensor([[row for lawless in LAWLESS.values() for row in (healthy, lawless)]])
    options = {"temperature": temperature, "mask_id": mask_id, "filter_thres": filter_thres, "seed": 1}
    out = door.sample_tokens(logits, **options)
    assert out.ids[0, 1::2].tolist() == [lowest] * len(LAWLESS), list(LAWLESS)
    assert out.log_probs[0, 1::2].isnan().all(), list(LAWLESS)
    alone = door.sample_tokens(logits[0, ::2], row_indices=torch.arange(0, 10, 2), seq_len=10, **options)
    assert torch.equal(out.ids[0, ::2], alone.ids)
    assert torch.equal(out.log_probs[0, ::2], alone.log_probs)


@pytest.mark.parametrize("content", [math.nan, math.inf, 1e30])
def test_the_masks_column_does_not_matter(door, content):
    logits = draw(2, door.rows(20), 6)
    options = {"mask_id": 2, "filter_thres": 0.4, "temperature": 1.3, "seed": 3}
    expected = door.sample_tokens(logits, **options)
    logits[..., 2] = content
    out = door.sample_tokens(logits, **options)
    assert torch.equal(out.ids, expected.ids)
    assert torch.equal(out.log_probs, expected.log_probs)


@pytest.mark.parametrize("temperature", [0.0, 0.1, 1.0, 2.0])
def test_a_row_with_one_finite_logit(door, temperature):
    for vocabulary, only in ((4, 0), (4, 3), (9000, 4096), (9000, 8999)):
        logits = torch.full((1, door.rows(30, few=2), vocabulary), -math.inf)
        logits[..., only] = -50.0
        for filter_thres in (None, 0.5):
            out = door.sample_tokens(logits, temperature=temperature, filter_thres=filter_thres, seed=0, mask_id=1)
            assert (out.ids == only).all()
            assert not out.log_probs.any()


@pytest.mark.parametrize("temperature", [0.0, 1.0, 2.0])
def test_vocabularies_of_one_and_two(door, temperature):
    out = door.sample_tokens(torch.full((1, 3, 1), 7.0), temperature=temperature, seed=0)
    assert (out.ids.tolist(), out.log_probs.tolist()) == ([[0, 0, 0]], [[0.0, 0.0, 0.0]])
    out = door.sample_tokens(torch.zeros(1, 1, 1), temperature=temperature, mask_id=0, seed=0)
    assert out.ids.item() == 0
    assert out.log_probs.isnan().all()
    out = door.sample_tokens(torch.zeros(1, door.rows(30), 2), temperature=temperature, mask_id=0, seed=0)
    assert (out.ids == 1).all()
    assert not out.log_probs.any()


def test_mask_id_is_never_sampled(door):
    for mask_id in (0, 2, 4):
        logits = torch.zeros(2, door.rows(1000, few=20), 5)
        logits[..., mask_id] = 20.0
        ids = door.sample_tokens(logits, mask_id=mask_id, seed=0).ids
        assert sorted(ids.unique().tolist()) == [v for v in range(5) if v != mask_id]


@pytest.mark.parametrize("shape", [(0, 4, 6), (3, 0, 6)], ids=str)
def test_empty_batches(door, shape):
    out = door.sample_tokens(torch.zeros(shape), filter_thres=0.5, seed=0)
    assert (out.ids.shape, out.ids.dtype) == (shape[:2], torch.int64)
    assert (out.log_probs.shape, out.log_probs.dtype) == (shape[:2], torch.float32)
    compact = door.sample_tokens(torch.zeros(0, 6), row_indices=torch.zeros(0).long(), seq_len=4, seed=0)
    assert compact.ids.shape == (0,)
    linear = door.linear_sample_tokens(torch.zeros(*shape[:2], 2), torch.zeros(6, 2), seed=0)
    assert linear.ids.shape == shape[:2]


# ---- probabilities ----


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("filter_thres", [None, 0.7])
@pytest.mark.parametrize("vocabulary", [6, 507, 5000])
def test_log_probs_are_unheated_over_what_the_filter_keeps(door, vocabulary, filter_thres, dtype):
    length = door.rows(20, few=1)
    logits = draw(3, length, vocabulary, scale=3.0, dtype=dtype)
    options = {"filter_thres": filter_thres, "mask_id": 1}
    out = door.sample_tokens(logits, temperature=1.7, seed=2, **options)
    assert out.log_probs.dtype == torch.float32
    laws = np.stack([probabilities(row.float(), **options) for row in logits.flatten(0, 1)])
    expected = torch.from_numpy(laws[np.arange(3 * length), out.ids.flatten()]).log().float().view(3, length)
    assert expected.isfinite().all()
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-6, atol=1e-6)


def test_16_bit_logits_are_the_same_numbers_in_float32(door):
    for dtype in (torch.bfloat16, torch.float16):
        logits = draw(2, door.rows(30), 300, dtype=dtype)
        half, single = (door.sample_tokens(z, filter_thres=0.6, seed=3) for z in (logits, logits.float()))
        assert torch.equal(half.ids, single.ids)
        # A kernel sums the two in another order, since it loads them by 16 bytes.
        torch.testing.assert_close(half.log_probs, single.log_probs, rtol=1e-6, atol=0.0)


def test_kept_ids_are_kept_with_their_probability(door):
    logits = draw(2, 10, 12)
    options = {"temperature": 0.6, "filter_thres": 0.5, "mask_id": 4, "seed": 8}
    kept = torch.full((2, 10), -1)
    kept[0], kept[1, 0] = torch.arange(10), -100
    sampled, out = door.sample_tokens(logits, **options), door.sample_tokens(logits, kept_ids=kept, **options)
    assert torch.equal(out.ids[0], kept[0])
    assert torch.equal(out.ids[1], sampled.ids[1])
    assert torch.equal(out.log_probs[1], sampled.log_probs[1])
    laws = np.stack([probabilities(row, filter_thres=0.5, mask_id=4) for row in logits[0]])
    expected = torch.from_numpy(laws[np.arange(10), np.arange(10)]).log().float()
    torch.testing.assert_close(out.log_probs[0], expected, rtol=1e-6, atol=1e-6)
    assert expected.isinf().sum() >= 3
    assert out.log_probs[0, 4] == -math.inf  # the mask's own id


def test_a_kept_id_of_a_row_without_a_law_stays(door):
    logits = torch.tensor([[[0.0, math.nan, 1.0]]])
    out = door.sample_tokens(logits, kept_ids=torch.tensor([[2]]), seed=0)
    assert out.ids.item() == 2
    assert out.log_probs.isnan().all()


# ---- the filter ----


@pytest.mark.ptx  # a row of 20 bytes that is read by 16
def test_filter_over_rows_with_few_finite_logits(door):
    logits = torch.full((10,), -math.inf)
    logits[[2, 5]] = torch.tensor([1.0, 0.0])
    out = door.sample_tokens(logits.expand(2, door.rows(100, few=8), 10), filter_thres=0.5, seed=0)
    assert sorted(out.ids.unique().tolist()) == [2, 5]


def test_samples_come_from_the_survivors_only(law_door):
    logits = draw(10, seed=1)
    for thres, number in ((0.7, 4), (0.9, 1), (0.5, 5)):  # (1 - .7) 10 is a little more than 3
        ids = sample_ids(law_door, logits, 2000, temperature=50.0, filter_thres=thres)
        assert sorted(np.unique(ids)) == sorted(logits.topk(number).indices.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_filter_without_numpy_is_the_same(reference, dtype, monkeypatch):
    door = Door(reference)
    logits = draw(4, 30, 507, dtype=dtype)  # bfloat16: with ties
    options = {"filter_thres": 0.7, "mask_id": 3, "seed": 1}
    with_numpy = door.sample_tokens(logits, **options)
    monkeypatch.setattr(reference.module("top_k_filter"), "np", None)
    without = door.sample_tokens(logits, **options)
    assert torch.equal(with_numpy.ids, without.ids)
    assert torch.equal(with_numpy.log_probs, without.log_probs)


def test_top_p_of_1_keeps_all_and_0_the_largest(door):
    logits = torch.cat([draw(1, 2, 40), torch.full((1, 2, 3), -100.0)], -1)
    everything, free = (door.sample_tokens(logits, top_p=p, seed=1, temperature=3.0) for p in (1.0, None))
    assert torch.equal(everything.ids, free.ids)
    assert torch.equal(everything.log_probs, free.log_probs)
    largest = door.sample_tokens(logits, top_p=0.0, seed=1, temperature=3.0)
    assert torch.equal(largest.ids, logits.argmax(-1))
    assert not largest.log_probs.any()


@pytest.mark.parametrize("content", [math.nan, math.inf, -math.inf])
def test_the_filters_end_on_rows_without_a_law(door, content):
    logits = draw(1, 1, 8300)
    logits[..., 1:] = content
    for options in ({"filter_thres": 0.7}, {"top_p": 0.6}, {"filter_thres": 0.7, "top_p": 0.6}):
        out = door.sample_tokens(logits, seed=1, mask_id=0, **options)
        assert out.ids.item() == 1
        assert out.log_probs.isnan().all()


# ---- margins and entropies ----


def figures_of(door, logits, **options):
    """Margins and entropies of rows [M, V], with their oracle's."""
    out = door.sample_tokens(logits[None], seed=1, with_margin=True, with_entropy=True, **options)
    options.pop("temperature", None)
    laws = np.stack([probabilities(row, **options) for row in logits])
    largest = np.sort(np.concatenate([laws, np.zeros((len(laws), 1))], 1))
    entropies = -(laws * np.log(np.maximum(laws, 1e-300))).sum(1)
    return (out.margins[0], torch.from_numpy(largest[:, -1] - largest[:, -2])), (
        out.entropies[0], torch.from_numpy(entropies),
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.0, "mask_id": 1},
        {"temperature": 0.5, "filter_thres": 0.7},
        {"temperature": 2.0, "top_p": 0.6, "forbidden": [0, 3]},
    ],
    ids=str,
)
@pytest.mark.parametrize("vocabulary", [6, 507, 4097])
def test_margins_and_entropies_are_those_of_the_unheated_filtered_law(door, vocabulary, options):
    for dtype in (torch.float32, torch.bfloat16):
        logits = draw(2, vocabulary, seed=vocabulary, dtype=dtype) * torch.tensor([[0.5], [6.0]], dtype=dtype)
        for ours, theirs in figures_of(door, logits, **options):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours.double(), theirs, rtol=3e-6, atol=1e-6)


CLOSE = [(2, 0, 1), (9001, 7, 5), (9001, 8191, 8192), (9001, 100, 9000), (8192, 0, 8191), (507, 506, 505)]


@pytest.mark.parametrize(("vocabulary", "first", "second"), CLOSE)
def test_close_margins_are_relatively_accurate(door, vocabulary, first, second):
    """The two best in one sub-tile, in two tiles, at a row's edges; 1e-6 to 40 apart; a tie is 0."""
    rows = draw(4, vocabulary, seed=1)
    rows[:, first] = 30.0
    rows[:, second] = torch.tensor([30.0, math.nextafter(30.0, 0.0) - 2e-6, 29.999, -10.0])
    (ours, theirs), _ = figures_of(door, rows)
    assert ours[0] == 0
    assert 0 < theirs[1] < 2e-6
    torch.testing.assert_close(ours.double(), theirs, rtol=2e-6, atol=0.0)


def test_margins_and_entropies_at_their_ends(door):
    """One id left; all alike; no law; no row."""
    rows = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0], [0.0, math.nan, 1.0], [0.0, 1.0, 2.0]])
    options = {"seed": 1, "with_margin": True, "with_entropy": True, "seq_len": 2}
    indices = torch.tensor([0, 1, 2, -1])
    out = door.sample_tokens(rows, row_indices=indices, mask_id=2, forbidden=[0], **options)
    assert out.margins.tolist() == pytest.approx([1.0, 1.0, math.nan, 0.0], nan_ok=True, abs=0.0)
    assert out.entropies.tolist() == pytest.approx([0.0, 0.0, math.nan, 0.0], nan_ok=True, abs=0.0)
    out = door.sample_tokens(rows, row_indices=indices, **options)
    assert out.margins[1] == 0
    assert out.entropies[1].item() == pytest.approx(math.log(3), rel=1e-6)
    assert door.sample_tokens(rows[:1, None, :1], with_margin=True, seed=0).margins.tolist() == [[1.0]]
    only = door.sample_tokens(rows[:1, None], with_margin=True, seed=0)
    assert only.entropies is None
    assert functional.sample_tokens(rows[:1, None], with_entropy=True).margins is None


# ---- forbidden ids ----


def test_forbidden_ids_are_never_sampled(law_door):
    logits, forbidden = torch.zeros(4100), [0, 7, 4095, 4096, 4099]
    logits[forbidden] = 20.0
    for temperature in (0.0, 0.5, 1.0, 30.0):
        ids = sample_ids(law_door, logits, 400, temperature=temperature, forbidden=forbidden, mask_id=8)
        assert not np.isin(ids, [*forbidden, 8]).any()


def test_forbidden_ids_may_be_listed_or_marked(door):
    """And leave the law of a row in which they are -inf, the mask's id besides."""
    logits, marked = draw(2, door.rows(20, few=2), 70), torch.zeros(70).bool()
    marked[[0, 9, 69]] = True
    options = {"filter_thres": 0.5, "temperature": 1.3, "seed": 3, "with_margin": True, "with_entropy": True}
    expected = door.sample_tokens(logits.masked_fill(marked, -math.inf), mask_id=5, **options)
    strided = torch.stack([marked, ~marked], -1)[:, 0]
    assert not strided.is_contiguous()
    for forbidden in ([0, 9, 69], (69, 0, 9, 9), marked, strided, np.array([0, 9, 69])):
        out = door.sample_tokens(logits, mask_id=5, forbidden=forbidden, **options)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
    nothing, free = (door.sample_tokens(logits, forbidden=none, **options) for none in ([], None))
    assert torch.equal(nothing.ids, free.ids)


@pytest.mark.parametrize(
    ("forbidden", "mask_id", "lowest"),
    [([0], None, 1), ([0, 1], 2, 3), ([0, 2], 1, 3), ([1, 2], 0, 3), ([3], 0, 1), ([0, 1, 2, 3], None, 0),
     ([0, 1, 2], 3, 0), ([], 0, 1), ([0, 1, 2], 4, 3)],
)  # fmt: skip
def test_the_lowest_allowed_id_of_a_row_without_a_law(door, forbidden, mask_id, lowest):
    """0 where none is allowed."""
    logits = torch.tensor([[[math.nan] * 4, [-math.inf] * 4]])
    out = door.sample_tokens(logits, mask_id=mask_id, forbidden=forbidden, seed=1)
    assert out.ids.tolist() == [[lowest] * 2]
    assert out.log_probs.isnan().all()
    healthy = door.sample_tokens(torch.zeros(1, 1, 4), mask_id=mask_id, forbidden=forbidden, seed=1)
    assert healthy.log_probs.isnan().any() == (len({*forbidden, mask_id} & {0, 1, 2, 3}) == 4)


def test_a_forbidden_id_may_be_kept_and_has_no_probability(door):
    kept_ids = torch.tensor([[2, 1]])
    out = door.sample_tokens(torch.zeros(1, 2, 4), forbidden=[2], kept_ids=kept_ids, seed=1)
    assert torch.equal(out.ids, kept_ids)
    torch.testing.assert_close(out.log_probs, torch.tensor([[-math.inf, -math.log(3)]]))


# ---- the head ----


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_sample_tokens_is_sample_tokens_of_the_logits(door, monkeypatch, with_bias):
    monkeypatch.setattr(door.backend.module("demask"), "HEAD_CHUNK_ROWS", 7)
    monkeypatch.setattr(door.backend.module("demask"), "_CHUNK_ELEMENTS", 1, raising=False)  # the reference's
    # Small integers: their products are exact in whatever order they are summed.
    integers = torch.Generator().manual_seed(0)
    length = door.rows(10)
    shapes = (4, length, 6), (300, 6)
    embeddings, weight = (torch.randint(-2, 3, shape, generator=integers).float() for shape in shapes)
    bias = torch.randint(-2, 3, (300,), generator=integers).float() if with_bias else None
    number = torch.arange(4 * length).view(4, length)
    kept = torch.where(number % 3 == 0, number, -1)
    logits = F.linear(embeddings, weight, bias)
    for options in ({}, {"temperature": 0.0}, {"temperature": 0.5, "filter_thres": 0.9, "kept_ids": kept}):
        options = {"seed": 3, "step": 4, "sample_offset": 5, "mask_id": 2, **options}
        ours = door.linear_sample_tokens(embeddings, weight, bias=bias, **options)
        theirs = door.sample_tokens(logits, **options)
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.log_probs, theirs.log_probs)
    rows = torch.tensor([11, 4, 8, 0, 1, 2, 3, 9])
    compact = door.linear_sample_tokens(
        embeddings.flatten(0, 1)[rows], weight, bias=bias, row_indices=rows, seq_len=length, seed=3
    )
    whole = door.sample_tokens(logits, seed=3)
    assert torch.equal(compact.ids, whole.ids.flatten()[rows])


def test_linear_sample_tokens_in_bfloat16_and_under_autocast(door, backend):
    embeddings, weight = draw(2, 8, 4, dtype=torch.bfloat16), draw(20, 4, seed=1, dtype=torch.bfloat16)
    half = door.linear_sample_tokens(embeddings, weight, seed=0)
    with torch.autocast(backend.device.type, torch.bfloat16):
        cast = door.linear_sample_tokens(embeddings.float(), weight.float(), seed=0)
    assert torch.equal(half.ids, cast.ids)
    assert half.log_probs.dtype == cast.log_probs.dtype == torch.float32


def test_inputs_are_not_written_and_no_graph_is_built(door):
    logits, weight = draw(2, 5, 7), draw(9, 7)
    before = logits.clone(), weight.clone()
    logits.requires_grad_()
    weight.requires_grad_()
    out = door.sample_tokens(logits, mask_id=1, filter_thres=0.5, temperature=0.5)
    linear = door.linear_sample_tokens(logits, weight, mask_id=1)
    assert torch.equal(logits, before[0])
    assert torch.equal(weight, before[1])
    assert not out.log_probs.requires_grad
    assert not linear.log_probs.requires_grad


def test_strided_logits(door):
    logits = draw(7, 4, 3).permute(2, 1, 0)
    strided, dense = (door.sample_tokens(z, filter_thres=0.5, seed=0) for z in (logits, logits.contiguous()))
    assert torch.equal(strided.ids, dense.ids)
    assert torch.equal(strided.log_probs, dense.log_probs)


# ---- scores ----


def test_confidence_is_minus_log_p(door):
    """The order of upstream's 1 - p, and finer: a tenth of 1e-8 differs from 1e-8, and 1 - 1e-9 from 1."""
    log_probs = torch.tensor([[0.0, -1e-9, -0.5, math.log(1e-8), math.log(1e-9), -math.inf, math.nan]])
    scores = door.confidence_scores(log_probs)
    assert torch.equal(scores.nan_to_num(7.0), (-log_probs).nan_to_num(7.0))
    assert (scores[0, :5].diff() > 0).all()


def test_noise_on_the_confidence_and_on_the_critic_is_gumbel(law_door):
    log_probs, shape = torch.tensor(-2.0), (200, 150)
    options = {"seed": 4, "step": 3}
    for scale in (0.5, 4.5):
        confidence = law_door.confidence_scores(log_probs.expand(shape), choice_temperature=scale, **options)
        critic = law_door.critic_scores(torch.full(shape, 0.3), noise_scale=scale, **options)
        assert confidence.dtype == critic.dtype == torch.float32
        # Noise that favours a token lowers its score for remasking, and raises a critic's.
        confident, critical = -(confidence + log_probs) / scale, (critic - 0.3) / scale
        torch.testing.assert_close(confident, critical, rtol=1e-4, atol=1e-4)
        for noise in (confident.flatten().double().numpy(), critical.flatten().double().numpy()):
            assert stats.kstest(noise, "gumbel_r").pvalue > 1e-3
            assert noise.mean() == pytest.approx(np.euler_gamma, abs=4 * math.pi / math.sqrt(6 * noise.size))
            assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.05)
            assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 4 / math.sqrt(noise.size)


def test_score_noise_follows_seed_step_and_sample(door):
    zeros = torch.zeros(6, 30)

    def scores(rows=zeros, **options):
        return door.critic_scores(rows, noise_scale=1.0, **{"seed": 1, **options})

    first = scores()
    assert torch.equal(first, scores())
    for other in ({"seed": 2}, {"step": 1}, {"sample_offset": 1}):
        assert (first != scores(**other)).float().mean() > 0.9
    assert torch.equal(first[2:5], scores(zeros[2:5], sample_offset=2))
    assert torch.equal(first[:, :7], scores(zeros[:, :7]))
    assert first.unique().numel() == first.numel()
    high, low, _, _ = philox.draw(torch.tensor(1), streams.SCORE_NOISE, 9, sample=5, position=2)
    expected = -math.log(-math.log1p(-(int(high) * 2**32 + int(low) + 0.5) / 2**64))
    assert scores(zeros[:1], step=9, sample_offset=5)[0, 2].item() == pytest.approx(expected, abs=1e-5)


def test_without_noise_the_critics_scores_are_its_logits(door):
    for dtype in (torch.float32, torch.bfloat16):
        logits = draw(3, 4, dtype=dtype)
        assert torch.equal(door.critic_scores(logits), logits.float())
    torch.testing.assert_close(
        door.critic_scores(logits.float(), noise_scale=2.0, seed=1),
        logits.float() + 2.0 * door.critic_scores(torch.zeros(3, 4), noise_scale=1.0, seed=1),
    )


# ---- what to mask again ----


def brute_force(scores, eligible, counts):
    chosen = torch.zeros_like(eligible)
    for b, row in enumerate(scores.tolist()):
        allowed = [i for i in range(len(row)) if eligible[b, i]]
        nans = [i for i in allowed if math.isnan(row[i])]
        others = sorted((i for i in allowed if not math.isnan(row[i])), key=lambda i: (-row[i], i))
        for i in (nans + others)[: max(0, int(counts[b]))]:
            chosen[b, i] = True
    return chosen


VALUES = [0.0, -0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-45, 3e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 300])
def test_selection_against_brute_force(door, length, dtype):
    if dtype == torch.float64 and door.backend.is_kernel:
        pytest.skip("the kernels compute in float32: float64 scores are sorted by PyTorch")
    generator = torch.Generator().manual_seed(length)
    rows = door.rows(40, few=12)
    scores = torch.tensor(VALUES, dtype=torch.float64)[
        torch.randint(len(VALUES), (rows, length), generator=generator)
    ]
    mixed = torch.rand(rows, length, generator=generator) < 0.5  # half of them hardly ever tie
    scores = torch.where(mixed, scores, torch.randn(rows, length, generator=generator)).to(dtype)
    eligible = torch.rand(rows, length, generator=generator) < 0.7
    counts = torch.randint(0, length + 2, (rows,), generator=generator)
    counts[:3] = torch.tensor([0, length, length + 1])
    for number in (counts, counts.int()):
        chosen = door.select_to_remask(scores, eligible, number)
        assert chosen.dtype == torch.bool
        assert torch.equal(chosen, brute_force(scores.double(), eligible, number))
    assert torch.equal(chosen.sum(-1), counts.minimum(eligible.sum(-1)))
    assert not (chosen & ~eligible).any()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.one_of(st.sampled_from(VALUES), st.floats(width=32)), st.booleans()), min_size=1, max_size=12
    ),
    st.integers(-1, 14),
)
def test_selection_of_any_scores(row, count):
    scores, eligible = torch.tensor([[s for s, _ in row]]), torch.tensor([[e for _, e in row]])
    counts = torch.tensor([count])
    chosen = functional.select_to_remask(scores, eligible, counts, backend="reference")
    assert torch.equal(chosen, brute_force(scores, eligible, counts))


def test_selection_of_nothing(door):
    for shape in ((0, 4), (3, 0)):
        empty = door.select_to_remask(torch.zeros(shape), torch.ones(shape).bool(), torch.zeros(shape[0]).long())
        assert empty.shape == shape
    nowhere = door.select_to_remask(torch.zeros(2, 3), torch.zeros(2, 3).bool(), torch.tensor([1, 3]))
    assert not nowhere.any()


def test_selection_does_not_write_its_inputs(door):
    scores, eligible, counts = draw(3, 8), torch.ones(3, 8).bool(), torch.tensor([1, 2, 3])
    before = scores.clone(), eligible.clone(), counts.clone()
    door.select_to_remask(scores, eligible, counts)
    assert all(torch.equal(x, y) for x, y in zip(before, (scores, eligible, counts), strict=True))


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1.0])
def test_ids_are_kept_at_any_temperature(door, temperature):
    logits = draw(2, 10, 12)
    kept = torch.full((2, 10), -1)
    kept[0] = torch.arange(10)
    options = {"temperature": temperature, "seed": 8, "mask_id": 11}
    sampled, out = door.sample_tokens(logits, **options), door.sample_tokens(logits, kept_ids=kept, **options)
    assert torch.equal(out.ids[0], kept[0])
    assert torch.equal(out.ids[1], sampled.ids[1])
    expected = logits[..., :11].log_softmax(-1).gather(-1, out.ids[..., None]).squeeze(-1)
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-5, atol=1e-5)


def test_logits_of_all_rows_never_exist(reference):
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    rows, vocabulary = 4096, 2000
    embeddings, weight = draw(4, rows // 4, 2), draw(vocabulary, 2, seed=1)
    with Sizes():
        functional.linear_sample_tokens(
            embeddings.to(reference.device), weight.to(reference.device), seed=0, backend="reference"
        )
    assert max(sizes) <= 2**22 < rows * vocabulary  # a chunk


# ---- the filter at its edge ----

SHAPES_OF_LOGITS = {
    "normal": lambda z: z,
    "peaked": lambda z: torch.where(torch.arange(len(z)) % 97 == 0, 5 * z + 12, z),
    "two humps": lambda z: torch.where(torch.arange(len(z)) % 3 == 0, z - 20, z + 5),
    "heavy tails": lambda z: z**5,
    "far from 0": lambda z: z + 1000,
    "few values": lambda z: z.round(),
    "mostly -inf": lambda z: z.masked_fill(torch.arange(len(z)) % 20 != 0, -math.inf),
}


@pytest.mark.parametrize("thres", [0.1, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES_OF_LOGITS)
def test_filter_at_its_edge(door, shape, dtype, thres):
    """The last id that stays and the first that goes, found by sorting; the mask's column is no id."""
    vocabulary, mask_id = 4099, 17
    logits = SHAPES_OF_LOGITS[shape](draw(vocabulary, seed=len(shape), scale=2.0)).to(dtype)
    logits[mask_id] = 30.0
    ranked = logits.float().index_fill(0, torch.tensor([mask_id]), -math.inf).sort(descending=True, stable=True)
    last = ranked.values[math.ceil((1 - thres) * vocabulary) - 1]
    stays = ranked.indices[ranked.values >= last][-1]
    goes = ranked.indices[ranked.values < last][:1]
    rows = torch.cat([stays[None], goes])
    out = door.sample_tokens(
        logits.expand(len(rows), -1), row_indices=rows, seq_len=vocabulary, kept_ids=rows, filter_thres=thres,
        mask_id=mask_id, seed=0,
    )  # fmt: skip
    assert out.log_probs[0].isfinite() == last.isfinite()
    assert (out.log_probs[1:] == -math.inf).all()


# ---- the kernel is its twin ----


def random_row(random, vocabulary, dtype):
    """One row [V] of a random kind."""
    scale = float(random.choice([0.1, 1.0, 4.0]))
    row = draw(vocabulary, seed=int(random.integers(2**31)), scale=scale, dtype=dtype)
    kind = random.choice(["plain", "plain", "-inf", "one finite", "equal", "ties", "nan", "no law"])
    if kind == "-inf":
        row[:: random.integers(1, 4)] = -math.inf
    elif kind == "one finite":
        row[torch.arange(vocabulary) != random.integers(vocabulary)] = -math.inf
    elif kind == "equal":
        row[:] = row[0].clone()
    elif kind == "ties":
        row = row.round()
    elif kind == "nan":
        row[random.integers(vocabulary)] = math.nan
    elif kind == "no law":
        row[:] = -math.inf
    return row


def random_sampling(random, vocabulary):
    """Options of a random call, and whether it may write to a canvas."""
    forbidden = [None, None, torch.from_numpy(random.random(vocabulary) < 0.3)][random.integers(3)]
    figures = {"with_margin": bool(random.integers(2)), "with_entropy": bool(random.integers(2))}
    return {
        "temperature": float(random.choice([0.0, 1e-3, 0.3, 1.0, 2.0])),
        "filter_thres": random.choice([None, None, 0.3, 0.9]),
        "top_p": random.choice([None, None, 0.0, 0.5, 0.95]),
        "mask_id": random.choice([None, 0, vocabulary - 1, vocabulary]),
        "forbidden": forbidden,
        "step": int(random.integers(2**24)),
        "sample_offset": int(random.integers(2**31)),
        "seed": int(random.integers(2**62)),
    }, figures


def random_layout(random, row, place):
    """Where among two sequences of three the row lies: everywhere, listed with others that are none, or compact."""
    vocabulary = len(row)
    kind = random.choice(["dense", "listed", "compact"])
    if kind == "dense":
        return row.view(1, 1, vocabulary), {}, 0, (1, 1)
    listed = torch.tensor([-1, place, -1])
    if kind == "listed":
        logits = torch.full((2, 3, vocabulary), math.nan, dtype=row.dtype)
        logits[place // 3, place % 3] = row
        return logits, {"row_indices": listed}, 1, (2, 3)
    logits = torch.stack([torch.full_like(row, math.nan), row, row])
    return logits, {"row_indices": listed, "seq_len": 3}, 1, (2, 3)


def is_tie(row, position, sample, temperature, filter_thres, top_p, mask_id, forbidden, seed, step, **_):
    """Whether rounding may decide a row's id: two run level in its race, or an id is at the edge of the nucleus."""
    filters = {"filter_thres": filter_thres, "mask_id": mask_id, "forbidden": forbidden}
    if top_p is not None:
        mass = np.sort(probabilities(row, **filters))[::-1].cumsum()
        if np.abs(mass - top_p).min() < 1e-6:
            return True
    law = probabilities(row, temperature, top_p=top_p, **filters)
    return race(law, seed, position, sample, step)[1] > 1 - 1e-5


@pytest.mark.parametrize("block", range(12))
def test_the_kernel_samples_what_its_twin_samples(kernel, reference, block):
    """Twenty-five random calls, one row each: the same id, and figures to rounding. Where rounding decides ids may
    differ; they do nowhere today."""
    ties = 0
    for case in range(25 * block, 25 * block + 25):
        random = np.random.default_rng(case)
        edges = [2, 3, 5, 63, 64, 65, 4095, 4096, 4097, 5000, 9001]
        vocabulary = int(random.choice([random.choice(edges), round(math.exp(random.uniform(0.7, 8.5)))]))
        row = random_row(random, vocabulary, [torch.float32, torch.bfloat16, torch.float16, torch.float64][case % 4])
        options, figures = random_sampling(random, vocabulary)
        place = int(random.integers(6))
        logits, layout, index, shape = random_layout(random, row, place)
        has_canvas, has_kept = random.random() < 0.3, random.random() < 0.2
        canvases = [functional.Sampled(torch.full(shape, -7), torch.full(shape, 7.0)) for _ in range(2)]
        kept = torch.full(shape if not layout else (3,), int(random.integers(vocabulary)))
        results = [
            Door(backend).sample_tokens(
                logits, **options, **layout, kept_ids=kept if has_kept else None,
                **({"out": canvas} if has_canvas else figures),
            )
            for backend, canvas in zip((kernel, reference), canvases, strict=True)
        ]  # fmt: skip
        ours, theirs = results
        if torch.equal(ours.ids, theirs.ids):
            for a, b in zip(ours[1:], theirs[1:], strict=True):
                torch.testing.assert_close(a, b, rtol=4e-6, atol=2e-6, equal_nan=True, msg=f"case {case}: {a} {b}")
        else:
            position, sample = (place % 3, place // 3) if layout else (0, 0)
            assert options["temperature"] > 0, case
            assert is_tie(row, position, sample + options["sample_offset"], **options), case
            ties += 1
        if not has_canvas and layout:
            assert ours.ids[[0, 2]].tolist() == [-1, -1]
            assert not any(figure[[0, 2]].any() for figure in ours[1:] if figure is not None)
        elif layout:  # and nothing was written elsewhere
            assert (ours.ids.flatten() == -7).sum() == 5
            assert ours.ids.flatten()[place] != -7
            assert (ours.log_probs == 7).sum() == 5
        assert ours.ids.flatten()[min(place, len(ours.ids.flatten()) - 1) if has_canvas else index] < vocabulary
    assert ties <= 1


def test_a_tie_is_told_from_an_error():
    options = {"filter_thres": None, "top_p": None, "mask_id": None, "forbidden": None, "seed": 3, "step": 0}
    row = draw(2, seed=1)
    low, high = -40.0, 40.0  # where id 1 wins over id 0 or not
    for _ in range(60):
        row[1] = (low + high) / 2
        winner, _ = race(probabilities(row), 3, 0, 0, 0)
        low, high = (low, float(row[1])) if winner else (float(row[1]), high)
    assert is_tie(row, 0, 0, temperature=1.0, **options)
    row[1] += 1e-3
    assert not is_tie(row, 0, 0, temperature=1.0, **options)
    even = torch.zeros(4)
    assert is_tie(even, 0, 0, temperature=1.0, **{**options, "top_p": 0.5})
    assert not is_tie(even, 0, 0, temperature=1.0, **{**options, "top_p": 0.6})


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "options"),
    [
        (50257, torch.bfloat16, {"filter_thres": 0.7}),
        (50257, torch.float32, {"top_p": 0.5, "with_margin": True, "with_entropy": True}),
        (50257, torch.float16, {"forbidden": range(0, 50257, 3), "with_margin": True, "with_entropy": True}),
        (70001, torch.float32, {"filter_thres": 0.7}),
    ],
)
def test_the_kernel_samples_large_vocabularies_alike(kernel, reference, vocabulary, dtype, options):
    logits = draw(1, 1, vocabulary, seed=vocabulary, scale=2.0, dtype=dtype)
    options = {"temperature": 0.7, "mask_id": 50000, "seed": 9, **options}
    ours, theirs = (Door(backend).sample_tokens(logits, **options) for backend in (kernel, reference))
    assert torch.equal(ours.ids, theirs.ids)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=4e-6, atol=2e-6)


# Where rows begin and end at 16 bytes, the choice finds the sums of sub-tiles, up to 65536 ids; else it forms them.
@pytest.mark.ptx
@pytest.mark.parametrize(
    ("vocabulary", "temperature"), [(8, 0.7), (72, 1.0), (4096, 1.0), (8200, 0.7), (65536, 0.7), (65544, 0.7)]
)
def test_the_kernel_samples_rows_that_begin_anywhere_alike(kernel, reference, vocabulary, temperature):
    options = {"temperature": temperature, "filter_thres": 0.5, "mask_id": 3, "seed": 5}
    whole = draw(4 * vocabulary, seed=vocabulary, scale=2.0, dtype=torch.bfloat16).view(1, 4, vocabulary)
    shifted = torch.cat([whole.new_zeros(1), whole.flatten()])[1:].view_as(whole)
    expected = Door(reference).sample_tokens(whole, **options)
    for logits in (whole, shifted):
        ours = Door(kernel).sample_tokens(logits, **options)
        assert torch.equal(ours.ids, expected.ids)
        torch.testing.assert_close(ours.log_probs, expected.log_probs, rtol=4e-6, atol=2e-6)


def test_rows_past_2_to_the_31(kernel):
    """Rows so far apart that their offset does not fit 32 bits, over memory that is never touched."""
    try:
        memory = torch.from_numpy(np.empty(2**31 + 4096, dtype=np.float16))
    except MemoryError:
        pytest.skip("4 GiB of address space are not to be had")
    logits = memory.as_strided((2, 100), (2**31, 1))
    logits.copy_(draw(2, 100, seed=1))
    options = {"row_indices": torch.arange(2), "seq_len": 2, "seed": 3, "filter_thres": 0.5}
    far, near = (Door(kernel).sample_tokens(z, **options) for z in (logits, logits.clone()))
    assert torch.equal(far.ids, near.ids)


@pytest.mark.parametrize("length", [1000, 4096, 4097, 65536])
def test_selection_of_long_sequences(door, length):
    """One block of keys, several blocks, and scores of every kind of spacing."""
    scores = torch.stack([draw(length), draw(length).exp(), -draw(length).abs().log(), torch.zeros(length)])
    eligible = draw(4, length, seed=1) < 0.5
    counts = torch.tensor([1, length // 3, length, length // 10])
    expected = functional.select_to_remask(scores, eligible, counts, backend="reference")
    assert torch.equal(door.select_to_remask(scores, eligible, counts), expected)


def test_a_sequence_too_long_for_the_selections_keys_is_refused(kernel):
    with pytest.raises(ValueError, match=r"at most 65536 tokens, received 65537; use backend=.reference."):
        Door(kernel).select_to_remask(torch.zeros(1, 65537), torch.ones(1, 65537).bool(), torch.ones(1).long())


@pytest.mark.parametrize("operation", ["sample_tokens_", "score_noise", "select_to_remask", "remask_"])
def test_the_kernels_are_torch_operations(kernel, operation):
    """torch's own checks: schema, fake tensors and tracing."""
    integers = torch.arange(6).view(2, 3)
    canvas = integers.clone(), integers > 2
    arguments = {
        "sample_tokens_": (
            torch.zeros(3).long(), torch.zeros(3), torch.zeros(3), torch.zeros(3), draw(3, 70), torch.arange(3), None,
            draw(70, seed=1) > 1, torch.tensor(5), False, True, 9, 0, 2, 0.7, 0.5, 0.9, 4,
        ),
        "score_noise": (torch.tensor(5), 2, 3, 7, 2),
        "select_to_remask": (draw(2, 9), draw(2, 9) < 0, torch.tensor([1, 2]), -0.5),
        "remask_": (
            *canvas, torch.zeros(4).long(), torch.tensor([0, 2, 4]), draw(2, 3), None, torch.tensor([1, 2]),
            torch.tensor(5), True, 0.5, None, 9, 0, 2,
        ),
    }[operation]  # fmt: skip
    kernel.module("demask")
    arguments = [x.to(kernel.device) if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(getattr(torch.ops.fastmask, operation).default, tuple(arguments))


def test_the_number_of_rows_compiles_once(kernel):
    """It differs at every step of a generation."""

    def sample(logits, rows):
        return functional.sample_tokens(logits, row_indices=rows, seq_len=9, seed=1, backend="triton").ids

    torch._dynamo.reset()
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager", dynamic=True)
    for number in (3, 5, 4):
        arguments = draw(number, 20).to(kernel.device), torch.arange(number, device=kernel.device)
        torch._dynamo.config.error_on_recompile = number != 3
        try:
            assert torch.equal(compiled(*arguments), sample(*arguments))
        finally:
            torch._dynamo.config.error_on_recompile = False


@pytest.mark.parametrize("temperature", [1e40, 1e46, 1e300])
def test_an_endless_temperature_is_uniform_over_what_is_allowed(door, temperature):
    logits = draw(1, door.rows(60, few=8), 70)
    logits[..., 10:] = -math.inf
    ids = door.sample_tokens(logits, temperature=temperature, mask_id=3, seed=0).ids
    assert ids.max() < 10
    assert (ids != 3).all()
    assert ids.unique().numel() > 3


def test_a_kept_id_beyond_the_vocabulary_gives_nan(kernel):
    """And reads nothing of the next row; the twin raises."""
    out = Door(kernel).sample_tokens(draw(1, 2, 70), kept_ids=torch.tensor([[70, -1]]), seed=0)
    assert out.log_probs[0].isnan().tolist() == [True, False]


def test_longer_sequences_than_the_kernels_keys_hold_are_selected_by_the_reference(monkeypatch):
    monkeypatch.setenv("FASTMASK_BACKEND", "triton")
    chosen = functional.select_to_remask(torch.zeros(1, 65537), torch.ones(1, 65537).bool(), torch.tensor([2]))
    assert chosen.nonzero().tolist() == [[0, 0], [0, 1]]


def test_a_compiled_step_is_the_step(kernel):
    def step(logits, eligible, counts):
        out = functional.sample_tokens(logits, mask_id=3, seed=1, backend="triton")
        scores = functional.confidence_scores(out.log_probs, choice_temperature=1.0, seed=1, backend="triton")
        return out.ids, functional.select_to_remask(scores, eligible, counts, backend="triton")

    arguments = [x.to(kernel.device) for x in (draw(2, 3, 20), torch.ones(2, 3).bool(), torch.tensor([1, 2]))]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(*arguments), step(*arguments), strict=True):
        assert torch.equal(ours, theirs)


# ---- without a device ----

# Of the whole program over the 64 logits of a thread, addresses, reductions and branches included. Of those the
# mask's column (3.9 a logit) is mostly jumped over, and so are the edges (2.3) where rows begin at 16 bytes, as
# they do behind a linear head. Measured with Triton 3.7.1: 12.7, 16.3, 16.2, 19.4, 23.8, 18.7, 26.5, 27.6. On an H200
# (29.6e12 instructions of lanes a second) a bf16 logit at 80 % of 4.3 TB/s leaves 17.2, at 50 % 27.5.
MOST_INSTRUCTIONS_A_LOGIT = {
    "tiles": 14.0,
    "tiles T": 17.5,
    "tiles T sub-tiles": 17.5,
    "tiles T filtered": 21.0,
    "tiles T margin": 25.5,
    "tiles T entropy": 20.5,
    "tiles T margin entropy": 28.5,
    "tiles T forbidden": 28.0,
}
# Of the loops over a row, 16 logits a thread, the largest first: of the pass for k 14.7, of p 17.4, of its measure
# before 11.6, of which the mask's column (3) is mostly jumped over. At 25 % of 4.3 TB/s a bf16 logit leaves 55: for
# these passes, the tiles and the searches.
MOST_INSTRUCTIONS_A_PASS = {"thresholds k of 50257": [15.5], "thresholds p of 50257": [18.2, 12.3]}


def offline_plans() -> list[dict]:
    """What the launchers ask Triton for, with strides that are not divisible by 16."""
    from fastmask.kernels import demask, top_k_filter

    def plan(name, kernel, num_warps, module="demask", **arguments):
        options = {"num_warps": num_warps}
        return {
            "name": name, "module": f"fastmask.kernels.{module}", "kernel": kernel, "options": options,
            "args": arguments,
        }  # fmt: skip

    def rows(dtype, forbidden=False):
        return {
            "x_ptr": f"*{dtype}:16", "stride_x": "i32", "row_indices_ptr": "*i64:16",
            "forbidden_ptr": "*i1:16" if forbidden else None, "V": "i32", "mask_id": "i32", "IS_COMPACT": True,
            "HAS_MASK_ID": True, "HAS_FORBIDDEN": forbidden,
        }  # fmt: skip

    def tiles(filtered=False, margin=False, entropy=False, summed=False):
        return {
            "thresholds_ptr": "*fp32:16" if filtered else None, "records_ptr": "*fp32:16", "factor": "fp32",
            "sub_tiles_ptr": "*fp32:16", "HAS_THRESHOLD": filtered, "HAS_SUB_TILES": summed, "WITH_MARGIN": margin,
            "WITH_ENTROPY": entropy, "RECORD": 5 if margin or entropy else 3,
        }  # fmt: skip

    variants = {
        "tiles": (False, {}, {}),
        "tiles T": (True, {}, {}),
        "tiles T sub-tiles": (True, {}, {"summed": True}),
        "tiles T filtered": (True, {}, {"filtered": True}),
        "tiles T margin": (True, {}, {"margin": True}),
        "tiles T entropy": (True, {}, {"entropy": True}),
        "tiles T margin entropy": (True, {}, {"margin": True, "entropy": True}),
        "tiles T forbidden": (True, {"forbidden": True}, {}),
        "tiles T everything": (True, {"forbidden": True}, {"filtered": True, "margin": True, "entropy": True}),
    }
    plans = []
    for dtype, vector in (("bf16", 8), ("fp16", 8), ("fp32", 4), ("fp64", 2)):
        aligned = {"lead_x": "i32", "num_rows": "i32", "VECTOR": vector}
        suffix = "" if dtype == "bf16" else f" {dtype}"
        for name, (heated, of_rows, of_tiles) in variants.items():
            for block in (streams.TILE, 64) if name == "tiles T" else (streams.TILE,):
                plans.append(
                    plan(name + suffix + ("" if block > 64 else " small"), "_tiles_kernel", demask._TILE_WARPS,
                         BLOCK=block, IS_HEATED=heated, **rows(dtype, **of_rows), **tiles(**of_tiles), **aligned)
                )  # fmt: skip
        for name, by_mass, forbidden in (("k", False, False), ("p", True, False), ("p forbidden", True, True)):
            filters = {
                "thresholds_ptr": "*fp32:16", "num_kept": "i32", "top_p": "fp32", "BY_MASS": by_mass,
                "HAS_FLOOR": forbidden, "SPACING": {"bf16": 65536, "fp16": 8192}.get(dtype, 1),
            } | rows(dtype, forbidden) | aligned  # fmt: skip
            warp_sample, most = top_k_filter._WARP_SAMPLE[by_mass], top_k_filter._MOST_WARPS
            sizes = [("", 1, warp_sample), (" long", most, most * warp_sample)]
            if vector == 8 and not forbidden:
                sizes.append((" of 50257", 4, 2048 if by_mass else 4096))  # as a rule
            for size, warps, sample in sizes:
                plans.append(
                    plan(f"thresholds {name}{size}{suffix}", "_thresholds_kernel", warps, "top_k_filter",
                         candidates_ptr="*fp32:16", BLOCK=top_k_filter._WARP_BLOCK * warps, SAMPLE=sample, **filters)
                )  # fmt: skip
                if by_mass and vector == 8:
                    plans[-1]["sm_90"] = {"options": {"maxnreg": top_k_filter._REGISTERS}}
            for size, block in (("", top_k_filter._SHORT), (" small", top_k_filter._SHORT_BLOCK)):
                plans.append(
                    plan(f"short thresholds {name}{size}{suffix}", "_short_thresholds_kernel", 1, "top_k_filter",
                         BLOCK=block, **filters)
                )  # fmt: skip
        pointers = dict.fromkeys(("seed_ptr", "kept_ids_ptr", "ids_ptr"), "*i64:16")
        pointers |= dict.fromkeys(("log_probs_ptr", "margins_ptr", "entropies_ptr"), "*fp32:16")
        scalars = dict.fromkeys(("num_tiles", "seq_len", "sample_offset", "step"), "i32")
        of_tiles = tiles(filtered=True, margin=True, entropy=True)
        arguments = rows(dtype) | tiles() | pointers | scalars | {
            "kept_ids_ptr": None, "margins_ptr": None, "entropies_ptr": None, "IS_CANVAS": True, "HAS_KEPT": False,
            "IS_GREEDY": False, "TILE_LANES": 16, "SUB_TILES": 64, "VECTOR": vector,
        }  # fmt: skip
        plans.append(plan("choice plain" + suffix, "_choose_kernel", demask._CHOICE_WARPS, **arguments))
        plans.append(
            plan("choice sub-tiles" + suffix, "_choose_kernel", 1, **arguments | {"HAS_SUB_TILES": True})
        )  # fmt: skip
        for name, greedy, lanes, sub_tiles, width in (
            ("choice", False, 64, 64, vector), ("choice T 0", True, 64, 64, vector),
            ("choice misaligned", False, 64, 64, 1), ("choice small", False, 1, 1, vector),
        ):  # fmt: skip
            arguments = rows(dtype, forbidden=True) | of_tiles | pointers | scalars | {
                "IS_CANVAS": True, "HAS_KEPT": True, "IS_GREEDY": greedy, "TILE_LANES": lanes, "SUB_TILES": sub_tiles,
                "VECTOR": width,
            }  # fmt: skip
            plans.append(plan(name + suffix, "_choose_kernel", demask._CHOICE_WARPS, **arguments))
    # Of float16 what differs in its registers; of float32 the programs that hold most; of float64, which nobody
    # samples for speed, that they compile.
    few = {
        "fp16": {"thresholds p", "thresholds p of 50257"},
        "fp32": {
            "tiles T", "tiles T everything", "thresholds k long", "thresholds p forbidden long",
            "short thresholds p forbidden", "choice", "choice sub-tiles", "choice T 0", "choice misaligned",
        },
        "fp64": {"tiles T", "thresholds k", "choice"},
    }  # fmt: skip
    named = [(plan["name"].rpartition(" "), plan) for plan in plans]
    plans = [plan for (name, _, dtype), plan in named if dtype not in few or name in few[dtype]]
    noise = {"seed_ptr": "*i64:16", "noise_ptr": "*fp32:16", "BLOCK": demask._NOISE_BLOCK}
    noise |= dict.fromkeys(("num_elements", "N", "sample_offset", "step"), "i32")
    plans.append(plan("noise", "_noise_kernel", 4, **noise))
    selection = {"scores_ptr": "*fp32:16", "eligible_ptr": "*i1:16", "is_masked_ptr": "*i1:16"}
    selection |= dict.fromkeys(("counts_ptr", "seed_ptr", "ids_ptr", "row_indices_ptr", "row_starts_ptr"), "*i64:16")
    selection |= dict.fromkeys(("N", "sample_offset", "step", "mask_id"), "i32")
    selection |= {"noise_scale": "fp32", "min_score": "fp32", "IS_CONFIDENCE": True, "HAS_MIN_SCORE": True}
    for block, warps, one in ((*demask._SELECTION[0], True), (*demask._SELECTION[1], True),
                              (*demask._SELECTION_BLOCKS, False), (1, 4, True)):  # fmt: skip
        plans.append(
            plan(f"selection {block} {one}", "_selection_kernel", warps, **selection, IS_CANVAS=True, HAS_NOISE=one,
                 ONE_BLOCK=one, BLOCK_N=block)
        )  # fmt: skip
    return plans


@pytest.fixture(scope="module")
def figures(compile_offline):
    return compile_offline(offline_plans())


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_nothing_spills(figures, target):
    for name, figure in figures.items():
        if name.endswith("fp64"):
            continue
        # AMD's scalar registers spill to lanes of vector registers: to no memory.
        spills = {key: figure[target][key] for key in ("stack", "spills")}
        assert not any(spills.values()), (name, spills)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_logits_are_read_16_bytes_at_a_time(figures, target):
    for name, figure in figures.items():
        if name.startswith(("tiles", "thresholds", "short")) and "small" not in name:
            assert figure[target]["load_bits"] == 128, name


@pytest.mark.slow
@pytest.mark.parametrize("name", MOST_INSTRUCTIONS_A_LOGIT)
def test_instructions_a_logit(figures, name):
    from fastmask.kernels import demask

    per_logit = figures[name]["sm_90"]["instructions"] / (streams.TILE / (32 * demask._TILE_WARPS))
    assert per_logit <= MOST_INSTRUCTIONS_A_LOGIT[name], per_logit


@pytest.mark.slow
@pytest.mark.parametrize("name", MOST_INSTRUCTIONS_A_PASS)
def test_instructions_of_a_pass_of_the_filter(figures, name):
    passes = [instructions / 16 for instructions in figures[name]["sm_90"]["passes"]]
    for instructions, most in zip(passes, MOST_INSTRUCTIONS_A_PASS[name], strict=True):
        assert instructions <= most, passes


@pytest.mark.slow
def test_16_warps_of_a_nucleus_fit_into_a_multiprocessor(figures):
    for name in ("thresholds p", "thresholds p fp16", "thresholds p of 50257", "thresholds p of 50257 fp16",
                 "thresholds p long"):  # fmt: skip
        assert figures[name]["sm_90"]["registers"] * 32 * 16 <= 2**16, name


@pytest.mark.parametrize("is_hopper", [True, False])
def test_a_launch_of_16_bit_logits_asks_for_few_registers_on_hopper(kernel, monkeypatch, is_hopper):
    """Of a nucleus, not of k; launches are recorded, nothing runs."""
    module, asked = kernel.module("top_k_filter"), []
    monkeypatch.setattr(module, "_is_hopper", lambda device: is_hopper)
    monkeypatch.setattr(module, "_thresholds_kernel", defaultdict(lambda: lambda **given: asked.append(given)))
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = {"x_ptr": torch.zeros(2, 8192, dtype=dtype), "V": 8192, "num_rows": 2, "VECTOR": 16 // dtype.itemsize}
        module.thresholds(rows, 0.9, 0.9)
    registers = [given.get("maxnreg") for given in asked]
    most = module._REGISTERS if is_hopper else None
    assert registers == [None, most, None, most, None, None]


@pytest.mark.slow
def test_a_choice_costs_little_beside_its_row(figures):
    """119,000 instructions of lanes a row, of which 33,000 are mostly jumped over; 210,000 with every option; 40,000
    where the sums of sub-tiles are known. The tiles of 50257 bf16 logits take 0.7 million, those of 8192 0.1."""
    assert figures["choice plain"]["sm_90"]["instructions"] * 64 <= 125_000
    assert figures["choice"]["sm_90"]["instructions"] * 64 <= 220_000
    assert figures["choice sub-tiles"]["sm_90"]["instructions"] * 32 <= 43_000
    assert figures["choice"]["sm_90"]["load_bits"] == 128
