"""What the host decides of a generation before it starts: what is open, and the steps, block by block."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmask import _check
from fastmask._devices import to_device
from fastmask.schedules import Schedule
from fastmask.upstream import Formulas

# The start


class Start(NamedTuple):
    """What a generation starts from.

    ids: [B, N] int64, mask_id where nothing is given. is_given: [B, N] bool. is_open: [B, N] bool on the CPU, where
    nothing is given.
    """

    ids: Tensor
    is_given: Tensor
    is_open: Tensor

    @property
    def num_maskable(self) -> Tensor:
        """[B] int64 on the CPU."""
        return self.is_open.sum(dim=-1)


def start(
    batch_size: int | None,
    prompt: Tensor | None,
    prompt_mask: Tensor | None,
    length: int,
    mask_id: int,
    num_tokens: int,
    device: torch.device,
) -> Start:
    """The start from what ``generate`` was given; batch_size None takes the prompt's own, else 1."""
    if batch_size is not None:
        batch_size = _check.integer("batch_size", batch_size, 0, 2**31)
    if prompt is None:
        if prompt_mask is not None:
            raise ValueError("expected prompt_mask with prompt, received it alone; give both")
        return _all_masked(1 if batch_size is None else batch_size, length, mask_id, device)
    _check_prompt(prompt, prompt_mask, length)
    rows = batch_size
    if rows is None:
        rows = 1 if prompt.ndim == 1 else len(prompt)
    if prompt.ndim == 1:
        prompt = prompt.expand(rows, -1)
        prompt_mask = None if prompt_mask is None else prompt_mask.expand(rows, -1)
    _check.shape("prompt", prompt, [rows, prompt.shape[1]], "B, P")
    started = _prompted(prompt, prompt_mask, length, mask_id, device)
    if prompt.device.type == "cpu":  # nothing is waited for
        _check_prompt_ids(prompt, started.is_open, num_tokens)
    return started


def _check_prompt(prompt: Tensor, prompt_mask: Tensor | None, length: int) -> None:
    _check.tensor("prompt", prompt, _check.INTEGER)
    if prompt.ndim not in (1, 2):
        raise ValueError(f"expected prompt [P] or [B, P], received shape {list(prompt.shape)}")
    size = prompt.shape[-1]
    if prompt_mask is None:
        if size >= length:
            raise ValueError(
                "expected a prompt without prompt_mask, which is a prefix, shorter than seq_len = "
                f"{length}, received {size} positions; say what is given with prompt_mask=, or shorten it"
            )
        return
    _check.tensor("prompt_mask", prompt_mask, [torch.bool])
    _check.shape("prompt_mask", prompt_mask, prompt.shape, "as prompt")
    if size > length:
        raise ValueError(f"expected prompt of at most seq_len = {length} positions, received {size}; cut it")


def _check_prompt_ids(prompt: Tensor, is_open: Tensor, num_tokens: int) -> None:
    is_wrong = ((prompt < 0) | (prompt >= num_tokens)) & ~is_open[:, : prompt.shape[1]]
    if is_wrong.any():
        raise ValueError(
            f"expected prompt ids from 0 to below net.num_tokens = {num_tokens}, received "
            f"{int(prompt[is_wrong][0])}; where nothing is given prompt_mask is False"
        )


def _all_masked(batch_size: int, length: int, mask_id: int, device: torch.device) -> Start:
    ids = torch.full((batch_size, length), mask_id, dtype=torch.int64, device=device)
    is_open = torch.ones((), dtype=torch.bool, device="cpu").expand(ids.shape)
    return Start(ids, torch.zeros_like(ids, dtype=torch.bool), is_open)


def _prompted(prompt: Tensor, prompt_mask: Tensor | None, length: int, mask_id: int, device: torch.device) -> Start:
    """A prompt [B, P] at the beginning of sequences that are open after it."""
    rows, size = prompt.shape
    ids, is_given, is_open = _all_masked(rows, length, mask_id, device)
    is_open = is_open.clone()
    if prompt_mask is None:
        ids[:, :size], is_given[:, :size], is_open[:, :size] = to_device(prompt, device), True, False
        return Start(ids, is_given, is_open)
    is_given[:, :size] = to_device(prompt_mask, device)
    is_open[:, :size] = ~prompt_mask.cpu()  # the one wait for a device, if the prompt is on one
    ids[:, :size] = to_device(prompt, device).long().where(is_given[:, :size], mask_id)
    return Start(ids, is_given, is_open)


def as_order(order: Tensor, ids: Tensor) -> Tensor:
    """A score of one's own [B, N], or [N] for all sequences, float32, on the device of the ids [B, N]."""
    _check.tensor("score", order, _check.FLOATING)
    if order.ndim == 1:
        _check.shape("score", order, ids.shape[1:], "N")
    else:
        _check.shape("score", order, ids.shape, "B, N")
    return to_device(order, ids.device).float().expand(ids.shape).contiguous()


# The blocks


class Columns(NamedTuple):
    """Where blocks lie in a cache, whose columns hold all sequences so that a block begins at one column in each.

    length: of a block. num_before: columns before the blocks that are decoded, as the longest prompt needs them.
    num_all: columns of everything. begins: first columns of the blocks [K].
    """

    length: int
    num_before: int
    num_all: int
    begins: tuple[int, ...]


class Blocks(NamedTuple):
    """Parts of each sequence that are decoded one after the other.

    windows: [K, B, 2] int64, first position and end; None where there is one block, of everything. sizes: [K, B]
    int64, how many open positions are in each. origins: [B] int64, where the first block begins. All on the CPU.
    origins and columns are None where windows are.
    """

    windows: Tensor | None
    sizes: Tensor
    origins: Tensor | None = None
    columns: Columns | None = None


def blocks(start: Start, length: int | None, origin: str) -> Blocks:
    """Blocks of so many positions (None for one of all) from each sequence's first open position, or from 0; those
    in which nothing is open are left out."""
    if origin not in ("prompt", "zero"):
        raise ValueError(f"expected block_origin to be 'prompt' or 'zero', received {origin!r}")
    if length is None:
        if origin != "prompt":
            raise ValueError(f"expected block_length= with block_origin={origin!r}, received None; give both")
        return Blocks(None, start.num_maskable[None])
    length = _check.integer("block_length", length, 1)
    is_open = start.is_open
    num_positions = is_open.shape[1]
    first = torch.zeros(len(is_open), dtype=torch.int64, device="cpu")
    if origin == "prompt":
        first = is_open.byte().argmax(dim=-1).where(is_open.any(dim=-1), num_positions)
    first_of_all = int(first.min()) if len(first) else 0
    num_blocks = max(1, math.ceil((num_positions - first_of_all) / length)) if len(first) else 1
    begins = first + length * torch.arange(num_blocks, device="cpu")[:, None]
    windows = torch.stack([begins, begins + length], dim=-1).clamp(max=num_positions)
    num_open_before = torch.nn.functional.pad(is_open.cumsum(dim=-1), (1, 0))  # [B, N + 1]
    begin, end = (num_open_before.gather(1, side.T).T for side in windows.unbind(-1))
    sizes = end - begin
    has_open = sizes.any(dim=-1)
    has_open[:1] |= not has_open.any()  # one is left, though nothing be open
    num_before = int(first.where(first < num_positions, 0).max()) if len(first) else 0
    begins = num_before + length * has_open.nonzero().flatten()
    columns = Columns(length, num_before, num_before + num_positions - first_of_all, tuple(begins.tolist()))
    return Blocks(windows[has_open], sizes[has_open], first, columns)


def places_for_any_prompt(blocks: Blocks, length: int) -> Tensor:
    """Places [K, B] in the list that serve all prompts: of blocks as many as they are long, of everything the most
    open positions, rounded up to an eighth of the length."""
    batch = blocks.sizes.shape[1]
    if blocks.windows is not None:
        longest = (
            (blocks.windows[..., 1] - blocks.windows[..., 0]).amax(dim=-1) if batch else blocks.sizes.sum(dim=-1)
        )
        return longest[:, None].expand(-1, batch)
    most, eighth = int(blocks.sizes.max()) if batch else 0, math.ceil(length / 8)
    return torch.full((1, batch), min(length, math.ceil(most / eighth) * eighth), device="cpu")


# The plan


class Step(NamedTuple):
    """One step of a plan.

    block, number: which step of which block, both from 0. row_before, row: of the plan's tensors. remaining: the
    share of the block's steps that follow. progress: from 0 in the first of them to 1 in the last; after the last of
    all 1. place: where the block's masked positions are listed. num_open, num_rows, num_rows_after: places there of
    all that is open at first, of what is masked before the step and after it.
    """

    block: int
    number: int
    row_before: int
    row: int
    remaining: float
    progress: float
    place: int
    num_open: int
    num_rows: int
    num_rows_after: int


class Part(NamedTuple):
    """A plan of one block, in few words even of a million steps.

    numbers: [C], of the steps after which fewer or more are masked. num_rows: [C + 1], places in the list of what is
    masked before them and after each. place: where that list begins. row: of the plan's tensors, before them; the
    next ones are after each.
    """

    numbers: Sequence[int]
    num_rows: tuple[int, ...]
    place: int
    row: int


class Plan(NamedTuple):
    """The steps that can change anything, of so many in each block, with what they need on the device.

    num_steps: of a block, but for the editing_steps, the most that a sequence has after its last masked position.
    always_runs: whether those run, too, after which as much is masked as before. is_of_any_prompt: whether the lists
    have places for more than is masked.
    counts: [R, B] int64, how many positions of each sequence stay masked at most, after a step with this row.
    commits: [R, B] int64, how many each commits at least beside a rule; None for one.
    row_starts: [R, B + 1] int64, where in the list of masked positions after it those of each sequence begin.
    windows: [K, B, 2] int64, and origins, columns: as of :class:`Blocks`.
    """

    num_steps: int
    editing_steps: int
    parts: tuple[Part, ...]
    always_runs: bool
    is_of_any_prompt: bool
    counts: Tensor
    commits: Tensor | None
    row_starts: Tensor
    windows: Tensor | None
    origins: Tensor | None
    columns: Columns | None

    @property
    def each_window(self) -> Sequence[Tensor | None]:
        """The window [B, 2] of each block; None for one of everything."""
        return [None] if self.windows is None else list(self.windows)

    @property
    def block_steps(self) -> int:
        """How many steps a block has, those included that cannot change anything."""
        return self.num_steps + self.editing_steps

    @property
    def total(self) -> int:
        """How many steps all blocks have."""
        return len(self.parts) * self.block_steps

    def step(self, block: int, number: int) -> Step | None:
        """A step of a block; None if it cannot change anything."""
        part = self.parts[block]
        if not part.numbers or number > part.numbers[-1] + self.editing_steps:
            return None
        before, after = bisect_left(part.numbers, number), bisect_right(part.numbers, number)
        if before == after and not self.always_runs:
            return None
        return Step(
            block,
            number,
            part.row + before,
            part.row + after,
            max(0, self.num_steps - 1 - number) / self.num_steps,
            min(1.0, number / max(1, self.num_steps - 1)),
            part.place,
            part.num_rows[0],
            part.num_rows[before],
            part.num_rows[after],
        )


class Pace(NamedTuple):
    """How many positions of a block a step commits.

    steps: of a block. commits: at least so many, in place of the schedule's; see :class:`Commits`. may_remask:
    whether what is committed may be masked again. by_rule: whether a step commits one at least and as many as it
    likes. always_runs: whether even a step that commits nothing can change what follows. editing_steps: the most that
    follow a sequence's last masked position.
    """

    schedule: Schedule
    formulas: Formulas
    steps: int
    commits: Commits | None
    may_remask: bool
    by_rule: bool
    always_runs: bool
    editing_steps: int

    @property
    def falls(self) -> bool:
        """Whether what is masked never grows."""
        return self.by_rule or not self.may_remask

    @property
    def is_by_sequence(self) -> bool:
        """Whether sequences of one size may go unlike ways."""
        return self.commits is not None and isinstance(self.commits.given, Tensor) and self.commits.given.ndim == 2


class Commits(NamedTuple):
    """How many positions each step of a block commits at least.

    given: [steps] int64, or [steps, B] for each sequence by itself, on the CPU; or a function of how many are open in
    the block and the number of steps.
    """

    given: Tensor | Callable[[int, int], Sequence[int] | Tensor]
    steps: int

    @staticmethod
    def checked(commits: Any, steps: int, batch: int) -> Commits | None:
        """From what ``generate`` was given."""
        if commits is None:
            return None
        if callable(commits):
            return Commits(commits, steps)
        if not isinstance(commits, (Tensor, list, tuple)):
            number = _check.integer("commits", commits, 0)
            return Commits(torch.full((steps,), number, device="cpu"), steps)
        return Commits(_as_commits(commits, [[steps], [steps, batch]]), steps)

    def of(self, size: int, column: int) -> Tensor:
        """[steps] int64 of a sequence with so many open positions."""
        if isinstance(self.given, Tensor):
            return self.given[:, column] if self.given.ndim == 2 else self.given
        return _as_commits(self.given(size, self.steps), [[self.steps]])


def _as_commits(commits: Any, shapes: list[list[int]]) -> Tensor:
    if isinstance(commits, Tensor):
        commits = to_device(commits, "cpu")
    else:
        try:
            commits = torch.as_tensor(commits, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"expected commits to be whole numbers, received {commits!r}") from error
    _check.tensor("commits", commits, _check.INTEGER)
    if list(commits.shape) not in shapes:
        expected = " or ".join(map(str, shapes))
        letters = "steps, or steps and B" if len(shapes) > 1 else "steps, of a function"
        raise ValueError(f"expected commits of shape {expected} ({letters}), received {list(commits.shape)}")
    if bool((commits < 0).any()):
        raise ValueError("expected commits from 0 on, received a negative number")
    return commits.long()


def plan(pace: Pace, blocks: Blocks, device: torch.device, places: Tensor | None = None) -> Plan:
    """The steps of a generation.

    Args:
        places: [K, B], numbers that the blocks' sizes do not exceed: the plan's steps then depend on these alone.
    """
    ways = _Ways(pace)
    parts: list[Part] = []
    counts, commits, row_starts = [], [], []
    place = row = 0
    for own, listed in zip(blocks.sizes, blocks.sizes if places is None else places, strict=True):
        changes, columns = ways.changes(listed)
        numbers = _numbers(changes)
        if places is not None and len(numbers):  # of each step, whichever changes what is masked
            numbers = torch.arange(int(numbers[-1]) + 1, device="cpu")
        after = _table(changes, numbers, columns)
        num_rows = tuple(after.sum(dim=-1).tolist())
        parts.append(Part(tuple(numbers.tolist()), num_rows, place, row))
        place, row = place + num_rows[0], row + len(after)
        row_starts.append(after.new_zeros(len(after), len(own) + 1))
        torch.cumsum(after, dim=-1, out=row_starts[-1][:, 1:])
        if places is not None:
            changes, columns = ways.changes(own)
        counts.append(after if places is None else _table(changes, numbers, columns))
        if pace.by_rule and pace.commits is not None:
            commits.append(torch.cat([own[None], ways.commits(own, numbers)]))
    return Plan(
        pace.steps,
        pace.editing_steps,
        tuple(parts),
        pace.always_runs or places is not None,
        places is not None,
        to_device(_joined(counts), device),
        to_device(_joined(commits), device) if commits else None,
        to_device(_joined(row_starts), device),
        None if blocks.windows is None else to_device(blocks.windows, device),
        None if blocks.origins is None else to_device(blocks.origins, device),
        blocks.columns,
    )


def _joined(tables: list[Tensor]) -> Tensor:
    return tables[0] if len(tables) == 1 else torch.cat(tables)  # of many steps: not copied


class _Ways:
    """How sequences of each size go through the steps of a block: the same in all blocks, found once."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self._changes: dict[tuple[int, int], Changes] = {}
        self._commits: dict[tuple[int, int], Tensor] = {}
        self._ratios = None
        if pace.commits is None and not pace.by_rule:
            self._ratios = pace.formulas.step_ratios(pace.schedule, pace.steps)
            if not pace.may_remask:  # what is committed stays committed
                self._ratios = self._ratios.nan_to_num(0.0).cummin(dim=0).values

    def changes(self, sizes: Tensor) -> tuple[list[Changes], Tensor]:
        """The changes of sequences of these sizes [B], and which of them are each one's, [B]."""
        kinds = self._kinds(sizes)
        different = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
        for kind in different:
            if kind not in self._changes:
                self._changes[kind] = _changes(self._counts(kind), kind[0], self.pace.steps, self.pace.falls)
        columns = torch.tensor([different[kind] for kind in kinds], dtype=torch.int64, device="cpu")
        return [self._changes[kind] for kind in different], columns

    def commits(self, sizes: Tensor, numbers: Tensor) -> Tensor:
        """How many the steps of these numbers [R] commit at least, [R, B]; the last of all commits everything."""
        if not len(sizes):
            return torch.zeros(len(numbers), 0, dtype=torch.int64, device="cpu")
        each = torch.stack([self._committed(kind)[numbers] for kind in self._kinds(sizes)], dim=-1)
        return each.where(numbers[:, None] < self.pace.steps - 1, sizes)

    def _kinds(self, sizes: Tensor) -> list[tuple[int, int]]:
        """What decides each sequence's way: its size, and which it is where that matters."""
        return [(size, column if self.pace.is_by_sequence else 0) for column, size in enumerate(sizes.tolist())]

    def _committed(self, kind: tuple[int, int]) -> Tensor:
        assert self.pace.commits is not None
        if kind not in self._commits:  # a function may draw numbers
            self._commits[kind] = self.pace.commits.of(*kind)
        return self._commits[kind]

    def _counts(self, kind: tuple[int, int]) -> Callable[[Tensor], Tensor]:
        """How many stay masked at most, after the steps of some numbers."""
        pace, (size, _) = self.pace, kind
        last = pace.steps - 1
        if pace.commits is not None:
            commits = self._committed(kind)
            num_masked = size - (commits.clamp(min=1) if pace.by_rule else commits).cumsum(dim=0)
            return lambda numbers: num_masked[numbers].clamp(min=0).where(numbers < last, 0)
        ratios = self._ratios
        if ratios is None:
            return lambda numbers: (size - 1 - numbers).clamp(min=0).where(numbers < last, 0)
        return lambda numbers: pace.formulas.num_remaining(ratios[numbers], size).where(numbers < last, 0)


# So many steps are passed over at once where nothing changes: of a million with 1024 changes least is computed.
_STRIDE = 64


class Changes(NamedTuple):
    """When the number of masked positions of a sequence changes, in few words even of a million steps.

    numbers: [K] int64, of the steps that change it. values: [K + 1] int64, the number before them and after each.
    """

    numbers: Tensor
    values: Tensor

    def after(self, numbers: Tensor) -> Tensor:
        """How many are masked after the steps of these numbers; -1 is before the first."""
        return self.values[torch.searchsorted(self.numbers, numbers, right=True)]


def _changes(counts: Callable[[Tensor], Tensor], size: int, steps: int, falls: bool) -> Changes:
    """Of counts after steps, from a size on; those that fall are computed only near where they do."""
    numbers = torch.arange(0, steps, _STRIDE if falls else 1, device="cpu")
    if falls:
        ends = torch.cat([numbers, numbers.new_tensor([steps - 1])])
        differ = counts(ends).diff() != 0
        near = numbers[differ][:, None] + torch.arange(1, _STRIDE + 1, device="cpu")
        numbers = torch.cat([numbers[:1], near.flatten().clamp(max=steps - 1)])
    after = counts(numbers)
    changed = after != torch.cat([after.new_tensor([size]), after[:-1]])
    return Changes(numbers[changed], torch.cat([after.new_tensor([size]), after[changed]]))


def _numbers(changes: list[Changes]) -> Tensor:
    """Numbers of the steps after any of which something changes, [C] int64, in order."""
    empty = torch.empty(0, dtype=torch.int64, device="cpu")
    return torch.cat([empty, *(each.numbers for each in changes)]).unique()


def _table(changes: list[Changes], numbers: Tensor, columns: Tensor) -> Tensor:
    """Masked positions before all steps and after these, [C + 1, B], of sequences with the changes in
    these columns [B]."""
    if not changes:
        return torch.zeros(len(numbers) + 1, 0, dtype=torch.int64, device="cpu")
    numbers = torch.cat([numbers.new_tensor([-1]), numbers])
    return torch.stack([each.after(numbers) for each in changes], dim=-1)[:, columns]
