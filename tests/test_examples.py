"""What the pages tell people to type: commands, settings and targets are there, and examples work."""

from __future__ import annotations

import contextlib
import itertools
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from command_line import call
from conftest import HOUSE_STYLE, ROOT, small_run
from pages import BLOCK, DOCS, PAGES, name_of

from qspin.cli import app
from qspin.config import RunConfig, dump_config, load_config
from qspin.config_files import preset_names
from qspin.run_dir import RunDir

# --- what can be typed ---


@dataclass(frozen=True, slots=True)
class Line:
    """A command line of a page, without `qspin`."""

    page: str
    words: tuple[str, ...]
    whole: bool  # to be typed as it stands, rather than a synopsis or a mention

    def __str__(self) -> str:
        return f"{self.page}: qspin {shlex.join(self.words)}"


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
