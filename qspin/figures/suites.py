"""Tasks of EleutherAI's harness that are put up together, and the figure of each that is shown."""

from __future__ import annotations

import re
from typing import Literal

from qspin.errors import QspinError

SuiteName = Literal["open-llm-v1", "spin-paper"]

OPEN_LLM_V1 = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5, "gsm8k": 5}
SUITES: dict[SuiteName, dict[str, int]] = {  # task → shots
    "open-llm-v1": OPEN_LLM_V1,
    "spin-paper": OPEN_LLM_V1  # and table 6 of arXiv 2401.01335: "standard few-shot CoT", so Big-Bench Hard's own three
    | {f"bbh_cot_fewshot_{task}": 3 for task in ("causal_judgement", "formal_fallacies", "sports_understanding")}
    | {"openbookqa": 1},
}
METRICS = {  # the one that a leaderboard or the paper shows, of tasks that have several
    "arc_challenge": "acc_norm",
    "hellaswag": "acc_norm",
    "openbookqa": "acc_norm",
    "gsm8k": "exact_match, strict-match",
}


def check_task(name: str) -> str:
    """Raises a QspinError: a name that is no task's, and could not be a file's."""
    if not re.fullmatch(r"[\w+.-]+", name):
        raise QspinError(f"--tasks: {name!r} is no task's name; name tasks with commas between, as arc_challenge,gsm8k")
    return name
