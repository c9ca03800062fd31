"""What a person types and sees at once: help, the version, presets; and how a command ends that can't go on."""

from __future__ import annotations

import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from command_line import call, hearing_interrupts, process, refusal
from conftest import ANSI, HOUSE_STYLE, ROOT
from rich.cells import cell_len

import qspin
from qspin.config import load_config

# --- help ---


def processor_seconds() -> float:
    """What processes that have ended took, which is the time of an idle machine, however busy this one is."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_which_version_it_is() -> None:
    answer = call("--version")
    assert (answer.code, answer.out, answer.err) == (0, f"qspin {qspin.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"]])
def test_help_answers_at_once(arguments: list[str]) -> None:
    """In half a second; the least of three, since a busy machine only adds to it."""
    seconds = []
    for _ in range(3):
        before = processor_seconds()
        assert "--help" in process(*arguments).communicate()[0]
        seconds.append(processor_seconds() - before)
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "--help"],
        ["run", "quickstrat", "--out", "x"],
        ["status", "nowhere"],
        ["presets"],
        ["presets", "show", "paper"],
        ["init", "quickstart", "-o", "mine.yaml"],
        ["compare", "nosuch"],
        ["report", "nosuch"],
        ["chat", "nosuch"],
        ["baseline", "nosuch"],
        ["eval", "nosuch", "--tasks", "arc_easy"],
        ["mtbench", "nosuch"],
        ["export", "nosuch", "--to", "gguf"],
        ["push", "nosuch", "me/model"],
        ["sweep", "quickstart", "--vary", "seed", "--out", "swept"],
    ],
)
def test_help_typing_errors_and_presets_import_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    script = (
        "import sys; from qspin.cli import main\n"
        f"sys.argv = ['qspin', *{arguments!r}]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(*sorted({'torch', 'transformers', 'peft', 'datasets', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    imported = done.stdout.splitlines()[-1].split()
    # that a light one is seen where it is needed shows that the search finds what is there
    assert imported == ([] if {"--help", "nosuch"} & {*arguments} else ["yaml"])


def test_a_terminal_of_another_encoding_gets_escapes() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "qspin", "run", "--help"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "\\u03bb of the paper" in done.stdout


def test_help_names_every_option_that_people_reach_for() -> None:
    answer = call("run", "--help")
    assert answer.code == 0
    for option in (
        "data",
        "out",
        "model",
        "iterations",
        "beta",
        "lr",
        "seed",
        "format",
        "strict",
        "set",
        "dry-run",
        "json",
        "track",
    ):
        assert f"--{option} " in answer.out
    assert ANSI not in answer.out


# --- presets ---


@pytest.mark.parametrize("arguments", [["presets"], ["presets", "show", "paper"], ["init", "paper"]])
def test_presets_answer_in_well_under_a_second(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    seconds = []
    for _ in range(3):
        (tmp_path / "qspin.yaml").unlink(missing_ok=True)
        before = processor_seconds()
        command = process(*arguments)
        assert command.communicate()[1] == ""
        assert command.returncode == 0
        seconds.append(processor_seconds() - before)
    assert statistics.median(seconds) < 1.0


def test_the_presets_are_listed_on_a_narrow_terminal() -> None:
    answer = call("presets", columns=80)
    assert (answer.code, answer.err) == (0, "")
    assert ANSI not in answer.out
    assert max(map(cell_len, answer.out.splitlines())) <= 80
    names = [line.split()[0] for line in answer.out.splitlines() if re.match(r"\S+ +\d+\.\dB ", line)]
    assert sorted(names) == sorted(path.stem for path in (ROOT / "presets").glob("*.yaml"))


def test_a_preset_is_shown_as_it_is_written() -> None:
    path = ROOT / "presets" / "smollm2-135m.yaml"
    answer = call("presets", "show", "smollm2-135m")
    assert (answer.code, answer.err, answer.out) == (0, "", f"# {path}\n\n{path.read_text(encoding='utf-8')}")
    assert refusal("presets", "show", "smolm2-135m").startswith("no preset is called 'smolm2-135m'; did you mean smoll")


def test_a_configuration_is_begun_and_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    answer = call("init", "quickstart")
    said = "qspin.yaml is quickstart until you edit it; then: qspin run qspin.yaml --data FILE --out FOLDER\n"
    assert (answer.code, answer.err, answer.out) == (0, "", said)
    text = Path("qspin.yaml").read_text(encoding="utf-8")
    for line, value in (
        ("id: HuggingFaceTB/SmolLM2-135M-Instruct", f"id: {tiny}"),
        ("max_completion_tokens: 48", "max_completion_tokens: 256"),
        ("seed: 0", "seed: 5"),
    ):
        text = text.replace(f"#{line}\n", f"{value}\n")
    Path("qspin.yaml").write_text(text, encoding="utf-8")
    answer = call("run", "qspin.yaml", "--out", "out", "--dry-run")
    assert (answer.code, answer.err) == (0, "")
    tree = yaml.safe_load(answer.out.partition("\nExample ")[0])
    assert (tree["model"]["id"], tree["model"]["package"], tree["seed"]) == (str(tiny), None, 5)
    assert tree["train"]["lr"] == load_config("quickstart").train.lr


def test_a_configuration_is_never_begun_over_a_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    said = f"-o: {path} exists already; name another file, or remove it first"
    assert refusal("init", "quickstart", "-o", path) == said
    assert path.read_text() == "mine"


# --- how a command ends that can't go on ---


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_says_how_to_go_on(sent: signal.Signals, tiny: Path, tmp_path: Path) -> None:
    """One line, no traceback, and the exit code that a shell gives; test_resume.py goes on after a kill."""
    out = tmp_path / "run"
    settings = ["--set", "generation.max_new_tokens=64", "--set", "model.dtype=float32", "--set", "train.epochs=50"]
    command = process("run", "--model", tiny, "--data", HOUSE_STYLE / "train.jsonl", "--out", out, *settings)
    deadline = time.monotonic() + 120
    while not (out / "run.json").exists():
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    command.send_signal(sent)
    _, err = command.communicate(timeout=60)
    assert err == "stopped; the same command goes on from the last finished piece\n"
    assert command.returncode == 128 + sent


def test_ctrl_c_before_the_command_line_is_there_shows_no_traceback(tmp_path: Path) -> None:
    """As of one who sees a slip as soon as the command is sent off."""
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    for command in (["-m", "qspin"], [str(ROOT / "cli.py")]):
        with hearing_interrupts():
            done = subprocess.run(
                [sys.executable, *command, "presets"], capture_output=True, text=True, env=environment, check=False
            )
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_on_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "qspin.cli", "presets"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    said = "error: the disk is full where the output, temporary files or caches are written; free some space\n"
    assert (done.returncode, done.stderr) == (1, said)


@pytest.mark.skipif(os.name == "nt", reason="closed streams are a POSIX shell's")
@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-"])
def test_a_stream_that_was_closed_is_an_empty_one(closed: str) -> None:
    numbers = "[stream.fileno() for stream in (sys.stdin, sys.stdout, sys.stderr)]"
    code = f"import sys; from qspin import cli; cli._run_app = lambda: sys.exit({numbers} != [0, 1, 2]); cli.main()"
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code]
    assert subprocess.run(command, check=False).returncode == 0
