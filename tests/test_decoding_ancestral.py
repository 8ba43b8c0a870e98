"""The laws of MDLM's ancestral sampling and of ReMDM, as examples/ write them: whole generations against the exact
enumeration of their Markov chains, in float64.

A network of fixed tables stands in: its logits at each position depend on all the ids that it sees.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from sampling import assert_law

from fastmask import functional as F

V, MASK = 3, 3
RATIOS = [1.0, 0.7, 0.25, 0.0]
COSINE = [math.cos(math.pi * t / 2) for t in (0.0, 0.4, 0.6)] + [0.0]
EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mdlm():
    return example("mdlm_ancestral")


@pytest.fixture
def remdm(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return example("remdm")


class Tables:
    """ids [B, N] to logits [B, N, V + 1], another table for each of the (V + 1)^N sequences."""

    def __init__(self, length: int) -> None:
        generator = torch.Generator().manual_seed(length)
        self.digits = (V + 1) ** torch.arange(length)
        self.states = torch.tensor(list(itertools.product(range(V + 1), repeat=length)))
        self.states = self.states.flip(-1)  # in the order of their codes
        self.logits = 1.5 * torch.randn((V + 1) ** length, length, V + 1, generator=generator)

    def __call__(self, ids):
        return self.logits[self.code(ids)]

    def code(self, ids):
        return (ids * self.digits).sum(dim=-1)

    def transition(self, commit: float, remask: float) -> np.ndarray:
        """From each sequence to each, in one step: positions move independently of each other."""
        logits = self.logits.double().clone()
        logits[..., MASK] = -torch.inf
        sampled = commit * logits.softmax(dim=-1)
        sampled[..., MASK] = 1.0 - commit
        kept = (1.0 - remask) * torch.eye(V + 1, dtype=torch.float64)[self.states]
        kept[..., MASK] += remask
        each = torch.where((self.states == MASK)[..., None], sampled, kept)  # [state, position, id after]
        position = torch.arange(each.shape[1])
        return each[:, position, self.states].prod(dim=-1).numpy()

    def law_of_paths(self, steps: list[tuple[float, float]]) -> np.ndarray:
        """Of the sequences after each step, all together: [sequences, ..., sequences], from all masked."""
        law = np.eye(len(self.states))[-1]
        for step in steps:
            law = law[..., None] * self.transition(*step)
        return law.sum(axis=0)  # where it began is no part of it


def paths(net: Tables, step, ratios: list[float], batch: int) -> np.ndarray:
    """What a recipe's generations went through, as the law has it: [batch, steps], codes of sequences."""
    ids = torch.full((batch, len(net.digits)), MASK)
    is_masked, log_probs = torch.ones_like(ids, dtype=torch.bool), torch.zeros(ids.shape)
    codes = []
    for number, (ratio, next_ratio) in enumerate(itertools.pairwise(ratios)):
        step(net, ids, is_masked, log_probs, ratio, next_ratio, mask_id=MASK, seed=5, step=number)
        assert torch.equal(is_masked, ids == MASK)
        codes.append(net.code(ids))
    return torch.stack(codes, dim=-1).numpy()


def counted(codes: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    counts = np.zeros(shape)
    np.add.at(counts, tuple(codes.T), 1)
    return counts


def assert_paths(net: Tables, codes: np.ndarray, law: np.ndarray) -> None:
    """All steps together, and the sequences that remain at the end."""
    counts = counted(codes, law.shape)
    ends = tuple(range(law.ndim - 1))
    assert law.sum() == pytest.approx(1.0, abs=1e-12)
    assert_law(counts.flatten(), law.flatten())
    assert_law(counts.sum(axis=ends), law.sum(axis=ends))


# ---- MDLM ----


@pytest.mark.parametrize("ratios", [RATIOS, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize(("length", "batch"), [(2, 40_000), pytest.param(3, 100_000, marks=pytest.mark.slow)])
def test_ancestral_steps_have_the_law_of_their_chain(mdlm, length, batch, ratios):
    """When each position is committed, to what, and what follows from it for the others."""
    net = Tables(length)
    law = net.law_of_paths([(1.0 - after / before, 0.0) for before, after in itertools.pairwise(ratios)])
    assert_paths(net, paths(net, mdlm.ancestral_step, ratios, batch), law)


def test_when_a_position_is_committed_does_not_depend_on_the_network(mdlm):
    """MDLM's marginals: a position is masked after a step with probability the mask ratio."""
    net = Tables(2)
    codes = paths(net, mdlm.ancestral_step, RATIOS, 40_000)
    is_masked = net.states[codes] == MASK  # [batch, step, position]
    steps = is_masked.sum(dim=1)  # at which step it is committed
    for position in range(2):
        assert_law(np.bincount(steps[:, position], minlength=3), [0.3, 0.45, 0.25])
    joint = np.bincount(3 * steps[:, 0] + steps[:, 1], minlength=9)
    assert_law(joint, np.outer([0.3, 0.45, 0.25], [0.3, 0.45, 0.25]).flatten())


def test_only_committed_rows_are_sampled_and_given_ids_stay(mdlm):
    net = Tables(2)
    ids, is_masked = torch.tensor([[1, MASK]] * 500), torch.tensor([[False, True]] * 500)
    log_probs = torch.full(ids.shape, 7.0)
    mdlm.ancestral_step(net, ids, is_masked, log_probs, 1.0, 0.5, mask_id=MASK, seed=1, step=0)
    assert (ids[:, 0] == 1).all()
    assert (log_probs[:, 0] == 7.0).all()
    assert torch.equal(log_probs[:, 1] == 7.0, is_masked[:, 1])
    assert 180 < is_masked[:, 1].sum() < 320
    logits = net(torch.tensor([[1, MASK]]))[0, 1, :V].log_softmax(dim=-1)
    was = ~is_masked[:, 1]
    torch.testing.assert_close(log_probs[was, 1], logits[ids[was, 1]])


def test_a_list_of_fixed_size_and_a_head_give_the_same(mdlm):
    """Rows listed without waiting, and logits that exist for these rows only."""
    generator = torch.Generator().manual_seed(0)
    table, weight = torch.randn(V + 1, 5, generator=generator), torch.randn(V + 1, 5, generator=generator)
    ids, is_masked = torch.full((50, 6), MASK), torch.ones(50, 6, dtype=torch.bool)
    found = []
    for net in (lambda ids: table[ids] @ weight.mT, lambda ids: F.LinearLogits(table[ids], weight)):
        given = ids.clone(), is_masked.clone(), torch.zeros(50, 6)
        mdlm.ancestral_step(net, *given, 1.0, 0.4, mask_id=MASK, seed=1, step=2)
        found.append(given)
    committed = F.select_at_random(is_masked, 1.0 - 0.4 / 1.0, seed=1, step=2)
    rows = torch.nonzero_static(committed.flatten(), size=committed.numel()).squeeze(-1)
    out = F.Sampled(ids.clone(), torch.zeros(50, 6))
    F.sample_tokens(table[ids] @ weight.mT, mask_id=MASK, row_indices=rows, out=out, seed=1, step=2)
    found.append((out.ids, is_masked & ~committed, out.log_probs))
    for ids_, is_masked_, log_probs in found[1:]:
        assert torch.equal(ids_, found[0][0])
        assert torch.equal(is_masked_, found[0][1])
        torch.testing.assert_close(log_probs, found[0][2])


# ---- ReMDM ----


def remasked(remdm, rule: str, eta: float):
    """A recipe's step with these options."""

    def step(*arguments, **options):
        remdm.remdm_step(*arguments, eta=eta, rule=rule, **options)

    return step


def chances(before: float, after: float, eta: float, rule: str) -> tuple[float, float]:
    """By the paper, in alpha = 1 - mask ratio: to be committed where masked, to be masked where committed."""
    alpha_t, alpha_s = 1.0 - before, 1.0 - after
    most = 1.0 if alpha_t == 0.0 else min(1.0, (1.0 - alpha_s) / alpha_t)
    sigma = {"cap": min(eta, most), "rescale": eta * most}[rule]
    return (alpha_s - (1.0 - sigma) * alpha_t) / (1.0 - alpha_t), sigma


@pytest.mark.parametrize(("rule", "eta"), [("cap", 0.4), ("cap", 1.0), ("rescale", 0.5)])
@pytest.mark.parametrize(
    ("length", "batch", "ratios"),
    [
        (2, 40_000, RATIOS),
        (2, 40_000, [1.0, 0.4, 0.4, 0.0]),  # as many are masked again as are committed
        pytest.param(3, 100_000, RATIOS, marks=pytest.mark.slow),
        pytest.param(2, 100_000, [1.0, 0.6, 0.4, 0.4, 0.0], marks=pytest.mark.slow),
    ],
    ids=["2", "2 at one ratio", "3", "2 for long"],
)
def test_remasking_steps_have_the_law_of_their_chain(remdm, rule, eta, length, batch, ratios):
    net = Tables(length)
    law = net.law_of_paths([chances(before, after, eta, rule) for before, after in itertools.pairwise(ratios)])
    codes = paths(net, remasked(remdm, rule, eta), ratios, batch)
    assert_paths(net, codes, law)
    is_reopened = (net.states[codes[:, :-1]] != MASK) & (net.states[codes[:, 1:]] == MASK)
    assert is_reopened.any()


@pytest.mark.parametrize(("rule", "eta"), [("cap", 0.3), ("rescale", 1.0)])
def test_as_many_are_masked_as_the_ratio_says(remdm, rule, eta):
    """The paper's theorem: with any sigma the marginals are MDLM's."""
    net = Tables(2)
    codes = paths(net, remasked(remdm, rule, eta), RATIOS, 40_000)
    is_masked = (net.states[codes] == MASK).double().mean(dim=(0, 2))
    torch.testing.assert_close(is_masked.tolist(), RATIOS[1:], rtol=0.02, atol=0.0)


def test_without_remasking_it_is_mdlms_step(remdm, mdlm):
    net = Tables(2)
    ours, theirs = (paths(net, step, RATIOS, 2000) for step in (remasked(remdm, "cap", 0.0), mdlm.ancestral_step))
    assert (ours == theirs).mean() > 0.999  # the probabilities round differently


def test_what_is_given_is_never_masked_again(remdm):
    net = Tables(2)
    ids, is_masked = torch.tensor([[1, 2]] * 400), torch.zeros(400, 2, dtype=torch.bool)
    given = torch.tensor([[True, False]] * 400)
    remdm.remdm_step(
        net, ids, is_masked, torch.zeros(400, 2), 0.5, 0.5, eta=0.5, mask_id=MASK, seed=1, step=0, given=given
    )
    assert (ids[:, 0] == 1).all()
    assert not is_masked[:, 0].any()
    assert 140 < is_masked[:, 1].sum() < 260
    assert torch.equal(ids[:, 1] == MASK, is_masked[:, 1])
