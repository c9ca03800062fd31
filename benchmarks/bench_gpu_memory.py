"""What bench_gpu.py's cases hold of a GPU's memory at most, counted without a GPU.

    .venv/bin/python benchmarks/bench_gpu_memory.py --scratch /tmp/models --write

They run on the device of tests/stand_in, in its counted memory, with torch's own kernels for the layers, and with
products and weights in 4 bits that are as large as they would be and compute nothing: memory hangs on no number. What
torch's allocator rounds up and leaves unused between tensors is not counted, nor what Unsloth keeps beside them. Of
each share of a card, the widest generation is cut to two steps, as many tokens long as it would be in the end, and
training to a step of one pair and one of a micro-batch.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers.utils.logging
from bench_plan import save_random
from gpu_cases import BATCH, CASES, FIXED, MODELS, NEW, PROMPT, REAL, Case, Share, model_config, planned_training
from harness import RESULTS, say, write

from qspin.base import find_base
from qspin.budget import rows_at_once, token_budget
from qspin.config import LoraConfig, ModelConfig, TrainConfig, load_config
from qspin.errors import QspinError
from qspin.fitting.memory import OutOfMemory, refusals_told
from qspin.generation import Request, generate
from qspin.model import SlotModel
from qspin.packing import Plan, lengths_of, plan_batches
from qspin.records import Pair
from qspin.scoring import score_pairs
from qspin.training import Task, train
from qspin.units import GIB

LIKE = 140  # GiB of the GPU that a case of bench_gpu.py has a share of
RATIO = f"counted over measured GiB at most in training, {FIXED} tokens, median of those with as many at once on a GPU"
PRODUCTS = torch.library.Library("aten", "IMPL")  # those that compute nothing, for as long as it is there


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for models, 15 GB each, which stay there")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--shares", nargs="*", help="and of shares in them")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        compute_nothing()
        count(CASES[options.case], options)
        return
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "stand_in"))
    from device import environment

    results: dict[str, Any] = {}
    for name, case in CASES.items():
        if options.only and name not in options.only:
            continue
        make_model(case.model, options.scratch / case.model)
        out = options.scratch / "counted.json"
        command = [sys.executable, __file__, "--case", name, "--scratch", str(options.scratch), "--out", str(out)]
        command += ["--shares", *options.shares] if options.shares else []
        subprocess.run(command, env=os.environ | environment(options.scratch, LIKE), check=True)
        results[name] = json.loads(out.read_text())
        say(f"{name}: {json.dumps(results[name])}")
        if options.write:
            write("gpu_memory", {"ratio": over_measured(results), "ratio_means": RATIO, "cases": results})


def over_measured(results: dict[str, Any]) -> float | None:
    """Counted over measured, where the same was done on a GPU."""
    measured = json.loads((RESULTS / "gpu-cuda.json").read_text())["cases"]
    ratios = [
        counted[FIXED]["train, GiB"] / there[FIXED]["train"]["allocated, GiB"]
        for name, case in results.items()
        for share, counted in case.items()
        if FIXED in counted and FIXED in (there := measured.get(name, {}).get("measured", {}).get(share, {}))
        if counted[FIXED]["tokens"] == there[FIXED]["budget"]["tokens"]
    ]
    return statistics.median(ratios) if ratios else None


def make_model(name: str, folder: Path) -> None:
    """As bench_gpu.py's, if it is not there."""
    if folder.is_dir():
        return
    shape = load_config(MODELS[name]).model.architecture
    assert shape is not None
    half = folder.with_name(f".{folder.name}")
    shutil.rmtree(half, ignore_errors=True)  # of a process that was cut off
    save_random(model_config(shape), half)
    half.rename(folder)


def count(case: Case, options: argparse.Namespace) -> None:
    """In a process that has the device."""
    device = torch.device("cuda")
    config = ModelConfig(id=str(options.scratch / case.model))
    found: dict[str, Any] = {}
    model: SlotModel | None = None
    for label, share in case.shares.items():
        if (options.shares and label not in options.shares) or share.checkpointing == "auto":
            continue
        torch.cuda.set_per_process_memory_fraction(share.cap / LIKE)
        results = found[label] = {}
        try:
            with refusals_told():
                if model is None:
                    lora = LoraConfig(rank=case.rank, alpha=2 * case.rank)
                    model = SlotModel.load(
                        find_base(config), config, lora, seed=0, device=device, backend="transformers"
                    )
                    found["load"] = {"most, GiB": most(), "left, GiB": torch.cuda.memory_allocated() / GIB}
                results |= generation(model) if share.generate else {}
                for kind in share.rows:
                    if kind != REAL:
                        results[kind] = training(model, kind, share)
        except (OutOfMemory, QspinError) as error:
            results["out of memory"] = str(error)
        options.out.write_text(json.dumps(found))


def compute_nothing() -> None:
    """From here on, in this process."""
    operations = torch.ops.bitsandbytes

    def quantised(weights: torch.Tensor, blocksize: int, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        packed = torch.zeros(((weights.numel() + 1) // 2, 1), dtype=torch.uint8, device=weights.device)
        return packed, torch.zeros(weights.numel() // blocksize, device=weights.device)

    def dequantised(packed: torch.Tensor, *rest: Any) -> torch.Tensor:
        *_, shape, dtype = rest
        return torch.empty(shape, dtype=dtype, device=packed.device)

    operations.quantize_4bit.default = quantised
    operations.dequantize_4bit.default = dequantised
    operations.dequantize_4bit.out = lambda *_, **_out: None
    PRODUCTS.impl("mm", lambda a, b: a.new_zeros(len(a), b.shape[1]), "CPU")
    PRODUCTS.impl("bmm", lambda a, b: a.new_zeros(*a.shape[:2], b.shape[2]), "CPU")
    PRODUCTS.impl("addmm", lambda c, a, b, **_: c.expand(len(a), b.shape[1]).clone(), "CPU")
    PRODUCTS.impl("mm.out", lambda _a, _b, *, out: out.zero_(), "CPU")
    PRODUCTS.impl("bmm.out", lambda _a, _b, *, out: out.zero_(), "CPU")
    PRODUCTS.impl("addmm.out", lambda c, _a, _b, *, out, **_: out.copy_(c.expand(out.shape)), "CPU")


def most() -> float:
    """GiB since it was asked for last."""
    found = torch.cuda.max_memory_allocated() / GIB
    torch.cuda.reset_peak_memory_stats()
    return float(found)


def generation(model: SlotModel) -> dict[str, Any]:
    width = rows_at_once(model, PROMPT + NEW)
    chance, vocabulary = random.Random(0), model.footprint.shape.vocabulary
    prompts = [tuple(chance.randrange(5, vocabulary) for _ in range(PROMPT + NEW - 2)) for _ in range(width)]
    requests = [Request(prompt, key) for key, prompt in enumerate(prompts)]
    generate(
        model, requests, max_new_tokens=2, temperature=1.0, top_p=1.0, width=width, stop_ids=frozenset(),
        on_step=lambda _new, _work: None,
    )  # fmt: skip
    return {"generate": {"width": width, "most, GiB": most()}}


def training(model: SlotModel, kind: str, share: Share) -> dict[str, Any]:
    config = TrainConfig(
        batch_size=BATCH, epochs=1, gradient_checkpointing=share.checkpointing, optimizer=share.optimizer
    )
    prompt, real, generated = map(int, kind.split("+"))
    pairs = [Pair(str(n), 0, (5,) * prompt, (6,) * real, (7,) * generated, ended=True) for n in range(2 * BATCH)]
    lengths = [lengths_of(pair) for pair in pairs]

    def plan(tokens: int) -> Plan:
        return plan_batches(lengths, batch_size=BATCH, token_budget=tokens, seed=0)

    loaded = torch.cuda.memory_allocated()
    budget = token_budget(model, pairs, plan, 0, config)
    model.use_gradient_checkpointing(budget.recomputed)
    first, second, *_ = plan(budget.tokens)
    steps = [[first[0][:1]], second[:1]]  # by the second, gradients and the optimiser's state are there
    most()
    scores = [
        score for part in score_pairs(model, pairs, [batch for step in steps for batch in step]) for score in part
    ]
    found = {"tokens": budget.tokens, "score, GiB": most()}
    with tempfile.TemporaryDirectory() as snapshots:
        train(
            model, Task(pairs, {score.key: score for score in scores}, steps, 0, 0), config,
            snapshots=Path(snapshots), on_step=lambda _metrics, _pairs: None,
        )  # fmt: skip
    planned = planned_training(model, pairs, steps, config.optimizer)
    return found | {"train, GiB": most(), "planned, GiB": (loaded + planned) / GIB}


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
