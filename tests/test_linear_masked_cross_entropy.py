"""Head and cross-entropy in one: the dense loss on F.linear's logits, without those logits."""

from __future__ import annotations

import gc
import itertools
import math
import random
import re
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from fastmask import functional
from fastmask.functional import CrossEntropy

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


@pytest.fixture
def small_chunks(backend, monkeypatch):
    """Sets how many masked rows a chunk holds: few, where rows cost 10 ms each in the interpreter."""

    def set_chunk_rows(num_rows):
        monkeypatch.setattr(backend.module(OPERATION), "CHUNK_ROWS", num_rows)

    return set_chunk_rows


def dense(embeddings, weight, *rest, bias=None, **options) -> CrossEntropy:
    """What the operation is: the dense loss of the head's logits."""
    return functional.masked_cross_entropy(F.linear(embeddings, weight, bias), *rest, backend="reference", **options)


def draw(*shape, seed=0, scale=1.0, dtype=torch.float32) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def draw_case(*rows, width=16, vocabulary=11, dtype=torch.float32, masked=0.6, seed=0):
    """Leaves (embeddings, weight, bias) whose logits have deviation 3, targets and a mask."""
    embeddings = draw(*rows, width, seed=4 * seed, dtype=dtype).requires_grad_()
    weight = draw(vocabulary, width, seed=4 * seed + 1, scale=3 / math.sqrt(width), dtype=dtype).requires_grad_()
    bias = draw(vocabulary, seed=4 * seed + 2, dtype=dtype).requires_grad_()
    generator = torch.Generator().manual_seed(4 * seed + 3)
    targets = torch.randint(vocabulary, rows, generator=generator)
    return (embeddings, weight, bias), targets, torch.rand(*rows, generator=generator) < masked


def copies(leaves, dtype=None):
    return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in leaves]


def without(targets, exclude_id):
    """Targets none of which is exclude_id."""
    return targets if exclude_id is None else torch.where(targets == exclude_id, exclude_id + 1, targets)


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
    """Errors like those of rounding to a dtype, at random: a unit of DESIGN 5 is half of the largest."""
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


def assert_error_ratio(got, torchs, exact, unit, floor=0.0):
    """Per row, the L2 error against float64 is at most 1.5 times PyTorch's own, or the dtype's rounding of the
    row's norm (or of ``floor``, where that is more)."""
    got, torchs, exact = (x.detach().double()[..., None].flatten(1) for x in (got, torchs, exact))
    rounding = unit * torch.maximum(exact.norm(dim=-1), torch.as_tensor(floor, dtype=torch.float64))
    bound = 1.5 * torch.maximum((torchs - exact).norm(dim=-1), rounding)
    error = (got - exact).norm(dim=-1)
    assert (error <= bound).all(), (error / bound).max()


aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.addmm_, aten.bmm}
# What makes the host wait for the device; an index that is a mask is as good as nonzero.
WAITS = {aten.nonzero, aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.masked_select, aten.equal}
BY_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Recorder(TorchDispatchMode):
    """The operations that run, and the largest floating-point tensor that any of them
    returns, in elements."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.operations.append(func.overloadpacket)
        for value in tensors_of(out):
            if value.is_floating_point():
                self.largest = max(self.largest, value.untyped_storage().nbytes() // value.element_size())
        if any(index.dtype == torch.bool for index in tensors_of(args[1:]) if func in BY_INDEX):
            self.operations.append(torch.ops.aten.nonzero)  # it is called where no mode sees it
        return out

    def count(self, operations) -> int:
        return sum(operation in operations for operation in self.operations)


def tensors_of(tree) -> list[torch.Tensor]:
    return [value for value in tree_leaves(tree) if isinstance(value, torch.Tensor)]


@pytest.fixture
def watch(backend, monkeypatch):
    """A dispatch mode on all of an operation: what is around it, and inside, where modes are off in a kernel."""

    def start(mode: TorchDispatchMode) -> TorchDispatchMode:
        if backend.is_kernel:
            module = backend.module(OPERATION)
            monkeypatch.setattr(module, "_chunked", under(mode, module._chunked))
        return mode

    return start


def under(mode: TorchDispatchMode, function: Callable) -> Callable:
    def watched(*arguments):
        with mode:
            return function(*arguments)

    return watched


# ---- values and gradients ----


@pytest.mark.parametrize(
    ("dtype", "vocabulary"), [*itertools.product(UNIT, [1, 3, 255, 507]), (torch.bfloat16, 50257)], ids=str
)
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


@pytest.fixture
def run_recorded(backend, small_chunks, watch):
    """Forward and backward of 8 masked rows in two chunks, under the recorder."""

    def run(*, reduction, needs=(True, True, True), grad=True, rows=8, chunk_rows=4, dtype=torch.float32):
        small_chunks(chunk_rows)
        recorder = watch(Recorder())
        leaves, targets, _ = draw_case(rows, width=2, vocabulary=600, dtype=dtype)
        x, w, b = (value.detach().requires_grad_(need) for value, need in zip(leaves, needs, strict=True))
        with recorder, torch.set_grad_enabled(grad):
            out = backend.run(functional.linear_masked_cross_entropy, x, w, targets, bias=b, reduction=reduction)
            if out.loss.requires_grad:
                out.loss.sum().backward()
        return recorder, (x, w, b)

    return run


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_only_wanted_gradients_are_formed(run_recorded, needs, reduction):
    """One product for the logits of each of two chunks, again where backward recomputes them, one each for
    the gradients of embeddings and weight."""
    recorder, leaves = run_recorded(reduction=reduction, needs=needs)
    assert [leaf.grad is not None for leaf in leaves] == list(needs)
    recomputed = reduction == "none" and any(needs)
    assert recorder.count(PRODUCTS) == 2 * (1 + recomputed + needs[0] + needs[1])


def test_no_grad_forms_no_gradient_and_no_graph(run_recorded):
    recorder, _ = run_recorded(reduction="mean", grad=False)
    assert recorder.count(PRODUCTS) == 2


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_logits_of_all_rows_never_exist(run_recorded, dtype, reduction):
    recorder, _ = run_recorded(reduction=reduction, dtype=dtype, rows=32)
    assert recorder.largest == 4 * 600


def test_unmasked_rows_never_reach_the_head(backend, watch):
    (x, w, _), targets, _ = draw_case(4, 512, width=2, vocabulary=600)
    is_masked = torch.zeros(4, 512, dtype=torch.bool)
    is_masked[1, 3:13] = True
    with watch(Recorder()) as recorder:
        backend.run(functional.linear_masked_cross_entropy, x, w, targets, is_masked)
    assert recorder.largest <= 10 * 600


class Memory(TorchDispatchMode):
    """Bytes of the storages that were made under it and are alive, and the most that there ever were."""

    def __init__(self):
        super().__init__()
        self.bytes, self.most, self.known = 0, 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = [value.untyped_storage() for value in tensors_of((args, kwargs))]
        out = func(*args, **(kwargs or {}))
        for storage in (value.untyped_storage() for value in tensors_of(out)):
            if storage not in self.known and all(storage is not other for other in given):
                self.known.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.free, storage.nbytes())
        if self.bytes > self.most:
            gc.collect()  # Triton's interpreter leaves cycles behind that hold tensors
            self.most = max(self.most, self.bytes)
        return out

    def free(self, nbytes):
        self.bytes -= nbytes

    def __enter__(self):
        gc.unfreeze()
        gc.collect()
        gc.freeze()  # what there is need not be looked through each time
        return super().__enter__()


def extra_bytes(function: Callable, device: torch.device) -> Callable:
    """The function, and where it returns, what it took at its peak beyond its outputs and its arguments."""

    def measured(*arguments):
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            out = function(*arguments)
            measured.extra = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
            return out
        with Memory() as memory:
            out = function(*arguments)
            gc.collect()
        measured.extra = memory.most - memory.bytes
        return out

    return measured


@pytest.fixture
def measure(kernel, monkeypatch):
    """Extra memory of one forward with gradients, or of the backward that forms them (reduction none)."""
    module = kernel.module(OPERATION)
    # The allocator of a GPU gives 512 bytes at least, and a chunk has to be large beside that.
    chunk_rows = 1024 if kernel.device.type == "cuda" else 6

    def measure(width, vocabulary, dtype, *, chunks=2, unmasked=0, reduction="sum", bound=False):
        monkeypatch.setattr(module, "CHUNK_ROWS", chunk_rows)
        rows = chunks * chunk_rows
        leaves, targets, _ = draw_case(rows + unmasked, width=width, vocabulary=vocabulary, dtype=dtype)
        x, w, b = (value.detach().to(kernel.device).requires_grad_() for value in leaves)
        is_masked = torch.arange(rows + unmasked, device=kernel.device) < rows
        options = {"reduction": reduction, "num_masked": rows if bound else None, "backend": "triton"}
        measured = extra_bytes(module._chunked, kernel.device)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_chunked", measured)
            for _ in range(2 if kernel.device.type == "cuda" else 1):  # cuBLAS takes a workspace once
                loss = functional.linear_masked_cross_entropy(
                    x, w, targets.to(kernel.device), is_masked, bias=b, **options
                ).loss
                loss.backward(torch.ones_like(loss))
        logits = chunk_rows * -(-vocabulary // 8) * 8 * dtype.itemsize
        chunk_embeddings = chunk_rows * width * dtype.itemsize
        is_sum = chunks > 1 and dtype != torch.float32  # else dW is what is returned
        weight = vocabulary * width
        allowed = logits + 2 * chunk_embeddings + 4 * weight * is_sum
        # What is not of the design's order: the bias's gradient in float32 (of two chunks, and the sum); by row the
        # list, the mask and its like; a chunk's records.
        allowed += 3 * 4 * vocabulary + 40 * (rows + unmasked) + 128 * chunk_rows
        if kernel.device.type == "cuda":
            allowed += 32 * 512
        return measured.extra, allowed, logits

    measure.chunk_rows = chunk_rows
    return measure


@pytest.mark.parametrize("bound", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "vocabulary"), [(16, 600), (64, 1000), (8, 4001), (128, 515)])
def test_memory_is_a_chunk_of_logits_and_of_embeddings_and_the_weights_gradient(
    measure, width, vocabulary, dtype, bound
):
    """DESIGN 4, beyond inputs and outputs: a chunk's logits, X and dX; dW in float32 where it is a sum."""
    extra, allowed, logits = measure(width, vocabulary, dtype, bound=bound)
    assert extra <= allowed
    assert allowed - extra < logits  # a second chunk of logits would be seen


def test_memory_of_a_backward_that_recomputes(measure):
    extra, allowed, logits = measure(16, 600, torch.float16, reduction="none")
    assert extra <= allowed
    assert allowed - extra < logits


def test_memory_grows_with_neither_rows_nor_chunks(measure):
    """But for the list and the mask of the rows."""
    few, _, _ = measure(128, 600, torch.float32, chunks=3)  # from the third on all chunks find the same
    more_chunks, _, _ = measure(128, 600, torch.float32, chunks=5)
    more_rows, _, _ = measure(128, 600, torch.float32, chunks=3, unmasked=512)
    assert more_chunks - few <= 40 * (measure.chunk_rows * 2)
    assert more_rows - few <= 40 * 512


# ---- the rows, as a list or bounded ----


@pytest.mark.ptx
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_row_indices_and_bounds_are_the_mask(linear_cross_entropy, small_chunks, reduction):
    small_chunks(2)
    leaves, targets, _ = draw_case(3, 6)
    masked = functional.mask_sampling(targets, mask_id=11, num_tokens=12, counts=torch.tensor([3, 0, 2]), seed=8)
    # What a bound leaves empty must not be written to the first row, which counts here and is right.
    assert masked.is_masked[0, 0]
    x, w, b = leaves
    targets[0, 0] = F.linear(x[0, 0], w, b).argmax()
    weights = masked.loss_weights[:, None].expand(3, 6).clone()
    weights[0, masked.is_masked[0].nonzero()[1]] = 0.0  # no longer in the loss, and not in the mean
    permuted = masked.row_indices.clone()
    permuted[:5] = masked.row_indices[:5].flip(0).roll(2)
    upstream = draw(3, 6, seed=8) if reduction == "none" else torch.tensor(-1.7)

    def run(is_masked=None, **options):
        out = linear_cross_entropy(
            x, w, targets, is_masked, weights, bias=b, reduction=reduction, with_correct=True, **options
        )
        return *out, *torch.autograd.grad(out.loss, leaves, upstream)

    expected = run(masked.is_masked)
    forms = [{"row_indices": masked.row_indices}, {"row_indices": permuted}, {"row_indices": permuted[:5]}]
    forms += [{"is_masked": masked.is_masked, "num_masked": bound} for bound in (4, 6, 50)]
    forms += [{"row_indices": permuted, "num_masked": bound} for bound in (5, 50)]
    for form in forms:
        torch.testing.assert_close(run(**form), expected, msg=lambda message, form=form: f"{form}: {message}")


@pytest.mark.parametrize("num_masked", [None, 0, 3, 50])
@pytest.mark.parametrize("is_list", [True, False])
def test_no_rows_at_all(linear_cross_entropy, is_list, num_masked):
    leaves, targets, _ = draw_case(2, 4)
    x, w, b = leaves
    is_masked = None if is_list else torch.zeros(2, 4, dtype=torch.bool)
    row_indices = torch.full((8,), -1) if is_list else None
    out = linear_cross_entropy(
        x, w, targets, is_masked, bias=b, row_indices=row_indices, num_masked=num_masked, with_correct=True
    )
    grads = torch.autograd.grad(out.loss, leaves)
    assert not any(value.any() for value in (*out, *grads))


@pytest.mark.parametrize("num_masked", [0, 2])
@pytest.mark.parametrize("is_list", [True, False])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_a_bound_that_is_too_low_gives_nan(linear_cross_entropy, reduction, is_list, num_masked):
    (x, w, b), targets, _ = draw_case(2, 3)
    is_masked = torch.tensor([[True, False, True], [False, True, False]])
    rows = torch.tensor([2, 4, 0, -1, -1, -1])
    form = {"row_indices": rows} if is_list else {"is_masked": is_masked}
    out = linear_cross_entropy(x, w, targets, bias=b, reduction=reduction, num_masked=num_masked, **form)
    assert out.loss.isnan().all()


def test_a_listed_row_of_weight_0_is_not_read(linear_cross_entropy):
    (x, w, b), targets, _ = draw_case(2, 3)
    targets[0, 1] = 10**9
    with torch.no_grad():
        x[0, 1] = math.nan
    weights = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 1.0]])
    loss = linear_cross_entropy(x, w, targets, None, weights, bias=b, row_indices=torch.tensor([1, 2, 3, -1])).loss
    listed = torch.tensor([[False, True, True], [True, False, False]])
    expected = linear_cross_entropy(x, w, targets, listed, weights, bias=b).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, w, b)), torch.autograd.grad(expected, (x, w, b)))


def test_check_reads_the_listed_rows_only(linear_cross_entropy):
    (x, w, _), targets, _ = draw_case(2, 3)
    targets[0] = -100
    rows = torch.tensor([3, 5, -1, -1])
    assert linear_cross_entropy(x, w, targets, row_indices=rows, check=True).loss.isfinite()
    with pytest.raises(ValueError, match=r"expected targets in \[0, 11\), received -100"):
        linear_cross_entropy(x, w, targets, row_indices=torch.tensor([2, 5]), check=True)


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (ValueError, "expected is_masked or row_indices, received both; leave one out",
         {"row_indices": torch.zeros(1).long(), "is_masked": torch.ones(2, 3, dtype=torch.bool)}),
        (TypeError, "expected row_indices of dtype int64, received int32", {"row_indices": torch.zeros(1).int()}),
        (TypeError, "expected row_indices to be a torch.Tensor, received list", {"row_indices": [0]}),
        (ValueError, "expected row_indices with 1 dimensions, received shape (1, 1)",
         {"row_indices": torch.zeros(1, 1).long()}),
        (ValueError, "expected num_masked of at least 0, received -1", {"num_masked": -1}),
        (TypeError, "expected num_masked to be an int, received float", {"num_masked": 2.0}),
        (TypeError, "expected num_masked to be an int, received Tensor", {"num_masked": torch.tensor(2)}),
    ],
)  # fmt: skip
def test_wrong_rows_are_refused(error, message, options):
    (x, w, _), targets, _ = draw_case(2, 3)
    with pytest.raises(error, match=re.escape(message)):
        functional.linear_masked_cross_entropy(x, w, targets, **options)


@pytest.mark.parametrize("knows", ["nothing", "a bound", "a capture"])
@pytest.mark.parametrize("is_list", [True, False])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_host_waits_for_the_count_only(kernel, monkeypatch, reduction, is_list, knows):
    """Once in a forward without a bound, never in one that has it or is captured; a recomputing backward likewise."""
    recorder, module = Recorder(), kernel.module(OPERATION)
    if knows == "a capture":
        monkeypatch.setattr(module, "_is_captured", lambda x: True)
    monkeypatch.setattr(module, "_chunked", under(recorder, module._chunked))
    leaves, targets, is_masked = draw_case(2, 3)
    leaves = [leaf.detach().to(kernel.device).requires_grad_() for leaf in leaves]
    targets, is_masked = targets.to(kernel.device), is_masked.to(kernel.device)
    rows = is_masked.flatten().nonzero().squeeze(-1)
    x, w, b = leaves
    options = {"row_indices": rows} if is_list else {"is_masked": is_masked}
    with recorder:
        functional.linear_masked_cross_entropy(
            x, w, targets, weights=torch.ones_like(targets, dtype=torch.float32), bias=b, reduction=reduction,
            num_masked=5 if knows == "a bound" else None, backend="triton", **options
        ).loss.sum().backward()  # fmt: skip
    passes = 2 if reduction == "none" else 1
    assert recorder.count(PRODUCTS) == passes + 2
    assert recorder.count(WAITS) == (passes if knows == "nothing" else 0)


@pytest.mark.parametrize("form", ["mask", "list", "all"])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_a_capture_gives_the_same(kernel, monkeypatch, reduction, form):
    leaves, targets, is_masked = draw_case(2, 3)
    rows = F.pad(is_masked.flatten().nonzero().squeeze(-1), (0, 2), value=-1)
    options = {"mask": {"is_masked": is_masked}, "list": {"row_indices": rows}, "all": {}}[form]

    def run():
        x, w, b = (leaf.detach().requires_grad_() for leaf in leaves)
        out = kernel.run(
            functional.linear_masked_cross_entropy, x, w, targets, bias=b, reduction=reduction, **options
        )
        return *out, *torch.autograd.grad(out.loss.sum(), (x, w, b))

    expected = run()
    monkeypatch.setattr(kernel.module(OPERATION), "_is_captured", lambda x: True)
    torch.testing.assert_close(run(), expected)


# ---- the graph ----


@pytest.mark.parametrize("upstreams", [(1.0, -3.0), (-3.0, 1.0)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_graph_can_be_used_twice(linear_cross_entropy, reduction, upstreams):
    leaves, targets, is_masked = draw_case(3, 4)
    x, w, b = leaves
    loss = linear_cross_entropy(x, w, targets, is_masked, bias=b, reduction=reduction).loss
    first = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstreams[0]), retain_graph=True)
    returned = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(loss, leaves, torch.full_like(loss, upstreams[1]))
    assert all(torch.equal(*pair) for pair in zip(first, returned, strict=True))
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(other * upstreams[0], one * upstreams[1])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_tied_head_adds_to_the_tables_gradient(linear_cross_entropy, reduction):
    (_, w, _), targets, is_masked = draw_case(3, 4)
    grads = []
    for run in (linear_cross_entropy, dense):
        table = w.detach().clone().requires_grad_()
        x = F.embedding(targets.roll(1), table).tanh()
        run(x, table, targets, is_masked, reduction=reduction).loss.sum().backward()
        grads.append(table.grad)
    torch.testing.assert_close(*grads)
    assert not torch.equal(grads[0], torch.zeros_like(grads[0]))


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


@pytest.fixture
def process_group(tmp_path):
    """One rank: the hooks and buckets of DistributedDataParallel are all there."""
    distributed = torch.distributed
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Model(torch.nn.Module):
    """Embeddings, one layer, and a head whose weight is the table's."""

    def __init__(self, vocabulary=11, width=8):
        super().__init__()
        self.table = torch.nn.Parameter(draw(vocabulary, width, seed=1))
        self.layer = torch.nn.Parameter(draw(width, width, seed=2, scale=0.5))
        self.bias = torch.nn.Parameter(draw(vocabulary, seed=3))

    def forward(self, run, ids, targets, is_masked, **options):
        x = F.linear(F.embedding(ids, self.table), self.layer)
        return run(x, self.table, targets, is_masked, bias=self.bias, **options).loss


def test_distributed_accumulation_is_the_full_batch(linear_cross_entropy, process_group):
    """Two micro-batches over one denominator: the first without communication, as accumulation does."""
    _, targets, is_masked = draw_case(4, 3)
    ids = targets.masked_fill(is_masked, 0)
    whole, model = Model(), Model()
    whole(dense, ids, targets, is_masked).backward()
    parallel = DistributedDataParallel(model)
    for rows, context in (([0], parallel.no_sync()), ([1, 2, 3], nullcontext())):
        with context:
            parts = (part[rows] for part in (ids, targets, is_masked))
            parallel(linear_cross_entropy, *parts, denominator=float(is_masked.sum())).backward()
    for parameter, expected in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


# ---- the compiler ----


@pytest.mark.parametrize(
    ("reduction", "needs", "num_masked", "form"),
    [
        ("sum", (True, True, True), None, "mask"),
        ("sum", (True, True, True), 5, "mask"),
        ("sum", (False, True, False), None, "list"),
        ("sum", (False, False, False), 4, "list"),
        ("none", (True, True, True), None, "all"),
        ("none", (False, False, False), 2, "mask"),
    ],
)
def test_opcheck(kernel, reduction, needs, num_masked, form):
    leaves, targets, is_masked = draw_case(5, width=4, vocabulary=7)
    is_masked = torch.tensor([True, False, True, False, False])
    x, w, b = (leaf.detach().to(kernel.device).requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True))
    rows = torch.tensor([2, 0, -1, -1, -1])
    weights, denominator = (torch.full(shape, 0.5) for shape in ((5,), ()))
    tensors = [targets, is_masked if form == "mask" else None, weights, None if reduction == "none" else denominator]
    tensors = [*tensors, rows if form == "list" else None]
    wants = needs if reduction != "none" else (False, False, False)  # there, backward forms the gradients
    torch.library.opcheck(
        torch.ops.fastmask.linear_masked_cross_entropy,
        (x, w, b, *(value if value is None else value.to(kernel.device) for value in tensors), None,
         0.1, 0.01, 5.0, 3, True, reduction, torch.float32, num_masked, *wants),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("reduction", "dtype"),
    [
        ("none", torch.float32),
        ("sum", torch.bfloat16),
        ("mean", torch.float32),
        ("mean", torch.float16),
    ],
    ids=str,
)
def test_compiled(kernel, reduction, dtype):
    """As in eager mode, whatever is masked, without compiling again for another count."""
    leaves, targets, _ = draw_case(2, 3, dtype=dtype)
    targets = targets.to(kernel.device)
    leaves = [leaf.detach().to(kernel.device).requires_grad_() for leaf in leaves]

    def eager(is_masked, x, w, b):
        return functional.linear_masked_cross_entropy(
            x, w, targets, is_masked, bias=b, reduction=reduction, with_correct=True, backend="triton"
        )

    def assert_like_eager(is_masked):
        results = []
        for run in (eager, compiled):
            out = run(is_masked, *leaves)
            results.append((*out, *torch.autograd.grad(2.0 * out.loss.sum(), leaves)))
        assert all(torch.equal(*pair) for pair in zip(*results, strict=True))

    torch._dynamo.reset()
    compiled = torch.compile(eager, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for count in (2, 0, 6, 3):
            assert_like_eager((torch.arange(6, device=kernel.device) < count).view(2, 3))
    assert_like_eager(None)


def test_a_bound_that_is_too_low_spoils_the_gradients_too(linear_cross_entropy):
    """So that a loop which never looks at its loss cannot train on a part of the rows."""
    leaves, targets, _ = draw_case(2, 5)
    x, w, b = leaves
    loss = linear_cross_entropy(x, w, targets, torch.ones(2, 5).bool(), bias=b, num_masked=4).loss
    assert loss.isnan()
    assert all(grad.isnan().any() for grad in torch.autograd.grad(loss, leaves))


def test_the_number_of_rows_compiles_once(kernel):
    def loss(x, w, targets, is_masked):
        return functional.linear_masked_cross_entropy(x, w, targets, is_masked, backend="triton").loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (6, 10, 7):
        (x, w, _), targets, is_masked = draw_case(rows)
        arguments = [tensor.detach().to(kernel.device) for tensor in (x, w, targets, is_masked)]
        torch._dynamo.config.error_on_recompile = rows != 6
        try:
            torch.testing.assert_close(compiled(*arguments), loss(*arguments))
        finally:
            torch._dynamo.config.error_on_recompile = False


@pytest.mark.parametrize("listed", [[0, -1, 3], [0, 0, -1], [2, 10], [1, -2]], ids=str)
def test_check_refuses_a_list_that_is_none(linear_cross_entropy, listed):
    (x, w, _), targets, _ = draw_case(2, 5)
    with pytest.raises(ValueError, match="expected row_indices to be rows below 10, each once, then -1; received"):
        linear_cross_entropy(x, w, targets, row_indices=torch.tensor(listed), check=True)


def test_an_empty_batch_with_a_list_of_nothing(linear_cross_entropy):
    (x, w, _), targets, _ = draw_case(0)
    nothing = torch.full((2,), -1)
    assert linear_cross_entropy(x, w, targets, None, torch.ones(0), row_indices=nothing).loss == 0


@pytest.mark.parametrize("wanted", [0, 1, 2], ids=["embeddings", "weight", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_gradient_is_the_same_without_the_others(linear_cross_entropy, reduction, wanted):
    leaves, targets, is_masked = draw_case(2, 4)
    grads = []
    for alone in (False, True):
        x, w, b = (leaf.detach().requires_grad_(not alone or i == wanted) for i, leaf in enumerate(leaves))
        loss = linear_cross_entropy(x, w, targets, is_masked, bias=b, reduction=reduction).loss.sum()
        grads.append(torch.autograd.grad(loss, (x, w, b)[wanted])[0])
    assert torch.equal(*grads)


def test_a_bound_counts_listed_rows_of_weight_0_too(linear_cross_entropy):
    (x, w, _), targets, _ = draw_case(2, 3)
    weights = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 1.0]])
    rows = torch.tensor([1, 2, 3, -1])
    for bound, is_nan in ((2, True), (3, False)):
        out = linear_cross_entropy(x, w, targets, None, weights, row_indices=rows, num_masked=bound)
        assert out.loss.isnan() == is_nan


@pytest.mark.parametrize("rows", [0, 1, 4, 5, 8, 9, 13])
def test_chunks_are_of_one_size(kernel, monkeypatch, rows):
    module = kernel.module(OPERATION)
    monkeypatch.setattr(module, "CHUNK_ROWS", 4)
    sizes = module.chunk_sizes(rows)
    assert sum(sizes) == rows
    assert len(sizes) == -(-rows // 4)
    assert max(sizes, default=0) - min(sizes, default=0) <= 1


def test_rows_of_logits_begin_at_16_bytes(kernel, monkeypatch):
    """Whatever V is: the products and the stores are faster so."""
    module, given = kernel.module(OPERATION), []
    losses = module.losses_and_gradient
    monkeypatch.setattr(module, "losses_and_gradient", lambda *a, **k: given.append(a[0]) or losses(*a, **k))
    for dtype in (torch.float32, torch.bfloat16):
        (x, w, _), targets, _ = draw_case(3, vocabulary=11, dtype=dtype)
        kernel.run(functional.linear_masked_cross_entropy, x, w, targets)
        assert given[-1].stride(0) * dtype.itemsize % 16 == 0
        assert given[-1].data_ptr() % 16 == 0
