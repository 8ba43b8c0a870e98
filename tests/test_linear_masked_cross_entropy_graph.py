"""Head and cross-entropy in one, in a graph: backward, autocast, data parallelism, operators and the compiler."""

from __future__ import annotations

import itertools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from linear_losses import assert_error_ratio, copies, dense, draw_case, on
from losses import UNIT
from oracles import draw
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from fastmask import functional
from fastmask.records import LinearLogits, LossOptions, LossRows, Reduction

OPERATION = "linear_masked_cross_entropy"


@pytest.fixture
def linear_cross_entropy(backend):
    """The public function on one backend."""
    return on(backend)


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
def test_what_backward_gave_away_may_be_written_to(linear_cross_entropy, reduction):
    leaves, targets, is_masked = draw_case(3, 4)
    x, w, b = leaves
    loss = linear_cross_entropy(x, w, targets, is_masked, bias=b, reduction=reduction).loss.sum()
    given = torch.autograd.grad(loss, leaves, retain_graph=True)
    expected = [gradient.clone() for gradient in given]
    for gradient in given:
        gradient.mul_(3.0)
    for times in (1.0, 2.0, 3.0):
        loss.backward(retain_graph=True)
        for leaf, gradient in zip(leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, times * gradient)


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
@pytest.mark.slow_interpreted
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


# ---- autocast ----


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.slow_interpreted
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


# ---- data parallelism ----


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
@pytest.mark.slow_interpreted
def test_opcheck(kernel, reduction, needs, num_masked, form):
    leaves, targets, is_masked = draw_case(5, width=4, vocabulary=7)
    is_masked = torch.tensor([True, False, True, False, False])
    module = kernel.module(OPERATION)
    x, w, b = (leaf.detach().to(kernel.device).requires_grad_(need) for leaf, need in zip(leaves, needs, strict=True))
    rows = torch.tensor([2, 0, -1, -1, -1])
    weights, denominator = (torch.full(shape, 0.5) for shape in ((5,), ()))
    loss_rows = LossRows(targets, is_masked if form == "mask" else None, weights)
    masked = module.MaskedRows(rows if form == "list" else None, num_masked)
    reduction = Reduction(reduction, None if reduction == "none" else denominator)
    options = LossOptions(label_smoothing=0.1, z_loss=0.01, softcap=5.0, exclude_id=3, with_correct=True)
    wants = needs if reduction.kind != "none" else (False, False, False)  # there, backward forms the gradients
    records = LinearLogits(x, w, b), loss_rows, masked, reduction, (None,), options, (torch.float32, *wants)
    arguments = tree_map_only(torch.Tensor, lambda tensor: tensor.to(kernel.device), [*itertools.chain(*records)])
    torch.library.opcheck(torch.ops.fastmask.linear_masked_cross_entropy, tuple(arguments))


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
@pytest.mark.slow
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
