"""Where the time goes: operations of scoring, training and decoding, by the part of the work that they belong to.

    benchmarks/.venv/bin/python benchmarks/bench_parts.py --data mine.jsonl

One effective batch is scored and trained on, and decoding steps are made at several widths, under PyTorch's profiler;
its shares are taken of the time without it. Beside them stands what each kind of work reaches of the machine's rates
as `qspin plan` reckons it. The last line is the time of the training step over what its products with the model's
weights and its head would take at the rate that this machine reaches on a large product.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import astuple

import torch
from contestants import DEVICE, make_config, opponents_pairs, prepared, slot_model
from harness import arguments, in_fresh_process, say, write

from qspin.config import RunConfig
from qspin.decoding import Decoder
from qspin.fitting.footprint import Batch, Footprint
from qspin.fitting.work import forward_work, step_bytes, step_work, training_work
from qspin.layers.kv_cache import KVCache
from qspin.machine import Machine, this_machine
from qspin.model import SlotModel
from qspin.packing import Row, common_prefix, lengths_of, pack_row
from qspin.records import Pair
from qspin.scoring import pair_logps

WIDTHS = (16, 64, 128)
PLACES = 190  # a prompt and most of its completion
PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_"}
ATTENTION = {
    "aten::bmm", "aten::baddbmm", "aten::_softmax", "aten::_softmax_backward_data", "aten::index_select",
    "aten::index_add_", "aten::_index_put_impl_", "_SpanAttention", "_SpanAttentionBackward",
}  # fmt: skip
WEIGHTS, HEAD, LORA, REST = "products with W", "products with the head", "products with A and B", "all else"
PARTS = (WEIGHTS, HEAD, LORA, "attention", "dequantising", REST)


def main() -> None:
    options = arguments(__doc__ or "", rows=8).parse_args()
    config = make_config(options.data, rows=options.rows, cap=options.cap, batch_size=options.rows)
    pairs = in_fresh_process(opponents_pairs, config)
    machine, tables = in_fresh_process(_measured, config, pairs)
    for name, table in tables.items():
        total = sum(table.values())
        say(f"{name}: {total:.0f} ms: " + ", ".join(f"{part} {table[part] / total:.0%}" for part in PARTS))
    reached = {
        name: 1e3 * seconds / sum(tables[name].values()) for name, seconds in _at_best(config, machine, pairs).items()
    }
    say("reached of the machine's rates: " + ", ".join(f"{name} {share:.0%}" for name, share in reached.items()))
    floor = 1e3 * _products(config, pairs) / machine.flops
    ratio = sum(tables["training"].values()) / floor
    meaning = f"time of a training step over the {floor:.0f} ms of its products at {machine.flops / 1e9:.0f} GFLOP/s"
    if options.write:
        content = {"ratio": ratio, "ratio_means": meaning, "tokens": _batch(pairs).tokens, "milliseconds": tables}
        content |= {"flops": machine.flops, "bandwidth": machine.bandwidth, "reached": reached}
        write("parts", content)
    say(meaning)
    say(f"ratio {ratio:.2f}")


def _measured(config: RunConfig, pairs: tuple[Pair, ...]) -> tuple[Machine, dict[str, dict[str, float]]]:
    """The machine, and the milliseconds of each part of each kind of work."""
    model = slot_model(config, prepared(config))
    row = pack_row(pairs, DEVICE, common_prefix([pair.prompt_ids for pair in pairs]))
    machine = this_machine(config.model)
    tables = {
        "scoring": _parts(config, lambda: _score(model, row)),
        "training": _parts(config, lambda: train_step(model, row)),
    }
    with torch.inference_mode(), model.decoding():
        for width in WIDTHS:
            tables[f"decoding, {width} rows"] = _parts(config, decoding_step(model, width))
    return machine, tables


def _score(model: SlotModel, row: Row) -> None:
    with torch.no_grad():
        pair_logps(model, row)


def train_step(model: SlotModel, row: Row) -> None:
    real, generated = pair_logps(model, row)
    (real - generated).sum().backward()  # type: ignore[no-untyped-call]


def decoding_step(model: SlotModel, width: int) -> Callable[[], None]:
    cache = KVCache(slots=width, device=DEVICE)
    decoder = Decoder(model, cache)

    def step() -> None:
        cache.lengths[:] = PLACES
        decoder.step([0] * width)

    return step


def _parts(config: RunConfig, work: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of each part."""
    milliseconds = 1e3 * median_seconds(work)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        work()
    found: Counter[str] = Counter()
    for event in profile.events():
        found[_part(config, event.name, event.input_shapes)] += event.self_cpu_time_total
    return {part: milliseconds * found[part] / found.total() for part in PARTS}


def median_seconds(work: Callable[[], None]) -> float:
    taken = []
    for _ in range(7):
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[2:])


def _part(config: RunConfig, name: str, shapes: Sequence[Sequence[int]]) -> str:
    if "dequantize" in name:
        return "dequantising"
    if name in ATTENTION:
        return "attention"
    if name == "mkldnn::_linear_pointwise":
        return WEIGHTS  # W and A as one matrix; and the head, once a step
    if name not in PRODUCTS:
        return REST
    architecture = config.model.architecture
    assert architecture is not None
    left, right = (shape for shape in shapes[-2:] if len(shape) == 2) if name == "aten::mm" else shapes[1:3]
    if min(*left, *right) <= 3 * config.lora.rank:  # three layers that read the same input
        return LORA
    heads, kv_heads = architecture.heads * architecture.head_size, architecture.kv_heads * architecture.head_size
    return WEIGHTS if {*right} <= {architecture.hidden, architecture.intermediate, heads, kv_heads} else HEAD


def _products(config: RunConfig, pairs: Sequence[Pair]) -> float:
    """Floating-point operations of a training step's products with W and the head, forward and backward."""
    a = config.model.architecture
    assert a is not None
    attention = 2 * a.hidden * (a.heads + a.kv_heads) * a.head_size
    weights = a.layers * (attention + 3 * a.hidden * a.intermediate)
    batch = _batch(pairs)
    return 4.0 * (batch.tokens * weights + batch.predicted * a.vocabulary * a.hidden)


def _batch(pairs: Sequence[Pair]) -> Batch:
    prefix = common_prefix([pair.prompt_ids for pair in pairs])
    return Batch.of([astuple(lengths_of(pair, prefix)) for pair in pairs], prefix)


def _at_best(config: RunConfig, machine: Machine, pairs: Sequence[Pair]) -> dict[str, float]:
    """Seconds that `plan.py` reckons with before it takes its share of the machine's rates."""
    assert config.model.architecture is not None
    footprint = Footprint(
        shape=config.model.architecture,
        rank=config.lora.rank,
        targets=None,
        device=machine.device,
        itemsize=machine.itemsize,
        recomputed=0,
    )
    batch = _batch(pairs)
    seconds = {
        "scoring": forward_work(footprint, batch) / machine.flops,
        "training": training_work(footprint, batch) / machine.flops,
    }
    for width in WIDTHS:
        moved = step_bytes(footprint, width, PLACES, unpacked=True) / machine.bandwidth
        seconds[f"decoding, {width} rows"] = step_work(footprint, width) / machine.flops + moved
    return seconds


if __name__ == "__main__":
    main()
