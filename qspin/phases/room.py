"""How many bytes a run will write, and whether the disk has room for them."""

from __future__ import annotations

import shutil

from qspin.errors import QspinError
from qspin.figures.players import players
from qspin.figures.verdict import stop
from qspin.files import existing
from qspin.fitting.footprint import OPTIMIZERS
from qspin.prepare import Prepared
from qspin.run_dir import RunDir

SNAPSHOTS = 2  # kept at once

# JSON, in bytes
A_TOKEN = 8  # as a number in a list
A_PAIR = 300  # its keys, and its score
A_CHARACTER_OF_TEXT = 6  # of a completion, per token
A_TOKEN_ALONE = 16  # on a line of its own
AN_EVALUATED_ROW = 900  # its figures
A_STEP = 400  # its metrics
SMALL = 2**20  # all else: record, configuration, tables


def check_room(prepared: Prepared, run_dir: RunDir, adapter_bytes: int) -> None:
    """Compare what is still to be written with what is free.

    Raises:
        QspinError: it is more.
    """
    need = room(prepared, run_dir, adapter_bytes)
    free = shutil.disk_usage(existing(run_dir.path)).free
    if need > free:
        raise QspinError(
            f"--out: {need:,} bytes are to be written to {run_dir.path} and {free:,} are free there; "
            "free some space, or choose another --out"
        )


def room(prepared: Prepared, run_dir: RunDir, adapter_bytes: int) -> int:
    """Bytes that a run will still write, and hold at once; rather too many than too few."""
    config = prepared.config
    folders = [run_dir.iteration(index) for index in range(config.iterations)]
    folders += [run_dir.warm_start] if config.sft.epochs else []
    if run_dir.base.evaluation.is_file() and all(folder.done for folder in folders):
        return 0
    measured = players(run_dir, config)
    if measured and stop(measured, config) is not None:  # it ended early
        return 0
    to_train = sum(not folder.adapter.is_dir() for folder in folders)
    capped = config.generation.max_new_tokens
    tokens = sum(len(row.prompt_ids) + len(row.real_ids) + capped for row in prepared.train)
    pairs = A_TOKEN * tokens + A_PAIR * len(prepared.train)
    carried = A_PAIR * len(prepared.train) * config.train.mix_previous
    steps = A_STEP * config.train.epochs * len(prepared.train) * (1 + config.train.mix_previous)
    answers = (A_TOKEN_ALONE + 3 * A_CHARACTER_OF_TEXT) * capped  # sampled, greedy and real
    evaluation = (AN_EVALUATED_ROW + answers) * len(prepared.heldout)
    snapshots = int(SNAPSHOTS * (1 + OPTIMIZERS[config.train.optimizer] / 4) * adapter_bytes)  # its weights are fp32
    each = adapter_bytes + pairs + carried + steps // config.train.batch_size + evaluation
    return SMALL + to_train * each + (snapshots if to_train else 0)
