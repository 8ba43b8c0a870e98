"""A head whose vocabulary is split over processes: each has some rows of the weight, and no one a row of all logits.

    torchrun --standalone --nproc-per-node 2 examples/vocabulary_parallel.py
    python examples/vocabulary_parallel.py

    1 of 2 processes: ids 0 to 4095 of 8192, of which 17 are any
    ... nats a letter at step 0 (uniform: 2.77)
    ...
    ... of the letters count on

Both commands train alike, and generate the same ids, up to rounding. The network and the data are those of
``own_network.py`` beside this file, its embeddings, which are the head's weight too, padded for two processes. All
processes see the same batch. Runs in a minute on a CPU.
"""

from __future__ import annotations

import argparse
import math
import os

import torch
import torch.distributed as dist
from own_network import LENGTH, LETTERS, Network, sequences
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

from fastmask import NonAutoregressiveWrapper
from fastmask.distributed import padded_vocabulary


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    options = parser.parse_args(arguments)

    torch.manual_seed(0)  # on all processes: the same weights, batches and masks
    num_rows = padded_vocabulary(LETTERS + 1, 2)
    net = Network(num_rows, LENGTH)
    net.num_tokens = LETTERS + 1  # the other rows pad the vocabulary
    is_first = True
    if "RANK" in os.environ:  # torchrun says so
        mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
        # The weight becomes a DTensor, split by ids; the layer sums what each process looks up.
        style = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        parallelize_module(net.token, mesh, style)
        rank, size = mesh.get_local_rank(), mesh.size()
        rows = net.token.weight.to_local().shape[0]
        print(f"{rank + 1} of {size} processes: ids {rank * rows} to {(rank + 1) * rows - 1} of {num_rows}, of which "
              f"{net.num_tokens} are any")  # fmt: skip
        is_first = rank == 0
    model = NonAutoregressiveWrapper(
        net, mask_id=LETTERS, no_replace_prob=0.0, random_token_prob=0.0, stratified_times=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(1)
    for step in range(options.steps + 1):
        if step % max(1, options.steps // 3) == 0:
            bound = model.nelbo(sequences(torch.arange(LETTERS)), num_samples=4, seed=0).item()
            if is_first:
                print(f"{bound:.3f} nats a letter at step {step} (uniform: {math.log(LETTERS):.2f})")
        model(sequences(torch.randint(LETTERS, (64,), generator=generator)), generator=generator).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ids = model.generate(64, generator=generator, filter_thres=None)
    if is_first:
        correct = (ids[:, 1:] - ids[:, :-1]) % LETTERS == 1
        print(f"{correct.float().mean().item():.0%} of the letters count on")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
