"""What the compilers make of the kernels, for GPUs that are not there.

A call's launches are recorded (:func:`recorded`: ``kernels/_launch.py`` is replaced, nothing runs) and compiled by
Triton as it would for a GPU: its own binder tells which arguments are constants and what 16 divides. :func:`figures`
does so for the programs of ``benchmarks/programs.py`` in a process of its own, since Triton reads TRITON_INTERPRET
when it is imported:

    {"128": {"sm_90": {"registers": 56, "stack": 0, "spills": 0, "instructions": 1073, ...}}}

Loops are told by their instructions, largest first; passes are those with no loop inside that load 16 bytes at once.
Barriers are those inside of loops, where every warp of a program waits for the others again and again.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

if TYPE_CHECKING:
    from fastmask.kernels._launch import Hardware

ROOT = pathlib.Path(__file__).parents[1]

Figures = dict[str, Any]


class Target(NamedTuple):
    """A GPU: what Triton calls it, and what launches ask of it; see ``Hardware`` in ``kernels/_launch.py``."""

    triton: tuple[str, int | str, int]
    hardware: dict[str, Any]


_L2 = 2**20
# An A100, an RTX 4090, an H200 (of the facts an H100), a B200, an RTX 5090, an MI300X.
TARGETS = {
    "sm_80": Target(("cuda", 80, 32), {"capability": (8, 0), "num_multiprocessors": 108, "l2_bytes": 40 * _L2}),
    "sm_89": Target(("cuda", 89, 32), {"capability": (8, 9), "num_multiprocessors": 128, "l2_bytes": 72 * _L2}),
    "sm_90": Target(("cuda", 90, 32), {}),
    "sm_100": Target(("cuda", 100, 32), {"capability": (10, 0), "num_multiprocessors": 148, "l2_bytes": 126 * _L2}),
    "sm_120": Target(("cuda", 120, 32), {"capability": (12, 0), "num_multiprocessors": 170, "l2_bytes": 96 * _L2}),
    "gfx942": Target(
        ("hip", "gfx942", 64),
        {"vendor": "amd", "capability": None, "num_multiprocessors": 304, "warp_size": 64, "l2_bytes": 4 * _L2},
    ),
}
# For kernels that these tell enough of: each further target compiles as long.
THREE_TARGETS = ("sm_80", "sm_90", "gfx942")


class Launch(NamedTuple):
    """What a kernel was to be launched with: arguments by name, and Triton's options among them."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def name(self) -> str:
        name: str = self.kernel.__name__
        return name


def hardware(target: str) -> Hardware:
    """What launch plans are told of a target."""
    from fastmask.kernels import _launch

    return _launch.H100._replace(**TARGETS[target].hardware)


@contextmanager
def recorded(of: Hardware) -> Iterator[list[Launch]]:
    """Gathers what would be launched on such a GPU by calls with ``backend="triton"`` on the CPU; nothing runs."""
    from fastmask import _dispatch
    from fastmask.kernels import _launch

    launches: list[Launch] = []

    def launch(kernel: Any, grid: tuple[int, ...], on: object, **arguments: object) -> None:
        launches.append(Launch(kernel, grid, arguments))

    with (
        mock.patch.object(_launch, "launch", launch),
        mock.patch.object(_launch, "hardware", return_value=of),
        mock.patch.object(_dispatch, "_interpreting", return_value=True),  # the CPU counts as a GPU
    ):
        yield launches


def figures(operation: str, wanted: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Figures]]:
    """Of an operation's programs, each at the targets it is wanted for: by program and target."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.compiled"],
        input=json.dumps({"operation": operation, "wanted": {name: list(wanted[name]) for name in wanted}}),
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
    )
    if found.returncode:
        raise RuntimeError(f"the programs of {operation} were not compiled:\n{found.stderr[-4000:]}")
    result: dict[str, dict[str, Figures]] = json.loads(found.stdout)
    return result


# In the process that compiles


def main() -> None:
    """From JSON on stdin to JSON on stdout, see :func:`figures`."""
    from benchmarks.programs import PROGRAMS

    request = json.load(sys.stdin)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        programs, compilers = PROGRAMS[request["operation"]], {name: Compiler(name) for name in TARGETS}
        result: dict[str, dict[str, Figures]] = {}
        for name, targets in request["wanted"].items():
            result[name] = {}
            for target in targets:
                with recorded(hardware(target)) as launches:
                    programs[name].call()
                of_kernel = [launch for launch in launches if launch.name == programs[name].kernel]
                result[name][target] = compilers[target].figures(of_kernel[programs[name].number])
    json.dump(result, sys.stdout)


class Compiler:
    """Triton's compiler for one target."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._figures: dict[str, Figures] = {}  # of each binary: several launches may be of one

    def compile(self, launch: Launch) -> Any:
        """What Triton would load to launch it. Leaves the process with this target's driver."""
        from triton.runtime import driver

        driver.set_active(_driver(self.target))
        compiled = launch.kernel.warmup(grid=launch.grid, **launch.arguments)
        lanes = compiled.metadata.num_warps * TARGETS[self.target].triton[2]
        assert lanes <= 1024, f"{launch.name} has {lanes} lanes, more than a program can have"
        return compiled

    def figures(self, launch: Launch) -> Figures:
        """Of its machine code; besides, its warps, bytes of shared memory, and lanes of a block."""
        compiled = self.compile(launch)
        if compiled.hash not in self._figures:
            is_nvidia = self.target.startswith("sm_")
            of_code = nvidia_figures(compiled.asm["cubin"]) if is_nvidia else amd_figures(compiled.asm["amdgcn"])
            of_launch = {"kernel": launch.name, "num_warps": compiled.metadata.num_warps}
            self._figures[compiled.hash] = {**of_launch, "shared": compiled.metadata.shared, **of_code}
        blocks = [launch.arguments[name] for name in ("BLOCK_V", "BLOCK_N", "BLOCK") if name in launch.arguments]
        return self._figures[compiled.hash] | {"block": blocks[0] if blocks else None}


def _driver(target: str) -> Any:
    """A driver of Triton's that says its device is such a GPU: enough to compile for it."""
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase

    class Driver(DriverBase):
        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return ty

        def get_current_target(self) -> Any:
            return GPUTarget(*TARGETS[target].triton)

        def get_active_torch_device(self) -> Any:
            raise NotImplementedError

        def get_benchmarker(self) -> Any:
            raise NotImplementedError

        def get_current_device(self) -> str:  # what Triton keeps its kernels by
            return target

        def get_current_stream(self, device: str) -> int:
            return 0

    return Driver()


def nvidia_figures(cubin: bytes) -> Figures:
    """Registers, stack, spills, instructions, loops, barriers inside of them, widths of loads and stores."""
    import triton.backends.nvidia

    cuobjdump = pathlib.Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    code = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
        if not text.startswith("NOP")
    ]
    loops = _loops(code)
    # "No spill" is STACK 0 and no local loads or stores: LOCAL stays 0 even with thousands of spills.
    return {
        "registers": _number(r"REG:(\d+)", usage),
        "stack": _number(r"STACK:(\d+)", usage),
        "spills": sum(bool(re.search(r"\b(STL|LDL)\b", text)) for _, text in code),
        "instructions": len(code),
        "loops": [len(loop) for loop in loops],
        "passes": [len(loop) for loop in loops if len(_loops(loop)) == 1 and _widest(loop, "LDG") == 128],
        "barriers": sum(bool(re.search(r"\bBAR\b", text)) for _, text in {line for loop in loops for line in loop}),
        "load_bits": _widest(code, "LDG"),
        "store_bits": _widest(code, "STG"),
    }


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, pattern
    return int(found[1])


def _loops(code: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """The code of each loop, largest first: what a backward branch jumps over."""
    loops = []
    for address, text in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append([line for line in code if int(target[1], 16) <= line[0] <= address])
    return sorted(loops, key=len, reverse=True)


def _widest(code: list[tuple[int, str]], operation: str) -> int:
    """The most bits that a thread moves in one such operation."""
    found = [name for _, text in code for name in re.findall(rf"\b{operation}\S*", text)]
    narrow = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    return max((max([narrow.get(part, 0) for part in text.split(".")]) or 32 for text in found), default=0)


def amd_figures(assembly: str) -> Figures:
    """Vector registers, bytes of scratch memory, spills, instructions."""
    body = re.findall(r"^\s+([sv]_\w+|(?:global|buffer|flat|ds|scratch)_\w+)", assembly, re.MULTILINE)
    return {
        "registers": _number(r"\.vgpr_count:\s+(\d+)", assembly),
        "stack": _number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        "spills": _number(r"\.vgpr_spill_count:\s+(\d+)", assembly),
        "scalar_spills": _number(r"\.sgpr_spill_count:\s+(\d+)", assembly),
        "instructions": len(body),
    }


if __name__ == "__main__":
    main()
