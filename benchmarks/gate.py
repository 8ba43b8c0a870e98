"""The correctness gate: nothing is timed that was not held to the reference at the very case before."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from benchmarks.records import Contender, Problem, Step

NEEDS_CUDA = "needs CUDA"


class Refused(Exception):
    """A contender that failed the gate at this case: ``status`` is the kind of failure, ``reason`` says more."""

    def __init__(self, status: str, reason: str, errors: dict[str, float] | None = None) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason, self.errors = status, reason, errors or {}


def admit(contender: Contender, problem: Problem) -> tuple[Step, dict[str, float]]:
    """The contender's step and its errors, or Refused."""
    if contender.needs_cuda and problem.device.type != "cuda":
        raise Refused(NEEDS_CUDA, f"this case is on {problem.device.type}")
    try:
        function = contender.load()
    except Exception as error:  # a peer may fail in any way when it is imported
        raise Refused("does not import", describe(error)) from None
    step = Step(contender, function, problem)
    try:
        step.restore()
        for like in problem.inputs:  # an output nobody wrote shows in reused memory
            torch.full_like(like, float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).max)
        errors = problem.errors(step)
    except torch.OutOfMemoryError as error:
        raise Refused("out of memory", describe(error)) from None
    except Exception as error:
        raise Refused("raises", describe(error)) from None
    reason = why_wrong(errors, problem.limits)
    if reason and not contender.timed_if_wrong:
        raise Refused("wrong", reason, errors)
    return step, errors


def why_wrong(errors: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """Every error beside its limit if any is beyond it, else nothing."""
    if all(error <= limits[name] for name, error in errors.items()):
        return ""
    return ", ".join(f"{name} {error:.1e} (limit {limits[name]:.0e})" for name, error in errors.items())


def describe(error: Exception) -> str:
    """The type of an error and the first line of what it says."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def relative_error(out: Tensor, expected: Tensor) -> float:
    """L2, in float64."""
    if out.shape != expected.shape:
        raise ValueError(f"expected a result of shape {list(expected.shape)}, received {list(out.shape)}")
    difference = torch.zeros((), dtype=torch.float64, device=expected.device)
    norm = difference.clone()
    for part, whole in zip(out.detach().reshape(-1).split(2**26), expected.reshape(-1).split(2**26), strict=True):
        difference += (part.double() - whole.double()).square().sum()
        norm += whole.double().square().sum()
    return (difference / norm).sqrt().item()
