"""Data sets of images: their levels, the way back, and what is refused in which words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from data_sets import refuses

from fastmask.data import dequantise, from_images, validate


def test_digits_come_back_exactly():
    datasets = pytest.importorskip("sklearn.datasets")
    images = datasets.load_digits().images  # [1797, 8, 8], values 0 to 16
    data = from_images(images, levels=17, value_range=(0, 16))
    assert (len(data), data.seq_len, data.num_tokens, data.mask_id) == (1797, 64, 18, 17)
    validate(data, progress=False)
    ids = torch.stack(list(data))
    assert torch.equal(ids, torch.from_numpy(images).long().reshape(1797, 64))
    drawn = dequantise(ids, levels=17, value_range=(0, 16)).reshape(-1, 8, 8)
    assert drawn.dtype == torch.float32
    assert np.array_equal(drawn.numpy(), images)


@pytest.mark.parametrize("levels", [2, 3, 17, 256, 257, 1000])
@pytest.mark.parametrize("value_range", [(0, 1), (-1, 1), (0, 0.1), (100, 1e6)])
def test_levels_are_even_reach_both_ends_and_invert(levels, value_range):
    scale = {"levels": levels, "value_range": value_range}
    low, high = value_range
    ids = torch.arange(levels)
    values = dequantise(ids, **scale)
    expected = np.linspace(low, high, levels)
    np.testing.assert_allclose(values.numpy(), expected, rtol=1e-6, atol=1e-7 * (high - low))
    assert torch.equal(from_images(values[None], **scale)[0], ids)
    assert dequantise(ids.to(torch.int32), **scale).equal(values)
    noise = torch.rand(1, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = noise * (high - low) + low
    drawn = dequantise(from_images(noise, **scale)[0], **scale).double()
    half = (high - low) / (levels - 1) / 2
    assert (drawn - noise[0]).abs().max() <= half * (1 + 1e-6) + 1e-6 * abs(high)


@pytest.mark.parametrize(
    "images",
    [
        np.array([[[0, 255], [128, 3]]], "u1"),
        torch.tensor([[[0, 255], [128, 3]]], dtype=torch.uint8),
        torch.tensor([[[0, 255], [128, 3]]], dtype=torch.uint16),
        torch.tensor([[[0, 255], [128, 3]]], dtype=torch.bfloat16),
        [[[0, 255], [128, 3]]],
        [np.array([[0.0, 255.0], [128.0, 3.0]])],
    ],
)
def test_bytes_are_kept_in_c_order_from_any_dtype(images):
    data = from_images(images, levels=256, value_range=(0, 255))
    assert data[0].tolist() == [0, 255, 128, 3]
    assert data.ids.dtype == torch.uint8  # a byte a value: image sets are large


def test_images_refuse_what_has_no_level():
    scale = {"levels": 3, "value_range": (0, 1)}
    good = torch.zeros(2, 2)
    for bad in (1.5, -0.25, float("nan"), float("inf")):
        image = good.clone()
        image[1, 0] = bad
        with refuses(ValueError, "values in [0, 1]", f"received {bad} at image 1, position (1, 0)", "clamp"):
            from_images([good, image], **scale)
    with refuses(ValueError, "received 16777217 at image 0, position 0"):  # float32 cannot tell it from 2^24
        from_images(torch.tensor([[2**24 + 1]]), levels=3, value_range=(0, 2**24))
    with refuses(ValueError, "one shape, (2, 2)", "received (3, 2) as image 1", "resize"):
        from_images([good, torch.zeros(3, 2)], **scale)
    with refuses(ValueError, "at least one image", "received none"):
        from_images(np.zeros((0, 2, 2)), **scale)
    with refuses(TypeError, "expected real values", "received torch.complex64"):
        from_images([good.to(torch.complex64)], **scale)


def test_an_end_rounded_up_in_a_coarse_dtype_is_the_last_level():
    """100.4 is 100.5 in bfloat16 and lies in (100, 100.4) there: a quarter past the range, 318 of 255 levels."""
    image = torch.tensor([[100.0, 100.4]], dtype=torch.bfloat16)
    assert from_images(image, levels=256, value_range=(100, 100.4))[0].tolist() == [0, 255]


def test_levels_and_ranges_that_would_overflow_are_refused():
    with refuses(ValueError, "expected levels <= 2**31", f"received {2**31 + 1}", "give fewer"):
        from_images(torch.zeros(1, 1), levels=2**31 + 1, value_range=(0, 1))
    with refuses(ValueError, "expected value_range", "(-1e+308, 1e+308)", "difference finite"):
        from_images(torch.zeros(1, 1), levels=2, value_range=(-1e308, 1e308))


@pytest.mark.parametrize(("dtype", "high"), [("float16", 1e6), ("bfloat16", 1e300), ("float32", 1e300)])
def test_an_infinite_value_is_refused_where_the_end_is_infinite_in_its_dtype_too(dtype, high):
    image = torch.tensor([[1.0, float("inf")]]).to(getattr(torch, dtype))
    with refuses(ValueError, "received inf at image 0, position 1", "clamp"):
        from_images(image, levels=3, value_range=(0, high))


def test_integers_that_float64_rounds_are_refused():
    for values in (torch.tensor([[1, 2**53 + 1]]), np.array([[1, 2**64 - 1]], "u8")):
        with refuses(
            ValueError, "integers below 2**53", f"received {int(values[0, 1])} at image 0, position 1", "scale"
        ):
            from_images(values, levels=3, value_range=(0, 2.0**70))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
def test_integer_images_past_their_range_do_not_wrap(dtype):
    values = np.array([[7, 200]], dtype)
    with refuses(ValueError, "values in [0, 100]", "received 200 at image 0, position 1"):
        from_images(values, levels=101, value_range=(0, 100))


@pytest.mark.parametrize(
    ("images", "error", "words"),
    [
        (np.ma.masked_array([[0.5, 0.5]], [[1, 0]]), TypeError, ("without a mask", "MaskedArray", "filled")),
        (torch.zeros(1, 2).to_sparse(), TypeError, ("dense tensor", "sparse_coo", "to_dense")),
        (torch.zeros(1, 2, device="meta"), TypeError, ("dense tensor", "meta")),
        ({"a": 1}, TypeError, ("array, tensor or sequence", "dict", "list")),
        (None, TypeError, ("array, tensor or sequence", "NoneType")),
        (iter([[0.5]]), TypeError, ("array, tensor or sequence", "list_iterator")),
        (["a"], TypeError, ("image 0 as an array", "received str")),
        ([[0.5], [None]], TypeError, ("image 1 as an array", "received list")),
        (torch.tensor(0.5), ValueError, ("shape [S, ...]", "single value")),
        (np.array(0.5), ValueError, ("shape [S, ...]", "single value")),
        (torch.zeros(2, 0), ValueError, ("hold values", "shape (0,)")),
    ],
)
def test_what_is_no_batch_of_images_is_refused(images, error, words):
    with refuses(error, *words):
        from_images(images, levels=3, value_range=(0, 1))


def test_images_of_foreign_byte_order_are_taken():
    for dtype in (">f4", "<f4", ">i4", "<u2"):
        assert from_images(np.array([[0, 1, 1]], dtype), levels=3, value_range=(0, 1))[0].tolist() == [0, 2, 2]


@pytest.mark.parametrize("bad", ["01", ("0", "1"), (0, 10**400), (0, b"1")])
def test_a_range_of_words_or_past_a_float_is_refused(bad):
    with refuses(ValueError, "expected value_range (low, high)", "received"):
        from_images(torch.zeros(1, 1), levels=2, value_range=bad)


def test_drawn_values_past_float32_are_refused():
    with refuses(ValueError, "value_range that float32 holds", "scale"):
        dequantise(torch.tensor([1]), levels=2, value_range=(0, 1e300))


@pytest.mark.parametrize("call", [from_images, dequantise])
def test_a_bad_scale_is_refused(call):
    zeros = torch.zeros(1, 2, dtype=torch.int64)
    with refuses(ValueError, "expected levels >= 2", "received 1"):
        call(zeros, levels=1, value_range=(0, 1))
    with refuses(TypeError, "expected levels to be an int", "received 2.5"):
        call(zeros, levels=2.5, value_range=(0, 1))
    for bad in ((1, 1), (1, 0), (0, float("inf")), (float("nan"), 1), (0, 1, 2), 5):
        with refuses(ValueError, "expected value_range (low, high)", f"received {bad}", "least"):
            call(zeros, levels=2, value_range=bad)


def test_dequantise_refuses_what_is_no_level():
    scale = {"levels": 3, "value_range": (0, 1)}
    with refuses(ValueError, "ids in [0, 3)", "received 3 at position (1, 0)", "no masked ids"):
        dequantise(torch.tensor([[0, 2], [3, 1]]), **scale)
    with refuses(ValueError, "received -1 at position 1"):
        dequantise(torch.tensor([0, -1]), **scale)
    with refuses(TypeError, "expected ids of an integer dtype", "received torch.float32"):
        dequantise(torch.zeros(2), **scale)
