"""How kernels become operators of PyTorch."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from fastmask import functional

pytest.importorskip("triton", reason="operators are of kernels")
from fastmask.kernels._operator import operator


def _nothing(*args):
    pass


@operator("only_tested_", _nothing, mutates=("first", "third"))
def _only_tested_(first: Tensor, second: Tensor, third: Tensor | None) -> None:
    first.data.add_(second)


@pytest.mark.parametrize("third", [None, torch.zeros(2)], ids=["without", "with"])
def test_what_an_operator_writes_counts_as_changed(third):
    first, second = torch.zeros(2), torch.ones(2)
    _only_tested_(first, second, third)
    assert first.tolist() == [1.0, 1.0]
    assert [x._version for x in (first, second)] == [1, 0]
    assert third is None or third._version == 1


def test_ids_that_backward_needs_must_not_change(kernel):
    """A network's own embedding of the canvas, say, that is trained through a step."""
    weight = torch.zeros(9, 2, device=kernel.device, requires_grad=True)
    ids, is_masked = torch.arange(6).view(2, 3).to(kernel.device), torch.ones(2, 3).bool().to(kernel.device)
    embedded = torch.nn.functional.embedding(ids, weight)
    scores, counts = torch.rand(2, 3, device=kernel.device), torch.tensor([1, 2], device=kernel.device)
    rows, starts = torch.zeros(6).long().to(kernel.device), torch.tensor([0, 3, 6], device=kernel.device)
    functional.remask_(ids, is_masked, rows, starts, scores, counts, mask_id=8, backend="triton")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        embedded.sum().backward()


def test_an_operator_spends_little_of_the_hosts_time():
    """In calls of Python functions, which are the same everywhere: custom_op makes 20 of its own."""
    arguments = torch.zeros(2), torch.ones(2), torch.zeros(2)
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        _only_tested_(*arguments)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 8, calls
