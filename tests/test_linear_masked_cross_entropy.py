"""Head and cross-entropy in one: the dense loss on F.linear's logits, without those logits."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from fastmask import functional
from fastmask.functional import CrossEntropy
from fastmask.reference import linear_masked_cross_entropy as reference_module

OPERATION = "linear_masked_cross_entropy"

# DESIGN 5; float64 as float32: twice half a unit in the last place.
UNIT = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-22, torch.float64: 2**-51}


@pytest.fixture
def linear_cross_entropy(backend):
    """The public function on one backend."""

    def run(embeddings, *arguments, **options):
        if backend.is_kernel and embeddings.dtype == torch.float64:
            pytest.skip("the kernels compute in float32: float64 runs as PyTorch")
        return backend.run(functional.linear_masked_cross_entropy, embeddings, *arguments, **options)

    return run


def dense(embeddings, weight, *rest, bias=None, **options) -> CrossEntropy:
    """What the operation is: the dense loss of the head's logits."""
    return functional.masked_cross_entropy(F.linear(embeddings, weight, bias), *rest, backend="reference", **options)


def draw(*shape, seed=0, scale=1.0, dtype=torch.float32) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def draw_case(*rows, width=16, vocabulary=11, dtype=torch.float32, masked=0.6):
    """Leaves (embeddings, weight, bias) whose logits have deviation 3, targets and a mask."""
    embeddings = draw(*rows, width, dtype=dtype).requires_grad_()
    weight = draw(vocabulary, width, seed=1, scale=3 / math.sqrt(width), dtype=dtype).requires_grad_()
    bias = draw(vocabulary, seed=2, dtype=dtype).requires_grad_()
    generator = torch.Generator().manual_seed(3)
    targets = torch.randint(vocabulary, rows, generator=generator)
    return (embeddings, weight, bias), targets, torch.rand(*rows, generator=generator) < masked


def copies(leaves, dtype=None):
    return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in leaves]


def without(targets, exclude_id):
    """Targets none of which is exclude_id."""
    return targets if exclude_id is None else torch.where(targets == exclude_id, exclude_id + 1, targets)


def assert_error_ratio(got, torchs, exact, unit, floor=0.0):
    """Per row, the L2 error against float64 is at most 1.5 times PyTorch's own, or the dtype's rounding of the
    row's norm (or of ``floor``, where that is more)."""
    got, torchs, exact = (x.detach().double().reshape(len(exact), -1) for x in (got, torchs, exact))
    rounding = unit * torch.maximum(exact.norm(dim=-1), torch.as_tensor(floor, dtype=torch.float64))
    bound = 1.5 * torch.maximum((torchs - exact).norm(dim=-1), rounding)
    error = (got - exact).norm(dim=-1)
    assert (error <= bound).all(), (error / bound).max()


class Recorder(TorchDispatchMode):
    """The matrix products that run, and the largest tensor that any operation returns, in elements."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm)
        for value in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.untyped_storage().nbytes() // max(1, value.element_size()))
        return out


# ---- values and gradients ----


@pytest.mark.parametrize("vocabulary", [1, 3, 255, 507, 50257])
@pytest.mark.parametrize("dtype", UNIT, ids=str)
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
def test_chunk_edges(linear_cross_entropy, rows, reduction):
    leaves, targets, _ = draw_case(rows, width=3, vocabulary=600, dtype=torch.float64)
    weights = torch.linspace(0.5, 2.0, rows)  # tells rows apart
    results = []
    for run in (linear_cross_entropy, dense):
        x, w, b = copies(leaves)
        out = run(x, w, targets, None, weights, bias=b, reduction=reduction, with_correct=True)
        results.append((*out, *torch.autograd.grad(out.loss.sum(), (x, w, b))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


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
    assert out.loss.item() == pytest.approx(math.log1p(r), rel=rounding)
    (grad,) = torch.autograd.grad(out.loss.sum(), weight)
    expected = torch.full((vocabulary, 1), math.exp(-margin) / (1 + r), dtype=torch.float64)
    expected[4] = -r / (1 + r)
    torch.testing.assert_close(grad.double(), expected, rtol=rounding, atol=0.0)


def test_16_bit_weight_gradients_accumulate_in_float32(linear_cross_entropy):
    """Over 12 chunks of like gradients: PyTorch's one product, rounded once, is the measure."""
    leaves, targets, _ = draw_case(12 * 1024, width=8, vocabulary=5, dtype=torch.bfloat16)
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


# ---- the contract ----


@pytest.mark.parametrize("foreign", [10**9, -100])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_unmasked_rows_are_never_read(linear_cross_entropy, reduction, foreign):
    (x, w, b), targets, is_masked = draw_case(3, 8)
    expected = linear_cross_entropy(x, w, targets, is_masked, bias=b, reduction=reduction)
    (clean,) = torch.autograd.grad(expected.loss.sum(), x)
    spoiled = x.detach().masked_fill(~is_masked[..., None], math.nan).requires_grad_()
    targets = targets.masked_fill(~is_masked, foreign).int()
    out = linear_cross_entropy(spoiled, w, targets, is_masked, bias=b, reduction=reduction, check=True)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(out.nll, expected.nll)
    (grad,) = torch.autograd.grad(out.loss.sum(), spoiled)
    assert torch.equal(grad, clean)
    assert not grad[~is_masked].any()


def test_check_spares_rows_of_weight_0(linear_cross_entropy):
    (x, w, _), targets, is_masked = draw_case(2, 8)
    targets[0] = 10**9
    out = linear_cross_entropy(x, w, targets, is_masked, torch.tensor([0.0, 1.0]), check=True)
    assert out.loss.isfinite()


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


# ---- what is computed, and what is not ----


def run_recorded(device, *, rows, reduction, needs, grad=True, dtype=torch.float32, vocabulary=600, width=2):
    """Forward and backward of the reference on the device, under the recorder."""
    leaves, targets, _ = draw_case(rows, width=width, vocabulary=vocabulary, dtype=dtype)
    x, w, b = (value.detach().to(device).requires_grad_(need) for value, need in zip(leaves, needs, strict=True))
    recorder = Recorder()
    with recorder, torch.set_grad_enabled(grad):
        out = functional.linear_masked_cross_entropy(
            x, w, targets.to(device), bias=b, reduction=reduction, backend="reference"
        )
        if out.loss.requires_grad:
            out.loss.sum().backward()
    return recorder, (x, w, b)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_only_wanted_gradients_are_formed(reference, needs, reduction):
    """One product for the logits of each of two chunks, again where backward recomputes them, one each for
    the gradients of embeddings and weight."""
    recorder, leaves = run_recorded(reference.device, rows=2048, reduction=reduction, needs=needs)
    assert [leaf.grad is not None for leaf in leaves] == list(needs)
    recomputed = reduction == "none" and any(needs)
    assert recorder.products == 2 * (1 + recomputed + needs[0] + needs[1])


def test_no_grad_forms_no_gradient_and_no_graph(reference):
    recorder, _ = run_recorded(reference.device, rows=2048, reduction="mean", needs=(True,) * 3, grad=False)
    assert recorder.products == 2


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logits_of_all_rows_never_exist(reference, dtype, reduction):
    rows, vocabulary = 8 * 1024, 600
    recorder, _ = run_recorded(reference.device, rows=rows, reduction=reduction, needs=(True,) * 3, dtype=dtype)
    assert recorder.largest == reference_module.CHUNK_ROWS * vocabulary
    assert recorder.largest * 8 == rows * vocabulary


def test_unmasked_rows_never_reach_the_head(reference):
    (x, w, _), targets, _ = draw_case(4, 512, width=2, vocabulary=600)
    is_masked = torch.zeros(4, 512, dtype=torch.bool)
    is_masked[1, 3:13] = True
    arguments = [value.to(reference.device) for value in (x, w, targets, is_masked)]
    recorder = Recorder()
    with recorder:
        functional.linear_masked_cross_entropy(*arguments, backend="reference")
    assert recorder.largest <= 10 * 600


# ---- the graph ----


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_graph_can_be_used_twice(linear_cross_entropy, reduction):
    leaves, targets, is_masked = draw_case(3, 8)
    x, w, b = leaves
    loss = linear_cross_entropy(x, w, targets, is_masked, bias=b, reduction=reduction).loss
    first = [g.clone() for g in torch.autograd.grad(loss, leaves, torch.ones_like(loss), retain_graph=True)]
    second = torch.autograd.grad(loss, leaves, torch.full_like(loss, -3.0))
    for once, tripled in zip(first, second, strict=True):
        torch.testing.assert_close(tripled, -3.0 * once)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(linear_cross_entropy, reduction):
    (x, w, _), targets, is_masked = draw_case(3, 8)
    loss = linear_cross_entropy(x, w, targets, is_masked, reduction=reduction).loss.sum()
    (grad,) = torch.autograd.grad(loss, w, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|double backward"):
        (x.square().sum() + grad.square().sum()).backward()


def test_only_the_loss_has_a_graph(linear_cross_entropy):
    (x, w, _), targets, is_masked = draw_case(3, 8)
    out = linear_cross_entropy(x, w, targets, is_masked, with_correct=True)
    assert (out.loss.requires_grad, out.nll.requires_grad, out.correct.requires_grad) == (True, False, False)
    with torch.no_grad():
        assert linear_cross_entropy(x, w, targets, is_masked).loss.grad_fn is None
    assert not linear_cross_entropy(x.detach(), w.detach(), targets, is_masked).loss.requires_grad


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_checkpointed(linear_cross_entropy, reduction, reentrant):
    (x, w, b), targets, is_masked = draw_case(3, 8)

    def loss(x):
        return linear_cross_entropy(x.tanh(), w, targets, is_masked, bias=b, reduction=reduction).loss.sum()

    expected = torch.autograd.grad(loss(x), (x, w, b))
    checkpoint(loss, x, use_reentrant=reentrant).backward()
    for leaf, grad in zip((x, w, b), expected, strict=True):
        assert torch.equal(leaf.grad, grad)


def test_accumulation_with_a_denominator_is_the_full_batch(linear_cross_entropy):
    leaves, targets, is_masked = draw_case(6, 8)
    x, w, b = leaves
    weights = draw(6, seed=9).abs()
    whole = linear_cross_entropy(x, w, targets, is_masked, weights, bias=b, denominator=48).loss
    expected = torch.autograd.grad(whole, leaves)
    for part in (slice(0, 2), slice(2, 3), slice(3, 6)):
        out = linear_cross_entropy(
            x[part], w, targets[part], is_masked[part], weights[part], bias=b, denominator=torch.tensor(48.0)
        )
        out.loss.backward()
    torch.testing.assert_close(tuple(leaf.grad for leaf in leaves), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_under_a_loss_scale(linear_cross_entropy, reduction):
    """Each logit's gradient is about 2e-9, which float16 cannot hold; times 65536 it can."""
    leaves, targets, _ = draw_case(8, width=64, vocabulary=4096, dtype=torch.float16)
    with torch.no_grad():
        leaves[1].mul_(0.03)
    x, w, b = leaves
    options = {"denominator": 1e5} if reduction == "mean" else {"reduction": "none"}
    loss = linear_cross_entropy(x, w, targets, bias=b, **options).loss
    loss = loss if reduction == "mean" else loss.sum() / 1e5
    ours = torch.autograd.grad(65536.0 * loss, leaves)

    def pytorch(dtype, wide):
        x, w, b = copies(leaves, dtype)
        loss = F.cross_entropy(F.linear(x, w, b).to(wide), targets, reduction="sum") / 1e5
        return torch.autograd.grad(65536.0 * loss, (x, w, b))

    theirs = pytorch(torch.float16, torch.float32)
    exact = pytorch(torch.float64, torch.float64)
    for got, torchs, reference in zip(ours, theirs, exact, strict=True):
        assert_error_ratio(got[None], torchs[None], reference[None], UNIT[torch.float16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(linear_cross_entropy, backend, reduction, dtype):
    """Products in 16 bits, losses and gradients in float32, as near to float64 as PyTorch under autocast."""
    leaves, targets, is_masked = draw_case(4, 40, vocabulary=60)
    x, w, b = leaves
    device = backend.device.type
    with torch.autocast(device, dtype):
        out = linear_cross_entropy(x, w, targets, is_masked, bias=b, reduction=reduction)
    assert out.loss.dtype == torch.float32
    loss = out.loss if reduction == "mean" else out.loss.sum() / is_masked.sum()
    ours = torch.autograd.grad(loss, leaves)
    assert [grad.dtype for grad in ours] == [torch.float32] * 3

    def pytorch(x, w, b):
        return F.cross_entropy(F.linear(x[is_masked], w, b).double(), targets[is_masked])

    eager = copies(leaves)
    with torch.autocast("cpu", dtype):
        theirs = torch.autograd.grad(pytorch(*eager), eager)
    doubles = copies(leaves, torch.float64)
    exact = torch.autograd.grad(pytorch(*doubles), doubles)
    for got, torchs, reference in zip(ours, theirs, exact, strict=True):
        assert_error_ratio(got[None], torchs[None], reference[None], UNIT[dtype])
    # Rounded logits differ from float32 ones: the products were taken in 16 bits.
    assert not torch.equal(out.nll, dense(x, w, targets, is_masked, bias=b).nll)


def test_autocast_takes_embeddings_and_weight_of_two_dtypes(linear_cross_entropy, backend):
    (x, w, b), targets, is_masked = draw_case(3, 8)
    half = x.detach().bfloat16().requires_grad_()
    with torch.autocast(backend.device.type, torch.bfloat16):
        loss = linear_cross_entropy(half, w, targets, is_masked, bias=b).loss
    grads = torch.autograd.grad(loss, (half, w, b))
    assert [grad.dtype for grad in grads] == [torch.bfloat16, torch.float32, torch.float32]


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_float16_autocast_under_a_loss_scale(linear_cross_entropy, backend, reduction):
    """float32 leaves, float16 products: gradients of 2e-9 must not be formed in float16 before the scale comes."""
    leaves, targets, _ = draw_case(8, width=64, vocabulary=4096)
    with torch.no_grad():
        leaves[1].mul_(0.03)
    x, w, b = leaves
    options = {"denominator": 1e5} if reduction == "mean" else {"reduction": "none"}
    with torch.autocast(backend.device.type, torch.float16):
        loss = linear_cross_entropy(x, w, targets, bias=b, **options).loss
    loss = loss if reduction == "mean" else loss.sum() / 1e5
    ours = torch.autograd.grad(65536.0 * loss, leaves)
    x, w, b = exact = copies(leaves, torch.float64)
    expected = torch.autograd.grad(
        65536.0 / 1e5 * F.cross_entropy(F.linear(x, w, b), targets, reduction="sum"), exact
    )
    for got, reference in zip(ours, expected, strict=True):
        assert (got - reference).norm() < 0.005 * reference.norm()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_float64_weights_and_denominator_keep_their_digits(linear_cross_entropy, reduction):
    (x, w, b), targets, is_masked = draw_case(2, 5, dtype=torch.float64)
    third = torch.full((2, 5), 1 / 3, dtype=torch.float64)
    out = linear_cross_entropy(x, w, targets, is_masked, third, bias=b, reduction=reduction, **(
        {"denominator": third[0, 0]} if reduction == "mean" else {}))  # fmt: skip
    expected = out.nll / 3 if reduction == "none" else out.nll.sum()
    torch.testing.assert_close(out.loss.detach(), expected, rtol=1e-14, atol=0)


def test_check_spares_rows_of_weight_0_without_a_mask(linear_cross_entropy):
    (x, w, _), targets, _ = draw_case(2, 8)
    targets[0] = 10**9
    assert linear_cross_entropy(x, w, targets, None, torch.tensor([0.0, 1.0]), check=True).loss.isfinite()
