"""Generation: prompts, self-conditioning, seeds, and what a sequence knows of its batch."""

from __future__ import annotations

import pytest
import torch
from generating import MASK, Context, FixedCritic, Jumping, N, Small, V, prompts, wrap
from x_transformers import Encoder, TransformerWrapper

from fastmask.schedules import as_schedule, step_counts

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


# ---- lengths ----


@pytest.mark.parametrize("length", [1, 5, N])
def test_sequences_of_every_length(length, device):
    wrapper = wrap(device)
    assert wrapper.generate(seq_len=length).shape == (length,)
    ids = wrapper.generate(3, seq_len=length)
    assert ids.shape == (3, length)
    assert (ids != MASK).all()
    assert all(call["ids"].shape[1] == length for call in wrapper.net.calls)
    assert len(wrapper.net.calls) == 2 * length  # 18 steps commit one each


@pytest.mark.parametrize("length", [4, 9, N])
@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_prompt_without_a_mask_is_a_prefix(size, length, device):
    wrapper, prefix = wrap(device, Context()), torch.full((2, size), MASK, device=device)
    masked = {
        "prompt": torch.nn.functional.pad(prefix, (0, length - size)),
        "prompt_mask": torch.arange(length, device=device).expand(2, -1) < size,
    }
    outs = [
        wrapper.generate(seq_len=length, generator=torch.Generator().manual_seed(1), **given)
        for given in ({"prompt": prefix}, {"prompt": prefix.int()}, masked)
    ]
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[0][:, :size], prefix)
    assert (outs[0][:, size:] != MASK).all()
    assert wrapper.generate(prompt=prefix[0], seq_len=length).shape == (length,)
    assert wrapper.generate(3, prompt=prefix[0], seq_len=length).shape == (3, length)


def test_what_follows_a_short_prompt_with_a_mask_is_open(device):
    wrapper = wrap(device, Context())
    prompt = torch.tensor([[MASK, 1, 2], [3, MASK, 4]], device=device)
    given = torch.tensor([[True, False, True], [False, True, True]], device=device)
    outs = [
        wrapper.generate(prompt=p, prompt_mask=g, seq_len=7, generator=torch.Generator().manual_seed(1))
        for p, g in (
            (prompt, given),
            (torch.nn.functional.pad(prompt, (0, 4)), torch.nn.functional.pad(given, (0, 4))),
        )
    ]
    assert torch.equal(*outs)
    assert torch.equal(outs[0][:, :3][given], prompt[given])
    assert (outs[0][:, 3:] != MASK).all()
    assert wrapper.generate(prompt=prompt, prompt_mask=given).shape == (2, N)


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
