"""qspin: self-play fine-tuning (SPIN, arXiv 2401.01335) on one consumer GPU, or on a laptop's CPU.

From Python, `qspin.run(config, "runs/mine")` plays and `qspin.load("runs/mine")` talks; `qspin.api` has every function.
"""

import importlib
import logging
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qspin.api import Results, baseline, export, load, plan, push, report, results, run, sweep
    from qspin.config import RunConfig, load_config
    from qspin.errors import QspinError
    from qspin.watch.progress import Silent

__version__ = "0.1.0"
__all__ = [
    "QspinError",
    "Results",
    "RunConfig",
    "Silent",
    "baseline",
    "export",
    "load",
    "load_config",
    "plan",
    "push",
    "report",
    "results",
    "run",
    "sweep",
]
_ELSEWHERE = {"QspinError": "errors", "RunConfig": "config", "load_config": "config", "Silent": "watch.progress"}

# On a CPU threads meet thousands of times a step. By default one that waits for another spins for milliseconds, which
# on a machine with other work keeps a core from whom it waits for; to spin less often and then sleep is as fast alone
# and faster beside others (docs/performance.md). OpenMP reads this as torch is first imported.
SPIN_COUNT = "2000"  # the default is 300,000
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)

# bitsandbytes says at each import that an optional kernel from the hub is not installed
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def __getattr__(name: str) -> Any:
    """Names of the library, imported when they are first asked for: `qspin --help` needs none of them."""
    if name not in __all__:
        raise AttributeError(f"module 'qspin' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qspin.{_ELSEWHERE.get(name, 'api')}"), name)
