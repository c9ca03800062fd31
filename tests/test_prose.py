"""Figures in the pages' sentences are those of committed results, of a run that is on a page, or of a test."""

from __future__ import annotations

import json
import re
import statistics
from typing import Any

import gpu_cases
import pytest
import table
from conftest import ROOT, SHARED_DATA

from qspin.config import load_config
from qspin.fitting.footprint import Batch, Footprint
from qspin.fitting.work import training_work
from qspin.planning.plan import DECODING, PASSES

SHORT = table.FIXED


def page(name: str) -> str:
    """A page's text, on one line."""
    return " ".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8").split())


def results(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def assert_said(name: str, *sentences: str) -> None:
    for sentence in sentences:
        assert sentence in page(name), sentence


# --- on a GPU ---

CASES = results("gpu-cuda")["cases"]
OURS, TORCHS = CASES["qspin"]["measured"], CASES["qspin, torch's kernels"]["measured"]["22 GiB"]
PEERS = table.settings(CASES)
FUSED, PLAIN, OFFLOADED = "kept, 4 pairs, fused loss", "recomputed, 16 pairs", "offloaded, 8 pairs"


def rate(found: dict[str, Any], kind: str) -> float:
    pairs: float = found[kind]["train"]["pairs/s"]
    return pairs


def beside(share: str, kind: str, setting: str) -> tuple[float, float]:
    """How many times as fast as a setting of the peer, and in how much of its memory."""
    peer, found = PEERS[setting], OURS[share]
    memory = peer["measured"]["training"]["peak_allocated_bytes"] / table.GIB
    return rate(found, kind) / table.peer_rates(peer)[kind], found[kind]["train"]["allocated, GiB"] / memory


def work(share: str, recomputed: int) -> float:
    """Of the operations a second that the card is sold with."""
    model = load_config(gpu_cases.MODELS["mistral-7b"]).model.architecture
    assert model is not None
    footprint = Footprint(model, 16, None, "cuda", 2, recomputed=recomputed)
    return training_work(footprint, Batch.of([(256, 256, 256)] * 16)) / 16 * rate(OURS[share], SHORT) / 989e12


def test_training_beside_the_peer() -> None:
    tokens = results("gpu-cuda")["computed tokens, real"]
    _, fewest, *_, most = sorted(count / tokens["qspin"] for count in tokens.values())
    (auto, in_auto), (fixed, in_fixed) = (beside(share, SHORT, FUSED) for share in ("22 GiB, auto", "22 GiB"))
    (plain, in_plain), (stored, in_stored) = (beside("22 GiB", SHORT, setting) for setting in (PLAIN, OFFLOADED))
    (real, in_real), (all_real, in_all_real) = (beside(share, "real", PLAIN) for share in ("22 GiB, auto", "22 GiB"))
    told = [round(share, 1) for share in (in_auto, in_fixed, in_plain, in_real, in_all_real)]
    assert told == [0.9, 0.5, 0.8, 1.1, 0.5]
    assert max(in_fixed, in_all_real) < 0.5
    assert in_stored > 1
    small = rate(OURS["7 GiB, auto"], SHORT)
    assert round(small / table.peer_rates(PEERS[OFFLOADED])[SHORT], 1) == 0.8
    assert_said(
        "performance",
        f"TRL computes {fewest:.1f} to {most:.1f} times as many tokens",
        f"{real:.2f} times its fastest setting in about as much memory. With all layers recomputed it is "
        f"{all_real:.2f} times as fast in less than half of the memory",
        f"{auto:.2f} times as fast as the fastest setting, in nine tenths of its memory. All layers recomputed, it is "
        f"{fixed:.2f} times as fast in less than half of the memory, {plain:.2f} times plain recomputation in three "
        f"quarters of its, {stored:.2f} times the offloading setting in more than its",
        f"{work('22 GiB, auto', 0):.0%} and {work('22 GiB', 32):.0%} of the 989 TFLOP/s",
        f"`auto` made {small:.1f} pairs a second, a fifth fewer than that",
    )


def test_decoding_kernels_and_how_it_was_measured() -> None:
    decoding, of_torch = OURS["22 GiB"]["generate"], TORCHS["generate"]["16 at once"]
    few, wide = decoding["16 at once"], decoding["wide"]
    times = few["tokens/s"] / CASES["TRL on transformers"]["measured"]["generation"]["new_tokens_a_second"]
    steps = TORCHS["real"]["train"]["steps, s"]
    again = CASES["TRL on Unsloth, all kept, fused"]["measured again"]
    seconds, rates = again["training"]["each_step_seconds"], table.peer_rates({**PEERS[FUSED], "measured": again})
    lengths = json.loads((ROOT / "benchmarks" / "dolly-lengths.json").read_text(encoding="utf-8"))
    prompt, completion = (statistics.fmean(row[part] for row in lengths) for part in (0, 1))
    assert_said(
        "performance",
        f"{few['step, ms']:.0f} ms for 16 rows and {wide['step, ms']:.0f} for {decoding['width']}, which makes "
        f"{wide['tokens/s']:,.0f} tokens a second",
        f"it is {times:.1f} times as fast",
        f"pairs a second were {rate(TORCHS, SHORT):.1f} and {rate(TORCHS, 'real'):.1f} on the earlier day, and are "
        f"{rate(OURS['22 GiB'], SHORT):.1f} and {rate(OURS['22 GiB'], 'real'):.1f}",
        f"tokens a second {of_torch['tokens/s']:,.0f} in place of {few['tokens/s']:,.0f}",
        f"mean of steps of {min(steps):.1f} to {max(steps):.1f} s",
        f"({rates[SHORT]:.1f} and {rates['real']:.1f} pairs a second, in steps of {min(seconds):.2f} to "
        f"{max(seconds):.2f} s)",
        f"first {len(lengths)} rows of databricks-dolly-15k ({prompt:.0f} and {completion:.0f} tokens on average)",
    )


def test_what_small_cards_have() -> None:
    """A context that all processes had, and tables of the models that were measured."""
    found = [share for case in CASES.values() if "shares" in case for share in case["measured"].values()]
    context = max(share["context, GiB"] for share in found if "context, GiB" in share)
    sizes = []
    for model in ("mistral-7b", "llama-3.1-8b", "qwen3-8b", "gemma-2-9b"):
        shape = load_config(gpu_cases.MODELS[model]).model.architecture
        assert shape is not None
        sizes.append(shape.vocabulary * shape.hidden * 2 / table.GIB)
    first, second, third, tied = sizes
    assert_said(
        "fitting",
        f"There it was {context:.2f} GiB with all that a process had loaded",
        f"embedding tables in main memory: {first:.2f}, {second:.2f} and {third:.2f} GiB by their shapes",
        f"Gemma 2 9B's table of {tied:.1f} GiB",
    )


def test_memory_that_was_counted() -> None:
    counted = results("gpu_memory-cpu")["cases"]
    gemma = counted.pop("qspin, Gemma 2 9B")["6.7 GiB"]
    more = [CASES[name]["measured"]["load"]["left, GiB"] - case["load"]["left, GiB"] for name, case in counted.items()]
    training, decoding = gemma[SHORT], gemma["generate"]
    assert_said(
        "fitting",
        f"a loaded model has up to {max(more):.1f} GiB more there",
        f"Gemma's {training['tokens']:,} tokens at once are five such pairs, and {decoding['width']} rows of 512 were",
        f"decoded side by side, in {decoding['most, GiB']:.2f} GiB",
    )
    assert training["tokens"] // (3 * 256) == 5
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"its tensors come to {training['train, GiB']:.1f} of 6.7 GiB, counted without a GPU" in readme


# --- on a CPU ---


def test_parts_of_the_work() -> None:
    result = results("parts-cpu")
    took = sum(result["milliseconds"]["training"].values())
    assert_said(
        "performance",
        f"({result['flops'] / 1e9:.0f} GFLOP/s), those of the training step would take {took / result['ratio']:.0f} "
        f"ms: it takes {result['ratio']:.2f} times as long",
    )
    scoring, training, few, _, many = (f"{share:.0%}" for share in result["reached"].values())
    assert_said(
        "fitting",
        f"scoring reaches {scoring}, training {training}, and decoding {few} at 16 rows and {many} at 128",
        f"the plan takes {PASSES['cpu']:.0%} and {DECODING['cpu']:.0%}",
    )


def test_how_long_a_benchmark_takes() -> None:
    result = json.loads((ROOT / "docs" / "experiments" / "gsm8k.json").read_text(encoding="utf-8"))
    low, high = sorted(result[name]["seconds"] / 60 for name in ("base", "1"))
    assert_said(
        "benchmarks", f"400 questions of GSM8K with five examples took a 135M model {low:.0f} to {high:.0f} minutes"
    )


@pytest.mark.parametrize(("file", "said"), [("dolly-train", "{:,} in `{}`"), ("dolly-eval", "{} others in `{}`")])
def test_rows_of_the_experiments(file: str, said: str) -> None:
    path = SHARED_DATA / f"{file}.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    assert_said("experiments", said.format(len(path.read_bytes().splitlines()), path.name))


def test_what_the_fuzzer_found() -> None:
    result = json.loads((ROOT / "docs" / "experiments" / "fuzz.json").read_text(encoding="utf-8"))
    assert result["found"] == 0
    assert_said(
        "reliability",
        f"{result['executions']:,} executions in {result['seconds']} s on one busy core ([{result['date']}, atheris "
        f"{result['versions']['atheris']}](experiments/fuzz.json)) | nothing found",
        result["command"].removeprefix("python "),
    )


# --- the run of "Getting started" ---


def test_the_readme_shows_it() -> None:
    readme, shown = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/quickstart.md"))
    for title in ("Held-out rows: likelihood, and the game", "Held-out rows: what it writes"):
        rows = shown.partition(f"#### {title}\n\n")[2].partition("\n\n")[0]
        assert len(rows.splitlines()) >= 5
        assert rows in readme


def test_it_is_held_against_those_on_a_gpu() -> None:
    texts = [page(f"experiments/quickstart-h200-{name}") for name in ("unsloth", "transformers")]
    found = [re.findall(r"\| (?:base|1) \| (\d\.\d{3}) \[", text)[:2] for text in (*texts, page("quickstart"))]
    [[base, last], [torchs, torchs_last], [cpu, cpu_last]] = [[f"{float(nll):.2f}" for nll in nlls] for nlls in found]
    assert_said(
        "performance",
        f"the base's NLL is {base} and {torchs}, and iteration 1's {last} and {torchs_last}, where it is {cpu} and "
        f"{cpu_last} [on a CPU]",
    )
