"""Time and memory of runs: interleaved rounds, the host's own time, and peaks of memory."""

from __future__ import annotations

import ctypes
import gc
import pathlib
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.records import Runs, Step

# Written so often between runs: empties the L2 cache, and keeps the GPU busy (by its bandwidth an H200 for about
# a millisecond) while the host queues the run, as in training.
FLUSH_BYTES, FLUSHES = 2**30, 4


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


def time_rounds(runs: Runs, restores: Runs, device: torch.device, effort: Effort) -> dict[str, list[float]]:
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


def _resident_mib(name: str) -> float:
    found = re.search(rf"{name}:\s+(\d+) kB", pathlib.Path("/proc/self/status").read_text())
    return int(found[1]) / 1024 if found else float("nan")
