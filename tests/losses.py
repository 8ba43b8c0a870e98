"""What the tests of masked_cross_entropy share: logits, the equation in PyTorch, and the error-ratio rule."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from fastmask import functional

# By the error-ratio rule; float64 as float32: twice half a unit in the last place.
UNIT = {torch.bfloat16: 2**-9, torch.float16: 2**-12, torch.float32: 2**-22, torch.float64: 2**-51}


def on(backend) -> Callable:
    """The public function on one backend."""

    def run(logits, *arguments, **options):
        if backend.is_kernel and logits.dtype == torch.float64:
            pytest.skip("the kernels compute in float32: float64 logits run as PyTorch")
        return backend.run(functional.masked_cross_entropy, logits, *arguments, **options)

    return run


def plan_with(kernel, monkeypatch, **constants) -> None:
    """The loss is planned by other constants, for a test; a plan is else made once and kept."""
    module = kernel.module("masked_cross_entropy")
    monkeypatch.setattr(module, "_prepared", module._prepared.__wrapped__)
    for name, value in constants.items():
        monkeypatch.setattr(kernel.module("_loss_plan"), name, value)


def draw(*shape, seed=0, scale=3.0, dtype=torch.float32) -> torch.Tensor:
    return (scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def draw_targets(*shape, vocabulary, seed=1, dtype=torch.int64) -> torch.Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def draw_mask(*shape, seed=2, share=0.5) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) < share


def small():
    logits, targets = draw(2, 4, 6), draw_targets(2, 4, vocabulary=6)
    is_masked = torch.tensor([[True, False, True, True], [False, True, False, False]])
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 4)
    return logits, targets, is_masked, nll


def without(targets, exclude_id):
    """Targets none of which is exclude_id."""
    return targets if exclude_id is None else torch.where(targets == exclude_id, exclude_id + 1, targets)


def equation(logits, targets, label_smoothing=0.0, z_loss=0.0, exclude_id=None, softcap=None) -> torch.Tensor:
    """The docstring's loss of each row [M], by autograd-friendly PyTorch in the logits' own precision."""
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    allowed = torch.arange(logits.shape[-1]) != (-1 if exclude_id is None else exclude_id)
    lse = logits[:, allowed].logsumexp(-1)
    nll = lse - logits.gather(-1, targets.long()[:, None]).squeeze(-1)
    smooth = lse - logits[:, allowed].mean(-1)
    return (1 - label_smoothing) * nll + label_smoothing * smooth + z_loss * lse.square()


def closed_form(logits, targets):
    """nll [M] and its gradient [M, V] in float64, accurate for certain rows too, as softmax minus 1 is not."""
    at_target = targets.long()[:, None]
    z = logits.detach().double()
    others = (z - z.gather(-1, at_target)).exp().scatter(-1, at_target, 0.0)
    r = others.sum(-1, keepdim=True)
    return r.log1p().squeeze(-1), (others / (1 + r)).scatter(-1, at_target, -r / (1 + r))


def gradient(loss, *leaves, upstream=None):
    return torch.autograd.grad(loss, leaves, upstream)


def assert_error_ratio(got, torchs, exact, unit, inherited=0.0):
    """Per row, the L2 error against float64 is at most 1.5 times PyTorch's own, or the dtype's rounding, or what
    the rounding of the operands leaves no choice about."""
    got, torchs, exact = (x.detach().double().view(len(exact), exact.shape[1:].numel()) for x in (got, torchs, exact))
    floor = unit * exact.norm(dim=-1) + inherited
    bound = 1.5 * torch.maximum((torchs - exact).norm(dim=-1), floor)
    error = (got - exact).norm(dim=-1)
    assert (error <= bound).all(), (error / bound).max()
