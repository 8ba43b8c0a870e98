"""Families of decoders that other files do not hold to float64: what each step commits, of each state that it saw.

At a temperature the ids that were proposed are taken from the generation, and the noise on the score is handed in:
what is checked is which of them a step commits, and that the figures are those of the law.
"""

from __future__ import annotations

import math
import pathlib

import decoders
import numpy as np
import pytest
import torch
from generating import MASK, Context, N, assert_law, wrap
from scipy.special import log_softmax
from test_generate_blocks import GREEDY, Counted, assert_decodes_as, ragged

from fastmask import functional
from fastmask.schedules import even_split


def log_law(net, ids, temperature=1.0, top_p=1.0):
    """Of each position of a sequence [N], without the mask: [N, V] float64, of what the nucleus keeps."""
    z = net.alone(np.asarray(ids)) / temperature
    z[:, MASK] = -np.inf
    log_p = log_softmax(z, axis=-1)
    for row in log_p:
        order = np.argsort(-row)
        row[order[1:][np.cumsum(np.exp(row[order]))[:-1] >= top_p]] = -np.inf
    return log_softmax(log_p, axis=-1)


def states_of(wrapper, batch, **options):
    """Before and after each step: (ids, is_masked) before, then ids, is_masked, log_probs after, of one sequence."""
    _, trajectory = wrapper.generate(batch, return_trajectory=True, **options)
    for b in range(batch):
        before = np.full(N, MASK), np.full(N, True)
        for number, state in enumerate(zip(*(x[:, b].cpu().numpy() for x in trajectory), strict=True)):
            yield b, number, before, state
            before = state[0], state[1]
        assert not before[1].any()


def choice_noise(seed, batch, step):
    """[B, N] float64, Gumbel(0, 1), as it is drawn for the confidence."""
    zeros = torch.zeros(batch, N)
    return -functional.confidence_remask_keys(zeros, choice_temperature=1.0, seed=seed, step=step).double().numpy()


@torch.no_grad()
def test_maskgit(device):
    """T 1, log p + 4.5 (1 - r) G, and floor(n cos(pi r / 2)) stay masked."""
    net, steps, batch = Counted(0.7), 7, 3
    wrapper = wrap(device, net, schedule="cosine", steps=steps)
    seed = functional.draw_seed(torch.device(device), torch.Generator(device).manual_seed(4))
    options = {"end_temperature": 1.0, "choice_temperature": 4.5, "filter_thres": None}
    generator = torch.Generator(device).manual_seed(4)
    noise = [choice_noise(seed, batch, step) for step in range(steps)]
    changes = 0
    for b, step, (ids, was), (after, is_masked, log_probs) in states_of(
        wrapper, batch, generator=generator, **options
    ):
        ratio = (step + 1) / steps
        left = math.floor(N * math.cos(math.pi / 2 * ratio) + 1e-6)
        committed = was & ~is_masked
        assert is_masked.sum() == left
        expected = log_law(net, ids)[np.arange(N), after]
        np.testing.assert_allclose(log_probs[committed], expected[committed], atol=1e-5)
        score = log_probs + 4.5 * (1 - ratio) * noise[step][b]
        assert score[committed].min() >= score[is_masked].max(initial=-np.inf)
        changes += log_probs[committed].min() < log_probs[is_masked].max(initial=-np.inf)
    assert changes > batch  # the noise decided


@pytest.mark.parametrize(("threshold", "temperature", "top_p"), [(0.5, 0.7, 0.9), (0.9, 0.3, 1.0)])
@torch.no_grad()
def test_sdar_at_a_temperature(threshold, temperature, top_p, device):
    """Figures of the heated nucleus; all above the threshold if these are as many as the even split, else so many."""
    net, length, steps, batch = Counted(0.8), 6, 3, 3
    kinds = set()
    for _, _, (ids, was), (after, is_masked, log_probs) in states_of(
        wrap(device, net), batch, block_length=length, block_origin="zero", steps=steps, commits=even_split,
        threshold=threshold, start_temperature=temperature, end_temperature=temperature, top_p=top_p, processed=True,
        filter_thres=None, generator=torch.Generator(device).manual_seed(2),
    ):  # fmt: skip
        if not was.any() or (was == is_masked).all():
            continue  # others' last step
        first = int(was.argmax()) // length * length
        inside = np.zeros(N, dtype=bool)
        inside[first : first + length] = was[first : first + length]
        committed = was & ~is_masked
        assert not committed[~inside].any()
        log_p = log_law(net, ids, temperature, top_p)[np.arange(N), after]
        np.testing.assert_allclose(log_probs[committed], log_p[committed], atol=2e-5)
        confidence = np.exp(log_probs.astype(np.float64))
        above = int((confidence[inside] > threshold).sum())
        number = int(committed.sum())
        assert number == max(above, length // steps) or (is_masked & inside).sum() == 0
        assert confidence[committed].min() >= confidence[inside & is_masked].max(initial=-np.inf)
        kinds.add(above > length // steps)
    assert kinds == {True, False}


@pytest.mark.parametrize("steps", [4, 7, N])
def test_p2(steps, device):
    """can_mask_prev_unmasked, greedy: the states of each pass; ragged prompts."""
    net, prompt = Counted(), ragged(device)
    wrapper = wrap(device, net, can_mask_prev_unmasked=True, steps=steps)
    _, trajectory = wrapper.generate(**prompt, **GREEDY, return_trajectory=True)
    start = prompt["prompt"].where(prompt["prompt_mask"], MASK).tolist()
    expected = [decoders.p2(net.alone, ids, steps) for ids in start]
    assert trajectory.ids.transpose(0, 1).tolist() == expected
    opened = trajectory.is_masked[1:] & ~trajectory.is_masked[:-1]
    assert opened.any()  # what was committed was masked again


@pytest.mark.parametrize("steps", [4, 7])
@torch.no_grad()
def test_mask_predict(steps, device):
    """A loop: masked rows are sampled where the old ones' probabilities stay, and of all open ones the lowest go."""
    net, prompt = Counted(), ragged(device)
    is_open = ~prompt["prompt_mask"]
    ids, is_masked = prompt["prompt"].masked_fill(is_open, MASK), is_open.clone()
    log_probs, sizes, states = torch.zeros(ids.shape, device=device), is_open.sum(dim=-1), []
    for step in range(steps):
        rows = torch.arange(ids.numel(), device=device).where(is_masked.flatten(), -1)
        functional.sample_tokens(
            net(ids.masked_fill(is_masked, MASK)), temperature=0.0, mask_id=MASK, row_indices=rows, seed=0,
            out=functional.Sampled(ids, log_probs),
        )  # fmt: skip
        counts = (sizes * (steps - 1 - step) / steps + 1e-4).long()
        functional.remask_(
            ids, is_masked, ids.new_empty(0), ids.new_zeros(len(ids) + 1), log_probs, counts, mask_id=MASK,
            eligible=is_open,
        )  # fmt: skip
        states.append(ids.tolist())
    start = prompt["prompt"].where(prompt["prompt_mask"], MASK).tolist()
    expected = [decoders.mask_predict(net.alone, sequence, steps) for sequence in start]
    assert [list(each) for each in zip(*states, strict=True)] == expected


@pytest.mark.parametrize("schedule", [math.cos, lambda angle: 1 - 2 * angle / math.pi], ids=["cosine", "linear"])
@torch.no_grad()
def test_esm3(schedule, device):
    """A loop of two samplers: committed are the lowest entropies of the raw law, sampled from the heated nucleus."""
    net, steps, temperature, top_p = Counted(0.5), 6, 0.8, 0.7
    ids = torch.full((2, N), MASK, device=device)
    is_masked = torch.ones_like(ids, dtype=torch.bool)
    for step in range(steps):
        logits = net(ids)
        raw = functional.sample_tokens(logits, mask_id=MASK, with_entropy=True, seed=0)
        left = int(schedule(math.pi / 2 * (step + 1) / steps) * N + 1e-6)
        before, was = ids.cpu().numpy(), is_masked.cpu().numpy()
        ids, is_masked, log_probs, _ = functional.demask_step(
            logits, ids, is_masked, left, mask_id=MASK, score=-raw.entropies, temperature=temperature, top_p=top_p,
            processed=True, seed=5, step=step,
        )  # fmt: skip
        for b in range(2):
            log_p = log_law(net, before[b])
            finite = np.where(np.isfinite(log_p), log_p, 0.0)
            entropy = -np.sum(np.exp(log_p) * finite, axis=-1)
            committed, stays = was[b] & ~is_masked[b].cpu().numpy(), is_masked[b].cpu().numpy()
            assert stays.sum() == left
            assert entropy[committed].max() <= entropy[stays].min(initial=np.inf) + 1e-6
            heated = log_law(net, before[b], temperature, top_p)[np.arange(N), ids[b].cpu().numpy()]
            np.testing.assert_allclose(log_probs[b].cpu().numpy()[committed], heated[committed], atol=2e-5)
    assert not is_masked.any()


@pytest.mark.parametrize(
    "options", [{"cfg_scale": 1.5}, {"forbidden": [0, 3]}, {"cfg_scale": 0.5, "forbidden": [1]}], ids=str
)
def test_llada_with_guidance_and_without_its_ends(options, device):
    """The unconditional pass sees the prompt masked; an end's logit is -inf before all."""

    def decoder(net, ids):
        ids, w = np.array(ids), options.get("cfg_scale", 0.0)
        given = ids != MASK

        def guided(now):
            z = (1 + w) * net(now) - w * net(np.where(given, MASK, now))
            z[:, options.get("forbidden", [])] = -np.inf
            return z

        return decoders.llada(guided, ids, 6, 3)

    assert_decodes_as(decoder, {**options, "block_length": 6, "steps": 3, "commits": even_split}, device)


def test_remdm_conf():
    """One step from a state: a committed position is masked again with sigma times softmax(-c), c its confidence when
    it was committed; a masked one is committed as in MDLM. The law of all three together, by enumeration."""
    batch, before, after, eta = 20000, 0.6, 0.4, 0.5  # mask ratios
    confidence = torch.tensor([0.9, 0.2, 0.0])
    is_masked = torch.tensor([False, False, True])
    sigma = min(eta, after / (1 - before)) * torch.softmax(-confidence[:2], dim=-1)
    chances = torch.cat([sigma, torch.tensor([1 - after / before])]).double()
    flips = functional.select_at_random(torch.ones(batch, 3).bool(), chances.expand(batch, 3), seed=3)
    now = is_masked ^ flips
    codes = (now.long() * torch.tensor([1, 2, 4])).sum(dim=-1)
    law = np.zeros(8)
    for code in range(8):
        masked = [bool(code >> i & 1) for i in range(3)]
        each = [float(p if m != w else 1 - p) for p, m, w in zip(chances, masked, is_masked.tolist(), strict=True)]
        law[code] = np.prod(each)
    assert_law(torch.bincount(codes, minlength=8).numpy(), law)


def test_orders_that_a_random_score_gives_are_all_as_likely(device):
    """LLaDA's "random": of 4 positions, one a pass, the 24 orders."""
    wrapper = wrap(device, Context(4))
    *_, last = wrapper.generate_steps(4000, score="random", steps=4, generator=torch.Generator(device).manual_seed(0))
    codes = (last.committed_at.cpu() * 4 ** torch.arange(4)).sum(dim=-1)
    _, counts = codes.unique(return_counts=True)
    assert_law(counts.numpy(), np.full(24, 1 / 24))


def rows_of_the_page():
    page = (pathlib.Path(__file__).parent.parent / "docs" / "sampling.md").read_text()
    table = page[page.index("## What a family takes") : page.index("## Ends")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return [pytest.param(call, id=family) for family, call, _ in rows[2:] if call]


@pytest.mark.parametrize("call", rows_of_the_page())
def test_each_row_of_the_page_is_a_call(call, device):
    names = {"even_split": even_split, "torch": torch, "N": N, "dict": dict}
    options = eval(f"dict({call.strip('`')})", names)
    ids = wrap(device, Context()).generate(2, **options)
    assert ids.shape == (2, N)
    assert not (ids == MASK).any()


def test_the_page_has_a_row_for_each_family():
    assert len(rows_of_the_page()) == 10
