"""Commands that try what a run came to: chat, eval. Registered by cli.py."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from qspin.console import RunFolder, a_name, quiet_libraries
from qspin.errors import QspinError
from qspin.suites import SUITES, SuiteName, check_task


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
    from qspin.loaded import Loaded, named
    from qspin.players import told
    from qspin.recipe import recorded_config
    from qspin.run_dir import RunDir
    from qspin.stopping import heed_stops
    from qspin.talk import Manner, Talk, different
    from qspin.talk_view import View, answer_lines, converse

    heed_stops("stopped")  # there is nothing to go on with
    run_dir = RunDir(folder)
    run_dir.check_run()
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
    talk = Talk(Loaded.open(run_dir, players[0]), players, manner, view, system=system, seed=seed)
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
    names = [check_task(name.strip()) for name in tasks.split(",")] if tasks else []
    if not names and suite is None:
        raise QspinError(f"--tasks or --suite: name tasks, as arc_challenge,gsm8k, or a suite: {', '.join(SUITES)}")
    if shots is not None and not names:
        raise QspinError("--shots goes with --tasks; a suite has its own")
    asked: dict[str, int | None] = {**(SUITES[suite] if suite else {}), **dict.fromkeys(names, shots)}

    os.environ["TQDM_DISABLE"] = "1"  # read as tqdm is first imported: the harness's bars would tear the view
    from qspin.benchmarks import SetUp
    from qspin.loaded import named
    from qspin.run_dir import RunDir
    from qspin.trials import watch_eval

    run_dir = RunDir(run)
    run_dir.check_run()
    quiet_libraries()
    wanted = [name.strip() for text in iteration for name in text.split(",")] if iteration else ["base", None]
    who = list(dict.fromkeys(named(run_dir, name) for name in wanted))
    set_ups = [SetUp(task, count, limit, chat_template) for task, count in asked.items()]
    watch_eval(run_dir, who, set_ups, include)
