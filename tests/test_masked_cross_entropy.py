"""Cross-entropy of masked rows: PyTorch's values and gradients, the contract of DESIGN 3.3, every launch plan,
and what the compilers make of the kernels."""

from __future__ import annotations

import itertools
import json
import math
import random
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from fastmask import functional

OPERATION = "masked_cross_entropy"

# DESIGN 5; float64 as float32: twice half a unit in the last place.
UNIT = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-22, torch.float64: 2**-51}


@pytest.fixture
def cross_entropy(backend):
    """The public function on one backend."""

    def run(logits, *arguments, **options):
        if backend.is_kernel and logits.dtype == torch.float64:
            pytest.skip("the kernels compute in float32: float64 logits run as PyTorch")
        return backend.run(functional.masked_cross_entropy, logits, *arguments, **options)

    return run


@pytest.fixture
def operation(backend):
    """The same, on tensors that lie on its device already: as they lie in memory matters to the test."""
    return partial(functional.masked_cross_entropy, backend="triton" if backend.is_kernel else "reference")


def draw(*shape, seed=0, scale=3.0, dtype=torch.float32) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def draw_targets(*shape, vocabulary, seed=1, dtype=torch.int64) -> torch.Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_mask(*shape, seed=2) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < 0.5


def equation(logits, targets, label_smoothing=0.0, z_loss=0.0, exclude_id=None, softcap=None) -> torch.Tensor:
    """The docstring's loss of each row [M], by autograd-friendly PyTorch in the logits' own precision."""
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    allowed = torch.arange(logits.shape[-1]) != (-1 if exclude_id is None else exclude_id)
    lse = logits[:, allowed].logsumexp(-1)
    nll = lse - logits.gather(-1, targets.long()[:, None]).squeeze(-1)
    smooth = lse - logits[:, allowed].mean(-1)
    return (1 - label_smoothing) * nll + label_smoothing * smooth + z_loss * lse.square()


def closed_form(logits, targets):
    """nll [M] and its gradient [M, V] in float64, accurate for certain rows too, as softmax minus 1 is not."""
    at_target = targets.long()[:, None]
    z = logits.detach().double()
    others = (z - z.gather(-1, at_target)).exp().scatter(-1, at_target, 0.0)
    r = others.sum(-1, keepdim=True)
    return r.log1p().squeeze(-1), (others / (1 + r)).scatter(-1, at_target, -r / (1 + r))


def gradient(loss, *leaves, upstream=None):
    return torch.autograd.grad(loss, leaves, upstream)


def assert_error_ratio(got, torchs, exact, unit, inherited=0.0):
    """Per row, the L2 error against float64 is at most 1.5 times PyTorch's own, or the dtype's rounding, or what
    the rounding of the operands leaves no choice about."""
    got, torchs, exact = (x.detach().double().view(len(exact), exact.shape[1:].numel()) for x in (got, torchs, exact))
    floor = unit * exact.norm(dim=-1) + inherited
    bound = 1.5 * torch.maximum((torchs - exact).norm(dim=-1), floor)
    error = (got - exact).norm(dim=-1)
    assert (error <= bound).all(), (error / bound).max()


# ---- values and gradients ----

# 50257 with few rows: its chunks hold 10 rows, so 12 masked ones cross a chunk's edge.
SHAPES = {1: 5, 3: 40, 255: 30, 507: 20, 50257: 12}


@pytest.mark.parametrize("vocabulary", SHAPES)
@pytest.mark.parametrize("dtype", UNIT, ids=str)
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


def without(targets, exclude_id):
    """Targets none of which is exclude_id."""
    return targets if exclude_id is None else torch.where(targets == exclude_id, exclude_id + 1, targets)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
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


def small():
    logits, targets = draw(2, 4, 6), draw_targets(2, 4, vocabulary=6)
    is_masked = torch.tensor([[True, False, True, True], [False, True, False, False]])
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 4)
    return logits, targets, is_masked, nll


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


@pytest.mark.parametrize("row", [[0.0, math.nan, 1.0], [-math.inf] * 3, [0.0, math.inf, 0.0]], ids=str)
def test_a_row_without_a_law_gives_nan_and_spares_the_others(cross_entropy, row):
    logits = torch.tensor([row, [1.0, 2.0, 3.0]])
    out = cross_entropy(logits, torch.tensor([0, 0]), reduction="none", label_smoothing=0.1)
    assert out.loss.isnan().tolist() == [True, False]
    assert out.nll.isnan().tolist() == [True, False]
    assert cross_entropy(logits, torch.tensor([0, 0])).loss.isnan()


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


# ---- the graph ----


def test_the_graph_can_be_used_twice(cross_entropy):
    logits, targets, is_masked, _ = small()
    logits.requires_grad_()
    out = cross_entropy(logits, targets, is_masked)
    (first,) = torch.autograd.grad(out.loss, logits, retain_graph=True)
    handed_out = first.clone()
    (second,) = torch.autograd.grad(out.loss, logits, torch.tensor(-3.0))
    torch.testing.assert_close(second, -3.0 * first)
    assert torch.equal(first, handed_out)  # the second backward has memory of its own
    logits.grad = None
    twice = cross_entropy(logits, targets, is_masked).loss
    (twice + 2 * twice).backward()
    torch.testing.assert_close(logits.grad, 3.0 * first)


@pytest.mark.parametrize("upstream", ["constant", "requires grad"])
def test_double_backward_raises(cross_entropy, upstream):
    """Even where the incoming gradient is a constant: a gradient penalty must not count as one silently."""
    logits, targets, is_masked, _ = small()
    logits.requires_grad_()
    out = cross_entropy(logits, targets, is_masked)
    incoming = torch.tensor(2.0, requires_grad=upstream == "requires grad")
    (grad,) = torch.autograd.grad(out.loss, logits, incoming, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|double backward"):
        (logits.square().sum() + grad.square().sum()).backward()


def test_only_the_loss_has_a_graph(cross_entropy):
    logits, targets, is_masked, _ = small()
    assert not cross_entropy(logits, targets, is_masked).loss.requires_grad
    logits.requires_grad_()
    out = cross_entropy(logits, targets, is_masked, with_correct=True)
    assert (out.loss.requires_grad, out.nll.requires_grad, out.correct.requires_grad) == (True, False, False)
    with torch.no_grad():
        assert cross_entropy(logits, targets, is_masked).loss.grad_fn is None


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed(cross_entropy, reentrant):
    logits, targets, is_masked, _ = small()
    logits.requires_grad_()
    plain = cross_entropy(2.0 * logits, targets, is_masked).loss
    (expected,) = gradient(plain, logits)
    kept = checkpoint(lambda z: cross_entropy(2.0 * z, targets, is_masked).loss, logits, use_reentrant=reentrant)
    assert torch.equal(kept, plain)
    kept.backward()
    assert torch.equal(logits.grad, expected)


def test_accumulation_with_a_denominator_is_the_full_batch(cross_entropy):
    logits, targets, is_masked = draw(6, 5, 7), draw_targets(6, 5, vocabulary=7), draw_mask(6, 5)
    weights = draw(6, seed=3).abs()
    logits.requires_grad_()
    whole = cross_entropy(logits, targets, is_masked, weights, denominator=30).loss
    (expected,) = gradient(whole, logits)
    total = 0.0
    for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
        loss = cross_entropy(logits[part], targets[part], is_masked[part], weights[part], denominator=30).loss
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close(logits.grad, expected)


def test_float16_under_a_loss_scale(cross_entropy):
    """Each gradient is about 2e-9, which float16 cannot hold; times 65536 it can."""
    logits = draw(8, 4096, scale=0.1, dtype=torch.float16).requires_grad_()
    targets = draw_targets(8, vocabulary=4096)
    loss = cross_entropy(logits, targets, denominator=1e5).loss
    (unscaled,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert (unscaled == 0).float().mean() > 0.99
    (scaled,) = torch.autograd.grad(loss * 65536.0, logits)
    exact = logits.detach().double().requires_grad_()
    (expected,) = gradient(F.cross_entropy(exact, targets, reduction="sum") / 1e5 * 65536.0, exact)
    assert_error_ratio(scaled, expected.to(torch.float16), expected, UNIT[torch.float16])


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_autocast_does_not_reach_the_loss(cross_entropy, backend, reduction):
    logits, targets, is_masked, _ = small()
    logits.requires_grad_()
    expected = cross_entropy(logits, targets, is_masked, reduction=reduction, label_smoothing=0.1, z_loss=0.1)
    with torch.autocast(backend.device.type, torch.bfloat16):
        ours = cross_entropy(logits, targets, is_masked, reduction=reduction, label_smoothing=0.1, z_loss=0.1)
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(*gradient(ours.loss.sum(), logits), *gradient(expected.loss.sum(), logits))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_float64_weights_and_denominator_keep_their_digits(cross_entropy, reduction):
    logits, targets, is_masked, _ = small()
    third = torch.full((2, 4), 1 / 3, dtype=torch.float64)
    options = {"denominator": third[0, 0]} if reduction == "mean" else {}
    out = cross_entropy(logits.double(), targets, is_masked, third, reduction=reduction, **options)
    expected = out.nll / 3 if reduction == "none" else out.nll.sum()
    torch.testing.assert_close(out.loss, expected, rtol=1e-14, atol=0)


def test_check_spares_rows_of_weight_0_without_a_mask(cross_entropy):
    logits, targets, _, _ = small()
    targets[0] = 10**9
    assert cross_entropy(logits, targets, None, torch.tensor([0.0, 1.0]), check=True).loss.isfinite()


def test_the_reference_works_on_chunks(reference):
    """Forward allocates nothing as large as the logits."""
    from torch.utils._python_dispatch import TorchDispatchMode

    large = set()

    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() > 4 * 2**19:
                large.add(out.untyped_storage().data_ptr())
            return out

    logits = draw(2048, 600).to(reference.device).requires_grad_()
    targets = draw_targets(2048, vocabulary=600).to(reference.device)
    with Large():
        functional.masked_cross_entropy(logits, targets, backend="reference")
    assert large <= {logits.untyped_storage().data_ptr()}


# ---- the error-ratio rule, over every shape and option ----


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
def test_random_cases(kernel, monkeypatch, number):
    if number % 24 == 5:  # else every large row would be split
        monkeypatch.setattr(kernel.module(OPERATION), "_FEW_ROWS", 0)
    assert_is_the_equation(partial(kernel.run, functional.masked_cross_entropy), **random_case(number))


# ---- launch plans, and where rows lie ----

# V and rows of one plan for each row of the launch table, and of the two ways to split a row.
PLANS = {
    "one warp": (1000, 5),
    "two warps": (2001, 5),
    "four programs an SM": (9001, 5),
    "two programs an SM": (17001, 5),
    "one program an SM": (66001, 5),
    "split": (13001, 5),
    "split, two tiles a piece": (25001, 101),
}
# What picks the column of the launch table, each with a reduction that takes another way to the gradient.
COLUMNS = {
    "plain": {"reduction": "sum", "inplace_grad": True},
    "special": {"reduction": "none", "exclude_id": 1, "with_correct": True},
    "dear": {"reduction": "mean", "softcap": 30.0, "label_smoothing": 0.1, "z_loss": 0.01, "with_correct": True},
}


@pytest.mark.ptx
@pytest.mark.parametrize(
    ("name", "column"),
    # The hundred rows that a second tile a piece takes are slow, and the options meet pieces under "split".
    [(name, column) for name in PLANS for column in COLUMNS if not name.endswith("a piece") or column == "dear"],
)
def test_every_launch_plan(kernel, reference, monkeypatch, name, column):
    """Targets and the excluded column in the first and last tile and in both edges of a misaligned row, and
    rivals of the same logit in other tiles."""
    module, (vocabulary, rows), options = kernel.module(OPERATION), PLANS[name], COLUMNS[column]
    if not name.startswith("split"):  # as with many rows
        monkeypatch.setattr(module, "_FEW_ROWS", 0)
    if column == "dear":
        options = {**options, "exclude_id": vocabulary - 2}
    chosen = module.Options(
        options.get("label_smoothing", 0.0), 0.0, options.get("softcap", 0.0), options.get("exclude_id", -1),
        options.get("with_correct", False),
    )  # fmt: skip
    plan = module.plan(rows, vocabulary, chosen)
    number = list(COLUMNS).index(column)
    if name.startswith("split"):
        assert plan[:2] == module._SPLIT_TILES[number]
        assert plan.num_pieces > 1
        assert (plan.tiles_per_piece > 1) == (name == "split, two tiles a piece")
    else:
        assert (*plan[:2], plan.num_pieces) == (*module._TILES[list(PLANS).index(name)][1 + number], 1)

    storage = draw(3 + rows * vocabulary, dtype=torch.bfloat16).to(kernel.device)
    logits = storage[3:].view(rows, vocabulary)
    head = -3 % 8  # columns before the body of row 0; row 4 begins 4 places further
    block = min(plan.block_v, vocabulary // 2)
    # Targets, and rivals that tie: in either edge, at either side of a tile's end, in the last tile, and none.
    targets = torch.tensor([0, vocabulary - 1, head + block - 1, vocabulary - 20, head + block])
    rivals = torch.tensor([vocabulary - 1, 0, head + block, head + block - 1, head + block])
    top = logits[:5].float().amax(-1) + torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0], device=logits.device)
    for columns in (targets, rivals):
        logits[:5].scatter_(-1, columns[:, None].to(kernel.device), top[:, None].to(logits))
    if chosen.exclude_id >= 0:
        logits[:, chosen.exclude_id] = 100.0
    is_masked = torch.arange(rows) < 5
    targets = torch.cat([targets, torch.full((rows - 5,), 10**9)])
    expected = reference.operation(OPERATION)(
        logits.cpu().clone(), targets, is_masked,
        **{"denominator": None, "label_smoothing": 0.0, "z_loss": 0.0, "softcap": None, "exclude_id": None}
        | options | {"with_correct": True, "inplace_grad": False},
    )  # fmt: skip
    out = assert_is_the_equation(
        partial(kernel.run, functional.masked_cross_entropy), logits, targets, is_masked, None, **options,
        upstream=draw(rows) if options["reduction"] == "none" else None,
    )  # fmt: skip
    assert expected.correct[:5].tolist() == [True, False, True, False, False]
    if "with_correct" in options:
        assert torch.equal(out.correct, expected.correct)


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
    launch = module._rows_kernel

    class Launch:
        def __getitem__(self, grid):
            return lambda **arguments: (promised.append(arguments["SAME_PHASE"]), launch[grid](**arguments))

    monkeypatch.setattr(module, "_rows_kernel", Launch())

    def padded(offset, stride):
        storage = torch.full((offset + 4 * stride,), math.nan, dtype=torch.bfloat16, device=kernel.device)
        return storage, storage[offset:].view(4, stride)[:, :vocabulary]

    (_, logits), (storage, grad) = (padded(*where) for where in PHASES[phase])
    logits.copy_(draw(4, vocabulary))
    targets, options = draw_targets(4, vocabulary=vocabulary), module.Options(0.0, 0.0, 0.0, -1, False)
    is_masked = torch.tensor([True, False, True, True])
    arguments = (x.to(kernel.device) for x in (targets, is_masked))
    losses, *_ = module.losses_and_gradient(logits, *arguments, None, None, options, grad)
    assert promised == [phase in ("aligned", "same phase")]
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
    options = module.Options(0.0, 0.0, 0.0, -1, False)
    assert (module.plan(2, vocabulary, options).num_pieces > 1) == (vocabulary == 8500)
    losses, *_ = module.losses_and_gradient(seen, targets.to(kernel.device), None, None, None, options, seen)
    torch.testing.assert_close(losses.cpu().double(), loss, rtol=1e-6, atol=0.0)
    assert_error_ratio(logits.cpu(), expected.bfloat16(), expected, UNIT[torch.bfloat16])


@pytest.mark.parametrize("target", [6, 7, -1, -100, 10**9])
def test_targets_out_of_range(operation, backend, target):
    """At a masked row, which the caller is not to pass and ``check`` refuses: the kernel gives NaN for that row
    and reads nothing outside it (10**9 columns on lies no memory); the reference raises."""
    logits, targets, is_masked, nll = (x.to(backend.device) for x in small())
    targets[0, 2] = target
    logits.requires_grad_()
    if not backend.is_kernel:
        if backend.device.type == "cuda":
            pytest.skip("PyTorch's assertion on the device would end the process")
        with pytest.raises((IndexError, RuntimeError), match=r"out of bounds|out of range"):
            operation(logits, targets, is_masked)
        return
    out = operation(logits, targets, is_masked, reduction="none", with_correct=True)
    assert out.loss.isnan().nonzero().tolist() == out.nll.isnan().nonzero().tolist() == [[0, 2]]
    assert not out.correct[0, 2]
    (grad,) = gradient(out.loss.sum(), logits)
    assert grad.isnan().any(-1).nonzero().tolist() == [[0, 2]]
    is_masked[0, 2] = False
    torch.testing.assert_close(out.loss[is_masked], nll[is_masked])


# ---- softcap ----


@pytest.mark.parametrize("softcap", [0.5, 30.0, 1e4])
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


# ---- whose memory the gradient takes ----


@pytest.mark.parametrize("upstream", [1.0, -3.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_inplace_grad_takes_the_logits_memory(operation, backend, dtype, reduction, upstream):
    logits, targets, is_masked, _ = (x.to(backend.device) for x in small())
    logits, usual = (logits.clone().to(dtype).requires_grad_() for _ in range(2))
    upstream = torch.tensor(upstream, device=backend.device)

    def run(z, **options):
        loss = operation(z, targets, is_masked, reduction=reduction, **options).loss
        return loss, torch.autograd.grad(loss, z, upstream.expand(loss.shape), retain_graph=True)[0]

    expected_loss, expected = run(usual)
    loss, grad = run(logits, inplace_grad=True)
    assert torch.equal(loss, expected_loss)
    assert grad.data_ptr() == logits.data_ptr() != expected.data_ptr()
    if upstream == 1.0 or reduction == "none":
        assert torch.equal(grad, expected)
    else:  # formed in forward for an upstream gradient of 1, it is rounded twice; each time by 2 UNIT at most
        torch.testing.assert_close(grad.double(), expected.double(), rtol=6 * UNIT[dtype], atol=0.0)
    with pytest.raises(RuntimeError, match=r"in-?place"):
        torch.autograd.grad(loss, logits, upstream.expand(loss.shape))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_inplace_grad_of_logits_that_are_not_contiguous(operation, backend, reduction):
    storage = draw(2, 4, 9).to(backend.device)
    before, (_, targets, is_masked, _) = storage.clone(), (x.to(backend.device) for x in small())
    logits = storage[..., :6].requires_grad_()
    loss = operation(logits, targets, is_masked, reduction=reduction, inplace_grad=True).loss.sum()
    (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(storage, before)
    (again,) = torch.autograd.grad(loss, logits)
    assert torch.equal(grad, again)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_upstream_gradient_of_1_costs_no_pass(kernel, dtype, reduction):
    """The logits are gone by backward: what was formed in forward is handed out, and any other is recomputed."""
    run = partial(functional.masked_cross_entropy, reduction=reduction, backend="triton")
    logits, targets, is_masked, _ = (x.to(kernel.device) for x in small())
    logits = logits.to(dtype).requires_grad_()
    (expected,) = gradient(run(logits, targets, is_masked).loss, logits)
    losses = [run(logits, targets, is_masked).loss for _ in range(2)]
    logits.data.fill_(math.nan)
    assert torch.equal(*gradient(losses[0], logits), expected)
    (recomputed,) = gradient(2.0 * losses[1], logits)
    assert torch.equal(recomputed.isnan().any(-1), is_masked)


# ---- as a torch operation ----


def call_arguments(device, reduction="sum", with_gradient=True, dtype=torch.float32):
    """Of ``torch.ops.fastmask.masked_cross_entropy``."""
    logits, targets, is_masked, _ = (x.to(device) for x in small())
    flat = targets.flatten(), is_masked.flatten(), torch.arange(8.0, device=device)
    options = 0.1, 0.01, 5.0, 2, True
    return (
        logits.to(dtype).requires_grad_(), flat[0] % 2, *flat[1:], torch.tensor(3.0, device=device), *options,
        reduction, with_gradient, False,
    )  # fmt: skip


@pytest.mark.parametrize(("reduction", "with_gradient"), [("none", False), ("sum", False), ("sum", True)])
def test_opcheck(kernel, reduction, with_gradient):
    kernel.module(OPERATION)
    torch.library.opcheck(
        torch.ops.fastmask.masked_cross_entropy, call_arguments(kernel.device, reduction, with_gradient)
    )


def test_opcheck_of_the_operation_in_place(kernel):
    """What it declares to write; it runs eagerly only, and has no more."""
    kernel.module(OPERATION)
    logits, *others = call_arguments(kernel.device)[:-3]
    arguments = logits.detach(), *others
    torch.library.opcheck(torch.ops.fastmask.masked_cross_entropy_, arguments, test_utils="test_schema")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_compiles_as_a_whole(kernel, dtype, reduction):
    """Once, whatever is masked; inplace_grad, which a graph cannot honour, changes nothing."""
    torch._dynamo.reset()
    logits, targets, _, _ = (x[:, :2].to(kernel.device) for x in small())
    logits = logits.to(dtype).requires_grad_()
    before = logits.detach().clone()

    def step(logits, targets, is_masked, weights):
        out = functional.masked_cross_entropy(
            1.0 * logits, targets, is_masked, weights, reduction=reduction, with_correct=True, inplace_grad=True,
            backend="triton",
        )  # fmt: skip
        return out.loss * 3.0, out.nll, out.correct

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for is_masked in ([[True, False], [True, True]], [[False, False], [False, False]]):
            is_masked = torch.tensor(is_masked, device=kernel.device)
            arguments = logits, targets, is_masked, torch.tensor([2.0, 0.5], device=kernel.device)
            ours, expected = compiled(*arguments), step(*arguments)
            for mine, eager in zip(ours, expected, strict=True):
                assert torch.equal(mine, eager)
            grads = [gradient(out[0].sum(), logits)[0] for out in (ours, expected)]
            if reduction == "none" or dtype == torch.float16:
                assert torch.equal(*grads)
            else:  # eager forms it in forward, in the logits' memory, and rounds once more for the factor of 3
                torch.testing.assert_close(*(g.double() for g in grads), rtol=6 * UNIT[dtype], atol=0.0)
    assert torch.equal(logits, before)


# ---- what the compilers make of it ----

# Rows whose stride and address 16 bytes do not divide, but for what the kernel does about it itself.
VOCABULARIES = {"one warp": 1000, "two warps": 2047, "four programs an SM": 8192, "two programs an SM": 50257,
                "one program an SM": 128257, "split": 50257}  # fmt: skip
DTYPES = {"bf16": 8, "fp32": 4}


def launch_plan(name: str, column: str, dtype: str, kernel: str = "_rows_kernel", **changes) -> dict:
    """What the launcher asks Triton for; plans that are the same program have the same name."""
    from fastmask.kernels import masked_cross_entropy as module

    is_special, is_dear, is_split = column != "plain", column == "dear", name == "split"
    options = module.Options(0.1 * is_dear, 0.01 * is_dear, 30.0 * is_dear, is_special - 1, is_special)
    plan, amd = (
        module.plan(16 if is_split else 4096, VOCABULARIES[name], options, is_amd) for is_amd in (False, True)
    )
    args = dict.fromkeys(("x_ptr", "gradient_ptr"), f"*{dtype}:16") | {"is_masked_ptr": "*i1:16"}
    args |= dict.fromkeys(("weights_ptr", "records_ptr", "losses_ptr", "nll_ptr", "denominator_ptr"), "*fp32:16")
    args |= {"targets_ptr": "*i64:16", "correct_ptr": "*i1:16" if is_special else None, "upstream_ptr": None}
    args |= dict.fromkeys(("lead_x", "lead_g", "stride_xb", "stride_xn", "stride_gb", "stride_gn", "stride_u"), "i32")
    args |= dict.fromkeys(("N", "V", "exclude_id", "tiles_per_piece"), "i32")
    args |= dict.fromkeys(("softcap", "label_smoothing", "z_loss"), "fp32")
    args |= dict.fromkeys(("HAS_MASK", "HAS_WEIGHTS", "HAS_DENOMINATOR"), True)
    args |= dict.fromkeys(("WITH_LOSSES", "WITH_GRADIENT", "SAME_PHASE"), True)
    args |= dict.fromkeys(("HAS_UPSTREAM", "HOLDS_UNIT"), False)
    args |= dict.fromkeys(("HAS_SOFTCAP", "SMOOTHS", "HAS_Z_LOSS"), is_dear)
    args |= dict.fromkeys(("HAS_EXCLUDE", "WITH_CORRECT"), is_special)
    args |= {"num_pieces": "i32", "HAS_RECORDS": is_split, "PIECE_LANES": 16 if is_split else 1}
    args |= {"VECTOR": DTYPES[dtype], "BLOCK_V": plan.block_v} | changes
    kernel_args = getattr(module, kernel).arg_names
    what = {
        "kernel": kernel,
        "options": {"num_warps": plan.num_warps},
        "args": {name: args[name] for name in kernel_args},
        "gfx942": {"options": {"num_warps": amd.num_warps}, "args": {"BLOCK_V": amd.block_v}},
    }
    return {"name": json.dumps(what), "module": "fastmask.kernels.masked_cross_entropy", **what}


PROGRAMS = {
    f"{name}, {column}, {dtype}": (name, column, dtype)
    for name, column, dtype in itertools.product(VOCABULARIES, COLUMNS, DTYPES)
}
PROGRAMS |= {f"{key}, records": (*plan, "_records_kernel") for key, plan in PROGRAMS.items() if plan[0] == "split"}
# What backward runs, with the gradient's rows at other places within 16 bytes than the logits'.
BACKWARD = {
    "HAS_UPSTREAM": True, "upstream_ptr": "*fp32:16", "HOLDS_UNIT": True, "HAS_RECORDS": True, "SAME_PHASE": False,
    "WITH_LOSSES": False, "losses_ptr": None, "nll_ptr": None, "HAS_DENOMINATOR": False, "denominator_ptr": None,
}  # fmt: skip
PROGRAMS["backward"] = ("two programs an SM", "plain", "bf16")


@pytest.fixture(scope="module")
def figures(compile_offline):
    plans = {key: launch_plan(*plan, **(BACKWARD if key == "backward" else {})) for key, plan in PROGRAMS.items()}
    compiled = compile_offline(list({plan["name"]: plan for plan in plans.values()}.values()))
    return {key: compiled[plan["name"]] for key, plan in plans.items()}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_nothing_spills(figures, program, target):
    figure = figures[program][target]
    assert (figure["stack"], figure["spills"], figure.get("scalar_spills", 0)) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_logits_move_16_bytes_at_a_time(figures, program, target):
    assert figures[program][target]["load_bits"] == 128
    if program != "backward" and not program.endswith("records"):
        assert figures[program][target]["store_bits"] == 128


# 4.3 TB/s at 4 bytes an element (bfloat16, all masked: read once, written once) are 1.075e12 elements a second; an
# H200's 132 x 4 x 32 lanes at 1.755 GHz do 29.6e12 instructions: 28 an element, 41 at half masked, twice that for
# float32. Options cost more than that, softcap several times. Counted on sm_90 with Triton 3.7.1: everything that
# lies between the ends of the two loops (reduction, gradient), over the columns a thread has in a tile. So the
# branch for the tile that holds the target, which runs once a row and is else jumped over, counts in full; what is
# run, with all that a row costs besides, is counted in test_costs.py.
MOST_INSTRUCTIONS_AN_ELEMENT = {  # measured: bfloat16, float32
    "one warp, plain": 30,  # 27.2, 26.2
    "one warp, special": 46,  # 41.8, 40.4
    "two warps, plain": 31,  # 28.0, 27.0
    "two warps, special": 47,  # 42.1, 40.8
    "four programs an SM, plain": 31,  # 28.1, 27.1
    "four programs an SM, special": 47,  # 42.6, 40.8
    "two programs an SM, plain": 31,  # 28.0, 27.2
    "two programs an SM, special": 47,  # 42.6, 40.8
    "one program an SM, plain": 35,  # 31.9, 31.0
    "one program an SM, special": 48,  # 43.3, 42.1
}
# Programs that are to share an SM's 65536 registers, and the rest as it was measured with room for a tenth.
MOST_REGISTERS = {
    "one warp, plain": 128,  # sixteen of 32 threads
    "one warp, special": 80,
    "two warps, plain": 128,  # eight of 64
    "two warps, special": 80,
    "four programs an SM, plain": 128,  # of 128
    "four programs an SM, special": 80,
    "two programs an SM, plain": 128,  # two of 256 threads
    "two programs an SM, special": 80,
    "one program an SM, plain": 64,  # one of 1024 threads
    "one program an SM, special": 64,
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("program", MOST_REGISTERS)
def test_instructions_and_registers(figures, program, dtype):
    figure, plan = figures[f"{program}, {dtype}"]["sm_90"], launch_plan(*program.split(", "), dtype)
    columns_a_thread = plan["args"]["BLOCK_V"] / (32 * plan["options"]["num_warps"])
    assert sum(figure["loops"][:2]) / columns_a_thread <= MOST_INSTRUCTIONS_AN_ELEMENT[program]
    assert figure["registers"] <= MOST_REGISTERS[program]


def test_rows_of_logits_may_overlap(cross_entropy):
    """A window that moves by one: its rows share memory, their gradients must not."""
    line = draw(40).requires_grad_()
    windows = line.as_strided((5, 9), (1, 1))
    targets = draw_targets(5, vocabulary=9)
    (ours,) = gradient(cross_entropy(windows, targets).loss, line)
    (theirs,) = gradient(F.cross_entropy(windows, targets), line)
    torch.testing.assert_close(ours, theirs)


def test_a_certain_row_at_the_end_of_float32(cross_entropy):
    """The smallest nll, and gradient, that is a normal number."""
    logits = torch.tensor([[0.0, -87.0]], requires_grad=True)
    out = cross_entropy(logits, torch.tensor([0]))
    assert out.loss.item() == pytest.approx(math.exp(-87.0), rel=6e-7, abs=0.0)  # else 1e-12 would be allowed
    (grad,) = gradient(out.loss, logits)
    assert grad[0].tolist() == pytest.approx([-math.exp(-87.0), math.exp(-87.0)], rel=6e-7, abs=0.0)


@pytest.mark.parametrize("content", [math.nan, math.inf, -math.inf, 1e30])
def test_the_excluded_column_does_not_matter_under_a_softcap(cross_entropy, content):
    logits, targets = draw(7, 6), without(draw_targets(7, vocabulary=6), 3)
    expected = cross_entropy(logits.requires_grad_(), targets, exclude_id=3, softcap=5.0)
    spoiled = logits.detach().clone()
    spoiled[:, 3] = content
    ours = cross_entropy(spoiled.requires_grad_(), targets, exclude_id=3, softcap=5.0)
    assert torch.equal(ours.loss, expected.loss)
    assert torch.equal(*gradient(ours.loss, spoiled), *gradient(expected.loss, logits))


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


def test_inplace_grad_with_every_option(operation, backend):
    logits, targets, is_masked, _ = (x.to(backend.device) for x in small())
    weights = torch.tensor([0.5, 3.0], device=backend.device)
    options = {"label_smoothing": 0.1, "z_loss": 0.03, "softcap": 2.0, "exclude_id": 2, "with_correct": True}
    results = []
    for inplace_grad in (False, True):
        z = logits.clone().requires_grad_()
        out = operation(
            z, without(targets, 2), is_masked, weights, denominator=7.0, inplace_grad=inplace_grad, **options
        )
        results.append((*out, *gradient(out.loss, z)))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_double_backward_of_a_gradient_in_place_raises(operation, backend):
    logits, targets, is_masked, _ = (x.to(backend.device) for x in small())
    logits.requires_grad_()
    loss = operation(1.0 * logits, targets, is_masked, inplace_grad=True).loss
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|double backward"):
        (logits.square().sum() + grad.square().sum()).backward()


def test_smoothing_over_an_impossible_column_costs_infinity(cross_entropy):
    logits, targets = torch.tensor([[0.0, -math.inf, 1.0], [0.0, 2.0, 1.0]]), torch.tensor([0, 0])
    out = cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    assert out.loss.isinf().tolist() == [True, False]
    assert out.nll.isfinite().all()
