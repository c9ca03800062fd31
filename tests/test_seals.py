"""What was written comes back; what is no longer as it was written is found by its seal or its manifest, and named."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import as_nobody

from qspin import files
from qspin.errors import NoPermission, QspinError
from qspin.files import (
    MANIFEST,
    SEAL,
    check_file,
    check_folder,
    commit_folder,
    read_json,
    read_jsonl,
    read_plain_json,
    sha256_of,
    write_json,
    write_jsonl,
    write_plain_json,
    write_text,
)


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


# --- files ---


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


# --- folders ---


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


@pytest.mark.parametrize("text", [None, "", "{", '{"weights": {"byt'])
def test_a_damaged_manifest_is_found(text: str | None, committed: Path) -> None:
    if text is None:
        (committed / MANIFEST).unlink()
    else:
        (committed / MANIFEST).write_text(text)
    with pytest.raises(QspinError, match="damaged or unreadable") as caught:
        check_folder(committed)
    assert str(committed / MANIFEST) in str(caught.value)


def test_no_flipped_bit_of_a_folder_goes_unseen(committed: Path) -> None:
    for path in [path for path in committed.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        for bit in range(8 * len(whole)):
            path.write_bytes(whole[: bit // 8] + bytes([whole[bit // 8] ^ 1 << bit % 8]) + whole[bit // 8 + 1 :])
            with pytest.raises(QspinError):
                check_folder(committed)
        path.write_bytes(whole)
    check_folder(committed)


# --- what is no damage ---


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
