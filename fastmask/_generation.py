"""What a generation knows before it starts: no step of it waits for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmask._copies import moved
from fastmask.schedules import Schedule, step_counts


class Step(NamedTuple):
    """One step of a plan.

    number: from 0. left: the share of steps that follow. num_rows: the places of the list of masked positions before
    the step; num_left: after it. runs: whether the step can change anything.
    """

    number: int
    left: float
    num_rows: int
    num_left: int
    runs: bool


class Plan(NamedTuple):
    """All steps, with what they need on the device.

    counts: [steps, B] int64, how many positions of each sequence stay masked at most. row_starts: [steps, B + 1]
    int64, where the list of masked positions after a step keeps those of each sequence.
    """

    steps: tuple[Step, ...]
    counts: Tensor
    row_starts: Tensor


def plan(
    schedule: Schedule,
    steps: int,
    num_maskable: Tensor,
    device: torch.device,
    *,
    may_remask: bool,
    by_threshold: bool,
    always_runs: bool,
    bound: int | None,
) -> Plan:
    """Every step of a generation.

    Args:
        num_maskable: [B] int64 on the CPU, how many positions of each sequence are open.
        may_remask: whether what is committed may be masked again.
        by_threshold: whether a step commits one position at least and as many as it likes, rather than as the
            schedule says.
        always_runs: whether even a step that commits nothing can change what follows.
        bound: a number that no element of num_maskable exceeds: the plan's shape then depends on it alone.
    """

    def counts_of(num_maskable: Tensor) -> Tensor:
        if by_threshold:
            counts = (num_maskable - torch.arange(1, steps + 1, device="cpu")[:, None]).clamp(min=0)
            counts[-1:] = 0
            return counts
        counts = step_counts(schedule, steps, num_maskable)
        # What is committed stays committed.
        return counts if may_remask else torch.cat([num_maskable[None], counts]).cummin(dim=0).values[1:]

    counts = counts_of(num_maskable)
    places = counts if bound is None else counts_of(torch.full_like(num_maskable, bound))
    before = torch.cat([num_maskable[None] if bound is None else torch.full_like(counts[:1], bound), places[:-1]])
    # A step that commits nothing changes nothing, unless the next one is conditioned on it.
    open_ahead = before.any(dim=-1) | places.any(dim=-1).flip(0).cummax(dim=0).values.flip(0)
    runs = open_ahead & ((places < before).any(dim=-1) | always_runs | (bound is not None))
    starts = torch.cat([torch.zeros_like(places[:, :1]), places.cumsum(dim=-1)], dim=-1)
    sizes = zip(before.sum(dim=-1).tolist(), places.sum(dim=-1).tolist(), runs.tolist(), strict=True)
    return Plan(
        tuple(Step(number, (steps - 1 - number) / steps, *size) for number, size in enumerate(sizes)),
        moved(counts, device),
        moved(starts, device),
    )
