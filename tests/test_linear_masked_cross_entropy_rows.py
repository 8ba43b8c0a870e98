"""Head and cross-entropy in one, of rows that are a list, or that a bound is known of."""

from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from linear_losses import draw_case, on
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


def test_an_empty_batch_with_a_list_of_nothing(linear_cross_entropy):
    (x, w, _), targets, _ = draw_case(0)
    nothing = torch.full((2,), -1)
    assert linear_cross_entropy(x, w, targets, None, torch.ones(0), row_indices=nothing).loss == 0


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


@pytest.mark.parametrize("num_masked", [0, 4])
def test_a_bound_that_is_too_low_spoils_the_gradients_too(linear_cross_entropy, num_masked):
    """So that a loop which never looks at its loss cannot train on a part of the rows."""
    leaves, targets, _ = draw_case(2, 5)
    x, w, b = leaves
    loss = linear_cross_entropy(x, w, targets, torch.ones(2, 5).bool(), bias=b, num_masked=num_masked).loss
    assert loss.isnan()
    assert all(grad.isnan().any() for grad in torch.autograd.grad(loss, leaves))


def test_a_bound_counts_listed_rows_of_weight_0_too(linear_cross_entropy):
    (x, w, _), targets, _ = draw_case(2, 3)
    weights = torch.tensor([[1.0, 0.0, 2.0], [1.0, 1.0, 1.0]])
    rows = torch.tensor([1, 2, 3, -1])
    for bound, is_nan in ((2, True), (3, False)):
        out = linear_cross_entropy(x, w, targets, None, weights, row_indices=rows, num_masked=bound)
        assert out.loss.isnan() == is_nan


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


# ---- what is refused ----


def test_check_reads_the_listed_rows_only(linear_cross_entropy):
    (x, w, _), targets, _ = draw_case(2, 3)
    targets[0] = -100
    rows = torch.tensor([3, 5, -1, -1])
    assert linear_cross_entropy(x, w, targets, row_indices=rows, check=True).loss.isfinite()
    with pytest.raises(ValueError, match=r"expected targets in \[0, 11\), received -100"):
        linear_cross_entropy(x, w, targets, row_indices=torch.tensor([2, 5]), check=True)


@pytest.mark.parametrize("listed", [[0, -1, 3], [0, 0, -1], [2, 10], [1, -2]], ids=str)
def test_check_refuses_a_list_that_is_none(linear_cross_entropy, listed):
    (x, w, _), targets, _ = draw_case(2, 5)
    with pytest.raises(ValueError, match="expected row_indices to be rows below 10, each once, then -1; received"):
        linear_cross_entropy(x, w, targets, row_indices=torch.tensor(listed), check=True)


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
