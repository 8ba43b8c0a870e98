"""Compile kernels for GPUs that are not there, and tell what the compilers made of them.

Run as a script, without TRITON_INTERPRET: launch plans come as JSON on stdin, figures go as JSON to stdout.
Loops are told by their instructions, largest first; passes are those with no loop inside that load 16 bytes at once.
A plan is what the launcher would ask Triton for:

    {"name": "1024", "module": "fastmask.kernels.x", "kernel": "_x_kernel", "options": {"num_warps": 4},
     "args": {"x_ptr": "*i64:16", "N": "i32", "BLOCK_N": 1024}, "gfx942": {"options": {"num_warps": 2}}}

A target's name, which may be left out, says what differs there. A string such as "*i64:16" is a type (":16":
divisible by 16); any other value is a constant.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
_TYPE = re.compile(r"(\*?(?:i1|[iu](?:8|16|32|64)|bf16|fp16|fp32|fp64))(:16)?")


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        plans = json.load(sys.stdin)
        figures = {plan["name"]: {name: _figures(plan, name) for name in TARGETS} for plan in plans}
    json.dump(figures, sys.stdout)


def _figures(plan: dict, target_name: str) -> dict:
    compiled = _compile(plan, target_name)
    if target_name.startswith("sm_"):
        return _nvidia_figures(compiled.asm["cubin"])
    return _amd_figures(compiled.asm["amdgcn"])


def _compile(plan: dict, target_name: str):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    plan = plan | {part: plan[part] | changes for part, changes in plan.get(target_name, {}).items()}
    kernel = getattr(importlib.import_module(plan["module"]), plan["kernel"])
    missing = set(kernel.arg_names) ^ set(plan["args"])
    assert not missing, f"plan {plan['name']}: arguments that differ from the kernel's: {sorted(missing)}"
    signature, constants, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        value = plan["args"][name]
        spec = _TYPE.fullmatch(value) if isinstance(value, str) else None
        if spec is None:
            signature[name], constants[name] = "constexpr", value
            continue
        signature[name] = spec[1]
        if spec[2]:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget(*TARGETS[target_name])
    assert plan["options"]["num_warps"] * target.warp_size <= 1024, "more lanes than a program can have"
    return triton.compile(source, target=target, options=plan["options"])


def _nvidia_figures(cubin: bytes) -> dict:
    import triton.backends.nvidia

    cuobjdump = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([cuobjdump, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "-sass")
        )
    code = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
        if not text.startswith("NOP")
    ]
    loops = _loops(code)
    # "No spill" is STACK 0 and no local loads or stores: LOCAL stays 0 even with thousands of spills.
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "spills": sum(bool(re.search(r"\b(STL|LDL)\b", text)) for _, text in code),
        "instructions": len(code),
        "loops": [len(loop) for loop in loops],
        "passes": [len(loop) for loop in loops if len(_loops(loop)) == 1 and _widest(loop, "LDG") == 128],
        "load_bits": _widest(code, "LDG"),
        "store_bits": _widest(code, "STG"),
    }


def _loops(code: list[tuple[int, str]]) -> list[list[tuple[int, str]]]:
    """The code of each loop, largest first: what a backward branch jumps over."""
    loops = []
    for address, text in code:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            loops.append([line for line in code if int(target[1], 16) <= line[0] <= address])
    return sorted(loops, key=len, reverse=True)


def _widest(code: list[tuple[int, str]], operation: str) -> int:
    """The most bits that a thread moves in one such operation."""
    found = [name for _, text in code for name in re.findall(rf"\b{operation}\S*", text)]
    narrow = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128}
    return max((max([narrow.get(part, 0) for part in text.split(".")]) or 32 for text in found), default=0)


def _amd_figures(assembly: str) -> dict:
    def number(field: str) -> int:
        return int(re.search(rf"\.{field}:\s+(\d+)", assembly)[1])

    body = re.findall(r"^\s+([sv]_\w+|(?:global|buffer|flat|ds|scratch)_\w+)", assembly, re.MULTILINE)
    return {
        "registers": number("vgpr_count"),
        "stack": number("private_segment_fixed_size"),
        "spills": number("vgpr_spill_count"),
        "scalar_spills": number("sgpr_spill_count"),
        "instructions": len(body),
    }


if __name__ == "__main__":
    main()
