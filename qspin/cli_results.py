"""Commands on what a run came to: compare, report, export, push. Registered by cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from qspin.console import RunFolder, a_name, quiet_libraries, tell
from qspin.errors import QspinError
from qspin.exports.targets import Onto, Target
from qspin.stopping import GOES_ON, heed_stops


def compare(
    folder: RunFolder,
    *,
    iterations: Annotated[
        str | None, typer.Option(help="numbers, as 0,2, beside the base; by default the one that the run keeps")
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="held-out prompts to show")] = 5,
) -> None:
    """Show held-out prompts answered by the base and by iterations, side by side."""
    from rich.console import Console

    from qspin.exports.recipe import recorded_config
    from qspin.figures.players import chosen_iteration, players
    from qspin.figures.report import answers
    from qspin.figures.terminal import completions_table
    from qspin.record import heldout_prompts
    from qspin.run_dir import RunDir

    run_dir = RunDir(folder)
    kept = chosen_iteration(run_dir, None)  # which refuses a run that has none yet
    names = [str(kept)] if iterations is None else [name.strip() for name in iterations.split(",")]
    # the base is shown in any case
    chosen = {str(chosen_iteration(run_dir, name, "--iterations")) for name in names if name not in {"", "base"}}
    config = recorded_config(run_dir)
    quiet_libraries()
    prompts = heldout_prompts(run_dir, config, _note)
    who = [player for player in players(run_dir, config) if player.name in {"base", *chosen}]
    if prompts is None:
        prompts = [f"row {number + 1}" for number in range(len(who[0].evaluation.completions))]
    Console().print(completions_table(answers(who, prompts, rows)))


def report(
    folder: RunFolder,
    *,
    out: Annotated[
        Path | None, typer.Option(help="the file to write; report.html in the run's folder", callback=a_name)
    ] = None,
) -> None:
    """Write one HTML file to look at: figures, plots, answers before and after, and what the run was made of."""
    from qspin import api

    typer.echo(f"report: {api.report(folder, out, say=_note)}")


def _note(text: str) -> None:
    from rich.console import Console

    tell(Console(stderr=True), f"note: {text}")


def export(
    folder: RunFolder,
    *,
    to: Annotated[Target, typer.Option(help="what to make of it")],
    iteration: Annotated[
        str | None, typer.Option(help="a number, last or best; by default as the run keeps (evaluation.keep)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="a new folder; by default beside the run's", callback=a_name)] = None,
    onto: Annotated[
        Onto, typer.Option(help="the base's original weights, or the dequantised ones that the adapter was trained on")
    ] = "original",
    dtype: Annotated[
        str | None, typer.Option(help="merged-16bit: float32; gguf and ollama: f32, f16, bf16, q8_0, q4_k_m")
    ] = None,
) -> None:
    """Write a finished iteration as an adapter, a merged model, a GGUF file or a folder for Ollama."""
    from rich.console import Console

    from qspin.exports import compare
    from qspin.exports.export import export as write_export
    from qspin.figures.players import chosen_iteration
    from qspin.files import read_json
    from qspin.run_dir import RunDir

    heed_stops("stopped; nothing was written, and the same command begins anew")
    quiet_libraries()
    console = Console()
    run_dir = RunDir(folder.resolve())
    index = chosen_iteration(run_dir, iteration)
    written = write_export(
        compare.Trained(run_dir, index),
        to=to,
        out=out or run_dir.path.with_name(f"{run_dir.path.name}-iteration-{index}-{to}"),
        onto=onto,
        dtype=dtype,
        say=lambda text: tell(console, text),
    )
    if (written / compare.CHECK).is_file():
        check = read_json(written / compare.CHECK)
        tell(console, compare.summary(check))
        if compare.drifted(check):
            Console(stderr=True).print(compare.WARNING, style="bold red", markup=False, highlight=False)
    tell(console, f"exported: {written}")


def push(
    run: RunFolder,
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="the repository on the Hub; made if need be")],
    *,
    what: Annotated[
        Literal["adapter", "merged"], typer.Option(help="the adapter alone, or the base with it merged in")
    ] = "adapter",
    dataset: Annotated[
        bool, typer.Option("--dataset", help="the pairs of the iterations instead, as a data set")
    ] = False,
    iteration: Annotated[
        str | None, typer.Option(help="a number, last or best; by default as the run keeps (evaluation.keep)")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="only you and your organisation can see it")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="write what would be uploaded; upload nothing")] = False,
) -> None:
    """Publish a model or a run's pairs on the Hugging Face Hub, with a card. Log in first: hf auth login."""
    if dataset and what == "merged":
        raise QspinError("--dataset publishes pairs and --what merged a model: take one of them")
    heed_stops(GOES_ON)
    from rich.console import Console

    from qspin.exports.push import Content, check_login, make_upload, send
    from qspin.run_dir import RunDir

    quiet_libraries()
    if not dry_run:
        check_login(repo)
    console = Console()
    content: Content = "dataset" if dataset else what
    upload = make_upload(RunDir(run), repo, content=content, iteration=iteration, say=lambda text: tell(console, text))
    for name in upload.files:
        tell(console, f"{(upload.folder / name).stat().st_size:>15,} bytes  {name}")
    tell(console, f"for the {upload.kind} {upload.repo}, in {upload.folder}")
    if not dry_run:
        tell(console, send(upload, private=private))
