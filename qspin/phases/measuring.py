"""Evaluating: a player on the held-out rows, the tables and the verdict that are written anew, and the end of a run."""

from __future__ import annotations

from qspin.adapters import load_own
from qspin.errors import QspinError
from qspin.evaluate import TOKENS_AT_ONCE, evaluate
from qspin.figures.evaluation import Evaluation, read_evaluation, values
from qspin.figures.players import players
from qspin.figures.report import summary
from qspin.figures.verdict import conclusion, stop, verdict
from qspin.files import remove, write_json, write_text
from qspin.fitting.memory import ATTEMPTS, OutOfMemory, refusals_told
from qspin.phases.game import Game
from qspin.run_dir import IterationDir
from qspin.watch.progress import evaluation_units


def measure(game: Game, folder: IterationDir, iteration: int | None, *, opponent: IterationDir | None) -> None:
    """Measure the player of a folder: its adapter, or whom the run starts with.

    Args:
        opponent: whom it was trained against, measured before it; None for the first player.
    """
    remove(folder.snapshots)  # a crash may have left them after the adapter that they led to
    if not folder.evaluation.is_file():
        against = None if opponent is None else read_evaluation(opponent.evaluation)
        game.model.set_adapter(load_own(folder.adapter) if folder.adapter.is_dir() else game.start)
        with game.counted(folder, "evaluate"):
            result = _evaluation(game, iteration, against)
            style = game.config.evaluation.style
            game.progress.advance(0, **values(result, seed=game.config.seed, style=style))
            write_json(folder.evaluation, result.to_json())
        # a round of the baseline is no move of the game, and what is said of the last iteration ends the run
        if iteration is not None and folder == game.dir.iteration(iteration) and iteration + 1 < game.config.iterations:
            for sentence in verdict(players(game.dir, game.config), game.config):
                game.progress.note(sentence)
    try:
        write_text(game.dir.summary, summary(game.dir, game.config))
        write_json(game.dir.verdict, conclusion(players(game.dir, game.config), game.config))
    except (OSError, QspinError) as error:  # it is for show, and made again from what is kept
        game.progress.note(f"the table is not written: {error}")


def ends_before(game: Game, iteration: int) -> bool:
    """Whether the players before iteration t end the run."""
    before = [player for player in players(game.dir, game.config) if not _is_from(player.name, iteration)]
    return iteration > 0 and stop(before, game.config) is not None


def _is_from(name: str, iteration: int) -> bool:
    return name.isdigit() and int(name) >= iteration


def _evaluation(game: Game, iteration: int | None, opponent: Evaluation | None) -> Evaluation:
    """Of whoever is in the slot; in smaller pieces if memory does not hold them."""
    rows = game.prepared.heldout
    total = evaluation_units(len(rows), opponent=opponent is not None)
    warm_start = iteration is None and opponent is not None  # the base has none
    unpacked = game.unpacked()
    for attempt in range(ATTEMPTS):
        game.progress.phase("evaluate", iteration=iteration, total=total, done=0, unit="rows", warm_start=warm_start)
        try:
            with refusals_told():
                return evaluate(
                    game.model,
                    game.prepared.renderer,
                    rows,
                    game.config,
                    opponent=opponent,
                    stop_ids=game.prepared.stop_ids,
                    width=max(1, game.width >> attempt),
                    unpacked=unpacked,
                    tokens_at_once=TOKENS_AT_ONCE >> attempt,
                    on_rows=game.progress.advance,
                    crew=game.crew,
                )
        except OutOfMemory as error:
            refusal = error
            game.progress.note(f"memory does not hold the evaluation; again in pieces half as large ({error})")
    raise QspinError(
        f"evaluate: out of memory {ATTEMPTS} times in a row ({refusal}); close other programs, set generation.width "
        "lower, or take a smaller model"
    )
