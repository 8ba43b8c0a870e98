"""Blocks from left to right, as LLaDA, Fast-dLLM and SDAR decode, with a threshold, an end, and each step seen.

    python examples/blocks.py

    loss ... nats a token at step 0
    ...
    ... passes for 24 positions

The data count up from a random first letter and end with "." where "z" would follow. Needs x-transformers. Half a
minute on one core of a CPU.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor
from x_transformers import Encoder, TransformerWrapper

from fastmask import NonAutoregressiveWrapper

LENGTH, LAST, END, MASK = 24, 24, 25, 26  # 0 is a, 24 is y


def batch(size: int) -> Tensor:
    """[B, N]: first letters at random, those after them, and ends."""
    ids = torch.randint(LAST, (size, 1)) + torch.arange(LENGTH)
    return ids.where(ids <= LAST, END)


def letters(ids: Tensor) -> str:
    return "".join("_" if i == MASK else "." if i == END else chr(ord("a") + i) for i in ids.tolist())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--prompt", default="abc")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    net = TransformerWrapper(num_tokens=27, max_seq_len=LENGTH, attn_layers=Encoder(dim=64, depth=2, heads=4))
    model = NonAutoregressiveWrapper(
        net, mask_id=MASK, no_replace_prob=0.0, random_token_prob=0.0, stratified_times=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(options.steps):
        loss = model(batch(64)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"loss {loss.item():.2f} nats a token at step {step}")

    prompt = torch.tensor([[ord(letter) - ord("a") for letter in options.prompt]])
    for state in model.generate_steps(
        prompt=prompt, block_length=8, threshold=0.9, start_temperature=0.0, filter_thres=None, eos_id=END
    ):
        print(letters(state.ids[0]))
    print(f"{int(state.passes[0])} passes for {LENGTH} positions")


if __name__ == "__main__":
    main()
