"""Networks, prompts and wrappers that the tests of generation share."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import torch
from scipy import stats
from torch import nn

from fastmask import NonAutoregressiveWrapper

V, N, MASK = 12, 18, 5


class Known(nn.Module):
    """A network with logits that the test chose, which writes down how it was called."""

    def __init__(self, logits: torch.Tensor, length: int = N) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len, self.emb_dim = logits.shape[-1], length, 4
        self.logits = nn.Parameter(logits.expand(length, -1).clone())
        self.calls: list[dict] = []

    def forward(self, ids, return_embeddings=False, return_logits_and_embeddings=False, **kwargs):
        self.calls.append({"ids": ids.clone(), "training": self.training, **kwargs})
        logits = self.logits[: ids.shape[1]].expand(*ids.shape, -1)
        embeddings = torch.full((*ids.shape, self.emb_dim), float(len(self.calls)), device=ids.device)
        if return_logits_and_embeddings:
            return logits, embeddings
        return embeddings if return_embeddings else logits


def uniform(vocabulary: int = V, length: int = N) -> Known:
    return Known(torch.zeros(vocabulary), length)


def varied(length: int = N) -> Known:
    return Known(torch.randn(length, V, generator=torch.Generator().manual_seed(1)), length)


class Context(nn.Module):
    """A network whose logits depend on all ids at once, so that every difference shows."""

    def __init__(self, length: int = N) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len = V, length
        generator = torch.Generator().manual_seed(3)
        self.table = nn.Parameter(torch.randn(length, V, length, V, generator=generator))

    def forward(self, ids):
        place = torch.arange(ids.shape[1], device=ids.device)
        return self.table[place, ids][:, :, : ids.shape[1]].sum(dim=1)


class Small(nn.Module):
    """All that generation may ask of a network: embeddings that depend on every id, and logits of them. Nothing is
    multiplied as a matrix, so that a sequence gets the same bits in every batch."""

    def __init__(self, length: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len, self.emb_dim = V, length, 4
        self.attn_layers = SimpleNamespace(dim=4)
        generator = torch.Generator().manual_seed(7)
        self.table = nn.Parameter(torch.randn(length, V, length, 4, generator=generator))
        self.head = nn.Parameter(scale * torch.randn(4, V, generator=generator))

    def forward(self, ids, sum_embeds=0.0, return_embeddings=False, return_logits_and_embeddings=False):
        place = torch.arange(ids.shape[1], device=ids.device)
        embeddings = self.table[place, ids][:, :, : ids.shape[1]].sum(dim=1).tanh() + sum_embeds
        if return_embeddings:
            return embeddings
        logits = (embeddings[..., None] * self.head).sum(dim=-2)
        return (logits, embeddings) if return_logits_and_embeddings else logits


def prompts(device, batch: int = 4, length: int = 8) -> dict[str, torch.Tensor]:
    """Row b gives 2b of the positions: none the first, and all the fifth of length 8."""
    generator = torch.Generator().manual_seed(8)
    prompt = torch.randint(0, V, (batch, length), generator=generator)
    order = torch.rand(batch, length, generator=generator).argsort(dim=-1)
    given = order < 2 * torch.arange(batch)[:, None]
    return {"prompt": prompt.to(device), "prompt_mask": given.to(device)}


def wrap(device, net=None, **options) -> NonAutoregressiveWrapper:
    torch.manual_seed(0)
    # The mean loss goes with any schedule, and generation asks nothing of the loss.
    options.setdefault("use_simple_mdlm_loss_weight", False)
    return NonAutoregressiveWrapper(net or varied(), mask_id=MASK, **options).to(device)


class FixedCritic(nn.Module):
    """The same logits [N] for every sequence."""

    def __init__(self, logits) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits, dtype=torch.float32))

    def forward(self, ids):
        return self.logits[: ids.shape[1]].expand(ids.shape)[..., None]


class Jumping(nn.Module):
    """A critic whose mind depends on how much of the sequence is there."""

    def forward(self, ids):
        return torch.sin(7.0 * ids + torch.arange(ids.shape[1], device=ids.device))


def wrap_small(device, length=8, **options) -> NonAutoregressiveWrapper:
    if options.get("token_critic") == "own":
        options["token_critic"] = Jumping()
    return wrap(device, Small(length), **options)


def assert_law(counts, shares, alpha=1e-4, effect=0.06) -> None:
    """A chi-square that does not reject, and a small effect besides: n must be large enough to tell."""
    counts, shares = np.asarray(counts, dtype=float), np.asarray(shares, dtype=float)
    assert counts[shares == 0].sum() == 0
    counts, shares = counts[shares > 0], shares[shares > 0]
    if len(counts) == 1:
        return
    result = stats.chisquare(counts, shares / shares.sum() * counts.sum())
    assert result.pvalue > alpha, (counts, shares)
    beyond_chance = max(0.0, result.statistic - len(counts) + 1)
    assert math.sqrt(beyond_chance / counts.sum()) < effect, (counts, shares)
