"""Cross-entropy of masked rows: PyTorch's values and gradients, and what is promised of each argument."""

from __future__ import annotations

import itertools
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from losses import (
    UNIT,
    assert_error_ratio,
    closed_form,
    draw,
    draw_mask,
    draw_targets,
    equation,
    gradient,
    on,
    plan_with,
    small,
    without,
)

from fastmask import functional

OPERATION = "masked_cross_entropy"


@pytest.fixture(params=["", "no row is short"])
def cross_entropy(request, backend, monkeypatch):
    """The public function on one backend; on the kernel, also as if a program never did several rows."""
    if request.param:
        if not backend.is_kernel:
            pytest.skip("a plan of the kernel's")
        plan_with(backend, monkeypatch, _SHORT=0)
    return on(backend)


@pytest.fixture
def operation(backend):
    """The same, on tensors that lie on its device already: as they lie in memory matters to the test."""
    return partial(functional.masked_cross_entropy, backend="triton" if backend.is_kernel else "reference")


# ---- values and gradients ----


# 50257 with few rows: its chunks hold 10 rows, so 12 masked ones cross a chunk's edge.
SHAPES = {1: 5, 3: 40, 255: 30, 507: 20, 50257: 12}


@pytest.mark.parametrize("vocabulary", SHAPES)
@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.slow_interpreted
def test_is_pytorchs_cross_entropy_of_the_masked_rows(cross_entropy, dtype, vocabulary):
    rows = SHAPES[vocabulary]
    logits = draw(2, rows, vocabulary, dtype=dtype).requires_grad_()
    targets, is_masked = draw_targets(2, rows, vocabulary=vocabulary), draw_mask(2, rows)
    out = cross_entropy(logits, targets, is_masked, reduction="none")
    wide = torch.promote_types(dtype, torch.float32)
    assert out.loss.dtype == out.nll.dtype == wide

    def pytorch(precision):
        z = logits.detach()[is_masked].to(precision).requires_grad_()
        loss = F.cross_entropy(z, targets[is_masked], reduction="none")
        return loss.detach(), *gradient(loss.sum(), z)

    loss, grad = pytorch(wide)
    exact_loss, exact_grad = closed_form(logits[is_masked], targets[is_masked])
    torch.testing.assert_close((exact_loss, exact_grad), pytorch(torch.float64))
    assert_error_ratio(out.loss[is_masked], loss, exact_loss, UNIT[wide])
    assert torch.equal(out.nll, out.loss)
    (ours,) = gradient(out.loss.sum(), logits)
    assert ours.dtype == dtype
    assert_error_ratio(ours[is_masked], grad.to(dtype), exact_grad, UNIT[dtype])
    assert not ours[~is_masked].any()

    mean = cross_entropy(logits.detach(), targets, is_masked).loss
    assert_error_ratio(mean[None], F.cross_entropy(logits[is_masked].to(wide), targets[is_masked])[None],
                       exact_loss.mean()[None], UNIT[wide])  # fmt: skip


OPTIONS = [
    {"label_smoothing": e, "z_loss": z, "exclude_id": x}
    for e, z, x in itertools.product([0.0, 0.1, 1.0], [0.0, 0.03], [None, 2])
]

OPTIONS += [{**OPTIONS[0], "softcap": 5.0}, {"label_smoothing": 0.1, "z_loss": 0.03, "exclude_id": 2, "softcap": 2.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.slow_interpreted
def test_options_are_the_docstrings_equation(cross_entropy, dtype, options):
    logits = draw(30, 255, dtype=dtype).requires_grad_()
    targets = without(draw_targets(30, vocabulary=255), options["exclude_id"])
    out = cross_entropy(logits, targets, reduction="none", **options)

    def pytorch(precision):
        z = logits.detach().to(precision).requires_grad_()
        loss = equation(z, targets, **options)
        return loss.detach(), *gradient(loss.sum(), z)

    (loss, grad), (exact_loss, exact_grad) = pytorch(torch.float32), pytorch(torch.float64)
    assert_error_ratio(out.loss, loss, exact_loss, UNIT[torch.float32])
    (ours,) = gradient(out.loss.sum(), logits)
    assert_error_ratio(ours, grad.to(dtype), exact_grad, UNIT[dtype])
    if options["exclude_id"] is not None:
        assert not ours[:, options["exclude_id"]].any()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "denominator"])
def test_gradcheck(cross_entropy, reduction, options):
    logits = draw(2, 3, 5, scale=1.0, dtype=torch.float64).requires_grad_()
    targets = without(draw_targets(2, 3, vocabulary=5), options["exclude_id"])
    is_masked = torch.tensor([[True, False, True], [True, True, False]])
    weights = torch.tensor([[0.5, 1.0, 2.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
    denominator = {"reduction": "mean", "denominator": 7.0}
    options = {**options, **(denominator if reduction == "denominator" else {"reduction": reduction})}

    def loss(z):
        return cross_entropy(z, targets, is_masked, weights, **options).loss

    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_label_smoothing_is_pytorchs(cross_entropy, label_smoothing):
    logits, targets = draw(9, 17, dtype=torch.float64), draw_targets(9, vocabulary=17)
    ours = cross_entropy(logits, targets, label_smoothing=label_smoothing).loss
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets, label_smoothing=label_smoothing))


def test_full_label_smoothing_of_nearly_uniform_rows(cross_entropy):
    """The gradient is p - 1/V everywhere, at the target too: no term of the size of 1 may be in its rounding."""
    vocabulary = 4097
    logits = draw(3, vocabulary, scale=0.1).requires_grad_()
    loss = cross_entropy(logits, draw_targets(3, vocabulary=vocabulary), reduction="sum", label_smoothing=1.0).loss
    (ours,) = gradient(loss, logits)
    p = logits.detach().double().softmax(-1)
    assert ((ours - (p - 1 / vocabulary)).abs() <= 2**-21 * (p + 1 / vocabulary)).all()


# The reference works on 2**19 elements at once: at V = 8192 on 64 rows.
@pytest.mark.parametrize("rows", [63, 64, 129])
@pytest.mark.slow_interpreted
def test_chunk_edges(cross_entropy, rows):
    logits, targets = draw(rows, 8192).requires_grad_(), draw_targets(rows, vocabulary=8192)
    upstream = torch.linspace(-1.0, 2.0, rows)  # tells rows apart
    out = cross_entropy(logits, targets, reduction="none", with_correct=True)
    exact = logits.detach().double().requires_grad_()
    exact_loss = F.cross_entropy(exact, targets, reduction="none")
    torch.testing.assert_close(out.loss.double(), exact_loss, rtol=1e-6, atol=0.0)
    assert torch.equal(out.correct, logits.argmax(-1) == targets)
    (ours,), (expected,) = (
        gradient(out.loss, logits, upstream=upstream),
        gradient(exact_loss, exact, upstream=upstream.double()),
    )
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-12)


# ---- the contract ----


@pytest.mark.parametrize("weights", [None, "sequence", "position"])
def test_reductions(cross_entropy, weights):
    logits, targets, is_masked, nll = small()
    if weights is not None:
        weights = torch.tensor([0.5, 3.0]) if weights == "sequence" else draw(2, 4, seed=5).abs() + 0.1
    factor = 1.0 if weights is None else weights[:, None] if weights.ndim == 1 else weights
    expected = torch.where(is_masked, nll * factor, 0.0)

    def loss(**options):
        out = cross_entropy(logits, targets, is_masked, weights, **options)
        # The nll is never weighted nor divided.
        torch.testing.assert_close(out.nll, torch.where(is_masked, nll, 0.0))
        assert not out.nll[~is_masked].any()
        return out.loss

    none = loss(reduction="none")
    torch.testing.assert_close(none, expected)
    assert not none[~is_masked].any()
    torch.testing.assert_close(loss(reduction="sum"), expected.sum())
    torch.testing.assert_close(loss(reduction="mean"), expected.sum() / 4)
    torch.testing.assert_close(loss(), expected.sum() / 4)
    for denominator in (8, 8.0, torch.tensor(8.0), torch.tensor(8), torch.tensor([8.0], dtype=torch.float64)):
        divided = loss(denominator=denominator)
        assert (divided.dtype, divided.shape) == (torch.float32, ())
        torch.testing.assert_close(divided, expected.sum() / 8)


def test_float64_weights_leave_the_loss_in_float32(cross_entropy):
    logits, targets, is_masked, _ = small()
    weights = torch.tensor([0.5, 3.0], dtype=torch.float64)
    for reduction in ("none", "sum", "mean"):
        double = cross_entropy(logits, targets, is_masked, weights, reduction=reduction)
        single = cross_entropy(logits, targets, is_masked, weights.float(), reduction=reduction)
        assert double.loss.dtype == torch.float32
        torch.testing.assert_close(double.loss, single.loss)


def test_weight_0_is_unmasked(cross_entropy):
    logits, targets, is_masked, nll = small()
    weights = torch.tensor([[2.0, 9.0, 0.0, 1.0], [5.0, -0.0, 5.0, 5.0]])
    logits[0, 2] = math.nan  # not even read
    logits.requires_grad_()
    out = cross_entropy(logits, targets, is_masked, weights, with_correct=True)
    torch.testing.assert_close(out.loss.detach(), (2 * nll[0, 0] + nll[0, 3]) / 2)
    assert out.nll.nonzero().tolist() == [[0, 0], [0, 3]]
    assert not out.correct[0, 2]
    (grad,) = gradient(out.loss, logits)
    assert grad.any(-1).nonzero().tolist() == [[0, 0], [0, 3]]


def test_negative_weight_counts(cross_entropy):
    logits, targets, is_masked, nll = small()
    out = cross_entropy(logits, targets, is_masked, torch.tensor([-2.0, 1.0]), reduction="none")
    torch.testing.assert_close(out.loss[0, 0], -2 * nll[0, 0])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("foreign", [10**9, -100, -1])
def test_targets_and_logits_of_unmasked_rows_are_never_read(cross_entropy, foreign, dtype):
    logits, targets, is_masked, _ = small()
    expected = cross_entropy(logits, targets, is_masked, with_correct=True)
    targets = targets.masked_fill(~is_masked, foreign).to(dtype)
    logits = logits.masked_fill(~is_masked[..., None], math.nan).requires_grad_()
    out = cross_entropy(logits, targets, is_masked, with_correct=True, check=True)
    for ours, theirs in zip(out, expected, strict=True):
        assert torch.equal(ours, theirs)
    (grad,) = gradient(out.loss, logits)
    assert torch.equal(grad[~is_masked], torch.zeros(4, 6))


def test_check_spares_rows_of_weight_0(cross_entropy):
    logits, targets, is_masked, _ = small()
    targets[0] = 10**9
    out = cross_entropy(logits, targets, is_masked, torch.tensor([0.0, 1.0]), check=True)
    assert torch.equal(out.loss, out.nll[1, 1])


def test_check_spares_rows_of_weight_0_without_a_mask(cross_entropy):
    logits, targets, _, _ = small()
    targets[0] = 10**9
    assert cross_entropy(logits, targets, None, torch.tensor([0.0, 1.0]), check=True).loss.isfinite()


def test_an_excluded_target_costs_infinity(cross_entropy):
    logits, targets, is_masked, _ = small()
    targets[0, 0] = 5
    targets[0, 2:], targets[1] = 1, 1
    logits.requires_grad_()
    out = cross_entropy(logits, targets, is_masked, exclude_id=5, reduction="none")
    assert out.loss[0, 0] == out.nll[0, 0] == math.inf
    assert out.loss[0, 2:].isfinite().all()
    (grad,) = gradient(out.loss, logits, upstream=torch.ones(2, 4))
    assert not grad[..., 5].any()
    assert not grad.isnan().any()
    with pytest.raises(ValueError, match=r"expected targets in \[0, 6\) other than 5, received 5 at \[0, 0\]"):
        cross_entropy(logits, targets, is_masked, exclude_id=5, check=True)


@pytest.mark.parametrize("content", [math.nan, math.inf, -math.inf, 1e30])
def test_the_excluded_column_does_not_matter(cross_entropy, content):
    options = {"exclude_id": 3, "label_smoothing": 0.2, "z_loss": 0.1, "with_correct": True}
    logits, targets = draw(7, 6), without(draw_targets(7, vocabulary=6), 3)
    others = logits[:, [0, 1, 2, 4, 5]].clone().requires_grad_()
    shifted = targets - (targets > 3).long()
    logits[:, 3] = content
    logits.requires_grad_()
    ours = cross_entropy(logits, targets, **options)
    theirs = cross_entropy(others, shifted, **{**options, "exclude_id": None})
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert torch.equal(ours.correct, theirs.correct)
    (grad,), (expected,) = gradient(ours.loss, logits), gradient(theirs.loss, others)
    assert not grad[:, 3].any()
    torch.testing.assert_close(grad[:, [0, 1, 2, 4, 5]], expected)


def test_correct_is_the_argmax_with_ties_to_the_lower_id(cross_entropy):
    logits = torch.tensor([[1.0, 4.0, 4.0, 0.0]]).expand(5, 4)
    targets = torch.tensor([1, 2, 0, 1, 1])
    is_masked = torch.tensor([True, True, True, False, True])

    def correct(**options):
        return cross_entropy(logits, targets, is_masked, **options).correct

    assert correct() is None
    assert correct(with_correct=True).tolist() == [True, False, False, False, True]
    assert correct(with_correct=True, exclude_id=1).tolist() == [False, True, False, False, False]
    assert correct(with_correct=True).dtype == torch.bool


def test_correct_of_a_row_with_nan_is_false(cross_entropy):
    logits = torch.tensor([[0.0, math.nan, 1.0]]).expand(3, 3)
    assert not cross_entropy(logits, torch.arange(3), with_correct=True).correct.any()


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_inputs_are_not_written(operation, backend, dtype, reduction):
    logits, targets, is_masked, _ = (x.to(backend.device) for x in small())
    logits, weights = logits.to(dtype), torch.tensor([0.5, 3.0], device=backend.device)
    before = [x.clone() for x in (logits, targets, is_masked, weights)]
    logits.requires_grad_()
    options = {"exclude_id": 3, "label_smoothing": 0.1, "reduction": reduction}
    loss = operation(logits, targets, is_masked, weights, **options).loss.sum()
    for upstream in (1.0, 2.0):
        torch.autograd.grad(upstream * loss, logits, retain_graph=True)
    assert all(torch.equal(x, y) for x, y in zip(before, (logits, targets, is_masked, weights), strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_float64_weights_and_denominator_keep_their_digits(cross_entropy, reduction):
    logits, targets, is_masked, _ = small()
    third = torch.full((2, 4), 1 / 3, dtype=torch.float64)
    options = {"denominator": third[0, 0]} if reduction == "mean" else {}
    out = cross_entropy(logits.double(), targets, is_masked, third, reduction=reduction, **options)
    expected = out.nll / 3 if reduction == "none" else out.nll.sum()
    torch.testing.assert_close(out.loss, expected, rtol=1e-14, atol=0)


# ---- certainty ----


@pytest.mark.parametrize("margin", [0.7, 1.0, 15.0, 16.5, 17.0, 30.0, 50.0, 80.0])
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_a_certain_row_keeps_its_relative_accuracy(cross_entropy, dtype, margin):
    """V - 1 others lie a margin below the target: nll = log1p(r), r = (V - 1) e^-margin, q = r / (1 + r)."""
    vocabulary = 9
    logits = torch.full((1, vocabulary), -margin, dtype=dtype)
    logits[0, 4] = 0.0
    margin = -logits[0, 0].item()  # as the dtype has it
    r = (vocabulary - 1) * math.exp(-margin)
    logits.requires_grad_()
    # A float16 gradient reaches 6e-8 only: give it the loss scale that training would.
    scale = 2.0 ** min(100, round(margin / math.log(2.0))) if dtype == torch.float16 else 1.0
    out = cross_entropy(logits, torch.tensor([4]), reduction="sum")
    rounding = 1e-13 if dtype == torch.float64 else 6e-7
    assert out.loss.item() == pytest.approx(math.log1p(r), rel=rounding, abs=0.0)
    assert out.nll.item() == out.loss.item()
    (grad,) = gradient(out.loss, logits, upstream=torch.tensor(scale, dtype=out.loss.dtype))
    expected = torch.full((vocabulary,), math.exp(-margin) / (1.0 + r), dtype=torch.float64)
    expected[4] = -r / (1.0 + r)
    # A 16-bit gradient is rounded once more: by at most half a unit in the last place, twice UNIT.
    relative = {torch.float64: 1e-13, torch.float32: 6e-7}.get(dtype, 2 * UNIT[dtype] + 6e-7)
    torch.testing.assert_close(grad[0].double() / scale, expected, rtol=relative, atol=0.0)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_certain_rows_with_random_others(cross_entropy, dtype):
    """Margins from 15 to 80 over random others, with every option: as accurate as the float64 closed form."""
    margins = torch.arange(15.0, 81.0)
    logits = draw(len(margins), 33, scale=1.0).to(dtype)
    targets = draw_targets(len(margins), vocabulary=33)
    logits.scatter_(-1, targets[:, None], logits.amax(-1, keepdim=True) + margins[:, None].to(dtype))
    logits.requires_grad_()
    out = cross_entropy(logits, targets, reduction="sum")
    nll, expected = closed_form(logits, targets)
    relative = 1e-12 if dtype == torch.float64 else 5e-6  # float32 rounds the gap of 80 itself to 4e-6
    torch.testing.assert_close(out.nll.double(), nll, rtol=relative, atol=0.0)
    (grad,) = gradient(out.loss, logits)
    torch.testing.assert_close(grad.double(), expected, rtol=relative, atol=0.0)


def test_a_row_that_is_certain_and_wrong(cross_entropy):
    logits = torch.tensor([[80.0, 0.0, 0.0]], requires_grad=True)
    out = cross_entropy(logits, torch.tensor([1]))
    assert out.loss.item() == 80.0
    (grad,) = gradient(out.loss, logits)
    assert grad[0, :2].tolist() == [1.0, -1.0]


@pytest.mark.parametrize("margin", [60.0, 75.0, 100.0, 1000.0])
def test_nll_of_a_row_that_is_wrong_is_its_margin_however_small_p_is(cross_entropy, margin):
    """In float32 a subnormal number, or 0; beside a row that is neither, and one that has no law."""
    logits = torch.tensor([[margin, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, math.nan, 0.0]])
    nll = cross_entropy(logits, torch.tensor([1, 1, 1])).nll
    assert nll[:2].tolist() == pytest.approx([margin, math.log(3.0)], rel=2**-22, abs=0.0)
    assert nll[2].isnan()


def test_a_certain_row_at_the_end_of_float32(cross_entropy):
    """The smallest nll, and gradient, that is a normal number."""
    logits = torch.tensor([[0.0, -87.0]], requires_grad=True)
    out = cross_entropy(logits, torch.tensor([0]))
    assert out.loss.item() == pytest.approx(math.exp(-87.0), rel=6e-7, abs=0.0)  # else 1e-12 would be allowed
    (grad,) = gradient(out.loss, logits)
    assert grad[0].tolist() == pytest.approx([-math.exp(-87.0), math.exp(-87.0)], rel=6e-7, abs=0.0)


# ---- logits that are no numbers ----


def test_minus_infinity_is_probability_0(cross_entropy):
    logits = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf, 2.0, -math.inf], [-math.inf, 0.0, 0.0]])
    logits.requires_grad_()
    out = cross_entropy(logits, torch.tensor([0, 1, 0]), reduction="none", with_correct=True)
    assert out.loss.tolist() == [pytest.approx(math.log1p(math.e), rel=1e-6), 0.0, math.inf]
    assert out.correct.tolist() == [False, True, False]
    (grad,) = gradient(out.loss, logits, upstream=torch.ones(3))
    p = 1 / (1 + math.e)
    expected = torch.tensor([[p - 1, 0.0, 1 - p], [0.0, 0.0, 0.0], [-1.0, 0.5, 0.5]])
    torch.testing.assert_close(grad, expected)


def test_smoothing_over_an_impossible_column_costs_infinity(cross_entropy):
    logits, targets = torch.tensor([[0.0, -math.inf, 1.0], [0.0, 2.0, 1.0]]), torch.tensor([0, 0])
    out = cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    assert out.loss.isinf().tolist() == [True, False]
    assert out.nll.isfinite().all()


@pytest.mark.parametrize("row", [[0.0, math.nan, 1.0], [-math.inf] * 3, [0.0, math.inf, 0.0]], ids=str)
def test_a_row_without_a_law_gives_nan_and_spares_the_others(cross_entropy, row):
    logits = torch.tensor([row, [1.0, 2.0, 3.0]])
    out = cross_entropy(logits, torch.tensor([0, 0]), reduction="none", label_smoothing=0.1)
    assert out.loss.isnan().tolist() == [True, False]
    assert out.nll.isnan().tolist() == [True, False]
    assert cross_entropy(logits, torch.tensor([0, 0])).loss.isnan()


@pytest.mark.parametrize("target", [6, 7, -1, -100, 10**9])
def test_targets_out_of_range(operation, backend, target):
    """At a masked row, which the caller is not to pass and ``check`` refuses: NaN for that row, and nothing is read
    outside it (10**9 columns on lies no memory)."""
    logits, targets, is_masked, nll = (x.to(backend.device) for x in small())
    targets[0, 2] = target
    logits[0, 2, [0, -1]] = 9.0  # an end of the row, which such a target may be taken for, is the likeliest
    logits.requires_grad_()
    out = operation(logits, targets, is_masked, reduction="none", with_correct=True)
    assert out.loss.isnan().nonzero().tolist() == out.nll.isnan().nonzero().tolist() == [[0, 2]]
    assert not out.correct[0, 2]
    (grad,) = gradient(out.loss.sum(), logits)
    assert grad.isnan().any(-1).nonzero().tolist() == [[0, 2]]
    is_masked[0, 2] = False
    torch.testing.assert_close(out.loss[is_masked], nll[is_masked])


def test_a_target_out_of_range_changes_no_other_row(operation, backend):
    logits, targets, _, _ = (x.to(backend.device) for x in small())
    logits.requires_grad_()
    given = {"reduction": "sum", "label_smoothing": 0.1, "with_correct": True}
    usual = operation(logits, targets, **given)
    (expected,) = gradient(usual.loss, logits)
    targets[0, 2] = 6
    out = operation(logits, targets, **given)
    (grad,) = gradient(out.loss, logits)
    others = torch.arange(8, device=backend.device).view(2, 4) != 2
    assert torch.equal(out.nll[others], usual.nll[others])
    assert torch.equal(out.correct[others], usual.correct[others])
    assert torch.equal(grad[others], expected[others])


# ---- shapes ----


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("shape", [(0, 4, 6), (3, 0, 6), (0, 6), (2, 4, 6)], ids=str)
def test_nothing_masked_is_loss_0_and_gradient_0(cross_entropy, shape, reduction):
    logits = torch.full(shape, math.nan, requires_grad=True)
    targets = torch.full(shape[:-1], 10**9)
    is_masked = torch.zeros(shape[:-1], dtype=torch.bool)
    out = cross_entropy(logits, targets, is_masked, reduction=reduction, with_correct=True)
    expected = torch.zeros(shape[:-1] if reduction == "none" else ())
    assert torch.equal(out.loss, expected)
    assert torch.equal(out.nll, torch.zeros(shape[:-1]))
    assert not out.correct.any()
    (grad,) = gradient(out.loss.sum(), logits)
    assert torch.equal(grad, torch.zeros(shape))


def test_no_mask_is_everything_masked(cross_entropy):
    logits, targets, _, nll = small()
    for is_masked in (None, torch.ones(2, 4, dtype=torch.bool)):
        torch.testing.assert_close(cross_entropy(logits, targets, is_masked).loss, nll.mean())


@pytest.mark.parametrize("shape", [(24,), (4, 6), (2, 3, 4)], ids=str)
def test_leading_dimensions_and_int32(cross_entropy, shape):
    logits, targets, is_masked = draw(24, 7), draw_targets(24, vocabulary=7), draw_mask(24)
    expected = cross_entropy(logits, targets, is_masked, reduction="none", with_correct=True)
    views = logits.view(*shape, 7), targets.int().view(shape), is_masked.view(shape)
    out = cross_entropy(*views, reduction="none", with_correct=True)
    for ours, flat in zip(out, expected, strict=True):
        assert torch.equal(ours, flat.view(shape))


def layouts():
    storage = draw(3, 5, 38)
    return {
        "transposed": storage[:, :, :19].transpose(0, 1),
        "sliced sequences": draw(3, 6, 19)[:, 1:],
        "every second column": storage[:, :, ::2],
        "odd offset": storage[:, :, 3:22],
        "vocabulary first": draw(19, 3, 5).permute(1, 2, 0),
        "expanded": draw(1, 1, 19).expand(3, 5, 19),
        "storage offset of one element": torch.cat([torch.zeros(1), draw(285)])[1:].view(3, 5, 19),
    }


@pytest.mark.parametrize("layout", layouts())
def test_any_strides(cross_entropy, layout):
    logits = layouts()[layout].requires_grad_()
    targets = draw_targets(*logits.shape[:2], vocabulary=19)
    is_masked = draw_mask(*logits.shape[:2])
    dense = logits.detach().contiguous().clone().requires_grad_()
    ours, expected = cross_entropy(logits, targets, is_masked), cross_entropy(dense, targets, is_masked)
    torch.testing.assert_close(ours.loss, expected.loss)
    torch.testing.assert_close(gradient(ours.loss, logits), gradient(expected.loss, dense))
    # Strided targets and masks as well.
    strided = cross_entropy(dense.mT.contiguous().mT, targets.mT.contiguous().mT, is_masked.mT.contiguous().mT)
    torch.testing.assert_close(strided.loss, expected.loss)


def test_vectors_of_any_stride(operation, backend):
    """Targets, mask, weights and what comes from above: every second element of a longer vector."""
    logits = draw(5, 7).to(backend.device).requires_grad_()
    longer = draw_targets(10, vocabulary=7), draw_mask(10), draw(10, seed=3).abs(), draw(10, seed=4)
    strided = [vector.to(backend.device)[::2] for vector in longer]
    assert not any(vector.is_contiguous() for vector in strided)
    results = []
    for *arguments, upstream in (strided, [vector.contiguous() for vector in strided]):
        loss = operation(logits, *arguments, reduction="none").loss
        results.append((loss, *gradient(loss, logits, upstream=upstream)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


# ---- softcap ----


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4])
@pytest.mark.slow_interpreted
def test_softcap_keeps_its_relative_accuracy(cross_entropy, softcap):
    """With one column L is the capped logit c t itself, so z-loss 1 shows its square and, in the gradient,
    2 c t (1 - t**2), where 1 - t**2 keeps its absolute accuracy only."""
    ratios = torch.cat([torch.logspace(-7, 1.5, 14), torch.tensor([0.95, 0.999999, 1.0, 1.000001, 1.05, 100.0])])
    logits = (softcap * torch.cat([-ratios, ratios]))[:, None].requires_grad_()
    targets = torch.zeros(len(logits), dtype=torch.int64)
    out = cross_entropy(logits, targets, reduction="none", softcap=softcap, z_loss=1.0)
    (grad,) = gradient(out.loss.sum(), logits)
    t = (logits.detach().double() / softcap).tanh()
    torch.testing.assert_close(out.loss.double()[:, None], (softcap * t).square(), rtol=1e-6, atol=0.0)
    exact = 2 * softcap * t * (1 - t.square())
    assert ((grad - exact).abs() <= 1e-6 * exact.abs() + 2 * softcap * 2**-22 * t.square()).all()
    assert (out.nll == 0).all()


@pytest.mark.parametrize("softcap", [0, 0.0, -0.0, -1.0, math.nan, math.inf])
def test_softcap_is_above_0_and_finite(cross_entropy, softcap):
    logits, targets, is_masked, _ = small()
    with pytest.raises(ValueError, match=r"expected softcap (above 0|in \[0, inf\)), received"):
        cross_entropy(logits, targets, is_masked, softcap=softcap)


@pytest.mark.parametrize("content", [math.nan, math.inf, -math.inf, 1e30])
def test_the_excluded_column_does_not_matter_under_a_softcap(cross_entropy, content):
    logits, targets = draw(7, 6), without(draw_targets(7, vocabulary=6), 3)
    expected = cross_entropy(logits.requires_grad_(), targets, exclude_id=3, softcap=5.0)
    spoiled = logits.detach().clone()
    spoiled[:, 3] = content
    ours = cross_entropy(spoiled.requires_grad_(), targets, exclude_id=3, softcap=5.0)
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(*gradient(ours.loss, spoiled), *gradient(expected.loss, logits))


@pytest.mark.parametrize("origin", [-90.0, 3000.0, 1e6, -(2.0**31), 2.0**127])
@pytest.mark.parametrize("vocabulary", [60, 700, 5000])
def test_logits_far_from_0(cross_entropy, vocabulary, origin):
    """As accurate as near 0, for the logits as float32 has rounded them: a lane's exponentials are of its own
    maximum."""
    logits = (draw(4, vocabulary) + origin).requires_grad_()
    targets = draw_targets(4, vocabulary=vocabulary)
    out = cross_entropy(logits, targets, reduction="sum")
    exact_loss, exact_grad = closed_form(logits, targets)
    z = logits.detach().clone().requires_grad_()
    loss = F.cross_entropy(z, targets, reduction="none")
    assert_error_ratio(out.nll, loss, exact_loss, UNIT[torch.float32])
    assert_error_ratio(*gradient(out.loss, logits), *gradient(loss.sum(), z), exact_grad, UNIT[torch.float32])
