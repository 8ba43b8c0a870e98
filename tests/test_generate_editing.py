"""Editing: committed ids that give way to surer ones, as LLaDA2.1 decodes, and by hand."""

from __future__ import annotations

from functools import partial

import decoders
import pytest
import torch
from generating import MASK, V, prompts, wrap, wrap_small
from test_generate_blocks import GREEDY, Counted, ragged

from fastmask import functional, generation

OPERATION = "sample_tokens"
ENDS = (1, 8)


def last_of(steps):
    """The last state, and how many times a committed id was overwritten."""
    num_edits, before = 0, None
    for state in steps:
        if before is not None:
            ids, is_masked = before
            num_edits += int(((ids != state.ids) & ~is_masked & (state.committed_at >= 0)).sum())
        before = state.ids.clone(), state.is_masked.clone()
    return state, num_edits


@pytest.mark.parametrize("ends", [(), ENDS], ids=str)
@pytest.mark.parametrize("editing_steps", [1, 2, 16])
@pytest.mark.parametrize(("threshold", "editing_threshold"), [(0.7, 0.5), (0.5, 0.0), (0.3, 0.9), (1.0, 0.2)])
@pytest.mark.parametrize("length", [4, 7, 30])
def test_llada21(length, threshold, editing_threshold, editing_steps, ends, device):
    """Ids, the pass that committed or edited each position, and the number of passes; ragged prompts in one batch."""
    net, prompt = Counted(1.5), ragged(device)
    options = {
        "block_length": length, "block_origin": "zero", "threshold": threshold, "commits": 1,
        "editing_threshold": editing_threshold, "editing_steps": editing_steps, "eos_id": ends or None,
    }  # fmt: skip
    state, num_edits = last_of(wrap(device, net).generate_steps(**prompt, **GREEDY, **options))
    start = prompt["prompt"].where(prompt["prompt_mask"], MASK).tolist()
    expected = [
        decoders.llada21(net.alone, ids, length, threshold, editing_threshold, editing_steps, ends) for ids in start
    ]
    assert state.ids.tolist() == [ids for ids, _, _ in expected]
    assert state.committed_at.tolist() == [at for _, at, _ in expected]
    assert state.passes.tolist() == [passes for _, _, passes in expected]
    assert num_edits > 0 or editing_threshold == 0.9
    net.passes = 0
    assert torch.equal(wrap(device, net).generate(**prompt, **GREEDY, **options), state.ids)
    if length == 30:  # one block: as many passes as the longest sequence takes
        assert net.passes == state.passes.max()


@pytest.mark.parametrize("end_temperature", [0.8, 0.1])
@pytest.mark.parametrize("editing_threshold", [0.3, 0.0])
@torch.no_grad()
def test_edits_are_those_of_demask_steps(editing_threshold, end_temperature, device):
    """By counts, at a temperature, the same draws; where only edits are left it stays what it fell to."""
    steps, editing_steps, length = 3, 4, 8
    wrapper, prompt = wrap_small(device, length, steps=steps), prompts(device)
    is_open = ~prompt["prompt_mask"]
    ids, is_masked = prompt["prompt"].masked_fill(is_open, MASK), is_open.clone()
    seed = functional.draw_seed(torch.device(device), torch.Generator(device).manual_seed(7))
    left, sizes, num_edits = is_open.any(dim=-1) * editing_steps, is_open.sum(dim=-1), 0
    log_probs = torch.zeros(ids.shape, device=device)
    for step in range(steps + editing_steps):
        remaining = max(0, steps - 1 - step) / steps
        was_full = ~is_masked.any(dim=-1)
        may_edit = is_open & ~is_masked & (left > 0)[:, None]
        out = functional.demask_step(
            wrapper.net(ids), ids, is_masked, (sizes * remaining + 1e-4).long(), mask_id=MASK, seed=seed, step=step,
            temperature=0.8 + (end_temperature - 0.8) * min(1, step / (steps - 1)),
            editing_threshold=editing_threshold, editable=may_edit, top_k=9,
        )  # fmt: skip
        edited = (out.ids != ids) & ~is_masked
        log_probs = out.log_probs.where(is_masked | edited, log_probs)
        num_edits += int(edited.sum())
        left = torch.where(was_full & ~edited.any(dim=-1), 0, left - was_full.long()).clamp(min=0)
        ids, is_masked = out.ids, out.is_masked
    options = {
        "start_temperature": 0.8, "end_temperature": end_temperature, "editing_threshold": editing_threshold,
        "filter_thres": 1 - 8.5 / V, "editing_steps": editing_steps, "choice_temperature": 0.0,
    }  # fmt: skip
    state, again = last_of(
        wrapper.generate_steps(**prompt, **options, generator=torch.Generator(device).manual_seed(7))
    )
    assert torch.equal(state.ids, ids)
    assert torch.equal(state.log_probs, log_probs)
    assert num_edits == again > 0


@pytest.mark.parametrize("of_wrapper", [{}, {"token_critic": "own"}, {"self_cond": True}], ids=str)
@pytest.mark.parametrize("options", [{}, {"threshold": 0.4}, {"block_length": 3, "eos_id": [2, 7]}], ids=str)
def test_a_sequence_does_not_know_its_batch(of_wrapper, options, device):
    wrapper, prompt = wrap_small(device, steps=3, **of_wrapper), prompts(device, 5)

    def generate(rows: slice):
        given = {name: value[rows] for name, value in prompt.items()}
        state, _ = last_of(
            wrapper.generate_steps(
                **given, **options, editing_threshold=0.2, editing_steps=5, sample_offset=rows.start,
                generator=torch.Generator().manual_seed(3),
            )
        )  # fmt: skip
        return state

    whole = generate(slice(0, 5))
    alone = [generate(slice(b, b + 1)) for b in range(4)]  # of the fifth all is given: no step runs
    for name in ("ids", "log_probs", "committed_at", "passes"):
        assert torch.equal(getattr(whole, name)[:4], torch.cat([getattr(state, name) for state in alone]))
    given = prompt["prompt_mask"]
    assert torch.equal(whole.ids[given], prompt["prompt"][given])
    assert not whole.is_masked.any()


@pytest.mark.parametrize(
    "options", [{}, {"threshold": 0.4}, {"block_length": 3, "threshold": 0.2, "eos_id": 2}], ids=str
)
def test_steps_that_are_left_change_nothing(options, device, monkeypatch):
    """A graph runs them all."""
    wrapper, run, ids = wrap_small(device, steps=3), generation.run, []
    for may_stop in (True, False):
        monkeypatch.setattr(generation, "run", partial(run, may_stop=may_stop))
        generator = torch.Generator().manual_seed(1)
        ids.append(wrapper.generate(**prompts(device), **options, editing_threshold=0.2, generator=generator))
    assert torch.equal(*ids)


def test_nothing_is_edited_above_1_and_no_pass_is_saved(device):
    """The pass that finds nothing to edit is one more."""
    net = Counted()
    wrapper, passes = wrap(device, net), []
    for more in ({}, {"editing_threshold": 1.0}):
        net.passes = 0
        passes.append((wrapper.generate(2, threshold=0.4, **GREEDY, **more).tolist(), net.passes))
    (plain, few), (edited, more) = passes
    assert plain == edited
    assert more == few + 1


@pytest.mark.slow_interpreted
def test_edits_on_the_kernels(kernel, monkeypatch):
    wrapper, prompt = wrap_small(kernel.device, 4, steps=2), prompts(kernel.device, 2, 4)
    ids = []
    for backend in ("triton", "reference"):
        monkeypatch.setenv("FASTMASK_BACKEND", backend)
        ids.append(
            wrapper.generate(
                **prompt, editing_threshold=0.1, editing_steps=3, block_length=3,
                generator=torch.Generator().manual_seed(0),
            )
        )  # fmt: skip
    assert torch.equal(*ids)


@pytest.mark.parametrize(
    ("of_wrapper", "options", "error", "message"),
    [
        ({}, {"editing_threshold": 1.5}, ValueError, r"expected editing_threshold in \[0, 1\]"),
        ({}, {"editing_threshold": "high"}, TypeError, "expected editing_threshold to be a number"),
        ({}, {"editing_threshold": 0.5, "editing_steps": 0}, ValueError, "expected editing_steps of at least 1"),
        ({}, {"editing_threshold": 0.5, "editing_steps": 1.5}, TypeError, "expected editing_steps to be an int"),
        ({}, {"editing_steps": 4}, ValueError, "expected editing_threshold= with editing_steps=4"),
        ({"can_mask_prev_unmasked": True}, {"editing_threshold": 0.5}, ValueError, "expected no editing_threshold="),
        ({"compat": True}, {"editing_threshold": 0.5}, ValueError, "expected compat=False with editing_threshold="),
    ],
)
def test_what_is_refused(of_wrapper, options, error, message, device):
    with pytest.raises(error, match=message):
        wrap(device, **of_wrapper).generate(2, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"editing_threshold": 0.5}, ValueError, "expected editing_threshold and editable together"),
        ({"editable": torch.ones(2, 3).bool()}, ValueError, "expected editing_threshold and editable together"),
        ({"editing_threshold": 2, "editable": torch.ones(2, 3).bool()}, ValueError, "expected editing_threshold in"),
        ({"editing_threshold": 0.5, "editable": torch.ones(2, 3)}, TypeError, "expected editable"),
        ({"editing_threshold": 0.5, "editable": torch.ones(2, 4).bool()}, ValueError, "expected editable"),
    ],
)
def test_what_a_step_refuses(options, error, message):
    ids = torch.full((2, 3), 6)
    with pytest.raises(error, match=message):
        functional.demask_step(torch.zeros(2, 3, 7), ids, ids == 6, 1, mask_id=6, seed=0, **options)


@pytest.mark.parametrize("listed", [False, True])
def test_a_step_edits_what_it_may_inside_its_block(listed, backend):
    """Position 0 is masked, 1 of another id, 2 of the same, 3 not editable, 4 outside of the block."""
    logits = torch.tensor([1.0, 6.0, 0.0, -9.0]).expand(1, 5, 4)
    ids, is_masked = torch.tensor([[3, 0, 1, 0, 0]]), torch.tensor([[True, False, False, False, False]])
    editable, block = torch.tensor([[False, True, True, False, True]]), torch.tensor([[0, 4]])
    rows = {"row_indices": torch.arange(5)} if listed else {}
    expected = torch.log_softmax(logits[0, 0, :3].double(), dim=-1)[1].item()
    for threshold, edited in ((0.9, 1), (0.999, 0)):
        out = backend.run(
            functional.demask_step, logits, ids, is_masked, 0, mask_id=3, temperature=0.0, seed=0, block=block,
            editing_threshold=threshold, editable=editable, **rows,
        )  # fmt: skip
        assert out.ids.tolist() == [[1, edited, 1, 0, 0]]
        assert not out.is_masked.any()
        assert out.log_probs.tolist() == [pytest.approx([expected, expected * edited, 0, 0, 0], abs=1e-6)]
