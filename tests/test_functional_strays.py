"""Numbers that point outside of their tensors, which nothing is read through and nothing written: each tensor lies
amid memory of its own kind that would show it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from oracles import draw
from sampling import Door

from fastmask import functional
from fastmask.functional import LinearLogits, Sampled

OPERATION = "sample_tokens"
B, N, V, D, MASK = 2, 4, 6, 3, 5
FILTERS = {"top_k": 3}, {"top_p": 0.6}
FAR = [2**31, 2**40, 2**62, -2, -(2**31), -(2**60), -(2**63)]


@pytest.fixture
def door(backend):
    return Door(backend)


class Room:
    """A tensor in the midst of memory that holds one number before and behind it."""

    def __init__(self, values, device, filler):
        self.filler, self.size = filler, 4 + values.numel()
        self.memory = torch.full((self.size + values.numel() + self.size,), filler, dtype=values.dtype, device=device)
        self.tensor = self.memory[self.size : self.size + values.numel()].view(values.shape).copy_(values)

    def is_untouched_around(self) -> bool:
        around = torch.cat([self.memory[: self.size], self.memory[-self.size :]])
        return bool((around == self.filler).all())


def given_as(kind, logits, device):
    """Those logits [B, N, V] of all positions, or compact; each row amid memory that says 1e30."""
    logits = logits.flatten(0, 1) if kind == "compact" else logits
    return Room(logits, device, 1e30).tensor


# ---- kept ids ----


@pytest.mark.parametrize("kind", ["all", "compact", "head"])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.0}, *(pytest.param(x, marks=pytest.mark.slow_interpreted) for x in FILTERS)],
    ids=str,
)
@pytest.mark.ptx
def test_kept_ids_outside_of_the_vocabulary(backend, kind, options):
    """Below 0 the id is sampled as ever; past the vocabulary it is kept, and NaN. The rows' own are spared."""
    kept = torch.tensor([[V, V + 1, -2, 2], [2**40, -(2**60), 2**62, -1]])
    embeddings, weight = draw(B, N, D), draw(V, D, seed=1)
    logits = LinearLogits(embeddings, weight) if kind == "head" else given_as(kind, embeddings @ weight.mT, "cpu")
    options = {"seed": 1, "mask_id": MASK, **options}
    if kind == "compact":
        options |= {"row_indices": torch.arange(B * N), "seq_len": N}
    kept = kept.flatten() if kind == "compact" else kept
    sample = Door(backend).sample_tokens
    out, free = sample(logits, kept_ids=kept, **options), sample(logits, **options)
    is_past, is_free = kept >= V, kept < 0
    assert torch.equal(out.ids, kept.where(~is_free, free.ids))
    assert torch.equal(out.log_probs.isnan(), is_past)
    assert torch.equal(out.log_probs[is_free], free.log_probs[is_free])
    rooms = Room(torch.full((B, N), 7), backend.device, 7), Room(torch.full((B, N), 7.0), backend.device, 7.0)
    sample(logits, kept_ids=kept, out=Sampled(*(room.tensor for room in rooms)), **options)
    assert all(room.is_untouched_around() for room in rooms)
    assert torch.equal(rooms[0].tensor.cpu().flatten(), out.ids.flatten())


# ---- listed rows of a step ----


@pytest.mark.parametrize("kind", ["all", "compact", "head"])
def test_listed_rows_of_a_step_outside_of_the_canvas(door, kind):
    """The step is that of the positions among them; the others stay as they were."""
    ids = torch.arange(B * N).view(B, N) % MASK
    places = torch.tensor([1, 2, 5, 6])
    is_masked = torch.zeros(B * N, dtype=torch.bool).index_fill(0, places, True).view(B, N)
    embeddings, weight = draw(B, N, D), draw(V, D, seed=1)
    options = {"mask_id": MASK, "seed": 1, "choice_temperature": 1.0}

    def step(rows):
        given = embeddings if kind != "compact" else embeddings.flatten(0, 1)[rows.clamp(0, B * N - 1)]
        logits = LinearLogits(given, weight) if kind == "head" else given @ weight.mT
        return door.demask_step(logits, ids, is_masked, 1, row_indices=rows, **options)

    expected = step(places)
    for above, below in [(2**31, -2), (2**62, -(2**63))]:
        out = step(torch.tensor([above, 1, 2, B * N, 5, below, 6, -1]))
        for ours, theirs in zip(out[:3], expected[:3], strict=True):
            if ours.is_floating_point():
                torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)  # a product rounds by its rows
            else:
                assert torch.equal(ours, theirs)


# ---- where lists begin, how many are masked again, and which block ----


def listed(is_masked, row_starts, num_places):
    """What the list is to be, in plain Python."""
    starts = [min(max(start, 0), num_places) for start in row_starts]
    rows = [-1] * num_places
    for b, row in enumerate(is_masked.tolist()):
        places = [b * len(row) + i for i, masked in enumerate(row) if masked]
        for place, position in zip(range(starts[b], starts[b + 1]), places, strict=False):
            rows[place] = position
    return rows


def remask(backend, ids, is_masked, row_starts, counts, num_places, **options):
    """What ``remask_`` writes, and nothing around it."""
    rooms = [Room(x, backend.device, 7) for x in (ids, torch.full((num_places,), 3))]
    masks = Room(is_masked, backend.device, True)
    written = rooms[0].tensor, masks.tensor, rooms[1].tensor
    backend.run(functional.remask_, *written, row_starts, draw(*ids.shape), counts, mask_id=MASK, **options)
    assert all(room.is_untouched_around() for room in (*rooms, masks))
    return [x.cpu() for x in written]


@pytest.mark.parametrize("length", [N, pytest.param(4500, marks=pytest.mark.slow_interpreted)])
def test_lists_begin_and_end_in_the_list_whatever_their_starts_say(backend, length):
    """Where they rise, the list of the starts as they are cut to it, of short sequences, and of such as take several
    blocks."""
    random = np.random.default_rng(0)
    is_masked = draw(3, length, seed=1) > 0
    ids, places = torch.zeros(3, length, dtype=torch.int64), 2 * length
    for _ in range(6 if length == N else 2):
        between = sorted(random.choice([*FAR, *range(-2, places + 3)], size=2).tolist())
        far = [int(random.choice([-2, -(2**63)])), *between, int(random.choice([places, 2**31, 2**62]))]
        far.sort()
        assert remask(backend, ids, is_masked, torch.tensor(far), length, places)[2].tolist() == listed(
            is_masked, far, places
        )
        random.shuffle(far)  # which promises nothing of the list but what it may hold
        rows = remask(backend, ids, is_masked, torch.tensor(far), length, places)[2]
        assert set(rows.tolist()) <= {-1, 3, *is_masked.flatten().nonzero().flatten().tolist()}


@pytest.mark.parametrize("far", FAR)
def test_counts_outside_of_a_sequence_are_none_or_all(backend, far):
    ids, is_masked, starts = torch.zeros(B, N).long(), torch.ones(B, N).bool(), torch.arange(B + 1) * N
    given, cut = torch.tensor([far, 2]), torch.tensor([min(max(far, 0), N), 2])
    ours, theirs = (remask(backend, ids, is_masked, starts, counts, B * N) for counts in (given, cut))
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert ours[1].sum(dim=-1).tolist() == cut.tolist()


@pytest.mark.parametrize("far", FAR)
def test_a_block_outside_of_a_sequence_is_cut_to_it(backend, far):
    ids, is_masked, starts = torch.zeros(B, N).long(), torch.ones(B, N).bool(), torch.arange(B + 1) * N
    for block in ([1, far], [far, 2], [far, far]):
        given = torch.tensor([block, [0, 2]])
        blocks = given, given.clamp(0, N)
        ours, theirs = (
            remask(backend, ids, is_masked, starts, 1, B * N, block=each, next_block=each) for each in blocks
        )
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
