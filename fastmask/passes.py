"""The passes of a network through one generation: over whole sequences, or over a block beside a cache of the others.

The cache has columns, in which all sequences' blocks begin at the same one: a shorter prompt is padded at its left. A
position that is none, of padding there or past a sequence's end, has a block number above all others, so that it is
seen by none that is one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmask import backbone
from fastmask.planning import Columns
from fastmask.upstream import Formulas


class Model(NamedTuple):
    """Who proposes ids, and who judges them.

    run: the network, of ids [B, N] and its arguments. critic: None where the network's confidence judges.
    condition: embeddings to the network's arguments that condition it on them. null_embed: [D], what the first step
    is conditioned on; None without self-conditioning. may_remask: whether what is committed may be masked again.
    is_block_causal: whether the network sees no later block, and is told the blocks. start_cache: of so many columns;
    None to run it on whole sequences.
    """

    run: Callable[..., backbone.Output]
    critic: nn.Module | None
    condition: Callable[[Tensor], dict[str, Any]]
    null_embed: Tensor | None
    mask_id: int
    may_remask: bool
    formulas: Formulas
    is_block_causal: bool
    start_cache: Callable[[int], Any] | None

    @property
    def rescores_committed(self) -> bool:
        """Whether what is committed needs a probability too, since it competes to be masked again."""
        return self.may_remask and self.critic is None


def is_block_causal(net: Any) -> bool:
    """Whether a network says that it sees no later block."""
    return bool(getattr(net, "is_block_causal", False))


def chosen_cache(
    net: Any, cache: bool | str | None, block_length: int | None, *, conditions_itself: bool, has_critic: bool
) -> Callable[[int], Any] | None:
    """What starts the network's cache, where it is to be used; ``cache`` as in ``generate``.

    Raises:
        ValueError: it cannot be had, or blocks are not the network's own.
    """
    if cache is not None and not isinstance(cache, bool) and cache != "prefix":
        raise ValueError(f"expected cache to be None, True, False or 'prefix', received {cache!r}")
    own_length = getattr(net, "block_length", None) if is_block_causal(net) else None
    if block_length is not None and own_length not in (None, block_length):
        raise ValueError(
            f"expected block_length={own_length}, of which the network's attention has its blocks, received "
            f"{block_length}; give that, or the network another"
        )
    obstacle = _obstacle_to_cache(
        net,
        approximate=cache == "prefix",
        has_blocks=block_length is not None,
        conditions_itself=conditions_itself,
        has_critic=has_critic,
    )
    if cache and obstacle is not None:
        raise ValueError(f"expected {obstacle}; or leave cache={cache!r} out")
    if obstacle is not None or cache is False:
        return None
    start_cache: Callable[[int], Any] = net.start_cache
    return start_cache


def _obstacle_to_cache(
    net: Any, *, approximate: bool, has_blocks: bool, conditions_itself: bool, has_critic: bool
) -> str | None:
    """What would have to be otherwise for a step to run the block beside a cache; None if nothing."""
    name = type(net).__name__
    if not has_blocks:
        return "block_length= with a cache, which is of the blocks before, received None"
    if not callable(getattr(net, "start_cache", None)):
        return f"a network that offers a cache (docs/caches.md), received {name} without start_cache"
    if approximate and is_block_causal(net):
        return f"cache=True, which is exact, of a network with block-causal attention, received {name}"
    if not approximate and not is_block_causal(net):
        return f"block-causal attention for an exact cache, received {name} without; cache='prefix' is approximate"
    if conditions_itself:
        return "no self-conditioning beside a cache: each step conditions all positions anew"
    if has_critic:
        return "no critic beside a cache: it looks at whole sequences in each step"
    return None


class Inputs(NamedTuple):
    """What the network is given beside the ids.

    arguments: its own. unconditional: those of the second pass of guidance; None for the same, the prompt masked.
    """

    arguments: dict[str, Any]
    unconditional: dict[str, Any] | None


class _Branch:
    """One of the two passes of guidance, or the only one.

    masks_prompt: whether it sees the mask in place of what was given. cache: its own; None without.
    """

    def __init__(self, arguments: dict[str, Any], masks_prompt: bool) -> None:
        self.arguments, self.masks_prompt = arguments, masks_prompt
        self.cache: Any = None


class Passes:
    """Runs the network on what a step needs.

    Beside a cache of block-causal attention that is the block; what lies between it and the last one that was kept is
    run before it, once, as it now is. Beside one that is approximate it is the block and what follows; as a block
    begins all is run, and what precedes the block is kept until the next (Fast-dLLM,
    https://arxiv.org/abs/2505.22618).

    Args:
        ids: [B, N] int64, read at each pass. maskable: [B, N] bool, False at what was given.
        columns, origins: where blocks lie in a cache, and [B] int64, where one of them begins in each sequence; None
            without blocks.
        cfg_scale: of guidance, which takes two passes; None or 0 for one.
    """

    def __init__(
        self,
        model: Model,
        inputs: Inputs,
        ids: Tensor,
        maskable: Tensor,
        columns: Columns | None,
        origins: Tensor | None,
        cfg_scale: float | None,
    ) -> None:
        self.inputs = inputs
        self._model, self._ids, self._maskable = model, ids, maskable
        self._columns, self._origins = columns, origins
        self._cfg_scale = cfg_scale or 0.0
        self._branches = [_Branch(inputs.arguments, masks_prompt=False)]
        if self._cfg_scale:
            other = inputs.unconditional
            self._branches.append(_Branch(inputs.arguments if other is None else other, masks_prompt=other is None))
        self._num_kept = 0
        self._start_caches()

    def output(self, block: int, rows: Tensor, condition: Tensor | None) -> backbone.Output:
        """What the network says of whole sequences, or of these rows [M] alone: beside a cache, and of guidance
        behind a head that is not linear."""
        span = self._span(block)
        if span is not None:
            rows = self._rows_within(span, rows)
        out = self._pass(self._branches[0], span, condition)
        if self._cfg_scale:
            out = out.to_guide(rows)  # the other logits are let go before the second pass makes its own
            other = self._pass(self._branches[1], span, condition)
            out = out.guided(other.to_guide(rows), self._cfg_scale)
        if span is None:
            return out
        self._keep(span, self._columns_of(block)[0])
        return out.of_rows(rows)

    def _pass(self, branch: _Branch, span: tuple[int, int] | None, condition: Tensor | None) -> backbone.Output:
        """The network on whole sequences, or on these columns of its cache."""
        model, ids, place = self._model, self._ids, {}
        if branch.masks_prompt:
            ids = ids.where(self._maskable, model.mask_id)
        if span is not None:
            positions, blocks = self._places(span)
            ids, place = ids.gather(1, positions), {"positions": positions, "blocks": blocks, "cache": branch.cache}
        elif model.is_block_causal and self._columns is not None and self._origins is not None:
            positions = torch.arange(ids.shape[1], device=ids.device)
            place = {"blocks": (positions - self._origins[:, None]) // self._columns.length}
        if condition is None:
            return model.run(ids, place=place, **branch.arguments)
        return model.run(ids, place=place, with_embeddings=True, **model.condition(condition), **branch.arguments)

    # Beside a cache

    def _start_caches(self) -> None:
        if self._model.start_cache is not None and self._columns is not None:
            for branch in self._branches:
                branch.cache = self._model.start_cache(self._columns.num_all)

    def _columns_of(self, block: int) -> tuple[int, int]:
        assert self._columns is not None
        begin = self._columns.begins[block]
        return begin, min(begin + self._columns.length, self._columns.num_all)

    def _span(self, block: int) -> tuple[int, int] | None:
        """The columns to be run for a block, once what precedes it is kept; None for whole sequences."""
        if self._branches[0].cache is None:
            return None
        assert self._columns is not None
        begin, end = self._columns_of(block)
        if self._model.is_block_causal:
            if self._num_kept < begin:
                between = (self._num_kept, begin)
                for branch in self._branches:
                    self._pass(branch, between, None)
                self._keep(between, begin)
            return begin, end
        if self._num_kept == begin:
            return begin, self._columns.num_all
        self._start_caches()
        return 0, self._columns.num_all

    def _keep(self, span: tuple[int, int], end: int) -> None:
        """Keeps those columns that were run last and are before the end."""
        if span[0] < end:
            for branch in self._branches:
                branch.cache.commit(end - span[0])
            self._num_kept = end

    def _places(self, span: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The positions of columns, and the numbers of their blocks, [B, W] int64 each; of padding some position, and
        a number above all others. Where the cache is approximate all else is one block."""
        assert self._columns is not None
        num_positions = self._ids.shape[1]
        columns = torch.arange(*span, device=self._ids.device)
        positions = columns + self._shift()
        is_none = (positions < 0) | (positions >= num_positions)
        numbers = (columns - self._columns.num_before) // self._columns.length
        if not self._model.is_block_causal:
            numbers = torch.zeros_like(numbers)
        blocks = numbers.expand(positions.shape).masked_fill(is_none, num_positions)
        return positions.clamp(0, max(0, num_positions - 1)), blocks

    def _shift(self) -> Tensor:
        """The position of column 0 in each sequence, [B, 1]."""
        assert self._columns is not None
        assert self._origins is not None
        return (self._origins - self._columns.num_before)[:, None]

    def _rows_within(self, span: tuple[int, int], rows: Tensor) -> Tensor:
        """Flat positions b N + i as flat places b W + j of the span; of -1 some place."""
        begin, end = span
        num_positions, width = self._ids.shape[1], end - begin
        sequences = rows.clamp(min=0) // num_positions
        positions = rows.clamp(min=0) - sequences * num_positions
        places = positions - self._shift()[sequences, 0] - begin
        return sequences * width + places.clamp(0, width - 1)
