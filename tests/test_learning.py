"""What an iteration trains on, of what its opponent generated."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Notes

from qspin.config import load_config
from qspin.errors import QspinError
from qspin.files import ADAPTER_WEIGHTS, read_json, read_jsonl, remove, write_json, write_jsonl
from qspin.fitting.at_once import Budget
from qspin.layers.lora import FusedLayers
from qspin.phases import learning
from qspin.phases.answering import answer
from qspin.phases.game import Game
from qspin.phases.learning import learn
from qspin.phases.measuring import measure
from qspin.prepare import prepare
from qspin.records import Pair
from qspin.run_dir import RunDir


@pytest.fixture
def game(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Game:
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.id": str(tiny_folder("llama")),
        "data.source": str(path),
        "generation.width": 2,
        "train.epochs": 1,
        "train.tokens_per_micro_batch": 512,
    }
    prepared = prepare(load_config(None, settings), datetime.date(2026, 1, 1))
    return Game.open(prepared, RunDir(tmp_path / "run"), Notes())


def generated(game: Game, iteration: int, pairs: Sequence[Pair]) -> None:
    folder = game.dir.iteration(iteration)
    folder.generated(0).parent.mkdir(parents=True)
    write_json(folder.generation_plan, {"width": 2, "shards": [list(range(len(pairs)))]})
    write_jsonl(folder.generated(0), [pair.to_json() for pair in pairs])


def pairs_of(game: Game, iteration: int) -> list[Pair]:
    """Each training row with another completion, which did not end by itself."""
    return [Pair(e.record_id, iteration, e.prompt_ids, e.real_ids, (7, 8, 9), ended=False) for e in game.prepared.train]


def learned(game: Game, iteration: int) -> set[str]:
    """The pairs that an iteration scored and trained on."""
    learn(game, iteration)
    folder = game.dir.iteration(iteration)
    return {row["key"] for path in folder.scores(0).parent.iterdir() for row in read_jsonl(path)}


def notes(game: Game) -> list[str]:
    assert isinstance(game.progress, Notes)
    return game.progress.notes


def test_a_completion_equal_to_the_real_one_is_left_out_and_empty_and_capped_ones_are_kept(game: Game) -> None:
    end = game.prepared.renderer.end_of_turn
    same, empty, almost, *capped = pairs_of(game, 0)
    same = replace(same, generated_ids=same.real_ids, ended=True)
    empty = replace(empty, generated_ids=(end,), ended=True)
    almost = replace(almost, generated_ids=almost.real_ids[:-1])  # the same words, and no end of turn
    generated(game, 0, [same, empty, almost, *capped])
    assert learned(game, 0) == {pair.key for pair in (empty, almost, *capped)}
    assert notes(game) == ["iteration 0: 1 of 10 pairs left out, the opponent's completion is the real one"]


def test_pairs_of_the_iteration_before_are_judged_likewise(game: Game) -> None:
    for iteration in (0, 1):
        first, *others = pairs_of(game, iteration)
        generated(game, iteration, [replace(first, generated_ids=first.real_ids), *others])
    learn(game, 0)
    assert learned(game, 1) == {pair.key for at in (0, 1) for pair in pairs_of(game, at)[1:]}
    assert notes(game)[-1] == "iteration 1: 2 of 20 pairs left out, the opponent's completion is the real one"


def test_where_nothing_is_left_to_learn_the_run_says_so(game: Game) -> None:
    for iteration, advice in ((0, "take other rows"), (1, "the run is complete with --iterations 1")):
        generated(game, iteration, [replace(pair, generated_ids=pair.real_ids) for pair in pairs_of(game, iteration)])
        said = f"iteration {iteration}: the opponent gives every prompt its real completion, .*; {advice}$"
        with pytest.raises(QspinError, match=said):
            learn(game, iteration)


def test_with_an_sft_weight_an_equal_completion_still_teaches(game: Game) -> None:
    """The real one's own term has a gradient, whatever the opponent says."""
    train = game.config.train.model_copy(update={"sft_weight": 1.0, "epochs": 2})
    game.prepared = replace(game.prepared, config=game.config.model_copy(update={"train": train}))
    generated(game, 0, [replace(pair, generated_ids=pair.real_ids) for pair in pairs_of(game, 0)])
    assert learned(game, 0) == {pair.key for pair in pairs_of(game, 0)}
    first, *_, last = read_jsonl(game.dir.iteration(0).metrics)
    assert last["real_nll"] < first["real_nll"]
    assert notes(game) == []


def test_the_most_memory_that_was_held_is_kept_beside_the_seconds(game: Game) -> None:
    folder, size = game.dir.iteration(0), 1 << 30
    folder.path.mkdir(parents=True)
    with game.counted(folder, "score"):
        pass
    with game.counted(folder, "train") as add:
        block = torch.ones(size, dtype=torch.uint8)
        add()
        del block
    assert folder.peaks()["train"] - folder.peaks()["score"] > 0.95 * size
    kept = folder.peaks()
    with pytest.raises(KeyboardInterrupt), game.counted(folder, "evaluate"):
        raise KeyboardInterrupt
    assert (folder.peaks(), set(folder.seconds())) == (kept, {"score", "train"}), "what failed counts for nothing"


def test_a_budget_that_was_lowered_holds_for_a_kept_plan(game: Game) -> None:
    """As after the system killed a process for want of memory."""
    pairs = pairs_of(game, 0)
    generated(game, 0, pairs)
    folder = game.dir.iteration(0)

    def kept(budget: int) -> int:
        """Micro-batches of the plan that is worked by under a budget, which is not worked to its end."""
        train = game.config.train.model_copy(update={"tokens_per_micro_batch": budget})
        config = game.config.model_copy(update={"train": train})
        again = replace(game, prepared=replace(game.prepared, config=config), budget=None)

        def stop(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        again.progress = Notes()
        again.progress.phase = stop  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            learn(again, 0)
        return sum(map(len, read_json(folder.training_plan)["batches"]))

    whole = kept(512)
    assert kept(2048) == kept(512) == whole, "a larger one, or the same, changes nothing"
    assert kept(32) > whole
    assert kept(512) == kept(32), "and what was lowered stays"


@pytest.mark.parametrize("cut_off", ["between two iterations", "in the first", "in the second"])
def test_a_run_that_goes_on_computes_as_much_at_once_as_one_that_was_not_cut_off(
    cut_off: str, game: Game, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By other micro-batches sums round otherwise, and what would be found now may be another budget."""
    train = game.config.train.model_copy(update={"tokens_per_micro_batch": "auto"})
    game.prepared = replace(game.prepared, config=game.config.model_copy(update={"train": train}))
    for iteration in (0, 1):
        generated(game, iteration, pairs_of(game, iteration))
    found = iter([Budget(64, 1), Budget(32, 0), Budget(32, 0)])
    monkeypatch.setattr(learning, "token_budget", lambda *_: next(found))

    first, second = (game.dir.iteration(iteration) for iteration in (0, 1))
    for iteration in (0, 1):
        learn(game, iteration)
    plan, trained = read_json(second.training_plan), (second.adapter / ADAPTER_WEIGHTS).read_bytes()

    gone = [second.adapter, second.metrics]
    gone += [first.adapter, first.metrics] if cut_off == "in the first" else []
    gone += [second.training_plan, second.scores(0).parent] if cut_off != "in the second" else []
    for path in gone:
        remove(path)
    again = replace(game, budget=None)
    for iteration in (0, 1):
        learn(again, iteration)
    assert read_json(second.training_plan) == plan
    assert (second.adapter / ADAPTER_WEIGHTS).read_bytes() == trained
    assert again.budget == Budget(64, 1), "and so will the next iteration"

    for path in (second.adapter, second.metrics, second.training_plan):
        remove(path)
    train = train.model_copy(update={"gradient_checkpointing": False})
    again = replace(again, prepared=replace(again.prepared, config=again.config.model_copy(update={"train": train})))
    again.budget = None
    learn(again, 1)
    assert again.budget == Budget(32, 0), "where the settings are others, it is found anew"


def test_scores_that_are_there_already_are_no_progress_of_this_process(game: Game) -> None:
    """A rate that counted them would promise an end that does not come."""
    train = game.config.train.model_copy(update={"batch_size": 4})
    game.prepared = replace(game.prepared, config=game.config.model_copy(update={"train": train}))
    generated(game, 0, pairs_of(game, 0))
    learn(game, 0)
    folder, told = game.dir.iteration(0), list[tuple[str, int, float]]()

    class Told(Notes):
        def phase(self, name: str, *, done: int, **_: object) -> None:
            told.append((name, done, 0))

        def advance(self, units: float, **_: float) -> None:
            name, done, advanced = told[-1]
            told[-1] = (name, done, advanced + units)

    remove(folder.adapter)
    remove(folder.scores(1))
    game.progress = Told()
    learn(game, 0)
    assert told == [("score", 6, 4), ("train", 0, 10)]


def test_what_was_planned_and_scored_for_other_pairs_is_made_again(game: Game) -> None:
    """As after completions were damaged, and came out otherwise when they were made again."""
    pairs, folder = pairs_of(game, 0), game.dir.iteration(0)
    generated(game, 0, pairs)
    learn(game, 0)
    began, scored = (read_jsonl(path) for path in (folder.metrics, folder.scores(0)))
    trained = folder.adapter / ADAPTER_WEIGHTS
    expected = trained.read_bytes()

    for path in (folder.adapter, folder.metrics, folder.generated(0)):
        remove(path)
    write_jsonl(folder.generated(0), [replace(pair, generated_ids=(11, 12)).to_json() for pair in pairs])
    (folder.snapshots / "step-000001").mkdir(parents=True)  # can't be gone on from
    learn(game, 0)
    assert notes(game) == ["iteration-0: its plan is of other pairs; it is made again, and training begins anew"]
    assert read_jsonl(folder.scores(0)) != scored
    assert trained.read_bytes() != expected

    for path in (folder.adapter, folder.metrics, folder.generated(0)):
        remove(path)
    write_jsonl(folder.generated(0), [pair.to_json() for pair in pairs])
    learn(game, 0)
    assert (read_jsonl(folder.metrics), read_jsonl(folder.scores(0))) == (began, scored)
    assert trained.read_bytes() == expected


def test_a_width_that_was_lowered_holds_for_a_kept_plan(game: Game) -> None:
    plan = game.dir.iteration(0).generation_plan
    write_json(plan, {"width": 64, "shards": [[0, 1], [2, 3]]})
    answer(game, 0)
    assert read_json(plan)["width"] == 2
    remove(game.dir.iteration(0).generated(0).parent)
    write_json(plan, {"width": 1, "shards": [[0, 1], [2, 3]]})
    answer(game, 0)
    assert read_json(plan)["width"] == 1, "found too wide before"


def test_whether_the_base_is_unpacked_is_the_runs(game: Game, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its products round otherwise, so a run that goes on must not decide anew by what memory is free now."""
    products: list[int] = []
    own, room, folder = FusedLayers._unpacked_product, game.model.unpacked_bytes, game.dir.iteration(0)
    monkeypatch.setattr(FusedLayers, "_unpacked_product", lambda *args: products.append(1) or own(*args))
    assert room > 0

    def unpacked(room: int) -> tuple[bool, bool]:
        """Whether it is for a shard and for an evaluation, with so much room."""
        monkeypatch.setattr(type(game.model), "unpacked_bytes", room)
        done = []
        for make, made in (
            (lambda: answer(game, 0), folder.generated(0)),
            (lambda: measure(game, folder, 0, opponent=None), folder.evaluation),
        ):
            remove(made)
            products.clear()
            make()
            done.append(bool(products))
        return done[0], done[1]

    assert unpacked(room) == (True, True)
    assert unpacked(0) == (False, False), "memory has its say"
    told = "memory has no room for the base in the compute type now; on with its 4 bits alone"
    assert notes(game).count(told) == 2
    assert unpacked(room) == (True, True)
    write_json(game.dir.record, game.dir.read_record() | {"unpacked": False})
    assert unpacked(room) == (False, False), "a run that began with 4 bits alone stays so"
    assert notes(game).count(told) == 2


def test_log_probs_that_are_no_numbers_end_the_iteration_before_it_learns(game: Game) -> None:
    """As where the base overflows in float16."""
    pairs = pairs_of(game, 0)
    generated(game, 0, [*pairs[:-1], replace(pairs[-1], generated_ids=(501, 501))])
    with torch.no_grad():  # of a table that is the head too, so that it spoils every row's
        game.model.peft_model.get_input_embeddings().weight[501] = float("nan")
    with pytest.raises(QspinError, match=rf"not finite numbers for {pairs[0].key}, .*set model\.dtype"):
        learn(game, 0)
    assert not game.dir.iteration(0).adapter.exists()
    assert not list(game.dir.iteration(0).scores(0).parent.glob("*"))
