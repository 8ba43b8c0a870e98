"""Checkpoints of the demo's training: states of its parts and of the random numbers."""

from __future__ import annotations

import io
import os
import pathlib
import warnings
from typing import Any

import torch
from torch import Tensor

from fastmask.demo.refusals import Refused


def random_state(device: str) -> dict[str, Tensor]:
    """Of torch's generators on the CPU and the device."""
    state = {"cpu": torch.get_rng_state()}
    return {**state, "cuda": torch.cuda.get_rng_state(device)} if torch.device(device).type == "cuda" else state


def save_checkpoint(state: dict[str, Any], path: pathlib.Path) -> None:
    """Written beside and renamed: a save that fails leaves the checkpoint that was there."""
    contents = io.BytesIO()  # torch's own writer fails in words of its own
    torch.save(state, contents)
    place = path.resolve()  # a link stays one
    temporary = place.with_name(f".fastmask-{os.getpid()}.tmp")
    try:
        temporary.write_bytes(contents.getbuffer())
        os.replace(temporary, place)
    except OSError as error:
        raise Refused(f"expected to save {path}, received {error}; what was there is as it was") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(
    path: pathlib.Path, identity: dict[str, Any], parts: dict[str, Any], device: str
) -> tuple[int, int]:
    """Puts every part and the random state where they were; returns the steps done and the seed.

    identity: what the checkpoint's task must be.
    """
    remedy = "give the checkpoint that this task wrote, or start again with --force"
    try:
        # weights_only: a file from elsewhere must not run code.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of foreign formats, which the line below names
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict):
            raise TypeError(f"a file that holds {type(checkpoint).__name__}")
        theirs = checkpoint["task"]
    except Exception as error:  # torch.load raises a dozen kinds
        reason = (str(error).splitlines() or [""])[0]
        raise Refused(
            f"expected a checkpoint of this demo in {path}, received {type(error).__name__} ({reason:.120}); {remedy}"
        ) from error
    if theirs != identity:
        theirs = theirs if isinstance(theirs, dict) else {}
        differ = ", ".join(name for name, value in identity.items() if theirs.get(name) != value)
        raise Refused(f"expected a checkpoint of this task in {path}, received one of another ({differ}); {remedy}")
    try:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        torch.set_rng_state(checkpoint["random"]["cpu"])
        if torch.device(device).type == "cuda" and "cuda" in checkpoint["random"]:
            torch.cuda.set_rng_state(checkpoint["random"]["cuda"], device)
        return int(checkpoint["done"]), int(checkpoint["seed"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise Refused(f"expected a whole checkpoint in {path}, received one with {reason:.120}; {remedy}") from error
