"""What both losses promise alike: targets that are ignored, listed rows that are none, and where derivatives end."""

from __future__ import annotations

from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from losses import draw, draw_targets
from torch.autograd import forward_ad

from fastmask import functional
from fastmask.ops.masked_cross_entropy import checked_loss_options

OPERATION = "linear_masked_cross_entropy"
V, D = 9, 5


@pytest.fixture(params=["dense", "linear"])
def loss_of(request, backend):
    """A loss of logits [..., V]: themselves, or as a head's that passes embeddings of V on."""
    if request.param == "dense":
        return partial(backend.run, functional.masked_cross_entropy)
    return lambda logits, *rest, **options: backend.run(
        functional.linear_masked_cross_entropy, logits, torch.eye(logits.shape[-1]), *rest, **options
    )


# ---- targets that are ignored ----


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 4, 2**31 - 1])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_ignored_targets_are_pytorchs(loss_of, ignore_index, reduction):
    logits, targets = draw(2, 5, V).requires_grad_(), draw_targets(2, 5, vocabulary=V)
    targets[0, :3] = ignore_index
    out = loss_of(logits, targets, ignore_index=ignore_index, reduction=reduction, with_correct=True)
    leaf = logits.detach().requires_grad_()
    options = {"ignore_index": ignore_index, "reduction": reduction}
    expected = F.cross_entropy(leaf.flatten(0, 1), targets.flatten(), **options)
    expected = expected.view_as(targets) if reduction == "none" else expected
    torch.testing.assert_close(out.loss, expected)
    ignored = targets == ignore_index
    assert (out.nll[ignored] == 0).all()
    assert torch.equal(out.correct, (logits.argmax(-1) == targets) & ~ignored)
    (gradient,) = torch.autograd.grad(out.loss.sum(), logits)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), leaf)[0])
    assert (gradient[ignored] == 0).all()


def test_ignored_targets_say_the_same_as_a_mask(loss_of):
    logits, targets = draw(3, 4, V), draw_targets(3, 4, vocabulary=V, dtype=torch.int32)
    targets[:, 1] = -100
    is_masked, weights = torch.arange(12).view(3, 4) % 3 > 0, torch.tensor([0.5, 0.0, 2.0])
    options = {"label_smoothing": 0.1, "exclude_id": 8, "with_correct": True}
    targets = torch.where(targets == 8, 7, targets)
    for mask in (None, is_masked):
        out = loss_of(logits, targets, mask, weights, ignore_index=-100, **options)
        both = targets != -100 if mask is None else mask & (targets != -100)
        for got, expected in zip(out, loss_of(logits, targets, both, weights, **options), strict=True):
            assert torch.equal(got, expected)


def test_all_ignored_is_loss_0_and_gradient_0(loss_of):
    logits = draw(2, 3, V).requires_grad_()
    out = loss_of(logits, torch.full((2, 3), -100), ignore_index=-100)
    assert out.loss == 0
    assert (torch.autograd.grad(out.loss, logits)[0] == 0).all()


def test_check_spares_ignored_targets(loss_of):
    logits, targets = draw(2, 3, V), draw_targets(2, 3, vocabulary=V)
    targets[0, 0] = -100
    assert loss_of(logits, targets, ignore_index=-100, check=True).loss.isfinite()
    with pytest.raises(ValueError, match=r"expected targets in \[0, 9\), received -100 at \[0, 0\]"):
        loss_of(logits, targets, ignore_index=-1, check=True)


# ---- listed rows that are none, or ignored ----


@pytest.mark.parametrize("num_masked", [None, 6])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("nothing", [-1, -2, -(2**62), 6, 10**9, 2**62])
def test_listed_rows_that_are_none_count_as_minus_1(backend, nothing, reduction, num_masked):
    """Amid a list as at its end: neither read nor written through."""
    leaves = draw(2, 3, D), draw(V, D, seed=5)
    targets, weights = draw_targets(2, 3, vocabulary=V), torch.arange(1.0, 7.0).view(2, 3)
    run = partial(backend.run, functional.linear_masked_cross_entropy)

    def results(rows, **options):
        x, w = (leaf.clone().requires_grad_() for leaf in leaves)
        out = run(x, w, targets, None, weights, row_indices=torch.tensor(rows), reduction=reduction, **options)
        return out.loss, out.nll, *torch.autograd.grad(out.loss.sum(), (x, w))

    got = results([4, nothing, 0, nothing, 5, nothing], num_masked=num_masked)
    torch.testing.assert_close(got, results([4, 0, 5]))


def test_a_bound_of_a_list_is_of_its_entries(backend):
    x, w, targets = draw(2, 3, D), draw(V, D, seed=5), draw_targets(2, 3, vocabulary=V)
    run = partial(backend.run, functional.linear_masked_cross_entropy, x, w, targets)
    rows = torch.tensor([4, -1, 0, -1])
    assert run(row_indices=rows, num_masked=3).loss == run(row_indices=rows).loss
    assert run(row_indices=rows, num_masked=2).loss.isnan()


@pytest.mark.parametrize("num_masked", [None, 4])
def test_listed_targets_may_be_ignored(backend, num_masked):
    x, w, targets = draw(2, 3, D), draw(V, D, seed=5), draw_targets(2, 3, vocabulary=V)
    targets[0, 1] = targets[1, 2] = -100
    run = partial(backend.run, functional.linear_masked_cross_entropy, x, w, targets)
    for check in (False, True):
        got = run(row_indices=torch.tensor([0, 1, 5, 3, -1]), ignore_index=-100, check=check, num_masked=num_masked)
        torch.testing.assert_close(got, run(row_indices=torch.tensor([0, 3])))


@pytest.mark.parametrize("target", [V, -1, 10**9])
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_targets_out_of_range_are_nan_behind_a_head(backend, target, reduction):
    x, w, targets = draw(2, 3, D).requires_grad_(), draw(V, D, seed=5), draw_targets(2, 3, vocabulary=V)
    targets[0, 2] = target
    w[[0, -1]] = 9 * x.detach()[0, 2]  # an end of the row, which such a target may be taken for, is the likeliest
    run = partial(backend.run, functional.linear_masked_cross_entropy)
    out = run(x, w, targets, reduction=reduction, with_correct=True)
    assert out.nll.isnan().nonzero().tolist() == [[0, 2]]
    assert out.loss.isnan().sum() == 1
    assert not out.correct[0, 2]
    (gradient,) = torch.autograd.grad(out.loss.sum(), x)
    assert gradient.isnan().any(-1).nonzero().tolist() == [[0, 2]]


def test_backward_takes_no_notice_of_autocast(loss_of):
    logits, targets = draw(2, 3, V).requires_grad_(), draw_targets(2, 3, vocabulary=V)
    gradients = []
    for is_enabled in (False, True):
        loss = loss_of(logits, targets, reduction="none").loss.sum()
        with torch.autocast(loss.device.type, torch.bfloat16, enabled=is_enabled):
            gradients += torch.autograd.grad(loss, logits)
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_options_reach_kernels_as_plain_numbers():
    """Kernels are compiled, and what is prepared is kept, for a float and for an int."""
    found = checked_loss_options(8, np.float32(0.5), 0, Fraction(5), np.int64(3), False)
    assert [type(option) for option in found] == [float, float, float, int, bool]


# ---- where derivatives end ----


def _losses(backend):
    rows, head, targets = draw(4, V, seed=4), draw(V, V, seed=3), draw_targets(4, vocabulary=V)
    chosen = {"backend": "triton" if backend.is_kernel else "reference"}
    return {
        "logits": lambda x, y=targets: functional.masked_cross_entropy(x, y, **chosen).loss,
        "embeddings": lambda x, y=targets: functional.linear_masked_cross_entropy(x, head, y, **chosen).loss,
        "weight": lambda w, y=targets: functional.linear_masked_cross_entropy(rows, w, y, **chosen).loss,
        "bias": lambda b, y=targets: functional.linear_masked_cross_entropy(rows, head, y, bias=b, **chosen).loss,
    }


@pytest.mark.parametrize("name", ["logits", "embeddings", "weight", "bias"])
@pytest.mark.parametrize("transform", ["grad", "vjp", "jvp", "jacfwd", "jacrev", "hessian", "dual"])
def test_other_derivatives_are_refused(backend, name, transform):
    """Never dropped: a tangent that is would be a derivative of 0."""
    loss, x = _losses(backend)[name], draw(V, V) if name == "weight" else draw(V) if name == "bias" else draw(4, V)

    def dual():
        with forward_ad.dual_level():
            loss(forward_ad.make_dual(x, torch.ones_like(x)))

    run = {
        "grad": lambda: torch.func.grad(loss)(x),
        "vjp": lambda: torch.func.vjp(loss, x),
        "jvp": lambda: torch.func.jvp(loss, (x,), (torch.ones_like(x),)),
        "jacfwd": lambda: torch.func.jacfwd(loss)(x),
        "jacrev": lambda: torch.func.jacrev(loss)(x),
        "hessian": lambda: torch.func.hessian(loss)(x),
        "dual": dual,
    }[transform]
    with pytest.raises(
        RuntimeError, match=rf"expected {name} to be a plain tensor, received one (inside|with|batch)"
    ):
        run()


@pytest.mark.parametrize("name", ["logits", "embeddings"])
def test_vmap_is_refused(backend, name):
    loss = _losses(backend)[name]
    with pytest.raises(RuntimeError, match=rf"expected {name} to be a plain tensor, received one batched by"):
        torch.func.vmap(loss)(draw(3, 4, V))
    with pytest.raises(RuntimeError, match="expected targets to be a plain tensor, received one batched by"):
        torch.func.vmap(partial(loss, draw(4, V)))(draw_targets(3, 4, vocabulary=V))


@pytest.mark.parametrize("name", ["weights", "denominator"])
def test_tangents_of_constants_are_refused(loss_of, name):
    """What a gradient is refused for already, when the tensor requires one."""
    constant = torch.tensor(7.0) if name == "denominator" else torch.rand(2, 3)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(constant, torch.ones_like(constant))
        with pytest.raises(RuntimeError, match=f"expected {name} to be a plain tensor, received one with a forward"):
            loss_of(draw(2, 3, V), draw_targets(2, 3, vocabulary=V), **{name: dual})


def test_a_level_without_tangents_changes_nothing(backend):
    loss, x = _losses(backend)["logits"], draw(4, V).requires_grad_()
    expected = loss(x)
    with forward_ad.dual_level():
        assert loss(x) == expected
    assert expected.isfinite()
