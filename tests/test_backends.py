"""Whether torch has kernels for a GPU. Whose kernels those are: test_unsloth.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Notes

from qspin.base import find_base
from qspin.config import LoraConfig, ModelConfig, load_config
from qspin.doctor.doctor_device import gpu
from qspin.errors import QspinError
from qspin.files import write_json
from qspin.layers.backends import no_kernels
from qspin.model import SlotModel
from qspin.phases.game import _backend
from qspin.run_dir import RunDir

CUDA = torch.device("cuda")
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU128 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int], list[str]], None]:
    """What torch says of a GPU, and of itself."""

    def set_up(capability: tuple[int, int], built: list[str]) -> None:
        monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device=None: "A Card")

    return set_up


@pytest.mark.parametrize(
    ("capability", "built", "wanted"),
    [
        ((7, 5), CU126, True),
        ((8, 9), CU126, True),  # as 8.6
        ((12, 0), CU126, False),
        ((6, 1), CU126, True),
        ((6, 1), CU128, False),
        ((12, 1), CU128, True),
        ((13, 0), CU128, True),  # translated
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((9, 1), ["sm_90a"], False),
        ((10, 3), ["sm_100f"], True),
        ((7, 5), [], True),  # it does not say
    ],
)
def test_what_a_build_has_kernels_for(
    capability: tuple[int, int],
    built: list[str],
    wanted: bool,
    card: Callable[[tuple[int, int], list[str]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card(capability, built)
    assert (no_kernels(CUDA) is None) is wanted
    assert no_kernels(torch.device("cpu")) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")  # AMD's names are others
    assert no_kernels(CUDA) is None


def test_a_gpu_without_kernels_is_one_line(
    card: Callable[[tuple[int, int], list[str]], None],
    tiny_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card((12, 0), CU126)
    said = f"A Card is sm_120, and torch {torch.__version__} is built for {', '.join(CU126)}"
    config = ModelConfig(id=str(tiny_folder("llama")))
    with pytest.raises(QspinError) as caught:
        SlotModel.load(find_base(config), config, LoraConfig(), seed=0, device=CUDA)
    assert str(caught.value).startswith(f"{said}: `qspin doctor` says")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 33, 1 << 34))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    finding = gpu("torch>=2.8")
    assert (finding.level, finding.found) == ("problem", said)
    assert finding.command.endswith('--index-url https://download.pytorch.org/whl/cu128 "torch>=2.8"')


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "auto"])
def test_bfloat16_on_a_gpu_without_it_is_told(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    run_dir, progress = RunDir(tmp_path), Notes()
    write_json(run_dir.record, {"backend": "transformers"})
    config = load_config("quickstart", {"model.dtype": dtype})
    assert _backend(config, "llama", run_dir, CUDA, progress) == "transformers"
    assert [note for note in progress.notes if note.startswith("model.dtype")] == [
        "model.dtype: this GPU has no bfloat16, which is slow here; float16 is not, where its range suffices"
    ] * (dtype == "bfloat16")
