"""Results as Markdown: one small table in README.md, every table in benchmarks/README.md, between two comments."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

from benchmarks import plots, results_file
from benchmarks.end_to_end import GRAPHS, STEPS, TASKS
from benchmarks.records import IDS_ONLY, Row
from benchmarks.results_file import Results

ROOT = pathlib.Path(__file__).parents[1]
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
NOT_MEASURED = "**On a GPU nothing has been measured yet.**"
ALLOCATOR = "What glibc does with large memory is in these times, see What limits the rest, on a CPU."
TASK_NAMES = dict(zip(TASKS, ("training step", f"`generate`, {STEPS} steps"), strict=True))


def main(directory: pathlib.Path) -> int:
    """Rebuilds the tables of both files, and the plots of each machine."""
    machines = results_file.newest_of_each_machine(directory)
    for name, tables in texts(machines).items():
        file = ROOT / name
        file.write_text(between_markers(file.read_text(), tables))
    for found in machines:
        plots.plot(found, results_file.path(found, directory))
    return 0


def texts(machines: Sequence[Results]) -> dict[str, str]:
    """What stands between the markers of each file."""
    return {"README.md": summary(machines), "benchmarks/README.md": everything(machines)}


def between_markers(text: str, tables: str) -> str:
    """A file's text with the tables between its markers.

    Raises:
        ValueError: the markers are not there, once each and in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"expected {BEGIN} and then {END}, once each; received a text without them")
    return f"{before}{BEGIN}\n{tables}\n{END}{after}"


# --- README.md --------------------------------------------------------------------------------------------------


def summary(machines: Sequence[Results]) -> str:
    """Both tasks on the first machine, a GPU if there is one: the shapes at which fastmask gains least and most."""
    parts = [] if any(found["device"] == "cuda" for found in machines) else [NOT_MEASURED]
    if machines:
        pairs = [pair for task in TASKS for pair in _extremes(_pairs(machines[0], task))]
        lines = [_summary_line(*pair) for pair in pairs]
        parts += [
            f"**{machines[0]['name']}**: {_versions(machines[0])}.",
            "Of the shapes measured, B sequences of N positions over V ids, those of the least and the largest gain:",
            _table(["", "shape", "fastmask", "x-transformers", "faster"], lines),
        ]
    return "\n\n".join(part for part in parts if part)


def _pairs(found: Results, task: str) -> list[tuple[Row, Row]]:
    """Of each shape the rows of fastmask and of x-transformers, where both were timed."""
    pairs = []
    for rows in _cases(found, task):
        by_name = {row["name"]: row for row in rows if "ms" in row}
        if "fastmask" in by_name and "x-transformers" in by_name:
            pairs.append((by_name["fastmask"], by_name["x-transformers"]))
    return pairs


def _extremes(pairs: Sequence[tuple[Row, Row]]) -> list[tuple[Row, Row]]:
    """The pairs of the least and of the largest gain, one if they are the same."""
    by_gain = sorted(pairs, key=lambda pair: pair[1]["ms"] / pair[0]["ms"])
    return [*by_gain[:1], *by_gain[1:][-1:]]


def _summary_line(ours: Row, theirs: Row) -> list[str]:
    shape = ours["case"].partition(", D ")[0] + ", unfiltered" * ours["case"].endswith(", unfiltered")
    return [TASK_NAMES[ours["operation"]], shape, _time(ours["ms"]), _time(theirs["ms"]), _faster(ours, theirs)]


# --- benchmarks/README.md ---------------------------------------------------------------------------------------


def everything(machines: Sequence[Results]) -> str:
    """Of each machine: what it is, both tasks end to end, each operation, and how cost grows."""
    parts = [] if any(found["device"] == "cuda" for found in machines) else [NOT_MEASURED]
    for found in machines:
        caveat = f" {ALLOCATOR}" * (found["device"] == "cpu")
        parts += [f"## {found['name']}", f"{_versions(found)}. {_ceilings(found)}{caveat}"]
        for title, table in (
            ("End to end", _end_to_end(found)),
            ("The largest batch that fits", _largest_batches(found)),
            *((f"`{name}`", _operation(found, name)) for name in _operations(found)),
            ("How cost grows with size", _scaling(found)),
        ):
            parts += [f"### {title}", table] if table else []
    return "\n\n".join(parts)


def _versions(found: Results) -> str:
    """With what was measured, and when."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if name != "fastmask")
    what = f"{found['threads']} threads, float32" if found["device"] == "cpu" else "bfloat16"
    clocks = "".join(f", {name} {value}" for name, value in (found["clocks"] or {}).items())
    run = f"commit {found['commit']}, {found['date']}{', a quick run' * found['quick']}"
    return f"{what}; {versions}{clocks}; {run}"


def _ceilings(found: Results) -> str:
    ceilings = found["ceilings"]
    return f"Measured in the same run: copy {ceilings['copy']:.0f} GB/s, product {ceilings['product']:.3g} TFLOP/s."


def _end_to_end(found: Results) -> str:
    head = ["shape", "", "fastmask", "x-transformers", "faster", "both compiled", "both CUDA graphs",
            "outside the network", "peak memory, MiB"]  # fmt: skip
    lines = []
    for task in TASKS:
        for rows in _cases(found, task):
            by_name = {row["name"]: row for row in rows if "ms" in row}
            ours, theirs = by_name.get("fastmask"), by_name.get("x-transformers")
            if ours is None or theirs is None:
                continue
            compiled = [by_name.get(f"{name}, network compiled") for name in ("fastmask", "x-transformers")]
            lines.append([
                ours["case"],
                TASK_NAMES[task],
                *(f"{_time(row['ms'])}, {row['rate']:,.0f} tokens/s" for row in (ours, theirs)),
                _faster(ours, theirs),
                _faster(*compiled),
                _faster(*(by_name.get(name) for name in GRAPHS.values())),
                " / ".join(_time(row["outside_ms"]) for row in (ours, theirs)),
                " / ".join("-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}" for row in (ours, theirs)),
            ])  # fmt: skip
    return _table(head, lines)


def _operations(found: Results) -> list[str]:
    return [name for name in dict.fromkeys(row["operation"] for row in found["rows"]) if name not in TASKS]


def _operation(found: Results, operation: str) -> str:
    """The fastest other may be eager. What tells ids only stands for itself; a host's time is told of GPUs."""
    head = ["shape", "fastmask", "of the floor", "eager", "faster", "fastest other", "faster", "ids only",
            "fastest other", "faster", "host's time, ours / eager"]  # fmt: skip
    lines = []
    for rows in _cases(found, operation):
        ours, other = _ours_and_fastest([row for row in rows if row["given"] != IDS_ONLY])
        if ours is None:
            continue
        eager = next((row for row in rows if row["is_baseline"] and "ms" in row), None)
        ids_only = _ours_and_fastest([row for row in rows if row["given"] == IDS_ONLY])
        lines.append([
            ours["case"],
            _time(ours["ms"]),
            f"{ours['percent_of_floor']:.0f} %",
            "-" if eager is None else _time(eager["ms"]),
            _faster(ours, eager),
            "-" if other is None else f"{_time(other['ms'])}, {other['contender']}",
            _faster(ours, other),
            "-" if ids_only[0] is None else _time(ids_only[0]["ms"]),
            "-" if ids_only[1] is None else f"{_time(ids_only[1]['ms'])}, {ids_only[1]['name']}",
            _faster(*ids_only),
            _host_times(ours, eager),
        ])  # fmt: skip
    return _table(head, lines)


def _ours_and_fastest(rows: Sequence[Row]) -> tuple[Row | None, Row | None]:
    """Of one job: fastmask, and the fastest of all others that are right."""
    right = [row for row in rows if row["status"] == "ok"]
    ours = next((row for row in right if row["name"] == "fastmask"), None)
    return ours, min((row for row in right if not row["is_ours"]), key=lambda row: row["ms"], default=None)


def _host_times(ours: Row, eager: Row | None) -> str:
    """Of rows that have them: a GPU's, of newer files."""
    times = [row["host_ms"] for row in (ours, eager) if row is not None and row.get("host_ms") is not None]
    return " / ".join(map(_time, times)) if len(times) == 2 else "-"


def _scaling(found: Results) -> str:
    lines = [
        [f"`{row['operation']}`", row["field"], row["contender"], f"{row['exponent']:.2f}", _first_and_last(row)]
        for row in found["scaling"]
    ]
    return _table(["operation", "with", "", "exponent", "from, to"], lines)


def _first_and_last(row: Row) -> str:
    return ", ".join(f"{value}: {_time(ms)}" for value, ms in (row["points"][0], row["points"][-1]))


def _largest_batches(found: Results) -> str:
    lines = [
        [row["case"].partition(", ")[2], TASK_NAMES[row["operation"]], row["contender"], str(row["batch"])]
        for row in found["largest_batches"]
    ]
    return _table(["shape", "", "", "sequences"], lines)


# --- what both share --------------------------------------------------------------------------------------------


def _cases(found: Results, operation: str) -> list[list[Row]]:
    """The rows of each case of an operation."""
    cases: dict[str, list[Row]] = {}
    for row in found["rows"]:
        if row["operation"] == operation:
            cases.setdefault(row["case"], []).append(row)
    return list(cases.values())


def _faster(ours: Row | None, other: Row | None) -> str:
    return "-" if ours is None or other is None else f"{other['ms'] / ours['ms']:.2f}x"


def _time(milliseconds: float) -> str:
    unit, factor = ("s", 1e-3) if abs(milliseconds) >= 1e3 else ("ms", 1.0) if abs(milliseconds) >= 1 else ("us", 1e3)
    value = milliseconds * factor
    digits = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}f} {unit}"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Markdown, without the columns in which nothing is told; "" without lines."""
    if not lines:
        return ""
    told = [column for column in range(len(head)) if any(line[column] != "-" for line in lines)]
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(row[column] for column in told)} |" for row in rows)
