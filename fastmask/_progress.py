"""Progress of a long loop: a tqdm bar, a callable, or nothing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

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
            None for nothing. Anything else is a TypeError.
    """
    if not (progress is None or isinstance(progress, bool) or callable(progress)):
        raise TypeError(f"expected progress to be True, False, None or a callable, received {progress!r}")
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
            steps = tqdm(steps, desc=description, **pace(tqdm))
    yield from steps


def pace(tqdm: Any) -> dict[str, float]:
    """How often a bar of this tqdm class is drawn: rarely into a log, where each time is a line and not in place."""
    # A notebook's bar is a widget: the class of tqdm.auto derives from tqdm_notebook there.
    in_place = sys.stderr.isatty() or any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__)
    return {} if in_place else {"mininterval": 30.0, "maxinterval": 60.0}
