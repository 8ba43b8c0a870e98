"""The demo's command line."""

from __future__ import annotations

import argparse
import pathlib
import sys

import torch

from fastmask.demo import results, training
from fastmask.demo.refusals import Refused, refuse_arguments
from fastmask.demo.tasks import digits_task, text_task


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The demo's options."""
    parser.add_argument("--text", type=pathlib.Path, help="learn the characters of this UTF-8 file instead of digits")
    parser.add_argument("--steps", type=_positive, default=1500, help="training steps in all (default 1500)")
    parser.add_argument(
        "--output",
        type=pathlib.Path,
        help="the picture, a PNG (default fastmask-demo.png); with --text the samples, UTF-8 (fastmask-demo.txt)",
    )
    parser.add_argument(
        "--checkpoint",
        type=pathlib.Path,
        default=pathlib.Path("fastmask-demo.pt"),
        help="where training is saved (default fastmask-demo.pt); read by torch.load(weights_only=True)",
    )
    onto = parser.add_mutually_exclusive_group()
    onto.add_argument("--resume", action="store_true", help="go on from the checkpoint, with its seed")
    onto.add_argument("--force", action="store_true", help="overwrite a checkpoint that is there")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=_seed, default=0)


def _positive(text: str) -> int:
    return _whole(text, 1)


def _seed(text: str) -> int:
    return _whole(text, 0)


def _whole(text: str, low: int) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, received {text!r}") from None
    if number < low:
        raise argparse.ArgumentTypeError(f"expected at least {low}, received {number}")
    if number >= 2**63:
        raise argparse.ArgumentTypeError(f"expected less than 2**63, received {number}")
    return number


def run(arguments: argparse.Namespace) -> int:
    """Trains, evaluates, generates, reports; returns the exit status: 2 after an argument or a file that cannot be
    used, 1 where packages are missing, 130 after Ctrl-C."""
    missing = _missing_packages()
    if missing:
        print(f"the demo needs {', '.join(missing)}: pip install 'fastmask[demo]'", file=sys.stderr)
        return 1
    try:
        return _run(arguments)
    except Refused as error:
        print(f"fastmask demo: error: {error}", file=sys.stderr)
        return 2


def _run(arguments: argparse.Namespace) -> int:
    refuse_arguments(arguments)
    torch.manual_seed(arguments.seed)
    task = digits_task() if arguments.text is None else text_task(arguments.text)
    model = training.build(task).to(arguments.device)
    average = training.train(model, task, arguments)
    if average is None:
        print(f"\nstopped; --resume goes on from {arguments.checkpoint}")
        return 130
    results.report_bound(average, task)
    try:
        if arguments.text is None:
            results.report_digits(average, task, arguments.output)
        else:
            results.report_text(average, task.characters, arguments.output)
    except OSError as error:
        raise Refused(f"expected to write {arguments.output}, received {error}; --output names another") from error
    return 0


def _missing_packages() -> list[str]:
    import importlib.util

    packages = {
        "tqdm": "tqdm",
        "matplotlib": "matplotlib",
        "sklearn": "scikit-learn",
        "x_transformers": "x-transformers",
    }
    return [name for module, name in packages.items() if importlib.util.find_spec(module) is None]
