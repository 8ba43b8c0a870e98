"""Sampling ids from logits: what is accepted, refused and promised."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from fastmask import _check, _dispatch, vocabulary_parallel
from fastmask._devices import to_device
from fastmask._memoised import memoised
from fastmask.ops.linear_masked_cross_entropy import check_head, local_head
from fastmask.ops.masked_cross_entropy import check_softcap
from fastmask.ops.seeds import as_draws
from fastmask.records import Draws, LinearLogits, PerSequence, Sampled, SampledRows, Sampling
from fastmask.reference import sample_tokens as reference
from fastmask.reference import vocabulary_parallel_sampling
from fastmask.vocabulary_parallel import Columns


def sample_tokens(
    logits: Tensor | LinearLogits,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    min_p: float | Tensor | None = None,
    top_p: float | Tensor | None = None,
    processed: bool = False,
    mask_id: int | None = None,
    forbidden: Tensor | Sequence[int] | None = None,
    row_indices: Tensor | None = None,
    seq_len: int | None = None,
    kept_ids: Tensor | None = None,
    with_margin: bool = False,
    with_entropy: bool = False,
    out: Sampled | None = None,
    seed: int | Tensor | None = None,
    generator: torch.Generator | None = None,
    step: int = 0,
    sample_offset: int = 0,
    backend: str = "auto",
) -> Sampled:
    r"""Samples ids from logits, exactly, and gives the probability of each.

    .. math::
        \mathrm{id}_i \sim \mathrm{softmax}(z_i / T) \text{ over } A_i, \qquad
        \log p_i = z_{i,\mathrm{id}_i} - \log \sum_{v \in A_i} e^{z_{i,v}}

    A_i are the ids that are neither excluded nor filtered out. No figure but the sample itself is heated, unless
    ``processed``: then z is z / T in all of it.

    temperature, top_k, min_p and top_p are numbers, or tensors [B] with one for each sequence; of compact rows, row r
    is of sequence ``row_indices[r] // seq_len``. A tensor gives what its numbers would for each sequence alone. Its
    values are not read: what is refused of a number is taken as said below.

    Args:
        logits: [B, N, V] float16|bfloat16|float32|float64 (worked on in float32), one row for each
            position; or [M, V], compact rows, with ``row_indices`` and ``seq_len``. Or :class:`LinearLogits`, with
            embeddings [B, N, D] or [M, D] likewise: logits then exist for one chunk of the rows at a time.
            A DTensor, logits that are Shard(-1) or a head's weight that is Shard(0), on a mesh of one dimension,
            stays split over its ranks, each with a multiple of 4096 ids (``fastmask.distributed.padded_vocabulary``):
            each has the ids of one process. All other tensors are plain, and equal on these ranks.
        temperature: T >= 0; 0 takes the argmax, ties to the lower id. Or [B] floating point: below 0 and NaN give the
            lowest allowed id and NaN.
        top_k: k >= 1: keeps the k largest logits, and all that tie with the last of them; 1 keeps the argmax alone,
            ties to the lower id. None, or k >= V, keeps all. Or [B] int32|int64: below 1 is as 1.
        min_p: in [0, 1]: of those, keeps the ids at least so many times as likely as the likeliest. None, or 0, keeps
            all. Or [B] floating point: outside of [0, 1] is as its nearer end; NaN gives the lowest allowed id and
            NaN.
        top_p: in [0, 1]: of those, keeps the nucleus: the fewest likeliest ids that together have at least this share
            of the probability, at least one, and all that tie with the last. None, or 1, keeps all. Or [B], likewise.
        processed: whether min_p, top_p and all figures are of softmax(z / T), rather than softmax(z), as in Dream,
            SDAR, LLaDA2 and DiffusionGemma. At T = 0, where that is all in one id, they are of softmax(z).
        mask_id: never sampled. None, or an id outside [0, V), excludes nothing.
        forbidden: [V] bool, True at more ids that are never sampled; or a sequence of those ids, no tensor (copied
            to the device at each call).
        row_indices: [M] int64, flat positions b N + i: those of compact rows, or the only ones of [B, N, V] to be
            sampled. -1, or what is no position, is no row: id -1, figures 0.
        seq_len: N, for compact rows.
        kept_ids: as the ids returned, int64: where >= 0 that id is kept, not sampled, and its probability given (NaN
            for one past V).
        with_margin: also give how much more likely the likeliest id is than the next.
        with_entropy: also give the entropy.
        out: ids [B, N] int64 and log_probs [B, N] float32, and what else is asked for, contiguous, to be written in
            place at the rows' positions, and returned; other positions stay as they are.
        seed, generator: see the module.
        step: index of the demasking step, so that one seed serves a whole generation. Random numbers belong to a
            position and a step: two slices of a sequence (blocks) that are sampled by themselves with the same seed
            and step draw the same. Number the steps through all blocks.
        sample_offset: global index of the first sequence.
        backend: see the module.

    Returns:
        Sampled, [B, N] or [M] each:

        - ids: int64;
        - log_probs: float32, nats;
        - margins: float32, in [0, 1], or None;
        - entropies: float32, nats, or None.

        A row with NaN, +inf or no finite logit gives the lowest allowed id and NaN. A kept id that is filtered out
        gives -inf.

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape or number.

    Randomness: streams TILE_RACE, SUB_TILE_RACE and ELEMENT_RACE of the seed at ``step``.

    Source: the exponential race, equal in law to Gumbel-max (Maddison et al.,
    https://arxiv.org/abs/1411.0030), in three levels of 4096, 64 and 1 ids. The nucleus: Holtzman et al.,
    https://arxiv.org/abs/1904.09751, eq. 2. min_p: Nguyen et al., https://arxiv.org/abs/2407.01082.

    Example:
        >>> logits = torch.tensor([[[0.0, 5.0, 1.0]]])
        >>> sample_tokens(logits, temperature=0.0).ids
        tensor([[1]])

        Behind a linear head:

        >>> embeddings, weight = torch.ones(1, 1, 2), torch.tensor([[0.0, 0.0], [2.0, 1.0], [1.0, 0.0]])
        >>> sample_tokens(LinearLogits(embeddings, weight), top_k=1).ids
        tensor([[1]])
    """
    name, source, num_ids = checked_logits(logits)
    rows, shape = sampled_rows(name, source, row_indices, seq_len)
    sampling, per_sequence = checked_options(
        (temperature, top_k, min_p, top_p), forbidden, source.device,
        num_ids, mask_id, with_margin, with_entropy, processed,
    )  # fmt: skip
    kept_ids = _checked_kept_ids(name, source, kept_ids, shape)
    if out is not None:
        _check_out(name, source, out, rows, sampling)
        rows = rows._replace(num_places=out.ids.numel())
    rows = check_per_sequence(name, source, per_sequence, rows, out)
    draws = as_draws(seed, source.device, generator, step, sample_offset)
    sampled = sample_checked(logits, rows, draws, sampling, kept_ids, out, per_sequence, backend)
    if out is not None or len(shape) == 1:
        return sampled
    return Sampled(*[None if values is None else values.view(shape) for values in sampled])  # type: ignore[arg-type]


def sample_checked(
    logits: Tensor | LinearLogits,
    rows: SampledRows,
    draws: Draws,
    sampling: Sampling,
    kept_ids: Tensor | None,
    out: Sampled | None,
    per_sequence: PerSequence | None,
    backend: str,
) -> Sampled:
    """What :func:`sample_tokens` does once all is checked: ``out``, or samples [M]."""
    run: Callable[..., Sampled]
    if vocabulary_parallel.is_split(logits.weight if isinstance(logits, LinearLogits) else logits):
        others = {"row_indices": rows.row_indices, "kept_ids": kept_ids, "forbidden": sampling.forbidden}
        if isinstance(logits, LinearLogits):
            others["embeddings"] = logits.embeddings
        vocabulary_parallel.check(backend, **others)
        logits, columns = _local_part(logits)
        run = partial(vocabulary_parallel_sampling.sample_tokens, columns=columns)
    else:
        logits = logits.cut() if isinstance(logits, LinearLogits) else logits
        run = _dispatch.implementation(reference.sample_tokens, draws.seed.device, backend)
    if isinstance(logits, LinearLogits):
        flat: Tensor | LinearLogits = logits._replace(embeddings=logits.embeddings.flatten(0, -2))
    else:
        flat = logits.flatten(0, -2)
    sampled = run(flat, rows, draws, sampling, kept_ids, out, per_sequence)
    return sampled if out is None else out


def checked_logits(logits: Tensor | LinearLogits) -> tuple[str, Tensor, int]:
    """What its rows are called, the rows [..., V] or [..., D] themselves, and V."""
    if isinstance(logits, LinearLogits):
        check_head(logits.embeddings, logits.weight, logits.bias)
        _check.number("scale", logits.scale, -math.inf)
        check_softcap(logits.softcap)
        if logits.num_tokens is not None:
            _check.integer("num_tokens", logits.num_tokens, 1, len(logits.weight) + 1)
        return "embeddings", logits.embeddings, logits.num_ids
    _check.tensor("logits", logits, _check.FLOATING)
    return "logits", logits, logits.shape[-1] if logits.ndim else 0


def _local_part(logits: Tensor | LinearLogits) -> tuple[Tensor | LinearLogits, Columns]:
    """What this rank has of logits, or of a head, that is split over ranks."""
    if isinstance(logits, LinearLogits):
        vocabulary_parallel.check_tiles(logits.weight, 0)
        return local_head(logits)
    vocabulary_parallel.check_tiles(logits, -1)
    return vocabulary_parallel.local_part("logits", logits, -1)


def sampled_rows(
    name: str, rows: Tensor, row_indices: Tensor | None, seq_len: int | None
) -> tuple[SampledRows, torch.Size]:
    """Which rows are sampled, and the shape of what is returned."""
    shape = rows.shape[:-1]
    if row_indices is not None:
        _check.tensor("row_indices", row_indices, [torch.int64], ndim=1)
        _check.same_device(**{name: rows, "row_indices": row_indices})
        shape = row_indices.shape
    if row_indices is None or rows.ndim == 3:
        if rows.ndim != 3 or (seq_len is not None and seq_len != rows.shape[1]):
            raise ValueError(
                f"expected {name} [B, N, ...], received shape {list(rows.shape)}"
                + (f" and seq_len={seq_len}" if rows.ndim == 3 else "; compact rows need row_indices= and seq_len=")
            )
        seq_len = rows.shape[1]
    elif rows.ndim != 2 or row_indices.shape != rows.shape[:1] or seq_len is None:
        raise ValueError(
            f"expected compact {name} [M, ...] with row_indices [M] and seq_len, received "
            f"{list(rows.shape)}, {list(row_indices.shape)} and seq_len={seq_len}"
        )
    is_compact = row_indices is None or rows.ndim == 2
    if row_indices is None:  # every row is listed
        row_indices = torch.arange(rows.shape[0] * rows.shape[1], device=rows.device)
    num_places = None if rows.ndim == 2 else rows.shape[0] * rows.shape[1]
    return SampledRows(
        row_indices, max(1, _check.integer("seq_len", seq_len, 0, 2**31)), is_compact, num_places
    ), shape


_OfSampling: TypeAlias = "tuple[Any, Any, Any, Any]"


def checked_options(
    options: _OfSampling,
    forbidden: Tensor | Sequence[int] | None,
    device: torch.device,
    num_ids: int,
    *others: Any,
) -> tuple[Sampling, PerSequence | None]:
    """What a sampler over so many ids is told for all sequences, and what each has of its own, if anything.

    options: temperature, top_k, min_p and top_p. others: mask_id, with_margin, with_entropy and processed.
    """
    own = None
    shared: Sequence[Any] = options
    if any([isinstance(option, Tensor) for option in options]):
        own = PerSequence(*[option if isinstance(option, Tensor) else None for option in options])
        temperature, *filters = (None if isinstance(option, Tensor) else option for option in options)
        shared = 1.0 if own.temperature is not None else temperature, *filters
    sampling = _checked_sampling(num_ids, *shared, *others)
    if forbidden is not None:
        sampling = sampling._replace(forbidden=as_forbidden(forbidden, num_ids, device, sampling.mask_id))
    return sampling, own


def check_per_sequence(
    name: str, source: Tensor, per_sequence: PerSequence | None, rows: SampledRows, out: Sampled | None
) -> SampledRows:
    """The checks of tensors [B]; the rows, of which those past the last sequence are none."""
    if per_sequence is None:
        return rows
    given = per_sequence.given()
    for option, values in given.items():
        _check.tensor(option, values, _check.INTEGER if option == "top_k" else _check.FLOATING, ndim=1)
    batch = len(next(iter(given.values())))
    if source.ndim == 3:
        batch = source.shape[0]
    elif out is not None:
        batch = out.ids.shape[0]
    for option, values in given.items():
        _check.shape(option, values, [batch], "B")
    _check.same_device(**{name: source, **given})
    return rows if rows.num_places is not None else rows._replace(num_places=batch * rows.seq_len)


@memoised
def _checked_sampling(
    num_ids: int,
    temperature: float,
    top_k: int | None,
    min_p: float | None,
    top_p: float | None,
    mask_id: int | None,
    with_margin: bool,
    with_entropy: bool,
    processed: bool,
) -> Sampling:
    """The options of a sampler over so many ids; what changes nothing is None."""
    if num_ids == 0:
        raise ValueError("expected a vocabulary of at least 1 id, received 0")
    _check.flag("with_margin", with_margin)
    _check.flag("with_entropy", with_entropy)
    _check.flag("processed", processed)
    _check.number("temperature", temperature, 0.0)
    if top_k is not None:
        top_k = _check.integer("top_k", top_k, 1)
        top_k = top_k if top_k < num_ids else None
    if min_p is not None:
        _check.number("min_p", min_p, 0.0, 1.0)
        min_p = float(min_p) if min_p > 0.0 else None
    if top_p is not None:
        _check.number("top_p", top_p, 0.0, 1.0)
        top_p = float(top_p) if top_p < 1.0 else None
    if mask_id is not None:
        mask_id = _check.integer("mask_id", mask_id, -(2**63), 2**63)
        mask_id = mask_id if 0 <= mask_id < num_ids else None
    return Sampling(float(temperature), top_k, min_p, top_p, mask_id, None, with_margin, with_entropy, processed)


def as_forbidden(
    forbidden: Tensor | Sequence[int] | None, num_tokens: int, device: torch.device, mask_id: int | None
) -> Tensor | None:
    """Forbidden ids as the samplers take them without copying: [num_tokens] bool on the device, None for none.

    Raises:
        TypeError, ValueError: neither such a tensor nor ids in [0, num_tokens), or ids that leave none but mask_id.
    """
    if forbidden is None:
        return None
    table = _check.id_table("forbidden", forbidden, num_tokens, device)
    if table is not forbidden:
        _check.allowed_ids("forbidden", table, mask_id, "leave one out")
    return to_device(table, device)


def _checked_kept_ids(name: str, source: Tensor, kept_ids: Tensor | None, shape: torch.Size) -> Tensor | None:
    """The ids that a sampler keeps, flat."""
    if kept_ids is None:
        return None
    _check.tensor("kept_ids", kept_ids, [torch.int64])
    _check.shape("kept_ids", kept_ids, shape, "as the rows")
    _check.same_device(**{name: source, "kept_ids": kept_ids})
    return kept_ids.flatten()


def _check_out(name: str, source: Tensor, out: Sampled, rows: SampledRows, sampling: Sampling) -> None:
    """The checks of what a sampler writes."""
    if not isinstance(out, Sampled):
        raise TypeError(f"expected out to be a Sampled of ids and log_probs, received {type(out).__name__}")
    _check_given("margin", sampling.with_margin, out.margins)
    _check_given("entropy", sampling.with_entropy, out.entropies)
    _check.tensor("out.ids", out.ids, [torch.int64], ndim=2)
    if source.ndim == 3:
        _check.shape("out.ids", out.ids, source.shape[:2], "B, N")
    if max(1, out.ids.shape[1]) != rows.seq_len:
        raise ValueError(f"expected out.ids [B, {rows.seq_len}], received {list(out.ids.shape)}")
    for field, values in zip(_OUT_FIELDS, out, strict=True):
        if values is None:
            continue
        if values is not out.ids:
            _check.tensor(field, values, [torch.float32])
            _check.shape(field, values, out.ids.shape, "B, N")
        if not values.is_contiguous():
            raise ValueError(f"expected {field} to be contiguous, received strides {list(values.stride())}")
    _check.same_device(**{name: source}, **dict(zip(_OUT_FIELDS, out, strict=True)))


_OUT_FIELDS = tuple(f"out.{field}" for field in Sampled._fields)


def _check_given(figure: str, is_wanted: bool, values: Tensor | None) -> None:
    """There is room for a figure where, and only where, it is asked for."""
    if is_wanted is (values is None):
        field = {"margin": "margins", "entropy": "entropies"}[figure]
        raise ValueError(f"expected out.{field} with with_{figure}=True, received one of them; give or leave both")
