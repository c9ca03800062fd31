"""What an MT-Bench came to: scores and games as figures and tables. Free of torch, so that a report can show it.

A result.json has, of one question file and one judge:

    questions (how many), judge, prompts
    grades: player → {scores: [[question, category, turn, score or null], …], answers: {…}}
    pairs:  "first vs second" → [[question, category, turn, winner or null, whether both orders agree], …]
    figures: what the tables show
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from qspin.figures.panel import Figure, Statistic, difference, estimate, ratio
from qspin.files import read_json

RESULT = "result.json"
ALL = "all"
OURS = "qspin's"  # prompts
FIRST, SECOND, TIE = "first", "second", "tie"
SEED = 0  # of the bootstrap

Table = tuple[str, list[tuple[str, str]], list[list[str]]]  # title, headings with meanings, rows
Scores = Sequence[Sequence[Any]]


def results(trials: Path) -> list[dict[str, Any]]:
    """Of every question file and judge that a run's players were tried with; `trials` is `RunDir.trials`.

    Raises:
        QspinError: one is damaged.
    """
    return [read_json(path) for path in sorted(trials.glob(f"*/*/{RESULT}"))]


def all_tables(trials: Path) -> list[Table]:
    return [table for result in results(trials) for table in tables(result)]


def tables(result: dict[str, Any]) -> list[Table]:
    """Players, then each by category and turn, then comparisons."""
    title = f"MT-Bench: {result['questions']} questions, judged by {plain_name(result['judge'])}"
    if result["prompts"] != OURS:
        title += f" with {plain_name(result['prompts'])}"
    grades = result["grades"]
    found = [_players(title, grades), _categories(f"{title}, by category", grades)] if grades else []
    return found + [_games(f"{title}: {pair}", games) for pair, games in result["pairs"].items()]


def figures(result: dict[str, Any]) -> dict[str, Any]:
    """The same for programs: mean and interval by player, category and turn; games by pair and category."""

    def of(scores: Scores) -> dict[str, Any]:
        parts = {"1": _turn(scores, 1), "2": _turn(scores, 2), "both": scores}
        told = {}
        for name, part in parts.items():
            figure = _mean(part)
            told[name] = {
                **({} if figure is None else figure._asdict()),
                "judged": sum(row[3] is not None for row in part),
                "unparsed": _unparsed(part),
            }
        return told

    def counted(games: Scores) -> dict[str, Any]:
        wins, ties, losses = (_count(games, kind) for kind in (FIRST, TIE, SECOND))
        share = _won(games)
        return {
            "wins": wins, "ties": ties, "losses": losses, "unparsed": _unparsed(games),
            **({} if share is None else share._asdict()),
        }  # fmt: skip

    return {
        "grades": {
            player: {category: of(part) for category, part in _by_category(given["scores"])}
            for player, given in result["grades"].items()
        },
        "pairs": {
            pair: {category: counted(part) for category, part in _by_category(games)}
            for pair, games in result["pairs"].items()
        },
    }


def plain_name(text: str) -> str:
    """A name from outside as plain text, in Markdown as well."""
    return re.sub(r"[^\w./:+ -]", "-", text)[:60]


_PLAYER = ("player", "base: what the run began with; sft: its warm start; a number: what that iteration ended with")
_MEAN = "mean of the judge's ratings, 1 to 10, with its 95% bootstrap interval over questions"
_UNPARSED = "judgements without a verdict that could be read, asked twice; they count in no figure"


def _players(title: str, grades: dict[str, Any]) -> Table:
    first = next(iter(grades))
    columns = [
        _PLAYER,
        ("score", f"{_MEAN}; both turns"),
        ("change", f"against {first}, on the same questions"),
        ("unparsed", _UNPARSED),
        ("cut", "answers that hit the cap on new tokens"),
        ("empty", "turns that could not be put to the model, most often for want of context; judged as empty answers"),
        ("no ref", "judgements in math, reasoning and coding that had no reference answer to go by"),
    ]
    rows = []
    for player, given in grades.items():
        change = _change(grades[first]["scores"], given["scores"]) if player != first else None
        counts = [given["answers"][key] for key in ("cut", "unanswered", "unguided")]
        figures = [_told(_mean(given["scores"])), "" if change is None else change.told("+.2f")]
        rows.append([player, *figures, str(_unparsed(given["scores"])), *map(str, counts)])
    return title, columns, rows


def _categories(title: str, grades: dict[str, Any]) -> Table:
    columns = [
        ("category", "of the questions"),
        _PLAYER,
        ("turn 1", _MEAN),
        ("turn 2", "the same of the second turn, judged with the whole conversation"),
        ("both", "the same of both"),
        ("unparsed", _UNPARSED),
    ]
    cells: dict[str, list[list[str]]] = {}
    for player, given in grades.items():
        for category, own in _by_category(given["scores"]):
            told = (_told(_mean(part), ".1f") for part in (_turn(own, 1), _turn(own, 2), own))
            cells.setdefault(category, []).append([player, *told, str(_unparsed(own))])
    rows = [
        ["" if place else plain_name(category), *row]
        for category, own in cells.items()
        for place, row in enumerate(own)
    ]
    return title, columns, rows


def _games(title: str, games: Scores) -> Table:
    columns = [
        ("category", "of the questions; then each turn, then all"),
        ("wins", "of the first player: in both orders of the two answers the judge prefers it"),
        ("ties", "neither is preferred in both orders"),
        ("losses", "the second is, in both"),
        ("won", "wins and half of the ties, with the 95% bootstrap interval over questions; 50% is a draw"),
        ("torn", "ties whose two orders have two winners: a judge that goes by places has many"),
        ("unparsed", "pairs of judgements of which one has no verdict that could be read, asked twice"),
    ]
    parts = list(_by_category(games))
    parts[-1:-1] = [(f"turn {turn}", _turn(games, turn)) for turn in (1, 2)]
    rows = []
    for name, part in parts:
        share = _won(part)
        won = "-" if share is None else f"{share.value:.0%} [{100 * share.low:.0f}, {100 * share.high:.0f}]"
        counts = [str(_count(part, kind)) for kind in (FIRST, TIE, SECOND)]
        torn = sum(row[3] == TIE and not row[4] for row in part)
        rows.append([plain_name(name), *counts, won, str(torn), str(_unparsed(part))])
    return title, columns, rows


def _by_category(rows: Scores) -> Iterator[tuple[str, Scores]]:
    """In the order of the questions; all of them last."""
    for category in dict.fromkeys(row[1] for row in rows):
        yield category, [row for row in rows if row[1] == category]
    yield ALL, rows


def _turn(rows: Scores, turn: int) -> Scores:
    return [row for row in rows if row[2] == turn]


def _unparsed(rows: Scores) -> int:
    return sum(row[3] is None for row in rows)


def _count(games: Scores, kind: str) -> int:
    return sum(row[3] == kind for row in games)


def _mean(scores: Scores) -> Figure | None:
    return _estimated(scores, lambda row: row[3])


def _won(games: Scores) -> Figure | None:
    return _estimated(games, lambda row: {FIRST: 1.0, TIE: 0.5, SECOND: 0.0}[row[3]])


def _estimated(rows: Scores, value: Callable[[Sequence[Any]], float]) -> Figure | None:
    """Over questions, both turns of one drawn together; None where nothing was judged."""
    judged = [row for row in rows if row[3] is not None]
    names = list(dict.fromkeys(row[0] for row in judged))
    return estimate(_ratio(judged, names, value), range(len(names)), SEED) if names else None


def _ratio(rows: Scores, names: Sequence[Any], value: Callable[[Sequence[Any]], float]) -> Statistic:
    own = [[value(row) for row in rows if row[0] == name] for name in names]
    return ratio([sum(values) for values in own], [len(values) for values in own])


def _change(before: Scores, after: Scores) -> Figure | None:
    """On the turns that both were graded on."""
    judged = [{(row[0], row[2]): row for row in scores if row[3] is not None} for scores in (before, after)]
    shared = [key for key in judged[0] if key in judged[1]]
    names = list(dict.fromkeys(name for name, _ in shared))
    if not names:
        return None
    sides = [_ratio([rows[key] for key in shared], names, lambda row: row[3]) for rows in judged]
    return estimate(difference(*sides), range(len(names)), SEED)


def _told(figure: Figure | None, spec: str = ".2f") -> str:
    return "-" if figure is None else figure.told(spec)
