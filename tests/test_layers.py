"""Imports point one way, and heavy libraries stay in their rooms."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "qspin"
MODULES = {path.stem: path for path in PACKAGE.rglob("*.py") if path.stem != "__init__"}

LAYERS = [  # each may import what stands above it
    {"errors", "targets", "units", "nf4_levels", "holder"},
    {"safe_text", "config_errors", "config_files", "main_memory", "nf4_product"},
    {"records", "config", "loss", "sampling", "progress", "stopping", "markdown", "panel", "kernels", "flash"},
    {"files", "sources", "presets", "shape", "judge", "suites", "chat_template"},
    {"formats", "footprint", "judging", "mtbench_result"},
    {"data", "chat", "run_dir", "safetensors_file", "memory", "work", "unsloth_kernels", "plots"},
    {
        "adapters",
        "at_once",
        "recipe",
        "attention",
        "backends",
        "lora",
        "base",
        "meter",
        "merge",
        "gguf_vocabulary",
        "ollama",
        "evaluation",
        "benchmarks",
        "workers",
    },
    {"fused", "head", "status", "gguf_file", "players", "four_bits"},
    {"refit"},
    {"probe", "packing", "kv_cache"},
    {"model"},
    {"decoding", "scoring", "reading", "machine", "names"},
    {"generation"},
    {"dealing"},
    {"optimisation", "evaluate", "prepare", "budget"},
    {"training", "warm_start"},
    {"verdict"},
    {"report", "record", "plan_rows", "damage", "room"},
    {"game", "loaded", "helping"},
    {"answering", "learning", "measuring", "talk", "harness", "mtbench_answers"},
    {"spin", "baseline", "lines", "terminal", "track", "card", "compare", "plan", "tasks", "mtbench"},
    {"finding", "view", "export", "plan_change", "sweep", "page"},
    {"console", "doctor_device", "plan_view"},
    {"push", "dry_run", "watching", "doctor", "talk_view", "putting"},
    {"api"},
    {"cli_results", "cli_trials"},
    {"cli"},
    {"__main__"},
]
HEAVY = {
    "transformers": {"base", "four_bits", "model", "refit", "names", "compare", "export"},
    "peft": {"model", "refit"},
    "bitsandbytes": {"kernels", "nf4_levels", "lora", "optimisation", "doctor_device", "merge"},
    "triton": {"nf4_product"},
    "unsloth": {"unsloth_kernels"},
    "gguf": {"gguf_file", "gguf_vocabulary"},
    "lm_eval": {"harness", "tasks"},
}


def imports(module: Path) -> set[str]:
    """Modules of ours, by their last names, and others by their first, that a module imports, lazily or not."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, *path = node.module.split(".")
            inside = {alias.name for alias in node.names} & MODULES.keys()  # `from qspin.layers import flash`
            found |= (inside or set(path[-1:])) if package == "qspin" else {package}
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
    return found


def room(module: str) -> str:
    """The folder that a module is in; one beside the folders is a room of its own."""
    folder = MODULES[module].parent
    return module if folder == PACKAGE else folder.name


def test_every_module_has_its_layer() -> None:
    assert MODULES.keys() == set().union(*LAYERS)
    assert len(MODULES) == len(list(PACKAGE.rglob("*.py"))) - len(list(PACKAGE.rglob("__init__.py")))  # no name twice


def test_imports_point_one_way() -> None:
    level = {name: index for index, layer in enumerate(LAYERS) for name in layer}
    wrong = [
        f"{name} imports {other}"
        for name, path in MODULES.items()
        for other in imports(path) & MODULES.keys()
        if level[other] >= level[name]
    ]
    assert wrong == []


def test_rooms_import_one_another_one_way() -> None:
    needs: dict[str, set[str]] = {room(name): set() for name in MODULES}
    for name, path in MODULES.items():
        needs[room(name)] |= {room(other) for other in imports(path) & MODULES.keys()} - {room(name)}
    assert len(list(TopologicalSorter(needs).static_order())) == len(needs)  # a circle raises CycleError


def test_heavy_libraries_stay_in_their_rooms() -> None:
    for library, rooms in HEAVY.items():
        assert {name for name, path in MODULES.items() if library in imports(path)} == rooms, library


def test_what_says_that_it_is_free_of_torch_imports_none() -> None:
    free = []
    for path in PACKAGE.rglob("*.py"):
        if "free of torch" in (ast.get_docstring(ast.parse(path.read_text("utf-8"))) or "").lower():
            free += path.parent.glob("*.py") if path.stem == "__init__" else [path]
    assert len(free) > 5
    modules = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in free]
    script = f"import sys, {', '.join(modules)}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout == "False True\n"  # numpy shows that what is imported is seen
