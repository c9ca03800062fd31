"""report.html: it has what a run came to, asks nothing of a network, and runs nothing that comes from data."""

from __future__ import annotations

import base64
import datetime
import hashlib
import json
import re
import resource
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from command_line import call, refusal
from conftest import small_run

from qspin import spin
from qspin.config import load_config
from qspin.figures import plots
from qspin.figures.page import SCRIPT, page
from qspin.figures.panel import Figure, auc, estimate
from qspin.figures.report import PHASES, sentences, tables
from qspin.prepare import Prepared, prepare
from qspin.run_dir import RunDir
from qspin.watch.progress import Silent

EVIL = "</script><script>alert(1)</script><img src=http://example.org/x onerror=alert(2)>&<b>"


class Elements(HTMLParser):
    """Start tags with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        self.scripts += [""] * self._in_script

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def ready(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    settings = small_run(tiny_folder("llama"), path, rows=18, aside=f" {EVIL}") | {"iterations": 2}
    return prepare(load_config(None, settings), datetime.date(2026, 1, 1))


@pytest.fixture(scope="module")
def run(ready: Prepared, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(tmp_path_factory.mktemp("runs") / "run")
    spin.run(ready, run.path, Silent())
    return run


@pytest.fixture(scope="module")
def shown(run: RunDir, ready: Prepared) -> Elements:
    return Elements(page(run, ready.config, ready.heldout_prompts))


def test_it_has_what_the_run_came_to(run: RunDir, ready: Prepared) -> None:
    text = page(run, ready.config, ready.heldout_prompts)
    for table in tables(run, ready.config):
        assert f"<h2>{table.title}</h2>" in text
    for sentence in sentences(run, ready.config):
        assert sentence.replace("'", "&#39;") in text
    for heading in (
        "NLL, nats a token",
        "Margin while training",
        "Lengths of held-out completions",
        "Where the time went",
        "The most memory held while each phase worked",
    ):
        assert heading in text
    assert ready.fingerprint in text
    assert page(run, ready.config, ready.heldout_prompts) == text, "the same run, another page"


def test_whose_length_the_cap_bounds_is_said(run: RunDir, ready: Prepared) -> None:
    """Real completions may be longer."""
    writing = tables(run, ready.config)[1]
    lengths = {row[0]: int(row[3].split()[0]) for row in writing.rows}
    assert lengths.pop("real") > ready.config.generation.max_new_tokens >= max(lengths.values())
    said = "tokens: mean length, a player's at most generation.max_new_tokens; best near the real ones'"
    assert said in writing.notes


def test_memory_by_phase_is_kept_and_shown(run: RunDir, ready: Prepared, tmp_path: Path) -> None:
    most = 1.05 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # the kernel counts both roughly
    training = next(table for table in tables(run, ready.config) if table.title == "Training")
    assert training.columns[-1].heading == "GiB"
    for folder, row in zip((run.base, run.iteration(0), run.iteration(1)), training.rows, strict=True):
        peaks = folder.peaks()
        assert set(peaks) == set(folder.seconds())
        assert all(100 * 2**20 < held <= most for held in peaks.values())
        told = [f"{peaks[phase] / 2**30:.1f}" if phase in peaks else "-" for phase in PHASES]
        assert row[-1] == " / ".join(told)
    shutil.copytree(run.path, tmp_path / "old")
    for path in (tmp_path / "old").glob("*/memory.json"):  # of a run from before they were kept
        path.unlink()
    text = page(RunDir(tmp_path / "old"), ready.config, None)
    assert "Where the time went" in text
    assert "The most memory held" not in text


def test_it_asks_nothing_of_a_network(shown: Elements) -> None:
    allowed = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    for tag, attributes in shown.found:
        assert tag not in {"link", "iframe", "img", "object", "embed", "base"}
        for name, value in attributes.items():
            assert "://" not in (value or "") or value in allowed, (tag, name)
            assert name not in {"src", "onerror", "onload"}
            assert name not in {"href", "xlink:href"} or (value or "").startswith("#")


def test_what_comes_from_data_is_text(shown: Elements, ready: Prepared) -> None:
    data, script = shown.scripts
    assert script == SCRIPT
    rows = json.loads(data)
    assert len(rows) == len(ready.heldout)
    assert [name for name, _ in rows[0]] == ["prompt", "real", "the base", "iteration 0", "iteration 1"]
    assert rows[0][0][1] == ready.heldout_prompts[0]
    assert EVIL in rows[0][0][1]
    policy = next(a["content"] for tag, a in shown.found if tag == "meta" and a.get("http-equiv"))
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in str(policy)


@pytest.mark.parametrize("text", [None, "It was"])
def test_a_run_whose_data_is_gone_or_another_is_shown_without_prompts(
    text: str | None, run: RunDir, ready: Prepared, tmp_path: Path
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    config, old, new = tmp_path / "run" / "config.yaml", Path(str(ready.config.data.source)), tmp_path / "new.jsonl"
    config.write_text(config.read_text().replace(str(old), str(new)))
    if text is not None:
        new.write_text(old.read_text().replace("It is", text))
    answer = call("report", tmp_path / "run")
    assert answer.code == 0
    [note] = answer.err.splitlines()
    reason = "no such file" if text is None else "the rows are not those that"
    assert note.startswith(f"note: without prompts, which are read from the data: {new}: {reason}")
    written = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "Without the prompts" in written
    assert "Without the prompts" not in page(run, ready.config, ready.heldout_prompts)
    rows = json.loads(Elements(written).scripts[0])
    assert [name for name, _ in rows[0]] == ["real", "the base", "iteration 0", "iteration 1"]
    answer = call("compare", tmp_path / "run", "--rows", "2", columns=300)
    assert (answer.code, "What is" in answer.out, answer.err) == (0, False, f"{note}\n")
    assert re.search(r"^ +row 1 .*\n(.*\n)* +row 2 ", answer.out, re.MULTILINE)


def test_the_command(run: RunDir, tmp_path: Path) -> None:
    answer = call("report", run.path)
    assert answer.code == 0
    assert answer.out == f"report: {run.path / 'report.html'}\n"
    assert (run.path / "report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert call("report", run.path, "--out", tmp_path / "mine.html").code == 0
    assert (tmp_path / "mine.html").is_file()
    assert refusal("report", run.path, "--out", tmp_path) == f"--out: {tmp_path} is a folder; name a file"
    record = run.record.read_bytes()
    assert refusal("report", run.path, "--out", run.record) == f"--out: {run.record} must end in .html"
    assert run.record.read_bytes() == record
    (tmp_path / "file").touch()
    told = refusal("report", run.path, "--out", tmp_path / "file" / "x.html")
    assert told == f"--out: {tmp_path / 'file'} is a file; name a folder"
    assert refusal("report", tmp_path) == f"{tmp_path}: not the folder of a run, it has no run.json"


def test_completions_side_by_side(run: RunDir, tmp_path: Path) -> None:
    answer = call("compare", run.path, "--iterations", "1,0", "--rows", "2", columns=300)
    assert answer.code == 0
    heads = next(line for line in answer.out.splitlines() if "iteration" in line)
    assert [name for name in ("the base", "iteration 0", "iteration 1") if name in heads] == [
        "the base",
        "iteration 0",
        "iteration 1",
    ]
    assert answer.out.count("What is ") == 2
    for also in ("1,0,base", "1,,0,"):
        assert call("compare", run.path, "--iterations", also, "--rows", "2", columns=300).out == answer.out
    alone = call("compare", run.path, "--iterations", "base", "--rows", "2", columns=300)
    assert (alone.code, alone.err) == (0, "")
    assert "the base" in alone.out and "iteration" not in alone.out
    kept = call("compare", run.path, columns=300).out
    assert ("iteration 0" in kept) != ("iteration 1" in kept)
    for wrong in ("7", "0,x"):
        assert refusal("compare", run.path, "--iterations", wrong).startswith("--iterations: '")
    assert refusal("compare", tmp_path) == f"{tmp_path}: not the folder of a run, it has no run.json"


def test_an_estimate_outside_of_its_interval_is_drawn() -> None:
    """An AUC's bootstrap counts a row against itself too often; and one prompt's rows are summed in another order."""
    real, generated = [row + 0.5 for row in range(32)], list(range(32))  # far apart as rows, near as a pair
    biased = estimate(auc(real, generated), range(32), seed=0)
    assert biased.low > biased.value
    rounded = Figure(0.3, 0.1 + 0.2, 0.1 + 0.2)
    panels = {"base": {"reward_auc": biased}, "0": {"reward_auc": rounded}}
    assert plots.players(panels, {"reward_auc": ("reward AUC", None)}).startswith("<svg")
    assert plots.compared({"a run": panels}, {"reward_auc": "reward AUC"}).startswith("<svg")


def test_pictures_take_their_ink_from_the_page() -> None:
    figures = {"nll": Figure(1.0, 0.5, 1.5)}
    svg = plots.players({"base": figures, "0": figures}, {"nll": ("NLL", 1.0)})
    assert svg.startswith("<svg")
    assert "currentColor" in svg
    assert plots.INK not in svg
    assert "NLL" in svg, "text stays text"
    assert not re.search(r"<(image|script)", svg)
    assert plots.players({"base": figures, "0": figures}, {"nll": ("NLL", 1.0)}) == svg
