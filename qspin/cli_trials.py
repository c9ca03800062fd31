"""Commands that try a run's players: eval. Registered by cli.py."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from qspin.console import RunFolder, a_name, quiet_libraries
from qspin.errors import QspinError
from qspin.suites import SUITES, SuiteName, check_task


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
