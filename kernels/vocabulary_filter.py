"""Which logits of a row stay: the k largest, what is likely enough beside the likeliest, or the nucleus; as a
threshold for each row, found without a sort.

A threshold is the largest bound above which lies enough: k logits (ties stay), or a share p of the probability (the
nucleus of Holtzman et al., https://arxiv.org/abs/1904.09751, with the token that crosses p). A sample of the row
brackets it. One pass over the row counts what lies above the bracket, and lists what lies inside; among these few
candidates the threshold is searched in registers. For p a pass before measures the row. A row of at most 2048 logits
is searched in registers at once. The mathematics is in ``docs/nucleus.md``. For min_p (Nguyen et al.,
https://arxiv.org/abs/2407.01082) the threshold lies so far below the row's largest logit, which the pass for k finds
beside. One launch finds them all.

Bytes for each row: its V logits, as a rule once for k or min_p or both, and twice for p; a sample, and the
candidates, which stay in L2. Of a short row its logits once.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask.kernels import _float_order as float_order
from fastmask.kernels import _launch, _math
from fastmask.kernels import _logit_rows as logit_rows
from fastmask.kernels import _sequences as sequences
from fastmask.kernels import _threshold_passes as passes
from fastmask.kernels import _threshold_search as threshold_search
from fastmask.kernels._logit_rows import LogitRows
from fastmask.kernels._sequences import OwnOptions

_WARP_BLOCK = 512  # logits of which a thread has 16, in lanes of a 16-byte vector each
# A turn of a search costs a warp a hundred instructions, and three for each of a thread's logits: few warps with many
# logits do it for less. Longest row, warps. Where rows are few, up to four times as many finish sooner: not for p, of
# which the sums, and rarely an id at the nucleus's edge, depend on how they are spread.
_WARPS = (
    (8192, 1),  # up to 16 blocks
    (32768, 2),  # 8 to 32
    (65536, 4),  # 16 to 32
    (math.inf, 8),  # 16 or more
)
_FEW_ROWS, _MOST_WARPS = 2, 8  # rows for each multiprocessor
_RESIDENT_WARPS = 32  # of a multiprocessor: their candidates, 17 MB on an H100, or 35 of float32, stay in its L2
# A sample for k is so large that a lane expects so many candidates, at which one row in ten has one without a place
# and is read again; but a warp has registers for so many logits only. For p a block of them does.
_EXPECTED = 6.8
_LEAST_SAMPLE, _MOST_SAMPLE_OF_WARP = 1024, 2048
# So many registers for each thread of a nucleus's program do from Hopper on, without a spill, for logits of 16 bits:
# 16 warps find room in a multiprocessor, where of its own accord the compiler leaves it to 12 of one warp, or to 8.
# With k before they do not. On a B200 one warp takes more: 13 find room there, and float16 does not spill as it would
# of its own accord. An A100's and an RTX 4090's programs would spill.
_REGISTERS, _REGISTERS_OF_WARP_ON_B200 = 128, 152
# A shorter row is searched in registers at once; its block holds its edges too.
_SHORT, _SHORT_BLOCK = 2048, 128
# Least distance in the order of float32 between two numbers of the logits' dtype.
_SPACING = {torch.bfloat16: 1 << 16, torch.float16: 1 << 13}


@triton.jit
def _narrows(value, end, values_ptr):
    """Whether a filter is not at its end, where it keeps all. Of one for all sequences that is known: it is not."""
    return True if values_ptr is None else value < end


@triton.jit(do_not_specialize=["offset_x", "num_places", "V", "num_kept", "mask_id", "seq_len"])
def _short_thresholds_kernel(
    x_ptr,
    offset_x,
    stride_x,
    row_indices_ptr,
    num_places,
    forbidden_ptr,
    thresholds_ptr,
    V,
    num_kept,
    gap,
    top_p,
    factor,
    num_kept_ptr,
    gaps_ptr,
    top_ps_ptr,
    factors_ptr,
    seq_len,
    mask_id,
    IS_COMPACT: tl.constexpr,
    SPACING: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # This program finds the threshold of one row, which it holds in registers. Arguments: see _thresholds_kernel.
    row_index = tl.program_id(0)
    flat = tl.load(row_indices_ptr + row_index)
    if logit_rows.is_stray(flat, num_places):
        return
    num_kept = sequences.own(num_kept_ptr, num_kept, flat, seq_len)
    gap = sequences.own(gaps_ptr, gap, flat, seq_len)
    top_p = sequences.own(top_ps_ptr, top_p, flat, seq_len)
    factor = sequences.own(factors_ptr, factor, flat, seq_len)
    x_ptr = tl.multiple_of(x_ptr - offset_x, 16)
    start = offset_x + (row_index.to(tl.int64) if IS_COMPACT else flat) * stride_x
    row = passes.row_at(x_ptr, start, V, logit_rows.Excluded(mask_id, forbidden_ptr), VECTOR)
    z = passes.block_of(passes.fetch(row, 0, VECTOR, BLOCK), row, 0, VECTOR)
    edges = passes.load_edges(x_ptr, start, V, row, VECTOR, BLOCK // VECTOR)
    floor = tl.full((), threshold_search.LOWEST, tl.int32)
    if num_kept is not None:
        if _narrows(num_kept, V, num_kept_ptr):
            logits = threshold_search.weighed(z, None, None, edges)
            floor = passes.find_in_registers(logits, num_kept.to(tl.float32), floor, SPACING)
    if gap is not None or top_p is not None:
        largest = tl.maximum(tl.max(z), tl.max(edges))
    if gap is not None:
        # A least number such as 1e-40 is a float64 where it is interpreted.
        floor = tl.maximum(floor, float_order.order((largest + gap).to(tl.float32)))
    if top_p is not None:
        if _narrows(top_p, 1.0, top_ps_ptr):
            z_floor = float_order.value(floor)
            z = tl.where(z >= z_floor, z, -float("inf"))
            edges = tl.where(edges >= z_floor, edges, -float("inf"))
            law = threshold_search.Law(threshold_search.finite(largest), factor)
            logits = threshold_search.weighed(z, law, None, edges)
            target = tl.maximum(threshold_search.total(logits) * top_p, 1e-30)
            floor = passes.find_in_registers(logits, target, floor, SPACING)
    tl.store(thresholds_ptr + row_index, float_order.value(floor))


@triton.jit(do_not_specialize=["offset_x", "num_places", "num_rows", "V", "num_kept", "mask_id", "seq_len"])
def _thresholds_kernel(
    x_ptr,
    offset_x,
    stride_x,
    row_indices_ptr,
    num_places,
    forbidden_ptr,
    thresholds_ptr,
    candidates_ptr,  # None where no threshold is searched
    num_rows,
    V,
    num_kept,  # the num_kept largest stay; of these
    gap,  # what is not further from the largest: T log(min_p); of these
    top_p,  # the nucleus
    factor,  # at log2(e) / T; None for T = 1. None where a filter is off
    num_kept_ptr,  # of each sequence its own; None: the number is for all
    gaps_ptr,
    top_ps_ptr,
    factors_ptr,
    seq_len,
    mask_id,
    IS_COMPACT: tl.constexpr,
    SPACING: tl.constexpr,  # least distance in order of two numbers of the logits' dtype
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
    SAMPLE: tl.constexpr,  # logits by which the num_kept-th is bracketed; the nucleus is by a block
):
    # This program finds the thresholds of one row after another, each num_programs rows on.
    x_ptr = tl.multiple_of(x_ptr - offset_x, 16)
    excluded = logit_rows.Excluded(mask_id, forbidden_ptr)
    if candidates_ptr is not None:
        candidates_ptr += tl.program_id(0).to(tl.int64) * (BLOCK // VECTOR * passes.CAPACITY)
    for row_index in range(tl.program_id(0), num_rows, tl.num_programs(0)):
        flat = tl.load(row_indices_ptr + row_index)
        if not logit_rows.is_stray(flat, num_places):
            k = sequences.own(num_kept_ptr, num_kept, flat, seq_len)
            own_gap = sequences.own(gaps_ptr, gap, flat, seq_len)
            p = sequences.own(top_ps_ptr, top_p, flat, seq_len)
            x_row = flat * 0 + row_index if IS_COMPACT else flat  # row_index is an int in the interpreter
            start = offset_x + x_row * stride_x
            row = passes.row_at(x_ptr, start, V, excluded, VECTOR)
            edges = passes.load_edges(x_ptr, start, V, row, VECTOR, BLOCK // VECTOR)
            floor = tl.full((), threshold_search.LOWEST, tl.int32)
            largest = tl.full((), -float("inf"), tl.float32)
            if k is not None:
                if _narrows(k, V, num_kept_ptr):
                    search = passes.search_of_count(row, V, k, SPACING, VECTOR, SAMPLE)
                    floor, largest = passes.select(
                        row, edges, search, candidates_ptr, own_gap is not None, SPACING, VECTOR, BLOCK
                    )
                elif own_gap is not None:
                    largest = passes.largest_of(row, edges, VECTOR, BLOCK)
            elif own_gap is not None:
                largest = passes.largest_of(row, edges, VECTOR, BLOCK)
            if own_gap is not None:
                floor = tl.maximum(floor, float_order.order((largest + own_gap).to(tl.float32)))
            if p is not None:
                if _narrows(p, 1.0, top_ps_ptr):
                    own_factor = sequences.own(factors_ptr, factor, flat, seq_len)
                    least = None if k is None and own_gap is None else floor
                    search = passes.search_of_mass(row, edges, V, p, own_factor, least, SPACING, VECTOR, BLOCK)
                    floor, _ = passes.select(row, edges, search, candidates_ptr, False, SPACING, VECTOR, BLOCK)
            tl.store(thresholds_ptr + row_index, float_order.value(floor))


def thresholds(
    rows: LogitRows,
    top_k: int | None,
    min_p: float | None,
    top_p: float | None,
    temperature: float = 1.0,
    own: OwnOptions | None = None,
    seq_len: int | None = None,
) -> Tensor | None:
    """What the logits of each row must not be below, [M] float32; None where all stay. See the reference.

    own: of which options each sequence, of seq_len positions, has its own.
    """
    own = OwnOptions() if own is None else own
    if top_k is None and min_p is None and top_p is None and not own.are_any:  # told quickly, as it is at most calls
        return None
    filters = _Filters(num_kept_ptr=own.num_kept, gaps_ptr=own.gaps, top_ps_ptr=own.top_ps, seq_len=seq_len)
    if own.num_kept is None and top_k is not None and top_k < rows.num_ids:
        filters = filters._replace(num_kept=top_k)
    if own.gaps is None and min_p is not None:
        filters = filters._replace(gap=temperature * math.log(min_p))
    if own.top_ps is None and top_p is not None:
        filters = filters._replace(top_p=float(top_p))
    if filters.has_nucleus:
        factor = None if temperature == 1.0 else _math.over_temperature(temperature)
        filters = filters._replace(factor=factor, factors_ptr=own.figure_factors)
    if not (filters.counts or filters.has_nucleus or filters.has_gap):
        return None
    out = rows.logits.new_empty(rows.num_rows, dtype=torch.float32)
    launch = _launch_short if rows.num_ids <= _SHORT else _launch_long
    launch(rows, out, filters)
    return out


class _Filters(NamedTuple):
    """What a launch searches, by the kernels' names: a number for all sequences, or of each its own. None is off."""

    num_kept: int | None = None
    gap: float | None = None
    top_p: float | None = None
    factor: float | None = None
    num_kept_ptr: Tensor | None = None
    gaps_ptr: Tensor | None = None
    top_ps_ptr: Tensor | None = None
    factors_ptr: Tensor | None = None
    seq_len: int | None = None

    @property
    def counts(self) -> bool:
        """Whether the k largest stay."""
        return self.num_kept is not None or self.num_kept_ptr is not None

    @property
    def has_gap(self) -> bool:
        """Whether what is likely enough beside the likeliest does."""
        return self.gap is not None or self.gaps_ptr is not None

    @property
    def has_nucleus(self) -> bool:
        """Whether the nucleus does."""
        return self.top_p is not None or self.top_ps_ptr is not None


def _launch_short(rows: LogitRows, out: Tensor, filters: _Filters) -> None:
    """Of rows that a program holds in registers."""
    _launch.launch(
        _short_thresholds_kernel,
        (rows.num_rows,),
        out,
        **rows.arguments(),
        **filters._asdict(),
        thresholds_ptr=out,
        SPACING=_SPACING.get(rows.logits.dtype, 1),
        BLOCK=max(_SHORT_BLOCK, _launch.next_power_of_2(rows.num_ids)),
        num_warps=2 if filters.counts and filters.has_nucleus else 1,  # one would have too few registers for both
    )


def _launch_long(rows: LogitRows, out: Tensor, filters: _Filters) -> None:
    """Of longer ones."""
    x, hardware = rows.logits, _launch.hardware(rows.logits.device)
    num_warps = next(warps for longest, warps in _WARPS if rows.num_ids <= longest)
    most_sample = _MOST_SAMPLE_OF_WARP * num_warps
    options: dict[str, int] = {}
    if filters.has_nucleus:
        if x.element_size() == 2 and not filters.counts:
            options = _registers(hardware, num_warps)
    elif filters.counts and rows.num_rows <= _FEW_ROWS * hardware.num_multiprocessors:
        num_warps = min(4 * num_warps, _MOST_WARPS)
    sample = None
    if filters.counts:
        logits_of_lane = rows.num_ids * rows.vector / (_WARP_BLOCK * num_warps)
        share = 0.5 if filters.num_kept is None else filters.num_kept / rows.num_ids  # 0.5 takes the largest sample
        sample = _sample_size(logits_of_lane, share, most_sample)
    programs = min(rows.num_rows, hardware.num_multiprocessors * _RESIDENT_WARPS // num_warps)
    candidates = None
    if filters.counts or filters.has_nucleus:
        lanes = _WARP_BLOCK * num_warps // rows.vector
        candidates = x.new_empty((programs, lanes, passes.CAPACITY.value), dtype=torch.float32)
        size_of_list = 4 * passes.CAPACITY.value
        assert candidates.data_ptr() % size_of_list == 0, "the last bits of a list's address tell its places"
    _launch.launch(
        _thresholds_kernel,
        (programs,),
        out,
        **rows.arguments(),
        **filters._asdict(),
        thresholds_ptr=out,
        candidates_ptr=candidates,
        num_rows=rows.num_rows,
        SPACING=_SPACING.get(x.dtype, 1),
        BLOCK=_WARP_BLOCK * num_warps,
        SAMPLE=sample,
        num_warps=num_warps,
        **options,
    )


def _registers(hardware: _launch.Hardware, num_warps: int) -> dict[str, int]:
    """Triton's option that bounds the registers of a nucleus's program; none where it would spill."""
    major = hardware.capability[0] if hardware.capability is not None else 0
    if major < 9:
        return {}
    return {"maxnreg": _REGISTERS_OF_WARP_ON_B200 if major == 10 and num_warps == 1 else _REGISTERS}


def _sample_size(logits_of_lane: float, share: float, most: int) -> int:
    """The least sample at which a lane of so many logits expects few enough candidates."""
    sample = _LEAST_SAMPLE
    while sample < most and logits_of_lane * 2.5 * _spread(sample, share) / sample > _EXPECTED:
        sample *= 2
    return sample


def _spread(sample: int, share: float) -> float:
    """See ``_threshold_search.error``; the bracket is two of these wide and up to one more."""
    sigmas, granules = threshold_search.SIGMAS.value, threshold_search.GRANULES.value
    return sigmas * math.sqrt(sample * share * (1.0 - share)) + granules
