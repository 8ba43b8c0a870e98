"""Masks: the laws on the reference, and the kernel against it bit for bit."""

from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._pytree import tree_map_only

from fastmask import _streams as streams
from fastmask import functional
from fastmask.records import Draws, MaskedTokens, Masking, RandomIds, ScheduleValues
from fastmask.reference import philox
from fastmask.reference.mask_sampling import draw_times, gate_counts

ALL_IDS = RandomIds()
FOREIGN = 1000  # a token outside every vocabulary below: where it still stands, a position was kept


def arguments(tokens, seed=0, *, counts=None, maskable=None, sample_offset=0, random_ids=ALL_IDS, **options):
    """Of an implementation; ``ratios`` may come without times and slopes."""
    values = {name: options.pop(name) for name in ("times", "ratios", "slopes") if name in options}
    if "ratios" in values:
        values = {"times": torch.zeros(len(tokens)), "slopes": -torch.ones(len(tokens)), **values}
    masking = Masking(**{"mask_id": 3, "num_tokens": 7, "global_batch_size": len(tokens), **options})
    draws = Draws(torch.as_tensor(seed), sample_offset)
    return tokens, draws, masking, ScheduleValues(**values), counts, maskable, random_ids


def sample(backend, tokens, seed=0, **options) -> MaskedTokens:
    """One call; tensors move to the backend's device."""
    given = tree_map_only(torch.Tensor, lambda x: x.to(backend.device), arguments(tokens, seed, **options))
    return tree_map_only(torch.Tensor, torch.Tensor.cpu, backend.operation("mask_sampling")(*given))


def foreign(batch: int, length: int, dtype=torch.int64) -> torch.Tensor:
    return torch.full((batch, length), FOREIGN, dtype=dtype)


def assert_law(counts, shares, alpha=1e-4, effect=0.06):
    """Observed counts follow the shares: a chi-square that does not reject, and a small effect besides.

    The effect size sqrt(chi2 / n) keeps the test honest where n is small: it must be large enough to tell.
    """
    counts, shares = np.asarray(counts, dtype=float), np.asarray(shares, dtype=float)
    assert counts[shares == 0].sum() == 0
    counts, shares = counts[shares > 0], shares[shares > 0]
    result = stats.chisquare(counts, shares / shares.sum() * counts.sum())
    assert result.pvalue > alpha, (counts, shares)
    assert math.sqrt(result.statistic / counts.sum()) < effect, (counts, shares)


def seed_with_coins(keep: bool, replace: bool) -> int:
    """The first seed whose two coins fall so."""
    for seed in itertools.count():
        words = philox.draw(torch.tensor(seed), streams.COINS)
        if (words[0] < 2**31, words[1] < 2**31) == (keep, replace):
            return seed


BOTH_COINS = seed_with_coins(True, True)


# ---- times ----


@pytest.mark.parametrize("stratified", [False, True])
def test_times_are_uniform(reference, stratified):
    masking = Masking(mask_id=3, num_tokens=7, global_batch_size=4, stratified=stratified)
    times = torch.stack([draw_times(Draws(torch.tensor(seed)), 4, masking) for seed in range(1500)])
    assert times.dtype == torch.float32
    assert times.min() >= 0
    assert times.max() < 1
    for column in times.T:
        assert stats.kstest(column.double().numpy(), "uniform").pvalue > 1e-3


def test_times_of_a_batch_are_independent(reference):
    times = sample(reference, foreign(20000, 1)).times
    assert stats.kstest(times.double().numpy(), "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(times[1:], times[:-1])[0, 1]) < 4 / math.sqrt(20000)


def test_masks_of_times_that_require_a_gradient_carry_none(backend):
    times = torch.tensor([0.2, 0.7], requires_grad=True)
    out = backend.run(functional.mask_sampling, foreign(2, 9), mask_id=3, num_tokens=7, times=times, seed=1)
    assert not any(x.requires_grad for x in out)
    assert torch.equal(out.times, times)


@pytest.mark.parametrize("name", ["tokens", "times", "maskable"])
def test_torch_funcs_transforms_are_refused(backend, name):
    """Under vmap all samples would draw the same numbers."""
    given = {"tokens": foreign(2, 5), "times": torch.rand(2), "maskable": torch.ones(2, 5, dtype=torch.bool)}

    def masks(value):
        return backend.run(functional.mask_sampling, **{**given, name: value}, mask_id=3, num_tokens=7, seed=0)[1]

    with pytest.raises(RuntimeError, match=f"expected {name} to be a plain tensor, received one batched by"):
        torch.func.vmap(masks)(torch.stack([given[name]] * 3))


@pytest.mark.parametrize("world", [1, 3])
def test_stratified_times_fall_once_in_each_stratum(backend, world):
    rows = 4
    for seed in range(3):
        times = torch.cat(
            [
                sample(
                    backend, foreign(rows, 2), seed, stratified=True, sample_offset=5 * rows * world + rank * rows,
                    global_batch_size=rows * world,
                ).times
                for rank in range(world)
            ]
        )  # fmt: skip
        assert sorted((times.double() * rows * world).floor().tolist()) == list(range(rows * world))


# ---- counts ----


def upstream_counts(ratios: torch.Tensor, length: int) -> torch.Tensor:
    """x-transformers: positions whose rank is below (rand_probs * n).clamp(min = 1)."""
    return (torch.arange(length) < (ratios * length).clamp(min=1.0)[:, None]).sum(-1)


@pytest.mark.parametrize("length", [1, 3, 4, 18])
def test_counts_are_upstreams(backend, length):
    # Every multiple of 1/n with its two float32 neighbours, both ends, and what a careless schedule returns.
    grid = torch.arange(length + 1) / length
    ratios = [grid, grid.nextafter(torch.tensor(2.0)), grid.nextafter(torch.tensor(-1.0))]
    ratios = torch.cat([*ratios, torch.tensor([1e-8, 0.5, -0.1, 1.5])])
    output = sample(backend, foreign(len(ratios), length), ratios=ratios)
    assert torch.equal(output.counts, upstream_counts(ratios, length))
    assert torch.equal(output.is_masked.sum(-1), output.counts)
    assert torch.equal(output.counts, (ratios * length).ceil().long().clamp(1, length))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_drawn_times_give_their_schedules_counts_and_weights(backend, schedule):
    length = 30
    output = sample(backend, foreign(40, length), schedule=schedule)
    times = output.times.double()
    ratio = 1 - times if schedule == "linear" else torch.cos(times * math.pi / 2)
    slope = torch.ones_like(times) if schedule == "linear" else torch.sin(times * math.pi / 2) * math.pi / 2
    exact = ratio * length
    clear = (exact - exact.round()).abs() > 1e-4  # float32 decides which side the others fall
    assert clear.sum() > 30
    assert torch.equal(output.counts[clear], exact.ceil().clamp(min=1).long()[clear])
    torch.testing.assert_close(output.loss_weights.double(), slope * length / output.counts, rtol=2e-6, atol=1e-6)


def test_given_counts_are_kept_within_bounds(backend):
    counts = torch.tensor([-2, 0, 1, 4, 5, 9])
    output = sample(backend, foreign(6, 5), counts=counts)
    assert output.counts.tolist() == [0, 0, 1, 4, 5, 5]
    assert torch.equal(output.is_masked.sum(-1), output.counts)
    assert (output.loss_weights[:2] == 0).all()


# ---- which positions ----


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("with_maskable", [False, True])
def test_subsets_are_uniform(reference, count, with_maskable):
    rows, candidates = 20000, 5
    length = 8 if with_maskable else 5
    maskable = torch.zeros(rows, length, dtype=torch.bool)
    chosen = torch.tensor([1, 2, 4, 5, 7]) if with_maskable else torch.arange(5)
    maskable[:, chosen] = True
    options = {"maskable": maskable} if with_maskable else {}
    output = sample(reference, foreign(rows, length), counts=torch.full((rows,), count), **options)
    code = (output.is_masked[:, chosen] * 2 ** torch.arange(candidates)).sum(-1)
    observed = torch.bincount(code, minlength=2**candidates)
    assert_law(observed, [i.bit_count() == count for i in range(2**candidates)])


def test_rows_and_positions_are_independent(reference):
    """Any two positions of neighbouring rows, each masked half the time: four equal cells."""
    rows, length = 20000, 6
    ratios = torch.full((rows,), 0.5)
    masked = sample(reference, foreign(rows, length), ratios=ratios).is_masked.long()
    bernoulli = sample(reference, foreign(rows, length), ratios=ratios, bernoulli=True).is_masked.long()
    for first, second in [(masked[:-1], masked[1:]), (bernoulli[:-1], bernoulli[1:]), (masked, bernoulli)]:
        for i, j in itertools.product(range(length), repeat=2):
            assert_law(torch.bincount(2 * first[:, i] + second[:, j], minlength=4), [1] * 4, alpha=1e-5)
    for i, j in itertools.combinations(range(length), 2):
        assert_law(torch.bincount(2 * bernoulli[:, i] + bernoulli[:, j], minlength=4), [1] * 4, alpha=1e-5)


@pytest.mark.parametrize("ratio", [0.05, 0.5, 0.9])
def test_bernoulli_counts_are_binomial(reference, ratio):
    rows, length = 20000, 6
    output = sample(reference, foreign(rows, length), ratios=torch.full((rows,), ratio), bernoulli=True)
    assert torch.equal(output.counts, output.is_masked.sum(-1))
    assert_law(
        torch.bincount(output.counts, minlength=length + 1)[:4 if ratio < 0.1 else None],
        stats.binom.pmf(range(length + 1), length, ratio)[:4 if ratio < 0.1 else None],
    )  # fmt: skip
    assert_law(output.is_masked.sum(0), [1] * length)


def test_bernoulli_ends(backend):
    ratios = torch.tensor([0.0, 1.0, -0.5, 1.5])
    output = sample(backend, foreign(4, 70), ratios=ratios, bernoulli=True)
    assert output.counts.tolist() == [0, 70, 0, 70]
    assert output.loss_weights[[0, 1]].tolist() == [0.0, 1.0]


@pytest.mark.parametrize(("row", "position"), [(306706, 62), (918974, 43)])
def test_bernoulli_compares_all_32_bits(backend, row, position):
    """Two of 2**26 positions whose uniforms lie at the very ends: below 2**-26, and above 1 - 2**-25."""
    word = philox.draw(torch.tensor(0), streams.KEYS, sample=row, position=position)[3].item()
    assert word < 2**6 or word >= 2**32 - 2**7
    ends = (word * 2.0**-32, (word + 1) * 2.0**-32) if word < 2**6 else (1 - 2.0**-24, 1.0)
    for ratio, expected in zip(ends, (False, True), strict=True):
        output = sample(backend, foreign(1, 64), ratios=torch.tensor([ratio]), bernoulli=True, sample_offset=row)
        assert output.is_masked[0, position] == expected


@pytest.mark.parametrize("bernoulli", [False, True])
def test_only_maskable_positions_are_masked(backend, bernoulli):
    rows, length = 8, 40
    generator = torch.Generator().manual_seed(0)
    maskable = torch.rand(rows, length, generator=generator) < torch.linspace(0, 1, rows)[:, None]
    ratios = torch.linspace(0.05, 1.0, rows)
    gates = {"no_replace_prob": 0.3, "random_token_prob": 0.3}
    output = sample(
        backend, foreign(rows, length), BOTH_COINS, ratios=ratios, maskable=maskable, bernoulli=bernoulli, **gates
    )
    assert not (output.is_masked & ~maskable).any()
    assert (output.masked_ids[~output.is_masked] == FOREIGN).all()
    assert output.counts[0] == output.loss_weights[0] == 0
    assert output.counts[-1] == length
    if not bernoulli:
        num = maskable.sum(-1)
        assert torch.equal(output.counts, (ratios * num).ceil().long().clamp(min=1).minimum(num))


# ---- gating ----


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.15, 0.5, 1.0])
def test_gated_subsets_have_upstreams_sizes(probability):
    from x_transformers.nonautoregressive_wrapper import get_mask_subset_prob

    counts = torch.tensor([0, 1, 2, 7, 100])
    masked = torch.arange(120) < counts[:, None]
    upstream_kept = get_mask_subset_prob(masked, probability)
    coin = torch.tensor(True)
    kept, replaced = gate_counts(counts, coin, coin, probability, 0.1)
    assert torch.equal(kept, upstream_kept.sum(-1))
    upstream_replaced = get_mask_subset_prob(masked & ~upstream_kept, 0.1 * (1.0 - probability))
    assert torch.equal(replaced, upstream_replaced.sum(-1))
    kept, replaced = gate_counts(counts, ~coin, coin, 0.15, probability)
    assert kept.tolist() == [0] * 5
    assert torch.equal(replaced, get_mask_subset_prob(masked, probability).sum(-1))


def test_gate_counts_round_in_float32():
    coin = torch.tensor(True)
    kept, replaced = gate_counts(torch.tensor([0, 1, 2, 100]), coin, coin, 0.15, 0.1)
    assert kept.tolist() == [0, 1, 1, 16]  # float32(.15) * 100 is above 15
    assert replaced.tolist() == [0, 0, 1, 8]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("replace", [False, True])
def test_gates_split_the_masked_set(backend, keep, replace):
    counts = torch.tensor([0, 1, 2, 100])
    output = sample(
        backend, foreign(4, 110), seed_with_coins(keep, replace), counts=counts, no_replace_prob=0.15,
        random_token_prob=0.1,
    )  # fmt: skip
    visible = output.masked_ids
    kept = [0, 1, 1, 16] if keep else [0] * 4
    replaced = {(True, True): [0, 0, 1, 8], (False, True): [0, 1, 1, 10]}.get((keep, replace), [0] * 4)
    assert ((visible == FOREIGN) & output.is_masked).sum(-1).tolist() == kept
    assert ((visible < 7) & (visible != 3)).sum(-1).tolist() == replaced
    assert (visible == 3).sum(-1).tolist() == (counts - torch.tensor(kept) - torch.tensor(replaced)).tolist()
    assert output.is_masked.sum(-1).tolist() == counts.tolist()


def test_coins_are_fair_independent_and_shared_by_the_batch(reference):
    observed = np.zeros(4)
    for seed in range(1000):
        visible = sample(reference, foreign(2, 4), seed, counts=torch.full((2,), 4), no_replace_prob=0.3,
                         random_token_prob=0.3).masked_ids  # fmt: skip
        kept, replaced = (visible == FOREIGN).any(-1), ((visible != FOREIGN) & (visible != 3)).any(-1)
        assert kept[0] == kept[1]
        assert replaced[0] == replaced[1]
        observed[2 * int(kept[0]) + int(replaced[0])] += 1
    assert_law(observed, [1] * 4, effect=0.12)


def test_labels_are_a_uniform_permutation(reference):
    """With 1 kept, 1 random, 1 masked and 1 shown among 4 positions, all 24 arrangements are equally likely."""
    rows = 40000
    output = sample(
        reference, foreign(rows, 4), BOTH_COINS, counts=torch.full((rows,), 3), no_replace_prob=0.3,
        random_token_prob=0.5,
    )  # fmt: skip
    kept = output.is_masked & (output.masked_ids == FOREIGN)
    masked = output.is_masked & (output.masked_ids == 3)
    replaced = output.is_masked & ~kept & ~masked
    assert (kept.sum(-1) == 1).all()
    assert (replaced.sum(-1) == 1).all()
    label = kept + 2 * masked + 3 * replaced
    code = (label * 4 ** torch.arange(4)).sum(-1)
    assert_law(
        torch.bincount(code, minlength=256),
        [sorted(c // 4**i % 4 for i in range(4)) == [0, 1, 2, 3] for c in range(256)],
    )


@pytest.mark.parametrize(
    ("mask_id", "may_be_mask", "excluded"),
    [(0, False, 0), (3, False, 3), (6, False, 6), (3, True, None), (7, False, None), (50, True, None)],
)
def test_random_ids_are_uniform_over_the_allowed(reference, mask_id, may_be_mask, excluded):
    # Half the positions are masked, those with small keys: an id that shared the key's word would be small too.
    output = sample(
        reference, foreign(30000, 8), BOTH_COINS, counts=torch.full((30000,), 4), mask_id=mask_id,
        random_token_prob=1.0, random_may_be_mask=may_be_mask,
    )  # fmt: skip
    allowed = [i != excluded for i in range(7)]
    ids, masked = output.masked_ids, output.is_masked
    assert_law(torch.bincount(ids[masked], minlength=7), allowed)
    # Each position on its own, and a position with its neighbour.
    for column in range(8):
        assert_law(torch.bincount(ids[masked[:, column], column], minlength=7), allowed, alpha=1e-5)
    both = masked[:, :-1] & masked[:, 1:]
    pairs = 7 * ids[:, :-1][both] + ids[:, 1:][both]
    assert_law(torch.bincount(pairs, minlength=49), [a and b for a in allowed for b in allowed])


# ---- weights, lists, forms ----


@pytest.mark.parametrize("bernoulli", [False, True])
def test_loss_weights(backend, bernoulli):
    maskable = torch.ones(4, 20, dtype=torch.bool)
    maskable[1, 13:] = False
    ratios, slopes = torch.tensor([0.3, 0.7, 1.0, 0.9]), torch.tensor([-1.0, 0.2, -3.0, 0.0])
    output = sample(backend, foreign(4, 20), ratios=ratios, slopes=slopes, maskable=maskable, bernoulli=bernoulli)
    share = ratios if bernoulli else output.counts / maskable.sum(-1)
    assert (output.counts > 0).all()
    torch.testing.assert_close(output.loss_weights, slopes.abs() / share, rtol=3e-7, atol=0)
    assert output.loss_weights.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"bernoulli": True}, {"maskable": torch.arange(150).view(5, 30) % 7 > 1}])
def test_row_list(backend, options):
    output = sample(backend, foreign(5, 30), **options)
    flat = output.is_masked.flatten().nonzero().flatten()
    assert output.row_indices.tolist() == flat.tolist() + [-1] * (150 - len(flat))
    assert output.num_masked.item() == len(flat) == output.counts.sum()
    assert output.row_indices.dtype == output.num_masked.dtype == output.counts.dtype == torch.int64
    assert output.num_masked.shape == ()


@pytest.mark.parametrize("bernoulli", [False, True])
@pytest.mark.parametrize("stratified", [False, True])
def test_batch_split_does_not_matter(backend, bernoulli, stratified):
    tokens = torch.arange(60).view(6, 10) % 7
    options = {
        "bernoulli": bernoulli, "stratified": stratified, "global_batch_size": 6, "no_replace_prob": 0.2,
        "random_token_prob": 0.2,
    }  # fmt: skip
    whole = sample(backend, tokens, BOTH_COINS, sample_offset=18, **options)
    for cut in (1, 4):
        parts = [
            sample(backend, part, BOTH_COINS, sample_offset=18 + start, **options)
            for start, part in ((0, tokens[:cut]), (cut, tokens[cut:]))
        ]
        for field in ("masked_ids", "is_masked", "times", "counts", "loss_weights"):
            assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))


def test_seeds(backend):
    tokens = foreign(2, 40)
    outputs = [sample(backend, tokens, seed) for seed in (0, 1, -1, 2**40, 2**40 + 1, -(2**63))]
    assert torch.equal(outputs[0].is_masked, sample(backend, tokens, 0).is_masked)
    for first, second in itertools.combinations(outputs, 2):
        assert not torch.equal(first.is_masked, second.is_masked)


@pytest.mark.parametrize("bernoulli", [False, True])
def test_empty_batch(backend, bernoulli):
    output = sample(backend, foreign(0, 5, torch.int32), bernoulli=bernoulli, global_batch_size=1)
    assert output.masked_ids.shape == output.is_masked.shape == (0, 5)
    assert output.times.shape == output.counts.shape == output.loss_weights.shape == output.row_indices.shape == (0,)
    assert output.num_masked.item() == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "expanded"])
def test_tokens_of_any_layout(backend, dtype, layout):
    tokens = (torch.arange(60).view(3, 20) % 7).to(dtype)
    if layout == "expanded":
        tokens = tokens[:1].expand(3, -1).contiguous()
    options = {"no_replace_prob": 0.3, "random_token_prob": 0.3, "maskable": tokens != 5}
    expected = sample(backend, tokens, BOTH_COINS, **options)

    def lay_out(x):
        if layout == "transposed":
            return x.T.contiguous().T
        if layout == "sliced":
            return torch.cat([x, x], dim=1)[:, :20]
        return x[:1].expand(3, -1) if layout == "expanded" else x

    laid_out, options["maskable"] = lay_out(tokens), lay_out(options["maskable"])
    before = laid_out.clone()
    output = sample(backend, laid_out, BOTH_COINS, **options)
    assert output.masked_ids.dtype == dtype
    assert torch.equal(laid_out, before)
    assert all(torch.equal(a, b) for a, b in zip(output, expected, strict=True))


# ---- the kernel against the reference ----


def assert_equal_outputs(output: MaskedTokens, expected: MaskedTokens):
    for field, a, b in zip(MaskedTokens._fields, output, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), field
        assert torch.equal(a, b), (field, a, b)


def random_configuration(rng: random.Random, lengths: range, rows=(1, 1, 2, 3)):
    """tokens, seed and options of one call, drawn from everything that the operation accepts."""
    batch, length = rng.choice(rows), rng.choice(lengths)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    num_tokens = rng.choice([2, 3, 7, 257, 50257, 2**31 - 1])
    tokens = torch.randint(
        num_tokens, (batch, length), generator=generator, dtype=rng.choice([torch.int32, torch.int64])
    )
    options = {
        "schedule": rng.choice(["linear", "cosine"]),
        "mask_id": rng.choice([0, num_tokens // 2, num_tokens - 1, num_tokens]) % 2**31,
        "num_tokens": num_tokens,
        "bernoulli": rng.random() < 0.4,
        "stratified": rng.random() < 0.3,
        "no_replace_prob": rng.choice([0.0, 0.15, 1.0]),
        "random_token_prob": rng.choice([0.0, 0.1, 1.0]),
        "random_may_be_mask": rng.random() < 0.3,
        "gates_tokens": rng.random() < 0.3,
        "complement": rng.random() < 0.3,
        "sample_offset": rng.choice([0, 5, 2**31, 2**32 - 1]),
        "global_batch_size": rng.choice([batch, 3 * batch, 1000]),
    }
    if rng.random() < 0.4:
        options["maskable"] = torch.rand(batch, length, generator=generator) < rng.choice([0.0, 0.5, 1.0])
    if rng.random() < 0.4:
        times = torch.rand(batch, generator=generator)
        options |= {"times": times, "ratios": 1 - times**2, "slopes": -2 * times}
    if rng.random() < 0.3:
        options["counts"] = torch.randint(-1, length + 2, (batch,), generator=generator)
    if rng.random() < 0.3:
        ids = torch.randint(num_tokens, (9,), generator=generator)
        options["random_ids"] = RandomIds(ids, torch.tensor(rng.choice([0, 1, 5, 9])))
    return tokens, rng.randrange(-(2**63), 2**63), options


@pytest.mark.ptx
@pytest.mark.parametrize("block", range(10))
def test_kernel_equals_reference(kernel, reference, block):
    """160 random configurations; lengths reach past each row of the launch table that is quick to interpret."""
    rng = random.Random(block)
    for i in range(16):
        lengths = range(1, 20) if i < 7 else range(20, 140) if i < 12 else range(140, 620)
        tokens, seed, options = random_configuration(rng, lengths)
        assert_equal_outputs(sample(kernel, tokens, seed, **options), sample(reference, tokens, seed, **options))


@pytest.mark.parametrize("length", [1000, 1024, 4096, 4097, 9000])
def test_kernel_equals_reference_when_long(kernel, reference, length):
    rng = random.Random(length)
    for form in (
        {"bernoulli": False, "maskable": None},
        {"bernoulli": False, "maskable": torch.arange(2 * length).view(2, length) * 7 % 11 < 5},
        {"bernoulli": True},
    ):
        tokens, seed, options = random_configuration(rng, range(length, length + 1), rows=(2,))
        options |= form
        assert_equal_outputs(sample(kernel, tokens, seed, **options), sample(reference, tokens, seed, **options))


@pytest.mark.parametrize("form", ["drawn", "stratified", "ratios", "counts", "bernoulli", "complement"])
def test_kernel_counts_earlier_rows_block_by_block(kernel, reference, form, monkeypatch):
    """More rows than are counted at once."""
    monkeypatch.setattr(kernel.module("mask_sampling"), "_BLOCK_B", 4)
    tokens = foreign(10, 5)
    options = {
        "drawn": {},
        "stratified": {"stratified": True},
        "ratios": {"ratios": torch.linspace(0, 1, 10)},
        "counts": {"counts": torch.arange(10) % 7},
        "bernoulli": {"bernoulli": True},
        "complement": {"complement": True},
    }[form]
    assert_equal_outputs(sample(kernel, tokens, **options), sample(reference, tokens, **options))


def test_equal_keys_are_ordered_by_position(kernel, reference):
    """At 65536 positions two of 2**32 keys are often equal; the boundary is put between such two."""
    length = 65536
    for seed in itertools.count():
        keys = philox.draw(torch.tensor(seed), streams.KEYS, sample=0, position=torch.arange(length))[0]
        ordered = keys.sort().values
        tied = (ordered[1:] == ordered[:-1]).nonzero().flatten()
        if len(tied):
            break
    counts = tied[:1] + 1
    first, second = (keys == ordered[tied[0]]).nonzero().flatten().tolist()
    options = {"counts": counts, "no_replace_prob": 0.15, "random_token_prob": 0.1}
    output = sample(kernel, foreign(1, length), seed, **options)
    assert output.is_masked[0, [first, second]].tolist() == [True, False]
    assert_equal_outputs(output, sample(reference, foreign(1, length), seed, **options))


def test_kernel_refuses_longer_sequences(kernel):
    with pytest.raises(ValueError, match=r"at most 65536 tokens, received 65537.*backend=\"reference\""):
        sample(kernel, foreign(1, 65537))


def call_arguments(device, **options):
    options = {"no_replace_prob": 0.2, "random_token_prob": 0.1, **options}
    given = arguments(torch.arange(12).view(2, 6), 5, **options)
    return tree_map_only(torch.Tensor, lambda x: x.to(device), given)


@pytest.mark.parametrize("form", ["drawn", "given", "counts", "maskable", "bernoulli", "excludes"])
def test_opcheck(kernel, form):
    row = torch.tensor([0.2, 0.7])
    options = {
        "drawn": {},
        "given": {"times": row, "ratios": 1 - row, "slopes": -row},
        "counts": {"counts": torch.tensor([1, 4])},
        "maskable": {"maskable": torch.arange(12).view(2, 6) % 2 == 0},
        "bernoulli": {"bernoulli": True},
        "excludes": {
            "gates_tokens": True,
            "complement": True,
            "random_ids": RandomIds(torch.arange(7), torch.tensor(4)),
        },
    }[form]
    operation = kernel.operation("mask_sampling")
    torch.library.opcheck(
        operation.overload, tuple(operation.signature.flat(call_arguments(kernel.device, **options)))
    )


def test_compiles_as_a_whole(kernel):
    operation = kernel.operation("mask_sampling")
    tokens, draws, *rest = call_arguments(kernel.device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(tokens, draws):
        output = operation(tokens + 1, draws, *rest)
        return output.masked_ids * 2, output.num_masked + 1

    expected = operation(tokens + 1, draws, *rest)
    ids, total = step(tokens, draws)
    assert torch.equal(ids, expected.masked_ids * 2)
    assert torch.equal(total, expected.num_masked + 1)


def test_fresh_memory_is_poisoned():
    """What the other tests rely on to see an unwritten output."""
    assert torch.empty(3).isnan().all()
    assert (torch.ones(2).new_empty(3, dtype=torch.int64) == torch.iinfo(torch.int64).max).all()
    assert torch.empty_like(torch.zeros(3, dtype=torch.bool)).all()


@pytest.mark.parametrize("random_token_prob", [0.2, 0.8])
@pytest.mark.slow_interpreted
def test_gates_of_awkward_products_split_the_masked_set(backend, random_token_prob):
    """p * f is a double rounded once: in float32 .2 * (1 - .2) is another number, and 25 tokens become 26."""
    keep = {0.2: 0.2, 0.8: 0.1}[random_token_prob]
    counts = torch.arange(130)
    output = sample(
        backend, foreign(130, 130), BOTH_COINS, counts=counts, no_replace_prob=keep,
        random_token_prob=random_token_prob,
    )  # fmt: skip
    kept = (counts.float() * keep).ceil().long()
    left = counts - kept
    replaced = (left.float() * (random_token_prob * (1.0 - keep))).ceil().long().minimum(left)
    visible = output.masked_ids
    assert torch.equal(((visible == FOREIGN) & output.is_masked).sum(-1), kept)
    assert torch.equal(((visible < 7) & (visible != 3)).sum(-1), replaced)


def test_the_series_of_the_cosine_is_the_cosine(reference):
    """A series on both backends, so that both round alike; no further from cos than float32 rounds."""
    evaluate = reference.module("mask_sampling")._evaluate
    times = torch.linspace(0, 1, 10**5 + 1)
    ratios, slopes = evaluate("cosine", times)
    angle = times.double() * math.pi / 2
    assert ((ratios - angle.cos()).abs() < 2**-22).all()
    assert ((slopes + math.pi / 2 * angle.sin()).abs() < 2**-21).all()
    assert (ratios[0], ratios[-1], slopes[0]) == (1.0, 0.0, 0.0)
