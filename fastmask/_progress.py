"""Progress of a long loop: a tqdm bar, a callable, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

Progress: TypeAlias = "bool | Callable[[int, int], object] | None"


def check(progress: object) -> None:
    """Refuses what is neither a bool, None nor a callable."""
    if progress is not None and not isinstance(progress, bool) and not callable(progress):
        raise TypeError(
            f"expected progress to be True, False, None or a callable(done, total), received {progress!r} of type "
            f"{type(progress).__name__}"
        )


def track(total: int, progress: Progress, description: str) -> Iterator[int]:
    """0, 1, ... total - 1, reported as they are done.

    Args:
        progress: True for a tqdm bar (nothing where tqdm is not installed), a callable for
            ``progress(done, total)``, at every step or about a hundred times, the end included; False or
            None for nothing.
    """
    if callable(progress):
        every = max(1, total // 100)
        for i in range(total):
            yield i
            if (i + 1) % every == 0 or i + 1 == total:
                progress(i + 1, total)
        return
    steps = range(total)
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            steps = tqdm(steps, desc=description)
    yield from steps
