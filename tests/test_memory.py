"""Memory that is there, taken, given back and refused, whoever refuses it."""

from __future__ import annotations

import itertools
import os
import platform
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch

from qspin import budget
from qspin.fitting import memory
from qspin.fitting.memory import OutOfMemory, keep_freed_memory, peak, refusals_told
from qspin.layers.attention import Packed
from qspin.layers.lora import FusedLayers
from qspin.packing import Row, pack_row
from qspin.records import Pair

CPU = torch.device("cpu")
PAIRS = [Pair(str(n), 0, (1,) * 10, (2,) * (20 + n), (3,) * 30, ended=True) for n in range(4)]

# --- what is taken ---


def test_peak_sees_what_a_block_takes_and_gives_back() -> None:
    size = 1 << 30  # what is this large never comes from blocks that malloc kept
    with peak(CPU) as measured:
        block = torch.ones(size, dtype=torch.uint8)
        del block
    assert 0.95 * size < measured.above < 1.05 * size


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere freed memory is the allocator's business")
def test_what_was_freed_before_does_not_hide_what_work_takes() -> None:
    """In a process of its own, as the allocator's settings are for good."""
    script = (
        "import torch\n"
        "from qspin.fitting.memory import give_back_freed_memory, keep_freed_memory, peak\n"
        "keep_freed_memory()\n"
        "def work():\n"
        "    parts = [torch.ones(1 << 20) for _ in range(60)]\n"  # 4 MiB each
        "    return len(parts)\n"
        "work()\n"
        "with peak(torch.device('cpu')) as hidden: work()\n"
        "give_back_freed_memory()\n"
        "with peak(torch.device('cpu')) as shown: work()\n"
        "print(hidden.above >> 20, shown.above >> 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    hidden, shown = map(int, done.stdout.split())
    assert hidden < 120, "else there is nothing to mend"
    assert shown > 200


def test_free_bytes_is_what_the_system_says() -> None:
    assert 0 < memory.free_bytes(CPU) < 1 << 50


def test_what_is_used_is_this_process_and_the_total_is_the_machine() -> None:
    before, total = memory.used_and_total(CPU)
    held = torch.ones(1 << 28, dtype=torch.uint8)
    after, _ = memory.used_and_total(CPU)
    assert 0 < before < after < total
    assert after - before == pytest.approx(held.numel(), rel=0.2)
    assert memory.free_bytes(CPU) < total


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


# --- what is refused ---


def test_a_refused_tensor_is_out_of_memory_and_nothing_else_is() -> None:
    with pytest.raises(OutOfMemory), refusals_told():
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), refusals_told():
        torch.ones(2, 3) @ torch.ones(2, 3)


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


def test_work_refused_in_any_product_leaves_nothing_to_the_next(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if somebody holds the error, and lets it go in the midst of the next work."""
    model, product = tiny_model(), FusedLayers.product
    model.use_gradient_checkpointing(3)
    held: list[Exception] = []
    inputs: list[weakref.ref[torch.Tensor]] = []
    calls = itertools.count()
    refused = -1

    def watched(self: FusedLayers, x: torch.Tensor, *rest: Any) -> Any:
        inputs.append(weakref.ref(x))
        call = next(calls)
        if call == refused:
            held.append(torch.OutOfMemoryError("no"))
            raise held[0]
        if call == refused + 2:
            held.clear()
        return product(self, x, *rest)

    def work() -> torch.Tensor:
        for parameter in model.parameters.values():
            parameter.grad = None
        with refusals_told():
            real, generated = budget.pair_logps(model, pack_row(PAIRS, CPU))
            (real - generated).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters.values()])

    monkeypatch.setattr(FusedLayers, "product", watched)
    undisturbed = work()
    products = next(calls)
    assert products == 12 + 9, "all but each layer's last are computed again"
    for number in range(products):
        refused, calls = number, itertools.count()
        inputs.clear()
        with pytest.raises(OutOfMemory):
            work()
        assert not any(x() is not None for x in inputs)
        assert torch.equal(work(), undisturbed)
        assert not held


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
@pytest.mark.parametrize("recomputed", [0, 3])
@pytest.mark.parametrize("measured", [True, False])
def test_work_refused_between_layers_of_one_input_leaves_nothing_to_the_next(
    measured: bool, recomputed: int, norm: str, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3's queries are normed before its keys are asked for, which are there by then."""
    model, rows = tiny_model("qwen3"), list[weakref.ref[Packed]]()
    model.use_gradient_checkpointing(recomputed)

    def packed(*args: Any) -> Row:
        if measured:  # while the memory that is taken is watched
            assert not any(row() is not None for row in rows)
        row = pack_row(*args)
        rows.append(weakref.ref(row.layout))  # attention's graph has it
        return row

    def work() -> None:
        if measured:
            budget._need(model, PAIRS[:2], 0)
        else:
            with refusals_told():
                budget.pair_logps(model, packed(PAIRS[:2], CPU))[0].sum().backward()

    def refused(_x: torch.Tensor) -> torch.Tensor:
        assert [row() is not None for row in rows] == [False] * (len(rows) - 1) + [True]
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(budget, "pack_row", packed)
    layers = model._decoder.layers
    monkeypatch.setattr(getattr(layers[-1].self_attn, norm), "forward", refused)
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            work()
    monkeypatch.setattr(layers[0].input_layernorm, "forward", refused)
    with pytest.raises(OutOfMemory):
        work()
    assert not any(row() is not None for row in rows)
