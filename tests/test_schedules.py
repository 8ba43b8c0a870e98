"""Schedules: the mask ratio, its derivative, and how many positions each generation step leaves masked."""

from __future__ import annotations

import math
import pickle
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmask import Schedule
from fastmask.schedules import COSINE, LINEAR, as_schedule, step_counts
from fastmask.upstream import FASTMASK, X_TRANSFORMERS

TIMES = torch.linspace(0.0, 1.0, 1001)
# What x-transformers calls them, written down again: our own definitions would agree with themselves.
UPSTREAM = {"linear": lambda t: 1 - t, "cosine": lambda t: torch.cos(t * math.pi / 2)}


# ---- ratio and slope ----


@pytest.mark.parametrize(
    ("schedule", "ratio", "slope"),
    [
        ("linear", lambda t: 1 - t, lambda t: -torch.ones_like(t)),
        ("cosine", lambda t: (math.pi / 2 * t).cos(), lambda t: -math.pi / 2 * (math.pi / 2 * t).sin()),
        (lambda t: 1 - t**3, lambda t: 1 - t**3, lambda t: -3 * t**2),
        (Schedule(lambda t: 1 - t**2, lambda t: -2 * t), lambda t: 1 - t**2, lambda t: -2 * t),
    ],
    ids=["linear", "cosine", "callable", "Schedule"],
)
def test_ratio_and_slope_are_those_of_the_formula(schedule, ratio, slope):
    schedule, exact = as_schedule(schedule), TIMES.double()
    assert schedule(TIMES).dtype == schedule.slope(TIMES).dtype == torch.float32
    # Four ulp of 1: the product t pi / 2 rounds before the cosine does.
    torch.testing.assert_close(schedule(TIMES).double(), ratio(exact), rtol=0, atol=2**-21)
    torch.testing.assert_close(schedule.slope(TIMES).double(), slope(exact), rtol=0, atol=2**-21)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE])
def test_the_derivatives_given_are_those_of_autograd(schedule):
    by_autograd = Schedule(schedule.ratio)
    torch.testing.assert_close(schedule.slope(TIMES), by_autograd.slope(TIMES), rtol=0, atol=2**-22)


def test_slope_works_without_grad_and_leaves_no_graph():
    square = as_schedule(lambda t: 1 - t**2)
    with torch.no_grad():
        slope = square.slope(TIMES)
    assert not slope.requires_grad
    assert not TIMES.requires_grad
    torch.testing.assert_close(slope, -2 * TIMES)


def test_only_the_two_that_kernels_evaluate_have_names():
    assert (as_schedule("linear").name, as_schedule("cosine").name) == ("linear", "cosine")
    assert as_schedule(lambda t: 1 - t).name is None
    assert as_schedule(COSINE) is COSINE


@pytest.mark.parametrize("value", [0.15, 1, np.float32(0.25), Fraction(1, 2)])
def test_a_number_is_a_constant_ratio(value):
    schedule = as_schedule(value)
    assert schedule.is_constant
    assert schedule.label == float(value)
    assert schedule.name is None
    assert (schedule(TIMES) == float(value)).all()
    assert (schedule.slope(TIMES) == 0).all()
    assert pickle.loads(pickle.dumps(schedule)).is_constant
    assert not LINEAR.is_constant


# ---- from 1 to 0 ----


class Ends(torch.nn.Module):
    """A learned straight line."""

    def __init__(self, first: float, last: float) -> None:
        super().__init__()
        self.ends = torch.nn.Parameter(torch.tensor([first, last]))

    def forward(self, t):
        return self.ends[0] + (self.ends[1] - self.ends[0]) * t


@pytest.mark.parametrize("first", [0.98, 0.991, 1.0, 1.009, 1.02])
@pytest.mark.parametrize("last", [-0.02, -0.009, 0.0, 0.009, 0.02])
def test_a_schedule_falls_from_1_to_0_to_within_a_hundredth(first, last):
    schedule = as_schedule(Ends(first, last))
    if abs(first - 1) < 0.01 and abs(last) < 0.01:
        assert schedule.check_falls("a bound", "...", may_wait=False) is None
    else:
        with pytest.raises(ValueError, match=f"expected a bound with .* from {first:g} to {last:g}, .*; do this"):
            schedule.check_falls("a bound", "do this", may_wait=False)


@pytest.mark.parametrize("ratio", [lambda t: t, lambda t: 0.0 * t / 0.0, lambda t: 0.5], ids=["rises", "nan", "flat"])
def test_what_does_not_fall_is_refused(ratio):
    with pytest.raises(ValueError, match="that falls from 1 to 0"):
        as_schedule(ratio).check_falls("a bound", "...", may_wait=False)


@pytest.mark.parametrize("may_wait", [False, True])
def test_ends_on_another_device_are_not_waited_for(may_wait):
    """What falls comes back as a tensor; meta tensors, like a GPU's, cannot be read at once, nor ever."""
    falls = as_schedule(Ends(1.0, 0.0).to("meta")).check_falls("a bound", "...", may_wait=may_wait)
    assert falls.shape == ()
    assert falls.dtype == torch.bool
    assert falls.device.type == "meta"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_ends_on_a_gpu_are_waited_for_where_that_is_allowed():
    flat = as_schedule(Ends(0.5, 0.5).cuda())
    assert not flat.check_falls("a bound", "...", may_wait=False)
    with pytest.raises(ValueError, match="that falls from 1 to 0"):
        flat.check_falls("a bound", "...", may_wait=True)


# ---- errors ----


def test_an_unknown_name_is_refused():
    with pytest.raises(
        ValueError, match="invalid schedule 'sigmoid': expected 'linear', 'cosine', a number or a callable"
    ):
        as_schedule("sigmoid")


def test_what_is_no_schedule_is_refused():
    for value in (None, True, [0.5], torch.tensor(0.5)):
        message = f"expected schedule to be a name, a number or a callable, received {type(value).__name__}"
        with pytest.raises(TypeError, match=message):
            as_schedule(value)


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 1.1, math.nan, math.inf, 2**2000])
def test_a_number_that_is_no_share_is_refused(value):
    with pytest.raises(ValueError, match=r"expected schedule, where it is a number, in \(0, 1\], received"):
        as_schedule(value)


def test_a_schedule_without_gradient_asks_for_its_derivative():
    steps = as_schedule(lambda t: (4 * (1 - t)).detach().ceil() / 4)
    with pytest.raises(ValueError, match=r"received one whose result carries no gradient; .*Schedule\(ratio, deriv"):
        steps.slope(TIMES)
    assert as_schedule(Schedule(steps.ratio, lambda t: torch.full_like(t, -1.0))).slope(TIMES).eq(-1).all()


# ---- counts of a generation ----


def exact_counts(name: str, steps: int, size: int) -> list[int]:
    """By fractions and, for the cosine, by 40 digits; what misses an integer by the tolerance is that integer."""
    shares = [Fraction(steps - i, steps) for i in range(1, steps + 1)]
    if name == "cosine":
        with mpmath.workdps(40):
            shares = [Fraction(str(mpmath.sin(mpmath.pi * int(s.numerator) / (2 * s.denominator)))) for s in shares]
    tolerance = max(Fraction(1, 10**4), Fraction(size, 2**20))
    return [math.floor(share * size + tolerance) for share in shares]


def counts_by(formulas, schedule, steps, num_maskable):
    """step_counts by upstream's formulas or ours."""
    ratios = formulas.step_ratios(schedule, steps)
    counts = torch.stack([formulas.num_remaining(ratios, size) for size in num_maskable.tolist()], dim=-1)
    counts[-1:] = 0
    return counts


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 18, 50, 1000])
def test_counts_of_named_schedules_are_exact(name, steps):
    """So exact that float32 would be seen: at 50257 positions it errs by .003."""
    sizes = [1, 3, 4, 17, 18, 64, 50257]
    counts = step_counts(as_schedule(name), steps, torch.tensor(sizes))
    assert counts.dtype == torch.int64
    assert counts.T.tolist() == [exact_counts(name, steps, size) for size in sizes]


@pytest.mark.parametrize("schedule", ["linear", lambda t: 1 - t], ids=["name", "callable"])
@pytest.mark.parametrize("size", [1, 2, 18, 49, 100, 1000, 1369, 4096, 50257, 65535, 65536])
def test_as_many_steps_as_positions_commit_one_each(schedule, size):
    """In float32 too, where (1 - t) n often falls just below an integer."""
    counts = step_counts(as_schedule(schedule), size, torch.tensor([size, size]))
    assert torch.equal(counts, torch.arange(size - 1, -1, -1)[:, None].expand(-1, 2))


def test_equal_and_unequal_sizes_get_their_own_counts():
    alone = {size: step_counts(LINEAR, 7, torch.tensor([size]))[:, 0] for size in (9, 0, 4)}
    together = step_counts(LINEAR, 7, torch.tensor([9, 4, 9, 0, 4]))
    assert torch.equal(together, torch.stack([alone[size] for size in (9, 4, 9, 0, 4)], dim=-1))
    assert step_counts(LINEAR, 7, torch.zeros(0, dtype=torch.int64)).shape == (7, 0)


def test_upstream_truncates_in_float32():
    """Not 17, 16, 15, ... 0: float32(schedule * n) falls below the integer now and then."""
    expected = [17, 16, 15, 14, 13, 11, 11, 10, 9, 7, 7, 5, 5, 3, 3, 1, 1, 0]
    assert counts_by(X_TRANSFORMERS, LINEAR, 18, torch.tensor([18])).squeeze(-1).tolist() == expected
    assert counts_by(FASTMASK, LINEAR, 18, torch.tensor([18])).squeeze(-1).tolist() == list(range(17, -1, -1))


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_counts_under_compat_are_upstreams(name):
    sizes = [1, 3, 4, 17, 18, 64, 1000, 1024]
    for steps in [1, 2, 3, 4, 7, 18, 50]:
        times = torch.linspace(0.0, 1.0, steps + 1)
        expected = torch.stack([(UPSTREAM[name](times[1:]) * size).long() for size in sizes], dim=-1)
        counts = counts_by(X_TRANSFORMERS, as_schedule(name), steps, torch.tensor(sizes))
        assert counts.dtype == torch.int64
        assert torch.equal(counts, expected), (name, steps)


@pytest.mark.parametrize("formulas", [FASTMASK, X_TRANSFORMERS])
def test_a_constant_ratio_generates_as_the_linear_schedule(formulas):
    sizes = torch.tensor([10, 3])
    expected = counts_by(formulas, LINEAR, 4, sizes)
    assert torch.equal(counts_by(formulas, as_schedule(0.15), 4, sizes), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_has_no_say_in_counts(dtype):
    expected = [
        counts_by(formulas, as_schedule(schedule), 1000, torch.tensor([1000]))
        for formulas in (FASTMASK, X_TRANSFORMERS)
        for schedule in ("linear", lambda t: 1 - t)
    ]
    torch.set_default_dtype(dtype)
    try:
        counts = [
            counts_by(formulas, as_schedule(schedule), 1000, torch.tensor([1000]))
            for formulas in (FASTMASK, X_TRANSFORMERS)
            for schedule in ("linear", lambda t: 1 - t)
        ]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, counts, expected))


@pytest.mark.parametrize("formulas", [FASTMASK, X_TRANSFORMERS])
def test_the_cosines_last_count_is_zero_though_its_ratio_is_negative(formulas):
    assert COSINE(torch.ones(1)).item() < 0
    counts = counts_by(formulas, COSINE, 3, torch.tensor([2**24, 5]))
    assert counts[-1].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (lambda t: 1 - 0.5 * t, [[8, 2], [7, 2], [6, 1], [0, 0]]),  # does not end at 0
        (lambda t: 2 * (1 - t), [[10, 3], [10, 3], [5, 1], [0, 0]]),  # more than all
        (lambda t: 0.5 - t, [[2, 0], [0, 0], [0, 0], [0, 0]]),  # less than none
        (lambda t: 0.5, [[5, 1], [5, 1], [5, 1], [0, 0]]),  # a number
        (lambda t: t / 0.0, [[10, 3], [10, 3], [10, 3], [0, 0]]),
        (lambda t: 0.0 * t / 0.0, [[0, 0], [0, 0], [0, 0], [0, 0]]),
    ],
    ids=["ends-high", "above-one", "below-zero", "constant", "infinite", "nan"],
)
def test_counts_stay_within_the_sequence_and_end_at_zero(ratio, expected):
    assert step_counts(Schedule(ratio), 4, torch.tensor([10, 3])).tolist() == expected


@pytest.mark.parametrize("holds", ["parameter", "buffer", "nothing"])
def test_a_module_gets_times_where_it_lies(holds):
    """On a GPU, say; meta tensors have a device of their own, too."""

    class Halved(torch.nn.Module):
        def __init__(self):
            super().__init__()
            if holds == "parameter":
                self.scale = torch.nn.Parameter(torch.ones(1, device="meta"))
            elif holds == "buffer":
                self.register_buffer("scale", torch.ones(1, device="meta"))

        def forward(self, t):
            assert t.device.type == ("cpu" if holds == "nothing" else "meta")
            return 0.5 if holds == "nothing" else (t * self.scale).new_full((len(t),), 0.5, device="cpu")

    assert step_counts(as_schedule(Halved()), 3, torch.tensor([10])).tolist() == [[5], [5], [0]]


@given(
    steps=st.integers(1, 40),
    sizes=st.lists(st.integers(0, 5000), min_size=1, max_size=4),
    power=st.floats(0.1, 5.0),
    end=st.floats(-0.5, 1.0),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_counts_of_any_falling_schedule(steps, sizes, power, end):
    sizes = torch.tensor(sizes)
    counts = step_counts(Schedule(lambda t: 1 - (1 - end) * t**power), steps, sizes)
    assert counts.shape == (steps, len(sizes))
    assert (counts >= 0).all()
    assert (counts <= sizes).all()
    assert (counts.diff(dim=0) <= 0).all()
    assert (counts[-1] == 0).all()
