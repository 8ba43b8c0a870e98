"""What follows the samples of a demasking step: what is masked again, what is listed, and the step as a whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sampling import Door, assert_same_selection

from fastmask import functional
from fastmask.functional import LinearLogits

OPERATION = "sample_tokens"
MASK = 9  # the mask's id


@pytest.fixture
def door(backend):
    return Door(backend)


def draw(*shape, seed=0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def remasked(backend, state, row_starts, values, counts, **options):
    """ids, is_masked and row_indices after ``remask_``: row_indices were all 77, as stays what lies behind them."""
    length = int(row_starts[-1])
    memory = torch.full((length + values.numel(),), 77, device=backend.device)
    written = [*(x.to(backend.device, copy=True) for x in state), memory[:length]]
    backend.run(functional.remask_, *written, row_starts, values, counts, mask_id=MASK, **options)
    assert (memory[length:] == 77).all()
    return [x.cpu() for x in written]


# ---- what is masked again ----

SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, 3e38])


def random_values(random, batch, length):
    """Values [B, N] that hardly ever tie, that mostly do, or of every kind."""
    values = draw(batch, length, seed=int(random.integers(2**31)))
    kind = random.integers(3)
    if kind == 1:
        values = values.round()
    elif kind == 2:
        special = SPECIAL[torch.from_numpy(random.integers(len(SPECIAL), size=(batch, length)))]
        values = values.where(torch.from_numpy(random.random((batch, length)) < 0.5), special)
    return values.to([torch.float32, torch.bfloat16, torch.float16][random.integers(3)])


def random_remasking(random, length):
    """A call of ``remask_``: state, segments too small, exact or too large for it, values, counts and options."""
    batch = int(random.integers(1, 4))
    is_masked, eligible = (torch.from_numpy(random.random((batch, length)) < share) for share in (0.6, 0.7))
    ids = torch.from_numpy(random.integers(0, MASK, size=(batch, length)))
    counts = torch.from_numpy(random.integers(-1, length + 2, size=batch))
    options = {
        "is_confidence": bool(random.integers(2)),
        "noise_scale": float(random.choice([0.0, 0.0, 0.5, 4.5])),
        "min_remask_key": random.choice([None, None, -0.5, 0.0, -0.0, math.inf, -math.inf]),
        "eligible": [None, eligible][random.integers(2)],
        "seed": int(random.integers(2**62)),
        "step": int(random.integers(2**24)),
        "sample_offset": int(random.integers(2**31)),
    }
    for name in ("block", "next_block"):
        if random.integers(3) == 0:
            window = random.integers(-1, length + 2, size=(batch, 2))
            options[name] = torch.from_numpy(np.sort(window) if random.integers(4) else window)
    if random.integers(3) == 0:
        options["eligible"] = None
        options["commits"], counts = counts.clone(), None
    if random.integers(4) == 0:  # a rule
        options |= {"eligible": None, "noise_scale": 0.0, "min_remask_key": None}
        if random.integers(2):
            options |= {"is_confidence": True, "factor": float(random.choice([0.0, 0.3, 1.0, 2.5, 1e9]))}
        else:
            options |= {"is_confidence": False, "entropy_bound": float(random.choice([0.0, 0.1, 1.0, 5.0, 1e30]))}
        if random.integers(2):
            options.pop("commits", None)
            counts = None
    allowed = is_masked if options["eligible"] is None else eligible
    exact = allowed.sum(-1) if counts is None else counts.clamp(min=0).minimum(allowed.sum(-1))
    segments = (exact + torch.from_numpy(random.integers(-2, 3, size=batch)) * int(random.integers(2))).clamp(min=0)
    if counts is not None and random.integers(4) == 0:
        counts = counts.int()
    return (ids, is_masked), F.pad(segments.cumsum(0), (1, 0)), random_values(random, batch, length), counts, options


def prefix_by_hand(keys, factor, entropy_bound):
    """How many of a sequence's remask keys, those of its masked positions, a rule commits."""
    known = sorted(key for key in keys if not math.isnan(key))
    for n in range(len(known), 0, -1):
        if factor is not None and math.exp(min(-known[n - 1], 700.0)) >= 1.0 - factor / (n + 1):
            return n
        if entropy_bound is not None:
            multiples = [int(min(max(key, -1024.0), 1024.0) * 2**32) for key in known[: n - 1]]
            if sum(multiples) <= entropy_bound * 2**32:
                return n
    return 0


def naive_remasked(
    state, row_starts, values, counts, noise, *, is_confidence, min_remask_key, eligible, commits=None, factor=None,
    entropy_bound=None, block=None, next_block=None, **_
):  # fmt: skip
    """``remask_`` position by position."""
    (ids, is_masked), listed = (x.clone() for x in state), torch.full((int(row_starts[-1]),), -1)
    sign = -1 if is_confidence else 1
    of_figures, keys = (sign * values.float()).tolist(), sign * (values.float() + noise)
    allowed = is_masked.clone() if eligible is None else eligible
    least = -math.inf if min_remask_key is None else min_remask_key
    everywhere = torch.tensor([0, values.shape[1]]).expand(len(values), 2)
    block, next_block = (everywhere if window is None else window for window in (block, next_block))
    for b, row in enumerate(keys.tolist()):
        inside = [n for n in range(len(row)) if block[b, 0] <= n < block[b, 1]]
        counted = [n for n in inside if allowed[b, n]]
        count = len(counted) if counts is None else int(counts[b])
        if commits is not None:
            count = len(counted) - max(1, int(commits[b]))
        if factor is not None or entropy_bound is not None:
            number = prefix_by_hand([of_figures[b][n] for n in counted], factor, entropy_bound)
            count = min(count, len(counted) - max(1, number))
        if min_remask_key is not None and eligible is None:
            count = min(count, len(counted) - 1)
        places = [n for n in counted if not of_figures[b][n] < least]
        places.sort(key=lambda n, row=row: (0, 0.0, -n) if math.isnan(row[n]) else (1, -row[n], -n))
        chosen = sorted(places[: max(0, count)])
        is_masked[b, inside] = False
        is_masked[b, chosen], ids[b, chosen] = True, MASK
        shown = [n for n in range(len(row)) if is_masked[b, n] and next_block[b, 0] <= n < next_block[b, 1]]
        room = listed[row_starts[b] : row_starts[b + 1]]
        flat = torch.tensor(shown, dtype=torch.int64)[: len(room)] + b * len(row)
        room[: len(flat)] = flat
    return [ids, is_masked, listed]


@pytest.mark.parametrize("length", [1, 2, 7, 30])
@pytest.mark.slow_interpreted
def test_remask_position_by_position(door, length):
    for case in range(25):
        state, row_starts, values, counts, options = random_remasking(np.random.default_rng(case), length)
        noise = torch.zeros_like(values, dtype=torch.float32)
        if options["noise_scale"]:
            counters = {name: options[name] for name in ("seed", "step", "sample_offset")}
            noise = door.critic_remask_keys(noise, noise_scale=options["noise_scale"], **counters)
        expected = naive_remasked(state, row_starts, values, counts, noise, **options)
        for ours, theirs in zip(remasked(door.backend, state, row_starts, values, counts, **options), expected,
                                strict=True):  # fmt: skip
            assert torch.equal(ours, theirs), case


@pytest.mark.ptx
@pytest.mark.parametrize("block", range(4))
@pytest.mark.slow_interpreted
def test_the_kernel_remasks_what_the_reference_remasks(kernel, reference, block):
    """Thirty random calls; positions may differ where their noised scores are level to rounding: none are today."""
    ties = 0
    for case in range(30 * block, 30 * block + 30):
        random = np.random.default_rng(1000 + case)
        length = int(random.choice([1, 64, 1024, 1025, 4096, round(math.exp(random.uniform(0, 8.3)))]))
        state, row_starts, values, counts, options = random_remasking(random, length)
        ours, theirs = (remasked(x, state, row_starts, values, counts, **options) for x in (kernel, reference))
        counters = {name: options[name] for name in ("seed", "step", "sample_offset")}
        noise = functional.critic_remask_keys(values.float(), noise_scale=options["noise_scale"], **counters)
        ties += assert_same_selection(ours, theirs, noise)
    assert ties <= 2


@pytest.mark.parametrize(
    ("length", "noise_scale", "min_remask_key"),
    [(4097, 0.5, None), (9000, 4.5, -0.3), (65536, 0.0, None), (65536, 1.0, 0.2)],
)
@pytest.mark.slow_interpreted
def test_long_sequences_are_remasked_alike(kernel, reference, length, noise_scale, min_remask_key):
    """Whose keys are read again at each pass, their noise drawn beforehand."""
    state = torch.zeros(1, length).long(), draw(1, length, seed=1) < 0.5
    values, row_starts = draw(1, length, seed=2), torch.tensor([0, length // 5])
    options = {"noise_scale": noise_scale, "min_remask_key": min_remask_key, "seed": 3, "step": 5, "sample_offset": 7}
    ours, theirs = (remasked(x, state, row_starts, values, length // 4, **options) for x in (kernel, reference))
    assert ours[1].sum() > length // 8
    noise = functional.critic_remask_keys(values, noise_scale=noise_scale, seed=3, step=5, sample_offset=7)
    assert assert_same_selection(ours, theirs, noise) == 0


@pytest.mark.parametrize("block", range(2))
def test_the_kernel_selects_what_the_reference_selects(kernel, reference, block):
    for case in range(40 * block, 40 * block + 40):
        random = np.random.default_rng(2000 + case)
        length = int(random.choice([1, 2, 100, 4096, round(math.exp(random.uniform(0, 8.3)))]))
        (_, eligible), _, scores, counts, options = random_remasking(random, length)
        counts = random.integers(length + 1) if counts is None else counts
        ours, theirs = (
            Door(x).select_to_remask(scores, eligible, counts, min_remask_key=options["min_remask_key"])
            for x in (kernel, reference)
        )
        assert torch.equal(ours, theirs), case


def test_the_least_remask_key_keeps_its_equals_and_nan(door):
    scores = torch.tensor([[0.5, 0.25, -0.0, 0.0, -0.25, math.nan, math.inf]])
    for least, expected in [(0.25, [0, 1, 5, 6]), (0.0, [0, 1, 2, 3, 5, 6]), (-0.0, [0, 1, 2, 3, 5, 6]),
                            (math.inf, [5, 6]), (None, [*range(7)])]:  # fmt: skip
        chosen = door.select_to_remask(scores, torch.ones(1, 7).bool(), 7, min_remask_key=least)
        assert chosen[0].nonzero().flatten().tolist() == expected, least
    first = door.select_to_remask(scores, torch.ones(1, 7).bool(), 3, min_remask_key=0.25)
    assert first[0].nonzero().flatten().tolist() == [0, 5, 6]


def test_sequences_without_positions_list_nothing(door):
    rows = torch.tensor([7, 7], device=door.backend.device)  # else a copy on the device is written
    ids, is_masked, starts = torch.zeros(2, 0).long(), torch.zeros(2, 0).bool(), torch.tensor([0, 1, 2])
    door.remask_(ids, is_masked, rows, starts, torch.zeros(2, 0), 1, mask_id=5)
    assert rows.tolist() == [-1, -1]


@pytest.mark.parametrize("function", ["select_to_remask", "remask_"])
def test_a_least_remask_key_that_is_no_number_is_refused(door, function):
    ids, is_masked = torch.zeros(1, 2).long(), torch.ones(1, 2).bool()
    state = (ids, is_masked, torch.zeros(2).long(), torch.tensor([0, 2]), torch.zeros(1, 2), 1)
    arguments = state if function == "remask_" else (torch.zeros(1, 2), is_masked, 1)
    options = {"mask_id": 5} if function == "remask_" else {}
    with pytest.raises(ValueError, match="expected min_remask_key to be a number, received nan"):
        getattr(door, function)(*arguments, min_remask_key=math.nan, **options)


@pytest.mark.parametrize("room", [0, 1, 2, 3, 9])
def test_what_does_not_fit_the_list_is_left_out(door, room):
    """The masked positions are all masked; a segment writes nothing of the next one's."""
    state = torch.zeros(3, 4).long(), torch.tensor([[True] * 4, [False] * 4, [True, False, True, True]])
    row_starts = torch.tensor([0, room, room + 1, room + 3])
    ids, is_masked, listed = remasked(door.backend, state, row_starts, -torch.arange(12.0).view(3, 4), 2)
    assert torch.equal(ids == MASK, is_masked)
    assert is_masked.nonzero().tolist() == [[0, 2], [0, 3], [2, 2], [2, 3]]
    assert listed.tolist() == [*[2, 3, *[-1] * room][:room], -1, 10, 11]


# ---- a step ----


def some_masked(batch, length, share=0.6, seed=5):
    """ids and is_masked, where the mask's id is an ordinary one as well."""
    is_masked = draw(batch, length, seed=seed) < share
    ids = torch.arange(batch * length).view(batch, length) % 12
    return ids.masked_fill(is_masked, MASK), is_masked


def composed(door, logits, ids, is_masked, counts=None, *, threshold=None, choice_temperature=0.0, **options):
    """demask_step in the words of its parts."""
    counters = {name: options[name] for name in ("seed", "step", "sample_offset") if name in options}
    sampled = door.sample_tokens(logits, mask_id=MASK, **options)
    log_probs = sampled.log_probs.where(is_masked, 0.0)
    keys = door.confidence_remask_keys(log_probs, choice_temperature=choice_temperature, **counters)
    is_unsure = is_masked if threshold is None else is_masked & (log_probs <= math.log(threshold or 1e-300))
    masked = is_masked.sum(-1)
    counts = masked if counts is None else torch.as_tensor(counts).expand(len(ids))
    if threshold is not None:
        counts = counts.minimum(masked - 1)
    chosen = door.select_to_remask(keys, is_unsure, counts)
    return sampled.ids.where(is_masked, ids).masked_fill(chosen, MASK), chosen, log_probs


STEPS = [
    {"counts": 2, "temperature": 0.7},
    {"counts": torch.tensor([0, 3]), "top_p": 0.8, "choice_temperature": 4.5, "sample_offset": 5, "step": 3},
    {"counts": torch.tensor([1, 9], dtype=torch.int32), "top_k": 6, "forbidden": [0, 4], "temperature": 0.0},
    {"threshold": 0.4},
    {"threshold": 0.3, "choice_temperature": 0.5, "counts": 1, "top_p": 0.9},
    {"threshold": 0.0, "counts": 2},
    {"threshold": 1.0},
]


@pytest.mark.parametrize("options", STEPS, ids=str)
@pytest.mark.slow_interpreted
def test_a_step_is_the_composition_of_its_parts(door, options):
    (ids, is_masked), logits = some_masked(2, 6), draw(2, 6, 12, seed=3) * 2
    given = [x.clone() for x in (logits, ids, is_masked)]
    out = door.demask_step(logits, ids, is_masked, mask_id=MASK, seed=1, **options)
    for ours, theirs in zip(out[:3], composed(door, logits, ids, is_masked, seed=1, **options), strict=True):
        assert torch.equal(ours, theirs)
    listed = out.row_indices.view(2, 6)
    for b in range(2):
        places = out.is_masked[b].nonzero().flatten() + 6 * b
        assert listed[b].tolist() == places.tolist() + [-1] * (6 - len(places))
    assert all(torch.equal(x, y) for x, y in zip(given, (logits, ids, is_masked), strict=True))


@pytest.mark.parametrize("counts", [None, 1, 0])
@pytest.mark.parametrize("threshold", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.slow_interpreted
def test_a_threshold_commits_what_exceeds_it_and_at_least_one(door, threshold, counts):
    """Told from the probabilities alone; where counts do not allow all that is below it to stay, the likeliest go."""
    (ids, is_masked), logits = some_masked(3, 4, share=0.8), draw(3, 4, 6, seed=3) * 2
    is_masked[2] = False
    out = door.demask_step(logits, ids, is_masked, counts, mask_id=5, threshold=threshold, top_p=0.95, seed=1)
    committed = is_masked & ~out.is_masked
    probability = out.log_probs.exp()
    assert not (out.is_masked & ~is_masked).any()
    assert not (out.is_masked & (probability > threshold)).any()
    assert committed.any(-1).tolist() == [True, True, False]
    for b in range(2):
        below = probability[b][committed[b] & (probability[b] <= threshold)]
        most = int(is_masked[b].sum()) if counts is None else counts
        above = int((is_masked[b] & (probability[b] > threshold)).sum())
        assert len(below) == max(0, int(is_masked[b].sum()) - min(most, int(is_masked[b].sum()) - 1) - above)
        if len(below) and out.is_masked[b].any():
            assert below.min() >= probability[b][out.is_masked[b]].max()


def test_a_threshold_holds_the_confidence_without_its_noise(door):
    """The noise orders what is not sure enough, where counts commit some of it."""
    (ids, is_masked), logits = some_masked(2, 8, share=9.0), draw(2, 8, 12, seed=3)
    counters = {"seed": 4, "step": 2, "sample_offset": 3}
    options = {"mask_id": MASK, "threshold": 0.3, "choice_temperature": 9.0, **counters}
    out = door.demask_step(logits, ids, is_masked, **options)
    is_unsure = out.log_probs <= math.log(0.3)
    assert 0 < out.is_masked.sum() < 15
    assert torch.equal(out.is_masked, is_unsure)
    fewer = door.demask_step(logits, ids, is_masked, 3, **options)
    confidence = out.log_probs + 9.0 * door.critic_remask_keys(torch.zeros(2, 8), noise_scale=1.0, **counters)
    for b in range(2):
        least = confidence[b].where(is_unsure[b], math.inf).topk(3, largest=False).indices
        assert sorted(least.tolist()) == fewer.is_masked[b].nonzero().flatten().tolist()


def test_rows_without_a_law_stay_masked_while_others_can_go(door):
    logits, is_masked = torch.zeros(2, 3, 4), torch.ones(2, 3).bool()
    logits[0, :2, 0] = math.nan
    logits[1] = math.nan
    out = door.demask_step(logits, torch.full((2, 3), 3), is_masked, mask_id=3, threshold=0.1, seed=0)
    assert out.is_masked.tolist() == [[True, True, False], [False, True, True]]
    assert out.ids[1].tolist() == [0, 3, 3]


def test_compact_rows_give_the_step_of_all_positions(door):
    (ids, is_masked), logits = some_masked(2, 6), draw(2, 6, 12, seed=3)
    options = {"mask_id": MASK, "seed": 1, "choice_temperature": 1.0}
    whole = door.demask_step(logits, ids, is_masked, 2, **options)
    rows = is_masked.flatten().nonzero().flatten()
    rows = torch.cat([rows.flip(0), torch.full((3,), -1)])
    compact = door.demask_step(logits.flatten(0, 1)[rows], ids, is_masked, 2, row_indices=rows, **options)
    listed = door.demask_step(logits, ids, is_masked, 2, row_indices=rows, **options)
    for out in (compact, listed):
        assert all(torch.equal(a, b) for a, b in zip(out, whole, strict=True))


def test_the_list_is_as_long_as_the_caller_knows(door):
    (ids, is_masked), logits = some_masked(2, 6), draw(2, 6, 12, seed=3)
    whole = door.demask_step(logits, ids, is_masked, 2, mask_id=MASK, seed=1)
    for room in (0, 1, 2, 6):
        out = door.demask_step(logits, ids, is_masked, 2, mask_id=MASK, seed=1, max_masked=room)
        assert torch.equal(out.ids, whole.ids)
        assert torch.equal(out.row_indices.view(2, room), whole.row_indices.view(2, 6)[:, :room])


@pytest.mark.parametrize("options", [{}, {"threshold": 0.25, "choice_temperature": 0.5}], ids=str)
@pytest.mark.slow_interpreted
def test_a_loop_over_the_rows_listed_leaves_nothing_masked(door, options):
    """Each step's list of rows is the next one's; the same ids as with the logits of all positions."""
    net, length, steps = draw(12, 12), 5, 4
    ids = torch.full((2, length), MASK)
    dense = compact = (ids, ids == MASK, None, torch.arange(2 * length))
    for step in range(steps):
        counts = length * (steps - 1 - step) // steps
        common = {"mask_id": MASK, "seed": 7, "step": step, "max_masked": counts, **options}
        dense = door.demask_step(net[dense[0]], *dense[:2], counts, **common)
        rows = compact[3]
        logits = net[compact[0]].flatten(0, 1)[rows]
        compact = door.demask_step(logits, *compact[:2], counts, row_indices=rows, **common)
        assert all(torch.equal(a, b) for a, b in zip(dense, compact, strict=True))
        assert (compact[1].sum(-1) <= counts).all()
        assert torch.equal(compact[0] == MASK, compact[1])
    assert not compact[1].any()
    assert compact[3].numel() == 0


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (2, 3)], ids=str)
@pytest.mark.parametrize("threshold", [None, 0.5])
def test_a_step_of_nothing(door, shape, threshold):
    """No sequence, no position, or nothing masked."""
    ids, is_masked = torch.full(shape, 4), torch.zeros(shape).bool()
    out = door.demask_step(torch.zeros(*shape, 6), ids, is_masked, 1, mask_id=5, threshold=threshold, seed=0)
    assert torch.equal(out.ids, ids)
    assert torch.equal(out.is_masked, is_masked)
    assert torch.equal(out.log_probs, torch.zeros(shape))
    assert torch.equal(out.row_indices, torch.full((ids.numel(),), -1))


def test_a_step_takes_any_strides(door):
    (ids, is_masked), logits = some_masked(2, 6), draw(2, 6, 12, seed=3)
    strided = [x.mT.contiguous().mT for x in (logits, ids, is_masked)]
    assert not any(x.is_contiguous() for x in strided)
    ours, theirs = (door.demask_step(*x, 2, mask_id=MASK, seed=1) for x in (strided, (logits, ids, is_masked)))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("options", [{}, {"threshold": 0.3, "top_p": 0.9, "choice_temperature": 1.0}], ids=str)
@pytest.mark.slow
def test_a_step_compiles_whole(kernel, options):
    def step(logits, ids, is_masked, rows):
        return functional.demask_step(
            logits,
            ids,
            is_masked,
            2,
            mask_id=MASK,
            seed=1,
            row_indices=rows,
            max_masked=3,
            backend="triton",
            **options,
        )

    (ids, is_masked), rows = some_masked(2, 4), torch.tensor([0, 1, 2, 4, 5, -1])
    arguments = [x.to(kernel.device) for x in (draw(6, 12), ids, is_masked, rows)]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(*arguments), step(*arguments), strict=True):
        assert torch.equal(ours, theirs)


def test_its_parts_compile_whole(kernel):
    def step(logits, eligible, counts):
        out = functional.sample_tokens(logits, mask_id=3, seed=1, backend="triton")
        keys = functional.confidence_remask_keys(out.log_probs, choice_temperature=1.0, seed=1, backend="triton")
        return out.ids, functional.select_to_remask(keys, eligible, counts, backend="triton")

    arguments = [x.to(kernel.device) for x in (draw(2, 3, 20), torch.ones(2, 3).bool(), torch.tensor([1, 2]))]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(*arguments), step(*arguments), strict=True):
        assert torch.equal(ours, theirs)


# ---- behind a linear head ----


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.0, "top_k": 5}, {"top_k": 1}, {"top_p": 0.8, "forbidden": [0, 4], "threshold": 0.3}],
    ids=str,
)
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.slow_interpreted
def test_a_step_behind_a_head_is_the_step_of_its_logits(door, scale, options):
    """Of all positions, of those listed, and of compact rows. Small integers: their products are exact."""
    (ids, is_masked), integers = some_masked(2, 6), torch.Generator().manual_seed(0)
    shapes = (2, 6, 4), (12, 4), (12,)
    embeddings, weight, bias = (torch.randint(-2, 3, shape, generator=integers).float() for shape in shapes)
    rows = torch.cat([is_masked.flatten().nonzero().flatten().flip(0), torch.full((2,), -1)])
    options = {"mask_id": MASK, "seed": 1, "choice_temperature": 1.0, "step": 3, "sample_offset": 4, **options}
    expected = door.demask_step(F.linear(scale * embeddings, weight, bias), ids, is_masked, 2, **options)
    compact = embeddings.flatten(0, 1)[rows]
    for given, listed in ((embeddings, None), (embeddings, rows), (compact, rows)):
        logits = LinearLogits(given, weight, bias, scale)
        out = door.demask_step(logits, ids, is_masked, 2, row_indices=listed, **options)
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))


@pytest.mark.parametrize("is_compact", [True, False])
@pytest.mark.slow
def test_a_step_behind_a_head_compiles_whole(kernel, is_compact):
    def step(embeddings, weight, ids, is_masked, rows):
        logits = LinearLogits(embeddings, weight, scale=2.0)
        return functional.demask_step(
            logits, ids, is_masked, 2, mask_id=MASK, seed=1, row_indices=rows, backend="triton", top_k=3
        )

    (ids, is_masked), rows = some_masked(2, 4), torch.tensor([0, 1, 2, 4, 5, -1])
    embeddings = draw(6, 8) if is_compact else draw(2, 4, 8)
    arguments = [x.to(kernel.device) for x in (embeddings, draw(12, 8, seed=1), ids, is_masked, rows)]
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(compiled(*arguments), step(*arguments), strict=True):
        assert torch.equal(ours, theirs)


# ---- a sequence does not depend on its batch ----


@pytest.mark.parametrize(
    "options",
    [{"temperature": 0.7, "top_k": 32, "choice_temperature": 2.0}, {"top_p": 0.9, "threshold": 0.2}],
    ids=str,
)
@pytest.mark.slow_interpreted
def test_a_sequence_steps_alike_alone_and_in_any_batch(door, options):
    """Bit for bit: alone, among seven, and in the second of two parts."""
    (ids, is_masked), logits = some_masked(7, 2, share=0.8), draw(7, 2, 64, seed=3)
    figures = {"with_margin": True, "with_entropy": True}

    def step(part):
        given = {"mask_id": MASK, "seed": 1, "step": 2, "sample_offset": 40 + part.start, **options}
        return door.demask_step(logits[part], ids[part], is_masked[part], 1, **given)[:3]

    def sample(part):
        given = {name: options[name] for name in ("temperature", "top_k", "top_p") if name in options}
        return door.sample_tokens(logits[part], seed=1, sample_offset=40 + part.start, **figures, **given)

    for function in (step, sample):
        whole = function(slice(0, 7))
        for part in (slice(4, 5), slice(3, 7)):
            for ours, theirs in zip(function(part), whole, strict=True):
                assert torch.equal(ours, theirs[part])


@pytest.mark.parametrize("vocabulary", [63, 4101])
def test_where_rows_begin_anywhere_only_rounding_depends_on_the_batch(door, vocabulary):
    """A kernel sums a row in another order where its address is not a multiple of 16 bytes."""
    (ids, is_masked), logits = some_masked(4, 2, share=9.0), draw(4, 2, vocabulary, seed=3)
    options = {"mask_id": MASK, "seed": 1, "temperature": 0.7}
    whole = door.demask_step(logits, ids, is_masked, 1, **options)
    for b in (1, 3):
        parts = [x[b : b + 1].clone() for x in (logits, ids, is_masked)]
        alone = door.demask_step(*parts, 1, sample_offset=b, **options)
        assert torch.equal(alone.ids[0], whole.ids[b])
        assert torch.equal(alone.is_masked[0], whole.is_masked[b])
        torch.testing.assert_close(alone.log_probs[0], whole.log_probs[b], rtol=1e-6, atol=1e-6)
