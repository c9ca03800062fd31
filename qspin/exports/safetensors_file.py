"""Where each tensor lies in a safetensors file, to read some of its rows without the rest.

files = read_folder(base)                                        # file name → tensors, in their order
rows = files["model.safetensors"]["lm_head.weight"].read(0, 100)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from qspin.errors import QspinError
from qspin.files import read_plain_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LONGEST_HEADER = 100_000_000  # of the safetensors library
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies in a safetensors file."""

    path: Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int

    @property
    def rows(self) -> int:
        return self.shape[0] if self.shape else 1

    @property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.shape[1:])

    def read(self, first: int, last: int) -> Tensor:
        """Some rows, in their own dtype."""
        dtype = FLOATS[self.dtype]
        stride = self.width * dtype.itemsize
        data = np.fromfile(self.path, dtype=np.uint8, count=(last - first) * stride, offset=self.start + first * stride)
        return torch.from_numpy(data).view(dtype).view(last - first, *self.shape[1:])


def read_folder(folder: Path) -> dict[str, dict[str, Stored]]:
    """File name → its tensors in the order of their data."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():  # as transformers looks: an index beside it is of shards that were there before
        files = [SINGLE]
    elif index.is_file():
        files = sorted(set(read_plain_json(index)["weight_map"].values()))
    else:
        raise QspinError(f"{folder} holds neither {SINGLE} nor {INDEX}; merging reads a base's safetensors alone")
    return {name: read_header(folder / name) for name in files}


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file in the order of their data (https://github.com/huggingface/safetensors)."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if length > size - 8:
                raise ValueError("it is cut off")
            if length > LONGEST_HEADER:
                raise ValueError(f"its header takes {length} bytes")
            entries = json.loads(file.read(length))
        if not isinstance(entries, dict):
            raise ValueError("its header is no JSON object")
        start = 8 + length
        found = {
            name: Stored(
                path,
                entry["dtype"],
                tuple(entry["shape"]),
                start + entry["data_offsets"][0],
                start + entry["data_offsets"][1],
            )
            for name, entry in entries.items()
            if name != "__metadata__"
        }
        found = dict(sorted(found.items(), key=lambda item: (item[1].start, item[1].end)))
        _check_layout(found, start, size)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise QspinError(f"{path}: not a readable safetensors file ({error})") from None
    return found


def _check_layout(tensors: Mapping[str, Stored], start: int, size: int) -> None:
    """The format has every tensor begin where the one before it ends, and the last one end with the file."""
    for name, stored in tensors.items():
        if any(not isinstance(length, int) or length < 0 for length in stored.shape):
            raise ValueError(f"{name} has the shape {list(stored.shape)}")
        if stored.start != start or stored.end < start:
            raise ValueError(f"{name} does not begin where the tensor before it ends")
        if stored.dtype in FLOATS and stored.end - start != math.prod(stored.shape) * FLOATS[stored.dtype].itemsize:
            raise ValueError(f"{name} takes other bytes than its shape")
        start = stored.end
    if start > size:
        raise ValueError("it is cut off")
    if start < size:
        raise ValueError("there are bytes after its last tensor")
