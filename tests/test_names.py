"""Names of arguments that networks would swallow are refused with ours; what a network knows passes."""

from __future__ import annotations

import inspect

import pytest
import torch
from generating import Known, N, V
from torch import nn
from x_transformers import Encoder, TransformerWrapper
from x_transformers.x_transformers import Attention, AttentionLayers

from fastmask import NonAutoregressiveWrapper, _names

METHODS = [getattr(NonAutoregressiveWrapper, name) for name in ("forward", "nelbo", "generate")]
LAYERS = [TransformerWrapper, AttentionLayers, Attention]
LAYER_NAMES = sorted(
    {name for layer in LAYERS for name in inspect.signature(layer.forward).parameters} - {"self", "x"}
)


def wrap(net=None) -> NonAutoregressiveWrapper:
    return NonAutoregressiveWrapper(Known(torch.zeros(V)) if net is None else net, mask_id=V - 1)


def tokens() -> torch.Tensor:
    return torch.zeros(2, N, dtype=torch.int64)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("temperature", "start_temperature="), ("num_steps", "steps="), ("num_inference_steps", "steps="),
        ("timesteps", "steps="), ("seed", r"generator=torch.Generator\(\).manual_seed\(seed\)"),
        ("cfg", "cfg_scale="), ("guidance_scale", "cfg_scale="), ("block_size", "block_length="),
        ("eos_token_id", "eos_id="), ("uncond", "unconditional="), ("num_transfer_tokens", "commits="),
        ("top_k", r"filter_thres=1 - \(k - 0.5\) / num_tokens"),
        ("max_length", "seq_len="), ("max_new_tokens", "seq_len="), ("gen_length", "seq_len="),
        ("length", "seq_len="), ("num_samples", "batch_size="), ("num_return_sequences", "batch_size="),
        ("input_ids", "prompt="), ("attention_mask", "mask="), ("eb_threshold", "entropy_bound="),
        ("remasking", "score="),
        ("alg_temp", "choice_temperature="), ("callback", "progress="), ("do_sample", "start_temperature=0"),
        ("prompt_msk", "prompt_mask="), ("start_temprature", "start_temperature="), ("promt_mask", "prompt_mask="),
        ("prompts", "prompt="), ("cuda_graphs", "cuda_graph="), ("thresold", "threshold="), ("stepss", "steps="),
    ],
)  # fmt: skip
def test_generate_refuses_them(name, ours):
    wrapper = wrap()
    message = f"expected arguments of generate or of the network, received {name}=; .*{ours}"
    with pytest.raises(TypeError, match=message):
        wrapper.generate(2, **{name: 1})
    assert wrapper.net.calls == []


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("maskabel", "maskable="), ("labels", "is_masked= and masked_ids="), ("temperature", "generator_sample"),
        ("seed", r"generator=torch.Generator\(\).manual_seed\(seed\)"), ("attention_mask", "mask="),
        ("input_ids", "x="), ("padding_mask", "maskable="), ("num_token", "num_tokens="),
    ],
)  # fmt: skip
def test_forward_refuses_them(name, ours):
    wrapper = wrap()
    with pytest.raises(TypeError, match=f"arguments of forward .*, received {name}=; .*{ours}"):
        wrapper(tokens(), **{name: 1})
    assert wrapper.net.calls == []


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("batch_size", "chunk_size="), ("mc_num", "num_samples="), ("num_sample", "num_samples="),
        ("random_seed", "seed="), ("input_ids", "tokens="), ("reductions", "reduction="), ("labels", None),
    ],
)  # fmt: skip
def test_nelbo_refuses_them(name, ours):
    """It has a seed of its own, and nothing that labels could mean."""
    wrapper = wrap()
    if ours is None:
        wrapper.nelbo(tokens(), **{name: 1})
        return
    with pytest.raises(TypeError, match=f"arguments of nelbo .*, received {name}=; give {ours}"):
        wrapper.nelbo(tokens(), **{name: 1})
    assert wrapper.net.calls == []


# ---- what passes ----


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_all_that_x_transformers_knows_passes(method):
    """Wherever it is swallowed, in a network that has no such layer too."""
    net = TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=Encoder(dim=8, depth=1, heads=1))
    assert {"mask", "context", "context_mask", "attn_mask", "mems", "sum_embeds", "pos"} <= set(LAYER_NAMES)
    for network in (net, torch.compile(net), Known(torch.zeros(V)), lambda ids, **kwargs: ids):
        _names.refuse(dict.fromkeys(LAYER_NAMES), network, method)


class Names(Known):
    def forward(self, ids, temperature=1.0, **kwargs):
        return super().forward(ids, temperature=temperature, **kwargs)


class Hands(nn.Module):
    """A network that hands everything on."""

    def __init__(self, net) -> None:
        super().__init__()
        self.net, self.num_tokens, self.max_seq_len = net, net.num_tokens, net.max_seq_len

    def forward(self, ids, **kwargs):
        return self.net(ids, **kwargs)


@pytest.mark.parametrize("outer", [lambda net: net, Hands, torch.compile], ids=["itself", "handed", "compiled"])
def test_the_networks_own_names_pass_through_wrappers(outer):
    inner = Names(torch.zeros(V))
    wrapper = wrap(outer(inner))
    _names.refuse({"temperature": 0.5}, wrapper.net, NonAutoregressiveWrapper.generate)
    with pytest.raises(TypeError, match="received num_steps="):
        wrapper.generate(2, temperature=0.5, num_steps=3)
    with pytest.raises(TypeError, match="received temperature="):
        wrap(outer(Known(torch.zeros(V)))).generate(2, temperature=0.5)
    if outer is not torch.compile:
        wrapper.generate(2, temperature=0.5)
        assert inner.calls[0]["temperature"] == 0.5


def test_the_ids_of_a_network_are_no_argument_of_it():
    class HuggingFace(Known):
        def forward(self, input_ids, **kwargs):
            return super().forward(input_ids)

    with pytest.raises(TypeError, match="received input_ids=; give prompt="):
        wrap(HuggingFace(torch.zeros(V))).generate(2, input_ids=tokens())


def test_the_table_names_what_there_is():
    """What is renamed in a signature must be renamed in the table too."""
    ours = set().union(*(inspect.signature(method).parameters for method in METHODS))
    assert set(_names._ELSEWHERE) <= ours
    assert not ours & set(_names._ABSENT)
    assert set(_names._REMEDIES) <= {word for words in _names._ELSEWHERE.values() for word in words}
