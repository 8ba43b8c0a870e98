"""The training step: masks of one's own, what is logged, exact parts of the mean loss, how masks are asked for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from training import CRITICS, MASK, N, Recorder, V, build, clean, transformer

from fastmask import Metrics, NonAutoregressiveWrapper, functional


def by_logits(wrapper: NonAutoregressiveWrapper) -> NonAutoregressiveWrapper:
    """The same wrapper, whose network has a hook before its head and so gives logits."""
    wrapper.net.to_logits.register_forward_hook(lambda module, arguments, output: None)
    return wrapper


def log_probs(wrapper: NonAutoregressiveWrapper, ids: torch.Tensor) -> torch.Tensor:
    """Of every id at every position, as the loss has them."""
    return wrapper.net(ids).detach().double().log_softmax(dim=-1)


def spans(device) -> torch.Tensor:
    """Two neighbours in each of eight sequences but the last, which is left whole."""
    place, first = torch.arange(N), torch.tensor([0, 1, 2, 3, 4, 1, 2, 9])[:, None]
    return ((place >= first) & (place < first + 2)).to(device)


def without_mask(device, **options) -> NonAutoregressiveWrapper:
    """A network whose head never thinks of the mask, so that it makes no difference whether the loss does."""
    torch.manual_seed(5)
    net = transformer()
    net.to_logits = nn.Linear(16, V)
    with torch.no_grad():
        net.to_logits.bias[MASK] = -1e9
    return build(device, net=net, **options)


def mean_loss(device, **options) -> NonAutoregressiveWrapper:
    return without_mask(device, use_simple_mdlm_loss_weight=False, **options)


# ---- masks of one's own ----


@pytest.mark.parametrize("path", ["head", "logits"])
@pytest.mark.parametrize("seen", ["mask", "own"])
def test_own_masks_give_the_mean_loss_there(path, seen, device):
    wrapper, tokens, is_masked = mean_loss(device), clean(device), spans(device)
    wrapper = by_logits(wrapper) if path == "logits" else wrapper
    masked_ids = tokens.masked_fill(is_masked, MASK)
    if seen == "own":
        masked_ids = masked_ids.clone().int()
        masked_ids[0, 0], masked_ids[1, 1] = tokens[0, 0], 3
    loss = wrapper(tokens, is_masked=is_masked, masked_ids=masked_ids if seen == "own" else None).loss
    nll = -log_probs(wrapper, masked_ids).gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(loss.double(), nll[is_masked].mean(), rtol=1e-6, atol=0)
    loss.backward()
    assert wrapper.net.token_emb.emb.weight.grad.isfinite().all()


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("self_cond", [False, True])
def test_masks_that_were_drawn_may_be_handed_in_again(critic, self_cond, device, drawn):
    wrapper, tokens = mean_loss(device, critic=critic, self_cond=self_cond), clean(device)
    torch.manual_seed(3)
    expected = wrapper(tokens)
    (masked,) = drawn
    torch.manual_seed(3)
    losses = wrapper(tokens, is_masked=masked.is_masked, masked_ids=masked.masked_ids)
    assert len(drawn) == 1
    torch.testing.assert_close(losses, expected, rtol=0, atol=0)


def test_the_network_sees_the_masks_given(device):
    net, critic = Recorder(), Recorder(outputs=1)
    wrapper = build(device, net=net, token_critic=critic, schedule=0.5)
    tokens, is_masked = clean(device), spans(device)
    before = is_masked.clone()
    wrapper(tokens, is_masked=is_masked)
    assert torch.equal(net.calls[0]["ids"], tokens.masked_fill(is_masked, MASK))
    assert torch.equal(critic.calls[0]["ids"][~is_masked], tokens[~is_masked])
    assert (critic.calls[0]["ids"] != MASK).all()
    assert torch.equal(is_masked, before)


def test_own_masks_of_nothing_cost_nothing(device):
    wrapper, tokens = mean_loss(device, critic="self"), clean(device)
    losses, metrics = wrapper(tokens, is_masked=torch.zeros_like(tokens, dtype=torch.bool), with_metrics=True)
    assert losses.generator_loss == 0
    assert [float(value) for value in metrics] == [0, 0, 0]
    losses.loss.backward()


# ---- what one logs ----


@pytest.mark.parametrize("path", ["head", "logits"])
@pytest.mark.parametrize("options", [{}, {"schedule": 0.5}, {"compat": True}], ids=str)
@pytest.mark.parametrize("critic", CRITICS)
def test_metrics_are_of_the_masked_tokens(path, options, critic, device, drawn):
    wrapper, tokens = without_mask(device, critic=critic, **options), clean(device, 32)
    wrapper = by_logits(wrapper) if path == "logits" else wrapper
    maskable = tokens != 3
    torch.manual_seed(2)
    expected = wrapper(tokens, maskable=maskable)
    torch.manual_seed(2)
    losses, metrics = wrapper(tokens, maskable=maskable, with_metrics=True)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)
    losses.loss.backward()
    masked, scores = drawn[-1], log_probs(wrapper, drawn[-1].masked_ids)
    nll = -scores.gather(-1, tokens[..., None]).squeeze(-1)[masked.is_masked]
    right = (scores.argmax(dim=-1) == tokens)[masked.is_masked]
    assert 0 < right.sum() < len(right)
    assert isinstance(metrics, Metrics)
    assert metrics.num_masked == masked.is_masked.sum()
    torch.testing.assert_close(metrics.accuracy, right.float().mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(metrics.nll, nll.mean().float(), rtol=1e-6, atol=0)
    assert [value.dtype for value in metrics] == [torch.float32, torch.float32, torch.int64]
    assert not any(value.requires_grad for value in metrics)


def test_metrics_where_only_the_critic_is_trained(device):
    wrapper = build(device, critic="own")
    torch.manual_seed(2)
    _, expected = wrapper(clean(device), with_metrics=True)
    torch.manual_seed(2)
    losses, metrics = wrapper(clean(device), only_train_critic=True, with_metrics=True)
    assert losses.generator_loss is None
    torch.testing.assert_close(metrics, expected, rtol=0, atol=0)


def test_losses_have_three_names_as_upstreams(device):
    loss, generator_loss, critic_loss = build(device)(clean(device))
    assert loss is generator_loss
    assert critic_loss is None


# ---- parts of a batch ----


@pytest.mark.parametrize("kind", [lambda n: n, lambda n: torch.tensor(n), lambda n: torch.tensor([[float(n)]])])
@pytest.mark.parametrize("critic", CRITICS)
def test_parts_of_the_mean_loss_add_up_by_the_masked_tokens(critic, kind, device):
    """Parts with 2, 4, 6 masked tokens and none: an average by their share of all tokens would be another."""
    wrapper, tokens, is_masked = mean_loss(device, critic=critic), clean(device), spans(device)

    def step(rows: slice, **options) -> torch.Tensor:
        torch.manual_seed(4)
        # Temperature 0, since a part draws the critic's sample at rows of its own.
        loss = wrapper(
            tokens[rows], is_masked=is_masked[rows], sample_offset=rows.start, generator_sample_temperature=0.0,
            **options,
        ).loss  # fmt: skip
        loss.backward()
        return loss.detach()

    whole = step(slice(0, 8))
    expected = [parameter.grad.clone() for parameter in wrapper.parameters()]
    wrapper.zero_grad()
    counts = {"num_masked": kind(int(is_masked.sum())), "num_tokens": kind(tokens.numel())}
    parts = [slice(0, 1), slice(1, 3), slice(3, 6), slice(6, 8)]
    losses = [step(part, **counts) for part in parts]
    assert all(loss.shape == () for loss in losses)
    torch.testing.assert_close(sum(losses), whole, rtol=1e-6, atol=0)
    norm = sum(gradient.norm() ** 2 for gradient in expected) ** 0.5
    for parameter, gradient in zip(wrapper.parameters(), expected, strict=True):
        assert (parameter.grad - gradient).norm() <= 2**-18 * gradient.norm() + 2**-22 * norm


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64, torch.bfloat16])
def test_a_number_of_tokens_of_one_element_gives_a_scalar(shape, dtype, device):
    wrapper, tokens = build(device, critic="self"), clean(device)
    torch.manual_seed(1)
    expected = wrapper(tokens, num_tokens=64, generator_sample_temperature=0.5)
    torch.manual_seed(1)
    num_tokens = torch.full(shape, 64, dtype=dtype, device=device)
    losses = wrapper(tokens, num_tokens=num_tokens, generator_sample_temperature=0.5)
    assert [loss.shape for loss in losses] == [()] * 3
    assert [loss.dtype for loss in losses] == [torch.float32] * 3
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=0)


# ---- what masks are asked for ----


@pytest.fixture
def asked(monkeypatch) -> list[dict]:
    """How masks were asked for, in order; what is new in the asking is looked at, and kept from the operation."""
    calls, sampling = [], functional.mask_sampling

    def recording(tokens, **options):
        calls.append(dict(options))
        return sampling(
            tokens, **{k: v for k, v in options.items() if k not in ("gate", "random_excludes", "complement")}
        )

    monkeypatch.setattr(functional, "mask_sampling", recording)
    return calls


def test_gate_excludes_and_complement_are_handed_on(device, asked):
    build(device)(clean(device))
    assert (asked[0]["gate"], asked[0]["random_excludes"], asked[0]["complement"]) == ("batch", None, False)
    is_excluded = torch.zeros(V, dtype=torch.bool)
    is_excluded[[2, 5]] = True
    for excludes in ([2, 5], (2, 5), is_excluded):
        wrapper = build(device, gate="token", no_replace_prob=0.1, random_excludes=excludes)
        wrapper(clean(device), complement=True)
        assert (asked[-1]["gate"], asked[-1]["complement"], asked[-1]["no_replace_prob"]) == ("token", True, 0.1)
        assert torch.equal(asked[-1]["random_excludes"], is_excluded.to(device))
        assert asked[-1]["random_excludes"].device == clean(device).device
        assert list(wrapper.state_dict()) == list(build(device).state_dict())


def test_the_bound_asks_for_no_gate(device, asked):
    build(device, gate="token", random_excludes=[2]).nelbo(clean(device))
    assert not {"gate", "random_excludes", "complement", "no_replace_prob", "random_token_prob"} & set(asked[0])


def test_a_mask_and_its_complement_cover_every_token_once(device, drawn):
    wrapper, tokens = build(device, schedule=0.3), clean(device)
    maskable = tokens != 3
    for complement in (False, True):
        torch.manual_seed(6)
        wrapper(tokens, maskable=maskable, complement=complement)
    one, other = (masked.is_masked for masked in drawn)
    assert one.any(dim=-1).all()
    assert other.any(dim=-1).all()
    assert torch.equal(one ^ other, maskable)
    assert not (one & other).any()


def test_berts_recipe(device, drawn):
    """15 % masked; of them 80 % the mask, 10 % random and none of them special, 10 % as they were."""
    net = Recorder()
    net.max_seq_len = 300
    wrapper = build(
        device, net=net, schedule=0.15, gate="token", no_replace_prob=0.1, random_token_prob=0.1,
        random_excludes=range(6),
    )  # fmt: skip
    tokens = torch.randint(0, 6, (200, 300), generator=torch.Generator().manual_seed(0)).to(device)
    loss = wrapper(tokens).loss
    is_masked, ids = drawn[0].is_masked, drawn[0].masked_ids
    assert (is_masked.sum(dim=-1) == 45).all()
    assert torch.equal(ids[~is_masked], tokens[~is_masked])
    ids, total = ids[is_masked], 200 * 45
    shares = {"mask": (ids == MASK), "kept": ids == tokens[is_masked], "random": (ids >= 6) & (ids != MASK)}
    for name, share in (("mask", 0.8), ("kept", 0.1), ("random", 0.1)):
        assert abs(shares[name].sum().item() / total - share) < 5 * math.sqrt(share * (1 - share) / total), name
    assert sum(share.sum().item() for share in shares.values()) == total
    assert loss > 0


# ---- a constant ratio ----


def test_a_number_masks_that_share_and_takes_the_mean_loss(device, drawn):
    wrapper = without_mask(device, schedule=0.5, no_replace_prob=0.0, random_token_prob=0.0)
    tokens = clean(device, 64)
    assert wrapper.use_simple_mdlm_loss_weight is False
    loss = wrapper(tokens).loss
    assert (drawn[0].counts == math.ceil(N * 0.5)).all()
    nll = -log_probs(wrapper, drawn[0].masked_ids).gather(-1, tokens[..., None]).squeeze(-1)
    torch.testing.assert_close(loss.double(), nll[drawn[0].is_masked].mean(), rtol=1e-6, atol=0)
    assert (wrapper.generate(3) != MASK).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"schedule": 0.5}, {"compat": True}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_the_default_dtype_has_no_say(dtype, options, padded, given, device):
    """521 maskable tokens are 520 in bfloat16, and 261 masked ones 260."""
    wrapper, tokens = build(device, critic="self", **options), clean(device, 87)
    maskable = torch.ones_like(tokens, dtype=torch.bool)
    maskable[0, 0] = False
    parts = {"num_tokens": torch.tensor(1041, device=device)} if given else {}

    def step() -> list[torch.Tensor]:
        torch.manual_seed(0)
        losses, metrics = wrapper(tokens, maskable=maskable if padded else None, with_metrics=True, **parts)
        return [*losses, *metrics]

    expected = step()
    torch.set_default_dtype(dtype)
    try:
        found = step()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("length", [1, 3, N])
def test_shorter_sequences_are_trained_on(critic, length, device):
    wrapper, tokens = build(device, critic=critic, self_cond=True), clean(device)[:, :length]
    losses, metrics = wrapper(tokens, with_metrics=True)
    losses.loss.backward()
    assert losses.loss.isfinite()
    assert 8 <= metrics.num_masked <= 8 * length
