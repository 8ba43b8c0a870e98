"""Settings of each sequence's own in generate; and orders known beforehand, by which only what is committed is
sampled."""

from __future__ import annotations

import pytest
import torch
from generating import N, V, prompts, wrap, wrap_small
from test_generate_blocks import Counted
from torch import nn

from fastmask import Head, functional, planning
from fastmask.generation_options import Options
from fastmask.upstream import FASTMASK

SETTINGS = {
    "start_temperature": [1.0, 0.0, 0.3, 2.0],
    "end_temperature": [0.0, 0.0, 0.6, 2.0],
    "filter_thres": [0.0, 0.5, 0.95, 0.7],
    "min_p": [0.0, 0.1, 0.3, 0.0],
    "top_p": [1.0, 0.9, 0.0, 0.5],
}


@pytest.mark.parametrize("of_wrapper", [{}, {"can_mask_prev_unmasked": True}, {"token_critic": "own"}], ids=str)
@pytest.mark.parametrize(
    "names",
    [
        ["start_temperature"],
        ["start_temperature", "end_temperature"],
        ["filter_thres"],
        ["min_p", "top_p"],
        [*SETTINGS],
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "options", [{}, {"block_length": 3, "threshold": 0.4}, {"processed": True, "end_temperature": 0.8}], ids=str
)
def test_a_batch_of_settings_is_each_sequence_with_its_own(options, names, of_wrapper, device):
    wrapper, prompt = wrap_small(device, steps=3, **of_wrapper), prompts(device)
    own = {name: SETTINGS[name] for name in names}
    if options.get("processed") and "end_temperature" not in own and "start_temperature" in own:
        own["start_temperature"] = [1.0, 0.1, 0.3, 2.0]  # not from 0 to .8
    settings = {name: torch.tensor(values, dtype=torch.float64, device=device) for name, values in own.items()}
    options = {"choice_temperature": 1.0, **options}

    def generate(rows, **given):
        prompted = {name: value[rows] for name, value in prompt.items()}
        generator = torch.Generator().manual_seed(3)
        return wrapper.generate(**prompted, **{**options, **given}, generator=generator, sample_offset=rows.start)

    whole = generate(slice(0, 4), **settings)
    for b in range(4):
        alone = generate(slice(b, b + 1), **{name: values[b] for name, values in own.items()})
        assert torch.equal(whole[b : b + 1], alone)


def test_settings_may_be_of_any_floating_dtype_and_lie_anywhere(device):
    wrapper, ids = wrap_small(device), []
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        settings = {
            "start_temperature": torch.tensor([0.5, 2.0], dtype=dtype),
            "top_p": torch.tensor([1, 0.5]).to(dtype),
        }
        ids.append(wrapper.generate(2, **settings, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(each, ids[0]) for each in ids)
    assert not torch.equal(ids[0], wrapper.generate(2, generator=torch.Generator().manual_seed(0)))


def settings_of(vocabulary=9, **given):
    """What a sampler is told in the sixth of 18 steps."""
    others = {"start_temperature": 1.0, "processed": False, "noise_level_scale": 1.0, "sample_offset": 0}
    options = Options(**{**dict.fromkeys(Options._fields), **others, **given})
    return options.settings(planning.Step(0, 5, 0, 0, 12 / 18, 5 / 17, 0, 1, 1, 1), FASTMASK, vocabulary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("vocabulary", [10, 1000, 151936])
def test_shares_of_the_vocabulary_are_those_of_numbers(vocabulary, dtype):
    """Of a large one, where float32 would be some ids off; and of float32 the decimals that it stands for."""
    shares = [0.0, 0.1, 0.3, 0.7, 0.9, 0.99, *(1 - (k - 0.5) / 151936 for k in (3, 1000, 77777))]
    if dtype == torch.float64:
        shares += [1 - k / 151936 for k in (3, 1000, 77777)]
    together = settings_of(vocabulary, filter_thres=torch.tensor(shares, dtype=dtype))["top_k"]
    assert together.tolist() == [settings_of(vocabulary, filter_thres=share)["top_k"] for share in shares]


@pytest.mark.parametrize("has_end", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_temperatures_fall_as_numbers_do(dtype, has_end):
    """In any dtype: rounded once."""
    start, end = torch.tensor([1.0, 0.7], dtype=dtype), torch.tensor([0.1, 0.3], dtype=dtype)
    whole = settings_of(start_temperature=start, end_temperature=end if has_end else None)["temperature"]
    alone = [
        settings_of(start_temperature=each, end_temperature=last if has_end else None)["temperature"]
        for each, last in zip(start.tolist(), end.tolist(), strict=True)
    ]
    assert torch.equal(whole, torch.tensor(alone, dtype=torch.float32))


def test_settings_go_to_the_networks_device():
    settings = {name: torch.ones(2) for name in ("start_temperature", "end_temperature", "top_p", "min_p")}
    assert wrap_small("meta").generate(2, filter_thres=torch.zeros(2), **settings).is_meta


def test_what_is_no_temperature_gives_the_lowest_id(device):
    """And what it stands beside is as it would be."""
    temperatures = torch.tensor([1.0, float("nan"), -1.0])
    ids = wrap_small(device).generate(3, temperatures, generator=torch.Generator().manual_seed(0))
    assert not ids[1:].any()
    assert torch.equal(ids[0], wrap_small(device).generate(3, generator=torch.Generator().manual_seed(0))[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"min_p": torch.tensor(0.5)}, ValueError, "expected min_p"),
        ({"top_p": torch.ones(3)}, ValueError, r"expected top_p of shape \[B\] = \[2\].*give batch_size=3"),
        ({"start_temperature": torch.ones(2).long()}, TypeError, "expected start_temperature"),
        ({"threshold": torch.ones(2)}, TypeError, "expected threshold to be a number"),
        ({"start_temperature": 0.0, "end_temperature": torch.ones(2)}, ValueError, "expected end_temperature=0"),
    ],
)
def test_settings_that_are_refused(options, error, message, device):
    with pytest.raises(error, match=message):
        wrap(device).generate(2, **options)


def test_compat_has_no_settings_of_sequences(device):
    with pytest.raises(ValueError, match="expected compat=False with start_temperature of each sequence"):
        wrap(device, compat=True).generate(2, torch.ones(2))


# ---- orders known beforehand ----


class Headed(nn.Module):
    """A network with a linear head, declared."""

    def __init__(self) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len = V, N
        generator = torch.Generator().manual_seed(3)
        self.table = nn.Parameter(torch.randn(N, V, N, 6, generator=generator))
        self.head = nn.Parameter(torch.randn(V, 6, generator=generator))

    def linear_head(self):
        return Head(self.head)

    def forward(self, ids, return_embeddings=False):
        place = torch.arange(ids.shape[1], device=ids.device)
        embeddings = self.table[place, ids][:, :, : ids.shape[1]].sum(dim=1)
        return embeddings if return_embeddings else embeddings @ self.head.T


@pytest.mark.parametrize("score", ["random", "order"])
@pytest.mark.parametrize("options", [{}, {"block_length": 5, "steps": 2}, {"commits": 2, "eos_id": 3}], ids=str)
def test_only_what_is_committed_goes_through_the_head(score, options, device, monkeypatch):
    """As many rows in all as there are open positions; the ids are those of sampling first."""
    wrapper = wrap(device, Headed(), steps=6)
    assert wrapper.has_linear_head
    given = {**options, "score": -torch.arange(float(N)) if score == "order" else score}
    prompt = torch.randint(0, 5, (3, 4), generator=torch.Generator().manual_seed(1)).to(device)
    rows, sample = [], functional.sample_tokens

    def counting(*arguments, row_indices, **named):
        rows.append(len(row_indices))
        return sample(*arguments, row_indices=row_indices, **named)

    monkeypatch.setattr("fastmask.functional.sample_tokens", counting)
    chosen_first = wrapper.generate(prompt=prompt, **given, generator=torch.Generator().manual_seed(0))
    assert sum(rows) == 3 * (N - 4)
    rows.clear()
    monkeypatch.setattr("fastmask.generation_options.Options.order_is_known", False)
    sampled_first = wrapper.generate(prompt=prompt, **given, generator=torch.Generator().manual_seed(0))
    assert sum(rows) > 3 * (N - 4)
    assert torch.equal(chosen_first, sampled_first)


def test_a_random_order_with_a_critic_or_a_rule_is_refused(device):
    with pytest.raises(ValueError, match="expected no score= with a critic"):
        wrap_small(device, token_critic="own").generate(2, score="random")
    with pytest.raises(ValueError, match="with threshold"):
        wrap(device, Counted()).generate(2, score="random", threshold=0.5)
