"""Sampling from the slot: the plain model's tokens, whatever is decoded beside them."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, HOUSE_STYLE, SHAPE, moved_adapter
from test_scoring import plain_twin
from torch import Tensor

from qspin import generation
from qspin.base import find_base
from qspin.config import LoraConfig, ModelConfig
from qspin.decoding import Decoder, padded_rows, replayable
from qspin.errors import QspinError
from qspin.fitting.memory import OutOfMemory, refusals_told
from qspin.generation import Completion, Request, generate
from qspin.layers.attention import Lengths as GroupLengths
from qspin.layers.attention import Packed
from qspin.layers.kv_cache import Decode, KVCache, Prefill
from qspin.model import SlotModel
from qspin.packing import pack_row
from qspin.records import Pair
from qspin.sampling import noise_key, sample, uniform
from qspin.scoring import pair_logps

LoadModel = Callable[..., SlotModel]
TinyFolder = Callable[[str], Path]

CPU = torch.device("cpu")
END = 2  # <|im_end|>
# A random model says END once in 500 tokens. With a 25th of the tokens as stops, some completions end and some don't.
STOPS = frozenset({END, *range(7, 512, 25)})
CAP = 24


@pytest.fixture(scope="session")
def prompts(tokenizer: Any) -> list[tuple[int, ...]]:
    """Real prompts: of different lengths, and all begin with the same tokens of the chat template."""
    rows = [json.loads(line) for line in (HOUSE_STYLE / "train.jsonl").read_text().splitlines()[:16]]
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], tokenize=False, add_generation_prompt=True
        )
        for row in rows
    ]
    found = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    assert len({len(prompt) for prompt in found}) > 5
    return found


def requests_of(prompts: Sequence[tuple[int, ...]]) -> list[Request]:
    return [Request(prompt, noise_key(0, 0, f"row-{index}")) for index, prompt in enumerate(prompts)]


def complete(model: SlotModel, requests: Sequence[Request], **settings: Any) -> list[Completion]:
    defaults: dict[str, Any] = {
        "max_new_tokens": CAP,
        "temperature": 1.0,
        "top_p": 1.0,
        "width": 8,
        "stop_ids": STOPS,
        "on_step": lambda _tokens, _rows: None,
    }
    return generate(model, requests, **(defaults | settings))


# --- against transformers ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_that_of_transformers(
    architecture: str, prompts: list[tuple[int, ...]], tiny_model: LoadModel, tiny_folder: TinyFolder
) -> None:
    model = tiny_model(architecture, moved=True)
    twin = plain_twin(model, tiny_folder(architecture))
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        output = twin.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=CAP,
            eos_token_id=sorted(STOPS),
            pad_token_id=0,
        )
        tokens = tuple(output[0, len(prompt) :].tolist())
        expected.append(Completion(tokens, tokens[-1] in STOPS))
    assert complete(model, requests_of(prompts), temperature=0) == expected
    # and not because all completions repeat one token (gemma2 with random weights comes close to it: sampling from it,
    # below, says more)
    assert len({token for completion in expected for token in completion.ids}) > 5


def test_an_answer_is_whole_when_its_tokens_say_so(prompts: list[tuple[int, ...]], tiny_model: LoadModel) -> None:
    model, requests = tiny_model(moved=True), requests_of(prompts)
    free = complete(model, requests)
    enough = complete(model, requests, ends=lambda ids: len(ids) >= 3 and ids[-1] % 2 == 0)
    for whole, cut in zip(free, enough, strict=True):
        end = next((at for at in range(2, len(whole.ids)) if whole.ids[at] % 2 == 0), len(whole.ids) - 1)
        assert cut == Completion(whole.ids[: end + 1], ended=whole.ended or whole.ids[end] % 2 == 0)
    assert any(len(cut.ids) < len(whole.ids) for whole, cut in zip(free, enough, strict=True))


def test_first_and_second_tokens_follow_the_softmax(tmp_path: Path) -> None:
    vocabulary, count, prompt = 16, 6000, (3, 1)
    folder = tmp_path / "tiny"
    torch.manual_seed(2)
    config = transformers.LlamaConfig(**(SHAPE | {"vocab_size": vocabulary, "num_hidden_layers": 1}))
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    settings = ModelConfig(id=str(folder), dtype="float32")
    model = SlotModel.load(find_base(settings), settings, LoraConfig(rank=4, alpha=8), seed=0, device=CPU)
    model.set_adapter(moved_adapter(model))
    twin = plain_twin(model, folder)

    def probabilities(context: tuple[int, ...]) -> list[float]:
        with torch.no_grad():
            shares: list[float] = twin(input_ids=torch.tensor([context])).logits[0, -1].double().softmax(-1).tolist()
            return shares

    requests = [Request(prompt, noise_key(0, 0, str(index))) for index in range(count)]
    completions = complete(model, requests, max_new_tokens=2, width=500, stop_ids=frozenset())
    first_probabilities = probabilities(prompt)

    firsts = Counter(completion.ids[0] for completion in completions)
    statistic = sum((firsts[t] - count * p) ** 2 / (count * p) for t, p in enumerate(first_probabilities))
    assert statistic < 37.7  # chi-square of 15 degrees of freedom: once in a thousand times
    # negative control: the uniform distribution is told apart
    assert sum((firsts[t] - count / 16) ** 2 / (count / 16) for t in range(16)) > 37.7

    # of both together, in 4 × 4 classes: a number that served twice would tie the second token to the first
    joint = dict.fromkeys(((a, b) for a in range(4) for b in range(4)), 0.0)
    for first, p in enumerate(first_probabilities):
        for second, q in enumerate(probabilities((*prompt, first))):
            joint[first % 4, second % 4] += p * q
    seen = Counter((a % 4, b % 4) for a, b in (completion.ids for completion in completions))
    assert sum((seen[cell] - count * p) ** 2 / (count * p) for cell, p in joint.items()) < 37.7


# --- company, order, widths ---


@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_a_completion_depends_on_no_other(
    architecture: str, top_p: float, prompts: list[tuple[int, ...]], tiny_model: LoadModel
) -> None:
    model = tiny_model(architecture, moved=True)
    requests = requests_of(prompts)
    one_by_one = complete(model, requests, width=1, top_p=top_p)
    assert complete(model, requests, width=4, top_p=top_p) == one_by_one
    assert complete(model, requests, width=16, top_p=top_p) == one_by_one
    assert complete(model, requests[::-1], width=4, top_p=top_p) == one_by_one[::-1]
    # rows end at different steps, so that places fall free and are taken again
    assert len({len(completion.ids) for completion in one_by_one}) > 3
    # negative control: other keys give other completions
    other = [Request(request.prompt_ids, noise_key(1, 0, str(index))) for index, request in enumerate(requests)]
    assert all(a != b for a, b in zip(complete(model, other, width=4, top_p=top_p), one_by_one, strict=True))


def test_few_requests_and_small_prefills(
    prompts: list[tuple[int, ...]], tiny_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(moved=True)
    # of one token; without a beginning in common with the others; equal prompts of two examples
    requests = requests_of([*prompts[:5], (9,), (300, 301, 302), prompts[0]])
    expected = complete(model, requests, width=3)
    assert expected[0] != expected[-1]
    assert complete(model, requests, width=64) == expected
    assert complete(model, requests[:3], width=64) == expected[:3]  # these have a prefix in common, which is shared
    assert [complete(model, [request], width=64)[0] for request in requests] == expected
    # less than one prompt: each is taken in by itself, and none is left waiting for room
    monkeypatch.setattr(generation, "PREFILL_TOKENS", 8)
    assert all(len(prompt) > 8 for prompt in prompts)
    assert complete(model, requests, width=3) == expected
    assert complete(model, requests, width=64) == expected


def test_equal_prompts_share_all_but_their_last_token(prompts: list[tuple[int, ...]], tiny_model: LoadModel) -> None:
    model = tiny_model("mistral", moved=True)
    requests = requests_of([prompts[3]] * 6)
    completions = complete(model, requests, width=6)
    assert completions == [complete(model, [request], width=1)[0] for request in requests]
    assert len(set(completions)) == 6


# --- how completions end ---


def test_completions_end_at_their_first_stop_token_or_at_the_cap(
    prompts: list[tuple[int, ...]], tiny_model: LoadModel
) -> None:
    model = tiny_model(moved=True)
    requests = requests_of(prompts)
    endless = complete(model, requests, stop_ids=frozenset())
    assert {(len(completion.ids), completion.ended) for completion in endless} == {(CAP, False)}

    expected = []
    for completion in endless:
        stop = next((place for place, token in enumerate(completion.ids) if token in STOPS), None)
        ids = completion.ids if stop is None else completion.ids[: stop + 1]  # the stop token is kept
        expected.append(Completion(ids, ended=stop is not None))
    assert complete(model, requests) == expected
    assert {completion.ended for completion in expected} == {True, False}


def test_a_stop_token_as_the_last_allowed_one_ends_a_completion(
    prompts: list[tuple[int, ...]], tiny_model: LoadModel
) -> None:
    model = tiny_model(moved=True)
    request = requests_of(prompts)[0]
    (endless,) = complete(model, [request], max_new_tokens=4, stop_ids=frozenset())
    last = endless.ids[-1]
    assert last not in endless.ids[:-1]
    assert complete(model, [request], max_new_tokens=4, stop_ids=frozenset({last})) == [
        Completion(endless.ids, ended=True)
    ]
    assert complete(model, [request], max_new_tokens=1, stop_ids=frozenset({endless.ids[0]})) == [
        Completion(endless.ids[:1], ended=True)
    ]
    assert complete(model, [request], max_new_tokens=3, stop_ids=frozenset({last})) == [
        Completion(endless.ids[:3], ended=False)
    ]


@pytest.mark.parametrize("width", [1, 3, 64])
def test_progress_adds_up(width: int, prompts: list[tuple[int, ...]], tiny_model: LoadModel) -> None:
    heard: list[tuple[int, float]] = []
    completions = complete(
        tiny_model(moved=True), requests_of(prompts), width=width, on_step=lambda *step: heard.append(step)
    )
    assert sum(tokens for tokens, _ in heard) == sum(len(completion.ids) for completion in completions)
    assert math.isclose(sum(rows for _, rows in heard), len(prompts), rel_tol=1e-9)
    assert all(tokens > 0 and rows > 0 for tokens, rows in heard)


@pytest.mark.parametrize("width", [3, 64])
def test_each_completion_is_told_as_it_ends(width: int, prompts: list[tuple[int, ...]], tiny_model: LoadModel) -> None:
    heard: list[tuple[int, Completion]] = []
    completions = complete(
        tiny_model(moved=True), requests_of(prompts), width=width, on_done=lambda *done: heard.append(done)
    )
    assert sorted(heard, key=lambda done: done[0]) == list(enumerate(completions))
    lengths = [len(completion.ids) for _, completion in heard]
    if width == 64:  # all began together
        assert lengths == sorted(lengths)


# --- generation and scoring agree ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tokens_are_drawn_from_the_distribution_that_scores_them(
    architecture: str, prompts: list[tuple[int, ...]], tiny_model: LoadModel
) -> None:
    # The opponent's log-probs of its own completions must be those it drew them with. Each step's distribution is
    # taken from the packed forward pass of scoring; the number of that position must pick the token that was drawn.
    model = tiny_model(architecture, moved=True)
    requests = requests_of(prompts[:6])
    completions = complete(model, requests)
    for request, completion in zip(requests, completions, strict=True):
        ids = torch.tensor(request.prompt_ids + completion.ids[:-1])
        with torch.no_grad():
            hidden = model.hidden(model.embed(ids), torch.arange(len(ids)), Packed([GroupLengths(len(ids))], CPU))
            logits = model.logits(hidden[len(request.prompt_ids) - 1 :])  # (C, V)
            pair = Pair("a", 0, request.prompt_ids, (1, 2, 3), completion.ids, completion.ended)
            _, generated = pair_logps(model, pack_row([pair], CPU))
        numbers = torch.tensor([uniform(request.key, place) for place in range(len(logits))], dtype=torch.float64)
        assert sample(logits, numbers, temperature=1.0, top_p=1.0).tolist() == list(completion.ids)
        logps = logits.log_softmax(-1)[range(len(logits)), list(completion.ids)]
        torch.testing.assert_close(generated[0], logps.sum(), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logps_are_those_along_the_steps_of_decoding(
    architecture: str, prompts: list[tuple[int, ...]], tiny_model: LoadModel
) -> None:
    # the same with numbers: prefill and decode greedy completions once more, and add up the log-probs on the way
    model = tiny_model(architecture, moved=True)
    requests = requests_of(prompts[:6])
    completions = complete(model, requests, temperature=0, stop_ids=frozenset())
    lengths = [len(request.prompt_ids) for request in requests]
    cache = KVCache(slots=len(requests), device=CPU)
    sums = torch.zeros(len(requests))
    with torch.no_grad():
        ids = torch.tensor([token for request in requests for token in request.prompt_ids])
        positions = torch.cat([torch.arange(length) for length in lengths])
        hidden = model.hidden(model.embed(ids), positions, Prefill(cache, range(len(requests)), lengths, 0))
        hidden = hidden[torch.tensor(lengths).cumsum(0) - 1]
        for step in range(CAP):
            tokens = torch.tensor([completion.ids[step] for completion in completions])
            logps = model.logits(hidden).log_softmax(-1)
            assert torch.equal(logps.argmax(-1), tokens)
            sums += logps.gather(1, tokens[:, None])[:, 0]
            places = cache.advance(len(requests))
            hidden = model.hidden(model.embed(tokens), places, Decode(cache, places))
        pairs = [
            Pair(str(index), 0, request.prompt_ids, (1, 2, 3), completion.ids, completion.ended)
            for index, (request, completion) in enumerate(zip(requests, completions, strict=True))
        ]
        _, generated = pair_logps(model, pack_row(pairs, CPU))
    torch.testing.assert_close(generated, sums, rtol=1e-5, atol=1e-4)


def test_few_numbers_of_rows_are_recorded() -> None:
    padded = [padded_rows(live, 100) for live in range(1, 101)]
    assert sorted(set(padded)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 100]
    assert all(live <= rows < 1.5 * live for live, rows in enumerate(padded, 1))


def test_the_graphs_used_last_are_kept(tiny_model: LoadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they hold is the driver's, so that no plan knows of it. A CPU has none: only which are there is seen."""
    done: list[str] = []

    class Recorded:
        output = torch.zeros(1)
        graph: Any

        def __init__(self, rows: int) -> None:
            self.graph, self.rows = self, rows
            done.append(f"record {rows}")

        def replay(self) -> None:
            done.append(f"replay {self.rows}")

    monkeypatch.setattr(Decoder, "_recorded", Recorded)
    monkeypatch.setattr(Decoder, "_computed", lambda _decoder, rows: done.append(f"compute {rows}"))
    decoder = Decoder(tiny_model(), KVCache(slots=16, device=CPU))
    for rows in (16, 16, 12, 12, 8, 8, 16, 6, 6, 4, 4):
        decoder._replayed(rows)
    assert done[:3] == ["compute 16", "record 16", "replay 16"]
    assert [rows for rows, step in decoder._steps.items() if step is not None] == [8, 16, 6, 4]
    done.clear()
    for rows in (12, 16):
        decoder._replayed(rows)
    assert done == ["record 12", "replay 12", "replay 16"]
    assert [rows for rows, step in decoder._steps.items() if step is not None] == [6, 4, 12, 16]


def test_a_step_that_cannot_be_recorded_is_one_line(tiny_model: LoadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """As torch says it where a layer asks for a tensor's value. A CPU has no graphs to record."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda _graph, pool: contextlib.nullcontext(pool))
    streams: list[str] = []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "before")
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    decoder = Decoder(tiny_model(), KVCache(slots=2, device=CPU))
    refused = torch.AcceleratorError("CUDA error: operation not permitted when stream is capturing\nSearch for")
    full = RuntimeError("CUDA error: out of memory")  # the driver's, of its own part of a graph
    for error, raised in (
        (refused, QspinError),
        (full, OutOfMemory),
        (torch.OutOfMemoryError("2 TiB"), OutOfMemory),
        (torch.AcceleratorError("CUDA error: the launch timed out and was terminated"), torch.AcceleratorError),
    ):

        def computed(_decoder: Decoder, _rows: int, error: Exception = error) -> Tensor:
            raise error

        monkeypatch.setattr(Decoder, "_computed", computed)
        with pytest.raises(raised) as caught, refusals_told():
            decoder._recorded(2)
        assert "\n" not in str(caught.value)
        assert streams.pop() == "before"


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_what_a_gpu_could_record(architecture: str, tiny_model: LoadModel) -> None:
    model = tiny_model(architecture)
    assert not replayable(model)  # on a CPU
    model.device = torch.device("cuda")
    assert replayable(model)
    rotary = next(module for module in model.peft_model.modules() if hasattr(module, "rope_type"))
    for kind in ("dynamic", "longrope"):
        rotary.rope_type = kind
        assert not replayable(model)
    rotary.rope_type = "yarn"
    assert replayable(model)
    model.peft_model.config.num_experts = 8
    assert not replayable(model)


@pytest.mark.parametrize("family", ["ernie4_5_moe", "granitemoe"])
def test_a_gpu_could_not_record_experts(family: str, tiny_model: LoadModel) -> None:
    model = tiny_model()
    model.device = torch.device("cuda")
    config = transformers.AutoConfig.for_model(family, num_hidden_layers=2)
    with torch.device("meta"):
        model.peft_model.base_model.model = transformers.AutoModelForCausalLM.from_config(config)
    assert not replayable(model)
