"""What the ranks of tests/test_vocabulary_parallel.py do, and what one process with the whole vocabulary does.

    python tests/vocabulary_cases.py folder

writes folder/report.json: by how much the two differ, by name of the case, and what ranks say. Ranks are forked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from rank_cases import Cases, distance, largest, run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module
from x_transformers import Encoder, TransformerWrapper

from fastmask import NonAutoregressiveWrapper, functional, vocabulary_parallel
from fastmask.distributed import padded_vocabulary, shard
from fastmask.functional import LinearLogits
from fastmask.reference import linear_masked_cross_entropy, masked_cross_entropy, vocabulary_parallel_sampling

D, ROWS = 8, 24
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "softcap": {"softcap": 2.0},
    "smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-2},
    "excluded": {"exclude_id": 3, "with_correct": True},
    "sum": {"reduction": "sum"},
    "each row": {"reduction": "none"},
    "denominator": {"denominator": 7.5},
    "padding": {"num_tokens": 37, "with_correct": True, "label_smoothing": 0.1},
}
LOSSES["everything"] = {**LOSSES["softcap"], **LOSSES["z-loss"], **LOSSES["excluded"], **LOSSES["padding"]}
SAMPLINGS: dict[str, dict[str, Any]] = {
    "argmax": {"temperature": 0.0},
    "heated": {"temperature": 0.7},
    "figures": {"with_margin": True, "with_entropy": True},
    "processed": {"temperature": 0.7, "processed": True, "with_entropy": True, "with_margin": True},
    "top_k": {"top_k": 40, "with_entropy": True},
    "many": {"top_k": 3000},
    "one": {"top_k": 1, "with_margin": True, "with_entropy": True},
    "min_p": {"min_p": 0.02, "temperature": 2.0},
    "top_p": {"top_p": 0.8, "temperature": 1.5},
    "all filters": {"top_k": 900, "min_p": 1e-3, "top_p": 0.9, "processed": True, "temperature": 1.3},
    "no share": {"top_p": 0.0},
    "each its own": {
        "temperature": torch.tensor([0.0, 0.7, 1.0, 2.0]), "top_k": torch.tensor([16384, 1, 50, 7]),
        "top_p": torch.tensor([1.0, 0.3, 0.9, 0.5]), "min_p": torch.tensor([0.0, 0.1, 0.0, 0.2]),
    },
    "forbidden": {"forbidden": range(0, 10000, 2), "mask_id": 5001, "temperature": 3.0},
    "listed": {"row_indices": torch.tensor([3, -1, 21, 7])},
    "kept": {"kept_ids": torch.arange(-12, 12).view(4, 6) * 700, "temperature": 0.7},
}  # fmt: skip


def seeded(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))).to(dtype)


def split(values: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    return distribute_tensor(values.detach(), mesh, [Shard(dim)])


def whole(values: Tensor) -> Tensor:
    return values.full_tensor() if hasattr(values, "full_tensor") else values


def rows(vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    targets = torch.randint(min(vocabulary, 37), (4, 6), generator=generator)
    is_masked = torch.rand(4, 6, generator=generator) < 0.6
    return {
        "targets": targets.where(targets != 3, 1),
        "is_masked": is_masked,
        "weights": torch.rand(4, generator=generator) + 0.5,
    }


def worst(
    ours: tuple[Any, ...], inputs: list[Tensor], expected: tuple[Any, ...], their_inputs: list[Tensor]
) -> float:
    """The distance of results, and of all gradients, which lie as their tensors do."""
    for loss in (ours[0], expected[0]):
        (loss * torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum().backward()
    assert all(type(x.grad) is type(x.data) for x in inputs)
    pairs = [
        *zip(ours, expected, strict=True),
        *((x.grad, y.grad) for x, y in zip(inputs, their_inputs, strict=True)),
    ]
    return max(distance(whole(x).double(), y.double()) for x, y in pairs if y is not None)


def leaves(*tensors: Tensor | None) -> list[Tensor]:
    return [x.requires_grad_() for x in tensors if x is not None]


def linear_loss(
    mesh: DeviceMesh, vocabulary: int, dtype: torch.dtype, options: dict[str, Any], bias: str | None
) -> float:
    tensors = seeded(4, 6, D, dtype=dtype), seeded(vocabulary, D, dtype=dtype), seeded(vocabulary, dtype=dtype)
    alone = leaves(*(x.clone() for x in tensors[: 3 if bias else 2]))
    own_bias = {"split": split(tensors[2], mesh, 0), "whole": tensors[2].clone(), None: None,
                "replicated": distribute_tensor(tensors[2], mesh, [Replicate()])}[bias]  # fmt: skip
    mine = leaves(tensors[0].clone(), split(tensors[1], mesh, 0), own_bias)
    results = []
    for embeddings, weight, *rest in (mine, alone):
        given = {"bias": rest[0]} if rest else {}
        results.append(
            functional.linear_masked_cross_entropy(embeddings, weight, **rows(vocabulary), **given, **options)
        )
    return worst(results[0], mine, results[1], alone)


def dense_loss(mesh: DeviceMesh, vocabulary: int, dtype: torch.dtype, options: dict[str, Any]) -> float:
    logits = seeded(4, 6, vocabulary, dtype=dtype)
    mine, alone = leaves(split(logits, mesh, -1), logits.clone())
    results = [functional.masked_cross_entropy(x, **rows(vocabulary), **options) for x in (mine, alone)]
    return worst(results[0], [mine], results[1], [alone])


def tied(mesh: DeviceMesh, vocabulary: int) -> float:
    """The weight is the embedding's too, which torch's own tensor parallelism splits."""
    ours, alone = (nn.Embedding(vocabulary, D, _weight=seeded(vocabulary, D)) for _ in range(2))
    parallelize_module(ours, mesh, RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()))
    given = rows(vocabulary)
    results = []
    for embedding in (ours, alone):
        embeddings = embedding(given["targets"].roll(1, 0)).tanh()
        results.append(functional.linear_masked_cross_entropy(embeddings, embedding.weight, **given))
    return worst(results[0], [ours.weight], results[1], [alone.weight])


def edges(mesh: DeviceMesh) -> float:
    """Empty batches, nothing masked, NaN, infinite and invalid rows."""
    logits = seeded(7, 9)
    logits[0, 8] = torch.nan
    logits[1, 0] = torch.inf
    logits[2] = -torch.inf
    logits[3, :6] = -torch.inf
    targets = torch.tensor([1, 1, 1, 7, 2, 9, -1])
    found = []
    for z, mask in ((logits, None), (logits[:0], None), (logits, torch.zeros(7, dtype=torch.bool))):
        targets = targets[: len(z)]
        mine, alone = leaves(split(z, mesh, -1), z.clone())
        ours, expected = (
            functional.masked_cross_entropy(x, targets, mask, reduction="none", with_correct=True, inplace_grad=True)
            for x in (mine, alone)
        )
        for loss in (ours.loss, expected.loss):
            loss.sum().backward()
        pairs = [*zip(ours, expected, strict=True), (whole(mine.grad), alone.grad)]
        found += [float((x.isnan() != y.isnan()).sum()) for x, y in pairs]
        found += [distance(x.double().nan_to_num(), y.double().nan_to_num()) for x, y in pairs]
        targets = torch.zeros(7, dtype=torch.int64)
    return max(found)


def low_precision(mesh: DeviceMesh) -> float:
    """How much further than one process's bfloat16 results from float64's ours are; in units of bfloat16's 2^-9."""
    tensors = seeded(4, 6, D).bfloat16(), seeded(50, D).bfloat16()
    exact, alone = leaves(*(x.double() for x in tensors)), leaves(*(x.clone() for x in tensors))
    mine = leaves(tensors[0].clone(), split(tensors[1], mesh, 0))
    for inputs in (exact, alone, mine):
        functional.linear_masked_cross_entropy(*inputs, **rows(50)).loss.backward()
    errors = [[distance(whole(x.grad).double(), y.grad) for x, y in zip(inputs, exact, strict=True)]
              for inputs in (mine, alone)]  # fmt: skip
    return max(ours - 1.5 * theirs for ours, theirs in zip(*errors, strict=True)) * 2**9


def sampling(mesh: DeviceMesh, dtype: torch.dtype, options: dict[str, Any], *, is_linear: bool) -> float:
    """How many ids differ; 1e-5 more of the figures counts as one."""
    vocabulary = padded_vocabulary(10000, mesh.size())
    if is_linear:
        tensors = seeded(4, 6, D, dtype=dtype), seeded(vocabulary, D, dtype=dtype), seeded(vocabulary, dtype=dtype)
        alone = LinearLogits(*tensors, softcap=5.0, num_tokens=10000)
        mine = alone._replace(weight=split(alone.weight, mesh, 0), bias=split(tensors[2], mesh, 0))
    else:
        logits = 2 * seeded(4, 6, vocabulary, dtype=dtype)
        logits[0, 0, 9000] = torch.nan
        logits[0, 1] = -torch.inf
        logits[0, 2, 4096:] = -torch.inf
        logits[0, 3, 100] = logits[0, 3, 9000] = 50.0  # a tie of two ranks
        mine, alone = split(logits, mesh, -1), logits
    ours, expected = (functional.sample_tokens(x, seed=5, step=3, sample_offset=2, **options) for x in (mine, alone))
    found = float((ours.ids != expected.ids).sum())
    for x, y in zip(ours[1:], expected[1:], strict=True):
        if y is not None:
            assert x.dtype == y.dtype
            found += float(((x - y).abs() > 1e-5 * y.abs().clamp(min=1e-2)).sum() + (x.isnan() != y.isnan()).sum())
    return found


def step(mesh: DeviceMesh) -> float:
    """How many positions differ after a step of decoding, of ids, masks and probabilities."""
    logits = 2 * seeded(4, 6, padded_vocabulary(5000, mesh.size()))
    ids, is_masked = torch.full((4, 6), 7), torch.ones(4, 6, dtype=torch.bool)
    options = {"mask_id": 7, "score": "entropy", "seed": 1, "temperature": 0.7}
    ours, alone = (functional.demask_step(x, ids, is_masked, 3, **options) for x in (split(logits, mesh, -1), logits))
    return float(sum((~x.isclose(y, rtol=1e-5)).sum() for x, y in zip(ours, alone, strict=True)))


def model(mesh: DeviceMesh | None, ranks: int, *, tied: bool, **options: Any) -> NonAutoregressiveWrapper:
    """A wrapper whose head is split over the mesh, its vocabulary padded; without a mesh, whole."""
    torch.manual_seed(0)
    layers = Encoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    padded = padded_vocabulary(5000, ranks)
    net = TransformerWrapper(num_tokens=padded, max_seq_len=6, attn_layers=layers, tie_embedding=tied)
    net.num_tokens = 5000
    if mesh is not None and tied:
        style = RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate())
        parallelize_module(net.token_emb.emb, mesh, style)
    elif mesh is not None:
        net.to_logits.weight = nn.Parameter(split(net.to_logits.weight, mesh, 0))
    return NonAutoregressiveWrapper(net, mask_id=4999, **options).double()


def wrapper(mesh: DeviceMesh, data: DeviceMesh | None = None, *, tied: bool, **options: Any) -> float:
    """Loss, gradients, nelbo and, id for id, generate; of a part of the batch where fully_shard has another mesh."""
    mine, alone = (model(m, mesh.size(), tied=tied, **options) for m in (mesh, None))
    assert mine.has_linear_head
    x = torch.randint(4999, (4, 6), generator=torch.Generator().manual_seed(1))
    part, group, first = x, {}, 0
    if data is not None:
        shard(mine, data)
        part, group = x.chunk(data.size())[data.get_local_rank()], {"process_group": data.get_group()}
        first = data.get_local_rank() * len(part)
    generators = [torch.Generator().manual_seed(3) for _ in range(2)]
    ours = mine(part, generator=generators[0], **group).loss
    ours.backward()
    expected = alone(x, generator=generators[1]).loss
    expected.backward()
    if data is not None:
        ours = ours.detach().clone() / data.size()
        dist.all_reduce(ours, group=data.get_group())
    pairs = zip(mine.parameters(), alone.parameters(), strict=True)
    both = [(whole(p.grad), q.grad) for p, q in pairs if q.grad is not None]
    found = [distance(ours, expected), largest(*zip(*both, strict=True))]
    found.append(distance(mine.nelbo(part, seed=1, **group), alone.nelbo(x, seed=1)))
    for settings in ({}, {"start_temperature": 0.7, "filter_thres": None}, {"cfg_scale": 1.0, "prompt": x[:, :2]}):
        generators = [torch.Generator().manual_seed(5) for _ in range(2)]
        settings = {"steps": 3, **settings}
        theirs = alone.generate(4, generator=generators[1], **settings)[first : first + len(part)]
        prompt = {} if "prompt" not in settings else {"prompt": settings["prompt"][first : first + len(part)]}
        settings = {**settings, **prompt, "sample_offset": first}
        found.append(float((mine.generate(len(part), generator=generators[0], **settings) != theirs).sum()))
    return max(found)


def in_two_dimensions(group: dist.ProcessGroup, *, tied: bool) -> float:
    """The vocabulary over two ranks, and the batch by FSDP2 over two such pairs."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "vocabulary"))
    return wrapper(mesh["vocabulary"], mesh["data"], tied=tied)


def bytes_a_row(mesh: DeviceMesh, run: Callable[[Tensor, Tensor], Any]) -> float:
    """What a rank tells the others of each of 24 rows of a head of width 8."""
    said = []
    module = vocabulary_parallel.dist
    originals = module.all_reduce, module.all_gather
    module.all_reduce = lambda x, *args, **kwargs: said.append(x.nbytes) or originals[0](x, *args, **kwargs)
    module.all_gather = lambda out, x, **kwargs: said.append(x.nbytes) or originals[1](out, x, **kwargs)
    try:
        run(seeded(4, 6, D, dtype=torch.float32), split(seeded(8192, D, dtype=torch.float32), mesh, 0))
    finally:
        module.all_reduce, module.all_gather = originals
    return sum(said) / ROWS


def loss_of(embeddings: Tensor, weight: Tensor, **options: Any) -> None:
    targets = torch.zeros(4, 6, dtype=torch.int64)
    functional.linear_masked_cross_entropy(embeddings, weight, targets, **options)


def sample_of(embeddings: Tensor, weight: Tensor, **options: Any) -> None:
    functional.sample_tokens(LinearLogits(embeddings, weight), seed=0, **options)


BYTES: dict[str, Callable[[Tensor, Tensor], None]] = {
    "loss": loss_of,
    "loss, smoothing": partial(loss_of, label_smoothing=0.1),
    "loss, argmax": partial(loss_of, with_correct=True),
    "loss, gradient": lambda embeddings, weight: loss_of(embeddings.requires_grad_(), weight),
    "sample": sample_of,
    "sample, min_p": partial(sample_of, min_p=0.1),
    "sample, top_k": partial(sample_of, top_k=9),
    "sample, top_p": partial(sample_of, top_p=0.9),
}


def cases() -> Cases:
    """What is done, and by how many ranks, by name."""
    found: Cases = {
        f"{name}, {ranks} ranks": (ranks, lambda group, folder, run=run: run(DeviceMesh.from_group(group, "cpu")))
        for ranks in (2, 4)
        for name, run in each_case(ranks)
    }
    for name, run in BYTES.items():
        found[f"bytes of {name}"] = (
            2,
            lambda group, folder, run=run: bytes_a_row(DeviceMesh.from_group(group, "cpu"), run),
        )
    for tied_too in (False, True):
        name = f"wrapper and FSDP2{', tied' * tied_too}, float64, 4 ranks"
        found[name] = 4, lambda group, folder, tied=tied_too: in_two_dimensions(group, tied=tied)
    return found


def each_case(ranks: int) -> Iterator[tuple[str, Callable[[DeviceMesh], float]]]:
    for name, options in LOSSES.items():
        bias = {"plain": None, "everything": "split", "padding": "whole"}.get(name, "replicated")
        for dtype in (torch.float64, torch.float32):
            suffix = str(dtype).removeprefix("torch.")
            yield f"linear {name}, {suffix}", lambda m, d=dtype, o=options, b=bias: linear_loss(m, 50, d, o, b)
        yield f"dense {name}, float64", lambda m, o=options: dense_loss(m, 50, torch.float64, o)
    for name in ("plain", "smoothing", "excluded"):  # of five ids the last of four ranks has none
        yield f"few ids {name}, float64", lambda m, o=LOSSES[name]: linear_loss(m, 5, torch.float64, o, "split")
        yield f"few columns {name}, float64", lambda m, o=LOSSES[name]: dense_loss(m, 5, torch.float64, o)
    yield "tied, float64", lambda m: tied(m, 50)
    yield "edges, float64", edges
    yield "bfloat16", low_precision
    for name, options in SAMPLINGS.items():
        if ranks == 4 and name not in ("argmax", "heated", "all filters", "kept"):
            continue
        yield f"sampling {name}", lambda m, o=options: sampling(m, torch.float32, o, is_linear=False)
        if name in ("argmax", "heated", "figures", "all filters", "kept"):
            yield f"sampling {name}, a head", lambda m, o=options: sampling(m, torch.float64, o, is_linear=True)
    yield "sampling and remasking", step
    for critic in ({}, {"self_token_critic": True, "self_cond": True})[: 4 // ranks]:
        for is_tied in (False, True):
            name = f"wrapper{', critic' * bool(critic)}{', tied' * is_tied}, float64"
            yield name, lambda m, t=is_tied, c=critic: wrapper(m, tied=t, **c)


if __name__ == "__main__":
    for module in (linear_masked_cross_entropy, masked_cross_entropy, vocabulary_parallel_sampling):
        module.CHUNK_ROWS = 10  # several chunks, and a last one that is smaller
    run_ranks(cases, sys.argv[1])
