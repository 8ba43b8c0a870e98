"""Which random numbers a sample is made of: those of its seed, position and step, however a batch is split."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from oracles import draw
from sampling import Door, probabilities, race

from fastmask import _streams as streams
from fastmask.reference import philox

OPERATION = "sample_tokens"


@pytest.fixture
def door(backend):
    return Door(backend)


@pytest.fixture
def law_door(reference):
    """Laws are shown on the reference; a kernel is held to it id by id."""
    return Door(reference)


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


@pytest.mark.slow_interpreted
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


@pytest.mark.slow_interpreted
def test_any_split_of_a_batch_gives_the_same_ids(door):
    length = door.rows(9, few=2)
    logits = draw(6, length, 5000)
    options = {"temperature": 0.8, "top_k": 2500, "mask_id": 7, "seed": 11, "step": 2}
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
    options = {"temperature": temperature, "top_k": 2500, "with_margin": True, "with_entropy": True, "seed": 4}
    at_once = law_door.sample_tokens(logits, kept_ids=kept, **options)
    module = law_door.backend.module("sample_tokens")
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 3 * 5000)
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 2 * 5000 // torch.get_num_threads())
    for ours, theirs in zip(law_door.sample_tokens(logits, kept_ids=kept, **options), at_once, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
    assert at_once.ids[0, 4] == 8
    assert at_once.log_probs[0].isnan().nonzero().flatten().tolist() == [2, 5]
