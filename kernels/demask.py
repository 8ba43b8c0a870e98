"""One demasking step: sample every masked row, score the samples, choose what to mask again.

A hierarchical exponential race over tiles of 4096 ids, sub-tiles of 64, single ids (see
``fastmask/reference/demask.py``, the specification): one program a tile reads it once and leaves its maximum and
its sums of exponentials; one program a row lets the tiles race and reads the winner again. So few rows keep many
SMs busy as well as many rows do, and the sample does not depend on how the work was spread.

Bytes for each row: its V logits, one tile of them again (from L2), 12 for each tile written and read. With a
vocabulary filter another program a row finds the threshold by counting, several passes over a row in L2.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask import _streams as streams
from fastmask.kernels import _elementary as elementary
from fastmask.kernels import _rows as logit_rows
from fastmask.kernels import philox

_TILE = tl.constexpr(streams.TILE)
_SUB_TILE = tl.constexpr(streams.SUB_TILE)
_TILE_RACE = tl.constexpr(streams.TILE_RACE)
_SUB_TILE_RACE = tl.constexpr(streams.SUB_TILE_RACE)
_ELEMENT_RACE = tl.constexpr(streams.ELEMENT_RACE)
_SCORE_NOISE = tl.constexpr(streams.SCORE_NOISE)

# What a tile is reduced to: its maximum and, relative to that, its sums of exponentials at temperature 1 and T.
_MAX = tl.constexpr(0)
_SUM = tl.constexpr(1)
_HEATED = tl.constexpr(2)
_RECORD = tl.constexpr(3)

_LOG2E = tl.constexpr(math.log2(math.e))
_POSITION_BITS = tl.constexpr(16)
_MAX_LENGTH = 1 << _POSITION_BITS.value
_END = tl.constexpr(1 << 48)  # above every key; the key of what is not eligible


@triton.jit
def _finite(x):
    """x, or 0 for -inf: what may be subtracted from -inf."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def _tile_sums(z, shift, threshold, factor, HAS_THRESHOLD: tl.constexpr, IS_HEATED: tl.constexpr):
    """Sums over a block of logits of exp(z - shift), and of exp((z - shift) / T)."""
    unheated = elementary.exp2((z - shift) * _LOG2E)
    if HAS_THRESHOLD:
        unheated = tl.where(z >= threshold, unheated, 0.0)
    total = tl.sum(unheated)
    heated_total = total
    if IS_HEATED:
        heated = elementary.exp2((z - shift) * factor)
        if HAS_THRESHOLD:
            heated = tl.where(z >= threshold, heated, 0.0)
        heated_total = tl.sum(heated)
    return total, heated_total


@triton.jit(do_not_specialize=["lead_x", "num_rows", "V", "mask_id"])
def _tiles_kernel(
    x_ptr,
    lead_x,
    stride_x,
    thresholds_ptr,
    records_ptr,
    num_rows,
    V,
    mask_id,
    factor,  # log2(e) / T
    HAS_MASK_ID: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    IS_HEATED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # This program reduces one tile of one row to its record.
    row = tl.program_id(0)
    first = tl.program_id(1) * _TILE
    length = tl.minimum(V - first, _TILE)
    x_ptr = tl.multiple_of(x_ptr - lead_x, 16)
    start = logit_rows.row_start(row, num_rows, lead_x, 0, stride_x) + first
    body_column, body_start, body_length = logit_rows.body(start, length, VECTOR)
    threshold = tl.load(thresholds_ptr + row) if HAS_THRESHOLD else 0.0

    block = tl.arange(0, BLOCK)
    z = tl.load(x_ptr + body_start + block, mask=block < body_length, other=-float("inf")).to(tl.float32)
    if HAS_MASK_ID:
        if (mask_id >= first) & (mask_id < first + _TILE):
            z = tl.where(first + body_column + block == mask_id, -float("inf"), z)
    offs_v, in_v = logit_rows.edges(length, body_column, body_length, VECTOR)
    edge_max = tl.full((), -float("inf"), tl.float32)
    edges = tl.full((2 * VECTOR,), -float("inf"), tl.float32)
    has_edges = body_length < length
    if has_edges:
        edges = tl.load(x_ptr + start + offs_v, mask=in_v, other=-float("inf")).to(tl.float32)
        if HAS_MASK_ID:
            edges = tl.where(first + offs_v == mask_id, -float("inf"), edges)
        edge_max = tl.max(edges)
    largest = tl.maximum(tl.max(z), edge_max)
    shift = _finite(largest)
    total, heated = _tile_sums(z, shift, threshold, factor, HAS_THRESHOLD, IS_HEATED)
    if has_edges:
        edge_total, edge_heated = _tile_sums(edges, shift, threshold, factor, HAS_THRESHOLD, IS_HEATED)
        total += edge_total
        heated += edge_heated
    records_ptr += (row.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * _RECORD
    tl.store(records_ptr + _MAX, largest)
    tl.store(records_ptr + _SUM, total)
    tl.store(records_ptr + _HEATED, heated)


@triton.jit
def _winner(weights, lane, num_lanes, seed, stream: tl.constexpr, sample, position, first, step):
    """argmax_i weights_i / E_i over the first num_lanes; ties to the lower lane, and 0 where there is but one."""
    high, low, _, _ = philox.draw(seed, stream, sample, position, first + lane, step)
    race = tl.where(lane < num_lanes, weights / philox.exponential(high, low), -1.0)
    return tl.where(num_lanes == 1, 0, tl.argmax(race, 0)).to(tl.int32)


@triton.jit
def _weights_at(x_ptr, start, offs_v, V, mask_id, threshold, shift, factor, HAS_MASK_ID, HAS_THRESHOLD):
    """Logits at some columns, -inf where there is none, and their weights in the race."""
    z = tl.load(x_ptr + start + offs_v, mask=offs_v < V, other=-float("inf")).to(tl.float32)
    if HAS_MASK_ID:
        z = tl.where(offs_v == mask_id, -float("inf"), z)
    weights = elementary.exp2((z - shift) * factor)
    if HAS_THRESHOLD:
        weights = tl.where(z >= threshold, weights, 0.0)
    return z, weights


@triton.jit(do_not_specialize=["num_tiles", "V", "mask_id", "lowest", "step"])
def _choose_kernel(
    x_ptr,
    stride_x,
    thresholds_ptr,
    records_ptr,
    seed_ptr,
    samples_ptr,
    positions_ptr,
    kept_ids_ptr,
    ids_ptr,
    log_probs_ptr,
    num_tiles,
    V,
    mask_id,
    lowest,  # the lowest allowed id
    step,
    factor,
    HAS_MASK_ID: tl.constexpr,
    HAS_THRESHOLD: tl.constexpr,
    HAS_KEPT: tl.constexpr,
    IS_GREEDY: tl.constexpr,
    TILE_LANES: tl.constexpr,
    SUB_TILES: tl.constexpr,
):
    # This program chooses the id of one row: the tiles race, then the winner's sub-tiles, then that one's ids.
    row = tl.program_id(0)
    start = row.to(tl.int64) * stride_x
    seed = tl.load(seed_ptr)
    sample = tl.load(samples_ptr + row)
    position = tl.load(positions_ptr + row)
    threshold = tl.load(thresholds_ptr + row) if HAS_THRESHOLD else 0.0

    tile = tl.arange(0, TILE_LANES)
    records_ptr += row.to(tl.int64) * num_tiles * _RECORD
    in_row = tile < num_tiles
    maxima = tl.load(records_ptr + tile * _RECORD + _MAX, mask=in_row, other=-float("inf"))
    sums = tl.load(records_ptr + tile * _RECORD + _SUM, mask=in_row, other=0.0)
    top = tl.max(maxima)
    total = tl.sum(sums * elementary.exp2((maxima - _finite(top)) * _LOG2E))
    # NaN reaches the sum, or the threshold and by it leaves nothing of the sum.
    is_lawful = (tl.abs(top) < float("inf")) & (total > 0.0)

    if IS_GREEDY:
        chosen = tl.argmax(maxima, 0).to(tl.int32)
    else:
        heated = tl.load(records_ptr + tile * _RECORD + _HEATED, mask=in_row, other=0.0)
        heated *= elementary.exp2((maxima - _finite(top)) * factor)
        chosen = _winner(heated, tile, num_tiles, seed, _TILE_RACE, sample, position, 0, step)
    first = chosen * _TILE
    shift = _finite(tl.max(tl.where(tile == chosen, maxima, -float("inf"))))

    sub_tile = tl.arange(0, SUB_TILES)
    offs_v = first + sub_tile[:, None] * _SUB_TILE + tl.arange(0, _SUB_TILE)[None, :]
    z, weights = _weights_at(
        x_ptr, start, offs_v, V, mask_id, threshold, shift, factor, HAS_MASK_ID, HAS_THRESHOLD
    )  # fmt: skip
    if IS_GREEDY:
        id = tl.min(tl.where(z == shift, offs_v, V))
    else:
        num_sub_tiles = tl.minimum(tl.cdiv(V, _SUB_TILE), _TILE // _SUB_TILE)
        base = chosen * (_TILE // _SUB_TILE)
        chosen = _winner(
            tl.sum(weights, 1), sub_tile, num_sub_tiles, seed, _SUB_TILE_RACE, sample, position, base, step
        )
        first = (base + chosen) * _SUB_TILE
        element = tl.arange(0, _SUB_TILE)
        z, weights = _weights_at(
            x_ptr, start, first + element, V, mask_id, threshold, shift, factor, HAS_MASK_ID, HAS_THRESHOLD
        )  # fmt: skip
        id = first + _winner(weights, element, _SUB_TILE, seed, _ELEMENT_RACE, sample, position, first, step)
    id = tl.where(is_lawful, id, lowest).to(tl.int64)
    if HAS_KEPT:
        kept = tl.load(kept_ids_ptr + row)
        id = tl.where(kept >= 0, kept, id)

    # A kept id that is none gives NaN, and nothing is read for it.
    z_chosen = tl.load(x_ptr + start + id, mask=id < V, other=float("nan")).to(tl.float32)
    if HAS_MASK_ID:
        z_chosen = tl.where(id == mask_id, -float("inf"), z_chosen)
    log_prob = (z_chosen - top) - elementary.log(total)
    if HAS_THRESHOLD:  # a kept id may lie below it
        log_prob = tl.where(z_chosen >= threshold, log_prob, -float("inf"))
    tl.store(ids_ptr + row, id)
    tl.store(log_probs_ptr + row, tl.where(is_lawful, log_prob, float("nan")))


@triton.jit
def _order(x):
    """int64 that orders as float32 does, from -2^31 on; the same function on int32 bits takes it back."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value(order):
    """The float32 of that order."""
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _summary(z):
    """Of the logits above -inf: maximum, minimum, number, how many NaN besides, sum and sum of squares."""
    is_finite = z > -float("inf")
    finite = tl.where(is_finite, z, 0.0)
    return (
        tl.max(z),
        tl.min(tl.where(is_finite, z, float("inf"))),
        tl.sum(is_finite.to(tl.int32)),
        tl.sum((z != z).to(tl.int32)),
        tl.sum(finite),
        tl.sum(finite * finite),
    )


@triton.jit(do_not_specialize=["lead_x", "num_rows", "V", "mask_id", "num_kept"])
def _thresholds_kernel(
    x_ptr,
    lead_x,
    stride_x,
    thresholds_ptr,
    num_rows,
    V,
    mask_id,
    num_kept,
    quantile,  # of the normal distribution, above which the share num_kept / V lies
    HAS_MASK_ID: tl.constexpr,
    SPACING: tl.constexpr,  # least distance in order of two numbers of the logits' dtype
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # This program finds a threshold that num_kept of a row's logits, and what ties with the last, are not below.
    row = tl.program_id(0)
    x_ptr = tl.multiple_of(x_ptr - lead_x, 16)
    start = logit_rows.row_start(row, num_rows, lead_x, 0, stride_x)
    body_column, body_start, body_length = logit_rows.body(start, V, VECTOR)
    block = tl.arange(0, BLOCK)
    offs_v, in_v = logit_rows.edges(V, body_column, body_length, VECTOR)
    edges = tl.load(x_ptr + start + offs_v, mask=in_v, other=-float("inf")).to(tl.float32)
    z_mask = tl.full((), -float("inf"), tl.float32)
    if HAS_MASK_ID:
        edges = tl.where(offs_v == mask_id, -float("inf"), edges)
        z_mask = tl.load(x_ptr + start + mask_id).to(tl.float32)

    # The mask's column counts as -inf: what the passes over the body count of it is taken back.
    mask_in_body = (mask_id >= body_column) & (mask_id < body_column + body_length) & (z_mask > -float("inf"))
    largest, smallest, num_finite, num_nan, mean, spread = _summary(edges)
    for offset in range(0, body_length, BLOCK):
        in_body = offset + block < body_length
        z = tl.load(x_ptr + (body_start + offset) + block, mask=in_body, other=-float("inf")).to(tl.float32)
        if HAS_MASK_ID:
            if (mask_id >= body_column + offset) & (mask_id < body_column + offset + BLOCK):
                z = tl.where(body_column + offset + block == mask_id, -float("inf"), z)
        more = _summary(z)
        largest = tl.maximum(largest, more[0])
        smallest = tl.minimum(smallest, more[1])
        num_finite += more[2]
        num_nan += more[3]
        mean += more[4]
        spread += more[5]
    mean /= tl.maximum(num_finite, 1).to(tl.float32)
    spread = tl.sqrt(tl.maximum(spread / tl.maximum(num_finite, 1).to(tl.float32) - mean * mean, 0.0))

    # low: at least num_kept are not below; high: fewer are. A bracket too small for two numbers is the answer, and
    # so is one at whose low end exactly num_kept are.
    low = _order(smallest)
    high = _order(largest) + 1
    at_low = num_finite
    at_high = tl.full((), 0, tl.int32)
    is_searched = (num_finite > num_kept) & (num_nan == 0)
    high = tl.where(is_searched, high, low)
    turn = tl.full((), 0, tl.int32)
    while (high - low > SPACING) & (at_low != num_kept):
        # The normal quantile, then by turns: as if counts were linear in value, exponential, and by halves.
        z_low = _value(low)
        count_low = at_low.to(tl.float32) + 0.5
        count_high = at_high.to(tl.float32) + 0.5
        linear = (count_low - num_kept) / (count_low - count_high + 1.0)
        exponential = (tl.log(count_low) - tl.log(tl.full((), num_kept, tl.float32))) / (
            tl.log(count_low) - tl.log(count_high)
        )
        share = tl.where(turn % 3 == 1, linear, exponential)
        probe = _order(z_low + (_value(high) - z_low) * share)
        probe = tl.where(turn % 3 == 0, (low + high) >> 1, probe)
        probe = tl.where(turn == 0, _order(mean + spread * quantile), probe)
        probe = tl.minimum(tl.maximum(probe, low + 1), high - 1)
        turn += 1
        z_probe = _value(probe)
        count = tl.sum((edges >= z_probe).to(tl.int32))
        if mask_in_body:
            count -= (z_mask >= z_probe).to(tl.int32)
        for offset in range(0, body_length, BLOCK):
            in_body = offset + block < body_length
            z = tl.load(x_ptr + (body_start + offset) + block, mask=in_body, other=-float("inf")).to(tl.float32)
            count += tl.sum((z >= z_probe).to(tl.int32))
        is_low = count >= num_kept
        low = tl.where(is_low, probe, low)
        at_low = tl.where(is_low, count, at_low)
        high = tl.where(is_low, high, probe)
        at_high = tl.where(is_low, at_high, count)
    threshold = tl.where(num_finite < num_kept, -float("inf"), _value(low))
    tl.store(thresholds_ptr + row, tl.where(num_nan == 0, threshold, float("nan")))


@triton.jit(do_not_specialize=["num_elements", "step"])
def _noise_kernel(seed_ptr, samples_ptr, positions_ptr, noise_ptr, num_elements, step, BLOCK: tl.constexpr):
    # This program draws a block of Gumbel noise.
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_element = offsets < num_elements
    sample = tl.load(samples_ptr + offsets, mask=is_element, other=0)
    position = tl.load(positions_ptr + offsets, mask=is_element, other=0)
    high, low, _, _ = philox.draw(tl.load(seed_ptr), _SCORE_NOISE, sample, position, 0, step)
    tl.store(noise_ptr + offsets, -elementary.log(philox.exponential(high, low)), mask=is_element)


@triton.jit
def _selection_keys(scores_ptr, eligible_ptr, offs_n, N):
    """Distinct int64 keys in the order of selection: NaN, then by falling score, then by position; _END where not
    eligible."""
    in_n = offs_n < N
    score = tl.load(scores_ptr + offs_n, mask=in_n, other=0.0).to(tl.float32)
    is_eligible = tl.load(eligible_ptr + offs_n, mask=in_n, other=0) != 0
    order = 0x7FFFFFFF - _order(tl.where(score == 0.0, 0.0, score))  # -0.0 as 0.0
    order = tl.where(score == score, order, 0)
    return tl.where(is_eligible, (order << _POSITION_BITS) | offs_n, _END)


@triton.jit(do_not_specialize=["N"])
def _selection_kernel(
    scores_ptr, eligible_ptr, counts_ptr, chosen_ptr, N, ONE_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr
):
    # This program selects in one sequence. With ONE_BLOCK its keys stay in registers; otherwise each pass reads them.
    row = tl.program_id(0).to(tl.int64)
    scores_ptr += row * N
    eligible_ptr += row * N
    block = tl.arange(0, BLOCK_N)
    limit = BLOCK_N if ONE_BLOCK else N
    key = _selection_keys(scores_ptr, eligible_ptr, block, N)
    low = tl.full((), _END, tl.int64)
    high = tl.full((), -1, tl.int64)
    num_eligible = tl.full((), 0, tl.int32)
    for first in range(0, limit, BLOCK_N):
        if not ONE_BLOCK:
            key = _selection_keys(scores_ptr, eligible_ptr, first + block, N)
        low = tl.minimum(low, tl.min(key))
        high = tl.maximum(high, tl.max(tl.where(key < _END, key, -1)))
        num_eligible += tl.sum((key < _END).to(tl.int32))
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
                key = _selection_keys(scores_ptr, eligible_ptr, first + block, N)
            below += tl.sum((key < probe).to(tl.int32))
        is_low = below <= count
        low = tl.where(is_low, probe, low)
        below_low = tl.where(is_low, below, below_low)
        high = tl.where(is_low, high, probe)
        below_high = tl.where(is_low, below_high, below)

    for first in range(0, limit, BLOCK_N):
        if not ONE_BLOCK:
            key = _selection_keys(scores_ptr, eligible_ptr, first + block, N)
        tl.store(chosen_ptr + row * N + first + block, key < low, mask=first + block < N)


# Warps of the programs over tiles, the choice, the threshold, the selection.
_TILE_WARPS = 4  # 32 logits a thread, enough loads in flight; many programs on an SM
_CHOICE_WARPS = 4
_THRESHOLD_BLOCK, _THRESHOLD_WARPS = 8192, 8
_SELECTION = ((1024, 4), (4096, 8))  # longest sequence, warps: its keys stay in registers
_SELECTION_BLOCKS = (4096, 8)
_NOISE_BLOCK = 1024

# Rows of a head's chunk of logits: enough for the matrix product.
HEAD_CHUNK_ROWS = 4096

# Least distance in the order of float32 between two numbers of the logits' dtype.
_SPACING = {torch.bfloat16: 1 << 16, torch.float16: 1 << 13}


@torch.library.custom_op("fastmask::sample_tokens", mutates_args=())
def _sample_tokens(
    logits: Tensor,
    seed: Tensor,
    samples: Tensor,
    positions: Tensor,
    kept_ids: Tensor | None,
    step: int,
    temperature: float,
    filter_thres: float | None,
    mask_id: int | None,
) -> tuple[Tensor, Tensor]:
    ids, log_probs = _empty_samples(logits)
    num_rows, num_ids = logits.shape
    if num_rows == 0:
        return ids, log_probs
    logits = logits if logits.stride(-1) == 1 else logits.contiguous()
    num_tiles = triton.cdiv(num_ids, _TILE.value)
    lanes = max(_SUB_TILE.value, min(_TILE.value, triton.next_power_of_2(num_ids)))
    has_mask = mask_id is not None and 0 <= mask_id < num_ids
    # It stays finite, infinity times the maximum's 0 being NaN, and above 0, for the sake of -inf.
    limits = torch.finfo(torch.float32)
    factor = max(limits.tiny, min(_LOG2E.value / temperature, limits.max)) if temperature else 0.0
    records = logits.new_empty((num_rows, num_tiles, _RECORD.value), dtype=torch.float32)
    shared: dict[str, Any] = {
        "x_ptr": logits,
        "stride_x": logits.stride(0),
        "thresholds_ptr": None,
        "V": num_ids,
        "mask_id": mask_id if has_mask else -1,
        "HAS_MASK_ID": has_mask,
    }
    aligned = {"lead_x": logit_rows.lead(logits), "num_rows": num_rows, "VECTOR": 16 // logits.element_size()}
    num_kept = num_ids if filter_thres is None else math.ceil((1.0 - filter_thres) * num_ids)
    with torch.cuda.device_of(logits):  # Triton launches on the current device
        if num_kept < num_ids:
            shared["thresholds_ptr"] = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
            _thresholds_kernel[(num_rows,)](
                **shared,
                **aligned,
                num_kept=num_kept,
                quantile=statistics.NormalDist().inv_cdf(1.0 - num_kept / num_ids),
                SPACING=_SPACING.get(logits.dtype, 1),
                BLOCK=min(_THRESHOLD_BLOCK, triton.next_power_of_2(num_ids)),
                num_warps=_THRESHOLD_WARPS,
            )
        shared["HAS_THRESHOLD"] = num_kept < num_ids
        _tiles_kernel[(num_rows, num_tiles)](
            **shared,
            **aligned,
            records_ptr=records,
            factor=factor,
            IS_HEATED=temperature not in (0.0, 1.0),
            BLOCK=lanes,
            num_warps=_TILE_WARPS,
        )
        _choose_kernel[(num_rows,)](
            **shared,
            records_ptr=records,
            seed_ptr=seed,
            samples_ptr=samples,
            positions_ptr=positions,
            kept_ids_ptr=kept_ids,
            ids_ptr=ids,
            log_probs_ptr=log_probs,
            num_tiles=num_tiles,
            lowest=1 if mask_id == 0 and num_ids > 1 else 0,
            step=step,
            factor=factor,
            HAS_KEPT=kept_ids is not None,
            IS_GREEDY=temperature == 0.0,
            TILE_LANES=triton.next_power_of_2(num_tiles),
            SUB_TILES=lanes // _SUB_TILE.value,
            num_warps=_CHOICE_WARPS,
        )
    return ids, log_probs


@_sample_tokens.register_fake
def _(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return _empty_samples(logits)


def _empty_samples(logits: Tensor) -> tuple[Tensor, Tensor]:
    """ids and log_probs, [M] each."""
    num_rows = logits.shape[0]  # symbolic, as len() is not
    return logits.new_empty(num_rows, dtype=torch.int64), logits.new_empty(num_rows, dtype=torch.float32)


@torch.no_grad()
def sample_tokens(
    logits: Tensor,
    rows: Any,
    kept_ids: Tensor | None = None,
    *,
    temperature: float,
    filter_thres: float | None,
    mask_id: int | None,
) -> tuple[Tensor, Tensor]:
    """See the twin, ``fastmask.reference.demask``: same arguments, ids and log_probs [M]."""
    ids, log_probs = torch.ops.fastmask.sample_tokens(
        logits,
        rows.seed,
        rows.samples.contiguous(),
        rows.positions.contiguous(),
        None if kept_ids is None else kept_ids.contiguous(),
        rows.step,
        float(temperature),
        filter_thres,
        mask_id,
    )
    return ids, log_probs


@torch.no_grad()
def linear_sample_tokens(
    embeddings: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Any,
    kept_ids: Tensor | None = None,
    *,
    temperature: float,
    filter_thres: float | None,
    mask_id: int | None,
) -> tuple[Tensor, Tensor]:
    """See the twin: ``sample_tokens`` behind a linear head, one chunk of logits at a time."""
    device_type, dtype = embeddings.device.type, embeddings.dtype
    if torch.is_autocast_enabled(device_type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
    head = weight.to(dtype).mT, None if bias is None else bias.to(dtype)
    # Rows of logits begin at 16 bytes whatever V is, so that a row's sample does not depend on its neighbours.
    vector = 16 // dtype.itemsize
    width = triton.cdiv(len(weight), vector) * vector
    num_rows = embeddings.shape[0]
    buffer = embeddings.new_empty((min(HEAD_CHUNK_ROWS, num_rows), width), dtype=dtype)
    parts = []
    for chunk in range(max(1, triton.cdiv(num_rows, HEAD_CHUNK_ROWS))):  # traced, this fixes the chunks, not the rows
        part = slice(chunk * HEAD_CHUNK_ROWS, (chunk + 1) * HEAD_CHUNK_ROWS)
        x = embeddings[part].to(dtype)
        logits = buffer[: x.shape[0], : len(weight)]
        _head_product(x, *head, out=logits)
        parts.append(
            sample_tokens(
                logits,
                rows.chunk(part),
                None if kept_ids is None else kept_ids[part],
                temperature=temperature,
                filter_thres=filter_thres,
                mask_id=mask_id,
            )
        )
    ids, log_probs = map(torch.cat, zip(*parts, strict=True))
    return ids, log_probs


def _head_product(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    with torch.autocast(x.device.type, enabled=False):
        if bias is None:
            torch.mm(x, weight, out=out)
        else:
            torch.addmm(bias, x, weight, out=out)


@torch.library.custom_op("fastmask::score_noise", mutates_args=())
def _score_noise(seed: Tensor, samples: Tensor, positions: Tensor, step: int) -> Tensor:
    noise = torch.empty_like(samples, dtype=torch.float32)
    if noise.numel():
        with torch.cuda.device_of(noise):
            _noise_kernel[(triton.cdiv(noise.numel(), _NOISE_BLOCK),)](
                seed, samples, positions, noise, noise.numel(), step, BLOCK=_NOISE_BLOCK
            )
    return noise


@_score_noise.register_fake
def _(seed: Tensor, samples: Tensor, positions: Tensor, step: int) -> Tensor:
    return torch.empty_like(samples, dtype=torch.float32)


def score_noise(rows: Any) -> Tensor:
    """See the twin: Gumbel(0, 1) noise of each row's score, float32."""
    samples, positions = (x.contiguous() for x in torch.broadcast_tensors(rows.samples, rows.positions))
    noise: Tensor = torch.ops.fastmask.score_noise(rows.seed, samples, positions, rows.step)
    return noise


@torch.library.custom_op("fastmask::select_to_remask", mutates_args=())
def select_to_remask(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """See the twin: the ``counts`` eligible positions of highest score in each row of [B, N], bool."""
    batch, length = scores.shape
    if length > _MAX_LENGTH:
        raise ValueError(
            f"expected sequences of at most {_MAX_LENGTH} tokens, received {length}; "
            'use backend="reference" for longer ones'
        )
    chosen = torch.empty_like(eligible, memory_format=torch.contiguous_format)
    if chosen.numel():
        fits = [row for row in _SELECTION if length <= row[0]]
        block_n, num_warps = (triton.next_power_of_2(length), fits[0][1]) if fits else _SELECTION_BLOCKS
        with torch.cuda.device_of(scores):
            _selection_kernel[(batch,)](
                scores.contiguous(),
                eligible.contiguous(),
                counts.contiguous(),
                chosen,
                length,
                ONE_BLOCK=bool(fits),
                BLOCK_N=block_n,
                num_warps=num_warps,
            )
    return chosen


@select_to_remask.register_fake
def _(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    return torch.empty_like(eligible, memory_format=torch.contiguous_format)
