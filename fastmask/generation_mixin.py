"""``generate``: what it accepts, refuses and promises, of a network that proposes ids and perhaps a critic."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from fastmask import _check, _names, _progress, backbone, functional, generation, passes, planning, upstream
from fastmask._devices import to_device
from fastmask._modes import evaluating
from fastmask._progress import Progress
from fastmask.generation_options import Options
from fastmask.heads import Heads
from fastmask.ops.sample_tokens import as_forbidden
from fastmask.records import GenerationStep, Trajectory
from fastmask.schedules import Schedule, as_schedule

_EDITING_STEPS = 16  # LLaDA2.1's


class _Prepared(NamedTuple):
    """All that a generation needs. is_single: whether it returns one sequence without batch dimension."""

    model: passes.Model
    state: generation.State
    plan: planning.Plan
    options: Options
    inputs: passes.Inputs
    generator: torch.Generator | None
    is_single: bool


class GenerationMixin(nn.Module):
    """The generating half of :class:`fastmask.NonAutoregressiveWrapper`, which sets what stands here."""

    net: Any
    num_tokens: int
    max_seq_len: int
    mask_id: int
    steps: int
    schedule_fn: Any
    can_mask_prev_unmasked: bool
    self_cond: bool
    token_critic: Any
    null_embed: nn.Parameter
    to_self_cond: nn.Linear
    _heads: Heads

    @property
    def _schedule(self) -> Schedule:
        return as_schedule(self.schedule_fn)

    @property
    def _formulas(self) -> upstream.Formulas:
        """fastmask's or x-transformers', which the wrapper chooses."""
        raise NotImplementedError

    def _run(self, formulas: upstream.Formulas, ids: Tensor, **arguments: Any) -> backbone.Output:
        """The network on ids [B, N], for the ids there are."""
        out = backbone.run(self.net, self._heads, ids, **arguments)
        return formulas.of_tokens(out, self.net, self.num_tokens, self.mask_id)

    def _condition(self, embeddings: Tensor | None) -> dict[str, Any]:
        """The network's argument that conditions it on embeddings [B, N, D] or [D]."""
        return {} if embeddings is None else {"sum_embeds": self.to_self_cond(embeddings)}

    @overload
    def generate(
        self, batch_size: int | None = None, start_temperature: float | Tensor = 1.0,
        filter_thres: float | Tensor | None = 0.7, noise_level_scale: float = 1.0, *,
        return_trajectory: Literal[False] = False, **options: Any,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def generate(
        self, batch_size: int | None = None, start_temperature: float | Tensor = 1.0,
        filter_thres: float | Tensor | None = 0.7, noise_level_scale: float = 1.0, *,
        return_trajectory: Literal[True], **options: Any,
    ) -> tuple[Tensor, Trajectory]: ...  # fmt: skip

    @overload
    def generate(
        self, batch_size: int | None = None, start_temperature: float | Tensor = 1.0,
        filter_thres: float | Tensor | None = 0.7, noise_level_scale: float = 1.0, *,
        return_trajectory: bool, **options: Any,
    ) -> Tensor | tuple[Tensor, Trajectory]: ...  # fmt: skip

    @torch.no_grad()
    def generate(
        self,
        batch_size: int | None = None,
        start_temperature: float | Tensor = 1.0,
        filter_thres: float | Tensor | None = 0.7,
        noise_level_scale: float = 1.0,
        *,
        end_temperature: float | Tensor | None = None,
        min_p: float | Tensor | None = None,
        top_p: float | Tensor | None = None,
        processed: bool = False,
        forbidden: Tensor | Sequence[int] | None = None,
        score: str | Tensor | None = None,
        choice_temperature: float | None = None,
        commits: int | Sequence[int] | Tensor | Callable[[int, int], Sequence[int]] | None = None,
        threshold: float | None = None,
        factor: float | None = None,
        entropy_bound: float | None = None,
        editing_threshold: float | None = None,
        editing_steps: int = _EDITING_STEPS,
        cfg_scale: float | None = None,
        unconditional: dict[str, Any] | None = None,
        seq_len: int | None = None,
        prompt: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        block_length: int | None = None,
        block_origin: str = "prompt",
        cache: bool | str | None = None,
        eos_id: int | Sequence[int] | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        sample_offset: int = 0,
        progress: Progress = None,
        return_trajectory: bool = False,
        cuda_graph: bool | None = None,
        **kwargs: Any,
    ) -> Tensor | tuple[Tensor, Trajectory]:
        """Generates sequences, or fills in the positions that a prompt leaves open.

        ========= =================================== ==============================================
        For       give                                other libraries call it
        ========= =================================== ==============================================
        diversity higher choice_temperature,          alg_temp, r_temp; temperature
                  start_temperature
        quality   more steps; lower                   num_steps, num_inference_steps, timesteps;
                  start_temperature, top_p,           temperature, top_p, top_k
                  higher filter_thres, min_p
        order     score                               alg, remasking, remasking_strategy
        speed     fewer steps, threshold, factor,     num_steps; confidence_threshold, gamma
                  entropy_bound; cuda_graph
        blocks    block_length, block_origin,         block_size; num_transfer_tokens; use_cache
                  commits, cache
        editing   editing_threshold, editing_steps    edit_threshold; max_post_steps
        guidance  cfg_scale, unconditional            guidance_scale; negative_prompt
        ========= =================================== ==============================================

        Args:
            batch_size: B; None for one sequence without batch dimension (or the prompt's own).
            start_temperature: annealed linearly to 0 (floor 1e-3); 0 takes the likeliest id in every step. This,
                end_temperature, filter_thres, min_p and top_p may be [B] floating point, one for each sequence, whose
                values nothing reads beforehand (filter_thres of fewer than 64 bits is taken to 6 decimals); what
                changes nothing is 1 for top_p, 0 for filter_thres and min_p.
            end_temperature: what it is annealed to, linearly; given the same, it stays.
            filter_thres: keeps the ceil((1 - filter_thres) V) largest logits; None keeps all.
            noise_level_scale: scale of the annealed Gumbel noise on the critic's scores.
            min_p: of those, keeps the ids at least so many times as likely as the likeliest; None keeps all.
            top_p: of those, keeps the nucleus of this probability; None keeps all.
            processed: whether min_p, top_p and the figures that are scored are of softmax(z / T), rather than of
                softmax(z). With end_temperature, since all would be 1 as T falls to 0.
            forbidden: [V] bool, True at more ids that are never sampled beside mask_id; or a sequence of those ids.
            score: what is committed first: "confidence", the highest log p, the default without a critic (with one
                it is the critic's, and no other may be given); "margin", the likeliest id the furthest ahead of the
                next; "entropy", the lowest; "random"; or [B, N] or [N] floating point, the highest of it, as of an
                order its negative (``-torch.arange(N).float()`` for left to right).
            choice_temperature: scale of the annealed Gumbel noise on the score, without a critic; 0 commits the
                surest first and tends to one mode. None is 4.5, MaskGIT's, where counts alone decide how many are
                committed (no rule, no commits), by the confidence, and start_temperature is above 0; else, and with
                compat, 0. Of start_temperature [B] all count as above 0.
            commits: how many positions of a sequence each step commits at least, in place of the schedule's counts:
                one number; [steps], or [steps, B] for each sequence by itself; or a function of how many positions
                of the block are open and the number of steps, that returns [steps] (``schedules.even_split``). The
                last step commits everything.
            threshold: a rule, in [0, 1]: in place of the schedule's counts every step commits all tokens whose
                confidence (their probability; with a critic, that of being right), or margin, is above it, or whose
                entropy in nats is below it, and one of each sequence, or ``commits``, at least; the last step commits
                everything. The noise has no part in it. Generation ends when nothing is masked. With
                can_mask_prev_unmasked a step masks again what is not above it (a token that the filter leaves out
                has probability 0), and all steps run.
            factor: f >= 0, a rule likewise, of the confidence: the surest n are committed, for the largest n whose
                least sure one has a probability of at least 1 - f / (n + 1).
            entropy_bound: nats, a rule likewise, of the entropy: the surest are committed, as many as have entropies
                that sum to at most this without the last.
            editing_threshold: each step also overwrites those ids committed in its block, not the given ones, for
                which another is proposed whose probability is above this; in [0, 1]. None keeps what is committed.
                Not with can_mask_prev_unmasked.
            editing_steps: the most steps that only edit, of each sequence in each block, after the one that commits
                the last of it. They end with the first that changes nothing, and with an ``eos_id``.
            cfg_scale: w of classifier-free guidance, two passes a step: logits (1 + w) z - w z_u; None for none.
            unconditional: the network's arguments of the second pass, all of them; by default the same, and the
                prompt is masked there.
            seq_len: N, from 1 to max_seq_len; default max_seq_len.
            prompt: [P] or [B, P] int32|int64, the first P positions. Alone it is a prefix, all of it given, of
                P < N; with
            prompt_mask: likewise bool, P up to N, True where the prompt's id is given. What follows is open. A
                given id is never changed, even if it equals mask_id.
            block_length: decodes so many positions after the other, each block by itself: steps, commits and the
                schedule's counts are of a block, and temperature and noise are annealed anew. None for one block.
            block_origin: where blocks begin: "prompt", at the first position of a sequence that is open; "zero", at
                multiples of block_length.
            cache: None: where the network's attention is block-causal and it offers a cache, a step of a block runs
                that block alone, and the ids are those without; with a critic or self-conditioning whole sequences
                are run, as with False. True refuses where that would be so. "prefix" is Fast-dLLM's, for a network
                that sees both sides, and approximate: what precedes a block is seen as it was when the block began
                (docs/caches.md).
            eos_id: id or ids that end a sequence, once one is committed where nothing was given and nothing before it
                is masked: what follows, but what is given, gets that id (log_probs 0). Generation ends when all
                sequences have an end.
            steps: of a block; default the wrapper's own or, with a rule that masks nothing again, as many as it is
                long.
            generator: default torch's own of the network's device.
            sample_offset: global index of the first sequence: a batch may be split without changing it.
            progress: True for a tqdm bar (nothing without tqdm), or a callable ``progress(done, total)``.
            return_trajectory: also return every step, of all blocks; by a rule, with edits or with eos_id, until
                nothing is left to do.
            cuda_graph: None is False, until a GPU has shown where it is faster. True: capture the whole loop once for
                each batch, number of steps and set of options (and, to an eighth of N, the most positions that a
                prompt leaves open), then replay it, with fresh randomness and new prompts; all steps run, by a rule
                too. The network then sees no Python: it must not branch on values. Where it cannot be captured a
                warning says why and the loop runs as usual. Each ``sample_offset`` is a graph of its own, each number
                of blocks and, with a cache, each length of the longest prompt.
            kwargs: passed to the network and to the critic.

        Returns:
            ids [B, N] int64 ([N] for one sequence); with ``return_trajectory`` (ids, Trajectory).

        Raises:
            TypeError, ValueError: arguments that do not fit; names near to one of these, or other libraries' for
                them, that the network does not have in its forward.

        Randomness: one seed of the generator.

        Source: MaskGIT (https://arxiv.org/abs/2202.04200, section 3.2); threshold and factor: Fast-dLLM
        (https://arxiv.org/abs/2505.22618, section 3.3; its cache: 3.2); margin and entropy: Dream
        (https://arxiv.org/abs/2508.15487); entropy_bound: EB-Sampler (https://arxiv.org/abs/2505.24857, algorithm 1);
        blocks and guidance: LLaDA (https://arxiv.org/abs/2502.09992); editing: LLaDA2.1
        (https://arxiv.org/abs/2602.08676).
        """
        prepared = self._prepared(
            batch_size=batch_size, start_temperature=start_temperature, filter_thres=filter_thres,
            noise_level_scale=noise_level_scale, end_temperature=end_temperature, min_p=min_p, top_p=top_p,
            processed=processed, forbidden=forbidden, score=score, choice_temperature=choice_temperature,
            commits=commits, threshold=threshold, factor=factor, entropy_bound=entropy_bound,
            editing_threshold=editing_threshold, editing_steps=editing_steps, cfg_scale=cfg_scale,
            unconditional=unconditional, seq_len=seq_len, prompt=prompt, prompt_mask=prompt_mask,
            block_length=block_length, block_origin=block_origin, cache=cache, eos_id=eos_id, steps=steps,
            generator=generator, sample_offset=sample_offset, progress=progress,
            return_trajectory=return_trajectory, cuda_graph=cuda_graph, kwargs=kwargs,
        )  # fmt: skip
        state, trajectory = prepared.state, None
        ids = state.ids
        with evaluating(self):
            if cuda_graph and any(part.numbers for part in prepared.plan.parts):
                ids = generation.replayed(
                    self, prepared.model, state, prepared.plan, prepared.options, prepared.inputs
                )
            else:
                steps_of_all = generation.watched(self._run_steps(prepared), prepared.plan.total, progress)
                if return_trajectory:
                    trajectory = generation.recorded(steps_of_all, state)
                else:
                    for _ in steps_of_all:
                        pass
        ids = ids[0] if prepared.is_single else ids
        return ids if trajectory is None else (ids, trajectory)

    def generate_steps(self, *arguments: Any, **options: Any) -> Iterator[GenerationStep]:
        """:meth:`generate` as an iterator: its state after each pass of the network, to stream or to stop at will.

        ``for step in model.generate_steps(prompt=prompt): print(step.ids)``. The tensors are views, which the next
        step overwrites. Closing the iterator (``break`` in a loop does) restores the modules' modes. Where nothing is
        open it yields nothing.

        Args:
            arguments, options: as of :meth:`generate`, but for progress, return_trajectory and cuda_graph. One
                sequence has a batch dimension here.

        Returns:
            An iterator of GenerationStep.

        Raises:
            TypeError, ValueError: as :meth:`generate`, before the first step.

        Randomness: as :meth:`generate`, the same ids from the same generator.
        """
        for name in ("progress", "return_trajectory", "cuda_graph"):
            if name in options:
                raise TypeError(f"expected no {name}= in generate_steps, which yields every step; leave it out")
        bound = _GENERATE.bind(self, *arguments, **options)
        bound.apply_defaults()
        given = dict(bound.arguments)
        del given["self"]
        return self._stepped(self._prepared(**given))

    @torch.no_grad()
    def _stepped(self, prepared: _Prepared) -> Iterator[GenerationStep]:
        with evaluating(self):
            yield from generation.followed(self._run_steps(prepared), prepared.state)

    def _run_steps(self, prepared: _Prepared) -> Iterator[generation.Done]:
        model, state, plan, options, inputs, generator, _ = prepared
        return generation.run(model, state, plan, options, inputs, generator)

    @torch.no_grad()
    def _prepared(
        self,
        *,
        batch_size: int | None,
        forbidden: Tensor | Sequence[int] | None,
        score: str | Tensor | None,
        commits: Any,
        unconditional: dict[str, Any] | None,
        seq_len: int | None,
        prompt: Tensor | None,
        prompt_mask: Tensor | None,
        block_length: int | None,
        block_origin: str,
        cache: bool | str | None,
        editing_steps: int,
        eos_id: int | Sequence[int] | None,
        steps: int | None,
        generator: torch.Generator | None,
        progress: Progress,
        return_trajectory: bool,
        cuda_graph: bool | None,
        kwargs: dict[str, Any],
        **numbers: Any,
    ) -> _Prepared:
        """Checks what ``generate`` was given, and makes its start, plan and state."""
        _names.refuse(kwargs, self.net, GenerationMixin.generate)
        _check.flag("return_trajectory", return_trajectory)
        if cuda_graph is not None:
            _check.flag("cuda_graph", cuda_graph)
        self._formulas.check_options(
            **{**numbers, "processed": numbers["processed"] or None},
            editing_steps=None if editing_steps == _EDITING_STEPS else editing_steps,
            forbidden=forbidden,
            score=score,
            commits=commits,
            block_length=block_length,
            cache=cache or None,
            eos_id=eos_id,
            cuda_graph=cuda_graph or None,
        )
        order = score if isinstance(score, Tensor) else None
        if commits is not None and numbers["choice_temperature"] is None:
            numbers["choice_temperature"] = 0.0  # the noise is of the schedule's counts
        options = Options(score="order" if isinstance(score, Tensor) else score, **numbers).checked()
        options.check_with(
            has_critic=self.token_critic is not None, may_remask=self.can_mask_prev_unmasked, order=order
        )
        _progress.check(progress)
        length = _check.integer("seq_len", self.max_seq_len if seq_len is None else seq_len, 1, self.max_seq_len + 1)
        if cuda_graph and (progress or return_trajectory):
            raise ValueError(
                "expected cuda_graph=True without progress= and return_trajectory=: a graph runs all steps at once; "
                "leave one out"
            )
        self._check_guidance(options.cfg_scale, unconditional, prompt)
        editing_steps = _check.integer("editing_steps", editing_steps, 1, 2**24)
        if not options.edits and editing_steps != _EDITING_STEPS:
            raise ValueError(
                f"expected editing_threshold= with editing_steps={editing_steps}, received None; give both"
            )
        device = backbone.device_of(self.net)
        start = planning.start(batch_size, prompt, prompt_mask, length, self.mask_id, self.num_tokens, device)
        blocks = planning.blocks(start, block_length, block_origin)
        options = options.of_batch(len(start.ids), device)
        pace = self._pace(
            steps, commits, options.has_rule, len(start.ids), length, block_length,
            editing_steps if options.edits else 0,
        )  # fmt: skip
        places = None
        if cuda_graph and prompt is not None:
            places = planning.places_for_any_prompt(blocks, length)
        plan = planning.plan(pace, blocks, device, places)
        state = generation.first_state(
            start,
            plan,
            functional.draw_seed(device, generator),
            as_forbidden(forbidden, self.num_tokens, device, self.mask_id),
            None if order is None else planning.as_order(order, start.ids),
            self._as_ends(eos_id, device),
        )
        is_single = batch_size is None and (prompt is None or prompt.ndim == 1)
        start_cache = passes.chosen_cache(
            self.net,
            cache,
            block_length,
            conditions_itself=self.self_cond,
            has_critic=self.token_critic is not None,
        )
        model = self._model(start_cache)
        return _Prepared(model, state, plan, options, passes.Inputs(kwargs, unconditional), generator, is_single)

    def _as_ends(self, eos_id: int | Sequence[int] | None, device: torch.device) -> Tensor | None:
        if eos_id is None:
            return None
        if self.can_mask_prev_unmasked:
            raise ValueError("expected no eos_id= with can_mask_prev_unmasked=True, received both; leave one out")
        if isinstance(eos_id, Tensor):
            raise TypeError(
                "expected eos_id as an int or a sequence of ints, received a tensor; give eos_id.tolist()"
            )
        ids = list(eos_id) if isinstance(eos_id, Sequence) else [eos_id]
        if not ids:
            raise ValueError("expected eos_id of at least one id, received none; leave it out")
        ids = [_check.integer("eos_id", each, 0, self.num_tokens) for each in ids]
        if self.mask_id in ids:
            raise ValueError(f"expected eos_id other than mask_id, received {self.mask_id}, which is never sampled")
        return to_device(torch.tensor(ids, dtype=torch.int64, device="cpu"), device)

    def _check_guidance(
        self, cfg_scale: float | None, unconditional: dict[str, Any] | None, prompt: Tensor | None
    ) -> None:
        if cfg_scale is None and unconditional is not None:
            raise ValueError("expected cfg_scale= with unconditional=, received None; say how much guidance")
        if unconditional is not None:
            if not isinstance(unconditional, dict):
                raise TypeError(
                    "expected unconditional to be a dict of the network's arguments, received "
                    f"{type(unconditional).__name__}"
                )
            _names.refuse(unconditional, self.net, GenerationMixin.generate)
        elif cfg_scale and prompt is None:
            raise ValueError(
                "expected unconditional= or a prompt with cfg_scale=, received neither; give the network's arguments "
                "of the unconditional pass, whose prompt is masked by default"
            )

    def _pace(
        self,
        steps: int | None,
        commits: Any,
        by_rule: bool,
        batch: int,
        length: int,
        block_length: int | None,
        editing_steps: int = 0,
    ) -> planning.Pace:
        may_remask = self.can_mask_prev_unmasked
        if steps is None:  # by a rule as many as a block could need, whatever is open
            steps = min(length, block_length or length) if by_rule and not may_remask else self.steps
        steps = _check.integer("steps", steps, 1, 2**24)
        if commits is not None and may_remask:
            raise ValueError("expected no commits= with can_mask_prev_unmasked=True, received both; leave one out")
        return planning.Pace(
            self._schedule,
            self._formulas,
            steps,
            planning.Commits.checked(commits, steps, batch),
            may_remask=may_remask,
            by_rule=by_rule,
            always_runs=self.self_cond or may_remask or editing_steps > 0,
            editing_steps=editing_steps,
        )

    def _model(self, start_cache: Callable[[int], Any] | None) -> passes.Model:
        return passes.Model(
            run=partial(self._run, self._formulas),
            critic=self.token_critic,
            condition=self._condition,
            null_embed=self.null_embed if self.self_cond else None,
            mask_id=self.mask_id,
            may_remask=self.can_mask_prev_unmasked,
            formulas=self._formulas,
            is_block_causal=passes.is_block_causal(self.net),
            start_cache=start_cache,
        )


_GENERATE = inspect.signature(GenerationMixin.generate)
