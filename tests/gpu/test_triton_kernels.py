"""Triton's kernels, ours and Unsloth's, against plain arithmetic: on a GPU, or carried out by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from interpreted import INTERPRETED, make_complete
from on_cuda import CUDA, PAIRS, computed, load, relative, unsloth_only
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama import modeling_llama

from qspin.decoding import Decoder
from qspin.layers import kernels, lora
from qspin.layers.backends import unsloth_kernels
from qspin.layers.fused import _GatedByKernel
from qspin.layers.kernels import Kernels
from qspin.layers.kv_cache import KVCache

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() and not INTERPRETED, reason="no CUDA device: nothing here was tried"
    ),
]
interpreted_only = pytest.mark.skipif(not INTERPRETED, reason="shows what rounding on a GPU hides")
DEVICE = torch.device("cpu") if INTERPRETED else CUDA
CLOSE = {torch.float16: 1e-3} if INTERPRETED else {torch.bfloat16: 1e-2, torch.float16: 1e-3}  # of what is rounded once
DTYPES = list(CLOSE)  # to the interpreter bfloat16's numbers are whole ones
# rows, inputs, outputs, rank
PRODUCTS = [(1, 256, 80, 4), (16, 1024, 2064, 16), (40, 512, 8208, 8), (128, 4096, 1024, 64)]
FEWER_PRODUCTS = [(1, 256, 80, 4), (16, 1024, 208, 16), (40, 512, 80, 8), (128, 256, 80, 64)]
if torch.cuda.is_available() or INTERPRETED:
    from qspin.layers import nf4_product


@pytest.fixture(autouse=True)
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:
        make_complete(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "ins", "outs", "rank"), FEWER_PRODUCTS if INTERPRETED else PRODUCTS)
def test_product_by_4_bits(
    rows: int, ins: int, outs: int, rank: int, biased: bool, double_quant: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype)

    data, constants = bnb.quantize_4bit(some(outs, ins), quant_type="nf4", compress_statistics=double_quant)
    x, both, b, bias = some(rows, ins), some(rows, 2 * rank), some(outs, rank), some(outs) if biased else None
    low = both[:, rank:]  # as of one of several layers
    found = nf4_product.product(x, data, constants, low, b, bias)
    wanted = x.float() @ bnb.dequantize_4bit(data, constants).float().t() + low.float() @ b.float().t()
    assert relative(found, wanted if bias is None else wanted + bias) < (5e-3 if dtype == torch.bfloat16 else 1e-3)
    assert torch.equal(found, nf4_product.product(x, data, constants, low, b, bias))


@unsloth_only
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
def test_gated_kernels(name: Any) -> None:
    functions = {"silu": functional.silu, "gelu": functional.gelu}
    function = functions.get(name, lambda x: functional.gelu(x, approximate="tanh"))
    torch.manual_seed(0)
    gate, up, grad = (torch.randn(1, 70, 192, device=DEVICE, dtype=DTYPES[0]) for _ in range(3))
    leaves = [x.float().requires_grad_() for x in (gate, up)]
    wanted = function(leaves[0]) * leaves[1]
    wanted_grads = torch.autograd.grad(wanted, leaves, grad.float())
    ours = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    found = _GatedByKernel.apply(*ours, unsloth_kernels().gated(name))
    assert relative(found, wanted) < CLOSE[DTYPES[0]]
    for one, other in zip(torch.autograd.grad(found, ours, grad.clone()), wanted_grads, strict=True):
        assert relative(one, other) < CLOSE[DTYPES[0]]


@unsloth_only
@pytest.mark.parametrize("one_plus", [False, True])
def test_norm_kernel(one_plus: bool) -> None:
    norm = nn.RMSNorm(192, eps=1e-6, device=DEVICE, dtype=DTYPES[0])
    torch.manual_seed(0)
    norm.weight.data.uniform_(-0.5, 1.5)
    norm.requires_grad_(False)
    x, grad = (torch.randn(1, 70, 192, device=DEVICE, dtype=DTYPES[0]) for _ in range(2))
    leaf, ours = x.float().requires_grad_(), x.clone().requires_grad_()
    scale = norm.weight.float() + one_plus
    wanted = leaf * torch.rsqrt(leaf.pow(2).mean(-1, keepdim=True) + 1e-6) * scale
    kernel = unsloth_kernels().rms_norm(norm, one_plus=one_plus)
    assert kernel is not None
    found = kernel(ours)
    assert relative(found, wanted) < CLOSE[DTYPES[0]]
    (found_grad,), (wanted_grad,) = (
        torch.autograd.grad(found, ours, grad),
        torch.autograd.grad(wanted, leaf, grad.float()),
    )
    assert relative(found_grad, wanted_grad) < CLOSE[DTYPES[0]]


@unsloth_only
def test_rotary_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 60, heads, 64, device=DEVICE, dtype=DTYPES[0]).transpose(1, 2) for heads in (6, 2))
    # of either half of a head the same
    cos, sin = (torch.randn(1, 60, 32, device=DEVICE, dtype=DTYPES[0]).repeat(1, 1, 2) for _ in range(2))
    grads = [torch.randn_like(x) for x in (q, k)]
    leaves, ours = ([x.clone().requires_grad_() for x in (q, k)] for _ in range(2))
    own = getattr(modeling_llama.apply_rotary_pos_emb, "own", modeling_llama.apply_rotary_pos_emb)
    kernel = unsloth_kernels().rotary(own)
    assert kernel is not None
    monkeypatch.setattr(Tensor, "is_cuda", True)  # else the model's own rotates
    wanted, found = own(*leaves, cos, sin), kernel(*(x * 1 for x in ours), cos, sin)
    assert type(found[0].grad_fn) is not type(wanted[0].grad_fn), "it was not the kernel"
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < CLOSE[DTYPES[0]]
    for one, other in zip(
        torch.autograd.grad(found, ours, grads), torch.autograd.grad(wanted, leaves, grads), strict=True
    ):
        assert relative(one, other) < CLOSE[DTYPES[0]]


@interpreted_only
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2"])
def test_a_model_computes_as_without_them(
    architecture: str, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs and gradients in fp32, with every layer's norms, gates and rotary embedding by Unsloth's kernels."""
    monkeypatch.setattr(type(unsloth_kernels()), "dequantise", Kernels.dequantise)  # CUDA's, not Triton's
    model = load(tiny_folder(architecture), "unsloth", dtype="float32", device=DEVICE)
    with monkeypatch.context() as patch:
        patch.setattr(Tensor, "is_cuda", True)  # as is asked before a kernel rotates
        found = computed(model, 1, PAIRS[:1])
    plain = load(tiny_folder(architecture), "transformers", dtype="float32", device=DEVICE)
    wanted = computed(plain, 1, PAIRS[:1])
    assert not torch.equal(found[1], wanted[1]), "no kernel had a part in it"
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 1e-5


@interpreted_only
def test_a_model_decodes_by_our_kernel(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1}
    config = transformers.Qwen2Config(**shape, num_attention_heads=4, num_key_value_heads=2)  # with biases
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ours = nf4_product.product
    products = []

    def counted(*given: Any) -> Tensor:
        products.append(ours(*given))
        return products[-1]

    def logits() -> list[Tensor]:
        model = load(tmp_path, "transformers", dtype="float16", device=DEVICE)
        for layers in model._layers:
            layers.few_rows = True
        with torch.inference_mode():
            decoder = Decoder(model, KVCache(slots=3, device=DEVICE))
            return [decoder.step(tokens).clone() for tokens in ([5, 6], [7, 8, 9], [10, 11, 12])]

    monkeypatch.setattr(lora, "_stacked", lambda weights: [(w.data, w.quant_state, range(1)) for w in weights])
    wanted = logits()
    monkeypatch.setattr(kernels, "TRITON", True)
    monkeypatch.setattr(kernels, "fast_memory", lambda _x: True)
    monkeypatch.setattr(nf4_product, "product", counted)
    found = logits()
    assert len(products) == 3 * 7
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 2 * CLOSE[torch.float16]
