"""The supervised baseline: as many steps as self-play took, on the same rows, measured and told of beside it."""

from __future__ import annotations

import datetime
import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import contents, refusal
from conftest import as_nobody, small_run

from qspin import api, spin
from qspin.config import load_config
from qspin.errors import QspinError
from qspin.experiments.baseline import baseline, workload
from qspin.figures.players import best_rival, players, rivals
from qspin.figures.report import sentences, summary, tables
from qspin.files import read_json, read_jsonl, remove
from qspin.prepare import Prepared, prepare
from qspin.run_dir import IterationDir, RunDir
from qspin.watch.progress import Silent

RATES = [0.001, 0.02]
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def ready(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    settings = small_run(tiny_folder("llama"), tmp_path_factory.mktemp("data") / "rows.jsonl", rows=22)
    settings |= {"train.epochs": 3, "train.snapshot_minutes": 0, "iterations": 2}
    return prepare(load_config(None, settings), datetime.date(2026, 1, 1))


@pytest.fixture(scope="module")
def played(ready: Prepared, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, list[bytes]]:
    """A run with its baseline, and what its iterations were before that."""
    run = RunDir(tmp_path_factory.mktemp("runs") / "run")
    spin.run(ready, run.path, Silent())
    before = [weights(run.iteration(t)) for t in (0, 1)]
    baseline(ready, run.path, Silent(), RATES)
    return run, before


def weights(folder: IterationDir) -> bytes:
    return (folder.adapter / WEIGHTS).read_bytes()


def test_a_round_takes_the_steps_of_its_iteration(played: tuple[RunDir, list[bytes]]) -> None:
    run, before = played
    for rate in RATES:
        for index in (0, 1):
            iteration, own = (read_jsonl(f.metrics) for f in (run.iteration(index), run.supervised(rate, index)))
            assert len(own) == len(iteration)
            assert [step["lr"] for step in own] == pytest.approx([step["lr"] * rate / 0.02 for step in iteration])
    first, second = (read_jsonl(run.supervised(0.02, index).metrics) for index in (0, 1))
    assert first[-1]["loss"] < first[0]["loss"]
    assert second[0]["loss"] < first[0]["loss"] / 2  # it goes on from where the first ended
    assert [weights(run.iteration(t)) for t in (0, 1)] == before


def test_it_goes_on_where_it_stopped(played: tuple[RunDir, list[bytes]], ready: Prepared, tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(played[0].path, tmp_path / "run")))
    folder = run.supervised(0.02, 1)
    whole = weights(folder)
    for path in (folder.adapter, folder.evaluation, folder.metrics):
        remove(path)
    assert [len(rounds) for rounds in rivals(run).values()] == [2, 1]
    baseline(ready, run.path, Silent(), RATES)
    assert weights(folder) == whole
    # a round that was damaged is made again, as any other piece
    folder.evaluation.write_text(folder.evaluation.read_text().replace("1", "2", 1))
    baseline(ready, run.path, Silent(), RATES)
    assert weights(folder) == whole
    assert read_json(folder.evaluation) == read_json(played[0].supervised(0.02, 1).evaluation)


def test_whom_the_first_round_is_against_is_measured_again_where_that_was_damaged(
    played: tuple[RunDir, list[bytes]], ready: Prepared, tmp_path: Path
) -> None:
    run = RunDir(Path(shutil.copytree(played[0].path, tmp_path / "run")))
    remove(run.supervised(RATES[0], 0).path)
    run.base.evaluation.write_text("damaged")
    baseline(ready, run.path, Silent(), RATES[:1])
    for folder in (run.base, run.supervised(RATES[0], 0)):
        whole = played[0].path / folder.evaluation.relative_to(run.path)
        assert read_json(folder.evaluation) == read_json(whole)


def test_without_the_metrics_of_an_iteration_it_takes_as_many_steps(
    played: tuple[RunDir, list[bytes]], ready: Prepared, tmp_path: Path
) -> None:
    copy = RunDir(tmp_path / "run")
    shutil.copytree(played[0].path, copy.path)
    steps = len(read_jsonl(copy.iteration(0).metrics))
    remove(copy.path / "supervised")
    copy.iteration(0).metrics.write_text("damaged")
    baseline(ready, copy.path, Silent(), RATES[:1])
    assert not copy.iteration(0).metrics.is_file()
    assert len(read_jsonl(copy.supervised(RATES[0], 0).metrics)) == steps


def test_it_stands_in_the_table_of_the_run(played: tuple[RunDir, list[bytes]], ready: Prepared) -> None:
    run, config = played[0], ready.config
    rival = best_rival(run, config)
    assert rival is not None
    rate, rounds = rival
    assert [player.name for player in rounds] == ["s0", "s1"]
    shown = tables(run, config)
    assert [row[0] for row in shown[0].rows] == ["base", "0", "1", "s0", "s1"]
    assert f"supervised training as long, at {rate:g}" in shown[0].columns[0].meaning
    assert shown[-1].title == "Supervised training, by rate"
    assert [row[0] for row in shown[-1].rows] == ["0.001", "0.02"]
    said = sentences(run, config)[-1]
    assert said.startswith("Iteration ")
    assert "of supervised training" in said
    assert said in run.summary.read_text(encoding="utf-8") == summary(run, config)
    assert [player.name for player in players(run, config)] == ["base", "0", "1"], "it takes no part in the game"


def test_without_a_baseline_nothing_is_said_of_one(
    played: tuple[RunDir, list[bytes]], ready: Prepared, tmp_path: Path
) -> None:
    run = RunDir(Path(shutil.copytree(played[0].path, tmp_path / "run")))
    shutil.rmtree(run.path / "supervised")
    assert best_rival(run, ready.config) is None
    assert "upervised" not in summary(run, ready.config)


def test_its_work_is_counted(played: tuple[RunDir, list[bytes]], ready: Prepared) -> None:
    work = workload(played[0], ready.config, [0.02], len(ready.train), len(ready.heldout))
    rows, heldout = len(ready.train), len(ready.heldout)
    assert [(item.phase, item.iteration, item.units) for item in work] == [
        ("train", 0, 3 * rows),
        ("evaluate", 0, 4 * heldout),
        ("train", 1, 3 * 2 * rows),  # iteration 1 learns from the pairs of both
        ("evaluate", 1, 4 * heldout),
    ]


def test_a_run_without_an_iteration_has_none(ready: Prepared, tmp_path: Path) -> None:
    with pytest.raises(QspinError, match="no finished iteration yet, so there is nothing to compare with"):
        baseline(ready, tmp_path / "new", Silent(), RATES)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("rate", ["0", "1", "-1e-4", "nan"])
def test_a_rate_that_is_none_is_refused_before_the_baseline_is_trained(
    rate: str, played: tuple[RunDir, list[bytes]]
) -> None:
    folder = played[0].path
    before = contents(folder)
    with pytest.raises(QspinError, match="--lr: a learning rate is between 0 and 1"):
        api.baseline(folder, [1e-4, float(rate)], progress=Silent())
    said = "--lr: a learning rate is between 0 and 1, as 1e-4"
    assert refusal("baseline", folder, "--lr", "1e-4", "--lr", rate) == said
    assert contents(folder) == before


def test_a_run_that_can_not_be_written_to_is_told_before_its_data_is_read(
    played: tuple[RunDir, list[bytes]], closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = closed / "run"
    shutil.copytree(played[0].path, folder)
    closed.chmod(0o755)
    monkeypatch.setattr("qspin.record.prepare", lambda *_: pytest.fail("the data was read"))
    importlib.import_module("qspin.watching")  # which may be closed to nobody
    with as_nobody():
        said = refusal("baseline", folder)
    assert said == (
        f"{folder} can't be written to: Permission denied; what is computed is kept there, so give yourself the right "
        "to, or take a copy of the run"
    )


def test_a_config_that_was_edited_is_named_before_the_data_is_read(
    played: tuple[RunDir, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(played[0].path, run.path)
    edited = run.config.read_text(encoding="utf-8").replace("\nseed: 0\n", "\nseed: 5\n")
    run.config.write_text(edited, encoding="utf-8")
    monkeypatch.setattr("qspin.record.prepare", lambda *_: pytest.fail("the data was read"))
    said = f"{run.config}: changed since the run was made (seed); put the old values back"
    assert refusal("baseline", run.path) == said
