"""The pages of docs/ that are made from the code: every command with its options, and every setting.

    python tools/commands.py

writes docs/commands.md and docs/configuration.md. A test compares them with the code.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any

import annotated_types
import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from qspin.cli import app
from qspin.config import _FREE, FACT, RunConfig

DOCS = Path(__file__).parents[1] / "docs"

# --- commands ---

COMMANDS_HEAD = """\
# Commands

`qspin COMMAND --help` says the same on a terminal. A command that can't do what it is asked says why in one line
([When it goes wrong](trouble.md)) and ends with 1, or with 2 if the line itself was mistyped; one that was stopped ends
with 130 (Ctrl-C) or 143 (SIGTERM).

<!-- made from the code by tools/commands.py -->
"""


def commands() -> str:
    """commands.md."""
    found = list(_commands(typer.main.get_command(app), "qspin"))
    listed = [f"| [{name}](#{name.replace(' ', '-')}) | {command.help} |" for name, command in found]
    lines = [COMMANDS_HEAD, "| command | |", "| --- | --- |", *listed, *(_command(*one) for one in found)]
    return "\n".join(lines) + "\n"


def _commands(group: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    """Every command with the name that it is called by, as `qspin presets show`."""
    for name, command in group.commands.items():
        yield f"{prefix} {name}", command
        if hasattr(command, "commands"):
            yield from _commands(command, f"{prefix} {name}")


def _command(name: str, command: Any) -> str:
    hints = typing.get_type_hints(command.callback, include_extras=True)
    line, rows = [name], []
    for parameter in command.params:
        hint = hints[parameter.name]
        written = _written(parameter, hint)
        more = "; may be given several times" if getattr(parameter, "multiple", False) else ""
        least, most = hint.__metadata__[0].min, hint.__metadata__[0].max
        more += f"; at least {least}" * (least is not None) + f"; at most {most}" * (most is not None)
        rows.append(f"| `{written.replace('|', ' or ')}` | {_default(parameter)} | {parameter.help}{more} |")
        if parameter.required:
            line.append(written)
        elif _is_argument(parameter):
            line.append(f"[{written}]")
    if hasattr(command, "commands"):
        line.append("[COMMAND]")
    elif not all(parameter.required or _is_argument(parameter) for parameter in command.params):
        line.append("[OPTION …]")
    table = ["", "| argument or option | default | |", "| --- | --- | --- |", *rows] if rows else []
    return "\n".join([f"\n## {name}\n", command.help, "", f"    {' '.join(line)}", *table])


def _is_argument(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "argument")


def _written(parameter: Any, hint: Any) -> str:
    """`--rows INTEGER`, `-o, --output PATH`, `RUN`."""
    kind = _kind(hint)
    if _is_argument(parameter):
        return parameter.metavar or str(parameter.name).upper()
    names = ", ".join(parameter.opts)
    return names if kind is bool else f"{names} {parameter.metavar or _placeholder(kind)}"


def _kind(hint: Any) -> Any:
    """What one value of a parameter is: of `Annotated[list[float] | None, …]`, float."""
    while typing.get_origin(hint) not in {None, typing.Literal}:
        hint = next(inner for inner in typing.get_args(hint) if inner is not type(None))
    return hint


def _placeholder(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    return {int: "INTEGER", float: "NUMBER", str: "TEXT", Path: "PATH"}[kind]


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if str(parameter.default) in {"None", "False", "()"} else f"`{parameter.default}`"


# --- settings ---

CONFIGURATION_HEAD = """\
# Settings

Every setting of a run, as a YAML file, `--set KEY=VALUE` and `qspin init` have them
([presets](presets.md#changing-one)). A preset's own values differ from the defaults: `qspin presets show NAME` prints
them, and `qspin run … --dry-run` what is in force.

**may change**: whether a run that goes on may have another value. *no*: the setting defines the result, and the run is
refused with another. *yes*: it doesn't, or only what comes after; a file may lie elsewhere, and so may a base that is a
local folder, but must hold the same, and a run keeps the kernels and batches that it began with. *fact*: it says what a
model is, and is nothing to choose.

<!-- made from the code by tools/commands.py -->
"""


def configuration() -> str:
    """configuration.md."""
    top = [(name, field) for name, field in RunConfig.model_fields.items() if _group(field) is None]
    lines = [CONFIGURATION_HEAD, "## The run", "", *_table((name, field, False) for name, field in top)]
    for name, field in RunConfig.model_fields.items():
        group = _group(field)
        if group is not None:
            lines += ["", f"## {name}", "", str(group.__doc__), "", *_table(_fields(group, f"{name}.", fact=False))]
    return "\n".join(lines) + "\n"


def _group(field: FieldInfo) -> type[BaseModel] | None:
    kinds = (field.annotation, *typing.get_args(field.annotation))  # a group may be optional
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _fields(group: type[BaseModel], prefix: str, *, fact: bool) -> Iterator[tuple[str, FieldInfo, bool]]:
    for name, field in group.model_fields.items():
        inner = _group(field)
        if inner is None:
            yield prefix + name, field, fact
        else:
            yield from _fields(inner, f"{prefix}{name}.", fact=fact or FACT in field.metadata)


def _table(fields: typing.Iterable[tuple[str, FieldInfo, bool]]) -> list[str]:
    lines = ["| key | value | default | may change | |", "| --- | --- | --- | --- | --- |"]
    for key, field, fact in fields:
        mark = "fact" if fact or FACT in field.metadata else "yes" if _FREE in field.metadata else "no"
        value = _values(field.annotation, field.metadata)
        lines.append(f"| `{key}` | {value} | {_shown(field.default)} | {mark} | {field.description} |")
    return lines


def _values(annotation: Any, metadata: typing.Sequence[Any] = ()) -> str:
    """What a setting may be: `integer ≥ 1, or auto`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        inner, *marks = arguments
        return _values(inner, [each for mark in marks for each in getattr(mark, "metadata", [mark])])
    if origin in {typing.Union, UnionType}:
        return ", or ".join("null" if each is type(None) else _values(each, metadata) for each in arguments)
    if origin is typing.Literal:
        return ", ".join(f"`{each}`" for each in arguments)
    if origin is list:
        return f"a list, each {_values(arguments[0])}"
    if origin is dict:
        return (
            "a mapping" if arguments[1] is Any else f"a mapping of {_values(arguments[0])} to {_values(arguments[1])}"
        )
    word = {int: "integer", float: "number", str: "text", bool: "true or false"}[annotation]
    return f"{word} {', '.join(_bounds(metadata))}".rstrip()


def _bounds(metadata: typing.Sequence[Any]) -> Iterator[str]:
    """Bounds on a number; the rest of the metadata is ours."""
    for mark in metadata:
        match mark:
            case annotated_types.Ge(bound):
                yield f"≥ {bound:,}"
            case annotated_types.Gt(bound):
                yield f"> {bound:,}"
            case annotated_types.Le(bound):
                yield f"≤ {bound:,}"
            case annotated_types.Lt(bound):
                yield f"< {bound:,}"


def _shown(default: Any) -> str:
    """A default as it stands in YAML."""
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, bool) or default is None:
        return f"`{ {True: 'true', False: 'false', None: 'null'}[default] }`"
    return f"`{default:g}`" if isinstance(default, float) else f"`{default}`" if default != "" else '`""`'


PAGES = {"commands.md": commands, "configuration.md": configuration}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (DOCS / name).write_text(make(), encoding="utf-8")
