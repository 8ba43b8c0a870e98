"""One generation: the plan, which the host makes beforehand; the state, which lies on the device; and the loop.

No step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastmask import _check, _cuda_graph, backbone, functional
from fastmask._devices import to_device
from fastmask._progress import Progress, track
from fastmask.critic import critic_logits
from fastmask.ops.judging import Judge, remask_key_of_threshold
from fastmask.records import Draws, Sampled, Sampling, Trajectory
from fastmask.schedules import Schedule
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
}


# The start


class Start(NamedTuple):
    """What a generation starts from.

    ids: [B, N] int64, mask_id where nothing is given. is_given: [B, N] bool. num_maskable: [B] int64 on the CPU, how
    many positions of each sequence are not given.
    """

    ids: Tensor
    is_given: Tensor
    num_maskable: Tensor


def start(
    batch_size: int | None,
    prompt: Tensor | None,
    prompt_mask: Tensor | None,
    length: int,
    mask_id: int,
    device: torch.device,
) -> Start:
    """The start from what ``generate`` was given; batch_size None takes the prompt's own, else 1."""
    if batch_size is not None:
        batch_size = _check.integer("batch_size", batch_size, 0)
    if prompt is None:
        if prompt_mask is not None:
            raise ValueError("expected prompt_mask with prompt, received it alone; give both")
        return _all_masked(1 if batch_size is None else batch_size, length, mask_id, device)
    _check_prompt(prompt, prompt_mask, length)
    rows = batch_size
    if rows is None:
        rows = 1 if prompt.ndim == 1 else len(prompt)
    if prompt.ndim == 1:
        prompt = prompt.expand(rows, -1)
        prompt_mask = None if prompt_mask is None else prompt_mask.expand(rows, -1)
    _check.shape("prompt", prompt, [rows, prompt.shape[1]], "B, P")
    return _prompted(prompt, prompt_mask, length, mask_id, device)


def _check_prompt(prompt: Tensor, prompt_mask: Tensor | None, length: int) -> None:
    _check.tensor("prompt", prompt, _check.INTEGER)
    if prompt.ndim not in (1, 2):
        raise ValueError(f"expected prompt [P] or [B, P], received shape {list(prompt.shape)}")
    size = prompt.shape[-1]
    if prompt_mask is None:
        if size >= length:
            raise ValueError(
                "expected a prompt without prompt_mask, which is a prefix, shorter than seq_len = "
                f"{length}, received {size} positions; say what is given with prompt_mask=, or shorten it"
            )
        return
    _check.tensor("prompt_mask", prompt_mask, [torch.bool])
    _check.shape("prompt_mask", prompt_mask, prompt.shape, "as prompt")
    if size > length:
        raise ValueError(f"expected prompt of at most seq_len = {length} positions, received {size}; cut it")


def _all_masked(batch_size: int, length: int, mask_id: int, device: torch.device) -> Start:
    ids = torch.full((batch_size, length), mask_id, dtype=torch.int64, device=device)
    return Start(ids, torch.zeros_like(ids, dtype=torch.bool), torch.full((batch_size,), length, device="cpu"))


def _prompted(prompt: Tensor, prompt_mask: Tensor | None, length: int, mask_id: int, device: torch.device) -> Start:
    """A prompt [B, P] at the beginning of sequences that are open after it."""
    rows, size = prompt.shape
    num_open = torch.full((rows,), length - size, device="cpu")
    ids, is_given, _ = _all_masked(rows, length, mask_id, device)
    if prompt_mask is None:
        ids[:, :size], is_given[:, :size] = to_device(prompt, device), True
        return Start(ids, is_given, num_open)
    num_open += (~prompt_mask).sum(dim=-1).cpu()  # the one wait for a device, if the prompt is on one
    is_given[:, :size] = to_device(prompt_mask, device)
    ids[:, :size] = to_device(prompt, device).long().where(is_given[:, :size], mask_id)
    return Start(ids, is_given, num_open)


def as_order(order: Tensor, ids: Tensor) -> Tensor:
    """A score of one's own [B, N], or [N] for all sequences, float32, on the device of the ids [B, N]."""
    _check.tensor("score", order, _check.FLOATING)
    _check.shape("score", order if order.ndim == 2 else order.expand(ids.shape), ids.shape, "B, N")
    return to_device(order, ids.device).float().expand(ids.shape).contiguous()


# The plan


class Step(NamedTuple):
    """One step of a plan.

    number: from 0. row: of the plan's tensors. remaining: the share of steps that follow. progress: from 0 in the
    first step to 1 in the last. num_rows, num_rows_after: the places in the list of masked positions before the step
    and after it.
    """

    number: int
    row: int
    remaining: float
    progress: float
    num_rows: int
    num_rows_after: int


class Plan(NamedTuple):
    """The steps that can change anything, of so many in total, with what they need on the device.

    counts: [R, B] int64, how many positions of each sequence stay masked at most, after each of these R steps.
    row_starts: [R, B + 1] int64, where in the list of masked positions after it those of each sequence begin.
    """

    total: int
    steps: tuple[Step, ...]
    counts: Tensor
    row_starts: Tensor


def plan(
    schedule: Schedule,
    formulas: Formulas,
    steps: int,
    num_maskable: Tensor,
    device: torch.device,
    *,
    may_remask: bool,
    by_rule: bool,
    always_runs: bool,
    num_places: int | None = None,
) -> Plan:
    """The steps of a generation.

    Args:
        num_maskable: [B] int64 on the CPU.
        may_remask: whether what is committed may be masked again.
        by_rule: whether a step commits one position at least and as many as it likes, rather than as the
            schedule says.
        always_runs: whether even a step that commits nothing can change what follows.
        num_places: a number that no element of num_maskable exceeds: the plan's steps then depend on it alone.
    """
    sizes, columns = num_maskable.unique(return_inverse=True)  # sequences of one size have the same counts
    counts = _counts(schedule, formulas, steps, may_remask, by_rule)

    def changes(size: int) -> Changes:
        return _changes(partial(counts, size), size, steps, falls=by_rule or not may_remask)

    own = [changes(size) for size in sizes.tolist()]
    places = own if num_places is None else [changes(num_places)] * len(own)
    numbers = _running(places, always_runs or num_places is not None)
    after = _table(places, numbers, columns)
    num_after = after.sum(dim=-1).tolist()
    # No step that is left out changes anything.
    num_before = [sum(int(places[column].values[0]) for column in columns.tolist()), *num_after[:-1]]
    row_starts = after.new_zeros(len(numbers), len(columns) + 1)
    torch.cumsum(after, dim=-1, out=row_starts[:, 1:])
    rows = zip(numbers.tolist(), num_before, num_after, strict=False)
    return Plan(
        steps,
        tuple(
            Step(number, row, (steps - 1 - number) / steps, number / max(1, steps - 1), *num_rows)
            for row, (number, *num_rows) in enumerate(rows)
        ),
        to_device(after if num_places is None else _table(own, numbers, columns), device),
        to_device(row_starts, device),
    )


def places_for_any_prompt(num_maskable: Tensor, length: int) -> int:
    """The most open positions, rounded up to an eighth of the length: so many shapes of plans serve all prompts."""
    most = int(num_maskable.max()) if len(num_maskable) else 0
    eighth = math.ceil(length / 8)
    return min(length, math.ceil(most / eighth) * eighth)


def _counts(
    schedule: Schedule, formulas: Formulas, steps: int, may_remask: bool, by_rule: bool
) -> Callable[[int, Tensor], Tensor]:
    """How many positions of a sequence of some size stay masked at most after the steps of some numbers."""
    if by_rule:
        return lambda size, numbers: (size - 1 - numbers).clamp(min=0).where(numbers < steps - 1, 0)
    ratios = formulas.step_ratios(schedule, steps)
    if not may_remask:  # what is committed stays committed
        ratios = ratios.nan_to_num(0.0).cummin(dim=0).values
    return lambda size, numbers: formulas.num_remaining(ratios[numbers], size).where(numbers < steps - 1, 0)


# So many steps are passed over at once where nothing changes: of a million with 1024 changes least is computed.
_STRIDE = 64


class Changes(NamedTuple):
    """When the number of masked positions of a sequence changes, in few words even of a million steps.

    numbers: [K] int64, of the steps that change it. values: [K + 1] int64, the number before them and after each.
    """

    numbers: Tensor
    values: Tensor

    def after(self, numbers: Tensor) -> Tensor:
        """How many are masked after the steps of these numbers."""
        return self.values[torch.searchsorted(self.numbers, numbers, right=True)]


def _changes(counts: Callable[[Tensor], Tensor], size: int, steps: int, falls: bool) -> Changes:
    """Of counts after steps, from a size on; those that fall are computed only near where they do."""
    numbers = torch.arange(0, steps, _STRIDE if falls else 1, device="cpu")
    if falls:
        ends = torch.cat([numbers, numbers.new_tensor([steps - 1])])
        differ = counts(ends).diff() != 0
        near = numbers[differ][:, None] + torch.arange(1, _STRIDE + 1, device="cpu")
        numbers = torch.cat([numbers[:1], near.flatten().clamp(max=steps - 1)])
    after = counts(numbers)
    changed = after != torch.cat([after.new_tensor([size]), after[:-1]])
    return Changes(numbers[changed], torch.cat([after.new_tensor([size]), after[changed]]))


def _running(changes: list[Changes], always_runs: bool) -> Tensor:
    """Numbers of the steps that can change anything, [R] int64, in order."""
    numbers = torch.cat([torch.empty(0, dtype=torch.int64, device="cpu"), *(each.numbers for each in changes)])
    if not always_runs:  # a step that commits nothing changes nothing, unless the next one is conditioned on it
        return numbers.unique()
    return torch.arange(int(numbers.max()) + 1 if len(numbers) else 0, device="cpu")  # the last change is to 0


def _table(changes: list[Changes], numbers: Tensor, columns: Tensor) -> Tensor:
    """Masked positions after steps, [R, B], of sequences with the changes in these columns [B]."""
    if not changes:
        return torch.zeros(len(numbers), 0, dtype=torch.int64, device="cpu")
    return torch.stack([each.after(numbers) for each in changes], dim=-1)[:, columns]


# The state


class State(NamedTuple):
    """All that a generation reads and writes on the device, but for the network's arguments.

    Written in place:
        ids, is_masked, log_probs: [B, N].
        row_indices: flat positions of what is masked, -1 where a place is free.

    Read:
        maskable: [B, N] bool; maskable_rows: its flat positions. order: [B, N] float32, the score; None for another.
        counts, row_starts: the plan's. seed: [] int64. forbidden: [V] bool or None.
    """

    ids: Tensor
    is_masked: Tensor
    log_probs: Tensor
    row_indices: Tensor
    maskable: Tensor
    maskable_rows: Tensor
    counts: Tensor
    row_starts: Tensor
    seed: Tensor
    forbidden: Tensor | None
    order: Tensor | None


def first_state(
    start: Start, plan: Plan, seed: Tensor, forbidden: Tensor | None, order: Tensor | None = None
) -> State:
    """The state before the first step."""
    ids, maskable = start.ids.contiguous(), (~start.is_given).contiguous()
    size = plan.steps[0].num_rows if plan.steps else 0
    rows = torch.nonzero_static(maskable.flatten(), size=size).squeeze(-1)
    return State(
        ids=ids,
        is_masked=maskable.clone(),
        log_probs=torch.zeros(ids.shape, dtype=torch.float32, device=ids.device),
        row_indices=rows.clone(),
        maskable=maskable,
        maskable_rows=rows,
        counts=plan.counts,
        row_starts=plan.row_starts,
        seed=seed,
        forbidden=forbidden,
        order=order,
    )


# The loop


def run(
    model: Model,
    state: State,
    plan: Plan,
    options: Options,
    arguments: dict[str, Any],
    generator: torch.Generator | None = None,
) -> Iterator[None]:
    """Runs the steps on the state, and yields after each of all; ``arguments`` are the network's."""
    condition = model.null_embed
    running = {step.number: step for step in plan.steps}
    for number in range(plan.total):
        if number in running:
            step = running[number]
            sampled, condition = _propose(state, step, model, options, condition, arguments, generator)
            _remask(state, sampled, step, model, options, arguments)
        yield


def _propose(
    state: State,
    step: Step,
    model: Model,
    options: Options,
    condition: Tensor | None,
    arguments: dict[str, Any],
    generator: torch.Generator | None,
) -> tuple[Sampled, Tensor | None]:
    """Fills in every masked position, and returns what was written and what conditions the next step.

    The logits are let go when it returns, before the critic or the network makes others.
    """
    out = _network(model, state, condition, arguments)
    sampled = _sample(out, state, step, model, options, generator)
    return sampled, None if condition is None else out.embeddings


def _network(model: Model, state: State, condition: Tensor | None, arguments: dict[str, Any]) -> backbone.Output:
    if condition is None:
        return model.run(state.ids, **arguments)
    return model.run(state.ids, with_embeddings=True, **model.condition(condition), **arguments)


def _sample(
    out: backbone.Output,
    state: State,
    step: Step,
    model: Model,
    options: Options,
    generator: torch.Generator | None,
) -> Sampled:
    """Samples every masked position, and finds the log-probability of each, and what else is scored."""
    rows, kept_ids = state.row_indices[: step.num_rows], None
    if model.rescores_committed:
        rows = state.maskable_rows
        kept_ids = state.ids.masked_fill(state.is_masked, -1).flatten()[rows]
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


def _remask(
    state: State, sampled: Sampled, step: Step, model: Model, options: Options, arguments: dict[str, Any]
) -> None:
    """Masks again what deserves it most, and lists it."""
    if model.critic is None:
        judge = options.judge(state.order, options.choice_noise(model.formulas))
        judged = judge.remasking(sampled, step.remaining)
    else:
        judged = {
            "values": critic_logits(model.critic, state.ids, model.formulas.critic_arguments(arguments)),
            "is_confidence": False,
            "noise_scale": options.noise_level_scale * step.remaining,
            "min_remask_key": options.critics_min_remask_key,
        }
    functional.remask_(
        state.ids,
        state.is_masked,
        state.row_indices[: step.num_rows_after],
        state.row_starts[step.row],
        counts=state.counts[step.row],
        mask_id=model.mask_id,
        eligible=state.maskable if model.may_remask else None,
        **judged,
        **_draws(state, step, options)._asdict(),
    )


def _draws(state: State, step: Step, options: Options) -> Draws:
    return Draws(state.seed, options.sample_offset, step.number)


# Ways to run it


def watched(steps: Iterator[None], total: int, progress: Progress) -> None:
    """Runs all the steps, and reports each."""
    for _ in track(total, progress, "demasking"):
        next(steps)


def recorded(steps: Iterator[None], state: State, total: int, progress: Progress) -> Trajectory:
    """Runs all the steps, reports each, and keeps the state after it."""
    states = []
    for _ in track(total, progress, "demasking"):
        next(steps)
        states.append(Trajectory(state.ids.clone(), state.is_masked.clone(), state.log_probs.clone()))
    return Trajectory(*(torch.stack(values) for values in zip(*states, strict=True)))


def replayed(
    owner: nn.Module, model: Model, state: State, plan: Plan, options: Options, arguments: dict[str, Any]
) -> Tensor:
    """The ids after all steps, by one CUDA graph that lives as long as the module whose parameters it reads."""
    leaves, structure = tree_flatten((state, arguments))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = tuple(Tensor if isinstance(leaf, Tensor) else leaf for leaf in leaves)

    def function(inputs: list[Tensor]) -> list[Tensor]:
        given = iter(inputs)
        values = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        static_state, static_arguments = tree_unflatten(values, structure)
        for _ in run(model, static_state, plan, options, static_arguments):
            pass
        return [static_state.ids]

    own = (model.mask_id, model.may_remask, model.null_embed is not None)
    key = (own, plan.steps, options, others, str(structure))
    return _cuda_graph.replay(owner, key, function, tensors)[0]
