"""Ids of batches are looked at: once, always or never."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _check


class FirstLook:
    """Refuses ids that are out of range, or the mask's where they may be masked.

    No module, so that a model that is shared by threads is not written to.

    Args:
        when: "first" looks at one batch, "always" at each, "never" at none. Nothing is looked at under torch.compile
            or in a CUDA graph's capture, where values cannot be read.
    """

    def __init__(self, when: str) -> None:
        self.when = when
        self._has_looked = False

    def __call__(
        self, name: str, tokens: Tensor, num_tokens: int, mask_id: int | None, maskable: Tensor | None
    ) -> None:
        """Looks at tokens [B, N]; mask_id None is no id. maskable: [B, N] bool, None for all."""
        if self.when == "never" or (self._has_looked and self.when == "first") or _cannot_look(tokens):
            return
        where, remedy = None, "clean the data"
        if mask_id is not None:
            where = None if maskable is None else maskable | (tokens != mask_id)
            remedy += ", or give maskable=, False where the mask is among the ids"
        _check.clean_tokens(name, tokens, num_tokens, mask_id, where, remedy)
        self._has_looked = True


def _cannot_look(x: Tensor) -> bool:
    """Whether the values of a tensor cannot be read here."""
    if torch.compiler.is_compiling() or x.is_meta:
        return True
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
