"""What the demo refuses: an argument or a file that it cannot use."""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib

import torch


class Refused(ValueError):
    """What the command line cannot use: one line for the reader, no traceback."""


def refuse_arguments(arguments: argparse.Namespace) -> None:
    """What can be found before training, and not after."""
    if arguments.output is None:
        arguments.output = pathlib.Path("fastmask-demo.png" if arguments.text is None else "fastmask-demo.txt")
    refuse_device(arguments.device)
    refuse_place("--output", arguments.output)
    refuse_place("--checkpoint", arguments.checkpoint)
    if arguments.checkpoint.exists() and not arguments.checkpoint.is_file():  # /dev/null would be renamed over
        raise Refused(f"expected --checkpoint to name a plain file, received {arguments.checkpoint}; name another")
    places = {"--text": arguments.text, "--output": arguments.output, "--checkpoint": arguments.checkpoint}
    for (option, path), (other, place) in itertools.combinations(places.items(), 2):
        if path is not None and path.resolve() == place.resolve():
            raise Refused(f"expected files of their own, received {path} for {option} and {other}; name another")
    if arguments.resume and not arguments.checkpoint.exists():
        raise Refused(f"nothing to resume: there is no {arguments.checkpoint}; leave --resume out")
    if arguments.checkpoint.exists() and not (arguments.resume or arguments.force):
        raise Refused(
            f"expected no file at {arguments.checkpoint}, received a checkpoint to overwrite; --resume goes on "
            "from it, --force overwrites it, --checkpoint names another"
        )


def refuse_device(name: str) -> None:
    """A device that is not here, or that holds no values."""
    try:
        torch.zeros(1, device=torch.device(name)).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # the latter two: not built in, not installed
        reason = str(error).splitlines()[0]
        raise Refused(f"expected a device of this machine, received {name!r} ({reason}); try --device cpu") from error


def refuse_place(option: str, path: pathlib.Path) -> None:
    """A path that no file can be written to, found before training and not after."""
    if path.is_dir():
        raise Refused(f"expected {option} to name a file, received the folder {path}; add a name")
    if not path.parent.is_dir():
        raise Refused(f"expected {option} in a folder that is there, received {path}; make {path.parent} first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise Refused(f"expected {option} where it can be written, received {path}; choose another place")
