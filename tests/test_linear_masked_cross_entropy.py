"""Head and cross-entropy in one: the dense loss on F.linear's logits, without those logits."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from linear_losses import assert_error_ratio, copies, dense, draw_case, on
from losses import UNIT, without
from oracles import draw

from fastmask import functional

OPERATION = "linear_masked_cross_entropy"


@pytest.fixture
def linear_cross_entropy(backend):
    """The public function on one backend."""
    return on(backend)


@pytest.fixture
def small_chunks(backend, monkeypatch):
    """Sets how many masked rows a chunk holds: few, where rows cost 10 ms each in the interpreter."""
    return partial(monkeypatch.setattr, backend.module(OPERATION), "CHUNK_ROWS")


class Case(NamedTuple):
    """Arguments of one call, and what comes from above: [...] for reduction none, else its first element."""

    leaves: tuple[torch.Tensor, ...]  # embeddings, weight and perhaps bias
    targets: torch.Tensor
    is_masked: torch.Tensor
    weights: torch.Tensor | None
    upstream: torch.Tensor
    reduction: str
    denominator: float | None
    options: dict[str, Any]


def equation(logits, targets, *, label_smoothing=0.0, z_loss=0.0, softcap=None, exclude_id=None):
    """The docstring's loss and nll of each row, by autograd-friendly PyTorch in the logits' own precision."""
    z = logits if softcap is None else softcap * (logits / softcap).tanh()
    allowed = torch.arange(z.shape[-1]) != (-1 if exclude_id is None else exclude_id)
    lse = z[:, allowed].logsumexp(-1)
    nll = lse - z.gather(-1, targets[:, None]).squeeze(-1)
    smooth = lse - z[:, allowed].mean(-1)
    return (1 - label_smoothing) * nll + label_smoothing * smooth + z_loss * lse.square(), nll


def pytorch(case: Case, precision: torch.dtype, rounded: Callable = lambda x: x) -> list[torch.Tensor]:
    """What PyTorch computes of the masked rows: loss [1, ...], nll [M], gradients [M, D], [1, V, D], [1, V].

    ``rounded`` is applied to the logits, to their gradient and twice to the gradients that come of it: backward
    multiplies what forward formed, and a chunk's product may be rounded before it is added.
    """
    wide = torch.promote_types(precision, torch.float32)
    x, w, *b = leaves = copies(case.leaves, precision)
    logits = F.linear(x[case.is_masked], w, *b)
    logits.register_hook(rounded)
    losses, nll = equation(rounded(logits).to(wide), case.targets[case.is_masked], **case.options)
    losses = losses if case.weights is None else losses * case.weights[case.is_masked]
    if case.reduction == "mean":
        losses = losses / (case.denominator or max(1, len(losses)))
    upstream = case.upstream[case.is_masked] if case.reduction == "none" else case.upstream.flatten()[0]
    gradients = torch.autograd.grad((upstream * losses).sum(), leaves)
    grad_x, *grads = (rounded(rounded(gradient)) for gradient in gradients)
    losses = losses if case.reduction == "none" else losses.sum()
    return [losses.reshape(1, -1), nll, grad_x[case.is_masked], *(grad[None] for grad in grads)]


def rounding(unit: float, seed: int) -> Callable:
    """Errors like those of rounding to a dtype, at random: a UNIT is half of the largest."""
    generator = torch.Generator().manual_seed(seed)
    return lambda x: x + 2 * unit * x * (2 * torch.rand(x.shape, generator=generator, dtype=x.dtype) - 1)


def assert_as_near_as_pytorch(run, case: Case, **options) -> None:
    """Loss, nll and gradients by the error-ratio rule, against PyTorch's own in the dtype; 0 where unmasked.

    Where a row has one number, or one direction that matters, PyTorch's error is a single draw and may be lucky:
    float64 with random rounding errors in the same places is drawn eight times more.
    """
    dtype = case.leaves[0].dtype
    x, w, *b = leaves = copies(case.leaves)
    bias = b[0] if b else None
    options = {**case.options, **options, "reduction": case.reduction, "denominator": case.denominator}
    out = run(x, w, case.targets, case.is_masked, case.weights, bias=bias, **options)
    upstream = case.upstream if case.reduction == "none" else case.upstream.flatten()[0]
    grad_x, *grads = torch.autograd.grad(out.loss, leaves, upstream)
    for by_row in (out.nll, grad_x, *[out.loss][: case.reduction == "none"]):
        assert not by_row[~case.is_masked].any()
    assert out.loss.dtype == out.nll.dtype == torch.float32
    assert [grad.dtype for grad in (grad_x, *grads)] == [dtype] * len(leaves)

    loss = out.loss[case.is_masked] if case.reduction == "none" else out.loss
    ours = [loss.reshape(1, -1), out.nll[case.is_masked], grad_x[case.is_masked], *(grad[None] for grad in grads)]
    exact = pytorch(case, torch.float64)
    theirs = pytorch(case, dtype)
    draws = [pytorch(case, torch.float64, rounding(UNIT[dtype], seed)) for seed in range(8)]
    for got, torchs, reference, *drawn in zip(ours, theirs, exact, *draws, strict=True):
        unit = UNIT[torch.float32 if got is ours[0] else dtype]
        errors = torch.stack([(value - reference).detach()[..., None].flatten(1).norm(dim=-1) for value in drawn])
        assert_error_ratio(got, torchs, reference, unit, floor=errors.amax(0) / unit)


# ---- values and gradients ----


@pytest.mark.parametrize(
    ("dtype", "vocabulary"), [*itertools.product(UNIT, [1, 3, 255, 507]), (torch.bfloat16, 50257)], ids=str
)
@pytest.mark.slow_interpreted
def test_is_pytorchs_head_and_cross_entropy(linear_cross_entropy, dtype, vocabulary):
    """16-bit products are measured against PyTorch's own in that dtype: both round logits and gradient."""
    leaves, targets, is_masked = draw_case(2, 10 if vocabulary > 1000 else 40, vocabulary=vocabulary, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)

    def pytorch(precision, wide):
        x, w, b = copies(leaves, precision)
        loss = F.cross_entropy(F.linear(x[is_masked], w, b).to(wide), targets[is_masked], reduction="none")
        return loss.detach(), *torch.autograd.grad(loss.sum(), (x, w, b))

    x, w, b = leaves
    out = linear_cross_entropy(x, w, targets, is_masked, bias=b, reduction="sum")
    assert out.loss.dtype == out.nll.dtype == wide
    nll, *grads = pytorch(dtype, wide)
    exact_nll, *exact_grads = pytorch(torch.float64, torch.float64)
    if dtype == torch.float64:
        torch.testing.assert_close(out.nll[is_masked], exact_nll)
        torch.testing.assert_close(torch.autograd.grad(out.loss, leaves), tuple(exact_grads))
        return
    # A logit of size |z| is rounded before the loss sees it, which moves nll by q times that.
    x, w, b = copies(leaves, torch.float64)
    margin = F.linear(x[is_masked], w, b).detach().abs().amax(-1)
    assert_error_ratio(out.nll[is_masked], nll, exact_nll, UNIT[wide], floor=-(-exact_nll).expm1() * margin)
    assert_error_ratio(out.loss[None], nll.sum()[None], exact_nll.sum()[None], UNIT[wide])
    ours = torch.autograd.grad(out.loss, leaves)
    assert [g.dtype for g in ours] == [dtype] * 3
    assert not ours[0][~is_masked].any()
    for got, torchs, exact in zip(ours, grads, exact_grads, strict=True):
        if got.ndim == 3:
            assert_error_ratio(got[is_masked], torchs[is_masked], exact[is_masked], UNIT[dtype])
            continue
        # A row of the weight's gradient sums a few rounded numbers: of 50257 such rows some fall unluckily, in
        # either of the two. So the whole counts, and the unluckiest row against PyTorch's unluckiest.
        assert_error_ratio(got[None], torchs[None], exact[None], UNIT[dtype])
        if got.ndim == 2:
            ours_worst, pytorchs_worst = (
                ((g.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).nan_to_num().max() for g in (got, torchs)
            )
            assert ours_worst <= 1.5 * max(pytorchs_worst, UNIT[dtype])


OPTIONS = [
    {"label_smoothing": e, "z_loss": z, "exclude_id": x}
    for e, z, x in itertools.product([0.0, 0.1], [0.0, 0.03], [None, 2])
]

REDUCTIONS = {
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "mean": {"reduction": "mean"},
    "number": {"denominator": 7.0},
    "tensor": {"denominator": torch.tensor([7.0], dtype=torch.float64)},
}


@pytest.mark.parametrize("weighting", [None, "sequence", "position"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_is_the_dense_loss(linear_cross_entropy, with_bias, reduction, weighting):
    """Everything the dense loss promises holds here too: the same loss, nll, correct and gradients."""
    leaves, targets, is_masked = draw_case(4, 9, dtype=torch.float64)
    weights = {None: None, "sequence": torch.tensor([1.0, 0.0, 2.5, -1.0]), "position": draw(4, 9, seed=7)}[weighting]
    upstream = draw(4, 9, seed=8, dtype=torch.float64) if reduction == "none" else torch.tensor(-1.7).double()
    for options in OPTIONS:
        options = {**options, **REDUCTIONS[reduction], "with_correct": True}
        y = without(targets, options["exclude_id"])
        results = []
        for run in (linear_cross_entropy, dense):
            x, w, b = copies(leaves)
            used = (x, w, b)[: 3 if with_bias else 2]
            out = run(x, w, y, is_masked, weights, bias=b if with_bias else None, **options)
            results.append((*out, *torch.autograd.grad(out.loss, used, upstream)))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "number"])
def test_gradcheck(linear_cross_entropy, reduction, options):
    leaves, targets, _ = draw_case(2, 3, width=2, vocabulary=4, dtype=torch.float64)
    is_masked = torch.tensor([[True, False, True], [True, True, False]])
    weights = torch.tensor([[0.5, 1.0, 2.0], [0.0, 3.0, 1.0]], dtype=torch.float64)
    y = without(targets, options["exclude_id"])

    def loss(x, w, b):
        return linear_cross_entropy(x, w, y, is_masked, weights, bias=b, **options, **REDUCTIONS[reduction]).loss

    assert torch.autograd.gradcheck(loss, leaves)


# Chunks hold 1024 masked rows; at V = 600 the losses work on 873 of them at once.
@pytest.mark.parametrize("rows", [1, 873, 874, 1023, 1024, 1025, 2048, 2049])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_chunk_edges_of_the_reference(reference, rows, reduction):
    leaves, targets, _ = draw_case(rows, width=3, vocabulary=600, dtype=torch.float64)
    weights = torch.linspace(0.5, 2.0, rows)  # tells rows apart
    results = []
    for run in (partial(reference.run, functional.linear_masked_cross_entropy), dense):
        x, w, b = copies(leaves)
        out = run(x, w, targets, None, weights, bias=b, reduction=reduction, with_correct=True)
        results.append((*out, *torch.autograd.grad(out.loss.sum(), (x, w, b))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 9, 13])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_chunk_edges(linear_cross_entropy, small_chunks, rows, reduction):
    """Every second row is masked, and the bound given exceeds them by 0 to 3: the last chunk's own edge."""
    small_chunks(4)
    leaves, targets, _ = draw_case(2 * rows, width=3, vocabulary=20)
    is_masked = torch.arange(2 * rows) % 2 == 0
    case = Case(
        leaves, targets, is_masked, torch.linspace(0.5, 2.0, 2 * rows), draw(2 * rows, seed=8), reduction, None, {}
    )
    for num_masked in (None, rows, rows + 1, rows + 3):
        assert_as_near_as_pytorch(linear_cross_entropy, case, num_masked=num_masked, with_correct=True)


@pytest.mark.parametrize("margin", [15.0, 17.0, 30.0, 50.0, 80.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_certain_row_keeps_its_relative_accuracy(linear_cross_entropy, reduction, dtype, margin):
    """The others lie a margin below the target: nll = log1p(r), r = (V - 1) e^-margin; x = 1, so dw = dz."""
    vocabulary = 9
    weight = torch.full((vocabulary, 1), -margin, dtype=dtype)
    weight[4] = 0.0
    weight.requires_grad_()
    out = linear_cross_entropy(torch.ones(1, 1, dtype=dtype), weight, torch.tensor([4]), reduction=reduction)
    r = (vocabulary - 1) * math.exp(-margin)
    rounding = 1e-13 if dtype == torch.float64 else 6e-7
    assert out.loss.item() == pytest.approx(math.log1p(r), rel=rounding, abs=0.0)
    (grad,) = torch.autograd.grad(out.loss.sum(), weight)
    expected = torch.full((vocabulary, 1), math.exp(-margin) / (1 + r), dtype=torch.float64)
    expected[4] = -r / (1 + r)
    torch.testing.assert_close(grad.double(), expected, rtol=rounding, atol=0.0)


def test_16_bit_weight_gradients_accumulate_in_float32(linear_cross_entropy, small_chunks):
    """Over 64 chunks of like gradients: PyTorch's one product, rounded once, is the measure."""
    small_chunks(2)
    leaves, targets, _ = draw_case(64 * 2, width=8, vocabulary=5, dtype=torch.bfloat16)
    with torch.no_grad():
        leaves[0].add_(2.0)  # the gradients of all chunks add up
    x, w, b = leaves
    out = linear_cross_entropy(x, w, targets, bias=b, reduction="sum")
    _, *ours = torch.autograd.grad(out.loss, leaves)

    def pytorch(dtype, wide):
        x, w, b = copies(leaves, dtype)
        loss = F.cross_entropy(F.linear(x, w, b).to(wide), targets, reduction="sum")
        return torch.autograd.grad(loss, (w, b))

    theirs = pytorch(torch.bfloat16, torch.float32)
    exact = pytorch(torch.float64, torch.float64)
    for got, torchs, reference in zip(ours, theirs, exact, strict=True):
        assert_error_ratio(got[None], torchs[None], reference[None], UNIT[torch.bfloat16])


def draw_any_case(seed: int, dtype: torch.dtype) -> Case:
    """A random shape, mask ratio, weighting, reduction and set of options."""
    rng = random.Random(seed)
    rows = rng.choice([(1,), (5,), (2, 2), (3, 1), (1, 2, 2)])
    vocabulary, width = rng.choice([2, 3, 17, 64, 255]), rng.choice([4, 16, 64])
    ratio = rng.choice([0.0, 1.0, rng.random(), rng.random()])
    leaves, targets, is_masked = draw_case(
        *rows, width=width, vocabulary=vocabulary, dtype=dtype, masked=ratio, seed=seed
    )
    weights = None
    if rng.random() < 0.7:
        weights = 10 ** (6 * torch.rand(rows, generator=torch.Generator().manual_seed(seed)) - 3)
    reduction = rng.choice(["none", "sum", "mean"])
    exclude_id = rng.choice([None, rng.randrange(vocabulary - 1)])
    return Case(
        leaves[: rng.choice([2, 3])],
        without(targets, exclude_id),
        is_masked,
        weights,
        draw(*rows, seed=seed, scale=rng.choice([0.01, 1.0, 10.0])),
        reduction,
        rng.choice([None, 7.3]) if reduction == "mean" else None,
        {
            "label_smoothing": rng.choice([0.0, 0.1]),
            "z_loss": rng.choice([0.0, 0.03]),
            "softcap": rng.choice([None, 5.0]),
            "exclude_id": exclude_id,
        },
    )


# 3 dtypes x 6 blocks x 12 calls: 216 in all.
@pytest.mark.parametrize("block", range(6))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.slow_interpreted
def test_any_call_is_as_near_to_float64_as_pytorch(kernel, monkeypatch, dtype, block):
    monkeypatch.setattr(kernel.module(OPERATION), "CHUNK_ROWS", 2)
    run = partial(kernel.run, functional.linear_masked_cross_entropy)
    for seed in range(12 * block, 12 * (block + 1)):
        case = draw_any_case(seed, dtype)
        num_masked = random.Random(seed).choice([None, int(case.is_masked.sum()), case.is_masked.numel()])
        assert_as_near_as_pytorch(run, case, num_masked=num_masked)


# ---- the contract ----


@pytest.mark.parametrize("num_masked", [None, 10])
@pytest.mark.parametrize("foreign", [10**9, -100])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_unmasked_rows_are_never_read(linear_cross_entropy, reduction, foreign, num_masked):
    (x, w, b), targets, is_masked = draw_case(2, 8)
    is_masked[0, 0] = False  # whatever stands in for rows that a bound leaves empty
    assert is_masked.sum() < 10
    options = {"reduction": reduction, "num_masked": num_masked}
    expected = linear_cross_entropy(x, w, targets, is_masked, bias=b, **options)
    clean = torch.autograd.grad(expected.loss.sum(), (x, w, b))
    spoiled = x.detach().masked_fill(~is_masked[..., None], math.nan).requires_grad_()
    targets = targets.masked_fill(~is_masked, foreign).int()
    out = linear_cross_entropy(spoiled, w, targets, is_masked, bias=b, check=True, **options)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.nll, expected.nll)
    grads = torch.autograd.grad(out.loss.sum(), (spoiled, w, b))
    assert all(torch.equal(*pair) for pair in zip(grads, clean, strict=True))
    assert not grads[0][~is_masked].any()


def test_check_spares_rows_of_weight_0(linear_cross_entropy):
    (x, w, _), targets, is_masked = draw_case(2, 8)
    targets[0] = 10**9
    out = linear_cross_entropy(x, w, targets, is_masked, torch.tensor([0.0, 1.0]), check=True)
    assert out.loss.isfinite()


def test_check_spares_rows_of_weight_0_without_a_mask(linear_cross_entropy):
    (x, w, _), targets, _ = draw_case(2, 8)
    targets[0] = 10**9
    assert linear_cross_entropy(x, w, targets, None, torch.tensor([0.0, 1.0]), check=True).loss.isfinite()


def test_an_excluded_target_costs_infinity_and_is_refused_under_check(linear_cross_entropy):
    (x, w, _), targets, _ = draw_case(1, 3)
    targets[0] = torch.tensor([5, 1, 2])
    out = linear_cross_entropy(x, w, targets, exclude_id=5, reduction="none")
    assert out.loss[0].isinf().tolist() == [True, False, False]
    with pytest.raises(ValueError, match="other than 5, received 5 at"):
        linear_cross_entropy(x, w, targets, exclude_id=5, check=True)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("rows", [(0, 4), (3, 0), (0,), (2, 4)], ids=str)
def test_nothing_masked_is_loss_0_and_gradient_0(linear_cross_entropy, rows, reduction):
    leaves, targets, _ = draw_case(*rows)
    with torch.no_grad():
        leaves[0].fill_(math.nan)
    x, w, b = leaves
    is_masked = torch.zeros(rows, dtype=torch.bool)
    out = linear_cross_entropy(x, w, targets, is_masked, bias=b, reduction=reduction, with_correct=True)
    assert torch.equal(out.loss, torch.zeros(rows if reduction == "none" else ()))
    assert torch.equal(out.nll, torch.zeros(rows))
    assert not out.correct.any()
    for grad, leaf in zip(torch.autograd.grad(out.loss.sum(), leaves), leaves, strict=True):
        assert torch.equal(grad, torch.zeros(leaf.shape))


def test_nan_in_a_masked_row_gives_nan(linear_cross_entropy):
    (x, w, b), targets, _ = draw_case(1, 3)
    with torch.no_grad():
        x[0, 1] = math.nan
    out = linear_cross_entropy(x, w, targets, bias=b, reduction="none")
    assert out.loss[0].isnan().tolist() == [False, True, False]


def test_strided_embeddings_weight_and_bias(linear_cross_entropy):
    (x, w, b), targets, is_masked = draw_case(3, 8)
    expected = linear_cross_entropy(x, w, targets, is_masked, bias=b)
    expected_grads = torch.autograd.grad(expected.loss, (x, w, b))
    strided = [
        x.detach().permute(2, 1, 0).contiguous().permute(2, 1, 0),
        w.detach().mT.contiguous().mT,
        torch.stack([b.detach(), b.detach()], -1)[:, 0],
    ]
    x, w, b = (value.requires_grad_() for value in strided)
    assert not any(value.is_contiguous() for value in strided)
    out = linear_cross_entropy(x, w, targets, is_masked, bias=b)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(torch.autograd.grad(out.loss, (x, w, b)), expected_grads)


def test_inputs_are_not_written(linear_cross_entropy):
    leaves, targets, is_masked = draw_case(3, 8)
    before = [value.detach().clone() for value in (*leaves, targets, is_masked)]
    x, w, b = leaves
    torch.autograd.grad(linear_cross_entropy(x, w, targets, is_masked, bias=b).loss, leaves)
    assert all(torch.equal(old, new) for old, new in zip(before, (*leaves, targets, is_masked), strict=True))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_float64_weights_and_denominator_keep_their_digits(linear_cross_entropy, reduction):
    (x, w, b), targets, is_masked = draw_case(2, 5, dtype=torch.float64)
    third = torch.full((2, 5), 1 / 3, dtype=torch.float64)
    out = linear_cross_entropy(x, w, targets, is_masked, third, bias=b, reduction=reduction, **(
        {"denominator": third[0, 0]} if reduction == "mean" else {}))  # fmt: skip
    expected = out.nll / 3 if reduction == "none" else out.nll.sum()
    torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-14, atol=0)
