"""A benchmark: one operation's cases and contenders, and how a case of it is measured."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from benchmarks import comparison, machine
from benchmarks.gate import describe
from benchmarks.records import Ceilings, Contender, Floor, Problem, Published, Row, Runs
from benchmarks.timing import Effort


def _no_bounds(case: Any, problem: Any) -> Runs:
    return {}


def _as_they_are(rows: list[Row]) -> None:
    pass


@dataclass(frozen=True)
class Benchmark:
    """One operation: its cases (few where quick), who competes, a case's problem, and what it must at least do.

    A case is a frozen dataclass with a ``device``. ``bounds``, of a case and its problem, is timed beside the
    contenders. ``finish`` may add to a case's rows.
    """

    name: str
    cases: Callable[[bool], Sequence[Any]]
    contenders: Callable[[], list[Contender]]
    problem: Callable[[Any], Problem]
    floor: Callable[[Any, Ceilings], Floor]
    bounds: Callable[[Any, Any], Runs] = _no_bounds
    finish: Callable[[list[Row]], None] = _as_they_are
    published: Published | None = None

    def measure(
        self,
        case: Any,
        effort: Effort,
        only: Callable[[Contender], bool] | None = None,
        earlier: Sequence[Row] = (),
    ) -> list[Row]:
        """The rows of a case, of all contenders or of some; ``earlier`` as in :func:`comparison.compare`."""
        limits = machine.ceilings(case.device)
        contenders = [contender for contender in self.contenders() if only is None or only(contender)]
        kept_problem.cache_clear()  # the case before need not fit beside this one
        torch.cuda.empty_cache()
        try:
            problem = kept_problem(self, case)
            bounds = self.bounds(case, problem) if only is None else {}
            rows = comparison.compare(contenders, problem, self.floor(case, limits), bounds, effort, earlier)
        except torch.OutOfMemoryError as error:
            refusal = {"status": "out of memory", "reason": f"the case itself: {describe(error)}", "errors": {}}
            rows = [comparison.identity(contender) | refusal for contender in contenders]
        shape = {field.name: getattr(case, field.name) for field in fields(case) if field.name != "device"}
        rows = [{"operation": self.name, "case": str(case), "shape": shape} | row for row in rows]
        self.finish(rows)
        return rows

    def update_floor(self, case: Any, row: Row) -> None:
        """Compares a row of the case, if it was timed, with its floor by the best ceilings so far."""
        if "ms" in row:
            row |= comparison.floor_figures(self.floor(case, machine.ceilings(case.device)), row["ms"])


@functools.lru_cache(maxsize=1)
def kept_problem(benchmark: Benchmark, case: Any) -> Problem:
    """A case's problem; the latest is kept, since pytest asks for it once for each contender."""
    return benchmark.problem(case)
