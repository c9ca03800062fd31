"""Files and folders are there whole or not at all, whatever moment a process dies at."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from qspin.errors import QspinError
from qspin.files import (
    MANIFEST,
    check_folder,
    commit_folder,
    full_disk_told,
    make_folder,
    remove,
    remove_temporaries,
    write_text,
)

KILLED = 77

# Runs one writer, and dies without a word before its n-th step that reaches the file system.
VICTIM = """
import os, sys
from pathlib import Path
from qspin.files import commit_folder, write_text

target, writer, fatal = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
steps = 0

def step():
    global steps
    steps += 1
    if steps == fatal:
        os._exit(77)

def audit(event, _):
    if event in {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"}:
        step()

def file():
    write_text(target, "new " * 1000)

def folder():
    with commit_folder(target) as temporary:
        for name in ("a.txt", "b.txt"):
            (temporary / name).write_text(name * 1000)

def careless_file():
    with target.open("w") as file:
        file.write("new " * 500)
        file.flush()
        os.fsync(file.fileno())
        file.write("new " * 500)

def careless_folder():
    target.mkdir()
    for name in ("a.txt", "b.txt"):
        (target / name).write_text(name * 1000)

sync = os.fsync
os.fsync = lambda descriptor: (step(), sync(descriptor))
sys.addaudithook(audit)
globals()[writer]()
os._exit(0)
"""


def deaths(target: Path, writer: str, before: Callable[[], None]) -> Iterator[None]:
    """Let the writer die before its first step, its second, … until it gets through; `before` makes the ground."""
    for fatal in range(1, 100):
        before()
        command = [sys.executable, "-c", VICTIM, str(target), writer, str(fatal)]
        ended = subprocess.run(command, check=False).returncode
        assert ended in {0, KILLED}
        yield
        if ended == 0:
            assert fatal > 1, "it died nowhere"
            return
    raise AssertionError("it never got through")


def file_states(target: Path, writer: str) -> list[str]:
    def before() -> None:
        target.write_text("old")

    known = {"old": "old", "new " * 1000: "new"}
    return [known.get(target.read_text(), "half") for _ in deaths(target, writer, before)]


def folder_states(target: Path, writer: str) -> list[str]:
    def before() -> None:
        shutil.rmtree(target.parent, ignore_errors=True)
        target.parent.mkdir()

    def state() -> str:
        if not target.exists():
            return "nothing"
        files = {path.name: path.read_text() for path in target.iterdir() if path.name != MANIFEST}
        return "all" if files == {name: name * 1000 for name in ("a.txt", "b.txt")} else "half"

    found = []
    for _ in deaths(target, writer, before):
        found.append(state())
        if found[-1] == "all" and writer == "folder":
            check_folder(target)
        remove_temporaries(target.parent)
        assert list(target.parent.iterdir()) == [target] * target.exists(), "leftovers that the next run does not clear"
    return found


def test_a_file_is_the_old_or_the_new_wherever_its_writer_dies(tmp_path: Path) -> None:
    states = file_states(tmp_path / "file.txt", "file")
    assert states == sorted(states, reverse=True), "old, and from one moment on new"
    assert set(states) == {"old", "new"}


def test_a_folder_is_there_whole_or_not_at_all_wherever_its_writer_dies(tmp_path: Path) -> None:
    states = folder_states(tmp_path / "ground" / "folder", "folder")
    assert states == sorted(states, reverse=True), "nothing, and from one moment on all"
    assert set(states) == {"nothing", "all"}


def test_the_deaths_would_show_a_careless_writer(tmp_path: Path) -> None:
    assert "half" in file_states(tmp_path / "file.txt", "careless_file")
    assert "half" in folder_states(tmp_path / "ground" / "folder", "careless_folder")


# --- what is on the disk before what ---


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | str]]:
    """("sync", inode) and ("rename", new name), in the order they happen."""
    seen: list[tuple[str, int | str]] = []
    sync, rename, replace = os.fsync, os.rename, os.replace

    def on_sync(descriptor: int) -> None:
        seen.append(("sync", os.fstat(descriptor).st_ino))
        sync(descriptor)

    def on_rename(old: Path, new: Path) -> None:
        seen.append(("rename", Path(new).name))
        rename(old, new)

    def on_replace(old: Path, new: Path) -> None:
        seen.append(("rename", Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", on_sync)
    monkeypatch.setattr(os, "rename", on_rename)
    monkeypatch.setattr(os, "replace", on_replace)
    return seen


def test_a_file_reaches_the_disk_before_its_name_and_its_name_before_the_call_ends(
    tmp_path: Path, steps: list[tuple[str, int | str]]
) -> None:
    write_text(tmp_path / "x", "text")
    written, folder = (tmp_path / "x").stat().st_ino, tmp_path.stat().st_ino
    assert steps == [("sync", written), ("rename", "x"), ("sync", folder)]


def test_a_folders_files_reach_the_disk_before_its_name(tmp_path: Path, steps: list[tuple[str, int | str]]) -> None:
    with commit_folder(tmp_path / "x") as temporary:
        (temporary / "a").write_text("a")
        (temporary / "b").write_text("b")
    named = steps.index(("rename", "x"))
    inside = {("sync", path.stat().st_ino) for path in (tmp_path / "x", *(tmp_path / "x").iterdir())}
    assert len(inside) == 4  # the folder itself, its two files, and the manifest
    assert inside <= set(steps[:named])
    assert steps[named + 1 :] == [("sync", tmp_path.stat().st_ino)]


def test_new_folders_reach_the_disk_from_the_top(tmp_path: Path, steps: list[tuple[str, int | str]]) -> None:
    make_folder(tmp_path / "a" / "b")
    assert steps == [("sync", tmp_path.stat().st_ino), ("sync", (tmp_path / "a").stat().st_ino)]


def test_a_removal_is_one_step_on_the_disk(tmp_path: Path, steps: list[tuple[str, int | str]]) -> None:
    for path in (tmp_path / "file", tmp_path / "folder" / "inside"):
        write_text(path, "text")
    del steps[:]
    remove(tmp_path / "folder")
    assert [step for step, _ in steps] == ["rename", "sync"]
    remove(tmp_path / "file")
    remove(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


# --- what a writer makes, and leaves where it fails ---


def test_what_a_file_holds_already_is_not_written(tmp_path: Path) -> None:
    for text in ("text", "text", "test"):
        write_text(tmp_path / "x", text)
        found = tmp_path / "x", tmp_path / "x.link"
        found[1].unlink(missing_ok=True)
        found[1].hardlink_to(found[0])
        write_text(tmp_path / "x", text)
        assert found[0].samefile(found[1])
        assert found[0].read_text() == text


def test_folders_on_the_way_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "file", "text")
    with commit_folder(tmp_path / "c" / "d" / "folder"):
        pass
    assert (tmp_path / "a" / "b" / "file").read_text() == "text"
    assert [path.name for path in (tmp_path / "c" / "d" / "folder").iterdir()] == [MANIFEST]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600), (0o002, 0o664)])
def test_who_may_read_new_files_may_read_those_of_a_folder(mask: int, mode: int, tmp_path: Path) -> None:
    """Whatever wrote them: safetensors lets their owner alone read what it writes."""
    before = os.umask(mask)
    try:
        with commit_folder(tmp_path / "folder") as temporary:
            save_file({"weight": torch.zeros(1)}, temporary / "weights.safetensors")
            (temporary / "sub").mkdir()
            (temporary / "sub" / "text").write_text("text")
            (temporary / "sub" / "text").chmod(0o600)
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "folder").rglob("*") if path.is_file()]
    assert {path.name: path.stat().st_mode & 0o777 for path in files} == dict.fromkeys(
        ("weights.safetensors", "text", MANIFEST), mode
    )
    check_folder(tmp_path / "folder")


def test_a_folder_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "x") as temporary:
        (temporary / "a").write_text("first")
    with pytest.raises(OSError), commit_folder(tmp_path / "x") as temporary:
        (temporary / "a").write_text("second")
    assert (tmp_path / "x" / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_block_that_fails_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), commit_folder(tmp_path / "x") as temporary:
        (temporary / "a").write_text("a")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("step", ["fsync", "rename", "replace"])
def test_a_disk_that_fails_leaves_nothing(
    step: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises((OSError, QspinError)) as caught, commit_folder(tmp_path / "x", need=1234) as temporary:
        (temporary / "a").write_text("a")
    assert list(tmp_path.iterdir()) == []
    full = re.fullmatch(
        r"(.*): the disk is full: (.*) bytes are to be written there and [\d,]+ are free; "
        "free some space, and the same command goes on",
        str(caught.value),
    )
    # the manifest's own bytes where it was the manifest that did not fit
    assert full is not None if number == errno.ENOSPC else isinstance(caught.value, OSError)
    assert full is None or full[1].startswith(str(tmp_path))


def test_a_full_disk_that_only_words_tell_of() -> None:
    """safetensors has the number of the system's error in its message alone."""
    with pytest.raises(QspinError, match="the disk is full: 7 bytes"), full_disk_told(Path("/x"), 7):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), full_disk_told(Path("/x"), 7):
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")


def test_half_written_things_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("keep", "sub/keep", "sub/partial", ".partial.keep", "sub/.hidden"):
        write_text(tmp_path / name, "kept")
    for name in (".file.0123abcd.partial", "sub/.file.0123abcd.partial", "sub/.folder.0123abcd.partial/a"):
        write_text(tmp_path / name, "left over")
    # a folder dies with its own half-written manifest in it
    write_text(tmp_path / ".folder.0123abcd.partial" / "deep" / ".manifest.json.89ef.partial", "left over")
    remove_temporaries(tmp_path)
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {"keep", "sub/keep", "sub/partial", ".partial.keep", "sub/.hidden"}
    assert not list(tmp_path.rglob("*.partial"))
