"""How long one warp takes by itself: each result is there some cycles after the last of what it is made of.

Within the statements between two branches order does not matter, as a compiler may choose it; a branch waits for its
predicate, a barrier for what was stored before it. So a load whose result is used behind a branch is in flight
meanwhile, and one that is used at once is waited for.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ptx.parsing import Statement

# Cycles until a result can be used, about as microbenchmarks of Hopper tell them; 4 for all others.
LATENCIES = {
    "ld.global": 600, "atom": 700, "ld.shared": 30, "ld.param": 10, "ldmatrix": 33, "shfl": 24, "redux": 20,
    "ex2": 22, "lg2": 22, "rcp": 22, "sqrt": 22, "div": 40, "cvt": 8, "mul.wide": 5,
}  # fmt: skip
LATENCY, BARRIER, BRANCH = 4, 30, 8
_REGISTER = re.compile(r"%(?:p|rs|r|rd)\d+")


class Path:
    """The way of one warp; ``cycles`` is where it is now, behind so many ``statements``."""

    def __init__(self) -> None:
        self.cycles = 0.0
        self.statements = 0
        self._ready: dict[str, float] = {}
        self._stored = 0.0

    def run(self, statements: Sequence[Statement]) -> None:
        """Statements in a row, of which only the last may be a branch, a barrier or the end."""
        begin = self.cycles
        self.statements += len(statements)
        self.cycles += len(statements)  # one is issued in a cycle
        for statement in statements:
            opcode = statement.parts[0]
            writes = [] if opcode in ("st", "stmatrix", "bra", "ret", "bar", "barrier") else statement.operands[:1]
            reads = " ".join([statement.predicate, *statement.operands[len(writes) :]])
            begun = max([begin, *(self._ready.get(name, 0.0) for name in _REGISTER.findall(reads))])
            for name in _REGISTER.findall(" ".join(writes)):
                self._ready[name] = begun + _latency(statement.parts)
            if opcode in ("st", "stmatrix"):
                self._stored = max(self._stored, begun)
            elif opcode in ("bar", "barrier") and "warp" not in statement.parts:
                self.cycles = max(self.cycles, self._stored) + BARRIER
            elif opcode == "bra":
                self.cycles = max(self.cycles, begun) + BRANCH
            elif opcode == "ret":
                self.cycles = max(self.cycles, self._stored)


def _latency(parts: tuple[str, ...]) -> int:
    spelled = ".".join(parts[:2]).removesuffix("::cta")
    return LATENCIES.get(spelled, LATENCIES.get(parts[0], LATENCY))
