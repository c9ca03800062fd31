"""What bench_gpu.py measures: models of known shapes with random weights, shares of a card, and rows to train on."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from harness import say
from table import FIXED, FIXED_STEPS

from qspin.config import Architecture, Auto, load_config
from qspin.errors import QspinError
from qspin.fitting.footprint import Batch
from qspin.model import SlotModel
from qspin.packing import Plan, lengths_of
from qspin.records import Pair

MODELS = {  # as results call them → the preset whose shape they have
    "mistral-7b": "zephyr-7b-sft",
    "llama-3.1-8b": "llama-3.1-8b",
    "qwen2.5-7b": "qwen2.5-7b-instruct",
    "qwen3-8b": "qwen3-8b",
    "gemma-2-9b": "gemma-2-9b-it",
}
SPARE = 10**9  # bytes of a disk that are left beside a model
BATCH = 16  # pairs a step
NEW, PROMPT = 256, 256  # tokens generated, and of their prompts


@dataclasses.dataclass(frozen=True)
class Share:
    """A part of the GPU, and what is done in it."""

    cap: float  # GiB for torch's allocator
    rows: tuple[str, ...]  # kinds of `make_rows` to train on
    checkpointing: bool | Auto  # train.gradient_checkpointing
    generate: bool = False
    optimizer: Literal["adamw", "paged_adamw_8bit"] = "adamw"


@dataclasses.dataclass(frozen=True)
class Case:
    """One process of ours: a model, a backend, and shares in turn, the smallest first: it is loaded in that, and where
    its embedding table is then it stays."""

    model: str
    backend: str
    shares: dict[str, Share]
    rank: int = 16


@dataclasses.dataclass(frozen=True)
class Peer:
    """One process of TRL's."""

    model: str
    on: str
    cap: float
    rows: str
    checkpointing: Literal["none", "plain", "unsloth"]
    batch: int
    generate: bool = False
    fused_loss: bool = False  # Unsloth's own, a part of the logits at a time


LONG, REAL = "1024+512+512", "real"
BOTH = "both"  # a peer's: some of FIXED, then REAL
# 4.7, 6.7, 10.7 and 14.7 GiB: cards of 6, 8, 12 and 16 less 0.8 for CUDA's context, as measured, and 0.5 for a desktop
CASES = {
    "qspin": Case("mistral-7b", "unsloth", {
        "7 GiB, auto": Share(7.0, (FIXED, REAL), checkpointing="auto"),  # what TRL on Unsloth takes
        "10.7 GiB": Share(10.7, (LONG,), checkpointing=True),
        "14.7 GiB, auto": Share(14.7, (FIXED, LONG), checkpointing="auto"),
        "22 GiB": Share(22.0, (FIXED, REAL), checkpointing=True, generate=True),
        "22 GiB, auto": Share(22.0, (FIXED, REAL), checkpointing="auto"),
        "22 GiB, all kept": Share(22.0, (FIXED, REAL), checkpointing=False),
    }),
    "qspin, torch's kernels": Case("mistral-7b", "transformers", {
        "22 GiB": Share(22.0, (FIXED, REAL), checkpointing=True, generate=True),
    }),
    "qspin, 6 GiB": Case("mistral-7b", "unsloth", {
        "6 GiB": Share(6.0, (FIXED,), checkpointing=True, generate=True),
    }),
    "qspin, rank 8": Case("mistral-7b", "unsloth", {
        "4.7 GiB": Share(4.7, (FIXED,), checkpointing=True, generate=True, optimizer="paged_adamw_8bit"),
    }, rank=8),
    "qspin, 8B": Case("llama-3.1-8b", "unsloth", {
        "22 GiB": Share(22.0, (FIXED, REAL), checkpointing=True, generate=True),
    }),
    "qspin, 8B, small cards": Case("llama-3.1-8b", "unsloth", {
        "6.7 GiB": Share(6.7, (FIXED,), checkpointing=True, generate=True, optimizer="paged_adamw_8bit"),
        "10.7 GiB": Share(10.7, (LONG,), checkpointing=True),
    }),
    "qspin, Qwen3 8B": Case("qwen3-8b", "unsloth", {
        "6.7 GiB": Share(6.7, (FIXED,), checkpointing=True, generate=True, optimizer="paged_adamw_8bit"),
        "10.7 GiB": Share(10.7, (LONG,), checkpointing=True),
    }),
    "qspin, Gemma 2 9B": Case("gemma-2-9b", "unsloth", {
        "6.7 GiB": Share(6.7, (FIXED,), checkpointing=True, generate=True, optimizer="paged_adamw_8bit"),
        "10.7 GiB": Share(10.7, (LONG,), checkpointing=True),
    }, rank=8),
    "qspin, Qwen2.5 7B": Case("qwen2.5-7b", "unsloth", {
        "6.7 GiB": Share(6.7, (FIXED,), checkpointing=True, generate=True, optimizer="paged_adamw_8bit"),
        "10.7 GiB": Share(10.7, (LONG,), checkpointing=True),
    }),
}  # fmt: skip
PEERS = {
    "TRL on Unsloth": Peer("mistral-7b", "unsloth", 22.0, BOTH, "unsloth", batch=8, generate=True),
    "TRL on Unsloth, plain": Peer("mistral-7b", "unsloth", 22.0, BOTH, "plain", batch=16),
    "TRL on Unsloth, all kept": Peer("mistral-7b", "unsloth", 22.0, BOTH, "none", batch=4),
    "TRL on Unsloth, all kept, real": Peer("mistral-7b", "unsloth", 22.0, REAL, "none", batch=16),
    "TRL on Unsloth, fused": Peer("mistral-7b", "unsloth", 22.0, BOTH, "unsloth", batch=16, fused_loss=True),
    "TRL on Unsloth, plain, fused": Peer("mistral-7b", "unsloth", 22.0, BOTH, "plain", batch=16, fused_loss=True),
    "TRL on Unsloth, all kept, fused": Peer("mistral-7b", "unsloth", 22.0, BOTH, "none", batch=4, fused_loss=True),
    # its generation has CUDA graphs for Llama's class, and not for Mistral's
    "TRL on Unsloth, 8B": Peer("llama-3.1-8b", "unsloth", 22.0, BOTH, "unsloth", batch=8, generate=True),
    "TRL on transformers": Peer("mistral-7b", "transformers", 22.0, BOTH, "plain", batch=8, generate=True),
}  # fmt: skip


def model_config(shape: Architecture) -> Any:
    """A transformers configuration of this shape; what the shape does not tell is the family's default."""
    config = transformers.AutoConfig.for_model(
        shape.family,
        num_hidden_layers=shape.layers,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_size,
        vocab_size=shape.vocabulary,
        tie_word_embeddings=shape.tied_embeddings,
        max_position_embeddings=32768,
        dtype="bfloat16",
    )
    if shape.family == "mistral":
        config.sliding_window = None  # as from version 0.2 on
    return config


def make_model(name: str, folder: Path) -> float:
    """Random 16-bit weights, written as any model is; seconds taken.

    Raises:
        QspinError: the disk has no room for it and what is measured; nothing is begun.
    """
    started = time.perf_counter()
    shape = load_config(MODELS[name]).model.architecture
    assert shape is not None
    folder.parent.mkdir(parents=True, exist_ok=True)
    need, free = 2 * shape.parameters + SPARE, shutil.disk_usage(folder.parent).free
    if free < need:
        raise QspinError(f"{folder}: {need / 1e9:.0f} GB are needed there, and {free / 1e9:.0f} are free")
    config = model_config(shape)
    with torch.device("cuda"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    half = folder.with_name(f".{folder.name}")
    shutil.rmtree(half, ignore_errors=True)  # of a process that was cut off
    model.save_pretrained(half, max_shard_size="5GB")
    half.rename(folder)
    del model
    torch.cuda.empty_cache()
    return time.perf_counter() - started


def with_models(chosen: dict[str, Case | Peer], scratch: Path) -> dict[str, Case | Peer]:
    """The cases whose model is there, or could be made: a disk that is full would be so for all that is measured."""
    missing = set()
    for model in {case.model: None for case in chosen.values()}:
        if not (scratch / model).is_dir():
            try:
                say(f"making {model}: {make_model(model, scratch / model):.0f} s")
            except QspinError as error:
                say(str(error))
                missing.add(model)
    return {name: case for name, case in chosen.items() if case.model not in missing}


def make_rows(kind: str, lengths: Path, scratch: Path, batch: int = BATCH) -> str:
    """Pairs of random tokens: 'p+r+g' is one length, 'real' those of real rows; the path of their file."""
    real = [tuple(shape) for shape in json.loads(lengths.read_text())]
    if kind in (REAL, BOTH):
        fixed = [(256, 256, 256)] * (FIXED_STEPS + 2) * batch if kind == BOTH else []
        shapes = [*fixed, *real]
    else:
        shape = tuple(int(part) for part in kind.split("+"))
        shapes = [shape] * (BATCH * (6 if sum(shape) < 1024 else 3))
    path, chance = scratch / f"rows-{kind}-{batch}-{os.getpid()}.jsonl", random.Random(0)
    with path.open("w") as file:
        for shape in shapes:
            sides = ([chance.randrange(5, 32000) for _ in range(count)] for count in shape)
            file.write(json.dumps(dict(zip(("prompt", "real", "generated"), sides, strict=True))) + "\n")
    return str(path)


def planned_training(model: SlotModel, pairs: Sequence[Pair], batches: Plan, optimizer: str) -> float:
    """Bytes above the loaded model that training is planned to take."""
    longest = max((m for b in batches for m in b), key=lambda m: sum(lengths_of(pairs[i]).total for i in m))
    lengths = [lengths_of(pairs[i]) for i in longest]
    held = Batch.of([(length.prompt, length.real, length.generated) for length in lengths])
    footprint = model.footprint
    return footprint.gradients() + footprint.optimizer(optimizer) + footprint.activations(held)


def measure_lengths(data: Path) -> list[tuple[int, int, int]]:
    """Of the first 192 good rows; generated completions are as long as other rows' real ones."""
    from qspin.prepare import prepare

    settings = {"data.source": str(data), "data.limit": 200, "data.heldout_rows": 8}
    settings |= {"data.max_prompt_tokens": 512, "data.max_completion_tokens": 512}
    rows = prepare(load_config("smollm2-135m", settings), datetime.date(2026, 1, 1)).train
    others = [len(row.real_ids) for row in rows]
    random.Random(0).shuffle(others)
    return [(len(row.prompt_ids), len(row.real_ids), other) for row, other in zip(rows, others, strict=True)]


def computed_tokens(lengths: list[tuple[int, int, int]]) -> dict[str, int]:
    """Of real rows: qspin's, a prompt once, and TRL's by pairs a step, a prompt twice and all as long as the longest of
    the step, in multiples of 8."""
    found = {"qspin": sum(map(sum, lengths))}
    for size in sorted({peer.batch for peer in PEERS.values()}):
        steps = [lengths[start : start + size] for start in range(0, len(lengths), size)]
        longest = (max(prompt + max(real, generated) for prompt, real, generated in step) for step in steps)
        padded = (-(-most // 8) * 8 for most in longest)
        found[f"TRL, {size} pairs"] = sum(2 * len(step) * most for step, most in zip(steps, padded, strict=True))
    return found


def read_pairs(path: str) -> list[Pair]:
    pairs = []
    for index, line in enumerate(Path(path).read_text().splitlines()):
        row = json.loads(line)
        sides = (tuple(row["prompt"]), tuple(row["real"]), tuple(row["generated"]))
        pairs.append(Pair(str(index), 0, *sides, ended=True))
    return pairs
