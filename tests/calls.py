"""A call of each public function that is accepted as it stands, and what it is given."""

from __future__ import annotations

import torch

from fastmask import functional

B, N, V, D = 2, 4, 6, 3
TOKENS = torch.arange(B * N).view(B, N) % (V - 1)
FIGURES = torch.zeros(B, N)
LOGITS, EMBEDDINGS, WEIGHT = torch.zeros(B, N, V), torch.zeros(B, N, D), torch.zeros(V, D)
TARGETS, MASKED = TOKENS, torch.ones(B, N, dtype=torch.bool)
META = torch.device("meta")


def mask(tokens=TOKENS, **options):
    return functional.mask_sampling(tokens, **{"mask_id": V - 1, "num_tokens": V, **options})


def dense(logits=LOGITS, targets=TARGETS, is_masked=MASKED, weights=None, **options):
    return functional.masked_cross_entropy(logits, targets, is_masked, weights, **options)


def linear(embeddings=EMBEDDINGS, weight=WEIGHT, targets=TARGETS, is_masked=MASKED, weights=None, **options):
    return functional.linear_masked_cross_entropy(embeddings, weight, targets, is_masked, weights, **options)


def sample(logits=LOGITS, **options):
    return functional.sample_tokens(logits, **options)


def linear_sample(embeddings=EMBEDDINGS, weight=WEIGHT, bias=None, scale=1.0, softcap=None, **options):
    return functional.sample_tokens(functional.LinearLogits(embeddings, weight, bias, scale, softcap), **options)


def confidence(log_probs=LOGITS[0], **options):
    return functional.confidence_remask_keys(log_probs, **options)


def critic(logits=LOGITS[0], **options):
    return functional.critic_remask_keys(logits, **options)


def select(remask_keys=LOGITS[0], eligible=LOGITS[0] == 0, counts=TOKENS[0], **options):
    return functional.select_to_remask(remask_keys, eligible, counts, **options)


def select_at_random(eligible=MASKED, probability=0.5, **options):
    return functional.select_at_random(eligible, probability, **options)


def remask(values=FIGURES, counts=1, **options):
    batch, length = values.shape[:2]
    options = {
        "ids": torch.zeros(batch, length).long(), "is_masked": torch.ones(batch, length).bool(),
        "row_indices": torch.zeros(batch * length).long(), "row_starts": torch.arange(batch + 1) * length,
        "mask_id": V - 1, **options,
    }  # fmt: skip
    return functional.remask_(values=values, counts=counts, **options)


def step(logits=LOGITS, ids=TOKENS, is_masked=MASKED, counts=1, **options):
    return functional.demask_step(logits, ids, is_masked, counts, **{"mask_id": V - 1, **options})


def linear_step(embeddings=EMBEDDINGS, weight=WEIGHT, bias=None, scale=1.0, softcap=None, **options):
    return step(functional.LinearLogits(embeddings, weight, bias, scale, softcap), **options)


def in_place(ids=TOKENS, log_probs=FIGURES, **options):
    return sample(out=functional.Sampled(ids.clone(), log_probs.clone()), **options)
