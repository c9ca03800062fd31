"""Plans: what fits sums to less than the card has, what settings and rows do to it, and what doesn't is mended."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import HOUSE_STYLE

from qspin.config import load_config
from qspin.config_files import preset_names
from qspin.errors import QspinError
from qspin.fitting import footprint
from qspin.fitting.footprint import Footprint
from qspin.machine import card
from qspin.planning.plan import LINK, Plan, fits, make_plan
from qspin.planning.plan_change import nearest_change, with_settings
from qspin.planning.plan_rows import Rows, assumed_rows, rows_of_data
from qspin.planning.plan_view import _verdict
from qspin.units import GIB

CARDS = (8, 12, 16, 24)


def planned(name: str, gigabytes: float, **settings: Any) -> Plan:
    config = with_settings(load_config(name), {key.replace("__", "."): value for key, value in settings.items()})
    return make_plan(config, card(gigabytes, config.model), assumed_rows(1000))


# --- every preset on every card ---


@pytest.mark.parametrize("name", preset_names())
def test_a_preset_has_a_plan_for_every_card(name: str) -> None:
    for gigabytes in CARDS:
        plan = planned(name, gigabytes)
        change = None if plan.fits else nearest_change(plan)
        for fitting in (plan, change.plan if change else plan):
            if fitting.fits:
                assert all(sum(size for _, size in phase.parts) <= gigabytes * GIB for phase in fitting.phases)
                assert fitting.tokens >= 16
                assert fitting.width >= 1
        assert plan.fits or change is not None


def test_a_plan_and_what_to_change_for_it_take_no_time() -> None:
    """Less than a second; the least of three, since a busy machine only adds to it."""
    seconds = []
    for _ in range(3):
        started = time.process_time()
        plan = planned("mistral-nemo-instruct", 8)
        assert not plan.fits
        assert nearest_change(plan) is not None
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1.0


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


# --- what the settings do ---


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
    [
        ("qwen3-8b", 8, 151_936 * 4096 * 2),
        ("qwen3-8b", 24, 0),
        ("qwen3-8b", 6, 0),
        ("gemma-2-9b-it", 8, 256_000 * 3584 * 2),
        ("gemma-2-9b-it", 12, 0),
        ("gemma-2-9b-it", 6, 0),
    ],
)
def test_a_small_card_is_spared_the_embedding_table(name: str, gigabytes: int, aside: int) -> None:
    """But not one that could not load the model. Of one that is the head too, only where there is no room for it."""
    plan = planned(name, gigabytes)
    loaded = {part: size for part, size in plan.phases[0].parts if part.startswith("16-bit")}
    there = "" if aside and plan.shape.tied_embeddings else "head, " if aside else "embeddings, head, "
    whole = Footprint(plan.shape, 16, None, "cuda", 2, recomputed=0).unquantised()
    assert loaded == {f"16-bit {there}norms": whole - aside}


def test_a_head_in_main_memory_takes_time() -> None:
    """At each step of decoding, and for each micro-batch."""
    settings = {"generation.width": 4, "train.tokens_per_micro_batch": 2304, "train.gradient_checkpointing": True}
    config = load_config("gemma-2-9b-it", settings)
    small = card(8, config.model)
    plan = make_plan(config, small, assumed_rows(100))
    more = make_plan(config, replace(small, memory=small.memory + 4 * GIB), assumed_rows(100))
    assert [name.startswith("16-bit embeddings") for name, _ in (plan.phases[0].parts[1], more.phases[0].parts[1])] == [
        False,
        True,
    ]
    first, other = ({time.phase: time.first for time in one.times} for one in (plan, more))
    a_copy = 256_000 * 3584 * 2 / LINK
    assert first["generate"] - other["generate"] == pytest.approx(100 // 4 * 256 * a_copy)
    copies = 6 * 6 + 2  # pairs of 640 tokens, three at once: six times in six batches of 16, twice in one of 4
    assert first["score"] - other["score"] == pytest.approx(copies * a_copy)
    assert first["train"] - other["train"] == pytest.approx(config.train.epochs * copies * a_copy)


@pytest.mark.parametrize("rank", [8, 16])
def test_no_card_is_too_large(rank: int) -> None:
    """What goes to main memory on one may stay on a larger one, where it must not be in the way."""
    config = load_config("gemma-2-9b-it", {"lora.rank": rank})
    cards = [replace(card(8, config.model), memory=int(0.97 * quarters / 4 * GIB)) for quarters in range(32, 52)]
    fit = [fits(config, one, assumed_rows(1000)) for one in cards]
    assert fit == sorted(fit)
    assert fit[0]


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


# --- what doesn't fit ---


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
        make_plan(none, card(8, none.model), rows)


# --- data ---


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
    assert len(guessed.lengths) == 16  # the held-out ones are not trained on, whoever counts
    assert "16 rows, a token taken for 4 characters" in guessed.source
    texts = (HOUSE_STYLE / "train.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    by_characters = [
        tuple(-(-len(row[key]) // 4) + 5 for key in ("prompt", "completion")) for row in map(json.loads, texts)
    ]
    assert set(guessed.lengths) <= set(by_characters)
    apart = with_settings(elsewhere, {"data.heldout_source": str(HOUSE_STYLE / "heldout.jsonl")})
    assert rows_of_data(apart).lengths == tuple(by_characters)
