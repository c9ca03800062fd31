"""`qspin plan`: what it shows of presets, files and this machine, and what it makes no plan for."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bench_plan import LAYERS, shaped
from command_line import call
from conftest import HOUSE_STYLE, ROOT

from qspin import api
from qspin.config import load_config
from qspin.errors import QspinError

# --- what is shown ---


def test_the_command_says_what_the_page_shows() -> None:
    page = (ROOT / "docs" / "fitting.md").read_text(encoding="utf-8")
    examples = re.findall(r"^    \$ qspin (plan .+)\n((?:(?:    .*)?\n)+)", page, re.MULTILINE)
    assert examples
    for command, shown in examples:
        answer = call(*command.split(), columns=80)
        assert answer.code == 0
        said = [line.rstrip() for line in answer.out.splitlines()]
        page_lines = [line.removeprefix("    ").rstrip() for line in shown.rstrip("\n").splitlines()]
        assert said[: len(page_lines)] == page_lines
        assert max(map(len, said)) <= 80


def test_data_that_a_configuration_names_are_said_not_to_be_read() -> None:
    said = " ".join(call("plan", "quickstart", "--vram", "8", columns=80).out.split())
    assert "is not read unless --data names it: 128 rows assumed, of 128 tokens" in said
    said = " ".join(call("plan", "qwen3-8b", "--vram", "24", columns=80).out.split())
    assert "no data given: 1000 rows assumed" in said


@pytest.mark.parametrize(
    ("setting", "gigabytes", "said"),
    [
        ("auto", 12, r"auto +11 of 32 layers recomputed"),
        ("true", 12, r"true +auto: [\d.]+ (min|h) less"),
        ("true", 4, r"true"),  # which does not fit with auto either
        ("false", 24, r"false"),  # as auto would have it
    ],
)
def test_the_command_says_what_is_recomputed(setting: str, gigabytes: int, said: str) -> None:
    changes = ("--set", f"train.gradient_checkpointing={setting}")
    shown = call("plan", "zephyr-7b-sft", "--vram", gigabytes, *changes, columns=80).out
    [line] = [line.strip() for line in shown.splitlines() if line.startswith("train.gradient_checkpointing")]
    assert re.fullmatch(rf"train\.gradient_checkpointing +{said}", line)


def test_a_narrow_terminal_breaks_no_setting() -> None:
    shown = call("plan", "zephyr-7b-sft", "--vram", "12", columns=60).out
    assert max(map(len, shown.splitlines())) <= 60
    assert "\ntrain.tokens_per_micro_batch " in shown and "\ntrain.gradient_checkpointing " in shown


# --- what is planned for ---


def test_plans_need_no_torch_and_no_network() -> None:
    script = (
        "import sys, socket\n"
        "def refuse(*_): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "from qspin.cli import main\n"
        "sys.argv = ['qspin', 'plan', 'paper', '--vram', '8']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(*sorted({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "rich"


def test_the_command_plans_for_a_folder_and_its_data(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"model:\n  id: {tiny_folder('qwen3')}\ndata:\n  heldout_rows: 4\n")
    answer = call("plan", config, "--data", HOUSE_STYLE / "train.jsonl", "--rows", "30", "--vram", "8")
    assert answer.code == 0, answer.err
    assert "Fits: " in answer.out
    assert "26 rows, in the model's own tokens" in answer.out
    answer = call("plan", config, "--data", HOUSE_STYLE / "train.jsonl", "--rows", "30000", "--vram", "8")
    said = " ".join(answer.out.split())
    assert "188 rows (30000 were asked for, and 192 are good), in the model's own tokens" in said
    shown = call("plan", "quickstart", "--model", tiny_folder("qwen3"), "--vram", "8").out
    assert shown == call("plan", "quickstart", "--set", f"model.id={tiny_folder('qwen3')}", "--vram", "8").out
    assert shown.splitlines()[0].endswith("tiny-qwen3")


def test_the_command_on_this_machine() -> None:
    answer = call("plan", "smollm2-135m")
    assert answer.code == 0, answer.err
    assert "estimated from rates measured here" in answer.out
    assert "of free memory" in answer.out


@pytest.mark.parametrize("experts", ["num_experts", "num_local_experts"])
def test_a_mixture_of_experts_is_not_planned_for(experts: str, tmp_path: Path) -> None:
    """Its experts aren't in 4 bits, so that what would be planned is a small part of what it takes."""
    config = tmp_path / "mine.yaml"
    config.write_text(f"model:\n  id: {tmp_path}\n")
    (tmp_path / "config.json").write_text(json.dumps({**shaped(LAYERS).to_dict(), experts: 0}))
    assert call("plan", config, "--vram", "8").code == 0
    (tmp_path / "config.json").write_text(json.dumps({**shaped(LAYERS).to_dict(), experts: 8}))
    answer = call("plan", config, "--vram", "8")
    assert answer.code == 1
    assert answer.err.startswith(f"error: {tmp_path}/config.json: a mixture of experts")


def test_a_shape_that_is_nowhere_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("model:\n  id: somebody/something\n")
    answer = call("plan", config, "--vram", "8")
    assert answer.code == 1
    assert answer.err.startswith(
        "error: model.architecture is not set, and model.id ('somebody/something') is no local"
    )
    assert len(answer.err.splitlines()) == 1
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    config.write_text(f"model:\n  id: {folder}\n")
    assert call("plan", config, "--vram", "8").err.startswith(f"error: {folder}/config.json: damaged or unreadable")


def test_what_no_plan_is_made_for() -> None:
    answer = call("plan", "quickstart", "--vram", "12", "--rows", 10**12)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith("error: data.limit, --rows: 1000000000000 rows are more than a plan is made for")
    for gigabytes in (float("nan"), float("inf"), -1.0, 0.5, "8"):
        with pytest.raises(QspinError, match=r"^vram=.*: name the GiB of a card, at least 1$"):
            api.plan(load_config("quickstart"), vram=gigabytes)  # type: ignore[arg-type]
