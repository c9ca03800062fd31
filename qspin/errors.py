"""The one exception that a user sees without a traceback, and how other people's words go into its message."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence


class QspinError(Exception):
    """Something the user can put right. The message names the setting or file, the place, and what to do."""


class NoPermission(QspinError):
    """A file is there, for all that is known, and this user may not use it: nothing is wrong with what is in it."""


@contextlib.contextmanager
def permission_told() -> Iterator[None]:
    """Turn the system's refusal of a file into a `NoPermission` that names it."""
    try:
        yield
    except PermissionError as error:
        if error.filename is None:
            raise
        raise NoPermission(
            f"{error.filename}: no permission to read or write it, or to look into a folder above it"
        ) from error


def some(names: Sequence[str]) -> str:
    """The first five, for a message, and how many more there are."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def one_line(words: object) -> str:
    """An exception, or a text from a file, for a message: on one line, without control characters, at most 300 long."""
    text = " ".join(str(words).split())[:300] or type(words).__name__
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
