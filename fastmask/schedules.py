"""Schedules: t in [0, 1] to the mask ratio, its derivative, and the weight of the loss."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask._devices import device_of

TensorFn = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Schedule:
    """A mask ratio as a function of time, with its derivative.

    Args:
        ratio: maps t, float32 of any shape in [0, 1], to the share of positions masked, same shape.
        derivative: d ratio / dt, likewise; taken by autograd where None.
        name: "linear" or "cosine" for the two that the kernels evaluate themselves.

    Example:
        >>> square = Schedule(lambda t: 1 - t**2)
        >>> square(torch.tensor([0.0, 0.5])), square.slope(torch.tensor([0.0, 0.5]))
        (tensor([1.0000, 0.7500]), tensor([-0., -1.]))
    """

    ratio: TensorFn
    derivative: TensorFn | None = None
    name: str | None = None

    def __call__(self, t: Tensor) -> Tensor:
        return self.ratio(t)

    def slope(self, t: Tensor) -> Tensor:
        """d ratio / dt at t, same shape as t.

        Raises:
            ValueError: no derivative was given and ``ratio`` does not carry a gradient.
        """
        if self.derivative is not None:
            return self.derivative(t)
        with torch.inference_mode(False), torch.enable_grad():
            t = t.detach().clone().requires_grad_()
            ratio = self.ratio(t)
            if not ratio.requires_grad:
                raise ValueError(
                    "expected a differentiable schedule, received one whose result carries no gradient; "
                    "give its derivative: schedule=Schedule(ratio, derivative)"
                )
            return torch.autograd.grad(ratio.sum(), t)[0]


def _linear(t: Tensor) -> Tensor:
    return 1 - t


def _linear_slope(t: Tensor) -> Tensor:
    return torch.full_like(t, -1.0)


def _cosine(t: Tensor) -> Tensor:
    return torch.cos(t * math.pi / 2)


def _cosine_slope(t: Tensor) -> Tensor:
    return -math.pi / 2 * torch.sin(t * math.pi / 2)


# cosine: Chang et al., "MaskGIT", https://arxiv.org/abs/2202.04200
LINEAR = Schedule(_linear, _linear_slope, "linear")
COSINE = Schedule(_cosine, _cosine_slope, "cosine")


def as_schedule(schedule: str | TensorFn | float | Schedule) -> Schedule:
    """The schedule of that name, or a callable as a schedule.

    Raises:
        ValueError: an unknown name. TypeError: neither a name nor a callable.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, str):
        named = {"linear": LINEAR, "cosine": COSINE}
        if schedule not in named:
            raise ValueError(f"invalid schedule {schedule!r}: expected 'linear', 'cosine' or a callable on a tensor")
        return named[schedule]
    if isinstance(schedule, (int, float)) and not isinstance(schedule, bool):
        if not 0.0 < schedule <= 1.0:
            raise ValueError(f"expected a constant schedule in (0, 1], received {schedule}")
        ratio = float(schedule)
        return Schedule(lambda t: torch.full_like(t, ratio), torch.zeros_like)
    if not callable(schedule):
        raise TypeError(f"expected schedule to be a name or a callable, received {type(schedule).__name__}")
    return Schedule(schedule)


def step_counts(schedule: Schedule, steps: int, num_maskable: Tensor) -> Tensor:
    """How many positions remain masked after each generation step.

    Truncation toward zero of float32(schedule(t) * n) at t = 1/steps ... 1, as upstream (the cosine
    ends at -1e-5, which floor would turn into -1); within [0, n], and 0 after the last step whatever
    the schedule says, so that no mask is left in the output.

    Args:
        schedule: the mask ratio.
        steps: number of generation steps.
        num_maskable: [B] integer, n of each sequence, on the CPU.

    Returns:
        [steps, B] int64, on the CPU.

    Example:
        >>> step_counts(LINEAR, 4, torch.tensor([10, 3])).tolist()
        [[7, 2], [5, 1], [2, 0], [0, 0]]
    """
    times = torch.linspace(0.0, 1.0, steps + 1, device="cpu")[1:]
    times = times.to(device_of(schedule.ratio, times.device))  # a schedule that is learned may lie on a GPU
    ratio = torch.as_tensor(schedule(times), dtype=torch.float32, device="cpu").expand(steps)
    counts = (ratio[:, None] * num_maskable).long()
    counts = counts.clamp(min=0).minimum(num_maskable)
    counts[-1:] = 0
    return counts
