"""Log-probabilities with gradients, as docs/likelihoods.md has them: against float64, covered once, by one seed."""

from __future__ import annotations

import itertools
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmask import functional as F

OPERATION = "mask_sampling"
PAGE = Path(__file__).parent.parent / "docs" / "likelihoods.md"
V, MASK, D, B, N = 11, 10, 5, 3, 8


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_tokens(batch=B, length=N):
    return torch.arange(batch * length).view(batch, length) * 7 % MASK


@pytest.fixture(scope="module")
def page() -> dict:
    """What the page's blocks leave, run one after the other."""
    names: dict = {"__name__": "page"}
    torch.manual_seed(0)
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), names)
    return names


# ---- of the masked tokens ----


def plain_log_probs(embeddings, weight, bias, tokens, is_masked):
    """A log-softmax of everything, gathered."""
    logits = embeddings @ weight.mT + bias
    logits = logits.index_fill(-1, torch.tensor([MASK]), -torch.inf)
    return logits.log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1).where(is_masked, 0.0)


@pytest.mark.parametrize("listed", [False, True], ids=["mask", "list"])
def test_they_and_their_gradients_are_the_log_softmax(listed):
    """In float64, for any weights that a loss gives the tokens; nothing where nothing is masked."""
    tokens = some_tokens()
    masked = F.mask_sampling(tokens, mask_id=MASK, num_tokens=V, seed=3)
    leaves = draw(B, N, D), draw(V, D, seed=1), draw(V, seed=2)
    of_tokens = draw(B, N, seed=4)
    where = {"row_indices": masked.row_indices} if listed else {"is_masked": masked.is_masked}
    found = []
    for ours in (True, False):
        given = [leaf.clone().requires_grad_() for leaf in leaves]
        if ours:
            embeddings, weight, bias = given
            out = -F.linear_masked_cross_entropy(
                embeddings, weight, tokens, bias=bias, reduction="none", exclude_id=MASK, **where
            ).loss
        else:
            out = plain_log_probs(*given, tokens, masked.is_masked)
        found.append([out, *torch.autograd.grad(out, given, of_tokens)])
    assert 0 < masked.is_masked.sum() < tokens.numel()
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert (found[0][0][~masked.is_masked] == 0).all()
    assert (found[0][1][~masked.is_masked] == 0).all()


def test_the_pages_log_probs_are_those(page):
    trunk, head, masked, tokens = (page[name] for name in ("trunk", "head", "masked", "tokens"))
    logits = head(trunk(masked.masked_ids)).double()
    logits[..., page["MASK"]] = -torch.inf
    expected = logits.log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1).where(masked.is_masked, 0.0)
    found = page["log_probs"](trunk, head, masked)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert found.dtype == torch.float32
    assert masked.is_masked.any()


# ---- each token once ----


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_mask_and_its_complement_cover_each_position_once(backend, mode, schedule):
    tokens = some_tokens()
    maskable = draw(B, N, seed=5) > -0.7
    for seed in range(3):
        one, other = (
            backend.run(
                F.mask_sampling, tokens, mask_id=MASK, num_tokens=V, schedule=schedule, mode=mode, maskable=maskable,
                complement=complement, seed=seed,
            )
            for complement in (False, True)
        )  # fmt: skip
        assert torch.equal(one.is_masked.long() + other.is_masked, maskable.long())
        assert torch.equal(one.times, other.times)
        for masked in (one, other):
            assert torch.equal(masked.masked_ids, tokens.masked_fill(masked.is_masked, MASK))


def test_the_pages_pair_has_each_token_once(page):
    each, is_answer, pair, tokens = (page[name] for name in ("each", "is_answer", "pair", "tokens"))
    assert ((each != 0) == is_answer).all()
    for masked in pair:
        logits = page["head"](page["trunk"](masked.masked_ids)).double()
        logits[..., page["MASK"]] = -torch.inf
        expected = logits.log_softmax(dim=-1).gather(-1, tokens[..., None]).squeeze(-1)
        torch.testing.assert_close(each[masked.is_masked].double(), expected[masked.is_masked], rtol=1e-5, atol=1e-6)
    assert page["loss"].isfinite()
    assert all(parameter.grad.abs().sum() > 0 for parameter in page["head"].parameters())


# ---- by one seed ----


@pytest.mark.parametrize("complement", [False, True])
def test_one_seed_gives_policy_old_and_reference_the_same_mask(backend, reference, complement):
    """Whatever else was drawn meanwhile, on each backend, and for each part of the batch."""
    tokens = some_tokens(6)
    mask = partial(F.mask_sampling, mask_id=MASK, num_tokens=V, complement=complement, seed=2**63)
    whole = reference.run(mask, tokens)
    torch.rand(5)
    again = backend.run(mask, tokens)
    parts = [backend.run(mask, tokens[i : i + 2], sample_offset=i) for i in (0, 2, 4)]
    for field in ("masked_ids", "is_masked", "times", "counts", "loss_weights"):
        expected = getattr(whole, field)
        assert torch.equal(getattr(again, field), expected)
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), expected)
    assert not torch.equal(whole.is_masked, reference.run(mask, tokens + 0, seed=1).is_masked)


def test_the_pages_ratios_are_one_where_nothing_is_masked_and_for_equal_networks(page):
    whole = page["whole"]
    old = page["log_probs"](page["old_trunk"], page["old_head"], whole)
    same = page["log_probs"](page["old_trunk"], page["old_head"], page["masked_by"](7, slice(0, 4)))
    assert torch.equal(old, same)
    new = page["log_probs"](page["trunk"], page["head"], whole)
    assert ((new - old).exp()[~whole.is_masked] == 1).all()
    assert ((new - old).exp()[whole.is_masked] != 1).all()


# ---- of a whole answer ----


def any_order_nll(costs: np.ndarray) -> float:
    """By enumeration: the mean over k of 1 .. n, and over the subsets S of k positions, of n / k sum of S's costs.

    costs: [2^n, n], of each position under each mask.
    """
    n = costs.shape[1]
    total = 0.0
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(range(n), k))
        sums = [sum(costs[sum(2**i for i in subset), i] for i in subset) for subset in subsets]
        total += n / k * np.mean(sums) / n
    return total


@pytest.mark.parametrize(
    ("mode", "complement", "is_bound"),
    [("exact", False, True), ("bernoulli", False, True), ("bernoulli", True, True), ("exact", True, False)],
)
def test_weighted_sums_are_the_bound_where_the_page_says_so(reference, mode, complement, is_bound):
    """A table of costs stands for a network: each position's depends on all that is masked."""
    length, batch = 3, 40_000
    costs = draw(2**length, length, seed=6).exp()
    masked = reference.run(
        F.mask_sampling, torch.zeros(batch, length).long(), mask_id=1, num_tokens=2, mode=mode, complement=complement,
        times=(torch.arange(batch) + 0.5) / batch, seed=11,
    )  # fmt: skip
    codes = (masked.is_masked * 2 ** torch.arange(length)).sum(dim=-1)
    estimates = masked.loss_weights.double() * (costs[codes] * masked.is_masked).sum(dim=-1)
    error = estimates.std() / batch**0.5
    off = (estimates.mean() - any_order_nll(costs.numpy())).abs() / error
    assert off < 4 if is_bound else off > 20


def test_the_pages_bound_is_a_weighted_sum(page):
    masked = page["masked"]
    nll = -page["log_probs"](page["trunk"], page["head"], masked)
    expected = [-(weight * row.sum()).item() for weight, row in zip(masked.loss_weights, nll, strict=True)]
    assert page["bounds"].tolist() == pytest.approx(expected, rel=1e-5)
    assert (page["bounds"] < 0).all()


# ---- entropies ----


def test_the_entropies_of_the_page_are_the_samplers(page):
    logits = page["head"](page["rows"].detach())
    expected = F.sample_tokens(logits[None], mask_id=page["MASK"], with_entropy=True, seed=0).entropies[0]
    torch.testing.assert_close(page["entropies"], expected)
    assert page["trunk"].weight.grad.abs().sum() > 0
