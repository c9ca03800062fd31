"""A run's results as tables: SUMMARY.md, and the same rows for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qspin.config import RunConfig
from qspin.errors import QspinError
from qspin.evaluate import Evaluation, nll_change
from qspin.files import read_json, read_jsonl
from qspin.markdown import plain, table
from qspin.run_dir import IterationDir, RunDir

PHASES = ("generate", "score", "train", "evaluate")


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, and what the figure under it means."""

    heading: str
    meaning: str


def columns(config: RunConfig) -> list[Column]:
    warm = ", the base after its supervised warm start (sft)" if config.sft.epochs else ""
    found = [
        Column("player", f"the untouched base{warm}, or the policy that an iteration ended with"),
        Column("NLL", "nats a token of the real held-out completions; lower is better"),
        Column("change", "of the NLL against the base, with its 95% bootstrap interval over rows"),
        Column("ended", "share of its own held-out completions that end by themselves"),
        Column("tokens", "mean length of its held-out completions / of the real ones"),
        Column("margin", "mean margin in the last epoch of training"),
        Column("seconds", "generate / score / train / evaluate"),
    ]
    if config.evaluation.style is not None:
        found.insert(4, Column("style", "share of its held-out completions in the data's style (evaluation.style)"))
    return found


def rows(run_dir: RunDir, config: RunConfig) -> list[list[str]]:
    """One row a player that has been evaluated, the base first."""
    players = {"base": run_dir.base, "sft": run_dir.warm_start}
    players |= {str(index): run_dir.iteration(index) for index in range(config.iterations)}
    base = Evaluation(**read_json(run_dir.base.evaluation))
    return [
        _row(name, folder, Evaluation(**read_json(folder.evaluation)), base, config)
        for name, folder in players.items()
        if folder.evaluation.is_file()
    ]


def _row(name: str, folder: IterationDir, player: Evaluation, base: Evaluation, config: RunConfig) -> list[str]:
    change = "" if name == "base" else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*nll_change(base, player))
    margin = ""
    if folder.metrics.is_file():
        steps = read_jsonl(folder.metrics)
        last = [step["margin"] for step in steps if step["epoch"] == steps[-1]["epoch"] and "margin" in step]
        margin = f"{sum(last) / len(last):.2f}" if last else ""
    seconds = folder.seconds()
    real = sum(player.real_tokens) / len(player.real_tokens)
    generated = sum(player.generated_tokens) / len(player.generated_tokens)
    cells = [
        name,
        f"{player.nll:.3f}",
        change,
        f"{player.ended_share:.0%}",
        f"{generated:.0f} / {real:.0f}",
        margin,
        " / ".join(f"{seconds[phase]:.0f}" if phase in seconds else "-" for phase in PHASES),
    ]
    if config.evaluation.style is not None:
        cells.insert(4, f"{player.style_share(config.evaluation.style):.0%}")
    return cells


def chosen_iteration(run_dir: RunDir, wanted: str) -> int:
    """`last`, `best` (lowest held-out NLL) or a number → a finished iteration.

    Raises:
        QspinError: the folder is not one of a run, or there is no such iteration.
    """
    if not run_dir.record.is_file():
        raise QspinError(f"{run_dir.path}: not the folder of a run, it has no {run_dir.record.name}")
    done: list[int] = []
    while run_dir.iteration(len(done)).done:
        done.append(len(done))
    if not done:
        raise QspinError(f"{run_dir.path} has no finished iteration yet; the command that began the run goes on")
    if wanted == "last":
        return done[-1]
    if wanted == "best":
        return min(done, key=lambda index: Evaluation(**read_json(run_dir.iteration(index).evaluation)).nll)
    if wanted not in map(str, done):
        raise QspinError(
            f"--iteration: {wanted!r} is not finished in {run_dir.path}; last, best or 0 to {done[-1]} are"
        )
    return int(wanted)


def summary(run_dir: RunDir, config: RunConfig) -> str:
    """SUMMARY.md."""
    headings = columns(config)
    played = sum(run_dir.iteration(index).evaluation.is_file() for index in range(config.iterations))
    record = read_json(run_dir.record)
    data = record["data"]
    meanings = [f"- **{column.heading}**: {column.meaning}" for column in headings]
    return "\n".join(
        [
            f"# {plain(record['base']['name'])}: {played} of {config.iterations} iterations of self-play",
            "",
            f"{data['train_rows']} training rows, {data['heldout_rows']} held out, {data['rejected_rows']} left out "
            "(rejects.jsonl).",
            "",
            table([column.heading for column in headings], rows(run_dir, config)),
            "",
            *meanings,
            "",
        ]
    )


@dataclass(frozen=True, slots=True)
class Shown:
    """One held-out prompt with its completion before and after."""

    prompt: str
    before: str
    after: str


def before_after(run_dir: RunDir, prompts: Sequence[str], last: int, count: int) -> list[Shown]:
    """The first held-out prompts, answered by the base and by the last iteration."""
    before = Evaluation(**read_json(run_dir.base.evaluation)).completions
    after = Evaluation(**read_json(run_dir.iteration(last).evaluation)).completions
    return [Shown(*both) for both in zip(prompts[:count], before, after, strict=False)]
