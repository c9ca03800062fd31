"""Breaks a module in one small way at a time, and tells which breaks its tests don't notice.

    python tools/mutants.py qspin/loss.py tests/test_loss.py
    python tools/mutants.py qspin/packing.py tests/test_packing.py --only 40-60 --noconftest

A mutant that survives is a hole in the tests, or means the same as the original. The tests run in a copy of the
checkout; nothing of the checkout itself is touched. Options that are not its own go to pytest. Exits with 1 if any
survives.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis  # noqa: F401  # what tests import, once for all mutants
import pytest
import torch.testing  # noqa: F401
import transformers  # noqa: F401

ROOT = Path(__file__).parents[1]
COPIED = ("qspin", "tests", "presets", "benchmarks", "pyproject.toml", "cli.py")
SECONDS = 120  # that the tests may take of one mutant; it counts as noticed after that

SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.BitOr: ast.BitAnd, ast.Break: ast.Continue, ast.Continue: ast.Break,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "is_file": "is_dir", "is_dir": "is_file"}


def mutants(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """Line, change and whole tree of each; `tree` has been changed back before the next one is made."""
    skipped = {id(part) for node in ast.walk(tree) for silent in _silent(node) for part in ast.walk(silent)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        for field, value in ast.iter_fields(node):
            for index, item in enumerate(value if isinstance(value, list) else [value]):
                if id(item) in skipped:
                    continue
                for changed in _changes(item):
                    new = [*value[:index], changed, *value[index + 1 :]] if isinstance(value, list) else changed
                    setattr(node, field, new)
                    mutated = ast.fix_missing_locations(copy.deepcopy(tree))
                    setattr(node, field, value)
                    line = getattr(item, "lineno", getattr(node, "lineno", 0))
                    yield line, f"{_shown(node, item)} → {_shown(node, changed)}", mutated


def _silent(node: ast.AST) -> Iterator[ast.AST]:
    """What does nothing by itself: docstrings, imports, annotations, and decorators, which are types' for the most."""
    match node:
        case ast.Expr(value=ast.Constant()) | ast.Import() | ast.ImportFrom():
            yield node
        case ast.FunctionDef(returns=returns):
            yield from [*node.decorator_list, *([returns] if returns else [])]
        case ast.ClassDef():
            yield from node.decorator_list
        case ast.AnnAssign(annotation=annotation) | ast.arg(annotation=ast.expr() as annotation):
            yield annotation


def _changes(item: object) -> Iterator[ast.AST | str]:
    if isinstance(item, ast.AST) and type(item) in SWAPS:
        yield SWAPS[type(item)]()
    match item:
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value) | float(value)):
            yield ast.Constant(value + 1)
        case ast.Constant(value=str(value)):
            yield ast.Constant(value + "x")
        case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
            yield operand
        case ast.Name(id=name) if name in NAMES:
            yield ast.Name(NAMES[name], ast.Load())
        case ast.Attribute(attr=name) if name in NAMES:
            yield ast.Attribute(item.value, NAMES[name], ast.Load())
        case ast.Slice() if item.lower is not None or item.upper is not None:
            yield ast.Slice()
        case ast.IfExp():
            yield from (item.body, item.orelse)
        case ast.Return(value=ast.expr() as value) if ast.unparse(value) != "None":
            yield ast.Return(ast.Constant(None))
        case ast.Expr() | ast.AugAssign() | ast.Raise():
            yield ast.Pass()


def _shown(node: ast.AST, item: object) -> str:
    if isinstance(item, ast.operator | ast.cmpop | ast.boolop):
        return f"{type(item).__name__} in {ast.unparse(node)}"
    return ast.unparse(item) if isinstance(item, ast.AST) else str(item)


def noticed(folder: Path, tests: list[str]) -> bool:
    """Whether the tests fail in a folder. The process is forked after the slow imports, and before those of qspin."""
    child = os.fork()
    if child == 0:
        os.setsid()
        os.chdir(folder)
        sys.path.insert(0, str(folder))
        os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]) != 0))
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status != 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", help="as qspin/loss.py")
    parser.add_argument("tests", nargs="+", help="what pytest is to run, as tests/test_loss.py")
    parser.add_argument("--only", help="of the mutants, as 40-60")
    options, others = parser.parse_known_args()
    tests = [*options.tests, *others]
    source = (ROOT / options.module).read_text(encoding="utf-8")
    made = list(enumerate(mutants(ast.parse(source)), 1))
    if options.only:
        first, last = map(int, options.only.split("-"))
        made = made[first - 1 : last]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in COPIED:
            place = ROOT / name
            (shutil.copytree if place.is_dir() else shutil.copy)(place, folder / name)
        for cache in list(folder.rglob("__pycache__")):
            shutil.rmtree(cache)
        if noticed(folder, tests):
            raise SystemExit("the tests fail before anything is broken")
        survivors = 0
        for number, (line, change, tree) in made:
            (folder / options.module).write_text(ast.unparse(tree), encoding="utf-8")
            if not noticed(folder, tests):
                survivors += 1
                print(f"{number}: {options.module}:{line}: {change}", flush=True)
    print(f"{survivors} of {len(made)} went unnoticed")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
