"""The text of PTX as statements."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Statement:
    """``@predicate op.modifiers.type operands;``, and its line."""

    predicate: str
    parts: tuple[str, ...]
    operands: tuple[str, ...]
    text: str


def parse(ptx: str) -> tuple[list[Statement], dict[str, int]]:
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
            found = re.findall(r"\{.*?\}|\[.*?\]|[^,\s{}\[\]]+", operands)
            statements.append(Statement(predicate or "", tuple(opcode.split(".")), tuple(found), line))
    return statements, labels
