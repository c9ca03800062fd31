"""Figures in README and docs are those of the committed results."""

from __future__ import annotations

import ast
import importlib
import json
import re
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import costs
import gpu_cases
import pytest
import table
import turns
from conftest import ROOT

from qspin.config import load_config
from qspin.errors import QspinError
from qspin.figures.panel import Figure
from qspin.fitting.shape import read_shape

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("*.json"))


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md"])
def test_tables_of_speed_are_the_results(page: str) -> None:
    shown = table.table()
    assert len(shown.splitlines()) == 10
    assert shown in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("case", [*gpu_cases.CASES.values(), *gpu_cases.PEERS.values()], ids=lambda case: case.model)
def test_a_model_made_for_a_gpu_has_the_shape_of_a_real_one(case: gpu_cases.Case | gpu_cases.Peer) -> None:
    shape = load_config(gpu_cases.MODELS[case.model]).model.architecture
    assert shape is not None
    assert read_shape(gpu_cases.model_config(shape).to_dict(), case.model) == shape


def test_a_model_that_a_disk_has_no_room_for_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=19 * 10**9))
    folder = tmp_path / "models" / "gemma-2-9b"
    with pytest.raises(QspinError, match=re.escape(f"{folder}: 19 GB are needed there, and 19 are free")):
        gpu_cases.make_model(folder.name, folder)
    assert not list(folder.parent.iterdir())


def test_cases_without_a_model_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def make(name: str, folder: Path) -> float:
        if name == "gemma-2-9b":
            raise QspinError("no room")
        folder.mkdir()
        return 7.0

    monkeypatch.setattr(gpu_cases, "make_model", make)
    (tmp_path / "qwen3-8b").mkdir()
    names = ["qspin", "qspin, rank 8", "qspin, Gemma 2 9B", "qspin, Qwen3 8B"]
    there = gpu_cases.with_models({name: gpu_cases.CASES[name] for name in names}, tmp_path)
    assert list(there) == ["qspin", "qspin, rank 8", "qspin, Qwen3 8B"]
    assert capsys.readouterr().out == "making mistral-7b: 7 s\nno room\n"


def test_what_loads_side_by_side_is_timed_in_turn(tmp_path: Path) -> None:
    """A process that ends before it was ready is waited for by none."""
    log = tmp_path / "log"
    body = """
import sys, time
from pathlib import Path
from turns import wait_for_turn
name, turn, log = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
def say(word):
    with log.open("a") as file: file.write(f"{word} {name}\\n")
say("load")
if name == "fails": sys.exit("no memory")
for piece in range(2):
    wait_for_turn(turn)
    say("begin")
    time.sleep(0.2)
    say("end")
"""

    def measure(name: str, turn: Path) -> int:
        command = [sys.executable, "-c", body, name, str(turn), str(log)]
        return subprocess.run(command, cwd=ROOT / "benchmarks", timeout=60, check=False).returncode

    names = ["b", "fails", "a"]
    files = {name: tmp_path / f"{name}.turn" for name in names}
    for turn in files.values():
        turn.touch()  # of a run before this one
        turns.take_back(turn)
    with ThreadPoolExecutor(len(names)) as pool:
        ended = {turn: pool.submit(measure, name, turn) for name, turn in files.items()}
        turns.give_turns(ended)
    assert [future.result() for future in ended.values()] == [0, 1, 0]
    lines = log.read_text().splitlines()
    assert sorted(lines[:3]) == ["load a", "load b", "load fails"]
    assert lines[3:] == ["begin b", "end b"] * 2 + ["begin a", "end a"] * 2


def test_the_readme_shows_the_gpu_too() -> None:
    assert table.gpu() in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "page"),
    [
        ("parts", "performance"),
        ("busy", "performance"),
        ("growth", "performance"),
        ("exports", "exporting"),
        ("planned_memory", "fitting"),
        ("planned_seconds", "fitting"),
        ("fp32", "performance"),
        ("gpu", "performance"),
        ("gpu_peers", "performance"),
        ("gpu_memory", "fitting"),
        ("gpu_counted", "fitting"),
    ],
)
def test_the_other_tables_are_the_results(name: str, page: str) -> None:
    shown: str = getattr(table, name)()
    assert len(shown.splitlines()) > 5
    assert shown in (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


def test_a_peer_that_ran_out_of_memory_or_time_is_no_rival() -> None:
    cases = json.loads((ROOT / "benchmarks" / "results" / "gpu-cuda.json").read_text())["cases"]
    found = table.settings(cases)
    for name in [name for name, case in cases.items() if case in found.values()]:
        cases[name] |= {"measured": {"oom": True}}
        assert len(table.settings(cases)) == len(found) - 1
        cases[name] |= {"measured": {"error": "not done after 200 s"}}
        found = table.settings(cases)
    assert not found


def test_the_exact_export_is_the_trained_model_token_for_token() -> None:
    """What the page says of the embedded model's quickstart run."""
    result = json.loads((ROOT / "benchmarks" / "results" / "export-cpu.json").read_text())
    exact = {(row["export"], row["dtype"]): row for row in result["exports"] if row["dtype"] in {"float32", "f32"}}
    for kind in (("merged-16bit", "float32"), ("gguf", "f32")):
        assert exact[kind]["onto"] == "dequantised"
        assert exact[kind]["same"] == result["prompts"] == 20
    assert exact["gguf", "f32"]["llama_cpp_same"] == 20
    assert {row["export"] for row in result["exports"]} >= {"adapter", "merged-16bit", "merged-4bit", "gguf", "ollama"}


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_say_when_where_and_how(path: Path) -> None:
    result = json.loads(path.read_text())
    assert re.fullmatch(r"20\d\d-\d\d-\d\d", result["date"])
    assert result["machine"]["cpu"]
    assert {"python", "torch", "transformers", "trl"} <= set(result["versions"])
    assert re.fullmatch(r"python benchmarks/bench_\w+\.py( [\w.,-]+)*", result["command"])
    assert (ROOT / result["command"].split()[1]).is_file()
    assert result["ratio"] > 0
    assert result["ratio_means"]


def test_the_readmes_words_on_fp32_are_the_results() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "train-fp32-cpu.json").read_text())
    [memory] = result["derived"].values()
    assert f"trains {result['ratio']:.1f} times as fast as the faster TRL" in (ROOT / "README.md").read_text()
    assert round(memory) == 5  # "in a fifth of its memory above the loaded model"


def test_tables_of_experiments_are_what_the_runs_wrote() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    for name, count in (("beta", 10), ("loss", 10), ("rank", 10), ("temperature", 6), ("rows", 6), ("rate", 8)):
        written = (ROOT / "docs" / "experiments" / f"{name}.md").read_text(encoding="utf-8")
        rows = [line for line in written.splitlines() if line.startswith("|")]
        assert len(rows) == count
        assert "\n".join(rows) in page
    for seed in (0, 1, 2):
        written = (ROOT / "docs" / "experiments" / f"sft-seed-{seed}.md").read_text(encoding="utf-8")
        likelihood, changes = (
            written.partition(f"## {title}\n\n")[2].partition("\n\n")[0].splitlines()
            for title in ("Held-out rows: likelihood, and the game", "Changes against the base, on the same rows")
        )
        rounds = {f"s{number}": f"supervised, as long as iteration {number}" for number in (0, 1) if seed}
        for player, name in ({"0": "iteration 0", "1": "iteration 1"} | rounds).items():
            [nll] = [line.split(" | ")[2] for line in likelihood if line.startswith(f"| {player} |")]
            [others] = [line.split(" | ")[1:3] for line in changes if line.startswith(f"| {player} |")]
            assert f"| {seed} | {name} | {nll} | {' | '.join(others)} |" in page
    for name in ("two-iterations", "two-turns", "rows-1024", "damaged", "warm-start-4", "qwen-0.5b"):
        written = (ROOT / "docs" / "experiments" / f"{name}.md").read_text(encoding="utf-8")
        for title in ("Held-out rows: likelihood, and the game", "Held-out rows: what it writes"):
            assert written.partition(f"## {title}\n\n")[2].partition("\n\n")[0] in page
    summary = (ROOT / "docs" / "experiments" / "baseline.md").read_text(encoding="utf-8")
    rates = summary.partition("## Supervised training, by rate\n\n")[2].partition("\n\n")[0]
    assert len(rates.splitlines()) == 5
    assert rates in page


def test_the_table_of_more_held_out_rows_is_what_was_measured() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "docs" / "experiments" / "heldout.json").read_text(encoding="utf-8"))
    assert result["rows"] == 640
    base = {name: Figure(*values) for name, values in result["players"].pop("base")["figures"].items()}
    nll, auc, f1 = (base[name].told(".3f") for name in ("nll", "two_sample_auc", "f1"))
    assert f"NLL {nll}, two-sample AUC {auc}, F1 {f1}," in " ".join(page.split())
    assert {name.split("/")[1] for name in result["players"]} == {"seed=0", "seed=1", "seed=2"}
    for name, player in result["players"].items():
        change = {key: Figure(*values) for key, values in player["changes"]["base"].items()}
        if "iteration" in name:  # what the page says of all of them
            assert change["nll"].high < 0
            assert change["two_sample_auc"].high < 0
            assert change["f1"].low > 0
        changes = " | ".join(change[key].told("+.3f") for key in ("nll", "two_sample_auc", "f1"))
        who = "iteration 1" if "iteration" in name else "supervised, as long"
        tokens = Figure(*player["figures"]["tokens"]).told(".0f")
        assert f"| {name.split('seed=')[1][0]} | {who} | {changes} | {tokens} |" in page


def test_another_model_on_more_rows_is_what_was_measured() -> None:
    page = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    named = "nll", "two_sample_auc", "f1"
    leads = []
    for seed in range(3):
        file = ROOT / "docs" / "experiments" / f"heldout-qwen-{seed}.json"
        result = json.loads(file.read_text(encoding="utf-8"))
        assert result["rows"] == 400
        base, played, trained = result["players"].values()
        nll, auc, f1 = (Figure(*base["figures"][name]).told(".3f") for name in named)
        assert f"Untouched: NLL {nll}, two-sample AUC {auc}, F1 {f1};" in " ".join(page.split())
        for player, name in ((played, "iteration 0"), (trained, "supervised, as long")):
            changes = [Figure(*player["changes"]["base"][key]) for key in named]
            assert changes[0].high < 0 and changes[1].high < 0 and changes[2].low > 0
            told = " | ".join(figure.told("+.3f") for figure in changes)
            assert f"| {seed} | {name} | {told} | {Figure(*player['figures']['tokens']).told('.0f')} |" in page
        [first] = [name for name in trained["changes"] if name != "base"]
        against = [Figure(*trained["changes"][first][name]) for name in named]
        assert f"| {seed} | {' | '.join(figure.told('+.3f') for figure in against)} |" in page
        assert against[0].high < 0 < against[1].high
        assert against[2].value < 0
        leads.append(against[2].high < 0)
    assert leads == [True, False, True]


def test_the_benchmark_on_the_page_is_what_was_computed() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    result = json.loads((ROOT / "docs" / "experiments" / "gsm8k.json").read_text(encoding="utf-8"))
    [[base], [player]] = (result[name]["scores"] for name in ("base", "1"))
    told = "  ".join(f"{score['value']:.3f} ±{score['error']:.3f}" for score in (base, player))
    change = [after - before for before, after in zip(base["values"], player["values"], strict=True)]
    error = statistics.stdev(change) / len(change) ** 0.5
    assert f"400  {told}  {statistics.fmean(change):+.3f} ±{error:.3f}" in page
    assert (sum(base["values"]), sum(player["values"]), len(change)) == (6, 7, 400)


def test_there_are_results() -> None:
    assert {path.stem for path in RESULTS} >= {
        "train-cpu",
        "generate-cpu",
        "iteration-cpu",
        "attention-cpu",
        "parts-cpu",
        "busy-cpu",
        "export-cpu",
        "plan-cpu",
        "gpu-cuda",
    }


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_a_benchmark_takes_of_qspin_is_there(path: Path) -> None:
    """They run rarely, so what was moved would be missed late."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("qspin"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{node.module}.{alias.name}"


def test_costs_are_those_of_the_planner() -> None:
    assert costs.table() in (ROOT / "README.md").read_text(encoding="utf-8"), "python tools/costs.py makes it anew"
