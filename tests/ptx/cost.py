"""What launches take: bytes of global memory, statements, and cycles of a warp by itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ptx.parsing import Statement
from ptx.path import Path

SECTOR = 32  # bytes that memory moves together
SPECIAL = ("ex2", "lg2", "rcp", "sqrt", "div")  # for which a multiprocessor has few lanes


@dataclass
class Cost:
    """What a launch of a kernel took.

    read, written: bytes of global memory that its warps asked for at each statement, in whole sectors of 32 bytes, as
    caches see it. statements: of PTX, each once for each warp that ran it: about the instructions of a GPU. special:
    those of SPECIAL. barriers: as often as warps came to one.
    """

    kernel: str
    read: int = 0
    written: int = 0
    statements: int = 0
    special: int = 0
    barriers: int = 0
    path: Path = field(default_factory=Path)  # of a warp of the first program, by itself
    _sectors: dict[bool, list[Any]] = field(default_factory=lambda: {True: [], False: []})

    def add_access(self, is_load: bool, addresses: Any, warps: Any) -> None:
        """An access of one statement: the address and the warp of each thread."""
        sectors = addresses // SECTOR
        size = SECTOR * len(np.unique(sectors + (warps << 44)))
        self._sectors[is_load].append(np.unique(sectors))
        if is_load:
            self.read += size
        else:
            self.written += size

    def distinct(self) -> int:
        """Bytes of the sectors that were read, and of those that were written, each once: as memory sees it."""
        return SECTOR * sum(len(np.unique(np.concatenate(found))) for found in self._sectors.values() if found)

    def add_statements(self, statements: Sequence[Statement], num_warps: int) -> None:
        """Statements in a row that so many warps ran."""
        opcodes = [statement.parts[0] for statement in statements]
        self.statements += len(opcodes) * num_warps
        self.special += sum(opcode in SPECIAL for opcode in opcodes) * num_warps
        self.barriers += (opcodes[-1] in ("bar", "barrier") and "warp" not in statements[-1].parts) * num_warps


_launches: list[Cost] | None = None
_most_programs: int | None = None


def of_launch(kernel: str) -> Cost | None:
    """Where a launch that begins shall count, if anybody asks."""
    if _launches is None:
        return None
    _launches.append(Cost(kernel))
    return _launches[-1]


def programs_run(grid: tuple[int, int, int]) -> Any:
    """Numbers of the programs of a grid that are run: all, unless who counts wants few; x counts first."""
    numbers = np.arange(np.prod(grid)).reshape(grid[::-1])
    return numbers[..., :_most_programs].ravel()


@contextmanager
def costs(most_programs: int | None = None) -> Iterator[list[Cost]]:
    """Gathers what each launch takes, in order; of launches so large that nobody waits for them, what the first
    programs along x take, which are the only ones that run."""
    global _launches, _most_programs
    _launches, _most_programs = [], most_programs
    try:
        yield _launches
    finally:
        _launches = _most_programs = None
