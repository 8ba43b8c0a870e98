"""Progress of a long loop: a tqdm bar, a callable, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

Progress = bool | Callable[[int, int], object] | None


def track(total: int, progress: Progress, description: str) -> Iterator[int]:
    """0, 1, ... total - 1, reported as they are done.

    Args:
        progress: True for a tqdm bar, a callable for ``progress(done, total)``, False or None for nothing.

    Raises:
        ImportError: True without tqdm.
    """
    if callable(progress):
        for i in range(total):
            yield i
            progress(i + 1, total)
    elif progress:
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise ImportError("progress=True needs tqdm: pip install tqdm, or give a callable") from error
        yield from tqdm(range(total), desc=description)
    else:
        yield from range(total)
