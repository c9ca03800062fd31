"""Evaluating: a player on the held-out rows, and the table that is written anew."""

from __future__ import annotations

import time

from qspin.evaluate import evaluate
from qspin.files import write_json, write_text
from qspin.game import Game
from qspin.model import load_adapter
from qspin.report import summary
from qspin.run_dir import IterationDir


def measure(game: Game, folder: IterationDir, iteration: int | None) -> None:
    """Measure the player of a folder: its adapter, or whom the run starts with."""
    if not folder.evaluation.is_file():
        game.model.set_adapter(load_adapter(folder.adapter) if folder.adapter.is_dir() else game.start)
        rows = game.prepared.heldout
        game.progress.phase("evaluate", iteration=iteration, total=2 * len(rows), done=0, unit="rows")
        started = time.monotonic()
        result = evaluate(
            game.model,
            game.prepared.renderer,
            rows,
            game.config,
            stop_ids=game.prepared.stop_ids,
            width=game.width,
            on_rows=game.progress.advance,
        )
        game.progress.advance(0, **result.figures(game.config.evaluation.style))
        write_json(folder.evaluation, result.to_json())
        folder.add_seconds("evaluate", time.monotonic() - started)
    write_text(game.dir.summary, summary(game.dir, game.config))
