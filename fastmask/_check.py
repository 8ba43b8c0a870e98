"""Errors at the door: what was expected, what came, and the remedy. Only ``clean_tokens``, which
``check=True`` asks for, and ``allowed_ids`` read a tensor's values."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

INTEGER = (torch.int32, torch.int64)
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return "|".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def tensor(name: str, value: object, dtypes: Sequence[torch.dtype], ndim: int | None = None) -> None:
    """``value`` is a dense tensor of one of these dtypes, of ``ndim`` dimensions if given."""
    if not isinstance(value, Tensor):
        raise TypeError(f"expected {name} to be a torch.Tensor, received {type(value).__name__}")
    if value.layout is not torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise TypeError(
            f"expected {name} to be a dense tensor, received layout {layout}; convert it with .to_dense()"
        )
    if value.is_nested:
        raise TypeError(f"expected {name} to be a dense tensor, received a nested one; pad it")
    if value.dtype not in dtypes:
        remedy = f"; convert it with {name}.to(torch.{_names(dtypes[-1:])})"
        raise TypeError(f"expected {name} of dtype {_names(dtypes)}, received {_names([value.dtype])}{remedy}")
    if ndim is not None and value.ndim != ndim:
        raise ValueError(f"expected {name} with {ndim} dimensions, received shape {tuple(value.shape)}")


def plain(**tensors: Tensor | None) -> None:
    """No transform of torch.func works on these tensors, and none carries a forward-mode tangent.

    The operations differentiate in reverse mode only: elsewhere a tangent would be dropped, and be 0, unseen.
    """
    if torch.compiler.is_compiling():  # it traces the operations as they are, and not what was done to their inputs
        return
    with_tangents = torch.autograd.forward_ad._current_level >= 0
    for name, value in tensors.items():
        if value is None or not (with_tangents or torch._C._functorch.is_functorch_wrapped_tensor(value)):
            continue
        if torch._C._functorch.is_batchedtensor(value):
            what, remedy = "batched by torch.func.vmap", "give the whole batch in one call"
        elif torch._C._functorch.is_gradtrackingtensor(value):
            what, remedy = "inside of torch.func.grad, vjp, jvp or jacfwd", "use torch.autograd.grad or backward()"
        elif with_tangents and torch.autograd.forward_ad.unpack_dual(value).tangent is not None:
            what, remedy = "with a forward-mode tangent", "use torch.autograd.grad or backward()"
        else:
            continue
        raise RuntimeError(f"expected {name} to be a plain tensor, received one {what}; {remedy}")


def shape(name: str, value: Tensor, expected: Sequence[int], letters: str) -> None:
    """``value`` has this shape, written in letters for the message."""
    if tuple(value.shape) != tuple(expected):
        raise ValueError(f"expected {name} of shape [{letters}] = {list(expected)}, received {list(value.shape)}")


def same_device(**tensors: Tensor | None) -> None:
    """All the tensors given lie on one device."""
    if len({value.device for value in tensors.values() if value is not None}) > 1:
        devices = {name: value.device for name, value in tensors.items() if value is not None}
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ValueError(f"expected all tensors on one device, received {where}; move them with .to(device)")


def flag(name: str, value: object) -> None:
    """``value`` is True or False, not merely something that Python takes for either."""
    if not isinstance(value, bool):
        raise TypeError(f"expected {name} to be True or False, received {value!r} of type {type(value).__name__}")


def option(name: str, value: object, allowed: Sequence[str]) -> None:
    """``value`` is one of the words allowed."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"expected {name} to be one of {', '.join(map(repr, allowed))}; received {value!r}")


def number(name: str, value: object, low: float, high: float = math.inf, *, below_high: bool = False) -> None:
    """low <= value <= high (or < high); NaN, infinity and what no float can hold are refused."""
    if type(value) is float and -math.inf < low <= value < high:  # nearly always
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"expected {name} to be a number, received {type(value).__name__}")
    try:
        value, below_high = float(value), below_high or math.isinf(high)
    except OverflowError:
        raise ValueError(f"expected {name} to be a number that a float can hold, received one past 1e308") from None
    if not (low <= value < high if below_high else low <= value <= high) or value == -math.inf:
        first, last = "(" if low == -math.inf else "[", ")" if below_high else "]"
        raise ValueError(f"expected {name} in {first}{low:g}, {high:g}{last}, received {value!r}")


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` as an int; low <= value, and < high if given."""
    if isinstance(value, bool) or not isinstance(value, int):  # what torch.compile calls an int stays symbolic
        if isinstance(value, (bool, Tensor)) or not hasattr(value, "__index__"):
            raise TypeError(f"expected {name} to be an int, received {type(value).__name__}")
        try:
            value = operator.index(value)
        except TypeError:  # a NumPy array
            raise TypeError(f"expected {name} to be an int, received {type(value).__name__}") from None
    if value < low or (high is not None and value >= high):
        upper = "" if high is None else f" and below {high}"
        raise ValueError(f"expected {name} of at least {low}{upper}, received {value}")
    return value


def id_table(name: str, ids: object, num_tokens: int, device: torch.device) -> Tensor:
    """Ids as [num_tokens] bool, True at each: the tensor given, on the device, or of a sequence one on the CPU."""
    if not isinstance(ids, Tensor):
        if isinstance(ids, str) or not isinstance(ids, Iterable):
            raise TypeError(f"expected {name} as [V] bool or as a sequence of ids, received {type(ids).__name__}")
        table = torch.zeros(num_tokens, dtype=torch.bool, device="cpu")
        for id in ids:
            table[integer(f"{name} ids", id, 0, num_tokens)] = True
        return table
    if ids.dtype != torch.bool:
        raise TypeError(
            f"expected {name} as [V] bool or as a sequence of ids, received a tensor of {ids.dtype}; "
            f"give ids as {name}.tolist()"
        )
    shape(name, ids, [num_tokens], "V")
    if ids.device != device:
        raise ValueError(f"expected {name} on {device}, received {ids.device}; move it with .to(device)")
    return ids


def allowed_ids(name: str, table: Tensor, mask_id: int | None, remedy: str, *, reads: bool = True) -> Tensor:
    """The ids that are not in the table and not the mask, [V] bool; none is refused, if values may be read."""
    is_allowed = ~table
    if mask_id is not None and mask_id < len(table):
        is_allowed[mask_id] = False
    if reads and not is_allowed.any():
        besides = "" if mask_id is None else " besides mask_id"
        raise ValueError(f"expected {name} to leave an id{besides}, received all; {remedy}")
    return is_allowed


def clean_tokens(
    name: str,
    ids: Tensor,
    num_tokens: int,
    forbidden_id: int | None,
    where: Tensor | None = None,
    remedy: str = "clean the data (fastmask.data refuses such ids when it reads them)",
) -> None:
    """Every id (at ``where``) is in [0, num_tokens) and none is forbidden. Reads values: synchronises."""
    wrong = (ids < 0) | (ids >= num_tokens)
    if forbidden_id is not None:
        wrong |= ids == forbidden_id
    if where is not None:
        wrong &= where
    if wrong.any():
        position = wrong.nonzero()[0].tolist()
        besides = "" if forbidden_id is None else f" other than {forbidden_id}"
        raise ValueError(
            f"expected {name} in [0, {num_tokens}){besides}, received {int(ids[tuple(position)])} at {position} "
            f"and {int(wrong.sum()) - 1} more; {remedy}"
        )
