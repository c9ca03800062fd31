"""Each small break is made once, and what does nothing is left alone."""

from __future__ import annotations

import ast
import re

import pytest
from conftest import ROOT
from mutants import mutants

SOURCE = '''"""Doc."""
import os
@some(1)
def f(a: int = 0) -> "int":
    """Doc 1."""
    if a < 1 and (not a):
        raise ValueError("no")
    if a:
        return None
    return -min(a[1:], 2.0)
'''


def test_each_small_break_is_made_once_and_alone() -> None:
    tree = ast.parse(SOURCE)
    found = [(line, change) for line, change, _ in mutants(tree)]
    assert sorted(found) == [
        (4, "0 → 1"),
        (6, "1 → 2"),
        (6, "And in a < 1 and (not a) → Or in a < 1 and (not a)"),
        (6, "Lt in a < 1 → LtE in a < 1"),
        (6, "not a → a"),
        (7, "'no' → 'nox'"),
        (7, "raise ValueError('no') → pass"),
        (10, "-min(a[1:], 2.0) → min(a[1:], 2.0)"),
        (10, "1 → 2"),
        (10, "1: → :"),
        (10, "2.0 → 3.0"),
        (10, "min → max"),
        (10, "return -min(a[1:], 2.0) → return None"),
    ]
    assert ast.unparse(tree) == ast.unparse(ast.parse(SOURCE)), "changed back"
    texts = [ast.unparse(mutated) for _, _, mutated in mutants(tree)]
    assert len({*texts, ast.unparse(tree)}) == len(found) + 1
    one = next(mutated for _, change, mutated in mutants(tree) if change == "min → max")
    assert ast.unparse(one) == ast.unparse(tree).replace("min", "max")


@pytest.mark.parametrize("module", ["loss", "packing"])
def test_the_page_is_of_the_module_as_it_is(module: str) -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    [ways] = re.findall(rf"^\| `{module}\.py` \| (\d+) \|", page, re.MULTILINE)
    source = (ROOT / "qspin" / f"{module}.py").read_text(encoding="utf-8")
    told = f"the module was changed: python tools/mutants.py qspin/{module}.py tests/test_{module}.py --noconftest"
    assert len(list(mutants(ast.parse(source)))) == int(ways), told
