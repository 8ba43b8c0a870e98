"""The benchmarks: what the gates refuse, what a table shows, the floors' arithmetic, and the report."""

from __future__ import annotations

import importlib.util
import json
import pathlib
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fastmask import functional

ROOT = pathlib.Path(__file__).parents[1]
if not (ROOT / "benchmarks").exists():
    pytest.skip("needs the checkout around the tests, not an installed wheel", allow_module_level=True)
if "benchmarks" not in sys.modules:  # the root is not on pytest's path
    spec = importlib.util.spec_from_file_location("benchmarks", ROOT / "benchmarks" / "__init__.py")
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)

from benchmarks import __main__ as suite  # noqa: E402
from benchmarks import bench_demask as demask  # noqa: E402
from benchmarks import bench_linear_masked_cross_entropy as linear  # noqa: E402
from benchmarks import bench_mask_sampling as masking  # noqa: E402
from benchmarks import bench_masked_cross_entropy as dense  # noqa: E402
from benchmarks import end_to_end, harness, losses, peers, report, results_file, scaling, static  # noqa: E402
from benchmarks.harness import ALL_ROWS, COMPACTED, WITH_MASK, Ceilings, Contender, Effort, Floor  # noqa: E402

CPU = torch.device("cpu")
FLOORS = dict.fromkeys((WITH_MASK, ALL_ROWS, COMPACTED, ""), Floor(1e6, 10.0, "GB/s"))
ONCE, THRICE = Effort(1, 1, 0.0), Effort(3, 3, 0.0)


def compare(contenders, problem, floors=FLOORS, bounds=None, effort=THRICE) -> list[harness.Row]:
    rows = harness.compare(contenders, problem, floors, bounds or {}, effort)
    return [{"operation": "operation", "case": "case", "shape": {}} | row for row in rows]


def contender(loss, given=WITH_MASK, **options) -> Contender:
    return Contender(getattr(loss, "__name__", "lambda"), given, lambda: loss, **options)


def right(logits, targets, is_masked):
    return F.cross_entropy(logits[is_masked], targets[is_masked])


def slow(logits, targets, is_masked):
    time.sleep(0.02)
    return right(logits, targets, is_masked)


def mask_ignored(logits, targets, is_masked):
    return F.cross_entropy(logits, targets)


def wrong_row(logits, targets, is_masked):
    return right(logits, targets.roll(1), is_masked)


def wrong_mean(logits, targets, is_masked):
    return right(logits, targets, is_masked) * 1.01


def not_a_number(logits, targets, is_masked):
    return right(logits, targets, is_masked) * float("nan")


def gradient_lost(logits, targets, is_masked):
    loss = right(logits, targets, is_masked)
    return loss.detach() + 0.0 * logits.sum()


def raising(logits, targets, is_masked):
    raise RuntimeError("no kernel for this shape")


@pytest.fixture(scope="module")
def problem() -> losses.LossProblem:
    return dense.problem(dense.Case(32, 67, 0.5, CPU))


@pytest.mark.parametrize("loss", [mask_ignored, wrong_row, wrong_mean, not_a_number, gradient_lost])
def test_gate_refuses_a_wrong_contender(problem, loss):
    (row,) = compare([contender(loss)], problem)
    assert row["status"] == "wrong"
    assert "ms" not in row
    assert not all(error <= losses.LIMITS[torch.float32] for error in row["errors"].values())
    assert f"not timed, wrong ({row['reason']}): {loss.__name__} [given the mask]" in harness.table([row], None)


@pytest.mark.parametrize("given", [WITH_MASK, ALL_ROWS, COMPACTED])
def test_gate_admits_eager_whatever_it_is_given(given):
    for case in (dense.Case(32, 67, 0.3, CPU), linear.Case(32, 67, 16, 0.3, CPU)):
        module = dense if isinstance(case, dense.Case) else linear
        (eager,) = [c for c in module.contenders() if c.name == "PyTorch" and c.given == given]
        _, errors = harness.admit(eager, module.problem(case))
        assert max(errors.values()) < 1e-6


def test_a_slow_contender_is_seen_in_the_ratio(problem):
    rows = compare([contender(right, is_baseline=True), contender(slow)], problem)
    fast_row, slow_row = rows
    assert fast_row["ratio"]["eager"] == 1.0
    assert slow_row["ratio"]["eager"] < 0.5
    assert slow_row["ms"] > 20
    assert slow_row["percent_of_floor"] < 1
    table = harness.table(rows, None).splitlines()
    assert table[-1].startswith("slow")
    assert json.loads(json.dumps(rows)) == rows


def test_a_contender_that_raises_or_does_not_import_is_reported(problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    liger = [c for c in peers.dense() if c.name.startswith("Liger")]
    rows = compare([contender(raising), *liger, *(replace(c, needs_cuda=False) for c in liger)], problem)
    assert [row["status"] for row in rows] == ["raises", *["needs CUDA"] * 2, *["does not import"] * 2]
    table = harness.table(rows, None)
    assert "not timed, raises (RuntimeError: no kernel for this shape): raising [given the mask]" in table
    assert "liger_kernel" in table
    assert "Liger (in place) [all rows, compacted rows]" in table


def test_a_contender_that_overwrites_gets_its_rows_back_and_spoils_nobody_elses(problem):
    def overwriting(logits, labels):
        loss = F.cross_entropy(logits, labels)
        logits.data.zero_()
        return loss

    def other(logits, labels):
        return F.cross_entropy(logits.clone(), labels)

    before = problem.rows.clone()
    both = [contender(overwriting, ALL_ROWS, overwrites=True), contender(other, ALL_ROWS)]
    step, first = harness.admit(both[0], problem)
    assert not step.problem.scratch(ALL_ROWS).any()
    step.restore()
    assert problem.errors(step) == first
    assert [row["status"] for row in compare(both, problem, effort=ONCE)] == ["ok", "ok"]
    assert torch.equal(problem.rows, before)


def test_floor_of_the_dense_loss_is_one_plus_mask_ratio_times_the_logits():
    case = dense.Case(16384, 32768, 0.5, torch.device("cuda"))
    floors = dense.floors(case, Ceilings(copy=4000.0, product=1.0))
    assert floors[WITH_MASK].amount == floors[ALL_ROWS].amount == 1.5 * 2**30
    assert floors[COMPACTED].amount == 2**30
    assert floors[WITH_MASK].milliseconds == pytest.approx(1.5 * 2**30 / 4e12 * 1e3)
    assert floors[WITH_MASK].achieved(floors[WITH_MASK].milliseconds) == pytest.approx(4000.0)


def test_floor_of_the_linear_loss_is_three_products_of_the_masked_rows():
    case = linear.Case(8192, 50257, 2048, 0.15, torch.device("cuda"))
    floors = linear.floors(case, Ceilings(copy=1.0, product=800.0))
    assert {floor.amount for floor in floors.values()} == {6.0 * 1229 * 2048 * 50257}
    assert floors[ALL_ROWS].milliseconds == pytest.approx(6.0 * 1229 * 2048 * 50257 / 800e12 * 1e3)


@pytest.mark.parametrize("module", [dense, linear])
def test_cases_and_contenders(module):
    quick, everything = module.cases(quick=True), module.cases(quick=False)
    assert set(quick) <= set(everything)
    assert {case.mask_ratio for case in everything} == {0.15, 0.5, 1.0}
    contenders = module.contenders()
    assert len({str(c) for c in contenders}) == len(contenders)
    assert sum(c.is_baseline for c in contenders) == 1
    given: dict[str, set[str]] = {}
    for c in contenders:
        given.setdefault(c.name, set()).add(c.given)
    for name, kinds in given.items():
        assert {ALL_ROWS, COMPACTED} <= kinds or name in ("fastmask", "fastmask (in place)", "x-transformers")


def test_bare_products_leave_the_inputs_alone():
    case = linear.Case(2500, 33, 8, 0.5, CPU)  # two chunks of the reference's
    problem = linear.problem(case)
    x, weight = problem.rows.clone(), problem.parameters[0].clone()
    linear.bare_products(case, problem)()
    assert torch.equal(problem.rows, x)
    assert torch.equal(problem.parameters[0], weight)


def test_a_published_figure_is_told_apart_from_ours(problem):
    rows = compare([contender(right, is_ours=True)], problem, effort=ONCE)
    last = harness.table(rows, peers.QUACK_DENSE).splitlines()[-1]
    assert "published, not measured here: 3000 GB/s" in last


def test_the_suite_runs_as_a_module():
    command = [sys.executable, "-m", "benchmarks", "--help"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--quick" in done.stdout


def weight_forgotten(x, weight, targets, is_masked):
    return F.cross_entropy(F.linear(x[is_masked], weight.detach()), targets[is_masked]) + 0.0 * weight.sum()


def test_gate_refuses_a_wrong_gradient_of_the_weight():
    with pytest.raises(harness.Refused, match=r"wrong: loss .* weight's gradient 1\.0e\+00 \(limit 1e-04\)"):
        harness.admit(contender(weight_forgotten), linear.problem(linear.Case(32, 67, 16, 0.3, CPU)))


def unmasked_rows_pulled(logits, targets, is_masked):
    """The right loss, with a gradient where there is none."""
    return right(logits, targets, is_masked) + (logits - logits.detach())[~is_masked].sum()


def test_gate_refuses_a_gradient_of_unmasked_rows(problem):
    with pytest.raises(harness.Refused, match="wrong"):
        harness.admit(contender(unmasked_rows_pulled), problem)


def test_ratios_are_to_the_best_of_the_others():
    def timed(ms, given, *, is_ours=False, is_baseline=False, status="ok"):
        return {"ms": ms, "given": given, "is_ours": is_ours, "is_baseline": is_baseline, "status": status}

    rows = [
        timed(2.0, WITH_MASK, is_ours=True),
        timed(12.0, WITH_MASK, is_baseline=True),
        timed(8.0, ALL_ROWS),
        timed(10.0, ALL_ROWS),
        timed(4.0, COMPACTED),
        timed(6.0, COMPACTED),
        timed(1.0, "", status="bound"),
        {"given": ALL_ROWS, "is_ours": False, "is_baseline": False, "status": "wrong"},
    ]
    harness._add_ratios(rows)
    assert rows[0]["ratio"] == {"eager": 6.0, "best on all rows": 4.0, "best on compacted": 2.0, "bound": 0.5}
    assert rows[4]["ratio"]["best on compacted"] == 1.0
    assert "ratio" not in rows[-1]


def test_a_row_is_the_median_of_its_times_against_its_own_floor(problem, monkeypatch):
    monkeypatch.setattr(harness, "time_rounds", lambda runs, *_: {name: [9.0, 1.0, 2.0] for name in runs})
    floors = {WITH_MASK: Floor(1e9, 1e3, "GB/s"), ALL_ROWS: None, COMPACTED: Floor(5e8, 1e3, "GB/s")}
    row, bound = compare([contender(right)], problem, floors, {"bound": lambda: None})
    assert (row["ms"], row["spread"], row["floor_ms"]) == (2.0, [1.0, 9.0], 1.0)
    assert row["percent_of_floor"] == bound["percent_of_floor"] * 2 == 50.0
    assert row["rate"] == 500.0


@pytest.mark.parametrize("refused", [[7], [8], []], ids=str)
def test_the_suite_fails_if_ours_was_refused_anywhere(refused, tiny_suite, monkeypatch, tmp_path, capsys):

    def loss(logits, targets, is_masked):
        return right(logits, targets, is_masked) * (2.0 if logits.shape[1] in refused else 1.0)

    benchmark = replace(
        dense.BENCHMARK,
        cases=lambda quick: [dense.Case(4, num_tokens, 0.5, CPU) for num_tokens in (7, 8)],
        contenders=lambda: [contender(loss, is_ours=True), contender(wrong_row)],
    )
    monkeypatch.setattr(suite, "BENCHMARKS", [benchmark])
    assert suite.main(["--quick", "--output", str(tmp_path)]) == int(bool(refused))
    assert capsys.readouterr().out.count("not timed, wrong") == 2 + len(refused)


@pytest.mark.parametrize(("is_ours", "outcome"), [(False, pytest.skip.Exception), (True, harness.Refused)])
def test_pytest_benchmark_skips_others_and_fails_ours(problem, is_ours, outcome):
    benchmark = replace(dense.BENCHMARK, problem=lambda case: problem)
    with pytest.raises((pytest.skip.Exception, harness.Refused), match="wrong") as refusal:
        benchmark.run_pytest(None, "case", contender(wrong_row, is_ours=is_ours))
    assert refusal.type is outcome


@pytest.mark.parametrize("mask_ratio", [0.0, 0.15, 0.5, 1.0])
def test_as_many_rows_are_masked_as_the_floor_says(mask_ratio):
    is_masked = harness.draw_mask(33, mask_ratio, CPU, torch.Generator().manual_seed(0))
    assert is_masked.sum() == linear.Case(33, 67, 16, mask_ratio, CPU).num_masked == round(33 * mask_ratio)


# ---- sampling ----


@pytest.fixture(scope="module", params=[None, 0.9])
def sampling(request) -> demask.SamplingProblem:
    return demask.problem(demask.Case(64, 500, request.param, CPU))


def sampled(logits, temperature, filter_thres, heat=1.0):
    """What is right, where heat is 1."""
    kept = peers._filtered(logits, filter_thres)
    ids = torch.multinomial((kept / (temperature * heat)).softmax(dim=-1)[0], 1).T
    return ids, kept.softmax(dim=-1).gather(-1, ids[..., None])[..., 0]


def argmax(logits, temperature, filter_thres):
    ids = logits.argmax(dim=-1)
    return ids, peers._probability(peers._filtered(logits, filter_thres).softmax(dim=-1), ids)


def warmer(logits, temperature, filter_thres):
    return sampled(logits, temperature, filter_thres, heat=1 / temperature)


def heated_probability(logits, temperature, filter_thres):
    ids, _ = sampled(logits, temperature, filter_thres)
    return ids, peers._probability((peers._filtered(logits, filter_thres) / temperature).softmax(dim=-1), ids)


def mask_ids(logits, temperature, filter_thres):
    ids, probs = sampled(logits, temperature, filter_thres)
    ids[0, 3] = logits.shape[-1] - 1
    return ids, probs


def beyond(logits, temperature, filter_thres):
    ids, probs = sampled(logits, temperature, filter_thres)
    ids[0, 3] = logits.shape[-1]
    return ids, probs


def least_likely(logits, temperature, filter_thres):
    """One id that a filter would not keep."""
    ids, _ = sampled(logits, temperature, filter_thres)
    ids[0, 0] = logits[0, 0, :-1].argmin()
    return ids, peers._probability(logits.softmax(dim=-1), ids)


@pytest.mark.parametrize(
    ("sampler", "error"),
    [
        (argmax, "standard errors of the mean log-probability"),
        (warmer, "standard errors of the mean log-probability"),
        (heated_probability, "probability"),
        (mask_ids, "ids that are not allowed"),
        (beyond, "ids that are not allowed"),
    ],
)
def test_gate_refuses_a_wrong_sampler(sampling, sampler, error):
    (row,) = compare([contender(sampler, "")], sampling, effort=ONCE)
    assert row["status"] == "wrong"
    assert not row["errors"][error] <= sampling.limits[error]


def test_gate_refuses_an_id_that_the_filter_drops():
    problem = demask.problem(demask.Case(64, 500, 0.9, CPU))
    with pytest.raises(harness.Refused) as refusal:
        harness.admit(contender(least_likely, ""), problem)
    assert refusal.value.errors["ids that are not allowed"] >= 1


def test_gate_admits_every_sampler_that_runs_here(sampling):
    rows = compare(demask.contenders(), sampling, effort=ONCE)
    assert {row["name"] for row in rows if row["status"] == "ok"} == {
        "fastmask", "x-transformers", "float64 Gumbel (LLaDA)", "torch.multinomial",
    }  # fmt: skip
    assert {row["status"] for row in rows} == {"ok", "needs CUDA"}


def test_gate_admits_either_side_of_a_tie_and_either_normaliser():
    """Of 20 ids 2 are kept; 3 tie for the second place. Upstream keeps one of those, ours keeps all."""
    logits = torch.zeros(1, 300, 20)
    logits[..., 4], logits[..., 7:10], logits[..., -1] = 2.0, 1.0, -torch.inf
    problem = demask.SamplingProblem(logits, 0.9)
    for name in ("fastmask", "x-transformers"):
        (one,) = [c for c in demask.contenders() if c.name == name]
        _, errors = harness.admit(one, problem)
        assert errors["probability"] < 1e-6
        assert errors["ids that are not allowed"] == 0


def test_what_people_run_today_is_timed_beside_its_errors(sampling):
    rows = compare([contender(argmax, "", is_baseline=True, timed_if_wrong=True)], sampling, effort=ONCE)
    assert rows[0]["status"] == "wrong"
    assert rows[0]["ratio"] == {"eager": 1.0}
    assert "timed although wrong (ids that are not allowed 0.0e+00 (limit 0e+00)" in harness.table(rows, None)


def test_bfloat16_noise_is_refused():
    """x-transformers' own step in bfloat16: its uniforms have 256 values."""
    logits = demask.problem(demask.Case(64, 8192, None, CPU)).logits.bfloat16()
    problem = demask.SamplingProblem(logits, None)
    (upstream,) = [c for c in demask.contenders() if c.name == "x-transformers"]
    with pytest.raises(harness.Refused, match="standard errors"):
        harness.admit(replace(upstream, timed_if_wrong=False), problem)


def test_bytes_a_logit_are_the_time_at_the_measured_rate():
    case = demask.Case(32, 1000, None, torch.device("cuda"))
    floor = demask.floors(case, Ceilings(copy=4000.0, product=1.0))[""]
    row = harness._timing([2 * floor.milliseconds], floor)
    assert (row["bytes_per_logit"], row["percent_of_floor"]) == (pytest.approx(4.0), pytest.approx(50.0))


# ---- masking ----


@pytest.fixture(scope="module", params=[False, True], ids=["full", "padded"])
def masks(request) -> masking.MaskingProblem:
    return masking.problem(masking.Case(8, 100, request.param, CPU))


def right_masks(tokens, times, maskable):
    (upstream,) = [c for c in masking.contenders() if c.is_baseline]
    return upstream.load()(tokens, times, maskable)


def one_more(tokens, times, maskable):
    ids, is_masked = right_masks(tokens, times, maskable)
    is_masked[0, is_masked[0].int().argmin()] = True
    return ids, is_masked


def first_positions(tokens, times, maskable):
    """Where padding lies behind, the right counts at the first positions."""
    _, is_masked = right_masks(tokens, times, maskable)
    first = torch.arange(tokens.shape[1]) < is_masked.sum(dim=-1, keepdim=True)
    return tokens.masked_fill(first, masking.MASK_ID), first


def all_kept(tokens, times, maskable):
    return tokens, right_masks(tokens, times, maskable)[1]


@pytest.mark.parametrize(
    ("masker", "error"),
    [
        (one_more, "wrong counts"),
        (first_positions, "standard errors of the mean position"),
        (all_kept, "kept, random and masked in other numbers"),
    ],
)
def test_gate_refuses_wrong_masks(masks, masker, error):
    (row,) = compare([contender(masker, "")], masks, effort=ONCE)
    assert row["status"] == "wrong"
    assert not row["errors"][error] <= masks.limits[error]


def test_gate_refuses_masks_on_padding_and_changed_tokens():
    problem = masking.problem(masking.Case(8, 100, True, CPU))
    blind = contender(lambda tokens, times, maskable: right_masks(tokens, times, None), "")
    changed = contender(lambda *given: ((out := right_masks(*given))[0].where(out[1], 6), out[1]), "")
    for row in compare([blind, changed], problem, effort=ONCE):
        assert row["errors"]["changed or masked where it may not be"] > 0


def test_gate_admits_ours_and_upstreams_masks(masks):
    rows = compare(masking.contenders(), masks, effort=ONCE)
    assert [row["status"] for row in rows] == ["ok", "ok", "needs CUDA"]


# ---- end to end ----

TINY = {"batch": 2, "seq_len": 8, "num_tokens": 50, "dim": 64, "depth": 1, "device": CPU}


@pytest.mark.parametrize("task", end_to_end.TASKS)
def test_end_to_end_shows_what_lies_outside_the_network(task, monkeypatch):
    monkeypatch.setattr(harness, "ceilings", lambda *_: Ceilings(1.0, 1.0))
    case = end_to_end.Case(task, **TINY)
    rows = end_to_end.benchmark(task).measure(case, ONCE)
    ours, theirs = rows[:2]
    assert not harness.any_of_ours_refused(rows)
    assert [row["name"] for row in rows if "ms" in row][:2] == ["fastmask", "x-transformers"]
    assert ours["status"] == "ok"
    assert ours["of_limit"] < 0.1
    assert theirs["ratio"]["eager"] == 1.0
    for row, name in ((ours, "to embeddings"), (theirs, "to logits")):
        (network,) = [other["ms"] for other in rows if other["name"] == f"network alone, {name}"]
        assert row["outside_ms"] == row["ms"] - network
    assert ours["rate"] == pytest.approx(16 / (ours["ms"] * 1e-3))
    assert "outside ms" in harness.table(rows, None)


def test_gate_refuses_a_wrapper_that_is_wrong():
    class NoUnmasking(end_to_end.fastmask.NonAutoregressiveWrapper):
        def generate(self, *args, **options):
            return super().generate(*args, **options).random_(0, 40)

    class TwiceTheLoss(end_to_end.fastmask.NonAutoregressiveWrapper):
        def forward(self, *args, **options):
            return end_to_end.fastmask.wrapper.Losses(super().forward(*args, **options).loss * 2, None, None)

    for task, wrapper, error in (("generate", NoUnmasking, "regret"), ("train", TwiceTheLoss, "gradient 1.0e")):
        problem = end_to_end.WrapperProblem(end_to_end.Case(task, **TINY))
        with pytest.raises(harness.Refused, match=error):
            harness.admit(Contender("c", "", lambda wrapper=wrapper: end_to_end.Wrapping(wrapper)), problem)


def test_a_training_step_leaves_the_network_as_it_was():
    problem = end_to_end.WrapperProblem(end_to_end.Case("train", **TINY))
    before = [p.detach().clone() for p in problem.net.parameters()]
    rows = compare(end_to_end.contenders("train"), problem, effort=ONCE)
    assert [row["status"] for row in rows[:2]] == ["ok", "ok"]
    assert all(torch.equal(*pair) for pair in zip(before, problem.net.parameters(), strict=True))


def test_a_generation_that_is_no_graph_is_not_timed_as_one():
    problem = end_to_end.WrapperProblem(end_to_end.Case("generate", **TINY))
    (contender,) = [c for c in end_to_end.contenders("generate") if c.name == end_to_end.GRAPH]
    (row,) = compare([replace(contender, needs_cuda=False)], problem, effort=ONCE)
    assert row["status"] == "raises"
    assert "cuda_graph=True has no effect: the network is on cpu" in row["reason"]


def test_memory_of_a_cpu_is_the_growth_of_the_resident_set():
    def run():
        return torch.ones(2**24) + 1  # 64 MiB, twice

    if (peak := harness.peak_mib(run, CPU)) is None:
        pytest.skip("only Linux tells it")
    assert 64 <= peak < 160


def test_the_hosts_time_is_told_of_a_gpu_only(monkeypatch):
    """The median of a tenth of a second's runs, of one that takes longer; each is given back what it overwrites."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    class Sleep:
        def __init__(self, device, seconds):
            self.device, self.seconds, self.done = torch.device(device), seconds, []

        def restore(self, contender):
            self.done.append("restored")

        def run(self, contender, function):
            self.done.append("run")
            time.sleep(self.seconds)

    def told(device, seconds):
        problem = Sleep(device, seconds)
        return harness.host_ms(harness.Step(contender(right), None, problem)), problem.done

    assert told("cpu", 0.0) == (None, [])
    milliseconds, done = told("cuda", 0.01)
    assert 10 <= milliseconds < 100
    assert 3 <= len(done) // 2 <= 10
    assert done == ["restored", "run"] * (len(done) // 2)
    milliseconds, done = told("cuda", 0.1)
    assert milliseconds >= 100
    assert done == ["restored", "run"]


def test_a_contender_that_keeps_memory_has_no_peak_of_a_run(problem):
    rows = compare([contender(right), contender(slow, keeps_memory=True)], problem, effort=ONCE)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert rows[1]["peak_mib"] is None
    assert rows[0]["peak_mib"] is not None or harness.peak_mib(lambda: None, CPU) is None


def test_a_case_that_does_not_fit_is_told_and_the_others_go_on(monkeypatch):
    monkeypatch.setattr(harness, "ceilings", lambda *_: Ceilings(1.0, 1.0))

    def too_large(case):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    rows = replace(dense.BENCHMARK, problem=too_large).measure(dense.Case(8, 7, 0.5, CPU), ONCE)
    assert {row["status"] for row in rows} == {"out of memory"}
    assert "not timed, out of memory (the case itself: OutOfMemoryError: tried" in harness.table(rows, None)


@pytest.mark.parametrize("most", [0, 1, 2, 100])
def test_largest_batch(monkeypatch, most):
    monkeypatch.setattr(end_to_end, "_runs", lambda case, contender: case.batch <= most)
    case = end_to_end.Case("train", **TINY)
    assert most * 8 / 9 <= end_to_end.largest_batch(case, contender(right)) <= most


# ---- the suite and its report ----


@pytest.fixture
def tiny_suite(monkeypatch) -> harness.Benchmark:
    """``python -m benchmarks --quick`` of one small case; sampling made wrong or slow is seen there."""
    monkeypatch.setattr(harness, "_best", {(CPU, torch.float32): Ceilings(10.0, 1.0)})
    monkeypatch.setattr(harness, "measure_ceilings", lambda *_: None)
    monkeypatch.setattr(harness, "default_device", lambda: CPU)
    monkeypatch.setattr(harness, "QUICK", THRICE)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    benchmark = replace(demask.BENCHMARK, cases=lambda quick: [demask.Case(64, 500, None, CPU)])
    monkeypatch.setattr(suite, "BENCHMARKS", [benchmark])
    return benchmark


def test_a_kernel_made_wrong_is_refused_by_the_suite(tiny_suite, monkeypatch, tmp_path, capsys):
    right_sample = functional.sample_tokens
    monkeypatch.setattr(functional, "sample_tokens", lambda *given, temperature, **options: right_sample(
        *given, temperature=0.0, **options
    ))  # fmt: skip
    assert suite.main(["--quick", "--output", str(tmp_path)]) == 1
    assert "not timed, wrong (ids that are not allowed 0.0e+00 (limit 0e+00)" in capsys.readouterr().out
    found = results_file.newest(False, tmp_path)
    assert [row["status"] for row in found["rows"] if row["is_ours"]] == ["wrong"]
    assert "`demask`" not in report.markdown(tmp_path)


@pytest.fixture
def recorded(tiny_suite, monkeypatch) -> list[int]:
    """Two cases of which every run is said to take 1 ms at the first visit of any, 2 ms at the second, and so on."""
    benchmark = replace(tiny_suite, cases=lambda quick: [demask.Case(rows, 500, None, CPU) for rows in (32, 64)])
    monkeypatch.setattr(suite, "BENCHMARKS", [benchmark])
    monkeypatch.setattr(scaling, "sweeps", lambda device: [])
    visits: list[int] = []

    def time_rounds(runs, *_):
        visits.append(len(visits) + 1)
        return {name: [float(visits[-1])] * 3 for name in runs}

    monkeypatch.setattr(harness, "time_rounds", time_rounds)
    monkeypatch.setattr(harness, "peak_mib", lambda *_: None)
    return visits


def test_a_full_run_comes_to_each_case_twice_with_all_others_between(recorded, tmp_path):
    """What the machine does in the minutes between belongs into the spread."""
    assert suite.main(["--output", str(tmp_path)]) == 0
    rows = results_file.newest(False, tmp_path)["rows"]
    timed = [row for row in rows if "ms" in row]
    assert {row["case"] for row in timed} == {row["case"] for row in rows}
    for row in timed:
        first = 1 + (row["shape"]["num_rows"] == 64)
        assert (row["ms"], row["spread"], row["rounds"]) == (first + 1, [first, first + 2], 6)
        assert "times" not in row


def test_ceilings_are_the_best_of_all_that_was_measured(monkeypatch):
    monkeypatch.setattr(harness, "_best", {})
    rounds = iter([{"copy": [1.0, 3.0], "product": [4.0]}, {"copy": [2.0], "product": [2.0, 5.0]}])
    monkeypatch.setattr(harness, "time_rounds", lambda *_: next(rounds))
    first = harness.ceilings(CPU, torch.float32)
    assert first == harness.ceilings(CPU, torch.float32) == Ceilings(2**28 / 1e6, 2 * 1024**3 / 4e9)
    harness.measure_ceilings(CPU, torch.float32)
    assert harness.ceilings(CPU, torch.float32) == Ceilings(first.copy, 2 * first.product)


def test_a_run_is_held_to_the_best_ceiling_of_all_its_visits(recorded, monkeypatch, tmp_path):
    def measure_ceilings(*key):
        rate = {1: 20.0, 3: 50.0}.get(len(recorded), 10.0)  # best before the last visit of four
        harness._best[key] = Ceilings(max(rate, harness._best[key].copy), 1.0)

    monkeypatch.setattr(harness, "measure_ceilings", measure_ceilings)
    assert suite.main(["--output", str(tmp_path)]) == 0
    found = results_file.newest(False, tmp_path)
    assert found["ceilings"] == {"copy": 50.0, "product": 1.0}
    for row in found["rows"]:
        if "ms" in row:
            num_rows, num_tokens = row["shape"]["num_rows"], row["shape"]["num_tokens"]
            assert row["floor_ms"] == pytest.approx(num_rows * num_tokens * 4 / 50e9 * 1e3, rel=1e-3)
            assert row["percent_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["ms"], rel=1e-3)


def test_a_quick_run_comes_to_each_case_once(recorded, tmp_path):
    assert suite.main(["--quick", "--output", str(tmp_path)]) == 0
    assert recorded == [1, 2]


class CutShort(BaseException):
    """As Ctrl-C or a time limit would."""


@pytest.fixture
def cut_short(recorded, monkeypatch, tmp_path) -> list[int]:
    """A quick run of a clean commit that was cut short at the second of its two cases."""
    monkeypatch.setattr(results_file, "_output", lambda *command: "abc1234")
    time_rounds = harness.time_rounds

    def cut_at_the_second(*given):
        if len(recorded) == 1:
            raise CutShort
        return time_rounds(*given)

    with monkeypatch.context() as patched:
        patched.setattr(harness, "time_rounds", cut_at_the_second)
        with pytest.raises(CutShort):
            suite.main(["--quick", "--output", str(tmp_path)])
    return recorded


def cases_and_times(directory) -> list[tuple[str, float]]:
    rows = results_file.newest(False, directory)["rows"]
    return [(row["case"].partition("x")[0], row["ms"]) for row in rows if row["name"] == "fastmask"]


def test_a_run_that_is_cut_short_leaves_what_it_has_and_is_resumed(cut_short, monkeypatch, tmp_path):
    assert cases_and_times(tmp_path) == [("32", 1.0)]
    monkeypatch.setattr(harness, "_best", {(CPU, torch.float32): Ceilings(50.0, 0.5)})  # of another process
    assert suite.main(["--quick", "--resume", "--output", str(tmp_path)]) == 0
    assert cases_and_times(tmp_path) == [("32", 1.0), ("64", 2.0)]
    found = results_file.newest(False, tmp_path)
    assert found["ceilings"] == {"copy": 50.0, "product": 1.0}
    for row in found["rows"]:
        if "ms" in row:
            assert row["floor_ms"] == pytest.approx(row["shape"]["num_rows"] * 500 * 4 / 50e9 * 1e3, rel=1e-3)
    assert suite.main(["--quick", "--resume", "--output", str(tmp_path)]) == 0
    assert cut_short == [1, 2]  # nothing was left to do


def test_a_run_of_some_operations_keeps_the_others_where_they_were(recorded, monkeypatch, tmp_path):
    monkeypatch.setattr(results_file, "_output", lambda *command: "abc1234")
    monkeypatch.setattr(suite, "BENCHMARKS", [suite.BENCHMARKS[0], replace(suite.BENCHMARKS[0], name="twin")])
    assert suite.main(["--quick", "--output", str(tmp_path)]) == 0
    assert suite.main(["--quick", "--only", "demask", "--output", str(tmp_path)]) == 0
    assert cases_and_times(tmp_path) == [("32", 5.0), ("64", 6.0), ("32", 3.0), ("64", 4.0)]


@pytest.mark.parametrize("commit", ["", "abc1234-dirty", "def5678"])
def test_only_results_of_the_same_commit_are_resumed(cut_short, monkeypatch, tmp_path, commit):
    monkeypatch.setattr(results_file, "_output", lambda *command: commit)
    for _ in range(2):
        assert suite.main(["--quick", "--resume", "--output", str(tmp_path)]) == 0
    first = 2 if commit == "def5678" else 4  # of another commit: measured anew, and resumed; unknown: anew each time
    assert cases_and_times(tmp_path) == [("32", first), ("64", first + 1)]


@pytest.mark.parametrize("wrong_visit", [0, 1])
def test_wrong_at_one_visit_is_wrong(recorded, monkeypatch, tmp_path, wrong_visit):
    right_sample = functional.sample_tokens

    def sample(*given, temperature, **options):
        is_wrong = (len(recorded) >= 2) == wrong_visit
        return right_sample(*given, temperature=0.0 if is_wrong else temperature, **options)

    monkeypatch.setattr(functional, "sample_tokens", sample)
    assert suite.main(["--output", str(tmp_path)]) == 1
    ours = [row for row in results_file.newest(False, tmp_path)["rows"] if row["is_ours"]]
    assert [row["status"] for row in ours] == ["wrong", "wrong"]
    assert not any("ms" in row for row in ours)


def test_a_kernel_made_slow_is_seen_in_the_report(tiny_suite, monkeypatch, tmp_path):
    right_sample = functional.sample_tokens

    def slow_sample(*given, **options):
        time.sleep(0.2)
        return right_sample(*given, **options)

    monkeypatch.setattr(functional, "sample_tokens", slow_sample)
    assert suite.main(["--quick", "--output", str(tmp_path)]) == 0
    (line,) = [line for line in report.markdown(tmp_path).splitlines() if "`demask`" in line]
    _, _, ours, _, _, faster_than_eager, _, faster_than_others = line.strip("| ").split(" | ")
    assert float(ours.removesuffix(" ms")) > 200
    assert max(float(ratio.removesuffix("x")) for ratio in (faster_than_eager, faster_than_others)) < 0.5


def a_row(operation, case, contender, ms, **changes):
    is_ours, is_eager = contender.startswith("fastmask"), contender == "x-transformers"
    row = {"operation": operation, "case": case, "contender": contender, "name": contender, "given": "", "ms": ms}
    row |= {"status": "ok", "is_ours": is_ours, "is_baseline": is_eager, "percent_of_floor": 50.0, "rate": 1e4 / ms}
    row |= {"peak_mib": 10.0 * ms, "outside_ms": ms / 2, "shape": {"num_rows": 8, "num_tokens": 9, "mask_ratio": 0.5}}
    return row | changes


def some_results(date="2026-11-22", quick=False, **changes):
    half, whole = ({"num_rows": 8, "num_tokens": 9, "mask_ratio": ratio} for ratio in (0.5, 1.0))
    rows = [
        a_row(operation, case, contender, ms)
        for operation, case in (("train", "small"), ("generate", "small"), ("demask", "8x9"))
        for contender, ms in (("fastmask", 2.0), ("x-transformers", 5.0), ("torch.multinomial", 1234.5))
    ]
    rows += [
        a_row("masked_cross_entropy", f"8x9, mask ratio {shape['mask_ratio']}", name, 1.5, shape=shape)
        for shape in (half, whole)
        for name in ("fastmask", "x-transformers")
    ]
    found = {"device": "cpu", "name": "A CPU", "date": date, "quick": quick, "commit": "abc", "clocks": None}
    found |= {"versions": {"torch": "2"}, "threads": 2, "ceilings": {"copy": 10.0, "product": 1.0}, "rows": rows}
    return found | {"scaling": [], "largest_batches": []} | changes


def test_newest_results_by_kind_and_date(tmp_path):
    assert results_file.newest(False, tmp_path) is None
    for found in (some_results(), some_results(quick=True), some_results("2026-11-21")):
        results_file.write(found, tmp_path)
    results_file.write(some_results("2027-01-01", device="cuda", name="NVIDIA H200"), tmp_path)
    (tmp_path / "static.json").write_text("{}")
    names = {"cpu-2026-11-21", "cpu-2026-11-22", "cpu-2026-11-22-quick", "nvidia-h200-2027-01-01", "static"}
    assert {file.stem for file in tmp_path.iterdir()} == names
    chosen = results_file.newest(False, tmp_path)
    assert (chosen["date"], chosen["quick"]) == ("2026-11-22", False)
    assert results_file.newest(True, tmp_path)["name"] == "NVIDIA H200"


def test_readme_is_rebuilt_between_its_markers(tmp_path):
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.readme(text, tmp_path) == f"before\n{report.BEGIN}\n{report.NOT_MEASURED}\n{report.END}\nafter\n"
    results_file.write(some_results(), tmp_path)
    told = report.readme(text, tmp_path)
    assert told == report.readme(told, tmp_path)
    assert told.startswith("before\n")
    assert told.endswith("after\n")
    assert "old" not in told
    assert "| small | training step | 2.00 ms, 5,000 tokens/s | 5.00 ms, 2,000 tokens/s | 2.50x | 1.00 ms / " in told
    assert "| `demask` | 8x9 | 2.00 ms | 50 % | 5.00 ms | 2.50x | 1.23 s, torch.multinomial | 617.00x |" in told
    assert report.NOT_MEASURED in told
    results_file.write(some_results(device="cuda", name="NVIDIA H200", clocks={"clocks.sm": "1980 MHz"}), tmp_path)
    told = report.readme(told, tmp_path)
    assert report.NOT_MEASURED not in told
    assert told.index("**NVIDIA H200** (bfloat16; torch 2, clocks.sm 1980 MHz;") < told.index("**A CPU** (2 threads")


def test_report_rebuilds_readme_and_plots(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text(f"{report.BEGIN}{report.END}")
    results_file.write(some_results(), tmp_path)
    drawn = []
    monkeypatch.setattr(report, "plot", lambda found, file: drawn.append(file.name))
    assert suite.main(["report", "--output", str(tmp_path)]) == 0
    assert report.README.read_text() == report.readme(f"{report.BEGIN}{report.END}", tmp_path)
    assert drawn == [next(tmp_path.glob("*.json")).name]


@pytest.mark.parametrize("text", ["", report.BEGIN, report.END + report.BEGIN, (report.BEGIN + report.END) * 2])
def test_readme_without_its_markers_is_refused(text, tmp_path):
    with pytest.raises(ValueError, match="expected <!-- benchmarks:begin --> and then <!-- benchmarks:end -->"):
        report.readme(text, tmp_path)


def test_what_a_machine_has_not_measured_has_no_column(tmp_path):
    found = some_results()
    for row in found["rows"]:
        row["peak_mib"] = None
    results_file.write(found, tmp_path)
    assert "both compiled" not in report.markdown(tmp_path)
    assert end_to_end.GRAPH.removeprefix("fastmask, ") not in report.markdown(tmp_path)
    found["rows"] += [
        a_row("train", "small", "fastmask, network compiled", 1.0),
        a_row("train", "small", "x-transformers, network compiled", 4.0),
        a_row("train", "small", end_to_end.GRAPH, 1.0),
    ]
    results_file.write(found, tmp_path)
    assert "| faster | both compiled | as a CUDA graph |" in report.markdown(tmp_path)
    assert "| 2.50x | 4.00x | 5.00x |" in report.markdown(tmp_path)


def test_plots(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "cpu.json"
    names = ("percent-of-floor", "time-against-mask-ratio", "memory-against-vocabulary", "end-to-end")
    written = report.plot(some_results(), file)
    assert [plot.name for plot in written] == [f"cpu-{name}.png" for name in names]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in written)
    assert report.plot(some_results(rows=[]), file) == []
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert report.plot(some_results(), file) == []
    assert "no plots: matplotlib is not installed" in capsys.readouterr().out


def test_a_plot_shows_ours_eager_and_the_fastest(monkeypatch):
    rows = [a_row("demask", "8x9", f"peer {ms}", ms + 1.0) for ms in range(20)]
    rows += [a_row("demask", "8x9", "fastmask", 99.0), a_row("demask", "8x9", "x-transformers", 98.0)]
    assert report._shown(rows) == ["x-transformers", "fastmask", *(f"peer {ms}" for ms in range(4))]


def test_exponent_of_a_power():
    assert scaling.exponent([(n, 3 * n**1.5) for n in (2, 8, 32)]) == pytest.approx(1.5)


def test_a_sweep_fits_the_upper_half_of_each_contender(monkeypatch):
    def measure(self, case, effort, only):
        ms = max(64, case.seq_len) / 64
        rows = [a_row("mask_sampling", "", name, ms) for name in ("fastmask", "x-transformers") if case.seq_len < 999]
        return [*rows, {"contender": "refused", "status": "wrong"}]

    monkeypatch.setattr(harness.Benchmark, "measure", measure)
    case = masking.Case(2, 8, False, CPU)
    rows = scaling.measure(scaling.Sweep(masking.BENCHMARK, case, "seq_len", (16, 64, 128, 256, 1024)))
    assert [row["contender"] for row in rows] == ["fastmask", "x-transformers"]
    assert [row["points"] for row in rows] == [[(16, 1.0), (64, 1.0), (128, 2.0), (256, 4.0)]] * 2
    assert all(row["exponent"] == pytest.approx(1.0) for row in rows)


def test_sweeps_are_resumed_too(recorded, monkeypatch, tmp_path):
    monkeypatch.setattr(results_file, "_output", lambda *command: "abc1234")
    sweeps = [scaling.Sweep(demask.BENCHMARK, "rows", field, (1, 2)) for field in ("num_rows", "num_tokens")]
    monkeypatch.setattr(scaling, "sweeps", lambda device: sweeps)
    monkeypatch.setattr(suite, "BENCHMARKS", [replace(suite.BENCHMARKS[0], cases=lambda quick: [])])
    shown = []

    def show(sweep):
        shown.append(sweep.field)
        if len(shown) == 2:
            raise CutShort
        return [{"operation": "demask", "case": "rows", "field": sweep.field, "contender": name} for name in "ab"]

    monkeypatch.setattr(scaling, "show", show)
    with pytest.raises(CutShort):
        suite.main(["--output", str(tmp_path)])
    assert suite.main(["--resume", "--output", str(tmp_path)]) == 0
    assert shown == ["num_rows", "num_tokens", "num_tokens"]
    found = results_file.newest(False, tmp_path)["scaling"]
    assert [row["field"] for row in found] == ["num_rows", "num_rows", "num_tokens", "num_tokens"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sweeps_reach_what_they_promise(device):
    found = scaling.sweeps(torch.device(device))
    assert {sweep.field for sweep in found} == {"seq_len", "batch", "num_rows", "num_tokens"}
    assert max(case.seq_len for sweep in found if sweep.field == "seq_len" for case in sweep.cases()) == 65536
    assert all(len(sweep.values) > 2 for sweep in found)


def test_the_suite_has_every_operation(monkeypatch):
    from fastmask import _dispatch

    names = {benchmark.name for benchmark in suite.BENCHMARKS}
    assert names == {*_dispatch.OPERATIONS, *end_to_end.TASKS}
    for is_cuda in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda is_cuda=is_cuda: is_cuda)
        for benchmark in suite.BENCHMARKS:
            quick, everything = benchmark.cases(True), benchmark.cases(False)
            assert set(quick) <= set(everything), benchmark.name
            assert len({replace(case, device=CPU) for case in quick}) >= 2
            assert {case.device.type for case in everything} == {"cuda" if is_cuda else "cpu"}


def test_the_static_table_implies_a_bandwidth():
    plan = {"name": "tiles T", "kernel": "_tiles", "options": {"num_warps": 4}, "args": {"BLOCK": 4096}}
    plan["gfx942"] = {"options": {"num_warps": 2}}
    figures = {"registers": 40, "spills": 0, "shared": 16, "load_bits": 128, "instructions": 640, "loops": []}
    row = static.describe("demask", plan, "sm_90", figures)
    assert row["per_element"] == 640 / 32  # 4096 logits over 128 threads
    assert row["ceiling"] == pytest.approx(132 * 128 * 1.755e9 / 20 * 2)
    assert static.describe("demask", plan, "gfx942", figures)["per_element"] == 640 / 32  # 2 warps of 64
    assert "ceiling" not in static.describe("demask", plan | {"name": "choice"}, "sm_90", figures)
    assert "| demask | tiles T | sm_90 | 40 | 0 | 16 | 128 | 20.0 | 3.0 (69%) |" in static.table([row])


def test_two_passes_count_by_their_loops():
    plan = {"name": "one tile", "kernel": "_rows", "options": {"num_warps": 4}, "args": {"BLOCK_V": 1024}}
    figures = {"registers": 40, "spills": 0, "shared": 16, "load_bits": 128, "instructions": 999}
    row = static.describe("masked_cross_entropy", plan, "sm_90", figures | {"loops": [80, 40, 7]})
    assert row["per_element"] == 120 / 8
    assert "per_element" not in static.describe("masked_cross_entropy", plan, "gfx942", figures)  # no loops are told


@pytest.mark.parametrize("operation", ["mask_sampling", "masked_cross_entropy"])
def test_the_static_table_takes_the_plans_that_the_tests_keep(operation):
    pytest.importorskip("triton")
    collect, _ = static.OPERATIONS[operation]
    plans = collect(static._load(f"test_{operation}"))
    assert len({plan["name"] for plan in plans}) == len(plans) > 3
    assert not any(plan["name"].startswith("{") for plan in plans)
    assert all({"module", "kernel", "options", "args"} <= set(plan) for plan in plans)


def test_readme_tells_the_newest_results():
    text = report.README.read_text()
    assert report.readme(text) == text, "run python -m benchmarks report"
