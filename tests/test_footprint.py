"""Formulas of memory, by hand and against what real models hold."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import FAMILIES, TINY
from torch import Tensor

from qspin.config import load_config
from qspin.fitting import footprint
from qspin.fitting.footprint import ASIDE, HEAD_ASIDE, Batch, Footprint
from qspin.layers import kv_cache
from qspin.layers.attention import Lengths, Packed
from qspin.model import SlotModel
from qspin.optimisation import make_optimizer
from qspin.packing import lengths_of, pack_row
from qspin.records import Pair
from qspin.scoring import pair_logps

CPU = torch.device("cpu")
GROUPS = [(10, 20, 30), (5, 8, 0)]  # prompt, real, generated
PREFIX = 4
PAIRS = [
    Pair(str(n), 0, (1, 2, 3, 4, *range(5, 5 + prompt)), tuple(range(5, 5 + real)), (7,) * generated, ended=True)
    for n, (prompt, real, generated) in enumerate([*GROUPS, (30, 40, 50), (11, 90, 60)])
]


def tiny(*, device: footprint.Device = "cpu", itemsize: int = 4, recomputed: int = 0, **shape: Any) -> Footprint:
    return Footprint(TINY.model_copy(update=shape), 4, None, device, itemsize, recomputed)


# --- by hand


def test_weights_by_hand() -> None:
    # q and o 64·64, k and v 64·32, gate, up and down 64·128
    assert tiny().linear_weights == 3 * 36_864
    # half a byte a weight, a code of 64 bytes; a byte a block of 64, 4 for 256 of those, 1028; on a CPU 4 a block
    q, k, gate = 2048 + 64 + (64 + 4 + 1028), 1024 + 64 + (32 + 4 + 1028), 4096 + 64 + (128 + 4 + 1028)
    assert tiny(device="cuda").quantised(True) == 3 * (2 * q + 2 * k + 3 * gate)
    assert tiny().quantised(True) == 3 * (2 * q + 2 * k + 3 * gate) + 4 * 3 * 36_864 // 64
    assert tiny(device="cuda").quantised(False) == 3 * 36_864 // 2 + 3 * 7 * 64 + 4 * 3 * 36_864 // 64
    assert tiny().unquantised() == 4 * (512 * 64 + 7 * 64)


def test_an_embedding_table_is_put_aside_where_there_is_little_room() -> None:
    table = 2 * 512 * 64
    small = tiny(device="cuda", itemsize=2, tied_embeddings=False)
    assert small.set_aside(table / ASIDE - 1) == table
    assert small.set_aside(0) == table
    assert small.set_aside(table / ASIDE) == 0  # room enough
    assert small.set_aside(-1) == 0  # it does not load
    tied = tiny(device="cuda", itemsize=2)  # the head needs it, and copies all of it
    room = table / HEAD_ASIDE
    assert (tied.set_aside(0), tied.set_aside(room - 1), tied.set_aside(room)) == (table, table, 0)
    assert tiny(tied_embeddings=False).set_aside(0) == 0  # it is there already


def test_a_gpu_without_the_flash_kernel_attends_as_a_cpu_does() -> None:
    def kept(device: footprint.Device, **flash: bool) -> int:
        return replace(tiny(device=device, itemsize=2), **flash).kept(Batch.of(GROUPS, PREFIX))

    assert kept("cuda", flash=False) == kept("cpu")
    scores = 2 * 3 * 4 * Batch.of(GROUPS, PREFIX).scores  # bytes, layers, heads
    assert kept("cuda", flash=False) - kept("cuda") > scores - 4 * 3 * 4 * Batch.of(GROUPS, PREFIX).tokens


def test_adapters_by_hand() -> None:
    # r·(inputs + outputs)
    assert tiny().adapter_weights == 3 * 4 * (2 * 128 + 2 * 96 + 3 * 192)
    some = Footprint(TINY, 4, frozenset({"q_proj", "v_proj"}), "cuda", 2, recomputed=0)
    assert some.adapter_weights == 3 * 4 * (128 + 96)
    assert some.adapter() == some.gradients() == 4 * some.adapter_weights
    assert some.optimizer("adamw") == 8 * some.adapter_weights


def test_a_batch_counts_spans() -> None:
    batch = Batch.of(GROUPS, PREFIX)
    assert batch.tokens == 4 + 60 + 13
    assert batch.predicted == 58
    assert batch.seen == 4 + 34 + 44 + 17
    assert batch.scores == 4 * 4 + 30 * 34 + 30 * 44 + 13 * 17
    assert batch.largest == 30 * 44
    row = Packed([Lengths(*group) for group in GROUPS], CPU, PREFIX)
    assert batch.seen == len(row.key_places)
    assert batch.scores == sum(
        (queries.stop - queries.start) * (keys.stop - keys.start)
        for queries, keys in zip(row.queries, row.keys, strict=True)
    )


def test_activations_by_hand() -> None:
    batch = Batch.of([(10, 20, 30)])  # T 60, spans of 30·30 and 30·40
    # two norms' inputs, attention's result, gate and up, x·Aᵀ of seven layers; queries, keys, values and weights
    a_layer = (2 * 64 + 64 + 2 * 128 + 7 * 4) * 60 + 4096 + (64 + 2 * 32) * 60 + 4 * 2100
    around = 64 * (2 * 60 + 50) + 2 * 16 * 60
    masks = 2 * 2100
    assert tiny().kept(batch) == 4 * (3 * a_layer + around + masks)
    assert tiny(recomputed=1).kept(batch) == 4 * (64 * 60 + 2 * a_layer + around + masks)
    assert tiny(recomputed=3).kept(batch) == 4 * (3 * 64 * 60 + around + masks)
    # the head: all 512 logits of 50 tokens at once, and their directions; the MLP: gate and up, two gradients, both W
    head = 4 * 512 * 50 + 18 * 50 * 64
    layer = 4 * (2 * 128 * 60 + 2 * 64 * 128 + 2 * 64 * 60)
    assert tiny().working(batch) == max(head, layer) == head
    assert tiny(recomputed=2).working(batch) == head  # at the last layer; at those before it, what that kept is gone
    assert tiny(recomputed=3).working(batch) == layer + 4 * a_layer


def test_a_gpus_kernel_keeps_no_weights_of_attention() -> None:
    batch = Batch.of([(10, 20, 30)])
    wide = tiny(itemsize=2).kept(batch) - 3 * 2 * 4 * 2100 - 2 * 2 * 2100  # weights and masks
    assert tiny(device="cuda", itemsize=2).kept(batch) == wide + 3 * 4 * 4 * 60  # a sum a query and head
    assert tiny(device="cuda", family="gemma2", itemsize=2).kept(batch) == tiny(family="gemma2", itemsize=2).kept(batch)
    assert tiny(device="cuda").kept(batch) == tiny().kept(batch)  # fp32: ours


def test_logits_come_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Batch.of([(10, 200, 300)])
    whole = tiny()._head(batch.predicted, training=False)
    assert whole == 4 * 512 * 500
    monkeypatch.setitem(footprint.LOGITS_AT_ONCE, "cpu", 64 * 500)
    assert tiny()._head(batch.predicted, training=False) == (4 + 4) * 64 * 500  # the last one is still there
    assert tiny(family="gemma2")._head(batch.predicted, training=False) == (12 + 8) * 64 * 500


@pytest.mark.parametrize("training", [False, True])
def test_of_a_head_in_main_memory_a_block_is_there(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def head(aside: bool) -> int:
        return replace(tiny(device="cuda", itemsize=2), head_aside=aside)._head(50, training=training)

    assert head(True) - head(False) == 2 * 512 * 64
    monkeypatch.setitem(footprint.MOST_WIDTH, "cuda", 128)
    assert head(True) - head(False) == 2 * 128 * 64


def test_blocks_of_the_vocabulary_are_as_wide_as_fast_kernels_like() -> None:
    assert footprint.vocabulary_step("cuda", 1) == 2**15
    assert footprint.vocabulary_step("cuda", 1000) == 16768  # 2²⁴ / 1000, rounded down to a multiple of 64
    assert footprint.vocabulary_step("cuda", 2**24 // 63) == 63  # too narrow for that
    assert footprint.vocabulary_step("cuda", 2**25) == 1
    assert footprint.vocabulary_step("cpu", 1000) == 4194


def test_holes_are_a_cpus() -> None:
    batch = Batch.of([(10, 20, 30)])
    assert tiny().holes(batch) == 4 * 3 * 2 * 64 * 128 + int(0.3 * tiny().kept(batch))
    large = tiny(hidden=2048, intermediate=8192)  # the largest W that is not mapped makes queries, keys, values
    assert large.holes(batch) == 4 * 3 * 2048 * (64 + 2 * 32) + int(0.3 * large.kept(batch))
    assert tiny(device="cuda").holes(batch) == 0


def test_generation_by_hand() -> None:
    # keys and values of 3 layers and one more, 128 places for 100; scores and mask; a nucleus of 512 logits
    assert tiny().row(100) == 2 * 4 * 32 * 128 * 4 + (2 * 4 + 2) * 128 * 4 + 33 * 512
    room = tiny().prefill(100) + 5.5 * tiny().row(100)
    assert tiny().rows_that_fit(room, 100) == 5
    assert tiny().rows_that_fit(1e12, 100) == footprint.MOST_ROWS["cpu"]
    assert tiny().rows_that_fit(1.0, 100) == 0


# --- against real models


def tensors_of_base(model: SlotModel) -> tuple[int, int]:
    """Bytes of the 4-bit layers with their constants, and of the other weights."""
    quantised = unquantised = 0
    slot = {id(parameter) for parameter in model.parameters.values()}
    for parameter in model.peft_model.parameters():
        state = getattr(parameter, "quant_state", None)
        if id(parameter) in slot:
            continue
        if state is None:
            unquantised += parameter.nbytes
            continue
        nested = (state.state2.absmax, state.state2.code, state.offset) if state.nested else ()
        quantised += sum(tensor.nbytes for tensor in (parameter, state.absmax, state.code, *nested))
    unpacked = sum(constants.absmax.nbytes for layers in model._layers for _, constants, _ in layers.packed)
    return quantised + unpacked, unquantised


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_loaded_model_has_the_bytes_that_were_counted(
    architecture: str, double_quant: bool, tiny_model: Callable[..., SlotModel]
) -> None:
    model = tiny_model(architecture, double_quant=double_quant)
    counted = model.footprint
    assert (counted.quantised(double_quant), counted.unquantised()) == tensors_of_base(model)
    adapter = sum(parameter.nbytes for parameter in model.parameters.values())
    assert counted.gradients() == adapter
    assert counted.adapter() == 2 * adapter  # with the first opponent


@pytest.mark.parametrize("name", ["adamw", "rmsprop"])
def test_an_optimizers_state_has_the_bytes_that_were_counted(name: str, tiny_model: Callable[..., SlotModel]) -> None:
    model = tiny_model()
    parameters = list(model.parameters.values())
    config = load_config(None, {"train.optimizer": name}).train
    optimizer = make_optimizer(config, parameters, CPU)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = [
        tensor.nbytes
        for tensors in optimizer.state.values()
        for tensor in tensors.values()
        if isinstance(tensor, Tensor) and tensor.numel() > 1
    ]
    assert sum(state) == model.footprint.optimizer(name)


@pytest.mark.parametrize("recomputed", [0, 1, 2, 3])
@pytest.mark.parametrize("architecture", FAMILIES)
def test_a_forward_pass_keeps_the_bytes_that_were_counted(
    architecture: str, recomputed: int, tiny_model: Callable[..., SlotModel]
) -> None:
    model = tiny_model(architecture, moved=True)
    model.use_gradient_checkpointing(recomputed)
    counted = model.footprint
    assert counted.recomputed == recomputed
    batch = Batch.of([(g.prompt, g.real, g.generated) for g in (lengths_of(pair, PREFIX) for pair in PAIRS)], PREFIX)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.peft_model.parameters()}
    found: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.is_floating_point() and storage.data_ptr() not in weights:
            found[storage.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        real, generated = pair_logps(model, pack_row(PAIRS, CPU, PREFIX))
    kept = sum(tensor.untyped_storage().nbytes() for tensor in found.values())
    del real, generated
    # masks are the layout's, the hidden state is a variable's, and so are positions where all layers are recomputed
    elsewhere = counted.shape.hidden + (2 * counted.shape.head_size if recomputed == 3 else 0)
    expected = counted.kept(batch) - counted._masks(batch) - 4 * elsewhere * batch.tokens
    assert kept == pytest.approx(expected, rel=0.02)


def test_a_cache_has_the_bytes_that_were_counted() -> None:
    cache = kv_cache.KVCache(slots=5, device=CPU)
    cache.reserve(100)
    for layer in range(3):
        cache.layer(layer, torch.zeros(2, 7, 16))
    held = sum(keys.nbytes + values.nbytes for keys, values in cache._layers.values())
    grown = math.ceil(100 / footprint.GROWTH["cpu"]) * footprint.GROWTH["cpu"]
    other = (2 * 4 + 2) * grown * 4 + footprint.SAMPLING * 512
    assert 5 * (tiny().row(100) - other) * 3 / 4 == held
