"""Estimators of how far a player's completions are from the real ones, each with its interval over held-out rows.

    nll = estimate(ratio(real_nll, real_tokens), prompts, seed=0)              # Figure(value, low, high)
    change = estimate(difference(ratio(before, tokens), ratio(after, tokens)), prompts, seed=0)

Every statistic but `distinct` is a function of how often each row counts, so that one bootstrap serves them all, and
that two players are compared on the same draws. Rows of one prompt are alike, and are drawn together. Lists run over
rows. Free of torch.
"""

from __future__ import annotations

import functools
import itertools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# (R, n) counts of n rows in R draws → (R,) values
Statistic = Callable[[Array], Array]

RESAMPLES = 2000
FOLDS = 5


class Figure(NamedTuple):
    """An estimate and its interval, of 95% unless asked otherwise."""

    value: float
    low: float
    high: float

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high

    def told(self, spec: str = ".2f") -> str:
        """The estimate with its interval in brackets, each number in a format."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"


def estimate(statistic: Statistic, prompts: Sequence[int], seed: int, confidence: float = 0.95) -> Figure:
    """A statistic and its bootstrap interval, percentile method (Efron 1979; 1981).

    Args:
        prompts: each row's; they are what is drawn, each with all of its rows (Field & Welsh 2007).
    """
    low, high = np.quantile(statistic(_draws(tuple(prompts), seed)), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Figure(float(statistic(np.ones((1, len(prompts))))[0]), float(low), float(high))


@functools.lru_cache(maxsize=4)
def _draws(prompts: tuple[int, ...], seed: int) -> Array:
    place = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
    drawn = np.random.default_rng(seed).multinomial(len(place), [1 / len(place)] * len(place), size=RESAMPLES)
    counts: Array = drawn[:, [place[prompt] for prompt in prompts]].astype(float)
    return counts


def mean(values: Sequence[float]) -> Statistic:
    """Of a value a row, every row weighing the same."""
    return ratio(values, [1.0] * len(values))


def ratio(values: Sequence[float], weights: Sequence[float]) -> Statistic:
    """Sum of the values over sum of the weights, as nats a token."""
    over, under = np.array(values, dtype=float), np.array(weights, dtype=float)

    def statistic(counts: Array) -> Array:
        found: Array = (counts @ over) / (counts @ under)
        return found

    return statistic


def auc(real: Sequence[float], generated: Sequence[float], folds: Sequence[int] | None = None) -> Statistic:
    """P(real > generated) + P(equal) / 2: the Mann–Whitney statistic, the area under the ROC curve (Hanley & McNeil
    1982).

    Args:
        real: a score of each row's real completion.
        generated: of its generated one.
        folds: only scores of one fold are compared with each other, if they were made by different classifiers
            (Airola et al. 2011: pooling them is biased).
    """
    over, under = np.array(real, dtype=float)[:, None], np.array(generated, dtype=float)[None]  # (n, 1), (1, n)
    wins = (over > under) + 0.5 * (over == under)
    fold = np.array([0] * len(real) if folds is None else folds)
    compared = (fold[:, None] == fold[None]).astype(float)
    wins = wins * compared

    def statistic(counts: Array) -> Array:
        found: Array = ((counts @ wins) * counts).sum(1) / ((counts @ compared) * counts).sum(1)
        return found

    return statistic


def difference(before: Statistic, after: Statistic) -> Statistic:
    """After − before, on the same draws of rows: a paired comparison."""
    return lambda counts: after(counts) - before(counts)


def off_chance(area: Statistic) -> Statistic:
    """How far an AUC is from 0.5, either way."""
    return lambda counts: np.abs(area(counts) - 0.5)


# --- words


def token_f1(completion: str, real: str) -> float:
    """Harmonic mean of precision and recall of normalised words, as multisets (SQuAD, Rajpurkar et al. 2016).

    Two texts without a word are alike, as in SQuAD 2.0.
    """
    ours, theirs = _normalised(completion), _normalised(real)
    if not ours or not theirs:
        return float(ours == theirs)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs))


def _normalised(text: str) -> list[str]:
    """SQuAD's: lower case, without punctuation and articles."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def distinct(texts: Sequence[str], prompts: Sequence[int], size: int) -> Figure:
    """Distinct n-grams of words over all of them (distinct-1, distinct-2: Li et al. 2016).

    The interval is ±1.96 standard errors by the jackknife over prompts (Efron & Stein 1981): texts that are drawn
    twice, as a bootstrap does, repeat their n-grams and would make any text look less varied than it is.
    """
    grams: dict[int, list[tuple[str, ...]]] = {}
    for text, prompt in zip(texts, prompts, strict=True):
        grams.setdefault(prompt, []).extend(zip(*(text.split()[start:] for start in range(size)), strict=False))
    owners = Counter(gram for own in grams.values() for gram in set(own))
    total = sum(map(len, grams.values()))
    if not total:
        return Figure(0.0, 0.0, 0.0)
    without = np.array(
        [
            (len(owners) - sum(owners[gram] == 1 for gram in set(own))) / (total - len(own))
            for own in grams.values()
            if total > len(own)
        ]
    )
    value, count = len(owners) / total, len(without)
    error = 1.96 * float(np.sqrt((count - 1) / count * ((without - without.mean()) ** 2).sum())) if count else 0.0
    return Figure(value, max(0.0, value - error), min(1.0, value + error))


# --- two samples


class TwoSample(NamedTuple):
    """Scores by classifiers that never saw the row's prompt: the higher, the more like a real completion."""

    folds: list[int]  # whose classifier; scores of two folds are not comparable
    real: list[float]
    generated: list[float]


def classifier_scores(real: Sequence[str], generated: Sequence[str], prompts: Sequence[int]) -> TwoSample:
    """The classifier two-sample test (Lopez-Paz & Oquab 2017, arXiv 1610.06545), its AUC by `auc`.

    Logistic regression on TF-IDF of n-grams: words (1 to 2) and characters (1 to 4). All completions of a prompt are
    in one fold, so what a prompt is about can't tell its real completion from the generated one.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    return _cross_validated(
        lambda: make_pipeline(
            TfidfVectorizer(analyzer=_features, sublinear_tf=True), LogisticRegression(max_iter=1000)
        ),
        list(real),
        list(generated),
        prompts,
    )


def length_scores(real: Sequence[int], generated: Sequence[int], prompts: Sequence[int]) -> TwoSample:
    """The control: the same test on the logarithm of the length alone."""
    from sklearn.linear_model import LogisticRegression

    return _cross_validated(
        lambda: LogisticRegression(max_iter=1000),
        [[float(np.log1p(length))] for length in real],
        [[float(np.log1p(length))] for length in generated],
        prompts,
    )


def _features(text: str) -> list[str]:
    words = re.findall(r"\w+|[^\w\s]", text)
    spaced = f" {' '.join(text.split())} "
    return [
        *(f"w:{word}" for word in words),
        *(f"w:{one} {two}" for one, two in itertools.pairwise(words)),
        *(f"c:{spaced[at : at + size]}" for size in range(1, 5) for at in range(len(spaced) - size + 1)),
    ]


def _cross_validated(
    make: Callable[[], Any], real: list[Any], generated: list[Any], prompts: Sequence[int]
) -> TwoSample:
    names = sorted(set(prompts))
    place = {prompt: index % FOLDS for index, prompt in enumerate(names)}
    folds = [place[prompt] for prompt in prompts]
    found = TwoSample(folds, [0.0] * len(real), [0.0] * len(real))
    for fold in set(folds):
        others = [row for row, other in enumerate(folds) if other != fold]
        if not others:  # one prompt alone: nothing to learn from, and all scores are alike
            break
        classifier = make()
        classifier.fit(
            [real[row] for row in others] + [generated[row] for row in others], [1] * len(others) + [0] * len(others)
        )
        for row in (row for row, other in enumerate(folds) if other == fold):
            # so many places that what rounding does to them does not show
            scores = classifier.decision_function([real[row], generated[row]])
            found.real[row], found.generated[row] = (round(float(score), 6) for score in scores)
    return found
