"""Logits that a linear head gives, one chunk of the rows at a time."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from oracles import draw
from sampling import Door, number_kept

from fastmask import functional
from fastmask.functional import LinearLogits

OPERATION = "sample_tokens"


@pytest.fixture
def door(backend):
    return Door(backend)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.slow_interpreted
def test_a_heads_samples_are_those_of_its_logits(door, monkeypatch, with_bias):
    monkeypatch.setattr(door.backend.module("sample_tokens"), "HEAD_CHUNK_ROWS", 7)
    monkeypatch.setattr(door.backend.module("sample_tokens"), "_CHUNK_ELEMENTS", 1, raising=False)  # the reference's
    # Small integers: their products are exact in whatever order they are summed.
    integers = torch.Generator().manual_seed(0)
    length = door.rows(10)
    shapes = (4, length, 6), (300, 6)
    embeddings, weight = (torch.randint(-2, 3, shape, generator=integers).float() for shape in shapes)
    bias = torch.randint(-2, 3, (300,), generator=integers).float() if with_bias else None
    number = torch.arange(4 * length).view(4, length)
    kept = torch.where(number % 3 == 0, number, -1)
    logits = F.linear(embeddings, weight, bias)
    for options in ({}, {"temperature": 0.0}, {"temperature": 0.5, "top_k": number_kept(0.9, 300), "kept_ids": kept}):
        options = {"seed": 3, "step": 4, "sample_offset": 5, "mask_id": 2, **options}
        ours = door.sample_tokens(LinearLogits(embeddings, weight, bias), **options)
        theirs = door.sample_tokens(logits, **options)
        assert torch.equal(ours.ids, theirs.ids)
        assert torch.equal(ours.log_probs, theirs.log_probs)
    rows = torch.tensor([11, 4, 8, 0, 1, 2, 3, 9])
    compact = door.sample_tokens(
        LinearLogits(embeddings.flatten(0, 1)[rows], weight, bias), row_indices=rows, seq_len=length, seed=3
    )
    whole = door.sample_tokens(logits, seed=3)
    assert torch.equal(compact.ids, whole.ids.flatten()[rows])


def test_a_head_in_bfloat16_and_under_autocast(door, backend):
    embeddings, weight = draw(2, 8, 4, dtype=torch.bfloat16), draw(20, 4, seed=1, dtype=torch.bfloat16)
    half = door.sample_tokens(LinearLogits(embeddings, weight), seed=0)
    with torch.autocast(backend.device.type, torch.bfloat16):
        cast = door.sample_tokens(LinearLogits(embeddings.float(), weight.float()), seed=0)
    assert torch.equal(half.ids, cast.ids)
    assert half.log_probs.dtype == cast.log_probs.dtype == torch.float32


def test_logits_of_all_rows_never_exist(reference):
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    rows, vocabulary = 4096, 2000
    embeddings, weight = draw(4, rows // 4, 2), draw(vocabulary, 2, seed=1)
    with Sizes():
        functional.sample_tokens(
            LinearLogits(embeddings.to(reference.device), weight.to(reference.device)), seed=0, backend="reference"
        )
    assert max(sizes) <= 2**22 < rows * vocabulary  # a chunk
