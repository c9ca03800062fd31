"""What can be known of a GPU's kernels without one: what we call of Unsloth exists, with the arguments we give; what
kernels in Triton compute; that ours compiles.

Unsloth and Triton can be imported without a GPU. They are installed into a folder of their own for this.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ARCHITECTURES, ROOT

from qspin.layers.backends import REWRITTEN

# what it imports, beside what qspin itself needs
NEEDS = (
    "unsloth_zoo", "trl<=1.15.0", "tyro", "docstring-parser", "shtab", "typeguard", "torchao", "cut_cross_entropy",
    "hf_transfer", "msgspec", "json5", "structlog", "nest-asyncio", "einops", "sentencepiece", "protobuf", "wheel",
    "triton==3.7.1",  # whose interpreter tests/gpu/interpreted.py completes
)  # fmt: skip
SIGNATURES = """
import importlib, inspect, json
from qspin.layers.backends import unsloth_kernels
unsloth_kernels()
import unsloth.kernels as kernels
found = {name: list(inspect.signature(getattr(kernels, name)).parameters) for name in %r}

def rewritten(family):
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return not getattr(modeling, f"{family.capitalize()}Attention").forward.__module__.startswith("transformers.")

print(json.dumps([found, [family for family in %r if rewritten(family)]]))
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


def python(site: Path, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process that has the packages of `site`."""
    path = os.pathsep.join([str(ROOT), str(site), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | {"PYTHONPATH": path, "UNSLOTH_ALLOW_CPU": "1", "HF_HUB_OFFLINE": "1"} | environment,
        cwd=folder,
        check=False,
    )


def test_what_we_call_is_there(site: Path, tmp_path: Path) -> None:
    families = [*ARCHITECTURES, "gemma3"]
    done = python(site, tmp_path, "-c", SIGNATURES % (list(CALLED), families))
    assert done.returncode == 0, done.stderr[-2000:]
    assert not list(tmp_path.iterdir()), "it leaves its own files where the user works"
    found, rewritten = json.loads(done.stdout.splitlines()[-1])
    assert rewritten == [family for family in families if family in REWRITTEN]
    for name, arguments in CALLED.items():
        assert [argument for argument in found[name] if argument in arguments] == arguments, name
    assert found["fast_dequantize"][:2] == ["W", "quant_state"]  # given by position


@pytest.mark.slow
def test_kernels_compute_what_they_should(site: Path, tmp_path: Path) -> None:
    """Those written in Triton, ours and Unsloth's, carried out by its interpreter."""
    tests = str(ROOT / "tests" / "gpu" / "test_triton_kernels.py")
    options = ["-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "made")]
    done = python(site, tmp_path, "-m", "pytest", *options, tests, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-6000:]
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("generation", "multiplier"), [(90, "wgmma"), (100, "tcgen05.mma")])
def test_ours_compiles(generation: int, multiplier: str, dtype: str, site: Path, tmp_path: Path) -> None:
    """For the GPUs that it is the fastest on: into what they run, by their own multipliers, in the memory they have."""
    script = str(ROOT / "tests" / "compiled.py")
    done = python(site, tmp_path, script, str(generation), dtype, TRITON_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr[-4000:]
    made = json.loads(done.stdout)
    assert made["32"]["multipliers"] == ["mma.sync"]  # the others are for 64 outputs or more
    assert multiplier in made["128"]["multipliers"]
    for kernel in made.values():
        assert kernel["code"] > 0
        assert kernel["shared"] < 227 * 1024
