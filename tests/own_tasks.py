"""Tasks of one's own for lm-eval: one of each kind, on rows that a run of `small_run`'s sums was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

CHOICES, WORDS, SURPRISE = "own_choices", "own_words", "own_surprise"


def write_tasks(folder: Path) -> Path:
    """Write their definitions into a folder, and the rows; returns it."""
    rows = [{"question": f"What is {n}?", "choices": [f"It is {n * k}, I say." for k in (7, 5, 3)]} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{question}}",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    for name, task in {
        CHOICES: {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        WORDS: {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match", **mean}],
            "num_fewshot": 2,
        },
        SURPRISE: {
            "output_type": "loglikelihood",
            "doc_to_target": "{{choices[0]}}",
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
        },
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **task}))
    return folder
