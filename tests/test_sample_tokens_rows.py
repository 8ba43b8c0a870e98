"""Rows of every kind: the argmax, rows without a law, excluded and kept ids, probabilities, margins, entropies."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import draw
from sampling import Door, number_kept, probabilities, sample_ids

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


# ---- the argmax ----


def test_temperature_0_is_the_argmax_with_ties_to_the_lower_id(door):
    logits = torch.tensor([[[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 2.0, 5.0]]])

    def ids(**options):
        return door.sample_tokens(logits, temperature=0.0, **options).ids.tolist()

    assert ids() == ids(seed=9, top_k=1) == [[1, 0, 3]]
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


@pytest.mark.parametrize("temperature", [1e40, 1e46, 1e300])
def test_an_endless_temperature_is_uniform_over_what_is_allowed(door, temperature):
    logits = draw(1, door.rows(60, few=8), 70)
    logits[..., 10:] = -math.inf
    ids = door.sample_tokens(logits, temperature=temperature, mask_id=3, seed=0).ids
    assert ids.max() < 10
    assert (ids != 3).all()
    assert ids.unique().numel() > 3


# ---- rows without a law ----


LAWLESS = {
    "nan": [0.0, 1.0, math.nan, 2.0],
    "all -inf": [-math.inf] * 4,
    "+inf": [0.0, math.inf, 1.0, 2.0],
    "two +inf": [math.inf, 0.0, math.inf, 0.0],
    "nan and -inf": [-math.inf, -math.inf, -math.inf, math.nan],
}


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("filter_thres", [None, 0.5])
@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("mask_id", "lowest"), [(None, 0), (3, 0), (0, 1), (4, 0), (-1, 0)])
def test_a_row_without_a_law_gives_the_lowest_allowed_id(door, mask_id, lowest, temperature, filter_thres):
    healthy = [0.0, 0.5, 5.0, 1.0]
    logits = torch.tensor([[row for lawless in LAWLESS.values() for row in (healthy, lawless)]])
    options = {"temperature": temperature, "mask_id": mask_id, "top_k": number_kept(filter_thres, 4), "seed": 1}
    out = door.sample_tokens(logits, **options)
    assert out.ids[0, 1::2].tolist() == [lowest] * len(LAWLESS), list(LAWLESS)
    assert out.log_probs[0, 1::2].isnan().all(), list(LAWLESS)
    alone = door.sample_tokens(logits[0, ::2], row_indices=torch.arange(0, 10, 2), seq_len=10, **options)
    assert torch.equal(out.ids[0, ::2], alone.ids)
    assert torch.equal(out.log_probs[0, ::2], alone.log_probs)


@pytest.mark.parametrize("content", [math.nan, math.inf, 1e30])
def test_the_masks_column_does_not_matter(door, content):
    logits = draw(2, door.rows(20), 6)
    options = {"mask_id": 2, "top_k": 4, "temperature": 1.3, "seed": 3}
    expected = door.sample_tokens(logits, **options)
    logits[..., 2] = content
    out = door.sample_tokens(logits, **options)
    assert torch.equal(out.ids, expected.ids)
    assert torch.equal(out.log_probs, expected.log_probs)


@pytest.mark.parametrize("temperature", [0.0, 0.1, 1.0, 2.0])
@pytest.mark.slow_interpreted
def test_a_row_with_one_finite_logit(door, temperature):
    for vocabulary, only in ((4, 0), (4, 3), (9000, 4096), (9000, 8999)):
        logits = torch.full((1, door.rows(30, few=2), vocabulary), -math.inf)
        logits[..., only] = -50.0
        for filter_thres in (None, 0.5):
            top_k = number_kept(filter_thres, vocabulary)
            out = door.sample_tokens(logits, temperature=temperature, top_k=top_k, seed=0, mask_id=1)
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


@pytest.mark.slow_interpreted
def test_mask_id_is_never_sampled(door):
    for mask_id in (0, 2, 4):
        logits = torch.zeros(2, door.rows(1000, few=20), 5)
        logits[..., mask_id] = 20.0
        ids = door.sample_tokens(logits, mask_id=mask_id, seed=0).ids
        assert sorted(ids.unique().tolist()) == [v for v in range(5) if v != mask_id]


@pytest.mark.parametrize("shape", [(0, 4, 6), (3, 0, 6)], ids=str)
def test_empty_batches(door, shape):
    out = door.sample_tokens(torch.zeros(shape), top_k=3, seed=0)
    assert (out.ids.shape, out.ids.dtype) == (shape[:2], torch.int64)
    assert (out.log_probs.shape, out.log_probs.dtype) == (shape[:2], torch.float32)
    compact = door.sample_tokens(torch.zeros(0, 6), row_indices=torch.zeros(0).long(), seq_len=4, seed=0)
    assert compact.ids.shape == (0,)
    linear = door.sample_tokens(LinearLogits(torch.zeros(*shape[:2], 2), torch.zeros(6, 2)), seed=0)
    assert linear.ids.shape == shape[:2]


def test_inputs_are_not_written_and_no_graph_is_built(door):
    logits, weight = draw(2, 5, 7), draw(9, 7)
    before = logits.clone(), weight.clone()
    logits.requires_grad_()
    weight.requires_grad_()
    out = door.sample_tokens(logits, mask_id=1, top_k=4, temperature=0.5)
    linear = door.sample_tokens(LinearLogits(logits, weight), mask_id=1)
    assert torch.equal(logits, before[0])
    assert torch.equal(weight, before[1])
    assert not out.log_probs.requires_grad
    assert not linear.log_probs.requires_grad


def test_strided_logits(door):
    logits = draw(7, 4, 3).permute(2, 1, 0)
    strided, dense = (door.sample_tokens(z, top_k=4, seed=0) for z in (logits, logits.contiguous()))
    assert torch.equal(strided.ids, dense.ids)
    assert torch.equal(strided.log_probs, dense.log_probs)


# ---- probabilities ----


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("filter_thres", [None, 0.7])
@pytest.mark.parametrize("vocabulary", [6, 507, 5000])
@pytest.mark.slow_interpreted
def test_log_probs_are_unheated_over_what_the_filter_keeps(door, vocabulary, filter_thres, dtype):
    length = door.rows(20, few=1)
    logits = draw(3, length, vocabulary, scale=3.0, dtype=dtype)
    options = {"top_k": number_kept(filter_thres, vocabulary), "mask_id": 1}
    out = door.sample_tokens(logits, temperature=1.7, seed=2, **options)
    assert out.log_probs.dtype == torch.float32
    laws = np.stack([probabilities(row.float(), **options) for row in logits.flatten(0, 1)])
    expected = torch.from_numpy(laws[np.arange(3 * length), out.ids.flatten()]).log().float().view(3, length)
    assert expected.isfinite().all()
    torch.testing.assert_close(out.log_probs, expected, rtol=1e-6, atol=1e-6)


def test_16_bit_logits_are_the_same_numbers_in_float32(door):
    for dtype in (torch.bfloat16, torch.float16):
        logits = draw(2, door.rows(30), 300, dtype=dtype)
        half, single = (door.sample_tokens(z, top_k=120, seed=3) for z in (logits, logits.float()))
        assert torch.equal(half.ids, single.ids)
        # A kernel sums the two in another order, since it loads them by 16 bytes.
        torch.testing.assert_close(half.log_probs, single.log_probs, rtol=1e-6, atol=0.0)


def test_kept_ids_are_kept_with_their_probability(door):
    logits = draw(2, 10, 12)
    options = {"temperature": 0.6, "top_k": 6, "mask_id": 4, "seed": 8}
    kept = torch.full((2, 10), -1)
    kept[0], kept[1, 0] = torch.arange(10), -100
    sampled, out = door.sample_tokens(logits, **options), door.sample_tokens(logits, kept_ids=kept, **options)
    assert torch.equal(out.ids[0], kept[0])
    assert torch.equal(out.ids[1], sampled.ids[1])
    assert torch.equal(out.log_probs[1], sampled.log_probs[1])
    laws = np.stack([probabilities(row, top_k=6, mask_id=4) for row in logits[0]])
    expected = torch.from_numpy(laws[np.arange(10), np.arange(10)]).log().float()
    torch.testing.assert_close(out.log_probs[0], expected, rtol=1e-6, atol=1e-6)
    assert expected.isinf().sum() >= 3
    assert out.log_probs[0, 4] == -math.inf  # the mask's own id


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


def test_a_kept_id_of_a_row_without_a_law_stays(door):
    logits = torch.tensor([[[0.0, math.nan, 1.0]]])
    out = door.sample_tokens(logits, kept_ids=torch.tensor([[2]]), seed=0)
    assert out.ids.item() == 2
    assert out.log_probs.isnan().all()


def test_a_kept_id_beyond_the_vocabulary_gives_nan(kernel):
    """And reads nothing of the next row; the reference raises."""
    out = Door(kernel).sample_tokens(draw(1, 2, 70), kept_ids=torch.tensor([[70, -1]]), seed=0)
    assert out.log_probs[0].isnan().tolist() == [True, False]


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.0}, pytest.param({"temperature": 0.3}, marks=pytest.mark.ptx), {}, {"top_p": 0.999999}],
    ids=str,
)
@pytest.mark.parametrize(("vocabulary", "dtype"), [(5, torch.float32), (301, torch.bfloat16), (4104, torch.bfloat16)])
@pytest.mark.slow_interpreted
def test_a_sure_ids_log_prob_keeps_its_relative_accuracy(door, vocabulary, dtype, options):
    """Wherever the id lies, at the ends too; sampled or kept, of logits or of what gives them."""
    gaps = [8.0, 17.0, 25.0, 40.0]
    places = [0, vocabulary // 2, vocabulary - 2, 1]
    logits = torch.zeros(1, 4, vocabulary)
    logits[0, range(4), places] = torch.tensor(gaps) + round(math.log(vocabulary))
    logits = (logits + draw(vocabulary, seed=vocabulary, scale=0.5).clamp(-1, 1)).to(dtype)
    options = {"mask_id": vocabulary - 1, "with_margin": True, "with_entropy": True, "seed": 1, **options}
    z = logits.double()[0]
    kept = torch.ones_like(z).bool()
    kept[:, -1] = False
    if "top_p" in options:  # which the largest alone has, from a gap of 17 on
        laws = torch.stack([torch.from_numpy(probabilities(row, top_p=options["top_p"], mask_id=vocabulary - 1))
                            for row in logits[0].float()])  # fmt: skip
        kept = laws > 0
    z = z.masked_fill(~kept, -math.inf)
    others = z.sub(z.amax(-1, keepdim=True)).scatter(-1, torch.tensor(places)[:, None], -math.inf).exp()
    expected = -others.sum(-1).log1p()
    law = z.softmax(-1)
    entropies = -expected - (law * z.sub(z.amax(-1, keepdim=True)).clamp(min=-1e30)).sum(-1)
    heads = [logits]
    if vocabulary == 5:
        heads.append(LinearLogits(logits, torch.eye(5)))
    for given in heads:
        for kept_ids in (None, torch.tensor([places])):
            out = door.sample_tokens(given, kept_ids=kept_ids, **options)
            assert out.ids[0].tolist() == places
            torch.testing.assert_close(out.log_probs[0].double(), expected, rtol=4e-6, atol=0.0)
            torch.testing.assert_close(out.entropies[0].double(), entropies, rtol=4e-6, atol=0.0)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("vocabulary", [3, 33, 65, 507, 33001])
def test_equal_rows_have_equal_figures(law_door, vocabulary, threads):
    """Bit for bit, in any batch, at any place of it, compact or not.

    On the reference. A kernel sums a row from where it begins at 16 bytes on, so that the last bit may differ where
    rows begin at other bytes.
    """
    door = law_door
    row = draw(vocabulary, seed=vocabulary)
    options = {"temperature": 0.0, "with_margin": True, "with_entropy": True}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        figures = set()
        for length in (1, 2, 7, 17, 147, 1537):
            if length > door.rows(max(3, 500_000 // vocabulary), few=7):
                continue
            logits = row.expand(1, length, -1).contiguous()
            out = door.sample_tokens(logits, **options)
            listed = torch.arange(length // 2, length)
            parts = door.sample_tokens(logits, row_indices=listed, **options)
            compact = door.sample_tokens(logits[0][listed], row_indices=listed, seq_len=length, **options)
            for some in (out, parts, compact):
                figures |= set(zip(*(x.flatten().tolist() for x in some[1:]), strict=True))
    finally:
        torch.set_num_threads(before)
    assert len(figures) == 1, figures


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
@pytest.mark.slow_interpreted
def test_margins_and_entropies_are_those_of_the_unheated_filtered_law(door, vocabulary, options):
    options = {"top_k": number_kept(options.get("filter_thres"), vocabulary), **options}
    options.pop("filter_thres", None)
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
    options = {"top_k": 35, "temperature": 1.3, "seed": 3, "with_margin": True, "with_entropy": True}
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
    forbidden = torch.tensor([id in forbidden for id in range(4)])  # a list that leaves none is refused
    out = door.sample_tokens(logits, mask_id=mask_id, forbidden=forbidden, seed=1)
    assert out.ids.tolist() == [[lowest] * 2]
    assert out.log_probs.isnan().all()
    healthy = door.sample_tokens(torch.zeros(1, 1, 4), mask_id=mask_id, forbidden=forbidden, seed=1)
    excluded = {*forbidden.nonzero().flatten().tolist(), mask_id} & {0, 1, 2, 3}
    assert healthy.log_probs.isnan().any() == (len(excluded) == 4)


@pytest.mark.parametrize(
    ("forbidden", "mask_id", "left"), [([0, 1, 2, 3], 4, "an id"), ((0, 1, 3), 2, "an id besides mask_id")]
)
def test_a_list_that_forbids_all_is_refused(door, forbidden, mask_id, left):
    with pytest.raises(ValueError, match=f"expected forbidden to leave {left}, received all; leave one out"):
        door.sample_tokens(torch.zeros(1, 1, 4), forbidden=forbidden, mask_id=mask_id)


def test_a_forbidden_id_may_be_kept_and_has_no_probability(door):
    kept_ids = torch.tensor([[2, 1]])
    out = door.sample_tokens(torch.zeros(1, 2, 4), forbidden=[2], kept_ids=kept_ids, seed=1)
    assert torch.equal(out.ids, kept_ids)
    torch.testing.assert_close(out.log_probs, torch.tensor([[-math.inf, -math.log(3)]]))


@pytest.mark.parametrize("place", [-1, 0])
def test_nothing_of_an_empty_canvas_is_a_row(door, place):
    rows = torch.tensor([place, -1])
    for logits in (torch.zeros(0, 3, 5), LinearLogits(torch.zeros(0, 3, 2), torch.ones(5, 2))):
        out = door.sample_tokens(logits, row_indices=rows, seed=1)
        assert (out.ids.tolist(), out.log_probs.tolist()) == ([-1, -1], [0.0, 0.0])


STRAYS = [[0, -1, 2], [-1, 1, -1], [3, 1, 0], [0, 2**40, 1], [-2, -(2**60), 2]]


@pytest.mark.parametrize("rows", STRAYS, ids=str)
@pytest.mark.parametrize("kind", ["all", "compact", "head", "compact head"])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.5}], ids=str)
@pytest.mark.slow_interpreted
def test_listed_rows_that_are_no_position_are_no_rows(backend, rows, kind, filters):
    """Neither read nor written through, wherever they stand in the list; the others are what they are alone."""
    generator = torch.Generator().manual_seed(0)
    device, row_indices = backend.device, torch.tensor(rows)
    embeddings, weight = torch.randn(1, 3, 4, generator=generator), torch.randn(5, 4, generator=generator)
    given = embeddings if "head" in kind else embeddings @ weight.mT
    is_row = (row_indices >= 0) & (row_indices < 3)
    compact = {"seq_len": 3} if "compact" in kind else {}
    if compact:
        given = given[0][row_indices.clamp(0, 2)]

    def sample(given, row_indices, **options):
        logits = functional.LinearLogits(given, weight) if "head" in kind else given
        return backend.run(
            functional.sample_tokens, logits, row_indices=row_indices, seed=1, **compact, **filters, **options
        )

    room = torch.full((9,), 7, device=device)
    figures = torch.full((9,), 7.0, device=device)
    sample(given, row_indices, out=functional.Sampled(room[3:6].view(1, 3), figures[3:6].view(1, 3)))
    for memory in (room, figures):
        assert (memory[:3] == 7).all()
        assert (memory[6:] == 7).all()
    places = row_indices[is_row]
    alone = sample(given[is_row] if compact else given, places)
    assert torch.equal(room[3:6].cpu()[places], alone.ids)
    torch.testing.assert_close(figures[3:6].cpu()[places], alone.log_probs)  # a product rounds by its rows
    others = torch.ones(3, dtype=torch.bool).index_fill(0, places, False)
    assert (room[3:6].cpu()[others] == 7).all()


def test_kept_ids_that_are_none_give_nan(door):
    logits = draw(1, 3, 5)
    out = door.sample_tokens(logits, kept_ids=torch.tensor([[5, 2**40, 1]]), seed=0)
    assert out.log_probs[0, :2].isnan().all()
    torch.testing.assert_close(out.log_probs[0, 2], logits[0, 2].log_softmax(dim=-1)[1])
