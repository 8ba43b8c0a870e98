"""Modules in another mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards, and after an exception, each submodule in the mode it had.

    A module all in evaluation mode is not touched, so that several threads may use it.
    """
    if not any(part.training for part in module.modules()):
        yield
        return
    with keeping_modes(module):
        module.eval()
        yield


@contextmanager
def keeping_modes(module: nn.Module) -> Iterator[None]:
    """Afterwards, and after an exception, each submodule is in the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training
