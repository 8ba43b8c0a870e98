"""What the two losses' benchmarks share: a case's tensors, and the float64 loss and gradients they are held to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gate import relative_error
from benchmarks.records import ALL_ROWS, GATHERED, Contender, Step

Loss = Callable[..., Tensor]

IGNORE_INDEX = -100

# Relative L2 error of loss and gradients against float64. On logits of this spread, V 32768 and 151936,
# x-transformers' own loss, all in bfloat16, is at 3.5e-2, the others' gradients are below 1e-2, and a gradient
# without its softmax term is at 3e-1.
LIMITS = {torch.bfloat16: 5e-2, torch.float32: 1e-4}
LOGIT_SPREAD = 4.0

_NAMES = ("loss", "rows' gradient", "weight's gradient")


@dataclass
class LossProblem:
    """One case's tensors, and the reference.

    A contender's function is ``loss(rows, *parameters, targets, is_masked)`` for WITH_MASK and
    ``loss(rows, *parameters, labels)`` otherwise, the mean cross-entropy of the masked rows; it is run together
    with its backward. For GATHERED it gets the masked rows only: gathering them is timed, and that their gradient
    is put back among zeros.

    rows: [R, V] logits or [R, D] embeddings; parameters: () or (weight [V, D],); targets: [R] int64; is_masked:
    [R] bool; reference: the loss, the gradient of the rows and those of the parameters, float32 from float64.
    """

    rows: Tensor
    parameters: tuple[Tensor, ...]
    targets: Tensor
    is_masked: Tensor
    reference: tuple[Tensor, ...] = field(init=False)
    _arguments: dict[str, tuple[Tensor, ...]] = field(init=False, default_factory=dict)
    _scratch: dict[str, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.reference = _reference(self)

    @property
    def device(self) -> torch.device:
        return self.rows.device

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.rows, *self.parameters

    @property
    def limits(self) -> dict[str, float]:
        return dict.fromkeys(_NAMES, LIMITS[self.rows.dtype])

    def arguments(self, given: str) -> tuple[Tensor, ...]:
        """The loss's arguments: shared by all contenders that are given the same, so that they fit side by side."""
        if given not in self._arguments:
            extra: tuple[Tensor, ...] = (self.targets, self.is_masked)
            if given == ALL_ROWS:
                extra = (self.targets.where(self.is_masked, IGNORE_INDEX),)
            leaves = (self.rows, *self.parameters)
            self._arguments[given] = (*(leaf.detach().requires_grad_() for leaf in leaves), *extra)
        return self._arguments[given]

    def scratch(self, given: str) -> Tensor:
        """A copy of the rows for contenders that overwrite them."""
        if given not in self._scratch:
            self._scratch[given] = self.arguments(given)[0].detach().clone().requires_grad_()
        return self._scratch[given]

    def restore(self, contender: Contender) -> None:
        if contender.overwrites:
            self.scratch(contender.given).detach().copy_(self.arguments(contender.given)[0].detach())

    def run(self, contender: Contender, function: Loss) -> tuple[Tensor, ...]:
        """The loss, and the gradients of the rows and of the parameters."""
        arguments = self.arguments(contender.given)
        count = 1 + len(self.parameters)
        leaves, extra = arguments[:count], arguments[count:]
        if contender.overwrites:
            leaves = (_Produced.apply(self.scratch(contender.given)), *leaves[1:])
        if contender.given == GATHERED:
            loss = function(leaves[0][self.is_masked], *leaves[1:], self.targets[self.is_masked])
        else:
            loss = function(*leaves, *extra)
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    def errors(self, step: Step) -> dict[str, float]:
        """Relative L2 error of the loss and of each gradient."""
        outputs: Sequence[Tensor] = step.run()
        pairs = zip(outputs, self.reference, strict=True)
        return {name: relative_error(*pair) for name, pair in zip(_NAMES, pairs, strict=False)}


def draw_mask(num_rows: int, mask_ratio: float, device: torch.device, generator: torch.Generator) -> Tensor:
    """[num_rows] bool with exactly round(mask_ratio num_rows) masked, so that the floor is exact."""
    ranks = torch.randperm(num_rows, generator=generator, device=device)
    return ranks < round(mask_ratio * num_rows)


def _reference(problem: LossProblem) -> tuple[Tensor, ...]:
    """Loss and gradients in float64, chunk of rows by chunk of rows, kept in float32."""
    index = problem.is_masked.nonzero().squeeze(-1)
    parameters = [parameter.detach().double().requires_grad_() for parameter in problem.parameters]
    total = torch.zeros((), dtype=torch.float64, device=index.device)
    grad_rows = torch.zeros_like(problem.rows, dtype=torch.float32)
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    for chunk in index.split(1024):
        rows = problem.rows.detach()[chunk].double().requires_grad_()
        logits = F.linear(rows, *parameters) if parameters else rows
        loss = F.cross_entropy(logits, problem.targets[chunk], reduction="sum") / len(index)
        grad_chunk, *grads = torch.autograd.grad(loss, (rows, *parameters))
        total += loss.detach()
        grad_rows[chunk] = grad_chunk.float()
        for gradient, grad in zip(gradients, grads, strict=True):
            gradient += grad
    return total.float(), grad_rows, *(gradient.float() for gradient in gradients)


class _Produced(torch.autograd.Function):
    """Rows as a network hands them over: not a leaf, so that they may be overwritten."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return rows.new_empty(0).set_(rows.untyped_storage(), rows.storage_offset(), rows.shape, rows.stride())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient
