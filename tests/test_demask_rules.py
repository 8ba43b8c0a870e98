"""Scores and rules of a demasking step, against the rules of the field in float64 and by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from oracles import draw
from sampling import Door, assert_law

from fastmask import functional
from fastmask.functional import LinearLogits

MASK, V, B, N = 11, 12, 3, 10
SCORES = ["confidence", "margin", "entropy"]


@pytest.fixture
def door(backend):
    return Door(backend)


def canvas(seed=0):
    """Logits [B, N, V], ids and is_masked [B, N]: all masked, most, and nothing."""
    logits = draw(B, N, V, seed=seed, scale=2.0)
    is_masked = torch.rand(B, N, generator=torch.Generator().manual_seed(seed)) < 0.8
    is_masked[0], is_masked[2] = True, False
    ids = torch.arange(B * N).view(B, N) % MASK
    return logits, ids.masked_fill(is_masked, MASK), is_masked


def figures(logits, score, temperature=1.0):
    """What is scored of rows [N, V], float64, by the argmax; high is sure."""
    z = logits.double().numpy().copy()
    z[:, MASK] = -np.inf
    p = np.exp((z - z.max(-1, keepdims=True)) / temperature)
    p /= p.sum(-1, keepdims=True)
    falling = np.sort(p)[:, ::-1]
    if score == "confidence":
        return falling[:, 0]
    if score == "margin":
        return falling[:, 0] - falling[:, 1]
    return (p * np.log(np.maximum(p, 1e-300))).sum(-1)


def surest(sure, masked):
    """Masked positions, surest first, ties to the lower."""
    return sorted(masked, key=lambda n: (-sure[n], n))


def number_by_rule(score, sure, order, rule):
    """How many of them a rule commits, as its paper has it."""
    ((name, bound),) = rule.items()
    if name == "threshold":
        return sum(-sure[n] < bound if score == "entropy" else sure[n] > bound for n in order)
    if name == "factor":
        n = 0
        while n < len(order) and sure[order[n]] >= 1 - bound / (n + 2):
            n += 1
        return n
    entropy, n = 0.0, 0
    while n < len(order) and entropy <= bound:
        entropy -= sure[order[n]]
        n += 1
    return n


RULES = [
    *(("confidence", {"threshold": th}) for th in (0.0, 0.3, 0.5, 1.0)),
    *(("margin", {"threshold": th}) for th in (0.0, 0.2, 0.5)),
    *(("entropy", {"threshold": th}) for th in (0.5, 1.2, 9.0)),
    *(("confidence", {"factor": f}) for f in (0.0, 0.5, 1.0, 2.0, 30.0)),
    *(("entropy", {"entropy_bound": bound}) for bound in (0.0, 0.1, 1.5, 6.0, 1e9)),
]


@pytest.mark.parametrize(("score", "rule"), RULES, ids=str)
@pytest.mark.parametrize("least", [{}, {"commits": 2}, {"counts": 4}], ids=str)
@pytest.mark.slow_interpreted
def test_a_rule_commits_what_its_formula_says(door, score, rule, least):
    """And what commits or counts say besides, one at least; greedy, so that the ids are known."""
    logits, ids, is_masked = canvas()
    out = door.demask_step(
        logits, ids, is_masked, mask_id=MASK, temperature=0.0, score=score, **rule, **least, seed=1
    )
    for b in range(B):
        sure, masked = figures(logits[b], score), is_masked[b].nonzero().flatten().tolist()
        order = surest(sure, masked)
        number = max(1, number_by_rule(score, sure, order, rule), least.get("commits", 0))
        number = max(number, len(order) - least.get("counts", len(order)))
        committed = sorted(order[:number])
        assert (is_masked[b] & ~out.is_masked[b]).nonzero().flatten().tolist() == committed
        z = logits[b].index_fill(-1, torch.tensor([MASK]), -math.inf)
        assert torch.equal(out.ids[b, committed], z.argmax(-1)[committed])
        assert (out.ids[b] == MASK).equal(out.is_masked[b])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("temperature", [0.3, 2.0])
@pytest.mark.slow_interpreted
def test_processed_scores_are_of_the_law_that_is_sampled(door, score, temperature):
    """One a step, by the argmax's figures: the order of Dream and of SDAR."""
    logits, ids, is_masked = canvas(seed=2)
    options = {"mask_id": MASK, "score": score, "commits": 1, "processed": True, "seed": 1}
    out = door.demask_step(logits, ids, is_masked, temperature=temperature, top_k=V, **options)
    if score != "confidence":  # whose figure depends on the sample
        for b in range(2):
            sure = figures(logits[b], score, temperature)
            first = surest(sure, is_masked[b].nonzero().flatten().tolist())[0]
            assert (is_masked[b] & ~out.is_masked[b]).nonzero().flatten().tolist() == [first]
    p = np.exp(out.log_probs[0].double().numpy())
    z = logits[0].double().numpy() / temperature
    z[:, MASK] = -np.inf
    sampled = np.exp(z - z.max(-1, keepdims=True))
    sampled /= sampled.sum(-1, keepdims=True)
    filled = door.demask_step(logits, ids, is_masked, 0, temperature=temperature, mask_id=MASK, seed=1).ids[0]
    np.testing.assert_allclose(p, sampled[np.arange(N), filled], rtol=1e-5)


def test_an_order_of_ones_own_is_followed(door):
    """Left to right, by minus the position."""
    logits, ids, is_masked = canvas()
    order = -torch.arange(N).expand(B, N).float()
    out = door.demask_step(logits, ids, is_masked, mask_id=MASK, commits=3, score=order, seed=1)
    for b in range(2):
        places = is_masked[b].nonzero().flatten().tolist()
        assert (is_masked[b] & ~out.is_masked[b]).nonzero().flatten().tolist() == places[:3]


def test_at_random_every_position_goes_as_often(reference):
    is_masked = torch.ones(4000, 5).bool()
    out = Door(reference).demask_step(
        torch.zeros(4000, 5, 3), is_masked.long() * 2, is_masked, mask_id=2, commits=2, score="random", seed=1
    )
    shares = (~out.is_masked).float().mean(0)
    assert torch.equal((~out.is_masked).sum(-1), torch.full((4000,), 2))
    assert (shares - 0.4).abs().max() < 4 * math.sqrt(0.4 * 0.6 / 4000)


def test_noise_on_the_entropy_keeps_its_sign(reference):
    """P(i first) = softmax(-h_i / c): the score is -h + c G."""
    rows = 20000
    logits = torch.tensor([[0.0, 0.0, -9.0], [2.0, 0.0, -9.0]]).expand(rows, 2, 3)
    is_masked = torch.ones(rows, 2).bool()
    out = Door(reference).demask_step(
        logits, is_masked.long() * 2, is_masked, mask_id=2, commits=1, score="entropy", choice_temperature=0.5, seed=1
    )
    h = torch.tensor([math.log(2), -sum(p * math.log(p) for p in (1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))))])
    expected = (-h / 0.5).softmax(0)[1]
    share = (~out.is_masked)[:, 1].float().mean()
    assert abs(share - expected) < 4 * math.sqrt(0.25 / rows)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("alg_temp", [0.1, 0.4])
def test_dreams_alg_temp_is_noise_of_that_scale(reference, score, alg_temp):
    """Dream's multinomial without replacement of softmax(score / alg_temp): the law of the two committed, where its
    confidence is p (ours is scored as log p: an order of one's own)."""
    rows, places = 12_000, 5
    logits = draw(1, places, V, seed=3, scale=2.0)
    sure = figures(logits[0], score)
    weights = np.exp((sure - sure.max()) / alg_temp)
    law = np.zeros((places, places))
    for first, second in itertools.permutations(range(places), 2):
        chance = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        law[min(first, second), max(first, second)] += chance
    is_masked = torch.ones(rows, places).bool()
    given = score if score != "confidence" else torch.from_numpy(sure).float().expand(rows, places)
    out = Door(reference).demask_step(
        logits.expand(rows, -1, -1), is_masked.long() * MASK, is_masked, mask_id=MASK, temperature=0.0, commits=2,
        score=given, choice_temperature=alg_temp, seed=1,
    )  # fmt: skip
    pairs = (~out.is_masked).nonzero()[:, 1].view(rows, 2)
    counts = np.bincount((places * pairs[:, 0] + pairs[:, 1]).numpy(), minlength=places**2)
    assert_law(counts, law.flatten())


# ---- blocks ----


@pytest.mark.parametrize("options", [{"counts": 1}, {"commits": 2}, {"threshold": 0.3}, {"factor": 1.0},
                                     {"entropy_bound": 1.0, "score": "entropy"}], ids=str)  # fmt: skip
@pytest.mark.slow_interpreted
def test_a_block_is_decoded_as_if_alone(door, options):
    """What is outside stays; inside it is as a canvas on which nothing else is masked."""
    logits, ids, is_masked = canvas(seed=3)
    block = torch.tensor([[2, 6], [5, 9], [0, 4]])
    position = torch.arange(N)
    inside = (position >= block[:, :1]) & (position < block[:, 1:])
    options = {"mask_id": MASK, "seed": 4, "step": 3, **options}
    out = door.demask_step(logits, ids, is_masked, block=block, **options)
    alone = door.demask_step(logits, ids.masked_fill(~inside, 0), is_masked & inside, **options)
    assert torch.equal(out.is_masked, torch.where(inside, alone.is_masked, is_masked))
    assert torch.equal(out.ids, torch.where(inside, alone.ids, ids))
    assert torch.equal(out.log_probs, alone.log_probs)
    assert torch.equal(out.row_indices, alone.row_indices)
    following = torch.tensor([[6, 10], [0, 10], [0, 0]])
    listed = door.demask_step(logits, ids, is_masked, block=block, next_block=following, **options).row_indices
    later = (position >= following[:, :1]) & (position < following[:, 1:])
    assert listed[listed >= 0].tolist() == (out.is_masked & later).flatten().nonzero().flatten().tolist()


def test_a_whole_generation_by_blocks_fills_everything(door):
    """LLaDA's loop: blocks of 4, two steps each, the rows of the next block listed by the step before."""
    _, ids, is_masked = canvas(seed=5)
    given, ids_given = ~is_masked, ids.clone()
    net = draw(V, V, seed=6)
    step, rows, listed = 0, None, []
    for first in range(0, N, 4):
        block = torch.tensor([first, min(first + 4, N)]).expand(B, 2)
        for turn in range(2):
            left = (is_masked[:, first : first + 4].sum(-1) + 1) // 2 if turn == 0 else 0
            following = block if turn == 0 else block + 4
            logits = net[ids]
            out = door.demask_step(
                logits if rows is None else logits.flatten(0, 1)[rows], ids, is_masked, left, mask_id=MASK,
                block=block, next_block=following, row_indices=rows, seed=1, step=step,
            )  # fmt: skip
            ids, is_masked, rows = out.ids, out.is_masked, out.row_indices
            listed.append(int((rows >= 0).sum()))
            step += 1
        assert not is_masked[:, : first + 4].any()
    assert torch.equal(ids[given], ids_given[given])
    assert not (ids == MASK).any()
    assert listed[-1] == 0


@pytest.mark.slow_interpreted
def test_compact_rows_and_heads_give_the_same(door):
    logits, ids, is_masked = canvas(seed=7)
    options = {"mask_id": MASK, "score": "margin", "threshold": 0.4, "seed": 1, "temperature": 0.7}
    whole = door.demask_step(logits, ids, is_masked, **options)
    head = door.demask_step(LinearLogits(logits, torch.eye(V)), ids, is_masked, **options)
    rows = is_masked.flatten().nonzero().flatten()
    compact = door.demask_step(logits.flatten(0, 1)[rows], ids, is_masked, row_indices=rows, **options)
    for other in (head, compact):
        assert torch.equal(whole.ids, other.ids)
        assert torch.equal(whole.is_masked, other.is_masked)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "expected counts, commits or a rule, received none"),
        ({"score": "probability", "counts": 1}, "expected score to be one of confidence, margin, entropy, random"),
        ({"threshold": 0.5, "factor": 1.0}, "expected one rule, received threshold and factor"),
        ({"score": "random", "threshold": 0.5}, "with threshold, received 'random'"),
        ({"score": torch.zeros(B, N), "threshold": 0.5}, "with threshold, received a tensor"),
        ({"score": "margin", "factor": 1.0}, "expected score 'confidence' with factor, received 'margin'"),
        ({"entropy_bound": 1.0}, "expected score 'entropy' with entropy_bound, received 'confidence'"),
        ({"threshold": 1.5}, r"expected threshold in \[0, 1\], received 1.5"),
        ({"score": "entropy", "threshold": -1.0}, r"expected threshold in \[0, inf\), received -1.0"),
        ({"factor": -0.1}, r"expected factor in \[0, inf\)"),
        ({"factor": 1.0, "choice_temperature": 1.0}, "expected choice_temperature=0 with factor"),
        ({"counts": 1, "commits": 1}, "expected counts or commits, received both"),
        ({"commits": -1}, "expected commits"),
        (
            {"counts": 1, "block": torch.zeros(B, 3).long()},
            r"expected block of shape \[B, 2\] = \[3, 2\], received \[3, 3\]",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(options, words):
    logits, ids, is_masked = canvas()
    with pytest.raises((ValueError, TypeError), match=words):
        functional.demask_step(logits, ids, is_masked, mask_id=MASK, **options)
