"""fastmask.diffusers: diffusers' schedulers and pipelines, with ours in their place.

At temperature 0, and where candidates and noise are handed in, equal id for id; else equal in law.
"""

from __future__ import annotations

import doctest
import importlib
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gemma import draw_likeliest, small_gemma
from sampling import assert_independent, assert_law
from test_generate_waits import Copies, assert_waits_for_nothing
from torch import nn

from fastmask import functional

diffusers = pytest.importorskip("diffusers", reason="needs the extra diffusers")
pytest.importorskip("transformers", reason="needs the extra hf")
ours = importlib.import_module("fastmask.diffusers")
amused = importlib.import_module("diffusers.schedulers.scheduling_amused")

V, MASK = 13, 12
SCHEDULERS = {
    "BlockRefinementScheduler": {"block_length": 8, "num_inference_steps": 5, "editing_threshold": 0.3},
    "EntropyBoundScheduler": {"entropy_bound": 0.7, "t_max": 0.9, "num_inference_steps": 6},
    "AmusedScheduler": {"mask_token_id": 9, "masking_schedule": "linear"},
}


def random_logits(*shape: int, scale: float = 4.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_equal(received, expected) -> None:
    """Field by field, figures but for rounding."""
    assert type(received) is type(expected)
    for name, value in expected.items():
        torch.testing.assert_close(received[name], value, rtol=2e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


# Configurations


@pytest.mark.parametrize("name", SCHEDULERS)
def test_configurations_go_to_and_fro(name, tmp_path):
    theirs = getattr(diffusers, name)(**SCHEDULERS[name])
    scheduler = getattr(ours, name).from_config(theirs.config)
    assert isinstance(scheduler, getattr(diffusers, name))
    assert type(scheduler) is getattr(ours, name)
    assert dict(scheduler.config) == dict(theirs.config)
    parameters = {name: value for name, value in theirs.config.items() if name[0] != "_"}
    scheduler.save_pretrained(tmp_path)
    for module in (ours, diffusers):
        loaded = getattr(module, name).from_pretrained(tmp_path)
        assert {name: value for name, value in loaded.config.items() if name[0] != "_"} == parameters
        assert type(loaded) is getattr(module, name)
    assert scheduler.compatibles == theirs.compatibles


def test_a_pipeline_saved_with_ours_loads_with_ours(tmp_path):
    pipe = small_amused()
    pipe.scheduler = ours.AmusedScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.AmusedPipeline.from_pretrained(tmp_path, vqvae=None, tokenizer=None, text_encoder=None)
    assert type(loaded.scheduler) is ours.AmusedScheduler
    assert loaded.scheduler.config.mask_token_id == pipe.scheduler.config.mask_token_id


def test_doctests():
    """CI's other steps have no diffusers, so that they leave them out."""
    assert doctest.testmod(ours).attempted > 10
    assert doctest.testmod(ours).failed == 0


def test_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "diffusers.md").read_text(encoding="utf-8")
    namespace: dict = {}
    blocks = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/diffusers.md", "exec"), namespace)


# LLaDA2Pipeline


class SmallText(nn.Module):
    """Logits of each position of what stands at all of them: a guess changes what others are."""

    device, dtype = torch.device("cpu"), torch.float32  # which pipelines ask for

    def __init__(self, seed: int, scale: float) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.ids, self.positions = nn.Embedding(V, 16), nn.Embedding(64, 16)
        self.head, self.scale = nn.Linear(16, V, bias=False), scale

    def forward(self, ids, attention_mask, position_ids):
        x = self.ids(ids) + self.positions(position_ids)
        weights = (x @ x.mT).masked_fill(attention_mask[:, None] == 0, -torch.inf).softmax(dim=-1)
        return SimpleNamespace(logits=self.scale * self.head(x + 2.0 * weights @ x))


def llada2(scheduler, seed: int = 0, scale: float = 3.0, prompt: int = 5, **options) -> tuple[torch.Tensor, list]:
    """What a pipeline generates, and what each step was."""
    pipe = diffusers.LLaDA2Pipeline(model=SmallText(seed, scale), scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    steps: list[dict] = []

    def note(pipe, step, timestep, tensors):
        steps.append({name: value.clone() for name, value in tensors.items()})
        return {}

    out = pipe(
        input_ids=torch.randint(0, V - 1, (3, prompt), generator=torch.Generator().manual_seed(seed)),
        gen_length=20,
        mask_token_id=MASK,
        output_type="seq",
        callback_on_step_end=note,
        callback_on_step_end_tensor_inputs=pipe._callback_tensor_inputs,
        **options,
    )
    return out.sequences, steps


LLADA2 = {
    "defaults": {},
    "editing": {"editing_threshold": 0.2, "threshold": 0.6, "max_post_steps": 4},
    "editing off": {"editing_threshold": 0.0},
    "editing below 0": {"editing_threshold": -1.0},
    "counts alone": {"threshold": 1.5, "num_inference_steps": 3, "editing_threshold": None},
    "more steps than positions": {"threshold": 0.9, "num_inference_steps": 19},
    "ignored filters": {"top_k": 2, "top_p": 0.1},
    "greedy at a temperature": {"temperature": 0.7, "sampling_method": "greedy", "top_p": 0.1},
    "aligned prompt": {"prompt": 8},
    "EOS": {"eos_token_id": 3, "editing_threshold": 0.3},
}


@pytest.mark.parametrize("case", LLADA2)
def test_llada2_is_equal_step_for_step(case):
    options = {"block_length": 8, "num_inference_steps": 4, **LLADA2[case]}
    num_edits = 0
    for seed in range(5):
        expected, their_steps = llada2(diffusers.BlockRefinementScheduler(), seed, **options)
        received, our_steps = llada2(ours.BlockRefinementScheduler(), seed, **options)
        torch.testing.assert_close(received, expected)
        assert len(our_steps) == len(their_steps)
        for step, theirs in zip(our_steps, their_steps, strict=True):
            assert_equal(step, theirs)
            num_edits += int(theirs["editing_transfer_index"].sum())
    if "editing" in case:
        assert (num_edits > 0) is (case == "editing")


def test_llada2_ends_at_an_eos():
    """The case above does."""
    lengths = {
        early: sum(len(llada2(ours.BlockRefinementScheduler(), seed, block_length=8, num_inference_steps=4,
                              eos_early_stop=early, **LLADA2["EOS"])[1]) for seed in range(5))
        for early in (True, False)
    }  # fmt: skip
    assert lengths[True] < lengths[False]


def test_finished_sequences_are_equal():
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        draw = [torch.randint(0, 4, (4, n), generator=generator) for n in (9, 4)]
        arguments = {
            "cur_x": draw[0], "sampled_tokens": draw[1], "final_transfer": draw[1].roll(1) > 1, "eos_token_id": 2,
            "mask_token_id": 3, "prompt_length": int(torch.randint(0, 6, (), generator=generator)),
        }  # fmt: skip
        finished = draw[1][:, 0] == 0
        expected = diffusers.BlockRefinementScheduler.check_eos_finished(finished=finished.clone(), **arguments)
        received = ours.BlockRefinementScheduler.check_eos_finished(finished=finished, **arguments)
        assert torch.equal(received, expected)
        assert received is finished  # in place, as theirs
        seen |= set(expected.tolist())
    assert seen == {True, False}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("mask_token_id", [None, MASK])
def test_steps_at_temperature_0_are_equal_in_each_dtype(mask_token_id, dtype):
    """Of logits that tie the first is taken, in bfloat16 more often than not."""
    logits = (random_logits(3, 8, V) * 2).round().div(2).to(dtype)
    outputs = []
    for module in (diffusers, ours):
        scheduler = module.BlockRefinementScheduler(editing_threshold=0.4)
        scheduler.set_timesteps(3, block_length=8)
        sample = torch.full((3, 8), MASK)
        sample[:, :2] = 1
        generator = torch.Generator().manual_seed(0)
        outputs.append(scheduler.step(logits, 1, sample, mask_token_id=mask_token_id, generator=generator))
    assert (logits == logits.amax(dim=-1, keepdim=True)).sum(dim=-1).max() > 1
    for name in ("sampled_tokens", "sampled_probs", "pred_logits"):
        torch.testing.assert_close(outputs[1][name], outputs[0][name])


# Steps with candidates and noise handed in


@pytest.mark.parametrize("editing_threshold", [None, 0.0, 0.3])
@pytest.mark.parametrize("steps", [3, 11])
@pytest.mark.parametrize("mask_token_id", [None, MASK])
def test_block_refinement_with_given_candidates(mask_token_id, steps, editing_threshold, monkeypatch):
    """Whatever temperature they were drawn at. A step past the last, then two blocks one after the other."""
    pair = diffusers.BlockRefinementScheduler(), ours.BlockRefinementScheduler()
    for scheduler in pair:
        scheduler.set_timesteps(steps, block_length=8)
    generator = torch.Generator().manual_seed(1)
    samples = [torch.full((4, 8), MASK)] * 2
    for step in [steps + 1, *range(steps), *range(2)]:
        candidates = torch.randint(0, V - 1, (4, 8), generator=generator)
        figures = torch.rand(4, 8, generator=generator)
        outputs = []
        for scheduler, sample in zip(pair, samples, strict=True):
            monkeypatch.setattr(type(scheduler), "_sample_from_logits", lambda *a, c=(candidates, figures), **k: c)
            output = scheduler.step(
                torch.zeros(4, 8, V), step, sample, mask_token_id=mask_token_id, temperature=1.0, threshold=0.9,
                editing_threshold=editing_threshold, generator=torch.Generator().manual_seed(step),
            )  # fmt: skip
            outputs.append(output)
        assert_equal(outputs[1], outputs[0])
        samples = [output.prev_sample for output in outputs]


def hand_in(monkeypatch) -> None:
    """The likeliest ids are drawn, by theirs and by ours, and noise that is a function of the position."""

    def noise(values):
        return (torch.arange(values.numel()).view_as(values) * 1.7).sin()

    draw_likeliest(monkeypatch)
    monkeypatch.setattr(functional, "confidence_remask_keys", lambda values, **options: -noise(values))
    monkeypatch.setattr(amused, "gumbel_noise", lambda values, **options: noise(values))


@pytest.mark.parametrize("entropy_bound", [None, 0.0, 0.1, 2.0, float("inf")])
def test_entropy_bound_with_given_candidates(entropy_bound, monkeypatch):
    hand_in(monkeypatch)
    pair = diffusers.EntropyBoundScheduler(), ours.EntropyBoundScheduler()
    numbers = set()
    for seed in range(10):
        outputs = []
        for scheduler in pair:
            scheduler.set_timesteps(10)
            output = scheduler.step(
                random_logits(3, 8, V, seed=seed), seed, torch.zeros(3, 8, dtype=torch.int64),
                entropy_bound=entropy_bound, generator=torch.Generator().manual_seed(seed),
            )  # fmt: skip
            outputs.append(output)
        assert_equal(outputs[1], outputs[0])
        numbers |= set(outputs[0].accepted_index.sum(dim=-1).tolist())
    assert (len(numbers) > 3) is (entropy_bound in (None, 0.1, 2.0))


@pytest.mark.parametrize("temperature", [(2, 0), (0, 0), 1])
@pytest.mark.parametrize("masking_schedule", ["cosine", "linear"])
@pytest.mark.parametrize("is_image", [True, False])
def test_amused_with_given_candidates_and_noise(is_image, masking_schedule, temperature, monkeypatch):
    hand_in(monkeypatch)
    num_steps, shape = 7, (4, 3, 5) if is_image else (4, 15)
    pair = [module.AmusedScheduler(99, masking_schedule) for module in (diffusers, ours)]
    samples = [torch.full(shape, 99)] * 2
    samples[0].view(4, -1)[1, :13] = 1  # two masks, one, none
    samples[0].view(4, -1)[2, :14] = 1
    samples[0].view(4, -1)[3] = 1
    for timestep in range(num_steps - 1, -1, -1):
        logits = random_logits(4, V, *shape[1:], seed=timestep) * (timestep != 4)  # where all tie
        logits = logits if is_image else logits.mT
        outputs = []
        for scheduler, sample in zip(pair, samples, strict=True):
            scheduler.set_timesteps(num_steps, temperature)
            outputs.append(scheduler.step(logits, timestep, sample, starting_mask_ratio=0.9))
        assert_equal(outputs[1], outputs[0])
        as_tensor = pair[1].timesteps[num_steps - 1 - timestep]
        assert_equal(pair[1].step(logits, as_tensor, samples[1], 0.9), outputs[1])
        samples = [output.prev_sample for output in outputs]
    assert not (samples[0] == 99).any()


def small_amused():
    torch.manual_seed(0)
    transformer = diffusers.UVit2DModel(
        hidden_size=8, use_bias=False, hidden_dropout=0.0, cond_embed_dim=8, micro_cond_encode_dim=2,
        micro_cond_embed_dim=10, encoder_hidden_size=8, vocab_size=32, codebook_size=24, in_channels=8,
        block_out_channels=8, num_res_blocks=1, downsample=True, upsample=True, block_num_heads=1,
        num_hidden_layers=1, num_attention_heads=1, attention_dropout=0.0, intermediate_size=8,
    )  # fmt: skip
    pipe = diffusers.AmusedPipeline(
        vqvae=None, tokenizer=None, text_encoder=None, transformer=transformer.eval(),
        scheduler=diffusers.AmusedScheduler(mask_token_id=31),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_amused_pipeline_is_equal_step_for_step(monkeypatch):
    """What it calls a timestep is a tensor."""
    hand_in(monkeypatch)
    pipe = small_amused()
    text = {"prompt_embeds": random_logits(2, 8, seed=1), "encoder_hidden_states": random_logits(2, 4, 8, seed=2)}
    text |= {f"negative_{name}": torch.zeros_like(value) for name, value in text.items()}
    seen: list[list] = []
    for scheduler in (pipe.scheduler, ours.AmusedScheduler.from_config(pipe.scheduler.config)):
        pipe.scheduler, steps = scheduler, []
        pipe(height=32, width=48, num_inference_steps=6, guidance_scale=30.0, output_type="latent",
             callback=lambda step, timestep, latents, steps=steps: steps.append(latents), **text)  # fmt: skip
        seen.append(steps)
    assert len(seen[0]) == len(seen[1]) == 6
    for received, expected in zip(seen[1], seen[0], strict=True):
        assert torch.equal(received, expected)
    masks = [int((latents == 31).sum()) for latents in seen[1]]
    assert all(more > fewer for more, fewer in pairwise(masks))
    assert masks[-1] == 0


class Processor:
    """Of three prompts, all the same whatever they are."""

    eos_token_id = 1

    def apply_chat_template(self, messages, **options):
        return {"input_ids": torch.arange(3, 18).view(3, 5)}


@pytest.fixture(scope="module")
def gemma():
    model = small_gemma()
    mask_of = model.model.decoder.create_diffusion_decoder_attention_mask

    def renamed(**options):  # transformers calls it cache from 5.24 on, where diffusers 0.42 does not
        if "past_key_values" in options and "cache" in mask_of.__code__.co_varnames:
            options["cache"] = options.pop("past_key_values")
        return mask_of(**options)

    model.model.decoder.create_diffusion_decoder_attention_mask = renamed
    return model


GEMMA = {
    "refinement": ("BlockRefinementScheduler", {}, {"confidence_threshold": None}),
    "editing": ("BlockRefinementScheduler", {"threshold": 0.5, "editing_threshold": 0.2}, {"stability_threshold": 2}),
    "entropy": ("EntropyBoundScheduler", {"entropy_bound": 1.0}, {"confidence_threshold": None}),
    "entropy stops": ("EntropyBoundScheduler", {"entropy_bound": 3.0}, {"confidence_threshold": 2.0}),
}


@pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated")
@pytest.mark.parametrize("case", GEMMA)
def test_diffusion_gemma_is_equal_step_for_step(case, gemma, monkeypatch):
    """At temperature 0 as it is; with entropies, which have a temperature of their own, candidates are handed in."""
    name, config, options = GEMMA[case]
    if name == "EntropyBoundScheduler":
        hand_in(monkeypatch)
    seen: list[list] = []
    for module in (diffusers, ours):
        scheduler = getattr(module, name)(**config)
        pipe = diffusers.DiffusionGemmaPipeline(model=gemma, scheduler=scheduler, processor=Processor())
        pipe.set_progress_bar_config(disable=True)
        steps: list = []

        def note(pipe, step, timestep, tensors, steps=steps):
            steps.append(tensors["canvas"])
            return {}

        out = pipe(
            prompt=["a"] * 3, gen_length=16, num_inference_steps=6, output_type="seq", callback_on_step_end=note,
            generator=torch.Generator().manual_seed(3), eos_early_stop=False, **options,
        )  # fmt: skip
        seen.append([out.sequences, *steps])
    assert len(seen[0]) == len(seen[1]) > 4
    for received, expected in zip(seen[1], seen[0], strict=True):
        assert torch.equal(received, expected)


# Laws

LAWS = {
    "plain": {},
    "hot": {"temperature": 1.6},
    "cool": {"temperature": 0.7},
    "top_k": {"temperature": 0.7, "top_k": 4},
    "the largest, which tie": {"temperature": 1.3, "top_k": 1},
    "top_k 0": {"top_k": 0},
    "more than all": {"top_k": 99, "top_p": 1.0},
    "nucleus": {"temperature": 1.4, "top_p": 0.6},
    "both": {"temperature": 0.8, "top_k": 5, "top_p": 0.7},
}


@pytest.mark.parametrize("case", LAWS)
def test_samples_are_equal_in_law(case):
    """Theirs is found by their filters, and the probability of each is given."""
    options = {"temperature": 1.0, "top_k": None, "top_p": None, **LAWS[case]}
    row = torch.tensor([1.0, 2.5, -1.0, 0.3, 2.5, 0.7, -2.0])
    theirs, filters = diffusers.BlockRefinementScheduler, dict(options)
    filtered = theirs._top_k_filtering(row[None] / filters.pop("temperature"), filters["top_k"])
    law = theirs._top_p_filtering(filtered, filters["top_p"]).softmax(dim=-1)[0]
    ids, probs = ours.BlockRefinementScheduler._sample_from_logits(
        row.expand(100, 60, 7), generator=torch.Generator().manual_seed(0), use_multinomial=True, **options
    )
    torch.testing.assert_close(probs, law[ids])
    assert_law(torch.bincount(ids.flatten(), minlength=7), law)


@pytest.mark.parametrize("shape", [(5,), (2, 3), (2, 3, 4), (0,)], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_any_number_of_dimensions_are_sampled(temperature, shape):
    """As diffusers' own tests do, of rows [M, V]: each row's id and its probability."""
    logits, sample = random_logits(*shape, V), ours.BlockRefinementScheduler._sample_from_logits
    ids, probs = sample(
        logits, temperature=temperature, top_k=None, top_p=None, generator=None, use_multinomial=temperature > 0.0
    )
    assert ids.shape == probs.shape == shape
    torch.testing.assert_close(probs, logits.softmax(dim=-1).gather(-1, ids[..., None])[..., 0])
    if temperature == 0.0:
        assert torch.equal(ids, logits.argmax(dim=-1))


STEPS = {
    "mask": ("BlockRefinementScheduler", {"mask_token_id": 3, "temperature": 0.8, "threshold": 0.7}),
    "uniform": ("BlockRefinementScheduler", {"temperature": 1.2, "threshold": 0.8}),
    "entropy": ("EntropyBoundScheduler", {"entropy_bound": 0.8}),
    "amused": ("AmusedScheduler", {}),
}


@pytest.mark.parametrize("case", STEPS)
def test_whole_steps_are_equal_in_law(case):
    """Ours and theirs by one table: which ids stand where after a step of the same sequence, many times."""
    name, options = STEPS[case]
    num, length = 4000, 3
    logits = random_logits(1, length, 3, scale=1.5).expand(num, length, 3)
    outcomes = []
    for seed, module in enumerate((diffusers, ours)):
        scheduler = getattr(module, name)(**({"mask_token_id": 3} if name == "AmusedScheduler" else {}))
        scheduler.set_timesteps(2)
        if name == "BlockRefinementScheduler":
            scheduler.set_timesteps(2, block_length=length)
        timestep = 1 if name == "AmusedScheduler" else 0
        generator = torch.Generator().manual_seed(seed)
        output = scheduler.step(logits, timestep, torch.full((num, length), 3), generator=generator, **options)
        outcomes.append((output.prev_sample * torch.tensor([16, 4, 1])).sum(dim=-1).numpy())
    assert len(set(outcomes[0])) > 7
    assert_independent(np.repeat([0, 1], num), np.concatenate(outcomes), 2, 64)


# Errors and waits


def test_errors_are_theirs():
    for module in (diffusers, ours):
        logits, sample = torch.zeros(1, 2, 3), torch.zeros(1, 2, dtype=torch.int64)
        scheduler = module.BlockRefinementScheduler()
        with pytest.raises(ValueError, match=r"`temperature` must be >= 0, got -1"):
            scheduler.step(logits, 0, sample, temperature=-1)
        for top_p in (0.0, -1.0):
            with pytest.raises(ValueError, match=r"`top_p` must be in \(0, 1\]"):
                scheduler.step(logits, 0, sample, temperature=1.0, top_p=top_p)
            scheduler.step(logits, 0, sample, temperature=0.0, top_p=top_p)
        with pytest.raises(ValueError, match="must be > 0, got 0"):
            scheduler.set_timesteps(0)
        scheduler = module.AmusedScheduler(2, masking_schedule="square")
        scheduler.set_timesteps(2)
        with pytest.raises(ValueError, match="unknown masking schedule square"):
            scheduler.step(logits, 1, sample + 2)
    with pytest.raises(ValueError, match="expected entropy_bound in"):  # theirs accepts nothing
        ours.EntropyBoundScheduler().step(logits, 0, sample, entropy_bound=-1.0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_tuples_are_theirs(name):
    logits, sample = random_logits(2, 8, V), torch.full((2, 8), 9)
    for module in (diffusers, ours):
        scheduler = getattr(module, name)(**SCHEDULERS[name])
        scheduler.set_timesteps(4)
        torch.manual_seed(0)
        output = scheduler.step(logits, 0, sample)
        torch.manual_seed(0)
        as_tuple = scheduler.step(logits, 0, sample, return_dict=False)
        assert isinstance(as_tuple, tuple)
        for value, field in zip(as_tuple, output.values(), strict=True):
            assert torch.equal(value, field)
        assert [x.dtype for x in as_tuple if x.dtype != torch.bool][:1] == [torch.int64]


def test_nothing_is_drawn_at_temperature_0():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state(), torch.get_rng_state()
    scheduler = ours.BlockRefinementScheduler()
    scheduler.set_timesteps(4)
    scheduler.step(random_logits(2, 32, V), 0, torch.full((2, 32), MASK), mask_token_id=MASK, generator=generator)
    assert torch.equal(generator.get_state(), before[0])
    assert torch.equal(torch.get_rng_state(), before[1])


WAYS = {
    "mask": ("BlockRefinementScheduler", {"mask_token_id": 9, "temperature": 0.0, "editing_threshold": 0.1}),
    "filters": ("BlockRefinementScheduler", {"mask_token_id": 9, "temperature": 0.7, "top_k": 6, "top_p": 0.9}),
    "uniform": ("BlockRefinementScheduler", {"temperature": 1.0, "editing_threshold": 0.1}),
    "entropy": ("EntropyBoundScheduler", {}),
    "amused": ("AmusedScheduler", {}),
}


def run_some_way(way: str, device, steps: int = 4, length: int = 8) -> list[torch.Tensor]:
    """What comes out of all steps, and of the search for an EOS."""
    name, options = WAYS[way]
    scheduler = getattr(ours, name)(**SCHEDULERS[name])
    scheduler.set_timesteps(4, device=device)
    torch.manual_seed(0)
    sample, seen = torch.full((2, length), 9, device=device), []
    for step in range(steps):
        output = scheduler.step(random_logits(2, length, V, seed=step).to(device), step, sample, **options)
        sample = output.prev_sample
        seen += output.values()
        if way == "mask":
            arguments = sample, output.sampled_tokens, output.transfer_index, sample[:, 0] < 0, 3, 9, 2
            seen.append(scheduler.check_eos_finished(*arguments))
    return seen


@pytest.mark.parametrize("way", WAYS)
def test_no_step_waits_for_the_device(way, monkeypatch):
    assert_waits_for_nothing(monkeypatch, lambda: run_some_way(way, "cpu"))


@pytest.mark.parametrize("way", WAYS)
def test_nothing_is_copied_while_the_host_waits(way, monkeypatch):
    """Meta tensors have a device of their own, as those of a GPU."""
    mode, name = Copies(), WAYS[way][0]
    step = getattr(ours, name).step

    def watched(*arguments, **options):
        with mode:
            return step(*arguments, **options)

    monkeypatch.setattr(getattr(ours, name), "step", watched)
    run_some_way(way, "meta")
    assert mode.seen == []


@pytest.mark.parametrize("way", WAYS)
def test_steps_are_equal_on_the_kernels(way, kernel, monkeypatch):
    size = {"steps": 2, "length": 3}
    expected = run_some_way(way, kernel.device, **size)
    monkeypatch.setenv("FASTMASK_BACKEND", "triton")
    for value, theirs in zip(run_some_way(way, kernel.device, **size), expected, strict=True):
        torch.testing.assert_close(value, theirs)


# Halton's order


def public_order(size: int) -> np.ndarray:
    """Cells in the order of the public code, whose points are float32: [size^2, 2]."""

    def points(base):
        found = []
        for point in range(1, 10_001):
            x, share = 0.0, 1.0
            while point:
                share /= base
                x += share * (point % base)
                point //= base
            found.append(x)
        return np.array(found, dtype=np.float32)

    cells = np.floor(np.stack([points(2), points(3)], axis=1) * np.float32(size)).astype(int)
    return cells[np.sort(np.unique(cells, axis=0, return_index=True)[1])]


@pytest.mark.parametrize("size", [4, 8, 16, 24, 32])
def test_halton_order_is_that_of_the_public_code(size):
    cells = public_order(size)
    assert len(cells) == size**2
    expected = torch.empty(size, size, dtype=torch.int64)
    expected[tuple(torch.from_numpy(cells).T)] = torch.arange(size**2)
    assert torch.equal(ours.halton_order(size, size).view(size, size), expected)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 7), (6, 1), (5, 9), (16, 12)])
def test_halton_orders_are_permutations(height, width):
    order = ours.halton_order(height, width)
    assert order.dtype == torch.int64
    assert torch.equal(order.sort().values, torch.arange(height * width))


def test_halton_order_by_hand():
    """Points (1/2, 1/3), (1/4, 2/3), (3/4, 1/9), (1/8, 4/9), ... in four rows and three columns."""
    order = ours.halton_order(4, 3).view(4, 3)
    for place, cell in enumerate([(2, 1), (1, 2), (3, 0), (0, 1)]):
        assert order[cell] == place
