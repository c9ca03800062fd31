"""How far, how fast, how long: hand-computed, with a clock that the test sets."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import Clock

from qspin.config import load_config
from qspin.files import write_json
from qspin.run_dir import IterationDir, RunDir
from qspin.watch.meter import MOMENTS, Meter, Status, Work, aged, measured, to_do, workload

MEMORY = (3 << 30, 24 << 30)
ROWS, HELDOUT = 100, 20


def work(run: RunDir | None = None, **settings: object) -> list[Work]:
    config = load_config(None, {"iterations": 2, "train.epochs": 2, "train.mix_previous": 1, **settings})
    return workload(run or RunDir(Path("none")), config, ROWS, HELDOUT)


@pytest.fixture
def meter(clock: Clock) -> Meter:
    return Meter(work(), {}, 2, lambda: MEMORY, clock)


def begin(meter: Meter, name: str, iteration: int | None, total: int, done: int = 0) -> None:
    meter.phase(name, iteration=iteration, total=total, done=done, unit="rows")


def status(meter: Meter) -> Status:
    found = meter.status()
    assert found is not None
    return found


def play(meter: Meter, clock: Clock, name: str, iteration: int | None, total: int, pace: float) -> None:
    """A whole phase, at so many seconds a unit."""
    begin(meter, name, iteration, total)
    for _ in range(total):
        clock.now += pace
        meter.advance(1)


def test_the_work_of_a_run_is_that_of_its_phases() -> None:
    assert [(item.folder.path.name, item.phase, item.iteration, item.units) for item in work()] == [
        ("base", "evaluate", None, 60),
        ("iteration-0", "generate", 0, 100),
        ("iteration-0", "score", 0, 100),
        ("iteration-0", "train", 0, 200),
        ("iteration-0", "evaluate", 0, 80),
        ("iteration-1", "generate", 1, 100),
        ("iteration-1", "score", 1, 200),
        ("iteration-1", "train", 1, 400),
        ("iteration-1", "evaluate", 1, 80),
    ]


def test_pairs_grow_as_long_as_earlier_ones_are_mixed_in() -> None:
    pairs = [item.units for item in work(iterations=4, **{"train.mix_previous": 2}) if item.phase == "score"]
    assert pairs == [100, 200, 300, 300]
    assert [item.units for item in work(iterations=3, **{"train.mix_previous": 0}) if item.phase == "score"] == [
        100
    ] * 3


def test_a_warm_start_is_work_too() -> None:
    phases = [(item.folder.path.name, item.phase, item.units) for item in work(**{"sft.epochs": 3})]
    assert phases[:4] == [
        ("base", "evaluate", 60),
        ("warm-start", "warm start", 300),
        ("warm-start", "evaluate", 80),
        ("iteration-0", "generate", 100),
    ]


def test_nothing_is_known_before_something_was_measured(meter: Meter, clock: Clock) -> None:
    assert meter.status() is None
    begin(meter, "evaluate", None, 40)
    clock.now += 5
    found = status(meter)
    assert (found.rate, found.phase_seconds_left, found.run_seconds_left) == (None, None, None)
    assert (found.done, found.total, found.phase_seconds) == (0, 40, 5)
    assert (found.memory_used, found.memory_total) == MEMORY
    meter.advance(10)
    found = status(meter)
    assert found.rate == 2
    assert found.phase_seconds_left == 15
    assert found.run_seconds_left is None, "generation, scoring and training are still to be measured"


def test_the_run_is_known_once_every_kind_of_phase_was_seen(meter: Meter, clock: Clock) -> None:
    play(meter, clock, "evaluate", None, 60, pace=0.5)
    play(meter, clock, "generate", 0, 100, pace=1)
    play(meter, clock, "score", 0, 100, pace=2)
    begin(meter, "train", 0, 200)
    assert status(meter).run_seconds_left is None
    clock.now += 12
    meter.advance(4)  # 3 s a pair
    left = 196 * 3
    to_come = 80 * 0.5 + 100 * 1 + 200 * 2 + 400 * 3 + 80 * 0.5
    assert status(meter).phase_seconds_left == pytest.approx(left)
    assert status(meter).run_seconds_left == pytest.approx(left + to_come)
    clock.now += 7  # and it gets less between two steps
    assert status(meter).phase_seconds_left == pytest.approx(left - 7)
    assert status(meter).run_seconds_left == pytest.approx(left - 7 + to_come)
    clock.now += 10_000
    assert status(meter).phase_seconds_left == 0


def test_the_last_phase_of_a_run_leaves_nothing(meter: Meter, clock: Clock) -> None:
    play(meter, clock, "evaluate", 1, 40, pace=1)
    found = status(meter)
    assert (found.phase_seconds_left, found.run_seconds_left) == (0, 0)
    assert found.complete


def test_a_phase_is_judged_by_the_last_of_its_kind_until_it_has_a_rate(meter: Meter, clock: Clock) -> None:
    play(meter, clock, "evaluate", None, 40, pace=0.5)
    begin(meter, "evaluate", 0, 40)
    assert status(meter).rate is None
    assert status(meter).phase_seconds_left == 20
    clock.now += 10
    meter.advance(5)
    assert status(meter).phase_seconds_left == 70


def test_units_of_an_earlier_process_are_not_counted_as_fast_ones(meter: Meter, clock: Clock) -> None:
    begin(meter, "train", 0, 200, done=150)
    clock.now += 10
    meter.advance(5)
    assert status(meter).done == 155
    assert status(meter).rate == 0.5
    for _ in range(9):
        clock.now += 10
        meter.advance(5)
    begin(meter, "train", 1, 400)
    assert status(meter).phase_seconds_left == 800, "2 s a pair"


def test_the_rate_is_that_of_lately(meter: Meter, clock: Clock) -> None:
    begin(meter, "generate", 0, 100_000)
    for seconds, units in [(100, 1000), (2 * MOMENTS, 20)]:
        for _ in range(seconds):
            clock.now += 1
            meter.advance(units / 10)
    assert status(meter).rate == pytest.approx(2)


def test_parts_of_a_unit_add_up_to_a_whole_one(meter: Meter, clock: Clock) -> None:
    begin(meter, "generate", 0, 100)
    for _ in range(4800):
        clock.now += 0.1
        assert not meter.complete
        meter.advance(1 / 48)
    assert meter.complete
    assert status(meter).done == 100


def test_a_phase_that_is_made_again_is_still_to_come(clock: Clock) -> None:
    """Memory ran out in training: scoring starts over, and training comes after it once more."""
    meter = Meter(work(), {"generate": 1, "score": 1, "train": 1, "evaluate": 1}, 2, lambda: MEMORY, clock)
    begin(meter, "train", 1, 400)
    assert status(meter).run_seconds_left == 480
    begin(meter, "score", 1, 200)
    assert status(meter).run_seconds_left == 680
    assert meter.ended is not None
    assert not meter.ended.complete


def test_two_phases_of_one_name_are_told_apart_by_their_order(clock: Clock) -> None:
    """The base is evaluated, and again after its warm start."""
    paces = {"evaluate": 1, "warm start": 2, "generate": 0, "score": 0, "train": 0}
    meter = Meter(work(iterations=1, **{"sft.epochs": 1}), paces, 1, lambda: MEMORY, clock)
    left = []
    for name, total in (("evaluate", 60), ("warm start", 100), ("evaluate", 80), ("generate", 100)):
        begin(meter, name, 0 if name == "generate" else None, total)
        left.append(status(meter).run_seconds_left)
    assert left == [60 + 200 + 80 + 80, 200 + 80 + 80, 80 + 80, 80]


def test_a_broken_off_phase_teaches_no_pace(meter: Meter, clock: Clock) -> None:
    begin(meter, "train", 0, 200)
    clock.now += 100
    meter.advance(8)
    begin(meter, "score", 0, 100)
    begin(meter, "train", 0, 200)
    assert status(meter).phase_seconds_left is None


def test_phases_that_nobody_planned_are_shown_all_the_same(meter: Meter, clock: Clock) -> None:
    begin(meter, "calibrate", None, 10)
    clock.now += 1
    meter.advance(1)
    assert status(meter).phase == "calibrate"
    assert status(meter).phase_seconds_left == 9
    assert status(meter).run_seconds_left is None


def test_the_last_figures_and_the_last_sample_are_kept(meter: Meter) -> None:
    begin(meter, "generate", 0, 100)
    meter.advance(1, **{"tokens/s": 12.0})
    meter.sampled("What is 2?", "It is 2.")
    meter.advance(1)
    assert status(meter).figures == {"tokens/s": 12.0}
    begin(meter, "score", 0, 100)
    found = status(meter)
    assert found.figures == {}
    assert (found.prompt, found.completion) == ("What is 2?", "It is 2.")
    meter.advance(0, nll=3.0)
    assert (status(meter).done, status(meter).figures) == (0, {"nll": 3.0})


# --- what earlier processes measured ---


def spend(folder: IterationDir, *, evaluated: bool, **seconds: float) -> None:
    write_json(folder.path / "seconds.json", seconds)
    if evaluated:
        write_json(folder.evaluation, {})


def test_paces_come_from_the_seconds_of_finished_phases(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert measured(work(run)) == {}
    spend(run.base, evaluated=True, evaluate=30)
    spend(run.iteration(0), evaluated=True, generate=100, score=50, train=400, evaluate=160)
    assert measured(work(run)) == {"evaluate": 2, "generate": 1, "score": 0.5, "train": 2}


def test_the_pace_of_a_warm_start_is_that_of_its_training(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    spend(run.warm_start, evaluated=True, train=50, evaluate=40)
    assert measured(work(run, **{"sft.epochs": 1})) == {"warm start": 0.5, "evaluate": 0.5}


def test_the_last_time_counts_and_half_a_phase_does_not(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    spend(run.base, evaluated=True, evaluate=30)
    spend(run.iteration(0), evaluated=True, generate=100, score=50, train=400, evaluate=160)
    spend(run.iteration(1), evaluated=False, generate=300, score=20)
    assert measured(work(run)) == {"evaluate": 2, "generate": 3, "score": 0.5, "train": 2}


def test_a_run_that_goes_on_knows_its_time_at_once(tmp_path: Path, clock: Clock) -> None:
    run = RunDir(tmp_path)
    spend(run.base, evaluated=True, evaluate=30)
    spend(run.iteration(0), evaluated=True, generate=100, score=50, train=400, evaluate=160)
    meter = Meter(to_do(work(run)), measured(work(run)), 2, lambda: MEMORY, clock)
    begin(meter, "generate", 1, 100)
    assert status(meter).run_seconds_left == 100 * 1 + 200 * 0.5 + 400 * 2 + 80 * 2


def test_a_run_that_goes_on_after_its_warm_start_has_not_that_to_do(tmp_path: Path, clock: Clock) -> None:
    run, sft = RunDir(tmp_path), {"sft.epochs": 1}
    spend(run.base, evaluated=True, evaluate=30)
    spend(run.warm_start, evaluated=False, train=300)
    meter = Meter(
        to_do(work(run, iterations=1, **sft)),
        {"evaluate": 1, "generate": 0, "score": 0, "train": 0},
        1,
        lambda: MEMORY,
        clock,
    )
    begin(meter, "evaluate", None, 80)
    assert status(meter).run_seconds_left == 80 + 80


def test_a_status_ages(meter: Meter, clock: Clock) -> None:
    play(meter, clock, "evaluate", 0, 40, pace=1)
    begin(meter, "evaluate", 1, 40)
    assert aged(status(meter), 15).phase_seconds_left == 25
    assert aged(status(meter), 15).run_seconds_left == 25
    assert aged(status(meter), 90).run_seconds_left == 0
    begin(meter, "train", 1, 400)
    assert aged(status(meter), 90).phase_seconds_left is None
