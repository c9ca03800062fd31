"""What is said of settings that don't fit: a line each, with what may have been meant.

    for line in explain(error, RunConfig): ...      # train.beta = -1: Input should be greater than 0

Free of torch, and of what settings there are: `config.py` knows them.
"""

from __future__ import annotations

import difflib
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError


def groups_of(model: type[BaseModel]) -> set[str]:
    """The settings that are several, as `train`."""
    return {
        name
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def explain(error: ValidationError, model: type[BaseModel]) -> Iterator[str]:
    """A line for each setting that does not fit the model of all."""
    known = dict(_keys(model))
    worst: dict[str, Mapping[str, Any]] = {}
    automatic: set[str] = set()
    listed: set[str] = set()
    for item in error.errors():
        key = _key_of(item, {*known, *model.model_fields})
        if item["type"] == "literal_error" and item["ctx"]["expected"] == "'auto'":
            automatic.add(key)
        if item["type"] == "list_type":
            listed.add(key)
        # a union tells what is wrong with each of its branches: the one that came furthest was meant
        if key not in worst or _came(item) > _came(worst[key]):
            worst[key] = item
    for key, told in worst.items():
        if told["type"] == "extra_forbidden":
            yield f"{key}: " + _no_such_setting(key, told["loc"], known, groups_of(model))
        elif told["type"] == "model_type":
            first = next((name for name in known if name.startswith(f"{key}.")), "")
            yield f"{key} = {told['input']!r}: it is a group of settings, as {first}"
        else:
            member = "".join(f"[{part}]" for part in told["loc"] if isinstance(part, int))
            place = f"{key}{member} = {told['input']!r}: " if key else ""
            other = "; or auto" if key in automatic and told["type"] != "literal_error" else ""
            other += "; put it into quotes" if told["type"] == "string_type" and told["input"] is not None else ""
            if key in listed and not member:
                other += {
                    "literal_error": " or a list, as [q_proj, v_proj]",
                    "float_parsing": "; or a list, as [0.1, 5]",
                }.get(told["type"], "")
            yield place + told["msg"].removeprefix("Value error, ") + other


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Each setting, and what it is."""
    for name, field in model.model_fields.items():
        kinds = (field.annotation, *get_args(field.annotation))  # a group may be optional
        groups = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        for group in groups:
            yield from _keys(group, f"{prefix}{name}.")
        if field.annotation not in groups:
            yield prefix + name, str(field.description)


def _no_such_setting(key: str, place: Sequence[int | str], known: Mapping[str, str], groups: set[str]) -> str:
    """What may have been meant: the same name elsewhere, its words in what a setting is, a like name."""
    if key in known and len(place) == 1:  # one key with a point in it
        group, _, name = key.partition(".")
        return f"stands as two in a file: {group}: and below it, indented, {name}:"
    group, _, name = key.rpartition(".")
    nearest = [other for other in known if other.rpartition(".")[2] == name]
    words = name.replace("_", " ")
    if " " in words:  # as learning_rate, which others call train.lr
        nearest += [other for other in known if words in known[other] and other.startswith(group)]
    nearest = nearest or difflib.get_close_matches(key, [*known, *groups], n=1, cutoff=0.5)
    return "no such setting" + (f"; did you mean {' or '.join(nearest)}?" if nearest else "")


def _key_of(item: Mapping[str, Any], places: Container[str]) -> str:
    """The setting, without the name of a union's branch, which its place ends with."""
    parts = [part for part in item["loc"] if isinstance(part, str)]
    while parts and item["type"] != "extra_forbidden" and ".".join(parts) not in places:
        parts = parts[:-1]
    return ".".join(parts)


def _came(item: Mapping[str, Any]) -> tuple[int, bool]:
    return len(item["loc"]), item["type"] not in {"float_type", "list_type"}
