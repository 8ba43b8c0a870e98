"""What the ranks of tests/test_distributed.py do, each in a process of its own, and what one process does instead.

    python tests/rank_cases.py folder

writes folder/report.json: by how much the two differ, by name of the case. Ranks are forked, so that torch and
x-transformers are imported once.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
import torch.multiprocessing
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset
from training import N, build, clean

from fastmask.distributed import shard

CPU = torch.device("cpu")
# By the size of a group, how many rows each rank has: alike, of several sizes, and none on one of them.
SIZES = {2: {"alike": [3, 3], "several": [5, 2], "none": [0, 4]},
         4: {"alike": [2, 2, 2, 2], "several": [3, 1, 4, 2], "none": [2, 0, 3, 1]}}  # fmt: skip
MEAN = {"use_simple_mdlm_loss_weight": False}
OPTIONS: dict[str, dict[str, Any]] = {
    "weighted": {},
    "mean": MEAN,
    "token gate": {"schedule": 0.4, "gate": "token"},
    "bernoulli": {"mask_mode": "bernoulli"},
    "stratified": {"stratified_times": True},
    "self-conditioned": {"self_cond": True, "self_cond_train_prob": 0.5},
    "own critic": {"critic": "own"},
    "self critic": {"critic": "self"},
    "everything": {**MEAN, "critic": "self", "self_cond": True, "stratified_times": True, "mask_mode": "bernoulli"},
    "compat": {"compat": True, "self_cond": True},
    "compat mean": {"compat": True, **MEAN},
}
STEPS = 3  # in which both sides of a coin of .5 are seen
DTYPES = {"float64": torch.float64, "float32": torch.float32}


def distance(ours: Tensor, expected: Tensor) -> float:
    """The norm of the difference, as a share of the expected norm."""
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    ours, expected = ours.detach(), expected.detach()
    return float((ours - expected).norm() / expected.norm().clamp(min=1e-30))


def largest(ours: Iterable[Tensor], expected: Iterable[Tensor]) -> float:
    return max(distance(*pair) for pair in zip(ours, expected, strict=True))


class Whole:
    """A batch, and the part of it that is a rank's."""

    def __init__(self, group: dist.ProcessGroup, sizes: list[int], *, padded: bool) -> None:
        self.group, self.sizes = group, sizes
        self.tokens = clean(CPU, sum(sizes))
        self.maskable = None
        if padded:  # on the left, 5, 3, 1, 6, ...: of four ranks of several rows the second has nothing to mask
            padding = (torch.arange(sum(sizes)) + 1) * 5 % (N + 1)
            self.maskable = torch.arange(N) >= padding[:, None]
        self.first = sum(sizes[: group.rank()])
        self.rows = slice(self.first, self.first + sizes[group.rank()])

    def part(self, values: Tensor | None) -> Tensor | None:
        return None if values is None else values[self.rows]

    def place(self) -> dict[str, int]:
        """What a rank says where sizes differ."""
        if len(set(self.sizes)) == 1:
            return {}
        return {"sample_offset": self.first, "global_batch_size": len(self.tokens)}

    def mean(self, value: Tensor) -> Tensor:
        value = value.detach().clone()
        dist.all_reduce(value, group=self.group)
        return value / self.group.size()


def gradients(model) -> list[Tensor]:
    return [parameter.grad for parameter in model.parameters()]


def training(whole: Whole, options: dict[str, Any], dtype: torch.dtype) -> float:
    """DDP's losses and gradients over some steps, against one process's."""
    model, alone = (build(CPU, **options).to(dtype) for _ in range(2))
    parallel = DistributedDataParallel(model, process_group=whole.group)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    worst = 0.0
    for _ in range(STEPS):
        losses = parallel(
            whole.part(whole.tokens),
            maskable=whole.part(whole.maskable),
            process_group=whole.group,
            generator=generators[0],
            **whole.place(),
        )
        losses.loss.backward()
        ours = [*map(whole.mean, filter(torch.is_tensor, losses)), *gradients(model)]
        if whole.group.rank() == 0:
            losses = alone(whole.tokens, maskable=whole.maskable, generator=generators[1])
            losses.loss.backward()
            expected = [*filter(torch.is_tensor, losses), *gradients(alone)]
            worst = max(worst, largest(ours, expected))
        for each in (model, alone):
            each.zero_grad()
    return worst


def own_masks(whole: Whole) -> float:
    """Masks of one's own draw nothing: no generator."""
    model, alone = (build(CPU, **MEAN).double() for _ in range(2))
    is_masked = torch.rand(whole.tokens.shape, generator=torch.Generator().manual_seed(0)) < 0.4
    parallel = DistributedDataParallel(model, process_group=whole.group)
    parallel(whole.part(whole.tokens), is_masked=whole.part(is_masked), process_group=whole.group).loss.backward()
    alone(whole.tokens, is_masked=is_masked).loss.backward()
    return largest(gradients(model), gradients(alone))


def accumulation(whole: Whole) -> float:
    """Two parts on each rank by num_tokens of the whole over the ranks: what the refusal advises."""
    model, alone = (build(CPU).double() for _ in range(2))
    parallel = DistributedDataParallel(model, process_group=whole.group)
    half = whole.sizes[0] // 2
    num_tokens = whole.tokens.numel() / whole.group.size()
    with parallel.no_sync():
        for rows, first in ((slice(half), whole.first), (slice(half, None), whole.first + half)):
            parallel.require_backward_grad_sync = first != whole.first
            generator = torch.Generator().manual_seed(3)
            part = whole.part(whole.tokens)[rows]
            parallel(part, num_tokens=num_tokens, generator=generator, sample_offset=first).loss.backward()
    alone(whole.tokens, generator=torch.Generator().manual_seed(3)).loss.backward()
    return largest(gradients(model), gradients(alone))


def generation(whole: Whole) -> float:
    """How many ids differ."""
    model = build(CPU).double()
    options = {"start_temperature": 1.0, "steps": 4}
    generator = torch.Generator().manual_seed(5)
    ids = model.generate(len(whole.part(whole.tokens)), generator=generator, sample_offset=whole.first, **options)
    parts: list[Any] = [None] * whole.group.size()
    dist.all_gather_object(parts, ids, group=whole.group)
    alone = model.generate(len(whole.tokens), generator=torch.Generator().manual_seed(5), **options)
    return float((torch.cat(parts) != alone).sum())


def bound(whole: Whole, kind: str) -> float:
    """nelbo of parts; the seed of the other ranks is not asked for."""
    model = build(CPU, self_cond=True).double()
    tokens, maskable = whole.part(whole.tokens), whole.part(whole.maskable)
    rank, size = whole.group.rank(), whole.group.size()
    batches = [
        {"input_ids": clean(CPU, 1 + number % 3), "maskable": torch.rand(1 + number % 3, N) < 0.7}
        for number in range(2 * size - 1)  # the last rank has one fewer
    ]
    run = partial(model.nelbo, num_samples=2, process_group=whole.group, seed=7 + rank)
    alone = partial(model.nelbo, num_samples=2, seed=7)
    if kind == "tensor":
        ours = run(tokens, maskable=maskable, chunk_size=2)
        expected = alone(whole.tokens, maskable=whole.maskable)
    elif kind == "data set":
        ours, expected = run(TensorDataset(tokens), chunk_size=2), alone(TensorDataset(whole.tokens))
    elif kind == "batches":
        for batch in batches:
            dist.broadcast(batch["maskable"], group=whole.group, group_src=0)
        ours, expected = run(batches[rank::size]), alone(batches)
    else:
        parts: list[Any] = [None] * size
        dist.all_gather_object(parts, run(tokens, reduction="none"), group=whole.group)
        ours, expected = torch.cat(parts), alone(whole.tokens, reduction="none")
    return distance(ours, expected)


def sharded(whole: Whole, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> float:
    """FSDP2's losses and gradients over some steps."""
    alone = build(CPU, **options).to(dtype)
    model = shard(build(CPU, **options).to(dtype), DeviceMesh.from_group(whole.group, "cpu"))
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    worst = 0.0
    for _ in range(STEPS):
        group = {"process_group": whole.group, "generator": generators[0], **whole.place()}
        loss = model(whole.part(whole.tokens), **group).loss
        loss.backward()
        expected = alone(whole.tokens, generator=generators[1]).loss
        expected.backward()
        ours = [gradient.full_tensor() for gradient in gradients(model)]
        worst = max(worst, largest([whole.mean(loss), *ours], [expected, *gradients(alone)]))
        for each in (model, alone):
            each.zero_grad()
    return worst


def sharded_methods(whole: Whole) -> float:
    """nelbo, generate and generate_steps of what FSDP2 has sharded."""
    model, alone = _sharded(whole), build(CPU).double()
    ours = model.nelbo(whole.part(whole.tokens), seed=7, process_group=whole.group)
    options = {"generator": torch.Generator().manual_seed(5), "steps": 4}
    ids = model.generate(len(whole.part(whole.tokens)), sample_offset=whole.first, **options)
    expected = alone.generate(len(whole.tokens), generator=torch.Generator().manual_seed(5), steps=4)
    assert torch.equal(ids, whole.part(expected))
    options["generator"].manual_seed(5)
    *_, last = model.generate_steps(len(whole.part(whole.tokens)), sample_offset=whole.first, **options)
    assert torch.equal(last.ids, ids)
    return distance(ours, alone.nelbo(whole.tokens, seed=7))


USES = ["nelbo", "generate", "generate_steps", "closed steps", "open steps", "evaluation", "refused generate"]


def used(use: str, model, tokens: Tensor, first: int, whole: Whole | None) -> Iterator[Tensor]:
    """What a use of a model between its steps gives, as often as asked for: a row's ids, or a mean over ranks."""
    group = None if whole is None else whole.group
    for seed in itertools.count():
        generator = torch.Generator().manual_seed(seed)
        options = {"steps": 3, "generator": generator, "sample_offset": first}
        if use == "nelbo":
            yield model.nelbo(tokens, seed=seed, process_group=group)
        elif use == "evaluation":
            place = {} if whole is None else whole.place()
            with torch.no_grad():
                loss = model(tokens, process_group=group, generator=generator, **place).loss
            yield loss if whole is None else whole.mean(loss)
        elif use == "generate":
            yield model.generate(len(tokens), **options)
        elif use == "refused generate":
            try:
                model.generate(len(tokens), no_such_option=True, **options)
            except TypeError:
                yield tokens
        elif use == "open steps":  # which go on with weights that have changed
            for step in model.generate_steps(len(tokens), **options):
                yield step.ids.clone()
        else:
            steps = model.generate_steps(len(tokens), **options)
            for step in itertools.islice(steps, 2 if use == "closed steps" else None):
                ids = step.ids.clone()
            steps.close()
            yield ids


def changed(whole: Whole, use: str, **options: Any) -> float:
    """Weights that change after a use, by an optimizer's step and by hand: the next losses are of the new ones."""
    model = shard(build(CPU).double(), DeviceMesh.from_group(whole.group, "cpu"), **options)
    alone = build(CPU).double()
    weights = [list(each.parameters()) for each in (model, alone)]  # as optimizers and averages hold them
    optimizers = [torch.optim.SGD(each, lr=1.0) for each in weights]
    tokens = whole.part(whole.tokens)
    uses = used(use, model, tokens, whole.first, whole), used(use, alone, whole.tokens, 0, None)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    worst = 0.0
    for number in range(2):
        loss = model(tokens, process_group=whole.group, generator=generators[0], **whole.place()).loss
        expected = alone(whole.tokens, generator=generators[1]).loss
        worst = max(worst, distance(whole.mean(loss), expected))
        for each in (loss, expected):
            each.backward()
        for change in ("step", "by hand"):
            ours, theirs = (next(each) for each in uses)
            theirs = whole.part(theirs) if theirs.ndim else theirs
            worst = max(worst, distance(ours.double(), theirs.double()))
            for optimizer, each in zip(optimizers, weights, strict=True):
                if change == "step":
                    optimizer.step()
                    optimizer.zero_grad()
                else:
                    torch._foreach_mul_([weight.data for weight in each], 1.1)
        bound = model.nelbo(tokens, seed=number, process_group=whole.group)
        worst = max(worst, distance(bound, alone.nelbo(whole.tokens, seed=number)))
    return worst


def _sharded(whole: Whole, scale: float = 1.0, **options: Any):
    model = build(CPU, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return shard(model, DeviceMesh.from_group(whole.group, "cpu"))


def checkpoint(whole: Whole, folder: str) -> float:
    """Saved by ranks and loaded by one process; and back."""
    names = [f"{folder}/ranks", f"{folder}/one"]
    model = _sharded(whole, 2.0)
    checkpoints.save(get_model_state_dict(model), checkpoint_id=names[0], process_group=whole.group)
    one = build(CPU).double()
    if whole.group.rank() == 0:
        weights = one.state_dict()
        checkpoints.load(weights, checkpoint_id=names[0], no_dist=True)
        one.load_state_dict(weights)
        checkpoints.save({name: 3.0 * value for name, value in weights.items()}, checkpoint_id=names[1], no_dist=True)
    full = [parameter.full_tensor() for parameter in model.parameters()]
    difference = largest(one.parameters(), full) if whole.group.rank() == 0 else 0.0
    dist.barrier(group=whole.group)
    weights = get_model_state_dict(model)
    checkpoints.load(weights, checkpoint_id=names[1], process_group=whole.group)
    back = [parameter.full_tensor() for parameter in model.parameters()]
    return max(difference, largest(back, [3.0 * weight for weight in full]))


def cases() -> Cases:
    """What is done, and by how many ranks, by name."""
    found: Cases = {}

    def add(
        name: str, ranks: int, sizes: str, run: Callable[..., float], *arguments: Any, padded: bool = True
    ) -> None:
        def one(group: dist.ProcessGroup, folder: str) -> float:
            given = [folder if argument == "folder" else argument for argument in arguments]
            return run(Whole(group, SIZES[ranks][sizes], padded=padded), *given)

        found[f"{name}, {ranks} ranks, {sizes} rows"] = ranks, one

    for ranks, name, dtype in itertools.product(SIZES, OPTIONS, DTYPES):
        if "compat" in name and dtype == "float32":
            continue
        for sizes in SIZES[ranks] if dtype == "float64" else ["several"]:
            padded = sizes != "alike"
            add(f"{name}, {dtype}", ranks, sizes, training, OPTIONS[name], DTYPES[dtype], padded=padded)
    for ranks in SIZES:
        add("masks of one's own", ranks, "alike", own_masks)
        add("accumulation", ranks, "alike", accumulation)
        for sizes in SIZES[ranks]:
            add("generation", ranks, sizes, generation)
            for kind in ("tensor", "data set", "batches", "sequences"):
                add(f"nelbo of {kind}", ranks, sizes, bound, kind)
    for name in ("weighted", "mean", "self-conditioned", "own critic", "self critic"):
        for sizes in ("alike", "several"):
            add(f"FSDP2 {name}", 2, sizes, sharded, OPTIONS[name])
    for name in ("bernoulli", "stratified"):
        add(f"FSDP2 {name}", 2, "several", sharded, OPTIONS[name])
    add("FSDP2 in float32", 2, "several", sharded, OPTIONS["weighted"], torch.float32)
    for use in USES:
        add(f"FSDP2's weights after {use}", 2, "several", changed, use)
    for use in ("generate_steps", "closed steps", "open steps"):
        resharding = partial(changed, reshard_after_forward=True)
        add(f"FSDP2's weights after {use}, resharded", 2, "several", resharding, use)
    add("FSDP2's nelbo and generate", 2, "several", sharded_methods)
    add("checkpoint", 2, "alike", checkpoint, "folder")
    return found


Cases = dict[str, tuple[int, Callable[[dist.ProcessGroup, str], float]]]


def on_rank(rank: int, cases: Callable[[], Cases], folder: str) -> None:
    """All cases, on one of four ranks; the first writes what it found."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    rendezvous = f"file://{folder}/rendezvous"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=4, timeout=timedelta(seconds=60))
    groups = {4: dist.group.WORLD, 2: dist.new_group([0, 1])}
    report = {name: run(groups[ranks], folder) for name, (ranks, run) in cases().items() if rank < ranks}
    dist.barrier()
    if rank == 0:
        Path(folder, "report.json").write_text(json.dumps(report), encoding="utf-8")
    dist.destroy_process_group()


def run_ranks(cases: Callable[[], Cases], folder: str) -> None:
    """All cases on four ranks, which are forked."""
    torch.multiprocessing.start_processes(on_rank, (cases, folder), nprocs=4, start_method="fork")


if __name__ == "__main__":
    run_ranks(cases, sys.argv[1])
