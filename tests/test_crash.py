"""A run that is cut off anywhere goes on with the same command, and ends in the same bytes.

As SQLite's tests do it: the process is ended at its first change of the disk, its second, … until the run no longer
reaches that one. The normal tests take every k-th, another k-th each day; all are taken with `-m nightly`.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SHAPE

from qspin.files import check_file, check_folder

HERE = Path(__file__).parent
ROWS = 10
SETTINGS = {
    "iterations": 2,
    "sft.epochs": 1,
    "model.dtype": "float32",
    "lora.rank": 2,
    "generation.max_new_tokens": 4,
    "generation.width": 2,
    "generation.shard_rows": 4,
    "train.batch_size": 8,
    "train.tokens_per_micro_batch": 512,
    "train.snapshot_minutes": 0,
    "train.lr": 0.01,
    "data.heldout_rows": 2,
}
CRASHED, KILLED = 99, -9
# what two runs of the same settings need not have in common: times, places, who worked there
PASSING = {".lock", ".holder", "status.json", "seconds.json", "memory.json", "SUMMARY.md", "verdict.json"}
DAY = datetime.date.today().toordinal()


@dataclass(frozen=True, slots=True)
class Victim:
    """Plays runs in forks of one process that has imported everything (crash_victim.py)."""

    process: subprocess.Popen[str]

    def play(self, out: Path, **how: Any) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({"out": str(out), **how}) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def finish(self, out: Path) -> None:
        ended = self.play(out)
        # nor is anything that a crash leaves taken for damage
        assert (ended["code"], ended["said"]) == (0, "")
        assert not [note for note in ended["notes"] if "taken away" in note]


@pytest.fixture(scope="session")
def victim(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    if sys.platform != "linux":
        pytest.skip("the shim stands between a process and glibc's calls: Linux only")
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc to build the shim with (tests/crash_shim.c)")
    folder = tmp_path_factory.mktemp("crash")
    # the smallest model that is one: what is tried here is the disk
    shape = SHAPE | {"intermediate_size": 64, "num_hidden_layers": 1}
    torch.manual_seed(1)
    config = transformers.LlamaConfig(**shape, tie_word_embeddings=True)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    shim = folder / "crash_shim.so"
    build = ["gcc", "-O1", "-shared", "-fPIC", "-o", str(shim), str(HERE / "crash_shim.c"), "-ldl"]
    subprocess.run(build, check=True, capture_output=True)
    data = folder / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}."} for n in range(ROWS)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(HERE / "crash_victim.py"), str(folder / "model"), str(data)]
    # one thread: a process with several can't be forked safely
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LD_PRELOAD": str(shim)}
    process = subprocess.Popen(
        [*command, json.dumps(SETTINGS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=(folder / "stderr").open("w"),
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n", (folder / "stderr").read_text()
    yield Victim(process)
    process.kill()
    process.communicate()


def results(out: Path) -> dict[str, bytes]:
    files = [path for path in out.rglob("*") if path.is_file() and path.name not in PASSING]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def expected(victim: Victim, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What a run ends in that nothing happens to."""
    out = tmp_path_factory.mktemp("expected") / "run"
    victim.finish(out)
    found = results(out)
    assert len(found) > 20
    return found


def check_unharmed(out: Path, expected: dict[str, bytes]) -> None:
    """Every name that is there shows a finished thing, and none but what an undisturbed run would make."""
    for path in out.rglob("*") if out.is_dir() else []:
        name = path.relative_to(out).as_posix()
        if ".partial" in name or not path.is_file() or path.name in PASSING:
            continue
        if "/snapshots/" in name:
            check_folder(path.parent)
        elif name == "run.json":  # more is recorded in it as it is found
            check_file(path)
        else:
            assert path.read_bytes() == expected[name], name


def cut_off(victim: Victim, expected: dict[str, bytes], out: Path, mode: str, every: int, first: int) -> int:
    """Let the run be cut off at its first-th change, and at every `every`-th after it; how many times it was."""
    for times, n in enumerate(range(first, 100_000, every)):
        shutil.rmtree(out, ignore_errors=True)
        ended = victim.play(out, mode=mode, n=n)
        where = f"{mode} at {n} (n ≡ {first} mod {every})"
        if mode == "full" and ended["count"] >= n:
            # what is written for show alone may lack, and the run goes on to its end
            assert ended["code"] in {0, 1}, f"{where}: {ended['said']}"
            assert ended["code"] == 0 or FULL.fullmatch(ended["said"]), f"{where}: {ended['said']}"
        elif ended["code"] != CRASHED:
            assert (ended["code"], ended["count"] < n) == (0, True), f"{where}: {ended}"
            return times
        check_unharmed(out, expected)
        victim.finish(out)
        assert results(out) == expected, where
        assert not list(out.rglob("*.partial")), where
    raise AssertionError("it never got through")


FULL = re.compile(
    r"/.*: the disk is full: ([\d,]+ bytes are to be written there and )?[\d,]+ are free; "
    r"free some space(, there or where the output and caches are)?, and the same command goes on"
)


@pytest.mark.parametrize(("mode", "every"), [("die", 97), ("torn", 31), ("full", 97)])
def test_some_moments_of_today(
    mode: str, every: int, victim: Victim, expected: dict[str, bytes], tmp_path: Path
) -> None:
    first = 1 + DAY % every
    assert cut_off(victim, expected, tmp_path / "run", mode, every, first) >= 2


@pytest.mark.nightly
@pytest.mark.parametrize("mode", ["die", "torn", "full"])
def test_every_moment(
    mode: str, victim: Victim, expected: dict[str, bytes], tmp_path: Path, record_property: Callable[..., None]
) -> None:
    times = cut_off(victim, expected, tmp_path / "run", mode, 1, 1)
    record_property("times", times)
    sys.stderr.write(f"{mode}: {times} moments\n")
    assert times >= 90


def killed(victim: Victim, expected: dict[str, bytes], out: Path, times: int, seed: int) -> int:
    """Kill runs at random moments, up to three times each before it may end; how many kills came before the end."""
    moments, hits = random.Random(seed), 0
    started = time.monotonic()
    victim.finish(out)
    whole = time.monotonic() - started  # seconds of a run, on a machine as busy as this one is
    shutil.rmtree(out)
    for _ in range(times):
        if moments.random() < 1 / 3:
            victim.finish(out)
            assert results(out) == expected, f"seed {seed}"
            shutil.rmtree(out)
        hits += victim.play(out, kill_after=moments.uniform(0, whole))["code"] == KILLED
        check_unharmed(out, expected)
    victim.finish(out)
    assert results(out) == expected, f"seed {seed}"
    return hits


def test_killed_at_some_random_moments(victim: Victim, expected: dict[str, bytes], tmp_path: Path) -> None:
    assert killed(victim, expected, tmp_path / "run", times=6, seed=DAY) > 0


@pytest.mark.nightly
def test_killed_at_60_random_moments(victim: Victim, expected: dict[str, bytes], tmp_path: Path) -> None:
    hits = killed(victim, expected, tmp_path / "run", times=60, seed=DAY)
    sys.stderr.write(f"killed: {hits} of 60 before the end, seed {DAY}\n")
    assert hits > 30


def rival(victim: Victim, out: Path, times: int) -> float:
    """Two processes at once on a new folder; the longest that the loser took, in seconds."""
    longest = 0.0
    for _ in range(times):
        shutil.rmtree(out, ignore_errors=True)
        winner, loser = sorted(victim.play(out, rivals=2), key=lambda ended: int(ended["code"]))
        assert (winner["code"], loser["code"]) == (0, 1), (winner, loser)
        by = f"process {winner['pid']} on "
        assert re.fullmatch(rf".*: {by}\S+ is working here; wait for it or choose another --out", loser["said"])
        longest = max(longest, loser["seconds"])
    assert longest < 2
    return longest


def test_of_two_processes_one_wins_and_is_named(victim: Victim, expected: dict[str, bytes], tmp_path: Path) -> None:
    rival(victim, tmp_path / "run", times=3)
    assert results(tmp_path / "run") == expected


@pytest.mark.nightly
def test_of_two_processes_one_wins_50_times(victim: Victim, expected: dict[str, bytes], tmp_path: Path) -> None:
    longest = rival(victim, tmp_path / "run", times=50)
    sys.stderr.write(f"rivals: 50 times, the loser left after at most {longest:.2f} s\n")
    assert results(tmp_path / "run") == expected


# --- controls: the harness sees what it is there to see ---


def test_control_the_shim_reaches_what_rust_writes(victim: Victim, tmp_path: Path) -> None:
    """Cut off at every write, some run must have left a half-written tensor file behind."""
    for n in range(1, 100_000):
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        ended = victim.play(tmp_path / "run", mode="torn", n=n)
        assert ended["code"] == CRASHED, f"no tensor file was torn in {n - 1} writes: {ended}"
        if list((tmp_path / "run").rglob(".tmp*")):
            return


def test_control_another_seed_ends_in_other_bytes(expected: dict[str, bytes]) -> None:
    """The comparison of bytes has something to compare: adapters, pairs, scores, plans, figures."""
    kinds = {re.sub(r"\d+", "N", name) for name in expected}
    assert {
        "run.json",
        "iteration-N/adapter/adapter_model.safetensors",
        "iteration-N/generated/shard-N.jsonl",
        "iteration-N/scores/shard-N.jsonl",
        "iteration-N/generation.json",
        "iteration-N/training.json",
        "iteration-N/metrics.jsonl",
        "iteration-N/evaluation.json",
        "warm-start/adapter/adapter_model.safetensors",
        "base/evaluation.json",
    } <= kinds
