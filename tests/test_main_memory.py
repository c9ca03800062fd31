"""What a container or a job leaves, in the kernel's own files and in a control group of our own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from qspin.fitting import main_memory as module
from qspin.fitting.main_memory import OWN_GROUPS, main_memory
from qspin.fitting.memory import free_bytes, used_and_total
from qspin.units import GIB


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Machine:
        total, available = 64 * GIB, 40 * GIB

    monkeypatch.setattr(psutil, "virtual_memory", Machine)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The root of the control groups' trees; beside it what a process is told of its own."""
    monkeypatch.setattr(module, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(module, "OWN_GROUPS", tmp_path / "own")
    return tmp_path


def group(folder: Path, version: int, limit: str, taken: int, files: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _, limit_name, taken_name, prefix = module.VERSIONS[version]
    (folder / limit_name).write_text(f"{limit}\n")
    (folder / taken_name).write_text(f"{taken}\n")
    lines = {"anon": taken - files, f"{prefix}inactive_file": files // 2, f"{prefix}active_file": files - files // 2}
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in lines.items()))


@pytest.mark.usefixtures("machine")
def test_elsewhere_than_on_linux_the_machine_counts(groups: Path) -> None:
    assert main_memory() == (64 * GIB, 40 * GIB)
    group(groups / "groups", 2, str(GIB), 0)
    assert main_memory() == (64 * GIB, 40 * GIB), "no group is said to be the process's"


@pytest.mark.usefixtures("machine")
def test_a_container_that_sees_its_group_as_the_root(groups: Path) -> None:
    (groups / "own").write_text("0::/\n")
    group(groups / "groups", 2, str(8 * GIB), 3 * GIB, files=GIB)
    assert main_memory() == (8 * GIB, 6 * GIB), "files in memory can be let go of"
    group(groups / "groups", 2, "max", 3 * GIB)
    assert main_memory() == (64 * GIB, 40 * GIB)
    group(groups / "groups", 2, str(50 * GIB), 5 * GIB)
    assert main_memory() == (50 * GIB, 40 * GIB), "the machine has less free than the group"
    group(groups / "groups", 2, str(2 * GIB), 3 * GIB)
    assert main_memory() == (2 * GIB, 0), "a limit that was lowered afterwards"


@pytest.mark.usefixtures("machine")
def test_a_group_is_bound_by_those_above_it(groups: Path) -> None:
    (groups / "own").write_text("0::/slurm/job_7/step_0\n")
    tree = groups / "groups"
    group(tree / "slurm" / "job_7" / "step_0", 2, "max", GIB)
    group(tree / "slurm" / "job_7", 2, str(16 * GIB), 2 * GIB)
    group(tree / "slurm", 2, str(32 * GIB), 30 * GIB)
    group(tree / "other", 2, str(GIB), GIB)
    group(groups, 2, str(GIB), GIB)  # outside of the tree
    assert main_memory() == (16 * GIB, 2 * GIB)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("mounted", ["docker/0123", ""])
def test_the_first_version_has_a_tree_for_memory(mounted: str, groups: Path) -> None:
    """And a container may be told a path that only exists outside of it."""
    (groups / "own").write_text("12:cpu,cpuacct:/docker/0123\n4:memory:/docker/0123\n0::/docker/0123\n")
    group(groups / "groups" / "cpu,cpuacct", 1, str(GIB), 0)
    group(groups / "groups" / "memory", 1, str(2**63 - 4096), GIB)
    group(groups / "groups" / "memory" / mounted, 1, str(6 * GIB), 2 * GIB, files=GIB)
    assert main_memory() == (6 * GIB, 5 * GIB)


@pytest.fixture
def own_group() -> Iterator[tuple[Path, str]]:
    """A real group below ours with a limit of 3 GiB; how a process joins it."""
    own = {controllers: path for _, controllers, path in (x.split(":", 2) for x in OWN_GROUPS.read_text().splitlines())}
    version = 1 if "memory" in own else 2
    tree, limit, *_ = module.VERSIONS[version]
    folder = module.GROUPS / tree / own["memory" if version == 1 else ""].lstrip("/") / f"qspin-test-{os.getpid()}"
    try:
        folder.mkdir()
        (folder / limit).write_text(str(3 * GIB))
    except OSError as error:
        if folder.is_dir():
            folder.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield folder, str(folder / "cgroup.procs")
    folder.rmdir()


@pytest.mark.skipif(not OWN_GROUPS.is_file(), reason="no control groups here")
def test_in_a_real_group(own_group: tuple[Path, str]) -> None:
    _, join = own_group
    script = (
        f"import os; open({join!r}, 'w').write(str(os.getpid()))\n"
        "from qspin.fitting.main_memory import main_memory\n"
        "before = main_memory(); held = b'x' * (1 << 30); after = main_memory()\n"
        "print(before.total, before.available, after.available)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    total, before, after = map(int, done.stdout.split())
    assert total == 3 * GIB
    assert 2.8 * GIB < before <= 3 * GIB
    assert 0.99 * GIB < before - after < 1.01 * GIB


@pytest.mark.usefixtures("machine")
def test_what_is_computed_at_once_heeds_it(groups: Path) -> None:
    (groups / "own").write_text("0::/\n")
    group(groups / "groups", 2, str(8 * GIB), 3 * GIB)
    assert free_bytes(torch.device("cpu")) == 5 * GIB
    assert used_and_total(torch.device("cpu"))[1] == 8 * GIB
