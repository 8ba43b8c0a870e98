"""The formulas in which fastmask and x-transformers 2.31.10 differ, as one object for each.

The wrapper takes fastmask's, or under ``compat=True`` x-transformers', and asks no further: for people who must
reproduce old runs, the loss is then the same for the same masks and ids, and so is the arithmetic of sampling.
``docs/compat.md`` says why each formula differs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask import functional
from fastmask.backbone import Output
from fastmask.records import Counts, Draws, MaskedTokens, Sampled, Sampling
from fastmask.schedules import LINEAR, Schedule, exact_ratios, num_remaining, step_ratios

# Neither library lets a temperature fall to 0: in generation, and in the sample that a critic is trained on.
MIN_TEMPERATURE = 1e-3
MIN_CRITIC_TEMPERATURE = 1e-10
# Noise on the confidence in generation: MaskGIT's public code, https://github.com/google-research/maskgit
CHOICE_TEMPERATURE = 4.5


class Proposal(NamedTuple):
    """What ids are sampled from, and how.

    rows: [M] int64, flat positions; -1 for no row. draws: where fastmask's random numbers come from. generator: where
    x-transformers' come from. kept_ids: [M] int64, an id that is kept there, or -1 to sample one; None samples all.
    """

    out: Output
    rows: Tensor
    sampling: Sampling
    draws: Draws
    generator: torch.Generator | None
    kept_ids: Tensor | None = None


class Formulas:
    """fastmask's."""

    random_may_be_mask = False
    token_may_be_mask = False
    takes_any_schedule = False
    draws_by_rows = True  # whatever a batch is split into
    choice_temperature = CHOICE_TEMPERATURE

    def check_options(self, **options: object) -> None:
        """Refuses options of ``generate`` that there is no formula for; None is one that was not given."""

    def of_tokens(self, out: Output, net: Any, num_tokens: int, mask_id: int) -> Output:
        """What a network gave, for the ids there are: the mask is none of its predictions."""
        return out.of_tokens(net, num_tokens, mask_id)

    # Training

    def loss_weights(self, schedule: Schedule, masked: MaskedTokens) -> Tensor:
        """What each sequence's loss is multiplied with, [B]."""
        return masked.loss_weights

    def loss_denominator(self, counts: Counts) -> Tensor | float:
        """What the sum of the weighted losses is divided by."""
        return counts.num_maskable

    def first_condition(self, null_embed: Tensor) -> Tensor | None:
        """The embedding that the earlier pass of a training step is conditioned on; None for none."""
        return null_embed

    def critic_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Those of the network's arguments that its critic gets too."""
        return arguments

    def critic_sample(self, proposal: Proposal, x: Tensor, masked: MaskedTokens) -> tuple[Tensor, Tensor]:
        """x [B, N] with its masked rows sampled, and where the critic should find it wrong, [B, N] bool."""
        sampled = Sampled(x.long().contiguous().clone(), torch.zeros(x.shape, dtype=torch.float32, device=x.device))
        sampling = proposal.sampling
        sampling = sampling._replace(temperature=max(sampling.temperature, MIN_CRITIC_TEMPERATURE))
        self.sample_(proposal._replace(sampling=sampling), sampled)
        generated = sampled.ids.to(x.dtype)
        return generated, generated != x

    # Generation

    def step_ratios(self, schedule: Schedule, steps: int) -> Tensor:
        """The mask ratio after each step, [steps] on the CPU."""
        return exact_ratios(schedule, steps)

    def num_remaining(self, ratios: Tensor, num_maskable: int) -> Tensor:
        """How many of so many positions remain masked at these ratios, int64; the lower the ratio the fewer."""
        return num_remaining(ratios, num_maskable)

    def temperature(self, start: float, remaining: float) -> float:
        """The temperature of a step after which this share of the steps remains; from 0 on it is 0."""
        return max(start * remaining, MIN_TEMPERATURE) if start > 0.0 else 0.0

    def sample_(self, proposal: Proposal, sampled: Sampled) -> None:
        """Samples rows in place: writes ids and log_probs [B, N] there."""
        out, rows, sampling, draws, _, kept_ids = proposal
        functional.sample_tokens(
            out.logits,
            row_indices=rows,
            seq_len=sampled.ids.shape[1],
            kept_ids=kept_ids,
            out=sampled,
            **sampling._asdict(),
            **draws._asdict(),
        )


# Numbers of generate that x-transformers has, or that leave its formulas as they are.
_OWN_OPTIONS = ("start_temperature", "filter_thres", "noise_level_scale", "choice_temperature", "sample_offset")


class XTransformersFormulas(Formulas):
    """x-transformers' own."""

    random_may_be_mask = True
    token_may_be_mask = True
    takes_any_schedule = True
    draws_by_rows = False
    choice_temperature = 0.0

    def check_options(self, **options: object) -> None:
        given = {name: value for name, value in options.items() if value is not None}
        received = [name for name in given if name not in _OWN_OPTIONS]
        if received:
            raise ValueError(f"expected compat=False with {', '.join(received)}=, which x-transformers does not have")
        received = [name for name, value in given.items() if isinstance(value, Tensor) and value.ndim]
        if received:
            raise ValueError(f"expected compat=False with {', '.join(received)} of each sequence, received tensors")

    def of_tokens(self, out: Output, net: Any, num_tokens: int, mask_id: int) -> Output:
        """The same; but every column is a prediction, the mask's too."""
        return out

    def loss_weights(self, schedule: Schedule, masked: MaskedTokens) -> Tensor:
        """schedule' / (1 - schedule), taken on the mask ratio: negative."""
        return schedule.slope(masked.times) / (1.0 - schedule(masked.times))

    def loss_denominator(self, counts: Counts) -> Tensor | float:
        return counts.num_masked

    def first_condition(self, null_embed: Tensor) -> Tensor | None:
        return None

    def critic_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {}

    def critic_sample(self, proposal: Proposal, x: Tensor, masked: MaskedTokens) -> tuple[Tensor, Tensor]:
        """The same; but wrong is every position, masked or not, where the sample is not the token."""
        out, _, sampling, _, generator, _ = proposal
        logits = out.logits_of(torch.arange(x.numel(), device=x.device))
        ids = sample_tokens(logits, temperature=sampling.temperature, top_k=None, generator=generator).ids.view_as(x)
        return x.where(~masked.is_masked, ids.to(x.dtype)), ids != x

    # Generation

    def step_ratios(self, schedule: Schedule, steps: int) -> Tensor:
        return step_ratios(LINEAR if schedule.is_constant else schedule, steps, torch.float32).float()

    def num_remaining(self, ratios: Tensor, num_maskable: int) -> Tensor:
        """Truncation toward zero of float32(schedule(t) n): where it rounds below an integer, one position fewer."""
        # On the CPU a float32 product that is cut off: the cosine ends at -1e-5, which floor would turn into -1.
        return (ratios * num_maskable).long().clamp(0, num_maskable)

    def temperature(self, start: float, remaining: float) -> float:
        return max(start * remaining, MIN_TEMPERATURE)

    def sample_(self, proposal: Proposal, sampled: Sampled) -> None:
        """The same; but a kept id has the probability of the one that was sampled."""
        out, rows, sampling, _, generator, kept_ids = proposal
        ids, log_probs, *_ = sample_tokens(
            out.logits_of(rows), temperature=sampling.temperature, top_k=sampling.top_k, generator=generator
        )
        sampled.ids.view(-1)[rows] = ids if kept_ids is None else kept_ids.where(kept_ids >= 0, ids)
        sampled.log_probs.view(-1)[rows] = log_probs


FASTMASK = Formulas()
X_TRANSFORMERS = XTransformersFormulas()


def sample_tokens(
    logits: Tensor, *, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Sampled:
    """x-transformers' Gumbel-max over logits [M, V].

    Noise and probabilities are in the logits' dtype. Exactly top_k logits are kept. mask_id is not excluded.
    """
    if top_k is not None:
        values, indices = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter_(-1, indices, values)
    if generator is not None and generator.device != logits.device:
        seed = torch.randint(2**62, (), device=generator.device, generator=generator)
        generator = torch.Generator(logits.device).manual_seed(int(seed))
    uniform = torch.zeros_like(logits).uniform_(0, 1, generator=generator)
    noise = -_log(-_log(uniform))
    ids = (logits / max(temperature, MIN_CRITIC_TEMPERATURE) + noise).argmax(dim=-1)
    probs = logits.softmax(dim=-1).gather(-1, ids[:, None]).squeeze(-1)
    return Sampled(ids, probs.float().log())


def _log(x: Tensor) -> Tensor:
    # The uniform 0, one in 256 of bfloat16's, becomes noise of -3.1, not of -inf.
    return torch.log(x + 1e-10)
