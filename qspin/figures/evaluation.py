"""What a player did on the held-out rows, and the panel of figures that follows from it. Free of torch.

    player = read_evaluation(run_dir.iteration(0).evaluation)
    panel(player, "report", seed=0)["two_sample_auc"]                  # Figure(value, low, high)
    change(before, player, "f1", "choose", seed=0)

The rows are in two halves by prompt, the same for all players of a run: by one a run chooses (the best iteration,
whether it goes on), the other it reports. A choice makes the figures that it was made by look better than they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from qspin.errors import QspinError
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
from qspin.files import AGAIN, read_json
from qspin.sampling import noise_key

Half = Literal["choose", "report"]

# AUCs of which 0.5 is best: real and generated can't be told apart
NEAR_HALF = ("two_sample_auc", "length_auc")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One player on the held-out rows; lists run over rows, log-probs are sums over a completion's tokens, in nats.

    Texts are cut at `generation.max_new_tokens`, the real ones too: otherwise the cap would tell which is which.
    """

    prompts: list[int]  # rows of one prompt have one number
    reported: list[bool]  # else the row is of the half to choose by

    real_nll: list[float]  # −log p of the real completion
    real_tokens: list[int]
    real_ended: list[bool]  # it ends within the cap
    real_completions: list[str]

    generated_ids: list[list[int]]  # sampled at temperature 1 from the whole distribution
    generated_logps: list[float]
    ended: list[bool]  # the completion ended by itself
    completions: list[str]

    greedy_tokens: list[int]
    greedy_ended: list[bool]
    greedy_completions: list[str]

    folds: list[int]  # of the two-sample classifiers, whose scores are high where a completion looks real
    real_scores: list[float]
    generated_scores: list[float]
    real_length_scores: list[float]  # by length alone
    generated_length_scores: list[float]

    # of the player that it was trained against; empty for the first one
    opponent_real_nll: list[float]
    opponent_tokens: list[int]
    opponent_logps: list[float]  # of the opponent's completions under the opponent
    policy_logps: list[float]  # of the opponent's completions under this player

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def rows(self, half: Half) -> list[int]:
        return [row for row, reported in enumerate(self.reported) if reported == (half == "report")]

    def prompts_of(self, half: Half) -> set[int]:
        return {self.prompts[row] for row in self.rows(half)}


def read_evaluation(path: Path) -> Evaluation:
    """A player's evaluation.json.

    Raises:
        QspinError: it is missing, damaged, or of another version.
    """
    value = read_json(path)
    if not is_evaluation(value):
        raise QspinError(f"{path}: written by another version of qspin; {AGAIN}")
    return Evaluation(**value)


def is_evaluation(value: dict[str, Any]) -> bool:
    """Whether it has the fields of this version."""
    return value.keys() == {field.name for field in fields(Evaluation)}


def halves(record_ids: Sequence[str], prompts: Sequence[int], seed: int) -> list[bool]:
    """Whether each row is reported: half of the prompts, one more if they are odd, in an order fixed by the seed."""
    first = {prompt: record_id for record_id, prompt in reversed(list(zip(record_ids, prompts, strict=True)))}
    order = sorted(first, key=lambda prompt: noise_key(seed, 0, f"half {first[prompt]}"))
    reported = set(order[: (len(order) + 1) // 2])
    return [prompt in reported for prompt in prompts]


def two_samples(
    texts: tuple[Sequence[str], Sequence[str]],
    lengths: tuple[Sequence[int], Sequence[int]],
    prompts: Sequence[int],
    reported: Sequence[bool],
) -> dict[str, Any]:
    """The fields of an Evaluation that classifiers make, of (real, generated); each half has classifiers of its own."""
    count = len(prompts)
    found: dict[str, Any] = {"folds": [0] * count}
    names = ("real_scores", "generated_scores", "real_length_scores", "generated_length_scores")
    found |= {name: [0.0] * count for name in names}
    for half in (False, True):
        rows = [row for row, side in enumerate(reported) if side == half]
        members = [prompts[row] for row in rows]
        real, generated = ([side[row] for row in rows] for side in texts)
        by_text = classifier_scores(real, generated, members)
        real_lengths, generated_lengths = ([side[row] for row in rows] for side in lengths)
        by_length = length_scores(real_lengths, generated_lengths, members)
        for place, row in enumerate(rows):
            found["folds"][row] = by_text.folds[place]
            parts = (by_text.real, by_text.generated, by_length.real, by_length.generated)
            for name, part in zip(names, parts, strict=True):
                found[name][row] = part[place]
    return found


# --- figures


def panel(player: Evaluation, half: Half, *, seed: int, style: str | None = None) -> dict[str, Figure]:
    """Every figure of a player by name, with its interval over the prompts of a half.

    `reward_auc`, `gap` (mean margin over β, nats) and `kl` (from opponent to policy, nats a token) are those of a
    player that had an opponent, `style` if there is one.
    """
    rows = player.rows(half)
    prompts = _prompts(player, rows)
    found = {name: estimate(make(), prompts, seed) for name, make in _statistics(player, rows, style).items()}
    for size in (1, 2):
        found[f"distinct_{size}"] = distinct([player.completions[row] for row in rows], prompts, size)
    return found


def real_panel(player: Evaluation, half: Half, *, seed: int, style: str | None = None) -> dict[str, Figure]:
    """The figures that the real completions have themselves."""
    rows = player.rows(half)
    texts, prompts = [player.real_completions[row] for row in rows], _prompts(player, rows)
    statistics = {
        "tokens": mean([player.real_tokens[row] for row in rows]),
        "ended": mean([player.real_ended[row] for row in rows]),
    }
    if style is not None:
        statistics["style"] = mean(_in_style(texts, style))
    found = {name: estimate(statistic, prompts, seed) for name, statistic in statistics.items()}
    return {**found, **{f"distinct_{size}": distinct(texts, prompts, size) for size in (1, 2)}}


def values(player: Evaluation, *, seed: int, style: str | None) -> dict[str, float]:
    """What is told while a run works, and tracked: the reported half's figures without their intervals."""
    return {name: figure.value for name, figure in panel(player, "report", seed=seed, style=style).items()}


def figure(player: Evaluation, name: str, half: Half, *, seed: int) -> Figure:
    """One of the panel."""
    rows = player.rows(half)
    return estimate(_statistics(player, rows, None)[name](), _prompts(player, rows), seed)


def change(
    before: Evaluation, after: Evaluation, name: str, half: Half, *, seed: int, confidence: float = 0.95
) -> Figure:
    """Of a figure, from one player to another on the same rows; of an AUC in NEAR_HALF, of its distance from 0.5."""
    rows = before.rows(half)
    pair = [_statistics(player, rows, None)[name]() for player in (before, after)]
    if name in NEAR_HALF:
        pair = [off_chance(statistic) for statistic in pair]
    return estimate(difference(*pair), _prompts(before, rows), seed, confidence)


def _prompts(player: Evaluation, rows: Sequence[int]) -> list[int]:
    return [player.prompts[row] for row in rows]


def _statistics(player: Evaluation, rows: Sequence[int], style: str | None) -> dict[str, Callable[[], Statistic]]:
    """By name, each made when it is asked for."""

    def of(values: Sequence[Any]) -> list[Any]:
        return [values[row] for row in rows]

    def minus(these: Sequence[float], those: Sequence[float]) -> list[float]:
        return [one - other for one, other in zip(of(these), of(those), strict=True)]

    def f1() -> Statistic:
        pairs = zip(of(player.greedy_completions), of(player.real_completions), strict=True)
        return mean([token_f1(*pair) for pair in pairs])

    found: dict[str, Callable[[], Statistic]] = {
        "nll": lambda: ratio(of(player.real_nll), of(player.real_tokens)),
        "two_sample_auc": lambda: auc(of(player.real_scores), of(player.generated_scores), of(player.folds)),
        "length_auc": lambda: auc(of(player.real_length_scores), of(player.generated_length_scores), of(player.folds)),
        "f1": f1,
        "tokens": lambda: mean([len(ids) for ids in of(player.generated_ids)]),
        "ended": lambda: mean(of(player.ended)),
        "greedy_tokens": lambda: mean(of(player.greedy_tokens)),
        "greedy_ended": lambda: mean(of(player.greedy_ended)),
    }
    if player.opponent_logps:
        # the implicit rewards, but for β, which changes no order
        real = minus(player.opponent_real_nll, player.real_nll)
        generated = minus(player.policy_logps, player.opponent_logps)
        # completions are sampled from the opponent, so the mean of −log-ratio is KL(opponent ‖ policy), unbiased
        lost, tokens = minus(player.opponent_logps, player.policy_logps), of(player.opponent_tokens)
        found |= {
            "reward_auc": lambda: auc(real, generated),
            "gap": lambda: mean([one - other for one, other in zip(real, generated, strict=True)]),
            "kl": lambda: ratio(lost, tokens),
        }
    if style is not None:
        found["style"] = lambda: mean(_in_style(of(player.completions), style))
    return found


def _in_style(texts: Sequence[str], style: str) -> list[float]:
    """Whether a regular expression matches each text from beginning to end."""
    pattern = re.compile(style)
    return [float(pattern.fullmatch(text.strip()) is not None) for text in texts]
