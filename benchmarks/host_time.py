"""What a call costs the host, told on any machine: ``python -m benchmarks host``.

Calls of public functions with ``backend="triton"`` on small tensors of the CPU, whose launches are counted and left
out: what checks, allocations, autograd and the lists of arguments take. On a GPU each launch adds what Triton's own
launcher takes; ``host_ms`` of a results file has that too. Products of a linear head do run, small ones. Time is the
thread's own, so that what else a machine does weighs little.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks import machine
from fastmask import functional as F

BATCH, SEQ_LEN, NUM_TOKENS = 4, 16, 1024
MASK_ID = NUM_TOKENS - 1
HEAD = 8, 64  # width and ids, so few that its products take next to nothing
# Calls of all kinds take turns. The first compile nothing, but fill caches.
WARM_UP, ROUNDS, CALLS_OF_A_ROUND = 20, 40, 25


class Cost(NamedTuple):
    """Microseconds of a call, as the median of rounds and their least, and how many kernels it launches."""

    median: float
    least: float
    launches: int


@contextmanager
def counted() -> Iterator[list[Any]]:
    """The kernels that calls on the CPU would launch; nothing runs, and little is added to their time."""
    from fastmask import _dispatch
    from fastmask.kernels import _launch

    kernels: list[Any] = []

    def launch(kernel: Any, grid: tuple[int, ...], on: object, **arguments: object) -> None:
        kernels.append(kernel)

    def is_interpreting() -> bool:
        return True

    with (
        mock.patch.object(_launch, "launch", launch),
        mock.patch.object(_dispatch, "_interpreting", is_interpreting),  # the CPU counts as a GPU
    ):
        yield kernels


def calls() -> dict[str, Callable[[], object]]:
    """What is told, by name."""
    seed = torch.tensor(3)
    tokens = torch.randint(MASK_ID, (BATCH, SEQ_LEN))
    is_masked = torch.ones(BATCH, SEQ_LEN, dtype=torch.bool)
    logits = torch.randn(BATCH, SEQ_LEN, NUM_TOKENS, dtype=torch.bfloat16)
    leaf = logits.clone().requires_grad_()
    width, num_ids = HEAD
    embeddings = torch.randn(BATCH, SEQ_LEN, width, requires_grad=True)
    weight = torch.randn(num_ids, width, requires_grad=True)
    targets = tokens % num_ids
    half, count = torch.full((BATCH,), 0.5), torch.full((BATCH,), SEQ_LEN // 2)
    listed = torch.empty(BATCH * SEQ_LEN // 2, dtype=torch.int64), torch.arange(BATCH + 1) * (SEQ_LEN // 2)
    confidences = torch.rand(BATCH, SEQ_LEN)
    draws: dict[str, Any] = {"seed": seed, "backend": "triton"}

    def loss() -> None:
        out = F.masked_cross_entropy(leaf, tokens, is_masked, backend="triton")
        torch.autograd.grad(out.loss, leaf)

    def linear_loss() -> None:
        out = F.linear_masked_cross_entropy(embeddings, weight, targets, is_masked, backend="triton")
        torch.autograd.grad(out.loss, (embeddings, weight))

    sample = functools.partial(F.sample_tokens, logits, mask_id=MASK_ID, temperature=0.7, **draws)
    step = functools.partial(F.demask_step, logits, tokens, is_masked, mask_id=MASK_ID, counts=8, step=3, **draws)
    return {
        "sample_tokens": sample,
        "sample_tokens, top_k": functools.partial(sample, top_k=100),
        "mask_sampling": functools.partial(
            F.mask_sampling, tokens, mask_id=MASK_ID, num_tokens=NUM_TOKENS, no_replace_prob=0.15,
            random_token_prob=0.1, **draws,
        ),
        "masked_cross_entropy, forward": functools.partial(
            F.masked_cross_entropy, logits, tokens, is_masked, backend="triton"
        ),
        "masked_cross_entropy, forward and backward": loss,
        "linear_masked_cross_entropy, forward and backward": linear_loss,
        "remask_": functools.partial(
            F.remask_, tokens, is_masked, *listed, confidences, count, mask_id=MASK_ID, backend="triton"
        ),
        "select_at_random": functools.partial(F.select_at_random, is_masked, half, **draws),
        "demask_step": step,
        "demask_step, top_k": functools.partial(step, top_k=100),
    }  # fmt: skip


def measure() -> dict[str, Cost]:
    """Every call's cost, on one thread."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with counted() as kernels:
            return _measure(calls(), kernels)
    finally:
        torch.set_num_threads(num_threads)


def _measure(found: dict[str, Callable[[], object]], kernels: list[Any]) -> dict[str, Cost]:
    launches: dict[str, int] = {}
    times: dict[str, list[float]] = {name: [] for name in found}
    for name, call in found.items():
        for _ in range(WARM_UP):
            kernels.clear()
            call()
        launches[name] = len(kernels)
    for _ in range(ROUNDS):
        for name, call in found.items():
            kernels.clear()
            begin = time.thread_time()
            for _ in range(CALLS_OF_A_ROUND):
                call()
            times[name].append((time.thread_time() - begin) / CALLS_OF_A_ROUND * 1e6)
    return {name: Cost(statistics.median(times[name]), min(times[name]), launches[name]) for name in found}


def table(costs: dict[str, Cost]) -> str:
    """Markdown."""
    lines = [f"| {name} | {cost.median:.0f} | {cost.least:.0f} | {cost.launches} |" for name, cost in costs.items()]
    return "\n".join(["| call | us, median | us, least | launches, left out |", "|---|---|---|---|", *lines])


def main() -> int:
    """Measures and prints."""
    print(f"{machine.device_name(torch.device('cpu'))}, one thread, torch {torch.__version__}\n")
    print(table(measure()))
    return 0
