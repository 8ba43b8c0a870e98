"""Samples of rows of at most 64 logits, which are one sub-tile: its ids race at once, of several rows a program.

Bytes for each row: its V logits, once. See ``kernels/sample_tokens.py``.
"""

from __future__ import annotations

from collections.abc import Mapping

import triton
import triton.language as tl

from fastmask import _streams as streams
from fastmask.kernels import _launch, _math
from fastmask.kernels import _logit_rows as logit_rows
from fastmask.kernels import _sampled_figures as figures
from fastmask.kernels import _sequences as sequences
from fastmask.kernels import _tile_race as race

_ELEMENT_RACE = tl.constexpr(streams.ELEMENT_RACE)


@triton.jit
def _of_columns(x, IS_OF_ROWS: tl.constexpr):
    """What each row has of its own, for each of its columns; a number as it is."""
    return x[:, None] if IS_OF_ROWS else x


# Rows are loaded logit by logit, side by side, wherever they begin.
@triton.jit(
    do_not_specialize=["stride_x", "num_rows", "num_places", "V", "mask_id", "seq_len", "sample_offset", "step"],
)
def _short_samples_kernel(
    x_ptr,
    stride_x,
    row_indices_ptr,
    num_rows,
    num_places,
    forbidden_ptr,
    thresholds_ptr,
    seed_ptr,
    kept_ids_ptr,
    ids_ptr,
    log_probs_ptr,
    margins_ptr,
    entropies_ptr,
    V,
    mask_id,
    seq_len,
    sample_offset,
    step,
    figure_factor,  # log2(e) / T of the figures; None for 1
    factor,  # of the samples; None: the largest logit is taken, nothing races
    figure_factors_ptr,  # of each sequence its own; None: what is said for all is
    factors_ptr,
    is_greedy_ptr,
    keeps_one_ptr,
    is_lawful_ptr,
    IS_COMPACT: tl.constexpr,
    IN_PLACE: tl.constexpr,
    KEEPS_ONE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    # This program samples ROWS rows. Arguments: see _choose_kernel.
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = row < num_rows
    flat = tl.load(row_indices_ptr + row, mask=in_rows, other=-1)
    is_row = logit_rows.is_stray(flat, num_places) == 0
    written = figures.Written(ids_ptr, log_probs_ptr, margins_ptr, entropies_ptr)
    if not IN_PLACE:
        figures.store_stray(written, row, in_rows & (is_row == 0))
    out = flat if IN_PLACE else row.to(tl.int64)
    figure_factor = sequences.own(figure_factors_ptr, figure_factor, flat, seq_len, is_row)
    factor = sequences.own(factors_ptr, factor, flat, seq_len, is_row)
    over_temperature = race.inverse_temperature(figure_factor, figure_factors_ptr is not None)
    threshold = tl.load(thresholds_ptr + row, mask=is_row) if thresholds_ptr is not None else None

    column = tl.arange(0, COLUMNS)
    is_id = column < V
    if mask_id is not None:
        is_id &= column != mask_id
    if forbidden_ptr is not None:
        is_id &= tl.load(forbidden_ptr + column, mask=is_id, other=1) == 0
    x_row = row.to(tl.int64) if IS_COMPACT else flat
    x_ptr += tl.where(is_row, x_row, 0) * stride_x
    in_z = is_row[:, None] & is_id[None, :]
    z = tl.load(x_ptr[:, None] + column[None, :], mask=in_z, other=-float("inf")).to(tl.float32)
    top = tl.max(z, 1)
    shift = race.finite(top)[:, None]
    threshold_of_columns = None if threshold is None else threshold[:, None]
    weight = race.weights(
        z, shift, _of_columns(race.of_figures(figure_factor), figure_factors_ptr is not None), threshold_of_columns
    )
    total = tl.sum(weight, 1)
    is_lawful = (tl.abs(top) < float("inf")) & (total > 0.0)  # NaN reaches the sum
    if is_lawful_ptr is not None:
        is_lawful &= sequences.holds(is_lawful_ptr, flat, seq_len, is_row)

    if factor is None:
        id = tl.min(tl.where(z == shift, column[None, :], COLUMNS), 1)
    else:
        heated = race.weights(z, shift, _of_columns(factor, factors_ptr is not None), threshold_of_columns)
        sample, position = sample_offset + flat // seq_len, flat % seq_len
        counter = race.Counter(tl.load(seed_ptr), sample[:, None], position[:, None], step)
        id = tl.argmax(race.keys(heated, column[None, :], counter, _ELEMENT_RACE, 0), 1).to(tl.int32)
        if is_greedy_ptr is not None:
            largest = tl.min(tl.where(z == shift, column[None, :], COLUMNS), 1)
            id = tl.where(sequences.holds(is_greedy_ptr, flat, seq_len, is_row), largest, id)
    lowest = tl.min(tl.where(is_id, column, COLUMNS))
    id = tl.where(is_lawful, id, lowest % COLUMNS).to(tl.int64)  # 0 where none may be sampled
    largest_id = id  # where nothing races
    if kept_ids_ptr is not None:
        kept = tl.load(kept_ids_ptr + row, mask=is_row, other=-1)
        id = tl.where(kept >= 0, kept, id)

    # A kept id that is none gives NaN.
    z_chosen = tl.max(tl.where(column[None, :] == id[:, None], z, -float("inf")), 1)
    z_chosen = tl.where(id < V, z_chosen, float("nan"))
    others = tl.sum(tl.where(z < shift, weight, 0.0), 1)
    log_total = tl.where(total < 1.0 + figures.SURE, _math.log1p(others), _math.log(total))
    keeps_one = sequences.holds(keeps_one_ptr, flat, seq_len, is_row) if keeps_one_ptr is not None else None
    law = figures.Law(top, total, log_total, over_temperature, threshold, keeps_one, is_lawful)
    figures.store_sample(written, out, is_row, law, id, largest_id, z_chosen, KEEPS_ONE)
    if margins_ptr is not None:
        below, is_largest = race.below(z, top[:, None])
        second = tl.where(tl.sum(is_largest, 1) > 1, top, tl.max(below, 1))
        figures.store_margin(written, out, is_row, law, second, KEEPS_ONE)
    if entropies_ptr is not None:
        energy = tl.sum(weight * race.gap(z, shift), 1)
        figures.store_entropy(written, out, is_row, law, energy, KEEPS_ONE)


# Eight lanes a thread: what a program costs besides is spread over them.
_LANES = 256


def launch(rows: logit_rows.LogitRows, arguments: Mapping[str, object]) -> None:
    """Samples rows of at most 64 logits. arguments: the others of the kernel, by name."""
    columns = max(2, _launch.next_power_of_2(rows.num_ids))
    of_rows = rows.arguments()
    del of_rows["offset_x"], of_rows["VECTOR"]
    _launch.launch(
        _short_samples_kernel,
        (_launch.cdiv(rows.num_rows, _LANES // columns),),
        rows.logits,
        **of_rows,
        **arguments,
        num_rows=rows.num_rows,
        ROWS=_LANES // columns,
        COLUMNS=columns,
        num_warps=1,
    )
