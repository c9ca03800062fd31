"""What `--dry-run` shows: the settings in force, an example's tokens, and what each iteration would do."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from qspin.chat import PieceKind
from qspin.config import RunConfig, at_iteration, dump_config
from qspin.console import tell
from qspin.prepare import Prepared
from qspin.safe_text import breaks_shown

PIECE_STYLES: dict[PieceKind, tuple[str, str]] = {  # two shades, so that neighbouring tokens can be told apart
    "prompt": ("black on bright_white", "black on white"),
    "completion": ("black on bright_green", "black on green"),
    "end-of-turn": ("bold white on red", "bold white on red"),
}


def show_dry_run(prepared: Prepared) -> None:
    console = Console()
    tell(console, dump_config(prepared.config))
    example = prepared.train[0]
    tell(console, f"Example {example.record_id}: prompt, completion, end-of-turn", style="bold")
    console.print(example_text(prepared.renderer.pieces(example)))
    console.print()
    for note in prepared.notes:
        tell(console, f"note: {note}")
    tell(console, prepared.counts)
    for line in _work(prepared.config, len(prepared.train)):
        console.print(line, markup=False)


def example_text(pieces: Iterable[tuple[PieceKind, str]]) -> Text:
    """A rendered example, each token in the colour of its role."""
    text = Text()
    for index, (kind, piece) in enumerate(pieces):
        # a newline is shown, and made: a background colour up to the edge would look like a token
        text.append(breaks_shown(piece), style=PIECE_STYLES[kind][index % 2])
        if "\n" in piece:
            text.append("\n")
    return text


def _work(config: RunConfig, rows: int) -> list[str]:
    """What each iteration will do, in numbers."""
    lines = []
    if config.sft.epochs:
        steps = -(-rows // config.train.batch_size) * config.sft.epochs
        lines.append(f"warm start: train {steps} steps of {config.train.batch_size} rows (lr {config.sft.lr:g})")
    for iteration in range(config.iterations):
        pairs = rows * len(config.train.learnt_from(iteration))
        steps = -(-pairs // config.train.batch_size) * config.train.epochs
        lines.append(
            f"iteration {iteration}: generate {rows} completions, score {pairs} pairs, train {steps} steps of "
            f"{config.train.batch_size} pairs (beta {at_iteration(config.train.beta, iteration):g}, "
            f"lr {at_iteration(config.train.lr, iteration):g})"
        )
    return lines
