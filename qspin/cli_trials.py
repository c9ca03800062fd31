"""Commands that try what a run came to: chat. Registered by cli.py."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from qspin.console import RunFolder, quiet_libraries


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
