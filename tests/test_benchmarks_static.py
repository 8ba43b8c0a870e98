"""``python -m benchmarks static``: what the compilers made, and the ceilings that what ran implies."""

from __future__ import annotations

import benchmark_helpers  # noqa: F401
import pytest
import torch

from benchmarks import bench_masked_cross_entropy as dense
from benchmarks import bench_sample_tokens as sampling
from benchmarks import ceilings, static
from benchmarks.executed import Call, Executed
from benchmarks.programs import PROGRAMS

CUDA = torch.device("cuda")
FIGURES = {"kernel": "_kernel", "registers": 40, "spills": 0, "shared": 16, "load_bits": 128, "instructions": 640}
LAUNCH = Executed("k", 4096, 4, 32, 0, 1e7, 1e6, 4 * 4096 * 6.0, 1000.0, 500.0, 2e9, 1e9)


def test_the_static_table_tells_what_the_compiler_made():
    row = static.describe("sample_tokens", "tiles T", "sm_90", FIGURES)
    assert static.table([row]).splitlines()[-1] == "| sample_tokens | tiles T | sm_90 | 40 | 0 | 16 | 128 | 640 |"
    amd = static.describe("sample_tokens", "tiles T", "gfx942", {"kernel": "_kernel", "registers": 40})
    assert static.table([amd]).splitlines()[-1] == "| sample_tokens | tiles T | gfx942 | 40 | - | - | - | - |"


@pytest.mark.parametrize(
    ("share", "case"), [(0.5, dense.Case(4096, 1000, 0.5, CUDA)), (1.0, sampling.Case(4096, 1000, None, CUDA))]
)
def test_ceilings_are_told_of_each_gpu(share, case):
    """Of a masked logit and a masked row, where only some are."""
    row = static.describe_ceilings(case, Call({"sm_90": [LAUNCH], "sm_100": [LAUNCH]}, 2))
    assert row["per_logit"] == pytest.approx(32e7 / (4096 * 1000 * share))
    assert row["warp_instructions"] == pytest.approx(1e7 / (4096 * share))
    assert row["special_per_logit"] == pytest.approx(row["per_logit"] / 10)
    assert row["barriers_of_row"] == pytest.approx(6 / share)
    assert {*row} >= {"H100", "H200", "B200"}
    for name, gpu in ceilings.GPUS.items():
        seconds, bound = ceilings.predict([LAUNCH], 2, gpu)
        moved = 2 * 4096 * 1000 * (1.5 if share < 1 else 1.0)
        assert row[name] == {"percent_of_floor": pytest.approx(100 * moved / gpu.memory / seconds), "bound": bound}
    told = static.ceilings_table([row]).splitlines()
    assert told[0].endswith("| H100 | H200 | B200 |")
    assert f"| {case} | {row['warp_instructions']:.0f} | {row['per_logit']:.1f} |" in told[-1]


def test_ceilings_are_of_small_and_large_vocabularies():
    vocabularies = {case.num_tokens for case in static.cases() if isinstance(case, dense.Case)}
    assert {33, 64, 256, 126464} <= vocabularies
    assert all(case.num_rows == static.MANY_ROWS for case in static.cases())


def test_the_static_table_takes_programs_that_the_tests_keep():
    chosen = dict(static.programs())
    assert {*chosen} == {*PROGRAMS}
    for operation, names in chosen.items():
        assert {*names} <= {*PROGRAMS[operation]}
        assert len({*names}) == len(names) > 1


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_a_step_launches_as_little_whatever_it_asks_for(target):
    """Three, and one more for the vocabulary's filters, all of them together."""
    filtered = ("top_k", "top_p", "min_p", "all filters, of sequences")
    for name, kernels in static.launches_of_steps(target).items():
        assert kernels == ["thresholds"] * (name in filtered) + ["tiles", "choose", "selection"], name
