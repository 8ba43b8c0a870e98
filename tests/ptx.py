"""A stand-in for an NVIDIA GPU: what Triton compiles for sm_90 is run on the CPU, from its PTX.

Triton's interpreter shows that a kernel's source is right; this shows that what the compiler made of it is: types and
their conversions, layouts, shuffles, shared memory and barriers. As a driver of Triton's (:func:`activate`) it serves
every launch unchanged. Beyond what a GPU does, it refuses reads and writes outside of the storages that a launch was
given and accesses that are not aligned, poisons registers and shared memory, lets one warp of a program go as far
ahead as barriers allow, so that a missing one is seen, and errs in the last place of approximate functions.

It shows no race between programs, which run side by side, nor one within a warp, whose threads do.

Source: PTX ISA, https://docs.nvidia.com/cuda/parallel-thread-execution; sections named below are of version 9.0. Of
it only what Triton's output for this package needs (``_KNOWN``); anything else raises NotImplementedError.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from triton.backends import Backend, backends
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime import driver

WARP = 32
SECTOR = 32  # bytes that memory moves together
# Threads that are run at once, those of many programs together: enough for numpy, few enough for a cache.
_THREADS = 2**14
_POISON = 0xFF  # a NaN in every format

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_KINDS = {"b": "u", "u": "u", "s": "i", "f": "f"}


def _dtype(name: str) -> np.dtype:
    """numpy's type for one of PTX's: "s32", "b16", "pred"."""
    if name == "pred":
        return np.dtype(bool)
    if name in ("bf16", "bf16x2", "f16x2"):  # held as bits
        return np.dtype(np.uint16 if name == "bf16" else np.uint32)
    return np.dtype(f"{_KINDS[name[0]]}{int(name[1:]) // 8}")


# Operands


@dataclass(frozen=True)
class Statement:
    """``@predicate op.modifiers.type operands;``, and its line."""

    predicate: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


def _statements(ptx: str) -> tuple[list[Statement], dict[str, int]]:
    """The statements of the module's one entry, and where each label points."""
    body = re.search(r"\.entry .*?\)[^{]*\{(.*?)\n\}", ptx, re.DOTALL)[1]
    lines = re.sub(r"//.*", "", body).replace(";", ";\n").splitlines()
    statements: list[Statement] = []
    labels: dict[str, int] = {}
    for line in map(str.strip, lines):
        label = re.fullmatch(r"(\$\w+):", line)
        if label:
            labels[label[1]] = len(statements)
        elif line and not line.startswith("."):
            if line.startswith("{"):
                raise NotImplementedError(f"of PTX: {line}")
            predicate, opcode, operands = re.fullmatch(r"(?:@(!?%\w+)\s+)?([\w.:]+)\s*(.*?)\s*;", line).groups()
            if not _KNOWN.fullmatch(opcode):
                raise NotImplementedError(f"of PTX: {line}")
            found = re.findall(r"\{.*?\}|\[.*?\]|[^,\s{}\[\]]+", operands)
            statements.append(Statement(predicate or "", tuple(opcode.split(".")), tuple(found), line))
    return statements, labels


def _names(operand: str) -> list[str]:
    """The registers of a vector ``{a, b}``, or the one of a scalar."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def _immediate(text: str, dtype: np.dtype) -> Any:
    """A constant: 12, -3, 0x1F, 0f3F800000 (bits of a float32), 0d... (of a float64)."""
    if text[:2] in ("0f", "0F", "0d", "0D"):
        return np.array(int(text[2:], 16), _UNSIGNED[len(text) // 2 - 1]).view(dtype)[()]
    if dtype.kind == "b":
        return np.bool_(int(text, 0) != 0)
    return np.array(int(text.rstrip("U"), 0) & (256**dtype.itemsize - 1), _UNSIGNED[dtype.itemsize]).view(dtype)[()]


def _parameter_address(name: str) -> int:
    """Eight bytes for each parameter."""
    return 8 * int(name.rpartition("_")[2])


def _width(register: str) -> Any:
    """What a register holds, by its name, as LLVM gives them."""
    kind = re.match(r"%([a-z]+)\d", register)[1]
    return {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64}[kind]


Selection = Any  # of threads: a slice or an index array
Read = Callable[["Machine", Selection], Any]


def _reader(operand: str, dtype: np.dtype) -> Read:
    """A function that gives an operand's values, one for each thread selected or one for all."""
    negated = operand.startswith("!")
    name = operand.lstrip("!")
    if "_param_" in name:
        value = dtype.type(_parameter_address(name))
        return lambda machine, select: value
    if not name.startswith("%"):
        value = np.uint32(0) if name == "global_smem" else _immediate(name, dtype)
        return lambda machine, select: value
    if name in _SPECIAL:
        return lambda machine, select: machine.special[name][select]
    if negated:
        return lambda machine, select: ~machine.registers[name][select]
    if dtype.itemsize < np.dtype(_width(name)).itemsize:
        bits = _UNSIGNED[dtype.itemsize]
        return lambda machine, select: machine.registers[name][select].astype(bits).view(dtype)
    return lambda machine, select: machine.registers[name][select].view(dtype)


def _writer(register: str, dtype: np.dtype) -> Callable[[Machine, Selection, Any], None]:
    """A function that stores values of a type, extended to the register's width."""
    if register == "_":
        return lambda machine, select, values: None
    bits = np.dtype(_width(register))
    if dtype.itemsize == bits.itemsize:
        extended = lambda values: values.view(bits)  # noqa: E731
    else:
        extended = lambda values: values.astype(f"{dtype.kind}{bits.itemsize}").view(bits)  # noqa: E731

    def write(machine: Machine, select: Selection, values: Any) -> None:
        machine.registers[register][select] = extended(np.asarray(values, dtype))

    return write


_SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid")


# Arithmetic: functions of numpy arrays of the statement's type


def _canonical(x: Any) -> Any:
    """float32 results with the one NaN that a GPU gives, of no sign."""
    return np.where(x == x, x, np.uint32(0x7FFFFFFF).view(np.float32))


def _flushed(x: Any) -> Any:
    """Subnormal numbers as zeros of their sign (.ftz)."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _approximate(exact: Any) -> Any:
    """float32 of a float64 result, every fourth one off by a unit in the last place, as a hash of it says.

    The manual allows up to two of ex2 and div; powers of two, which the hardware hits, are left.
    """
    x = np.asarray(exact, np.float64).astype(np.float32)
    bits = x.view(np.int32)
    dice = (bits.astype(np.uint32) * np.uint32(2654435761)) >> np.uint32(29)
    unit = (dice == 0).astype(np.int32) - (dice == 1)
    is_plain = np.isfinite(x) & (np.abs(x) > 1e-30) & (np.abs(x) < 1e30) & (bits & 0x7FFFFF != 0)
    return np.where(is_plain, bits + unit, bits).astype(np.int32).view(np.float32)


def _approximate_quotient(a: Any, b: Any) -> Any:
    """a times an approximate reciprocal of b, which does not overflow or underflow before the product does."""
    mantissa, exponent = np.frexp(b.astype(np.float32))
    quotient = np.asarray(a, np.float64) * _approximate(1 / mantissa.astype(np.float64))
    return np.ldexp(quotient, -exponent).astype(np.float32)


def _fma(a: Any, b: Any, c: Any) -> Any:
    """a b + c, rounded once: by way of float64 with its rounding error, which decides what lies on a tie."""
    product = a.astype(np.float64) * b.astype(np.float64)  # exact
    c = np.asarray(c, np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    # Rounded to odd, the sum rounds to float32 as the exact one does.
    bits = np.ascontiguousarray(total).view(np.int64)
    away = (error > 0) == (total > 0)
    odd = np.where(away, bits, bits - 1) | 1
    return np.where((error != 0) & np.isfinite(total), odd.view(np.float64), total).astype(np.float32)


def _shifted_left(a: Any, amount: Any) -> Any:
    width = a.dtype.itemsize * 8
    amount = np.asarray(amount, np.uint32)
    return np.where(amount < width, a << np.minimum(amount, width - 1).astype(a.dtype), a.dtype.type(0))


def _shifted_right(a: Any, amount: Any) -> Any:
    """Signs fill what a signed number leaves, zeros an unsigned one."""
    width = a.dtype.itemsize * 8
    amount = np.asarray(amount, np.uint32)
    shifted = a >> np.minimum(amount, width - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(amount < width, shifted, a.dtype.type(0))


def _quotient(a: Any, b: Any) -> Any:
    """Integer division toward zero, which C and PTX mean."""
    if a.dtype.kind == "u":
        return a // b
    quotient = a // b
    return quotient + ((quotient < 0) & (quotient * b != a))


def _high(a: Any, b: Any) -> Any:
    """The upper half of a product."""
    if a.dtype.itemsize == 4:
        wide = np.dtype(f"{a.dtype.kind}8")
        return (a.astype(wide) * np.asarray(b).astype(wide) >> wide.type(32)).astype(a.dtype)
    a, b = np.broadcast_arrays(a, b)
    products = [int(x) * int(y) >> 64 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    return np.array(products, dtype=object).astype(a.dtype)


def _permuted(a: Any, b: Any, selector: Any) -> Any:
    """prmt.b32, its default mode: each nibble of the selector picks a byte of b:a, or, with its top bit, its sign."""
    pool = a.astype(np.uint64) | (np.asarray(b).astype(np.uint64) << np.uint64(32))
    out = np.zeros_like(a)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i)) & np.uint32(15)
        byte = (pool >> (np.uint64(8) * (nibble & np.uint32(7)).astype(np.uint64))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(nibble & np.uint32(8), sign, byte)
        out = out | (byte.astype(np.uint32) << np.uint32(8 * i))
    return out


def _field(a: Any, position: Any, length: Any) -> Any:
    """bfe: so many bits from a position on, with the sign of the last; none give 0."""
    width = np.uint32(8 * a.dtype.itemsize)
    position, length = position & np.uint32(255), length & np.uint32(255)
    length = np.minimum(length, width - np.minimum(position, width))
    raised = _shifted_left(a, width - position - length)
    return np.where(length == 0, a.dtype.type(0), _shifted_right(raised, width - length))


def _extreme(a: Any, b: Any, of_numbers: Any, is_least: bool) -> Any:
    """The least or largest, of a number and NaN the number unless told otherwise; -0 is less than 0."""
    a, b = np.broadcast_arrays(a, b)
    found = of_numbers(a, b)
    if a.dtype.kind != "f":
        return found
    bits = np.dtype(_UNSIGNED[a.itemsize])
    signs = a.view(bits) | b.view(bits) if is_least else a.view(bits) & b.view(bits)
    return np.where((a == 0) & (b == 0), signs.view(a.dtype), found)


_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "fma": lambda a, b, c: _fma(np.asarray(a), np.asarray(b), c),
    "neg": lambda a: -a,
    "abs": np.abs,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "not": lambda a: ~a,
    "shl": _shifted_left,
    "shr": _shifted_right,
    "min": lambda a, b: _extreme(a, b, np.fmin, True),
    "max": lambda a, b: _extreme(a, b, np.fmax, False),
    "rem": lambda a, b: a - _quotient(a, b) * b,
    "popc": np.bitwise_count,
    "bfe": _field,
    "prmt": _permuted,
    "mov": lambda a: a,
    "mad": lambda a, b, c: a * b + c,
    "ex2": lambda a: _approximate(np.exp2(a.astype(np.float64))),
    "lg2": lambda a: _approximate(np.log2(a.astype(np.float64))),
    "rcp": lambda a: _approximate(1 / a.astype(np.float64)),
    "sqrt": lambda a: _approximate(np.sqrt(a.astype(np.float64))),
}


def _division(modifiers: tuple[str, ...]) -> Callable[[Any, Any], Any]:
    if "full" in modifiers or "approx" in modifiers:
        return _approximate_quotient
    return lambda a, b: a / b if np.asarray(a).dtype.kind == "f" else _quotient(a, b)


_IS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a != b) & (a == a) & (b == b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "num": lambda a, b: (a == a) & (b == b),
}
# The unordered comparisons, true where a NaN is.
_IS |= {f"{name}u": lambda a, b, is_so=is_so: is_so(a, b) | (a != a) | (b != b) for name, is_so in _IS.items()}
_IS["nan"] = lambda a, b: (a != a) | (b != b)


def _from_bfloat16(bits: Any) -> Any:
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def _to_bfloat16(x: Any) -> Any:
    """The nearest bfloat16 of a float32, ties to even, as bits."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(x != x, np.uint16(0x7FFF), rounded.astype(np.uint16))


def _converted(x: Any, source: str, target: str, modifiers: tuple[str, ...]) -> Any:
    """cvt: to the nearest number of the target, or as rzi, rmi, rpi, rni say; integers beyond its range saturate."""
    if source == "bf16":
        x, source = _from_bfloat16(x), "f32"
    for name, rounded in (("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil), ("rni", np.rint)):
        if name in modifiers:
            x = rounded(x)
    if target == "bf16":
        return _to_bfloat16(x)
    dtype = _dtype(target)
    if source[0] == "f" and dtype.kind == "i":
        limits = np.iinfo(dtype)
        nan = 0 if dtype.itemsize < 8 else limits.min
        inside = (x >= float(limits.min)) & (x < float(limits.max))
        values = np.where(inside, x, 0).astype(dtype)
        values = np.where(x >= float(limits.max), dtype.type(limits.max), values)
        values = np.where(x < float(limits.min), dtype.type(limits.min), values)
        return np.where(x != x, dtype.type(nan), values)
    return x.astype(dtype)


# Statements as functions of the machine and the threads that run them

Action = Callable[["Machine", Selection], None]

# Everything that is done as the manual says, with every modifier.
_KNOWN = re.compile(
    "|".join(
        (
            r"(add|sub|mul|div|fma)(\.rn)?(\.ftz)?\.f32",
            r"div\.(full|approx)(\.ftz)?\.f32",
            r"(ex2|lg2|sqrt|rcp)\.approx(\.ftz)?\.f32",
            r"(min|max)(\.ftz)?(\.NaN)?\.f32",
            r"(min|max)(\.NaN)?\.b?f16",
            r"(abs|neg)(\.ftz)?\.f32",
            r"(add|sub|min|max|div|rem|neg|abs)\.[su](16|32|64)",
            r"(mul|mad)\.(lo|wide)\.[su](16|32|64)",
            r"mul\.hi\.[su](32|64)",
            r"(and|or|xor|not)\.(pred|b16|b32|b64)",
            r"(shl\.b|shr\.[bsu])(16|32|64)",
            r"(popc\.b|bfe\.[su])(32|64)",
            r"prmt\.b32",
            r"mov\.(pred|[bsuf](16|32|64))",
            r"setp\.(eq|ne|lt|le|gt|ge)(\.(and|or|xor))?\.[bsu](16|32|64)",
            r"setp\.(eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan)(\.(and|or|xor))?\.(f16|f32|f64|bf16|bf16x2)",
            r"selp\.[bsuf](16|32|64)",
            r"cvt\.[su](8|16|32|64)\.[su](8|16|32|64)",
            r"cvt\.rn\.f(32|64)\.[su](8|16|32|64)",
            r"cvt(\.rn)?\.(f32|f64)\.(f16|bf16|f32|f64)",
            r"cvt\.rn\.b?f16(x2)?\.f32",
            r"cvt\.r[zmpn]i(\.ftz)?\.(f32\.f32|s32\.f32|s64\.f32)",
            r"ld\.(global|shared|shared::cta|param)(\.v[24])?\.[bsuf](8|16|32|64)",
            r"st\.(global|shared|shared::cta)(\.v[24])?\.[bsuf](8|16|32|64)",
            r"shfl\.sync\.(bfly|up|down|idx)\.b32",
            r"redux\.sync\.((add|min|max)\.[su]32|(and|or)\.b32)",
            r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(::cta)?\.b16",
            r"bra(\.uni)?|ret|bar\.sync|barrier\.sync(\.aligned)?|bar\.warp\.sync",
        )
    )
)


def _action(statement: Statement) -> Action:
    """What a statement does, to threads for which its predicate holds."""
    act = _MAKERS.get(statement.parts[0], _arithmetic)(statement)
    if not statement.predicate:
        return act
    holds = _reader(statement.predicate, np.dtype(bool))

    def act_where(machine: Machine, select: Selection) -> None:
        mask = np.broadcast_to(holds(machine, select), machine.lanes[select].shape)
        if mask.all():
            act(machine, select)
        elif mask.any():
            act(machine, machine.lanes[select][mask])

    return act_where


def _arithmetic(statement: Statement) -> Action:
    name, *modifiers = statement.parts
    modifiers, kind = tuple(modifiers[:-1]), modifiers[-1]
    out, *operands = statement.operands
    if name == "mov" and any("{" in operand for operand in (out, *operands)):
        return _packing(kind, out, operands[0])
    dtype = result = _dtype(kind)
    function = _division(modifiers) if name == "div" else _ARITHMETIC[name]
    dtypes = [dtype] * len(operands)
    if name in ("shl", "shr"):
        dtypes[1] = np.dtype(np.uint32)
    elif name == "bfe":
        dtypes[1:] = [np.dtype(np.uint32)] * 2
    elif name == "popc":
        result = np.dtype(np.uint32)
    elif "hi" in modifiers:
        function = _high
    elif "wide" in modifiers:
        result = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")
        dtypes[2:] = [result] * len(dtypes[2:])
        narrow = function
        function = lambda a, b, *c: narrow(np.asarray(a).astype(result), np.asarray(b).astype(result), *c)  # noqa: E731
    if "NaN" in modifiers:
        of_numbers = {"min": np.minimum, "max": np.maximum}[name]
        function = lambda a, b: _extreme(a, b, of_numbers, name == "min")  # noqa: E731
    if kind == "bf16":
        in_float32 = function
        function = lambda *values: _to_bfloat16(in_float32(*map(_from_bfloat16, values)))  # noqa: E731
    reads = [_reader(operand, dtype) for operand, dtype in zip(operands, dtypes, strict=True)]
    write = _writer(out, result)
    flushed = _flushed if "ftz" in modifiers else lambda x: x
    canonical = _canonical if kind == "f32" and name not in ("mov", "neg", "abs") else lambda x: x

    def compute(machine: Machine, select: Selection) -> None:
        values = function(*(flushed(read(machine, select)) for read in reads))
        write(machine, select, canonical(flushed(values)))

    return compute


def _packing(kind: str, out: str, operand: str) -> Action:
    """mov between a register and a vector of narrower ones, the first of which is the low bits."""
    whole = _dtype(kind)
    names = _names(out if "{" in out else operand)
    part = np.dtype(_UNSIGNED[whole.itemsize // len(names)])
    if "{" in operand:
        reads = [_reader(name, part) for name in names]
        write = _writer(out, whole)

        def pack(machine: Machine, select: Selection) -> None:
            values = [np.broadcast_to(read(machine, select), machine.lanes[select].shape) for read in reads]
            write(machine, select, np.stack(values, axis=-1).view(whole)[..., 0])

        return pack
    read = _reader(operand, whole)
    writes = [_writer(name, part) for name in names]

    def unpack(machine: Machine, select: Selection) -> None:
        values = np.ascontiguousarray(read(machine, select)).view(part).reshape(-1, len(names))
        for i, write in enumerate(writes):
            write(machine, select, values[:, i])

    return unpack


def _comparison(statement: Statement) -> Action:
    """setp.lt.f32 p, a, b; with .and and its like the result is joined with a further predicate; of pairs p|q."""
    _, name, *joint, kind = statement.parts
    out, a, b, *further = statement.operands
    is_so = _IS[name]
    decoded = _from_bfloat16 if kind.startswith("bf16") else np.asarray
    reads = [_reader(operand, _dtype(kind)) for operand in (a, b)]
    others = [_reader(operand, np.dtype(bool)) for operand in further]
    join = _ARITHMETIC[joint[0]] if others else lambda a: a
    writes = [_writer(register, np.dtype(bool)) for register in out.split("|")]
    if (len(writes) == 2) != kind.endswith("x2"):
        raise NotImplementedError(f"of PTX: {statement.text}")

    def compare(machine: Machine, select: Selection) -> None:
        values = [read(machine, select) for read in reads]
        for i, write in enumerate(writes):
            halves = [x >> np.uint32(16 * i) for x in values] if len(writes) == 2 else values
            holds = is_so(*(decoded(x) for x in halves))
            write(machine, select, join(holds, *(read(machine, select) for read in others)))

    return compare


def _choice(statement: Statement) -> Action:
    """selp d, a, b, p: a where p holds."""
    dtype = _dtype(statement.parts[-1])
    out, a, b, predicate = statement.operands
    read_a, read_b, holds = _reader(a, dtype), _reader(b, dtype), _reader(predicate, np.dtype(bool))
    write = _writer(out, dtype)
    return lambda machine, select: write(
        machine, select, np.where(holds(machine, select), read_a(machine, select), read_b(machine, select))
    )


def _conversion(statement: Statement) -> Action:
    *modifiers, target, source = statement.parts[1:]
    out, *operands = statement.operands
    reads = [_reader(operand, _dtype(source)) for operand in operands]
    write = _writer(out, _dtype(target))
    flush = _flushed if "ftz" in modifiers else lambda x: x
    half = target.removesuffix("x2")

    def convert(machine: Machine, select: Selection) -> None:
        values = [
            _converted(flush(np.asarray(read(machine, select))), source, half, tuple(modifiers)) for read in reads
        ]
        if half != target:  # d = (a, b), b in the low bits
            high, low = (np.asarray(x).view(np.uint16).astype(np.uint32) for x in values)
            values = [(high << np.uint32(16)) | low]
        write(machine, select, values[0])

    return convert


def _address(operand: str) -> Read:
    """``[%rd1 + 8]``, ``[global_smem+16]``: int64, one for each thread selected."""
    base, offset = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
    offset = int(offset or "0", 0)
    read = _reader(base, np.dtype(_width(base) if base.startswith("%") else np.uint32))

    def address(machine: Machine, select: Selection) -> Any:
        return np.broadcast_to(read(machine, select), machine.lanes[select].shape).astype(np.int64) + offset

    return address


def _memory_access(statement: Statement) -> tuple[str, np.dtype]:
    return statement.parts[1].removesuffix("::cta"), _dtype(statement.parts[-1])


def _load(statement: Statement) -> Action:
    space, dtype = _memory_access(statement)
    out, place = statement.operands
    writes = [_writer(name, dtype) for name in _names(out)]
    address = _address(place)

    def load(machine: Machine, select: Selection) -> None:
        places = machine.places(space, address(machine, select), dtype, len(writes), select, statement)
        for i, write in enumerate(writes):
            write(machine, select, places.values[places.index + i])

    return load


def _store(statement: Statement) -> Action:
    space, dtype = _memory_access(statement)
    place, operand = statement.operands
    reads = [_reader(name, dtype) for name in _names(operand)]
    address = _address(place)

    def store(machine: Machine, select: Selection) -> None:
        places = machine.places(space, address(machine, select), dtype, len(reads), select, statement)
        for i, read in enumerate(reads):
            places.values[places.index + i] = read(machine, select)

    return store


def _warps(machine: Machine, select: Selection, statement: Statement) -> Any:
    """The threads selected, [warps, 32]: all of each warp, which a statement of the whole warp needs."""
    lanes = machine.lanes[select]
    if len(lanes) % WARP or (lanes.reshape(-1, WARP) != lanes[::WARP, None] + np.arange(WARP)).any():
        raise RuntimeError(f"not every thread of a warp takes part: {statement.text}")
    return lanes.reshape(-1, WARP)


def _shuffle(statement: Statement) -> Action:
    """shfl.sync.mode.b32 d, a, b, c, all (9.7.9.6)."""
    mode = statement.parts[2]
    dtype, integer = np.dtype(np.uint32), np.dtype(np.int32)
    out, a, b, c, _ = statement.operands
    out, _, is_inside = out.partition("|")
    read, read_b, read_c = _reader(a, dtype), _reader(b, integer), _reader(c, integer)
    write, write_inside = _writer(out, dtype), _writer(is_inside or "_", np.dtype(bool))

    def shuffle(machine: Machine, select: Selection) -> None:
        shape = _warps(machine, select, statement).shape
        values = np.broadcast_to(read(machine, select), shape[0] * WARP).reshape(shape)
        b, c = (
            np.broadcast_to(x(machine, select), shape[0] * WARP).reshape(shape).astype(np.int64)
            for x in (read_b, read_c)
        )
        lane, b = np.arange(WARP), b & 31
        segment, clamp = c >> 8 & 31, c & 31
        last = (lane & segment) | (clamp & ~segment)
        first = lane & segment
        source = {"bfly": lane ^ b, "up": lane - b, "down": lane + b, "idx": first | (b & ~segment)}[mode]
        inside = source >= last if mode == "up" else source <= last
        values = np.take_along_axis(values, np.where(inside, source, lane), axis=1)
        write(machine, select, values.ravel())
        write_inside(machine, select, inside.ravel())

    return shuffle


def _reduction(statement: Statement) -> Action:
    """redux.sync.op.type d, a, all."""
    _, _, name, kind = statement.parts
    reduce = {"add": np.sum, "min": np.min, "max": np.max, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce}
    dtype = _dtype(kind)
    out, a, _ = statement.operands
    read, write = _reader(a, dtype), _writer(out, dtype)

    def reduce_warps(machine: Machine, select: Selection) -> None:
        shape = _warps(machine, select, statement).shape
        values = np.broadcast_to(read(machine, select), shape[0] * WARP).reshape(shape)
        write(machine, select, np.repeat(reduce[name](values, axis=1).astype(dtype), WARP))

    return reduce_warps


def _matrices(statement: Statement) -> Action:
    """ldmatrix and stmatrix .m8n8.x1/.x2/.x4(.trans).shared.b16 (9.7.14.5.15): eight threads give the addresses of
    the rows of each 8 x 8 matrix, of which every thread holds two elements."""
    is_load = statement.parts[0] == "ldmatrix"
    place, vector = sorted(statement.operands)  # "[" comes before "{"
    names = _names(vector)
    bits = np.dtype(np.uint32)
    reads, writes = [_reader(name, bits) for name in names], [_writer(name, bits) for name in names]
    address = _address(place)
    lane, element = np.arange(WARP)[:, None], np.arange(2)
    row, column = lane // 4 + 0 * element, 2 * (lane % 4) + element
    if "trans" in statement.parts:
        row, column = column, row

    def move(machine: Machine, select: Selection) -> None:
        warps = len(_warps(machine, select, statement))
        rows = address(machine, select).reshape(warps, WARP)
        if (rows[:, : 8 * len(names)] % 16).any():
            raise RuntimeError(f"an address that is not divisible by 16: {statement.text}")
        pairs = np.repeat(machine.lanes[select], 2)
        for i, (read, write) in enumerate(zip(reads, writes, strict=True)):
            places = rows[:, 8 * i + row] + 2 * column
            found = machine.places("shared", places.ravel(), np.dtype(np.uint16), 1, pairs, statement)
            if is_load:
                write(machine, select, found.values[found.index].view(bits))
            else:
                values = np.broadcast_to(read(machine, select), warps * WARP)
                found.values[found.index] = np.ascontiguousarray(values).view(np.uint16)

    return move


_MAKERS: dict[str, Callable[[Statement], Action]] = {
    "setp": _comparison,
    "selp": _choice,
    "cvt": _conversion,
    "ld": _load,
    "st": _store,
    "shfl": _shuffle,
    "redux": _reduction,
    "ldmatrix": _matrices,
    "stmatrix": _matrices,
}


# Programs and what runs them


@dataclass(frozen=True)
class Step:
    """A statement, ready to run, or one after which threads may go different ways, wait or end."""

    kind: str
    act: Action | None
    target: int
    predicate: Read | None


class Program:
    """The code of a kernel."""

    def __init__(self, ptx: str) -> None:
        self.num_parameters = len(set(re.findall(r"\.param .*?_param_(\d+)", ptx)))
        statements, labels = _statements(ptx)
        self.registers = sorted(set(re.findall(r"%(?:p|rs|r|rd)\d+", " ".join(s.text for s in statements))))
        self.steps = [self._step(statement, labels) for statement in statements]
        # Where threads that went different ways may meet again.
        self.starts = frozenset(labels.values())

    @staticmethod
    def _step(statement: Statement, labels: dict[str, int]) -> Step:
        name = statement.parts[0]
        predicate = _reader(statement.predicate, np.dtype(bool)) if statement.predicate else None
        if name == "bra":
            return Step("branch", None, labels[statement.operands[0]], predicate)
        if name == "ret":
            return Step("end", None, -1, predicate)
        if name in ("bar", "barrier"):
            kind = "warp barrier" if "warp" in statement.parts else "barrier"
            return Step(kind, None, -1, predicate)
        return Step("", _action(statement), -1, None)


@dataclass(frozen=True)
class Places:
    """values: memory as elements of one type; index: which of them each thread means."""

    values: Any
    index: Any


class Region:
    """The storage of a tensor that a launch was given."""

    def __init__(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.start, self.end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        self._origin = self.start // 16 * 16
        size = (self.end - self._origin + 15) // 16 * 16
        self._bytes = np.frombuffer((ctypes.c_uint8 * size).from_address(self._origin), np.uint8)

    def places(self, addresses: Any, dtype: np.dtype) -> Places:
        return Places(self._bytes.view(dtype), (addresses - self._origin) // dtype.itemsize)


@dataclass
class Cost:
    """What a launch of a kernel took.

    read, written: bytes of global memory that its warps asked for at each statement, in whole sectors of 32 bytes, as
    caches see it. statements: of PTX, each once for each warp that ran it: about the instructions of a GPU.
    """

    kernel: str
    read: int = 0
    written: int = 0
    statements: int = 0


class Machine:
    """Runs some programs of a launch, all of their threads side by side.

    Threads are ordered by turn, then program, then lane: the warps whose turn it is are a slice. order: "first" lets
    the first warp of a program go ahead, "last" the last, "both" the first of every other program and the last of the
    rest.
    """

    def __init__(
        self,
        program: Program,
        programs: Any,
        grid: tuple[int, int, int],
        num_warps: int,
        shared: int,
        parameters: Any,
        regions: list[Region],
        order: str,
        cost: Cost | None = None,
    ) -> None:
        self.program, self.parameters, self.regions = program, parameters, regions
        self.cost = cost
        self.num_warps, self.num_programs = num_warps, len(programs)
        shape = (num_warps, len(programs), WARP)
        size = num_warps * len(programs) * WARP
        self.lanes = np.arange(size)
        self.registers = {name: self._poisoned(name, size) for name in program.registers}
        self.shared_size = (shared + 15) // 16 * 16
        self.shared = np.full((len(programs), self.shared_size), _POISON, np.uint8)
        turn, index, lane = (x.ravel() for x in np.broadcast_arrays(*np.ogrid[tuple(slice(n) for n in shape)]))
        is_reversed = {"first": False, "last": True, "both": programs[index] % 2 == 1}[order]
        warp = np.where(is_reversed, num_warps - 1 - turn, turn)
        x, y, z = np.unravel_index(programs[index], grid, order="F")
        self.program_index = index
        values = (warp * WARP + lane, x, y, z, *(np.full(size, n) for n in grid), lane)
        self.special = {name: v.astype(np.uint32) for name, v in zip(_SPECIAL, values, strict=True)}
        self.counter = np.zeros(size, np.int64)
        self.is_waiting = np.zeros(size, bool)
        self.is_live = np.ones(size, bool)

    @staticmethod
    def _poisoned(register: str, size: int) -> Any:
        return np.full(size * np.dtype(_width(register)).itemsize, _POISON, np.uint8).view(_width(register))

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while self.is_live.any():
                if not (self.is_live & ~self.is_waiting).any():
                    self._release()
                self._advance(self._next())

    def _release(self) -> None:
        """Lets every program's threads pass the barrier at which all of them wait."""
        waiting = self.is_waiting.reshape(self.num_warps, self.num_programs, WARP)
        live = self.is_live.reshape(waiting.shape)
        if (waiting.any((0, 2)) & ~live.all((0, 2))).any():
            raise RuntimeError("some threads of a program wait at a barrier that others never reach")
        self.is_waiting[:] = False

    def _next(self) -> Selection:
        """The threads that run next: of one warp of each program, those that are furthest behind."""
        runnable = self.is_live & ~self.is_waiting
        turn = np.flatnonzero(runnable.reshape(self.num_warps, -1).any(axis=1))[0]
        size = self.num_programs * WARP
        candidates = slice(turn * size, (turn + 1) * size)
        runnable, counter = runnable[candidates], self.counter[candidates]
        behind = runnable & (counter == counter[runnable].min())
        return candidates if behind.all() else self.lanes[candidates][behind]

    def _advance(self, select: Selection) -> None:
        """Runs statements until the threads may part or meet others."""
        first = counter = int(self.counter[select][0])
        steps, starts = self.program.steps, self.program.starts
        while True:
            step = steps[counter]
            counter += 1
            if step.kind == "":
                step.act(self, select)
            elif step.kind != "warp barrier":  # a warp's threads run together here
                self._turn(step, counter, select)
                break
            if counter in starts:
                self.counter[select] = counter
                break
        if self.cost is not None:
            self.cost.statements += (counter - first) * len(np.unique(self.lanes[select] // WARP))

    def _turn(self, step: Step, following: int, select: Selection) -> None:
        self.counter[select] = following
        if step.predicate is not None:
            mask = np.broadcast_to(step.predicate(self, select), self.lanes[select].shape)
            select = self.lanes[select][mask]
        if step.kind == "branch":
            self.counter[select] = step.target
        elif step.kind == "barrier":
            self.is_waiting[select] = True
        else:
            self.is_live[select] = False

    def places(
        self, space: str, addresses: Any, dtype: np.dtype, count: int, select: Selection, statement: Statement
    ) -> Places:
        """Where so many elements from each address on lie; refuses what is outside of memory or not aligned."""
        size = dtype.itemsize * count
        if (addresses % size).any():
            raise RuntimeError(f"an address that is not divisible by {size}: {statement.text}")
        first, end = int(addresses.min()), int(addresses.max()) + size
        if space == "param":
            return Places(self.parameters.view(dtype), addresses // dtype.itemsize)
        if space == "shared":
            if first < 0 or end > self.shared_size:
                raise RuntimeError(f"outside of {self.shared_size} bytes of shared memory: {statement.text}")
            own = self.program_index[select] * self.shared_size + addresses
            return Places(self.shared.reshape(-1).view(dtype), own // dtype.itemsize)
        if self.cost is not None:
            warps = self.lanes[select] // WARP
            sectors = len(np.unique(addresses // SECTOR + (warps << 44)))
            if statement.parts[0] == "ld":
                self.cost.read += sectors * SECTOR
            else:
                self.cost.written += sectors * SECTOR
        for region in self.regions:
            if region.start <= first and end <= region.end:
                return region.places(addresses, dtype)
        raise RuntimeError(f"outside of what the launch was given, or of two tensors at once: {statement.text}")


# Triton's driver


class _Launcher:
    """What Triton calls to launch a kernel, with its arguments in order."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self._types = list(source.signature.values())
        self._metadata = metadata

    def __call__(self, x: int, y: int, z: int, stream: int, program: Any, *rest: Any) -> None:
        arguments = rest[4:]
        given = [(kind, value) for kind, value in zip(self._types, arguments, strict=True) if kind != "constexpr"]
        regions = [Region(value) for _, value in given if isinstance(value, torch.Tensor) and value.numel()]
        parameters = np.zeros(program.num_parameters, np.uint64)  # what Triton adds, its scratch memory, is null
        parameters[: len(given)] = [_packed(kind, value) for kind, value in given]
        grid, warps, shared = (x, y, z), self._metadata.num_warps, self._metadata.shared
        cost = None
        if _Driver.costs is not None:
            cost = Cost(self._metadata.name)
            _Driver.costs.append(cost)
        together = max(1, _THREADS // (warps * WARP))
        for first in range(0, x * y * z, together):
            programs = np.arange(first, min(first + together, x * y * z))
            Machine(program, programs, grid, warps, shared, parameters, regions, _Driver.order, cost).run()


def _packed(kind: str, value: Any) -> int:
    """An argument's bits: a pointer, an integer or a float."""
    if kind.startswith("*"):
        return 0 if value is None else value.data_ptr()
    if kind.startswith("fp"):
        number = np.array(value, f"f{int(kind[2:]) // 8}")
        return int(number.view(_UNSIGNED[number.itemsize]))
    return int(value) % 2 ** int(kind[1:])


class _Backend(CUDABackend):
    """Triton's compiler for NVIDIA, up to PTX."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.binary_ext = "ptx"

    def add_stages(self, stages: dict[str, Any], options: Any, language: Any) -> None:
        super().add_stages(stages, options, language)
        del stages["cubin"]

    def hash(self) -> str:
        return "ptx only, " + super().hash()


class _Utilities:
    """What Triton asks of a device."""

    @staticmethod
    def get_device_properties(device: int) -> dict[str, int]:
        return {"max_shared_mem": 232448}

    @staticmethod
    def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[None, Program, int, int, int]:
        """Module, function, registers and spills, of which nothing is known, and the most threads of a program."""
        return None, Program(kernel.decode()), 0, 0, 1024


class _Driver(DriverBase):
    """An H200 in the place of the CPU."""

    utils = _Utilities
    launcher_cls = _Launcher
    order = "first"
    costs: list[Cost] | None = None

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, WARP)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def activate(order: str) -> None:
    """Makes every launch of this process run here.

    order: which warp of a program goes ahead, see :class:`Machine`.
    """
    _Driver.order = order
    backends["nvidia"] = Backend(_Backend, _Driver)
    driver.set_active(_Driver())


@contextmanager
def costs() -> Iterator[list[Cost]]:
    """Gathers what each launch takes, in order."""
    _Driver.costs = []
    try:
        yield _Driver.costs
    finally:
        _Driver.costs = None
