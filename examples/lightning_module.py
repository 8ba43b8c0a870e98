"""A wrapper in a LightningModule, trained by Lightning's Trainer, on one process or several.

    python examples/lightning_module.py
    python examples/lightning_module.py --processes 2

    ... nats a letter at step 0 (uniform: 2.77)
    ... nats a letter at step 200

The network and the data are those of ``own_network.py`` beside this file. Needs the extra train. Runs in a quarter
of a minute on a CPU.
"""

from __future__ import annotations

import argparse
import math

import lightning
import torch
from own_network import LETTERS, new_model, sequences
from torch.utils.data import DataLoader


class Masked(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = new_model()
        self.draws = torch.Generator().manual_seed(0)  # of one seed on all processes

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        group = torch.distributed.group.WORLD if self.trainer.world_size > 1 else None
        losses = self.model(batch, process_group=group, generator=self.draws)
        self.log("loss", losses.loss, sync_dist=True)
        return losses.loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)

    lightning.seed_everything(0, verbose=False)
    module = Masked()
    held_out = sequences(torch.arange(LETTERS))

    def bound() -> float:
        return module.model.nelbo(held_out, num_samples=4, seed=0).item()

    first = bound()
    trainer = lightning.Trainer(
        accelerator="cpu", devices=options.processes, max_steps=options.steps, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    tokens = sequences(torch.randint(LETTERS, (64 * options.steps,)))
    trainer.fit(module, DataLoader(tokens, batch_size=64 // options.processes))
    if trainer.is_global_zero:
        print(f"{first:.3f} nats a letter at step 0 (uniform: {math.log(LETTERS):.2f})")
        print(f"{bound():.3f} nats a letter at step {trainer.global_step}")


if __name__ == "__main__":
    main()
