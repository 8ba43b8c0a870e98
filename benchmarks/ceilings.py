"""How long a launch takes on a GPU, and what holds it up.

Bounds, of which the largest names what holds a launch up:

* instructions: four warps issue one each, a cycle and multiprocessor (SM)
* special functions: 16 lanes of an SM, so that a warp's takes two cycles
* L2 and memory: bytes over the rate at which each moves them
* latency: of a program, the cycles of a warp by itself, which has its loads, shuffles and barriers in it; as many
  programs run side by side on an SM as registers, shared memory and warps let in, and the rest come after them

Of work and transfers the lesser hides behind the greater, as far as other programs run beside: of n, an n-th does
not. Instructions are statements of PTX, as many as ran, for sm_90 (``benchmarks/executed.py``). To each launch its
beginning and end are added. Throughput counts at :data:`REACHED` of what a GPU has, since no kernel reaches all of
it. What is left out: clocks that fall under load, and what ptxas makes of the PTX.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from benchmarks.executed import Executed

REACHED = 0.92
LAUNCH = 2e-6  # seconds from the end of a kernel until the next has begun everywhere, or one of PyTorch's is over
MAX_WARPS, MAX_PROGRAMS, REGISTERS, SHARED = 64, 32, 65536, 227 * 1024  # of an SM


class Gpu(NamedTuple):
    """clock: cycles a second. memory, l2: bytes a second, read and written. product: FLOP a second, of bfloat16."""

    target: str
    num_multiprocessors: int
    clock: float
    memory: float
    l2: float
    product: float


# Memory and product of the H200 as they were measured, the H100's as others tell them; the B200's by the H200's share
# of its data sheet. L2 as microbenchmarks tell it of the H100, the B200's by SMs and clock.
GPUS = {
    "H100": Gpu("sm_90", 132, 1.755e9, 3.0e12, 5.5e12, 700e12),
    "H200": Gpu("sm_90", 132, 1.755e9, 4.3e12, 5.5e12, 790e12),
    "B200": Gpu("sm_100", 148, 1.85e9, 7.0e12, 6.5e12, 1790e12),
}


def bounds(launch: Executed, gpu: Gpu) -> dict[str, float]:
    """Seconds by each bound."""
    busy = min(launch.programs, gpu.num_multiprocessors)  # SMs
    rounds = launch.programs / (gpu.num_multiprocessors * resident(launch))
    cycles = busy * gpu.clock * REACHED
    return {
        "instructions": launch.statements / (4 * cycles),
        "special functions": 2 * launch.special / cycles,
        "L2": launch.l2_bytes / (gpu.l2 * REACHED),
        "memory": launch.memory_bytes / (gpu.memory * REACHED),
        "latency": max(launch.cycles, launch.mean_cycles * rounds) / gpu.clock,
    }


def seconds(launch: Executed, gpu: Gpu) -> float:
    """By all bounds together."""
    of = bounds(launch, gpu)
    work, transfers = max(of["instructions"], of["special functions"]), max(of["L2"], of["memory"])
    beside = max(1.0, min(resident(launch), launch.programs / gpu.num_multiprocessors))
    return max(of["latency"], max(work, transfers) + min(work, transfers) / beside)


def resident(launch: Executed) -> int:
    """How many programs of a launch an SM holds."""
    registers = -(-launch.registers // 8) * 8 * 32 * launch.num_warps
    return max(
        1,
        min(
            MAX_PROGRAMS,
            MAX_WARPS // launch.num_warps,
            REGISTERS // registers,
            SHARED // (launch.shared + 1024),
        ),
    )


class Prediction(NamedTuple):
    """seconds; bound: what holds most of them."""

    seconds: float
    bound: str


def predict(launches: list[Executed], num_others: int, gpu: Gpu) -> Prediction:
    """Of a call: its launches after one another, and PyTorch's kernels besides."""
    shares = {"launches": LAUNCH * (len(launches) + num_others)}
    for launch in launches:
        of_launch = bounds(launch, gpu)
        name = max(of_launch, key=lambda name: of_launch[name])
        shares[name] = shares.get(name, 0.0) + seconds(launch, gpu)
    return Prediction(math.fsum(shares.values()), max(shares, key=lambda name: shares[name]))
