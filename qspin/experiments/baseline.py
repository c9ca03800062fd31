"""The supervised baseline: what the same rows, adapter and number of steps come to without self-play.

    baseline(prepared, Path("runs/mine"), progress, rates=[1e-4, 2e-4])

A round of it stands beside each iteration: it goes on from the round before with as many steps on batches as large, and
a rate that rises and falls as the iteration's did. Rounds are measured on the same held-out rows, and the best of them
is chosen in the same way, so that neither side has more trials than the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from qspin.adapters import load_own
from qspin.config import RunConfig
from qspin.errors import QspinError
from qspin.phases.game import Game, under_way
from qspin.phases.learning import learn_alike
from qspin.phases.measuring import measure
from qspin.prepare import Prepared
from qspin.run_dir import IterationDir, RunDir
from qspin.watch.meter import Work
from qspin.watch.progress import Progress, evaluation_units


def baseline(prepared: Prepared, out: Path, progress: Progress, rates: Sequence[float]) -> None:
    """Train and measure a round for each finished iteration of a run, at each learning rate.

    Raises:
        QspinError: the run has no finished iteration, or as `spin.run`.
    """
    rounds = RunDir(out).iterations_done()
    if not rounds:
        raise QspinError(f"{out} has no finished iteration yet, so there is nothing to compare with")
    with under_way(prepared, out, progress) as game:
        first = _first_player(game)
        for rate in rates:
            _train(game, rate, rounds, first)


def _first_player(game: Game) -> IterationDir:
    """Whom the first round trains against. The run has measured it, but that may have been damaged since."""
    measure(game, game.dir.base, None, opponent=None)
    if not game.config.sft.epochs:
        return game.dir.base
    measure(game, game.dir.warm_start, None, opponent=game.dir.base)
    return game.dir.warm_start


def _train(game: Game, rate: float, rounds: int, first: IterationDir) -> None:
    start, opponent = game.opponent(0), first
    for index in range(rounds):
        folder = game.dir.supervised(rate, index)
        if not folder.adapter.is_dir():
            learn_alike(game, folder, index, lr=rate, start=start)
        measure(game, folder, index, opponent=opponent)
        start, opponent = load_own(folder.adapter), folder


def workload(run_dir: RunDir, config: RunConfig, rates: Sequence[float], train_rows: int, heldout: int) -> list[Work]:
    """As meter.workload: every phase of the rounds, in order."""
    work = []
    for rate in rates:
        for index in range(run_dir.iterations_done()):
            folder = run_dir.supervised(rate, index)
            rows = train_rows * config.train.epochs * len(config.train.learnt_from(index))
            evaluated = evaluation_units(heldout, opponent=True)
            work += [Work(folder, "train", index, rows), Work(folder, "evaluate", index, evaluated)]
    return work
