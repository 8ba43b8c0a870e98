"""The demo's network, and its training."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import math
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import Dataset

from fastmask import _progress
from fastmask.demo import checkpoints
from fastmask.demo.tasks import Task
from fastmask.wrapper import NonAutoregressiveWrapper


@dataclass(frozen=True)
class Recipe:
    """How the network is built and trained. It is sampled by generate's defaults."""

    dim: int = 64
    depth: int = 4
    heads: int = 4
    batch_size: int = 64
    learning_rate: float = 6e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.01
    warm_up: int = 50
    weight_average: float = 0.99


RECIPE = Recipe()


def build(task: Task) -> NonAutoregressiveWrapper:
    """A small encoder; for images its positions start as sines of row and column, and each token also sees its
    neighbours (x-transformers' token shift), which an image of 64 pixels learns from soonest."""
    from x_transformers import Encoder, TransformerWrapper

    net = TransformerWrapper(
        num_tokens=task.num_tokens,
        max_seq_len=task.seq_len,
        attn_layers=Encoder(
            dim=RECIPE.dim,
            depth=RECIPE.depth,
            heads=RECIPE.heads,
            attn_dim_head=RECIPE.dim // RECIPE.heads,
            attn_flash=True,
            ff_mult=2,
            shift_tokens=2 if task.row_length is None else task.row_length + 1,
        ),
    )
    if task.row_length is not None:
        with torch.no_grad():
            net.pos_emb.emb.weight.copy_(_row_and_column_waves(task.row_length, RECIPE.dim))
    # No kept or random tokens: the loss then is the bound itself.
    return NonAutoregressiveWrapper(
        net, mask_id=task.mask_id, no_replace_prob=0.0, random_token_prob=0.0, stratified_times=True
    )


def _row_and_column_waves(side: int, dim: int) -> Tensor:
    """[side * side, dim]: sines and cosines of the row and the column."""
    frequency = math.pi * torch.linspace(1 / 16, 0.8, dim // 4)
    row, column = torch.meshgrid(torch.arange(float(side)), torch.arange(float(side)), indexing="ij")
    waves = [wave(place.reshape(-1, 1) * frequency) for place in (row, column) for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, dim=-1) * math.sqrt(2.0)


def train(
    model: NonAutoregressiveWrapper, task: Task, arguments: argparse.Namespace
) -> NonAutoregressiveWrapper | None:
    """The average of the weights over the last steps; None after Ctrl-C. Either way a checkpoint is written.

    A resumed run ends where an uninterrupted one does: the checkpoint holds the random state too, and the order of
    the data follows from the seed and the step.
    """
    from tqdm.auto import tqdm

    optimizer = torch.optim.AdamW(_parameter_groups(model), lr=RECIPE.learning_rate, betas=RECIPE.betas)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate(arguments.steps))
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(RECIPE.weight_average))
    parts = {"model": model, "average": average, "optimizer": optimizer, "scheduler": scheduler}
    done, seed = 0, arguments.seed
    if arguments.resume:
        done, seed = checkpoints.load_checkpoint(arguments.checkpoint, identity(task), parts, arguments.device)
    batches = _endless_batches(task.train, seed, done)
    smooth = None
    # So small a network gains little from a second CPU thread, and beside another program loses a lot by it.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (
            _ctrl_c() as pressed,
            tqdm(total=arguments.steps, initial=done, desc="training", unit="step", **_progress.pace(tqdm)) as bar,
        ):
            while done < arguments.steps and not pressed:
                loss = model(next(batches).to(arguments.device)).loss
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                scheduler.step()
                average.update_parameters(model)
                done += 1
                smooth = loss.detach() if smooth is None else smooth.lerp(loss.detach(), 0.05)
                if done % 10 == 0:
                    bar.set_postfix_str(f"bound {smooth.item() / math.log(2):.2f} bits/token", refresh=False)
                bar.update()
    finally:
        torch.set_num_threads(threads)
    random = checkpoints.random_state(arguments.device)
    states = {name: part.state_dict() for name, part in parts.items()}  # type: ignore[attr-defined]
    checkpoints.save_checkpoint(
        {"done": done, "seed": seed, "task": identity(task), "random": random, **states}, arguments.checkpoint
    )
    averaged: NonAutoregressiveWrapper = average.module  # type: ignore[assignment]
    return None if pressed else averaged


@contextlib.contextmanager
def _ctrl_c() -> Iterator[list[int]]:
    """A list that Ctrl-C adds to instead of breaking off a step, so that a checkpoint holds whole steps only."""
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which alone may hear signals
        yield pressed
        return
    before = signal.signal(signal.SIGINT, lambda number, _: pressed.append(number))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def identity(task: Task) -> dict[str, Any]:
    """What a checkpoint must have in common with a task, and a network with another, to go on."""
    sizes = {"num_tokens": task.num_tokens, "seq_len": task.seq_len, "sequences": len(task.train)}  # type: ignore[arg-type]
    return {**sizes, "characters": task.characters, "recipe": repr(dataclasses.astuple(RECIPE))}


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay on the layers' matrices only."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "attn_layers" in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        {"params": matrices, "weight_decay": RECIPE.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _learning_rate(steps: int) -> Callable[[int], float]:
    """Linear warm-up, then half a cosine down to 0."""
    return lambda step: min((step + 1) / RECIPE.warm_up, 1.0) * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def _endless_batches(dataset: Dataset[Tensor], seed: int, start: int) -> Iterator[Tensor]:
    """The batches of step `start` and after: every epoch in an order of its own, known from seed and epoch alone."""
    count = len(dataset)  # type: ignore[arg-type]
    size = min(RECIPE.batch_size, count)
    generator = torch.Generator().manual_seed(seed)
    for epoch in itertools.count():
        batches = torch.randperm(count, generator=generator).split(size)[: count // size]
        for step, rows in enumerate(batches, epoch * len(batches)):
            if step >= start:
                yield torch.stack([dataset[i] for i in rows.tolist()])
