"""Where a door's seeds come from, and what the numbers depend on."""

from __future__ import annotations

import pytest
import torch
from calls import TOKENS, V, mask

import fastmask
from fastmask import functional


def ids(**options):
    return functional.sample_tokens(torch.zeros(4, 30, 50), **options).ids


def masks(**options):
    return mask(TOKENS.repeat(8, 8), **options).is_masked


def critics(**options):
    return functional.critic_remask_keys(torch.zeros(4, 30), noise_scale=1.0, **options)


def confidences(**options):
    return functional.confidence_remask_keys(torch.zeros(4, 30), choice_temperature=1.0, **options)


def selections(**options):
    return functional.select_at_random(torch.ones(4, 30, dtype=torch.bool), 0.5, **options)


DRAWS = [ids, masks, critics, confidences, selections]


@pytest.mark.parametrize("random", DRAWS)
@pytest.mark.parametrize("seed", [0, 1, -1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1])
def test_seeds_are_64_bits(random, seed):
    """An int beyond int64 is its two's complement, and a tensor is the same seed as its int."""
    wrapped = (seed + 2**63) % 2**64 - 2**63
    expected = random(seed=seed)
    assert torch.equal(expected, random(seed=wrapped))
    assert torch.equal(expected, random(seed=torch.tensor(wrapped)))
    assert not torch.equal(expected, random(seed=wrapped ^ 1))
    assert not torch.equal(expected, random(seed=wrapped ^ 2**40))  # the high word counts


@pytest.mark.parametrize("random", DRAWS)
def test_manual_seed_reproduces(random):
    torch.manual_seed(3)
    first, second = random(), random()
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(first, random())
    assert torch.equal(second, random())
    torch.manual_seed(4)
    assert not torch.equal(first, random())


@pytest.mark.parametrize("random", DRAWS)
def test_a_generator_reproduces_and_leaves_torchs_own_alone(random):
    before = torch.get_rng_state()
    first = random(generator=torch.Generator().manual_seed(9))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(first, random(generator=torch.Generator().manual_seed(9)))
    generator = torch.Generator().manual_seed(9)
    seed = functional.draw_seed("cpu", generator)
    assert torch.equal(first, random(seed=seed))
    assert not torch.equal(first, random(generator=generator))  # which has moved on


@pytest.mark.parametrize("random", DRAWS)
def test_a_given_seed_leaves_every_generator_alone(random):
    before = torch.get_rng_state()
    random(seed=1)
    assert torch.equal(before, torch.get_rng_state())


def test_draw_seed():
    generator = torch.Generator().manual_seed(0)
    seeds = [functional.draw_seed("cpu", generator) for _ in range(200)]
    assert all(seed.dtype == torch.int64 and seed.shape == () for seed in seeds)
    values = torch.stack(seeds)
    assert values.unique().numel() == 200
    # All 64 bits are drawn: each is set in about half of the seeds.
    shares = torch.stack([(values >> bit) & 1 for bit in range(64)]).double().mean(1)
    assert ((shares > 0.3) & (shares < 0.7)).all()
    torch.manual_seed(5)
    first = functional.draw_seed(torch.device("cpu"))
    torch.manual_seed(5)
    assert torch.equal(first, functional.draw_seed("cpu"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a generator of another device")
def test_a_seed_lies_where_it_is_wanted():
    seed = functional.draw_seed("cuda", torch.Generator().manual_seed(0))
    assert seed.device.type == "cuda"
    assert seed.item() == functional.draw_seed("cpu", torch.Generator().manual_seed(0)).item()


@pytest.mark.parametrize(("device", "waits"), [("cpu", True), ("meta", False)])
def test_what_the_host_is_to_read_is_there(device, waits, monkeypatch):
    """Of a copy from a GPU that nobody waits for it would read what stood there before."""
    to, seen = torch.Tensor.to, []

    def watched(x, *arguments, non_blocking=None, **options):
        seen.extend([] if non_blocking is None else [not non_blocking])
        return to(x, *arguments, non_blocking=bool(non_blocking), **options)

    monkeypatch.setattr(torch.Tensor, "to", watched)
    logits = torch.zeros(1, 2, 5, device=device)
    functional.draw_seed(device, torch.Generator())
    functional.sample_tokens(logits, seed=torch.tensor(3), forbidden=[1])
    targets = torch.zeros(1, 2, dtype=torch.int64, device=device)
    with torch.fx.experimental._config.patch(meta_nonzero_assume_all_nonzero=True):
        functional.masked_cross_entropy(logits, targets, targets == 0, denominator=torch.tensor(2.0))
    wrapper = fastmask.NonAutoregressiveWrapper(Table(device), mask_id=4, steps=2)
    wrapper.generate(prompt=torch.zeros(1, 2).long(), prompt_mask=torch.tensor([[True, False]]))
    assert len(seen) >= 8
    assert set(seen) == {waits}


class Table(torch.nn.Module):
    """The same logits everywhere."""

    max_seq_len, num_tokens = 2, 5

    def __init__(self, device):
        super().__init__()
        self.logits = torch.nn.Parameter(torch.zeros(2, 5, device=device))

    def forward(self, ids):
        return self.logits.expand(*ids.shape, 5)


@pytest.mark.parametrize("stratified", [False, True])
@pytest.mark.parametrize("schedule", ["linear", lambda t: 1 - t, lambda t: 1 - t**2], ids=["linear", "same", "other"])
def test_masks_do_not_depend_on_the_split_of_the_batch(schedule, stratified):
    """A callable's times are drawn at the door, the others' behind it: both from the global sample and batch."""
    tokens = torch.arange(60).view(6, 10) % (V - 1)
    options = {"schedule": schedule, "stratified": stratified, "global_batch_size": 12, "seed": 5}
    whole = mask(tokens, sample_offset=3, **options)
    parts = [mask(tokens[:2], sample_offset=3, **options), mask(tokens[2:], sample_offset=5, **options)]
    for field in ("masked_ids", "times", "counts", "loss_weights"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field)), field
    assert torch.equal(whole.times, mask(tokens, sample_offset=3, **{**options, "schedule": "linear"}).times)
    assert whole.times.unique().numel() == 6
    if stratified:  # six twelfths of [0, 1), side by side
        assert len({int(12 * t) for t in whole.times.tolist()}) == 6
