"""One demasking step: sample every masked row, score the samples, choose what to mask again.

A hierarchical exponential race over tiles of 4096 ids, sub-tiles of 64, single ids (see
``fastmask/reference/demask.py``, the specification): one program a tile reads it once and leaves its maximum and
its sums of exponentials; one program a row lets the tiles race, then the winner's sub-tiles, then its ids. So few
rows keep many SMs busy as well as many rows do, and the sample does not depend on how the work was spread. One
program a sequence then selects what is masked again, and lists it for the next step.

Bytes for each row: its V logits, 12 or 20 for each tile written and read; and the winning tile again, or 256 more for
each tile and a sub-tile again. A vocabulary filter reads the row before (``kernels/top_k_filter.py``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask import _streams as streams
from fastmask.kernels import _elementary as elementary
from fastmask.kernels import _order as ordered
from fastmask.kernels import _rows as logit_rows
from fastmask.kernels import philox, top_k_filter
from fastmask.kernels._operator import operator

_TILE = tl.constexpr(streams.TILE)
_SUB_TILE = tl.constexpr(streams.SUB_TILE)
_TILE_RACE = tl.constexpr(streams.TILE_RACE)
_SUB_TILE_RACE = tl.constexpr(streams.SUB_TILE_RACE)
_ELEMENT_RACE = tl.constexpr(streams.ELEMENT_RACE)
_SCORE_NOISE = tl.constexpr(streams.SCORE_NOISE)

# What a tile is reduced to: its maximum and, relative to that, its sums of exponentials at temperature 1 and T; its
# second largest logit, and the sum of z exp(z) for the entropy.
_MAX = tl.constexpr(0)
_SUM = tl.constexpr(1)
_HEATED = tl.constexpr(2)
_SECOND = tl.constexpr(3)
_ENERGY = tl.constexpr(4)
_SHORT_RECORD = 3  # without the last two
_LONG_RECORD = 5

_LOG2E = tl.constexpr(math.log2(math.e))
_POSITION_BITS = tl.constexpr(16)
_MAX_LENGTH = 1 << _POSITION_BITS.value
_END = tl.constexpr(1 << 48)  # above every key; the key of what is not eligible


@triton.jit
def _finite(x):
    """x, or 0 for -inf: what may be subtracted from -inf."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def _without(z, weight, threshold, HAS_THRESHOLD: tl.constexpr):
    """The weight of logits, 0 below the threshold; what a NaN weighs stays NaN."""
    return tl.where(z < threshold, 0.0, weight) if HAS_THRESHOLD else weight


@triton.jit
def _load_body(x_ptr, first, length, SIZE: tl.constexpr):
    """SIZE elements of a body from ``first`` on, float32; -inf from ``length`` elements on, which is a multiple of
    16 bytes."""
    if x_ptr.dtype.element_ty == tl.bfloat16:
        word = tl.arange(0, SIZE // 2)
        first = tl.multiple_of(first // 2, 4)
        words = logit_rows.load_words(x_ptr, first + word, word < tl.multiple_of(length // 2, 4))
        even, odd = logit_rows.halves(words)
        return tl.interleave(even, odd)
    else:
        lane = tl.arange(0, SIZE)
        return tl.load(x_ptr + first + lane, mask=lane < length, other=-float("inf")).to(tl.float32)


@triton.jit
def _tile_sums(z, shift, threshold, factor, HAS_THRESHOLD: tl.constexpr, IS_HEATED: tl.constexpr,
               WITH_ENTROPY: tl.constexpr, sub_tiles_ptr=None):  # fmt: skip
    """Sums over a block of logits of w = exp(z - shift), of exp((z - shift) / T), and of w (z - shift).

    The second of each of its sub-tiles too, where there is a place to store them.
    """
    unheated = _without(z, elementary.exp2((z - shift) * _LOG2E), threshold, HAS_THRESHOLD)
    heated = unheated
    if IS_HEATED:
        heated = _without(z, elementary.exp2((z - shift) * factor), threshold, HAS_THRESHOLD)
    if sub_tiles_ptr is None:
        heated_total = tl.sum(heated)
    else:
        SUB_TILES: tl.constexpr = z.shape[0] // _SUB_TILE
        sub_tiles = tl.sum(tl.reshape(heated, (SUB_TILES, _SUB_TILE)), 1)
        tl.store(sub_tiles_ptr + tl.arange(0, SUB_TILES), sub_tiles)
        heated_total = tl.sum(sub_tiles)
    total = tl.sum(unheated) if IS_HEATED else heated_total
    energy = total
    if WITH_ENTROPY:
        energy = tl.sum(unheated * tl.maximum(z - shift, -1e30))  # 0 times infinity is NaN
    return total, heated_total, energy


@triton.jit
def _second_largest(z, largest):
    """The second largest of a block, the largest itself where two are."""
    is_largest = z == largest
    second = tl.max(tl.where(is_largest, -float("inf"), z))
    return tl.where(tl.sum(is_largest.to(tl.int32)) > 1, largest, second)


@triton.jit(do_not_specialize=["lead_x", "num_rows", "V", "mask_id"])
def _tiles_kernel(
    x_ptr,
    lead_x,
    stride_x,
    row_indices_ptr,
    forbidden_ptr,
    thresholds_ptr,
    records_ptr,
    sub_tiles_ptr,
    num_rows,
    V,
    mask_id,
    factor,  # log2(e) / T
    IS_COMPACT: tl.constexpr,
    HAS_MASK_ID: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    HAS_SUB_TILES: tl.constexpr,  # whether their sums are stored; rows then begin and end at 16 bytes
    IS_HEATED: tl.constexpr,
    WITH_MARGIN: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    RECORD: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # This program reduces one tile of one row to its record.
    row = tl.program_id(0)
    flat = tl.load(row_indices_ptr + row)
    if flat < 0:
        return
    first = tl.program_id(1) * _TILE
    length = tl.minimum(V - first, _TILE)
    x_ptr = tl.multiple_of(x_ptr - lead_x, 16)
    start = lead_x + (row.to(tl.int64) if IS_COMPACT else flat) * stride_x + first
    body_column, body_start, body_length = logit_rows.body(start, length, VECTOR)
    threshold = tl.load(thresholds_ptr + row) if HAS_THRESHOLD else 0.0

    block = tl.arange(0, BLOCK)
    z = _load_body(x_ptr, body_start, body_length, BLOCK)
    z = logit_rows.without_excluded(
        z, first + body_column + block, block < body_length, first, first + _TILE, mask_id, forbidden_ptr,
        HAS_MASK_ID, HAS_FORBIDDEN,
    )  # fmt: skip
    offs_v, in_v = logit_rows.edges(length, body_column, body_length, VECTOR)
    edge_max = tl.full((), -float("inf"), tl.float32)
    edges = tl.full((2 * VECTOR,), -float("inf"), tl.float32)
    has_edges = False if HAS_SUB_TILES else body_length < length
    if has_edges:
        edges = tl.load(x_ptr + start + offs_v, mask=in_v, other=-float("inf")).to(tl.float32)
        edges = logit_rows.without_excluded(
            edges, first + offs_v, in_v, first, first + _TILE, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN
        )
        edge_max = tl.max(edges)
    body_max = tl.max(z)
    largest = tl.maximum(body_max, edge_max)
    shift = _finite(largest)
    tile = row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    sub_tiles = sub_tiles_ptr + tile * (BLOCK // _SUB_TILE) if HAS_SUB_TILES else None
    total, heated, energy = _tile_sums(z, shift, threshold, factor, HAS_THRESHOLD, IS_HEATED, WITH_ENTROPY, sub_tiles)
    if has_edges:
        edge_sums = _tile_sums(edges, shift, threshold, factor, HAS_THRESHOLD, IS_HEATED, WITH_ENTROPY)
        total += edge_sums[0]
        heated += edge_sums[1]
        energy += edge_sums[2]
    records_ptr += tile * RECORD
    tl.store(records_ptr + _MAX, largest)
    tl.store(records_ptr + _SUM, total)
    tl.store(records_ptr + _HEATED, heated)
    if WITH_MARGIN:
        second = tl.maximum(_second_largest(z, body_max), tl.minimum(body_max, edge_max))
        if has_edges:
            second = tl.maximum(second, _second_largest(edges, edge_max))
        tl.store(records_ptr + _SECOND, second)
    if WITH_ENTROPY:
        tl.store(records_ptr + _ENERGY, energy)


@triton.jit
def _winner(weights, lane, num_lanes, seed, stream: tl.constexpr, sample, position, first, step):
    """argmax_i weights_i / E_i over the first num_lanes; ties to the lower lane, and 0 where there is but one."""
    winner = tl.full((), 0, tl.int32)
    if num_lanes > 1:
        high, low, _, _ = philox.draw(seed, stream, sample, position, first + lane, step)
        # Triton 3.9's interpreter raises at an argmax of NaN alone.
        race = tl.where((lane < num_lanes) & (weights >= 0.0), weights / philox.exponential(high, low), -1.0)
        winner = tl.argmax(race, 0).to(tl.int32)
    return winner


@triton.jit
def _weights_at(x_ptr, start, offs_v, first, last, V, mask_id, forbidden_ptr, threshold, shift, factor,
                HAS_FORBIDDEN: tl.constexpr, HAS_THRESHOLD: tl.constexpr, VECTOR: tl.constexpr,
                LOADED: tl.constexpr):  # fmt: skip
    """Logits at columns in [first, last), -inf where there is none, and their weights in the race.

    Where rows begin at 16 bytes VECTOR columns are loaded or left together: what lies behind the last is dropped.
    """
    in_v = offs_v < V
    in_row = tl.max_constancy(offs_v // VECTOR * VECTOR < V, LOADED)
    z = tl.load(x_ptr + start + offs_v, mask=in_row, other=-float("inf")).to(tl.float32)
    if (last > V) | ((mask_id >= first) & (mask_id < last)):  # other blocks spend nothing on it; -1 for no mask
        z = tl.where(in_v & (offs_v != mask_id), z, -float("inf"))
    z = logit_rows.without_excluded(z, offs_v, in_v, first, last, mask_id, forbidden_ptr, False, HAS_FORBIDDEN)
    return z, _without(z, elementary.exp2((z - shift) * factor), threshold, HAS_THRESHOLD)


@triton.jit
def _lowest_allowed(V, mask_id, forbidden_ptr, HAS_MASK_ID: tl.constexpr, HAS_FORBIDDEN: tl.constexpr):
    """The lowest id that may be sampled; 0 where none may."""
    lowest = tl.full((), 0, tl.int32)
    if HAS_FORBIDDEN:
        is_forbidden = tl.load(forbidden_ptr) != 0
        if HAS_MASK_ID:
            is_forbidden |= mask_id == 0
        while is_forbidden & (lowest < V):
            lowest += 1
            is_forbidden = tl.load(forbidden_ptr + lowest, mask=lowest < V, other=0) != 0
            if HAS_MASK_ID:
                is_forbidden |= lowest == mask_id
    elif HAS_MASK_ID:
        lowest += (mask_id == 0).to(tl.int32)
    return tl.where(lowest < V, lowest, 0)


@triton.jit(do_not_specialize=["num_tiles", "V", "mask_id", "seq_len", "sample_offset", "step"])
def _choose_kernel(
    x_ptr,
    stride_x,
    row_indices_ptr,
    forbidden_ptr,
    thresholds_ptr,
    records_ptr,
    sub_tiles_ptr,
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
    factor,
    IS_COMPACT: tl.constexpr,
    IS_CANVAS: tl.constexpr,  # whether results are stored at the row's own position, or as the rows are listed
    HAS_MASK_ID: tl.constexpr,
    HAS_FORBIDDEN: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    HAS_SUB_TILES: tl.constexpr,  # whether their sums are known, or read the winning tile again
    HAS_KEPT: tl.constexpr,
    IS_GREEDY: tl.constexpr,
    WITH_MARGIN: tl.constexpr,
    WITH_ENTROPY: tl.constexpr,
    RECORD: tl.constexpr,
    TILE_LANES: tl.constexpr,
    SUB_TILES: tl.constexpr,
    VECTOR: tl.constexpr,  # logits that may be loaded together, counted from the row's first
):
    # This program chooses the id of one row: the tiles race, then the winner's sub-tiles, then that one's ids.
    row = tl.program_id(0)
    flat = tl.load(row_indices_ptr + row)
    if flat < 0:
        if not IS_CANVAS:
            tl.store(ids_ptr + row, -1)
            tl.store(log_probs_ptr + row, 0.0)
            if WITH_MARGIN:
                tl.store(margins_ptr + row, 0.0)
            if WITH_ENTROPY:
                tl.store(entropies_ptr + row, 0.0)
        return
    start = tl.multiple_of((row.to(tl.int64) if IS_COMPACT else flat) * stride_x, VECTOR)
    out = flat if IS_CANVAS else row
    seed = tl.load(seed_ptr)
    sample = sample_offset + flat // seq_len
    position = flat % seq_len
    threshold = tl.load(thresholds_ptr + row) if HAS_THRESHOLD else 0.0

    tile = tl.arange(0, TILE_LANES)
    records_ptr += row.to(tl.int64) * num_tiles * RECORD
    in_row = tile < num_tiles
    maxima = tl.load(records_ptr + tile * RECORD + _MAX, mask=in_row, other=-float("inf"))
    sums = tl.load(records_ptr + tile * RECORD + _SUM, mask=in_row, other=0.0)
    top = tl.max(maxima)
    best = tl.argmax(tl.where(maxima == maxima, maxima, -float("inf")), 0).to(tl.int32)  # likewise
    scale = elementary.exp2((maxima - _finite(top)) * _LOG2E)
    total = tl.sum(sums * scale)
    is_lawful = (tl.abs(top) < float("inf")) & (total > 0.0)  # NaN reaches the sum

    if IS_GREEDY:
        chosen = best
    else:
        heated = tl.load(records_ptr + tile * RECORD + _HEATED, mask=in_row, other=0.0)
        heated *= elementary.exp2((maxima - _finite(top)) * factor)
        chosen = _winner(heated, tile, num_tiles, seed, _TILE_RACE, sample, position, 0, step)
    first = chosen * _TILE
    shift = _finite(tl.max(tl.where(tile == chosen, maxima, -float("inf"))))

    sub_tile = tl.arange(0, SUB_TILES)
    sub_tiles_ptr += (row.to(tl.int64) * num_tiles + chosen if HAS_SUB_TILES else row.to(tl.int64)) * SUB_TILES
    if not HAS_SUB_TILES:
        offs_v = first + sub_tile[:, None] * _SUB_TILE + tl.arange(0, _SUB_TILE)[None, :]
        z, weights = _weights_at(
            x_ptr, start, offs_v, first, first + SUB_TILES * _SUB_TILE, V, mask_id, forbidden_ptr, threshold, shift,
            factor, HAS_FORBIDDEN, HAS_THRESHOLD, VECTOR, [1, VECTOR],
        )  # fmt: skip
    if IS_GREEDY:
        id = tl.min(tl.where(z == shift, offs_v, V))
    else:
        num_sub_tiles = tl.minimum(tl.cdiv(V, _SUB_TILE), _TILE // _SUB_TILE)
        base = chosen * (_TILE // _SUB_TILE)
        if not HAS_SUB_TILES:
            # By way of memory, so that each lane is one thread's: where the sum leaves them, many threads hold the
            # same lanes, and each would draw all their random numbers.
            tl.store(sub_tiles_ptr + sub_tile, tl.sum(weights, 1))
            tl.debug_barrier()
        sub_tile_sums = tl.load(sub_tiles_ptr + sub_tile)
        chosen = _winner(sub_tile_sums, sub_tile, num_sub_tiles, seed, _SUB_TILE_RACE, sample, position, base, step)
        first = (base + chosen) * _SUB_TILE
        element = tl.arange(0, _SUB_TILE)
        z, weights = _weights_at(
            x_ptr, start, first + element, first, first + _SUB_TILE, V, mask_id, forbidden_ptr, threshold, shift,
            factor, HAS_FORBIDDEN, HAS_THRESHOLD, VECTOR, [VECTOR],
        )  # fmt: skip
        id = first + _winner(weights, element, _SUB_TILE, seed, _ELEMENT_RACE, sample, position, first, step)
    if not is_lawful:
        id = _lowest_allowed(V, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN)
    id = id.to(tl.int64)
    if HAS_KEPT:
        kept = tl.load(kept_ids_ptr + row)
        id = tl.where(kept >= 0, kept, id)

    # A kept id that is none gives NaN, and nothing is read for it.
    z_chosen = tl.load(x_ptr + start + id, mask=id < V, other=float("nan")).to(tl.float32)
    z_chosen = logit_rows.without_excluded(
        z_chosen, id, id < V, 0, V, mask_id, forbidden_ptr, HAS_MASK_ID, HAS_FORBIDDEN
    )
    log_total = elementary.log(total)
    log_prob = (z_chosen - top) - log_total
    if HAS_THRESHOLD:  # a kept id may lie below it
        log_prob = tl.where(z_chosen < threshold, -float("inf"), log_prob)
    tl.store(ids_ptr + out, id)
    tl.store(log_probs_ptr + out, tl.where(is_lawful, log_prob, float("nan")))
    if WITH_MARGIN:
        seconds = tl.load(records_ptr + tile * RECORD + _SECOND, mask=in_row, other=-float("inf"))
        second = tl.max(tl.where(tile == best, seconds, maxima))
        if HAS_THRESHOLD:
            second = tl.where(second < threshold, -float("inf"), second)
        # 1 - exp(-gap), to relative accuracy where the two are close.
        half = elementary.tanh(0.5 * (top - second))
        margin = tl.where(second == -float("inf"), 1.0, 2.0 * half / (1.0 + half)) / total
        tl.store(margins_ptr + out, tl.where(is_lawful, margin, float("nan")))
    if WITH_ENTROPY:
        energies = tl.load(records_ptr + tile * RECORD + _ENERGY, mask=in_row, other=0.0)
        energy = tl.sum(scale * (energies + sums * tl.maximum(maxima - _finite(top), -1e30)))
        entropy = tl.maximum(log_total - energy / total, 0.0)
        tl.store(entropies_ptr + out, tl.where(is_lawful, entropy, float("nan")))


@triton.jit
def _gumbel(seed, sample, position, step):
    """Gumbel(0, 1) noise of a position's score."""
    high, low, _, _ = philox.draw(seed, _SCORE_NOISE, sample, position, 0, step)
    return -elementary.log(philox.exponential(high, low))


@triton.jit(do_not_specialize=["num_elements", "N", "sample_offset", "step"])
def _noise_kernel(seed_ptr, noise_ptr, num_elements, N, sample_offset, step, BLOCK: tl.constexpr):
    # This program draws a block of Gumbel noise.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    noise = _gumbel(tl.load(seed_ptr), sample_offset + offsets // N, offsets % N, step)
    tl.store(noise_ptr + offsets, noise, mask=offsets < num_elements)


@triton.jit
def _selection_keys(scores_ptr, eligible_ptr, offs_n, N, seed, sample, step, noise_scale, IS_CONFIDENCE: tl.constexpr,
                    HAS_NOISE: tl.constexpr):  # fmt: skip
    """Distinct int64 keys in the order of selection: NaN, then by falling score, then by position; _END where not
    eligible."""
    in_n = offs_n < N
    score = tl.load(scores_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)
    is_eligible = tl.load(eligible_ptr + offs_n, mask=in_n, other=0) != 0
    if HAS_NOISE:
        score += noise_scale * _gumbel(seed, sample, offs_n, step)
    if IS_CONFIDENCE:
        score = -score
    return tl.where(is_eligible, (_descending(score) << _POSITION_BITS) | offs_n, _END)


@triton.jit
def _descending(score):
    """int64 in [0, 2^32) that falls as the score rises; 0 for NaN."""
    order = 0x7FFFFFFF - ordered.order(tl.where(score == 0.0, 0.0, score)).to(tl.int64)  # -0.0 as 0.0
    return tl.where(score == score, order, 0)


@triton.jit
def _commit(ids_ptr, is_masked_ptr, row_indices_ptr, row, offs_n, N, is_chosen, slot, end, mask_id):
    """Masks what was chosen of a block, everything else not, and lists it; the next free slot of the list."""
    in_n = offs_n < N
    tl.store(is_masked_ptr + row * N + offs_n, is_chosen, mask=in_n)
    tl.store(ids_ptr + row * N + offs_n, mask_id, mask=is_chosen)
    number = is_chosen.to(tl.int32)
    slots = slot + tl.cumsum(number, 0) - 1
    tl.store(row_indices_ptr + slots, row * N + offs_n, mask=is_chosen & (slots < end))
    return slot + tl.sum(number)


# The counts and starts of one step lie in a row of a plan's, so that their alignment differs between steps.
@triton.jit(
    do_not_specialize=["N", "sample_offset", "step", "mask_id"],
    do_not_specialize_on_alignment=["counts_ptr", "row_starts_ptr"],
)
def _selection_kernel(
    scores_ptr,
    eligible_ptr,
    counts_ptr,
    seed_ptr,
    ids_ptr,
    is_masked_ptr,
    row_indices_ptr,
    row_starts_ptr,
    N,
    sample_offset,
    step,
    noise_scale,
    min_score,
    mask_id,
    IS_CONFIDENCE: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_MIN_SCORE: tl.constexpr,
    IS_CANVAS: tl.constexpr,  # whether ids and the list of rows are written too
    ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # This program selects in one sequence. With ONE_BLOCK its keys stay in registers; otherwise each pass reads them.
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * N
    eligible_ptr += row * N
    seed = tl.load(seed_ptr) if HAS_NOISE else 0
    sample = sample_offset + row
    block = tl.arange(0, BLOCK_N)
    limit = BLOCK_N if ONE_BLOCK else N
    key = _selection_keys(
        scores_ptr, eligible_ptr, block, N, seed, sample, step, noise_scale, IS_CONFIDENCE, HAS_NOISE
    )
    low = tl.full((), _END, tl.int64)
    high = tl.full((), -1, tl.int64)
    num_eligible = tl.full((), 0, tl.int32)
    # Scores of at least the least come before the first key of what is lower.
    end = tl.full((), _END, tl.int64)
    if HAS_MIN_SCORE:
        end = (_descending(min_score) + 1) << _POSITION_BITS
    for first in range(0, limit, BLOCK_N):
        if not ONE_BLOCK:
            key = _selection_keys(
                scores_ptr, eligible_ptr, first + block, N, seed, sample, step, noise_scale, IS_CONFIDENCE, HAS_NOISE
            )
        low = tl.minimum(low, tl.min(key))
        high = tl.maximum(high, tl.max(tl.where(key < end, key, -1)))
        num_eligible += tl.sum((key < end).to(tl.int32))
    count = tl.load(counts_ptr + row)
    count = tl.minimum(tl.maximum(count, 0), num_eligible).to(tl.int32)

    # low <= the threshold < high + 1; so many keys lie below either end.
    high += 1
    below_low = tl.full((), 0, tl.int32)
    below_high = num_eligible
    low = tl.where(count == num_eligible, high, low)
    below_low = tl.where(count == num_eligible, num_eligible, below_low)
    turn = tl.full((), 0, tl.int32)
    while below_low != count:
        share = (count - below_low).to(tl.float32) / (below_high - below_low + 1).to(tl.float32)
        probe = tl.where(turn % 2 == 0, ((high - low).to(tl.float32) * share).to(tl.int64), (high - low) >> 1)
        probe = low + tl.minimum(tl.maximum(probe, 1), high - low - 1)
        turn += 1
        below = tl.full((), 0, tl.int32)
        for first in range(0, limit, BLOCK_N):
            if not ONE_BLOCK:
                key = _selection_keys(
                    scores_ptr, eligible_ptr, first + block, N, seed, sample, step, noise_scale, IS_CONFIDENCE,
                    HAS_NOISE,
                )  # fmt: skip
            below += tl.sum((key < probe).to(tl.int32))
        is_low = below <= count
        low = tl.where(is_low, probe, low)
        below_low = tl.where(is_low, below, below_low)
        high = tl.where(is_low, high, probe)
        below_high = tl.where(is_low, below_high, below)

    slot = tl.full((), 0, tl.int64)
    list_end = slot
    if IS_CANVAS:
        slot = tl.load(row_starts_ptr + row)
        list_end = tl.load(row_starts_ptr + row + 1)
    for first in range(0, limit, BLOCK_N):
        if not ONE_BLOCK:
            key = _selection_keys(
                scores_ptr, eligible_ptr, first + block, N, seed, sample, step, noise_scale, IS_CONFIDENCE, HAS_NOISE
            )
        if IS_CANVAS:
            slot = _commit(
                ids_ptr, is_masked_ptr, row_indices_ptr, row, first + block, N, key < low, slot, list_end, mask_id
            )
        else:
            tl.store(is_masked_ptr + row * N + first + block, key < low, mask=first + block < N)
    if IS_CANVAS:
        for free in range(slot, list_end, BLOCK_N):
            tl.store(row_indices_ptr + free + block, tl.full((BLOCK_N,), -1, tl.int64), mask=free + block < list_end)


# Warps of the programs over tiles, the choice, the selection.
_TILE_WARPS = 2  # 64 logits a thread (32 on AMD): what a program costs besides is spread over them
_CHOICE_WARPS = 2  # 64 lanes race: more warps would draw the same random numbers again
# Where rows of up to so many ids begin and end at 16 bytes, tiles leave the sums of their sub-tiles to the choice: of
# longer ones that costs more than to read the winning tile again.
_SUMMED = 65536
_SELECTION = ((1024, 4), (4096, 8))  # longest sequence, warps: its keys stay in registers
_SELECTION_BLOCKS = (4096, 8)
_NOISE_BLOCK = 1024

# Rows of a head's chunk of logits: enough for the matrix product.
HEAD_CHUNK_ROWS = 4096


@operator("sample_tokens_", mutates=("ids", "log_probs", "margins", "entropies"))
def _sample_tokens_(
    ids: Tensor,
    log_probs: Tensor,
    margins: Tensor | None,
    entropies: Tensor | None,
    logits: Tensor,
    row_indices: Tensor,
    kept_ids: Tensor | None,
    forbidden: Tensor | None,
    seed: Tensor,
    is_canvas: bool,
    is_compact: bool,
    seq_len: int,
    sample_offset: int,
    step: int,
    temperature: float,
    filter_thres: float | None,
    top_p: float | None,
    mask_id: int | None,
) -> None:
    """Samples the listed rows: into outputs of as many elements, or of every position where ``is_canvas``."""
    num_rows, num_ids = row_indices.shape[0], logits.shape[-1]
    if num_rows == 0:
        return
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    num_tiles = triton.cdiv(num_ids, _TILE.value)
    lanes = max(_SUB_TILE.value, min(_TILE.value, triton.next_power_of_2(num_ids)))
    sub_tiles = lanes // _SUB_TILE.value
    vector = 16 // logits.element_size()
    lead = logit_rows.lead(logits)
    may_load_vectors = lead == 0 and _holds_whole_vectors(logits, vector)
    has_sub_tiles = may_load_vectors and num_ids % vector == 0 and num_ids <= _SUMMED and temperature != 0.0
    has_mask = mask_id is not None and 0 <= mask_id < num_ids
    rows: dict[str, Any] = {
        "x_ptr": logits,
        "stride_x": logits.stride(0),
        "row_indices_ptr": row_indices,
        "forbidden_ptr": forbidden,
        "V": num_ids,
        "mask_id": mask_id if has_mask else -1,
        "IS_COMPACT": is_compact,
        "HAS_MASK_ID": has_mask,
        "HAS_FORBIDDEN": forbidden is not None,
    }
    aligned = {"lead_x": lead, "num_rows": num_rows, "VECTOR": vector}
    # It stays finite, infinity times the maximum's 0 being NaN, and above 0, for the sake of -inf.
    limits = torch.finfo(torch.float32)
    factor = max(limits.tiny, min(_LOG2E.value / temperature, limits.max)) if temperature else 0.0
    record = _SHORT_RECORD if margins is None and entropies is None else _LONG_RECORD
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        thresholds = top_k_filter.thresholds(rows | aligned, filter_thres, top_p)
        tiles: dict[str, Any] = {
            "thresholds_ptr": thresholds,
            "records_ptr": logits.new_empty((num_rows, num_tiles, record), dtype=torch.float32),
            "sub_tiles_ptr": logits.new_empty(
                (num_rows, num_tiles if has_sub_tiles else 1, sub_tiles), dtype=torch.float32
            ),
            "factor": factor,
            "HAS_THRESHOLD": thresholds is not None,
            "HAS_SUB_TILES": has_sub_tiles,
            "WITH_MARGIN": margins is not None,
            "WITH_ENTROPY": entropies is not None,
            "RECORD": record,
        }
        _tiles_kernel[(num_rows, num_tiles)](
            **rows,
            **aligned,
            **tiles,
            IS_HEATED=temperature not in (0.0, 1.0),
            BLOCK=lanes,
            num_warps=_TILE_WARPS,
        )
        _choose_kernel[(num_rows,)](
            **rows,
            **tiles,
            seed_ptr=seed,
            kept_ids_ptr=kept_ids,
            ids_ptr=ids,
            log_probs_ptr=log_probs,
            margins_ptr=margins,
            entropies_ptr=entropies,
            num_tiles=num_tiles,
            seq_len=seq_len,
            sample_offset=sample_offset,
            step=step,
            IS_CANVAS=is_canvas,
            HAS_KEPT=kept_ids is not None,
            IS_GREEDY=temperature == 0.0,
            TILE_LANES=triton.next_power_of_2(num_tiles),
            SUB_TILES=sub_tiles,
            VECTOR=vector if may_load_vectors else 1,
            num_warps=1 if has_sub_tiles else _CHOICE_WARPS,
        )


def _holds_whole_vectors(logits: Tensor, vector: int) -> bool:
    """Whether each row may be read by vectors from its first logit on: what lies behind its last is memory too."""
    num_rows, num_ids = logits.shape
    width = triton.cdiv(num_ids, vector) * vector
    end = logits.storage_offset() + (num_rows - 1) * logits.stride(0) + width
    return logits.stride(0) % vector == 0 and end * logits.element_size() <= logits.untyped_storage().nbytes()


@torch.no_grad()
def sample_tokens(logits: Tensor, rows: Any, kept_ids: Tensor | None, sampling: Any, out: Any = None) -> Any:
    """See the twin, ``fastmask.reference.demask``: same arguments, ids, log_probs, margins and entropies."""
    results = _empty_samples(rows.row_indices, sampling) if out is None else out
    _sample_tokens_(
        *results,
        logits,
        rows.row_indices.contiguous(),
        None if kept_ids is None else kept_ids.contiguous(),
        None if sampling.forbidden is None else sampling.forbidden.contiguous(),
        rows.seed,
        out is not None,
        rows.is_compact,
        rows.seq_len,
        rows.sample_offset,
        rows.step,
        float(sampling.temperature),
        sampling.filter_thres,
        sampling.top_p,
        sampling.mask_id,
    )
    return results


def _empty_samples(row_indices: Tensor, sampling: Any) -> tuple[Tensor | None, ...]:
    """Room for ids, log_probs, margins and entropies, those that are asked for."""
    wanted = (True, True, sampling.with_margin, sampling.with_entropy)
    dtypes = (torch.int64, torch.float32, torch.float32, torch.float32)
    return tuple(
        torch.empty_like(row_indices, dtype=dtype) if is_wanted else None
        for is_wanted, dtype in zip(wanted, dtypes, strict=True)
    )


@torch.no_grad()
def linear_sample_tokens(
    embeddings: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Any,
    kept_ids: Tensor | None,
    sampling: Any,
    out: Any = None,
) -> Any:
    """See the twin: ``sample_tokens`` behind a linear head, one chunk of logits at a time."""
    device_type, dtype = embeddings.device.type, embeddings.dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    head = weight.to(dtype).mT, None if bias is None else bias.to(dtype)
    # Rows of logits begin at 16 bytes whatever V is, so that a row's sample does not depend on its neighbours.
    vector = 16 // dtype.itemsize
    width = triton.cdiv(len(weight), vector) * vector
    num_rows = rows.row_indices.shape[0]
    buffer = embeddings.new_empty((min(HEAD_CHUNK_ROWS, num_rows), width), dtype=dtype)
    parts = []
    for chunk in range(max(1, triton.cdiv(num_rows, HEAD_CHUNK_ROWS))):  # traced, this fixes the chunks, not the rows
        part = slice(chunk * HEAD_CHUNK_ROWS, (chunk + 1) * HEAD_CHUNK_ROWS)
        x = rows.of(embeddings, part).to(dtype)
        logits = buffer[: x.shape[0], : len(weight)]
        _head_product(x, *head, out=logits)
        kept = None if kept_ids is None else kept_ids[part]
        parts.append(sample_tokens(logits, rows.chunk(part), kept, sampling, out))
    if out is not None or len(parts) == 1:
        return parts[0]
    return tuple(None if values[0] is None else torch.cat(values) for values in zip(*parts, strict=True))


def _head_product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    with torch.autocast(x.device.type, enabled=False):
        if bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(bias, x, weight, out=out)


def _empty_noise(seed: Tensor, batch: int, length: int, *args: Any) -> Tensor:
    return torch.empty((batch, length), dtype=torch.float32, device=seed.device)


@operator("score_noise", _empty_noise)
def _score_noise(seed: Tensor, batch: int, length: int, sample_offset: int, step: int) -> Tensor:
    noise = _empty_noise(seed, batch, length)
    if noise.numel():
        with torch.cuda.device_of(noise):
            _noise_kernel[(triton.cdiv(noise.numel(), _NOISE_BLOCK),)](
                seed, noise, noise.numel(), length, sample_offset, step, BLOCK=_NOISE_BLOCK
            )
    return noise


def score_noise(seed: Tensor, shape: torch.Size, sample_offset: int, step: int) -> Tensor:
    """See the twin: Gumbel(0, 1) noise of the score of each position [B, N], float32."""
    noise: Tensor = _score_noise(seed, *shape, sample_offset, step)
    return noise


def _empty_selection(scores: Tensor, eligible: Tensor, *args: Any) -> Tensor:
    return torch.empty_like(eligible, memory_format=torch.contiguous_format)


@operator("select_to_remask", _empty_selection)
def select_to_remask(scores: Tensor, eligible: Tensor, counts: Tensor, min_score: float | None) -> Tensor:
    """See the twin: the ``counts`` eligible positions of highest score in each row of [B, N], bool."""
    chosen = _empty_selection(scores, eligible)
    _select(scores.contiguous(), eligible.contiguous(), counts.contiguous(), min_score, is_masked_ptr=chosen)
    return chosen


@operator("remask_", mutates=("ids", "is_masked", "row_indices"))
def _remask_(
    ids: Tensor,
    is_masked: Tensor,
    row_indices: Tensor,
    row_starts: Tensor,
    values: Tensor,
    eligible: Tensor | None,
    counts: Tensor,
    seed: Tensor,
    is_confidence: bool,
    noise_scale: float,
    min_score: float | None,
    mask_id: int,
    sample_offset: int,
    step: int,
) -> None:
    if noise_scale and not _fits(values.shape[1]):  # drawn once, not at each of the passes over a long sequence
        values = values.float() + noise_scale * score_noise(seed, values.shape, sample_offset, step)
        noise_scale = 0.0
    _select(
        values.contiguous(),
        is_masked if eligible is None else eligible.contiguous(),
        counts.contiguous(),
        min_score,
        ids_ptr=ids,
        is_masked_ptr=is_masked,
        row_indices_ptr=row_indices,
        row_starts_ptr=row_starts,
        seed_ptr=seed,
        is_confidence=is_confidence,
        noise_scale=noise_scale,
        mask_id=mask_id,
        sample_offset=sample_offset,
        step=step,
    )


def remask_(
    ids: Tensor,
    is_masked: Tensor,
    row_indices: Tensor,
    row_starts: Tensor,
    values: Tensor,
    eligible: Tensor | None,
    counts: Tensor,
    seed: Tensor,
    remasking: Any,
) -> None:
    """See the twin: scores, selection and all that it changes, in one launch."""
    _remask_(ids, is_masked, row_indices, row_starts, values, eligible, counts, seed, *remasking)


def _fits(length: int) -> bool:
    """Whether the keys of a sequence stay in registers."""
    return length <= _SELECTION[-1][0]


def _select(
    scores: Tensor,
    eligible: Tensor,
    counts: Tensor,
    min_score: float | None,
    *,
    is_confidence: bool = False,
    noise_scale: float = 0.0,
    mask_id: int = 0,
    sample_offset: int = 0,
    step: int = 0,
    seed_ptr: Tensor | None = None,
    ids_ptr: Tensor | None = None,
    is_masked_ptr: Tensor,
    row_indices_ptr: Tensor | None = None,
    row_starts_ptr: Tensor | None = None,
) -> None:
    batch, length = scores.shape
    if length > _MAX_LENGTH:
        raise ValueError(
            f"expected sequences of at most {_MAX_LENGTH} tokens, received {length}; "
            'use backend="reference" for longer ones'
        )
    if not scores.numel():
        if row_indices_ptr is not None:
            row_indices_ptr.fill_(-1)
        return
    block_n, num_warps = _SELECTION_BLOCKS
    if _fits(length):
        block_n, num_warps = triton.next_power_of_2(length), next(row[1] for row in _SELECTION if length <= row[0])
    with torch.cuda.device_of(scores):
        _selection_kernel[(batch,)](
            scores_ptr=scores,
            eligible_ptr=eligible,
            counts_ptr=counts,
            seed_ptr=seed_ptr,
            ids_ptr=ids_ptr,
            is_masked_ptr=is_masked_ptr,
            row_indices_ptr=row_indices_ptr,
            row_starts_ptr=row_starts_ptr,
            N=length,
            sample_offset=sample_offset,
            step=step,
            noise_scale=noise_scale,
            min_score=0.0 if min_score is None else min_score,
            mask_id=mask_id,
            IS_CONFIDENCE=is_confidence,
            HAS_NOISE=noise_scale != 0.0,
            HAS_MIN_SCORE=min_score is not None,
            IS_CANVAS=ids_ptr is not None,
            ONE_BLOCK=_fits(length),
            BLOCK_N=block_n,
            num_warps=num_warps,
        )
