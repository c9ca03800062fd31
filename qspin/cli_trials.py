"""Commands that try what a run came to: chat, eval, mtbench. Registered by cli.py."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qspin.console import RunFolder, a_name, quiet_libraries, tell
from qspin.errors import QspinError
from qspin.figures.suites import SUITES, SuiteName, check_task
from qspin.safe_text import visible
from qspin.stopping import GOES_ON, heed_stops

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


def chat(
    folder: RunFolder,
    *,
    iteration: Annotated[
        str | None, typer.Option(help="base, sft, last, best or a number; by default as the run keeps")
    ] = None,
    versus: Annotated[str | None, typer.Option(help="another player, who answers each message too")] = None,
    system: Annotated[str, typer.Option(metavar="TEXT", help="a system message")] = "",
    temperature: Annotated[float | None, typer.Option(help="of sampling, 0 for the likeliest; the run's own")] = None,
    top_p: Annotated[float | None, typer.Option(help="nucleus; the run's own")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="cap on a reply; the run's own")] = None,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
) -> None:
    """Talk with a player of a run, or with two side by side. Through a pipe each line is a message."""
    from qspin.exports.recipe import recorded_config
    from qspin.figures.players import told
    from qspin.run_dir import RunDir
    from qspin.trials.loaded import Loaded, named
    from qspin.trials.talk import Manner, Talk, different
    from qspin.trials.talk_view import View, answer_lines, converse

    run_dir = RunDir(folder)
    players = [named(run_dir, iteration)]
    if versus is not None:
        players.append(named(run_dir, versus, "--versus"))
    different(players)
    own = recorded_config(run_dir).generation
    manner = Manner(
        own.temperature if temperature is None else temperature,
        own.top_p if top_p is None else top_p,
        own.max_new_tokens if max_new_tokens is None else max_new_tokens,
    )
    quiet_libraries()
    view = View()
    view.note(f"loading {folder}")
    loaded = Loaded.open(run_dir, players[0], lambda text: view.note(f"note: {text}"))
    talk = Talk(loaded, players, manner, view, system=system, seed=seed)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are refused in a line, as in data
    if sys.stdin.isatty():
        who = " and ".join(told(player) for player in players)
        view.note(f"{who}, temperature {manner.temperature:g}; /help lists the commands, Ctrl-D leaves")
        converse(talk, view)
    else:
        answer_lines(talk)


def evaluate(
    run: RunFolder,
    *,
    tasks: Annotated[
        str | None, typer.Option(help="tasks of lm-eval, with commas between: arc_challenge,gsm8k")
    ] = None,
    suite: Annotated[SuiteName | None, typer.Option(help="tasks with their usual shots")] = None,
    iteration: Annotated[
        list[str] | None,
        typer.Option(help="base, sft, last, best or numbers, as 0,2; by default base and the one that the run keeps"),
    ] = None,
    shots: Annotated[int | None, typer.Option(min=0, help="examples before a question, for --tasks")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first so many documents of each task")] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template/--no-chat-template", help="ask through the model's chat template")
    ] = False,
    include: Annotated[Path | None, typer.Option(help="a folder with tasks of yours", callback=a_name)] = None,
) -> None:
    """Put public benchmarks to the base and to iterations: lm-eval's tasks, with standard errors."""
    heed_stops(GOES_ON)
    names = [check_task(name.strip()) for name in tasks.split(",")] if tasks else []
    if not names and suite is None:
        raise QspinError(f"--tasks or --suite: name tasks, as arc_challenge,gsm8k, or a suite: {', '.join(SUITES)}")
    if shots is not None and not names:
        raise QspinError("--shots goes with --tasks; a suite has its own")
    asked: dict[str, int | None] = {**(SUITES[suite] if suite else {}), **dict.fromkeys(names, shots)}

    os.environ["TQDM_DISABLE"] = "1"  # read as tqdm is first imported: the harness's bars would tear the view
    from qspin.figures.benchmarks import SetUp
    from qspin.run_dir import RunDir
    from qspin.trials.loaded import named
    from qspin.trials.putting import watch_eval

    run_dir = RunDir(run)
    quiet_libraries()
    wanted = [name.strip() for text in iteration for name in text.split(",")] if iteration else ["base", None]
    who = list(dict.fromkeys(named(run_dir, name) for name in wanted))
    set_ups = [SetUp(task, count, limit, chat_template) for task, count in asked.items()]
    watch_eval(run_dir, who, set_ups, include)


def mtbench(
    folder: RunFolder,
    *,
    judge_url: Annotated[
        str | None,
        typer.Option(help="an OpenAI-compatible endpoint, as http://127.0.0.1:8080/v1; key: QSPIN_JUDGE_KEY"),
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option(help="the judge's name there; without a judge: answers only")
    ] = None,
    iteration: Annotated[
        str | None,
        typer.Option(help="players: base, sft, last, best, numbers, as base,0,2; else base and the kept one"),
    ] = None,
    pairwise: Annotated[
        bool, typer.Option("--pairwise", help="compare two players answer by answer, in place of grading each")
    ] = False,
    questions: Annotated[
        Path | None, typer.Option(help="a file like FastChat's question.jsonl, which is fetched else", callback=a_name)
    ] = None,
    references: Annotated[
        Path | None, typer.Option(help="a file like FastChat's reference_answer/gpt-4.jsonl", callback=a_name)
    ] = None,
    judge_prompts: Annotated[
        Path | None,
        typer.Option(help="a file like FastChat's judge_prompts.jsonl, in place of our words", callback=a_name),
    ] = None,
    judge_timeout: Annotated[int, typer.Option(min=1, max=86_400, help="seconds for one judgement")] = 300,
    at_once: Annotated[int, typer.Option(min=1, max=64, help="judgements asked for side by side")] = 4,
) -> None:
    """Have players answer MT-Bench's questions of two turns, and a judge grade or compare the answers."""
    heed_stops(GOES_ON)
    from rich.console import Console

    from qspin.run_dir import RunDir
    from qspin.trials.judge import Judge

    run_dir = RunDir(folder)
    if (judge_url is None) != (judge_model is None):
        raise QspinError("--judge-url and --judge-model go together; without both, players answer and nobody judges")
    if pairwise and judge_url is None:
        raise QspinError("--pairwise is for a judge: give --judge-url and --judge-model")
    judge = None
    if judge_url is not None and judge_model is not None:
        judge = Judge(judge_url, judge_model, timeout=judge_timeout)  # before anything that takes time

    from qspin.figures import report
    from qspin.figures.mtbench_result import OURS, tables
    from qspin.figures.terminal import notes_table, results_table
    from qspin.trials.judging import OWN, read_prompts
    from qspin.trials.loaded import named
    from qspin.trials.mtbench import Trial
    from qspin.trials.mtbench_answers import ANSWERS, read_bench

    quiet_libraries()
    wanted = ["base", None] if iteration is None else [name.strip() for name in iteration.split(",")]
    players = list(dict.fromkeys(named(run_dir, name) for name in wanted))
    if pairwise and len(players) != 2:
        raise QspinError(f"--pairwise compares two players, and --iteration names {len(players)}: {', '.join(players)}")
    prompts = OWN if judge_prompts is None else read_prompts(judge_prompts)
    bench = read_bench(questions, references)
    console = Console()
    with (
        _Steps(console) as steps,
        Trial(
            run_dir,
            bench,
            judge,
            prompts,
            prompts_name=OURS if judge_prompts is None else judge_prompts.name,
            at_once=at_once,
            progress=steps,
        ) as trial,
    ):
        if judge is None:
            trial.answers(players)
            tell(console, f"answers: {trial.folder / ANSWERS}; give --judge-url and --judge-model to have them judged")
            return
        result = trial.compare(*players) if pairwise else trial.grade(players)
    found = report.from_parts(tables(result))
    for table in found:
        console.print(results_table(table))
    console.print(notes_table(dict.fromkeys(note for table in found for note in table.notes)), style="dim")
    tell(console, f"result: {trial.result}")


class _Steps:
    """How far it is: a bar on a terminal, elsewhere a line at every tenth."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        text = TextColumn("{task.description}", markup=False)
        columns = (text, BarColumn(bar_width=None), MofNCompleteColumn(), TimeRemainingColumn())
        self._console = console
        self._bars = Progress(*columns, console=console) if console.is_terminal else None
        self._tasks: dict[str, TaskID] = {}
        self._said = ("", -1)  # what, and at which tenth it was

    def __enter__(self) -> _Steps:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def step(self, what: str, done: int, total: int) -> None:
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(visible(what), total=total)
            self._bars.update(self._tasks[what], completed=done)
        elif (what, 10 * done // total) != self._said:
            tell(self._console, f"{what}: {done}/{total}")
            self._said = (what, 10 * done // total)

    def note(self, text: str) -> None:
        tell(self._console, f"note: {text}", style="yellow")
