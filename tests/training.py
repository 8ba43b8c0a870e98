"""Networks, wrappers and clean tokens that the tests of training share."""

from __future__ import annotations

import torch
from torch import nn
from x_transformers import Encoder, TransformerWrapper

from fastmask import NonAutoregressiveWrapper, Schedule

V, N, MASK = 12, 6, 11
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "callable": lambda t: 1 - t**2,
    "Schedule": Schedule(lambda t: (1 - t) ** 1.5, lambda t: -1.5 * (1 - t) ** 0.5),
}
CRITICS = ["none", "own", "self"]


def transformer(outputs: int | None = None, **options) -> TransformerWrapper:
    layers = Encoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    return TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=layers, logits_dim=outputs, **options)


def build(device, kind=NonAutoregressiveWrapper, *, critic="none", net=None, **options):
    torch.manual_seed(0)
    net = transformer() if net is None else net
    if critic == "own":
        options["token_critic"] = transformer(outputs=1)
    return kind(net, mask_id=MASK, self_token_critic=critic == "self", **options).to(device)


def clean(device, batch: int = 8) -> torch.Tensor:
    return torch.randint(0, V - 1, (batch, N), generator=torch.Generator().manual_seed(1)).to(device)


class Recorder(nn.Module):
    """A network with embeddings of its own that writes down how it was called."""

    def __init__(self, outputs: int = V) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len, self.emb_dim = V, N, 4
        self.embedding = nn.Embedding(V, 4)
        self.head = nn.Linear(4, outputs)
        self.calls: list[dict] = []

    def forward(self, ids, return_embeddings=False, return_logits_and_embeddings=False, **kwargs):
        self.calls.append({"ids": ids.clone(), "grad": torch.is_grad_enabled(), **kwargs})
        embeddings = self.embedding(ids) + kwargs.get("sum_embeds", 0.0)
        if return_logits_and_embeddings:
            return self.head(embeddings), embeddings
        return embeddings if return_embeddings else self.head(embeddings)


class Table(nn.Module):
    """A network that looks its logits up: one table [n, V] for each set of masked positions."""

    def __init__(self, length: int, vocabulary: int = 5, seed: int = 0) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len, self.mask_id = vocabulary, length, vocabulary - 1
        values = torch.randn(2**length, length, vocabulary, generator=torch.Generator().manual_seed(seed))
        self.table = nn.Parameter(2 * values)

    def forward(self, ids):
        bits = 2 ** torch.arange(self.max_seq_len, device=ids.device)
        return self.table[((ids == self.mask_id) * bits).sum(dim=-1)]
