"""The command line: ``python -m fastmask demo``, ``python -m fastmask doctor``, ``fastmask --version``."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence

import torch

import fastmask
from fastmask import _dispatch, demo

PACKAGES = (
    "torch",
    "triton",
    "einops",
    "numpy",
    "x-transformers",
    "tqdm",
    "matplotlib",
    "scikit-learn",
    "transformers",
    "diffusers",
)

HEADS = (
    "NonAutoregressiveWrapper(net, head=an nn.Linear of net)",
    "net.linear_head() returning fastmask.Head",
    "an nn.Linear called to_logits beside return_embeddings=, once a run has proved it",
    "x-transformers' TransformerWrapper with a plain or tied head",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="fastmask", description=fastmask.__doc__)
    parser.add_argument("--version", action="version", version=f"fastmask {fastmask.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    demo.add_arguments(commands.add_parser("demo", help="train a MaskGIT on handwritten digits, and sample it"))
    commands.add_parser("doctor", help="versions, devices and backends: the first thing a bug report contains")
    arguments = parser.parse_args(argv)
    if arguments.command == "doctor":
        print(doctor())
        return 0
    return demo.run(arguments)


def doctor() -> str:
    """Versions, devices, which backend each operation will use and why, and which networks skip logits."""
    lines = [f"fastmask {fastmask.__version__} ({os.path.dirname(fastmask.__file__)})"]
    lines.append(f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} CPU cores")
    lines += [f"{package} {_version(package)}" for package in PACKAGES]
    for name in (_dispatch.ENVIRONMENT_VARIABLE, "TRITON_INTERPRET"):
        lines.append(f"{name} = {os.environ.get(name, '(not set)')}")
    for device, description in _devices():
        lines.append(f"{device}: {description}")
        for operation in _dispatch.OPERATIONS:
            lines.append(f"    {operation:<28} {_backend(operation, device)}")
    lines += ["networks whose logits are made for masked positions only:", *(f"    {kind}" for kind in HEADS)]
    lines.append("    others give all logits: see wrapper.has_linear_head, and repr(wrapper) for the reason")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[torch.device, str]]:
    devices = [(torch.device("cpu"), f"{platform.machine()}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        runtime = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        description = f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}, {runtime}"
        devices.append((torch.device("cuda", index), description))
    if torch.backends.mps.is_available():
        devices.append((torch.device("mps"), "Apple GPU"))
    return devices


def _backend(operation: str, device: torch.device) -> str:
    try:
        backend, reason = _dispatch.choose(operation, device)
    except (RuntimeError, ValueError) as error:
        return f"error: {error}"
    return f"{backend} ({reason})"


if __name__ == "__main__":
    sys.exit(main())
