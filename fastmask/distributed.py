"""Several processes: a wrapper sharded over them, and ranks as holders of one batch.

What they divide by in common, and whose rows are whose, is for training, evaluation and generation to know.

The engines are torch's: DistributedDataParallel and fully_shard average gradients over ranks. So a rank divides by
the ranks' mean count; the mean of their losses, and of their gradients, is then the whole batch's.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastmask.ops.seeds import check_generator
from fastmask.records import Counts
from fastmask.vocabulary_parallel import padded_vocabulary

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh  # which not every build of torch has

__all__ = ["ALONE", "Ranks", "padded_vocabulary", "shard"]

Wrapper = TypeVar("Wrapper", bound=nn.Module)


def shard(wrapper: Wrapper, mesh: DeviceMesh, **options: Any) -> Wrapper:
    """Shards a wrapper over ranks by torch's fully_shard (FSDP2), for training, nelbo and generation.

    Blocks are gathered one at a time, while each runs. They are what the network's (and a critic's) outermost
    nn.ModuleLists list, if it has a matrix of weights; lists within lists are looked through. Everything else,
    embeddings and head among it, is gathered for all of a call, or for a step of ``generate_steps``, and then sharded
    again; after a call with gradients its backward does that.

    Args:
        wrapper: a NonAutoregressiveWrapper, on the mesh's device. Its parameters become DTensors, in place.
        mesh: of one dimension; of two, fully_shard replicates over the first.
        options: fully_shard's own, as ``mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)``.

    Returns:
        The wrapper. ``nelbo``, ``generate`` and ``generate_steps`` gather its parameters as calling it does.

    Warns:
        UserWarning: there is no block, so that all parameters are gathered at once. Blocks that fully_shard has been
            called on count.

    Source: PyTorch FSDP (https://arxiv.org/abs/2304.11277).
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for block in dict.fromkeys(_blocks(wrapper)):
        fully_shard(block, mesh=mesh, **options)
    if not any(isinstance(module, FSDPModule) for module in wrapper.modules()):
        warnings.warn(
            f"expected blocks in an nn.ModuleList of {type(wrapper).__name__}, found none, so all parameters are "
            "gathered at once; list them in an nn.ModuleList (nn.Sequential is none), or call fully_shard on each of "
            "them before shard",
            stacklevel=2,
        )
    root: Any = fully_shard(wrapper, mesh=mesh, **options)
    gathered = _gathering(root)
    methods: dict[str, Callable[..., Any]] = {
        name: functools.partial(gathered, getattr(wrapper, name)) for name in ("nelbo", "generate", "generate_steps")
    }
    methods["generate_steps"] = functools.partial(_gathered_steps, gathered, methods["generate_steps"])
    for name, method in methods.items():
        setattr(wrapper, name, functools.wraps(getattr(wrapper, name))(method))
    # A backward shards the root again; where none follows, the next call would not see weights changed meanwhile.
    wrapper.register_forward_hook(lambda *_: None if torch.is_grad_enabled() else root.reshard())
    return wrapper


def _gathering(root: Any) -> Callable[..., Any]:
    """A function that calls another with its arguments, the root gathered, and shards it again however that ended."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    def attempt(run: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Future[Any]:
        outcome: Future[Any] = Future()
        try:
            outcome.set_result(run(*arguments, **keywords))
        except BaseException as error:  # torch's hook at the end of a call must run: until it has, nothing is sharded
            outcome.set_exception(error)
        return outcome

    def gathered(run: Callable[..., Any], /, *arguments: Any, **keywords: Any) -> Any:
        outcome = root._fastmask_attempt(run, *arguments, **keywords)
        root.reshard()
        return outcome.result()

    root._fastmask_attempt = attempt
    register_fsdp_forward_method(root, "_fastmask_attempt")
    return gathered


def _gathered_steps(
    gathered: Callable[..., Any], prepare: Callable[..., Any], /, *arguments: Any, **options: Any
) -> Iterator[Any]:
    """generate_steps, each step of which gathers for itself: between two, or after the last, weights may change."""
    steps = prepare(*arguments, **options)

    def run() -> Iterator[Any]:
        with closing(steps):
            while (step := gathered(next, steps, None)) is not None:
                yield step

    return run()


def _blocks(module: nn.Module, *, is_listed: bool = False) -> Iterator[nn.Module]:
    """The blocks of a module; of one that is listed, itself."""
    is_list = isinstance(module, nn.ModuleList)
    if is_listed and not is_list:
        if any(parameter.ndim > 1 for parameter in module.parameters()):
            yield module
        return
    for child in module.children():
        yield from _blocks(child, is_listed=is_list)


class Ranks:
    """Who shares a batch.

    Args:
        process_group: a torch.distributed.ProcessGroup; None where this process has all of the batch.

    Raises:
        TypeError: it is something else.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        if process_group is not None and not (dist.is_available() and isinstance(process_group, dist.ProcessGroup)):
            raise TypeError(
                "expected process_group to be a torch.distributed.ProcessGroup with this rank in it, received "
                f"{type(process_group).__name__}; torch.distributed.group.WORLD is that of all ranks, "
                "mesh.get_group() a DeviceMesh's"
            )
        self._group = process_group
        self.rank = 0 if process_group is None else process_group.rank()
        self.size = 1 if process_group is None else process_group.size()

    @property
    def are_one(self) -> bool:
        """Whether no process group was given."""
        return self._group is None

    def check_training(
        self, generator: torch.Generator | None, *, draws: bool, draws_on_host: bool, **counts: object
    ) -> None:
        """Refuses what does not go with a group: counts of the whole batch, and numbers drawn by each rank alone.

        Args:
            draws: whether the step draws random numbers; draws_on_host: whether some of them on the host.
            counts: num_tokens= and num_masked= as they were given.
        """
        if self.are_one:
            return
        check_generator(generator)
        given = " and ".join(f"{name}=" for name, count in counts.items() if count is not None)
        if given:
            raise ValueError(
                f"expected process_group= or {given}, received both; leave {given} out, or, to accumulate gradients, "
                "process_group=, and give the whole's count divided by the number of ranks"
            )
        if draws and generator is None:
            raise ValueError(
                "expected generator= with process_group=, received none; make one before the loop, of one seed on "
                "all ranks: torch.Generator().manual_seed(0)"
            )
        if draws_on_host and generator is not None and generator.device.type != "cpu":
            raise ValueError(
                "expected a generator of the CPU with process_group= and self-conditioning or a critic, received one "
                f"of {generator.device}; torch.Generator().manual_seed(0) makes one, of one seed on all ranks"
            )

    def place(self, batch: int, sample_offset: int | None, global_batch_size: int | None) -> tuple[int, int | None]:
        """The index of a rank's first row in the whole batch, and the size of that; by default all ranks have as many
        rows as this one.
        """
        if self.are_one:
            return 0 if sample_offset is None else sample_offset, global_batch_size
        if (sample_offset is None) != (global_batch_size is None):
            missing = "sample_offset" if sample_offset is None else "global_batch_size"
            raise ValueError(
                "expected sample_offset= and global_batch_size= together with process_group=, received one; give "
                f"{missing}= too, or leave both out where all ranks have batches of one size"
            )
        if sample_offset is None:
            return self.rank * batch, self.size * batch
        return sample_offset, global_batch_size

    def summed(self, counts: Counts) -> Callable[[], Counts]:
        """Starts to add up counts over the ranks. The function that it returns gives them, once they are needed: on a
        GPU the device waits for them, not the host.
        """
        if self._group is None:
            return lambda: counts
        maskable, masked = counts.maskable, counts.masked
        if not isinstance(maskable, Tensor):
            maskable = torch.full_like(masked, maskable)
        both = torch.stack([maskable, masked])
        work = dist.all_reduce(both, group=self._group, async_op=True)

        def arrived() -> Counts:
            work.wait()
            return Counts(both[0], both[1], self.size)

        return arrived

    def total(self, values: Tensor) -> Tensor:
        """The sum over the ranks, of any shape; the tensor given may be written."""
        if self._group is not None:
            dist.all_reduce(values, group=self._group)
        return values

    def gathered(self, values: Tensor) -> Tensor:
        """What each rank has, [size, n] of values [n]."""
        if self._group is None:
            return values[None]
        out = values.new_empty(self.size, len(values))
        dist.all_gather(list(out.unbind()), values, group=self._group)
        return out


ALONE = Ranks(None)
