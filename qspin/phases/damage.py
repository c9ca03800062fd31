"""What has been damaged in a run's folder since it was written. Looked for before a run goes on.

A piece that can be made again is taken away, with what belongs to it, and is made again where the run needs it. An
adapter can be made again too, but that may take hours, and somebody may have a copy: that is the user's to decide, as
it is for run.json (record.py). What is written anew at each start (config.yaml, rejects.jsonl, status.json,
SUMMARY.md, verdict.json) is not looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from qspin.errors import NoPermission, QspinError
from qspin.figures.evaluation import is_evaluation
from qspin.files import check_file, check_folder, read_json, remove
from qspin.run_dir import IterationDir, RunDir


def take_away_damaged(run_dir: RunDir) -> list[str]:
    """Check every committed piece of a run but run.json; what was found, a sentence each.

    Raises:
        QspinError: an adapter is damaged; says what to delete. A piece may not be read, whether damaged or not.
    """
    notes = []
    for folder in run_dir.players():
        if folder.adapter.is_dir():
            check_folder(folder.adapter)
        for piece, with_it in _pieces(folder):
            if not piece.exists():  # not made yet, or gone with another
                continue
            try:
                check_folder(piece) if piece.is_dir() else check_file(piece)
                what = "is of another version of qspin" if not _readable(folder, piece) else ""
            except NoPermission:
                raise
            except QspinError:
                what = "was damaged"
            if what:
                for path in (*with_it, piece):  # in this order: what belongs to a plan must not outlive it
                    remove(path)
                notes.append(f"{piece.relative_to(run_dir.path)} {what} and is taken away; {_loss(folder, piece)}")
    return notes


def _pieces(folder: IterationDir) -> Iterator[tuple[Path, tuple[Path, ...]]]:
    """What can be made again, each with what belongs to it alone."""
    generated, scores = folder.generated(0).parent, folder.scores(0).parent
    yield folder.generation_plan, (generated,)
    yield folder.training_plan, (folder.snapshots, scores)
    for path in (*_shards(generated), *_shards(scores), *sorted(folder.snapshots.glob("step-*"))):
        yield path, ()
    shown = (folder.times, folder.memory, *sorted(folder.benchmarks.glob("*.json")))
    for path in (folder.metrics, folder.evaluation, *shown):
        yield path, ()


def _readable(folder: IterationDir, piece: Path) -> bool:
    """Whether an undamaged piece says what this version needs to know."""
    return piece != folder.evaluation or is_evaluation(read_json(piece))


def _shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.jsonl"))


def _loss(folder: IterationDir, piece: Path) -> str:
    if piece in {folder.metrics, folder.times, folder.memory} and folder.adapter.is_dir():
        return "its figures are lost, and no more than that"
    if piece.parent == folder.benchmarks:
        return "qspin eval makes it again"
    if piece.parent == folder.snapshots:
        return "training goes on from the snapshot before it, or from its beginning"
    return "it is made again where the run needs it"
