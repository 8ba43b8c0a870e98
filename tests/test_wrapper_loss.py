"""The training objective: what the loss and the bound mean."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from training import CRITICS, MASK, SCHEDULES, N, Recorder, Table, build, clean, transformer

from fastmask import NonAutoregressiveWrapper, functional

# ---- the loss, by enumeration ----


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
            logits = net(ids[None])[0].detach().double()[:, : net.mask_id]  # the mask is no prediction
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
            total -= (
                net(ids[None])[0, :, : net.mask_id]
                .detach()
                .double()
                .log_softmax(dim=-1)[order[i], tokens[order[i]]]
                .item()
            )
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


# ---- the bound ----


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
    logits = wrapper.net(tokens.masked_fill(maskable, MASK))[:, 0, :MASK]
    torch.testing.assert_close(wrapper.nelbo(tokens, maskable=maskable), F.cross_entropy(logits, tokens[:, 0]))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nelbo_under_inference_mode(schedule, device):
    wrapper, generator = build(device, schedule=SCHEDULES[schedule]), torch.Generator(device)
    expected = wrapper.nelbo(clean(device), generator=generator.manual_seed(0))
    with torch.inference_mode():
        assert torch.equal(wrapper.nelbo(clean(device), generator=generator.manual_seed(0)), expected)


def test_nelbo_is_the_bound_whatever_the_training_loss(device):
    bounds = []
    for weighted in (True, False):
        wrapper = build(device, use_simple_mdlm_loss_weight=weighted)
        torch.manual_seed(3)
        bounds.append(wrapper.nelbo(clean(device)))
    assert bounds[0] == bounds[1]


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
        logits = wrapper.net(masked.masked_ids)[..., :MASK]
        losses = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
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


@pytest.mark.parametrize("critic", CRITICS)
def test_in_float64_parts_of_several_sizes_add_up_to_its_rounding(critic):
    wrapper, tokens = build("cpu", critic=critic).double(), clean("cpu")
    maskable = torch.ones_like(tokens, dtype=torch.bool)
    maskable[:3, 2:] = False

    def loss(rows: slice, **options) -> torch.Tensor:
        torch.manual_seed(5)
        temperature = 0.0  # a part draws the critic's sample at rows of its own
        options |= {"sample_offset": rows.start, "generator_sample_temperature": temperature}
        return wrapper(tokens[rows], maskable=maskable[rows], **options).loss

    parts = [loss(rows, num_tokens=maskable.sum()) for rows in (slice(0, 1), slice(1, 6), slice(6, 8))]
    torch.testing.assert_close(sum(parts), loss(slice(0, 8)), rtol=1e-12, atol=0)


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


class Writing(Recorder):
    """A network that overwrites the ids it is given."""

    def forward(self, ids, **kwargs):
        out = super().forward(ids.clone(), **kwargs)
        ids.zero_()
        return out


@pytest.mark.parametrize("kind", [Recorder, Writing])
def test_a_network_that_writes_into_its_ids_is_shown_the_same(kind, device):
    model = build(device, net=kind(), self_cond=True, self_cond_train_prob=1.0, use_simple_mdlm_loss_weight=False)
    ids = torch.full((2, N), MASK, device=device)
    model(clean(device, 2), is_masked=ids == MASK, masked_ids=ids)
    assert bool((ids == MASK).all())
    assert [call["ids"].tolist() for call in model.net.calls] == [ids.tolist()] * 2
