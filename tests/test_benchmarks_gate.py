"""The benchmarks of the operations: what their gates refuse and admit, their cases and floors."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from benchmark_helpers import CPU, ONCE, compare, contender, loss_problem, right, wrong_row

from benchmarks import bench_linear_masked_cross_entropy as linear
from benchmarks import bench_mask_sampling as masking
from benchmarks import bench_masked_cross_entropy as dense
from benchmarks import bench_remask as remasking
from benchmarks import bench_sample_tokens as sampling
from benchmarks import bench_select_at_random as selecting
from benchmarks import comparison, gate, losses, peers, sampler_peers, tables
from benchmarks.records import ALL_ROWS, GATHERED, IDS_ONLY, WITH_MASK, Ceilings

# ---- the losses ----


@pytest.fixture(scope="module")
def problem() -> losses.LossProblem:
    return loss_problem()


def mask_ignored(logits, targets, is_masked):
    return F.cross_entropy(logits, targets)


def wrong_mean(logits, targets, is_masked):
    return right(logits, targets, is_masked) * 1.01


def not_a_number(logits, targets, is_masked):
    return right(logits, targets, is_masked) * float("nan")


def gradient_lost(logits, targets, is_masked):
    loss = right(logits, targets, is_masked)
    return loss.detach() + 0.0 * logits.sum()


def raising(logits, targets, is_masked):
    raise RuntimeError("no kernel for this shape")


@pytest.mark.parametrize("loss", [mask_ignored, wrong_row, wrong_mean, not_a_number, gradient_lost])
def test_gate_refuses_a_wrong_contender(problem, loss):
    (row,) = compare([contender(loss)], problem)
    assert row["status"] == "wrong"
    assert "ms" not in row
    assert not all(error <= losses.LIMITS[torch.float32] for error in row["errors"].values())
    assert f"not timed, wrong ({row['reason']}): {loss.__name__} [given the mask]" in tables.table([row], None)


@pytest.mark.parametrize("given", [WITH_MASK, ALL_ROWS])
def test_gate_admits_eager_whatever_it_is_given(given):
    for case in (dense.Case(32, 67, 0.3, CPU), linear.Case(32, 67, 16, 0.3, CPU)):
        module = dense if isinstance(case, dense.Case) else linear
        (eager,) = [c for c in module.contenders() if c.name == "PyTorch" and c.given == given]
        _, errors = gate.admit(eager, module.problem(case))
        assert max(errors.values()) < 1e-6


def test_a_contender_that_raises_or_does_not_import_is_reported(problem, monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    liger = [c for c in peers.dense() if c.name.startswith("Liger")]
    rows = compare([contender(raising), *liger, *(replace(c, needs_cuda=False) for c in liger)], problem)
    assert [row["status"] for row in rows] == ["raises", *["needs CUDA"] * 4, *["does not import"] * 4]
    table = tables.table(rows, None)
    assert "not timed, raises (RuntimeError: no kernel for this shape): raising [given the mask]" in table
    assert "liger_kernel" in table
    assert "Liger (Triton, in place) [all rows, gathered rows]" in table


def test_a_contender_that_overwrites_gets_its_rows_back_and_spoils_nobody_elses(problem):
    def overwriting(logits, labels):
        loss = F.cross_entropy(logits, labels)
        logits.data.zero_()
        return loss

    def other(logits, labels):
        return F.cross_entropy(logits.clone(), labels)

    before = problem.rows.clone()
    both = [contender(overwriting, ALL_ROWS, overwrites=True), contender(other, ALL_ROWS)]
    step, first = gate.admit(both[0], problem)
    assert not step.problem.scratch(ALL_ROWS).any()
    step.restore()
    assert problem.errors(step) == first
    assert [row["status"] for row in compare(both, problem, effort=ONCE)] == ["ok", "ok"]
    assert torch.equal(problem.rows, before)


def test_gathered_rows_are_gathered_in_what_is_timed(problem):
    """And their gradient put back, so that a loss given them does what one given the mask does."""
    seen = []

    def loss(logits, labels):
        seen.append((len(logits), len(labels), logits.data_ptr() == problem.rows.data_ptr()))
        return F.cross_entropy(logits, labels)

    step, errors = gate.admit(contender(loss, GATHERED), problem)
    assert max(errors.values()) < 1e-6
    gradient = step.run()[1]
    assert gradient.shape == problem.rows.shape
    assert not gradient[~problem.is_masked].any()
    assert seen == [(problem.is_masked.sum(), problem.is_masked.sum(), False)] * 2


def weight_forgotten(x, weight, targets, is_masked):
    return F.cross_entropy(F.linear(x[is_masked], weight.detach()), targets[is_masked]) + 0.0 * weight.sum()


def test_gate_refuses_a_wrong_gradient_of_the_weight():
    with pytest.raises(gate.Refused, match=r"wrong: loss .* weight's gradient 1\.0e\+00 \(limit 1e-04\)"):
        gate.admit(contender(weight_forgotten), linear.problem(linear.Case(32, 67, 16, 0.3, CPU)))


def unmasked_rows_pulled(logits, targets, is_masked):
    """The right loss, with a gradient where there is none."""
    return right(logits, targets, is_masked) + (logits - logits.detach())[~is_masked].sum()


def test_gate_refuses_a_gradient_of_unmasked_rows(problem):
    with pytest.raises(gate.Refused, match="wrong"):
        gate.admit(contender(unmasked_rows_pulled), problem)


def test_floor_of_the_dense_loss_is_one_plus_mask_ratio_times_the_logits():
    case = dense.Case(16384, 32768, 0.5, torch.device("cuda"))
    floor = dense.floor(case, Ceilings(copy=4000.0, product=1.0))
    assert floor.amount == 1.5 * 2**30
    assert floor.milliseconds == pytest.approx(1.5 * 2**30 / 4e12 * 1e3)
    assert floor.rate_of(floor.milliseconds) == pytest.approx(4000.0)


def test_floor_of_the_linear_loss_is_three_products_of_the_masked_rows():
    case = linear.Case(8192, 50257, 2048, 0.15, torch.device("cuda"))
    floor = linear.floor(case, Ceilings(copy=1.0, product=800.0))
    assert floor.amount == 6.0 * 1229 * 2048 * 50257
    assert floor.milliseconds == pytest.approx(6.0 * 1229 * 2048 * 50257 / 800e12 * 1e3)


@pytest.mark.parametrize("mask_ratio", [0.0, 0.15, 0.5, 1.0])
def test_as_many_rows_are_masked_as_the_floor_says(mask_ratio):
    is_masked = losses.draw_mask(33, mask_ratio, CPU, torch.Generator().manual_seed(0))
    assert is_masked.sum() == linear.Case(33, 67, 16, mask_ratio, CPU).num_masked == round(33 * mask_ratio)


def test_bare_products_leave_the_inputs_alone():
    case = linear.Case(2500, 33, 8, 0.5, CPU)  # two chunks of the reference's
    problem = linear.problem(case)
    x, weight = problem.rows.clone(), problem.parameters[0].clone()
    linear.bare_products(case, problem)()
    assert torch.equal(problem.rows, x)
    assert torch.equal(problem.parameters[0], weight)


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
    for kinds in given.values():
        assert {ALL_ROWS, GATHERED} <= kinds or WITH_MASK in kinds


# ---- sampling ----


@pytest.fixture(scope="module", params=[None, 50])
def sampling_problem(request) -> sampling.SamplingProblem:
    return sampling.problem(sampling.Case(64, 500, request.param, CPU))


def sampled(logits, temperature, top_k, heat=1.0):
    """What is right, where heat is 1."""
    kept = sampler_peers.filtered(logits, top_k)
    ids = torch.multinomial((kept / (temperature * heat)).softmax(dim=-1)[0], 1).T
    return ids, kept.softmax(dim=-1).gather(-1, ids[..., None])[..., 0]


def argmax(logits, temperature, top_k):
    ids = logits.argmax(dim=-1)
    return ids, sampler_peers.probability(sampler_peers.filtered(logits, top_k).softmax(dim=-1), ids)


def warmer(logits, temperature, top_k):
    return sampled(logits, temperature, top_k, heat=1 / temperature)


def heated_probability(logits, temperature, top_k):
    ids, _ = sampled(logits, temperature, top_k)
    return ids, sampler_peers.probability((sampler_peers.filtered(logits, top_k) / temperature).softmax(dim=-1), ids)


def mask_ids(logits, temperature, top_k):
    ids, probs = sampled(logits, temperature, top_k)
    ids[0, 3] = logits.shape[-1] - 1
    return ids, probs


def beyond(logits, temperature, top_k):
    ids, probs = sampled(logits, temperature, top_k)
    ids[0, 3] = logits.shape[-1]
    return ids, probs


def least_likely(logits, temperature, top_k):
    """One id that a filter would not keep."""
    ids, _ = sampled(logits, temperature, top_k)
    ids[0, 0] = logits[0, 0, :-1].argmin()
    return ids, sampler_peers.probability(logits.softmax(dim=-1), ids)


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
def test_gate_refuses_a_wrong_sampler(sampling_problem, sampler, error):
    (row,) = compare([contender(sampler, "")], sampling_problem, effort=ONCE)
    assert row["status"] == "wrong"
    assert not row["errors"][error] <= sampling_problem.limits[error]


@pytest.mark.parametrize("sampler", [argmax, warmer, mask_ids, beyond])
def test_gate_refuses_wrong_ids_where_nothing_else_is_told(sampling_problem, sampler):
    def ids_only(*given):
        return sampler(*given)[0], None

    rows = compare([contender(ids_only, IDS_ONLY), contender(ids_only, "")], sampling_problem, effort=ONCE)
    assert [row["status"] for row in rows] == ["wrong", "raises"]
    assert "probability" not in rows[0]["errors"]


def test_gate_refuses_an_id_that_the_filter_drops():
    problem = sampling.problem(sampling.Case(64, 500, 50, CPU))
    with pytest.raises(gate.Refused) as refusal:
        gate.admit(contender(least_likely, ""), problem)
    assert refusal.value.errors["ids that are not allowed"] >= 1


def test_gate_admits_every_sampler_that_runs_here(sampling_problem):
    rows = compare(sampling.contenders(), sampling_problem, effort=ONCE)
    assert {row["contender"] for row in rows if row["status"] == "ok"} == {
        "fastmask", "x-transformers", "float64 Gumbel (LLaDA)", "torch.multinomial",
        "fastmask, ids only", "x-transformers, ids only", "torch.multinomial, ids only",
    }  # fmt: skip
    assert {row["status"] for row in rows} == {"ok", "needs CUDA"}


def test_gate_admits_either_side_of_a_tie_and_either_normaliser():
    """Of 20 ids 2 are kept; 3 tie for the second place. Upstream keeps one of those, ours keeps all."""
    logits = torch.zeros(1, 300, 20)
    logits[..., 4], logits[..., 7:10], logits[..., -1] = 2.0, 1.0, -torch.inf
    problem = sampling.SamplingProblem(logits, 2)
    for name in ("fastmask", "x-transformers"):
        (one,) = [c for c in sampling.contenders() if str(c) == name]
        _, errors = gate.admit(one, problem)
        assert errors["probability"] < 1e-6
        assert errors["ids that are not allowed"] == 0


def test_what_people_run_today_is_timed_beside_its_errors(sampling_problem):
    rows = compare([contender(argmax, "", is_baseline=True, timed_if_wrong=True)], sampling_problem, effort=ONCE)
    assert rows[0]["status"] == "wrong"
    assert rows[0]["ratio"] == {"eager": 1.0}
    assert "timed although wrong (ids that are not allowed 0.0e+00 (limit 0e+00)" in tables.table(rows, None)


def test_bfloat16_noise_is_refused():
    """x-transformers' own step in bfloat16: its uniforms have 256 values."""
    logits = sampling.problem(sampling.Case(64, 8192, None, CPU)).logits.bfloat16()
    problem = sampling.SamplingProblem(logits, None)
    (upstream,) = [c for c in sampling.contenders() if str(c) == "x-transformers"]
    with pytest.raises(gate.Refused, match="standard errors"):
        gate.admit(replace(upstream, timed_if_wrong=False), problem)


def test_bytes_a_logit_are_the_time_at_the_measured_rate():
    case = sampling.Case(32, 1000, None, torch.device("cuda"))
    floor = sampling.floor(case, Ceilings(copy=4000.0, product=1.0))
    row = comparison.timing_figures([2 * floor.milliseconds], floor)
    assert (row["bytes_per_logit"], row["percent_of_floor"]) == (pytest.approx(4.0), pytest.approx(50.0))


# ---- masking ----


def test_floor_of_masking_is_what_its_results_take():
    """A token read; an id, a bool and an entry of the list written; with padding a bool read."""
    limits = Ceilings(copy=1.0, product=1.0)
    assert masking.floor(masking.Case(2, 1024, False, CPU), limits).amount == 2 * 1024 * 25
    assert masking.floor(masking.Case(2, 1024, True, CPU), limits).amount == 2 * 1024 * 26


@pytest.fixture(scope="module", params=[False, True], ids=["full", "padded"])
def masking_problem(request) -> masking.MaskingProblem:
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
def test_gate_refuses_wrong_masks(masking_problem, masker, error):
    (row,) = compare([contender(masker, "")], masking_problem, effort=ONCE)
    assert row["status"] == "wrong"
    assert not row["errors"][error] <= masking_problem.limits[error]


def test_gate_refuses_masks_on_padding_and_changed_tokens():
    problem = masking.problem(masking.Case(8, 100, True, CPU))
    blind = contender(lambda tokens, times, maskable: right_masks(tokens, times, None), "")
    changed = contender(lambda *given: ((out := right_masks(*given))[0].where(out[1], 6), out[1]), "")
    for row in compare([blind, changed], problem, effort=ONCE):
        assert row["errors"]["changed or masked where it may not be"] > 0


def test_gate_admits_ours_and_upstreams_masks(masking_problem):
    rows = compare(masking.contenders(), masking_problem, effort=ONCE)
    assert [row["status"] for row in rows] == ["ok", "ok", "needs CUDA"]


# ---- remasking ----


@pytest.fixture(scope="module")
def remask_problem() -> remasking.RemaskProblem:
    return remasking.problem(remasking.Case(4, 64, CPU))


def right_choice(*given):
    (upstream,) = [c for c in remasking.contenders() if c.is_baseline]
    return upstream.load()(*given)


def most_confident(ids, is_masked, confidences, counts, count):
    return right_choice(ids, is_masked, 1 - confidences, counts, count)


def one_too_few(ids, is_masked, confidences, counts, count):
    return right_choice(ids, is_masked, confidences, counts, count - 1)


def anywhere(ids, is_masked, confidences, counts, count):
    return right_choice(ids, torch.ones_like(is_masked), confidences, counts, count)


def ids_forgotten(ids, *given):
    return ids, right_choice(ids, *given)[1]


@pytest.mark.parametrize("choice", [most_confident, one_too_few, anywhere, ids_forgotten])
def test_gate_refuses_a_wrong_choice(remask_problem, choice):
    (row,) = compare([contender(choice, "")], remask_problem, effort=ONCE)
    assert row["status"] == "wrong"
    assert row["errors"]["wrong ids"] > 0


def test_gate_admits_every_choice_that_runs_here(remask_problem):
    rows = compare(remasking.contenders(), remask_problem, effort=ONCE)
    assert [row["status"] for row in rows if row["status"] != "needs CUDA"] == ["ok"] * 5


def test_remask_is_given_back_what_it_overwrites(remask_problem):
    ours = remasking.contenders()[0]
    step, _ = gate.admit(ours, remask_problem)
    ids, is_masked = remask_problem._overwritten
    assert (ids == remasking.MASK_ID).sum() == is_masked.sum() == 4 * 16
    step.restore()
    assert torch.equal(ids, remask_problem.ids)
    assert torch.equal(is_masked, remask_problem.is_masked)
    assert not (ids == remasking.MASK_ID).any()
    assert is_masked.sum() == 4 * 32


def test_floor_of_remask_is_what_must_be_read_and_written():
    floor = remasking.floor(remasking.Case(2, 1024, CPU), Ceilings(copy=1.0, product=1.0))
    assert floor.amount == 2 * (1024 * (4 + 1 + 1) + 256 * 8)


# ---- selecting at random ----


@pytest.fixture(scope="module")
def selection_problem() -> selecting.SelectionProblem:
    return selecting.problem(selecting.Case(8, 100, CPU))


def right_coins(eligible, probability):
    return eligible & (torch.rand(eligible.shape) < probability[:, None])


def eligible_or_not(eligible, probability):
    return right_coins(torch.ones_like(eligible), probability)


def a_tenth_too_often(eligible, probability):
    return right_coins(eligible, 1.1 * probability)


def the_first_ones(eligible, probability):
    return eligible & (torch.linspace(0, 1, eligible.shape[1]) < probability[:, None])


@pytest.mark.parametrize(
    ("selector", "error"),
    [
        (eligible_or_not, "selected where it may not be"),
        (a_tenth_too_often, "standard errors of the number"),
        (the_first_ones, "standard errors of the mean position"),
    ],
)
def test_gate_refuses_wrong_coins(selection_problem, selector, error):
    (row,) = compare([contender(selector, "")], selection_problem, effort=ONCE)
    assert row["status"] == "wrong"
    assert not row["errors"][error] <= selection_problem.limits[error]


def test_gate_admits_every_coin_that_runs_here(selection_problem):
    rows = compare(selecting.contenders(), selection_problem, effort=ONCE)
    assert [row["status"] for row in rows] == ["ok", "ok", "ok", "needs CUDA"]


def test_floor_of_coins_is_a_byte_in_and_one_out():
    assert selecting.floor(selecting.Case(2, 1024, CPU), Ceilings(copy=1.0, product=1.0)).amount == 2 * 1024 * 2
