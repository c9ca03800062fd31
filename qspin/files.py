"""Files and folders that are there whole or not at all.

Temporary name on the same file system, fsync, rename, fsync of the parent: whatever moment a process dies at, a
name shows nothing or the finished thing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from qspin.errors import QspinError

MANIFEST = "manifest.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"  # in PEFT's format
ADAPTER_CONFIG = "adapter_config.json"


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that there is."""
    # Path.exists raises where a folder above can't be searched
    return next(part for part in (path, *path.absolute().parents) if os.path.exists(part))  # noqa: PTH110


def write_text(path: Path, text: str) -> None:
    """Replace a file's content; its folder is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise QspinError(f"{path}: damaged or unreadable ({error}); delete it and run again") from None


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    try:
        # by line feeds alone: a text may hold other line ends
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    except (OSError, ValueError) as error:
        raise QspinError(f"{path}: damaged or unreadable ({error}); delete it and run again") from None


@contextlib.contextmanager
def commit_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `path` when the block ends well; its manifest lists sizes and hashes.

    `path` must not exist: replacing a folder can't be done in one step.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(file for file in temporary.rglob("*") if file.is_file())
        for file in files:
            _sync_file(file)
        manifest = {
            str(file.relative_to(temporary)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
            for file in files
        }
        write_json(temporary / MANIFEST, manifest)
        temporary.rename(path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_folder(path: Path) -> None:
    """Compare a committed folder with its manifest.

    Raises:
        QspinError: naming the file that is missing or altered.
    """
    for name, entry in read_json(path / MANIFEST).items():
        file = path / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or sha256_of(file) != entry["sha256"]:
            raise QspinError(f"{file}: missing or altered since it was written; delete {path} and run again")


def remove_temporaries(folder: Path) -> None:
    """What a killed process left half-written below a folder."""
    for leftover in folder.rglob(f"*{_SUFFIX}"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


_SUFFIX = ".partial"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_SUFFIX}")


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_folder(path: Path) -> None:
    if os.name == "posix":  # Windows can't open a folder, and its rename needs no sync
        _sync_file(path)


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
