"""Copies between devices."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(x: Tensor, device: torch.device | str, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on a device. The host waits where it is itself to read the copy, and nowhere else."""
    return x.to(device, x.dtype if dtype is None else dtype, non_blocking=torch.device(device).type != "cpu")
