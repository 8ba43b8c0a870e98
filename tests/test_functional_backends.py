"""Which backend a door takes, and what it says where that cannot run."""

from __future__ import annotations

import importlib
import inspect
import pathlib
import re

import pytest
import torch
from calls import (
    EMBEDDINGS,
    LOGITS,
    WEIGHT,
    confidence,
    critic,
    dense,
    linear,
    linear_sample,
    mask,
    remask,
    sample,
    select,
    select_at_random,
)

import fastmask
from fastmask import _dispatch


@pytest.fixture
def dispatch(monkeypatch):
    """_dispatch with nothing set: no variable, no interpreter."""
    monkeypatch.delenv(_dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return monkeypatch


def pretend(monkeypatch, *, kernel=True, triton=True):
    """Which kernels there are, and whether Triton is, whatever this machine has."""
    monkeypatch.setattr(_dispatch, "KERNELS", _dispatch.OPERATIONS if kernel else [])
    monkeypatch.setattr(_dispatch, "HAS_TRITON", triton)


CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda"), torch.device("mps")


def test_auto_takes_the_kernel_on_a_gpu_and_the_reference_elsewhere(dispatch):
    pretend(dispatch)
    assert _dispatch.choose("sample_tokens", CUDA) == ("triton", "kernel on this GPU")
    assert _dispatch.choose("sample_tokens", CPU)[0] == "reference"
    assert "does not run on cpu" in _dispatch.choose("sample_tokens", CPU)[1]
    assert _dispatch.choose("sample_tokens", MPS)[0] == "reference"
    dispatch.setenv("TRITON_INTERPRET", "1")
    assert _dispatch.choose("sample_tokens", CPU) == ("reference", "auto interprets no kernels on cpu")


def test_auto_falls_back_where_triton_or_the_kernel_is_missing(dispatch):
    pretend(dispatch, triton=False)
    assert _dispatch.choose("sample_tokens", CUDA) == ("reference", "Triton is not installed (pip install triton)")
    pretend(dispatch, kernel=False)
    assert _dispatch.choose("sample_tokens", CUDA) == ("reference", "no Triton kernel for sample_tokens yet")


def test_triton_that_cannot_run_says_why_and_what_to_do(dispatch):
    remedy = re.escape("; use backend='reference'")
    pretend(dispatch)
    interpret = re.escape("(TRITON_INTERPRET=1 interprets kernels, slowly)")
    with pytest.raises(
        RuntimeError, match=f"backend=triton cannot run sample_tokens: .* not run on cpu {interpret}{remedy}"
    ):
        _dispatch.choose("sample_tokens", CPU, "triton")
    with pytest.raises(RuntimeError, match="does not run on mps"):
        _dispatch.choose("sample_tokens", MPS, "triton")
    for value in ("1", "true", "ON", "yes"):
        dispatch.setenv("TRITON_INTERPRET", value)
        assert _dispatch.choose("sample_tokens", CPU, "triton") == ("triton", "backend=triton")
    dispatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(RuntimeError, match="does not run on cpu"):
        _dispatch.choose("sample_tokens", CPU, "triton")
    assert _dispatch.choose("sample_tokens", CUDA, "triton") == ("triton", "backend=triton")
    pretend(dispatch, triton=False)
    with pytest.raises(RuntimeError, match=rf"Triton is not installed \(pip install triton\){remedy}"):
        _dispatch.choose("sample_tokens", CUDA, "triton")
    pretend(dispatch, kernel=False)
    with pytest.raises(RuntimeError, match=f"no Triton kernel for sample_tokens yet{remedy}"):
        _dispatch.choose("sample_tokens", CUDA, "triton")


def test_the_variable_overrides_auto_only(dispatch):
    pretend(dispatch)
    dispatch.setenv("FASTMASK_BACKEND", "reference")
    assert _dispatch.choose("sample_tokens", CUDA) == ("reference", "FASTMASK_BACKEND=reference")
    assert _dispatch.choose("sample_tokens", CUDA, "triton") == ("triton", "backend=triton")
    dispatch.setenv("FASTMASK_BACKEND", "triton")
    assert _dispatch.choose("sample_tokens", CUDA) == ("triton", "FASTMASK_BACKEND=triton")
    assert _dispatch.choose("sample_tokens", CUDA, "reference") == ("reference", "backend=reference")
    with pytest.raises(RuntimeError, match="FASTMASK_BACKEND=triton cannot run sample_tokens"):
        _dispatch.choose("sample_tokens", CPU)
    for value in ("", "auto"):
        dispatch.setenv("FASTMASK_BACKEND", value)
        assert _dispatch.choose("sample_tokens", CUDA)[0] == "triton"


def test_the_variable_does_not_insist_on_a_kernel_that_is_not_written(dispatch):
    pretend(dispatch, kernel=False)
    dispatch.setenv("FASTMASK_BACKEND", "triton")
    assert _dispatch.choose("sample_tokens", CUDA) == ("reference", "no Triton kernel for sample_tokens yet")


def test_an_unknown_name_names_its_source(dispatch):
    with pytest.raises(ValueError, match="expected backend= to be one of auto, triton, reference; received 'gpu'"):
        _dispatch.choose("sample_tokens", CPU, "gpu")
    dispatch.setenv("FASTMASK_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"expected FASTMASK_BACKEND= to be one of .*; received 'fast'"):
        sample()


def test_every_operation_has_its_reference(dispatch):
    for operation in _dispatch.OPERATIONS:
        module = importlib.import_module(f"fastmask.reference.{operation}")
        function = getattr(module, {"remask": "remask_"}.get(operation, operation))
        assert _dispatch.implementation(function, CPU, "reference") is function
        assert _dispatch.implementation(function, CPU) is function


@pytest.mark.parametrize("operation", _dispatch.KERNELS)
def test_a_kernels_function_has_its_references_signature(operation):
    """So that either may be called for the other."""
    if not _dispatch.HAS_TRITON:
        pytest.skip("no triton")
    reference, kernels = (importlib.import_module(f"fastmask.{x}.{operation}") for x in ("reference", "kernels"))
    names = [name for name, value in vars(reference).items() if inspect.isfunction(value) and name[0] != "_"]
    own = [name for name in names if vars(reference)[name].__module__ == reference.__name__]
    shared = [name for name in own if hasattr(kernels, name)]
    assert operation.removesuffix("_") in [name.removesuffix("_") for name in shared]
    for name in shared:
        assert inspect.signature(getattr(reference, name)) == inspect.signature(getattr(kernels, name)), name


def test_float64_is_computed_by_pytorch(dispatch):
    """The kernels compute in float32: a caller who insists is told, the default and the variable fall back."""
    pretend(dispatch)
    losses = ["masked_cross_entropy", "linear_masked_cross_entropy"]
    for operation in losses:
        assert _dispatch.choose(operation, CUDA, dtype=torch.bfloat16)[0] == "triton"
        assert _dispatch.choose(operation, CUDA, dtype=torch.float64)[0] == "reference"
        with pytest.raises(RuntimeError, match="kernels compute in float32, not float64; use backend='reference'"):
            _dispatch.choose(operation, CUDA, "triton", torch.float64)
    dispatch.setenv("FASTMASK_BACKEND", "triton")
    for operation in losses:
        assert _dispatch.choose(operation, CUDA, dtype=torch.float64)[0] == "reference"
    dense(LOGITS.double())
    linear(EMBEDDINGS.double(), WEIGHT.double())


def test_the_door_hands_backend_on(monkeypatch):
    """Each function asks for its own operation, with the caller's backend."""
    asked = []

    def spy(function, device, backend, dtype=None):
        asked.append((function.__module__, backend))
        return function

    monkeypatch.setattr(_dispatch, "implementation", spy)
    calls = [(mask, "mask_sampling"), (dense, "masked_cross_entropy"), (linear, "linear_masked_cross_entropy")]
    calls += [(sample, "sample_tokens"), (linear_sample, "sample_tokens"), (select, "remask"), (remask, "remask")]
    calls += [(select_at_random, "select_at_random")]
    for function, operation in calls:
        function(backend="triton")
        assert asked.pop() == (f"fastmask.reference.{operation}", "triton")
    critic(noise_scale=1.0, backend="triton")
    confidence(choice_temperature=1.0, backend="triton")
    assert asked == [("fastmask.reference.remask", "triton")] * 2


def test_kernels_are_those_in_the_folder():
    folder = pathlib.Path(fastmask.__file__).parent / "kernels"
    assert [name for name in _dispatch.OPERATIONS if (folder / f"{name}.py").exists()] == _dispatch.KERNELS
    assert "mask_sampling" in _dispatch.KERNELS
