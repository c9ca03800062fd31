"""Real models that recompute some of their layers, as the memory there is wants it; and runs that go on so."""

from __future__ import annotations

import ctypes
import datetime
import itertools
import platform
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SHAPE, Notes, small_run
from harness import in_fresh_process

from qspin import budget, spin, training
from qspin.base import find_base
from qspin.budget import token_budget
from qspin.config import LoraConfig, ModelConfig, TrainConfig, load_config
from qspin.errors import QspinError
from qspin.files import ADAPTER_WEIGHTS, read_json, remove, write_json
from qspin.fitting.at_once import Budget
from qspin.fitting.footprint import SHARE, Batch
from qspin.model import SlotModel
from qspin.packing import Plan, lengths_of, plan_batches
from qspin.phases import learning
from qspin.phases.game import Game
from qspin.prepare import Prepared, prepare
from qspin.records import Pair
from qspin.run_dir import RunDir

LAYERS = 12
TOKENS = 1024
PAIRS = [Pair(str(n), 0, (1,) * 10, (2,) * (90 + n), (3,) * 100, ended=True) for n in range(8)]


def made(folder: Path, **shape: int) -> Path:
    """The tiny llama with more layers."""
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**SHAPE | {"num_hidden_layers": LAYERS} | shape, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = made(tmp_path_factory.mktemp("models") / "deep-llama")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for what tensors take to be most of what a process takes."""
    return made(tmp_path_factory.mktemp("models") / "wide-llama", hidden_size=256, intermediate_size=512)


# --- the choice, in a process of its own, where every larger tensor is in memory of its own


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is asked to")


def load(folder: Path) -> SlotModel:
    ctypes.CDLL(None).mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD
    config = ModelConfig(id=str(folder), dtype="float32")
    model = SlotModel.load(find_base(config), config, LoraConfig(rank=4), seed=0, device=torch.device("cpu"))
    need(model, 0)  # libraries and kernels that a first pass brings into memory
    return model


def plan_for(tokens: int) -> Plan:
    return plan_batches([lengths_of(pair) for pair in PAIRS], batch_size=16, token_budget=tokens, seed=0)


def longest() -> list[Pair]:
    members = max(itertools.chain(*plan_for(TOKENS)), key=lambda part: sum(lengths_of(PAIRS[i]).total for i in part))
    return [PAIRS[index] for index in members]


def need(model: SlotModel, recomputed: int) -> int:
    """Measured, of the longest micro-batch."""
    model.use_gradient_checkpointing(recomputed)
    return budget._need(model, longest(), 0)


@needs_glibc
@pytest.mark.slow
def test_some_layers_recomputed_take_what_was_counted(wide_folder: Path) -> None:
    """The peak of forward and backward; the first layers' turn, when the others are done with, adds nothing."""
    for recomputed, (predicted, measured) in in_fresh_process(peaks, wide_folder).items():
        assert predicted == pytest.approx(measured, rel=0.15), recomputed


def peaks(folder: Path) -> dict[int, tuple[int, int]]:
    """Predicted and measured."""
    model, found = load(folder), {}
    lengths = [lengths_of(pair) for pair in longest()]
    batch = Batch.of([(group.prompt, group.real, group.generated) for group in lengths])
    for recomputed in (0, 4, 8, LAYERS - 1, LAYERS):
        measured = need(model, recomputed)
        found[recomputed] = budget._predicted(model.footprint, batch), measured
    return found


@needs_glibc
@pytest.mark.slow
def test_the_engine_recomputes_as_many_as_a_room_wants(wide_folder: Path) -> None:
    found = in_fresh_process(choices, wide_folder)
    tight, *between, ample = (recomputed for recomputed, _ in found)
    assert (tight, ample) == (LAYERS, 0)
    assert LAYERS > between[0] > between[1] > 0
    for _, part_of_room in found[1:]:
        assert part_of_room < 1.05


def choices(folder: Path) -> list[tuple[int, float]]:
    """In rooms that are larger and larger, and how much of each it takes."""
    model, found, config = load(folder), [], TrainConfig(tokens_per_micro_batch=TOKENS)
    least, most = need(model, LAYERS), need(model, 0)
    state = model.footprint.optimizer(config.optimizer)
    for share in (-0.2, 0.3, 0.7, 4):
        room = least + share * (most - least)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(budget, "free_bytes", lambda _device, room=room: (room + state) / SHARE)
            tokens, recomputed = token_budget(model, PAIRS, plan_for, 0, config)
        assert tokens == TOKENS
        found.append((recomputed, need(model, recomputed) / room))
    return found


# --- runs


@pytest.fixture(scope="module")
def prepared(deep_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Prepared]:
    rows = tmp_path_factory.mktemp("data") / "rows.jsonl"

    def make(**changes: Any) -> Prepared:
        settings = small_run(deep_folder, rows, rows=18)
        settings |= {"model.dtype": "float32", "train.tokens_per_micro_batch": 100, "iterations": 1}
        return prepare(load_config(None, settings | {f"train.{key}": value for key, value in changes.items()}), DAY)

    return make


DAY = datetime.date(2026, 1, 1)


@pytest.fixture
def some(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is room for what some layers keep."""
    monkeypatch.setattr(learning, "token_budget", lambda *_: Budget(100, 5))


def play(prepared: Prepared, out: Path) -> tuple[RunDir, list[str]]:
    progress = Notes()
    spin.run(prepared, out, progress)
    return RunDir(out), progress.notes


@pytest.fixture(scope="module")
def played(prepared: Callable[..., Prepared], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return play(prepared(), tmp_path_factory.mktemp("runs") / "run")[0]


def adapter(run: RunDir) -> bytes:
    return (run.iteration(0).adapter / ADAPTER_WEIGHTS).read_bytes()


class Watch:
    """How many layers are recomputed in each micro-batch of training."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bearable: int = 0, after: int = 0) -> None:
        """Memory is refused where fewer layers are recomputed than so many, after some micro-batches."""
        self.seen: list[int] = []
        real = training.pair_logps

        def pair_logps(model: SlotModel, row: Any) -> Any:
            self.seen.append(model.footprint.recomputed)
            if self.seen[-1] < bearable and len(self.seen) > after:
                torch.empty(1 << 60, dtype=torch.uint8)
            return real(model, row)

        monkeypatch.setattr(training, "pair_logps", pair_logps)


def test_a_run_recomputes_what_was_found_and_keeps_it(
    prepared: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch)
    whole, _ = play(prepared(), tmp_path / "whole")
    assert set(watch.seen) == {0}
    assert read_json(whole.iteration(0).training_plan)["recomputed"] == 0
    with monkeypatch.context() as patch:
        patch.setattr(learning, "token_budget", lambda *_: Budget(100, 5))
        watch.seen.clear()
        run, _ = play(prepared(), tmp_path / "some")
    assert set(watch.seen) == {5}
    assert read_json(run.iteration(0).training_plan)["recomputed"] == 5
    assert adapter(run) == adapter(whole)


@pytest.mark.parametrize(
    ("kept", "setting", "expected"),
    [
        (5, "auto", 5),
        (5, True, LAYERS),
        (5, False, 0),
        (None, "auto", LAYERS),  # of a version that had no choice: what takes least
        (None, True, LAYERS),
        (None, False, 0),
        (99, "auto", LAYERS),
    ],
)
def test_a_kept_plan_is_gone_on_with_and_nothing_is_tried_again(
    kept: int | None,
    setting: Any,
    expected: int,
    prepared: Callable[..., Prepared],
    played: RunDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunDir(shutil.copytree(played.path, tmp_path / "run"))
    folder = run.iteration(0)
    for path in (folder.adapter, folder.metrics, folder.evaluation):
        remove(path)
    plan = read_json(folder.training_plan)
    write_json(folder.training_plan, {key: plan[key] for key in ("pairs", "batches")})
    if kept is not None:
        write_json(folder.training_plan, plan | {"recomputed": kept})
    watch = Watch(monkeypatch)
    monkeypatch.setattr(learning, "token_budget", None)
    play(prepared(gradient_checkpointing=setting), run.path)
    assert set(watch.seen) == {expected}
    assert adapter(run) == adapter(played)


@pytest.mark.usefixtures("some")
@pytest.mark.parametrize("after", [0, 3])
def test_where_memory_runs_out_all_layers_are_recomputed_by_the_same_plan(
    after: int, prepared: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enough, _ = play(prepared(), tmp_path / "enough")
    watch = Watch(monkeypatch, bearable=LAYERS, after=after)
    scored: list[object] = []
    score_pairs = learning.score_pairs
    monkeypatch.setattr(learning, "score_pairs", lambda *args: scored.append(args) or score_pairs(*args))
    little, notes = play(prepared(), tmp_path / "little")
    assert notes == ["memory does not hold what some layers keep; on with all of them recomputed"]
    assert watch.seen == [5] * (after + 1) + [LAYERS] * (len(watch.seen) - after - 1)
    plans = [read_json(run.iteration(0).training_plan) for run in (enough, little)]
    assert plans[1] == plans[0] | {"recomputed": LAYERS}
    assert len(scored) == len(plans[0]["batches"]), "once"
    assert adapter(little) == adapter(enough)


def test_then_the_micro_batches_are_halved_and_at_last_it_says_so(
    prepared: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Watch(monkeypatch, bearable=LAYERS + 1)
    monkeypatch.setattr(learning, "token_budget", lambda *_: Budget(400, 5))
    said = (
        r"^iteration-0: out of memory 3 times in a row, with \d+ tokens at once in the end .*; close other programs, "
    )
    with pytest.raises(QspinError, match=said + "or take a smaller model$"):
        play(prepared(), tmp_path / "auto")
    assert watch.seen == [5, LAYERS, LAYERS, LAYERS]
    with pytest.raises(QspinError, match=said + r"set train\.gradient_checkpointing=true, or take a smaller model$"):
        play(prepared(gradient_checkpointing=False), tmp_path / "false")


def test_a_budget_that_is_lowered_by_hand_recomputes_no_fewer_layers(
    prepared: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after the system killed the process: fewer layers would take what fewer tokens leave."""
    with monkeypatch.context() as patch:
        patch.setattr(learning, "token_budget", lambda *_: Budget(100, 5))
        run, _ = play(prepared(), tmp_path / "run")
    folder = run.iteration(0)
    for path in (folder.adapter, folder.metrics, folder.evaluation):
        remove(path)
    before = read_json(folder.training_plan)
    _, notes = play(prepared(tokens_per_micro_batch=50), tmp_path / "run")
    assert notes == ["on with 50 tokens at once (train.tokens_per_micro_batch)"]
    after = read_json(folder.training_plan)
    assert sum(map(len, after["batches"])) > sum(map(len, before["batches"]))
    assert after["recomputed"] == 5


def test_a_warm_start_finds_its_own(
    prepared: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows are half as long, and may have room for more."""
    found = iter((Budget(100, 2), Budget(100, 7)))
    monkeypatch.setattr(learning, "token_budget", lambda *_: next(found))
    ready = prepared()
    ready = replace(
        ready, config=ready.config.model_copy(update={"sft": ready.config.sft.model_copy(update={"epochs": 1})})
    )
    run, _ = play(ready, tmp_path / "run")
    plans = [read_json(folder.training_plan) for folder in (run.warm_start, run.iteration(0))]
    assert [plan["recomputed"] for plan in plans] == [2, 7]


def test_it_is_set_here_and_in_each_helper(prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    """With one process; with several: test_workers.py."""
    game = Game.open(prepared(), RunDir(tmp_path / "run"), Notes())
    game.recompute(4)
    assert game.model.footprint.recomputed == 4
