"""Which Unsloth is good enough, and who computes without it."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from qspin.errors import QspinError
from qspin.layers import backends
from qspin.layers.backends import OLDEST_UNSLOTH, choose_backend, unsloth_missing


def test_an_older_one_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras["unsloth"] == [f"unsloth>={OLDEST_UNSLOTH}"]
    gpu = torch.device("cuda")
    assert unsloth_missing(gpu) == "Unsloth is not installed: pip install unsloth"
    about = tmp_path / "unsloth.dist-info" / "METADATA"
    about.parent.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    for version, missing in (
        (OLDEST_UNSLOTH, "Triton finds no C compiler or no Python.h"),
        (OLDEST_UNSLOTH, None),
        ("2027.1.1", None),
        ("2026.2.10", "Unsloth 2026.2.10 is older than"),
    ):
        about.write_text(f"Metadata-Version: 2.1\nName: unsloth\nVersion: {version}\n")
        monkeypatch.setattr(backends, "compiles", lambda missing=missing: not (missing or "").startswith("Triton"))
        told = unsloth_missing(gpu, "llama")
        assert told is None if missing is None else (told or "").startswith(missing)
    assert choose_backend("auto", gpu)[0] == "transformers"
    with pytest.raises(QspinError, match=r"no unsloth here: Unsloth 2026\.2\.10 is older"):
        choose_backend("unsloth", gpu)


def test_a_family_that_it_rewrites_is_played_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(backends.importlib.metadata, "version", lambda _name: OLDEST_UNSLOTH)
    monkeypatch.setattr(backends, "compiles", lambda: True)
    assert choose_backend("auto", gpu, "gemma2") == ("unsloth", "a GPU, and Unsloth is installed")
    name, reason = choose_backend("auto", gpu, "gemma3")
    assert name == "transformers"
    assert reason.startswith("Unsloth computes gemma3 in a way of its own")
    with pytest.raises(QspinError, match=r"no unsloth here: Unsloth computes gemma3_text"):
        choose_backend("unsloth", gpu, "gemma3_text")
