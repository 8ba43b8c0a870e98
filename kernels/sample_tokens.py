"""One id for each row of logits, and the probability of each: an exponential race over tiles, sub-tiles and ids.

.. math::
    \\mathrm{id} = \\arg\\max_i w_i / E_i, \\quad w_i = e^{z_i / T}, \\quad E_i \\sim \\mathrm{Exponential}(1)

It is run hierarchically, over tiles of 4096 ids, sub-tiles of 64, single ids (``fastmask/reference/sample_tokens.py``
is the specification). One program a tile reads it once and leaves its maximum and its sums of exponentials; one
program a row lets the tiles race, then the winner's sub-tiles, then its ids. So few rows keep many SMs busy as well
as many rows do, and the sample does not depend on how the work was spread. Rows of at most 64 logits are sampled at
once, by one launch (``kernels/_short_samples.py``).

Bytes for each row: its V logits, 12 or 20 for each tile written and read; and the winning tile again, or 256 more for
each tile and a sub-tile again; where one id has p > .94, its tile once more. A vocabulary filter reads the row before
(``kernels/vocabulary_filter.py``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask import _streams as streams
from fastmask._autograd import without_autocast
from fastmask.kernels import _launch, _math, vocabulary_filter
from fastmask.kernels import _logit_rows as logit_rows
from fastmask.kernels import _sampled_figures as figures
from fastmask.kernels import _sequences as sequences
from fastmask.kernels import _short_samples as short_samples
from fastmask.kernels import _tile_race as race
from fastmask.kernels._operator import operator
from fastmask.kernels._sequences import OwnOptions
from fastmask.records import Draws, LinearLogits, PerSequence, Sampled, SampledRows, Sampling

_TILE = tl.constexpr(streams.TILE)
_SUB_TILE = tl.constexpr(streams.SUB_TILE)
_TILE_RACE = tl.constexpr(streams.TILE_RACE)
_SUB_TILE_RACE = tl.constexpr(streams.SUB_TILE_RACE)
_ELEMENT_RACE = tl.constexpr(streams.ELEMENT_RACE)

# What a tile is reduced to: its maximum and, relative to that, its sums of exponentials for the figures and at T; its
# second largest logit, and the sum of z exp(z) for the entropy.
_MAX = tl.constexpr(0)
_SUM = tl.constexpr(1)
_HEATED = tl.constexpr(2)
_SECOND = tl.constexpr(3)
_ENERGY = tl.constexpr(4)
_SHORT_RECORD = 3  # without the last two
_LONG_RECORD = 5


@triton.jit(do_not_specialize=["offset_x", "num_places", "V", "mask_id", "seq_len"])
def _tiles_kernel(
    x_ptr,
    offset_x,
    stride_x,
    row_indices_ptr,
    num_places,
    forbidden_ptr,
    thresholds_ptr,
    records_ptr,
    sub_tiles_ptr,  # None: their sums are not stored; else rows begin and end at 16 bytes
    V,
    mask_id,
    figure_factor,  # log2(e) / T of the figures; None for 1
    factor,  # likewise of the samples; None: no sums at another temperature are wanted
    figure_factors_ptr,  # of each sequence its own; None: the number is for all
    factors_ptr,
    seq_len,
    IS_COMPACT: tl.constexpr,
    WITH_MARGIN: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    RECORD: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_POLYNOMIAL: tl.constexpr,
):
    # This program reduces one tile of one row to its record.
    row = tl.program_id(0)
    flat = tl.load(row_indices_ptr + row)
    if logit_rows.is_stray(flat, num_places):
        return
    first = tl.program_id(1) * _TILE
    length = tl.minimum(V - first, _TILE)
    x_ptr = tl.multiple_of(x_ptr - offset_x, 16)
    start = offset_x + (row.to(tl.int64) if IS_COMPACT else flat) * stride_x + first
    body = logit_rows.body(start, length, VECTOR)
    threshold = tl.load(thresholds_ptr + row) if thresholds_ptr is not None else None
    figure_factor = sequences.own(figure_factors_ptr, figure_factor, flat, seq_len)
    factor = sequences.own(factors_ptr, factor, flat, seq_len)
    is_same = None
    if factors_ptr is not None:
        if sub_tiles_ptr is not None:
            is_same = factor == race.of_figures(figure_factor)
        if figure_factors_ptr is not None:  # which is the samples' too, where anything races
            factor = None

    # Of the mask's column the whole vector is left out, and its other columns are edges.
    left_out = None if mask_id is None else (mask_id - first - body.column + _TILE) // VECTOR - _TILE // VECTOR
    if forbidden_ptr is not None:  # loaded before the logits, whose threads it is brought to then, not they to its
        block = tl.arange(0, BLOCK)
        is_forbidden = tl.load(forbidden_ptr + first + body.column + block, mask=block < body.length, other=0) != 0
    z = race.load_body(x_ptr, body.start, body.length, left_out, VECTOR, BLOCK)
    if forbidden_ptr is not None:
        z = tl.where(is_forbidden, -float("inf"), z)
    forbidden = logit_rows.Excluded(None, forbidden_ptr)
    lane_max = race.max_by_lane(z, VECTOR)
    edges = tl.full((race.LANES,), -float("inf"), tl.float32)
    has_edges = body.length < length if sub_tiles_ptr is None else False
    if left_out is not None:
        has_edges |= race.is_left_out(left_out, body, VECTOR)
    if has_edges:
        offs_v, in_v = race.edges(length, body, left_out, VECTOR)
        if mask_id is not None:
            in_v &= first + offs_v != mask_id
        edges = tl.load(x_ptr + start + offs_v, mask=in_v, other=-float("inf")).to(tl.float32)
        edges = logit_rows.without_excluded(edges, first + offs_v, in_v, first, first + _TILE, forbidden)
        lane_max = tl.maximum(lane_max, edges)
    largest = tl.max(lane_max)
    shift = race.finite(largest)
    tile = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    records_ptr += tile * RECORD
    tl.store(records_ptr + _MAX, largest)
    if WITH_MARGIN:
        below, is_largest = race.below(z, largest)
        edges_below, edge_is_largest = race.below(edges, largest)
        second = tl.max(tl.maximum(race.max_by_lane(below, VECTOR), edges_below))
        number = tl.sum(race.sum_by_lane(is_largest, VECTOR) + edge_is_largest)
        tl.store(records_ptr + _SECOND, tl.where(number > 1, largest, second))

    z, edges = race.kept(z, threshold), race.kept(edges, threshold)
    line = _math.line(shift, race.of_figures(figure_factor))
    correction = _math.exp2(-line.rest)
    weight, weight_of_edges = _math.exp2_at(z, line), _math.exp2_at(edges, line)
    total = race.sum_of_lanes(race.sum_by_lane(weight, VECTOR) + weight_of_edges)
    if WITH_ENTROPY:
        energy = race.sum_by_lane(weight * race.gap(z, shift), VECTOR) + weight_of_edges * race.gap(edges, shift)
        tl.store(records_ptr + _ENERGY, race.sum_of_lanes(energy) * correction)
    if factor is not None:
        line = _math.line(shift, factor)
        weight, weight_of_edges = _math.exp2_at(z, line, BY_POLYNOMIAL), _math.exp2_at(edges, line)
    if sub_tiles_ptr is None:
        heated = total
        if factor is not None:
            heated = race.sum_of_lanes(race.sum_by_lane(weight, VECTOR) + weight_of_edges)
    else:
        SUB_TILES: tl.constexpr = BLOCK // _SUB_TILE
        sub_tile = tl.arange(0, SUB_TILES)
        sub_tiles = tl.sum(tl.reshape(weight, (SUB_TILES, _SUB_TILE)), 1)
        if mask_id is not None:
            if has_edges:
                sub_tiles += tl.where(sub_tile == (mask_id - first) // _SUB_TILE, tl.sum(weight_of_edges), 0.0)
        tl.store(sub_tiles_ptr + tile * SUB_TILES + sub_tile, sub_tiles)
        heated = race.sum_of_sub_tiles(sub_tiles)
        if factor is None:
            total = heated
        elif is_same is not None:  # it rounds as if that were known
            total = tl.where(is_same, heated, total)
    tl.store(records_ptr + _SUM, total * correction)
    tl.store(records_ptr + _HEATED, heated * _math.exp2(-line.rest))


@triton.jit(do_not_specialize=["num_places", "num_tiles", "V", "mask_id", "seq_len", "sample_offset", "step"])
def _choose_kernel(
    x_ptr,
    stride_x,
    row_indices_ptr,
    num_places,
    forbidden_ptr,
    thresholds_ptr,
    records_ptr,
    sub_tiles_ptr,  # the sums of all sub-tiles; None: those of the winning tile are formed here
    scratch_ptr,  # room for these
    seed_ptr,
    kept_ids_ptr,
    ids_ptr,
    log_probs_ptr,
    margins_ptr,
    entropies_ptr,
    num_tiles,
    V,
    mask_id,
    seq_len,
    sample_offset,
    step,
    figure_factor,
    factor,  # log2(e) / T; None: the largest logit is taken, nothing races
    figure_factors_ptr,  # of each sequence its own; None: what is said for all is
    factors_ptr,
    is_greedy_ptr,  # whether the largest logit is taken
    keeps_one_ptr,  # likewise KEEPS_ONE
    is_lawful_ptr,  # whether the options are a law
    IS_COMPACT: tl.constexpr,
    IN_PLACE: tl.constexpr,  # whether results are stored at the row's own position, or as the rows are listed
    KEEPS_ONE: tl.constexpr,  # whether the largest logit alone stays, of those that tie the first
    RECORD: tl.constexpr,
    TILE_LANES: tl.constexpr,
    SUB_TILES: tl.constexpr,
    VECTOR: tl.constexpr,  # logits that may be loaded together, counted from the row's first
):
    # This program chooses the id of one row: the tiles race, then the winner's sub-tiles, then that one's ids.
    row = tl.program_id(0)
    flat = tl.load(row_indices_ptr + row)
    written = figures.Written(ids_ptr, log_probs_ptr, margins_ptr, entropies_ptr)
    if logit_rows.is_stray(flat, num_places):
        if not IN_PLACE:
            figures.store_stray(written, row, None)
        return
    excluded = logit_rows.Excluded(mask_id, forbidden_ptr)
    start = tl.multiple_of((row.to(tl.int64) if IS_COMPACT else flat) * stride_x, VECTOR)
    logits = race.Row(x_ptr, start, V, excluded)
    out = flat if IN_PLACE else row
    counter = race.Counter(tl.load(seed_ptr), sample_offset + flat // seq_len, flat % seq_len, step)
    threshold = tl.load(thresholds_ptr + row) if thresholds_ptr is not None else None
    figure_factor = sequences.own(figure_factors_ptr, figure_factor, flat, seq_len)
    factor = sequences.own(factors_ptr, factor, flat, seq_len)
    over_temperature = race.inverse_temperature(figure_factor, figure_factors_ptr is not None)

    tile = tl.arange(0, TILE_LANES)
    records_ptr += row.to(tl.int64) * num_tiles * RECORD
    in_row = tile < num_tiles
    maxima = tl.load(records_ptr + tile * RECORD + _MAX, mask=in_row, other=-float("inf"))
    sums = tl.load(records_ptr + tile * RECORD + _SUM, mask=in_row, other=0.0)
    top = tl.max(maxima)
    # Triton 3.9's interpreter raises at an argmax of NaN alone.
    best = tl.argmax(tl.where(maxima == maxima, maxima, -float("inf")), 0).to(tl.int32)
    scale = _math.exp2((maxima - race.finite(top)) * race.of_figures(figure_factor))
    total = tl.sum(sums * scale)
    is_lawful = (tl.abs(top) < float("inf")) & (total > 0.0)  # NaN reaches the sum
    if is_lawful_ptr is not None:
        is_lawful &= sequences.holds(is_lawful_ptr, flat, seq_len)

    if factor is None:
        chosen = best
    else:
        heated = tl.load(records_ptr + tile * RECORD + _HEATED, mask=in_row, other=0.0)
        heated *= _math.exp2((maxima - race.finite(top)) * factor)
        chosen = race.winner(heated, tile, num_tiles, counter, _TILE_RACE, 0)
    first = chosen * _TILE
    shift = race.finite(tl.max(tl.where(tile == chosen, maxima, -float("inf"))))

    sub_tile = tl.arange(0, SUB_TILES)
    if sub_tiles_ptr is None:
        offs_v = first + sub_tile[:, None] * _SUB_TILE + tl.arange(0, _SUB_TILE)[None, :]
        z = race.logits_at(logits, offs_v, first, first + SUB_TILES * _SUB_TILE, VECTOR, [1, VECTOR])
    if factor is None:
        id = tl.min(tl.where(z == shift, offs_v, V))
    else:
        num_sub_tiles = tl.minimum(tl.cdiv(V, _SUB_TILE), _TILE // _SUB_TILE)
        base = chosen * (_TILE // _SUB_TILE)
        if sub_tiles_ptr is None:
            # By way of memory, so that each lane is one thread's: where the sum leaves them, many threads hold the
            # same lanes, and each would draw all their random numbers.
            sums_ptr = scratch_ptr + row.to(tl.int64) * SUB_TILES
            tl.store(sums_ptr + sub_tile, tl.sum(race.weights(z, shift, factor, threshold), 1))
            tl.debug_barrier()
        else:
            sums_ptr = sub_tiles_ptr + (row.to(tl.int64) * num_tiles + chosen) * SUB_TILES
        sums_of_tile = tl.load(sums_ptr + sub_tile)
        chosen = race.winner(sums_of_tile, sub_tile, num_sub_tiles, counter, _SUB_TILE_RACE, base)
        first = (base + chosen) * _SUB_TILE
        element = tl.arange(0, _SUB_TILE)
        z = race.logits_at(logits, first + element, first, first + _SUB_TILE, VECTOR, [VECTOR])
        weight = race.weights(z, shift, factor, threshold)
        id = first + race.winner(weight, element, _SUB_TILE, counter, _ELEMENT_RACE, first)
        if is_greedy_ptr is not None:
            if sequences.holds(is_greedy_ptr, flat, seq_len):
                id = race.first_at(logits, best * _TILE, SUB_TILES * _SUB_TILE, top, VECTOR)
    if not is_lawful:
        id = race.lowest_allowed(V, excluded)
    id = id.to(tl.int64)
    largest_id = id  # where nothing races
    if kept_ids_ptr is not None:
        kept = tl.load(kept_ids_ptr + row)
        id = tl.where(kept >= 0, kept, id)

    # A kept id that is none gives NaN, and nothing is read for it.
    z_chosen = tl.load(x_ptr + start + id, mask=id < V, other=float("nan")).to(tl.float32)
    z_chosen = logit_rows.without_excluded(z_chosen, id, id < V, 0, V, excluded)
    log_total = _math.log(total)
    if not KEEPS_ONE and total < 1.0 + figures.SURE:
        others = tl.sum(tl.where(tile == best, 0.0, sums * scale))
        others += race.others(logits, best * _TILE, SUB_TILES * _SUB_TILE, top, figure_factor, threshold, VECTOR)
        log_total = _math.log1p(others)
    keeps_one = sequences.holds(keeps_one_ptr, flat, seq_len) if keeps_one_ptr is not None else None
    law = figures.Law(top, total, log_total, over_temperature, threshold, keeps_one, is_lawful)
    figures.store_sample(written, out, None, law, id, largest_id, z_chosen, KEEPS_ONE)
    if margins_ptr is not None:
        second = top
        if not KEEPS_ONE:
            seconds = tl.load(records_ptr + tile * RECORD + _SECOND, mask=in_row, other=-float("inf"))
            second = tl.max(tl.where(tile == best, seconds, maxima))
        figures.store_margin(written, out, None, law, second, KEEPS_ONE)
    if entropies_ptr is not None:
        energy = total
        if not KEEPS_ONE:
            energies = tl.load(records_ptr + tile * RECORD + _ENERGY, mask=in_row, other=0.0)
            energy = tl.sum(scale * (energies + sums * race.gap(maxima, race.finite(top))))
        figures.store_entropy(written, out, None, law, energy, KEEPS_ONE)


# Warps of the programs over tiles, and of the choice.
_TILE_WARPS = 1  # 128 logits a thread (64 on AMD): what a program costs besides is spread over them
_COSTLY_TILE_WARPS = 2  # where so many would spill; the sums are the same
_CHOICE_WARPS = 2  # 64 lanes race: more warps would draw the same random numbers again
# Where rows of up to so many ids begin and end at 16 bytes, tiles leave the sums of their sub-tiles to the choice: of
# longer ones that costs more than to read the winning tile again.
_SUMMED = 65536

# Rows of a head's chunk of logits: enough for the matrix product.
HEAD_CHUNK_ROWS = 4096


def sample_tokens(
    logits: Tensor | LinearLogits,
    rows: SampledRows,
    draws: Draws,
    sampling: Sampling,
    kept_ids: Tensor | None,
    out: Sampled | None,
    per_sequence: PerSequence | None = None,
) -> Sampled:
    """See the reference."""
    if isinstance(logits, Tensor) and per_sequence is None:  # nothing that autograd knows is done
        return _sample(logits, rows, draws, sampling, OwnOptions(), kept_ids, out)
    with torch.no_grad():
        if isinstance(logits, LinearLogits):
            own = sequences.own_options(per_sequence, sampling, len(logits.weight))
            return _sample_behind_head(logits, rows, draws, sampling, own, kept_ids, out)
        own = sequences.own_options(per_sequence, sampling, logits.shape[-1])
        return _sample(logits, rows, draws, sampling, own, kept_ids, out)


def _sample(
    logits: Tensor,
    rows: SampledRows,
    draws: Draws,
    sampling: Sampling,
    own: OwnOptions,
    kept_ids: Tensor | None,
    out: Sampled | None,
) -> Sampled:
    """Samples of logits that are there."""
    sampled = _empty_samples(rows.row_indices, sampling) if out is None else out
    _sample_tokens_(sampled, logits, rows, draws, sampling, own, kept_ids, out is not None)
    return sampled


def _empty_samples(row_indices: Tensor, sampling: Sampling) -> Sampled:
    """Room for what is asked for."""

    def figures() -> Tensor:
        return torch.empty_like(row_indices, dtype=torch.float32)

    return Sampled(
        torch.empty_like(row_indices),
        figures(),
        figures() if sampling.with_margin else None,
        figures() if sampling.with_entropy else None,
    )


def _sample_behind_head(
    head: LinearLogits,
    rows: SampledRows,
    draws: Draws,
    sampling: Sampling,
    own: OwnOptions,
    kept_ids: Tensor | None,
    out: Sampled | None,
) -> Sampled:
    """Samples behind a linear head, one chunk of logits at a time."""
    device_type, dtype = head.embeddings.device.type, head.embeddings.dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    weight, bias = head.weight.to(dtype).mT, None if head.bias is None else head.bias.to(dtype)
    # Rows of logits begin at 16 bytes whatever V is, so that a row's sample does not depend on its neighbours.
    num_rows, num_ids, vector = rows.row_indices.shape[0], head.weight.shape[0], 16 // dtype.itemsize
    width = _launch.cdiv(num_ids, vector) * vector
    buffer = head.embeddings.new_empty((min(HEAD_CHUNK_ROWS, num_rows), width), dtype=dtype)
    parts = []
    num_chunks = max(1, _launch.cdiv(num_rows, HEAD_CHUNK_ROWS))
    for chunk in range(num_chunks):  # traced, this fixes the chunks, not the rows
        part = slice(chunk * HEAD_CHUNK_ROWS, (chunk + 1) * HEAD_CHUNK_ROWS)
        x = head.scaled(rows.of(head.embeddings, part)).to(dtype)
        logits = buffer[: x.shape[0], :num_ids]
        _head_product(x, weight, bias, out=logits)
        head.capped_(logits)
        kept = None if kept_ids is None else kept_ids[part]
        parts.append(_sample(logits, rows.part(part), draws, sampling, own, kept, out))
    if out is not None or len(parts) == 1:
        return parts[0]
    joined = (None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True))
    return Sampled(*joined)  # type: ignore[arg-type]


def _head_product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    with without_autocast(x.device.type):
        if torch.compiler.is_compiling():  # which takes no out= that is not contiguous
            product = torch.mm(x, weight) if bias is None else torch.addmm(bias, x, weight)
            out.copy_(product)
        elif bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(bias, x, weight, out=out)


@operator("sample_tokens_", mutates=("out",))
def _sample_tokens_(
    out: Sampled,
    logits: Tensor,
    rows: SampledRows,
    draws: Draws,
    sampling: Sampling,
    own: OwnOptions,
    kept_ids: Tensor | None,
    in_place: bool,
) -> None:
    """Samples the listed rows: into outputs of as many elements or, in place, of every position."""
    num_rows, num_ids = rows.row_indices.shape[0], logits.shape[-1]
    if num_rows == 0:
        return
    listed = logit_rows.LogitRows(
        logits if logits.stride(-1) == 1 else logits.contiguous(),
        rows.row_indices.contiguous(),
        rows.is_compact,
        sampling.mask_id,
        None if sampling.forbidden is None else sampling.forbidden.contiguous(),
        rows.num_places,
    )
    of_rows = listed.arguments()
    factor = None if sampling.is_greedy else _math.over_temperature(sampling.temperature)
    figures_at = sampling.temperature_of_figures
    figure_factor = None if figures_at == 1.0 else _math.over_temperature(figures_at)
    keeps_one = sampling.top_k == 1
    seq_len = rows.seq_len if own.are_any else None
    filters = (sampling.top_k, sampling.min_p, sampling.top_p, figures_at, own, seq_len)
    of_law = {
        "thresholds_ptr": None if keeps_one else vocabulary_filter.thresholds(listed, *filters),
        "figure_factor": figure_factor,
        "figure_factors_ptr": own.figure_factors,
        "factors_ptr": own.factors,
    }
    of_choice = {
        "seed_ptr": draws.seed,
        "kept_ids_ptr": None if kept_ids is None else kept_ids.contiguous(),
        "ids_ptr": out.ids,
        "log_probs_ptr": out.log_probs,
        "margins_ptr": out.margins,
        "entropies_ptr": out.entropies,
        "seq_len": rows.seq_len,
        "sample_offset": draws.sample_offset,
        "step": draws.step,
        "factor": factor,
        "is_greedy_ptr": own.is_greedy,
        "keeps_one_ptr": own.keeps_one,
        "is_lawful_ptr": own.is_lawful,
        "IN_PLACE": in_place,
        "KEEPS_ONE": keeps_one,
    }
    if num_ids <= _SUB_TILE.value:
        short_samples.launch(listed, of_law | of_choice)
        return

    num_tiles = _launch.cdiv(num_ids, _TILE.value)
    lanes = min(_TILE.value, _launch.next_power_of_2(num_ids))
    sub_tiles = lanes // _SUB_TILE.value
    loads_vectors = of_rows["offset_x"] == 0 and _holds_whole_vectors(listed)
    is_raced = factor is not None or own.factors is not None
    leaves_sums = is_raced and loads_vectors and num_ids % listed.vector == 0 and num_ids <= _SUMMED
    with_margin, with_entropy = sampling.with_margin and not keeps_one, sampling.with_entropy and not keeps_one

    def room(*shape: int) -> Tensor:
        return logits.new_empty((num_rows, *shape), dtype=torch.float32)

    record = _LONG_RECORD if with_margin or with_entropy else _SHORT_RECORD
    of_tiles = of_law | {
        "records_ptr": room(num_tiles, record),
        "sub_tiles_ptr": room(num_tiles, sub_tiles) if leaves_sums else None,
        "RECORD": record,
    }
    is_costly = lanes == _TILE.value and (with_margin or sampling.forbidden is not None or logits.element_size() == 8)
    _launch.launch(
        _tiles_kernel,
        (num_rows, num_tiles),
        logits,
        **of_rows,
        **of_tiles,
        factor=None if sampling.temperature == figures_at else factor,
        seq_len=seq_len,
        WITH_MARGIN=with_margin,
        WITH_ENTROPY=with_entropy,
        BLOCK=lanes,
        BY_POLYNOMIAL=own.factors is None and logits.element_size() == 2 and _is_b200(logits.device),
        num_warps=_COSTLY_TILE_WARPS if is_costly else _TILE_WARPS,
    )
    del of_rows["offset_x"]  # the choice counts from a row's first
    of_rows["VECTOR"] = listed.vector if loads_vectors else 1
    _launch.launch(
        _choose_kernel,
        (num_rows,),
        logits,
        **of_rows,
        **of_tiles,
        **of_choice,
        scratch_ptr=room(sub_tiles) if is_raced and not leaves_sums else None,
        num_tiles=num_tiles,
        TILE_LANES=_launch.next_power_of_2(num_tiles),
        SUB_TILES=sub_tiles,
        num_warps=1 if leaves_sums else _CHOICE_WARPS,
    )


def _is_b200(device: torch.device) -> bool:
    """Whether every eighth exponential is formed by a polynomial, see ``docs/kernels.md``."""
    return _launch.hardware(device).capability == (10, 0)


def _holds_whole_vectors(rows: logit_rows.LogitRows) -> bool:
    """Whether each row may be read by vectors from its first logit on: what lies behind its last is memory too."""
    logits, (num_rows, num_ids), vector = rows.logits, rows.logits.shape, rows.vector
    if logits.stride(0) % vector:
        return False
    if num_ids % vector == 0:  # nothing lies behind
        return True
    end = logits.storage_offset() + (num_rows - 1) * logits.stride(0) + _launch.cdiv(num_ids, vector) * vector
    return end * logits.element_size() <= logits.untyped_storage().nbytes()
