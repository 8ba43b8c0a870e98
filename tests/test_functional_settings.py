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


SLOW = pytest.mark.slow_interpreted


@pytest.mark.parametrize(
    "operation",
    [
        mask,
        mask_with_all,
        linear_list,
        *(pytest.param(loss, marks=SLOW) for loss in (dense, dense_of_a_batch, linear)),
    ],
)
@pytest.mark.slow
def test_operations_compile_whole_at_any_batch_size(kernel, operation):
    assert_compiles(operation, kernel)


@pytest.mark.slow
@pytest.mark.parametrize("operation", [mask, mask_with_all])
def test_the_references_masks_compile_whole_at_any_batch_size(reference, operation):
    assert_compiles(operation, reference)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    "operation",
    [mask, mask_with_all, dense, partial(dense, reduction="none"), dense_of_a_batch, linear, linear_list],
)
def test_whole_with_sizes_fixed_or_free_from_the_first(kernel, operation, dynamic):
    assert_compiles(operation, kernel, dynamic)


def assert_compiles(operation, backend, dynamic=None):
    """Without a break, in at most two graphs for three sizes (one where it is one size)."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    run = partial(operation, chosen={"backend": "triton" if backend.is_kernel else "reference"})
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=counter)
    for batch in (4, 4) if dynamic is False else (4, 3, 5):
        ids = tokens(batch).to(backend.device)
        torch.testing.assert_close(compiled(ids), run(ids), rtol=1e-6, atol=1e-6)
    assert counter.frame_count <= (1 if dynamic is False else 2)


@pytest.mark.parametrize("operation", [dense, linear])
@pytest.mark.slow
def test_the_references_losses_compile_in_parts(reference, operation):
    """Their rows are compacted: as many as are masked, which no graph holds."""
    run = partial(operation, chosen={"backend": "reference"})
    compiled = torch.compile(run, backend="eager")
    for batch in (4, 3):
        torch.testing.assert_close(compiled(tokens(batch)), run(tokens(batch)))


# ---- the default dtype ----


@pytest.fixture
def under_other_defaults():
    """Calls a function under a narrower and a wider default dtype."""

    def call(function):
        results = []
        for dtype in (torch.float16, torch.float64):
            torch.set_default_dtype(dtype)
            results.append(function())
        return results

    yield call
    torch.set_default_dtype(torch.float32)


MASKS = [
    {"schedule": "cosine", "stratified": True},
    {"schedule": 0.2501},  # of 8 positions 3, and 2 in float16
    {"mode": "bernoulli", "maskable": tokens(6) > 3},
    {"schedule": SQUARE, "no_replace_prob": 0.15, "random_token_prob": 0.3, "complement": True},
    {"times": torch.linspace(0, 1, 6), "gate": "token", "no_replace_prob": 0.15, "random_token_prob": 0.3,
     "random_excludes": [1, 3]},
]  # fmt: skip
LOSSES = [
    {
        "denominator": 7,
        "label_smoothing": 0.1,
        "z_loss": 0.01,
        "softcap": 5.0,
        "exclude_id": 16,
        "with_correct": True,
    },
    pytest.param({"denominator": torch.tensor(7)}, marks=SLOW),
    pytest.param({"reduction": "none", "weights": torch.linspace(0, 2, 3, dtype=torch.float32)}, marks=SLOW),
]
LISTED = pytest.param({"row_indices": torch.tensor([3, 1, -1]), "num_masked": 3}, marks=SLOW)


@pytest.mark.parametrize("options", MASKS)
def test_the_default_dtype_does_not_reach_masks(backend, under_other_defaults, options):
    run = partial(backend.run, functional.mask_sampling, tokens(6), **OPTIONS, **options)
    assert_same(run(), *under_other_defaults(run))


@pytest.mark.parametrize("options", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=SLOW)], ids=str)
def test_the_default_dtype_does_not_reach_losses(backend, under_other_defaults, dtype, options):
    logits = rows_of(tokens(3), 17).to(dtype).requires_grad_()
    run = partial(results, backend, functional.masked_cross_entropy, [logits], options)
    assert_same(run(), *under_other_defaults(run))


@pytest.mark.parametrize("options", [*LOSSES, LISTED])
def test_the_default_dtype_does_not_reach_linear_losses(backend, under_other_defaults, options):
    leaves = [rows_of(ids, 5).requires_grad_() for ids in (tokens(3), torch.arange(17))]
    run = partial(results, backend, functional.linear_masked_cross_entropy, leaves, options)
    assert_same(run(), *under_other_defaults(run))


FIGURES = {"with_margin": True, "with_entropy": True}
SAMPLES = [
    {"temperature": 0.7, **FIGURES},
    {"temperature": 0.0, "top_k": 5, "forbidden": [1, 3]},
    {"temperature": 0.3, "processed": True, "min_p": 0.01, "top_p": 0.9, **FIGURES},
]
STEPS = [
    {"counts": 3, "choice_temperature": 4.5},
    {"commits": 2, "threshold": 0.4},
    {"score": "entropy", "entropy_bound": 1.0, "block": torch.tensor([[0, 5]] * 3)},
    {"score": "random", "commits": torch.tensor([1, 2, 3])},
]


@pytest.mark.parametrize("options", SAMPLES)
@pytest.mark.slow_interpreted
def test_the_default_dtype_does_not_reach_samples(backend, under_other_defaults, options):
    for given in (
        rows_of(tokens(3), 17),
        functional.LinearLogits(rows_of(tokens(3), 5), rows_of(torch.arange(17), 5)),
    ):
        run = partial(backend.run, functional.sample_tokens, given, mask_id=16, seed=1, **options)
        assert_same(run(), *under_other_defaults(run))


@pytest.mark.parametrize("options", STEPS)
@pytest.mark.slow_interpreted
def test_the_default_dtype_does_not_reach_steps(backend, under_other_defaults, options):
    ids = tokens(3)
    given = rows_of(ids, 17), ids, ids > 3
    run = partial(backend.run, functional.demask_step, *given, mask_id=16, seed=1, **options)
    assert_same(run(), *under_other_defaults(run))


def test_the_default_dtype_does_not_reach_remask_keys(backend, under_other_defaults):
    values = rows_of(torch.arange(3), 8)

    def run():
        confidence = backend.run(functional.confidence_remask_keys, values, choice_temperature=1.0, seed=1)
        critical = backend.run(functional.critic_remask_keys, values, noise_scale=1.0, seed=1)
        return confidence, critical, backend.run(functional.select_to_remask, critical, values > 0, 2)

    assert_same(run(), *under_other_defaults(run))


def results(backend, function, leaves, options):
    """A loss, what comes with it, and its gradients."""
    out = backend.run(function, *leaves, tokens(3), **options)
    return *out, *torch.autograd.grad(out.loss, leaves, torch.ones_like(out.loss))


def assert_same(expected, *others):
    """Bit for bit, dtypes and NaN too."""
    for got in others:
        for one, other in zip(got, expected, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
