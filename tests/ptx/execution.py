"""Programs, and the machine that runs many of them side by side: branches, barriers, the ends of threads."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from ptx.cost import Cost
from ptx.instructions import KNOWN, make_action
from ptx.memory import Places, Region
from ptx.operands import POISON, SPECIAL, WARP, Action, Read, Selection, reader, width_of
from ptx.parsing import Statement, parse


@dataclass(frozen=True)
class Step:
    """A statement, ready to run, or one after which threads may go different ways, wait or end."""

    kind: str
    act: Action | None
    target: int
    predicate: Read | None


class Program:
    """The code of a kernel."""

    def __init__(self, ptx: str) -> None:
        self.num_parameters = len(set(re.findall(r"\.param .*?_param_(\d+)", ptx)))
        statements, labels = parse(ptx)
        self.registers = sorted(set(re.findall(r"%(?:p|rs|r|rd)\d+", " ".join(s.text for s in statements))))
        self.statements = statements
        self.steps = [self._step(statement, labels) for statement in statements]
        # Where threads that went different ways may meet again.
        self.starts = frozenset(labels.values())

    @staticmethod
    def _step(statement: Statement, labels: dict[str, int]) -> Step:
        name = statement.parts[0]
        if not KNOWN.fullmatch(".".join(statement.parts)):
            raise NotImplementedError(f"of PTX: {statement.text}")
        predicate = reader(statement.predicate, np.dtype(bool)) if statement.predicate else None
        if name == "bra":
            return Step("branch", None, labels[statement.operands[0]], predicate)
        if name == "ret":
            return Step("end", None, -1, predicate)
        if name in ("bar", "barrier"):
            kind = "warp barrier" if "warp" in statement.parts else "barrier"
            return Step(kind, None, -1, predicate)
        return Step("", make_action(statement), -1, None)


class Machine:
    """Runs some programs of a launch, all of their threads side by side.

    Threads are ordered by turn, then program, then lane: the warps whose turn it is are a slice. order: "first" lets
    the first warp of a program go ahead, "last" the last, "both" the first of every other program and the last of the
    rest.
    """

    def __init__(
        self,
        program: Program,
        programs: Any,
        grid: tuple[int, int, int],
        num_warps: int,
        shared: int,
        parameters: Any,
        regions: list[Region],
        order: str,
        cost: Cost | None = None,
    ) -> None:
        self.program, self.parameters, self.regions = program, parameters, regions
        self.cost = cost
        self.follows = programs[0] == 0  # its first warp, for how long it takes
        self.num_warps, self.num_programs = num_warps, len(programs)
        shape = (num_warps, len(programs), WARP)
        size = num_warps * len(programs) * WARP
        self.lanes = np.arange(size)
        self.registers = {name: self._poisoned(name, size) for name in program.registers}
        self.shared_size = (shared + 15) // 16 * 16
        self.shared = np.full((len(programs), self.shared_size), POISON, np.uint8)
        turn, index, lane = (x.ravel() for x in np.broadcast_arrays(*np.ogrid[tuple(slice(n) for n in shape)]))
        is_reversed = {"first": False, "last": True, "both": programs[index] % 2 == 1}[order]
        warp = np.where(is_reversed, num_warps - 1 - turn, turn)
        x, y, z = np.unravel_index(programs[index], grid, order="F")
        self.program_index = index
        values = (warp * WARP + lane, x, y, z, *(np.full(size, n) for n in grid), lane)
        self.special = {name: v.astype(np.uint32) for name, v in zip(SPECIAL, values, strict=True)}
        self.counter = np.zeros(size, np.int64)
        self.is_waiting = np.zeros(size, bool)
        self.is_live = np.ones(size, bool)

    @staticmethod
    def _poisoned(register: str, size: int) -> Any:
        return np.full(size * np.dtype(width_of(register)).itemsize, POISON, np.uint8).view(width_of(register))

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while self.is_live.any():
                if not (self.is_live & ~self.is_waiting).any():
                    self._release()
                self._advance(self._next())

    def _release(self) -> None:
        """Lets every program's threads pass the barrier at which all of them wait."""
        waiting = self.is_waiting.reshape(self.num_warps, self.num_programs, WARP)
        live = self.is_live.reshape(waiting.shape)
        if (waiting.any((0, 2)) & ~live.all((0, 2))).any():
            raise RuntimeError("some threads of a program wait at a barrier that others never reach")
        self.is_waiting[:] = False

    def _next(self) -> Selection:
        """The threads that run next: of one warp of each program, those that are furthest behind."""
        runnable = self.is_live & ~self.is_waiting
        turn = np.flatnonzero(runnable.reshape(self.num_warps, -1).any(axis=1))[0]
        size = self.num_programs * WARP
        candidates = slice(turn * size, (turn + 1) * size)
        runnable, counter = runnable[candidates], self.counter[candidates]
        behind = runnable & (counter == counter[runnable].min())
        return candidates if behind.all() else self.lanes[candidates][behind]

    def _advance(self, select: Selection) -> None:
        """Runs statements until the threads may part or meet others."""
        first = counter = int(self.counter[select][0])
        steps, starts = self.program.steps, self.program.starts
        while True:
            step = steps[counter]
            counter += 1
            if step.kind == "":
                step.act(self, select)
            elif step.kind != "warp barrier":  # a warp's threads run together here
                self._turn(step, counter, select)
                break
            if counter in starts:
                self.counter[select] = counter
                break
        if self.cost is not None:
            ran, warps = self.program.statements[first:counter], np.unique(self.lanes[select] // WARP)
            self.cost.add_statements(ran, len(warps))
            if self.follows and warps[0] == 0:
                self.cost.path.run(ran)

    def _turn(self, step: Step, following: int, select: Selection) -> None:
        self.counter[select] = following
        if step.predicate is not None:
            mask = np.broadcast_to(step.predicate(self, select), self.lanes[select].shape)
            select = self.lanes[select][mask]
        if step.kind == "branch":
            self.counter[select] = step.target
        elif step.kind == "barrier":
            self.is_waiting[select] = True
        else:
            self.is_live[select] = False

    def places(
        self, space: str, addresses: Any, dtype: np.dtype, count: int, select: Selection, statement: Statement
    ) -> Places:
        """Where so many elements from each address on lie; refuses what is outside of memory or not aligned."""
        size = dtype.itemsize * count
        if (addresses % size).any():
            raise RuntimeError(f"an address that is not divisible by {size}: {statement.text}")
        first, end = int(addresses.min()), int(addresses.max()) + size
        if space == "param":
            return Places(self.parameters.view(dtype), addresses // dtype.itemsize)
        if space == "shared":
            if first < 0 or end > self.shared_size:
                raise RuntimeError(f"outside of {self.shared_size} bytes of shared memory: {statement.text}")
            own = self.program_index[select] * self.shared_size + addresses
            return Places(self.shared.reshape(-1).view(dtype), own // dtype.itemsize)
        if self.cost is not None:
            self.cost.add_access(statement.parts[0] == "ld", addresses, self.lanes[select] // WARP)
        for region in self.regions:
            if region.start <= first and end <= region.end:
                return region.places(addresses, dtype)
        raise RuntimeError(f"outside of what the launch was given, or of two tensors at once: {statement.text}")
