"""Presets as a person meets them: the list, one of them with its reasons, and a configuration file to edit.

Free of torch.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qspin.config import FACT, ModelConfig, dump_config, load_config
from qspin.config_files import SUFFIXES, preset_names, read_layers, unknown_preset
from qspin.errors import QspinError

COLUMNS = ("preset", "size", "licence", "about")
TABLE_WIDTH = 72


def rows() -> list[tuple[str, str, str, str]]:
    """COLUMNS of each preset, the smallest model first; sizes in billions of parameters."""
    models = {name: load_config(name) for name in preset_names()}
    return [
        (name, f"{_parameters(config.model) / 1e9:.1f}B", _licence(config.model), config.about)
        for name, config in sorted(models.items(), key=lambda item: _parameters(item[1].model))
    ]


def listed(width: int) -> RenderableType:
    """The rows, to be printed in so many columns: a table, or paragraphs where one would cut words."""
    if width >= TABLE_WIDTH:
        return _table()
    return Group(
        *(
            Group(Text(f"{name}  {size}  {licence}"), Padding(Text(about), (0, 0, 0, 4)))
            for name, size, licence, about in rows()
        )
    )


def _table() -> Table:
    drawn = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    name, size, licence, about = COLUMNS
    drawn.add_column(name, no_wrap=True)
    drawn.add_column(size, no_wrap=True, justify="right")
    drawn.add_column(licence, max_width=11)
    drawn.add_column(about)
    for row in rows():
        drawn.add_row(*map(Text, row))
    return drawn


def shown(source: str) -> str:
    """A preset's or a configuration's own text and that of what it builds on, then what is in force of them all.

    Raises:
        QspinError: as `load_config`.
    """
    layers = read_layers(source)
    texts = [f"# {layer.path}\n\n{layer.text.strip()}\n" for layer in layers]
    if len(layers) > 1:
        changes = dump_config(load_config(source), changes_only=True)
        texts.append(f"# together: all that differs from the defaults\n\n{changes}")
    return "\n".join(texts)


def write_starter(preset: str, path: Path) -> None:
    """Write a configuration that is the preset, with every setting in a comment.

    Raises:
        QspinError: there is no such preset, or the file exists or can't be written.
    """
    if preset not in preset_names():
        raise QspinError(unknown_preset(preset))
    if path.suffix not in SUFFIXES:
        raise QspinError(f"-o: {path} must end in .yaml, by which a configuration is told from a preset's name")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(starter(preset, str(path)))
    except FileExistsError:
        raise QspinError(f"-o: {path} exists already; name another file, or remove it first") from None
    except OSError as error:
        raise QspinError(f"-o: {path} can't be written: {error.strerror}") from None


def starter(preset: str, file: str) -> str:
    """The text for `write_starter`. A setting without its # is as the preset has it."""
    config = load_config(preset)
    lines = [
        f"# qspin run {file} --data FILE --out FOLDER",
        "#",
        "# A line like #seed: 0 has a setting as the preset has it. To change it, take its # away and edit its value.",
        "# With --dry-run added to the command you see what is in force.",
        "",
        f"preset: {preset}",
        "",
        *_settings(config, ""),
    ]
    for name in type(config).model_fields:
        group = getattr(config, name)
        if isinstance(group, BaseModel):
            lines += ["", *_comment(str(group.__doc__), ""), f"{name}:", *_settings(group, "  ")]
    return "\n".join(lines) + "\n"


def _settings(part: BaseModel, indent: str) -> Iterator[str]:
    """Each setting of a group in a comment, below what it means."""
    values = part.model_dump(mode="json")
    for name, field in type(part).model_fields.items():
        if FACT not in field.metadata and not isinstance(getattr(part, name), BaseModel):
            yield from _comment(_meaning(field), indent)
            yield f"{indent}#{name}: {_as_yaml(values[name])}"


def _comment(text: str, indent: str) -> list[str]:
    start = f"{indent}# "
    return textwrap.wrap(text, 110, initial_indent=start, subsequent_indent=start, break_on_hyphens=False)


def _meaning(field: FieldInfo) -> str:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    return f"{field.description}" + (f" ({', '.join(choices)})" if choices else "")


def _as_yaml(value: Any) -> str:
    """A value as YAML; a scalar's end is not marked."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def _parameters(model: ModelConfig) -> int:
    return model.architecture.parameters if model.architecture else 0


def _licence(model: ModelConfig) -> str:
    gated = {True: ", gated", False: "", None: ", gated?"}[model.gated]
    return f"{model.license}{gated}" if model.license else ""
