"""What a call takes where its kernels run from their PTX, on a GPU made of numpy (``tests/ptx``).

The launches, and what the compiler gives their programs, are those of the GPU that is asked for; of large ones only
the first programs run, and count for all. So what is counted lies on the path that these take: branches that nobody
takes count nothing. Rows should be alike, then.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import compiled

sys.path.append(str(compiled.ROOT / "tests"))

MOST_PROGRAMS = 8  # along the rows

# Operations of PyTorch's that launch no kernel; besides, whatever only gives a view.
_FREE = ("empty", "detach", "alias", "_unsafe_view", "lift_fresh", "set_", "is_", "sym_", "resize_")


class Executed(NamedTuple):
    """A launch: of a kernel so many programs, each of so many warps, registers a thread and bytes of shared memory.

    Of all its warps: statements, those of special functions, barriers. cycles, mean_cycles: of one warp by itself, of
    the first program and, by its statements, on average. l2_bytes, memory_bytes: of sectors at each access, and of
    sectors once.
    """

    kernel: str
    programs: int
    num_warps: int
    registers: int
    shared: int
    statements: float
    special: float
    barriers: float
    cycles: float
    mean_cycles: float
    l2_bytes: float
    memory_bytes: float


class Call(NamedTuple):
    """A call: launches of its kernels, by what GPU they are compiled for, and how many kernels of PyTorch's."""

    launches: dict[str, list[Executed]]
    num_others: int


class _Counting(TorchDispatchMode):
    """Counts what PyTorch would launch on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.num_kernels = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        namespace, _, name = function._schema.name.partition("::")
        is_view = any(result.alias_info is not None and not result.alias_info.is_write
                      for result in function._schema.returns)  # fmt: skip
        self.num_kernels += namespace == "aten" and not is_view and not name.startswith(_FREE)
        return function(*arguments, **(options or {}))


def num_operations(call: Callable[[], object]) -> int:
    """How many operations of PyTorch's a call runs, of those that launch something on a GPU."""
    with _Counting() as counting:
        call()
    return counting.num_kernels


def count(preparations: Sequence[Callable[[], Callable[[], object]]], targets: Sequence[str]) -> list[Call]:
    """Of calls on the CPU, with ``backend="auto"``, each prepared when its turn comes. To be asked for once in a
    process, in which kernels run from PTX from then on."""
    assert "TRITON_INTERPRET" not in os.environ, "the interpreter runs no PTX"
    import ptx

    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache):
        of_targets = {target: [_compiled(prepare(), target) for prepare in preparations] for target in targets}
        found = []
        ptx.activate("first")
        for number, prepare in enumerate(preparations):
            call = prepare()
            with _kernels_here(), ptx.costs(MOST_PROGRAMS) as costs:
                call()
            launches = {target: [*map(_joined, of_targets[target][number][0], costs)] for target in targets}
            found.append(Call(launches, of_targets[targets[0]][number][1]))
        return found


@contextmanager
def _kernels_here() -> Iterator[None]:
    """``backend="auto"`` means the kernels, on the CPU."""
    from fastmask import _dispatch

    with (
        mock.patch.object(_dispatch, "_interpreting", return_value=True),
        mock.patch.dict(os.environ, FASTMASK_BACKEND="triton"),
    ):
        yield


def _compiled(call: Callable[[], object], target: str) -> tuple[list[tuple[compiled.Launch, dict[str, Any]]], int]:
    """The launches of a call and what the compiler tells of each; and how many kernels of PyTorch's there are."""
    with _kernels_here(), compiled.recorded(compiled.hardware(target)) as launches:
        call()  # makes what is made once
        launches.clear()
        others = num_operations(call)
    compiler = compiled.Compiler(target)
    return [(launch, compiler.figures(launch)) for launch in launches], others


def _joined(recorded: tuple[compiled.Launch, dict[str, Any]], cost: Any) -> Executed:
    """Of a launch what the compiler told and what was counted, for all of its programs."""
    launch, figures = recorded
    assert launch.name == cost.kernel, f"{launch.name} was compiled, {cost.kernel} was run"
    grid = (*launch.grid, 1, 1)[:3]
    programs = grid[0] * grid[1] * grid[2]
    share = grid[0] / min(grid[0], MOST_PROGRAMS)
    mean_statements = cost.statements * share / (programs * figures["num_warps"])
    return Executed(
        kernel=launch.name.strip("_").removesuffix("_kernel"),
        programs=programs,
        num_warps=figures["num_warps"],
        registers=figures["registers"],
        shared=figures["shared"],
        statements=cost.statements * share,
        special=cost.special * share,
        barriers=cost.barriers * share,
        cycles=cost.path.cycles,
        mean_cycles=cost.path.cycles * min(1.0, mean_statements / cost.path.statements),
        l2_bytes=(cost.read + cost.written) * share,
        memory_bytes=cost.distinct() * share,
    )
