"""A 7B-shaped model with random weights on one GPU, under caps that stand for smaller cards: does an iteration fit, how
fast is each phase, and how fast is the same training done by TRL.

    python benchmarks/bench_gpu.py --scratch /tmp/models --lengths lengths.json --write

Models are made on the spot and loaded in 4 bits; nothing is downloaded. Every case is a process of its own, and what
was measured is kept after each, so that a cut-off run keeps what it had. `lengths.json` holds [prompt, real,
generated] token counts of real rows (`--measure-lengths rows.jsonl` makes it, with the demo model's tokenizer).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import transformers
from harness import say, write

from qspin.base import find_base
from qspin.budget import rows_at_once, token_budget
from qspin.config import LoraConfig, ModelConfig, TrainConfig
from qspin.generation import Request, generate
from qspin.machine import copy_rate, product_rate
from qspin.memory import OutOfMemory, refusals_told
from qspin.model import SlotModel
from qspin.packing import Plan, lengths_of, plan_batches
from qspin.records import Pair
from qspin.scoring import score_pairs
from qspin.training import Task, train

GIB = 2**30
HERE = Path(__file__).parent
MODELS: dict[str, Callable[[], Any]] = {
    "mistral-7b": lambda: transformers.MistralConfig(sliding_window=None, max_position_embeddings=32768),
    "llama-3.1-8b": lambda: transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
    ),
    "qwen2.5-7b": lambda: transformers.Qwen2Config(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
    ),
}
BATCH = 16  # pairs a step
NEW, PROMPT = 256, 256  # tokens generated, and of their prompts


@dataclasses.dataclass(frozen=True)
class Case:
    """One process: who, on what, under which cap, on rows of which lengths."""

    name: str
    model: str
    who: str  # a backend of qspin, or a peer
    cap: float  # GiB for torch's allocator
    rows: tuple[str, ...]  # kinds of `make_rows`
    checkpointing: bool
    generate: bool = False
    batch: int = BATCH  # the peer's
    trl: bool = False


CASES = (
    Case("6 GiB", "mistral-7b", "unsloth", 6.0, ("256+256+256",), checkpointing=True, generate=True),
    Case("22 GiB", "mistral-7b", "unsloth", 22.0, ("256+256+256", "real"), checkpointing=False, generate=True),
    Case("22 GiB, checkpointing", "mistral-7b", "unsloth", 22.0, ("256+256+256", "real"), checkpointing=True),
    Case("22 GiB, torch's kernels", "mistral-7b", "transformers", 22.0, ("256+256+256",), checkpointing=True,
         generate=True),
    Case("TRL on Unsloth, 22 GiB", "mistral-7b", "unsloth", 22.0, ("256+256+256", "real"), checkpointing=True,
         generate=True, batch=8, trl=True),
    Case("11 GiB, 2,048 tokens", "mistral-7b", "unsloth", 11.0, ("1024+512+512",), checkpointing=True),
    Case("8 GiB", "llama-3.1-8b", "unsloth", 8.0, ("256+256+256",), checkpointing=True, generate=True),
    Case("TRL on transformers, 22 GiB", "mistral-7b", "transformers", 22.0, ("256+256+256",), checkpointing=True,
         batch=8, trl=True),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, help="folder for models: 15 GB each, removed at the end")
    parser.add_argument("--lengths", type=Path, help="token counts of real rows")
    parser.add_argument("--measure-lengths", type=Path, help="file of prompts and answers to count the tokens of")
    parser.add_argument("--only", nargs="*", help="names of cases")
    parser.add_argument("--profile", action="store_true", help="tables of the kernels that took the time, in --scratch")
    parser.add_argument("--timeout", type=float, default=200, help="seconds a case may take")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_lengths:
        options.lengths.write_text(json.dumps(measure_lengths(options.measure_lengths)))
        return
    if options.case:
        job = json.loads(options.case)
        case = Case(**{**job["case"], "rows": tuple(job["case"]["rows"])})
        print(json.dumps(ours(case, Path(job["folder"]), job["rows"], profile=options.profile)))
        return
    results: dict[str, Any] = {}
    device = torch.device("cuda")
    rates = {
        "bf16 products, TFLOP/s": product_rate(device, torch.bfloat16) / 1e12,
        "copies, GB/s": copy_rate(device) / 1e9,
    }
    say(str(rates))
    torch.cuda.empty_cache()
    for case in CASES:
        if options.only and case.name not in options.only:
            continue
        folder = options.scratch / case.model
        if not folder.is_dir():
            say(f"making {case.model}: {make_model(case.model, folder):.0f} s")
        rows = {kind: make_rows(kind, options.lengths, options.scratch) for kind in case.rows}
        started = time.perf_counter()
        results[case.name] = dataclasses.asdict(case) | run_case(case, folder, rows, options)
        say(f"{case.name}: {time.perf_counter() - started:.0f} s; {json.dumps(results[case.name]['measured'])}")
        if options.write:
            write("gpu", {"rates": rates, "cases": results})


def run_case(case: Case, folder: Path, rows: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """In processes of its own; what went wrong, if it did."""
    if case.trl:
        measured = {
            kind: _spoken(_peer(case, folder, path, first=not index), options.timeout)
            for index, (kind, path) in enumerate(rows.items())
        }
        return {"measured": measured}
    job = json.dumps({"case": dataclasses.asdict(case), "folder": str(folder), "rows": rows})
    command = [sys.executable, str(HERE / "bench_gpu.py"), "--case", job]
    return {"measured": _spoken([*command, *(["--profile"] if options.profile else [])], options.timeout)}


def _peer(case: Case, folder: Path, rows: str, *, first: bool) -> list[str]:
    command = [sys.executable, str(HERE / "gpu_peer.py"), "--peer", case.who, "--model", str(folder), "--rows", rows]
    command += ["--cap-gb", str(case.cap), "--batch", str(case.batch), "--out", str(folder.parent / "peer.json")]
    command += ["--checkpointing"] if case.checkpointing else []
    return command + (["--generate", "16", str(NEW), str(PROMPT)] if case.generate and first else [])


def _spoken(command: Sequence[str], timeout: float) -> Any:
    """What a process says in its last line, as JSON, or in the file after --out."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        return {"timeout": timeout, "output": str(error.stdout)[-2000:]}
    if done.returncode:
        return {"error": (done.stdout[-1500:] + done.stderr[-3000:])}
    if "--out" in command:
        return json.loads(Path(command[command.index("--out") + 1]).read_text())
    return json.loads(done.stdout.splitlines()[-1])


def make_model(name: str, folder: Path) -> float:
    """Random 16-bit weights, written as any model is; seconds taken."""
    started = time.perf_counter()
    config = MODELS[name]()
    config.dtype = "bfloat16"
    with torch.device("cuda"):
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="5GB")
    del model
    torch.cuda.empty_cache()
    return time.perf_counter() - started


def make_rows(kind: str, lengths: Path | None, scratch: Path) -> str:
    """Pairs of random tokens: 'p+r+g' is one length, 'real' those of real rows; the path of their file."""
    if kind == "real":
        assert lengths is not None, "real rows need --lengths"
        shapes = json.loads(lengths.read_text())
    else:
        shapes = [[int(part) for part in kind.split("+")]] * (6 * BATCH)
    path, chance = scratch / f"rows-{kind}.jsonl", random.Random(0)
    with path.open("w") as file:
        for shape in shapes:
            sides = ([chance.randrange(5, 32000) for _ in range(count)] for count in shape)
            file.write(json.dumps(dict(zip(("prompt", "real", "generated"), sides, strict=True))) + "\n")
    return str(path)


def measure_lengths(data: Path) -> list[tuple[int, int, int]]:
    """Of the first 192 good rows; generated completions are as long as other rows' real ones."""
    from qspin.config import load_config
    from qspin.prepare import prepare

    settings = {"data.source": str(data), "data.limit": 200, "data.heldout_rows": 8, "data.max_completion_tokens": 512}
    rows = prepare(load_config("smollm2-135m", settings)).train
    others = [len(row.real_ids) for row in rows]
    random.Random(0).shuffle(others)
    return [(len(row.prompt_ids), len(row.real_ids), other) for row, other in zip(rows, others, strict=True)]


def ours(case: Case, folder: Path, rows: dict[str, str], *, profile: bool) -> dict[str, Any]:
    device = torch.device("cuda")
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(case.cap * GIB / total)
    config = ModelConfig(id=str(folder))
    found: dict[str, Any] = {}
    try:
        with refusals_told():
            started = time.perf_counter()
            model = SlotModel.load(
                find_base(config),
                config,
                LoraConfig(),
                seed=0,
                device=device,
                backend=case.who,  # type: ignore[arg-type]
            )
            found["load"] = _peaks(started) | {"left": torch.cuda.memory_allocated() / GIB}
            torch.cuda.empty_cache()
            if case.generate:
                width = rows_at_once(model, PROMPT + NEW)
                generation(model, 4, 4, 8)  # kernels are compiled at their first call
                if profile:
                    with _profiled("decode"):
                        generation(model, width, width, 8)
                found["generate"] = {"width": width} | generation(model, width, width, NEW)
                found["generate, 16 at once"] = generation(model, 16, 16, NEW)
                torch.cuda.empty_cache()
            for kind, path in rows.items():
                pairs = read_pairs(path)
                found[kind] = training(model, pairs, case)
                if profile:
                    with _profiled(f"train-{kind}"):
                        training(model, pairs[: 2 * BATCH], case)
    except OutOfMemory as error:
        found["out of memory"] = str(error)
    return found


def read_pairs(path: str) -> list[Pair]:
    pairs = []
    for index, line in enumerate(Path(path).read_text().splitlines()):
        row = json.loads(line)
        sides = (tuple(row["prompt"]), tuple(row["real"]), tuple(row["generated"]))
        pairs.append(Pair(str(index), 0, *sides, ended=True))
    return pairs


def generation(model: SlotModel, rows: int, width: int, new: int) -> dict[str, float]:
    """So many prompts, each of so many new tokens."""
    chance = random.Random(rows)
    requests = [Request(tuple(chance.randrange(5, 32000) for _ in range(PROMPT)), key) for key in range(rows)]
    steps: list[float] = []

    def on_step(_new: int, _work: float) -> None:
        steps.append(time.perf_counter())

    started = _fresh()
    generate(
        model, requests, max_new_tokens=new, temperature=1.0, top_p=1.0, width=width, stop_ids=frozenset(),
        on_step=on_step,
    )  # fmt: skip
    found = _peaks(started)
    decoding = [after - before for before, after in itertools.pairwise(steps[-100:])]
    return found | {"tokens/s": rows * new / found["seconds"], "step, ms": 1e3 * statistics.median(decoding)}


def training(model: SlotModel, pairs: list[Pair], case: Case) -> dict[str, Any]:
    config = TrainConfig(batch_size=BATCH, epochs=1, gradient_checkpointing=case.checkpointing)
    lengths = [lengths_of(pair) for pair in pairs]
    tokens = [length.total for length in lengths]

    def plan(budget: int) -> Plan:
        return plan_batches(lengths, batch_size=BATCH, token_budget=budget, seed=0)

    found: dict[str, Any] = {}
    started = _fresh()
    model.use_gradient_checkpointing(case.checkpointing)
    budget = token_budget(model, pairs, plan, 0, config.optimizer)
    found["budget"] = _peaks(started) | {"tokens": budget}
    batches = plan(budget)
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


@contextlib.contextmanager
def _profiled(name: str) -> Iterator[None]:
    """Which kernels took the time, into profile-NAME.txt of the working folder."""
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        yield
    averages = profiler.key_averages()
    tables = (averages.table(sort_by=key, row_limit=30) for key in ("self_device_time_total", "self_cpu_time_total"))
    Path(f"profile-{name}.txt").write_text("".join(tables))


if __name__ == "__main__":
    main()
