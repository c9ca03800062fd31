"""Our own layers and attention in the place of a model's, which keeps its modules and weights and computes by ours."""

from __future__ import annotations

from typing import Any

import peft
import transformers
from torch import nn

from qspin.errors import QspinError
from qspin.layers.attention import IMPLEMENTATION, attend
from qspin.layers.fused import fuse_gated_mlp, fuse_norm, fuse_rotary
from qspin.layers.kernels import Kernels
from qspin.layers.lora import FusedLayers, fuse_lora

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # of a decoder layer, by their usual names
SLOT = "default"  # PEFT's merging and saving read the adapter of this name

transformers.AttentionInterface.register(IMPLEMENTATION, attend)


def refit(peft_model: Any, kernels: Kernels) -> list[FusedLayers]:
    """Change how a model in NF4 with LoRA in SLOT computes; gives its adapted layers.

    Raises:
        QspinError: 4-bit layers are of a width that this device gets wrong.
    """
    fused = []
    _check_widths(peft_model.get_base_model().get_decoder())
    peft_model.get_base_model().config._attn_implementation = IMPLEMENTATION
    in_one_mode(peft_model)
    for module in peft_model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            fuse_norm(module, kernels)
        fuse_gated_mlp(module, kernels)
        if type(module).__name__.endswith("Attention"):
            fuse_rotary(module, kernels)
        adapted = {n: m for n, m in module.named_children() if isinstance(m, peft.tuners.lora.Linear4bit)}
        for names in SAME_INPUT:
            together = [adapted.pop(name) for name in names if name in adapted]
            if together:
                fused.append(fuse_lora(together, SLOT, kernels))
        fused += [fuse_lora([layer], SLOT, kernels) for layer in adapted.values()]
    return fused


def _check_widths(decoder: nn.Module) -> None:
    for parameter in decoder.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None and parameter.device.type == "cpu" and state.shape[1] % state.blocksize:
            raise QspinError(
                f"model.id: a layer has {state.shape[1]} inputs, no multiple of {state.blocksize}; bitsandbytes "
                "dequantises such layers wrongly on a CPU: play with this model on a GPU"
            )


def in_one_mode(model: nn.Module) -> None:
    """One mode for generating, scoring and training: no dropout anywhere, and no repacking of the base, which
    bitsandbytes does in eval mode on CPUs."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):  # which a layer hands to a function
            if isinstance(value, float) and name.endswith(("dropout", "layerdrop")):
                setattr(module, name, 0.0)
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
