"""A Hugging Face decoder as a masked model: its causal mask is lifted, its padding is not seen.

    python examples/decoder_hugging_face.py

    linear head: lm_head, as a run has shown
    loss ... nats a token at step 0 (uniform: 2.77)
    ...
    ... of the letters count on, from 16 first ones

The data are sequences of 6 to 12 letters that count: 3 4 5 6 ..., modulo 16. For a model that was trained as a
decoder put its from_pretrained in place of the configuration; one of its tokens, or a new one, is the mask. Needs
transformers. Runs in half a minute on a CPU.
"""

from __future__ import annotations

import argparse
import math

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from fastmask import NonAutoregressiveWrapper
from fastmask.hf import Backbone

LETTERS, LENGTH = 16, 12
MASK, PADDING = LETTERS, LETTERS + 1


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    config = Qwen3Config(
        vocab_size=LETTERS + 2, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, intermediate_size=128, max_position_embeddings=LENGTH, pad_token_id=PADDING,
    )  # fmt: skip
    net = Backbone(Qwen3ForCausalLM(config), bidirectional=True)
    print(f"linear head: {net.head_reason}")
    model = NonAutoregressiveWrapper(
        net, mask_id=MASK, no_replace_prob=0.0, random_token_prob=0.0, stratified_times=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(options.steps):
        is_token = torch.arange(LENGTH) < torch.randint(6, LENGTH + 1, (64, 1))
        letters = (torch.randint(LETTERS, (64, 1)) + torch.arange(LENGTH)) % LETTERS
        tokens = letters.where(is_token, PADDING)
        loss = model(tokens, maskable=is_token, attention_mask=is_token.long()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"loss {loss.item():.2f} nats a token at step {step} (uniform: {math.log(LETTERS):.2f})")

    ids = model.generate(batch_size=64, filter_thres=None, forbidden=[PADDING])
    counts_on = (ids[:, 1:] - ids[:, :-1]) % LETTERS == 1
    print(f"{counts_on.float().mean().item():.0%} of the letters count on, from {len(ids[:, 0].unique())} first ones")
    print(ids[0].tolist())


if __name__ == "__main__":
    main()
