"""NonAutoregressiveWrapper: the training objective of masked-token models, and generation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from fastmask import _check, backbone, functional, generation, upstream
from fastmask._host_count import HostCount
from fastmask._modes import evaluating
from fastmask._progress import Progress
from fastmask.critic import SelfCritic, critic_logits, critic_loss
from fastmask.ops.sample_tokens import as_forbidden
from fastmask.records import Draws, Losses, MaskedTokens, Sampling, Trajectory
from fastmask.schedules import Schedule, TensorFn, as_schedule

_FLAGS = ("self_cond", "can_mask_prev_unmasked", "use_simple_mdlm_loss_weight", "stratified_times", "compat")


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
        compat: restore the formulas of x-transformers 2.31.10 where fastmask corrects them (docs/compat.md).

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

    @property
    def _schedule(self) -> Schedule:
        return as_schedule(self.schedule_fn)

    @property
    def _formulas(self) -> upstream.Formulas:
        return upstream.X_TRANSFORMERS if self.compat else upstream.FASTMASK

    def extra_repr(self) -> str:
        """The numbers, the schedule, and the flags that are on."""
        ratio = self._schedule.ratio
        schedule = self._schedule.name or getattr(ratio, "__name__", type(ratio).__name__)
        numbers = [f"{name}={getattr(self, name)}" for name in ("num_tokens", "max_seq_len", "mask_id", "steps")]
        flags = [f"{name}=True" for name in _FLAGS if getattr(self, name)]
        return ", ".join([*numbers, f"schedule={schedule!r}", f"mask_mode={self.mask_mode!r}", *flags])

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
        draws = Draws(functional.draw_seed(x.device, generator), sample_offset)
        masked = self._mask(
            x,
            maskable,
            draws,
            global_batch_size,
            stratified=self.stratified_times,
            no_replace_prob=self.no_replace_prob,
            random_token_prob=self.random_token_prob,
            random_may_be_mask=self._formulas.random_may_be_mask,
        )
        num_masked = HostCount(masked.num_masked)
        num_maskable = _num_maskable(x, maskable)
        share = 1.0 if num_tokens is None else num_maskable / num_tokens
        condition = self._training_condition(masked.masked_ids, generator, kwargs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not only_train_critic):
            out = backbone.run(self.net, masked.masked_ids, **condition, **kwargs)
        loss = None
        if not only_train_critic:
            loss = self._generator_loss(out, x, masked, num_masked, num_maskable, share)
        if loss is not None and (self.token_critic is None or only_train_generator):
            return Losses(loss, loss, None)

        temperature = generator_sample_temperature
        sampling = Sampling(_host_uniform(generator) if temperature is None else temperature, mask_id=self.mask_id)
        with torch.no_grad():
            rows = masked.row_indices[: num_masked.wait()]
            generated, is_wrong = self._formulas.critic_sample(out, x, masked, rows, sampling, draws, generator)
        assert self.token_critic is not None
        logits = critic_logits(self.token_critic, generated, self._formulas.critic_arguments(kwargs))
        critic = share * critic_loss(logits, is_wrong, maskable, num_maskable)
        if loss is None:
            return Losses(critic, None, critic)
        return Losses(loss + critic * self.critic_loss_weight, loss, critic)

    if TYPE_CHECKING:  # nn.Module's returns Any
        __call__ = forward

    def _mask(
        self, x: Tensor, maskable: Tensor | None, draws: Draws, global_batch_size: int | None, **options: Any
    ) -> MaskedTokens:
        return functional.mask_sampling(
            x,
            mask_id=self.mask_id,
            num_tokens=self.num_tokens,
            schedule=self._schedule,
            mode=self.mask_mode,
            maskable=maskable,
            seed=draws.seed,
            sample_offset=draws.sample_offset,
            global_batch_size=global_batch_size,
            **options,
        )

    def _training_condition(
        self, ids: Tensor, generator: torch.Generator | None, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """What conditions a training step: in some of them, the embeddings of an earlier pass."""
        if not self.self_cond:
            return {}
        embeddings: Tensor = self.null_embed
        if _host_uniform(generator) < self.self_cond_train_prob:
            with torch.no_grad():
                first = self._formulas.first_condition(self.null_embed)
                earlier = backbone.embeddings(self.net, ids, **self._condition(first), **kwargs)
            # The null embedding stays in the graph: data parallelism expects a gradient of each parameter.
            embeddings = earlier.detach() + 0.0 * self.null_embed
        return self._condition(embeddings)

    def _condition(self, embeddings: Tensor | None) -> dict[str, Any]:
        """The network's argument that conditions it on embeddings [B, N, D] or [D]."""
        return {} if embeddings is None else {"sum_embeds": self.to_self_cond(embeddings)}

    def _generator_loss(
        self,
        out: backbone.Output,
        x: Tensor,
        masked: MaskedTokens,
        num_masked: HostCount,
        num_maskable: Tensor | int,
        share: Tensor | float,
    ) -> Tensor:
        """The loss, of which this batch is a share: in the denominator, where the kernels need no second pass."""
        if self.use_simple_mdlm_loss_weight:
            weights = self._formulas.loss_weights(self._schedule, masked)
            denominator = self._formulas.loss_denominator(masked, num_maskable)
        else:
            weights, denominator = None, masked.num_masked.clamp(min=1)
        return out.loss(x, masked, weights, denominator / share, num_masked.at_most(x.numel()))

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
        with evaluating(self):
            for draw in range(num_samples):
                draws = Draws(seed, sample_offset=draw * len(tokens))
                masked = self._mask(tokens, maskable, draws, num_samples * len(tokens), stratified=True)
                num_masked = HostCount(masked.num_masked)
                out = backbone.run(self.net, masked.masked_ids, **condition, **kwargs)
                at_most = num_masked.at_most(tokens.numel())
                total += out.loss(tokens, masked, masked.loss_weights, denominator, at_most)
        return total / num_samples

    # Generation

    @overload
    def generate(
        self, batch_size: int | None = None, start_temperature: float = 1.0, filter_thres: float | None = 0.7,
        noise_level_scale: float = 1.0, *, return_trajectory: Literal[False] = False, **options: Any,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def generate(
        self, batch_size: int | None = None, start_temperature: float = 1.0, filter_thres: float | None = 0.7,
        noise_level_scale: float = 1.0, *, return_trajectory: Literal[True], **options: Any,
    ) -> tuple[Tensor, Trajectory]: ...  # fmt: skip

    @overload
    def generate(
        self, batch_size: int | None = None, start_temperature: float = 1.0, filter_thres: float | None = 0.7,
        noise_level_scale: float = 1.0, *, return_trajectory: bool, **options: Any,
    ) -> Tensor | tuple[Tensor, Trajectory]: ...  # fmt: skip

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
    ) -> Tensor | tuple[Tensor, Trajectory]:
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
                to see what is still masked: give few, or write the loop with ``functional.demask_step`` and stop when
                you have looked.
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
        steps = _check.integer("steps", self.steps if steps is None else steps, 1, 2**24)
        options = generation.Options(
            start_temperature=start_temperature,
            filter_thres=filter_thres,
            top_p=top_p,
            noise_level_scale=noise_level_scale,
            choice_temperature=choice_temperature,
            threshold=threshold,
            sample_offset=sample_offset,
        )
        options.check()
        self._formulas.check_options(
            top_p=top_p, forbidden=forbidden, threshold=threshold, cuda_graph=cuda_graph or None
        )
        if cuda_graph and (progress or return_trajectory):
            raise ValueError(
                "expected cuda_graph=True without progress= and return_trajectory=: a graph runs all steps at once; "
                "leave one out"
            )
        device = backbone.device_of(self.net)
        forbidden = as_forbidden(forbidden, self.num_tokens, device)
        start = generation.start(batch_size, prompt, prompt_mask, self.max_seq_len, self.mask_id, device)
        plan = self._plan(steps, start.num_maskable, device, threshold is not None, cuda_graph and prompt is not None)
        state = generation.first_state(start, plan, functional.draw_seed(device, generator), forbidden)
        ids, trajectory = state.ids, None
        with evaluating(self):
            if cuda_graph and any(step.runs for step in plan.steps):
                ids = generation.replayed(self, self._model(), state, plan, options, kwargs)
            else:
                run = generation.run(self._model(), state, plan, options, kwargs, generator)
                if return_trajectory:
                    trajectory = generation.recorded(run, state, steps, progress)
                else:
                    generation.watched(run, steps, progress)
        ids = ids[0] if batch_size is None and (prompt is None or prompt.ndim == 1) else ids
        return ids if trajectory is None else (ids, trajectory)

    def _plan(
        self, steps: int, num_maskable: Tensor, device: torch.device, by_threshold: bool, for_any_prompt: bool
    ) -> generation.Plan:
        return generation.plan(
            self._schedule,
            steps,
            num_maskable,
            device,
            may_remask=self.can_mask_prev_unmasked,
            by_threshold=by_threshold,
            always_runs=self.self_cond or self.can_mask_prev_unmasked,
            num_places=generation.places_for_any_prompt(num_maskable, self.max_seq_len) if for_any_prompt else None,
        )

    def _model(self) -> generation.Model:
        return generation.Model(
            net=self.net,
            critic=self.token_critic,
            condition=self._condition,
            null_embed=self.null_embed if self.self_cond else None,
            mask_id=self.mask_id,
            may_remask=self.can_mask_prev_unmasked,
            formulas=self._formulas,
        )

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
