"""Head and loss with gradients, against eager PyTorch on all rows (upstream's way) and on masked rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmask import functional


def all_rows(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, is_masked: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(x, weight)[is_masked], targets[is_masked])


def masked_rows(
    x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, is_masked: torch.Tensor
) -> torch.Tensor:
    return F.cross_entropy(F.linear(x[is_masked], weight), targets[is_masked])


def ours(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, is_masked: torch.Tensor) -> torch.Tensor:
    return functional.linear_masked_cross_entropy(x, weight, targets, is_masked).loss


@pytest.mark.parametrize("mask_ratio", [0.15, 0.5, 1.0])
@pytest.mark.parametrize("contender", [all_rows, masked_rows, ours])
def test_linear_masked_cross_entropy(benchmark, contender, mask_ratio):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, length, dim, num_tokens = 4, 128, 256, 8192
    x = torch.randn(batch, length, dim, device=device, requires_grad=True)
    weight = (torch.randn(num_tokens, dim, device=device) / dim**0.5).requires_grad_()
    targets = torch.randint(0, num_tokens, (batch, length), device=device)
    is_masked = torch.rand(batch, length, device=device) < mask_ratio

    def step(loss):
        return torch.autograd.grad(loss(x, weight, targets, is_masked), (x, weight))

    for gradient, expected in zip(step(ours), step(all_rows), strict=True):
        torch.testing.assert_close(gradient, expected)
    benchmark.group = f"linear_masked_cross_entropy, mask ratio {mask_ratio}"
    benchmark(step, contender)
