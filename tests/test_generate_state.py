"""Generation: what it holds, what it leaves alone, and what its defaults are."""

from __future__ import annotations

import gc
import math
import threading
import time
import weakref

import pytest
import torch
from generating import MASK, FixedCritic, Known, N, Small, V, prompts, wrap, wrap_small
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from x_transformers import Encoder, TransformerWrapper

from fastmask import NonAutoregressiveWrapper, functional, planning, upstream
from fastmask._modes import evaluating
from fastmask.schedules import COSINE, LINEAR, as_schedule, step_counts


class LiveBytes(TorchDispatchMode):
    """How many bytes of storages are alive at most, of those made within."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return out


# ---- the noise on the confidence ----


def noises(monkeypatch, wrapper, **options) -> list[float]:
    """What remask_ is given, in units of the share of steps that remain."""
    seen, remask = [], functional.remask_

    def recording(*arguments, noise_scale, **more):
        seen.append(noise_scale)
        return remask(*arguments, noise_scale=noise_scale, **more)

    monkeypatch.setattr(functional, "remask_", recording)
    wrapper.generate(2, steps=2, **options)
    return [2 * seen[0], seen[1]]


@pytest.mark.parametrize(
    ("of_wrapper", "options", "expected"),
    [
        ({}, {}, 4.5),
        ({"can_mask_prev_unmasked": True}, {}, 4.5),
        ({"self_cond": True}, {"start_temperature": 0.1}, 4.5),
        ({}, {"choice_temperature": 0.0}, 0.0),
        ({}, {"choice_temperature": 2.0}, 2.0),
        ({}, {"start_temperature": 0.0}, 0.0),
        ({}, {"start_temperature": 0.0, "choice_temperature": 2.0}, 2.0),
        ({}, {"threshold": 0.9}, 0.0),
        ({}, {"commits": 3}, 0.0),
        ({}, {"commits": 3, "choice_temperature": 2.0}, 2.0),
        ({}, {"factor": 0.5}, 0.0),
        ({}, {"score": "margin"}, 0.0),
        ({}, {"score": "entropy", "entropy_bound": 0.5}, 0.0),
        ({}, {"threshold": 0.9, "choice_temperature": 2.0}, 2.0),
        ({"compat": True}, {}, 0.0),
        ({"compat": True}, {"choice_temperature": 2.0}, 2.0),
        ({"token_critic": FixedCritic([0.0] * N)}, {"noise_level_scale": 3.0}, 3.0),
    ],
    ids=str,
)
def test_where_counts_alone_decide_the_confidence_is_noisy(of_wrapper, options, expected, monkeypatch):
    assert noises(monkeypatch, wrap("cpu", **of_wrapper), **options) == pytest.approx([expected, 0.0])


def test_default_generation_does_not_collapse():
    """Of independent tokens, half of them id 0: greedy commitment gives one sample, of zeros."""
    share = torch.log(torch.tensor([0.5] + [0.5 / 15] * 15 + [1e-9]))
    wrapper = NonAutoregressiveWrapper(Known(share, 32), mask_id=16)
    torch.manual_seed(0)
    ids, greedy = wrapper.generate(256), wrapper.generate(256, choice_temperature=0.0)
    assert len(ids.unique(dim=0)) >= 240
    assert (ids == 0).float().mean() < 0.95
    assert len(greedy.unique(dim=0)) < 50


@pytest.mark.parametrize("compat", [False, True])
def test_from_temperature_0_on_every_step_is_the_argmax(compat, monkeypatch):
    """Even of logits nearer than any temperature tells apart; upstream has a floor."""
    logits = torch.zeros(V)
    logits[7] = 1e-5
    wrapper = wrap("cpu", Known(logits), compat=compat)
    ids = wrapper.generate(64, start_temperature=0.0, filter_thres=None)
    assert bool((ids == 7).all()) != compat


# ---- memory ----


@pytest.mark.parametrize("options", [{}, {"self_cond": True}, {"can_mask_prev_unmasked": True}], ids=str)
@pytest.mark.parametrize("critic", [False, True])
def test_no_logits_are_alive_while_a_network_runs(options, critic):
    alive, most = [], []

    def look():
        gc.collect()
        most.append(sum(reference() is not None for reference in alive))

    class Watched(Known):
        def forward(self, ids, **kwargs):
            look()
            out = super().forward(ids, **kwargs)
            logits = out[0] if isinstance(out, tuple) else out
            logits = logits.clone()
            alive.append(weakref.ref(logits))
            return (logits, out[1]) if isinstance(out, tuple) else logits

    class Judge(FixedCritic):
        def forward(self, ids):
            look()
            return super().forward(ids)

    wrapper = wrap("cpu", Watched(torch.zeros(V)), token_critic=Judge([0.0] * N) if critic else None, **options)
    wrapper.generate(2, steps=4)
    assert len(most) == 4 + 4 * critic
    assert max(most) == 0


def test_the_peak_of_a_generation_is_its_logits():
    """B 2, N 128, V 50257: 49 MiB of logits."""
    rows, length, vocabulary = 2, 128, 50257

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.num_tokens, self.max_seq_len = vocabulary, length
            self.row = nn.Parameter(torch.zeros(vocabulary))

        def forward(self, ids):
            return self.row.expand(*ids.shape, -1).clone()

    wrapper = NonAutoregressiveWrapper(Head(), mask_id=vocabulary - 1)
    with LiveBytes() as live:
        wrapper.generate(rows, steps=2, filter_thres=None)
    # Besides, what does not grow: the reference's copy of 2**22 logits at a time, 16 MiB.
    assert live.peak <= rows * length * vocabulary * 4 + 20 * 2**20
    assert live.peak >= rows * length * vocabulary * 4


# ---- state ----


def test_a_model_in_evaluation_mode_is_left_alone():
    net = TransformerWrapper(num_tokens=V, max_seq_len=4, attn_layers=Encoder(dim=16, depth=1, heads=2))
    wrapper, touched = NonAutoregressiveWrapper(net, mask_id=MASK).eval(), []
    set_attribute = nn.Module.__setattr__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nn.Module, "__setattr__", lambda module, *value: (touched.append(value), set_attribute(module, *value))[1]
        )
        patch.setattr(nn.Module, "train", lambda module, mode=True: touched.append("train"))
        patch.setattr(nn.Module, "eval", lambda module: touched.append("eval"))
        wrapper.generate(1, steps=2)
        wrapper.nelbo(torch.zeros(1, 4, dtype=torch.int64))
    assert touched == []


def test_modes_of_others_are_restored_after_exceptions_too():
    module = nn.Sequential(nn.Dropout(), nn.Dropout()).train()
    module[1].eval()

    def interrupted():
        with evaluating(module):
            assert not any(part.training for part in module.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [part.training for part in module.modules()] == [True, True, False]


def test_four_threads_generate_with_one_model():
    class Slow(Small):
        def forward(self, ids, **kwargs):
            time.sleep(0.002)  # another thread's turn
            return super().forward(ids, **kwargs)

    wrapper = wrap("cpu", Slow(), self_cond=True, steps=6).eval()

    def generate(seed):
        return wrapper.generate(2, **prompts("cpu", 2), generator=torch.Generator().manual_seed(seed))

    alone, together = [generate(seed) for seed in range(4)], {}
    threads = [
        threading.Thread(target=lambda seed=seed: together.update({seed: generate(seed)})) for seed in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(together[seed], alone[seed]) for seed in range(4))
    assert len({tuple(ids.flatten().tolist()) for ids in alone}) == 4


# ---- networks that write into their ids ----


def scribbling(cls):
    class Scribbles(cls):
        def forward(self, ids, *arguments, **kwargs):
            out = super().forward(ids.clone(), *arguments, **kwargs)
            ids.fill_(3)
            return out

    return Scribbles


@pytest.mark.parametrize(
    "options",
    [
        {}, {"self_cond": True}, {"compat": True}, {"can_mask_prev_unmasked": True}, {"self_token_critic": True},
        {"token_critic": FixedCritic}, {"token_critic": FixedCritic, "compat": True},
    ],
    ids=str,
)  # fmt: skip
def test_a_network_that_writes_into_its_ids_changes_nothing(options):
    def results(change):
        mine = {**options}
        if "token_critic" in mine:
            mine["token_critic"] = change(FixedCritic)(torch.arange(8.0))
        wrapper = wrap("cpu", change(Small)(), steps=4, self_cond_train_prob=1.0, **mine)
        prompt = prompts("cpu")
        given = {name: value.clone() for name, value in prompt.items()}
        ids, trajectory = wrapper.generate(
            4, **prompt, return_trajectory=True, generator=torch.Generator().manual_seed(0)
        )
        x, is_masked = prompt["prompt"].clamp(max=MASK - 1), ~prompt["prompt_mask"]
        clean = x.clone()
        masked_ids = x.masked_fill(is_masked, MASK)
        losses = wrapper(x, is_masked=is_masked, masked_ids=masked_ids, generator=torch.Generator().manual_seed(0))
        bound = wrapper.nelbo(x, seed=1)
        assert torch.equal(x, clean)
        assert torch.equal(masked_ids, x.masked_fill(is_masked, MASK))
        assert all(torch.equal(prompt[name], given[name]) for name in given)
        return [ids, *trajectory, losses.loss, bound]

    for ours, theirs in zip(results(lambda cls: cls), results(scribbling), strict=True):
        assert torch.equal(ours, theirs)


# ---- plans ----


def plan(num_maskable, steps, schedule=LINEAR, by_rule=False, always_runs=False, formulas=upstream.FASTMASK):
    pace = planning.Pace(schedule, formulas, steps, None, may_remask=False, by_rule=by_rule, always_runs=always_runs,
                         editing_steps=0)  # fmt: skip
    return planning.plan(pace, planning.Blocks(None, num_maskable[None]), torch.device("cpu"))


def steps_of(planned):
    return [step for number in range(planned.num_steps) if (step := planned.step(0, number)) is not None]


@pytest.mark.parametrize("num_sizes", [1, 64])
@pytest.mark.parametrize("always_runs", [False, True])
@pytest.mark.parametrize("by_rule", [False, True])
def test_a_plan_of_a_million_steps(by_rule, always_runs, num_sizes):
    """B 64, N 1024, of one size or of many: at most .3 s (a loaded machine is given ten times that) and 64 MB."""
    num_maskable = 1024 - 15 * (torch.arange(64) % num_sizes)
    start = time.perf_counter()
    planned = plan(num_maskable, 10**6, by_rule=by_rule, always_runs=always_runs)
    assert time.perf_counter() - start < 3.0
    assert len(planned.counts) == len(planned.parts[0].numbers) + 1 >= 1025
    if num_sizes == 1:
        assert (planned.step(0, 1) is None) == (not by_rule and not always_runs)
    with LiveBytes() as live:
        plan(num_maskable, 10**6, by_rule=by_rule, always_runs=always_runs)
    assert 2**20 < live.peak < 64e6


@pytest.mark.parametrize("length", [1, 3, 7, 9, 15, 18])
def test_the_rounded_number_of_open_positions_is_within_the_sequence(length):
    eighth = math.ceil(length / 8)
    for num_open in range(length + 1):
        places = int(planning.places_for_any_prompt(planning.Blocks(None, torch.tensor([[num_open]])), length))
        assert num_open <= places <= min(length, num_open + eighth - 1)
        assert places in (length, *range(0, length, eighth))


@pytest.mark.parametrize("always_runs", [False, True])
@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=lambda schedule: schedule.name)
def test_a_plan_is_of_the_steps_that_change_something(schedule, always_runs):
    """By hand: all steps, of each sequence by itself."""
    steps, num_maskable = 37, torch.tensor([5, 0, 12, 5, 1])
    counts = step_counts(schedule, steps, num_maskable)
    before = torch.cat([num_maskable[None], counts[:-1]])
    runs = before.any(dim=-1) if always_runs else (before != counts).any(dim=-1)
    planned = plan(num_maskable, steps, schedule, always_runs=always_runs)
    assert planned.total == steps
    running = steps_of(planned)
    rows = [step.row for step in running]
    assert [step.number for step in running] == runs.nonzero().squeeze(-1).tolist()
    assert [step.num_rows for step in running] == before.sum(dim=-1)[runs].tolist()
    assert [step.num_rows_after for step in running] == counts.sum(dim=-1)[runs].tolist()
    assert [step.remaining for step in running] == [(steps - 1 - step.number) / steps for step in running]
    assert torch.equal(planned.counts[rows], counts[runs])
    assert torch.equal(planned.row_starts[rows, 1:], counts[runs].cumsum(dim=-1))
    assert (planned.row_starts[:, 0] == 0).all()


@pytest.mark.parametrize("formulas", [upstream.FASTMASK, upstream.X_TRANSFORMERS])
@pytest.mark.parametrize("steps", [1, 2, 63, 64, 65, 66, 128, 129, 1000, 5000])
@pytest.mark.parametrize("ratio", ["linear", "cosine", lambda t: 1 - t**8, lambda t: (6 * t).cos(), lambda t: t / 0])
def test_counts_that_fall_are_found_where_they_do(ratio, steps, formulas):
    """By hand: from all steps. A schedule that rises now and then, or is no number, falls all the same."""
    num_maskable, schedule = torch.tensor([0, 1, 5, 64, 300]), as_schedule(ratio)
    ratios = formulas.step_ratios(schedule, steps)
    counts = torch.stack([formulas.num_remaining(ratios, size) for size in num_maskable.tolist()], dim=-1)
    counts[-1] = 0
    counts = torch.cat([num_maskable[None], counts]).cummin(dim=0).values
    runs = (counts[1:] != counts[:-1]).any(dim=-1)
    planned = plan(num_maskable, steps, schedule, formulas=formulas)
    running = steps_of(planned)
    assert [step.number for step in running] == runs.nonzero().squeeze(-1).tolist()
    assert torch.equal(planned.counts[[step.row for step in running]], counts[1:][runs])
    assert [step.num_rows for step in running] == counts[:-1][runs].sum(dim=-1).tolist()


# ---- torch's default dtype ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "options", [{}, {"compat": True}, {"self_token_critic": True}, {"can_mask_prev_unmasked": True}], ids=str
)
def test_generation_does_not_depend_on_the_default_dtype(dtype, options):
    wrapper = wrap_small("cpu", steps=4, **options)

    def generate():
        return wrapper.generate(2, generator=torch.Generator().manual_seed(0), return_trajectory=True)

    expected, trajectory = generate()
    torch.set_default_dtype(dtype)
    try:
        ids, theirs = generate()
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(ids, expected)
    assert theirs.log_probs.dtype == torch.float32
    assert torch.equal(theirs.log_probs, trajectory.log_probs)
