"""What a caller sets around the operations: torch.compile at several batch sizes, and the default dtype."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastmask import Schedule, functional

SQUARE = Schedule(lambda t: 1 - t**2, lambda t: -2 * t)
OPTIONS = {"mask_id": 16, "num_tokens": 17, "seed": 0}


def rows_of(tokens, width):
    """[..., width] float32 without a generator, which torch.compile does not trace."""
    frequencies = torch.arange(1, width + 1, dtype=torch.float32, device=tokens.device)
    return 3 * (tokens[..., None] * frequencies).sin()


def tokens(batch):
    return torch.arange(batch * 8).view(batch, 8) * 7 % 13


def mask(tokens, chosen):
    return functional.mask_sampling(tokens, **OPTIONS, **chosen)


def mask_with_all(tokens, chosen):
    return functional.mask_sampling(
        tokens, **OPTIONS, schedule=SQUARE, mode="bernoulli", stratified=True, maskable=tokens > 3, gate="token",
        no_replace_prob=0.3, random_token_prob=0.3, random_excludes=[3, 5], complement=True, **chosen,
    )  # fmt: skip


def dense(tokens, chosen, reduction="mean"):
    return functional.masked_cross_entropy(
        rows_of(tokens, 17), tokens, tokens > 3, ignore_index=5, reduction=reduction, **chosen
    )[:2]


def dense_of_a_batch(tokens, chosen):
    denominator = tokens.shape[0] * tokens.shape[1]
    return functional.masked_cross_entropy(rows_of(tokens, 17), tokens, denominator=denominator, **chosen)[:2]


def linear(tokens, chosen, **options):
    return functional.linear_masked_cross_entropy(
        rows_of(tokens, 5),
        rows_of(torch.arange(17, device=tokens.device), 5),
        tokens,
        **{"is_masked": tokens > 3, **options},
        **chosen,
    )[:2]


def linear_list(tokens, chosen):
    rows = functional.mask_sampling(tokens, **OPTIONS, **chosen).row_indices
    return linear(tokens, chosen, is_masked=None, row_indices=rows, num_masked=tokens.shape[0] * 8, ignore_index=5)


@pytest.mark.parametrize("dynamic", [False, True, None])
@pytest.mark.parametrize("operation", [mask, mask_with_all])
def test_masks_compile_whole_at_any_batch_size(backend, operation, dynamic):
    assert_compiles(operation, backend, dynamic)


@pytest.mark.parametrize("dynamic", [False, True, None])
@pytest.mark.parametrize(
    "operation", [dense, partial(dense, reduction="none"), dense_of_a_batch, linear, linear_list]
)
def test_losses_compile_whole_at_any_batch_size(kernel, operation, dynamic):
    assert_compiles(operation, kernel, dynamic)


def assert_compiles(operation, backend, dynamic):
    """Without a break, in at most two graphs for five sizes (one where it is one size)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = partial(operation, chosen={"backend": "triton" if backend.is_kernel else "reference"})
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch in (4, 4) if dynamic is False else (4, 3, 5, 7, 6):
        ids = tokens(batch).to(backend.device)
        torch.testing.assert_close(compiled(ids), run(ids), rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= (1 if dynamic is False else 2)


@pytest.mark.parametrize("operation", [dense, linear])
def test_the_references_losses_compile_in_parts(reference, operation):
    """Their rows are compacted: as many as are masked, which no graph holds."""
    run = partial(operation, chosen={"backend": "reference"})
    compiled = torch.compile(run, backend="eager")
    for batch in (4, 3):
        torch.testing.assert_close(compiled(tokens(batch)), run(tokens(batch)))


# ---- the default dtype ----


@pytest.fixture(params=[torch.float16, torch.bfloat16, torch.float64], ids=str)
def set_default(request):
    """Sets the default dtype, and sets it back."""
    yield partial(torch.set_default_dtype, request.param)
    torch.set_default_dtype(torch.float32)


def masks():
    batch = tokens(6)
    options = [
        {}, {"schedule": "cosine", "stratified": True}, {"mode": "bernoulli", "maskable": batch > 3},
        {"schedule": 0.5}, {"schedule": SQUARE}, {"times": torch.linspace(0, 1, 6)}, {"counts": torch.arange(6)},
        {"no_replace_prob": 0.15, "random_token_prob": 0.3, "complement": True},
        {"gate": "token", "no_replace_prob": 0.15, "random_token_prob": 0.3, "random_excludes": [1, 3]},
    ]  # fmt: skip
    return [(functional.mask_sampling, (batch,), {**OPTIONS, **one}) for one in options]


def losses():
    batch, weights = tokens(3), torch.linspace(0, 2, 3, dtype=torch.float32)
    x, head = rows_of(batch, 5), rows_of(torch.arange(17), 5)
    logits = (x @ head.T).requires_grad_()
    options = [
        {}, {"reduction": "none", "weights": weights}, {"denominator": 7}, {"denominator": torch.tensor(7)},
        {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0, "exclude_id": 16, "with_correct": True},
    ]  # fmt: skip
    heads = [*options, {"num_masked": 9}, {"row_indices": torch.tensor([3, 1, -1]), "num_masked": 3}]
    return [(functional.masked_cross_entropy, (logits.to(dtype).detach().requires_grad_(), batch), one)
            for dtype in (torch.float32, torch.bfloat16) for one in options] + [
           (functional.linear_masked_cross_entropy,
            (x.to(dtype).requires_grad_(), head.to(dtype).requires_grad_(), batch), one)
            for dtype in (torch.float32, torch.bfloat16) for one in heads]  # fmt: skip


@pytest.mark.parametrize("number", range(len(masks())))
def test_the_default_dtype_does_not_reach_masks(backend, set_default, number):
    function, arguments, options = masks()[number]
    expected = backend.run(function, *arguments, **options)
    set_default()
    assert_same(backend.run(function, *arguments, **options), expected)


@pytest.mark.parametrize("number", range(len(losses())))
def test_the_default_dtype_does_not_reach_losses(backend, set_default, number):
    """Nor their gradients."""
    function, arguments, options = losses()[number]
    leaves = [x for x in arguments if x.requires_grad]

    def run():
        out = backend.run(function, *arguments, **options)
        upstream = torch.ones_like(out.loss)
        return *out, *torch.autograd.grad(out.loss, leaves, upstream)

    expected = run()
    set_default()
    assert_same(run(), expected)


def assert_same(got, expected):
    """Bit for bit, NaN too."""
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)  # dtypes too
