"""The one exception that a user sees without a traceback, and how other people's words go into its message."""


class QspinError(Exception):
    """Something the user can put right. The message names the setting or file, the place, and what to do."""


def one_line(words: object) -> str:
    """An exception, or a text from a file, for a message: on one line, without control characters, at most 300 long."""
    text = " ".join(str(words).split())[:300] or type(words).__name__
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)
