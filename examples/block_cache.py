"""Blocks beside a cache: a block-causal network of your own, whose steps run the block alone.

    python examples/block_cache.py

    whole sequences: ... million multiply-adds of the trunk
    beside a cache: ... million, ... times fewer
    beside a cache, prompts of 3 lengths: the same ids: True

The network is random, since only its cost is of interest, and in float64, so that rounding does not change an id. A
Hugging Face decoder has all of this in fastmask.hf.Backbone(model, block_length=32). Runs in seconds on a CPU.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import fastmask

LETTERS, MASK, WIDTH, LENGTH, BLOCK = 26, 26, 32, 192, 12


class Cache:
    """Of each layer, and of the blocks: what is kept of earlier columns, and what the last pass wrote."""

    def __init__(self) -> None:
        self.kept: dict[str, Tensor] = {}
        self.last: dict[str, Tensor] = {}

    def joined(self, name: str, own: Tensor) -> Tensor:
        self.last[name] = own
        return torch.cat([self.kept[name], own], dim=1) if name in self.kept else own

    def commit(self, length: int) -> None:
        self.kept = {name: self.joined(name, own[:, :length]) for name, own in self.last.items()}


class Layer(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.qkv = name, nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, is_hidden: Tensor, cache: Cache | None) -> Tensor:
        q, k, v = self.qkv(F.rms_norm(x, x.shape[-1:])).chunk(3, dim=-1)
        if cache is not None:
            k, v = cache.joined(f"{self.name} k", k), cache.joined(f"{self.name} v", v)
        scores = (q @ k.mT / WIDTH**0.5).masked_fill(is_hidden, -torch.inf)
        x = x + scores.softmax(dim=-1) @ v
        return x + self.down(F.gelu(self.up(F.rms_norm(x, x.shape[-1:]))))


class Network(nn.Module):
    num_tokens, max_seq_len = LETTERS + 1, LENGTH
    is_block_causal = True

    def __init__(self) -> None:
        super().__init__()
        self.ids, self.positions = nn.Embedding(LETTERS + 1, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.layers = nn.ModuleList(Layer(str(i)) for i in range(2))
        self.out = nn.Linear(WIDTH, LETTERS + 1)

    def linear_head(self) -> fastmask.Head:
        return fastmask.Head(self.out.weight, self.out.bias)

    def start_cache(self, length: int) -> Cache:
        return Cache()

    def forward(
        self,
        ids: Tensor,
        positions: Tensor | None = None,
        blocks: Tensor | None = None,
        cache: Cache | None = None,
        return_embeddings: bool = False,
    ) -> Tensor:
        positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions
        blocks = positions // BLOCK if blocks is None else blocks
        seen = blocks if cache is None else cache.joined("blocks", blocks)
        is_hidden = seen[:, None, :] > blocks[:, :, None]
        x = self.ids(ids) + self.positions(positions)
        for layer in self.layers:
            x = layer(x, is_hidden, cache)
        return x if return_embeddings else self.out(x)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="of a block")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    model = fastmask.NonAutoregressiveWrapper(Network().double(), mask_id=MASK, steps=options.steps)

    def generate(cache: bool, **prompt: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return model.generate(block_length=BLOCK, cache=cache, generator=generator, **prompt)

    counts = []
    prompt = torch.randint(LETTERS, (1, 16))
    for cache in (False, True):
        with FlopCounterMode(display=False) as counter:
            generate(cache, prompt=prompt)
        counts.append(sum(counter.get_flop_counts()["Network"].values()) // 2 / 1e6)
    print(f"whole sequences: {counts[0]:.0f} million multiply-adds of the trunk")
    print(f"beside a cache: {counts[1]:.0f} million, {counts[0] / counts[1]:.0f} times fewer")

    prompts = torch.randint(LETTERS, (3, 64))
    is_given = torch.arange(64) < torch.tensor([5, 31, 64])[:, None]
    ids = [generate(cache, prompt=prompts, prompt_mask=is_given) for cache in (False, True)]
    print(f"beside a cache, prompts of {len(prompts)} lengths: the same ids: {torch.equal(*ids)}")


if __name__ == "__main__":
    main()
