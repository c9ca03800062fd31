"""A training and a decoding step on a machine with other work, by how long a thread spins before it sleeps.

    benchmarks/.venv/bin/python benchmarks/bench_busy.py --data mine.jsonl

Each contestant has a thread for every core; it is alone, or there is one process that does nothing but compute. The
contestants differ in OpenMP's environment alone: what qspin sets for itself, OpenMP's own default, and
threads that never spin. The last line is the default's time over qspin's in training, beside another process.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator

import torch
from bench_parts import decoding_step, median_seconds, train_step
from contestants import DEVICE, make_config, opponents_pairs, prepared, slot_model
from harness import arguments, in_fresh_process, openmp, say, write

import qspin
from qspin.config import RunConfig
from qspin.packing import common_prefix, pack_row
from qspin.records import Pair

WAITS = {
    "qspin": {"GOMP_SPINCOUNT": qspin.SPIN_COUNT},
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
    "never spinning": {"OMP_WAIT_POLICY": "passive"},
}
LOADS = {"alone": 0, "beside another process": 1}
WIDTH = 64
BUSY = "while True: pass"


def main() -> None:
    options = arguments(__doc__ or "", rows=8).parse_args()
    config = make_config(options.data, rows=options.rows, cap=options.cap, batch_size=options.rows)
    pairs = in_fresh_process(opponents_pairs, config)
    seconds: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for turn in range(options.repeats):
        for case, load in LOADS.items():
            for name, waits in WAITS.items():
                with openmp(**waits), _others(load):
                    found = in_fresh_process(_steps, config, pairs)
                say(f"run {turn + 1} of {options.repeats}: {name}, {case}: {found}")
                for work, taken in found.items():
                    seconds[f"{work}, {case}"][name].append(taken)
    medians = {case: {name: statistics.median(taken) for name, taken in of.items()} for case, of in seconds.items()}
    for case, of in medians.items():
        say(f"{case}: " + ", ".join(f"{name} {1e3 * taken:.0f} ms" for name, taken in of.items()))
    beside_one = medians["training, beside another process"]
    ratio = beside_one["OpenMP's default"] / beside_one["qspin"]
    meaning = "time of a training step with OpenMP's default over qspin's, beside another process"
    if options.write:
        write("busy", {"ratio": ratio, "ratio_means": meaning, "seconds": medians, "runs": seconds})
    say(meaning)
    say(f"ratio {ratio:.2f}")


def _steps(config: RunConfig, pairs: tuple[Pair, ...]) -> dict[str, float]:
    model = slot_model(config, prepared(config))
    row = pack_row(pairs, DEVICE, common_prefix([pair.prompt_ids for pair in pairs]))
    found = {"training": median_seconds(lambda: train_step(model, row))}
    with torch.inference_mode(), model.decoding():
        found[f"decoding, {WIDTH} rows"] = median_seconds(decoding_step(model, WIDTH))
    return found


@contextlib.contextmanager
def _others(count: int) -> Iterator[None]:
    """So many processes that compute meanwhile."""
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
