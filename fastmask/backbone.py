"""The one door to a network: its logits, its embeddings, and its head where that is provably linear.

Any callable ``net(ids, **kwargs) -> logits`` will do. For an ``x_transformers.TransformerWrapper`` whose
logits are provably ``F.linear(embeddings, weight, bias) * scale``, the network is asked for embeddings
only, and head and loss (or sampler) see the masked rows alone.
"""

from __future__ import annotations

import sys
from types import FunctionType
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from fastmask import _devices, functional
from fastmask.records import CrossEntropy, LinearLogits, MaskedTokens


class Head(NamedTuple):
    """logits = F.linear(embeddings * scale, weight, bias); weight [V, D], bias [V] or None."""

    weight: Tensor
    bias: Tensor | None
    scale: float

    def logits(self, embeddings: Tensor) -> LinearLogits:
        """The logits of embeddings [B, N, D]; nothing is computed yet."""
        return LinearLogits(embeddings, self.weight, self.bias, self.scale)


class Output(NamedTuple):
    """What a network gave for [B, N] ids.

    logits: [B, N, V], or those of a linear head that nobody has computed yet. embeddings: [B, N, D]; None where it
    was not asked for them.
    """

    logits: Tensor | LinearLogits
    embeddings: Tensor | None

    @property
    def num_tokens(self) -> int:
        """V."""
        return self.logits.shape[-1] if isinstance(self.logits, Tensor) else len(self.logits.weight)

    def loss(
        self,
        targets: Tensor,
        masked: MaskedTokens,
        weights: Tensor | None,
        denominator: Tensor | float,
        num_masked: int | None,
        with_correct: bool = False,
    ) -> CrossEntropy:
        """Masked cross-entropy, "mean"; arguments as in :func:`fastmask.functional.linear_masked_cross_entropy`."""
        logits = self.logits
        if isinstance(logits, Tensor):
            return functional.masked_cross_entropy(
                logits, targets, masked.is_masked, weights, denominator=denominator, with_correct=with_correct
            )
        return functional.linear_masked_cross_entropy(
            logits.scaled(logits.embeddings),
            logits.weight,
            targets,
            weights=weights,
            bias=logits.bias,
            row_indices=masked.row_indices,
            num_masked=num_masked,
            denominator=denominator,
            with_correct=with_correct,
        )

    def logits_of(self, row_indices: Tensor) -> Tensor:
        """The logits [M, V] of the rows ``row_indices`` [M]."""
        if isinstance(self.logits, Tensor):
            return rearrange(self.logits, "b n v -> (b n) v")[row_indices]
        return self.logits.of_rows(rearrange(self.logits.embeddings, "b n d -> (b n) d")[row_indices])


def run(net: Any, ids: Tensor, *, with_embeddings: bool = False, **kwargs: Any) -> Output:
    """The network on ids [B, N]: embeddings and head where the head is linear, else logits.

    Args:
        with_embeddings: embeddings are wanted even beside logits (self-conditioning).
        kwargs: passed to the network.
    """
    # x-transformers cuts prepended embeddings off again on its way to logits only.
    head = None if kwargs.get("excise_prepend_embeds") else linear_head(net)
    if head is not None:
        embeddings = _of_each_token("embeddings", "D", net(ids, return_embeddings=True, **kwargs), ids)
        return Output(head.logits(embeddings), embeddings)
    if with_embeddings:
        logits, embeddings = net(ids, return_logits_and_embeddings=True, **kwargs)
        return Output(_of_each_token("logits", "V", logits, ids), embeddings)
    return Output(_of_each_token("logits", "V", net(ids, **kwargs), ids), None)


def embeddings(net: Any, ids: Tensor, **kwargs: Any) -> Tensor:
    """The network's embeddings [B, N, D] of ids [B, N]."""
    out: Tensor = net(ids, return_embeddings=True, **kwargs)
    return out


def _of_each_token(name: str, letter: str, output: object, ids: Tensor) -> Tensor:
    if not isinstance(output, Tensor) or output.shape[:-1] != ids.shape:
        received = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ValueError(
            f"expected net(ids {list(ids.shape)}) to return {name} [B, N, {letter}], received {received}"
        )
    return output


def device_of(net: Any) -> torch.device:
    """The device of the network's first parameter or buffer; torch's default where it has none."""
    return _devices.device_of(net, torch.get_default_device())


def linear_head(net: Any) -> Head | None:
    """The head of a TransformerWrapper whose logits are provably linear in its embeddings, else None.

    Anything that could come between the two (another class or forward, hooks, parametrisations,
    several heads, pooling, mixtures) refuses the short way; the logits are then the network's own.
    """
    compiled, net = net, getattr(net, "_orig_mod", net)  # torch.compile's wrapping, which can have hooks too
    if compiled is not net and any(_hooks(compiled)):
        return None
    x_transformers = sys.modules.get("x_transformers.x_transformers")
    if x_transformers is None or not isinstance(net, x_transformers.TransformerWrapper):
        return None
    if type(net).forward is not x_transformers.TransformerWrapper.forward or _altered(net):
        return None
    flags = (
        "output_is_log_prob",
        "sigsoftmax_logits",
        "squeeze_out_last_dim",
        "average_pool_embed",
        "has_multiple_heads",
    )
    modules = ("to_mixture", "combine_mixture", "cls_token", "attn_pool")
    if any(getattr(net, flag, False) for flag in flags) or any(getattr(net, m, None) is not None for m in modules):
        return None

    head = net.to_logits
    if type(head) is nn.Linear and not _altered(head):
        return Head(head.weight, head.bias, 1.0)
    embedding = getattr(net.token_emb, "emb", None)
    if _is_tied_lambda(head, net) and type(embedding) is nn.Embedding:
        return Head(embedding.weight, None, getattr(net, "tie_embedding_scale", 1.0))
    return None


def _altered(module: nn.Module) -> bool:
    """Whether hooks or a forward of its own stand between a module and its class."""
    return any(_hooks(module)) or "forward" in vars(module)


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


def _is_tied_lambda(head: object, net: nn.Module) -> bool:
    """Whether ``head`` is the tied head that TransformerWrapper.__init__ made for this very network.

    A deep copy keeps the lambda of the original, with the original's weights.
    """
    if not isinstance(head, FunctionType) or head.__qualname__ != "TransformerWrapper.__init__.<locals>.<lambda>":
        return False
    cells = dict(zip(head.__code__.co_freevars, head.__closure__ or (), strict=True))
    return set(cells) == {"self"} and cells["self"].cell_contents is net
