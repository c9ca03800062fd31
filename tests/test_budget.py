"""How much is computed at once: found from the memory there is, and made smaller when that was too much."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, SHAPE

from qspin import budget
from qspin.budget import rows_at_once, smaller, token_budget
from qspin.config import TrainConfig
from qspin.errors import QspinError
from qspin.fitting import at_once
from qspin.fitting.at_once import Budget
from qspin.fitting.footprint import MOST_ROWS, MOST_TOKENS, SHARE, Batch, Footprint
from qspin.fitting.memory import OutOfMemory
from qspin.fitting.work import A_PASS
from qspin.model import SlotModel
from qspin.packing import Plan, lengths_of, pack_row, plan_batches
from qspin.records import Pair

CPU = torch.device("cpu")
KEPT, RECOMPUTED, AUTO = (TrainConfig(gradient_checkpointing=value) for value in (False, True, "auto"))
MOST = 2048  # whatever a CPU's is, and half of it comes next: the rows below are cut for these
PAIRS = [Pair(str(n), 0, (1,) * 10, (2,) * (20 + n), (3,) * 30, ended=True) for n in range(200)]  # 60 to 259 tokens


def plan_for(tokens: int) -> Plan:
    return plan_batches([lengths_of(pair) for pair in PAIRS], batch_size=50, token_budget=tokens, seed=0)


def longest(plan: Plan) -> int:
    return max(sum(lengths_of(PAIRS[index]).total for index in part) for part in itertools.chain(*plan))


# --- the search, with a made-up need of memory ---


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
    monkeypatch.setitem(FAMILIES, "deep", lambda: transformers.LlamaConfig(**SHAPE | {"num_hidden_layers": 24}))
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


# --- a try ---


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


# --- smaller ---


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


# --- rows of generation ---


def test_rows_at_once_by_what_a_row_takes(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    assert rows_at_once(model, 100) == MOST_ROWS["cpu"]
    room = model.unpacked_bytes + model.footprint.prefill(100) + 5.5 * model.footprint.row(100)
    monkeypatch.setattr(budget, "free_bytes", lambda _device: room / SHARE)
    assert rows_at_once(model, 100) == 5
    monkeypatch.setattr(budget, "free_bytes", lambda _device: 0)
    assert rows_at_once(model, 100) == 1
