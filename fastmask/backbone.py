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
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from fastmask import _copies, functional
from fastmask.functional import MaskedTokens, Sampled


class Head(NamedTuple):
    """logits = F.linear(embeddings * scale, weight, bias); weight [V, D], bias [V] or None."""

    weight: Tensor
    bias: Tensor | None
    scale: float

    def scaled(self, embeddings: Tensor) -> Tensor:
        return embeddings if self.scale == 1.0 else embeddings * self.scale


class Output(NamedTuple):
    """What a network gave for [B, N] ids: logits [B, N, V], or embeddings [B, N, D] with the head."""

    logits: Tensor | None
    embeddings: Tensor | None
    head: Head | None

    def loss(
        self,
        targets: Tensor,
        masked: MaskedTokens,
        weights: Tensor | None,
        denominator: Any,
        num_masked: int | None,
    ) -> Tensor:
        """Masked cross-entropy, "mean"; arguments as in :func:`fastmask.functional.linear_masked_cross_entropy`."""
        if self.head is None:
            assert self.logits is not None
            out = functional.masked_cross_entropy(
                self.logits, targets, masked.is_masked, weights, denominator=denominator
            )
        else:
            assert self.embeddings is not None
            out = functional.linear_masked_cross_entropy(
                self.head.scaled(self.embeddings),
                self.head.weight,
                targets,
                weights=weights,
                bias=self.head.bias,
                row_indices=masked.row_indices,
                num_masked=num_masked,
                denominator=denominator,
            )
        return out.loss

    def sample(self, row_indices: Tensor, **options: Any) -> Sampled:
        """Samples the rows ``row_indices`` [M]; options and result as :func:`fastmask.functional.sample_tokens`."""
        if self.head is None:
            assert self.logits is not None
            return functional.sample_tokens(self.logits, row_indices=row_indices, **options)
        assert self.embeddings is not None
        return functional.linear_sample_tokens(
            self.head.scaled(self.embeddings),
            self.head.weight,
            bias=self.head.bias,
            row_indices=row_indices,
            **options,
        )

    def logits_of(self, row_indices: Tensor) -> Tensor:
        """The logits [M, V] of the rows ``row_indices`` [M]."""
        if self.head is None:
            assert self.logits is not None
            return rearrange(self.logits, "b n v -> (b n) v")[row_indices]
        assert self.embeddings is not None
        rows = rearrange(self.embeddings, "b n d -> (b n) d")[row_indices]
        return F.linear(self.head.scaled(rows), self.head.weight, self.head.bias)


def run(net: Any, ids: Tensor, *, with_embeddings: bool = False, **kwargs: Any) -> Output:
    """The network on ids [B, N]: embeddings and head where the head is linear, else logits.

    Args:
        with_embeddings: embeddings are wanted even beside logits (self-conditioning).
        kwargs: passed to the network.
    """
    # x-transformers cuts prepended embeddings off again on its way to logits only.
    head = None if kwargs.get("excise_prepend_embeds") else linear_head(net)
    if head is not None:
        return Output(None, _of_each_token("embeddings", "D", net(ids, return_embeddings=True, **kwargs), ids), head)
    if with_embeddings:
        logits, embeddings = net(ids, return_logits_and_embeddings=True, **kwargs)
        return Output(_of_each_token("logits", "V", logits, ids), embeddings, None)
    return Output(_of_each_token("logits", "V", net(ids, **kwargs), ids), None, None)


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
    return _copies.device_of(net, torch.get_default_device())


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
