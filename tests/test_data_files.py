"""Files of ids: how they are opened, what a pickle holds, workers, memory."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from data_sets import VOCABULARY, refuses, windows, without
from torch.utils.data import DataLoader

from fastmask.data import TokenSequences, TokenWindows, open_ids


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


@pytest.mark.parametrize("dtype", ["f4", "U0", "bool"])
def test_a_file_is_opened_as_integers_only(tmp_path, dtype):
    (tmp_path / "ids.bin").write_bytes(b"12345678")
    with refuses(TypeError, "expected an integer dtype", "ids.bin", f"received {np.dtype(dtype)}", "uint16"):
        open_ids(tmp_path / "ids.bin", dtype)


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
