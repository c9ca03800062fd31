"""Decoding steps of the live rows of a cache.

A step of a 7B model is over a thousand small kernels, and a GPU is done with each before Python has launched the next.
There a step is recorded once as a CUDA graph, and replayed in one launch for as long as the cache and the number of
rows stay the same size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qspin.errors import QspinError, one_line
from qspin.fitting.memory import is_refusal
from qspin.fitting.shape import has_experts
from qspin.layers.kv_cache import Decode, KVCache
from qspin.model import SlotModel

# The driver keeps tens of MB for each, a hundred before CUDA 12.4, of which neither plans nor torch know
# (github.com/vllm-project/vllm/issues/5517). Rows come and go between two or three sizes, and end through all once.
MOST_GRAPHS = 4


@dataclass(frozen=True, slots=True)
class _Step:
    graph: torch.cuda.CUDAGraph
    output: Tensor  # of `_computed`, written anew at each replay


class Decoder:
    """Decodes with whoever is in the model's slot; the player and the base must stay while it is used."""

    def __init__(self, model: SlotModel, cache: KVCache) -> None:
        self._model, self._cache = model, cache
        self._replays = replayable(model)
        # of each slot its last token, (slots, D), and that token's place, where graphs look for them
        self._embedded = model.embed(torch.zeros(cache.slots, dtype=torch.long))
        self._at = torch.zeros(cache.slots, dtype=torch.long, device=cache.device)
        self._steps: dict[int, _Step | None] = {}  # by rows, the last used last; None: computed, not recorded
        self._places = cache.places  # that they were recorded with

    def step(self, tokens: Sequence[int]) -> Tensor:
        """The last token of each live row joins the cache; (B, V) fp32 logits after it, good until the next step."""
        live = len(tokens)
        places = self._cache.advance(live)
        rows = padded_rows(live, self._cache.slots) if self._replays else live
        inputs = torch.zeros(2, rows, dtype=torch.long)  # what slots that are free compute is never read
        inputs[:, :live] = torch.stack([torch.tensor(tokens), places])
        self._embedded[:rows] = self._model.embed(inputs[0])
        self._at[:rows] = inputs[1].to(self._cache.device)
        found = self._replayed(rows) if self._replays else self._computed(rows)
        # of all rows, as where they are recorded: products of fewer may round otherwise
        return (self._model.logits(found) if self._model.head.aside else found)[:live]

    def _computed(self, rows: int) -> Tensor:
        """Logits, or what they are made of where that copies from main memory, which is not recorded."""
        places = self._at[:rows]
        hidden = self._model.hidden(self._embedded[:rows], places, Decode(self._cache, places))
        return hidden if self._model.head.aside else self._model.logits(hidden)

    def _replayed(self, rows: int) -> Tensor:
        if self._places != self._cache.places:  # the cache lies elsewhere now
            self._steps.clear()
            self._places = self._cache.places
        if rows not in self._steps:
            self._steps[rows] = None
            return self._computed(rows)  # kernels that were never used before can't be recorded
        step = self._steps.pop(rows)
        if step is None:
            self._make_room()
            step = self._recorded(rows)
        self._steps[rows] = step
        step.graph.replay()
        return step.output

    def _make_room(self) -> None:
        """For one more graph: those not used for the longest time go."""
        recorded = [rows for rows, step in self._steps.items() if step is not None]
        for rows in recorded[: 1 - MOST_GRAPHS]:
            self._steps[rows] = None

    def _recorded(self, rows: int) -> _Step:
        # one pool for all: no two run at once, and what a step leaves there is read before the next
        pool = next((step.graph.pool() for step in self._steps.values() if step is not None), None)
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=pool):
                output = self._computed(rows)
        except RuntimeError as error:
            torch.cuda.set_stream(stream)  # where the graph can't be made of what was recorded, torch stays on its own
            # by torch, or by the driver, which makes the graph in memory of its own; or the GPU failed by itself
            if is_refusal(error) or (isinstance(error, torch.AcceleratorError) and "captur" not in str(error)):
                raise
            raise QspinError(
                f"model.id: a step of decoding with {self._model.base.name} can't be recorded on a GPU "
                f"({one_line(error)}); please report the model"
            ) from None
        return _Step(graph, output)


def replayable(model: SlotModel) -> bool:
    """Whether a step can be recorded as a CUDA graph: on a GPU, unless Python looks at tensors on the way, as it does
    to stretch rotary embeddings by how long texts are and to send tokens to experts."""
    causal_lm: Any = model.peft_model.get_base_model()
    kinds = [str(getattr(module, "rope_type", "")) for module in causal_lm.modules()]
    stretched = any(kind in found for found in kinds for kind in ("dynamic", "longrope"))
    experts = has_experts(causal_lm.config.to_dict()) or any(  # some families have names of their own in one of them
        "Experts" in type(module).__name__ for module in causal_lm.modules()
    )
    return model.device.type == "cuda" and not stretched and not experts


def padded_rows(live: int, slots: int) -> int:
    """So many rows that few sizes need a graph: 1, 2, 3, 4, 6, 8, 12, 16, 24, …, at most all slots."""
    power = 1 << (live - 1).bit_length()
    return min(3 * power // 4 if 4 * live <= 3 * power else power, slots)
