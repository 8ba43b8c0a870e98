"""Training steps and generations: what the gate refuses, and what lies outside the network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from benchmark_helpers import CPU, ONCE, compare, contender, right

from benchmarks import end_to_end, gate, machine, suite, tables
from benchmarks.records import Ceilings, Contender

TINY = {"batch": 2, "seq_len": 8, "num_tokens": 50, "dim": 64, "depth": 1, "device": CPU}


@pytest.mark.parametrize("task", end_to_end.TASKS)
def test_end_to_end_shows_what_lies_outside_the_network(task, monkeypatch):
    monkeypatch.setattr(machine, "ceilings", lambda *_: Ceilings(1.0, 1.0))
    case = end_to_end.Case(task, **TINY)
    rows = end_to_end.benchmark(task).measure(case, ONCE)
    ours, theirs = rows[:2]
    assert not suite.any_of_ours_refused(rows)
    assert [row["name"] for row in rows if "ms" in row][:2] == ["fastmask", "x-transformers"]
    assert ours["status"] == "ok"
    assert ours["of_limit"] < 0.1
    assert theirs["ratio"]["eager"] == 1.0
    for row, name in ((ours, "to embeddings"), (theirs, "to logits")):
        (network,) = [other["ms"] for other in rows if other["name"] == f"network alone, {name}"]
        assert row["outside_ms"] == row["ms"] - network
    assert ours["rate"] == pytest.approx(16 / (ours["ms"] * 1e-3))
    assert "outside ms" in tables.table(rows, None)


def test_gate_refuses_a_wrapper_that_is_wrong():
    class NoUnmasking(end_to_end.fastmask.NonAutoregressiveWrapper):
        def generate(self, *args, **options):
            return super().generate(*args, **options).random_(0, 40)

    class TwiceTheLoss(end_to_end.fastmask.NonAutoregressiveWrapper):
        def forward(self, *args, **options):
            return end_to_end.fastmask.wrapper.Losses(super().forward(*args, **options).loss * 2, None, None)

    for task, wrapper, error in (("generate", NoUnmasking, "regret"), ("train", TwiceTheLoss, "gradient 1.0e")):
        problem = end_to_end.WrapperProblem(end_to_end.Case(task, **TINY))
        with pytest.raises(gate.Refused, match=error):
            gate.admit(Contender("c", "", lambda wrapper=wrapper: end_to_end.Wrapping(wrapper)), problem)


def test_a_training_step_leaves_the_network_as_it_was():
    problem = end_to_end.WrapperProblem(end_to_end.Case("train", **TINY))
    before = [p.detach().clone() for p in problem.net.parameters()]
    rows = compare(end_to_end.contenders("train"), problem, effort=ONCE)
    assert [row["status"] for row in rows[:2]] == ["ok", "ok"]
    assert all(torch.equal(*pair) for pair in zip(before, problem.net.parameters(), strict=True))


def test_generations_are_told_with_and_without_the_filter():
    """Which both wrappers leave out, where it is None."""
    cases = end_to_end.cases("generate", False)
    (unfiltered,) = [case for case in cases if not case.is_filtered]
    assert replace(unfiltered, is_filtered=True) in cases
    assert str(unfiltered) == f"{replace(unfiltered, is_filtered=True)}, unfiltered"
    assert all(case.is_filtered for case in end_to_end.cases("train", False))
    given = []

    class Model:
        def generate(self, batch, **options):
            given.append((batch, options))

    for case in (unfiltered, replace(unfiltered, is_filtered=True)):
        end_to_end.Wrapping(Model).generation(Model(), case)()
    assert given == [(unfiltered.batch, {"filter_thres": None}), (unfiltered.batch, {})]


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_a_graph_of_ours_has_a_rival():
    on_gpu = {c.name: c for c in end_to_end.contenders("generate") if c.name in end_to_end.GRAPHS.values()}
    assert [on_gpu[name].is_ours for name in end_to_end.GRAPHS.values()] == [True, False]
    problem = end_to_end.WrapperProblem(end_to_end.Case("generate", **TINY))
    (row,) = compare([replace(on_gpu[end_to_end.GRAPHS["x-transformers"]], needs_cuda=False)], problem, effort=ONCE)
    assert row["status"] == "raises"  # nothing is captured on a CPU, and nothing else timed in its place


def test_a_generation_that_is_no_graph_is_not_timed_as_one():
    problem = end_to_end.WrapperProblem(end_to_end.Case("generate", **TINY))
    (contender,) = [c for c in end_to_end.contenders("generate") if c.name == end_to_end.GRAPHS["fastmask"]]
    (row,) = compare([replace(contender, needs_cuda=False)], problem, effort=ONCE)
    assert row["status"] == "raises"
    assert "cuda_graph=True has no effect: the network is on cpu" in row["reason"]


@pytest.mark.parametrize("most", [0, 1, 2, 100])
def test_largest_batch(monkeypatch, most):
    monkeypatch.setattr(end_to_end, "_runs", lambda case, contender: case.batch <= most)
    case = end_to_end.Case("train", **TINY)
    assert most * 8 / 9 <= end_to_end.largest_batch(case, contender(right)) <= most
