"""Where settings come from: presets and YAML files that build on one another, and overrides on top, as one tree.

    layers = read_layers("smollm2-135m")
    tree = together(layers, {"train.beta": 0.2}, groups={"model", "train"})

What settings there are, and which values fit, only `config.py` knows.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from qspin.errors import QspinError, one_line

# PyYAML lets Python's own out, as for the date 2024-13-45 or a thousand brackets
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)
SUFFIXES = {".yaml", ".yml"}  # by which a configuration file is told from a preset's name
PATHS = ("model.id", "model.init_adapter", "chat.template", "data.source", "data.heldout_source")
OPENED = ("model.init_adapter", "chat.template")  # of these, those that can be nothing but a path

# What is known of the model that a preset or file names, and holds for no other. A chat template may be right for
# another as well, as one for base models is; `prepare` notes that it is used.
OF_ONE_MODEL = ("revision", "package", "license", "gated", "architecture")

# What a preset says of the rows that it names, and holds for no others.
OF_ONE_SOURCE = {
    "data": ("heldout_source", "split", "config", "format", "columns", "turns", "limit"),
    "evaluation": ("style",),
}

_ODD_NUMBER = re.compile(r"[-+]?(0[0-7_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?)$")


class _Loader(yaml.SafeLoader):
    """Of a key that stands twice in one mapping PyYAML takes the last without a word; and in the YAML 1.1 that it reads
    010 is 8, and 12:30 is 750. Here they are texts, which a setting that takes a number reads as people do, or refuses.
    """

    yaml_implicit_resolvers = {  # noqa: RUF012 (as PyYAML has it)
        first: [("tag:yaml.org,2002:str", _ODD_NUMBER), *found]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                raise yaml.YAMLError(f"{key.value} stands in line {lines[key.value]} and again in line {line}")
            if isinstance(key, yaml.ScalarNode):
                lines[key.value] = line
        return super().construct_mapping(node, deep)


def read_yaml(text: str) -> Any:
    """A value as it stands in a file or on the command line; raises one of `NOT_YAML`."""
    return yaml.load(text, _Loader)


class Layer(NamedTuple):
    """One file of a configuration, which may build on another."""

    path: Path
    text: str
    tree: dict[str, Any]  # its settings, without those of the one that it builds on


def presets_dir() -> Path:
    """Inside the package in a wheel, beside it in a checkout."""
    inside = Path(__file__).parent / "presets"
    return inside if inside.is_dir() else Path(__file__).parents[1] / "presets"


def preset_names() -> list[str]:
    """In order of the alphabet."""
    return sorted(path.stem for path in presets_dir().glob("*.yaml"))


def unknown_preset(name: str) -> str:
    """What to say of a name that no preset has."""
    close = difflib.get_close_matches(name, preset_names(), n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"no preset is called {name!r}; {hint}there are {', '.join(preset_names())}"


def read_layers(source: str | Path) -> list[Layer]:
    """A preset or YAML file, then the one that it builds on (`preset:`), and so on.

    Raises:
        QspinError: there is no such preset or file, it is no mapping in YAML, or it builds on itself.
    """
    layers: list[Layer] = []
    wanted: str | Path | None = source
    while wanted is not None:
        path = _file_of(wanted)
        text, tree = _read(path)
        parent = tree.pop("preset", None)
        if parent is not None and not isinstance(parent, str):
            raise QspinError(f"{path}: preset: {parent!r} is not the name of a preset or of a YAML file")
        if any(path.resolve() == layer.path.resolve() for layer in layers):
            raise QspinError(f"{path}: preset: {parent} builds on this very file")
        _resolve_paths(tree, path.parent)
        layers.append(Layer(path, text, tree))
        wanted = parent
        if parent is not None and Path(parent).suffix in SUFFIXES and os.path.isfile(path.parent / parent):  # noqa: PTH113
            wanted = path.parent / parent
    return layers


def together(layers: Sequence[Layer], overrides: Mapping[str, Any], groups: Container[str]) -> dict[str, Any]:
    """The settings of layers, each over those behind it, and dotted overrides over all.

    Args:
        groups: names of groups of settings; where one holds nothing, all of its lines are comments.

    Where another `model.id` is named than below, what was known of that model is left out (`OF_ONE_MODEL`); where
    another `data.source` than a preset's, what the presets say of that (`OF_ONE_SOURCE`). `~` is a home folder.

    Raises:
        QspinError: an override reaches into what is no group.
    """
    tree: dict[str, Any] = {}
    overrides = _dotted(overrides, groups)
    other_rows = _names_other_rows(layers, overrides.get("data.source"))
    for layer in reversed(layers):
        model = layer.tree.get("model")
        if isinstance(model, dict):
            _forget_other_model(tree, model.get("id"))
        said = {key: value for key, value in layer.tree.items() if value is not None or key not in groups}
        if other_rows and _is_preset(layer):
            said = _without_rows(said)
        tree = _merge(tree, said)
    _forget_other_model(tree, overrides.get("model.id"))
    for key, value in overrides.items():
        _set(tree, key, value)
    return _with_homes(tree)


def _file_of(source: str | Path) -> Path:
    if not isinstance(source, str | Path):
        raise QspinError(f"a preset's name or a .yaml file is wanted; got {source!r:.80}")
    path = Path(os.path.expanduser(source))  # noqa: PTH111 (Path.expanduser raises)
    if path.suffix in SUFFIXES:
        return path
    path = presets_dir() / f"{source}.yaml"
    if not os.path.isfile(path):  # noqa: PTH113 (Path.is_file raises)
        if os.path.isfile(source):  # noqa: PTH113
            raise QspinError(f"{source}: no preset, and no .yaml file; rows are named with --data")
        if os.path.isfile(kept := Path(os.path.expanduser(source)) / "config.yaml"):  # noqa: PTH111, PTH113
            raise QspinError(f"{source}: a folder; a run's settings are a file in it: {kept}")
        raise QspinError(f"{unknown_preset(str(source))}, or name a .yaml file")
    return path


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    """A file's text, and its settings as a tree."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = read_yaml(text)
    except (OSError, UnicodeDecodeError) as error:
        raise QspinError(f"{path}: cannot be read ({error})") from None
    except NOT_YAML as error:
        raise QspinError(f"{path}: not valid YAML: {one_line(error)}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise QspinError(f"{path}: a configuration is a mapping of settings, not a {type(tree).__name__}")
    return text, tree


def _resolve_paths(tree: dict[str, Any], folder: Path) -> None:
    """Paths that exist relative to the file which names them are meant so; so is what is a path in any case, and is
    nowhere, that it be told where to put it."""
    for key in PATHS:
        if value := _text_at(tree, key):
            nowhere = key in OPENED and not value.startswith("~") and not os.path.exists(value)  # noqa: PTH110 (Path.exists raises)
            if nowhere or os.path.exists(folder / value):  # noqa: PTH110
                _set(tree, key, str(folder / value))


def _with_homes(tree: dict[str, Any]) -> dict[str, Any]:
    """The same with `~` resolved, in what is opened as it stands; of a home that there is not it is left."""
    for key in OPENED:
        value = _text_at(tree, key)
        if value is not None:
            part, name = key.split(".")
            tree = _merge(tree, {part: {name: os.path.expanduser(value)}})  # noqa: PTH111 (Path.expanduser raises)
    return tree


def _text_at(tree: dict[str, Any], key: str) -> str | None:
    """A setting of a group, if it is there and a text: nothing has been checked yet."""
    part, name = key.split(".")
    section = tree.get(part)
    value = section.get(name) if isinstance(section, dict) else None
    return value if isinstance(value, str) else None


def _is_preset(layer: Layer) -> bool:
    return layer.path.resolve().parent == presets_dir().resolve()


def _names_other_rows(layers: Sequence[Layer], named: Any) -> bool:
    """Whether the rows are others than those of the presets; `named`: by what is over all layers."""

    def first(layers: Iterable[Layer]) -> Any:
        data = (layer.tree.get("data") for layer in layers)
        return next((source for part in data if isinstance(part, dict) and (source := part.get("source"))), None)

    of_presets = first(layer for layer in layers if _is_preset(layer))
    return of_presets is not None and (named or first(layers)) != of_presets


def _without_rows(tree: dict[str, Any]) -> dict[str, Any]:
    def left(part: Any, names: Sequence[str]) -> Any:
        return {key: value for key, value in part.items() if key not in names} if isinstance(part, dict) else part

    return {key: left(part, OF_ONE_SOURCE.get(key, ())) for key, part in tree.items()}


def _forget_other_model(tree: dict[str, Any], named: Any) -> None:
    model = tree.get("model")
    if named is not None and isinstance(model, dict) and model.get("id", named) != named:
        for key in OF_ONE_MODEL:
            model.pop(key, None)


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _dotted(overrides: Mapping[str, Any], groups: Container[str]) -> dict[str, Any]:
    """A group that is given as a mapping, `model={id: …}`, is the same as its settings one by one."""
    dotted: dict[str, Any] = {}
    for key, value in overrides.items():
        several = key in groups and isinstance(value, dict)
        dotted |= {f"{key}.{name}": each for name, each in value.items()} if several else {key: value}
    return dotted


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for name in parents:
        below = tree.setdefault(name, {})
        if not isinstance(below, dict):
            raise QspinError(f"{dotted}: {name} is a single value, not a group of settings")
        tree = below
    below = tree.get(last)
    tree[last] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
