"""How kernels become operators of PyTorch."""

from __future__ import annotations

import contextlib
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastmask import functional

pytest.importorskip("triton", reason="operators are of kernels")
from fastmask.kernels._operator import operator


def _add_(first: Tensor, second: Tensor, third: Tensor | None) -> None:
    first.data.add_(second)


add_ = operator("only_tested_", mutates=("first", "third"))(_add_)


@pytest.mark.parametrize("third", [None, torch.zeros(2)], ids=["without", "with"])
def test_what_an_operator_writes_counts_as_changed(third):
    first, second = torch.zeros(2), torch.ones(2)
    add_(first, second, third)
    assert first.tolist() == [1.0, 1.0]
    assert [x._version for x in (first, second)] == [1, 0]
    assert third is None or third._version == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_ids_that_backward_needs_must_not_change(kernel, compiled):
    """Those of a network's embedding, say, that is trained through a step."""
    weight = torch.zeros(9, 2, device=kernel.device, requires_grad=True)
    ids, is_masked = torch.arange(6).view(2, 3).to(kernel.device), torch.ones(2, 3).bool().to(kernel.device)
    scores, counts = torch.rand(2, 3, device=kernel.device), torch.tensor([1, 2], device=kernel.device)
    rows, starts = torch.zeros(6).long().to(kernel.device), torch.tensor([0, 3, 6], device=kernel.device)

    def step(weight, ids):
        embedded = torch.nn.functional.embedding(ids, weight)
        functional.remask_(ids, is_masked, rows, starts, scores, counts, mask_id=8, backend="triton")
        return embedded.sum()

    torch._dynamo.reset()
    step = torch.compile(step, backend="aot_eager", fullgraph=True) if compiled else step
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        step(weight, ids).backward()


def test_kernels_are_not_traced(kernel):
    """Where torch.compile leaves a frame to Python it still looks at what that calls."""
    kernel.module("remask")

    def noise(seed):
        with contextlib.suppress(ValueError):
            torch._dynamo.graph_break()
            return torch.ops.fastmask.gumbel_noise(seed, 2, 3, 0, 0)

    seed = torch.tensor(3, device=kernel.device)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(noise, backend="eager")(seed), noise(seed))


def test_an_operator_may_be_registered_anew():
    """As by IPython's autoreload, or where an import was interrupted."""

    def set_(first: Tensor) -> None:
        first.data.fill_(7.0)

    for _ in range(2):
        x = torch.zeros(2)
        operator("registered_twice_", mutates=("first",))(set_)(x)
        assert x.tolist() == [7.0, 7.0]
        assert x._version == 1


def test_an_operator_spends_little_of_the_hosts_time():
    """In calls of Python functions, which are the same everywhere: with custom_op they are 22."""
    arguments = torch.zeros(2), torch.ones(2), torch.zeros(2)
    add_(*arguments)  # imports what it needs
    calls = []
    sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code.co_name) if event == "call" else None)
    try:
        add_(*arguments)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 14, calls


def test_a_call_that_somebody_watches_is_told():
    """By the dispatcher: a mode, a profiler, tensors that are no plain ones, tracing by torch.fx and torch.jit."""

    class Mode(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    class Kind(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, arguments=(), options=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, arguments, options or {})

    seen, name = [], "fastmask.only_tested_"
    x, y = torch.zeros(2), torch.ones(2)
    with Mode():
        add_(x, y, None)
    assert seen == [f"{name}.default"]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        add_(x, y, None)
    assert "fastmask::only_tested_" in {event.key for event in profile.key_averages()}
    add_(x, y.as_subclass(Kind), None)
    assert seen.pop() == f"{name}.default"
    add_(x.to("meta"), y.to("meta"), None)  # its fake: nothing runs
    graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x, y: add_(x, y, None))(x, y)
    assert "only_tested_" in graph.code
    assert "only_tested_" in str(torch.jit.trace(lambda x, y: (add_(x, y, None), x)[1], (x, y)).graph)
    assert torch.equal(x, torch.full_like(x, x[0]))


@pytest.mark.parametrize("name", ["masked_cross_entropy", "linear_masked_cross_entropy"])
def test_backward_is_given_the_losses_gradient_alone(kernel, name):
    """For any other output that it knows of, autograd fills a gradient of zeros, for one as large as the logits."""

    class Filled(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    seen = []
    x, weight = (torch.randn(n, 4, device=kernel.device, requires_grad=True) for n in (3, 5))
    of = (x, weight) if name.startswith("linear") else (x,)
    loss = getattr(functional, name)(*of, torch.tensor([0, 1, 2], device=kernel.device), backend="triton").loss
    with Filled():
        torch.autograd.grad(loss, of)
    assert not [function for function in seen if "zero" in function or "full" in function]


class _Parts(NamedTuple):
    whole: Tensor
    part: Tensor | None


def _some(x: Tensor, with_part: bool) -> _Parts:
    return _Parts(2.0 * x, 3.0 * x[:1] if with_part else None)


some = operator("only_tested_some", _some)(_some)


def test_an_output_that_there_is_not():
    """None from the function; to PyTorch, which knows no such output, an empty tensor."""
    x = torch.ones(2)
    assert some(x, False).part is None
    assert some(x, True).part.tolist() == [3.0]
    for with_part, size in ((False, 0), (True, 1)):
        assert some.below(x, with_part).part.shape == (size,)
        torch.library.opcheck(some.overload, (x, with_part))


def test_what_is_written_in_inference_mode_has_no_version():
    with torch.inference_mode():
        first = torch.zeros(2)
        add_(first, torch.ones(2), None)
    assert first.tolist() == [1.0, 1.0]
