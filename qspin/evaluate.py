"""A player on held-out rows: what it answers, and how likely it finds that, the real completions and its opponent's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

from qspin.chat import Renderer
from qspin.config import RunConfig
from qspin.figures.evaluation import Evaluation, halves, two_samples
from qspin.fitting.footprint import EVALUATED_ROWS
from qspin.generation import Completion, Request, generate
from qspin.model import SlotModel
from qspin.packing import MicroBatch, common_prefix, lengths_of, plan_batches
from qspin.processes.dealing import complete_together, score_together
from qspin.processes.workers import ALONE, Crew
from qspin.records import Example, Pair, Score
from qspin.sampling import noise_key
from qspin.scoring import score_pairs

TOKENS_AT_ONCE = 1024  # nothing is kept for a backward pass, so this is little memory


def evaluate(
    model: SlotModel,
    renderer: Renderer,
    heldout: Sequence[Example],
    config: RunConfig,
    *,
    opponent: Evaluation | None,
    stop_ids: frozenset[int],
    width: int,
    unpacked: bool | None = None,
    on_rows: Callable[[float], None],
    tokens_at_once: int = TOKENS_AT_ONCE,
    crew: Crew = ALONE,
) -> Evaluation:
    """Whoever is in the slot.

    Completions are sampled at temperature 1 from the whole distribution, whatever `generation` says: the figures are
    about the model's distribution. Every player is given the same random numbers, so that two differ by what they are.

    Args:
        opponent: the player that it was trained against; None for the first one.
        unpacked: as for `generate`.
        on_rows: hears of rows done, `progress.evaluation_units` in all.
    """
    cap = config.generation.max_new_tokens
    requests = [Request(row.prompt_ids, noise_key(config.seed, 0, f"held-out {row.record_id}")) for row in heldout]

    def answers(temperature: float) -> list[Completion]:
        settings = {
            "max_new_tokens": cap,
            "temperature": temperature,
            "top_p": 1.0,
            "width": width,
            "unpacked": unpacked,
            "stop_ids": sorted(stop_ids),
        }
        size = min(EVALUATED_ROWS, -(-len(requests) // crew.count))
        groups = [requests[start : start + size] for start in range(0, len(requests), size)]
        found: list[Completion] = []
        for start in range(0, len(groups), crew.count):
            found += answer_side_by_side(groups[start : start + crew.count], settings)
        return found

    def answer_side_by_side(groups: Sequence[Sequence[Request]], settings: dict[str, Any]) -> list[Completion]:
        """A group each process."""
        share = sum(map(len, groups)) / len(groups[0])  # of this process's progress, what is done by all

        def own(requests: Sequence[Request]) -> list[Completion]:
            return generate(model, requests, **settings, on_step=lambda _tokens, done: on_rows(done * share))

        return [completion for group in complete_together(crew, groups, settings, own) for completion in group]

    sampled, greedy = answers(1.0), answers(0.0)
    own = [_pair(row, row.real_ids, answer.ids) for row, answer in zip(heldout, sampled, strict=True)]
    real_logps, generated_logps = _logps(model, own, on_rows, tokens_at_once, crew)
    policy_logps: list[float] = []
    if opponent is not None:
        theirs = [_pair(row, (), tuple(ids)) for row, ids in zip(heldout, opponent.generated_ids, strict=True)]
        _, policy_logps = _logps(model, theirs, on_rows, tokens_at_once, crew)

    numbers = {prompt: number for number, prompt in enumerate(dict.fromkeys(row.prompt_ids for row in heldout))}
    prompts = [numbers[row.prompt_ids] for row in heldout]
    if len(numbers) == 1:  # nothing but rows to split by
        prompts = list(range(len(heldout)))
    reported = halves([row.record_id for row in heldout], prompts, config.seed)
    real_cut = [row.real_ids[:cap] for row in heldout]
    texts = [[renderer.completion_text(ids) for ids in side] for side in (real_cut, [a.ids for a in sampled])]
    return Evaluation(
        prompts=prompts,
        reported=reported,
        real_nll=[-value for value in real_logps],
        real_tokens=[len(row.real_ids) for row in heldout],
        real_ended=[ids[-1] in stop_ids for ids in real_cut],
        real_completions=texts[0],
        generated_ids=[list(answer.ids) for answer in sampled],
        generated_logps=generated_logps,
        ended=[answer.ended for answer in sampled],
        completions=texts[1],
        greedy_tokens=[len(answer.ids) for answer in greedy],
        greedy_ended=[answer.ended for answer in greedy],
        greedy_completions=[renderer.completion_text(answer.ids) for answer in greedy],
        opponent_real_nll=[] if opponent is None else opponent.real_nll,
        opponent_tokens=[] if opponent is None else [len(ids) for ids in opponent.generated_ids],
        opponent_logps=[] if opponent is None else opponent.generated_logps,
        policy_logps=policy_logps,
        **two_samples(
            (texts[0], texts[1]),
            ([len(ids) for ids in real_cut], [len(answer.ids) for answer in sampled]),
            prompts,
            reported,
        ),
    )


def _pair(row: Example, real: tuple[int, ...], generated: tuple[int, ...]) -> Pair:
    return Pair(row.record_id, 0, row.prompt_ids, real, generated, ended=True)


def _logps(
    model: SlotModel, rows: Sequence[Pair], on_rows: Callable[[float], None], tokens_at_once: int, crew: Crew
) -> tuple[list[float], list[float]]:
    """Of the real and of the generated completions, in the order of the rows."""
    prefix = common_prefix([row.prompt_ids for row in rows])
    [micro_batches] = plan_batches(
        [lengths_of(row, prefix) for row in rows],
        batch_size=len(rows),
        token_budget=tokens_at_once,
        seed=0,
        workers=crew.count,
    )

    def own(dealt: Sequence[MicroBatch]) -> list[list[Score]]:
        share = len(rows) / sum(map(len, dealt))
        found = []
        for scores in score_pairs(model, rows, dealt, prefix):
            found.append(scores)
            on_rows(len(scores) * share)
        return found

    made = score_together(crew, rows, micro_batches, prefix, own)
    scores = dict(zip(chain(*micro_batches), chain(*made), strict=True))
    ordered = [scores[index] for index in range(len(rows))]
    return [score.opponent_real_logps for score in ordered], [score.opponent_generated_logps for score in ordered]
