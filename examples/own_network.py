"""A network of your own: what it has to offer, and the head that it declares.

    python examples/own_network.py

    linear head: True
    loss ... nats a token at step 0 (uniform: 2.77)
    ...
    ... of the letters count on, from 16 first ones

The data are sequences that count: 3 4 5 6 ..., modulo 16. Runs in half a minute on a CPU.
"""

from __future__ import annotations

import argparse
import math

import torch
from torch import Tensor, nn

from fastmask import Head, NonAutoregressiveWrapper

LETTERS, LENGTH = 16, 12


class Network(nn.Module):
    """ids [B, N] to logits [B, N, V], seeing both sides; and, on demand, what its linear head would take.

    All that must be there is ``forward``, ``num_tokens`` (V, the mask among them) and ``max_seq_len``. A declared
    head spares the logits of positions that are not masked.
    """

    def __init__(self, num_tokens: int, max_seq_len: int, width: int = 64) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len = num_tokens, max_seq_len
        self.token = nn.Embedding(num_tokens, width)
        self.position = nn.Parameter(0.02 * torch.randn(max_seq_len, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)

    def linear_head(self) -> Head:
        return Head(self.token.weight, scale=self.token.embedding_dim**-0.5)  # tied to the embeddings

    def forward(self, ids: Tensor, return_embeddings: bool = False) -> Tensor:
        x = self.norm(self.layers(self.token(ids) + self.position[: ids.shape[1]]))
        return x if return_embeddings else self.linear_head().logits(x).of_rows(x)


def new_model() -> NonAutoregressiveWrapper:
    return NonAutoregressiveWrapper(
        Network(LETTERS + 1, LENGTH),
        mask_id=LETTERS,
        no_replace_prob=0.0,
        random_token_prob=0.0,
        stratified_times=True,
    )


def sequences(starts: Tensor) -> Tensor:
    """Letters [B, N] that count on from the first ones [B]."""
    return (starts[:, None] + torch.arange(LENGTH)) % LETTERS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    model = new_model()
    print("linear head:", model.has_linear_head)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(options.steps):
        loss = model(sequences(torch.randint(LETTERS, (64,)))).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"loss {loss.item():.2f} nats a token at step {step} (uniform: {math.log(LETTERS):.2f})")

    ids = model.generate(batch_size=64, filter_thres=None)
    counts_on = (ids[:, 1:] - ids[:, :-1]) % LETTERS == 1
    print(f"{counts_on.float().mean().item():.0%} of the letters count on, from {len(ids[:, 0].unique())} first ones")
    print(ids[0].tolist())


if __name__ == "__main__":
    main()
