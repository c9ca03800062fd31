"""Norms and gated MLPs that keep less: which are replaced, and what is kept. Their gradients: test_scoring.py."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from qspin.layers.fused import fuse_gated_mlp, fuse_norm
from qspin.layers.kernels import Kernels
from qspin.layers.lora import FusedLayers
from qspin.model import SlotModel
from qspin.packing import pack_row
from qspin.records import Pair
from qspin.scoring import pair_logps

LoadModel = Callable[..., SlotModel]
CPU = torch.device("cpu")
PAIRS = [Pair(str(n), 0, tuple(range(10)), tuple(range(20, 40)), tuple(range(50, 80)), ended=True) for n in range(4)]


def replaced(model: SlotModel, kind: str) -> list[bool]:
    return [
        isinstance(module.forward, functools.partial)
        for module in model.peft_model.modules()
        if type(module).__name__.endswith(kind)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_and_mlps_of_every_architecture_are_replaced(architecture: str, tiny_model: LoadModel) -> None:
    model = tiny_model(architecture)
    assert len(replaced(model, "RMSNorm")) >= 7
    assert all(replaced(model, "RMSNorm"))
    # Phi-3 has gate and up in one matrix
    assert replaced(model, "MLP") == [architecture != "phi3"] * 3


def kept_bytes(model: SlotModel) -> int:
    """Bytes of the tensors of activations that a forward pass keeps for its backward pass, each counted once."""
    kept: dict[int, int] = {}
    row = pack_row(PAIRS, CPU)

    def pack(tensor: Tensor) -> Tensor:
        if len(row.input_ids) in tensor.shape:
            kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        pair_logps(model, row)
    return sum(kept.values())


def test_they_keep_less_than_autograd(tiny_model: LoadModel) -> None:
    model = tiny_model()
    ours = kept_bytes(model)
    for module in model.peft_model.modules():
        if type(module).__name__.endswith(("RMSNorm", "MLP")):
            del module.forward
    assert ours < 0.7 * kept_bytes(model)


def test_gradient_checkpointing_lets_go_of_what_they_keep(tiny_model: LoadModel) -> None:
    model = tiny_model()
    gates: list[StorageWeakRef] = []
    for name, module in model.peft_model.named_modules():
        if name.endswith("gate_proj"):
            module.register_forward_hook(lambda _m, _x, gate: gates.append(StorageWeakRef(gate.untyped_storage())))
    for recomputed in (0, 1, 3):
        gates.clear()
        model.use_gradient_checkpointing(recomputed)
        real, _ = pair_logps(model, pack_row(PAIRS, CPU))
        assert real.requires_grad
        assert [gate.expired() for gate in gates] == [index < recomputed for index in range(3)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_layers_last_product_is_not_computed_again(
    architecture: str, tiny_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(architecture)
    products: list[int] = []
    own = FusedLayers.product
    monkeypatch.setattr(FusedLayers, "product", lambda *args: products.append(1) or own(*args))
    computed = []
    layers = 3
    for recomputed in (0, layers):
        model.use_gradient_checkpointing(recomputed)
        real, _ = pair_logps(model, pack_row(PAIRS, CPU))
        real.sum().backward()
        computed.append(len(products))
        products.clear()
    assert computed[0] % layers == 0
    # a norm after the MLP keeps what it is given
    again = computed[0] if architecture in ("gemma2", "olmo2") else computed[0] - layers
    assert computed[1] == computed[0] + again


class BiasedRMSNorm(nn.Module):
    """Named like one, and another thing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8), requires_grad=False)
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight + 1


def test_what_is_not_the_usual_form_stays_as_it_is() -> None:
    norm = BiasedRMSNorm()
    fuse_norm(norm, Kernels())
    assert not isinstance(norm.forward, functools.partial)
    trained = nn.RMSNorm(8, eps=1e-6)  # its weight has a gradient, which ours wouldn't make
    fuse_norm(trained, Kernels())
    assert not isinstance(trained.forward, functools.partial)
    mlp: Any = nn.ModuleDict({"up_proj": nn.Linear(2, 2), "down_proj": nn.Linear(2, 2), "act_fn": nn.ReLU()})
    fuse_gated_mlp(mlp, Kernels())
    assert not isinstance(mlp.forward, functools.partial)
