"""The players of a run that have been measured, in their order, and which iteration of them is meant."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from qspin.config import BestBy, RunConfig, load_kept
from qspin.errors import QspinError
from qspin.figures.evaluation import NEAR_HALF, Evaluation, figure, read_evaluation
from qspin.run_dir import IterationDir, RunDir

ROUND = "s"  # begins the name of a round of supervised training, the baseline


@dataclass(frozen=True, slots=True)
class Player:
    """Someone who has been measured."""

    name: str  # base, sft, the iteration's number, or s and a round's
    folder: IterationDir
    evaluation: Evaluation

    @property
    def told(self) -> str:
        return told(self.name)


def told(name: str) -> str:
    """A player's name in a sentence."""
    if name.isdigit():
        return f"iteration {name}"
    known = {"base": "the base", "sft": "the warm start"}
    return known.get(name) or f"round {name.removeprefix(ROUND)} of supervised training"


def players(run_dir: RunDir, config: RunConfig) -> list[Player]:
    """The base, a warm start, and the iterations up to the first that has not been measured."""
    folders = {"base": run_dir.base}
    folders |= {"sft": run_dir.warm_start} if config.sft.epochs else {}
    count = 0
    while run_dir.iteration(count).evaluation.is_file():
        folders[str(count)] = run_dir.iteration(count)
        count += 1
    return [
        Player(name, folder, read_evaluation(folder.evaluation))
        for name, folder in folders.items()
        if folder.evaluation.is_file()
    ]


def rivals(run_dir: RunDir) -> dict[float, list[Player]]:
    """The rounds of the supervised baseline that were measured, by their learning rate."""
    found: dict[float, list[Player]] = {}
    for rate in run_dir.supervised_rates():
        folders = (run_dir.supervised(rate, index) for index in itertools.count())
        measured = itertools.takewhile(lambda folder: folder.evaluation.is_file(), folders)
        rounds = [
            Player(f"{ROUND}{index}", folder, read_evaluation(folder.evaluation))
            for index, folder in enumerate(measured)
        ]
        found |= {rate: rounds} if rounds else {}
    return found


def best_rival(run_dir: RunDir, config: RunConfig) -> tuple[float, list[Player]] | None:
    """The rate whose chosen round is best, and its rounds; None without a baseline."""
    found = rivals(run_dir)
    if not found:
        return None
    winners = {rate: chosen(rounds, config) for rate, rounds in found.items()}
    winner = best(list(winners.values()), config)
    rate = next(rate for rate, player in winners.items() if player is winner)
    return rate, found[rate]


def loss_of(player: Player, by: BestBy, seed: int) -> float:
    """A figure on the half to choose by, as something of which less is better."""
    value = figure(player.evaluation, by, "choose", seed=seed).value
    if by in NEAR_HALF:
        return abs(value - 0.5)
    return -value if by == "f1" else value


def best(candidates: Sequence[Player], config: RunConfig) -> Player:
    """By `evaluation.best_by`, on the half to choose by; of two that are alike the one with the lower NLL.

    Players that a classifier always knows are alike in their AUC, which is common while they are far from the data.
    """

    def loss(player: Player) -> tuple[float, float]:
        return loss_of(player, config.evaluation.best_by, config.seed), loss_of(player, "nll", config.seed)

    return min(candidates, key=loss)


def kept(measured: Sequence[Player], config: RunConfig) -> Player | None:
    """The iteration that `evaluation.keep` means; None before the first."""
    iterations = [player for player in measured if player.name.isdigit()]
    return chosen(iterations, config) if iterations else None


def chosen(candidates: Sequence[Player], config: RunConfig) -> Player:
    """Of iterations, or of rounds of supervised training, the one that `evaluation.keep` means."""
    return best(candidates, config) if config.evaluation.keep == "best" else candidates[-1]


def chosen_iteration(run_dir: RunDir, wanted: str | None, option: str = "--iteration") -> int:
    """`last`, `best` or a number → a finished iteration; None is what the run's `evaluation.keep` says. `option` is
    where it was named.

    Raises:
        QspinError: the folder is not one of a run, or there is no such iteration.
    """
    run_dir.check_run()
    done = range(run_dir.iterations_done())
    if not done:
        raise QspinError(f"{run_dir.path} has no finished iteration yet; the command that began the run goes on")
    if wanted is not None and wanted not in {"last", "best", *map(str, done)}:
        finished = "0" if len(done) == 1 else f"0 to {done[-1]}"
        # the base and a warm start are finished, and not what is asked for
        wrong = "not an iteration" if wanted in {"base", "sft"} else "not finished"
        raise QspinError(f"{option}: {wanted!r} is {wrong} in {run_dir.path}; last, best or {finished} are")
    if wanted is not None and wanted.isdigit():
        return int(wanted)
    config = load_kept(run_dir.config)  # as last started: what is kept may be changed
    if (wanted or config.evaluation.keep) == "last":
        return done[-1]
    iterations = [player for player in players(run_dir, config) if player.name.isdigit()]
    return int(best(iterations, config).name)
