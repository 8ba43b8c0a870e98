"""One generation: the state, which lies on the device, and the loop, which goes through the host's plan.

No step waits for the device but by a rule or for ends of sequences, where the next one asks whether anything is left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastmask import _check, _cuda_graph, backbone, functional
from fastmask._host_count import HostCount
from fastmask._progress import Progress, track
from fastmask.critic import critic_logits
from fastmask.ops.judging import Judge, remask_key_of_threshold
from fastmask.planning import Plan, Start, Step
from fastmask.records import Draws, GenerationStep, Sampled, Sampling, Trajectory
from fastmask.reference.remask import is_inside
from fastmask.upstream import Formulas, Proposal

# What is handed in


class Model(NamedTuple):
    """Who proposes ids, and who judges them.

    run: the network, of ids [B, N] and its arguments. critic: None where the network's confidence judges.
    condition: embeddings to the network's arguments that condition it on them. null_embed: [D], what the first step
    is conditioned on; None without self-conditioning. may_remask: whether what is committed may be masked again.
    """

    run: Callable[..., backbone.Output]
    critic: nn.Module | None
    condition: Callable[[Tensor], dict[str, Any]]
    null_embed: Tensor | None
    mask_id: int
    may_remask: bool
    formulas: Formulas

    @property
    def rescores_committed(self) -> bool:
        """Whether what is committed needs a probability too, since it competes to be masked again."""
        return self.may_remask and self.critic is None


class Inputs(NamedTuple):
    """What the network is given beside the ids.

    arguments: its own. unconditional: those of the second pass of guidance; None for the same, the prompt masked.
    """

    arguments: dict[str, Any]
    unconditional: dict[str, Any] | None


class Options(NamedTuple):
    """Options of ``generate`` that stay the same through all steps, and through the replays of their graph.

    score: None for the critic's or, where there is none, the confidence; "order" for the state's own.
    """

    start_temperature: float
    end_temperature: float | None
    filter_thres: float | None
    min_p: float | None
    top_p: float | None
    processed: bool
    noise_level_scale: float
    score: str | None
    choice_temperature: float | None
    threshold: float | None
    factor: float | None
    entropy_bound: float | None
    cfg_scale: float | None
    sample_offset: int

    def checked(self) -> Options:
        """The same as Python's own numbers; those that do not fit are refused."""
        numbers: dict[str, Any] = {}
        for name, high in _NUMBERS.items():
            value = getattr(self, name)
            if value is not None:
                if name == "threshold" and self.score == "entropy":
                    high = math.inf
                _check.number(name, value, 0.0, high, below_high=name == "filter_thres")
                numbers[name] = float(value)
        if self.start_temperature == 0.0 and self.end_temperature:
            raise ValueError(
                "expected end_temperature=0 or none with start_temperature=0, which is greedy in every step, "
                f"received {self.end_temperature}; give a start_temperature above 0"
            )
        _check.flag("processed", self.processed)
        if self.processed and self.end_temperature is None and self.start_temperature > 0.0:
            raise ValueError(
                "expected end_temperature= with processed=True, received None: the temperature falls to 0, where all "
                "confidences are 1; give end_temperature=start_temperature to keep it"
            )
        sample_offset = _check.integer("sample_offset", self.sample_offset, 0, 2**32)
        return self._replace(**numbers, sample_offset=sample_offset)

    def check_with(self, *, has_critic: bool, may_remask: bool, order: Tensor | None) -> None:
        """Refuses scores and rules that do not go with one another, or with the wrapper."""
        if has_critic:
            for name in ("score", "factor", "entropy_bound"):
                value = getattr(self, name)
                if value is not None:
                    raise ValueError(
                        f"expected no {name}= with a critic, whose score is its own, received {value!r}; leave it out"
                    )
        if may_remask:
            for name in ("factor", "entropy_bound"):
                if getattr(self, name) is not None:
                    raise ValueError(f"expected no {name}= with can_mask_prev_unmasked=True; leave one out")
        self.judge(order, 0.0).checked()

    def judge(self, order: Tensor | None, noise: float) -> Judge:
        """Who judges where there is no critic, with noise of this scale where none is asked for."""
        score = "confidence" if self.score is None else self.score
        scale = noise if self.choice_temperature is None else self.choice_temperature
        return Judge(score if order is None else order, scale, self.threshold, self.factor, self.entropy_bound)

    @property
    def has_rule(self) -> bool:
        """Whether a step commits what is sure enough, rather than as many as the schedule says."""
        return any(rule is not None for rule in (self.threshold, self.factor, self.entropy_bound))

    def choice_noise(self, formulas: Formulas) -> float:
        """Scale of the noise on the score by default: none where not counts alone decide by the confidence, or all is
        greedy."""
        is_plain = self.score in (None, "confidence") and self.start_temperature > 0.0
        return formulas.choice_temperature if is_plain and not self.has_rule else 0.0

    def temperature(self, step: Step, formulas: Formulas) -> float:
        """The temperature of a step."""
        if self.end_temperature is None:
            return formulas.temperature(self.start_temperature, step.remaining)
        return self.start_temperature + (self.end_temperature - self.start_temperature) * step.progress

    def top_k(self, num_tokens: int) -> int | None:
        """How many logits filter_thres keeps; None for all."""
        return None if self.filter_thres is None else math.ceil((1 - self.filter_thres) * num_tokens)

    @property
    def critics_min_remask_key(self) -> float | None:
        """The remask key from which on a token is not sure enough, of a critic's logit."""
        if self.threshold is None:
            return None
        return remask_key_of_threshold(self.threshold) - remask_key_of_threshold(1.0 - self.threshold)


# Options that are numbers, from 0 on, and the largest they may be.
_NUMBERS = {
    "start_temperature": math.inf,
    "end_temperature": math.inf,
    "filter_thres": 1.0,
    "min_p": 1.0,
    "top_p": 1.0,
    "noise_level_scale": math.inf,
    "choice_temperature": math.inf,
    "threshold": 1.0,
    "factor": math.inf,
    "entropy_bound": math.inf,
    "cfg_scale": math.inf,
}


# The state


class State(NamedTuple):
    """All that a generation reads and writes on the device, but for the network's arguments.

    Written in place:
        ids, is_masked, log_probs: [B, N].
        row_indices: flat positions of what is masked, block by block, -1 where a place is free.

    Read:
        maskable: [B, N] bool; maskable_rows: its flat positions. order: [B, N] float32, the score; None for another.
        counts, commits, row_starts, windows: the plan's. seed: [] int64. forbidden: [V] bool or None. ends: [E]
        int64, ids that end a sequence; None for none.
    """

    ids: Tensor
    is_masked: Tensor
    log_probs: Tensor
    row_indices: Tensor
    maskable: Tensor
    maskable_rows: Tensor
    counts: Tensor
    commits: Tensor | None
    row_starts: Tensor
    windows: Tensor | None
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
    return State(
        ids=ids,
        is_masked=maskable.clone(),
        log_probs=torch.zeros(ids.shape, dtype=torch.float32, device=ids.device),
        row_indices=rows.clone(),
        maskable=maskable,
        maskable_rows=rows,
        counts=plan.counts,
        commits=plan.commits,
        row_starts=plan.row_starts,
        windows=plan.windows,
        seed=seed,
        forbidden=forbidden,
        order=order,
        ends=ends,
    )


def _first_rows(maskable: Tensor, plan: Plan) -> Tensor:
    """Flat positions of what is open in each block, at the places that it has in the list."""
    sizes = [part.num_rows[0] for part in plan.parts]
    if plan.windows is None:
        return torch.nonzero_static(maskable.flatten(), size=sum(sizes)).squeeze(-1)
    blocks = (maskable & is_inside(window, maskable) for window in plan.windows)
    return torch.cat(
        [torch.nonzero_static(x.flatten(), size=size).squeeze(-1) for x, size in zip(blocks, sizes, strict=True)]
    )


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

    By a rule a block ends when nothing in it is masked, where it ``may_stop``, and all of them once each sequence has
    an end. A GPU is asked a step later, so that the host waits for no work that it queued since.
    """
    stops = may_stop and not model.may_remask and (options.has_rule or state.ends is not None)
    asked: _Question | None = None
    for block in range(len(plan.parts)):
        condition = model.null_embed  # a block knows nothing of how long others took
        for number in range(plan.num_steps):
            through = block * plan.num_steps + number + 1
            step = plan.step(block, number)
            if step is None:
                if stops and options.has_rule and number > 0:
                    break  # as many steps as there are positions have run
                yield Done(through, False)
                continue
            sampled, next_condition = _propose(state, step, model, options, condition, inputs, generator)
            _remask(state, sampled, step, model, options, inputs)
            if state.ends is not None:
                _end(state, state.ends)
            num_masked = None if asked is None else asked.answer()
            if num_masked == _NOWHERE:
                return  # nothing was masked before this step: it changed nothing
            if num_masked == 0 and asked is not None and asked.block == block:
                break
            condition = next_condition
            if stops:
                asked = _Question(state, step)
                num_masked = None if state.ids.is_cuda else asked.answer()
                if num_masked == _NOWHERE:
                    yield Done(plan.total, True)
                    return
                if num_masked == 0:
                    yield Done((block + 1) * plan.num_steps, True)
                    break
            yield Done(through, True)


class Done(NamedTuple):
    """What a step leaves: how many of all are through, and whether it ran, or could not have changed anything."""

    through: int
    ran: bool


_NOWHERE = -1


class _Question:
    """How many positions of a step's block are masked; _NOWHERE if none of any is, since all sequences have ended."""

    def __init__(self, state: State, step: Step) -> None:
        self.block = step.block
        num_masked = (_listed_rows(state, step, step.num_rows_after) >= 0).sum()
        if state.ends is not None:
            num_masked = torch.where(state.is_masked.any(), num_masked, _NOWHERE)
        self._count = HostCount(num_masked)

    def answer(self) -> int | None:
        """The number, once the device has it."""
        return self._count.wait()


def past_end(state: State, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Which positions lie past the first end of their sequence, [B, N] bool, and that end's id, [B, 1].

    An end is one of these ids where nothing was given and nothing before is masked.
    """
    is_end = (state.ids[..., None] == ends).any(dim=-1) & state.maskable
    is_end &= state.is_masked.cumsum(dim=-1) == 0
    is_past = is_end.cumsum(dim=-1) > is_end.long()
    return is_past & state.maskable, state.ids.gather(1, is_end.byte().argmax(dim=-1, keepdim=True))


def _end(state: State, ends: Tensor) -> None:
    """Fills in what lies past the first end of a sequence with that end, and lists it no more."""
    if not state.ids.shape[1]:
        return
    is_past, end = past_end(state, ends)
    state.ids.copy_(end.where(is_past, state.ids))
    state.is_masked.logical_and_(~is_past)
    state.log_probs.masked_fill_(is_past, 0.0)
    is_over = is_past.flatten()[state.row_indices.clamp(min=0)] if len(state.row_indices) else state.row_indices < 0
    state.row_indices.masked_fill_(is_over, -1)


def _listed_rows(state: State, step: Step, size: int) -> Tensor:
    """The first places of the step's block in the list."""
    return state.row_indices[step.place : step.place + size]


def _propose(
    state: State,
    step: Step,
    model: Model,
    options: Options,
    condition: Tensor | None,
    inputs: Inputs,
    generator: torch.Generator | None,
) -> tuple[Sampled, Tensor | None]:
    """Fills in every masked position, and returns what was written and what conditions the next step.

    The logits are let go when it returns, before the critic or the network makes others.
    """
    rows, kept_ids = _listed_rows(state, step, step.num_rows), None
    if model.rescores_committed:
        rows = state.maskable_rows[step.place : step.place + step.num_open]
        kept_ids = state.ids.masked_fill(state.is_masked, -1).flatten()[rows]
    out = _network(model, state, rows, options, condition, inputs)
    sampled = _sample(out, rows, kept_ids, state, step, model, options, generator)
    return sampled, None if condition is None else out.embeddings


def _network(
    model: Model, state: State, rows: Tensor, options: Options, condition: Tensor | None, inputs: Inputs
) -> backbone.Output:
    """What the network says; with guidance, of these rows alone where its head is not linear."""
    out = _pass(model, state.ids, condition, inputs.arguments)
    if not options.cfg_scale:
        return out
    out = out.to_guide(rows)  # the other logits are let go before the second pass makes its own
    ids, arguments = state.ids, inputs.unconditional
    if arguments is None:
        ids, arguments = ids.where(state.maskable, model.mask_id), inputs.arguments
    return out.guided(_pass(model, ids, condition, arguments).to_guide(rows), options.cfg_scale)


def _pass(model: Model, ids: Tensor, condition: Tensor | None, arguments: dict[str, Any]) -> backbone.Output:
    if condition is None:
        return model.run(ids, **arguments)
    return model.run(ids, with_embeddings=True, **model.condition(condition), **arguments)


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
    """Samples every masked position, and finds the log-probability of each, and what else is scored."""
    sampled = options.judge(state.order, 0.0).room(state.ids, state.log_probs)
    sampling = Sampling(
        temperature=options.temperature(step, model.formulas),
        top_k=options.top_k(out.num_tokens),
        min_p=options.min_p,
        top_p=options.top_p,
        processed=options.processed,
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
    window = None if state.windows is None else state.windows[step.block]
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
    """The state after each step that ran, and when what was committed."""
    committed_at = torch.full_like(state.ids, -1, dtype=torch.int32)
    passes = torch.zeros(len(state.ids), dtype=torch.int64, device=state.ids.device)
    was_masked, number = state.is_masked.clone(), 0
    for done in steps:
        if not done.ran:
            continue
        committed_at.masked_fill_(was_masked & ~state.is_masked, number)
        committed_at.masked_fill_(state.is_masked, -1)  # it may be masked again
        if state.ends is not None:
            committed_at.masked_fill_(past_end(state, state.ends)[0], -1)
        passes += was_masked.any(dim=-1)
        yield GenerationStep(state.ids, state.is_masked, state.log_probs, committed_at, passes)
        was_masked.copy_(state.is_masked)
        number += 1


def replayed(owner: nn.Module, model: Model, state: State, plan: Plan, options: Options, inputs: Inputs) -> Tensor:
    """The ids after all steps, by one CUDA graph that lives as long as the module whose parameters it reads."""
    leaves, structure = tree_flatten((state, inputs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves)

    def function(inputs: list[Tensor]) -> list[Tensor]:
        given = iter(inputs)
        values = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        static_state, static_inputs = tree_unflatten(values, structure)
        for _ in run(model, static_state, plan, options, static_inputs, may_stop=False):
            pass
        return [static_state.ids]

    own = (model.mask_id, model.may_remask, model.null_embed is not None)
    key = (own, plan.num_steps, plan.parts, plan.always_runs, options, others, str(structure))
    return _cuda_graph.replay(owner, key, function, tensors)[0]
