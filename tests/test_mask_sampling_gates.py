"""Gates of single positions, ids that no random token is, complements, and constant ratios."""

from __future__ import annotations

import math

import pytest
import torch
from test_mask_sampling import FOREIGN, assert_equal_outputs, assert_law, foreign

from fastmask import Schedule, functional

MASK, V = 3, 7
MODES = pytest.mark.parametrize("mode", ["exact", "bernoulli"])


def mask(backend, tokens, **options):
    return backend.run(functional.mask_sampling, tokens, **{"mask_id": MASK, "num_tokens": V, "seed": 0, **options})


# ---- each position by itself ----


@MODES
@pytest.mark.parametrize(("keep", "random"), [(0.1, 0.1), (0.3, 0.0), (0.0, 0.6), (0.5, 0.5)])
def test_token_gates_have_their_shares(reference, mode, keep, random):
    """Independent of the mask, of the neighbour and of the id that is drawn; uniform ids."""
    options = {"gate": "token", "no_replace_prob": keep, "random_token_prob": random, "schedule": 0.5, "mode": mode}
    out = mask(reference, foreign(20000, 8), **options)
    kept, shown = out.masked_ids == FOREIGN, out.masked_ids == MASK
    label = torch.where(kept, 0, torch.where(shown, 2, 1))
    shares = [keep, random, 1 - keep - random]
    masked = out.is_masked
    assert kept[~masked].all()
    for column in range(8):
        assert_law(torch.bincount(label[masked[:, column], column], minlength=3), shares, alpha=1e-5)
    both = masked[:, :-1] & masked[:, 1:]
    pairs = 3 * label[:, :-1][both] + label[:, 1:][both]
    assert_law(torch.bincount(pairs, minlength=9), [a * b for a in shares for b in shares])
    ids = out.masked_ids[masked & (label == 1)]
    if random:
        assert_law(torch.bincount(ids, minlength=V), [i != MASK for i in range(V)])


def test_token_gates_leave_no_call_without_kept_tokens(reference):
    """What the batch's coins do to three calls in four."""
    for seed in range(20):
        out = mask(
            reference, foreign(8, 64), seed=seed, gate="token", no_replace_prob=0.1, counts=torch.full((8,), 64)
        )
        assert 0.02 < (out.masked_ids == FOREIGN).float().mean() < 0.2


@MODES
@pytest.mark.parametrize(("keep", "random", "seen"), [(1.0, 0.0, [FOREIGN]), (0.0, 1.0, [0, 1, 2, 4, 5, 6])])
def test_token_gates_of_certainty(backend, mode, keep, random, seen):
    out = mask(
        backend, foreign(3, 70), mode=mode, gate="token", no_replace_prob=keep, random_token_prob=random, schedule=1.0
    )
    assert out.is_masked.all()
    assert out.masked_ids.unique().tolist() == seen


def test_the_gate_leaves_the_mask_alone(backend):
    tokens = foreign(4, 50)
    plain, gated = mask(backend, tokens), mask(backend, tokens, gate="token", no_replace_prob=0.3)
    for field in ("is_masked", "times", "counts", "loss_weights", "row_indices"):
        assert torch.equal(getattr(gated, field), getattr(plain, field))


# ---- ids that are excluded ----


@pytest.mark.parametrize("gate", ["batch", "token"])
@pytest.mark.parametrize("may_be_mask", [False, True])
@pytest.mark.parametrize("excluded", [[0], [6, 5], [0, 2, 4, 6], [3]])
def test_random_ids_are_uniform_over_what_is_left(reference, gate, may_be_mask, excluded):
    options = {"gate": gate, "random_token_prob": 1.0, "random_may_be_mask": may_be_mask}
    for seed in range(99):  # until the coin falls so
        out = mask(reference, foreign(20000, 8), seed=seed, schedule=0.5, random_excludes=excluded, **options)
        if (out.masked_ids[out.is_masked] != MASK).any():
            break
    ids, masked = out.masked_ids, out.is_masked
    allowed = [i not in excluded and (may_be_mask or i != MASK) for i in range(V)]
    assert_law(torch.bincount(ids[masked], minlength=V), allowed)
    for column in range(8):  # half are masked, those with small keys: their ids are no smaller
        assert_law(torch.bincount(ids[masked[:, column], column], minlength=V), allowed, alpha=1e-5)


@pytest.mark.parametrize("may_be_mask", [False, True])
def test_excluding_nothing_changes_nothing(backend, may_be_mask):
    options = {"gate": "token", "random_token_prob": 0.5, "random_may_be_mask": may_be_mask}
    expected = mask(backend, foreign(3, 40), **options)
    for nothing in ([], torch.zeros(V, dtype=torch.bool), () if may_be_mask else [MASK]):
        assert_equal_outputs(mask(backend, foreign(3, 40), random_excludes=nothing, **options), expected)


def test_a_table_and_a_list_say_the_same(backend):
    table = torch.tensor([True, False, True, False, False, False, True])
    options = {"gate": "token", "random_token_prob": 0.8}
    out = mask(backend, foreign(3, 40), random_excludes=table, **options)
    assert_equal_outputs(mask(backend, foreign(3, 40), random_excludes=[6, 0, 2, 2], **options), out)
    assert set(out.masked_ids.unique().tolist()) == {1, 4, 5, MASK, FOREIGN}
    assert table.tolist() == [True, False, True, False, False, False, True]


def test_a_mask_id_outside_the_vocabulary_leaves_the_others(backend):
    options = {"gate": "token", "random_token_prob": 1.0, "mask_id": 50, "schedule": 1.0}
    out = mask(backend, foreign(2, 90), random_excludes=[0, 1, 2, 3, 4], **options)
    assert set(out.masked_ids.unique().tolist()) == {5, 6}


@pytest.mark.parametrize("excludes", [[0, 1, 2, 4, 5, 6], range(V), torch.ones(V, dtype=torch.bool)], ids=str)
def test_no_id_left_is_refused(backend, excludes):
    options = {"random_excludes": excludes, "check": True}
    with pytest.raises(ValueError, match="expected random_excludes to leave an id besides mask_id, received all"):
        mask(backend, torch.zeros(2, 4).long(), random_token_prob=0.1, **options)
    mask(backend, torch.zeros(2, 4).long(), **options)  # nothing is drawn


# ---- complements ----


@MODES
@pytest.mark.parametrize("with_maskable", [False, True])
@pytest.mark.parametrize("gates", [{}, {"gate": "token", "no_replace_prob": 0.3, "random_token_prob": 0.3},
                                   {"no_replace_prob": 0.3, "random_token_prob": 0.3}])  # fmt: skip
def test_a_complement_is_what_the_mask_leaves(backend, mode, with_maskable, gates):
    tokens = foreign(6, 150)
    maskable = torch.arange(900).view(6, 150) * 7 % 11 < 6
    maskable[0] = False
    options = {"mode": mode, "maskable": maskable if with_maskable else None, "seed": 5, **gates}
    first, second = mask(backend, tokens, **options), mask(backend, tokens, complement=True, **options)
    candidates = maskable if with_maskable else torch.ones_like(maskable)
    assert torch.equal(second.is_masked, candidates & ~first.is_masked)
    assert torch.equal(second.times, first.times)
    assert torch.equal(second.counts, second.is_masked.sum(-1))
    flat = second.is_masked.flatten().nonzero().flatten()
    assert second.row_indices.tolist() == flat.tolist() + [-1] * (900 - len(flat))
    assert second.num_masked == len(flat)
    share = second.times if mode == "bernoulli" else second.counts / candidates.sum(-1)
    weights = torch.where(second.counts > 0, 1 / share, 0.0)
    torch.testing.assert_close(second.loss_weights, weights, rtol=1e-4, atol=0)
    assert (second.masked_ids[~second.is_masked] == FOREIGN).all()
    if gates:
        label = second.masked_ids[second.is_masked]
        if gates.get("gate") == "token":
            assert {FOREIGN, MASK, 0, 1, 2, 4, 5, 6} == set(label.tolist())
    else:
        assert (second.masked_ids[second.is_masked] == MASK).all()


def test_a_complement_of_everything_and_of_nothing(backend):
    out = mask(backend, foreign(4, 9), counts=torch.tensor([0, 9, 4, 1]), complement=True)
    assert out.counts.tolist() == [9, 0, 5, 8]
    assert out.loss_weights[1] == 0
    torch.testing.assert_close(out.loss_weights[[0, 2, 3]], 9 / torch.tensor([9.0, 5.0, 8.0]))
    out = mask(backend, foreign(2, 9), schedule=1.0, mode="bernoulli", complement=True)
    assert out.counts.tolist() == out.loss_weights.tolist() == [0, 0]


@pytest.mark.slow_interpreted
def test_a_complements_gate_splits_it_as_a_mask_is_split(backend):
    """Its own counts decide: of 100 positions whose mask has 20, 15 % of 80 are kept."""
    counts = torch.tensor([20, 100, 99])
    options = {"counts": counts, "no_replace_prob": 0.15, "random_token_prob": 0.1, "complement": True}
    splits = set()
    for seed in range(40):
        ids = mask(backend, foreign(3, 100), seed=seed, **options).masked_ids
        kept = ((ids == FOREIGN).sum(-1) - counts).tolist()
        replaced = ((ids < V) & (ids != MASK)).sum(-1).tolist()
        splits.add((*kept, *replaced))
    assert splits == {(0, 0, 0, 0, 0, 0), (12, 0, 1, 0, 0, 0), (0, 0, 0, 8, 0, 1), (12, 0, 1, 6, 0, 0)}


def test_complements_are_uniform_too(reference):
    out = mask(reference, foreign(20000, 4), counts=torch.full((20000,), 1), complement=True, no_replace_prob=0.3)
    code = (out.is_masked * 2 ** torch.arange(4)).sum(-1)
    assert_law(torch.bincount(code, minlength=16), [i.bit_count() == 3 for i in range(16)])


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("rows", [129, 300])
def test_complements_list_rows_after_many(kernel, reference, rows):
    """More rows than are counted at once."""
    tokens = foreign(rows, 3)
    assert_equal_outputs(mask(kernel, tokens, complement=True), mask(reference, tokens, complement=True))


# ---- constant ratios ----


@MODES
@pytest.mark.parametrize("complement", [False, True])
def test_a_number_is_a_constant_ratio(backend, mode, complement):
    tokens = foreign(20, 100)
    out = mask(backend, tokens, schedule=0.15, mode=mode, complement=complement)
    assert (out.loss_weights == 0).all()
    assert out.times.unique().numel() == 20
    if mode == "exact":
        assert (out.counts == (84 if complement else 16)).all()  # float32(.15) * 100 is above 15
    else:
        share = out.is_masked.float().mean().item()
        assert abs(share - (0.85 if complement else 0.15)) < 4 * math.sqrt(0.15 * 0.85 / 2000)
    flat = Schedule(lambda t: torch.full_like(t, 0.15), torch.zeros_like)
    assert_equal_outputs(mask(backend, tokens, schedule=flat, mode=mode, complement=complement), out)


def test_a_ratio_of_0_masks_nothing_and_weighs_0(backend):
    nothing = Schedule(torch.zeros_like, torch.zeros_like)
    out = mask(backend, foreign(3, 9), schedule=nothing, mode="bernoulli")
    assert out.counts.tolist() == out.loss_weights.tolist() == [0, 0, 0]


@pytest.mark.parametrize("ratio", [0.0, -0.1, 1.5, math.nan])
def test_a_ratio_outside_0_1_is_refused(reference, ratio):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        mask(reference, foreign(1, 4), schedule=ratio)
