"""What a run would take: memory by phase, the settings that fit, time and disk.

    plan = make_plan(config, card(12, config.model), assumed_rows(1000))

footprint.py has the formulas; here they are added up as `budget.py` and `spin.py` go about it: the model is loaded,
SHARE of what it leaves is filled with tokens and rows, as many as fit. Free of torch where the machine and the rows'
lengths are given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from qspin.config import Architecture, RunConfig
from qspin.errors import QspinError
from qspin.fitting.at_once import Budget, budgets, choose, spread
from qspin.fitting.footprint import EVALUATED_ROWS, SHARE, Batch, Footprint
from qspin.fitting.shape import has_experts, read_shape
from qspin.fitting.work import LAUNCH, forward_work, step_bytes, step_work, work_with_launches
from qspin.machine import Machine
from qspin.planning.plan_rows import Rows
from qspin.safe_text import at_home

# Shares of a machine's rates that passes over whole rows and decoding steps reach. The CPU's are those of
# docs/fitting.md, the GPU's are assumed for cards of 8 to 24 GB; on an H200 16 rows reached 15% and 212 rows 74% in
# decoding (benchmarks/results/gpu-cuda.json).
PASSES = {"cpu": 0.55, "cuda": 0.4}
DECODING = {"cpu": 0.4, "cuda": 0.25}
LINK = 12e9  # bytes a second from main memory: eight lanes of PCIe 4.0, as an RTX 4060 has; assumed, as those are
PAIR_BYTES = 6.5  # a token in a file of pairs
SAMPLE = 256  # rows by which micro-batches are chosen


@dataclass(frozen=True, slots=True)
class Phase:
    """The memory that one phase takes at most, piece by piece, in bytes."""

    name: str
    parts: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        return sum(size for _, size in self.parts)


@dataclass(frozen=True, slots=True)
class Seconds:
    """The time of one phase: in the first iteration, in the last, and over the run."""

    phase: str
    first: float
    last: float
    run: float


@dataclass(frozen=True, slots=True)
class Plan:
    """What a configuration would take on a machine."""

    config: RunConfig
    machine: Machine
    rows: Rows
    shape: Architecture
    tokens: int  # a micro-batch
    recomputed: int  # layers
    longest: int  # tokens of the longest pair, which may be more
    width: int
    phases: tuple[Phase, ...]
    times: tuple[Seconds, ...]
    disk: tuple[tuple[str, int], ...]

    @property
    def fits(self) -> bool:
        return self.largest.total <= self.machine.memory

    @property
    def largest(self) -> Phase:
        return max(self.phases, key=lambda phase: phase.total)

    @property
    def seconds(self) -> float:
        return sum(time.run for time in self.times)


def make_plan(config: RunConfig, machine: Machine, rows: Rows) -> Plan:
    """Add up a run's memory, time and disk, with the largest micro-batch and width that fit.

    Raises:
        QspinError: the model's shape is not known, or the settings leave no rows.
    """
    load = _Load(config, machine, rows.under(config.data))
    return Plan(
        config=config,
        machine=machine,
        rows=load.rows,
        shape=load.footprint.shape,
        tokens=load.budget.tokens,
        recomputed=load.budget.recomputed,
        longest=load.rows.prefix + sum(load.longest_groups[0]),
        width=load.width,
        phases=load.phases,
        times=tuple(load.times()),
        disk=tuple(load.disk()),
    )


def fits(config: RunConfig, machine: Machine, rows: Rows) -> bool:
    """Whether the plan would fit; it does not where the settings leave no rows."""
    rows = rows.under(config.data)
    return bool(rows.lengths) and _Load(config, machine, rows).fits


def shape_of(config: RunConfig) -> Architecture:
    """The model's shape, from the configuration or from a local folder's config.json.

    Raises:
        QspinError: neither is there, or the folder's model has experts.
    """
    if config.model.architecture is not None:
        return config.model.architecture
    file = at_home(config.model.id) / "config.json"
    if not config.model.id or not file.is_file():
        raise QspinError(
            f"model.architecture is not set, and model.id ({config.model.id!r}) is no local folder with a config.json: "
            "name a preset or such a folder, or set model.architecture.layers, .hidden and so on"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QspinError(f"{file}: damaged or unreadable ({error})") from None
    if has_experts(settings):
        raise QspinError(
            f"{file}: a mixture of experts, which can't be planned for: its experts stay in 16 bits, two bytes a "
            "weight. Where that fits, qspin run plays it"
        )
    return read_shape(settings, str(file))


def _some(groups: Sequence[tuple[int, int, int]]) -> Sequence[tuple[int, int, int]]:
    """Of many rows as many as stand for all."""
    return groups[:: max(1, len(groups) // SAMPLE)]


class _Load:
    """One configuration on one machine."""

    def __init__(self, config: RunConfig, machine: Machine, rows: Rows) -> None:
        if not rows.lengths:
            raise QspinError(
                f"no row has at most {config.data.max_prompt_tokens} tokens of prompt and "
                f"{config.data.max_completion_tokens} of completion: data.max_prompt_tokens, data.max_completion_tokens"
            )
        self.config = config
        self.machine = machine
        self.rows = rows
        targets = config.lora.targets
        self.footprint = Footprint(
            shape=shape_of(config),
            rank=config.lora.rank,
            targets=None if isinstance(targets, str) else frozenset(targets),
            device=machine.device,
            itemsize=machine.itemsize,
            recomputed=0,
            flash=machine.flash,
        )
        quantised, unquantised = self.footprint.quantised(config.model.double_quant), self.footprint.unquantised()
        left = machine.memory - quantised - unquantised - self.footprint.adapter() - machine.libraries
        aside = self.footprint.set_aside(left)
        self.footprint = replace(self.footprint, head_aside=aside > 0 and self.footprint.shape.tied_embeddings)
        there = "" if self.footprint.head_aside else "head, " if aside else "embeddings, head, "
        self.loaded = (
            ("4-bit weights and their constants", quantised),
            (f"{8 * machine.itemsize}-bit {there}norms", unquantised - aside),
            ("adapter", self.footprint.adapter()),
            ("CUDA context" if machine.device == "cuda" else "Python and libraries", machine.libraries),
        )
        self.free = max(0, left + aside)
        self.groups = [(prompt - rows.prefix, real, self.new_tokens) for prompt, real in rows.lengths]
        self.longest_groups = self._longest_groups()
        self.budget = self._budget()
        self.footprint = replace(self.footprint, recomputed=self.budget.recomputed)
        self.width = self._width()
        self.phases = self._phases(self._fullest(self.budget.tokens))

    @property
    def fits(self) -> bool:
        return max(phase.total for phase in self.phases) <= self.machine.memory

    @property
    def new_tokens(self) -> int:
        """Of a generated completion: planned as if all ran to the cap."""
        return self.config.generation.max_new_tokens

    def _longest_groups(self) -> list[tuple[int, int, int]]:
        """An effective batch of the longest pairs."""
        data, size = self.config.data, self.config.train.batch_size
        if self.rows.assumed:
            return [(data.max_prompt_tokens, data.max_completion_tokens, self.new_tokens)] * size
        return sorted(self.groups, key=sum, reverse=True)[:size]

    def _fullest(self, tokens: int) -> Batch:
        """The fullest micro-batch of a budget, of the longest pairs or of others, which may fill it better."""
        batches = self._micro_batches([*self.longest_groups, *_some(self.groups)], tokens)
        return max(batches, key=lambda batch: batch.tokens)

    def _micro_batches(self, groups: Sequence[tuple[int, int, int]], tokens: int) -> list[Batch]:
        """As `packing.plan_batches` cuts them."""
        size = self.config.train.batch_size
        batches = [groups[start : start + size] for start in range(0, len(groups), size)]
        return [Batch.of(members, self.rows.prefix) for batch in batches for members in spread(batch, sum, tokens)]

    def _budget(self) -> Budget:
        """As `budget.token_budget` finds it."""
        config = self.config.train
        room = SHARE * self.free - self.footprint.optimizer(config.optimizer) - self.footprint.gradients()
        return choose(
            self.footprint,
            config,
            budgets(config, self.machine.device, sum(self.longest_groups[0])),
            self._fullest,
            lambda tokens: self._micro_batches(_some(self.groups), tokens),
            lambda footprint, batch: footprint.activations(batch) + footprint.holes(batch),
            room,
            self.launch,
        )

    @property
    def launch(self) -> float:
        """What a GPU could do while a layer's pass is launched, in floating-point operations."""
        return LAUNCH * self.machine.flops if self.machine.device == "cuda" else 0.0

    def unpacked(self) -> int:
        """As `SlotModel.unpacked_bytes`: the base in the compute type, if it takes at most half of what is free."""
        size = self.footprint.unpacked()
        return size if size <= self.free / 2 else 0

    def places(self) -> int:
        """Of the longest completion with its prompt."""
        data = self.config.data
        prompt = data.max_prompt_tokens if self.rows.assumed else max(prompt for prompt, _ in self.rows.lengths)
        return prompt + self.new_tokens

    def _width(self) -> int:
        """Completions side by side, as `budget.rows_at_once` finds it."""
        asked = self.config.generation.width
        if isinstance(asked, int):
            return asked
        return max(1, self.footprint.rows_that_fit(SHARE * self.free - self.unpacked(), self.places()))

    def _phases(self, batch: Batch) -> tuple[Phase, ...]:
        optimizer = self.config.train.optimizer
        side_by_side = min(self.width, self.config.generation.shard_rows, len(self.rows.lengths))
        margin = (f"margin, {1 - SHARE:.0%} of what the model leaves", int((1 - SHARE) * self.free))
        unpacked = [("base unpacked", self.unpacked())] if self.unpacked() else []
        holes = [("holes in the heap", self.footprint.holes(batch))] if self.machine.device == "cpu" else []
        return (
            Phase(
                "generate",
                (
                    *self.loaded,
                    *unpacked,
                    ("keys, values and logits of rows", side_by_side * self.footprint.row(self.places())),
                    ("a pass without gradients", self.footprint.prefill(self.places())),
                    margin,
                ),
            ),
            Phase("score", (*self.loaded, ("a pass without gradients", self.footprint.forward(batch)), margin)),
            Phase(
                "train",
                (
                    *self.loaded,
                    ("gradients", self.footprint.gradients()),
                    (f"optimiser ({optimizer})", self.footprint.optimizer(optimizer)),
                    ("activations kept", self.footprint.kept(batch)),
                    ("a layer's backward pass, or the head", self.footprint.working(batch)),
                    *holes,
                    margin,
                ),
            ),
        )

    # --- time and disk

    def times(self) -> Iterator[Seconds]:
        config, rows = self.config, len(self.rows.lengths)
        real = [(prompt, real, 0) for prompt, real, _ in self.groups]
        held_out = config.data.heldout_rows
        if config.data.heldout_source is None:  # split off: at most a fifth of all, which is a quarter of the others
            held_out = max(2, min(held_out, rows // 4))
        pairs = [len(config.train.learnt_from(iteration)) for iteration in range(config.iterations)]  # times the rows

        def phase(name: str, seconds: Callable[[int], float]) -> Seconds:
            each = [seconds(times) for times in pairs]
            return Seconds(name, each[0], each[-1], sum(each))

        score, train = (self._passes_seconds(self.groups, training=training) for training in (False, True))
        # sampled and answered greedily; then scored as a pair, and an opponent's completion as long as a real one
        evaluate = 2 * self._generation_seconds(held_out, EVALUATED_ROWS) + (
            (score + self._passes_seconds(real, training=False)) * held_out / rows
        )
        players = config.iterations + 1 + bool(config.sft.epochs)  # the base, and what its warm start ended with
        if config.sft.epochs:
            warm_up = config.sft.epochs * self._passes_seconds(real, training=True)
            yield Seconds("warm start", warm_up, 0.0, warm_up)
        generate = self._generation_seconds(rows, config.generation.shard_rows)
        yield phase("generate", lambda _: generate)
        yield phase("score", lambda times: times * score)
        yield phase("train", lambda times: times * config.train.epochs * train)
        yield Seconds("evaluate", evaluate, evaluate, players * evaluate)

    def _passes_seconds(self, groups: Sequence[tuple[int, int, int]], *, training: bool) -> float:
        """Over all of these groups once, micro-batch by micro-batch."""
        some = _some(groups)
        batches = self._micro_batches(some, self.budget.tokens)
        work = sum(work_with_launches(self.footprint, batch, self.launch, training=training) for batch in batches)
        seconds = work / (PASSES[self.machine.device] * self.machine.flops) + self._copying(len(batches))
        return seconds * len(groups) / len(some)

    def _generation_seconds(self, rows: int, shard: int) -> float:
        """Decoding steps, each of which computes and moves bytes, and the prompts before them."""
        footprint, machine = self.footprint, self.machine
        steps = (rows // shard * math.ceil(shard / self.width) + math.ceil(rows % shard / self.width)) * self.new_tokens
        at_once = max(1, round(rows * self.new_tokens / steps))
        mean_prompt = sum(prompt for prompt, _ in self.rows.lengths) / len(self.rows.lengths)
        moved = step_bytes(footprint, at_once, round(mean_prompt + self.new_tokens / 2), unpacked=self.unpacked() > 0)
        a_step = step_work(footprint, at_once) / machine.flops + moved / machine.bandwidth
        prompts = Batch.of([(prompt, 0, 0) for prompt, _, _ in self.groups], self.rows.prefix)
        first = forward_work(footprint, prompts) * rows / len(self.rows.lengths) / machine.flops
        return steps * a_step / DECODING[machine.device] + first / PASSES[machine.device] + self._copying(steps)

    def _copying(self, passes: int) -> float:
        """Seconds for a head that lies in main memory."""
        return passes * self.footprint.head_bytes / LINK if self.footprint.head_aside else 0.0

    def disk(self) -> Iterator[tuple[str, int]]:
        footprint, config = self.footprint, self.config
        if not at_home(config.model.id).is_dir():
            yield "the base's 16-bit weights, in the cache", 2 * footprint.shape.parameters
        adapters = config.iterations + bool(config.sft.epochs)  # with what a warm start ended with
        yield f"{adapters} adapters", 4 * footprint.adapter_weights * adapters
        tokens = sum(map(sum, self.groups)) + self.rows.prefix * len(self.groups)  # each row's prompt is written whole
        yield "pairs of all iterations", int(PAIR_BYTES * tokens * config.iterations)
        snapshot = 4 * footprint.adapter_weights + footprint.optimizer(config.train.optimizer)
        yield "snapshots while training, two at most", 2 * snapshot
