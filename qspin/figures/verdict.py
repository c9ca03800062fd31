"""What happened in a run, in sentences, and whether it goes on. Pure functions of the players that were measured.

Whether an iteration is played follows from the evaluations before it and from nothing else, so a run that was killed
ends where it would have ended. The decision is made on the half of the held-out rows to choose by; what is said of the
players is what the reported half shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from qspin.config import RunConfig, at_iteration
from qspin.figures.evaluation import NEAR_HALF, Evaluation, Half, change, figure, panel
from qspin.figures.panel import Figure
from qspin.figures.players import Player, best, kept, loss_of

Stop = Literal["matched", "worse"]

RATED = {"nll": "NLL", "two_sample_auc": "two-sample AUC", "f1": "token F1"}
# Changes of one sign in all of n prompts, which no percentile interval of theirs goes beyond, come by chance alone in
# 2^(1 - n) of all cases: with fewer than seven prompts that is more than the 1 in 60 that is left to each of RATED.
FEWEST_PROMPTS = 7
FEW_PROMPTS = 30  # below, a percentile interval is narrower than it says, and no run stops by it
MATCHED = 0.05  # an AUC's interval that shows a match is at most this to either side
# Rules of thumb, not measured: nats a token from the opponent that a step is called large or small by, how far from
# 0.5 a two-sample AUC is plain to see, and what share of the real length is short.
LARGE_STEP, SMALL_STEP, PLAIN, SHORT = 0.5, 0.02, 0.05, 0.75


def stop(measured: Sequence[Player], config: RunConfig) -> Stop | None:
    """Why no iteration follows these players, if none does under `evaluation.stop: auto`.

    matched: the reward's AUC and the two-sample AUC hold 0.5 in narrow intervals, which is where SPIN ends (theorem
    5.2 of arXiv 2401.01335). worse: the last player is worse than the best before it in some figure of RATED beyond
    noise, and better in none. Fewer prompts than FEW_PROMPTS stop no run.
    """
    *earlier, last = measured
    few = len(last.evaluation.prompts_of("choose")) < FEW_PROMPTS
    if config.evaluation.stop == "never" or not last.name.isdigit() or few:
        return None
    if _matched(
        *(figure(last.evaluation, name, "choose", seed=config.seed) for name in ("reward_auc", "two_sample_auc"))
    ):
        return "matched"
    better, worse = _moved(best(earlier, config).evaluation, last.evaluation, "choose", config.seed)
    return "worse" if worse and not better else None


def verdict(measured: Sequence[Player], config: RunConfig) -> list[str]:
    """Sentences on the last player; none on the first, which has nobody to be compared with."""
    if len(measured) < 2:
        return []
    before, last = measured[-2:]
    figures = panel(last.evaluation, "report", seed=config.seed)
    moved = _moved(before.evaluation, last.evaluation, "report", config.seed)
    said = [*_few_rows(last.evaluation), _comparison(before, last, *moved)]
    said += _causes(before, last, figures, moved, config)
    said += _choice(measured, config)
    return said


def against(player: Player, rival: Player, config: RunConfig) -> str:
    """A sentence on the iteration that is kept, beside the best round of supervised training."""
    return _comparison(rival, player, *_moved(rival.evaluation, player.evaluation, "report", config.seed))


def conclusion(measured: Sequence[Player], config: RunConfig) -> dict[str, Any]:
    """verdict.json: for programs, and for `qspin status`."""
    chosen = kept(measured, config)
    return {
        "iterations": sum(player.name.isdigit() for player in measured),
        "stop": stop(measured, config),
        "kept": None if chosen is None else int(chosen.name),
        "sentences": verdict(measured, config),
    }


def _few_rows(player: Evaluation) -> Iterator[str]:
    rows, prompts = len(player.rows("report")), len(player.prompts_of("report"))
    if prompts < FEW_PROMPTS:
        of = f" with {prompts} different prompts" if prompts < rows else ""
        chance = "most differences here may be chance"
        if prompts < FEWEST_PROMPTS:
            chance = "no difference here can be told from chance"
        yield (
            f"Few rows: {rows} of {len(player.prompts)} held out are reported{of}, so {chance}, and the run does not "
            "stop by them; set data.heldout_rows to 128 or more."
        )
    halves: tuple[tuple[Half, str], ...] = (("choose", "those to choose by"), ("report", "the reported ones"))
    alone = [told for half, told in halves if len(player.prompts_of(half)) == 1]
    if alone:
        yield (
            f"One prompt: among the held-out rows, of {' and of '.join(alone)} there is no other, so no classifier was "
            "trained on them, and their AUCs of 0.5 mean nothing."
        )


def _comparison(before: Player, last: Player, better: dict[str, Figure], worse: dict[str, Figure]) -> str:
    def listed(changes: dict[str, Figure]) -> str:
        return ", ".join(f"{RATED[name]} ({found.told('+.3f')})" for name, found in changes.items())

    found = [f"{word} in {listed(changes)}" for word, changes in (("better", better), ("worse", worse)) if changes]
    name = last.told[0].upper() + last.told[1:]
    if not found:
        return f"{name} is neither better nor worse than {before.told} beyond noise."
    aside = " (of an AUC, its distance from 0.5)" if "two_sample_auc" in {**better, **worse} else ""
    return f"{name} against {before.told}: {'; '.join(found)}{aside}."


def _causes(
    before: Player,
    last: Player,
    figures: dict[str, Figure],
    moved: tuple[dict[str, Figure], dict[str, Figure]],
    config: RunConfig,
) -> Iterator[str]:
    better, worse = moved
    reward, sample, kl = figures["reward_auc"], figures["two_sample_auc"], figures["kl"]
    cap = config.generation.max_new_tokens  # no completion is longer, so a real one's excess is not counted either
    lengths = [min(last.evaluation.real_tokens[row], cap) for row in last.evaluation.rows("report")]
    real = sum(lengths) / len(lengths)
    cut = f", cut at {cap}," if cap in lengths else ""
    shorter = change(before.evaluation, last.evaluation, "tokens", "report", seed=config.seed).high < 0
    if figures["tokens"].high < SHORT * real and shorter:
        yield (
            f"Length collapse: its completions have {figures['tokens'].value:.0f} tokens, {before.told}'s had more, "
            f"the real ones{cut} have {real:.0f}. Being short tells it from its opponent, not being like the real "
            "ones; another iteration often corrects it, else lower train.lr."
        )
    if _matched(reward, sample):
        yield (
            f"The players are matched: the reward tells real from its opponent's completions no better than chance "
            f"(AUC {reward.told()}), and so does a classifier with its own (AUC {sample.told()}). These rows have "
            "nothing left to teach."
        )
    elif worse and not better:
        step = f"{_margin(last, figures, config)}it went {kl.value:.2g} nats a token"
        if kl.value >= LARGE_STEP:
            yield f"The step was too large: {step} (KL) from {before.told}. Lower train.lr, or raise train.beta."
        else:
            yield f"It got worse: {step} (KL) from {before.told}, which is no large step."
    elif reward.holds(0.5) and abs(sample.value - 0.5) > PLAIN and not sample.holds(0.5):
        yield (
            f"It learned nothing that holds on other rows: the reward's AUC is {reward.told()}, no better than "
            f"chance, while a classifier still tells its completions from the real ones (AUC {sample.told()}). "
            "Raise train.lr, lora.rank or train.epochs."
        )
    elif reward.low > 0.5 and not better and not worse and kl.value < SMALL_STEP:
        yield (
            f"Slow convergence: it can tell real completions from its opponent's (AUC {reward.told()}), but went only "
            f"{kl.value:.2g} nats a token (KL) from it. Raise train.lr, lora.rank or train.epochs."
        )


def _choice(measured: Sequence[Player], config: RunConfig) -> Iterator[str]:
    by = config.evaluation.best_by
    iterations = [player for player in measured if player.name.isdigit()]
    if not iterations:
        return
    first, chosen = measured[0], best(iterations, config)
    theirs = figure(chosen.evaluation, by, "choose", seed=config.seed)
    nearest = ", the nearest to 0.5" if by in NEAR_HALF else ""
    said = f"By {RATED[by]} on the rows to choose by, {chosen.told} is the best ({theirs.told()}{nearest})"
    if loss_of(first, by, config.seed) <= loss_of(chosen, by, config.seed):
        theirs = figure(first.evaluation, by, "choose", seed=config.seed)
        said += f" of the iterations, and {first.told} is no worse ({theirs.told()})"
    if by not in NEAR_HALF or len(first.evaluation.prompts_of("choose")) > 1:  # else no classifier was trained
        yield f"{said}."
    match stop(measured, config):
        case "matched":
            yield "The run ends here, on the rows to choose by the players are matched (evaluation.stop)."
        case "worse":
            earlier = best(measured[:-1], config)
            yield (
                f"The run ends here: on the rows to choose by it is worse than {earlier.told} beyond noise, and better "
                "in nothing (evaluation.stop)."
            )


def _matched(*areas: Figure) -> bool:
    return all(area.holds(0.5) and area.high - area.low <= 2 * MATCHED for area in areas)


def _moved(before: Evaluation, after: Evaluation, half: Half, seed: int) -> tuple[dict[str, Figure], dict[str, Figure]]:
    """The changes of RATED beyond noise, to the better and to the worse: those whose interval leaves out 0.

    Several are looked at, so each has a wider interval, with which none of them is off by chance in 95% (Bonferroni).
    """
    better: dict[str, Figure] = {}
    worse: dict[str, Figure] = {}
    if len(before.prompts_of(half)) < FEWEST_PROMPTS:
        return better, worse
    for name in RATED:
        found = change(before, after, name, half, seed=seed, confidence=1 - 0.05 / len(RATED))
        if not found.holds(0):
            up_is_good = name not in {"nll", *NEAR_HALF}
            (better if (found.value > 0) == up_is_good else worse)[name] = found
    return better, worse


def _margin(player: Player, figures: dict[str, Figure], config: RunConfig) -> str:
    if not player.name.isdigit():  # a warm start has no β
        return ""
    margin = at_iteration(config.train.beta, int(player.name)) * figures["gap"].value
    return f"its margin on held-out rows is {margin:.2f}, and "
