"""A function of tensors, captured once as a CUDA graph and replayed with others of the same shapes."""

from __future__ import annotations

import functools
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TextIO

import torch
from torch import Tensor, nn

Function = Callable[[list[Tensor]], list[Tensor]]

# Each graph holds memory of its own: as many of one module as are likely in turn.
_KEPT = 8
_graphs: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, _Captured | None]] = weakref.WeakKeyDictionary()
_failed: list[torch.cuda.CUDAGraph] = []
# A graph has one memory for what goes in and comes out, and all that are captured share streams and warnings: one
# thread at a time, which queues a replay and waits for none. Reentrant, for a network that generates in its forward.
_lock = threading.RLock()
_WAITED = "called a synchronizing CUDA operation"  # PyTorch's warning


class _Captured:
    """A graph with the tensors that it reads and writes."""

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        self._inputs = [x.clone() for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        self._done = torch.cuda.Event()
        current = torch.cuda.current_stream()
        warming, capturing = _streams(inputs[0].device)
        warming.wait_stream(current)
        # Without autocast's cache: what it keeps is freed when autocast ends, and the graph would still read it.
        autocast = torch.autocast(
            "cuda",
            enabled=torch.is_autocast_enabled("cuda"),
            dtype=torch.get_autocast_dtype("cuda"),
            cache_enabled=False,
        )
        try:
            with autocast:
                with torch.cuda.stream(warming):
                    function(self._inputs)  # compiles kernels and starts libraries, which a capture must not
                    with _refusing_waits():
                        function(self._inputs)
                with _capture(self._graph, capturing):
                    self._outputs = function(self._inputs)
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own
            current.wait_stream(warming)
            # The workspace that cuBLAS took is in this graph's memory: the next graph takes one of its own.
            torch._C._cuda_clearCublasWorkspaces()

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        current = torch.cuda.current_stream()
        current.wait_event(self._done)  # of a replay on another stream
        for static, x in zip(self._inputs, inputs, strict=True):
            static.copy_(x)
        self._graph.replay()
        outputs = [x.clone() for x in self._outputs]
        self._done.record(current)
        return outputs


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
    """To warm up on and to capture on: libraries keep memory for each stream that they have seen."""
    return torch.cuda.Stream(device), torch.cuda.Stream(device)


@contextmanager
def _refusing_waits() -> Iterator[None]:
    """Raises RuntimeError, at its end, if the thread waited for the GPU: in a capture that fails, and late."""
    thread, show, waits = threading.get_ident(), warnings.showwarning, []

    def showwarning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if _WAITED not in str(message):
            show(message, category, filename, lineno, file, line)
        elif threading.get_ident() == thread:
            waits.append(f"{filename}:{lineno}")

    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        warnings.filterwarnings("always", _WAITED)
        warnings.showwarning = showwarning
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    if waits:
        raise RuntimeError(f"it waits for the GPU at {waits[0]}")


@contextmanager
def _capture(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """torch.cuda.graph, after which one that failed does not spoil what follows."""
    pool = torch.cuda.graph_pool_handle()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            yield
    except BaseException:
        # PyTorch leaves its allocators, which ask the graph, and its random numbers in the midst of the capture.
        _failed.append(graph)
        with suppress(RuntimeError):  # it was not in the midst
            torch._C._cuda_endAllocateToPool(stream.device.index, pool)
            torch._C._cuda_releasePool(stream.device.index, pool)
            with torch.cuda.stream(stream):
                number, another = torch.zeros(1, device=stream.device), torch.cuda.CUDAGraph()
                another.capture_begin(capture_error_mode="thread_local")
                number.zero_()
                another.capture_end()
        raise


def replay(module: nn.Module, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """``function(inputs)`` by a graph kept for the module and the key; by itself, with a warning, where none can be.

    Args:
        module: whose parameters the function uses; the graph lives as long.
        key: everything else that the function depends on besides the inputs' values.
        function: may write the inputs it is given.
    """
    with torch.cuda.device_of(inputs[0]):
        with _lock:
            captured = _captured(module, key, function, inputs)
            if captured is not None:
                return captured(inputs)
        return function([x.clone() for x in inputs])


def _captured(module: nn.Module, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> _Captured | None:
    """The graph, captured if it has not been tried; None, with a warning the first time, where there can be none."""
    device = inputs[0].device
    if device.type != "cuda":
        _warn(f"the network is on {device}")
        return None
    graphs = _graphs.setdefault(module, {})
    key = (
        key,
        tuple((x.shape, x.dtype, x.device) for x in inputs),
        # Replaced, they would not be seen.
        tuple((x.data_ptr(), x.dtype, x.shape) for x in (*module.parameters(), *module.buffers())),
        tuple(id(part) for part in module.modules()),
        (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"), torch.is_inference_mode_enabled()),
    )
    try:
        if key in graphs:
            return graphs[key]
    except TypeError as error:
        _warn(f"the network's arguments must be tensors and what can be hashed ({error})")
        return None
    while len(graphs) >= _KEPT:
        graphs.pop(next(iter(graphs)))
    try:
        graphs[key] = _Captured(function, inputs)
    except Exception as error:  # a network may fail in any way
        graphs[key] = None
        cause = error.__context__ or error  # the end of a failed capture fails too
        told = (str(cause).splitlines() or [""])[0][:200]
        _warn(f"the network cannot be captured ({type(cause).__name__}: {told})")
    return graphs[key]


def _warn(obstacle: str) -> None:
    warnings.warn(f"cuda_graph=True has no effect: {obstacle}; the steps run one by one", stacklevel=7)
