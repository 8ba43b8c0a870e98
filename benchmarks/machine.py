"""What is known of this machine: its device, the installed versions, and how fast it copies and multiplies."""

from __future__ import annotations

import importlib.metadata
import pathlib
import platform

import torch

from benchmarks import timing
from benchmarks.records import Ceilings, Floor
from benchmarks.timing import QUICK

PACKAGES = (
    "fastmask", "torch", "triton", "x-transformers", "liger-kernel", "cut-cross-entropy", "fla-core",
    "quack-kernels", "nvidia-cutlass-dsl", "flash-attn", "flashinfer-python", "vllm",
)  # fmt: skip

_best: dict[torch.device, Ceilings] = {}


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on CUDA, float32 on a CPU, where bfloat16 is emulated."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "CPU")


def versions() -> dict[str, str]:
    """Of the packages that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def ceilings(device: torch.device) -> Ceilings:
    """The best that was measured so far in this process, in the device's default dtype."""
    if device not in _best:
        measure_ceilings(device)
    return _best[device]


def measure_ceilings(device: torch.device) -> None:
    """Some rounds with the same clock as everything else; the best of them counts, and of all before them."""
    is_cuda, dtype = device.type == "cuda", default_dtype(device)
    size, numel = (8192, 2**30) if is_cuda else (1024, 2**25)
    source = torch.randn(numel, device=device, dtype=dtype)
    target = torch.empty_like(source)
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    product = torch.empty_like(a)
    runs = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=product)}
    least = {name: min(times) for name, times in timing.time_rounds(runs, {}, device, QUICK).items()}
    copied = Floor(2 * numel * source.element_size(), None, "GB/s").rate_of(least["copy"])
    multiplied = Floor(2 * size**3, None, "TFLOP/s").rate_of(least["product"])
    remember_ceilings(device, Ceilings(copied, multiplied))


def remember_ceilings(device: torch.device, found: Ceilings) -> None:
    """What was measured now, or in an earlier part of this run."""
    before = _best.get(device, Ceilings(0.0, 0.0))
    _best[device] = Ceilings(max(before.copy, found.copy), max(before.product, found.product))


def describe(device: torch.device) -> str:
    """The device, the versions, and the ceilings measured so far."""
    limits = ceilings(device)
    versions_told = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"{device_name(device)}; {versions_told}\n"
        f"measured here: copy {limits.copy:.0f} GB/s, product {limits.product:.3g} TFLOP/s"
    )
