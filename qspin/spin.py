"""The outer loop of self-play (Algorithm 1 of arXiv 2401.01335).

    prepared = prepare(config)
    run(prepared, Path("runs/mine"), progress)

Each phase is cut into pieces that are kept as they finish; called again on the same folder, the loop goes on after
the last of them and ends in the same bytes.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from qspin.adapters import Adapter, load_adapter
from qspin.budget import rows_at_once, smaller, token_budget
from qspin.errors import QspinError
from qspin.evaluate import evaluate
from qspin.files import commit_folder, read_json, read_jsonl, write_json, write_jsonl, write_text
from qspin.generation import Completion, Request, generate
from qspin.memory import OutOfMemory, keep_freed_memory, refusals_told
from qspin.model import SlotModel
from qspin.optimisation import Metrics, make_optimizer, step_order, steps_kept
from qspin.packing import Plan, common_prefix, lengths_of, plan_batches
from qspin.prepare import Prepared
from qspin.progress import Progress
from qspin.record import open_run, remembered, verify_base
from qspin.records import Pair, Score
from qspin.report import summary
from qspin.run_dir import IterationDir, RunDir
from qspin.sampling import noise_key
from qspin.scoring import score_pairs
from qspin.training import Task
from qspin.training import train as train_pairs
from qspin.warm_start import train_supervised

SAMPLE_SECONDS = 10  # between two completions that are shown: nobody reads faster


def run(prepared: Prepared, out: Path, progress: Progress) -> None:
    """Play all iterations of a configuration into a folder."""
    keep_freed_memory()
    run_dir = RunDir(out)
    try:
        with run_dir.lock(), refusals_told():
            game = Game(prepared, run_dir, progress)
            game.evaluate(run_dir.base, None)
            game.warm_start()
            for iteration in range(prepared.config.iterations):
                if not run_dir.iteration(iteration).done:
                    game.play(iteration)
    except OutOfMemory as error:
        raise QspinError(
            f"out of memory ({error}); close other programs, set generation.width lower, or take a smaller model"
        ) from None


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
        self.width = self._width()
        self.budget: int | None = None  # tokens at once, once found
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
            self.learn(folder, iteration)
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
                "width": self.width,
                "shards": [
                    list(range(start, min(start + settings.shard_rows, len(examples))))
                    for start in range(0, len(examples), settings.shard_rows)
                ],
            },
        )
        shards = list(enumerate(plan["shards"]))
        missing = [(index, rows) for index, rows in shards if not folder.generated(index).is_file()]

        def begin() -> None:
            done = len(examples) - sum(len(rows) for _, rows in missing)
            self.progress.phase("generate", iteration=iteration, total=len(examples), done=done, unit="rows")

        if missing:
            begin()
        while missing:
            index, rows = missing[0]
            started = time.monotonic()
            try:
                with refusals_told():
                    pairs = self._answer(iteration, rows, plan["width"])
            except OutOfMemory:
                if plan["width"] == 1:
                    raise
                plan["width"] //= 2
                write_json(folder.generation_plan, plan)
                self.progress.note(f"memory does not hold so many completions; on with {plan['width']} side by side")
                begin()  # what was done of this shard is lost
                continue
            write_jsonl(folder.generated(index), [pair.to_json() for pair in pairs])
            folder.add_seconds("generate", time.monotonic() - started)
            missing.pop(0)

    def _width(self) -> int:
        """Completions decoded side by side; if found from memory, then once, for the whole run."""
        if isinstance(self.config.generation.width, int):
            return self.config.generation.width
        rows = (*self.prepared.train, *self.prepared.heldout)
        places = max(len(row.prompt_ids) for row in rows) + self.config.generation.max_new_tokens
        width: int = remembered(self.dir, "width", lambda: rows_at_once(self.model, places))
        return width

    def _answer(self, iteration: int, rows: Sequence[int], width: int) -> list[Pair]:
        """One completion of each of these training rows."""
        examples, settings = [self.prepared.train[row] for row in rows], self.config.generation
        started, tokens, shown = time.monotonic(), 0, -math.inf

        def on_step(new: int, done: float) -> None:
            nonlocal tokens
            tokens += new
            self.progress.advance(done, **{"tokens/s": tokens / (time.monotonic() - started)})

        def on_done(index: int, completion: Completion) -> None:
            nonlocal shown
            if time.monotonic() - shown >= SAMPLE_SECONDS:
                shown = time.monotonic()
                text = self.prepared.renderer.completion_text(completion.ids)
                self.progress.sampled(self.prepared.train_prompts[rows[index]], text)

        completions = generate(
            self.model,
            [Request(e.prompt_ids, noise_key(self.config.seed, iteration, e.record_id)) for e in examples],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            width=width,
            stop_ids=self.prepared.stop_ids,
            on_step=on_step,
            on_done=on_done,
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

    def learn(self, folder: IterationDir, iteration: int) -> None:
        """Score the opponent, then train against it."""
        pairs = self.pairs(iteration)

        def work(plan: Plan, prefix: int) -> None:
            task = self.score(folder, Task(pairs, {}, plan, iteration, self.config.seed, prefix))
            train = self.config.train
            self.optimise(
                folder,
                plan,
                lambda on_step: train_pairs(self.model, task, train, snapshots=folder.snapshots, on_step=on_step),
                phase="train",
                iteration=iteration,
                order=step_order(len(plan), train.epochs, task.seed + iteration),
            )

        self.fit(folder, pairs, work, start=self.opponent(iteration))

    def warm_start(self) -> None:
        """For a base that was never fine-tuned: its adapter learns the real completions, and is the first opponent."""
        folder, sft = self.dir.warm_start, self.config.sft
        if not sft.epochs:
            return
        rows = [Pair(e.record_id, 0, e.prompt_ids, e.real_ids, (), ended=True) for e in self.prepared.train]

        def work(plan: Plan, prefix: int) -> None:
            self.optimise(
                folder,
                plan,
                lambda on_step: train_supervised(
                    self.model, rows, plan, self.config, prefix=prefix, snapshots=folder.snapshots, on_step=on_step
                ),
                phase="warm start",
                iteration=None,
                order=step_order(len(plan), sft.epochs, self.config.seed),
            )

        self.model.set_adapter(self.first_opponent)
        self.fit(folder, rows, work, start=self.first_opponent)
        self.budget = None  # found for rows half as long as those to come
        self.first_opponent = load_adapter(folder.adapter)
        self.model.set_adapter(self.first_opponent)
        shutil.rmtree(folder.snapshots, ignore_errors=True)
        self.evaluate(folder, None)

    def fit(
        self, folder: IterationDir, pairs: Sequence[Pair], work: Callable[[Plan, int], None], *, start: Adapter
    ) -> None:
        """Do what commits an adapter, by a plan; in smaller micro-batches, from the start, if memory does not hold one.

        Args:
            work: what to do, given the plan and how many tokens all prompts begin with.
            start: who is in the slot.
        """
        prefix = common_prefix([pair.prompt_ids for pair in pairs])
        while not folder.adapter.is_dir():
            plan = self.plan(folder, pairs, prefix)
            try:
                with refusals_told():
                    work(plan, prefix)
            except OutOfMemory:
                self.budget = smaller(pairs, plan, prefix)
                shutil.rmtree(folder.scores(0).parent, ignore_errors=True)  # before the plan that they belong to
                folder.training_plan.unlink()
                self.model.set_adapter(start)
                self.progress.note(f"memory does not hold so many tokens; on with {self.budget} at once")

    def plan(self, folder: IterationDir, pairs: Sequence[Pair], prefix: int) -> Plan:
        """Effective batches and micro-batches, kept."""
        lengths, train = [lengths_of(pair, prefix) for pair in pairs], self.config.train

        def plan(budget: int) -> Plan:
            return plan_batches(lengths, batch_size=train.batch_size, token_budget=budget, seed=self.config.seed)

        def make() -> Plan:
            asked = train.tokens_per_micro_batch
            if self.budget is None:
                self.model.use_gradient_checkpointing(train.gradient_checkpointing)
                self.budget = asked if isinstance(asked, int) else token_budget(self.model, pairs, plan, prefix)
            return plan(self.budget)

        found: Plan = _kept(folder.training_plan, make)
        return found

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

    def optimise(
        self,
        folder: IterationDir,
        plan: Plan,
        work: Callable[[Callable[[Metrics, int], None]], list[Metrics]],
        *,
        phase: str,
        iteration: int | None,
        order: Sequence[int],
    ) -> None:
        """Optimise, then commit the adapter: the next opponent."""
        sizes = [sum(len(micro_batch) for micro_batch in plan[batch]) for batch in order]
        kept = sum(sizes[: steps_kept(folder.snapshots)])
        self.progress.phase(phase, iteration=iteration, total=sum(sizes), done=kept, unit="pairs")
        started = time.monotonic()

        def on_step(metrics: Metrics, pairs: int) -> None:
            nonlocal started
            self.progress.advance(pairs, **metrics)
            folder.add_seconds("train", time.monotonic() - started)
            started = time.monotonic()

        metrics = work(on_step)
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
                self.model,
                self.prepared.renderer,
                rows,
                self.config,
                stop_ids=self.prepared.stop_ids,
                width=self.width,
                on_rows=self.progress.advance,
            )
            self.progress.advance(0, **result.figures(self.config.evaluation.style))
            write_json(folder.evaluation, result.to_json())
            folder.add_seconds("evaluate", time.monotonic() - started)
        write_text(self.dir.summary, summary(self.dir, self.config))


def _kept(path: Path, make: Callable[[], Any]) -> Any:
    """A plan is made once, before the work, and read back ever after."""
    if not path.is_file():
        write_json(path, make())
    return read_json(path)
