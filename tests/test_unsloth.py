"""The functions of Unsloth that we call exist, with the arguments we give: an upgrade that breaks us is seen here.

Unsloth needs a GPU to compute, but can be imported without one. It is installed into a folder of its own for this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from qspin.errors import QspinError
from qspin.layers import backends
from qspin.layers.backends import OLDEST_UNSLOTH, choose_backend, unsloth_missing

# what it imports, beside what qspin itself needs
NEEDS = (
    "unsloth_zoo", "trl<=1.15.0", "tyro", "docstring-parser", "shtab", "typeguard", "torchao", "cut_cross_entropy",
    "hf_transfer", "msgspec", "json5", "structlog", "nest-asyncio", "einops", "sentencepiece", "protobuf", "triton",
    "wheel",
)  # fmt: skip
SIGNATURES = """
import inspect, json
from qspin.layers.backends import unsloth_kernels
unsloth_kernels()
import unsloth.kernels as kernels
print(json.dumps({name: list(inspect.signature(getattr(kernels, name)).parameters) for name in %r}))
"""
CALLED = {
    "fast_dequantize": ["W", "quant_state", "use_global_buffer"],
    "fast_rms_layernorm": ["layernorm", "X", "gemma"],
    "fast_rope_embedding": ["Q", "K", "cos", "sin"],
    "swiglu_fg_kernel": ["e", "g"],
    "swiglu_DWf_DW_dfg_kernel": ["DW", "e", "g"],
    "geglu_exact_forward_kernel": ["gate", "up"],
    "geglu_exact_backward_kernel": ["DW", "e", "g"],
    "geglu_approx_forward_kernel": ["gate", "up"],
    "geglu_approx_backward_kernel": ["DW", "e", "g"],
}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the oldest Unsloth that qspin allows."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (needed,) = extras["unsloth"]
    folder = tmp_path_factory.mktemp("unsloth")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run(
        [*install, needed.replace(">=", "=="), *NEEDS], capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        pytest.skip(f"Unsloth is not to be had: {done.stderr.strip().splitlines()[-1]}")
    return folder


def test_what_we_call_is_there(site: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ROOT), str(site), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "UNSLOTH_ALLOW_CPU": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SIGNATURES % list(CALLED)],
        capture_output=True, text=True, timeout=300, env=environment, cwd=tmp_path, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.iterdir()), "it leaves its own files where the user works"
    found = json.loads(done.stdout.splitlines()[-1])
    for name, arguments in CALLED.items():
        assert [argument for argument in found[name] if argument in arguments] == arguments, name
    assert found["fast_dequantize"][:2] == ["W", "quant_state"]  # given by position


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
        told = unsloth_missing(gpu)
        assert told is None if missing is None else (told or "").startswith(missing)
    assert choose_backend("auto", gpu)[0] == "transformers"
    with pytest.raises(QspinError, match=r"no unsloth here: Unsloth 2026\.2\.10 is older"):
        choose_backend("unsloth", gpu)
