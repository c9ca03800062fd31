"""Text from outside: names that can be no file's are told; on its way to a terminal or a log nothing in it is obeyed,
and no secret is in it."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath
from types import TracebackType

from qspin.errors import QspinError, one_line

# variables whose values are shown nowhere
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "QSPIN_JUDGE_KEY", "OPENAI_API_KEY")
_LOGIN = re.compile(r"(?<=://)[^/?#\s]+@")  # user:password@ of an address
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_HIDDEN = "***"
LONGEST, LONGEST_PATH = 230, 3800  # bytes of a name and of a path, with room for temporary names and files below


def visible(text: str) -> str:
    """Line ends stay; whatever else a terminal would obey, such as the escape of a colour, becomes a mark."""
    return "".join(c if c.isprintable() or c == "\n" else " " if c.isspace() else "\ufffd" for c in text)


def breaks_shown(text: str) -> str:
    """On one line, each line end as ↵, and nothing that a terminal would obey."""
    return visible(text).replace("\n", "↵")


def redacted(text: str) -> str:
    """Without tokens, and without what stands before the host of an address."""
    for secret in (os.environ.get(name, "").strip() for name in SECRETS):
        if len(secret) >= 8:  # shorter, it is no secret, and may be a part of any word
            text = text.replace(secret, _HIDDEN)
    return _TOKEN.sub(_HIDDEN, _LOGIN.sub(f"{_HIDDEN}@", text))


def at_home(name: str) -> Path:
    """A path as a person writes it, `~` for a home folder; as it is where there is no such home."""
    return Path(os.path.expanduser(name))  # noqa: PTH111 (Path.expanduser raises)


def check_path(path: str | Path, setting: str) -> Path:
    """The path, as `at_home`: a shell leaves the `~` in `--out=~/runs`. What is wrong with it is told at once, since a
    path is asked about in many places, each of which would fail in its own way.

    Raises:
        QspinError: as `check_name` and `check_utf8`.
    """
    found = at_home(str(path))
    check_name(found, setting)
    check_utf8(found, setting)
    return found


def check_name(path: str | Path, setting: str) -> None:
    """Raises a QspinError: no file can have this name."""
    said = f"{setting}: {_shown(str(path))}"
    if "\0" in str(path):
        raise QspinError(f"{said} has a NUL character in it; no file's name has")
    if len(os.fsencode(path)) > LONGEST_PATH or any(len(os.fsencode(part)) > LONGEST for part in Path(path).parts):
        raise QspinError(f"{said} is too long for a file's name; take a shorter one")
    if os.name == "nt" and PureWindowsPath(path).is_reserved():
        raise QspinError(f"{said} is a device on Windows; take another name")


def check_utf8(path: str | Path, setting: str) -> None:
    """Raises a QspinError: the name, or that of a folder above it, is no text. It could not be written down in a run's
    files, and safetensors opens no such file, which would show only after the training."""
    whole = str(Path(path).absolute())
    try:
        whole.encode()
    except UnicodeEncodeError:  # Python has a half of a character in place of a byte that is not UTF-8
        raise QspinError(
            f"{setting}: {one_line(whole)} is not UTF-8, as the names of a run's files and folders have to be; rename "
            "the part that is not, or take another folder"
        ) from None


def _shown(text: str) -> str:
    return text if len(text) < 200 else f"{text[:60]}…{text[-20:]}"


def texts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a tree of settings, each with its dotted key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from texts(inner, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for inner in value:
            yield from texts(inner, key)
    elif isinstance(value, str):
        yield key, value


def secret_keys(value: object) -> Iterator[str]:
    """Where in a tree of settings there is text that `redacted` would change: dotted keys."""
    return (key for key, text in texts(value) if redacted(text) != text)


def show_traceback(_kind: type[BaseException], error: BaseException, _trace: TracebackType | None) -> None:
    """For `sys.excepthook`: what an error says may come from a library, with an address and a login in it."""
    sys.stderr.write(redacted("".join(traceback.format_exception(error))))


class Redaction(logging.Filter):
    """Of what a library logs."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = visible(redacted(record.getMessage())), ()
        return True


_REDACTION = Redaction()  # one, so that a handler has it once


def redact_logs(names: Iterable[str]) -> None:
    """For all that these loggers, and those below them, hand to their handlers from now on."""
    for name in names:
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_REDACTION)
