"""Token critics: which tokens of a sequence look wrong.

Source: Lezama et al., "Improved masked image generation with Token-Critic",
https://arxiv.org/abs/2209.04439; the self critic shares the generator's trunk (after Nijkamp et al.,
https://aclanthology.org/2021.naacl-main.409/).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmask.heads import logits_in


class SelfCritic(nn.Module):
    """A linear probe on the generator's own embeddings.

    Args:
        net: a network with ``return_embeddings=True``.
        width: of its embeddings; None where nobody knows.
    """

    def __init__(self, net: nn.Module, width: int | None) -> None:
        super().__init__()
        if width is None:
            raise ValueError(
                "expected self_token_critic=True with a network that has emb_dim and return_embeddings= "
                f"(x_transformers.TransformerWrapper), received {type(net).__name__}; give token_critic= instead"
            )
        self.net = net
        self.to_logits = nn.Linear(width, 1)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Logits [B, N, 1] that the token of ids x [B, N] is wrong; kwargs go to the network."""
        logits: Tensor = self.to_logits(self.net(x, return_embeddings=True, **kwargs))
        return logits


def critic_logits(critic: nn.Module, ids: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The critic's logits [B, N] on ids [B, N].

    ``kwargs`` are the network's: the critic gets those that its forward takes, and without cross-attention
    it is spared the context.
    """
    parameters = inspect.signature(getattr(critic, "forward", critic)).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        kwargs = {name: value for name, value in kwargs.items() if name in parameters}
    if getattr(getattr(critic, "attn_layers", None), "cross_attend", None) is False:
        kwargs = {name: value for name, value in kwargs.items() if name not in ("context", "context_mask")}
    logits: Any = logits_in(critic(ids.clone(), **kwargs))  # it may write into them
    if not isinstance(logits, Tensor):
        raise TypeError(f"expected token_critic(ids [B, N]) to return logits, received {type(logits).__name__}")
    if logits.shape == (*ids.shape, 1):
        logits = logits.squeeze(-1)
    if logits.shape != ids.shape:
        raise ValueError(
            f"expected token_critic(ids [B, N] = {list(ids.shape)}) to return [B, N, 1] or [B, N], received "
            f"{list(logits.shape)}; build it with logits_dim=1"
        )
    return logits


def critic_loss(logits: Tensor, is_wrong: Tensor, maskable: Tensor | None, num_maskable: Tensor | float) -> Tensor:
    """Binary cross-entropy, nats, of logits [B, N] against is_wrong [B, N] bool: the mean over what is maskable.

    Float32, or float64 of float64 logits.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = F.binary_cross_entropy_with_logits(logits, is_wrong.to(logits.dtype), reduction="none")
    losses = losses if maskable is None else losses.where(maskable, 0.0)
    if isinstance(num_maskable, Tensor):
        num_maskable = num_maskable.to(losses.dtype)  # which a float64 scalar would change
    return losses.sum() / num_maskable
