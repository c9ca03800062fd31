"""Generating: the opponent answers every training prompt, a shard of rows at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qspin.errors import QspinError
from qspin.files import kept_json, write_json, write_jsonl
from qspin.fitting.memory import ATTEMPTS, OutOfMemory, refusals_told
from qspin.generation import Completion, Request, generate
from qspin.phases.game import Game
from qspin.processes.dealing import complete_together
from qspin.records import Pair
from qspin.sampling import noise_key
from qspin.stopping import check_stop, clock

SAMPLE_SECONDS = 10  # between two completions that are shown: nobody reads faster


def answer(game: Game, iteration: int) -> None:
    """One completion of each training prompt, sampled from iteration t's opponent."""
    folder, rows = game.dir.iteration(iteration), len(game.prepared.train)
    size = min(game.config.generation.shard_rows, -(-rows // game.crew.count))
    plan: dict[str, Any] = kept_json(
        folder.generation_plan,
        lambda: {
            "width": game.width,
            "shards": [list(range(start, min(start + size, rows))) for start in range(0, rows, size)],
        },
    )
    missing = [shard for shard in enumerate(plan["shards"]) if not folder.generated(shard[0]).is_file()]
    asked = game.config.generation.width
    # a process that the system killed for want of memory could not lower it itself
    if missing and isinstance(asked, int) and asked < plan["width"]:
        plan["width"] = asked
        write_json(folder.generation_plan, plan)

    def begin() -> None:
        done = rows - sum(len(shard) for _, shard in missing)
        game.progress.phase("generate", iteration=iteration, total=rows, done=done, unit="rows")

    if missing:
        game.model.set_adapter(game.opponent(iteration))
        unpacked = game.unpacked()
        begin()
    failures = 0
    while missing:
        shards = missing[: game.crew.count]  # one for each process
        try:
            with refusals_told(), game.counted(folder, "generate"):
                made = _pairs(game, iteration, [shard for _, shard in shards], plan["width"], unpacked=unpacked)
                for (index, _), pairs in zip(shards, made, strict=True):
                    write_jsonl(folder.generated(index), [pair.to_json() for pair in pairs])
        except OutOfMemory as error:
            failures += 1
            if failures == ATTEMPTS or plan["width"] == 1:
                raise QspinError(
                    f"generate: out of memory {failures} times in a row, with {plan['width']} completions side by side "
                    f"in the end ({error}); close other programs, or set generation.width lower"
                ) from None
            plan["width"] //= 2
            write_json(folder.generation_plan, plan)
            game.progress.note(f"memory does not hold so many completions; on with {plan['width']} side by side")
            begin()  # what was done of these shards is lost
            continue
        del missing[: len(shards)]
        failures = 0


def _pairs(
    game: Game, iteration: int, shards: Sequence[Sequence[int]], width: int, *, unpacked: bool
) -> list[list[Pair]]:
    """One completion of each of the training rows of some shards, by whoever is in the slot; the first is this
    process's own."""
    prepared, config = game.prepared, game.config.generation
    rows = shards[0]
    examples = [[prepared.train[row] for row in shard] for shard in shards]
    settings: dict[str, Any] = {
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "top_p": config.top_p,
        "width": width,
        "unpacked": unpacked,
        "stop_ids": sorted(prepared.stop_ids),
    }
    share = sum(map(len, shards)) / len(rows)  # of this process's progress, what is done by all
    started, tokens, shown = clock(), 0.0, -math.inf

    def on_step(new: int, done: float) -> None:
        nonlocal tokens
        check_stop()
        tokens += new * share
        game.progress.advance(done * share, **{"tokens/s": tokens / (clock() - started)})

    def on_done(index: int, completion: Completion) -> None:
        nonlocal shown
        if clock() - shown >= SAMPLE_SECONDS:
            shown = clock()
            text = prepared.renderer.completion_text(completion.ids)
            game.progress.sampled(prepared.train_prompts[rows[index]], text)

    completions = complete_together(
        game.crew,
        [
            [Request(e.prompt_ids, noise_key(game.config.seed, iteration, e.record_id)) for e in part]
            for part in examples
        ],
        settings,
        lambda requests: generate(game.model, requests, **settings, on_step=on_step, on_done=on_done),
    )
    return [
        [
            Pair(e.record_id, iteration, e.prompt_ids, e.real_ids, completion.ids, completion.ended)
            for e, completion in zip(part, made, strict=True)
        ]
        for part, made in zip(examples, completions, strict=True)
    ]
