"""The kernel samples what the reference samples, and is an operation of PyTorch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from oracles import draw
from sampling import Door, number_kept, probabilities, race

from fastmask import functional

OPERATION = "sample_tokens"


def random_row(random, vocabulary, dtype):
    """One row [V] of a random kind."""
    scale = float(random.choice([0.1, 1.0, 4.0]))
    row = draw(vocabulary, seed=int(random.integers(2**31)), scale=scale, dtype=dtype)
    kind = random.choice(["plain", "plain", "-inf", "one finite", "equal", "ties", "nan", "no law"])
    if kind == "-inf":
        row[:: random.integers(1, 4)] = -math.inf
    elif kind == "one finite":
        row[torch.arange(vocabulary) != random.integers(vocabulary)] = -math.inf
    elif kind == "equal":
        row[:] = row[0].clone()
    elif kind == "ties":
        row = row.round()
    elif kind == "nan":
        row[random.integers(vocabulary)] = math.nan
    elif kind == "no law":
        row[:] = -math.inf
    return row


def random_sampling(random, vocabulary):
    """Options of a random call, and which figures it asks for."""
    forbidden = [None, None, torch.from_numpy(random.random(vocabulary) < 0.3)][random.integers(3)]
    figures = {"with_margin": bool(random.integers(2)), "with_entropy": bool(random.integers(2))}
    return {
        "temperature": float(random.choice([0.0, 1e-3, 0.3, 1.0, 2.0])),
        "top_k": number_kept(random.choice([None, None, 0.3, 0.9]), vocabulary),
        "top_p": random.choice([None, None, 0.0, 0.5, 0.95]),
        "mask_id": random.choice([None, 0, vocabulary - 1, vocabulary]),
        "forbidden": forbidden,
        "step": int(random.integers(2**24)),
        "sample_offset": int(random.integers(2**31)),
        "seed": int(random.integers(2**62)),
    }, figures


def random_layout(random, row, place):
    """Where among two sequences of three the row lies: everywhere, listed with others that are none, or compact."""
    vocabulary = len(row)
    kind = random.choice(["dense", "listed", "compact"])
    if kind == "dense":
        return row.view(1, 1, vocabulary), {}, 0, (1, 1)
    listed = torch.tensor([-1, place, -1])
    if kind == "listed":
        logits = torch.full((2, 3, vocabulary), math.nan, dtype=row.dtype)
        logits[place // 3, place % 3] = row
        return logits, {"row_indices": listed}, 1, (2, 3)
    logits = torch.stack([torch.full_like(row, math.nan), row, row])
    return logits, {"row_indices": listed, "seq_len": 3}, 1, (2, 3)


def is_tie(row, position, sample, temperature, top_k, top_p, mask_id, forbidden, seed, step, **_):
    """Whether rounding may decide a row's id: two run level in its race, or an id is at the edge of the nucleus."""
    filters = {"top_k": top_k, "mask_id": mask_id, "forbidden": forbidden}
    if top_p is not None:
        mass = np.sort(probabilities(row, **filters))[::-1].cumsum()
        if np.abs(mass - top_p).min() < 1e-6:
            return True
    law = probabilities(row, temperature, top_p=top_p, **filters)
    return race(law, seed, position, sample, step)[1] > 1 - 1e-5


@pytest.mark.parametrize("block", range(12))
@pytest.mark.slow_interpreted
def test_the_kernel_samples_what_the_reference_samples(kernel, reference, block):
    """Twenty-five random calls, one row each: the same id, and figures to rounding. Where rounding decides ids may
    differ; they do nowhere today."""
    ties = 0
    for case in range(25 * block, 25 * block + 25):
        random = np.random.default_rng(case)
        edges = [2, 3, 5, 63, 64, 65, 4095, 4096, 4097, 5000, 9001]
        vocabulary = int(random.choice([random.choice(edges), round(math.exp(random.uniform(0.7, 8.5)))]))
        row = random_row(random, vocabulary, [torch.float32, torch.bfloat16, torch.float16, torch.float64][case % 4])
        options, figures = random_sampling(random, vocabulary)
        place = int(random.integers(6))
        logits, layout, index, shape = random_layout(random, row, place)
        in_place, has_kept = random.random() < 0.3, random.random() < 0.2
        written = [functional.Sampled(torch.full(shape, -7), torch.full(shape, 7.0)) for _ in range(2)]
        kept = torch.full(shape if not layout else (3,), int(random.integers(vocabulary)))
        results = [
            Door(backend).sample_tokens(
                logits, **options, **layout, kept_ids=kept if has_kept else None,
                **({"out": out} if in_place else figures),
            )
            for backend, out in zip((kernel, reference), written, strict=True)
        ]  # fmt: skip
        ours, theirs = results
        if torch.equal(ours.ids, theirs.ids):
            for a, b in zip(ours[1:], theirs[1:], strict=True):
                torch.testing.assert_close(a, b, rtol=4e-6, atol=2e-6, equal_nan=True, msg=f"case {case}: {a} {b}")
        else:
            position, sample = (place % 3, place // 3) if layout else (0, 0)
            assert options["temperature"] > 0, case
            assert is_tie(row, position, sample + options["sample_offset"], **options), case
            ties += 1
        if not in_place and layout:
            assert ours.ids[[0, 2]].tolist() == [-1, -1]
            assert not any(figure[[0, 2]].any() for figure in ours[1:] if figure is not None)
        elif layout:  # and nothing was written elsewhere
            assert (ours.ids.flatten() == -7).sum() == 5
            assert ours.ids.flatten()[place] != -7
            assert (ours.log_probs == 7).sum() == 5
        assert ours.ids.flatten()[min(place, len(ours.ids.flatten()) - 1) if in_place else index] < vocabulary
    assert ties <= 1


def test_a_tie_is_told_from_an_error():
    options = {"top_k": None, "top_p": None, "mask_id": None, "forbidden": None, "seed": 3, "step": 0}
    row = draw(2, seed=1)
    low, high = -40.0, 40.0  # where id 1 wins over id 0 or not
    for _ in range(60):
        row[1] = (low + high) / 2
        winner, _ = race(probabilities(row), 3, 0, 0, 0)
        low, high = (low, float(row[1])) if winner else (float(row[1]), high)
    assert is_tie(row, 0, 0, temperature=1.0, **options)
    row[1] += 1e-3
    assert not is_tie(row, 0, 0, temperature=1.0, **options)
    even = torch.zeros(4)
    assert is_tie(even, 0, 0, temperature=1.0, **{**options, "top_p": 0.5})
    assert not is_tie(even, 0, 0, temperature=1.0, **{**options, "top_p": 0.6})


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "options"),
    [
        (50257, torch.bfloat16, {"top_k": number_kept(0.7, 50257)}),
        (50257, torch.float32, {"top_p": 0.5, "with_margin": True, "with_entropy": True}),
        (50257, torch.float16, {"forbidden": range(0, 50257, 3), "with_margin": True, "with_entropy": True}),
        (70001, torch.float32, {"top_k": number_kept(0.7, 70001)}),
    ],
)
@pytest.mark.slow_interpreted
def test_the_kernel_samples_large_vocabularies_alike(kernel, reference, vocabulary, dtype, options):
    logits = draw(1, 1, vocabulary, seed=vocabulary, scale=2.0, dtype=dtype)
    options = {"temperature": 0.7, "mask_id": 50000, "seed": 9, **options}
    ours, theirs = (Door(backend).sample_tokens(logits, **options) for backend in (kernel, reference))
    assert torch.equal(ours.ids, theirs.ids)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=4e-6, atol=2e-6)


# Where rows begin and end at 16 bytes, the choice finds the sums of sub-tiles, up to 65536 ids; else it forms them.
@pytest.mark.ptx
@pytest.mark.parametrize(
    ("vocabulary", "temperature"), [(8, 0.7), (72, 1.0), (4096, 1.0), (8200, 0.7), (65536, 0.7), (65544, 0.7)]
)
@pytest.mark.slow_interpreted
def test_the_kernel_samples_rows_that_begin_anywhere_alike(kernel, reference, vocabulary, temperature):
    options = {"temperature": temperature, "top_k": vocabulary // 2, "mask_id": 3, "seed": 5}
    whole = draw(4 * vocabulary, seed=vocabulary, scale=2.0, dtype=torch.bfloat16).view(1, 4, vocabulary)
    shifted = torch.cat([whole.new_zeros(1), whole.flatten()])[1:].view_as(whole)
    expected = Door(reference).sample_tokens(whole, **options)
    for logits in (whole, shifted):
        ours = Door(kernel).sample_tokens(logits, **options)
        assert torch.equal(ours.ids, expected.ids)
        torch.testing.assert_close(ours.log_probs, expected.log_probs, rtol=4e-6, atol=2e-6)


def test_rows_past_2_to_the_31(kernel):
    """Rows so far apart that their offset does not fit 32 bits, over memory that is never touched."""
    try:
        memory = torch.from_numpy(np.empty(2**31 + 4096, dtype=np.float16))
    except MemoryError:
        pytest.skip("4 GiB of address space are not to be had")
    logits = memory.as_strided((2, 100), (2**31, 1))
    logits.copy_(draw(2, 100, seed=1))
    options = {"row_indices": torch.arange(2), "seq_len": 2, "seed": 3, "top_k": 50}
    far, near = (Door(kernel).sample_tokens(z, **options) for z in (logits, logits.clone()))
    assert torch.equal(far.ids, near.ids)


@pytest.mark.parametrize(
    "has_own", [False, pytest.param(True, marks=pytest.mark.slow_interpreted)], ids=["numbers", "of sequences"]
)
def test_the_kernel_is_a_torch_operation(kernel, has_own):
    """torch's own checks: schema, fake tensors and tracing."""
    written = torch.zeros(3).long(), torch.zeros(3), torch.zeros(3), torch.zeros(3)
    rows, draws = (torch.arange(3), 9, True, 3), (torch.tensor(5), 0, 2)
    sampling = 0.7, 35, 0.01, 0.9, 4, draw(70, seed=1) > 1, True, True, True
    floats, flags = torch.full((1,), 0.9), torch.zeros(1, dtype=torch.bool)
    own = floats, floats, torch.full((1,), 35, dtype=torch.int32), -floats, floats, flags, flags, ~flags
    own = own if has_own else (None,) * len(own)
    arguments = *written, draw(3, 70), *rows, *draws, *sampling, *own, None, False
    kernel.module("sample_tokens")
    arguments = [x.to(kernel.device) if isinstance(x, torch.Tensor) else x for x in arguments]
    torch.library.opcheck(torch.ops.fastmask.sample_tokens_.default, tuple(arguments))


def test_the_number_of_rows_compiles_once(kernel):
    """It differs at every step of a generation."""

    def sample(logits, rows):
        return functional.sample_tokens(logits, row_indices=rows, seq_len=9, seed=1, backend="triton").ids

    torch._dynamo.reset()
    compiled = torch.compile(sample, fullgraph=True, backend="aot_eager", dynamic=True)
    for number in (3, 5, 4):
        arguments = draw(number, 20).to(kernel.device), torch.arange(number, device=kernel.device)
        torch._dynamo.config.error_on_recompile = number != 3
        try:
            assert torch.equal(compiled(*arguments), sample(*arguments))
        finally:
            torch._dynamo.config.error_on_recompile = False
