"""One case, all contenders: the gate, then rounds that alternate between them, and a row of results for each."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence

import torch

from benchmarks import gate, timing
from benchmarks.gate import Refused, admit
from benchmarks.records import IDS_ONLY, UNITS, Contender, Floor, Problem, Row, Runs
from benchmarks.timing import Effort


def compare(
    contenders: Iterable[Contender],
    problem: Problem,
    floor: Floor,
    bounds: Runs,
    effort: Effort,
    earlier: Sequence[Row] = (),
) -> list[Row]:
    """Gate, time and measure the memory of every contender at one case.

    Args:
        floor: what the case must at least do.
        bounds: work that is timed in the same rounds and is no contender (bare products, the network alone).
        earlier: the rows of an earlier visit, whose rounds count too; who was refused or wrong there stays so.

    Returns:
        A row for each contender, the refused ones included, then one for each bound.
    """
    rows, steps = [], {}
    visited = {row["contender"]: row for row in earlier}
    fresh_compilers()
    for contender in contenders:
        row, before = identity(contender), visited.get(str(contender), {})
        if before and "times" not in before:
            rows.append(before)
            continue
        try:
            steps[str(contender)], errors = admit(contender, problem)
            reason = gate.why_wrong(errors, problem.limits)
            if before.get("reason"):
                errors, reason = before["errors"], before["reason"]
            row |= {"status": "wrong" if reason else "ok", "reason": reason, "errors": errors}
        except Refused as refusal:
            row |= {"status": refusal.status, "reason": refusal.reason, "errors": refusal.errors}
        rows.append(row)
    runs = {name: step.run for name, step in steps.items()} | dict(bounds)
    restores = {name: step.restore for name, step in steps.items()}
    times = {
        name: [*visited.get(name, {}).get("times", ()), *found]
        for name, found in timing.time_rounds(runs, restores, problem.device, effort).items()
    }
    for row in rows:
        if row["contender"] in steps:
            step = steps[row["contender"]]
            row |= timing_figures(times[row["contender"]], floor)
            row |= {"host_ms": timing.host_ms(step), "of_limit": _share_of_limit(row, problem.limits)}
            step.restore()
            row["peak_mib"] = None if step.contender.keeps_memory else timing.peak_mib(step.run, problem.device)
    for name in bounds:
        row = {"contender": name, "name": name, "given": "", "status": "bound", "reason": "", "errors": {}}
        row |= {"is_ours": False, "is_baseline": False, "host_ms": None, "peak_mib": None, "of_limit": None}
        rows.append(row | timing_figures(times[name], floor))
    add_ratios(rows)
    return rows


def fresh_compilers() -> None:
    """Forgets compiled functions: torch.compile runs a function eagerly, silently, from its ninth shape on."""
    if torch.cuda.is_available():
        torch.compiler.reset()


def identity(contender: Contender) -> Row:
    """What a row says of its contender, timed or not."""
    row: Row = {"contender": str(contender), "name": contender.name, "given": contender.given}
    return row | {"is_ours": contender.is_ours, "is_baseline": contender.is_baseline}


def floor_figures(floor: Floor, milliseconds: float) -> Row:
    """The time of a row against its floor."""
    least = floor.milliseconds
    row: Row = {"rate": floor.rate_of(milliseconds), "unit": floor.unit, "floor_ms": least}
    row["percent_of_floor"] = None if least is None else 100 * least / milliseconds
    if floor.logits and floor.rate is not None:
        row["bytes_per_logit"] = floor.rate * UNITS[floor.unit] * milliseconds * 1e-3 / floor.logits
    return row


def timing_figures(times: Sequence[float], floor: Floor) -> Row:
    """The median of the rounds, their spread, and the median against the floor."""
    median = statistics.median(times)
    row: Row = {"ms": median, "spread": [min(times), max(times)], "rounds": len(times), "times": times}
    return row | floor_figures(floor, median)


def _share_of_limit(row: Row, limits: Mapping[str, float]) -> float:
    """The largest error as a share of what it may be."""
    return max((error / limits[name] for name, error in row["errors"].items() if limits[name] > 0), default=0.0)


def add_ratios(rows: Sequence[Row]) -> None:
    """How many times faster than each of these a row is: eager, the best peer at the same job (ids only are less of
    one), the bound (a share, so below 1)."""
    timed = [row for row in rows if "ms" in row]
    eager = [row["ms"] for row in timed if row["is_baseline"]]
    bounds = [row["ms"] for row in timed if row["status"] == "bound"]
    peers = [row for row in timed if row["status"] == "ok" and not row["is_ours"]]
    for row in timed:
        same_job = [peer["ms"] for peer in peers if (peer["given"] == IDS_ONLY) == (row["given"] == IDS_ONLY)]
        rivals = {"eager": eager, "best peer": same_job, "bound": bounds}
        row["ratio"] = {name: min(times) / row["ms"] for name, times in rivals.items() if times}
