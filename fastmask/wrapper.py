"""NonAutoregressiveWrapper: the training objective of masked-token models, and generation."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastmask import _check, _cuda_graph, backbone, compat, functional
from fastmask._copies import moved
from fastmask._generation import Plan, Step
from fastmask._generation import plan as make_plan
from fastmask._host_count import HostCount
from fastmask._progress import Progress, track
from fastmask.critic import SelfCritic, critic_logits, critic_loss
from fastmask.functional import MaskedTokens, Sampled
from fastmask.schedules import Schedule, TensorFn, as_schedule

# Upstream's floors: temperature never reaches 0, neither in generate nor in the critic's training sample.
MIN_TEMPERATURE = 1e-3
MIN_CRITIC_TEMPERATURE = 1e-10


class Losses(NamedTuple):
    """Scalars, float32, nats: what to call backward on, and its two parts (None where not computed)."""

    loss: Tensor
    generator_loss: Tensor | None
    critic_loss: Tensor | None


class Trajectory(NamedTuple):
    """A generation, step by step; a step that was not run repeats the one before.

    ids: [steps, B, N] int64, mask_id where masked; is_masked: [steps, B, N] bool; log_probs: [steps, B, N]
    float32, nats, of the id last proposed at each position (0 where it was given).
    """

    ids: Tensor
    is_masked: Tensor
    log_probs: Tensor


class _Options(NamedTuple):
    """What stays the same through one generation, and through the replays of its graph."""

    start_temperature: float
    filter_thres: float | None
    top_p: float | None
    noise_level_scale: float
    choice_temperature: float
    min_score: float | None
    sample_offset: int


class _Canvas(NamedTuple):
    """What a generation works on, written in place.

    ids, is_masked, log_probs: [B, N]; row_indices: flat positions of what is masked, -1 for none; maskable: [B, N]
    bool; maskable_rows: flat positions of what is maskable; counts, row_starts: the plan's; seed: [] int64.
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


class NonAutoregressiveWrapper(nn.Module):
    r"""Trains and samples a masked-token model; a drop-in for x-transformers' class of that name.

    The loss is, with :math:`w_b = |\mathrm{schedule}'(t_b)| \, n_b / k_b`,

    .. math::
        \sum_b w_b \sum_{i \text{ masked}} -\log p(x_{b,i} \mid \tilde x_b) \Big/ \sum_b n_b,

    an unbiased estimate of the any-order autoregressive NLL in nats per token, for every schedule that
    falls from 1 to 0.

    Args:
        net: ``net(ids [B, N], **kwargs) -> logits [B, N, V]`` with attributes ``num_tokens`` and
            ``max_seq_len`` (and ``emb_dim`` for self_cond): an x_transformers.TransformerWrapper over an
            Encoder, or any such callable.
        mask_id: id of the mask token, below ``net.num_tokens``.
        steps: default number of generation steps.
        self_cond: condition on the embeddings of an earlier pass (https://arxiv.org/abs/2208.04202); needs
            a network with sum_embeds=, return_embeddings= and return_logits_and_embeddings=.
        self_cond_train_prob: share of training steps that take the earlier pass.
        no_replace_prob: share of masked positions that keep their token, in every second step.
        random_token_prob: share of the others that get a random token, in every second step.
        schedule: "linear", "cosine", a callable on a tensor, or a :class:`fastmask.Schedule`.
        can_mask_prev_unmasked: generation may mask again what it has committed.
        token_critic: a network that gives one logit per token; or
        self_token_critic: a linear critic on ``net``'s own embeddings.
        critic_loss_weight: weight of the critic's loss in the total.
        use_simple_mdlm_loss_weight: the weighted loss above; False takes the mean cross-entropy over
            masked tokens.
        mask_mode: "exact" counts, or "bernoulli" (each position by itself, as MDLM and LLaDA).
        stratified_times: spread the batch's times evenly over [0, 1).
        compat: restore the formulas of x-transformers 2.31.10 where fastmask corrects them (README).

    Raises:
        TypeError, ValueError: arguments that do not fit, each with its remedy.

    Source: Mask-Predict (https://arxiv.org/abs/1904.09324), MaskGIT (https://arxiv.org/abs/2202.04200), MDLM
    (https://arxiv.org/abs/2406.07524, eq. 10).
    """

    def __init__(
        self,
        net: Any,
        *,
        mask_id: int,
        steps: int = 18,
        self_cond: bool = False,
        self_cond_train_prob: float = 0.75,
        no_replace_prob: float = 0.15,
        random_token_prob: float = 0.1,
        schedule: str | TensorFn | Schedule = "linear",
        can_mask_prev_unmasked: bool = False,
        token_critic: nn.Module | None = None,
        self_token_critic: bool = False,
        critic_loss_weight: float = 1.0,
        use_simple_mdlm_loss_weight: bool = True,
        mask_mode: str = "exact",
        stratified_times: bool = False,
        compat: bool = False,
    ) -> None:
        super().__init__()
        _check.integer("net.num_tokens", getattr(net, "num_tokens", None), 2)
        for name in ("max_seq_len",) + ("emb_dim",) * self_cond:
            _check.integer(f"net.{name}", getattr(net, name, None), 1)
        mask_id = _check.integer("mask_id", mask_id, 0, net.num_tokens)
        steps = _check.integer("steps", steps, 1, 2**24)
        _check.number("self_cond_train_prob", self_cond_train_prob, 0.0, 1.0)
        _check.number("no_replace_prob", no_replace_prob, 0.0, 1.0)
        _check.number("random_token_prob", random_token_prob, 0.0, 1.0)
        _check.option("mask_mode", mask_mode, ["exact", "bernoulli"])
        if self_token_critic and token_critic is not None:
            raise ValueError("expected token_critic or self_token_critic=True, received both; leave one out")

        self.net = net
        self.dim: int | None = getattr(net, "emb_dim", None)
        self.num_tokens: int = net.num_tokens
        self.max_seq_len: int = net.max_seq_len
        self.mask_id = mask_id
        self.steps = steps
        self.no_replace_prob = no_replace_prob
        self.random_token_prob = random_token_prob
        # A schedule with parameters of its own stays a submodule, as upstream.
        self.schedule_fn: Any = schedule if isinstance(schedule, nn.Module) else as_schedule(schedule)
        self.use_simple_mdlm_loss_weight = use_simple_mdlm_loss_weight
        self.can_mask_prev_unmasked = can_mask_prev_unmasked
        self.mask_mode = mask_mode
        self.stratified_times = stratified_times
        self.compat = compat

        self.self_cond = self_cond
        if self_cond:
            self.null_embed = nn.Parameter(torch.randn(net.emb_dim))
            self.to_self_cond = nn.Linear(net.emb_dim, net.emb_dim, bias=False)
            self.self_cond_train_prob = self_cond_train_prob

        self.token_critic = SelfCritic(net) if self_token_critic else token_critic
        self.critic_loss_weight = critic_loss_weight

    # Training

    def forward(
        self,
        x: Tensor,
        only_train_generator: bool = False,
        only_train_critic: bool = False,
        generator_sample_temperature: float | None = None,
        *,
        maskable: Tensor | None = None,
        num_tokens: Tensor | float | None = None,
        generator: torch.Generator | None = None,
        sample_offset: int = 0,
        global_batch_size: int | None = None,
        **kwargs: Any,
    ) -> Losses:
        """The loss of one training step.

        Args:
            x: [B, max_seq_len] int32|int64, clean ids.
            only_train_generator: leave the critic out.
            only_train_critic: no gradient for the generator; ``loss`` is the critic's.
            generator_sample_temperature: of the sample that the critic judges; drawn from U(0, 1) if None.
            maskable: [B, max_seq_len] bool, False where a token is never masked nor in the loss.
            num_tokens: (maskable) tokens of the whole batch, of which this one is a part (gradient
                accumulation, data parallelism): the losses are scaled by this part's share of them. The
                parts of the weighted loss then add up to the whole's; a mean over masked tokens (without the
                weight, or compat) is averaged over the parts by their share.
            generator: for the masks and samples; default torch's own.
            sample_offset: global index of the first row.
            global_batch_size: rows of the whole batch, over which stratified times are spread.
            kwargs: passed to the network and to the critic (``mask=``, ``context=``).

        Returns:
            Losses(loss, generator_loss, critic_loss).

        Raises:
            TypeError, ValueError: x, maskable, num_tokens or flags that do not fit.

        Randomness: one seed of the generator, and where there is self-conditioning or a critic one uniform
        each of it (of torch's CPU generator if it lies on a GPU, so that nothing waits).
        """
        self._check_tokens("x", x)
        if only_train_critic and (only_train_generator or self.token_critic is None):
            raise ValueError(
                "expected only_train_critic=True with a critic and without only_train_generator=True; give "
                "token_critic= or self_token_critic=True to the wrapper, or leave the flag out"
            )
        if num_tokens is not None and not isinstance(num_tokens, Tensor):
            _check.number("num_tokens", num_tokens, 1.0)
        share = 1.0 if num_tokens is None else _num_maskable(x, maskable) / num_tokens
        seed = functional.draw_seed(x.device, generator)
        masked = self._mask(x, maskable, seed, sample_offset, global_batch_size)
        num_masked = HostCount(masked.num_masked)
        sum_embeds = self._training_self_cond(masked.masked_ids, generator, kwargs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not only_train_critic):
            out = backbone.run(self.net, masked.masked_ids, **sum_embeds, **kwargs)
        loss = None
        if not only_train_critic:
            loss = self._generator_loss(out, x, masked, maskable, num_masked, share)
        if loss is not None and (self.token_critic is None or only_train_generator):
            return Losses(loss, loss, None)

        assert self.token_critic is not None
        temperature = generator_sample_temperature
        if temperature is None:
            temperature = _host_uniform(generator)
        generated, is_wrong = self._corrupt(
            out, x, masked, num_masked.wait(), temperature, seed, generator, sample_offset
        )
        critic_kwargs = {} if self.compat else kwargs
        critic = share * critic_loss(critic_logits(self.token_critic, generated, critic_kwargs), is_wrong, maskable)
        if loss is None:
            return Losses(critic, None, critic)
        return Losses(loss + critic * self.critic_loss_weight, loss, critic)

    @property
    def _schedule(self) -> Schedule:
        return as_schedule(self.schedule_fn)

    def _mask(
        self, x: Tensor, maskable: Tensor | None, seed: Tensor, sample_offset: int, global_batch_size: int | None
    ) -> MaskedTokens:
        return functional.mask_sampling(
            x,
            mask_id=self.mask_id,
            num_tokens=self.num_tokens,
            schedule=self._schedule,
            mode=self.mask_mode,
            stratified=self.stratified_times,
            maskable=maskable,
            no_replace_prob=self.no_replace_prob,
            random_token_prob=self.random_token_prob,
            random_may_be_mask=self.compat,
            seed=seed,
            sample_offset=sample_offset,
            global_batch_size=global_batch_size,
        )

    def _training_self_cond(
        self, ids: Tensor, generator: torch.Generator | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        if not self.self_cond:
            return {}
        condition: Tensor = self.null_embed
        if _host_uniform(generator) < self.self_cond_train_prob:
            with torch.no_grad():
                first = {} if self.compat else self._condition(self.null_embed)
                earlier = backbone.embeddings(self.net, ids, **first, **kwargs)
            # The null embedding stays in the graph: data parallelism expects a gradient of each parameter.
            condition = earlier.detach() + 0.0 * self.null_embed
        return self._condition(condition)

    def _condition(self, embeddings: Tensor | None) -> dict[str, Any]:
        """The network's argument that conditions it on embeddings [B, N, D] or [D]."""
        return {} if embeddings is None else {"sum_embeds": self.to_self_cond(embeddings)}

    def _generator_loss(
        self,
        out: backbone.Output,
        x: Tensor,
        masked: MaskedTokens,
        maskable: Tensor | None,
        num_masked: HostCount,
        share: Tensor | float,
    ) -> Tensor:
        """The loss, of which this batch is a share: in the denominator, where the kernels need no second pass."""
        at_most = num_masked.at_most(x.numel())
        if self.use_simple_mdlm_loss_weight and not self.compat:
            denominator = _num_maskable(x, maskable) / share
            return out.loss(x, masked, masked.loss_weights, denominator, at_most)
        weights = compat.loss_weights(self._schedule, masked.times) if self.use_simple_mdlm_loss_weight else None
        return out.loss(x, masked, weights, masked.num_masked.clamp(min=1) / share, at_most)

    @torch.no_grad()
    def _corrupt(
        self,
        out: backbone.Output,
        x: Tensor,
        masked: MaskedTokens,
        num_masked: int | None,
        temperature: float,
        seed: Tensor,
        generator: torch.Generator | None,
        sample_offset: int,
    ) -> tuple[Tensor, Tensor]:
        """x [B, N] with the masked positions sampled, and where the critic should say wrong."""
        temperature = max(temperature, MIN_CRITIC_TEMPERATURE)
        if self.compat:
            everywhere = torch.arange(x.numel(), device=x.device)
            logits = out.logits_of(everywhere)
            sampled = compat.sample_tokens(logits, temperature=temperature, filter_thres=None, generator=generator)
            ids = sampled.ids.view_as(x)
            return x.where(~masked.is_masked, ids.to(x.dtype)), ids != x
        generated = x.long().contiguous().clone()
        out.sample(
            masked.row_indices if num_masked is None else masked.row_indices[:num_masked],
            temperature=temperature,
            mask_id=self.mask_id,
            out=Sampled(generated, torch.zeros(x.shape, device=x.device)),
            seed=seed,
            sample_offset=sample_offset,
        )
        generated = generated.to(x.dtype)
        return generated, generated != x

    # Evaluation

    @torch.no_grad()
    def nelbo(
        self,
        tokens: Tensor,
        num_samples: int = 1,
        *,
        maskable: Tensor | None = None,
        generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The bound that people report as (the log of) perplexity, estimated without bias.

        An average over ``num_samples`` draws of masks per sequence, at times stratified over all of them;
        no kept or random tokens, no dropout, the null embedding where there is self-conditioning.

        Args:
            tokens: [B, max_seq_len] int32|int64, clean ids.
            num_samples: draws per sequence; the variance falls with their number.
            maskable: [B, max_seq_len] bool, False where a token is given, not modelled.
            generator: default torch's own.
            kwargs: passed to the network.

        Returns:
            [] float32, nats per (maskable) token.

        Raises:
            TypeError, ValueError: arguments that do not fit.

        Randomness: one seed of the generator.

        Source: MDLM (https://arxiv.org/abs/2406.07524, eq. 10).
        """
        self._check_tokens("tokens", tokens)
        _check.integer("num_samples", num_samples, 1)
        seed = functional.draw_seed(tokens.device, generator)
        denominator = _num_maskable(tokens, maskable)
        condition = self._condition(self.null_embed if self.self_cond else None)
        total = torch.zeros((), device=tokens.device)
        with _evaluating(self):
            for draw in range(num_samples):
                masked = functional.mask_sampling(
                    tokens,
                    mask_id=self.mask_id,
                    num_tokens=self.num_tokens,
                    schedule=self._schedule,
                    mode=self.mask_mode,
                    stratified=True,
                    maskable=maskable,
                    seed=seed,
                    sample_offset=draw * len(tokens),
                    global_batch_size=num_samples * len(tokens),
                )
                num_masked = HostCount(masked.num_masked)
                out = backbone.run(self.net, masked.masked_ids, **condition, **kwargs)
                at_most = num_masked.at_most(tokens.numel())
                total += out.loss(tokens, masked, masked.loss_weights, denominator, at_most)
        return total / num_samples

    # Generation

    @torch.no_grad()
    def generate(
        self,
        batch_size: int | None = None,
        start_temperature: float = 1.0,
        filter_thres: float | None = 0.7,
        noise_level_scale: float = 1.0,
        *,
        top_p: float | None = None,
        forbidden: Tensor | Sequence[int] | None = None,
        choice_temperature: float = 0.0,
        threshold: float | None = None,
        prompt: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        sample_offset: int = 0,
        progress: Progress = None,
        return_trajectory: bool = False,
        cuda_graph: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generates sequences, or fills in the positions that a prompt leaves open.

        Args:
            batch_size: B; None for one sequence without batch dimension (or the prompt's own).
            start_temperature: annealed linearly to 0 (floor 1e-3).
            filter_thres: keeps the ceil((1 - filter_thres) V) largest logits; None keeps all.
            noise_level_scale: scale of the annealed Gumbel noise on the critic's scores.
            top_p: of those, keeps the nucleus of this probability; None keeps all.
            forbidden: [V] bool, True at more ids that are never sampled beside mask_id; or a sequence of those ids.
            choice_temperature: scale of the annealed Gumbel noise on the log confidence, without a critic;
                0 commits greedily and tends to one mode (MaskGIT: 4.5).
            threshold: in [0, 1]: in place of the schedule's counts every step commits all tokens whose confidence
                (their probability; with a critic, that of being right) is above it, and one of each sequence at
                least; the last step commits everything. With can_mask_prev_unmasked a step masks again what is not
                above it (a token that the filter leaves out has probability 0). All steps run, since nothing waits
                to see what is left: give few, or write the loop with ``functional.demask_step`` and stop when you
                have looked.
            prompt: [N] or [B, N] int32|int64; with
            prompt_mask: likewise bool, True where the prompt's id is given: it is never changed, even if it
                equals mask_id.
            steps: default the wrapper's own.
            generator: default torch's own of the network's device.
            sample_offset: global index of the first sequence: a batch may be split without changing it.
            progress: True for a tqdm bar (nothing without tqdm), or a callable ``progress(done, total)``.
            return_trajectory: also return every step.
            cuda_graph: capture the whole loop once for each batch, number of steps and set of options (and, to an
                eighth of N, the most positions that a prompt leaves open), then replay it, with fresh randomness and
                new prompts. The network then sees no Python: it must not branch on values. Where it cannot be
                captured a warning says why and the loop runs as usual. Each ``sample_offset`` is a graph of its own.
            kwargs: passed to the network and to the critic.

        Returns:
            ids [B, N] int64 ([N] for one sequence); with ``return_trajectory`` (ids, Trajectory).

        Raises:
            TypeError, ValueError: arguments that do not fit.

        Randomness: one seed of the generator.

        Source: MaskGIT (https://arxiv.org/abs/2202.04200, section 3.2); the threshold: Fast-dLLM
        (https://arxiv.org/abs/2505.22618, section 3.3).
        """
        steps = self.steps if steps is None else steps
        steps = _check.integer("steps", steps, 1, 2**24)
        _check.number("start_temperature", start_temperature, 0.0)
        if filter_thres is not None:
            _check.number("filter_thres", filter_thres, 0.0, 1.0, below_high=True)
        if top_p is not None:
            _check.number("top_p", top_p, 0.0, 1.0)
        _check.number("noise_level_scale", noise_level_scale, 0.0)
        _check.number("choice_temperature", choice_temperature, 0.0)
        if threshold is not None:
            _check.number("threshold", threshold, 0.0, 1.0)
        _check.integer("sample_offset", sample_offset, 0, 2**32)
        self._check_combination(top_p, forbidden, threshold, progress, return_trajectory, cuda_graph)
        device = backbone.device_of(self.net)
        forbidden = functional.as_forbidden(forbidden, self.num_tokens, device)
        ids, given, num_maskable, sample_one = self._canvas(batch_size, prompt, prompt_mask, device)
        plan = self._plan(steps, num_maskable, device, threshold is not None, cuda_graph and prompt is not None)
        options = _Options(
            start_temperature,
            filter_thres,
            top_p,
            noise_level_scale,
            choice_temperature,
            None if threshold is None else self._min_score(threshold),
            sample_offset,
        )
        canvas = self._start(ids, given, plan, functional.draw_seed(device, generator))
        with _evaluating(self):
            if cuda_graph and any(step.runs for step in plan.steps):
                ids = self._replay(canvas, plan, options, forbidden, kwargs)
                return ids[0] if sample_one else ids
            run = self._loop(canvas, plan, options, forbidden, generator, kwargs)
            trajectory = []
            for _ in track(steps, progress, "demasking"):
                next(run)
                if return_trajectory:
                    trajectory.append([x.clone() for x in canvas[:3]])
        result = canvas.ids[0] if sample_one else canvas.ids
        if return_trajectory:
            return result, Trajectory(*(torch.stack(values) for values in zip(*trajectory, strict=True)))
        return result

    def _check_combination(
        self,
        top_p: float | None,
        forbidden: Tensor | Sequence[int] | None,
        threshold: float | None,
        progress: Progress,
        return_trajectory: bool,
        cuda_graph: bool,
    ) -> None:
        ours = {"top_p": top_p, "forbidden": forbidden, "threshold": threshold, "cuda_graph": cuda_graph or None}
        received = [name for name, value in ours.items() if value is not None]
        if self.compat and received:
            raise ValueError(f"expected compat=False with {', '.join(received)}=, which x-transformers does not have")
        if cuda_graph and (progress or return_trajectory):
            raise ValueError(
                "expected cuda_graph=True without progress= and return_trajectory=: a graph runs all steps at once; "
                "leave one out"
            )

    def _canvas(
        self, batch_size: int | None, prompt: Tensor | None, prompt_mask: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, bool]:
        """The ids to start from, [B, N] int64, where they are given, how many of each are not, [B] on the host, and
        whether one sequence is wanted."""
        if batch_size is not None:
            batch_size = _check.integer("batch_size", batch_size, 0)
        if (prompt is None) != (prompt_mask is None):
            raise ValueError("expected prompt and prompt_mask together, received one of them; give both")
        if prompt is None or prompt_mask is None:
            shape = (1 if batch_size is None else batch_size, self.max_seq_len)
            ids = torch.full(shape, self.mask_id, dtype=torch.int64, device=device)
            num_maskable = torch.full(shape[:1], self.max_seq_len, device="cpu")
            return ids, torch.zeros_like(ids, dtype=torch.bool), num_maskable, batch_size is None
        _check.tensor("prompt", prompt, _check.INTEGER)
        _check.tensor("prompt_mask", prompt_mask, [torch.bool])
        _check.shape("prompt_mask", prompt_mask, prompt.shape, "as prompt")
        sample_one = prompt.ndim == 1 and batch_size is None
        if prompt.ndim == 1:
            rows = 1 if batch_size is None else batch_size
            prompt, prompt_mask = prompt.expand(rows, -1), prompt_mask.expand(rows, -1)
        expected = [len(prompt) if batch_size is None else batch_size, self.max_seq_len]
        _check.shape("prompt", prompt, expected, "B, max_seq_len")
        num_maskable = (~prompt_mask).sum(dim=-1).cpu()  # the one wait for a device, if the prompt is on one
        prompt, prompt_mask = (moved(x, device) for x in (prompt, prompt_mask))
        return prompt.long().where(prompt_mask, self.mask_id), prompt_mask, num_maskable, sample_one

    def _plan(
        self, steps: int, num_maskable: Tensor, device: torch.device, by_threshold: bool, for_any_prompt: bool
    ) -> Plan:
        eighth = math.ceil(self.max_seq_len / 8)
        most = int(num_maskable.max()) if len(num_maskable) else 0
        return make_plan(
            self._schedule,
            steps,
            num_maskable,
            device,
            may_remask=self.can_mask_prev_unmasked,
            by_threshold=by_threshold,
            always_runs=self.self_cond or self.can_mask_prev_unmasked,
            bound=min(self.max_seq_len, math.ceil(most / eighth) * eighth) if for_any_prompt else None,
        )

    @property
    def _rescores_all(self) -> bool:
        """Whether committed positions need a probability too: they compete to be masked again."""
        return self.can_mask_prev_unmasked and self.token_critic is None

    def _min_score(self, threshold: float) -> float:
        """The score from which on a token is not confident enough: of its probability, or of the critic's."""
        if self.token_critic is None:
            return functional.confidence_floor(threshold)
        return functional.confidence_floor(threshold) - functional.confidence_floor(1.0 - threshold)

    def _start(self, ids: Tensor, given: Tensor, plan: Plan, seed: Tensor) -> _Canvas:
        ids, maskable = ids.contiguous(), (~given).contiguous()
        rows = torch.nonzero_static(maskable.flatten(), size=plan.steps[0].num_rows).squeeze(-1)
        return _Canvas(
            ids,
            maskable.clone(),
            torch.zeros(ids.shape, device=ids.device),
            rows.clone(),
            maskable,
            rows,
            plan.counts,
            plan.row_starts,
            seed,
        )

    def _loop(
        self,
        canvas: _Canvas,
        plan: Plan,
        options: _Options,
        forbidden: Tensor | None,
        generator: torch.Generator | None,
        kwargs: dict[str, Any],
    ) -> Iterator[None]:
        """Runs the steps on the canvas, and yields after each."""
        condition: Tensor | None = self.null_embed if self.self_cond else None
        for step in plan.steps:
            if step.runs:
                sum_embeds = self._condition(condition)
                out = backbone.run(self.net, canvas.ids, with_embeddings=self.self_cond, **sum_embeds, **kwargs)
                self._propose(out, canvas, step, options, forbidden, generator)
                self._remask(canvas, step, options, kwargs)
                condition = out.embeddings if self.self_cond else None
            yield

    def _propose(
        self,
        out: backbone.Output,
        canvas: _Canvas,
        step: Step,
        options: _Options,
        forbidden: Tensor | None,
        generator: torch.Generator | None,
    ) -> None:
        """Samples every masked position, and finds the log-probability of each."""
        temperature = max(options.start_temperature * step.left, MIN_TEMPERATURE)
        rows = canvas.maskable_rows if self._rescores_all else canvas.row_indices[: step.num_rows]
        if self.compat:
            sampled = compat.sample_tokens(
                out.logits_of(rows),
                temperature=temperature,
                filter_thres=options.filter_thres,
                generator=generator,
            )
            canvas.log_probs.view(-1)[rows] = sampled.log_probs
            flat = canvas.ids.view(-1)
            flat[rows] = sampled.ids.where(canvas.is_masked.flatten()[rows], flat[rows])
            return
        kept = canvas.ids.masked_fill(canvas.is_masked, -1).flatten()[rows] if self._rescores_all else None
        out.sample(
            rows,
            temperature=temperature,
            filter_thres=options.filter_thres,
            top_p=options.top_p,
            mask_id=self.mask_id,
            forbidden=forbidden,
            kept_ids=kept,
            out=Sampled(canvas.ids, canvas.log_probs),
            seed=canvas.seed,
            step=step.number,
            sample_offset=options.sample_offset,
        )

    def _remask(self, canvas: _Canvas, step: Step, options: _Options, kwargs: dict[str, Any]) -> None:
        """Masks again what deserves it most, and lists it."""
        values, scale = canvas.log_probs, options.choice_temperature
        if self.token_critic is not None:
            values = critic_logits(self.token_critic, canvas.ids, {} if self.compat else kwargs)
            scale = options.noise_level_scale
        counts = canvas.counts[step.number]
        if options.min_score is not None and not self.can_mask_prev_unmasked:
            counts = functional.counts_that_commit(counts, canvas.is_masked)
        functional.remask_(
            canvas.ids,
            canvas.is_masked,
            canvas.row_indices[: step.num_left],
            canvas.row_starts[step.number],
            values,
            counts,
            mask_id=self.mask_id,
            is_confidence=self.token_critic is None,
            noise_scale=scale * step.left,
            min_score=options.min_score,
            eligible=canvas.maskable if self.can_mask_prev_unmasked else None,
            seed=canvas.seed,
            step=step.number,
            sample_offset=options.sample_offset,
        )

    def _replay(
        self, canvas: _Canvas, plan: Plan, options: _Options, forbidden: Tensor | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """The ids of the whole loop by one CUDA graph."""
        leaves, structure = tree_flatten((kwargs, forbidden))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        others = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)

        def function(inputs: list[Tensor]) -> list[Tensor]:
            static, given = _Canvas(*inputs[: len(canvas)]), iter(inputs[len(canvas) :])
            arguments = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            static_kwargs, static_forbidden = tree_unflatten(arguments, structure)
            for _ in self._loop(static, plan, options, static_forbidden, None, static_kwargs):
                pass
            return [static.ids]

        own = (self.mask_id, self.can_mask_prev_unmasked, self.self_cond)
        return _cuda_graph.replay(
            self, (own, plan.steps, options, others, str(structure)), function, [*canvas, *tensors]
        )[0]

    def _check_tokens(self, name: str, tokens: Tensor) -> None:
        _check.tensor(name, tokens, _check.INTEGER, ndim=2)
        if tokens.shape[1] != self.max_seq_len:
            raise ValueError(
                f"expected {name} [B, N] with N = net.max_seq_len = {self.max_seq_len}, received "
                f"{list(tokens.shape)}; cut sequences to that length (fastmask.data)"
            )


def _num_maskable(tokens: Tensor, maskable: Tensor | None) -> Tensor | int:
    """sum_b n_b, at least 1."""
    return max(1, tokens.numel()) if maskable is None else maskable.sum().clamp(min=1)


def _host_uniform(generator: torch.Generator | None) -> float:
    """U(0, 1) on the host, where a Python branch needs it: never from a GPU, which would be waited for."""
    if generator is not None and generator.device.type != "cpu":
        generator = None
    return torch.rand((), generator=generator, device="cpu").item()


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards, and after an exception, each submodule in the mode it had."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:
            m.training = training
