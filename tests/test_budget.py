"""How much is computed at once: found from the memory there is, and made smaller when that was too much."""

from __future__ import annotations

import datetime
import itertools
import json
import platform
import subprocess
import sys
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import ARCHITECTURES, SHAPE, Notes
from safetensors.torch import load_file

from qspin import budget, spin, training
from qspin.budget import rows_at_once, smaller, token_budget
from qspin.config import TrainConfig, load_config
from qspin.errors import QspinError
from qspin.files import read_json, read_jsonl
from qspin.fitting import at_once, memory
from qspin.fitting.at_once import A_PASS, Budget
from qspin.fitting.footprint import MOST_ROWS, MOST_TOKENS, SHARE, Batch, Footprint
from qspin.fitting.memory import OutOfMemory, peak, refusals_told
from qspin.layers.attention import Packed
from qspin.layers.lora import FusedLayers
from qspin.model import SlotModel
from qspin.packing import Plan, Row, lengths_of, pack_row, plan_batches
from qspin.phases import answering
from qspin.prepare import Prepared, prepare
from qspin.records import Pair

CPU = torch.device("cpu")
KEPT, RECOMPUTED, AUTO = (TrainConfig(gradient_checkpointing=value) for value in (False, True, "auto"))
MOST = 2048  # whatever a CPU's is, and half of it comes next: the rows below are cut for these
PAIRS = [Pair(str(n), 0, (1,) * 10, (2,) * (20 + n), (3,) * 30, ended=True) for n in range(200)]  # 60 to 259 tokens


def plan_for(tokens: int) -> Plan:
    return plan_batches([lengths_of(pair) for pair in PAIRS], batch_size=50, token_budget=tokens, seed=0)


def longest(plan: Plan) -> int:
    return max(sum(lengths_of(PAIRS[index]).total for index in part) for part in itertools.chain(*plan))


# --- the search, with a made-up need of memory


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """A device with so many free bytes, where a token takes 1,000, a quarter less for each layer that is recomputed,
    and more than `refused` tokens are out of memory."""

    def taken(recomputed: int, tokens: int) -> int:
        return tokens * (1000 - 250 * recomputed)

    def make(free: float, refused: float = float("inf")) -> list[int]:
        tried: list[int] = []

        def need(model: SlotModel, pairs: Sequence[Pair], _prefix: int) -> int:
            tried.append(sum(lengths_of(pair).total for pair in pairs))
            need = taken(model.footprint.recomputed, tried[-1])
            if need > 1000 * refused:
                raise OutOfMemory
            return need

        def activations(footprint: Footprint, batch: Batch) -> int:
            return taken(footprint.recomputed, batch.tokens)

        monkeypatch.setitem(MOST_TOKENS, "cpu", MOST)
        monkeypatch.setattr(at_once, "FINER", 0.5)
        monkeypatch.setattr(budget, "_need", need)
        monkeypatch.setattr(Footprint, "activations", activations)
        monkeypatch.setattr(Footprint, "gradients", lambda _self: 0)
        # beside the room for activations, that for the optimiser's state
        monkeypatch.setattr(Footprint, "optimizer", lambda _self, _name: 7e9)
        monkeypatch.setattr(budget, "free_bytes", lambda _device: (free + 7e9) / SHARE)
        return tried

    return make


def test_with_plenty_of_memory_one_small_try_is_enough(tiny_model: Any, machine: Callable[..., list[int]]) -> None:
    tried = machine(free=1e9)
    assert token_budget(tiny_model(), PAIRS, plan_for, 0, KEPT) == Budget(MOST, 0)
    assert len(tried) == 1
    assert tried[0] <= MOST // 8 + 3  # the longest pair has 259 tokens


@pytest.mark.parametrize(
    ("free_tokens", "found"), [(3000, MOST), (1700, MOST // 2), (1100, MOST // 2), (600, MOST // 4)]
)
def test_the_longest_micro_batch_fits(
    free_tokens: int, found: int, tiny_model: Any, machine: Callable[..., list[int]]
) -> None:
    tried = machine(free=1000 * free_tokens)
    assert token_budget(tiny_model(), PAIRS, plan_for, 0, KEPT) == Budget(found, 0)
    assert tried[-1] == longest(plan_for(found)) <= free_tokens


def test_a_prediction_that_is_far_off_is_set_right_by_the_small_try(
    tiny_model: Any, machine: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Footprint.activations
    tried = machine(free=1e9)
    monkeypatch.setattr(Footprint, "activations", lambda self, batch: 1e6 * right(self, batch))
    assert token_budget(tiny_model(), PAIRS, plan_for, 0, KEPT) == Budget(MOST, 0)
    assert len(tried) == 1


def test_a_refusal_halves_the_budget(tiny_model: Any, machine: Callable[..., list[int]]) -> None:
    # the small try promised more than there is
    tried = machine(free=1000 * 3000, refused=700)
    assert token_budget(tiny_model(), PAIRS, plan_for, 0, KEPT) == Budget(MOST // 4, 0)
    assert tried[1:] == [longest(plan_for(MOST)), longest(plan_for(MOST // 2)), longest(plan_for(MOST // 4))]


@pytest.mark.parametrize("refused", [100, 255])
def test_a_pair_that_never_fits_is_named(refused: int, tiny_model: Any, machine: Callable[..., list[int]]) -> None:
    machine(free=1000 * 600, refused=refused)
    with pytest.raises(QspinError, match=r"^\d+: its 2\d\d tokens alone are more than memory holds; set train\.grad"):
        token_budget(tiny_model(), PAIRS, plan_for, 0, KEPT)


@pytest.mark.parametrize("config", [RECOMPUTED, AUTO])
def test_a_pair_that_never_fits_is_told_to_recompute_only_where_that_is_left(
    config: TrainConfig, tiny_model: Any, machine: Callable[..., list[int]]
) -> None:
    machine(free=1000 * 600, refused=20)
    with pytest.raises(QspinError, match=r"^\d+: its 2\d\d tokens alone are more than memory holds; lower data\.max_c"):
        token_budget(tiny_model(), PAIRS, plan_for, 0, config)


@pytest.mark.parametrize(
    ("free_tokens", "found"),
    [(2500, Budget(MOST, 0)), (1600, Budget(MOST, 1)), (1100, Budget(MOST, 2)), (600, Budget(MOST, 3))],
)
def test_as_many_layers_are_recomputed_as_a_large_budget_wants(
    free_tokens: int,
    found: Budget,
    tiny_model: Any,
    machine: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(A_PASS, "cpu", 10**6)  # nothing is worth another micro-batch
    machine(free=1000 * free_tokens)
    model = tiny_model()
    assert token_budget(model, PAIRS, plan_for, 0, AUTO) == found
    assert model.footprint.recomputed == found.recomputed, "tried as it was found"


@pytest.mark.parametrize(
    ("free_tokens", "found"),
    [(1600, Budget(MOST // 2, 0)), (300, Budget(MOST // 8, 0)), (200, Budget(MOST // 8, 1)), (70, Budget(256, 3))],
)
def test_smaller_micro_batches_come_before_recomputing_where_they_cost_less(
    free_tokens: int, found: Budget, tiny_model: Any, machine: Callable[..., list[int]]
) -> None:
    machine(free=1000 * free_tokens)
    assert token_budget(tiny_model(), PAIRS, plan_for, 0, AUTO) == found


def test_the_first_try_of_auto_is_the_one_that_takes_least(tiny_model: Any, machine: Callable[..., list[int]]) -> None:
    tried = machine(free=1000 * 250, refused=70)  # a pair of 259 tokens takes as much as 65 when all is recomputed
    assert token_budget(tiny_model(), PAIRS, plan_for, 0, AUTO) == Budget(MOST // 8, 3)
    assert tried == [259] * 4  # all recomputed; none, as there should be room for; fewer and fewer kept


def test_what_is_kept_is_set_right_by_a_try_that_keeps_it(
    tiny_model: Any, machine: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there beside it is further off where all layers are recomputed: by three times here."""
    tried = machine(free=1000 * 1800)
    own = budget._need

    def more_for_a_moment(*args: Any) -> int:
        tokens = sum(lengths_of(pair).total for pair in args[1])
        return own(*args) + 500 * tokens

    monkeypatch.setattr(budget, "_need", more_for_a_moment)
    assert token_budget(tiny_model(), PAIRS, plan_for, 0, AUTO) == Budget(MOST // 2, 0)  # 1,500 a token, not 3,000
    assert len(tried) == 3


def test_what_is_refused_in_small_is_not_taken_in_large(tiny_model: Any, machine: Callable[..., list[int]]) -> None:
    tried = machine(free=1e9, refused=200)
    assert token_budget(tiny_model(), PAIRS, plan_for, 0, AUTO) == Budget(MOST // 8, 1)  # the only one of 200 or less
    assert tried[:2] == [259, 259]


def test_after_a_refusal_it_chooses_again_among_what_takes_less(
    tiny_model: Any, machine: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = machine(free=1000 * 3000, refused=700)
    assert token_budget(tiny_model(), PAIRS, plan_for, 0, AUTO) == Budget(MOST // 4, 0)
    assert tried[2:] == [longest(plan_for(tokens)) for tokens in (MOST, MOST // 2, MOST // 4)]
    monkeypatch.setitem(A_PASS, "cpu", 10**6)  # nothing is worth another micro-batch
    tried = machine(free=1000 * 3000, refused=700)
    assert token_budget(tiny_model(), PAIRS, plan_for, 0, AUTO) == Budget(MOST, 3)
    assert tried[2:] == [longest(plan_for(MOST))] * 4  # none, one, two, three layers recomputed
    tried = machine(free=1000 * 3000, refused=300)
    assert token_budget(tiny_model(), PAIRS, plan_for, 0, AUTO) == Budget(MOST // 2, 3)
    assert tried[-1] == longest(plan_for(MOST // 2))


def test_a_try_that_took_too_much_sets_predictions_right(
    tiny_model: Any, machine: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a fifth more than in small: of what was within a sixth of the room the next smaller one is taken."""
    tried = machine(free=1000 * 2000)
    own = budget._need

    def more_of_many(*args: Any) -> int:
        tokens = sum(lengths_of(pair).total for pair in args[1])
        return own(*args) * (6 if tokens > MOST // 2 else 5) // 5

    monkeypatch.setattr(budget, "_need", more_of_many)
    monkeypatch.setitem(A_PASS, "cpu", 10**6)
    assert token_budget(tiny_model(), PAIRS, plan_for, 0, AUTO) == Budget(MOST, 1)
    assert tried[2:] == [longest(plan_for(MOST))] * 2


def test_tries_that_take_a_little_too_much_soon_end(
    tiny_model: Any, machine: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A try may be a minute's work, and there are as many to choose from as layers."""
    monkeypatch.setitem(ARCHITECTURES, "deep", lambda: transformers.LlamaConfig(**SHAPE | {"num_hidden_layers": 24}))
    machine(free=1000 * 2000)
    tried: list[int] = []

    def a_little_too_much(model: SlotModel, pairs: Sequence[Pair], _prefix: int) -> float:
        tried.append(sum(lengths_of(pair).total for pair in pairs))
        fits = model.footprint.recomputed == 24 or tried[-1] <= MOST // 2
        return tried[-1] * (1000 - 40 * model.footprint.recomputed) if fits else 1000 * 2000 + 1

    monkeypatch.setattr(Footprint, "activations", lambda self, batch: batch.tokens * (1000 - 40 * self.recomputed))
    monkeypatch.setattr(budget, "_need", a_little_too_much)
    config = TrainConfig(tokens_per_micro_batch=MOST)
    assert token_budget(tiny_model("deep"), PAIRS, plan_for, 0, config) == Budget(MOST, 24)
    assert len(tried) < 10


@pytest.mark.parametrize("free", [0, -1000])
def test_what_is_refused_where_there_is_no_room_does_not_fit(
    free: float, tiny_model: Any, machine: Callable[..., list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The optimiser's state may be all that is free."""
    machine(free)
    own, tries = budget._need, itertools.count()

    def refused(*args: Any) -> int:
        if next(tries):
            raise OutOfMemory
        return own(*args)

    monkeypatch.setattr(budget, "_need", refused)
    with pytest.raises(QspinError, match=r"^\d+: its 2\d\d tokens alone are more than memory holds"):
        token_budget(tiny_model(), PAIRS, plan_for, 0, KEPT)


def test_what_is_set_is_not_looked_for(tiny_model: Any, machine: Callable[..., list[int]]) -> None:
    tried, model = machine(free=1000 * 300), tiny_model()

    def found(**settings: Any) -> Budget:
        return token_budget(model, PAIRS, plan_for, 0, TrainConfig(**settings))

    assert found(tokens_per_micro_batch=999, gradient_checkpointing=True) == Budget(999, 3)
    assert found(tokens_per_micro_batch=999, gradient_checkpointing=False) == Budget(999, 0)
    assert tried == []
    assert found(gradient_checkpointing=True) == Budget(MOST // 2, 3)
    assert found(tokens_per_micro_batch=512) == Budget(512, 2)
    assert found(tokens_per_micro_batch=MOST) == Budget(MOST, 3), "asked for, and the most that can be done for it"


def test_where_even_the_small_try_is_refused_it_is_halved_until_it_fits(
    tiny_model: Any, machine: Callable[..., list[int]]
) -> None:
    """On a small GPU hundreds of tokens may be too many side by side, and each pair fits."""
    short = [Pair(str(n), 0, (1,) * 10, (2,) * 20, (3,) * 30, ended=True) for n in range(64)]

    def plan(tokens: int) -> Plan:
        return plan_batches([lengths_of(pair) for pair in short], batch_size=32, token_budget=tokens, seed=0)

    tried = machine(free=1000 * 70, refused=100)
    assert token_budget(tiny_model(), short, plan, 0, KEPT) == Budget(MOST // 32, 0)
    assert tried == [240, 120, 60, 60]


def test_budgets_change_micro_batches_and_never_effective_batches() -> None:
    def effective(plan: Plan) -> list[list[int]]:
        return [sorted(itertools.chain(*batch)) for batch in plan]

    assert effective(plan_for(MOST)) == effective(plan_for(MOST // 8))
    assert plan_for(MOST) != plan_for(MOST // 8)


def test_smaller_cuts_the_longest_micro_batch_in_two() -> None:
    plan = plan_for(MOST)
    cut = plan_for(smaller(PAIRS, plan, 0, KEPT))
    assert longest(cut) <= longest(plan) // 2
    singles = [[[index] for index in range(len(PAIRS))]]
    with pytest.raises(QspinError, match=r"^199: its 259 tokens alone"):
        smaller(PAIRS, singles, 0, KEPT)


def test_smaller_cuts_where_one_pair_is_as_long_as_several() -> None:
    """Which may have been what was refused: of as many tokens more are predicted."""
    one = replace(PAIRS[0], prompt_ids=(1,) * 90)
    assert smaller([one, PAIRS[0], PAIRS[20]], [[[0], [1, 2]]], 0, KEPT) == 70


def test_what_all_prompts_begin_with_is_no_part_of_a_smaller_budget() -> None:
    """It stands once in a row, and budgets don't count it: half of a long one would let more pairs in than before."""
    pairs = [replace(pair, prompt_ids=(9,) * 2000 + pair.prompt_ids) for pair in PAIRS]
    lengths = [lengths_of(pair, 2000) for pair in pairs]
    plan = plan_batches(lengths, batch_size=50, token_budget=MOST, seed=0)
    cut = plan_batches(lengths, batch_size=50, token_budget=smaller(pairs, plan, 2000, KEPT), seed=0)
    assert longest(cut) <= longest(plan) // 2


def test_a_try_that_is_refused_leaves_no_gradients(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next try would find them there, and be taken for one that needs less."""
    model = tiny_model()
    own = budget.pair_logps

    def refused(*args: Any) -> Any:
        real, _ = own(*args)
        real.sum().backward()  # what a backward pass has come to when it is refused
        raise MemoryError

    monkeypatch.setattr(budget, "pair_logps", refused)
    with pytest.raises(OutOfMemory):
        budget._need(model, PAIRS[:2], 0)
    assert all(parameter.grad is None for parameter in model.parameters.values())


# --- real memory


def test_what_scoring_has_kept_does_not_hide_what_training_takes(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, work = tiny_model(), budget.pair_logps
    with torch.no_grad():
        work(model, pack_row(PAIRS[:2], CPU))
    kept = [weakref.ref(layers._low_rank[1]) for layers in model._layers]

    def watched(*args: Any) -> Any:
        assert [a() for a in kept] == [None] * len(kept)
        return work(*args)

    monkeypatch.setattr(budget, "pair_logps", watched)
    assert budget._need(model, PAIRS[:2], 0) > 0


def test_work_refused_in_any_product_leaves_nothing_to_the_next(
    tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if somebody holds the error, and lets it go in the midst of the next work."""
    model, product = tiny_model(), FusedLayers.product
    model.use_gradient_checkpointing(3)
    held: list[Exception] = []
    inputs: list[weakref.ref[torch.Tensor]] = []
    calls = itertools.count()
    refused = -1

    def watched(self: FusedLayers, x: torch.Tensor, *rest: Any) -> Any:
        inputs.append(weakref.ref(x))
        call = next(calls)
        if call == refused:
            held.append(torch.OutOfMemoryError("no"))
            raise held[0]
        if call == refused + 2:
            held.clear()
        return product(self, x, *rest)

    def work() -> torch.Tensor:
        for parameter in model.parameters.values():
            parameter.grad = None
        with refusals_told():
            real, generated = budget.pair_logps(model, pack_row(PAIRS[:4], CPU))
            (real - generated).sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters.values()])

    monkeypatch.setattr(FusedLayers, "product", watched)
    undisturbed = work()
    products = next(calls)
    assert products == 12 + 9, "all but each layer's last are computed again"
    for number in range(products):
        refused, calls = number, itertools.count()
        inputs.clear()
        with pytest.raises(OutOfMemory):
            work()
        assert not any(x() is not None for x in inputs)
        assert torch.equal(work(), undisturbed)
        assert not held


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
@pytest.mark.parametrize("recomputed", [0, 3])
@pytest.mark.parametrize("measured", [True, False])
def test_work_refused_between_layers_of_one_input_leaves_nothing_to_the_next(
    measured: bool, recomputed: int, norm: str, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen3's queries are normed before its keys are asked for, which are there by then."""
    model, rows = tiny_model("qwen3"), list[weakref.ref[Packed]]()
    model.use_gradient_checkpointing(recomputed)

    def packed(*args: Any) -> Row:
        if measured:  # while the memory that is taken is watched
            assert not any(row() is not None for row in rows)
        row = pack_row(*args)
        rows.append(weakref.ref(row.layout))  # attention's graph has it
        return row

    def work() -> None:
        if measured:
            budget._need(model, PAIRS[:2], 0)
        else:
            with refusals_told():
                budget.pair_logps(model, packed(PAIRS[:2], CPU))[0].sum().backward()

    def refused(_x: torch.Tensor) -> torch.Tensor:
        assert [row() is not None for row in rows] == [False] * (len(rows) - 1) + [True]
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(budget, "pack_row", packed)
    layers = model._decoder.layers
    monkeypatch.setattr(getattr(layers[-1].self_attn, norm), "forward", refused)
    for _ in range(2):
        with pytest.raises(OutOfMemory):
            work()
    monkeypatch.setattr(layers[0].input_layernorm, "forward", refused)
    with pytest.raises(OutOfMemory):
        work()
    assert not any(row() is not None for row in rows)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere freed memory is the allocator's business")
def test_what_was_freed_before_does_not_hide_what_work_takes() -> None:
    """In a process of its own, as the allocator's settings are for good."""
    script = (
        "import torch\n"
        "from qspin.fitting.memory import give_back_freed_memory, keep_freed_memory, peak\n"
        "keep_freed_memory()\n"
        "def work():\n"
        "    parts = [torch.ones(1 << 20) for _ in range(60)]\n"  # 4 MiB each
        "    return len(parts)\n"
        "work()\n"
        "with peak(torch.device('cpu')) as hidden: work()\n"
        "give_back_freed_memory()\n"
        "with peak(torch.device('cpu')) as shown: work()\n"
        "print(hidden.above >> 20, shown.above >> 20)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    hidden, shown = map(int, done.stdout.split())
    assert hidden < 120, "else there is nothing to mend"
    assert shown > 200


def test_peak_sees_what_a_block_takes_and_gives_back() -> None:
    size = 1 << 30  # what is this large never comes from blocks that malloc kept
    with peak(CPU) as measured:
        block = torch.ones(size, dtype=torch.uint8)
        del block
    assert 0.95 * size < measured.above < 1.05 * size


def test_a_refused_tensor_is_out_of_memory_and_nothing_else_is() -> None:
    with pytest.raises(OutOfMemory), refusals_told():
        torch.empty(1 << 60, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"), refusals_told():
        torch.ones(2, 3) @ torch.ones(2, 3)


def test_rows_at_once_by_what_a_row_takes(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    assert rows_at_once(model, 100) == MOST_ROWS["cpu"]
    room = model.unpacked_bytes + model.footprint.prefill(100) + 5.5 * model.footprint.row(100)
    monkeypatch.setattr(budget, "free_bytes", lambda _device: room / SHARE)
    assert rows_at_once(model, 100) == 5
    monkeypatch.setattr(budget, "free_bytes", lambda _device: 0)
    assert rows_at_once(model, 100) == 1


@pytest.fixture
def prepared(tiny_folder: Callable[[str], Path], tmp_path: Path) -> Prepared:
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"What is {n}?", "completion": " ".join(f"{n * k}" for k in range(60))} for n in range(20)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model.id": str(tiny_folder("llama")),
        "model.dtype": "float32",
        "data.source": str(data),
        "data.heldout_rows": 4,
        "generation.max_new_tokens": 200,
        "generation.width": 8,
        "train.batch_size": 8,
        "train.tokens_per_micro_batch": 100_000,
        "train.lr": 0.001,
        "train.snapshot_minutes": 60,
        "iterations": 1,
    }
    return prepare(load_config(None, settings), datetime.date(2026, 1, 1))


@pytest.mark.parametrize("steps_before", [0, 1])
def test_out_of_memory_halves_the_micro_batches_and_goes_on_to_the_same_adapter(
    steps_before: int, prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spin.run(prepared, tmp_path / "enough", Notes())
    real, seen = training.pair_logps, []

    def pair_logps(model: SlotModel, row: Row) -> Any:
        """Refused by the allocator when there are more than half of the tokens, once so many steps are made."""
        seen.append(len(row.input_ids))
        if len(seen) > steps_before and seen[-1] > 0.6 * seen[0]:
            torch.empty(1 << 60, dtype=torch.uint8)
        return real(model, row)

    monkeypatch.setattr(training, "pair_logps", pair_logps)
    progress = Notes()
    spin.run(prepared, tmp_path / "little", progress)
    assert len(progress.notes) == 2
    assert progress.notes[0] == "memory does not hold what some layers keep; on with all of them recomputed"
    assert progress.notes[1].startswith("memory does not hold so many tokens; on with ")

    little, enough = (tmp_path / name / "iteration-0" for name in ("little", "enough"))
    plans = [read_json(folder / "training.json")["batches"] for folder in (little, enough)]
    assert [sorted(itertools.chain(*batch)) for batch in plans[0]] == [
        sorted(itertools.chain(*batch)) for batch in plans[1]
    ]
    assert all(len(batch) == 1 for batch in plans[1])
    assert all(len(batch) >= 2 for batch in plans[0])
    for ours, theirs in zip(read_jsonl(little / "metrics.jsonl"), read_jsonl(enough / "metrics.jsonl"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (little, enough))
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-2, atol=1e-4)


def test_generation_goes_on_narrower_when_memory_runs_out(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spin.run(prepared, tmp_path / "enough", Notes())
    real = answering.generate
    widths = []

    def generate(*args: Any, width: int, **rest: Any) -> Any:
        widths.append(width)
        if width > 2:
            raise torch.OutOfMemoryError
        return real(*args, width=width, **rest)

    monkeypatch.setattr(answering, "generate", generate)
    progress = Notes()
    spin.run(prepared, tmp_path / "little", progress)
    assert widths == [8, 4, 2]
    assert progress.notes == [
        f"memory does not hold so many completions; on with {width} side by side" for width in (4, 2)
    ]
    enough, little = (tmp_path / name / "iteration-0" for name in ("enough", "little"))
    assert read_json(little / "generation.json")["width"] == 2
    assert read_jsonl(little / "generated/shard-00000.jsonl") == read_jsonl(enough / "generated/shard-00000.jsonl")


def test_free_bytes_is_what_the_system_says() -> None:
    assert 0 < memory.free_bytes(CPU) < 1 << 50


def test_what_is_used_is_this_process_and_the_total_is_the_machine() -> None:
    before, total = memory.used_and_total(CPU)
    held = torch.ones(1 << 28, dtype=torch.uint8)
    after, _ = memory.used_and_total(CPU)
    assert 0 < before < after < total
    assert after - before == pytest.approx(held.numel(), rel=0.2)
    assert memory.free_bytes(CPU) < total
