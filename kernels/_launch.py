"""How kernels are launched, and what they are launched on."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

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


def cdiv(x: int, y: int) -> int:
    """x / y, rounded up: what triton.cdiv gives, at a tenth of the host's time."""
    return -(-x // y)


def next_power_of_2(n: int) -> int:
    """The least power of 2 that n >= 1 does not exceed, likewise."""
    return 1 << (n - 1).bit_length()


# What Triton compiled, by kernel, device, and all that it told apart of arguments and options. Its knobs, such as
# TRITON_DEBUG, count as they are at a kernel's first launch.
_compiled: dict[tuple[Any, ...], Any] = {}


def launch(kernel: triton.JITFunction, grid: tuple[int, ...], on: Tensor, **arguments: object) -> None:
    """Launches a kernel on a tensor's device: its arguments by name, with Triton's options (num_warps) among them.

    What Triton does in Python at every launch takes the host four times as long as to bind the arguments, by its own
    rules, and to hand them to what is compiled.
    """
    with torch.cuda.device_of(on):  # Triton launches on the current device
        if not _is_quick(kernel):
            kernel[grid](**arguments)
            return
        active = triton.runtime.driver.active
        device = active.get_current_device()
        bound, specialization, options = kernel.device_caches[device][-1](**arguments)
        key = (kernel, device, *specialization, *options.items())
        compiled = _compiled.get(key)
        if compiled is None:
            _compiled[key] = kernel[grid](**arguments)
            return
        x, y, z = (*grid, 1, 1)[:3]
        stream = active.get_current_stream(device)
        compiled.run(x, y, z, stream, compiled.function, compiled.packed_metadata, None, None, None, *bound.values())


def _is_quick(kernel: triton.JITFunction) -> bool:
    """Whether nobody is to be told of a launch, nor changes what is compiled: no profiler, no interpreter."""
    runtime = triton.knobs.runtime
    return (
        isinstance(kernel, triton.JITFunction)
        and not kernel.pre_run_hooks
        and getattr(runtime, "add_stages_inspection_hook", None) is None  # Triton 3.4 has none
        and not _hooks(runtime.launch_enter_hook)
        and not _hooks(runtime.launch_exit_hook)
    )


def _hooks(hook: Any) -> Any:
    """What a launch would call; Triton 3.4 has one function, later ones a chain, empty if need be."""
    return getattr(hook, "calls", hook)
