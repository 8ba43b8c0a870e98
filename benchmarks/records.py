"""The nouns of the benchmarks: contenders, the problems they are run on, floors, ceilings and published figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

Row = dict[str, Any]  # what a results file has of one contender at one case
Runs = Mapping[str, Callable[[], object]]

# What a contender is given, where that differs between contenders (the losses): the mask; labels with -100 where
# unmasked; or the masked rows, which are gathered in the run that is timed, and their gradient put back.
WITH_MASK = "given the mask"
ALL_ROWS = "all rows"
GATHERED = "gathered rows"
# What only tells which ids were sampled, and nothing of how probable they are: less work, and told apart.
IDS_ONLY = "ids only"

UNITS = {"GB/s": 1e9, "TFLOP/s": 1e12, "tokens/s": 1.0}


@dataclass(frozen=True)
class Contender:
    """One way to do the job of a benchmark.

    ``load`` imports what it needs and returns what the problem's ``run`` takes, a function as a rule.
    """

    name: str
    given: str
    load: Callable[[], Any]
    is_ours: bool = False
    is_baseline: bool = False
    overwrites: bool = False  # its input, which is put back before each run, not timed
    needs_cuda: bool = False
    keeps_memory: bool = False  # from run to run, so that what one allocates besides tells nothing
    timed_if_wrong: bool = False  # what people run today: its time is told all the same, beside its errors

    def __str__(self) -> str:
        return f"{self.name}, {self.given}" if self.given else self.name


class Problem(Protocol):
    """One case's tensors, drawn once, and the reference every contender is held to.

    device: where the case runs; inputs: tensors of the size of what a contender allocates; limits: the most that
    each of ``errors`` may be.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def inputs(self) -> tuple[Tensor, ...]: ...

    @property
    def limits(self) -> Mapping[str, float]: ...

    def restore(self, contender: Contender) -> None:
        """Puts back what the contender overwrote."""

    def run(self, contender: Contender, function: Any) -> Any:
        """What is timed, and its results."""

    def errors(self, step: Step) -> dict[str, float]:
        """How far the results of ``step.run``, called as often as needed, are from the reference; NaN is wrong."""


@dataclass(frozen=True)
class Step:
    """A contender ready to be timed: ``restore`` what it overwrote (not timed), then ``run``."""

    contender: Contender
    function: Any
    problem: Problem

    def restore(self) -> None:
        self.problem.restore(self.contender)

    def run(self) -> Any:
        return self.problem.run(self.contender, self.function)


@dataclass(frozen=True)
class Ceilings:
    """What this machine was measured to do.

    copy: GB/s, bytes read plus bytes written. product: TFLOP/s of a large matrix product.
    """

    copy: float
    product: float


@dataclass(frozen=True)
class Floor:
    """What a case must at least move (bytes) or multiply (FLOP), and the machine's measured rate in ``unit``.

    Without a rate the amount is only what throughput is told in. With ``logits`` the time is also told in bytes a
    logit at that rate.
    """

    amount: float
    rate: float | None
    unit: str
    logits: int = 0

    @property
    def milliseconds(self) -> float | None:
        return None if self.rate is None else self.amount / (self.rate * UNITS[self.unit]) * 1e3

    def rate_of(self, milliseconds: float) -> float:
        """The rate in ``unit`` of a run that took so long."""
        return self.amount / (milliseconds * 1e-3) / UNITS[self.unit]


@dataclass(frozen=True)
class Published:
    """A figure of somebody else's on another machine: stated beside ours, never mixed with measured ones."""

    who: str
    rate: float
    unit: str
    source: str
