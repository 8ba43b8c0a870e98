"""Learn the characters of a text of your own, measure the bound, fill in the rest of a line.

    python examples/text.py my.txt --prompt "The "

    training    4.21 bits a character after step 100
    ...
    held out: 2.90 bits a character
    'The ...'

Needs x-transformers. 700 steps take about two minutes on one core of a CPU.
"""

from __future__ import annotations

import argparse
import math
import pathlib

import torch
from torch.utils.data import DataLoader, Subset
from x_transformers import Encoder, TransformerWrapper

from fastmask import NonAutoregressiveWrapper
from fastmask.data import from_text


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--length", type=int, default=64, help="characters in a sequence")
    parser.add_argument("--prompt", default="")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)

    characters = sorted(set(options.text.read_text(encoding="utf-8")))
    index = {character: i for i, character in enumerate(characters)}
    mask_id = len(characters)  # one id more than there are characters
    windows = from_text(
        [options.text],
        lambda text: [index[character] for character in text],
        options.length,
        num_tokens=mask_id + 1,
        mask_id=mask_id,
        tail="drop",
    )
    cut = len(windows) - max(1, len(windows) // 10)
    train, held_out = Subset(windows, range(cut)), Subset(windows, range(cut, len(windows)))

    net = TransformerWrapper(
        num_tokens=mask_id + 1, max_seq_len=options.length, attn_layers=Encoder(dim=128, depth=4, heads=4)
    )
    # Without kept and random tokens the loss is the bound itself.
    model = NonAutoregressiveWrapper(
        net, mask_id=mask_id, no_replace_prob=0.0, random_token_prob=0.0, stratified_times=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = 0
    while step < options.steps:
        for tokens in DataLoader(train, batch_size=min(64, len(train)), shuffle=True, drop_last=True):
            loss = model(tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 100 == 0:
                print(f"training    {loss.item() / math.log(2):.2f} bits a character after step {step}")
            if step == options.steps:
                break

    print(f"held out: {model.nelbo(held_out, num_samples=4, seed=0).item() / math.log(2):.2f} bits a character")
    prompt = torch.tensor([[index[character] for character in options.prompt]], dtype=torch.int64)
    for ids in model.generate(batch_size=4, prompt=prompt.expand(4, -1), steps=options.length).tolist():
        print(repr("".join(characters[i] for i in ids)))


if __name__ == "__main__":
    main()
