"""What all phases of a run share: one model with one slot, one folder, and how much is computed at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from qspin.adapters import Adapter, load_adapter, load_own
from qspin.base import load_model_config
from qspin.budget import rows_at_once
from qspin.config import BackendName, RunConfig
from qspin.errors import QspinError
from qspin.files import full_disk_told
from qspin.fitting.at_once import Budget
from qspin.fitting.memory import OutOfMemory, keep_freed_memory, peak, refusals_told
from qspin.layers.backends import choose_backend, unsloth_missing
from qspin.machine import computing_device
from qspin.model import SlotModel
from qspin.optimisation import make_optimizer
from qspin.phases.damage import take_away_damaged
from qspin.phases.room import check_room
from qspin.prepare import Prepared
from qspin.processes.workers import Crew, everyone
from qspin.record import open_run, other_versions, remembered, verify_base
from qspin.run_dir import IterationDir, RunDir
from qspin.stopping import clock
from qspin.watch.progress import Progress

LOOK_SECONDS = 0.05  # between two looks at how much memory a phase holds


@contextlib.contextmanager
def under_way(prepared: Prepared, out: Path, progress: Progress) -> Iterator[Game]:
    """A run's folder as ours alone, what was damaged in it taken away, and the game to go on with.

    Raises:
        QspinError: another process works in it; as `Game.open`; memory or the disk ran out; the GPU failed.
    """
    keep_freed_memory()
    run_dir = RunDir(out)
    try:
        with run_dir.lock(), refusals_told(), full_disk_told(out):
            for note in take_away_damaged(run_dir):
                progress.note(note)
            yield Game.open(prepared, run_dir, progress)
    except OutOfMemory as error:
        raise QspinError(
            f"out of memory ({error}); close other programs, set generation.width lower, or take a smaller model"
        ) from None
    except torch.AcceleratorError as error:  # a time limit of its driver, a suspend, a clock too high
        what = str(error).partition("\n")[0]
        raise QspinError(f"the GPU failed ({what}); the same command goes on from what is finished") from None


@dataclass(slots=True)
class Game:
    """A run under way."""

    prepared: Prepared
    dir: RunDir
    progress: Progress
    model: SlotModel
    crew: Crew  # the processes that share the work
    start: Adapter  # whom the first training begins with: the base itself, or model.init_adapter
    width: int  # completions decoded side by side
    budget: Budget | None = None  # what training holds at once, once found

    @staticmethod
    def open(prepared: Prepared, run_dir: RunDir, progress: Progress) -> Game:
        """Load the model for a folder that is ours.

        Raises:
            QspinError: the folder is of another run; the base or the optimiser can't be used; the disk has no room.
        """
        config = prepared.config
        threads = open_run(prepared, run_dir)
        if others := other_versions(run_dir):
            progress.note(
                f"other versions than when this run began ({others}): what is made from here on may round otherwise"
            )
        torch.set_num_threads(threads)
        device = computing_device()
        backend = _backend(config, load_model_config(prepared.base).model_type, run_dir, device, progress)
        model, crew = _load(prepared, threads, device, backend)
        if crew.count > 1:
            progress.note(f"{crew.count} processes share the work")
        verify_base(run_dir, model, crew)
        check_room(prepared, run_dir, sum(parameter.nbytes for parameter in model.parameters.values()))
        # an optimiser that this device lacks should be heard of now, not after hours of generating
        make_optimizer(config.train, list(model.parameters.values()), device)
        width = _width(prepared, run_dir, model)
        init = config.model.init_adapter
        if init is not None:
            model.set_adapter(load_adapter(Path(init)))
        return Game(prepared, run_dir, progress, model, crew, model.adapter(), width)

    @property
    def config(self) -> RunConfig:
        return self.prepared.config

    def opponent(self, iteration: int) -> Adapter:
        """Whom iteration t plays against: what iteration t − 1 ended with."""
        if iteration > 0:
            return load_own(self.dir.iteration(iteration - 1).adapter)
        return load_own(self.dir.warm_start.adapter) if self.config.sft.epochs else self.start

    def unpacked(self) -> bool:
        """Whether the base stands in the compute type beside its 4 bits while rows are answered: as when the run began,
        since its products round otherwise, and only while memory has room for it."""
        began: bool = remembered(self.dir, "unpacked", lambda: self.model.unpacked_bytes > 0)
        has_room = self.model.unpacked_bytes > 0
        if began and not has_room:
            self.progress.note("memory has no room for the base in the compute type now; on with its 4 bits alone")
        return began and has_room

    def recompute(self, layers: int) -> None:
        """So many layers in training, here and in every helper."""
        self.model.use_gradient_checkpointing(layers)
        self.crew.share("recompute", [layers] * (self.crew.count - 1), lambda: layers)

    @contextlib.contextmanager
    def counted(self, folder: IterationDir, phase: str) -> Iterator[Callable[[], None]]:
        """Add to a folder what the block takes: seconds, and the most memory that the process holds meanwhile. A block
        that fails adds what it had handed in by calling what it is given."""
        started = clock()
        with peak(self.model.device, LOOK_SECONDS) as held:

            def add() -> None:
                nonlocal started
                now = clock()
                folder.add_seconds(phase, now - started)
                folder.add_peak(phase, held.look())
                started = now

            yield add
            add()


def _load(prepared: Prepared, threads: int, device: torch.device, backend: BackendName) -> tuple[SlotModel, Crew]:
    """The model, here and in every helper."""
    config, crew = prepared.config, everyone()
    settings = {
        "base": prepared.base.to_json(),
        "config": config.model_dump(mode="json"),
        "threads": threads,
        "backend": backend,
    }
    model, _ = crew.share(
        "load",
        [settings] * (crew.count - 1),
        lambda: SlotModel.load(
            prepared.base, config.model, config.lora, seed=config.seed, device=device, backend=backend
        ),
    )
    return model, Crew(crew.count, tuple(model.parameters.values()))


def _backend(config: RunConfig, family: str, run_dir: RunDir, device: torch.device, progress: Progress) -> BackendName:
    """As chosen when the run began, since kernels round differently.

    Raises:
        QspinError: it can't be had here, or another is asked for now.
    """
    asked = config.model.backend
    backend: BackendName = remembered(run_dir, "backend", lambda: choose_backend(asked, device, family)[0])
    if asked not in {"auto", backend}:
        raise QspinError(
            f"model.backend: {run_dir.path} began with {backend}, and other kernels round differently; go on with "
            "that, or choose another --out"
        )
    missing = unsloth_missing(device, family)
    if backend == "unsloth" and missing:
        raise QspinError(f"{run_dir.path} began with Unsloth's kernels: {missing}; or choose another --out")
    if device.type == "cuda":
        progress.note(f"backend: {backend}{f' ({missing})' if missing else ''}")
        emulated = not torch.cuda.is_bf16_supported(including_emulation=False)
        if config.model.dtype == "bfloat16" and emulated:
            progress.note(
                "model.dtype: this GPU has no bfloat16, which is slow here; float16 is not, where its range suffices"
            )
    return backend


def _width(prepared: Prepared, run_dir: RunDir, model: SlotModel) -> int:
    """As configured; if found from memory, then once, for the whole run."""
    generation = prepared.config.generation
    if isinstance(generation.width, int):
        return generation.width
    rows = (*prepared.train, *prepared.heldout)
    places = max(len(row.prompt_ids) for row in rows) + generation.max_new_tokens
    width: int = remembered(run_dir, "width", lambda: rows_at_once(model, places))
    return width
