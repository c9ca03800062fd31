"""The command line: parse, call, render, exit code. Everything heavy is imported when a command needs it."""

from __future__ import annotations

import errno
import io
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import qspin
from qspin import cli_results, cli_trials
from qspin.console import Folder, RunFolder, a_name, quiet_libraries
from qspin.errors import QspinError, permission_told
from qspin.processes.workers import launch, rank
from qspin.safe_text import redacted, show_traceback, visible
from qspin.stopping import CODES, GOES_ON, heed_stops, leave_stopped, leave_unheard
from qspin.watch.progress import TrackerName

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Self-play fine-tuning (SPIN) of a 4-bit model on one GPU or a laptop.",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"qspin {qspin.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="qspin's version, and no more")
    ] = False,
) -> None: ...


@app.command()
def run(
    source: Annotated[
        str | None, typer.Argument(metavar="PRESET|CONFIG.yaml", help="a preset's name, or a configuration file")
    ] = None,
    *,
    data: Annotated[str | None, typer.Option(help="JSONL, JSON, CSV or Parquet file, or a hub id")] = None,
    out: Annotated[
        Path, typer.Option(help="the run's folder; the same command goes on where it stopped", callback=a_name)
    ],
    model: Annotated[str | None, typer.Option(help="hub id or local folder of the base model")] = None,
    iterations: Annotated[int | None, typer.Option(help="rounds of self-play")] = None,
    beta: Annotated[str | None, typer.Option(help="λ of the paper: a number, or one an iteration: 0.1,0.1,5")] = None,
    lr: Annotated[str | None, typer.Option(help="peak learning rate: a number, or one an iteration")] = None,
    seed: Annotated[int | None, typer.Option(help="of sampling, order and initial weights")] = None,
    format: Annotated[str | None, typer.Option(help="shape of the rows, if it is not to be found out")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="stop if any row of the data would be left out")] = False,
    init_adapter: Annotated[str | None, typer.Option(help="PEFT adapter folder to start from")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any other setting, as train.epochs=3")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be done; loads no weights")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="progress as lines of JSON, for a program")] = False,
    tracker: Annotated[TrackerName | None, typer.Option("--track", help="log the figures there too")] = None,
) -> None:
    """Play SPIN: each iteration answers the prompts, and learns to tell the data's answers from those."""
    heed_stops(GOES_ON)
    from qspin.config import load_config, parse_override

    options: dict[str, Any] = {
        "data.source": data,
        "model.id": model,
        "iterations": iterations,
        "train.beta": _numbers(beta),
        "train.lr": _numbers(lr),
        "seed": seed,
        "data.format": format,
        "data.strict": strict or None,
        "model.init_adapter": init_adapter,
    }
    overrides = {key: value for key, value in options.items() if value is not None}
    overrides |= dict(parse_override(text) for text in settings or [])
    config = load_config(source, overrides)

    from qspin.run_dir import RunDir

    if dry_run and as_json:
        raise QspinError("--json tells how a run goes on, and --dry-run does none; leave one of them out")
    RunDir(out).check_usable()
    if config.data.source is None and RunDir(out).config.is_file():
        again = shlex.join(["qspin", "run", str(RunDir(out).config), "--out", str(out)])
        raise QspinError(f"data.source is not set: give --data, or go on with the settings of {out}: {again}")
    quiet_libraries()
    if tracker is not None:
        from qspin.watch.track import check

        check(tracker)

    from qspin.record import prepare_run

    prepared = prepare_run(config, RunDir(out), keep_rejects=not dry_run)
    if dry_run:
        from qspin.planning.dry_run import show_dry_run

        show_dry_run(prepared)
    else:
        from qspin.watching import watch_run

        watch_run(prepared, out, as_json=as_json, tracker=tracker)


@app.command()
def plan(
    source: Annotated[
        str, typer.Argument(metavar="PRESET|CONFIG.yaml", help="a preset's name, or a configuration file")
    ],
    *,
    data: Annotated[str | None, typer.Option(help="rows whose real lengths to plan for")] = None,
    model: Annotated[str | None, typer.Option(help="hub id or local folder of the base model")] = None,
    vram: Annotated[float | None, typer.Option(min=1, help="GiB of a card that is not here; else this machine")] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="how many rows, where not all of the data or none")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any setting, as for run")
    ] = None,
) -> None:
    """Say what a run would take: memory by phase, time and disk, and what to change where it doesn't fit."""
    from rich.console import Console

    from qspin import api
    from qspin.config import load_config, parse_override
    from qspin.planning.plan_change import nearest_change
    from qspin.planning.plan_view import render

    options: dict[str, Any] = {"data.source": data, "model.id": model, "data.limit": rows}
    overrides = {key: value for key, value in options.items() if value is not None}
    overrides |= dict(parse_override(text) for text in settings or [])
    config = load_config(source, overrides)
    found = api.plan(config, vram=vram, read_rows=data is not None)
    Console().print(render(found, None if found.fits else nearest_change(found)))


presets_app = typer.Typer(help="List the presets, or show one.", invoke_without_command=True)
app.add_typer(presets_app, name="presets")


@presets_app.callback()
def presets(context: typer.Context) -> None:
    """List the presets: the size and the licence of each one's model, and what it is for."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console

    from qspin.presets import listed

    console = Console()
    console.print(listed(console.width))
    console.print(
        "\ngated: accept the terms on its hub page, then `hf auth login`. gated?: unknown.\n"
        "`qspin presets show NAME` explains one; `qspin init NAME` makes a file to edit.",
        markup=False,
        highlight=False,
    )


@presets_app.command()
def show(
    source: Annotated[
        str, typer.Argument(metavar="PRESET|CONFIG.yaml", help="a preset's name, or a configuration file")
    ],
) -> None:
    """Print a preset with its reasons, what it builds on, and all that it changes of the defaults."""
    from qspin.presets import shown

    typer.echo(shown(source), nl=False)


@app.command()
def init(
    preset: Annotated[
        str, typer.Argument(metavar="PRESET", help="the preset to begin with; `qspin presets` lists them")
    ],
    *,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="the file to write; it must not exist", callback=a_name)
    ] = Path("qspin.yaml"),
) -> None:
    """Write a configuration to edit: a preset, and under it every setting, commented out."""
    from qspin.presets import write_starter

    write_starter(preset, output)
    typer.echo(f"{output} is {preset} until you edit it; then: qspin run {output} --data FILE --out FOLDER")


@app.command()
def doctor() -> None:
    """Look at all that a run needs of this machine, and say what to do about what it lacks."""
    from rich.console import Console

    from qspin.doctor.doctor import examine
    from qspin.doctor.finding import as_text, verdict

    console = Console()
    findings = []
    for finding in examine():
        console.print(as_text(finding, console.width), soft_wrap=True)
        findings.append(finding)
    console.print(verdict(findings), markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(int(any(finding.level == "problem" for finding in findings)))


@app.command()
def sweep(
    source: Annotated[
        str | None, typer.Argument(metavar="PRESET|CONFIG.yaml", help="a preset's name, or a configuration file")
    ] = None,
    *,
    vary: Annotated[
        list[str],
        typer.Option(
            metavar="KEY=VALUE,VALUE",
            help="a setting and all values to compare, played before or not; several make a grid",
        ),
    ],
    data: Annotated[str | None, typer.Option(help="JSONL, JSON, CSV or Parquet file, or a hub id")] = None,
    out: Annotated[
        Path, typer.Option(help="a folder for all runs; the same command goes on where it stopped", callback=a_name)
    ],
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any setting of all runs, as for run")
    ] = None,
) -> None:
    """Play a run for each combination of settings, sharing what is the same, and compare them."""
    heed_stops(GOES_ON)
    from qspin import api
    from qspin.config import parse_override, parse_vary

    overrides: dict[str, Any] = {} if data is None else {"data.source": data}
    overrides |= dict(parse_override(text) for text in settings or [])
    api.sweep(source, parse_vary(vary), out, overrides=overrides)


@app.command()
def baseline(
    folder: RunFolder,
    *,
    lr: Annotated[
        list[float] | None, typer.Option(help="a learning rate to try, once or more; sft.lr unless one is named")
    ] = None,
) -> None:
    """Train on the same rows without self-play, for as many steps, and set it beside the run's iterations."""
    heed_stops(GOES_ON)
    from qspin import api

    api.baseline(folder, lr or [api.results(folder).config.sft.lr])


@app.command()
def status(folder: Folder) -> None:
    """Say where a run stands, from another terminal while it works, or later."""
    from rich.console import Console

    from qspin.run_dir import RunDir
    from qspin.watch.lines import standing_lines
    from qspin.watch.status import look

    console = Console()
    for line in standing_lines(look(RunDir(folder)), RunDir(folder), console.width):
        console.print(line, soft_wrap=True)


def _numbers(text: str | None) -> Any:
    """`0.1` or `0.1,0.1,5` as it stands on the command line; the configuration judges what is in it."""
    if text is None or "," not in text:
        return text
    return [part.strip() for part in text.split(",")]


for command in (cli_results.compare, cli_results.report, cli_results.export, cli_results.push, cli_trials.chat):
    app.command()(command)
app.command("eval")(cli_trials.evaluate)
app.command()(cli_trials.mtbench)


def main() -> None:
    """The console script: errors that a user can mend become one line, without a traceback."""
    _replace_closed_streams()
    heed_stops()
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal or a pipe in another encoding than UTF-8 ends no run
        sys.stdout.reconfigure(errors="backslashreplace")
    sys.excepthook = show_traceback
    if rank() > 0:
        from qspin.phases.helping import help_out

        help_out()
    try:
        _run_app()
    except QspinError as error:
        print(visible(redacted(f"error: {error}")), file=sys.stderr)  # noqa: T201
        raise SystemExit(1) from None
    except SystemExit as stop:
        if stop.code in CODES:
            leave_stopped(int(stop.code))
        raise


def _replace_closed_streams() -> None:
    """Of a process that was started without them (`<&-` in a shell) Python has None in their place, and the next files
    that are opened would get their numbers, and what is meant for the streams."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: PTH123, SIM115 (for good)


def _run_app() -> None:
    try:
        with launch(), permission_told():
            app()
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        leave_unheard(sys.stdout)
        raise QspinError(
            "the disk is full where the output, temporary files or caches are written; free some space"
        ) from None


if __name__ == "__main__":
    main()
