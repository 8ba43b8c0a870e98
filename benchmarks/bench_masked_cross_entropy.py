"""Loss and gradient from logits, against eager PyTorch at the masked rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmask import functional


def eager(logits: torch.Tensor, targets: torch.Tensor, is_masked: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[is_masked].float(), targets[is_masked])


def ours(logits: torch.Tensor, targets: torch.Tensor, is_masked: torch.Tensor) -> torch.Tensor:
    return functional.masked_cross_entropy(logits, targets, is_masked).loss


@pytest.mark.parametrize("mask_ratio", [0.15, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(4, 128, 8192), (2, 64, 50257)], ids=str)
@pytest.mark.parametrize("contender", [eager, ours])
def test_masked_cross_entropy(benchmark, contender, shape, mask_ratio):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = torch.randn(shape, device=device, requires_grad=True)
    targets = torch.randint(0, shape[-1], shape[:-1], device=device)
    is_masked = torch.rand(shape[:-1], device=device) < mask_ratio

    def step(loss):
        (gradient,) = torch.autograd.grad(loss(logits, targets, is_masked), logits)
        return gradient

    torch.testing.assert_close(step(ours), step(eager))
    benchmark.group = f"masked_cross_entropy {shape}, mask ratio {mask_ratio}"
    benchmark(step, contender)
