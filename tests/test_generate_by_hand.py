"""Generation is a loop over the public functions: by counts, and by a threshold."""

from __future__ import annotations

import math

import pytest
import torch
from generating import MASK, Jumping, Small, prompts, wrap, wrap_small

from fastmask import functional
from fastmask.schedules import as_schedule, step_counts

# ---- a loop by hand ----


def by_hand(wrapper, generator, options, prompt=None, prompt_mask=None, batch=4) -> torch.Tensor:
    """What generate does, out of the public functions, at every position of every step."""
    noise = 4.5 if options.get("score") is None else 0.0
    options = {"filter_thres": 0.7, "noise_level_scale": 1.0, "choice_temperature": noise, **options}
    net, critic, steps, filter_thres = wrapper.net, wrapper.token_critic, wrapper.steps, options["filter_thres"]
    device = net.table.device
    seed = functional.draw_seed(device, generator)
    given = torch.zeros(batch, net.max_seq_len, dtype=torch.bool, device=device)
    ids = torch.full(given.shape, MASK, device=device)
    if prompt is not None:
        given, ids = prompt_mask, prompt.where(prompt_mask, MASK)
    maskable, is_masked = ~given, ~given
    counts = step_counts(as_schedule("linear"), steps, maskable.sum(dim=-1).cpu()).to(device)
    condition, end = wrapper.null_embed if wrapper.self_cond else None, options.get("end_temperature")
    for step in range(steps):
        remaining = (steps - 1 - step) / steps
        drawn = {"seed": seed, "step": step, "sample_offset": options.get("sample_offset", 0)}
        given_embeddings = {} if condition is None else {"sum_embeds": wrapper.to_self_cond(condition)}
        logits, embeddings = net(ids, return_logits_and_embeddings=True, **given_embeddings)
        condition = embeddings if wrapper.self_cond else None
        sampled = functional.sample_tokens(
            logits,
            temperature=max(remaining, 1e-3) if end is None else 1.0 + (end - 1.0) * step / max(1, steps - 1),
            mask_id=MASK,
            kept_ids=ids.where(~is_masked, -1),
            top_k=None if filter_thres is None else math.ceil((1 - filter_thres) * net.num_tokens),
            min_p=options.get("min_p"),
            top_p=options.get("top_p"),
            processed=options.get("processed", False),
            forbidden=options.get("forbidden"),
            with_margin=True,
            with_entropy=True,
            **drawn,
        )
        ids = sampled.ids
        if critic is None:
            noise = options["choice_temperature"] * remaining
            score = {
                None: sampled.log_probs, "confidence": sampled.log_probs, "margin": sampled.margins,
                "entropy": -sampled.entropies, "random": torch.zeros_like(sampled.log_probs),
            }.get(options["score"] if isinstance(options.get("score"), str) else None)  # fmt: skip
            if isinstance(options.get("score"), torch.Tensor):
                score = options["score"].to(device).expand(ids.shape)
            elif options.get("score") == "random":
                noise = 1.0
            keys = functional.confidence_remask_keys(score, choice_temperature=noise, **drawn)
        else:
            noise = options["noise_level_scale"] * remaining
            keys = functional.critic_remask_keys(critic(ids).view(ids.shape), noise_scale=noise, **drawn)
        may_be_masked = maskable if wrapper.can_mask_prev_unmasked else is_masked
        is_masked = functional.select_to_remask(keys, may_be_masked, counts[step])
        ids = ids.masked_fill(is_masked, MASK)
    return ids


HAND = {
    "plain": ({}, {}),
    "choice": ({}, {"choice_temperature": 1.0}),
    "filters": ({}, {"top_p": 0.9, "filter_thres": 0.3, "forbidden": [1, 2], "sample_offset": 3}),
    "margin": ({}, {"score": "margin"}),
    "entropy": ({}, {"score": "entropy", "choice_temperature": 0.5}),
    "random": ({}, {"score": "random"}),
    "order": ({}, {"score": -torch.arange(8).float()}),
    "processed": ({}, {"processed": True, "end_temperature": 0.4, "min_p": 0.05, "score": "entropy"}),
    "remask by margin": ({"can_mask_prev_unmasked": True}, {"score": "margin", "end_temperature": 0.0}),
    "self_cond": ({"self_cond": True}, {}),
    "critic": ({"token_critic": "own"}, {}),
    "self_critic": ({"self_token_critic": True}, {"noise_level_scale": 0.5}),
    "remask": ({"can_mask_prev_unmasked": True}, {}),
    "remask_critic": ({"can_mask_prev_unmasked": True, "token_critic": "own", "self_cond": True}, {}),
}


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("case", HAND)
@torch.no_grad()
def test_generation_is_a_loop_by_hand(case, prompted, device):
    of_wrapper, options = HAND[case]
    wrapper = wrap_small(device, steps=5, **of_wrapper)
    prompt = prompts(device) if prompted else {}
    outs = set()
    for seed in range(3):
        expected = by_hand(wrapper, torch.Generator().manual_seed(seed), options, **prompt)
        ids = wrapper.generate(4, generator=torch.Generator().manual_seed(seed), **options, **prompt)
        assert torch.equal(ids, expected)
        assert ((ids != MASK) | (prompt["prompt_mask"] if prompted else False)).all()
        outs.add(tuple(ids.flatten().tolist()))
    assert len(outs) == 3


@pytest.mark.parametrize("case", ["plain", "filters", "processed", "self_cond", "critic", "self_critic", "remask"])
@torch.no_grad()
@pytest.mark.slow_interpreted
def test_generation_is_a_loop_by_hand_on_the_kernels_too(case, kernel, monkeypatch):
    monkeypatch.setenv("FASTMASK_BACKEND", "triton")
    of_wrapper, options = HAND[case]
    wrapper = wrap_small(kernel.device, length=4, steps=3, **of_wrapper)
    prompt = prompts(kernel.device, batch=2, length=4)
    expected = by_hand(wrapper, torch.Generator().manual_seed(0), options, **prompt)
    assert torch.equal(wrapper.generate(2, generator=torch.Generator().manual_seed(0), **options, **prompt), expected)


# ---- a threshold in place of counts ----


def committed(trajectory, is_open):
    """Step after step: what was open before it, what it committed, and the log-probabilities it proposed."""
    for is_masked, log_probs in zip(trajectory.is_masked, trajectory.log_probs, strict=True):
        yield is_open, is_open & ~is_masked, log_probs
        is_open = is_masked


def surest(confidence, is_open):
    """[B, N] bool, the first open position of highest confidence [B, N]; none where nothing is open."""
    best = confidence.masked_fill(~is_open, -math.inf).argmax(dim=-1)
    return torch.nn.functional.one_hot(best, is_open.shape[1]).bool() & is_open


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("choice_temperature", [0.0, 2.0])
@pytest.mark.parametrize("prompted", [False, True])
def test_every_step_commits_what_is_surer_than_the_threshold(threshold, choice_temperature, prompted, device):
    """And, where nothing of a sequence is, the surest; the last step the rest."""
    wrapper, steps = wrap(device, Small(scale=3.0)), 3
    prompt = prompts(device) if prompted else {}
    seed = functional.draw_seed(device, torch.Generator().manual_seed(1))
    ids, trajectory = wrapper.generate(
        4, threshold=threshold, choice_temperature=choice_temperature, steps=steps, filter_thres=None,
        generator=torch.Generator().manual_seed(1), return_trajectory=True, **prompt,
    )  # fmt: skip
    is_open = ~prompt["prompt_mask"] if prompted else torch.ones_like(ids, dtype=torch.bool)
    by_one, by_many = 0, 0
    for step, (before, now, log_probs) in enumerate(committed(trajectory, is_open)):
        noise = choice_temperature * (steps - 1 - step) / steps
        confidence = -functional.confidence_remask_keys(log_probs, choice_temperature=noise, seed=seed, step=step)
        expected = before & (log_probs > math.log(threshold))
        alone = before.any(dim=-1) & ~expected.any(dim=-1)
        if step == steps - 1:
            expected = before
        elif alone.any():
            expected = expected | (surest(confidence, before) & alone[:, None])
        assert torch.equal(now, expected)
        by_one, by_many = by_one + alone.sum(), by_many + (now.sum(dim=-1) > 1).sum()
    assert (ids[is_open] != MASK).all()
    assert by_one + by_many > 0
    assert by_many > 0 or threshold > 0.5


@pytest.mark.parametrize("threshold", [0.3, 0.6])
@pytest.mark.parametrize("prompted", [False, True])
def test_a_critics_confidence_is_that_a_token_is_right(threshold, prompted, device):
    """1 - sigmoid of its logit, whatever the network's own probabilities."""
    logits = []

    class Watched(Jumping):
        def forward(self, ids):
            logits.append(2.0 * super().forward(ids))
            return logits[-1]

    wrapper = wrap(device, Small(), token_critic=Watched())
    prompt = prompts(device) if prompted else {}
    _, trajectory = wrapper.generate(
        4, threshold=threshold, noise_level_scale=0.0, steps=6, return_trajectory=True, **prompt
    )
    is_open = ~prompt["prompt_mask"] if prompted else torch.ones_like(trajectory.is_masked[0])
    for step, (before, now, _) in enumerate(committed(trajectory, is_open)):
        if not before.any():
            break
        confidence = 1.0 - logits[step].sigmoid()
        sure = before & (confidence > threshold)
        expected = sure | (surest(confidence, before) & ~sure.any(dim=-1, keepdim=True))
        assert torch.equal(now, before if step == 5 else expected)


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("prompted", [False, True])
def test_with_remasking_only_what_is_not_sure_is_masked_again(critic, prompted, device):
    """One position more of each sequence is settled at each step, whatever the confidences."""
    logits, steps, threshold = [], 6, 0.9 if critic else 0.6

    class Watched(Jumping):
        def forward(self, ids):
            logits.append(3.0 * super().forward(ids))
            return logits[-1]

    wrapper = wrap(device, Small(scale=2.0), can_mask_prev_unmasked=True, token_critic=Watched() if critic else None)
    prompt = prompts(device, 16) if prompted else {}
    _, trajectory = wrapper.generate(
        16, threshold=threshold, noise_level_scale=0.0, steps=steps, return_trajectory=True, **prompt
    )
    is_open = ~prompt["prompt_mask"] if prompted else torch.ones_like(trajectory.is_masked[0])
    for step, is_masked in enumerate(trajectory.is_masked):
        if critic and step >= len(logits):
            break
        confidence = 1.0 - logits[step].sigmoid() if critic else trajectory.log_probs[step].exp()
        assert not (is_masked & (~is_open | (confidence > threshold))).any()
        at_most = (is_open.sum(dim=-1) - step - 1).clamp(min=0)
        assert (is_masked.sum(dim=-1) <= at_most).all()
        # Up to as many, the least sure of all that are open.
        unsure = (is_open & (confidence <= threshold)).sum(dim=-1)
        if step < steps - 1:
            assert (is_masked.any(dim=-1) == (unsure.minimum(at_most) > 0)).all()
    assert not trajectory.is_masked[-1].any()
    reopened = trajectory.is_masked[1:] & ~trajectory.is_masked[:-1]
    assert reopened.any()


@pytest.mark.parametrize("options", [{}, {"can_mask_prev_unmasked": True}, {"token_critic": "own"}], ids=str)
@pytest.mark.parametrize("prompted", [False, True])
def test_the_ends_of_the_threshold(options, prompted, device):
    """At 0 the first step commits everything, at 1 each step one position of each sequence."""
    wrapper = wrap_small(device, **options)
    prompt = prompts(device) if prompted else {}
    shared = {"steps": 9, "filter_thres": None, "noise_level_scale": 0.0, "return_trajectory": True, **prompt}
    assert not wrapper.generate(4, threshold=0.0, **shared)[1].is_masked.any()
    assert not wrapper.generate(4, threshold=0, choice_temperature=9.0, **shared)[1].is_masked.any()
    counts = wrapper.generate(4, threshold=1.0, **shared)[1].is_masked.sum(dim=-1)
    num_open = (~prompt["prompt_mask"]).sum(dim=-1) if prompted else torch.full((4,), 8, device=device)
    assert len(counts) == (9 if options.get("can_mask_prev_unmasked") else num_open.max())  # then nothing is left
    steps = torch.arange(1, len(counts) + 1, device=device)[:, None]
    assert torch.equal(counts, (num_open - steps).clamp(min=0))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("options", [{}, {"choice_temperature": 2.0}, {"top_p": 0.9, "forbidden": [0]}], ids=str)
@pytest.mark.parametrize("prompted", [False, True])
@torch.no_grad()
def test_a_threshold_is_a_loop_of_demask_steps(threshold, options, prompted, device):
    net, steps = Small(scale=3.0).to(device), 6
    prompt = prompts(device) if prompted else {}
    ids = torch.full((4, 8), MASK, device=device)
    is_masked = torch.ones_like(ids, dtype=torch.bool)
    if prompted:
        ids, is_masked = prompt["prompt"].where(prompt["prompt_mask"], MASK), ~prompt["prompt_mask"]
    seed = functional.draw_seed(device, torch.Generator().manual_seed(2))
    choice = {"choice_temperature": 0.0, **options}
    for step in range(steps):
        remaining = (steps - 1 - step) / steps
        ids, is_masked, *_ = functional.demask_step(
            net(ids), ids, is_masked, 0 if step == steps - 1 else None, mask_id=MASK,
            temperature=max(remaining, 1e-3), threshold=threshold, seed=seed, step=step,
            **{**choice, "choice_temperature": choice["choice_temperature"] * remaining},
        )  # fmt: skip
    generated = wrap(device, net).generate(
        4, threshold=threshold, steps=steps, filter_thres=None, generator=torch.Generator().manual_seed(2),
        **options, **prompt,
    )  # fmt: skip
    assert torch.equal(generated, ids)
