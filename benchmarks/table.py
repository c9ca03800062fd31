"""The committed results as the Markdown tables that README.md and the docs show.

python benchmarks/table.py
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
GIB = 1 << 30
FIXED = "256+256+256"  # tokens of prompt, real and generated completion
FIXED_STEPS = 5  # of a peer on a GPU, on rows of one length: seven, less two that compile kernels


def peer_rates(peer: dict[str, Any]) -> dict[str, float]:
    """Pairs a second on the kinds of rows that it trained on, three steps left out where new lengths begin."""
    batch, seconds = peer["batch"], peer["measured"]["training"]["each_step_seconds"]  # the first two left out
    timed = {FIXED: seconds[:FIXED_STEPS], "real": seconds[FIXED_STEPS + 3 :]}
    if peer["rows"] == "real":
        timed = {"real": seconds}
    return {kind: batch * len(steps) / sum(steps) for kind, steps in timed.items()}


def table() -> str:
    train, generate, iteration = _read("train"), _read("generate"), _read("iteration")
    rows = [
        *_training(train),
        *(
            _row("generate, tokens a second", generate, peer, "tokens_a_second", more_is_better=True)
            for peer in ("HF, official settings", "HF, batched by length", "HF, continuous batching")
        ),
        _row("a whole iteration, seconds a row", iteration, "HF generate + TRL", "seconds_a_row"),
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def fp32() -> str:
    """Training on a CPU without bfloat16 of its own, for docs/performance.md."""
    return "\n".join("| " + " | ".join(cells) + " |" for cells in _training(_read("train-fp32")))


def _training(train: dict[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """The heading of a table of speed, and its first rows."""
    yield "", "qspin", "peer", "ratio"
    yield "---", "---", "---", "---"
    peers = ("TRL", "TRL, reference precomputed")
    for peer in peers:
        yield _row("score and train, seconds a pair", train, peer, "seconds_a_pair")
    for peer in peers:
        ours, theirs = (train["medians"][name]["peak_above_model"] for name in ("qspin", peer))
        told = f"{peer}: {_mebibytes(train, peer)}"
        yield "peak memory above the loaded model", _mebibytes(train, "qspin"), told, _ratio(theirs / ours)


def parts() -> str:
    """Where the time goes, for docs/performance.md."""
    result = _read("parts")
    tables = result["milliseconds"]
    rows = [("", *tables), ("---",) * (len(tables) + 1)]
    for part in next(iter(tables.values())):
        rows.append((part, *(f"{table[part] / sum(table.values()):.0%}" for table in tables.values())))
    rows.append(("milliseconds", *(f"{sum(table.values()):.0f}" for table in tables.values())))
    rows.append(
        ("reached of what `qspin plan` reckons at best", *(f"{result['reached'][name]:.0%}" for name in tables))
    )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def busy() -> str:
    """Steps on a machine with other work, for docs/performance.md."""
    seconds = _read("busy")["seconds"]
    waits = list(next(iter(seconds.values())))
    rows = [("milliseconds a step", *waits), ("---",) * (len(waits) + 1)]
    for case, taken in seconds.items():
        rows.append((case, *(f"{1e3 * taken[name]:,.0f}" for name in waits)))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def growth() -> str:
    """How the time of an iteration grows, for docs/performance.md."""
    derived = _read("iteration")["derived"]
    rows = [("", "seconds"), ("---", "---")]
    rows += [(name.removeprefix("qspin's seconds, "), f"{seconds:.0f}") for name, seconds in derived.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def exports() -> str:
    """What every export comes to, for docs/exporting.md."""
    result = _read("export")
    asked = result["prompts"]
    rows = [
        ("export", "onto", "written in", "MB", "seconds", "NLL", "same token likeliest", f"same of {asked} answers",
         "tokens in common", "the same in llama.cpp"),
        ("---",) * 10,
    ]  # fmt: skip
    for row in result["exports"]:
        compared = "nll_difference" in row
        rows.append(
            (
                row["export"],
                row["onto"],
                row["dtype"],
                f"{row['bytes'] / 1e6:.0f}" if "bytes" in row else "",
                f"{row['seconds']:.0f}" if compared else "",
                f"{row['nll_difference']:+.4f}" if compared else "",
                f"{row['top1_agreement']:.1%}" if compared else "",
                str(row["same"]),
                f"{row['common_prefix']:.1f} of {row['length']:.1f}",
                f"{row['llama_cpp_same']}, {row['llama_cpp_common_prefix']:.1f}" if "llama_cpp_same" in row else "",
            )
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def planned_memory() -> str:
    """What training and decoding take above the loaded model, for docs/fitting.md."""
    result = _read("plan")
    rows = [("MB", "tensors, planned", "measured", "with holes, planned", "measured, in a run's heap"), ("---",) * 5]
    for name, case in result["memory"].items():
        mapped, kept = case["mapped"], case["kept"]
        figures = (mapped["planned"], mapped["measured"], kept["planned_with_holes"], kept["measured"])
        rows.append((name, *(f"{size / 1e6:.0f}" for size in figures)))
    decoding = (result["decoding"][key] / 1e6 for key in ("planned", "measured"))
    rows.append(("SmolLM2-135M decoding 64 rows", *(f"{size:.0f}" for size in decoding), "", ""))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def planned_seconds() -> str:
    """What the phases of a short run take, for docs/fitting.md."""
    runs = _read("plan")["runs"]
    rows = [("seconds", "planned", "measured"), ("---",) * 3]
    for phase in runs[0]:
        rows.append((phase, *(f"{statistics.median(run[phase][side] for run in runs):.1f}" for side in (0, 1))))
    totals = (statistics.median(sum(both[side] for both in run.values()) for run in runs) for side in (0, 1))
    rows.append(("in all", *(f"{total:.1f}" for total in totals)))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def settings(cases: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Of TRL on Unsloth with the model that qspin trains too, by what they are called in tables."""
    names = {"unsloth": "offloaded", "plain": "recomputed", "none": "kept"}
    mine = {name: case for name, case in cases.items() if name.startswith("TRL on Unsloth")}
    found = {}
    for case in mine.values():
        if case["model"] == cases["qspin"]["model"] and "training" in case["measured"]:
            loss = ", fused loss" if case["fused_loss"] else ""
            found[f"{names[case['checkpointing']]}, {case['batch']} pairs{loss}"] = case
    return found


def gpu() -> str:
    """Work on one GPU beside TRL on Unsloth in its fastest setting, for README.md and docs/performance.md."""
    cases = _read("gpu", "cuda")["cases"]
    measured, peers = cases["qspin"]["measured"], settings(cases)
    rows = [("", "qspin", "GiB", "TRL on Unsloth", "GiB", "ratio"), ("---",) * 6]
    trained = {
        "256 + 256 + 256 tokens, all layers recomputed": ("22 GiB", FIXED),
        "256 + 256 + 256 tokens, `auto`": ("22 GiB, auto", FIXED),
        "real lengths, all layers recomputed": ("22 GiB", "real"),
        "real lengths, `auto`": ("22 GiB, auto", "real"),
    }
    for label, (share, kind) in trained.items():
        rates = {name: rate for name, peer in peers.items() if (rate := peer_rates(peer).get(kind))}
        fastest = max(rates, key=rates.__getitem__)
        memory = peers[fastest]["measured"]["training"]["peak_allocated_bytes"]
        found = measured[share][kind]["train"]
        rows.append(
            _beside(f"train, pairs a second: {label}", found, "pairs/s", rates[fastest], memory, f" ({fastest})")
        )
    for label, mine, theirs in (
        ("Mistral 7B", "qspin", "TRL on Unsloth"),
        ("Llama 3.1 8B", "qspin, 8B", "TRL on Unsloth, 8B"),
    ):
        generation = cases[theirs]["measured"]["generation"]
        found = cases[mine]["measured"]["22 GiB"]["generate"]["16 at once"]
        speed, memory = generation["new_tokens_a_second"], generation["peak_allocated_bytes"]
        rows.append(_beside(f"generate, tokens a second: 16 rows, {label}", found, "tokens/s", speed, memory))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def gpu_peers() -> str:
    """What TRL made of the same work in each setting, for docs/performance.md."""
    cases = _read("gpu", "cuda")["cases"]
    peers = {f"TRL on Unsloth: {name}": peer for name, peer in settings(cases).items()}
    peers["TRL on transformers: recomputed, 8 pairs"] = cases["TRL on transformers"]
    rows = [("", "256 + 256 + 256", "real lengths", "GiB", "generate, tokens a second"), ("---",) * 5]
    for label, peer in peers.items():
        rates, found = peer_rates(peer), peer["measured"]
        generated = found.get("generation")
        rows.append(
            (
                label,
                *(_three(rates[kind]) if kind in rates else "" for kind in (FIXED, "real")),
                f"{found['training']['peak_allocated_bytes'] / GIB:.1f}",
                _three(generated["new_tokens_a_second"]) if generated else "",
            )
        )
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def gpu_memory() -> str:
    """What phases take under caps on one GPU against what was planned, for docs/fitting.md."""
    rows = [("model's shape", "cap on the allocator", "phase", "planned, GiB", "measured", "reserved"), ("---",) * 6]
    for name, case in _read("gpu", "cuda")["cases"].items():
        if name.startswith("qspin") and case["backend"] == "unsloth":
            for share in case["shares"]:
                for phase, found in _phases(case["measured"].get(share, {})):  # not all need have been asked for
                    figures = (found[key] for key in ("planned, GiB", "allocated, GiB", "reserved, GiB"))
                    rows.append((_shape(case), share, phase, *(f"{size:.2f}" for size in figures)))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def gpu_counted() -> str:
    """What was counted without a GPU beside what one took for the same, for docs/fitting.md."""
    cases = _read("gpu", "cuda")["cases"]
    rows = [("model's shape", "cap on the allocator", "", "counted, GiB", "measured"), ("---",) * 5]
    for name, counted in _read("gpu_memory")["cases"].items():
        case = cases[name]
        for share in (share for share in case["shares"] if FIXED in counted.get(share, {})):
            found, there = case["measured"], case["measured"].get(share, {}).get(FIXED)
            here = counted[share][FIXED]
            loaded = f"{found['load']['left, GiB']:.2f}" if there else ""  # else it was loaded otherwise
            trained = f"{there['train']['allocated, GiB']:.2f}, {there['budget']['tokens']:,} tokens" if there else ""
            rows.append((_shape(case), share, "loaded", f"{counted['load']['left, GiB']:.2f}", loaded))
            at_most = f"{here['train, GiB']:.2f}, {here['tokens']:,} tokens at once"
            rows.append((_shape(case), share, f"train, {FIXED}", at_most, trained))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _shape(case: dict[str, Any]) -> str:
    return case["model"] if case["rank"] == 16 else f"{case['model']}, rank {case['rank']}"


def _phases(results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Of one share of a card."""
    for kind, found in results.items():
        if kind == "generate":
            rows = "row" if found["width"] == 1 else "rows"
            yield f"generate, {found['width']} {rows}", found["wide"]
        elif isinstance(found, dict):
            yield f"train, {kind}", found["train"]


def _beside(
    what: str, found: dict[str, Any], key: str, theirs: float, memory: int, setting: str = ""
) -> tuple[str, ...]:
    ours, taken = found[key], found["allocated, GiB"]
    return what, _three(ours), f"{taken:.1f}", _three(theirs) + setting, f"{memory / GIB:.1f}", _ratio(ours / theirs)


def _three(figure: float) -> str:
    return f"{figure:,.0f}" if figure >= 100 else f"{figure:.3g}"


def _read(name: str, device: str = "cpu") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}-{device}.json").read_text())
    return content


def _row(
    what: str, result: dict[str, Any], peer: str, figure: str, *, more_is_better: bool = False
) -> tuple[str, str, str, str]:
    ours, theirs = result["medians"]["qspin"][figure], result["medians"][peer][figure]
    return what, f"{ours:.3g}", f"{peer}: {theirs:.3g}", _ratio(ours / theirs if more_is_better else theirs / ours)


def _mebibytes(result: dict[str, Any], contestant: str) -> str:
    return f"{result['medians'][contestant]['peak_above_model'] / 2**20:.0f} MiB"


def _ratio(value: float) -> str:
    return f"**{value:.2f}×**"


if __name__ == "__main__":
    print(
        table(),
        fp32(),
        parts(),
        busy(),
        growth(),
        exports(),
        planned_memory(),
        planned_seconds(),
        gpu(),
        gpu_peers(),
        gpu_memory(),
        gpu_counted(),
        sep="\n\n",
    )
