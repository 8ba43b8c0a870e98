"""A vocabulary split over ranks: which columns of the logits are this process's, and what ranks tell each other.

It is asked for by torch's own DTensor on a mesh of one dimension: a head's weight [V, D] that is Shard(0), or logits
[..., V] that are Shard(-1). Everything else (embeddings, targets, masks) is a plain tensor, equal on all these ranks.
No rank ever has a row of all V logits: ranks exchange a few numbers a row.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmask._streams import TILE

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup  # which not every build of torch has


class Columns(NamedTuple):
    """The columns [first, first + width) of num_tokens that this process has; all of them where group is None."""

    first: int
    width: int
    num_tokens: int
    group: ProcessGroup | None = None

    @classmethod
    def whole(cls, num_tokens: int) -> Columns:
        """All of them."""
        return cls(0, num_tokens, num_tokens)

    def local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Which columns here ids are, int64, and whether they are here at all, bool; 0 for those that are not."""
        columns = ids.long() - self.first
        is_here = (columns >= 0) & (columns < self.width)
        return columns.where(is_here, 0), is_here

    def place(self, id: int | None) -> int | None:
        """The column here of an id; None for no id, or another rank's."""
        return id - self.first if id is not None and self.first <= id < self.first + self.width else None

    def has(self, ids: Tensor) -> Tensor:
        """Which ids there are on any rank, bool."""
        return (ids >= 0) & (ids < self.num_tokens)

    def largest(self, values: Tensor) -> Tensor:
        """The largest over the ranks, of any shape."""
        if self.group is not None:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def totals(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Sums over the ranks of tensors of one shape, in one message."""
        return values if self.group is None else self.add_up_(torch.stack(values)).unbind()

    def add_up_(self, values: Tensor) -> Tensor:
        """The sum over the ranks, of any shape, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def gathered(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Tensors of one shape of all ranks, [ranks, ...] each, in one message: in float64, which holds any id."""
        stacked = torch.stack([value.double() for value in values])
        if self.group is None:
            return stacked[:, None].unbind()
        parts = [torch.empty_like(stacked) for _ in range(self.group.size())]
        dist.all_gather(parts, stacked, group=self.group)
        return torch.stack(parts, dim=1).unbind()

    def argmax(self, z: Tensor) -> Tensor:
        """The id of each row's largest of z [M, width], of those that tie the lowest, [M, 1]."""
        columns = z.argmax(dim=-1, keepdim=True)
        if self.group is None:
            return columns
        values, ids = self.gathered(z.gather(-1, columns), columns + self.first)
        return ids.gather(0, values.argmax(dim=0, keepdim=True))[0].long()


def is_split(tensor: object) -> bool:
    """Whether it is a DTensor."""
    if type(tensor) in (Tensor, nn.Parameter):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(name: str, tensor: Any, dim: int, num_tokens: int | None = None) -> tuple[Tensor, Columns]:
    """This rank's part of a DTensor that is split along ``dim``, of the first num_tokens ids if given.

    Gradients go back as the DTensor is split.

    Raises:
        ValueError: it is split otherwise.
    """
    from torch.distributed.tensor import Shard

    dim %= tensor.ndim
    mesh, placements = tensor.device_mesh, tensor.placements
    if mesh.ndim != 1 or placements[0] not in (Shard(dim), Shard(dim - tensor.ndim)):
        raise ValueError(
            f"expected {name} as a DTensor with the placement Shard({dim}) on a mesh of one dimension, received "
            f"{list(placements)} on a mesh of {list(mesh.shape)}; {name}.redistribute(mesh, [Shard({dim})]) splits "
            f"it so, {name}.full_tensor() is all of it"
        )
    all_tokens, size = tensor.shape[dim], -(-tensor.shape[dim] // mesh.size())
    first = min(size * mesh.get_local_rank(), all_tokens)
    local = tensor.to_local()
    if local.shape[dim] != min(size, all_tokens - first):
        raise ValueError(
            f"expected {name} split as torch.chunk splits {all_tokens} ids, {min(size, all_tokens - first)} of them "
            f"here, received {local.shape[dim]}; make it with torch.distributed.tensor.distribute_tensor"
        )
    num_tokens = all_tokens if num_tokens is None else num_tokens
    width = max(0, min(local.shape[dim], num_tokens - first))
    return local.narrow(dim, 0, width), Columns(first, width, num_tokens, mesh.get_group())


def local_bias(bias: Any, weight: Any, columns: Columns) -> Tensor | None:
    """The part of a head's bias [V] that goes with this rank's part of its weight; it may be split or whole."""
    from torch.distributed.tensor import DTensor, Replicate

    if bias is None:
        return None
    if not is_split(bias):
        bias = DTensor.from_local(bias, weight.device_mesh, [Replicate()], run_check=False)
    if bias.device_mesh != weight.device_mesh:
        raise ValueError(
            f"expected bias on the mesh of weight, received one on {bias.device_mesh} beside {weight.device_mesh}; "
            "distribute both on one"
        )
    local: Tensor = bias.redistribute(placements=weight.placements).to_local()
    return local[: columns.width]


def check_tiles(tensor: Any, dim: int) -> None:
    """Ids are drawn by tiles of the vocabulary: each rank must have whole ones.

    Raises:
        ValueError: it has not.
    """
    num_tokens, num_ranks = tensor.shape[dim], tensor.device_mesh.size()
    if num_ranks > 1 and -(-num_tokens // num_ranks) % TILE:
        raise ValueError(
            f"expected a vocabulary of which each rank has a multiple of {TILE} ids to sample from, received "
            f"{num_tokens} ids over {num_ranks} ranks; give the head {padded_vocabulary(num_tokens, num_ranks)} "
            f"rows (fastmask.distributed.padded_vocabulary)"
        )


def padded_vocabulary(num_tokens: int, num_ranks: int) -> int:
    """How many rows a head needs so that each rank has the same multiple of 4096 of them: what sampling asks for."""
    return -(-num_tokens // (TILE * num_ranks)) * TILE * num_ranks


def check(backend: str, **tensors: Tensor | None) -> None:
    """The checks of what goes with a vocabulary that is split: no kernels, and no tensor that is itself split.

    Raises:
        RuntimeError, TypeError: there are.
    """
    if backend == "triton":
        raise RuntimeError("backend='triton' has no kernels of a vocabulary split over ranks; leave backend= out")
    for name, tensor in tensors.items():
        if is_split(tensor):
            raise TypeError(
                f"expected {name} as a plain tensor, equal on all ranks that split the vocabulary, received a "
                f"DTensor; give {name}.full_tensor()"
            )
