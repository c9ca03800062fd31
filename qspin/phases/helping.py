"""A helper of a launch: it does the pieces of work that the first process sends, and knows nothing of the run."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import nn

from qspin.base import Base, quiet_libraries
from qspin.config import RunConfig, TrainConfig
from qspin.errors import QspinError
from qspin.generation import Request, generate
from qspin.model import SlotModel
from qspin.packing import MicroBatch
from qspin.processes.workers import connect, serve
from qspin.records import Pair, Score
from qspin.scoring import score_pairs
from qspin.training import Task, backward
from qspin.warm_start import backward_real

_STDOUT = 1


def help_out() -> NoReturn:
    """Do pieces until no more are sent, or the first process is gone, which has said what there is to say."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)  # there is nothing to keep
    os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)  # libraries greet; a traceback is still seen
    quiet_libraries()
    helper = _Helper()
    code = 0
    try:
        connect()
        serve(helper.do, helper.slot)
    except QspinError:  # that others are gone, or what the first process finds as well
        code = 1
    os._exit(code)  # threads of a connection that broke would abort the process


class _Helper:
    model: SlotModel | None = None

    def slot(self) -> Sequence[nn.Parameter]:
        return () if self.model is None else tuple(self.model.parameters.values())

    def do(self, job: str, piece: Any) -> Any:
        if job == "load":
            self.model = None  # before there is another one
            self.model = _load(piece)
            return None
        assert self.model is not None
        return JOBS[job](self.model, piece)


def _load(piece: dict[str, Any]) -> SlotModel:
    config = RunConfig.model_validate(piece["config"])
    torch.set_num_threads(piece["threads"])
    return SlotModel.load(
        Base.from_json(piece["base"]),
        config.model,
        config.lora,
        seed=config.seed,
        device=torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu"),
        backend=piece["backend"],
    )


def _generate(model: SlotModel, piece: dict[str, Any]) -> list[tuple[tuple[int, ...], bool]]:
    requests = [Request(tuple(ids), key) for ids, key in piece["requests"]]
    if not requests:  # there were fewer groups than processes
        return []
    completions = generate(model, requests, **piece["settings"])
    return [(completion.ids, completion.ended) for completion in completions]


def _score(model: SlotModel, piece: dict[str, Any]) -> list[list[dict[str, Any]]]:
    parts = score_pairs(model, *_pairs(piece), piece["prefix"])
    return [[score.to_json() for score in part] for part in parts]


def _train(model: SlotModel, piece: dict[str, Any]) -> list[list[list[float]]]:
    pairs, micro_batches = _pairs(piece)
    scores = {row["key"]: Score(**row) for row in piece["scores"]}
    task = Task(pairs, scores, [micro_batches], piece["iteration"], seed=0, prefix=piece["prefix"])
    config = TrainConfig.model_validate(piece["config"])
    found = backward(model, task, micro_batches, config, size=piece["size"], first=piece["first"], scale=piece["scale"])
    return [[part.tolist() for part in figures] for figures in found]


def _supervise(model: SlotModel, piece: dict[str, Any]) -> list[float]:
    return backward_real(model, *_pairs(piece), piece["prefix"], tokens=piece["tokens"], scale=piece["scale"])


def _pairs(piece: dict[str, Any]) -> tuple[list[Pair], list[MicroBatch]]:
    """As dealing.work_together sent them."""
    pairs: list[Pair] = []
    micro_batches = []
    for members in piece["micro_batches"]:
        micro_batches.append(list(range(len(pairs), len(pairs) + len(members))))
        pairs += map(Pair.from_json, members)
    return pairs, micro_batches


JOBS: dict[str, Callable[[SlotModel, Any], Any]] = {
    "base_hash": lambda model, _piece: model.base_hash(),
    "generate": _generate,
    "recompute": lambda model, layers: model.use_gradient_checkpointing(layers),
    "score": _score,
    "train": _train,
    "supervise": _supervise,
}
