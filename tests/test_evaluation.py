"""The bound of tensors, data sets and loaders: what is averaged, what is drawn, what is refused."""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from training import MASK, N, Recorder, V, build, clean

from fastmask import NonAutoregressiveWrapper, evaluation, functional
from fastmask.data import TokenSequences
from fastmask.schedules import Schedule


class Favourites(nn.Module):
    """The same law at every position. Under the linear schedule a sequence of one id over and over then costs exactly
    its length times that id's nats, whichever positions are masked."""

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len = V, N
        logits = torch.linspace(0.0, 3.0, V)
        logits[MASK] = -math.inf
        self.log_probs = nn.Parameter(logits.log_softmax(dim=-1))

    def forward(self, ids):
        return self.log_probs.expand(*ids.shape, -1)

    def nats(self, id: int) -> float:
        return -self.log_probs[id].item()


def repeated(*ids: int, length: int = N) -> torch.Tensor:
    return torch.tensor(ids)[:, None].expand(-1, length).contiguous()


# ---- what is averaged ----


BATCHES = [(repeated(0, 1, 2), [0, 1, 2], N), (repeated(3, length=2), [3], 2), (repeated(4, 4, length=5), [4, 4], 5)]


@pytest.mark.parametrize(
    "packed",
    [
        lambda ids: ids,
        lambda ids: (ids, torch.zeros(len(ids))),
        lambda ids: [ids, torch.zeros(len(ids))],
        lambda ids: {"input_ids": ids, "labels": None},
        lambda ids: ids.int(),
    ],
    ids=["tensor", "tuple", "list", "dict", "int32"],
)
@pytest.mark.parametrize("num_samples", [1, 3])
def test_batches_count_by_their_tokens(packed, num_samples, device):
    net = Favourites()
    wrapper = NonAutoregressiveWrapper(net, mask_id=MASK).to(device)
    batches = [packed(ids) for ids, _, _ in BATCHES]
    nats = [length * net.nats(id) for _, ids, length in BATCHES for id in ids]
    each = wrapper.nelbo(batches, num_samples, reduction="none")
    assert each.dtype == torch.float32
    torch.testing.assert_close(each.cpu(), torch.tensor(nats), rtol=1e-6, atol=0)
    mean = wrapper.nelbo(iter(batches), num_samples)
    assert mean.dtype == torch.float32
    assert mean.item() == pytest.approx(sum(nats) / (3 * N + 2 + 2 * 5), rel=1e-6)


def test_what_is_not_maskable_does_not_count(device):
    net = Favourites()
    wrapper = NonAutoregressiveWrapper(net, mask_id=MASK).to(device)
    maskable = torch.zeros(2, N, dtype=torch.bool)
    maskable[0, :4] = True
    ids = repeated(3, 5)
    expected = torch.tensor([4 * net.nats(3), 0.0])
    by_tensor = wrapper.nelbo(ids.to(device), maskable=maskable.to(device), reduction="none")
    by_dict = wrapper.nelbo([{"input_ids": ids, "maskable": maskable}], reduction="none")
    for each in (by_tensor, by_dict):
        torch.testing.assert_close(each.cpu(), expected, rtol=1e-6, atol=0)
    assert wrapper.nelbo([{"input_ids": ids, "maskable": maskable}]).item() == pytest.approx(net.nats(3), rel=1e-6)


def test_many_draws_lose_nothing_to_rounding(device):
    """A float32 sum of as many is off by more."""
    tokens = repeated(3).to(device)
    masked = functional.mask_sampling(tokens, mask_id=MASK, num_tokens=V, counts=torch.tensor([N], device=device))
    losses = functional.CrossEntropy(torch.tensor(0.0), torch.full(tokens.shape, 0.1, device=device), None)
    model = evaluation.Model(None, lambda *_: masked._replace(loss_weights=losses.nll[:, 0]), lambda *_: losses)
    seed = torch.tensor(0, device=device)
    bound = evaluation.run(evaluation.source(tokens, None, None, {}), model, seed, 10_000, False)
    assert bound.reduced("none", 10_000).item() == pytest.approx(0.1 * 0.1 * N, rel=2e-7)


# ---- what is drawn ----


@pytest.mark.parametrize("chunk_size", [1, 3, 8, 100])
@pytest.mark.parametrize("kind", ["tensor", "TensorDataset", "TokenSequences"])
def test_chunks_change_nothing(kind, chunk_size, device, drawn):
    wrapper, tokens = build(device), clean(device)
    whole = wrapper.nelbo(tokens, num_samples=3, seed=5)
    each = wrapper.nelbo(tokens, num_samples=3, seed=5, reduction="none")
    masks = [masked.masked_ids for masked in drawn[:3]]
    drawn.clear()
    source = {
        "tensor": lambda: tokens,
        "TensorDataset": lambda: TensorDataset(tokens.cpu()),
        "TokenSequences": lambda: TokenSequences(tokens.cpu(), N, num_tokens=V, mask_id=MASK),
    }[kind]()
    torch.testing.assert_close(wrapper.nelbo(source, 3, seed=5, chunk_size=chunk_size), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        wrapper.nelbo(source, 3, seed=5, chunk_size=chunk_size, reduction="none"), each, rtol=1e-5, atol=0
    )
    torch.testing.assert_close(each.sum() / tokens.numel(), whole, rtol=1e-6, atol=0)
    chunks = -(-8 // chunk_size)
    assert len(drawn) == 2 * 3 * chunks
    for sample in range(3):
        assert torch.equal(torch.cat([masked.masked_ids for masked in drawn[sample : 3 * chunks : 3]]), masks[sample])


def test_a_data_set_comes_in_chunks_of_32(device, drawn):
    build(device).nelbo(TensorDataset(clean(device, 70).cpu()))
    assert [len(masked.counts) for masked in drawn] == [32, 32, 6]
    drawn.clear()
    build(device).nelbo(clean(device, 70))
    assert [len(masked.counts) for masked in drawn] == [70]


def test_arguments_of_the_network_are_cut_with_a_tensor(device):
    net = Recorder()
    wrapper, tokens = build(device, net=net), clean(device, 7)
    mask, scale = torch.rand(7, N, device=device) < 0.5, torch.ones(3, device=device)
    wrapper.nelbo(tokens, chunk_size=4, mask=mask, scale=scale, flag=True)
    assert [len(call["ids"]) for call in net.calls] == [4, 3]
    assert torch.equal(torch.cat([call["mask"] for call in net.calls]), mask)
    assert all(call["scale"] is scale and call["flag"] is True for call in net.calls)


def test_a_seed_in_common_gives_candidates_the_same_masks(device, drawn):
    loader = DataLoader(TensorDataset(clean("cpu", 20)), batch_size=6)
    candidates = [build(device), build(device, net=Recorder(), schedule="linear", no_replace_prob=0.0)]
    for seed in (7, torch.tensor(7), 8):
        for candidate in candidates:
            candidate.nelbo(loader, num_samples=2, seed=seed)
    runs = [torch.cat([masked.masked_ids for masked in drawn[start : start + 8]]) for start in range(0, 48, 8)]
    assert all(torch.equal(run, runs[0]) for run in runs[1:4])
    assert not torch.equal(runs[4], runs[0])


def test_torchs_generator_is_taken_where_no_seed_is_given(device):
    wrapper, tokens = build(device), clean(device)
    torch.manual_seed(3)
    first = wrapper.nelbo([tokens.cpu()])
    torch.manual_seed(3)
    assert wrapper.nelbo([tokens.cpu()]) == first != wrapper.nelbo([tokens.cpu()])


def test_batches_of_a_stream_draw_masks_of_their_own(device, drawn):
    """Times are stratified within each, at an offset of its own."""
    wrapper, tokens = build(device), clean("cpu", 4)
    wrapper.nelbo([tokens] * 5, num_samples=2, seed=0)
    offsets = set()
    for batch in range(5):
        times = torch.cat([masked.times for masked in drawn[2 * batch : 2 * batch + 2]]).double() * 8
        assert sorted(times.floor().tolist()) == list(range(8))
        offsets.add(round(float(times[0] % 1), 4))
    assert len(offsets) == 5
    assert len({str(masked.masked_ids) for masked in drawn}) == 10


class Stream(IterableDataset):
    def __iter__(self):
        return iter(repeated(0, 1, 2, 3, 4))


def test_a_data_set_without_a_length_is_a_stream_of_items(device, drawn):
    net = Favourites()
    each = NonAutoregressiveWrapper(net, mask_id=MASK).to(device).nelbo(Stream(), chunk_size=2, reduction="none")
    torch.testing.assert_close(each.cpu(), torch.tensor([N * net.nats(id) for id in range(5)]), rtol=1e-6, atol=0)
    assert [len(masked.counts) for masked in drawn] == [2, 2, 1]


# ---- manners ----


@pytest.mark.parametrize("kind", ["tensor", "loader"])
def test_no_logits_are_alive_while_the_network_runs(kind):
    alive, most = [], []

    class Watched(Favourites):
        def forward(self, ids):
            gc.collect()
            most.append(sum(reference() is not None for reference in alive))
            logits = super().forward(ids).clone()
            alive.append(weakref.ref(logits))
            return logits

    tokens = repeated(0, 1, 2)
    source = tokens if kind == "tensor" else [tokens, tokens]
    NonAutoregressiveWrapper(Watched(), mask_id=MASK).nelbo(source, num_samples=3)
    assert len(most) == (3 if kind == "tensor" else 6)
    assert max(most) == 0


@pytest.mark.parametrize(
    ("source", "options", "total"),
    [
        (clean("cpu"), {}, 3),
        (clean("cpu"), {"chunk_size": 3}, 9),
        (TensorDataset(clean("cpu")), {"chunk_size": 5}, 6),
        ([clean("cpu"), clean("cpu")], {}, 6),
        (DataLoader(TensorDataset(clean("cpu")), batch_size=4), {}, 6),
    ],
    ids=["tensor", "chunks", "data set", "list", "loader"],
)
def test_progress_is_told(source, options, total, device):
    told = []
    build(device).nelbo(source, 3, progress=lambda *numbers: told.append(numbers), **options)
    assert told == [(done + 1, total) for done in range(total)]


def test_modes_are_restored_when_a_batch_fails(device):
    wrapper = build(device).train()
    wrapper.net.token_emb.eval()
    with pytest.raises(ValueError, match="N from 1 to net"):
        wrapper.nelbo([clean("cpu"), torch.zeros(1, N + 1, dtype=torch.int64)])
    assert wrapper.training
    assert not wrapper.net.token_emb.training


@pytest.mark.parametrize("length", range(1, N + 1))
def test_shorter_sequences(length, device):
    """Positions that are not there are no positions: the bound is that of a network of that length."""
    wrapper, tokens = build(device), clean(device)[:, :length]
    assert wrapper.nelbo(tokens, seed=0).isfinite()
    whole = wrapper.nelbo(tokens, 64, seed=0)
    wrapper.max_seq_len = length
    assert wrapper.nelbo(tokens, 64, seed=0) == whole


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_default_dtype_has_no_say(dtype, device):
    wrapper, tokens = build(device, schedule=lambda t: 1 - t**2), clean(device)
    maskable = tokens != 3

    def bounds() -> list[torch.Tensor]:
        options = {"seed": 1, "maskable": maskable}
        return [wrapper.nelbo(tokens, **options), wrapper.nelbo(tokens, reduction="none", **options)]

    expected = bounds()
    torch.set_default_dtype(dtype)
    try:
        found = bounds()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_a_schedule_on_a_gpu_that_does_not_fall_gives_nan(device, monkeypatch):
    """It cannot be refused without waiting; here told in its place what a GPU's would be."""
    wrapper = build(device, schedule=lambda t: 1 - t)
    for falls in (True, False):
        monkeypatch.setattr(Schedule, "check_falls", lambda *_, falls=falls, **__: torch.tensor(falls))
        assert wrapper.nelbo(clean(device)).isnan() != falls
        assert wrapper.nelbo(clean(device), reduction="none").isnan().all() != falls


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_go_to_the_network():
    wrapper, tokens = build("cuda"), clean("cpu")
    batch = {"input_ids": tokens, "maskable": tokens != 3}
    value = wrapper.nelbo([batch], seed=1)
    assert value.is_cuda
    assert wrapper.nelbo(tokens, maskable=tokens != 3, seed=1) == value


# ---- what is refused ----


class Ragged(Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(1 + index, dtype=torch.int64)


GOOD = torch.zeros(2, N, dtype=torch.int64)


@pytest.mark.parametrize(
    ("source", "options", "error", "message"),
    [
        (
            "abc",
            {},
            TypeError,
            r"expected tokens to be a torch.Tensor \[B, N\], a data set, or an iter.*, received str",
        ),
        (3, {}, TypeError, "a data set, or an iterable of batches .*, received int"),
        ({"input_ids": GOOD}, {}, TypeError, "a data set, or an iterable of batches .*, received dict"),
        (
            [{"ids": GOOD}],
            {},
            ValueError,
            r"expected batches that are dicts to have \"input_ids\", received \['ids'\]",
        ),
        ([GOOD.float()], {}, TypeError, r"expected tokens of a batch of dtype int32\|int64, received float32"),
        ([GOOD[0]], {}, ValueError, r"expected tokens of a batch with 2 dimensions, received shape \(6,\)"),
        (
            [{"input_ids": GOOD, "maskable": GOOD}],
            {},
            TypeError,
            'expected "maskable" of a batch of dtype bool, received int64',
        ),
        (
            [{"input_ids": GOOD, "maskable": GOOD[:, 1:] == 0}],
            {},
            ValueError,
            r'expected "maskable" of a batch of shape \[B, N\] = \[2, 6\], received \[2, 5\]',
        ),
        ([], {}, ValueError, "expected tokens in batches, received none; an iterator can be evaluated once only"),
        (iter([]), {}, ValueError, "expected tokens in batches, received none"),
        (
            [GOOD],
            {"maskable": GOOD == 0},
            ValueError,
            'with a tensor of tokens, .*list; give batches as dicts of "inp',
        ),
        ([GOOD], {"chunk_size": 2}, ValueError, "expected chunk_size with a tensor or a data set, .* leave it out"),
        (GOOD, {"chunk_size": 0}, ValueError, "expected chunk_size of at least 1, received 0"),
        (GOOD, {"reduction": "sum"}, ValueError, "expected reduction to be one of 'mean', 'none'; received 'sum'"),
        (GOOD, {"seed": 1.0}, TypeError, "expected seed to be an int, received float"),
        (iter([GOOD]), {"progress": True}, ValueError, "expected progress= with tokens that have a length, .*leave"),
        (
            Ragged(),
            {},
            ValueError,
            "expected items of one length in a chunk of the data set; give chunk_size=1, or a",
        ),
    ],
)
def test_what_does_not_fit_is_refused(source, options, error, message):
    with pytest.raises(error, match=message):
        build("cpu").nelbo(source, **options)


def test_items_of_several_lengths_go_one_by_one():
    assert build("cpu").nelbo(Ragged(), chunk_size=1, reduction="none").shape == (3,)
