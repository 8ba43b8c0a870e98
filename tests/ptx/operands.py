"""Operands: types, the registers that hold them, constants and parameters.

A register is an array of unsigned integers, one for each thread of the machine; a statement's type says how its bits
are read.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ptx.execution import Machine

WARP = 32
POISON = 0xFF  # a NaN in every format
UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}
# What a thread knows of itself and of the launch.
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid")

Selection = Any  # of threads: a slice or an index array
Read = Callable[["Machine", Selection], Any]
Write = Callable[["Machine", Selection, Any], None]
# What a statement does: a function of the machine and the threads that run it.
Action = Callable[["Machine", Selection], None]


def dtype_of(name: str) -> np.dtype:
    """numpy's type for one of PTX's: "s32", "b16", "pred"."""
    if name == "pred":
        return np.dtype(bool)
    if name in ("bf16", "bf16x2", "f16x2"):  # held as bits
        return np.dtype(np.uint16 if name == "bf16" else np.uint32)
    return np.dtype(f"{_KINDS[name[0]]}{int(name[1:]) // 8}")


def register_names(operand: str) -> list[str]:
    """The registers of a vector ``{a, b}``, or the one of a scalar."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def immediate(text: str, dtype: np.dtype) -> Any:
    """A constant: 12, -3, 0x1F, 0f3F800000 (bits of a float32), 0d... (of a float64)."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return np.array(int(text[2:], 16), UNSIGNED[len(text) // 2 - 1]).view(dtype)[()]
    if dtype.kind == "b":
        return np.bool_(int(text, 0) != 0)
    return np.array(int(text.rstrip("U"), 0) & (256**dtype.itemsize - 1), UNSIGNED[dtype.itemsize]).view(dtype)[()]


def parameter_address(name: str) -> int:
    """Eight bytes for each parameter."""
    return 8 * int(name.rpartition("_")[2])


def width_of(register: str) -> Any:
    """What a register holds, by its name, as LLVM gives them."""
    kind = re.match(r"%([a-z]+)\d", register)[1]
    return {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}[kind]


def reader(operand: str, dtype: np.dtype) -> Read:
    """A function that gives an operand's values, one for each thread selected or one for all."""
    negated = operand.startswith("!")
    name = operand.lstrip("!")
    if "_param_" in name:
        value = dtype.type(parameter_address(name))
        return lambda machine, select: value
    if not name.startswith("%"):
        value = np.uint32(0) if name == "global_smem" else immediate(name, dtype)
        return lambda machine, select: value
    if name in SPECIAL:
        return lambda machine, select: machine.special[name][select]
    if negated:
        return lambda machine, select: ~machine.registers[name][select]
    if dtype.itemsize < np.dtype(width_of(name)).itemsize:
        bits = UNSIGNED[dtype.itemsize]
        return lambda machine, select: machine.registers[name][select].astype(bits).view(dtype)
    return lambda machine, select: machine.registers[name][select].view(dtype)


def writer(register: str, dtype: np.dtype) -> Callable[[Machine, Selection, Any], None]:
    """A function that stores values of a type, extended to the register's width."""
    if register == "_":
        return lambda machine, select, values: None
    bits = np.dtype(width_of(register))
    if dtype.itemsize == bits.itemsize:
        extended = lambda values: values.view(bits)  # noqa: E731
    else:
        extended = lambda values: values.astype(f"{dtype.kind}{bits.itemsize}").view(bits)  # noqa: E731

    def write(machine: Machine, select: Selection, values: Any) -> None:
        machine.registers[register][select] = extended(np.asarray(values, dtype))

    return write
