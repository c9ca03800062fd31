"""The harness's tasks, put to a run's players.

tasks = Tasks.find(["gsm8k"], include=None)
task = tasks.load("gsm8k", shots=5)
outcome = task.put_to(loaded, SetUp("gsm8k", shots=5), on_documents=print)
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
import os
import random
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import httpx
import huggingface_hub
import jinja2
import lm_eval
import numpy as np
import torch
import yaml
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from qspin.errors import QspinError, one_line
from qspin.figures.benchmarks import Outcome, Score, SetUp
from qspin.files import sha256_of
from qspin.stopping import clock
from qspin.trials.harness import Player
from qspin.trials.loaded import Loaded

BOOTSTRAPS = 1000  # for standard errors that have no formula
OF_A_DEFINITION = {".yaml", ".yml", ".py", ".jinja", ".j2", ".md"}
OF_DATA = {".json", ".jsonl", ".csv", ".tsv", ".txt", ".xml", ".parquet", ".arrow"}  # that datasets reads
OF_DATA |= {".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar"}  # and what it unpacks

os.environ.setdefault("DISABLE_MULTIPROC", "1")  # else bootstraps fork this process, model and all

# what a data set that can't be had raises, and what a task that is not well defined does
_OF_DATA = (OSError, datasets.exceptions.DatasetsError, httpx.HTTPError)
_OF_DEFINITION = (
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    yaml.YAMLError,
    jinja2.TemplateError,
    ImportError,
    RuntimeError,
)
# what code of a task's own may raise beside these
_OF_CODE = (*_OF_DEFINITION, ArithmeticError, OSError)


@dataclass(frozen=True, slots=True)
class Tasks:
    """Where tasks are defined: the harness's own, and those of a folder."""

    manager: TaskManager
    defined: str | None  # hash of the folder's definitions
    own: frozenset[str]  # names that the folder defines

    @staticmethod
    def find(names: Sequence[str], include: Path | None) -> Tasks:
        """Raises a QspinError: a task is known to neither, or the folder is none."""
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        if include is not None and not include.is_dir():
            raise QspinError(f"--include: {include} is no folder")
        try:
            folder = TaskManager(include_path=include, include_defaults=False)
            # reading all of the harness's definitions takes its time
            alone = include is not None and set(names) <= set(folder.all_subtasks)
            manager = folder if alone else TaskManager(include_path=include)
        except _OF_DEFINITION as error:
            raise QspinError(f"--include: {include}: a task's definition can't be read: {one_line(error)}") from None
        for name in names:
            if name not in manager.task_index:
                near = difflib.get_close_matches(name, manager.all_tasks)
                advice = f"near it are {', '.join(near)}" if near else "`lm-eval ls tasks` lists all"
                own = f"; {include} defines {', '.join(folder.all_tasks) or 'none'}" if include else ""
                raise QspinError(f"--tasks: no task is called {name!r}; {advice}{own}")
        if not alone:
            _heed_the_connection()
        defined = None if include is None else _hash(include)
        return Tasks(manager, defined, frozenset(folder.all_tasks))

    def load(self, name: str, shots: int | None) -> Task:
        """A task with its documents, or several, if it is a group's or a tag's name.

        Raises:
            QspinError: its data can't be had, or it asks for what is not done here.
        """
        try:
            found = self.manager.load([name])
            for part in found["tasks"].values():
                _set_shots(part, shots)
        except _OF_DATA as error:
            raise QspinError(
                f"{name}: its data can't be had ({one_line(error)}); they come from the Hugging Face Hub when first "
                "used, so connect this machine, or name a task on files of yours with --include"
            ) from None
        except _OF_DEFINITION as error:
            raise _not_set_up(name, error) from None
        for part in found["tasks"].values():
            if getattr(part, "MULTIMODAL", False):
                raise QspinError(f"{part.task_name}: asks about images or sound; the models here read text")
            if getattr(part, "UNSAFE_CODE", False):
                raise QspinError(f"{part.task_name}: runs programs that the model wrote, which qspin never does")
        return Task(name, found)

    def definition(self, name: str) -> str | None:
        """Changes when the task may have become another; None: the harness's own."""
        return self.defined if name in self.own else None


@dataclass(frozen=True, slots=True)
class Task:
    """A task that has been loaded, to be put to any number of players."""

    name: str
    found: dict[str, Any]  # what TaskManager.load returned

    def documents(self, limit: int | None) -> int:
        """How many there are of all its parts."""
        sizes = [len(part.eval_docs) for part in self.found["tasks"].values()]
        return sum(size if limit is None else min(limit, size) for size in sizes)

    def put_to(self, loaded: Loaded, set_up: SetUp, on_documents: Callable[[float], None]) -> Outcome:
        """Whoever is in the slot; `on_documents` hears of documents done, or parts of one.

        Raises:
            QspinError: the task asks for what can't be done, or memory does not hold it.
        """
        started = clock()
        parts = self.found["tasks"]
        documents = self.documents(set_up.limit)

        def on_requests(count: float) -> None:
            requests = sum(request.repeats for part in parts.values() for request in part.instances)
            on_documents(count * documents / requests)

        random.seed(DEFAULT_RANDOM_SEED)  # as the harness does, and anew for each player
        np.random.seed(DEFAULT_OTHER_SEED)
        torch.manual_seed(DEFAULT_OTHER_SEED)
        for part in parts.values():
            part.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)  # every player is shown the same examples
        try:
            results = evaluate(
                lm=Player(loaded, on_requests),
                task_dict=self.found,
                limit=set_up.limit,
                bootstrap_iters=BOOTSTRAPS,
                apply_chat_template=set_up.chat,
                fewshot_as_multiturn=set_up.chat,
            )
        except _OF_CODE as error:
            if isinstance(error, torch.OutOfMemoryError) or _in_player(error):
                raise
            raise QspinError(
                f"{self.name}: a document does not fit the task's templates or code: {one_line(repr(error))}"
            ) from None
        scores = _scores(self.name, results)
        return Outcome(set_up, scores, lm_eval.__version__, clock() - started)


def _heed_the_connection() -> None:
    """Where the hub can't be reached as the work begins, its clients go by their caches at once: they would ask six
    times for each data set, with pauses, and tell of each. Later they may: a connection that was there comes back."""
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=10)
    except httpx.TransportError:
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def _not_set_up(name: str, error: Exception) -> QspinError:
    """One line for a task that raised this while it was loaded."""
    if isinstance(error, ModuleNotFoundError) and error.name:
        package = error.name.partition(".")[0]
        return QspinError(f"{name}: needs the Python package {package}, which is not installed: pip install {package}")
    if "scripts are no longer supported" in str(error):
        return QspinError(
            f"{name}: its data come with a loader script, and programs of strangers are not run; name a task whose "
            f"data are stored as files ({one_line(error)})"
        )
    return QspinError(f"{name}: the task can't be set up: {one_line(error)}")


def _in_player(error: Exception) -> bool:
    """Whether it was raised by what answers, and not by the task."""
    return any(
        frame.f_globals.get("__name__") == Player.__module__ for frame, _ in traceback.walk_tb(error.__traceback__)
    )


def _set_shots(part: Any, shots: int | None) -> None:
    """As the harness does: a task that says 0 keeps to it."""
    own = part.get_config("num_fewshot")
    wanted = own if own == 0 or shots is None else shots
    part.set_config("num_fewshot", wanted or 0)
    if wanted:
        # one more where they come from the documents that are asked: that one is left out
        most = len(list(part.fewshot_docs() or ())) - (part.fewshot_cfg.split == part.config.test_split)
        if wanted > most:
            raise QspinError(f"{part.task_name}: {wanted} shots are asked for, and it has {most} examples")


def _scores(name: str, results: Mapping[str, Any]) -> list[Score]:
    """Of a task, or a group with figures of its own, these; else those of all its parts."""
    parts = results["samples"]
    shown = [name] if _figures(results["results"].get(name, {})) else list(parts)
    scores = []
    for task in shown:
        samples = parts[task] if task in parts else [sample for part in parts.values() for sample in part]
        for (metric, key), (value, error) in _figures(results["results"][task]).items():
            values = [sample[metric] for sample in samples if sample["filter"] == key and metric in sample]
            scores.append(
                Score(
                    task=task,
                    metric=metric if key == "none" else f"{metric}, {key}",
                    value=value,
                    error=error,
                    shots=_shots([task] if task in results["n-shot"] else parts, results),
                    documents=len(values),
                    values=[float(value) for value in values] if _is_mean(value, values) else None,
                )
            )
    return scores


def _figures(found: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float, float | None]]:
    """(metric, filter) → its value and standard error, from keys as `acc,none` and `acc_stderr,none`."""
    figures = {}
    for name, value in found.items():
        metric, comma, key = name.partition(",")
        if comma and not metric.endswith("_stderr"):
            error = found.get(f"{metric}_stderr,{key}")
            figures[metric, key] = float(value), float(error) if isinstance(error, float) else None
    return figures


def _shots(tasks: Iterable[str], results: Mapping[str, Any]) -> int:
    """The most of them, if they differ."""
    return max(int(results["n-shot"][task]) for task in tasks)


def _is_mean(value: float, values: Sequence[Any]) -> bool:
    numbers = all(isinstance(each, int | float | np.number) for each in values)
    return numbers and bool(values) and math.isclose(value, math.fsum(values) / len(values), abs_tol=1e-9)


def _hash(folder: Path) -> str:
    """Over what defines tasks in a folder, and data beside it."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in OF_A_DEFINITION | OF_DATA and path.is_file())
    told = "".join(f"{path.relative_to(folder)} {sha256_of(path)}\n" for path in files)
    return hashlib.sha256(told.encode()).hexdigest()
