"""Code for a GPU where there is none, on a device that stands in for one (stand_in/): its tests, and commands."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import hearing_interrupts
from conftest import ROOT
from stand_in.device import environment

HERE = Path(__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real one"),
]
Python = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of a process that has the device."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("there is no g++ on Linux to build the device with (tests/stand_in/device.cpp)")
    return os.environ | environment(tmp_path_factory.mktemp("stand-in"), gib=4) | {"COLUMNS": "200"}


@pytest.fixture(scope="module")
def on_stand_in(variables: dict[str, str]) -> Python:
    """A process that has it."""

    def python(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=900,
            env=variables,
            cwd=ROOT,
            check=False,
        )

    return python


# what is wrong on a GPU, and what is said of it
WRONG = {
    "torch.ones(3, device='cuda').index_select(0, torch.tensor([0]))": "at least two devices",
    "torch.full((2,), 1.0, device='cuda') @ torch.ones(2)": "at least two devices",
    "torch.empty(2**31, device='cuda')": "CUDA out of memory",
    "assert not torch.empty(9, device='cuda').isnan().any()": "AssertionError",
    "x = torch.ones(1, device='cuda'); torch.cuda.graph(torch.cuda.CUDAGraph()).__enter__(); x.item()": "capturing",
}


@pytest.mark.parametrize("code", WRONG)
def test_control_what_is_wrong_on_a_gpu_fails(code: str, on_stand_in: Python) -> None:
    done = on_stand_in("-c", f"import torch; {code}")
    assert done.returncode == 1
    assert WRONG[code] in done.stderr


@pytest.mark.parametrize(
    "name", ["gpu/test_cuda_kernels", "gpu/test_cuda_model", "gpu/test_cuda_out_of_memory", "gpu/test_cuda_runs"]
)
def test_as_on_a_gpu(name: str, on_stand_in: Python, tmp_path: Path) -> None:
    options = ["-q", "-p", "no:cacheprovider", "--basetemp", tmp_path / "made"]
    done = on_stand_in("-m", "pytest", *options, HERE / f"{name}.py")
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout
    skips = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all(line.endswith("no Unsloth here") for line in skips)


def run_command(model: Path, folder: Path, *settings: str) -> list[str]:
    """In `folder`, of its rows, which are written there."""
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}, I say."} for n in range(16)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [part for setting in ("data.heldout_rows=4", *settings) for part in ("--set", setting)]
    named = ["--model", str(model), "--data", str(folder / "rows.jsonl"), "--out", str(folder / "run")]
    return ["-m", "qspin", "run", "smollm2-135m", "--iterations", "1", *named, *options]


def test_ctrl_c_between_replays(variables: dict[str, str], tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    command = run_command(tiny_folder("llama"), tmp_path, "generation.max_new_tokens=400", "generation.width=1")
    with hearing_interrupts():
        child = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
        )
    assert any("evaluate: 0/" in line for line in iter(child.stdout.readline, "")), child.communicate()  # type: ignore[union-attr]
    time.sleep(1)
    child.send_signal(signal.SIGINT)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert said.splitlines()[-1] == "stopped; the same command goes on from the last finished piece"


def test_commands_after_a_run(on_stand_in: Python, tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    command = run_command(
        tiny_folder("llama"), tmp_path, "generation.max_new_tokens=8", "train.batch_size=4", "sft.epochs=1"
    )
    done = on_stand_in(*command)
    assert done.returncode == 0, done.stderr[-3000:]
    run = tmp_path / "run"
    assert "stand-in" in json.loads((run / "run.json").read_text())["quantised_by"]

    def qspin(*arguments: str | Path) -> str:
        done = on_stand_in("-m", "qspin", *arguments)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    assert "exported: " in qspin("export", run, "--to", "merged-4bit", "--out", tmp_path / "merged-4bit")
    exact = ("--onto", "dequantised", "--dtype", "float32")
    qspin("export", run, "--to", "merged-16bit", *exact, "--out", tmp_path / "exact")
    check = json.loads((tmp_path / "exact" / "merge-check.json").read_text())
    assert abs(check["nll_difference"]) < 0.02  # bfloat16's rounding


COUNT = """
import json, sys
from pathlib import Path
from types import SimpleNamespace
sys.path[:0] = ["benchmarks", "tests"]
import bench_gpu_memory as bench
from conftest import TINY
from gpu_cases import Case, Share

bench.LIKE, bench.PROMPT, bench.NEW = 4, 40, 8
bench.MODELS["tiny"] = "tiny"
bench.load_config = lambda _name: SimpleNamespace(model=SimpleNamespace(architecture=TINY))
share = Share(0.02, ("30+20+10", "real"), checkpointing=True, generate=True, optimizer="paged_adamw_8bit")
case = Case("tiny", "unsloth", {"small": share, "auto": Share(1.0, (), checkpointing="auto")})
options = SimpleNamespace(scratch=Path(sys.argv[1]), shares=None, out=Path(sys.argv[1]) / "counted.json")
bench.make_model("tiny", options.scratch / "tiny")
for _ in range(2):
    bench.count(case, options)
    print(json.dumps(json.loads(options.out.read_text())))
    bench.compute_nothing()
"""


def test_memory_hangs_on_no_number(on_stand_in: Python, tmp_path: Path) -> None:
    """What benchmarks/bench_gpu_memory.py counts, whose products compute nothing."""
    done = on_stand_in("-c", COUNT, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    computed, counted = map(json.loads, done.stdout.splitlines())
    assert computed["small"].keys() == {"generate", "30+20+10"}
    assert computed["small"]["generate"]["width"] > 1
    assert computed["small"]["30+20+10"]["train, GiB"] > computed["load"]["left, GiB"] > 0
    assert counted == computed
