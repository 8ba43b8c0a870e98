"""Training, evaluation and generation on several processes, as one process does them.

    torchrun --standalone --nproc-per-node 2 examples/ddp.py
    python examples/ddp.py

    1 of 2 processes: 32 of 64 sequences a step
    ... nats a letter at step 0 (uniform: 2.77)
    ...
    ... of the letters count on

Both commands train alike, up to rounding, which grows with the steps. The network and the data are those of
``own_network.py`` beside this file. Runs in half a minute on a CPU.
"""

from __future__ import annotations

import argparse
import math
import os

import torch
import torch.distributed as dist
from own_network import LENGTH, LETTERS, new_model, sequences
from torch.nn.parallel import DistributedDataParallel


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64, help="sequences a step, of all processes")
    options = parser.parse_args(arguments)

    if "RANK" in os.environ:  # torchrun says so
        dist.init_process_group("gloo")
    group = dist.group.WORLD  # None where there is one process
    rank, size = (0, 1) if group is None else (group.rank(), group.size())
    part = slice(rank * options.batch // size, (rank + 1) * options.batch // size)
    print(f"{rank + 1} of {size} processes: {part.stop - part.start} of {options.batch} sequences a step")

    torch.manual_seed(0)
    model = new_model()
    parallel = model if group is None else DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    # One seed on all ranks: each row draws what it would draw in one process.
    generator = torch.Generator().manual_seed(0)
    batches = torch.Generator().manual_seed(1)
    held_out = sequences(torch.arange(LETTERS))[rank * LETTERS // size : (rank + 1) * LETTERS // size]
    place = {"sample_offset": part.start, "global_batch_size": options.batch}
    for step in range(options.steps + 1):
        if step % 50 == 0:
            bound = model.nelbo(held_out, num_samples=4, seed=0, process_group=group).item()
            if rank == 0:
                print(f"{bound:.3f} nats a letter at step {step} (uniform: {math.log(LETTERS):.2f})")
        tokens = sequences(torch.randint(LETTERS, (options.batch,), generator=batches))[part]
        parallel(tokens, process_group=group, generator=generator, **place).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ids = model.generate(len(tokens), generator=generator, sample_offset=part.start, filter_thres=None)
    correct = ((ids[:, 1:] - ids[:, :-1]) % LETTERS == 1).sum()
    if group is not None:
        dist.all_reduce(correct)
        dist.destroy_process_group()
    if rank == 0:
        print(f"{correct.item() / (options.batch * (LENGTH - 1)):.0%} of the letters count on")


if __name__ == "__main__":
    main()
