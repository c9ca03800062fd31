"""Players of finished runs on more held-out rows than their runs had: what a small effect takes to be seen.

    benchmarks/.venv/bin/python benchmarks/bench_heldout.py --data more.jsonl runs/mine/iteration-1 \
      runs/mine/supervised/lr-0.0002/round-1

Each is compared with the base, which the runs must have in common, and those after the first with the first. Rows whose
prompts one of them was trained on are left out. All rows are reported, since nothing is chosen here, and the random
numbers are the same for every player.
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness import made_by, say

from qspin.adapters import load_own
from qspin.evaluate import evaluate
from qspin.exports.recipe import recorded_config
from qspin.figures.evaluation import Evaluation, change, panel, real_panel, two_samples
from qspin.fitting.footprint import EVALUATED_ROWS
from qspin.prepare import Prepared, prepare
from qspin.run_dir import RunDir
from qspin.trials.loaded import Loaded

FIGURES = {"nll": ".3f", "two_sample_auc": ".3f", "length_auc": ".3f", "f1": ".3f", "tokens": ".0f", "ended": ".2f"}
SEED = 0


def run_of(folder: Path) -> RunDir:
    return next(run for run in map(RunDir, folder.parents) if run.record.is_file())


def unseen(runs: Iterable[RunDir], data: str, rows: int) -> Prepared:
    """The first run's way to read the rows that none of the runs was trained on."""
    trained, found = set(), []
    for run_dir in runs:
        config = recorded_config(run_dir)
        update = {"data": config.data.model_copy(update={"heldout_source": data, "heldout_rows": rows})}
        found.append(prepare(config.model_copy(update=update), datetime.date.today()))
        trained |= {row.prompt_ids for row in found[-1].train}
    first = found[0]
    kept = tuple(row for row in first.heldout if row.prompt_ids not in trained)
    return replace(first, heldout=kept)


def measure(loaded: Loaded, prepared: Prepared) -> Evaluation:
    """Whoever is in the slot."""
    evaluation = evaluate(
        loaded.model,
        prepared.renderer,
        prepared.heldout,
        prepared.config.model_copy(update={"seed": SEED}),
        opponent=None,
        stop_ids=prepared.stop_ids,
        width=EVALUATED_ROWS,
        on_rows=lambda _rows: None,
    )
    reported = [True] * len(prepared.heldout)
    lengths = [
        [len(row.real_ids[: prepared.config.generation.max_new_tokens]) for row in prepared.heldout],
        [len(ids) for ids in evaluation.generated_ids],
    ]
    texts = (evaluation.real_completions, evaluation.completions)
    scores = two_samples(texts, (lengths[0], lengths[1]), evaluation.prompts, reported)
    return replace(evaluation, reported=reported, **scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, help="of iterations, or of rounds of supervised training")
    parser.add_argument("--data", required=True, help="held-out rows")
    parser.add_argument("--rows", type=int, default=640, help="at most so many (default 640)")
    parser.add_argument("--out", type=Path, help="a file for the results")
    options = parser.parse_args()
    runs = {run_of(folder).path: run_of(folder) for folder in options.folders}
    prepared = unseen(runs.values(), options.data, options.rows)
    loaded = Loaded.open(next(iter(runs.values())), "base")
    base = measure(loaded, prepared)
    content: dict[str, Any] = {"rows": len(prepared.heldout), "real": real_panel(base, "report", seed=SEED)}
    content["players"] = {}
    others: dict[str, Evaluation] = {}  # the base and the first player: whom those after them are compared with
    for folder in (None, *options.folders):
        if folder is not None:
            loaded.model.set_adapter(load_own(folder / "adapter"))
        player = base if folder is None else measure(loaded, prepared)
        name = "base" if folder is None else folder.relative_to(run_of(folder).path.parents[1]).as_posix()
        figures = panel(player, "report", seed=SEED)
        changes = {
            other: {key: change(before, player, key, "report", seed=SEED) for key in FIGURES}
            for other, before in others.items()
        }
        content["players"][name] = {"figures": {key: figures[key] for key in FIGURES}, "changes": changes}
        say(f"{name}: " + ", ".join(f"{key} {figures[key].told(spec)}" for key, spec in FIGURES.items()))
        for other, found in changes.items():
            say(f"  from {other}: " + ", ".join(f"{key} {figure.told('+.3f')}" for key, figure in found.items()))
        if len(others) < 2:
            others[name] = player
        if options.out:
            options.out.write_text(json.dumps(made_by() | content, indent=2) + "\n")


if __name__ == "__main__":
    main()
