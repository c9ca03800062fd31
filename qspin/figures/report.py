"""A run's results as tables: SUMMARY.md, and its first tables for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qspin.config import RunConfig, at_iteration
from qspin.figures import mtbench_result
from qspin.figures.benchmarks import Score, SetUp, all_kept, gain, shown
from qspin.figures.evaluation import change, panel, real_panel
from qspin.figures.markdown import plain, table
from qspin.figures.panel import Figure
from qspin.figures.players import Player, best_rival, chosen, kept, players, rivals
from qspin.figures.verdict import RATED, against, verdict
from qspin.run_dir import IterationDir, RunDir
from qspin.units import GIB

PHASES = ("generate", "score", "train", "evaluate")
HELD = "its resident memory, on a GPU what torch's tensors took there"
MAIN = 2  # so many tables are for the terminal
BENCHMARKS = "Benchmarks"  # the table that comes next, if tasks were put to players
TOLD = {"base": "what the run began with", "sft": "the warm start"}
REAL = "real"  # the row of the real completions

Format = Callable[[Figure], str]


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, and what the figure under it means."""

    heading: str
    meaning: str

    @property
    def note(self) -> str:
        return f"{self.heading}: {self.meaning}"


@dataclass(frozen=True, slots=True)
class Results:
    """One table: a row for each player that has been measured."""

    title: str
    columns: tuple[Column, ...]
    rows: list[list[str]]
    of_heldout_rows: bool = True

    @property
    def notes(self) -> list[str]:
        return [column.note for column in self.columns[1:]]


def _told(spec: str) -> Format:
    return lambda figure: figure.told(spec)


_two, _three, _signed, _whole = map(_told, (".2f", ".3f", "+.3f", ".0f"))


def _share(figure: Figure) -> str:
    return f"{figure.value:.0%}"


def _percent(figure: Figure) -> str:
    return f"{figure.value:.0%} [{100 * figure.low:.0f}, {100 * figure.high:.0f}]"


_Fields = tuple[tuple[str, Format, Column], ...]  # the name of a figure, how it looks, where it stands

GAME: _Fields = (
    ("nll", _three, Column("NLL", "nats a token of the real completions; lower is better")),
    ("reward_auc", _two, Column("reward AUC", "how surely its implicit reward tells the real completions from its "
     "opponent's, which it was trained to do; 0.5 is chance, 1 is always")),
)  # fmt: skip
WRITING: _Fields = (
    ("two_sample_auc", _two, Column("2-sample AUC", "how surely a classifier tells its completions from the real ones; "
     "0.5 is the best (it can't), 1 the worst")),
    ("f1", _two, Column("token F1", "words that its likeliest (greedy) completion shares with the real one; higher is "
     "better")),
    ("tokens", _whole, Column("tokens", "mean length, a player's at most generation.max_new_tokens; best near the "
     "real ones'")),
    ("ended", _percent, Column("ended", "share that end by themselves; best near the real ones'")),
)  # fmt: skip
_IN_STYLE = Column("style", "share in the data's style (evaluation.style); higher is better")
STYLE: _Fields = (("style", _share, _IN_STYLE),)
STYLE_INTERVAL: _Fields = (("style", _percent, _IN_STYLE),)
DETAILS: _Fields = (
    ("length_auc", _two, Column("length AUC", "the two-sample test on length alone; 0.5 is the best. If it is as far "
     "from 0.5 as the 2-sample AUC, length may be all that tells them apart")),
    ("distinct_1", _three, Column("distinct-1", "different words over all words; best near the real ones', among "
     "completions of like length")),
    ("distinct_2", _three, Column("distinct-2", "the same of pairs of words")),
    ("greedy_tokens", _whole, Column("greedy tokens", "mean length of its likeliest completions")),
    ("greedy_ended", _percent, Column("greedy ended", "share of them that end by themselves")),
    ("kl", _three, Column("KL", "how far it went from its opponent, nats a token: KL(opponent ‖ player)")),
)  # fmt: skip
CHANGES = {"two_sample_auc": "2-sample AUC", "f1": "token F1", "tokens": "tokens", "ended": "ended"}


def tables(run_dir: RunDir, config: RunConfig) -> list[Results]:
    """The main figures in two tables of at most 80 columns, then the details. All are of the reported half."""
    rival = best_rival(run_dir, config)
    measured = players(run_dir, config) + (rival[1] if rival else [])
    warm = ", sft: after its supervised warm start" if config.sft.epochs else ""
    trained = f"; s and a number: supervised training as long, at {rival[0]}" if rival else ""
    begun = "untouched" if config.model.init_adapter is None else "with the adapter that the run began with"
    player = Column("player", f"base: {begun}{warm}; a number: what that iteration ended with{trained}")
    style, interval = ((), ()) if config.evaluation.style is None else (STYLE, STYLE_INTERVAL)
    found = {
        item.name: panel(item.evaluation, "report", seed=config.seed, style=config.evaluation.style)
        for item in measured
    }
    real = real_panel(measured[0].evaluation, "report", seed=config.seed, style=config.evaluation.style)

    def table(title: str, fields: _Fields, *, with_real: bool) -> Results:
        rows = {**found, REAL: real} if with_real else found
        return Results(
            title,
            (player, *(column for _, _, column in fields)),
            [
                [name, *(look(figures[key]) if key in figures else "" for key, look, _ in fields)]
                for name, figures in rows.items()
            ],
        )

    game = table("Held-out rows: likelihood, and the game", GAME, with_real=False)
    against = [_change(measured[0], item, "nll", config) for item in measured]
    return [
        _with_column(game, 2, Column("change", "of the NLL against the base's"), against),
        table("Held-out rows: what it writes", (*WRITING, *style), with_real=True),
        *_benchmarks(run_dir),
        table("Details", (*DETAILS, *interval), with_real=True),
        _changes(measured, player, config),
        _training(measured, player, config),
        *_rates(run_dir, config),
        *from_parts(mtbench_result.all_tables(run_dir.trials)),
    ]


def from_parts(parts: Iterable[mtbench_result.Table]) -> list[Results]:
    """Tables as they are made where this module is not known."""
    return [
        Results(title, tuple(Column(*column) for column in columns), rows, of_heldout_rows=False)
        for title, columns, rows in parts
    ]


def _rates(run_dir: RunDir, config: RunConfig) -> list[Results]:
    """The best round of each learning rate that supervised training was tried with."""
    found = rivals(run_dir)
    if not found:
        return []
    fields = [field for field in (*GAME, *WRITING) if field[0] in RATED]
    rows = []
    for rate, rounds in found.items():
        player = chosen(rounds, config)
        figures = panel(player.evaluation, "report", seed=config.seed)
        told = (look(figures[key]) for key, look, _ in fields)
        rows.append([f"{rate}", f"{player.name} of {len(rounds)}", *told])
    columns = (
        Column("rate", "learning rate of the supervised baseline"),
        Column("round", "the one that is kept, as an iteration is (evaluation.keep)"),
        *(column for _, _, column in fields),
    )
    return [Results("Supervised training, by rate", columns, rows)]


def _benchmarks(run_dir: RunDir) -> list[Results]:
    """Of every task that was put to a player."""
    who = ["base", "sft", *map(str, range(run_dir.iterations_done()))]
    outcomes = {name: all_kept(run_dir.player(name)) for name in who}
    set_ups = list(dict.fromkeys(outcome.set_up for found in outcomes.values() for outcome in found))
    return [benchmarks(run_dir, [name for name in who if outcomes[name]], set_ups)] if set_ups else []


def benchmarks(run_dir: RunDir, who: Sequence[str], set_ups: Sequence[SetUp]) -> Results:
    """A row for each figure of each task, a column for each player, and one for how far it is from the base."""
    found: dict[tuple[SetUp, str, str], dict[str, Score]] = {}
    for name in who:
        for outcome in all_kept(run_dir.player(name)):
            for score in outcome.scores if outcome.set_up in set_ups else ():
                if shown(score):
                    found.setdefault((outcome.set_up, score.task, score.metric), {})[name] = score
    rows = []
    for set_up in set_ups:
        for (_, task, metric), scores in ((key, scores) for key, scores in found.items() if key[0] == set_up):
            first = next(iter(scores.values()))
            row = [task, ", ".join(filter(None, [f"{first.shots}-shot", set_up.told])), metric, str(first.documents)]
            for name in who:
                row.append(_with_error(scores[name].value, scores[name].error) if name in scores else "")
                if name != "base" and "base" in who:
                    both = name in scores and "base" in scores
                    row.append(_with_error(*gain(scores["base"], scores[name]), sign="+") if both else "")
            rows.append(row)
    columns = [
        Column("task", "of EleutherAI's lm-evaluation-harness"),
        Column("set-up", "examples before each question; chat: asked through the chat template"),
        Column("metric", "higher is better, unless it is a perplexity or bits"),
        Column("n", "documents"),
    ]
    for name in who:
        columns.append(Column(name, f"{TOLD.get(name, f'iteration {name}')}, ± standard error"))
        if name != "base" and "base" in who:
            columns.append(Column("change", "against the base, on the same documents"))
    return Results(BENCHMARKS, tuple(columns), rows, of_heldout_rows=False)


def _with_error(value: float, error: float | None, *, sign: str = "") -> str:
    # a narrow terminal breaks it at the space
    return f"{value:{sign}.3f}" + ("" if error is None else f" ±{error:.3f}")


def sentences(run_dir: RunDir, config: RunConfig) -> list[str]:
    """What happened, and how the iteration that is kept stands beside supervised training, if that was tried."""
    measured, rival = players(run_dir, config), best_rival(run_dir, config)
    said, ours = verdict(measured, config), kept(measured, config)
    if rival and ours:
        said.append(against(ours, chosen(rival[1], config), config))
    return said


def _with_column(table: Results, place: int, column: Column, cells: Sequence[str]) -> Results:
    columns = (*table.columns[:place], column, *table.columns[place:])
    rows = [[*row[:place], cell, *row[place:]] for row, cell in zip(table.rows, cells, strict=True)]
    return Results(table.title, columns, rows)


def _change(first: Player, player: Player, name: str, config: RunConfig) -> str:
    if player is first:
        return ""
    return _signed(change(first.evaluation, player.evaluation, name, "report", seed=config.seed))


def _changes(measured: Sequence[Player], player: Column, config: RunConfig) -> Results:
    meaning = {"two_sample_auc": "of its distance from 0.5; below 0 is better", "f1": "above 0 is better"}
    columns = [
        Column(heading, meaning.get(name, "towards the real ones' is better")) for name, heading in CHANGES.items()
    ]
    rows = [[item.name, *(_change(measured[0], item, name, config) for name in CHANGES)] for item in measured]
    return Results("Changes against the base, on the same rows", (player, *columns), rows)


def _training(measured: Sequence[Player], player: Column, config: RunConfig) -> Results:
    columns = (
        Column("margin", "mean margin in the last epoch of training / on held-out rows; if the first is far "
               "higher, it learned rows by heart"),
        Column("seconds", " / ".join(PHASES)),
        Column("GiB", f"the most that the process held meanwhile, with all that was there before: {HELD}"),
    )  # fmt: skip
    rows = []
    for item in measured:
        seconds, peaks = item.folder.seconds(), item.folder.peaks()
        times = " / ".join(f"{seconds[phase]:.0f}" if phase in seconds else "-" for phase in PHASES)
        memory = " / ".join(f"{peaks[phase] / GIB:.1f}" if phase in peaks else "-" for phase in PHASES)
        rows.append([item.name, _margins(item, config), times, memory])
    return Results("Training", (player, *columns), rows)


def _margins(player: Player, config: RunConfig) -> str:
    trained = _last_margin(player.folder)
    if trained is None:
        return ""
    gap = panel(player.evaluation, "report", seed=config.seed)["gap"].value
    return f"{trained:.2f} / {at_iteration(config.train.beta, int(player.name)) * gap:.2f}"


def _last_margin(folder: IterationDir) -> float | None:
    """None if there was no game, or its metrics are lost."""
    steps = folder.steps()
    last = [step["margin"] for step in steps if step["epoch"] == steps[-1]["epoch"] and "margin" in step]
    return sum(last) / len(last) if last else None


def measured_on(run_dir: RunDir, config: RunConfig) -> str:
    """Which rows the tables are of, as a sentence."""
    first = players(run_dir, config)[0].evaluation
    rows = len(first.rows("report"))
    return (
        f"Measured on {rows} of {len(first.prompts)} held-out rows, with 95% bootstrap intervals over prompts (of "
        "distinct-n by the jackknife); by the others the run chooses."
    )


def played(measured: Sequence[Player], config: RunConfig) -> str:
    """How many iterations there are, of how many; fewer may be asked for now than were played before."""
    count = sum(player.name.isdigit() for player in measured)
    return f"{count} of {max(count, config.iterations)} iterations"


def summary(run_dir: RunDir, config: RunConfig) -> str:
    """SUMMARY.md."""
    record = run_dir.read_record()
    data = record["data"]
    lines = [
        f"# {plain(record['base']['name'])}: {played(players(run_dir, config), config)} of self-play",
        "",
        f"{data['train_rows']} training rows, {data['heldout_rows']} held out, {data['rejected_rows']} left out "
        "(rejects.jsonl).",
        "",
    ]
    said = sentences(run_dir, config)
    lines += [*(f"- {sentence}" for sentence in said), ""] if said else []
    lines += [measured_on(run_dir, config), ""]
    for results in tables(run_dir, config):
        lines += [f"## {results.title}", "", markdown(results), ""]
    return "\n".join(lines)


def markdown(results: Results) -> str:
    """A table and the meaning of its columns."""
    meanings = "\n".join(f"- **{column.heading}**: {column.meaning}" for column in results.columns)
    return f"{table([column.heading for column in results.columns], results.rows)}\n\n{meanings}"


@dataclass(frozen=True, slots=True)
class Answers:
    """One held-out prompt with the real completion or players' own, by who made them."""

    prompt: str
    by: dict[str, str]


def answers(who: Sequence[Player], prompts: Sequence[str], count: int) -> list[Answers]:
    """The first held-out prompts, answered by some players."""
    return [
        Answers(prompt, {player.told: player.evaluation.completions[row] for player in who})
        for row, prompt in enumerate(prompts[:count])
    ]
