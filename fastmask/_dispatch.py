"""Which backend runs an operation: the pure-PyTorch reference or the Triton kernel."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

Function = TypeVar("Function", bound=Callable[..., Any])
OPERATIONS = (
    "mask_sampling",
    "masked_cross_entropy",
    "linear_masked_cross_entropy",
    "sample_tokens",
    "remask",
    "select_at_random",
)
BACKENDS = ("auto", "triton", "reference")
ENVIRONMENT_VARIABLE = "FASTMASK_BACKEND"

# Found once and without running them, so that Triton need not be there and torch.compile can trace a choice.
KERNELS = [name for name in OPERATIONS if importlib.util.find_spec(f"fastmask.kernels.{name}") is not None]
_MODULES = {f"fastmask.reference.{name}": (name, f"fastmask.kernels.{name}") for name in OPERATIONS}
HAS_TRITON = importlib.util.find_spec("triton") is not None


def choose(
    operation: str, device: torch.device, backend: str = "auto", dtype: torch.dtype | None = None
) -> tuple[str, str]:
    """("triton" | "reference", why) for an operation on a device, at a floating-point dtype if it has one.

    Where the caller says "auto" the environment variable FASTMASK_BACKEND decides, and where that is
    unset or "auto" too: the kernel on a GPU, the reference elsewhere.

    Raises:
        ValueError: an unknown backend. RuntimeError: "triton" was asked for and cannot run.
    """
    source = "backend="
    if backend == "auto":
        source, backend = f"{ENVIRONMENT_VARIABLE}=", os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if backend not in BACKENDS:
        raise ValueError(f"expected {source} to be one of {', '.join(BACKENDS)}; received {backend!r}")
    if backend == "reference":
        return "reference", f"{source}reference"
    obstacle = _no_kernel(operation, dtype)
    insists = source == "backend=" or obstacle is None  # the variable speaks of all operations and dtypes
    obstacle = obstacle or _cannot_run(device)
    if backend == "triton" and obstacle is None:
        return "triton", f"{source}triton"
    if backend == "triton" and insists:
        raise RuntimeError(f"{source}triton cannot run {operation}: {obstacle}; use backend='reference'")
    if obstacle is None and device.type == "cuda":
        return "triton", "kernel on this GPU"
    return "reference", obstacle or f"auto interprets no kernels on {device.type}"


def preload() -> None:
    """Imports what may be chosen, since torch.compile cannot trace an import: kernels where a GPU may be."""
    names = [f"fastmask.reference.{name}" for name in OPERATIONS]
    if HAS_TRITON and (torch.version.cuda or torch.version.hip or _interpreting()):
        names += [f"fastmask.kernels.{name}" for name in KERNELS]
    for name in names:
        importlib.import_module(name)


def implementation(
    reference: Function, device: torch.device, backend: str = "auto", dtype: torch.dtype | None = None
) -> Function:
    """A function of the reference, or the kernels' of the same name and signature; see ``choose``."""
    operation, kernels = _MODULES[reference.__module__]
    chosen, _ = choose(operation, device, backend, dtype)
    if chosen == "reference":
        return reference
    if kernels not in sys.modules:
        importlib.import_module(kernels)
    found: Function = getattr(sys.modules[kernels], reference.__name__)
    return found


def _no_kernel(operation: str, dtype: torch.dtype | None) -> str | None:
    """Why there is no kernel for the operation, or None."""
    if operation not in KERNELS:
        return f"no Triton kernel for {operation} yet"
    return "the kernels compute in float32, not float64" if dtype is torch.float64 else None


def _cannot_run(device: torch.device) -> str | None:
    """Why Triton does not run there, or None."""
    if not HAS_TRITON:
        return "Triton is not installed (pip install triton)"
    if device.type != "cuda" and not _interpreting():
        return f"Triton does not run on {device.type} (TRITON_INTERPRET=1 interprets kernels, slowly)"
    return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
