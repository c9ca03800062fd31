"""EleutherAI's lm-evaluation-harness on a run's players: it asks, whoever is in the slot answers.

    tasks = Tasks.find(["gsm8k"], include=None)
    task = tasks.load("gsm8k", shots=5)
    outcome = task.put_to(loaded, SetUp("gsm8k", shots=5), on_documents=print)

Scores are those of the harness's own `HFLM` on the same weights; tests hold the two against each other. What a task's
requests have in common (examples, a question's choices) is computed once: reading.py.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import httpx
import jinja2
import lm_eval
import numpy as np
import torch
import yaml
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from qspin.benchmarks import Outcome, Score, SetUp
from qspin.budget import rows_at_once
from qspin.errors import QspinError, one_line
from qspin.files import sha256_of
from qspin.generation import Completion, Request, generate
from qspin.loaded import Loaded
from qspin.memory import ATTEMPTS, OutOfMemory, refusals_told
from qspin.reading import Passage, Reading, read
from qspin.records import Message
from qspin.sampling import noise_key
from qspin.stopping import check_stop

NEW_TOKENS = 256  # where a task sets no limit, as in HFLM
BOOTSTRAPS = 1000  # for standard errors that have no formula
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is set counts
OF_A_DEFINITION = {".yaml", ".py", ".json", ".jsonl"}

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
)


class Player(TemplateLM):  # type: ignore[misc]
    """Whoever is in the slot, as the harness's model."""

    def __init__(self, loaded: Loaded, on_requests: Callable[[float], None]) -> None:
        """`on_requests` hears of requests as they are done, and of parts of them."""
        super().__init__()
        self._loaded = loaded
        self._renderer = loaded.speech.renderer
        self._on_requests = on_requests
        self.max_length = loaded.speech.context

    # --- text ---

    @property
    def eot_token_id(self) -> int:
        return self._renderer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        return self._renderer.before_text

    @property
    def tokenizer_name(self) -> str:
        return self._loaded.speech.base.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self._renderer.plain_ids(string, begun=add_special_tokens is not False))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A system text goes where the template has room for it: `Renderer`. Without a generation prompt, the last
        message is the beginning of an answer."""
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        if add_generation_prompt:
            return self._renderer.prompt_text(messages)
        return self._renderer.prompt_text(messages[:-1]) + messages[-1].content

    # --- how likely ---

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        passages = [self._passage(context, continuation) for _, context, continuation in requests]
        return [(reading.logp, reading.greedy) for reading in self._read(passages, len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Each token once, after as much as the context holds of what stands before it."""
        passages, owners = [], []
        for index, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, continuation in map(utils.make_disjoint_window, windows):
                passages.append(self._passage(context, continuation))
                owners.append(index)
        sums = [0.0] * len(requests)
        for owner, reading in zip(owners, self._read(passages, len(requests)), strict=True):
            sums[owner] += reading.logp
        return sums

    def _read(self, passages: Sequence[Passage], requests: int) -> list[Reading]:
        def on_read(count: int) -> None:
            self._on_requests(count * requests / len(passages))
            check_stop()

        return read(self._loaded.model, passages, on_read=on_read)

    def _passage(self, context: list[int], continuation: list[int]) -> Passage:
        """A context too long loses its beginning. The last token is read by nobody."""
        if not 0 < len(continuation) <= self.max_length:
            raise QspinError(
                f"a text of the task whose likelihood is asked for has {len(continuation)} tokens; between 1 and the "
                f"{self.max_length} of the model's context are possible"
            )
        return Passage(tuple([*context, *continuation][-self.max_length - 1 : -1]), tuple(continuation))

    # --- what it says ---

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        by_settings: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_settings[json.dumps(request.args[1], sort_keys=True)].append(index)
        answers = [""] * len(requests)
        for text, members in by_settings.items():
            settings = Sampling.of(json.loads(text))
            room = self.max_length - settings.new_tokens
            if room < 1:
                raise QspinError(
                    f"the task asks for {settings.new_tokens} new tokens; the model's context is {self.max_length}"
                )
            prompts = [
                Request(tuple(self.tok_encode(requests[index].args[0])[-room:]), noise_key(0, 0, f"request {index}"))
                for index in members
            ]
            for index, completion in zip(members, self._generate(prompts, settings), strict=True):
                answers[index] = settings.cut(self._renderer.completion_text(completion.ids))
        return answers

    def _generate(self, requests: list[Request], settings: Sampling) -> list[Completion]:
        model, renderer = self._loaded.model, self._renderer
        width = rows_at_once(model, max(len(request.prompt_ids) for request in requests) + settings.new_tokens)
        alone = [renderer.plain_ids(term, begun=False) for term in settings.until]  # a control token's name has no text
        stops = {ids[0] for ids in alone if len(ids) == 1}
        done: dict[int, Completion] = {}

        def ends(ids: Sequence[int]) -> bool:
            return settings.ended(renderer.completion_text(ids[-settings.tail :]))

        for attempt in range(ATTEMPTS):
            left = [index for index in range(len(requests)) if index not in done]
            told = float(len(done))

            def on_done(index: int, completion: Completion, left: list[int] = left) -> None:
                done[left[index]] = completion

            def on_step(_tokens: int, rows: float) -> None:
                nonlocal told
                told += rows
                self._on_requests(rows)
                check_stop()

            try:
                with refusals_told():
                    generate(
                        model,
                        [requests[index] for index in left],
                        max_new_tokens=settings.new_tokens,
                        temperature=settings.temperature,
                        top_p=settings.top_p,
                        width=max(1, width >> attempt),
                        stop_ids=self._loaded.speech.stop_ids | {self.eot_token_id} | stops,
                        on_step=on_step,
                        on_done=on_done,
                        ends=ends,
                    )
            except OutOfMemory as error:
                refusal = error
                self._on_requests(len(done) - told)  # answers that are begun anew
            else:
                return [done[index] for index in range(len(requests))]
        raise QspinError(
            f"out of memory {ATTEMPTS} times in a row while answering ({refusal}); close other programs, or take a "
            "smaller model"
        )


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a task wants its answers."""

    new_tokens: int
    temperature: float  # 0: the likeliest token
    top_p: float
    until: tuple[str, ...]

    @staticmethod
    def of(asked: Mapping[str, Any]) -> Sampling:
        """Raises a QspinError: it wants something that is not known here."""
        length = next((int(asked[name]) for name in LENGTH_NAMES if asked.get(name) is not None), NEW_TOKENS)
        sample = asked.get("do_sample")
        temperature = float(asked.get("temperature", 1.0 if sample else 0.0))
        if sample is False:
            temperature = 0.0
        until = asked.get("until") or []
        known = {"do_sample", "temperature", "top_p", "until", *LENGTH_NAMES}
        inert = {"num_beams": 1, "top_k": asked.get("top_k") if temperature == 0 else None}
        strange = {name: value for name, value in asked.items() if name not in known and value != inert.get(name)}
        if strange:
            raise QspinError(f"the task's generation_kwargs want what qspin does not do: {one_line(strange)}")
        terms = [until] if isinstance(until, str) else until
        return Sampling(length, temperature, float(asked.get("top_p", 1.0)), tuple(term for term in terms if term))

    @property
    def tail(self) -> int:
        """A term that has just been completed is within so many tokens, each of a byte or more."""
        return 1 + max((len(term.encode()) for term in self.until), default=0)

    def ended(self, text: str) -> bool:
        return any(term in text for term in self.until)

    def cut(self, text: str) -> str:
        """The text before the first of the terms."""
        return text[: min((text.find(term) for term in self.until if term in text), default=len(text))]


# --- tasks ---


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
        defined = None if include is None else _hash(include)
        return Tasks(manager, defined, frozenset(folder.all_tasks))

    def load(self, name: str, shots: int | None) -> Task:
        """A task with its documents, or several, if it is a group's or a tag's name.

        Raises:
            QspinError: its data can't be had, or it asks for what is not done here.
        """
        try:
            found = self.manager.load([name])
        except _OF_DATA as error:
            raise QspinError(
                f"{name}: its data can't be had ({one_line(error)}); they come from the Hugging Face Hub when first "
                "used, so connect this machine, or name a task on files of yours with --include"
            ) from None
        except _OF_DEFINITION as error:
            raise QspinError(f"{name}: the task can't be set up: {one_line(error)}") from None
        for part in found["tasks"].values():
            _set_shots(part, shots)
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
        started = time.monotonic()
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
        except jinja2.TemplateError as error:
            raise QspinError(f"{self.name}: a document does not fit the task's templates: {one_line(error)}") from None
        scores = _scores(self.name, results)
        return Outcome(set_up, scores, lm_eval.__version__, time.monotonic() - started)


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
    files = sorted(path for path in folder.rglob("*") if path.suffix in OF_A_DEFINITION and path.is_file())
    told = "".join(f"{path.relative_to(folder)} {sha256_of(path)}\n" for path in files)
    return hashlib.sha256(told.encode()).hexdigest()
