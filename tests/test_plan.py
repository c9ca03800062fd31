"""Plans: what fits sums to less than the card has, what doesn't is mended, and real runs take what was planned."""

from __future__ import annotations

import itertools
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_plan import A_BILLION, Bytes, Case, generation, save_random, training
from conftest import HOUSE_STYLE, ROOT, call
from harness import in_fresh_process

from qspin import api, budget
from qspin.base import find_base
from qspin.config import load_config
from qspin.config_files import preset_names
from qspin.errors import QspinError
from qspin.fitting import footprint
from qspin.fitting.at_once import A_PASS
from qspin.fitting.footprint import SHARE, Footprint
from qspin.layers.attention import Lengths
from qspin.machine import GIB, Machine, card
from qspin.model import SlotModel
from qspin.packing import plan_batches
from qspin.planning.plan import Plan, make_plan
from qspin.planning.plan_change import nearest_change, with_settings
from qspin.planning.plan_rows import Rows, assumed_rows, rows_of_data
from qspin.planning.plan_view import _verdict
from qspin.records import Pair

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
def test_more_memory_never_gives_less(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(footprint, "ASIDE", 0.0)  # else a little less is left where the embedding table comes back
    plans = [planned(name, gigabytes) for gigabytes in range(2, 48, 2)]
    for less, more in itertools.pairwise(plans):
        assert more.width >= less.width
        assert more.fits >= less.fits
    assert (plans[0].fits, plans[-1].fits) == (False, True)
    settings = {"train__tokens_per_micro_batch": 4096}
    recomputed = [planned(name, gigabytes, **settings).recomputed for gigabytes in range(2, 48)]
    assert recomputed == sorted(recomputed, reverse=True)
    assert len(set(recomputed)) > 3
    assert (recomputed[0], recomputed[-1]) == (plans[0].shape.layers, 0)


# --- what the settings do


def test_what_takes_more_memory_takes_more_in_the_plan() -> None:
    as_it_is = {"train__tokens_per_micro_batch": 4096, "generation__width": 8, "train__gradient_checkpointing": True}
    plan = planned("llama-3.1-8b-instruct", 24, **as_it_is)
    train = plan.phases[2].total
    for key, value, more in (
        ("train__gradient_checkpointing", False, True),
        ("train__optimizer", "paged_adamw_8bit", False),
        ("train__tokens_per_micro_batch", 8192, True),
        ("lora__rank", 64, True),
    ):
        assert (planned("llama-3.1-8b-instruct", 24, **as_it_is | {key: value}).phases[2].total > train) is more, key
    wider = planned("llama-3.1-8b-instruct", 24, **as_it_is | {"generation__width": 16})
    assert wider.phases[0].total > plan.phases[0].total
    assert wider.phases[2].total == train


@pytest.mark.parametrize(
    ("name", "gigabytes", "aside"),
    [("qwen3-8b", 8, 151_936 * 4096 * 2), ("qwen3-8b", 24, 0), ("qwen3-8b", 6, 0), ("gemma-2-9b-it", 8, 0)],
)
def test_a_small_card_is_spared_the_embedding_table(name: str, gigabytes: int, aside: int) -> None:
    """But not one that could not load the model, and where it is the head too."""
    plan = planned(name, gigabytes)
    loaded = {part: size for part, size in plan.phases[0].parts if part.startswith("16-bit")}
    assert loaded == {
        "16-bit head, norms" if aside else "16-bit embeddings, head, norms": (
            Footprint(plan.shape, 16, None, "cuda", 2, recomputed=0).unquantised() - aside
        )
    }


@pytest.mark.parametrize(
    ("megabytes", "a_pass", "recomputed"),  # what a pass costs, as many tokens; layers of 3
    [(300, 36, 0), (12, 10**6, 1), (8, 36, 0), (8, 10**6, 3), (5, 36, 0), (5, 10**6, 2), (3, 36, 0), (3, 10**6, 3)],
)
def test_the_engine_chooses_what_was_planned(
    megabytes: int, a_pass: int, recomputed: int, tiny_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For rows of one length and the same room, where a measurement is what was predicted."""
    lengths = Lengths(20, 60, 50)
    config = load_config(None, {"model.id": str(tiny_folder("llama")), "generation.max_new_tokens": 50})
    rows = Rows(((20, 60),) * 64, 0, "made up")
    monkeypatch.setitem(A_PASS, "cpu", a_pass)
    monkeypatch.setattr(Footprint, "holes", lambda *_: 0)  # which show in measurements alone
    free = replace(HERE, memory=10**9)
    loaded = free.memory - make_plan(config, free, rows).phases[2].parts[-1][1] / (1 - SHARE)  # margin
    plan = make_plan(config, replace(free, memory=int(loaded) + megabytes * 10**6), rows)
    assert plan.recomputed == recomputed

    model = SlotModel.load(find_base(config.model), config.model, config.lora, seed=0, device=CPU)
    pairs = [Pair(str(n), 0, (1,) * 20, (2,) * 60, (3,) * 50, ended=True) for n in range(64)]
    monkeypatch.setattr(budget, "free_bytes", lambda _device: megabytes * 10**6)
    monkeypatch.setattr(
        budget, "_need", lambda model, pairs, prefix: budget._predicted(model.footprint, budget._batch(pairs, prefix))
    )

    def cut(tokens: int) -> list[list[list[int]]]:
        return plan_batches([lengths] * 64, batch_size=16, token_budget=tokens, seed=0)

    assert budget.token_budget(model, pairs, cut, 0, config.train) == (plan.tokens, plan.recomputed)


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
    assert "4 adapters" in dict(planned("llama-3.1-8b", 24).disk), "one of its warm start"
    alike, alone = (Rows(((100, 50),) * 40, prefix, "forty") for prefix in (90, 0))  # a file has each prompt whole
    pairs = [make_plan(plan.config, plan.machine, rows).disk[2] for rows in (alike, alone)]
    assert pairs[0] == pairs[1] == ("pairs of all iterations", int(6.5 * 3 * 40 * (150 + 256)))


def test_no_more_rows_are_evaluated_than_can_be_held_out() -> None:
    def evaluating(rows: int, **settings: Any) -> float:
        config = load_config("zephyr-7b-sft", {key.replace("__", "."): value for key, value in settings.items()})
        plan = make_plan(config, card(24, config.model), assumed_rows(rows))
        return next(seconds.first for seconds in plan.times if seconds.phase == "evaluate")

    assert evaluating(152) == evaluating(152, data__heldout_rows=38) < evaluating(1000, data__heldout_rows=64)
    assert evaluating(152, data__heldout_source="elsewhere.jsonl") > evaluating(152)
    assert evaluating(2) > 0


# --- what doesn't fit


@pytest.mark.parametrize(
    ("name", "gigabytes", "settings", "key"),
    [
        (
            "smollm2-1.7b-instruct",
            8,
            {"train__tokens_per_micro_batch": 16384, "train__gradient_checkpointing": False},
            "train.tokens_per_micro_batch",
        ),
        ("zephyr-7b-sft", 12, {"train__gradient_checkpointing": False}, "train.gradient_checkpointing"),
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


def test_a_smaller_model_is_one_that_takes_some_of_the_rows() -> None:
    config = load_config("qwen3-8b", {"data.max_prompt_tokens": 8192})
    machine = card(4, config.model)
    plan = make_plan(config, machine, Rows(((4000, 300),) * 9, 0, "long ones"))
    assert nearest_change(plan) is None, "no preset takes prompts of 4000 tokens"
    plan = make_plan(config, machine, Rows(((4000, 300),) * 9 + ((100, 300),), 0, "long ones, and one that is short"))
    change = nearest_change(plan)
    assert change is not None
    assert change.preset is not None
    assert f"GiB and 1 of 10 rows: {change.preset}" in _verdict(plan, change)


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


def test_data_that_a_configuration_names_are_said_not_to_be_read() -> None:
    said = " ".join(call("plan", "quickstart", "--vram", "8", columns=80).out.split())
    assert "is not read unless --data names it: 128 rows assumed, of 128 tokens" in said
    said = " ".join(call("plan", "qwen3-8b", "--vram", "24", columns=80).out.split())
    assert "no data given: 1000 rows assumed" in said


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


@pytest.mark.parametrize(
    ("setting", "gigabytes", "said"),
    [
        ("auto", 12, r"auto +11 of 32 layers recomputed"),
        ("true", 12, r"true +auto: [\d.]+ (min|h) less"),
        ("true", 4, r"true"),  # which does not fit with auto either
        ("false", 24, r"false"),  # as auto would have it
    ],
)
def test_the_command_says_what_is_recomputed(setting: str, gigabytes: int, said: str) -> None:
    changes = ("--set", f"train.gradient_checkpointing={setting}")
    shown = call("plan", "zephyr-7b-sft", "--vram", gigabytes, *changes, columns=80).out
    [line] = [line.strip() for line in shown.splitlines() if line.startswith("train.gradient_checkpointing")]
    assert re.fullmatch(rf"train\.gradient_checkpointing +{said}", line)


def test_a_narrow_terminal_breaks_no_setting() -> None:
    shown = call("plan", "zephyr-7b-sft", "--vram", "12", columns=60).out
    assert max(map(len, shown.splitlines())) <= 60
    assert "\ntrain.tokens_per_micro_batch " in shown and "\ntrain.gradient_checkpointing " in shown


def test_the_command_plans_for_a_folder_and_its_data(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(f"model:\n  id: {tiny_folder('qwen3')}\ndata:\n  heldout_rows: 4\n")
    answer = call("plan", config, "--data", HOUSE_STYLE / "train.jsonl", "--rows", "30", "--vram", "8")
    assert answer.code == 0, answer.err
    assert "Fits: " in answer.out
    assert "26 rows, in the model's own tokens" in answer.out
    answer = call("plan", config, "--data", HOUSE_STYLE / "train.jsonl", "--rows", "30000", "--vram", "8")
    said = " ".join(answer.out.split())
    assert "188 rows (30000 were asked for, and 192 are good), in the model's own tokens" in said


def test_the_command_on_this_machine() -> None:
    answer = call("plan", "smollm2-135m")
    assert answer.code == 0, answer.err
    assert "estimated from rates measured here" in answer.out
    assert "of free memory" in answer.out


@pytest.mark.parametrize("experts", ["num_experts", "num_local_experts"])
def test_a_mixture_of_experts_is_not_planned_for(experts: str, tmp_path: Path) -> None:
    """Its experts aren't in 4 bits, so that what would be planned is a small part of what it takes."""
    config = tmp_path / "mine.yaml"
    config.write_text(f"model:\n  id: {tmp_path}\n")
    (tmp_path / "config.json").write_text(json.dumps({**A_BILLION.to_dict(), experts: 0}))
    assert call("plan", config, "--vram", "8").code == 0
    (tmp_path / "config.json").write_text(json.dumps({**A_BILLION.to_dict(), experts: 8}))
    answer = call("plan", config, "--vram", "8")
    assert answer.code == 1
    assert answer.err.startswith(f"error: {tmp_path}/config.json: a mixture of experts")


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


def check_as_planned(share: float, work: Callable[..., Bytes], *args: Any) -> None:
    """Measured again if it seems to be less: where others want memory, the kernel takes back pages of the base's files
    meanwhile, and so hides as much of what the work took."""
    found = in_fresh_process(work, *args)
    if found.planned > (1 + share) * found.measured:
        found = in_fresh_process(work, *args)
    assert found.planned == pytest.approx(found.measured, rel=share)


needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is asked to")


@needs_glibc
@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_embedded_model_takes_what_was_planned(checkpointing: bool) -> None:
    case = Case(billion=False, lengths=(40, 100, 110), pairs=2, checkpointing=checkpointing, steps=2)
    check_as_planned(0.15, training, case, True)


@needs_glibc
@pytest.mark.slow
def test_a_model_of_a_billion_weights_takes_what_was_planned() -> None:
    case = Case(billion=True, lengths=(10, 40, 50), pairs=1, checkpointing=False, steps=2)
    check_as_planned(0.15, training, case, True)


@needs_glibc
@pytest.mark.slow
def test_generation_of_the_embedded_model_takes_what_was_planned() -> None:
    check_as_planned(0.2, generation, 64)


@pytest.mark.slow
def test_a_base_of_a_billion_weights_takes_what_was_planned(tmp_path: Path) -> None:
    """From a folder that tells its own shape."""
    save_random(A_BILLION, tmp_path / "model")
    config = load_config(None, {"model.id": str(tmp_path / "model")})
    model = SlotModel.load(find_base(config.model), config.model, config.lora, seed=0, device=torch.device("cpu"))
    plan = make_plan(config, replace(HERE, itemsize=model.dtype.itemsize), assumed_rows(10))
    assert plan.shape.parameters == 1_235_814_400  # meta-llama/Llama-3.2-1B's
    parts = dict(plan.phases[0].parts)
    loaded = ("4-bit weights and their constants", f"{8 * model.dtype.itemsize}-bit embeddings, head, norms")
    held = sum(tensor.nbytes for tensor in tensors_held(model))
    assert sum(parts[name] for name in loaded) == pytest.approx(held, rel=0.01)


def tensors_held(model: SlotModel) -> list[torch.Tensor]:
    """The base's tensors, each once: weights, and the constants of those in 4 bits."""
    slot = {id(parameter) for parameter in model.parameters.values()}
    found = [parameter for parameter in model.peft_model.parameters() if id(parameter) not in slot]
    states = [parameter.quant_state for parameter in found if hasattr(parameter, "quant_state")]
    found += [
        tensor for state in states for tensor in (state.absmax, state.code, state.state2.absmax, state.state2.code)
    ]
    return found + [constants.absmax for layers in model._layers for _, constants, _ in layers.packed]


def test_what_no_plan_is_made_for() -> None:
    answer = call("plan", "quickstart", "--vram", "12", "--rows", 10**12)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith("error: data.limit, --rows: 1000000000000 rows are more than a plan is made for")
    for gigabytes in (float("nan"), float("inf"), -1.0, 0.5):
        with pytest.raises(QspinError, match=r"^vram=.*: name the GiB of a card, at least 1$"):
            api.plan(load_config("quickstart"), vram=gigabytes)
