"""Imports point one way, and heavy libraries stay in their rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "qspin"

LAYERS = [  # each may import what stands above it
    {"errors", "targets", "nf4_levels"},
    {"safe_text", "config_files", "main_memory", "nf4_product"},
    {"records", "config", "loss", "sampling", "progress", "stopping", "markdown", "panel", "kernels", "flash"},
    {"files", "sources", "presets", "shape", "judge", "suites"},
    {"formats", "footprint", "judging", "mtbench_result"},
    {"data", "chat", "run_dir", "memory", "at_once", "unsloth_kernels", "plots"},
    {
        "adapters",
        "recipe",
        "attention",
        "backends",
        "lora",
        "base",
        "meter",
        "merge",
        "ollama",
        "evaluation",
        "benchmarks",
        "workers",
    },
    {"fused", "status", "gguf_file", "players"},
    {"refit"},
    {"model", "packing", "kv_cache"},
    {"decoding", "scoring", "reading", "machine"},
    {"generation"},
    {"dealing"},
    {"optimisation", "evaluate", "prepare", "budget"},
    {"training", "warm_start"},
    {"verdict"},
    {"report", "record", "plan_rows", "damage", "room"},
    {"game", "loaded", "helping"},
    {"answering", "learning", "measuring", "talk", "harness", "mtbench_answers"},
    {"spin", "baseline", "view", "track", "card", "compare", "plan", "tasks", "mtbench"},
    {"finding", "export", "plan_change", "sweep", "page"},
    {"console", "doctor_device", "plan_view"},
    {"push", "watching", "doctor", "talk_view", "trials"},
    {"api"},
    {"cli_results", "cli_trials"},
    {"cli"},
    {"__main__"},
]
HEAVY = {
    "transformers": {"base", "model", "refit", "compare", "export"},
    "peft": {"model", "refit"},
    "bitsandbytes": {"kernels", "nf4_levels", "lora", "optimisation", "doctor_device", "merge"},
    "triton": {"nf4_product"},
    "unsloth": {"unsloth_kernels"},
    "gguf": {"gguf_file"},
    "lm_eval": {"harness", "tasks"},
}


def imports(module: Path) -> set[str]:
    """Modules of ours and top-level names of others that a module imports, lazily or not, types aside."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "qspin":
            found |= {f"qspin.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module if node.module.startswith("qspin.") else node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
    return found


def test_every_module_has_its_layer() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set().union(*LAYERS)


def test_imports_point_one_way() -> None:
    level = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    wrong = [
        f"{name} imports {other}"
        for name in level
        for other in (found.removeprefix("qspin.") for found in imports(PACKAGE / f"{name}.py") if "qspin." in found)
        if other in level and level[other] >= level[name]
    ]
    assert wrong == []


def test_heavy_libraries_stay_in_their_rooms() -> None:
    for library, rooms in HEAVY.items():
        assert {path.stem for path in PACKAGE.glob("*.py") if library in imports(path)} == rooms, library


def test_what_says_that_it_is_free_of_torch_imports_none() -> None:
    docstrings = {path.stem: ast.get_docstring(ast.parse(path.read_text("utf-8"))) for path in PACKAGE.glob("*.py")}
    modules = [f"qspin.{name}" for name, text in docstrings.items() if "free of torch" in (text or "").lower()]
    assert len(modules) > 5
    script = f"import sys, {', '.join(modules)}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False True\n"  # numpy shows that what is imported is seen
