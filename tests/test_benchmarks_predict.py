"""``python -m benchmarks predict``: what is counted, what bounds follow from it, and that each case has its row."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import benchmark_helpers
import pytest
import torch

from benchmarks import bench_mask_sampling as masking
from benchmarks import ceilings, end_to_end, executed, predict
from benchmarks.ceilings import GPUS, REACHED, Gpu
from benchmarks.executed import Executed

# As many cycles a second as warp instructions: four SMs of a GPU that does one of everything in a second.
GPU = Gpu("sm_90", 4, clock=1.0, memory=10.0, l2=40.0, product=100.0)
BOUNDS = ("launches", "instructions", "special functions", "L2", "memory", "latency", "products", "host")
LAUNCH = Executed("k", 4, 4, 32, 0, 0, 0, 0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("taken", "bound", "seconds"),
    [
        ({"statements": 160}, "instructions", 10 / REACHED),  # four a cycle and SM
        ({"special": 20}, "special functions", 10 / REACHED),  # half a warp a cycle and SM
        ({"memory_bytes": 100, "l2_bytes": 300}, "memory", 10 / REACHED),
        ({"memory_bytes": 100, "l2_bytes": 800}, "L2", 20 / REACHED),
        ({"memory_bytes": 100, "statements": 80}, "memory", 15 / REACHED),  # one program an SM: one after the other
        ({"memory_bytes": 100, "statements": 80, "programs": 20}, "memory", 11 / REACHED),  # five
        ({"cycles": 50, "mean_cycles": 50, "statements": 160}, "latency", 50),
        ({"statements": 160, "programs": 1}, "instructions", 40 / REACHED),  # of four SMs one works
        ({"cycles": 50, "mean_cycles": 40, "programs": 4 * 16 * 3}, "latency", 120),  # three rounds of 16 an SM
        ({"cycles": 50, "mean_cycles": 10, "programs": 4 * 16 * 3}, "latency", 50),
    ],
)
def test_the_largest_bound_counts(taken, bound, seconds):
    launch = LAUNCH._replace(**taken)
    prediction = ceilings.predict([launch], 0, GPU)
    assert prediction.bound == bound
    assert prediction.seconds == pytest.approx(seconds + ceilings.LAUNCH)


@pytest.mark.parametrize(
    ("program", "num_programs"),
    [
        ({}, 16),  # 64 warps
        ({"num_warps": 1}, 32),
        ({"registers": 255}, 2),
        ({"registers": 100}, 4),  # given by eights
        ({"shared": 100 * 1024}, 2),
        ({"num_warps": 32, "registers": 64}, 1),
    ],
)
def test_programs_side_by_side(program, num_programs):
    assert ceilings.resident(LAUNCH._replace(**program)) == num_programs


def test_launches_follow_each_other():
    launches = [LAUNCH._replace(statements=160), *(LAUNCH._replace(cycles=cycles) for cycles in (50, 30))]
    prediction = ceilings.predict(launches, 2, GPU)
    expected = 10 / REACHED + 80 + 5 * ceilings.LAUNCH
    assert prediction.seconds == pytest.approx(expected)
    assert prediction.bound == "latency"
    assert ceilings.predict([], 2, GPU) == (2 * ceilings.LAUNCH, "launches")


def test_operations_that_launch_are_counted():
    x = torch.ones(4, 4)
    assert executed.num_operations(lambda: x[0].detach().t().reshape(2, 2)) == 0
    assert executed.num_operations(lambda: torch.empty_like(x).fill_(1.0) + x.view(16).sum()) == 3


def test_the_linear_loss_takes_at_least_its_products():
    case = predict.suite.bench_linear_masked_cross_entropy.Case(8192, 32768, 1024, 0.5, torch.device("cuda"))
    seconds, bound = predict.predict_linear(case, GPUS["H200"])
    assert bound == "products"
    assert 6 * 4096 * 1024 * 32768 / 790e12 < seconds < 1.4 * 6 * 4096 * 1024 * 32768 / 790e12


@pytest.mark.parametrize("task", end_to_end.TASKS)
def test_a_network_is_held_up_by_products_or_by_the_host(task):
    case = end_to_end.Case(task, 16, 1024, 50257, 512, 8, torch.device("cuda"))
    seconds, bound = predict.predict_end_to_end(case, 10, GPUS["H200"])
    assert bound == "products"
    assert predict.predict_end_to_end(case, 10, GPUS["H100"]).seconds > seconds
    assert predict.predict_end_to_end(case, 10**6, GPUS["H200"]) == (5.0, "host")


def test_every_quick_case_has_its_row_on_both_gpus():
    """Made anew by ``python -m benchmarks predict``."""
    cases = predict.quick_cases()
    assert {case.device.type for _, case in cases} == {"cuda"}
    lines = [
        line.strip("| ").split(" | ") for line in predict.FILE.read_text().splitlines() if line.startswith("| `")
    ]
    assert [(operation, case) for operation, case, *_ in lines] == [
        (f"`{benchmark.name}`", str(case)) for benchmark, case in cases
    ]
    for _, _, *of_gpus in lines:
        for microseconds, share, bound in (of_gpus[:3], of_gpus[3:]):
            assert float(microseconds) > 0
            assert share == "-" or 0 <= int(share.removesuffix("%")) <= 100
            assert bound in (
                "launches",
                "instructions",
                "special functions",
                "L2",
                "memory",
                "latency",
                "products",
                "host",
            )


_COUNT = """
import functools, json, sys, torch
from benchmarks import bench_mask_sampling as masking, executed, predict
case = masking.Case(16, 128, False, torch.device("cpu"))
(call,) = executed.count([functools.partial(predict.prepare, masking.BENCHMARK, case)], ["sm_90"])
print(json.dumps([launch._asdict() for launch in call.launches["sm_90"]]))
"""


@pytest.mark.slow
def test_a_kernel_is_counted_where_it_runs():
    """Half of the programs run and count for all."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", _COUNT]
    done = subprocess.run(command, cwd=benchmark_helpers.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (launch,) = json.loads(done.stdout)
    assert (launch["kernel"], launch["programs"], launch["num_warps"]) == ("mask_sampling", 16, 1)
    assert masking.BYTES_PER_POSITION * 16 * 128 <= launch["memory_bytes"] <= 1.2 * 27 * 16 * 128
    assert launch["memory_bytes"] <= launch["l2_bytes"]
    assert 500 < launch["statements"] / 16 < launch["cycles"] < 20_000
