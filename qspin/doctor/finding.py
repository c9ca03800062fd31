"""What the doctor finds, one thing at a time, and how it is told on a terminal."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.text import Text

Level = Literal["ok", "warning", "problem"]

STYLES: dict[Level, str] = {"ok": "green", "warning": "bold yellow", "problem": "bold red"}
INDENT = len("problem  ")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: Level
    found: str
    advice: str = ""  # what to do, where something is
    command: str = ""  # the shell's line that does it


def as_text(finding: Finding, width: int) -> Text:
    """A finding in lines of at most `width` columns; a command stays whole, to be copied."""
    lines = _wrapped(f"{finding.name}: {finding.found}", f"{finding.level:<{INDENT}}", " " * INDENT, width)
    if finding.advice:
        lines += _wrapped(finding.advice, " " * INDENT + "→ ", " " * (INDENT + 2), width)
    if finding.command:
        lines.append(" " * (INDENT + 2) + finding.command)
    text = Text("\n".join(lines))
    text.stylize(STYLES[finding.level], 0, len(finding.level))
    return text


def verdict(findings: Sequence[Finding]) -> str:
    """The last line."""
    problems = [finding.name for finding in findings if finding.level == "problem"]
    if not problems:
        return "a run can start"
    return f"{len(problems)} problem{'s' * (len(problems) > 1)}: {', '.join(problems)}"


def pip(arguments: str) -> str:
    """Of this environment, whichever is active. Double quotes are what every shell knows."""
    executable = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    return f"{executable} -m pip {arguments}"


def _wrapped(text: str, first: str, later: str, width: int) -> list[str]:
    """Lines of text; a word that is wider than a line, such as a path, stays whole."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
