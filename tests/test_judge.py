"""A judge over HTTP: which key it is sent, how long it is waited for, and what refusals and failures cost a trial."""

from __future__ import annotations

import datetime
import email.utils
import json
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from command_line import call, process
from judge_server import KEY, MODEL, SEVEN, Failure, JudgeServer
from mtbench_parts import TURNS, kept, one_line, options, questions_of, result_of, trial

from qspin.errors import QspinError
from qspin.records import Message
from qspin.trials import judge as judge_module
from qspin.trials import mtbench_answers
from qspin.trials.judge import Judge


def asked(server: JudgeServer, monkeypatch: pytest.MonkeyPatch, *, timeout: float = 30) -> str:
    monkeypatch.setenv("QSPIN_JUDGE_KEY", KEY)
    return Judge(server.url, MODEL, timeout=timeout).ask([Message("user", "Well?")]).text


# --- addresses, keys and time ---


def test_an_address_may_end_in_the_endpoint(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSPIN_JUDGE_KEY", KEY)
    for url in (f"{server.url}/", f"{server.url}/chat/completions"):
        assert Judge(url, MODEL, timeout=30).ask([Message("user", "Well?")]).text == SEVEN


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("localhost:8080/v1", "begins with http:// or https://"),
        ("ftp://host/v1", "begins with http:// or https://"),
        ("http:///v1", "and a host"),
        ("http://me:secret@host/v1", "leave the login out"),
        ("http://host:port/v1", "give one as http"),
    ],
)
def test_addresses_that_are_none(url: str, told: str, again: Path, server: JudgeServer) -> None:
    answer = trial(again, server, "--judge-url", url)
    assert told in one_line(answer)
    assert "secret" not in answer.err


@pytest.mark.parametrize("proxy", ["sock://me:secret@127.0.0.1:9", "http://me:secret@127.0.0.1:nine"])
def test_a_proxy_that_cannot_be_used(proxy: str, again: Path, server: JudgeServer) -> None:
    answer = call("mtbench", again, *options(again, server), QSPIN_JUDGE_KEY=KEY, ALL_PROXY=proxy, NO_PROXY="")
    assert "the proxy that the environment names can't be used" in one_line(answer)
    assert "secret" not in answer.err


def test_certificates_that_cannot_be_read(
    again: Path, server: JudgeServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (tmp_path / "none.pem", questions_of(again)):
        answer = call("mtbench", again, *options(again, server), QSPIN_JUDGE_KEY=KEY, SSL_CERT_FILE=str(file))
        assert "the certificates that the environment names can't be read (" in one_line(answer)
        assert "mend SSL_CERT_FILE, or unset it" in answer.err
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "none.pem"))
    monkeypatch.setenv("QSPIN_CACHE", str(tmp_path / "cache"))
    with pytest.raises(QspinError, match="certificates that the environment names can't be read"):
        mtbench_answers.read_bench(None, None)


def test_which_key_is_sent(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def judge() -> Judge:
        return Judge(server.url, MODEL, timeout=30)

    monkeypatch.delenv("QSPIN_JUDGE_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    judge().check(print)
    monkeypatch.setenv("QSPIN_JUDGE_KEY", "")  # none, for a judge of one's own
    with pytest.raises(QspinError, match="401: Incorrect API key provided: None"):
        judge().check(print)
    for broken in ("sk-two words", "sk-linefeed\nX: y", "sk-ünicode"):
        monkeypatch.setenv("QSPIN_JUDGE_KEY", broken)
        with pytest.raises(QspinError, match=r"^QSPIN_JUDGE_KEY has characters that no key has; set it anew$"):
            judge()


@pytest.mark.parametrize("seconds", ["inf", "nan", "1e12", "86401", "0"])
def test_a_timeout_that_is_none(seconds: str, again: Path, server: JudgeServer) -> None:
    answer = trial(again, server, "--judge-timeout", seconds)
    assert (answer.code, answer.out, server.asked) == (2, "", [])
    assert "Invalid value for '--judge-timeout'" in answer.err


def test_the_longest_timeout(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(server, monkeypatch, timeout=86_400) == SEVEN


# --- failures that pass ---


def test_a_judge_that_asks_to_wait_is_given_the_time(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fail(429, **{"Retry-After": "1"})
    started = time.monotonic()
    assert asked(server, monkeypatch) == SEVEN
    assert time.monotonic() - started >= 1
    then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3)
    server.fail(503, **{"Retry-After": email.utils.format_datetime(then, usegmt=True)})
    assert asked(server, monkeypatch) == SEVEN
    assert datetime.datetime.now(datetime.UTC) >= then.replace(microsecond=0)
    server.fail(429, **{"Retry-After": "3600"})
    with pytest.raises(QspinError, match="429: out of order, and asks to wait 3600 s; what was judged is kept"):
        asked(server, monkeypatch)
    then = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=3600)
    server.fail(429, **{"Retry-After": email.utils.format_datetime(then.replace(tzinfo=None))})  # -0000: UTC, by rule
    with pytest.raises(QspinError, match=r"429: out of order, and asks to wait 3[56]\d\d s"):
        asked(server, monkeypatch)


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 529])
def test_failures_that_pass_are_tried_again(status: int, server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fail(status)
    server.fail(status, b"<html>")
    assert asked(server, monkeypatch) == SEVEN
    assert (server.failed, len(server.asked)) == (2, 1)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"<html>busy</html>", b"[]", b'{"error": {"message": "busy"}}', b'{"choices": []}'),
        pytest.param(b"[" * 200_000, id="deep"),
    ],
)
def test_answers_that_are_none_are_tried_again(
    body: bytes, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.fail(200, body)
    assert asked(server, monkeypatch) == SEVEN
    for _ in range(6):
        server.fail(200, body)
    with pytest.raises(QspinError, match=r"answers with no chat completion .* did so 6 times in a row"):
        asked(server, monkeypatch)


def test_a_judge_that_hangs(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.gate.clear()
    with pytest.raises(
        QspinError, match=r"does not answer within 0.1 s \(--judge-timeout\), and did so 6 times in a row"
    ):
        asked(server, monkeypatch, timeout=0.1)


@pytest.mark.parametrize(
    "said",
    [
        None,
        "0",
        "Wed, 21 Oct 2015 07:28:00 GMT",
        "Wed, 21 Oct 2015 07:28:00 +99999999999999999999",
        "soon",
    ],
)
def test_pauses_double_whatever_the_server_says(
    said: str | None, server: JudgeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge_module, "FIRST_WAIT", 0.1)
    for _ in range(3):
        server.fail(500, **({} if said is None else {"Retry-After": said}))
    started = time.monotonic()
    asked(server, monkeypatch)
    assert time.monotonic() - started >= 0.1 + 0.2 + 0.4


# --- refusals ---


def test_refusals_are_one_line_and_come_before_any_answer(unasked: Path, server: JudgeServer) -> None:
    wrong = "sk-anotherSecretOfNoAccount"
    answer = trial(unasked, server, key=wrong)
    assert "does not accept the key (HTTP 401: Incorrect API key provided: Bearer ***)" in one_line(answer)
    assert wrong not in answer.out + answer.err
    assert "does not accept the key" in one_line(trial(unasked, server, key=""))
    said = one_line(trial(unasked, server, "--judge-model", "gpt-5"))
    assert "no model 'gpt-5' (HTTP 404: The model `gpt-5` does not exist)" in said
    said = one_line(trial(unasked, server, "--judge-url", server.url.removesuffix("/v1")))
    assert "(HTTP 404: Not Found); check --judge-url, which most often ends in /v1" in said
    said = one_line(trial(unasked, server, "--judge-url", "http://no-such-host.invalid/v1"))
    assert "no machine is known by the name in http://no-such-host.invalid" in said
    said = one_line(trial(unasked, server, "--judge-url", "http://127.0.0.1:9/v1"))
    assert "can't be reached" in said and "6 times in a row" in said
    server.fail(400, b'{"error": {"message": "temperature is not supported"}}')
    assert "refuses (HTTP 400: temperature is not supported)" in one_line(trial(unasked, server))
    server.fail(301, b"", Location="https://elsewhere.invalid/v1?key=secret")
    assert "refuses (HTTP 301: it is at https://elsewhere.invalid/v1)" in one_line(trial(unasked, server))
    assert not list((unasked / "mt-bench").glob("*/*")), "no answer was made"


@pytest.mark.parametrize("name", ["hex", "rot13", "undefined", "utf-16"])
def test_an_answer_in_an_encoding_that_is_none(name: str, server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fail(401, b"who are you?", **{"Content-Type": f"text/plain; charset={name}"})
    with pytest.raises(QspinError, match=r"does not accept the key \(HTTP 401: who are you"):
        asked(server, monkeypatch)


def test_a_refusal_without_a_word(server: JudgeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    server.fail(401, b"")
    with pytest.raises(QspinError, match=r"does not accept the key \(HTTP 401: without a word\)"):
        asked(server, monkeypatch)


def test_a_prompt_that_is_refused_alone_is_counted_and_asked_again(again: Path, server: JudgeServer) -> None:
    arguments = (again, server, "--iteration", "base", "--at-once", "1")

    def judge(_: str) -> str:
        if len(server.prompts()) == 2:
            server.fail(400, b'{"error": {"message": "the context is 4096 tokens"}}')
        return SEVEN

    server.judge = judge
    answer = trial(*arguments)
    assert answer.code == 0, answer.err
    assert "would not take 1 prompts" in answer.out and "HTTP 400: the context is 4096 tokens" in answer.out
    assert len(kept(again)) == TURNS - 1
    assert result_of(again)["figures"]["grades"]["base"]["all"]["both"]["unparsed"] == 1
    server.judge = lambda _: SEVEN
    assert trial(*arguments).code == 0
    assert len(server.prompts()) == TURNS
    assert result_of(again)["figures"]["grades"]["base"]["all"]["both"]["unparsed"] == 0


def test_refused_prompts_are_sent_again_by_a_command_that_has_nothing_else_to_send(
    again: Path, server: JudgeServer
) -> None:
    refusal = Failure(400, b'{"error": {"message": "the context is 4096 tokens"}}')
    arguments = (again, server, "--iteration", "base")
    server.judge = lambda prompt: refusal if "What is 3?" in prompt else SEVEN
    for sent in (TURNS, TURNS + 2):
        answer = trial(*arguments)
        assert answer.code == 0, answer.err
        assert "would not take 2 prompts" in answer.out and "HTTP 400: the context is 4096 tokens" in answer.out
        assert len(server.prompts()) == sent
        assert result_of(again)["figures"]["grades"]["base"]["all"]["both"]["unparsed"] == 2
    server.fail(400, b'{"error": {"message": "temperature is not supported"}}')
    assert "refuses (HTTP 400: temperature is not supported)" in one_line(trial(*arguments)), "a judge that takes none"
    server.judge = lambda _: SEVEN
    assert trial(*arguments).code == 0
    assert len(kept(again)) == TURNS
    assert result_of(again)["figures"]["grades"]["base"]["all"]["both"]["unparsed"] == 0


# --- a trial that breaks off ---


def test_a_judge_that_dies_loses_nothing(again: Path, server: JudgeServer) -> None:
    def judge(_: str) -> str:
        if len(server.prompts()) > 4:
            for _ in range(40):
                server.fail(503)
        return SEVEN

    server.judge = judge
    arguments = (again, server, "--iteration", "base")
    answer = trial(*arguments)
    assert "HTTP 503: out of order, and did so 6 times in a row; what was judged is kept" in one_line(answer)
    assert "HTTP 503: out of order; asked again after a pause" in answer.out
    before = len(server.prompts())
    assert before == len(kept(again)) < TURNS
    server._failures.clear()
    server.judge = lambda _: SEVEN
    assert trial(*arguments).code == 0
    assert len(server.prompts()) == TURNS and len(set(server.prompts())) == TURNS


def test_ctrl_c_keeps_what_was_judged_and_goes_on(again: Path, server: JudgeServer) -> None:
    server.seconds = 0.3
    arguments = ("mtbench", again, *options(again, server), "--iteration", "base", "--at-once", "2")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QSPIN_JUDGE_KEY", KEY)
        command = process(*arguments)
    deadline = time.monotonic() + 120
    while len(server.prompts()) < 3:
        assert command.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    command.send_signal(signal.SIGINT)
    out, err = command.communicate(timeout=60)
    assert (command.returncode, err) == (130, "stopped; the same command goes on from the last finished piece\n")
    before = len(server.prompts())
    assert 3 <= before < TURNS
    assert len(kept(again)) == before, "what was under way is kept too"
    server.seconds = 0
    assert call(*arguments, QSPIN_JUDGE_KEY=KEY).code == 0
    assert len(server.prompts()) == TURNS and max(Counter(server.prompts()).values()) == 1
    assert KEY not in out + err


def test_the_key_is_in_no_file_and_no_output(again: Path, server: JudgeServer) -> None:
    """Of a judge that gives it away: what it says is kept, without the key."""
    server.judge = lambda _: f"Your key is {KEY}. Rating: [[7]]"
    server.fail(500, json.dumps({"error": {"message": f"bad {KEY}"}}).encode())
    answer = trial(again, server)
    report = call("report", again, QSPIN_JUDGE_KEY=KEY)
    assert answer.code == report.code == 0
    assert "bad ***" in answer.out
    for said in (answer, report):
        assert KEY not in said.out + said.err
    files = [path for path in again.rglob("*") if path.is_file()]
    assert sum("grades" in path.parts for path in files) == 2 * TURNS
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []
    assert next(iter(kept(again).values()))["judgment"] == "Your key is ***. Rating: [[7]]"
