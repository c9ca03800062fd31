"""What a plan says against what the work takes: memory of training and generation on a CPU, and the time of a run.

    benchmarks/.venv/bin/python benchmarks/bench_plan.py --data mine.jsonl

Memory is what becomes resident above the loaded model, once with every larger tensor in memory of its own, which
shows what tensors take, and once as runs keep it (`memory.keep_freed_memory`), with the holes of a heap. Then a short
run is planned and played, a few times. The last line is the measured time of a run over the planned.
"""

from __future__ import annotations

import ctypes
import datetime
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from harness import arguments, in_fresh_process, say, write
from safetensors.torch import save_file

from qspin.base import find_base
from qspin.config import RunConfig, load_config
from qspin.fitting.memory import keep_freed_memory, peak
from qspin.generation import Request, generate
from qspin.machine import Machine, this_machine
from qspin.model import SlotModel
from qspin.packing import lengths_of, plan_batches
from qspin.planning.plan import Plan, make_plan
from qspin.planning.plan_rows import Rows, rows_of_data
from qspin.prepare import prepare
from qspin.records import Pair
from qspin.run_dir import RunDir
from qspin.scoring import score_pairs
from qspin.spin import run
from qspin.training import Task, train
from qspin.units import GIB
from qspin.watch.progress import Audience

CPU = torch.device("cpu")
ROOMY = Machine("made up", "cpu", 8 * GIB, 2, 1e12, 1e10, measured=True)
TENSORS = ("gradients", "optimiser (adamw)", "activations kept", "a layer's backward pass, or the head")
HOLES = "holes in the heap"
ROWS, HELDOUT = 32, 8
LAYERS = 16  # all of Llama 3.2 1B's


class Case(NamedTuple):
    """Training to measure: steps of two micro-batches, of pairs of one length (prompt, real, generated)."""

    layers: int | None  # so many of Llama 3.2 1B's, of random weights; None: SmolLM2-135M
    lengths: tuple[int, int, int]
    pairs: int  # a micro-batch
    checkpointing: bool
    steps: int


class Bytes(NamedTuple):
    """Above the loaded model."""

    planned: int
    planned_with_holes: int
    measured: int


CASES = {
    "SmolLM2-135M, 1,500 tokens at once": Case(None, (40, 220, 240), 3, checkpointing=False, steps=4),
    "the same with gradient checkpointing": Case(None, (40, 220, 240), 3, checkpointing=True, steps=4),
    "Llama 3.2 1B's shape, 280 tokens at once": Case(LAYERS, (20, 120, 140), 1, checkpointing=False, steps=4),
    "Llama 3.2 1B's shape with gradient checkpointing": Case(LAYERS, (20, 120, 140), 1, checkpointing=True, steps=4),
}


def main() -> None:
    options = arguments(__doc__ or "", rows=ROWS).parse_args()
    memory: dict[str, dict[str, Any]] = {}
    for name, case in CASES.items():
        both = {kind: in_fresh_process(training, case, mapped) for kind, mapped in (("mapped", True), ("kept", False))}
        memory[name] = {kind: found._asdict() for kind, found in both.items()}
        say(f"{name}: {memory[name]}")
    decoding = in_fresh_process(generation, 64, 40)._asdict()
    say(f"SmolLM2-135M decoding 64 rows: {decoding}")
    runs = [in_fresh_process(planned_run, options.data, options.rows) for _ in range(options.repeats)]
    for played in runs:
        say(f"seconds, planned and measured: {played}")
    ratio = statistics.median(
        sum(taken for _, taken in played.values()) / sum(planned for planned, _ in played.values()) for played in runs
    )
    meaning = f"measured over planned seconds of a run of {options.rows} rows, median of {options.repeats}"
    if options.write:
        write("plan", {"ratio": ratio, "ratio_means": meaning, "memory": memory, "decoding": decoding, "runs": runs})
    say(f"{meaning}: {ratio:.2f}")


def training(case: Case, mapped: bool) -> Bytes:
    """Planned and measured, the latter in this process, which should have done nothing else."""
    _set_malloc(mapped)
    with tempfile.TemporaryDirectory() as scratch:
        config, lengths = _config(case, Path(scratch)), [case.lengths] * (2 * case.pairs)
        model = SlotModel.load(find_base(config.model), config.model, config.lora, seed=0, device=CPU)
        plan = _plan(config, model, lengths)
        parts = dict(plan.phases[2].parts)
        planned = sum(parts[name] for name in TENSORS)
        model.use_gradient_checkpointing(plan.recomputed)
        measured = _measured(model, some_pairs(lengths), config, Path(scratch))
    return Bytes(planned, planned + parts[HOLES], measured)


def _config(case: Case, scratch: Path) -> RunConfig:
    settings = {
        "generation.max_new_tokens": case.lengths[2],
        "train.tokens_per_micro_batch": case.pairs * sum(case.lengths),
        "train.batch_size": 2 * case.pairs,
        "train.gradient_checkpointing": case.checkpointing,
        "train.epochs": case.steps,
    }
    if case.layers is None:
        return load_config("smollm2-135m", settings)
    folder = scratch / "model"
    save_random(shaped(case.layers), folder)
    return load_config(None, {**settings, "model.id": str(folder)})


def _plan(config: RunConfig, model: SlotModel, lengths: Sequence[tuple[int, int, int]]) -> Plan:
    rows = Rows(tuple((prompt, real) for prompt, real, _ in lengths), 0, "made up")
    return make_plan(config, replace(ROOMY, itemsize=model.dtype.itemsize), rows)


def _measured(model: SlotModel, pairs: list[Pair], config: RunConfig, scratch: Path) -> int:
    """The peak above the loaded model; by the last micro-batch, gradients and the optimiser's state are there too."""
    start = model.adapter()
    # libraries and kernels that a first step brings into memory are planned for with Python
    first = _scored(model, some_pairs([(8, 8, 8)] * 2), config)
    train(model, first, config.train, snapshots=scratch / "first", on_step=_unheard)
    model.set_adapter(start)
    task = _scored(model, pairs, config)
    ctypes.CDLL(None).malloc_trim(0)
    with peak(CPU) as measured:
        train(model, task, config.train, snapshots=scratch / "snapshots", on_step=_unheard)
    return measured.above


def _scored(model: SlotModel, pairs: list[Pair], config: RunConfig) -> Task:
    budget = config.train.tokens_per_micro_batch
    assert isinstance(budget, int)
    plan = plan_batches([lengths_of(pair) for pair in pairs], batch_size=len(pairs), token_budget=budget, seed=0)
    scores = {score.key: score for part in score_pairs(model, pairs, plan[0]) for score in part}
    return Task(pairs, scores, plan, iteration=0, seed=0)


def _unheard(_metrics: object, _pairs: int) -> None:
    """Nobody watches."""


def generation(rows: int, new: int) -> Bytes:
    """Decoding so many rows side by side, so many tokens of each."""
    _set_malloc(mapped=True)
    config = load_config("smollm2-135m", {"generation.max_new_tokens": new, "generation.width": rows})
    model = SlotModel.load(find_base(config.model), config.model, config.lora, seed=0, device=CPU)
    lengths = [(100, 1, 1)] * rows
    parts = dict(_plan(config, model, lengths).phases[0].parts)
    names = ("base unpacked", "keys, values and logits of rows", "a pass without gradients")
    planned = sum(parts[name] for name in names)
    ctypes.CDLL(None).malloc_trim(0)
    with peak(CPU) as measured:
        generate(
            model,
            [Request(pair.prompt_ids, number) for number, pair in enumerate(some_pairs(lengths))],
            max_new_tokens=new,
            temperature=1.0,
            top_p=1.0,
            width=rows,
            stop_ids=frozenset(),
            on_step=lambda _tokens, _rows: None,
        )
    return Bytes(planned, planned, measured.above)


def planned_run(data: Path | None, rows: int) -> dict[str, tuple[float, float]]:
    """Planned and measured seconds of each phase of one iteration, the base's evaluation among them."""
    source = data and str(data)
    settings = {"data.source": source, "data.limit": rows + HELDOUT, "data.heldout_rows": HELDOUT, "iterations": 1}
    config = load_config("quickstart" if data is None else "smollm2-135m", {k: v for k, v in settings.items() if v})
    planned = make_plan(config, this_machine(config.model), rows_of_data(config))
    with tempfile.TemporaryDirectory() as scratch:
        run_dir = RunDir(Path(scratch) / "run")
        run(prepare(config, datetime.date.today()), run_dir.path, Audience())
        first, base = run_dir.iteration(0).seconds(), run_dir.base.seconds()
    return {time.phase: (time.run, first[time.phase] + base.get(time.phase, 0.0)) for time in planned.times}


def _set_malloc(mapped: bool) -> None:
    if mapped:
        ctypes.CDLL(None).mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD
    else:
        keep_freed_memory()


def some_pairs(lengths: Sequence[tuple[int, int, int]]) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 500, (count,), generator=generator).tolist())

    return [Pair(str(n), 0, *(tokens(count) for count in group), ended=True) for n, group in enumerate(lengths)]


def shaped(layers: int) -> transformers.LlamaConfig:
    """Llama 3.2 1B's shape, of so many of its 16 layers."""
    return transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    )


def save_random(config: Any, folder: Path) -> None:
    """A model of random bf16 weights, quickly and in little memory: one block over and over, a file a weight."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    block = (0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))).bfloat16()
    folder.mkdir(parents=True)
    files = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        files[name], shape = f"model-{number}.safetensors", parameter.shape
        weight = block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape)
        save_file(
            {name: torch.ones_like(weight) if len(shape) == 1 else weight}, folder / files[name], {"format": "pt"}
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    config.architectures, config.dtype = [type(model).__name__], torch.bfloat16
    config.save_pretrained(folder)


if __name__ == "__main__":
    main()
