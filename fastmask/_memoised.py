"""What is computed once and kept: of numbers and words, which a loop repeats at each step."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., Any])


def memoised(function: Function) -> Function:
    """The function, which keeps what it gives for the arguments it has seen, each by its value and type.

    Tensors are no such arguments; nor are records, whose fields' types are not told apart: give them one by one.
    """
    remembered = functools.lru_cache(maxsize=1024, typed=True)(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        if torch.compiler.is_compiling():  # it traces what is computed, and not what is kept
            return function(*arguments)
        try:
            return remembered(*arguments)
        except TypeError:  # of what cannot be kept, or the function's own
            pass
        return function(*arguments)

    return cast(Function, call)
