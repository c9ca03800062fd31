"""The outer loop of self-play (Algorithm 1 of arXiv 2401.01335).

    prepared = prepare(config)
    run(prepared, Path("runs/mine"), progress)

Each phase is cut into pieces that are kept as they finish; called again on the same folder, the loop goes on after
the last of them and ends in the same bytes.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qspin.errors import QspinError
from qspin.evaluate import evaluate
from qspin.files import commit_folder, read_json, read_jsonl, write_json, write_jsonl, write_text
from qspin.generation import Request, generate
from qspin.memory import keep_freed_memory
from qspin.model import Adapter, SlotModel, load_adapter
from qspin.packing import Plan, common_prefix, lengths_of, plan_batches
from qspin.prepare import Prepared
from qspin.progress import Progress
from qspin.record import open_run, verify_base
from qspin.records import Example, Pair, Score
from qspin.report import summary
from qspin.run_dir import IterationDir, RunDir
from qspin.sampling import noise_key
from qspin.scoring import score_pairs
from qspin.training import Task, make_optimizer, step_order, steps_kept, train


def run(prepared: Prepared, out: Path, progress: Progress) -> None:
    """Play all iterations of a configuration into a folder."""
    keep_freed_memory()
    run_dir = RunDir(out)
    with run_dir.lock():
        game = Game(prepared, run_dir, progress)
        game.evaluate(run_dir.base, None)
        for iteration in range(prepared.config.iterations):
            if not run_dir.iteration(iteration).done:
                game.play(iteration)


class Game:
    """One model, one folder, and the steps of an iteration."""

    def __init__(self, prepared: Prepared, run_dir: RunDir, progress: Progress) -> None:
        self.prepared = prepared
        self.config = prepared.config
        self.dir = run_dir
        self.progress = progress
        threads = open_run(prepared, run_dir)
        torch.set_num_threads(threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = SlotModel.load(
            prepared.base, self.config.model, self.config.lora, seed=self.config.seed, device=device
        )
        verify_base(run_dir, self.model)
        # an optimiser that this device lacks should be heard of now, not after hours of generating
        make_optimizer(self.config.train, list(self.model.parameters.values()), device)
        init = self.config.model.init_adapter
        if init is not None:
            self.model.set_adapter(load_adapter(Path(init)))
        self.first_opponent = self.model.adapter()

    def play(self, iteration: int) -> None:
        """One round: the last policy answers, is scored, and is the new policy's starting point."""
        folder = self.dir.iteration(iteration)
        if not folder.adapter.is_dir():
            self.model.set_adapter(self.opponent(iteration))
            self.generate(iteration)
            task = self.score(folder, self.task(folder, iteration, self.pairs(iteration)))
            self.train(folder, task)
        else:
            self.model.set_adapter(load_adapter(folder.adapter))
        shutil.rmtree(folder.snapshots, ignore_errors=True)
        self.evaluate(folder, iteration)

    def opponent(self, iteration: int) -> Adapter:
        """Whom iteration t plays against: what iteration t − 1 ended with."""
        return load_adapter(self.dir.iteration(iteration - 1).adapter) if iteration > 0 else self.first_opponent

    def generate(self, iteration: int) -> None:
        """One completion of each training prompt, sampled from the opponent in the slot."""
        folder, examples, settings = self.dir.iteration(iteration), self.prepared.train, self.config.generation
        plan = _kept(
            folder.generation_plan,
            lambda: {
                "width": settings.width,
                "shards": [
                    list(range(start, min(start + settings.shard_rows, len(examples))))
                    for start in range(0, len(examples), settings.shard_rows)
                ],
            },
        )
        shards = list(enumerate(plan["shards"]))
        missing = [(index, rows) for index, rows in shards if not folder.generated(index).is_file()]
        if not missing:
            return
        todo = sum(len(rows) for _, rows in missing)
        self.progress.phase(
            "generate", iteration=iteration, total=len(examples), done=len(examples) - todo, unit="rows"
        )
        for index, rows in missing:
            started = time.monotonic()
            members = [examples[row] for row in rows]
            write_jsonl(
                folder.generated(index), [pair.to_json() for pair in self._answer(iteration, members, plan["width"])]
            )
            folder.add_seconds("generate", time.monotonic() - started)

    def _answer(self, iteration: int, examples: Sequence[Example], width: int) -> list[Pair]:
        settings, started, tokens = self.config.generation, time.monotonic(), 0

        def on_step(new: int, rows: float) -> None:
            nonlocal tokens
            tokens += new
            self.progress.advance(rows, **{"tokens/s": tokens / (time.monotonic() - started)})

        completions = generate(
            self.model,
            [Request(e.prompt_ids, noise_key(self.config.seed, iteration, e.record_id)) for e in examples],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            width=width,
            stop_ids=self.prepared.stop_ids,
            on_step=on_step,
        )
        return [
            Pair(e.record_id, iteration, e.prompt_ids, e.real_ids, completion.ids, completion.ended)
            for e, completion in zip(examples, completions, strict=True)
        ]

    def pairs(self, iteration: int) -> list[Pair]:
        """What iteration t trains on: its own pairs and those of `train.mix_previous` iterations before it.

        A completion equal to the real one teaches nothing (its gradient is zero) and is left out.
        """
        found: list[Pair] = []
        for past in range(max(0, iteration - self.config.train.mix_previous), iteration + 1):
            folder = self.dir.iteration(past)
            for shard in range(len(read_json(folder.generation_plan)["shards"])):
                found += [Pair.from_json(row) for row in read_jsonl(folder.generated(shard))]
        different = [pair for pair in found if pair.real_ids != pair.generated_ids]
        if not different:
            raise QspinError(
                f"iteration {iteration}: the opponent gives every prompt its real completion, so nothing is left to "
                f"learn; the run is complete with --iterations {iteration}"
            )
        if len(different) < len(found):
            self.progress.note(
                f"iteration {iteration}: {len(found) - len(different)} of {len(found)} pairs left out, "
                "the opponent's completion is the real one"
            )
        return different

    def task(self, folder: IterationDir, iteration: int, pairs: Sequence[Pair]) -> Task:
        """The pairs with their plan, and with the scores that are there already."""
        settings = self.config.train
        prefix = common_prefix([pair.prompt_ids for pair in pairs])
        plan: Plan = _kept(
            folder.training_plan,
            lambda: plan_batches(
                [lengths_of(pair, prefix) for pair in pairs],
                batch_size=settings.batch_size,
                token_budget=settings.tokens_per_micro_batch,
                seed=self.config.seed,
            ),
        )
        return Task(pairs, {}, plan, iteration, self.config.seed, prefix)

    def score(self, folder: IterationDir, task: Task) -> Task:
        """Log-probs of every pair, carried ones too, under the opponent in the slot; a shard an effective batch."""
        self.progress.phase("score", iteration=task.iteration, total=len(task.pairs), done=0, unit="pairs")
        scores: list[Score] = []
        for index, micro_batches in enumerate(task.plan):
            path = folder.scores(index)
            if path.is_file():
                shard = [Score(**row) for row in read_jsonl(path)]
            else:
                started = time.monotonic()
                parts = score_pairs(self.model, task.pairs, micro_batches, task.prefix)
                shard = [score for part in parts for score in part]
                write_jsonl(path, [score.to_json() for score in shard])
                folder.add_seconds("score", time.monotonic() - started)
            self.progress.advance(len(shard))
            scores += shard
        return replace(task, scores={score.key: score for score in scores})

    def train(self, folder: IterationDir, task: Task) -> None:
        """Optimise, then commit the adapter: the next opponent."""
        order = step_order(len(task.plan), self.config.train.epochs, task.seed + task.iteration)
        sizes = [sum(len(micro_batch) for micro_batch in task.plan[batch]) for batch in order]
        kept = sum(sizes[: steps_kept(folder.snapshots)])
        self.progress.phase("train", iteration=task.iteration, total=sum(sizes), done=kept, unit="pairs")
        started = time.monotonic()

        def on_step(metrics: dict[str, float], pairs: int) -> None:
            nonlocal started
            self.progress.advance(pairs, loss=metrics["loss"], margin=metrics["margin"])
            folder.add_seconds("train", time.monotonic() - started)
            started = time.monotonic()

        metrics = train(self.model, task, self.config.train, snapshots=folder.snapshots, on_step=on_step)
        verify_base(self.dir, self.model)
        write_jsonl(folder.metrics, metrics)
        with commit_folder(folder.adapter) as temporary:
            self.model.save_adapter(temporary)

    def evaluate(self, folder: IterationDir, iteration: int | None) -> None:
        """Measure whoever is in the slot on the held-out rows, and write the table anew."""
        if not folder.evaluation.is_file():
            rows = self.prepared.heldout
            self.progress.phase("evaluate", iteration=iteration, total=2 * len(rows), done=0, unit="rows")
            started = time.monotonic()
            result = evaluate(
                self.model, self.prepared.renderer, rows, self.config, self.prepared.stop_ids, self.progress.advance
            )
            write_json(folder.evaluation, result.to_json())
            folder.add_seconds("evaluate", time.monotonic() - started)
        write_text(self.dir.summary, summary(self.dir, self.config))


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    """A plan is made once, before the work, and read back ever after."""
    if not path.is_file():
        write_json(path, make())
    return read_json(path)
