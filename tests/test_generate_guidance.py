"""Classifier-free guidance: two passes a step, and which logits, embeddings and arguments go into each."""

from __future__ import annotations

import pytest
import torch
from generating import MASK, Context, Small, V, prompts, wrap, wrap_small
from torch import nn

from fastmask import NonAutoregressiveWrapper
from fastmask.backbone import Output
from fastmask.functional import LinearLogits


class Conditioned(nn.Module):
    """Logits of all ids and of a condition [B, D], behind a linear head or not; writes down what it was given."""

    def __init__(self, length=8, softcap=None) -> None:
        super().__init__()
        self.num_tokens, self.max_seq_len, self.emb_dim = V, length, 4
        self.small, self.out = Small(length), nn.Linear(4, V)
        self.softcap, self.calls = softcap, []

    def linear_head(self):
        from fastmask import Head

        return Head(self.out.weight, self.out.bias, scale=1.5, softcap=self.softcap)

    def forward(self, ids, label=None, return_embeddings=False):
        self.calls.append((ids.clone(), label))
        x = self.small(ids, return_embeddings=True)
        x = x if label is None else x + label[:, None]
        if return_embeddings:
            return x
        logits = self.out(1.5 * x)
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


class Guided(nn.Module):
    """The same network, whose own forward combines two passes, as its users wrote it before."""

    def __init__(self, net, scale, other=None, given=None) -> None:
        super().__init__()
        self.net, self.scale, self.other, self.given = net, scale, other, given
        self.num_tokens, self.max_seq_len = net.num_tokens, net.max_seq_len

    def forward(self, ids, **arguments):
        conditional = self.net(ids, **arguments).double()
        if self.other is None:
            ids, other = ids.masked_fill(self.given, MASK), arguments
        else:
            other = self.other
        unconditional = self.net(ids, **other).double()
        return (unconditional + (1 + self.scale) * (conditional - unconditional)).float()


def generate(model, **options):
    return model.generate(generator=torch.Generator().manual_seed(0), **options)


@pytest.mark.parametrize("way", ["embeddings", "logits", "softcap"])
@pytest.mark.parametrize("scale", [0.5, 4.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"block_length": 3, "threshold": 0.6}, {"top_p": 0.9, "score": "entropy", "filter_thres": None}],
    ids=str,
)
@torch.no_grad()
def test_it_is_what_a_forward_of_ones_own_combines(way, scale, options, device):
    torch.manual_seed(0)
    net = Conditioned(softcap=3.0 if way == "softcap" else None).to(device)
    if way == "logits":
        net.linear_head = None
    given, label, outs = prompts(device), torch.randn(4, 4, device=device), []
    other = {"label": torch.zeros(4, 4, device=device)}
    for unconditional in (None, other, {}):
        model = NonAutoregressiveWrapper(net, mask_id=MASK, steps=5)
        assert model.has_linear_head == (way != "logits")
        guided = NonAutoregressiveWrapper(
            Guided(net, scale, unconditional, given["prompt_mask"]), mask_id=MASK, steps=5
        )
        expected = generate(guided, label=label, **given, **options)
        ids = generate(model, label=label, cfg_scale=scale, unconditional=unconditional, **given, **options)
        assert torch.equal(ids, expected)
        outs.append(tuple(ids.flatten().tolist()))
    assert len(set(outs)) > 1


@torch.no_grad()
def test_the_second_pass_sees_the_prompt_masked_or_its_own_arguments(device):
    net = Conditioned().to(device)
    model = NonAutoregressiveWrapper(net, mask_id=MASK, steps=3)
    given, label = prompts(device), torch.ones(4, 4, device=device)
    generate(model, **given, cfg_scale=1.0, label=label)
    assert len(net.calls) == 6
    for (seen, first), (hidden, second) in zip(net.calls[::2], net.calls[1::2], strict=True):
        assert first is second is label
        assert torch.equal(seen[given["prompt_mask"]], given["prompt"][given["prompt_mask"]])
        assert (hidden[given["prompt_mask"]] == MASK).all()
        assert torch.equal(hidden[~given["prompt_mask"]], seen[~given["prompt_mask"]])
    net.calls.clear()
    generate(model, batch_size=2, cfg_scale=1.0, label=label[:2], unconditional={"label": None})
    assert all(torch.equal(a[0], b[0]) for a, b in zip(net.calls[::2], net.calls[1::2], strict=True))
    assert [call[1] is None for call in net.calls] == [False, True] * 3


@torch.no_grad()
def test_a_scale_of_0_takes_one_pass(device):
    net = Conditioned().to(device)
    model = NonAutoregressiveWrapper(net, mask_id=MASK, steps=3)
    expected = generate(model, **prompts(device))
    net.calls.clear()
    assert torch.equal(generate(model, **prompts(device), cfg_scale=0.0), expected)
    assert len(net.calls) == 3


@pytest.mark.parametrize(
    "of_wrapper", [{"self_cond": True}, {"can_mask_prev_unmasked": True}, {"token_critic": "own"}]
)
def test_with_what_else_a_wrapper_does(of_wrapper, device):
    wrapper, given = wrap_small(device, steps=4, **of_wrapper), prompts(device)
    plain, guided = generate(wrapper, **given), generate(wrapper, **given, cfg_scale=2.0)
    assert not torch.equal(plain, guided)
    assert torch.equal(guided[given["prompt_mask"]], given["prompt"][given["prompt_mask"]])
    part = {name: value[2:] for name, value in given.items()}
    assert torch.equal(generate(wrapper, **part, cfg_scale=2.0, sample_offset=2), guided[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_logits_are_rounded_once_and_equal_infinities_stay(dtype):
    generator = torch.Generator().manual_seed(0)
    c, u = (torch.randn(6, 9, generator=generator).to(dtype) for _ in range(2))
    c[0, 0] = u[0, 0] = -torch.inf
    c[1, 1] = -torch.inf
    out = Output(c, None).guided(Output(u, None), 1.5).logits
    assert out.dtype == dtype
    exact = (2.5 * c.double() - 1.5 * u.double()).where(c != u, c.double())
    assert out[0, 0] == out[1, 1] == -torch.inf
    torch.testing.assert_close(out.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_rows_alone_are_combined_where_the_head_is_not_linear():
    rows, logits = torch.tensor([3, 0, -1]), torch.randn(2, 4, 5)
    out = Output(logits, None).to_guide(rows)
    assert torch.equal(out.logits, logits.flatten(0, 1)[[3, 0, 0]])
    capped = LinearLogits(torch.randn(2, 4, 3), torch.randn(5, 3), softcap=2.0)
    assert Output(capped, None).to_guide(rows).logits.shape == (3, 5)
    linear = Output(capped._replace(softcap=None), None)
    assert linear.to_guide(rows) is linear


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"cfg_scale": 1.0}, ValueError, "expected unconditional= or a prompt with cfg_scale=, received neither"),
        ({"unconditional": {}}, ValueError, "expected cfg_scale= with unconditional=, received None"),
        ({"cfg_scale": -1.0, "unconditional": {}}, ValueError, "expected cfg_scale"),
        ({"cfg_scale": "2", "unconditional": {}}, TypeError, "expected cfg_scale"),
        ({"cfg_scale": 1.0, "unconditional": [1]}, TypeError, "expected unconditional to be a dict.*received list"),
        ({"cfg_scale": 1.0, "unconditional": {"temperature": 1.0}}, TypeError, "give start_temperature="),
    ],
)
def test_what_is_refused(options, error, message, device):
    with pytest.raises(error, match=message):
        wrap(device, Context()).generate(2, **options)
