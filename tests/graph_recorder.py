"""What stands in for a CUDA graph, and for a tensor on a GPU, where there is none."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmask.reference import _few_samples_in_numpy, _philox_in_numpy, mask_sampling, vocabulary_filter

WAITS = (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.masked_select)


def without_numpy(monkeypatch) -> None:
    """The reference as on a GPU: without the short ways that it takes on a CPU only."""
    for module in (vocabulary_filter, mask_sampling, _philox_in_numpy, _few_samples_in_numpy):
        monkeypatch.setattr(module, "np", None)


class Recorder(TorchDispatchMode):
    """A torch.cuda.CUDAGraph's likeness, and a torch.cuda.graph's."""

    REFUSED = (*WAITS, torch.ops.aten.flip)  # the last stands for what only a capture refuses

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []
        self.num_replays = 0

    def capture_begin(self, **options) -> None:
        self.__enter__()

    def capture_end(self) -> None:
        self.__exit__(None, None, None)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in self.REFUSED:
            raise RuntimeError("operation not permitted when stream is capturing\nand more about it")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        self.num_replays += 1
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                is_view = old is not None and old.untyped_storage().data_ptr() == new.untyped_storage().data_ptr()
                if old is not None and not is_view:
                    old.copy_(new.reshape(old.shape))  # squeeze_ may have changed it since


class OnCuda(torch.Tensor):
    """Says so, and is on the CPU; what is computed from it says the truth."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("cuda", 0))
