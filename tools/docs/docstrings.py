"""Docstrings as Markdown: their aligned lists of names become blocks that keep their lines. A griffe extension."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ENTRY = re.compile(r"[\w*][\w*, ./()]*(  +|: )\S")  # a name, or several, and what it is


def as_markdown(text: str) -> str:
    """Runs of lines such as `name   what it is`, with the indented lines after each, in fences; the rest as it is."""
    lines, out, i = text.splitlines(), [], 0
    while i < len(lines):
        end = i
        while end < len(lines) and (_ENTRY.match(lines[end]) or (end > i and lines[end].startswith("  "))):
            end += 1
        table = [line for line in lines[i:end] if re.match(r"\S+.*?  +\S", line)]
        if end - i > 1 and table:
            out += ["", "```text", *lines[i:end], "```", ""]
            i = end
        else:
            out.append(lines[i])
            i += 1
    return "\n".join(out)


class Fences(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
