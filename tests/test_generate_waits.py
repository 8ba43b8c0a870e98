"""Generation: no step waits for the device but one by a rule, once, to hear whether anything is left to do."""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest
import torch
from generating import MASK, N, Small, V, prompts, wrap_small
from graph_recorder import without_numpy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmask import NonAutoregressiveWrapper, _dispatch, functional, generation
from fastmask._host_count import HostCount
from fastmask.ops.sample_tokens import as_forbidden


class Waits(TorchDispatchMode):
    """Writes down each operation that brings a value to the host, or whose result has a shape that depends on one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        out = func(*args, **(kwargs or {}))
        waits = (
            aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten._unique2,
            aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.repeat_interleave,
        )  # fmt: skip
        takes_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
        by_mask = takes_mask and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if (func.overloadpacket in waits or by_mask) and not _ANSWERING:
            self.seen.append(str(func))
        return out


def assert_waits_for_nothing(monkeypatch, run) -> None:
    """Nothing that ``run()`` does brings a value to the host, nor has a shape that depends on one."""
    without_numpy(monkeypatch)
    mode = Waits()
    with mode, refusing_values(monkeypatch):
        run()
    assert mode.seen == []


def inside_the_steps(monkeypatch, context) -> None:
    """Each step of a generation runs in ``context()``, what goes before and between does not."""
    loop, end = generation.run, object()

    def watched(*arguments):
        run = loop(*arguments)
        while True:
            with context():
                through = next(run, end)
            if through is end:
                return
            yield through

    monkeypatch.setattr(generation, "run", watched)


WAYS = {
    "plain": ({}, {}),
    "remask": ({"can_mask_prev_unmasked": True}, {"choice_temperature": 1.0}),
    "self_cond": ({"self_cond": True}, {"choice_temperature": 1.0}),
    "critic": ({"token_critic": "own"}, {"noise_level_scale": 2.0}),
    "self_critic": ({"self_token_critic": True, "self_cond": True}, {}),
    "remask_critic": ({"self_token_critic": True, "can_mask_prev_unmasked": True}, {}),
    "filters": ({}, {"filter_thres": 0.5, "top_p": 0.9, "forbidden": [0, 7]}),
    "mask": ({}, {"top_p": 0.9, "forbidden": torch.arange(V) == 7}),
    "threshold": ({}, {"threshold": 0.3, "choice_temperature": 1.0}),
    "threshold_critic": ({"token_critic": "own"}, {"threshold": 0.3}),
    "blocks": ({}, {"block_length": 8}),
    "blocks_threshold": ({"self_cond": True}, {"block_length": 8, "threshold": 0.3, "commits": 1}),
    "end": ({}, {"block_length": 8, "eos_id": 2}),
    "editing": ({}, {"editing_threshold": 0.2, "editing_steps": 2}),
    "editing_threshold": ({}, {"threshold": 0.3, "editing_threshold": 0.2, "editing_steps": 3, "eos_id": 2}),
    "order": ({}, {"score": "random"}),
    "of_each_sequence": (
        {},
        {
            "start_temperature": torch.tensor([0.0, 0.7]),
            "top_p": torch.tensor([1.0, 0.5]),
            "filter_thres": torch.tensor([0.5, 0.0]),
        },
    ),
    "guidance": ({}, {"cfg_scale": 1.0, "unconditional": {}}),
    "threshold_remask": ({"can_mask_prev_unmasked": True}, {"threshold": 0.3}),
}


def is_asked(way: str) -> bool:
    """Whether the steps are told when nothing is left."""
    of_wrapper, options = WAYS[way]
    has_own_end = any(name in options for name in ("threshold", "eos_id", "editing_threshold"))
    return has_own_end and not of_wrapper.get("can_mask_prev_unmasked")


def numbers_of_steps(way: str) -> list[int]:
    """4, and those that only edit."""
    return list(range(1, 4 + WAYS[way][1].get("editing_steps", 0) + 1))


_ANSWERING: list[bool] = []


@pytest.fixture(autouse=True)
def answered(monkeypatch):
    """A step's one question is answered unseen by what watches for waits; on a meta device, that more is left."""
    wait = HostCount.wait

    def answer(count):
        _ANSWERING.append(True)
        try:
            return 1 if count._host.is_meta else wait(count)
        finally:
            asked.append(_ANSWERING.pop())

    asked: list[bool] = []
    monkeypatch.setattr(HostCount, "wait", answer)
    return asked


def generate_some_way(way: str, device, prompted: bool, length: int = 8) -> list:
    """Which steps were run."""
    of_wrapper, options = WAYS[way]
    wrapper, done = wrap_small(device, length, **of_wrapper), []
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    given = prompts(device, 2, length) if prompted else {}
    wrapper.generate(
        2, steps=4, progress=lambda step, total: done.append(step), **{"filter_thres": None, **options}, **given
    )
    return done


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prompted", [False, True])
def test_no_step_waits_for_the_device(way, prompted, device, monkeypatch, answered):
    """Nothing in the loop brings a value to the host, nor has a shape that depends on one."""
    without_numpy(monkeypatch)
    mode = Waits()

    @contextmanager
    def refusing():
        with mode, refusing_values(monkeypatch):
            yield

    inside_the_steps(monkeypatch, refusing)
    assert generate_some_way(way, device, prompted) == numbers_of_steps(way)
    assert mode.seen == []
    assert bool(answered) == is_asked(way)


def test_what_waits_is_seen(device, monkeypatch):
    x, mode = torch.arange(3.0, device=device), Waits()
    x.clone()[x > 1] = 2.0
    waiting = [
        x.nonzero, x[0].item, lambda: bool(x[1]), lambda: x[x > 1], x.unique,
        lambda: x.masked_select(x > 1), lambda: x.repeat_interleave(x.long()), lambda: x.equal(x),
        lambda: x.index_put((x > 1,), x[0]),
    ]  # fmt: skip
    for function in waiting:
        mode.seen.clear()
        with mode:
            function()
        assert mode.seen, function
    mode.seen.clear()
    with mode:
        _ = x[x.long()], x.where(x > 1, 0.0), x.masked_fill(x > 1, 0.0)
    assert mode.seen == []
    inside_the_steps(monkeypatch, lambda: mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Small, "forward", lambda net, ids: torch.zeros(*ids.shape, V) + bool((ids == MASK).any()))
        wrap_small("cpu").generate(1, steps=2)
    assert len(mode.seen) == 2


class Copies(TorchDispatchMode):
    """Names the operations that move data between devices and wait until it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {x.device for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        if len(devices) > 1 and not (kwargs or {}).get("non_blocking"):
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_copied_while_the_host_waits(way, monkeypatch):
    """From the first line of generate on; meta tensors have a device of their own, as those of a GPU."""
    mode, generate = Copies(), NonAutoregressiveWrapper.generate

    def watched(*arguments, **options):
        with mode:
            return generate(*arguments, **options)

    monkeypatch.setattr(NonAutoregressiveWrapper, "generate", watched)
    assert generate_some_way(way, torch.device("meta"), False) == numbers_of_steps(way)
    assert mode.seen == []


def test_a_step_of_ones_own_copies_nothing_while_the_host_waits():
    logits = torch.zeros(2, N, V, device="meta")
    is_masked, mode = torch.zeros(2, N, dtype=torch.bool, device="meta"), Copies()
    with mode:
        for options in ({"counts": 3}, {"threshold": 0.5}, {"counts": 3, "forbidden": [1, 2], "top_p": 0.9}):
            functional.demask_step(
                logits, is_masked.long(), is_masked, mask_id=MASK, choice_temperature=1.0, **options
            )
    assert mode.seen == []


def test_ids_of_a_sequence_are_forbidden_whatever_the_default_device():
    with torch.device("meta"):
        assert as_forbidden([1], 3, torch.device("cpu"), None).tolist() == [False, True, False]


def test_a_copy_that_waits_is_seen():
    mode, x = Copies(), torch.zeros(3, device="meta")
    with mode:
        torch.ones(3).to("meta", non_blocking=True)
        x[0:1] = 1
        x.where(x > 0, 2.0), x + 1, x.masked_fill(x > 0, 1)
        assert mode.seen == []
        torch.ones(3).to("meta")
        x.copy_(torch.ones(3))
    assert mode.seen == ["aten._to_copy.default", "aten.copy_.default"]


@contextmanager
def refusing_values(patch: pytest.MonkeyPatch):
    """No tensor gives its value to Python, but to Triton's interpreter, which is the device here."""
    inside = []

    def refuse(name):
        method = getattr(torch.Tensor, name)

        def call(tensor, *arguments, **options):
            assert inside or _ANSWERING, f"Tensor.{name} in a step"
            return method(tensor, *arguments, **options)

        patch.setattr(torch.Tensor, name, call)

    with patch.context() as patch:
        if _dispatch.HAS_TRITON:
            from triton.runtime.interpreter import GridExecutor

            run = GridExecutor.__call__

            def interpret(*arguments, **options):
                inside.append(True)
                try:
                    return run(*arguments, **options)
                finally:
                    inside.pop()

            patch.setattr(GridExecutor, "__call__", interpret)
        for name in ("item", "tolist", "nonzero", "cpu", "numpy", "masked_select", "unique", "__bool__", "__int__",
                     "__float__", "__index__"):  # fmt: skip
            refuse(name)
        yield


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow_interpreted
def test_no_step_waits_for_the_device_on_the_kernels(way, kernel, monkeypatch):
    """Their launchers included."""
    if kernel.name == "cuda":
        pytest.skip("a GPU refuses by itself, see below")
    monkeypatch.setenv("FASTMASK_BACKEND", "triton")
    inside_the_steps(monkeypatch, lambda: refusing_values(monkeypatch))
    assert generate_some_way(way, kernel.device, True, length=4) == numbers_of_steps(way)


def test_values_are_refused_outside_the_interpreter_only(kernel, monkeypatch):
    if kernel.name == "cuda":
        pytest.skip("a GPU refuses by itself, see below")
    x = torch.ones(2)
    with refusing_values(monkeypatch):
        for function in (x[0].item, x.tolist, x.cpu, x.nonzero, lambda: bool(x[0]), x.numpy):
            with pytest.raises(AssertionError, match="in a step"):
                function()
        functional.sample_tokens(torch.ones(1, 2, 3), seed=1, backend="triton")
    assert x.tolist() == [1.0, 1.0]


@contextmanager
def refusing_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs a GPU: there is nothing to wait for")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chosen", ["triton", "reference"])
def test_no_step_waits_for_a_gpu(way, chosen, monkeypatch):
    monkeypatch.setenv("FASTMASK_BACKEND", chosen)
    device = torch.device("cuda")
    generate_some_way(way, device, True)  # compiles kernels and starts libraries
    with refusing_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):  # it can tell
        torch.ones(2, device=device).nonzero()
    inside_the_steps(monkeypatch, refusing_synchronisation)
    assert generate_some_way(way, device, True) == numbers_of_steps(way)
