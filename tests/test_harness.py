"""lm-eval's tasks on a run's players: what its own HFLM finds on the same weights, and the command."""

from __future__ import annotations

import datetime
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import HOUSE_STYLE, call, flip_byte, moved_adapter, process, refusal, small_run
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from test_scoring import plain_twin

from qspin.config import load_config
from qspin.errors import QspinError
from qspin.figures.benchmarks import Score, SetUp, all_kept, gain, kept
from qspin.figures.suites import SUITES
from qspin.files import read_json, write_json
from qspin.fitting.memory import OutOfMemory
from qspin.prepare import prepare
from qspin.run_dir import RunDir
from qspin.spin import run
from qspin.trials import harness
from qspin.trials import tasks as tasks_module
from qspin.trials.harness import Player, Sampling
from qspin.trials.loaded import Loaded
from qspin.watch.progress import Silent

DATE = datetime.date(2026, 1, 2)
TEXTS = [row["prompt"] for row in map(json.loads, (HOUSE_STYLE / "train.jsonl").read_text().splitlines())][:40]


@pytest.fixture(scope="module")
def run_dir(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    folder = tmp_path_factory.mktemp("harness")
    settings = small_run(tiny_folder("llama"), folder / "rows.jsonl", rows=18)
    run(
        prepare(load_config(None, settings | {"model.dtype": "float32", "iterations": 1}), DATE),
        folder / "run",
        Silent(),
    )
    return RunDir(folder / "run")


@pytest.fixture(scope="module")
def loaded(run_dir: RunDir) -> Loaded:
    """With a player in the slot that is far from the base."""
    found = Loaded.open(run_dir, "base")
    found.model.set_adapter(moved_adapter(found.model))
    return found


@pytest.fixture(scope="module")
def player(loaded: Loaded) -> Player:
    return Player(loaded, lambda _count: None)


@pytest.fixture(scope="module")
def peer(loaded: Loaded, tiny_folder: Callable[[str], Path], tokenizer: Any) -> HFLM:
    twin = plain_twin(loaded.model, tiny_folder("llama")).base_model.model
    return HFLM(pretrained=twin, tokenizer=tokenizer, backend="causal", batch_size=4, max_length=512)


def asked(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


# --- against HFLM ---


PAIRS = [
    *((f"Q: {text}\nA:", f" {choice}") for text in TEXTS[:6] for choice in ("yes", "no", "a parrot, I say")),
    ("a context that ends in blanks  ", "goes on"),
    ("", "no context at all"),
    ("the water is o", "ver there"),  # tokens are those of both together
    ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello.<|im_end|>"),
    ("<|endoftext|>begun already", " and on"),
    (" ".join(TEXTS), " cut from the left"),
]


def test_likelihoods_are_those_of_hflm(player: Player, peer: HFLM) -> None:
    ours, theirs = (lm.loglikelihood(asked("loglikelihood", *PAIRS)) for lm in (player, peer))
    for pair, (logp, greedy), (their_logp, their_greedy) in zip(PAIRS, ours, theirs, strict=True):
        assert logp == pytest.approx(their_logp, rel=1e-4), pair
        assert greedy == their_greedy, pair
    assert len(peer.tok_encode(PAIRS[-1][0])) > 512, "none was cut"
    # the same text with another boundary is another question
    (moved, _), (whole, _) = player.loglikelihood(
        asked("loglikelihood", ("the water is ove", "r there"), ("the water is o", "ver there"))
    )
    assert abs(moved - whole) > 0.1


def test_what_it_would_say_is_greedy(player: Player, peer: HFLM) -> None:
    prompts = [f"Q: {text}\nA:" for text in TEXTS[:4]]
    said = player.generate_until(asked("generate_until", *((prompt, {"max_gen_toks": 3}) for prompt in prompts)))
    pairs = [pair for prompt, text in zip(prompts, said, strict=True) for pair in ((prompt, text), (prompt, "zebra"))]
    ours, theirs = (lm.loglikelihood(asked("loglikelihood", *pairs)) for lm in (player, peer))
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert {greedy for _, greedy in ours} == {True, False}


def test_rolling_likelihoods_are_those_of_hflm(loaded: Loaded, peer: HFLM) -> None:
    heard: list[float] = []
    player = Player(loaded, heard.append)
    texts = [(TEXTS[0],), (" ".join(TEXTS[:10]),), (" ".join(TEXTS),)]
    assert len(peer.tok_encode(texts[-1][0])) > 512, "none takes two windows"
    ours, theirs = (lm.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) for lm in (player, peer))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert sum(heard) == pytest.approx(len(texts))


GENERATIONS: list[tuple[str, dict[str, Any]]] = [
    *((f"Q: {text}\nA:", {"until": ["\n", "the"], "max_gen_toks": 24}) for text in TEXTS[:6]),
    *((text, {"until": ["<|im_end|>", "e"], "max_gen_toks": 24, "do_sample": False}) for text in TEXTS[6:9]),
    *((text, {"max_gen_toks": 30, "temperature": 0.0}) for text in TEXTS[9:12]),
    (TEXTS[12], {"until": "a", "max_new_tokens": 24}),
    (" ".join(TEXTS), {"until": [], "max_gen_toks": 8}),
]


def test_greedy_answers_are_those_of_hflm(player: Player, peer: HFLM) -> None:
    ours, theirs = (
        # HFLM adds to the settings that it is given
        lm.generate_until(asked("generate_until", *((text, json.loads(json.dumps(how))) for text, how in GENERATIONS)))
        for lm in (player, peer)
    )
    assert ours == theirs
    assert len(set(ours)) > len(ours) / 2
    longest = player.generate_until(asked("generate_until", (GENERATIONS[0][0], {"max_gen_toks": 24})))[0]
    assert ours[0] != longest, "nothing was cut"


def test_an_empty_text_is_gone_on_from(player: Player) -> None:
    how = {"max_gen_toks": 4}
    first, second = player.generate_until(asked("generate_until", ("", how), ("<|endoftext|>", how)))
    assert first == second


def test_another_player_answers_otherwise(loaded: Loaded, player: Player) -> None:
    question = asked("loglikelihood", PAIRS[0])
    moved = player.loglikelihood(question)
    was = loaded.model.adapter()
    loaded.seat("base")
    assert abs(player.loglikelihood(question)[0][0] - moved[0][0]) > 0.1
    loaded.model.set_adapter(was)
    assert player.loglikelihood(question) == moved


def test_conversations_are_rendered_as_hflm_does(player: Player, peer: HFLM) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "A parrot."},
        {"role": "user", "content": "Since when?"},
    ]
    assert player.apply_chat_template(turns) == peer.apply_chat_template(turns)
    begun = [*turns, {"role": "assistant", "content": "Since I"}]
    assert player.apply_chat_template(begun, add_generation_prompt=False) == peer.apply_chat_template(
        begun, add_generation_prompt=False
    )
    assert player.tokenizer_name.startswith("tiny-llama")


def test_samples_are_drawn_and_drawn_alike(player: Player) -> None:
    def said(temperature: float, **more: Any) -> list[str]:
        how = {"do_sample": True, "temperature": temperature, "max_gen_toks": 12, **more}
        return player.generate_until(asked("generate_until", (TEXTS[0], how), (TEXTS[0], how)))

    first, second = said(1.0)
    assert first != second
    assert said(1.0) == [first, second]
    assert said(2.0) != [first, second]
    assert said(1.0, top_p=0.01) == said(0.0)


def test_settings_that_are_not_known_are_refused() -> None:
    assert Sampling.of({"num_beams": 1, "top_k": 5, "until": "x"}) == Sampling(256, 0.0, 1.0, ("x",))
    assert Sampling.of({"do_sample": True}).temperature == 1.0
    assert Sampling.of({"do_sample": False, "temperature": 0.7}).temperature == 0.0
    for strange in ({"num_beams": 4}, {"do_sample": True, "top_k": 5}, {"repetition_penalty": 1.1}):
        with pytest.raises(QspinError, match="want what qspin does not do"):
            Sampling.of(strange)


def test_lengths_that_do_not_fit(player: Player) -> None:
    with pytest.raises(QspinError, match="512 new tokens; the model's context is 512"):
        player.generate_until(asked("generate_until", ("Hi", {"max_gen_toks": 512})))
    with pytest.raises(QspinError, match="between 1 and the 512 of the model's context"):
        player.loglikelihood(asked("loglikelihood", ("Hi", "")))


def test_answers_go_on_when_memory_runs_out(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []
    player = Player(loaded, heard.append)
    questions = asked("generate_until", *((text, {"max_gen_toks": 12}) for text in TEXTS[:6]))
    whole, inner, widths = player.generate_until(questions), harness.generate, []
    assert sum(heard) == pytest.approx(len(questions))
    monkeypatch.setattr(harness, "rows_at_once", lambda *_: 4)

    def refuse(*answered: int) -> None:
        """After so many answers, at each of the first tries."""
        widths.clear()

        def refusing(model: Any, requests: Any, **settings: Any) -> Any:
            widths.append(settings["width"])
            if len(widths) > len(answered):
                return inner(model, requests, **settings)
            if some := answered[len(widths) - 1]:
                inner(model, requests[:some], **settings)
            raise OutOfMemory("no room")

        monkeypatch.setattr(harness, "generate", refusing)

    refuse(3, 0)
    assert player.generate_until(questions) == whole
    assert widths == [4, 2, 1]
    assert sum(heard) == pytest.approx(2 * len(questions))
    refuse(0, 1, 0, 1, 1)  # never three without an answer between
    assert player.generate_until(questions) == whole
    assert widths == [4, 2, 1, 1, 1, 1]
    refuse(0, 1, 0, 0)
    with pytest.raises(QspinError, match="out of memory 3 times in a row while answering"):
        player.generate_until(questions)
    assert widths == [4, 2, 1, 1]


# --- the command ---


CHOICES, WORDS, SURPRISE = "own_choices", "own_words", "own_surprise"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a task of each kind, on files beside it."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"What is {n}?", "choices": [f"It is {n * k}, I say." for k in (7, 5, 3)]} for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "{{question}}",
    }
    mean = {"aggregation": "mean", "higher_is_better": True}
    for name, task in {
        CHOICES: {
            "output_type": "multiple_choice",
            "doc_to_choice": "choices",
            "doc_to_target": 0,
            "metric_list": [{"metric": "acc", **mean}, {"metric": "acc_norm", **mean}],
        },
        WORDS: {
            "output_type": "generate_until",
            "doc_to_target": "{{choices[0]}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
            "metric_list": [{"metric": "exact_match", **mean}],
            "num_fewshot": 2,
        },
        SURPRISE: {
            "output_type": "loglikelihood",
            "doc_to_target": "{{choices[0]}}",
            "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
        },
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **shared, **task}))
    return folder


ALL = ",".join([CHOICES, WORDS, SURPRISE])


@pytest.fixture(scope="module")
def evaluated(run_dir: RunDir, tasks: Path) -> Iterator[Any]:
    yield call("eval", run_dir.path, "--tasks", ALL, "--include", tasks)


def rows_of(text: str) -> list[list[str]]:
    """A table's cells, by row."""
    return [cells for line in text.splitlines() if (cells := [c for c in line.strip().split("  ") if c])]


def test_the_command(run_dir: RunDir, evaluated: Any) -> None:
    assert evaluated.code == 0, evaluated.err
    shown = [[cell.strip() for cell in row] for row in rows_of(evaluated.out)]
    assert ["task", "set-up", "metric", "n", "base", "0", "change"] in shown
    by_task = {(row[0], row[2]): row for row in shown if row[0].startswith("own_") and len(row) == 7}
    assert by_task.keys() == {
        (CHOICES, "acc"), (CHOICES, "acc_norm"), (WORDS, "exact_match"), (SURPRISE, "perplexity")
    }  # fmt: skip
    assert by_task[WORDS, "exact_match"][1] == "2-shot"
    for name in ("base", "0"):
        outcomes = {outcome.set_up.task: outcome for outcome in all_kept(run_dir.player(name))}
        assert outcomes.keys() == {CHOICES, WORDS, SURPRISE}
        for task, outcome in outcomes.items():
            for score in outcome.scores:
                row = by_task[task, score.metric]
                cell = row[4 if name == "base" else 5]
                assert cell.startswith(f"{score.value:.3f}")
                assert score.documents == 12
    base, tuned = (kept(run_dir.player(name), _set_up(run_dir, SURPRISE)) for name in ("base", "0"))
    assert base is not None
    assert tuned is not None
    # it was trained to say just that, and the figure that is the surprise tells
    assert tuned.scores[0].value < 0.8 * base.scores[0].value
    assert by_task[SURPRISE, "perplexity"][6].startswith("-")


def test_a_warm_start_at_work_is_not_called_the_base(
    tiny_folder: Callable[[str], Path], tasks: Path, tmp_path: Path
) -> None:
    settings = small_run(tiny_folder("llama"), tmp_path / "rows.jsonl", rows=18) | {"iterations": 1, "sft.epochs": 1}
    run(prepare(load_config(None, settings), DATE), tmp_path / "run", Silent())
    answer = call("eval", tmp_path / "run", "--tasks", SURPRISE, "--include", tasks, "--iteration", "base,sft,0")
    assert answer.code == 0, answer.err
    begun = [line.partition(": 0/")[0] for line in answer.out.splitlines() if ": 0/12 documents" in line]
    whose = ("base", "warm start", "iteration 0 (1 of 1)")
    assert begun == [f"{player} · {SURPRISE}" for player in whose]


def _set_up(run_dir: RunDir, task: str) -> SetUp:
    found = [outcome.set_up for outcome in all_kept(run_dir.base) if outcome.set_up.task == task]
    [plain] = [set_up for set_up in found if set_up.shots is None and set_up.limit is None]
    return plain


def test_what_is_kept_is_not_computed_again(
    run_dir: RunDir, tasks: Path, evaluated: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _set_up(run_dir, CHOICES).file(run_dir.iteration(0))
    before = {file: file.stat().st_mtime_ns for file in run_dir.path.rglob("benchmarks/*.json")}
    assert len(before) == 6

    def never(*_: Any) -> None:
        raise AssertionError("the base was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(Loaded, "open", never)
        again = call("eval", run_dir.path, "--tasks", ALL, "--include", tasks)
    assert again.code == 0
    assert again.out == evaluated.out[evaluated.out.index("Benchmarks") :]
    path.unlink()
    assert call("eval", run_dir.path, "--tasks", ALL, "--include", tasks).code == 0
    after = {file: file.stat().st_mtime_ns for file in run_dir.path.rglob("benchmarks/*.json")}
    assert {file for file in before if after[file] != before[file]} == {path}


@pytest.mark.usefixtures("evaluated")
def test_other_set_ups_are_other_figures(run_dir: RunDir, tasks: Path) -> None:
    options = ["--tasks", CHOICES, "--include", tasks, "--iteration", "base"]
    call("eval", run_dir.path, *options, "--shots", "1", "--limit", "5", "--chat-template")
    [found] = [outcome for outcome in all_kept(run_dir.base) if outcome.set_up.chat]
    assert (found.set_up.shots, found.set_up.limit, found.scores[0].documents, found.scores[0].shots) == (1, 5, 5, 1)
    plain = kept(run_dir.base, _set_up(run_dir, WORDS))
    assert plain is not None


@pytest.mark.usefixtures("evaluated")
def test_a_task_that_was_changed_is_computed_again(run_dir: RunDir, tasks: Path) -> None:
    file = tasks / f"{CHOICES}.yaml"
    was = file.read_text()
    try:
        file.write_text(was.replace("{{question}}", "Say, {{question}}"))
        answer = call("eval", run_dir.path, "--tasks", CHOICES, "--include", tasks, "--iteration", "base")
        assert "documents" in answer.out
    finally:
        file.write_text(was)
    call("eval", run_dir.path, "--tasks", CHOICES, "--include", tasks, "--iteration", "base")


@pytest.mark.usefixtures("evaluated")
def test_summary_and_report_have_the_figures(run_dir: RunDir) -> None:
    text = run_dir.summary.read_text()
    assert "## Benchmarks" in text
    assert text.index("## Benchmarks") < text.index("## Details")
    assert CHOICES in text
    assert call("report", run_dir.path).code == 0
    page = (run_dir.path / "report.html").read_text()
    assert page.index("<h2>Benchmarks</h2>") < page.index("<details><summary>More figures")


def test_every_player_is_shown_the_same_examples(run_dir: RunDir, tasks: Path) -> None:
    task = tasks_module.Tasks.find([WORDS], tasks).load(WORDS, None)
    base = Loaded.open(run_dir, "base")
    prompts = []
    for _ in range(2):
        task.put_to(base, SetUp(WORDS, limit=3), lambda _count: None)
        prompts.append([request.args[0] for request in task.found["tasks"][WORDS].instances])
    assert prompts[0] == prompts[1]
    assert len({prompt.rpartition("What is")[0] for prompt in prompts[0]}) > 1, "the examples are drawn"
    task.put_to(base, SetUp(WORDS, limit=1, chat=True), lambda _count: None)
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


def told(*arguments: str | Path) -> str:
    """The line that a command ends with which had begun."""
    answer = call(*arguments)
    assert answer.code == 1
    return answer.err.splitlines()[-1]


@pytest.mark.usefixtures("evaluated")
def test_errors_take_a_line(run_dir: RunDir, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = run_dir.path
    assert "--tasks or --suite: name tasks" in refusal("eval", here)
    assert "'a/b' is no task's name" in refusal("eval", here, "--tasks", "a/b")
    assert "--shots goes with --tasks" in refusal("eval", here, "--suite", "open-llm-v1", "--shots", "3")
    assert "'7' is not finished" in refusal("eval", here, "--tasks", CHOICES, "--iteration", "base,7")
    assert refusal("eval", tmp_path, "--tasks", CHOICES) == f"{tmp_path}: not the folder of a run, it has no run.json"
    assert "--include: nowhere is no folder" in refusal("eval", here, "--tasks", CHOICES, "--include", "nowhere")
    options = "--tasks", CHOICES, "--include", tasks, "--shots", "40"
    assert told("eval", here, *options) == f"error: {CHOICES}: 40 shots are asked for, and it has 11 examples"

    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "lost.yaml").write_text(
        "task: lost\ndataset_path: json\ndataset_kwargs: {data_files: {test: lost.jsonl}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_text: x\ndoc_to_target: 0\ndoc_to_choice: y\n"
    )
    assert "error: lost: its data can't be had" in told("eval", here, "--tasks", "lost", "--include", broken)

    shutil.copy(tasks / f"{CHOICES}.yaml", broken)
    answer = call(
        "eval", here, "--tasks", f"lost,{CHOICES}", "--include", broken, "--iteration", "base", "--limit", "2"
    )
    assert "error: lost: its data can't be had" in answer.out
    assert f"{CHOICES}  0-shot, first 2" in answer.out
    assert answer.code == 1
    assert answer.err.splitlines()[-1] == "error: 1 of 2 tasks could not be put to the players: lost"

    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"q": "Why?", "c": ["a", "b"]}\n{"q": "How?", "c": null}\n')
    (broken / "holes.yaml").write_text(
        f"task: holes\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        "output_type: multiple_choice\ntest_split: test\ndoc_to_choice: [x, y]\ndoc_to_target: 0\n"
        "doc_to_text: '{{q}} {{c[0]}}'\n"
    )
    options = "--tasks", "holes", "--include", broken
    assert "error: holes: a document does not fit the task's templates" in told("eval", here, *options)

    file = _set_up(run_dir, CHOICES).file(run_dir.base)
    whole = read_json(file)
    file.write_text("{}")
    assert "damaged or unreadable" in refusal("eval", here, "--tasks", CHOICES)
    write_json(file, {"set_up": {}, "scores": [], "other": 1})
    assert "of another version of qspin" in refusal("eval", here, "--tasks", CHOICES)
    write_json(file, whole)

    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert refusal("eval", here, "--tasks", "gsm8k").endswith("is not installed: pip install 'lm-eval>=0.4.13,<0.4.14'")


DEFINED = """task: {name}
dataset_path: {data}
{rows}output_type: multiple_choice
test_split: test
doc_to_text: {text}
doc_to_choice: [x, y]
doc_to_target: 0
{more}"""


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


RESULTS = {
    "lookup": "KeyError('answer')",
    "share": "ZeroDivisionError('division by zero')",
    "product": "RuntimeError('inconsistent tensor size",
    "memory": "",
}


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


def test_a_task_that_can_not_be_put_leaves_the_others_alone(run_dir: RunDir, tasks: Path, tmp_path: Path) -> None:
    shutil.copy(tasks / f"{CHOICES}.yaml", tmp_path)
    definition = yaml.safe_load((tasks / f"{WORDS}.yaml").read_text())
    long = {**definition, "task": "long", "generation_kwargs": {"max_gen_toks": 5000}}
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(long))
    options = "--include", tmp_path, "--iteration", "base", "--limit", "3"
    answer = call("eval", run_dir.path, "--tasks", f"long,{CHOICES}", *options)
    assert "error: the task asks for 5000 new tokens; the model's context is 512" in answer.out
    assert f"{CHOICES}  0-shot, first 3" in answer.out
    assert answer.code == 1
    assert answer.err.splitlines()[-1] == "error: 1 of 2 tasks could not be put to the players: long"
    assert told("eval", run_dir.path, "--tasks", "long", *options) == (
        "error: the task asks for 5000 new tokens; the model's context is 512"
    )


def test_a_base_that_came_out_otherwise_here_is_told_of(run_dir: RunDir, tasks: Path, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "run")
    shutil.copytree(run_dir.path, copy.path)
    write_json(copy.record, read_json(copy.record) | {"base_hash": "0" * 64, "quantised_by": "another card"})
    options = "--tasks", CHOICES, "--include", tasks, "--iteration", "base", "--limit", "4"
    answer = call("eval", copy.path, *options)
    assert answer.code == 0
    assert f"are not those that {copy.path} began with (another device" in answer.out
    write_json(copy.record, read_json(run_dir.record) | {"base_hash": "0" * 64})
    assert "the base's files have changed" in told("eval", copy.path, *options, "--chat-template")


def test_a_damaged_adapter_is_not_measured(run_dir: RunDir, tasks: Path, tmp_path: Path) -> None:
    copy = RunDir(tmp_path / "run")
    shutil.copytree(run_dir.path, copy.path, ignore=shutil.ignore_patterns("benchmarks"))
    said = flip_byte(copy.iteration(0).adapter)
    options = "--tasks", CHOICES, "--include", tasks, "--iteration", "0", "--limit", "4"
    assert told("eval", copy.path, *options) == f"error: {said}"
    assert not list(copy.iteration(0).benchmarks.iterdir())


def test_a_run_that_can_not_be_written_to_is_told_before_anything_is_computed(
    run_dir: RunDir, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = RunDir(tmp_path / "run")
    shutil.copytree(run_dir.path, copy.path)
    shutil.rmtree(copy.base.benchmarks, ignore_errors=True)
    copy.base.benchmarks.write_text("in the way: what holds for root as well")
    monkeypatch.setattr(Loaded, "open", lambda *_: pytest.fail("the base was loaded"))
    [line] = [told("eval", copy.path, "--tasks", CHOICES, "--include", tasks)]
    assert line.startswith(f"error: {copy.base.benchmarks} can't be written to: ")


def test_names_of_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own tasks are found, the near ones of one that is not there, and their data without a hub is a line."""
    monkeypatch.setattr(tasks_module, "TaskManager", functools.cache(tasks_module.TaskManager))  # it reads for seconds
    found = tasks_module.Tasks.find([task for suite in SUITES.values() for task in suite], None)
    assert found.definition("gsm8k") is None
    with pytest.raises(QspinError, match=r"no task is called 'arc_chalenge'; near it are .*arc_challenge"):
        tasks_module.Tasks.find(["arc_chalenge"], None)
    with pytest.raises(QspinError, match=r"gsm8k: its data can't be had \(.*Hugging Face Hub"):
        found.load("gsm8k", 5)


@pytest.mark.usefixtures("evaluated")
def test_interrupted_it_keeps_what_is_done(run_dir: RunDir, tasks: Path) -> None:
    for folder in (run_dir.base, run_dir.iteration(0)):
        for outcome in all_kept(folder):
            outcome.set_up.file(folder).unlink()
    slow = tasks / "slow.yaml"
    definition = yaml.safe_load((tasks / f"{WORDS}.yaml").read_text())
    slow.write_text(
        yaml.safe_dump({**definition, "task": "slow", "generation_kwargs": {"max_gen_toks": 400}, "repeats": 40})
    )
    try:
        with process("eval", run_dir.path, "--tasks", f"{CHOICES},slow", "--include", tasks) as child:
            deadline = time.monotonic() + 120
            while not any("slow" in line for line in iter(child.stdout.readline, "")):  # type: ignore[union-attr]
                assert time.monotonic() < deadline
            time.sleep(1)
            child.send_signal(signal.SIGINT)
            out, err = child.communicate(timeout=60)
    finally:
        slow.unlink()
    assert child.returncode == 130
    assert err == "stopped; the same command goes on from the last finished piece\n", (out, err)
    assert {outcome.set_up.task for outcome in all_kept(run_dir.base)} == {CHOICES}


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys; from qspin.cli import main\nsys.argv = ['qspin', 'eval', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(*sorted({'torch', 'lm_eval', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""


# --- figures ---


def score(values: list[float] | None, value: float | None = None) -> Score:
    mean = sum(values) / len(values) if values else 0.0
    return Score("t", "acc", mean if value is None else value, 0.1, 0, len(values or []), values)


def test_the_error_of_a_change_is_that_of_pairs() -> None:
    first, second = score([1, 0, 1, 0, 1, 1, 0, 1]), score([1, 0, 1, 1, 1, 1, 1, 1])
    difference, error = gain(first, second)
    assert difference == 0.25
    assert error == pytest.approx((0.25 * 0.75 * 8 / 7 / 8) ** 0.5)  # two of eight rose by one
    assert gain(first, first) == (0.0, 0.0)
    assert gain(first, score(None, 2.0)) == (2.0 - first.value, None)
