#!/usr/bin/env bash
# What only a GPU can show, the most important first.
#
#     benchmarks/on_gpu.sh OUT [PART ...]
#
#     tests    tests/gpu: arithmetic, whole games, going on after a crash, for each backend that is installed
#     small    whether iterations of 7B to 9B models fit into what cards of 6, 8 and 12 GB leave: five processes side by
#              side, 60 GB of a GPU, 80 GB for models
#     auto     training in 22 GiB, all recomputed and as `auto` chooses, alone
#     games    the quickstart with each backend
#     all      every case of bench_gpu.py and every peer, into benchmarks/results; all are on the GPU at once, some 100 GB,
#              until each is timed in turn
#
# OUT/PART.log is what each said. PYTHON names another interpreter than .venv's, SCRATCH a folder for models, in memory
# (a tmpfs) where the disk is smaller than they are.
set -uo pipefail

OUT=$(realpath "${1:?usage: benchmarks/on_gpu.sh OUT [PART ...]}") # from where one is
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SCRATCH=${SCRATCH:-/tmp/qspin-models}
mkdir -p "$OUT" "$SCRATCH"
"$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
    echo "torch sees no CUDA device here; nothing was tried" >&2
    exit 1
}

bench() {
    "$PYTHON" benchmarks/bench_gpu.py --scratch "$SCRATCH" --timeout 400 "$@"
    local code=$?
    cp "$SCRATCH"/*.json "$OUT" # what was measured until then, if it went wrong
    return $code
}
tests() { "$PYTHON" -m pytest -q tests/gpu; }
small() {
    bench --together --only 'qspin, rank 8' 'qspin, 8B, small cards' 'qspin, Qwen3 8B' 'qspin, Gemma 2 9B' \
        'qspin, Qwen2.5 7B'
}
auto() { bench --only qspin --shares '22 GiB' '22 GiB, auto'; }
games() {
    local backend
    for backend in unsloth transformers; do
        "$PYTHON" -m qspin.cli run quickstart --out "$OUT/$backend" --set "model.backend=$backend" || return
    done
}
all() { bench --turns --timeout 1800 --write; }

[ $# -gt 1 ] || set -- "$1" tests small auto games
failed=0
for part in "${@:2}"; do
    echo "$part: $(date +%T)"
    "$part" >"$OUT/$part.log" 2>&1 || failed=1
    tail -n 3 "$OUT/$part.log"
done
exit $failed
