"""Adapters in PEFT's format, from a run's own folder or from anyone: nothing in them is trusted.

check_folder_named(folder)                  # it is an adapter's, and not that of a run with adapters in it
check_config(folder, base_name, lora)       # the settings are those of the slot
adapter = load_adapter(folder)
adapter = load_own(run_dir.iteration(0).adapter)    # which must be as the run wrote it
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from qspin.config import LoraConfig
from qspin.errors import QspinError, one_line, permission_told
from qspin.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, check_folder, read_plain_json
from qspin.run_dir import IterationDir, RunDir

Adapter = dict[str, Tensor]  # PEFT's names → fp32 CPU tensors

PICKLE = "adapter_model.bin"
# What an adapter_config.json may hold besides rank and alpha that makes other numbers of the same weights.
OTHER_SUMS = (
    "use_dora", "use_rslora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save",
    "alora_invocation_tokens",
)  # fmt: skip
# Ways to begin that take something out of the base's weights: with the base as it was, the adapter adds it twice.
OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")


def load_adapter(folder: Path) -> Adapter:
    """An adapter's weights, fp32. A pickle is never opened: it can run code.

    Raises:
        QspinError: no such file, one that may not be read, a damaged one, or weights that are no numbers.
    """
    path = folder / ADAPTER_WEIGHTS
    with permission_told():
        there = path.is_file()
        if there:
            path.open("rb").close()  # safetensors calls it missing if it may not be read
    if not there:
        if (folder / PICKLE).is_file():
            raise QspinError(
                f"{folder} holds {PICKLE}, a pickle, which can run code as it is loaded, and no {ADAPTER_WEIGHTS}; "
                "save it again with PEFT's save_pretrained"
            )
        raise QspinError(f"{folder} holds no {ADAPTER_WEIGHTS}: name a folder written by PEFT's save_pretrained")
    try:
        adapter = {name: tensor.float() for name, tensor in load_file(path).items()}
    except (SafetensorError, OSError, ValueError, KeyError) as error:  # KeyError: a dtype that torch lacks
        raise QspinError(f"{path}: not a readable safetensors file ({one_line(error)})") from None
    wrong = sorted(name for name, tensor in adapter.items() if not bool(torch.isfinite(tensor).all()))
    if wrong:
        raise QspinError(f"{path}: {len(wrong)} weights hold NaN or infinity, the first {wrong[0]}; train it anew")
    return adapter


def load_own(folder: Path) -> Adapter:
    """As `load_adapter`, of a folder that a run has written.

    Raises:
        QspinError: it is not as it was written.
    """
    check_folder(folder)
    return load_adapter(folder)


def check_folder_named(folder: Path) -> None:
    """Raises a QspinError: what is there is no folder, or one whose adapters lie deeper, as a run."""
    if folder.is_file():
        raise QspinError(f"model.init_adapter: {folder} is a file; name the folder of an adapter")
    if not folder.is_dir():
        raise QspinError(
            f"model.init_adapter: {folder}: no such folder; check the path, or fetch it from the hub (hf download)"
        )
    run = RunDir(folder)
    parts = [IterationDir(folder), run.warm_start, *map(run.iteration, range(run.iterations_done()))]
    adapters = [part.adapter for part in parts if (part.adapter / ADAPTER_WEIGHTS).is_file()]
    if adapters and not (folder / ADAPTER_WEIGHTS).is_file():
        raise QspinError(
            f"model.init_adapter: {folder} holds no {ADAPTER_WEIGHTS}; the newest adapter below it is {adapters[-1]}"
        )


def check_config(folder: Path, base: str, lora: LoraConfig) -> None:
    """An adapter from elsewhere plays in the slot only if its settings are the slot's: weights alone don't tell.

    Raises:
        QspinError: it is no plain LoRA, of another rank or alpha, or says that it belongs to another base.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        raise QspinError(f"model.init_adapter: {folder} holds no {ADAPTER_CONFIG}; name a folder saved by PEFT")
    config = read_plain_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise QspinError(f"model.init_adapter: {path} is not the configuration of a LoRA adapter")
    others = [key for key in OTHER_SUMS if config.get(key)]
    if others or config.get("bias", "none") != "none":
        raise QspinError(
            f"model.init_adapter: {path}: {others[0] if others else 'bias'} is set; qspin plays plain LoRA"
        )
    begun = config.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(OTHER_BASES):
        raise QspinError(
            f"model.init_adapter: {path}: init_lora_weights is {_short(begun)}, so it belongs to a base that was "
            "changed; save it as a plain one, with PEFT's path_initial_model_for_weight_conversion, or take another"
        )
    for key, ours, setting in (("r", lora.rank, "lora.rank"), ("lora_alpha", lora.alpha, "lora.alpha")):
        if not _same_number(config.get(key), ours):
            raise QspinError(
                f"model.init_adapter: {path}: {key} is {_short(config.get(key))}, {setting} is {ours:g}; set "
                f"{setting} to the adapter's"
            )
    targets = config.get("target_modules")
    if isinstance(targets, list) and isinstance(lora.targets, list) and set(targets) != set(lora.targets):
        raise QspinError(
            f"model.init_adapter: {path}: target_modules are {_short(sorted(targets, key=str))}, lora.targets are "
            f"{sorted(lora.targets)}; set lora.targets to the adapter's"
        )
    named = config.get("base_model_name_or_path")
    if named and (not isinstance(named, str) or _last(named) != _last(base)):
        raise QspinError(
            f"model.init_adapter: {path} names the base {_short(named)}, model.id is {base}; take the adapter's base, "
            "or, if it is the same model by another name, put that name into the file"
        )


def _same_number(found: Any, wanted: float) -> bool:
    return isinstance(found, int | float) and math.isclose(found, wanted)


def _last(name: str) -> str:
    """A model's name without the owner or the folders before it."""
    return name.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()


def _short(value: Any) -> str:
    return repr(value)[:100]
