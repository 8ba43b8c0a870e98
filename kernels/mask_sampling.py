"""Masks for a batch of sequences: times, counts, masked ids, loss weights and the list of masked rows.

The masked set is the k smallest random keys of a row, k = max(1, ceil(schedule(t) n)) (MaskGIT,
https://arxiv.org/abs/2202.04200); ranks [0, a) of it keep their token, [a, a + b) get a random one
(BERT, https://arxiv.org/abs/1810.04805). Three order statistics, found by counting, replace five sorts.
``fastmask/reference/mask_sampling.py`` is the specification, number for number.

Bytes for each position: reads the token and ``maskable`` (1), writes the id, ``is_masked`` (1) and one entry
of the row list (8); with two launches ``is_masked`` is read once more. Nothing is saved for backward.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask import _streams as streams
from fastmask.kernels import philox
from fastmask.kernels._operator import operator

_TIMES = tl.constexpr(streams.TIMES)
_STRATUM = tl.constexpr(streams.STRATUM)
_COINS = tl.constexpr(streams.COINS)
_KEYS = tl.constexpr(streams.KEYS)

# A key and its position form one integer, so that keys are distinct: ties break by position.
_POSITION_BITS = tl.constexpr(16)
_MAX_LENGTH = 1 << _POSITION_BITS.value
_END = tl.constexpr(1 << 48)  # above every key; the key of what cannot be masked

# Three counts, each at most 65536, fit an int64.
_COUNT_BITS = tl.constexpr(20)
_COUNT_MASK = tl.constexpr((1 << 20) - 1)


@triton.jit
def _draw_times(seed, samples, global_batch_size, STRATIFIED: tl.constexpr):
    """t in [0, 1) of each global sample."""
    if STRATIFIED:
        offset = philox.uniform(philox.draw(seed, _STRATUM)[0])
        stratum = (samples % global_batch_size).to(tl.float32)
        time = offset + tl.div_rn(stratum, tl.full((), global_batch_size, tl.float32))
        time -= tl.floor(time)
    else:
        time = philox.uniform(philox.draw(seed, _TIMES, samples)[0])
    return time


@triton.jit
def _quarter_sine(x):
    """sin(pi x / 2) for x in [0, 1]: seven terms of its Taylor series, remainder 7e-10; the twin's own.

    The library's cosine keeps a table for huge arguments on the stack, and rounds unlike torch's.
    """
    square = x * x
    total = 5.692172921967926e-08 * square - 3.598843235212085e-06
    total = total * square + 1.6044118478735982e-04
    total = total * square - 4.6817541353186881e-03
    total = total * square + 7.9692626246167046e-02
    total = total * square - 0.64596409750624625
    total = total * square + 1.5707963267948966
    return total * x


@triton.jit
def _ratio(time, SCHEDULE: tl.constexpr):
    """schedule(t), t in [0, 1]."""
    tl.static_assert(SCHEDULE == "linear" or SCHEDULE == "cosine")
    ratio = 1.0 - time
    if SCHEDULE == "cosine":
        ratio = _quarter_sine(ratio)
    return ratio


@triton.jit
def _steepness(time, SCHEDULE: tl.constexpr):
    """abs(schedule'(t))."""
    steepness = tl.full((), 1.0, tl.float32)
    if SCHEDULE == "cosine":
        steepness = 1.5707963267948966 * _quarter_sine(time)
    return steepness


@triton.jit
def _exact_count(ratio, num_candidates):
    """k = max(1, ceil(float32(ratio n))), within [0, n], int32."""
    # In int64, where no float32 of a sane schedule overflows.
    count = tl.ceil(ratio * num_candidates.to(tl.float32)).to(tl.int64)
    return tl.minimum(tl.maximum(count, 1), num_candidates).to(tl.int32)


@triton.jit
def _draw_keys(seed, sample, offs_n, N, maskable_ptr, threshold, HAS_MASKABLE: tl.constexpr, BERNOULLI: tl.constexpr):
    """Distinct int64 keys, _END where a position cannot be masked, and the two words of the random id."""
    key, id_high, id_low, bernoulli_word = philox.draw(seed, _KEYS, sample, offs_n)
    candidate = offs_n < N
    if HAS_MASKABLE:
        candidate = tl.load(maskable_ptr + offs_n, mask=candidate, other=0) != 0
    if BERNOULLI:
        candidate = candidate & (bernoulli_word.to(tl.int64) < threshold)
    key = (key.to(tl.int64) << _POSITION_BITS) | offs_n
    return tl.where(candidate, key, _END), id_high, id_low


@triton.jit
def _gate_ranks(seed, count, keep_prob, random_prob, random_prob_after_keep):
    """Ranks in the masked set below which a token is kept, and below which it is kept or random; int32."""
    keep_word, random_word, _, _ = philox.draw(seed, _COINS)
    keep_coin = keep_word < 2147483648
    kept = tl.where(keep_coin, tl.ceil(count.to(tl.float32) * keep_prob).to(tl.int32), 0)
    left = count - kept
    share = tl.where(keep_coin, random_prob_after_keep, random_prob)
    random = tl.minimum(tl.ceil(left.to(tl.float32) * share).to(tl.int32), left)
    return kept, kept + tl.where(random_word < 2147483648, random, 0)


@triton.jit
def _count_below(key, kept, random, masked, GATED: tl.constexpr):
    """How many keys lie below each threshold; three thresholds share an int64 and so one reduction."""
    counts = (key < masked).to(tl.int32)
    if GATED:
        counts = counts.to(tl.int64)
        counts += (key < random).to(tl.int64) << _COUNT_BITS
        counts += (key < kept).to(tl.int64) << (2 * _COUNT_BITS)
    return tl.sum(counts)


@triton.jit
def _bracket(rank, num_keys):
    """Thresholds low < high with below_low <= rank < below_high keys below them; low alone if it serves."""
    low = tl.where(rank == num_keys, _END, 0).to(tl.int64)
    return low, tl.full((), _END, tl.int64), tl.where(rank == num_keys, num_keys, 0), num_keys


@triton.jit
def _probe(rank, low, high, below_low, below_high):
    """Where to count next: keys are uniform, so interpolation needs a third of bisection's rounds.

    Any probe inside the bracket is correct, so the division may be an approximate one.
    """
    share = ((rank - below_low).to(tl.float32) + 0.5) / (below_high - below_low + 1).to(tl.float32)
    step = ((high - low).to(tl.float32) * share).to(tl.int64)
    step = tl.minimum(tl.maximum(step, 1), high - low - 1)
    return tl.where(below_low == rank, low, low + step)


@triton.jit
def _narrow(rank, probe, count, low, high, below_low, below_high):
    is_low = count <= rank
    return (
        tl.where(is_low, probe, low),
        tl.where(is_low, high, probe),
        tl.where(is_low, count, below_low),
        tl.where(is_low, below_high, count),
    )


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


@triton.jit(do_not_specialize=["num_rows", "sample_offset", "global_batch_size", "mask_id", "num_ids"])
def _mask_sampling_kernel(
    tokens_ptr,
    stride_tb,
    seed_ptr,
    times_ptr,
    ratios_ptr,
    slopes_ptr,
    counts_ptr,
    maskable_ptr,
    stride_mb,
    masked_ids_ptr,
    is_masked_ptr,
    out_times_ptr,
    out_counts_ptr,
    loss_weights_ptr,
    row_indices_ptr,
    num_masked_ptr,
    num_rows,
    N,
    sample_offset,
    global_batch_size,
    mask_id,
    num_ids,  # how many ids a random token is drawn from
    keep_prob,
    random_prob,
    random_prob_after_keep,
    SCHEDULE: tl.constexpr,  # None: times, ratios and slopes are given
    STRATIFIED: tl.constexpr,
    BERNOULLI: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    HAS_MASKABLE: tl.constexpr,
    GATED: tl.constexpr,
    SKIPS_MASK: tl.constexpr,
    ONE_LAUNCH: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    # This program masks one sequence. With ONE_BLOCK its keys stay in registers; otherwise each pass over the
    # sequence draws them again, block by block.
    row = tl.program_id(0)
    offset = row.to(tl.int64) * N
    tokens_ptr += row.to(tl.int64) * stride_tb
    if HAS_MASKABLE:
        maskable_ptr += row.to(tl.int64) * stride_mb
    sample = tl.full((), sample_offset, tl.int64) + row
    block = tl.arange(0, BLOCK_N)
    limit = BLOCK_N if ONE_BLOCK else N
    seed = tl.load(seed_ptr)
    if ONE_BLOCK:  # asked for early, needed last
        token = tl.load(tokens_ptr + block, mask=block < N)

    if SCHEDULE is None:
        time = tl.load(times_ptr + row)
        ratio = tl.load(ratios_ptr + row)
        steepness = tl.abs(tl.load(slopes_ptr + row))
    else:
        time = _draw_times(seed, sample, global_batch_size, STRATIFIED)
        ratio = _ratio(time, SCHEDULE)
        steepness = _steepness(time, SCHEDULE)

    # Compared as 32-bit integers: ratio 1 masks everything, ratio 0 nothing.
    threshold = (tl.minimum(tl.maximum(ratio, 0.0), 1.0) * 4294967296.0).to(tl.int64)
    if ONE_BLOCK:
        key, id_high, id_low = _draw_keys(seed, sample, block, N, maskable_ptr, threshold, HAS_MASKABLE, BERNOULLI)

    masked_before = tl.full((), 0, tl.int64)
    if ONE_LAUNCH:
        # Counts of this row and of all before it. Both come from the same instructions, since cosines of
        # different code could differ in the last bit, and two rows' entries would then overlap.
        num_keys = tl.full((), N, tl.int32)
        count = tl.full((), 0, tl.int32)
        for first in range(0, row + 1, BLOCK_B):
            rows = first + tl.arange(0, BLOCK_B)
            if HAS_COUNTS:
                wanted = tl.load(counts_ptr + rows, mask=rows <= row, other=0)
                wanted = tl.minimum(tl.maximum(wanted, 0), num_keys).to(tl.int32)
            elif SCHEDULE is None:
                wanted = _exact_count(tl.load(ratios_ptr + rows, mask=rows <= row, other=0.0), num_keys)
            else:
                samples = tl.full((), sample_offset, tl.int64) + rows
                times = _draw_times(seed, samples, global_batch_size, STRATIFIED)
                wanted = _exact_count(_ratio(times, SCHEDULE), num_keys)
            masked_before += tl.sum(tl.where(rows < row, wanted, 0))
            count += tl.sum(tl.where(rows == row, wanted, 0))
    else:
        num_keys = tl.full((), 0, tl.int32)
        for first in range(0, limit, BLOCK_N):
            if not ONE_BLOCK:
                key, id_high, id_low = _draw_keys(
                    seed, sample, first + block, N, maskable_ptr, threshold, HAS_MASKABLE, BERNOULLI
                )
            num_keys += tl.sum((key < _END).to(tl.int32))
        if BERNOULLI:
            count = num_keys
        elif HAS_COUNTS:
            count = tl.minimum(tl.maximum(tl.load(counts_ptr + row), 0), num_keys).to(tl.int32)
        else:
            count = _exact_count(ratio, num_keys)

    divisor = count.to(tl.float32)
    if BERNOULLI:
        divisor = ratio
    else:
        steepness *= num_keys.to(tl.float32)
    weight = tl.div_rn(steepness, tl.where(count > 0, divisor, 1.0))
    tl.store(out_times_ptr + row, time)
    tl.store(out_counts_ptr + row, count)
    tl.store(loss_weights_ptr + row, tl.where(count > 0, weight, 0.0))
    if ONE_LAUNCH:
        tl.store(num_masked_ptr, masked_before + count, mask=row == num_rows - 1)

    # Three thresholds among the keys, of ranks kept, random and count: k, r and m for short. Their brackets
    # (low, high, below_low, below_high) shrink together, one pass over the keys for all of them.
    low_m, high_m, below_low_m, below_high_m = _bracket(count, num_keys)
    searching = below_low_m != count
    if GATED:
        kept, random = _gate_ranks(seed, count, keep_prob, random_prob, random_prob_after_keep)
        low_k, high_k, below_low_k, below_high_k = _bracket(kept, num_keys)
        low_r, high_r, below_low_r, below_high_r = _bracket(random, num_keys)
        searching = searching | (below_low_k != kept) | (below_low_r != random)
    while searching:
        probe_m = _probe(count, low_m, high_m, below_low_m, below_high_m)
        probe_k = probe_m
        probe_r = probe_m
        if GATED:
            probe_k = _probe(kept, low_k, high_k, below_low_k, below_high_k)
            probe_r = _probe(random, low_r, high_r, below_low_r, below_high_r)
        packed = tl.full((), 0, tl.int64 if GATED else tl.int32)
        for first in range(0, limit, BLOCK_N):
            if not ONE_BLOCK:
                key, id_high, id_low = _draw_keys(
                    seed, sample, first + block, N, maskable_ptr, threshold, HAS_MASKABLE, BERNOULLI
                )
            packed += _count_below(key, probe_k, probe_r, probe_m, GATED)
        low_m, high_m, below_low_m, below_high_m = _narrow(
            count, probe_m, (packed & _COUNT_MASK).to(tl.int32), low_m, high_m, below_low_m, below_high_m
        )
        searching = below_low_m != count
        if GATED:
            low_r, high_r, below_low_r, below_high_r = _narrow(
                random,
                probe_r,
                ((packed >> _COUNT_BITS) & _COUNT_MASK).to(tl.int32),
                low_r,
                high_r,
                below_low_r,
                below_high_r,
            )
            low_k, high_k, below_low_k, below_high_k = _narrow(
                kept, probe_k, (packed >> (2 * _COUNT_BITS)).to(tl.int32), low_k, high_k, below_low_k, below_high_k
            )
            searching = searching | (below_low_k != kept) | (below_low_r != random)

    for first in range(0, limit, BLOCK_N):
        offs_n = first + block
        in_n = offs_n < N
        if not ONE_BLOCK:
            key, id_high, id_low = _draw_keys(
                seed, sample, offs_n, N, maskable_ptr, threshold, HAS_MASKABLE, BERNOULLI
            )
            token = tl.load(tokens_ptr + offs_n, mask=in_n)
        is_masked = key < low_m
        visible = tl.full((), mask_id, token.dtype)
        if GATED:
            ids = philox.below(num_ids, id_high, id_low)
            if SKIPS_MASK:
                ids += (ids >= mask_id).to(tl.int64)
            visible = tl.where(key < low_r, ids.to(token.dtype), visible)
            visible = tl.where(key < low_k, token, visible)
        tl.store(masked_ids_ptr + offset + offs_n, tl.where(is_masked, visible, token), mask=in_n)
        tl.store(is_masked_ptr + offset + offs_n, is_masked, mask=in_n)
        if ONE_LAUNCH:
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
            return max(16, triton.next_power_of_2(length)), num_warps
    return _BLOCKS


Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _allocate(tokens: Tensor) -> Outputs:
    """masked_ids, is_masked, times, counts, loss_weights, row_indices, num_masked."""
    shape, batch = tokens.shape, tokens.shape[0]
    return (
        tokens.new_empty(shape),
        tokens.new_empty(shape, dtype=torch.bool),
        tokens.new_empty(batch, dtype=torch.float32),
        tokens.new_empty(batch, dtype=torch.int64),
        tokens.new_empty(batch, dtype=torch.float32),
        tokens.new_empty(tokens.numel(), dtype=torch.int64),
        tokens.new_empty((), dtype=torch.int64),
    )


def _fake(tokens: Tensor, *args: object, **kwargs: object) -> Outputs:
    return _allocate(tokens)


@operator("mask_sampling", _fake)
def mask_sampling(
    tokens: Tensor,
    seed: Tensor,
    times: Tensor | None = None,
    ratios: Tensor | None = None,
    slopes: Tensor | None = None,
    counts: Tensor | None = None,
    maskable: Tensor | None = None,
    *,
    schedule: str,
    mask_id: int,
    num_tokens: int,
    bernoulli: bool,
    stratified: bool,
    no_replace_prob: float,
    random_token_prob: float,
    random_may_be_mask: bool,
    sample_offset: int,
    global_batch_size: int,
) -> Outputs:
    """See the twin, ``fastmask.reference.mask_sampling``: same arguments, same seven outputs."""
    num_rows, length = tokens.shape
    if length > _MAX_LENGTH:
        raise ValueError(
            f"expected sequences of at most {_MAX_LENGTH} tokens, received {length}; "
            'use backend="reference" for longer ones'
        )
    outputs = _allocate(tokens)
    masked_ids, is_masked, out_times, out_counts, loss_weights, row_indices, num_masked = outputs
    if num_rows == 0:
        num_masked.zero_()
        return outputs

    tokens, maskable = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (tokens, maskable))
    times, ratios, slopes, counts = (x if x is None else x.contiguous() for x in (times, ratios, slopes, counts))
    skips_mask = not random_may_be_mask and mask_id < num_tokens
    # The list's offsets need the counts of all earlier rows: known beforehand if they depend on t alone.
    one_launch = not bernoulli and maskable is None
    block_n, num_warps = _configuration(length)
    with torch.cuda.device_of(tokens):  # Triton launches on the current device
        _mask_sampling_kernel[(num_rows,)](
            tokens_ptr=tokens,
            stride_tb=tokens.stride(0),
            seed_ptr=seed,
            times_ptr=times,
            ratios_ptr=ratios,
            slopes_ptr=slopes,
            counts_ptr=counts,
            maskable_ptr=maskable,
            stride_mb=0 if maskable is None else maskable.stride(0),
            masked_ids_ptr=masked_ids,
            is_masked_ptr=is_masked,
            out_times_ptr=out_times,
            out_counts_ptr=out_counts,
            loss_weights_ptr=loss_weights,
            row_indices_ptr=row_indices,
            num_masked_ptr=num_masked,
            num_rows=num_rows,
            N=length,
            sample_offset=sample_offset,
            global_batch_size=global_batch_size,
            mask_id=mask_id,
            num_ids=num_tokens - skips_mask,
            keep_prob=no_replace_prob,
            random_prob=random_token_prob,
            random_prob_after_keep=random_token_prob * (1.0 - no_replace_prob),
            SCHEDULE=schedule if times is None else None,
            STRATIFIED=stratified,
            BERNOULLI=bernoulli,
            HAS_COUNTS=counts is not None,
            HAS_MASKABLE=maskable is not None,
            GATED=no_replace_prob != 0.0 or random_token_prob != 0.0,
            SKIPS_MASK=skips_mask,
            ONE_LAUNCH=one_launch,
            ONE_BLOCK=length <= block_n,
            BLOCK_N=block_n,
            BLOCK_B=_BLOCK_B,
            num_warps=num_warps,
            enable_fp_fusion=False,  # products and sums round one by one, as in the twin
        )
        if not one_launch:
            _row_list_kernel[(num_rows,)](
                is_masked_ptr=is_masked,
                counts_ptr=out_counts,
                row_indices_ptr=row_indices,
                num_masked_ptr=num_masked,
                num_rows=num_rows,
                N=length,
                BLOCK_N=block_n,
                BLOCK_B=_BLOCK_B,
                num_warps=num_warps,
            )
    return outputs
