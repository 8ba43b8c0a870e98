"""What tests share: backends, where networks are, what was masked, poisoned memory, figures of compiled kernels.

Without a GPU, or where the user exports TRITON_INTERPRET=1, kernels run in Triton's interpreter on the CPU; with
``--ptx`` on the CPU too, but as compiled for a GPU (``tests/ptx/README.md``). Triton reads that variable when it is
imported, so it is set here, before any test module is.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_map_only

torch.set_num_threads(1)  # the tests run side by side, and most tensors are small

_HAS_TRITON = importlib.util.find_spec("triton") is not None
collect_ignore = ["ptx"] * (not _HAS_TRITON) + ["hf_training.py"] * (not importlib.util.find_spec("transformers"))
_KERNEL_BACKEND = "cuda"  # or "interpreter", "ptx": see pytest_configure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ptx",
        choices=["first", "last", "both"],
        help="run kernels as compiled for sm_90 on the CPU; which warp goes ahead: see tests/ptx/README.md",
    )


def pytest_configure(config: pytest.Config) -> None:
    global _KERNEL_BACKEND
    order = config.getoption("--ptx")
    if order:
        os.environ["TRITON_INTERPRET"] = "0"
        importlib.import_module("ptx").activate(order)
        importlib.import_module("fastmask._dispatch")._interpreting = lambda: True  # the CPU has a Triton of its own
        _KERNEL_BACKEND = "ptx"
    elif os.environ.get("TRITON_INTERPRET", "0") == "1" or not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
        _KERNEL_BACKEND = "interpreter"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What the interpreter takes long for is slow there; with ``--ptx`` only what runs on it is run."""
    for item in items:
        if item.get_closest_marker("slow_interpreted") and "interpreter" in re.split(r"[\[\]-]", item.name):
            item.add_marker("slow")
    if config.getoption("--ptx"):
        runs = [isinstance(item, pytest.Function) and "ptx" in re.split(r"[\[\]-]", item.name) for item in items]
        config.hook.pytest_deselected(items=[item for item, is_run in zip(items, runs, strict=True) if not is_run])
        items[:] = [item for item, is_run in zip(items, runs, strict=True) if is_run]


# The files that take longest, in the suite or in what is slow. They begin first: a file stays in one process, and the
# others would wait for it at the end.
_LONGEST = (
    "test_compiled_sample_tokens", "test_compiled_vocabulary_filter", "test_compiled_masked_cross_entropy",
    "test_functional_settings", "test_vocabulary_filter", "test_fuzz_operations", "test_examples", "test_demask_step",
    "test_sample_tokens_per_sequence", "test_functional_compile", "test_wrapper_compile", "test_sample_tokens_rows",
    "test_demo", "test_cuda_graph", "test_packaging", "test_linear_masked_cross_entropy", "test_sample_tokens_filter",
)  # fmt: skip


@pytest.hookimpl(specname="pytest_collection_modifyitems", trylast=True)
def pytest_longest_files_first(items: list[pytest.Item]) -> None:
    place = {name: i for i, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


def pytest_collection_finish() -> None:
    """What was imported and collected stays: the garbage collector need not look through it again and again."""
    if _HAS_TRITON and _KERNEL_BACKEND == "interpreter":
        importlib.import_module("interpreting").quicken()
    gc.freeze()


@dataclass(frozen=True)
class Backend:
    """One way to run an operation: the reference, or the kernel, interpreted, on a GPU or on its stand-in."""

    name: str
    device: torch.device

    def module(self, operation: str):
        return importlib.import_module(f"{self.package}.{operation}")

    def operation(self, operation: str) -> Callable:
        """The function of that name, ``mask_sampling`` say."""
        return getattr(self.module(operation), operation)

    def run(self, function: Callable, *arguments, **options):
        """A public function on this backend: tensors go to its device, results come back to the CPU."""
        to_device = partial(tree_map_only, torch.Tensor, lambda tensor: tensor.to(self.device))
        chosen = "triton" if self.is_kernel else "reference"
        out = function(*to_device(arguments), backend=chosen, **to_device(options))
        return tree_map_only(torch.Tensor, torch.Tensor.cpu, out)

    @property
    def package(self) -> str:
        return "fastmask.reference" if self.name == "reference" else "fastmask.kernels"

    @property
    def is_kernel(self) -> bool:
        return self.name != "reference"


def _backend(name: str) -> Backend:
    return Backend(name, torch.device("cuda" if _KERNEL_BACKEND == "cuda" else "cpu"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for ``backend`` runs once for each backend of this machine: the reference, and the
    kernel, unless the module names an OPERATION that has none yet; one that asks for ``kernel``, on the kernel."""
    if "kernel" in metafunc.fixturenames:
        kernels = [_KERNEL_BACKEND] if _HAS_TRITON else [pytest.param("", marks=pytest.mark.skip("no triton"))]
        metafunc.parametrize("kernel", kernels, indirect=True, scope="session")
    if "backend" in metafunc.fixturenames:
        operation = getattr(metafunc.module, "OPERATION", "mask_sampling")
        has_kernel = _HAS_TRITON and importlib.util.find_spec(f"fastmask.kernels.{operation}") is not None
        names = ["reference", _KERNEL_BACKEND] if has_kernel else ["reference"]
        metafunc.parametrize("backend", names, indirect=True, scope="session")


@pytest.fixture(scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    """One of the backends that ``pytest_generate_tests`` chose."""
    return _backend(request.param)


@pytest.fixture(scope="session")
def reference() -> Backend:
    """The specification, on the device the kernels run on."""
    return _backend("reference")


@pytest.fixture(scope="session")
def kernel(request: pytest.FixtureRequest) -> Backend:
    """The kernels only, for tests that hold them to the reference."""
    return _backend(request.param)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where networks are: on the GPU, if there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What was masked, in order: MaskedTokens."""
    functional = importlib.import_module("fastmask.functional")
    masks, sampling = [], functional.mask_sampling
    monkeypatch.setattr(functional, "mask_sampling", lambda *a, **k: masks.append(sampling(*a, **k)) or masks[-1])
    return masks


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what ``torch.empty`` returns with NaN, the largest integer or True: an unwritten output is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def figures(request: pytest.FixtureRequest) -> dict[str, dict[str, dict]]:
    """Figures of the module's OPERATION, by program and target; see ``benchmarks/compiled.py``.

    All programs are compiled for its TARGETS, or each for those that its WANTED names. Registers, spills and
    instructions are of one compiler: elsewhere the tests that hold them to bounds are skipped.
    """
    constraints = (Path(__file__).parents[1] / "constraints.txt").read_text()
    (pinned,) = re.findall(r"^triton==(\S+)", constraints, re.MULTILINE)
    version = importlib.metadata.version("triton") if _HAS_TRITON else "missing"
    if version != pinned:
        pytest.skip(f"the figures are of Triton {pinned} (constraints.txt), which is {version} here")
    importlib.import_module("benchmark_helpers")  # which finds benchmarks/
    compiled, programs = (importlib.import_module(f"benchmarks.{name}") for name in ("compiled", "programs"))
    operation = request.module.OPERATION
    wanted = getattr(request.module, "WANTED", None)
    return compiled.figures(operation, wanted or dict.fromkeys(programs.PROGRAMS[operation], request.module.TARGETS))
