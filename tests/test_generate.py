"""Generation: how many positions remain masked, which, what stays untouched, and what is told."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from generating import MASK, Context, FixedCritic, Jumping, Known, N, V, prompts, varied, wrap, wrap_small
from torch import nn
from x_transformers import Encoder, TransformerWrapper

from fastmask import NonAutoregressiveWrapper, Schedule, Trajectory, functional, upstream
from fastmask.schedules import as_schedule, step_counts

# ---- counts ----


@pytest.mark.parametrize(
    ("compat", "expected"),
    [(False, list(range(17, -1, -1))), (True, [17, 16, 15, 14, 13, 11, 11, 10, 9, 7, 7, 5, 5, 3, 3, 1, 1, 0])],
)
def test_eighteen_steps_of_eighteen_positions(compat, expected, device):
    _, trajectory = wrap(device, compat=compat).generate(3, return_trajectory=True)
    assert trajectory.is_masked.sum(dim=-1).tolist() == [[count] * 3 for count in expected]


def high_end(t):
    return 1 - 0.5 * t


@pytest.mark.parametrize("remask", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine", high_end])
@pytest.mark.parametrize("length", [1, 3, 4, 18])
@pytest.mark.parametrize("steps", [1, 2, 5, 18, 25])
def test_the_scheduled_number_remains_masked(schedule, length, steps, remask, device):
    wrapper = wrap(device, varied(length), schedule=schedule, can_mask_prev_unmasked=remask)
    ids, trajectory = wrapper.generate(4, steps=steps, return_trajectory=True)
    assert isinstance(trajectory, Trajectory)
    expected = step_counts(as_schedule(schedule), steps, torch.full((4,), length))
    assert torch.equal(trajectory.is_masked.sum(dim=-1).cpu(), expected)
    assert expected[-1].eq(0).all()
    assert torch.equal(trajectory.ids == MASK, trajectory.is_masked)  # mask_id where masked, and only there
    assert torch.equal(trajectory.ids[-1], ids)
    assert (ids != MASK).all()
    assert trajectory.ids.dtype == torch.int64
    assert trajectory.log_probs.dtype == torch.float32
    assert trajectory.ids.shape == trajectory.log_probs.shape == (steps, 4, length)


# ---- which steps are run ----


def runs(wrapper: NonAutoregressiveWrapper, **options) -> int:
    wrapper.net.calls.clear()
    wrapper.generate(2, **options)
    return len(wrapper.net.calls)


def test_the_network_runs_where_something_is_committed(device):
    assert runs(wrap(device, varied(4))) == 4
    assert runs(wrap(device, varied(1))) == 1
    assert runs(wrap(device, varied(18))) == 18
    assert runs(wrap(device, varied(18), compat=True)) == len({17, 16, 15, 14, 13, 11, 10, 9, 7, 5, 3, 1, 0})
    # The cosine leaves little to its first steps: 17, 17, 17, 16, ...
    cosine = step_counts(as_schedule("cosine"), 18, torch.tensor([18])).squeeze(-1).tolist()
    assert runs(wrap(device, varied(18), schedule="cosine")) == len({18, *cosine}) - 1 < 18


@pytest.mark.parametrize("options", [{"self_cond": True}, {"can_mask_prev_unmasked": True}], ids=str)
def test_where_a_step_can_matter_the_network_runs(options, device):
    """4 (t - 1) falls below 1 at the fifteenth of 18 steps, after which nothing is open."""
    assert step_counts(as_schedule("linear"), 18, torch.tensor([4])).squeeze(-1).tolist().index(0) == 13
    assert runs(wrap(device, varied(4), **options)) == 14
    assert runs(wrap(device, varied(4), **options), steps=4) == 4


def test_nothing_to_do(device):
    wrapper = wrap(device)
    given = torch.arange(N, device=device) % V
    everywhere = torch.ones(N, dtype=torch.bool, device=device)
    ids, trajectory = wrapper.generate(prompt=given, prompt_mask=everywhere, return_trajectory=True)
    assert torch.equal(ids, given)
    assert wrapper.net.calls == []
    assert not trajectory.is_masked.any()
    assert (trajectory.log_probs == 0).all()
    assert wrapper.generate(0).shape == (0, N)


def test_a_step_that_is_not_run_repeats_the_one_before(device):
    wrapper = wrap(device, varied(4))
    _, trajectory = wrapper.generate(3, return_trajectory=True)
    counts = [3, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert trajectory.is_masked.sum(dim=-1)[:, 0].tolist() == counts
    for values in trajectory:
        for step in range(1, 18):
            if counts[step] == counts[step - 1]:
                assert torch.equal(values[step], values[step - 1])


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("critic", [False, True])
def test_temperature_and_noise_keep_the_schedules_own_index(compat, critic, device, monkeypatch):
    """With 4 positions in 18 steps, steps 0, 4, 9 and 13 are run: at shares 17/18, 13/18, 8/18 and 4/18."""
    temperatures, noises, numbers = [], [], []

    def recording(function, into, name):
        def call(*arguments, **options):
            into.append(options[name])
            if "step" in options:
                numbers.append(options["step"])
            return function(*arguments, **options)

        return call

    module = upstream if compat else functional
    monkeypatch.setattr(module, "sample_tokens", recording(module.sample_tokens, temperatures, "temperature"))
    monkeypatch.setattr(functional, "remask_", recording(functional.remask_, noises, "noise_scale"))
    options = {"token_critic": FixedCritic([0.0] * 4)} if critic else {}
    wrapper = wrap(device, varied(4), compat=compat, **options)
    wrapper.generate(2, start_temperature=2.0, noise_level_scale=3.0, choice_temperature=3.0)
    remaining = [17 / 18, 13 / 18, 8 / 18, 4 / 18]
    assert temperatures == pytest.approx([2.0 * share for share in remaining])
    assert noises == pytest.approx([3.0 * share for share in remaining])
    # The sampler's number and the noise's; upstream's sampler has no use for one.
    assert sorted(numbers) == sorted([0, 4, 9, 13] * (1 if compat else 2))
    temperatures.clear()
    wrapper.generate(2, steps=1, start_temperature=2.0)
    assert temperatures == [1e-3]  # the floor


# ---- what is committed, and when ----


def test_committed_positions_never_change(device):
    _, trajectory = wrap(device, Context()).generate(8, start_temperature=2.0, return_trajectory=True)
    for step in range(1, 18):
        assert (trajectory.is_masked[step] <= trajectory.is_masked[step - 1]).all()
        settled = ~trajectory.is_masked[step - 1]
        assert torch.equal(trajectory.ids[step][settled], trajectory.ids[step - 1][settled])


@pytest.mark.parametrize("critic", [False, True])
def test_remasking_really_opens_committed_positions(critic, device):
    """And what is masked again is sampled again; what is not stays as it is."""
    options = {"token_critic": Jumping()} if critic else {}
    wrapper = wrap(device, Context(), can_mask_prev_unmasked=True, **options)
    _, trajectory = wrapper.generate(16, start_temperature=2.0, return_trajectory=True)
    before, after = trajectory.is_masked[:-1], trajectory.is_masked[1:]
    assert (after & ~before).any()
    stays = ~before & ~after
    assert torch.equal(trajectory.ids[1:][stays], trajectory.ids[:-1][stays])
    reopened = ((after & ~before).sum(dim=0) > 0) & (trajectory.ids[-1] != MASK)
    assert reopened.any()


def test_the_least_confident_are_masked_again(device):
    """Place i is sure to degree i: the surest is committed first, one at a time."""
    logits = torch.zeros(6, V)
    logits[:, 0] = 2.0 + torch.arange(6)
    wrapper = wrap(device, Known(logits, 6))
    _, trajectory = wrapper.generate(4, steps=7, start_temperature=0.0, filter_thres=None, return_trajectory=True)
    for step, count in enumerate([5, 4, 3, 2, 1, 0, 0]):
        open_places = torch.arange(6, device=device) < count
        assert torch.equal(trajectory.is_masked[step], open_places.expand(4, -1))
    allowed = torch.cat([logits[:, :MASK], logits[:, MASK + 1 :]], dim=-1)  # mask_id has no share
    expected = allowed.log_softmax(dim=-1)[:, 0].to(device)
    torch.testing.assert_close(trajectory.log_probs[-1], expected.expand(4, -1), rtol=1e-5, atol=1e-6)


def test_the_critic_decides_what_is_masked_again(device):
    """However sure the network is: place 0 is the most wrong, so it is settled last."""
    wrapper = wrap(device, varied(6), token_critic=FixedCritic([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))
    _, trajectory = wrapper.generate(4, steps=7, noise_level_scale=0.0, return_trajectory=True)
    for step, count in enumerate([5, 4, 3, 2, 1, 0, 0]):
        open_places = torch.arange(6, device=device) < count
        assert torch.equal(trajectory.is_masked[step], open_places.expand(4, -1))
    noisy = wrapper.generate(64, steps=7, noise_level_scale=100.0, return_trajectory=True)[1]
    assert len(noisy.is_masked[0].unique(dim=0)) == 6  # any place may be the first


def test_the_critic_judges_what_was_just_proposed(device):
    """It sees no mask, and its own network's arguments."""
    seen = []

    class Watching(FixedCritic):
        def forward(self, ids):
            seen.append(ids)
            return super().forward(ids)

    wrap(device, Context(), token_critic=Watching([0.0] * N)).generate(3)
    assert len(seen) == 18
    assert all((ids != MASK).all() for ids in seen)


# ---- around the loop ----


def test_progress(device, capsys):
    seen = []
    wrapper = wrap(device, varied(4))
    wrapper.generate(1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 18) for step in range(1, 19)]
    pytest.importorskip("tqdm")
    for progress, bar in ((None, False), (False, False), (True, True)):
        assert wrapper.generate(1, progress=progress).shape == (1, 4)
        assert ("demasking" in capsys.readouterr().err) == bar


def test_modes_are_restored_after_generation_and_after_an_exception(device):
    """docs/compat.md: evaluation inside; afterwards each module as it was, a frozen one frozen."""
    net = Known(torch.zeros(V))
    net.frozen, net.hot = nn.Dropout(), nn.Dropout()
    wrapper = wrap(device, net, token_critic=FixedCritic([0.0] * N)).train()
    net.frozen.eval()

    def modes() -> list[bool]:
        return [module.training for module in (wrapper, net, net.frozen, net.hot, wrapper.token_critic)]

    wrapper.generate(1, steps=2)
    assert not any(call["training"] for call in net.calls)
    assert modes() == [True, True, False, True, True]

    def interrupt(done, total):
        assert modes() == [False] * 5
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wrapper.generate(1, progress=interrupt)
    assert modes() == [True, True, False, True, True]
    wrapper.eval()
    wrapper.generate(1, steps=2)
    assert modes() == [False] * 5


def test_generation_needs_and_leaves_no_graph(device):
    wrapper = wrap(device, self_cond=True)
    _, trajectory = wrapper.generate(2, return_trajectory=True)
    assert not trajectory.log_probs.requires_grad
    assert all(not call["sum_embeds"].requires_grad for call in wrapper.net.calls)
    assert torch.is_grad_enabled()


def test_steps_of_the_call_and_of_the_wrapper(device):
    wrapper = wrap(device, varied(4), steps=2)
    assert len(wrapper.generate(1, return_trajectory=True)[1].ids) == 2
    assert len(wrapper.generate(1, steps=5, return_trajectory=True)[1].ids) == 5


def test_one_step_fills_everything(device):
    wrapper = wrap(device)
    torch.manual_seed(0)
    ids = wrapper.generate(50, steps=1, filter_thres=None)
    # Left share 0: the temperature is at its floor, so every place takes its favourite.
    favourite = wrapper.net.logits.detach().clone()
    favourite[:, MASK] = -math.inf
    assert (ids == favourite.argmax(dim=-1)).float().mean() > 0.98


def test_a_callable_schedule_may_rise_between(device):
    """What is committed stays committed: counts never rise, unless remasking is allowed."""
    rising = Schedule(lambda t: 0.5 + 0.4 * torch.sin(12 * t))
    for remask in (False, True):
        wrapper = wrap(device, schedule=rising, can_mask_prev_unmasked=remask)
        ids, trajectory = wrapper.generate(3, return_trajectory=True)
        counts = trajectory.is_masked.sum(dim=-1)[:, 0]
        raw = step_counts(rising, 18, torch.tensor([N])).squeeze(-1)
        assert torch.equal(counts.cpu(), raw if remask else raw.cummin(dim=0).values)
        assert (ids != MASK).all()
        assert (raw.diff() > 0).any()
        assert len(wrapper.net.calls) == (18 if remask else len({N, *counts.tolist()}) - 1)


def test_a_schedule_that_touches_zero_and_rises_again_is_followed(device):
    """With remasking: between, nothing is masked, and the network runs on for what is opened later."""
    swinging = Schedule(lambda t: torch.cos(4 * math.pi * t).clamp(min=0.0))
    wrapper = wrap(device, schedule=swinging, can_mask_prev_unmasked=True)
    raw = step_counts(swinging, 18, torch.tensor([N])).squeeze(-1)
    assert (raw[4:6] == 0).all()
    assert (raw[6:12] > 0).any()
    _, trajectory = wrapper.generate(3, return_trajectory=True)
    assert torch.equal(trajectory.is_masked.sum(dim=-1).cpu(), raw[:, None].expand(-1, 3))


# ---- the trajectory ----


@pytest.mark.parametrize("options", [{}, {"threshold": 0.5}], ids=str)
@pytest.mark.parametrize("remask", [False, True])
def test_the_trajectory_is_what_each_step_left(options, remask, device):
    """Cut short after n steps, a generation has left the first n entries: none is a view of what comes later."""
    wrapper, prompt = wrap_small(device, can_mask_prev_unmasked=remask), prompts(device)
    given, snapshots = prompt["prompt_mask"], []

    def generate(**more):
        return wrapper.generate(
            **prompt, **options, steps=6, return_trajectory=True, generator=torch.Generator().manual_seed(4), **more
        )

    clone = torch.Tensor.clone

    def recorded_clone(x, **more):
        if x.shape == given.shape and sys._getframe(1).f_code.co_name == "recorded":  # not the network's own copy
            snapshots.append(x.tolist())
        return clone(x, **more)

    ids, trajectory = generate()
    with pytest.MonkeyPatch.context() as patch:  # what is cloned after each step, as it was then
        patch.setattr(torch.Tensor, "clone", recorded_clone)
        generate()
    assert len(snapshots) == 3 * len(trajectory.ids) >= 9
    steps = list(zip(*[iter(snapshots)] * 3, strict=True))
    for values, seen in zip(trajectory, zip(*steps, strict=True), strict=True):
        for value, then in zip(values, seen, strict=True):
            torch.testing.assert_close(value.cpu(), torch.tensor(then, dtype=value.dtype), rtol=0, atol=0)
    assert trajectory.ids.data_ptr() != ids.data_ptr()
    for state, is_masked, log_probs in zip(*trajectory, strict=True):
        assert torch.equal(state[given], prompt["prompt"][given])
        assert (state[is_masked] == MASK).all()
        assert (state[~is_masked & ~given] != MASK).all()
        assert (log_probs[given] == 0).all()
        assert (log_probs[~given] < 0).all()  # proposed at the first step, or again since
    assert (trajectory.is_masked[0] != trajectory.is_masked[-1]).any()
    ids.zero_()
    assert trajectory.ids[-1].any()


# ---- kernels ----


@pytest.mark.parametrize("options", [{"steps": 3}, {"steps": 3, "can_mask_prev_unmasked": True}], ids=str)
@pytest.mark.parametrize("critic", [False, True])
def test_generation_on_the_kernels_is_that_of_the_reference(kernel, critic, options, monkeypatch):
    layers = Encoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    torch.manual_seed(0)
    net = TransformerWrapper(num_tokens=V, max_seq_len=6, attn_layers=layers)
    wrapper = NonAutoregressiveWrapper(net, mask_id=MASK, self_token_critic=critic, **options).to(kernel.device)

    def generate(backend):
        monkeypatch.setenv("FASTMASK_BACKEND", backend)
        torch.manual_seed(1)
        return wrapper.generate(2, choice_temperature=1.0, return_trajectory=True)

    (ours, our_steps), (theirs, their_steps) = generate("triton"), generate("reference")
    assert torch.equal(ours, theirs)
    assert torch.equal(our_steps.is_masked, their_steps.is_masked)
    torch.testing.assert_close(our_steps.log_probs, their_steps.log_probs)
