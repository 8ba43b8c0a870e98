"""What launches take: bytes of global memory and statements."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

SECTOR = 32  # bytes that memory moves together


@dataclass
class Cost:
    """What a launch of a kernel took.

    read, written: bytes of global memory that its warps asked for at each statement, in whole sectors of 32 bytes, as
    caches see it. statements: of PTX, each once for each warp that ran it: about the instructions of a GPU.
    """

    kernel: str
    read: int = 0
    written: int = 0
    statements: int = 0

    def add_access(self, is_load: bool, addresses: Any, warps: Any) -> None:
        """An access of one statement: the address and the warp of each thread."""
        size = SECTOR * len(np.unique(addresses // SECTOR + (warps << 44)))
        if is_load:
            self.read += size
        else:
            self.written += size


_launches: list[Cost] | None = None


def of_launch(kernel: str) -> Cost | None:
    """Where a launch that begins shall count, if anybody asks."""
    if _launches is None:
        return None
    _launches.append(Cost(kernel))
    return _launches[-1]


@contextmanager
def costs() -> Iterator[list[Cost]]:
    """Gathers what each launch takes, in order."""
    global _launches
    _launches = []
    try:
        yield _launches
    finally:
        _launches = None
