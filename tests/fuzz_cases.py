"""Numbered cases, and what random calls are drawn from."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


class Case:
    """Everything that a numbered case draws from."""

    def __init__(self, number: int, backend: str) -> None:
        self.number, self.backend = number, backend
        self.choices = random.Random(number)
        self.numbers = np.random.default_rng(number)
        self.options: dict[str, Any] = {}

    def chance(self, share: float) -> bool:
        return self.choices.random() < share

    def pick(self, *values: Any) -> Any:
        return self.choices.choice(values)

    def normal(self, *shape: int) -> np.ndarray:
        return self.numbers.standard_normal(shape)

    def ids(self, high: int, *shape: int) -> np.ndarray:
        return self.numbers.integers(0, high, shape)

    def flags(self, share: float, *shape: int) -> np.ndarray:
        return self.numbers.random(shape) < share

    def dtype(self) -> str:
        names = ["float32"] * 4 + ["bfloat16", "float16"] + ["float64"] * (self.backend == "reference")
        return self.pick(*names)

    def seed(self) -> int:
        return self.choices.getrandbits(64) - 2 ** self.pick(0, 63)

    def laid_out(self, values: np.ndarray, dtype: torch.dtype) -> Tensor:
        """The values as a tensor of that dtype, in one of many layouts."""
        dense = torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
        if not self.chance(0.4):
            return dense
        layout = self.pick("sliced", "transposed", "misaligned", "spread")
        if layout == "transposed" and dense.ndim > 1:
            return dense.transpose(0, -1).contiguous().transpose(0, -1)
        if layout == "misaligned":
            flat = torch.zeros(dense.numel() + 1, dtype=dtype)
            flat[1:] = dense.flatten()
            return flat[1:].view(dense.shape)
        if layout == "spread" and dense.ndim > 1:  # rows apart
            wide = torch.zeros(*dense.shape[:-1], dense.shape[-1] + 3, dtype=dtype)
            wide[..., : dense.shape[-1]] = dense
            return wide[..., : dense.shape[-1]]
        wide = torch.zeros(*dense.shape, 2, dtype=dtype)
        wide[..., 0] = dense
        return wide[..., 0]

    def logits(self, *shape: int) -> np.ndarray:
        """Values of one of many kinds, the rarities among them."""
        kind = self.pick("normal", "normal", "wide", "narrow", "ties", "ties", "certain", "far")
        if kind == "ties":
            return self.numbers.integers(-2, 3, shape).astype(float)
        scale = {"normal": 3.0, "wide": 30.0, "narrow": 0.1, "certain": 2.0, "far": 3.0}[kind]
        values = scale * self.normal(*shape)
        if kind == "certain" and values.size:
            values[..., 0] += self.choices.uniform(5.0, 60.0)
        if kind == "far":
            values += self.pick(-1000.0, 300.0)
        return values

    def with_rarities(self, values: np.ndarray, *, plus: bool = True) -> np.ndarray:
        """Some of the rows of values [..., V] with -inf, NaN or +inf among them, or nothing else."""
        if values.size == 0 or not self.chance(0.3):
            return values
        rows = values.reshape(-1, values.shape[-1])
        for _ in range(self.pick(1, 2)):
            row = rows[self.choices.randrange(len(rows))]
            kind = self.pick("some", "some", "most", "all", "nan", "plus")
            if kind == "some":
                row[self.flags(0.3, len(row))] = -np.inf
            elif kind == "most":
                kept = self.choices.randrange(len(row))
                row[np.arange(len(row)) != kept] = -np.inf
            elif kind == "all":
                row[:] = -np.inf
            elif plus:
                row[self.choices.randrange(len(row))] = np.nan if kind == "nan" else np.inf
        return values


def exactly(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def run_twice(case: Case, function: Callable, *arguments: Any, **options: Any) -> Any:
    """The call's result; now and then, that a second call gives the same."""
    out = function(*arguments, **options)
    if case.chance(0.05):
        again = function(*arguments, **options)
        for x, y in zip(out, again, strict=True):
            assert (x is None) == (y is None)
            assert x is None or torch.equal(torch.nan_to_num(x, nan=7.5), torch.nan_to_num(y, nan=7.5)), (
                "not the same"
            )
    return out
