"""NonAutoregressiveWrapper: the training objective of masked-token models, and generation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmask import _check, backbone, compat, functional
from fastmask._host_count import HostCount
from fastmask._progress import Progress, track
from fastmask.critic import SelfCritic, critic_logits, critic_loss
from fastmask.functional import MaskedTokens
from fastmask.schedules import Schedule, TensorFn, as_schedule, step_counts

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


class _State(NamedTuple):
    """Between two steps of a generation: [B, N] each, and what the next step is conditioned on."""

    ids: Tensor
    is_masked: Tensor
    log_probs: Tensor
    self_cond: Tensor | None


class _Step(NamedTuple):
    """One step, known before the loop: nothing in it waits for the device.

    number: from 0; left: the share of steps that follow; counts: [B] int64 on the device, how many stay
    masked; num_rows: how many positions of the batch are sampled; runs: whether the step can change anything.
    """

    number: int
    left: float
    counts: Tensor
    num_rows: int
    runs: bool


class _Options(NamedTuple):
    """What stays the same through one generation."""

    maskable: Tensor
    start_temperature: float
    filter_thres: float | None
    noise_level_scale: float
    choice_temperature: float
    seed: Tensor
    generator: torch.Generator | None
    sample_offset: int
    kwargs: dict[str, Any]


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
        rows = masked.row_indices
        rows = rows[rows >= 0] if num_masked is None else rows[:num_masked]
        sampled = out.sample(
            rows, temperature=temperature, mask_id=self.mask_id, seed=seed, sample_offset=sample_offset
        )
        generated = x.flatten().index_put((rows,), sampled.ids.to(x.dtype)).view_as(x)
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
        choice_temperature: float = 0.0,
        prompt: Tensor | None = None,
        prompt_mask: Tensor | None = None,
        steps: int | None = None,
        generator: torch.Generator | None = None,
        sample_offset: int = 0,
        progress: Progress = None,
        return_trajectory: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Generates sequences, or fills in the positions that a prompt leaves open.

        Args:
            batch_size: B; None for one sequence without batch dimension (or the prompt's own).
            start_temperature: annealed linearly to 0 (floor 1e-3).
            filter_thres: keeps the ceil((1 - filter_thres) V) largest logits; None keeps all.
            noise_level_scale: scale of the annealed Gumbel noise on the critic's scores.
            choice_temperature: scale of the annealed Gumbel noise on the log confidence, without a critic;
                0 commits greedily and tends to one mode (MaskGIT: 4.5).
            prompt: [N] or [B, N] int32|int64; with
            prompt_mask: likewise bool, True where the prompt's id is given: it is never changed, even if it
                equals mask_id.
            steps: default the wrapper's own.
            generator: default torch's own of the network's device.
            sample_offset: global index of the first sequence: a batch may be split without changing it.
            progress: True for a tqdm bar (nothing without tqdm), or a callable ``progress(done, total)``.
            return_trajectory: also return every step.
            kwargs: passed to the network and to the critic.

        Returns:
            ids [B, N] int64 ([N] for one sequence); with ``return_trajectory`` (ids, Trajectory).

        Raises:
            TypeError, ValueError: arguments that do not fit.

        Randomness: one seed of the generator.

        Source: MaskGIT (https://arxiv.org/abs/2202.04200, section 3.2).
        """
        steps = self.steps if steps is None else steps
        steps = _check.integer("steps", steps, 1, 2**24)
        _check.number("start_temperature", start_temperature, 0.0)
        if filter_thres is not None:
            _check.number("filter_thres", filter_thres, 0.0, 1.0, below_high=True)
        _check.number("noise_level_scale", noise_level_scale, 0.0)
        _check.number("choice_temperature", choice_temperature, 0.0)
        _check.integer("sample_offset", sample_offset, 0, 2**32)
        device = backbone.device_of(self.net)
        ids, given, sample_one = self._canvas(batch_size, prompt, prompt_mask, device)
        # The one look at the device, before the loop: how many positions each prompt leaves open.
        num_maskable = torch.full((len(ids),), ids.shape[1]) if prompt is None else (~given).sum(dim=-1).cpu()
        plan = self._plan(steps, num_maskable, device)
        options = _Options(
            ~given,
            start_temperature,
            filter_thres,
            noise_level_scale,
            choice_temperature,
            functional.draw_seed(device, generator),
            generator,
            sample_offset,
            kwargs,
        )
        state = _State(
            ids, ~given, torch.zeros(ids.shape, device=device), self.null_embed if self.self_cond else None
        )
        trajectory = []
        with _evaluating(self):
            for number in track(steps, progress, "demasking"):
                if plan[number].runs:
                    state = self._demask(state, plan[number], options)
                if return_trajectory:
                    trajectory.append(state[:3])
        result = state.ids[0] if sample_one else state.ids
        if return_trajectory:
            return result, Trajectory(*(torch.stack(values) for values in zip(*trajectory, strict=True)))
        return result

    def _canvas(
        self, batch_size: int | None, prompt: Tensor | None, prompt_mask: Tensor | None, device: torch.device
    ) -> tuple[Tensor, Tensor, bool]:
        """The ids to start from, [B, N] int64, where they are given, and whether one sequence is wanted."""
        if batch_size is not None:
            batch_size = _check.integer("batch_size", batch_size, 0)
        if (prompt is None) != (prompt_mask is None):
            raise ValueError("expected prompt and prompt_mask together, received one of them; give both")
        if prompt is None or prompt_mask is None:
            shape = (1 if batch_size is None else batch_size, self.max_seq_len)
            ids = torch.full(shape, self.mask_id, dtype=torch.int64, device=device)
            return ids, torch.zeros_like(ids, dtype=torch.bool), batch_size is None
        _check.tensor("prompt", prompt, _check.INTEGER)
        _check.tensor("prompt_mask", prompt_mask, [torch.bool])
        _check.shape("prompt_mask", prompt_mask, prompt.shape, "as prompt")
        sample_one = prompt.ndim == 1 and batch_size is None
        if prompt.ndim == 1:
            rows = 1 if batch_size is None else batch_size
            prompt, prompt_mask = prompt.expand(rows, -1), prompt_mask.expand(rows, -1)
        expected = [len(prompt) if batch_size is None else batch_size, self.max_seq_len]
        _check.shape("prompt", prompt, expected, "B, max_seq_len")
        prompt, prompt_mask = prompt.to(device), prompt_mask.to(device)
        return prompt.long().where(prompt_mask, self.mask_id), prompt_mask, sample_one

    def _plan(self, steps: int, num_maskable: Tensor, device: torch.device) -> list[_Step]:
        """Every step of a generation, from the schedule and how many positions [B] (CPU) are open."""
        counts = step_counts(self._schedule, steps, num_maskable)
        if not self.can_mask_prev_unmasked:  # what is committed stays committed
            counts = torch.cat([num_maskable[None], counts]).cummin(dim=0).values[1:]
        before = torch.cat([num_maskable[None], counts[:-1]])
        # Without conditioning on the step before, a step that commits nothing changes nothing.
        always = self.self_cond or self.can_mask_prev_unmasked
        open_ahead = before.any(dim=-1) | counts.any(dim=-1).flip(0).cummax(dim=0).values.flip(0)
        runs = open_ahead & (always | (counts < before).any(dim=-1))
        sampled = num_maskable.expand_as(before) if self._rescores_all else before
        on_device = counts.to(device)
        return [
            _Step(number, (steps - 1 - number) / steps, on_device[number], num_rows, run)
            for number, (num_rows, run) in enumerate(zip(sampled.sum(dim=-1).tolist(), runs.tolist(), strict=True))
        ]

    @property
    def _rescores_all(self) -> bool:
        """Whether committed positions need a probability too: they compete to be masked again."""
        return self.can_mask_prev_unmasked and self.token_critic is None

    def _demask(self, state: _State, step: _Step, options: _Options) -> _State:
        """One pass of the network: sample the masked positions, keep the best, mask the others again."""
        sum_embeds = self._condition(state.self_cond)
        out = backbone.run(self.net, state.ids, with_embeddings=self.self_cond, **sum_embeds, **options.kwargs)
        ids, log_probs = self._propose(out, state, step, options)
        scores = self._scores(ids, log_probs, step, options)
        eligible = options.maskable if self.can_mask_prev_unmasked else state.is_masked
        is_masked = functional.select_to_remask(scores, eligible, step.counts)
        self_cond = out.embeddings if self.self_cond else None
        return _State(ids.masked_fill(is_masked, self.mask_id), is_masked, log_probs, self_cond)

    def _propose(self, out: backbone.Output, state: _State, step: _Step, options: _Options) -> tuple[Tensor, Tensor]:
        """Ids with every masked position sampled, and the log-probability of each, [B, N]."""
        temperature = max(options.start_temperature * step.left, MIN_TEMPERATURE)
        wanted = options.maskable if self._rescores_all else state.is_masked
        rows = torch.nonzero_static(wanted.flatten(), size=step.num_rows).squeeze(-1)
        if self.compat:
            sampled = compat.sample_tokens(
                out.logits_of(rows),
                temperature=temperature,
                filter_thres=options.filter_thres,
                generator=options.generator,
            )
        else:
            kept = state.ids.masked_fill(state.is_masked, -1).flatten()[rows] if self._rescores_all else None
            sampled = out.sample(
                rows,
                temperature=temperature,
                filter_thres=options.filter_thres,
                mask_id=self.mask_id,
                kept_ids=kept,
                seed=options.seed,
                step=step.number,
                sample_offset=options.sample_offset,
            )
        ids = state.ids.flatten().index_put((rows,), sampled.ids).view_as(state.ids)
        log_probs = state.log_probs.flatten().index_put((rows,), sampled.log_probs).view_as(state.log_probs)
        return torch.where(state.is_masked, ids, state.ids), log_probs

    def _scores(self, ids: Tensor, log_probs: Tensor, step: _Step, options: _Options) -> Tensor:
        """How much each position [B, N] deserves to be masked again."""
        counters: dict[str, Any] = {"seed": options.seed, "step": step.number, "sample_offset": options.sample_offset}
        if self.token_critic is None:
            return functional.confidence_scores(
                log_probs, choice_temperature=options.choice_temperature * step.left, **counters
            )
        logits = critic_logits(self.token_critic, ids, {} if self.compat else options.kwargs)
        return functional.critic_scores(logits, noise_scale=options.noise_level_scale * step.left, **counters)

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
    return torch.rand((), generator=generator).item()


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
