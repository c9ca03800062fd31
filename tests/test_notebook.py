"""The notebook runs as it is, in a real kernel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "selfplay.ipynb"
# what makes it a matter of seconds
SMALL = {"data.limit": 7, "data.heldout_rows": 4, "generation.max_new_tokens": 8, "iterations": 1}


def tagged(cell: Any, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    [parameters] = [cell for cell in notebook.cells if tagged(cell, "parameters")]
    parameters.source += f"\nSETTINGS |= {SMALL}"
    notebook.cells = [cell for cell in notebook.cells if not tagged(cell, "install")]
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert "fits: True" in printed
    assert "kept: iteration 0" in printed
    assert "--- base" in printed and "--- 0" in printed
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
    assert (tmp_path / "runs" / "notebook-merged" / "model.safetensors").is_file()


def test_it_is_kept_without_outputs() -> None:
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs") and not cell.get("execution_count")
