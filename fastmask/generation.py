"""One generation: the state, which lies on the device, and the loop, which goes through the host's plan.

No step waits for the device but by a rule, with edits or for ends of sequences, where the next one asks whether
anything is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastmask import _cuda_graph, backbone, functional
from fastmask._host_count import HostCount
from fastmask._progress import Progress, track
from fastmask.critic import critic_logits
from fastmask.generation_options import Options
from fastmask.ops.judging import put_back
from fastmask.passes import Inputs, Model, Passes
from fastmask.planning import Plan, Start, Step
from fastmask.records import Draws, GenerationStep, Sampled, Sampling, Trajectory
from fastmask.reference.remask import is_inside
from fastmask.upstream import Proposal

# The state


class State(NamedTuple):
    """All that a generation reads and writes on the device, but for the network's arguments.

    Written in place:
        ids, is_masked, log_probs: [B, N].
        row_indices: flat positions of what is masked, block by block, -1 where a place is free.
        edits_left: [K, B] int64, in how many more passes each sequence may be edited in each block, after the one
        that committed the last of it; 0 once one changed nothing. None where nothing is edited.

    Read:
        maskable: [B, N] bool; maskable_rows: its flat positions. order: [B, N] float32, the score; None for another.
        counts, commits, row_starts, windows, origins: the plan's. seed: [] int64. forbidden: [V] bool or None. ends:
        [E] int64, ids that end a sequence; None for none.
    """

    ids: Tensor
    is_masked: Tensor
    log_probs: Tensor
    row_indices: Tensor
    edits_left: Tensor | None
    maskable: Tensor
    maskable_rows: Tensor
    counts: Tensor
    commits: Tensor | None
    row_starts: Tensor
    windows: Tensor | None
    origins: Tensor | None
    seed: Tensor
    forbidden: Tensor | None
    order: Tensor | None
    ends: Tensor | None


def first_state(
    start: Start,
    plan: Plan,
    seed: Tensor,
    forbidden: Tensor | None,
    order: Tensor | None = None,
    ends: Tensor | None = None,
) -> State:
    """The state before the first step."""
    ids, maskable = start.ids.contiguous(), (~start.is_given).contiguous()
    rows = _first_rows(maskable, plan)
    edits_left = None
    if plan.editing_steps:
        has_open = [_within(maskable, window).any(dim=-1) for window in plan.each_window]
        edits_left = torch.stack(has_open).long() * plan.editing_steps
    return State(
        ids=ids,
        is_masked=maskable.clone(),
        log_probs=torch.zeros(ids.shape, dtype=torch.float32, device=ids.device),
        row_indices=rows.clone(),
        edits_left=edits_left,
        maskable=maskable,
        maskable_rows=rows,
        counts=plan.counts,
        commits=plan.commits,
        row_starts=plan.row_starts,
        windows=plan.windows,
        origins=plan.origins,
        seed=seed,
        forbidden=forbidden,
        order=order,
        ends=ends,
    )


def _first_rows(maskable: Tensor, plan: Plan) -> Tensor:
    """Flat positions of what is open in each block, at the places that it has in the list."""
    sizes = [part.num_rows[0] for part in plan.parts]
    return torch.cat(
        [_rows_of(_within(maskable, window), size) for window, size in zip(plan.each_window, sizes, strict=True)]
    )


def _rows_of(chosen: Tensor, size: int) -> Tensor:
    """Flat positions of at most so many chosen ones [B, N], then -1."""
    return torch.nonzero_static(chosen.flatten(), size=size).squeeze(-1)


def _within(chosen: Tensor, window: Tensor | None) -> Tensor:
    """Those chosen positions [B, N] that are in a block."""
    return chosen if window is None else chosen & is_inside(window, chosen)


# The loop


def run(
    model: Model,
    state: State,
    plan: Plan,
    options: Options,
    inputs: Inputs,
    generator: torch.Generator | None = None,
    *,
    may_stop: bool = True,
) -> Iterator[Done]:
    """Runs the steps on the state, and yields after each.

    By a rule or with edits a block ends when nothing is left to do in it, where it ``may_stop``, and all of them once
    each sequence has an end. A GPU is asked a step later, so that the host waits for no work that it queued since.
    """
    has_own_end = options.has_rule or options.edits
    stops = may_stop and not model.may_remask and (has_own_end or state.ends is not None)
    asked: _Question | None = None
    passes = Passes(model, inputs, state.ids, state.maskable, plan.columns, state.origins, options.cfg_scale)
    for block in range(len(plan.parts)):
        condition = model.null_embed  # a block knows nothing of how long others took
        for number in range(plan.block_steps):
            through = block * plan.block_steps + number + 1
            step = plan.step(block, number)
            if step is None:
                if stops and has_own_end and number > 0:
                    break  # as many steps as there are positions have run
                yield Done(through, None)
                continue
            next_condition = _advance(state, step, plan, model, options, condition, passes, generator)
            num_left = None if asked is None else asked.answer()
            if num_left == _NOWHERE:
                return  # nothing was left before this step: it changed nothing
            if num_left == 0 and asked is not None and asked.block == block:
                break
            condition = next_condition
            if stops:
                asked = _Question(state, step)
                num_left = None if state.ids.is_cuda else asked.answer()
                if num_left == _NOWHERE:
                    yield Done(plan.total, block)
                    return
                if num_left == 0:
                    yield Done((block + 1) * plan.block_steps, block)
                    break
            yield Done(through, block)


class Done(NamedTuple):
    """What a step leaves: how many of all are through, and in which block it ran; None if it could not have changed
    anything, and did not."""

    through: int
    block: int | None


_NOWHERE = -1


class _Question:
    """How much is left to do in a step's block: masked positions or, with edits, sequences that may be edited.
    _NOWHERE if nothing is in any, since all sequences have ended."""

    def __init__(self, state: State, step: Step) -> None:
        self.block = step.block
        if state.edits_left is None:
            in_all, in_block = state.is_masked, _listed_rows(state, step, step.num_rows_after) >= 0
        else:
            in_all, in_block = state.edits_left, state.edits_left[step.block]
        num_left = in_block.sum()
        if state.ends is not None:
            num_left = torch.where(in_all.any(), num_left, _NOWHERE)
        self._count = HostCount(num_left)

    def answer(self) -> int | None:
        """The number, once the device has it."""
        return self._count.wait()


def past_end(state: State, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which positions lie past the first end of their sequence, [B, N] bool, that end's id, [B, 1], and which
    sequences have one, [B] bool.

    An end is one of these ids where nothing was given and nothing before is masked.
    """
    is_end = (state.ids[..., None] == ends).any(dim=-1) & state.maskable
    is_end &= state.is_masked.cumsum(dim=-1) == 0
    is_past = is_end.cumsum(dim=-1) > is_end.long()
    end = state.ids.gather(1, is_end.byte().argmax(dim=-1, keepdim=True))
    return is_past & state.maskable, end, is_end.any(dim=-1)


def _end(state: State, ends: Tensor) -> None:
    """Fills in what lies past the first end of a sequence with that end, and lists it no more."""
    if not state.ids.shape[1]:
        return
    is_past, end, has_end = past_end(state, ends)
    if state.edits_left is not None:
        state.edits_left.masked_fill_(has_end, 0)
    state.ids.copy_(end.where(is_past, state.ids))
    state.is_masked.logical_and_(~is_past)
    state.log_probs.masked_fill_(is_past, 0.0)
    is_over = is_past.flatten()[state.row_indices.clamp(min=0)] if len(state.row_indices) else state.row_indices < 0
    state.row_indices.masked_fill_(is_over, -1)


def _listed_rows(state: State, step: Step, size: int) -> Tensor:
    """The first places of the step's block in the list."""
    return state.row_indices[step.place : step.place + size]


def _advance(
    state: State,
    step: Step,
    plan: Plan,
    model: Model,
    options: Options,
    condition: Tensor | None,
    passes: Passes,
    generator: torch.Generator | None,
) -> Tensor | None:
    """A step: one pass of the network, and of the critic. Returns what conditions the next.

    Where the order does not depend on what is sampled, what is committed is chosen first and sampled alone.
    """
    propose = partial(_propose, state, step, model, options, condition, passes, generator)
    if options.order_is_known and not (model.may_remask or plan.is_of_any_prompt):
        was_masked = state.is_masked.clone()
        _remask(state, Sampled(state.ids, state.log_probs), step, model, options, passes.inputs)
        committed = _rows_of(was_masked & ~state.is_masked, step.num_rows - step.num_rows_after)
        _, condition = propose(committed)
    elif model.rescores_committed:
        kept_ids, log_probs = state.ids.masked_fill(state.is_masked, -1).flatten(), state.log_probs.clone()
        rows = _open_rows(state, step)
        sampled, condition = propose(rows, kept_ids[rows])
        is_through = state.counts[step.row_before] == 0  # the step runs for others
        state.log_probs.copy_(log_probs.where(is_through[:, None], state.log_probs))
        _remask(state, sampled, step, model, options, passes.inputs)
    elif options.edits:
        ids, log_probs = state.ids.clone(), state.log_probs.clone()
        sampled, condition = propose(_open_rows(state, step))
        _edit(state, ids, log_probs, sampled, step, options)
        _remask(state, sampled, step, model, options, passes.inputs)
    else:
        sampled, condition = propose(_listed_rows(state, step, step.num_rows))
        _remask(state, sampled, step, model, options, passes.inputs)
    if state.ends is not None:
        _end(state, state.ends)
    return condition


def _open_rows(state: State, step: Step) -> Tensor:
    """Those of what was not given in the step's block."""
    return state.maskable_rows[step.place : step.place + step.num_open]


def _edit(state: State, ids: Tensor, log_probs: Tensor, sampled: Sampled, step: Step, options: Options) -> None:
    """Keeps what is committed, ids and log_probs [B, N] before the step, but for edits, and counts the passes."""
    assert state.edits_left is not None
    assert options.editing_threshold is not None
    left = state.edits_left[step.block]
    may_edit = (left > 0)[:, None].expand_as(ids)
    edited = put_back(sampled, ids, log_probs, state.is_masked, may_edit, options.editing_threshold)
    is_full = ~_within(state.is_masked, _window(state, step)).any(dim=-1)
    left.sub_(is_full.long()).masked_fill_(is_full & ~edited.any(dim=-1), 0).clamp_(min=0)


def _propose(
    state: State,
    step: Step,
    model: Model,
    options: Options,
    condition: Tensor | None,
    passes: Passes,
    generator: torch.Generator | None,
    rows: Tensor,
    kept_ids: Tensor | None = None,
) -> tuple[Sampled, Tensor | None]:
    """Fills in rows, and returns what was written and what conditions the next step.

    The logits are let go when it returns, before the critic or the network makes others.
    """
    out = passes.output(step.block, rows, condition)
    sampled = _sample(out, rows, kept_ids, state, step, model, options, generator)
    return sampled, None if condition is None else out.embeddings


def _sample(
    out: backbone.Output,
    rows: Tensor,
    kept_ids: Tensor | None,
    state: State,
    step: Step,
    model: Model,
    options: Options,
    generator: torch.Generator | None,
) -> Sampled:
    """Samples these rows, and finds the log-probability of each, and what else is scored."""
    sampled = options.judge(state.order, 0.0).room(state.ids, state.log_probs)
    sampling = Sampling(
        **options.settings(step, model.formulas, out.num_tokens),
        with_margin=sampled.margins is not None,
        with_entropy=sampled.entropies is not None,
        mask_id=model.mask_id,
        # A head may lack columns for the last ids.
        forbidden=None if state.forbidden is None else state.forbidden[: out.num_tokens],
    )
    proposal = Proposal(out, rows, sampling, _draws(state, step, options), generator, kept_ids)
    model.formulas.sample_(proposal, sampled)
    return sampled


def _remask(state: State, sampled: Sampled, step: Step, model: Model, options: Options, inputs: Inputs) -> None:
    """Masks again what deserves it most, and lists it."""
    if model.critic is None:
        judge = options.judge(state.order, options.choice_noise(model.formulas))
        judged = judge.remasking(sampled, step.remaining)
    else:
        judged = {
            "values": critic_logits(model.critic, state.ids, model.formulas.critic_arguments(inputs.arguments)),
            "is_confidence": False,
            "noise_scale": options.noise_level_scale * step.remaining,
            "min_remask_key": options.critics_min_remask_key,
        }
    window = _window(state, step)
    functional.remask_(
        state.ids,
        state.is_masked,
        _listed_rows(state, step, step.num_rows_after),
        state.row_starts[step.row],
        counts=state.counts[step.row] if state.commits is None else None,
        commits=None if state.commits is None else state.commits[step.row],
        block=window,
        next_block=window,
        mask_id=model.mask_id,
        eligible=state.maskable if model.may_remask else None,
        **judged,
        **_draws(state, step, options)._asdict(),
    )


def _window(state: State, step: Step) -> Tensor | None:
    return None if state.windows is None else state.windows[step.block]


def _draws(state: State, step: Step, options: Options) -> Draws:
    return Draws(state.seed, options.sample_offset, step.number)


# Ways to run it


def watched(steps: Iterator[Done], total: int, progress: Progress) -> Iterator[Done]:
    """The same, each step reported of all."""
    through: int | None = 0
    for number in track(total, progress, "demasking"):
        if number == through:
            done = next(steps, None)
            through = None if done is None else done.through
            if done is not None:
                yield done


def recorded(steps: Iterator[Done], state: State) -> Trajectory:
    """Runs the steps, and keeps the state after each."""
    states = []
    for _ in steps:
        states.append(Trajectory(state.ids.clone(), state.is_masked.clone(), state.log_probs.clone()))
    return Trajectory(*(torch.stack(values) for values in zip(*states, strict=True)))


def followed(steps: Iterator[Done], state: State) -> Iterator[GenerationStep]:
    """The state after each step that ran, and in which of its passes each sequence committed what."""
    committed_at = torch.full_like(state.ids, -1, dtype=torch.int32)
    passes = torch.zeros(len(state.ids), dtype=torch.int64, device=state.ids.device)
    before = _copied(state)
    for done in steps:
        if done.block is None:
            continue
        is_new = ~state.is_masked & (before.is_masked | (state.ids != before.ids))
        committed_at.copy_(passes[:, None].where(is_new, committed_at))
        committed_at.masked_fill_(state.is_masked, -1)  # it may be masked again
        if state.ends is not None:
            committed_at.masked_fill_(past_end(state, state.ends)[0], -1)
        passes += _has_run(before, state, done.block)
        yield GenerationStep(state.ids, state.is_masked, state.log_probs, committed_at, passes)
        before = _copied(state)


def _copied(state: State) -> State:
    """The state, with copies of what the next step writes that tells what it did."""
    edits_left = None if state.edits_left is None else state.edits_left.clone()
    return state._replace(ids=state.ids.clone(), is_masked=state.is_masked.clone(), edits_left=edits_left)


def _has_run(before: State, state: State, block: int) -> Tensor:
    """Which sequences a step changed or, with edits, had to look at, [B] bool: it may have run for others."""
    if before.edits_left is not None:
        return before.edits_left[block] > 0
    return ((before.ids != state.ids) | (before.is_masked != state.is_masked)).any(dim=-1)


def replayed(owner: nn.Module, model: Model, state: State, plan: Plan, options: Options, inputs: Inputs) -> Tensor:
    """The ids after all steps, by one CUDA graph that lives as long as the module whose parameters it reads."""
    leaves, structure = tree_flatten((state, inputs, options))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves)

    def function(inputs: list[Tensor]) -> list[Tensor]:
        given = iter(inputs)
        values = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        static_state, static_inputs, static_options = tree_unflatten(values, structure)
        for _ in run(model, static_state, plan, static_options, static_inputs, may_stop=False):
            pass
        return [static_state.ids]

    columns = None if model.start_cache is None else plan.columns
    own = (model.mask_id, model.may_remask, model.null_embed is not None, model.is_block_causal, columns)
    key = (own, plan.num_steps, plan.editing_steps, plan.parts, plan.always_runs, others, str(structure))
    return _cuda_graph.replay(owner, key, function, tensors)[0]
