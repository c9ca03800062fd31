"""Learning: what is in the slot is trained by a plan, and committed as the next opponent.

Self-play scores its pairs under the opponent first; a warm start learns real completions alone. Both are fitted into
memory in the same way.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from qspin.adapters import Adapter
from qspin.budget import smaller, token_budget
from qspin.config import TrainConfig
from qspin.errors import QspinError, some
from qspin.files import commit_folder, kept_json, read_json, read_jsonl, remove, write_json, write_jsonl
from qspin.fitting.at_once import Budget, recomputable
from qspin.fitting.memory import ATTEMPTS, OutOfMemory, refusals_told
from qspin.optimisation import Metrics, step_order, steps_kept
from qspin.packing import Plan, common_prefix, lengths_of, plan_batches
from qspin.phases.game import Game
from qspin.processes.dealing import score_together
from qspin.record import verify_base
from qspin.records import Pair, Score
from qspin.run_dir import IterationDir
from qspin.scoring import score_pairs
from qspin.stopping import check_stop, stops_held
from qspin.training import Task, train
from qspin.warm_start import train_supervised


def learn(game: Game, iteration: int) -> None:
    """Score the pairs under iteration t's opponent, then train against it."""
    folder, config = game.dir.iteration(iteration), game.config
    pairs = _pairs(game, iteration)
    game.budget = game.budget or _kept_budget(game, iteration)

    def work(plan: Plan, prefix: int) -> None:
        task = _score(game, folder, Task(pairs, {}, plan, iteration, config.seed, prefix))
        _optimise(
            game,
            folder,
            plan,
            lambda on_step: train(
                game.model, task, config.train, snapshots=folder.snapshots, on_step=on_step, crew=game.crew
            ),
            phase="train",
            iteration=iteration,
            order=task.order(config.train.epochs),
        )

    _fit(game, folder, pairs, work, start=game.opponent(iteration))


def warm_start(game: Game) -> None:
    """For a base that was never fine-tuned: its adapter learns the real completions, and is the first opponent."""
    sft, seed = game.config.sft, game.config.seed
    _learn_real(
        game,
        game.dir.warm_start,
        lr=sft.lr,
        order=lambda plan: step_order(len(plan), sft.epochs, seed),
        start=game.start,
        phase="warm start",
        iteration=None,
    )


def learn_alike(game: Game, folder: IterationDir, index: int, *, lr: float, start: Adapter) -> None:
    """What iteration `index` did, supervised: as many steps on batches as large, of real completions alone."""
    played = game.dir.iteration(index)
    steps = len(played.steps())
    if not steps:  # their metrics were damaged, which are for show
        steps = len(read_json(played.training_plan)["batches"]) * game.config.train.epochs
    seed = game.config.seed + index
    _learn_real(
        game,
        folder,
        lr=lr,
        order=lambda plan: step_order(len(plan), -(-steps // len(plan)), seed)[:steps],
        start=start,
        phase="train",
        iteration=index,
    )


def _learn_real(
    game: Game,
    folder: IterationDir,
    *,
    lr: float,
    order: Callable[[Plan], list[int]],
    start: Adapter,
    phase: str,
    iteration: int | None,
) -> None:
    """Train on the real completions of all rows, and commit the adapter."""
    rows = [Pair(e.record_id, 0, e.prompt_ids, e.real_ids, (), ended=True) for e in game.prepared.train]

    def work(plan: Plan, prefix: int) -> None:
        _optimise(
            game,
            folder,
            plan,
            lambda on_step: train_supervised(
                game.model,
                rows,
                plan,
                game.config.train,
                lr=lr,
                order=order(plan),
                prefix=prefix,
                snapshots=folder.snapshots,
                on_step=on_step,
                crew=game.crew,
            ),
            phase=phase,
            iteration=iteration,
            order=order(plan),
        )

    _fit(game, folder, rows, work, start=start)
    game.budget = None  # found for rows half as long as pairs are


def _pairs(game: Game, iteration: int) -> list[Pair]:
    """What iteration t trains on.

    A completion equal to the real one teaches nothing (its gradient is zero) and is left out, unless the real one is
    learnt for itself as well.
    """
    found: list[Pair] = []
    for past in game.config.train.learnt_from(iteration):
        found += game.dir.iteration(past).pairs()
    if game.config.train.sft_weight:
        return found
    different = [pair for pair in found if pair.real_ids != pair.generated_ids]
    if not different:
        advice = f"the run is complete with --iterations {iteration}" if iteration else "take other rows"
        raise QspinError(
            f"iteration {iteration}: the opponent gives every prompt its real completion, so nothing is left to "
            f"learn; {advice}"
        )
    if len(different) < len(found):
        game.progress.note(
            f"iteration {iteration}: {len(found) - len(different)} of {len(found)} pairs left out, "
            "the opponent's completion is the real one"
        )
    return different


def _fit(
    game: Game, folder: IterationDir, pairs: Sequence[Pair], work: Callable[[Plan, int], None], *, start: Adapter
) -> None:
    """Do what commits an adapter, by a plan; in smaller micro-batches if memory does not hold one.

    Args:
        work: what to do, given the plan and how many tokens all prompts begin with.
        start: who is put into the slot.
    """
    prefix, config = common_prefix([pair.prompt_ids for pair in pairs]), game.config.train
    _forget_figures(game, folder)
    _heed_other_pairs(game, folder, pairs)
    _heed_lower_budget(game, folder, pairs, prefix)
    failures, reached = 0, steps_kept(folder.snapshots)
    while not folder.adapter.is_dir():
        game.model.set_adapter(start)
        plan, recomputed = _plan(game, folder, pairs, prefix)
        game.recompute(recomputed)
        try:
            with refusals_told():
                work(plan, prefix)
        except OutOfMemory as error:
            if recomputed < _recomputable(game)[-1]:
                _recompute_all(game, folder)
                continue
            failures = 1 if steps_kept(folder.snapshots) > reached else failures + 1
            reached = steps_kept(folder.snapshots)
            if failures == ATTEMPTS:
                assert game.budget is not None
                recompute = "" if config.gradient_checkpointing else "set train.gradient_checkpointing=true, "
                raise QspinError(
                    f"{folder.path.name}: out of memory {failures} times in a row, with {game.budget.tokens} tokens at "
                    f"once in the end ({error}); close other programs, {recompute}or take a smaller model"
                ) from None
            game.budget = Budget(smaller(pairs, plan, prefix, config), recomputed)
            _forget_plan(folder)
            game.progress.note(f"memory does not hold so many tokens; on with {game.budget.tokens} at once")
    remove(folder.snapshots)


def _forget_figures(game: Game, folder: IterationDir) -> None:
    """Those of an adapter that was deleted: the one that takes its place need not come out alike, as on another machine
    or with other versions."""
    kept = [figures for figures in (folder.evaluation, folder.benchmarks) if figures.exists()]
    if folder.adapter.is_dir() or not kept:
        return
    for figures in kept:
        remove(figures)
    game.progress.note(
        f"{folder.path.name}: its adapter is made again, and so are its figures (of benchmarks by qspin eval)"
    )


def _heed_other_pairs(game: Game, folder: IterationDir, pairs: Sequence[Pair]) -> None:
    """A plan, with its scores and snapshots, is of the very pairs that it was made for. Completions that were damaged
    are made again, and need not come out alike if they are now decoded side by side with fewer others."""
    if folder.adapter.is_dir() or not folder.training_plan.is_file():
        return
    if read_json(folder.training_plan).get("pairs") != _fingerprint(pairs):
        remove(folder.snapshots)  # before the plan that they belong to
        _forget_plan(folder)
        game.progress.note(
            f"{folder.path.name}: its plan is of other pairs; it is made again, and training begins anew"
        )


def _fingerprint(pairs: Sequence[Pair]) -> str:
    digest = hashlib.sha256()
    for pair in pairs:
        digest.update(repr(pair).encode())
    return digest.hexdigest()


def _heed_lower_budget(game: Game, folder: IterationDir, pairs: Sequence[Pair], prefix: int) -> None:
    """A budget that was set below what the kept plan computes at once holds from here on: a process that the system
    killed for want of memory could not lower it itself."""
    asked, config = game.config.train.tokens_per_micro_batch, game.config.train
    if folder.adapter.is_dir() or not isinstance(asked, int) or not folder.training_plan.is_file():
        return
    kept, recomputed = _plan(game, folder, pairs, prefix)
    lengths = [lengths_of(pair, prefix) for pair in pairs]
    wanted = plan_batches(lengths, batch_size=config.batch_size, token_budget=asked, seed=game.config.seed)
    if sum(map(len, wanted)) > sum(map(len, kept)):
        game.budget = game.budget or Budget(asked, recomputed)  # no fewer layers, which would take what is gained
        _forget_plan(folder)
        game.progress.note(f"on with {asked} tokens at once (train.tokens_per_micro_batch)")


def _recompute_all(game: Game, folder: IterationDir) -> None:
    """By the same plan, with its scores and snapshots: what they say does not depend on it."""
    most = _recomputable(game)[-1]
    write_json(folder.training_plan, read_json(folder.training_plan) | {"recomputed": most})
    if game.budget is not None:
        game.budget = game.budget._replace(recomputed=most)
    game.progress.note("memory does not hold what some layers keep; on with all of them recomputed")


def _recomputable(game: Game) -> range:
    return recomputable(game.config.train.gradient_checkpointing, game.model.footprint.shape.layers)


def _forget_plan(folder: IterationDir) -> None:
    remove(folder.scores(0).parent)  # before the plan that they belong to
    remove(folder.training_plan)


def _plan(game: Game, folder: IterationDir, pairs: Sequence[Pair], prefix: int) -> tuple[Plan, int]:
    """Effective batches and micro-batches, and how many layers are recomputed: kept, the latter while the settings
    leave it open. Plans of versions that did not choose it lack it: all are recomputed, which takes least."""
    lengths, config = [lengths_of(pair, prefix) for pair in pairs], game.config.train

    def plan(budget: int) -> Plan:
        return plan_batches(
            lengths,
            batch_size=config.batch_size,
            token_budget=budget,
            seed=game.config.seed,
            workers=game.crew.count,
        )

    def make() -> dict[str, Any]:
        if game.budget is None:
            game.budget = token_budget(game.model, pairs, plan, prefix, config)
        found = game.budget._asdict()
        return {"pairs": _fingerprint(pairs), "asked": _asked(config), **found, "batches": plan(game.budget.tokens)}

    kept, allowed = kept_json(folder.training_plan, make), _recomputable(game)
    recomputed: int = kept.get("recomputed", allowed[-1])
    return kept["batches"], recomputed if recomputed in allowed else allowed[-1]


def _kept_budget(game: Game, iteration: int) -> Budget | None:
    """That of an earlier process, by its last plan. Sought anew, with other pairs and other memory free, it might be
    another, and sums would round otherwise than in a run that was not cut off. None where other settings ask for it."""
    plans = [game.dir.iteration(index).training_plan for index in (iteration, iteration - 1)]
    kept = next((read_json(plan) for plan in plans if plan.is_file()), {})
    return Budget(kept["tokens"], kept["recomputed"]) if kept.get("asked") == _asked(game.config.train) else None


def _asked(config: TrainConfig) -> list[Any]:
    """What a budget is found by, beside memory and pairs."""
    return [config.tokens_per_micro_batch, config.gradient_checkpointing]


def _score(game: Game, folder: IterationDir, task: Task) -> Task:
    """Log-probs of every pair, carried ones too, under the opponent in the slot; a shard an effective batch."""
    paths = [folder.scores(index) for index in range(len(task.plan))]
    scores = [Score(**row) for path in paths if path.is_file() for row in read_jsonl(path)]
    game.progress.phase("score", iteration=task.iteration, total=len(task.pairs), done=len(scores), unit="pairs")
    for micro_batches, path in zip(task.plan, paths, strict=True):
        if path.is_file():
            continue
        check_stop()
        with game.counted(folder, "score"):
            parts = score_together(
                game.crew,
                task.pairs,
                micro_batches,
                task.prefix,
                lambda own: list(score_pairs(game.model, task.pairs, own, task.prefix)),
            )
            shard = [score for part in parts for score in part]
            _check_finite(shard)
            write_jsonl(path, [score.to_json() for score in shard])
        game.progress.advance(len(shard))
        scores += shard
    return replace(task, scores={score.key: score for score in scores})


def _check_finite(scores: Sequence[Score]) -> None:
    bad = [one.key for one in scores if not math.isfinite(one.opponent_real_logps + one.opponent_generated_logps)]
    if bad:
        raise QspinError(
            f"the opponent's log-probs are not finite numbers for {some(bad)}: its training went too far (lower "
            "train.lr or sft.lr), or the base overflows in float16 (set model.dtype)"
        )


def _optimise(
    game: Game,
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
    before = folder == game.dir.warm_start
    game.progress.phase(phase, iteration=iteration, total=sum(sizes), done=kept, unit="pairs", warm_start=before)
    with game.counted(folder, "train") as add:

        def on_step(metrics: Metrics, pairs: int) -> None:
            game.progress.advance(pairs, **metrics)
            add()

        metrics = work(on_step)
    need = sum(parameter.nbytes for parameter in game.model.parameters.values())
    with stops_held():  # there may be no snapshot of the last steps
        verify_base(game.dir, game.model, game.crew)
        write_jsonl(folder.metrics, metrics)
        with commit_folder(folder.adapter, need=need) as temporary:
            game.model.save_adapter(temporary)
