"""The generator: Random123's known answers, kernel and reference bit for bit, and the laws of what is drawn."""

from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch
from scipy import stats

from fastmask import _streams as streams
from fastmask.reference import philox

WORD = 2**32 - 1
KNOWN_ANSWERS = {
    "zeros": ((0,) * 6, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    "ones": ((WORD,) * 6, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344, 0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
}
ALL_STREAMS = [
    value for name, value in vars(streams).items() if name.isupper() and name not in ("STEP_BITS", "TILE", "SUB_TILE")
]

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    from fastmask.kernels import philox as device_philox

    @triton.jit
    def _draw_kernel(seed_ptr, counter_ptr, out_ptr, n, STREAM: tl.constexpr, COUNT: tl.constexpr):
        # One program draws COUNT counters; out: four words, a uniform's bits times 2**24, an integer below n.
        offs = tl.arange(0, COUNT)
        element = tl.load(counter_ptr + offs)
        position = tl.load(counter_ptr + COUNT + offs)
        sample = tl.load(counter_ptr + 2 * COUNT + offs)
        step = tl.load(counter_ptr + 3 * COUNT + offs)
        words = device_philox.draw(tl.load(seed_ptr), STREAM, sample, position, element, step)
        for i in tl.static_range(4):
            tl.store(out_ptr + i * COUNT + offs, words[i])
        tl.store(out_ptr + 4 * COUNT + offs, (device_philox.uniform(words[0]) * 16777216.0).to(tl.int64))
        tl.store(out_ptr + 5 * COUNT + offs, device_philox.below(n, words[1], words[2]))


def draw_in_kernel(device, seed, stream, *, element, position, sample, step, n=1):
    """[6, COUNT] int64: the rows that ``_draw_kernel`` names, for coordinates [COUNT] int64."""
    counter = torch.stack([element, position, sample, step]).to(device)
    count = counter.shape[1]
    out = torch.empty(6, count, dtype=torch.int64, device=device)
    _draw_kernel[(1,)](torch.tensor(seed, device=device), counter, out, n, STREAM=stream, COUNT=count)
    return out.cpu()


def signed(bits: int) -> int:
    """64 bits as an int64."""
    return bits - 2**64 if bits >= 2**63 else bits


def pair(high: int, low: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([high]), torch.tensor([low])


def random_words(shape, seed=0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 2**32, shape))


@pytest.mark.parametrize("case", KNOWN_ANSWERS)
def test_reference_gives_the_known_answers(case):
    words, answer = KNOWN_ANSWERS[case]
    assert tuple(word.item() for word in philox.philox4x32(*(torch.tensor(w) for w in words))) == answer


@pytest.mark.parametrize("case", KNOWN_ANSWERS)
def test_draw_gives_the_known_answers(backend, case):
    (c0, c1, c2, c3, k0, k1), answer = KNOWN_ANSWERS[case]
    seed, stream, step = signed(k1 << 32 | k0), c3 >> streams.STEP_BITS, c3 % 2**streams.STEP_BITS
    if backend.is_kernel:
        element, position, sample, step = (torch.tensor([c]) for c in (c0, c1, c2, step))
        words = draw_in_kernel(
            backend.device, seed, stream, element=element, position=position, sample=sample, step=step
        )[:4]
    else:
        words = philox.draw(torch.tensor(seed), stream, step, sample=c2, position=c1, element=c0)
    assert tuple(int(word) for word in words) == answer


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), -987654321, 0x123456789ABCDEF])
@pytest.mark.parametrize("n", [1, 2, 50257, 2**31])
def test_kernel_equals_reference(kernel, seed, n):
    # Coordinates beyond 32 bits count modulo 2**32 in both.
    rng = np.random.default_rng(abs(seed) % 1000)
    element, position, sample = torch.from_numpy(rng.integers(0, 2**40, (3, 256)))
    step = torch.from_numpy(rng.integers(0, 2**streams.STEP_BITS, 256))
    stream = int(rng.choice(ALL_STREAMS))
    drawn = draw_in_kernel(
        kernel.device, seed, stream, element=element, position=position, sample=sample, step=step, n=n
    )
    words = philox.draw(torch.tensor(seed), stream, step, sample=sample, position=position, element=element)
    uniform = (philox.uniform(words[0]).double() * 2**24).long()
    assert torch.equal(drawn, torch.stack([*words, uniform, philox.below(n, words[1], words[2])]))


def test_shapes_broadcast():
    seed = torch.tensor(3)
    block = philox.draw(seed, streams.KEYS, sample=torch.arange(3)[:, None], position=torch.arange(5))[0]
    one = philox.draw(seed, streams.KEYS, sample=2, position=4)[0]
    assert block.shape == (3, 5)
    assert block[2, 4] == one


@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1, -(2**63), 0x123456789ABCDEF])
def test_numbers_draw_what_tensors_do(seed):
    """Of a counter that is known the words are computed in Python's integers."""
    rng = np.random.default_rng(abs(seed) % 1000)
    for stream in ALL_STREAMS:
        element, position, sample, step = (int(x) for x in rng.integers(0, 2**streams.STEP_BITS, 4))
        coordinates = {"element": element, "position": position, "sample": -sample}
        tensors = {name: torch.tensor([value]) for name, value in coordinates.items()}
        numbers = philox.draw(torch.tensor(seed), stream, step, **coordinates)
        assert (
            torch.stack(numbers).tolist()
            == torch.cat(philox.draw(torch.tensor(seed), stream, step, **tensors)).tolist()
        )
        assert all(word.dtype == torch.int64 and word.shape == () for word in numbers)


COUNTERS = {
    "a row of ids": ((1, 33), (5, 1), (5, 1)),
    "ids of each row": ((5, 64), (5, 1), (5, 1)),
    "positions": ((), (257,), (3, 1)),
    "samples": ((), (), (6,)),
    "one number among others": ((2, 3), "number", ()),
    "ids alone": ((7,), "number", "number"),
    "more than are few": ((), (4097,), (9, 1)),
    "none": ((0,), (1,), ()),
}


@pytest.mark.parametrize("shapes", COUNTERS.values(), ids=list(COUNTERS))
def test_on_a_cpu_few_are_drawn_in_numpy_and_are_the_same(shapes, monkeypatch):
    rng = np.random.default_rng(0)
    numbers = [
        int(rng.integers(2**40)) if shape == "number" else torch.from_numpy(np.array(rng.integers(0, 2**40, shape)))
        for shape in shapes
    ]
    coordinates = dict(zip(("element", "position", "sample"), numbers, strict=True))

    def drawn(seed):
        words = philox.draw(torch.tensor(seed), streams.ELEMENT_RACE, 3, **coordinates)
        return torch.stack([*words, philox.exponential(*words[:2]).view(torch.int32).long()])

    seeds = (0, -1, 0x123456789ABCDEF)
    here = [drawn(seed) for seed in seeds]
    monkeypatch.setattr(philox._philox_in_numpy, "np", None)
    for seed, numbers in zip(seeds, here, strict=True):
        assert torch.equal(numbers, drawn(seed))


def test_counters_do_not_collide():
    """Every coordinate, stream and seed changes all four words; the last step of a stream stays in it."""
    seen = set()
    last = 2**streams.STEP_BITS - 1
    coordinates = torch.cartesian_prod(*[torch.arange(4)] * 3).unbind(1)
    draws = 0
    for seed in (0, 1, 2**32, -1):
        for stream in ALL_STREAMS:
            for step in (0, 1, last):
                element, position, sample = coordinates
                words = philox.draw(
                    torch.tensor(seed), stream, step, sample=sample, position=position, element=element
                )
                seen.update((words[0] << 31 ^ words[1]).tolist())
                draws += len(element)
    assert len(set(ALL_STREAMS)) == len(ALL_STREAMS)
    assert len(seen) == draws


@pytest.mark.parametrize(
    "neighbours",
    [
        ({"position": 0}, {"position": 1}),
        ({"element": 0}, {"element": 1}),
        ({"stream": streams.KEYS}, {"stream": streams.TIMES}),
        ({"step": 0}, {"step": 1}),
        ({"seed": 0}, {"seed": 1}),
    ],
    ids=lambda pair: next(iter(pair[0])),
)
def test_neighbouring_draws_are_independent(neighbours):
    """Contingency of the leading three bits of each word with each word of a neighbouring counter."""

    def words(seed=0, stream=streams.KEYS, step=0, **coordinates):
        sample = torch.arange(20000)
        return [w >> 29 for w in philox.draw(torch.tensor(seed), stream, step, sample=sample, **coordinates)]

    first, second = (words(**options) for options in neighbours)
    pairs = [(a, b) for a in first for b in second] + [(first[i], first[j]) for i in range(4) for j in range(i)]
    for a, b in pairs:
        table = torch.bincount(a * 8 + b, minlength=64).numpy()
        assert stats.chisquare(table).pvalue > 1e-3 / len(pairs)
        assert math.sqrt(stats.chisquare(table).statistic / table.sum()) < 0.08


def test_uniform():
    assert philox.uniform(torch.tensor([0, 255, 256, WORD])).tolist() == [0.0, 0.0, 2**-24, 1 - 2**-24]
    drawn = philox.uniform(random_words(100000))
    assert drawn.dtype == torch.float32
    assert stats.kstest(drawn.double().numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("n", [1, 2, 3, 50257, 2**31 - 1, 2**31])
def test_below_is_the_scaled_fraction(n):
    high, low = random_words((2, 1000), seed=n)
    expected = [((h << 32 | x) * n) >> 64 for h, x in zip(high.tolist(), low.tolist(), strict=True)]
    assert philox.below(n, high, low).tolist() == expected
    assert philox.below(n, *pair(0, 0)).item() == 0
    assert philox.below(n, *pair(WORD, WORD)).item() == n - 1


@pytest.mark.parametrize("n", [3, 7, 100])
def test_below_is_uniform(n):
    counts = torch.bincount(philox.below(n, *random_words((2, 100000), seed=n)), minlength=n)
    assert len(counts) == n
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


# Words at both ends, next to one half, and one for each power of two from either end.
EXTREMES = [
    (h, x)
    for h in {0, 1, 2**31 - 1, 2**31, WORD - 1, WORD} | {2**j for j in range(32)} | {WORD - 2**j for j in range(32)}
    for x in (0, 1, 2**31, WORD)
]


def exact_exponential(high: int, low: int) -> float:
    twice = (high << 32 | low) * 2 + 1  # the middle of a 2**-64 cell, in halves of it
    if twice < 2**64:
        return -math.log1p(-twice / 2**65)
    return -math.log((2**65 - twice) / 2**65)


@pytest.mark.parametrize("in_numpy", [True, False])
def test_exponential_is_exact_in_both_tails(in_numpy, monkeypatch):
    if not in_numpy:
        monkeypatch.setattr(philox._philox_in_numpy, "np", None)
    high, low = torch.tensor(EXTREMES).unbind(1)
    expected = torch.tensor([exact_exponential(h, x) for h, x in EXTREMES], dtype=torch.float64)
    drawn = philox.exponential(high, low)
    assert drawn.dtype == torch.float32
    assert ((drawn.double() - expected).abs() / expected).max() < 5e-7
    assert math.isclose(drawn.max().item(), 65 * math.log(2), rel_tol=1e-6)
    assert math.isclose(drawn.min().item(), 2**-65, rel_tol=1e-6)


def test_gumbel_is_exact_in_both_tails():
    high, low = torch.tensor(EXTREMES).unbind(1)
    expected = torch.tensor([-math.log(exact_exponential(h, x)) for h, x in EXTREMES], dtype=torch.float64)
    drawn = philox.gumbel(high, low)
    assert drawn.dtype == torch.float32
    assert ((drawn.double() - expected).abs() / expected.abs().clamp(min=1)).max() < 5e-7
    assert math.isclose(drawn.max().item(), 65 * math.log(2), rel_tol=1e-6)


@pytest.mark.parametrize(("transform", "law"), [("exponential", "expon"), ("gumbel", "gumbel_r")])
def test_exponential_and_gumbel_laws(transform, law):
    drawn = getattr(philox, transform)(*random_words((2, 100000))).double().numpy()
    assert stats.kstest(drawn, law).pvalue > 1e-3
    # The upper tail on its own: beyond e**-7 of the mass, conditioned on being there.
    start = getattr(stats, law).isf(math.exp(-7))
    tail = getattr(stats, law).sf(drawn[drawn > start]) / math.exp(-7)
    assert 50 < len(tail) < 150
    assert stats.kstest(tail, "uniform").pvalue > 1e-3
