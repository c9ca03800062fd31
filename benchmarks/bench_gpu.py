"""A 7B-shaped model with random weights on one GPU, under caps that stand for smaller cards: does an iteration fit, how
fast is each phase, and how fast is the same training done by TRL.

    python benchmarks/bench_gpu.py --scratch /tmp/models --write

Models are made on the spot and loaded in 4 bits; nothing is downloaded. Every case is a process of its own, and what
was measured is kept after each, so that a cut-off run keeps what it had. dolly-lengths.json holds [prompt, real,
generated] token counts of rows of databricks-dolly-15k (`--measure-lengths rows.jsonl` makes such a file, with the demo
model's tokenizer). on_gpu.sh runs this beside all else that needs a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as `keep_freed_memory` does

import torch
import transformers.utils.logging
from gpu_cases import (
    BATCH,
    CASES,
    FIXED,
    NEW,
    PEERS,
    PROMPT,
    Case,
    Peer,
    Share,
    computed_tokens,
    make_rows,
    measure_lengths,
    planned_training,
    read_pairs,
    with_models,
)
from harness import say, write
from table import peer_rates, settings
from turns import give_turns, take_back, wait_for_turn

from qspin.base import find_base
from qspin.budget import rows_at_once, token_budget
from qspin.config import LoraConfig, ModelConfig, TrainConfig
from qspin.errors import QspinError
from qspin.fitting.memory import OutOfMemory, refusals_told
from qspin.generation import Request, generate
from qspin.machine import copy_rate, product_rate
from qspin.model import SlotModel
from qspin.packing import Plan, lengths_of, plan_batches
from qspin.records import Pair
from qspin.scoring import score_pairs
from qspin.training import Task, train
from qspin.units import GIB

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="folder for models, 15 GB each, which stay there")
    parser.add_argument("--lengths", type=Path, default=HERE / "dolly-lengths.json", help="token counts of real rows")
    parser.add_argument("--measure-lengths", type=Path, help="file of prompts and answers to count the tokens of")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--shares", nargs="*", help="and of qspin's shares in them")
    parser.add_argument("--together", action="store_true", help="side by side: for memory, speed then means nothing")
    parser.add_argument("--turns", action="store_true", help="side by side until one after the other is timed")
    parser.add_argument("--profile", action="store_true", help="tables of the kernels that took the time, here")
    parser.add_argument("--timeout", type=float, default=200, help="seconds a case may take")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_lengths:
        options.lengths.write_text(json.dumps(measure_lengths(options.measure_lengths)))
        return
    if options.case:
        ours(options.case, options)
        return
    results: dict[str, Any] = {}
    device = torch.device("cuda")
    rates = {
        "bf16 products, TFLOP/s": product_rate(device, torch.bfloat16) / 1e12,
        "copies, GB/s": copy_rate(device) / 1e9,
    }
    say(str(rates))
    torch.cuda.empty_cache()
    chosen = {name: case for name, case in {**CASES, **PEERS}.items() if not options.only or name in options.only}
    there = with_models(chosen, options.scratch)
    turns = {name: options.scratch / f"{'-'.join(name.split())}.turn" for name in there} if options.turns else {}
    for turn in turns.values():
        take_back(turn)
    with ThreadPoolExecutor(max(1, len(there)) if options.together or options.turns else 1) as pool:
        waiting = {
            pool.submit(_measure, name, case, turns.get(name), options): (name, case) for name, case in there.items()
        }
        in_order = {turns[name]: ended for ended, (name, _) in waiting.items() if name in turns}
        threading.Thread(target=give_turns, args=(in_order,), daemon=True).start()
        for done in as_completed(waiting):
            name, case = waiting[done]
            results[name] = dataclasses.asdict(case) | {"measured": done.result()}
            say(f"{name}: {json.dumps(done.result())}")
            if options.write:
                tokens = computed_tokens(json.loads(options.lengths.read_text()))
                write("gpu", {**headline(results), "computed tokens, real": tokens, "rates": rates, "cases": results})
    if len(there) < len(chosen):
        sys.exit(f"not measured: {', '.join(name for name in chosen if name not in there)}")


def _measure(name: str, case: Case | Peer, turn: Path | None, options: argparse.Namespace) -> dict[str, Any]:
    out = options.scratch / f"{'-'.join(name.split())}.json"
    command = _peer(case, options) if isinstance(case, Peer) else _ours(name, options)
    command += ["--turn", str(turn)] if turn else []
    return measured_by([*command, "--out", str(out)], out, options.timeout)


def headline(cases: dict[str, Any]) -> dict[str, Any]:
    """The ratio that counts, once both sides of it are there."""
    means = "pairs a second, 256+256+256 tokens, all layers recomputed, over the fastest setting of TRL on Unsloth"
    trained = cases.get("qspin", {"measured": {}})["measured"].get("22 GiB", {}).get(FIXED)
    theirs = [rate for peer in settings(cases).values() if (rate := peer_rates(peer).get(FIXED))] if trained else []
    if theirs:
        return {"ratio": trained["train"]["pairs/s"] / max(theirs), "ratio_means": means}
    return {}


def _ours(name: str, options: argparse.Namespace) -> list[str]:
    command = [sys.executable, str(HERE / "bench_gpu.py"), "--case", name, "--scratch", str(options.scratch)]
    command += ["--shares", *options.shares] if options.shares else []
    return [*command, "--lengths", str(options.lengths), *(["--profile"] if options.profile else [])]


def _peer(case: Peer, options: argparse.Namespace) -> list[str]:
    rows = make_rows(case.rows, options.lengths, options.scratch, case.batch)
    command = [sys.executable, str(HERE / "gpu_peer.py"), "--peer", case.on, "--rows", rows, "--cap-gb", str(case.cap)]
    command += ["--model", str(options.scratch / case.model), "--batch", str(case.batch)]
    command += ["--checkpointing", case.checkpointing, *(["--fused-loss"] if case.fused_loss else [])]
    return command + (["--generate", "16", str(NEW), str(PROMPT)] if case.generate else [])


def measured_by(command: Sequence[str], out: Path, timeout: float) -> dict[str, Any]:
    """What a process kept in its file, up to where it ended, and how it went wrong if it did."""
    out.unlink(missing_ok=True)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        wrong = {"error": done.stdout[-1000:] + done.stderr[-3000:]} if done.returncode else {}
    except subprocess.TimeoutExpired:
        wrong = {"error": f"not done after {timeout:.0f} s"}
    return (json.loads(out.read_text()) if out.is_file() else {}) | wrong


def ours(name: str, options: argparse.Namespace) -> None:
    case, device = CASES[name], torch.device("cuda")
    config = ModelConfig(id=str(options.scratch / case.model))
    found: dict[str, Any] = {}
    model: SlotModel | None = None
    for label, share in case.shares.items():
        if options.shares and label not in options.shares:
            continue
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(share.cap * GIB / torch.cuda.get_device_properties(0).total_memory)
        results = found[label] = {}
        try:
            with refusals_told():
                if model is None:
                    started = time.perf_counter()
                    lora = LoraConfig(rank=case.rank, alpha=2 * case.rank)
                    model = SlotModel.load(
                        find_base(config), config, lora, seed=0, device=device,
                        backend=case.backend,  # type: ignore[arg-type]
                    )  # fmt: skip
                    found["load"] = _peaks(started) | {"left, GiB": torch.cuda.memory_allocated() / GIB}
                wait_for_turn(options.turn)
                if share.generate:
                    results["generate"] = generations(model)
                    options.out.write_text(json.dumps(found))
                for kind in share.rows:
                    pairs = read_pairs(make_rows(kind, options.lengths, options.scratch))
                    results[kind] = training(model, pairs, share)
                    options.out.write_text(json.dumps(found))
                results["context, GiB"] = _context()
                options.out.write_text(json.dumps(found))
                if options.profile:
                    _profile(model, pairs[: 2 * BATCH], share, label)
        except (OutOfMemory, QspinError) as error:  # of one pair that does not fit
            results["out of memory"] = str(error)
            options.out.write_text(json.dumps(found))
            if model is None:
                break


def generations(model: SlotModel) -> dict[str, Any]:
    """As wide as memory holds, and 16 wide."""
    width = rows_at_once(model, PROMPT + NEW)
    found: dict[str, Any] = {"width": width}
    for label, rows in {"wide": width, "16 at once": 16}.items():
        if rows <= width:
            generation(model, rows, rows, 8)  # kernels are compiled at their first call; the peer has one too
            found[label] = generation(model, rows, rows, NEW)
    torch.cuda.empty_cache()
    return found


def generation(model: SlotModel, rows: int, width: int, new: int) -> dict[str, float]:
    """So many prompts, each of so many new tokens."""
    chance = random.Random(rows)
    requests = [Request(tuple(chance.randrange(5, 32000) for _ in range(PROMPT)), key) for key in range(rows)]
    steps: list[float] = []

    def on_step(_new: int, _work: float) -> None:
        steps.append(time.perf_counter())

    loaded = torch.cuda.memory_allocated()
    started = _fresh()
    generate(
        model, requests, max_new_tokens=new, temperature=1.0, top_p=1.0, width=width, stop_ids=frozenset(),
        on_step=on_step,
    )  # fmt: skip
    found = _peaks(started)
    decoding = [after - before for before, after in itertools.pairwise(steps[-100:])]
    planned = model.footprint.prefill(PROMPT + new) + width * model.footprint.row(PROMPT + new)
    return found | {
        "planned, GiB": (loaded + planned) / GIB,
        "tokens/s": rows * new / found["seconds"],
        "step, ms": 1e3 * statistics.median(decoding),
    }


def training(model: SlotModel, pairs: list[Pair], share: Share) -> dict[str, Any]:
    config = TrainConfig(
        batch_size=BATCH, epochs=1, gradient_checkpointing=share.checkpointing, optimizer=share.optimizer
    )
    lengths = [lengths_of(pair) for pair in pairs]
    tokens = [length.total for length in lengths]

    def plan(budget: int) -> Plan:
        return plan_batches(lengths, batch_size=BATCH, token_budget=budget, seed=0)

    found: dict[str, Any] = {}
    loaded = torch.cuda.memory_allocated()
    started = _fresh()
    budget = token_budget(model, pairs, plan, 0, config)
    found["budget"] = _peaks(started) | budget._asdict()
    model.use_gradient_checkpointing(budget.recomputed)
    batches = plan(budget.tokens)
    started = _fresh()
    scores = [score for part in score_pairs(model, pairs, [m for b in batches for m in b]) for score in part]
    found["score"] = _peaks(started)
    found["score"]["tokens/s"] = sum(tokens) / found["score"]["seconds"]
    task = Task(pairs, {score.key: score for score in scores}, batches, 0, 0)
    ends = [time.perf_counter()]
    started = _fresh()
    with tempfile.TemporaryDirectory() as snapshots:
        metrics = train(
            model, task, config, snapshots=Path(snapshots), on_step=lambda _m, _p: ends.append(time.perf_counter())
        )
    found["train"] = _peaks(started)
    planned = planned_training(model, pairs, batches, config.optimizer)
    found["train"]["planned, GiB"] = (loaded + planned) / GIB
    sizes = [sum(map(len, batch)) for batch in batches]
    work = [sum(tokens[i] for m in batch for i in m) for batch in batches]
    seconds = [after - before for before, after in itertools.pairwise(ends)]
    timed = slice(1, None)  # the first step compiles
    found["train"] |= {
        "pairs/s": sum(sizes[timed]) / sum(seconds[timed]),
        "tokens/s": sum(work[timed]) / sum(seconds[timed]),
        "steps, s": seconds,
        "margin at step 0": metrics[0]["margin"],
        "gradient norm": metrics[0]["grad_norm"],
    }
    return found


def _fresh() -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return time.perf_counter()


def _peaks(started: float) -> dict[str, float]:
    torch.cuda.synchronize()
    return {
        "seconds": time.perf_counter() - started,
        "allocated, GiB": torch.cuda.max_memory_allocated() / GIB,
        "reserved, GiB": torch.cuda.max_memory_reserved() / GIB,
    }


def _context() -> float | None:
    """What the driver holds for this process beside torch's tensors: its context, kernels and graphs."""
    import pynvml  # of nvidia-ml-py

    pynvml.nvmlInit()
    processes = pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByIndex(0))
    held = next((process.usedGpuMemory for process in processes if process.pid == os.getpid()), None)
    return None if held is None else (held - torch.cuda.memory_reserved()) / GIB


def _profile(model: SlotModel, pairs: list[Pair], share: Share, label: str) -> None:
    """Which kernels took the time of a few steps, into profile-*.txt of the working folder."""
    work = {"decode": lambda: generation(model, 16, 16, 8), "train": lambda: training(model, pairs, share)}
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    for name, piece in work.items():
        with torch.profiler.profile(activities=kinds) as profiler:
            piece()
        averages = profiler.key_averages()
        keys = ("self_device_time_total", "self_cpu_time_total")
        tables = [averages.table(sort_by=key, row_limit=30) for key in keys]
        Path(f"profile-{label}-{name}.txt").write_text("".join(tables))


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    main()
