"""A training step and ``generate``, fastmask against x-transformers' own wrapper, on the same network.

Times are medians over rounds that alternate between the two, so that both see the same machine; peak
memory is the growth of the resident set in a process of its own.
"""

from __future__ import annotations

import json
import pathlib
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
import x_transformers
from torch import nn

import fastmask

WRAPPERS = {"fastmask": fastmask.NonAutoregressiveWrapper, "upstream": x_transformers.NonAutoregressiveWrapper}
TASKS = ("train", "generate")


@dataclass(frozen=True)
class Size:
    """B sequences of N positions over V ids; a network of width D and some depth."""

    batch: int
    seq_len: int
    num_tokens: int
    dim: int
    depth: int

    def __str__(self) -> str:
        return f"B {self.batch}, N {self.seq_len}, V {self.num_tokens}, D {self.dim}, depth {self.depth}"


SIZES = (Size(8, 256, 8192, 256, 4), Size(8, 128, 32768, 256, 4), Size(16, 64, 2048, 256, 4))


def build(size: Size, wrapper: str) -> Any:
    """The wrapper over a TransformerWrapper of this size, with the same weights at every call."""
    torch.manual_seed(0)
    net = x_transformers.TransformerWrapper(
        num_tokens=size.num_tokens,
        max_seq_len=size.seq_len,
        attn_layers=x_transformers.Encoder(dim=size.dim, depth=size.depth, heads=4, rotary_pos_emb=True),
    )
    return WRAPPERS[wrapper](net, mask_id=size.num_tokens - 1)


def run(model: Any, size: Size, task: str) -> torch.Tensor:
    """One training step without its optimizer (a loss), or one generation (ids)."""
    if task == "generate":
        ids: torch.Tensor = model.generate(size.batch)
        return ids
    model.zero_grad()
    x = torch.randint(size.num_tokens - 1, (size.batch, size.seq_len))
    loss: torch.Tensor = model(x).loss
    loss.backward()
    return loss.detach()


def verify(size: Size) -> None:
    """The gate before any timing: on the same masks both wrappers must find the same loss.

    Raises:
        AssertionError: they do not, or fastmask's generation is not a clean sequence.
    """
    ours, theirs = build(size, "fastmask"), build(size, "upstream")
    x = torch.randint(size.num_tokens - 1, (size.batch, size.seq_len))
    masked = fastmask.functional.mask_sampling(x, mask_id=size.num_tokens - 1, num_tokens=size.num_tokens, seed=0)
    out = fastmask.backbone.run(ours.net, masked.masked_ids)
    loss = out.loss(x, masked, None, None, None)
    logits = theirs.net(masked.masked_ids)
    expected = nn.functional.cross_entropy(logits[masked.is_masked], x[masked.is_masked])
    torch.testing.assert_close(loss, expected)
    ids = run(ours, size, "generate")
    assert ids.shape == x.shape
    assert bool(((ids >= 0) & (ids < size.num_tokens - 1)).all()), "generate returned a masked or unknown id"


def measure(size: Size, task: str, rounds: int) -> dict[str, Any]:
    """Median seconds and spread of each wrapper, their ratio, and peak memory in MiB."""
    models = {name: build(size, name) for name in WRAPPERS}
    seconds: dict[str, list[float]] = {name: [] for name in WRAPPERS}
    for number in range(rounds + 1):
        for name, model in models.items():
            torch.manual_seed(number)
            start = time.perf_counter()
            run(model, size, task)
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    peaks = {name: peak_memory(size, task, name) for name in WRAPPERS}
    return {
        "size": str(size),
        "task": task,
        "seconds": {name: round(value, 4) for name, value in medians.items()},
        "spread": {name: [round(min(v), 4), round(max(v), 4)] for name, v in seconds.items()},
        "speedup": round(medians["upstream"] / medians["fastmask"], 2),
        "peak_mib": peaks,
    }


def peak_memory(size: Size, task: str, wrapper: str) -> int:
    """MiB by which one run raises the peak resident set of a fresh process, the model already built (Linux)."""
    arguments = [str(SIZES.index(size)), task, wrapper]
    output = subprocess.run(
        [sys.executable, "-m", "benchmarks.end_to_end", *arguments], check=True, capture_output=True, text=True
    )
    return int(json.loads(output.stdout))


def _resident_mib(field: str) -> float:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{field}:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


if __name__ == "__main__":
    index, task_name, wrapper_name = sys.argv[1:]
    chosen = SIZES[int(index)]
    built = build(chosen, wrapper_name)
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = _resident_mib("VmRSS")
    run(built, chosen, task_name)
    print(round(_resident_mib("VmHWM") - before))
