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
        stream = torch.cuda.Stream(inputs[0].device)
        stream.wait_stream(torch.cuda.current_stream(inputs[0].device))
        with torch.cuda.stream(stream):  # compiles kernels and starts libraries, which a capture must not
            function(self._inputs)
        torch.cuda.current_stream(inputs[0].device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(self._inputs)

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
    obstacle = None
    device = inputs[0].device
    graphs = _graphs.setdefault(module, {})
    key = (
        key,
        tuple((x.shape, x.dtype, x.device) for x in inputs),
        tuple(x.data_ptr() for x in (*module.parameters(), *module.buffers())),  # replaced, they would not be seen
        (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")),
    )
    if device.type != "cuda":
        obstacle = f"the network is on {device}"
    elif key not in graphs:
        while len(graphs) >= _KEPT:
            graphs.pop(next(iter(graphs)))
        try:
            with torch.cuda.device(device):
                graphs[key] = _Captured(function, inputs)
        except Exception as error:  # a network may fail in any way
            graphs[key] = None
            obstacle = f"the network cannot be captured ({type(error).__name__}: {str(error).splitlines()[0][:200]})"
    if obstacle is not None:
        warnings.warn(f"cuda_graph=True has no effect: {obstacle}; the steps run one by one", stacklevel=4)
    captured = None if device.type != "cuda" else graphs[key]
    return function([x.clone() for x in inputs]) if captured is None else captured(inputs)
