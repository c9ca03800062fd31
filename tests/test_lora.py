"""The fused 4-bit LoRA layer against the plain formula, and fp32 master weights that small steps move."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from torch import Tensor

from qspin.layers.kernels import Kernels
from qspin.layers.lora import fuse_lora, remade

IN, OUT, RANK, ALPHA = 128, 80, 4, 10  # scaling 2.5
SHAPES = [(IN,), (1, IN), (7, IN), (1, 7, IN), (2, 3, 5, IN)]


def fused_layer(
    *, dtype: torch.dtype = torch.float32, bias: bool = False, double_quant: bool = True, seed: int = 0, out: int = OUT
) -> Any:
    """PEFT's own 4-bit LoRA layer with random weights throughout, computing through qspin."""
    torch.manual_seed(seed)
    linear = bnb.nn.Linear4bit(
        IN, out, bias=bias, compute_dtype=dtype, compress_statistics=double_quant, quant_type="nf4"
    )
    linear = linear.to(dtype).to("cpu")  # the second move quantises
    model = torch.nn.Sequential(linear)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    peft.inject_adapter_in_model(peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"]), model)
    layer: Any = model[0]
    assert isinstance(layer, peft.tuners.lora.Linear4bit)
    layer.lora_A.float()  # fp32 masters, which get_peft_model sees to
    layer.lora_B.float()
    torch.nn.init.normal_(b_of(layer), std=0.3)
    fuse_lora([layer], "default", Kernels())
    return layer


def a_of(layer: Any) -> torch.nn.Parameter:
    weight: torch.nn.Parameter = layer.lora_A["default"].weight
    return weight


def b_of(layer: Any) -> torch.nn.Parameter:
    weight: torch.nn.Parameter = layer.lora_B["default"].weight
    return weight


def matrix_of(layer: Any) -> Tensor:
    """W in fp32: the 4-bit weights' one and only meaning."""
    weight = layer.base_layer.weight
    matrix: Tensor = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    return matrix.float()


def plain(layer: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """y = x·Wᵀ + bias + (α/r)·(x·Aᵀ)·Bᵀ in fp32, and what autograd makes of it."""
    x, a, b = (tensor.detach().float().requires_grad_() for tensor in (x, a_of(layer), b_of(layer)))
    y = x @ matrix_of(layer).T + (ALPHA / RANK) * (x @ a.T) @ b.T
    if layer.base_layer.bias is not None:
        y = y + layer.base_layer.bias.float()
    dx, da, db = torch.autograd.grad(y, [x, a, b], grad.float())
    return {"y": y.detach(), "dx": dx, "da": da, "db": db}


def fused(layer: Any, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    y = layer(x)
    dx, da, db = torch.autograd.grad(y, [x, a_of(layer), b_of(layer)], grad)
    return {"y": y.detach(), "dx": dx, "da": da, "db": db}


def inputs(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape, generator=generator)
    grad = torch.randn(*shape[:-1], OUT, generator=generator)
    return x.to(dtype), grad.to(dtype)


@pytest.mark.parametrize("double_quant", [True, False], ids=["double-quant", "single-quant"])
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients_are_the_plain_formula(shape: tuple[int, ...], bias: bool, double_quant: bool) -> None:
    layer = fused_layer(bias=bias, double_quant=double_quant)
    x, grad = inputs(shape, torch.float32)
    ours, theirs = fused(layer, x, grad), plain(layer, x, grad)
    assert ours["y"].shape == (*shape[:-1], OUT)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=5e-5)
    # none of the parts is so small that the tolerance would hide its absence
    assert min(float(part.abs().max()) for part in theirs.values()) > 0.5


def test_it_is_what_peft_computes() -> None:
    layer = fused_layer(bias=True)
    x, grad = inputs((7, IN), torch.float32)
    ours = fused(layer, x, grad)
    del layer.forward  # PEFT's own
    torch.testing.assert_close(ours, fused(layer, x, grad), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("double_quant", [True, False], ids=["double-quant", "single-quant"])
def test_layers_that_read_the_same_input_compute_as_each_would_alone(double_quant: bool) -> None:
    layers = [
        fused_layer(bias=seed == 1, double_quant=double_quant, seed=seed, out=out)
        for seed, out in enumerate((80, 32, 48))
    ]
    x = inputs((2, 7, IN), torch.float32)[0].requires_grad_()
    grads = [torch.randn(2, 7, layer.base_layer.out_features) for layer in layers]

    def computed() -> tuple[list[Tensor], tuple[Tensor, ...]]:
        outputs = [layer(x) for layer in layers]
        masters = [weight for layer in layers for weight in (a_of(layer), b_of(layer))]
        return outputs, torch.autograd.grad(outputs, [x, *masters], grads)

    alone = computed()
    packed = [layer.base_layer.weight.data.clone() for layer in layers]
    fuse_lora(layers, "default", Kernels())
    together = computed()
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=5e-5)
    # one by one, in another order, and twice
    for index in (2, 0, 0, 1):
        torch.testing.assert_close(layers[index](x), alone[0][index], rtol=1e-5, atol=5e-5)
    assert all(torch.equal(layer.base_layer.weight.data, before) for layer, before in zip(layers, packed, strict=True))


@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_bitsandbytes_own_product_is_the_same(bias: bool) -> None:
    layer = fused_layer(bias=bias)
    together = fuse_lora([layer], "default", Kernels())
    x = torch.randn(2, 7, IN)
    with torch.no_grad():
        ours = layer(x)
        together.few_rows = True
        torch.testing.assert_close(layer(x.clone()), ours, rtol=1e-5, atol=1e-4)
        b_of(layer).zero_()
        assert float((layer(x.clone()) - ours).abs().max()) > 0.1


@pytest.mark.parametrize("biases", [(False, False, False), (True, True, True), (True, False, True)])
@pytest.mark.parametrize("rows", [1, 7, 200])
def test_unpacked_layers_compute_as_packed_ones(biases: tuple[bool, ...], rows: int) -> None:
    layers = [
        fused_layer(bias=bias, seed=seed, out=out)
        for seed, (bias, out) in enumerate(zip(biases, (80, 40, 64), strict=True))
    ]
    together = fuse_lora(layers, "default", Kernels())
    x = torch.randn(1, rows, IN)
    with torch.no_grad():
        packed = [layer(x) for layer in layers]
        together.unpack(torch.float32)
        unpacked = [layer(x) for layer in layers]
        for layer in layers:
            b_of(layer).zero_()
        stays = [layer(x.clone()) for layer in layers]
        together.pack()
        gone = [layer(x.clone()) for layer in layers]
    assert together.weights == IN * (80 + 40 + 64)
    for before, after in zip(packed, unpacked, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(unpacked, stays, strict=True))  # a copy: another player needs another
    assert all(float((a - b).abs().max()) > 0.1 for a, b in zip(gone, unpacked, strict=True))


def test_another_player_in_the_slot_is_seen_at_once() -> None:
    # A and B are kept in the compute type from call to call, also between decoding and training
    layer = fused_layer(dtype=torch.bfloat16)
    x, grad = inputs((7, IN), torch.bfloat16)
    with torch.inference_mode():
        first = layer(x).clone()
    with torch.no_grad():
        b_of(layer).mul_(-1)
    with torch.inference_mode():
        second = layer(x).clone()
    assert not torch.equal(first, second)
    trained = layer(x)
    trained.backward(grad)
    assert torch.equal(trained.detach(), second)
    assert b_of(layer).grad is not None


def test_an_optimiser_that_writes_past_versions_is_seen_too() -> None:
    # fused and paged optimisers change weights without telling autograd
    layer = fused_layer()
    x, grad = inputs((7, IN), torch.float32)
    with torch.no_grad():
        before = layer(x)
    layer(x).backward(grad)
    version = b_of(layer)._version
    torch.optim.AdamW([b_of(layer)], lr=0.1, fused=True).step()
    assert b_of(layer)._version == version
    moved = plain(layer, x, grad)["y"]
    assert not torch.allclose(before, moved, rtol=1e-3, atol=1e-3)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), moved, rtol=1e-5, atol=5e-5)


def test_an_input_that_can_be_made_again_is_not_kept() -> None:
    layer = fused_layer()
    source, grad = inputs((7, IN), torch.float32)
    calls = []

    def make(part: Tensor) -> Tensor:
        calls.append(1)
        return part * 2

    kept = fused(layer, source * 2, grad)
    x = remade(source * 2, make, source)
    layer(x).backward(grad)
    assert calls == [1]
    assert torch.equal(a_of(layer).grad, kept["da"])


def test_gradients_are_fp32_in_bf16() -> None:
    layer = fused_layer(dtype=torch.bfloat16, bias=True)
    x, grad = inputs((3, 5, IN), torch.bfloat16)
    ours, theirs = fused(layer, x, grad), plain(layer, x, grad)
    assert {name: tensor.dtype for name, tensor in ours.items()} == {
        "y": torch.bfloat16,
        "dx": torch.bfloat16,
        "da": torch.float32,
        "db": torch.float32,
    }
    # within bf16's rounding, which is 0.4% an operation
    errors = {name: float((ours[name].float() - theirs[name]).norm() / theirs[name].norm()) for name in ours}
    assert max(errors.values()) < 0.02, errors


def test_inputs_that_need_no_gradient_get_none_and_the_adapter_still_does() -> None:
    # the first layer's case: nothing below the embeddings learns
    layer = fused_layer()
    x, grad = inputs((7, IN), torch.float32)
    layer(x).backward(grad)
    theirs = plain(layer, x, grad)
    assert x.grad is None
    assert a_of(layer).grad is not None
    torch.testing.assert_close(a_of(layer).grad, theirs["da"], rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(b_of(layer).grad, theirs["db"], rtol=1e-5, atol=5e-5)


def test_a_zero_b_is_the_base() -> None:
    # to the bit: iteration 0's opponent is the base itself
    layer = fused_layer(bias=True)
    torch.nn.init.zeros_(b_of(layer))
    x, _ = inputs((7, IN), torch.float32)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, matrix_of(layer), layer.base_layer.bias))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_base_is_never_written(dtype: torch.dtype, mode: str) -> None:
    # bitsandbytes' own forward repacks the weights in place for inference on some CPUs
    layer = fused_layer(dtype=dtype)
    layer.train(mode == "train")
    weight = layer.base_layer.weight
    before = {name: tensor.clone() for name, tensor in constants(weight).items()}
    x, grad = inputs((7, IN), dtype)
    with torch.no_grad():
        scored = layer(x)
    assert torch.equal(layer(x), scored)
    layer(x).backward(grad)
    after = constants(layer.base_layer.weight)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def constants(weight: Any) -> dict[str, Tensor]:
    state = weight.quant_state
    return {
        "data": weight.data,
        "absmax": state.absmax,
        "absmax of absmax": state.state2.absmax,
        "offset": state.offset,
    }


def test_a_small_step_moves_an_fp32_master_weight_and_no_bf16_one() -> None:
    # the paper's last rates; bf16 numbers next to 0.01 are 6e-5 apart, fp32 ones 9e-10
    layer = fused_layer(dtype=torch.bfloat16)
    torch.nn.init.constant_(a_of(layer), 0.01)
    x, grad = inputs((7, IN), torch.bfloat16)
    layer(x).backward(grad)

    master = a_of(layer)
    assert master.grad is not None
    assert bool((master.grad != 0).all())
    low = torch.nn.Parameter(master.detach().to(torch.bfloat16))
    low.grad = master.grad.to(torch.bfloat16)
    before, low_before = master.detach().clone(), low.detach().clone()
    torch.optim.AdamW([master, low], lr=5e-7, weight_decay=0.0).step()

    # AdamW's first step is the rate itself, against the sign of the gradient
    expected = before - 5e-7 * master.grad.sign()
    torch.testing.assert_close(master.detach(), expected, rtol=0, atol=2e-9)
    assert torch.equal(low.detach(), low_before)
