"""fastmask.hf.Backbone: Hugging Face models by the short way through their head, which changes nothing."""

from __future__ import annotations

import copy
import doctest
import gc
import importlib
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastmask import NonAutoregressiveWrapper

transformers = pytest.importorskip("transformers", reason="needs the extra hf")
Backbone = importlib.import_module("fastmask.hf").Backbone

V, N, D, MASK, B = 23, 8, 16, 22, 3
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SIZES, **IDS, "num_key_value_heads": 1}
MODERN = {**SIZES, **IDS, "cls_token_id": 1, "sep_token_id": 2}
DISTIL = {"vocab_size": V, "dim": D, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 16}
ESM = {**SIZES, "pad_token_id": 1, "mask_token_id": MASK, "position_embedding_type": "rotary"}
DEBERTA = {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
GPT2 = {"vocab_size": V, "n_embd": D, "n_layer": 2, "n_head": 2, "n_positions": 16} | IDS

# The class, and what its configuration has.
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "BERT, tied": ("BertForMaskedLM", SIZES),
    "BERT, untied": ("BertForMaskedLM", {**SIZES, "tie_word_embeddings": False}),
    "RoBERTa": ("RobertaForMaskedLM", SIZES),
    "XLM-R": ("XLMRobertaForMaskedLM", SIZES),
    "ModernBERT": ("ModernBertForMaskedLM", MODERN),
    "ESM-2": ("EsmForMaskedLM", ESM),
    "DistilBERT": ("DistilBertForMaskedLM", DISTIL),
    "DeBERTa-v2": ("DebertaV2ForMaskedLM", DEBERTA),
    "ALBERT": ("AlbertForMaskedLM", {**SIZES, "embedding_size": 8}),
    "ELECTRA": ("ElectraForMaskedLM", {**SIZES, "embedding_size": 8}),
}
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", DECODER),
    "Qwen2": ("Qwen2ForCausalLM", DECODER),
    "Qwen3": ("Qwen3ForCausalLM", {**DECODER, "head_dim": 8, "tie_word_embeddings": True}),
    "Gemma2": ("Gemma2ForCausalLM", {**DECODER, "head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 4}),
    "Cohere": ("CohereForCausalLM", {**DECODER, "logit_scale": 0.3}),
    "Granite": ("GraniteForCausalLM", {**DECODER, "logits_scaling": 3.0}),
    "GPT-2": ("GPT2LMHeadModel", GPT2),
}
MODELS = ENCODERS | DECODERS


def build(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Module:
    kind, sizes = MODELS[name]
    model_class = getattr(transformers, kind)
    torch.manual_seed(0)
    model = model_class(model_class.config_class(**{**sizes, **options}))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():  # many begin at 0, where they say nothing
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    if getattr(model.config, "_attn_implementation", "") == "sdpa" and "Gemma2" in kind:
        model.set_attn_implementation("eager")
    return model.to(dtype)


def quiet(model: nn.Module, **options: Any) -> Backbone:
    """A Backbone, without the warning of a causal decoder."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is causal")
        return Backbone(model, **options)


def backbone(name: str, model: nn.Module) -> Backbone:
    return Backbone(model, bidirectional=name in DECODERS)


class ByLogits(nn.Module):
    """The same model's logits, by nothing of ours."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.model, self.options = model, options
        self.num_tokens, self.max_seq_len = V, N

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.model(input_ids=ids, attention_mask=attention_mask, **self.options).logits


def by_logits(name: str, model: nn.Module) -> ByLogits:
    return ByLogits(model, **({"is_causal": False} if name in DECODERS else {}))


def tokens() -> torch.Tensor:
    return torch.randint(3, MASK, (B, N), generator=torch.Generator().manual_seed(1))


def padding() -> torch.Tensor:
    mask = torch.ones(B, N, dtype=torch.int64)
    mask[1, -3:] = 0
    return mask


def results(net: nn.Module, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, gradients by name, and what is generated."""
    model = NonAutoregressiveWrapper(net, mask_id=MASK, steps=3)
    mask = padding()
    torch.manual_seed(5)
    loss = model(tokens(), attention_mask=mask, maskable=mask.bool(), **options).loss
    names, parameters = zip(*((n, p) for n, p in net.model.named_parameters() if p.requires_grad), strict=True)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    torch.manual_seed(6)
    ids = model.generate(B, seq_len=N, attention_mask=mask)
    return loss.detach(), {n: g for n, g in zip(names, gradients, strict=True) if g is not None}, ids


def assert_same(ours: Any, theirs: Any, rtol: float) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    total = sum(gradient.norm() ** 2 for gradient in theirs[1].values()) ** 0.5
    for name, gradient in theirs[1].items():
        assert (ours[1][name] - gradient).norm() <= rtol * total, name
    assert torch.equal(ours[2], theirs[2])


class Widest(TorchDispatchMode):
    """The most rows of logits that any operation makes."""

    rows = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.shape[-1:] == (V,):
            self.rows = max(self.rows, out.numel() // V)
        return out


# ---- real models ----


@pytest.mark.parametrize("name", MODELS)
def test_training_and_generation_are_those_of_the_logits(name, monkeypatch):
    monkeypatch.setenv("FASTMASK_BACKEND", "reference")
    model = build(name)
    net = backbone(name, model)
    assert NonAutoregressiveWrapper(net, mask_id=MASK).has_linear_head, net.head_reason
    ours, theirs = results(net), results(by_logits(name, model))
    assert_same(ours, theirs, 1e-9)
    assert ours[2].max() < MASK
    head = net.linear_head()
    assert {id(head.weight), id(head.bias)} - {id(None)} <= {id(model.get_parameter(n)) for n in ours[1]}


@pytest.mark.parametrize("name", ["BERT, tied", "Cohere"])
def test_logits_are_formed_of_masked_rows_alone(name):
    model = build(name, torch.float32)
    for net, least, most in ((backbone(name, model), 1, B * N - 1), (by_logits(name, model), B * N, B * N)):
        wrapper = NonAutoregressiveWrapper(net, mask_id=MASK, schedule=0.3)
        with Widest() as widest:
            wrapper(tokens()).loss.backward()
        assert least <= widest.rows <= most


@pytest.mark.parametrize("name", MODELS)
def test_the_head_makes_the_logits_of_the_embeddings(name):
    """By the law written out, of head and embeddings alone."""
    model = build(name).eval()
    net = backbone(name, model)
    with torch.no_grad():
        embeddings, logits = net(tokens(), return_embeddings=True), by_logits(name, model)(tokens())
        weight, bias, scale, softcap = net.linear_head()
        expected = scale * embeddings @ weight.T + (0 if bias is None else bias)
        expected = expected if softcap is None else softcap * torch.tanh(expected / softcap)
        torch.testing.assert_close(expected, logits, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(net(tokens()), logits, rtol=0, atol=0)
    sizes = MODELS[name][1]
    assert scale == pytest.approx(sizes.get("logit_scale", 1 / sizes.get("logits_scaling", 1.0)), rel=1e-15)
    assert softcap == sizes.get("final_logit_softcapping")
    assert embeddings.shape == (B, N, sizes.get("embedding_size", D))
    assert weight is model.get_output_embeddings().weight
    if name in ENCODERS and embeddings.shape[-1] == D:  # what BERT's transform gives
        assert (embeddings - model.base_model(tokens()).last_hidden_state).abs().max() > 0.01


@pytest.mark.parametrize("name", ["BERT, tied", "Gemma2"])
def test_in_bfloat16_and_under_autocast(name):
    """To within the rounding of bfloat16."""
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        model = build(name, dtype)
        net = backbone(name, model)
        losses = []
        for way in (net, by_logits(name, model)):
            wrapper = NonAutoregressiveWrapper(way, mask_id=MASK)
            torch.manual_seed(5)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = wrapper(tokens()).loss
            loss.backward()
            losses.append(loss.detach())
            assert wrapper.generate(2, seq_len=N).max() < MASK
        assert net.linear_head() is not None
        torch.testing.assert_close(losses[0], losses[1], rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", ["BERT, tied", "RoBERTa", "Llama"])
def test_padded_vocabularies(name, monkeypatch):
    monkeypatch.setenv("FASTMASK_BACKEND", "reference")
    model = build(name, vocab_size=V + 9)
    net, other = backbone(name, model), by_logits(name, model)
    assert net.num_tokens == V + 9
    net.num_tokens = V
    assert_same(results(net), results(other), 1e-9)


def test_positions():
    assert backbone("BERT, tied", build("BERT, tied")).max_seq_len == 16
    for name in ("RoBERTa", "XLM-R"):  # the padding's id is 1, and positions begin behind it
        net = backbone(name, build(name))
        assert net.max_seq_len == 14
        assert net(torch.full((1, 14), 5), return_embeddings=True).shape == (1, 14, D)
        with pytest.raises((IndexError, RuntimeError), match=r"(?i)index|size"):
            net(torch.full((1, 15), 5))
    assert Backbone(build("BERT, tied"), max_seq_len=9).max_seq_len == 9
    with pytest.raises(TypeError, match="expected max_seq_len"):
        Backbone(build("BERT, tied"), max_seq_len=9.5)


def test_the_head_follows_the_model():
    """What is proved is where the head is: weights that are loaded, moved or replaced are the next ones."""
    model = build("BERT, tied")
    net = Backbone(model)
    model.resize_token_embeddings(V + 4)
    assert net.linear_head().weight is model.get_output_embeddings().weight
    assert net.linear_head().weight.shape == (V + 4, D)
    net.to(torch.float32)
    assert net.linear_head().bias.dtype == torch.float32


def test_copies_and_pickles_have_heads_of_their_own(monkeypatch):
    monkeypatch.setenv("FASTMASK_BACKEND", "reference")
    net = backbone("Cohere", build("Cohere"))
    expected = results(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other.linear_head().weight is other.model.lm_head.weight
        assert other.linear_head().weight is not net.linear_head().weight
        assert_same(results(other), expected, 0.0)


def test_state_dicts_are_the_models():
    net = Backbone(build("BERT, tied"))
    assert {name.removeprefix("model.") for name in net.state_dict()} == set(net.model.state_dict())


# ---- which ids are seen ----


@pytest.mark.parametrize("name", DECODERS)
def test_bidirectional_decoders_see_later_ids(name):
    model = build(name).eval()
    ids = tokens()
    later = ids.clone()
    later[:, -1] = 3 + (ids[:, -1] - 2) % (MASK - 3)
    assert (later != ids).any(0).tolist() == [False] * (N - 1) + [True]
    with torch.no_grad():
        both, causal = Backbone(model, bidirectional=True), quiet(model)
        reach = 4 if name == "Gemma2" else N  # every second layer has a window
        assert (both(ids)[:, N - reach] != both(later)[:, N - reach]).any(-1).all()
        assert torch.equal(causal(ids)[:, :-1], causal(later)[:, :-1])
        assert torch.equal(causal(ids), model(input_ids=ids).logits)
    assert not hasattr(model.config, "is_causal")


@pytest.mark.parametrize("name", DECODERS)
def test_causal_decoders_warn(name):
    with pytest.warns(UserWarning, match=r"the attention of \w+ is causal.*; give bidirectional=True") as caught:
        Backbone(build(name))
    assert [warning.filename for warning in caught] == [__file__]


def test_a_bert_that_decodes_warns():
    with pytest.warns(UserWarning, match="is causal"):
        Backbone(build("BERT, tied", is_decoder=True))


@pytest.mark.parametrize("name", ["Llama", "BERT, tied"])
def test_padding_is_not_seen(name):
    net = backbone(name, build(name)).eval()
    ids, mask = tokens(), padding()
    changed = ids.where(mask.bool(), 7)
    for given in (mask, mask.bool()):
        for options in ({}, {"return_embeddings": True}):
            ours, theirs = (net(x, attention_mask=given, **options)[mask.bool()] for x in (ids, changed))
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
            assert not torch.allclose(net(ids, **options)[1, 0], net(changed, **options)[1, 0])


def test_what_stays_causal_is_refused():
    class Stubborn(transformers.LlamaForCausalLM):
        def forward(self, input_ids, **options):
            options.pop("is_causal", None)
            return super().forward(input_ids, **options)

    class Narrow(transformers.LlamaForCausalLM):
        def forward(self, input_ids):
            return super().forward(input_ids)

    config = transformers.LlamaConfig(**DECODER)
    with pytest.raises(ValueError, match="expected bidirectional=True to lift the causal mask, received Stubborn"):
        Backbone(Stubborn(config), bidirectional=True)
    with pytest.raises(ValueError, match=r"runs with is_causal=False.*received Narrow.*TypeError"):
        Backbone(Narrow(config), bidirectional=True)


# ---- refusals ----


def test_token_dropout_is_refused_with_its_reason():
    model = build("ESM-2", token_dropout=True).eval()
    assert model(input_ids=torch.full((1, N), MASK)).logits.isnan().all()
    with pytest.raises(ValueError, match=r"gives NaN; set model.esm.embeddings.token_dropout = False") as caught:
        Backbone(model)
    remedy = str(caught.value).split("; set ")[1].split(" (and")[0]
    exec(remedy, {"model": model})
    assert Backbone(model)(torch.full((1, N), MASK)).isfinite().all()


def test_what_is_no_language_model_is_refused():
    sizes = {"vocab_size": V, "d_model": D, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    with pytest.raises(TypeError, match="received T5ForConditionalGeneration, an encoder and a decoder"):
        Backbone(t5)
    for other in (nn.Linear(2, 2), None, transformers.BertConfig()):
        with pytest.raises(TypeError, match="expected a Hugging Face language model"):
            Backbone(other)
    with pytest.raises(TypeError, match="bidirectional"):
        Backbone(build("Llama"), bidirectional=1)
    model = Toy(lambda m, z: z)
    del model.config.max_position_embeddings
    with pytest.raises(ValueError, match="expected max_seq_len, since the configuration of Toy has no"):
        Backbone(model)
    assert Backbone(model, N).linear_head() is not None


def test_labels_are_refused():
    model = NonAutoregressiveWrapper(Backbone(build("BERT, tied", torch.float32)), mask_id=MASK)
    with pytest.raises(TypeError, match="received labels=; leave them out: the clean ids are the targets"):
        model(tokens(), labels=tokens())
    model(tokens(), token_type_ids=torch.zeros(B, N, dtype=torch.int64)).loss.backward()  # what else it knows passes


def refused(net: Backbone, reason: str) -> None:
    """It gives logits, as the wrapper says, and no embeddings."""
    wrapper = NonAutoregressiveWrapper(net, mask_id=MASK)
    assert not wrapper.has_linear_head
    assert net.linear_head() is None
    assert reason in net.head_reason
    assert f"linear_head=False ({net.head_reason})" in repr(wrapper)
    with pytest.raises(ValueError, match="expected a model with a linear head for return_embeddings=True"):
        net(tokens(), return_embeddings=True)
    torch.manual_seed(5)
    wrapper(tokens()).loss.backward()
    assert net.model.get_input_embeddings().weight.grad.abs().sum() > 0


def test_a_product_with_the_embedding_is_no_head():
    sizes = {**DEBERTA, "legacy": False}
    refused(Backbone(transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**sizes))), "aten.gelu")
    # Nothing of V rows is a linear layer, and none is named.
    model = transformers.DebertaV2ForMaskedLM(transformers.DebertaV2Config(**sizes))
    model.get_output_embeddings = lambda: None
    refused(Backbone(model), "come from no nn.Linear of one row an id")


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, as peft has it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down = nn.Linear(base_layer.in_features, 2, bias=False)
        self.up = nn.Linear(2, base_layer.out_features, bias=False)
        self.merged = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x) if self.merged else self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("later", [False, True])
def test_an_adapter_on_the_head(merged, later):
    model = build("Llama", torch.float32)
    net = Backbone(model, bidirectional=True) if later else None
    model.lm_head = Adapted(model.lm_head)
    model.lm_head.merged = merged
    net = net or Backbone(model, bidirectional=True)
    assert net.linear_head() is None
    model.lm_head.merged = False
    refused(net, "the head carries an adapter (Adapted)")


def test_another_module_in_the_heads_place():
    model = build("Llama", torch.float32)
    net = Backbone(model, bidirectional=True)
    assert net.linear_head() is not None
    model.lm_head = nn.Sequential(model.lm_head, nn.Softplus())
    refused(net, "between lm_head.0 and the logits lies the operation aten.softplus")


def test_peft(monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.setenv("FASTMASK_BACKEND", "reference")
    for targets, has_head in ((["q_proj", "v_proj"], True), (["q_proj", "lm_head"], False)):
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(build("Llama"), config)
        net = Backbone(model, bidirectional=True)
        assert NonAutoregressiveWrapper(net, mask_id=MASK).has_linear_head == has_head
        assert_same(results(net), results(by_logits("Llama", model)), 1e-9)
        assert ("carries an adapter" in net.head_reason) != has_head
        before = model(tokens()).logits
        merged = model.merge_and_unload().requires_grad_()  # peft had frozen it
        torch.testing.assert_close(merged(tokens()).logits, before, rtol=1e-9, atol=1e-9)
        net = Backbone(merged, bidirectional=True)
        assert NonAutoregressiveWrapper(net, mask_id=MASK).has_linear_head, net.head_reason
        assert_same(results(net), results(by_logits("Llama", merged)), 1e-9)
    net = Backbone(build("Llama"), bidirectional=True)
    assert net.linear_head() is not None
    peft.get_peft_model(net.model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    assert "carries an adapter" in net.head_reason
    assert net.linear_head() is None


ALTERATIONS: dict[str, tuple[Callable[[nn.Module], Any], str]] = {
    "a hook on the head": (
        lambda m: m.cls.predictions.decoder.register_forward_hook(lambda *_: None),
        "hooks on cls.",
    ),
    "a hook before a part": (lambda m: m.cls.register_forward_pre_hook(lambda *_: None), "hooks on cls,"),
    "a hook on the model": (lambda m: m.register_forward_hook(lambda *_: None), "hooks on BertForMaskedLM"),
    "a forward of its own": (lambda m: setattr(m.cls, "forward", m.cls.forward), "hooks on cls, or a forward"),
    "compiled": (lambda m: m.compile(backend="eager"), "BertForMaskedLM is compiled; compile the trunk alone"),
}


@pytest.mark.parametrize("name", ALTERATIONS)
@pytest.mark.parametrize("later", [False, True])
def test_what_may_change_the_logits_is_refused(name, later):
    alter, reason = ALTERATIONS[name]
    model = build("BERT, untied", torch.float32)
    net = Backbone(model) if later else None
    alter(model)
    with torch.compiler.set_stance("force_eager"):
        refused(net or Backbone(model), reason)


def test_hooks_on_the_trunk_change_nothing():
    model = build("BERT, tied")
    seen = []
    model.bert.register_forward_hook(lambda *_: seen.append(1))
    net = Backbone(model)
    assert net.linear_head() is not None
    seen.clear()
    net(tokens(), return_embeddings=True)
    assert seen == [1]


# ---- what may stand between the head and the logits ----


class Toy(transformers.PreTrainedModel):
    """A model that does something of its own with its head's output."""

    config_class = transformers.PretrainedConfig

    def __init__(self, finish: Callable[[Toy, torch.Tensor], torch.Tensor], *, has_bias: bool = False) -> None:
        config = transformers.PretrainedConfig()
        config.vocab_size, config.max_position_embeddings = V, N
        super().__init__(config)
        torch.manual_seed(0)
        self.embed, self.mix = nn.Embedding(V, D), nn.Linear(D, D)
        self.head = nn.Linear(D, V, bias=has_bias)
        self.bias = nn.Parameter(torch.randn(V))
        self.log_scale = nn.Parameter(torch.tensor(0.3))
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("calls", torch.tensor(0))
        self.finish = finish

    def forward(self, input_ids, attention_mask=None):
        self.calls += 1
        torch.rand(())  # as a dropout draws
        x = self.embed(input_ids)
        x = self.mix(x + x.mean(1, keepdim=True))
        return transformers.modeling_outputs.MaskedLMOutput(logits=self.finish(self, self.head(x)))


LINEAR: dict[str, Callable[[Toy, torch.Tensor], torch.Tensor]] = {
    "nothing": lambda m, z: z,
    "scale": lambda m, z: 2.5 * z,
    "two scales": lambda m, z: z * 3 / 7,
    "negative scale": lambda m, z: z / -2,
    "bias": lambda m, z: z + m.bias,
    "bias first": lambda m, z: m.bias + z,
    "biases": lambda m, z: (z + m.bias) * 0.5 + m.bias,
    "bias, then scale": lambda m, z: (z + m.bias) / 3,
    "scale, then bias": lambda m, z: z / 3 + m.bias,
    "softcap": lambda m, z: 0.7 * torch.tanh(z / 0.7),
    "softcap of another slope": lambda m, z: 0.7 * torch.tanh(z / 3),
    "bias in the softcap": lambda m, z: 0.7 * torch.tanh((2 * z + m.bias) / 3),
    "tanh": lambda m, z: torch.tanh(z),
    "divided tanh": lambda m, z: torch.tanh(z) / 5,
    "shapes": lambda m, z: z.reshape(-1, V).view(z.shape).contiguous().clone().detach()[:, :],
    "float32": lambda m, z: z.to(torch.float64).float().float() if z.dtype is torch.bfloat16 else z,
    "looked at beside": lambda m, z: (z.logsumexp(-1).sum(), z)[1],
}


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", LINEAR)
def test_laws_of_the_logits(name, has_bias):
    net = Backbone(Toy(LINEAR[name], has_bias=has_bias).double())
    head = net.linear_head()
    assert head is not None, net.head_reason
    embeddings = net(tokens(), return_embeddings=True)
    expected = F.linear(head.scale * embeddings, head.weight, head.bias)
    expected = expected if head.softcap is None else head.softcap * torch.tanh(expected / head.softcap)
    torch.testing.assert_close(net(tokens()), expected, rtol=1e-12, atol=1e-12)
    assert head.softcap in (None, 0.7, 1.0, 0.2)


def test_a_cap_by_its_own_divisor_leaves_the_scale_exactly_one():
    for cap in (0.7, 30.0, 49.0, 1e-3):
        head = Backbone(Toy(lambda m, z, c=cap: c * torch.tanh(z / c), has_bias=True)).linear_head()
        assert (head.scale, head.softcap) == (1.0, cap)


OTHERS: dict[str, tuple[Callable[[Toy, torch.Tensor], torch.Tensor], str]] = {
    "a softmax": (lambda m, z: z.log_softmax(-1), "aten._log_softmax"),
    "a shift": (lambda m, z: z - z.mean(-1, keepdim=True), "aten.sub"),
    "a number": (lambda m, z: z + 1.0, "aten.add"),
    "a learned scale": (lambda m, z: z * m.log_scale, "aten.mul"),
    "a function of one": (lambda m, z: z * m.log_scale.exp(), "aten.mul"),
    "a scale that is a buffer": (lambda m, z: z * m.scale, "aten.mul"),
    "a scale of each id": (lambda m, z: z * m.bias, "aten.mul"),
    "a bias made on the way": (lambda m, z: z + 2 * m.bias, "aten.add"),
    "a multiple of the bias": (lambda m, z: torch.add(z, m.bias, alpha=2), "aten.add"),
    "a bias outside of the tanh": (lambda m, z: torch.tanh(z) + m.bias, "aten.add"),
    "two tanh": (lambda m, z: torch.tanh(torch.tanh(z)), "aten.tanh"),
    "a negative cap": (lambda m, z: -2 * torch.tanh(z), "not above 0"),
    "zero": (lambda m, z: 0 * z, "aten.mul"),
    "infinity": (lambda m, z: z / float("inf"), "aten.div"),
    "a rounding": (lambda m, z: torch.div(z, 0.1, rounding_mode="floor"), "aten.div"),
    "a reciprocal": (lambda m, z: 1 / z, "aten.reciprocal"),
    "a square": (lambda m, z: z * z, "aten.mul"),
    "another order of ids": (lambda m, z: z.flip(-1), "aten.flip"),
    "another order of rows": (lambda m, z: z.transpose(0, 1).reshape(z.shape), "aten.transpose"),
    "fewer ids": (lambda m, z: z[..., :-1], "aten.slice"),
    "coarser numbers": (lambda m, z: z.to(torch.bfloat16), "aten._to_copy"),
    "writing": (lambda m, z: z.mul_(2.0), "are written to"),
    "writing through another view": (lambda m, z: (z.view(-1, V).mul_(2.0), z)[1], "are written to"),
    "writing through data": (lambda m, z: (z.data.mul_(2.0), z)[1], "are written to"),
    "writing through numpy": (lambda m, z: (np.negative(z.numpy(), out=z.numpy()), z)[1], "are not those of head"),
    "a look": (lambda m, z: -z if z.max() > 0 else z, "looks at the logits of head itself"),
    "dropout in training": (lambda m, z: F.dropout(z, 0.5, m.training), "in training"),
    "what training does otherwise": (lambda m, z: 2 * z if m.training else z, "in training"),
    "numpy": (lambda m, z: torch.from_numpy(2 * z.detach().numpy()), "come from no nn.Linear"),
    "the head twice": (lambda m, z: z + m.head(torch.zeros(D)), "aten.add"),
    "the head for nothing": (lambda m, z: (m.head(torch.zeros(D)), z)[1], "is not run once"),
    "no logits": (lambda m, z: None, "without logits"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_functions_are_refused(name):
    finish, reason = OTHERS[name]
    net = quiet(Toy(finish))  # of a model whose logits are all equal nobody can tell that it sees both sides
    assert net.linear_head() is None
    assert reason in net.head_reason


def test_an_inner_layer_as_wide_as_the_vocabulary_is_no_head():
    class Wide(Toy):
        def __init__(self, finish: Any) -> None:
            super().__init__(finish)
            self.mix = nn.Sequential(nn.Linear(D, V), nn.GELU(), nn.Linear(V, D))

    net = Backbone(Wide(LINEAR["scale"]))
    assert net.head_reason == "head, as a run has shown"
    assert net.linear_head().scale == 2.5


def test_a_head_that_is_no_longer_run_is_an_error():
    net = Backbone(Toy(lambda m, z: z))
    net.model.other = nn.Linear(D, V)
    net.model.head.forward, forward = net.model.other.forward, net.model.head.forward
    assert net.linear_head() is None
    net = Backbone(Toy(lambda m, z: z))
    type(net.model).forward, forward = (lambda m, input_ids: torch.zeros(*input_ids.shape, V)), Toy.forward
    try:
        with pytest.raises(RuntimeError, match="expected the model to run its head head once"):
            net(tokens(), return_embeddings=True)
    finally:
        Toy.forward = forward


# ---- traces ----


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("finish", [LINEAR["scale"], OTHERS["a look"][0]], ids=["proved", "refused"])
def test_the_trial_leaves_no_trace(finish, training):
    model = Toy(finish)
    model.train(training)
    model.mix.train(not training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    Backbone(model)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training is training
    assert model.mix.training is not training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(parameter.grad is None for parameter in model.parameters())


def test_embeddings_leave_no_trace_even_after_an_error():
    net = Backbone(build("BERT, tied"))
    decoder = net.model.cls.predictions.decoder
    with pytest.raises(IndexError):
        net(torch.full((1, 4), V + 5), return_embeddings=True)
    assert not decoder._forward_pre_hooks
    net(tokens(), return_embeddings=True)
    assert not decoder._forward_pre_hooks
    with torch.no_grad():
        assert not net(tokens(), return_embeddings=True).requires_grad


def test_no_keys_and_values_are_cached():
    net = Backbone(build("Llama"), bidirectional=True)
    made = []
    net.model.model.register_forward_hook(lambda m, a, out: made.append(getattr(out, "cache", None) is not None))
    net(tokens())
    net(tokens(), return_embeddings=True)
    assert made == [False, False]
    net(tokens(), use_cache=True)
    assert made[-1]


def test_embeddings_of_a_backbone_are_freed():
    """The hook keeps nothing of a call alive."""
    net = Backbone(build("BERT, tied"))
    gc.collect()
    before = sum(isinstance(x, torch.Tensor) for x in gc.get_objects())
    net(tokens(), return_embeddings=True)
    gc.collect()
    assert sum(isinstance(x, torch.Tensor) for x in gc.get_objects()) <= before


def test_threads_share_a_model():
    net = Backbone(build("BERT, tied")).eval()
    inputs = [torch.full((1, N), 3 + i) for i in range(4)]
    expected = [(net(ids).detach(), net(ids, return_embeddings=True).detach()) for ids in inputs]
    errors = []

    def work(i: int) -> None:
        for _ in range(20):
            ours = net(inputs[i]), net(inputs[i], return_embeddings=True)
            for one, other in zip(ours, expected[i], strict=True):
                if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-9, atol=0):
                    errors.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_a_model_without_values_is_tried_later():
    with torch.device("meta"):
        model = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    net = Backbone(model)
    assert net.linear_head() is None
    assert "meta" in net.head_reason
    net.to_empty(device="cpu")
    net.load_state_dict(Backbone(build("BERT, tied", torch.float32)).state_dict())
    model.tie_weights()
    model.bert.embeddings.position_ids = torch.arange(16)[None]
    model.bert.embeddings.token_type_ids = torch.zeros(1, 16, dtype=torch.int64)
    assert net.linear_head() is not None, net.head_reason


@pytest.mark.slow
@pytest.mark.parametrize("first", [False, True])
def test_compiled_ways_are_the_same(first):
    """Whatever was compiled first, and whichever way follows."""
    net = backbone("GPT-2", build("GPT-2", num_hidden_layers=1)).eval()
    torch.compiler.reset()
    compiled = torch.compile(net, backend="eager")
    for options in ({"return_embeddings": first}, {"return_embeddings": not first}) * 2:
        assert torch.equal(compiled(tokens(), **options), net(tokens(), **options))
    assert compiled.linear_head().weight is net.linear_head().weight


@pytest.mark.slow
def test_a_compiled_trunk_is_taken():
    model = build("Llama")
    expected = Backbone(model, bidirectional=True)(tokens(), return_embeddings=True)
    model.model.compile(backend="eager")
    net = Backbone(model, bidirectional=True)
    assert net.linear_head() is not None, net.head_reason
    assert torch.equal(net(tokens(), return_embeddings=True), expected)


def test_self_critic_and_metrics():
    net = Backbone(build("BERT, tied", torch.float32))
    model = NonAutoregressiveWrapper(net, mask_id=MASK, self_token_critic=True)
    losses, metrics = model(tokens(), with_metrics=True)
    losses.loss.backward()
    assert metrics.num_masked > 0
    assert model.token_critic.to_logits.weight.shape == (1, D)
    assert model.nelbo(tokens()).isfinite()


@pytest.fixture
def mesh(tmp_path):
    """Of one rank."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["Llama", "Granite"])
def test_a_head_split_over_ranks(name, mesh):
    """Its embeddings are taken as of any head; torch alone refuses the product of a plain tensor and a DTensor."""
    whole, split = (backbone(name, build(name)) for _ in range(2))
    head = split.model.get_output_embeddings()
    head.weight = nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
    x, losses = torch.randint(1, MASK, (B, N), generator=torch.Generator().manual_seed(1)), []
    for net in (whole, split):
        model = NonAutoregressiveWrapper(net, mask_id=MASK)
        assert model.has_linear_head
        losses.append(model(x, generator=torch.Generator().manual_seed(3)).loss)
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    expected = whole.model.get_output_embeddings().weight.grad
    torch.testing.assert_close(head.weight.grad.full_tensor(), expected)


def test_doctests():
    """CI's other steps have no transformers, so that they leave them out."""
    module = importlib.import_module("fastmask.hf.backbone")
    assert doctest.testmod(module).attempted >= 5
    assert doctest.testmod(module).failed == 0


# ---- memory ----

_MEMORY = """
import resource, torch
from transformers import BertConfig, BertForMaskedLM
from fastmask import NonAutoregressiveWrapper
from fastmask.hf import Backbone

config = BertConfig(
    vocab_size=50257, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=256,
    max_position_embeddings=1024,
)
model = NonAutoregressiveWrapper(Backbone(BertForMaskedLM(config)), mask_id=50256).eval()
model.generate(batch_size=1, seq_len=8, steps=1)
with open("/proc/self/statm") as statm:
    before = int(statm.read().split()[1]) * resource.getpagesize()
prompt = torch.zeros(64, 1024 - 64, dtype=torch.int64)
model.generate(prompt=prompt, seq_len=1024, steps=1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_memory_of_a_large_generation():
    """The network's own tensors are most of what is taken: all logits would be 12.3 GiB, those that are masked .8."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", _MEMORY], env=environment, capture_output=True, text=True, timeout=900
    )
    assert ended.returncode == 0, ended.stderr
    assert int(ended.stdout) < 300 * 2**20
