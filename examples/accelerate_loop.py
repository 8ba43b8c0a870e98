"""A training loop with Hugging Face's accelerate: gradient accumulation.

    python examples/accelerate_loop.py

    1 process
    ... nats a letter at step 0 (uniform: 2.77)
    ...

The network and the data are those of ``own_network.py`` beside this file. Needs the extra train. Runs in a quarter
of a minute on a CPU.
"""

from __future__ import annotations

import argparse
import math

import torch
from accelerate import Accelerator
from own_network import LETTERS, new_model, sequences
from torch.utils.data import DataLoader

PARTS = 2


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args(arguments)

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    rank, size = accelerator.process_index, accelerator.num_processes
    accelerator.print(f"{size} process{'es' * (size > 1)}")
    torch.manual_seed(0)
    wrapper = new_model()
    tokens = sequences(torch.randint(LETTERS, (64 * PARTS * options.steps,)))
    loader = DataLoader(tokens, batch_size=64 // size)
    optimizer = torch.optim.AdamW(wrapper.parameters(), lr=3e-3)
    model, optimizer, loader = accelerator.prepare(wrapper, optimizer, loader)
    generator = torch.Generator().manual_seed(0)  # of one seed on all processes
    held_out = sequences(torch.arange(LETTERS))
    for number, batch in enumerate(loader):
        if number % (50 * PARTS) == 0:
            bound = wrapper.nelbo(held_out, num_samples=4, seed=0).item()
            accelerator.print(
                f"{bound:.3f} nats a letter at step {number // PARTS} (uniform: {math.log(LETTERS):.2f})"
            )
        with accelerator.accumulate(model):
            # The whole step's tokens, by the processes that gradients are averaged over; accelerate divides by PARTS.
            num_tokens = batch.numel() * PARTS
            loss = model(batch, num_tokens=num_tokens, generator=generator, sample_offset=rank * len(batch)).loss
            accelerator.backward(PARTS * loss)
            optimizer.step()
            optimizer.zero_grad()
    bound = wrapper.nelbo(held_out, num_samples=4, seed=0).item()
    accelerator.print(f"{bound:.3f} nats a letter at step {options.steps}")


if __name__ == "__main__":
    main()
