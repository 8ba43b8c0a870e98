"""A number of the device on its way to the host."""

from __future__ import annotations

import torch
from torch import Tensor


class HostCount:
    """Starts to copy an integer scalar to the host, so that whoever waits for it later waits for what was queued
    before, not for what was queued since.

    Args:
        count: [] int64.
    """

    def __init__(self, count: Tensor) -> None:
        self._count, self._host, self._arrival = count, count, None
        if count.is_cuda and _can_wait(count):
            self._host = torch.empty_like(count, device="cpu", pin_memory=True)
            self._host.copy_(count, non_blocking=True)
            self._arrival = torch.cuda.current_stream(count.device).record_event()

    def wait(self) -> int | None:
        """The number; None where the host cannot wait, since the work is being traced or captured."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return int(self._host) if _can_wait(self._count) else None

    def at_most(self, limit: int) -> int | None:
        """The number; ``limit``, which it does not exceed, inside a captured graph; None while traced."""
        number = self.wait()
        return limit if number is None and _is_captured(self._count) else number


def _can_wait(count: Tensor) -> bool:
    return not torch.compiler.is_compiling() and not _is_captured(count)


def _is_captured(count: Tensor) -> bool:
    if torch.compiler.is_compiling() or not count.is_cuda:
        return False
    with torch.cuda.device_of(count):
        return torch.cuda.is_current_stream_capturing()
