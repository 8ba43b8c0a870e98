"""What the compiled kernels ask of global memory, in bytes of whole sectors: what the floors of benchmarks/ assume.

Counted where they run from their PTX, ``pytest --ptx first``. A cache may serve some of it: each figure says which.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from oracles import draw

from fastmask import _streams as streams
from fastmask import functional as F

OPERATION = "demask"
pytestmark = pytest.mark.ptx
ROWS, MASKED = 8, 6


@pytest.fixture
def moved(kernel):
    """Bytes read and written by each kernel, of what a function launches."""
    if kernel.name != "ptx":
        pytest.skip("memory traffic is counted where kernels run from their PTX: pytest --ptx first")
    import ptx

    def moved(function, *arguments, **options):
        read: Counter[str] = Counter()
        written: Counter[str] = Counter()
        with ptx.traffic() as launches:
            function(*arguments, backend="triton", **options)
        for launch in launches:
            read[launch.kernel] += launch.read
            written[launch.kernel] += launch.written
        return read, written

    return moved


# Rows that begin at 16 bytes, as behind a head, and such as begin anywhere: each of their tiles has edges.
@pytest.mark.parametrize(
    ("vocabulary", "dtype", "most"),
    [(8192, torch.bfloat16, 1.02), (50264, torch.bfloat16, 1.05), (50257, torch.bfloat16, 1.10),
     (50257, torch.float32, 1.06)],
    ids=str,
)  # fmt: skip
def test_sampling_reads_each_row_once_and_one_tile_again(moved, vocabulary, dtype, most):
    logits = draw(2, MASKED // 2, vocabulary, dtype=dtype)
    row, tile = vocabulary * dtype.itemsize, streams.TILE * dtype.itemsize
    read, written = moved(F.sample_tokens, logits, temperature=0.7, mask_id=7, seed=0)
    assert read["_tiles_kernel"] <= most * MASKED * row
    assert read["_choose_kernel"] <= MASKED * (1.5 * tile + 1024)
    assert sum(written.values()) <= MASKED * (0.01 * row + 1024)


@pytest.mark.parametrize(
    ("vocabulary", "options", "most_read", "most_written"),
    [
        (1000, {"filter_thres": 0.9}, 1.15, 0.05),
        (8192, {"filter_thres": 0.9}, 1.05, 0.01),
        (8192, {"top_p": 0.9}, 1.10, 0.01),
        # A pass, a sample of a sixth, and what lies in the bracket, which stays in L2.
        (50257, {"filter_thres": 0.9}, 2.1, 0.7),
        (50257, {"top_p": 0.9}, 4.5, 0.9),  # two passes more, for the total
    ],
    ids=str,
)
def test_a_filter_reads_a_short_row_once_and_a_long_one_a_few_times(
    moved, vocabulary, options, most_read, most_written
):
    logits = draw(2, MASKED // 2, vocabulary, dtype=torch.bfloat16)
    read, written = moved(F.sample_tokens, logits, temperature=0.7, mask_id=7, seed=0, **options)
    name = "_short_thresholds_kernel" if vocabulary <= 8192 else "_thresholds_kernel"
    assert read[name] <= most_read * logits.nbytes
    assert written[name] <= most_written * logits.nbytes


@pytest.mark.parametrize("vocabulary", [8192, 50257])
@pytest.mark.parametrize("inplace_grad", [False, True])
def test_the_loss_reads_masked_rows_twice_and_writes_rows_once(moved, kernel, monkeypatch, vocabulary, inplace_grad):
    """The second time from L2, see ``kernels/masked_cross_entropy.py``; what is not masked is not read at all."""
    monkeypatch.setattr(kernel.module("masked_cross_entropy"), "_FEW_ROWS", 0)  # as with many
    logits = draw(ROWS, vocabulary, dtype=torch.bfloat16).requires_grad_()
    targets, is_masked = torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS) < MASKED

    def loss(**options):
        z = logits * 1 if inplace_grad else logits
        return F.masked_cross_entropy(z, targets, is_masked, reduction="sum", inplace_grad=inplace_grad, **options)

    read, written = moved(loss)
    row = 2 * vocabulary
    assert 1.9 * MASKED * row <= read["_rows_kernel"] <= 2.2 * MASKED * row
    assert ROWS * row <= written["_rows_kernel"] <= 1.1 * ROWS * row
    is_masked[:] = False
    read, written = moved(loss)
    assert read["_rows_kernel"] <= 256 * ROWS
    assert ROWS * row <= written["_rows_kernel"] <= 1.1 * ROWS * row


def test_a_loss_without_gradient_reads_masked_rows_once(moved, kernel, monkeypatch):
    monkeypatch.setattr(kernel.module("masked_cross_entropy"), "_FEW_ROWS", 0)
    logits = draw(ROWS, 8192, dtype=torch.bfloat16)
    targets, is_masked = torch.zeros(ROWS, dtype=torch.int64), torch.arange(ROWS) < MASKED
    read, written = moved(F.masked_cross_entropy, logits, targets, is_masked)
    assert read["_rows_kernel"] <= 1.1 * MASKED * 2 * 8192
    assert written["_rows_kernel"] <= 1024 * ROWS


def test_masking_reads_and_writes_each_position_once(moved):
    """8 bytes of its id, by halves of what a thread holds, the second from L1; written 8 of an id, 1 of a mask and 8
    of each masked one in the list of rows."""
    tokens = torch.zeros(4, 1024, dtype=torch.int64)
    read, written = moved(F.mask_sampling, tokens, mask_id=9, num_tokens=10, seed=0)
    assert sum(read.values()) <= 17 * tokens.numel()
    assert sum(written.values()) <= 20 * tokens.numel()
