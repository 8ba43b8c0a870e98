"""temperature, top_k, min_p and top_p of each sequence: what numbers give for each alone."""

from __future__ import annotations

import math
import random

import pytest
import torch
from oracles import draw, filtered
from sampling import Door

from fastmask import functional
from fastmask.functional import LinearLogits, Sampled

OPERATION = "sample_tokens"
FIGURES = {"with_margin": True, "with_entropy": True}
DTYPES = {"top_k": torch.int64}  # others are float64
NAN = math.nan


@pytest.fixture
def door(backend):
    return Door(backend)


def assert_same(door, ours, theirs, processed, **context):
    """Bit for bit; but in the interpreter a number is a float64 where figures are divided by T."""
    is_exact = not processed or door.backend.name != "interpreter"
    tolerance = {"rtol": 0.0, "atol": 0.0} if is_exact else {"rtol": 1e-6, "atol": 1e-6}
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) is (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance, equal_nan=True, msg=f"{context}: {a} {b}")


# ---- each sequence as alone, over random calls ----


def tensor_or_number(choices, values, batch, dtype):
    """None, a number, or (oftener) a tensor of one for each sequence."""
    kind = choices.random()
    if kind < 0.2:
        return None
    if kind < 0.35:
        return choices.choice(values)
    return torch.tensor([choices.choice(values) for _ in range(batch)], dtype=dtype)


def some_options(choices, batch, vocabulary):
    """Of which at least one is a tensor."""
    floats = choices.choice([torch.float32, torch.float64, torch.bfloat16])
    ks = [1, 2, 3, vocabulary - 1, vocabulary, choices.randint(1, vocabulary + 3)]
    integers = choices.choice([torch.int32, torch.int64])
    options = {
        "temperature": tensor_or_number(choices, [0.0, 0.5, 1.0, 1.0, 2.5, 0.3, 1e-3], batch, floats),
        "top_k": tensor_or_number(choices, [max(1, k) for k in ks], batch, integers),
        "min_p": tensor_or_number(choices, [0.0, 0.05, 0.3, 1.0], batch, floats),
        "top_p": tensor_or_number(choices, [0.0, 0.5, 0.9, 1.0, 1.0], batch, floats),
    }
    options = {name: value for name, value in options.items() if value is not None}
    if not any(isinstance(value, torch.Tensor) for value in options.values()):
        options["temperature"] = torch.full((batch,), 0.7)
    return options


def of_sequence(options, b):
    """The numbers of one sequence."""
    return {k: v[b].item() if isinstance(v, torch.Tensor) else v for k, v in options.items()}


def some_logits(choices, *shape):
    """[..., V] float32, with ties, and rows without a law."""
    seed = choices.randrange(2**31)
    logits = draw(*shape, seed=seed, scale=choices.choice([0.3, 2.0, 8.0]))
    if choices.random() < 0.3:
        logits = logits.round()
    if choices.random() < 0.3:
        logits[0, -1] = choices.choice([NAN, -math.inf, math.inf])
    if choices.random() < 0.3:
        logits[..., 1:] = logits[..., 1:].where(draw(*shape, seed=seed + 1)[..., 1:] > -0.5, -math.inf)
    return logits


def check_random_call(door, number, vocabularies):
    choices = random.Random(number)
    batch, length, vocabulary = choices.randint(1, 3), choices.randint(1, 3), choices.choice(vocabularies)
    logits = some_logits(choices, batch, length, vocabulary).to(choices.choice([torch.float32, torch.bfloat16]))
    own = some_options(choices, batch, vocabulary)
    shared = {
        "seed": choices.randrange(2**40),
        "step": choices.choice([0, 3]),
        "mask_id": choices.choice([None, 0, vocabulary - 1]),
        "processed": choices.random() < 0.5,
        "with_margin": choices.random() < 0.5,
        "with_entropy": choices.random() < 0.5,
    }
    if choices.random() < 0.3:
        shared["forbidden"] = torch.arange(vocabulary) % 3 == 1
    kept = torch.tensor([[choices.choice([-1, -1, 0, vocabulary - 1]) for _ in range(length)] for _ in range(batch)])
    has_kept = choices.random() < 0.3
    expected = [
        door.sample_tokens(
            logits[b : b + 1], **of_sequence(own, b), **shared, sample_offset=5 + b,
            **({"kept_ids": kept[b : b + 1]} if has_kept else {}),
        )
        for b in range(batch)
    ]  # fmt: skip
    expected = Sampled(*(None if x[0] is None else torch.cat(x) for x in zip(*expected, strict=True)))
    shared |= own | {"sample_offset": 5}
    context = {"processed": shared["processed"], "number": number, "own": own}
    layout = choices.choice(["all", "listed", "compact", "in place"])
    if layout == "all":
        shared |= {"kept_ids": kept} if has_kept else {}
        assert_same(door, door.sample_tokens(logits, **shared), expected, **context)
        return
    order = torch.tensor([*choices.sample(range(batch * length), batch * length), -1])
    rows = logits.flatten(0, 1)[order] if layout != "listed" else logits
    shared |= {"kept_ids": kept.flatten()[order]} if has_kept else {}
    shared |= {"row_indices": order} | ({} if layout == "listed" else {"seq_len": length})
    if layout == "in place":
        written = Sampled(*(None if x is None else torch.full_like(x, 7) for x in expected))
        assert_same(door, door.sample_tokens(rows, out=written, **shared), expected, **context)
        return
    out = door.sample_tokens(rows, **shared)
    assert out.ids[-1] == -1
    listed = Sampled(*(None if x is None else x.flatten()[order[:-1]] for x in expected))
    given = Sampled(*(None if x is None else x[:-1] for x in out))
    assert_same(door, given, listed, **context)


def test_each_sequence_as_alone_on_the_reference(reference):
    for number in range(30):
        check_random_call(Door(reference), number, [1, 2, 5, 64, 65, 200])


@pytest.mark.slow
def test_each_sequence_as_alone_on_the_reference_over_many_calls(reference):
    for number in range(30, 400):
        check_random_call(Door(reference), number, [1, 2, 5, 64, 65, 200, 4100])


@pytest.mark.parametrize("block", range(2))
@pytest.mark.slow_interpreted
def test_each_sequence_as_alone_on_the_kernel(kernel, block):
    for number in range(10 * block, 10 * block + 10):
        check_random_call(Door(kernel), number, [1, 2, 5, 64, 200, 2056, 4100])


# ---- a tensor filled with one number ----


ALIKE = [
    {"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.7}, {"top_k": 1}, {"top_k": 7}, {"min_p": 0.1},
    {"min_p": 0.0}, {"top_p": 0.6}, {"top_p": 1.0}, {"top_p": 0.0},
    {"temperature": 0.4, "top_k": 9, "min_p": 0.02, "top_p": 0.8},
]  # fmt: skip


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.parametrize("numbers", ALIKE, ids=str)
@pytest.mark.slow_interpreted
def test_one_number_for_all_gives_what_the_number_does(door, numbers, processed):
    """On a row of whole vectors, whose sub-tiles are summed as the tiles are, and on one of a few more logits."""
    for vocabulary in (72, 301):
        logits = draw(2, 2, vocabulary, seed=vocabulary, scale=2.0)
        options = {"seed": 4, "mask_id": 3, "processed": processed, **FIGURES}
        tensors = {k: torch.full((2,), v, dtype=DTYPES.get(k, torch.float64)) for k, v in numbers.items()}
        ours = door.sample_tokens(logits, **tensors, **options)
        assert_same(door, ours, door.sample_tokens(logits, **numbers, **options), processed)


@pytest.mark.parametrize("vocabulary", [40, 3000])
@pytest.mark.slow_interpreted
def test_a_share_of_1_keeps_what_no_sum_of_probabilities_shows(door, vocabulary):
    """Beside a sequence whose nucleus leaves it out; but not what k has left out before."""
    logits = torch.full((3, 1, vocabulary), -300.0)
    logits[..., [5, 7]] = torch.tensor([0.0, -200.0])
    options = {"top_p": torch.tensor([1.0, 1.0, 0.9]), "kept_ids": torch.tensor([[7], [8], [7]]), "seed": 0}
    for top_k, second in ((None, -300.0), (vocabulary, -300.0), (2, -math.inf)):
        own = {} if top_k is None else {"top_k": torch.full((3,), top_k)}
        out = door.sample_tokens(logits, **own, **options)
        assert out.log_probs.flatten().tolist() == [-200.0, second, -math.inf]


@pytest.mark.parametrize("own", [{"temperature": [0.0, 0.0]}, {"top_k": [1, 1]}], ids=str)
def test_the_argmax_is_the_lower_id_of_a_tie(door, own):
    for vocabulary in (72, 301):
        own = {k: torch.as_tensor(v) for k, v in own.items()}
        assert (
            door.sample_tokens(torch.zeros(2, 2, vocabulary), mask_id=0, **own, seed=1).ids.tolist() == [[1, 1]] * 2
        )


@pytest.mark.parametrize(
    ("vocabulary", "processed"), [(72, False), (72, True), (301, False), (301, True), (2056, True)]
)
@pytest.mark.ptx
@pytest.mark.slow_interpreted
def test_sequences_with_all_options_of_their_own(door, vocabulary, processed):
    """Greedy by T and by k, off altogether, everything at once; rows are searched in registers, and by passes."""
    own = {
        "temperature": torch.tensor([0.0, 1.0, 0.5, 0.7]),
        "top_k": torch.tensor([5, vocabulary, 1, 20]),
        "min_p": torch.tensor([0.1, 0.0, 0.5, 0.02]),
        "top_p": torch.tensor([0.5, 1.0, 0.5, 0.875]),
    }
    logits = draw(4, 1, vocabulary, seed=2, scale=2.0, dtype=torch.bfloat16)
    options = {"seed": 4, "mask_id": 3, "processed": processed, **FIGURES}
    ours = door.sample_tokens(logits, **own, **options)
    for b in range(4):
        alone = door.sample_tokens(logits[b : b + 1], **of_sequence(own, b), **options, sample_offset=b)
        assert_same(door, Sampled(*(x[b : b + 1] for x in ours)), alone, processed, sequence=b)


# ---- what numbers are refused for ----


def lawless(door, own, **options):
    """ids, log_probs and figures of two sequences of one position, of which id 0 may not be sampled."""
    logits = torch.tensor([[[9.0, 1.0, 3.0, 2.0]]]).expand(2, 1, 4)
    own = {k: torch.tensor(v) for k, v in own.items()}
    out = door.sample_tokens(logits, mask_id=0, seed=1, **own, **FIGURES, **options)
    return [None if x is None else x.flatten().tolist() for x in out]


@pytest.mark.parametrize("options", [{}, {"processed": True}, {"top_k": 1}], ids=str)
@pytest.mark.parametrize(
    "own",
    [
        *({"temperature": [0.0, wrong]} for wrong in (-1.0, -math.inf, NAN)),
        {"min_p": [1.0, NAN]},
        {"top_p": [0.0, NAN]},
    ],
    ids=str,
)
def test_what_is_no_law_gives_the_lowest_allowed_id_and_nan(door, own, options):
    """Whatever the others say; the neighbour is as ever."""
    ids, *figures = lawless(door, own, **options)
    assert ids == [2, 1]
    assert [math.isnan(second) for _, second in figures] == [True] * 3
    assert not any(math.isnan(first) for first, _ in figures)
    kept = torch.tensor([[3], [3]])
    ids, *figures = lawless(door, own, kept_ids=kept, **options)
    assert ids == [3, 3]
    assert math.isnan(figures[0][1])


@pytest.mark.slow_interpreted
def test_what_is_out_of_range_is_as_its_end(door):
    """k < 1 the argmax, ties to the lower id; shares outside of [0, 1]; an infinite temperature is the largest."""
    logits = torch.tensor([[[1.0, 7.0, 7.0, 2.0, -1.0]]]).expand(2, 4, 5)
    for own, ends in (
        ({"top_k": [0, -(2**62)]}, {"top_k": 1}),
        ({"top_k": [5, 2**62]}, {}),
        ({"min_p": [-1.0, -math.inf]}, {"min_p": 0.0}),
        ({"min_p": [1.5, math.inf]}, {"min_p": 1.0}),
        ({"top_p": [-1.0, -math.inf]}, {"top_p": 0.0}),
        ({"top_p": [1.5, math.inf]}, {"top_p": 1.0}),
        ({"temperature": [math.inf, 1e308]}, {"temperature": 1e308}),
    ):
        tensors = {k: torch.tensor(v, dtype=DTYPES.get(k, torch.float64)) for k, v in own.items()}
        for processed in (False, True):
            options = {"seed": 3, "processed": processed, "min_p": 1.0, "top_p": 0.9, **FIGURES}
            ours = door.sample_tokens(logits, **options | tensors)
            theirs = door.sample_tokens(logits, **{k: v for k, v in options.items() if k not in own} | ends)
            assert_same(door, ours, theirs, processed, own=own)
    assert (door.sample_tokens(logits, top_k=torch.tensor([0, 1]), seed=3).ids == 1).all()


def test_figures_are_of_each_sequences_law(reference):
    """Against float64, of what each sequence's filters leave at its temperature."""
    own = {
        "temperature": torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64),
        "top_k": torch.tensor([30, 12, 50]),
        "min_p": torch.tensor([0.01, 0.0, 0.2], dtype=torch.float64),
        "top_p": torch.tensor([0.9, 0.7, 1.0], dtype=torch.float64),
    }
    logits = draw(3, 4, 50, scale=2.0)
    out = Door(reference).sample_tokens(logits, **own, processed=True, seed=1, with_entropy=True)
    for b, row in [(b, n) for b in range(3) for n in range(4)]:
        numbers = of_sequence(own, b)
        z = torch.from_numpy(filtered(logits[b, row], **numbers)) / numbers["temperature"]
        law = z.softmax(-1)
        assert out.log_probs[b, row].item() == pytest.approx(law.log()[out.ids[b, row]].item(), abs=2e-6)
        assert out.entropies[b, row].item() == pytest.approx(torch.special.entr(law).sum().item(), abs=2e-6)


# ---- rows ----


def test_compact_rows_past_the_last_sequence_are_none(door):
    """Their options would lie outside of the tensors."""
    logits, rows = draw(6, 9), torch.tensor([0, 5, 6, 2**40, -1, 3])
    temperature = torch.tensor([0.0, 1.0])
    out = door.sample_tokens(logits, row_indices=rows, seq_len=3, temperature=temperature, seed=0)
    assert (out.ids == -1).tolist() == [False, False, True, True, True, False]
    assert out.log_probs[2:5].tolist() == [0.0] * 3
    assert out.ids[0] == logits[0].argmax()


@pytest.mark.slow_interpreted
def test_behind_a_head_and_of_no_sequences(door):
    logits = torch.eye(5).repeat(2, 1, 1)[:, :3]
    own = {"temperature": torch.tensor([0.0, 2.0]), "top_k": torch.tensor([5, 2])}
    head = LinearLogits(logits, torch.eye(5))
    ours = door.sample_tokens(head, **own, seed=2, **FIGURES)
    for b in range(2):
        one = head._replace(embeddings=logits[b : b + 1])
        alone = door.sample_tokens(one, **of_sequence(own, b), seed=2, sample_offset=b, **FIGURES)
        assert_same(door, Sampled(*(x[b : b + 1] for x in ours)), alone, False)
    none = {"temperature": torch.zeros(0), "top_k": torch.zeros(0, dtype=torch.int32)}
    assert door.sample_tokens(torch.zeros(0, 3, 5), **none, seed=0).ids.shape == (0, 3)
    out = door.sample_tokens(torch.zeros(0, 3, 5), row_indices=torch.tensor([0, -1]), **none, seed=0)
    assert out.ids.tolist() == [-1, -1]


@pytest.mark.slow_interpreted
def test_values_in_any_layout(door):
    logits = draw(3, 2, 12)
    values = torch.tensor([0.0, 9.0, 0.5, 9.0, 1.0, 9.0])
    expected = door.sample_tokens(logits, temperature=values[::2].clone(), seed=1)
    assert_same(door, door.sample_tokens(logits, temperature=values[::2], seed=1), expected, False)
    one = torch.tensor([3], dtype=torch.int32).expand(3)
    expected = door.sample_tokens(logits, top_k=3, seed=1)
    assert_same(door, door.sample_tokens(logits, top_k=one, seed=1), expected, False)


# ---- the door ----


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": torch.ones(3)}, ValueError, r"temperature of shape \[B\] = \[2\], received \[3\]"),
        ({"temperature": torch.tensor(1.0)}, ValueError, "temperature with 1 dimensions"),
        ({"temperature": torch.ones(2, 1)}, ValueError, "temperature with 1 dimensions"),
        ({"temperature": torch.ones(2).long()}, TypeError, "temperature of dtype float16"),
        ({"top_k": torch.ones(2)}, TypeError, "top_k of dtype int32|int64"),
        ({"min_p": torch.ones(2).bool()}, TypeError, "min_p of dtype float16"),
        ({"top_p": torch.ones(1)}, ValueError, r"top_p of shape \[B\] = \[2\]"),
        ({"top_p": torch.ones(2, device="meta")}, ValueError, "on one device, .*top_p on meta"),
    ],
    ids=str,
)
def test_the_door(options, error, message):
    with pytest.raises(error, match=message):
        functional.sample_tokens(torch.zeros(2, 3, 5), **options, seed=0)
    step = torch.zeros(2, 3, 5), torch.zeros(2, 3).long(), torch.ones(2, 3).bool(), 0
    with pytest.raises(error, match=message):
        functional.demask_step(*step, mask_id=4, **options, seed=0)


def test_the_door_of_compact_rows():
    """Of one length; of as many sequences as are written."""
    rows = {"row_indices": torch.arange(3), "seq_len": 3, "seed": 0}
    with pytest.raises(ValueError, match=r"top_p of shape \[B\] = \[2\], received \[3\]"):
        functional.sample_tokens(torch.zeros(3, 5), temperature=torch.ones(2), top_p=torch.ones(3), **rows)
    out = Sampled(torch.zeros(4, 3).long(), torch.zeros(4, 3))
    with pytest.raises(ValueError, match=r"temperature of shape \[B\] = \[4\], received \[2\]"):
        functional.sample_tokens(torch.zeros(3, 5), temperature=torch.ones(2), out=out, **rows)


def test_no_value_is_read():
    """Tensors on the meta device have none."""
    meta = {"device": "meta"}
    own = {"temperature": torch.ones(2, **meta), "top_k": torch.ones(2, dtype=torch.int64, **meta),
           "min_p": torch.ones(2, **meta), "top_p": torch.ones(2, **meta)}  # fmt: skip
    seed = torch.zeros((), dtype=torch.int64, **meta)
    for processed in (False, True):
        out = functional.sample_tokens(torch.zeros(2, 3, 9, **meta), **own, processed=processed, seed=seed, **FIGURES)
        assert out.ids.shape == (2, 3)


# ---- a step ----


@pytest.mark.parametrize("processed", [False, True])
@pytest.mark.slow_interpreted
def test_a_step_of_each_sequence_as_alone(door, processed):
    logits, ids = draw(3, 6, 40, scale=2.0), torch.arange(18).view(3, 6)
    is_masked = ids % 4 != 1
    own = {"temperature": torch.tensor([0.0, 0.5, 1.0]), "top_k": torch.tensor([40, 1, 8]),
           "min_p": torch.tensor([0.0, 0.5, 0.125]), "top_p": torch.tensor([0.5, 1.0, 0.75])}  # fmt: skip
    options = {"mask_id": 39, "seed": 6, "step": 2, "choice_temperature": 1.0, "score": "margin",
               "processed": processed}  # fmt: skip
    ours = door.demask_step(logits, ids, is_masked, 2, **own, **options)
    for b in range(3):
        one = slice(b, b + 1)
        alone = door.demask_step(
            logits[one], ids[one], is_masked[one], 2, **of_sequence(own, b), **options, sample_offset=b
        )
        assert torch.equal(ours.ids[one], alone.ids)
        assert torch.equal(ours.is_masked[one], alone.is_masked)
        torch.testing.assert_close(ours.log_probs[one], alone.log_probs, rtol=1e-6, atol=1e-6)
    listed = ours.row_indices[ours.row_indices >= 0]
    following, state = draw(3, 6, 40, seed=1), (ours.ids, ours.is_masked, 0)
    compact = following.flatten(0, 1)[listed]
    ours = door.demask_step(compact, *state, row_indices=listed, **own, **options)
    assert torch.equal(ours.ids, door.demask_step(following, *state, **own, **options).ids)
