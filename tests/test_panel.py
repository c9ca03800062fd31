"""The estimators, on made data whose answers are known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from qspin.figures.panel import (
    Figure,
    Statistic,
    auc,
    classifier_scores,
    difference,
    distinct,
    estimate,
    length_scores,
    mean,
    off_chance,
    ratio,
    token_f1,
)


def value(statistic: Statistic, rows: int) -> float:
    return float(statistic(np.ones((1, rows)))[0])


def test_rows_weigh_by_their_tokens() -> None:
    assert value(ratio([10, 30, 20], [5, 10, 5]), 3) == 3.0
    assert value(mean([1, 2, 6]), 3) == 3.0


def test_no_change_is_zero_and_an_even_change_is_certain() -> None:
    before, tokens = [10.0, 30.0, 20.0], [5, 10, 5]
    assert estimate(difference(ratio(before, tokens), ratio(before, tokens)), range(3), 0) == Figure(0, 0, 0)
    after = ratio([5.0, 20.0, 15.0], tokens)  # one nat less a token, in every row
    assert estimate(difference(ratio(before, tokens), after), range(3), 0) == pytest.approx((-1, -1, -1))


def test_an_auc_by_hand() -> None:
    # of 9 comparisons: 3 beats 1, 2; ties 3; 2 beats 1, ties 2; 1 ties 1
    assert value(auc([3, 2, 1], [1, 2, 3]), 3) == 0.5
    assert value(auc([3, 2, 2], [1, 2, 0]), 3) == pytest.approx((3 + 2.5 + 2.5) / 9)
    assert value(auc([1, 1], [1, 1]), 2) == 0.5


def test_folds_are_not_compared_with_each_other() -> None:
    # within each fold the real one is higher; across folds it is not
    assert value(auc([1, 11], [0, 10], folds=[0, 1]), 2) == 1.0
    assert value(auc([1, 11], [0, 10]), 2) == 0.75


def test_the_order_of_a_draw_counts_rows_twice() -> None:
    statistic = auc([3, 0], [1, 2])
    assert statistic(np.array([[2.0, 0.0], [0.0, 2.0]])).tolist() == [1.0, 0.0]


def test_distance_from_chance_is_the_same_either_way() -> None:
    assert value(off_chance(auc([1, 2], [3, 4])), 2) == value(off_chance(auc([3, 4], [1, 2])), 2) == 0.5


@pytest.mark.parametrize(
    ("completion", "real", "f1"),
    [
        ("The cat sat.", "A cat sat!", 1.0),  # articles, case and punctuation aside
        ("cat cat dog", "cat dog dog bird", 2 * 2 / 7),  # one cat and one dog in common
        ("fish", "bird", 0.0),
        ("", "bird", 0.0),
        ("The", "...", 1.0),  # neither has a word
    ],
)
def test_token_f1_by_hand(completion: str, real: str, f1: float) -> None:
    assert token_f1(completion, real) == pytest.approx(f1)


def test_distinct_by_hand() -> None:
    texts = ["a b a b", "a c"]  # words a b c of 6; pairs ab ba ac of 4
    assert distinct(texts, [0, 1], 1).value == 3 / 6
    assert distinct(texts, [0, 1], 2).value == 3 / 4
    # without the first: a c of 2; without the second: a b of 4. Standard error: half the spread of 1 and 1/2.
    assert distinct(texts, [0, 1], 1) == pytest.approx((0.5, 0.5 - 1.96 * 0.25, 0.5 + 1.96 * 0.25))
    assert distinct(["", ""], [0, 1], 1) == Figure(0, 0, 0)
    assert distinct(["a b", ""], [0, 1], 2) == Figure(1, 1, 1)


def samples(texts: Callable[[np.random.Generator], str], rows: int, seed: int) -> list[str]:
    generator = np.random.default_rng(seed)
    return [texts(generator) for _ in range(rows)]


def words(vocabulary: str, least: int = 8, most: int = 12) -> Callable[[np.random.Generator], str]:
    return lambda generator: " ".join(generator.choice(vocabulary.split(), size=generator.integers(least, most + 1)))


COLOURS, ANIMALS = words("red green blue black white brown"), words("cat dog cow hen pig goat")
ROWS = range(60)


def two_sample(real: list[str], generated: list[str]) -> Figure:
    found = classifier_scores(real, generated, list(range(len(real))))
    return estimate(auc(found.real, found.generated, found.folds), range(len(real)), 0)


def by_length(real: list[str], generated: list[str]) -> Figure:
    lengths = [[len(text.split()) for text in texts] for texts in (real, generated)]
    found = length_scores(*lengths, list(range(len(real))))
    return estimate(auc(found.real, found.generated, found.folds), range(len(real)), 0)


def test_one_distribution_can_not_be_told_apart() -> None:
    """Of 20 experiments about one may leave 0.5 out; a leak between folds would leave it out in all."""
    outside, middles = 0, []
    for seed in range(20):
        figure = two_sample(samples(COLOURS, 40, 2 * seed), samples(COLOURS, 40, 2 * seed + 1))
        outside += not figure.holds(0.5)
        middles.append(figure.value)
    assert outside <= 4
    assert abs(np.mean(middles) - 0.5) < 0.05


def test_disjoint_words_are_told_apart_whatever_their_length() -> None:
    real, generated = samples(COLOURS, 60, 1), samples(ANIMALS, 60, 2)
    assert two_sample(real, generated) == Figure(1, 1, 1)
    assert by_length(real, generated).holds(0.5)


def test_the_length_control_sees_length_alone() -> None:
    real, generated = samples(words("ox", 20, 30), 60, 1), samples(words("ox", 5, 10), 60, 2)
    assert by_length(real, generated).value == 1.0
    assert by_length(real, samples(words("ox", 20, 30), 60, 3)).holds(0.5)


def test_what_a_prompt_is_about_tells_nothing() -> None:
    """Both completions of each prompt name its subject, and nothing else tells them apart."""
    texts = [f"subject{row} is fine" for row in ROWS]
    assert two_sample(texts, texts).value == 0.5


def test_rows_of_one_prompt_are_in_one_fold() -> None:
    prompts = [0, 1, 1, 2, 3, 4, 5, 0]
    folds = classifier_scores(["x"] * 8, ["y"] * 8, prompts).folds
    assert folds[0] == folds[7]
    assert folds[1] == folds[2]
    assert len(set(folds)) == 5


def test_one_prompt_alone_teaches_a_classifier_nothing() -> None:
    assert classifier_scores(["x", "y"], ["a", "b"], [0, 0]) == ([0, 0], [0.0, 0.0], [0.0, 0.0])


def test_texts_without_words_are_texts() -> None:
    scores = classifier_scores(["", " ", "7"], ["!", "", ""], [0, 1, 2])
    assert all(np.isfinite([*scores.real, *scores.generated]))


@pytest.mark.parametrize("kind", ["mean", "ratio", "paired", "auc"])
def test_the_interval_covers_as_often_as_it_says(kind: str) -> None:
    """About 95% of 300 experiments of 64 rows have the truth inside the interval."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        noise, other = generator.normal(0, 1, size=(2, 64))
        tokens = generator.integers(5, 50, size=64)
        statistic, truth = {
            "mean": (mean(noise), 0.0),
            "ratio": (ratio(tokens * (2 + noise), tokens), 2.0),
            "paired": (difference(mean(other), mean(other + noise + 0.3)), 0.3),
            "auc": (auc(noise + 1, other), 0.7602),  # Φ(1/√2)
        }[kind]
        figure = estimate(statistic, range(64), 0)
        assert figure.low < figure.value < figure.high
        covered += figure.holds(truth)
    assert 0.90 * 300 <= covered <= 0.985 * 300


def test_rows_of_one_prompt_are_drawn_together() -> None:
    """About 95% of 300 experiments of 40 prompts with 4 rows each, which are alike; by rows it would be 70%."""
    generator = np.random.default_rng(1)
    prompts = [row // 4 for row in range(160)]
    by_prompts = by_rows = 0
    for _ in range(300):
        noise = generator.normal(0, 1, size=40)[prompts] + generator.normal(0, 0.5, size=160)
        by_prompts += estimate(mean(noise), prompts, 0).holds(0)
        by_rows += estimate(mean(noise), range(160), 0).holds(0)
    assert 0.90 * 300 <= by_prompts <= 0.985 * 300
    assert by_rows < 0.8 * 300


def test_distinct_leaves_out_whole_prompts() -> None:
    # without the first two: a c of 2; without the last: a b of 4
    assert distinct(["a b", "a b", "a c"], [7, 7, 3], 1) == distinct(["a b a b", "a c"], [0, 1], 1)
