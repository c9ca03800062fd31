"""qspin from Python: play a run, see what came of it, talk with its players, take them elsewhere.

    import qspin

    config = qspin.load_config("smollm2-135m", {"data.source": "mine.jsonl", "iterations": 2})
    results = qspin.run(config, "runs/mine")
    print(results.kept, results.sentences, results.figures["1"]["nll"])
    print(qspin.load("runs/mine").generate(["Why is the sky blue?"]))
    qspin.export("runs/mine", to="gguf", out="mine-gguf")

Each function does what the command of its name does, in the same folders: a run begun here can be gone on with there.
What can't be done is a `QspinError`, whose text is the line that the command shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qspin.config import RunConfig, by_their_names, load_kept
from qspin.errors import QspinError, permission_told
from qspin.exports.targets import Onto, Target
from qspin.run_dir import RunDir
from qspin.safe_text import check_path

if TYPE_CHECKING:  # what is heavy is imported by the function that needs it
    from qspin.figures.panel import Figure
    from qspin.planning.plan import Plan
    from qspin.trials.loaded import Loaded
    from qspin.watch.progress import Progress

Which = int | Literal["last", "best"]  # of the finished iterations


class Results:
    """What a run has come to so far, read from its folder anew each time."""

    @permission_told()
    def __init__(self, path: Path | str) -> None:
        """Raises a QspinError: this is not the folder of a run."""
        self._dir = RunDir(_path(path))
        self._dir.check_run()
        self.path = self._dir.path

    @property
    def config(self) -> RunConfig:
        """As the run was last started."""
        return load_kept(self._dir.config)

    @property
    def figures(self) -> dict[str, dict[str, Figure]]:
        """Player (base, sft, or an iteration's number) → name of a figure → its value with a 95% interval over the
        held-out rows that are reported. docs/measuring.md has the names, units and which way is good."""
        from qspin.figures.evaluation import panel
        from qspin.figures.players import players

        config = self.config
        return {
            player.name: panel(player.evaluation, "report", seed=config.seed, style=config.evaluation.style)
            for player in players(self._dir, config)
        }

    @property
    def kept(self) -> int | None:
        """The iteration that is exported unless another is named (`evaluation.keep`); None before the first."""
        from qspin.figures.players import kept, players

        found = kept(players(self._dir, self.config), self.config)
        return None if found is None else int(found.name)

    @property
    def sentences(self) -> list[str]:
        """What happened, in words."""
        from qspin.figures.report import sentences

        return sentences(self._dir, self.config)

    @property
    def markdown(self) -> str:
        """SUMMARY.md: every table, and what the columns mean; a QspinError before anyone is measured."""
        from qspin.figures.report import summary

        if not self.figures:
            raise QspinError(f"{self.path}: nobody has been measured yet; the command that began the run goes on")
        return summary(self._dir, self.config)

    def adapter(self, iteration: Which | None = None) -> Path:
        """The folder of an iteration's adapter in PEFT's format; by default of the one that is kept.

        Raises:
            QspinError: the iteration is not finished.
        """
        from qspin.figures.players import chosen_iteration

        return self._dir.iteration(chosen_iteration(self._dir, _told(iteration))).adapter


@permission_told()
def run(config: RunConfig, out: Path | str, *, progress: Progress | None = None) -> Results:
    """Play self-play into a folder, or go on where it stopped.

    Args:
        progress: hears how it goes on (`qspin.Silent()` says nothing); None shows it, as `qspin run` does.

    Raises:
        QspinError: the configuration, the data, the base or the folder can't be used, or memory or the disk ran out.
    """
    from qspin import spin
    from qspin.record import prepare_run
    from qspin.watching import watch_run

    _check_config(config)
    run_dir = RunDir(_path(out, "--out"))
    run_dir.check_usable()
    _quiet_libraries()
    prepared = prepare_run(config, run_dir, keep_rejects=True)
    if progress is None:
        watch_run(prepared, run_dir.path, as_json=False, tracker=None)
    else:
        spin.run(prepared, run_dir.path, progress)
    return Results(run_dir.path)


@permission_told()
def baseline(path: Path | str, rates: Sequence[float], *, progress: Progress | None = None) -> Results:
    """Train without self-play on a run's rows, for as many steps, at each learning rate; see `run` for the rest."""
    from qspin.experiments import baseline as supervised
    from qspin.exports.recipe import recorded_config
    from qspin.files import check_writable
    from qspin.record import prepare_run
    from qspin.watching import watch_baseline

    run_dir = RunDir(_path(path))
    run_dir.check_run()
    if not isinstance(rates, list | tuple) or not all(isinstance(rate, Real) for rate in rates):
        raise QspinError(f"rates: a list of learning rates is wanted, as [1e-4]; got {rates!r:.80}")
    if not rates or not all(0 < rate < 1 for rate in rates):
        raise QspinError("--lr: a learning rate is between 0 and 1, as 1e-4")
    check_writable(run_dir.path)
    _quiet_libraries()
    prepared = prepare_run(recorded_config(run_dir), run_dir, keep_rejects=False)
    if progress is None:
        watch_baseline(prepared, run_dir.path, rates)
    else:
        supervised.baseline(prepared, run_dir.path, progress, rates)
    return Results(run_dir.path)


@permission_told()
def sweep(
    source: str | Path | None,
    vary: Mapping[str, Sequence[Any]],
    out: Path | str,
    *,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Results]:
    """Play a run for each combination of settings, shown as `qspin sweep` shows it; the results by folder name.

    Args:
        source, overrides: as for `load_config`.
        vary: setting → its values, as `{"train.beta": [0.1, 1]}`.
    """
    from qspin.experiments.sweep import as_begun, grid
    from qspin.watching import watch_sweep

    folder = _path(out, "--out")
    cells = grid(source, by_their_names(overrides), vary)
    if RunDir(folder).record.is_file():
        raise QspinError(f"--out: {folder} is a run, and a sweep is a folder of runs; name another folder")
    cells = as_begun(cells, folder)
    for cell in cells:
        cell.run_dir(folder).check_usable()
    _quiet_libraries()
    watch_sweep(cells, folder)
    return {cell.name: Results(cell.run_dir(folder).path) for cell in cells}


def results(path: Path | str) -> Results:
    """Of a run that was played before, or is being played."""
    return Results(path)


@permission_told()
def load(
    path: Path | str, player: str | int | None = None, *, say: Callable[[str], None] = lambda _text: None
) -> Loaded:
    """A run's base in memory, with a player in its slot: base, sft, last, best or an iteration's number; None is the
    iteration that is kept. `.generate(prompts)` answers, `.seat(player)` changes who does.

    Args:
        say: hears of it if the base is not bit by bit that of the run, as another device may make it.
    """
    from qspin.trials.loaded import Loaded

    _quiet_libraries()
    return Loaded.open(RunDir(_path(path)), player, say)


@permission_told()
def plan(config: RunConfig, *, vram: float | None = None, read_rows: bool = True) -> Plan:
    """Memory by phase, time and disk of a run, before the model is downloaded.

    Args:
        vram: GiB of a card that is not here; None plans for this machine, which is measured in a few seconds.
        read_rows: whether to plan for the lengths of the configuration's rows. Otherwise, or if it names no source,
            `data.limit` or 1,000 rows of assumed lengths are planned for.
    """
    from qspin import machine
    from qspin.planning import plan as planner
    from qspin.planning import plan_rows

    if vram is not None and not (isinstance(vram, int | float) and 1 <= vram < math.inf):  # NaN is neither
        raise QspinError(f"vram={vram!r:.80}: name the GiB of a card, at least 1")
    _check_config(config)
    planner.shape_of(config)  # before anything that takes time
    if read_rows and config.data.source is not None:
        _quiet_libraries()
        rows = plan_rows.rows_of_data(config)
    else:
        rows = plan_rows.assumed_rows(config.data.limit or plan_rows.ASSUMED_ROWS, config.data.source)
    where = machine.this_machine(config.model) if vram is None else machine.card(vram, config.model)
    return planner.make_plan(config, where, rows)


@permission_told()
def report(path: Path | str, out: Path | str | None = None, *, say: Callable[[str], None] = lambda _text: None) -> Path:
    """Write a run's one HTML file, `report.html` in its folder unless `out` says where; its path.

    Args:
        say: hears why the prompts are not in it, if the run's data is not to be had as it was.
    """
    from qspin.exports.recipe import recorded_config
    from qspin.figures.page import page
    from qspin.files import check_place, write_text
    from qspin.record import heldout_prompts

    run_dir = RunDir(_path(path))
    run_dir.check_run()
    target = run_dir.path / "report.html" if out is None else _path(out, "--out")
    if target.is_dir():
        raise QspinError(f"--out: {target} is a folder; name a file")
    if target.suffix not in {".html", ".htm"}:  # no slip of the keys writes over a run's record, or somebody's rows
        raise QspinError(f"--out: {target} must end in .html")
    check_place(target.parent, "name another folder")
    config = recorded_config(run_dir)
    _quiet_libraries()
    text = page(run_dir, config, heldout_prompts(run_dir, config, say))
    try:
        write_text(target, text)
    except OSError as error:
        raise QspinError(f"--out: {target} can't be written: {error.strerror}") from None
    return target


@permission_told()
def export(
    path: Path | str,
    *,
    to: Target,
    out: Path | str,
    iteration: Which | None = None,
    onto: Onto = "original",
    dtype: str | None = None,
) -> Path:
    """Write an iteration, by default the one that is kept, as a model of its own into a new folder; see export.py.
    The folder's merge-check.json says how far it is from the trained one."""
    from qspin.exports import export as exporting
    from qspin.exports.compare import Trained
    from qspin.figures.players import chosen_iteration

    _quiet_libraries()
    run_dir, target = RunDir(_path(path).resolve()), _path(out, "--out")
    index = chosen_iteration(run_dir, _told(iteration))
    return exporting.export(Trained(run_dir, index), to=to, out=target, onto=onto, dtype=dtype)


@permission_told()
def push(
    path: Path | str,
    repo: str,
    *,
    content: Literal["adapter", "merged", "dataset"] = "adapter",
    iteration: Which | None = None,
    private: bool = False,
) -> str:
    """Publish a run's adapter, merged model or pairs on the Hugging Face Hub with a card; where it can be seen."""
    from qspin.exports.push import check_login, make_upload, send

    run_dir = RunDir(_path(path))
    run_dir.check_run()
    _quiet_libraries()
    check_login(repo)
    upload = make_upload(run_dir, repo, content=content, iteration=_told(iteration), say=lambda _text: None)
    return send(upload, private=private)


def _path(path: Path | str, option: str = "RUN") -> Path:
    """As the command line takes one."""
    if not isinstance(path, str | Path):
        raise QspinError(f"{option}: a path is wanted, as a text or a Path; got {path!r:.80}")
    return check_path(path, option)


def _check_config(config: RunConfig) -> None:
    if not isinstance(config, RunConfig):
        raise QspinError(f"a configuration is wanted, as qspin.load_config makes it of a preset; got {config!r:.80}")


def _quiet_libraries() -> None:
    from qspin.base import quiet_libraries

    quiet_libraries()


def _told(iteration: Which | None) -> str | None:
    """As the command line has it."""
    return None if iteration is None else str(iteration)
