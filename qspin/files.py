"""Files and folders that are there whole or not at all, and that show it when they are no longer what was written.

Temporary name on the same file system, fsync, rename, fsync of the parent: whatever moment a process dies at, a
name shows nothing or the finished thing.

A file carries the hash of what stands before it, and stays plain JSON; a folder has a manifest, which is such a file:

    {"width": 8, "shards": [[0, 1], [2, 3]], "sha256": "…"}     the last key of an object
    {"sha256": "…"}                                             the last line of a JSONL file

Files in the formats of others (PEFT's, transformers') carry none: `write_plain_json`.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from qspin.errors import QspinError, permission_told
from qspin.stopping import stops_held

MANIFEST = "manifest.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # in PEFT's format
ADAPTER_CONFIG = "adapter_config.json"

SEAL = "sha256"
_JSON_END, _JSONL_END = b'"\n}\n', b'"}\n'
_DIGEST = 64  # characters of a sha256
AGAIN = "delete it and run again"

T = TypeVar("T")


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    # Path.exists raises where a folder above can't be searched
    return next(part for part in (path, *path.absolute().parents) if os.path.exists(part))  # noqa: PTH110


def check_place(folder: Path, advice: str) -> None:
    """Raises a QspinError: no folder can be made, or written to, there; `advice` is what to do about the second."""
    above = existing(folder)
    if not above.is_dir():
        raise QspinError(f"--out: {above} is a file; name a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise QspinError(f"--out: no permission to write in {above}; {advice}")


def write_text(path: Path, text: str) -> None:
    """Replace a file's content, unless it is the same; its folder is made if need be."""
    _write(path, text.encode())


def write_json(path: Path, value: dict[str, Any], *, durable: bool = True) -> None:
    """Replace a file by an object and its seal. If it need not be durable, a power cut may undo or spoil it."""
    assert SEAL not in value
    text = json.dumps({**value, SEAL: ""}, indent=2, ensure_ascii=False)
    _write(path, _sealed(text.encode()[: -len('"\n}')], _JSON_END), durable=durable)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Replace a file by rows and their seal."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _write(path, _sealed(f'{lines}{{"{SEAL}": "'.encode(), _JSONL_END))


def write_plain_json(path: Path, value: Any) -> None:
    """Replace a file by a value as others expect it, without a seal."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_file(path: Path, copy: Path) -> None:
    """A file's content under another name; its folder is made if need be."""
    _write(copy, path.read_bytes())


def read_json(path: Path, advice: str = AGAIN) -> dict[str, Any]:
    """What `write_json` wrote.

    Args:
        advice: what to do if it is damaged.

    Raises:
        QspinError: the file is missing, unreadable, or not as it was written; a `NoPermission` if it is closed to us.
    """
    value: dict[str, Any] = _parse(path, lambda: json.loads(_unsealed(path, _JSON_END) + _JSON_END), advice)
    del value[SEAL]
    return value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """What `write_jsonl` wrote; raises as `read_json`."""
    # by line feeds alone: a text may hold other line ends
    return _parse(path, lambda: [json.loads(line) for line in _unsealed(path, _JSONL_END).split(b"\n")[:-1]])


def read_plain_json(path: Path) -> Any:
    """A file of others; raises as `read_json`, as far as damage shows."""
    return _parse(path, lambda: json.loads(path.read_text(encoding="utf-8")))


def check_file(path: Path) -> None:
    """Compare a file of ours with its seal, without parsing it; raises as `read_json`."""
    _parse(path, lambda: _unsealed(path, _JSONL_END if path.suffix == ".jsonl" else _JSON_END))


def kept_json(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A value that is made once, before the work, and read back ever after."""
    if not path.is_file():
        write_json(path, make())
    return read_json(path)


@contextlib.contextmanager
def commit_folder(path: Path, *, need: int | None = None) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends well; its manifest lists sizes and hashes.

    `path` must not exist: replacing a folder can't be done in one step.

    Args:
        need: about how many bytes it will hold, to be told if the disk is full.

    Raises:
        QspinError: the disk is full; the folder that is worked in is gone (`at_work`).
    """
    with full_disk_told(path, need), _in_place(path):
        make_folder(path.parent)
        temporary = _temporary(path)
        temporary.mkdir()
        try:
            yield temporary
            files = sorted(file for file in temporary.rglob("*") if file.is_file())
            readers = temporary.stat().st_mode & 0o666  # whom the user lets read new files; safetensors lets nobody
            for file in files:
                if file.stat().st_mode & readers != readers:  # else let be: some file systems have no modes to set
                    file.chmod(readers)
                _sync(file)
            manifest = {
                str(file.relative_to(temporary)): {"bytes": file.stat().st_size, SEAL: sha256_of(file)}
                for file in files
            }
            for folder in (folder for folder in temporary.rglob("*") if folder.is_dir()):
                _sync_folder(folder)
            write_json(temporary / MANIFEST, manifest)
            temporary.rename(path)
            _sync_folder(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_folder(path: Path) -> None:
    """Compare a committed folder with its manifest.

    Raises:
        QspinError: naming the file that is missing, altered or unreadable.
    """
    for name, entry in read_json(path / MANIFEST).items():
        file = path / name
        try:
            with permission_told():
                whole = file.is_file() and file.stat().st_size == entry["bytes"] and sha256_of(file) == entry[SEAL]
        except OSError as error:
            raise QspinError(f"{file}: cannot be read ({error.strerror}); check its permissions and the disk") from None
        if not whole:
            raise QspinError(f"{file}: missing or altered since it was written; delete {path} and run again")


def remove(path: Path) -> None:
    """Take a file or a folder away in one step, if it is there: whatever is done next comes after it on the disk."""
    if not path.exists():
        return
    temporary = _temporary(path)
    path.rename(temporary)
    _sync_folder(path.parent)
    _delete(temporary)


def remove_temporaries(folder: Path, but: Path | None = None) -> None:
    """What a killed process left half-written, or half-removed, below a folder, but for one in it that others hold."""
    for leftover in list(folder.rglob(f"*{_SUFFIX}")):
        if leftover.exists() and but not in leftover.parents:  # else it went with a folder
            _delete(leftover)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, each known to the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _sync_folder(path.parent)


@contextlib.contextmanager
def at_work(mark: Path) -> Iterator[None]:
    """While the block lasts, nothing is written into the folder of `mark`, a file as it is now, once that is gone: the
    folder was moved or deleted, and what is written would be kept in a new one that nobody asked for.

    Raises:
        QspinError: it is gone, of whatever in the folder is written or can't be read.
    """
    _marks[mark] = mark.read_bytes()
    try:
        yield
    finally:
        del _marks[mark]


@contextlib.contextmanager
def full_disk_told(path: Path, need: int | None = None) -> Iterator[None]:
    """Turn a refusal for want of room into a `QspinError` that says how much is lacking."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error.errno if isinstance(error, OSError) else None
        # safetensors tells the system's number in words only
        if number not in _FULL and not any(f"os error {code}" in str(error) for code in _FULL):
            raise
        free = shutil.disk_usage(existing(path)).free
        wanted = "" if need is None else f"{need:,} bytes are to be written there and "
        elsewhere = ", there or where the output and caches are" if need is None and free > _SOME else ""
        raise QspinError(
            f"{path}: the disk is full: {wanted}{free:,} are free; free some space{elsewhere}, and the same command "
            "goes on"
        ) from None


def check_writable(folder: Path) -> None:
    """Try to write there, before anything is computed that is to be kept there.

    Raises:
        QspinError: it can't be done.
    """
    try:
        with full_disk_told(folder):
            make_folder(folder)
            with tempfile.TemporaryFile(dir=folder):
                pass
    except OSError as error:
        raise QspinError(
            f"{folder} can't be written to: {error.strerror}; what is computed is kept there, so give yourself the "
            "right to, or take a copy of the run"
        ) from None


def sha256_of(path: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_FULL = {errno.ENOSPC, errno.EDQUOT}
_SOME = 1 << 20  # bytes: of a disk with more it may be another one that is full
_SUFFIX = ".partial"
_marks: dict[Path, bytes] = {}  # files of folders that are worked in, and what they hold


def _write(path: Path, data: bytes, *, durable: bool = True) -> None:
    with stops_held(), full_disk_told(path, len(data)), _in_place(path):
        if _holds(path, data):  # what is finished can be started again on a full disk
            return
        make_folder(path.parent)
        temporary = _temporary(path)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
            temporary.replace(path)
            if durable:
                _sync_folder(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:  # one that can't be read may be replaced all the same
        return False


@contextlib.contextmanager
def _in_place(path: Path) -> Iterator[None]:
    _check_in_place(path)
    try:
        yield
    except (OSError, SafetensorError):
        _check_in_place(path)
        raise


def _check_in_place(path: Path) -> None:
    """Raises a QspinError: a folder around a path, which is worked in, is not there any more, or another's now."""
    for mark, held in _marks.items():
        folder = mark.parent
        if folder in path.parents and not (mark.is_file() and mark.read_bytes() == held):
            raise QspinError(
                f"{folder} was moved or deleted while the run works; the same command with its new --out goes on"
            )


def _sealed(body: bytes, end: bytes) -> bytes:
    return body + hashlib.sha256(body).hexdigest().encode() + end


def _unsealed(path: Path, end: bytes) -> bytes:
    """The file up to its hash.

    Raises:
        ValueError: the hash is not that of what stands before it, or there is none.
    """
    data = path.read_bytes()
    body = data[: -_DIGEST - len(end)]
    if data != _sealed(body, end):
        raise ValueError("it is not as it was written")
    return body


def _parse(path: Path, read: Callable[[], T], advice: str = AGAIN) -> T:
    try:
        with permission_told():
            return read()
    except (OSError, ValueError, RecursionError) as error:
        _check_in_place(path)
        raise QspinError(f"{path}: damaged or unreadable ({error}); {advice}") from None


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_SUFFIX}")


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)  # Windows syncs what it may write
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # Windows can't open a folder, and its rename needs no sync
        _sync(path)
