"""Evaluating: a player on the held-out rows, and the table that is written anew."""

from __future__ import annotations

import time

from qspin.adapters import load_adapter
from qspin.errors import QspinError
from qspin.evaluate import TOKENS_AT_ONCE, Evaluation, evaluate
from qspin.files import remove, write_json, write_text
from qspin.game import Game
from qspin.memory import ATTEMPTS, OutOfMemory, refusals_told
from qspin.report import summary
from qspin.run_dir import IterationDir


def measure(game: Game, folder: IterationDir, iteration: int | None) -> None:
    """Measure the player of a folder: its adapter, or whom the run starts with."""
    remove(folder.snapshots)  # a crash may have left them after the adapter that they led to
    if not folder.evaluation.is_file():
        game.model.set_adapter(load_adapter(folder.adapter) if folder.adapter.is_dir() else game.start)
        started = time.monotonic()
        result = _evaluation(game, iteration)
        game.progress.advance(0, **result.figures(game.config.evaluation.style))
        write_json(folder.evaluation, result.to_json())
        folder.add_seconds("evaluate", time.monotonic() - started)
    try:
        write_text(game.dir.summary, summary(game.dir, game.config))
    except (OSError, QspinError) as error:  # it is for show, and made again from what is kept
        game.progress.note(f"the table is not written: {error}")


def _evaluation(game: Game, iteration: int | None) -> Evaluation:
    """Of whoever is in the slot; in smaller pieces if memory does not hold them."""
    rows = game.prepared.heldout
    for attempt in range(ATTEMPTS):
        game.progress.phase("evaluate", iteration=iteration, total=2 * len(rows), done=0, unit="rows")
        try:
            with refusals_told():
                return evaluate(
                    game.model,
                    game.prepared.renderer,
                    rows,
                    game.config,
                    stop_ids=game.prepared.stop_ids,
                    width=max(1, game.width >> attempt),
                    tokens_at_once=TOKENS_AT_ONCE >> attempt,
                    on_rows=game.progress.advance,
                )
        except OutOfMemory as error:
            refusal = error
            game.progress.note(f"memory does not hold the evaluation; again in pieces half as large ({error})")
    raise QspinError(
        f"evaluate: out of memory {ATTEMPTS} times in a row ({refusal}); close other programs, set generation.width "
        "lower, or take a smaller model"
    )
