"""A coin for each position: its law, what it depends on, and the kernel against the reference."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from graph_recorder import WAITS
from sampling import Door, assert_independent, assert_law
from scipy import stats
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from fastmask import _streams as streams
from fastmask import functional
from fastmask.records import Draws
from fastmask.reference import philox

OPERATION = "select_at_random"
EVERYWHERE = torch.ones(6, 300, dtype=torch.bool)


@pytest.fixture
def door(backend):
    return Door(backend)


@pytest.fixture
def law_door(reference):
    """Laws are shown on the reference; a kernel is held to it position by position."""
    return Door(reference)


def random(*shape, seed=0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def uniforms(batch, length, seed, step=0, sample_offset=0) -> list[list[int]]:
    """The 64-bit integers of each position, as docs/randomness.md has them."""
    sample = torch.arange(batch)[:, None] + sample_offset
    high, low, _, _ = philox.draw(
        torch.tensor(seed), streams.SELECTION, step, sample=sample, position=torch.arange(length)
    )
    pairs = zip(high.tolist(), low.tolist(), strict=True)
    return [[h * 2**32 + w for h, w in zip(*row, strict=True)] for row in pairs]


# ---- the law ----


@pytest.mark.ptx
def test_each_position_by_its_own_64_bits(door):
    """Probabilities next to the uniforms themselves, and such as no uniform of 32 bits tells from 0 or each other."""
    drawn = uniforms(4, 100, seed=5, step=3, sample_offset=7)
    near = np.array([[u / 2**64 for u in row] for row in drawn], dtype=np.float32)
    tiny = np.array([0.0, 1e-45, 1e-30, 1e-19, 1e-9, 2.0**-33, 1 - 2.0**-24, 1.0], dtype=np.float32)
    for p in (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(1)), np.resize(tiny, (4, 100))):
        selected = door.select_at_random(
            torch.ones(4, 100).bool(), torch.from_numpy(p), seed=5, step=3, sample_offset=7
        )
        expected = [
            [u < math.ceil(Fraction(float(p)) * 2**64) for u, p in zip(*rows, strict=True)]
            for rows in zip(drawn, p, strict=True)
        ]
        assert selected.tolist() == expected


@pytest.mark.parametrize("p", [1e-9, 2.0**-33, 1e-19, 1e-30])
def test_a_small_probability_is_not_rounded_to_none(reference, monkeypatch, p):
    """It selects the least of all uniforms, and of the next ones as many as it is of 2^64."""
    last = math.ceil(Fraction(float(np.float32(p))) * 2**64)
    ends = torch.tensor([[0, last - 1, last, last + 1]])
    words = ends >> 32, ends & 0xFFFFFFFF, ends, ends
    monkeypatch.setattr(reference.module(OPERATION).philox, "draw", lambda *a, **k: words)
    selected = Door(reference).select_at_random(torch.ones(1, 4).bool(), p, seed=0)
    assert selected.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("p", [1e-5, 1e-3, 0.1, 1 / 3, 0.5, 0.9, 0.999])
def test_as_many_as_the_probability_says(law_door, p):
    eligible = torch.ones(600, 500).bool()
    number = law_door.select_at_random(eligible, p, seed=1).sum().item()
    assert stats.binomtest(number, eligible.numel(), p).pvalue > 1e-4
    if p > 0.01:  # of rarer ones there are too few to tell
        assert stats.binomtest(number, eligible.numel(), min(1.0, p * 1.1)).pvalue < 1e-4


def test_subsets_of_positions_are_independent_coins(law_door):
    """All 16 subsets of four positions, each of another probability, over samples, steps and seeds."""
    p = torch.tensor([0.2, 0.5, 0.7, 0.4])
    weights = torch.tensor([1, 2, 4, 8])
    law = [math.prod(q if i >> j & 1 else 1 - q for j, q in enumerate(p.tolist())) for i in range(16)]
    options = [{"seed": 2}, *({"seed": 3, "step": step} for step in range(9)), {"seed": 2**40}]
    drawn = [law_door.select_at_random(torch.ones(30_000, 4).bool(), p.expand(30_000, 4), **o) for o in options]
    subsets = [(each * weights).sum(-1).numpy() for each in drawn]
    for each in subsets:
        assert_law(np.bincount(each, minlength=16), law)
    for one, other in itertools.pairwise(subsets):  # of the same samples
        assert_independent(one, other, 16, 16)
    assert_independent(subsets[0][1:], subsets[0][:-1], 16, 16)


def test_neither_positions_nor_samples_are_preferred(law_door):
    selected = law_door.select_at_random(torch.ones(3000, 64).bool(), 0.3, seed=4).numpy()
    for groups in (selected.T, selected.reshape(100, 30 * 64)):
        num, size = groups.shape
        squares = ((groups.sum(1) - size * 0.3) ** 2 / (size * 0.3 * 0.7)).sum()
        assert 1e-4 < stats.chi2.sf(squares, num) < 1 - 1e-4


def test_a_higher_probability_selects_more_of_the_same(door):
    select = partial(door.select_at_random, EVERYWHERE, seed=1)
    few, many = select(0.3), select(0.6)
    assert not (few & ~many).any()
    assert few.sum() < many.sum()


# ---- what it depends on ----


def test_it_follows_seed_step_and_sample(door):
    p = random(6, 300)

    def select(rows=slice(None), **options):
        return door.select_at_random(EVERYWHERE[rows], p[rows], **{"seed": 1, **options})

    whole = select()
    assert torch.equal(whole, select())
    parts = [select(slice(first, last), sample_offset=first) for first, last in ((0, 1), (1, 4), (4, 6))]
    assert torch.equal(whole, torch.cat(parts))
    for other in ({"seed": 2}, {"seed": 1 + 2**32}, {"step": 1}, {"sample_offset": 6}):
        assert 0.2 < (whole != select(**other)).float().mean() < 0.5
    assert torch.equal(whole[:, :9], door.select_at_random(EVERYWHERE[:, :9], p[:, :9], seed=1))


def test_what_is_not_eligible_changes_nothing_else(door):
    eligible = random(6, 300) < 0.4
    assert torch.equal(
        door.select_at_random(eligible, 0.5, seed=1), eligible & door.select_at_random(EVERYWHERE, 0.5, seed=1)
    )


def test_its_numbers_are_no_other_draws(law_door):
    """Noise and selection of one seed and step: a large noise says nothing of the coin."""
    noise = law_door.critic_remask_keys(torch.zeros(300, 100), noise_scale=1.0, seed=1, step=2)
    selected = law_door.select_at_random(torch.ones(300, 100).bool(), 0.5, seed=1, step=2)
    assert_independent((noise > noise.median()).flatten().int(), selected.flatten().int(), 2, 2)


@pytest.mark.parametrize("kind", ["number", "sequence", "column", "position"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_a_probability_of_all_of_each_sequence_or_of_each_position(door, kind, dtype):
    """Each the same as that of each position, written out in float32."""
    p = {"number": 0.3, "sequence": random(6), "column": random(6, 1), "position": random(6, 300)}[kind]
    p = p if kind == "number" else p.to(dtype)
    each = torch.tensor(p) if kind == "number" else p.float()
    each = (each[:, None] if kind == "sequence" else each).expand(6, 300).contiguous()
    chosen = door.select_at_random(EVERYWHERE, p, seed=9)
    assert chosen.dtype == torch.bool
    assert torch.equal(chosen, door.select_at_random(EVERYWHERE, each, seed=9))
    assert 0.2 < chosen.float().mean() < 0.8


@pytest.mark.parametrize("shape", [(1, 1), (1, 513), (3, 700), (2, 4099)], ids=str)
def test_the_kernel_selects_as_the_reference(kernel, shape):
    eligible, p = random(*shape, seed=1) < 0.8, random(*shape)
    for probability in (0.37, p, p[:, 0]):
        options = {"seed": -3, "step": 2**24 - 1, "sample_offset": 2**32 - 1}
        expected = functional.select_at_random(eligible, probability, backend="reference", **options)
        assert torch.equal(Door(kernel).select_at_random(eligible, probability, **options), expected)


@pytest.mark.ptx
def test_strides_are_followed(door):
    eligible, p = random(300, 6) < 0.5, random(300, 12)
    whole = door.select_at_random(eligible.T.contiguous(), p.T[::2].contiguous(), seed=1)
    assert torch.equal(whole, door.select_at_random(eligible.T, p.T[::2], seed=1))
    assert whole.any()
    eligible, p = random(1, 300).expand(6, -1) < 0.5, random(1, 300)
    same = door.select_at_random(eligible.contiguous(), p.repeat(6, 1), seed=1)
    assert torch.equal(same, door.select_at_random(eligible, p.expand(6, -1), seed=1))


# ---- edges ----


def test_certain_and_impossible(door):
    eligible = random(6, 300) < 0.5
    for p, expected in ((0, False), (0.0, False), (1, True), (1.0, True)):
        assert torch.equal(door.select_at_random(eligible, p, seed=1), eligible & expected)
        each = torch.full((6, 300), float(p))
        assert torch.equal(door.select_at_random(eligible, each, seed=1), eligible & expected)


@pytest.mark.parametrize(
    ("value", "selects"), [(math.nan, False), (-0.5, False), (-math.inf, False), (1.5, True), (math.inf, True)]
)
def test_values_that_are_no_probabilities(door, value, selects):
    """Not read at the door: nothing or everything, and not at other positions."""
    p = torch.full((6, 300), 0.5)
    p[:, ::2] = value
    chosen = door.select_at_random(EVERYWHERE, p, seed=1)
    assert (chosen[:, ::2] == selects).all()
    assert torch.equal(chosen[:, 1::2], door.select_at_random(EVERYWHERE, 0.5, seed=1)[:, 1::2])
    assert (door.select_at_random(EVERYWHERE, torch.full((6,), value), seed=1) == selects).all()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0), (0, 0), (0, 1)], ids=str)
def test_nothing_to_select_from(door, shape):
    eligible = torch.ones(shape, dtype=torch.bool)
    for p in (0.5, torch.ones(shape), torch.ones(shape[0]), torch.ones(shape[0], 1)):
        chosen = door.select_at_random(eligible, p, seed=1)
        assert chosen.shape == shape
        assert chosen.dtype == torch.bool


def test_inputs_are_not_written(door):
    eligible, p, seed = random(6, 300) < 0.5, random(6, 300), torch.tensor(3)
    before = eligible.clone(), p.clone(), seed.clone()
    chosen = door.select_at_random(eligible, p, seed=seed)
    assert all(torch.equal(x, y) for x, y in zip(before, (eligible, p, seed), strict=True))
    assert chosen.data_ptr() != eligible.data_ptr()


def test_a_probability_with_gradient_is_used_without(door):
    p = torch.full((6, 300), 0.5, requires_grad=True)
    assert torch.equal(
        door.select_at_random(EVERYWHERE, p, seed=1), door.select_at_random(EVERYWHERE, p.detach(), seed=1)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_the_default_dtype_does_not_reach_it(door, dtype):
    select = partial(door.select_at_random, torch.ones(60, 300).bool(), seed=1)
    given = 0.75024, random(60)  # the first is .75 in float16
    expected = [select(p) for p in given]
    torch.set_default_dtype(dtype)
    try:
        found = [select(p) for p in given]
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert not torch.equal(expected[0], select(0.75))


# ---- the door ----


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "expected eligible of dtype bool, received int64; convert", (EVERYWHERE.long(), 0.5)),
        (TypeError, "expected eligible to be a torch.Tensor, received list", ([True], 0.5)),
        (ValueError, r"expected eligible with 2 dimensions, received shape \(300,\)", (EVERYWHERE[0], 0.5)),
        (ValueError, r"expected probability in \[0, 1\], received 1.5", (EVERYWHERE, 1.5)),
        (ValueError, r"expected probability in \[0, 1\], received -0.1", (EVERYWHERE, -0.1)),
        (ValueError, r"expected probability in \[0, 1\], received nan", (EVERYWHERE, math.nan)),
        (TypeError, "expected probability to be a number, received str", (EVERYWHERE, "0.5")),
        (TypeError, "expected probability to be a number, received bool", (EVERYWHERE, True)),
        (TypeError, "expected probability to be a number, received NoneType", (EVERYWHERE, None)),
        (TypeError, "expected probability of dtype .*, received int64; convert", (EVERYWHERE, torch.ones(6).long())),
        *(
            (
                ValueError,
                rf"of shape \[B\], \[B, 1\] or \[B, N\] with B = 6 and N = 300, received {wrong}; expand it",
                (EVERYWHERE, torch.ones(shape)),
            )
            for shape, wrong in (
                ([], r"\[\]"), ([300], r"\[300\]"), ([1, 300], r"\[1, 300\]"), ([5, 1], r"\[5, 1\]"),
                ([6, 299], r"\[6, 299\]"), ([1], r"\[1\]"), ([6, 300, 1], r"\[6, 300, 1\]"),
            )
        ),
        (
            ValueError, "all tensors on one device, received eligible on cpu, probability on meta",
            (EVERYWHERE, torch.ones(6, device="meta")),
        ),
    ],
    ids=lambda value: value[:50] if isinstance(value, str) else "",
)  # fmt: skip
def test_refusals(error, message, arguments):
    with pytest.raises(error, match=message):
        functional.select_at_random(*arguments)


@pytest.mark.parametrize("option", [{"step": -1}, {"step": 2**24}, {"sample_offset": -1}, {"seed": 2**64}], ids=str)
def test_draws_are_checked(option):
    with pytest.raises(ValueError, match=f"expected {next(iter(option))} of at least"):
        functional.select_at_random(EVERYWHERE, 0.5, **option)


def test_seeds_are_drawn_where_none_is_given():
    torch.manual_seed(0)
    first, second = (functional.select_at_random(EVERYWHERE, 0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, functional.select_at_random(EVERYWHERE, 0.5))
    ours = [functional.select_at_random(EVERYWHERE, 0.5, generator=torch.Generator().manual_seed(7)) for _ in "ab"]
    assert torch.equal(*ours)


# ---- how it is run ----


class NoWaits(TorchDispatchMode):
    """Refuses what a host would have to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in WAITS, func
        return func(*args, **(kwargs or {}))


def test_nothing_waits_for_the_device(reference):
    """Nor does the reference on tensors that have no values at all."""
    with NoWaits():
        for p in (0.3, random(6), random(6, 300)):
            functional.select_at_random(EVERYWHERE, p, seed=torch.tensor(1), backend="reference")
            functional.select_at_random(EVERYWHERE, p, backend="reference")
    eligible = torch.ones(3, 4, dtype=torch.bool, device="meta")
    assert functional.select_at_random(eligible, torch.ones(3, device="meta")).device.type == "meta"


def test_one_launch(kernel, monkeypatch):
    launched, launch = [], kernel.module("_launch").launch
    monkeypatch.setattr(
        kernel.module("_launch"), "launch", lambda *given, **named: launched.append(given) or launch(*given, **named)
    )
    for number, p in enumerate((0.3, random(6), random(6, 300)), start=1):
        Door(kernel).select_at_random(EVERYWHERE, p, seed=1)
        assert len(launched) == number


@pytest.mark.parametrize("p", [0.3, random(2, 1).expand(2, 9)], ids=["number", "tensor"])
def test_the_kernel_is_a_torch_operation(kernel, p):
    """torch's own checks: schema, fake tensors and tracing."""
    operator = kernel.operation(OPERATION)
    number, values = (None, p) if isinstance(p, torch.Tensor) else (p, None)
    flat = operator.signature.flat([random(2, 9) < 0.5, number, values, Draws(torch.tensor(5), 7, 2)])
    flat = [x.to(kernel.device) if isinstance(x, torch.Tensor) else x for x in flat]
    torch.library.opcheck(operator.overload, tuple(flat))


def step(ids, probability, **options):
    """A step of a loop, whose number moves on."""
    eligible = ids % 3 > 0
    p = probability if probability is None or isinstance(probability, float) else probability(ids)
    return functional.select_at_random(eligible, p, seed=1, **options)


PROBABILITIES = {
    "number": 0.4,
    "sequence": lambda ids: ids[:, 0].float().sin().abs(),
    "position": lambda ids: ids.float().sin().abs(),
}


@pytest.mark.parametrize("kind", PROBABILITIES)
def test_it_compiles_whole_at_any_batch_size_and_step(backend, kind):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    run = partial(step, backend="triton" if backend.is_kernel else "reference")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for number, batch in enumerate((5, 3, 7, 2), start=1):
        ids = torch.arange(batch * 4, device=backend.device).view(batch, 4)
        given = ids, PROBABILITIES[kind]
        assert torch.equal(compiled(*given, step=number), run(*given, step=number))
    assert counter.frame_count <= 2
