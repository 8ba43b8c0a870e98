"""The directions of imports: from the wrapper downstairs, and never back."""

from __future__ import annotations

import ast
import pathlib

import pytest

import fastmask

PACKAGE = pathlib.Path(fastmask.__file__).parent

# A module imports from the floors below its own; on its own floor from its own folder only.
FLOORS = [
    ("__main__",),
    ("demo",),
    ("wrapper",),
    ("generation_mixin",),
    ("evaluation", "generation"),
    ("generation_options", "passes"),
    ("planning",),
    ("upstream",),
    ("backbone", "critic", "diffusers", "distributed", "first_look", "hf", "own_masks", "_cuda_graph"),
    ("_entropy_bound",),
    ("functional",),
    ("ops",),
    ("_check", "_dispatch", "data", "heads", "schedules"),
    ("reference", "kernels"),
    ("vocabulary_parallel",),
    (
        "_autograd",
        "_check_data",
        "_devices",
        "_host_count",
        "_memoised",
        "_modes",
        "_names",
        "_progress",
        "_streams",
        "records",
    ),
]
FLOOR_OF = {name: floor for floor, names in enumerate(FLOORS) for name in names}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE / "kernels").glob("*.py")]
}


def room(module: str) -> str:
    """The folder of a module, or the module itself where it has none."""
    return module.split(".")[0]


def imports(source: str) -> set[str]:
    """Full names of all that a file imports, wherever it does; ``from a import b`` may mean a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def rooms(source: str) -> set[str]:
    """Which rooms of fastmask a file imports from."""
    modules = {name.removeprefix("fastmask.") for name in imports(source) if name.startswith("fastmask.")}
    return {room(module) for module in modules} & set(FLOOR_OF)


def is_allowed(importing: str, imported: str) -> bool:
    return importing == imported or FLOOR_OF[imported] > FLOOR_OF[importing]


def test_every_module_has_a_floor():
    assert len(MODULES) > 30
    assert {room(module) for module in MODULES} - {"__init__"} == set(FLOOR_OF)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"__init__"}))
def test_imports_go_downstairs(module):
    upstairs = [name for name in rooms(MODULES[module].read_text()) if not is_allowed(room(module), name)]
    assert upstairs == []


@pytest.mark.parametrize("module", sorted(MODULES))
def test_only_kernels_import_triton(module):
    names = {name.split(".")[0] for name in imports(MODULES[module].read_text())}
    assert room(module) == "kernels" or "triton" not in names


@pytest.mark.parametrize("module", ["records", "_streams"])
def test_nouns_and_streams_need_nothing_of_fastmask(module):
    assert rooms(MODULES[module].read_text()) == set()


def test_only_the_wrapper_asks_for_compat():
    """Everyone else is handed formulas."""
    asking = {
        module
        for module, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "compat"
    }
    assert asking == {"wrapper"}


def test_a_wrong_direction_is_seen():
    for importing, source in [
        ("reference", "from fastmask.kernels.philox import draw"),
        ("kernels", "from fastmask import functional, reference"),
        ("kernels", "import fastmask.reference.philox"),
        ("ops", "def f():\n    from fastmask import wrapper"),
        ("records", "from fastmask.functional import Sampled"),
        ("generation", "from fastmask.wrapper import NonAutoregressiveWrapper"),
        ("backbone", "from fastmask import critic"),
    ]:
        assert not all(is_allowed(importing, name) for name in rooms(source)), source
    assert rooms("from fastmask import _check, functional\nimport torch.nn.functional as F") == {
        "_check",
        "functional",
    }
