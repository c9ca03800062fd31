"""Base and adapter become one model: W + (α/r)·B·A, a block of rows at a time, whatever the model's size.

    merged = Merged(base_folder, adapter_folder, tied={"model.embed_tokens.weight", "lm_head.weight"})
    for rows in merged.blocks("model.layers.0.mlp.up_proj.weight"): ...
    write_safetensors(merged, out)          # same files, same order, the base's dtype

Nothing is ever whole in memory: a block is read from the base's file, A and the block's rows of B from the adapter's,
and the sum, made in fp32 as PEFT makes it, goes on to whoever asked. Free of transformers and of peft; what it can't
merge as PEFT would, it refuses by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qspin.errors import QspinError
from qspin.exports.safetensors_file import FLOATS, INDEX, Stored, read_folder, read_header
from qspin.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS, read_plain_json, write_plain_json
from qspin.units import NESTED_BLOCK, NF4_BLOCK

BLOCK = 2**20  # weights computed at once: 4 MB in fp32, and a few times that for what the sum is made of
COPY = 2**22  # bytes copied at once

NAMES = {dtype: name for name, dtype in FLOATS.items()}
MERGEABLE = ("F32", "F16", "BF16")

# What an adapter_config.json may hold besides: no influence on what the weights mean, or read below.
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")  # the others change the base at the start
REFUSED = (
    "use_dora", "use_qalora", "use_bdlora", "fan_in_fan_out", "lora_bias", "trainable_token_indices",
    "layer_replication", "target_parameters", "alora_invocation_tokens", "arrow_config", "kasa_config",
    "velora_config", "monteclora_config", "megatron_config", "ensure_weight_tying",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class LowRank:
    """What an adapter adds to a weight: scaling·B·A."""

    a: Stored  # (r, in)
    b: Stored  # (out, r)
    scaling: float


@dataclass(frozen=True, slots=True)
class Dequantised:
    """Merge onto the weights that the adapter was trained on: quantised to NF4 and back, as loading did."""

    names: frozenset[str]  # the tensors that were quantised
    dtype: torch.dtype  # computed in: W is cast to it, quantised, and dequantised to it
    double_quant: bool
    device: torch.device


class Merged:
    """The tensors of a base with an adapter merged into it, by the base's names."""

    def __init__(
        self,
        base: Path,
        adapter: Path,
        *,
        tied: Collection[str] = (),
        renamed: Mapping[str, str] = MappingProxyType({}),
        onto: Dequantised | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype`: of all floating-point tensors, in place of the base's own. `tied`: names of tensors that are one.
        `renamed`: what the adapter calls a weight → what the base's files do, where that is something else.

        Raises:
            QspinError: a file is missing or damaged, or the adapter is of a kind that can't be merged into this base.
        """
        self.base = base
        self.files = read_folder(base)
        self._tensors = {name: stored for file in self.files.values() for name, stored in file.items()}
        self._dtype = dtype
        self._onto = onto
        self._low_rank, self._whole = _read_adapter(adapter, self._tensors, tied, renamed)
        if onto is not None:
            for name in sorted(onto.names):
                _check_dequantisable(self._tensors.get(name), name, onto.device)

    @property
    def names(self) -> list[str]:
        return list(self._tensors)

    @property
    def main_dtype(self) -> torch.dtype:
        """Of the largest tensor."""
        return FLOATS[self.dtype(max(self.names, key=self.size))]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> str:
        """What the tensor is written in, as safetensors calls it."""
        stored = self._tensors[name].dtype
        return stored if self._dtype is None or stored not in FLOATS else NAMES[self._dtype]

    def size(self, name: str) -> int:
        """Bytes that the tensor is written in."""
        stored = self._tensors[name]
        if stored.dtype not in FLOATS:
            return stored.end - stored.start
        return math.prod(stored.shape) * FLOATS[self.dtype(name)].itemsize

    def untouched(self, name: str) -> Stored | None:
        """The base's own bytes, where they are what is written."""
        stored = self._tensors[name]
        changed = name in self._low_rank or name in self._whole or (self._onto and name in self._onto.names)
        return None if changed or self.dtype(name) != stored.dtype else stored

    def blocks(self, name: str, multiple: int = 1) -> Iterator[Tensor]:
        """The tensor in its order, some rows at a time, in the dtype that it is written in. Every block but the last
        has a multiple of `multiple` rows."""
        stored = self._whole.get(name, self._tensors[name])
        out = FLOATS[self.dtype(name)]
        low_rank = self._low_rank.get(name)
        a = None if low_rank is None else low_rank.a.read(0, low_rank.a.rows).float()
        onto = self._onto if self._onto and name in self._onto.names else None
        rows = _rows(stored, multiple) if onto is None else _nf4_and_back(stored, onto, multiple)
        for first, block in rows:
            if low_rank is not None and a is not None:
                b = low_rank.b.read(first, first + len(block)).float()
                block = block.float() + (b @ a) * low_rank.scaling  # noqa: PLW2901
            yield block.to(out)


def write_safetensors(merged: Merged, folder: Path) -> None:
    """The merged model's files: named, cut and ordered as the base's."""
    for name, tensors in merged.files.items():
        _write_file(merged, list(tensors), folder / name)
    index = merged.base / INDEX
    if index.is_file():
        content = read_plain_json(index)
        content["metadata"] = {
            **content.get("metadata", {}),
            "total_size": sum(merged.size(name) for name in merged.names),
        }
        write_plain_json(folder / INDEX, content)


def _write_file(merged: Merged, names: Sequence[str], path: Path) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + merged.size(name)
        header[name] = {"dtype": merged.dtype(name), "shape": merged.shape(name), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the data that follows is aligned
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in names:
            stored = merged.untouched(name)
            if stored is not None:
                _copy(stored, file)
                continue
            for block in merged.blocks(name):
                file.write(block.contiguous().view(-1).view(torch.uint8).numpy().data)


def _copy(stored: Stored, file: BinaryIO) -> None:
    with stored.path.open("rb") as source:
        source.seek(stored.start)
        left = stored.end - stored.start
        while left:
            piece = source.read(min(left, COPY))
            if not piece:
                raise QspinError(f"{stored.path}: shorter than its header says; fetch the base model again")
            file.write(piece)
            left -= len(piece)


def _rows(stored: Stored, multiple: int) -> Iterator[tuple[int, Tensor]]:
    step = max(1, BLOCK // max(1, stored.width) // multiple) * multiple
    for first in range(0, stored.rows, step):
        yield first, stored.read(first, min(first + step, stored.rows))


# --- the 4-bit weights that an adapter was trained on ---


def _check_dequantisable(stored: Stored | None, name: str, device: torch.device) -> None:
    if stored is None or stored.dtype not in MERGEABLE:
        raise QspinError(f"the trained model has {name} in 4 bits, but the base's files hold no such tensor")
    if stored.width % NF4_BLOCK and device.type == "cpu":
        raise QspinError(
            f"{name} has {stored.width} inputs, no multiple of {NF4_BLOCK}; bitsandbytes dequantises such layers "
            "wrongly on a CPU: export on a GPU"
        )


def _nf4_and_back(stored: Stored, onto: Dequantised, multiple: int) -> Iterator[tuple[int, Tensor]]:
    """The weights that a 4-bit layer computes with, in fp32.

    Blocks of 64 weights are quantised on their own, so rows can be taken a few at a time; but where the blocks'
    constants are quantised too, that is relative to the mean of all of them.
    """
    import bitsandbytes.functional as bnb  # a hundred MB that merging onto the original weights does without

    multiple = math.lcm(multiple, NF4_BLOCK // math.gcd(stored.width, NF4_BLOCK))  # whole blocks
    packed, constants = [], []
    for _, block in _rows(stored, multiple):
        data, state = bnb.quantize_4bit(
            block.to(onto.device, onto.dtype), blocksize=NF4_BLOCK, quant_type="nf4", compress_statistics=False
        )
        packed.append((data, state))
        constants.append(state.absmax)
    absmax = torch.cat(constants)
    if onto.double_quant:
        offset = absmax.mean()
        nested, state2 = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        absmax = (bnb.dequantize_blockwise(nested, state2) + offset).float()
    first = 0
    for (data, state), part in zip(packed, torch.split(absmax, [len(part) for part in constants]), strict=True):
        state.absmax = part
        block = bnb.dequantize_4bit(data, state).float().cpu()
        yield first, block
        first += len(block)


# --- adapters in PEFT's format ---

_PREFIX = "base_model.model."


def _read_adapter(
    folder: Path, base: Mapping[str, Stored], tied: Collection[str], renamed: Mapping[str, str]
) -> tuple[dict[str, LowRank], dict[str, Stored]]:
    """By the base's names: what is added, and what is replaced as a whole: PEFT saves `modules_to_save` so, and the
    embeddings once an adapter is on one of their ends."""
    config = read_plain_json(folder / ADAPTER_CONFIG)
    _check_config(config, folder / ADAPTER_CONFIG)
    pairs: dict[str, dict[str, Stored]] = {}
    whole: dict[str, Stored] = {}
    for key, stored in read_header(folder / ADAPTER_WEIGHTS).items():
        name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        half = re.fullmatch(r"(.+)\.lora_([AB])\.weight", name)
        weight = f"{half[1]}.weight" if half else name
        weight = renamed.get(weight, weight)
        if weight in tied:
            raise QspinError(
                f"{stored.path}: {key} changes the embedding matrix or the output layer, which are one matrix in this "
                "base; changed at one end it would change at the other, so it is not merged"
            )
        if half is not None:
            pairs.setdefault(half[1], {})[half[2]] = stored
        elif weight in base:
            _check_whole(stored, weight, base[weight])
            whole[weight] = stored
        else:
            raise QspinError(
                f"{stored.path}: {key} is neither half of a LoRA pair nor a module saved whole that the base has; "
                "such an adapter can't be merged"
            )
    low_rank = {}
    for module, pair in pairs.items():
        name = renamed.get(f"{module}.weight", f"{module}.weight")
        low_rank[name] = _low_rank(module, name, pair, config, base)
    return low_rank, whole


def _check_config(config: dict[str, Any], path: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise QspinError(f"{path}: peft_type is {config.get('peft_type')}; only LoRA adapters can be merged")
    if config.get("bias", "none") != "none":
        raise QspinError(f"{path}: bias is {config['bias']!r}; adapters that train biases are not merged")
    if (init := config.get("init_lora_weights", True)) not in PLAIN_INITS:
        raise QspinError(f"{path}: init_lora_weights is {init!r}, which changes the base's weights too; not merged")
    refused = [key for key in REFUSED if config.get(key)]
    if refused:
        raise QspinError(f"{path}: {refused[0]} is set; only plain LoRA is merged")


def _check_whole(stored: Stored, name: str, base: Stored) -> None:
    if stored.shape != base.shape or stored.dtype not in MERGEABLE:
        raise QspinError(
            f"{stored.path}: {name} is {stored.dtype} of shape {list(stored.shape)}, the base's is {base.dtype} of "
            f"shape {list(base.shape)}"
        )


def _low_rank(
    module: str, name: str, pair: dict[str, Stored], config: dict[str, Any], base: Mapping[str, Stored]
) -> LowRank:
    """`module` as the adapter calls it, `name` the base's for its weight."""
    path = next(iter(pair.values())).path
    weight = base.get(name)
    if weight is None or weight.dtype not in MERGEABLE or len(weight.shape) != 2:
        raise QspinError(
            f"{path}: the adapter has a part for {module}, but the base's files hold no 16- or 32-bit matrix "
            f"{name} to add it to; export the adapter instead (--to adapter)"
        )
    if len(pair) != 2:
        raise QspinError(f"{path}: {module} has only half of its pair")
    a, b = pair["A"], pair["B"]
    if (a.width, b.rows, b.width) != (weight.width, weight.rows, a.rows) or {a.dtype, b.dtype} - set(MERGEABLE):
        raise QspinError(
            f"{path}: {module} has A of shape {list(a.shape)} and B of shape {list(b.shape)}, which do not make the "
            f"base's {list(weight.shape)}"
        )
    alpha = _by_pattern(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
    return LowRank(a, b, alpha / (math.sqrt(a.rows) if config.get("use_rslora") else a.rows))


def _by_pattern(patterns: dict[str, float], module: str, default: float) -> float:
    """As PEFT reads alpha_pattern and rank_pattern: the first key that is the end of the module's path, as a regular
    expression. The rank itself is A's."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)
