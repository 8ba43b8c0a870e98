"""The vocabulary's filters: thresholds against sorting, against upstream's top_k and the nucleus in float64."""

from __future__ import annotations

import importlib
import itertools
import math

import numpy as np
import pytest
import torch
from oracles import draw, filtered, kept_by
from x_transformers import nonautoregressive_wrapper as upstream

OPERATION = "vocabulary_filter"


@pytest.fixture(autouse=True)
def many_rows(request, monkeypatch):
    """The programs of many rows, whatever their number."""
    backend = request.getfixturevalue("backend") if "backend" in request.fixturenames else None
    if backend is not None and backend.is_kernel:
        monkeypatch.setattr(backend.module(OPERATION), "_FEW_ROWS", 0)


def share(thres: float, vocabulary: int) -> int:
    """How many logits upstream's filter_thres keeps."""
    return math.ceil((1.0 - thres) * vocabulary)


def kept(backend, rows, top_k=None, top_p=None, mask_id=None, forbidden=None, min_p=None) -> np.ndarray:
    """Which of rows [M, V] a backend's filters keep, by their thresholds: a sampler would take a row for each id."""
    z = rows.float().clone()
    if mask_id is not None:
        z[:, mask_id] = -math.inf
    if forbidden is not None:
        z[:, forbidden] = -math.inf
    thresholds = backend.module(OPERATION).thresholds
    if not backend.is_kernel:
        threshold = thresholds(z, top_k, min_p, top_p)
    else:
        rows, forbidden = rows.to(backend.device), None if forbidden is None else forbidden.to(backend.device)
        row_indices = torch.arange(len(rows), device=backend.device)
        listed = backend.module("_logit_rows").LogitRows(rows, row_indices, True, mask_id, forbidden)
        threshold = thresholds(listed, top_k, min_p, top_p)
        threshold = None if threshold is None else threshold.cpu()[:, None]
    stays = z.isfinite() if threshold is None else z.isfinite() & (z >= threshold)
    return stays.numpy()


@pytest.mark.parametrize("thres", [0.0, 0.05, 0.1, 0.5, 0.7, 0.9, 0.95, 0.99, 0.999, 0.9999])
@pytest.mark.parametrize("vocabulary", [1, 3, 10, 100, 1000])
def test_filter_keeps_what_upstreams_top_k_keeps(backend, vocabulary, thres):
    logits = torch.randperm(vocabulary, generator=torch.Generator().manual_seed(0)).float() / 100
    theirs = upstream.top_k(logits[None, None], thres)[0, 0].isfinite()
    ours = kept(backend, logits[None], share(thres, vocabulary))[0]
    assert np.array_equal(ours, theirs)
    assert ours.sum() == share(thres, vocabulary)


def test_filter_keeps_ties_and_spends_no_place_on_the_mask(backend):
    logits = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0, 0.0, 9.0, -1.0, -2.0, -3.0]])
    assert kept(backend, logits, 2)[0].nonzero()[0].tolist() == [0, 6]
    assert kept(backend, logits, 2, mask_id=6)[0].nonzero()[0].tolist() == [0, 1, 2, 3]
    assert kept(backend, torch.zeros(1, 10), 1).all()


def filter_row(kind, vocabulary, dtype=torch.float32):
    place = torch.arange(vocabulary)
    normal = draw(vocabulary, seed=vocabulary)
    return {
        "normal": lambda: normal,
        "peaked": lambda: normal + 20.0 * (place == vocabulary // 3),
        "flat": lambda: 1e-3 * normal,
        "equal": lambda: torch.zeros(vocabulary),
        "two values": lambda: (place % 7 == 0).float(),
        "tied": lambda: normal.round(),
        "mostly -inf": lambda: normal.where(place % 50 == 3, -math.inf),
        "heavy tail": lambda: -1.1 * (1.0 + place * 7919 % vocabulary).log(),
        "steep": lambda: -1.6 * (1.0 + place * 7919 % vocabulary).log() + 0.3 * normal,
        # Few of which a sample misses most, and of which it may have one.
        "few have most": lambda: normal + 8.0 * (place * 7919 % vocabulary < 100),
        "few have all": lambda: normal + 40.0 * (place * 7919 % vocabulary < 30),
        "one in the sample": lambda: normal + 9.0 * (place == 1) + 8.0 * (place % (vocabulary // 40 + 1) == 13),
        "mostly the least number": lambda: normal.where(place % 3 == 1, torch.finfo(dtype).min),
        "the least number": lambda: torch.full((vocabulary,), torch.finfo(dtype).min),
        "coarse": lambda: (100.0 + normal).bfloat16().float(),  # what bfloat16 leaves of it: some ten values
        "all exponents": lambda: (-1.0) ** place * 2.0 ** (240.0 * (place * 7919 % vocabulary) / vocabulary - 120.0),
        "rising": lambda: place / 1000.0,
        "falling": lambda: -place / 1000.0,
        # Lanes read 4 or 8 columns of each block of 2048, or of 4096, and have room for 16 candidates each.
        "in few lanes": lambda: normal + 9.0 * (place % 2048 < 50),
        # What full lists have lost and what they still have differ in weight.
        "falling in few lanes": lambda: normal.where(place % 2048 >= 64, 12.0 - 6.0 * place / vocabulary),
        "rising in few lanes": lambda: normal.where(place % 2048 >= 64, 6.0 + 6.0 * place / vocabulary),
        # Of 40960 columns the sample that brackets the threshold sees every tenth, 20th or 40th vector.
        "above the sample": lambda: normal + 40.0 * (place // (4 if dtype == torch.float32 else 8) % 5 != 0),
        "below the sample": lambda: normal - 40.0 * (place // (4 if dtype == torch.float32 else 8) % 5 != 0),
    }[kind]().to(dtype)  # fmt: skip


# Under --ptx CI runs those of many warps that sort out ties, and of lanes whose candidates overflow.
TOP_K_OF_CI = [("tied", 8191, 0.6), ("tied", 8193, 0.6), ("in few lanes", 40960, 0.99)]
TOP_K = [
    *itertools.product(["normal", "equal", "two values", "tied"], [2, 37, 2048, 2049, 8191, 8193], [0.6]),
    *itertools.product(["coarse"], [2049, 50257], [0.5, 0.9]),
    *itertools.product(["all exponents"], [301, 2049, 8193], [0.2, 0.6]),
    *itertools.product(["rising", "falling", "mostly -inf", "heavy tail"], [8192, 8193], [0.3, 0.99]),
    *itertools.product(["in few lanes"], [40960], [0.0005, 0.985, 0.99]),
    *itertools.product(["above the sample", "below the sample"], [40960], [0.1, 0.5, 0.9]),
    *zip(["rising", "normal", "in few lanes"], [131071, 131072, 131073], [0.5, 0.9999, 0.99], strict=True),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "vocabulary", "thres"),
    [pytest.param(*case, marks=[pytest.mark.ptx] * (case in TOP_K_OF_CI)) for case in TOP_K],
)
@pytest.mark.slow_interpreted
def test_top_k_keeps_what_sorting_keeps(backend, kind, vocabulary, thres, dtype):
    if vocabulary > 10000 and dtype == torch.bfloat16 and backend.name == "interpreter":
        pytest.skip("one dtype of the large ones is enough for the interpreter, which takes seconds for each")
    row = filter_row(kind, vocabulary, dtype)
    top_k = share(thres, vocabulary)
    expected = kept_by(row.double().numpy(), top_k) & np.isfinite(row.double().numpy())
    assert expected.sum() >= min(top_k, int(row.isfinite().sum()))
    assert np.array_equal(kept(backend, row[None], top_k)[0], expected)


@pytest.mark.ptx
@pytest.mark.parametrize(
    ("kind", "vocabulary", "dtype"),
    [("normal", 2049, torch.float32), ("in few lanes", 40960, torch.bfloat16)],
    ids=str,
)
def test_few_rows_are_shared_by_more_warps(backend, kind, vocabulary, dtype, monkeypatch):
    if backend.is_kernel:
        monkeypatch.undo()
    row = filter_row(kind, vocabulary, dtype)
    for top_k in (share(0.5, vocabulary), share(0.99, vocabulary)):
        assert np.array_equal(kept(backend, row[None], top_k)[0], kept_by(row.double().numpy(), top_k))


def test_top_k_of_rows_that_begin_anywhere(backend):
    """Seven rows of an odd vocabulary, from an odd address."""
    rows = draw(7 * 101 + 3, dtype=torch.bfloat16)[3:].view(7, 101)
    for stays, row in zip(kept(backend, rows, 21), rows, strict=True):
        assert np.array_equal(stays, kept_by(row.double().numpy(), 21))


def assert_nucleus(backend, row, top_p, top_k=None, **excluded):
    """Exactly the float64 oracle's, but for an id at its very edge: no larger than at p + 1e-6, no smaller than at
    p - 1e-6. Whether it is exact."""
    stays = kept(backend, row[None], top_k, top_p, **excluded)[0]

    def oracle(p):
        return np.isfinite(filtered(row, top_k=top_k, top_p=p, **excluded))

    assert stays.any()
    assert not (stays & ~oracle(min(top_p + 1e-6, 1.0))).any()
    assert not (oracle(max(top_p - 1e-6, 0.0)) & ~stays).any()
    return np.array_equal(stays, oracle(top_p))


NUCLEUS_ROWS = [
    "normal", "peaked", "flat", "equal", "tied", "mostly -inf", "heavy tail", "rising", "steep", "few have most",
    "few have all", "one in the sample", "mostly the least number", "the least number",
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*itertools.product(NUCLEUS_ROWS, [torch.bfloat16]), *itertools.product(NUCLEUS_ROWS[:4], [torch.float32])],
    ids=str,
)
@pytest.mark.slow_interpreted
def test_top_p_keeps_what_the_float64_oracle_keeps(backend, kind, dtype):
    cases = [(4, 0.5), (37, 0.999), (1000, 0.0), (1000, 0.3), (1000, 0.9), (8193, 0.0), (8193, 0.8)]
    exact = [assert_nucleus(backend, filter_row(kind, vocabulary, dtype), p) for vocabulary, p in cases]
    assert np.mean(exact) > 0.8
    assert kept(backend, torch.zeros(1, 1, dtype=dtype), None, 0.5).tolist() == [[True]]


@pytest.mark.parametrize("kind", ["falling in few lanes", "rising in few lanes"])
@pytest.mark.slow_interpreted
def test_top_p_of_lists_that_are_full(backend, kind):
    """Their weight is an estimate, and a wrong one where the lists are no fair sample."""
    row = filter_row(kind, 40960, torch.bfloat16)
    for top_p in (0.2, 0.97):
        assert_nucleus(backend, row, top_p)


@pytest.mark.ptx
@pytest.mark.parametrize("level", [-1000.0, -95.0, -1e6, 3e7, 1e10])
@pytest.mark.slow_interpreted
def test_top_p_wherever_the_logits_lie(backend, level):
    """Even where the sample has none of them; weights are relative to the largest of the row."""
    row = torch.full((8200,), -math.inf)
    row[torch.arange(12) * 97 + 300] = level + draw(12)
    stays = row.isfinite()
    for others in (-math.inf, torch.finfo(torch.float32).min):
        for top_p in (0.0, 0.5):
            assert_nucleus(backend, row.where(stays, others), top_p)
    assert_nucleus(backend, level + 3.0 * draw(8200), 0.5, share(0.999, 8200))
    assert_nucleus(backend, torch.full((2104,), level + 3.3), 0.0)


@pytest.mark.parametrize("temperature", [1.0, 0.3, "each"])
@pytest.mark.parametrize(
    "kind", ["normal", "equal", "tied", "mostly -inf", "heavy tail", "few have most", "nan", "none"]
)
def test_on_a_cpu_few_are_sorted_and_the_nucleus_is_the_same(reference, kind, temperature, monkeypatch):
    module = reference.module(OPERATION)
    row = torch.full((3000,), {"nan": math.nan, "none": -math.inf}.get(kind, 0.0))
    z = (row if kind in ("nan", "none") else filter_row(kind, 3000)).expand(3, -1).clone()
    z[1, ::7], z[2] = -math.inf, 4.0 * z[2]
    shares = [0.0, 0.1, 0.9, 0.999, 1.0, torch.tensor([[0.2], [0.9], [1.0]], dtype=torch.float64)]
    if temperature == "each":
        temperature = torch.tensor([[1.0], [0.3], [2.0]], dtype=torch.float64)
    few = [module._top_p_threshold(z, share, temperature) for share in shares]
    monkeypatch.setattr(module, "_SORTED", 3000)
    for share, threshold in zip(shares, few, strict=True):
        torch.testing.assert_close(
            threshold, module._top_p_threshold(z, share, temperature), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.ptx
def test_all_but_one_have_an_even_share(backend):
    """Where they lie so far from 0 that the largest does not weigh 1, their share must be known all the same."""
    row = torch.full((2600,), 96017064.0)
    row[2] += 8.0
    assert_nucleus(backend, row, 0.6)


@pytest.mark.ptx
@pytest.mark.parametrize(
    ("kind", "top_p", "dtype"),
    [("peaked", 0.7, torch.bfloat16), ("few have most", 0.97, torch.bfloat16), ("heavy tail", 0.7, torch.float32)],
    ids=str,
)
def test_top_p_of_a_large_vocabulary(backend, kind, top_p, dtype):
    assert_nucleus(backend, filter_row(kind, 50257, dtype), top_p)


@pytest.mark.parametrize("place", [1, -1])  # of the sample, of an edge
@pytest.mark.parametrize("content", [pytest.param(math.inf, marks=pytest.mark.ptx), -math.inf, math.nan])
@pytest.mark.slow_interpreted
def test_filters_end_at_rows_without_a_law(backend, reference, content, place):
    """What stays of such a row nobody looks at, but its neighbour is as ever."""
    lawless, lawful = draw(8201), draw(8201, seed=1)
    if content < 0:
        lawless[:] = -math.inf
    lawless[place] = content
    for top_k, top_p in ((share(0.9, 8201), None), (None, 0.0), (None, 0.5), (share(0.5, 8201), 0.9)):
        stays = kept(backend, torch.stack([lawless, lawful]), top_k, top_p)
        assert np.array_equal(stays[1:], kept(reference, lawful[None], top_k, top_p))


@pytest.mark.parametrize("kind", ["normal", "peaked", "tied", "mostly -inf", "heavy tail", "mostly the least number"])
def test_top_k_then_top_p(backend, kind):
    """The share is one of what the k largest have together; the other order would keep more."""
    for thres, top_p in ((0.5, 0.9), (0.9, 0.5), (0.97, 0.0)):
        row, top_k = filter_row(kind, 300), share(thres, 300)
        assert_nucleus(backend, row, top_p, top_k)
        assert_nucleus(backend, row, top_p, top_k, mask_id=4, forbidden=torch.arange(300) % 3 == 0)


@pytest.mark.parametrize("vocabulary", [300, pytest.param(2500, marks=pytest.mark.ptx)])
@pytest.mark.slow_interpreted
def test_each_filter_takes_what_the_one_before_keeps(backend, vocabulary):
    """The largest logit, from which min_p counts, lies in a row's middle or at its edge; each filter decides once."""
    normal, numbers = filter_row("normal", vocabulary), []
    forbidden = normal > normal.topk(4).values[-1]  # the three largest
    each_decides = (5, 0.01, 0.99), (90, 0.2, 0.99), (90, 0.01, 0.5)
    places = dict.fromkeys((0, vocabulary - 1), each_decides[1:2])
    for place, cases in (places | {vocabulary // 2: (*each_decides, (None, 0.3, 0.7), (9, 0.3, None))}).items():
        row = normal.clone()
        row[place] = 3.5
        for filters in cases:
            given = dict(zip(("top_k", "min_p", "top_p"), filters, strict=True), mask_id=7, forbidden=forbidden)
            stays = kept(backend, row[None], **given)[0]
            assert np.array_equal(stays, np.isfinite(filtered(row, **given)))
            numbers.append(stays.sum())
    assert len(set(numbers)) > 3


def test_the_nucleus_keeps_the_boundary_and_its_ties(backend):
    row = torch.tensor([[0.1, 0.4, 0.1, 0.2, 0.1, 0.1]]).log()
    for top_p, expected in [(0.0, [1]), (0.39, [1]), (0.41, [1, 3]), (0.59, [1, 3]), (0.61, [*range(6)])]:
        assert kept(backend, row, None, top_p)[0].nonzero()[0].tolist() == expected, top_p
    # k first: of the two largest together the head is two thirds.
    assert kept(backend, row, 2, 0.66)[0].nonzero()[0].tolist() == [1]
    assert kept(backend, row, 2, 0.67)[0].nonzero()[0].tolist() == [1, 3]


@pytest.mark.parametrize("content", [math.nan, math.inf, 1e30])
@pytest.mark.slow_interpreted
def test_what_is_excluded_does_not_matter_to_the_filters(backend, content):
    for vocabulary in (40, 8200):
        row, forbidden = draw(1, vocabulary, seed=2), torch.arange(vocabulary) % 5 == 1
        for top_k, top_p in ((share(0.7, vocabulary), None), (None, 0.6)):
            plain = kept(backend, row, top_k, top_p, mask_id=3, forbidden=forbidden)
            row[:, forbidden] = content
            row[:, 3] = content
            assert np.array_equal(kept(backend, row, top_k, top_p, mask_id=3, forbidden=forbidden), plain)
            assert plain.sum() < vocabulary / 2


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocabulary", [20, 301])
def test_a_rows_edges_count(backend, vocabulary, dtype):
    """What lies before and behind a row's whole vectors: its largest logits, its least, what k leaves out."""
    row = torch.zeros(2 + vocabulary, dtype=dtype)[2:]
    for kind in ("tied", "rising", "falling"):
        row[:] = filter_row(kind, vocabulary, dtype)
        for top_k in (1, vocabulary // 2, vocabulary - 1):
            assert np.array_equal(kept(backend, row[None], top_k)[0], kept_by(row.double().numpy(), top_k))
        assert_nucleus(backend, row, 0.9, share(0.5, vocabulary))
    for place in (0, -1):
        row[:] = filter_row("rising", vocabulary, dtype)
        row[place] = 300.0
        assert_nucleus(backend, row, 0.9)


@pytest.mark.ptx
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_neighbouring_numbers_are_told_apart(backend, dtype):
    row = torch.where(torch.arange(301) % 3 == 0, 1.0 + torch.finfo(dtype).eps, 1.0).to(dtype)
    for top_k in (1, 50, 100, 101):  # of 101 that are larger, the last of which is an edge
        stays = kept(backend, row[None], top_k)[0]
        assert np.array_equal(stays, (row > 1.0).numpy())


# What the launcher asks for: launches are recorded, nothing runs.


@pytest.fixture
def launches(kernel, monkeypatch):
    """Arguments and options of each launch of the filter, and a function that makes the device another."""
    launch, recorded = importlib.import_module("fastmask.kernels._launch"), []
    monkeypatch.setattr(launch, "launch", lambda kernel, grid, on, **given: recorded.append(given))

    def on(**changes):
        hardware = launch.H100._replace(**changes)
        monkeypatch.setattr(launch, "hardware", lambda device: hardware)
        return recorded

    return on


def listed_rows(kernel, *shape, dtype=torch.bfloat16):
    logits = torch.zeros(*shape, dtype=dtype, device=kernel.device)
    row_indices = torch.arange(len(logits), device=kernel.device)
    return kernel.module("_logit_rows").LogitRows(logits, row_indices, True)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)], ids=str)
def test_a_launch_of_16_bit_logits_asks_for_few_registers_from_hopper_on(kernel, launches, capability):
    """Of a nucleus alone."""
    module, asked = kernel.module(OPERATION), launches(capability=capability)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        rows = listed_rows(kernel, 2, 8192, dtype=dtype)
        for top_k, min_p, top_p in ((None, 0.1, 0.9), (820, 0.1, None), (820, None, 0.9)):
            module.thresholds(rows, top_k, min_p, top_p)
    registers = [given.get("maxnreg") for given in asked]
    most = module._REGISTERS if capability >= (9, 0) else None
    assert registers == [most, None, None, most, None, None, None, None, None]


@pytest.mark.parametrize("num_multiprocessors", [2, 132])
def test_a_launch_fits_the_multiprocessors(kernel, launches, num_multiprocessors, monkeypatch):
    """Few rows of a multiprocessor are shared by more warps, of k only; no more warps than there is room for."""
    module = kernel.module(OPERATION)
    monkeypatch.setattr(module, "_FEW_ROWS", 2)
    asked = launches(num_multiprocessors=num_multiprocessors)
    for num_rows in (2 * num_multiprocessors, 2 * num_multiprocessors + 1):
        module.thresholds(listed_rows(kernel, num_rows, 2049), 820, None, None)
        module.thresholds(listed_rows(kernel, num_rows, 2049), 820, None, 0.9)
    assert [given["num_warps"] for given in asked] == [4, 1, 1, 1]
    asked.clear()
    module.thresholds(listed_rows(kernel, 33 * num_multiprocessors, 2049), None, None, 0.9)
    (given,) = asked
    assert len(given["candidates_ptr"]) == 32 * num_multiprocessors


def test_filters_that_keep_all_launch_nothing(kernel, launches):
    asked, rows = launches(), listed_rows(kernel, 2, 100)
    module = kernel.module(OPERATION)
    assert module.thresholds(rows, None, None, None) is None
    assert module.thresholds(rows, 100, None, None) is None
    assert not asked
    module.thresholds(rows, 100, None, 0.5)
    assert [(given["num_kept"], given["top_p"]) for given in asked] == [(None, 0.5)]
