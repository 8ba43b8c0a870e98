"""diffusers' schedulers of discrete tokens, their ``step`` on fastmask's operations; and Halton's order.

Subclasses of diffusers' own, of the same names: configuration, signatures, outputs and errors are theirs, so that
``from_config``, ``save_pretrained``, ``isinstance`` and their pipelines work. Needs the extra ``diffusers``.

At temperature 0 ids, probabilities and commits are diffusers'; else they are equal in law, and a seeded generator
gives other draws than theirs. No ``step`` waits for the device where the timestep is a Python int. What differs:

- figures are float32, where diffusers works in the logits' dtype (nucleus, Amused's softmax, entropies of bfloat16);
- ids that tie with the last of the nucleus stay in it, and of equally sure positions the first is committed first;
- a row of NaN gives the lowest id and NaN, where diffusers raises if it reads the values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastmask import _check, functional
from fastmask._entropy_bound import accepted_positions

try:
    from diffusers import SchedulerMixin  # noqa: F401 a pipeline that was saved with ours looks here how to load it
    from diffusers.schedulers import scheduling_amused, scheduling_block_refinement, scheduling_entropy_bound
except ImportError as error:
    raise ImportError(
        f"expected diffusers of at least 0.39 for fastmask.diffusers, received: {error}; "
        "install it with pip install 'fastmask[diffusers]'"
    ) from error

__all__ = ["AmusedScheduler", "BlockRefinementScheduler", "EntropyBoundScheduler", "halton_order"]

_LOG_PROB_OF_GIVEN = math.log(torch.finfo(torch.float32).max)  # diffusers', of ids that were not masked


class BlockRefinementScheduler(scheduling_block_refinement.BlockRefinementScheduler):
    """Commits the surest tokens of a block in each step, and overwrites those that the model would change.

    Used by diffusers' LLaDA2Pipeline (with a mask) and DiffusionGemmaPipeline (without one: uniform corruption).
    Arguments as of diffusers' class.

    Source: LLaDA2.1 (https://arxiv.org/abs/2602.08676); diffusers 0.42.1, scheduling_block_refinement.py.

    Example:
        >>> scheduler = BlockRefinementScheduler(block_length=4)
        >>> scheduler.set_timesteps(2)
        >>> logits = torch.eye(6)[None, :4] * torch.tensor([[1.0], [4.0], [2.0], [3.0]])
        >>> scheduler.step(logits, 0, torch.full((1, 4), 5), mask_token_id=5).prev_sample
        tensor([[5, 1, 5, 3]])
    """

    _committed: Tensor | None  # [B, N] bool, of uniform corruption

    @staticmethod
    def _sample_from_logits(
        logits: Tensor,
        *,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        generator: torch.Generator | None,
        use_multinomial: bool,
    ) -> tuple[Tensor, Tensor]:
        """One token of each row of logits [..., V] floating point: ids [...] int64, probabilities float32.

        At temperature 0 the filters are ignored; else they, and the probabilities, are of the heated law.
        """
        if temperature < 0:
            raise ValueError(f"`temperature` must be >= 0, got {temperature}.")
        shape = logits.shape[:-1]
        logits = logits.reshape(math.prod(logits.shape[:-2]), *logits.shape[-2:])  # [B, N, V] as they are
        if temperature == 0.0 or not use_multinomial:
            sampled = functional.sample_tokens(logits, temperature=0.0, seed=0)  # the generator is not drawn from
            return sampled.ids.view(shape), sampled.log_probs.exp().view(shape)
        if top_p is not None and not top_p > 0.0:
            raise ValueError(f"`top_p` must be in (0, 1], got {top_p}.")
        sampled = functional.sample_tokens(
            logits,
            temperature=temperature,
            top_k=None if top_k is None or top_k <= 1 else top_k,
            min_p=1.0 if top_k == 1 else None,  # all that tie with the largest: top_k=1 would be the first alone
            top_p=None if top_p is None or top_p >= 1.0 else top_p,
            processed=True,
            generator=generator,
        )
        return sampled.ids.view(shape), sampled.log_probs.exp().view(shape)

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        mask_token_id: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        sampling_method: str = "auto",
        threshold: float | None = None,
        editing_threshold: float | None = None,
        minimal_topk: int | None = None,
        prompt_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> scheduling_block_refinement.BlockRefinementSchedulerOutput | tuple[Tensor, ...]:
        """One refinement step.

        Args:
            model_output: [B, N, V] floating point, logits.
            timestep: index of the step in its block; a tensor is waited for.
            sample: [B, N] int64, the ids that the model saw.
            mask_token_id: None for uniform corruption: what is not committed gets random ids.
            temperature, top_p, top_k, sampling_method, threshold, editing_threshold, minimal_topk, prompt_mask,
                return_dict: as in diffusers; minimal_topk has no effect there either, prompt_mask not without a mask.
            generator: default torch's own of the device.

        Returns:
            BlockRefinementSchedulerOutput, or a tuple of its fields.

        Raises:
            ValueError: a temperature below 0, top_p not above 0.

        Randomness: one seed of the generator where the temperature is above 0, then the random ids as diffusers draws
        them.
        """
        if threshold is None:
            threshold = self.config.threshold
        if editing_threshold is None:
            editing_threshold = self.config.editing_threshold
        use_multinomial = sampling_method == "multinomial" or (sampling_method == "auto" and temperature != 0.0)
        ids, probs = self._sample_from_logits(
            model_output,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            generator=generator,
            use_multinomial=use_multinomial,
        )
        step_index = int(timestep)
        if mask_token_id is None:
            is_editable = self._committed
            if step_index == 0 or is_editable is None or is_editable.shape != sample.shape:
                is_editable = torch.zeros_like(sample, dtype=torch.bool)
            due = -(-(step_index + 1) * sample.shape[1] // self.num_inference_steps)  # so far, rounded up
            is_committed = _surest(probs, ~is_editable, due - is_editable.sum(dim=-1), threshold)
            self._committed = committed = is_editable | is_committed
            edits = editing_threshold is not None  # of any threshold, in this mode
        else:
            is_open = sample == mask_token_id
            is_editable = ~is_open if prompt_mask is None else ~is_open & ~prompt_mask
            if self._transfer_schedule is None:
                is_committed = torch.zeros_like(is_open)
            else:
                due = self._transfer_schedule[min(step_index, len(self._transfer_schedule) - 1)]
                is_committed = _surest(probs, is_open, due, threshold)
            edits = editing_threshold is not None and editing_threshold > 0.0
        if edits:
            is_edited = is_editable & (ids != sample) & (probs > float(editing_threshold))
        else:
            is_edited = torch.zeros_like(is_committed)
        prev_sample = torch.where(is_committed | is_edited, ids, sample)
        if mask_token_id is None:
            prev_sample = prev_sample.where(committed, _random_ids(model_output, generator))
        output = (prev_sample, is_committed, is_edited, ids, probs, model_output)
        return scheduling_block_refinement.BlockRefinementSchedulerOutput(*output) if return_dict else output

    @staticmethod
    def check_eos_finished(
        cur_x: Tensor,
        sampled_tokens: Tensor,
        final_transfer: Tensor,
        finished: Tensor,
        eos_token_id: int,
        mask_token_id: int,
        prompt_length: int,
    ) -> Tensor:
        """Marks in ``finished`` [B] bool, in place, the sequences in which an EOS has just been committed and whose
        first EOS in cur_x [B, L] int64 is generated and has no mask before it; arguments as of diffusers' method."""
        position = torch.arange(cur_x.shape[1], device=cur_x.device)
        is_eos = cur_x == eos_token_id
        first = is_eos.int().argmax(dim=-1, keepdim=True)
        is_masked_before = (cur_x == mask_token_id) & (position >= prompt_length) & (position < first)
        is_ended = is_eos.any(dim=-1) & (first[:, 0] >= prompt_length) & ~is_masked_before.any(dim=-1)
        finished |= ((sampled_tokens == eos_token_id) & final_transfer).any(dim=-1) & is_ended
        return finished


class EntropyBoundScheduler(scheduling_entropy_bound.EntropyBoundScheduler):
    """Accepts the positions of the lowest entropies, as many as an entropy bound allows; random ids elsewhere.

    Used by diffusers' DiffusionGemmaPipeline. Arguments as of diffusers' class.

    Source: EB-Sampler (https://arxiv.org/abs/2505.24857), algorithm 1; diffusers 0.42.1, scheduling_entropy_bound.py.

    Example:
        >>> scheduler = EntropyBoundScheduler(t_max=1.0, t_min=1.0)
        >>> logits = torch.tensor([[[9.0, 0.0], [0.0, 0.0], [0.0, 9.0]]])
        >>> scheduler.step(logits, 0, torch.zeros(1, 3, dtype=torch.int64)).accepted_index
        tensor([[True, True, True]])
        >>> scheduler.step(logits, 0, torch.zeros(1, 3, dtype=torch.int64), entropy_bound=0.0).accepted_index
        tensor([[ True, False, False]])
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        entropy_bound: float | None = None,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> scheduling_entropy_bound.EntropyBoundSchedulerOutput | tuple[Tensor, ...]:
        """One denoising step.

        Args:
            model_output: [B, N, V] floating point, logits.
            timestep: index of the step, of which the temperature is; a tensor is waited for.
            sample: [B, N] int64, the ids that the model saw.
            entropy_bound: nats, at least 0; default the configuration's.
            generator: default torch's own of the device.
            return_dict: as in diffusers.

        Returns:
            EntropyBoundSchedulerOutput, or a tuple of its fields.

        Raises:
            ValueError: a negative entropy_bound, with which diffusers accepts nothing.

        Randomness: one seed of the generator, then the random ids as diffusers draws them.
        """
        if entropy_bound is None:
            entropy_bound = self.config.entropy_bound
        fraction = (self.num_inference_steps - int(timestep)) / self.num_inference_steps
        pred_logits = model_output / (self.config.t_min + (self.config.t_max - self.config.t_min) * fraction)
        sampled = functional.sample_tokens(pred_logits, with_entropy=True, generator=generator)
        assert sampled.entropies is not None
        is_accepted = accepted_positions(sampled.entropies, entropy_bound)
        prev_sample = sampled.ids.where(is_accepted, _random_ids(pred_logits, generator))
        output = (prev_sample, is_accepted, sampled.ids, sampled.log_probs.exp(), pred_logits)
        return scheduling_entropy_bound.EntropyBoundSchedulerOutput(*output) if return_dict else output


class AmusedScheduler(scheduling_amused.AmusedScheduler):
    """Samples every masked token, and masks the least sure again, by their noised confidence.

    Used by diffusers' AmusedPipeline, AmusedImg2ImgPipeline and AmusedInpaintPipeline. Arguments as of diffusers'
    class.

    Source: MaskGIT (https://arxiv.org/abs/2202.04200), section 3.2; aMUSEd (https://arxiv.org/abs/2401.01808);
    diffusers 0.42.1, scheduling_amused.py.

    Example:
        >>> scheduler = AmusedScheduler(mask_token_id=9)
        >>> scheduler.set_timesteps(4)
        >>> sample = torch.full((1, 4, 4), 9)
        >>> for timestep in range(3, -1, -1):
        ...     sample = scheduler.step(torch.zeros(1, 9, 4, 4), timestep, sample).prev_sample
        ...     print(int((sample == 9).sum()))
        14
        11
        6
        0
    """

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        starting_mask_ratio: float = 1.0,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> scheduling_amused.AmusedSchedulerOutput | tuple[Tensor, ...]:
        """One demasking step, which does not wait for a timestep that is a tensor either.

        Args:
            model_output: [B, V, H, W] floating point, logits; or [B, N, V].
            timestep: one of ``timesteps``.
            sample: [B, H, W] int64, the ids that the model saw; or [B, N].
            starting_mask_ratio: the share of masks in the first step.
            generator: default torch's own of the device.
            return_dict: as in diffusers.

        Returns:
            AmusedSchedulerOutput, or a tuple of its fields.

        Raises:
            ValueError: an unknown masking schedule.

        Randomness: one seed of the generator.
        """
        shape = sample.shape
        if sample.ndim == 3 and model_output.ndim == 4:
            sample, model_output = sample.flatten(1), model_output.flatten(2).mT
        is_masked = sample == self.config.mask_token_id
        seed = functional.draw_seed(sample.device, generator)
        position = torch.arange(sample.numel(), device=sample.device)
        rows = position.where(is_masked.flatten(), -1)
        sampled = functional.sample_tokens(model_output, row_indices=rows, seed=seed)
        pred_original_sample = sampled.ids.view_as(sample).where(is_masked, sample)
        prev_sample = pred_original_sample
        if isinstance(timestep, Tensor) or timestep != 0:
            step_index = (self.timesteps == timestep).int().argmax(dim=0, keepdim=True)
            mask_len = (sample.shape[1] * (starting_mask_ratio * self._mask_ratio(step_index))).floor()
            counts = mask_len.minimum(is_masked.sum(dim=-1) - 1).clamp(min=1).long()
            log_probs = sampled.log_probs.view_as(sample).where(is_masked, _LOG_PROB_OF_GIVEN)
            minus_noise = functional.confidence_remask_keys(
                torch.zeros_like(log_probs), choice_temperature=1.0, seed=seed
            )
            remask_keys = self.temperatures.index_select(0, step_index) * minus_noise - log_probs
            chosen = functional.select_to_remask(remask_keys, torch.ones_like(is_masked), counts)
            # As in diffusers what ties with the surest of the others stays, beyond the count.
            surest_kept = remask_keys.masked_fill(chosen, -torch.inf).amax(dim=-1, keepdim=True)
            is_masked_again = (remask_keys > surest_kept) & (timestep != 0)
            prev_sample = prev_sample.masked_fill(is_masked_again, self.config.mask_token_id)
        output = (prev_sample.view(shape), pred_original_sample.view(shape))
        return scheduling_amused.AmusedSchedulerOutput(*output) if return_dict else output

    def _mask_ratio(self, step_index: Tensor) -> Tensor:
        """What share of a sequence is masked after a step [1] int64; [1] float32, with diffusers' roundings."""
        ratio = (step_index + 1).float() / len(self.timesteps)
        if self.config.masking_schedule == "cosine":
            return torch.cos(ratio * math.pi / 2)
        if self.config.masking_schedule == "linear":
            return 1 - ratio
        raise ValueError(f"unknown masking schedule {self.config.masking_schedule}")


def _surest(confidence: Tensor, is_open: Tensor, num_commits: Tensor, threshold: float) -> Tensor:
    """The open positions [B, N] that are committed: num_commits [] or [B] of each sequence at least, and all whose
    confidence is above the threshold."""
    counts = (is_open.sum(dim=-1) - num_commits.clamp(min=0)).clamp(min=0)
    return is_open & ~functional.select_to_remask(-confidence, is_open, counts, min_remask_key=-float(threshold))


def _random_ids(logits: Tensor, generator: torch.Generator | None) -> Tensor:
    """One id of V for each row of logits [B, N, V]."""
    return torch.randint(0, logits.shape[-1], logits.shape[:-1], device=logits.device, generator=generator)


def halton_order(height: int, width: int) -> Tensor:
    """The place of each position of a grid in the order of the Halton sequence of bases 2 (rows) and 3 (columns).

    ``-halton_order(height, width).float()`` is a ``score`` of ``generate`` (and, for each sequence, of
    :func:`fastmask.functional.demask_step`), by which what is committed in a step is spread over the whole image.

    Args:
        height, width: H and W of the grid of tokens, at least 1.

    Returns:
        [H W] int64, 0 for what is committed first; a permutation. Row after row, as images are flattened.

    Source: Halton-MaskGIT (https://arxiv.org/abs/2503.17076), section 4, and its public code: the cells of the points
    1, 2, ... of the sequence, each at its first point. In integers here, in float32 there.

    Example:
        >>> halton_order(2, 3).view(2, 3)
        tensor([[5, 3, 1],
                [2, 0, 4]])
    """
    height, width = _check.integer("height", height, 1), _check.integer("width", width, 1)
    places: dict[int, int] = {}
    point = 0
    while len(places) < height * width:
        point += 1
        cell = _radical_inverse(point, 2, height) * width + _radical_inverse(point, 3, width)
        places.setdefault(cell, len(places))
    return torch.tensor([places[cell] for cell in range(height * width)])


def _radical_inverse(point: int, base: int, size: int) -> int:
    """Which of ``size`` equal parts of [0, 1) a point of the van der Corput sequence lies in."""
    numerator, denominator = 0, 1
    while point:
        point, digit = divmod(point, base)
        numerator, denominator = numerator * base + digit, denominator * base
    return size * numerator // denominator
