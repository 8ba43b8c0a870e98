"""Generation: arguments that are refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from generating import N, V, wrap

from fastmask import generation_options


@pytest.mark.parametrize(
    "options", [{"top_p": 0.9}, {"forbidden": [1]}, {"threshold": 0.5}, {"cuda_graph": True}], ids=str
)
def test_upstreams_ways_have_none_of_the_new_options(options):
    wrapper = wrap("cpu", compat=True)
    message = f"expected compat=False with {next(iter(options))}=, which x-transformers does not have"
    with pytest.raises(ValueError, match=message):
        wrapper.generate(1, **options)
    assert wrapper.net.calls == []


ROW = torch.zeros(N, dtype=torch.int64)
GIVEN = torch.zeros(N, dtype=torch.bool)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": -1}, ValueError, "expected batch_size of at least 0 and below 2147483648, received -1"),
        ({"batch_size": 2.0}, TypeError, "expected batch_size to be an int, received float"),
        ({"steps": 0}, ValueError, "expected steps of at least 1 and below 16777216, received 0"),
        ({"steps": True}, TypeError, "expected steps to be an int, received bool"),
        ({"start_temperature": -1.0}, ValueError, r"expected start_temperature in \[0, inf\), received -1.0"),
        ({"noise_level_scale": math.nan}, ValueError, r"expected noise_level_scale in \[0, inf\), received nan"),
        ({"choice_temperature": "4"}, TypeError, "expected choice_temperature to be a number, received str"),
        ({"filter_thres": 1.0}, ValueError, r"expected filter_thres in \[0, 1\), received 1.0"),
        ({"filter_thres": -0.1}, ValueError, r"expected filter_thres in \[0, 1\), received -0.1"),
        ({"choice_temperature": -1}, ValueError, r"expected choice_temperature in \[0, inf\), received -1"),
        ({"sample_offset": -1}, ValueError, "expected sample_offset of at least 0 and below 4294967296, received -1"),
        ({"prompt": ROW}, ValueError, "a prefix, shorter than seq_len = 18, received 18 positions"),
        ({"prompt": ROW[:5], "seq_len": 4}, ValueError, "shorter than seq_len = 4, received 5 positions"),
        ({"prompt_mask": GIVEN}, ValueError, "expected prompt_mask with prompt, received it alone; give both"),
        ({"seq_len": 0}, ValueError, "expected seq_len of at least 1 and below 19, received 0"),
        ({"seq_len": N + 1}, ValueError, "expected seq_len of at least 1 and below 19, received 19"),
        ({"seq_len": 4.0}, TypeError, "expected seq_len to be an int, received float"),
        (
            {"return_trajectory": 1},
            TypeError,
            "expected return_trajectory to be True or False, received 1 of type int",
        ),
        ({"cuda_graph": torch.tensor(True)}, TypeError, "expected cuda_graph to be True or False, received tensor"),
        ({"progress": "yes"}, TypeError, r"to be True, False, None or a callable\(done, total\), received 'yes'"),
        ({"progress": 1}, TypeError, r"to be True, False, None or a callable\(done, total\), received 1 of type int"),
        ({"start_temperature": math.inf}, ValueError, r"expected start_temperature in \[0, inf\), received inf"),
        ({"choice_temperature": torch.ones(())}, TypeError, "to be a number, received Tensor"),
        ({"prompt": [0] * N, "prompt_mask": GIVEN}, TypeError, "expected prompt to be a torch.Tensor, received list"),
        (
            {"prompt": ROW.float(), "prompt_mask": GIVEN},
            TypeError,
            r"expected prompt of dtype int32\|int64, received fl",
        ),
        ({"prompt": ROW, "prompt_mask": ROW}, TypeError, "expected prompt_mask of dtype bool, received int64"),
        (
            {"prompt": ROW, "prompt_mask": GIVEN[1:]},
            ValueError,
            r"expected prompt_mask of shape \[as prompt\] = \[18\], received \[17\]",
        ),
        (
            {"prompt": ROW, "prompt_mask": GIVEN, "seq_len": 17},
            ValueError,
            "expected prompt of at most seq_len = 17 positions, received 18; cut it",
        ),
        (
            {"batch_size": 2, "prompt": ROW.expand(3, -1), "prompt_mask": GIVEN.expand(3, -1)},
            ValueError,
            r"expected prompt of shape \[B, P\] = \[2, 18\], received \[3, 18\]",
        ),
    ],
)
@pytest.mark.parametrize("compat", [False, True])
def test_arguments_that_do_not_fit(options, error, message, compat):
    wrapper = wrap("cpu", compat=compat)
    with pytest.raises(error, match=message):
        wrapper.generate(**options)
    assert wrapper.net.calls == [] or "sample_offset" in options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"top_p": 1.5}, ValueError, r"expected top_p in \[0, 1\], received 1.5"),
        ({"top_p": "0.5"}, TypeError, "expected top_p to be a number, received str"),
        ({"score": torch.zeros(5)}, ValueError, r"expected score of shape \[N\]"),
        ({"score": torch.zeros(2, 4, 1)}, ValueError, r"expected score of shape \[B, N\]"),
        ({"score": torch.zeros(())}, ValueError, "expected score of shape"),
        (
            {"score": torch.zeros(18, device="meta")},
            ValueError,
            "expected tensors with values, received one of shape",
        ),
        ({"commits": torch.ones(4, device="meta").long()}, ValueError, "expected tensors with values"),
        ({"commits": lambda size, steps: None}, TypeError, "expected commits to be whole numbers, received None"),
        ({"generator": "x"}, TypeError, "expected generator to be a torch.Generator, received str"),
        ({"batch_size": 2**64}, ValueError, "expected batch_size of at least 0 and below"),
        ({"prompt": torch.tensor([[100, 1]])}, ValueError, "expected prompt ids from 0 to below .*, received 100"),
        ({"block_origin": "zero"}, ValueError, "expected block_length= with block_origin='zero'"),
        (
            {"start_temperature": 0, "end_temperature": 1.0},
            ValueError,
            "expected end_temperature=0 or none with start",
        ),
        ({"threshold": -0.1}, ValueError, r"expected threshold in \[0, 1\], received -0.1"),
        ({"threshold": math.nan}, ValueError, r"expected threshold in \[0, 1\], received nan"),
        ({"threshold": True}, TypeError, "expected threshold to be a number, received bool"),
        ({"forbidden": [V]}, ValueError, "expected forbidden ids of at least 0 and below 12, received 12"),
        ({"forbidden": [0.0]}, TypeError, "expected forbidden ids to be an int, received float"),
        ({"forbidden": torch.tensor([1])}, TypeError, "as a sequence of ids, received a tensor of torch.int64"),
        (
            {"forbidden": torch.zeros(V - 1).bool()},
            ValueError,
            r"expected forbidden of shape \[V\] = \[12\], received \[11\]",
        ),
    ],
)
def test_new_options_that_do_not_fit(options, error, message):
    wrapper = wrap("cpu")
    with pytest.raises(error, match=message):
        wrapper.generate(**options)
    assert wrapper.net.calls == []


def test_a_prompt_of_three_dimensions_is_refused():
    with pytest.raises(ValueError, match=r"expected prompt \[P\] or \[B, P\], received shape \[1, 1, 18\]"):
        wrap("cpu").generate(prompt=ROW[None, None], prompt_mask=GIVEN[None, None])


def test_numbers_of_numpy_are_numbers():
    numbers = {"start_temperature": np.float32(0.5), "filter_thres": np.float64(0.5), "threshold": np.float32(0.5)}
    counts = {"batch_size": np.int64(2), "steps": np.int32(3), "seq_len": np.int16(4), "sample_offset": np.uint8(1)}
    outs = [
        wrap("cpu").generate(**given, generator=torch.Generator().manual_seed(0))
        for given in (
            {**numbers, **counts},
            {name: number.item() for name, number in {**numbers, **counts}.items()},
        )
    ]
    assert torch.equal(*outs)
    assert outs[0].shape == (2, 4)
    names = {name: np.float32(0.5) for name in generation_options._NUMBERS}
    options = generation_options.Options(**names, processed=False, score=None, sample_offset=np.int64(1)).checked()
    assert {type(getattr(options, name)) for name in names} == {float}
    assert type(options.sample_offset) is int
