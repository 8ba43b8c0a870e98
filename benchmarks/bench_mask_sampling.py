"""Mask sampling with BERT gating, against upstream's own lines (five argsorts)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from x_transformers.nonautoregressive_wrapper import get_mask_subset_prob

from fastmask import functional

MASK_ID = 8191


def eager(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Upstream's masking with both gates open."""
    batch, length = tokens.shape
    times = torch.rand(batch, device=tokens.device)
    order = torch.rand(batch, length, device=tokens.device).argsort(dim=-1).float()
    is_masked = order < ((1 - times) * length).clamp(min=1.0)[:, None]
    replaced = is_masked & ~get_mask_subset_prob(is_masked, 0.15)
    random = get_mask_subset_prob(replaced, 0.1 * 0.85)
    ids = torch.where(random, torch.randint(0, MASK_ID + 1, tokens.shape, device=tokens.device), tokens)
    return torch.where(replaced & ~random, MASK_ID, ids), is_masked


def ours(tokens: torch.Tensor) -> functional.MaskedTokens:
    return functional.mask_sampling(
        tokens, mask_id=MASK_ID, num_tokens=MASK_ID + 1, no_replace_prob=0.15, random_token_prob=0.1
    )


@pytest.mark.parametrize("shape", [(64, 1024), (8, 256), (4, 16384)], ids=str)
@pytest.mark.parametrize("contender", [eager, ours])
def test_mask_sampling(benchmark: Any, contender: Any, shape: tuple[int, ...]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.randint(0, MASK_ID, shape, device=device)
    out = ours(tokens)
    assert torch.equal(out.counts, out.is_masked.sum(dim=-1))
    assert torch.equal(out.masked_ids[~out.is_masked], tokens[~out.is_masked])
    benchmark.group = f"mask_sampling {shape}"
    benchmark(contender, tokens)
