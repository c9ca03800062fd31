"""The committed results as the Markdown table that README.md and docs/performance.md show.

python benchmarks/table.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def table() -> str:
    train, generate = _read("train"), _read("generate")
    rows = [
        ("", "qspin", "peer", "ratio"),
        ("---", "---", "---", "---"),
        *(
            _row("score and train, seconds a pair", train, peer, "seconds_a_pair")
            for peer in ("TRL", "TRL, reference precomputed")
        ),
        *(
            (
                "peak memory above the loaded model",
                _mebibytes(train, "qspin"),
                f"{peer}: {_mebibytes(train, peer)}",
                _ratio(train["medians"][peer]["peak_above_model"] / train["medians"]["qspin"]["peak_above_model"]),
            )
            for peer in ("TRL", "TRL, reference precomputed")
        ),
        *(
            _row("generate, tokens a second", generate, peer, "tokens_a_second", more_is_better=True)
            for peer in ("HF, official settings", "HF, batched by length", "HF, continuous batching")
        ),
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def _read(name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / f"{name}-cpu.json").read_text())
    return content


def _row(
    what: str, result: dict[str, Any], peer: str, figure: str, *, more_is_better: bool = False
) -> tuple[str, str, str, str]:
    ours, theirs = result["medians"]["qspin"][figure], result["medians"][peer][figure]
    return what, f"{ours:.3g}", f"{peer}: {theirs:.3g}", _ratio(ours / theirs if more_is_better else theirs / ours)


def _mebibytes(result: dict[str, Any], contestant: str) -> str:
    return f"{result['medians'][contestant]['peak_above_model'] / 2**20:.0f} MiB"


def _ratio(value: float) -> str:
    return f"**{value:.2f}×**"


if __name__ == "__main__":
    print(table())
