"""A run by its command, of a tiny model: what is said to people and to programs, and what its folder holds."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
import yaml
from command_line import Played, call, contents, summary_tables
from conftest import ANSI
from rich.cells import cell_len

import qspin
from qspin import run_dir as run_dir_module
from qspin.config import load_config
from qspin.figures.evaluation import panel, read_evaluation, values
from qspin.figures.players import chosen_iteration
from qspin.files import check_folder, read_json, read_jsonl
from qspin.run_dir import RunDir

# --- what it says ---


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


# --- what its folder holds ---


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


def test_a_table_that_is_not_written_is_not_named(played: Played, tmp_path: Path) -> None:
    copy = RunDir(played.copy(tmp_path / "run"))
    copy.summary.unlink()
    copy.summary.mkdir()
    answer = played.again(out=copy.path)
    assert (answer.code, answer.err) == (0, "")
    assert f"note: the table is not written: [Errno 21] Is a directory: '{copy.path}/" in answer.out
    assert answer.out.splitlines()[-1] == f"adapter: {kept_adapter(copy)}"
    assert "table: " not in call("status", copy.path).out
    end = json.loads(played.again("--json", out=copy.path).out.splitlines()[-1])
    assert (end["adapter"], end["table"]) == (str(kept_adapter(copy)), None)


def test_an_error_is_not_a_line_of_json(played: Played) -> None:
    answer = played.again("--json", "--beta", "0.5")
    assert answer.code == 1
    assert answer.err.startswith(f"error: {played.out} is a run with other settings; ")
    assert {json.loads(line)["event"] for line in answer.out.splitlines()} == {"note"}


def test_figures_go_to_tensorboard(played: Played, tmp_path: Path) -> None:
    answer = played.again("--track", "tensorboard", out=tmp_path / "run")
    assert (answer.code, answer.err) == (0, "")
    assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents.*"))


# --- on a narrow terminal ---


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
