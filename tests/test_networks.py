"""Every switch of x-transformers' networks, one at a time: the short way through the head is the way by logits."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from x_transformers.x_transformers import (
    Attention,
    AttentionLayers,
    Decoder,
    Encoder,
    FeedForward,
    TransformerWrapper,
)

from fastmask import NonAutoregressiveWrapper

V, N, D, MASK, B = 13, 6, 16, 12, 4
PREFIXES = {TransformerWrapper: "", AttentionLayers: "", Attention: "attn_", FeedForward: "ff_"}


class Switch(NamedTuple):
    """An option that is on or off, as the network's or its layers' keyword."""

    of_network: bool
    name: str
    value: bool

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


# All that x-transformers has, in the other position than by default: new ones come by themselves.
SWITCHES = [
    Switch(part is TransformerWrapper, PREFIXES[part] + name, not parameter.default)
    for part in PREFIXES
    for name, parameter in inspect.signature(part.__init__).parameters.items()
    if isinstance(parameter.default, bool)
]


NOTHING: Mapping[str, Any] = {}


class Needs(NamedTuple):
    """What goes with a switch: arguments of the layers and of a call, which layers, what they can compute in."""

    layers: Mapping[str, Any] = NOTHING
    call: Mapping[str, Any] = NOTHING
    kind: type[AttentionLayers] = Encoder
    dtype: torch.dtype = torch.float64


ROWS = torch.randn(B, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
CONDITION = Needs(call={"condition": ROWS[:, 0]})
SINGLE = Needs(dtype=torch.float32)
# What a switch has no meaning without. x-transformers cannot build polar_bias_uniform_init=True beside polar_pos_emb,
# nor run attn_cope_soft_onehot_pos=True beside attn_use_cope, and has attn_flash_pack_seq=True beside attn_flash only
# with the package flash-attn: those are set alone.
NEEDS = {
    "recycling": Needs(call={"recycle_steps": 2}),
    "looped": Needs({"pre_and_post_norm": True}, call={"looped_steps": 2, "looped_pred_all_logits": False}),
    "causal": Needs(kind=Decoder),
    "cross_attend": Needs(call={"context": ROWS}),
    "only_cross": Needs({"cross_attend": True}, call={"context": ROWS}),
    "use_adaptive_layernorm": CONDITION,
    "use_adaptive_rmsnorm": CONDITION,
    "use_adaptive_layerscale": CONDITION,
    "adaptive_condition_mlp": CONDITION._replace(layers={"use_adaptive_layernorm": True}),
    "dynamic_pos_bias": SINGLE,
    "dynamic_pos_bias_log_distance": SINGLE._replace(layers={"dynamic_pos_bias": True}),
    "dynamic_pos_bias_norm": SINGLE._replace(layers={"dynamic_pos_bias": True}),
    "rotary_xpos": Needs(kind=Decoder),
    "cross_residual_attn": Needs({"cross_attend": True}, call={"context": ROWS}),
    "attn_aggregated_residuals": Needs({"attn_aggregated_residual_kwargs": {"lora_rank": 4}}),
    "gated_multi_residual": Needs({"residual_fn_kwargs": {"read_gate_rank": 4}}),
    "layer_integrate_use_softmax": Needs({"integrate_layers": True}),
    "qkv_receive_diff_residuals": Needs({"num_residual_streams": 2}),
    "learned_value_residual_mix": Needs({"add_value_residual": True}),
    "attn_gumbel_softmax_hard": Needs({"attn_gumbel_softmax": True}),
    "attn_selective": Needs(kind=Decoder),
    "attn_use_cope": Needs(kind=Decoder),
    "attn_cope_talking_heads": Needs({"attn_use_cope": True}, kind=Decoder),
    "attn_data_dependent_alibi_per_row": Needs({"attn_data_dependent_alibi": True}, kind=Decoder),
    "attn_use_latent_q": Needs({"attn_dim_latent_q": 8}),
    "attn_use_latent_kv": Needs({"attn_dim_latent_kv": 8}),
    "attn_qk_norm_dim_scale": Needs({"attn_qk_norm": True}),
    "attn_low_rank_silu_gates": Needs({"attn_gate_values": True}),
    "attn_flash_pack_seq": Needs({"rotary_pos_emb": True}),
    "ff_glu_mult_bias": Needs({"ff_glu": True}),
    "ff_glu_softclamp": Needs({"ff_glu": True}),
}
# Something lies between embeddings and logits, so that logits are asked for.
BY_LOGITS = {"squeeze_out_last_dim", "mixture_of_softmax", "sigsoftmax_logits"}
# The output is no row of logits for each token.
REFUSED = {
    "average_pool_embed": r"to return logits \[B, N, V\], received \[4, 13\]",
    "use_cls_token": r"to return logits \[B, N, V\], received \[4, 13\]",
    "attn_pool": r"to return logits \[B, N, V\], received \[4, 1, 16\]",
    "return_only_embed": r"expected logits of net.num_tokens = 13 columns .*, received 16; return logits, no embed",
}
# The layers say these of each of their parts.
OF_THE_LAYERS = {"attn_causal", "attn_learned_value_residual_mix", "attn_qkv_receive_diff_residuals"}


def build(switch: Switch, needs: Needs) -> TransformerWrapper:
    torch.manual_seed(0)
    layers = {"dim": D, "depth": 2, "heads": 2, "attn_dim_head": 8, "verbose": False, **needs.layers}
    network = {}
    (network if switch.of_network else layers)[switch.name] = switch.value
    if switch.name == "causal":
        del layers["causal"]
    net = TransformerWrapper(num_tokens=V, max_seq_len=N, attn_layers=needs.kind(**layers), **network)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():  # many begin at 0, where they say nothing
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return net.to(needs.dtype)


def wrap(net: nn.Module) -> NonAutoregressiveWrapper:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is causal")
        return NonAutoregressiveWrapper(net, mask_id=MASK, steps=2)


def results(model: NonAutoregressiveWrapper, call: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    """Loss, gradients, and what is generated."""
    torch.manual_seed(5)
    loss = model(torch.arange(B * N).view(B, N) % MASK, **call).loss
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    torch.manual_seed(6)
    return loss, gradients, model.generate(B, **call)


@pytest.mark.slow
@pytest.mark.parametrize("switch", [s for s in SWITCHES if s.name not in REFUSED.keys() | OF_THE_LAYERS], ids=str)
def test_each_switch_of_a_network_trains_and_generates_as_its_logits_say(switch, monkeypatch):
    monkeypatch.setenv("FASTMASK_BACKEND", "reference")
    needs = NEEDS.get(switch.name, Needs())
    net, by_logits = build(switch, needs), build(switch, needs)
    by_logits.register_forward_hook(lambda module, arguments, output: None)  # what is hooked gives logits
    ours, theirs = wrap(net), wrap(by_logits)
    assert ours.has_linear_head == (switch.name not in BY_LOGITS)
    assert not theirs.has_linear_head
    (loss, gradients, ids), (expected_loss, expected_gradients, expected_ids) = (
        results(model, needs.call) for model in (ours, theirs)
    )
    torch.testing.assert_close(loss, expected_loss)
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)
    assert any(gradient is not None and (gradient != 0).any() for gradient in gradients)
    assert torch.equal(ids, expected_ids)
    assert ids.max() < MASK


@pytest.mark.parametrize("switch", [s for s in SWITCHES if s.name in REFUSED], ids=str)
def test_switches_that_leave_no_logits_of_each_token_are_refused(switch):
    model = wrap(build(switch, Needs()))
    for run in (lambda: model(torch.zeros(B, N, dtype=torch.int64)), lambda: model.generate(B)):
        with pytest.raises(ValueError, match=REFUSED[switch.name]):
            run()


@pytest.mark.parametrize("switch", [s for s in SWITCHES if s.name in OF_THE_LAYERS], ids=str)
def test_switches_of_the_parts_that_the_layers_set_themselves(switch):
    with pytest.raises(TypeError, match=r"got multiple values for keyword argument"):
        build(switch, Needs())


def test_the_switches_are_found():
    assert len(SWITCHES) > 100
