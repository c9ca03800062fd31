"""A run's folder: where everything is, what is done already, and what was measured on the way."""

from __future__ import annotations

from pathlib import Path

import pytest

from qspin.errors import QspinError
from qspin.files import write_json, write_text
from qspin.run_dir import IterationDir, RunDir

# --- where everything is ---


def test_every_path_of_a_run() -> None:
    """Programs read these, and runs of earlier versions have them."""
    run = RunDir(Path("run"))
    named = (run.record, run.config, run.template, run.rejects, run.summary)
    assert {str(path.relative_to("run")) for path in named} == {
        "run.json", "config.yaml", "template.jinja", "rejects.jsonl", "SUMMARY.md",
    }  # fmt: skip
    assert (run.verdict, run.status) == (Path("run/verdict.json"), Path("run/status.json"))
    assert run.base.evaluation == Path("run/base/evaluation.json")
    assert run.warm_start.adapter == Path("run/warm-start/adapter")
    assert run.supervised(2e-4, 1).path == Path("run/supervised/lr-0.0002/round-1")
    assert run.supervised(5e-5, 0).path == Path("run/supervised/lr-5e-05/round-0")
    iteration = run.iteration(3)
    assert iteration.path == Path("run/iteration-3")
    assert iteration.generation_plan == iteration.path / "generation.json"
    assert iteration.generated(7) == iteration.path / "generated" / "shard-00007.jsonl"
    assert iteration.training_plan == iteration.path / "training.json"
    assert iteration.scores(7) == iteration.path / "scores" / "shard-00007.jsonl"
    assert iteration.snapshots == iteration.path / "snapshots"
    assert iteration.metrics == iteration.path / "metrics.jsonl"
    assert iteration.adapter == iteration.path / "adapter"
    assert (iteration.times, iteration.memory) == (iteration.path / "seconds.json", iteration.path / "memory.json")
    assert iteration.benchmarks == iteration.path / "benchmarks"
    assert (run.trials, run.baseline_status) == (Path("run/mt-bench"), Path("run/supervised/status.json"))


def test_players_are_the_folders_that_are_there_in_order(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.players() == []
    names = ["base", "warm-start", "iteration-0", "iteration-1", "supervised/lr-0.0002/round-0"]
    for name in [*names, "exports", "supervised/lr-0.01", "supervised/notes"]:
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "iteration-2").write_text("a file")
    assert [player.path.relative_to(tmp_path).as_posix() for player in run.players()] == names
    assert run.supervised_rates() == [0.0002, 0.01]


def test_learning_rates_that_differ_in_any_digit_have_folders_of_their_own(tmp_path: Path) -> None:
    rates = [1e-5, 1e-4, 1.0000001e-4, 0.1 + 0.2, 0.5]
    run = RunDir(tmp_path)
    for rate in rates:
        run.supervised(rate, 0).path.mkdir(parents=True)
    assert run.supervised_rates() == rates


def test_a_folder_without_a_record_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(QspinError, match=rf"^{tmp_path}: not the folder of a run, it has no run\.json$"):
        RunDir(tmp_path).check_run()
    with pytest.raises(QspinError, match=rf"^{tmp_path / 'none'}: no such folder$"):
        RunDir(tmp_path / "none").check_run()
    write_text(tmp_path / "run.json", "{}")
    with pytest.raises(QspinError, match=rf"^{tmp_path / 'run.json'}: a file; name the folder of a run$"):
        RunDir(tmp_path / "run.json").check_run()
    RunDir(tmp_path).check_run()


# --- where a run goes on ---


def finish(folder: IterationDir, *, adapter: bool = True, evaluation: bool = True) -> None:
    if adapter:
        folder.adapter.mkdir(parents=True)
    if evaluation:
        write_json(folder.evaluation, {})


def test_an_iteration_is_done_with_its_adapter_and_its_evaluation(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for index, (adapter, evaluation) in enumerate([(False, False), (True, False), (False, True), (True, True)]):
        finish(run.iteration(index), adapter=adapter, evaluation=evaluation)
        assert run.iteration(index).done == (adapter and evaluation)


def test_seconds_add_up_over_processes_and_phases(tmp_path: Path) -> None:
    assert IterationDir(tmp_path).seconds() == {}
    IterationDir(tmp_path).add_seconds("train", 1.5)
    IterationDir(tmp_path).add_seconds("score", 1.0)
    IterationDir(tmp_path).add_seconds("train", 2.0)
    assert IterationDir(tmp_path).seconds() == {"train": 3.5, "score": 1.0}


def test_peaks_are_the_most_of_all_times_and_for_show(tmp_path: Path) -> None:
    folder = IterationDir(tmp_path)
    assert folder.peaks() == {}
    for phase, held in (("train", 5), ("score", 2), ("train", 3), ("score", 4)):
        folder.add_peak(phase, held)
    assert folder.peaks() == {"train": 5, "score": 4}
    folder.memory.write_text("{")
    assert folder.peaks() == {}
    folder.memory.unlink()
    folder.memory.mkdir()
    folder.add_peak("train", 7)  # it can't be written, and stops nothing
