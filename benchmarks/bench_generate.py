"""Generation: useful tokens a second (up to and with a row's end), qspin against transformers.

    benchmarks/.venv/bin/python benchmarks/bench_generate.py --data mine.jsonl

Three peers: HF generate as the official SPIN script drives it (dataset order, batches of 16), HF generate in its best
batched settings (prompts by length, batches of 64), and transformers' own continuous batching. The last line is our
tokens a second over those of the best of them.
"""

from __future__ import annotations

from contestants import (
    Job,
    generate_batched,
    generate_continuous,
    generate_official,
    generate_qspin,
    make_config,
    results_name,
)
from harness import alternate, arguments, finish, median

PEERS = {
    "HF, official settings": generate_official,
    "HF, batched by length": generate_batched,
    "HF, continuous batching": generate_continuous,
}


def main() -> None:
    options = arguments(__doc__ or "", rows=64).parse_args()
    config = make_config(options.data, rows=options.rows, cap=options.cap, batch_size=8)
    results = alternate({"qspin": generate_qspin, **PEERS}, Job(config), options.repeats)
    rate = {name: median(runs, "tokens_a_second") for name, runs in results.items()}
    best = max(PEERS, key=lambda name: rate[name])
    finish(
        results_name("generate"),
        results,
        ratio=rate["qspin"] / rate[best],
        meaning=f"tokens a second, qspin's over those of {best}, medians of {options.repeats}",
        derived={f"tokens a second, qspin's over those of {name}": rate["qspin"] / rate[name] for name in PEERS},
        options=options,
    )


if __name__ == "__main__":
    main()
