"""A judge: a model behind an OpenAI-compatible endpoint, asked several things at once.

    judge = Judge("http://127.0.0.1:8080/v1", "a-model", timeout=600)
    ask_all(judge, {"81": [Message("user", "…")]}, parse=rating, keep=write, note=print, at_once=4)

The key comes from the environment and goes into one header; it is written and said nowhere.
"""

from __future__ import annotations

import datetime
import email.utils
import itertools
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

import httpx

from qspin.errors import QspinError, one_line
from qspin.records import Message
from qspin.safe_text import redacted
from qspin.stopping import stops_held

KEYS = ("QSPIN_JUDGE_KEY", "OPENAI_API_KEY")  # the first that is set; an empty one is no key
MAX_TOKENS = 2048  # of a judgement, as in FastChat
TRIES = 6  # at one request
FIRST_WAIT, MOST_WAIT = 1.0, 300.0  # seconds; each wait is twice the one before
GRACE = 10.0  # seconds for what is under way when a command stops
CONNECT = 10.0

_TRY_AGAIN = {408, 425, 429}  # and 500 and above
_PROMPT = {400, 413, 422}  # may be about one prompt, as one that is too long
GOES_ON = "what was judged is kept, and the same command goes on"

Verdict = TypeVar("Verdict")
Name = TypeVar("Name")


@dataclass(frozen=True, slots=True)
class Judgement(Generic[Verdict]):
    """What a judge said, and what that comes to."""

    text: str
    verdict: Verdict | None  # None: nothing in the text, or it was cut; nor when asked once more
    refused: bool = False  # the judge would not take this prompt, and the text says why


@dataclass(frozen=True, slots=True)
class Said:
    """What a judge said to a conversation."""

    text: str
    cut: bool  # at MAX_TOKENS, or at the end of its context


class _Again(Exception):
    """A failure that may pass; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


class _PromptRefused(Exception):
    """Of one prompt, by a judge that takes others."""


class _Stopped(Exception):
    """Nobody waits for an answer any more."""


class Judge:
    """Where a judge is and what it is called. May be asked from several threads."""

    def __init__(self, url: str, model: str, *, timeout: float) -> None:
        """
        Args:
            url: what stands before /chat/completions.
            timeout: seconds for one answer.

        Raises:
            QspinError: the address or the key can't be one, or as `http_client`.
        """
        self.model, self.where, self._timeout = model, _place(url), timeout
        self._address = _endpoint(url)
        self._answered = False
        limits = httpx.Timeout(timeout, connect=min(timeout, CONNECT))
        self._client = http_client(limits, _authorization())

    def check(self, note: Callable[[str], None]) -> None:
        """Ask it for a word, before work that would be for nothing if it refused; once it has answered, no more.

        What it refuses from then on may be one prompt, as one that is too long.

        Raises:
            QspinError: it refuses, or can't be reached.
        """
        if not self._answered:
            self.ask([Message("user", "Say: ready")], note=note)

    def ask(
        self,
        messages: Sequence[Message],
        stop: threading.Event | None = None,
        note: Callable[[str], None] = lambda _text: None,
    ) -> Said:
        """What it says to a conversation, at temperature 0. Failures that may pass are tried again.

        Raises:
            QspinError: it refuses, or fails again and again.
        """
        stop, wait = stop or threading.Event(), FIRST_WAIT
        for attempt in itertools.count(1):
            if stop.is_set():
                raise _Stopped
            try:
                return self._asked_once(messages)
            except _Again as error:
                pause = max(wait, error.wait)
                if attempt == TRIES or pause > MOST_WAIT:
                    more = f"asks to wait {pause:.0f} s" if pause > MOST_WAIT else f"did so {attempt} times in a row"
                    raise QspinError(f"the judge at {self.where} {error}, and {more}; {GOES_ON}") from None
                note(f"the judge at {self.where} {error}; asked again after a pause")
                stop.wait(pause)
                wait *= 2
        raise AssertionError  # it counts for ever

    def _asked_once(self, messages: Sequence[Message]) -> Said:
        asked = {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
        }
        try:
            response = self._client.post(self._address, json=asked)
        except httpx.ReadTimeout:
            raise _Again(f"does not answer within {self._timeout:g} s (--judge-timeout)") from None
        except httpx.TransportError as error:
            if _unknown_host(error):
                raise QspinError(
                    f"--judge-url: no machine is known by the name in {self.where} ({_said(str(error))}); check it, "
                    "and the connection"
                ) from None
            raise _Again(f"can't be reached ({_said(str(error) or type(error).__name__)})") from None
        except httpx.HTTPError as error:
            raise _Again(f"answers what can't be read ({_said(str(error))})") from None
        response.encoding = "utf-8"  # whatever a server calls it: Python has codecs that are none of text
        self._check_status(response)
        said = _content(response)
        self._answered = True
        return said

    def _check_status(self, response: httpx.Response) -> None:
        status = response.status_code
        if status == 200:
            return
        answer = f"HTTP {status}: {_error_text(response)}"
        if status in _TRY_AGAIN or status >= 500:
            raise _Again(f"answers {answer}", _retry_after(response))
        if status in _PROMPT and self._answered:
            raise _PromptRefused(answer)
        if status in {401, 403}:
            raise QspinError(
                f"the judge at {self.where} does not accept the key ({answer}); set {KEYS[0]}, or {KEYS[1]}, to one "
                "that it knows"
            )
        if status == 404:
            raise QspinError(
                f"the judge at {self.where} knows no such address or no model {self.model!r} ({answer}); check "
                "--judge-url, which most often ends in /v1, and --judge-model"
            )
        raise QspinError(f"the judge at {self.where} refuses ({answer}); check --judge-url and --judge-model")


def ask_all(
    judge: Judge,
    asked: Mapping[Name, Sequence[Message]],
    *,
    parse: Callable[[str], Verdict | None],
    keep: Callable[[Name, Judgement[Verdict]], None],
    note: Callable[[str], None],
    at_once: int,
) -> None:
    """Have everything judged, `at_once` at a time. `keep` and `note` are called in this thread, as judgements come.

    A text without a verdict, or one that was cut, is asked for once more. When a stop is asked for, or the judge
    refuses, what is under way is waited for a few seconds and kept.

    Raises:
        QspinError: as `Judge.ask`.
    """
    waiting: queue.SimpleQueue[tuple[Name, Sequence[Message]]] = queue.SimpleQueue()
    for item in asked.items():
        waiting.put(item)
    told: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()  # what this thread is to do
    stop = threading.Event()

    def fail(error: BaseException) -> None:
        raise error

    def work() -> None:
        while not stop.is_set():
            try:
                name, messages = waiting.get_nowait()
            except queue.Empty:
                return
            try:
                found = _judged(judge, messages, parse, stop, lambda text: told.put(partial(heard, text)))
            except _Stopped:
                return
            except BaseException as error:  # noqa: BLE001 (raised in the thread that waits)
                told.put(partial(fail, error))
                return
            told.put(partial(done, name, found))

    left, last = len(asked), ""

    def done(name: Name, found: Judgement[Verdict]) -> None:
        nonlocal left
        keep(name, found)
        left -= 1

    def heard(text: str) -> None:
        nonlocal last
        if text != last:  # all threads hear of a judge that is busy
            note(text)
        last = text

    def listen() -> None:
        with stops_held():  # a judgement that has come is kept
            try:
                told.get(timeout=0.2)()
            except queue.Empty:
                return

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(at_once, left))]
    for thread in threads:
        thread.start()
    try:
        while left:
            listen()
    finally:
        stop.set()
        if left and any(thread.is_alive() for thread in threads):
            note(f"waiting up to {GRACE:.0f} s for what is being judged")
        deadline = time.monotonic() + GRACE
        while (any(thread.is_alive() for thread in threads) and time.monotonic() < deadline) or not told.empty():
            try:
                listen()
            except QspinError:  # of another thread, about the same judge
                continue


def _judged(
    judge: Judge,
    messages: Sequence[Message],
    parse: Callable[[str], Verdict | None],
    stop: threading.Event,
    note: Callable[[str], None],
) -> Judgement[Verdict]:
    try:
        for _ in range(2):
            said = judge.ask(messages, stop, note)
            # of one that was cut, what looks like a verdict may be the words in which it was asked for one
            verdict = None if said.cut else parse(said.text)
            if verdict is not None:
                break
    except _PromptRefused as error:
        return Judgement(str(error), None, refused=True)
    return Judgement(said.text, verdict)


# --- addresses and keys ---


def http_client(timeout: httpx.Timeout | float, headers: Mapping[str, str] | None = None) -> httpx.Client:
    """
    Raises:
        QspinError: what the environment names for it can't be used.
    """
    try:
        return httpx.Client(timeout=timeout, headers=headers)
    except (ValueError, ImportError, httpx.InvalidURL) as error:
        raise QspinError(
            f"the proxy that the environment names can't be used ({_said(str(error))}); mend it, or set NO_PROXY"
        ) from None
    except OSError as error:
        raise QspinError(
            f"the certificates that the environment names can't be read ({_said(str(error))}); mend SSL_CERT_FILE, or "
            "unset it"
        ) from None


def _parsed(url: str) -> httpx.URL:
    try:
        found = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise QspinError(f"--judge-url: {_said(str(error))}; give one as http://127.0.0.1:8080/v1") from None
    if found.scheme not in {"http", "https"} or not found.host:
        raise QspinError(
            "--judge-url: an address begins with http:// or https:// and a host, as in http://127.0.0.1:8080/v1"
        )
    if found.userinfo:
        raise QspinError(f"--judge-url: leave the login out of the address; a key is read from {KEYS[0]}")
    return found


def _endpoint(url: str) -> httpx.URL:
    found = _parsed(url)
    path = found.path.rstrip("/").removesuffix("/chat/completions")
    return found.copy_with(path=f"{path}/chat/completions")


def _place(url: str) -> str:
    """For messages: a query may have a key in it."""
    found = _parsed(url)
    return one_line(f"{found.scheme}://{found.netloc.decode('ascii')}")


def _authorization() -> dict[str, str]:
    name = next((name for name in KEYS if name in os.environ), None)
    key = os.environ[name].strip() if name else ""
    if not (key.isascii() and key.isprintable()) or " " in key:  # a client's message would show it
        raise QspinError(f"{name} has characters that no key has; set it anew")
    return {"Authorization": f"Bearer {key}"} if key else {}


# --- answers ---


def _content(response: httpx.Response) -> Said:
    """What the model said; nothing, if it said nothing."""
    try:
        choice = response.json()["choices"][0]
        said, cut = choice["message"]["content"], choice.get("finish_reason") == "length"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise _Again(f"answers with no chat completion ({_error_text(response)})") from None
    # a lone surrogate, which JSON can spell, could not be written to a file
    text = said.encode(errors="replace").decode() if isinstance(said, str) else ""
    return Said(redacted(text), cut)


def _error_text(response: httpx.Response) -> str:
    """What a server says of an error, wherever servers put it; where it sends, if it sends elsewhere."""
    if response.has_redirect_location:
        return f"it is at {_said(response.headers['location'].partition('?')[0])}"  # a query may have a key in it
    if not response.text.strip():
        return "without a word"
    try:
        value = response.json()
    except (ValueError, RecursionError):
        return _said(response.text)
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and key in value:
            value = value[key]
    return _said(value if isinstance(value, str) else response.text)


def _said(text: str) -> str:
    return one_line(redacted(text))


def _retry_after(response: httpx.Response) -> float:
    """Seconds, of a header that has them or a date (RFC 9110, 10.2.3); of a date that is past, below 0."""
    said = response.headers.get("retry-after", "").strip()
    if said.isdecimal():
        return float(said)
    try:
        then = email.utils.parsedate_to_datetime(said)
    except (ValueError, OverflowError):  # the latter of a zone of time that is years away
        return 0.0
    if then.tzinfo is None:
        then = then.replace(tzinfo=datetime.UTC)
    return (then - datetime.datetime.now(datetime.UTC)).total_seconds()


def _unknown_host(error: BaseException | None) -> bool:
    while error is not None and not isinstance(error, socket.gaierror):
        error = error.__cause__ or error.__context__
    return error is not None
