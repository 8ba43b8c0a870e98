"""Memory: the storages that a launch was given, and the statements that load and store."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ptx.operands import Action, Read, Selection, dtype_of, reader, register_names, width_of, writer
from ptx.parsing import Statement

if TYPE_CHECKING:
    from ptx.execution import Machine


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


def address_reader(operand: str) -> Read:
    """``[%rd1 + 8]``, ``[global_smem+16]``: int64, one for each thread selected."""
    base, offset = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", operand).groups()
    offset = int(offset or "0", 0)
    read = reader(base, np.dtype(width_of(base) if base.startswith("%") else np.uint32))

    def address(machine: Machine, select: Selection) -> Any:
        return np.broadcast_to(read(machine, select), machine.lanes[select].shape).astype(np.int64) + offset

    return address


def space_and_type(statement: Statement) -> tuple[str, np.dtype]:
    return statement.parts[1].removesuffix("::cta"), dtype_of(statement.parts[-1])


def make_load(statement: Statement) -> Action:
    space, dtype = space_and_type(statement)
    out, place, *_ = statement.operands
    writes = [writer(name, dtype) for name in register_names(out)]
    address = address_reader(place)

    def load(machine: Machine, select: Selection) -> None:
        places = machine.places(space, address(machine, select), dtype, len(writes), select, statement)
        for i, write in enumerate(writes):
            write(machine, select, places.values[places.index + i])

    return load


def make_store(statement: Statement) -> Action:
    space, dtype = space_and_type(statement)
    place, operand, *_ = statement.operands
    reads = [reader(name, dtype) for name in register_names(operand)]
    address = address_reader(place)

    def store(machine: Machine, select: Selection) -> None:
        places = machine.places(space, address(machine, select), dtype, len(reads), select, statement)
        for i, read in enumerate(reads):
            places.values[places.index + i] = read(machine, select)

    return store


def make_policy(statement: Statement) -> Action:
    """How caches keep what is loaded or stored (section 9.7.9.2), which nothing here depends on."""
    write = writer(statement.operands[0], np.dtype(np.uint64))

    def set_policy(machine: Machine, select: Selection) -> None:
        write(machine, select, np.zeros(machine.lanes[select].shape, np.uint64))

    return set_policy
