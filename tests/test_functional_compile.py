"""torch.compile over what samples and masks again, at three batch sizes or five: two graphs at most, no break."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from fastmask import functional
from fastmask.functional import LinearLogits, Sampled

N, V, D, MASK = 4, 19, 3, 18
BATCHES = 5, 3, 7, 2, 6  # none is N, which torch would take for the same number


def figures(ids, width):
    """[..., width] float32 of ids, without a generator, which torch.compile does not trace."""
    frequencies = torch.arange(1, width + 1, dtype=torch.float32, device=ids.device)
    return 3 * (ids[..., None] * frequencies).sin()


def some_ids(batch, device):
    return (torch.arange(batch * N).view(batch, N) * 7 % 13).to(device)


def behind_a_head(ids):
    return LinearLogits(figures(ids, D), figures(torch.arange(V, device=ids.device), D), scale=0.5)


def listed(ids):
    """Every second position, and a place that is free."""
    return torch.arange(ids.shape[0] * N, device=ids.device)[::2].where(ids.flatten()[::2] != 1, -1)


def sample_with_all(ids, **options):
    return functional.sample_tokens(
        figures(ids, V), mask_id=MASK, seed=1, temperature=0.7, top_k=7, top_p=0.9, forbidden=ids.new_ones(V) < 0,
        row_indices=listed(ids), kept_ids=listed(ids) % 9 - 3, with_margin=True, with_entropy=True, **options,
    )  # fmt: skip


def sample_per_sequence(ids, **options):
    values = ids[:, 0].float() / 10
    return functional.sample_tokens(
        figures(ids, V), mask_id=MASK, seed=1, temperature=values, top_k=ids[:, 1] + 1, min_p=values / 30,
        top_p=1 - values / 2, processed=True, row_indices=listed(ids), with_margin=True, **options,
    )[:3]  # fmt: skip


def sample_in_place(ids, **options):
    out = Sampled(ids.clone(), torch.zeros(ids.shape, dtype=torch.float32, device=ids.device))
    functional.sample_tokens(figures(ids, V), mask_id=MASK, seed=1, out=out, row_indices=listed(ids), **options)
    return out[:2]


def sample_behind_a_head(ids, **options):
    return functional.sample_tokens(behind_a_head(ids), mask_id=MASK, seed=1, temperature=0.7, top_k=7, **options)[:2]


def sample_behind_a_head_greedily(ids, **options):
    return functional.sample_tokens(behind_a_head(ids), mask_id=MASK, temperature=0.0, seed=1, **options)[:2]


def step(ids, logits=None, **options):
    given = figures(ids, V) if logits is None else logits(ids)
    return functional.demask_step(
        given, ids, ids > 3, 2, mask_id=MASK, seed=1, choice_temperature=1.0, threshold=0.8, max_masked=3, **options
    )


step_behind_a_head = partial(step, logits=behind_a_head)


def step_per_sequence(ids, **options):
    return step(ids, behind_a_head, temperature=ids[:, 0].float() / 10, top_k=ids[:, 1] + 1, **options)


def step_by_entropies(ids, **options):
    """In blocks, by a rule and at least so many, with edits."""
    block = torch.stack([ids[:, 0] % 2, ids[:, 1] % 2 + 3], dim=-1)
    return functional.demask_step(
        figures(ids, V), ids, ids > 3, mask_id=MASK, seed=1, commits=ids[:, 2] % 2, score="entropy",
        entropy_bound=2.0, processed=True, temperature=0.6, block=block,
        editing_threshold=0.2, editable=ids < 2, **options,
    )  # fmt: skip


def step_in_an_order(ids, **options):
    order = ids.float().sin()
    return functional.demask_step(
        figures(ids, V), ids, ids > 3, mask_id=MASK, seed=1, commits=1, score=order, **options
    )


def remask(ids, **options):
    written = ids.clone(), ids > 3, torch.zeros_like(ids).flatten()
    starts, counts = torch.arange(ids.shape[0] + 1, device=ids.device) * 2, ids[:, 0] % 3
    functional.remask_(
        *written,
        starts,
        ids.float().cos(),
        counts,
        mask_id=MASK,
        noise_scale=0.5,
        min_remask_key=0.1,
        seed=1,
        **options,
    )
    return written


def keys(ids, **options):
    confidence = functional.confidence_remask_keys(ids.float().sin(), choice_temperature=1.0, seed=1, **options)
    critical = functional.critic_remask_keys(ids.float().sin(), noise_scale=1.0, seed=1, **options)
    return confidence, critical, functional.select_to_remask(critical, ids > 3, 2, **options)


OPERATIONS = [
    sample_with_all,
    sample_per_sequence,
    sample_in_place,
    sample_behind_a_head,
    sample_behind_a_head_greedily,
    pytest.param(step_behind_a_head, id="step_behind_a_head"),
    step_per_sequence,
    step_by_entropies,
    step_in_an_order,
    remask,
    keys,
]


def assert_whole(operation, backend, dynamic):
    """Without a break, the same as without; in two graphs for all sizes, in one for each where sizes are fixed."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    run = partial(operation, backend="triton" if backend.is_kernel else "reference")
    compiled = torch.compile(run, fullgraph=True, dynamic=dynamic, backend=counter)
    batches = BATCHES if operation in (step_behind_a_head, remask) else BATCHES[:3]
    for batch in batches if dynamic is not False else BATCHES[:1] * 2:
        ids = some_ids(batch, backend.device)
        for ours, theirs in zip(compiled(ids), run(ids), strict=True):
            if ours.is_floating_point():
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6, equal_nan=True)
            else:
                assert torch.equal(ours, theirs)
    assert counter.frame_count <= (1 if dynamic is False else 2)


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_any_batch_size_is_compiled_whole(kernel, operation):
    assert_whole(operation, kernel, None)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_sizes_fixed_or_free_from_the_first_are_compiled_whole(kernel, dynamic):
    assert_whole(step_behind_a_head, kernel, dynamic)


@pytest.mark.slow
@pytest.mark.parametrize(
    "operation", [sample_with_all, sample_per_sequence, pytest.param(step_behind_a_head, id="step")]
)
def test_the_reference_is_compiled_whole_at_any_batch_size(reference, operation):
    assert_whole(operation, reference, None)
