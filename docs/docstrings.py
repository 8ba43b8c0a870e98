"""Shows the docstrings on the site: their reStructuredText markup becomes Markdown. An extension of griffe."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

# ".. math::" with what follows on its line, and the indented lines below.
_DISPLAYED_MATH = re.compile(r"^\.\. math::(.*(?:\n(?: +.*)?)*)", re.MULTILINE)
_INLINE_MATH = re.compile(r":math:`([^`]*)`")
_NAME = re.compile(r":(?:func|class|meth):`([^`]*)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
# A section that names several exceptions in one paragraph; griffe wants a line each.
_RAISES = re.compile(r"^Raises:\n((?: +\S.*\n?)+)", re.MULTILINE)
_EXCEPTION = re.compile(r"(?<!,) (?=[A-Z]\w+Error(?:, [A-Z]\w+Error)*: )")


class Markdown(griffe.Extension):
    """Rewrites every docstring of a package once it is read."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        public = set(pkg["functional"].members)

        def link(match: re.Match[str]) -> str:
            """Unqualified names are those of ``fastmask.functional``, which has a page."""
            path = match[1]
            name = path.rpartition(".")[2]
            if path == name and name in public:
                path = f"{pkg.name}.functional.{name}"
            return f"[`{name}`][{path}]" if path.startswith(f"{pkg.name}.") else f"`{name}`"

        def markdown(text: str) -> str:
            text = _DISPLAYED_MATH.sub(lambda match: f"$$\n{textwrap.dedent(match[1]).strip()}\n$$\n\n", text)
            text = _RAISES.sub(_a_line_each, text)
            text = _INLINE_MATH.sub(r"$\1$", text)
            return _EXAMPLE.sub("Examples:", _NAME.sub(link, text))

        _rewrite(pkg, markdown)


def _a_line_each(match: re.Match[str]) -> str:
    return "Raises:\n" + "".join(f"    {line}\n" for line in _EXCEPTION.split(" ".join(match[1].split())))


def _rewrite(found: griffe.Object, markdown: Any) -> None:
    if found.docstring is not None:
        found.docstring.value = markdown(found.docstring.value)
    for member in found.members.values():
        if isinstance(member, griffe.Object):  # not an alias, whose target is met where it lies
            _rewrite(member, markdown)
