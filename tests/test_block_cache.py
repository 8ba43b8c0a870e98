"""Generation in blocks beside a cache: the same states as without, by passes over the block alone."""

from __future__ import annotations

import math
import random
from contextlib import contextmanager

import decoders
import pytest
import torch
from block_causal import (
    BlockCausal,
    BothSides,
    Cache,
    assert_same_states,
    random_generation,
    random_prompt,
    states,
    wrapped,
)
from generating import MASK, Jumping, V
from graph_recorder import without_numpy
from test_generate_waits import Waits, inside_the_steps, refusing_values
from torch.utils.flop_counter import FlopCounterMode

from fastmask import NonAutoregressiveWrapper
from fastmask.schedules import even_split

N = 16
GREEDY = {"start_temperature": 0.0, "filter_thres": None}


def model(kind=BlockCausal, length=N, **options) -> NonAutoregressiveWrapper:
    torch.manual_seed(0)
    return wrapped(kind(length, **options))


def ragged(seed=0, batch=4) -> dict[str, torch.Tensor]:
    return random_prompt(random.Random(seed), batch, N, "ragged")


@pytest.mark.parametrize("number", range(20))
def test_states_are_those_without_a_cache(number):
    """Of whatever rule, temperature, prompts and blocks, step for step."""
    wrapper, options = model(), random_generation(number, N)
    ours = states(wrapper, options, cache=True)
    num_beside = sum(wrapper.net.widths)
    wrapper.net.widths.clear()
    expected = states(wrapper, options, cache=False)
    assert_same_states(ours, expected)
    assert num_beside < sum(wrapper.net.widths)
    assert set(wrapper.net.widths) == {N}
    assert_same_states(states(wrapper, options, cache=None), expected)


@pytest.mark.parametrize("way", ["logits", "softcap"])
@pytest.mark.parametrize("guidance", [{}, {"cfg_scale": 1.0}])
def test_whatever_the_head(way, guidance):
    wrapper, options = model(), {**ragged(), **guidance, "block_length": 5, "top_p": 0.9}
    net, head = wrapper.net, wrapper.net.linear_head
    net.linear_head = (lambda: None) if way == "logits" else lambda: head()._replace(softcap=2.0)
    assert_same_states(states(wrapper, options, True), states(wrapper, options, False))


def test_what_is_masked_again_is_of_the_block():
    torch.manual_seed(0)
    wrapper = NonAutoregressiveWrapper(BlockCausal(N), mask_id=MASK, steps=4, can_mask_prev_unmasked=True).eval()
    for options in ({"block_length": 5}, {"block_length": 4, "threshold": 0.4, "block_origin": "zero"}):
        options |= ragged()
        assert_same_states(states(wrapper, options, True), states(wrapper, options, False))


@pytest.mark.parametrize("origin", ["prompt", "zero"])
def test_arguments_reach_every_pass(origin):
    wrapper, label = model(), torch.randn(4, 16).double()
    other = {"label": torch.zeros(4, 16).double()}
    options = {**ragged(), "block_length": 4, "block_origin": origin, "cfg_scale": 0.7, "unconditional": other}
    ours = states(wrapper, {**options, "label": label}, True)
    assert_same_states(ours, states(wrapper, {**options, "label": label}, False))
    assert not torch.equal(ours[-1][0], states(wrapper, {**options, "label": 2 * label}, True)[-1][0])


# ---- against decoders of one sequence, without a cache, in NumPy ----


def alone(net, start, length, origin):
    """The network on one sequence; which block each position is in is counted from its start."""
    first = start.index(MASK) if origin == "prompt" and MASK in start else 0
    blocks = torch.tensor([[math.floor((i - first) / length) for i in range(N)]])
    return lambda ids: net(torch.from_numpy(ids)[None], blocks=blocks)[0].detach().numpy()


DECODERS = {
    "llada": ("prompt", 5, {"steps": 3, "commits": even_split}, lambda *x: decoders.llada(*x, 5, 3)),
    "fast_dllm": ("prompt", 4, {"threshold": 0.3}, lambda *x: decoders.fast_dllm(*x, 4, threshold=0.3)),
    "sdar": (
        "zero", 4, {"steps": 3, "threshold": 0.4, "commits": even_split},
        lambda *x: decoders.sdar_dynamic(*x, 4, 3, 0.4),
    ),
    "llada21": (
        "zero", 6, {"threshold": 0.5, "editing_threshold": 0.2, "editing_steps": 3},
        lambda *x: decoders.llada21(*x, 6, 0.5, 0.2, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODERS)
def test_public_decoders(name):
    """Ids, the pass of each position's commit, the number of passes; ragged prompts in one batch."""
    origin, length, options, decoder = DECODERS[name]
    wrapper, prompt = model(), ragged(3, 6)
    *_, last = wrapper.generate_steps(
        **prompt, **options, **GREEDY, block_length=length, block_origin=origin, cache=True
    )
    starts = prompt["prompt"].where(prompt["prompt_mask"], MASK).tolist()
    expected = [decoder(alone(wrapper.net, start, length, origin), start) for start in starts]
    assert last.ids.tolist() == [ids for ids, _, _ in expected]
    assert last.committed_at.tolist() == [at for _, at, _ in expected]
    assert last.passes.tolist() == [passes for _, _, passes in expected]


# ---- what a step costs ----


def test_the_passes_that_are_made():
    """The prompt once, each step its block, each block but the last once more, as it then is."""
    wrapper = model()
    options = {"prompt": torch.arange(3).expand(2, 3), "block_length": 5, "steps": 2, **GREEDY}
    states(wrapper, options, True)
    assert wrapper.net.widths == [3, *[5, 5, 5], *[5, 5, 5], 3, 3]
    wrapper.net.widths.clear()
    states(wrapper, {**options, "block_origin": "zero"}, True)
    assert wrapper.net.widths == [*[5, 5, 5], *[5, 5, 5], *[5, 5, 5], 1]
    wrapper.net.widths.clear()
    given = torch.zeros(2, N, dtype=torch.bool)
    given[:, [*range(5, 10)]] = True  # a block in which nothing is open is cached with the one before
    prompt = torch.zeros(2, N, dtype=torch.long)
    states(wrapper, {**options, "block_origin": "zero", "prompt": prompt, "prompt_mask": given}, True)
    assert wrapper.net.widths == [5, 5, 10, 5, 5, 5, 1]


class Trunk(BlockCausal):
    """Counts the multiply-adds of its layers."""

    linear_head = None
    multiply_adds = 0

    def forward(self, ids, **given):
        with FlopCounterMode(display=False) as counter:
            x = super().forward(ids, return_embeddings=True, **given)
        self.multiply_adds += counter.get_total_flops() // 2
        return x[..., :1].expand(*ids.shape, V)


def test_ten_times_fewer_multiply_adds():
    """N 1024, block 32: of linear layers N / L times s / (s + 1), of s steps a block; more of attention."""
    counts = []
    for cache in (False, True):
        wrapper = wrapped(Trunk(1024, depth=1)).float()
        wrapper.generate(1, block_length=32, steps=2, cache=cache)
        counts.append(wrapper.net.multiply_adds)
    assert counts[0] > 32 * 2 / 3 * counts[1] > 10 * counts[1], counts


def test_nothing_waits(monkeypatch):
    without_numpy(monkeypatch)
    wrapper, mode = model(), Waits()

    @contextmanager
    def refusing():
        with mode, refusing_values(monkeypatch):
            yield

    inside_the_steps(monkeypatch, refusing)
    for options in ({}, {"cfg_scale": 1.0}, {"block_origin": "zero"}):
        wrapper.generate(**ragged(), block_length=4, cache=True, **options)
    model(BothSides).generate(**ragged(), block_length=4, cache="prefix")
    assert mode.seen == []


# ---- ragged prompts ----


@pytest.mark.parametrize("cache", [True, "prefix"])
@pytest.mark.parametrize("origin", ["prompt", "zero"])
def test_a_sequence_does_not_know_its_batch(cache, origin):
    """What pads shorter prompts, and what follows longer ones, is not seen."""
    wrapper, prompt = model(BlockCausal if cache is True else BothSides), ragged(1, 5)
    options = {"block_length": 4, "block_origin": origin, "cache": cache, "filter_thres": None}

    def generate(rows):
        given = {name: value[rows] for name, value in prompt.items()}
        generator = torch.Generator().manual_seed(3)
        return wrapper.generate(**given, **options, generator=generator, sample_offset=rows.start)

    whole = generate(slice(0, 5))
    assert torch.equal(whole, torch.cat([generate(slice(b, b + 1)) for b in range(5)]))
    assert torch.equal(whole[prompt["prompt_mask"]], prompt["prompt"][prompt["prompt_mask"]])


@pytest.mark.parametrize("cache", [True, "prefix"])
def test_where_nothing_is_open(cache):
    wrapper = model(BlockCausal if cache is True else BothSides)
    prompt, given = torch.full((2, N), 3), torch.ones(2, N, dtype=torch.bool)
    assert torch.equal(wrapper.generate(prompt=prompt, prompt_mask=given, block_length=4, cache=cache), prompt)
    assert wrapper.generate(0, block_length=4, cache=cache).shape == (0, N)
    assert wrapper.generate(prompt=prompt[0, :5], block_length=40, cache=cache).shape == (N,)
    assert wrapper.net.widths[-1] in (N - 5, N)


# ---- Fast-dLLM's prefix cache ----


class Frozen(BothSides):
    """The whole sequence in each pass; but what lies before the block has the keys and values of its first pass."""

    start_cache = None

    def follow(self, first, length, steps):
        self.first, self.length, self.steps, self.number, self.kept = first, length, steps, 0, Cache()

    def forward(self, ids, **given):
        begin, step = self.first + self.length * (self.number // self.steps), self.number % self.steps
        self.number += 1
        recording = Recording(self.kept, begin, is_first=step == 0)
        return super().forward(ids, cache=recording, **given)


class Recording:
    def __init__(self, cache, begin, is_first) -> None:
        self.cache, self.begin, self.is_first = cache, begin, is_first

    def joined(self, name, own):
        if self.is_first:
            self.cache.kept[name] = own
        return torch.cat([self.cache.kept[name][:, : self.begin], own[:, self.begin :]], dim=1)


@pytest.mark.parametrize(("first", "steps"), [(0, 3), (4, 2), (3, 1)])
def test_the_prefix_cache(first, steps):
    """Its first pass of a block is whole, the others see what precedes as it was in that one."""
    options = {"block_length": 4, "steps": steps, "filter_thres": None, "batch_size": 3}
    if first:
        options["prompt"] = torch.arange(first)
    ours, frozen = model(BothSides), model(Frozen)
    frozen.net.follow(first, 4, steps)
    got = states(ours, options, "prefix")
    assert_same_states(got, states(frozen, options, None))
    starts = range(first, N, 4)
    assert ours.net.widths == [width for begin in starts for width in (N, *(steps - 1) * [N - begin])]
    exact = states(ours, options, False)
    assert (steps == 1) == all(torch.equal(x[2], y[2]) for x, y in zip(got, exact, strict=True))


def test_of_one_layer_a_prefix_is_what_it_was():
    for options in ({"block_length": 5}, {"block_length": 4, "threshold": 0.4, "cfg_scale": 0.5}):
        wrapper, options = model(BothSides, depth=1), {**options, **ragged(2)}
        assert_same_states(states(wrapper, options, "prefix"), states(wrapper, options, None))


# ---- the gate can tell ----


class WrongPositions(BlockCausal):
    def forward(self, ids, positions=None, **given):
        return super().forward(ids, positions=None if positions is None else positions - positions[:, :1], **given)


class Forgetting(BlockCausal):
    def start_cache(self, length):
        cache = super().start_cache(length)
        cache.commit = lambda length: None
        return cache


class NotReset(BlockCausal):
    def start_cache(self, length):
        self.cache = getattr(self, "cache", None) or super().start_cache(length)
        return self.cache


class SeesItsNextBlock(BlockCausal):
    """A block's last position counts as the next one's, in passes over several blocks."""

    def forward(self, ids, blocks=None, **given):
        if blocks is not None and ids.shape[1] > 4:
            blocks = torch.cat([blocks[:, 1:], blocks[:, -1:]], dim=1)
        return super().forward(ids, blocks=blocks, **given)


class SeesPadding(BlockCausal):
    def forward(self, ids, blocks=None, **given):
        return super().forward(ids, blocks=None if blocks is None else blocks.where(blocks < N, -N), **given)


@pytest.mark.parametrize("fault", [WrongPositions, Forgetting, NotReset, SeesItsNextBlock, SeesPadding])
def test_faults_are_seen(fault):
    options = {**ragged(1), "block_length": 4, "filter_thres": None}
    right, wrong = model(), model(fault)
    expected = states(right, options, False)
    if fault is NotReset:
        states(wrong, {**options, "prompt": options["prompt"].flip(0)}, True)
    with pytest.raises(AssertionError):
        assert_same_states(states(wrong, options, True), expected)


# ---- who uses it, and who may not ----


@pytest.mark.parametrize(
    ("kind", "of_wrapper", "options", "message"),
    [
        (BlockCausal, {}, {"cache": True}, "expected block_length= with a cache"),
        (BlockCausal, {}, {"cache": "prefix", "block_length": 4}, "expected cache=True, which is exact"),
        (BothSides, {}, {"cache": True, "block_length": 4}, "expected block-causal attention for an exact cache"),
        (Frozen, {}, {"cache": "prefix", "block_length": 4}, "received Frozen without start_cache"),
        (BlockCausal, {"self_cond": True}, {"cache": True, "block_length": 4}, "expected no self-conditioning"),
        (BlockCausal, {"token_critic": Jumping()}, {"cache": True, "block_length": 4}, "expected no critic"),
        (
            BlockCausal,
            {},
            {"cache": "exact", "block_length": 4},
            "expected cache to be None, True, False or 'prefix'",
        ),
        (BlockCausal, {}, {"cache": 1, "block_length": 4}, "expected cache to be None, True, False or 'prefix'"),
    ],
)
def test_what_is_refused(kind, of_wrapper, options, message):
    net = kind(N)
    net.emb_dim = 16
    with pytest.raises(ValueError, match=message):
        NonAutoregressiveWrapper(net, mask_id=MASK, **of_wrapper).generate(2, **options)


def test_where_it_would_not_be_exact_whole_sequences_are_run():
    net = BlockCausal(N)
    wrapper = NonAutoregressiveWrapper(net, mask_id=MASK, token_critic=Jumping(), steps=2)
    wrapper.generate(2, block_length=4)
    model(BothSides).generate(2, block_length=4, cache=False)
    assert set(net.widths) == {N}
    both = model(BothSides)
    both.generate(2, block_length=4)
    assert set(both.net.widths) == {N}


def test_compat_has_no_such_thing():
    with pytest.raises(ValueError, match="expected compat=False with cache="):
        NonAutoregressiveWrapper(BlockCausal(N), mask_id=MASK, compat=True).generate(2, cache=True)


def test_a_bare_head_is_tried_on_plain_ids():
    """That of a network that declares none, at the first pass, which may be beside a cache."""

    class Bare(BlockCausal):
        linear_head = None

        def __init__(self, *sizes) -> None:
            super().__init__(*sizes, scale=1.0)
            self.to_logits = self.out

    wrapper, options = wrapped(Bare(N)), {**ragged(), "block_length": 4}
    assert_same_states(states(wrapper, options, True), states(wrapper, options, False))
    assert wrapper.has_linear_head
