"""The pages of docs/, for tests that hold them to the code."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# of code, between fences or indented
BLOCK = re.compile(r"^(?:```.*\n(?P<fenced>(?:.*\n)*?)```|(?P<indented>(?:(?: {4}.*)?\n)+))", re.MULTILINE)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def section(page: str, heading: str) -> str:
    """What stands below a heading of a page, up to the next one like it."""
    _, _, found = (DOCS / page).read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    assert found, heading
    return found.partition("\n## ")[0]


def blocks(page: str, heading: str) -> list[str]:
    """The code blocks of a section."""
    return re.findall(r"^```[a-z]*\n(.*?)^```$", section(page, heading), re.MULTILINE | re.DOTALL)
