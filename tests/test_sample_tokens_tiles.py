"""Tiles of the sampler's kernel: what lies outside of their vectors, exponents far from 0, sums by one warp and by
two; and short rows, several a program."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from oracles import draw
from sampling import Door

OPERATION = "sample_tokens"
TOLERANCE = {"rtol": 4e-6, "atol": 2e-6}

if importlib.util.find_spec("triton"):
    import triton
    import triton.language as tl

    from fastmask.kernels import _math

    @triton.jit
    def _exp2_kernel(x_ptr, out_ptr, COUNT: tl.constexpr):
        offs = tl.arange(0, COUNT)
        tl.store(out_ptr + offs, _math.exp2_by_polynomial(tl.load(x_ptr + offs)))


def assert_alike(kernel, reference, logits, **options):
    ours, theirs = (Door(backend).sample_tokens(logits, **options) for backend in (kernel, reference))
    assert torch.equal(ours.ids, theirs.ids)
    for a, b in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE, equal_nan=True)


# Ids at the first and the last of a vector, of a sub-tile and of a tile; rows that begin at 16 bytes and elsewhere.
@pytest.mark.ptx
@pytest.mark.parametrize("vocabulary", [4200, 4203])
@pytest.mark.parametrize("mask_id", [0, 6, 2051, 4095, 4199])
def test_the_masks_neighbours_count_once(kernel, reference, vocabulary, mask_id):
    """They have most of the weight, and the mask had it all."""
    logits = draw(1, 3, vocabulary, seed=mask_id, dtype=torch.bfloat16)
    near = (torch.arange(vocabulary) - mask_id).abs()
    logits[..., near < 12] += 8.0
    logits[..., mask_id] = 30.0
    assert_alike(kernel, reference, logits, temperature=0.7, mask_id=mask_id, with_entropy=True, seed=1)


@pytest.mark.ptx
@pytest.mark.parametrize(
    ("offset", "temperature"),
    [(3e4, 0.7), (3e4, 1e-7), (-1e7, 1e-30), (0.0, 1e-38), (-3e38, 0.3)],
)
def test_exponents_far_from_0(kernel, reference, offset, temperature):
    """Every tile's sums are relative to a number that has been rounded by the same."""
    logits = offset + 3.0 * draw(1, 4, 5000, seed=2)
    assert_alike(kernel, reference, logits, temperature=temperature, with_entropy=True, seed=3)


@pytest.mark.ptx
def test_tiles_race_by_their_sums_far_from_0(kernel, reference):
    """Where the exponents of a tile's logits are rounded by up to a quarter, the same for all of it."""
    logits = 3e6 + (8.0 * draw(1, 32, 4104, seed=8)).round() / 4.0
    logits[..., 4096:] += 5.0
    assert_alike(kernel, reference, logits, temperature=0.7, seed=9)


@pytest.mark.ptx
def test_exponentials_by_a_polynomial(kernel):
    x = torch.cat([torch.linspace(-126.0, 64.0, 4095), torch.tensor([-math.inf])]).to(kernel.device)
    out = torch.empty_like(x)
    _exp2_kernel[(1,)](x, out, COUNT=4096)
    torch.testing.assert_close(out.double(), 2.0 ** x.double(), rtol=1.2e-7, atol=0.0)


@pytest.fixture
def b200(kernel, monkeypatch):
    """Launches as on a B200."""
    launch = kernel.module("_launch")
    monkeypatch.setattr(launch, "hardware", lambda device: launch.H100._replace(capability=(10, 0)))


@pytest.mark.ptx
def test_a_b200_samples_alike(kernel, reference, b200):
    logits = draw(1, 5, 4200, seed=10, scale=3.0, dtype=torch.bfloat16)
    logits[0, 1, 12], logits[0, 2] = math.nan, -math.inf
    for options in ({"temperature": 0.7, "top_k": 500}, {"temperature": torch.tensor([1.0])}):
        assert_alike(kernel, reference, logits, mask_id=7, seed=11, **options)


@pytest.mark.ptx
@pytest.mark.parametrize("vocabulary", [4104, 4107])
def test_what_is_asked_for_changes_nothing_else(kernel, vocabulary):
    """Not a bit, though more warps share a tile where a margin is asked for."""
    logits = draw(1, 3, vocabulary, seed=4, scale=3.0, dtype=torch.bfloat16)
    options = {"temperature": 0.7, "mask_id": 77, "seed": 5}
    plain = Door(kernel).sample_tokens(logits, **options)
    figures = Door(kernel).sample_tokens(logits, with_margin=True, with_entropy=True, **options)
    assert torch.equal(plain.ids, figures.ids)
    assert torch.equal(plain.log_probs, figures.log_probs)


@pytest.mark.ptx
@pytest.mark.parametrize("vocabulary", [1, 33])
def test_short_rows_do_not_depend_on_their_neighbours(kernel, reference, vocabulary):
    """Of programs that have rows left, rows that are none, and rows without a law."""
    num_rows = 2 * (256 // vocabulary) + 1
    logits = draw(num_rows, vocabulary, seed=6, scale=2.0)
    logits[1], logits[2, 0] = -math.inf, math.nan
    rows = torch.arange(num_rows)
    rows[3] = -1
    options = {"seq_len": num_rows, "temperature": 0.7, "seed": 7, "with_margin": True, "with_entropy": True}
    kept_ids = torch.full((num_rows,), -1)
    kept_ids[4::3] = vocabulary // 2
    assert_alike(kernel, reference, logits, row_indices=rows, kept_ids=kept_ids, **options)
    together = Door(kernel).sample_tokens(logits, row_indices=rows, **options)
    for row in (0, 2, num_rows - 1):
        alone = Door(kernel).sample_tokens(logits[row : row + 1], row_indices=rows[row : row + 1], **options)
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b[row : row + 1], rtol=0.0, atol=0.0, equal_nan=True)
