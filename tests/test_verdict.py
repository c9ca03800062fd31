"""What is said of made evaluations, and whether a run goes on after them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made import WORDS, after, made, texts

from qspin.config import RunConfig, load_config
from qspin.figures.evaluation import Evaluation
from qspin.figures.players import Player, best
from qspin.figures.verdict import conclusion, stop, verdict
from qspin.run_dir import IterationDir

CONFIG = load_config(None, {})
ANIMALS = ["cat", "dog", "cow", "hen", "pig", "goat", "duck", "bear"]
MIXED = [*WORDS * 4, *ANIMALS[:4]]
# told apart from the real ones, but not always
BASE = made(128, completions=texts(128, 1, words=MIXED))


def line(*evaluations: Evaluation) -> list[Player]:
    names = ["base", *map(str, range(len(evaluations) - 1))]
    return [
        Player(name, IterationDir(Path(name)), evaluation) for name, evaluation in zip(names, evaluations, strict=True)
    ]


def config(**settings: Any) -> RunConfig:
    return load_config(None, {f"evaluation.{name}": value for name, value in settings.items()})


def said(*evaluations: Evaluation) -> str:
    return "\n".join(verdict(line(*evaluations), CONFIG))


def test_nothing_is_said_of_a_first_player() -> None:
    assert verdict(line(BASE), CONFIG) == []
    assert stop(line(BASE), CONFIG) is None


def test_better_in_everything_goes_on() -> None:
    greedy = after(BASE, real_gain=3, generated_gain=-3, completions=texts(128, 5))
    text = said(BASE, greedy)
    assert text.startswith("Iteration 0 against the base: better in NLL (-0.")
    assert "two-sample AUC (-0." in text
    assert "worse" not in text
    assert stop(line(BASE, greedy), CONFIG) is None


def test_better_in_one_and_worse_in_another_goes_on() -> None:
    """As the prototype's first iteration: likelier real completions, and easier to tell apart."""
    mixed = after(BASE, real_gain=3, generated_gain=-3, completions=texts(128, 5, words=ANIMALS))
    text = said(BASE, mixed)
    assert "better in NLL (" in text
    assert "worse in two-sample AUC (+0." in text
    assert "(of an AUC, its distance from 0.5)" in text
    assert stop(line(BASE, mixed), CONFIG) is None


def test_length_collapse_is_named() -> None:
    short = after(BASE, real_gain=3, generated_gain=-3, completions=texts(128, 5, length=5))
    text = said(BASE, short)
    assert "Length collapse: its completions have 5 tokens, the base's had more, the real ones have 10." in text
    assert "Length collapse" not in said(BASE, after(BASE, completions=texts(128, 5, length=9)))
    as_short = after(short, completions=texts(128, 6, length=5))
    assert "Length collapse" not in said(BASE, short, as_short), "it did not become shorter"


def test_a_length_is_held_against_what_the_cap_leaves_of_the_real_ones() -> None:
    """Real completions of 400 tokens, where 256 are all that a player can write."""
    long = replace(BASE, real_tokens=[400] * 128, generated_ids=[[1] * 256] * 128)

    def shorter(tokens: int) -> str:
        mine = after(long, completions=texts(128, 5), real_tokens=long.real_tokens)
        return said(long, replace(mine, generated_ids=[[1] * tokens] * 128))

    assert "Length collapse" not in shorter(240), "its completions end by themselves before the cap, as they should"
    assert "have 100 tokens, the base's had more, the real ones, cut at 256, have 256." in shorter(100)


def test_an_auc_without_a_classifier_is_not_taken_for_a_match() -> None:
    three = made(3, completions=texts(3, 1, words=ANIMALS))
    assert "One prompt: among the held-out rows, of those to choose by there is no other" in said(three, after(three))
    two = made(2, completions=texts(2, 1, words=ANIMALS))
    assert "of those to choose by and of the reported ones there is no other" in said(two, after(two))
    four = made(4, completions=texts(4, 1, words=ANIMALS))
    assert "One prompt" not in said(four, after(four))
    for player, chosen in ((three, False), (four, True)):
        assert ("By two-sample AUC on the rows to choose by" in said(player, after(player))) == chosen


def test_a_large_step_back_names_its_cause_and_ends_the_run() -> None:
    worse = after(BASE, real_gain=-5, generated_gain=-8, completions=texts(128, 5, words=ANIMALS))
    text = said(BASE, worse)
    assert "The step was too large: its margin on held-out rows is 0." in text
    assert "it went 0.8" in text
    assert "Lower train.lr, or raise train.beta." in text
    assert "The run ends here: on the rows to choose by it is worse than the base beyond noise" in text
    assert "and the base is no worse" in text
    assert stop(line(BASE, worse), CONFIG) == "worse"
    assert stop(line(BASE, worse), config(stop="never")) is None


def test_a_small_step_back_is_not_called_large() -> None:
    worse = after(BASE, real_gain=-2, generated_gain=-1, completions=texts(128, 5, words=MIXED))
    text = said(BASE, worse)
    assert "It got worse: its margin on held-out rows is " in text
    assert "which is no large step." in text
    assert "too large" not in text


def test_worse_is_said_of_the_best_so_far_not_of_the_opponent() -> None:
    good = after(BASE, real_gain=6, generated_gain=-1, completions=texts(128, 5))
    bad = after(good, real_gain=-8, generated_gain=-1, completions=texts(128, 6, words=ANIMALS))
    back = after(bad, real_gain=1, generated_gain=-1, completions=texts(128, 7, words=MIXED))
    assert stop(line(BASE, good), CONFIG) is None
    assert stop(line(BASE, good, bad), CONFIG) == "worse"
    assert stop(line(BASE, good, bad, back), CONFIG) == "worse", "better than its opponent, worse than the best"


def test_a_step_that_taught_nothing() -> None:
    same = after(BASE, completions=texts(128, 5, words=MIXED))
    text = said(BASE, same)
    assert text.startswith("Iteration 0 is neither better nor worse than the base beyond noise.")
    assert "It learned nothing that holds on other rows: the reward's AUC is 0." in text
    assert stop(line(BASE, same), CONFIG) is None


def small_step(base: Evaluation, wrong: int) -> Evaluation:
    """A player who finds what the base generated a little less likely, each `wrong`-th more, and writes as the base."""
    return after(
        base,
        completions=base.completions,
        real_nll=base.real_nll,
        policy_logps=[value - (0.02 if row % wrong else -0.02) for row, value in enumerate(base.generated_logps)],
    )


def test_slow_convergence() -> None:
    text = said(BASE, small_step(BASE, wrong=8))
    assert "Slow convergence: it can tell real completions from its opponent's (AUC 0." in text
    assert "Raise train.lr, lora.rank or train.epochs." in text


def test_of_too_few_rows_to_know_no_step_is_said_to_tell_them_apart() -> None:
    base = made(16)
    text = said(base, small_step(base, wrong=3))
    assert "Iteration 0 is neither better nor worse than the base beyond noise." in text
    assert "Slow convergence" not in text


MATCHED = made(1200), after(made(1200), 3)


def test_matched_players_end_the_run() -> None:
    text = said(*MATCHED)
    assert "The players are matched: the reward tells real from its opponent's completions no better" in text
    assert "The run ends here, on the rows to choose by the players are matched" in text
    assert stop(line(*MATCHED), CONFIG) == "matched"
    assert stop(line(*MATCHED), config(stop="never")) is None


def test_wide_intervals_that_hold_a_half_are_no_match() -> None:
    base = made(128)
    player = after(base, 3)
    assert stop(line(base, player), CONFIG) is None
    assert "matched" not in said(base, player)


def test_a_player_that_got_worse_is_not_told_to_learn_more() -> None:
    """Blown up by its rate: no answer is likely, real or not, and the reward tells them no better apart."""
    blown = after(BASE, real_gain=-60, generated_gain=-60, completions=texts(128, 5, words=ANIMALS))
    text = said(BASE, blown)
    assert "The step was too large" in text
    assert "Raise train.lr" not in text


def test_few_rows_decide_nothing_and_are_called_few() -> None:
    base = made(24, completions=texts(24, 1, words=MIXED))
    worse = after(base, real_gain=-9, generated_gain=-9, completions=texts(24, 5, words=ANIMALS))
    assert said(base, worse).startswith("Few rows: 12 of 24 held out are reported")
    assert stop(line(base, worse), CONFIG) is None
    assert "Few rows" not in said(BASE, BASE_AGAIN)


def test_one_prompt_shows_no_change() -> None:
    """Of one, every draw is the same, so that any change would be beyond noise."""
    base = replace(BASE, prompts=[int(reported) for reported in BASE.reported])
    text = said(base, replace(after(BASE, real_gain=5), prompts=base.prompts))
    assert "One prompt" in text
    assert "neither better nor worse" in text


@pytest.mark.parametrize(("prompts", "told"), [(2, False), (6, False), (7, True)])
def test_fewer_than_seven_prompts_show_no_change(prompts: int, told: bool) -> None:
    """Changes of one sign in all of six come by chance more often than the intervals are made for."""
    base = made(2 * prompts)
    text = said(base, after(base, real_gain=50))
    assert ("better in NLL" in text) is told
    assert ("neither better nor worse" in text) is not told
    assert ("no difference here can be told from chance" in text) is not told


def test_many_rows_of_few_prompts_are_few() -> None:
    prompts = [row // 8 for row in range(128)]
    grouped: dict[str, Any] = {"prompts": prompts, "reported": [prompt % 2 == 0 for prompt in prompts]}
    base = replace(BASE, **grouped)
    worse = replace(after(BASE, real_gain=-5, generated_gain=-8, completions=texts(128, 5, words=ANIMALS)), **grouped)
    assert said(base, worse).startswith("Few rows: 64 of 128 held out are reported with 8 different prompts, so most")
    assert stop(line(base, worse), CONFIG) is None


BASE_AGAIN = after(BASE, completions=BASE.completions)


@pytest.mark.parametrize(("by", "wanted"), [("nll", "0"), ("two_sample_auc", "1"), ("f1", "2")])
def test_best_is_by_what_is_asked(by: str, wanted: str) -> None:
    likely = after(BASE, real_gain=9, completions=texts(128, 5, words=ANIMALS))
    alike = after(BASE, completions=texts(128, 6), greedy_completions=texts(128, 7, words=ANIMALS))
    right = after(BASE, completions=texts(128, 8, words=MIXED), greedy_completions=BASE.real_completions)
    measured = line(BASE, likely, alike, right)
    settings = config(best_by=by)
    assert best(measured[1:], settings).name == wanted
    assert conclusion(measured, settings)["kept"] == int(wanted)
    assert conclusion(measured, config(best_by=by, keep="last"))["kept"] == 2
    assert (
        f"iteration {wanted} is the best" in verdict(measured, settings)[-1 if stop(measured, settings) is None else -2]
    )


def test_best_looks_at_no_reported_row() -> None:
    nll = [0.0 if reported else 60.0 for reported in BASE.reported]
    measured = line(BASE, after(BASE, real_nll=nll), after(BASE))
    assert best(measured[1:], config(best_by="nll")).name == "1"


def test_of_the_base_alone_nothing_is_concluded() -> None:
    assert conclusion(line(BASE), CONFIG) == {"iterations": 0, "stop": None, "kept": None, "sentences": []}
