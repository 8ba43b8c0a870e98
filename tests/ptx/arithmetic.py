"""Statements that compute: arithmetic, comparisons, choices, conversions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.integers import bit_field, high_half, integer_quotient, permuted, shifted_left, shifted_right
from ptx.operands import UNSIGNED, Action, Selection, dtype_of, reader, register_names, writer
from ptx.parsing import Statement
from ptx.rounding import (
    approximate,
    approximate_quotient,
    converted,
    from_bfloat16,
    fused,
    to_bfloat16,
    with_one_nan,
    without_subnormals,
)

if TYPE_CHECKING:
    from ptx.execution import Machine


def extreme(a: Any, b: Any, of_numbers: Any, is_least: bool) -> Any:
    """The least or largest, of a number and NaN the number unless told otherwise; -0 is less than 0."""
    a, b = np.broadcast_arrays(a, b)
    found = of_numbers(a, b)
    if a.dtype.kind != "f":
        return found
    bits = np.dtype(UNSIGNED[a.itemsize])
    signs = a.view(bits) | b.view(bits) if is_least else a.view(bits) & b.view(bits)
    return np.where((a == 0) & (b == 0), signs.view(a.dtype), found)


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: fused(np.asarray(a), np.asarray(b), c),
    "neg": lambda a: -a,
    "abs": np.abs,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "shl": shifted_left,
    "shr": shifted_right,
    "min": lambda a, b: extreme(a, b, np.fmin, True),
    "max": lambda a, b: extreme(a, b, np.fmax, False),
    "rem": lambda a, b: a - integer_quotient(a, b) * b,
    "popc": np.bitwise_count,
    "bfe": bit_field,
    "prmt": permuted,
    "mov": lambda a: a,
    "mad": lambda a, b, c: a * b + c,
    "ex2": lambda a: approximate(np.exp2(a.astype(np.float64))),
    "lg2": lambda a: approximate(np.log2(a.astype(np.float64))),
    "rcp": lambda a: approximate(1 / a.astype(np.float64)),
    "sqrt": lambda a: approximate(np.sqrt(a.astype(np.float64))),
}


def division(modifiers: tuple[str, ...]) -> Callable[[Any, Any], Any]:
    if "full" in modifiers or "approx" in modifiers:
        return approximate_quotient
    return lambda a, b: a / b if np.asarray(a).dtype.kind == "f" else integer_quotient(a, b)


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "num": lambda a, b: (a == a) & (b == b),
}
# The unordered comparisons, true where a NaN is.
COMPARISONS |= {
    f"{name}u": lambda a, b, is_so=is_so: is_so(a, b) | (a != a) | (b != b) for name, is_so in COMPARISONS.items()
}
COMPARISONS["nan"] = lambda a, b: (a != a) | (b != b)


def make_arithmetic(statement: Statement) -> Action:
    name, *modifiers = statement.parts
    modifiers, kind = tuple(modifiers[:-1]), modifiers[-1]
    out, *operands = statement.operands
    if name == "mov" and any("{" in operand for operand in (out, *operands)):
        return make_packing(kind, out, operands[0])
    dtype = result = dtype_of(kind)
    function = division(modifiers) if name == "div" else FUNCTIONS[name]
    dtypes = [dtype] * len(operands)
    if name in ("shl", "shr"):
        dtypes[1] = np.dtype(np.uint32)
    elif name == "bfe":
        dtypes[1:] = [np.dtype(np.uint32)] * 2
    elif name == "popc":
        result = np.dtype(np.uint32)
    elif "hi" in modifiers:
        function = high_half
    elif "wide" in modifiers:
        result = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        dtypes[2:] = [result] * len(dtypes[2:])
        narrow = function
        function = lambda a, b, *c: narrow(np.asarray(a).astype(result), np.asarray(b).astype(result), *c)  # noqa: E731
    if "relu" in modifiers:
        of_any_sign = function
        function = lambda a, b: np.maximum(of_any_sign(a, b), 0)  # noqa: E731
    if "NaN" in modifiers:
        of_numbers = {"min": np.minimum, "max": np.maximum}[name]
        function = lambda a, b: extreme(a, b, of_numbers, name == "min")  # noqa: E731
    if kind == "bf16":
        in_float32 = function
        function = lambda *values: to_bfloat16(in_float32(*map(from_bfloat16, values)))  # noqa: E731
    reads = [reader(operand, dtype) for operand, dtype in zip(operands, dtypes, strict=True)]
    write = writer(out, result)
    flushed = without_subnormals if "ftz" in modifiers else lambda x: x
    canonical = with_one_nan if kind == "f32" and name not in ("mov", "neg", "abs") else lambda x: x

    def compute(machine: Machine, select: Selection) -> None:
        values = function(*(flushed(read(machine, select)) for read in reads))
        write(machine, select, canonical(flushed(values)))

    return compute


def make_packing(kind: str, out: str, operand: str) -> Action:
    """mov between a register and a vector of narrower ones, the first of which is the low bits."""
    whole = dtype_of(kind)
    names = register_names(out if "{" in out else operand)
    part = np.dtype(UNSIGNED[whole.itemsize // len(names)])
    if "{" in operand:
        reads = [reader(name, part) for name in names]
        write = writer(out, whole)

        def pack(machine: Machine, select: Selection) -> None:
            values = [np.broadcast_to(read(machine, select), machine.lanes[select].shape) for read in reads]
            write(machine, select, np.stack(values, axis=-1).view(whole)[..., 0])

        return pack
    read = reader(operand, whole)
    writes = [writer(name, part) for name in names]

    def unpack(machine: Machine, select: Selection) -> None:
        values = np.ascontiguousarray(read(machine, select)).view(part).reshape(-1, len(names))
        for i, write in enumerate(writes):
            write(machine, select, values[:, i])

    return unpack


def make_comparison(statement: Statement) -> Action:
    """setp.lt.f32 p, a, b; with .and and its like the result is joined with a further predicate; of pairs p|q."""
    _, name, *joint, kind = statement.parts
    out, a, b, *further = statement.operands
    is_so = COMPARISONS[name]
    decoded = from_bfloat16 if kind.startswith("bf16") else np.asarray
    reads = [reader(operand, dtype_of(kind)) for operand in (a, b)]
    others = [reader(operand, np.dtype(bool)) for operand in further]
    join = FUNCTIONS[joint[0]] if others else lambda a: a
    writes = [writer(register, np.dtype(bool)) for register in out.split("|")]
    if (len(writes) == 2) != kind.endswith("x2"):
        raise NotImplementedError(f"of PTX: {statement.text}")

    def compare(machine: Machine, select: Selection) -> None:
        values = [read(machine, select) for read in reads]
        for i, write in enumerate(writes):
            halves = [x >> np.uint32(16 * i) for x in values] if len(writes) == 2 else values
            holds = is_so(*(decoded(x) for x in halves))
            write(machine, select, join(holds, *(read(machine, select) for read in others)))

    return compare


def make_choice(statement: Statement) -> Action:
    """selp d, a, b, p: a where p holds."""
    dtype = dtype_of(statement.parts[-1])
    out, a, b, predicate = statement.operands
    read_a, read_b, holds = reader(a, dtype), reader(b, dtype), reader(predicate, np.dtype(bool))
    write = writer(out, dtype)
    return lambda machine, select: write(
        machine, select, np.where(holds(machine, select), read_a(machine, select), read_b(machine, select))
    )


def make_conversion(statement: Statement) -> Action:
    *modifiers, target, source = statement.parts[1:]
    out, *operands = statement.operands
    reads = [reader(operand, dtype_of(source)) for operand in operands]
    write = writer(out, dtype_of(target))
    flush = without_subnormals if "ftz" in modifiers else lambda x: x
    half = target.removesuffix("x2")

    def convert(machine: Machine, select: Selection) -> None:
        values = [
            converted(flush(np.asarray(read(machine, select))), source, half, tuple(modifiers)) for read in reads
        ]
        if half != target:  # d = (a, b), b in the low bits
            high, low = (np.asarray(x).view(np.uint16).astype(np.uint32) for x in values)
            values = [(high << np.uint32(16)) | low]
        write(machine, select, values[0])

    return convert
