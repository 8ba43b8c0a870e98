"""Kernels as operators of PyTorch, which torch.compile takes as they are.

Registered with the dispatcher itself: what torch.library's custom_op and register_autograd do in Python besides takes
the host longer, at every call, than most of these kernels take the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("fastmask", "FRAGMENT")


def operator(
    name: str, fake: Callable[..., Any], mutates: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], torch._ops.OpOverload[..., Any]]:
    """Makes a function, by its type hints, the operator ``torch.ops.fastmask.<name>``.

    Args:
        fake: gives outputs like the function's, with nothing in them, for tracing.
        mutates: names of positional arguments that the function writes to.
    """

    def register(function: Callable[..., Any]) -> torch._ops.OpOverload[..., Any]:
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _counting_versions(function, mutates), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastmask::{name}", fake, lib=_LIBRARY)
        overload: torch._ops.OpOverload[..., Any] = getattr(torch.ops.fastmask, name).default
        return overload

    return register


def differentiable(
    overload: torch._ops.OpOverload[..., Any], gradients: Callable[..., Any], setup_context: Callable[..., Any]
) -> None:
    """Gives an operator its derivative: ``backward`` and ``setup_context`` of a torch.autograd.Function."""

    def below(*arguments: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*arguments)

    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            outputs = below(*arguments)
            setup_context(ctx, arguments, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *incoming: Any) -> Any:
            return gradients(ctx, *incoming)

    def run(*arguments: Any) -> Any:
        needs = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
        return Derivative.apply(*arguments) if needs else below(*arguments)

    _LIBRARY.impl(overload, run, "Autograd")


def _counting_versions(function: Callable[..., Any], mutates: Sequence[str]) -> Callable[..., Any]:
    """The function, telling autograd what it writes to: a tensor saved for backward must not change unseen."""
    if not mutates:
        return function
    names = function.__code__.co_varnames
    places = [names.index(name) for name in mutates]

    @wraps(function)
    def counting(*arguments: Any) -> Any:
        torch.autograd.graph.increment_version([arguments[i] for i in places if arguments[i] is not None])
        return function(*arguments)

    return counting
