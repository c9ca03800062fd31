"""Scoring and training: qspin against TRL's DPOTrainer, 2 epochs on the same pairs.

    benchmarks/.venv/bin/python benchmarks/bench_train.py --data mine.jsonl

The last line is TRL's time over ours, TRL with or without precompute_ref_log_probs, whichever is faster.
"""

from __future__ import annotations

from contestants import (
    Job,
    make_config,
    opponents_pairs,
    results_name,
    train_qspin,
    train_trl,
    train_trl_precompute,
)
from harness import alternate, arguments, finish, in_fresh_process, median, say


def main() -> None:
    parser = arguments(__doc__ or "", rows=16)
    parser.add_argument("--batch-size", type=int, default=8, help="effective batch, in pairs (default 8)")
    options = parser.parse_args()
    config = make_config(options.data, rows=options.rows, cap=options.cap, batch_size=options.batch_size)
    say(f"{options.rows} pairs from the base's own completions ...")
    pairs = in_fresh_process(opponents_pairs, config)
    results = alternate(
        {"qspin": train_qspin, "TRL": train_trl, "TRL, reference precomputed": train_trl_precompute},
        Job(config, pairs=pairs),
        options.repeats,
    )
    peer = min(("TRL", "TRL, reference precomputed"), key=lambda name: median(results[name]))
    ratio = median(results[peer]) / median(results["qspin"])
    memory = median(results[peer], "peak_above_model") / median(results["qspin"], "peak_above_model")
    finish(
        results_name("train"),
        results,
        ratio=ratio,
        meaning=f"time of {peer} over qspin's, medians of {options.repeats}",
        derived={"peak memory above the loaded model, TRL's over qspin's": memory},
        options=options,
    )


if __name__ == "__main__":
    main()
