"""Markdown from parts: tables, code, and text from outside that is not read as markup.

table(["reason", "rows"], [(plain(reason), "3")])
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence


def plain(text: str) -> str:
    """Text from outside on one line, shown by Markdown as it is, in a table as well."""
    return _MARKUP.sub(_inert, unbroken(text))


def unbroken(text: str) -> str:
    """Text without line breaks and what can't be printed; spaces in a row become one."""
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


_MARKUP = re.compile(r"[\\`*_{}\[\]<>&|#~$:@]")


def _inert(found: re.Match[str]) -> str:
    # entities for what would be HTML, should a reader know of HTML alone
    return {"&": "&amp;", "<": "&lt;", ">": "&gt;"}.get(found[0], f"\\{found[0]}")


def code(text: str) -> str:
    """Hashes, versions and our own names, set as code."""
    return f"`{text}`" if re.fullmatch(r"[\w.+/ -]+", text) else plain(text)


def fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows))


def document(metadata: str, *parts: str) -> str:
    """A file of parts under YAML front matter."""
    return "\n\n".join([f"---\n{metadata}\n---", *parts]) + "\n"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def numbers(value: float | list[float]) -> str:
    """A setting that may be a list, one an iteration."""
    return ", ".join(f"{number:g}" for number in value) if isinstance(value, list) else f"{value:g}"
