"""Memory that runs out in each phase: twice, and the run goes on to the same result; three times, and it says so."""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Notes
from safetensors.torch import load_file

from qspin import spin, training, warm_start
from qspin.adapters import load_adapter
from qspin.config import load_config
from qspin.errors import QspinError
from qspin.files import read_json, read_jsonl
from qspin.model import SlotModel
from qspin.packing import Row
from qspin.phases import answering, learning, measuring
from qspin.prepare import Prepared, prepare
from qspin.run_dir import RunDir
from qspin.watch.progress import Silent

# phase → where its memory is taken
PHASES: dict[str, tuple[Any, str]] = {
    "generate": (answering, "generate"),
    "score": (learning, "score_pairs"),
    "train": (training, "pair_logps"),
    "warm start": (warm_start, "pair_logps"),
    "evaluate": (measuring, "evaluate"),
}


def made_ready(model: Path, data: Path, **changes: Any) -> Prepared:
    rows = [{"prompt": f"What is {n}?", "completion": " ".join(f"{n * k}" for k in range(9))} for n in range(18)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "model.id": str(model),
        "model.dtype": "float32",
        "data.source": str(data),
        "data.heldout_rows": 2,
        "lora.rank": 2,
        "generation.max_new_tokens": 12,
        "generation.width": 8,
        "train.batch_size": 16,
        "train.tokens_per_micro_batch": 100_000,
        "train.gradient_checkpointing": True,
        "train.lr": 0.001,
        "sft.epochs": 1,
        "iterations": 1,
    }
    return prepare(load_config(None, settings | changes), datetime.date(2026, 1, 1))


@pytest.fixture(scope="module")
def prepared(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return made_ready(tiny_folder("llama"), tmp_path_factory.mktemp("data") / "rows.jsonl")


@pytest.fixture(scope="module")
def enough(prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    out = tmp_path_factory.mktemp("enough") / "run"
    spin.run(prepared, out, Silent())
    return RunDir(out)


def run_out(phase: str, times: int, patch: pytest.MonkeyPatch) -> None:
    """Let the allocator refuse the first so many attempts of a phase."""
    module, name = PHASES[phase]
    real, left = getattr(module, name), [None] * times

    def refused(*args: Any, **rest: Any) -> Any:
        if left:
            left.pop()
            torch.empty(1 << 60, dtype=torch.uint8)
        return real(*args, **rest)

    patch.setattr(module, name, refused)


@pytest.mark.parametrize("phase", PHASES)
def test_twice_and_the_run_ends_as_it_would_have(
    phase: str, prepared: Prepared, enough: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_out(phase, 2, monkeypatch)
    progress = Notes()
    spin.run(prepared, tmp_path / "run", progress)
    assert len(progress.notes) == 2
    assert all(note.startswith("memory does not hold ") for note in progress.notes)
    little = RunDir(tmp_path / "run")
    for ours, theirs in ((little.warm_start, enough.warm_start), (little.iteration(0), enough.iteration(0))):
        batches = [
            [sorted(index for micro_batch in batch for index in micro_batch) for batch in read_json(plan)["batches"]]
            for plan in (ours.training_plan, theirs.training_plan)
        ]
        assert batches[0] == batches[1], "the same effective batches"
        adapters = load_adapter(ours.adapter), load_adapter(theirs.adapter)
        for name, tensor in adapters[0].items():
            torch.testing.assert_close(tensor, adapters[1][name], rtol=1e-2, atol=1e-4)
        nll = [read_json(folder.evaluation)["real_nll"] for folder in (ours, theirs)]
        assert nll[0] == pytest.approx(nll[1], rel=1e-3)
    shard = "generated/shard-00000.jsonl"
    assert read_jsonl(little.iteration(0).path / shard) == read_jsonl(enough.iteration(0).path / shard)
    halved = {
        "generate": lambda: read_json(little.iteration(0).generation_plan)["width"] == 2,
        "score": lambda: len(read_json(little.iteration(0).training_plan)["batches"][0]) >= 4,
        "train": lambda: len(read_json(little.iteration(0).training_plan)["batches"][0]) >= 4,
        "warm start": lambda: len(read_json(little.warm_start.training_plan)["batches"][0]) >= 4,
        "evaluate": lambda: True,
    }
    assert halved[phase]()


def test_generation_goes_on_narrower_when_memory_runs_out(
    prepared: Prepared, enough: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = answering.generate
    widths = []

    def generate(*args: Any, width: int, **rest: Any) -> Any:
        widths.append(width)
        if width > 2:
            raise torch.OutOfMemoryError
        return real(*args, width=width, **rest)

    monkeypatch.setattr(answering, "generate", generate)
    progress = Notes()
    spin.run(prepared, tmp_path / "little", progress)
    assert widths == [8, 4, 2]
    assert progress.notes == [
        f"memory does not hold so many completions; on with {width} side by side" for width in (4, 2)
    ]
    little = RunDir(tmp_path / "little").iteration(0)
    assert read_json(little.generation_plan)["width"] == 2
    assert read_jsonl(little.generated(0)) == read_jsonl(enough.iteration(0).generated(0))


@pytest.fixture(scope="module")
def in_steps(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, RunDir]:
    """Several steps of several pairs, whose layers keep what there is room for; and the run that had enough."""
    folder = tmp_path_factory.mktemp("in_steps")
    changes: dict[str, Any] = {"train.batch_size": 8, "train.gradient_checkpointing": "auto", "sft.epochs": 0}
    prepared = made_ready(tiny_folder("llama"), folder / "rows.jsonl", **changes)
    spin.run(prepared, folder / "run", Silent())
    return prepared, RunDir(folder / "run")


@pytest.mark.parametrize("steps_before", [0, 1])
def test_out_of_memory_halves_the_micro_batches_and_goes_on_to_the_same_adapter(
    steps_before: int, in_steps: tuple[Prepared, RunDir], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared, whole = in_steps
    real, seen = training.pair_logps, []

    def pair_logps(model: SlotModel, row: Row) -> Any:
        """Refused by the allocator when there are more than half of the tokens, once so many steps are made."""
        seen.append(len(row.input_ids))
        if len(seen) > steps_before and seen[-1] > 0.6 * seen[0]:
            torch.empty(1 << 60, dtype=torch.uint8)
        return real(model, row)

    monkeypatch.setattr(training, "pair_logps", pair_logps)
    progress = Notes()
    spin.run(prepared, tmp_path / "little", progress)
    assert len(progress.notes) == 2
    assert progress.notes[0] == "memory does not hold what some layers keep; on with all of them recomputed"
    assert progress.notes[1].startswith("memory does not hold so many tokens; on with ")

    little, enough = RunDir(tmp_path / "little").iteration(0).path, whole.iteration(0).path
    plans = [read_json(folder / "training.json")["batches"] for folder in (little, enough)]
    assert [sorted(itertools.chain(*batch)) for batch in plans[0]] == [
        sorted(itertools.chain(*batch)) for batch in plans[1]
    ]
    assert all(len(batch) == 1 for batch in plans[1])
    assert all(len(batch) >= 2 for batch in plans[0])
    for ours, theirs in zip(read_jsonl(little / "metrics.jsonl"), read_jsonl(enough / "metrics.jsonl"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (little, enough))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=1e-4)


SAID = {
    "generate": "generate: out of memory 3 times in a row, with 2 completions side by side in the end (",
    "score": "iteration-0: out of memory 3 times in a row, with ",
    "train": "iteration-0: out of memory 3 times in a row, with ",
    "warm start": "warm-start: out of memory 3 times in a row, with ",
    "evaluate": "evaluate: out of memory 3 times in a row (",
}


@pytest.mark.parametrize("phase", PHASES)
def test_three_times_and_it_says_so_and_loses_nothing(
    phase: str, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        run_out(phase, 3, patch)
        with pytest.raises(QspinError, match=f"^{re.escape(SAID[phase])}.*; close other programs, "):
            spin.run(prepared, tmp_path / "run", Silent())
    spin.run(prepared, tmp_path / "run", Silent())  # with memory, the same command goes on
    assert RunDir(tmp_path / "run").iteration(0).done


def test_a_gpu_that_fails_is_one_line_and_the_run_goes_on(
    prepared: Prepared, enough: RunDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As torch tells of a suspend or a time limit: nothing is computed again in smaller pieces."""

    def fails(*_args: object, **_kwargs: object) -> None:
        raise torch.AcceleratorError("CUDA error: the launch timed out and was terminated\nCUDA kernel errors might …")

    with monkeypatch.context() as patch:
        patch.setattr(training, "pair_logps", fails)
        with pytest.raises(
            QspinError, match=r"^the GPU failed \(CUDA error: the launch timed out and was terminated\);"
        ):
            spin.run(prepared, tmp_path / "run", Silent())
    spin.run(prepared, tmp_path / "run", Silent())
    adapters = [RunDir(path).iteration(0).adapter for path in (tmp_path / "run", enough.path)]
    assert load_adapter(adapters[0]).keys() == load_adapter(adapters[1]).keys()
    for name, tensor in load_adapter(adapters[0]).items():
        assert torch.equal(tensor, load_adapter(adapters[1])[name])
