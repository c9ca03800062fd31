"""A grid of runs over any settings, in one table and one plot.

    cells = grid("smollm2-135m", {"data.source": "mine.jsonl"}, {"train.beta": [0.01, 0.1, 1]})
    for cell in cells:
        play_cell(cell, prepared, Path("sweeps/beta"), cells, progress)
    write_results(Path("sweeps/beta"), cells)

A run whose settings differ from an earlier one's in training alone, supervised or by self-play, takes over what that
does not change: how the base measures, the warm start if both train it alike, and, where both begin with the same
opponent, iteration 0's completions and their scores. Each run is one like any other, in a folder of its own.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qspin.config import RunConfig, changed_results, dump_config, load_config
from qspin.errors import QspinError
from qspin.figures import plots
from qspin.figures.evaluation import panel
from qspin.figures.players import kept, players
from qspin.figures.report import GAME, WRITING, Column, Results, markdown
from qspin.files import MANIFEST, check_folder, commit_folder, copy_file, read_json, write_text
from qspin.phases.game import Game, under_way
from qspin.prepare import Prepared
from qspin.run_dir import IterationDir, RunDir
from qspin.safe_text import check_name
from qspin.spin import play
from qspin.watch.progress import Progress

TABLE, PLOT = "SWEEP.md", "sweep.svg"
PLOTTED = {"nll": "NLL, nats a token", "two_sample_auc": "2-sample AUC (0.5 is the best)"}
PLAYER = Column(
    "player",
    "base: what the run began with; sft: after a supervised warm start; a number: what that iteration ended with; "
    "*: the one that is kept",
)
# settings of `train` that a warm start does not hang on
OF_SELF_PLAY = {"loss", "beta", "sft_weight", "lr", "epochs", "mix_previous", "max_real_logp_drop", "snapshot_minutes"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a sweep."""

    name: str  # of its folder
    settings: dict[str, Any]  # what is varied, as asked for
    config: RunConfig

    def run_dir(self, out: Path) -> RunDir:
        return RunDir(out / self.name)


def grid(source: str | Path | None, overrides: Mapping[str, Any], varied: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """Every combination, the last setting varying fastest, each checked before anything is computed.

    Raises:
        QspinError: nothing is varied; a combination is no configuration; two of them would have one folder.
    """
    if not isinstance(varied, Mapping) or not varied or not all(map(_a_list, varied, varied.values())):
        raise QspinError("--vary: a sweep varies settings, each over a list: --vary train.beta=0.1,1")
    short = _short(varied)
    cells = []
    for values in itertools.product(*varied.values()):
        settings = dict(zip(varied, values, strict=True))
        name = "_".join(f"{short[key]}={_in_a_name(value)}" for key, value in settings.items())
        check_name(name, "--vary")
        cells.append(Cell(name, settings, load_config(source, {**overrides, **settings})))
    if len({cell.name for cell in cells}) < len(cells):
        raise QspinError("--vary: two combinations would have one folder's name; give values that differ in letters")
    if len({dump_config(cell.config) for cell in cells}) < len(cells):
        raise QspinError("--vary: two combinations are the same, so that a run would be played twice")
    return cells


def _a_list(key: object, values: object) -> bool:
    return isinstance(key, str) and isinstance(values, list | tuple) and len(values) > 0


def _short(keys: Collection[str]) -> dict[str, str]:
    """Settings without their groups, unless two would be called the same."""
    short = {key: key.rpartition(".")[2] for key in keys}
    return short if len(set(short.values())) == len(short) else {key: key for key in keys}


def _in_a_name(value: Any) -> str:
    return re.sub(r"[^\w.+-]+", "-", str(value)).strip("-")


def as_begun(cells: Sequence[Cell], out: Path) -> list[Cell]:
    """The same, a cell that an earlier command played under another name by that name: 0.001 may be spelled 1e-3."""
    begun = {}
    for record in sorted(out.glob("*/run.json")):
        with contextlib.suppress(QspinError):  # what can't be read is told of where it is to be played
            begun[record.parent.name] = read_json(record)["config"]

    def named(cell: Cell) -> Cell:
        config = cell.config.model_dump(mode="json")
        same = (name for name, theirs in begun.items() if theirs == config)
        return cell if cell.name in begun else replace(cell, name=next(same, cell.name))

    return [named(cell) for cell in cells]


def play_cell(cell: Cell, prepared: Prepared, out: Path, cells: Sequence[Cell], progress: Progress) -> None:
    """Play one run, or go on with it."""
    with under_way(prepared, cell.run_dir(out).path, progress) as game:
        for other in itertools.takewhile(lambda earlier: earlier is not cell, cells):
            _take_over(game, other, other.run_dir(out))
        play(game)


def _take_over(game: Game, other: Cell, source: RunDir) -> None:
    """Pieces of another run that are the same in this one, unless they are here already."""
    if not source.record.is_file() or not _same_but_for_training(game, other, source):
        return
    for piece in ("evaluation", "times", "memory"):
        _copy(getattr(source.base, piece), getattr(game.dir.base, piece))
    if _warm_start(game.config) != _warm_start(other.config):
        return
    if game.config.sft.epochs and not _take_over_warm_start(game.dir.warm_start, source.warm_start):
        return
    first, ours = source.iteration(0), game.dir.iteration(0)
    _copy_under_a_plan(first.generation_plan, ours.generation_plan, first.generated(0), ours.generated(0))
    train, theirs = game.config.train, other.config.train
    if (train.batch_size, train.tokens_per_micro_batch) == (theirs.batch_size, theirs.tokens_per_micro_batch):
        _copy_under_a_plan(first.training_plan, ours.training_plan, first.scores(0), ours.scores(0))


def _same_but_for_training(game: Game, other: Cell, source: RunDir) -> bool:
    changed = {key for key, _, _ in changed_results(other.config, game.config)}
    if not all(key.startswith(("train.", "sft.")) for key in changed):
        return False
    ours, theirs = game.dir.read_record(), source.read_record()
    alike = ("base", "data", "inputs", "template_date", "threads", "backend", "base_hash", "versions")
    return all(ours.get(key) == theirs.get(key) for key in alike)


def _warm_start(config: RunConfig) -> Any:
    """What the first opponent hangs on, beside what `_same_but_for_training` compares."""
    return config.sft.epochs and (config.sft, config.train.model_dump(exclude=OF_SELF_PLAY))


def _take_over_warm_start(ours: IterationDir, theirs: IterationDir) -> bool:
    """Whether it is theirs now, to the byte. One that was trained here may have been rounded otherwise.

    Raises:
        QspinError: their adapter is not as it was written.
    """
    if not theirs.adapter.is_dir():
        return False
    check_folder(theirs.adapter)
    files = read_json(theirs.adapter / MANIFEST)
    if not ours.adapter.is_dir():
        for piece in ("training_plan", "metrics"):
            _copy(getattr(theirs, piece), getattr(ours, piece))
        with commit_folder(ours.adapter, need=sum(entry["bytes"] for entry in files.values())) as temporary:
            for name in files:
                copy_file(theirs.adapter / name, temporary / name)
    if read_json(ours.adapter / MANIFEST) != files:
        return False
    for piece in ("evaluation", "times", "memory"):
        _copy(getattr(theirs, piece), getattr(ours, piece))
    return True


def _copy_under_a_plan(plan: Path, our_plan: Path, shard: Path, our_shard: Path) -> None:
    """The plan, unless there is one here, and shards that are of the same plan.

    A plan comes before what belongs to it; what a crash leaves half copied is found damaged and made again.
    """
    if not plan.is_file():
        return
    _copy(plan, our_plan)
    if read_json(plan) == read_json(our_plan):
        for path in sorted(shard.parent.glob("shard-*.jsonl")):
            _copy(path, our_shard.parent / path.name)


def _copy(path: Path, copy: Path) -> None:
    if path.is_file() and not copy.exists():
        copy_file(path, copy)


# --- results


def results(out: Path, cells: Sequence[Cell]) -> Results:
    """A row for the base and each iteration of every run; the iteration that a run keeps has a star."""
    fields = [field for field in (*GAME, *WRITING) if field[0] != "ended"]
    rows = []
    for cell in cells:
        measured = players(cell.run_dir(out), cell.config)
        chosen = kept(measured, cell.config)
        for player in measured:
            figures = panel(player.evaluation, "report", seed=cell.config.seed)
            told = [look(figures[name]) if name in figures else "" for name, look, _ in fields]
            values = [str(value) for value in cell.settings.values()]
            rows.append([*values, f"{player.name}{'*' if player is chosen else ''}", *told])
    varied = [Column(name, f"{key}, varied") for key, name in _short(cells[0].settings).items()]
    return Results("Runs", (*varied, PLAYER, *(column for _, _, column in fields)), rows)


def numbered(table: Results, cells: Sequence[Cell]) -> tuple[Results, list[str]]:
    """The same with a run's number in place of its settings, and which those are, where a terminal is too narrow for
    their names and values."""
    values = [tuple(map(str, cell.settings.values())) for cell in cells]
    varied = len(values[0])
    rows = [[str(values.index(tuple(row[:varied])) + 1), *row[varied:]] for row in table.rows]
    runs = [
        f"run {number}: {', '.join(f'{key}={value}' for key, value in cell.settings.items())}"
        for number, cell in enumerate(cells, start=1)
    ]
    columns = (Column("run", "by its number"), *table.columns[varied:])
    return replace(table, columns=columns, rows=rows), runs


def write_results(out: Path, cells: Sequence[Cell]) -> None:
    """SWEEP.md and sweep.svg, of what there is so far."""
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / TABLE, f"# Sweep\n\n{markdown(results(out, cells))}\n\n![NLL and 2-sample AUC]({PLOT})\n")
    measured = {cell.name: players(cell.run_dir(out), cell.config) for cell in cells}
    panels = {
        cell.name: {who.name: panel(who.evaluation, "report", seed=cell.config.seed) for who in measured[cell.name]}
        for cell in cells
        if measured[cell.name]
    }
    write_text(out / PLOT, plots.compared(panels, PLOTTED))
