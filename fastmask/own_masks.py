"""Masks of the caller's own, in place of drawn ones."""

from __future__ import annotations

import torch
from torch import Tensor

from fastmask import _check
from fastmask.records import MaskedTokens


def refuse_ids_without_masks(masked_ids: Tensor | None) -> None:
    """What the network sees cannot be told without where it is asked."""
    if masked_ids is not None:
        raise ValueError("expected masked_ids with is_masked, received it alone; give is_masked [B, N] bool too")


def refuse_what_draws(maskable: Tensor | None, complement: bool, is_weighted: bool) -> None:
    """What says how masks are drawn does not go with masks that are given."""
    if is_weighted:
        raise ValueError(
            "expected is_masked with the mean loss, received it with the weighted one, which needs the time of a "
            "drawn mask; give use_simple_mdlm_loss_weight=False to the wrapper"
        )
    if maskable is not None or complement:
        raise ValueError(
            f"expected is_masked alone, received it with {'complement=True' if maskable is None else 'maskable'}; "
            "leave that out, and False in is_masked where nothing is to be masked"
        )


def as_drawn(tokens: Tensor, is_masked: Tensor, masked_ids: Tensor | None, mask_id: int) -> MaskedTokens:
    """Masks of the caller's own as if drawn.

    Args:
        tokens: [B, N] int32|int64.
        is_masked: [B, N] bool. masked_ids: [B, N] int32|int64, what the network sees; None for mask_id where masked.

    Returns:
        MaskedTokens; times are NaN and weights 1, since no schedule had a say.
    """
    _check.tensor("is_masked", is_masked, [torch.bool])
    _check.shape("is_masked", is_masked, tokens.shape, "B, N")
    if masked_ids is None:
        masked_ids = tokens.masked_fill(is_masked, mask_id)
    else:
        _check.tensor("masked_ids", masked_ids, _check.INTEGER)
        _check.shape("masked_ids", masked_ids, tokens.shape, "B, N")
    _check.same_device(x=tokens, is_masked=is_masked, masked_ids=masked_ids)
    ones = torch.ones(len(tokens), dtype=torch.float32, device=tokens.device)
    counts = is_masked.sum(dim=-1)
    return MaskedTokens(
        masked_ids=masked_ids,
        is_masked=is_masked,
        times=torch.full_like(ones, torch.nan),
        counts=counts,
        loss_weights=ones,
        row_indices=torch.nonzero_static(is_masked.flatten(), size=tokens.numel()).squeeze(-1),
        num_masked=counts.sum(),
    )
