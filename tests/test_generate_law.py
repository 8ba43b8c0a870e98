"""Generation: the law of what is sampled."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from generating import MASK, FixedCritic, Known, N, V, assert_law, uniform, varied, wrap
from torch import nn

from fastmask import NonAutoregressiveWrapper

# ---- one position ----


@pytest.mark.parametrize("vocabulary", [10, 100, 1000])
@pytest.mark.parametrize("mask_id", [0, 5])
@pytest.mark.parametrize("filter_thres", [0.7, 0.0, 0.999, None])
def test_the_filter_keeps_its_share_of_the_vocabulary(vocabulary, mask_id, filter_thres, device):
    """ceil((1 - .7) V) of falling logits: 4, 31 and 301, for 1 - .7 is .30000000000000004."""
    net = Known(-0.001 * torch.arange(vocabulary).float(), length=1)
    wrapper = NonAutoregressiveWrapper(net, mask_id=mask_id, steps=2).to(device)
    torch.manual_seed(0)
    # So hot that all are as good as equally likely: 18 draws for each of at most 999.
    ids = wrapper.generate(18 * vocabulary, start_temperature=20.0, filter_thres=filter_thres)
    kept = vocabulary if filter_thres is None else math.ceil((1 - filter_thres) * vocabulary)
    # mask_id is taken out before, so that as many remain.
    allowed = [token for token in range(vocabulary) if token != mask_id][:kept]
    assert set(ids.unique().tolist()) == set(allowed)
    if filter_thres == 0.7:
        assert kept == {10: 4, 100: 31, 1000: 301}[vocabulary]


@pytest.mark.parametrize("start_temperature", [1.0, 0.25])
@pytest.mark.parametrize("filter_thres", [None, 0.5])
def test_the_sampled_law_is_the_networks_softmax(start_temperature, filter_thres, device):
    """One open position, committed at step 0 of N, when the temperature is (N - 1)/N of its start."""
    wrapper, place, rows = wrap(device), 7, 20000
    prompt = torch.arange(N, device=device) % V
    prompt_mask = torch.arange(N, device=device) != place
    torch.manual_seed(1)
    ids, trajectory = wrapper.generate(
        rows, start_temperature * N / (N - 1), filter_thres, prompt=prompt, prompt_mask=prompt_mask, steps=N,
        return_trajectory=True,
    )  # fmt: skip
    assert torch.equal(ids[:, prompt_mask], prompt[prompt_mask].expand(rows, -1))
    logits = wrapper.net.logits[place].detach().double().cpu()
    logits[MASK] = -math.inf
    if filter_thres is not None:
        logits[logits < logits.topk(6).values[-1]] = -math.inf
    assert_law(torch.bincount(ids[:, place].cpu(), minlength=V), (logits / start_temperature).softmax(dim=-1))
    # Scores are not heated.
    expected = logits.log_softmax(dim=-1).float().to(device)[ids[:, place]]
    torch.testing.assert_close(trajectory.log_probs[-1, :, place], expected, rtol=1e-5, atol=1e-5)


def test_positions_and_sequences_are_independent(device):
    # Two ids besides mask_id, equally likely.
    wrapper = NonAutoregressiveWrapper(uniform(vocabulary=3, length=2), mask_id=2).to(device)
    torch.manual_seed(0)
    ids = wrapper.generate(8000, steps=1, filter_thres=None)
    assert_law(torch.bincount(2 * ids[:, 0].cpu() + ids[:, 1].cpu(), minlength=4), [0.25] * 4)
    assert_law(torch.bincount(2 * ids[1:, 0].cpu() + ids[:-1, 0].cpu(), minlength=4), [0.25] * 4)


@pytest.mark.parametrize(
    "options",
    [
        {"top_p": 0.6},
        {"top_p": 0.0},
        {"forbidden": [0, 3]},
        {"forbidden": torch.arange(V) % 3 == 1},
        {"filter_thres": 0.3, "top_p": 0.8, "forbidden": [7]},
    ],
    ids=["nucleus", "favourite", "ids", "mask", "all"],
)
def test_nucleus_and_forbidden_ids_shape_the_sampled_law(options, device):
    """One open position, heated by 1.4: what is kept is chosen at temperature 1, the k largest first."""
    place, rows, heat = 7, 20000, 1.4
    wrapper = wrap(device)
    given = torch.arange(N, device=device) != place
    options = {"filter_thres": None, **options}
    sent = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    ids, trajectory = wrapper.generate(
        rows, heat * N / (N - 1), prompt=torch.zeros_like(given).long(), prompt_mask=given, steps=N,
        return_trajectory=True, **sent,
    )  # fmt: skip
    logits = wrapper.net.logits[place].detach().double().cpu()
    logits[MASK] = -math.inf
    logits[options.get("forbidden", [])] = -math.inf
    if options["filter_thres"] is not None:
        logits[logits < logits.topk(math.ceil(0.7 * V)).values[-1]] = -math.inf
    falling = logits.softmax(dim=-1).sort(descending=True)
    before = falling.values.cumsum(dim=-1) - falling.values  # kept while what is likelier does not suffice
    beyond = before >= options.get("top_p", 1.0)
    logits[falling.indices[beyond & (torch.arange(V) > 0)]] = -math.inf
    assert 1 <= logits.isfinite().sum() < V - 1
    assert_law(torch.bincount(ids[:, place].cpu(), minlength=V), (logits / heat).softmax(dim=-1))
    expected = logits.log_softmax(dim=-1).float().to(device)[ids[:, place]]
    torch.testing.assert_close(trajectory.log_probs[-1, :, place], expected, rtol=1e-5, atol=1e-5)


def test_which_positions_stay_masked_under_choice_noise(device):
    """Of a plan's first step, by enumeration: Plackett and Luce's law of score / (scale times the share left)."""
    batch, places, scale = 8000, 5, 1.6
    wrapper = wrap(device, varied(places))
    logits = wrapper.net.logits.detach().double().cpu()
    logits[:, MASK] = -math.inf
    weights = (logits.log_softmax(dim=-1).amax(dim=-1) / (scale / 2)).exp().tolist()
    law = torch.zeros(2**places, dtype=torch.float64)
    for order in itertools.permutations(range(places), 3):
        chance, left = 1.0, sum(weights)
        for place in order:
            chance, left = chance * weights[place] / left, left - weights[place]
        law[2**places - 1 - sum(2**place for place in order)] += chance
    steps = wrapper.generate_steps(
        batch, 0.0, None, steps=2, choice_temperature=scale, generator=torch.Generator(device).manual_seed(0)
    )
    codes = (next(steps).is_masked.cpu() * 2 ** torch.arange(places)).sum(dim=-1)
    assert_law(torch.bincount(codes, minlength=2**places), law)


# ---- many modes ----


class Oracle(nn.Module):
    """The conditional marginals of a known law: ``modes`` sequences [M, N] with probabilities [M]."""

    def __init__(self, modes: torch.Tensor, probabilities: torch.Tensor) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len = V, modes.shape[1]
        self.register_buffer("modes", modes)
        self.register_buffer("probabilities", probabilities)

    def forward(self, ids):
        agrees = ((ids[:, None] == self.modes) | (ids[:, None] == MASK)).all(dim=-1)
        weights = agrees * self.probabilities  # [B, M]
        one_hot = torch.nn.functional.one_hot(self.modes, V).float()
        return (torch.einsum("bm,mnv->bnv", weights, one_hot) / weights.sum(dim=-1)[:, None, None]).log()


def test_choice_temperature_keeps_the_modes_apart(device):
    """docs/compat.md: a good model, greedily committed, gives one sequence over and over."""
    generator = torch.Generator().manual_seed(4)
    allowed = torch.tensor([token for token in range(V) if token != MASK])
    modes = allowed[torch.randint(0, V - 1, (40, 8), generator=generator)]
    probabilities = torch.cat([torch.tensor([0.22]), torch.full((39,), 0.02)])
    wrapper = wrap(device, Oracle(modes, probabilities))
    results = {}
    for choice_temperature in (0.0, 4.5):
        torch.manual_seed(1)
        ids = wrapper.generate(
            64, filter_thres=None, steps=8, choice_temperature=choice_temperature, start_temperature=8 / 7
        ).cpu()  # fmt: skip
        assert (ids[:, None] == modes).all(dim=-1).any(dim=-1).all()  # one position a step: always consistent
        results[choice_temperature] = len(ids.unique(dim=0))
    assert results[0.0] <= 16
    assert results[4.5] >= 24  # 64 draws of the law itself: 30 or so


# ---- a known joint law ----

LETTERS, PLACES = 3, 4
SEQUENCES = torch.tensor(list(itertools.product(range(LETTERS), repeat=PLACES)))


def joint_law() -> torch.Tensor:
    """[81] float64, far from independent."""
    return torch.randn(len(SEQUENCES), dtype=torch.float64, generator=torch.Generator().manual_seed(9)).softmax(
        dim=-1
    )


class Swapped(Oracle):
    """Wrong: two positions have each other's conditionals where the last is masked."""

    def forward(self, ids):
        logits = super().forward(ids)
        swapped = logits[:, torch.tensor([1, 0, 2, 3])]
        return swapped.where((ids[:, -1] == MASK)[:, None, None], logits)


def counts_of_sequences(wrapper, rows: int = 8000, **options) -> torch.Tensor:
    """One position at each of the first steps, when it is as good as not yet cooled: 4 of 800."""
    torch.manual_seed(10)
    ids = wrapper.generate(rows, steps=800, filter_thres=None, **options).cpu()
    assert (ids < LETTERS).all()
    return torch.bincount((ids * LETTERS ** torch.arange(PLACES).flip(0)).sum(dim=-1), minlength=len(SEQUENCES))


def one_at_a_time(t):
    return (PLACES + 0.5 - 800 * t).clamp(min=0.0) / PLACES


def wrap_oracle(device, oracle=Oracle, **options) -> NonAutoregressiveWrapper:
    return wrap(device, oracle(SEQUENCES, joint_law().float()), schedule=one_at_a_time, **options)


def test_an_oracles_samples_follow_the_joint_law_in_random_order(device):
    counts = counts_of_sequences(wrap_oracle(device), choice_temperature=1e5)
    assert_law(counts, joint_law())


def test_an_oracles_samples_follow_the_joint_law_in_a_critics_random_order(device):
    wrapper = wrap_oracle(device, token_critic=FixedCritic([0.0] * PLACES))
    assert_law(counts_of_sequences(wrapper), joint_law())


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]], ids=str)
def test_an_oracles_samples_follow_the_joint_law_in_a_fixed_order(order, device):
    wrapper = wrap_oracle(device, token_critic=FixedCritic(torch.tensor(order)))
    assert_law(counts_of_sequences(wrapper, noise_level_scale=0.0), joint_law())


def test_an_oracles_samples_follow_the_joint_law_given_a_prompt(device):
    prompt, given = torch.tensor([0, 2, 0, 0], device=device), torch.tensor([0, 1, 0, 0], device=device).bool()
    counts = counts_of_sequences(wrap_oracle(device), choice_temperature=1e5, prompt=prompt, prompt_mask=given)
    assert_law(counts, joint_law() * (SEQUENCES[:, 1] == 2))


def test_a_wrong_oracle_is_told_from_the_right_one(device):
    """And so are two positions a step, and an order that looks at what was sampled."""
    with pytest.raises(AssertionError):
        assert_law(counts_of_sequences(wrap_oracle(device, Swapped), choice_temperature=1e5), joint_law())
    two_at_a_time = wrap(device, Oracle(SEQUENCES, joint_law().float()), schedule=lambda t: (1.02 - 400 * t).clamp(0))
    with pytest.raises(AssertionError):
        assert_law(counts_of_sequences(two_at_a_time, choice_temperature=1e5), joint_law())
    with pytest.raises(AssertionError):
        assert_law(counts_of_sequences(wrap_oracle(device), choice_temperature=0.0), joint_law())
