"""What the tests of linear_masked_cross_entropy share: embeddings, a head, the dense loss, the error-ratio rule."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from oracles import draw

from fastmask import functional
from fastmask.functional import CrossEntropy


def on(backend) -> Callable:
    """The public function on one backend."""

    def run(embeddings, *arguments, **options):
        if backend.is_kernel and embeddings.dtype == torch.float64:
            pytest.skip("the kernels compute in float32: float64 runs as PyTorch")
        return backend.run(functional.linear_masked_cross_entropy, embeddings, *arguments, **options)

    return run


def dense(embeddings, weight, *rest, bias=None, **options) -> CrossEntropy:
    """What the operation is: the dense loss of the head's logits."""
    return functional.masked_cross_entropy(F.linear(embeddings, weight, bias), *rest, backend="reference", **options)


def draw_case(*rows, width=16, vocabulary=11, dtype=torch.float32, masked=0.6, seed=0):
    """Leaves (embeddings, weight, bias) whose logits have deviation 3, targets and a mask."""
    embeddings = draw(*rows, width, seed=4 * seed, dtype=dtype).requires_grad_()
    weight = draw(vocabulary, width, seed=4 * seed + 1, scale=3 / math.sqrt(width), dtype=dtype).requires_grad_()
    bias = draw(vocabulary, seed=4 * seed + 2, dtype=dtype).requires_grad_()
    generator = torch.Generator().manual_seed(4 * seed + 3)
    targets = torch.randint(vocabulary, rows, generator=generator)
    return (embeddings, weight, bias), targets, torch.rand(*rows, generator=generator) < masked


def copies(leaves, dtype=None):
    return [x.detach().to(dtype or x.dtype, copy=True).requires_grad_() for x in leaves]


def assert_error_ratio(got, torchs, exact, unit, floor=0.0):
    """Per row, the L2 error against float64 is at most 1.5 times PyTorch's own, or the dtype's rounding of the
    row's norm (or of ``floor``, where that is more)."""
    got, torchs, exact = (x.detach().double()[..., None].flatten(1) for x in (got, torchs, exact))
    rounding = unit * torch.maximum(exact.norm(dim=-1), torch.as_tensor(floor, dtype=torch.float64))
    bound = 1.5 * torch.maximum((torchs - exact).norm(dim=-1), rounding)
    error = (got - exact).norm(dim=-1)
    assert (error <= bound).all(), (error / bound).max()
