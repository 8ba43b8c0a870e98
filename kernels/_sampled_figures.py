"""A row's sample as the kernels of sample_tokens leave it: its id, and the figures of its law. Of one row they are
numbers, of several vectors."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from fastmask.kernels import _math
from fastmask.kernels import _tile_race as race

# Where all others weigh less than this beside the largest's 1, that would round them away: log p, their sum, is
# formed without it. Above, the sum's own rounding is below 5e-6 of log p.
SURE = tl.constexpr(1 / 16)


class Written(NamedTuple):
    """Where a sample is written. margins_ptr, entropies_ptr: None where nobody asks."""

    ids_ptr: tl.tensor
    log_probs_ptr: tl.tensor
    margins_ptr: tl.tensor | None
    entropies_ptr: tl.tensor | None


class Law(NamedTuple):
    """What of a row's law its figures are made of.

    top: the largest logit. total: the sum of exp((z - top) / T). log_total: its logarithm. over_temperature: 1 / T,
    None for 1. threshold: what is below it does not count, None for none. keeps_one: whether the largest logit alone
    stays, None for no row. is_lawful: whether there is a law.
    """

    top: tl.tensor
    total: tl.tensor
    log_total: tl.tensor
    over_temperature: tl.tensor | None
    threshold: tl.tensor | None
    keeps_one: tl.tensor | None
    is_lawful: tl.tensor


@triton.jit
def store_stray(written, out, mask):
    """What is written where no row is listed."""
    tl.store(written.ids_ptr + out, -1, mask=mask)
    tl.store(written.log_probs_ptr + out, 0.0, mask=mask)
    if written.margins_ptr is not None:
        tl.store(written.margins_ptr + out, 0.0, mask=mask)
    if written.entropies_ptr is not None:
        tl.store(written.entropies_ptr + out, 0.0, mask=mask)


@triton.jit
def store_sample(written, out, mask, law, id, largest_id, z_chosen, KEEPS_ONE: tl.constexpr):
    """The id, and its logarithmic probability, of its logit; largest_id: which one KEEPS_ONE keeps."""
    log_prob = race.nats(z_chosen - law.top, law.over_temperature) - law.log_total
    if law.threshold is not None:  # a kept id may lie below it
        log_prob = tl.where(z_chosen < law.threshold, -float("inf"), log_prob)
    log_prob_of_one = tl.where(id == largest_id, 0.0, z_chosen - float("inf"))
    if KEEPS_ONE:
        log_prob = log_prob_of_one
    if law.keeps_one is not None:
        log_prob = tl.where(law.keeps_one, log_prob_of_one, log_prob)
    tl.store(written.ids_ptr + out, id, mask=mask)
    tl.store(written.log_probs_ptr + out, tl.where(law.is_lawful, log_prob, float("nan")), mask=mask)


@triton.jit
def store_margin(written, out, mask, law, second, KEEPS_ONE: tl.constexpr):
    """By how much the likeliest id is likelier than the next, whose logit is the second largest."""
    if KEEPS_ONE:
        margin = tl.where(law.is_lawful, 1.0, float("nan"))
    else:
        if law.threshold is not None:
            second = tl.where(second < law.threshold, -float("inf"), second)
        # 1 - exp(-gap), to relative accuracy where the two are close.
        half = _math.tanh(race.nats(0.5 * (law.top - second), law.over_temperature))
        margin = tl.where(second == -float("inf"), 1.0, 2.0 * half / (1.0 + half)) / law.total
        if law.keeps_one is not None:
            margin = tl.where(law.keeps_one, 1.0, margin)
        margin = tl.where(law.is_lawful, margin, float("nan"))
    tl.store(written.margins_ptr + out, margin, mask=mask)


@triton.jit
def store_entropy(written, out, mask, law, energy, KEEPS_ONE: tl.constexpr):
    """The entropy, by the sum of exp((z - top) / T) (z - top)."""
    if KEEPS_ONE:
        entropy = tl.where(law.is_lawful, 0.0, float("nan"))
    else:
        entropy = tl.maximum(law.log_total - race.nats(energy / law.total, law.over_temperature), 0.0)
        if law.keeps_one is not None:
            entropy = tl.where(law.keeps_one, 0.0, entropy)
        entropy = tl.where(law.is_lawful, entropy, float("nan"))
    tl.store(written.entropies_ptr + out, entropy, mask=mask)
