"""What the compiled kernels take: bytes of global memory, in whole sectors, which the floors of benchmarks/ assume,
and instructions, as often as they are run.

Counted where kernels run from their PTX, ``pytest --ptx both``. A cache may serve some of the bytes: each figure
says which.
"""

from __future__ import annotations

import pytest
import torch
from losses import plan_with
from oracles import draw

from fastmask import _streams as streams
from fastmask import functional as F

OPERATION = "sample_tokens"
pytestmark = pytest.mark.ptx
ROWS, MASKED = 8, 6


@pytest.fixture
def costs(kernel):
    """What each kernel takes, by its name, of what a function launches."""
    if kernel.name != "ptx":
        pytest.skip("costs are counted where kernels run from their PTX: pytest --ptx both")
    import ptx

    def costs(function, *arguments, **options):
        with ptx.costs() as launches:
            function(*arguments, backend="triton", **options)
        assert len({launch.kernel for launch in launches}) == len(launches)
        return {launch.kernel: launch for launch in launches}

    return costs


@pytest.fixture
def many_rows(kernel, monkeypatch):
    """The loss and the filter as with many rows: a program of few warps for each."""
    plan_with(kernel, monkeypatch, _FEW_ROWS=0)
    monkeypatch.setattr(kernel.module("vocabulary_filter"), "_FEW_ROWS", 0)


# Rows that begin at 16 bytes, as behind a head, and such as begin anywhere: each of their tiles has edges, and the
# winning one is read again. Instructions of a thread a logit, of the tiles and of the choice; at 80 % of 4.3 TB/s a
# bf16 logit leaves 17 on an H200. Two exponentials alone take as long as 16: 16 are begun a cycle, of 128.
@pytest.mark.parametrize(
    ("vocabulary", "dtype", "most_read", "most_read_again", "most_of_tiles", "most_of_choice"),
    [(1024, torch.bfloat16, 1.05, 0, 17.5, 20.5), (8192, torch.bfloat16, 1.02, 0, 12.6, 3.8),
     (50264, torch.bfloat16, 1.05, 0.1, 12.8, 0.7), (50257, torch.bfloat16, 1.10, 1.5, 11.5, 3.5),
     (50257, torch.float32, 1.06, 1.5, 11.8, 3.3), (126464, torch.bfloat16, 1.02, 1.5, 10.6, 0.7)],
    ids=str,
)  # fmt: skip
def test_sampling_reads_each_row_once(
    costs, vocabulary, dtype, most_read, most_read_again, most_of_tiles, most_of_choice
):
    tiles_written = 0.01 if most_read_again >= 1 else 0.05  # with the sums of sub-tiles
    logits = draw(2, MASKED // 2, vocabulary, dtype=dtype)
    row, tile = vocabulary * dtype.itemsize, streams.TILE * dtype.itemsize
    tiles, choice = costs(F.sample_tokens, logits, temperature=0.7, mask_id=7, seed=0).values()
    assert tiles.read <= most_read * MASKED * row
    assert choice.read <= MASKED * (most_read_again * tile + 1024)
    assert tiles.written + choice.written <= MASKED * (tiles_written * row + 768)
    assert tiles.statements * 32 <= most_of_tiles * logits.numel()
    assert choice.statements * 32 <= most_of_choice * logits.numel()


# Instructions of a warp a row; 256 lanes are a program. Of 33 ids tiles and choice took 1218, of 64 they took 811.
@pytest.mark.parametrize(("vocabulary", "most_instructions"), [(17, 310), (33, 460), (64, 460)])
def test_short_rows_are_sampled_in_one_launch(costs, vocabulary, most_instructions):
    logits = draw(2, 8, vocabulary, dtype=torch.bfloat16)
    (cost,) = costs(F.sample_tokens, logits, temperature=0.7, mask_id=7, seed=0).values()
    assert cost.read <= logits.nbytes + 128 * 16  # by sectors of 32, a row's twice
    assert cost.written <= 32 * 16
    assert cost.statements <= most_instructions * 16


# Bytes read and written, in rows, and instructions of a thread a logit; sample and candidates stay in L2, where each
# candidate is a sector. At 25 % of 4.3 TB/s a bf16 logit leaves 55 instructions on an H200 (29.6e12 a second), of
# which tiles and choice take 16.
@pytest.mark.parametrize(
    ("vocabulary", "options", "most_read", "most_written", "most_instructions"),
    [
        (1000, {"top_k": 100}, 1.15, 0.02, 80),
        (8192, {"top_k": 820}, 2.0, 1.0, 35),
        (8192, {"top_k": 2}, 1.5, 0.2, 32),  # nothing of the sample lies above its bracket
        (8192, {"top_k": 4096}, 2.2, 1.0, 47),
        (8192, {"top_p": 0.9}, 2.8, 0.8, 46),  # twice, first for the total
        (50257, {"top_k": 5026}, 1.7, 0.5, 31),
        (50257, {"top_k": 25129}, 2.0, 0.6, 42),
        (50257, {"top_p": 0.9}, 2.5, 0.3, 41),
    ],
    ids=str,
)
def test_a_filter_reads_a_short_row_once_and_a_long_one_a_few_times(
    costs, many_rows, vocabulary, options, most_read, most_written, most_instructions
):
    logits = draw(2, MASKED // 2, vocabulary, dtype=torch.bfloat16)
    *filters, _, _ = costs(F.sample_tokens, logits, temperature=0.7, mask_id=7, seed=0, **options).values()
    assert sum(cost.read for cost in filters) <= most_read * logits.nbytes
    assert sum(cost.written for cost in filters) <= most_written * logits.nbytes
    assert sum(cost.statements for cost in filters) * 32 <= most_instructions * logits.numel()


@pytest.mark.parametrize(
    ("kind", "most_read", "most_instructions"),
    [("heavy tail", 3.4, 49), ("few have most", 3.6, 54), ("few have all", 3.2, 53)],
)
def test_peaked_rows_cost_a_nucleus_little_more(costs, many_rows, kind, most_read, most_instructions):
    """As a trained network's, of which a sample misses most of the weight, or has too much."""
    rank = torch.stack([torch.randperm(50257, generator=torch.Generator().manual_seed(i)) for i in range(MASKED)]) + 1
    normal = draw(MASKED, 50257)
    logits = {
        "heavy tail": -1.1 * rank.log() + 0.3 * normal,
        "few have most": normal + 8.0 * (rank <= 100),
        "few have all": normal + 40.0 * (rank <= 30),
    }[kind].bfloat16()
    filter, _, _ = costs(F.sample_tokens, logits.view(2, MASKED // 2, -1), top_p=0.9, mask_id=7, seed=0).values()
    assert filter.read <= most_read * logits.nbytes
    assert filter.statements * 32 <= most_instructions * logits.numel()


@pytest.mark.parametrize(
    ("mean", "deviation", "dtype"),
    [(-90.0, 3.0, torch.bfloat16), (100.0, 1.0, torch.float32)],  # like GPT-2's; of ten values
    ids=str,
)
def test_ties_do_not_multiply_the_passes(costs, many_rows, mean, deviation, dtype):
    """Logits that bfloat16 has rounded far from 0: of one value more than there are places for."""
    logits = (mean + deviation * draw(2, 3, 50257)).bfloat16().to(dtype)
    for top_k in (25129, 5026):
        filter, _, _ = costs(F.sample_tokens, logits, top_k=top_k, mask_id=7, seed=0).values()
        assert filter.read <= 7 * logits.nbytes


# Instructions of a thread a masked logit; at the speed of memory a bf16 row leaves 28 on an H200. A row costs each
# warp about 400 besides, and its last tile is not full.
@pytest.mark.parametrize(
    ("vocabulary", "rows", "masked", "most_instructions"),
    [(1024, 8, 6, 36), (4096, 8, 6, 36), (8192, 8, 6, 26.5), (50257, 4, 3, 22), (126464, 2, 1, 18.5)],
)
@pytest.mark.parametrize("inplace_grad", [False, True])
def test_the_loss_reads_masked_rows_twice_and_writes_each_row_once(
    costs, many_rows, vocabulary, rows, masked, most_instructions, inplace_grad
):
    """The second time from L2, see ``kernels/masked_cross_entropy.py``; what is not masked is not read at all."""
    logits = draw(rows, vocabulary, dtype=torch.bfloat16).requires_grad_()
    targets, is_masked = torch.zeros(rows, dtype=torch.int64), torch.arange(rows) < masked

    def loss(**options):
        z = logits * 1 if inplace_grad else logits
        return F.masked_cross_entropy(z, targets, is_masked, reduction="sum", inplace_grad=inplace_grad, **options)

    row = 2 * vocabulary
    (cost,) = costs(loss).values()
    assert 1.9 * masked * row <= cost.read <= masked * (2.2 * row + 256)
    assert rows * row <= cost.written <= rows * (1.1 * row + 128)
    is_masked[:] = False
    (zeroed,) = costs(loss).values()
    assert zeroed.read <= 512 * rows  # by each of its warps
    assert rows * row <= zeroed.written <= rows * (1.1 * row + 128)
    of_masked = cost.statements - zeroed.statements * (rows - masked) / rows
    assert of_masked * 32 <= most_instructions * masked * vocabulary


# Instructions of a warp a row, where a tile of 1024 columns and a row a program take 1050.
@pytest.mark.parametrize(
    ("vocabulary", "most_instructions"), [(27, 180), (33, 205), (64, 205), (256, 360), (257, 520), (512, 750)]
)
def test_a_short_row_costs_few_instructions(costs, many_rows, vocabulary, most_instructions):
    """Up to 256 columns it is read once; what its sectors have of other rows' comes with it."""
    rows, row = 64, 2 * vocabulary
    logits = draw(rows, vocabulary, dtype=torch.bfloat16).requires_grad_()
    targets, is_masked = torch.zeros(rows, dtype=torch.int64), torch.ones(rows, dtype=torch.bool)
    (cost,) = costs(F.masked_cross_entropy, logits, targets, is_masked, reduction="sum").values()
    assert cost.statements <= most_instructions * rows
    assert cost.read <= rows * ((1 if vocabulary <= 256 else 2) * (row + 64) + 128)
    assert cost.written <= rows * (row + 256)
    is_masked[:] = False
    (cost,) = costs(F.masked_cross_entropy, logits, targets, is_masked, reduction="sum").values()
    assert cost.read <= 128 * rows


@pytest.mark.parametrize("vocabulary", [33, 256])
def test_short_rows_that_are_not_masked_are_not_read(costs, vocabulary):
    """Not even the target's column: a sector of the mask is what a program reads."""
    logits, targets = draw(ROWS, vocabulary, dtype=torch.bfloat16), torch.zeros(ROWS, dtype=torch.int64)
    (cost,) = costs(F.masked_cross_entropy, logits, targets, torch.zeros(ROWS, dtype=torch.bool)).values()
    assert cost.read <= 32 * ROWS


def test_a_loss_without_gradient_reads_masked_rows_once(costs, many_rows):
    logits = draw(ROWS, 8192, dtype=torch.bfloat16)
    targets, is_masked = torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS) < MASKED
    (cost,) = costs(F.masked_cross_entropy, logits, targets, is_masked).values()
    assert cost.read <= 1.1 * MASKED * 2 * 8192
    assert cost.written <= 1024 * ROWS


def test_masking_reads_and_writes_each_position_once(costs):
    """8 bytes of its id, by halves of what a thread holds, the second from L1; written 8 of an id, 1 of a mask and 8
    of each masked one in the list of rows."""
    tokens = torch.zeros(4, 1024, dtype=torch.int64)
    (cost,) = costs(F.mask_sampling, tokens, mask_id=9, num_tokens=10, seed=0).values()
    assert cost.read <= 17 * tokens.numel()
    assert cost.written <= 20 * tokens.numel()


def test_a_search_among_many_exponents_is_short(costs):
    """Where each logit is a little larger than the one before, by a factor, only half of all numbers on bounds the
    turns."""
    logits = (2.0 ** torch.linspace(-120, 120, 2048)).view(1, 1, -1)
    search, *_ = costs(F.sample_tokens, logits, top_k=1024, seed=0).values()
    assert search.statements * 32 <= 250 * logits.numel()
