"""What a run was made with, and how anyone makes it again: its configuration without a path of this machine.

config = recorded_config(run_dir)
dump_config(recipe(config, record, iteration)), command(config, record)
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from qspin.config import RunConfig, changed_results, load_config, load_kept
from qspin.errors import QspinError
from qspin.run_dir import RunDir
from qspin.sources import READERS

CONFIG, TEMPLATE = "config.yaml", "template.jinja"  # their names beside a card


def recorded_config(run_dir: RunDir) -> RunConfig:
    """What the run was made with; settings that change no result are as it was last started.

    Raises:
        QspinError: there is no run, or its config.yaml was changed by hand.
    """
    if not run_dir.record.is_file():
        raise QspinError(f"{run_dir.path} holds no run (no {run_dir.record.name}); name the --out of a qspin run")
    config = load_kept(run_dir.config)
    record = run_dir.read_record()
    changes = changed_results(load_config(None, record["config"]), config, folder="folder" in record["base"])
    if changes:
        keys = ", ".join(key for key, _, _ in changes)
        raise QspinError(f"{run_dir.config}: changed since the run was made ({keys}); put the old values back")
    return config


def recipe(config: RunConfig, record: Mapping[str, Any], iteration: int) -> RunConfig:
    """The configuration that makes the run again, without a path of this machine; the base at its commit."""
    model, chat, data = config.model, config.chat, config.data
    revision = record["base"].get("commit", model.revision)
    package = model.package if "package" in record["base"] else None
    model = model.model_copy(update={"revision": revision, "package": package, "init_adapter": None})
    if "folder" in record["base"]:
        model = model.model_copy(update={"id": ""})
    if chat.template is not None:
        chat = chat.model_copy(update={"template": TEMPLATE})
    sources = {"source": hub_source(data.source), "heldout_source": hub_source(data.heldout_source)}
    return config.model_copy(
        update={
            "model": model,
            "chat": chat,
            "data": data.model_copy(update=sources),
            "iterations": iteration + 1,
        }
    )


def command(config: RunConfig, record: Mapping[str, Any]) -> str:
    """What to type, beside the recipe, to make the run again."""
    parts = ["qspin", "run", CONFIG]
    if "folder" in record["base"]:
        parts += ["--model", _their_copy(record["base"]["folder"])]
    if config.model.init_adapter is not None:
        parts += ["--init-adapter", _their_copy(Path(config.model.init_adapter).name)]
    if config.data.source is not None and hub_source(config.data.source) is None:
        parts += ["--data", _their_copy(Path(config.data.source).name)]
    if config.data.heldout_source is not None and hub_source(config.data.heldout_source) is None:
        parts += ["--set", f"data.heldout_source={_their_copy(Path(config.data.heldout_source).name)}"]
    return shlex.join([*parts, "--out", "runs/again"])


def is_hub_id(text: str) -> bool:
    """Whether a text can be the name of a repository on the Hub, `owner/name`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text


def base_id(record: Mapping[str, Any]) -> str | None:
    """The base's hub id; None for a local folder."""
    base = record["base"]
    return base["name"] if "folder" not in base and is_hub_id(base["name"]) else None


def hub_source(source: str | None) -> str | None:
    """A data source if it is a hub id; every file that rows are read from has one of the readers' extensions."""
    if source is None or Path(source).suffix.lower() in READERS or not is_hub_id(source):
        return None
    return source


def _their_copy(name: str) -> str:
    """A path to be filled in, with nothing in it that a shell or a code block would heed."""
    return f"path/to/{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}"
