"""Options of which each sequence has its own, as kernels read them: once for each row."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.records import PerSequence, Sampling

_LOG2E = math.log2(math.e)


class OwnOptions(NamedTuple):
    """[B] each; None where one number is for all.

    factors: log2(e) / T of the samples, float32. figure_factors: likewise, of figures and filters. num_kept: k, int32
    in [1, V]. gaps: T log(min_p), float32. top_ps: float32. is_greedy: bool, whether the largest logit is taken.
    keeps_one: bool, whether it stays alone. is_lawful: bool, whether the options are a law.
    """

    factors: Tensor | None = None
    figure_factors: Tensor | None = None
    num_kept: Tensor | None = None
    gaps: Tensor | None = None
    top_ps: Tensor | None = None
    is_greedy: Tensor | None = None
    keeps_one: Tensor | None = None
    is_lawful: Tensor | None = None

    @property
    def are_any(self) -> bool:
        """Whether a sequence has anything of its own."""
        return bool([values for values in self if values is not None])


def own_options(per_sequence: PerSequence | None, sampling: Sampling, num_ids: int) -> OwnOptions:
    """What kernels over num_ids ids read, computed as precisely as numbers are, so that it rounds as they do.

    NaN and a temperature below 0 are no law; what else is outside of its range is as the range's end.
    """
    own, lawful, greedy = OwnOptions(), [], []
    if per_sequence is None:
        return own
    temperature, top_k, min_p, top_p = per_sequence
    figures_at: float | Tensor = sampling.temperature_of_figures
    if temperature is not None:
        temperature = temperature.double()
        lawful.append(temperature >= 0.0)
        greedy.append(temperature == 0.0)
    if temperature is not None and not sampling.is_greedy:
        limits = torch.finfo(torch.float32)
        factors = (_LOG2E / temperature.where(lawful[0], 1.0)).clamp(limits.tiny, limits.max).float()
        own = own._replace(factors=factors)
        if sampling.processed:
            is_hot = temperature > 0.0
            own = own._replace(figure_factors=factors.where(is_hot, _LOG2E))
            figures_at = temperature.where(is_hot, 1.0).clamp(max=torch.finfo(torch.float64).max)
    if top_k is not None:
        own = own._replace(num_kept=top_k.clamp(1, num_ids).int(), keeps_one=top_k <= 1)
        greedy.append(top_k <= 1)
    if min_p is not None:
        lawful.append(~min_p.isnan())
        own = own._replace(gaps=(figures_at * min_p.double().nan_to_num(1.0).clamp(0.0, 1.0).log()).float())
    elif sampling.min_p is not None and isinstance(figures_at, Tensor):
        own = own._replace(gaps=(figures_at * math.log(sampling.min_p)).float())
    if top_p is not None:
        lawful.append(~top_p.isnan())
        own = own._replace(top_ps=top_p.double().nan_to_num(1.0).clamp(0.0, 1.0).float())
    return own._replace(is_greedy=_together(torch.logical_or, greedy), is_lawful=_together(torch.logical_and, lawful))


def _together(operation: Callable[[Tensor, Tensor], Tensor], conditions: list[Tensor]) -> Tensor | None:
    return reduce(operation, conditions) if conditions else None


@triton.jit
def own(values_ptr, number, flat, seq_len, is_row=None):
    """What the sequence of a row's flat position has of its own, or the number that is for all.

    is_row: which of several flat positions are any; None for all.
    """
    return number if values_ptr is None else tl.load(values_ptr + flat // seq_len, mask=is_row)


@triton.jit
def holds(conditions_ptr, flat, seq_len, is_row=None):
    """Whether a condition holds of the sequence of a row's flat position."""
    return tl.load(conditions_ptr + flat // seq_len, mask=is_row) != 0
