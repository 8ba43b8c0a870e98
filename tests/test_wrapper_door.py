"""The training objective: arguments that are refused."""

from __future__ import annotations

import math

import pytest
import torch
from training import MASK, N, Recorder, V, build, clean, transformer

from fastmask import NonAutoregressiveWrapper


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def without(name: str) -> Recorder:
    net = Recorder()
    delattr(net, name)
    return net


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"net": without("num_tokens")}, TypeError, "expected net.num_tokens to be an int, received NoneType"),
        ({"net": without("max_seq_len")}, TypeError, "expected net.max_seq_len to be an int, received NoneType"),
        (
            {"net": without("emb_dim"), "self_cond": True},
            TypeError,
            "expected net.emb_dim to be an int, received NoneType",
        ),
        ({"mask_id": V}, ValueError, "expected mask_id of at least 0 and below 12, received 12"),
        ({"mask_id": -1}, ValueError, "expected mask_id of at least 0 and below 12, received -1"),
        ({"mask_id": None}, TypeError, "expected mask_id to be an int, received NoneType"),
        ({"steps": 0}, ValueError, "expected steps of at least 1 and below 16777216, received 0"),
        ({"steps": 2.0}, TypeError, "expected steps to be an int, received float"),
        ({"self_cond_train_prob": 1.5}, ValueError, r"expected self_cond_train_prob in \[0, 1\], received 1.5"),
        ({"no_replace_prob": -0.1}, ValueError, r"expected no_replace_prob in \[0, 1\], received -0.1"),
        ({"random_token_prob": math.nan}, ValueError, r"expected random_token_prob in \[0, 1\], received nan"),
        ({"random_token_prob": "1"}, TypeError, "expected random_token_prob to be a number, received str"),
        ({"mask_mode": "poisson"}, ValueError, "expected mask_mode to be one of 'exact', 'bernoulli'; received 'poi"),
        (
            {"schedule": "sigmoid"},
            ValueError,
            "invalid schedule 'sigmoid': expected 'linear', 'cosine' or a callable",
        ),
        ({"schedule": 0.5}, TypeError, "expected schedule to be a name or a callable, received float"),
        (
            {"token_critic": Recorder(1), "self_token_critic": True},
            ValueError,
            "expected token_critic or self_token_critic=True, received both; leave one out",
        ),
        (
            {"net": Recorder(), "self_token_critic": True},
            ValueError,
            "a network that has attn_layers.dim and return_embeddings= .*, received Recorder; give token_critic=",
        ),
    ],
)
def test_arguments_that_do_not_fit(options, error, message):
    options = {"net": Recorder(), "mask_id": MASK, **options}
    with pytest.raises(error, match=message):
        NonAutoregressiveWrapper(options.pop("net"), **options)


GOOD = torch.zeros(2, N, dtype=torch.int64)


@pytest.mark.parametrize("method", ["forward", "nelbo"])
@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        ([[0] * N], TypeError, "to be a torch.Tensor, received list"),
        (GOOD.float(), TypeError, r"of dtype int32\|int64, received float32; convert it with .*\.to\(torch.int64\)"),
        (GOOD[0], ValueError, r"with 2 dimensions, received shape \(6,\)"),
        (GOOD[:, :-1], ValueError, r"net.max_seq_len = 6, received \[2, 5\]; cut sequences to that length"),
    ],
)
def test_tokens_that_do_not_fit(method, tokens, error, message):
    wrapper = build("cpu")
    with pytest.raises(error, match=f"expected {'x' if method == 'forward' else 'tokens'} .*{message}"):
        getattr(wrapper, method)(tokens)


@pytest.mark.parametrize("method", ["forward", "nelbo"])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"maskable": GOOD}, TypeError, "expected maskable of dtype bool, received int64"),
        (
            {"maskable": GOOD[:, 1:] == 0},
            ValueError,
            r"expected maskable of shape \[B, N\] = \[2, 6\], received \[2, 5\]",
        ),
    ],
)
def test_maskable_that_does_not_fit(method, options, error, message):
    with pytest.raises(error, match=message):
        getattr(build("cpu"), method)(GOOD, **options)


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.0, TypeError)])
def test_num_samples_that_do_not_fit(value, error):
    with pytest.raises(error, match="expected num_samples"):
        build("cpu").nelbo(GOOD, num_samples=value)


@pytest.mark.parametrize(
    ("critic", "flags"),
    [("none", {}), ("own", {"only_train_generator": True})],
    ids=["no critic", "both"],
)
def test_flags_that_do_not_fit(critic, flags):
    message = "expected only_train_critic=True with a critic and without only_train_generator=True; give"
    with pytest.raises(ValueError, match=message):
        build("cpu", critic=critic)(GOOD, only_train_critic=True, **flags)


def test_a_critic_of_another_shape_is_refused():
    wrapper = build("cpu", token_critic=Recorder(outputs=2))
    message = r"token_critic\(ids .* = \[2, 6\]\) to return \[B, N, 1\] or \[B, N\], received \[2, 6, 2\]; build it"
    with pytest.raises(ValueError, match=message):
        wrapper(GOOD)
    with pytest.raises(ValueError, match=message):
        wrapper.generate(2)


def test_a_schedule_without_derivative_is_refused_where_it_is_needed():
    wrapper = build("cpu", schedule=lambda t: (1 - t).detach())
    with pytest.raises(ValueError, match="expected a differentiable schedule"):
        wrapper(GOOD)
    assert wrapper.generate(2).shape == (2, N)  # generation needs none


def test_sample_offset_that_does_not_fit():
    with pytest.raises(ValueError, match="expected sample_offset of at least 0"):
        build("cpu")(GOOD, sample_offset=-1)


@pytest.mark.parametrize(
    ("num_tokens", "error", "message"),
    [
        (0, ValueError, r"expected num_tokens in \[1, inf\), received 0"),
        (-3.0, ValueError, r"expected num_tokens in \[1, inf\), received -3"),
        ("all", TypeError, "expected num_tokens to be a number, received str"),
    ],
)
def test_num_tokens_is_checked(num_tokens, error, message, device):
    with pytest.raises(error, match=message):
        build(device)(clean(device), num_tokens=num_tokens)


def test_a_vocabulary_of_the_mask_alone_is_refused():
    net = transformer()
    net.num_tokens = 1
    with pytest.raises(ValueError, match=r"expected net\.num_tokens of at least 2, received 1"):
        NonAutoregressiveWrapper(net, mask_id=0)
