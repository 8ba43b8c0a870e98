"""Statements of whole warps: shuffles, reductions, matrices in shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ptx.memory import address_reader
from ptx.operands import WARP, Action, Selection, dtype_of, reader, register_names, writer
from ptx.parsing import Statement

if TYPE_CHECKING:
    from ptx.execution import Machine


def whole_warps(machine: Machine, select: Selection, statement: Statement) -> Any:
    """The threads selected, [warps, 32]: all of each warp, which a statement of the whole warp needs."""
    lanes = machine.lanes[select]
    if len(lanes) % WARP or (lanes.reshape(-1, WARP) != lanes[::WARP, None] + np.arange(WARP)).any():
        raise RuntimeError(f"not every thread of a warp takes part: {statement.text}")
    return lanes.reshape(-1, WARP)


def make_shuffle(statement: Statement) -> Action:
    """shfl.sync.mode.b32 d, a, b, c, all (9.7.9.6)."""
    mode = statement.parts[2]
    dtype, integer = np.dtype(np.uint32), np.dtype(np.int32)
    out, a, b, c, _ = statement.operands
    out, _, is_inside = out.partition("|")
    read, read_b, read_c = reader(a, dtype), reader(b, integer), reader(c, integer)
    write, write_inside = writer(out, dtype), writer(is_inside or "_", np.dtype(bool))

    def shuffle(machine: Machine, select: Selection) -> None:
        shape = whole_warps(machine, select, statement).shape
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


def make_reduction(statement: Statement) -> Action:
    """redux.sync.op.type d, a, all."""
    _, _, name, kind = statement.parts
    reduce = {"add": np.sum, "min": np.min, "max": np.max, "and": np.bitwise_and.reduce, "or": np.bitwise_or.reduce}
    dtype = dtype_of(kind)
    out, a, _ = statement.operands
    read, write = reader(a, dtype), writer(out, dtype)

    def reduce_warps(machine: Machine, select: Selection) -> None:
        shape = whole_warps(machine, select, statement).shape
        values = np.broadcast_to(read(machine, select), shape[0] * WARP).reshape(shape)
        write(machine, select, np.repeat(reduce[name](values, axis=1).astype(dtype), WARP))

    return reduce_warps


def make_matrix_move(statement: Statement) -> Action:
    """ldmatrix and stmatrix .m8n8.x1/.x2/.x4(.trans).shared.b16 (9.7.14.5.15): eight threads give the addresses of
    the rows of each 8 x 8 matrix, of which every thread holds two elements."""
    is_load = statement.parts[0] == "ldmatrix"
    place, vector = sorted(statement.operands)  # "[" comes before "{"
    names = register_names(vector)
    bits = np.dtype(np.uint32)
    reads, writes = [reader(name, bits) for name in names], [writer(name, bits) for name in names]
    address = address_reader(place)
    lane, element = np.arange(WARP)[:, None], np.arange(2)
    row, column = lane // 4 + 0 * element, 2 * (lane % 4) + element
    if "trans" in statement.parts:
        row, column = column, row

    def move(machine: Machine, select: Selection) -> None:
        warps = len(whole_warps(machine, select, statement))
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
