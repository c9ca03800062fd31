"""Evaluations that were made up, for tests of what follows from them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from qspin.figures.evaluation import Evaluation, two_samples

WORDS = ["red", "green", "blue", "black", "white", "brown", "pink", "grey"]


def texts(rows: int, seed: int, length: int = 10, words: list[str] = WORDS) -> list[str]:
    generator = np.random.default_rng(seed)
    return [" ".join(generator.choice(words, size=length)) for _ in range(rows)]


def made(rows: int = 128, seed: int = 1, **fields: Any) -> Evaluation:
    """A player that had no opponent; its completions come from the real ones' distribution and end by themselves.

    Rows are reported and chosen by in turn. A field that is given takes the place of the made one; the two-sample
    scores are made of `completions` and `real_completions`.
    """
    real, generated = (fields.get(name) for name in ("real_completions", "completions"))
    real = texts(rows, 0) if real is None else real
    generated = texts(rows, seed) if generated is None else generated
    lengths = [[len(text.split()) for text in side] for side in (real, generated)]
    prompts, reported = list(range(rows)), [row % 2 == 0 for row in range(rows)]
    found: dict[str, Any] = {
        "prompts": prompts,
        "reported": reported,
        "real_nll": [30.0] * rows,
        "real_tokens": lengths[0],
        "real_ended": [True] * rows,
        "real_completions": real,
        "generated_ids": [[1] * length for length in lengths[1]],
        "generated_logps": [-20.0] * rows,
        "ended": [True] * rows,
        "completions": generated,
        "greedy_tokens": lengths[1],
        "greedy_ended": [True] * rows,
        "greedy_completions": generated,
        "opponent_real_nll": [],
        "opponent_tokens": [],
        "opponent_logps": [],
        "policy_logps": [],
    }
    found |= two_samples((real, generated), (lengths[0], lengths[1]), prompts, reported)
    return Evaluation(**{**found, **fields})


def after(
    opponent: Evaluation, seed: int = 2, *, real_gain: float = 0.0, generated_gain: float = 0.0, **fields: Any
) -> Evaluation:
    """A player that was trained against one.

    Args:
        real_gain: nats by which it finds the real completions likelier than its opponent does, on average over rows.
        generated_gain: the same of its opponent's completions.
    """
    rows = len(opponent.prompts)
    noise = np.random.default_rng(seed).normal(0, 1, size=(2, rows))
    real_nll = [was - real_gain - float(part) for was, part in zip(opponent.real_nll, noise[0], strict=True)]
    policy = [was + generated_gain + float(part) for was, part in zip(opponent.generated_logps, noise[1], strict=True)]
    player = made(
        rows,
        seed,
        **{"real_completions": opponent.real_completions, "real_nll": real_nll, "policy_logps": policy, **fields},
    )
    return replace(
        player,
        opponent_real_nll=opponent.real_nll,
        opponent_tokens=[len(ids) for ids in opponent.generated_ids],
        opponent_logps=opponent.generated_logps,
    )
