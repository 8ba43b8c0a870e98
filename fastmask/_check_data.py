"""What the data sets refuse: expected, received, remedy. Returned is what was passed in, as the data sets need it."""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch import Tensor


def clean_ids(raw: Any, num_tokens: int, mask_id: int, where: str, first: int) -> Tensor:
    """raw [n] as a new int64 tensor of clean ids."""
    ids = int64(raw)
    expected = f"clean ids, in [0, {num_tokens}) and not mask_id = {mask_id}"
    remedy = "give the num_tokens of the tokenizer that made the ids, and a mask_id that it never makes"
    refuse((ids < 0) | (ids >= num_tokens) | (ids == mask_id), raw, expected, remedy, where, first)
    return ids


def refuse_wrapping(ids: Any, where: str) -> None:
    """uint64 ids past int64's largest, which would be negative there."""
    wraps = int64(ids) < 0
    if str(ids.dtype).endswith("uint64"):
        refuse(wraps, ids, "ids below 2**63, which int64 holds", "clean the data", where)


def refuse(bad: Tensor, values: Any, expected: str, remedy: str, where: str = "", first: int = 0) -> None:
    """Raises for the first of `values` that is `bad`, both of one shape; `first` is the position of [0]."""
    if bad.any():
        at = tuple(bad.nonzero()[0].tolist())
        position = at[0] + first if len(at) == 1 else at
        value = values[at].item()
        raise ValueError(f"expected {expected}, received {value} at {where}position {position}; {remedy}")


def integers(name: str, values: Any, ndim: int | None = None) -> Any:
    """`values` if an array or tensor, else a tensor of them; integers, with `ndim` dimensions."""
    if not hasattr(values, "dtype"):
        try:
            items = list(values)
            values = torch.tensor(items) if items else torch.empty(0, dtype=torch.int64)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                f"expected {name} as an array, tensor or list of integers, received {type(values).__name__} "
                f"({error}); open a file of ids by open_ids(path)"
            ) from error
    refuse_masked(name, values)
    if isinstance(values.dtype, torch.dtype):
        refuse_sparse(name, values)
        dtype = values.dtype
        are_integers = not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)
    else:
        are_integers = values.dtype.kind in ("i", "u")
    if not are_integers:
        raise TypeError(f"expected {name} of an integer dtype, received {values.dtype}; convert to int64")
    if ndim is not None and len(values.shape) != ndim:
        raise ValueError(
            f"expected {name} with {ndim} dimension(s), received shape {tuple(values.shape)}; reshape: "
            "TokenWindows takes [T], TokenSequences [S, N]"
        )
    return values


def int64(raw: Any) -> Tensor:
    """A new int64 tensor; an array converts in numpy, as torch lacks foreign byte orders."""
    return raw.to(torch.int64, copy=True) if isinstance(raw, Tensor) else torch.as_tensor(raw.astype("int64"))


def image(values: Any, i: int) -> Tensor:
    """Image `i` as a dense tensor of real values on the CPU."""
    refuse_masked("images", values)
    try:
        if isinstance(getattr(values, "dtype", None), torch.dtype):
            image = values.cpu()
        elif hasattr(values, "dtype") and not values.dtype.isnative:  # torch lacks foreign byte orders
            image = torch.as_tensor(values.astype(values.dtype.newbyteorder("=")))
        else:
            image = torch.tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"expected image {i} as an array, tensor or list of numbers, received {type(values).__name__} "
            f"({str(error).splitlines()[0]:.80}); convert it"
        ) from error
    if image.is_complex():
        raise TypeError(f"expected real values, received {image.dtype}; take the real part or modulus")
    refuse_sparse("images", image)
    return image.float() if image.is_floating_point() and image.dtype.itemsize == 1 else image  # no order in float8


def refuse_masked(name: str, values: Any) -> None:
    if hasattr(values, "filled"):  # numpy.ma: torch would take what lies under the mask
        raise TypeError(f"expected {name} without a mask, received {type(values).__name__}; use .filled(value)")


def refuse_sparse(name: str, values: Tensor) -> None:
    if values.layout is not torch.strided or values.is_nested or values.device.type == "meta":
        kind = "a meta tensor" if values.device.type == "meta" else f"layout {values.layout}"
        raise TypeError(f"expected {name} as a dense tensor that holds values, received {kind}; use .to_dense()")


def integer(name: str, value: Any, at_least: int | None = None) -> int:
    """`value` as an int: Python's, numpy's, or a tensor's with one, as a Subset by `torch.randperm` asks for."""
    try:
        if isinstance(value, bool) or getattr(value, "dtype", None) == torch.bool:
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"expected {name} to be an int, received {value!r}; give a whole number") from None
    if at_least is not None and number < at_least:
        raise ValueError(f"expected {name} >= {at_least}, received {number}; give a larger one")
    return number


def vocabulary(num_tokens: int, mask_id: int) -> tuple[int, int]:
    num_tokens = integer("num_tokens", num_tokens, at_least=2)  # one clean id and the mask
    if num_tokens >= 2**63:
        raise ValueError(f"expected num_tokens < 2**63, which int64 holds, received {num_tokens}; give a smaller one")
    mask_id = integer("mask_id", mask_id)
    if not 0 <= mask_id < num_tokens:
        raise ValueError(
            f"expected mask_id in [0, num_tokens) = [0, {num_tokens}), received {mask_id}; num_tokens counts "
            "the mask too (clean ids + 1)"
        )
    return num_tokens, mask_id


def scale(levels: int, value_range: tuple[float, float]) -> tuple[int, float, float]:
    levels = integer("levels", levels, at_least=2)
    if levels > 2**31:
        raise ValueError(f"expected levels <= 2**31, which four bytes hold, received {levels}; give fewer")
    try:
        if isinstance(value_range, (str, bytes)) or any(isinstance(end, (str, bytes)) for end in value_range):
            raise TypeError
        low, high = map(float, value_range)
    except (TypeError, ValueError, OverflowError):
        low = high = math.nan
    if not (-math.inf < low < high < math.inf and high - low < math.inf):
        raise ValueError(
            f"expected value_range (low, high), finite and low < high, received {value_range}; give the "
            "least and the largest value there can be (their difference finite too)"
        )
    return levels, low, high
