"""Sampling and scoring of logit rows, against upstream's step (top_k, softmax, gumbel_sample, gather)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from x_transformers.nonautoregressive_wrapper import gumbel_sample, top_k

from fastmask import functional


def eager(logits: torch.Tensor, filter_thres: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    if filter_thres is not None:
        logits = top_k(logits, filter_thres)
    ids = gumbel_sample(logits, temperature=0.7)
    return ids, logits.softmax(dim=-1).gather(-1, ids[..., None]).squeeze(-1)


def ours(logits: torch.Tensor, filter_thres: float | None) -> tuple[torch.Tensor, torch.Tensor]:
    ids, log_probs = functional.sample_tokens(logits, temperature=0.7, filter_thres=filter_thres)
    return ids, log_probs.exp()


@pytest.mark.parametrize("filter_thres", [None, 0.7])
@pytest.mark.parametrize("shape", [(1, 512, 8192), (1, 64, 50257)], ids=str)
@pytest.mark.parametrize("contender", [eager, ours])
def test_demask(benchmark: Any, contender: Any, shape: tuple[int, ...], filter_thres: float | None) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(shape, device=device)
    ids, probs = ours(logits, filter_thres)
    filtered = logits if filter_thres is None else top_k(logits, filter_thres)
    torch.testing.assert_close(probs, filtered.softmax(dim=-1).gather(-1, ids[..., None]).squeeze(-1))
    benchmark.group = f"demask {shape}, filter_thres {filter_thres}"
    benchmark(contender, logits, filter_thres)
