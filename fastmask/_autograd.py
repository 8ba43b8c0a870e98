"""What the operations share with autograd and autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor


class _Undifferentiable(torch.autograd.Function):
    """The identity on a gradient that has none of its own."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "the masked cross-entropies cannot be differentiated twice (double backward); leave create_graph "
            "out, or use torch.nn.functional.cross_entropy"
        )


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Operations in the dtypes they are given; where autocast is off, nothing need turn it off."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a backward's own derivative raise.

    torch's once_differentiable raises only where the incoming gradient requires grad: at the end of a loss
    it does not, and a gradient penalty would silently count as a constant.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *incoming: Tensor) -> Any:
        if not torch.is_grad_enabled():  # no create_graph
            return backward(ctx, *incoming)
        with torch.no_grad():
            gradients = backward(ctx, *incoming)
        return tuple(g if g is None else _Undifferentiable.apply(g.detach().requires_grad_()) for g in gradients)

    return wrapped
