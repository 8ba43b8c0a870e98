"""One evaluation of the bound: batches from a tensor, a data set or a loader, and what each sequence costs.

No pass of the network waits for the one before, and none holds its logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from fastmask import _check
from fastmask._devices import device_of, to_device
from fastmask._progress import Progress, track
from fastmask.distributed import ALONE, Ranks
from fastmask.records import CrossEntropy, Draws, MaskedTokens

# Sequences of a data set that go through the network together, where nobody says.
CHUNK_SIZE = 32
# Seeds of successive batches of a stream: steps of splitmix64's odd constant, so that no two are near.
SEED_STEP = 0x9E3779B97F4A7C15


class Batch(NamedTuple):
    """Some sequences, and which random numbers they draw.

    tokens: [B, N]. maskable: [B, N] bool, None for all. arguments: the network's. number: of the seed. first: index
    of the first sequence among those that share the seed. total: how many sequences do.
    """

    tokens: Tensor
    maskable: Tensor | None
    arguments: dict[str, Any]
    number: int
    first: int
    total: int


class Source(NamedTuple):
    """Where batches come from.

    num_batches: None where nobody can tell. num_sequences: that share the seed; None where each batch has its own.
    is_part: of a process group's, so that this rank may have no batch.
    """

    batches: Iterable[Batch]
    num_batches: int | None
    num_sequences: int | None = None
    is_part: bool = False


class Bound(NamedTuple):
    """What all sequences cost, summed over draws: nats [B] float64; and how many tokens each has, [B] float64."""

    nats: Tensor
    num_tokens: Tensor

    def reduced(self, reduction: str, num_samples: int, ranks: Ranks = ALONE) -> Tensor:
        """ "mean": nats a token, [], of all ranks. "none": nats a sequence, [B]. Float32."""
        nats = self.nats / num_samples
        if reduction == "none":
            return nats.float()
        total, num_tokens = ranks.total(torch.stack([nats.sum(), self.num_tokens.sum()]))
        return (total / num_tokens.clamp(min=1)).float()


# The source


def source(tokens: object, chunk_size: int | None, maskable: Tensor | None, arguments: dict[str, Any]) -> Source:
    """The batches of what ``nelbo`` was given."""
    if chunk_size is not None:
        chunk_size = _check.integer("chunk_size", chunk_size, 1)
    if isinstance(tokens, Tensor):
        return _of_tensor(tokens, chunk_size, maskable, arguments)
    if maskable is not None:
        raise ValueError(
            f"expected maskable with a tensor of tokens, received it with {type(tokens).__name__}; give batches as "
            'dicts of "input_ids" and "maskable"'
        )
    if isinstance(tokens, Dataset):
        return _of_data_set(tokens, chunk_size or CHUNK_SIZE, arguments)
    if chunk_size is not None:
        raise ValueError(
            f"expected chunk_size with a tensor or a data set, received it with {type(tokens).__name__}, which comes "
            "in batches; leave it out"
        )
    if isinstance(tokens, (str, bytes, Mapping)) or not isinstance(tokens, Iterable):
        raise TypeError(
            "expected tokens to be a torch.Tensor [B, N], a data set, or an iterable of batches (a DataLoader), "
            f"received {type(tokens).__name__}"
        )
    return Source(_stream(tokens, arguments), _length(tokens))


def _of_tensor(tokens: Tensor, chunk_size: int | None, maskable: Tensor | None, arguments: dict[str, Any]) -> Source:
    _check.tensor("tokens", tokens, _check.INTEGER, ndim=2)
    if maskable is not None:
        _check.tensor("maskable", maskable, [torch.bool])
        _check.shape("maskable", maskable, tokens.shape, "B, N")
    total = len(tokens)
    size = max(1, total) if chunk_size is None else chunk_size

    def batches() -> Iterator[Batch]:
        for first in range(0, max(1, total), size):
            rows = slice(first, first + size)
            part = None if maskable is None else maskable[rows]
            given = arguments if size >= total else _rows_of(arguments, rows, total)
            yield Batch(tokens[rows], part, given, 0, first, total)

    return Source(batches(), -(-max(1, total) // size), total)


def _rows_of(arguments: dict[str, Any], rows: slice, total: int) -> dict[str, Any]:
    """Arguments of some sequences: tensors with one row for each sequence are cut, others stay."""
    return {
        name: value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == total else value
        for name, value in arguments.items()
    }


def _of_data_set(data: Dataset[Any], size: int, arguments: dict[str, Any]) -> Source:
    """Items [N] in chunks. One that has no length is a stream."""
    if isinstance(data, IterableDataset) or not isinstance(data, Sized):
        return Source(_stream(map(_stacked, _chunks(iter(data), size)), arguments), None)
    total = len(data)
    items = (data[index] for index in range(total))

    def batches() -> Iterator[Batch]:
        first = 0
        for chunk in map(_stacked, _chunks(items, size)):
            yield Batch(*_ids(chunk), arguments, 0, first, total)
            first += size

    return Source(batches(), -(-total // size), total)


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while chunk := list(itertools.islice(items, size)):
        yield chunk


def _stacked(items: list[Any]) -> Any:
    """Items of a data set as a batch."""
    try:
        return torch.utils.data.default_collate(items)
    except RuntimeError as error:
        raise ValueError(
            "expected items of one length in a chunk of the data set; give chunk_size=1, or a DataLoader with a "
            f"collate_fn that pads them ({error})"
        ) from None


def _stream(batches: Iterable[Any], arguments: dict[str, Any]) -> Iterator[Batch]:
    """Batches of which nobody knows how many sequences there will be: each has a seed of its own."""
    for number, batch in enumerate(batches):
        tokens, maskable = _ids(batch)
        yield Batch(tokens, maskable, arguments, number, 0, len(tokens))


def _ids(batch: Any) -> tuple[Tensor, Tensor | None]:
    """The ids of a batch [B, N], and where they are maskable."""
    maskable = None
    if isinstance(batch, Mapping):
        if "input_ids" not in batch:
            raise ValueError(f'expected batches that are dicts to have "input_ids", received {list(batch)}')
        batch, maskable = batch["input_ids"], batch.get("maskable")
    elif isinstance(batch, (tuple, list)) and batch and isinstance(batch[0], Tensor):
        batch = batch[0]
    _check.tensor("tokens of a batch", batch, _check.INTEGER, ndim=2)
    if maskable is not None:
        _check.tensor('"maskable" of a batch', maskable, [torch.bool])
        _check.shape('"maskable" of a batch', maskable, batch.shape, "B, N")
    return batch, maskable


def _length(batches: object) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader over one
        return None


def part_of_rank(source: Source, seed: Tensor, ranks: Ranks) -> tuple[Source, Tensor]:
    """Places a rank's batches in the whole, and gives rank 0's seed [] int64.

    Sequences that share a seed are counted from rank to rank, which waits for their numbers. Other batches alternate.
    """
    if ranks.are_one:
        return source, seed
    own = torch.stack([seed, torch.full_like(seed, source.num_sequences or 0)])
    seeds, sizes = ranks.gathered(own).unbind(dim=-1)
    if source.num_sequences is None:
        batches = (b._replace(number=b.number * ranks.size + ranks.rank) for b in source.batches)
    else:
        before, total = int(sizes[: ranks.rank].sum()), int(sizes.sum())
        batches = (b._replace(first=before + b.first, total=total) for b in source.batches)
    return source._replace(batches=batches, is_part=True), seeds[0]


# The loop


class Model(NamedTuple):
    """What is evaluated.

    net: says where batches are to lie. mask: tokens, maskable, draws and how many sequences share the seed to masks.
    cost: tokens, masks and the network's arguments to the loss of every position.
    """

    net: Any
    mask: Callable[[Tensor, Tensor | None, Draws, int], MaskedTokens]
    cost: Callable[[Tensor, MaskedTokens, dict[str, Any]], CrossEntropy]


def run(batches: Source, model: Model, seed: Tensor, num_samples: int, progress: Progress) -> Bound:
    """What every sequence costs, over num_samples draws by a seed [] int64."""
    if progress and batches.num_batches is None:
        raise ValueError("expected progress= with tokens that have a length, received a stream; leave it out")
    passes = track((batches.num_batches or 0) * num_samples, progress, "evaluating")
    nats, num_tokens = [], []
    if batches.is_part:
        nats, num_tokens = ([torch.zeros(0, dtype=_sum_dtype(seed.device), device=seed.device)] for _ in range(2))
    for batch in batches.batches:
        batch = _on_device_of(model.net, batch)
        draws = Draws(to_device(_seed_of(batch, seed), batch.tokens.device))
        total = torch.zeros(len(batch.tokens), dtype=_sum_dtype(batch.tokens.device), device=batch.tokens.device)
        for sample in range(num_samples):
            next(passes, None)
            own = draws._replace(sample_offset=sample * batch.total + batch.first)
            total += _nats(batch, own, model, num_samples)
        nats.append(total)
        num_tokens.append(_num_tokens(batch).to(total.dtype))
    next(passes, None)  # the end is reported by asking for one more
    if not nats:
        raise ValueError("expected tokens in batches, received none; an iterator can be evaluated once only")
    return Bound(torch.cat(nats), torch.cat(num_tokens))


def _nats(batch: Batch, draws: Draws, model: Model, num_samples: int) -> Tensor:
    """The weighted loss of every sequence, [B]. Logits are let go when it returns."""
    masked = model.mask(batch.tokens, batch.maskable, draws, num_samples * batch.total)
    return masked.loss_weights * model.cost(batch.tokens, masked, batch.arguments).nll.sum(dim=-1)


def _on_device_of(net: Any, batch: Batch) -> Batch:
    """The batch where the network lies; where it is if the network has no parameters."""
    device = device_of(net, batch.tokens.device)
    maskable = None if batch.maskable is None else to_device(batch.maskable, device)
    return batch._replace(tokens=to_device(batch.tokens, device), maskable=maskable)


def _seed_of(batch: Batch, seed: Tensor) -> Tensor:
    step = batch.number * SEED_STEP % 2**64
    return seed + (step - 2**64 if step >= 2**63 else step)


def _num_tokens(batch: Batch) -> Tensor:
    """How many tokens of each sequence are modelled, [B]."""
    if batch.maskable is not None:
        return batch.maskable.sum(dim=-1)
    return torch.full(batch.tokens.shape[:1], batch.tokens.shape[1], device=batch.tokens.device)


def _sum_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64
