"""Results told: README's tables between two comments, and plots."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks import results_file
from benchmarks.end_to_end import GRAPH, TASKS
from benchmarks.harness import Row
from benchmarks.results_file import Results

README = pathlib.Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
NOT_MEASURED = "**On a GPU nothing has been measured yet.**"


# --- README -----------------------------------------------------------------------------------------------------


def main(directory: pathlib.Path) -> int:
    """README's tables, and the plots of what they tell."""
    README.write_text(readme(README.read_text(), directory))
    for is_cuda in (True, False):
        found = results_file.newest(is_cuda, directory)
        if found is not None:
            plot(found, results_file.path(found, directory))
    return 0


def readme(text: str, directory: pathlib.Path = results_file.DIRECTORY) -> str:
    """README's text with the tables of the newest results files between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"expected {BEGIN} and then {END} in README, once each; received a text without them")
    return f"{before}{BEGIN}\n{markdown(directory)}\n{END}{after}"


def markdown(directory: pathlib.Path = results_file.DIRECTORY) -> str:
    """Each kind of machine that has results: what it is, both tasks end to end, and the operations."""
    parts = []
    for is_cuda in (True, False):
        found = results_file.newest(is_cuda, directory)
        if found is not None:
            parts += [_machine(found), _tasks(found), _largest_batches(found)]
            parts.append(_folded("Each operation by itself", _operations(found)))
            parts.append(_folded("How cost grows with size", _scaling(found)))
        elif is_cuda:
            parts.append(NOT_MEASURED)
    return "\n\n".join(part for part in parts if part)


def _machine(found: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if name != "fastmask")
    what = f"{found['threads']} threads, float32" if found["device"] == "cpu" else "bfloat16"
    clocks = "".join(f", {name} {value}" for name, value in (found["clocks"] or {}).items())
    ceilings = found["ceilings"]
    return (
        f"**{found['name']}** ({what}; {versions}{clocks}; commit {found['commit']}, {found['date']}"
        f"{', a quick run' * found['quick']}). Measured in the same run: copy {ceilings['copy']:.0f} GB/s, product "
        f"{ceilings['product']:.3g} TFLOP/s; percentages of a floor refer to those."
    )


def _tasks(found: Results) -> str:
    head = ["end to end", "", "fastmask", "x-transformers", "faster", "both compiled", "as a CUDA graph",
            "outside the network", "peak memory, MiB"]  # fmt: skip
    lines = []
    for rows in _cases(found, TASKS):
        by_name = {row["name"]: row for row in rows if "ms" in row}
        ours, theirs = by_name.get("fastmask"), by_name.get("x-transformers")
        if ours is None or theirs is None:
            continue
        compiled = [by_name.get(f"{name}, network compiled") for name in ("fastmask", "x-transformers")]
        task = "training step" if ours["operation"] == "train" else "`generate`, 18 steps"
        lines.append([
            ours["case"],
            task,
            *(f"{_time(row['ms'])}, {row['rate']:,.0f} tokens/s" for row in (ours, theirs)),
            _faster(ours, theirs),
            _faster(*compiled),
            _faster(by_name.get(GRAPH), theirs),
            " / ".join(_time(row["outside_ms"]) for row in (ours, theirs)),
            " / ".join("-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}" for row in (ours, theirs)),
        ])  # fmt: skip
    return _table(head, lines)


def _operations(found: Results) -> str:
    head = ["operation", "shape", "fastmask", "of the floor", "eager", "faster", "fastest other", "faster"]
    lines = []
    operations = [name for name in dict.fromkeys(row["operation"] for row in found["rows"]) if name not in TASKS]
    for rows in _cases(found, operations):
        ours = next((row for row in rows if row["name"] == "fastmask" and row["status"] == "ok"), None)
        if ours is None:
            continue
        eager = next((row for row in rows if row["is_baseline"] and "ms" in row), None)
        others = [row for row in rows if row["status"] == "ok" and not row["is_ours"] and not row["is_baseline"]]
        other = min(others, key=lambda row: row["ms"], default=None)
        lines.append([
            f"`{ours['operation']}`",
            ours["case"],
            _time(ours["ms"]),
            f"{ours['percent_of_floor']:.0f} %",
            "-" if eager is None else _time(eager["ms"]),
            _faster(ours, eager),
            "-" if other is None else f"{_time(other['ms'])}, {other['contender']}",
            _faster(ours, other),
        ])  # fmt: skip
    return _table(head, lines)


def _scaling(found: Results) -> str:
    lines = [
        [f"`{row['operation']}`", row["field"], row["contender"], f"{row['exponent']:.2f}", _ends(row)]
        for row in found["scaling"]
    ]
    return _table(["cost grows", "with", "", "exponent", "from, to"], lines)


def _ends(row: Row) -> str:
    return ", ".join(f"{value}: {_time(ms)}" for value, ms in (row["points"][0], row["points"][-1]))


def _largest_batches(found: Results) -> str:
    lines = [
        [row["case"].partition(", ")[2], row["operation"], row["contender"], str(row["batch"])]
        for row in found["largest_batches"]
    ]
    return _table(["largest batch that fits", "", "", "sequences"], lines)


def _cases(found: Results, operations: Iterable[str]) -> list[list[Row]]:
    """The rows of each case of these operations."""
    cases: dict[tuple[str, str], list[Row]] = {}
    for row in found["rows"]:
        if row["operation"] in operations:
            cases.setdefault((row["operation"], row["case"]), []).append(row)
    return list(cases.values())


def _faster(ours: Row | None, other: Row | None) -> str:
    return "-" if ours is None or other is None else f"{other['ms'] / ours['ms']:.2f}x"


def _time(milliseconds: float) -> str:
    unit, factor = ("s", 1e-3) if abs(milliseconds) >= 1e3 else ("ms", 1.0) if abs(milliseconds) >= 1 else ("us", 1e3)
    value = milliseconds * factor
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}f} {unit}"


def _folded(title: str, table: str) -> str:
    return f"<details>\n<summary>{title}</summary>\n\n{table}\n\n</details>" if table else ""


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown, without the columns in which nothing is told; "" without lines."""
    if not lines:
        return ""
    told = [column for column in range(len(head)) if any(line[column] != "-" for line in lines)]
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row[column] for column in told)} |" for row in rows)


# --- plots ------------------------------------------------------------------------------------------------------

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


def _shown(rows: Sequence[Row]) -> list[str]:
    """Contenders: fastmask's, eager, and the fastest others at the first case that they were timed at."""
    first = sorted((row for row in rows if row["case"] == rows[0]["case"]), key=lambda row: row["ms"])
    first.sort(key=lambda row: not row["is_ours"] and not row["is_baseline"])
    return [row["contender"] for row in first[:MOST_LINES]]


def _lines(
    operation: str, rows: Sequence[Row], x: Callable[[Row], Any], field: str, labels: tuple[str, str]
) -> Panel:
    """A panel with a line for each contender."""

    def panel(axis: Any) -> None:
        for contender in _shown(rows):
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
