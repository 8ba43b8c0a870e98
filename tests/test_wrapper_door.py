"""The training objective: arguments that are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from training import MASK, N, Recorder, V, build, clean, transformer

from fastmask import NonAutoregressiveWrapper


def without(name: str) -> Recorder:
    net = Recorder()
    delattr(net, name)
    return net


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"net": without("num_tokens")},
            TypeError,
            "expected a network with net.num_tokens, received Recorder without; set that",
        ),
        (
            {"net": without("max_seq_len")},
            TypeError,
            "expected a network with net.max_seq_len, received Recorder without; set that",
        ),
        (
            {"net": without("emb_dim"), "self_cond": True},
            TypeError,
            "expected a network with net.emb_dim, received Recorder without; set that",
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
            "invalid schedule 'sigmoid': expected 'linear', 'cosine', a number or a callable",
        ),
        ({"schedule": None}, TypeError, "expected schedule to be a name, a number or a callable, received NoneType"),
        ({"schedule": 1.5}, ValueError, r"expected schedule, where it is a number, in \(0, 1\], received 1.5"),
        (
            {"schedule": 0.15, "use_simple_mdlm_loss_weight": True},
            ValueError,
            "expected use_simple_mdlm_loss_weight=False with a constant mask ratio, received True with schedule=0.15",
        ),
        (
            {"schedule": lambda t: 0.15 + 0 * t},
            ValueError,
            r"expected the weighted loss with a schedule that falls from 1 to 0, received one from 0.15 to 0.15, .*; "
            r"use_simple_mdlm_loss_weight=False takes the mean loss, schedule=0.15 a constant ratio",
        ),
        *(
            ({name: value}, TypeError, f"expected {name} to be True or False, received {value!r}")
            for name in (
                "self_cond",
                "can_mask_prev_unmasked",
                "self_token_critic",
                "use_simple_mdlm_loss_weight",
                "stratified_times",
                "compat",
            )
            for value in ("no", 1)
        ),
        ({"critic_loss_weight": math.nan}, ValueError, r"expected critic_loss_weight in \[0, inf\), received nan"),
        ({"critic_loss_weight": -1.0}, ValueError, r"expected critic_loss_weight in \[0, inf\), received -1"),
        ({"critic_loss_weight": "1"}, TypeError, "expected critic_loss_weight to be a number, received str"),
        (
            {"token_critic": "abc"},
            TypeError,
            r"expected token_critic to be a module or a callable on ids \[B, N\], received str; self_token",
        ),
        ({"gate": "bert"}, ValueError, "expected gate to be one of 'batch', 'token'; received 'bert'"),
        (
            {"gate": "token", "no_replace_prob": 0.6, "random_token_prob": 0.5},
            ValueError,
            r"expected no_replace_prob \+ random_token_prob of at most 1 with gate='token', received 0.6 \+ 0.5",
        ),
        (
            {"random_excludes": [V]},
            ValueError,
            "expected random_excludes ids of at least 0 and below 12, received 12",
        ),
        (
            {"random_excludes": torch.zeros(3, dtype=torch.bool)},
            ValueError,
            r"expected random_excludes of shape \[V\] = \[12\], received \[3\]",
        ),
        (
            {"random_excludes": torch.arange(3)},
            TypeError,
            r"expected random_excludes as \[V\] bool or as a sequence of ids, .*; give ids as random_excludes.tolist",
        ),
        (
            {"random_excludes": range(V - 1)},
            ValueError,
            "expected random_excludes to leave an id besides mask_id, received all; set random_token_prob=0",
        ),
        (
            {"token_critic": Recorder(1), "self_token_critic": True},
            ValueError,
            "expected token_critic or self_token_critic=True, received both; leave one out",
        ),
        (
            {"net": without("emb_dim"), "self_token_critic": True},
            ValueError,
            "a network that has emb_dim and return_embeddings= .*, received Recorder; give token_critic=",
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
        (GOOD.repeat(1, 2), ValueError, r"N from 1 to net.max_seq_len = 6, received \[2, 12\]; cut longer sequences"),
        (GOOD[:, :0], ValueError, r"N from 1 to net.max_seq_len = 6, received \[2, 0\]"),
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


def test_arguments_of_numpy_are_as_good(device):
    """Integers, and numbers, as a configuration or a random search gives them."""
    options = {
        "steps": np.int64(3),
        "no_replace_prob": np.float32(0.5),
        "random_token_prob": np.float64(0.5),
        "critic_loss_weight": np.float32(0.5),
        "schedule": np.float32(0.5),
    }
    wrapper = NonAutoregressiveWrapper(transformer(), mask_id=np.int32(MASK), self_token_critic=True, **options)
    losses = wrapper.to(device)(
        clean(device), num_tokens=np.int64(96), num_masked=np.float32(24), sample_offset=np.int64(2)
    )
    assert losses.loss.dtype == torch.float32
    wrapper = NonAutoregressiveWrapper(transformer(), mask_id=MASK).to(device)
    assert wrapper.nelbo(clean(device), num_samples=np.int64(2), chunk_size=np.int64(3), seed=np.int64(0)).isfinite()


@pytest.mark.parametrize("schedule", ["constant", "callable", "module"])
def test_nelbo_refuses_a_schedule_that_does_not_fall(schedule):
    """Whatever the training loss; and what a schedule has learned since it was accepted."""

    class Learned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.end = torch.nn.Parameter(torch.zeros(()))

        def forward(self, t):
            return 1 - (1 - self.end) * t

    learned = Learned()
    wrapper = {
        "constant": lambda: build("cpu", schedule=0.15),
        "callable": lambda: build("cpu", schedule=lambda t: 1 - t / 2, use_simple_mdlm_loss_weight=False),
        "module": lambda: build("cpu", schedule=learned),
    }[schedule]()
    with torch.no_grad():
        learned.end.fill_(0.1)
    with pytest.raises(ValueError, match=r"expected nelbo with a schedule that falls from 1 to 0, .*; NonAutoreg"):
        wrapper.nelbo(GOOD)


def test_compat_takes_any_schedule():
    assert build("cpu", compat=True, schedule=lambda t: 1 - t / 2)(GOOD).loss.isfinite()


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


@pytest.mark.parametrize("name", ["num_tokens", "num_masked"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, r"in \[1, inf\), received 0"),
        (torch.ones(2), ValueError, r"to be a number or a tensor of one element, received \[2\]"),
        (torch.ones(1, dtype=torch.bool), TypeError, "of dtype int32.*, received bool"),
        ([32], TypeError, "to be a number, received list"),
    ],
)
def test_counts_of_the_whole_batch_are_checked(name, value, error, message):
    with pytest.raises(error, match=f"expected {name} .*{message}"):
        build("cpu", use_simple_mdlm_loss_weight=False)(GOOD, **{name: value})


NONE_MASKED = GOOD > 0


@pytest.mark.parametrize(
    ("weighted", "options", "error", "message"),
    [
        (
            True,
            {"num_masked": 3},
            ValueError,
            "expected num_masked= with the mean loss, .* by num_tokens=; give that",
        ),
        (
            True,
            {"is_masked": NONE_MASKED},
            ValueError,
            "expected is_masked with the mean loss, .*use_simple_mdlm_loss",
        ),
        (False, {"masked_ids": GOOD}, ValueError, "expected masked_ids with is_masked, received it alone"),
        (False, {"is_masked": GOOD}, TypeError, "expected is_masked of dtype bool, received int64"),
        (
            False,
            {"is_masked": NONE_MASKED[:, 1:]},
            ValueError,
            r"expected is_masked of shape \[B, N\] = \[2, 6\], received \[2, 5\]",
        ),
        (
            False,
            {"is_masked": NONE_MASKED, "masked_ids": GOOD[:1]},
            ValueError,
            r"expected masked_ids of shape \[B, N\] = \[2, 6\], received \[1, 6\]",
        ),
        (
            False,
            {"is_masked": NONE_MASKED, "masked_ids": GOOD.float()},
            TypeError,
            "expected masked_ids of dtype int32.int64, received float32",
        ),
        (
            False,
            {"is_masked": NONE_MASKED, "maskable": NONE_MASKED},
            ValueError,
            "expected is_masked alone, received it with maskable; leave that out, and False in is_masked",
        ),
        (
            False,
            {"is_masked": NONE_MASKED, "complement": True},
            ValueError,
            "expected is_masked alone, received it with complement=True",
        ),
        *(
            (False, {name: 1}, TypeError, f"expected {name} to be True or False, received 1")
            for name in ("only_train_generator", "only_train_critic", "complement", "with_metrics")
        ),
        (
            False,
            {"generator_sample_temperature": math.nan},
            ValueError,
            r"expected generator_sample_temperature in \[0, inf\), received nan",
        ),
    ],
)
def test_options_of_a_step_that_do_not_fit(weighted, options, error, message):
    with pytest.raises(error, match=message):
        build("cpu", use_simple_mdlm_loss_weight=weighted)(GOOD, **options)


def test_a_vocabulary_of_the_mask_alone_is_refused():
    net = transformer()
    net.num_tokens = 1
    with pytest.raises(ValueError, match=r"expected net\.num_tokens of at least 2, received 1"):
        NonAutoregressiveWrapper(net, mask_id=0)
