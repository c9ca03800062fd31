"""README's table of what an iteration costs, as `qspin plan` has it: python tools/costs.py"""

from __future__ import annotations

from qspin import api
from qspin.config import load_config

CARDS = (8, 12, 16, 24)
MODELS = ("smollm2-1.7b-instruct", "mistral-7b-instruct", "qwen3-8b", "gemma-2-9b-it")
SETTINGS = {
    "data.limit": 1000,
    "data.max_prompt_tokens": 512,
    "data.max_completion_tokens": 256,
    "generation.max_new_tokens": 256,
}


def table() -> str:
    """Markdown: a row a model, a column a card; the hours of the first iteration, or that it does not fit."""
    lines = [
        "| preset | " + " | ".join(f"{card} GB" for card in CARDS) + " |",
        "| --- |" + " --- |" * len(CARDS),
    ]
    for model in MODELS:
        plans = [api.plan(load_config(model, SETTINGS), vram=card, read_rows=False) for card in CARDS]
        cells = [f"{sum(time.first for time in plan.times) / 3600:.1f} h" if plan.fits else "no" for plan in plans]
        lines.append(f"| `{model}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
