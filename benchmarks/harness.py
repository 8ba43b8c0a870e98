"""The one place that measures: the correctness gate, interleaved timing, measured ceilings, and tables.

A :class:`Contender` is one way to do a job; a :class:`Problem` holds one case's tensors, runs a contender on them,
and tells its errors. A contender enters the timing only after its results at that very case were held to the
reference; one that cannot be timed gets a row that says why.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import importlib.metadata
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

Row = dict[str, Any]
Runs = Mapping[str, Callable[[], object]]

# What a contender is given, where that differs between contenders (the losses): the mask; labels with -100 where
# unmasked; or only the masked rows, gathered beforehand and not timed. Ratios are told apart by it.
WITH_MASK = "given the mask"
ALL_ROWS = "all rows"
COMPACTED = "compacted rows"
RIVALS = {WITH_MASK: "best on all rows", ALL_ROWS: "best on all rows", COMPACTED: "best on compacted"}

# Written so often between runs: empties the L2 cache, and keeps the GPU busy (by its bandwidth an H200 for about
# a millisecond) while the host queues the run, as in training.
FLUSH_BYTES, FLUSHES = 2**30, 4

UNITS = {"GB/s": 1e9, "TFLOP/s": 1e12, "tokens/s": 1.0}


@dataclass(frozen=True)
class Effort:
    """Rounds of a visit to a case: as many as fit into ``seconds``, between the two bounds."""

    min_rounds: int
    max_rounds: int
    seconds: float


FULL = Effort(3, 30, 8.0)
QUICK = Effort(3, 30, 3.0)

# How often a full run comes to each case on a CPU: minutes apart, so that the spread has the machine's drift in it.
# A GPU drifts less, and there each visit would compile everything anew.
CPU_VISITS = 2

NEEDS_CUDA = "needs CUDA"


class Refused(Exception):
    """A contender that failed the gate at this case: ``status`` is the kind of failure, ``reason`` says more."""

    def __init__(self, status: str, reason: str, errors: dict[str, float] | None = None) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason, self.errors = status, reason, errors or {}


@dataclass(frozen=True)
class Contender:
    """One way to do the job of a benchmark.

    ``load`` imports what it needs and returns what the problem's ``run`` takes, a function as a rule.
    """

    name: str
    given: str
    load: Callable[[], Any]
    is_ours: bool = False
    is_baseline: bool = False
    overwrites: bool = False  # its input, which is put back before each run, not timed
    needs_cuda: bool = False
    keeps_memory: bool = False  # from run to run, so that what one allocates besides tells nothing
    timed_if_wrong: bool = False  # what people run today: its time is told all the same, beside its errors

    def __str__(self) -> str:
        return f"{self.name}, {self.given}" if self.given else self.name


class Problem(Protocol):
    """One case's tensors, drawn once, and the reference every contender is held to.

    device: where the case runs; inputs: tensors of the size of what a contender allocates; limits: the most that
    each of ``errors`` may be.
    """

    @property
    def device(self) -> torch.device: ...

    @property
    def inputs(self) -> tuple[Tensor, ...]: ...

    @property
    def limits(self) -> Mapping[str, float]: ...

    def restore(self, contender: Contender) -> None:
        """Puts back what the contender overwrote."""

    def run(self, contender: Contender, function: Any) -> Any:
        """What is timed, and its results."""

    def errors(self, step: Step) -> dict[str, float]:
        """How far the results of ``step.run``, called as often as needed, are from the reference; NaN is wrong."""


@dataclass(frozen=True)
class Step:
    """A contender ready to be timed: ``restore`` what it overwrote (not timed), then ``run``."""

    contender: Contender
    function: Any
    problem: Problem

    def restore(self) -> None:
        self.problem.restore(self.contender)

    def run(self) -> Any:
        return self.problem.run(self.contender, self.function)


@dataclass(frozen=True)
class Floor:
    """What a case must at least move (bytes) or multiply (FLOP), and the machine's measured rate in ``unit``.

    Without a rate the amount is only what throughput is told in; with ``logits`` the time is also told in bytes a
    logit at that rate.
    """

    amount: float
    rate: float | None
    unit: str
    logits: int = 0

    @property
    def milliseconds(self) -> float | None:
        return None if self.rate is None else self.amount / (self.rate * UNITS[self.unit]) * 1e3

    def achieved(self, milliseconds: float) -> float:
        """The rate in ``unit`` of a run that took so long."""
        return self.amount / (milliseconds * 1e-3) / UNITS[self.unit]


@dataclass(frozen=True)
class Published:
    """A figure of somebody else's on another machine: stated beside ours, never mixed with measured ones."""

    who: str
    rate: float
    unit: str
    source: str


def relative_error(out: Tensor, expected: Tensor) -> float:
    """L2, in float64."""
    if out.shape != expected.shape:
        raise ValueError(f"expected a result of shape {list(expected.shape)}, received {list(out.shape)}")
    difference = torch.zeros((), dtype=torch.float64, device=expected.device)
    norm = difference.clone()
    for part, whole in zip(out.detach().reshape(-1).split(2**26), expected.reshape(-1).split(2**26), strict=True):
        difference += (part.double() - whole.double()).square().sum()
        norm += whole.double().square().sum()
    return (difference / norm).sqrt().item()


def admit(contender: Contender, problem: Problem) -> tuple[Step, dict[str, float]]:
    """The gate: the contender's step and its errors, or Refused."""
    if contender.needs_cuda and problem.device.type != "cuda":
        raise Refused(NEEDS_CUDA, f"this case is on {problem.device.type}")
    try:
        function = contender.load()
    except Exception as error:  # a peer may fail in any way when it is imported
        raise Refused("does not import", _describe(error)) from None
    step = Step(contender, function, problem)
    try:
        step.restore()
        for like in problem.inputs:  # an output nobody wrote shows in reused memory
            torch.full_like(like, float("nan") if like.is_floating_point() else torch.iinfo(like.dtype).max)
        errors = problem.errors(step)
    except torch.OutOfMemoryError as error:
        raise Refused("out of memory", _describe(error)) from None
    except Exception as error:
        raise Refused("raises", _describe(error)) from None
    wrong = _wrong(errors, problem.limits)
    if wrong and not contender.timed_if_wrong:
        raise Refused("wrong", wrong, errors)
    return step, errors


def _wrong(errors: Mapping[str, float], limits: Mapping[str, float]) -> str:
    """Every error beside its limit if any is beyond it, else nothing."""
    if all(error <= limits[name] for name, error in errors.items()):
        return ""
    return ", ".join(f"{name} {error:.1e} (limit {limits[name]:.0e})" for name, error in errors.items())


def _describe(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def draw_mask(rows: int, mask_ratio: float, device: torch.device, generator: torch.Generator) -> Tensor:
    """[rows] bool with exactly round(mask_ratio rows) masked, so that the floor is exact."""
    order = torch.randperm(rows, generator=generator, device=device)
    return order < round(mask_ratio * rows)


def fresh_compilers() -> None:
    """Forgets compiled functions: torch.compile runs a function eagerly, silently, from its ninth shape on."""
    if torch.cuda.is_available():
        torch.compiler.reset()


class _Clock:
    """Milliseconds of one run: device events on CUDA, the host's clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        if self.is_cuda:
            self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def time(self, run: Callable[[], object], restore: Callable[[], object]) -> float:
        restore()
        if not self.is_cuda:
            begin = time.perf_counter()
            run()
            return (time.perf_counter() - begin) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(FLUSHES):
            self.flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def time_rounds(runs: Runs, restores: Runs, device: torch.device, effort: Effort = FULL) -> dict[str, list[float]]:
    """Milliseconds of each run in rounds that alternate between them, after two rounds (one long one) to warm up."""
    clock = _Clock(device)

    def measure_round() -> dict[str, float]:
        return {name: clock.time(run, restores.get(name, _nothing)) for name, run in runs.items()}

    seconds = sum(measure_round().values()) / 1e3
    if seconds < effort.seconds:
        seconds = sum(measure_round().values()) / 1e3
    rounds = max(effort.min_rounds, min(effort.max_rounds, int(effort.seconds / max(1e-6, seconds))))
    measured = [measure_round() for _ in range(rounds)]
    return {name: [times[name] for times in measured] for name in runs}


def _nothing() -> None:
    pass


def peak_mib(run: Callable[[], object], device: torch.device) -> float | None:
    """MiB that a run allocates over what its inputs take: by the allocator's count on CUDA, as growth of the
    resident set on Linux, else None."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    if platform.system() != "Linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)  # else what was freed before is resident, and taken again unseen
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    resident = _resident_mib("VmRSS")
    run()
    return _resident_mib("VmHWM") - resident


def host_ms(step: Step) -> float | None:
    """Milliseconds until the host is free again, None on a CPU: what it takes to queue a run, and where a run waits
    for the GPU, that too."""
    if step.problem.device.type != "cuda":
        return None
    times: list[float] = []
    while not times or (sum(times) < 100.0 and len(times) < 10):
        step.restore()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step.run()
        times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(times)


def _resident_mib(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")


@dataclass(frozen=True)
class Ceilings:
    """What this machine was measured to do."""

    copy: float  # GB/s, bytes read plus bytes written
    product: float  # TFLOP/s of a large matrix product


_best: dict[tuple[torch.device, torch.dtype], Ceilings] = {}


def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best that was measured so far in this process."""
    if (device, dtype) not in _best:
        measure_ceilings(device, dtype)
    return _best[device, dtype]


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> None:
    """Some rounds with the same clock as everything else; the best of them counts, and of all before them."""
    is_cuda = device.type == "cuda"
    size, numel = (8192, 2**30) if is_cuda else (1024, 2**25)
    source = torch.randn(numel, device=device, dtype=dtype)
    target = torch.empty_like(source)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    product = torch.empty_like(a)
    runs = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=product)}
    least = {name: min(times) for name, times in time_rounds(runs, {}, device, QUICK).items()}
    copied = Floor(2 * numel * source.element_size(), None, "GB/s").achieved(least["copy"])
    multiplied = Floor(2 * size**3, None, "TFLOP/s").achieved(least["product"])
    remember_ceilings(device, dtype, Ceilings(copied, multiplied))


def remember_ceilings(device: torch.device, dtype: torch.dtype, found: Ceilings) -> None:
    """What was measured now, or in an earlier part of this run."""
    before = _best.get((device, dtype), Ceilings(0.0, 0.0))
    _best[device, dtype] = Ceilings(max(before.copy, found.copy), max(before.product, found.product))


def compare(
    contenders: Iterable[Contender],
    problem: Problem,
    floors: Mapping[str, Floor],
    bounds: Runs,
    effort: Effort = FULL,
    earlier: Sequence[Row] = (),
) -> list[Row]:
    """Gate, time and measure the memory of every contender at one case.

    Args:
        floors: what each kind of ``given`` must at least do.
        bounds: work that is timed in the same rounds and is no contender (bare products, the network alone).
        earlier: the rows of an earlier visit, whose rounds count too; who was refused or wrong there stays so.

    Returns:
        A row for each contender, the refused ones included, then one for each bound.
    """
    rows, steps = [], {}
    visited = {row["contender"]: row for row in earlier}
    fresh_compilers()
    for contender in contenders:
        row, before = _identity(contender), visited.get(str(contender), {})
        if before and "times" not in before:
            rows.append(before)
            continue
        try:
            steps[str(contender)], errors = admit(contender, problem)
            reason = _wrong(errors, problem.limits)
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
        for name, found in time_rounds(runs, restores, problem.device, effort).items()
    }
    for row in rows:
        if row["contender"] in steps:
            step = steps[row["contender"]]
            row |= _timing(times[row["contender"]], _floor(row, floors))
            row |= {"host_ms": host_ms(step), "of_limit": _of_limit(row, problem.limits)}
            step.restore()
            row["peak_mib"] = None if step.contender.keeps_memory else peak_mib(step.run, problem.device)
    for name in bounds:
        row = {"contender": name, "name": name, "given": "", "status": "bound", "reason": "", "errors": {}}
        row |= {"is_ours": False, "is_baseline": False, "host_ms": None, "peak_mib": None, "of_limit": None}
        rows.append(row | _timing(times[name], _floor(row, floors)))
    _add_ratios(rows)
    return rows


def _identity(contender: Contender) -> Row:
    row: Row = {"contender": str(contender), "name": contender.name, "given": contender.given}
    return row | {"is_ours": contender.is_ours, "is_baseline": contender.is_baseline}


def _of_limit(row: Row, limits: Mapping[str, float]) -> float:
    """The largest error as a share of what it may be."""
    return max((error / limits[name] for name, error in row["errors"].items() if limits[name] > 0), default=0.0)


def _floor(row: Row, floors: Mapping[str, Floor]) -> Floor:
    """What a row is held to; a bound of an operation on rows, to that of compacted rows."""
    return floors[row["given"]] if row["given"] in floors else floors[COMPACTED]


def _timing(times: Sequence[float], floor: Floor) -> Row:
    median = statistics.median(times)
    row: Row = {"ms": median, "spread": [min(times), max(times)], "rounds": len(times), "times": times}
    return row | _against(floor, median)


def _against(floor: Floor, milliseconds: float) -> Row:
    least = floor.milliseconds
    row: Row = {"rate": floor.achieved(milliseconds), "unit": floor.unit, "floor_ms": least}
    row["percent_of_floor"] = None if least is None else 100 * least / milliseconds
    if floor.logits and floor.rate is not None:
        row["bytes_per_logit"] = floor.rate * UNITS[floor.unit] * milliseconds * 1e-3 / floor.logits
    return row


def _add_ratios(rows: Sequence[Row]) -> None:
    """How many times faster than each of these a row is: eager, the best peers, the bound (a share, so below 1)."""
    timed = [row for row in rows if "ms" in row]
    rivals: dict[str, list[float]] = {}
    for row in timed:
        if row["status"] == "bound":
            rivals.setdefault("bound", []).append(row["ms"])
        if row["is_baseline"]:
            rivals.setdefault("eager", []).append(row["ms"])
        if row["status"] == "ok" and not row["is_ours"]:
            rivals.setdefault(RIVALS.get(row["given"], "best peer"), []).append(row["ms"])
    order = [name for name in ("eager", "best peer", *dict.fromkeys(RIVALS.values()), "bound") if name in rivals]
    for row in timed:
        row["ratio"] = {name: min(rivals[name]) / row["ms"] for name in order}


# A table's columns: heading, the row's field, and its cell. A column that no row has is left out.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("ms", "ms", "{:.3f}".format),
    ("[min, max]", "spread", lambda spread: "[{:.3f}, {:.3f}]".format(*spread)),
    ("rate", "rate", lambda rate: f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"),
    ("% of floor", "percent_of_floor", "{:.0f}".format),
    ("bytes/logit", "bytes_per_logit", "{:.1f}".format),
    ("outside ms", "outside_ms", "{:.3f}".format),
    ("host ms", "host_ms", "{:.3f}".format),
    ("peak MiB", "peak_mib", "{:.0f}".format),
    ("error/limit", "of_limit", "{:.1g}".format),
)


def table(rows: Sequence[Row], published: Published | None) -> str:
    """One case's rows as text: the timed ones by rising time, then those that were not timed, and why."""
    timed = sorted((row for row in rows if "ms" in row), key=lambda row: row["ms"])
    lines = [f"\n{rows[0]['operation']}, {rows[0]['case']}"]
    if timed:
        lines += _aligned(timed)
    untold: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row["reason"]:
            how = "timed although" if "ms" in row else "not timed,"
            names = untold.setdefault(f"{how} {row['status']} ({row['reason']})", {})
            names.setdefault(row["name"], []).append(row["given"])
    for why, names in untold.items():
        lines.append(f"{why}: " + "; ".join(_with_given(name, given) for name, given in names.items()))
    ours = [row for row in timed if row["is_ours"]]
    if published is not None and ours:
        rate = max(row["rate"] for row in ours)
        lines.append(
            f"{published.who}, published, not measured here: {published.rate:g} {published.unit} "
            f"({published.source}); ours here {rate:.0f}, {rate / published.rate:.2f} of it"
        )
    return "\n".join(lines)


def _aligned(timed: Sequence[Row]) -> list[str]:
    columns = [column for column in _COLUMNS if any(row.get(column[1]) is not None for row in timed)]
    ratios = [*timed[0]["ratio"]]
    head = [
        "",
        *(timed[0]["unit"] if name == "rate" else name for name, _, _ in columns),
        *(f"x {r}" for r in ratios),
    ]
    body = [
        [
            row["contender"],
            *("-" if row.get(key) is None else cell(row[key]) for _, key, cell in columns),
            *(f"{row['ratio'][name]:.2f}" for name in ratios),
        ]
        for row in timed
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in [head, *body]
    ]


def _with_given(name: str, given: Sequence[str]) -> str:
    return f"{name} [{', '.join(given)}]" if any(given) else name


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 on a CPU, where bfloat16 is emulated."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def _no_bounds(case: Any, problem: Any) -> Runs:
    return {}


def _as_they_are(rows: list[Row]) -> None:
    pass


@dataclass(frozen=True)
class Benchmark:
    """One operation: its cases (few where quick), who competes, a case's problem, and what it must at least do.

    ``case`` is a frozen dataclass with a ``device``; ``bounds``, of a case and its problem, is timed beside the
    contenders; ``finish`` may add to a case's rows.
    """

    name: str
    cases: Callable[[bool], Sequence[Any]]
    contenders: Callable[[], list[Contender]]
    problem: Callable[[Any], Problem]
    floors: Callable[[Any, Ceilings], Mapping[str, Floor]]
    bounds: Callable[[Any, Any], Runs] = _no_bounds
    finish: Callable[[list[Row]], None] = _as_they_are
    published: Published | None = None

    def measure(
        self,
        case: Any,
        effort: Effort = FULL,
        only: Callable[[Contender], bool] | None = None,
        earlier: Sequence[Row] = (),
    ) -> list[Row]:
        """The rows of a case, of all contenders or of some; ``earlier`` as in :func:`compare`."""
        limits = ceilings(case.device, default_dtype(case.device))
        contenders = [contender for contender in self.contenders() if only is None or only(contender)]
        _problem.cache_clear()  # the case before need not fit beside this one
        torch.cuda.empty_cache()
        try:
            problem = _problem(self, case)
            bounds = self.bounds(case, problem) if only is None else {}
            rows = compare(contenders, problem, self.floors(case, limits), bounds, effort, earlier)
        except torch.OutOfMemoryError as error:
            refusal = {"status": "out of memory", "reason": f"the case itself: {_describe(error)}", "errors": {}}
            rows = [_identity(contender) | refusal for contender in contenders]
        shape = {field.name: getattr(case, field.name) for field in fields(case) if field.name != "device"}
        rows = [{"operation": self.name, "case": str(case), "shape": shape} | row for row in rows]
        self.finish(rows)
        return rows

    def hold(self, case: Any, row: Row) -> None:
        """Holds a row of the case, if it was timed, to the best ceilings so far."""
        if "ms" in row:
            floors = self.floors(case, ceilings(case.device, default_dtype(case.device)))
            row |= _against(_floor(row, floors), row["ms"])

    def run_pytest(self, benchmark: Any, case: Any, contender: Contender) -> None:
        """The same gate and step under pytest-benchmark."""
        fresh_compilers()
        problem = _problem(self, case)
        try:
            step, _ = admit(contender, problem)
        except Refused as refusal:
            if contender.is_ours and refusal.status != NEEDS_CUDA:
                raise
            pytest.skip(str(refusal))

        def run() -> None:
            step.run()
            if problem.device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{self.name}, {case}"
        benchmark.pedantic(run, setup=step.restore, rounds=CPU_VISITS * FULL.min_rounds, warmup_rounds=1)


def show(cases: Sequence[tuple[Benchmark, Any]], quick: bool) -> Iterator[list[Row]]:
    """Measures cases, prints a table of each visit, and yields a case's rows after the last one.

    A CPU's ceilings are measured again before each visit, since its speed drifts.
    """
    device, start = default_device(), time.monotonic()
    print(machine(device), flush=True)
    found: list[list[Row]] = [[] for _ in cases]
    num_visits = CPU_VISITS if device.type == "cpu" and not quick else 1
    for number, place in enumerate(list(range(len(cases))) * num_visits, 1):
        benchmark, case = cases[place]
        told = f"\n[{number}/{num_visits * len(cases)}, {time.monotonic() - start:.0f} s] {benchmark.name}, {case}"
        print(told, flush=True)
        if device.type == "cpu":
            measure_ceilings(device, default_dtype(device))
        found[place] = benchmark.measure(case, QUICK if quick else FULL, earlier=found[place])
        print(table(found[place], benchmark.published if case.device.type == "cuda" else None), flush=True)
        if number > (num_visits - 1) * len(cases):
            yield [{key: value for key, value in row.items() if key != "times"} for row in found[place]]
    print(f"\nin all: {machine(device)}", flush=True)


@functools.lru_cache(maxsize=1)
def _problem(benchmark: Benchmark, case: Any) -> Problem:
    """The one problem that is kept: pytest asks for it once for each contender."""
    return benchmark.problem(case)


def any_of_ours_refused(rows: Iterable[Row]) -> bool:
    return any(row["is_ours"] and row["status"] not in ("ok", NEEDS_CUDA) for row in rows)


def machine(device: torch.device) -> str:
    """The device, the versions, and the ceilings measured so far."""
    limits = ceilings(device, default_dtype(device))
    versions_told = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"{device_name(device)}; {versions_told}\n"
        f"measured here: copy {limits.copy:.0f} GB/s, product {limits.product:.3g} TFLOP/s"
    )


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


PACKAGES = (
    "fastmask", "torch", "triton", "x-transformers", "liger-kernel", "cut-cross-entropy", "fla-core",
    "quack-kernels", "flash-attn", "flashinfer-python",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
