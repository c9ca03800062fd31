"""What a command that can't be carried out says: one clear line, with the setting or the file and what to do."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
from command_line import call, process, refusal
from conftest import HOUSE_STYLE, ROOT, as_nobody

from qspin import api
from qspin.config import load_config
from qspin.errors import NoPermission, QspinError
from qspin.files import read_jsonl
from qspin.run_dir import RunDir


def test_an_unknown_preset() -> None:
    names = ", ".join(sorted(path.stem for path in (ROOT / "presets").glob("*.yaml")))
    said = f"no preset is called 'quickstrat'; did you mean quickstart? there are {names}, or name a .yaml file"
    assert refusal("run", "quickstrat", "--out", "x") == said


def test_an_unknown_setting() -> None:
    said = "the configuration does not fit:\n  train.bta: no such setting; did you mean train.beta?"
    assert refusal("run", "quickstart", "--out", "x", "--set", "train.bta=1") == said


def test_two_wrong_settings_at_once() -> None:
    said = (
        "the configuration does not fit:\n"
        "  train.epochs = 0: Input should be greater than or equal to 1\n"
        "  iterations = -2: Input should be greater than or equal to 1"
    )
    assert refusal("run", "quickstart", "--out", "x", "--set", "train.epochs=0", "--iterations", "-2") == said


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.epochs", "--set takes KEY=VALUE, as in --set train.beta=0.2; got 'train.epochs'"),
        ("train.beta=[1", "--set train.beta: '[1' is not a YAML value; quote it"),
    ],
)
def test_a_setting_that_is_none(setting: str, said: str) -> None:
    assert refusal("run", "quickstart", "--out", "x", "--set", setting) == said


def test_no_data() -> None:
    said = "data.source is not set: give --data a file of prompts and answers, or a hub id"
    assert refusal("run", "smollm2-135m", "--out", "x") == said


def test_no_model() -> None:
    said = "model.id is not set: give --model a hub id or a local folder, or start from a preset"
    assert refusal("run", "--data", HOUSE_STYLE / "train.jsonl", "--out", "x") == said


def test_a_missing_data_file(tiny: Path) -> None:
    said = "none.jsonl: no such file; check the path, which is relative to the folder you are in"
    assert refusal("run", "--model", tiny, "--data", "none.jsonl", "--out", "x") == said


BAD_ROWS = '{"prompt": "a", "completion": "b"}\n{"prompt": broken\n'


def test_a_file_of_bad_rows_is_called_that_and_not_too_short(tiny: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "run"
    path.write_text(BAD_ROWS)
    said = (
        f"{path}: 1 of 2 rows are malformed, more than data.max_malformed_share = 0.05 allows: 1 broken-json (line 2 "
        "is broken JSON: Expecting value: column 12); mend them, or raise it"
    )
    assert refusal("run", "--model", tiny, "--data", path, "--out", out, "--dry-run") == said
    assert not out.exists()
    kept = RunDir(out).rejects
    assert refusal("run", "--model", tiny, "--data", path, "--out", out) == f"{said}; all that were left out: {kept}"
    assert [(row["source"], row["line"], row["code"]) for row in read_jsonl(kept)] == [(str(path), 2, "broken-json")]
    assert refusal("run", "--model", tiny, "--data", path, "--out", out).startswith(said), (
        "the folder can be used again"
    )


def test_strict_names_how_many_rows_the_first_and_where_to_look(tiny: Path, tmp_path: Path) -> None:
    path, out = tmp_path / "rows.jsonl", tmp_path / "run"
    rows = [{"prompt": f"What is {n % 50}?", "completion": f"It is {n % 50}."} for n in range(52)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["run", "--model", tiny, "--data", path, "--out", out]
    dry = call(*arguments, "--dry-run")
    assert (dry.code, dry.err) == (0, "")
    assert "40 training rows, 10 held out, 2 left out: 2 duplicate (line 51 says the same as line 1)\n" in dry.out
    for option in (["--strict"], ["--set", "data.strict=true"]):
        answer = call(*arguments, *option, columns=60)
        assert (answer.code, answer.out) == (1, "")
        assert answer.err == (
            f"error: {path}: 2 of 52 rows can't be used, and --strict (data.strict) allows none: the first is line 51, "
            "duplicate: says the same as line 1; mend them, or go on without; all that were left out: "
            f"{out / 'rejects.jsonl'}\n"
        )
        assert [row["line"] for row in read_jsonl(out / "rejects.jsonl")] == [51, 52]


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    said = f"model.id: {tmp_path} holds no config.json; name a folder saved with save_pretrained"
    assert refusal("run", "--model", tmp_path, "--data", HOUSE_STYLE / "train.jsonl", "--out", "x") == said


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    said = f"model.id: {file} is a file; name a folder saved with save_pretrained, or a hub id"
    assert refusal("run", "--model", file, "--data", HOUSE_STYLE / "train.jsonl", "--out", "x") == said


def test_a_hub_id_that_cannot_be_reached() -> None:
    said = refusal("run", "--model", "nobody/nothing", "--data", HOUSE_STYLE / "train.jsonl", "--out", "x")
    assert said.startswith("model.id: nobody/nothing can't be had from the hub (offline, a wrong id, or a gated model ")
    assert "\n" not in said


def test_a_broken_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("train: [1\n")
    said = refusal("run", tmp_path / "mine.yaml", "--out", "x")
    assert said.startswith(f"{tmp_path / 'mine.yaml'}: not valid YAML: ")
    assert "\n" not in said


def test_a_missing_configuration_file() -> None:
    assert refusal("run", "none.yaml", "--out", "x").startswith("none.yaml: cannot be read (")


def test_an_out_that_is_a_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    said = refusal("run", "--model", tiny, "--data", HOUSE_STYLE / "train.jsonl", "--out", tmp_path / "out")
    assert said == f"--out: {tmp_path / 'out'} is a file; name a folder"
    assert (tmp_path / "out").read_text() == "mine"


def test_an_out_that_holds_other_things(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    said = refusal("run", "--model", tiny, "--data", HOUSE_STYLE / "train.jsonl", "--out", tmp_path)
    assert said == f"--out: {tmp_path} holds other things; name a new folder or one of an earlier run"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "quickstart", "--out", "x", "--bogus"], "No such option"),
        (["run", "quickstart"], "Missing option '--out'"),
        (["run", "quickstart", "--out", "x", "--iterations", "many"], "Invalid value for '--iterations'"),
        (["run", "quickstart", "smollm2-135m", "--out", "x"], "Got unexpected extra argument"),
        (["bogus"], "No such command 'bogus'"),
    ],
)
def test_typing_errors_are_explained(arguments: list[str], said: str) -> None:
    answer = call(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert said in answer.err
    assert "--help' for help." in answer.err


def test_a_real_process_shows_no_traceback(tiny: Path, tmp_path: Path) -> None:
    """What a library prints as it is imported, or the interpreter as it ends, is not seen from inside."""
    (tmp_path / "rows.jsonl").write_text("{\n")
    command = process("run", "--model", tiny, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    out, err = command.communicate()
    assert (command.returncode, out) == (1, "")
    (line,) = err.splitlines()
    assert line.startswith(f"error: {tmp_path / 'rows.jsonl'}: none of its 1 rows is good: 1 broken-json (line 1 goes ")


def test_a_status_of_no_run(tmp_path: Path) -> None:
    assert refusal("status", tmp_path / "none") == f"{tmp_path / 'none'}: no such folder"
    (tmp_path / "thesis.tex").write_text("mine")
    assert refusal("status", tmp_path) == f"{tmp_path}: not the folder of a run, it has no run.json"


def test_of_one_finished_iteration_no_range_is_named(exact: RunDir) -> None:
    said = f"--iterations: '5' is not finished in {exact.path}; last, best or 0 are"
    assert refusal("compare", exact.path, "--iterations", "5") == said


@pytest.mark.parametrize("command", ["status", "chat", "report"])
def test_a_folder_in_a_run_or_of_runs_is_told_the_run(command: str, played_run: RunDir) -> None:
    for folder in (played_run.iteration(0).adapter, played_run.path.parent):
        said = f"{folder}: not the folder of a run, it has no run.json; {played_run.path} is one"
        assert refusal(command, folder) == said


def test_json_of_a_dry_run() -> None:
    said = "--json tells how a run goes on, and --dry-run does none; leave one of them out"
    assert refusal("run", "quickstart", "--out", "x", "--dry-run", "--json") == said


def test_a_tracker_that_is_not_there(tmp_path: Path) -> None:
    """It is heard of before any work."""
    absent = [name for name in ("trackio", "wandb", "tensorboard") if importlib.util.find_spec(name) is None]
    if not absent:
        pytest.skip("all trackers are installed")
    said = f"--track {absent[0]}: it is not installed; pip install {absent[0]}"
    assert refusal("run", "quickstart", "--out", tmp_path / "run", "--track", absent[0]) == said
    assert not (tmp_path / "run").exists()


# --- ~, as a shell leaves it in --out=~/runs ---


def test_a_home_is_found_by_every_command_and_function(
    played_run: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "home", tmp_path / "here"
    shutil.copytree(played_run.path, home / "run")
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))  # of Windows
    for command in (
        ("status", "~/run"),
        ("report", "~/run", "--out=~/a.html"),
        ("export", "~/run", "--to", "adapter", "--out=~/a"),
        ("init", "quickstart", "--output=~/mine.yaml"),
        ("presets", "show", "~/mine.yaml"),
    ):
        answer = call(*command)
        assert (answer.code, answer.err) == (0, "")
    assert api.report("~/run", "~/b.html") == home / "b.html"
    assert api.export("~/run", to="adapter", out="~/b") == home / "b"
    config = load_config("~/mine.yaml")
    (home / "full").mkdir()
    (home / "full" / "seed=1").touch()
    full = f"--out: {home / 'full'} holds other things; name a new folder or one of an earlier run"
    assert refusal("run", "quickstart", "--out=~/full", "--dry-run") == full
    with pytest.raises(QspinError, match=f"^{re.escape(full)}$"):
        api.run(config, "~/full")
    cell = f"--out: {home / 'full' / 'seed=1'} is a file; name a folder"
    assert refusal("sweep", "quickstart", "--vary", "seed=1", "--out=~/full") == cell
    with pytest.raises(QspinError, match=f"^{re.escape(cell)}$"):
        api.sweep("quickstart", {"seed": [1]}, "~/full")
    for work in (
        api.results,
        api.load,
        lambda path: api.baseline(path, [1e-3]),
        lambda path: api.push(path, "me/mine"),
    ):
        with pytest.raises(QspinError, match=f"^{re.escape(str(home / 'full'))}:? "):
            work("~/full")
    assert list(here.iterdir()) == []


# --- folders that are closed to the user ---


CLOSED = "no permission to read or write it, or to look into a folder above it"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("run quickstart --out {}/x", "--out: no permission to write in {}; name another folder"),
        ("status {}/sub", f"{{}}/sub: {CLOSED}"),
        ("chat {}/sub", f"{{}}/sub: {CLOSED}"),
        ("export {}/sub --to adapter --out {}.export", f"{{}}/sub: {CLOSED}"),
        ("report {}/sub", f"{{}}/sub: {CLOSED}"),
        ("run paper --model {}/sub --data {} --out {}.run", f"{{}}/sub: {CLOSED}"),
        ("plan paper --set model.id={}/sub --vram 24", f"{{}}/sub/config.json: {CLOSED}"),
        ("sweep quickstart --vary seed=1,2 --out {}/sub", f"{{}}/sub/run.json: {CLOSED}"),
        (
            "run {}/file.yaml --out {}.run",
            "{}/file.yaml: cannot be read ([Errno 13] Permission denied: '{}/file.yaml')",
        ),
    ],
    ids=lambda text: text.partition(" {")[0],
)
def test_a_folder_that_is_closed_to_the_user_is_one_line(arguments: str, said: str, closed: Path) -> None:
    words = [word.replace("{}", str(closed)) for word in arguments.split()]
    for name in ("watching", "cli_trials", "exports.export", "exports.recipe", "planning.plan_view", "trials.talk"):
        importlib.import_module(f"qspin.{name}")  # which may be closed to nobody
    with as_nobody():
        answer = call(*words)
    assert (answer.code, answer.out, answer.err) == (1, "", f"error: {said.replace('{}', str(closed))}\n")


@pytest.mark.parametrize(
    "command", ["status", "report", "compare", "baseline", "chat", "eval --tasks x", "export --to adapter"]
)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read ([Errno 2] No such file or directory: '{}')"),
        ("train: [\n", "not valid YAML: "),
        ("seeds: 1\n", "the configuration does not fit:\n  seeds: no such setting; did you mean seed?"),
    ],
)
def test_a_config_that_is_gone_or_broken_is_had_back(
    command: str, text: str | None, said: str, played_run: RunDir, tmp_path: Path
) -> None:
    run = RunDir(shutil.copytree(played_run.path, tmp_path / "run"))
    run.config.unlink()
    if text is not None:
        run.config.write_text(text)
    name, *options = command.split()
    answer = call(name, run.path, *options)
    assert answer.code == 1
    advice = "the command that began the run writes it anew"
    if name == "status":  # reads no more of it than it shows
        assert answer.err.startswith(f"error: {run.config}: damaged or unreadable (")
        assert answer.err.endswith(f"; {advice}\n")
    else:
        began = f"error: {run.config}: not as the run wrote it; {advice}: "
        assert answer.err.startswith(began + said.replace("{}", str(run.config)))


def test_a_run_that_can_not_be_written_to_is_no_reason_for_another_folder(played_run: RunDir, closed: Path) -> None:
    folder = shutil.copytree(played_run.path, closed / "run")
    closed.chmod(0o755)
    with as_nobody():
        said = refusal("run", "quickstart", "--out", folder)
    assert said == (
        f"--out: no permission to write in {folder}; qspin status says whether its run is finished, and a copy of it "
        "can be gone on with"
    )


def test_a_preset_of_a_closed_folder_is_none(closed: Path) -> None:
    with as_nobody():
        answer = call("run", closed / "file", "--out", f"{closed}.run")
    assert answer.code == 1
    assert answer.err.startswith(f"error: no preset is called '{closed / 'file'}'; ")


def test_from_python_a_closed_folder_is_a_qspin_error(closed: Path) -> None:
    with as_nobody(), pytest.raises(NoPermission) as caught:
        api.results(closed / "sub")
    assert str(caught.value) == f"{closed / 'sub'}: {CLOSED}"
    assert isinstance(caught.value.__cause__, PermissionError)
