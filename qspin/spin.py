"""The outer loop of self-play (Algorithm 1 of arXiv 2401.01335).

    prepared = prepare(config, datetime.date.today())
    run(prepared, Path("runs/mine"), progress)

Each phase is cut into pieces that are kept as they finish; called again on the same folder, the loop goes on after
the last of them and ends in the same bytes.
"""

from __future__ import annotations

from pathlib import Path

from qspin.phases.answering import answer
from qspin.phases.game import Game, under_way
from qspin.phases.learning import learn, warm_start
from qspin.phases.measuring import ends_before, measure
from qspin.prepare import Prepared
from qspin.watch.progress import Progress


def run(prepared: Prepared, out: Path, progress: Progress) -> None:
    """Play all iterations of a configuration into a folder."""
    with under_way(prepared, out, progress) as game:
        play(game)


def play(game: Game) -> None:
    """Every round in turn; a phase passes over what the folder holds already."""
    measure(game, game.dir.base, None, opponent=None)
    opponent = game.dir.base
    if game.config.sft.epochs:
        warm_start(game)
        measure(game, game.dir.warm_start, None, opponent=opponent)
        opponent = game.dir.warm_start
    asked = game.config.iterations
    if game.dir.iteration(asked).adapter.is_dir():
        game.progress.note(f"more iterations than {asked} are here from before; they stay, and count")
    for iteration in range(asked):
        if ends_before(game, iteration):  # the players are matched, or the last was a step back
            break
        folder = game.dir.iteration(iteration)
        if not folder.adapter.is_dir():
            for earlier in game.config.train.learnt_from(iteration):  # all but the last are there, unless damaged since
                answer(game, earlier)  # generate: one completion per prompt, sampled from the opponent
            learn(game, iteration)  # score both under the opponent, train against it, commit the next opponent
        measure(game, folder, iteration, opponent=opponent)  # evaluate on held-out rows
        opponent = folder
