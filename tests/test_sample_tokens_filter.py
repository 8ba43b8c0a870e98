"""What the filters keep: the k largest, the nucleus; and k = 1, the argmax."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import draw
from sampling import Door, number_kept, sample_ids

from fastmask import functional
from fastmask.functional import LinearLogits

OPERATION = "sample_tokens"


@pytest.fixture
def door(backend):
    return Door(backend)


@pytest.fixture
def law_door(reference):
    """Laws are shown on the reference; a kernel is held to it id by id."""
    return Door(reference)


@pytest.mark.ptx  # a row of 20 bytes that is read by 16
def test_filter_over_rows_with_few_finite_logits(door):
    logits = torch.full((10,), -math.inf)
    logits[[2, 5]] = torch.tensor([1.0, 0.0])
    out = door.sample_tokens(logits.expand(2, door.rows(100, few=8), 10), top_k=5, seed=0)
    assert sorted(out.ids.unique().tolist()) == [2, 5]


def test_samples_come_from_the_survivors_only(law_door):
    logits = draw(10, seed=1)
    for thres, number in ((0.7, 4), (0.9, 1), (0.5, 5)):  # (1 - .7) 10 is a little more than 3
        ids = sample_ids(law_door, logits, 2000, temperature=50.0, top_k=number_kept(thres, 10))
        assert sorted(np.unique(ids)) == sorted(logits.topk(number).indices.tolist())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_filter_without_numpy_is_the_same(reference, dtype, monkeypatch):
    door = Door(reference)
    logits = draw(4, 30, 507, dtype=dtype)  # bfloat16: with ties
    options = {"top_k": number_kept(0.7, 507), "mask_id": 3, "seed": 1}
    with_numpy = door.sample_tokens(logits, **options)
    monkeypatch.setattr(reference.module("vocabulary_filter"), "np", None)
    without = door.sample_tokens(logits, **options)
    assert torch.equal(with_numpy.ids, without.ids)
    assert torch.equal(with_numpy.log_probs, without.log_probs)


def test_the_filter_where_small_numbers_are_flushed_to_0(law_door):
    """What goes may differ from what stays by less than the smallest normal number."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush denormals")
    try:
        out = law_door.sample_tokens(torch.tensor([[[1.2e-38, 1.3e-38, 0.0, -1.0]]]), top_k=1, seed=0)
    finally:
        torch.set_flush_denormal(False)
    assert (out.ids.item(), out.log_probs.item()) == (1, 0.0)


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
    for options in ({"top_k": 2491}, {"top_p": 0.6}, {"top_k": 2491, "top_p": 0.6}):
        out = door.sample_tokens(logits, seed=1, mask_id=0, **options)
        assert out.ids.item() == 1
        assert out.log_probs.isnan().all()


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
@pytest.mark.slow_interpreted
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
        logits.expand(len(rows), -1), row_indices=rows, seq_len=vocabulary, kept_ids=rows,
        top_k=number_kept(thres, vocabulary), mask_id=mask_id, seed=0,
    )  # fmt: skip
    assert out.log_probs[0].isfinite() == last.isfinite()
    assert (out.log_probs[1:] == -math.inf).all()


# ---- k = 1 ----


def only(door, rows, **options):
    """What k = 1 gives for rows [M, V], with figures."""
    return door.sample_tokens(rows[None], **{"top_k": 1, "with_margin": True, "with_entropy": True, **options})


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [2, 65, 4097, 9000])
def test_k_of_1_is_the_argmax_ties_to_the_lower_id(door, vocabulary, dtype):
    """At any temperature, with the nucleus besides; all the probability is its."""
    rows = draw(door.rows(20), vocabulary, seed=vocabulary, scale=2.0, dtype=dtype)
    rows[0] = 0.0  # all tie
    rows[1, [vocabulary // 2, vocabulary - 1]] = 50.0
    for options in ({}, {"temperature": 30.0}, {"temperature": 0.0}, {"top_p": 0.5, "mask_id": vocabulary}):
        out = only(door, rows, seed=3, **options)
        assert torch.equal(out.ids[0], rows.float().argmax(-1))
        assert out.ids[0, :2].tolist() == [0, vocabulary // 2]
        assert not out.log_probs.any()
        assert (out.margins == 1).all()
        assert not out.entropies.any()


def test_k_of_1_draws_nothing(door):
    """Any seed gives the same, and so do the steps."""
    rows = draw(3, 300)
    first = only(door, rows, seed=1)
    for other in ({"seed": 2}, {"seed": 1, "step": 4}, {"seed": 1, "sample_offset": 9}):
        assert torch.equal(only(door, rows, **other).ids, first.ids)


def test_k_of_1_over_what_is_allowed(door):
    logits = torch.tensor([[5.0, 3.0, 5.0, 3.0, 1.0]])
    for options, expected in (
        ({"mask_id": 0}, 2),
        ({"mask_id": 0, "forbidden": [2]}, 1),
        ({"forbidden": [0, 1, 2, 3]}, 4),
        ({"mask_id": 9}, 0),
    ):
        out = only(door, logits, seed=0, **options)
        assert (out.ids.item(), out.log_probs.item()) == (expected, 0.0)


def test_an_id_kept_beside_k_of_1_has_no_probability_but_the_argmax(door):
    """Where it ties with the argmax too."""
    rows = torch.tensor([[1.0, 7.0, 7.0, 2.0]]).expand(5, -1)
    kept_ids = torch.tensor([[1, 2, 3, -1, 0]])
    out = only(door, rows, kept_ids=kept_ids, mask_id=0)
    assert out.ids.tolist() == [[1, 2, 3, 1, 0]]
    assert out.log_probs.tolist() == [[0.0, -math.inf, -math.inf, 0.0, -math.inf]]
    assert (out.margins == 1).all()


def test_k_of_1_of_rows_without_a_law_and_of_no_row(door):
    lawless = torch.tensor([[math.nan, 1.0, 2.0], [-math.inf] * 3, [0.0, 1.0, math.inf], [0.0, 2.0, 1.0], [0.0] * 3])
    rows = torch.tensor([0, 1, 2, 3, -1])
    options = {"top_k": 1, "with_margin": True, "with_entropy": True, "forbidden": [0]}
    out = door.sample_tokens(lawless, row_indices=rows, seq_len=5, **options)
    assert out.ids.tolist() == [2, 1, 1, 1, -1]
    assert [x.isnan().nonzero().flatten().tolist() for x in out[1:]] == [[1, 2]] * 3
    out = door.sample_tokens(lawless, row_indices=rows, seq_len=5, **{**options, "forbidden": None})
    assert out.ids.tolist() == [0, 0, 0, 1, -1]
    assert [x.isnan().nonzero().flatten().tolist() for x in out[1:]] == [[0, 1, 2]] * 3
    assert [x[3:].tolist() for x in out[1:]] == [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]


def test_k_of_1_writes_in_place_and_behind_a_head(door):
    integers = torch.Generator().manual_seed(0)
    embeddings, weight = (torch.randint(-2, 3, shape, generator=integers).float() for shape in ((2, 3, 4), (70, 4)))
    ids = (embeddings @ weight.mT).argmax(-1)
    out = functional.Sampled(torch.full((2, 3), -7), torch.full((2, 3), 7.0))
    rows = torch.tensor([4, -1, 0])
    written = door.sample_tokens(LinearLogits(embeddings, weight), top_k=1, row_indices=rows, out=out)
    assert torch.equal(written.ids.flatten()[[0, 4]], ids.flatten()[[0, 4]])
    assert (written.ids == -7).sum() == 4
    assert written.log_probs.flatten().tolist() == [0.0, 7.0, 7.0, 7.0, 0.0, 7.0]


def test_k_of_1_needs_no_filter_and_no_race(kernel, monkeypatch):
    """Two launches, the second of which is told of no temperature."""
    launch, launched = kernel.module("_launch").launch, []

    def recording(function, grid, on, **arguments):
        launched.append(arguments)
        launch(function, grid, on, **arguments)

    monkeypatch.setattr(kernel.module("_launch"), "launch", recording)
    Door(kernel).sample_tokens(draw(1, 2, 5000), top_k=1, temperature=0.7, top_p=0.5, seed=1)
    assert [given["factor"] for given in launched] == [None, None]
    assert [given["thresholds_ptr"] for given in launched] == [None, None]


@pytest.mark.parametrize("top_k", [5, 6, 2**40])
def test_k_of_the_vocabulary_or_more_keeps_all(door, top_k):
    logits = draw(2, 3, 5)
    ours, free = (door.sample_tokens(logits, top_k=k, temperature=9.0, seed=1) for k in (top_k, None))
    assert torch.equal(ours.ids, free.ids)
    assert torch.equal(ours.log_probs, free.log_probs)
