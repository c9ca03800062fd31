"""The pages keep up with the code: commands, settings, messages, modules; and links lead somewhere."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import ROOT
from pages import BLOCK, DOCS, PAGES, name_of

from qspin.config import load_config

# --- pages that are made from the code ---


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("commands", ROOT / "tools" / "commands.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["commands.md", "configuration.md"])
def test_a_page_made_from_the_code_is_as_the_code_says(page: str, reference: ModuleType) -> None:
    made = reference.PAGES[page]()
    assert (DOCS / page).read_text(encoding="utf-8") == made, "renew it: python tools/commands.py (or make docs)"


def test_it_does_not_depend_on_the_terminal(reference: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    before = reference.commands()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert reference.commands() == before


def test_the_page_of_settings_has_them_all(reference: ModuleType) -> None:
    """The page's walk through the settings against pydantic's own, of a preset that has the model's shape."""

    def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[str]:
        for key, value in tree.items():
            if isinstance(value, dict) and value:
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield prefix + key

    found = set(re.findall(r"^\| `([\w.]+)`", reference.configuration(), re.MULTILINE))
    assert found == set(leaves(load_config("paper").model_dump()))


def test_the_page_says_what_may_change(reference: ModuleType) -> None:
    rows = [line.split(" | ") for line in reference.configuration().splitlines() if line.startswith("| `")]
    assert {row[0].strip("| `"): row[3] for row in rows}.items() >= {
        "train.beta": "no",
        "iterations": "yes",
        "about": "fact",
        "model.architecture.layers": "fact",
    }.items()


# --- every message of qspin stands on the page "When it goes wrong" ---

HOLE = "…"  # stands for a name or a number, here and on the page

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def trees() -> dict[str, ast.Module]:
    return {path.name: ast.parse(path.read_text(encoding="utf-8")) for path in sorted((ROOT / "qspin").rglob("*.py"))}


@cache
def functions() -> dict[tuple[str, str], Function]:
    """Every function by its name and module."""
    nodes = ((module, node) for module, tree in trees().items() for node in ast.walk(tree))
    return {(node.name, module): node for module, node in nodes if isinstance(node, Function)}


@cache
def function_of(name: str, module: str) -> tuple[Function, str] | None:
    """The function that a module calls by a name, its own or another's, and the module that has it."""
    homes = [each for each in (module, *trees()) if (name, each) in functions()]
    return (functions()[name, homes[0]], homes[0]) if homes else None


def texts(node: ast.expr, inside: Function, module: str, followed: frozenset[str] = frozenset()) -> list[str]:
    """What an expression may say, one text a branch, with holes for all but its fixed words.

    Followed, once each, are the names that the function gives to texts, and calls of qspin's own functions.
    """

    def of(*parts: ast.expr) -> list[str]:
        spoken = (texts(part, inside, module, followed) for part in parts)
        return ["".join(pieces) for pieces in itertools.product(*spoken)]

    found: list[str] = []
    match node:
        case ast.Constant(value=str(text)):
            found = [text]
        case ast.JoinedStr(values=parts):
            found = of(*(part.value if isinstance(part, ast.FormattedValue) else part for part in parts))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            found = of(left, right)
        case ast.IfExp(body=body, orelse=orelse):
            found = of(body) + of(orelse)
        case ast.Name(id=name) if name not in followed:
            given = [each for each in ast.walk(inside) if isinstance(each, ast.Assign)]
            values = [each.value for each in given if name in {getattr(target, "id", None) for target in each.targets}]
            spoken = [value for value in values if isinstance(value, ast.Constant | ast.JoinedStr | ast.IfExp)]
            found = [text for value in spoken for text in texts(value, inside, module, followed | {name})]
        case ast.Call(func=ast.Name(id=name)) if name not in followed and (told := function_of(name, module)):
            returned = [each.value for each in ast.walk(told[0]) if isinstance(each, ast.Return) and each.value]
            found = [text for value in returned for text in texts(value, *told, followed | {name})]
    return found or [HOLE]


@cache
def messages() -> tuple[tuple[str, str], ...]:
    """(where, what) of all that a QspinError may say, but for those that only pass on what another said."""
    nodes = [node for tree in trees().values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    kinds = {node.name for node in nodes if "QspinError" in {getattr(base, "id", None) for base in node.bases}}
    kinds = (kinds | {"QspinError"}) - {"UnfitError"}  # why a row is left out: docs/data.md has those
    found = {}
    for module, tree in trees().items():
        for function in (node for node in ast.walk(tree) if isinstance(node, Function)):
            for node in ast.walk(function):
                if isinstance(node, ast.Call) and getattr(node.func, "id", None) in kinds:
                    said = texts(node.args[0], function, module)
                    found |= {(f"{module}:{node.lineno}", text): None for text in said if letters(text)}
    return tuple(found)


def entries() -> list[str]:
    """The page's first column: what qspin says, of each row one text or several."""
    page = (DOCS / "trouble.md").read_text(encoding="utf-8")
    return [
        said for line in page.splitlines() if line[:1] == "|" for said in re.findall("`([^`]+)`", line.split(" | ")[0])
    ]


def letters(text: str) -> int:
    return sum(map(str.isalnum, text))


def covers(entry: str, message: str) -> bool:
    """Whether an entry has the message's words in their order, and enough of them: 12 letters, or all it states."""
    pieces = (re.escape(piece.strip()) for piece in entry.split(HOLE))
    stated = message.partition("; ")[0]
    enough = min(12, letters(stated) or letters(message))
    return letters(entry) >= enough and re.search(".*".join(pieces), message, re.DOTALL) is not None


def test_every_message_has_an_entry() -> None:
    found = entries()
    assert len(messages()) > 150
    missing = [f"{where}: {what}" for where, what in messages() if not any(covers(entry, what) for entry in found)]
    assert not missing, "docs/trouble.md has no entry for\n" + "\n".join(missing)


def test_every_entry_is_of_a_message() -> None:
    said = [message for _, message in messages()]
    stale = [entry for entry in entries() if not any(covers(entry, message) for message in said)]
    assert not stale, "docs/trouble.md quotes what qspin does not say\n" + "\n".join(stale)


def test_an_entry_covers_its_own_message_alone() -> None:
    message = "…: the disk is full: … bytes are free; free some space"
    assert covers("the disk is full: …", message)
    assert covers("the disk … are free", message)
    assert not covers("disk is full", message), "too little of it"
    assert not covers("the disk is … too full", message)
    assert covers("no disk", "…: no disk; buy one"), "all that it states"


# --- the architecture's list of modules ---


def test_every_module_stands_on_the_page_of_the_architecture() -> None:
    page = (DOCS / "architecture.md").read_text(encoding="utf-8")
    modules = {path.name for path in (ROOT / "qspin").rglob("*.py")} - {"__init__.py"}
    named = set(re.findall(r"`(\w+\.py)`", page))
    assert sorted(modules - named) == [], "say in a line of docs/architecture.md what it is for"
    assert sorted(named - modules) == []


# --- links ---


def prose(page: Path) -> str:
    """A page's text without its blocks of code, and without code in it."""
    return re.sub(r"`[^`\n]*`", "code", BLOCK.sub("\n", page.read_text(encoding="utf-8")))


def anchors(page: Path) -> set[str]:
    """Of its headings, as forges make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ +(.+?) *$", text, re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[slug] = found.get(slug, -1) + 1
    return {slug if nth == 0 else f"{slug}-{nth}" for slug, count in found.items() for nth in range(count + 1)}


def links(page: Path) -> list[str]:
    """Links and pictures that lead to somewhere in the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)|(?:href|src|srcset)=\"([^\"]+)\"", prose(page))
    return [target for target in (one or other for one, other in found) if not re.match(r"[a-z]+:", target)]


def broken(page: Path, target: str) -> bool:
    """No such file, a folder, which a site can't show, or no such heading."""
    name, _, anchor = target.partition("#")
    file = (page.parent / name).resolve() if name else page
    return not file.is_file() or bool(anchor and anchor not in anchors(file))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    assert [target for target in links(page) if broken(page, target)] == []


def test_links_are_found_and_broken_ones_seen() -> None:
    readme = ROOT / "README.md"
    assert {"docs/performance.md#on-a-gpu", "docs/images/report-light.png"} <= set(links(readme))
    assert broken(readme, "docs/nothing.md")
    assert broken(readme, "docs")
    assert broken(readme, "docs/performance.md#on-the-moon")
