"""compat=True is x-transformers 2.31.10, and where the default differs it differs as docs/compat.md says.

Each row of that table has a test of our column, and of the left one under compat=True, here or in
the files of the wrapper and of generation. Not restored, so not tested: coins from Python's ``random`` (the
random stream stays torch's), evaluation mode kept after an exception, modes of submodules overridden;
and the greedy confidence is the default of both (``choice_temperature=0``).
"""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
import torch.nn.functional as F
import x_transformers
import x_transformers.nonautoregressive_wrapper as upstream
from torch import nn
from x_transformers import Encoder, TransformerWrapper

from fastmask import NonAutoregressiveWrapper, functional
from fastmask import upstream as formulas

V, N, MASK = 12, 8, 11
SCHEDULES = {"linear": "linear", "cosine": "cosine", "callable": lambda t: 1 - t**2}
CRITICS = ["none", "own", "self"]

# Upstream's defaults are bugs; a later version may mend them.
same_upstream = pytest.mark.skipif(
    not x_transformers.__dict__.get("__version__", "2.31").startswith("2.31"), reason="compat restores 2.31"
)


def transformer(*, outputs: int | None = None, **options) -> TransformerWrapper:
    layers = Encoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    return TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=layers, logits_dim=outputs, **options)


def pair(device: torch.device, *, critic: str = "none", net: nn.Module | None = None, **options):
    """Our wrapper under compat=True, and upstream's with the same parameters around the same network."""
    torch.manual_seed(0)
    net = transformer() if net is None else net
    if critic != "none":
        options["self_token_critic"] = critic == "self"
        options["token_critic"] = transformer(outputs=1) if critic == "own" else None
    ours = NonAutoregressiveWrapper(net, mask_id=MASK, compat=True, **options).to(device)
    theirs = upstream.NonAutoregressiveWrapper(net, mask_id=MASK, **options).to(device)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def clean(device: torch.device, batch: int = 16) -> torch.Tensor:
    return torch.randint(0, V - 1, (batch, N), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture
def aligned(monkeypatch) -> None:
    """Both sample with the same noise: torch's generator is set back before each sampling."""

    def reseeded(function):
        def sample(*arguments, **options):
            torch.manual_seed(7)
            return function(*arguments, **options)

        return sample

    monkeypatch.setattr(formulas, "sample_tokens", reseeded(formulas.sample_tokens))
    monkeypatch.setattr(upstream, "gumbel_sample", reseeded(upstream.gumbel_sample))


class _Torch:
    """torch, as upstream's forward sees it, with our times, our masks and our random tokens for its own."""

    def __init__(self, masked: functional.MaskedTokens) -> None:
        self.masked = masked

    def __getattr__(self, name: str):
        return getattr(torch, name)

    def empty(self, *shape, device):
        class Times:
            uniform_ = staticmethod(lambda low, high: self.masked.times)

        return Times

    def rand(self, shape, device):
        # Upstream masks where argsort(rand) < k; the argsort of a permutation's inverse is the permutation.
        permutation = self.masked.is_masked.int().argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return permutation.argsort(dim=-1).float()

    def randint(self, low, high, shape, device):
        return self.masked.masked_ids


def replay(monkeypatch, theirs, tokens, masked, *, earlier_pass: bool = False, **options):
    """Upstream's own forward on our masks."""
    kept = masked.is_masked & (masked.masked_ids == tokens)
    subsets = iter([kept, masked.is_masked & ~kept & (masked.masked_ids != MASK)])
    monkeypatch.setattr(upstream, "torch", _Torch(masked))
    monkeypatch.setattr(upstream, "coin_flip", lambda: True)
    monkeypatch.setattr(upstream, "get_mask_subset_prob", lambda mask, prob: next(subsets))
    monkeypatch.setattr(upstream, "sample_prob", lambda prob: earlier_pass)
    return theirs(tokens, **options)


def assert_losses(ours, theirs) -> None:
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=0)


def gradients(wrapper: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    parameters = dict(wrapper.named_parameters())
    found = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def assert_gradients(ours, theirs) -> None:
    """Equal to float32's accuracy, each parameter's by its norm; arguments are (wrapper, loss)."""
    ours, theirs = gradients(*ours), gradients(*theirs)
    assert ours.keys() == theirs.keys()
    total = sum(gradient.norm() ** 2 for gradient in theirs.values() if gradient is not None) ** 0.5
    for name, other in theirs.items():
        if name == "null_embed" and other is None:  # ours always has a gradient, zero where upstream's has none
            assert (ours[name] == 0).all()
            continue
        assert (ours[name] is None) == (other is None), name
        if other is not None:
            assert (ours[name] - other).norm() <= 2**-18 * other.norm() + 2**-22 * total, name


# ---- training is upstream's ----


@same_upstream
@pytest.mark.usefixtures("aligned")
@pytest.mark.parametrize(
    ("schedule", "weighted", "earlier_pass", "critic"),
    list(itertools.product(SCHEDULES, [True, False], [None, False, True], CRITICS)),
)
def test_the_loss_is_upstreams(schedule, weighted, earlier_pass, critic, device, monkeypatch, drawn):
    """Upstream's own forward, made to draw what we drew: same losses, same gradients."""
    ours, theirs = pair(
        device,
        critic=critic,
        schedule=SCHEDULES[schedule],
        use_simple_mdlm_loss_weight=weighted,
        self_cond=earlier_pass is not None,
        self_cond_train_prob=float(bool(earlier_pass)),
        critic_loss_weight=0.7,
    )
    tokens, options = clean(device), {"generator_sample_temperature": 0.8}
    torch.manual_seed(2)
    loss = ours(tokens, **options)
    expected = replay(monkeypatch, theirs, tokens, drawn[0], earlier_pass=bool(earlier_pass), **options)
    assert_losses(loss, expected)
    assert_gradients((ours, loss.loss), (theirs, expected.loss))
    if weighted:
        assert loss.generator_loss < 0  # upstream's sign, faithfully


@same_upstream
@pytest.mark.usefixtures("aligned")
def test_kept_and_random_tokens_are_in_upstreams_loss(device, monkeypatch, drawn):
    ours, theirs = pair(device, no_replace_prob=0.3, random_token_prob=0.4, critic="own")
    tokens, shares = clean(device), []
    for seed in range(16):
        torch.manual_seed(seed)
        loss = ours(tokens, generator_sample_temperature=0.0)
        masked = drawn[-1]
        shares.append((masked.masked_ids[masked.is_masked] != MASK).float().mean().item())
        expected = replay(monkeypatch, theirs, tokens, masked, generator_sample_temperature=0.0)
        assert_losses(loss, expected)
    # Neither coin fell, one of them, both.
    assert min(shares) == 0.0
    assert any(0.3 < share < 0.55 for share in shares)
    assert max(shares) > 0.6


@same_upstream
@pytest.mark.usefixtures("aligned")
@pytest.mark.parametrize("flag", ["only_train_generator", "only_train_critic"])
@pytest.mark.parametrize("critic", ["own", "self"])
def test_training_one_of_the_two_is_upstreams(flag, critic, device, monkeypatch, drawn):
    ours, theirs = pair(device, critic=critic)
    tokens, options = clean(device), {flag: True, "generator_sample_temperature": 0.5}
    loss = ours(tokens, **options)
    expected = replay(monkeypatch, theirs, tokens, drawn[0], **options)
    assert_losses(loss, expected)
    assert_gradients((ours, loss.loss), (theirs, expected.loss))


@same_upstream
@pytest.mark.parametrize(
    "options", [{"tie_embedding": True}, {"mixture_of_softmax": True}, {"sigsoftmax_logits": True}], ids=str
)
@pytest.mark.parametrize("weighted", [True, False])
def test_the_loss_is_upstreams_for_other_heads(options, weighted, device, monkeypatch, drawn):
    torch.manual_seed(4)
    ours, theirs = pair(device, net=transformer(**options), use_simple_mdlm_loss_weight=weighted)
    tokens = clean(device)
    loss = ours(tokens)
    expected = replay(monkeypatch, theirs, tokens, drawn[0])
    assert_losses(loss, expected)
    assert_gradients((ours, loss.loss), (theirs, expected.loss))


@pytest.mark.parametrize("path", ["embeddings", "logits"])
def test_nothing_to_learn_is_zero_not_nan(path, device):
    ours, _ = pair(device)
    if path == "logits":
        ours.net.register_forward_hook(lambda module, arguments, output: None)
    nowhere = torch.zeros(16, N, dtype=torch.bool, device=device)
    assert ours(clean(device), maskable=nowhere).loss == 0
    assert ours(clean(device, 0)).loss == 0


# ---- generation is upstream's ----


def sharp() -> TransformerWrapper:
    """A network whose preferences are clear, so that temperature 1e-3 leaves nothing to chance."""
    torch.manual_seed(5)
    net = transformer()
    with torch.no_grad():
        net.to_logits.weight.mul_(4.0)
    return net


@same_upstream
@pytest.mark.parametrize(
    ("schedule", "remask", "self_cond", "critic", "steps"),
    list(itertools.product(SCHEDULES, [False, True], [False, True], CRITICS, [1, 5, 11])),
)
def test_greedy_generation_is_upstreams(schedule, remask, self_cond, critic, steps, device):
    ours, theirs = pair(
        device,
        net=sharp(),
        critic=critic,
        schedule=SCHEDULES[schedule],
        can_mask_prev_unmasked=remask,
        self_cond=self_cond,
        steps=steps,
    )
    options = {"start_temperature": 0.0, "noise_level_scale": 0.0}
    assert torch.equal(ours.generate(2, **options), theirs.generate(2, **options))


@same_upstream
@pytest.mark.usefixtures("aligned")
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("filter_thres", [0.7, 0.25, None])
@pytest.mark.parametrize("self_cond", [False, True])
def test_hot_generation_is_upstreams_where_the_noise_can_be_aligned(schedule, filter_thres, self_cond, device):
    """With remasking every position is sampled at every step, so both draw the same numbers in the same order."""
    ours, theirs = pair(
        device, schedule=SCHEDULES[schedule], can_mask_prev_unmasked=True, self_cond=self_cond, steps=6
    )
    for temperature in (0.3, 1.0, 2.0):
        options = {"start_temperature": temperature, "filter_thres": filter_thres}
        generated = ours.generate(16, **options)
        assert torch.equal(generated, theirs.generate(16, **options))
        assert len(generated.unique(dim=0)) > 4  # hot enough to tell


# ---- what differs, row by row ----


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_default_learns_what_upstreams_default_unlearns(device, seed):
    """Row 1. x_i = c + i mod 16: any visible token tells all others."""
    vocabulary, length, steps, batch = 17, 8, 300, 64
    places = torch.arange(length, device=device)

    def draw(count: int, seed: int) -> torch.Tensor:
        start = torch.randint(0, vocabulary - 1, (count, 1), generator=torch.Generator().manual_seed(seed))
        return (start.to(device) + places) % (vocabulary - 1)

    held_out = draw(256, 10**6)
    seen = held_out.masked_fill(places % 2 == 0, vocabulary - 1)

    def train(kind, **options) -> tuple[float, float]:
        torch.manual_seed(seed)
        random.seed(seed)  # upstream's coins
        layers = Encoder(dim=32, depth=2, heads=2, attn_dim_head=16)
        net = TransformerWrapper(num_tokens=vocabulary, max_seq_len=length, attn_layers=layers)
        wrapper = kind(net, mask_id=vocabulary - 1, **options).to(device)
        optimizer = torch.optim.Adam(wrapper.parameters(), lr=3e-3)
        losses = []
        for step in range(steps):
            loss = wrapper(draw(batch, step)).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        with torch.no_grad():
            correct = (net(seen)[..., :-1].argmax(dim=-1) == held_out)[:, ::2]  # the mask is no prediction
        return sum(losses[-20:]) / 20, correct.float().mean().item()  # one batch alone is noisy

    loss, accuracy = train(NonAutoregressiveWrapper)
    # The entropy of the start, log 16 nats, spread over 8 tokens: .35 nats per token at best.
    assert 0.2 < loss < 1.0
    assert accuracy > 0.95
    loss, accuracy = train(upstream.NonAutoregressiveWrapper)
    assert loss < -5
    assert accuracy < 0.2


class Fixed(nn.Module):
    """A network with the same logits [V] everywhere."""

    def __init__(self, logits: torch.Tensor, length: int = N, emb_dim: int = 4) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len, self.emb_dim = len(logits), length, emb_dim
        self.logits = nn.Parameter(logits)
        self.calls: list[dict] = []

    def forward(self, ids, return_embeddings=False, return_logits_and_embeddings=False, **kwargs):
        self.calls.append({"ids": ids.clone(), **kwargs})
        logits = self.logits.expand(*ids.shape, -1)
        embeddings = torch.ones(*ids.shape, self.emb_dim, device=ids.device) * len(self.calls)
        if return_logits_and_embeddings:
            return logits, embeddings
        return embeddings if return_embeddings else logits


def certain(token: int, vocabulary: int = V) -> torch.Tensor:
    return 1000.0 * F.one_hot(torch.tensor(token), vocabulary)


class Constant(nn.Module):
    """A critic that finds every token as wrong as the others: its loss tells the mean label."""

    LOGIT = 2.0

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict] = []

    def forward(self, ids, **kwargs):
        self.calls.append({"ids": ids.clone(), **kwargs})
        return torch.full((*ids.shape, 1), self.LOGIT, device=ids.device)

    @classmethod
    def mean_label(cls, loss: torch.Tensor) -> float:
        return ((F.softplus(torch.tensor(cls.LOGIT)) - loss.cpu()) / cls.LOGIT).item()


@pytest.mark.parametrize("restored", [False, True])
def test_critic_labels(restored, device, drawn):
    """Row 2: a token of the data is not wrong because the generator would have said something else."""
    critic = Constant()
    wrapper = NonAutoregressiveWrapper(Fixed(certain(0)), mask_id=MASK, token_critic=critic, compat=restored)
    wrapper = wrapper.to(device)
    ones = torch.ones(16, N, dtype=torch.int64, device=device)
    loss = wrapper(ones).critic_loss
    masked = drawn[0].is_masked
    assert 0.2 < masked.float().mean() < 0.9
    expected = 1.0 if restored else masked.float().mean().item()
    assert Constant.mean_label(loss) == pytest.approx(expected, abs=1e-6)
    assert torch.equal(critic.calls[0]["ids"], ones.masked_fill(masked, 0))  # what is judged is the same
    assert Constant.mean_label(wrapper(0 * ones).critic_loss) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("restored", [False, True])
def test_mask_id_is_never_sampled(restored, device):
    """Row 3: not even by a network that wants nothing else."""
    logits = certain(MASK)
    logits[3] = 500.0
    critic = Constant()
    wrapper = NonAutoregressiveWrapper(Fixed(logits), mask_id=MASK, token_critic=critic, compat=restored).to(device)
    expected = MASK if restored else 3
    assert (wrapper.generate(4) == expected).all()
    critic.calls.clear()
    tokens = clean(device)
    wrapper(tokens)
    generated = critic.calls[0]["ids"]
    assert set(generated[generated != tokens].tolist()) == {expected}


@pytest.mark.parametrize("restored", [False, True])
def test_random_replacement_is_never_mask_id(restored, device, drawn):
    """Row 3: a random token that is the mask is a mask: 1/V of them, with upstream."""
    vocabulary = 4
    net = Fixed(torch.zeros(vocabulary))
    wrapper = NonAutoregressiveWrapper(
        net, mask_id=1, no_replace_prob=0.0, random_token_prob=1.0, compat=restored
    ).to(device)
    tokens = torch.zeros(2000, N, dtype=torch.int64, device=device)
    shares = []
    for seed in range(12):
        torch.manual_seed(seed)
        wrapper(tokens)
        visible = drawn[-1].masked_ids[drawn[-1].is_masked]
        if (visible == 2).any():  # the coin fell so
            shares.append((visible == 1).float().mean().item())
    assert len(shares) >= 3
    # Of some 9000 tokens: five standard errors of 1/4 are .023.
    assert all(abs(share - 0.25) < 0.023 for share in shares) if restored else shares == [0.0] * len(shares)


@pytest.mark.parametrize("restored", [False, True])
def test_noise_in_the_logits_dtype(restored, device):
    """Row 4: in bfloat16 there are 256 uniforms, their largest comes first among the first few hundred ids."""
    vocabulary = 50257
    net = Fixed(torch.zeros(vocabulary, dtype=torch.bfloat16), length=16)
    wrapper = NonAutoregressiveWrapper(net, mask_id=vocabulary - 1, compat=restored, steps=2).to(device)
    torch.manual_seed(0)
    ids = wrapper.generate(4, filter_thres=None).float()
    if restored:
        assert ids.mean() < 1000
        assert ids.max() < 5000
    else:  # 64 uniform ids: the mean is 25128, its standard error 1814
        assert abs(ids.mean() - 25128) < 4 * 1814
        assert ids.max() > 40000


def test_the_restored_noise_is_upstreams_arithmetic(device):
    """Row 4: same generator, same ids, in every dtype; the uniform 0, one in 256 of bfloat16's, included."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.randn(3000, 7, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        for temperature in (0.0, 0.5, 3.0):
            torch.manual_seed(3)
            expected = upstream.gumbel_sample(logits, temperature=temperature)
            torch.manual_seed(3)
            sampled = formulas.sample_tokens(logits, temperature=temperature, top_k=None, generator=None)
            assert torch.equal(sampled.ids, expected), (dtype, temperature)
            probabilities = logits.softmax(dim=-1).gather(-1, expected[:, None]).squeeze(-1)
            torch.testing.assert_close(sampled.log_probs.exp(), probabilities.float())


def test_the_restored_filter_is_upstreams():
    logits = torch.randn(50, 1, 10, generator=torch.Generator().manual_seed(1))
    logits[:, :, 5:] = logits[:, :, :5]  # ties at the threshold: upstream keeps exactly k
    for threshold in (0.0, 0.35, 0.7, 0.95):
        torch.manual_seed(3)
        expected = upstream.gumbel_sample(upstream.top_k(logits, threshold)).squeeze(1)
        torch.manual_seed(3)
        top_k = math.ceil((1 - threshold) * 10)
        sampled = formulas.sample_tokens(logits.squeeze(1), temperature=1.0, top_k=top_k, generator=None)
        assert torch.equal(sampled.ids, expected)


def test_the_restored_sampler_takes_a_generator(device):
    logits = torch.zeros(50, 9, device=device)
    ids = [
        formulas.sample_tokens(
            logits, temperature=1.0, top_k=None, generator=torch.Generator(device).manual_seed(seed)
        ).ids
        for seed in (1, 1, 2)
    ]
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2])


class Regretful(nn.Module):
    """Says A at place 0 with certainty, and once it stands there, B: A then has probability e^-60."""

    A, B, C = 0, 1, 2
    num_tokens, max_seq_len = 5, 2

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, 5, device=ids.device)
        regrets = ids[:, 0] == self.A
        logits[:, 0, self.A] = torch.where(regrets, -30.0, 30.0)
        logits[:, 0, self.B] = torch.where(regrets, 30.0, -30.0)
        logits[:, 1, self.C] = 2.0  # p of about 2/3
        return logits


@pytest.mark.parametrize("restored", [False, True])
def test_a_kept_id_is_scored_by_its_own_probability(restored, device):
    """Row 5: upstream scores place 0 by the B it would sample now, and leaves the A."""
    wrapper = NonAutoregressiveWrapper(
        Regretful(), mask_id=4, steps=4, can_mask_prev_unmasked=True, compat=restored
    ).to(device)
    torch.manual_seed(0)
    _, trajectory = wrapper.generate(8, start_temperature=0.0, filter_thres=None, return_trajectory=True)
    first, second = trajectory.is_masked[:2].cpu()
    assert first.tolist() == [[False, True]] * 8
    assert second.tolist() == [[False, True] if restored else [True, False]] * 8
    p_place_0 = trajectory.log_probs[1, :, 0].exp()
    assert (p_place_0 > 0.99).all() if restored else (p_place_0 < 1e-13).all()


@pytest.mark.parametrize("restored", [False, True])
def test_the_first_pass_of_self_conditioning(restored, device):
    """Row 8: generation conditions its first pass on the null embedding, so training should too."""
    net = Fixed(torch.zeros(V))
    wrapper = NonAutoregressiveWrapper(
        net, mask_id=MASK, self_cond=True, self_cond_train_prob=1.0, compat=restored
    ).to(device)
    wrapper(clean(device)).loss.backward()
    first, second = net.calls
    null = wrapper.to_self_cond(wrapper.null_embed)
    if restored:
        assert "sum_embeds" not in first
    else:
        torch.testing.assert_close(first["sum_embeds"], null, rtol=0, atol=0)
    # The second pass is conditioned on the first one's embeddings: ones, its number of calls.
    torch.testing.assert_close(second["sum_embeds"], wrapper.to_self_cond(torch.ones(16, N, 4, device=device)))
    net.calls.clear()
    wrapper.generate(2, steps=2)
    torch.testing.assert_close(net.calls[0]["sum_embeds"], null, rtol=0, atol=0)


@pytest.mark.parametrize("restored", [False, True])
def test_arguments_reach_the_critic(restored, device):
    """Row 9."""
    critic = Constant()
    net = Fixed(torch.zeros(V))
    wrapper = NonAutoregressiveWrapper(net, mask_id=MASK, token_critic=critic, compat=restored, steps=1).to(device)
    wrapper(clean(device), mask="a mask")
    wrapper.generate(2, mask="a mask")
    assert [call.get("mask") for call in net.calls] == ["a mask"] * 2
    assert [call.get("mask") for call in critic.calls] == [None if restored else "a mask"] * 2


@pytest.mark.parametrize("name", ["linear", "cosine", "callable"])
def test_restored_weights(name, device):
    """Row 1, the formula: the derivative over 1 - schedule, on the mask ratio, as upstream's vmap has it."""
    _, theirs = pair(device, schedule=SCHEDULES[name])
    ours, _ = pair(device, schedule=SCHEDULES[name])
    times = torch.linspace(0.01, 0.99, 99, device=device)
    masked = functional.mask_sampling(clean(device, 99), mask_id=MASK, num_tokens=V, times=times, seed=0)
    weights = ours._formulas.loss_weights(ours.schedule_fn, masked)
    torch.testing.assert_close(weights, theirs.loss_weight_fn(times), rtol=1e-6, atol=0)
    assert (weights < 0).all()


@pytest.mark.parametrize("critic", CRITICS)
def test_a_generator_decides_everything(critic, device):
    """Also what the restored sampler draws: for the critic in training, and in generation."""
    ours, _ = pair(device, critic=critic, self_cond=True)

    def step(seed: int):
        torch.seed()  # torch's own generator has no say
        generator = torch.Generator(device).manual_seed(seed)
        losses = ours(clean(device), generator=generator)
        return [
            *(loss for loss in losses if loss is not None),
            ours.generate(4, filter_thres=None, generator=generator),
        ]

    for one, other in zip(step(1), step(1), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(step(1)[-1], step(2)[-1])
