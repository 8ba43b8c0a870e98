"""The training objective: what the loss means, what trains, and what is refused at the door."""

from __future__ import annotations

import itertools
import math
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
import x_transformers.nonautoregressive_wrapper as upstream
from torch import nn
from x_transformers import Encoder, TransformerWrapper

from fastmask import Losses, NonAutoregressiveWrapper, Schedule, backbone, functional
from fastmask._host_count import HostCount

V, N, MASK = 12, 6, 11
SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "callable": lambda t: 1 - t**2,
    "Schedule": Schedule(lambda t: (1 - t) ** 1.5, lambda t: -1.5 * (1 - t) ** 0.5),
}
CRITICS = ["none", "own", "self"]


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def transformer(outputs: int | None = None, **options) -> TransformerWrapper:
    layers = Encoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    return TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=layers, logits_dim=outputs, **options)


def build(device, kind=NonAutoregressiveWrapper, *, critic="none", net=None, **options):
    torch.manual_seed(0)
    net = transformer() if net is None else net
    if critic == "own":
        options["token_critic"] = transformer(outputs=1)
    return kind(net, mask_id=MASK, self_token_critic=critic == "self", **options).to(device)


def clean(device, batch: int = 8) -> torch.Tensor:
    return torch.randint(0, V - 1, (batch, N), generator=torch.Generator().manual_seed(1)).to(device)


@pytest.fixture
def drawn(monkeypatch) -> list[functional.MaskedTokens]:
    """What was masked, in order."""
    masks, sampling = [], functional.mask_sampling
    monkeypatch.setattr(functional, "mask_sampling", lambda *a, **k: masks.append(sampling(*a, **k)) or masks[-1])
    return masks


# ---- x-transformers' users ----


@pytest.mark.parametrize("weighted", [True, False])
def test_what_x_transformers_tests_of_its_wrapper(weighted, device):
    """tests/test_x_transformers.py of 2.31.10, its import replaced; its size is the reason for no more of it."""
    layers = Encoder(dim=512, depth=4, rotary_pos_emb=True)
    net = TransformerWrapper(num_tokens=257, max_seq_len=1024, attn_layers=layers)
    wrapper = NonAutoregressiveWrapper(net, mask_id=256, use_simple_mdlm_loss_weight=weighted).to(device)
    loss = wrapper(torch.randint(0, 257 - 1, (1, 1024), device=device))
    loss.loss.backward()
    assert loss.loss.isfinite()
    assert all(parameter.grad is not None for parameter in wrapper.parameters())


GRID = list(
    itertools.product(
        ["linear", "cosine", "callable"], [False, True], CRITICS, [False, True], [True, False], [False, True]
    )
)


@pytest.mark.parametrize(("schedule", "self_cond", "critic", "remask", "weighted", "compat"), GRID)
def test_every_set_of_options_trains_and_generates(schedule, self_cond, critic, remask, weighted, compat, device):
    wrapper = build(
        device,
        critic=critic,
        schedule=SCHEDULES[schedule],
        self_cond=self_cond,
        can_mask_prev_unmasked=remask,
        use_simple_mdlm_loss_weight=weighted,
        compat=compat,
        steps=3,
    )
    losses = wrapper(clean(device))
    assert isinstance(losses, Losses)
    assert losses._fields == upstream.Losses._fields
    assert (losses.critic_loss is None) == (critic == "none")
    if critic == "none":
        assert losses.loss is losses.generator_loss
    losses.loss.backward()
    for name, parameter in wrapper.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    before = [parameter.clone() for parameter in wrapper.parameters()]
    torch.optim.SGD(wrapper.parameters(), lr=1e-3).step()
    assert not all(map(torch.equal, before, wrapper.parameters()))
    ids = wrapper.generate(3)
    assert ids.shape == (3, N)
    assert ids.dtype == torch.int64
    assert (ids >= 0).all()
    assert (ids < (V if compat else MASK)).all()


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("self_cond", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_of_x_transformers_loads(critic, self_cond, tied, device):
    torch.manual_seed(9)
    theirs = build(
        device, upstream.NonAutoregressiveWrapper, critic=critic, self_cond=self_cond,
        net=transformer(tie_embedding=tied),
    )  # fmt: skip
    ours = build(device, critic=critic, self_cond=self_cond, net=transformer(tie_embedding=tied))
    for value in theirs.state_dict().values():
        value.add_(1.0)
    assert ours.load_state_dict(theirs.state_dict(), strict=True).missing_keys == []
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert len(list(ours.parameters())) == len(list(theirs.parameters()))  # the self critic shares its trunk


def test_arguments_and_defaults_are_upstreams():
    import inspect

    for method in ("__init__", "forward", "generate"):
        theirs = inspect.signature(getattr(upstream.NonAutoregressiveWrapper, method)).parameters
        ours = inspect.signature(getattr(NonAutoregressiveWrapper, method)).parameters
        for name, parameter in theirs.items():
            assert ours[name].default == parameter.default, (method, name)
            assert ours[name].kind == parameter.kind, (method, name)


# ---- the loss, by enumeration ----


class Table(nn.Module):
    """A network that looks its logits up: one table [n, V] for each set of masked positions."""

    def __init__(self, length: int, vocabulary: int = 5, seed: int = 0) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len, self.mask_id = vocabulary, length, vocabulary - 1
        values = torch.randn(2**length, length, vocabulary, generator=torch.Generator().manual_seed(seed))
        self.table = nn.Parameter(2 * values)

    def forward(self, ids):
        bits = 2 ** torch.arange(self.max_seq_len, device=ids.device)
        return self.table[((ids == self.mask_id) * bits).sum(dim=-1)]


def tiny(length: int) -> tuple[Table, torch.Tensor]:
    net = Table(length)
    return net, torch.randint(0, net.mask_id, (length,), generator=torch.Generator().manual_seed(2))


def subset_losses(net: Table, tokens: torch.Tensor) -> dict[tuple[int, ...], float]:
    """The summed cross-entropy, float64, over each non-empty set of masked positions."""
    losses = {}
    for size in range(1, net.max_seq_len + 1):
        for chosen in itertools.combinations(range(net.max_seq_len), size):
            ids = tokens.clone()
            ids[list(chosen)] = net.mask_id
            logits = net(ids[None])[0].detach().double()
            losses[chosen] = F.cross_entropy(logits, tokens, reduction="none")[list(chosen)].sum().item()
    return losses


def by_size(losses: dict[tuple[int, ...], float]) -> dict[int, float]:
    """The mean over the sets of each size."""
    sizes = {len(chosen) for chosen in losses}
    groups = {k: [value for chosen, value in losses.items() if len(chosen) == k] for k in sizes}
    return {k: sum(values) / len(values) for k, values in groups.items()}


def any_order_nll(net: Table, tokens: torch.Tensor) -> float:
    """The mean over all n! orders of the autoregressive NLL, nats per token: order by order, no formula."""
    length, total = net.max_seq_len, 0.0
    for order in itertools.permutations(range(length)):
        for i in range(length):
            ids = tokens.clone()
            ids[list(order[i:])] = net.mask_id
            total -= net(ids[None])[0].detach().double().log_softmax(dim=-1)[order[i], tokens[order[i]]].item()
    return total / math.factorial(length) / length


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_the_two_ways_to_write_the_any_order_nll_agree(length):
    """Order by order, and set by set: sum_k 1/k times the mean over sets of size k."""
    net, tokens = tiny(length)
    by_sets = sum(value / k for k, value in by_size(subset_losses(net, tokens)).items()) / length
    assert by_sets == pytest.approx(any_order_nll(net, tokens), rel=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_exact_masks_integrate_to_the_any_order_nll(name, length):
    """Weights and counts as drawn on a fine grid of times, the sets of each size enumerated: no sampling error."""
    net, tokens = tiny(length)
    sizes = by_size(subset_losses(net, tokens))
    times = (torch.arange(60000) + 0.5) / 60000  # 60 divides it: linear's jumps fall between the points
    masked = functional.mask_sampling(
        tokens.expand(len(times), -1), mask_id=net.mask_id, num_tokens=net.num_tokens,
        schedule=SCHEDULES[name], times=times, seed=0,
    )  # fmt: skip
    assert torch.equal(masked.is_masked.sum(dim=-1), masked.counts)
    mean = torch.tensor([0.0, *(sizes[k] for k in range(1, length + 1))], dtype=torch.float64)[masked.counts]
    expectation = (masked.loss_weights.double() * mean).mean().item() / length
    # A jump between two points of the grid costs at most its height times the spacing.
    by_sets = sum(value / k for k, value in sizes.items()) / length
    assert expectation == pytest.approx(by_sets, rel=2e-4)


def exact(name: str, times: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """schedule(t) and its absolute slope, float64, from formulas written down again."""
    formulas = {"linear": lambda t: 1 - t, "cosine": lambda t: (t * math.pi / 2).cos()}
    times = times.double().requires_grad_()
    ratio = formulas.get(name, SCHEDULES[name])(times)
    return ratio.detach(), torch.autograd.grad(ratio.sum(), times)[0].abs()


@pytest.mark.parametrize("name", SCHEDULES)
def test_bernoulli_weights_are_the_slope_over_the_ratio(name):
    times = (torch.arange(600) + 0.5) / 600
    masked = functional.mask_sampling(
        torch.zeros(600, 1024, dtype=torch.int64),
        mask_id=1,
        num_tokens=2,
        schedule=SCHEDULES[name],
        mode="bernoulli",
        times=times,
        seed=0,
    )
    ratio, slope = exact(name, times)
    seen = masked.counts > 0  # a sequence this long is hardly ever empty, and then its weight is 0
    assert seen.float().mean() > 0.98
    torch.testing.assert_close(masked.loss_weights[seen].double(), (slope / ratio)[seen], rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5])
def test_bernoulli_masks_with_these_weights_integrate_to_the_any_order_nll(name, length):
    """The mathematics that the test above and the one below rely on."""
    net, tokens = tiny(length)
    losses = subset_losses(net, tokens)
    mean, _ = draws(name, "bernoulli", losses, length)
    by_sets = sum(value / k for k, value in by_size(losses).items()) / length
    assert mean == pytest.approx(by_sets, rel=2e-3)


def draws(name: str, mode: str, losses: dict[tuple[int, ...], float], length: int) -> tuple[float, float]:
    """Mean and standard deviation of one sequence's loss, nats per token, t ~ U(0, 1): by quadrature."""
    ratio, slope = exact(name, (torch.arange(60000, dtype=torch.float64) + 0.5) / 60000)
    first = second = 0.0
    for chosen, value in losses.items():
        k = len(chosen)
        if mode == "exact":
            probability = ((ratio * length).ceil().clamp(min=1) == k) / math.comb(length, k)
            loss = slope / k * value
        else:
            probability, loss = ratio**k * (1 - ratio) ** (length - k), slope / ratio / length * value
        first += (probability * loss).mean().item()
        second += (probability * loss**2).mean().item()
    return first, math.sqrt(second - first**2)


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
@pytest.mark.parametrize("name", ["linear", "cosine", "callable"])
def test_the_wrappers_loss_and_nelbo_are_that_integral(name, mode, device):
    """What forward and nelbo return, over many sequences: within five of its own standard errors, known exactly."""
    length, batch = 3, 40000
    net, tokens = tiny(length)
    mean, deviation = draws(name, mode, subset_losses(net, tokens), length)
    truth = any_order_nll(net, tokens)
    assert mean == pytest.approx(truth, rel=2e-3)
    error = deviation / math.sqrt(batch)
    assert error < 0.015 * truth  # small enough to tell
    wrapper = NonAutoregressiveWrapper(
        net, mask_id=net.mask_id, schedule=SCHEDULES[name], mask_mode=mode, no_replace_prob=0.0, random_token_prob=0.0
    ).to(device)
    torch.manual_seed(3)
    tokens = tokens.to(device)
    assert abs(wrapper(tokens.expand(batch, -1)).loss.item() - truth) < 5 * error
    # Stratified times leave only the variance of the masks, so these hold all the more.
    assert abs(wrapper.nelbo(tokens.expand(batch, -1)).item() - truth) < 5 * error
    assert abs(wrapper.nelbo(tokens.expand(batch // 100, -1), num_samples=100).item() - truth) < 5 * error


def test_nelbo_has_no_gating_no_dropout_and_leaves_the_modes(device, drawn):
    wrapper = build(device, net=transformer(emb_dropout=0.5), no_replace_prob=1.0, random_token_prob=1.0)
    wrapper.net.token_emb.eval()
    wrapper.train()
    wrapper.net.token_emb.eval()
    torch.manual_seed(3)
    first = wrapper.nelbo(clean(device), num_samples=3)
    assert wrapper.training
    assert not wrapper.net.token_emb.training
    wrapper.eval()
    torch.manual_seed(3)
    assert wrapper.nelbo(clean(device), num_samples=3) == first  # dropout would differ
    for masked in drawn:
        assert (masked.masked_ids[masked.is_masked] == MASK).all()
    times = torch.cat([masked.times for masked in drawn[:3]])
    assert sorted((times.double() * 24).floor().tolist()) == list(range(24))  # one in each stratum of all draws
    assert not first.requires_grad
    assert first.dtype == torch.float32
    assert first.shape == ()


def test_nelbo_ignores_compat_and_uses_the_null_embedding(device):
    class Conditioned(Table):
        emb_dim = 4

        def forward(self, ids, sum_embeds=None):
            assert torch.equal(sum_embeds, wrapper.to_self_cond(wrapper.null_embed))
            return super().forward(ids)

    net = Conditioned(3)
    tokens = torch.zeros(64, 3, dtype=torch.int64, device=device)
    bounds = []
    for compat in (False, True):
        wrapper = NonAutoregressiveWrapper(net, mask_id=4, self_cond=True, compat=compat).to(device)
        torch.manual_seed(3)
        bounds.append(wrapper.nelbo(tokens))
    assert bounds[0] == bounds[1] > 0


def test_nelbo_draws_from_a_generator_and_respects_maskable(device):
    wrapper, tokens = build(device), clean(device)
    values = [wrapper.nelbo(tokens, generator=torch.Generator(device).manual_seed(s)) for s in (1, 1, 2)]
    assert values[0] == values[1] != values[2]
    maskable = torch.zeros_like(tokens, dtype=torch.bool)
    assert wrapper.nelbo(tokens, maskable=maskable) == 0
    maskable[:, 0] = True  # one open position: no chance left but for w = |slope| n / k = 1
    logits = wrapper.net(tokens.masked_fill(maskable, MASK))[:, 0]
    torch.testing.assert_close(wrapper.nelbo(tokens, maskable=maskable), F.cross_entropy(logits, tokens[:, 0]))


# ---- the loss of one step ----


@pytest.mark.parametrize("mode", ["exact", "bernoulli"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_the_formula(mode, weighted, padded, device, drawn):
    """sum_b w_b sum_i CE_bi / sum_b n_b, or the mean over masked tokens; kept and random ones included."""
    wrapper = build(
        device, mask_mode=mode, use_simple_mdlm_loss_weight=weighted, no_replace_prob=0.5, random_token_prob=0.5
    )
    tokens = clean(device, 32)
    maskable = torch.rand(32, N, generator=torch.Generator().manual_seed(4)).to(device) < 0.6 if padded else None
    for seed in range(4):
        torch.manual_seed(seed)
        loss = wrapper(tokens, maskable=maskable).loss
        masked = drawn[-1]
        losses = F.cross_entropy(wrapper.net(masked.masked_ids).transpose(1, 2), tokens, reduction="none")
        losses = losses * masked.is_masked
        if weighted:
            allowed = tokens.numel() if maskable is None else maskable.sum()
            expected = (losses * masked.loss_weights[:, None]).sum() / allowed
        else:
            expected = losses.sum() / masked.is_masked.sum()
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        if padded:
            assert not (masked.is_masked & ~maskable).any()


def test_padding_changes_nothing(device):
    """What stands at a position that is not maskable, hidden from attention besides, is not in the loss."""
    wrapper, tokens = build(device, critic="own"), clean(device)
    maskable = torch.ones_like(tokens, dtype=torch.bool)
    maskable[:, 4:] = False
    losses = []
    for padding in (0, 5):
        tokens[:, 4:] = padding
        torch.manual_seed(2)
        losses.append(wrapper(tokens, maskable=maskable, mask=maskable))
    assert losses[0] == losses[1]


def test_gating_options_reach_the_masks(device, drawn):
    wrapper = build(device, no_replace_prob=0.0, random_token_prob=0.0)
    for seed in range(8):
        torch.manual_seed(seed)
        wrapper(clean(device))
        assert (drawn[-1].masked_ids[drawn[-1].is_masked] == MASK).all()
    wrapper = build(device, no_replace_prob=1.0, random_token_prob=0.0)
    kept = set()
    for seed in range(8):
        torch.manual_seed(seed)
        wrapper(clean(device))
        kept.add(torch.equal(drawn[-1].masked_ids, clean(device)))
    assert kept == {True, False}


def test_times_are_stratified(device, drawn):
    wrapper = build(device, stratified_times=True)
    for offset in (0, 8):
        wrapper(clean(device), sample_offset=offset)
        assert sorted((drawn[-1].times.double() * 8).floor().tolist()) == list(range(8))
    # Two ranks of four rows, told of each other, share the eight strata.
    torch.manual_seed(3)
    wrapper(clean(device))
    whole = drawn[-1]
    for offset in (0, 4):
        torch.manual_seed(3)
        wrapper(clean(device)[offset : offset + 4], sample_offset=offset, global_batch_size=8)
        assert torch.equal(drawn[-1].times, whole.times[offset : offset + 4])
        assert torch.equal(drawn[-1].masked_ids, whole.masked_ids[offset : offset + 4])
    # Independent times leave some eighth empty in all but 8!/8^8 = .24 % of cases.
    build(device)(clean(device))
    assert len(set((drawn[-1].times.double() * 8).floor().tolist())) < 8


@pytest.mark.parametrize("critic", CRITICS)
def test_accumulated_gradients_are_those_of_the_batch(critic, device):
    """Each part is told the batch's number of tokens, and where it stands in the batch."""
    wrapper, tokens = build(device, critic=critic), clean(device)
    maskable = torch.rand(8, N, generator=torch.Generator().manual_seed(4)).to(device) < 0.7

    def accumulate(parts: int, num_tokens: torch.Tensor | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        wrapper.zero_grad()
        total = torch.zeros((), device=device)
        for offset in range(0, 8, 8 // parts):
            part = slice(offset, offset + 8 // parts)
            torch.manual_seed(5)
            loss = wrapper(
                tokens[part],
                maskable=maskable[part],
                num_tokens=num_tokens,
                sample_offset=offset,
                generator_sample_temperature=0.7,
            ).loss
            loss.backward()
            total += loss.detach()
        return total, [parameter.grad.clone() for parameter in wrapper.parameters()]

    whole, expected = accumulate(1, None)
    total, gradients = accumulate(4, maskable.sum())
    torch.testing.assert_close(total, whole, rtol=1e-6, atol=0)
    norm = sum(gradient.norm() ** 2 for gradient in expected) ** 0.5
    for one, other in zip(gradients, expected, strict=True):
        assert (one - other).norm() <= 2**-18 * other.norm() + 2**-22 * norm


@pytest.mark.parametrize("options", [{}, {"use_simple_mdlm_loss_weight": False}, {"compat": True}], ids=str)
def test_num_tokens_scales_by_this_batchs_share(options, device):
    wrapper = build(device, critic="own", **options)
    losses = []
    for num_tokens in (48, 96.0, torch.tensor(192, device=device)):
        torch.manual_seed(5)
        losses.append(wrapper(clean(device), num_tokens=num_tokens, generator_sample_temperature=0.5))
    for part in range(3):
        torch.testing.assert_close(losses[0][part], 2 * losses[1][part], rtol=1e-6, atol=0)
        torch.testing.assert_close(losses[0][part], 4 * losses[2][part], rtol=1e-6, atol=0)
    torch.manual_seed(5)
    default = wrapper(clean(device), generator_sample_temperature=0.5)
    torch.testing.assert_close(losses[0], default, rtol=1e-6, atol=0)


@pytest.mark.parametrize("self_cond", [False, True])
@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("weighted", [True, False])
def test_an_empty_batch_costs_nothing(self_cond, critic, weighted, device):
    wrapper = build(device, critic=critic, self_cond=self_cond, use_simple_mdlm_loss_weight=weighted)
    losses = wrapper(clean(device, 0))
    assert losses.loss == 0
    losses.loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in wrapper.parameters())
    assert wrapper.nelbo(clean(device, 0)) == 0
    assert wrapper.generate(0).shape == (0, N)


@pytest.mark.parametrize("critic", CRITICS)
def test_int32_tokens_are_as_good(critic, device):
    wrapper = build(device, critic=critic, self_cond=True)
    losses = []
    for dtype in (torch.int64, torch.int32):
        torch.manual_seed(5)
        losses.append(wrapper(clean(device).to(dtype)).loss)
    assert losses[0] == losses[1]
    assert wrapper.nelbo(clean(device).int()).isfinite()


def test_tokens_are_not_written(device):
    tokens = clean(device)
    before = tokens.clone()
    wrapper = build(device, critic="own", self_cond=True)
    wrapper(tokens)
    wrapper.nelbo(tokens)
    assert torch.equal(tokens, before)


# ---- randomness ----


@pytest.mark.parametrize("how", ["manual_seed", "generator"])
def test_a_seed_reproduces_the_step(how, device, monkeypatch):
    """DESIGN 3.3b row 7: coins and self-conditioning too, and Python's ``random`` has no say."""
    monkeypatch.setattr(random, "random", None)
    monkeypatch.setattr(upstream, "random", None)
    wrapper = build(device, critic="self", self_cond=True)

    def step(seed: int) -> list[torch.Tensor]:
        if how == "manual_seed":
            torch.manual_seed(seed)
            return [wrapper(clean(device)).loss for _ in range(3)]
        generator = torch.Generator().manual_seed(seed)
        return [wrapper(clean(device), generator=generator).loss for _ in range(3)]

    assert step(1) == step(1)
    assert len({float(loss.detach()) for loss in step(1) + step(2)}) == 6


def test_the_default_device_has_no_say():
    """As after torch.set_default_device; meta tensors have no values to give."""
    wrapper, tokens = build("cpu", critic="self", self_cond=True), clean("cpu")

    def step() -> list[torch.Tensor]:
        generator = torch.Generator("cpu").manual_seed(0)
        loss = wrapper(tokens, maskable=tokens != 3, generator=generator).loss
        loss.backward()
        return [loss, wrapper.nelbo(tokens, generator=generator), wrapper.generate(2, generator=generator)]

    expected = step()
    with torch.device("meta"):
        torch.testing.assert_close(step(), expected, rtol=0.0, atol=0.0)
        wrapper(tokens)


def test_a_generator_leaves_torchs_own_alone(device):
    wrapper = build(device, critic="own", self_cond=True)
    before = torch.get_rng_state()
    wrapper(clean(device), generator=torch.Generator().manual_seed(0))
    wrapper.nelbo(clean(device), generator=torch.Generator().manual_seed(0))
    wrapper.generate(2, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_draw_masks_of_their_own(device, drawn):
    wrapper = build(device)
    for offset, rows in ((0, slice(0, 8)), (0, slice(0, 4)), (4, slice(4, 8))):
        torch.manual_seed(5)
        wrapper(clean(device)[rows], sample_offset=offset)
    whole, first, second = (masked.masked_ids for masked in drawn)
    assert torch.equal(whole, torch.cat([first, second]))


# ---- self-conditioning ----


class Recorder(nn.Module):
    """A network with embeddings of its own that writes down how it was called."""

    def __init__(self, outputs: int = V) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len, self.emb_dim = V, N, 4
        self.embedding = nn.Embedding(V, 4)
        self.head = nn.Linear(4, outputs)
        self.calls: list[dict] = []

    def forward(self, ids, return_embeddings=False, return_logits_and_embeddings=False, **kwargs):
        self.calls.append({"ids": ids.clone(), "grad": torch.is_grad_enabled(), **kwargs})
        embeddings = self.embedding(ids) + kwargs.get("sum_embeds", 0.0)
        if return_logits_and_embeddings:
            return self.head(embeddings), embeddings
        return embeddings if return_embeddings else self.head(embeddings)


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_self_conditioning(prob, device):
    net = Recorder()
    wrapper = build(device, net=net, self_cond=True, self_cond_train_prob=prob)
    losses = wrapper(clean(device))
    null = wrapper.to_self_cond(wrapper.null_embed)
    assert len(net.calls) == 1 + int(prob)
    torch.testing.assert_close(net.calls[0]["sum_embeds"], null, rtol=0, atol=0)
    assert net.calls[-1]["grad"]
    if prob == 1.0:
        first, second = net.calls
        assert not first["grad"]
        assert torch.equal(first["ids"], second["ids"])
        expected = wrapper.to_self_cond(net.embedding(first["ids"]) + null)
        torch.testing.assert_close(second["sum_embeds"], expected)
    losses.loss.backward()
    assert (wrapper.to_self_cond.weight.grad != 0).any()
    # Data parallelism waits for a gradient of each parameter: null_embed has one in every step.
    assert wrapper.null_embed.grad is not None
    assert (wrapper.null_embed.grad != 0).any() == (prob == 0.0)


def test_self_conditioning_takes_its_share_of_steps(device):
    net = Recorder()
    wrapper = build(device, net=net, self_cond=True)
    torch.manual_seed(1)
    for _ in range(400):
        wrapper(clean(device, 1))
    share = (len(net.calls) - 400) / 400
    assert abs(share - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 400)


# ---- critic ----


def parameter_names(wrapper: nn.Module) -> set[str]:
    return {name.split(".")[0] for name, parameter in wrapper.named_parameters() if parameter.grad is not None}


def test_only_train_generator(device):
    wrapper = build(device, critic="own")
    losses = wrapper(clean(device), only_train_generator=True)
    assert losses.loss is losses.generator_loss
    assert losses.critic_loss is None
    losses.loss.backward()
    assert parameter_names(wrapper) == {"net"}


@pytest.mark.parametrize("self_cond", [False, True])
def test_only_train_critic_leaves_the_generator_without_gradient(self_cond, device):
    wrapper = build(device, critic="own", self_cond=self_cond)
    losses = wrapper(clean(device), only_train_critic=True)
    assert losses.loss is losses.critic_loss
    assert losses.generator_loss is None
    losses.loss.backward()
    assert parameter_names(wrapper) == {"token_critic"}


def test_only_train_critic_builds_no_graph_of_the_generator(device):
    net, critic = Recorder(), Recorder(outputs=1)
    wrapper = build(device, net=net, token_critic=critic)
    for flag in (False, True):
        wrapper(clean(device), only_train_critic=flag)
        assert net.calls[-1]["grad"] is not flag
        assert critic.calls[-1]["grad"]


def test_the_self_critic_trains_the_shared_trunk_but_not_the_generators_head(device):
    wrapper = build(device, critic="self")
    wrapper(clean(device), only_train_critic=True).loss.backward()
    assert wrapper.net.token_emb.emb.weight.grad is not None
    assert wrapper.token_critic.to_logits.weight.grad is not None
    assert wrapper.net.to_logits.weight.grad is None


@pytest.mark.parametrize("critic", ["own", "self"])
def test_the_generator_learns_nothing_through_its_samples(critic, device):
    """The critic's gradient reaches the generator through a shared trunk only."""
    wrapper = build(device, critic=critic)
    losses = wrapper(clean(device))
    (gradient,) = torch.autograd.grad(losses.critic_loss, wrapper.net.to_logits.weight, allow_unused=True)
    assert gradient is None


@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_critic_loss_weight(weight, device):
    losses = build(device, critic="own", critic_loss_weight=weight)(clean(device))
    torch.testing.assert_close(losses.loss, losses.generator_loss + weight * losses.critic_loss)


@pytest.mark.parametrize("padded", [False, True])
def test_the_critics_loss_is_the_formula(padded, device, drawn):
    critic = Recorder(outputs=1)
    wrapper = build(device, token_critic=critic)
    tokens = clean(device)
    maskable = torch.rand(8, N, generator=torch.Generator().manual_seed(4)).to(device) < 0.6 if padded else None
    loss = wrapper(tokens, maskable=maskable, generator_sample_temperature=2.0).critic_loss
    generated = critic.calls[0]["ids"]
    assert torch.equal(generated[~drawn[0].is_masked], tokens[~drawn[0].is_masked])
    assert (generated != MASK).all()
    wrong = (generated != tokens).float()
    assert 0 < wrong.sum() <= drawn[0].is_masked.sum()
    losses = F.binary_cross_entropy_with_logits(critic(generated).squeeze(-1), wrong, reduction="none")
    torch.testing.assert_close(loss, losses.mean() if maskable is None else losses[maskable].mean())


def test_a_critic_may_leave_the_last_dimension_out(device):
    class Squeezed(Recorder):
        def forward(self, ids, **kwargs):
            return super().forward(ids, **kwargs).squeeze(-1)

    losses, ids = [], []
    for kind in (Recorder, Squeezed):
        torch.manual_seed(8)
        wrapper = build(device, token_critic=kind(outputs=1))
        torch.manual_seed(2)
        losses.append(wrapper(clean(device)).critic_loss)
        ids.append(wrapper.generate(4, steps=3))
    assert losses[0] == losses[1] > 0
    assert torch.equal(*ids)


def test_sample_temperature(device):
    """At 0 the critic judges the generator's favourites; drawn from U(0, 1) otherwise."""
    net, critic = Recorder(), Recorder(outputs=1)
    wrapper = build(device, net=net, token_critic=critic)
    tokens = clean(device, 64)
    wrapper(tokens, generator_sample_temperature=0.0)
    generated, visible = critic.calls[0]["ids"], net.calls[0]["ids"]
    logits = net.head(net.embedding(visible))
    logits[..., MASK] = -math.inf
    filled = generated != tokens
    assert filled.any()
    assert torch.equal(generated[filled], logits.argmax(dim=-1)[filled])
    wrapper(tokens, generator_sample_temperature=100.0)
    shares = torch.bincount(critic.calls[1]["ids"][critic.calls[1]["ids"] != tokens], minlength=V).float()
    assert (shares[:MASK] > 0).all()


# ---- the door ----


def without(name: str) -> Recorder:
    net = Recorder()
    delattr(net, name)
    return net


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"net": without("num_tokens")}, TypeError, "expected net.num_tokens to be an int, received NoneType"),
        ({"net": without("max_seq_len")}, TypeError, "expected net.max_seq_len to be an int, received NoneType"),
        (
            {"net": without("emb_dim"), "self_cond": True},
            TypeError,
            "expected net.emb_dim to be an int, received NoneType",
        ),
        ({"mask_id": V}, ValueError, "expected mask_id of at least 0 and below 12, received 12"),
        ({"mask_id": -1}, ValueError, "expected mask_id of at least 0 and below 12, received -1"),
        ({"mask_id": None}, TypeError, "expected mask_id to be an int, received NoneType"),
        ({"steps": 0}, ValueError, "expected steps of at least 1 and below 16777216, received 0"),
        ({"steps": 2.0}, TypeError, "expected steps to be an int, received float"),
        ({"self_cond_train_prob": 1.5}, ValueError, r"expected self_cond_train_prob in \[0, 1\], received 1.5"),
        ({"no_replace_prob": -0.1}, ValueError, r"expected no_replace_prob in \[0, 1\], received -0.1"),
        ({"random_token_prob": math.nan}, ValueError, r"expected random_token_prob in \[0, 1\], received nan"),
        ({"random_token_prob": "1"}, TypeError, "expected random_token_prob to be a number, received str"),
        ({"mask_mode": "poisson"}, ValueError, "expected mask_mode to be one of 'exact', 'bernoulli'; received 'poi"),
        (
            {"schedule": "sigmoid"},
            ValueError,
            "invalid schedule 'sigmoid': expected 'linear', 'cosine' or a callable",
        ),
        ({"schedule": 0.5}, TypeError, "expected schedule to be a name or a callable, received float"),
        (
            {"token_critic": Recorder(1), "self_token_critic": True},
            ValueError,
            "expected token_critic or self_token_critic=True, received both; leave one out",
        ),
        (
            {"net": Recorder(), "self_token_critic": True},
            ValueError,
            "a network that has attn_layers.dim and return_embeddings= .*, received Recorder; give token_critic=",
        ),
    ],
)
def test_arguments_that_do_not_fit(options, error, message):
    options = {"net": Recorder(), "mask_id": MASK, **options}
    with pytest.raises(error, match=message):
        NonAutoregressiveWrapper(options.pop("net"), **options)


GOOD = torch.zeros(2, N, dtype=torch.int64)


@pytest.mark.parametrize("method", ["forward", "nelbo"])
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([[0] * N], TypeError, "to be a torch.Tensor, received list"),
        (GOOD.float(), TypeError, r"of dtype int32\|int64, received float32; convert it with .*\.to\(torch.int64\)"),
        (GOOD[0], ValueError, r"with 2 dimensions, received shape \(6,\)"),
        (GOOD[:, :-1], ValueError, r"net.max_seq_len = 6, received \[2, 5\]; cut sequences to that length"),
    ],
)
def test_tokens_that_do_not_fit(method, tokens, error, message):
    wrapper = build("cpu")
    with pytest.raises(error, match=f"expected {'x' if method == 'forward' else 'tokens'} .*{message}"):
        getattr(wrapper, method)(tokens)


@pytest.mark.parametrize("method", ["forward", "nelbo"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"maskable": GOOD}, TypeError, "expected maskable of dtype bool, received int64"),
        (
            {"maskable": GOOD[:, 1:] == 0},
            ValueError,
            r"expected maskable of shape \[B, N\] = \[2, 6\], received \[2, 5\]",
        ),
    ],
)
def test_maskable_that_does_not_fit(method, options, error, message):
    with pytest.raises(error, match=message):
        getattr(build("cpu"), method)(GOOD, **options)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.0, TypeError)])
def test_num_samples_that_do_not_fit(value, error):
    with pytest.raises(error, match="expected num_samples"):
        build("cpu").nelbo(GOOD, num_samples=value)


@pytest.mark.parametrize(
    ("critic", "flags"),
    [("none", {}), ("own", {"only_train_generator": True})],
    ids=["no critic", "both"],
)
def test_flags_that_do_not_fit(critic, flags):
    message = "expected only_train_critic=True with a critic and without only_train_generator=True; give"
    with pytest.raises(ValueError, match=message):
        build("cpu", critic=critic)(GOOD, only_train_critic=True, **flags)


def test_a_critic_of_another_shape_is_refused():
    wrapper = build("cpu", token_critic=Recorder(outputs=2))
    message = r"token_critic\(ids .* = \[2, 6\]\) to return \[B, N, 1\] or \[B, N\], received \[2, 6, 2\]; build it"
    with pytest.raises(ValueError, match=message):
        wrapper(GOOD)
    with pytest.raises(ValueError, match=message):
        wrapper.generate(2)


def test_a_schedule_without_derivative_is_refused_where_it_is_needed():
    wrapper = build("cpu", schedule=lambda t: (1 - t).detach())
    with pytest.raises(ValueError, match="expected a differentiable schedule"):
        wrapper(GOOD)
    assert wrapper.generate(2).shape == (2, N)  # generation needs none


def test_sample_offset_that_does_not_fit():
    with pytest.raises(ValueError, match="expected sample_offset of at least 0"):
        build("cpu")(GOOD, sample_offset=-1)


# ---- what users do with a model ----


class Power(nn.Module):
    """A schedule with a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.exponent = nn.Parameter(torch.tensor(2.0))

    def forward(self, t):
        return 1 - t**self.exponent


def test_a_module_as_schedule_is_a_submodule_as_upstream(device):
    ours, theirs = (
        build(device, kind, schedule=Power())
        for kind in (NonAutoregressiveWrapper, upstream.NonAutoregressiveWrapper)
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert "schedule_fn.exponent" in ours.state_dict()
    ours(clean(device)).loss.backward()
    assert (ours.generate(2) != MASK).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nelbo_under_inference_mode(schedule, device):
    wrapper, generator = build(device, schedule=SCHEDULES[schedule]), torch.Generator(device)
    expected = wrapper.nelbo(clean(device), generator=generator.manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(wrapper.nelbo(clean(device), generator=generator.manual_seed(0)), expected)


def test_a_critic_may_be_any_callable_and_gets_what_its_signature_takes(device):
    seen = []

    def critic(ids, context=None):
        seen.append(context)
        return torch.zeros(*ids.shape, 1, device=ids.device)

    def net(ids, mask=None, context=None):
        return torch.zeros(*ids.shape, V, device=ids.device)

    net.num_tokens, net.max_seq_len = V, N
    wrapper = NonAutoregressiveWrapper(net, mask_id=MASK, token_critic=critic)
    everything = {"mask": torch.ones(8, N, dtype=torch.bool, device=device), "context": torch.zeros(1, device=device)}
    losses = wrapper(clean(device), **everything)
    assert losses.critic_loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert seen == [everything["context"]]


def test_a_wrapper_can_be_pickled(device):
    wrapper = build(device, schedule="cosine", self_cond=True, critic="self")
    copy = pickle.loads(pickle.dumps(wrapper))
    torch.manual_seed(1)
    expected = wrapper(clean(device)).loss
    torch.manual_seed(1)
    assert torch.equal(copy(clean(device)).loss, expected)


def test_only_train_critic_does_not_work_out_the_generators_loss(device, monkeypatch):
    wrapper = build(device, critic="own")
    monkeypatch.setattr(wrapper, "_generator_loss", lambda *_: pytest.fail("the loss is dropped"))
    assert wrapper(clean(device), only_train_critic=True).generator_loss is None


@pytest.mark.parametrize(
    ("num_tokens", "error", "message"),
    [
        (0, ValueError, r"expected num_tokens in \[1, inf\), received 0"),
        (-3.0, ValueError, r"expected num_tokens in \[1, inf\), received -3"),
        ("all", TypeError, "expected num_tokens to be a number, received str"),
    ],
)
def test_num_tokens_is_checked(num_tokens, error, message, device):
    with pytest.raises(error, match=message):
        build(device)(clean(device), num_tokens=num_tokens)


def test_a_vocabulary_of_the_mask_alone_is_refused():
    net = transformer()
    net.num_tokens = 1
    with pytest.raises(ValueError, match=r"expected net\.num_tokens of at least 2, received 1"):
        NonAutoregressiveWrapper(net, mask_id=0)


@pytest.mark.parametrize("flags", [{}, {"only_train_critic": True}], ids=str)
def test_no_grad_reaches_network_and_critic(flags, device):
    """A validation loss must not keep the network's activations."""
    net, critic = Recorder(), Recorder(outputs=1)
    wrapper = build(device, net=net, token_critic=critic)
    with torch.no_grad():
        losses = wrapper(clean(device), **flags)
    assert not any(call["grad"] for call in net.calls + critic.calls)
    assert not losses.loss.requires_grad


def test_the_temperature_of_the_critics_sample_is_uniform(device, monkeypatch):
    temperatures, sampler = [], functional.sample_tokens

    def recording(*arguments, **options):
        temperatures.append(options["temperature"])
        return sampler(*arguments, **options)

    monkeypatch.setattr(functional, "sample_tokens", recording)
    wrapper = build(device, net=Recorder(), token_critic=Recorder(outputs=1))
    for _ in range(300):
        wrapper(clean(device, 1))
    quarters = torch.bincount((4 * torch.tensor(temperatures)).long(), minlength=4)
    assert quarters.sum() == 300
    assert len(quarters) == 4
    assert ((quarters - 75).abs() < 5 * math.sqrt(300 * 0.25 * 0.75)).all()


def test_nelbo_is_the_bound_whatever_the_training_loss(device):
    bounds = []
    for weighted in (True, False):
        wrapper = build(device, use_simple_mdlm_loss_weight=weighted)
        torch.manual_seed(3)
        bounds.append(wrapper.nelbo(clean(device)))
    assert bounds[0] == bounds[1]


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("path", ["embeddings", "logits"])
def test_losses_of_a_16_bit_network_are_float32(critic, path, device):
    wrapper = build(device, critic=critic).bfloat16()
    if path == "logits":
        wrapper.net.to_logits.register_forward_hook(lambda module, arguments, output: None)
    losses = wrapper(clean(device))
    assert [loss.dtype for loss in losses if loss is not None] == [torch.float32] * (2 if critic == "none" else 3)
    losses.loss.backward()
    assert wrapper.nelbo(clean(device)).dtype == torch.float32
    assert (wrapper.generate(2, steps=2) != MASK).all()


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize("weighted", [True, False])
def test_a_batch_with_nothing_maskable_costs_nothing(critic, weighted, device):
    wrapper = build(device, critic=critic, use_simple_mdlm_loss_weight=weighted)
    losses = wrapper(clean(device), maskable=torch.zeros(8, N, dtype=torch.bool, device=device))
    assert all(loss == 0 for loss in losses if loss is not None)
    losses.loss.backward()
    assert all(p.grad is None or (p.grad == 0).all() for p in wrapper.parameters())


# ---- kernels ----


def step(wrapper, x):
    """Losses and gradients of a step whose masks and temperature are always the same."""
    wrapper.zero_grad()
    torch.manual_seed(7)
    losses = wrapper(x)
    losses.loss.backward()
    return losses, [parameter.grad for parameter in wrapper.parameters()]


@pytest.mark.parametrize("critic", CRITICS)
@pytest.mark.parametrize(("tied", "weighted"), [(True, False), (False, True)])
def test_a_step_on_the_kernels_is_that_of_the_reference(kernel, critic, tied, weighted, monkeypatch):
    net = transformer(tie_embedding=tied)
    wrapper = build(kernel.device, net=net, critic=critic, use_simple_mdlm_loss_weight=weighted)
    x = clean(kernel.device)
    monkeypatch.setenv("FASTMASK_BACKEND", "reference")
    expected = step(wrapper, x)
    monkeypatch.setenv("FASTMASK_BACKEND", "triton")
    torch.testing.assert_close(step(wrapper, x), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("critic", CRITICS)
def test_a_step_on_the_kernels_counts_no_rows_and_brings_no_logits_back(kernel, critic, monkeypatch):
    """The count came to the host while the network ran; head and sampler see that many rows and no more."""

    def refuse(*_):
        raise AssertionError("the host waits for the device")

    rows, sample = [], functional.linear_sample_tokens
    monkeypatch.setattr(
        functional,
        "linear_sample_tokens",
        lambda *a, **k: rows.append(len(k["row_indices"])) or sample(*a, **k),
    )
    monkeypatch.setattr(functional, "sample_tokens", refuse)
    monkeypatch.setattr(functional, "masked_cross_entropy", refuse)
    wrapper, x = build(kernel.device, critic=critic), clean(kernel.device)
    counts, wait = [], HostCount.wait
    monkeypatch.setattr(HostCount, "wait", lambda self: counts.append(wait(self)) or counts[-1])
    monkeypatch.setenv("FASTMASK_BACKEND", "triton")
    monkeypatch.setattr(torch.Tensor, "nonzero", refuse)
    step(wrapper, x)
    assert set(counts) == {counts[0]}
    assert 8 <= counts[0] <= x.numel()
    assert rows == ([] if critic == "none" else counts[:1])


def test_a_host_count_arrives(device):
    count = torch.arange(40, device=device).sum()
    assert HostCount(count).wait() == 780


def test_a_host_count_does_not_wait_while_it_is_traced(device):
    @torch.compile(backend="eager", fullgraph=True)
    def wait(count):
        return HostCount(count).wait()

    assert wait(torch.tensor(3, device=device)) is None


@pytest.mark.parametrize("method", ["forward", "nelbo"])
def test_the_loss_gets_the_rows_and_their_number(method, device, drawn, monkeypatch):
    """Not the mask, whose rows the kernel would have to find, nor a count that it would have to wait for."""
    given, loss = [], functional.linear_masked_cross_entropy
    monkeypatch.setattr(functional, "linear_masked_cross_entropy", lambda *a, **k: given.append(k) or loss(*a, **k))
    getattr(build(device), method)(clean(device))
    (options,), (masked,) = given, drawn
    assert options["row_indices"] is masked.row_indices
    assert options["num_masked"] == masked.num_masked
    assert isinstance(options["num_masked"], int)


@pytest.mark.parametrize("method", ["forward", "nelbo"])
def test_the_count_comes_to_the_host_while_the_network_runs(method, device, monkeypatch):
    events, start, wait, run = [], HostCount.__init__, HostCount.wait, backbone.run
    monkeypatch.setattr(HostCount, "__init__", lambda self, count: events.append("start") or start(self, count))
    monkeypatch.setattr(HostCount, "wait", lambda self: events.append("wait") or wait(self))
    monkeypatch.setattr(backbone, "run", lambda *a, **k: events.append("network") or run(*a, **k))
    getattr(build(device), method)(clean(device))
    assert events == ["start", "network", "wait"]


@pytest.mark.parametrize("critic", CRITICS)
def test_a_step_whose_count_cannot_be_waited_for_is_the_same(critic, device, monkeypatch):
    wrapper, x = build(device, critic=critic), clean(device)
    expected, bound = step(wrapper, x), wrapper.nelbo(x, generator=torch.Generator(device).manual_seed(3))
    monkeypatch.setattr(HostCount, "wait", lambda self: None)
    torch.testing.assert_close(step(wrapper, x), expected)
    torch.testing.assert_close(wrapper.nelbo(x, generator=torch.Generator(device).manual_seed(3)), bound)


def test_a_host_count_waits_for_its_arrival():
    """What arrives is seen by nobody before; on a GPU the copy is seldom late enough to show it."""
    count = HostCount(torch.tensor(0))

    class Arrival:
        def synchronize(self):
            count._host = torch.tensor(7)

    count._arrival = Arrival()
    assert count.wait() == 7
