"""Memory that runs out in each phase: twice, and the run goes on to the same result; three times, and it says so."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Notes

from qspin import spin, training, warm_start
from qspin.adapters import load_adapter
from qspin.config import load_config
from qspin.errors import QspinError
from qspin.files import read_json, read_jsonl
from qspin.fitting.memory import OutOfMemory, keep_freed_memory, refusals_told
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


@pytest.fixture(scope="module")
def prepared(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    data = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": " ".join(f"{n * k}" for k in range(9))} for n in range(18)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = {
        "model.id": str(tiny_folder("llama")),
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
    return prepare(load_config(None, settings), datetime.date(2026, 1, 1))


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


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA driver error: out of memory"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        MemoryError(),
    ],
)
def test_each_kind_of_refusal_is_known(error: Exception) -> None:
    with pytest.raises(OutOfMemory) as caught, refusals_told():
        raise error
    assert str(caught.value) == (str(error).partition("\n")[0] or "MemoryError")


@pytest.mark.parametrize("said", ["shape mismatch", "CUDA error: an illegal memory access was encountered"])
def test_other_errors_are_not_taken_for_refusals(said: str) -> None:
    with pytest.raises(RuntimeError, match=said), refusals_told():
        raise RuntimeError(said)


@pytest.mark.parametrize(
    ("system", "release", "given", "wanted"),
    [
        ("Linux", "6.8.0-45-generic", {}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ("Linux", "5.15.167.4-microsoft-standard-WSL2", {}, {}),
        ("Linux", "5.15.148-tegra", {}, {}),
        ("Windows", "11", {}, {}),
        ("Linux", "6.8.0-45-generic", *[{"PYTORCH_ALLOC_CONF": "expandable_segments:False"}] * 2),
        ("Linux", "6.8.0-45-generic", *[{"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}] * 2),
    ],
)
def test_a_gpu_s_pieces_of_any_size_where_the_driver_has_them(
    system: str, release: str, given: dict[str, str], wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere the first tensor on the GPU would fail; and what a person has set stays as it is."""
    monkeypatch.setattr(platform, "system", lambda: system)
    monkeypatch.setattr(platform, "release", lambda: release)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))  # malloc is another matter
    monkeypatch.setattr(os, "environ", dict(given))
    keep_freed_memory()
    assert os.environ == wanted


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
