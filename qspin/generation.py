"""Batched sampling from whoever is in the slot.

Finished rows leave the batch at once and waiting prompts take their places; nothing is padded, and what all prompts
begin with is computed once. Prompts are taken longest first, so that rows of like lengths sit side by side.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

import torch

from qspin.decoding import Decoder
from qspin.fitting.footprint import PREFILL_TOKENS
from qspin.layers.kv_cache import KVCache, Prefill
from qspin.model import SlotModel
from qspin.packing import common_prefix
from qspin.sampling import sample, uniform


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to complete; `key` (see sampling.noise_key) picks its random numbers."""

    prompt_ids: tuple[int, ...]
    key: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a request."""

    ids: tuple[int, ...]  # the sampled stop token included
    ended: bool  # False: cut at the cap


@dataclass(slots=True)
class _Live:
    index: int  # into the requests
    ids: list[int] = field(default_factory=list)


@torch.inference_mode()
def generate(
    model: SlotModel,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    width: int,
    stop_ids: Container[int],
    on_step: Callable[[int, float], None] = lambda _tokens, _rows: None,
    on_done: Callable[[int, Completion], None] = lambda _index, _completion: None,
    on_token: Callable[[int, int], None] = lambda _index, _token: None,
    ends: Callable[[Sequence[int]], bool] = lambda _ids: False,
    unpacked: bool | None = None,
) -> list[Completion]:
    """Complete each request, `width` at a time; `on_step` hears of the new tokens of each step, and of the rows' worth
    of work done by it: a token is 1/max_new_tokens of a row, and a row that ends early counts whole at its end.
    `on_done` hears of each completion as it ends, and `on_token` of each token, and which request it is for. `ends`
    says of the tokens sampled so far whether they are a whole completion, as after a stop token. `unpacked`: as for
    `SlotModel.decoding`.

    The result does not depend on `width` or on the order of the requests beyond rounding.
    """
    waiting = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))  # popped from the end
    width = min(width, len(requests))
    cache = KVCache(slots=width, device=model.device)
    decoder = Decoder(model, cache)
    prefix = common_prefix([request.prompt_ids for request in requests])
    live: list[_Live] = []
    done: list[Completion | None] = [None] * len(requests)

    def choose(logits: torch.Tensor, rows: Sequence[_Live]) -> None:
        """Sample a token for each row from its (B, V) logits."""
        numbers = [uniform(requests[row.index].key, len(row.ids)) for row in rows]
        uniforms = torch.tensor(numbers, dtype=torch.float64, device=model.device)
        tokens = sample(logits, uniforms, temperature=temperature, top_p=top_p).tolist()
        for row, token in zip(rows, tokens, strict=True):
            row.ids.append(token)
            on_token(row.index, token)

    def ended(row: _Live) -> bool:
        return row.ids[-1] in stop_ids or ends(row.ids)

    with model.decoding(unpacked):
        while waiting or live:
            if waiting and _worth_prefilling(len(live), len(waiting), width):
                admitted = _admit(waiting, requests, width - len(live), prefix)
                choose(_prefill(model, cache, [requests[row.index] for row in admitted], len(live), prefix), admitted)
                live += admitted
                new = len(admitted)
            else:
                choose(decoder.step([row.ids[-1] for row in live]), live)
                new = len(live)
            spared = 0  # tokens that rows which ended early won't need
            for row in _retire(live, cache, lambda row: ended(row) or len(row.ids) == max_new_tokens):
                done[row.index] = completion = Completion(tuple(row.ids), ended(row))
                on_done(row.index, completion)
                spared += max_new_tokens - len(row.ids)
            on_step(new, (new + spared) / max_new_tokens)
    return [completion for completion in done if completion is not None]


def _retire(live: list[_Live], cache: KVCache, over: Callable[[_Live], bool]) -> list[_Live]:
    """Take finished rows out; the last live row moves into each gap, so that live slots stay the first ones."""
    finished: list[_Live] = []
    for slot in reversed(range(len(live))):
        if over(live[slot]):
            finished.append(live[slot])
            last = live.pop()
            if slot < len(live):
                live[slot] = last
                cache.move(len(live), slot)
    return finished


def _worth_prefilling(live: int, waiting: int, width: int) -> bool:
    """A prefill dequantises every weight like any step: let an eighth of the places fall free first."""
    free = width - live
    return free >= min(max(1, width // 8), waiting) or live == 0


def _admit(waiting: list[int], requests: Sequence[Request], free: int, prefix: int) -> list[_Live]:
    """The longest waiting prompts that fit into the free places and one prefill; at least one."""
    admitted: list[_Live] = []
    tokens = 0
    while waiting and len(admitted) < free:
        tokens += len(requests[waiting[-1]].prompt_ids) - prefix
        if admitted and tokens > PREFILL_TOKENS:
            break
        admitted.append(_Live(waiting.pop()))
    return admitted


def _prefill(
    model: SlotModel, cache: KVCache, requests: Sequence[Request], first_slot: int, prefix: int
) -> torch.Tensor:
    """Compute the prompts into slots first_slot, first_slot + 1, …; (B, V) logits after each."""
    prompts = [request.prompt_ids for request in requests]
    own = [prompt[prefix:] for prompt in prompts]
    ids = torch.tensor([*prompts[0][:prefix], *itertools.chain(*own)])
    positions = torch.cat([torch.arange(prefix), *(torch.arange(prefix, len(prompt)) for prompt in prompts)])
    layout = Prefill(cache, range(first_slot, first_slot + len(prompts)), [len(prompt) for prompt in prompts], prefix)
    hidden = model.hidden(model.embed(ids), positions.to(model.device), layout)
    ends = torch.tensor([len(part) for part in own], device=model.device).cumsum(0) + (prefix - 1)
    return model.logits(hidden[ends])
