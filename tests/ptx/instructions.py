"""Which instructions there are, and what runs each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ptx.arithmetic import make_arithmetic, make_choice, make_comparison, make_conversion
from ptx.memory import make_load, make_policy, make_store
from ptx.operands import Action, Selection, reader
from ptx.parsing import Statement
from ptx.warps import make_matrix_move, make_reduction, make_shuffle

# Everything that is done as the manual says, with every modifier.
KNOWN = re.compile(
    "|".join(
        (
            r"(add|sub|mul|div|fma)(\.rn)?(\.ftz)?\.f32",
            r"div\.(full|approx)(\.ftz)?\.f32",
            r"(ex2|lg2|sqrt|rcp)\.approx(\.ftz)?\.f32",
            r"(min|max)(\.ftz)?(\.NaN)?\.f32",
            r"(min|max)(\.NaN)?\.b?f16",
            r"(abs|neg)(\.ftz)?\.f32",
            r"(add|sub|min|max|div|rem|neg|abs)\.[su](16|32|64)",
            r"(min|max)\.relu\.s32",
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
            r"createpolicy\.fractional\.L2::evict_(first|last)\.b64",
            r"(ld|st)\.global\.L1::evict_(first|last)\.L2::cache_hint(\.v[24])?\.[bsuf](8|16|32|64)",
            r"shfl\.sync\.(bfly|up|down|idx)\.b32",
            r"redux\.sync\.((add|min|max)\.[su]32|(and|or)\.b32)",
            r"(ld|st)matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(::cta)?\.b16",
            r"bra(\.uni)?|ret|bar\.sync|barrier\.sync(\.aligned)?|bar\.warp\.sync",
        )
    )
)

if TYPE_CHECKING:
    from ptx.execution import Machine


MAKERS: dict[str, Callable[[Statement], Action]] = {
    "setp": make_comparison,
    "selp": make_choice,
    "cvt": make_conversion,
    "ld": make_load,
    "st": make_store,
    "createpolicy": make_policy,
    "shfl": make_shuffle,
    "redux": make_reduction,
    "ldmatrix": make_matrix_move,
    "stmatrix": make_matrix_move,
}


def make_action(statement: Statement) -> Action:
    """What a statement does, to threads for which its predicate holds."""
    act = MAKERS.get(statement.parts[0], make_arithmetic)(statement)
    if not statement.predicate:
        return act
    holds = reader(statement.predicate, np.dtype(bool))

    def act_where(machine: Machine, select: Selection) -> None:
        mask = np.broadcast_to(holds(machine, select), machine.lanes[select].shape)
        if mask.all():
            act(machine, select)
        elif mask.any():
            act(machine, machine.lanes[select][mask])

    return act_where
