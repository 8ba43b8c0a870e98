"""The one place that measures: the correctness gate, interleaved timing, measured ceilings, and tables.

A :class:`Contender` computes a loss and its gradients; a :class:`Problem` holds one case's tensors and the
float64 reference. A contender enters the timing only after its loss and gradients at that very case were held to
the reference; one that cannot be timed gets a row that says why.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.metadata
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

Row = dict[str, Any]
Loss = Callable[..., Tensor]

# What a contender is given beside the rows: the mask; labels with -100 where unmasked; or only the masked rows,
# gathered beforehand and not timed (its gradient is of those rows only).
WITH_MASK = "given the mask"
ALL_ROWS = "all rows"
COMPACTED = "compacted rows"
IGNORE_INDEX = -100

# Relative L2 error of loss and gradients against float64. On logits of this spread, V 32768 and 151936,
# x-transformers' own loss, all in bfloat16, is at 3.5e-2, the others' gradients are below 1e-2, and a gradient
# without its softmax term is at 3e-1.
LIMITS = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
LOGIT_SPREAD = 4.0

# Written between runs: empties the L2 cache, and keeps the GPU busy while the host queues the run, as in training.
FLUSH_BYTES = 2**30
MIN_ROUNDS, MAX_ROUNDS, CASE_SECONDS = 5, 30, 8.0

UNITS = {"GB/s": 1e9, "TFLOP/s": 1e12}


class Refused(Exception):
    """A contender that cannot be timed at this case: ``status`` is the kind of failure, ``reason`` says more."""

    def __init__(self, status: str, reason: str, errors: dict[str, float] | None = None) -> None:
        super().__init__(f"{status}: {reason}")
        self.status, self.reason, self.errors = status, reason, errors or {}


@dataclass(frozen=True)
class Contender:
    """One way to compute the mean cross-entropy of the masked rows.

    ``load`` imports what it needs and returns ``loss(rows, *parameters, targets, is_masked)`` for WITH_MASK,
    ``loss(rows, *parameters, labels)`` otherwise.
    """

    name: str
    given: str
    load: Callable[[], Loss]
    is_ours: bool = False
    is_baseline: bool = False
    overwrites: bool = False  # the rows, which are put back before each run, not timed
    needs_cuda: bool = False

    def __str__(self) -> str:
        return f"{self.name}, {self.given}"


@dataclass(frozen=True)
class Floor:
    """What a case must at least move (bytes) or multiply (FLOP), and the machine's measured rate in ``unit``."""

    amount: float
    rate: float
    unit: str

    @property
    def milliseconds(self) -> float:
        return self.amount / (self.rate * UNITS[self.unit]) * 1e3

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


@dataclass
class Problem:
    """One case's tensors, drawn once, and the reference every contender is held to.

    rows: [R, V] logits or [R, D] embeddings; parameters: () or (weight [V, D],); targets: [R] int64; is_masked:
    [R] bool; reference: the loss, the gradient of the rows and those of the parameters, float32 from float64.
    """

    rows: Tensor
    parameters: tuple[Tensor, ...]
    targets: Tensor
    is_masked: Tensor
    reference: tuple[Tensor, ...] = field(init=False)
    _arguments: dict[str, tuple[Tensor, ...]] = field(init=False, default_factory=dict)
    _scratch: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.reference = _reference(self)

    def arguments(self, given: str) -> tuple[Tensor, ...]:
        """The loss's arguments: shared by all contenders that are given the same, so that they fit side by side."""
        if given not in self._arguments:
            rows, targets = self.rows, self.targets
            extra: tuple[Tensor, ...] = (targets, self.is_masked)
            if given == ALL_ROWS:
                extra = (targets.where(self.is_masked, IGNORE_INDEX),)
            elif given == COMPACTED:
                rows, extra = rows[self.is_masked], (targets[self.is_masked],)
            leaves = (rows, *self.parameters)
            self._arguments[given] = (*(leaf.detach().requires_grad_() for leaf in leaves), *extra)
        return self._arguments[given]

    def scratch(self, given: str) -> Tensor:
        """A copy of the rows for contenders that overwrite them."""
        if given not in self._scratch:
            self._scratch[given] = self.arguments(given)[0].detach().clone().requires_grad_()
        return self._scratch[given]

    def errors(self, given: str, outputs: Sequence[Tensor]) -> dict[str, float]:
        """Relative L2 error of the loss and of each gradient; NaN where anything is NaN."""
        loss, rows, *parameters = self.reference
        expected = (loss, rows[self.is_masked] if given == COMPACTED else rows, *parameters)
        names = ("loss", "rows' gradient", "weight's gradient")
        return {
            name: _relative_error(*pair)
            for name, pair in zip(names, zip(outputs, expected, strict=True), strict=False)
        }


def _reference(problem: Problem) -> tuple[Tensor, ...]:
    """Loss and gradients in float64, chunk of rows by chunk of rows, kept in float32."""
    index = problem.is_masked.nonzero().squeeze(-1)
    parameters = [parameter.detach().double().requires_grad_() for parameter in problem.parameters]
    total = torch.zeros((), dtype=torch.float64, device=index.device)
    grad_rows = torch.zeros_like(problem.rows, dtype=torch.float32)
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for chunk in index.split(1024):
        rows = problem.rows.detach()[chunk].double().requires_grad_()
        logits = F.linear(rows, *parameters) if parameters else rows
        loss = F.cross_entropy(logits, problem.targets[chunk], reduction="sum") / len(index)
        grad_chunk, *grads = torch.autograd.grad(loss, (rows, *parameters))
        total += loss.detach()
        grad_rows[chunk] = grad_chunk.float()
        for gradient, grad in zip(gradients, grads, strict=True):
            gradient += grad
    return total.float(), grad_rows, *(gradient.float() for gradient in gradients)


def _relative_error(out: Tensor, expected: Tensor) -> float:
    if out.shape != expected.shape:
        raise ValueError(f"expected a result of shape {list(expected.shape)}, received {list(out.shape)}")
    difference = torch.zeros((), dtype=torch.float64, device=expected.device)
    norm = difference.clone()
    for part, whole in zip(out.detach().reshape(-1).split(2**26), expected.reshape(-1).split(2**26), strict=True):
        difference += (part.double() - whole.double()).square().sum()
        norm += whole.double().square().sum()
    return (difference / norm).sqrt().item()


class _Produced(torch.autograd.Function):
    """Rows as a network hands them over: not a leaf, so that they may be overwritten."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.new_empty(0).set_(rows.untyped_storage(), rows.storage_offset(), rows.shape, rows.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@dataclass(frozen=True)
class Step:
    """A contender ready to be timed: ``restore`` what it overwrote (not timed), then ``run``."""

    contender: Contender
    loss: Loss
    problem: Problem

    def restore(self) -> None:
        if self.contender.overwrites:
            given = self.contender.given
            self.problem.scratch(given).detach().copy_(self.problem.arguments(given)[0].detach())

    def run(self) -> tuple[Tensor, ...]:
        """The loss, and the gradients of the rows and of the parameters."""
        arguments = self.problem.arguments(self.contender.given)
        count = 1 + len(self.problem.parameters)
        leaves, extra = arguments[:count], arguments[count:]
        if self.contender.overwrites:
            leaves = (_Produced.apply(self.problem.scratch(self.contender.given)), *leaves[1:])
        loss = self.loss(*leaves, *extra)
        return loss.detach(), *torch.autograd.grad(loss, leaves)


def admit(contender: Contender, problem: Problem) -> tuple[Step, dict[str, float]]:
    """The gate: the contender's step and its errors, or Refused."""
    if contender.needs_cuda and problem.rows.device.type != "cuda":
        raise Refused("needs CUDA", f"this case is on {problem.rows.device.type}")
    try:
        loss = contender.load()
    except Exception as error:  # a peer may fail in any way when it is imported
        raise Refused("does not import", _describe(error)) from None
    step = Step(contender, loss, problem)
    try:
        step.restore()
        for leaf in (problem.rows, *problem.parameters):  # an output nobody wrote shows as NaN in reused memory
            torch.full_like(leaf, float("nan"))
        errors = problem.errors(contender.given, step.run())
    except torch.OutOfMemoryError as error:
        raise Refused("out of memory", _describe(error)) from None
    except Exception as error:
        raise Refused("raises", _describe(error)) from None
    limit = LIMITS[problem.rows.dtype]
    if not all(error <= limit for error in errors.values()):
        told = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        raise Refused("wrong", f"relative error {told}; the limit is {limit:.0e}", errors)
    return step, errors


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

    def time(self, run: Callable[[], object], restore: Callable[[], None]) -> float:
        restore()
        if not self.is_cuda:
            begin = time.perf_counter()
            run()
            return (time.perf_counter() - begin) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self.flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def time_rounds(
    runs: Mapping[str, Callable[[], object]], restores: Mapping[str, Callable[[], None]], device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of each run in rounds that alternate between them; the first two rounds warm up."""
    clock = _Clock(device)
    warm = [[clock.time(run, restores.get(name, _nothing)) for name, run in runs.items()] for _ in range(2)]
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(CASE_SECONDS * 1e3 / max(1e-3, sum(warm[-1])))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(clock.time(run, restores.get(name, _nothing)))
    return times


def _nothing() -> None:
    pass


def peak_mib(step: Step) -> float | None:
    """MiB that a run allocates over what its inputs take; None on a CPU, where torch does not count."""
    if step.problem.rows.device.type != "cuda":
        return None
    step.restore()
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = step.run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del outputs
    return peak / 2**20


@dataclass(frozen=True)
class Ceilings:
    """What this machine was measured to do."""

    copy: float  # GB/s, bytes read plus bytes written
    product: float  # TFLOP/s of a large matrix product


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Measured once in a process, with the same clock as everything else."""
    is_cuda = device.type == "cuda"
    size, numel = (8192, 2**30) if is_cuda else (1024, 2**25)
    source = torch.randn(numel, device=device, dtype=dtype)
    target = torch.empty_like(source)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    product = torch.empty_like(a)
    times = time_rounds(
        {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=product)}, {}, device
    )
    medians = {name: statistics.median(values) for name, values in times.items()}
    copied = Floor(2 * numel * source.element_size(), 1.0, "GB/s")
    multiplied = Floor(2 * size**3, 1.0, "TFLOP/s")
    return Ceilings(copied.achieved(medians["copy"]), multiplied.achieved(medians["product"]))


def compare(
    case: str,
    contenders: Iterable[Contender],
    problem: Problem,
    floors: Mapping[str, Floor],
    bounds: Mapping[str, Callable[[], object]],
) -> list[Row]:
    """Gate, time and measure the memory of every contender at one case.

    Args:
        floors: what each kind of ``given`` must at least do.
        bounds: work that is timed in the same rounds and computes no loss (bare products).

    Returns:
        A row for each contender, the refused ones included, then one for each bound.
    """
    rows, steps = [], {}
    fresh_compilers()
    for contender in contenders:
        row: Row = {"case": case, "contender": str(contender), "name": contender.name, "given": contender.given}
        row |= {"is_ours": contender.is_ours, "is_baseline": contender.is_baseline, "status": "ok", "reason": ""}
        try:
            steps[str(contender)], row["errors"] = admit(contender, problem)
        except Refused as refusal:
            row |= {"status": refusal.status, "reason": refusal.reason, "errors": refusal.errors}
        rows.append(row)
    runs = {name: step.run for name, step in steps.items()} | dict(bounds)
    times = time_rounds(runs, {name: step.restore for name, step in steps.items()}, problem.rows.device)
    for row in rows:
        if row["status"] == "ok":
            row |= _timing(times[row["contender"]], floors[row["given"]])
            row["peak_mib"] = peak_mib(steps[row["contender"]])
    for name in bounds:
        row = {"case": case, "contender": name, "name": name, "given": "", "status": "bound", "reason": ""}
        row |= {"is_ours": False, "is_baseline": False, "errors": {}, "peak_mib": None}
        rows.append(row | _timing(times[name], floors[COMPACTED]))
    _add_ratios(rows)
    return rows


def _timing(times: Sequence[float], floor: Floor) -> Row:
    median = statistics.median(times)
    return {
        "ms": median,
        "spread": [min(times), max(times)],
        "rounds": len(times),
        "rate": floor.achieved(median),
        "unit": floor.unit,
        "floor_ms": floor.milliseconds,
        "percent_of_floor": 100 * floor.milliseconds / median,
    }


def _add_ratios(rows: Sequence[Row]) -> None:
    """How many times faster than each of these a row is: eager, the best peers, the bound (a share, so below 1)."""
    timed = [row for row in rows if "ms" in row]
    peers = [row for row in timed if row["status"] == "ok" and not row["is_ours"]]
    rivals = {
        "eager": [row for row in peers if row["is_baseline"]],
        "best on all rows": [row for row in peers if row["given"] != COMPACTED],
        "best on compacted": [row for row in peers if row["given"] == COMPACTED],
        "bare products": [row for row in timed if row["status"] == "bound"],
    }
    for row in timed:
        row["ratio"] = {
            name: min(rival["ms"] for rival in group) / row["ms"] for name, group in rivals.items() if group
        }


def table(rows: Sequence[Row], published: Published | None) -> str:
    """One case's rows as text: the timed ones by rising time, then those that were not timed, and why."""
    timed = sorted((row for row in rows if "ms" in row), key=lambda row: row["ms"])
    lines = [f"\n{rows[0]['case']}"]
    if timed:
        ratios = list(timed[0]["ratio"])
        head = [
            "ms",
            "[min, max]",
            timed[0]["unit"],
            "% of floor",
            "peak MiB",
            "error",
            *(f"x {name}" for name in ratios),
        ]
        body = [[row["contender"], *_cells(row, ratios)] for row in timed]
        widths = [max(len(line[column]) for line in [["", *head], *body]) for column in range(len(head) + 1)]
        for line in [["", *head], *body]:
            first, *rest = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
            lines.append("  ".join([line[0].ljust(len(first)), *rest]))
    refused: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if "ms" not in row:
            names = refused.setdefault(f"{row['status']} ({row['reason']})", {})
            names.setdefault(row["name"], []).append(row["given"])
    for why, names in refused.items():
        lines.append(
            f"not timed, {why}: " + "; ".join(f"{name} [{', '.join(given)}]" for name, given in names.items())
        )
    ours = [row for row in timed if row["is_ours"]]
    if published is not None and ours:
        rate = max(row["rate"] for row in ours)
        lines.append(
            f"{published.who}, published, not measured here: {published.rate:g} {published.unit} "
            f"({published.source}); ours here {rate:.0f}, {rate / published.rate:.2f} of it"
        )
    return "\n".join(lines)


def _cells(row: Row, ratios: Sequence[str]) -> list[str]:
    low, high = row["spread"]
    peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    rate = f"{row['rate']:.3g}" if row["rate"] < 100 else f"{row['rate']:.0f}"
    error = f"{max(row['errors'].values()):.0e}" if row["errors"] else "-"
    floor = f"{row['percent_of_floor']:.0f}"
    told = [f"{row['ratio'][name]:.2f}" for name in ratios]
    return [f"{row['ms']:.3f}", f"[{low:.3f}, {high:.3f}]", rate, floor, peak, error, *told]


def machine(device: torch.device) -> str:
    """The device and the versions a table was measured with."""
    packages = ("torch", "triton", "fastmask", "liger-kernel", "cut-cross-entropy", "fla-core", "quack-kernels")
    versions = [f"{name} {version}" for name in packages if (version := _version(name))]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    return ", ".join([name, *versions])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 on a CPU, where bfloat16 is emulated."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def main(
    doc: str | None,
    cases: Callable[[bool], Sequence[Any]],
    measure: Callable[[Any], list[Row]],
    published: Published,
) -> int:
    """Prints the tables of one operation; 1 if fastmask was refused anywhere."""
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--quick", action="store_true", help="a large and a small shape at one mask ratio")
    arguments = parser.parse_args()
    device = default_device()
    limits = ceilings(device, default_dtype(device))
    print(machine(device))
    print(f"measured here: copy {limits.copy:.0f} GB/s, product {limits.product:.3g} TFLOP/s")
    failed = False
    for case in cases(arguments.quick):
        rows = measure(case)
        print(table(rows, published if device.type == "cuda" else None), flush=True)
        failed |= any(row["is_ours"] and row["status"] != "ok" for row in rows)
    return int(failed)


def run_benchmark(benchmark: Any, contender: Contender, problem: Problem, group: str) -> None:
    """The same gate and step under pytest-benchmark."""
    fresh_compilers()
    try:
        step, _ = admit(contender, problem)
    except Refused as refusal:
        if contender.is_ours:
            raise
        pytest.skip(str(refusal))

    def run() -> None:
        step.run()
        if problem.rows.device.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = group
    benchmark.pedantic(run, setup=step.restore, rounds=MIN_ROUNDS, warmup_rounds=1)
