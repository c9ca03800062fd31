"""What holds on a GPU, for both backends: kernels against plain arithmetic, and the invariants on whole runs.

`pytest tests/gpu` needs nothing but a CUDA device; without one it is left out. Unsloth's half needs Unsloth.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import transformers
from conftest import SHAPE, moved_adapter
from test_optimisation import cut_off, descend, interrupt, run, same_bits
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.llama import modeling_llama

from qspin import spin
from qspin.base import find_base
from qspin.budget import _need, rows_at_once, token_budget
from qspin.config import BackendName, LoraConfig, ModelConfig, TrainConfig, load_config
from qspin.decoding import Decoder, replayable
from qspin.files import read_json, read_jsonl, remove
from qspin.fitting import footprint
from qspin.fitting.footprint import GROWTH
from qspin.fitting.memory import OutOfMemory, free_bytes, refusals_told
from qspin.generation import Completion, Request, generate
from qspin.layers import attention
from qspin.layers.attention import Lengths, Packed, Rules, _SpanAttention
from qspin.layers.backends import unsloth_kernels
from qspin.layers.fused import _GatedByKernel
from qspin.layers.kernels import Kernels
from qspin.layers.kv_cache import KVCache
from qspin.model import SlotModel
from qspin.optimisation import steps_kept
from qspin.packing import lengths_of, pack_row, plan_batches
from qspin.prepare import Prepared, prepare
from qspin.records import Pair
from qspin.run_dir import RunDir
from qspin.scoring import pair_logps, score_pairs
from qspin.watch.progress import Silent

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing here was tried"),
]
CUDA = torch.device("cuda")
if torch.cuda.is_available():
    from qspin.layers import nf4_product
BACKENDS = [
    "transformers",
    pytest.param(
        "unsloth", marks=pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="no Unsloth here")
    ),
]
unsloth_only = pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="no Unsloth here")
PAIRS = [
    Pair(str(n), 0, tuple(range(5, 15 + n)), tuple(range(20, 45 + n)), tuple(range(50, 80 - n)), ended=True)
    for n in range(6)
]

# log-probs and gradients of PAIRS in bfloat16 against fp32 on a CPU, ‖difference‖ / ‖fp32‖: these models are wild
ROUNDING = {"llama": (4.0e-3, 0.17), "mistral": (5.3e-3, 0.21), "qwen3": (2.0e-3, 0.16), "gemma2": (1.9e-3, 0.12)}


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def load(folder: Path, backend: BackendName, *, dtype: str = "bfloat16", seed: int = 3, rank: int = 4) -> SlotModel:
    config, slot = ModelConfig(id=str(folder), dtype=dtype), LoraConfig(rank=rank, alpha=2 * rank)  # type: ignore[arg-type]
    model = SlotModel.load(find_base(config), config, slot, seed=0, device=CUDA, backend=backend)
    model.set_adapter(moved_adapter(model, seed=seed))
    return model


# --- kernels ---


@pytest.mark.parametrize("prefix", [0, 17])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(9, 3, 64), (8, 8, 128)])
def test_flash_attention_is_attention(prefix: int, window: int | None, heads: int, kv_heads: int, size: int) -> None:
    row = Packed([Lengths(30, 50, 70), Lengths(5, 9, 1), Lengths(64, 20)], CUDA, prefix)
    tokens = prefix + sum(group.total for group in row.groups)
    rules = Rules(size**-0.5, window, None)
    torch.manual_seed(0)
    shapes = ((heads, tokens, size), (kv_heads, tokens, size), (kv_heads, tokens, size))
    inputs = [torch.randn(shape, device=CUDA, dtype=torch.bfloat16) for shape in shapes]
    grad = torch.randn(tokens, heads, size, device=CUDA, dtype=torch.bfloat16)

    def both(attend: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        output = attend(*leaves)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad.to(dtype))]

    wanted = both(lambda *x: _SpanAttention.apply(*x, row, rules), torch.float32)
    found = both(lambda q, k, v: row.attend(0, q, k, v, rules), torch.bfloat16)
    again = both(lambda q, k, v: row.attend(0, q, k, v, rules), torch.bfloat16)
    for one, other, reference in zip(found, again, wanted, strict=True):
        assert relative(one, reference) < 1e-2
        assert torch.equal(one, other), "sums in order of arrival"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("rows", "ins", "outs", "rank"), [(1, 256, 80, 4), (16, 1024, 2064, 16), (40, 512, 8208, 8), (128, 4096, 1024, 64)]
)
def test_product_by_4_bits(
    rows: int, ins: int, outs: int, rank: int, biased: bool, double_quant: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, device=CUDA, dtype=dtype)

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
    gate, up, grad = (torch.randn(1, 70, 192, device=CUDA, dtype=torch.bfloat16) for _ in range(3))
    leaves = [x.float().requires_grad_() for x in (gate, up)]
    wanted = function(leaves[0]) * leaves[1]
    wanted_grads = torch.autograd.grad(wanted, leaves, grad.float())
    ours = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
    found = _GatedByKernel.apply(*ours, unsloth_kernels().gated(name))
    assert relative(found, wanted) < 1e-2
    for one, other in zip(torch.autograd.grad(found, ours, grad.clone()), wanted_grads, strict=True):
        assert relative(one, other) < 1e-2


@unsloth_only
@pytest.mark.parametrize("one_plus", [False, True])
def test_norm_kernel(one_plus: bool) -> None:
    norm = nn.RMSNorm(192, eps=1e-6, device=CUDA, dtype=torch.bfloat16)
    torch.manual_seed(0)
    norm.weight.data.uniform_(-0.5, 1.5)
    norm.requires_grad_(False)
    x, grad = (torch.randn(1, 70, 192, device=CUDA, dtype=torch.bfloat16) for _ in range(2))
    leaf, ours = x.float().requires_grad_(), x.clone().requires_grad_()
    scale = norm.weight.float() + one_plus
    wanted = leaf * torch.rsqrt(leaf.pow(2).mean(-1, keepdim=True) + 1e-6) * scale
    kernel = unsloth_kernels().rms_norm(norm, one_plus=one_plus)
    assert kernel is not None
    found = kernel(ours)
    assert relative(found, wanted) < 1e-2
    (found_grad,), (wanted_grad,) = (
        torch.autograd.grad(found, ours, grad),
        torch.autograd.grad(wanted, leaf, grad.float()),
    )
    assert relative(found_grad, wanted_grad) < 1e-2


@unsloth_only
def test_dequantised_weights_are_the_same(tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("llama"), "unsloth")
    kernels = model._layers[0]._kernels
    for layers in model._layers:
        for data, constants, _ in layers.packed:
            assert torch.equal(kernels.dequantise(data, constants), Kernels().dequantise(data, constants))


@unsloth_only
def test_rotary_kernel() -> None:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 60, heads, 64, device=CUDA, dtype=torch.bfloat16).transpose(1, 2) for heads in (6, 2))
    # of either half of a head the same
    cos, sin = (torch.randn(1, 60, 32, device=CUDA, dtype=torch.bfloat16).repeat(1, 1, 2) for _ in range(2))
    grads = [torch.randn_like(x) for x in (q, k)]
    leaves, ours = ([x.clone().requires_grad_() for x in (q, k)] for _ in range(2))
    own = getattr(modeling_llama.apply_rotary_pos_emb, "own", modeling_llama.apply_rotary_pos_emb)
    kernel = unsloth_kernels().rotary(own)
    assert kernel is not None
    wanted, found = own(*leaves, cos, sin), kernel(*(x * 1 for x in ours), cos, sin)
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 1e-2
    for one, other in zip(
        torch.autograd.grad(found, ours, grads), torch.autograd.grad(wanted, leaves, grads), strict=True
    ):
        assert relative(one, other) < 1e-2


# --- the model ---


def computed(model: SlotModel, recomputed: int) -> tuple[Tensor, Tensor]:
    """Log-probs of both sides of PAIRS, and the adapter's gradient."""
    model.use_gradient_checkpointing(recomputed)
    real, generated = pair_logps(model, pack_row(PAIRS, CUDA, prefix=4))
    (real - generated).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters.values() if p.grad is not None])
    return torch.cat([real, generated]).detach(), gradients


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ROUNDING)
@pytest.mark.parametrize("recomputed", [0, 1, 3])
def test_log_probs_and_gradients(
    backend: BackendName, architecture: str, recomputed: int, tiny_folder: Callable[[str], Path]
) -> None:
    """16 bits with every kernel are about as far from fp32 with none as 16 bits on a CPU are."""
    found = computed(load(tiny_folder(architecture), backend), recomputed)
    wanted = computed(load(tiny_folder(architecture), "transformers", dtype="float32"), recomputed)
    for one, other, on_a_cpu in zip(found, wanted, ROUNDING[architecture], strict=True):
        assert relative(one, other) < 1.5 * on_a_cpu


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ROUNDING)
@pytest.mark.parametrize("flashes", [True, False])
def test_in_float16_as_without_bfloat16(
    backend: BackendName,
    architecture: str,
    flashes: bool,
    tiny_folder: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What Turing's cards compute in and with: they have no flash kernel. Rounding is an eighth of bfloat16's."""
    if not flashes:
        monkeypatch.setattr(attention, "can_flash", lambda _query: False)
    found = computed(load(tiny_folder(architecture), backend, dtype="float16"), 1)
    wanted = computed(load(tiny_folder(architecture), "transformers", dtype="float32"), 1)
    for one, other, bfloat16_on_a_cpu in zip(found, wanted, ROUNDING[architecture], strict=True):
        assert relative(one, other) < 1.5 * bfloat16_on_a_cpu


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_are_what_training_starts_from(backend: BackendName, tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("llama"), backend)
    micro_batches = [[0, 1, 2], [3, 4, 5]]
    scores = [score for part in score_pairs(model, PAIRS, micro_batches) for score in part]
    for recomputed in (0, 1, 3):
        model.use_gradient_checkpointing(recomputed)
        for micro_batch, offset in zip(micro_batches, (0, 3), strict=True):
            real, generated = pair_logps(model, pack_row([PAIRS[i] for i in micro_batch], CUDA))
            own = scores[offset : offset + 3]
            assert real.tolist() == [score.opponent_real_logps for score in own]
            assert generated.tolist() == [score.opponent_generated_logps for score in own]


def greedy(model: SlotModel) -> list[Completion]:
    requests = [Request(tuple(range(3, 12 + n)), n) for n in range(5)]
    return generate(
        model, requests, max_new_tokens=12, temperature=0, top_p=1.0, width=4, stop_ids=frozenset(),
        on_step=lambda _new, _work: None,
    )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_who_is_swapped_in_plays(backend: BackendName, tiny_folder: Callable[[str], Path]) -> None:
    """Kernels keep what they made of weights; none may decode as the player before."""
    model = load(tiny_folder("llama"), backend, seed=3)
    first, second = moved_adapter(model, seed=3), moved_adapter(model, seed=4)
    played = [greedy(model)]
    for adapter in (second, first):
        pair_logps(model, pack_row(PAIRS, CUDA))[0].sum().backward()
        model.set_adapter(adapter)
        played.append(greedy(model))
    assert played[0] == played[2] != played[1]
    assert played[1] == greedy(load(tiny_folder("llama"), backend, seed=4))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("architecture", ROUNDING)
def test_replayed_steps_are_the_computed_ones(
    backend: BackendName, architecture: str, tiny_folder: Callable[[str], Path]
) -> None:
    """Rows leave and come, and the cache grows, as in generation between two trainings that recompute layers."""
    model = load(tiny_folder(architecture), backend)
    model.use_gradient_checkpointing(2)
    assert replayable(model)
    chance = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, 90, (220, 11), generator=chance).tolist()

    def logits(replays: bool) -> list[Tensor]:
        cache = KVCache(slots=11, device=CUDA)
        decoder = Decoder(model, cache)
        decoder._replays = replays
        found = []
        for step, row in enumerate(tokens):
            live = 7 if step < 40 else 11 if step < 60 else 2
            if step == 40:
                cache.lengths[:] = 0
            found.append(decoder.step(row[:live]).clone())
        assert cache.places > GROWTH["cuda"]
        assert [rows for rows, step in decoder._steps.items() if step is not None] == ([2] if replays else [])
        return found

    with torch.inference_mode(), model.decoding():
        for one, other in zip(logits(replays=True), logits(replays=False), strict=True):
            assert relative(one, other) < 2 * ROUNDING[architecture][0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_replayed_steps_of_many_rows(backend: BackendName, tiny_folder: Callable[[str], Path]) -> None:
    """Beyond those that kernels multiply by the 4 bits as they are: W is made within the graph."""
    model = load(tiny_folder("llama"), backend)
    tokens = torch.randint(5, 90, (6, 200), generator=torch.Generator().manual_seed(0)).tolist()

    def logits(replays: bool) -> list[Tensor]:
        decoder = Decoder(model, KVCache(slots=200, device=CUDA))
        decoder._replays = replays
        return [decoder.step(row).clone() for row in tokens]

    with torch.inference_mode(), model.decoding():
        for one, other in zip(logits(replays=True), logits(replays=False), strict=True):
            assert relative(one, other) < 2 * ROUNDING["llama"][0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_embedding_table_in_main_memory_changes_no_bit(
    backend: BackendName, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def figures(where: str) -> tuple[str, list[Tensor]]:
        model = load(tiny_folder("mistral"), backend)
        assert model._embeddings.weight.device.type == where
        with torch.inference_mode(), model.decoding():
            decoder = Decoder(model, KVCache(slots=3, device=CUDA))
            steps = [decoder.step(tokens).clone() for tokens in ([5, 6], [7, 8, 9], [10, 11, 12], [13, 14], [15, 16])]
        real, generated = pair_logps(model, pack_row(PAIRS, CUDA))
        (real - generated).sum().backward()
        gradients = [parameter.grad for parameter in model.parameters.values()]
        assert all(gradient is not None and gradient.is_cuda for gradient in gradients)
        return model.base_hash(), [*steps, real.detach(), generated.detach(), *gradients]

    name, wanted = figures("cuda")
    monkeypatch.setattr(footprint, "ASIDE", 0.0)
    again, found = figures("cpu")
    assert again == name
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


# --- snapshots ---


@pytest.mark.parametrize("optimizer", ["adamw", "rmsprop", "paged_adamw_8bit"])
def test_a_run_goes_on_from_a_snapshot_of_each_optimiser(optimizer: str, tokenizer: Any, tmp_path: Path) -> None:
    """Weights are so large that bitsandbytes keeps their state in 8 bits, and in pages."""
    # SHAPE's range is for 64 features: of 1024, rounding would move logits by more than loading lets them be off
    shape = SHAPE | {"hidden_size": 1024, "intermediate_size": 1024, "initializer_range": 0.15 / 4}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**shape)
    transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    whole, cut, again = (load(tmp_path / "base", "transformers", rank=128) for _ in range(3))
    assert max(parameter.numel() for parameter in whole.parameters.values()) > 1e5
    metrics = run(whole, descend(whole), tmp_path / "whole", optimizer=optimizer)
    with pytest.raises(KeyboardInterrupt):
        run(cut, cut_off(cut, 5, interrupt), tmp_path / "cut", optimizer=optimizer)
    assert steps_kept(tmp_path / "cut") == 5
    assert run(again, descend(again), tmp_path / "cut", optimizer=optimizer) == metrics
    assert same_bits(again.adapter(), whole.adapter())


# --- memory ---


def test_memory_refused_while_a_step_is_recorded(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_folder("llama"), "transformers")

    def logits() -> Tensor:
        decoder = Decoder(model, KVCache(slots=2, device=CUDA))
        return torch.stack([decoder.step([5, 6]).clone() for _ in range(3)])

    with torch.inference_mode(), model.decoding():
        wanted = logits()
        decoder = Decoder(model, KVCache(slots=2, device=CUDA))
        decoder.step([5, 6])
        with monkeypatch.context() as patch, pytest.raises(OutOfMemory), refusals_told():
            patch.setattr(model, "logits", lambda _hidden: torch.empty(2**42, dtype=torch.uint8, device=CUDA))
            decoder.step([5, 6])
        assert torch.equal(logits(), wanted)


def test_memory_refused_when_a_recorded_step_becomes_a_graph(
    tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the driver, as on a full card. torch has ended the recording by then, and is still on its stream."""
    model = load(tiny_folder("llama"), "transformers")
    end = torch.cuda.CUDAGraph.capture_end

    def refused(graph: torch.cuda.CUDAGraph) -> None:
        end(graph)
        raise torch.AcceleratorError("CUDA error: out of memory")

    with torch.inference_mode(), model.decoding():
        decoder, before = Decoder(model, KVCache(slots=2, device=CUDA)), torch.cuda.current_stream()
        decoder.step([5, 6])
        with monkeypatch.context() as patch, pytest.raises(OutOfMemory), refusals_told():
            patch.setattr(torch.cuda.CUDAGraph, "capture_end", refused)
            decoder.step([5, 6])
        assert torch.cuda.current_stream() == before


@pytest.mark.parametrize("backend", BACKENDS)
def test_refused_work_leaves_nothing_to_the_next(backend: BackendName, tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("llama"), backend)
    model.use_gradient_checkpointing(3)
    share = torch.cuda.memory_reserved() + 600 * 2**20
    torch.cuda.set_per_process_memory_fraction(share / torch.cuda.get_device_properties(0).total_memory)
    try:
        for copies in (20_000, 15_000, 10_000):  # refused in one place or another
            with pytest.raises(OutOfMemory):
                _need(model, PAIRS * (copies // len(PAIRS)), 0)
            assert _need(model, PAIRS, 0) < 2**29
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def test_work_stays_within_a_share_of_the_card(tiny_folder: Callable[[str], Path]) -> None:
    model = load(tiny_folder("llama"), "transformers")
    total = torch.cuda.get_device_properties(0).total_memory
    share = torch.cuda.memory_reserved() + 600 * 2**20
    torch.cuda.set_per_process_memory_fraction(share / total)
    try:
        assert free_bytes(CUDA) < 700 * 2**20
        assert rows_at_once(model, 128) >= 1
        with pytest.raises(OutOfMemory), refusals_told():
            torch.empty(2**30, dtype=torch.uint8, device=CUDA)
        many = [replace(pair, record_id=str(n)) for n in range(400) for pair in PAIRS[:1]]
        lengths = [lengths_of(pair) for pair in many]
        budget = token_budget(
            model, many, lambda b: plan_batches(lengths, batch_size=400, token_budget=b, seed=0), 0, TrainConfig()
        )
        model.use_gradient_checkpointing(budget.recomputed)
        (longest,) = plan_batches(lengths, batch_size=400, token_budget=budget.tokens, seed=0)
        for micro_batch in longest:  # runs out of memory if the budget was too large
            real, _ = pair_logps(model, pack_row([many[i] for i in micro_batch], CUDA))
            real.sum().backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# --- whole runs ---


@pytest.fixture(scope="module")
def prepared(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Prepared]:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n * 7}, I say."} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(backend: str, dtype: str = "auto") -> Prepared:
        settings: dict[str, Any] = {
            "model.id": str(tiny_folder("llama")),
            "model.backend": backend,
            "model.dtype": dtype,
            "data.source": str(path),
            "data.heldout_rows": 4,
            "generation.max_new_tokens": 10,
            "train.batch_size": 4,
            "train.lr": 0.02,
            "train.epochs": 4,
            "iterations": 2,
            "evaluation.stop": "never",
        }
        return prepare(load_config(None, settings), datetime.date(2026, 1, 1))

    return make


def play(prepared: Prepared, out: Path) -> RunDir:
    spin.run(prepared, out, Silent())
    return RunDir(out)


def adapter_bytes(run: RunDir) -> list[bytes]:
    return [(run.iteration(t).adapter / "adapter_model.safetensors").read_bytes() for t in (0, 1)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_and_its_resumption(backend: str, prepared: Callable[..., Prepared], tmp_path: Path) -> None:
    ready = prepared(backend)
    run = play(ready, tmp_path / "run")
    assert read_json(run.record)["backend"] == backend
    for iteration in (0, 1):
        first, *_, last = read_jsonl(run.iteration(iteration).metrics)
        assert (first["margin"], first["loss"]) == (0.0, pytest.approx(math.log(2), abs=1e-6))
        assert last["margin"] > 0
    whole = adapter_bytes(run)
    assert whole == adapter_bytes(play(ready, tmp_path / "again"))

    # what a run looks like that died after a shard of iteration 1 was generated
    half = RunDir(Path(shutil.copytree(run.path, tmp_path / "half")))
    last = half.iteration(1)
    for path in (last.adapter, last.evaluation, last.metrics, last.training_plan):
        remove(path)
    remove(last.scores(0).parent)
    assert whole == adapter_bytes(play(ready, half.path))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_run_as_without_bfloat16_and_flash(
    backend: str, prepared: Callable[..., Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "can_flash", lambda _query: False)
    played = play(prepared(backend, "float16"), tmp_path / "run")
    for iteration in (0, 1):
        first, *_, last = metrics = read_jsonl(played.iteration(iteration).metrics)
        assert (first["margin"], first["loss"]) == (0.0, pytest.approx(math.log(2), abs=1e-6))
        assert last["margin"] > 0
        scales = [row["loss_scale"] for row in metrics]
        assert scales == sorted(scales, reverse=True)
        assert all(math.log2(scale).is_integer() for scale in scales)
    assert adapter_bytes(played) == adapter_bytes(play(prepared(backend, "float16"), tmp_path / "again"))
