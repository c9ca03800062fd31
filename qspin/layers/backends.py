"""Whose kernels a run computes with: torch's own, or Unsloth's."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import os
import tempfile
import warnings
from pathlib import Path
from typing import Literal

import torch
from packaging.version import Version

from qspin.config import BackendName
from qspin.errors import QspinError, one_line
from qspin.layers.kernels import Kernels, compiles

OLDEST_UNSLOTH = "2026.10.9"
REWRITTEN = ("gemma3", "gemma3_text")  # families that it gives an attention of its own as it is imported


def choose_backend(
    asked: BackendName | Literal["auto"], device: torch.device, family: str | None = None
) -> tuple[BackendName, str]:
    """Who computes norms, gates, rotary embeddings and 4-bit weights: torch itself, or Unsloth's kernels; and why.

    `family` is the base's model_type, if there is a base.

    Raises:
        QspinError: the one asked for can't be had.
    """
    missing = unsloth_missing(device, family)
    if asked == "unsloth" and missing:
        raise QspinError(f"model.backend: no unsloth here: {missing}; or set model.backend=transformers")
    if asked != "auto":
        return asked, "as model.backend says"
    return ("transformers", missing) if missing else ("unsloth", "a GPU, and Unsloth is installed")


def unsloth_missing(device: torch.device, family: str | None = None) -> str | None:
    """Why Unsloth's kernels can't be had, if they can't; for a base of some family, if one is named."""
    if device.type == "cpu":
        return "Unsloth needs a GPU"
    try:
        have = importlib.metadata.version("unsloth")
    except importlib.metadata.PackageNotFoundError:
        return "Unsloth is not installed: pip install unsloth"
    if Version(have) < Version(OLDEST_UNSLOTH):  # not known to compute what is expected of it
        return f"Unsloth {have} is older than {OLDEST_UNSLOTH}: pip install -U unsloth"
    if not compiles():  # it would be found out by the first kernel
        return "Triton finds no C compiler or no Python.h, which it builds Unsloth's kernels with: install both"
    if family in REWRITTEN:
        return f"Unsloth computes {family} in a way of its own, which packs no texts side by side"
    return None


def check_kernels(device: torch.device) -> None:
    """Raises a QspinError: torch can't compute on the GPU."""
    missing = no_kernels(device)
    if missing:
        raise QspinError(
            f"{missing}: `qspin doctor` says which torch to install, CUDA_VISIBLE_DEVICES='' plays on the CPU"
        )


def no_kernels(device: torch.device) -> str | None:
    """Why torch can't compute on a GPU that it sees, if it can't: bitsandbytes would end the process there."""
    built = torch.cuda.get_arch_list() if device.type == "cuda" and torch.version.hip is None else []
    if not built:
        return None
    capability = torch.cuda.get_device_capability(device)
    if any(_runs_on(capability, name) for name in built):
        return None
    name, (major, minor) = torch.cuda.get_device_name(device), capability
    return f"{name} is sm_{major}{minor}, and torch {torch.__version__} is built for {', '.join(built)}"


def _runs_on(capability: tuple[int, int], built: str) -> bool:
    """Whether a GPU runs what was built, as torch names it: sm_86 runs on 8.6 and later ones of that generation,
    sm_90a on 9.0 alone; compute_90 is translated on 9.0 and all later ones."""
    kind, _, number = built.partition("_")
    digits = number.rstrip("af")
    oldest = int(digits[:-1]), int(digits[-1])
    if kind == "compute":
        return capability >= oldest
    return capability == oldest or (not number.endswith("a") and capability[0] == oldest[0] and capability >= oldest)


def unsloth_kernels() -> Kernels:
    """Raises a QspinError: Unsloth is installed, and can't be imported."""
    # it writes code that it generates into a folder, of the working directory unless told otherwise
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache"))
    try:
        # it prints a banner, and warns that it can't patch what is imported already: its kernels need no patches
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            from qspin.layers.unsloth_kernels import UnslothKernels
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise QspinError(
            f"Unsloth can't be imported ({one_line(error)}); mend it, or set model.backend=transformers"
        ) from None
    return UnslothKernels()
