"""A run's players as a model of EleutherAI's lm-evaluation-harness: it asks, whoever is in the slot answers.

Scores are those of the harness's own `HFLM` on the same weights; tests hold the two against each other. What a task's
requests have in common (examples, a question's choices) is computed once: reading.py.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM

from qspin.budget import rows_at_once
from qspin.errors import QspinError, one_line
from qspin.fitting.memory import ATTEMPTS, OutOfMemory, refusals_told
from qspin.generation import Completion, Request, generate
from qspin.records import Message
from qspin.sampling import noise_key
from qspin.stopping import check_stop
from qspin.trials.loaded import Loaded
from qspin.trials.reading import Passage, Reading, read

NEW_TOKENS = 256  # where a task sets no limit, as in HFLM
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is set counts


class Player(TemplateLM):  # type: ignore[misc]
    """Whoever is in the slot, as the harness's model."""

    def __init__(self, loaded: Loaded, on_requests: Callable[[float], None]) -> None:
        """`on_requests` hears of requests as they are done, and of parts of them."""
        super().__init__()
        self._loaded = loaded
        self._renderer = loaded.speech.renderer
        self._on_requests = on_requests
        self.max_length = loaded.speech.context

    # --- text ---

    @property
    def eot_token_id(self) -> int:
        return self._renderer.end_of_text

    @property
    def prefix_token_id(self) -> int:
        return self._renderer.before_text

    @property
    def tokenizer_name(self) -> str:
        return self._loaded.speech.base.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        return list(self._renderer.plain_ids(string, begun=add_special_tokens is not False))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A system text goes where the template has room for it: `Renderer`. Without a generation prompt, the last
        message is the beginning of an answer."""
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        if add_generation_prompt:
            return self._renderer.prompt_text(messages)
        return self._renderer.prompt_text(messages[:-1]) + messages[-1].content

    # --- how likely ---

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        # the harness shows a bar of its own unless told otherwise, and does not tell
        answers: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return answers

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        passages = [self._passage(context, continuation) for _, context, continuation in requests]
        return [(reading.logp, reading.greedy) for reading in self._read(passages, len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:  # noqa: ARG002
        """Each token once, after as much as the context holds of what stands before it."""
        passages, owners = [], []
        for index, request in enumerate(requests):
            windows = utils.get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
            )
            for context, continuation in map(utils.make_disjoint_window, windows):
                passages.append(self._passage(context, continuation))
                owners.append(index)
        sums = [0.0] * len(requests)
        for owner, reading in zip(owners, self._read(passages, len(requests)), strict=True):
            sums[owner] += reading.logp
        return sums

    def _read(self, passages: Sequence[Passage], requests: int) -> list[Reading]:
        def on_read(count: int) -> None:
            self._on_requests(count * requests / len(passages))
            check_stop()

        return read(self._loaded.model, passages, on_read=on_read)

    def _passage(self, context: list[int], continuation: list[int]) -> Passage:
        """A context too long loses its beginning. The last token is read by nobody."""
        if not 0 < len(continuation) <= self.max_length:
            raise QspinError(
                f"a text of the task whose likelihood is asked for has {len(continuation)} tokens; between 1 and the "
                f"{self.max_length} of the model's context are possible"
            )
        return Passage(tuple([*context, *continuation][-self.max_length - 1 : -1]), tuple(continuation))

    # --- what it says ---

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:  # noqa: ARG002
        by_settings: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            by_settings[json.dumps(request.args[1], sort_keys=True)].append(index)
        answers = [""] * len(requests)
        for text, members in by_settings.items():
            settings = Sampling.of(json.loads(text))
            room = self.max_length - settings.new_tokens
            if room < 1:
                raise QspinError(
                    f"the task asks for {settings.new_tokens} new tokens; the model's context is {self.max_length}"
                )
            prompts = [
                Request(self._prompt(requests[index].args[0], room), noise_key(0, 0, f"request {index}"))
                for index in members
            ]
            for index, completion in zip(members, self._generate(prompts, settings), strict=True):
                answers[index] = settings.cut(self._renderer.completion_text(completion.ids))
        return answers

    def _prompt(self, text: str, room: int) -> tuple[int, ...]:
        """A text too long loses its beginning; an empty one is what comes before a text, as for likelihoods."""
        return tuple(self.tok_encode(text)[-room:] or [self.prefix_token_id])

    def _generate(self, requests: list[Request], settings: Sampling) -> list[Completion]:
        model, renderer = self._loaded.model, self._renderer
        width = rows_at_once(model, max(len(request.prompt_ids) for request in requests) + settings.new_tokens)
        alone = [renderer.plain_ids(term, begun=False) for term in settings.until]  # a control token's name has no text
        stops = {ids[0] for ids in alone if len(ids) == 1}
        done: dict[int, Completion] = {}
        refused = 0  # since the last answer

        def ends(ids: Sequence[int]) -> bool:
            return settings.ended(renderer.completion_text(ids[-settings.tail :]))

        while len(done) < len(requests):
            left = [index for index in range(len(requests)) if index not in done]
            before = len(done)
            told = float(before)

            def on_done(index: int, completion: Completion, left: list[int] = left) -> None:
                done[left[index]] = completion

            def on_step(_tokens: int, rows: float) -> None:
                nonlocal told
                told += rows
                self._on_requests(rows)
                check_stop()

            try:
                with refusals_told():
                    generate(
                        model,
                        [requests[index] for index in left],
                        max_new_tokens=settings.new_tokens,
                        temperature=settings.temperature,
                        top_p=settings.top_p,
                        width=width,
                        stop_ids=self._loaded.speech.stop_ids | {self.eot_token_id} | stops,
                        on_step=on_step,
                        on_done=on_done,
                        ends=ends,
                    )
            except OutOfMemory as error:
                self._on_requests(len(done) - told)  # answers that are begun anew
                refused = 1 if len(done) > before else refused + 1
                if refused == ATTEMPTS:
                    raise QspinError(
                        f"out of memory {ATTEMPTS} times in a row while answering ({error}); close other programs, or "
                        "take a smaller model"
                    ) from None
                width = max(1, min(width, len(left)) // 2)
        return [done[index] for index in range(len(requests))]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How a task wants its answers."""

    new_tokens: int
    temperature: float  # 0: the likeliest token
    top_p: float
    until: tuple[str, ...]

    @staticmethod
    def of(asked: Mapping[str, Any]) -> Sampling:
        """Raises a QspinError: it wants something that is not known here."""
        length = next((int(asked[name]) for name in LENGTH_NAMES if asked.get(name) is not None), NEW_TOKENS)
        sample = asked.get("do_sample")
        temperature = float(asked.get("temperature", 1.0 if sample else 0.0))
        if sample is False:
            temperature = 0.0
        until = asked.get("until") or []
        known = {"do_sample", "temperature", "top_p", "until", *LENGTH_NAMES}
        inert = {"num_beams": 1, "top_k": asked.get("top_k") if temperature == 0 else None}
        strange = {name: value for name, value in asked.items() if name not in known and value != inert.get(name)}
        if strange:
            raise QspinError(f"the task's generation_kwargs want what qspin does not do: {one_line(strange)}")
        terms = [until] if isinstance(until, str) else until
        return Sampling(length, temperature, float(asked.get("top_p", 1.0)), tuple(term for term in terms if term))

    @property
    def tail(self) -> int:
        """A term that has just been completed is within so many tokens, each of a byte or more."""
        return 1 + max((len(term.encode()) for term in self.until), default=0)

    def ended(self, text: str) -> bool:
        return any(term in text for term in self.until)

    def cut(self, text: str) -> str:
        """The text before the first of the terms."""
        return text[: min((text.find(term) for term in self.until if term in text), default=len(text))]
