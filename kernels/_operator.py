"""Kernels as operators of PyTorch, which torch.compile takes as they are.

Registered with the dispatcher itself: what torch.library's custom_op and register_autograd do in Python besides takes
the host longer, at every call, than most of these kernels should take a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Overload = torch._ops.OpOverload
_libraries: dict[str, torch.library.Library] = {}  # an operator lives as long as its own


def _nothing(*args: Any) -> None:
    """What an operator returns that only writes."""


def operator(
    name: str, fake: Callable[..., Any] = _nothing, mutates: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], Overload[..., Any]]:
    """Makes a function, by its type hints, the operator ``torch.ops.fastmask.<name>``.

    It has no derivative; see :func:`differentiable`.

    Args:
        fake: gives outputs like the function's, with nothing in them, for tracing.
        mutates: names of positional arguments that the function writes to.
    """

    def register(function: Callable[..., Any]) -> Overload[..., Any]:
        if name in _libraries:  # its module is loaded anew
            _libraries[name]._destroy()
        library = _libraries[name] = torch.library.Library("fastmask", "FRAGMENT")
        schema = torch.library.infer_schema(function, mutates_args=mutates)
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, torch._disable_dynamo(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastmask::{name}", fake, lib=library)
        overload: Overload[..., Any] = getattr(torch.ops.fastmask, name).default
        if mutates:
            library.impl(name, _counting_versions(overload, mutates), "ADInplaceOrView", with_keyset=True)
        return overload

    return register


def _counting_versions(overload: Overload[..., Any], mutates: Sequence[str]) -> Callable[..., Any]:
    """Tells autograd what an operator writes to: a tensor saved for backward must not change unseen."""
    names = [argument.name for argument in overload._schema.arguments]
    places = [names.index(name) for name in mutates]

    def counting(keys: Any, *arguments: Any) -> Any:
        torch.autograd.graph.increment_version([arguments[i] for i in places if arguments[i] is not None])
        return overload.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *arguments)

    return counting


def differentiable(
    overload: Overload[..., Any], gradients: Callable[..., Any], setup_context: Callable[..., Any]
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

    _libraries[overload._schema.name.removeprefix("fastmask::")].impl(overload, run, "Autograd")
