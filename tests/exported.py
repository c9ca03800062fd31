"""An export as tests make it: whole, and with all that its check is to tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qspin.exports.compare import CHECK, Trained
from qspin.exports.export import export
from qspin.files import check_folder, read_json
from qspin.run_dir import RunDir

KEYS = {
    "to", "iteration", "adapter", "base", "onto", "dtype", "rows", "nll_trained", "nll_exported", "nll_difference",
    "top1_agreement", "completions", "trained_in",
}  # fmt: skip


def made(run: RunDir | Trained, out: Path, to: str, iteration: int = 1, **options: Any) -> dict[str, Any]:
    trained = Trained(run, iteration) if isinstance(run, RunDir) else run
    assert export(trained, to=to, out=out, **options) == out
    check_folder(out)
    found = read_json(out / CHECK)
    assert found.keys() == KEYS
    return found
