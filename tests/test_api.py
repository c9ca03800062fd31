"""The library: what the commands do, in Python."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from conftest import Notes, small_run

import qspin
from qspin import api
from qspin.files import read_json
from qspin.run_dir import RunDir


@pytest.fixture(scope="module")
def config(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> qspin.RunConfig:
    folder = tmp_path_factory.mktemp("api")
    settings = small_run(tiny_folder("llama"), folder / "rows.jsonl", rows=18)
    return qspin.load_config(None, settings | {"iterations": 2})


@pytest.fixture(scope="module")
def results(config: qspin.RunConfig, tmp_path_factory: pytest.TempPathFactory) -> qspin.Results:
    return qspin.run(config, tmp_path_factory.mktemp("api") / "run", progress=qspin.Silent())


def test_a_run_and_what_came_of_it(results: qspin.Results, config: qspin.RunConfig) -> None:
    assert results.config == config
    assert list(results.figures) == ["base", "0", "1"]
    nll = results.figures["1"]["nll"]
    assert nll.low < nll.value < nll.high
    assert results.kept in (0, 1)
    assert results.adapter() == results.path / f"iteration-{results.kept}" / "adapter"
    assert results.adapter("last") == results.path / "iteration-1" / "adapter"
    assert results.markdown == (results.path / "SUMMARY.md").read_text()
    assert results.sentences and all(sentence in results.markdown for sentence in results.sentences)


def test_it_goes_on_where_it_stopped_and_shows_it(
    results: qspin.Results, config: qspin.RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    qspin.run(config, results.path)
    shown = capsys.readouterr().out
    assert "2-sample AUC" in shown and "iteration 0 (1 of 2) · generate" not in shown


def test_a_presets_name_is_no_configuration(tmp_path: Path) -> None:
    for call in (lambda: qspin.run("quickstart", tmp_path / "run"), lambda: qspin.plan("quickstart")):  # type: ignore[arg-type]
        with pytest.raises(qspin.QspinError, match=r"^a configuration is wanted, as .*; got 'quickstart'$"):
            call()
    assert not (tmp_path / "run").exists()


NAMED = 'settings are wanted by their names, as {"train.beta": 0.2}; got '
VARIED = "--vary: a sweep varies settings, each over a list: --vary train.beta=0.1,1"
RATES = "rates: a list of learning rates is wanted, as [1e-4]; got "
RATE = "--lr: a learning rate is between 0 and 1, as 1e-4"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda run: qspin.baseline(run, 1e-4), f"{RATES}0.0001"),
        (lambda run: qspin.baseline(run, ["x"]), f"{RATES}['x']"),
        (lambda run: qspin.baseline(run, [2]), RATE),
        (lambda run: qspin.baseline(run, []), RATE),
        (lambda _: qspin.load_config(None, {3: 1}), f"{NAMED}{{3: 1}}"),
        (lambda _: qspin.load_config(None, ["seed"]), f"{NAMED}['seed']"),
        (lambda _: qspin.load_config(3), "a preset's name or a .yaml file is wanted; got 3"),
        (lambda run: qspin.sweep(None, {3: [1]}, run), VARIED),
        (lambda run: qspin.sweep(None, ["seed"], run), VARIED),
        (lambda run: qspin.sweep(None, {"seed": [1]}, run, overrides=[3]), f"{NAMED}[3]"),
        (lambda _: qspin.results(None), "RUN: a path is wanted, as a text or a Path; got None"),
    ],
)
def test_a_slip_in_an_argument_is_one_line(call: Callable[[Any], object], said: str, results: qspin.Results) -> None:
    with pytest.raises(qspin.QspinError) as caught:
        call(results.path)
    assert str(caught.value) == said


def test_what_was_named_from_one_folder_is_found_from_another(
    config: qspin.RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copy(str(config.data.source), "rows.jsonl")
    template = transformers.AutoTokenizer.from_pretrained(config.model.id).chat_template
    Path("mine.jinja").write_text(template, encoding="utf-8")
    named = {"data": {"source": "rows.jsonl"}, "chat": {"template": "mine.jinja"}}
    settings = config.model_dump(exclude={"data": {"source"}, "chat": {"template"}}) | {"iterations": 1}
    merged = {**settings, **{group: {**settings[group], **values} for group, values in named.items()}}
    qspin.run(qspin.RunConfig.model_validate(merged), tmp_path / "run", progress=qspin.Silent())
    monkeypatch.chdir(tmp_path)
    assert qspin.load("run").generate(["Why?"], max_new_tokens=2)
    assert qspin.export("run", to="adapter", out="adapter").is_dir()


def test_fewer_iterations_than_were_played_are_said_to_stay(
    results: qspin.Results, config: qspin.RunConfig, tmp_path: Path
) -> None:
    shutil.copytree(results.path, tmp_path / "run")
    fewer, notes = config.model_copy(update={"iterations": 1}), Notes()
    assert list(qspin.run(fewer, tmp_path / "run", progress=notes).figures) == ["base", "0", "1"]
    assert notes.notes[-1] == "more iterations than 1 are here from before; they stay, and count"


def test_its_players_answer(results: qspin.Results) -> None:
    players = qspin.load(results.path, "1")
    conversation = [
        {"role": "user", "content": "What is 1?"},
        {"role": "assistant", "content": "It is 7, I say."},
        {"role": "user", "content": "What is 2?"},
    ]
    replies = players.generate(["What is 2?", conversation], temperature=0, max_new_tokens=8)
    assert replies[0] == players.generate(["What is 2?"], temperature=0, max_new_tokens=8)[0] != replies[1]
    with pytest.raises(qspin.QspinError, match=r"a turn has a role \(system, user, assistant\).*'robot'"):
        players.generate([[{"role": "robot", "content": "Beep."}]])


def test_the_libraries_are_quiet(results: qspin.Results, config: qspin.RunConfig, tmp_path: Path) -> None:
    """Whoever listens, transformers draws no bars."""
    for call in (
        lambda: qspin.run(config, results.path, progress=qspin.Silent()),
        lambda: qspin.load(results.path),
        lambda: api.export(results.path, to="adapter", out=tmp_path / "adapter"),
        lambda: api.report(results.path, tmp_path / "report.html"),
        lambda: api.plan(config),
    ):
        transformers.logging.enable_progress_bar()
        call()
        assert not transformers.logging.is_progress_bar_enabled()


def test_a_baseline_is_shown_as_one_and_leaves_the_runs_status(
    results: qspin.Results, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(Path(shutil.copytree(results.path, tmp_path / "run")))
    run.status.write_text("the run's own")
    api.baseline(run.path, [1e-3])
    shown = capsys.readouterr().out
    assert "supervised round 1 (2 of 2) · train: " in shown and "\niteration" not in shown
    assert run.status.read_text() == "the run's own"
    assert read_json(run.baseline_status)["status"]["baseline"]


def test_a_baseline_a_report_and_an_export(results: qspin.Results, tmp_path: Path) -> None:
    api.baseline(results.path, [1e-3], progress=qspin.Silent())
    assert "Supervised training, by rate" in results.markdown
    assert "<h1>" in api.report(results.path, tmp_path / "report.html").read_text()
    merged = api.export(results.path, to="merged-16bit", out=tmp_path / "merged", iteration=0)
    transformers.AutoModelForCausalLM.from_pretrained(merged)
    assert read_json(merged / "merge-check.json")["rows"] == 3  # a fifth of 18


def test_a_plan() -> None:
    known = qspin.load_config("qwen3-8b")
    assert api.plan(known, vram=24).fits
    assert not api.plan(known, vram=4).fits
    with pytest.raises(qspin.QspinError, match="architecture is not set"):
        api.plan(qspin.load_config(None, {"model.id": "someone/unknown"}), vram=24)


def test_a_sweep(tiny_folder: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small_run(tiny_folder("llama"), tmp_path / "rows.jsonl", rows=14) | {"iterations": 1}
    found = api.sweep(None, {"train.beta": [0.1, 1.0]}, tmp_path / "sweep", overrides=settings)
    assert list(found) == ["beta=0.1", "beta=1.0"]
    assert found["beta=0.1"].figures["base"] == found["beta=1.0"].figures["base"]
    assert "2 of 2: beta=1.0" in capsys.readouterr().out


def test_a_run_in_which_nobody_was_measured(results: qspin.Results, tmp_path: Path) -> None:
    shutil.copy(results.path / "run.json", tmp_path)
    shutil.copy(results.path / "config.yaml", tmp_path)
    begun = qspin.results(tmp_path)
    assert (begun.figures, begun.kept, begun.sentences) == ({}, None, [])
    with pytest.raises(qspin.QspinError, match="nobody has been measured yet"):
        _ = begun.markdown


def test_a_report_needs_a_file_and_a_sweep_a_folder(results: qspin.Results, tmp_path: Path) -> None:
    with pytest.raises(qspin.QspinError, match="is a folder; name a file"):
        api.report(results.path, tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(qspin.QspinError, match="file is a file; name a folder"):
        api.report(results.path, file / "report.html")
    with pytest.raises(qspin.QspinError, match="file is a file; name a folder"):
        api.sweep("quickstart", {"train.beta": [1, 2]}, file)


def test_a_report_is_not_made_of_other_settings(results: qspin.Results, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(results.path, run)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("seed: 0", "seed: 1"))
    with pytest.raises(qspin.QspinError, match=r"changed since the run was made \(seed\)"):
        api.report(run)


def test_no_run(tmp_path: Path) -> None:
    for function in (qspin.results, qspin.load, api.report):
        with pytest.raises(qspin.QspinError, match="not the folder of a run"):
            function(tmp_path)


def test_importing_it_imports_nothing_heavy() -> None:
    code = "import sys, qspin; print([m for m in ('torch', 'pydantic', 'rich') if m in sys.modules], qspin.__all__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ['QspinError'")
    assert all(hasattr(qspin, name) for name in qspin.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qspin.nothing  # noqa: B018


@pytest.mark.skipif(sys.platform != "linux", reason="torch has GNU's OpenMP there")
@pytest.mark.parametrize(
    ("asked", "told"),
    [({}, qspin.SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "30000000000")],
    ids=str,
)
def test_threads_that_wait_let_others_work(asked: dict[str, str], told: str) -> None:
    """As OpenMP itself says it, in a process that imports torch by way of qspin; what a user has asked for stays."""
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", "import qspin; qspin.load_config; import torch"],
        env=environment | asked | {"OMP_DISPLAY_ENV": "VERBOSE"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"GOMP_SPINCOUNT = '{told}'" in done.stderr
