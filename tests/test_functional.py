"""The public doors: what they refuse and say."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from calls import (
    EMBEDDINGS,
    FIGURES,
    LOGITS,
    MASKED,
    META,
    TARGETS,
    TOKENS,
    WEIGHT,
    B,
    D,
    N,
    V,
    confidence,
    critic,
    dense,
    in_place,
    linear,
    linear_sample,
    linear_step,
    mask,
    remask,
    sample,
    select,
    step,
)

import fastmask
from fastmask import _check, functional


def refused(error, message, function, *arguments, **options):
    """A case: the call, and what it must raise, in so many words."""
    return pytest.param(error, message, function, arguments, options, id=f"{function.__name__}: {message[:60]}")


def test_the_cases_are_accepted_as_they_stand():
    """Otherwise the refusals below could have another cause than the one they name."""
    for function in (mask, dense, linear, sample, linear_sample, confidence, critic, select, remask, step,
                     linear_step, in_place):  # fmt: skip
        function()
    step(counts=None, threshold=0.5)
    step(counts=torch.tensor([1, 2], dtype=torch.int32))


# The checks that several functions share, in the words of each.
SEED_CASES = [
    (TypeError, "expected seed to be an int, received str", {"seed": "7"}),
    (TypeError, "expected seed to be an int, received float", {"seed": 1.0}),
    (TypeError, "expected seed to be an int, received bool", {"seed": True}),
    (ValueError, f"expected seed of at least {-(2**63)} and below {2**64}, received {2**64}", {"seed": 2**64}),
    (ValueError, f"expected seed of at least {-(2**63)} and below", {"seed": -(2**63) - 1}),
    (TypeError, "expected seed of dtype int64, received int32; convert it with seed.to(torch.int64)",
     {"seed": torch.tensor(1, dtype=torch.int32)}),
    (ValueError, "expected seed with 0 dimensions, received shape (1,)", {"seed": torch.tensor([1])}),
    (ValueError, "expected sample_offset of at least 0 and below 4294967296, received -1", {"sample_offset": -1}),
    (ValueError, "expected sample_offset of at least 0 and below", {"sample_offset": 2**32}),
]  # fmt: skip
STEP_CASES = [
    (ValueError, "expected step of at least 0 and below 16777216, received 16777216", {"step": 2**24}),
    (TypeError, "expected step to be an int, received float", {"step": 1.0}),
]
SOFTCAP_CASES = [
    (TypeError, "expected softcap to be a number, received Tensor", {"softcap": torch.tensor(30.0)}),
    (ValueError, "expected softcap to be a number that a float can hold", {"softcap": 10**400}),
    (ValueError, "expected softcap in [0, inf), received -1", {"softcap": -1.0}),
    (ValueError, "expected softcap in [0, inf), received inf", {"softcap": math.inf}),
    (ValueError, "expected softcap above 0, received 0; leave it out", {"softcap": 0.0}),
]
LINEAR_LOGITS_CASES = [
    *SOFTCAP_CASES,
    (TypeError, "expected scale to be a number, received Tensor", {"scale": torch.tensor(0.5)}),
    (TypeError, "expected scale to be a number, received NoneType", {"scale": None}),
    (ValueError, "expected scale in (-inf, inf), received inf", {"scale": math.inf}),
    (ValueError, "expected scale in (-inf, inf), received -inf", {"scale": -math.inf}),
    (ValueError, "expected scale in (-inf, inf), received nan", {"scale": math.nan}),
]
LOSS_CASES = [
    (TypeError, "expected targets of dtype int32|int64, received float32; convert it with targets.to(torch.int64)",
     {"targets": TARGETS.float()}),
    (TypeError, "expected targets to be a torch.Tensor, received list", {"targets": [1, 2]}),
    (ValueError, "expected targets of shape [...] = [2, 4], received [8]", {"targets": TARGETS.flatten()}),
    (TypeError, "expected is_masked of dtype bool, received int64", {"is_masked": TARGETS}),
    (ValueError, "expected is_masked of shape [...] = [2, 4], received [2]", {"is_masked": MASKED[:, 0]}),
    (ValueError, "expected reduction to be one of 'none', 'sum', 'mean'; received 'average'",
     {"reduction": "average"}),
    (ValueError, "expected denominator with reduction='mean', received reduction='sum'",
     {"reduction": "sum", "denominator": 3.0}),
    (ValueError, "expected denominator to be one number, received shape [2]", {"denominator": torch.ones(2)}),
    (ValueError, "expected denominator without gradient, received requires_grad=True; use denominator.detach()",
     {"denominator": torch.ones((), requires_grad=True)}),
    (TypeError, "expected denominator to be a number, received str", {"denominator": "8"}),
    (TypeError, "expected denominator to be a number, received list", {"denominator": [8]}),
    (TypeError, "received bool; convert it with denominator.to(torch.float64)", {"denominator": torch.tensor(True)}),
    (TypeError, "expected denominator of dtype int32|int64|float16|bfloat16|float32|float64, received complex64",
     {"denominator": torch.tensor(8j)}),
    (ValueError, "expected denominator to be a number that a float can hold", {"denominator": 10**400}),
    (ValueError, f"expected denominator in [0, inf), received {-(2.0**64)}", {"denominator": -(2**64)}),
    (ValueError, "expected denominator in [0, inf), received -1", {"denominator": -1}),
    (ValueError, "expected denominator in [0, inf), received nan", {"denominator": math.nan}),
    (TypeError, "expected weights of dtype float64|float32, received bfloat16",
     {"weights": torch.ones(B, N).bfloat16()}),
    (TypeError, "expected weights of dtype float64|float32, received int64", {"weights": TARGETS}),
    (ValueError, "expected weights without gradient, received requires_grad=True; use weights.detach()",
     {"weights": torch.ones(B, requires_grad=True)}),
    (ValueError, "expected weights of the targets' shape [2, 4], or [B] for targets [B, N]; received [4]",
     {"weights": torch.ones(N)}),
    (ValueError, "expected weights of the targets' shape [2, 4], or [B] for targets [B, N]; received [2, 1]",
     {"weights": torch.ones(B, 1)}),
    (ValueError, "expected label_smoothing in [0, 1], received 1.5", {"label_smoothing": 1.5}),
    (ValueError, "expected label_smoothing in [0, 1], received nan", {"label_smoothing": math.nan}),
    (TypeError, "expected label_smoothing to be a number, received NoneType", {"label_smoothing": None}),
    (ValueError, "expected z_loss in [0, inf), received -0.1", {"z_loss": -0.1}),
    (ValueError, "expected z_loss in [0, inf), received inf", {"z_loss": math.inf}),
    (TypeError, "expected z_loss to be a number, received bool", {"z_loss": True}),
    (TypeError, "expected softcap to be a number, received str", {"softcap": "30"}),
    (TypeError, "expected with_correct to be True or False, received 1 of type int", {"with_correct": 1}),
    (TypeError, "expected check to be True or False, received 'no' of type str", {"check": "no"}),
    (TypeError, "expected ignore_index to be an int, received float", {"ignore_index": -100.0}),
    (TypeError, "expected ignore_index to be an int, received Tensor", {"ignore_index": torch.tensor(-100)}),
    (ValueError, f"expected ignore_index of at least {-(2**31)} and below {2**31}, received {2**31}",
     {"ignore_index": 2**31}),
    *SOFTCAP_CASES,
    (ValueError, "expected exclude_id of at least 0 and below 6, received 6", {"exclude_id": V}),
    (ValueError, "expected exclude_id of at least 0 and below 6, received -1", {"exclude_id": -1}),
    (TypeError, "expected exclude_id to be an int, received float", {"exclude_id": 1.0}),
    (ValueError, "expected targets in [0, 6), received 6 at [0, 1] and 1 more; clean the data",
     {"targets": torch.tensor([[0, 6, 1, 2], [3, 4, -1, 0]]), "check": True}),
    (ValueError, "expected targets in [0, 6) other than 2, received 2 at [0, 2] and 0 more",
     {"targets": torch.tensor([[0, 5, 2, 5], [3, 4, 3, 0]]), "exclude_id": 2, "check": True}),
]  # fmt: skip
FORBIDDEN_CASES = [
    (TypeError, "expected mask_id to be an int, received bool", {"mask_id": True}),
    (TypeError, "expected mask_id to be an int, received float", {"mask_id": 2.0}),
    (TypeError, "expected forbidden as [V] bool or as a sequence of ids, received a tensor of torch.int64; give ids "
     "as forbidden.tolist()", {"forbidden": torch.tensor([1, 2])}),
    (ValueError, "expected forbidden of shape [V] = [6], received [4]", {"forbidden": MASKED[0]}),
    (ValueError, "expected forbidden of shape [V] = [6], received [1, 6]", {"forbidden": torch.zeros(1, V).bool()}),
    (ValueError, "expected forbidden on cpu, received meta; move it with .to(device)",
     {"forbidden": torch.zeros(V, device=META).bool()}),
    (ValueError, "expected forbidden ids of at least 0 and below 6, received 6", {"forbidden": [1, V]}),
    (ValueError, "expected forbidden ids of at least 0 and below 6, received -1", {"forbidden": [-1]}),
    (TypeError, "expected forbidden ids to be an int, received float", {"forbidden": [1.0]}),
    (TypeError, "expected forbidden ids to be an int, received bool", {"forbidden": [True] * V}),
    (TypeError, "expected forbidden as [V] bool or as a sequence of ids, received int", {"forbidden": 3}),
    (TypeError, "expected forbidden as [V] bool or as a sequence of ids, received str", {"forbidden": "3"}),
]  # fmt: skip
OUT = functional.Sampled(TOKENS, FIGURES)
OUT_CASES = [
    (ValueError, "expected out.margins with with_margin=True, received one of them; give or leave both",
     {"out": OUT, "with_margin": True}),
    (ValueError, "expected out.entropies with with_entropy=True, received one of them",
     {"out": OUT, "with_entropy": True}),
    (ValueError, "expected out.margins with with_margin=True, received one of them",
     {"out": OUT._replace(margins=torch.zeros(B, N))}),
    (ValueError, "expected out.margins of shape [B, N] = [2, 4], received [2]",
     {"out": OUT._replace(margins=torch.zeros(B)), "with_margin": True}),
    (TypeError, "expected out.ids of dtype int64, received int32", {"out": OUT._replace(ids=TOKENS.int())}),
    (ValueError, "expected out.ids with 2 dimensions, received shape (8,)",
     {"out": OUT._replace(ids=TOKENS.flatten())}),
    (TypeError, "expected out.log_probs of dtype float32, received bfloat16",
     {"out": OUT._replace(log_probs=FIGURES.bfloat16())}),
    (ValueError, "expected out.log_probs of shape [B, N] = [2, 4], received [4]",
     {"out": OUT._replace(log_probs=FIGURES[0])}),
    (ValueError, "expected out.ids of shape [B, N] = [2, 4], received [2, 3]",
     {"out": functional.Sampled(torch.zeros(B, 3).long(), torch.zeros(B, 3))}),
    (ValueError, "expected out.ids to be contiguous, received strides [1, 2]",
     {"out": functional.Sampled(torch.zeros(N, B).long().T, torch.zeros(B, N))}),
    (ValueError, "expected out.log_probs to be contiguous, received strides [1, 2]",
     {"out": functional.Sampled(torch.zeros(B, N).long(), torch.zeros(N, B).T)}),
    (ValueError, "out.ids on meta, out.log_probs on cpu",
     {"out": functional.Sampled(torch.zeros(B, N, device=META).long(), torch.zeros(B, N))}),
]  # fmt: skip
COUNTS_CASES = [
    (TypeError, "expected counts of dtype int32|int64, received float32", {"counts": torch.ones(B)}),
    (ValueError, "received [3]", {"counts": torch.ones(3).long()}),
    (ValueError, "received []", {"counts": torch.tensor(1)}),
    (ValueError, "expected counts of at least 0 and below 9223372036854775808, received -1", {"counts": -1}),
    (TypeError, "expected counts to be an int, received float", {"counts": 1.0}),
    (TypeError, "expected counts to be an int, received list", {"counts": [1, 2]}),
    (TypeError, "expected counts to be an int, received bool", {"counts": True}),
]
REMASK_CASES = [
    (TypeError, "expected values of dtype float16|bfloat16|float32|float64, received int64", {"values": TOKENS}),
    (ValueError, "expected values with 2 dimensions, received shape (2, 4, 6)", {"values": LOGITS}),
    (TypeError, "expected ids of dtype int64, received int32", {"ids": TOKENS.int()}),
    (ValueError, "expected ids of shape [B, N] = [2, 4], received [8]", {"ids": TOKENS.flatten()}),
    (ValueError, "expected ids to be contiguous, received strides [1, 2]", {"ids": torch.zeros(N, B).long().T}),
    (TypeError, "expected is_masked of dtype bool, received int64", {"is_masked": TOKENS}),
    (ValueError, "expected is_masked of shape [B, N] = [2, 4], received [2, 3]",
     {"is_masked": torch.ones(B, 3).bool()}),
    (ValueError, "expected is_masked to be contiguous, received strides [1, 2]",
     {"is_masked": torch.ones(N, B).bool().T}),
    (TypeError, "expected row_indices of dtype int64, received int32", {"row_indices": torch.zeros(8).int()}),
    (ValueError, "expected row_indices to be contiguous, received strides [2]",
     {"row_indices": torch.zeros(16).long()[::2]}),
    (TypeError, "expected row_starts of dtype int64, received int32", {"row_starts": torch.zeros(3).int()}),
    (ValueError, "expected row_starts of shape [B + 1] = [3], received [2]", {"row_starts": torch.zeros(2).long()}),
    (TypeError, "expected eligible of dtype bool, received int64", {"eligible": TOKENS}),
    (ValueError, "expected eligible of shape [B, N] = [2, 4], received [4]", {"eligible": MASKED[0]}),
    (ValueError, "expected noise_scale in (-inf, inf), received inf", {"noise_scale": math.inf}),
    (ValueError, "expected noise_scale in (-inf, inf), received -inf", {"noise_scale": -math.inf}),
    (ValueError, "expected counts or commits, received both; leave one out", {"commits": 1}),
    (ValueError, "expected eligible or commits, received both", {"commits": 1, "counts": None, "eligible": MASKED}),
    (ValueError, "expected eligible or factor, received both", {"factor": 1.0, "eligible": MASKED}),
    (ValueError, "expected counts, commits or a rule, received none", {"counts": None}),
    (ValueError, "expected is_confidence=True with factor, received False", {"factor": 1.0, "is_confidence": False}),
    (ValueError, "expected is_confidence=False with entropy_bound, received True", {"entropy_bound": 1.0}),
    (ValueError, "expected no noise with factor, whose order is by the values", {"factor": 1.0, "noise_scale": 0.5}),
    (ValueError, "expected factor or min_remask_key, received both", {"factor": 1.0, "min_remask_key": 0.5}),
    (TypeError, "expected block of dtype int64, received int32", {"block": torch.zeros(B, 2).int()}),
    (ValueError, "expected next_block of shape [B, 2] = [2, 2], received [2]", {"next_block": torch.zeros(2).long()}),
    (ValueError, "block on meta", {"block": torch.zeros(B, 2, device=META).long()}),
    (ValueError, "expected all tensors on one device, received ids on cpu, is_masked on cpu, row_indices on cpu, "
     "row_starts on cpu, values on cpu, counts on cpu, eligible on meta", {"eligible": MASKED.to(META)}),
    (ValueError, "row_starts on meta", {"row_starts": torch.zeros(3, device=META).long()}),
]  # fmt: skip
DEMASK_CASES = [
    (ValueError, "expected counts, commits or a rule, received none; say how many positions stay masked",
     {"counts": None}),
    (ValueError, "expected threshold in [0, 1], received 1.1", {"threshold": 1.1}),
    (ValueError, "expected threshold in [0, 1], received nan", {"threshold": math.nan, "counts": None}),
    (TypeError, "expected threshold to be a number, received Tensor", {"threshold": torch.tensor(0.5)}),
    (ValueError, "expected choice_temperature in [0, inf), received -1", {"choice_temperature": -1}),
    (TypeError, "expected ids of dtype int64, received int32", {"ids": TOKENS.int()}),
    (ValueError, "expected ids with 2 dimensions, received shape (8,)", {"ids": TOKENS.flatten()}),
    (TypeError, "expected is_masked of dtype bool, received int64", {"is_masked": TOKENS}),
    (ValueError, "expected is_masked of shape [B, N] = [2, 4], received [4]", {"is_masked": MASKED[0]}),
    (ValueError, "expected logits of shape [B, N, V] = [2, 4, 6], received [1, 4, 6]", {"logits": LOGITS[:1]}),
    (ValueError, "expected compact logits [M, ...] with row_indices [M] and seq_len, received [4, 6], [8]",
     {"logits": LOGITS[0]}),
    (ValueError, "received logits on meta, ids on cpu, is_masked on cpu", {"logits": LOGITS.to(META)}),
    (ValueError, "expected max_masked of at least 0 and below 5, received 5", {"max_masked": N + 1}),
    (ValueError, "expected max_masked of at least 0 and below 5, received -1", {"max_masked": -1}),
    (TypeError, "expected max_masked to be an int, received float", {"max_masked": 2.0}),
]  # fmt: skip
SAMPLER_CASES = [
    (ValueError, "expected temperature in [0, inf), received -0.5", {"temperature": -0.5}),
    (ValueError, "expected temperature in [0, inf), received inf", {"temperature": math.inf}),
    (ValueError, "expected temperature in [0, inf), received nan", {"temperature": math.nan}),
    (ValueError, "expected temperature with 1 dimensions, received shape ()", {"temperature": torch.tensor(1.0)}),
    (ValueError, "expected top_k of at least 1, received 0", {"top_k": 0}),
    (ValueError, "expected top_k of at least 1, received -1", {"top_k": -1}),
    (TypeError, "expected top_k to be an int, received float", {"top_k": 0.5}),
    (TypeError, "expected top_k to be an int, received bool", {"top_k": True}),
    (ValueError, "expected top_p in [0, 1], received 1.5", {"top_p": 1.5}),
    (ValueError, "expected top_p in [0, 1], received -0.1", {"top_p": -0.1}),
    (ValueError, "expected top_p in [0, 1], received nan", {"top_p": math.nan}),
    (TypeError, "expected top_p to be a number, received str", {"top_p": "0.9"}),
    *FORBIDDEN_CASES,
    (TypeError, "expected row_indices of dtype int64, received int32", {"row_indices": torch.zeros(B).int()}),
    (TypeError, "expected kept_ids of dtype int64, received int32", {"kept_ids": TOKENS.int()}),
    (ValueError, "expected kept_ids of shape [as the rows] = [2, 4], received [8]", {"kept_ids": TOKENS.flatten()}),
]
HEAD_CASES = [
    (TypeError, "expected embeddings of dtype float16|bfloat16|float32|float64, received int64", [TOKENS], {}),
    (TypeError, "expected weight to be a torch.Tensor, received NoneType", [EMBEDDINGS, None], {}),
    (TypeError, "expected weight of dtype float16|bfloat16|float32|float64", [EMBEDDINGS, WEIGHT.long()], {}),
    (ValueError, "expected weight with 2 dimensions, received shape (6, 3, 1)", [EMBEDDINGS, WEIGHT[..., None]], {}),
    (ValueError, "expected embeddings [..., D] and weight [V, D] of one D, received [2, 4, 3] and [3, 6]",
     [EMBEDDINGS, WEIGHT.mT], {}),
    (ValueError, "of one D, received [3] and [6, 3]", [EMBEDDINGS[0, 0]], {}),
    (ValueError, "of one D, received [] and [6, 3]", [EMBEDDINGS[0, 0, 0]], {}),
    (ValueError, "expected weight [V, D] with V of at least 1, received V = 0", [EMBEDDINGS, WEIGHT[:0]], {}),
    (TypeError, "expected bias of dtype float32, received float64", [], {"bias": torch.zeros(V).double()}),
    (ValueError, "expected bias of shape [V] = [6], received [3]", [], {"bias": torch.zeros(D)}),
    (TypeError, "expected embeddings and weight of one dtype, received torch.bfloat16 and torch.float32; "
     "convert one, or use torch.autocast", [EMBEDDINGS.bfloat16()], {}),
    (ValueError, "received embeddings on cpu, weight on meta", [EMBEDDINGS, WEIGHT.to(META)], {}),
    (ValueError, "weight on cpu, bias on meta", [], {"bias": torch.zeros(V, device=META)}),
]  # fmt: skip
EXCLUDES_CASES = [
    (TypeError, "expected random_excludes as [V] bool or as a sequence of ids, received a tensor of torch.int64; "
     "give ids as random_excludes.tolist()", torch.arange(V)),
    (ValueError, "expected random_excludes of shape [V] = [6], received [5]", torch.zeros(V - 1, dtype=torch.bool)),
    (ValueError, "expected random_excludes on cpu, received meta; move it with .to(device)",
     torch.zeros(V, dtype=torch.bool, device=META)),
    (TypeError, "or as a sequence of ids, received int", 3),
    (TypeError, "or as a sequence of ids, received str", "3"),
    (ValueError, "expected random_excludes ids of at least 0 and below 6, received 6", [0, V]),
    (TypeError, "expected random_excludes ids to be an int, received bool", [True]),
    (ValueError, "expected random_excludes to leave an id besides mask_id, received all; set random_token_prob=0",
     range(V - 1)),
]  # fmt: skip

CASES = [
    refused(TypeError, "expected tokens to be a torch.Tensor, received list", mask, [[1, 2]]),
    refused(TypeError, "expected tokens of dtype int32|int64, received float32", mask, TOKENS.float()),
    refused(TypeError, "expected tokens of dtype int32|int64, received int16", mask, TOKENS.short()),
    refused(ValueError, "expected tokens with 2 dimensions, received shape (8,)", mask, TOKENS.flatten()),
    refused(ValueError, "expected tokens [B, N] with N of at least 1, received N = 0", mask, TOKENS[:, :0]),
    refused(ValueError, "expected num_tokens of at least 1 and below 2147483648, received 0", mask, num_tokens=0),
    refused(TypeError, "expected num_tokens to be an int, received float", mask, num_tokens=6.0),
    refused(ValueError, "expected mask_id of at least 0 and below 2147483648, received -1", mask, mask_id=-1),
    refused(TypeError, "expected mask_id to be an int, received NoneType", mask, mask_id=None),
    refused(ValueError, "expected mode to be one of 'exact', 'bernoulli'; received 'random'", mask, mode="random"),
    refused(ValueError, "expected no_replace_prob in [0, 1], received 1.1", mask, no_replace_prob=1.1),
    refused(ValueError, "expected random_token_prob in [0, 1], received -0.1", mask, random_token_prob=-0.1),
    refused(ValueError, "expected gate to be one of 'batch', 'token'; received 'row'", mask, gate="row"),
    refused(ValueError, "expected no_replace_prob + random_token_prob of at most 1 with gate='token', received "
            "0.6 + 0.5; BERT's are 0.1 and 0.1", mask, gate="token", no_replace_prob=0.6, random_token_prob=0.5),
    *(refused(TypeError, f"expected {flag} to be True or False, received 1 of type int", mask, **{flag: 1})
      for flag in ("stratified", "random_may_be_mask", "complement", "check")),
    *(refused(*case[:2], mask, random_token_prob=0.1, random_excludes=case[2]) for case in EXCLUDES_CASES),
    refused(ValueError, "expected global_batch_size of at least 1 and below 4294967296, received 0", mask,
            global_batch_size=0),
    refused(ValueError, "expected an id besides mask_id 0 to draw random tokens from, received num_tokens 1; "
            "set random_token_prob=0", mask, mask_id=0, num_tokens=1, random_token_prob=0.1),
    refused(TypeError, "expected times of dtype float32, received float64", mask, times=torch.zeros(B).double()),
    refused(ValueError, "expected times of shape [B] = [2], received [4]", mask, times=torch.zeros(N)),
    refused(ValueError, "expected counts with mode='exact', received mode='bernoulli'; leave counts out", mask,
            counts=torch.ones(B).long(), mode="bernoulli"),
    refused(TypeError, "expected counts of dtype int32|int64, received float32", mask, counts=torch.ones(B)),
    refused(ValueError, "expected counts of shape [B] = [2], received []", mask, counts=torch.tensor(1)),
    refused(TypeError, "expected maskable of dtype bool, received int64", mask, maskable=TOKENS),
    refused(ValueError, "expected maskable of shape [B, N] = [2, 4], received [4]", mask, maskable=MASKED[0]),
    refused(ValueError, "expected all tensors on one device, received tokens on cpu, maskable on meta; move them "
            "with .to(device)", mask, maskable=MASKED.to(META)),
    refused(ValueError, "expected tokens in [0, 6) other than 5, received 5 at [1, 0] and 0 more", mask,
            torch.tensor([[0, 1, 2, 3], [5, 4, 3, 2]]), check=True),
    refused(ValueError, "received 6 at [0, 3] and 2 more", mask,
            torch.tensor([[0, 1, 2, 6], [-1, 4, 3, 99]]), check=True),
    refused(ValueError, "expected schedule(t) to be a tensor of t's shape [2], received []", mask,
            schedule=fastmask.Schedule(lambda t: t.sum(), lambda t: -torch.ones_like(t))),
    refused(ValueError, "expected the schedule's derivative to be a tensor of t's shape [2], received float", mask,
            schedule=fastmask.Schedule(lambda t: 1 - t, lambda t: -1.0)),
    *(refused(error, message, mask, **options) for error, message, options in SEED_CASES),
    *(refused(*case[:2], function, **case[2]) for function in (dense, linear) for case in LOSS_CASES),
    refused(TypeError, "expected logits of dtype float16|bfloat16|float32|float64, received int64", dense, TOKENS),
    refused(ValueError, "expected logits of shape [..., V] with V of at least 1, received [6]", dense, LOGITS[0, 0]),
    refused(ValueError, "with V of at least 1, received [2, 4, 0]", dense, LOGITS[..., :0]),
    refused(ValueError, "expected a column besides exclude_id, received logits with V = 1", dense, LOGITS[..., :1],
            exclude_id=0),
    refused(TypeError, "expected inplace_grad to be True or False, received 1 of type int", dense, inplace_grad=1),
    refused(ValueError, "received logits on cpu, targets on meta, is_masked on cpu", dense,
            targets=TARGETS.to(META)),
    refused(ValueError, "is_masked on cpu, weights on meta", dense, weights=torch.ones(B).to(META)),
    *(refused(*case[:2], function, *case[2], **case[3]) for function in (linear, linear_sample, linear_step)
      for case in HEAD_CASES),
    refused(ValueError, "embeddings on cpu, weight on cpu, targets on meta", linear, targets=TARGETS.to(META)),
    refused(ValueError, "targets on cpu, is_masked on meta", linear, is_masked=MASKED.to(META)),
    refused(ValueError, "is_masked on cpu, weights on meta", linear, weights=torch.ones(B).to(META)),
    refused(ValueError, "targets on cpu, row_indices on meta", linear, is_masked=None,
            row_indices=torch.zeros(1, device=META).long()),
    refused(ValueError, "expected a column besides exclude_id", linear, EMBEDDINGS, WEIGHT[:1], exclude_id=0),
    *(refused(*case[:2], function, **case[2])
      for function in (sample, linear_sample) for case in SEED_CASES + STEP_CASES + SAMPLER_CASES),
    refused(TypeError, "expected logits of dtype float16|bfloat16|float32|float64, received int64", sample, TOKENS),
    refused(ValueError, "expected logits [B, N, ...], received shape [4, 6]; compact rows need row_indices= and "
            "seq_len=", sample, LOGITS[0]),
    refused(ValueError, "expected logits [B, N, ...], received shape []", sample, LOGITS[0, 0, 0]),
    refused(ValueError, "expected seq_len of at least 0 and below 2147483648, received -1", sample, LOGITS[0],
            row_indices=TOKENS[0], seq_len=-1),
    refused(TypeError, "expected seq_len to be an int, received float", sample, LOGITS[0], row_indices=TOKENS[0],
            seq_len=4.0),
    refused(ValueError, "expected a vocabulary of at least 1 id, received 0", sample, LOGITS[..., :0]),
    refused(ValueError, "expected compact logits [M, ...] with row_indices [M] and seq_len, received [4, 6], [4] "
            "and seq_len=None", sample, LOGITS[0], row_indices=TOKENS[0]),
    refused(ValueError, "received [4, 6], [2] and seq_len=4", sample, LOGITS[0], row_indices=TOKENS[0, :2],
            seq_len=4),
    refused(ValueError, "expected logits [B, N, ...], received shape [2, 4, 6] and seq_len=5", sample,
            row_indices=TOKENS[0, :2], seq_len=5),
    refused(ValueError, "received logits on cpu, row_indices on meta", sample, LOGITS[0],
            row_indices=TOKENS[0].to(META), seq_len=4),
    refused(ValueError, "received logits on cpu, kept_ids on meta", sample, kept_ids=TOKENS.to(META)),
    refused(ValueError, "expected embeddings [B, N, ...], received shape [4, 3]", linear_sample, EMBEDDINGS[0]),
    refused(ValueError, "expected compact embeddings [M, ...] with row_indices [M] and seq_len", linear_sample,
            EMBEDDINGS[0], row_indices=TOKENS[0]),
    *(refused(*case[:2], function, **case[2]) for function in (sample, linear_sample) for case in OUT_CASES),
    *(refused(*case[:2], function, **case[2]) for function in (select, remask, step) for case in COUNTS_CASES),
    *(refused(*case[:2], remask, **case[2]) for case in REMASK_CASES),
    *(refused(*case[:2], step, **case[2]) for case in DEMASK_CASES),
    *(refused(*case[:2], function, **case[2]) for function in (step, linear_step)
      for case in FORBIDDEN_CASES + SEED_CASES + STEP_CASES),
    *(refused(*case[:2], function, **case[2])
      for function in (linear_sample, linear_step) for case in LINEAR_LOGITS_CASES),
    refused(ValueError, "expected embeddings of shape [B, N, D] = [2, 4, 3], received [1, 4, 3]", linear_step,
            EMBEDDINGS[:1]),
    refused(ValueError, "expected compact embeddings [M, ...] with row_indices [M] and seq_len, received [4, 3], [8]",
            linear_step, EMBEDDINGS[0]),
    refused(ValueError, "received embeddings on cpu, ids on meta, is_masked on cpu", linear_step,
            ids=TOKENS.to(META)),
    *(refused(*case[:2], remask, noise_scale=1.0, **case[2]) for case in SEED_CASES + STEP_CASES),
    refused(TypeError, "expected log_probs of dtype float32, received float64", confidence, LOGITS[0].double()),
    refused(ValueError, "expected log_probs with 2 dimensions", confidence, LOGITS),
    refused(ValueError, "expected choice_temperature in [0, inf), received -1", confidence, choice_temperature=-1),
    refused(TypeError, "expected critic_logits of dtype", critic, TOKENS),
    refused(ValueError, "expected critic_logits with 2 dimensions", critic, LOGITS),
    refused(ValueError, "expected noise_scale in [0, inf), received nan", critic, noise_scale=math.nan),
    *(refused(*case[:2], confidence, choice_temperature=1.0, **case[2]) for case in SEED_CASES + STEP_CASES),
    *(refused(*case[:2], critic, noise_scale=1.0, **case[2]) for case in SEED_CASES + STEP_CASES),
    refused(TypeError, "expected remask_keys of dtype", select, TOKENS),
    refused(ValueError, "expected remask_keys with 2 dimensions", select, LOGITS),
    refused(TypeError, "expected eligible of dtype bool, received float32", select, eligible=LOGITS[0]),
    refused(ValueError, "expected eligible of shape [B, N] = [4, 6], received [2, 4]", select, eligible=MASKED),
    refused(TypeError, "expected counts of dtype int32|int64, received bool", select, counts=MASKED[0]),
    refused(ValueError, "expected counts of shape [B] = [4], received [2]", select, counts=TOKENS[:, 0]),
    refused(ValueError, "received remask_keys on cpu, eligible on cpu, counts on meta", select,
            counts=TOKENS[0].to(META)),
    *(refused(ValueError, "expected backend= to be one of auto, triton, reference; received 'cuda'", function,
              backend="cuda") for function in (mask, dense, linear, sample, linear_sample, select)),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "function", "arguments", "options"), CASES)
def test_refused_in_so_many_words(error, message, function, arguments, options):
    with pytest.raises(error, match=re.escape(message)):
        function(*arguments, **options)


def test_values_are_not_read_without_check():
    """Unclean tokens pass: reading them would wait for the GPU."""
    mask(torch.full((B, N), -5))
    dense(targets=torch.full((B, N), 10**9), is_masked=~MASKED)


def test_a_mask_id_outside_the_vocabulary_needs_no_other_id():
    out = mask(TOKENS * 0, mask_id=1, num_tokens=1, random_token_prob=1.0, seed=0, check=True)
    assert set(out.masked_ids.unique().tolist()) <= {0, 1}


def test_an_out_of_fewer_sequences_is_refused():
    with pytest.raises(ValueError, match=r"expected out.ids"):
        in_place(TOKENS[:1], FIGURES[:1])


def test_check_accepts_an_empty_tensor():
    _check.clean_tokens("tokens", torch.zeros(0, 3).long(), 5, 4)


def test_dtypes_of_two_kinds_pass_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(EMBEDDINGS.bfloat16()).loss.item() == pytest.approx(math.log(V), rel=1e-3)


def test_what_is_exported_is_documented():
    for name in functional.__all__:
        assert getattr(functional, name).__doc__


@pytest.mark.parametrize(
    "operation",
    [
        lambda: mask(no_replace_prob=0.5, random_token_prob=0.5, seed=1).masked_ids,
        lambda: sample(torch.arange(48.0).sin().view(B, N, V), top_k=3, mask_id=1, seed=1).ids,
        lambda: functional.select_to_remask(TOKENS.float(), MASKED, torch.tensor([1, 2])),
    ],
    ids=["mask_sampling", "sample_tokens", "select_to_remask"],
)
def test_compiles_without_a_graph_break(operation):
    """The door too: checks, dispatch and Philox are traced whole (masked losses have as many rows as are masked)."""
    compiled = torch.compile(operation, fullgraph=True, backend="eager")
    assert torch.equal(compiled(), operation())


def test_numpys_numbers_are_numbers():
    plain = mask(no_replace_prob=0.5, seed=3)
    same = functional.mask_sampling(
        TOKENS, mask_id=np.int64(V - 1), num_tokens=np.int32(V), no_replace_prob=np.float32(0.5), seed=np.int64(3)
    )
    for one, other in zip(plain, same, strict=True):
        assert torch.equal(one, other)
