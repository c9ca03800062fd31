"""A model on a GPU, for both backends: as far from fp32 as rounding goes, whatever is recomputed, replayed or aside."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import moved_adapter
from on_cuda import BACKENDS, CUDA, ON_CUDA, PAIRS, ROUNDING, computed, load, relative
from torch import Tensor

from qspin.config import BackendName
from qspin.decoding import Decoder, replayable
from qspin.fitting import footprint
from qspin.fitting.footprint import GROWTH
from qspin.generation import Completion, Request, generate
from qspin.layers import attention
from qspin.layers.kv_cache import KVCache
from qspin.model import SlotModel
from qspin.packing import pack_row
from qspin.scoring import pair_logps, score_pairs

pytestmark = ON_CUDA


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ROUNDING)
@pytest.mark.parametrize("recomputed", [0, 1, 3])
def test_log_probs_and_gradients(
    backend: BackendName, architecture: str, recomputed: int, tiny_folder: Callable[[str], Path]
) -> None:
    """16 bits with every kernel are about as far from fp32 with none as 16 bits on a CPU are."""
    found = computed(load(tiny_folder(architecture), backend), recomputed)
    wanted = computed(load(tiny_folder(architecture), "transformers", dtype="float32"), recomputed)
    for one, other, on_a_cpu in zip(found, wanted, ROUNDING[architecture], strict=True):
        assert relative(one, other) < 1.5 * on_a_cpu


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ROUNDING)
@pytest.mark.parametrize("flashes", [True, False])
def test_in_float16_as_without_bfloat16(
    backend: BackendName,
    architecture: str,
    flashes: bool,
    tiny_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What Turing's cards compute in and with: they have no flash kernel. Rounding is an eighth of bfloat16's."""
    if not flashes:
        monkeypatch.setattr(attention, "can_flash", lambda _query: False)
    found = computed(load(tiny_folder(architecture), backend, dtype="float16"), 1)
    wanted = computed(load(tiny_folder(architecture), "transformers", dtype="float32"), 1)
    for one, other, bfloat16_on_a_cpu in zip(found, wanted, ROUNDING[architecture], strict=True):
        assert relative(one, other) < 1.5 * bfloat16_on_a_cpu


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_what_training_starts_from(backend: BackendName, tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("llama"), backend)
    micro_batches = [[0, 1, 2], [3, 4, 5]]
    scores = [score for part in score_pairs(model, PAIRS, micro_batches) for score in part]
    for recomputed in (0, 1, 3):
        model.use_gradient_checkpointing(recomputed)
        for micro_batch, offset in zip(micro_batches, (0, 3), strict=True):
            real, generated = pair_logps(model, pack_row([PAIRS[i] for i in micro_batch], CUDA))
            own = scores[offset : offset + 3]
            assert real.tolist() == [score.opponent_real_logps for score in own]
            assert generated.tolist() == [score.opponent_generated_logps for score in own]


def greedy(model: SlotModel) -> list[Completion]:
    requests = [Request(tuple(range(3, 12 + n)), n) for n in range(5)]
    return generate(
        model, requests, max_new_tokens=12, temperature=0, top_p=1.0, width=4, stop_ids=frozenset(),
        on_step=lambda _new, _work: None,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_is_swapped_in_plays(backend: BackendName, tiny_folder: Callable[[str], Path]) -> None:
    """Kernels keep what they made of weights; none may decode as the player before."""
    model = load(tiny_folder("llama"), backend, seed=3)
    first, second = moved_adapter(model, seed=3), moved_adapter(model, seed=4)
    played = [greedy(model)]
    for adapter in (second, first):
        pair_logps(model, pack_row(PAIRS, CUDA))[0].sum().backward()
        model.set_adapter(adapter)
        played.append(greedy(model))
    assert played[0] == played[2] != played[1]
    assert played[1] == greedy(load(tiny_folder("llama"), backend, seed=4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ROUNDING)
def test_replayed_steps_are_the_computed_ones(
    backend: BackendName, architecture: str, tiny_folder: Callable[[str], Path]
) -> None:
    """Rows leave and come, and the cache grows, as in generation between two trainings that recompute layers."""
    model = load(tiny_folder(architecture), backend)
    model.use_gradient_checkpointing(2)
    assert replayable(model)
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 90, (220, 11), generator=chance).tolist()

    def logits(replays: bool) -> list[Tensor]:
        cache = KVCache(slots=11, device=CUDA)
        decoder = Decoder(model, cache)
        decoder._replays = replays
        found = []
        for step, row in enumerate(tokens):
            live = 7 if step < 40 else 11 if step < 60 else 2
            if step == 40:
                cache.lengths[:] = 0
            found.append(decoder.step(row[:live]).clone())
        assert cache.places > GROWTH["cuda"]
        assert [rows for rows, step in decoder._steps.items() if step is not None] == ([2] if replays else [])
        return found

    with torch.inference_mode(), model.decoding():
        for one, other in zip(logits(replays=True), logits(replays=False), strict=True):
            assert relative(one, other) < 2 * ROUNDING[architecture][0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_replayed_steps_of_many_rows(backend: BackendName, tiny_folder: Callable[[str], Path]) -> None:
    """Beyond those that kernels multiply by the 4 bits as they are: W is made within the graph."""
    model = load(tiny_folder("llama"), backend)
    tokens = torch.randint(5, 90, (6, 200), generator=torch.Generator().manual_seed(0)).tolist()

    def logits(replays: bool) -> list[Tensor]:
        decoder = Decoder(model, KVCache(slots=200, device=CUDA))
        decoder._replays = replays
        return [decoder.step(row).clone() for row in tokens]

    with torch.inference_mode(), model.decoding():
        for one, other in zip(logits(replays=True), logits(replays=False), strict=True):
            assert relative(one, other) < 2 * ROUNDING["llama"][0]


# --- what lies in main memory ---


def decoded_and_trained(model: SlotModel) -> tuple[list[Tensor], list[Tensor]]:
    """Logits of some steps; log-probs and gradients."""
    with torch.inference_mode(), model.decoding():
        decoder = Decoder(model, KVCache(slots=3, device=CUDA))
        steps = [decoder.step(tokens).clone() for tokens in ([5, 6], [7, 8, 9], [10, 11, 12], [13, 14], [15, 16])]
    real, generated = pair_logps(model, pack_row(PAIRS, CUDA))
    (real - generated).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters.values()]
    assert all(gradient is not None and gradient.is_cuda for gradient in gradients)
    return steps, [real.detach(), generated.detach(), *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_embedding_table_in_main_memory_changes_no_bit(
    backend: BackendName, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def figures(where: str) -> tuple[str, list[Tensor]]:
        model = load(tiny_folder("mistral"), backend)
        assert model._embeddings.weight.device.type == where
        steps, trained = decoded_and_trained(model)
        return model.base_hash(), steps + trained

    name, wanted = figures("cuda")
    monkeypatch.setattr(footprint, "ASIDE", 0.0)
    again, found = figures("cpu")
    assert again == name
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_in_main_memory(
    backend: BackendName, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores and gradients are the same bits. Of a recorded step the head is not: it may round elsewhere."""
    monkeypatch.setitem(footprint.MOST_WIDTH, "cuda", 192)  # three parts

    def figures(aside: bool) -> tuple[str, list[Tensor], list[Tensor]]:
        model = load(tiny_folder("gemma2"), backend)
        assert model.head.aside is aside
        assert model.head.weight.is_pinned() is aside
        return model.base_hash(), *decoded_and_trained(model)

    name, steps, wanted = figures(aside=False)
    monkeypatch.setattr(footprint, "HEAD_ASIDE", 0.0)
    again, found_steps, found = figures(aside=True)
    assert again == name
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    for one, other in zip(found_steps, steps, strict=True):
        assert relative(one, other) < ROUNDING["gemma2"][0]
