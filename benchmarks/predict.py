"""Predictions of GPU times, to which the first run on a GPU is held: ``python -m benchmarks predict``.

Writes benchmarks/predictions.md: of each case of ``python -m benchmarks --quick`` on an H100 and an H200 the time of
fastmask's row in microseconds, its share of the floor, and what holds it up. Of operations that is reckoned from
what their kernels take where they run from their PTX (``benchmarks/executed.py``), by the bounds of
``benchmarks/ceilings.py``. Of the linear loss: three products at the rate of large ones, and the loss's own bytes.
Of training steps and generations: FLOP of the network and head at the same rate and bytes of the optimizer, or, where
that is longer, the host, at HOST_OPERATION for each operation of PyTorch's.
"""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks import bench_sample_tokens as sampling
from benchmarks import ceilings, end_to_end, executed, machine, suite
from benchmarks.benchmark import Benchmark
from benchmarks.ceilings import GPUS, Gpu, Prediction
from benchmarks.records import Ceilings, Step
from fastmask import functional

FILE = pathlib.Path(__file__).parent / "predictions.md"
GPUS_PREDICTED = ("H100", "H200")
HOST_OPERATION = 5e-6  # seconds, of one operation of eager PyTorch, with its part in autograd
BYTES_OF_ADAMW = 7 * 4  # a parameter, its gradient and two moments read, all but the gradient written
ALIKE = 8  # rows that differ; the others repeat them

Counted = tuple[Benchmark, Any]
Predictor = Callable[[Gpu], Prediction]


def quick_cases() -> list[Counted]:
    """Those that a GPU would be asked for."""
    cuda = torch.device("cuda")
    with mock.patch.object(machine, "default_device", return_value=cuda):
        return [(benchmark, case) for benchmark in suite.BENCHMARKS for case in benchmark.cases(True)]


# Calls on the CPU, with tensors as the case has them


def logits_of(num_rows: int, num_tokens: int) -> torch.Tensor:
    """[num_rows, num_tokens] bfloat16, of rows that repeat; of large ones the first rows, others are never read."""
    rows = torch.randn(min(ALIKE, num_rows), num_tokens, dtype=torch.bfloat16) * sampling.LOGIT_SPREAD
    logits = torch.zeros(num_rows, num_tokens, dtype=torch.bfloat16)
    for part in logits[: max(512, 2**27 // num_tokens)].split(len(rows)):
        part.copy_(rows[: len(part)])
    return logits


def _loss(case: Any) -> Callable[[], object]:
    """Every other row is masked: half of them, and of the first eight."""
    is_masked = torch.arange(case.num_rows) % 2 == 0
    logits = logits_of(case.num_rows, case.num_tokens).requires_grad_()
    targets = torch.randint(case.num_tokens, (case.num_rows,))

    def run() -> None:
        loss = functional.masked_cross_entropy(logits, targets, is_masked).loss
        torch.autograd.grad(loss, logits)

    return run


def _sample(case: Any) -> Callable[[], object]:
    logits = logits_of(case.num_rows, case.num_tokens)[None]
    return functools.partial(sampling.ours(), logits, sampling.TEMPERATURE, case.top_k)


def _run(benchmark: Benchmark, case: Any) -> Callable[[], object]:
    """Of small tensors: fastmask's run of the benchmark itself."""
    contender = benchmark.contenders()[0]
    return Step(contender, contender.load(), benchmark.problem(replace(case, device=torch.device("cpu")))).run


def prepare(benchmark: Benchmark, case: Any) -> Callable[[], object]:
    """The call that is counted for a case of an operation, with its tensors."""
    special = {"masked_cross_entropy": _loss, "sample_tokens": _sample}
    return special[benchmark.name](case) if benchmark.name in special else _run(benchmark, case)


# What is not counted


def predict_linear(case: Any, gpu: Gpu) -> Prediction:
    products = 6.0 * case.num_masked * case.dim * case.num_tokens / (gpu.product * ceilings.REACHED)
    loss = 2 * case.num_masked * case.num_tokens * 2 / (gpu.memory * ceilings.REACHED)
    return Prediction(products + loss, "products")


def predict_end_to_end(case: Any, num_operations: int, gpu: Gpu) -> Prediction:
    """A block has 12 D^2 parameters; half of all positions are masked, on average, at training and generation."""
    tokens, steps = case.batch * case.seq_len, 1 if case.task == "train" else end_to_end.STEPS
    passes = 3 if case.task == "train" else 1
    block = 24 * case.dim**2 * tokens + 4 * case.batch * case.seq_len**2 * case.dim
    head = 2 * tokens / 2 * case.dim * case.num_tokens
    seconds = steps * passes * (case.depth * block + head) / (gpu.product * ceilings.REACHED)
    if case.task == "train":
        parameters = 12 * case.depth * case.dim**2 + 2 * case.num_tokens * case.dim
        seconds += parameters * BYTES_OF_ADAMW / (gpu.memory * ceilings.REACHED)
    host = num_operations * HOST_OPERATION
    return Prediction(host, "host") if host > seconds else Prediction(seconds, "products")


def num_operations(case: Any) -> int:
    """Of PyTorch's, in as many passes of the network, of the same depth and few numbers; what lies around adds
    little."""
    small = replace(case, batch=1, seq_len=16, num_tokens=64, dim=64, device=torch.device("cpu"))
    network = end_to_end.bounds(small, end_to_end.WrapperProblem(small))[end_to_end.NETWORKS_OF["fastmask"]]
    with torch.autocast("cpu", torch.bfloat16):  # its casts are operations, too
        return executed.num_operations(network)


# The file


def predictors(cases: Sequence[Counted]) -> list[Predictor]:
    """Of each case a function of the GPU."""
    counted = [(benchmark, case) for benchmark, case in cases if benchmark.name not in _NOT_COUNTED]
    operations = {case: num_operations(case) for benchmark, case in cases if benchmark.name in end_to_end.TASKS}
    calls = iter(executed.count([functools.partial(prepare, *found) for found in counted], ["sm_90"]))
    found: list[Predictor] = []
    for benchmark, case in cases:
        if benchmark.name == "linear_masked_cross_entropy":
            found.append(functools.partial(predict_linear, case))
        elif benchmark.name in end_to_end.TASKS:
            found.append(functools.partial(predict_end_to_end, case, operations[case]))
        else:
            call = next(calls)
            found.append(functools.partial(ceilings.predict, call.launches["sm_90"], call.num_others))
    return found


_NOT_COUNTED = ("linear_masked_cross_entropy", *end_to_end.TASKS)


def text(cases: Sequence[Counted], found: Sequence[Predictor]) -> str:
    """The file, from a predictor of each case."""
    head = ["operation", "case"]
    for gpu in GPUS_PREDICTED:
        head += [f"{gpu}, us", "of the floor", "held up by"]
    lines = [head, ["---"] * len(head)]
    for (benchmark, case), predictor in zip(cases, found, strict=True):
        line = [f"`{benchmark.name}`", str(case)]
        for name in GPUS_PREDICTED:
            prediction = predictor(GPUS[name])
            line += [f"{prediction.seconds * 1e6:.3g}", _share(benchmark, case, prediction, GPUS[name])]
            line.append(prediction.bound)
        lines.append(line)
    rows = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{HEADING}\n{rows}\n"


def _share(benchmark: Benchmark, case: Any, prediction: Prediction, gpu: Gpu) -> str:
    """Of the floor by that GPU's ceilings."""
    floor = benchmark.floor(case, Ceilings(gpu.memory / 1e9, gpu.product / 1e12)).milliseconds
    return "-" if floor is None else f"{floor / (prediction.seconds * 1e3):.0%}"


HEADING = """# Predictions

Of `python -m benchmarks --quick` on GPUs on which nothing of it has been measured: fastmask's own row, in
microseconds of GPU time. Made by `python -m benchmarks predict`, whose docstring and that of `benchmarks/ceilings.py`
say how; to be made anew after each change of a kernel, and never after a run that they are held to.
"""


def main() -> int:
    """Counts, predicts, writes the file and prints it."""
    torch.manual_seed(0)
    cases = quick_cases()
    told = text(cases, predictors(cases))
    FILE.write_text(told)
    print(told)
    return 0
