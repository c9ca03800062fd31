"""Files and folders are there whole or not at all, whatever moment a process dies at."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import as_nobody
from safetensors import SafetensorError
from safetensors.torch import save_file

from qspin import files
from qspin.errors import NoPermission, QspinError
from qspin.files import (
    MANIFEST,
    SEAL,
    check_file,
    check_folder,
    commit_folder,
    full_disk_told,
    make_folder,
    read_json,
    read_jsonl,
    read_plain_json,
    remove,
    remove_temporaries,
    sha256_of,
    write_json,
    write_jsonl,
    write_plain_json,
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


def test_a_folder_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    with commit_folder(tmp_path / "x") as temporary:
        (temporary / "a").write_text("first")
    with pytest.raises(OSError), commit_folder(tmp_path / "x") as temporary:
        (temporary / "a").write_text("second")
    assert (tmp_path / "x" / "a").read_text() == "first"
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


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


# --- damage ---


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    with commit_folder(tmp_path / "folder") as temporary:
        (temporary / "weights").write_bytes(b"0123456789")
        (temporary / "sub").mkdir()
        (temporary / "sub" / "more").write_text("text")
    return tmp_path / "folder"


def test_an_intact_folder_passes_and_its_manifest_says_what_is_in_it(committed: Path) -> None:
    check_folder(committed)
    assert read_json(committed / MANIFEST) == {
        "sub/more": {"bytes": 4, "sha256": sha256_of(committed / "sub" / "more")},
        "weights": {
            "bytes": 10,
            # of b"0123456789", by sha256sum
            "sha256": "84d89877f0d4041efb6bf91a16f0248f2fd573e6af05c19f96bedb9f882f7882",
        },
    }


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("weights", lambda path: path.write_bytes(path.read_bytes()[:-1])),  # truncated
        ("weights", lambda path: path.write_bytes(b"")),
        ("weights", lambda path: path.write_bytes(b"012345678X")),  # altered, of the same size
        ("weights", lambda path: path.unlink()),
        ("weights", lambda path: (path.unlink(), path.mkdir())),
        ("sub/more", lambda path: path.write_text("tex\N{SNOWMAN}")),
        ("sub/more", lambda path: path.unlink()),
    ],
)
def test_each_kind_of_damage_is_found(name: str, damage: Callable[[Path], object], committed: Path) -> None:
    damage(committed / name)
    with pytest.raises(QspinError) as caught:
        check_folder(committed)
    said = f"{committed / name}: missing or altered since it was written; delete {committed} and run again"
    assert str(caught.value) == said


def test_what_may_not_be_read_is_not_called_damaged(closed: Path) -> None:
    folder = closed.parent / "folder"
    with commit_folder(folder) as temporary:
        (temporary / "weights").write_bytes(b"0123456789")
    folder.chmod(0o755)
    (folder / MANIFEST).chmod(0o644)
    (folder / "weights").chmod(0)
    for call, path in (
        (lambda: check_folder(folder), folder / "weights"),
        (lambda: check_folder(closed), closed / MANIFEST),
        (lambda: read_json(closed / "file"), closed / "file"),
        (lambda: check_file(closed / "file"), closed / "file"),
    ):
        with as_nobody(), pytest.raises(NoPermission) as caught:
            call()
        assert str(caught.value) == f"{path}: no permission to read or write it, or to look into a folder above it"


def test_a_disk_that_can_not_be_read_is_not_called_damage(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "sha256_of", fail)
    with pytest.raises(QspinError) as caught:
        check_folder(committed)
    said = "cannot be read (Input/output error); check its permissions and the disk"
    assert str(caught.value) == f"{committed / 'sub' / 'more'}: {said}"


@pytest.mark.parametrize("text", [None, "", "{", '{"weights": {"byt'])
def test_a_damaged_manifest_is_found(text: str | None, committed: Path) -> None:
    if text is None:
        (committed / MANIFEST).unlink()
    else:
        (committed / MANIFEST).write_text(text)
    with pytest.raises(QspinError, match="damaged or unreadable") as caught:
        check_folder(committed)
    assert str(committed / MANIFEST) in str(caught.value)


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_no_truncation_and_no_flipped_bit_of_a_sealed_file_goes_unseen(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "x.json":
        write_json(path, {"text": "β", "numbers": [1, 2.5]})
    else:
        write_jsonl(path, ROWS)
    read: Callable[[Path], object] = read_json if name == "x.json" else read_jsonl
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))]
    damaged += [
        whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
        for place in range(len(whole))
        for bit in range(8)
    ]
    damaged += [whole + b"\n", whole + whole, b"{}\n", b"\n".join(whole.split(b"\n")[1:])]
    for data in damaged:
        path.write_bytes(data)
        for look in (check_file, read):
            with pytest.raises(QspinError, match="damaged or unreadable"):
                look(path)
    path.write_bytes(whole)
    check_file(path)
    assert read(path)


def test_no_flipped_bit_of_a_folder_goes_unseen(committed: Path) -> None:
    for path in [path for path in committed.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for bit in range(8 * len(whole)):
            path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
            with pytest.raises(QspinError):
                check_folder(committed)
        path.write_bytes(whole)
    check_folder(committed)


def test_sealed_files_are_read_by_anybody(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {})
    body = b'{\n  "sha256": "'
    digest = hashlib.sha256(body).hexdigest()
    assert (tmp_path / "x.json").read_bytes() == body + digest.encode() + b'"\n}\n'
    assert json.loads((tmp_path / "x.json").read_text()) == {SEAL: digest}
    assert read_json(tmp_path / "x.json") == {}


def test_files_for_others_carry_no_seal(tmp_path: Path) -> None:
    write_plain_json(tmp_path / "x.json", {"r": 4})
    assert json.loads((tmp_path / "x.json").read_text()) == read_plain_json(tmp_path / "x.json") == {"r": 4}
    with pytest.raises(QspinError, match="not as it was written"):
        read_json(tmp_path / "x.json")


# --- what a killed process left ---


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


def test_a_full_disk_that_only_words_tell_of() -> None:
    """safetensors has the number of the system's error in its message alone."""
    with pytest.raises(QspinError, match="the disk is full: 7 bytes"), full_disk_told(Path("/x"), 7):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), full_disk_told(Path("/x"), 7):
        raise SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)")


# --- formats ---


def test_text_is_utf8_with_line_feeds_on_every_system(tmp_path: Path) -> None:
    write_text(tmp_path / "x", "β\n\r\n")
    assert (tmp_path / "x").read_bytes() == b"\xce\xb2\n\r\n"


def test_json_comes_back(tmp_path: Path) -> None:
    value = {"text": "β \N{SNOWMAN} \u2028", "numbers": [1, 0.1, 1e-300], "none": None}
    write_json(tmp_path / "x.json", value)
    assert read_json(tmp_path / "x.json") == value
    assert "β" in (tmp_path / "x.json").read_text(encoding="utf-8"), "text that a person can read"


ROWS = [{"text": "one\ntwo\r\nthree\x1c\x0b"}, {"text": "β"}, {}]


def test_rows_come_back(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", iter(ROWS))
    assert read_jsonl(tmp_path / "x.jsonl") == ROWS
    *rows, seal = [json.loads(line) for line in (tmp_path / "x.jsonl").read_bytes().split(b"\n")[:-1]]
    assert rows == ROWS
    assert seal.keys() == {SEAL}
    write_jsonl(tmp_path / "none.jsonl", [])
    assert read_jsonl(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029"])
def test_rows_with_other_line_ends_in_their_texts_come_back(character: str, tmp_path: Path) -> None:
    rows = [{"record_id": f"a{character}b"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert read_jsonl(tmp_path / "x.jsonl") == rows


@pytest.mark.parametrize("read", [read_json, read_jsonl])
@pytest.mark.parametrize("content", [b"{", b"\xff", None])
def test_an_unreadable_file_is_named(read: Callable[[Path], object], content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "x"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(QspinError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}: damaged or unreadable (")
    assert str(caught.value).endswith("; delete it and run again")
