"""Masks for a batch of sequences: times, counts, masked ids, loss weights and the list of masked rows.

The masked set is the k smallest random keys of a row, k = max(1, ceil(schedule(t) n)) (MaskGIT,
https://arxiv.org/abs/2202.04200); ranks [0, a) of it keep their token, [a, a + b) get a random one
(BERT, https://arxiv.org/abs/1810.04805). Three order statistics, found by counting, replace five sorts.
``fastmask/reference/mask_sampling.py`` is the specification, number for number.

Bytes for each position: reads the token and ``maskable`` (1), writes the id, ``is_masked`` (1) and one entry
of the row list (8); with two launches ``is_masked`` is read once more. Nothing is saved for backward.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask import _streams as streams
from fastmask.kernels import _launch, philox
from fastmask.kernels import _masked_parts as parts
from fastmask.kernels import _schedule as schedule
from fastmask.kernels import _smallest_keys as smallest_keys
from fastmask.kernels._operator import operator
from fastmask.records import Draws, MaskedTokens, Masking, RandomIds, ScheduleValues

_KEYS = tl.constexpr(streams.KEYS)


class Sequence(NamedTuple):
    """What a sequence's keys are made of.

    seed, sample: key and counter of its random numbers. N: its length. maskable_ptr: None where all positions may be
    masked. bernoulli_begin, bernoulli_end: int64, the words from the one on, or below the other, mask; None where
    they do not, and both where masks have exact counts.
    """

    seed: tl.tensor
    sample: tl.tensor
    N: tl.tensor
    maskable_ptr: tl.tensor | None
    bernoulli_begin: tl.tensor | None
    bernoulli_end: tl.tensor | None


class Keys(NamedTuple):
    """A block of keys, the two words of each position's random id, and one that has decided nothing."""

    key: tl.tensor
    id_high: tl.tensor
    id_low: tl.tensor
    free: tl.tensor


class Gates(NamedTuple):
    """What masked positions show.

    num_ids: how many ids a random token is drawn from. ids_ptr: those; None for all (but the mask's). keep_end,
    random_end: the words below which a position keeps its token, or else gets a random one; None where parts of the
    masked set do.
    """

    mask_id: tl.tensor
    num_ids: tl.tensor
    ids_ptr: tl.tensor | None
    keep_end: tl.tensor | None
    random_end: tl.tensor | None


@triton.jit
def _exact_count(ratio, num_candidates):
    """k = max(1, ceil(float32(ratio n))), within [0, n], int32."""
    # In int64, where no float32 of a sane schedule overflows.
    count = tl.ceil(ratio * num_candidates.to(tl.float32)).to(tl.int64)
    return tl.minimum(tl.maximum(count, 1), num_candidates).to(tl.int32)


@triton.jit
def _draw_keys(sequence, offs_n):
    """The keys of a block of positions."""
    word, id_high, id_low, bernoulli_word = philox.draw(sequence.seed, _KEYS, sequence.sample, offs_n)
    is_candidate = offs_n < sequence.N
    if sequence.maskable_ptr is not None:
        is_candidate = tl.load(sequence.maskable_ptr + offs_n, mask=is_candidate, other=0) != 0
    free = bernoulli_word
    if sequence.bernoulli_end is not None:
        is_candidate = is_candidate & (bernoulli_word.to(tl.int64) < sequence.bernoulli_end)
        free = word
    if sequence.bernoulli_begin is not None:
        is_candidate = is_candidate & (bernoulli_word.to(tl.int64) >= sequence.bernoulli_begin)
        free = word
    return Keys(smallest_keys.keys_of(word, offs_n, is_candidate), id_high, id_low, free)


@triton.jit
def _visible_ids(token, keys, brackets, gates, SKIPS_MASK: tl.constexpr):
    """What the network sees at masked positions."""
    visible = tl.full((), gates.mask_id, token.dtype)
    if brackets.kept is not None or gates.keep_end is not None:
        ids = philox.below(gates.num_ids, keys.id_high, keys.id_low)
        if gates.ids_ptr is not None:
            ids = tl.load(gates.ids_ptr + ids)
        elif SKIPS_MASK:
            ids += (ids >= gates.mask_id).to(tl.int64)
        if gates.keep_end is not None:
            visible = tl.where(keys.free.to(tl.int64) < gates.random_end, ids.to(token.dtype), visible)
            visible = tl.where(keys.free.to(tl.int64) < gates.keep_end, token, visible)
        else:
            visible = tl.where(keys.key < brackets.random.low, ids.to(token.dtype), visible)
            visible = tl.where(keys.key < brackets.kept.low, token, visible)
    return visible


@triton.jit
def _list_rows(row_indices_ptr, is_masked, offs_n, N, row, num_rows, masked_before):
    """Write the row list's entries for a block; returns how many masked positions lie before the next.

    Each position writes one entry: its flat index after those of the masked positions before it, or, where
    it is not masked, a -1 counted back from the list's end. So the list is filled without knowing its total.
    """
    flat = row.to(tl.int64) * N + offs_n
    masked = is_masked.to(tl.int32)
    before = masked_before + tl.cumsum(masked, 0) - masked
    total = num_rows.to(tl.int64) * N
    slot = tl.where(is_masked, before, total - 1 - (flat - before))
    tl.store(row_indices_ptr + slot, tl.where(is_masked, flat, -1), mask=offs_n < N)
    return masked_before + tl.sum(masked)


@triton.jit(
    do_not_specialize=[
        "num_rows",
        "sample_offset",
        "global_batch_size",
        "mask_id",
        "num_ids",
        "keep_end",
        "random_end",
    ]
)
def _mask_sampling_kernel(
    tokens_ptr,
    stride_tb,
    seed_ptr,
    times_ptr,  # None where times are drawn and SCHEDULE is evaluated at them; so are ratios_ptr and slopes_ptr
    ratios_ptr,
    slopes_ptr,
    counts_ptr,  # None for the schedule's
    maskable_ptr,  # None for all
    stride_mb,
    masked_ids_ptr,
    is_masked_ptr,
    out_times_ptr,
    out_counts_ptr,
    loss_weights_ptr,
    row_indices_ptr,  # None, as is num_masked_ptr, where the kernel below lists the rows
    num_masked_ptr,
    num_rows,
    N,
    sample_offset,
    global_batch_size,  # None where times are not stratified
    mask_id,
    num_ids,  # how many ids a random token is drawn from
    ids_ptr,  # which those are, and how many; None for all (but the mask's), as is num_ids_ptr
    num_ids_ptr,
    keep_prob,  # None, as are the next two, where no parts of what is masked are kept or random
    random_prob,
    random_prob_after_keep,
    keep_end,  # None, as is the next, where no position is by itself
    random_end,
    SCHEDULE: tl.constexpr,
    BERNOULLI: tl.constexpr,
    COMPLEMENT: tl.constexpr,
    SKIPS_MASK: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    # This program masks one sequence. With ONE_BLOCK its keys stay in registers; otherwise each pass over the
    # sequence draws them again, block by block.
    row = tl.program_id(0)
    offset = row.to(tl.int64) * N
    tokens_ptr += row.to(tl.int64) * stride_tb
    if maskable_ptr is not None:
        maskable_ptr += row.to(tl.int64) * stride_mb
    sample = tl.full((), sample_offset, tl.int64) + row
    block = tl.arange(0, BLOCK_N)
    limit = BLOCK_N if ONE_BLOCK else N
    seed = tl.load(seed_ptr)
    if ONE_BLOCK:  # asked for early, needed last
        token = tl.load(tokens_ptr + block, mask=block < N)

    if times_ptr is not None:
        time = tl.load(times_ptr + row)
        ratio = tl.load(ratios_ptr + row)
        steepness = tl.abs(tl.load(slopes_ptr + row))
    else:
        time = schedule.drawn(seed, sample, global_batch_size)
        ratio = schedule.ratio(time, SCHEDULE)
        steepness = schedule.steepness(time, SCHEDULE)

    bernoulli_begin = None
    bernoulli_end = None
    if BERNOULLI:  # compared as 32-bit integers: ratio 1 masks everything, ratio 0 nothing
        bernoulli_end = (tl.minimum(tl.maximum(ratio, 0.0), 1.0) * 4294967296.0).to(tl.int64)
        if COMPLEMENT:
            bernoulli_begin = bernoulli_end
            bernoulli_end = None
            ratio = 1.0 - ratio
    sequence = Sequence(seed, sample, N, maskable_ptr, bernoulli_begin, bernoulli_end)
    if ONE_BLOCK:
        keys = _draw_keys(sequence, block)

    masked_before = tl.full((), 0, tl.int64)
    if row_indices_ptr is not None:
        # Counts of this row and of all before it. Both come from the same instructions, since cosines of
        # different code could differ in the last bit, and two rows' entries would then overlap.
        num_keys = tl.full((), N, tl.int32)
        count = tl.full((), 0, tl.int32)
        for first in range(0, row + 1, BLOCK_B):
            rows = first + tl.arange(0, BLOCK_B)
            if counts_ptr is not None:
                wanted = tl.load(counts_ptr + rows, mask=rows <= row, other=0)
                wanted = tl.minimum(tl.maximum(wanted, 0), num_keys).to(tl.int32)
            elif ratios_ptr is not None:
                wanted = _exact_count(tl.load(ratios_ptr + rows, mask=rows <= row, other=0.0), num_keys)
            else:
                samples = tl.full((), sample_offset, tl.int64) + rows
                wanted = _exact_count(
                    schedule.ratio(schedule.drawn(seed, samples, global_batch_size), SCHEDULE), num_keys
                )
            if COMPLEMENT:
                wanted = num_keys - wanted
            masked_before += tl.sum(tl.where(rows < row, wanted, 0))
            count += tl.sum(tl.where(rows == row, wanted, 0))
        tl.store(num_masked_ptr, masked_before + count, mask=row == num_rows - 1)
    else:
        num_keys = tl.full((), 0, tl.int32)
        for first in range(0, limit, BLOCK_N):
            if not ONE_BLOCK:
                keys = _draw_keys(sequence, first + block)
            num_keys += tl.sum((keys.key < smallest_keys.END).to(tl.int32))
        if BERNOULLI:
            count = num_keys
        elif counts_ptr is not None:
            count = tl.minimum(tl.maximum(tl.load(counts_ptr + row), 0), num_keys).to(tl.int32)
        else:
            count = _exact_count(ratio, num_keys)
        if COMPLEMENT and not BERNOULLI:
            count = num_keys - count

    divisor = count.to(tl.float32)
    if BERNOULLI:
        divisor = ratio
    else:
        steepness *= num_keys.to(tl.float32)
    weight = tl.div_rn(steepness, tl.where(count > 0, divisor, 1.0))
    tl.store(out_times_ptr + row, time)
    tl.store(out_counts_ptr + row, count)
    tl.store(loss_weights_ptr + row, tl.where(count > 0, weight, 0.0))

    # The parts' brackets shrink together: one pass over the keys a round, for all of them.
    ends = parts.ends_of_parts(seed, count, keep_prob, random_prob, random_prob_after_keep)
    if COMPLEMENT and not BERNOULLI:
        ends = parts.of_complement(ends, num_keys - count)
    brackets = parts.start(ends, num_keys)
    while not parts.are_found(brackets, ends):
        probes = parts.probes(brackets, ends)
        counts = tl.full((), 0, tl.int32 if keep_prob is None else tl.int64)
        for first in range(0, limit, BLOCK_N):
            if not ONE_BLOCK:
                keys = _draw_keys(sequence, first + block)
            counts += parts.count_below(keys.key, probes)
        brackets = parts.narrow(brackets, ends, probes, counts)

    if num_ids_ptr is not None:
        num_ids = tl.load(num_ids_ptr)
    gates = Gates(mask_id, num_ids, ids_ptr, keep_end, random_end)
    for first in range(0, limit, BLOCK_N):
        offs_n = first + block
        in_n = offs_n < N
        if not ONE_BLOCK:
            keys = _draw_keys(sequence, offs_n)
            token = tl.load(tokens_ptr + offs_n, mask=in_n)
        if COMPLEMENT and not BERNOULLI:
            is_masked = (keys.key >= brackets.masked.low) & (keys.key < smallest_keys.END)
        else:
            is_masked = keys.key < brackets.masked.low
        visible = _visible_ids(token, keys, brackets, gates, SKIPS_MASK)
        tl.store(masked_ids_ptr + offset + offs_n, tl.where(is_masked, visible, token), mask=in_n)
        tl.store(is_masked_ptr + offset + offs_n, is_masked, mask=in_n)
        if row_indices_ptr is not None:
            masked_before = _list_rows(row_indices_ptr, is_masked, offs_n, N, row, num_rows, masked_before)


@triton.jit(do_not_specialize=["num_rows"])
def _row_list_kernel(
    is_masked_ptr,
    counts_ptr,
    row_indices_ptr,
    num_masked_ptr,
    num_rows,
    N,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    # This program lists the masked positions of one sequence.
    row = tl.program_id(0)
    is_masked_ptr += row.to(tl.int64) * N
    masked_before = tl.full((), 0, tl.int64)
    for first in range(0, row, BLOCK_B):
        rows = first + tl.arange(0, BLOCK_B)
        masked_before += tl.sum(tl.load(counts_ptr + rows, mask=rows < row, other=0))
    for first in range(0, N, BLOCK_N):
        offs_n = first + tl.arange(0, BLOCK_N)
        is_masked = tl.load(is_masked_ptr + offs_n, mask=offs_n < N, other=0) != 0
        masked_before = _list_rows(row_indices_ptr, is_masked, offs_n, N, row, num_rows, masked_before)
    tl.store(num_masked_ptr, masked_before, mask=row == num_rows - 1)


# Rows: longest sequence, warps. Few rows are in flight on a large GPU, so what counts is one row's latency.
_ONE_BLOCK = (
    (128, 1),  # a single warp reduces without a barrier
    (512, 4),  # one warp for each scheduler of the SM
    (4096, 8),  # two for each: one computes while another waits; at most 16 keys a thread stay in registers
)
# Longer sequences do not fit registers: their keys are drawn again in each pass, 8 a thread at a time.
_BLOCKS = (4096, 16)

# Rows counted at once when a program sums the counts before its own.
_BLOCK_B = 128


def _configuration(length: int) -> tuple[int, int]:
    """BLOCK_N and num_warps for sequences of that length."""
    for longest, num_warps in _ONE_BLOCK:
        if length <= longest:
            return max(16, _launch.next_power_of_2(length)), num_warps
    return _BLOCKS


def _empty(tokens: Tensor) -> MaskedTokens:
    shape, batch = tokens.shape, tokens.shape[0]
    return MaskedTokens(
        masked_ids=tokens.new_empty(shape),
        is_masked=tokens.new_empty(shape, dtype=torch.bool),
        times=tokens.new_empty(batch, dtype=torch.float32),
        counts=tokens.new_empty(batch, dtype=torch.int64),
        loss_weights=tokens.new_empty(batch, dtype=torch.float32),
        row_indices=tokens.new_empty(tokens.numel(), dtype=torch.int64),
        num_masked=tokens.new_empty((), dtype=torch.int64),
    )


def _fake(tokens: Tensor, *arguments: object) -> MaskedTokens:
    return _empty(tokens)


@operator("mask_sampling", _fake)
def mask_sampling(
    tokens: Tensor,
    draws: Draws,
    masking: Masking,
    values: ScheduleValues,
    counts: Tensor | None,
    maskable: Tensor | None,
    random_ids: RandomIds,
) -> MaskedTokens:
    """See the reference, ``fastmask.reference.mask_sampling``: same arguments, same results."""
    num_rows, length = tokens.shape
    smallest_keys.check_length(length)
    out = _empty(tokens)
    if num_rows == 0:
        out.num_masked.zero_()
        return out

    tokens = tokens if tokens.stride(-1) == 1 else tokens.contiguous()
    maskable = maskable if maskable is None or maskable.stride(-1) == 1 else maskable.contiguous()
    values = ScheduleValues(*(x if x is None else x.contiguous() for x in values))
    counts = counts if counts is None else counts.contiguous()
    keep_prob, random_prob = masking.no_replace_prob, masking.random_token_prob
    is_gated = keep_prob != 0.0 or random_prob != 0.0
    has_parts, gates_tokens = is_gated and not masking.gates_tokens, is_gated and masking.gates_tokens
    keep_end, random_end = masking.gate_ends if gates_tokens else (None, None)
    skips_mask = not masking.random_may_be_mask and masking.mask_id < masking.num_tokens
    # The list's offsets need the counts of all earlier rows: known beforehand if they depend on t alone.
    one_launch = not masking.bernoulli and maskable is None
    block_n, num_warps = _configuration(length)
    _launch.launch(
        _mask_sampling_kernel,
        (num_rows,),
        tokens,
        tokens_ptr=tokens,
        stride_tb=tokens.stride(0),
        seed_ptr=draws.seed,
        times_ptr=values.times,
        ratios_ptr=values.ratios,
        slopes_ptr=values.slopes,
        counts_ptr=counts,
        maskable_ptr=maskable,
        stride_mb=None if maskable is None else maskable.stride(0),
        masked_ids_ptr=out.masked_ids,
        is_masked_ptr=out.is_masked,
        out_times_ptr=out.times,
        out_counts_ptr=out.counts,
        loss_weights_ptr=out.loss_weights,
        row_indices_ptr=out.row_indices if one_launch else None,
        num_masked_ptr=out.num_masked if one_launch else None,
        num_rows=num_rows,
        N=length,
        sample_offset=draws.sample_offset,
        global_batch_size=masking.global_batch_size if masking.stratified else None,
        mask_id=masking.mask_id,
        num_ids=masking.num_tokens - skips_mask,
        ids_ptr=random_ids.ids,
        num_ids_ptr=random_ids.num_ids,
        keep_prob=keep_prob if has_parts else None,
        random_prob=random_prob if has_parts else None,
        random_prob_after_keep=random_prob * (1.0 - keep_prob) if has_parts else None,
        keep_end=keep_end,
        random_end=random_end,
        SCHEDULE=masking.schedule if values.times is None else None,
        BERNOULLI=masking.bernoulli,
        COMPLEMENT=masking.complement,
        SKIPS_MASK=skips_mask,
        ONE_BLOCK=length <= block_n,
        BLOCK_N=block_n,
        BLOCK_B=_BLOCK_B,
        num_warps=num_warps,
        enable_fp_fusion=False,  # products and sums round one by one, as in the reference
    )
    if not one_launch:
        _launch.launch(
            _row_list_kernel,
            (num_rows,),
            tokens,
            is_masked_ptr=out.is_masked,
            counts_ptr=out.counts,
            row_indices_ptr=out.row_indices,
            num_masked_ptr=out.num_masked,
            num_rows=num_rows,
            N=length,
            BLOCK_N=block_n,
            BLOCK_B=_BLOCK_B,
            num_warps=num_warps,
        )
    return out
