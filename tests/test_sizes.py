"""Code stays in pieces that can be read at one sitting."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

MODULE, FUNCTION = 400, 60  # lines, docstrings, comments and blank lines included

# What is longer, and why it is better so.
LONGER = {
    "qspin/cli.py: run": "options with their help, a line each",
    "qspin/cli_trials.py: mtbench": "the same",
    "qspin/trials/judge.py: ask_all": "threads, and what hears of them, are to be seen at once",
    "qspin/evaluate.py: evaluate": "a list of the fields of one evaluation, each beside what it is made of",
    "qspin/optimisation.py: optimise": "a third is its docstring; a step must be seen whole to see what a stop leaves",
}


def too_long(file: Path) -> Iterator[str]:
    text = file.read_text(encoding="utf-8")
    name = file.relative_to(ROOT).as_posix()
    if len(text.splitlines()) > MODULE:
        yield name
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if node.end_lineno - node.lineno >= FUNCTION:
                yield f"{name}: {node.name}"


def test_modules_and_functions_can_be_read_at_one_sitting() -> None:
    folders = ("qspin", "qspin/*", "benchmarks", "tools")
    files = [ROOT / "cli.py", *(path for folder in folders for path in ROOT.glob(f"{folder}/*.py"))]
    assert {place for file in files for place in too_long(file)} == set(LONGER)


def test_what_is_too_long_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("test_sizes.ROOT", tmp_path)
    fits = "def fits():\n" + "    pass\n" * (FUNCTION - 1)
    over = "class Some:\n    async def over(self):\n" + "        pass\n" * FUNCTION
    (tmp_path / "a.py").write_text(fits + over)
    (tmp_path / "b.py").write_text("#\n" * (MODULE + 1))
    (tmp_path / "c.py").write_text("#\n" * MODULE)
    found = [place for name in "abc" for place in too_long(tmp_path / f"{name}.py")]
    assert found == ["a.py: over", "b.py"]
