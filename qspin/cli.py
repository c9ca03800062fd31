"""The command line: parse, call, render, exit code. Everything heavy is imported when a command needs it."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from qspin.errors import QspinError

if TYPE_CHECKING:
    from qspin.config import RunConfig
    from qspin.prepare import Prepared

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Self-play fine-tuning (SPIN) of a 4-bit model on one GPU or a laptop.",
)


@app.callback()
def _root() -> None:
    """Keeps `run` a command of its own while it is the only one."""


@app.command()
def run(
    source: Annotated[
        str | None, typer.Argument(metavar="PRESET|CONFIG.yaml", help="a preset's name, or a configuration file")
    ] = None,
    *,
    data: Annotated[str | None, typer.Option(help="JSONL, JSON, CSV or Parquet file, or a hub id")] = None,
    out: Annotated[Path, typer.Option(help="the run's folder; the same command goes on where it stopped")],
    model: Annotated[str | None, typer.Option(help="hub id or local folder of the base model")] = None,
    iterations: Annotated[int | None, typer.Option(help="rounds of self-play")] = None,
    beta: Annotated[str | None, typer.Option(help="λ of the paper: a number, or one an iteration: 0.1,0.1,5")] = None,
    lr: Annotated[str | None, typer.Option(help="peak learning rate: a number, or one an iteration")] = None,
    seed: Annotated[int | None, typer.Option(help="of sampling, order and initial weights")] = None,
    format: Annotated[str | None, typer.Option(help="shape of the rows, if it is not to be found out")] = None,
    init_adapter: Annotated[str | None, typer.Option(help="PEFT adapter folder to start from")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any other setting, as train.epochs=3")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be done; loads no weights")] = False,
) -> None:
    """Play SPIN: each iteration answers the prompts, and learns to tell the answers from the human ones."""
    from qspin.config import load_config, parse_override

    options: dict[str, Any] = {
        "data.source": data,
        "model.id": model,
        "iterations": iterations,
        "train.beta": _numbers(beta),
        "train.lr": _numbers(lr),
        "seed": seed,
        "data.format": format,
        "model.init_adapter": init_adapter,
    }
    overrides = {key: value for key, value in options.items() if value is not None}
    if model is not None:
        # those of the preset's own model
        overrides |= {"model.package": None, "model.revision": None, "model.architecture": None}
    overrides |= dict(parse_override(text) for text in settings or [])
    config = load_config(source, overrides)

    from qspin.prepare import prepare
    from qspin.record import template_date
    from qspin.run_dir import RunDir

    RunDir(out).check_usable()
    _quiet_libraries()
    prepared = prepare(config, template_date(RunDir(out)))
    if dry_run:
        _show_plan(prepared)
    else:
        _play(prepared, out)


@app.command()
def plan(
    source: Annotated[
        str, typer.Argument(metavar="PRESET|CONFIG.yaml", help="a preset's name, or a configuration file")
    ],
    *,
    data: Annotated[str | None, typer.Option(help="rows whose real lengths to plan for")] = None,
    vram: Annotated[float | None, typer.Option(min=1, help="GiB of a card that is not here; else this machine")] = None,
    rows: Annotated[int | None, typer.Option(min=2, help="how many rows, where not all of the data or none")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any setting, as for run")
    ] = None,
) -> None:
    """Say what a run would take: memory by phase, time and disk, and what to change where it doesn't fit."""
    from rich.console import Console

    from qspin import machine
    from qspin import plan as planner
    from qspin.config import load_config, parse_override

    overrides: dict[str, Any] = {
        key: value for key, value in {"data.source": data, "data.limit": rows}.items() if value is not None
    }
    overrides |= dict(parse_override(text) for text in settings or [])
    config = load_config(source, overrides)
    planner.shape_of(config)  # before anything that takes time
    if data is None:
        lengths = planner.assumed_rows(config.data.limit or planner.ASSUMED_ROWS)
    else:
        _quiet_libraries()
        lengths = planner.rows_of_data(config)
    where = machine.this_machine(config.model) if vram is None else machine.card(vram, config.model)
    found = planner.make_plan(config, where, lengths)
    Console().print(planner.render(found, None if found.fits else planner.nearest_change(found)), soft_wrap=False)


def _play(prepared: Prepared, out: Path) -> None:
    from rich.console import Console

    from qspin import report, spin, view
    from qspin.run_dir import RunDir

    console = Console()
    config = prepared.config
    with view.RunView(console, config.iterations) as progress:
        for note in prepared.notes:
            progress.note(note)
        if config.train.loss == "correlation":
            progress.note(
                "the correlation loss is unbounded below; the run stops when real completions lose "
                f"{config.train.max_real_logp_drop:g} nats (train.max_real_logp_drop)"
            )
        spin.run(prepared, out, progress)
    run_dir = RunDir(out)
    console.print(view.results_table(report.columns(config), report.rows(run_dir, config)))
    shown = report.before_after(run_dir, prepared.heldout_prompts, config.iterations - 1, config.evaluation.shown)
    if shown:
        console.print(view.completions_table(shown))
    console.print(
        f"adapter: {run_dir.iteration(config.iterations - 1).adapter}   table: {run_dir.summary}", markup=False
    )


def _show_plan(prepared: Prepared) -> None:
    from rich.console import Console

    from qspin.config import dump_config
    from qspin.view import example_text

    console = Console()
    console.print(dump_config(prepared.config), markup=False, highlight=False, soft_wrap=True)
    example = prepared.train[0]
    console.print(f"Example {example.record_id}: prompt, completion, end-of-turn", style="bold", markup=False)
    console.print(example_text(prepared.renderer.pieces(example)))
    console.print()
    for note in prepared.notes:
        console.print(f"note: {note}", markup=False)
    console.print(
        f"{len(prepared.train)} training rows, {len(prepared.heldout)} held out, {len(prepared.rejects)} left out",
        markup=False,
    )
    for line in _steps(prepared.config, len(prepared.train)):
        console.print(line, markup=False)


def _steps(config: RunConfig, rows: int) -> list[str]:
    """What each iteration will do, in numbers."""
    from qspin.config import at_iteration

    lines = []
    for iteration in range(config.iterations):
        pairs = rows * (min(iteration, config.train.mix_previous) + 1)
        steps = -(-pairs // config.train.batch_size) * config.train.epochs
        lines.append(
            f"iteration {iteration}: generate {rows} completions, score {pairs} pairs, train {steps} steps of "
            f"{config.train.batch_size} pairs (beta {at_iteration(config.train.beta, iteration):g}, "
            f"lr {at_iteration(config.train.lr, iteration):g})"
        )
    return lines


def _numbers(text: str | None) -> Any:
    """`0.1` or `0.1,0.1,5` as it stands on the command line; the configuration judges what is in it."""
    if text is None or "," not in text:
        return text
    return [part.strip() for part in text.split(",")]


def _quiet_libraries() -> None:
    from qspin.base import quiet_libraries

    quiet_libraries()


def _on_terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    raise SystemExit(_TERMINATED)


def main() -> None:
    """The console script: errors that a user can mend become one line, without a traceback."""
    signal.signal(signal.SIGTERM, _on_terminate)
    try:
        app()
    except QspinError as error:
        _fail(f"error: {error}", 1)
    except SystemExit as stop:
        if stop.code in {_INTERRUPTED, _TERMINATED}:
            _fail("stopped; the same command goes on from the last finished piece", int(stop.code))
        raise


_INTERRUPTED, _TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM


def _fail(message: str, code: int) -> NoReturn:
    print(message, file=sys.stderr)  # noqa: T201
    raise SystemExit(code)


if __name__ == "__main__":
    main()
