"""Samples of a categorical law for each row of logits, and the probability of each.

A hierarchical exponential race. If E_i ~ Exponential(1) independently, then argmax_i w_i / E_i is i with probability
w_i / sum w (the exponential form of the Gumbel-max trick, e.g. Maddison, Tarlow, Minka, "A* sampling",
https://arxiv.org/abs/1411.0030). Weights of a group add up, so the 4096-id tiles race with their sums, then the
winning tile's 64 sub-tiles, then that sub-tile's 64 ids: exact, one read of the row, independent of the order of
summation up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastmask import _streams as streams
from fastmask.records import Draws, LinearLogits, PerSequence, Sampled, SampledRows, Sampling
from fastmask.reference import _few_samples_in_numpy, philox
from fastmask.reference.laws import heated, is_one, over, sub_tiles_of, sum_of
from fastmask.reference.vocabulary_filter import exact, first_largest, known_to_hold, thresholds

# Logits held at once, as many as were fastest on a CPU.
_CHUNK_ELEMENTS = 2**22
# Behind a head so many rows at least, for its product.
HEAD_CHUNK_ROWS = 128
# Of a chunk's logits so many are worked on at once by each of a CPU's threads: 256 KiB, which a core's cache holds.
_BLOCK_ELEMENTS = 2**16


@torch.no_grad()
def sample_tokens(
    logits: Tensor | LinearLogits,
    rows: SampledRows,
    draws: Draws,
    sampling: Sampling,
    kept_ids: Tensor | None,
    out: Sampled | None,
    per_sequence: PerSequence | None = None,
) -> Sampled:
    """One id for each row, one chunk of logits at a time.

    Args:
        logits: [M, V] or [B N, V] floating point; or what gives them, with embeddings [M, D] or [B N, D].
        rows: which of them.
        draws: the random numbers.
        sampling: how.
        kept_ids: [M] integer: an id >= 0 is not sampled but kept, and its probability returned; NaN of what is no id.
        out: ids and log_probs [B, N] to write in place, at the rows' positions.
        per_sequence: of which options each sequence has its own; a row's is row_indices // seq_len, below B.

    A row with NaN, +inf or no finite logit gives the lowest allowed id and NaN; no row gives id -1 and zeros.
    Equal rows of logits give equal figures, bit for bit, wherever they lie in whatever batch. Behind a head that is
    left to the matrix product (BLAS), which may round by a row's place and the batch's size.
    """
    if isinstance(logits, LinearLogits):
        num_tokens = len(logits.weight)
        chunk = max(HEAD_CHUNK_ROWS, _CHUNK_ELEMENTS // _padded(num_tokens))
    else:
        num_tokens = logits.shape[-1]
        chunk = max(1, _CHUNK_ELEMENTS // _padded(num_tokens))
        if kept_ids is None and per_sequence is None and _few_samples_in_numpy.takes(logits, rows, draws, sampling):
            sampled = _few_samples_in_numpy.sample_tokens(
                _logits_of(rows, logits, slice(None)), rows, draws, sampling
            )
            if sampled is not None:
                return sampled if out is None else _written(sampled, rows.without_strays(), out)
    run = partial(_sample_chunk_, num_tokens=num_tokens)
    return by_chunks(logits, rows, draws, sampling, kept_ids, out, per_sequence, chunk, run)


def by_chunks(
    logits: Tensor | LinearLogits,
    rows: SampledRows,
    draws: Draws,
    sampling: Sampling,
    kept_ids: Tensor | None,
    out: Sampled | None,
    per_sequence: PerSequence | None,
    chunk: int,
    sample_chunk_: Callable[[Tensor, SampledRows, Draws, Options, Tensor | None], Sampled],
) -> Sampled:
    """The same by a function of the logits of so many rows, a chunk."""
    rows = rows.without_strays()
    parts = []
    for number in range(max(1, math.ceil(len(rows.row_indices) / chunk))):  # traced, this fixes the chunks alone
        part = slice(number * chunk, (number + 1) * chunk)
        kept = None if kept_ids is None else kept_ids[part]
        options = _options(sampling, per_sequence, rows.part(part))
        parts.append(sample_chunk_(_logits_of(rows, logits, part), rows.part(part), draws, options, kept))
    sampled = Sampled(*_joined(parts))
    return sampled if out is None else _written(sampled, rows, out)


def _logits_of(rows: SampledRows, logits: Tensor | LinearLogits, part: slice) -> Tensor:
    """The logits of some of the rows [M, V] float32, filled up with -inf, which may be written to."""
    num_rows = len(rows.row_indices[part])
    if isinstance(logits, LinearLogits):
        padded, z = _room(num_rows, logits.embeddings, len(logits.weight))
        _product(logits, rows.of(logits.embeddings, part), z)
        return padded
    if _padded(logits.shape[-1]) == logits.shape[-1]:
        return rows.of(logits, part).to(torch.float32, copy=rows.is_compact)  # indexing has made a copy
    padded, z = _room(num_rows, logits, logits.shape[-1])
    first = part.start or 0
    for block in _blocks(padded):  # of which no whole copy lies beside
        few = part if block.start is None else slice(first + block.start, min(first + block.stop, first + num_rows))
        z[block] = rows.of(logits, few)
    return padded


def _room(num_rows: int, like: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Room for rows of logits filled up with -inf, and what of it the logits take."""
    padded = like.new_empty(num_rows, _padded(num_tokens), dtype=torch.float32)
    padded[:, num_tokens:] = -torch.inf
    return padded, padded[:, :num_tokens]


def _product(head: LinearLogits, embeddings: Tensor, out: Tensor) -> None:
    """Writes the logits [M, V] of embeddings [M, D], where that can be without another copy of them."""
    device = embeddings.device.type
    is_exact = embeddings.dtype == head.weight.dtype == out.dtype and not torch.is_autocast_enabled(device)
    if not is_exact or device != "cpu" or torch.compiler.is_compiling():
        out.copy_(head.of_rows(embeddings))
        return
    x, weight = head.scaled(embeddings), head.weight.mT
    if head.bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(head.bias, x, weight, out=out)
    head.capped_(out)


def _padded(num_tokens: int) -> int:
    """In how many columns so many logits lie: beyond one sub-tile in whole ones."""
    return num_tokens + (-num_tokens % streams.SUB_TILE if num_tokens > streams.SUB_TILE else 0)


def _written(sampled: Sampled, rows: SampledRows, out: Sampled) -> Sampled:
    """``out``, where the samples have been written at their rows' positions."""
    for written, values in zip(out, sampled, strict=True):
        if written is None or values is None:
            continue
        padded = F.pad(written.flatten(), (0, 1))  # the last place is for what is no row
        written.copy_(padded.index_put_((rows.row_indices,), values)[:-1].view_as(written))
    return out


def _joined(parts: Sequence[Iterable[Tensor | None]]) -> Iterator[Any]:
    """Each field of the parts, their rows together; None where there is none."""
    for first, *others in zip(*parts, strict=True):
        yield torch.cat([first, *others]) if others and first is not None else first


class Options(NamedTuple):
    """How a chunk's rows are sampled: numbers, and [M, 1] where each row has its own; see ``Sampling``.

    heat: the temperature of the samples where the figures', figures_at, has been divided by. is_greedy: whether the
    largest logit is taken. keeps_one: whether it stays alone. is_lawful: whether the options are; None for all.
    """

    sampling: Sampling
    heat: float | Tensor
    figures_at: float | Tensor
    top_k: int | Tensor | None
    min_p: float | Tensor | None
    top_p: float | Tensor | None
    is_greedy: bool | Tensor
    keeps_one: bool | Tensor
    is_lawful: Tensor | None = None

    def part(self, part: slice) -> Options:
        """Of some of the rows."""
        return Options(*(x[part] if isinstance(x, Tensor) else x for x in self))  # type: ignore[arg-type]


def _options(sampling: Sampling, per_sequence: PerSequence | None, rows: SampledRows) -> Options:
    """Of the rows, what their sequences have of their own, and else what is for all.

    NaN and a temperature below 0 are no law; what else is outside of its range is as the range's end.
    """
    figures_at, top_k, min_p, top_p = sampling.temperature_of_figures, sampling.top_k, sampling.min_p, sampling.top_p
    is_greedy: bool | Tensor = bool(sampling.is_greedy)
    options = Options(
        sampling, sampling.temperature / figures_at, figures_at, top_k, min_p, top_p, is_greedy, bool(top_k == 1)
    )
    given = {} if per_sequence is None else per_sequence.given()
    if any(len(values) == 0 for values in given.values()):  # no sequence has a row
        given = {}
    if not given:
        return options
    sequence = (rows.row_indices // rows.seq_len).clamp(min=0)
    own = {name: (values.long() if name == "top_k" else exact(values)) for name, values in given.items()}
    own = {name: values[sequence, None] for name, values in own.items()}
    is_lawful = torch.ones_like(sequence[:, None], dtype=torch.bool)
    if "temperature" in own:
        temperature = own["temperature"]
        is_lawful = is_lawful & (temperature >= 0.0)
        is_greedy = is_greedy or temperature == 0.0
        temperature = temperature.where(temperature > 0.0, 1.0).clamp(max=torch.finfo(temperature.dtype).max)
        options = options._replace(heat=temperature, figures_at=1.0)
        if sampling.processed:
            options = options._replace(heat=1.0, figures_at=temperature)
    if "top_k" in own:
        keeps_one = own["top_k"] <= 1
        is_greedy = is_greedy | keeps_one if isinstance(is_greedy, Tensor) else is_greedy or keeps_one
        options = options._replace(top_k=own["top_k"], keeps_one=keeps_one)
    shares: dict[str, Any] = {name: own[name] for name in ("min_p", "top_p") if name in own}
    for name, share in shares.items():
        is_lawful = is_lawful & ~share.isnan()
        shares[name] = share.nan_to_num(1.0).clamp(0.0, 1.0)
    options = options._replace(**shares)
    return options._replace(is_greedy=is_greedy, is_lawful=is_lawful)


class _Figures(NamedTuple):
    """What is known of rows of logits before a race.

    is_valid: [M, 1] bool, whether the largest logit is finite. largest_ids: [M, 1] int64, its id, of those that tie
    the lowest. log_totals: [M, 1] float32, log sum exp(z - max z). shares: [M, S] float32, the heated law's share of
    each sub-tile, [M, V] where one holds all ids; None where nothing races. margins, entropies: [M, 1] float32, None
    where not asked for.
    """

    is_valid: Tensor
    largest_ids: Tensor
    log_totals: Tensor
    shares: Tensor | None
    margins: Tensor | None
    entropies: Tensor | None


def _sample_chunk_(
    z: Tensor, rows: SampledRows, draws: Draws, options: Options, kept_ids: Tensor | None, *, num_tokens: int
) -> Sampled:
    """Of logits z as :func:`_logits_of` gives them, which are filtered in place."""
    blocks = [_figures(z[part], options.part(part)) for part in _blocks(z)]
    is_valid, ids, log_totals, shares, margins, entropies = _joined(blocks)
    if shares is not None:
        raced = _race(z, shares, options.heat, Race.of(rows, draws))
        ids = ids.where(options.is_greedy, raced) if isinstance(options.is_greedy, Tensor) else raced
    is_row = rows.row_indices[:, None] >= 0
    is_sound = known_to_hold(is_valid & is_row)
    if not is_sound:
        ids = ids.where(is_valid, lowest_allowed(options.sampling, num_tokens))
    if kept_ids is None:
        log_probs = z.gather(-1, ids) - log_totals
    else:
        ids = torch.where(kept_ids[:, None] >= 0, kept_ids[:, None], ids)
        is_id = ids < num_tokens
        log_probs = (z.gather(-1, ids.where(is_id, 0)) - log_totals).where(is_id, torch.nan)

    figures: list[Any] = [log_probs, margins, entropies]
    if not is_sound:
        ids = ids.where(is_row, -1)
        figures = [None if x is None else x.where(is_valid, torch.nan).where(is_row, 0.0) for x in figures]
    return Sampled(*(None if x is None else x.squeeze(-1) for x in (ids, *figures)))  # type: ignore[arg-type]


def _blocks(z: Tensor) -> Sequence[slice]:
    """As many rows of a chunk as are worked on at once, for a CPU's caches."""
    if z.device.type != "cpu" or torch.compiler.is_compiling():
        return [slice(None)]
    rows = max(1, _BLOCK_ELEMENTS * torch.get_num_threads() // z.shape[-1])
    return [slice(first, first + rows) for first in range(0, max(1, len(z)), rows)]


def _filter_(z: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Leaves in z [M, V] what may be sampled, less the row's largest and over the figures' temperature, else -inf;
    whether the row has a law, and the id of its largest, [M, 1] each."""
    sampling = options.sampling
    if sampling.mask_id is not None:
        z[:, sampling.mask_id] = -torch.inf
    if sampling.forbidden is not None:
        z[:, : len(sampling.forbidden)].masked_fill_(sampling.forbidden, -torch.inf)
    largest_ids = first_largest(z)
    largest = z.gather(-1, largest_ids)
    is_valid = largest.isfinite() if options.is_lawful is None else largest.isfinite() & options.is_lawful
    if options.keeps_one is True:
        z.fill_(-torch.inf).scatter_(-1, largest_ids, 0.0)
        return is_valid, largest_ids
    if isinstance(options.keeps_one, Tensor):
        z.masked_fill_(options.keeps_one.expand_as(z).scatter(-1, largest_ids, False), -torch.inf)
    temperature = options.figures_at
    threshold = thresholds(z, options.top_k, options.min_p, options.top_p, temperature)
    stays = None if threshold is None else torch.ge(z, threshold, out=torch.empty_like(z))
    z.sub_(largest)
    if stays is not None:  # made 1 or -inf, where z is at most 0: many times as fast on a CPU as masked_fill_
        torch.minimum(z, F.threshold(stays, 0.5, -torch.inf, inplace=True), out=z)
    if not is_one(temperature):
        z.mul_(over(temperature))
    return is_valid, largest_ids


def _figures(z: Tensor, options: Options) -> _Figures:
    """Of logits z, which are filtered in place."""
    is_valid, largest_ids = _filter_(z, options)
    law = z.softmax(dim=-1)
    races, is_short = options.is_greedy is not True, z.shape[-1] <= streams.SUB_TILE
    shares = None
    if races and is_one(options.heat):
        shares = law.clone() if is_short else sub_tiles_of(law)
    energy = sum_of(law * z.clamp(min=-1e30)) if options.sampling.with_entropy else None  # 0 times infinity is NaN
    p_largest = law.gather(-1, largest_ids)
    # Summed without the largest's own 1, which would round them away.
    others = sum_of(law.scatter_(-1, largest_ids, 0.0)) / p_largest
    log_totals = others.log1p()
    if races and shares is None:
        shares = heated(z, options.heat, law)
        shares = shares if is_short else sub_tiles_of(shares)
    margins = None
    if options.sampling.with_margin:
        second = z.scatter(-1, largest_ids, -torch.inf).amax(dim=-1, keepdim=True)
        margins = -torch.expm1(second) / (1.0 + others)  # 1 where nothing else stays
    return _Figures(
        is_valid,
        largest_ids,
        log_totals,
        shares,
        margins,
        None if energy is None else (log_totals - energy).clamp(min=0.0),
    )


def lowest_allowed(sampling: Sampling, num_tokens: int) -> Tensor | int:
    """The lowest id that may be sampled; 0 where none may."""
    if sampling.forbidden is None:
        return int(sampling.mask_id == 0 and num_tokens > 1)
    excluded = sampling.forbidden.int()
    if sampling.mask_id is not None:  # a slice is filled; a single element would wait for a copy of the 1
        excluded[sampling.mask_id : sampling.mask_id + 1] = 1
    return excluded.argmin()


class Race(NamedTuple):
    """Which random numbers M rows draw.

    sample, position: [M, 1] int64, coordinates of their counters.
    """

    draws: Draws
    sample: Tensor
    position: Tensor

    @classmethod
    def of(cls, rows: SampledRows, draws: Draws) -> Race:
        """Of rows, each of its own position."""
        row_indices = rows.row_indices[:, None]
        return cls(draws, row_indices // rows.seq_len + draws.sample_offset, row_indices % rows.seq_len)

    def keys(self, weights: Tensor, stream: int, first: Tensor | None) -> Tensor:
        """weights_i / E_i, [M, G], of counters that start at ``first`` [M, 1], None for 0; the largest wins."""
        element = torch.arange(weights.shape[-1], device=weights.device)
        high, low, _, _ = philox.draw(
            self.draws.seed,
            stream,
            self.draws.step,
            sample=self.sample,
            position=self.position,
            element=element if first is None else element + first,
        )
        return weights / philox.exponential(high, low)

    def winner(self, weights: Tensor, stream: int, first: Tensor | None) -> Tensor:
        """argmax_i weights_i / E_i, [M, 1]."""
        if weights.shape[-1] == 1:
            return torch.zeros_like(self.sample)
        return first_largest(self.keys(weights, stream, first))


def _race(z: Tensor, shares: Tensor, temperature: float | Tensor, race: Race) -> Tensor:
    """Ids [M, 1] of z [M, V], by the shares of its heated law; see ``_Figures``."""
    if z.shape[-1] <= streams.SUB_TILE:
        return race.winner(shares, streams.ELEMENT_RACE, None)
    per_tile = streams.TILE // streams.SUB_TILE
    if shares.shape[-1] <= per_tile:
        return race_in_tile(z, shares[:, None], None, temperature, race)
    sub_tiles = F.pad(shares, (0, -shares.shape[-1] % per_tile)).unflatten(-1, (-1, per_tile))
    tile = race.winner(sub_tiles.sum(dim=-1), streams.TILE_RACE, None)
    return race_in_tile(z, sub_tiles, tile, temperature, race)


def race_in_tile(
    z: Tensor, sub_tiles: Tensor, tile: Tensor | None, temperature: float | Tensor, race: Race, first_tile: int = 0
) -> Tensor:
    """Ids [M, 1] by the sub-tiles [M, tiles, sub-tiles] of each row's tile [M, 1], None for the only one, and then
    its ids; the first tile that there is of z [M, V] is the vocabulary's first_tile."""
    row, per_tile = torch.arange(len(z), device=z.device)[:, None], sub_tiles.shape[-1]
    first = first_tile * per_tile
    if tile is None:
        sub_tile = race.winner(sub_tiles[:, 0], streams.SUB_TILE_RACE, None)
    else:
        sub_tile = tile * per_tile
        sub_tile = sub_tile + race.winner(sub_tiles[row, tile][:, 0], streams.SUB_TILE_RACE, sub_tile + first)
    z = z.unflatten(-1, (-1, streams.SUB_TILE))[row, sub_tile][:, 0]
    ids = (sub_tile + first) * streams.SUB_TILE
    return ids + race.winner(heated(z, temperature), streams.ELEMENT_RACE, ids)
