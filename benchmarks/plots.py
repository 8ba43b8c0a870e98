"""Plots of a results file, as PNGs beside it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.end_to_end import TASKS
from benchmarks.records import Row
from benchmarks.results_file import Results

MOST_LINES = 6  # of a panel: fastmask, eager and the fastest others


def plot(found: Results, file: pathlib.Path) -> list[pathlib.Path]:
    """PNGs beside a results file, those for which it has numbers; none, and a word, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plots: matplotlib is not installed (pip install -e '.[bench]')")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    for name, draw in PLOTS.items():
        panels = draw(found["rows"])
        if not panels:
            continue
        figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 6), squeeze=False)
        for axis, panel in zip(axes[0], panels, strict=True):
            panel(axis)
        figure.suptitle(f"{found['name']}, {found['date']}")
        figure.tight_layout()
        written.append(file.with_name(f"{file.stem}-{name}.png"))
        figure.savefig(written[-1], dpi=100)
        pyplot.close(figure)
    return written


Panel = Callable[[Any], None]


def _operations_of(rows: Sequence[Row], field: str) -> dict[str, list[Row]]:
    """The rows that have a field, by operation."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row.get(field) is not None and row["status"] != "bound":
            found.setdefault(row["operation"], []).append(row)
    return found


def _contenders_shown(rows: Sequence[Row]) -> list[str]:
    """Contenders: fastmask's, eager, and the fastest others at the first case that they were timed at."""
    first = sorted((row for row in rows if row["case"] == rows[0]["case"]), key=lambda row: row["ms"])
    first.sort(key=lambda row: not row["is_ours"] and not row["is_baseline"])
    return [row["contender"] for row in first[:MOST_LINES]]


def _lines(
    operation: str, rows: Sequence[Row], x: Callable[[Row], Any], field: str, labels: tuple[str, str]
) -> Panel:
    """A panel with a line for each contender."""

    def panel(axis: Any) -> None:
        for contender in _contenders_shown(rows):
            mine = [row for row in rows if row["contender"] == contender]
            axis.plot([x(row) for row in mine], [row[field] for row in mine], marker="o", label=contender)
        axis.set(title=operation, xlabel=labels[0], ylabel=labels[1])
        axis.set_ylim(bottom=0)
        axis.legend(fontsize=7)

    return panel


def _percent_of_floor(rows: Sequence[Row]) -> list[Panel]:
    """Of every operation, against its cases."""

    def panel(operation: str, rows: Sequence[Row]) -> Panel:
        lines = _lines(operation, rows, lambda row: row["case"], "percent_of_floor", ("", "% of the floor"))

        def rotated(axis: Any) -> None:
            lines(axis)
            axis.tick_params("x", rotation=90, labelsize=6)

        return rotated

    return [panel(*item) for item in _operations_of(rows, "percent_of_floor").items()]


def _time_against_mask_ratio(rows: Sequence[Row]) -> list[Panel]:
    """Of the two losses, at the first shape that has several ratios."""
    panels = []
    for operation, mine in _operations_of(rows, "ms").items():
        shapes: dict[tuple[Any, ...], list[Row]] = {}
        for row in mine:
            if "mask_ratio" in row["shape"]:
                shapes.setdefault(tuple(v for k, v in row["shape"].items() if k != "mask_ratio"), []).append(row)
        several = [found for found in shapes.values() if len({row["shape"]["mask_ratio"] for row in found}) > 1]
        if several:
            title = f"{operation}, {several[0][0]['case'].rpartition(',')[0]}"
            panels.append(
                _lines(title, several[0], lambda row: row["shape"]["mask_ratio"], "ms", ("mask ratio", "ms"))
            )
    return panels


def _memory_against_vocabulary(rows: Sequence[Row]) -> list[Panel]:
    """Of the operations that have a vocabulary: MiB for each row of logits, since the cases' rows differ."""
    panels = []
    for operation, mine in _operations_of(rows, "peak_mib").items():
        mine = [row for row in mine if "num_rows" in row["shape"] and row["shape"].get("mask_ratio", 0.5) == 0.5]
        mine = [row | {"per_row": 1024 * row["peak_mib"] / row["shape"]["num_rows"]} for row in mine]
        mine.sort(key=lambda row: (row["shape"]["num_tokens"], -row["shape"]["num_rows"]))
        cases = {row["shape"]["num_tokens"]: row["case"] for row in reversed(mine)}  # of each V that of most rows
        mine = [row for row in mine if row["case"] == cases[row["shape"]["num_tokens"]]]
        if mine:
            labels = ("V", "peak KiB a row")
            panels.append(_lines(operation, mine, lambda row: row["shape"]["num_tokens"], "per_row", labels))
    return panels


def _end_to_end(rows: Sequence[Row]) -> list[Panel]:
    """Bars of tokens a second, of both tasks."""

    def panel(task: str, mine: Sequence[Row]) -> Panel:
        names = list(dict.fromkeys(row["contender"] for row in mine))
        cases = list(dict.fromkeys(row["case"] for row in mine))

        def bars(axis: Any) -> None:
            for number, name in enumerate(names):
                found = {row["case"]: row["rate"] for row in mine if row["contender"] == name}
                heights = [found.get(case, 0.0) for case in cases]
                axis.barh([place + 0.8 * number / len(names) for place in range(len(cases))], heights,
                          height=0.8 / len(names), label=name)  # fmt: skip
            axis.set_yticks(range(len(cases)), cases, fontsize=7)
            axis.set(title=task, xlabel="tokens a second")
            axis.legend(fontsize=7)

        return bars

    return [panel(task, mine) for task, mine in _operations_of(rows, "rate").items() if task in TASKS]


PLOTS: dict[str, Callable[[Sequence[Row]], list[Panel]]] = {
    "percent-of-floor": _percent_of_floor,
    "time-against-mask-ratio": _time_against_mask_ratio,
    "memory-against-vocabulary": _memory_against_vocabulary,
    "end-to-end": _end_to_end,
}
