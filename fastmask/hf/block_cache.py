"""Block-causal attention of a Hugging Face decoder, and the cache of the blocks that were committed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_UNSEEN = 2**40  # a block's number that is above all others


class BlockCache:
    """Keys and values of the columns that were kept, in one of transformers' own caches, and of the last pass.

    Args:
        config: the model's.
        length: columns of a StaticCache, whose keys and values lie where they are from the first pass on; None for a
            DynamicCache, which grows.
    """

    def __init__(self, config: Any, length: int | None) -> None:
        from transformers import DynamicCache, StaticCache

        self.key_values = DynamicCache() if length is None else StaticCache(config=config, max_cache_len=length)
        self._length = length
        self._kept: Tensor | None = None
        self._last: Tensor | None = None

    @property
    def num_kept(self) -> int:
        """Columns that were kept."""
        return 0 if self._kept is None else self._kept.shape[1]

    def seen(self, blocks: Tensor) -> Tensor:
        """The blocks [B, K] of all columns that a pass over columns of these blocks [B, W] finds in the cache: those
        kept, its own, and of a StaticCache the free ones. What the last pass wrote is dropped if it was not kept."""
        if self._length is None:
            self._crop(0 if self._last is None else self._last.shape[1])
        else:
            self._rewind(blocks.device)
        self._last = blocks
        seen = self._with_kept(blocks)
        if self._length is None:
            return seen
        return torch.nn.functional.pad(seen, (0, self._length - seen.shape[1]), value=_UNSEEN)

    def commit(self, length: int) -> None:
        """Keeps the first so many columns of the last pass."""
        assert self._last is not None
        last, self._last = self._last, None
        if self._length is None:
            self._crop(last.shape[1] - length)
        self._kept = self._with_kept(last[:, :length])

    def _with_kept(self, blocks: Tensor) -> Tensor:
        return blocks if self._kept is None else torch.cat([self._kept, blocks], dim=1)

    def _crop(self, length: int) -> None:
        """Takes the last columns of a DynamicCache away."""
        if length:
            self.key_values.crop(-length)

    def _rewind(self, device: torch.device) -> None:
        """Lets the next pass write behind what a StaticCache keeps. (transformers 4 is told where at each pass.)"""
        for layer in self.key_values.layers:
            if not hasattr(layer, "cumulative_length"):
                continue
            if layer.is_initialized:
                layer.cumulative_length.fill_(self.num_kept)
            else:  # it would be copied to the device, which waits
                layer.cumulative_length = torch.zeros((), dtype=torch.int64, device=device)


def hide(blocks: Tensor, attention_mask: Tensor, positions: Tensor | None) -> Tensor:
    """The blocks [B, W], above all others where the attention_mask [B, N] is 0 at the positions [B, W]."""
    is_seen = attention_mask.bool() if positions is None else attention_mask.bool().gather(1, positions)
    return blocks.expand(is_seen.shape).masked_fill(~is_seen, _UNSEEN)


def additive_mask(blocks: Tensor, seen: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, 1, W, K], to be added to attention's scores, that hides what is of a later block: blocks [B, W] of the
    queries, seen [B, K] of the keys."""
    is_hidden = seen[:, None, None, :] > blocks[:, None, :, None]
    return torch.zeros(is_hidden.shape, dtype=dtype, device=blocks.device).masked_fill_(
        is_hidden, torch.finfo(dtype).min
    )


def refuse_windows(model: Any, config: Any, max_seq_len: int, *, is_static: bool) -> None:
    """Refuses layers that see no more than a window of what is before them, or for which a StaticCache has no more.

    Raises:
        ValueError: there are any.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"]
    if window is not None and window >= max_seq_len and not is_static:
        kinds = [kind for kind in kinds if kind != "sliding_attention"]
    others = sorted({kind for kind in kinds if kind != "full_attention"})
    if others:
        raise ValueError(
            f"expected a decoder whose layers see all that is before them, received {type(model).__name__} with "
            f"{', '.join(others)}; set max_seq_len to the window (without static_cache), or take another model"
        )


def refuse_growing_positions(model: Any, config: Any, max_seq_len: int) -> None:
    """Refuses rotary positions that become others once a sequence is longer than so many: a cache keeps the former.

    Raises:
        ValueError: sequences may become so long.
    """
    of_all = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for rope in (of_all, *(value for value in of_all.values() if isinstance(value, dict))):
        kind = str(rope.get("rope_type", rope.get("type")))
        if "dynamic" not in kind and kind != "longrope":
            continue
        lengths = (
            rope.get("original_max_position_embeddings"),
            getattr(config, "original_max_position_embeddings", None),
            getattr(config, "max_position_embeddings", None),
        )
        longest = min(length for length in lengths if length is not None)
        if max_seq_len > longest:
            raise ValueError(
                f"expected a decoder whose positions stay as they are while a sequence grows, received "
                f"{type(model).__name__} with rope_type {kind!r} and max_seq_len {max_seq_len}; set "
                f"max_seq_len={longest}, up to which they do"
            )


def check_blocks(net: Any, ids: Tensor, others: Tensor) -> None:
    """Runs a Backbone on sequences [B, N], and on the same with other last ids, as two blocks, the first of one
    position; and once more beside a cache, where the first block cannot see the second.

    Raises:
        ValueError: a position does not see all of its own block, or other things than beside a cache.
    """
    if ids.shape[1] < 3:
        return
    remedy = "load it with attn_implementation='sdpa' or 'eager', or take another model"
    expected = f"expected block-causal attention for block_length=, received {type(net.model).__name__}"
    blocks, positions = (torch.tensor([x], device=ids.device).expand(ids.shape) for x in ([0, 1, 1], [0, 1, 2]))
    try:
        net.model.eval()
        whole, other = (net(x, blocks=blocks) for x in (ids, others))
        cache, parts = net.start_cache(ids.shape[1]), []
        for part in (slice(0, 1), slice(1, 3)):
            parts.append(net(ids[:, part], positions=positions[:, part], blocks=blocks[:, part], cache=cache))
            cache.commit(part.stop - part.start)
    except Exception as error:
        raise ValueError(f"{expected}, which raised {type(error).__name__}: {error}; {remedy}") from error
    if torch.equal(whole[:, 1], other[:, 1]):
        raise ValueError(f"{expected}, whose positions do not see their own block; {remedy}")
    difference = (torch.cat(parts, dim=1) - whole).double().norm() / whole.double().norm()
    if not difference <= torch.finfo(whole.dtype).eps ** 0.5:
        raise ValueError(
            f"{expected}, whose logits beside a cache differ by {difference:.1e} of their norm; {remedy}"
        )
