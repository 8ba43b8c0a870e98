"""What is computed once and kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastmask._memoised import memoised


def test_each_value_and_type_is_computed_once():
    calls = []

    @memoised
    def name(number, word=None):
        calls.append(number)
        return f"{type(number).__name__} {number}"

    for _ in range(2):
        assert [name(x) for x in (1, True, 1.0, 0)] == ["int 1", "bool True", "float 1.0", "int 0"]
        assert name(np.float64(1.0)) == "float64 1.0"
    assert len(calls) == 5


def test_what_cannot_be_kept_is_computed_each_time():
    @memoised
    def double(values):
        return [2 * value for value in values]

    values = [1]
    assert double(values) == [2]
    values.append(2)
    assert double(values) == [2, 4]


def test_refusals_are_not_kept():
    @memoised
    def positive(number):
        if not isinstance(number, int):
            raise TypeError(f"expected an int, received {number!r}")
        if number <= 0:
            raise ValueError(f"expected a number above 0, received {number}")
        return number

    for _ in range(2):
        with pytest.raises(ValueError, match="received 0"):
            positive(0)
        with pytest.raises(TypeError, match="received 'a'") as raised:
            positive("a")
        assert raised.value.__context__ is None
    assert positive(1) == 1


def test_torch_compile_traces_what_is_computed():
    @memoised
    def half(number):
        return number / 2

    @torch.compile(backend="eager", fullgraph=True)
    def scaled(x):
        return x * half(x.shape[0])

    torch._dynamo.reset()
    for size in (2, 3, 4):
        assert torch.equal(scaled(torch.ones(size)), torch.full((size,), size / 2))
