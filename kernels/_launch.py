"""How kernels are launched, and what they are launched on."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor


class Hardware(NamedTuple):
    """What a launch plan asks of a GPU.

    vendor: "nvidia" or "amd". capability: NVIDIA's compute capability, (9, 0) say. num_multiprocessors: SMs, or AMD's
    compute units. warp_size: lanes of a warp, or of AMD's wavefront. max_threads: of one program. l2_bytes: its L2.
    """

    vendor: str
    capability: tuple[int, int] | None
    num_multiprocessors: int
    warp_size: int
    max_threads: int
    l2_bytes: int

    @property
    def max_warps(self) -> int:
        """Of one program."""
        return self.max_threads // self.warp_size

    @property
    def is_hopper(self) -> bool:
        """An H100 or H200: some launch plans give registers as its multiprocessors have them."""
        return self.capability == (9, 0)


# What launch plans were made for, and what stands in where there is no GPU (the interpreter, the PTX machine).
H100 = Hardware("nvidia", (9, 0), 132, 32, 1024, 50 * 2**20)


def hardware(device: torch.device) -> Hardware:
    """What a device is."""
    if device.type != "cuda":
        return H100
    return _of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _of_gpu(index: int) -> Hardware:
    properties = torch.cuda.get_device_properties(index)
    is_amd = torch.version.hip is not None
    return Hardware(
        "amd" if is_amd else "nvidia",
        None if is_amd else (properties.major, properties.minor),
        properties.multi_processor_count,
        properties.warp_size,
        1024,
        properties.L2_cache_size,
    )


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], on: Tensor, **arguments: object) -> None:
    """Launches a kernel on a tensor's device: its arguments by name, with Triton's options (num_warps) among them."""
    with torch.cuda.device_of(on):  # Triton launches on the current device
        kernel[grid](**arguments)
