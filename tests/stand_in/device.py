"""What a process needs to have the device: `environment(folder, gib)`."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent


def environment(folder: Path, gib: float) -> dict[str, str]:
    """Variables of a process with a device of so much memory, which is built into the folder where it is not there.

    Raises:
        subprocess.CalledProcessError: g++ refuses it.
        FileNotFoundError: there is no g++.
    """
    built, own = folder / "device.so", Path(torch.__file__).parent
    if not built.is_file():
        includes = [f"-I{own / 'include' / part}" for part in ("", "torch/csrc/api/include")]
        libraries = [f"-L{own / 'lib'}", f"-Wl,-rpath,{own / 'lib'}", "-lc10", "-ltorch_cpu"]
        build = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", *includes, str(HERE / "device.cpp")]
        subprocess.run([*build, "-o", str(built), *libraries], check=True, capture_output=True)
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    return {"PYTHONPATH": path, "STAND_IN": str(built), "STAND_IN_GIB": str(gib)}
