"""The pages keep up with the code: commands, settings, messages, links, examples, and the site that is made of them."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from conftest import HOUSE_STYLE, ROOT, small_run
from test_cli import call
from test_page import Elements

from qspin.cli import app
from qspin.config import RunConfig, dump_config, load_config
from qspin.config_files import preset_names
from qspin.run_dir import RunDir

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


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


# --- what a page tells people to type ---


@dataclass(frozen=True, slots=True)
class Line:
    """A command line of a page, without `qspin`."""

    page: str
    words: tuple[str, ...]
    whole: bool  # to be typed as it stands, rather than a synopsis or a mention

    def __str__(self) -> str:
        return f"{self.page}: qspin {shlex.join(self.words)}"


BLOCK = re.compile(r"^(?:```.*\n(?P<fenced>(?:.*\n)*?)```|(?P<indented>(?:(?: {4}.*)?\n)+))", re.MULTILINE)


def lines(page: Path) -> Iterator[Line]:
    """Every `qspin …` of a page: in a block of code as a line of its own, or in a text's code."""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        code = re.sub(r"\\\n\s*", "", block["fenced"] or block["indented"])
        for found in re.findall(r"^\s*(?:\$ )?(?:\.venv/bin/)?qspin (.+)$", code, re.MULTILINE):
            yield _line(page, found, whole=not re.search(r"[…\[]", found))
    for found in re.findall(r"`(?:\.venv/bin/)?qspin ([^`]+)`", BLOCK.sub("\n", text)):
        yield _line(page, found, whole=False)


def _line(page: Path, text: str, *, whole: bool) -> Line:
    words = shlex.split(text.translate({ord(mark): " " for mark in "[]"}), comments=True)
    return Line(name_of(page), tuple(itertools.takewhile(lambda word: word not in {"|", "&&", ">"}, words)), whole)


LINES = list(dict.fromkeys(line for page in PAGES for line in lines(page)))
TREE: Any = typer.main.get_command(app)


def command_of(line: Line) -> tuple[Any, list[str]]:
    """The command that a line calls, and the words that come after its name."""
    words, command = list(line.words), TREE
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    return command, words


def test_lines_are_found_in_all_pages() -> None:
    assert len(LINES) > 60
    assert {"README.md", "docs/data.md", "docs/watching.md", "docs/commands.md"} <= {line.page for line in LINES}
    assert Line("docs/presets.md", ("presets", "show", "qwen3-8b"), whole=True) in LINES
    wrapped = next(line for line in LINES if line.page == "docs/experiments.md" and "sweep" in line.words)
    assert "--vary" in wrapped.words, "a line that goes on in the next"


def problem(line: Line) -> str | None:
    """What is wrong with a line: no such command, no such option, no such preset, or not what the command takes."""
    command, words = command_of(line)
    if hasattr(command, "commands") and words and words[0] not in {"--help", "COMMAND"}:
        return f"no command {words[0]}"
    known = {"--help", *(name for parameter in command.params for name in parameter.opts)}
    unknown = [word for word in words if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in known]
    if unknown:
        return f"no option {unknown[0]}"
    if line.whole:
        try:
            context = command.make_context("qspin", [word for word in words if word != "--help"])
        except Exception as error:  # noqa: BLE001 (of several classes, in Typer or in click, by version)
            return str(error) or type(error).__name__
        named = context.params.get("source", context.params.get("preset"))
        if named and named.islower() and not named.endswith(".yaml") and named not in preset_names():
            return f"no preset {named}"
    return None


@pytest.mark.parametrize("line", LINES, ids=str)
def test_what_a_page_says_can_be_typed(line: Line, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunDir, "check_run", lambda _self: None)  # a page's runs are its reader's
    assert problem(line) is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rum smollm2-135m --out x", "no command rum"),
        ("run smollm2-135m --out x --drop-run", "no option --drop-run"),
        ("run smollm3-135m --out x", "no preset smollm3-135m"),
        ("run smollm2-135m", "Missing"),
        ("plan qwen3-8b --vram much", "number"),
        ("presets shaw qwen3-8b", "no command shaw"),
    ],
)
def test_what_can_not_be_typed_is_seen(text: str, said: str) -> None:
    assert said in str(problem(_line(ROOT / "README.md", text, whole=True)))


def settings() -> set[str]:
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `([\w.]+)`", text, re.MULTILINE))


def named_settings(page: Path) -> set[str]:
    groups = "|".join(name for name, field in RunConfig.model_fields.items() if isinstance(field.annotation, type))
    found = re.findall(rf"(?:`|--set |--vary )'?((?:{groups})\.[a-z_.]+)(?=[=`])", page.read_text(encoding="utf-8"))
    return {name for name in found if name.rpartition(".")[2] not in {"py", "json", "jsonl", "md", "yaml"}}


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "architecture.md"], ids=name_of)  # has modules
def test_settings_that_a_page_names_are_there(page: Path) -> None:
    """A setting, a group of them (`model.architecture.*`), or a key in a setting that is a mapping."""
    known = settings()
    assert [
        name
        for name in named_settings(page)
        if not any(f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for key in known)
    ] == []


def test_settings_are_found_in_pages() -> None:
    assert {"train.beta", "evaluation.keep"} <= set().union(*map(named_settings, PAGES))


def test_targets_of_make_are_there() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = {
        found
        for page in PAGES
        for found in re.findall(r"(?:^    |`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert {"quickstart", "docs"} <= targets
    assert named <= targets


# --- examples that are carried out ---

OF_A_RUN = {"status", "report", "compare", "export", "baseline", "push"}


def can_be_tried(line: Line) -> bool:
    """In seconds, without a network or a real model's weights."""
    if not line.whole or line.page == "docs/commands.md":  # which has synopses alone
        return False
    first = line.words[0]
    if first in {"plan", "presets", "init"} or "--dry-run" in line.words:
        return first != "push" or "runs/mine" in line.words
    return first in OF_A_RUN - {"push"} and line.words[1] == "runs/mine"


TRIED = list({line.words: line for line in LINES if can_be_tried(line)}.values())


@pytest.fixture(scope="module")
def workplace(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of a tiny model in runs/mine."""
    folder = tmp_path_factory.mktemp("work")
    config = load_config(None, small_run(tiny_folder("llama"), folder / "rows.jsonl", rows=18) | {"iterations": 1})
    (folder / "tiny.yaml").write_text(dump_config(config))
    with contextlib.chdir(folder):
        answer = call("run", "tiny.yaml", "--out", "runs/mine")
    assert answer.code == 0, answer.err
    return folder


def test_examples_are_tried() -> None:
    assert {line.words[0] for line in TRIED} >= {"plan", "presets", "init", "run", *OF_A_RUN}


@pytest.mark.slow
@pytest.mark.parametrize("line", TRIED, ids=str)
def test_an_example_works(line: Line, workplace: Path, tmp_path: Path) -> None:
    """As it stands on its page; what is not of a run starts in an empty folder with mine.jsonl."""
    if line.words[0] not in OF_A_RUN:
        shutil.copy(HOUSE_STYLE / "train.jsonl", tmp_path / "mine.jsonl")
    with contextlib.chdir(workplace if line.words[0] in OF_A_RUN else tmp_path):
        answer = call(*line.words)
    assert answer.code == 0, answer.err


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


# --- the site ---


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` builds it: a warning fails, which --quiet would hide from --strict."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def pages_of(site: Path) -> list[Path]:
    return sorted(site.rglob("*.html"))


def test_the_site_has_every_page_and_the_files_they_link_to(site: Path) -> None:
    made = {page.relative_to(site).with_suffix(".md").as_posix() for page in pages_of(site)}
    assert made == {"404.md", *(page.relative_to(DOCS).as_posix() for page in PAGES[1:])}
    assert (site / "repository" / "benchmarks" / "results" / "export-cpu.json").is_file()


def test_the_site_asks_nothing_of_another_server(site: Path) -> None:
    fetched = []
    for page in pages_of(site):
        for tag, attributes in Elements(page.read_text(encoding="utf-8")).found:
            if tag in {"script", "img", "source", "iframe"} or (tag == "link" and attributes.get("rel") != "canonical"):
                fetched += [value for name in ("src", "href", "srcset") if (value := attributes.get(name))]
    assert len(fetched) > 100
    assert [address for address in fetched if "//" in address] == []
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert [found for text in styles for found in re.findall(r"@import|url\(['\"]?https?:", text)] == []


def test_no_list_or_table_came_out_as_a_paragraph(site: Path) -> None:
    """The site's Markdown wants an empty line before them, a forge's does not."""
    for page in pages_of(site):
        paragraphs = re.findall(r"<p>(.*?)</p>", page.read_text(encoding="utf-8"), re.DOTALL)
        assert [text for text in paragraphs if re.search(r"^(?:[-*|] |\d+\. )", text, re.MULTILINE)] == [], page.name


def test_a_cell_shows_a_bar_in_code(site: Path) -> None:
    assert "<code>&lt;|im_end|&gt;</code>" in (site / "data.html").read_text(encoding="utf-8")
