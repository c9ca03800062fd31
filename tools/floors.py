"""Print the lowest version that pyproject.toml allows of each dependency, as constraints for pip.

    python tools/floors.py > FILE

torch is left out: its CPU builds are not where the others come from, and tools/setup.sh takes TORCH=….
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path


def floors(requirements: list[str]) -> list[str]:
    """`name>=1.2,<3` → `name==1.2`.

    Raises:
        ValueError: a requirement has no lower bound.
    """
    pins = []
    for requirement in requirements:
        found = re.match(r"([\w.-]+)>=([\w.]+)", requirement)
        if found is None:
            raise ValueError(f"pyproject.toml: {requirement} has no lower bound; write it as NAME>=VERSION")
        if found[1] != "torch":
            pins.append(f"{found[1]}=={found[2]}")
    return pins


if __name__ == "__main__":
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sys.stdout.writelines(f"{pin}\n" for pin in floors(project["dependencies"]))
