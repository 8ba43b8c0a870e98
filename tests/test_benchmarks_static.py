"""``python -m benchmarks static``: the bandwidth that counted instructions imply."""

from __future__ import annotations

import benchmark_helpers  # noqa: F401
import pytest

from benchmarks import static
from benchmarks.programs import PROGRAMS

FIGURES = {"kernel": "_kernel", "registers": 40, "spills": 0, "shared": 16, "load_bits": 128}


def test_the_static_table_implies_a_bandwidth():
    figures = FIGURES | {"instructions": 640, "loops": [], "block": 4096, "num_warps": 4}
    row = static.describe("sample_tokens", "tiles T", "sm_90", figures)
    assert row["per_element"] == 640 / 32  # 4096 logits over 128 threads
    assert row["ceiling"] == pytest.approx(132 * 128 * 1.755e9 / 20 * 2)
    on_amd = static.describe("sample_tokens", "tiles T", "gfx942", figures | {"num_warps": 2})
    assert on_amd["per_element"] == 640 / 32  # 2 warps of 64
    assert "ceiling" not in static.describe("sample_tokens", "choice", "sm_90", figures)
    assert "| sample_tokens | tiles T | sm_90 | 40 | 0 | 16 | 128 | 20.0 | 3.0 (69%) |" in static.table([row])


def test_two_passes_count_by_their_loops():
    figures = FIGURES | {"instructions": 999, "block": 1024, "num_warps": 4}
    row = static.describe("masked_cross_entropy", "one tile", "sm_90", figures | {"loops": [80, 40, 7]})
    assert row["per_element"] == 120 / 8
    amd = static.describe("masked_cross_entropy", "one tile", "gfx942", figures)
    assert "per_element" not in amd  # no loops are told


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
