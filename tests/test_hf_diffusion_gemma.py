"""fastmask.hf.diffusion_gemma: transformers' DiffusionGemma, with its sampler and with ours.

Where candidates are handed in, equal id for id; else equal in law.
"""

from __future__ import annotations

import copy
import doctest
import gc
import importlib
import itertools
import math
import pickle
import re
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gemma import draw_likeliest, small_gemma
from sampling import assert_independent, assert_law
from test_generate_waits import Copies, assert_waits_for_nothing
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
theirs = pytest.importorskip(
    "transformers.models.diffusion_gemma.generation_diffusion_gemma", reason="needs transformers of at least 5.11"
)
ours = importlib.import_module("fastmask.hf.diffusion_gemma")

N, V = 8, 13
SAMPLERS = (theirs.EntropyBoundSampler, ours.EntropyBoundSampler)


def new_sampler(kind, entropy_bound: float = 0.7, length: int = N, num_ids: int = V):
    sampler = kind(theirs.EntropyBoundSamplerConfig(1.0), length, num_ids, 8)
    sampler.entropy_bound = entropy_bound  # the configuration refuses 0
    return sampler


def random_logits(*shape: int, scale: float = 4.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_ids(*shape: int, seed: int = 0, num_ids: int = V) -> torch.Tensor:
    return torch.randint(num_ids, shape, generator=torch.Generator().manual_seed(seed))


def step_of(sampler, logits, current, candidates, seed: int = 0) -> list[torch.Tensor]:
    """What is accepted, the canvas with it, and the next one."""
    accepted = sampler.accept_canvas(current, candidates, logits, 3)
    torch.manual_seed(seed)
    return [sampler.accepted_token_mask, accepted, sampler.renoise_canvas(accepted, 3)]


def assert_equal(received, expected) -> None:
    for value, other in zip(received, expected, strict=True):
        assert value.dtype == other.dtype
        assert torch.equal(value, other)


# The sampler, with candidates handed in


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (5, 8), (2, 300)], ids=str)
@pytest.mark.parametrize("entropy_bound", [0.0, 1e-30, 0.1, 2.0, 1e30, math.inf])
def test_steps_with_given_candidates_are_equal(entropy_bound, shape):
    numbers = set()
    for seed in range(10):
        logits = random_logits(*shape, V, seed=seed)
        current, candidates = random_ids(*shape, seed=seed), random_ids(*shape, seed=seed + 100)
        state = torch.get_rng_state()
        expected, received = (
            step_of(new_sampler(kind, entropy_bound, shape[1]), logits, current, candidates, seed)
            for kind in SAMPLERS
        )
        assert_equal(received, expected)
        torch.set_rng_state(state)
        new_sampler(ours.EntropyBoundSampler, entropy_bound, shape[1]).accept_canvas(current, candidates, logits, 3)
        assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn
        numbers |= set(received[0].sum(dim=-1).tolist())
    if entropy_bound < 1e-20:
        assert numbers == {1}
    elif entropy_bound > 1e20:
        assert numbers == {shape[1]}
    else:
        assert len(numbers) > 2 or shape[1] == 1


def accepted_by_hand(logits, entropy_bound: float) -> np.ndarray:
    """Algorithm 1 of the EB-Sampler in float64, position by position."""
    z = logits.double().numpy()
    with np.errstate(invalid="ignore"):
        law = np.exp(z - z.max(-1, keepdims=True))
        law /= law.sum(-1, keepdims=True)
        entropies = -np.where(law > 0, law * np.log(law.clip(1e-300)), 0.0).sum(-1)
    accepted = np.zeros(entropies.shape, dtype=bool)
    for row, is_accepted in zip(entropies, accepted, strict=True):
        total = 0.0
        for position in sorted(range(len(row)), key=lambda i: row[i]):
            if total > entropy_bound:
                break
            is_accepted[position] = True
            total += row[position]
    return accepted


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_entropies_are_float32_in_each_dtype(dtype):
    """Where theirs are of the logits' dtype; so theirs are given the same logits in float32."""
    numbers = set()
    for seed in range(10):
        logits = random_logits(3, N, V, seed=seed).to(dtype)
        current, candidates = random_ids(3, N), random_ids(3, N, seed=1)
        received = step_of(new_sampler(ours.EntropyBoundSampler), logits, current, candidates)
        assert_equal(received, step_of(new_sampler(theirs.EntropyBoundSampler), logits.float(), current, candidates))
        assert received[0].tolist() == accepted_by_hand(logits, 0.7).tolist()
        numbers |= set(received[0].sum(dim=-1).tolist())
    assert len(numbers) > 2


def test_forbidden_ids_are_theirs():
    """-inf, as logits processors leave it."""
    logits = random_logits(3, N, V)
    logits[..., 2:9] = -torch.inf
    logits[0, 0] = -torch.inf
    logits[0, 0, 4] = 0.0
    expected, received = (
        step_of(new_sampler(kind), logits, random_ids(3, N), random_ids(3, N, seed=1)) for kind in SAMPLERS
    )
    assert_equal(received, expected)
    drawn = new_sampler(ours.EntropyBoundSampler, math.inf).accept_canvas(random_ids(3, N), None, logits, 3)
    assert not ((drawn >= 2) & (drawn < 9))[logits[..., 0] > -torch.inf].any()
    assert drawn[0, 0] == 4


def test_of_equal_entropies_the_first_are_accepted():
    logits = torch.zeros(2, N, V)
    for number in range(N):
        sampler = new_sampler(ours.EntropyBoundSampler, (number + 0.5) * math.log(V))
        sampler.accept_canvas(random_ids(2, N), random_ids(2, N), logits, 3)
        assert sampler.accepted_token_mask.tolist() == [[i <= number for i in range(N)]] * 2


def test_a_row_of_nan_is_not_accepted():
    logits = random_logits(1, N, V)
    logits[0, 2] = torch.nan
    sampler = new_sampler(ours.EntropyBoundSampler, 1e3)
    canvas = sampler.accept_canvas(torch.full((1, N), 99), None, logits, 3)
    assert (canvas == 99).tolist() == (~sampler.accepted_token_mask).tolist() == [[i == 2 for i in range(N)]]


# The sampler, with candidates of its own


def test_candidates_are_accepted_as_given_ones():
    logits, current = random_logits(3, N, V), random_ids(3, N)
    drawing, given = new_sampler(ours.EntropyBoundSampler), new_sampler(ours.EntropyBoundSampler)
    everything = new_sampler(ours.EntropyBoundSampler, math.inf)
    torch.manual_seed(1)
    canvas = drawing.accept_canvas(current, None, logits, 3)
    torch.manual_seed(1)
    candidates = everything.accept_canvas(current, None, logits, 3)
    assert torch.equal(canvas, given.accept_canvas(current, candidates, logits, 3))
    assert torch.equal(drawing.accepted_token_mask, given.accepted_token_mask)
    assert 0 < int(given.accepted_token_mask.sum()) < 3 * N


def law_of_a_step(logits, entropy_bound: float) -> np.ndarray:
    """Of each canvas of ids [N], one after the other: the softmax where accepted, else all ids alike. float64."""
    accepted = accepted_by_hand(logits[None], entropy_bound)[0]
    law = logits.double().softmax(dim=-1).numpy()
    num_ids = logits.shape[-1]
    law[~accepted] = 1.0 / num_ids
    return np.array([
        math.prod(law[i, v] for i, v in enumerate(canvas))
        for canvas in itertools.product(range(num_ids), repeat=len(logits))
    ])  # fmt: skip


@pytest.mark.parametrize(("entropy_bound", "accepted"), [(0.0, 1), (0.4, 2), (5.0, 3)])
def test_canvases_follow_the_law(entropy_bound, accepted):
    num, logits = 6000, random_logits(3, 3, scale=1.5)
    sampler = new_sampler(ours.EntropyBoundSampler, entropy_bound, 3, 3)
    torch.manual_seed(0)
    canvas = sampler.accept_canvas(torch.zeros(num, 3, dtype=torch.int64), None, logits.expand(num, 3, 3), 3)
    canvas = sampler.renoise_canvas(canvas, 3)
    assert sampler.accepted_token_mask.sum() == accepted * num
    outcomes = (canvas * torch.tensor([9, 3, 1])).sum(dim=-1)
    assert_law(torch.bincount(outcomes, minlength=27), law_of_a_step(logits, entropy_bound))


class Stub(theirs.DiffusionGemmaGenerationMixin):
    """What a step asks of a model."""

    def __init__(self, length: int, num_ids: int) -> None:
        embeddings = torch.nn.Embedding(num_ids, 1, dtype=torch.bfloat16)
        self.config = SimpleNamespace(canvas_length=length, text_config=SimpleNamespace(vocab_size=num_ids))
        self.model = SimpleNamespace(decoder=SimpleNamespace(embed_tokens=embeddings))


def step_alone(is_swapped: bool, logits, **options) -> tuple:
    """What a step of a model gives that sees these logits, at a temperature of 1."""
    batch, length, num_ids = logits.shape
    config = SimpleNamespace(sampler_config=theirs.EntropyBoundSamplerConfig(0.7), max_denoising_steps=4)
    stub = Stub(length, num_ids)
    if is_swapped:
        ours.swap_sampler(stub)
    arguments = {
        "decoder_forward": lambda cache, **inputs: SimpleNamespace(logits=logits),
        "current_canvas": torch.zeros(batch, length, dtype=torch.int64), "argmax_canvas": None, "input_ids": None,
        "decoder_position_ids": None, "self_conditioning_logits": None, "mask_mapping": None, "cache": None,
        "finished_denoising": torch.zeros(batch, dtype=torch.bool), "cur_step": 3,
        "sampler": stub._prepare_sampler(config),
        "logits_processor": lambda ids, z, cur_step: z / (0.5 + cur_step / 6),
        "diffusion_stopping_criteria": None,
    }  # fmt: skip
    return stub._denoising_step(**{**arguments, **options})


def test_whole_steps_are_equal_in_law():
    """Ours and theirs by one table: which ids stand where after a step, many times."""
    num, length, num_ids = 4000, 3, 3
    logits = random_logits(1, length, num_ids, scale=1.5).expand(num, length, num_ids)
    outcomes = []
    for seed, is_swapped in enumerate((False, True)):
        torch.manual_seed(seed)
        canvas, argmax, conditioning, finished = step_alone(is_swapped, logits)
        assert torch.equal(argmax, logits.argmax(dim=-1))
        assert torch.equal(conditioning, logits.bfloat16())
        assert not finished.any()
        outcomes.append((canvas * torch.tensor([9, 3, 1])).sum(dim=-1).numpy())
    assert len(set(outcomes[0])) > 15
    assert_independent(np.repeat([0, 1], num), np.concatenate(outcomes), 2, 27)


def test_what_is_finished_stays(monkeypatch):
    """Two of four sequences are; of the others one ends in this step."""
    draw_likeliest(monkeypatch)
    logits = random_logits(4, N, V)
    logits[2] *= 100.0
    seen = []
    for is_swapped in (False, True):
        criterion = theirs.StableAndConfidentStoppingCriteria(stability_threshold=0, confidence_threshold=0.1)
        torch.manual_seed(0)
        step = step_alone(
            is_swapped, logits, current_canvas=random_ids(4, N), argmax_canvas=random_ids(4, N, seed=1),
            self_conditioning_logits=random_logits(4, N, V, seed=1), diffusion_stopping_criteria=criterion,
            finished_denoising=torch.tensor([True, False, False, True]),
        )  # fmt: skip
        seen.append(step)
    assert_equal(seen[1], seen[0])
    assert seen[1][3].tolist() == [True, False, True, True]
    for row in (0, 3):
        assert torch.equal(seen[1][0][row], random_ids(4, N)[row])
        assert torch.equal(seen[1][1][row], random_ids(4, N, seed=1)[row])
        assert torch.equal(seen[1][2][row], random_logits(4, N, V, seed=1)[row].bfloat16())


# generate


@pytest.fixture(scope="module")
def gemmas():
    """One for their sampler, one for ours."""
    pair = small_gemma(), small_gemma()
    ours.swap_sampler(pair[1])
    return pair


def generate(gemma, seed: int = 3, **options) -> tuple[list, list]:
    """What is returned, and of each step what it gives and what the sampler accepted."""
    denoise, steps = gemma._denoising_step, []

    def noted(**arguments):
        step = denoise(**arguments)
        steps.append([x.clone() for x in (*step, arguments["sampler"].accepted_token_mask)])
        return step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemma, "_denoising_step", noted)
        torch.manual_seed(seed)
        out = gemma.generate(
            torch.arange(3, 18).view(3, 5), **{"max_new_tokens": 16, "max_denoising_steps": 6, **options}
        )
    return [out.sequences, out.tokens_per_forward], steps


GENERATIONS = {
    "defaults": {},
    "accepts more": {"sampler_config": theirs.EntropyBoundSamplerConfig(3.0)},
    "accepts all": {"sampler_config": theirs.EntropyBoundSamplerConfig(math.inf)},
    "stops": {"sampler_config": theirs.EntropyBoundSamplerConfig(3.0), "confidence_threshold": 0.6},
    "stops later": {
        "sampler_config": theirs.EntropyBoundSamplerConfig(6.0), "max_denoising_steps": 9,
        "confidence_threshold": 9.0, "stability_threshold": 2,
    },
    "hot": {"t_min": 0.1, "t_max": 3.0, "sampler_config": theirs.EntropyBoundSamplerConfig(1.0)},
    "ends": {"eos_token_id": 9, "pad_token_id": 0, "max_new_tokens": 24},
}  # fmt: skip


@pytest.mark.parametrize("case", GENERATIONS)
def test_generations_with_given_candidates_are_equal(case, gemmas, monkeypatch):
    """Step for step: the likeliest are drawn by both, and random ids by one generator."""
    draw_likeliest(monkeypatch)
    numbers, num_finished = set(), set()
    for seed in range(3):
        (expected, their_steps), (received, our_steps) = (
            generate(gemma, seed, **GENERATIONS[case]) for gemma in gemmas
        )
        assert_equal(received, expected)
        assert len(our_steps) == len(their_steps) > 2
        for step, other in zip(our_steps, their_steps, strict=True):
            assert_equal(step, other)
            numbers |= set(step[-1].sum(dim=-1).tolist())
            num_finished.add(int(step[3].sum()))
    assert len(numbers) > 1 or case == "accepts all"
    if case.startswith("stops"):  # one sequence before the others, which alone go on
        assert num_finished & {1, 2}


def test_a_sampler_alone_may_be_swapped(gemmas, monkeypatch):
    """Candidates are then transformers' draws: the same seed gives the same generation."""
    expected, their_steps = generate(gemmas[0])
    monkeypatch.setattr(gemmas[0], "_prepare_sampler", gemmas[1]._prepare_sampler)
    received, our_steps = generate(gemmas[0])
    assert_equal(received, expected)
    for step, other in zip(our_steps, their_steps, strict=True):
        assert_equal(step, other)


def test_candidates_are_drawn_here(gemmas, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("transformers draws")

    monkeypatch.setattr(torch, "multinomial", refuse)
    sequences = [generate(gemmas[1], seed)[0][0] for seed in (3, 3, 4)]
    assert torch.equal(sequences[0], sequences[1])
    assert not torch.equal(sequences[0], sequences[2])
    with pytest.raises(AssertionError, match="transformers draws"):
        generate(gemmas[0])


def test_bfloat16_generates(gemmas, monkeypatch):
    """Its logits are float32, and what conditions the next step is bfloat16."""
    draw_likeliest(monkeypatch)
    expected, received = (generate(copy.deepcopy(gemma).bfloat16()) for gemma in gemmas)
    assert_equal(received[0], expected[0])
    for step, other in zip(received[1], expected[1], strict=True):
        assert_equal(step, other)
        assert step[2].dtype == torch.bfloat16


def test_a_model_is_copied_saved_and_freed(gemmas, tmp_path):
    expected = generate(gemmas[1])[0]
    for copied in (copy.deepcopy(gemmas[1]), pickle.loads(pickle.dumps(gemmas[1]))):
        assert_equal(generate(copied)[0], expected)
        assert copied._denoising_step.args[0] is copied.model.decoder
    gemmas[1].save_pretrained(tmp_path)
    loaded = transformers.DiffusionGemmaForBlockDiffusion.from_pretrained(tmp_path)
    assert "_denoising_step" not in loaded.__dict__
    ours.swap_sampler(loaded)
    assert_equal(generate(loaded)[0], expected)
    alive = weakref.ref(loaded)
    generate(loaded)
    gc.disable()
    try:
        del loaded, copied
        assert alive() is None  # without the garbage collector: it may fill a GPU
    finally:
        gc.enable()


def test_what_was_compiled_before_is_not_used():
    gemma = small_gemma()
    gemma._compile_functions(gemma._prepare_sampler(gemma.generation_config_class(
        sampler_config=theirs.EntropyBoundSamplerConfig(0.1), max_denoising_steps=2)), None)  # fmt: skip
    assert gemma._compiled_accept_canvas
    assert gemma._compiled_renoise_canvas
    ours.swap_sampler(gemma)
    assert not hasattr(gemma, "_compiled_accept_canvas")
    assert not hasattr(gemma, "_compiled_renoise_canvas")


def test_another_model_is_refused():
    with pytest.raises(TypeError, match=r"expected model to be a DiffusionGemmaForBlockDiffusion, received Linear"):
        ours.swap_sampler(torch.nn.Linear(2, 2))


def test_their_errors_stay(gemmas):
    for gemma in gemmas:
        with pytest.raises(ValueError, match="`sampler_config` must be an instance of `EntropyBoundSamplerConfig`"):
            generate(gemma, sampler_config=0.1)
        with pytest.raises(ValueError, match="`max_denoising_steps` must be a positive integer"):
            generate(gemma, max_denoising_steps=0)


# Waits, memory, kernels, compilation

GIVEN = {"drawn": None, "given": random_ids(2, N, seed=1)}


def run_steps(device, given: str, steps: int = 3, length: int = N) -> list[torch.Tensor]:
    """What is accepted in each, and the next canvas."""
    sampler = new_sampler(ours.EntropyBoundSampler, length=length)
    torch.manual_seed(0)
    canvas, seen = sampler.initialize_canvas(2, device), []
    candidates = None if GIVEN[given] is None else GIVEN[given][:, :length].to(device)
    for step in range(steps):
        logits = random_logits(2, length, V, seed=step).to(device)
        canvas = sampler.renoise_canvas(sampler.accept_canvas(canvas, candidates, logits, step), step)
        seen += [sampler.accepted_token_mask, canvas]
    return seen


@pytest.mark.parametrize("given", GIVEN)
def test_no_step_waits_for_the_device(given, monkeypatch):
    assert_waits_for_nothing(monkeypatch, lambda: run_steps("cpu", given))


@pytest.mark.parametrize("given", GIVEN)
def test_nothing_is_copied_while_the_host_waits(given, monkeypatch):
    """Meta tensors have a device of their own, as those of a GPU."""
    mode, accept, renoise = Copies(), ours.EntropyBoundSampler.accept_canvas, ours.EntropyBoundSampler.renoise_canvas

    def watching(method):
        def watched(*arguments):
            with mode:
                return method(*arguments)

        return watched

    monkeypatch.setattr(ours.EntropyBoundSampler, "accept_canvas", watching(accept))
    monkeypatch.setattr(ours.EntropyBoundSampler, "renoise_canvas", watching(renoise))
    run_steps("meta", given)
    assert mode.seen == []


class Stored(TorchDispatchMode):
    """How many bytes the largest new storage has, views of what is there being none."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found, given = (
            {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tree_leaves(tree)
             if isinstance(x, torch.Tensor)}
            for tree in (out, (args, kwargs))
        )  # fmt: skip
        self.largest = max([self.largest, *(found[place] for place in found.keys() - given.keys())])
        return out


@pytest.mark.parametrize("given", GIVEN)
def test_nothing_of_the_size_of_the_logits_is_stored(given, kernel, monkeypatch):
    """By the kernels; of theirs it is seen."""
    monkeypatch.setenv("FASTMASK_BACKEND", "triton")
    logits, canvas = random_logits(2, 3, 700).to(kernel.device), random_ids(2, 3).to(kernel.device)
    bytes_stored = []
    for kind, candidates in zip(SAMPLERS, (canvas, None if given == "drawn" else canvas), strict=True):
        sampler = new_sampler(kind)
        with Stored() as mode:
            sampler.accept_canvas(canvas, candidates, logits, 3)
        bytes_stored.append(mode.largest)
    assert bytes_stored[0] >= logits.nbytes
    assert 0 < bytes_stored[1] < logits.nbytes / 10


@pytest.mark.parametrize("given", GIVEN)
def test_steps_are_equal_on_the_kernels(given, kernel, monkeypatch):
    expected = run_steps(kernel.device, given, steps=2, length=4)
    monkeypatch.setenv("FASTMASK_BACKEND", "triton")
    assert_equal(run_steps(kernel.device, given, steps=2, length=4), expected)


@pytest.mark.parametrize("given", GIVEN)
def test_steps_compile_whole(given):
    """As ``generate`` compiles them where the cache is static."""
    expected, sampler = run_steps("cpu", given), ours.EntropyBoundSampler
    with pytest.MonkeyPatch.context() as patch:
        for name in ("accept_canvas", "renoise_canvas"):
            method = torch.compile(getattr(sampler, name), fullgraph=True, backend="aot_eager")
            patch.setattr(sampler, name, method)
        assert_equal(run_steps("cpu", given), expected)


# The module and its page


def test_doctests():
    """CI's other steps have no transformers, so that they leave them out."""
    assert doctest.testmod(ours).attempted > 5
    assert doctest.testmod(ours).failed == 0


def test_the_page_runs():
    page = (Path(__file__).parents[1] / "docs" / "transformers.md").read_text(encoding="utf-8")
    namespace: dict = {"model": small_gemma(), "input_ids": torch.arange(3, 18).view(3, 5)}
    page = page[page.index("## DiffusionGemma's sampler") :]  # tests/test_hf_training.py runs what is before
    blocks = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "docs/transformers.md", "exec"), namespace)
