"""Runs that can be cut off anywhere, for tests/test_crash.py; not a test itself.

    python crash_victim.py MODEL DATA '{"iterations": 2, …}'       with crash_shim.so preloaded

imports and prepares once, says "ready", and then answers lines of JSON on its standard input. For each a fork of it,
which has imported everything and computed nothing, plays the run:

    {"out": "/…/run", "mode": "die", "n": 17}     → {"code": 99, "said": "", "count": 17}
    {"out": "/…/run", "kill_after": 0.4}          → {"code": -9, …}
    {"out": "/…/run", "rivals": 2}                → [{"code": 0, …}, {"code": 1, …}]     at the same time
"""

from __future__ import annotations

import ctypes
import datetime
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sklearn.feature_extraction.text
import sklearn.linear_model
import sklearn.pipeline  # noqa: F401
import torch
import tqdm
from conftest import Notes

from qspin import spin
from qspin.config import load_config
from qspin.errors import QspinError
from qspin.model import SlotModel
from qspin.prepare import Prepared, prepare
from qspin.run_dir import RunDir
from qspin.watch.meter import Meter, measured, to_do, workload
from qspin.watch.progress import Audience
from qspin.watch.status import StatusFile

MODES = {"off": 0, "die": 1, "torn": 2, "full": 3}


def play(prepared: Prepared, out: Path, notes: Notes) -> None:
    """As the command does it, with the status file."""
    run_dir = RunDir(out)
    work = workload(run_dir, prepared.config, len(prepared.train), len(prepared.heldout))
    meter = Meter(to_do(work), measured(work), prepared.config.iterations, lambda: (0, 0))
    # a clock that stands still: the status is written at the same moments of every run
    spin.run(prepared, out, Audience(meter, StatusFile(run_dir.status, meter, clock=lambda: 0.0), notes))


def attempt(prepared: Prepared, wanted: dict[str, Any], answer: int) -> None:
    """In the fork. What it says goes into a pipe; it never returns."""
    shim, code, said, started, notes = ctypes.CDLL(None), 0, "", time.monotonic(), Notes()
    if "mode" in wanted:
        shim.crash_arm(str(wanted["out"]).encode(), ctypes.c_long(wanted["n"]), MODES[wanted["mode"]])
    try:
        play(prepared, Path(wanted["out"]), notes)
    except QspinError as error:
        code, said = 1, str(error)
    except BaseException as error:  # noqa: BLE001 (told to the test, which expects none)
        code, said = 2, repr(error)
    count = shim.crash_count() if "mode" in wanted else 0
    told = {"said": said, "notes": notes.notes, "count": count, "seconds": time.monotonic() - started}
    os.write(answer, json.dumps(told).encode())
    os._exit(code)


@dataclass(frozen=True, slots=True)
class Fork:
    pid: int
    pipe: int

    def ended(self) -> dict[str, Any]:
        with os.fdopen(self.pipe) as pipe:
            told = pipe.read()
        _, status = os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return {"said": "", "count": 0, **(json.loads(told) if told else {}), "pid": self.pid, "code": code}


def fork(prepared: Prepared, wanted: dict[str, Any]) -> Fork:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        attempt(prepared, wanted, write)
    os.close(write)
    return Fork(child, read)


def serve(prepared: Prepared, wanted: dict[str, Any]) -> Any:
    if "rivals" in wanted:
        return [rival.ended() for rival in [fork(prepared, wanted) for _ in range(wanted["rivals"])]]
    child = fork(prepared, wanted)
    if "kill_after" in wanted:
        time.sleep(wanted["kill_after"])
        os.kill(child.pid, signal.SIGKILL)
    return child.ended()


def tell(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    # tqdm's own lock is one for all forks: killed while it holds it, one would keep all later ones waiting for ever;
    # and its thread could hold it as another is forked
    tqdm.tqdm.set_lock(threading.RLock())
    tqdm.tqdm.monitor_interval = 0
    model, data, settings = sys.argv[1:]
    config = load_config(None, {"model.id": model, "data.source": data, **json.loads(settings)})
    prepared = prepare(config, datetime.date(2026, 1, 1))
    # for what is imported on the way; nothing is computed with it
    SlotModel.load(prepared.base, config.model, config.lora, seed=0, device=torch.device("cpu"))
    tell("ready")
    for line in sys.stdin:
        tell(json.dumps(serve(prepared, json.loads(line))))


if __name__ == "__main__":
    main()
