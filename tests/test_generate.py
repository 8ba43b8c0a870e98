"""Generation: how many positions remain masked, which, what is sampled there, and what stays untouched."""

from __future__ import annotations

import itertools
import math
import os
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from x_transformers import Encoder, TransformerWrapper

from fastmask import NonAutoregressiveWrapper, Schedule, Trajectory, functional
from fastmask.reference import top_k_filter
from fastmask.schedules import as_schedule, step_counts

V, N, MASK = 12, 18, 5


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Known(nn.Module):
    """A network with logits that the test chose, which writes down how it was called."""

    def __init__(self, logits: torch.Tensor, length: int = N) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len, self.emb_dim = logits.shape[-1], length, 4
        self.logits = nn.Parameter(logits.expand(length, -1).clone())
        self.calls: list[dict] = []

    def forward(self, ids, return_embeddings=False, return_logits_and_embeddings=False, **kwargs):
        self.calls.append({"ids": ids.clone(), "training": self.training, **kwargs})
        logits = self.logits.expand(*ids.shape, -1)
        embeddings = torch.full((*ids.shape, self.emb_dim), float(len(self.calls)), device=ids.device)
        if return_logits_and_embeddings:
            return logits, embeddings
        return embeddings if return_embeddings else logits


def uniform(vocabulary: int = V, length: int = N) -> Known:
    return Known(torch.zeros(vocabulary), length)


def varied(length: int = N) -> Known:
    return Known(torch.randn(length, V, generator=torch.Generator().manual_seed(1)), length)


class Context(nn.Module):
    """A network whose logits depend on all ids at once, so that every difference shows."""

    def __init__(self, length: int = N) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len = V, length
        generator = torch.Generator().manual_seed(3)
        self.table = nn.Parameter(torch.randn(length, V, length, V, generator=generator))

    def forward(self, ids):
        place = torch.arange(self.max_seq_len, device=ids.device)
        return self.table[place, ids].sum(dim=1)


class Small(nn.Module):
    """All that generation may ask of a network: embeddings that depend on every id, and logits of them. Nothing is
    multiplied as a matrix, so that a sequence gets the same bits in every batch."""

    def __init__(self, length: int = 8, scale: float = 1.0) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len, self.emb_dim = V, length, 4
        self.attn_layers = SimpleNamespace(dim=4)
        generator = torch.Generator().manual_seed(7)
        self.table = nn.Parameter(torch.randn(length, V, length, 4, generator=generator))
        self.head = nn.Parameter(scale * torch.randn(4, V, generator=generator))

    def forward(self, ids, sum_embeds=0.0, return_embeddings=False, return_logits_and_embeddings=False):
        place = torch.arange(self.max_seq_len, device=ids.device)
        embeddings = self.table[place, ids].sum(dim=1).tanh() + sum_embeds
        if return_embeddings:
            return embeddings
        logits = (embeddings[..., None] * self.head).sum(dim=-2)
        return (logits, embeddings) if return_logits_and_embeddings else logits


def prompts(device, batch: int = 4, length: int = 8) -> dict[str, torch.Tensor]:
    """Row b gives 2b of the positions: none the first, and all the fifth of length 8."""
    generator = torch.Generator().manual_seed(8)
    prompt = torch.randint(0, V, (batch, length), generator=generator)
    order = torch.rand(batch, length, generator=generator).argsort(dim=-1)
    given = order < 2 * torch.arange(batch)[:, None]
    return {"prompt": prompt.to(device), "prompt_mask": given.to(device)}


def wrap(device, net=None, **options) -> NonAutoregressiveWrapper:
    torch.manual_seed(0)
    return NonAutoregressiveWrapper(net or varied(), mask_id=MASK, **options).to(device)


class FixedCritic(nn.Module):
    """The same logits [N] for every sequence."""

    def __init__(self, logits) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.as_tensor(logits, dtype=torch.float32))

    def forward(self, ids):
        return self.logits.expand(ids.shape)[..., None]


def assert_law(counts, shares, alpha=1e-4, effect=0.06) -> None:
    """A chi-square that does not reject, and a small effect besides: n must be large enough to tell."""
    counts, shares = np.asarray(counts, dtype=float), np.asarray(shares, dtype=float)
    assert counts[shares == 0].sum() == 0
    counts, shares = counts[shares > 0], shares[shares > 0]
    if len(counts) == 1:
        return
    result = stats.chisquare(counts, shares / shares.sum() * counts.sum())
    assert result.pvalue > alpha, (counts, shares)
    beyond_chance = max(0.0, result.statistic - len(counts) + 1)
    assert math.sqrt(beyond_chance / counts.sum()) < effect, (counts, shares)


# ---- counts ----


def test_eighteen_steps_of_eighteen_positions(device):
    _, trajectory = wrap(device).generate(3, return_trajectory=True)
    expected = [17, 16, 15, 14, 13, 11, 11, 10, 9, 7, 7, 5, 5, 3, 3, 1, 1, 0]
    assert trajectory.is_masked.sum(dim=-1).tolist() == [[count] * 3 for count in expected]


def high_end(t):
    return 1 - 0.5 * t


@pytest.mark.parametrize("remask", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine", high_end])
@pytest.mark.parametrize("length", [1, 3, 4, 18])
@pytest.mark.parametrize("steps", [1, 2, 5, 18, 25])
def test_the_scheduled_number_remains_masked(schedule, length, steps, remask, device):
    wrapper = wrap(device, varied(length), schedule=schedule, can_mask_prev_unmasked=remask)
    ids, trajectory = wrapper.generate(4, steps=steps, return_trajectory=True)
    assert isinstance(trajectory, Trajectory)
    expected = step_counts(as_schedule(schedule), steps, torch.full((4,), length))
    assert torch.equal(trajectory.is_masked.sum(dim=-1).cpu(), expected)
    assert expected[-1].eq(0).all()
    assert torch.equal(trajectory.ids == MASK, trajectory.is_masked)  # mask_id where masked, and only there
    assert torch.equal(trajectory.ids[-1], ids)
    assert (ids != MASK).all()
    assert trajectory.ids.dtype == torch.int64
    assert trajectory.log_probs.dtype == torch.float32
    assert trajectory.ids.shape == trajectory.log_probs.shape == (steps, 4, length)


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


# ---- which steps are run ----


def runs(wrapper: NonAutoregressiveWrapper, **options) -> int:
    wrapper.net.calls.clear()
    wrapper.generate(2, **options)
    return len(wrapper.net.calls)


def test_the_network_runs_where_something_is_committed(device):
    assert runs(wrap(device, varied(4))) == 4
    assert runs(wrap(device, varied(1))) == 1
    assert runs(wrap(device, varied(18))) == len({17, 16, 15, 14, 13, 11, 10, 9, 7, 5, 3, 1, 0})
    # The cosine leaves little to its first steps: 17, 17, 17, 16, ...
    cosine = step_counts(as_schedule("cosine"), 18, torch.tensor([18])).squeeze(-1).tolist()
    assert runs(wrap(device, varied(18), schedule="cosine")) == len({18, *cosine}) - 1 < 18


@pytest.mark.parametrize("options", [{"self_cond": True}, {"can_mask_prev_unmasked": True}], ids=str)
def test_where_a_step_can_matter_the_network_runs(options, device):
    """4 (t - 1) falls below 1 at the fifteenth of 18 steps, after which nothing is open."""
    assert step_counts(as_schedule("linear"), 18, torch.tensor([4])).squeeze(-1).tolist().index(0) == 13
    assert runs(wrap(device, varied(4), **options)) == 14
    assert runs(wrap(device, varied(4), **options), steps=4) == 4


def test_nothing_to_do(device):
    wrapper = wrap(device)
    given = torch.arange(N, device=device) % V
    everywhere = torch.ones(N, dtype=torch.bool, device=device)
    ids, trajectory = wrapper.generate(prompt=given, prompt_mask=everywhere, return_trajectory=True)
    assert torch.equal(ids, given)
    assert wrapper.net.calls == []
    assert not trajectory.is_masked.any()
    assert (trajectory.log_probs == 0).all()
    assert wrapper.generate(0).shape == (0, N)


def test_a_step_that_is_not_run_repeats_the_one_before(device):
    wrapper = wrap(device, varied(4))
    _, trajectory = wrapper.generate(3, return_trajectory=True)
    counts = [3, 3, 3, 3, 2, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    assert trajectory.is_masked.sum(dim=-1)[:, 0].tolist() == counts
    for values in trajectory:
        for step in range(1, 18):
            if counts[step] == counts[step - 1]:
                assert torch.equal(values[step], values[step - 1])


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("critic", [False, True])
def test_temperature_and_noise_keep_the_schedules_own_index(compat, critic, device, monkeypatch):
    """With 4 positions in 18 steps, steps 0, 4, 9 and 13 are run: at shares 17/18, 13/18, 8/18 and 4/18."""
    from fastmask import compat as compat_module

    temperatures, noises, numbers = [], [], []

    def recording(function, into, name):
        def call(*arguments, **options):
            into.append(options[name])
            if "step" in options:
                numbers.append(options["step"])
            return function(*arguments, **options)

        return call

    module = compat_module if compat else functional
    monkeypatch.setattr(module, "sample_tokens", recording(module.sample_tokens, temperatures, "temperature"))
    monkeypatch.setattr(functional, "remask_", recording(functional.remask_, noises, "noise_scale"))
    options = {"token_critic": FixedCritic([0.0] * 4)} if critic else {}
    wrapper = wrap(device, varied(4), compat=compat, **options)
    wrapper.generate(2, start_temperature=2.0, noise_level_scale=3.0, choice_temperature=3.0)
    left = [17 / 18, 13 / 18, 8 / 18, 4 / 18]
    assert temperatures == pytest.approx([2.0 * share for share in left])
    assert noises == pytest.approx([3.0 * share for share in left])
    # The sampler's number and the scores'; upstream's sampler has no use for one.
    assert sorted(numbers) == sorted([0, 4, 9, 13] * (1 if compat else 2))
    temperatures.clear()
    wrapper.generate(2, steps=1, start_temperature=2.0)
    assert temperatures == [1e-3]  # the floor


# ---- what is committed, and when ----


def test_committed_positions_never_change(device):
    _, trajectory = wrap(device, Context()).generate(8, start_temperature=2.0, return_trajectory=True)
    for step in range(1, 18):
        assert (trajectory.is_masked[step] <= trajectory.is_masked[step - 1]).all()
        settled = ~trajectory.is_masked[step - 1]
        assert torch.equal(trajectory.ids[step][settled], trajectory.ids[step - 1][settled])


@pytest.mark.parametrize("critic", [False, True])
def test_remasking_really_opens_committed_positions(critic, device):
    """And what is masked again is sampled again; what is not stays as it is."""
    options = {"token_critic": Jumping()} if critic else {}
    wrapper = wrap(device, Context(), can_mask_prev_unmasked=True, **options)
    _, trajectory = wrapper.generate(16, start_temperature=2.0, return_trajectory=True)
    before, after = trajectory.is_masked[:-1], trajectory.is_masked[1:]
    assert (after & ~before).any()
    stays = ~before & ~after
    assert torch.equal(trajectory.ids[1:][stays], trajectory.ids[:-1][stays])
    reopened = ((after & ~before).sum(dim=0) > 0) & (trajectory.ids[-1] != MASK)
    assert reopened.any()


class Jumping(nn.Module):
    """A critic whose mind depends on how much of the sequence is there."""

    def forward(self, ids):
        return torch.sin(7.0 * ids + torch.arange(ids.shape[1], device=ids.device))


def test_the_least_confident_are_masked_again(device):
    """Place i is sure to degree i: the surest is committed first, one at a time."""
    logits = torch.zeros(6, V)
    logits[:, 0] = 2.0 + torch.arange(6)
    wrapper = wrap(device, Known(logits, 6))
    _, trajectory = wrapper.generate(4, steps=7, start_temperature=0.0, filter_thres=None, return_trajectory=True)
    for step, count in enumerate([5, 4, 3, 2, 1, 0, 0]):
        open_places = torch.arange(6, device=device) < count
        assert torch.equal(trajectory.is_masked[step], open_places.expand(4, -1))
    allowed = torch.cat([logits[:, :MASK], logits[:, MASK + 1 :]], dim=-1)  # mask_id has no share
    expected = allowed.log_softmax(dim=-1)[:, 0].to(device)
    torch.testing.assert_close(trajectory.log_probs[-1], expected.expand(4, -1), rtol=1e-5, atol=1e-6)


def test_the_critic_decides_what_is_masked_again(device):
    """However sure the network is: place 0 is the most wrong, so it is settled last."""
    wrapper = wrap(device, varied(6), token_critic=FixedCritic([6.0, 5.0, 4.0, 3.0, 2.0, 1.0]))
    _, trajectory = wrapper.generate(4, steps=7, noise_level_scale=0.0, return_trajectory=True)
    for step, count in enumerate([5, 4, 3, 2, 1, 0, 0]):
        open_places = torch.arange(6, device=device) < count
        assert torch.equal(trajectory.is_masked[step], open_places.expand(4, -1))
    noisy = wrapper.generate(64, steps=7, noise_level_scale=100.0, return_trajectory=True)[1]
    assert len(noisy.is_masked[0].unique(dim=0)) == 6  # any place may be the first


def test_the_critic_judges_what_was_just_proposed(device):
    """It sees no mask, and its own network's arguments."""
    seen = []

    class Watching(FixedCritic):
        def forward(self, ids):
            seen.append(ids)
            return super().forward(ids)

    wrap(device, Context(), token_critic=Watching([0.0] * N)).generate(3)
    assert len(seen) == 13
    assert all((ids != MASK).all() for ids in seen)


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
    """DESIGN 3.3b row 6: a good model, greedily committed, gives one sequence over and over."""
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
        assert_law(counts_of_sequences(wrap_oracle(device)), joint_law())


# ---- a loop by hand ----


def by_hand(wrapper, generator, options, prompt=None, prompt_mask=None, batch=4) -> torch.Tensor:
    """What generate does, out of the public functions, at every position of every step."""
    options = {"filter_thres": 0.7, "noise_level_scale": 1.0, "choice_temperature": 0.0, **options}
    net, critic, steps = wrapper.net, wrapper.token_critic, wrapper.steps
    device = net.table.device
    seed = functional.draw_seed(device, generator)
    given = torch.zeros(batch, net.max_seq_len, dtype=torch.bool, device=device)
    ids = torch.full(given.shape, MASK, device=device)
    if prompt is not None:
        given, ids = prompt_mask, prompt.where(prompt_mask, MASK)
    maskable, is_masked = ~given, ~given
    counts = step_counts(as_schedule("linear"), steps, maskable.sum(dim=-1).cpu()).to(device)
    condition = wrapper.null_embed if wrapper.self_cond else None
    for step in range(steps):
        left = (steps - 1 - step) / steps
        drawn = {"seed": seed, "step": step, "sample_offset": options.get("sample_offset", 0)}
        given_embeddings = {} if condition is None else {"sum_embeds": wrapper.to_self_cond(condition)}
        logits, embeddings = net(ids, return_logits_and_embeddings=True, **given_embeddings)
        condition = embeddings if wrapper.self_cond else None
        sampled = functional.sample_tokens(
            logits,
            temperature=max(left, 1e-3),
            mask_id=MASK,
            kept_ids=ids.where(~is_masked, -1),
            **{name: options.get(name) for name in ("filter_thres", "top_p", "forbidden")},
            **drawn,
        )
        ids = sampled.ids
        if critic is None:
            noise = options["choice_temperature"] * left
            scores = functional.confidence_scores(sampled.log_probs, choice_temperature=noise, **drawn)
        else:
            noise = options["noise_level_scale"] * left
            scores = functional.critic_scores(critic(ids).view(ids.shape), noise_scale=noise, **drawn)
        may_be_masked = maskable if wrapper.can_mask_prev_unmasked else is_masked
        is_masked = functional.select_to_remask(scores, may_be_masked, counts[step])
        ids = ids.masked_fill(is_masked, MASK)
    return ids


HAND = {
    "plain": ({}, {}),
    "choice": ({}, {"choice_temperature": 1.0}),
    "filters": ({}, {"top_p": 0.9, "filter_thres": 0.3, "forbidden": [1, 2], "sample_offset": 3}),
    "self_cond": ({"self_cond": True}, {}),
    "critic": ({"token_critic": "own"}, {}),
    "self_critic": ({"self_token_critic": True}, {"noise_level_scale": 0.5}),
    "remask": ({"can_mask_prev_unmasked": True}, {}),
    "remask_critic": ({"can_mask_prev_unmasked": True, "token_critic": "own", "self_cond": True}, {}),
}


def wrap_small(device, length=8, **options) -> NonAutoregressiveWrapper:
    if options.get("token_critic") == "own":
        options["token_critic"] = Jumping()
    return wrap(device, Small(length), **options)


@pytest.mark.parametrize("prompted", [False, True])
@pytest.mark.parametrize("case", HAND)
@torch.no_grad()
def test_generation_is_a_loop_by_hand(case, prompted, device):
    of_wrapper, options = HAND[case]
    wrapper = wrap_small(device, steps=5, **of_wrapper)
    prompt = prompts(device) if prompted else {}
    outs = set()
    for seed in range(3):
        expected = by_hand(wrapper, torch.Generator().manual_seed(seed), options, **prompt)
        ids = wrapper.generate(4, generator=torch.Generator().manual_seed(seed), **options, **prompt)
        assert torch.equal(ids, expected)
        assert ((ids != MASK) | (prompt["prompt_mask"] if prompted else False)).all()
        outs.add(tuple(ids.flatten().tolist()))
    assert len(outs) == 3


@pytest.mark.parametrize("case", ["plain", "filters", "self_cond", "critic", "self_critic", "remask"])
@torch.no_grad()
def test_generation_is_a_loop_by_hand_on_the_kernels_too(case, kernel, monkeypatch):
    monkeypatch.setenv("FASTMASK_BACKEND", "triton")
    of_wrapper, options = HAND[case]
    wrapper = wrap_small(kernel.device, length=4, steps=3, **of_wrapper)
    prompt = prompts(kernel.device, batch=2, length=4)
    expected = by_hand(wrapper, torch.Generator().manual_seed(0), options, **prompt)
    assert torch.equal(wrapper.generate(2, generator=torch.Generator().manual_seed(0), **options, **prompt), expected)


# ---- a threshold in place of counts ----


def committed(trajectory, is_open):
    """Step after step: what was open before it, what it committed, and the log-probabilities it proposed."""
    for is_masked, log_probs in zip(trajectory.is_masked, trajectory.log_probs, strict=True):
        yield is_open, is_open & ~is_masked, log_probs
        is_open = is_masked


def surest(confidence, is_open):
    """[B, N] bool, the first open position of highest confidence [B, N]; none where nothing is open."""
    best = confidence.masked_fill(~is_open, -math.inf).argmax(dim=-1)
    return torch.nn.functional.one_hot(best, is_open.shape[1]).bool() & is_open


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("choice_temperature", [0.0, 2.0])
@pytest.mark.parametrize("prompted", [False, True])
def test_every_step_commits_what_is_surer_than_the_threshold(threshold, choice_temperature, prompted, device):
    """And, where nothing of a sequence is, the surest; the last step the rest."""
    wrapper, steps = wrap(device, Small(scale=3.0)), 3
    prompt = prompts(device) if prompted else {}
    seed = functional.draw_seed(device, torch.Generator().manual_seed(1))
    ids, trajectory = wrapper.generate(
        4, threshold=threshold, choice_temperature=choice_temperature, steps=steps, filter_thres=None,
        generator=torch.Generator().manual_seed(1), return_trajectory=True, **prompt,
    )  # fmt: skip
    is_open = ~prompt["prompt_mask"] if prompted else torch.ones_like(ids, dtype=torch.bool)
    by_one, by_many = 0, 0
    for step, (before, now, log_probs) in enumerate(committed(trajectory, is_open)):
        noise = choice_temperature * (steps - 1 - step) / steps
        confidence = -functional.confidence_scores(log_probs, choice_temperature=noise, seed=seed, step=step)
        expected = before & (confidence > math.log(threshold))
        alone = before.any(dim=-1) & ~expected.any(dim=-1)
        if step == steps - 1:
            expected = before
        elif alone.any():
            expected = expected | (surest(confidence, before) & alone[:, None])
        assert torch.equal(now, expected)
        by_one, by_many = by_one + alone.sum(), by_many + (now.sum(dim=-1) > 1).sum()
    assert (ids[is_open] != MASK).all()
    assert by_one + by_many > 0
    assert by_many > 0 or threshold > 0.5


@pytest.mark.parametrize("threshold", [0.3, 0.6])
@pytest.mark.parametrize("prompted", [False, True])
def test_a_critics_confidence_is_that_a_token_is_right(threshold, prompted, device):
    """1 - sigmoid of its logit, whatever the network's own probabilities."""
    logits = []

    class Watched(Jumping):
        def forward(self, ids):
            logits.append(2.0 * super().forward(ids))
            return logits[-1]

    wrapper = wrap(device, Small(), token_critic=Watched())
    prompt = prompts(device) if prompted else {}
    _, trajectory = wrapper.generate(
        4, threshold=threshold, noise_level_scale=0.0, steps=6, return_trajectory=True, **prompt
    )
    is_open = ~prompt["prompt_mask"] if prompted else torch.ones_like(trajectory.is_masked[0])
    for step, (before, now, _) in enumerate(committed(trajectory, is_open)):
        if not before.any():
            break
        confidence = 1.0 - logits[step].sigmoid()
        sure = before & (confidence > threshold)
        expected = sure | (surest(confidence, before) & ~sure.any(dim=-1, keepdim=True))
        assert torch.equal(now, before if step == 5 else expected)


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("prompted", [False, True])
def test_with_remasking_only_what_is_not_sure_is_masked_again(critic, prompted, device):
    """One position more of each sequence is settled at each step, whatever the confidences."""
    logits, steps, threshold = [], 6, 0.9 if critic else 0.6

    class Watched(Jumping):
        def forward(self, ids):
            logits.append(3.0 * super().forward(ids))
            return logits[-1]

    wrapper = wrap(device, Small(scale=2.0), can_mask_prev_unmasked=True, token_critic=Watched() if critic else None)
    prompt = prompts(device, 16) if prompted else {}
    _, trajectory = wrapper.generate(
        16, threshold=threshold, noise_level_scale=0.0, steps=steps, return_trajectory=True, **prompt
    )
    is_open = ~prompt["prompt_mask"] if prompted else torch.ones_like(trajectory.is_masked[0])
    for step, is_masked in enumerate(trajectory.is_masked):
        if critic and step >= len(logits):
            break
        confidence = 1.0 - logits[step].sigmoid() if critic else trajectory.log_probs[step].exp()
        assert not (is_masked & (~is_open | (confidence > threshold))).any()
        at_most = (is_open.sum(dim=-1) - step - 1).clamp(min=0)
        assert (is_masked.sum(dim=-1) <= at_most).all()
        # Up to as many, the least sure of all that are open.
        unsure = (is_open & (confidence <= threshold)).sum(dim=-1)
        if step < steps - 1:
            assert (is_masked.any(dim=-1) == (unsure.minimum(at_most) > 0)).all()
    assert not trajectory.is_masked[-1].any()
    reopened = trajectory.is_masked[1:] & ~trajectory.is_masked[:-1]
    assert reopened.any()


@pytest.mark.parametrize("options", [{}, {"can_mask_prev_unmasked": True}, {"token_critic": "own"}], ids=str)
@pytest.mark.parametrize("prompted", [False, True])
def test_the_ends_of_the_threshold(options, prompted, device):
    """At 0 the first step commits everything, at 1 each step one position of each sequence."""
    wrapper = wrap_small(device, **options)
    prompt = prompts(device) if prompted else {}
    shared = {"steps": 9, "filter_thres": None, "noise_level_scale": 0.0, "return_trajectory": True, **prompt}
    assert not wrapper.generate(4, threshold=0.0, **shared)[1].is_masked.any()
    assert not wrapper.generate(4, threshold=0, choice_temperature=9.0, **shared)[1].is_masked.any()
    counts = wrapper.generate(4, threshold=1.0, **shared)[1].is_masked.sum(dim=-1)
    num_open = (~prompt["prompt_mask"]).sum(dim=-1) if prompted else torch.full((4,), 8, device=device)
    steps = torch.arange(1, 10, device=device)[:, None]
    assert torch.equal(counts, (num_open - steps).clamp(min=0))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("options", [{}, {"choice_temperature": 2.0}, {"top_p": 0.9, "forbidden": [0]}], ids=str)
@pytest.mark.parametrize("prompted", [False, True])
@torch.no_grad()
def test_a_threshold_is_a_loop_of_demask_steps(threshold, options, prompted, device):
    net, steps = Small(scale=3.0).to(device), 6
    prompt = prompts(device) if prompted else {}
    ids = torch.full((4, 8), MASK, device=device)
    is_masked = torch.ones_like(ids, dtype=torch.bool)
    if prompted:
        ids, is_masked = prompt["prompt"].where(prompt["prompt_mask"], MASK), ~prompt["prompt_mask"]
    seed = functional.draw_seed(device, torch.Generator().manual_seed(2))
    choice = {"choice_temperature": 0.0, **options}
    for step in range(steps):
        left = (steps - 1 - step) / steps
        ids, is_masked, *_ = functional.demask_step(
            net(ids), ids, is_masked, 0 if step == steps - 1 else None, mask_id=MASK, temperature=max(left, 1e-3),
            threshold=threshold, seed=seed, step=step,
            **{**choice, "choice_temperature": choice["choice_temperature"] * left},
        )  # fmt: skip
    generated = wrap(device, net).generate(
        4, threshold=threshold, steps=steps, filter_thres=None, generator=torch.Generator().manual_seed(2),
        **options, **prompt,
    )  # fmt: skip
    assert torch.equal(generated, ids)


# ---- prompts ----


def test_prompts_are_untouched_each_row_with_its_own_number_of_open_positions(device):
    wrapper = wrap(device, Context())
    generator = torch.Generator().manual_seed(6)
    prompt = torch.randint(0, V, (7, N), generator=generator).to(device)
    given = (torch.rand(7, N, generator=generator) < torch.linspace(0, 1, 7)[:, None]).to(device)
    assert (prompt[given] == MASK).any()  # ids equal to mask_id are ids
    ids, trajectory = wrapper.generate(prompt=prompt, prompt_mask=given, return_trajectory=True)
    for state in trajectory.ids:
        assert torch.equal(state[given], prompt[given])
    assert not (trajectory.is_masked & given).any()
    assert (ids[~given] != MASK).all()
    expected = step_counts(as_schedule("linear"), 18, (~given).sum(dim=-1).cpu())
    assert torch.equal(trajectory.is_masked.sum(dim=-1).cpu(), expected)


@pytest.mark.parametrize(
    "options", [{"can_mask_prev_unmasked": True}, {"self_cond": True}, {"compat": True}], ids=str
)
def test_prompts_are_untouched_whatever_the_options(options, device):
    for critic in (None, FixedCritic(torch.arange(N))):
        wrapper = wrap(device, token_critic=critic, **options)
        prompt = torch.full((3, N), MASK, device=device)
        given = torch.arange(N, device=device).expand(3, -1) % 3 == torch.arange(3, device=device)[:, None]
        ids = wrapper.generate(prompt=prompt, prompt_mask=given, filter_thres=None, start_temperature=1e-3)
        assert (ids[given] == MASK).all()
        assert (ids[~given] != MASK).all() or options == {"compat": True}


def test_what_stands_where_nothing_is_given_has_no_influence(device):
    wrapper = wrap(device, Context())
    given = torch.arange(N, device=device) < 5
    outs = []
    for filling in (0, MASK, -100):
        prompt = torch.where(given, torch.arange(N, device=device) % V, filling)
        torch.manual_seed(3)
        outs.append(wrapper.generate(4, prompt=prompt, prompt_mask=given))
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_shapes_of_prompts_and_outputs(dtype, device):
    wrapper = wrap(device)
    row = torch.zeros(N, dtype=dtype, device=device)
    given = torch.arange(N, device=device) < 3
    assert wrapper.generate().shape == (N,)
    assert wrapper.generate(1).shape == (1, N)
    assert wrapper.generate(3).shape == (3, N)
    assert wrapper.generate(prompt=row, prompt_mask=given).shape == (N,)
    assert wrapper.generate(1, prompt=row, prompt_mask=given).shape == (1, N)
    assert wrapper.generate(4, prompt=row, prompt_mask=given).shape == (4, N)
    batch = {"prompt": row.expand(2, -1), "prompt_mask": given.expand(2, -1)}
    assert wrapper.generate(**batch).shape == (2, N)
    ids, trajectory = wrapper.generate(2, **batch, return_trajectory=True)
    assert ids.dtype == torch.int64
    assert trajectory.ids.shape == (18, 2, N)
    assert wrapper.generate(0, prompt=row, prompt_mask=given).shape == (0, N)


# ---- self-conditioning ----


def test_each_pass_is_conditioned_on_the_one_before(device):
    wrapper = wrap(device, self_cond=True)
    wrapper.generate(2, steps=5)
    passed = [call["sum_embeds"] for call in wrapper.net.calls]
    assert len(passed) == 5
    torch.testing.assert_close(passed[0], wrapper.to_self_cond(wrapper.null_embed), rtol=0, atol=0)
    for number, sum_embeds in enumerate(passed[1:], start=1):  # call n returns embeddings of n
        expected = wrapper.to_self_cond(torch.full((2, N, 4), float(number), device=device))
        torch.testing.assert_close(sum_embeds, expected)


def test_without_self_conditioning_nothing_is_passed(device):
    wrapper = wrap(device)
    wrapper.generate(2, steps=2)
    assert all("sum_embeds" not in call for call in wrapper.net.calls)


# ---- randomness ----


@pytest.mark.parametrize("options", [{}, {"choice_temperature": 4.5}], ids=str)
@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("remask", [False, True])
def test_the_same_seed_gives_the_same_output(options, critic, remask, device):
    critic = FixedCritic(torch.arange(N)) if critic else None
    wrapper = wrap(device, Context(), token_critic=critic, can_mask_prev_unmasked=remask)

    def seeded(seed, **more):
        torch.manual_seed(seed)
        return wrapper.generate(4, start_temperature=2.0, **options, **more)

    def drawn(seed, **more):
        generator = torch.Generator().manual_seed(seed)
        return wrapper.generate(4, start_temperature=2.0, generator=generator, **options, **more)

    for generate in (seeded, drawn):
        assert torch.equal(generate(1), generate(1))
        assert not torch.equal(generate(1), generate(2))
        torch.manual_seed(5)
    # One seed from torch's generator, whatever the number of steps and rows.
    torch.manual_seed(1)
    wrapper.generate(3, steps=2)
    after = torch.rand(())
    torch.manual_seed(1)
    wrapper.generate(5, steps=7)
    assert torch.rand(()) == after


@pytest.mark.parametrize("critic", [False, True])
@pytest.mark.parametrize("remask", [False, True])
@pytest.mark.parametrize("self_cond", [False, True])
@pytest.mark.parametrize("prompted", [False, True])
def test_a_batch_may_be_split(critic, remask, self_cond, prompted, device):
    torch.manual_seed(0)
    layers = Encoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    net = TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=layers)
    critic = FixedCritic(torch.arange(N) % 3) if critic else None
    wrapper = wrap(device, net, token_critic=critic, can_mask_prev_unmasked=remask, self_cond=self_cond, steps=7)
    generator = torch.Generator().manual_seed(6)
    prompt = torch.randint(0, V, (6, N), generator=generator).to(device)
    given = (torch.rand(6, N, generator=generator) < torch.linspace(0, 1, 6)[:, None]).to(device)

    def generate(rows: slice) -> torch.Tensor:
        torch.manual_seed(2)
        options = {"prompt": prompt[rows], "prompt_mask": given[rows]} if prompted else {}
        return wrapper.generate(
            rows.stop - rows.start, sample_offset=rows.start, choice_temperature=4.5, start_temperature=3.0, **options
        )

    whole = generate(slice(0, 6))
    assert len(whole.unique(dim=0)) == 6
    assert torch.equal(whole, torch.cat([generate(slice(0, 1)), generate(slice(1, 4)), generate(slice(4, 6))]))


@pytest.mark.parametrize(
    "options",
    [
        {"filter_thres": 0.5},
        {"top_p": 0.8, "filter_thres": None, "choice_temperature": 4.5},
        {"threshold": 0.3, "choice_temperature": 1.0},
        {"noise_level_scale": 2.0, "critic": True, "top_p": 0.9},
        {"threshold": 0.4, "critic": True},
        {"forbidden": [0, 1], "can_mask_prev_unmasked": True, "self_cond": True},
    ],
    ids=str,
)
def test_a_sequence_does_not_know_its_batch(options, device):
    """Alone, among seven, in a part of them, and with a neighbour that is given."""
    options = dict(options)
    of_wrapper = {name: options.pop(name) for name in ("can_mask_prev_unmasked", "self_cond") if name in options}
    if options.pop("critic", False):
        of_wrapper["token_critic"] = Jumping()
    wrapper = wrap(device, Small(), steps=5, **of_wrapper)
    prompt = prompts(device, 7)
    for prompted in (False, True):

        def generate(rows: range, prompted=prompted) -> torch.Tensor:
            given = {name: value[rows.start : rows.stop] for name, value in prompt.items()} if prompted else {}
            generator = torch.Generator().manual_seed(3)
            return wrapper.generate(len(rows), sample_offset=rows.start, generator=generator, **given, **options)

        whole = generate(range(7))
        assert len(whole.unique(dim=0)) > 2
        assert torch.equal(whole, torch.cat([generate(range(row, row + 1)) for row in range(7)]))
        assert torch.equal(whole, torch.cat([generate(range(3)), generate(range(3, 7))]))


# ---- around the loop ----


def test_progress(device, capsys):
    seen = []
    wrapper = wrap(device, varied(4))
    wrapper.generate(1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(step, 18) for step in range(1, 19)]
    pytest.importorskip("tqdm")
    for progress, bar in ((None, False), (False, False), (True, True)):
        assert wrapper.generate(1, progress=progress).shape == (1, 4)
        assert ("demasking" in capsys.readouterr().err) == bar


def test_modes_are_restored_after_generation_and_after_an_exception(device):
    """DESIGN 3.3b row 10: evaluation inside; afterwards each module as it was, a frozen one frozen."""
    net = Known(torch.zeros(V))
    net.frozen, net.hot = nn.Dropout(), nn.Dropout()
    wrapper = wrap(device, net, token_critic=FixedCritic([0.0] * N)).train()
    net.frozen.eval()

    def modes() -> list[bool]:
        return [module.training for module in (wrapper, net, net.frozen, net.hot, wrapper.token_critic)]

    wrapper.generate(1, steps=2)
    assert not any(call["training"] for call in net.calls)
    assert modes() == [True, True, False, True, True]

    def interrupt(done, total):
        assert modes() == [False] * 5
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wrapper.generate(1, progress=interrupt)
    assert modes() == [True, True, False, True, True]
    wrapper.eval()
    wrapper.generate(1, steps=2)
    assert modes() == [False] * 5


def test_generation_needs_and_leaves_no_graph(device):
    wrapper = wrap(device, self_cond=True)
    _, trajectory = wrapper.generate(2, return_trajectory=True)
    assert not trajectory.log_probs.requires_grad
    assert all(not call["sum_embeds"].requires_grad for call in wrapper.net.calls)
    assert torch.is_grad_enabled()


def test_steps_of_the_call_and_of_the_wrapper(device):
    wrapper = wrap(device, varied(4), steps=2)
    assert len(wrapper.generate(1, return_trajectory=True)[1].ids) == 2
    assert len(wrapper.generate(1, steps=5, return_trajectory=True)[1].ids) == 5


def test_one_step_fills_everything(device):
    wrapper = wrap(device)
    torch.manual_seed(0)
    ids = wrapper.generate(50, steps=1, filter_thres=None)
    # Left share 0: the temperature is at its floor, so every place takes its favourite.
    favourite = wrapper.net.logits.detach().clone()
    favourite[:, MASK] = -math.inf
    assert (ids == favourite.argmax(dim=-1)).float().mean() > 0.98


def test_a_callable_schedule_may_rise_between(device):
    """What is committed stays committed: counts never rise, unless remasking is allowed."""
    rising = Schedule(lambda t: 0.5 + 0.4 * torch.sin(12 * t))
    for remask in (False, True):
        wrapper = wrap(device, schedule=rising, can_mask_prev_unmasked=remask)
        ids, trajectory = wrapper.generate(3, return_trajectory=True)
        counts = trajectory.is_masked.sum(dim=-1)[:, 0]
        raw = step_counts(rising, 18, torch.tensor([N])).squeeze(-1)
        assert torch.equal(counts.cpu(), raw if remask else raw.cummin(dim=0).values)
        assert (ids != MASK).all()
        assert (raw.diff() > 0).any()
        assert len(wrapper.net.calls) == (18 if remask else len({N, *counts.tolist()}) - 1)


# ---- the trajectory ----


@pytest.mark.parametrize("options", [{}, {"threshold": 0.5}], ids=str)
@pytest.mark.parametrize("remask", [False, True])
def test_the_trajectory_is_what_each_step_left(options, remask, device):
    """Cut short after n steps, a generation has left the first n entries: none is a view of what comes later."""
    wrapper, prompt = wrap_small(device, can_mask_prev_unmasked=remask), prompts(device)
    given, snapshots = prompt["prompt_mask"], []

    def generate(**more):
        return wrapper.generate(
            **prompt, **options, steps=6, return_trajectory=True, generator=torch.Generator().manual_seed(4), **more
        )

    clone = torch.Tensor.clone

    def recorded_clone(x, **more):
        if x.shape == given.shape:
            snapshots.append(x.tolist())
        return clone(x, **more)

    ids, trajectory = generate()
    with pytest.MonkeyPatch.context() as patch:  # what is cloned after each step, as it was then
        patch.setattr(torch.Tensor, "clone", recorded_clone)
        generate()
    steps = list(zip(*[iter(snapshots[-18:])] * 3, strict=True))
    for values, seen in zip(trajectory, zip(*steps, strict=True), strict=True):
        for value, then in zip(values, seen, strict=True):
            torch.testing.assert_close(value.cpu(), torch.tensor(then, dtype=value.dtype), rtol=0, atol=0)
    assert trajectory.ids.data_ptr() != ids.data_ptr()
    for state, is_masked, log_probs in zip(*trajectory, strict=True):
        assert torch.equal(state[given], prompt["prompt"][given])
        assert (state[is_masked] == MASK).all()
        assert (state[~is_masked & ~given] != MASK).all()
        assert (log_probs[given] == 0).all()
        assert (log_probs[~given] < 0).all()  # proposed at the first step, or again since
    assert (trajectory.is_masked[0] != trajectory.is_masked[-1]).any()
    ids.zero_()
    assert trajectory.ids[-1].any()


# ---- the door ----


@pytest.mark.parametrize(
    "options", [{"top_p": 0.9}, {"forbidden": [1]}, {"threshold": 0.5}, {"cuda_graph": True}], ids=str
)
def test_upstreams_ways_have_none_of_the_new_options(options):
    wrapper = wrap("cpu", compat=True)
    message = f"expected compat=False with {next(iter(options))}=, which x-transformers does not have"
    with pytest.raises(ValueError, match=message):
        wrapper.generate(1, **options)
    assert wrapper.net.calls == []


ROW = torch.zeros(N, dtype=torch.int64)
GIVEN = torch.zeros(N, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": -1}, ValueError, "expected batch_size of at least 0, received -1"),
        ({"batch_size": 2.0}, TypeError, "expected batch_size to be an int, received float"),
        ({"steps": 0}, ValueError, "expected steps of at least 1 and below 16777216, received 0"),
        ({"steps": True}, TypeError, "expected steps to be an int, received bool"),
        ({"start_temperature": -1.0}, ValueError, r"expected start_temperature in \[0, inf\), received -1.0"),
        ({"noise_level_scale": math.nan}, ValueError, r"expected noise_level_scale in \[0, inf\), received nan"),
        ({"choice_temperature": "4"}, TypeError, "expected choice_temperature to be a number, received str"),
        ({"filter_thres": 1.0}, ValueError, r"expected filter_thres in \[0, 1\), received 1.0"),
        ({"filter_thres": -0.1}, ValueError, r"expected filter_thres in \[0, 1\), received -0.1"),
        ({"choice_temperature": -1}, ValueError, r"expected choice_temperature in \[0, inf\), received -1"),
        ({"sample_offset": -1}, ValueError, "expected sample_offset of at least 0 and below 4294967296, received -1"),
        ({"prompt": ROW}, ValueError, "expected prompt and prompt_mask together, received one of them; give both"),
        ({"prompt_mask": GIVEN}, ValueError, "expected prompt and prompt_mask together, received one of them"),
        ({"prompt": [0] * N, "prompt_mask": GIVEN}, TypeError, "expected prompt to be a torch.Tensor, received list"),
        (
            {"prompt": ROW.float(), "prompt_mask": GIVEN},
            TypeError,
            r"expected prompt of dtype int32\|int64, received fl",
        ),
        ({"prompt": ROW, "prompt_mask": ROW}, TypeError, "expected prompt_mask of dtype bool, received int64"),
        (
            {"prompt": ROW, "prompt_mask": GIVEN[1:]},
            ValueError,
            r"expected prompt_mask of shape \[as prompt\] = \[18\], received \[17\]",
        ),
        (
            {"prompt": ROW[1:], "prompt_mask": GIVEN[1:]},
            ValueError,
            r"expected prompt of shape \[B, max_seq_len\] = \[1, 18\], received \[1, 17\]",
        ),
        (
            {"batch_size": 2, "prompt": ROW.expand(3, -1), "prompt_mask": GIVEN.expand(3, -1)},
            ValueError,
            r"expected prompt of shape \[B, max_seq_len\] = \[2, 18\], received \[3, 18\]",
        ),
    ],
)
@pytest.mark.parametrize("compat", [False, True])
def test_arguments_that_do_not_fit(options, error, message, compat):
    wrapper = wrap("cpu", compat=compat)
    with pytest.raises(error, match=message):
        wrapper.generate(**options)
    assert wrapper.net.calls == [] or "sample_offset" in options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_p": 1.5}, ValueError, r"expected top_p in \[0, 1\], received 1.5"),
        ({"top_p": "0.5"}, TypeError, "expected top_p to be a number, received str"),
        ({"threshold": -0.1}, ValueError, r"expected threshold in \[0, 1\], received -0.1"),
        ({"threshold": math.nan}, ValueError, r"expected threshold in \[0, 1\], received nan"),
        ({"threshold": True}, TypeError, "expected threshold to be a number, received bool"),
        ({"forbidden": [V]}, ValueError, "expected forbidden ids of at least 0 and below 12, received 12"),
        ({"forbidden": [0.0]}, TypeError, "expected forbidden ids to be an int, received float"),
        ({"forbidden": torch.tensor([1])}, TypeError, "as a sequence of ids, received a tensor of torch.int64"),
        (
            {"forbidden": torch.zeros(V - 1).bool()},
            ValueError,
            r"expected forbidden of shape \[V\] = \[12\], received \[11\]",
        ),
    ],
)
def test_new_options_that_do_not_fit(options, error, message):
    wrapper = wrap("cpu")
    with pytest.raises(error, match=message):
        wrapper.generate(**options)
    assert wrapper.net.calls == []


def test_a_prompt_of_three_dimensions_is_refused():
    with pytest.raises(
        ValueError, match=r"expected prompt of shape \[B, max_seq_len\] = \[1, 18\], received \[1, 1, 18\]"
    ):
        wrap("cpu").generate(prompt=ROW[None, None], prompt_mask=GIVEN[None, None])


# ---- no step waits for the device ----


class Waits(TorchDispatchMode):
    """Writes down each operation that brings a value to the host, or whose result has a shape that depends on one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        out = func(*args, **(kwargs or {}))
        waits = (
            aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal, aten._unique2,
            aten.unique_dim, aten.unique_consecutive, aten.bincount, aten.repeat_interleave,
        )  # fmt: skip
        takes_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
        by_mask = takes_mask and any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        if func.overloadpacket in waits or by_mask:
            self.seen.append(str(func))
        return out


def inside_the_steps(monkeypatch, context) -> None:
    """Each step of a generation runs in ``context()``, what goes before and between does not."""
    loop, end = NonAutoregressiveWrapper._loop, object()

    def watched(*arguments):
        run = loop(*arguments)
        while True:
            with context():
                if next(run, end) is end:
                    return
            yield

    monkeypatch.setattr(NonAutoregressiveWrapper, "_loop", watched)


WAYS = {
    "plain": ({}, {}),
    "remask": ({"can_mask_prev_unmasked": True}, {"choice_temperature": 1.0}),
    "self_cond": ({"self_cond": True}, {"choice_temperature": 1.0}),
    "critic": ({"token_critic": "own"}, {"noise_level_scale": 2.0}),
    "self_critic": ({"self_token_critic": True, "self_cond": True}, {}),
    "remask_critic": ({"self_token_critic": True, "can_mask_prev_unmasked": True}, {}),
    "filters": ({}, {"filter_thres": 0.5, "top_p": 0.9, "forbidden": [0, 7]}),
    "mask": ({}, {"top_p": 0.9, "forbidden": torch.arange(V) == 7}),
    "threshold": ({}, {"threshold": 0.3, "choice_temperature": 1.0}),
    "threshold_critic": ({"token_critic": "own"}, {"threshold": 0.3}),
    "threshold_remask": ({"can_mask_prev_unmasked": True}, {"threshold": 0.3}),
}


def generate_some_way(way: str, device, prompted: bool, length: int = 8) -> list:
    """Which steps were run."""
    of_wrapper, options = WAYS[way]
    wrapper, done = wrap_small(device, length, **of_wrapper), []
    options = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    given = prompts(device, 2, length) if prompted else {}
    wrapper.generate(
        2, steps=4, progress=lambda step, total: done.append(step), **{"filter_thres": None, **options}, **given
    )
    return done


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("prompted", [False, True])
def test_no_step_waits_for_the_device(way, prompted, device, monkeypatch):
    """DESIGN 4: nothing in the loop brings a value to the host, nor has a shape that depends on one."""
    monkeypatch.setattr(top_k_filter, "np", None)  # a short way that only a CPU has
    mode = Waits()

    @contextmanager
    def refusing():
        with mode, refusing_values(monkeypatch):
            yield

    inside_the_steps(monkeypatch, refusing)
    assert generate_some_way(way, device, prompted) == [1, 2, 3, 4]
    assert mode.seen == []


def test_what_waits_is_seen(device, monkeypatch):
    x, mode = torch.arange(3.0, device=device), Waits()
    x.clone()[x > 1] = 2.0
    waiting = [
        x.nonzero, x[0].item, lambda: bool(x[1]), lambda: x[x > 1], x.unique,
        lambda: x.masked_select(x > 1), lambda: x.repeat_interleave(x.long()), lambda: x.equal(x),
        lambda: x.index_put((x > 1,), x[0]),
    ]  # fmt: skip
    for function in waiting:
        mode.seen.clear()
        with mode:
            function()
        assert mode.seen, function
    mode.seen.clear()
    with mode:
        _ = x[x.long()], x.where(x > 1, 0.0), x.masked_fill(x > 1, 0.0)
    assert mode.seen == []
    inside_the_steps(monkeypatch, lambda: mode)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Small, "forward", lambda net, ids: torch.zeros(*ids.shape, V) + bool((ids == MASK).any()))
        wrap_small("cpu").generate(1, steps=2)
    assert len(mode.seen) == 2


class Copies(TorchDispatchMode):
    """Names the operations that move data between devices and wait until it is there."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {x.device for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        if len(devices) > 1 and not (kwargs or {}).get("non_blocking"):
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_copied_while_the_host_waits(way, monkeypatch):
    """From the first line of generate on; meta tensors have a device of their own, as those of a GPU."""
    mode, generate = Copies(), NonAutoregressiveWrapper.generate

    def watched(*arguments, **options):
        with mode:
            return generate(*arguments, **options)

    monkeypatch.setattr(NonAutoregressiveWrapper, "generate", watched)
    assert generate_some_way(way, torch.device("meta"), False) == [1, 2, 3, 4]
    assert mode.seen == []


def test_a_step_of_ones_own_copies_nothing_while_the_host_waits():
    logits = torch.zeros(2, N, V, device="meta")
    is_masked, mode = torch.zeros(2, N, dtype=torch.bool, device="meta"), Copies()
    with mode:
        for options in ({"counts": 3}, {"threshold": 0.5}, {"counts": 3, "forbidden": [1, 2], "top_p": 0.9}):
            functional.demask_step(
                logits, is_masked.long(), is_masked, mask_id=MASK, choice_temperature=1.0, **options
            )
    assert mode.seen == []


def test_ids_of_a_sequence_are_forbidden_whatever_the_default_device():
    with torch.device("meta"):
        assert functional.as_forbidden([1], 3, torch.device("cpu")).tolist() == [False, True, False]


def test_a_copy_that_waits_is_seen():
    mode, x = Copies(), torch.zeros(3, device="meta")
    with mode:
        torch.ones(3).to("meta", non_blocking=True)
        x[0:1] = 1
        x.where(x > 0, 2.0), x + 1, x.masked_fill(x > 0, 1)
        assert mode.seen == []
        torch.ones(3).to("meta")
        x.copy_(torch.ones(3))
    assert mode.seen == ["aten._to_copy.default", "aten.copy_.default"]


@contextmanager
def refusing_values(patch: pytest.MonkeyPatch):
    """No tensor gives its value to Python, but to Triton's interpreter, which is the device here."""
    inside = []

    def refuse(name):
        method = getattr(torch.Tensor, name)

        def call(tensor, *arguments, **options):
            assert inside, f"Tensor.{name} in a step"
            return method(tensor, *arguments, **options)

        patch.setattr(torch.Tensor, name, call)

    with patch.context() as patch:
        if functional._dispatch.HAS_TRITON:
            from triton.runtime.interpreter import GridExecutor

            run = GridExecutor.__call__

            def interpret(*arguments, **options):
                inside.append(True)
                try:
                    return run(*arguments, **options)
                finally:
                    inside.pop()

            patch.setattr(GridExecutor, "__call__", interpret)
        for name in ("item", "tolist", "nonzero", "cpu", "numpy", "masked_select", "unique", "__bool__", "__int__",
                     "__float__", "__index__"):  # fmt: skip
            refuse(name)
        yield


@pytest.mark.parametrize("way", WAYS)
def test_no_step_waits_for_the_device_on_the_kernels(way, kernel, monkeypatch):
    """Their launchers included."""
    if kernel.name == "cuda":
        pytest.skip("a GPU refuses by itself, see below")
    monkeypatch.setenv("FASTMASK_BACKEND", "triton")
    inside_the_steps(monkeypatch, lambda: refusing_values(monkeypatch))
    assert generate_some_way(way, kernel.device, True, length=4) == [1, 2, 3, 4]


def test_values_are_refused_outside_the_interpreter_only(kernel, monkeypatch):
    if kernel.name == "cuda":
        pytest.skip("a GPU refuses by itself, see below")
    x = torch.ones(2)
    with refusing_values(monkeypatch):
        for function in (x[0].item, x.tolist, x.cpu, x.nonzero, lambda: bool(x[0]), x.numpy):
            with pytest.raises(AssertionError, match="in a step"):
                function()
        functional.sample_tokens(torch.ones(1, 2, 3), seed=1, backend="triton")
    assert x.tolist() == [1.0, 1.0]


@contextmanager
def refusing_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs a GPU: there is nothing to wait for")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("chosen", ["triton", "reference"])
def test_no_step_waits_for_a_gpu(way, chosen, monkeypatch):
    monkeypatch.setenv("FASTMASK_BACKEND", chosen)
    device = torch.device("cuda")
    generate_some_way(way, device, True)  # compiles kernels and starts libraries
    with refusing_synchronisation(), pytest.raises(RuntimeError, match="synchroniz"):  # it can tell
        torch.ones(2, device=device).nonzero()
    inside_the_steps(monkeypatch, refusing_synchronisation)
    assert generate_some_way(way, device, True) == [1, 2, 3, 4]


def test_a_schedule_that_touches_zero_and_rises_again_is_followed(device):
    """With remasking: between, nothing is masked, and the network runs on for what is opened later."""
    swinging = Schedule(lambda t: torch.cos(4 * math.pi * t).clamp(min=0.0))
    wrapper = wrap(device, schedule=swinging, can_mask_prev_unmasked=True)
    raw = step_counts(swinging, 18, torch.tensor([N])).squeeze(-1)
    assert (raw[4:6] == 0).all()
    assert (raw[6:12] > 0).any()
    _, trajectory = wrapper.generate(3, return_trajectory=True)
    assert torch.equal(trajectory.is_masked.sum(dim=-1).cpu(), raw[:, None].expand(-1, 3))


# ---- kernels ----


@pytest.mark.parametrize("options", [{"steps": 3}, {"steps": 3, "can_mask_prev_unmasked": True}], ids=str)
@pytest.mark.parametrize("critic", [False, True])
def test_generation_on_the_kernels_is_that_of_the_reference(kernel, critic, options, monkeypatch):
    layers = Encoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    torch.manual_seed(0)
    net = TransformerWrapper(num_tokens=V, max_seq_len=6, attn_layers=layers)
    wrapper = NonAutoregressiveWrapper(net, mask_id=MASK, self_token_critic=critic, **options).to(kernel.device)

    def generate(backend):
        monkeypatch.setenv("FASTMASK_BACKEND", backend)
        torch.manual_seed(1)
        return wrapper.generate(2, choice_temperature=1.0, return_trajectory=True)

    (ours, our_steps), (theirs, their_steps) = generate("triton"), generate("reference")
    assert torch.equal(ours, theirs)
    assert torch.equal(our_steps.is_masked, their_steps.is_masked)
    torch.testing.assert_close(our_steps.log_probs, their_steps.log_probs)
