"""Rows of data sets on the Hub; what can't be had of it is told in one line, and no script of a data set is run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from data_rows import ROWS, codes, load, write_jsonl

from qspin.errors import QspinError


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.mark.usefixtures("offline")
def test_rows_of_a_hub_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    calls = []

    def load_dataset(*args: object, **kwargs: object) -> datasets.Dataset:
        calls.append((args, kwargs))
        return datasets.Dataset.from_list([*ROWS, {"prompt": "Hi", "completion": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    dataset = load("owner/name", split="train[:5]", config="main")
    assert calls == [(("owner/name", "main"), {"split": "train[:5]"})]
    assert [record.id for record in dataset.records] == ["row-1", "row-2", "row-4"]
    assert codes(dataset) == [(3, "empty-completion"), (5, "not-text")]
    assert dataset.fingerprint == load(write_jsonl(tmp_path, *ROWS)).fingerprint


# --- what can't be had ---


def hub_error(detail: str, split: str = "train") -> str:
    return (
        f"nobody/nothing-here: no such file, and split '{split}' of that hub data set cannot be loaded ({detail}); "
        "check its name, data.split, data.config and the connection; HF_HUB_OFFLINE=1 uses a cached copy"
    )


def test_a_hub_that_cannot_be_reached_is_one_line_and_no_long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(QspinError) as caught:
        load("nobody/nothing-here")
    assert time.monotonic() - start < 15
    cause = re.search(r"\((\[\w+ \d+\] [^()\n]+)\)", str(caught.value))  # its words are the system's
    assert cause and str(caught.value) == hub_error(cause[1])


@pytest.mark.usefixtures("offline")
def test_a_hub_id_that_is_not_cached_when_offline() -> None:
    with pytest.raises(QspinError) as caught:
        load("nobody/nothing-here", split="test")
    assert str(caught.value) == hub_error(
        "Couldn't reach 'nobody/nothing-here' on the Hub (OfflineModeIsEnabled)", split="test"
    )


@pytest.mark.usefixtures("offline")
def test_what_the_hub_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    for error in (
        datasets.exceptions.DatasetNotFoundError("Dataset 'x' doesn't exist\non the Hub"),
        datasets.exceptions.DatasetGenerationError("An error occurred"),
        ValueError("Unknown split"),
        RuntimeError("Dataset can't be split"),
        TimeoutError(),
    ):

        def refuse(*_args: object, error: Exception = error, **_kwargs: object) -> None:
            raise error

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        with pytest.raises(QspinError) as caught:
            load("nobody/nothing-here")
        assert str(caught.value) == hub_error(" ".join(str(error).split()) or "TimeoutError")


# --- a loader script ---


class _Hub(BaseHTTPRequestHandler):
    """Serves one data set, me/scripted, that has no README and a script; nothing of it can be loaded."""

    protocol_version = "HTTP/1.1"
    sha = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/datasets/me/scripted"):
            self._answer(200, {"id": "me/scripted", "sha": self.sha, "siblings": [], "private": False, "tags": []})
        elif path.endswith(f"/resolve/{self.sha}/scripted.py"):
            self._answer(200, {}, ETag='"script"')
        else:
            self._answer(404, {"error": "Entry not found"}, **{"X-Error-Code": "EntryNotFound"})

    def _answer(self, status: int, value: Any, **headers: str) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        length = {"Content-Type": "application/json", "Content-Length": str(len(body)), "X-Repo-Commit": self.sha}
        for name, text in {**length, **headers}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def test_a_hub_data_set_with_a_loader_script_is_refused(tmp_path: Path) -> None:
    script = "from qspin.sources import hub_rows\ntry: list(hub_rows('me/scripted', 'train', None))\n"
    script += "except Exception as error: print(type(error).__name__, error)"
    with hub() as url:
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(tmp_path),
            "HF_ENDPOINT": url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == (
        "QspinError me/scripted: is a hub data set with a loader script, and programs of strangers are not run; choose "
        "one that is stored as files, or download its files and name one of them "
        "(Dataset scripts are no longer supported, but found scripted.py)\n"
    )
