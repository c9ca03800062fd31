"""A judge on loopback: as much of OpenAI's chat completions as a client needs, over HTTP, with failures at will.

    with JudgeServer(lambda prompt: "Rating: [[7]]") as server:
        server.fail(status=429, **{"Retry-After": "1"})      # the next request, once
        subprocess.run([..., "--judge-url", server.url], env={**os.environ, "QSPIN_JUDGE_KEY": KEY})
        server.asked                                          # the bodies of the requests that it answered

It is strict where a judge is: no key, no answer; another model than its own is not there.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-loopbackSecretOfNoAccount"
MODEL = "scripted/judge:1"
SEVEN = "It will do. Rating: [[7]]"


@dataclass
class Failure:
    """What a request gets in place of a judgement."""

    status: int
    body: bytes = b'{"error": {"message": "out of order"}}'
    headers: dict[str, str] = field(default_factory=dict)


class JudgeServer:
    """Serves from threads of this process for as long as the `with` block runs."""

    def __init__(self, judge: Callable[[str], Failure | str | None]) -> None:
        self.judge = judge  # of the text of the user's message
        self.asked: list[dict[str, Any]] = []
        self.finish = "stop"  # why its answers end
        self.failed = 0
        self.busiest = 0  # requests at once
        self.seconds = 0.0  # that each answer takes
        self.gate = threading.Event()  # answers wait for it
        self.gate.set()
        self._failures: list[Failure] = []
        self._under_way = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def fail(self, status: int, body: bytes | None = None, **headers: str) -> None:
        self._failures.append(Failure(status, **({} if body is None else {"body": body}), headers=headers))

    def prompts(self) -> list[str]:
        """The user's messages, without the question that comes before any work."""
        found = [body["messages"][-1]["content"] for body in self.asked]
        return [text for text in found if text != "Say: ready"]

    def answer(self, body: dict[str, Any]) -> Failure | str | None:
        with self._lock:
            self._under_way += 1
            self.busiest = max(self.busiest, self._under_way)
        try:
            time.sleep(self.seconds)
            self.gate.wait()
            with self._lock:
                if self._failures:
                    self.failed += 1
                    return self._failures.pop(0)
                self.asked.append(body)
            return self.judge(body["messages"][-1]["content"])
        finally:
            with self._lock:
                self._under_way -= 1


class _Handler(BaseHTTPRequestHandler):
    owner: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.headers.get("authorization") != f"Bearer {KEY}":
            said = f"Incorrect API key provided: {self.headers.get('authorization')}"
            self._send(401, json.dumps({"error": {"message": said}}).encode())
        elif self.path != "/v1/chat/completions":
            self._send(404, b'{"detail": "Not Found"}')
        elif body["model"] != MODEL:
            said = f"The model `{body['model']}` does not exist"
            self._send(404, json.dumps({"error": {"message": said, "code": "model_not_found"}}).encode())
        else:
            found = self.owner.answer(body)
            if isinstance(found, Failure):
                self._send(found.status, found.body, **found.headers)
            else:
                message = {"role": "assistant", "content": found}
                choice = {"index": 0, "message": message, "finish_reason": self.owner.finish}
                self._send(200, json.dumps({"object": "chat.completion", "choices": [choice]}).encode())

    def log_message(self, *_: object) -> None:
        pass

    def _send(self, status: int, content: bytes, **headers: str) -> None:
        try:
            self.send_response(status)
            for name, text in {
                "Content-Type": "application/json",
                "Content-Length": str(len(content)),
                **headers,
            }.items():
                self.send_header(name, text)
            self.end_headers()
            self.wfile.write(content)
        except OSError:  # whoever asked has left
            self.close_connection = True
