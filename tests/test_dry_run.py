"""What --dry-run shows: the settings, an example's tokens and the work; and no weights are loaded."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path

import pytest
import transformers
import yaml
from command_line import call
from conftest import CHATML, HOUSE_STYLE, ROOT

from qspin.config import dump_config, load_config


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
