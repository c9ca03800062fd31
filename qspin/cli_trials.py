"""Commands that put a run's players to the test: mtbench. Registered by cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qspin.console import RunFolder, a_name, quiet_libraries, tell
from qspin.errors import QspinError
from qspin.safe_text import visible

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import TaskID


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
    judge_timeout: Annotated[float, typer.Option(min=1, help="seconds for one judgement")] = 300,
    at_once: Annotated[int, typer.Option(min=1, max=64, help="judgements asked for side by side")] = 4,
) -> None:
    """Have players answer MT-Bench's questions of two turns, and a judge grade or compare the answers."""
    from rich.console import Console

    from qspin.judge import Judge
    from qspin.run_dir import RunDir

    run_dir = RunDir(folder)
    run_dir.check_run()
    if (judge_url is None) != (judge_model is None):
        raise QspinError("--judge-url and --judge-model go together; without both, players answer and nobody judges")
    if pairwise and judge_url is None:
        raise QspinError("--pairwise is for a judge: give --judge-url and --judge-model")
    judge = None
    if judge_url is not None and judge_model is not None:
        judge = Judge(judge_url, judge_model, timeout=judge_timeout)  # before anything that takes time

    from qspin import report, view
    from qspin.judging import OWN, read_prompts
    from qspin.loaded import named
    from qspin.mtbench import ANSWERS, Trial, read_bench
    from qspin.mtbench_result import OURS, tables

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
        Trial.begin(
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
        console.print(view.results_table(table))
    console.print(view.notes_table(dict.fromkeys(note for table in found for note in table.notes)), style="dim")
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
