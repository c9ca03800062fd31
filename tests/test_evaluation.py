"""What follows from an evaluation, on made ones whose answers are known."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from made import WORDS, after, made, texts

from qspin.errors import QspinError
from qspin.figures.evaluation import (
    Evaluation,
    change,
    halves,
    panel,
    read_evaluation,
    real_panel,
    two_samples,
    values,
)
from qspin.files import read_json, write_json

BASE = made()


def test_it_survives_its_file(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluation.json", BASE.to_json())
    assert read_evaluation(tmp_path / "evaluation.json") == BASE


def test_one_of_another_version_is_refused_in_a_line(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.json"
    write_json(path, {"real_nll": [1.0], "real_tokens": [1], "ended": [True]})
    with pytest.raises(QspinError) as error:
        read_evaluation(path)
    assert str(error.value) == f"{path}: written by another version of qspin; delete it and run again"


def test_halves_are_of_prompts_and_of_the_seed() -> None:
    ids, prompts = [f"row-{number}" for number in range(21)], [number // 2 for number in range(21)]
    sides = halves(ids, prompts, 0)
    assert len(set(zip(prompts, sides, strict=True))) == 11, "rows of one prompt are on one side"
    assert Counter(dict(zip(prompts, sides, strict=True)).values()) == {True: 6, False: 5}
    assert sides == halves(ids, prompts, 0)
    assert sides != halves(ids, prompts, 1)
    one, other = [True, True, False, False], [False, False, True, True]
    assert halves(ids[:4], prompts[:4], 0) in (one, other), "of two prompts one"


def test_figures_are_of_one_half() -> None:
    nll = [10.0 if reported else 50.0 for reported in BASE.reported]
    player = replace(BASE, real_nll=nll)
    assert panel(player, "report", seed=0)["nll"] == (1, 1, 1)  # ten tokens a row
    assert panel(player, "choose", seed=0)["nll"] == (5, 5, 5)
    assert values(player, seed=0, style=None)["nll"] == 1


def test_every_figure_of_a_first_player() -> None:
    found = panel(BASE, "report", seed=0)
    assert set(found) == {
        "nll", "two_sample_auc", "length_auc", "f1", "tokens", "ended", "greedy_tokens", "greedy_ended", "distinct_1",
        "distinct_2",
    }  # fmt: skip
    assert found["two_sample_auc"].holds(0.5)
    assert found["length_auc"] == (0.5, 0.5, 0.5)
    assert (found["tokens"].value, found["ended"].value) == (10, 1)
    assert found["distinct_1"].value == len(WORDS) / 640


def test_a_player_with_an_opponent_has_rewards() -> None:
    found = panel(after(BASE, real_gain=3, generated_gain=-3), "report", seed=0)
    assert found["reward_auc"].low > 0.99
    assert found["gap"].holds(6)
    assert found["kl"].holds(0.3)  # three nats over ten tokens
    nothing = panel(after(BASE), "report", seed=0)
    assert nothing["reward_auc"].holds(0.5)
    assert nothing["kl"].holds(0)
    backwards = panel(after(BASE, real_gain=-3, generated_gain=3), "report", seed=0)
    assert backwards["reward_auc"].high < 0.01


def test_f1_is_of_greedy_completions() -> None:
    player = replace(BASE, greedy_completions=BASE.real_completions)
    assert panel(player, "report", seed=0)["f1"] == (1, 1, 1)
    assert panel(replace(BASE, completions=BASE.real_completions), "report", seed=0)["f1"].value < 1


def test_styles_are_matched_from_beginning_to_end() -> None:
    player = replace(
        BASE, completions=["One.\nTry it: two.", "no"] * 32 + ["  One.\nTry it: two.\nThree.\n", "no"] * 32
    )
    assert panel(player, "report", seed=0, style=r"[^\n]+\nTry it: [^\n]+")["style"].value == 0.5
    assert panel(player, "report", seed=0, style=r"[^\n]+\nTry it: [\s\S]+")["style"].value == 1
    assert panel(player, "choose", seed=0, style=".*")["style"].value == 1
    assert real_panel(player, "report", seed=0, style="no")["style"].value == 0


def test_the_real_ones_have_figures_too() -> None:
    player = replace(BASE, real_ended=[row % 4 == 0 for row in range(128)])
    found = real_panel(player, "report", seed=0)
    assert set(found) == {"tokens", "ended", "distinct_1", "distinct_2"}
    assert found["ended"].value == 0.5
    assert found["tokens"] == (10, 10, 10)


def test_changes_are_paired() -> None:
    """Rows differ much, the players by one nat a row: only a paired interval is that narrow."""
    spread = replace(BASE, real_nll=[float(row) for row in range(128)])
    better = replace(spread, real_nll=[value - 1 for value in spread.real_nll])
    assert change(spread, better, "nll", "report", seed=0) == pytest.approx((-0.1, -0.1, -0.1))
    assert change(spread, spread, "two_sample_auc", "report", seed=0) == (0, 0, 0)


def test_an_auc_changes_by_its_distance_from_chance() -> None:
    far = made(completions=texts(128, 1, words=["cat", "dog"]))
    found = change(far, BASE, "two_sample_auc", "choose", seed=0)
    assert found.high < -0.35
    mirrored = replace(far, real_scores=far.generated_scores, generated_scores=far.real_scores)
    assert panel(mirrored, "choose", seed=0)["two_sample_auc"].value == 0
    assert change(mirrored, BASE, "two_sample_auc", "choose", seed=0).high < -0.35


def test_each_half_has_classifiers_of_its_own() -> None:
    """What is in the other half changes no score."""
    real, generated = BASE.real_completions, list(BASE.completions)
    found = two_samples((real, generated), ([1] * 128, [1] * 128), BASE.prompts, BASE.reported)
    for row in BASE.rows("choose"):
        generated[row] = "something else"
    other = two_samples((real, generated), ([1] * 128, [1] * 128), BASE.prompts, BASE.reported)
    rows = BASE.rows("report")
    assert [found["generated_scores"][row] for row in rows] == [other["generated_scores"][row] for row in rows]
    assert found["generated_scores"] != other["generated_scores"]


def test_a_half_of_one_row_is_measured() -> None:
    tiny = made(2)
    assert panel(tiny, "choose", seed=0)["two_sample_auc"] == (0.5, 0.5, 0.5)
    assert Evaluation(**tiny.to_json()) == tiny


def test_fields_of_the_file_are_plain(tmp_path: Path) -> None:
    write_json(tmp_path / "evaluation.json", BASE.to_json())
    assert read_json(tmp_path / "evaluation.json")["reported"][:2] == [True, False]
