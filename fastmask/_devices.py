"""Where tensors lie, and copies between devices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def device_of(module: Any, default: torch.device) -> torch.device:
    """The device of a module's first parameter or buffer; the default where it has none, or is no module."""
    if isinstance(module, nn.Module):
        for value in (*module.parameters(), *module.buffers()):
            return value.device
    return default


def is_readable(x: Tensor) -> bool:
    """Whether a tensor's values may decide what is run: nothing waits for them, and nobody traces."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling() and not x.is_neg()


def to_device(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device. The host waits where it is itself to read the copy, and nowhere else.

    Raises:
        ValueError: it has no values to copy.
    """
    if x.is_meta and torch.device(device).type != "meta":
        raise ValueError(f"expected tensors with values, received one of shape {list(x.shape)} on the meta device")
    return x.to(device, x.dtype if dtype is None else dtype, non_blocking=torch.device(device).type != "cpu")
