"""Schedules: the mask ratio, its derivative, and how many positions each generation step leaves masked."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmask import Schedule
from fastmask.schedules import COSINE, LINEAR, as_schedule, step_counts

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


# ---- errors ----


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="invalid schedule 'sigmoid': expected 'linear', 'cosine' or a callable"):
        as_schedule("sigmoid")


def test_what_is_no_schedule_is_refused():
    with pytest.raises(TypeError, match="expected schedule to be a name or a callable, received float"):
        as_schedule(0.5)


def test_a_schedule_without_gradient_asks_for_its_derivative():
    steps = as_schedule(lambda t: (4 * (1 - t)).detach().ceil() / 4)
    with pytest.raises(ValueError, match=r"received one whose result carries no gradient; .*Schedule\(ratio, deriv"):
        steps.slope(TIMES)
    assert as_schedule(Schedule(steps.ratio, lambda t: torch.full_like(t, -1.0))).slope(TIMES).eq(-1).all()


# ---- counts of a generation ----


def test_eighteen_positions_in_eighteen_steps():
    """Not 17, 16, 15, ... 0: float32(schedule * n) falls below the integer now and then, as upstream's does."""
    expected = [17, 16, 15, 14, 13, 11, 11, 10, 9, 7, 7, 5, 5, 3, 3, 1, 1, 0]
    assert step_counts(LINEAR, 18, torch.tensor([18])).squeeze(-1).tolist() == expected


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_counts_are_upstreams(name):
    sizes = [1, 3, 4, 17, 18, 64, 1000, 1024]
    for steps in [1, 2, 3, 4, 7, 18, 50]:
        times = torch.linspace(0.0, 1.0, steps + 1)
        expected = torch.stack([(UPSTREAM[name](times[1:]) * size).long() for size in sizes], dim=-1)
        counts = step_counts(as_schedule(name), steps, torch.tensor(sizes))
        assert counts.dtype == torch.int64
        assert torch.equal(counts, expected), (name, steps)


def test_the_cosines_last_count_is_zero_though_its_ratio_is_negative():
    assert COSINE(torch.ones(1)).item() < 0
    counts = step_counts(COSINE, 3, torch.tensor([2**24, 5]))
    assert counts[-1].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (lambda t: 1 - 0.5 * t, [[8, 2], [7, 2], [6, 1], [0, 0]]),  # does not end at 0
        (lambda t: 2 * (1 - t), [[10, 3], [10, 3], [5, 1], [0, 0]]),  # more than all
        (lambda t: 0.5 - t, [[2, 0], [0, 0], [0, 0], [0, 0]]),  # less than none
        (lambda t: 0.5, [[5, 1], [5, 1], [5, 1], [0, 0]]),  # a number
    ],
    ids=["ends-high", "above-one", "below-zero", "constant"],
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
