"""Memory that a GPU refuses leaves nothing behind, and work stays within a share of the card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from on_cuda import BACKENDS, CUDA, ON_CUDA, PAIRS, load
from torch import Tensor

from qspin.budget import _need, rows_at_once, token_budget
from qspin.config import BackendName, TrainConfig
from qspin.decoding import Decoder
from qspin.fitting.memory import OutOfMemory, free_bytes, refusals_told
from qspin.layers.kv_cache import KVCache
from qspin.packing import lengths_of, pack_row, plan_batches
from qspin.scoring import pair_logps

pytestmark = ON_CUDA


def test_memory_refused_while_a_step_is_recorded(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_folder("llama"), "transformers")

    def logits() -> Tensor:
        decoder = Decoder(model, KVCache(slots=2, device=CUDA))
        return torch.stack([decoder.step([5, 6]).clone() for _ in range(3)])

    with torch.inference_mode(), model.decoding():
        wanted = logits()
        decoder = Decoder(model, KVCache(slots=2, device=CUDA))
        decoder.step([5, 6])
        with monkeypatch.context() as patch, pytest.raises(OutOfMemory), refusals_told():
            patch.setattr(model, "logits", lambda _hidden: torch.empty(2**42, dtype=torch.uint8, device=CUDA))
            decoder.step([5, 6])
        assert torch.equal(logits(), wanted)


def test_memory_refused_when_a_recorded_step_becomes_a_graph(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the driver, as on a full card. torch has ended the recording by then, and is still on its stream."""
    model = load(tiny_folder("llama"), "transformers")
    end = torch.cuda.CUDAGraph.capture_end

    def refused(graph: torch.cuda.CUDAGraph) -> None:
        end(graph)
        raise torch.AcceleratorError("CUDA error: out of memory")

    with torch.inference_mode(), model.decoding():
        decoder, before = Decoder(model, KVCache(slots=2, device=CUDA)), torch.cuda.current_stream()
        decoder.step([5, 6])
        with monkeypatch.context() as patch, pytest.raises(OutOfMemory), refusals_told():
            patch.setattr(torch.cuda.CUDAGraph, "capture_end", refused)
            decoder.step([5, 6])
        assert torch.cuda.current_stream() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_refused_work_leaves_nothing_to_the_next(backend: BackendName, tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("llama"), backend)
    model.use_gradient_checkpointing(3)
    share = torch.cuda.memory_reserved() + 600 * 2**20
    torch.cuda.set_per_process_memory_fraction(share / torch.cuda.get_device_properties(0).total_memory)
    try:
        for copies in (20_000, 15_000, 10_000):  # refused in one place or another
            with pytest.raises(OutOfMemory):
                _need(model, PAIRS * (copies // len(PAIRS)), 0)
            assert _need(model, PAIRS, 0) < 2**29
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_work_stays_within_a_share_of_the_card(tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("llama"), "transformers")
    total = torch.cuda.get_device_properties(0).total_memory
    share = torch.cuda.memory_reserved() + 600 * 2**20
    torch.cuda.set_per_process_memory_fraction(share / total)
    try:
        assert free_bytes(CUDA) < 700 * 2**20
        assert rows_at_once(model, 128) >= 1
        with pytest.raises(OutOfMemory), refusals_told():
            torch.empty(2**30, dtype=torch.uint8, device=CUDA)
        many = [replace(pair, record_id=str(n)) for n in range(400) for pair in PAIRS[:1]]
        lengths = [lengths_of(pair) for pair in many]
        budget = token_budget(
            model, many, lambda b: plan_batches(lengths, batch_size=400, token_budget=b, seed=0), 0, TrainConfig()
        )
        model.use_gradient_checkpointing(budget.recomputed)
        (longest,) = plan_batches(lengths, batch_size=400, token_budget=budget.tokens, seed=0)
        for micro_batch in longest:  # runs out of memory if the budget was too large
            real, _ = pair_logps(model, pack_row([many[i] for i in micro_batch], CUDA))
            real.sum().backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
