#!/usr/bin/env bash
# Write the versions in .venv to constraints.txt, from which `make setup` takes them. To move to the newest there are:
#
#     CONSTRAINTS= make -B setup && make test && make constraints

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# +cpu: a constraint on 2.13.0 allows 2.13.0+cpu too, and other builds
versions=$(.venv/bin/python -m pip --disable-pip-version-check list --format freeze --exclude-editable --exclude pip)
{
    echo "# The versions that the tests ran with; tools/constraints.sh writes them."
    sed 's/+.*//' <<<"$versions"
} >constraints.txt
