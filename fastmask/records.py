"""The nouns of fastmask: what travels together between doors, reference and kernels.

Letters: B batch, N positions, V vocabulary, D width, M rows of logits, R places of a list of rows. None means absent;
a number that changes nothing (label_smoothing 0) is a number.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Random numbers


class Draws(NamedTuple):
    """Which random numbers an operation draws: its seed and where its Philox counters begin.

    seed: [] int64. sample_offset: global index of the first sequence. step: index of the demasking step.
    """

    seed: Tensor
    sample_offset: int = 0
    step: int = 0


# Masks


class ScheduleValues(NamedTuple):
    """Times, and the schedule at them, [B] float32 each: all three, or none where the operation finds them itself.

    times: t. ratios: schedule(t). slopes: d schedule / dt.
    """

    times: Tensor | None = None
    ratios: Tensor | None = None
    slopes: Tensor | None = None


class Masking(NamedTuple):
    """How masks are chosen, and what the network sees there; see ``fastmask.functional.mask_sampling``.

    schedule: "linear" or "cosine", evaluated by the operation; None where its values are given. gates_tokens: each
    masked position is kept or random by itself, not a share of them after a coin. complement: what the mask leaves.
    """

    mask_id: int
    num_tokens: int
    global_batch_size: int
    schedule: str | None = "linear"
    bernoulli: bool = False
    stratified: bool = False
    no_replace_prob: float = 0.0
    random_token_prob: float = 0.0
    random_may_be_mask: bool = False
    gates_tokens: bool = False
    complement: bool = False

    @property
    def gate_ends(self) -> tuple[int, int]:
        """Below which of 2**32 words a position keeps its token, and below which else it gets a random one."""
        kept = self.no_replace_prob
        return round(kept * 2**32), min(round((kept + self.random_token_prob) * 2**32), 2**32)


class RandomIds(NamedTuple):
    """What random tokens are drawn from, where ids are excluded: the first num_ids [] int64 of ids [V] int64."""

    ids: Tensor | None = None
    num_ids: Tensor | None = None


class MaskedTokens(NamedTuple):
    """What :func:`fastmask.functional.mask_sampling` returns; fields documented there."""

    masked_ids: Tensor
    is_masked: Tensor
    times: Tensor
    counts: Tensor
    loss_weights: Tensor
    row_indices: Tensor
    num_masked: Tensor


# Losses


class LossRows(NamedTuple):
    """The rows of a loss, of one shape [...].

    targets: int32|int64, read at masked rows only. is_masked: bool, None for all. weights: in the loss's dtype, None
    for 1; 0 is as good as unmasked.
    """

    targets: Tensor
    is_masked: Tensor | None = None
    weights: Tensor | None = None

    def flat(self) -> LossRows:
        """The same rows in one dimension."""
        if self.targets.ndim == 1:
            return self
        return LossRows(*[None if x is None else x.flatten() for x in self])  # type: ignore[arg-type]

    def contiguous(self) -> LossRows:
        """The same rows, one after another in memory."""
        return LossRows(
            self.targets.contiguous(),
            None if self.is_masked is None else self.is_masked.contiguous(),
            None if self.weights is None else self.weights.contiguous(),
        )

    def counted(self) -> Tensor:
        """Which rows are in the loss: masked, and of a weight other than 0; bool, of the targets' shape."""
        if self.weights is None:
            return torch.ones_like(self.targets, dtype=torch.bool) if self.is_masked is None else self.is_masked
        return self.weights != 0 if self.is_masked is None else self.is_masked & (self.weights != 0)


class LossOptions(NamedTuple):
    """What a row's loss is besides its cross-entropy; see ``fastmask.functional.masked_cross_entropy``."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    exclude_id: int | None = None
    with_correct: bool = False


class Reduction(NamedTuple):
    """How the losses of rows become one: kind is "none", "sum" or "mean".

    denominator: [] in the loss's dtype, what "mean" divides by; None for the number of rows that count.
    """

    kind: str = "mean"
    denominator: Tensor | None = None


class CrossEntropy(NamedTuple):
    """The loss by the reduction asked for, and of every row: its unweighted nll, and whether the argmax
    (ties to the lower id) is the target, or None where not asked for; 0 and False where unmasked."""

    loss: Tensor
    nll: Tensor
    correct: Tensor | None


# Logits


class LinearLogits(NamedTuple):
    """Logits that nobody has computed yet: ``F.linear(scale * embeddings, weight, bias)``, or, with a softcap c,
    c tanh(that / c).

    Samplers take it wherever they take logits, and compute those of the rows they sample.

    embeddings: [B, N, D] or, of compact rows, [M, D]. weight: [V, D]. bias: [V] or None. Of one dtype, unless under
    autocast. softcap: above 0, or None. num_tokens: how many ids there are, of V rows of which the others pad the
    vocabulary; None for V.

    The weight may be a DTensor, split over ranks by ids; see ``fastmask.functional.linear_masked_cross_entropy``.
    """

    embeddings: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    num_tokens: int | None = None

    @property
    def num_ids(self) -> int:
        """How many ids there are."""
        return len(self.weight) if self.num_tokens is None else self.num_tokens

    def scaled(self, embeddings: Tensor) -> Tensor:
        """Some rows of the embeddings, times the scale."""
        return embeddings if self.scale == 1.0 else embeddings * self.scale

    def capped_(self, logits: Tensor) -> Tensor:
        """Some rows of ``F.linear(...)`` under the softcap, in place."""
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def of_rows(self, embeddings: Tensor) -> Tensor:
        """The logits of some rows of the embeddings."""
        _, weight, bias, *_ = self.cut()
        logits = torch.nn.functional.linear(self.scaled(embeddings), weight, bias)
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()

    def of_ids(self, num_tokens: int) -> LinearLogits:
        """The logits of the first num_tokens ids."""
        return self._replace(num_tokens=num_tokens)

    def cut(self) -> LinearLogits:
        """The same by a weight and a bias without rows that pad them."""
        if self.num_ids == len(self.weight):
            return self._replace(num_tokens=None)
        bias = None if self.bias is None else self.bias[: self.num_ids]
        return self._replace(weight=self.weight[: self.num_ids], bias=bias, num_tokens=None)


# Demasking


class SampledRows(NamedTuple):
    """Which M rows are sampled.

    row_indices: [M] int64, flat positions b N + i; -1, or what is no position, for no row. seq_len: N. is_compact:
    whether there are logits of these rows only, [M, V], or of every position, [B N, V]. num_places: B N; None where
    nothing lies at positions.
    """

    row_indices: Tensor
    seq_len: int
    is_compact: bool
    num_places: int | None = None

    def without_strays(self) -> SampledRows:
        """The same with -1 for what is no position."""
        is_row = self.row_indices >= 0
        if self.num_places is not None:
            is_row &= self.row_indices < self.num_places
        return self._replace(row_indices=self.row_indices.where(is_row, -1))

    def part(self, part: slice) -> SampledRows:
        """Some of the rows, to go with logits of these only."""
        return self._replace(row_indices=self.row_indices[part], is_compact=True)

    def of(self, values: Tensor, part: slice) -> Tensor:
        """What belongs to some of the rows; some other's where there is no row, and 0 where there is none at all."""
        if self.is_compact:
            return values[part]
        row_indices = self.row_indices[part]
        if len(values) == 0:
            return values.new_zeros(len(row_indices), values.shape[1])
        return values[row_indices.clamp(0, len(values) - 1)]


class Sampling(NamedTuple):
    """How ids are sampled; see ``fastmask.functional.sample_tokens``.

    top_k: in [1, V), None to keep all. mask_id: in [0, V). forbidden: [V] bool. processed: whether figures and
    filters are of the law that is sampled, at its temperature.
    """

    temperature: float = 1.0
    top_k: int | None = None
    min_p: float | None = None
    top_p: float | None = None
    mask_id: int | None = None
    forbidden: Tensor | None = None
    with_margin: bool = False
    with_entropy: bool = False
    processed: bool = False

    @property
    def is_greedy(self) -> bool:
        """Whether the largest logit is taken, and no random number drawn."""
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def temperature_of_figures(self) -> float:
        """Of the softmax of which figures and filters are; 1 at temperature 0, where it would be all in one id."""
        return self.temperature if self.processed and self.temperature > 0.0 else 1.0


class PerSequence(NamedTuple):
    """Options of a sampler of which each sequence has its own, [B]; of the others, None here, ``Sampling`` says.

    temperature, min_p, top_p: floating point. top_k: int32|int64. What changes nothing is 1, 0, 1 and V, then.
    """

    temperature: Tensor | None = None
    top_k: Tensor | None = None
    min_p: Tensor | None = None
    top_p: Tensor | None = None

    def given(self) -> dict[str, Tensor]:
        """Those that there are, by name."""
        return {name: values for name, values in self._asdict().items() if values is not None}


class Sampled(NamedTuple):
    """One id for each row, int64, and figures of the filtered softmax, float32, None where not asked for.

    log_probs: nats, of ``ids``. margins: how much more likely the likeliest id is than the next. entropies: nats.
    """

    ids: Tensor
    log_probs: Tensor
    margins: Tensor | None = None
    entropies: Tensor | None = None


class Remasking(NamedTuple):
    """How positions are judged, and which are masked again: those of the highest remask keys.

    A remask key is minus the value where that is a confidence, else the value (an entropy, a critic's logit), noise
    added first.

    noise_scale: of Gumbel noise on the value. min_remask_key: a position whose key is lower, before noise, is not
    masked again. factor, entropy_bound: rules of how many are committed at least. counts_commit: whether the counts
    that go with it say how many are committed at least, rather than how many stay masked at most.
    """

    mask_id: int
    is_confidence: bool = True
    noise_scale: float = 0.0
    min_remask_key: float | None = None
    factor: float | None = None
    entropy_bound: float | None = None
    counts_commit: bool = False

    @property
    def has_prefix_rule(self) -> bool:
        """Whether a rule commits as long a prefix, in the order of the keys, as it allows."""
        return self.factor is not None or self.entropy_bound is not None

    @property
    def fixed_point_bound(self) -> int | None:
        """The bound in multiples of 2^-32 nats; no sum of entropies reaches 2^62."""
        return None if self.entropy_bound is None else int(min(self.entropy_bound * 2.0**32, 2.0**62))


class Windows(NamedTuple):
    """Where in each sequence positions take part: [B, 2] int64, first and end; None for everywhere.

    block: of this step, outside of which nothing changes or is counted. next_block: whose masked positions the list
    is of.
    """

    block: Tensor | None = None
    next_block: Tensor | None = None


class RowList(NamedTuple):
    """A list of rows, written in place: each sequence's flat positions in places of its own.

    row_indices: [R] int64, -1 where a place is free. row_starts: [B + 1] int64: those of sequence b lie in
    row_indices[row_starts[b] : row_starts[b + 1]]; what does not fit is left out. None: each has R / B places.
    """

    row_indices: Tensor
    row_starts: Tensor | None = None


class Demasked(NamedTuple):
    """Between two steps of a generation; see :func:`fastmask.functional.demask_step`."""

    ids: Tensor
    is_masked: Tensor
    log_probs: Tensor
    row_indices: Tensor


# Training


class Counts(NamedTuple):
    """Tokens of a batch, and in a process group of all its ranks'.

    maskable: how many may be masked, [] int64 or a number. masked: how many are, [] int64. num_ranks: whose they are.
    """

    maskable: Tensor | int
    masked: Tensor
    num_ranks: int = 1

    @property
    def num_maskable(self) -> Tensor | float:
        """Of the maskable at least 1, the ranks' mean: what a rank's loss is divided by."""
        return self._mean(self.maskable)

    @property
    def num_masked(self) -> Tensor | float:
        """Of the masked at least 1, the ranks' mean."""
        return self._mean(self.masked)

    def _mean(self, count: Tensor | int) -> Tensor | float:
        if not isinstance(count, Tensor):
            return max(1, count) / self.num_ranks
        count = count.clamp(min=1)
        return count.float() if self.num_ranks == 1 else count.double() / self.num_ranks


# The wrapper's results


class Losses(NamedTuple):
    """Scalars, float32, nats: what to call backward on, and its two parts (None where not computed)."""

    loss: Tensor
    generator_loss: Tensor | None
    critic_loss: Tensor | None


class Metrics(NamedTuple):
    """What one logs of a training step, of its masked tokens; on the device, without gradient.

    accuracy: [] float32, the share whose likeliest id is the token. nll: [] float32, nats, the mean without weights.
    num_masked: [] int64, how many they are; the others are 0 where there is none.
    """

    accuracy: Tensor
    nll: Tensor
    num_masked: Tensor


class GenerationStep(NamedTuple):
    """A generation after one of its steps.

    ids: [B, N] int64, mask_id where masked. is_masked: [B, N] bool. log_probs: [B, N] float32, nats, of the id last
    proposed at each position (0 where none was yet, or it was given). committed_at: [B, N] int32, the pass that
    committed or edited it, of its sequence's, from 0; -1 where it was given, is masked or lies past an end. passes:
    [B] int64, how many steps changed the sequence; with edits also those that only looked for them in it.
    """

    ids: Tensor
    is_masked: Tensor
    log_probs: Tensor
    committed_at: Tensor
    passes: Tensor


class Trajectory(NamedTuple):
    """A generation, step by step; a step that was not run repeats the one before.

    Of T steps, those of all blocks; by a rule, with edits, or once all sequences have an end, those until then.

    ids: [T, B, N] int64, mask_id where masked; is_masked: [T, B, N] bool; log_probs: [T, B, N] float32, nats, of the
    id last proposed at each position (0 where none was yet, or it was given).
    """

    ids: Tensor
    is_masked: Tensor
    log_probs: Tensor
