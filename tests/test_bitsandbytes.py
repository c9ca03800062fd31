"""The trap in bitsandbytes on CPUs with AVX512-BF16, and that we stay out of it.

In eval mode its first forward repacks a layer in place for inference. After that a backward pass goes through a
kernel that has none, and `state_dict()` runs an inverse that loses precision. Self-play generates, saves and trains
on the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
import transformers
from bitsandbytes.functional import has_avx512bf16
from conftest import SHAPE
from torch.nn.functional import cosine_similarity

from qspin.base import find_base
from qspin.config import LoraConfig, ModelConfig
from qspin.errors import QspinError
from qspin.generation import Request, generate
from qspin.model import SlotModel
from qspin.packing import pack_row
from qspin.records import Pair
from qspin.scoring import pair_logps

pytestmark = pytest.mark.skipif(
    not has_avx512bf16(), reason="this CPU has no AVX512-BF16: bitsandbytes does not repack"
)

PAIR = Pair("a", 0, tuple(range(3, 20)), tuple(range(30, 41)), tuple(range(50, 58)), ended=True)


def gradients(model: SlotModel) -> dict[str, torch.Tensor]:
    real, generated = pair_logps(model, pack_row([PAIR], model.device))
    (real - generated).sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in model.parameters.items() if parameter.grad is not None}
    model.peft_model.zero_grad()
    return found


def play(model: SlotModel, folder: Path) -> None:
    """What an iteration does before it trains again: generate, and save."""
    generate(
        model,
        [Request(PAIR.prompt_ids, 1), Request(PAIR.prompt_ids, 2)],
        max_new_tokens=6,
        temperature=1.0,
        top_p=1.0,
        width=2,
        stop_ids=frozenset({2}),
        on_step=lambda _tokens, _rows: None,
    )
    folder.mkdir()
    model.save_adapter(folder)


@pytest.mark.parametrize("double_quant", [True, False])
def test_generating_and_saving_leave_base_and_gradients_alone(
    tiny_model: Callable[..., SlotModel], tmp_path: Path, double_quant: bool
) -> None:
    fresh = tiny_model(dtype="bfloat16", double_quant=double_quant, moved=True)
    used = tiny_model(dtype="bfloat16", double_quant=double_quant, moved=True)
    play(used, tmp_path / "adapter")
    assert used.base_hash() == fresh.base_hash()
    expected, found = gradients(fresh), gradients(used)
    assert expected.keys() == found.keys() == fresh.parameters.keys()
    for name in expected:
        assert cosine_similarity(expected[name].flatten(), found[name].flatten(), dim=0) > 0.999, name


def test_the_trap_is_there(tiny_model: Callable[..., SlotModel]) -> None:
    """Without our precautions the same steps move the base: the test above can fail."""
    model = tiny_model(dtype="bfloat16", double_quant=False, moved=True)
    before = model.base_hash()
    model.peft_model.eval()
    for module in model.peft_model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = True
            module(torch.zeros(1, module.in_features, dtype=torch.bfloat16))
    assert model.base_hash() != before
    model.peft_model.state_dict()  # the inverse
    assert model.base_hash() != before


def test_rows_that_do_not_fill_their_blocks_are_the_second_trap(tmp_path: Path) -> None:
    """On a CPU such a layer is dequantised with other blocks' constants; a model that has one is refused."""
    errors = []
    for inputs in (96, 128):
        torch.manual_seed(0)
        weight = torch.randn(64, inputs)
        packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", blocksize=64)
        errors.append(float((bnb.functional.dequantize_4bit(packed, state) - weight).abs().max()))
    assert errors[0] > 1 > errors[1]  # the trap is there; if this fails, it was mended and the refusal can go

    config = transformers.LlamaConfig(**(SHAPE | {"intermediate_size": 96}))
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "odd")
    settings = ModelConfig(id=str(tmp_path / "odd"), dtype="float32")
    with pytest.raises(QspinError, match=r"^model\.id: a layer has 96 inputs, no multiple of 64"):
        SlotModel.load(find_base(settings), settings, LoraConfig(rank=4), seed=0, device=torch.device("cpu"))
