"""A folder is only continued as the run that it holds: by its settings, rows, template, base and tokens; or refused."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from command_line import Played, call, contents, refusal, summary_tables
from conftest import CHATML, Notes, small_run

import qspin
from qspin.base import find_base
from qspin.config import load_config
from qspin.errors import QspinError
from qspin.files import read_json, read_jsonl, write_json
from qspin.record import check_rows, prepare_run
from qspin.run_dir import RunDir
from qspin.spin import run
from qspin.trials.loaded import Loaded
from qspin.watch.progress import Silent
from qspin.watch.status import look

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


def test_another_model_is_called_that(played: Played, tiny_folder: Callable[[str], Path]) -> None:
    answer = played.again("--model", tiny_folder("qwen2"))
    assert (answer.code, answer.err) == (
        1,
        f"error: model.id: config.json of tiny-qwen2 is not what {played.out} began with; choose another --out if it "
        "is not tiny-llama, with which that began\n",
    )


def test_who_has_lost_the_command_is_told_how_to_go_on(played: Played, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(played.out.parent)
    kept = f"{played.out.name}/config.yaml"
    said = refusal("run", "--out", played.out.name)
    assert said == (
        f"data.source is not set: give --data, or go on with the settings of {played.out.name}: "
        f"qspin run {kept} --out {played.out.name}"
    )
    said = refusal("run", played.out.name, "--out", played.out.name)
    assert said == f"{played.out.name}: a folder; a run's settings are a file in it: {kept}"
    answer = call("run", kept, "--out", played.out.name)
    assert (answer.code, answer.err) == (0, "")


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


# --- a run that made nothing ---


def test_what_only_the_base_refuses_can_be_put_right_in_the_same_folder(
    tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """A name that the base lacks, and an optimiser that the device lacks, which shows after the base has its hash."""
    settings = small_run(tiny_folder("llama"), tmp_path / "rows.jsonl", rows=18) | {"iterations": 1}
    (tmp_path / "own.jinja").write_text(CHATML)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"lora.targets": ["q_prj"], "chat.template": str(tmp_path / "own.jinja")}, "^lora.targets: "),
    ]
    if not torch.cuda.is_available():
        wrong.append(({"train.optimizer": "paged_adamw_8bit"}, "^train.optimizer: "))
    run_dir, fresh = RunDir(tmp_path / "run"), RunDir(tmp_path / "fresh")
    for changes, said in wrong:
        with pytest.raises(QspinError, match=said):
            play(settings | changes, run_dir)
        assert run_dir.record.is_file()
        assert look(run_dir).state == "stopped"
    for folder in (run_dir, fresh):
        play(settings, folder)
        assert look(folder).state == "finished"
    passing = ("status.json", "seconds.json", "memory.json", "SUMMARY.md", "verdict.json")
    ours, theirs = (
        {name: told for name, told in contents(folder.path).items() if not name.endswith(passing)}
        for folder in (run_dir, fresh)
    )
    assert ours == theirs


def test_what_was_begun_is_no_other_run(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    settings = small_run(tiny_folder("llama"), tmp_path / "rows.jsonl", rows=18) | {"lora.targets": ["q_prj"]}
    run_dir = RunDir(tmp_path / "run")
    with pytest.raises(QspinError, match=r"^lora.targets: "):
        play(settings, run_dir)
    run_dir.base.path.mkdir()
    with pytest.raises(QspinError, match="is a run with other settings"):
        play(settings | {"lora.targets": ["q_proj"]}, run_dir)


def play(settings: dict[str, Any], run_dir: RunDir) -> None:
    run(prepare_run(load_config(None, settings), run_dir, keep_rejects=True), run_dir.path, Silent())


# --- the same base, and the same tokens ---


def test_a_run_goes_on_with_the_commit_it_began_with(
    tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache, with a branch that moves between two starts of a run."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--some--base"
    for commit, architecture in (("a" * 40, "llama"), ("b" * 40, "qwen2")):
        shutil.copytree(tiny_folder(architecture), repository / "snapshots" / commit)
    branch = repository / "refs" / "main"
    branch.parent.mkdir()
    branch.write_text("a" * 40)
    settings = small_run(tmp_path, tmp_path / "rows.jsonl", rows=18) | {"model.id": "some/base", "iterations": 1}
    run_dir = RunDir(tmp_path / "run")
    run(prepare_run(load_config(None, settings), run_dir, keep_rejects=True), run_dir.path, Silent())
    adapter = (run_dir.iteration(0).adapter / "adapter_model.safetensors").read_bytes()

    branch.write_text("b" * 40)
    assert find_base(load_config(None, settings).model).revision == "b" * 40
    again = prepare_run(load_config(None, settings | {"iterations": 2}), run_dir, keep_rejects=True)
    assert again.base.revision == "a" * 40
    run(again, run_dir.path, Silent())
    assert run_dir.iteration(1).done
    assert (run_dir.iteration(0).adapter / "adapter_model.safetensors").read_bytes() == adapter
    assert Loaded.open(run_dir).speech.base.revision == "a" * 40


def test_a_base_whose_answers_end_otherwise_is_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), model)
    config = load_config(None, small_run(model, tmp_path / "rows.jsonl", rows=18) | {"iterations": 1})
    run_dir = RunDir(tmp_path / "run")
    run(prepare_run(config, run_dir, keep_rejects=True), run_dir.path, Silent())
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    with pytest.raises(QspinError, match=r"end in other tokens than when .* began \(stop_ids: \[2\] -> \[2, 7\]\)"):
        run(prepare_run(config, run_dir, keep_rejects=True), run_dir.path, Silent())


def test_other_versions_are_told(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    settings = small_run(tiny_folder("llama"), tmp_path / "rows.jsonl", rows=18) | {"iterations": 1}
    run_dir, heard = RunDir(tmp_path / "run"), Notes()

    def play() -> list[str]:
        heard.notes.clear()
        run(prepare_run(load_config(None, settings), run_dir, keep_rejects=True), run_dir.path, heard)
        return [note for note in heard.notes if "versions" in note]

    assert play() == play() == []
    record = read_json(run_dir.record)
    write_json(run_dir.record, record | {"versions": record["versions"] | {"torch": "2.0.0", "python": "3.11.0"}})
    assert play() == [
        f"other versions than when this run began (torch 2.0.0 -> {importlib.metadata.version('torch')}): what is made "
        "from here on may round otherwise"
    ]
    write_json(run_dir.record, record | {"qspin": "0.0.1"})
    assert "(qspin 0.0.1 -> " in play()[0]


def test_a_base_that_reads_the_rows_otherwise_is_refused(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), model)
    settings = small_run(model, tmp_path / "rows.jsonl", rows=18) | {"iterations": 1}
    run_dir = RunDir(tmp_path / "run")
    run(prepare_run(load_config(None, settings), run_dir, keep_rejects=True), run_dir.path, Silent())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    old = dict(tokenizer["model"])
    tokenizer["model"]["merges"] = old["merges"][:100]  # the same vocabulary, put together otherwise
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    longer = load_config(None, settings | {"iterations": 2})
    other = prepare_run(longer, run_dir, keep_rejects=True)
    for work in (lambda: run(other, run_dir.path, Silent()), lambda: check_rows(run_dir, other)):
        with pytest.raises(QspinError, match=r"model\.id: the rows are other tokens than when .* began"):
            work()

    (model / "tokenizer.json").write_text(json.dumps(tokenizer | {"model": old}))
    run(prepare_run(longer, run_dir, keep_rejects=True), run_dir.path, Silent())
    assert run_dir.iteration(1).done
