"""NonAutoregressiveWrapper: the training objective of masked-token models, and generation."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from fastmask import (
    _check,
    _names,
    _progress,
    backbone,
    evaluation,
    functional,
    own_masks,
    upstream,
)
from fastmask._devices import device_of
from fastmask._host_count import HostCount
from fastmask._modes import evaluating
from fastmask._progress import Progress
from fastmask.critic import SelfCritic, critic_logits, critic_loss
from fastmask.distributed import Ranks
from fastmask.first_look import FirstLook
from fastmask.generation_mixin import GenerationMixin
from fastmask.heads import Heads
from fastmask.ops.mask_sampling import check_gate
from fastmask.ops.seeds import as_seed, check_generator
from fastmask.records import Counts, CrossEntropy, Draws, Losses, MaskedTokens, Metrics, Sampling
from fastmask.schedules import Schedule, TensorFn, as_schedule

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # which not every build of torch has

_FLAGS = ("self_cond", "can_mask_prev_unmasked", "use_simple_mdlm_loss_weight", "stratified_times", "compat")


class NonAutoregressiveWrapper(GenerationMixin):
    r"""Trains and samples a masked-token model; a drop-in for x-transformers' class of that name.

    The loss is, with :math:`w_b = |\mathrm{schedule}'(t_b)| \, n_b / k_b`,

    .. math::
        \sum_b w_b \sum_{i \text{ masked}} -\log p(x_{b,i} \mid \tilde x_b) \Big/ \sum_b n_b,

    in nats per token. With ``no_replace_prob=0, random_token_prob=0`` it is an unbiased estimate of the
    any-order autoregressive NLL, the bound that :meth:`nelbo` evaluates, for every schedule that falls from
    1 to 0. With kept and random tokens, upstream's default, it is a training objective and no bound: the
    network sees some of what it is asked for.

    Args:
        net: ``net(ids [B, N], **kwargs) -> logits [B, N, V]`` with attributes ``num_tokens`` and
            ``max_seq_len`` (and ``emb_dim`` for self_cond): an x_transformers.TransformerWrapper over an
            Encoder, or any such callable (docs/networks.md). More columns than num_tokens are padding and cut off;
            columns may lack from mask_id on.
        head: the nn.Linear of ``net`` that makes its logits of what ``net(ids, return_embeddings=True)`` returns:
            logits then exist for masked positions only. Not needed where the network declares its head, or is a
            TransformerWrapper: see ``has_linear_head``.
        mask_id: id of the mask token, below ``net.num_tokens``.
        steps: default number of generation steps.
        self_cond: condition on the embeddings of an earlier pass (https://arxiv.org/abs/2208.04202); needs
            a network with sum_embeds=, return_embeddings= and return_logits_and_embeddings=.
        self_cond_train_prob: share of training steps that take the earlier pass.
        no_replace_prob: share of masked positions that keep their token, in every second step.
        random_token_prob: share of the others that get a random token, in every second step.
        gate: "batch" is that, upstream's: two coins a step. "token" is BERT's: each masked position by itself
            keeps its token with probability no_replace_prob and gets a random one with random_token_prob;
            .1 and .1 are BERT's 80/10/10.
        random_excludes: ids that no random token is (special ids, padding of the vocabulary), as ids or
            [V] bool.
        schedule: "linear", "cosine", a callable on a tensor, or a :class:`fastmask.Schedule`; or a number in
            (0, 1], a constant mask ratio (BERT's .15) with the mean loss, which generates as "linear".
        can_mask_prev_unmasked: generation may mask again what it has committed.
        token_critic: a network that gives one logit per token; or
        self_token_critic: a linear critic on ``net``'s own embeddings.
        critic_loss_weight: weight of the critic's loss in the total.
        use_simple_mdlm_loss_weight: the weighted loss above; False takes the mean cross-entropy over
            masked tokens. None is True, but False where the schedule is a number.
        mask_mode: "exact" counts, or "bernoulli" (each position by itself, as MDLM and LLaDA).
        stratified_times: spread the batch's times evenly over [0, 1).
        check: "first" looks at the ids of the first batch of forward or nelbo: each in [0, num_tokens) and, where it
            may be masked, not mask_id, which would cost infinity. The host waits for that once. "always" looks at
            each batch, "never" at none; nothing is looked at under torch.compile or in a CUDA graph's capture.
        compat: restore the formulas of x-transformers 2.31.10 where fastmask corrects them (docs/compat.md).

    Raises:
        TypeError, ValueError: arguments that do not fit, each with its remedy; among them a schedule that does
            not fall from 1 to 0, to within .01, with the weighted loss (compat takes it). What a schedule with
            parameters learns later is not looked at in training.

    Source: Mask-Predict (https://arxiv.org/abs/1904.09324), MaskGIT (https://arxiv.org/abs/2202.04200), MDLM
    (https://arxiv.org/abs/2406.07524, eq. 10).
    """

    def __init__(
        self,
        net: Any,
        *,
        mask_id: int,
        head: nn.Linear | None = None,
        steps: int = 18,
        self_cond: bool = False,
        self_cond_train_prob: float = 0.75,
        no_replace_prob: float = 0.15,
        random_token_prob: float = 0.1,
        gate: str = "batch",
        random_excludes: Tensor | Sequence[int] | None = None,
        schedule: str | float | TensorFn | Schedule = "linear",
        can_mask_prev_unmasked: bool = False,
        token_critic: nn.Module | None = None,
        self_token_critic: bool = False,
        critic_loss_weight: float = 1.0,
        use_simple_mdlm_loss_weight: bool | None = None,
        mask_mode: str = "exact",
        stratified_times: bool = False,
        check: str = "first",
        compat: bool = False,
    ) -> None:
        super().__init__()
        for name, flag in (
            ("self_cond", self_cond),
            ("can_mask_prev_unmasked", can_mask_prev_unmasked),
            ("self_token_critic", self_token_critic),
            ("stratified_times", stratified_times),
            ("compat", compat),
        ):
            _check.flag(name, flag)
        backbone.check_network(net, needs_embeddings=self_cond)
        if head is not None:
            backbone.check_head(net, head)
        mask_id = _check.integer("mask_id", mask_id, 0, net.num_tokens)
        steps = _check.integer("steps", steps, 1, 2**24)
        _check.number("self_cond_train_prob", self_cond_train_prob, 0.0, 1.0)
        _check.number("critic_loss_weight", critic_loss_weight, 0.0)
        _check.option("mask_mode", mask_mode, ["exact", "bernoulli"])
        _check.option("check", check, ["first", "always", "never"])
        check_gate(gate, no_replace_prob, random_token_prob)
        if self_token_critic and token_critic is not None:
            raise ValueError("expected token_critic or self_token_critic=True, received both; leave one out")
        if token_critic is not None and not callable(token_critic):
            raise TypeError(
                "expected token_critic to be a module or a callable on ids [B, N], received "
                f"{type(token_critic).__name__}; self_token_critic=True makes one"
            )

        if getattr(getattr(net, "attn_layers", None), "causal", False):
            warnings.warn(
                f"the attention of {type(net).__name__} is causal: a masked token then sees what lies before it "
                "only; build the network over an Encoder",
                stacklevel=2,
            )

        self.compat = compat
        self.net = net
        self._heads = Heads(head)
        self.dim: int | None = getattr(net, "emb_dim", None)
        self.num_tokens: int = net.num_tokens
        self.max_seq_len: int = net.max_seq_len
        self.mask_id = mask_id
        self.steps = steps
        self.no_replace_prob = no_replace_prob
        self.random_token_prob = random_token_prob
        self.gate = gate
        # A buffer, so that it lies where the tokens do; not persistent, so that checkpoints are upstream's.
        self.register_buffer("random_excludes", self._checked_excludes(random_excludes), persistent=False)
        # A schedule with parameters of its own stays a submodule, as upstream.
        self.schedule_fn: Any = schedule if isinstance(schedule, nn.Module) else as_schedule(schedule)
        self.use_simple_mdlm_loss_weight = self._checked_loss_weight(use_simple_mdlm_loss_weight)
        self.can_mask_prev_unmasked = can_mask_prev_unmasked
        self.mask_mode = mask_mode
        self.stratified_times = stratified_times
        self._first_look = FirstLook(check)

        self.self_cond = self_cond
        if self_cond:
            self.null_embed = nn.Parameter(torch.randn(net.emb_dim))
            self.to_self_cond = nn.Linear(net.emb_dim, net.emb_dim, bias=False)
            self.self_cond_train_prob = self_cond_train_prob

        self.token_critic = SelfCritic(net, self._embedding_width()) if self_token_critic else token_critic
        self.critic_loss_weight = critic_loss_weight

    def _embedding_width(self) -> int | None:
        """D, as far as the network tells."""
        head = self._heads.way(self.net).head
        width = getattr(getattr(self.net, "attn_layers", None), "dim", None)
        if width is None and head is not None:
            width = head.weight.shape[1]
        return self.dim if width is None else width

    def _checked_excludes(self, random_excludes: Tensor | Sequence[int] | None) -> Tensor | None:
        if random_excludes is None:
            return None
        device = random_excludes.device if isinstance(random_excludes, Tensor) else backbone.device_of(self.net)
        table = _check.id_table("random_excludes", random_excludes, self.num_tokens, device)
        reads = self.random_token_prob > 0.0 and not table.is_meta
        _check.allowed_ids("random_excludes", table, self.mask_id, "set random_token_prob=0", reads=reads)
        return table.to(device, copy=True)

    def _checked_loss_weight(self, use_simple_mdlm_loss_weight: bool | None) -> bool:
        schedule = self._schedule
        if use_simple_mdlm_loss_weight is None:
            use_simple_mdlm_loss_weight = not schedule.is_constant
        _check.flag("use_simple_mdlm_loss_weight", use_simple_mdlm_loss_weight)
        if use_simple_mdlm_loss_weight and schedule.is_constant:
            raise ValueError(
                f"expected use_simple_mdlm_loss_weight=False with a constant mask ratio, received True with schedule="
                f"{schedule.label}; leave it out: the mean loss is the default there"
            )
        if use_simple_mdlm_loss_weight and not self._formulas.takes_any_schedule:
            schedule.check_falls(
                "the weighted loss",
                "use_simple_mdlm_loss_weight=False takes the mean loss, schedule=0.15 a constant ratio with it",
                may_wait=True,
            )
        return use_simple_mdlm_loss_weight

    @property
    def _formulas(self) -> upstream.Formulas:
        return upstream.X_TRANSFORMERS if self.compat else upstream.FASTMASK

    @property
    def has_linear_head(self) -> bool:
        """Whether logits are made for masked positions only, of the network's embeddings; its repr says why not.

        A network that does not declare its head is tried, once, on one sequence of masks.
        """
        device = backbone.device_of(self.net)
        ids = torch.full((1, self.max_seq_len), self.mask_id, dtype=torch.int64, device=device)
        with evaluating(self):
            self._heads.prove(self.net, ids, {})
        return self._heads.way(self.net).head is not None

    def extra_repr(self) -> str:
        """The numbers, the schedule, the way through the network's head, and the flags that are on."""
        numbers = [f"{name}={getattr(self, name)}" for name in ("num_tokens", "max_seq_len", "mask_id", "steps")]
        flags = [f"{name}=True" for name in _FLAGS if getattr(self, name)]
        words = [f"schedule={self._schedule.label!r}", f"mask_mode={self.mask_mode!r}"]
        gate = [f"gate={self.gate!r}"] if self.gate != "batch" else []
        way = self._heads.way(self.net)
        head = f"linear_head={way.head is not None} ({way.reason})"
        return ", ".join([*numbers, *words, *gate, *flags, head])

    # Training

    @overload
    def forward(
        self, x: Tensor, only_train_generator: bool = False, only_train_critic: bool = False,
        generator_sample_temperature: float | None = None, *, with_metrics: Literal[False] = False, **options: Any,
    ) -> Losses: ...  # fmt: skip

    @overload
    def forward(
        self, x: Tensor, only_train_generator: bool = False, only_train_critic: bool = False,
        generator_sample_temperature: float | None = None, *, with_metrics: Literal[True], **options: Any,
    ) -> tuple[Losses, Metrics]: ...  # fmt: skip

    def forward(
        self,
        x: Tensor,
        only_train_generator: bool = False,
        only_train_critic: bool = False,
        generator_sample_temperature: float | None = None,
        *,
        maskable: Tensor | None = None,
        is_masked: Tensor | None = None,
        masked_ids: Tensor | None = None,
        complement: bool = False,
        num_tokens: Tensor | float | None = None,
        num_masked: Tensor | float | None = None,
        process_group: ProcessGroup | None = None,
        with_metrics: bool = False,
        generator: torch.Generator | None = None,
        sample_offset: int | None = None,
        global_batch_size: int | None = None,
        **kwargs: Any,
    ) -> Losses | tuple[Losses, Metrics]:
        """The loss of one training step.

        Args:
            x: [B, N] int32|int64, clean ids; N up to max_seq_len.
            only_train_generator: leave the critic out.
            only_train_critic: no gradient for the generator; ``loss`` is the critic's.
            generator_sample_temperature: of the sample that the critic judges; drawn from U(0, 1) if None.
            maskable: [B, N] bool, False where a token is never masked nor in the loss.
            is_masked: [B, N] bool, masks of your own in place of drawn ones (whole words, spans, a collator's):
                the positions in the loss. With the mean loss only, since there is no time to weight by.
            masked_ids: [B, N] int32|int64, what the network sees beside is_masked; by default mask_id at all of
                them, with no kept and no random tokens.
            complement: mask what the same seed leaves, and leave what it masks, among the maskable: two
                calls with generators of one seed, one of them with complement=True, mask every token once. With
                the weighted loss and exact counts it never masks everything, so its loss is not the bound.
            num_tokens: (maskable) tokens of the whole batch, of which this one is a part (gradient
                accumulation, data parallelism): the losses are scaled by this part's share of them. The
                parts of the weighted loss then add up to the whole's; a mean over masked tokens (without the
                weight, or compat) is averaged over the parts by their share.
            num_masked: masked tokens of the whole batch, for exact parts of the mean loss: they then add up to
                the whole's. The critic's part is by num_tokens.
            process_group: of the ranks that have a part of the batch each, torch.distributed.group.WORLD for all. The
                mean over ranks of the losses is then the whole batch's, and so are gradients, which torch's
                DistributedDataParallel and fully_shard average (docs/distributed.md). The generator must be of one
                seed on all ranks.
            with_metrics: also return what one logs.
            generator: for the masks and samples; default torch's own.
            sample_offset: global index of the first row; by default 0, or in a process group what it is where all
                ranks have as many rows.
            global_batch_size: rows of the whole batch, over which stratified times are spread; likewise.
            kwargs: passed to the network and to the critic (``mask=``, ``context=``).

        num_tokens and num_masked are numbers of at least 1, or tensors of one element.

        Returns:
            Losses(loss, generator_loss, critic_loss); with_metrics a pair of it and Metrics(accuracy, nll,
            num_masked) of this call's masked tokens, tensors that nothing waits for.

        Raises:
            TypeError, ValueError: arguments that do not fit, and those that do not go together: masks of one's
                own or num_masked with the weighted loss, is_masked with maskable or complement, process_group with
                num_tokens or num_masked, without a generator, or with compat's critic.

        Randomness: one seed of the generator, and where there is self-conditioning or a critic one uniform
        each of it (of torch's CPU generator if it lies on a GPU, so that nothing waits).

        Example:
            >>> net = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9))
            >>> net.num_tokens, net.max_seq_len = 9, 6
            >>> model = NonAutoregressiveWrapper(net, mask_id=8, schedule=0.5)
            >>> x = torch.arange(6)[None]
            >>> generators = [torch.Generator().manual_seed(3) for _ in range(2)]
            >>> _, one = model(x, generator=generators[0], with_metrics=True)
            >>> _, other = model(x, generator=generators[1], complement=True, with_metrics=True)
            >>> int(one.num_masked + other.num_masked)
            6
        """
        _names.refuse(kwargs, self.net, NonAutoregressiveWrapper.forward)
        self._check_tokens("x", x)
        for name, flag in (
            ("only_train_generator", only_train_generator),
            ("only_train_critic", only_train_critic),
            ("complement", complement),
            ("with_metrics", with_metrics),
        ):
            _check.flag(name, flag)
        if only_train_critic and (only_train_generator or self.token_critic is None):
            raise ValueError(
                "expected only_train_critic=True with a critic and without only_train_generator=True; give "
                "token_critic= or self_token_critic=True to the wrapper, or leave the flag out"
            )
        if generator_sample_temperature is not None:
            _check.number("generator_sample_temperature", generator_sample_temperature, 0.0)
        if num_masked is not None and self.use_simple_mdlm_loss_weight:
            raise ValueError(
                "expected num_masked= with the mean loss, received it with the weighted one, whose parts are by "
                "num_tokens=; give that, or use_simple_mdlm_loss_weight=False to the wrapper"
            )
        whole = None if num_tokens is None else _scalar("num_tokens", num_tokens)
        has_critic = self.token_critic is not None and not only_train_generator
        ranks = Ranks(process_group)
        ranks.check_training(
            generator,
            draws=is_masked is None or self.self_cond or has_critic,
            draws_on_host=self.self_cond or has_critic,
            num_tokens=num_tokens,
            num_masked=num_masked,
        )
        if has_critic and not (ranks.are_one or self._formulas.draws_by_rows):
            raise ValueError(
                "expected compat=False with process_group= and a critic, received True, whose samples a split of the "
                "batch changes; give only_train_generator=True, or leave compat out"
            )
        sample_offset, global_batch_size = ranks.place(len(x), sample_offset, global_batch_size)
        draws = Draws(functional.draw_seed(x.device, generator), sample_offset)
        if is_masked is None:
            own_masks.refuse_ids_without_masks(masked_ids)
            masked = self._mask(
                x,
                maskable,
                draws,
                global_batch_size,
                stratified=self.stratified_times,
                no_replace_prob=self.no_replace_prob,
                random_token_prob=self.random_token_prob,
                random_may_be_mask=self._formulas.random_may_be_mask,
                gate=self.gate,
                random_excludes=self.random_excludes,
                complement=complement,
            )
        else:
            own_masks.refuse_what_draws(maskable, complement, self.use_simple_mdlm_loss_weight)
            masked = own_masks.as_drawn(x, is_masked, masked_ids, self.mask_id)
        self._look_at("x", x, maskable if is_masked is None else is_masked)
        counted = HostCount(masked.num_masked)
        summed = ranks.summed(Counts(x.numel() if maskable is None else maskable.sum(), masked.num_masked))
        condition = self._training_condition(masked.masked_ids, generator, kwargs)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not only_train_critic):
            out = self._run(self._formulas, masked.masked_ids, **condition, **kwargs)
        counts = summed()
        loss = metrics = None
        if with_metrics or not only_train_critic:
            denominator = self._denominator(counts, whole, num_masked)
            entropy = self._generator_loss(out, x, masked, counted, denominator, with_metrics)
            loss = None if only_train_critic else entropy.loss
            metrics = _metrics(entropy, masked.num_masked) if with_metrics else None
        if loss is not None and not has_critic:
            return _with_metrics(Losses(loss, loss, None), metrics)

        temperature = generator_sample_temperature
        sampling = Sampling(_host_uniform(generator) if temperature is None else temperature, mask_id=self.mask_id)
        with torch.no_grad():
            rows = masked.row_indices[: counted.wait()]
            proposal = upstream.Proposal(out, rows, sampling, draws, generator)
            generated, is_wrong = self._formulas.critic_sample(proposal, x, masked)
        assert self.token_critic is not None
        logits = critic_logits(self.token_critic, generated, self._formulas.critic_arguments(kwargs))
        critic = critic_loss(logits, is_wrong, maskable, counts.num_maskable if whole is None else whole)
        if loss is None:
            return _with_metrics(Losses(critic, None, critic), metrics)
        return _with_metrics(Losses(loss + critic * self.critic_loss_weight, loss, critic), metrics)

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

    def _denominator(
        self, counts: Counts, whole: Tensor | float | None, num_masked: Tensor | float | None
    ) -> Tensor | float:
        """What the sum of the losses is divided by, for a batch of the whole's tokens or a part of them."""
        if num_masked is not None:
            return _scalar("num_masked", num_masked)
        is_weighted = self.use_simple_mdlm_loss_weight
        own = self._formulas.loss_denominator(counts) if is_weighted else counts.num_masked
        # By tokens the quotient is 1: the whole is not rounded.
        return own if whole is None else whole * (own / counts.num_maskable)

    def _generator_loss(
        self,
        out: backbone.Output,
        x: Tensor,
        masked: MaskedTokens,
        counted: HostCount,
        denominator: Tensor | float,
        with_correct: bool,
    ) -> CrossEntropy:
        weights = self._formulas.loss_weights(self._schedule, masked) if self.use_simple_mdlm_loss_weight else None
        return out.loss(x, masked, weights, denominator, counted.at_most(x.numel()), with_correct)

    # Evaluation

    @torch.no_grad()
    def nelbo(
        self,
        tokens: Tensor | Dataset[Any] | Iterable[Any],
        num_samples: int = 1,
        *,
        maskable: Tensor | None = None,
        chunk_size: int | None = None,
        reduction: str = "mean",
        seed: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        progress: Progress = False,
        process_group: ProcessGroup | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The bound that people report as (the log of) perplexity, estimated without bias.

        An average over ``num_samples`` draws of masks per sequence, at times stratified over all of them;
        no kept or random tokens, no dropout, the null embedding where there is self-conditioning. It does not
        depend on the schedule, on the training loss nor on compat. The mask is no prediction: its column, and what
        pads the head, leave the softmax as they leave the sampler's.

        Args:
            tokens: clean ids, N up to max_seq_len:
                a tensor [B, N] int32|int64;
                a data set of items [N], as ``fastmask.data`` has them;
                or an iterable of batches, as a DataLoader: tensors [B, N], tuples that begin with one, or dicts
                with "input_ids" [B, N] and perhaps "maskable" [B, N] bool (other entries are left out).
                Lengths may differ between batches. Batches are moved to the network's device.
            num_samples: draws per sequence; the variance falls with their number.
            maskable: [B, N] bool with a tensor, False where a token is given, not modelled.
            chunk_size: how many sequences of a tensor (default all) or a data set (default 32) go through the
                network together. The result does not depend on it but for rounding. Tensors among kwargs that
                have B rows are cut along with a tensor.
            reduction: "mean" over all tokens, however they come in batches, or "none".
            seed: the masks' seed, for instance a common one for models that are compared; drawn if None.
            generator: default torch's own.
            progress: True for a tqdm bar, or ``progress(done, total)``, over passes of the network.
            process_group: of the ranks that evaluate a part of the tokens each, torch.distributed.group.WORLD for
                all. Parts of a tensor or a data set follow one another by rank, batches of an iterable alternate;
                the seed is rank 0's. The result is then one process's on the whole.
            kwargs: passed to the network.

        Returns:
            "mean": [] float32, nats per (maskable) token, of all ranks'. "none": float32, nats of each sequence of
            this rank, in order.
            NaN where the schedule lies on a GPU and does not fall from 1 to 0, since nothing waits to refuse it.

        Raises:
            TypeError, ValueError: arguments that do not fit, no batch at all, a schedule that does not fall from
                1 to 0 (a constant mask ratio).

        Randomness: one seed of the generator. Times are stratified over a tensor or a data set, but within each
        batch of an iterable, whose number of sequences nobody knows.

        Source: MDLM (https://arxiv.org/abs/2406.07524, eq. 10).
        """
        _names.refuse(kwargs, self.net, NonAutoregressiveWrapper.nelbo)
        num_samples = _check.integer("num_samples", num_samples, 1)
        _check.option("reduction", reduction, ["mean", "none"])
        _progress.check(progress)
        falls = self._schedule.check_falls(
            "nelbo",
            "NonAutoregressiveWrapper(net, mask_id=...) evaluates the same network at a linear schedule",
            may_wait=False,
        )
        ranks = Ranks(process_group)
        source = evaluation.source(tokens, chunk_size, maskable, kwargs)
        home = tokens.device if isinstance(tokens, Tensor) else torch.get_default_device()
        draw = as_seed(seed, device_of(self.net, home), generator)
        source, draw = evaluation.part_of_rank(source, draw, ranks)
        with evaluating(self):
            bound = evaluation.run(source, self._bound_model(), draw, num_samples, progress)
        value = bound.reduced(reduction, num_samples, ranks)
        return value if falls is None else value.where(falls.to(value.device), torch.nan)

    def _bound_model(self) -> evaluation.Model:
        condition = self._condition(self.null_embed if self.self_cond else None)

        def mask(tokens: Tensor, maskable: Tensor | None, draws: Draws, global_batch_size: int) -> MaskedTokens:
            self._check_tokens("tokens", tokens)
            masked = self._mask(tokens, maskable, draws, global_batch_size, stratified=True)
            self._look_at("tokens", tokens, maskable)
            return masked

        def cost(tokens: Tensor, masked: MaskedTokens, arguments: dict[str, Any]) -> CrossEntropy:
            counted = HostCount(masked.num_masked)
            out = self._run(upstream.FASTMASK, masked.masked_ids, **condition, **arguments)
            return out.loss(tokens, masked, masked.loss_weights, 1.0, counted.at_most(tokens.numel()))

        return evaluation.Model(self.net, mask, cost)

    def _check_tokens(self, name: str, tokens: Tensor) -> None:
        _check.tensor(name, tokens, _check.INTEGER, ndim=2)
        if not 1 <= tokens.shape[1] <= self.max_seq_len:
            raise ValueError(
                f"expected {name} [B, N] with N from 1 to net.max_seq_len = {self.max_seq_len}, received "
                f"{list(tokens.shape)}; cut longer sequences (fastmask.data)"
            )

    def _look_at(self, name: str, tokens: Tensor, maskable: Tensor | None) -> None:
        excluded = None if self._formulas.token_may_be_mask else self.mask_id
        self._first_look(name, tokens, self.num_tokens, excluded, maskable)


def _scalar(name: str, count: Tensor | float) -> Tensor | float:
    """A count of at least 1 as a number, or as a tensor [] float32."""
    if not isinstance(count, Tensor):
        _check.number(name, count, 1.0)
        return float(count)
    _check.tensor(name, count, (*_check.INTEGER, *_check.FLOATING))
    if count.numel() != 1:
        raise ValueError(f"expected {name} to be a number or a tensor of one element, received {list(count.shape)}")
    return count.reshape(()).float().clamp(min=1.0)


def _metrics(entropy: CrossEntropy, num_masked: Tensor) -> Metrics:
    assert entropy.correct is not None
    divisor = num_masked.clamp(min=1).float()
    return Metrics(entropy.correct.sum() / divisor, entropy.nll.sum() / divisor, num_masked)


def _with_metrics(losses: Losses, metrics: Metrics | None) -> Losses | tuple[Losses, Metrics]:
    return losses if metrics is None else (losses, metrics)


def _host_uniform(generator: torch.Generator | None) -> float:
    """U(0, 1) on the host, where a Python branch needs it: never from a GPU, which would be waited for."""
    check_generator(generator)
    if generator is not None and generator.device.type != "cpu":
        generator = None
    return torch.rand((), generator=generator, dtype=torch.float32, device="cpu").item()
