"""What the benchmarks share: contestants in turn, each in a process of its own, and what is said and kept of them.

    measured = alternate({"qspin": ours, "peer": theirs}, job, repeats=3)
    finish("train", measured, ratio=..., settings=...)

One process works at a time, so that neither disturbs the other and each one's peak memory is its own.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import datetime
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl")
ON_A_GPU = ("triton", "unsloth")


@dataclass(slots=True)
class Measurement:
    """One contestant's work: its time, and the memory that it took at most above what the loaded model takes."""

    seconds: float = 0.0
    loaded_bytes: int = 0  # with the model loaded, before the work
    peak_bytes: int = 0  # the most during the work
    figures: dict[str, float] = field(default_factory=dict)  # what the work came to

    @property
    def peak_above_model(self) -> int:
        return self.peak_bytes - self.loaded_bytes


def arguments(description: str, *, rows: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", type=Path, help="file of prompts and answers; the embedded rows by default")
    parser.add_argument("--rows", type=int, default=rows, help=f"the first so many good rows (default {rows})")
    parser.add_argument("--cap", type=int, default=128, help="longest completion, in tokens (default 128)")
    parser.add_argument("--repeats", type=int, default=3, help="alternating runs (default 3)")
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/results")
    return parser


@contextlib.contextmanager
def measured() -> Iterator[Measurement]:
    """Time and peak memory of a block: on a GPU what its allocator counted, on a CPU the process's resident memory."""
    result = Measurement()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        result.loaded_bytes = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the kernel forgets the process's peak
        result.loaded_bytes = _peak_resident()
    started = time.perf_counter()
    yield result
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    result.seconds = time.perf_counter() - started
    result.peak_bytes = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak_resident()


def _peak_resident() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def in_fresh_process(work: Callable[..., Any], *args: Any) -> Any:
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


@contextlib.contextmanager
def openmp(**settings: str) -> Iterator[None]:
    """How threads wait in processes that are started within; OpenMP's defaults where nothing is said."""
    before = dict(os.environ)
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        os.environ.pop(name, None)
    os.environ.update(settings)
    yield
    os.environ.clear()
    os.environ.update(before)


def alternate(
    contestants: Mapping[str, Callable[[Any], Measurement]], job: Any, repeats: int
) -> dict[str, list[Measurement]]:
    """Every contestant once, then every one again, and so on; peers without what qspin tells OpenMP."""
    results: dict[str, list[Measurement]] = {name: [] for name in contestants}
    for turn in range(repeats):
        for name, work in contestants.items():
            with contextlib.nullcontext() if name == "qspin" else openmp():
                results[name].append(in_fresh_process(work, job))
            say(f"run {turn + 1} of {repeats}: {_line(name, results[name][-1])}")
    return results


def median(measurements: list[Measurement], figure: str = "seconds") -> float:
    """The median over runs of the time, of `peak_above_model`, or of one of the figures."""
    first = measurements[0]
    found = [m.figures[figure] if figure in first.figures else float(getattr(m, figure)) for m in measurements]
    return statistics.median(found)


def finish(
    name: str,
    results: Mapping[str, list[Measurement]],
    *,
    ratio: float,
    meaning: str,
    options: argparse.Namespace,
    derived: Mapping[str, float] | None = None,
) -> None:
    """Print medians, further figures, and the ratio that counts; keep them if asked."""
    medians = {
        contestant: {
            figure: round(median(runs, figure), 4)
            for figure in ("seconds", "loaded_bytes", "peak_above_model", *runs[0].figures)
        }
        for contestant, runs in results.items()
    }
    say("medians:")
    for contestant, figures in medians.items():
        say("  " + contestant + ": " + ", ".join(_figure(key, value) for key, value in figures.items()))
    for key, value in (derived or {}).items():
        say(f"{key}: {value:.2f}")
    if options.write:
        runs = {contestant: [asdict(run) for run in runs] for contestant, runs in results.items()}
        content = {"ratio": ratio, "ratio_means": meaning, "derived": derived or {}, "medians": medians, "runs": runs}
        write(name, content)
    say(meaning)
    say(f"ratio {ratio:.2f}")


def write(name: str, content: Mapping[str, Any]) -> None:
    """Keep results beside when, how and on what they were made."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{'cuda' if torch.cuda.is_available() else 'cpu'}.json"
    path.write_text(json.dumps(made_by() | dict(content), indent=2) + "\n")
    say(f"kept in benchmarks/results/{path.name}")


def made_by() -> dict[str, Any]:
    """When, how and on what a benchmark is run."""
    packages = PACKAGES + (ON_A_GPU if torch.cuda.is_available() else ())
    return {
        "date": datetime.date.today().isoformat(),
        "command": " ".join(["python", f"benchmarks/{_name(sys.argv[0])}", *map(_name, sys.argv[1:])]),
        "machine": _machine(),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages if find_spec(p)}},
    }


def say(text: str) -> None:
    print(text, flush=True)


def _line(name: str, measurement: Measurement) -> str:
    figures = {"seconds": measurement.seconds, "peak_above_model": measurement.peak_above_model}
    return f"{name}: " + ", ".join(_figure(key, value) for key, value in (figures | measurement.figures).items())


def _figure(key: str, value: float) -> str:
    if key.endswith("bytes") or key == "peak_above_model":
        return f"{key.removesuffix('_bytes').replace('_', ' ')} {value / 2**20:.0f} MiB"
    return f"{key.replace('_', ' ')} {value:.4g}"


def _name(argument: str) -> str:
    """A path's last part: whoever runs this has the file elsewhere."""
    return Path(argument).name if "/" in argument else argument


def _machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), platform.machine())
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    machine = {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "memory_gib": round(pages / 2**30)}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return machine
