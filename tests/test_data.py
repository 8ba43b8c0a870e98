"""Data sets: which ids an item holds, what is refused and in which words, and how all items are validated."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest
import torch
from data_sets import VOCABULARY, refuses, windows, without
from torch.utils.data import Subset

from fastmask.data import TokenSequences, TokenWindows, from_images, validate

# ---- windows


def test_windows_hold_the_ids_of_their_place_for_all_small_sizes():
    """Every total, seq_len and stride up to 12 x 5 x 7, against a plain count of what fits."""
    for total in range(1, 13):
        for seq_len in range(1, min(total, 5) + 1):
            for stride in range(1, 8):
                ids = np.arange(total)
                starts = [s for s in range(0, total, stride) if s + seq_len <= total]
                data = windows(ids, seq_len, stride=stride, tail="drop")
                items = [item.tolist() for item in data]
                assert items == [list(range(s, s + seq_len)) for s in starts]
                # The tail: ids that no window reads and no gap after a window skips.
                spoken_for = {i for s in starts for i in range(s, s + max(seq_len, stride))}
                tail = len(set(range(total)) - spoken_for)
                if tail:
                    with refuses(ValueError, f"received {total} ids, of which the last {tail} fill none"):
                        windows(ids, seq_len, stride=stride)
                else:
                    assert len(windows(ids, seq_len, stride=stride)) == len(starts)


@pytest.mark.parametrize("seq_len", [1, 3, 255, 507])
def test_windows_side_by_side_cover_every_id_once(seq_len):
    ids = torch.randint(0, 99, (seq_len * 7,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(list(windows(ids, seq_len))), ids)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "<i2", ">u2", "u4", "i4", ">i4", "u8", "i8", ">i8"])
def test_every_integer_dtype_of_numpy_gives_int64(dtype):
    item = windows(np.arange(98, 88, -1).astype(dtype), 5)[0]
    assert item.dtype == torch.int64
    assert item.tolist() == [98, 97, 96, 95, 94]


@pytest.mark.parametrize("name", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
def test_every_integer_dtype_of_torch_gives_int64(name):
    item = windows(torch.arange(10).to(getattr(torch, name)), 5)[1]
    assert item.dtype == torch.int64
    assert item.tolist() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize("ids", [np.arange(6), torch.arange(6)])
def test_an_item_is_the_callers_own(ids):
    data = windows(ids, 3)
    data[0].fill_(50)
    assert data[0].tolist() == [0, 1, 2]
    assert ids[0] == 0


def test_index_counts_from_either_end_and_stops_at_both():
    data = windows(torch.arange(6), 2)
    assert data[-1].tolist() == data[2].tolist() == data[np.int64(2)].tolist() == [4, 5]
    assert data[-3].tolist() == [0, 1]
    for index in (3, -4):
        with refuses(IndexError, "expected an index in [-3, 3)", f"received {index}", "len(dataset)"):
            data[index]
    for index in (1.0, slice(0, 2), True):
        with refuses(TypeError, "expected index to be an int", f"received {index!r}"):
            data[index]


@pytest.mark.parametrize("ids", [np.arange, lambda n: torch.arange(n), lambda n: list(range(n))])
def test_a_bad_id_is_refused_with_its_position_and_value(ids):
    data = windows(ids(102), 3)
    assert data[32].tolist() == [96, 97, 98]
    with refuses(ValueError, "[0, 100)", "mask_id = 99", "received 99 at position 99", "give the num_tokens"):
        data[33]
    data = windows(ids(102), 3, mask_id=0, stride=1)
    with refuses(ValueError, "mask_id = 0", "received 0 at position 0"):
        data[0]
    with refuses(ValueError, "received 100 at position 100"):
        data[98]
    with refuses(ValueError, "received 100 at position 100"):
        data[99]


@pytest.mark.parametrize(
    ("array", "value"),
    [(np.array([5, -1], "i2"), -1), (np.array([5, 2**63 + 5], "u8"), 2**63 + 5), (torch.tensor([5, -7]), -7)],
)
def test_negative_and_huge_ids_are_refused_as_they_are(array, value):
    with refuses(ValueError, f"received {value} at position 1;"):
        windows(array, 2)[0]


@pytest.mark.parametrize(
    ("ids", "received"),
    [
        (np.zeros(4), "float64"),
        (np.zeros(4, bool), "bool"),
        (torch.zeros(4), "torch.float32"),
        (torch.zeros(4, dtype=torch.bool), "torch.bool"),
        (torch.zeros(4, dtype=torch.complex64), "torch.complex64"),
        ([1.0, 2.0], "torch.float32"),
        (np.array(["a", "b"]), "<U1"),
    ],
)
def test_ids_that_are_not_integers_are_refused(ids, received):
    with refuses(TypeError, "expected ids of an integer dtype", f"received {received}", "convert to int64"):
        windows(ids, 2)


@pytest.mark.parametrize("ids", ["train.bin", None, [[1, 2], [3]], 5])
def test_ids_that_are_no_array_are_refused(ids):
    with refuses(TypeError, "expected ids as an array", f"received {type(ids).__name__}", "open_ids(path)"):
        windows(ids, 2)


def test_ids_of_another_shape_are_refused():
    with refuses(ValueError, "expected ids with 1 dimension", "received shape (2, 3)", "TokenSequences"):
        windows(np.zeros((2, 3), int), 2)


@pytest.mark.parametrize("ids", [[], [1, 2], np.zeros(0, int)])
@pytest.mark.parametrize("tail", ["error", "drop"])
def test_fewer_ids_than_one_window_are_refused_under_either_tail(ids, tail):
    with refuses(ValueError, "at least seq_len = 3 ids", f"received {len(ids)}", "shorten seq_len"):
        windows(ids, 3, tail=tail)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"seq_len": 0}, ValueError, ("expected seq_len >= 1", "received 0")),
        ({"seq_len": 2.0}, TypeError, ("expected seq_len to be an int", "received 2.0", "whole number")),
        ({"seq_len": True}, TypeError, ("expected seq_len to be an int", "received True")),
        ({"stride": 0}, ValueError, ("expected stride >= 1", "received 0")),
        ({"stride": "2"}, TypeError, ("expected stride to be an int", "received '2'")),
        ({"tail": "pad"}, ValueError, ('expected tail "error" or "drop"', "received 'pad'")),
        ({"num_tokens": 1}, ValueError, ("expected num_tokens >= 2", "received 1")),
        ({"num_tokens": None}, TypeError, ("expected num_tokens to be an int", "received None")),
        ({"mask_id": 100}, ValueError, ("mask_id in [0, num_tokens) = [0, 100)", "received 100", "counts")),
        ({"mask_id": -1}, ValueError, ("mask_id in [0, num_tokens)", "received -1")),
        ({"mask_id": None}, TypeError, ("expected mask_id to be an int", "received None")),
    ],
)
def test_bad_arguments_are_refused(options, error, words):
    with refuses(error, *words):
        windows(np.arange(8), **{"seq_len": 2, **options})


def test_a_tail_is_refused_with_its_size_and_the_remedy():
    with refuses(ValueError, "window of 4 at stride 4", "received 10 ids", "last 2 fill none", 'tail="drop"'):
        windows(np.arange(10), 4)


def test_integers_of_numpy_are_taken_and_what_only_looks_like_one_is_not():
    data = TokenWindows([1, 2], np.int64(2), num_tokens=np.uint16(9), mask_id=np.int8(8), stride=np.array(2))
    assert data[np.uint8(0)].tolist() == data[torch.tensor(0)].tolist() == [1, 2]
    assert from_images(torch.zeros(1, 1), levels=np.int32(3), value_range=(0, np.float32(1))).num_tokens == 4
    for bad in (np.array([2, 3]), np.bool_(True), torch.tensor(True), torch.tensor(2.0), np.float64(2)):
        with refuses(TypeError, "expected seq_len to be an int", "whole number"):
            windows([1, 2], bad)


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (np.ma.masked_array([1, 2], [0, 1]), ("without a mask", "filled")),
        (torch.tensor([1, 2]).to_sparse(), ("dense tensor", "to_dense")),
        (torch.zeros(2, dtype=torch.int64, device="meta"), ("dense tensor", "meta")),
    ],
)
def test_ids_that_hide_some_of_their_values_are_refused(ids, words):
    with refuses(TypeError, *words):
        windows(ids, 2)


# ---- sequences


@pytest.mark.parametrize("make", [np.array, torch.tensor, list, lambda rows: map(np.array, rows), tuple])
def test_sequences_are_given_back_row_by_row(make):
    rows = [[1, 2, 3], [4, 5, 6]]
    data = TokenSequences(make(rows), 3, **VOCABULARY)
    assert len(data) == 2
    assert [item.tolist() for item in data] == rows
    assert data[-1].dtype == torch.int64


def test_a_bad_id_is_refused_with_its_sequence_and_position():
    data = TokenSequences(np.array([[1, 2, 3], [4, 99, 200]]), 3, **VOCABULARY)
    assert data[0].tolist() == [1, 2, 3]
    for index in (1, -1):
        with refuses(ValueError, "received 99 at sequence 1, position 1"):
            data[index]


def test_sequences_of_another_length_are_refused():
    with refuses(ValueError, "every sequence to hold seq_len = 4 ids", "received 3", "pad or cut"):
        TokenSequences(np.zeros((5, 3), int), 4, **VOCABULARY)
    with refuses(ValueError, "every sequence to hold seq_len = 2 ids", "received 3"):
        TokenSequences(np.zeros((5, 3), int), 2, **VOCABULARY)
    with refuses(ValueError, "expected sequence 1 to hold seq_len = 3 ids", "received 2", "TokenWindows"):
        TokenSequences([[1, 2, 3], [1, 2]], 3, **VOCABULARY)
    with refuses(ValueError, "expected sequences with 2 dimension", "received shape (6,)"):
        TokenSequences(np.zeros(6, int), 3, **VOCABULARY)
    with refuses(TypeError, "expected sequence 0 of an integer dtype"):
        TokenSequences([[1.5, 2.0]], 2, **VOCABULARY)


@pytest.mark.parametrize("empty", [[], np.zeros((0, 3), int), torch.zeros(0, 3, dtype=torch.int32)])
def test_no_sequences_are_an_empty_set(empty):
    data = TokenSequences(empty, 3, **VOCABULARY)
    assert len(data) == 0
    assert list(data) == []
    validate(data)
    with refuses(IndexError, "received 0"):
        data[0]


def test_a_vocabulary_past_int64_and_ids_that_would_be_negative_there_are_refused():
    with refuses(ValueError, "expected num_tokens < 2**63", f"received {2**64}", "smaller"):
        TokenWindows([1, 2], 2, num_tokens=2**64, mask_id=0)
    with refuses(ValueError, "ids below 2**63", f"received {2**64 - 1} at sequence 0, position 1"):
        TokenSequences([np.array([1, 2**64 - 1], "u8")], 2, **VOCABULARY)


# ---- validate


def test_validate_reads_every_item():
    for bad in range(12):
        ids = np.zeros(12, int)
        ids[bad] = -3
        with refuses(ValueError, f"received -3 at position {bad};"):
            validate(windows(ids, 3), progress=False)
    validate(windows(np.zeros(12, int), 3), progress=False)


def test_validate_reports_about_a_hundred_times_and_at_the_end():
    seen = []
    validate(windows(np.zeros(1234, int), 1), progress=lambda done, total: seen.append((done, total)))
    assert 100 <= len(seen) <= 110
    assert seen == sorted(seen)
    assert seen[-1] == (1234, 1234)
    assert {total for _, total in seen} == {1234}
    seen.clear()
    validate(windows([1, 2, 3], 1), progress=lambda done, total: seen.append(done))
    assert seen == [1, 2, 3]


def test_validate_shows_a_bar_where_it_can(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    data = windows(np.zeros(12, int), 3)
    validate(data)
    shown = capsys.readouterr()
    assert "validate" in shown.err
    assert "4/4" in shown.err
    assert shown.out == ""
    validate(data, progress=False)
    validate(data, progress=lambda done, total: None)
    assert capsys.readouterr() == ("", "")
    without(monkeypatch, "tqdm.auto")
    validate(data)
    assert capsys.readouterr() == ("", "")


def test_validate_refuses_a_set_that_checks_nothing():
    data = windows(np.zeros(12, int), 3)
    for other in (Subset(data, [0]), [torch.zeros(3)]):
        with refuses(TypeError, "TokenWindows or Token", f"received {type(other).__name__}", "split"):
            validate(other)


@pytest.mark.parametrize("progress", ["no", 2, [], 0.5])
def test_progress_is_a_flag_or_a_callable(progress):
    with refuses(TypeError, "expected progress to be True, False, None or a callable", f"received {progress!r}"):
        validate(windows([1, 2], 2), progress=progress)


def test_a_bar_off_a_terminal_prints_its_begin_and_its_end(capsys, monkeypatch):
    """Not hundreds of lines: pytest's standard error is no terminal. On one, it keeps tqdm's own pace."""
    pytest.importorskip("tqdm")
    slow = TokenSequences([[1]] * 40, 1, **VOCABULARY)
    real = TokenSequences.__getitem__
    monkeypatch.setattr(TokenSequences, "__getitem__", lambda self, i: (time.sleep(0.02), real(self, i))[1])
    validate(slow)
    assert 1 <= capsys.readouterr().err.count("\r") <= 3
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    validate(slow)
    assert capsys.readouterr().err.count("\r") > 3
