"""A run's figures for a tracker: TensorBoard, Weights & Biases or trackio, whichever is asked for.

    check("tensorboard")                     # before any work: can it be used?
    with Tracker("tensorboard", run_dir, config) as tracker:
        run(prepared, out, Audience(meter, view, tracker))

Each process that works on a run tells its tracker everything from the first step on: what the folder holds, then what
is new. So nothing is missing or there twice, however often a run was stopped, and trackers that can't go on with an
old run (wandb offline) need not.
"""

from __future__ import annotations

import importlib.util
import uuid
from collections.abc import Mapping
from typing import Any, Protocol

from qspin.config import RunConfig
from qspin.errors import QspinError
from qspin.figures.evaluation import read_evaluation, values
from qspin.files import read_jsonl
from qspin.record import remembered
from qspin.run_dir import IterationDir, RunDir
from qspin.watch.progress import TrackerName

PROJECT = "qspin"  # that wandb and trackio file a run under


class Tracker:
    """A `Progress` that logs optimiser steps as `train/loss`, … (`warm_start/loss`) and evaluations as `eval/nll`, …

    Steps are counted through the whole run: the first of iteration t comes after the last of iteration t − 1. An
    evaluation stands at the last step before it.
    """

    def __init__(self, name: TrackerName, run_dir: RunDir, config: RunConfig) -> None:
        self._name = name
        self._run_dir = run_dir
        self._config = config
        self._sink: Sink | None = None
        self._told = 0  # steps of the whole run, ...
        self._before = 0  # ... and those before the phase under way
        self._group = ""
        self._iteration: int | None = None

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._sink is not None:
            self._sink.close(failed=error is not None)

    def phase(self, name: str, *, iteration: int | None, **_: object) -> None:
        if self._sink is None:  # only now: from the first phase on the run's folder is ours
            self._sink = _open(self._name, self._run_dir, self._config)
            self._tell_past()
        self._start(name, iteration)
        if name in {"warm start", "train"}:
            folder = self._run_dir.warm_start if iteration is None else self._run_dir.iteration(iteration)
            for metrics in _steps_kept(folder):
                self._step(metrics)

    def advance(self, units: float, **figures: float) -> None:
        if "step" in figures:
            self._step(figures)
        elif figures and not units:
            self._log("eval", figures, self._told)

    def sampled(self, prompt: str, completion: str) -> None: ...
    def note(self, text: str) -> None: ...

    def _tell_past(self) -> None:
        """What the run's folder holds of trainings that are over, and of evaluations."""
        self._evaluation(self._run_dir.base, None)
        self._training("warm start", self._run_dir.warm_start, None)
        for iteration in range(self._config.iterations):
            self._training("train", self._run_dir.iteration(iteration), iteration)

    def _training(self, name: str, folder: IterationDir, iteration: int | None) -> None:
        if folder.adapter.is_dir():
            self._start(name, iteration)
            for metrics in folder.steps():
                self._step(metrics)
            self._evaluation(folder, iteration)

    def _evaluation(self, folder: IterationDir, iteration: int | None) -> None:
        if folder.evaluation.is_file():
            self._start("evaluate", iteration)
            evaluation = read_evaluation(folder.evaluation)
            figures = values(evaluation, seed=self._config.seed, style=self._config.evaluation.style)
            self._log("eval", figures, self._told)

    def _start(self, name: str, iteration: int | None) -> None:
        if iteration != self._iteration:
            self._before = self._told
        self._group, self._iteration = name.replace(" ", "_"), iteration

    def _step(self, metrics: Mapping[str, float]) -> None:
        step = self._before + int(metrics["step"]) + 1
        if step > self._told:  # else a step that is made again, after memory ran out
            self._told = step
            self._log(self._group, {name: value for name, value in metrics.items() if name != "step"}, step)

    def _log(self, group: str, figures: Mapping[str, float], step: int) -> None:
        assert self._sink is not None
        named = {f"{group}/{name}": value for name, value in figures.items()}
        if self._iteration is not None:
            named[f"{group}/iteration"] = self._iteration
        self._sink.log(named, step)


def _steps_kept(folder: IterationDir) -> list[dict[str, float]]:
    """The metrics of the steps that training goes on after."""
    snapshots = sorted(folder.snapshots.glob("step-*/metrics.jsonl"))
    return read_jsonl(snapshots[-1]) if snapshots else []


def check(name: TrackerName) -> None:
    """See that a tracker can be used, before any work is done.

    Raises:
        QspinError: it is not installed, or wandb needs a login.
    """
    found = importlib.util.find_spec(name)
    if found is None or found.origin is None:  # any folder of that name, as wandb leaves behind, is a package of a kind
        raise QspinError(f"--track {name}: it is not installed; pip install {name}")
    if name == "wandb":
        import wandb
        from wandb.errors import UsageError

        try:
            wandb.login()  # asks for a key if there is none, and for nothing when offline
        except UsageError as error:
            raise QspinError(f"--track wandb: {error} (or set WANDB_MODE=offline)") from None


def _open(name: TrackerName, run_dir: RunDir, config: RunConfig) -> Sink:
    """The tracker's record of this run, begun anew."""
    match name:
        case "tensorboard":
            return _TensorBoard(run_dir)
        case "wandb":
            return _Wandb(run_dir, config)
        case "trackio":
            return _Trackio(run_dir, config)


class Sink(Protocol):
    """A tracker's record of one run."""

    def log(self, figures: Mapping[str, float], step: int) -> None: ...
    def close(self, *, failed: bool) -> None: ...


class _TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, run_dir: RunDir) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what earlier processes wrote is told again
        self._writer: Any = SummaryWriter(str(run_dir.path / "tensorboard"), purge_step=0, flush_secs=30)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:  # noqa: ARG002
        self._writer.close()


class _Wandb:
    def __init__(self, run_dir: RunDir, config: RunConfig) -> None:
        import wandb

        # A run that is begun with an old run's id takes its place. The console is the view's.
        self._run: Any = wandb.init(
            project=PROJECT,
            id=_identity(run_dir),
            name=run_dir.path.name,
            dir=run_dir.path,
            config=config.model_dump(mode="json"),
            settings=wandb.Settings(console="off"),
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    def __init__(self, run_dir: RunDir, config: RunConfig) -> None:
        import trackio

        name = f"{run_dir.path.name}-{_identity(run_dir)}"
        for run in _runs_called(name):
            run.delete()
        self._run: Any = trackio.init(project=PROJECT, name=name, config=config.model_dump(mode="json"))

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, *, failed: bool) -> None:  # noqa: ARG002
        self._run.finish()


def _runs_called(name: str) -> list[Any]:
    import trackio

    try:
        return [run for run in trackio.Api().runs(PROJECT) if run.name == name]
    except ValueError:  # there is no such project yet
        return []


def _identity(run_dir: RunDir) -> str:
    """A name for this run that no other has, wherever its folder is moved."""
    identity: str = remembered(run_dir, "tracked_as", lambda: uuid.uuid4().hex[:8])
    return identity
