"""What is masked again: remask keys and their noise, the selection, and the kernel against the reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import draw
from sampling import Door
from scipy import stats

from fastmask import _streams as streams
from fastmask import functional
from fastmask.records import Draws, Remasking, RowList, Windows
from fastmask.reference import philox

OPERATION = "remask"


@pytest.fixture
def door(backend):
    return Door(backend)


@pytest.fixture
def law_door(reference):
    """Laws are shown on the reference; a kernel is held to it key by key."""
    return Door(reference)


# ---- remask keys ----


def test_confidence_is_minus_log_p(door):
    """The order of upstream's 1 - p, and finer: a tenth of 1e-8 differs from 1e-8, and 1 - 1e-9 from 1."""
    log_probs = torch.tensor([[0.0, -1e-9, -0.5, math.log(1e-8), math.log(1e-9), -math.inf, math.nan]])
    keys = door.confidence_remask_keys(log_probs)
    assert torch.equal(keys.nan_to_num(7.0), (-log_probs).nan_to_num(7.0))
    assert (keys[0, :5].diff() > 0).all()


def test_noise_on_the_confidence_and_on_the_critic_is_gumbel(law_door):
    log_probs, shape = torch.tensor(-2.0), (200, 150)
    options = {"seed": 4, "step": 3}
    for scale in (0.5, 4.5):
        confidence = law_door.confidence_remask_keys(log_probs.expand(shape), choice_temperature=scale, **options)
        critic = law_door.critic_remask_keys(torch.full(shape, 0.3), noise_scale=scale, **options)
        assert confidence.dtype == critic.dtype == torch.float32
        # Noise that favours a token lowers its remask key, and raises a critic's.
        confident, critical = -(confidence + log_probs) / scale, (critic - 0.3) / scale
        torch.testing.assert_close(confident, critical, rtol=1e-4, atol=1e-4)
        for noise in (confident.flatten().double().numpy(), critical.flatten().double().numpy()):
            assert stats.kstest(noise, "gumbel_r").pvalue > 1e-3
            assert noise.mean() == pytest.approx(np.euler_gamma, abs=4 * math.pi / math.sqrt(6 * noise.size))
            assert noise.var() == pytest.approx(math.pi**2 / 6, rel=0.05)
            assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 4 / math.sqrt(noise.size)


def test_score_noise_follows_seed_step_and_sample(door):
    zeros = torch.zeros(6, 30)

    def keys(rows=zeros, **options):
        return door.critic_remask_keys(rows, noise_scale=1.0, **{"seed": 1, **options})

    first = keys()
    assert torch.equal(first, keys())
    for other in ({"seed": 2}, {"step": 1}, {"sample_offset": 1}):
        assert (first != keys(**other)).float().mean() > 0.9
    assert torch.equal(first[2:5], keys(zeros[2:5], sample_offset=2))
    assert torch.equal(first[:, :7], keys(zeros[:, :7]))
    assert first.unique().numel() == first.numel()
    high, low, _, _ = philox.draw(torch.tensor(1), streams.SCORE_NOISE, 9, sample=5, position=2)
    expected = -math.log(-math.log1p(-(int(high) * 2**32 + int(low) + 0.5) / 2**64))
    assert keys(zeros[:1], step=9, sample_offset=5)[0, 2].item() == pytest.approx(expected, abs=1e-5)


def test_without_noise_the_critics_keys_are_its_logits(door):
    for dtype in (torch.float32, torch.bfloat16):
        logits = draw(3, 4, dtype=dtype)
        assert torch.equal(door.critic_remask_keys(logits), logits.float())
    torch.testing.assert_close(
        door.critic_remask_keys(logits.float(), noise_scale=2.0, seed=1),
        logits.float() + 2.0 * door.critic_remask_keys(torch.zeros(3, 4), noise_scale=1.0, seed=1),
    )


# ---- the selection ----


def brute_force(keys, eligible, counts):
    """Of equally sure positions the last is masked again first."""
    chosen = torch.zeros_like(eligible)
    for b, row in enumerate(keys.tolist()):
        allowed = [i for i in range(len(row)) if eligible[b, i]]
        nans = [i for i in allowed if math.isnan(row[i])][::-1]
        others = sorted((i for i in allowed if not math.isnan(row[i])), key=lambda i: (-row[i], -i))
        for i in (nans + others)[: max(0, int(counts[b]))]:
            chosen[b, i] = True
    return chosen


VALUES = [0.0, -0.0, 1.0, -1.0, 0.5, math.inf, -math.inf, math.nan, -math.nan, 1e-45, -1e-45, 3e38]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 64, 300])
@pytest.mark.slow_interpreted
def test_selection_against_brute_force(door, length, dtype):
    if dtype == torch.float64 and door.backend.is_kernel:
        pytest.skip("the kernels compute in float32: float64 keys are sorted by PyTorch")
    generator = torch.Generator().manual_seed(length)
    rows = door.rows(40, few=12)
    keys = torch.tensor(VALUES, dtype=torch.float64)[torch.randint(len(VALUES), (rows, length), generator=generator)]
    mixed = torch.rand(rows, length, generator=generator) < 0.5  # half of them hardly ever tie
    keys = torch.where(mixed, keys, torch.randn(rows, length, generator=generator)).to(dtype)
    eligible = torch.rand(rows, length, generator=generator) < 0.7
    counts = torch.randint(0, length + 2, (rows,), generator=generator)
    counts[:3] = torch.tensor([0, length, length + 1])
    for number in (counts, counts.int()):
        chosen = door.select_to_remask(keys, eligible, number)
        assert chosen.dtype == torch.bool
        assert torch.equal(chosen, brute_force(keys.double(), eligible, number))
    assert torch.equal(chosen.sum(-1), counts.minimum(eligible.sum(-1)))
    assert not (chosen & ~eligible).any()


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.one_of(st.sampled_from(VALUES), st.floats(width=32)), st.booleans()), min_size=1, max_size=12
    ),
    st.integers(-1, 14),
)
def test_selection_of_any_scores(row, count):
    keys, eligible = torch.tensor([[s for s, _ in row]]), torch.tensor([[e for _, e in row]])
    counts = torch.tensor([count])
    chosen = functional.select_to_remask(keys, eligible, counts, backend="reference")
    assert torch.equal(chosen, brute_force(keys, eligible, counts))


def test_selection_of_nothing(door):
    for shape in ((0, 4), (3, 0)):
        empty = door.select_to_remask(torch.zeros(shape), torch.ones(shape).bool(), torch.zeros(shape[0]).long())
        assert empty.shape == shape
    nowhere = door.select_to_remask(torch.zeros(2, 3), torch.zeros(2, 3).bool(), torch.tensor([1, 3]))
    assert not nowhere.any()


def test_selection_does_not_write_its_inputs(door):
    keys, eligible, counts = draw(3, 8), torch.ones(3, 8).bool(), torch.tensor([1, 2, 3])
    before = keys.clone(), eligible.clone(), counts.clone()
    door.select_to_remask(keys, eligible, counts)
    assert all(torch.equal(x, y) for x, y in zip(before, (keys, eligible, counts), strict=True))


@pytest.mark.parametrize("length", [1000, 4096, 4097, 65536])
def test_selection_of_long_sequences(door, length):
    """One block of keys, several blocks, and keys of every kind of spacing."""
    keys = torch.stack([draw(length), draw(length).exp(), -draw(length).abs().log(), torch.zeros(length)])
    eligible = draw(4, length, seed=1) < 0.5
    counts = torch.tensor([1, length // 3, length, length // 10])
    expected = functional.select_to_remask(keys, eligible, counts, backend="reference")
    assert torch.equal(door.select_to_remask(keys, eligible, counts), expected)


def test_a_sequence_too_long_for_the_selections_keys_is_refused(kernel):
    with pytest.raises(ValueError, match=r"at most 65536 tokens, received 65537; use backend=.reference."):
        Door(kernel).select_to_remask(torch.zeros(1, 65537), torch.ones(1, 65537).bool(), torch.ones(1).long())


def test_longer_sequences_than_the_kernels_keys_hold_are_selected_by_the_reference(monkeypatch):
    monkeypatch.setenv("FASTMASK_BACKEND", "triton")
    chosen = functional.select_to_remask(torch.zeros(1, 65537), torch.ones(1, 65537).bool(), torch.tensor([2]))
    assert chosen.nonzero().tolist() == [[0, 65535], [0, 65536]]


@pytest.mark.parametrize("operation", ["gumbel_noise", "select_to_remask", "remask_", "remask_ by a rule"])
def test_the_kernels_are_torch_operations(kernel, operation):
    """torch's own checks: schema, fake tensors and tracing."""
    ids, counts, draws = torch.arange(6).view(2, 3), torch.tensor([1, 2]), Draws(torch.tensor(5), 7, 2)
    listed, remasking = RowList(torch.zeros(4).long(), torch.tensor([0, 2, 4])), Remasking(9, True, 0.5)
    windows = Windows(None, torch.tensor([[0, 2], [1, 3]]))
    by_rule = Remasking(9, False, entropy_bound=0.5, counts_commit=True)
    arguments = {
        "gumbel_noise": (draws, 2, 3),
        "select_to_remask": (draw(2, 9), draw(2, 9) < 0, counts, -0.5),
        "remask_": (ids.clone(), ids > 2, listed, draw(2, 3), counts, None, windows, draws, remasking),
        "remask_ by a rule": (ids.clone(), ids > 2, listed, draw(2, 3).abs(), counts, None,
                              Windows(windows.next_block, windows.next_block), draws, by_rule),
    }[operation]  # fmt: skip
    operator = getattr(kernel.module("remask"), operation.split()[0])
    flat = operator.signature.flat(arguments)
    flat = [x.to(kernel.device) if isinstance(x, torch.Tensor) else x for x in flat]
    torch.library.opcheck(operator.overload, tuple(flat))


def test_where_the_list_begins_counts_as_read(kernel):
    read = torch.tensor([0, 3]).to(kernel.device), torch.zeros(1, 3, device=kernel.device)
    written = [torch.zeros(1, 3).long(), torch.ones(1, 3).bool(), torch.zeros(3).long()]
    written = [x.to(kernel.device) for x in written]
    functional.remask_(*written, *read, 1, mask_id=9, backend="triton")
    assert [x._version for x in (*written, *read)] == [1, 1, 1, 0, 0]


@pytest.mark.parametrize("length", [6, 5000])
def test_of_equal_keys_the_last_are_masked_again(door, length):
    """So that the first are committed first, in one block of positions and in several."""
    chosen = door.select_to_remask(torch.ones(1, length), torch.ones(1, length, dtype=torch.bool), length - 2)
    assert chosen[0].tolist() == [False, False] + [True] * (length - 2)


def test_equally_sure_positions_are_committed_from_the_first_on(door):
    logits = torch.zeros(1, 6, 5)
    logits[..., 2] = 100.0
    ids, is_masked = torch.full((1, 6), 4), torch.ones(1, 6, dtype=torch.bool)
    out = door.demask_step(logits, ids, is_masked, 4, mask_id=4, temperature=0.0, seed=0)
    assert out.is_masked[0].tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize("row_starts", [[-3, 2], [0, 99], [5, 1], [2, 99], [-9, -1]], ids=str)
def test_starts_outside_of_the_list_write_nothing_around_it(backend, row_starts):
    """Four places amid other memory, of which the kernel may leave some as they were, and write no others."""
    room = torch.full((12,), 7, device=backend.device)
    ids, is_masked = room.new_zeros(1, 6), torch.ones(1, 6, dtype=torch.bool, device=backend.device)
    values = torch.zeros(1, 6)
    backend.run(functional.remask_, ids, is_masked, room[4:8], torch.tensor(row_starts), values, 4, mask_id=9)
    assert is_masked.tolist() == [[False, False, True, True, True, True]]
    assert (room[:4] == 7).all()
    assert (room[8:] == 7).all()
    assert set(room[4:8].tolist()) <= {-1, 2, 3, 4, 5, 7}
