"""Cross-entropy of masked rows in a graph: backward, whose memory the gradient takes, operators and the compiler."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from losses import UNIT, assert_error_ratio, draw, draw_mask, draw_targets, gradient, on, small, without
from torch.utils.checkpoint import checkpoint

from fastmask import functional
from fastmask.records import LossOptions, LossRows, Reduction

OPERATION = "masked_cross_entropy"


@pytest.fixture
def cross_entropy(backend):
    """The public function on one backend."""
    return on(backend)


@pytest.fixture
def operation(backend):
    """The same, on tensors that lie on its device already: as they lie in memory matters to the test."""
    return partial(functional.masked_cross_entropy, backend="triton" if backend.is_kernel else "reference")


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


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_what_backward_gave_away_may_be_written_to(operation, backend, reduction, share):
    """By whoever got it, by autograd as it adds up a leaf's gradients, unseen behind .data: the next one is right."""
    logits, targets = draw(6, 9).to(backend.device).requires_grad_(), draw_targets(6, vocabulary=9).to(backend.device)
    is_masked = draw_mask(6, share=share).to(backend.device)
    loss = operation(logits, targets, is_masked, reduction=reduction).loss.sum()
    (given,) = torch.autograd.grad(loss, logits, retain_graph=True)
    expected = given.clone()
    given.mul_(3.0)
    assert torch.equal(torch.autograd.grad(loss, logits, retain_graph=True)[0], expected)
    for times in (1.0, 2.0, 3.0):
        loss.backward(retain_graph=True)
        torch.testing.assert_close(logits.grad, times * expected)
    logits.grad.data.zero_()
    loss.backward()
    torch.testing.assert_close(logits.grad, expected)


def test_numbers_that_memory_holds_negated_are_read_as_they_are(operation, backend):
    """As the imaginary part of a conjugate."""
    logits, targets, is_masked, _ = (x if x is None else x.to(backend.device) for x in small())
    negated = torch._neg_view(logits)
    assert negated.is_neg()
    for options in ({}, {"with_correct": True, "reduction": "none"}):
        ours = operation(negated.detach().requires_grad_(), targets, is_masked, **options)
        expected = operation((-logits).requires_grad_(), targets, is_masked, **options)
        assert torch.equal(ours.loss, expected.loss)


@pytest.mark.parametrize("layout", ["one after another", "transposed", "one for all"])
def test_each_position_has_its_own_gradient_from_above(operation, backend, layout):
    logits, targets, is_masked, _ = (x.to(backend.device) for x in small())
    logits.requires_grad_()
    above = {
        "one after another": draw(2, 4, seed=5),
        "transposed": draw(4, 2, seed=5).mT,
        "one for all": torch.tensor(-3.0).expand(2, 4),
    }[layout].to(backend.device)
    (ours,) = gradient(operation(logits, targets, is_masked, reduction="none").loss, logits, upstream=above)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 4) * is_masked
    (expected,) = gradient(expected, logits, upstream=above)
    torch.testing.assert_close(ours, expected)


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


def test_double_backward_of_a_gradient_in_place_raises(operation, backend):
    logits, targets, is_masked, _ = (x.to(backend.device) for x in small())
    logits.requires_grad_()
    loss = operation(1.0 * logits, targets, is_masked, inplace_grad=True).loss
    (grad,) = torch.autograd.grad(loss, logits, create_graph=True)
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


def test_rows_of_logits_may_overlap(cross_entropy):
    """A window that moves by one: its rows share memory, their gradients must not."""
    line = draw(40).requires_grad_()
    windows = line.as_strided((5, 9), (1, 1))
    targets = draw_targets(5, vocabulary=9)
    (ours,) = gradient(cross_entropy(windows, targets).loss, line)
    (theirs,) = gradient(F.cross_entropy(windows, targets), line)
    torch.testing.assert_close(ours, theirs)


# ---- whose memory it takes ----


@pytest.mark.parametrize("needs_grad", [False, True])
def test_the_reference_works_on_chunks(reference, needs_grad):
    """Forward allocates nothing as large as the logits, but their gradient where there is one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    large = set()

    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().nbytes() > 4 * 2**20:
                large.add(out.untyped_storage().data_ptr())
            return out

    logits = draw(2048, 600).to(reference.device).requires_grad_(needs_grad)
    targets = draw_targets(2048, vocabulary=600).to(reference.device)
    with Large():
        functional.masked_cross_entropy(logits, targets, backend="reference")
    assert len(large - {logits.untyped_storage().data_ptr()}) == needs_grad


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_by_chunks_is_the_same(reference, monkeypatch, dtype, reduction, share):
    """Of rows that have targets and weights of their own: several full chunks, and one that is not."""
    logits, targets = draw(23, 40, dtype=dtype).to(reference.device), draw_targets(23, vocabulary=40)
    is_masked, weights = torch.arange(23) % 7 < 7 * share, torch.linspace(0.5, 2.0, 23)
    others = [x.to(reference.device) for x in (targets, is_masked, weights)]

    def run():
        z = logits.clone().requires_grad_()
        out = functional.masked_cross_entropy(z, *others, reduction=reduction, backend="reference")
        return out.loss.detach(), out.nll, *gradient(out.loss.sum(), z)

    whole = run()
    monkeypatch.setattr(reference.module("masked_cross_entropy"), "_CHUNK_ELEMENTS", 5 * 40)
    for ours, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(ours, expected)


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
    rows = LossRows(targets.flatten() % 2, is_masked.flatten(), torch.arange(8.0, device=device))
    reduction = Reduction(reduction, torch.tensor(3.0, device=device))
    options = LossOptions(label_smoothing=0.1, z_loss=0.01, softcap=5.0, exclude_id=2, with_correct=True)
    return logits.to(dtype).requires_grad_(), *rows, *reduction, *options, with_gradient, False


@pytest.mark.parametrize(("reduction", "with_gradient"), [("none", False), ("sum", False), ("sum", True)])
@pytest.mark.slow_interpreted
def test_opcheck(kernel, reduction, with_gradient):
    kernel.module(OPERATION)
    torch.library.opcheck(
        torch.ops.fastmask.masked_cross_entropy, call_arguments(kernel.device, reduction, with_gradient)
    )


def test_opcheck_of_the_operation_in_place(kernel):
    """What it declares to write; it runs eagerly only, and has no more."""
    kernel.module(OPERATION)
    logits, *others, _, _ = call_arguments(kernel.device)
    arguments = logits.detach(), *others
    torch.library.opcheck(torch.ops.fastmask.masked_cross_entropy_, arguments, test_utils="test_schema")


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.slow_interpreted
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
