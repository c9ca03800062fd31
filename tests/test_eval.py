"""`qspin eval` on a run's players: what it shows, keeps and computes again, and what it says when it can't."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from command_line import Answer, call, contents, process, refusal
from conftest import flip_byte, small_run
from own_tasks import CHOICES, SURPRISE, WORDS, write_tasks

from qspin.config import load_config
from qspin.figures.benchmarks import Score, SetUp, all_kept, gain, kept
from qspin.files import read_json, write_json
from qspin.prepare import prepare
from qspin.run_dir import RunDir
from qspin.spin import run
from qspin.trials.loaded import Loaded
from qspin.trials.tasks import Tasks
from qspin.watch.progress import Silent


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


ALL = ",".join([CHOICES, WORDS, SURPRISE])


@pytest.fixture(scope="module")
def put(exact: RunDir, tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, Answer]:
    run_dir = RunDir(shutil.copytree(exact.path, tmp_path_factory.mktemp("eval") / "run"))
    return run_dir, call("eval", run_dir.path, "--tasks", ALL, "--include", tasks)


@pytest.fixture
def evaluated(put: tuple[RunDir, Answer]) -> Answer:
    return put[1]


@pytest.fixture
def run_dir(put: tuple[RunDir, Answer], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """A copy of the run with all that was kept, to be changed."""
    return RunDir(shutil.copytree(put[0].path, tmp_path_factory.mktemp("copy") / "run"))


def rows_of(text: str) -> list[list[str]]:
    """A table's cells, by row."""
    return [cells for line in text.splitlines() if (cells := [c for c in line.strip().split("  ") if c])]


def _set_up(run_dir: RunDir, task: str) -> SetUp:
    found = [outcome.set_up for outcome in all_kept(run_dir.base) if outcome.set_up.task == task]
    [plain] = [set_up for set_up in found if set_up.shots is None and set_up.limit is None]
    return plain


def told(*arguments: str | Path) -> str:
    """The line that a command ends with which had begun."""
    answer = call(*arguments)
    assert answer.code == 1
    return answer.err.splitlines()[-1]


# --- figures ---


def test_the_command(run_dir: RunDir, evaluated: Answer) -> None:
    assert evaluated.code == 0, evaluated.err
    shown = [[cell.strip() for cell in row] for row in rows_of(evaluated.out)]
    assert ["task", "set-up", "metric", "n", "base", "0", "change"] in shown
    by_task = {(row[0], row[2]): row for row in shown if row[0].startswith("own_") and len(row) == 7}
    assert by_task.keys() == {
        (CHOICES, "acc"), (CHOICES, "acc_norm"), (WORDS, "exact_match"), (SURPRISE, "perplexity")
    }  # fmt: skip
    assert by_task[WORDS, "exact_match"][1] == "2-shot"
    for name in ("base", "0"):
        outcomes = {outcome.set_up.task: outcome for outcome in all_kept(run_dir.player(name))}
        assert outcomes.keys() == {CHOICES, WORDS, SURPRISE}
        for task, outcome in outcomes.items():
            for score in outcome.scores:
                row = by_task[task, score.metric]
                cell = row[4 if name == "base" else 5]
                assert cell.startswith(f"{score.value:.3f}")
                assert score.documents == 12
    base, tuned = (kept(run_dir.player(name), _set_up(run_dir, SURPRISE)) for name in ("base", "0"))
    assert base is not None
    assert tuned is not None
    # it was trained to say just that, and the figure that is the surprise tells
    assert tuned.scores[0].value < 0.8 * base.scores[0].value
    assert by_task[SURPRISE, "perplexity"][6].startswith("-")


def test_a_warm_start_at_work_is_not_called_the_base(
    tiny_folder: Callable[[str], Path], tasks: Path, tmp_path: Path
) -> None:
    settings = small_run(tiny_folder("llama"), tmp_path / "rows.jsonl", rows=18) | {"iterations": 1, "sft.epochs": 1}
    run(prepare(load_config(None, settings), datetime.date(2026, 1, 2)), tmp_path / "run", Silent())
    answer = call("eval", tmp_path / "run", "--tasks", SURPRISE, "--include", tasks, "--iteration", "base,sft,0")
    assert answer.code == 0, answer.err
    begun = [line.partition(": 0/")[0] for line in answer.out.splitlines() if ": 0/12 documents" in line]
    whose = ("base", "warm start", "iteration 0 (1 of 1)")
    assert begun == [f"{player} · {SURPRISE}" for player in whose]


def test_summary_and_report_have_the_figures(run_dir: RunDir) -> None:
    text = run_dir.summary.read_text()
    assert "## Benchmarks" in text
    assert text.index("## Benchmarks") < text.index("## Details")
    assert CHOICES in text
    assert call("report", run_dir.path).code == 0
    page = (run_dir.path / "report.html").read_text()
    assert page.index("<h2>Benchmarks</h2>") < page.index("<details><summary>More figures")


def score(values: list[float] | None, value: float | None = None) -> Score:
    mean = sum(values) / len(values) if values else 0.0
    return Score("t", "acc", mean if value is None else value, 0.1, 0, len(values or []), values)


def test_the_error_of_a_change_is_that_of_pairs() -> None:
    first, second = score([1, 0, 1, 0, 1, 1, 0, 1]), score([1, 0, 1, 1, 1, 1, 1, 1])
    difference, error = gain(first, second)
    assert difference == 0.25
    assert error == pytest.approx((0.25 * 0.75 * 8 / 7 / 8) ** 0.5)  # two of eight rose by one
    assert gain(first, first) == (0.0, 0.0)
    assert gain(first, score(None, 2.0)) == (2.0 - first.value, None)


# --- what is kept ---


def test_what_is_kept_is_not_computed_again(
    run_dir: RunDir, tasks: Path, evaluated: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _set_up(run_dir, CHOICES).file(run_dir.iteration(0))
    before = {file: file.stat().st_mtime_ns for file in run_dir.path.rglob("benchmarks/*.json")}
    assert len(before) == 6

    def never(*_: Any) -> None:
        raise AssertionError("the base was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(Loaded, "open", never)
        again = call("eval", run_dir.path, "--tasks", ALL, "--include", tasks)
    assert again.code == 0
    assert again.out == evaluated.out[evaluated.out.index("Benchmarks") :]
    path.unlink()
    assert call("eval", run_dir.path, "--tasks", ALL, "--include", tasks).code == 0
    after = {file: file.stat().st_mtime_ns for file in run_dir.path.rglob("benchmarks/*.json")}
    assert {file for file in before if after[file] != before[file]} == {path}


def test_other_set_ups_are_other_figures(run_dir: RunDir, tasks: Path) -> None:
    options = ["--tasks", CHOICES, "--include", tasks, "--iteration", "base"]
    call("eval", run_dir.path, *options, "--shots", "1", "--limit", "5", "--chat-template")
    [found] = [outcome for outcome in all_kept(run_dir.base) if outcome.set_up.chat]
    assert (found.set_up.shots, found.set_up.limit, found.scores[0].documents, found.scores[0].shots) == (1, 5, 5, 1)
    plain = kept(run_dir.base, _set_up(run_dir, WORDS))
    assert plain is not None


def test_a_task_that_was_changed_is_computed_again(run_dir: RunDir, tasks: Path) -> None:
    file = tasks / f"{CHOICES}.yaml"
    was = file.read_text()
    try:
        file.write_text(was.replace("{{question}}", "Say, {{question}}"))
        answer = call("eval", run_dir.path, "--tasks", CHOICES, "--include", tasks, "--iteration", "base")
        assert "documents" in answer.out
    finally:
        file.write_text(was)


@pytest.mark.parametrize("name", ["rows.csv", "rows.parquet", "rows.tsv", "data/rows.jsonl.gz", "prompt.txt"])
def test_data_beside_a_task_is_part_of_its_definition(name: str, tmp_path: Path) -> None:
    folder = write_tasks(tmp_path)
    (folder / "data").mkdir()
    before = []
    for content in (b"question,answer\n1,2\n", b"question,answer\n1,3\n"):
        (folder / name).write_bytes(content)
        before.append(Tasks.find([CHOICES], folder).definition(CHOICES))
    assert len(set(before)) == 2


# --- what can't be done ---


def test_errors_take_a_line(run_dir: RunDir, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = run_dir.path
    assert "--tasks or --suite: name tasks" in refusal("eval", here)
    assert "'a/b' is no task's name" in refusal("eval", here, "--tasks", "a/b")
    assert "--shots goes with --tasks" in refusal("eval", here, "--suite", "open-llm-v1", "--shots", "3")
    assert "'7' is not finished" in refusal("eval", here, "--tasks", CHOICES, "--iteration", "base,7")
    assert refusal("eval", tmp_path, "--tasks", CHOICES) == f"{tmp_path}: not the folder of a run, it has no run.json"
    assert "--include: nowhere is no folder" in refusal("eval", here, "--tasks", CHOICES, "--include", "nowhere")
    options = "--tasks", CHOICES, "--include", tasks, "--shots", "40"
    assert told("eval", here, *options) == f"error: {CHOICES}: 40 shots are asked for, and it has 11 examples"

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: lost.jsonl}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: x\ndoc_to_target: 0\ndoc_to_choice: y\n"
    )
    assert "error: lost: its data can't be had" in told("eval", here, "--tasks", "lost", "--include", broken)

    shutil.copy(tasks / f"{CHOICES}.yaml", broken)
    answer = call(
        "eval", here, "--tasks", f"lost,{CHOICES}", "--include", broken, "--iteration", "base", "--limit", "2"
    )
    assert "error: lost: its data can't be had" in answer.out
    assert f"{CHOICES}  0-shot, first 2" in answer.out
    assert answer.code == 1
    assert answer.err.splitlines()[-1] == "error: 1 of 2 tasks could not be put to the players: lost"

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "Why?", "c": ["a", "b"]}\n{"q": "How?", "c": null}\n')
    (broken / "holes.yaml").write_text(
        f"task: holes\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_choice: [x, y]\ndoc_to_target: 0\n"
        "doc_to_text: '{{q}} {{c[0]}}'\n"
    )
    options = "--tasks", "holes", "--include", broken
    assert "error: holes: a document does not fit the task's templates" in told("eval", here, *options)

    file = _set_up(run_dir, CHOICES).file(run_dir.base)
    whole = read_json(file)
    file.write_text("{}")
    assert "damaged or unreadable" in refusal("eval", here, "--tasks", CHOICES)
    write_json(file, {"set_up": {}, "scores": [], "other": 1})
    assert "of another version of qspin" in refusal("eval", here, "--tasks", CHOICES)
    write_json(file, whole)

    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert refusal("eval", here, "--tasks", "gsm8k").endswith("is not installed: pip install 'lm-eval>=0.4.13,<0.4.14'")


def test_a_task_that_can_not_be_put_leaves_the_others_alone(run_dir: RunDir, tasks: Path, tmp_path: Path) -> None:
    shutil.copy(tasks / f"{CHOICES}.yaml", tmp_path)
    definition = yaml.safe_load((tasks / f"{WORDS}.yaml").read_text())
    long = {**definition, "task": "long", "generation_kwargs": {"max_gen_toks": 5000}}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(long))
    options = "--include", tmp_path, "--iteration", "base", "--limit", "3"
    answer = call("eval", run_dir.path, "--tasks", f"long,{CHOICES}", *options)
    assert "error: the task asks for 5000 new tokens; the model's context is 512" in answer.out
    assert f"{CHOICES}  0-shot, first 3" in answer.out
    assert answer.code == 1
    assert answer.err.splitlines()[-1] == "error: 1 of 2 tasks could not be put to the players: long"
    assert told("eval", run_dir.path, "--tasks", "long", *options) == (
        "error: the task asks for 5000 new tokens; the model's context is 512"
    )


def test_a_base_that_came_out_otherwise_here_is_told_of(run_dir: RunDir, tasks: Path, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "run")
    shutil.copytree(run_dir.path, copy.path)
    write_json(copy.record, read_json(copy.record) | {"base_hash": "0" * 64, "quantised_by": "another card"})
    options = "--tasks", CHOICES, "--include", tasks, "--iteration", "base", "--limit", "4"
    answer = call("eval", copy.path, *options)
    assert answer.code == 0
    assert f"are not those that {copy.path} began with (another device" in answer.out
    write_json(copy.record, read_json(run_dir.record) | {"base_hash": "0" * 64})
    assert "the base's files have changed" in told("eval", copy.path, *options, "--chat-template")


def test_a_damaged_adapter_is_not_measured(run_dir: RunDir, tasks: Path, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "run")
    shutil.copytree(run_dir.path, copy.path, ignore=shutil.ignore_patterns("benchmarks"))
    said = flip_byte(copy.iteration(0).adapter)
    options = "--tasks", CHOICES, "--include", tasks, "--iteration", "0", "--limit", "4"
    assert told("eval", copy.path, *options) == f"error: {said}"
    assert not list(copy.iteration(0).benchmarks.iterdir())


def test_a_run_that_can_not_be_written_to_is_told_before_anything_is_computed(
    run_dir: RunDir, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = RunDir(tmp_path / "run")
    shutil.copytree(run_dir.path, copy.path)
    shutil.rmtree(copy.base.benchmarks, ignore_errors=True)
    copy.base.benchmarks.write_text("in the way: what holds for root as well")
    monkeypatch.setattr(Loaded, "open", lambda *_: pytest.fail("the base was loaded"))
    [line] = [told("eval", copy.path, "--tasks", CHOICES, "--include", tasks)]
    assert line.startswith(f"error: {copy.base.benchmarks} can't be written to: ")


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys; from qspin.cli import main\nsys.argv = ['qspin', 'eval', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(*sorted({'torch', 'lm_eval', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


def test_a_hub_that_can_not_be_reached_is_asked_once(
    run_dir: RunDir, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its clients would ask six times for each data set, half a minute, and tell of each."""
    import datasets
    from huggingface_hub import constants

    asked = []

    def refuse(address: tuple[str, int], *_: Any, **__: Any) -> socket.socket:
        asked.append(address)
        raise ConnectionRefusedError

    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(socket, "create_connection", refuse)
    answer = call("eval", run_dir.path, "--tasks", "arc_easy,boolq", "--iteration", "base")
    for task in ("arc_easy", "boolq"):
        assert f"error: {task}: its data can't be had (Couldn't reach " in answer.out
    assert answer.err == "error: 2 of 2 tasks could not be put to the players: arc_easy, boolq\n"
    assert asked == [("127.0.0.1", 9)]
    assert not [record for record in caplog.records if "Retrying" in record.message]


# --- beside others ---


def test_two_at_once_and_a_run_that_goes_on_do_not_disturb_one_another(
    exact: RunDir, tasks: Path, evaluated: Answer, tmp_path: Path
) -> None:
    alone, beside = (RunDir(shutil.copytree(exact.path, tmp_path / name)) for name in ("alone", "beside"))
    config = load_config(exact.config).model_copy(update={"iterations": 2})
    ready = prepare(config, datetime.date(2026, 1, 2))
    run(ready, alone.path, Silent())
    command = "eval", beside.path, "--tasks", ALL, "--include", tasks, "--iteration", "base,0"
    with process(*command) as first:
        try:
            assert first.stdout.readline() == f"1 of 3: {CHOICES}\n"  # type: ignore[union-attr]
            first.send_signal(signal.SIGSTOP)  # so that the second begins before the first has kept anything
            second = process(*command)
            assert second.stdout.readline() == f"1 of 3: {CHOICES}\n"  # type: ignore[union-attr]
        finally:
            first.send_signal(signal.SIGCONT)
        with second:
            run(ready, beside.path, Silent())
            ends = [child.communicate(timeout=300) for child in (first, second)]
    shown = evaluated.out[evaluated.out.index("Benchmarks") :]
    for child, (out, err) in zip((first, second), ends, strict=True):
        assert child.returncode == 0, err
        assert out[out.index("Benchmarks") :] == shown
    assert contents(beside.iteration(1).adapter) == contents(alone.iteration(1).adapter)
    whole = [path.relative_to(beside.path) for path in beside.path.rglob("benchmarks/*")]
    assert sorted(map(str, whole)) == sorted(
        f"{player}/benchmarks/{task}.json" for player in ("base", "iteration-0") for task in ALL.split(",")
    )


# --- interrupted ---


def test_interrupted_it_keeps_what_is_done(run_dir: RunDir, tasks: Path) -> None:
    for folder in (run_dir.base, run_dir.iteration(0)):
        for outcome in all_kept(folder):
            outcome.set_up.file(folder).unlink()
    slow = tasks / "slow.yaml"
    definition = yaml.safe_load((tasks / f"{WORDS}.yaml").read_text())
    slow.write_text(
        yaml.safe_dump({**definition, "task": "slow", "generation_kwargs": {"max_gen_toks": 400}, "repeats": 40})
    )
    try:
        with process("eval", run_dir.path, "--tasks", f"{CHOICES},slow", "--include", tasks) as child:
            deadline = time.monotonic() + 120
            while not any("slow" in line for line in iter(child.stdout.readline, "")):  # type: ignore[union-attr]
                assert time.monotonic() < deadline
            time.sleep(1)
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=60)
    finally:
        slow.unlink()
    assert child.returncode == 130
    assert err == "stopped; the same command goes on from the last finished piece\n", (out, err)
    assert {outcome.set_up.task for outcome in all_kept(run_dir.base)} == {CHOICES}
