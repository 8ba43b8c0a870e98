"""Statements written by hand, run by the machine: for its own tests."""

from __future__ import annotations

import numpy as np
import torch

from ptx.execution import Machine, Program
from ptx.memory import Region

ORDERS = ("first", "last", "both")  # which warp of a program goes ahead


def run(body: str, *tensors: torch.Tensor, warps=1, programs=(1, 1, 1), shared=0, order="first", cost=None):
    """Runs statements, before which %rd1, %rd2, ... are the tensors' addresses, %r1 the thread, %r2 the program."""
    loads = "\n".join(f"ld.param.b64 %rd{i + 1}, [k_param_{i}];" for i in range(len(tensors)))
    parameters = ",\n".join(f".param .u64 .ptr .global .align 1 k_param_{i}" for i in range(len(tensors)))
    text = f""".visible .entry k(\n{parameters}\n)\n.reqntid {32 * warps}\n{{\n{loads}
        mov.u32 %r1, %tid.x;\nmov.u32 %r2, %ctaid.x;\n{body}\nret;\n}}\n"""
    addresses = np.array([tensor.data_ptr() for tensor in tensors], np.uint64)
    regions = [Region(tensor) for tensor in tensors]
    Machine(
        Program(text), np.arange(np.prod(programs)), programs, warps, shared, addresses, regions, order, cost
    ).run()


def each(statements: str, *inputs: np.ndarray, out: type) -> np.ndarray:
    """%a, %b, ... are elements of the inputs, one for each of 32 threads; what the statements leave in %o."""
    inputs = [np.resize(np.asarray(x), 32) for x in inputs]
    result = np.zeros(32, out)
    registers = {8: "rd", 4: "r", 2: "rs"}

    def register(letter: str, size: int) -> str:
        return f"%{registers[size]}{10 + 'abcdo'.index(letter)}"

    lines = []
    for i, x in enumerate(inputs):
        lines += [f"mad.wide.u32 %rd30, %r1, {x.itemsize}, %rd{i + 1};"]
        lines += [f"ld.global.b{8 * x.itemsize} {{ {register('abcd'[i], x.itemsize)} }}, [ %rd30 + 0 ];"]
        statements = statements.replace(f"%{'abcd'[i]}", register("abcd"[i], x.itemsize))
    statements = statements.replace("%o", register("o", result.itemsize))
    lines += [statements, f"mad.wide.u32 %rd30, %r1, {result.itemsize}, %rd{len(inputs) + 1};"]
    lines += [f"st.global.b{8 * result.itemsize} [ %rd30 + 0 ], {{ {register('o', result.itemsize)} }};"]
    tensors = [torch.from_numpy(x.view(f"i{x.itemsize}")) for x in (*inputs, result)]
    run("\n".join(lines), *tensors)
    return result
