"""What a person types and sees: options, one-line errors, the dry run, and a whole run of a tiny model."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import itertools
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
import yaml
from conftest import CHATML, HOUSE_STYLE, ROOT, Answer, as_nobody, call, process, refusal
from rich.cells import cell_len

import qspin
from qspin import api
from qspin import run_dir as run_dir_module
from qspin.config import dump_config, load_config
from qspin.errors import NoPermission, QspinError
from qspin.figures.evaluation import panel, read_evaluation, values
from qspin.figures.players import chosen_iteration
from qspin.files import check_folder, read_json, read_jsonl, sha256_of, write_json
from qspin.run_dir import RunDir
from qspin.watch.progress import Silent

ANSI = "\x1b["


@pytest.fixture(scope="module")
def tiny(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("llama")


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


# --- one clear line ---


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
    assert line.startswith(f"error: {tmp_path / 'rows.jsonl'}: none of its 1 rows is good: 1 broken-json (line 1 is ")


def test_a_status_of_no_run(tmp_path: Path) -> None:
    assert refusal("status", tmp_path / "none") == f"{tmp_path / 'none'}: no such folder"
    (tmp_path / "thesis.tex").write_text("mine")
    assert refusal("status", tmp_path) == f"{tmp_path}: not the folder of a run, it has no run.json"


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


# --- the dry run ---


@pytest.fixture
def no_weights(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model's folder without its weights; this process can't load others either."""
    folder = tmp_path / "no-weights"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights are loaded")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    return folder


def test_a_dry_run_shows_everything_and_loads_no_weights(no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    out = no_weights.parent / "out"
    data = "presets/house-style/train.jsonl"
    options = ["--beta", "0.1,0.2,5", "--seed", "3", "--set", "train.epochs=1"]
    answer = call("run", "--model", no_weights, "--data", data, "--out", out, "--dry-run", *options)
    config = load_config(
        None,
        {
            "model.id": str(no_weights),
            "data.source": data,
            "train.beta": [0.1, 0.2, 5],
            "seed": 3,
            "train.epochs": 1,
        },
    )
    assert answer.err == ""
    assert answer.code == 0
    assert answer.out == dump_config(config) + (
        "\n"
        "Example row-1: prompt, completion, end-of-turn\n"
        "<|im_start|>user↵\n"
        "Why do acoustic guitars have a hollow body?<|im_end|>↵\n"
        "<|im_start|>assistant↵\n"
        "The hollow body of an acoustic guitar makes the sound of its strings louder.↵\n"
        "Try it: Twang a rubber band in your hand, then over an open box.<|im_end|>\n"
        "\n"
        "note: presets/house-style/train.jsonl: 192 good rows of 192, format prompt-completion\n"
        "note: presets/house-style/train.jsonl: 38 rows are held out, not the 64 of data.heldout_rows: whole prompts, "
        "and a fifth of the good rows at most\n"
        "154 training rows, 38 held out, 0 left out\n"
        "iteration 0: generate 154 completions, score 154 pairs, train 10 steps of 16 pairs (beta 0.1, lr 0.0001)\n"
        "iteration 1: generate 154 completions, score 308 pairs, train 20 steps of 16 pairs (beta 0.2, lr 0.0001)\n"
        "iteration 2: generate 154 completions, score 308 pairs, train 20 steps of 16 pairs (beta 5, lr 0.0001)\n"
    )
    assert not out.exists()


def test_the_model_without_weights_could_not_be_run(no_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dry run's proof is worth something: the same command without --dry-run needs them."""
    monkeypatch.undo()
    out = no_weights.parent / "out"
    answer = call("run", "--model", no_weights, "--data", HOUSE_STYLE / "train.jsonl", "--out", out)
    assert answer.code == 1
    assert answer.err.startswith(f"error: model.id: {no_weights} can't be loaded: ")
    assert answer.err.count("\n") == 1


ROLES = {"30;107": "prompt", "30;47": "prompt", "30;102": "completion", "30;42": "completion", "1;37;41": "end-of-turn"}


def test_a_terminal_sees_the_tokens_in_the_colours_of_their_roles(no_weights: Path) -> None:
    command: list[str | Path] = [
        "run",
        "--model",
        no_weights,
        "--data",
        HOUSE_STYLE / "train.jsonl",
        "--out",
        "x",
        "--dry-run",
    ]
    out = call(*command, FORCE_COLOR="1", TERM="xterm-256color", COLORTERM="").out
    _, _, shown = out.partition("end-of-turn\x1b[0m\n")
    shown, _, _ = shown.partition("\n\n")
    tokens = re.findall(r"\x1b\[([\d;]+)m([^\x1b]+)\x1b\[0m", shown)
    assert "".join(text for _, text in tokens) == re.sub(r"\x1b\[[\d;]+m|\n", "", shown), "every token has a colour"
    parts = [
        (role, "".join(text for _, text in part)) for role, part in itertools.groupby(tokens, lambda t: ROLES[t[0]])
    ]
    assert parts == [
        ("prompt", "<|im_start|>user↵Why do acoustic guitars have a hollow body?<|im_end|>↵<|im_start|>assistant↵"),
        (
            "completion",
            "The hollow body of an acoustic guitar makes the sound of its strings louder.↵"
            "Try it: Twang a rubber band in your hand, then over an open box.",
        ),
        ("end-of-turn", "<|im_end|>"),
    ]
    # neighbours can be told apart
    assert all(left != right for (left, _), (right, _) in itertools.pairwise(tokens))


def test_another_model_brings_nothing_of_the_presets_own(tiny: Path, tmp_path: Path) -> None:
    command: list[str | Path] = ["run", "zephyr-7b-sft", "--model", tiny, "--data", HOUSE_STYLE / "train.jsonl"]
    answer = call(*command, "--out", tmp_path / "out", "--dry-run")
    assert (answer.code, answer.err) == (0, "")
    shown = yaml.safe_load(answer.out.partition("\nExample ")[0])
    assert shown["model"]["id"] == str(tiny)
    assert [shown["model"][name] for name in ("revision", "package", "license", "gated", "architecture")] == [None] * 5
    assert shown["train"]["lr"] == 1e-5, "the rest is the preset's"


def test_a_presets_template_with_another_model_is_noted(tiny: Path, tmp_path: Path) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(CHATML + "{# own #}")
    command: list[str | Path] = ["run", "--model", tiny, "--data", HOUSE_STYLE / "train.jsonl", "--dry-run"]
    note = f"note: chat.template: {template} takes the place of the tokenizer's own template\n"
    out = call(*command, "--out", tmp_path / "out", "--set", f"chat.template={template}").out
    assert note in out
    assert "takes the place" not in call(*command, "--out", tmp_path / "out").out


def test_markup_in_data_is_inert(tiny: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"[red]{n}[/red] [/] [link=x]?", "completion": f"[bold]{n} :smile: [/nothing]"} for n in range(12)
    ]
    (tmp_path / "[blue].jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command: list[str | Path] = ["run", "--model", tiny, "--data", tmp_path / "[blue].jsonl", "--out", "x", "--dry-run"]
    answer = call(*command)
    assert (answer.code, answer.err) == (0, "")
    assert "[red]0[/red] [/] [link=x]?<|im_end|>↵\n" in answer.out
    assert "\n[bold]0 :smile: [/nothing]<|im_end|>\n" in answer.out
    assert "/[blue].jsonl: 12 good rows of 12" in answer.out.replace("\n", "")


# --- a whole run ---


@dataclass(frozen=True, slots=True)
class Played:
    """A finished run, and what it said."""

    command: list[str | Path]
    out: Path
    data: Path
    answer: Answer

    def again(self, *changes: str | Path, out: Path | None = None, columns: int = 200) -> Answer:
        return call(*self.command, "--out", out or self.out, *changes, columns=columns)

    def copy(self, path: Path) -> Path:
        return Path(shutil.copytree(self.out, path))


def contents(folder: Path) -> dict[str, str]:
    """Every file with its hash; who holds the lock is not part of a run."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in {".lock", ".holder"}]
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in files}


@pytest.fixture(scope="module")
def played(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Played]:
    folder = tmp_path_factory.mktemp("played")
    rows = [{"prompt": f"What is [red]{n}[/red]?", "completion": f"It is {7 * n}."} for n in range(24)]
    rows += [{"prompt": "", "completion": "nothing was asked"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["model.dtype=float32", "generation.max_new_tokens=8", "generation.width=8", "data.heldout_rows=4"]
    settings += ["train.batch_size=8", "train.lr=0.003", "evaluation.style='.*'", "lora.rank=4"]
    command: list[str | Path] = ["run", "--model", tiny, "--data", folder / "rows.jsonl", "--iterations", "2"]
    command += [part for setting in settings for part in ("--set", setting)]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model gains nothing from two, and loses much when the other core is busy
    yield Played(command, folder / "run", folder / "rows.jsonl", call(*command, "--out", folder / "run"))
    torch.set_num_threads(threads)


def test_a_run_ends_well_and_says_so(played: Played) -> None:
    assert played.answer.err == ""
    assert played.answer.code == 0


def test_progress_without_a_terminal_is_plain_lines(played: Played) -> None:
    assert ANSI not in played.answer.out
    finished = {
        (match[1], match[2]): match[3]
        for match in re.finditer(
            r"^(base|iteration \d \(\d of 2\)) · (\w+): (\S+) .*0 s left", played.answer.out, re.MULTILINE
        )
    }
    assert finished == {
        ("base", "evaluate"): "12/12",
        ("iteration 0 (1 of 2)", "generate"): "20/20",
        ("iteration 0 (1 of 2)", "score"): "20/20",
        ("iteration 0 (1 of 2)", "train"): "40/40",
        ("iteration 0 (1 of 2)", "evaluate"): "16/16",
        ("iteration 1 (2 of 2)", "generate"): "20/20",
        ("iteration 1 (2 of 2)", "score"): "40/40",
        ("iteration 1 (2 of 2)", "train"): "80/80",
        ("iteration 1 (2 of 2)", "evaluate"): "16/16",
    }


def test_status_of_a_finished_run(played: Played) -> None:
    answer = call("status", played.out)
    assert (answer.code, answer.err) == (0, "")
    run = RunDir(played.out)
    assert answer.out.splitlines()[:4] == [
        f"{played.out}: finished, 2 iterations",
        f"adapter: {kept_adapter(run)}",
        f"table: {run.summary}",
        "iteration 1 (2 of 2) · evaluate  " + "━" * 149 + "  16/16 rows  100%",
    ]
    figures = values(read_evaluation(run.iteration(1).evaluation), seed=0, style=None)
    assert f"NLL {figures['nll']:.3f}" in answer.out
    assert f"2-sample AUC {figures['two_sample_auc']:.2f}" in answer.out
    assert re.search(r"^  prompt      What is \[red\]\d+\[/red\]\?$", answer.out, re.MULTILINE)
    assert re.search(r"^  completion  ", answer.out, re.MULTILINE)


def test_status_imports_nothing_heavy(played: Played) -> None:
    script = (
        "import sys; from qspin.cli import main\n"
        f"sys.argv = ['qspin', 'status', {str(played.out)!r}]\n"
        "try: main()\nexcept SystemExit as stop: assert not stop.code\n"
        "print(*sorted({'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "finished" in done.stdout
    assert done.stdout.splitlines()[-1] == ""


def kept_adapter(run: RunDir) -> Path:
    return run.iteration(chosen_iteration(run, None)).adapter


def test_the_output_ends_with_the_tables_the_verdict_and_the_completions(played: Played) -> None:
    _, title, shown = played.answer.out.partition("\nHeld-out rows: likelihood, and the game")
    assert title
    table, title, completions = shown.partition("\nThe same prompts")
    assert title
    for row in [row for rows in summary_tables(played.out)[:2] for row in rows[2:]]:
        cells = [re.escape(cell) for cell in row if cell]
        assert re.search(r"^ *" + " +".join(cells) + r" *$", table, re.MULTILINE), row
    assert "2-sample AUC: how surely a classifier tells its completions from the real ones; 0.5 is the best" in table
    assert "Measured on 2 of 4 held-out rows, with 95% bootstrap intervals over prompts" in table
    run = RunDir(played.out)
    sentences = read_json(run.verdict)["sentences"]
    assert sentences[0].startswith("Few rows: 2 of 4 held out are reported")
    assert all(sentence in table for sentence in sentences)
    before, after = (read_json(folder.evaluation)["completions"] for folder in (run.base, run.iteration(1)))
    assert before != after
    asked = re.findall(r"What is \[red\]\d+\[/red\]\?", completions)
    assert len(asked) == 3, "evaluation.shown prompts, their brackets as they are"
    assert completions.splitlines()[-1] == f"adapter: {kept_adapter(run)}   table: {run.summary}"


def summary_tables(out: Path) -> list[list[list[str]]]:
    """The tables of SUMMARY.md: rows of cells, the heading and the line under it first."""
    parts = RunDir(out).summary.read_text(encoding="utf-8").split("\n## ")[1:]
    lines = ([line for line in part.splitlines() if line.startswith("|")] for part in parts)
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in table] for table in lines]


def test_the_summary_has_a_row_for_each_player(played: Played) -> None:
    run = RunDir(played.out)
    summary = run.summary.read_text(encoding="utf-8")
    assert summary.startswith(
        "# tiny-llama: 2 of 2 iterations of self-play\n\n"
        "20 training rows, 4 held out, 1 left out (rejects.jsonl).\n\n"
        "- Few rows: "
    )
    game, writing, details, changes, training = summary_tables(played.out)
    assert game[0] == ["player", "NLL", "change", "reward AUC"]
    assert writing[0] == ["player", "2-sample AUC", "token F1", "tokens", "ended", "style"]
    for table in (game, changes, training):
        assert [row[0] for row in table[2:]] == ["base", "0", "1"]
    for table in (writing, details):
        assert [row[0] for row in table[2:]] == ["base", "0", "1", "real"]
    folders = [run.base, run.iteration(0), run.iteration(1)]
    for index, folder in enumerate(folders):
        player = read_evaluation(folder.evaluation)
        rows = player.rows("report")
        assert len(rows) == 2
        nll = sum(player.real_nll[row] for row in rows) / sum(player.real_tokens[row] for row in rows)
        assert game[2 + index][1].startswith(f"{nll:.3f} [")
        assert writing[2 + index][4].startswith(f"{50 * sum(player.ended[row] for row in rows):.0f}% [")
    # a model that is trained on nothing but these answers finds them likelier with each iteration
    assert float(game[2][1].split()[0]) > float(game[3][1].split()[0]) > float(game[4][1].split()[0])
    margins = [[step["margin"] for step in read_jsonl(folder.metrics) if step["epoch"] == 1] for folder in folders[1:]]
    assert [row[1].split(" / ")[0] for row in training[2:]] == ["", *(f"{statistics.mean(m):.2f}" for m in margins)]


def test_an_iteration_is_scored_on_what_its_opponent_wrote(played: Played) -> None:
    run = RunDir(played.out)
    first, second, third = (read_evaluation(f.evaluation) for f in (run.base, run.iteration(0), run.iteration(1)))
    assert first.opponent_logps == []
    for before, after in ((first, second), (second, third)):
        assert after.opponent_logps == before.generated_logps
        assert after.opponent_real_nll == before.real_nll
        assert after.policy_logps != before.generated_logps
        assert (after.prompts, after.reported) == (before.prompts, before.reported)
    # a player finds what it samples likelier than its successor, trained to tell it from real answers, does
    assert panel(second, "report", seed=0)["kl"].value > 0


def test_the_folder_is_as_its_module_says(played: Played) -> None:
    documented, group = set(), ""
    for line in str(run_dir_module.__doc__).splitlines()[2:]:
        name = line.split()[0]
        group = group if line.startswith(" ") else name if name.endswith("/") else ""
        documented |= {group + name} if line.startswith(" ") else {name} - {group}
    assert {"run.json", "base/evaluation.json", "iteration-K/adapter/"} <= documented  # it has been understood
    documented.remove("iteration-K/snapshots/step-*/")  # while training
    documented.remove("iteration-K/benchmarks/*.json")  # by qspin eval
    documented.remove("template.jinja")  # the tokenizer's own is used
    documented -= {"supervised/status.json", "supervised/lr-R/round-K/"}  # by qspin baseline

    found = {re.sub(r"iteration-\d+", "iteration-K", name) for name in contents(played.out)}
    found = {re.sub(r"shard-\d+", "shard-*", name) for name in found}
    found = {re.sub(r"/adapter/.*", "/adapter/", name) for name in found}
    assert found - {"base/seconds.json", "base/memory.json"} == documented
    assert not list(played.out.rglob("*.partial"))


def test_the_record_says_what_the_run_is(played: Played) -> None:
    record = read_json(RunDir(played.out).record)
    assert record["qspin"] == qspin.__version__
    assert record["base"]["name"] == "tiny-llama"
    assert record["versions"]["torch"] == importlib.metadata.version("torch")
    assert record["data"]["format"] == "prompt-completion"
    assert (record["data"]["train_rows"], record["data"]["heldout_rows"], record["data"]["rejected_rows"]) == (20, 4, 1)
    [reject] = read_jsonl(RunDir(played.out).rejects)
    assert (reject["line"], reject["code"], reject["source"]) == (25, "empty-prompt", str(played.data))
    resolved = yaml.safe_load(RunDir(played.out).config.read_text(encoding="utf-8"))
    assert resolved == record["config"]
    assert resolved["generation"]["max_new_tokens"] == 8
    assert load_config(RunDir(played.out).config).model_dump(mode="json") == resolved


def test_the_adapter_is_one_of_pefts(played: Played, tiny: Path) -> None:
    adapter = RunDir(played.out).iteration(1).adapter
    check_folder(adapter)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        before = base(ids).logits
        loaded = peft.PeftModel.from_pretrained(base, adapter)
        after = loaded(ids).logits
    weights = {name: tensor for name, tensor in loaded.state_dict().items() if "lora_" in name}
    assert len(weights) == 3 * 7 * 2, "A and B of every linear layer"
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    assert all(tensor.abs().max() > 0 for tensor in weights.values()), "B has moved from zero, and was loaded"
    assert (after - before).abs().max() > 0.01


def test_the_adapters_configuration_is_the_same_everywhere(played: Played, tiny: Path) -> None:
    for iteration in (0, 1):
        path = RunDir(played.out).iteration(iteration).adapter / "adapter_config.json"
        text = path.read_text(encoding="utf-8")
        assert str(tiny.parent) not in text
        assert os.sep not in text, "no path of this machine"
        config: dict[str, Any] = json.loads(text)
        assert config["base_model_name_or_path"] == "tiny-llama"
        assert list(config) == sorted(config)
        lists = [value for value in config.values() if isinstance(value, list)]
        assert all(value == sorted(value) for value in lists)
        assert config["target_modules"] == [
            "down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj",
        ]  # fmt: skip


# --- the same folder again ---


def test_the_same_command_again_does_nothing_more(played: Played) -> None:
    before = contents(played.out)
    times = {name: (played.out / name).stat().st_mtime_ns for name in before if name.startswith(("base", "iteration"))}
    answer = played.again()
    assert (answer.code, answer.err) == (0, "")
    assert contents(played.out) == before
    assert {name: (played.out / name).stat().st_mtime_ns for name in times} == times
    assert " · " not in answer.out, "no phase"
    # what was said after each iteration is not said again, but for the last one's, which stands under the tables
    beginning, tables, rest = played.answer.out.partition("Held-out rows: ")
    first = [line for line in beginning.splitlines(keepends=True) if re.match(r"note: (/|\d+ training rows, )", line)]
    assert answer.out == "".join(first) + tables + rest


def test_another_beta_is_refused_with_the_difference(played: Played) -> None:
    before = contents(played.out)
    answer = played.again("--beta", "0.5", "--seed", "9", "--set", "train.tokens_per_micro_batch=512")
    assert answer.code == 1
    assert answer.err == (
        f"error: {played.out} is a run with other settings; choose another --out, or go on with its own:\n"
        "  train.beta: 0.1 -> 0.5\n"
        "  seed: 0 -> 9\n"
    )
    assert contents(played.out) == before


def test_settings_of_another_version_are_told_from_changed_ones(played: Played, tmp_path: Path) -> None:
    out = played.copy(tmp_path / "run")
    record = RunDir(out).record
    written = read_json(record)
    write_json(record, written | {"qspin": "9.9", "config": written["config"] | {"rebound": 3}})
    answer = played.again(out=out)
    assert answer.code == 1
    assert answer.err == (
        f"error: {record}: its settings are not those of this version of qspin ({qspin.__version__}; it was written by "
        "9.9); go on with that version, or choose another --out\n"
    )


@pytest.mark.parametrize("rate", ["0", "1", "-1e-4", "nan"])
def test_a_rate_that_is_none_is_refused_before_the_baseline_is_trained(played: Played, rate: str) -> None:
    before = contents(played.out)
    with pytest.raises(QspinError, match="--lr: a learning rate is between 0 and 1"):
        api.baseline(played.out, [1e-4, float(rate)], progress=Silent())
    answer = call("baseline", played.out, "--lr", "1e-4", "--lr", rate)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err == "error: --lr: a learning rate is between 0 and 1, as 1e-4\n"
    assert contents(played.out) == before


def test_another_data_file_is_refused(played: Played, tmp_path: Path) -> None:
    before = contents(played.out)
    other = tmp_path / "other.jsonl"
    other.write_text(played.data.read_text().replace("It is 7.", "It is 8."))
    answer = played.again("--data", other)
    assert answer.code == 1
    assert answer.err == (
        f"error: {other}: the rows are not those that {played.out} began with; "
        "choose another --out, or bring the old file back\n"
    )
    assert contents(played.out) == before


def test_the_same_rows_under_another_name_are_welcome(played: Played, tmp_path: Path) -> None:
    moved = tmp_path / "moved.jsonl"
    shutil.copy(played.data, moved)
    out = played.copy(tmp_path / "run")
    answer = played.again("--data", moved, out=out)
    assert (answer.code, answer.err) == (0, "")
    assert " · " not in answer.out


def test_the_same_template_in_another_file_is_welcome(played: Played, tmp_path: Path) -> None:
    """A preset's lies where qspin is installed, and that may move."""
    moved = tmp_path / "moved.jinja"
    moved.write_text(CHATML)
    answer = played.again("--set", f"chat.template={moved}", out=played.copy(tmp_path / "run"))
    assert (answer.code, answer.err) == (0, "")
    assert " · " not in answer.out


def test_another_template_is_refused(played: Played, tmp_path: Path) -> None:
    before = contents(played.out)
    other = tmp_path / "other.jinja"
    other.write_text(CHATML + "{# another #}")
    answer = played.again("--set", f"chat.template={other}")
    assert answer.code == 1
    assert answer.err == (
        f"error: chat.template: its content is not what {played.out} began with; choose another --out, "
        "or bring it back\n"
    )
    assert contents(played.out) == before


def test_more_iterations_go_on_where_it_ended(played: Played, tmp_path: Path) -> None:
    out = played.copy(tmp_path / "run")
    before = contents(out)
    answer = played.again("--iterations", "3", "--set", "generation.width=4", out=out)
    assert (answer.code, answer.err) == (0, "")
    after = contents(out)
    kept = [name for name in before if name.startswith(("iteration-", "base/", "run.json", "rejects"))]
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert {name.partition("/")[0] for name in after.keys() - before.keys()} == {"iteration-2"}
    assert [row[0] for row in summary_tables(out)[0][2:]] == ["base", "0", "1", "2"]
    assert set(re.findall(r"^(\S+ .*) · ", answer.out, re.MULTILINE)) == {"iteration 2 (3 of 3)"}
    # its policy starts as its opponent, and the pairs of iteration 1 are trained on again
    assert read_jsonl(RunDir(out).iteration(2).metrics)[0]["margin"] == 0
    assert "score: 40/40" in answer.out


def test_a_damaged_record_is_named(played: Played, tmp_path: Path) -> None:
    out = played.copy(tmp_path / "run")
    (out / "run.json").write_text('{"config": ')
    answer = played.again(out=out)
    assert answer.code == 1
    assert answer.err.startswith(f"error: {out / 'run.json'}: damaged or unreadable (")
    assert answer.err.count("\n") == 1


# --- for a program ---


def test_json_lines_and_nothing_else_on_stdout(played: Played, tiny: Path, tmp_path: Path) -> None:
    answer = played.again("--json", out=tmp_path / "run")
    assert answer.code == 0
    lines = [json.loads(line) for line in answer.out.splitlines()]
    phases = [(line["iteration"], line["phase"], line["total"]) for line in lines if line["event"] == "phase"]
    assert phases == [
        (None, "evaluate", 12),
        (0, "generate", 20),
        (0, "score", 20),
        (0, "train", 40),
        (0, "evaluate", 16),
        (1, "generate", 20),
        (1, "score", 40),
        (1, "train", 80),
        (1, "evaluate", 16),
    ]
    run = RunDir(tmp_path / "run")
    told = [line["figures"] for line in lines if line["event"] == "progress" and "step" in line["figures"]]
    assert told == [step for iteration in (0, 1) for step in read_jsonl(run.iteration(iteration).metrics)]
    evaluations = [line["figures"] for line in lines if "nll" in line.get("figures", {})]
    folders = [run.base, run.iteration(0), run.iteration(1)]
    assert evaluations == [values(read_evaluation(folder.evaluation), seed=0, style=".*") for folder in folders]
    samples = [line for line in lines if line["event"] == "sample"]
    assert len(samples) == 2, "one of each generation"
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    asked = [json.loads(line)["prompt"] for line in played.data.read_text().splitlines()]
    rows = {f"row-{number}": prompt for number, prompt in enumerate(asked, start=1)}
    for iteration, line in enumerate(samples):
        answers = {rows[pair["record_id"]]: pair for pair in read_jsonl(run.iteration(iteration).generated(0))}
        ids = answers[line["prompt"]]["generated_ids"]
        assert line["completion"] == tokenizer.decode(ids, skip_special_tokens=True)
    assert lines[0]["event"] == "note"
    assert {line["event"] for line in lines} == {"note", "phase", "progress", "sample", "end"}
    del lines[-1]["time"]
    assert lines[-1] == {"event": "end", "adapter": str(kept_adapter(run)), "table": str(run.summary)}
    # the table is for people
    assert "Held-out rows: what it writes" in answer.err


def test_an_error_is_not_a_line_of_json(played: Played) -> None:
    answer = played.again("--json", "--beta", "0.5")
    assert answer.code == 1
    assert answer.err.startswith(f"error: {played.out} is a run with other settings; ")
    assert {json.loads(line)["event"] for line in answer.out.splitlines()} == {"note"}


def test_figures_go_to_tensorboard(played: Played, tmp_path: Path) -> None:
    answer = played.again("--track", "tensorboard", out=tmp_path / "run")
    assert (answer.code, answer.err) == (0, "")
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


# --- where it is shown ---


def test_a_narrow_terminal_folds_and_loses_nothing(played: Played) -> None:
    answer = played.again(columns=60)
    assert answer.code == 0
    assert ANSI not in answer.out
    assert "…" not in answer.out
    _, _, shown = answer.out.partition("\nHeld-out rows: likelihood, and the game")
    assert shown
    assert max(cell_len(line) for line in shown.splitlines() if "/" not in line) <= 60  # a path may stay whole
    there = Counter("".join(shown.split()))
    main = [row for rows in summary_tables(played.out)[:2] for row in (rows[0], *rows[2:])]
    wanted = Counter("".join("".join(row) for row in main).replace(" ", ""))
    assert wanted <= there, "not a character of the table is lost"


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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_an_output_on_a_full_disk_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "qspin.cli", "presets"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    said = "error: the disk is full where the output, temporary files or caches are written; free some space\n"
    assert (done.returncode, done.stderr) == (1, said)


CLOSED = "no permission to read or write it, or to look into a folder above it"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("run quickstart --out {}/x", "--out: {}/x can't be made: no permission to write in {}"),
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
