"""The wrapper: x-transformers' users, randomness, and what users do with a model."""

from __future__ import annotations

import itertools
import pickle
import random

import pytest
import torch
import x_transformers.nonautoregressive_wrapper as upstream
from torch import nn
from training import CRITICS, MASK, SCHEDULES, N, V, build, clean, transformer
from x_transformers import Encoder, TransformerWrapper

from fastmask import Losses, NonAutoregressiveWrapper

# ---- x-transformers' users ----


@pytest.mark.parametrize("weighted", [True, False])
def test_what_x_transformers_tests_of_its_wrapper(weighted, device):
    """tests/test_x_transformers.py of 2.31.10, its import replaced; its size is the reason for no more of it."""
    layers = Encoder(dim=512, depth=4, rotary_pos_emb=True)
    net = TransformerWrapper(num_tokens=257, max_seq_len=1024, attn_layers=layers)
    wrapper = NonAutoregressiveWrapper(net, mask_id=256, use_simple_mdlm_loss_weight=weighted).to(device)
    loss = wrapper(torch.randint(0, 257 - 1, (1, 1024), device=device))
    loss.loss.backward()
    assert loss.loss.isfinite()
    assert all(parameter.grad is not None for parameter in wrapper.parameters())


GRID = list(
    itertools.product(
        ["linear", "cosine", "callable"], [False, True], CRITICS, [False, True], [True, False], [False, True]
    )
)


@pytest.mark.parametrize(("schedule", "self_cond", "critic", "remask", "weighted", "compat"), GRID)
def test_every_set_of_options_trains_and_generates(schedule, self_cond, critic, remask, weighted, compat, device):
    wrapper = build(
        device,
        critic=critic,
        schedule=SCHEDULES[schedule],
        self_cond=self_cond,
        can_mask_prev_unmasked=remask,
        use_simple_mdlm_loss_weight=weighted,
        compat=compat,
        steps=3,
    )
    losses = wrapper(clean(device))
    assert isinstance(losses, Losses)
    assert losses._fields == upstream.Losses._fields
    assert (losses.critic_loss is None) == (critic == "none")
    if critic == "none":
        assert losses.loss is losses.generator_loss
    losses.loss.backward()
    for name, parameter in wrapper.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    before = [parameter.clone() for parameter in wrapper.parameters()]
    torch.optim.SGD(wrapper.parameters(), lr=1e-3).step()
    assert not all(map(torch.equal, before, wrapper.parameters()))
    ids = wrapper.generate(3)
    assert ids.shape == (3, N)
    assert ids.dtype == torch.int64
    assert (ids >= 0).all()
    assert (ids < (V if compat else MASK)).all()


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("self_cond", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_x_transformers_loads(critic, self_cond, tied, device):
    torch.manual_seed(9)
    theirs = build(
        device, upstream.NonAutoregressiveWrapper, critic=critic, self_cond=self_cond,
        net=transformer(tie_embedding=tied),
    )  # fmt: skip
    ours = build(device, critic=critic, self_cond=self_cond, net=transformer(tie_embedding=tied))
    for value in theirs.state_dict().values():
        value.add_(1.0)
    assert ours.load_state_dict(theirs.state_dict(), strict=True).missing_keys == []
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))  # the self critic shares its trunk


def test_arguments_and_defaults_are_upstreams():
    import inspect

    for method in ("__init__", "forward", "generate"):
        theirs = inspect.signature(getattr(upstream.NonAutoregressiveWrapper, method)).parameters
        ours = inspect.signature(getattr(NonAutoregressiveWrapper, method)).parameters
        for name, parameter in theirs.items():
            default = ours[name].default
            if name == "use_simple_mdlm_loss_weight":  # None is upstream's, but where the schedule is a number
                assert default is None
                default = build("cpu").use_simple_mdlm_loss_weight
            assert default == parameter.default, (method, name)
            assert ours[name].kind == parameter.kind, (method, name)


# ---- randomness ----


@pytest.mark.parametrize("how", ["manual_seed", "generator"])
def test_a_seed_reproduces_the_step(how, device, monkeypatch):
    """docs/compat.md: coins and self-conditioning too, and Python's ``random`` has no say."""
    monkeypatch.setattr(random, "random", None)
    monkeypatch.setattr(upstream, "random", None)
    wrapper = build(device, critic="self", self_cond=True)

    def step(seed: int) -> list[torch.Tensor]:
        if how == "manual_seed":
            torch.manual_seed(seed)
            return [wrapper(clean(device)).loss for _ in range(3)]
        generator = torch.Generator().manual_seed(seed)
        return [wrapper(clean(device), generator=generator).loss for _ in range(3)]

    assert step(1) == step(1)
    assert len({float(loss.detach()) for loss in step(1) + step(2)}) == 6


def test_the_default_device_has_no_say():
    """As after torch.set_default_device; meta tensors have no values to give."""
    wrapper, tokens = build("cpu", critic="self", self_cond=True), clean("cpu")

    def step() -> list[torch.Tensor]:
        generator = torch.Generator("cpu").manual_seed(0)
        loss = wrapper(tokens, maskable=tokens != 3, generator=generator).loss
        loss.backward()
        return [loss, wrapper.nelbo(tokens, generator=generator), wrapper.generate(2, generator=generator)]

    expected = step()
    with torch.device("meta"):
        torch.testing.assert_close(step(), expected, rtol=0.0, atol=0.0)
        wrapper(tokens)


def test_a_generator_leaves_torchs_own_alone(device):
    wrapper = build(device, critic="own", self_cond=True)
    before = torch.get_rng_state()
    wrapper(clean(device), generator=torch.Generator().manual_seed(0))
    wrapper.nelbo(clean(device), generator=torch.Generator().manual_seed(0))
    wrapper.generate(2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_draw_masks_of_their_own(device, drawn):
    wrapper = build(device)
    for offset, rows in ((0, slice(0, 8)), (0, slice(0, 4)), (4, slice(4, 8))):
        torch.manual_seed(5)
        wrapper(clean(device)[rows], sample_offset=offset)
    whole, first, second = (masked.masked_ids for masked in drawn)
    assert torch.equal(whole, torch.cat([first, second]))


# ---- what users do with a model ----


class Power(nn.Module):
    """A schedule with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor(2.0))

    def forward(self, t):
        return 1 - t**self.exponent


def arc(t):
    return (1 - t**2) ** 0.5


def test_a_module_as_schedule_is_a_submodule_as_upstream(device):
    ours, theirs = (
        build(device, kind, schedule=Power())
        for kind in (NonAutoregressiveWrapper, upstream.NonAutoregressiveWrapper)
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert "schedule_fn.exponent" in ours.state_dict()
    ours(clean(device)).loss.backward()
    assert (ours.generate(2) != MASK).all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "schedule='linear', mask_mode='exact', use_simple_mdlm_loss_weight=True"),
        ({"schedule": Power(), "use_simple_mdlm_loss_weight": False}, "schedule='Power', mask_mode='exact'"),
        (
            {"schedule": arc, "mask_mode": "bernoulli", "self_cond": True, "can_mask_prev_unmasked": True},
            "schedule='arc', mask_mode='bernoulli', self_cond=True, can_mask_prev_unmasked=True, "
            "use_simple_mdlm_loss_weight=True",
        ),
        (
            {"schedule": "cosine", "stratified_times": True, "compat": True},
            "schedule='cosine', mask_mode='exact', use_simple_mdlm_loss_weight=True, stratified_times=True, "
            "compat=True",
        ),
        (
            {"schedule": 0.15, "gate": "token", "no_replace_prob": 0.1},
            "schedule=0.15, mask_mode='exact', gate='token'",
        ),
    ],
    ids=["default", "module", "bernoulli", "compat", "BERT"],
)
def test_a_wrapper_tells_what_it_was_built_with(options, told):
    wrapper = build("cpu", steps=5, **options)
    numbers, head = "num_tokens=12, max_seq_len=6, mask_id=11, steps=5", "True (TransformerWrapper's to_logits)"
    assert wrapper.extra_repr() == f"{numbers}, {told}, linear_head={head}"
    assert wrapper.extra_repr() in repr(wrapper)


def test_a_wrapper_can_be_pickled(device):
    wrapper = build(device, schedule="cosine", self_cond=True, critic="self")
    copy = pickle.loads(pickle.dumps(wrapper))
    torch.manual_seed(1)
    expected = wrapper(clean(device)).loss
    torch.manual_seed(1)
    assert torch.equal(copy(clean(device)).loss, expected)
