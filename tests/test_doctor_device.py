"""What the doctor finds of what computes: backend, NF4, the GPU, and one that torch can't use."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch

from qspin.doctor import doctor_device
from qspin.doctor.doctor_device import NF4_BOUND, Card, backend, gpu, nf4, nf4_error, unused_gpu
from qspin.doctor.finding import Finding


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has another backend")
def test_the_backend_and_its_reason() -> None:
    assert backend().found == "transformers (Unsloth needs a GPU)"


def test_nf4_is_tried_on_the_device() -> None:
    finding = nf4()
    assert finding.level == "ok", finding
    assert f"NF4 on the {'cuda' if torch.cuda.is_available() else 'cpu'}" in finding.found


def test_the_bound_of_nf4_holds_for_nf4_and_for_little_else() -> None:
    torch.manual_seed(1)
    weights = torch.randn(256, 256)
    packed, constants = bnb.quantize_4bit(weights, blocksize=64, compress_statistics=True, quant_type="nf4")
    back = bnb.dequantize_4bit(packed, constants)
    assert 0.14 < nf4_error(weights, back) < NF4_BOUND
    assert nf4_error(weights, weights) == 0
    assert nf4_error(weights, torch.zeros_like(weights)) == 1
    assert nf4_error(weights, back.roll(1)) > NF4_BOUND
    assert nf4_error(weights, back * 1.1) > NF4_BOUND
    back[0, 0] = torch.nan
    assert not nf4_error(weights, back) <= NF4_BOUND


ADA = Card("NVIDIA GeForce RTX 4060", "550.54", 8.9)


@pytest.mark.parametrize(("card", "index"), [(ADA, "cu128"), (Card("Tesla P100", "550.54", 6.0), "cu126")])
def test_a_card_and_a_torch_for_cpus(card: Card, index: str) -> None:
    finding = unused_gpu(None, [card], "", "torch<2.15,>=2.8")
    assert finding.level == "warning"
    assert finding.found == f"{card.name} is here, but this torch is a build for CPUs: runs use the CPU"
    assert finding.command == (
        f"{sys.executable} -m pip uninstall --yes torch && {sys.executable} -m pip install "
        f'--index-url https://download.pytorch.org/whl/{index} "torch<2.15,>=2.8"'
    )


def test_a_card_that_torch_cannot_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    finding = unused_gpu("13.0", [ADA], "the driver is too old", "torch")
    assert (finding.level, finding.command) == ("warning", "")
    assert "(the driver is too old)" in finding.found
    assert finding.advice == "update NVIDIA's driver: 550.54 may be too old for torch's CUDA 13.0"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert unused_gpu("13.0", [ADA], "none", "torch").advice.startswith("CUDA_VISIBLE_DEVICES is '': unset it")


def test_no_card() -> None:
    assert unused_gpu(None, [], "", "torch") == Finding("GPU", "ok", "none: runs use the CPU")
    finding = unused_gpu("13.0", [], "Found no NVIDIA driver", "torch")
    assert finding.level == "warning"
    assert finding.found == "torch finds none that it can use: runs use the CPU (Found no NVIDIA driver)"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a program of that name first on the path."""

    def write(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return write


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch here is no build for CPUs")
def test_the_driver_is_asked_for_its_cards(nvidia_smi: Callable[[str], None]) -> None:
    answer = "NVIDIA A100, 40GB, 550.54.15, 8.0"
    nvidia_smi(f'[ "$1" = --query-gpu=name,driver_version,compute_cap ] && echo "{answer}" && echo "{answer}"')
    finding = gpu("torch>=2.8")
    assert finding.level == "warning"
    assert finding.found.startswith("NVIDIA A100, 40GB is here, but this torch is a build for CPUs")
    assert finding.command.endswith('/cu128 "torch>=2.8"')


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch here is no build for CPUs")
@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo NVIDIA-SMI has failed; exit 9", "nvidia-smi: NVIDIA-SMI has failed"),
        ("echo card, 1.0, 8.0; exit 15", "nvidia-smi: card, 1.0, 8.0"),
        ("echo something else", "nvidia-smi: something else"),
        ("echo card, 1.0, N/A", "nvidia-smi: card, 1.0, N/A"),
    ],
)
def test_a_driver_that_does_not_answer(nvidia_smi: Callable[[str], None], script: str, said: str) -> None:
    nvidia_smi(script)
    finding = gpu("torch")
    assert finding.level == "warning"
    assert finding.found == f"torch finds none that it can use: runs use the CPU ({said})"


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use the GPU that is here")
def test_a_driver_too_old_for_torch(nvidia_smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of it is not hidden by what nvidia-smi of that age can't say."""

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it")

    nvidia_smi("echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2")
    monkeypatch.setattr(doctor_device, "_build", lambda: "12.8")
    monkeypatch.setattr(torch.cuda, "init", init)
    finding = gpu("torch")
    assert finding.level == "warning"
    assert finding.found == (
        "torch finds none that it can use: runs use the CPU (The NVIDIA driver on your system is too old (found "
        'version 11040). Please update it; nvidia-smi: Field "compute_cap" is not a valid field to query.)'
    )
    assert "install its driver anew" in finding.advice


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_card_of_a_run() -> None:
    finding = gpu("torch")
    assert torch.cuda.get_device_name() in finding.found
    assert " GiB free" in finding.found
