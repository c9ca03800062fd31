"""Plans: what fits sums to less than the card has, what doesn't is mended, and real runs take what was planned."""

from __future__ import annotations

import ctypes
import itertools
import json
import multiprocessing
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import HOUSE_STYLE, ROOT
from safetensors.torch import save_file
from test_cli import call

from qspin.base import find_base
from qspin.config import RunConfig, load_config, preset_names
from qspin.errors import QspinError
from qspin.generation import Request, generate
from qspin.machine import GIB, Machine, card
from qspin.memory import peak
from qspin.model import SlotModel
from qspin.packing import lengths_of, plan_batches
from qspin.plan import Plan, make_plan, nearest_change, with_settings
from qspin.plan_rows import Rows, assumed_rows, rows_of_data
from qspin.records import Pair
from qspin.scoring import score_pairs
from qspin.training import Task, train

CPU = torch.device("cpu")
CARDS = (8, 12, 16, 24)
HERE = Machine("test", "cpu", 8 * GIB, 2, 1e12, 1e10, measured=True)


def planned(name: str, gigabytes: float, **settings: Any) -> Plan:
    config = with_settings(load_config(name), {key.replace("__", "."): value for key, value in settings.items()})
    return make_plan(config, card(gigabytes, config.model), assumed_rows(1000))


# --- every preset on every card


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_has_a_plan_for_every_card_in_no_time(name: str) -> None:
    for gigabytes in CARDS:
        started = time.process_time()
        plan = planned(name, gigabytes)
        change = None if plan.fits else nearest_change(plan)
        assert time.process_time() - started < 0.5
        for fitting in (plan, change.plan if change else plan):
            if fitting.fits:
                assert all(sum(size for _, size in phase.parts) <= gigabytes * GIB for phase in fitting.phases)
                assert fitting.tokens >= 16
                assert fitting.width >= 1
        assert plan.fits or change is not None


def test_plans_need_no_torch_and_no_network() -> None:
    script = (
        "import sys, socket\n"
        "def refuse(*_): raise OSError('no network')\n"
        "socket.socket.connect = refuse\n"
        "from qspin.cli import main\n"
        "sys.argv = ['qspin', 'plan', 'paper', '--vram', '8']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print(*sorted({'torch', 'transformers', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "rich"


@pytest.mark.parametrize("name", ["qwen3-8b", "smollm2-1.7b-instruct", "paper"])
def test_more_memory_never_gives_less(name: str) -> None:
    plans = [planned(name, gigabytes) for gigabytes in range(4, 48, 2)]
    for less, more in itertools.pairwise(plans):
        assert more.tokens >= less.tokens
        assert more.width >= less.width
        assert more.fits >= less.fits
    assert (plans[0].fits, plans[-1].fits) == (False, True)


# --- what the settings do


def test_what_takes_more_memory_takes_more_in_the_plan() -> None:
    plan = planned("llama-3.1-8b-instruct", 24, train__tokens_per_micro_batch=4096, generation__width=8)
    train = plan.phases[2].total
    for key, value, more in (
        ("train__gradient_checkpointing", False, True),
        ("train__optimizer", "paged_adamw_8bit", False),
        ("train__tokens_per_micro_batch", 8192, True),
        ("lora__rank", 64, True),
    ):
        settings = {"train__tokens_per_micro_batch": 4096, "generation__width": 8, key: value}
        assert (planned("llama-3.1-8b-instruct", 24, **settings).phases[2].total > train) is more, key
    wider = planned("llama-3.1-8b-instruct", 24, train__tokens_per_micro_batch=4096, generation__width=16)
    assert wider.phases[0].total > plan.phases[0].total
    assert wider.phases[2].total == train


def test_a_pair_is_never_cut() -> None:
    plan = planned("paper", 24, train__tokens_per_micro_batch=16)
    assert plan.longest == 3 * 1024
    assert plan.phases[2].total == planned("paper", 24, train__tokens_per_micro_batch=3 * 1024).phases[2].total


def test_time_grows_with_the_work() -> None:
    plan = planned("zephyr-7b-sft", 24)
    more = make_plan(plan.config, plan.machine, assumed_rows(2000))
    assert more.seconds > 1.5 * plan.seconds
    by_phase = {seconds.phase: seconds for seconds in plan.times}
    # pairs of the iteration before are scored and trained on again
    assert by_phase["train"].last == pytest.approx(2 * by_phase["train"].first)
    assert by_phase["generate"].last == by_phase["generate"].first
    assert by_phase["train"].run == pytest.approx(5 * by_phase["train"].first)  # 1 + 2 + 2
    assert by_phase["evaluate"].run == pytest.approx(4 * by_phase["evaluate"].first)
    slow = replace(plan.machine, flops=plan.machine.flops / 2, bandwidth=plan.machine.bandwidth / 2)
    assert make_plan(plan.config, slow, plan.rows).seconds == pytest.approx(2 * plan.seconds)
    assert make_plan(load_config("llama-3.1-8b"), plan.machine, plan.rows).times[0].phase == "warm start"


def test_disk_holds_the_base_the_adapters_and_the_pairs() -> None:
    plan = planned("zephyr-7b-sft", 24)
    sizes = dict(plan.disk)
    assert sizes["the base's 16-bit weights, in the cache"] == 2 * 7_241_732_096
    adapter = dict(plan.phases[2].parts)["gradients"]
    assert sizes["3 adapters"] == 3 * adapter
    assert sizes["snapshots while training, two at most"] == 2 * 3 * adapter  # with AdamW's two moments


# --- what doesn't fit


@pytest.mark.parametrize(
    ("name", "gigabytes", "settings", "key"),
    [
        ("smollm2-1.7b-instruct", 8, {"train__tokens_per_micro_batch": 16384}, "train.tokens_per_micro_batch"),
        ("mistral-nemo-instruct", 24, {"train__gradient_checkpointing": False}, "train.gradient_checkpointing"),
    ],
)
def test_the_nearest_change_is_named_and_fits(name: str, gigabytes: float, settings: dict[str, Any], key: str) -> None:
    plan = planned(name, gigabytes, **settings)
    assert not plan.fits
    change = nearest_change(plan)
    assert change is not None
    assert list(change.settings) == [key]
    config = with_settings(plan.config, change.settings)
    assert make_plan(config, plan.machine, plan.rows).fits


def test_a_smaller_model_is_the_last_resort() -> None:
    plan = planned("mistral-nemo-instruct", 4)
    change = nearest_change(plan)
    assert change is not None
    assert change.preset is not None
    assert not change.settings
    assert change.plan.shape.parameters < plan.shape.parameters
    assert make_plan(load_config(change.preset), plan.machine, plan.rows).fits
    assert nearest_change(planned("smollm2-135m", 0.8)) is None


def test_changes_keep_to_rows_that_are_short_enough() -> None:
    rows = Rows(((100, 2000), (100, 900), (100, 200)), 0, "three")
    config = load_config("llama-3.1-8b-instruct", {"data.max_completion_tokens": 4096})
    assert rows.under(config.data).lengths == rows.lengths
    assert rows.under(load_config(None).data).lengths == ((100, 900), (100, 200))  # at most 1024
    cut = load_config(None, {"data.long_completions": "cut"})
    assert rows.under(cut.data).lengths == ((100, 1024), (100, 900), (100, 200))
    none = load_config("smollm2-135m", {"data.max_completion_tokens": 50})
    with pytest.raises(QspinError, match=r"^no row has at most 512 tokens of prompt and 50 of completion"):
        make_plan(none, HERE, rows)


# --- data


def test_lengths_are_the_tokenizers_own_where_there_is_one(tiny_folder: Callable[[str], Path]) -> None:
    config = load_config(
        None,
        {
            "model.id": str(tiny_folder("llama")),
            "data.source": str(HOUSE_STYLE / "train.jsonl"),
            "data.limit": 20,
            "data.heldout_rows": 4,
        },
    )
    rows = rows_of_data(config)
    assert len(rows.lengths) == 16
    assert rows.prefix > 0  # <|im_start|>user and a newline
    assert "the model's own tokens" in rows.source
    elsewhere = with_settings(config, {"model.id": "nobody/nothing"})
    guessed = rows_of_data(elsewhere)
    assert len(guessed.lengths) == 20
    assert "a token taken for 4 characters" in guessed.source
    row = json.loads((HOUSE_STYLE / "train.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert guessed.lengths[0] == (-(-len(row["prompt"]) // 4) + 5, -(-len(row["completion"]) // 4) + 5)


# --- the command


def test_the_command_says_what_the_page_shows() -> None:
    page = (ROOT / "docs" / "fitting.md").read_text(encoding="utf-8")
    examples = re.findall(r"^    \$ qspin (plan .+)\n((?:(?:    .*)?\n)+)", page, re.MULTILINE)
    assert examples
    for command, shown in examples:
        answer = call(*command.split(), columns=80)
        assert answer.code == 0
        said = [line.rstrip() for line in answer.out.splitlines()]
        page_lines = [line.removeprefix("    ").rstrip() for line in shown.rstrip("\n").splitlines()]
        assert said[: len(page_lines)] == page_lines
        assert max(map(len, said)) <= 80


def test_the_command_plans_for_a_folder_and_its_data(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"model:\n  id: {tiny_folder('qwen3')}\ndata:\n  heldout_rows: 4\n")
    answer = call("plan", config, "--data", HOUSE_STYLE / "train.jsonl", "--rows", "30", "--vram", "8")
    assert answer.code == 0, answer.err
    assert "Fits: " in answer.out
    assert "26 rows, in the model's own tokens" in answer.out


def test_the_command_on_this_machine() -> None:
    answer = call("plan", "smollm2-135m")
    assert answer.code == 0, answer.err
    assert "estimated from rates measured here" in answer.out
    assert "of free memory" in answer.out


def test_a_shape_that_is_nowhere_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text("model:\n  id: somebody/something\n")
    answer = call("plan", config, "--vram", "8")
    assert answer.code == 1
    assert answer.err.startswith(
        "error: model.architecture is not set, and model.id ('somebody/something') is no local"
    )
    assert len(answer.err.splitlines()) == 1
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "config.json").write_text("{")
    config.write_text(f"model:\n  id: {folder}\n")
    assert call("plan", config, "--vram", "8").err.startswith(f"error: {folder}/config.json: damaged or unreadable")


# --- against what runs take on this machine


def in_own_process(work: Callable[..., tuple[int, int]], *arguments: Any) -> tuple[int, int]:
    """Planned and measured bytes, in a process that has done nothing else, as a run is.

    Every larger tensor is in memory of its own there, so that what is resident is what tensors take: a heap has holes.
    """
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("glibc's malloc is asked to")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), map_large_tensors) as pool:
        return pool.submit(work, *arguments).result()


def map_large_tensors() -> None:
    ctypes.CDLL(None).mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD


def some_pairs(lengths: list[tuple[int, int, int]]) -> list[Pair]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 500, (count,), generator=generator).tolist())

    return [Pair(str(n), 0, *(tokens(count) for count in group), ended=True) for n, group in enumerate(lengths)]


def measured_training(model: SlotModel, pairs: list[Pair], config: RunConfig, folder: Path) -> int:
    """The peak of two optimiser steps of two micro-batches above the loaded model: by the last of them, gradients and
    the optimiser's state are there too."""
    budget = config.train.tokens_per_micro_batch
    assert isinstance(budget, int)
    plan = plan_batches([lengths_of(pair) for pair in pairs], batch_size=len(pairs), token_budget=budget, seed=0)
    assert (len(plan), len(plan[0]), config.train.epochs) == (1, 2, 2)
    scores = {score.key: score for part in score_pairs(model, pairs, plan[0]) for score in part}
    task = Task(pairs, scores, plan, iteration=0, seed=0)
    ctypes.CDLL(None).malloc_trim(0)
    with peak(CPU) as measured:
        train(model, task, config.train, snapshots=folder, on_step=lambda _metrics, _pairs: None)
    return measured.above


def planned_training(plan: Plan) -> int:
    parts = dict(plan.phases[2].parts)
    names = ("gradients", "optimiser (adamw)", "activations kept", "a layer's backward pass, or the head")
    return sum(parts[name] for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_embedded_model_takes_what_was_planned(checkpointing: bool, tmp_path: Path) -> None:
    planned, measured = in_own_process(embedded_training, checkpointing, tmp_path)
    assert planned == pytest.approx(measured, rel=0.15)


def embedded_training(checkpointing: bool, folder: Path) -> tuple[int, int]:
    lengths = [(40, 100, 110)] * 4
    config = load_config(
        "smollm2-135m",
        {
            "generation.max_new_tokens": 110,
            "train.tokens_per_micro_batch": 500,
            "train.batch_size": 4,
            "train.gradient_checkpointing": checkpointing,
        },
    )
    model = SlotModel.load(find_base(config.model), config.model, config.lora, seed=0, device=CPU)
    here = replace(HERE, itemsize=model.dtype.itemsize)
    plan = make_plan(config, here, Rows(tuple((prompt, real) for prompt, real, _ in lengths), 0, "made up"))
    return planned_training(plan), measured_training(model, some_pairs(lengths), config, folder)


@pytest.mark.slow
def test_a_model_of_a_billion_weights_takes_what_was_planned(tmp_path: Path) -> None:
    planned, measured = in_own_process(training_of_a_billion, tmp_path)
    assert planned == pytest.approx(measured, rel=0.15)


def training_of_a_billion(tmp_path: Path) -> tuple[int, int]:
    """Llama 3.2 1B's shape with random weights, from a folder that tells its own shape."""
    folder = tmp_path / "model"
    save_random(
        transformers.LlamaConfig(
            vocab_size=128256,
            hidden_size=2048,
            intermediate_size=8192,
            num_hidden_layers=16,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            tie_word_embeddings=True,
        ),
        folder,
    )
    lengths = [(10, 40, 50)] * 2
    settings = {"model.id": str(folder), "generation.max_new_tokens": 50, "train.tokens_per_micro_batch": 100}
    config = load_config(None, settings)
    base = find_base(config.model)
    model = SlotModel.load(base, config.model, config.lora, seed=0, device=CPU)
    here = replace(HERE, itemsize=model.dtype.itemsize)
    plan = make_plan(config, here, Rows(tuple((prompt, real) for prompt, real, _ in lengths), 0, "made up"))
    assert plan.shape.parameters == 1_235_814_400  # meta-llama/Llama-3.2-1B's
    planned_base = dict(plan.phases[0].parts)
    measured_base = sum(tensor.nbytes for tensor in tensors_held(model))
    assert planned_base["4-bit weights and their constants"] + planned_base[
        f"{8 * here.itemsize}-bit embeddings, head, norms"
    ] == pytest.approx(measured_base, rel=0.01)
    return planned_training(plan), measured_training(model, some_pairs(lengths), config, tmp_path / "snapshots")


def save_random(config: Any, folder: Path) -> None:
    """A model of random bf16 weights, quickly: one small block over and over."""
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in transformers.AutoModelForCausalLM.from_config(config).named_parameters()}
    block = (0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))).bfloat16()
    folder.mkdir()
    weights = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else block.repeat(-(-shape.numel() // len(block)))[: shape.numel()].view(shape)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)


def tensors_held(model: SlotModel) -> list[torch.Tensor]:
    """The base's tensors, each once: weights, and the constants of those in 4 bits."""
    slot = {id(parameter) for parameter in model.parameters.values()}
    found = [parameter for parameter in model.peft_model.parameters() if id(parameter) not in slot]
    states = [parameter.quant_state for parameter in found if hasattr(parameter, "quant_state")]
    found += [
        tensor for state in states for tensor in (state.absmax, state.code, state.state2.absmax, state.state2.code)
    ]
    return found + [constants.absmax for layers in model._layers for _, constants, _ in layers.packed]


@pytest.mark.slow
def test_generation_of_the_embedded_model_takes_what_was_planned() -> None:
    planned, measured = in_own_process(embedded_generation)
    assert planned == pytest.approx(measured, rel=0.2)


def embedded_generation() -> tuple[int, int]:
    config = load_config("smollm2-135m", {"generation.max_new_tokens": 40, "generation.width": 64})
    model = SlotModel.load(find_base(config.model), config.model, config.lora, seed=0, device=CPU)
    here = replace(HERE, itemsize=model.dtype.itemsize)
    prompts = [pair.prompt_ids for pair in some_pairs([(100, 1, 1)] * 64)]
    plan = make_plan(config, here, Rows(((100, 1),) * 64, 0, "made up"))
    ctypes.CDLL(None).malloc_trim(0)
    with peak(CPU) as measured:
        generate(
            model,
            [Request(prompt, number) for number, prompt in enumerate(prompts)],
            max_new_tokens=40,
            temperature=1.0,
            top_p=1.0,
            width=64,
            stop_ids=frozenset(),
            on_step=lambda _tokens, _rows: None,
        )
    parts = dict(plan.phases[0].parts)
    names = ("base unpacked", "keys, values and logits of rows", "a pass without gradients")
    return sum(parts[name] for name in names), measured.above
