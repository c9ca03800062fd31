"""docs/data.md says what the code does with rows: every reason, every sentence, every format and type of file."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from conftest import ROOT

from qspin.formats import FORMATS
from qspin.sources import READERS

PLACES = ("sources", "formats", "data", "chat", "chat_template", "prepare", "phases/learning")
MODULES = [ROOT / "qspin" / f"{place}.py" for place in PLACES]


def words(module: Path) -> set[str]:
    """All texts of a module's code, with "…" for what is put into them."""
    texts = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            texts.add("".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
    return texts


def defects() -> list[list[str]]:
    """The page's rows of three columns: defect, outcome, words or code."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").replace(r"\|", "¦")
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in page.splitlines() if line[:1] == "|"]
    return [row for row in rows if len(row) == 3 and row[0] not in {"defect", "---"}]


def test_the_page_has_every_reject_code_and_no_other() -> None:
    code = "\n".join(module.read_text(encoding="utf-8") for module in MODULES)
    used = set(re.findall(r"""(?:BadRow|UnfitError)\(\s*"([a-z-]+)\"""", code))
    used |= set(re.findall(r"""Reject\([\w.]+, "([a-z-]+)\"""", code))
    used |= {f"empty-{where}" for where in ("prompt", "completion")}  # of an f-string
    assert {"broken-json", "duplicate", "trained-on", "template", "control-token", "encoding"} <= used
    listed = {found for row in defects() for found in re.findall("`([a-z-]+)`", row[2]) if "left out" in row[1] or
              found == "duplicate"}  # fmt: skip
    assert listed == used


def test_the_pages_words_are_those_of_the_code() -> None:
    texts = set().union(*map(words, MODULES))
    quoted = [found for row in defects() for found in re.findall("`([^`]* [^`]*)`", row[2])]
    assert len(quoted) >= 30
    assert [phrase for phrase in quoted if not any(phrase in text for text in texts)] == []


def test_the_page_lists_every_format_and_type_of_file() -> None:
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    formats = re.findall(r"^\| `([a-z-]+)` \|", page, re.MULTILINE)
    assert formats == [*(format.name for format in FORMATS), "columns"]
    assert all(f"`{suffix}`" in page for suffix in READERS)
