"""Training steps and generations, fastmask against x-transformers' own wrapper, on the same network.

A training step is masking, network, loss, backward and optimizer; a generation is the 18 steps that both have by
default, with the filter of the vocabulary that both have, and at one size without. The network is timed by itself in
the same rounds, so that what lies outside it shows: as many passes, with backward where there is one, on masked ids,
to logits of all rows for upstream and to embeddings for fastmask (whose head works on masked rows only, and counts as
outside).
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
import x_transformers
from torch import Tensor

import fastmask
from benchmarks import machine
from benchmarks.benchmark import Benchmark
from benchmarks.gate import relative_error
from benchmarks.records import Ceilings, Contender, Floor, Row, Runs, Step

TASKS = ("train", "generate")
STEPS = 18  # the default of both
GRAPHS = {name: f"{name}, as a CUDA graph" for name in ("fastmask", "x-transformers")}


@dataclass(frozen=True)
class Case:
    """B sequences of N positions over V ids; a network of width D and some depth. is_filtered: of generations.

    float32 on a CPU; on CUDA float32 parameters under bfloat16 autocast.
    """

    task: str
    batch: int
    seq_len: int
    num_tokens: int
    dim: int
    depth: int
    device: torch.device
    is_filtered: bool = True

    def __str__(self) -> str:
        size = f"B {self.batch}, N {self.seq_len}, V {self.num_tokens}, D {self.dim}, depth {self.depth}"
        return size + ", unfiltered" * (not self.is_filtered)


# The last has so small a vocabulary that the network takes most of the time: the least there is to win.
CPU_SIZES = ((8, 256, 8192, 256, 4), (8, 128, 32768, 256, 4), (4, 128, 50257, 256, 4), (16, 64, 2048, 256, 4))
# 25M, 85M (110M with BERT's vocabulary) and 302M (350M with GPT-2's) parameters without embeddings and head.
NETWORKS = ((512, 8), (768, 12), (1024, 24))
CUDA_SIZES = tuple(
    (batch, seq_len, num_tokens, *network)
    for network in NETWORKS
    for num_tokens in (8192, 50257)
    for batch, seq_len in ((64, 256), (16, 1024))
)


def cases(task: str, quick: bool) -> list[Case]:
    """Every size, and generations without the filter at the largest vocabulary of the first network; ``quick``: that
    network, whose compilation is short, at a large and a small size, with the filter."""
    device = machine.default_device()
    sizes = CUDA_SIZES if device.type == "cuda" else CPU_SIZES
    if quick:
        sizes = ((16, 1024, 50257, *NETWORKS[0]), CUDA_SIZES[0]) if device.type == "cuda" else (sizes[0], sizes[-1])
    found = [Case(task, *size, device) for size in sizes]
    if task == "generate" and not quick:
        largest = max(found[:4], key=lambda case: case.num_tokens)
        found.append(replace(largest, is_filtered=False))
    return found


@dataclass(frozen=True)
class Wrapping:
    """What a contender loads: whose wrapper, whether the network in it is compiled, and how it is to generate."""

    wrapper: Callable[..., Any]
    is_compiled: bool = False
    has_graph: bool = False

    def generation(self, model: Any, case: Case) -> Callable[[], Tensor]:
        """What is called for each. x-transformers captures nothing itself: that is done for it, once."""
        options = {} if case.is_filtered else {"filter_thres": None}
        generate = functools.partial(model.generate, case.batch, **options)
        if not self.has_graph:
            return generate
        if self.wrapper is fastmask.NonAutoregressiveWrapper:
            return functools.partial(_generate_as_graph, generate)
        return _captured(generate)


def _generate_as_graph(generate: Callable[..., Tensor]) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "cuda_graph=True has no effect")
        return generate(cuda_graph=True)


def _captured(generate: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A replay of a generation."""
    # Autocast's cache is freed when autocast ends, and the graph would still read it.
    uncached = torch.autocast("cuda", torch.bfloat16, cache_enabled=False)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with uncached:
        with torch.cuda.stream(stream):
            generate()  # starts libraries, which a capture must not
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            ids = generate()

    def replay() -> Tensor:
        graph.replay()
        return ids.clone()

    return replay


class WrapperProblem:
    """One network that all contenders share; the step's optimizer has a learning rate of 0, so that it stays."""

    inputs: tuple[Tensor, ...] = ()

    def __init__(self, case: Case, steps: int = STEPS) -> None:
        torch.manual_seed(0)
        self.case, self.device, self.steps = case, case.device, steps
        encoder = x_transformers.Encoder(
            dim=case.dim, depth=case.depth, heads=case.dim // 64, rotary_pos_emb=True, attn_flash=True
        )
        self.net = x_transformers.TransformerWrapper(
            num_tokens=case.num_tokens, max_seq_len=case.seq_len, attn_layers=encoder
        ).to(case.device)
        self.mask_id = case.num_tokens - 1
        self.tokens = torch.randint(self.mask_id, (case.batch, case.seq_len), device=case.device)
        self._models: dict[Wrapping, Any] = {}
        self._generations: dict[Wrapping, Callable[[], Tensor]] = {}
        self._optimizers: dict[Wrapping, torch.optim.Optimizer] = {}

    @property
    def limits(self) -> dict[str, float]:
        """Relative errors follow the dtype; a regret of 20 T is sampling noise, that of a random id is about 1."""
        loss, gradient = (1e-4, 1e-3) if self.device.type == "cpu" else (2e-2, 1e-1)
        if self.case.task == "train":
            return {"loss": loss, "gradient": gradient}
        return {"ids out of range or masked": 0.0, "regret of a greedy generation, nats": 2e-2}

    def restore(self, contender: Contender) -> None:
        pass

    def network(self, is_compiled: bool) -> Any:
        return self._compiled if is_compiled else self.net

    @functools.cached_property
    def _compiled(self) -> Any:
        return torch.compile(self.net, dynamic=False)

    def model(self, wrapping: Wrapping, **options: Any) -> Any:
        options = {"steps": self.steps, "mask_id": self.mask_id} | options
        return wrapping.wrapper(self.network(wrapping.is_compiled), **options).to(self.device)

    def run(self, contender: Contender, function: Wrapping) -> Tensor:
        """One training step (the loss), or one generation (ids)."""
        if function not in self._models:
            self._models[function] = self.model(function)
        model = self._models[function]
        if self.case.task == "generate":
            with autocast(self.device):
                if function not in self._generations:
                    self._generations[function] = function.generation(model, self.case)
                return self._generations[function]()
        if function not in self._optimizers:
            self._optimizers[function] = torch.optim.AdamW(self.net.parameters(), lr=0.0)
        with autocast(self.device):
            loss: Tensor = model(self.tokens).loss
        loss.backward()
        self._optimizers[function].step()
        self.net.zero_grad()
        return loss.detach()

    def errors(self, step: Step) -> dict[str, float]:
        return self._train_errors(step) if self.case.task == "train" else self._generate_errors(step)

    def _train_errors(self, step: Step) -> dict[str, float]:
        """Where every position is masked and unweighted, loss and gradients are those of the plain cross-entropy.

        Of fastmask's over all ids but the mask, the last.
        """
        options = {"no_replace_prob": 0.0, "random_token_prob": 0.0, "use_simple_mdlm_loss_weight": False}
        model = self.model(step.function, schedule=lambda t: 1.0 - 0.0 * t, **options)
        masked = torch.full_like(self.tokens, self.mask_id)
        results = []
        with autocast(self.device):
            logits = self.net(masked).flatten(0, 1)
            if step.function.wrapper is fastmask.NonAutoregressiveWrapper:
                logits = logits[:, : self.mask_id]
            losses = model(self.tokens).loss, F.cross_entropy(logits, self.tokens.flatten())
        for loss in losses:
            loss.backward()
            gradients = [p.grad.flatten().float() for p in self.net.parameters() if p.grad is not None]
            results.append((loss.detach().float(), torch.cat(gradients)))
            self.net.zero_grad()
        pairs = zip(*results, strict=True)
        return {name: relative_error(*pair) for name, pair in zip(self.limits, pairs, strict=True)}

    def _generate_errors(self, step: Step) -> dict[str, float]:
        """Ids of a whole generation; and a generation of one step, which is greedy (T 1e-3, filtered), against the
        best logits."""
        ids = step.run()
        outside = ((ids < 0) | (ids >= self.mask_id)).sum().item()
        with torch.no_grad(), autocast(self.device):
            greedy = step.function.generation(self.model(step.function, steps=1), self.case)()
            logits = self.net(torch.full_like(self.tokens, self.mask_id)).float()
        chosen = logits.gather(-1, greedy[..., None]).squeeze(-1)
        regret = (logits[..., : self.mask_id].amax(dim=-1) - chosen).mean().item()
        return dict(zip(self.limits, (outside, regret), strict=True))


def autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def contenders(task: str) -> list[Contender]:
    """Compiling takes minutes on a CPU, so only eager is timed there."""
    wrappers = {
        "fastmask": fastmask.NonAutoregressiveWrapper,
        "x-transformers": x_transformers.NonAutoregressiveWrapper,
    }
    found = []
    for is_compiled in (False, True):
        for name, wrapper in wrappers.items():
            is_ours = name == "fastmask"
            found.append(
                Contender(
                    name + ", network compiled" * is_compiled,
                    "",
                    functools.partial(Wrapping, wrapper, is_compiled),
                    is_ours=is_ours,
                    is_baseline=not is_ours and not is_compiled,
                    needs_cuda=is_compiled,
                    timed_if_wrong=not is_ours,  # its generate returns masks
                )
            )
    if task == "generate":
        for name, wrapper in wrappers.items():
            load = functools.partial(Wrapping, wrapper, has_graph=True)
            is_ours = name == "fastmask"
            found.append(
                Contender(
                    GRAPHS[name],
                    "",
                    load,
                    is_ours=is_ours,
                    needs_cuda=True,
                    keeps_memory=True,
                    timed_if_wrong=not is_ours,
                )
            )
    return found


# Which of the bounds is a contender's network. In a graph it has no time of its own to be told.
NETWORKS_OF = {
    "fastmask": "network alone, to embeddings",
    "x-transformers": "network alone, to logits",
    "fastmask, network compiled": "compiled network alone, to embeddings",
    "x-transformers, network compiled": "compiled network alone, to logits",
}


def bounds(case: Case, problem: WrapperProblem) -> Runs:
    """The network by itself, as often as a task runs it, once for each kind of output."""
    return {
        name: functools.partial(_network_alone, problem, "compiled" in name, "embeddings" in name)
        for name in NETWORKS_OF.values()
        if case.device.type == "cuda" or "compiled" not in name
    }


def _network_alone(problem: WrapperProblem, is_compiled: bool, to_embeddings: bool) -> None:
    net, case = problem.network(is_compiled), problem.case
    masked = torch.full_like(problem.tokens, problem.mask_id)
    is_training = case.task == "train"
    options = {"return_embeddings": True} if to_embeddings else {}
    problem.net.train(is_training)  # as the wrappers do: one compilation serves both
    for _ in range(1 if is_training else STEPS):
        with torch.set_grad_enabled(is_training), autocast(problem.device):
            out = net(masked, **options)
        if is_training:
            out.backward(out.detach())
            problem.net.zero_grad()
    problem.net.train()


def finish(rows: list[Row]) -> None:
    """Adds the milliseconds that a contender spends outside its network."""
    times = {row["name"]: row["ms"] for row in rows if row["status"] == "bound"}
    for row in rows:
        network = times.get(NETWORKS_OF.get(row["name"], ""))
        if "ms" in row and network is not None:
            row["outside_ms"] = row["ms"] - network


def floor(case: Case, limits: Ceilings) -> Floor:
    """No floor: throughput only."""
    return Floor(case.batch * case.seq_len, None, "tokens/s")


def benchmark(task: str) -> Benchmark:
    return Benchmark(
        task,
        functools.partial(cases, task),
        functools.partial(contenders, task),
        WrapperProblem,
        floor,
        bounds,
        finish,
    )


def largest_batch(case: Case, contender: Contender) -> int:
    """The most sequences of one run that fit into the GPU's memory, within an eighth: doubled, then bisected."""
    fits, fails = 0, 0
    batch = 1
    while not fails or fails - fits > max(1, fits // 8):
        if _runs(replace(case, batch=batch), contender):
            fits = batch
        else:
            fails = batch
        batch = (fits + fails) // 2 if fails else 2 * fits
    return fits


def _runs(case: Case, contender: Contender) -> bool:
    torch.cuda.empty_cache()
    problem = WrapperProblem(case, steps=1)  # the first step, where every position is masked, needs the most
    try:
        problem.run(contender, contender.load())
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return False
    return True


def memory_cases() -> list[Case]:
    """At which the largest batch is told (CUDA only): each network at its largest vocabulary and length."""
    found = [case for task in TASKS for case in cases(task, False)]
    return [case for case in found if (case.seq_len, case.num_tokens) == (1024, 50257)]


def show_largest_batches(case: Case) -> list[Row]:
    """Prints and returns the largest batch of each contender whose network is not compiled."""
    rows: list[Row] = []
    for contender in contenders(case.task):
        if not contender.needs_cuda:
            rows.append({"operation": case.task, "case": str(case), "contender": contender.name})
            rows[-1]["batch"] = largest_batch(case, contender)
            print("{operation}, {case}: {contender} fits {batch} sequences".format(**rows[-1]), flush=True)
    return rows
