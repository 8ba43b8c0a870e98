"""fastmask.hf.Backbone(block_length=): block-causal decoders, which beside transformers' own caches give the same."""

from __future__ import annotations

import copy
import importlib
import pickle
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from block_causal import assert_same_states, random_generation, random_prompt, states, wrapped
from generating import MASK, V
from test_cuda_graph import drawn, graphs  # noqa: F401
from test_generate_waits import assert_waits_for_nothing
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fastmask import NonAutoregressiveWrapper

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
Backbone = importlib.import_module("fastmask.hf").Backbone

N = 16
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 24, "max_position_embeddings": N,
} | IDS  # fmt: skip
GPT2 = {"vocab_size": V, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": N} | IDS
GEMMA2 = SIZES | {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": N}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", SIZES),
    "Qwen2": ("Qwen2ForCausalLM", SIZES),
    "Qwen3": ("Qwen3ForCausalLM", SIZES | {"head_dim": 8, "tie_word_embeddings": True}),
    "Gemma": ("GemmaForCausalLM", SIZES | {"head_dim": 8}),
    "Cohere": ("CohereForCausalLM", SIZES | {"logit_scale": 0.3}),
    "Granite": ("GraniteForCausalLM", SIZES | {"logits_scaling": 3.0}),
    "Mistral": ("MistralForCausalLM", SIZES | {"sliding_window": None}),
    "OLMo2": ("Olmo2ForCausalLM", SIZES),
    "Phi3": ("Phi3ForCausalLM", SIZES),
    "GPT-2": ("GPT2LMHeadModel", GPT2),
    "Gemma2": ("Gemma2ForCausalLM", GEMMA2),
}
EXACT = [name for name in MODELS if name != "Gemma2"]  # whose attention has a softmax in float32


def build(name: str, **options: Any) -> nn.Module:
    """A random model in float64, whose logits depend on every id that is seen."""
    architecture, config = MODELS[name]
    model = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = model(model.config_class(**{**config, **options})).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.4)
    return model


def ragged(seed=1, batch=4) -> dict[str, torch.Tensor]:
    return random_prompt(random.Random(seed), batch, N, "ragged")


@pytest.mark.parametrize("number", range(20))
def test_states_are_those_without_a_cache(number):
    """Each model beside both caches, of whatever rule, temperature, prompts and blocks, step for step."""
    options = random_generation(number, N)
    model, length = build(EXACT[number // 2 % len(EXACT)]), options["block_length"]
    net = Backbone(model, block_length=length, static_cache=number % 2 == 1)
    assert net.linear_head() is not None
    wrapper = wrapped(net)
    assert_same_states(states(wrapper, options, True), states(wrapper, options, False))


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_logits_beside_a_cache(name):
    """Of ragged blocks and of padding, which are those of whole sequences; to within the model's own rounding."""
    net = Backbone(build(name), block_length=4)
    ids = torch.randint(0, V, (2, N), generator=torch.Generator().manual_seed(0))
    firsts = torch.tensor([[5], [2]])
    positions = torch.arange(N + 3) + firsts - 5
    blocks = ((positions - firsts) // 4).masked_fill((positions < 0) | (positions >= N), N)
    places, cache, parts = positions.clamp(0, N - 1), net.start_cache(N + 3), []
    for begin, end in ((0, 5), (5, 9), (9, 17), (17, N + 3)):
        span = slice(begin, end)
        given = {"positions": places[:, span], "blocks": blocks[:, span], "cache": cache}
        net(torch.zeros_like(places[:, span]), **given)  # is not kept
        parts.append(net(ids.gather(1, places)[:, span], **given))
        cache.commit(end - begin)
    beside = torch.cat(parts, dim=1)
    whole = net(ids, blocks=(torch.arange(N) - firsts) // 4)
    tolerance = 1e-5 if name == "Gemma2" else 1e-10
    for row in range(2):
        is_one = blocks[row] < N
        torch.testing.assert_close(beside[row, is_one], whole[row, places[row, is_one]], rtol=0, atol=tolerance)
    assert beside.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_which_ids_are_seen(name):
    """One that is changed changes its own block and those after, and nothing before."""
    net = Backbone(build(name), block_length=4)
    ids = torch.randint(0, V - 1, (1, 12), generator=torch.Generator().manual_seed(0))
    before = net(ids)
    for place in range(12):
        changed = ids.clone()
        changed[0, place] = V - 1
        differs = (net(changed) != before).any(dim=-1)[0].tolist()
        assert differs == [i // 4 >= place // 4 for i in range(12)]


def test_attention_masks():
    """What they leave out is seen by nobody, beside a cache too."""
    net, prompt = Backbone(build("Qwen3"), block_length=4), torch.randint(0, MASK, (3, 7))
    mask = torch.ones(3, N, dtype=torch.long)
    mask[1, :2] = mask[2, :5] = 0
    wrapper, options = wrapped(net), {"prompt": prompt, "block_length": 4, "filter_thres": None}
    for origin in ("prompt", "zero"):
        ours = states(wrapper, {**options, "block_origin": origin, "attention_mask": mask}, True)
        assert_same_states(ours, states(wrapper, {**options, "block_origin": origin, "attention_mask": mask}, False))
        other = {**options, "block_origin": origin, "prompt": prompt.where(mask[:, :7].bool(), 0)}
        again = states(wrapper, {**other, "attention_mask": mask}, True)
        assert torch.equal(again[-1][0][:, 7:], ours[-1][0][:, 7:])
    with pytest.raises(ValueError, match="attention_mask"):
        net(prompt, attention_mask=mask[:, None, None])


def test_training():
    """By multiples of the block's length, through the head of the masked rows as through all logits."""
    net = Backbone(build("Llama"), block_length=4)
    losses = []
    for way in (net.linear_head, lambda: None):
        net.linear_head = way
        torch.manual_seed(1)
        loss = NonAutoregressiveWrapper(net, mask_id=MASK)(torch.randint(0, MASK, (4, N))).loss
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)


@pytest.mark.parametrize("static", [False, True])
def test_ten_times_fewer_multiply_adds(static):
    """N 1024, block 32, two steps a block: all that the trunk does, below the head."""
    sizes = {"max_position_embeddings": 1024, "num_hidden_layers": 1, "hidden_size": 8}
    model = build("Llama", **sizes, attn_implementation="eager").float()  # whose products are counted
    wrapper = wrapped(Backbone(model, block_length=32, static_cache=static))
    trunk, counts = model.model.forward, []

    def counted(*arguments, **options):
        with FlopCounterMode(display=False) as counter:
            out = trunk(*arguments, **options)
        counts[-1] += counter.get_total_flops() // 2
        return out

    model.model.forward = counted
    for cache in (False, True):
        counts.append(0)
        wrapper.generate(1, block_length=32, steps=2, cache=cache)
    assert counts[0] > 10 * counts[1] > 0, counts


@pytest.mark.parametrize("static", [False, True])
def test_nothing_waits(static, monkeypatch):
    wrapper = wrapped(Backbone(build("Llama"), block_length=4, static_cache=static))
    prompt = ragged()
    steps = wrapper.generate_steps(**prompt, block_length=4, cache=True, filter_thres=None)
    assert_waits_for_nothing(monkeypatch, lambda: [None for _ in steps])


@pytest.mark.parametrize("static", [False, True])
def test_a_graph(static, graphs):  # noqa: F811
    """With other ids in the prompts, which it is replayed with."""
    wrapper, prompt = wrapped(Backbone(build("Llama"), block_length=4, static_cache=static)), ragged()
    for seed in range(2):
        options = {**prompt, "block_length": 4, "filter_thres": None, "cache": True}
        assert torch.equal(drawn(wrapper, seed, cuda_graph=True, **options), drawn(wrapper, seed, **options))
        prompt["prompt"] = prompt["prompt"].flip(1)
    assert [graph.num_replays for graph in graphs] == [2]


def test_copies():
    net = Backbone(build("Llama"), block_length=4, static_cache=True)
    assert "block_length=4, static_cache=True" in repr(net)
    expected = wrapped(net).generate(**ragged(), block_length=4, **{"start_temperature": 0.0})
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(wrapped(other).generate(**ragged(), block_length=4, start_temperature=0.0), expected)


def test_in_bfloat16_and_under_autocast():
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            net = Backbone(build("Llama").to(dtype), block_length=4)
            assert wrapped(net).generate(**ragged(), block_length=4, cache=True).max() < V


def test_the_page_runs(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "caches.md").read_text(encoding="utf-8")
    build("Llama").save_pretrained(tmp_path)
    given = {"path": tmp_path, "mask_id": MASK, "prompt": torch.tensor([3, 4, 6])}
    first, second = re.findall(r"^```py\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    exec(compile(first, "docs/caches.md", "exec"), given)
    given["model"] = build("Llama")
    exec(compile(second, "docs/caches.md", "exec"), given)
    assert given["ids"].shape == given["same"].shape == (N,)


# ---- Fast-dLLM's prefix cache ----


def test_the_prefix_cache():
    """Of one layer, whose keys and values depend on the ids alone, and of one step a block, what is without."""
    for layers, steps in ((1, 3), (2, 1)):
        net = Backbone(build("Qwen3", num_hidden_layers=layers), bidirectional=True)
        wrapper, options = wrapped(net), {**ragged(), "block_length": 4, "steps": steps, "filter_thres": None}
        assert_same_states(states(wrapper, options, "prefix"), states(wrapper, options, None))
    wrapper = wrapped(Backbone(build("Qwen3"), bidirectional=True))
    options |= {"steps": 3}
    ours, exact = states(wrapper, options, "prefix"), states(wrapper, options, None)
    assert not all(torch.equal(x[2], y[2]) for x, y in zip(ours, exact, strict=True))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("name", "rope", "longest"),
    [
        ("Llama", {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings"),
        ("Phi3", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 4.0,
                  "original_max_position_embeddings": 8}, 8),
    ],
)  # fmt: skip
def test_positions_that_change_as_a_sequence_grows_are_refused(name, rope, longest):
    rope = {"rope_theta": 1e4, **rope}
    options = {"rope_parameters" if transformers.__version__ >= "5" else "rope_scaling": rope}
    if "original_max_position_embeddings" in rope:
        options["original_max_position_embeddings"] = longest
    model = build(name, **options)
    longest = getattr(model.config, longest) if isinstance(longest, str) else longest
    message = f"rope_type '{rope['rope_type']}' and max_seq_len {longest + 1}; set max_seq_len={longest}"
    with pytest.raises(ValueError, match=message):
        Backbone(model, longest + 1, block_length=4)
    assert Backbone(model, longest, block_length=4).is_block_causal


def test_what_is_refused():
    class Deaf(transformers.LlamaForCausalLM):
        def forward(self, input_ids, use_cache=None, past_key_values=None, **options):
            return super().forward(input_ids)

    class Other(transformers.LlamaForCausalLM):
        def forward(self, input_ids, use_cache=None, past_key_values=None, **options):
            input_ids = input_ids + (past_key_values is not None)
            return super().forward(input_ids, use_cache=use_cache, past_key_values=past_key_values, **options)

    config = transformers.LlamaConfig(**SIZES)
    with pytest.raises(ValueError, match="received Deaf, whose positions do not see their own block"):
        Backbone(Deaf(config), block_length=4)
    with pytest.raises(ValueError, match=r"received Other, whose logits beside a cache differ by .* of their norm"):
        Backbone(Other(config), block_length=4)
    with pytest.raises(ValueError, match="with sliding_attention; set max_seq_len to the window"):
        Backbone(build("Gemma2", sliding_window=4), block_length=4)
    with pytest.raises(ValueError, match=r"with sliding_attention; .*without static_cache"):
        Backbone(build("Gemma2"), block_length=4, static_cache=True)
    assert Backbone(build("Gemma2", sliding_window=4), block_length=4, max_seq_len=4).is_block_causal
    with pytest.raises(ValueError, match="expected bidirectional=True or block_length=, received both"):
        Backbone(build("Llama"), block_length=4, bidirectional=True)
    with pytest.raises(ValueError, match="expected block_length"):
        Backbone(build("Llama"), block_length=0)
    with pytest.raises(ValueError, match="expected block_length=4, of which the network's attention has its blocks"):
        wrapped(Backbone(build("Llama"), block_length=4)).generate(2, block_length=2)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**{**SIZES, "num_key_value_heads": None}))
    with pytest.raises(ValueError, match="expected a decoder with a cache of keys and values, received BertForMask"):
        Backbone(bert, block_length=4)
    with pytest.raises(ValueError, match="expected a decoder with a cache of keys and values, received BertForMask"):
        wrapped(Backbone(bert)).generate(2, block_length=4, cache="prefix")
    with pytest.raises(ValueError, match="expected block-causal attention for an exact cache"):
        wrapped(Backbone(build("Llama"), bidirectional=True)).generate(2, block_length=4, cache=True)
