"""The house itself: layout, directions of imports, the doctor, the command line, documents, versions."""

from __future__ import annotations

import ast
import importlib.metadata
import math
import pathlib
import re
import subprocess
import sys

import pytest
import torch
from packaging.requirements import Requirement

import fastmask
from fastmask import __main__, _dispatch

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = pathlib.Path(fastmask.__file__).parent

in_checkout = pytest.mark.skipif(
    not (ROOT / "pyproject.toml").exists(), reason="needs the checkout around the tests, not an installed wheel"
)


def run_python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


@in_checkout
def test_kernels_are_a_link_and_never_a_top_level_package():
    assert (ROOT / "fastmask" / "kernels").is_symlink()
    assert (ROOT / "fastmask" / "kernels").readlink() == pathlib.Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["reference"] + ["triton"] * _dispatch.HAS_TRITON)
def test_the_first_call_of_a_process_can_be_compiled(chosen):
    code = """
import sys, torch
from fastmask import functional
def loss(x, w, y, m):
    return functional.linear_masked_cross_entropy(x, w, y, m, num_masked=3, backend=sys.argv[1]).loss
arguments = torch.ones(1, 3, 2), torch.ones(4, 2), torch.zeros(1, 3).long(), torch.ones(1, 3).bool()
fullgraph = sys.argv[1] == "triton"  # the reference compacts its rows by their number
print(torch.compile(loss, fullgraph=fullgraph, backend="aot_eager")(*arguments).item())
"""
    assert float(run_python(code, chosen)) == pytest.approx(math.log(4))


@in_checkout
def test_each_kernel_has_a_reference_and_a_test():
    for kernel in (ROOT / "kernels").glob("[!_]*.py"):
        assert (ROOT / "fastmask" / "reference" / kernel.name).exists(), kernel.name
        assert_tested(kernel.stem)


def assert_tested(name: str) -> None:
    """By a file of that name, or by several, one a subject."""
    assert [*(ROOT / "tests").glob(f"test_{name}.py"), *(ROOT / "tests").glob(f"test_{name}_*.py")], name


@in_checkout
def test_each_operation_has_a_benchmark_and_a_reference():
    for operation in _dispatch.OPERATIONS:
        assert (ROOT / "fastmask" / "reference" / f"{operation}.py").exists()
        assert (ROOT / "benchmarks" / f"bench_{operation}.py").exists()
        assert (ROOT / "fastmask" / "ops" / f"{operation}.py").exists()
        assert_tested(operation)


def test_typed_marker_is_installed():
    assert (PACKAGE / "py.typed").exists()


def test_import_and_train_without_triton_tqdm_numpy_or_x_transformers():
    code = """
import sys
missing = ("triton", "tqdm", "numpy", "x_transformers", "matplotlib", "sklearn")
sys.modules.update(dict.fromkeys(missing))  # None: importing them raises ModuleNotFoundError
import torch, fastmask
net = torch.nn.Sequential(torch.nn.Embedding(5, 8), torch.nn.Linear(8, 5))
net.num_tokens, net.max_seq_len = 5, 6
model = fastmask.NonAutoregressiveWrapper(net, mask_id=4)
model(torch.randint(0, 4, (2, 6))).loss.backward()
assert model.generate(2, filter_thres=0.5, progress=True).shape == (2, 6)
assert not any(sys.modules[name] for name in missing)
print("trained")
"""
    assert run_python(code).strip() == "trained"


def test_import_is_light():
    """Where no kernel can run: elsewhere torch.compile needs them imported beforehand."""
    code = """
import os, sys, torch
os.environ.pop("TRITON_INTERPRET", None)
torch.version.cuda = torch.version.hip = None
import fastmask
print(*sorted(sys.modules))
"""
    loaded = run_python(code).split()
    extras = ("triton", "x_transformers", "matplotlib", "sklearn", "diffusers", "transformers", "fastmask.demo")
    assert not [name for name in loaded if name in extras or name.startswith("fastmask.kernels.")]


@pytest.mark.parametrize(
    ("library", "found", "module", "expected", "remedy"),
    [
        ("diffusers", "None", "diffusers", "expected diffusers of at least 0.39", "'fastmask[diffusers]'"),
        ("transformers", "type(sys)('transformers')", "hf.diffusion_gemma",
         "expected transformers of at least 5.11 for fastmask.hf.diffusion_gemma",
         "'fastmask[hf]' 'transformers>=5.11'"),
    ],
)  # fmt: skip
def test_a_library_that_is_missing_or_too_old_is_told(library, found, module, expected, remedy):
    code = f"""
import sys
sys.modules["{library}"] = {found}
try:
    import fastmask.{module}
except ImportError as error:
    print(error)
"""
    told = run_python(code)
    assert expected in told
    assert f"pip install {remedy}" in told


def test_doctor_names_versions_devices_and_a_reason_for_each_backend():
    report = __main__.doctor()
    assert f"fastmask {fastmask.__version__}" in report
    assert f"torch {importlib.metadata.version('torch')}" in report
    for operation in _dispatch.OPERATIONS:
        backend, reason = _dispatch.choose(operation, torch.device("cpu"))
        assert re.search(rf"{operation} +{backend} \({re.escape(reason)}\)", report)
    assert "net.linear_head() returning fastmask.Head" in report


def test_doctor_survives_a_wrong_environment_variable(monkeypatch):
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "fast")
    assert "error: expected FASTMASK_BACKEND= to be one of auto, triton, reference; received 'fast'" in (
        __main__.doctor()
    )


def test_command_line(capsys):
    assert __main__.main(["doctor"]) == 0
    assert "mask_sampling" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        __main__.main(["nonsense"])
    with pytest.raises(SystemExit, match=r"^0$"):
        __main__.main(["--version"])
    assert capsys.readouterr().out == f"fastmask {fastmask.__version__}\n"


@in_checkout
def test_readme_commands_are_those_that_ci_runs():
    commands = re.findall(r"^pip install -c constraints.txt .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == [
        "pip install -c constraints.txt -e '.[demo]' && python -m fastmask demo",
        "pip install -c constraints.txt -e '.[test]' && python -m pytest",
    ]


PAGES = sorted(path.relative_to(ROOT) for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


@in_checkout
@pytest.mark.parametrize("page", PAGES, ids=str)
def test_python_blocks_run(page):
    """Those of a page one after the other, as a reader would type them."""
    namespace = {"__name__": "page"}
    for block in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block, str(page), "exec"), namespace)


def written_files() -> list[pathlib.Path]:
    """What people write and read: code and documents."""
    folders = ("fastmask", "kernels", "tests", "benchmarks", "docs")
    found = [path for folder in folders for kind in ("*.py", "*.md") for path in (ROOT / folder).rglob(kind)]
    return [*found, *ROOT.glob("*.md")]


@in_checkout
def test_documents_that_are_cited_are_there():
    for path in written_files():
        text = path.read_text()
        for cited in re.findall(r"\bdocs/\w+\.md\b", text):
            assert (ROOT / cited).exists(), f"{path} cites {cited}"
        if path.suffix == ".md":
            for link in re.findall(r"\]\(([^)#:\s]+)[^):]*\)", text):
                assert (path.parent / link).exists(), f"{path} links to {link}"
        assert path.name == "test_packaging.py" or not re.search(r"\bDESIGN\b", text), path


# Versions


def table(name: str) -> str:
    """What stands in a list of pyproject.toml, as text: tomllib is not there before Python 3.11."""
    return re.search(rf"^{name} = (\[.*?\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)[1]


def declared_pythons() -> list[str]:
    return re.findall(r'"Programming Language :: Python :: (3\.\d+)"', table("classifiers"))


@in_checkout
def test_classifiers_begin_with_the_oldest_python():
    assert f'requires-python = ">={declared_pythons()[0]}"' in (ROOT / "pyproject.toml").read_text()


@in_checkout
def test_constraints_pin_each_package_once_on_every_python():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    for python in declared_pythons():
        valid = [pin.name for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
        assert sorted(valid) == sorted({pin.name for pin in pins})


@in_checkout
def test_every_package_is_listed():
    found = {"fastmask", "fastmask.kernels"}
    found |= {f"fastmask.{path.parent.name}" for path in (ROOT / "fastmask").glob("*/__init__.py")}
    assert found == set(ast.literal_eval(table("packages")))


def test_data_is_there_after_import():
    assert run_python("import fastmask; print(fastmask.data.__name__)").strip() == "fastmask.data"


def test_doctor_tells_variables_and_packages(monkeypatch):
    monkeypatch.setenv(_dispatch.ENVIRONMENT_VARIABLE, "reference")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    report = __main__.doctor()
    assert "\nFASTMASK_BACKEND = reference\n" in report
    assert "\nTRITON_INTERPRET = (not set)\n" in report
    for package in ("triton", "numpy", "x-transformers", "tqdm", "matplotlib", "scikit-learn"):
        assert re.search(rf"^{package} \S+", report, re.MULTILINE), package
    assert re.search(r"^cpu: ", report, re.MULTILINE)
