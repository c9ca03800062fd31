"""A sweep: which runs it makes, what they share, and that sharing changes nothing."""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_line import call
from conftest import flip_byte, small_run

from qspin import api, spin
from qspin.config import RunConfig, load_config, parse_vary
from qspin.errors import QspinError
from qspin.experiments.sweep import (
    OF_SELF_PLAY,
    PLOT,
    TABLE,
    Cell,
    as_begun,
    grid,
    play_cell,
    results,
    write_results,
)
from qspin.files import read_json, read_jsonl, remove
from qspin.phases.answering import answer
from qspin.phases.game import under_way
from qspin.phases.learning import warm_start
from qspin.prepare import Prepared, prepare
from qspin.run_dir import RunDir
from qspin.watch.progress import Silent

WEIGHTS = "adapter_model.safetensors"
DAY = datetime.date(2026, 1, 1)


@pytest.fixture(scope="module")
def settings(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    return small_run(tiny_folder("llama"), path, rows=18) | {"iterations": 1}


def ready(config: RunConfig) -> Prepared:
    return prepare(config, DAY)


def swept(cells: list[Cell], out: Path) -> list[RunDir]:
    for cell in cells:
        play_cell(cell, ready(cell.config), out, cells, Silent())
    return [cell.run_dir(out) for cell in cells]


@pytest.fixture(scope="module")
def betas(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Cell], Path]:
    cells, out = grid(None, settings, {"train.beta": [0.1, 1]}), tmp_path_factory.mktemp("sweep")
    swept(cells, out)
    return cells, out


def test_what_is_asked_for() -> None:
    assert parse_vary(["train.beta=0.01,0.1", "seed=1"]) == {"train.beta": [0.01, 0.1], "seed": [1]}
    assert parse_vary(["train.loss=logistic, hinge"]) == {"train.loss": ["logistic", "hinge"]}
    assert parse_vary(["train.beta=[0.1,5],0.1"]) == {"train.beta": [[0.1, 5], 0.1]}
    for wrong in ("train.beta", "train.beta=", "=1", "train.beta=[1", "train.beta=2024-13-45"):
        with pytest.raises(QspinError, match="--vary takes KEY=VALUE,VALUE"):
            parse_vary([wrong])
    with pytest.raises(QspinError, match="a value is named twice"):
        parse_vary(["train.beta=1,1"])
    with pytest.raises(QspinError, match="a setting is named twice"):
        parse_vary(["train.beta=1", "train.beta=2"])


def test_a_grid_is_every_combination_checked_beforehand() -> None:
    cells = grid("smollm2-135m", {}, {"train.beta": [0.1, [0.1, 5]], "train.loss": ["logistic", "hinge"]})
    assert [cell.name for cell in cells] == [
        "beta=0.1_loss=logistic", "beta=0.1_loss=hinge", "beta=0.1-5_loss=logistic", "beta=0.1-5_loss=hinge",
    ]  # fmt: skip
    assert cells[3].config.train.beta == [0.1, 5]
    names = [cell.name for cell in grid("smollm2-135m", {}, {"train.lr": [1e-4], "sft.lr": [2e-4]})]
    assert names == ["train.lr=0.0001_sft.lr=0.0002"]
    with pytest.raises(QspinError, match="loss"):
        grid("smollm2-135m", {}, {"train.beta": [0.1], "train.loss": ["logistic", "hing"]})
    with pytest.raises(QspinError, match="would have one folder"):
        grid("smollm2-135m", {}, {"data.source": ["a b.jsonl", "a-b.jsonl"]})
    with pytest.raises(QspinError, match=r"--vary: .* is too long for a file's name"):
        grid("smollm2-135m", {}, {"data.source": ["a" * 300]})
    for nothing in ({}, {"train.beta": []}, {"train.beta": 0.1}, {"train.beta": "0.1"}):
        with pytest.raises(QspinError, match=r"^--vary: a sweep varies settings, each over a list"):
            grid("smollm2-135m", {}, nothing)  # type: ignore[arg-type]
    with pytest.raises(QspinError, match="two combinations are the same"):
        grid("smollm2-135m", {}, {"train.lr": ["1e-4", 0.0001]})


def test_what_training_does_not_change_is_made_once(betas: tuple[list[Cell], Path], tmp_path: Path) -> None:
    cells, out = betas
    first, second = (cell.run_dir(out) for cell in cells)
    for piece in ("evaluation", "times"):
        assert getattr(first.base, piece).read_bytes() == getattr(second.base, piece).read_bytes()
    one, other = first.iteration(0), second.iteration(0)
    assert one.generated(0).read_bytes() == other.generated(0).read_bytes()
    assert one.scores(0).read_bytes() == other.scores(0).read_bytes()
    assert set(other.seconds()) == {"train", "evaluate"}, "it generated or scored again"
    # and the run is the one that it would have been alone
    alone = RunDir(tmp_path / "alone")
    spin.run(ready(cells[1].config), alone.path, Silent())
    assert (alone.iteration(0).adapter / WEIGHTS).read_bytes() == (other.adapter / WEIGHTS).read_bytes()
    assert (one.adapter / WEIGHTS).read_bytes() != (other.adapter / WEIGHTS).read_bytes()


def test_other_batches_are_scored_anew(settings: dict[str, Any], tmp_path: Path) -> None:
    first, second = swept(grid(None, settings, {"train.batch_size": [4, 6]}), tmp_path)
    assert set(second.iteration(0).seconds()) == {"score", "train", "evaluate"}
    assert first.iteration(0).generated(0).read_bytes() == second.iteration(0).generated(0).read_bytes()


@pytest.mark.parametrize(("key", "values"), [("lora.rank", [2, 4]), ("seed", [1, 2]), ("data.limit", [14, 16])])
def test_nothing_is_shared_by_runs_that_differ_elsewhere(
    key: str, values: list[Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    _, second = swept(grid(None, settings, {key: values}), tmp_path)
    assert set(second.iteration(0).seconds()) == {"generate", "score", "train", "evaluate"}


def test_other_rows_under_the_same_settings_are_not_shared(settings: dict[str, Any], tmp_path: Path) -> None:
    """Which file the rows come from defines no result: their content does."""
    other = tmp_path / "other.jsonl"
    other.write_text(Path(settings["data.source"]).read_text().replace("I say", "they say"))
    _, second = swept(grid(None, settings, {"data.source": [settings["data.source"], str(other)]}), tmp_path / "out")
    assert set(second.iteration(0).seconds()) == {"generate", "score", "train", "evaluate"}


@pytest.mark.parametrize(
    ("key", "values"), [("train.batch_size", [4, 6]), ("sft.epochs", [1, 2]), ("sft.lr", [1e-4, 2e-4])]
)
def test_warm_starts_are_opponents_of_their_own(
    key: str, values: list[Any], settings: dict[str, Any], tmp_path: Path
) -> None:
    """They are trained by the settings of training too."""
    first, second = swept(grid(None, {**settings, "sft.epochs": 1}, {key: values}), tmp_path)
    assert set(second.iteration(0).seconds()) == {"generate", "score", "train", "evaluate"}
    assert set(second.base.seconds()) == {"evaluate"}
    assert first.base.evaluation.read_bytes() == second.base.evaluation.read_bytes()
    assert first.base.times.read_bytes() == second.base.times.read_bytes(), "it was measured again"


OTHERWISE = {  # of self-play, one of each
    "loss": "hinge",
    "beta": 1.0,
    "sft_weight": 0.5,
    "lr": 0.01,
    "epochs": 1,
    "mix_previous": 0,
    "max_real_logp_drop": 50.0,
    "snapshot_minutes": 0.0,
}


def test_a_warm_start_is_trained_once_for_all_that_play_on_from_it(settings: dict[str, Any], tmp_path: Path) -> None:
    assert set(OTHERWISE) == OF_SELF_PLAY
    other = {f"train.{key}": value for key, value in OTHERWISE.items()}
    configs = [load_config(None, {**settings, "sft.epochs": 1} | changed) for changed in ({}, other)]
    assert all(getattr(configs[0].train, key) != value for key, value in OTHERWISE.items())
    cells = [Cell(name, {}, config) for name, config in zip("ab", configs, strict=True)]
    first, second = swept(cells, tmp_path)
    assert set(second.iteration(0).seconds()) == {"train", "evaluate"}
    assert files_of(second.warm_start.path) == files_of(first.warm_start.path)
    alone = RunDir(tmp_path / "alone")
    spin.run(ready(cells[1].config), alone.path, Silent())
    of_their_own = {"seconds.json", "memory.json"}
    for folder in ("warm-start", "iteration-0"):
        there, here = (
            {name: data for name, data in files_of(run.path / folder).items() if name not in of_their_own}
            for run in (alone, second)
        )
        assert there == here


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_warm_start_that_came_out_otherwise_is_kept(settings: dict[str, Any], tmp_path: Path) -> None:
    """A run's own, of other micro-batches say: its opponent is not theirs."""
    cells = grid(None, {**settings, "sft.epochs": 1}, {"train.beta": [0.1, 1]})
    first, second = (cell.run_dir(tmp_path) for cell in cells)
    other = load_config(None, {**changes(cells[1]), "train.tokens_per_micro_batch": 64})
    with under_way(ready(other), second.path, Silent()) as game:
        warm_start(game)
    own = files_of(second.warm_start.adapter)
    swept(cells, tmp_path)
    assert files_of(second.warm_start.adapter) == own != files_of(first.warm_start.adapter)
    assert set(second.iteration(0).seconds()) == {"generate", "score", "train", "evaluate"}


def test_a_damaged_warm_start_is_not_copied(settings: dict[str, Any], tmp_path: Path) -> None:
    cells = grid(None, {**settings, "sft.epochs": 1}, {"train.beta": [0.1, 1]})
    swept(cells[:1], tmp_path)
    sentence = flip_byte(cells[0].run_dir(tmp_path).warm_start.adapter)
    with pytest.raises(QspinError, match=f"^{re.escape(sentence)}$"):
        play_cell(cells[1], ready(cells[1].config), tmp_path, cells, Silent())
    assert not cells[1].run_dir(tmp_path).warm_start.path.exists()


def test_a_run_without_a_warm_start_takes_nothing_but_the_base_from_one_with_it(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    first, second = swept(grid(None, settings, {"sft.epochs": [1, 0]}), tmp_path)
    assert first.base.times.read_bytes() == second.base.times.read_bytes()
    assert set(second.iteration(0).seconds()) == {"generate", "score", "train", "evaluate"}


def test_shards_of_another_plan_are_left_alone(betas: tuple[list[Cell], Path], tmp_path: Path) -> None:
    cells, out = betas
    smaller = load_config(None, {**changes(cells[1]), "generation.shard_rows": 5})
    cell = Cell(cells[1].name, cells[1].settings, smaller)
    prepared = ready(smaller)
    begun = under_way(prepared, cell.run_dir(tmp_path).path, Silent())
    with begun as game:  # a run of this name that made its own plan, and died
        answer(game, 0)
    remove(cell.run_dir(tmp_path).iteration(0).generated(1))
    (tmp_path / cells[0].name).symlink_to(cells[0].run_dir(out).path)
    play_cell(cell, prepared, tmp_path, [cells[0], cell], Silent())
    shards = cell.run_dir(tmp_path).iteration(0)
    rows = [row["record_id"] for index in range(3) for row in read_jsonl(shards.generated(index))]
    assert sorted(rows) == sorted(example.record_id for example in prepared.train)


def changes(cell: Cell) -> dict[str, Any]:
    """A configuration as overrides."""
    tree = cell.config.model_dump(mode="json", exclude_defaults=True)
    return {
        f"{part}.{key}" if isinstance(group, dict) else part: value
        for part, group in tree.items()
        for key, value in (group.items() if isinstance(group, dict) else [("", group)])
    }


def test_a_run_that_fails_does_not_end_a_sweep(settings: dict[str, Any], tmp_path: Path) -> None:
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    vary = "lora.targets=[nothing_of_this_name],[q_proj]"
    answered = call("sweep", "--out", tmp_path / "out", "--vary", vary, *options)
    assert answered.code == 1
    assert "1 of 2 runs did not come to their end: targets=nothing_of_this_name" in answered.err
    assert (tmp_path / "out" / "targets=q_proj" / "iteration-0" / "adapter" / WEIGHTS).is_file()
    table = (tmp_path / "out" / TABLE).read_text(encoding="utf-8")
    assert "['q_proj']" in table
    assert "nothing_of_this_name" not in table


def test_a_table_holds_what_this_sweep_played(settings: dict[str, Any], tmp_path: Path) -> None:
    """One that is damaged is mended when its turn comes; a folder that another sweep filled is refused."""
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = ["sweep", "--out", tmp_path / "out", *options]
    assert call(*command, "--vary", "train.beta=0.1,1").code == 0
    evaluation = tmp_path / "out" / "beta=1" / "base" / "evaluation.json"
    evaluation.write_bytes(evaluation.read_bytes()[:100])
    answered = call(*command, "--vary", "train.beta=0.1,1")
    assert (answered.code, answered.out.count("taken away")) == (0, 1)
    table = (tmp_path / "out" / TABLE).read_text(encoding="utf-8")
    assert table.count("| base |") == 2
    refused = call(*command, "--vary", "train.beta=0.1,1", "--set", "train.lr=0.5")
    assert (refused.code, refused.out.count("error: ")) == (1, 2)
    assert "2 of 2 runs did not come to their end" in refused.err
    assert "| base |" not in refused.out
    assert (tmp_path / "out" / TABLE).read_text(encoding="utf-8") == table


def test_what_was_half_copied_is_made_again(betas: tuple[list[Cell], Path], tmp_path: Path) -> None:
    cells, out = betas
    source, again = cells[1].run_dir(out), RunDir(tmp_path / cells[1].name)
    shard = again.iteration(0).generated(0)
    again.path.mkdir()
    again.record.write_bytes(source.record.read_bytes())
    shard.parent.mkdir(parents=True)
    again.iteration(0).generation_plan.write_bytes(source.iteration(0).generation_plan.read_bytes())
    shard.write_bytes(source.iteration(0).generated(0).read_bytes()[:100])
    play_cell(cells[1], ready(cells[1].config), tmp_path, cells, Silent())
    assert shard.read_bytes() == source.iteration(0).generated(0).read_bytes()


def test_one_table_and_one_plot(betas: tuple[list[Cell], Path]) -> None:
    cells, out = betas
    table = results(out, cells)
    assert [column.heading for column in table.columns[:3]] == ["beta", "player", "NLL"]
    assert [row[:2] for row in table.rows] == [["0.1", "base"], ["0.1", "0*"], ["1", "base"], ["1", "0*"]]
    write_results(out, cells)
    page, plot = (out / TABLE).read_text(encoding="utf-8"), (out / PLOT).read_bytes()
    assert "| 1 | 0* |" in page
    assert b"<svg" in plot
    assert b"beta=0.1" in plot
    write_results(out, cells)
    assert (out / PLOT).read_bytes() == plot


def test_headings_are_whole_in_80_columns_and_each_is_explained(settings: dict[str, Any], tmp_path: Path) -> None:
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    vary = ["--vary", "train.beta=0.1", "--vary", "generation.temperature=0.7"]
    told = call("sweep", "--out", tmp_path / "out", *vary, *options, columns=80).out.partition("\nRuns")[2]
    words = ["beta", "temperature", "player", "NLL", "reward", "AUC", "2-sample", "AUC", "token", "F1", "tokens"]
    assert sorted(told.partition("──")[0].split()) == sorted(words)
    notes = re.findall(r"^- ([^:]+): (.*?) *$", told, re.MULTILINE)
    assert notes[:2] == [("beta", "train.beta, varied"), ("temperature", "generation.temperature, varied")]
    assert len(notes) == 8


def test_settings_that_do_not_fit_beside_the_figures_are_told_below_them(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    vary = ["--vary", "train.beta=0.1,1", "--vary", "generation.temperature=0.7", "--vary", "train.loss=correlation"]
    out = tmp_path / "out"
    said = call("sweep", "--out", out, *vary, *options, columns=80).out
    told = said.partition("\nRuns")[2]
    words = ["run", "player", "NLL", "reward", "AUC", "2-sample", "AUC", "token", "F1", "tokens"]
    heading, _, table = told.partition("──")
    assert sorted(heading.split()) == sorted(words)
    rows = re.findall(r"^ (\d) +(\S+) ", table.partition("\n- ")[0], re.MULTILINE)
    assert rows == [("1", "base"), ("1", "0*"), ("2", "base"), ("2", "0*")]
    lines = [" ".join(note.split()) for note in told.partition("\n- ")[2].split("\n- ")]
    assert lines[:2] == [
        "run 1: train.beta=0.1, generation.temperature=0.7, train.loss=correlation",
        "run 2: train.beta=1, generation.temperature=0.7, train.loss=correlation",
    ]
    assert "1 of 2: beta=0.1_temperature=0.7_loss=correlation" in said, "as it was called before"
    assert "| beta | temperature | loss | player |" in (out / TABLE).read_text(encoding="utf-8")


def test_settings_of_one_name_keep_their_groups(betas: tuple[list[Cell], Path]) -> None:
    cells, out = betas
    both = [replace(cell, settings={"train.lr": 1e-4, "sft.lr": 2e-4}) for cell in cells]
    assert [column.heading for column in results(out, both).columns[:2]] == ["train.lr", "sft.lr"]


def test_a_runs_own_folder_is_no_place_for_a_sweep(settings: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    spin.run(prepare(load_config(None, settings), datetime.date(2026, 1, 2)), out, Silent())
    before = {*out.rglob("*")}
    with pytest.raises(QspinError, match=f"^--out: {out} is a run, and a sweep is a folder of runs; name another"):
        api.sweep(None, {"train.beta": [0.1, 1]}, out, overrides=settings)
    assert {*out.rglob("*")} == before


def test_another_spelling_of_a_value_is_no_other_run(settings: dict[str, Any], tmp_path: Path) -> None:
    """And more values add runs; those that are named again stay in the table."""
    out = tmp_path / "out"
    options = [part for key, value in settings.items() if key != "train.lr" for part in ("--set", f"{key}={value}")]
    assert call("sweep", "--out", out, "--vary", "train.lr=1e-3", *options).code == 0
    adapter = out / "lr=1e-3" / "iteration-0" / "adapter" / WEIGHTS
    written = adapter.stat().st_mtime_ns
    answer = call("sweep", "--out", out, "--vary", "train.lr=0.001,2e-3", *options)
    assert (answer.code, answer.err) == (0, "")
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["lr=1e-3", "lr=2e-3"]
    assert adapter.stat().st_mtime_ns == written
    assert "1 of 2: lr=1e-3" in answer.out
    rows = re.findall(r"^\| (\S+) \| (\S+) \|", (out / TABLE).read_text(encoding="utf-8"), re.MULTILINE)
    assert {row[0] for row in rows[2:]} == {"0.001", "2e-3"}
    assert set(api.sweep(None, {"train.lr": [0.001]}, out, overrides=settings)) == {"lr=1e-3"}


def test_a_folder_that_is_no_run_of_a_sweep_is_let_be(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "lr=5").mkdir()
    (tmp_path / "lr=5" / "run.json").write_text("{")
    cells = grid(None, settings, {"train.lr": [0.001, 0.002]})
    assert as_begun(cells, tmp_path) == cells


def test_the_command_goes_on_where_it_stopped(settings: dict[str, Any], tmp_path: Path) -> None:
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    command = ["sweep", "--out", tmp_path / "out", "--vary", "train.loss=logistic,hinge", *options]
    answered = call(*command)
    assert answered.code == 0, answered.err
    assert "2 of 2: loss=hinge" in answered.out
    adapter = tmp_path / "out" / "loss=hinge" / "iteration-0" / "adapter" / WEIGHTS
    written = adapter.stat().st_mtime_ns
    assert call(*command).code == 0
    assert adapter.stat().st_mtime_ns == written
    assert read_json(RunDir(adapter.parents[2]).record)["config"]["train"]["loss"] == "hinge"
    refused = call("sweep", "--out", tmp_path / "out", "--vary", "train.loss=logistic,hing", *options)
    assert refused.code == 1
    assert "train.loss" in refused.err
