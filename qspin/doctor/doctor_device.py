"""What a run computes with, tried: torch, 4-bit arithmetic, the GPU, and whose kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from qspin.doctor.finding import Finding, pip
from qspin.errors import one_line
from qspin.units import NF4_BLOCK, gib

if TYPE_CHECKING:
    import torch

# Half the widest gap between neighbours of NF4's 16 values, from −1 to −0.6962, is 0.152 of a block's largest value;
# a little is added for the rounding of the block's constant and of 16-bit numbers.
NF4_BOUND = 0.17


def computing() -> Finding:
    """torch's build, its threads, and the type that runs compute in."""
    import torch

    from qspin.config import ModelConfig
    from qspin.four_bits import compute_dtype
    from qspin.machine import computing_device

    device, build = computing_device(), _build()
    dtype = str(compute_dtype(ModelConfig(), device)).removeprefix("torch.")
    built = "CPUs" if build is None else f"{'CUDA' if torch.version.cuda else 'ROCm'} {build}"
    native = "" if dtype == "bfloat16" else f" (no native bfloat16 on this {device.type.upper()})"
    return Finding(
        "torch",
        "ok",
        f"{torch.__version__}, a build for {built}; {torch.get_num_threads()} threads on {os.cpu_count()} CPUs; "
        f"dtype auto is {dtype}{native}",
    )


def nf4() -> Finding:
    """Quantise and dequantise weights on the device of a run, as loading a model and every layer of it do."""
    import torch
    from bitsandbytes import cextension, functional

    from qspin.config import ModelConfig
    from qspin.four_bits import compute_dtype
    from qspin.machine import computing_device

    device = computing_device()
    again = pip("install --force-reinstall --no-deps bitsandbytes")
    weights = torch.randn(64, 4 * NF4_BLOCK, generator=torch.Generator().manual_seed(0))
    try:
        sent = weights.to(device, compute_dtype(ModelConfig(), device))
        packed, constants = functional.quantize_4bit(
            sent, blocksize=NF4_BLOCK, compress_statistics=True, quant_type="nf4"
        )
        back = functional.dequantize_4bit(packed, constants).to("cpu", torch.float32)
    except (RuntimeError, OSError, ValueError) as refusal:
        return Finding(
            "bitsandbytes",
            "problem",
            f"NF4 on the {device.type} fails: {one_line(refusal)}",
            "`python -m bitsandbytes` says more; it must fit torch's build and the card. To install it anew:",
            again,
        )
    error = nf4_error(weights, back)
    backend = f"backend {cextension.BNB_BACKEND}; NF4 on the {device.type}"
    if not error <= NF4_BOUND:  # so that nan is a problem too
        return Finding(
            "bitsandbytes",
            "problem",
            f"{backend} is wrong by {error:.2f} of a block's largest weight, where {NF4_BOUND} is the bound",
            "install it anew:",
            again,
        )
    if isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary):
        return Finding(
            "bitsandbytes",
            "warning",
            f"{backend} rounds as it should, but without the compiled library, which can't be loaded",
            "install it anew:",
            again,
        )
    return Finding("bitsandbytes", "ok", f"{backend} rounds as it should")


def nf4_error(weights: torch.Tensor, back: torch.Tensor) -> float:
    """The largest error of any weight, in parts of the largest weight of its block."""
    blocks = weights.view(-1, NF4_BLOCK)
    errors = (back.view(-1, NF4_BLOCK) - blocks).abs().amax(1) / blocks.abs().amax(1)
    return float(errors.max())


class Card(NamedTuple):
    """A GPU, as NVIDIA's driver tells of it."""

    name: str
    driver: str
    capability: float


def gpu(torch_needed: str) -> Finding:
    """The GPU that a run will use, or why it will use none. `torch_needed` is what pip is to install, if need be."""
    import torch

    from qspin.layers.backends import no_kernels

    cards, complaint = _nvidia_smi()
    if not torch.cuda.is_available():
        if _build() is not None:
            # both: nvidia-smi of a driver too old for torch does not know of capabilities, and torch says why
            complaint = "; ".join(filter(None, [_cuda_complaint(), complaint]))
        return unused_gpu(_build(), cards, complaint, torch_needed)
    try:
        free, total = torch.cuda.mem_get_info()  # the first call that needs the device itself
    except RuntimeError as error:
        advice = "see with nvidia-smi what holds it; CUDA_VISIBLE_DEVICES='' plays on the CPU"
        return Finding("GPU", "problem", f"can't be used: {one_line(error)}", advice)
    major, minor = torch.cuda.get_device_capability()
    count = torch.cuda.device_count()
    found = f"{torch.cuda.get_device_name()}, capability {major}.{minor}, "
    found += f"driver {cards[0].driver}, " if cards else ""
    found += f"{gib(free)} of {gib(total)} free"
    found += f"; the first of {count}, CUDA_VISIBLE_DEVICES chooses" if count > 1 else ""
    missing = no_kernels(torch.device("cuda"))
    if missing:
        command = _other_torch(float(f"{major}.{minor}"), torch_needed)
        return Finding("GPU", "problem", missing, "put a build that has its kernels in its place:", command)
    if free < total / 2:
        return Finding("GPU", "warning", found, "see with nvidia-smi what holds the rest")
    return Finding("GPU", "ok", found)


def unused_gpu(build: str | None, cards: Sequence[Card], complaint: str, torch_needed: str) -> Finding:
    """Why runs use the CPU.

    Args:
        build: what torch was built for, as "12.8"; None for CPUs alone.
        cards: those that the driver knows of.
        complaint: what nvidia-smi or torch says is wrong.
        torch_needed: the requirement for pip.
    """
    if cards and build is None:
        return Finding(
            "GPU",
            "warning",
            f"{cards[0].name} is here, but this torch is a build for CPUs: runs use the CPU",
            "put a build for CUDA in its place:",
            _other_torch(cards[0].capability, torch_needed),
        )
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cards:
        return Finding(
            "GPU",
            "warning",
            f"{cards[0].name} is here, but torch can't use it: runs use the CPU ({complaint})",
            f"update NVIDIA's driver: {cards[0].driver} may be too old for torch's CUDA {build}"
            if hidden is None
            else f"CUDA_VISIBLE_DEVICES is {hidden!r}: unset it, or name the card",
        )
    if complaint:
        return Finding(
            "GPU",
            "warning",
            f"torch finds none that it can use: runs use the CPU ({complaint})",
            "if there is one, install its driver anew; if there is none, all is well",
        )
    return Finding("GPU", "ok", "none: runs use the CPU")


def _other_torch(capability: float, needed: str) -> str:
    """The command that puts a build for such a GPU in the place of the one that is here."""
    # torch 2.8 and later: cu126 has kernels for capabilities 5.0 to 9.0, cu128 for 7.5 and above
    index = f"https://download.pytorch.org/whl/{'cu126' if capability < 7.5 else 'cu128'}"
    return f'{pip("uninstall --yes torch")} && {pip("install")} --index-url {index} "{needed}"'


def backend() -> Finding:
    """Whose kernels a run takes."""
    from qspin.errors import QspinError
    from qspin.layers.backends import choose_backend, unsloth_kernels
    from qspin.machine import computing_device

    name, reason = choose_backend("auto", computing_device())
    try:
        if name == "unsloth":
            unsloth_kernels()
    except QspinError as error:
        return Finding("backend", "problem", str(error))
    return Finding("backend", "ok", f"{name} ({reason})")


def _build() -> str | None:
    """The version of CUDA or ROCm that torch was built for."""
    import torch

    return torch.version.cuda or torch.version.hip


def _cuda_complaint() -> str:
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return one_line(error)
    return "torch.cuda.is_available() is false"


def _nvidia_smi() -> tuple[list[Card], str]:
    """The cards that NVIDIA's driver knows of, and what is wrong if they can't be asked for."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], ""
    query = ["--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run([program, *query], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi: {one_line(error)}"
    said = f"nvidia-smi: {one_line(done.stdout + done.stderr)}"
    if done.returncode:
        return [], said
    try:
        rows = [line.rsplit(", ", 2) for line in done.stdout.splitlines()]
        return [Card(name, driver, float(capability)) for name, driver, capability in rows], ""
    except ValueError:
        return [], said
