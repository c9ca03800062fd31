"""The processes of one launch, which share the work of a run: the first one plays, the others help.

    accelerate launch --multi_gpu --num_processes 2 -m qspin run …      # or torchrun --nproc_per_node 2 -m qspin run …

The first process runs the command as it would alone: it holds the lock, reads and writes the folder, decides, takes the
steps and speaks. A helper keeps nothing but the base: with each piece of work it is sent the adapter, and it sends back
what came of it. So no two processes can be of two minds, and one that dies takes no more than its piece with it.

What is sent is JSON, and the adapter's weights and gradients. Free of torch until there are helpers.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from qspin.errors import QspinError
from qspin.stopping import check_stop

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.distributed import Work

T = TypeVar("T")

# A process waits for the others as long as a piece takes, which may be hours; of one that has died it hears at once.
PATIENCE = datetime.timedelta(days=1)
LOOK_SECONDS = 0.001  # between two looks whether the others are done
SECONDS_TO_HEAR = 1.0  # all are told to stop at once, and others may be gone before the word has reached this one


class WorkerLost(QspinError):
    """Another process of the launch is gone."""


def rank() -> int:
    """0 is the process that plays, and one that was started alone."""
    return int(os.environ["RANK"]) if _launched() > 1 else 0


def _launched() -> int:
    """How many processes the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


@contextlib.contextmanager
def launch() -> Iterator[None]:
    """For the first process: the helpers are there while the block lasts, if any were launched."""
    if _launched() == 1:
        yield
        return
    connect()
    _State.count = _launched()
    try:
        yield
    finally:
        _State.count = 1
        import torch.distributed as dist

        if not _State.sharing:
            with contextlib.suppress(WorkerLost):  # who is gone need not be told
                _broadcast(None)
        if not _State.waiting:  # else it would end with what was waited for
            dist.destroy_process_group()


def connect() -> None:
    """Meet the other processes of the launch.

    Raises:
        QspinError: there are fewer GPUs than processes.
    """
    import torch
    import torch.distributed as dist

    from qspin.fitting.memory import keep_freed_memory, processes_here

    keep_freed_memory()  # before the first tensor
    if torch.cuda.is_available():
        here, cards = processes_here(), torch.cuda.device_count()
        if here > cards:
            raise QspinError(
                f"{here} processes were launched on a machine of {cards} GPUs, and each needs one of its own; launch "
                f"{cards}"
            )
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE)


@dataclass(frozen=True, slots=True)
class Crew:
    """The processes that have a run's model loaded, and the weights of its slot in this one."""

    count: int = 1
    slot: tuple[nn.Parameter, ...] = ()

    def share(
        self, job: str, pieces: Sequence[Any], own: Callable[[], T], *, gradients: bool = False
    ) -> tuple[T, list[Any]]:
        """What this process made of its own piece, and what each helper made of its.

        Args:
            job: one of helping.JOBS.
            pieces: one for each helper.
            gradients: whether to add those that the helpers' pieces leave in their slots to those in ours.

        Raises:
            OutOfMemory, QspinError: why a piece could not be done, wherever that was.
            WorkerLost: a helper is gone.
        """
        if self.count == 1:
            return own(), []
        if _State.sharing:  # the last piece was broken off, and the helpers are not where they could hear of this one
            raise _lost()
        _State.sharing = True
        _broadcast({"job": job, "pieces": pieces, "adapter": bool(self.slot), "gradients": gradients})
        if self.slot:
            _share_weights(self.slot)
        made, failure = _attempt(own)
        outcomes = _exchange(failure or {"made": None})
        if gradients and _all_made(outcomes):
            _sum_gradients(self.slot)
        _State.sharing = False
        _raise_failures(outcomes)
        assert made is not None
        return made, [outcome["made"] for outcome in outcomes[1:]]


ALONE = Crew()


def everyone() -> Crew:
    """All processes that are there, before they have loaded anything."""
    return Crew(_State.count)


def serve(do: Callable[[str, Any], Any], slot: Callable[[], Sequence[nn.Parameter]]) -> None:
    """For a helper: the pieces that the first process sends, until it sends no more.

    Args:
        do: job, piece → what came of it.
        slot: the weights that are trained, once they are loaded.

    Raises:
        WorkerLost: another process is gone.
    """
    while (task := _broadcast(None)) is not None:
        parameters = slot()
        for parameter in parameters:
            parameter.grad = None
        if task["adapter"]:
            _share_weights(parameters)
        piece = task["pieces"][rank() - 1]
        made, failure = _attempt(lambda: do(task["job"], piece))  # noqa: B023 (it is called here)
        outcomes = _exchange(failure or {"made": made})
        if task["gradients"] and _all_made(outcomes):
            _sum_gradients(parameters)


class _State:
    count = 1  # processes that are connected, as the first one knows
    sharing = False  # the helpers are at work, or were when that was broken off
    waiting = False  # for the others to be done, or was when that was broken off


def _attempt(work: Callable[[], T]) -> tuple[T | None, dict[str, str]]:
    """What was made, or in which way it failed."""
    from qspin.fitting.memory import OutOfMemory, refusals_told

    try:
        with refusals_told():
            return work(), {}
    except OutOfMemory as error:
        return None, {"memory": str(error)}
    except QspinError as error:
        return None, {"error": str(error)}


def _all_made(outcomes: Sequence[dict[str, Any]]) -> bool:
    return all("made" in outcome for outcome in outcomes)


def _raise_failures(outcomes: Sequence[dict[str, Any]]) -> None:
    from qspin.fitting.memory import OutOfMemory

    for outcome in outcomes:
        if "memory" in outcome:
            raise OutOfMemory(outcome["memory"])
    for outcome in outcomes:
        if "error" in outcome:
            raise QspinError(outcome["error"])


# --- what goes from process to process


def _broadcast(value: Any) -> Any:
    """The first process's value, in all of them."""
    import torch
    import torch.distributed as dist

    data = _bytes(value)
    size = torch.tensor([len(data)])
    with _losses_told():
        dist.broadcast(size, 0)
        data = data if rank() == 0 else torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0)
    return _value(data)


def _exchange(value: Any) -> list[Any]:
    """Everybody's values, in all processes."""
    import torch
    import torch.distributed as dist

    data = _bytes(value)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(_launched())]
    with _losses_told():
        _wait_for(dist.all_gather(sizes, torch.tensor([len(data)]), async_op=True))
        padded = torch.zeros(max(map(int, sizes)), dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded)
    return [_value(part[: int(size)]) for part, size in zip(parts, sizes, strict=True)]


def _wait_for(others: Work) -> None:
    """Until all have done their pieces. A request to stop is heard meanwhile, which it is not in torch's own wait."""
    _State.waiting = True
    while not others.is_completed():
        time.sleep(LOOK_SECONDS)
    _State.waiting = False
    others.wait()


def _share_weights(slot: Sequence[nn.Parameter]) -> None:
    """The first process's weights into everybody's slot."""
    import torch
    import torch.distributed as dist

    flat = torch.cat([parameter.detach().reshape(-1) for parameter in slot])
    with _losses_told():
        dist.broadcast(flat, 0)
    if rank() > 0:
        with torch.no_grad():
            for parameter, part in _parts(slot, flat):
                parameter.copy_(part)


def _sum_gradients(slot: Sequence[nn.Parameter]) -> None:
    """Everybody's gradients, summed into those of the first process."""
    import torch
    import torch.distributed as dist

    # a helper may have had no part in a small batch
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in slot]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    with _losses_told():
        dist.reduce(flat, 0)
    if rank() == 0:
        for parameter, part in _parts(slot, flat):
            if parameter.grad is not None:
                parameter.grad.copy_(part)
            elif bool(part.any()):  # of an expert that a helper's tokens alone were sent to
                parameter.grad = part.clone()


def _parts(slot: Sequence[nn.Parameter], flat: Tensor) -> Iterator[tuple[nn.Parameter, Tensor]]:
    import torch

    parts = torch.split(flat, [parameter.numel() for parameter in slot])
    for parameter, part in zip(slot, parts, strict=True):
        yield parameter, part.view_as(parameter)


def _bytes(value: Any) -> Tensor:
    import torch

    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def _value(data: Tensor) -> Any:
    return json.loads(data.numpy().tobytes())


@contextlib.contextmanager
def _losses_told() -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        time.sleep(SECONDS_TO_HEAR)
        check_stop()
        raise _lost() from None


def _lost() -> WorkerLost:
    return WorkerLost(
        f"one of the {_launched()} processes of this launch has ended; the same command goes on from the last finished "
        "piece, with any number of processes"
    )
