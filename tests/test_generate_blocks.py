"""Generation in blocks, by commits and by rules that stop: as public decoders do, and by hand."""

from __future__ import annotations

import itertools
import math

import decoders
import numpy as np
import pytest
import torch
from generating import MASK, Context, N, Small, V, assert_law, prompts, wrap, wrap_small

from fastmask import functional
from fastmask.schedules import even_split

GREEDY = {"start_temperature": 0.0, "filter_thres": None}


class Counted(torch.nn.Module):
    """A network that depends on all ids, in float64, and counts its passes."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.inner, self.scale, self.passes = Context(), scale, 0
        self.num_tokens, self.max_seq_len = V, N
        self.inner.double()

    def forward(self, ids):
        self.passes += 1
        return self.scale * self.inner(ids)

    def alone(self, ids):
        return self.scale * self.inner(torch.from_numpy(ids)[None])[0].detach().numpy()


def ragged(device):
    """Prompts of lengths 0, 3, 7, N, and one with holes; none gives MASK."""
    generator = torch.Generator().manual_seed(5)
    prompt = torch.randint(0, MASK, (5, N), generator=generator)
    given = torch.arange(N) < torch.tensor([0, 3, 7, N, 2])[:, None]
    given[4] |= torch.rand(N, generator=generator) < 0.4
    return {"prompt": prompt.to(device), "prompt_mask": given.to(device)}


def committed_at(trajectory, is_given):
    """The pass in which each position was committed, of those that committed something of its sequence."""
    states = [~is_given, *trajectory.is_masked]
    at = torch.full(is_given.shape, -1)
    passes = torch.zeros(len(is_given), dtype=torch.int64)
    for before, after in itertools.pairwise(states):
        commits = (before & ~after).cpu()
        at = torch.where(commits, passes[:, None], at)
        passes += commits.any(dim=-1)
    return at.tolist(), passes.tolist()


def assert_decodes_as(decoder, options, device, scale=1.0):
    """Ids, the pass of each position's commit, the number of passes; ragged prompts in one batch."""
    net, prompt = Counted(scale), ragged(device)
    wrapper = wrap(device, net)
    ids, trajectory = wrapper.generate(**prompt, **{**GREEDY, **options}, return_trajectory=True)
    at, passes = committed_at(trajectory, prompt["prompt_mask"])
    start = prompt["prompt"].where(prompt["prompt_mask"], MASK).tolist()
    expected = [decoder(net.alone, sequence) for sequence in start]
    assert ids.tolist() == [sequence for sequence, _, _ in expected]
    assert at == [each for _, each, _ in expected]
    assert passes == [number for _, _, number in expected]
    return passes, trajectory, net


@pytest.mark.parametrize(("length", "steps"), [(4, 2), (5, 3), (7, 7), (18, 5), (30, 4), (1, 1)])
def test_llada(length, steps, device):
    options = {"block_length": length, "steps": steps, "commits": even_split}
    _, trajectory, net = assert_decodes_as(lambda *x: decoders.llada(*x, length, steps), options, device)
    assert len(trajectory.ids) == math.ceil(N / length) * steps
    assert net.passes <= len(trajectory.ids)


@pytest.mark.parametrize("length", [4, 7, N])
@pytest.mark.parametrize("rule", [{"threshold": 0.3}, {"threshold": 0.9}, {"factor": 1.0}, {"factor": 0.3}], ids=str)
def test_fast_dllm(length, rule, device):
    """No more passes than it takes; which scale of the logits tells the rules apart was tried."""
    options = {"block_length": length, **rule}
    passes, trajectory, _ = assert_decodes_as(
        lambda *x: decoders.fast_dllm(*x, length, **rule), options, device, scale=2.0
    )
    assert max(passes) <= len(trajectory.ids) < N or rule == {"threshold": 0.9}


@pytest.mark.parametrize(("length", "steps"), [(4, 4), (6, 3), (5, 2)])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.95])
def test_sdar_dynamic(length, steps, threshold, device):
    """Also LLaDA2.0's and Nemotron's: the threshold's, and at least the even split of what is open in the block."""
    options = {
        "block_length": length, "block_origin": "zero", "steps": steps, "threshold": threshold, "commits": even_split,
    }  # fmt: skip
    assert_decodes_as(lambda *x: decoders.sdar_dynamic(*x, length, steps, threshold), options, device)


@pytest.mark.parametrize("bound", [0.0, 0.5, 3.0, 100.0])
def test_eb_sampler(bound, device):
    passes, _, _ = assert_decodes_as(
        lambda *x: decoders.eb_sampler(*x, bound), {"score": "entropy", "entropy_bound": bound}, device
    )
    assert max(passes) in ({1} if bound == 100.0 else range(2, N + 1))


@pytest.mark.parametrize("steps", [3, 18])
def test_an_order_of_ones_own(steps, device):
    """Halton's, or left to right: a score for all sequences."""
    order = np.random.default_rng(0).permutation(N).tolist()
    score = torch.empty(N)
    score[order] = -torch.arange(float(N))
    for given, places in ((score, order), (-torch.arange(float(N)), range(N))):
        assert_decodes_as(
            lambda *x, places=places: decoders.in_order(*x, places, steps), {"score": given, "steps": steps}, device
        )


# ---- commits ----


@pytest.mark.parametrize("of_batch", [False, True])
def test_commits_of_each_step(of_batch, device):
    """The last step commits what is left; 0 leaves a step out."""
    commits = torch.tensor([3, 0, 40, 1, 0] if not of_batch else [[3, 1], [0, 2], [5, 0], [1, 1], [0, 0]])
    net = Counted()
    wrapper = wrap(device, net)
    for given in (commits, commits.int(), commits.tolist()):
        _, trajectory = wrapper.generate(2, steps=5, commits=given, return_trajectory=True)
        left = trajectory.is_masked.sum(dim=-1).cpu()
        each = commits if of_batch else commits[:, None].expand(-1, 2)
        expected = (N - each.cumsum(dim=0)).clamp(min=0)
        expected[-1] = 0
        assert torch.equal(left, expected)
    assert net.passes == 3 * (5 if of_batch else 2)
    _, trajectory = wrapper.generate(2, steps=4, commits=np.int64(2), return_trajectory=True)
    assert trajectory.is_masked.sum(dim=-1).tolist() == [[16, 16], [14, 14], [12, 12], [0, 0]]


def test_dreams_law_of_commits(device):
    """k = int(m (1 - s / t)) of t from 1 to 1e-3, all that is left at the end."""

    def law(num_open, steps):
        times, left, commits = np.linspace(1.0, 1e-3, steps + 1), num_open, []
        for t, s in itertools.pairwise(times):
            commits.append(int(left * (1 - s / t)) if len(commits) < steps - 1 else left)
            left -= commits[-1]
        return commits

    assert sum(law(N, 6)) == N
    _, trajectory = wrap(device, Context()).generate(3, steps=6, commits=law, return_trajectory=True)
    counts = trajectory.is_masked.sum(dim=-1)
    assert counts[:, 0].tolist() == (N - np.cumsum(law(N, 6))).tolist()


@pytest.mark.parametrize("score", ["confidence", "margin", "entropy"])
@torch.no_grad()
def test_dreams_settings(score, device):
    """T .2, top_p .95, figures of the heated nucleus: committed is what they say, in float64, of each state."""
    net, temperature, top_p = Counted(0.5), 0.2, 0.95
    wrapper = wrap(device, net)
    _, trajectory = wrapper.generate(
        4, start_temperature=temperature, end_temperature=temperature, top_p=top_p, processed=True, score=score,
        filter_thres=None, choice_temperature=0.0, commits=even_split, steps=6, return_trajectory=True,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    before = torch.full((4, N), MASK), torch.ones(4, N, dtype=torch.bool)
    for ids, is_masked, log_probs in zip(*(x.cpu() for x in trajectory), strict=True):
        for b in range(4):
            z = net.alone(before[0][b].numpy()) / temperature
            z[:, MASK] = -np.inf
            p = decoders.softmax(z, axis=-1)
            for row in p:
                order = np.argsort(-row)
                row[order[1:][np.cumsum(row[order])[:-1] >= top_p]] = 0.0
            p /= p.sum(axis=-1, keepdims=True)
            if score == "confidence":
                figure = log_probs[b].double().numpy()
            elif score == "margin":
                figure = np.diff(np.sort(p, axis=-1)[:, -2:], axis=-1)[:, 0]
            else:
                figure = np.sum(np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0), axis=-1)
            was = before[1][b].numpy()
            commits = was & ~is_masked[b].numpy()
            assert commits.sum() == 3
            assert figure[commits].min() >= figure[was & ~commits].max(initial=-np.inf) - 1e-6
            chosen = p[np.arange(N), ids[b].numpy()][commits]
            np.testing.assert_allclose(log_probs[b].numpy()[commits], np.log(chosen), atol=2e-5)
        before = ids, is_masked
    assert not is_masked.any()


def test_mdlms_steps_by_binomial_commits(device):
    """At each of S steps every masked position is committed with probability 1 / (steps left): the joint law of when
    two positions are, against the product that it is."""
    steps, batch = 3, 6000
    numbers, left, commits = np.random.default_rng(1), np.full(batch, 2), []
    for step in range(steps):
        commits.append(numbers.binomial(left, 1 / (steps - step)))
        left = left - commits[-1]
    wrapper = wrap(device, Small(2), steps=steps)
    _, trajectory = wrapper.generate(
        batch, score="random", commits=torch.from_numpy(np.array(commits)), end_temperature=1.0,
        return_trajectory=True, generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    at = trajectory.is_masked.sum(dim=0).cpu()  # the step of each position's commit
    counts = torch.bincount(3 * at[:, 0] + at[:, 1], minlength=9).numpy()
    assert_law(counts, np.full(9, 1 / 9))


# ---- by hand ----


@pytest.mark.parametrize(
    "options",
    [
        {"block_length": 3},
        {"block_length": 3, "block_origin": "zero", "top_p": 0.9, "choice_temperature": 2.0},
        {"block_length": 5, "threshold": 0.4, "steps": 3},
        {"block_length": 4, "score": "entropy", "commits": 2, "sample_offset": 3},
    ],
    ids=str,
)
@torch.no_grad()
def test_blocks_are_a_loop_of_demask_steps(options, device):
    """At a temperature, with noise, the same draws: each block's steps count from 0."""
    length, steps, seed = 8, options.get("steps", 4), 7
    wrapper = wrap_small(device, length, steps=steps)
    prompt = prompts(device)
    given = {name: value for name, value in options.items() if name != "steps"}
    size, origin = given.pop("block_length"), given.pop("block_origin", "prompt")
    commits, rule = given.pop("commits", None), {k: given.pop(k) for k in ("threshold",) if k in given}
    noise = given.pop("choice_temperature", 0.0 if rule or "score" in given else 4.5)
    is_open = ~prompt["prompt_mask"]
    ids = prompt["prompt"].masked_fill(is_open, MASK)
    is_masked = is_open.clone()
    first = torch.where(is_open.any(-1), is_open.int().argmax(-1), length) * (origin == "prompt")
    generator = torch.Generator(device).manual_seed(seed)
    drawn = functional.draw_seed(torch.device(device), generator)
    for begin in range(0, length, size):
        block = torch.stack([first + begin, first + begin + size], dim=-1).clamp(max=length)
        place = torch.arange(length, device=device)
        inside = (place >= block[:, :1]) & (place < block[:, 1:]) & is_open
        sizes = inside.sum(dim=-1)
        for step in range(steps):
            left = (steps - 1 - step) / steps
            if rule and step < steps - 1:
                how = {"counts": None, **rule}
            elif commits is not None and step < steps - 1:
                how = {"counts": (sizes - commits * (step + 1)).clamp(min=0)}
            else:
                how = {"counts": (sizes * left + 1e-4).long()}
            out = functional.demask_step(
                wrapper.net(ids), ids, is_masked, mask_id=MASK, temperature=max(left, 1e-3), step=step, seed=drawn,
                block=block, choice_temperature=noise * left, top_k=math.ceil((1 - 0.7) * V), **given, **how,
            )  # fmt: skip
            ids, is_masked = out[0], out[1]
    again = wrapper.generate(**prompt, **options, generator=torch.Generator(device).manual_seed(seed))
    assert torch.equal(ids, again)


@pytest.mark.parametrize(
    "of_wrapper", [{}, {"token_critic": "own"}, {"self_cond": True}, {"can_mask_prev_unmasked": True}]
)
@pytest.mark.parametrize("options", [{}, {"threshold": 0.4}, {"threshold": 0.3, "steps": 2}], ids=str)
def test_a_sequence_does_not_know_its_batch_in_blocks(of_wrapper, options, device):
    wrapper, prompt = wrap_small(device, steps=3, **of_wrapper), prompts(device, 5)

    def generate(rows: slice) -> torch.Tensor:
        given = {name: value[rows] for name, value in prompt.items()}
        generator = torch.Generator().manual_seed(3)
        return wrapper.generate(**given, block_length=3, generator=generator, sample_offset=rows.start, **options)

    whole = generate(slice(0, 5))
    assert torch.equal(whole, torch.cat([generate(slice(b, b + 1)) for b in range(5)]))
    assert torch.equal(whole[prompt["prompt_mask"]], prompt["prompt"][prompt["prompt_mask"]])


def test_what_lies_in_later_blocks_waits(device):
    _, trajectory = wrap(device, Context()).generate(2, block_length=5, steps=2, return_trajectory=True)
    left = [trajectory.is_masked[:, 0, begin : begin + 5].sum(dim=-1).tolist() for begin in range(0, N, 5)]
    assert left == [[2, 0, 0, 0, 0, 0, 0, 0], [5, 5, 2, 0, 0, 0, 0, 0], [5] * 4 + [2, 0, 0, 0], [3] * 6 + [1, 0]]


@pytest.mark.parametrize(
    "options", [{"block_length": 4}, {"block_length": 4, "can_mask_prev_unmasked": True}], ids=str
)
def test_blocks_in_which_all_is_given(options, device):
    options = dict(options)
    wrapper = wrap_small(device, can_mask_prev_unmasked=options.pop("can_mask_prev_unmasked", False))
    given = torch.ones(2, 8, dtype=torch.bool, device=device)
    prompt = torch.full((2, 8), 3, device=device)
    assert torch.equal(wrapper.generate(prompt=prompt, prompt_mask=given, **options), prompt)
    assert wrapper.generate(0, **options).shape == (0, 8)
    assert wrapper.generate(prompt=prompt[0, :7], block_origin="zero", **options).shape == (8,)


@pytest.mark.parametrize("block_length", [None, 4])
def test_a_rule_runs_as_many_passes_as_it_takes(block_length, device):
    """One for a block where all is sure, one for each position where nothing is; a given number is the most."""
    net = Counted()
    wrapper = wrap(device, net)
    num_blocks = 5 if block_length else 1
    for threshold, steps, passes in ((0.0, None, num_blocks), (1.0, None, N), (1.0, 2, 2 * num_blocks)):
        net.passes, told = 0, []

        def tell(*numbers, told=told):
            told.append(numbers)

        wrapper.generate(2, threshold=threshold, steps=steps, block_length=block_length, progress=tell, **GREEDY)
        assert net.passes == passes
        assert told[-1][0] == told[-1][1]


@pytest.mark.parametrize("options", [{"block_length": 2}, {"block_length": 3, "threshold": 0.4}], ids=str)
@pytest.mark.slow_interpreted
def test_blocks_on_the_kernels(options, kernel, monkeypatch):
    wrapper, prompt = wrap_small(kernel.device, 4, steps=2), prompts(kernel.device, 2, 4)
    ids = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("FASTMASK_BACKEND", backend)
        ids.append(wrapper.generate(**prompt, **options, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(*ids)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"block_length": 0}, ValueError, "expected block_length"),
        ({"block_length": 2.5}, TypeError, "expected block_length"),
        ({"block_origin": "end"}, ValueError, "expected block_origin to be 'prompt' or 'zero', received 'end'"),
        ({"commits": -1}, ValueError, "expected commits"),
        ({"commits": 1.5}, TypeError, "expected commits"),
        ({"commits": [1, 2]}, ValueError, r"expected commits of shape \[4\] or \[4, 2\].*received \[2\]"),
        ({"commits": [1, 2, -3, 1]}, ValueError, "expected commits from 0 on"),
        ({"commits": torch.ones(4)}, TypeError, "expected commits"),
        ({"commits": ["a"] * 4}, TypeError, "expected commits to be whole numbers"),
        ({"commits": lambda size, steps: [1]}, ValueError, r"expected commits of shape \[4\]"),
    ],
)
def test_what_is_refused(options, error, message, device):
    with pytest.raises(error, match=message):
        wrap(device).generate(2, steps=4, **options)


def test_commits_are_refused_where_what_is_committed_is_masked_again(device):
    with pytest.raises(ValueError, match="expected no commits= with can_mask_prev_unmasked=True"):
        wrap(device, can_mask_prev_unmasked=True).generate(2, commits=1)


@pytest.mark.parametrize("options", [{"block_length": 2}, {"commits": 1}, {"cfg_scale": 1.0}], ids=str)
def test_compat_has_no_such_thing(options, device):
    with pytest.raises(ValueError, match="expected compat=False"):
        wrap(device, compat=True).generate(2, **options)
