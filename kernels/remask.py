"""Which positions are masked again: those of the highest remask keys, in one launch with all that follows from it.

A remask key is minus the confidence of a token, or a critic's logit that it is wrong; Gumbel noise may be added
first. One program a sequence draws the noise, finds the keys' threshold by counting (``kernels/_smallest_keys.py``),
writes ids and masks, and lists what is masked for the next step. ``fastmask/reference/remask.py`` is the
specification.

Bytes for each position: reads the value and whether it may be masked again (1), writes ``is_masked`` (1) and, where
it is masked, its id (8) and its place in the list (8). A sequence of over 4096 positions is read anew in each pass.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastmask import _streams as streams
from fastmask.kernels import _float_order as float_order
from fastmask.kernels import _launch, _math, philox
from fastmask.kernels import _smallest_keys as smallest_keys
from fastmask.kernels._operator import operator
from fastmask.records import Draws, Remasking, RowList, Windows

_SCORE_NOISE = tl.constexpr(streams.SCORE_NOISE)
_LAST_POSITION = tl.constexpr(smallest_keys.MAX_LENGTH - 1)


class Noise(NamedTuple):
    """The Gumbel noise of a sequence's positions, and what it is multiplied with.

    drawn_ptr: where it lies if it has been drawn.
    """

    drawn_ptr: tl.tensor | None
    scale: tl.tensor
    seed: tl.tensor
    sample: tl.tensor
    step: tl.tensor


class Window(NamedTuple):
    """The positions of a block: from the first to before the end."""

    first: tl.tensor
    end: tl.tensor


class Sequence(NamedTuple):
    """One sequence as a program sees it.

    values_ptr: confidences, entropies or a critic's logits. eligible_ptr: which positions may be masked again.
    min_remask_key: those of a lower one, without the noise, may not; None for all. block, noise: or None.
    """

    values_ptr: tl.tensor
    eligible_ptr: tl.tensor
    N: tl.tensor
    min_remask_key: tl.tensor | None
    block: Window | None
    noise: Noise | None


class Written(NamedTuple):
    """What the program writes of its sequence: flat index of its first position, and where.

    ids_ptr, row_indices_ptr: None where only the selection is asked for. block, next_block: None for everywhere.
    """

    first: tl.tensor
    is_masked_ptr: tl.tensor
    ids_ptr: tl.tensor | None
    mask_id: tl.tensor | None
    row_indices_ptr: tl.tensor | None
    list_end: tl.tensor | None
    block: Window | None
    next_block: Window | None


@triton.jit
def _gumbel(seed, sample, position, step):
    """Gumbel(0, 1) noise of a position."""
    high, low, _, _ = philox.draw(seed, _SCORE_NOISE, sample, position, 0, step)
    return -_math.log(philox.exponential(high, low))


@triton.jit(do_not_specialize=["num_elements", "N", "sample_offset", "step"])
def _noise_kernel(seed_ptr, noise_ptr, num_elements, N, sample_offset, step, BLOCK: tl.constexpr):
    # This program draws a block of Gumbel noise.
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    noise = _gumbel(tl.load(seed_ptr), sample_offset + offsets // N, offsets % N, step)
    tl.store(noise_ptr + offsets, noise, mask=offsets < num_elements)


@triton.jit
def _window(window_ptr, row):
    return None if window_ptr is None else Window(tl.load(window_ptr + 2 * row), tl.load(window_ptr + 2 * row + 1))


@triton.jit
def _is_inside(offs_n, window):
    return (offs_n >= window.first) & (offs_n < window.end)


@triton.jit
def _is_counted(sequence, offs_n):
    """Which positions may be masked again, however sure."""
    is_eligible = tl.load(sequence.eligible_ptr + offs_n, mask=offs_n < sequence.N, other=0) != 0
    return is_eligible if sequence.block is None else is_eligible & _is_inside(offs_n, sequence.block)


@triton.jit
def _selection_keys(sequence, offs_n, IS_CONFIDENCE: tl.constexpr):
    """Distinct integers in the order of selection: NaN, then by falling remask key, then by falling position."""
    value = tl.load(sequence.values_ptr + offs_n, mask=offs_n < sequence.N, other=0.0).to(tl.float32)
    is_eligible = _is_counted(sequence, offs_n)
    if sequence.min_remask_key is not None:
        is_eligible &= ((-value if IS_CONFIDENCE else value) < sequence.min_remask_key) == 0
    if sequence.noise is not None:
        noise = sequence.noise
        if noise.drawn_ptr is None:
            value += noise.scale * _gumbel(noise.seed, noise.sample, offs_n, noise.step)
        else:
            value += noise.scale * tl.load(noise.drawn_ptr + offs_n, mask=offs_n < sequence.N, other=0.0)
    remask_key = -value if IS_CONFIDENCE else value
    return smallest_keys.keys_of(_descending(remask_key), _LAST_POSITION - offs_n, is_eligible)


@triton.jit
def _descending(remask_key):
    """int64 in [0, 2^32) that falls as the remask key rises; 0 for NaN."""
    order = 0x7FFFFFFF - float_order.order(tl.where(remask_key == 0.0, 0.0, remask_key)).to(tl.int64)  # -0.0 as 0.0
    return tl.where(remask_key == remask_key, order, 0)


@triton.jit
def _remask_key(key):
    """What a key is of; NaN where it is of NaN."""
    order = (0x7FFFFFFF - smallest_keys.order_of(key)).to(tl.int32)
    return float_order.value(order)


@triton.jit
def _holds(num_committed, least_sure, entropy, factor, entropy_bound):
    """Whether a rule commits so many positions, whose largest remask key, and sum of entropies, these are."""
    if factor is not None:
        holds = _math.exp(-least_sure) >= 1.0 - factor / (num_committed + 1).to(tl.float32)
    else:
        holds = entropy - _fixed_point(least_sure) <= entropy_bound
    return (num_committed == 0) | (holds & (least_sure == least_sure))


@triton.jit
def _fixed_point(nats):
    """Multiples of 2^-32 nats: their sums do not depend on the order."""
    return (tl.minimum(tl.maximum(nats, -1024.0), 1024.0) * 4294967296.0).to(tl.int64)


@triton.jit
def _write(written, offs_n, N, is_chosen, slot):
    """Masks what was chosen of a block, everything else there not, and lists it; the next free slot of the list."""
    in_n = offs_n < N
    is_masked_ptr = written.is_masked_ptr + written.first + offs_n
    if written.block is not None:
        in_block = _is_inside(offs_n, written.block)
        was_masked = tl.load(is_masked_ptr, mask=in_n & (in_block == 0), other=0) != 0
        tl.store(is_masked_ptr, is_chosen, mask=in_n & in_block)
    else:
        was_masked = is_chosen
        tl.store(is_masked_ptr, is_chosen, mask=in_n)
    if written.ids_ptr is not None:
        tl.store(written.ids_ptr + written.first + offs_n, written.mask_id, mask=is_chosen)
        is_listed = is_chosen | was_masked
        if written.next_block is not None:
            is_listed &= _is_inside(offs_n, written.next_block)
        number = is_listed.to(tl.int32)
        slots = slot + tl.cumsum(number, 0) - 1
        tl.store(written.row_indices_ptr + slots, written.first + offs_n, mask=is_listed & (slots < written.list_end))
        slot += tl.sum(number)
    return slot


# The counts and starts of one step lie in a row of a plan's, so that their alignment differs between steps.
@triton.jit(
    do_not_specialize=["num_places", "N", "sample_offset", "step", "mask_id", "entropy_bound"],
    do_not_specialize_on_alignment=["counts_ptr", "row_starts_ptr", "block_ptr", "next_block_ptr"],
)
def _selection_kernel(
    values_ptr,
    eligible_ptr,
    counts_ptr,
    seed_ptr,
    is_masked_ptr,
    ids_ptr,  # None, as are the next three, where only the selection is asked for
    row_indices_ptr,
    row_starts_ptr,  # None where each sequence has as many places
    num_places,
    block_ptr,  # None for everywhere, as is the next
    next_block_ptr,
    noise_ptr,  # the noise of a long sequence; None: it is drawn here
    N,
    sample_offset,
    step,
    noise_scale,  # None for no noise
    min_remask_key,  # None for none, as are the next two
    factor,
    entropy_bound,  # in multiples of 2^-32 nats
    mask_id,
    IS_CONFIDENCE: tl.constexpr,
    COUNTS_COMMIT: tl.constexpr,
    COMMITS_ONE: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # This program selects in one sequence. With ONE_BLOCK its keys stay in registers; otherwise each pass reads them.
    row = tl.program_id(0).to(tl.int64)
    noise = None
    if noise_scale is not None:
        drawn_ptr = None if noise_ptr is None else noise_ptr + row * N
        noise = Noise(drawn_ptr, noise_scale, tl.load(seed_ptr), sample_offset + row, step)
    block = _window(block_ptr, row)
    sequence = Sequence(values_ptr + row * N, eligible_ptr + row * N, N, min_remask_key, block, noise)
    lane = tl.arange(0, BLOCK_N)
    limit = BLOCK_N if ONE_BLOCK else N
    key = _selection_keys(sequence, lane, IS_CONFIDENCE)

    least = tl.full((), smallest_keys.END, tl.int64)
    largest = tl.full((), -1, tl.int64)
    num_eligible = tl.full((), 0, tl.int32)
    num_sure = tl.full((), 0, tl.int32)  # enough not to be eligible
    for first in range(0, limit, BLOCK_N):
        if not ONE_BLOCK:
            key = _selection_keys(sequence, first + lane, IS_CONFIDENCE)
        is_key = key < smallest_keys.END
        least = tl.minimum(least, tl.min(key))
        largest = tl.maximum(largest, tl.max(tl.where(is_key, key, -1)))
        num_eligible += tl.sum(is_key.to(tl.int32))
        if (COUNTS_COMMIT or COMMITS_ONE) and min_remask_key is not None:
            num_sure += tl.sum((_is_counted(sequence, first + lane) & (is_key == 0)).to(tl.int32))
    count = tl.load(counts_ptr + row).to(tl.int64)
    if COUNTS_COMMIT:
        count = num_eligible + num_sure - tl.maximum(count, 1)
    elif COMMITS_ONE:
        count = tl.minimum(count, num_eligible + num_sure - 1)
    if factor is not None or entropy_bound is not None:
        # The longest prefix that the rule commits, by halving: from the bracket's high on it holds, from low on not.
        bracket = smallest_keys.Bracket(
            tl.full((), -1, tl.int64),
            tl.full((), smallest_keys.END, tl.int64),
            tl.full((), -1, tl.int32),
            num_eligible,
        )
        while bracket.below_high - bracket.below_low > 1:
            probe = smallest_keys.probe(bracket, 0.5)
            below = tl.full((), 0, tl.int32)
            least_sure = tl.full((), smallest_keys.END, tl.int64)
            entropy = tl.full((), 0, tl.int64)
            for first in range(0, limit, BLOCK_N):
                if not ONE_BLOCK:
                    key = _selection_keys(sequence, first + lane, IS_CONFIDENCE)
                is_in = (key >= probe) & (key < smallest_keys.END)
                below += tl.sum((key < probe).to(tl.int32))
                least_sure = tl.minimum(least_sure, tl.min(tl.where(is_in, key, smallest_keys.END)))
                if entropy_bound is not None:
                    entropy += tl.sum(tl.where(is_in, _fixed_point(_remask_key(key)), 0))
            holds = _holds(num_eligible - below, _remask_key(least_sure), entropy, factor, entropy_bound)
            bracket = smallest_keys.Bracket(
                tl.where(holds, bracket.low, probe),
                tl.where(holds, probe, bracket.high),
                tl.where(holds, bracket.below_low, below),
                tl.where(holds, below, bracket.below_high),
            )
        count = tl.minimum(count, tl.minimum(bracket.below_high, num_eligible - 1))
    count = tl.minimum(tl.maximum(count, 0), num_eligible).to(tl.int32)

    bracket = smallest_keys.start(count, num_eligible, least, largest + 1)
    turn = tl.full((), 0, tl.int32)
    while not smallest_keys.is_found(bracket, count):
        # Keys may be far from uniform: halving bounds the rounds.
        share = tl.where(turn % 2 == 0, smallest_keys.interpolated(bracket, count), 0.5)
        probe = smallest_keys.probe(bracket, share)
        turn += 1
        below = tl.full((), 0, tl.int32)
        for first in range(0, limit, BLOCK_N):
            if not ONE_BLOCK:
                key = _selection_keys(sequence, first + lane, IS_CONFIDENCE)
            below += tl.sum((key < probe).to(tl.int32))
        bracket = smallest_keys.narrow(bracket, count, probe, below)

    slot = tl.full((), 0, tl.int64)
    list_end = None
    if ids_ptr is not None:
        if row_starts_ptr is None:
            room = num_places // tl.num_programs(0)
            slot = row * room
            list_end = slot + room
        else:
            slot = tl.maximum(tl.load(row_starts_ptr + row), 0)
            list_end = tl.minimum(tl.load(row_starts_ptr + row + 1), num_places)
    written = Written(
        row * N, is_masked_ptr, ids_ptr, mask_id, row_indices_ptr, list_end, block, _window(next_block_ptr, row)
    )
    for first in range(0, limit, BLOCK_N):
        if not ONE_BLOCK:
            key = _selection_keys(sequence, first + lane, IS_CONFIDENCE)
        slot = _write(written, first + lane, N, key < bracket.low, slot)
    if ids_ptr is not None:
        for free in range(slot, list_end, BLOCK_N):  # type: ignore[arg-type]
            tl.store(row_indices_ptr + free + lane, tl.full((BLOCK_N,), -1, tl.int64), mask=free + lane < list_end)


# Longest sequence, warps: its keys stay in registers.
_ONE_BLOCK = (
    (1024, 4),  # one warp for each scheduler of the SM
    (4096, 8),  # two for each: at most 16 keys a thread
)
_BLOCKS = (4096, 8)  # longer sequences, 16 keys a thread at a time
_NOISE_BLOCK = 1024


def _is_one_block(length: int) -> bool:
    """Whether the keys of a sequence stay in registers."""
    return length <= _ONE_BLOCK[-1][0]


def _configuration(length: int) -> tuple[int, int]:
    """BLOCK_N and num_warps for sequences of that length."""
    for longest, num_warps in _ONE_BLOCK:
        if length <= longest:
            return _launch.next_power_of_2(length), num_warps
    return _BLOCKS


def _empty_noise(draws: Draws, batch: int, length: int) -> Tensor:
    return torch.empty((batch, length), dtype=torch.float32, device=draws.seed.device)


@operator("gumbel_noise", _empty_noise)
def gumbel_noise(draws: Draws, batch: int, length: int) -> Tensor:
    """See the reference, ``fastmask.reference.remask``: Gumbel(0, 1) noise of each position [B, N], float32."""
    noise = _empty_noise(draws, batch, length)
    if noise.numel():
        _launch.launch(
            _noise_kernel,
            (_launch.cdiv(noise.numel(), _NOISE_BLOCK),),
            noise,
            seed_ptr=draws.seed,
            noise_ptr=noise,
            num_elements=noise.numel(),
            N=length,
            sample_offset=draws.sample_offset,
            step=draws.step,
            BLOCK=_NOISE_BLOCK,
        )
    return noise


def _empty_selection(remask_keys: Tensor, eligible: Tensor, *arguments: object) -> Tensor:
    return torch.empty_like(eligible, memory_format=torch.contiguous_format)


@operator("select_to_remask", _empty_selection)
def select_to_remask(remask_keys: Tensor, eligible: Tensor, counts: Tensor, min_remask_key: float | None) -> Tensor:
    """See the reference: the ``counts`` eligible positions of the highest keys in each row of [B, N], bool."""
    chosen = _empty_selection(remask_keys, eligible)
    remasking = Remasking(mask_id=0, is_confidence=False, min_remask_key=min_remask_key)
    _select(remask_keys, eligible, counts, remasking, is_masked=chosen)
    return chosen


@operator("remask_", mutates=("ids", "is_masked", "listed_row_indices"))
def remask_(
    ids: Tensor,
    is_masked: Tensor,
    listed: RowList,
    values: Tensor,
    counts: Tensor,
    eligible: Tensor | None,
    windows: Windows,
    draws: Draws,
    remasking: Remasking,
) -> None:
    """See the reference: keys, selection and all that it changes, in one launch."""
    _select(
        values,
        is_masked if eligible is None else eligible,
        counts,
        remasking,
        is_masked=is_masked,
        ids=ids,
        listed=listed,
        windows=windows,
        draws=draws,
    )


def _select(
    values: Tensor,
    eligible: Tensor,
    counts: Tensor,
    remasking: Remasking,
    *,
    is_masked: Tensor,
    ids: Tensor | None = None,
    listed: RowList | None = None,
    windows: Windows | None = None,
    draws: Draws | None = None,
) -> None:
    """Writes the selection to ``is_masked`` and, where they are given, what follows from it to ids and list."""
    batch, length = values.shape
    smallest_keys.check_length(length)
    if not values.numel():
        if listed is not None:
            listed.row_indices.fill_(-1)
        return
    block_n, num_warps = _configuration(length)
    noise = None
    if remasking.noise_scale and draws is not None and not _is_one_block(length):
        noise = gumbel_noise(draws, batch, length)  # once, not at each pass over a long sequence
    block, next_block = (None if window is None else window.contiguous() for window in windows or Windows())
    _launch.launch(
        _selection_kernel,
        (batch,),
        values,
        values_ptr=values.contiguous(),
        eligible_ptr=eligible.contiguous(),
        counts_ptr=counts.contiguous(),
        seed_ptr=None if draws is None else draws.seed,
        is_masked_ptr=is_masked,
        ids_ptr=ids,
        row_indices_ptr=None if listed is None else listed.row_indices,
        row_starts_ptr=None if listed is None or listed.row_starts is None else listed.row_starts.contiguous(),
        num_places=None if listed is None else listed.row_indices.shape[0],
        block_ptr=block,
        next_block_ptr=next_block,
        noise_ptr=noise,
        N=length,
        sample_offset=0 if draws is None else draws.sample_offset,
        step=0 if draws is None else draws.step,
        noise_scale=remasking.noise_scale or None,
        min_remask_key=remasking.min_remask_key,
        factor=remasking.factor,
        entropy_bound=remasking.fixed_point_bound,
        mask_id=remasking.mask_id,
        IS_CONFIDENCE=remasking.is_confidence,
        COUNTS_COMMIT=remasking.counts_commit,
        COMMITS_ONE=eligible is is_masked and remasking.min_remask_key is not None,
        ONE_BLOCK=_is_one_block(length),
        BLOCK_N=block_n,
        num_warps=num_warps,
    )
