"""Schedules: t in [0, 1] to the mask ratio, its derivative, and how many positions stay masked in generation."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastmask._devices import device_of

TensorFn = Callable[[Tensor], Tensor]

# How far from 1 and 0 the ends of a falling schedule may lie: clipped and learned ones miss them by a little.
END_TOLERANCE = 0.01


@dataclass(frozen=True)
class _Constant:
    """The same ratio at all times."""

    value: float

    def __call__(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.value)


@dataclass(frozen=True)
class Schedule:
    """A mask ratio as a function of time, with its derivative.

    Args:
        ratio: maps t, float32 (float64 for the named two) of any shape in [0, 1], to the share of positions
            masked, same shape.
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

    @property
    def is_constant(self) -> bool:
        """Whether this is the schedule of a number: the same ratio at all times."""
        return isinstance(self.ratio, _Constant)

    @property
    def label(self) -> str | float:
        """What a person calls it: its name, its number, or what its function is called."""
        if isinstance(self.ratio, _Constant):
            return self.ratio.value
        return self.name or str(getattr(self.ratio, "__name__", type(self.ratio).__name__))

    @torch.no_grad()
    def ends(self) -> Tensor:
        """schedule(0) and schedule(1), [2] float32, computed where the schedule's parameters lie and left there."""
        times = torch.arange(2, dtype=torch.float32, device=device_of(self.ratio, torch.device("cpu")))
        return torch.as_tensor(self(times), dtype=torch.float32, device=times.device).expand(2)

    def check_falls(self, purpose: str, remedy: str, *, may_wait: bool) -> Tensor | None:
        """Refuses a schedule that does not fall from 1 to 0, to within .01 at both ends.

        Args:
            may_wait: whether the host may wait for a GPU to know.

        Returns:
            Whether it falls, [] bool, where the host may not or cannot know; else None.

        Raises:
            ValueError: it does not.
        """
        if self.name is not None:
            return None
        ends = self.ends()
        misses = (ends - (1.0 - torch.arange(2, dtype=torch.float32, device=ends.device))).abs()
        falls = (misses <= END_TOLERANCE).all()
        if ends.is_meta or not (may_wait or ends.device.type == "cpu"):
            return falls
        if not falls:
            first, last = ends.tolist()
            raise ValueError(
                f"expected {purpose} with a schedule that falls from 1 to 0, received one from {first:.4g} to "
                f"{last:.4g}, for which it means nothing; {remedy}"
            )
        return None

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


def as_schedule(schedule: str | float | TensorFn | Schedule) -> Schedule:
    """The schedule of that name, a number as a constant ratio, or a callable as a schedule.

    Raises:
        ValueError: an unknown name, a number outside (0, 1]. TypeError: neither a name, a number nor a callable.
    """
    if isinstance(schedule, Schedule):
        return schedule
    if isinstance(schedule, str):
        named = {"linear": LINEAR, "cosine": COSINE}
        if schedule not in named:
            raise ValueError(
                f"invalid schedule {schedule!r}: expected 'linear', 'cosine', a number or a callable on a tensor"
            )
        return named[schedule]
    if isinstance(schedule, numbers.Real) and not isinstance(schedule, bool):
        if not 0.0 < schedule <= 1.0:
            raise ValueError(
                f"expected schedule, where it is a number, in (0, 1], received {schedule!r}; it is the share of "
                "positions that are masked"
            )
        return Schedule(_Constant(float(schedule)), torch.zeros_like)
    if not callable(schedule):
        raise TypeError(f"expected schedule to be a name, a number or a callable, received {type(schedule).__name__}")
    return Schedule(schedule)


def step_counts(schedule: Schedule, steps: int, num_maskable: Tensor) -> Tensor:
    """How many positions remain masked after each generation step.

    schedule(t) n at t = 1/steps ... 1, truncated; but what lies below an integer by no more than
    max(1e-4, 2^-20 n) is that integer, so that rounding takes nothing: as many steps as positions commit
    one each, up to n = 65536. Named schedules are evaluated in float64. Within [0, n], and 0 after the last
    step whatever the schedule says, so that no mask is left in the output.

    Args:
        schedule: the mask ratio; a constant one counts as the linear one.
        steps: number of generation steps.
        num_maskable: [B] integer, n of each sequence, on the CPU.

    Returns:
        [steps, B] int64, on the CPU; sequences of the same n may share memory.

    Example:
        >>> step_counts(LINEAR, 4, torch.tensor([10, 3])).tolist()
        [[7, 2], [5, 1], [2, 0], [0, 0]]
    """
    ratios = exact_ratios(schedule, steps)
    sizes, places = num_maskable.unique(return_inverse=True)
    counts = torch.empty(steps, len(sizes), dtype=torch.int64, device="cpu")
    for column, size in enumerate(sizes.tolist()):
        counts[:, column] = num_remaining(ratios, size)
    counts[-1:] = 0
    return counts.expand(-1, len(places)) if len(sizes) == 1 else counts[:, places]


def even_split(num_masked: int, steps: int) -> list[int]:
    """How many positions each of so many steps commits: all alike, and of those that remain one in each of the first.

    Source: LLaDA (https://arxiv.org/abs/2502.09992, its public generate.py).

    Example:
        >>> even_split(10, 4)
        [3, 3, 2, 2]
    """
    each, more = divmod(num_masked, steps)
    return [each + (step < more) for step in range(steps)]


def exact_ratios(schedule: Schedule, steps: int) -> Tensor:
    """The mask ratio after each step, [steps] float64: of a named schedule exact, of a constant one the linear's."""
    schedule = LINEAR if schedule.is_constant else schedule
    return step_ratios(schedule, steps, torch.float32 if schedule.name is None else torch.float64)


def num_remaining(ratios: Tensor, num_maskable: int) -> Tensor:
    """How many of so many positions remain masked at these ratios, int64: truncated as :func:`step_counts` says."""
    remaining = ratios * num_maskable + max(1e-4, 2.0**-20 * num_maskable)
    return remaining.nan_to_num_(0.0).clamp_(0, num_maskable).long()


def step_ratios(schedule: Schedule, steps: int, dtype: torch.dtype) -> Tensor:
    """schedule(t) at t = 1/steps ... 1, evaluated in a dtype where the schedule's parameters lie: [steps] float64 on
    the CPU."""
    times = torch.linspace(0.0, 1.0, steps + 1, dtype=dtype, device="cpu")[1:]
    times = times.to(device_of(schedule.ratio, times.device))  # a schedule that is learned may lie on a GPU
    with torch.no_grad():
        return torch.as_tensor(schedule(times), dtype=torch.float64, device="cpu").expand(steps)
