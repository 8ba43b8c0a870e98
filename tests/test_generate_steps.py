"""Ends of sequences, and a generation as an iterator of its states."""

from __future__ import annotations

import decoders
import pytest
import torch
from generating import MASK, Context, N, Small, V, prompts, wrap, wrap_small
from test_generate_blocks import GREEDY, Counted, ragged

from fastmask import GenerationStep
from fastmask.schedules import even_split

WAYS = {
    "counts": {},
    "blocks": {"block_length": 5, "steps": 3},
    "rule": {"threshold": 0.4, "block_length": 7},
    "entropy": {"score": "entropy", "entropy_bound": 1.0},
}
ENDS = (1, 8)


# ---- ends ----


@pytest.mark.parametrize("ends", [(0,), ENDS, tuple(range(MASK))], ids=str)
@pytest.mark.parametrize("options", [{"length": 4, "steps": 4}, {"length": 5, "threshold": 0.3}], ids=str)
def test_what_follows_an_end_is_that_end(options, ends, device):
    """As decoders in plain Python have it, of ragged prompts: ids, the pass of each commit, the number of passes."""
    options, net, prompt = dict(options), Counted(), ragged(device)
    length = options.pop("length")
    given, decoder = options, decoders.fast_dllm
    if "steps" in options:
        given, decoder = {**options, "commits": even_split}, decoders.llada
    eos_id = ends[0] if len(ends) == 1 else ends
    *_, last = wrap(device, net).generate_steps(**prompt, **GREEDY, **given, block_length=length, eos_id=eos_id)
    start = prompt["prompt"].where(prompt["prompt_mask"], MASK).tolist()
    expected = [decoder(net.alone, sequence, length=length, ends=ends, **options) for sequence in start]
    assert last.ids.tolist() == [ids for ids, _, _ in expected]
    assert last.committed_at.tolist() == [at for _, at, _ in expected]
    assert last.passes.tolist() == [passes for _, _, passes in expected]
    past = (last.committed_at < 0) & ~prompt["prompt_mask"]
    assert (last.log_probs[past] == 0).all()
    assert past.any()
    assert not last.is_masked.any()


def test_it_ends_when_all_sequences_have(device):
    """No pass after the one that ends the last."""
    net = Counted()
    wrapper = wrap(device, net)
    options = {"score": -torch.arange(float(N)), "steps": N, **GREEDY}  # left to right, one a pass
    plain = wrapper.generate(1, **options)[0].tolist()
    for end in set(plain):
        net.passes = 0
        ids = wrapper.generate(1, eos_id=end, **options)[0].tolist()
        first = plain.index(end)
        assert net.passes == first + 1
        assert ids == plain[: first + 1] + [end] * (N - first - 1)
    net.passes = 0
    wrapper.generate(2, eos_id=min(set(range(V)) - {MASK, *plain}), **options)
    assert net.passes == N


def test_later_blocks_are_not_run_for_ended_sequences(device):
    net = Counted()
    _, trajectory = wrap(device, net).generate(
        3, block_length=3, steps=3, eos_id=[i for i in range(V) if i != MASK], return_trajectory=True,
        score=-torch.arange(float(N)),
    )  # fmt: skip
    assert net.passes == len(trajectory.ids) == 1
    assert not trajectory.is_masked.any()
    assert (trajectory.ids[0] == trajectory.ids[0, :, :1]).all()


def test_what_is_given_is_no_end_and_stays(device):
    prompt = torch.full((1, 8), 3, device=device)
    given = torch.arange(8, device=device)[None] % 2 == 0
    ends = [i for i in range(V) if i not in (3, MASK)]
    ids = wrap_small(device).generate(prompt=prompt, prompt_mask=given, eos_id=[3, *ends], forbidden=[3], **GREEDY)
    assert torch.equal(ids[given], prompt[given])
    assert len(ids[~given].unique()) == 1  # the first that was generated is an end


@pytest.mark.parametrize("way", WAYS)
def test_ends_that_never_come_change_nothing(way, device):
    wrapper, prompt = wrap_small(device), prompts(device)
    plain, ended = (
        wrapper.generate(
            **prompt, **WAYS[way], **more, generator=torch.Generator().manual_seed(1), forbidden=[2]
        )
        for more in ({}, {"eos_id": 2})
    )  # fmt: skip
    assert torch.equal(plain, ended)


@pytest.mark.parametrize(
    ("of_wrapper", "eos_id", "error", "message"),
    [
        ({}, V, ValueError, "expected eos_id"),
        ({}, 1.5, TypeError, "expected eos_id"),
        ({}, [], ValueError, "expected eos_id of at least one id"),
        ({}, torch.tensor([1]), TypeError, r"received a tensor; give eos_id.tolist\(\)"),
        ({}, MASK, ValueError, "expected eos_id other than mask_id"),
        ({"can_mask_prev_unmasked": True}, 1, ValueError, "expected no eos_id= with can_mask_prev_unmasked=True"),
        ({"compat": True}, 1, ValueError, "expected compat=False with eos_id="),
    ],
)
def test_ends_that_are_refused(of_wrapper, eos_id, error, message, device):
    with pytest.raises(error, match=message):
        wrap(device, **of_wrapper).generate(2, eos_id=eos_id)


# ---- steps ----


@pytest.mark.parametrize(
    ("way", "of_wrapper"),
    [
        *((way, of_wrapper) for way in WAYS for of_wrapper in ({}, {"self_cond": True})),
        *((way, {"can_mask_prev_unmasked": True}) for way in ("counts", "blocks", "rule")),
    ],
    ids=str,
)
def test_steps_are_what_generate_does(way, of_wrapper, device):
    """States, the step of each commit, and the number of passes, as the trajectory shows them."""
    wrapper, prompt = wrap_small(device, steps=4, **of_wrapper), prompts(device)
    options = {**prompt, **WAYS[way]}
    ids, trajectory = wrapper.generate(**options, return_trajectory=True, generator=torch.Generator().manual_seed(2))
    states = [
        GenerationStep(*(x.clone() for x in step))
        for step in wrapper.generate_steps(**options, generator=torch.Generator().manual_seed(2))
    ]
    assert torch.equal(states[-1].ids, ids)
    theirs = [tuple(x[n].tolist() for x in trajectory) for n in range(len(trajectory.ids))]
    is_open = ~prompt["prompt_mask"]
    before, passes = is_open, torch.zeros(len(ids), dtype=torch.int64, device=device)
    committed_at = torch.full_like(ids, -1)
    for state in states:
        assert tuple(x.tolist() for x in state[:3]) in theirs
        committed_at = passes[:, None].where(before & ~state.is_masked, committed_at)
        committed_at[state.is_masked] = -1
        passes = passes + (before != state.is_masked).any(dim=-1)
        assert torch.equal(state.committed_at, committed_at.int())
        assert torch.equal(state.passes, passes)
        before = state.is_masked
    assert (committed_at[is_open] >= 0).all()


@pytest.mark.parametrize(
    ("of_wrapper", "options"),
    [
        ({}, {"steps": 6, "score": "random"}),
        ({}, {"steps": 5, "commits": 2, "block_length": 3}),
        ({"self_cond": True}, {"steps": 7}),
        ({"token_critic": "own"}, {"steps": 6}),
        ({"can_mask_prev_unmasked": True}, {"steps": 6, "block_length": 3}),
        ({"can_mask_prev_unmasked": True}, {"steps": 9, "threshold": 0.3}),
        ({"can_mask_prev_unmasked": True, "token_critic": "own"}, {"steps": 6}),
    ],
    ids=str,
)
def test_what_is_told_of_a_sequence_does_not_depend_on_its_batch(of_wrapper, options, device):
    """Steps that run for others alone: ids, log-probabilities, passes, the pass of each commit."""
    wrapper, prompt = wrap_small(device, **of_wrapper), prompts(device)

    def last(rows: slice):
        given = {name: value[rows] for name, value in prompt.items()}
        generator = torch.Generator().manual_seed(3)
        *_, state = wrapper.generate_steps(**given, **options, generator=generator, sample_offset=rows.start)
        return state

    whole, alone = last(slice(0, 4)), [last(slice(b, b + 1)) for b in range(4)]
    for name in GenerationStep._fields:
        assert torch.equal(getattr(whole, name), torch.cat([getattr(state, name) for state in alone])), name


def test_as_many_steps_as_passes_of_the_network(device):
    net = Counted()
    wrapper = wrap(device, net)
    for options in ({"steps": 40}, {"threshold": 0.4}, {"block_length": 4, "steps": 9}):
        net.passes = 0
        assert len(list(wrapper.generate_steps(2, **options))) == net.passes


def test_closing_it_restores_the_modes(device):
    wrapper = wrap(device, Context()).train()
    for step in wrapper.generate_steps(2, steps=5):
        assert not wrapper.training
        assert not step.ids.requires_grad
        break
    assert wrapper.training
    steps = wrapper.generate_steps(2, steps=5)
    next(steps)
    steps.close()
    assert wrapper.training
    assert torch.is_grad_enabled()


def test_gradients_between_steps_are_the_callers(device):
    for _ in wrap(device, Small(N)).generate_steps(1, steps=3):
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("name", ["progress", "return_trajectory", "cuda_graph"])
def test_what_steps_refuse(name, device):
    with pytest.raises(TypeError, match=f"expected no {name}= in generate_steps"):
        wrap(device).generate_steps(2, **{name: True})


def test_errors_come_before_the_first_step(device):
    wrapper = wrap(device)
    with pytest.raises(ValueError, match="expected steps"):
        wrapper.generate_steps(2, steps=0)
    with pytest.raises(TypeError, match="give start_temperature="):
        wrapper.generate_steps(2, temperature=1.0)
    with pytest.raises(TypeError):
        wrapper.generate_steps(2, 1.0, None, 1.0, "five")
