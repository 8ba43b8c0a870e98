"""Cross-entropy of masked rows by the error-ratio rule: every launch plan, shape and option, wherever rows lie."""

from __future__ import annotations

import importlib
import itertools
import math
import random
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from losses import UNIT, assert_error_ratio, closed_form, draw, draw_targets, equation, gradient, plan_with
from torch.utils._pytree import tree_map_only

from fastmask import functional
from fastmask.records import LossOptions, LossRows, Reduction

OPERATION = "masked_cross_entropy"


def _launch():
    """The module that launches kernels."""
    return importlib.import_module("fastmask.kernels._launch")


@pytest.fixture
def operation(backend):
    """The same, on tensors that lie on its device already: as they lie in memory matters to the test."""
    return partial(functional.masked_cross_entropy, backend="triton" if backend.is_kernel else "reference")


def assert_is_the_equation(
    run, logits, targets, is_masked, weights, reduction, denominator=None, upstream=None, inplace_grad=False,
    with_correct=False, **options,
):  # fmt: skip
    """Loss, nll and gradient of logits [R, V] by the error-ratio rule, 0 at the rows that do not count."""
    upstream = torch.tensor(1.0) if upstream is None else upstream
    only_nll = {name: options.get(name) for name in ("exclude_id", "softcap")}
    given = logits.detach().clone()
    logits.requires_grad_()
    out = run(
        logits, targets, is_masked, weights, reduction=reduction, denominator=denominator,
        inplace_grad=inplace_grad, with_correct=with_correct, **options,
    )  # fmt: skip
    (ours,) = gradient(out.loss, logits, upstream=upstream.to(out.loss.device))

    # Judged on the CPU, wherever it ran.
    out, ours, given, targets, is_masked, weights, upstream = tree_map_only(
        torch.Tensor, torch.Tensor.cpu, (out, ours, given, targets, is_masked, weights, upstream)
    )
    rows = is_masked if weights is None else is_masked & (weights != 0)
    weight = torch.ones(len(targets)) if weights is None else weights
    divisor = 1.0 if reduction != "mean" else denominator or max(1, int(rows.sum()))
    given = given[rows]

    def pytorch(precision):
        z = given.to(precision).requires_grad_()
        factor = weight[rows].to(precision)
        loss = factor * equation(z, targets[rows], **options) / divisor
        (grad,) = gradient((upstream[rows] if upstream.ndim else upstream).to(precision) * loss, z,
                           upstream=torch.ones_like(loss))  # fmt: skip
        return loss.detach(), equation(z.detach(), targets[rows], **only_nll), grad

    (loss, nll, grad), (exact_loss, exact_nll, exact_grad) = pytorch(torch.float32), pytorch(torch.float64)
    unit = UNIT[torch.float32]
    # A capped logit is itself rounded to float32: where the row is nearly certain, that of the margin shows.
    rounding = 0.0 if only_nll["softcap"] is None else 2**-23 * given.double().abs().amax(-1)
    inherited = rounding * -torch.expm1(-exact_nll)
    assert_error_ratio(out.nll[rows], nll, exact_nll, unit, inherited)
    assert_error_ratio(ours[rows], grad.to(logits.dtype), exact_grad, UNIT[logits.dtype])
    assert not ours[~rows].any()
    assert not out.nll[~rows].any()
    if reduction == "none":
        assert_error_ratio(out.loss[rows], loss, exact_loss, unit, weight[rows].abs() * inherited)
        assert not out.loss[~rows].any()
    else:  # with weights of both signs a sum is as accurate as its terms are large
        terms = unit * exact_loss.abs() + weight[rows].abs() * inherited / divisor
        assert (out.loss.double() - exact_loss.sum()).abs() <= 1.5 * terms.sum()
    return out


# Around powers of two (every launch plan's edge is one) and, as a row costs the interpreter a third of a second
# at 65536 columns, now and then a large one.
SMALL = sorted({max(1, 2**k + d) for k in range(13) for d in (-1, 0, 1)})

LARGE = [8191, 8192, 8193, 12289, 16384, 16385, 65535, 65536, 65537]


def random_case(number: int) -> dict:
    """The arguments of ``assert_is_the_equation``."""
    law = random.Random(number)
    is_large = number % 12 == 5
    vocabulary = law.choice(LARGE if is_large else SMALL)
    rows = 2 if is_large else law.randint(1, 4)
    ratio = {0: 0.0, 1: 1.0}.get(number % 12, law.uniform(0.1, 1.0))
    exclude_id = law.randrange(vocabulary) if vocabulary > 1 and law.random() < 0.3 else None
    targets = draw_targets(rows, vocabulary=vocabulary, seed=number, dtype=law.choice([torch.int32, torch.int64]))
    if exclude_id is not None:
        targets = torch.where(targets == exclude_id, (exclude_id + 1) % vocabulary, targets)
    is_masked = torch.tensor([law.random() < ratio for _ in range(rows)])
    is_masked[law.randrange(rows)] = ratio > 0.0
    weights = None
    if law.random() < 0.8:
        weights = torch.tensor([10 ** law.uniform(-3, 3) * law.choice([1, 1, 1, 1, 0, -1]) for _ in range(rows)])
    reduction = law.choice(["none", "sum", "mean"])
    upstream = draw(rows, seed=number + 1) if reduction == "none" else torch.tensor(law.choice([1.0, -0.3, 7.0]))
    return {
        "logits": draw(rows, vocabulary, seed=number, scale=law.choice([0.5, 3.0, 10.0]),
                       dtype=law.choice([torch.bfloat16, torch.float16, torch.float32])),
        "targets": targets,
        "is_masked": is_masked,
        "weights": weights,
        "reduction": reduction,
        "denominator": law.choice([None, 77.0]) if reduction == "mean" else None,
        "upstream": upstream,
        "label_smoothing": law.choice([0.0, 0.0, 0.1, 0.7]),
        "z_loss": law.choice([0.0, 0.0, 0.01]),
        "softcap": law.choice([None, None, 4.0, 30.0]),
        "exclude_id": exclude_id,
        "with_correct": law.random() < 0.5,
    }  # fmt: skip


@pytest.mark.parametrize("number", range(220))
@pytest.mark.slow_interpreted
def test_random_cases(kernel, monkeypatch, number):
    if number % 24 == 5:  # else every large row would be split
        plan_with(kernel, monkeypatch, _FEW_ROWS=0)
    assert_is_the_equation(partial(kernel.run, functional.masked_cross_entropy), **random_case(number))


# ---- launch plans ----


class Planned(NamedTuple):
    """V and rows of a plan, with its tile's columns, warps and rows a program; and those where columns are costly."""

    vocabulary: int
    rows: int
    plan: tuple[int, int, int | None]
    costly: tuple[int, int, int | None]


# Of an H100 with a third of its L2: rows need not be as long for that to be full.
HARDWARE = {"l2_bytes": 16 * 2**20}
PLANS = {
    "eight rows": Planned(63, 21, (64, 1, 8), (64, 1, 4)),
    "four rows": Planned(255, 6, (256, 1, 4), (256, 1, 1)),
    "a tile of 512": Planned(513, 6, (512, 1, None), (512, 2, None)),
    "one warp": Planned(1000, 6, (1024, 1, None), (1024, 4, None)),
    "two warps": Planned(2001, 6, (2048, 2, None), (1024, 4, None)),
    "four programs an SM": Planned(9001, 6, (4096, 4, None), (1024, 4, None)),
    "two programs an SM": Planned(17001, 6, (8192, 8, None), (2048, 8, None)),
    "one program an SM": Planned(33001, 6, (16384, 16, None), (4096, 16, None)),
    "split": Planned(13001, 6, (4096, 8, None), (2048, 8, None)),
    "split, two tiles a piece": Planned(25001, 101, (4096, 8, None), (2048, 8, None)),
}


# What else picks a plan, each with a reduction that takes another way to the gradient.
COLUMNS = {
    "plain": {"reduction": "sum", "inplace_grad": True},
    "special": {"reduction": "none", "exclude_id": 1, "with_correct": True},
    "costly": {"reduction": "mean", "softcap": 30.0, "label_smoothing": 0.1, "z_loss": 0.01, "with_correct": True},
}


@pytest.mark.ptx
@pytest.mark.parametrize(
    ("name", "column"),
    # The hundred rows that a second tile a piece takes are slow, and the options meet pieces under "split".
    [(name, column) for name in PLANS for column in COLUMNS if not name.endswith("a piece") or column == "costly"],
)
@pytest.mark.slow_interpreted
def test_every_launch_plan(kernel, reference, monkeypatch, name, column):
    """Targets and the excluded column in the first and last tile and in both edges of a misaligned row, and
    rivals of the same logit in other tiles."""
    module, options = kernel.module(OPERATION), COLUMNS[column]
    vocabulary, rows, *plans = PLANS[name]
    hardware = _launch().H100._replace(**HARDWARE)
    monkeypatch.setattr(_launch(), "hardware", lambda device: hardware)
    if not name.startswith("split"):  # as with many rows
        plan_with(kernel, monkeypatch, _FEW_ROWS=0)
    if column == "costly":
        options = {**options, "exclude_id": vocabulary - 2}
    chosen = LossOptions(**{name: options[name] for name in LossOptions._fields if name in options})
    plan = module.plan(rows, vocabulary, torch.bfloat16, chosen, hardware)
    assert plan[:3] == plans[column == "costly"]
    assert (plan.num_pieces > 1) == name.startswith("split")
    if name.startswith("split"):
        assert (plan.tiles_per_piece > 1) == (name == "split, two tiles a piece")

    storage = draw(3 + rows * vocabulary, dtype=torch.bfloat16).to(kernel.device)
    logits = storage[3:].view(rows, vocabulary)
    block = min(plan.block_v, vocabulary // 2)
    # The second tile's first column, of rows 2 and 5: after those before the row's body, and a tile.
    second, fifth = (-(3 + row * vocabulary) % 8 + block for row in (2, 5))
    # Targets, and rivals that tie: in either edge, at either side of a tile's end, in the last tile, and none.
    targets = torch.tensor([0, vocabulary - 1, second - 1, vocabulary - 20, block, fifth])
    rivals = torch.tensor([vocabulary - 1, 0, second, block, block, fifth - 1])
    top = logits[:6].float().amax(-1) + torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, 1.0], device=logits.device)
    for columns in (targets, rivals):
        logits[:6].scatter_(-1, columns[:, None].to(kernel.device), top[:, None].to(logits))
    if chosen.exclude_id is not None:
        logits[:, chosen.exclude_id] = 100.0
    is_masked = torch.arange(rows) < 6
    targets = torch.cat([targets, torch.full((rows - 6,), 10**12)])
    expected = reference.operation(OPERATION)(
        logits.cpu().clone(),
        LossRows(targets, is_masked),
        Reduction(options["reduction"]),
        chosen._replace(with_correct=True),
        False,
    )
    out = assert_is_the_equation(
        partial(kernel.run, functional.masked_cross_entropy), logits, targets, is_masked, None, **options,
        upstream=draw(rows) if options["reduction"] == "none" else None,
    )  # fmt: skip
    assert expected.correct[:6].tolist() == [True, False, True, False, False, False]
    if "with_correct" in options:
        assert torch.equal(out.correct, expected.correct)


@pytest.mark.parametrize("vocabulary", [200, 1100, 13001])
def test_parts_of_a_row_that_hold_nothing(kernel, vocabulary):
    """Of a row split over programs, pieces too: -inf but for a few columns, which lie far below 0."""
    logits = torch.full((3, vocabulary), -math.inf)
    logits[:, -20:] = draw(3, 20) - 200.0
    targets = torch.tensor([vocabulary - 1, vocabulary - 7, vocabulary - 20])
    out = kernel.run(functional.masked_cross_entropy, logits.requires_grad_(), targets, reduction="sum")
    exact_loss, exact_grad = closed_form(logits, targets)
    assert_error_ratio(out.nll, exact_loss.float(), exact_loss, UNIT[torch.float32])
    assert_error_ratio(*gradient(out.loss, logits), exact_grad.float(), exact_grad, UNIT[torch.float32])


# An H200 (of these facts an H100), a B200, an RTX 5090, an A100, an MI300X.
MACHINES = {
    "sm_90": {},
    "sm_100": {"num_multiprocessors": 148, "l2_bytes": 126 * 2**20},
    "sm_120": {"num_multiprocessors": 170, "l2_bytes": 96 * 2**20},
    "sm_80": {"num_multiprocessors": 108, "l2_bytes": 40 * 2**20},
    "gfx942": {"vendor": "amd", "num_multiprocessors": 304, "warp_size": 64, "l2_bytes": 4 * 2**20},
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_plans_follow_the_hardware(kernel, machine, softcap):
    """Every multiprocessor has work where there is enough; rows that are read twice fit the L2, one for each
    multiprocessor at least."""
    facts, options = _launch().H100._replace(**MACHINES[machine]), LossOptions(softcap=softcap)
    sms = facts.num_multiprocessors
    all_rows, vocabularies = (1, 7, sms - 1, sms, 3 * sms, 10**5), (5, 64, 257, 8192, 50257, 151936)
    for rows, vocabulary in itertools.product(all_rows, vocabularies):
        found = kernel.module("_loss_plan").plan(rows, vocabulary, torch.bfloat16, options, facts)
        assert found.num_warps <= facts.max_warps
        if found.rows is not None:
            assert found.block_v >= vocabulary
            assert found.rows == 1 or rows / found.rows >= sms
            continue
        assert found.block_v >= found.num_warps * facts.warp_size  # a column a lane
        assert (found.num_pieces > 1) == (rows < sms and vocabulary > 8192)
        assert (found.num_pieces - 1) * found.tiles_per_piece * found.block_v < vocabulary
        assert found.num_pieces * found.tiles_per_piece * found.block_v >= vocabulary - 7
        if found.num_pieces > 1:
            tiles = -(-vocabulary // found.block_v)
            assert min(2 * sms, rows * tiles) <= rows * found.num_pieces <= 4 * sms + rows
        elif vocabulary > 8192:
            programs = 512 // (found.num_warps * facts.warp_size)
            assert programs == 1 or programs * sms * 2 * vocabulary <= facts.l2_bytes


# ---- where rows lie ----


MISALIGNED = [(torch.bfloat16, offset) for offset in range(8)] + [(torch.float32, offset) for offset in (1, 2, 3)]


@pytest.mark.parametrize("inplace_grad", [False, True])
@pytest.mark.parametrize("vocabulary", [3, 37])
@pytest.mark.parametrize(("dtype", "offset"), MISALIGNED, ids=str)
def test_misaligned_rows(operation, backend, dtype, offset, vocabulary, inplace_grad):
    """Between NaN, which is neither read nor written."""
    storage = torch.full((offset + 4 * vocabulary + 16,), math.nan, dtype=dtype, device=backend.device)
    inside = slice(offset, offset + 4 * vocabulary)
    logits = storage[inside].view(4, vocabulary)
    is_masked = torch.tensor([True, False, True, False], device=backend.device)
    logits[is_masked] = draw(2, vocabulary, dtype=dtype).to(backend.device)
    before = storage.clone()
    targets = draw_targets(4, vocabulary=vocabulary).to(backend.device)
    assert_is_the_equation(operation, logits, targets, is_masked, None, "sum", inplace_grad=inplace_grad)
    if inplace_grad:
        assert storage[:offset].isnan().all()
        assert storage[inside.stop :].isnan().all()
    else:
        assert torch.equal(storage.view(torch.uint8), before.view(torch.uint8))


# (offset, row stride) of the logits, then of the gradient, in bfloat16: 8 elements are 16 bytes.
PHASES = {
    "aligned": ((0, 304), (8, 312)),
    "same phase": ((3, 301), (11, 301)),
    "other start": ((3, 304), (4, 304)),
    "other stride": ((0, 304), (0, 305)),
    "misaligned logits": ((5, 301), (0, 304)),
}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("vocabulary", [5, 299])
def test_gradient_of_another_phase(kernel, monkeypatch, phase, vocabulary):
    """The gradient goes to a padded buffer that the caller gives, whose padding stays as it was. That its stores
    are 16 bytes wide is promised only where they are aligned, which the interpreter would not notice."""
    module, promised = kernel.module(OPERATION), []
    launch = _launch().launch

    def recorded(*where, **arguments):
        promised.append(arguments.get("SAME_PHASE"))
        launch(*where, **arguments)

    monkeypatch.setattr(_launch(), "launch", recorded)

    def padded(offset, stride):
        storage = torch.full((offset + 4 * stride,), math.nan, dtype=torch.bfloat16, device=kernel.device)
        return storage, storage[offset:].view(4, stride)[:, :vocabulary]

    (_, logits), (storage, grad) = (padded(*where) for where in PHASES[phase])
    logits.copy_(draw(4, vocabulary))
    targets = draw_targets(4, vocabulary=vocabulary)
    is_masked = torch.tensor([True, False, True, True])
    rows = LossRows(targets.to(kernel.device), is_masked.to(kernel.device))
    losses = module.losses_and_gradient(logits, rows, None, LossOptions(), grad).loss
    assert promised == [None if vocabulary == 5 else phase in ("aligned", "same phase")]
    loss, expected = closed_form(logits.cpu(), targets)
    torch.testing.assert_close(losses.cpu().double(), loss * is_masked, rtol=1e-6, atol=0.0)
    expected *= is_masked[:, None]
    assert_error_ratio(grad.cpu(), expected.bfloat16(), expected, UNIT[torch.bfloat16])
    assert storage.isnan().sum() == storage.numel() - 4 * vocabulary


def test_padded_rows_of_50257(operation, backend):
    logits = draw(2, 50304, dtype=torch.bfloat16).to(backend.device)[:, :50257]
    logits[0] = math.nan  # unmasked
    targets = torch.tensor([0, 50256], device=backend.device)
    is_masked = torch.tensor([False, True], device=backend.device)
    assert_is_the_equation(operation, logits, targets, is_masked, None, "none", upstream=draw(2).to(backend.device))


def virtual(num_elements: int, device: torch.device) -> torch.Tensor:
    """bfloat16 memory of which only what is touched costs anything (on a GPU all of it)."""
    if device.type == "cuda":
        return torch.empty(num_elements, dtype=torch.bfloat16, device=device)
    try:
        return torch.from_numpy(np.empty(num_elements, np.uint16)).view(torch.bfloat16)
    except MemoryError:
        pytest.skip(f"this machine does not promise {num_elements * 2 / 2**30:.1f} GiB of virtual memory")


@pytest.mark.parametrize("shape", ["rows", "sequences"])
@pytest.mark.parametrize("vocabulary", [300, 8500], ids=["one program", "split"])
def test_elements_past_2_to_the_31(kernel, shape, vocabulary):
    """Logits and the gradient, which takes their place, of rows further apart than int32 reaches."""
    module, stride = kernel.module(OPERATION), 2**31 + 3
    storage = virtual(stride + vocabulary, kernel.device)
    logits = storage.as_strided((2, vocabulary), (stride, 1))
    logits.copy_(draw(2, vocabulary))
    targets = draw_targets(2, vocabulary=vocabulary)
    loss, expected = closed_form(logits.cpu(), targets)
    seen = logits if shape == "rows" else logits[:, None]
    plan = module.plan(2, vocabulary, torch.bfloat16, LossOptions(), _launch().hardware(kernel.device))
    assert (plan.num_pieces > 1) == (vocabulary == 8500)
    losses = module.losses_and_gradient(seen, LossRows(targets.to(kernel.device)), None, LossOptions(), seen).loss
    torch.testing.assert_close(losses.cpu().double(), loss, rtol=1e-6, atol=0.0)
    assert_error_ratio(logits.cpu(), expected.bfloat16(), expected, UNIT[torch.bfloat16])
