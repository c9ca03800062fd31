"""A run's base in memory, its players taking turns in the slot: what one talks with, and what a benchmark asks.

    loaded = Loaded.open(RunDir(Path("runs/mine")))
    loaded.seat("1")                                    # base, sft, last, best or an iteration's number
    [text] = loaded.generate(["Why is the sky blue?"])

The base is loaded once. The run's rows are not read, so a run whose data has moved can be talked with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from qspin.adapters import Adapter, load_adapter, load_own
from qspin.budget import rows_at_once
from qspin.chat import Renderer
from qspin.config import RunConfig
from qspin.errors import QspinError
from qspin.exports.recipe import recorded_config
from qspin.figures.players import chosen_iteration
from qspin.files import ADAPTER_WEIGHTS, sha256_of
from qspin.fitting.memory import OutOfMemory, keep_freed_memory, refusals_told
from qspin.generation import Completion, Request, generate
from qspin.machine import computing_device
from qspin.model import SlotModel
from qspin.prepare import Speech
from qspin.record import check_base, check_input, load_recorded, recorded_speech
from qspin.records import Message, Role
from qspin.run_dir import RunDir
from qspin.sampling import noise_key
from qspin.stopping import check_stop

OnText = Callable[[int, str], None]  # of which conversation, and what comes next


@dataclass(frozen=True, slots=True)
class Reply:
    """What a player answered."""

    text: str
    tokens: int
    ended: bool  # False: cut at the cap


class Loaded:
    """A run's players on one base; use `open`. Not for two threads at once: there is one slot."""

    def __init__(self, run_dir: RunDir, config: RunConfig, speech: Speech, model: SlotModel) -> None:
        self.run_dir, self.config, self.speech, self.model = run_dir, config, speech, model
        self._fresh = model.adapter()  # B = 0: it plays as the base
        self.player = "base"

    @staticmethod
    def open(
        run_dir: RunDir, wanted: str | int | None = None, say: Callable[[str], None] = lambda _text: None
    ) -> Loaded:
        """Load the base of a run, and put a player into the slot: see `seat`.

        Args:
            say: hears of it if the base is not bit by bit that of the run, as another device may make it.

        Raises:
            QspinError: this is no run, there is no such player, or the base can't be had as it was.
        """
        run_dir.check_run()
        player = named(run_dir, wanted)
        config = recorded_config(run_dir)
        keep_freed_memory()
        speech = recorded_speech(run_dir, config)
        device = computing_device()
        model = load_recorded(run_dir, speech.base, config, device)
        check_base(run_dir, model, say)
        loaded = Loaded(run_dir, config, speech, model)
        loaded.seat(player)
        return loaded

    def seat(self, wanted: str | int | None) -> str:
        """Put a player into the slot, where it stays; its name.

        Args:
            wanted: base, sft (the warm start), last, best or an iteration's number; None is the iteration that the
                run keeps.

        Raises:
            QspinError: there is no such player, or its adapter is damaged, or is not the one that the run began with.
        """
        player = named(self.run_dir, wanted)
        self.model.set_adapter(self._adapter(player))
        self.player = player
        return player

    def reply(
        self,
        conversations: Sequence[Sequence[Message]],
        *,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
        on_text: OnText | None = None,
    ) -> list[Reply]:
        """Whoever is in the slot answers each conversation, which ends on a user turn.

        Args:
            max_new_tokens, temperature, top_p: as in the run's generation unless given; a temperature of 0 always takes
                the likeliest token.
            seed: of sampling; the same seed, conversation and player give the same reply, beyond rounding.
            on_text: hears the replies piece by piece as they are made, each with its conversation's index.

        Raises:
            QspinError: a conversation can't be rendered, or does not fit into the model's context.
            OutOfMemory: memory does not hold one reply, or ran out after `on_text` had heard some.
        """
        settings = self.config.generation
        cap = settings.max_new_tokens if max_new_tokens is None else max_new_tokens
        heat = settings.temperature if temperature is None else temperature
        nucleus = settings.top_p if top_p is None else top_p
        numbers = isinstance(cap, int) and isinstance(heat, int | float) and isinstance(nucleus, int | float)
        if not numbers or cap < 1 or not heat >= 0 or not 0 < nucleus <= 1:  # NaN is neither
            raise QspinError(
                f"max_new_tokens={cap!r}, temperature={heat!r}, top_p={nucleus!r}: a whole number from 1, a number "
                "from 0 and one above 0 up to 1 are possible"
            )
        requests = [
            Request(ids, noise_key(seed, 0, f"reply to {ids}"))
            for ids in (self._prompt(conversation, cap) for conversation in conversations)
        ]
        if not requests:
            return []
        width = rows_at_once(self.model, max(len(request.prompt_ids) for request in requests) + cap)
        streams = [Stream(self.speech.renderer, index, on_text) for index in range(len(requests))] if on_text else []
        completions = self._complete(
            requests, streams, width=width, max_new_tokens=cap, temperature=heat, top_p=nucleus
        )
        for stream in streams:
            stream.end()
        text = self.speech.renderer.completion_text
        return [Reply(text(completion.ids), len(completion.ids), completion.ended) for completion in completions]

    def _complete(
        self, requests: Sequence[Request], streams: Sequence[Stream], *, width: int, **settings: Any
    ) -> list[Completion]:
        """With half as many side by side after each refusal; what is finished is not made again. A reply that a stream
        has begun to tell could only be told twice. Raises OutOfMemory."""
        done: dict[int, Completion] = {}
        while len(done) < len(requests):
            left = [index for index in range(len(requests)) if index not in done]
            width = min(width, len(left))

            def on_done(index: int, completion: Completion, left: list[int] = left) -> None:
                done[left[index]] = completion

            def on_token(index: int, token: int, left: list[int] = left) -> None:
                if streams:
                    streams[left[index]].add(token)

            try:
                with refusals_told():
                    generate(
                        self.model,
                        [requests[index] for index in left],
                        width=width,
                        stop_ids=self.speech.stop_ids,
                        on_step=lambda _tokens, _done: check_stop(),
                        on_done=on_done,
                        on_token=on_token,
                        **settings,
                    )
            except OutOfMemory:
                if width == 1 or any(stream.begun for stream in streams):
                    raise
                width //= 2
        return [done[index] for index in range(len(requests))]

    def generate(self, prompts: Iterable[str | Sequence[Mapping[str, str]]], **settings: Any) -> list[str]:
        """The replies' texts to prompts: each a user turn, or a conversation as `[{"role": "user", "content": …}]`.

        Args:
            settings: as for `reply`.

        Raises:
            QspinError: a single prompt is not in a list, a turn is no turn, memory runs out; as `reply`.
        """
        asked = list(prompts)  # a generator is read once
        if isinstance(prompts, str | Mapping) or not all(isinstance(prompt, Sequence) for prompt in asked):
            raise QspinError('generate takes a list of prompts, as in generate(["Why is the sky blue?"])')
        conversations = [
            [Message("user", prompt)] if isinstance(prompt, str) else [_message(turn) for turn in prompt]
            for prompt in asked
        ]
        try:
            return [reply.text for reply in self.reply(conversations, **settings)]
        except OutOfMemory as error:
            raise QspinError(
                f"out of memory while replying ({error}); ask for fewer new tokens, or for fewer replies at once where "
                "on_text hears them"
            ) from None

    def _prompt(self, conversation: Sequence[Message], new: int) -> tuple[int, ...]:
        if not all(isinstance(turn, Message) for turn in conversation):
            raise QspinError("reply takes conversations, lists of qspin.records.Message; generate takes texts")
        ids = self.speech.renderer.prompt_ids(conversation)
        if len(ids) + new > self.speech.context:
            raise QspinError(
                f"a conversation of {len(ids)} tokens and {new} new ones are more than the model's "
                f"{self.speech.context}; begin a new one, or ask for fewer new tokens"
            )
        return ids

    def _adapter(self, player: str) -> Adapter:
        init = self.config.model.init_adapter
        if player == "base":  # whom the run began with
            if init is None:
                return self._fresh
            adapter = load_adapter(Path(init))
            check_input(self.run_dir, "model.init_adapter", sha256_of(Path(init) / ADAPTER_WEIGHTS))
            return adapter
        return load_own(self.run_dir.player(player).adapter)


class Stream:
    """A reply's text as its tokens come: never half a character, and no control tokens."""

    def __init__(self, renderer: Renderer, index: int, on_text: OnText) -> None:
        self._renderer, self._index, self._on_text = renderer, index, on_text
        self._ids: list[int] = []
        self._said = ""

    @property
    def begun(self) -> bool:
        return bool(self._ids)

    def add(self, token: int) -> None:
        self._ids.append(token)
        self._say(self._renderer.completion_text(self._ids).rstrip("\ufffd"))

    def end(self) -> None:
        self._say(self._renderer.completion_text(self._ids))

    def _say(self, text: str) -> None:
        # what was said can't be taken back: a text that begins otherwise waits until it goes on as said
        if text.startswith(self._said) and len(text) > len(self._said):
            self._on_text(self._index, text[len(self._said) :])
            self._said = text


def _message(turn: Mapping[str, str]) -> Message:
    known = isinstance(turn, Mapping) and turn.keys() == {"role", "content"} and turn["role"] in get_args(Role)
    if not known or not isinstance(turn["content"], str):
        raise QspinError(f"a turn has a role ({', '.join(get_args(Role))}) and its content; got {turn!r:.200}")
    return Message(turn["role"], turn["content"])  # type: ignore[arg-type]


def named(run_dir: RunDir, wanted: str | int | None, option: str = "--iteration") -> str:
    """The player that is meant, by its own name; see `Loaded.seat`. `option` is where it was named."""
    wanted = str(wanted) if isinstance(wanted, int) else wanted
    if wanted == "base":
        return wanted
    if wanted == "sft":
        if not run_dir.warm_start.adapter.is_dir():
            raise QspinError(f"{run_dir.path} has no warm start (sft.epochs is 0); base, last, best or a number may be")
        return wanted
    return str(chosen_iteration(run_dir, wanted, option))
