"""lm-eval's tasks, its own and those of a folder: found, set up, put to a player, and scored."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from own_tasks import CHOICES, WORDS, write_tasks

from qspin.errors import QspinError
from qspin.figures.benchmarks import Score, SetUp
from qspin.figures.suites import SUITES
from qspin.run_dir import RunDir
from qspin.trials import harness
from qspin.trials import tasks as tasks_module
from qspin.trials.loaded import Loaded


@pytest.fixture(scope="module")
def loaded(exact: RunDir) -> Loaded:
    return Loaded.open(exact, "base")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def test_names_of_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own tasks are found, the near ones of one that is not there, and their data without a hub is a line."""
    monkeypatch.setattr(tasks_module, "TaskManager", functools.cache(tasks_module.TaskManager))  # it reads for seconds
    found = tasks_module.Tasks.find([task for suite in SUITES.values() for task in suite], None)
    assert found.definition("gsm8k") is None
    with pytest.raises(QspinError, match=r"no task is called 'arc_chalenge'; near it are .*arc_challenge"):
        tasks_module.Tasks.find(["arc_chalenge"], None)
    with pytest.raises(QspinError, match=r"gsm8k: its data can't be had \(.*Hugging Face Hub"):
        found.load("gsm8k", 5)


def test_every_player_is_shown_the_same_examples(loaded: Loaded, tasks: Path) -> None:
    task = tasks_module.Tasks.find([WORDS], tasks).load(WORDS, None)
    prompts = []
    for _ in range(2):
        task.put_to(loaded, SetUp(WORDS, limit=3), lambda _count: None)
        prompts.append([request.args[0] for request in task.found["tasks"][WORDS].instances])
    assert prompts[0] == prompts[1]
    assert len({prompt.rpartition("What is")[0] for prompt in prompts[0]}) > 1, "the examples are drawn"
    task.put_to(loaded, SetUp(WORDS, limit=1, chat=True), lambda _count: None)
    [request] = task.found["tasks"][WORDS].instances
    assert request.args[0].count("<|im_start|>user\nWhat is") == 3, "examples are turns"
    assert request.args[0].endswith("?<|im_end|>\n<|im_start|>assistant\n")


def test_a_groups_figures_are_its_own_and_a_tags_are_its_tasks(loaded: Loaded, tasks: Path, tmp_path: Path) -> None:
    definition = yaml.safe_load((tasks / f"{CHOICES}.yaml").read_text())
    other = {**definition, "task": "other", "doc_to_target": 1, "tag": "both"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**definition, "tag": "both"}))
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    for name, by_size in (("pooled", True), ("apart", False)):
        group = {"group": name, "task": [CHOICES, "other"]}
        group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": by_size}]
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(group))
    found = tasks_module.Tasks(
        tasks_module.TaskManager(include_path=tmp_path, include_defaults=False), None, frozenset()
    )

    def scores(name: str) -> list[Score]:
        task = found.load(name, 2)
        assert task.documents(5) == 10
        heard: list[float] = []
        outcome = task.put_to(loaded, SetUp(name, 2, 5), heard.append)
        assert sum(heard) == pytest.approx(10)
        return outcome.scores

    parts = {(score.task, score.metric): score for score in scores("both")}
    assert parts.keys() == {(task, metric) for task in (CHOICES, "other") for metric in ("acc", "acc_norm")}
    own, others = parts[CHOICES, "acc"], parts["other", "acc"]
    [pooled] = scores("pooled")
    assert (pooled.task, pooled.metric, pooled.shots, pooled.documents) == ("pooled", "acc", 2, 10)
    assert own.values is not None
    assert others.values is not None
    assert pooled.values == own.values + others.values
    assert pooled.value == pytest.approx((own.value + others.value) / 2)
    assert pooled.error is not None
    [apart] = scores("apart")
    assert apart.value == pytest.approx(pooled.value)


# --- code of a task's own ---

DEFINED = """task: {name}
dataset_path: {data}
{rows}output_type: multiple_choice
test_split: test
doc_to_text: {text}
doc_to_choice: [x, y]
doc_to_target: 0
{more}"""

RESULTS = {
    "lookup": "KeyError('answer')",
    "share": "ZeroDivisionError('division by zero')",
    "product": "RuntimeError('inconsistent tensor size",
    "memory": "",
}


@pytest.fixture
def own_code(tmp_path: Path) -> Path:
    """A folder with tasks that need code of theirs, which does not work."""
    (tmp_path / "rows.jsonl").write_text('{"q": "Why?"}\n{"q": "How?"}\n')
    (tmp_path / "loader.py").write_text("import datasets\n\n\nclass Rows(datasets.GeneratorBasedBuilder):\n    pass\n")
    (tmp_path / "early.py").write_text("import nosuchpackage.part\n\n\ndef text(doc):\n    return doc['q']\n")
    (tmp_path / "late.py").write_text("def text(doc):\n    import nosuchpackage\n")
    (tmp_path / "told.py").write_text("raise ModuleNotFoundError('that is had with pip install some[extra]')\n")
    (tmp_path / "results.py").write_text(
        "import torch\n\n\ndef lookup(doc, results):\n    return {'acc': doc['answer']}\n\n\n"
        "def share(doc, results):\n    return {'acc': 1 / 0}\n\n\n"
        "def product(doc, results):\n    return {'acc': torch.ones(2) @ torch.ones(3)}\n\n\n"
        "def memory(doc, results):\n    raise torch.OutOfMemoryError('CUDA out of memory')\n"
    )
    rows = f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
    task = {"data": "json", "rows": rows, "text": "'{{q}}'", "more": ""}
    for name, difference in {
        "scripted": {"data": str(tmp_path / "loader.py"), "rows": ""},
        "early": {"text": "!function early.text"},
        "late": {"text": "!function late.text"},
        "told": {"text": "!function told.text"},
        **{name: {"more": f"process_results: !function results.{name}\n"} for name in RESULTS},
    }.items():
        (tmp_path / f"{name}.yaml").write_text(DEFINED.format(name=name, **task | difference))
    return tmp_path


def test_a_task_whose_package_or_data_are_not_to_be_had_here(own_code: Path) -> None:
    missing = "needs the Python package nosuchpackage, which is not installed: pip install nosuchpackage"
    for name, said in {
        "early": f"early: {missing}",
        "late": f"late: {missing}",
        "told": "told: the task can't be set up: that is had with pip install some[extra]",
        "scripted": "scripted: its data come with a loader script, and programs of strangers are not run; name a task",
    }.items():
        found = tasks_module.Tasks.find([name], own_code)
        with pytest.raises(QspinError) as caught:
            found.load(name, None)
        assert str(caught.value).startswith(said)
        assert "\n" not in str(caught.value)


def test_a_tasks_own_code_that_fails_is_told_and_other_failures_are_not_its(
    loaded: Loaded, own_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(name: str) -> None:
        tasks_module.Tasks.find([name], own_code).load(name, None).put_to(loaded, SetUp(name), lambda _count: None)

    for name, said in RESULTS.items():
        with pytest.raises(QspinError if said else torch.OutOfMemoryError) as caught:
            put(name)
        if said:
            fit = "a document does not fit the task's templates or code"
            assert str(caught.value).startswith(f"{name}: {fit}: {said}")

    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("of the reader")

    monkeypatch.setattr(harness, "read", broken)
    with pytest.raises(ValueError, match="of the reader"):
        put("lookup")
