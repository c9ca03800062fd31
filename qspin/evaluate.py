"""What a player does on held-out rows: how likely it finds the real completions, and what it answers itself."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from qspin.chat import Renderer
from qspin.config import RunConfig
from qspin.generation import Request, generate
from qspin.model import SlotModel
from qspin.packing import common_prefix, lengths_of, pack_row, plan_batches
from qspin.records import Example, Pair
from qspin.sampling import noise_key
from qspin.scoring import pair_logps

RESAMPLES = 2000
TOKENS_AT_ONCE = 1024  # nothing is kept for a backward pass, so this is little memory
SHARD = 64  # rows answered between two signs of life


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One player on the held-out rows; lists run over rows."""

    real_nll: list[float]  # −log p of the real completion, nats, summed over tokens
    real_tokens: list[int]
    generated_tokens: list[int]
    ended: list[bool]  # the completion ended by itself
    completions: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def nll(self) -> float:
        """Nats a token of the real completions."""
        return sum(self.real_nll) / sum(self.real_tokens)

    @property
    def ended_share(self) -> float:
        return sum(self.ended) / len(self.ended)

    def figures(self, style: str | None) -> dict[str, float]:
        """What is shown and tracked of it."""
        found = {
            "nll": self.nll,
            "ended": self.ended_share,
            "tokens": sum(self.generated_tokens) / len(self.generated_tokens),
        }
        return found if style is None else {**found, "style": self.style_share(style)}

    def style_share(self, style: str) -> float:
        """Share of the completions that a regular expression matches from beginning to end."""
        pattern = re.compile(style)
        return sum(pattern.fullmatch(text.strip()) is not None for text in self.completions) / len(self.completions)


def evaluate(
    model: SlotModel,
    renderer: Renderer,
    heldout: Sequence[Example],
    config: RunConfig,
    *,
    stop_ids: frozenset[int],
    width: int,
    on_rows: Callable[[float], None],
    tokens_at_once: int = TOKENS_AT_ONCE,
) -> Evaluation:
    """Score the real completions and sample one of each prompt, under whoever is in the slot.

    Every player is given the same random numbers, so that two players differ by what they are.
    `on_rows` hears of rows done, each row counted once when scored and once when answered.
    """
    real_nll = _real_nll(model, heldout, on_rows, tokens_at_once)
    completions = []
    for start in range(0, len(heldout), SHARD):
        rows = heldout[start : start + SHARD]
        completions += generate(
            model,
            [Request(row.prompt_ids, noise_key(config.seed, 0, f"held-out {row.record_id}")) for row in rows],
            max_new_tokens=config.generation.max_new_tokens,
            temperature=config.generation.temperature,
            top_p=config.generation.top_p,
            width=width,
            stop_ids=stop_ids,
            on_step=lambda _tokens, done: on_rows(done),
        )
    return Evaluation(
        real_nll=real_nll,
        real_tokens=[len(row.real_ids) for row in heldout],
        generated_tokens=[len(completion.ids) for completion in completions],
        ended=[completion.ended for completion in completions],
        completions=[renderer.completion_text(completion.ids) for completion in completions],
    )


def _real_nll(
    model: SlotModel, heldout: Sequence[Example], on_rows: Callable[[float], None], tokens_at_once: int
) -> list[float]:
    rows = [Pair(row.record_id, 0, row.prompt_ids, row.real_ids, (), ended=True) for row in heldout]
    prefix = common_prefix([row.prompt_ids for row in rows])
    [micro_batches] = plan_batches(
        [lengths_of(row, prefix) for row in rows], batch_size=len(rows), token_budget=tokens_at_once, seed=0
    )
    nll = [0.0] * len(rows)
    for micro_batch in micro_batches:
        with torch.no_grad():
            real, _ = pair_logps(model, pack_row([rows[index] for index in micro_batch], model.device, prefix))
        for index, value in zip(micro_batch, real.tolist(), strict=True):
            nll[index] = -value
        on_rows(len(micro_batch))
    return nll


def nll_change(before: Evaluation, after: Evaluation, seed: int = 0) -> tuple[float, float, float]:
    """Change of the NLL a token, and its 95% interval by a paired bootstrap over rows (percentile method)."""
    difference = np.array(after.real_nll) - np.array(before.real_nll)
    tokens = np.array(after.real_tokens, dtype=float)
    picks = np.random.default_rng(seed).integers(len(tokens), size=(RESAMPLES, len(tokens)))
    changes = difference[picks].sum(1) / tokens[picks].sum(1)
    low, high = np.quantile(changes, [0.025, 0.975])
    return float(difference.sum() / tokens.sum()), float(low), float(high)
