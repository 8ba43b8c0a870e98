"""One case's rows as a table of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.records import Published, Row

# A table's columns: heading, the row's field, and its cell. A column that no row has is left out.
_COLUMNS: tuple[tuple[str, str, Callable[[Any], str]], ...] = (
    ("ms", "ms", "{:.3f}".format),
    ("[min, max]", "spread", lambda spread: "[{:.3f}, {:.3f}]".format(*spread)),
    ("rate", "rate", lambda rate: f"{rate:.3g}" if rate < 100 else f"{rate:.0f}"),
    ("% of floor", "percent_of_floor", "{:.0f}".format),
    ("bytes/logit", "bytes_per_logit", "{:.1f}".format),
    ("outside ms", "outside_ms", "{:.3f}".format),
    ("host ms", "host_ms", "{:.3f}".format),
    ("peak MiB", "peak_mib", "{:.0f}".format),
    ("error/limit", "of_limit", "{:.1g}".format),
)


def table(rows: Sequence[Row], published: Published | None) -> str:
    """The timed rows by rising time, then those that were not timed, and why."""
    timed = sorted((row for row in rows if "ms" in row), key=lambda row: row["ms"])
    lines = [f"\n{rows[0]['operation']}, {rows[0]['case']}"]
    if timed:
        lines += _aligned(timed)
    reasons: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        if row["reason"]:
            how = "timed although" if "ms" in row else "not timed,"
            names = reasons.setdefault(f"{how} {row['status']} ({row['reason']})", {})
            names.setdefault(row["name"], []).append(row["given"])
    for why, names in reasons.items():
        lines.append(f"{why}: " + "; ".join(_with_given(name, given) for name, given in names.items()))
    ours = [row for row in timed if row["is_ours"]]
    if published is not None and ours:
        rate = max(row["rate"] for row in ours)
        lines.append(
            f"{published.who}, published, not measured here: {published.rate:g} {published.unit} "
            f"({published.source}); ours here {rate:.0f}, {rate / published.rate:.2f} of it"
        )
    return "\n".join(lines)


def _aligned(timed: Sequence[Row]) -> list[str]:
    columns = [column for column in _COLUMNS if any(row.get(column[1]) is not None for row in timed)]
    ratios = list(dict.fromkeys(name for row in timed for name in row["ratio"]))
    head = [
        "",
        *(timed[0]["unit"] if name == "rate" else name for name, _, _ in columns),
        *(f"x {ratio}" for ratio in ratios),
    ]
    body = [
        [
            row["contender"],
            *("-" if row.get(key) is None else cell(row[key]) for _, key, cell in columns),
            *(f"{row['ratio'][name]:.2f}" if name in row["ratio"] else "-" for name in ratios),
        ]
        for row in timed
    ]
    widths = [max(map(len, column)) for column in zip(head, *body, strict=True)]
    return [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in [head, *body]
    ]


def _with_given(name: str, given: Sequence[str]) -> str:
    return f"{name} [{', '.join(one or 'in full' for one in given)}]" if any(given) else name
