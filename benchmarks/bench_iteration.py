"""A whole iteration, end to end: generate, score, two epochs. qspin against HF generate and TRL, chained by hand.

    benchmarks/.venv/bin/python benchmarks/bench_iteration.py --data mine.jsonl

Then, for qspin alone, how its time grows with rows and with the completions' length. The last line is the peers' time
over ours.
"""

from __future__ import annotations

from contestants import Job, iterate_peers, iterate_qspin, make_config, results_name
from harness import alternate, arguments, finish, in_fresh_process, median, say

ROWS = (64, 128, 256)  # of up to 32 tokens
CAPS = (32, 64, 128)  # with 64 rows


def main() -> None:
    parser = arguments(__doc__ or "", rows=64)
    parser.add_argument("--batch-size", type=int, default=8, help="effective batch, in pairs (default 8)")
    options = parser.parse_args()

    def job(rows: int, cap: int) -> Job:
        return Job(make_config(options.data, rows=rows, cap=cap, batch_size=options.batch_size))

    results = alternate(
        {"qspin": iterate_qspin, "HF generate + TRL": iterate_peers}, job(options.rows, options.cap), options.repeats
    )
    ratio = median(results["HF generate + TRL"]) / median(results["qspin"])
    growth = {}
    for rows, cap in dict.fromkeys([*((rows, 32) for rows in ROWS), *((64, cap) for cap in CAPS)]):
        growth[f"qspin's seconds, {rows} rows of up to {cap} tokens"] = in_fresh_process(
            iterate_qspin, job(rows, cap)
        ).seconds
        say(f"{rows} rows of up to {cap} tokens: {list(growth.values())[-1]:.1f} s")
    finish(
        results_name("iteration"),
        results,
        ratio=ratio,
        meaning=f"time of HF generate + TRL over qspin's, medians of {options.repeats}",
        derived=growth,
        options=options,
    )


if __name__ == "__main__":
    main()
