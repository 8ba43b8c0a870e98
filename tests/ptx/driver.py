"""Triton's driver of the machine: what compiles up to PTX, loads and launches."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

from ptx import cost
from ptx.execution import Machine, Program
from ptx.memory import Region
from ptx.operands import UNSIGNED, WARP

# Threads that are run at once, those of many programs together: enough for numpy, few enough for a cache.
_THREADS = 2**14


class _Launcher:
    """What Triton calls to launch a kernel, with its arguments in order."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._types = list(source.signature.values())
        self._metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream: int, program: Any, *rest: Any) -> None:
        arguments = rest[4:]
        given = [(kind, value) for kind, value in zip(self._types, arguments, strict=True) if kind != "constexpr"]
        regions = [Region(value) for _, value in given if isinstance(value, torch.Tensor) and value.numel()]
        parameters = np.zeros(program.num_parameters, np.uint64)  # what Triton adds, its scratch memory, is null
        parameters[: len(given)] = [packed(kind, value) for kind, value in given]
        grid, warps, shared = (x, y, z), self._metadata.num_warps, self._metadata.shared
        counted = cost.of_launch(self._metadata.name)
        together = max(1, _THREADS // (warps * WARP))
        numbers = cost.programs_run(grid)
        for first in range(0, len(numbers), together):
            programs = numbers[first : first + together]
            Machine(program, programs, grid, warps, shared, parameters, regions, _Driver.order, counted).run()


def packed(kind: str, value: Any) -> int:
    """An argument's bits: a pointer, an integer or a float."""
    if kind.startswith("*"):
        return 0 if value is None else value.data_ptr()
    if kind.startswith("fp"):
        number = np.array(value, f"f{int(kind[2:]) // 8}")
        return int(number.view(UNSIGNED[number.itemsize]))
    return int(value) % 2 ** int(kind[1:])


class _Backend(CUDABackend):
    """Triton's compiler for NVIDIA, up to PTX."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:
        return "ptx only, " + super().hash()


class _Utilities:
    """What Triton asks of a device."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[Program, Program, int, int, int]:
        """Module (without one Triton would load again at each launch), function, registers and spills, of which
        nothing is known, and the most threads of a program."""
        program = Program(kernel.decode())
        return program, program, 0, 0, 1024


class _Driver(DriverBase):
    """An H200 in the place of the CPU."""

    utils = _Utilities
    launcher_cls = _Launcher
    order = "first"

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, WARP)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def activate(order: str) -> None:
    """Makes every launch of this process run here.

    order: which warp of a program goes ahead, see :class:`Machine`.
    """
    _Driver.order = order
    backends["nvidia"] = Backend(_Backend, _Driver)
    driver.set_active(_Driver())
