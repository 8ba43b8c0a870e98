"""A function of tensors, captured once as a CUDA graph and replayed with others of the same shapes."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor, nn

Function = Callable[[list[Tensor]], list[Tensor]]

# Each graph holds memory of its own: as many of one module as are likely in turn.
_KEPT = 8
_graphs: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, _Captured | None]] = weakref.WeakKeyDictionary()


class _Captured:
    """A graph with the tensors that it reads and writes."""

    def __init__(self, function: Function, inputs: Sequence[Tensor]) -> None:
        self._inputs = [x.clone() for x in inputs]
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        stream = torch.cuda.Stream()
        stream.wait_stream(current)
        # Without autocast's cache: what it keeps is freed when autocast ends, and the graph would still read it.
        autocast = torch.autocast(
            "cuda",
            enabled=torch.is_autocast_enabled("cuda"),
            dtype=torch.get_autocast_dtype("cuda"),
            cache_enabled=False,
        )
        try:
            with autocast:
                with torch.cuda.stream(stream):  # compiles kernels and starts libraries, which a capture must not
                    function(self._inputs)
                with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
                    self._outputs = function(self._inputs)
        finally:
            torch.cuda.set_stream(current)  # a capture that fails leaves its own
        current.wait_stream(stream)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        for static, x in zip(self._inputs, inputs, strict=True):
            static.copy_(x)
        self._graph.replay()
        return [x.clone() for x in self._outputs]


def replay(module: nn.Module, key: Hashable, function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """``function(inputs)`` by a graph kept for the module and the key; by itself, with a warning, where none can be.

    Args:
        module: whose parameters the function uses; the graph lives as long.
        key: everything else that the function depends on besides the inputs' values.
        function: may write the inputs it is given.
    """
    with torch.cuda.device_of(inputs[0]):
        captured = _captured(module, key, function, inputs)
        return function([x.clone() for x in inputs]) if captured is None else captured(inputs)


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
