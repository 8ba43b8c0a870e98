"""The training objective: self-conditioning and critics."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training import MASK, N, Recorder, V, build, clean

from fastmask import NonAutoregressiveWrapper, functional

# ---- self-conditioning ----


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_self_conditioning(prob, device):
    net = Recorder()
    wrapper = build(device, net=net, self_cond=True, self_cond_train_prob=prob)
    losses = wrapper(clean(device))
    null = wrapper.to_self_cond(wrapper.null_embed)
    assert len(net.calls) == 1 + int(prob)
    torch.testing.assert_close(net.calls[0]["sum_embeds"], null, rtol=0, atol=0)
    assert net.calls[-1]["grad"]
    if prob == 1.0:
        first, second = net.calls
        assert not first["grad"]
        assert torch.equal(first["ids"], second["ids"])
        expected = wrapper.to_self_cond(net.embedding(first["ids"]) + null)
        torch.testing.assert_close(second["sum_embeds"], expected)
    losses.loss.backward()
    assert (wrapper.to_self_cond.weight.grad != 0).any()
    # Data parallelism waits for a gradient of each parameter: null_embed has one in every step.
    assert wrapper.null_embed.grad is not None
    assert (wrapper.null_embed.grad != 0).any() == (prob == 0.0)


def test_self_conditioning_takes_its_share_of_steps(device):
    net = Recorder()
    wrapper = build(device, net=net, self_cond=True)
    torch.manual_seed(1)
    for _ in range(400):
        wrapper(clean(device, 1))
    share = (len(net.calls) - 400) / 400
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 400)


# ---- critic ----


def parameter_names(wrapper: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, parameter in wrapper.named_parameters() if parameter.grad is not None}


def test_only_train_generator(device):
    wrapper = build(device, critic="own")
    losses = wrapper(clean(device), only_train_generator=True)
    assert losses.loss is losses.generator_loss
    assert losses.critic_loss is None
    losses.loss.backward()
    assert parameter_names(wrapper) == {"net"}


@pytest.mark.parametrize("self_cond", [False, True])
def test_only_train_critic_leaves_the_generator_without_gradient(self_cond, device):
    wrapper = build(device, critic="own", self_cond=self_cond)
    losses = wrapper(clean(device), only_train_critic=True)
    assert losses.loss is losses.critic_loss
    assert losses.generator_loss is None
    losses.loss.backward()
    assert parameter_names(wrapper) == {"token_critic"}


def test_only_train_critic_builds_no_graph_of_the_generator(device):
    net, critic = Recorder(), Recorder(outputs=1)
    wrapper = build(device, net=net, token_critic=critic)
    for flag in (False, True):
        wrapper(clean(device), only_train_critic=flag)
        assert net.calls[-1]["grad"] is not flag
        assert critic.calls[-1]["grad"]


def test_the_self_critic_trains_the_shared_trunk_but_not_the_generators_head(device):
    wrapper = build(device, critic="self")
    wrapper(clean(device), only_train_critic=True).loss.backward()
    assert wrapper.net.token_emb.emb.weight.grad is not None
    assert wrapper.token_critic.to_logits.weight.grad is not None
    assert wrapper.net.to_logits.weight.grad is None


@pytest.mark.parametrize("critic", ["own", "self"])
def test_the_generator_learns_nothing_through_its_samples(critic, device):
    """The critic's gradient reaches the generator through a shared trunk only."""
    wrapper = build(device, critic=critic)
    losses = wrapper(clean(device))
    (gradient,) = torch.autograd.grad(losses.critic_loss, wrapper.net.to_logits.weight, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_critic_loss_weight(weight, device):
    losses = build(device, critic="own", critic_loss_weight=weight)(clean(device))
    torch.testing.assert_close(losses.loss, losses.generator_loss + weight * losses.critic_loss)


@pytest.mark.parametrize("padded", [False, True])
def test_the_critics_loss_is_the_formula(padded, device, drawn):
    critic = Recorder(outputs=1)
    wrapper = build(device, token_critic=critic)
    tokens = clean(device)
    maskable = torch.rand(8, N, generator=torch.Generator().manual_seed(4)).to(device) < 0.6 if padded else None
    loss = wrapper(tokens, maskable=maskable, generator_sample_temperature=2.0).critic_loss
    generated = critic.calls[0]["ids"]
    assert torch.equal(generated[~drawn[0].is_masked], tokens[~drawn[0].is_masked])
    assert (generated != MASK).all()
    wrong = (generated != tokens).float()
    assert 0 < wrong.sum() <= drawn[0].is_masked.sum()
    losses = F.binary_cross_entropy_with_logits(critic(generated).squeeze(-1), wrong, reduction="none")
    torch.testing.assert_close(loss, losses.mean() if maskable is None else losses[maskable].mean())


def test_a_critic_may_leave_the_last_dimension_out(device):
    class Squeezed(Recorder):
        def forward(self, ids, **kwargs):
            return super().forward(ids, **kwargs).squeeze(-1)

    losses, ids = [], []
    for kind in (Recorder, Squeezed):
        torch.manual_seed(8)
        wrapper = build(device, token_critic=kind(outputs=1))
        torch.manual_seed(2)
        losses.append(wrapper(clean(device)).critic_loss)
        ids.append(wrapper.generate(4, steps=3))
    assert losses[0] == losses[1] > 0
    assert torch.equal(*ids)


def test_sample_temperature(device):
    """At 0 the critic judges the generator's favourites; drawn from U(0, 1) otherwise."""
    net, critic = Recorder(), Recorder(outputs=1)
    wrapper = build(device, net=net, token_critic=critic)
    tokens = clean(device, 64)
    wrapper(tokens, generator_sample_temperature=0.0)
    generated, visible = critic.calls[0]["ids"], net.calls[0]["ids"]
    logits = net.head(net.embedding(visible))
    logits[..., MASK] = -math.inf
    filled = generated != tokens
    assert filled.any()
    assert torch.equal(generated[filled], logits.argmax(dim=-1)[filled])
    wrapper(tokens, generator_sample_temperature=100.0)
    shares = torch.bincount(critic.calls[1]["ids"][critic.calls[1]["ids"] != tokens], minlength=V).float()
    assert (shares[:MASK] > 0).all()


def test_a_critic_may_be_any_callable_and_gets_what_its_signature_takes(device):
    seen = []

    def critic(ids, context=None):
        seen.append(context)
        return torch.zeros(*ids.shape, 1, device=ids.device)

    def net(ids, mask=None, context=None):
        return torch.zeros(*ids.shape, V, device=ids.device)

    net.num_tokens, net.max_seq_len = V, N
    wrapper = NonAutoregressiveWrapper(net, mask_id=MASK, token_critic=critic)
    everything = {"mask": torch.ones(8, N, dtype=torch.bool, device=device), "context": torch.zeros(1, device=device)}
    losses = wrapper(clean(device), **everything)
    assert losses.critic_loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert seen == [everything["context"]]


def test_only_train_critic_does_not_work_out_the_generators_loss(device, monkeypatch):
    wrapper = build(device, critic="own")
    monkeypatch.setattr(wrapper, "_generator_loss", lambda *_: pytest.fail("the loss is dropped"))
    assert wrapper(clean(device), only_train_critic=True).generator_loss is None


@pytest.mark.parametrize("flags", [{}, {"only_train_critic": True}], ids=str)
def test_no_grad_reaches_network_and_critic(flags, device):
    """A validation loss must not keep the network's activations."""
    net, critic = Recorder(), Recorder(outputs=1)
    wrapper = build(device, net=net, token_critic=critic)
    with torch.no_grad():
        losses = wrapper(clean(device), **flags)
    assert not any(call["grad"] for call in net.calls + critic.calls)
    assert not losses.loss.requires_grad


def test_the_temperature_of_the_critics_sample_is_uniform(device, monkeypatch):
    temperatures, sampler = [], functional.sample_tokens

    def recording(*arguments, **options):
        temperatures.append(options["temperature"])
        return sampler(*arguments, **options)

    monkeypatch.setattr(functional, "sample_tokens", recording)
    wrapper = build(device, net=Recorder(), token_critic=Recorder(outputs=1))
    for _ in range(300):
        wrapper(clean(device, 1))
    quarters = torch.bincount((4 * torch.tensor(temperatures)).long(), minlength=4)
    assert quarters.sum() == 300
    assert len(quarters) == 4
    assert ((quarters - 75).abs() < 5 * math.sqrt(300 * 0.25 * 0.75)).all()
