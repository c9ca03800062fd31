"""Whatever is cut short or altered in a run's folder is seen before the run goes on, and made again or named."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Notes, as_nobody

from qspin import spin
from qspin.config import load_config
from qspin.errors import NoPermission, QspinError
from qspin.exports.recipe import recorded_config
from qspin.figures.benchmarks import Outcome, Score, SetUp, keep
from qspin.files import write_json
from qspin.phases.damage import take_away_damaged
from qspin.prepare import Prepared, prepare
from qspin.record import template_date
from qspin.run_dir import RunDir
from qspin.watch.progress import Silent

PASSING = {".lock", ".holder", "status.json", "seconds.json", "memory.json", "SUMMARY.md"}
EACH_START = ["config.yaml", "rejects.jsonl", "SUMMARY.md", "verdict.json"]  # written anew, never read by a run
FLIPS, CUTS = 200, 16
LAST_STEP = 4  # that the run midway has finished in iteration 1


def taken_away(progress: Notes) -> list[str]:
    return [note for note in progress.notes if "taken away" in note]


class UntilStep(Silent):
    """Ends a run in the middle of iteration 1's training."""

    def advance(self, units: float, **figures: float) -> None:  # noqa: ARG002
        if self.training and figures.get("step") == LAST_STEP:
            raise KeyboardInterrupt

    def phase(self, name: str, *, iteration: int | None, **_: object) -> None:
        self.training = (name, iteration) == ("train", 1)


@pytest.fixture(scope="module")
def prepared(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}."} for n in range(14)]
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"prompt": ""}]))
    settings: dict[str, Any] = {
        "model.id": str(tiny_folder("llama")),
        "model.dtype": "float32",
        "data.source": str(data),
        "data.heldout_rows": 2,
        "data.max_malformed_share": 0.5,
        "lora.rank": 2,
        "generation.max_new_tokens": 6,
        "generation.width": 4,
        "generation.shard_rows": 6,
        "train.batch_size": 6,
        "train.tokens_per_micro_batch": 64,
        "train.lr": 0.01,
        "train.snapshot_minutes": 0,
        "iterations": 2,
    }
    return prepare(load_config(None, settings), datetime.date(2026, 1, 1))


@pytest.fixture(scope="module")
def finished(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished") / "run"
    spin.run(prepared, out, Silent())
    return out


@pytest.fixture(scope="module")
def midway(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped while iteration 1 trains: plans, pairs, scores and two snapshots are there."""
    out = tmp_path_factory.mktemp("midway") / "run"
    with pytest.raises(KeyboardInterrupt):
        spin.run(prepared, out, UntilStep())
    assert len(list(RunDir(out).iteration(1).snapshots.iterdir())) == 2
    return out


def results(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in PASSING]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def committed(out: Path) -> list[str]:
    """Every file that a run relies on."""
    left_out = {".lock", ".holder", "status.json", *EACH_START}
    return sorted(
        path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and path.name not in left_out
    )


def seen(out: Path, name: str) -> bool:
    """Whether a run that goes on sees that a file is damaged."""
    try:
        template_date(RunDir(out))
        notes = take_away_damaged(RunDir(out))
    except QspinError as error:
        # what it says to delete is the file or the folder that it is in
        return any(str(path) in str(error) for path in (out / name, (out / name).parent))
    return any(name.startswith(note.partition(" was damaged")[0]) for note in notes)


def damaged_copy(out: Path, name: str, data: bytes, copy: Path) -> Path:
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(out, copy, copy_function=os.link)
    (copy / name).unlink()
    (copy / name).write_bytes(data)
    return copy


def test_every_file_cut_short_is_seen(finished: Path, midway: Path, tmp_path: Path) -> None:
    files = [(finished, name) for name in committed(finished)]
    files += [(midway, name) for name in committed(midway) if "/snapshots/" in name]
    assert len(files) > 30
    for out in (finished, midway):
        assert take_away_damaged(RunDir(out)) == []  # the control: nothing is seen where nothing is
    for out, name in files:
        whole = (out / name).read_bytes()
        for part in range(CUTS):
            copy = damaged_copy(out, name, whole[: len(whole) * part // CUTS], tmp_path / "copy")
            assert seen(copy, name), f"{name} cut to {part}/{CUTS}"


def test_a_damaged_benchmark_is_taken_away_and_the_run_needs_none(finished: Path, tmp_path: Path) -> None:
    out = RunDir(tmp_path / "run")
    shutil.copytree(finished, out.path)
    set_up = SetUp("gsm8k", shots=5)
    keep(out.iteration(0), Outcome(set_up, [Score("gsm8k", "exact_match", 0.5, 0.1, 5, 2, [0, 1])], "0.4", 1.0))
    file = set_up.file(out.iteration(0))
    assert take_away_damaged(out) == []
    file.write_bytes(file.read_bytes().replace(b"0.5", b"0.9"))
    [note] = take_away_damaged(out)
    assert note == ("iteration-0/benchmarks/gsm8k,5-shot.json was damaged and is taken away; qspin eval makes it again")
    assert not file.exists()


def test_every_flipped_bit_is_seen(finished: Path, midway: Path, tmp_path: Path) -> None:
    seed = datetime.date.today().toordinal()
    chance = random.Random(seed)
    for _ in range(FLIPS):
        out = chance.choice([finished, midway])
        name = chance.choice(committed(out))
        data = bytearray((out / name).read_bytes())
        bit = chance.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
        copy = damaged_copy(out, name, bytes(data), tmp_path / "copy")
        assert seen(copy, name), f"{name}, bit {bit}, seed {seed}"


AGAIN = "it is made again where the run needs it"
FIGURES = "its figures are lost, and no more than that"
EARLIER = "training goes on from the snapshot before it, or from its beginning"


@pytest.mark.parametrize(
    ("damaged", "consequence"),
    [
        (["iteration-1/generation.json"], AGAIN),
        (["iteration-0/generated/shard-00001.jsonl"], AGAIN),  # trained on again in iteration 1
        (["iteration-1/generated/shard-00000.jsonl"], AGAIN),
        (["iteration-1/training.json"], AGAIN),
        (["iteration-1/scores/shard-00002.jsonl"], AGAIN),
        (["iteration-1/snapshots/step-000005/state.safetensors"], EARLIER),
        (
            [
                "iteration-1/snapshots/step-000004/metrics.jsonl",
                "iteration-1/snapshots/step-000005/manifest.json",
            ],
            EARLIER,
        ),
        (["base/evaluation.json"], AGAIN),
        (["iteration-0/evaluation.json"], AGAIN),
        (["iteration-0/seconds.json"], FIGURES),
        (["iteration-0/memory.json"], FIGURES),
    ],
)
def test_what_can_be_made_again_is_and_the_run_ends_in_the_same_bytes(
    damaged: list[str], consequence: str, prepared: Prepared, finished: Path, midway: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(midway, out)
    for name in damaged:
        data = bytearray((out / name).read_bytes())
        data[len(data) // 2] ^= 4
        (out / name).write_bytes(data)
    progress = Notes()
    spin.run(prepared, out, progress)
    pieces = [re.sub(r"(step-\d+)/.*", r"\1", name) for name in damaged]
    assert taken_away(progress) == [f"{piece} was damaged and is taken away; {consequence}" for piece in pieces]
    assert results(out) == results(finished)


def test_an_evaluation_of_another_version_is_made_again(prepared: Prepared, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    write_json(out / "iteration-0" / "evaluation.json", {"real_nll": [1.0], "real_tokens": [1]})
    progress = Notes()
    spin.run(prepared, out, progress)
    assert taken_away(progress) == [
        f"iteration-0/evaluation.json is of another version of qspin and is taken away; {AGAIN}"
    ]
    assert results(out) == results(finished)


def test_figures_of_a_training_that_is_over_are_lost_and_the_table_says_nothing(
    prepared: Prepared, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "iteration-0" / "metrics.jsonl").write_text("")
    progress = Notes()
    spin.run(prepared, out, progress)
    assert taken_away(progress) == [f"iteration-0/metrics.jsonl was damaged and is taken away; {FIGURES}"]
    _, _, training = (out / "SUMMARY.md").read_text().partition("## Training\n")
    margins = [line.split("|")[2].strip() for line in training.splitlines() if "| " in line]
    assert margins[-2] == "" != margins[-1]


def test_a_damaged_adapter_is_named_and_made_again_once_it_is_deleted(
    prepared: Prepared, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    weights = out / "iteration-0" / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(QspinError) as caught:
        spin.run(prepared, out, Silent())
    said = f"{weights}: missing or altered since it was written; delete {weights.parent} and run again"
    assert str(caught.value) == said
    shutil.rmtree(weights.parent)
    spin.run(prepared, out, Silent())
    assert results(out) == results(finished)


def test_an_adapter_that_is_made_again_is_measured_again(prepared: Prepared, finished: Path, tmp_path: Path) -> None:
    """Figures of the one before it stay behind where its folder alone is deleted."""
    run_dir, notes = RunDir(tmp_path / "run"), Notes()
    shutil.copytree(finished, run_dir.path)
    folder = run_dir.iteration(0)
    shutil.copy(run_dir.iteration(1).evaluation, folder.evaluation)
    set_up = SetUp("gsm8k", shots=5)
    keep(folder, Outcome(set_up, [Score("gsm8k", "exact_match", 0.5, 0.1, 5, 2, [0, 1])], "0.4", 1.0))
    shutil.rmtree(folder.adapter)
    spin.run(prepared, run_dir.path, notes)
    assert results(run_dir.path) == results(finished)
    said = "iteration-0: its adapter is made again, and so are its figures (of benchmarks by qspin eval)"
    assert said in notes.notes


def test_a_damaged_record_says_that_nothing_goes_on_from_it(prepared: Prepared, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    text = (out / "run.json").read_text()
    (out / "run.json").write_text(text.replace('"threads": 1', '"threads": 2'))
    for work in (lambda: spin.run(prepared, out, Silent()), lambda: recorded_config(RunDir(out))):
        with pytest.raises(QspinError) as caught:
            work()
        assert str(caught.value) == (
            f"{out / 'run.json'}: damaged or unreadable (it is not as it was written); it says what the run is, so "
            "nothing can go on from it: put a copy of it back, or delete "
            f"{out} (adapters in it can be used as they are)"
        )


def test_what_is_written_anew_at_each_start_is_never_relied_on(
    prepared: Prepared, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in EACH_START:
        (out / name).write_bytes(b"\xff")
    spin.run(prepared, out, Silent())
    for name in EACH_START:
        assert (out / name).read_bytes() == (finished / name).read_bytes()


def test_files_of_the_users_are_left_alone(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    mine = [out / "notes.json", out / "iteration-0" / "notes.jsonl", out / "iteration-0" / "generated" / "notes.jsonl"]
    for path in mine:
        path.write_text("mine")
    assert take_away_damaged(RunDir(out)) == []
    assert all(path.is_file() for path in mine)


def test_what_may_not_be_read_is_not_taken_away(closed: Path) -> None:
    run = RunDir(closed.parent / "run")
    piece = run.iteration(0).generation_plan
    write_json(piece, {"width": 8})
    for folder in (run.path, piece.parent):
        folder.chmod(0o777)
    piece.chmod(0)
    with as_nobody(), pytest.raises(NoPermission):
        take_away_damaged(run)
    assert piece.is_file()


class MovesAt(Silent):
    """Renames the run's folder at the n-th thing that it hears of."""

    def __init__(self, event: int, old: Path, new: Path) -> None:
        self.left, self.old, self.new = event, old, new

    def advance(self, units: float, **figures: float) -> None:  # noqa: ARG002
        self.left -= 1
        if self.left == 0:
            self.old.rename(self.new)

    def phase(self, name: str, **_: object) -> None:  # noqa: ARG002
        self.advance(0)


def test_a_folder_that_is_moved_ends_the_run_and_goes_on_from_its_new_place(
    prepared: Prepared, finished: Path, tmp_path: Path
) -> None:
    """Whatever moment it is moved at, nothing is written in its place."""
    moves = 0
    for event in itertools.count(1, 17):
        old, new = tmp_path / f"old-{event}", tmp_path / f"new-{event}"
        try:
            spin.run(prepared, old, MovesAt(event, old, new))
            break
        except QspinError as error:
            said = "was moved or deleted while the run works; the same command with its new --out goes on"
            assert str(error) == f"{old} {said}"
        assert not old.exists()
        moves += 1
        if event % 2:
            spin.run(prepared, new, Silent())
            assert results(new) == results(finished)
    assert moves > 5
