"""Data sets: which ids an item holds, what is refused and in which words, files, pickles, memory."""

from __future__ import annotations

import builtins
import functools
import pickle
import re
import subprocess
import sys
import textwrap
import time
import types
from collections import UserDict

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Subset

from fastmask.data import (
    TokenSequences,
    TokenWindows,
    dequantise,
    from_images,
    from_text,
    open_ids,
    validate,
)

VOCABULARY = {"num_tokens": 100, "mask_id": 99}


def windows(ids, seq_len, **options):
    return TokenWindows(ids, seq_len, **{**VOCABULARY, **options})


def refuses(error, *words):
    """Expects `error` with these words in this order."""
    return pytest.raises(error, match="(?s)" + ".*".join(map(re.escape, words)))


def without(monkeypatch, package):
    """From here on in the test, `import package` fails as if it were not installed."""
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        if name == package:
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)


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


# ---- files


def test_open_ids_maps_npy_and_bare_files(tmp_path):
    ids = np.arange(12, dtype="u2")
    np.save(tmp_path / "ids.npy", ids.reshape(3, 4))
    ids.tofile(tmp_path / "ids.bin")
    rows, run = open_ids(tmp_path / "ids.npy"), open_ids(str(tmp_path / "ids.bin"), "uint16")
    assert isinstance(rows, np.memmap)
    assert isinstance(run, np.memmap)
    assert not run.flags.writeable
    assert not rows.flags.writeable
    assert torch.equal(torch.stack(list(TokenSequences(rows, 4, **VOCABULARY))), torch.arange(12).view(3, 4))
    assert torch.equal(torch.stack(list(windows(run, 4))), torch.arange(12).view(3, 4))


def test_open_ids_refuses_what_it_cannot_read(tmp_path, monkeypatch):
    np.save(tmp_path / "ids.npy", np.arange(3))
    path = tmp_path / "ids.bin"
    path.write_bytes(b"12345")
    with refuses(ValueError, "expected no dtype", "ids.npy", "received uint16", "holds its own"):
        open_ids(tmp_path / "ids.npy", "uint16")
    with refuses(ValueError, "expected the dtype", "ids.bin", "received None", '"uint16"'):
        open_ids(path)
    with refuses(ValueError, "ids.bin to hold ids of 2 bytes", "received 5 bytes", "give the dtype"):
        open_ids(path, "uint16")
    path.write_bytes(b"")
    with refuses(ValueError, "one at least", "received 0 bytes"):
        open_ids(path, "uint16")
    with pytest.raises(FileNotFoundError):
        open_ids(tmp_path / "none.npy")
    without(monkeypatch, "numpy")
    with refuses(ImportError, "expected numpy", "received none", "pip install numpy"):
        open_ids(path, "uint16")


MAPPED_VIEWS = {
    "whole": lambda ids: ids,
    "slice": lambda ids: ids[4096 + 7 :],
    "slice of a slice": lambda ids: ids[100:][50:650],
    "every third": lambda ids: ids[5::3],
    "backwards": lambda ids: ids[::-1],
    "plain array": lambda ids: np.asarray(ids)[9:309],
    "byte order": lambda ids: ids[3:303].view(">u2"),
    "offset": lambda ids: np.memmap(ids.filename, "uint16", mode="r", offset=5000)[11:611],
    "writable": lambda ids: np.memmap(ids.filename, "uint16", mode="r+")[1:301],
}


@pytest.mark.parametrize("view", list(MAPPED_VIEWS))
def test_a_pickle_of_a_mapped_set_holds_the_place_and_not_the_ids(tmp_path, view):
    path = tmp_path / "ids.bin"
    np.random.default_rng(0).integers(0, 90, 20_000).astype("u2").tofile(path)
    ids = MAPPED_VIEWS[view](open_ids(path, "uint16"))
    data = TokenWindows(ids, 10, num_tokens=2**16, mask_id=2**16 - 1, tail="drop")
    once = pickle.dumps(data)
    twice = pickle.dumps(pickle.loads(once))
    assert len(once) < 1000
    assert len(twice) < 1000
    assert torch.equal(torch.stack(list(pickle.loads(twice))), torch.stack(list(data)))
    assert data[0].tolist() == ids[:10].tolist()  # the original is as it was


def test_a_pickle_of_what_is_not_only_in_a_file_holds_the_ids(tmp_path):
    path = tmp_path / "ids.bin"
    np.arange(50, dtype="u2").tofile(path)
    private = np.memmap(path, "uint16", mode="c")
    private[0] = 77
    mapped = open_ids(path, "uint16")
    arrays = [private, mapped[[3, 1, 2, 0]], mapped + 1, mapped.astype("i8"), np.arange(50), torch.arange(50)]
    for ids in arrays:
        data = windows(ids, 2)
        path.rename(tmp_path / "away")
        copy = pickle.loads(pickle.dumps(data))
        (tmp_path / "away").rename(path)
        assert torch.equal(torch.stack(list(copy)), torch.stack(list(data)))


def test_workers_of_a_data_loader_read_a_mapped_set(tmp_path):
    ids = np.random.default_rng(0).integers(0, 99, 1000).astype("u2")
    ids.tofile(tmp_path / "ids.bin")
    data = windows(open_ids(tmp_path / "ids.bin", "uint16"), 10)
    batches = list(DataLoader(data, batch_size=32, num_workers=2))
    assert [tuple(batch.shape) for batch in batches] == [(32, 10)] * 3 + [(4, 10)]
    assert batches[0].dtype == torch.int64
    assert torch.cat(batches).flatten().tolist() == ids.tolist()


def test_a_worker_says_which_id_is_bad():
    batches = iter(DataLoader(windows([*range(98), 99], 3), batch_size=33, num_workers=1))
    with refuses(ValueError, "received 99 at position 98"):
        next(batches)
    assert list(batches) == []  # ends the worker here and now: left to the collector, that waits 5 s


BIG = """
    import sys, time
    import numpy as np, torch
    from fastmask.data import TokenWindows, open_ids

    def memory():  # own (anonymous) and resident, in bytes
        with open("/proc/self/status") as file:
            status = dict(line.split(":", 1) for line in file)
        return [int(status[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS")]

    def spread(data, count=64):
        return torch.stack([data[i] for i in range(0, len(data), len(data) // count)])

    spread(TokenWindows(np.zeros(64 * 1000, "u2"), 1000, num_tokens=10, mask_id=9))  # torch's first use
    before, start = memory(), time.perf_counter()
    data = TokenWindows(open_ids(sys.argv[1], "uint16"), 1000, num_tokens=10, mask_id=9)
    opened = time.perf_counter() - start
    batch = spread(data)
    after = memory()
    print(len(data), opened, after[0] - before[0], after[1] - before[1])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and needs sparse files")
def test_a_billion_tokens_open_at_once_in_the_memory_of_a_batch(tmp_path):
    path = tmp_path / "ids.bin"
    np.memmap(path, "uint16", mode="w+", shape=(10**9,))  # sparse: takes no disk
    script = [sys.executable, "-c", textwrap.dedent(BIG), str(path)]
    result = subprocess.run(script, capture_output=True, text=True, check=True)
    size, seconds, own, resident = map(float, result.stdout.split())
    assert size == 10**6
    assert seconds < 0.5  # seen: under a millisecond; reading 2 GB takes longer
    batch = 64 * 1000 * 8
    assert own < batch + 2**20  # 64 items, and a little for the interpreter
    # Pages of the file that the items touched are the kernel's, which takes them back at need:
    # it maps 64 KiB around each.
    assert resident < batch + 2**20 + 64 * 2 * 2**16


# ---- text


class FakeTokenizer:
    """As transformers: called, gives a UserDict of lists, with special tokens unless told otherwise."""

    def __init__(self):
        self.calls = 0

    def __call__(self, text, add_special_tokens=True):
        self.calls += 1
        ids = [ord(letter) % 90 for letter in text]
        if add_special_tokens:
            ids = [90, *ids, 91]
        return UserDict(input_ids=ids, attention_mask=[1] * len(ids))


class FakeRustTokenizer:
    """As tokenizers: not callable, encode gives an object with ids."""

    def encode(self, text):
        return types.SimpleNamespace(ids=[ord(letter) % 90 for letter in text])


def test_text_keeps_every_character_of_every_file_in_order(tmp_path):
    texts = ["one\r\ntwo\n\n", "", "déjà vu"]
    paths = [tmp_path / f"{i}.txt" for i in range(3)]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text.encode())
    for source in (paths, iter(paths), [str(path) for path in paths]):
        data = from_text(source, str.encode, 1, num_tokens=257, mask_id=256)
        assert bytes(torch.cat(list(data)).tolist()).decode() == "".join(texts)


def test_a_hugging_face_tokenizer_works_as_it_is(tmp_path):
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    paths[0].write_text("!!\n!", encoding="utf-8")
    paths[1].write_text("#", encoding="utf-8")
    tokenizer = FakeTokenizer()
    data = from_text(paths, tokenizer, 9, **VOCABULARY)
    assert tokenizer.calls == 2  # special tokens around each file, once
    assert data[0].tolist() == [90, 33, 33, 10, 33, 91, 90, 35, 91]
    bare = from_text(paths, functools.partial(tokenizer, add_special_tokens=False), 5, **VOCABULARY)
    assert bare[0].tolist() == [33, 33, 10, 33, 35]


@pytest.mark.parametrize(
    "tokenizer",
    [
        lambda text: [ord(letter) for letter in text],
        lambda text: np.array([ord(letter) for letter in text], "u2"),
        lambda text: torch.tensor([ord(letter) for letter in text], dtype=torch.int16),
        str.encode,
        FakeRustTokenizer(),
        types.SimpleNamespace(encode=lambda text: [ord(letter) for letter in text]),
    ],
)
def test_any_tokenizer_works(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("()*+,-", encoding="utf-8")
    data = from_text(tmp_path / "a.txt", tokenizer, 4, stride=2, **VOCABULARY)
    assert [item.tolist() for item in data] == [[40, 41, 42, 43], [42, 43, 44, 45]]


def test_text_refuses_bad_ids_at_once_with_the_file(tmp_path):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("AAAA", encoding="utf-8")
    bad.write_text("AAcA", encoding="utf-8")  # ord("c") is 99, the mask
    with refuses(ValueError, "received 99 at", "bad.txt, position 2"):
        from_text([good, bad], str.encode, 2, **VOCABULARY)
    bad.write_text("AAd", encoding="utf-8")
    with refuses(ValueError, "received 100 at", "bad.txt, position 2"):
        from_text([good, bad], str.encode, 2, **VOCABULARY)


def test_text_refuses_what_it_cannot_use(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"AA\xffA")
    with refuses(ValueError, "expected UTF-8", "a.txt", "byte 0xff in position 2", "convert"):
        from_text(path, str.encode, 2, **VOCABULARY)
    path.write_text("AAAAA", encoding="utf-8")
    with refuses(TypeError, "can be called or has encode", "received int", "give a function"):
        from_text(path, 5, 2, **VOCABULARY)
    with refuses(TypeError, "expected ids of", "a.txt", "received str"):
        from_text(path, str.lower, 2, **VOCABULARY)
    with refuses(TypeError, "expected ids of", "received NoneType"):
        from_text(path, lambda text: {"tokens": [1]}, 2, **VOCABULARY)
    with refuses(ValueError, "expected ids of", "1 dimension", "received shape (1, 5)"):
        from_text(path, lambda text: torch.ones(1, 5, dtype=torch.int64), 5, **VOCABULARY)
    with refuses(ValueError, "received 5 ids, of which the last 1 fill none"):
        from_text(path, str.encode, 2, **VOCABULARY)
    assert len(from_text(path, str.encode, 2, tail="drop", **VOCABULARY)) == 2
    with refuses(ValueError, "at least seq_len = 2 ids", "received 0"):
        from_text([], str.encode, 2, **VOCABULARY)
    with refuses(ValueError, "mask_id in [0, num_tokens)"):
        from_text(path, str.encode, 2, num_tokens=100, mask_id=100)
    with pytest.raises(FileNotFoundError):
        from_text(tmp_path / "none.txt", str.encode, 2, **VOCABULARY)


# ---- images


def test_digits_come_back_exactly():
    datasets = pytest.importorskip("sklearn.datasets")
    images = datasets.load_digits().images  # [1797, 8, 8], values 0 to 16
    data = from_images(images, levels=17, value_range=(0, 16))
    assert (len(data), data.seq_len, data.num_tokens, data.mask_id) == (1797, 64, 18, 17)
    validate(data, progress=False)
    ids = torch.stack(list(data))
    assert torch.equal(ids, torch.from_numpy(images).long().reshape(1797, 64))
    drawn = dequantise(ids, levels=17, value_range=(0, 16)).reshape(-1, 8, 8)
    assert drawn.dtype == torch.float32
    assert np.array_equal(drawn.numpy(), images)


@pytest.mark.parametrize("levels", [2, 3, 17, 256, 257, 1000])
@pytest.mark.parametrize("value_range", [(0, 1), (-1, 1), (0, 0.1), (100, 1e6)])
def test_levels_are_even_reach_both_ends_and_invert(levels, value_range):
    scale = {"levels": levels, "value_range": value_range}
    low, high = value_range
    ids = torch.arange(levels)
    values = dequantise(ids, **scale)
    expected = np.linspace(low, high, levels)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6, atol=1e-7 * (high - low))
    assert torch.equal(from_images(values[None], **scale)[0], ids)
    assert dequantise(ids.to(torch.int32), **scale).equal(values)
    noise = torch.rand(1, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = noise * (high - low) + low
    drawn = dequantise(from_images(noise, **scale)[0], **scale).double()
    half = (high - low) / (levels - 1) / 2
    assert (drawn - noise[0]).abs().max() <= half * (1 + 1e-6) + 1e-6 * abs(high)


@pytest.mark.parametrize(
    "images",
    [
        np.array([[[0, 255], [128, 3]]], "u1"),
        torch.tensor([[[0, 255], [128, 3]]], dtype=torch.uint8),
        torch.tensor([[[0, 255], [128, 3]]], dtype=torch.uint16),
        torch.tensor([[[0, 255], [128, 3]]], dtype=torch.bfloat16),
        [[[0, 255], [128, 3]]],
        [np.array([[0.0, 255.0], [128.0, 3.0]])],
    ],
)
def test_bytes_are_kept_in_c_order_from_any_dtype(images):
    data = from_images(images, levels=256, value_range=(0, 255))
    assert data[0].tolist() == [0, 255, 128, 3]
    assert data.ids.dtype == torch.uint8  # a byte a value: image sets are large


def test_images_refuse_what_has_no_level():
    scale = {"levels": 3, "value_range": (0, 1)}
    good = torch.zeros(2, 2)
    for bad in (1.5, -0.25, float("nan"), float("inf")):
        image = good.clone()
        image[1, 0] = bad
        with refuses(ValueError, "values in [0, 1]", f"received {bad} at image 1, position (1, 0)", "clamp"):
            from_images([good, image], **scale)
    with refuses(ValueError, "received 16777217 at image 0, position 0"):  # float32 cannot tell it from 2^24
        from_images(torch.tensor([[2**24 + 1]]), levels=3, value_range=(0, 2**24))
    with refuses(ValueError, "one shape, (2, 2)", "received (3, 2) as image 1", "resize"):
        from_images([good, torch.zeros(3, 2)], **scale)
    with refuses(ValueError, "at least one image", "received none"):
        from_images(np.zeros((0, 2, 2)), **scale)
    with refuses(TypeError, "expected real values", "received torch.complex64"):
        from_images([good.to(torch.complex64)], **scale)


def test_an_end_rounded_up_in_a_coarse_dtype_is_the_last_level():
    """100.4 is 100.5 in bfloat16 and lies in (100, 100.4) there: a quarter past the range, 318 of 255 levels."""
    image = torch.tensor([[100.0, 100.4]], dtype=torch.bfloat16)
    assert from_images(image, levels=256, value_range=(100, 100.4))[0].tolist() == [0, 255]


def test_levels_and_ranges_that_would_overflow_are_refused():
    with refuses(ValueError, "expected levels <= 2**31", f"received {2**31 + 1}", "give fewer"):
        from_images(torch.zeros(1, 1), levels=2**31 + 1, value_range=(0, 1))
    with refuses(ValueError, "expected value_range", "(-1e+308, 1e+308)", "difference finite"):
        from_images(torch.zeros(1, 1), levels=2, value_range=(-1e308, 1e308))


@pytest.mark.parametrize(("dtype", "high"), [("float16", 1e6), ("bfloat16", 1e300), ("float32", 1e300)])
def test_an_infinite_value_is_refused_where_the_end_is_infinite_in_its_dtype_too(dtype, high):
    image = torch.tensor([[1.0, float("inf")]]).to(getattr(torch, dtype))
    with refuses(ValueError, "received inf at image 0, position 1", "clamp"):
        from_images(image, levels=3, value_range=(0, high))


def test_integers_that_float64_rounds_are_refused():
    for values in (torch.tensor([[1, 2**53 + 1]]), np.array([[1, 2**64 - 1]], "u8")):
        with refuses(
            ValueError, "integers below 2**53", f"received {int(values[0, 1])} at image 0, position 1", "scale"
        ):
            from_images(values, levels=3, value_range=(0, 2.0**70))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_integer_images_past_their_range_do_not_wrap(dtype):
    values = np.array([[7, 200]], dtype)
    with refuses(ValueError, "values in [0, 100]", "received 200 at image 0, position 1"):
        from_images(values, levels=101, value_range=(0, 100))


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (np.ma.masked_array([[0.5, 0.5]], [[1, 0]]), TypeError, ("without a mask", "MaskedArray", "filled")),
        (torch.zeros(1, 2).to_sparse(), TypeError, ("dense tensor", "sparse_coo", "to_dense")),
        (torch.zeros(1, 2, device="meta"), TypeError, ("dense tensor", "meta")),
        ({"a": 1}, TypeError, ("array, tensor or sequence", "dict", "list")),
        (None, TypeError, ("array, tensor or sequence", "NoneType")),
        (iter([[0.5]]), TypeError, ("array, tensor or sequence", "list_iterator")),
        (["a"], TypeError, ("image 0 as an array", "received str")),
        ([[0.5], [None]], TypeError, ("image 1 as an array", "received list")),
        (torch.tensor(0.5), ValueError, ("shape [S, ...]", "single value")),
        (np.array(0.5), ValueError, ("shape [S, ...]", "single value")),
        (torch.zeros(2, 0), ValueError, ("hold values", "shape (0,)")),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, error, words):
    with refuses(error, *words):
        from_images(images, levels=3, value_range=(0, 1))


def test_images_of_foreign_byte_order_are_taken():
    for dtype in (">f4", "<f4", ">i4", "<u2"):
        assert from_images(np.array([[0, 1, 1]], dtype), levels=3, value_range=(0, 1))[0].tolist() == [0, 2, 2]


@pytest.mark.parametrize("bad", ["01", ("0", "1"), (0, 10**400), (0, b"1")])
def test_a_range_of_words_or_past_a_float_is_refused(bad):
    with refuses(ValueError, "expected value_range (low, high)", "received"):
        from_images(torch.zeros(1, 1), levels=2, value_range=bad)


def test_drawn_values_past_float32_are_refused():
    with refuses(ValueError, "value_range that float32 holds", "scale"):
        dequantise(torch.tensor([1]), levels=2, value_range=(0, 1e300))


def test_integers_of_numpy_are_taken_and_what_only_looks_like_one_is_not():
    data = TokenWindows([1, 2], np.int64(2), num_tokens=np.uint16(9), mask_id=np.int8(8), stride=np.array(2))
    assert data[np.uint8(0)].tolist() == data[torch.tensor(0)].tolist() == [1, 2]
    assert from_images(torch.zeros(1, 1), levels=np.int32(3), value_range=(0, np.float32(1))).num_tokens == 4
    for bad in (np.array([2, 3]), np.bool_(True), torch.tensor(True), torch.tensor(2.0), np.float64(2)):
        with refuses(TypeError, "expected seq_len to be an int", "whole number"):
            windows([1, 2], bad)


def test_a_vocabulary_past_int64_and_ids_that_would_be_negative_there_are_refused():
    with refuses(ValueError, "expected num_tokens < 2**63", f"received {2**64}", "smaller"):
        TokenWindows([1, 2], 2, num_tokens=2**64, mask_id=0)
    with refuses(ValueError, "ids below 2**63", f"received {2**64 - 1} at sequence 0, position 1"):
        TokenSequences([np.array([1, 2**64 - 1], "u8")], 2, **VOCABULARY)


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


@pytest.mark.parametrize("dtype", ["f4", "U0", "bool"])
def test_a_file_is_opened_as_integers_only(tmp_path, dtype):
    (tmp_path / "ids.bin").write_bytes(b"12345678")
    with refuses(TypeError, "expected an integer dtype", "ids.bin", f"received {np.dtype(dtype)}", "uint16"):
        open_ids(tmp_path / "ids.bin", dtype)


@pytest.mark.parametrize("paths", [987, None, b"text.txt", [987], [None]])
def test_paths_that_name_no_file_are_refused(paths):
    """An int would be read as an open file, and closed."""
    with refuses(TypeError, "expected paths", "give a str or a Path"):
        from_text(paths, str.encode, 2, **VOCABULARY)


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


def test_text_ids_past_four_bytes_do_not_wrap(tmp_path):
    (tmp_path / "a.txt").write_text("A", encoding="utf-8")
    ids = [2**31, 2**32 + 5]
    data = from_text(tmp_path / "a.txt", lambda text: ids, 2, num_tokens=2**40, mask_id=0)
    assert data[0].tolist() == ids


@pytest.mark.parametrize("call", [from_images, dequantise])
def test_a_bad_scale_is_refused(call):
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    with refuses(ValueError, "expected levels >= 2", "received 1"):
        call(zeros, levels=1, value_range=(0, 1))
    with refuses(TypeError, "expected levels to be an int", "received 2.5"):
        call(zeros, levels=2.5, value_range=(0, 1))
    for bad in ((1, 1), (1, 0), (0, float("inf")), (float("nan"), 1), (0, 1, 2), 5):
        with refuses(ValueError, "expected value_range (low, high)", f"received {bad}", "least"):
            call(zeros, levels=2, value_range=bad)


def test_dequantise_refuses_what_is_no_level():
    scale = {"levels": 3, "value_range": (0, 1)}
    with refuses(ValueError, "ids in [0, 3)", "received 3 at position (1, 0)", "no masked ids"):
        dequantise(torch.tensor([[0, 2], [3, 1]]), **scale)
    with refuses(ValueError, "received -1 at position 1"):
        dequantise(torch.tensor([0, -1]), **scale)
    with refuses(TypeError, "expected ids of an integer dtype", "received torch.float32"):
        dequantise(torch.zeros(2), **scale)


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
