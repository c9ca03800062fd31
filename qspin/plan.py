"""What a run would take: memory by phase, the settings that fit, time, disk, and where it doesn't fit, what would.

    plan = make_plan(config, card(12, config.model), assumed_rows(1000))
    change = None if plan.fits else nearest_change(plan)

footprint.py has the formulas; here they are added up as `budget.py` and `spin.py` go about it: the model is loaded,
SHARE of what it leaves is filled with tokens and rows, as many as fit. Free of torch where the machine and the rows'
lengths are given.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qspin.at_once import LAUNCH, Budget, budgets, choose, first_fit
from qspin.config import Architecture, RunConfig, load_config
from qspin.config_files import preset_names
from qspin.errors import QspinError
from qspin.footprint import SHARE, Batch, Footprint
from qspin.machine import Machine
from qspin.plan_rows import Rows
from qspin.shape import read_shape

# Shares of a machine's rates that passes over whole rows and decoding steps reach. The CPU's are those of
# docs/fitting.md, the GPU's are assumed for cards of 8 to 24 GB; on an H200 16 rows reached 15% and 212 rows 74% in
# decoding (benchmarks/results/gpu-cuda.json).
PASSES = {"cpu": 0.55, "cuda": 0.4}
DECODING = {"cpu": 0.4, "cuda": 0.25}
PAIR_BYTES = 6.5  # a token in a file of pairs
EVALUATION_SHARD = 64  # held-out rows answered at once
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


def shape_of(config: RunConfig) -> Architecture:
    """The model's shape, from the configuration or from a local folder's config.json.

    Raises:
        QspinError: neither is there.
    """
    if config.model.architecture is not None:
        return config.model.architecture
    file = Path(config.model.id).expanduser() / "config.json"
    if not config.model.id or not file.is_file():
        raise QspinError(
            f"model.architecture is not set, and model.id ({config.model.id!r}) is no local folder with a config.json: "
            "name a preset or such a folder, or set model.architecture.layers, .hidden and so on"
        )
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QspinError(f"{file}: damaged or unreadable ({error})") from None
    return read_shape(settings, str(file))


# --- what would fit


@dataclass(frozen=True, slots=True)
class Change:
    """Settings that make a run fit, and the plan with them."""

    settings: dict[str, Any]
    preset: str | None  # another preset, where no settings do
    plan: Plan


def nearest_change(plan: Plan) -> Change | None:
    """Settings that make it fit: added up in order, those first that change no result, and then the ones left out
    again that were not needed; else the largest model of a preset that fits as it is. None if nothing does."""

    def fits(settings: dict[str, Any]) -> bool:
        config = with_settings(plan.config, settings)
        rows = plan.rows.under(config.data)
        return bool(rows.lengths) and _Load(config, plan.machine, rows).fits

    taken: list[dict[str, Any]] = []
    for step in _steps(plan.config, plan.machine):
        taken = [other for other in taken if not other.keys() <= step.keys()] + [step]
        if fits(_together(taken)):
            for other in tuple(taken):
                fewer = [kept for kept in taken if kept is not other]
                taken = fewer if fits(_together(fewer)) else taken
            config = with_settings(plan.config, _together(taken))
            return Change(_together(taken), None, make_plan(config, plan.machine, plan.rows))
    return _smaller_model(plan)


def _together(steps: list[dict[str, Any]]) -> dict[str, Any]:
    return {key: value for step in steps for key, value in step.items()}


def _steps(config: RunConfig, machine: Machine) -> Iterator[dict[str, Any]]:
    """Changes to try, each on top of those before it."""
    if config.train.tokens_per_micro_batch != "auto":
        yield {"train.tokens_per_micro_batch": "auto"}
    if config.generation.width != "auto":
        yield {"generation.width": "auto"}
    if not config.train.gradient_checkpointing:
        yield {"train.gradient_checkpointing": "auto"}
    if machine.device == "cuda" and config.train.optimizer == "adamw":
        yield {"train.optimizer": "paged_adamw_8bit"}
    real, generated = config.data.max_completion_tokens, config.generation.max_new_tokens
    for length in (1024, 768, 512, 384, 256, 192, 128):
        shorter = {
            key: length
            for key, asked in (("data.max_completion_tokens", real), ("generation.max_new_tokens", generated))
            if length < asked
        }
        if shorter:
            yield shorter
    for rank in (64, 32, 16, 8):
        if rank < config.lora.rank:
            yield {"lora.rank": rank}


def _smaller_model(plan: Plan) -> Change | None:
    presets = [(name, load_config(name)) for name in preset_names()]
    for name, config in sorted(presets, key=lambda preset: -shape_of(preset[1]).parameters):
        if shape_of(config).parameters < plan.shape.parameters:
            smaller = make_plan(config, plan.machine, plan.rows)
            if smaller.fits:
                return Change({}, name, smaller)
    return None


def with_settings(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The configuration with some settings of its parts changed."""
    for key, value in settings.items():
        part, name = key.split(".")
        changed = getattr(config, part).model_copy(update={name: value})
        config = config.model_copy(update={part: changed})
    return config


# --- adding up


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
        )
        self.loaded = (
            ("4-bit weights and their constants", self.footprint.quantised(config.model.double_quant)),
            (f"{8 * machine.itemsize}-bit embeddings, head, norms", self.footprint.unquantised()),
            ("adapter", self.footprint.adapter()),
            ("CUDA context" if machine.device == "cuda" else "Python and libraries", machine.libraries),
        )
        self.free = max(0, machine.memory - sum(size for _, size in self.loaded))
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
        """The fullest micro-batch of a budget: the longest pairs that fit, or the longest alone."""
        return Batch.of(first_fit(self.longest_groups, sum, tokens)[0], self.rows.prefix)

    def _micro_batches(self, tokens: int) -> list[Batch]:
        """Of some rows, as `packing.plan_batches` cuts them."""
        some, size = self.groups[:: max(1, len(self.groups) // SAMPLE)], self.config.train.batch_size
        batches = [some[start : start + size] for start in range(0, len(some), size)]
        return [Batch.of(members, self.rows.prefix) for batch in batches for members in first_fit(batch, sum, tokens)]

    def _budget(self) -> Budget:
        """As `budget.token_budget` finds it."""
        config = self.config.train
        room = SHARE * self.free - self.footprint.optimizer(config.optimizer) - self.footprint.gradients()
        return choose(
            self.footprint,
            config,
            budgets(config, self.machine.device, sum(self.longest_groups[0])),
            self._fullest,
            self._micro_batches,
            lambda footprint, batch: footprint.activations(batch) + footprint.holes(batch),
            room,
            LAUNCH * self.machine.flops if self.machine.device == "cuda" else 0.0,
        )

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
        rate = PASSES[self.machine.device] * self.machine.flops
        everything = Batch.of(self.groups, self.rows.prefix)
        real = Batch.of([(prompt, real, 0) for prompt, real, _ in self.groups], self.rows.prefix)
        held_out = config.data.heldout_rows
        pairs = [min(past, config.train.mix_previous) + 1 for past in range(config.iterations)]  # times the rows

        def phase(name: str, seconds: Callable[[int], float]) -> Seconds:
            each = [seconds(times) for times in pairs]
            return Seconds(name, each[0], each[-1], sum(each))

        score, train = self.footprint.forward_work(everything) / rate, self.footprint.training_work(everything) / rate
        # sampled and answered greedily; then scored as a pair, and an opponent's completion as long as a real one
        evaluate = 2 * self._generation_seconds(held_out, EVALUATION_SHARD) + (
            (score + self.footprint.forward_work(real) / rate) * held_out / rows
        )
        if config.sft.epochs:
            warm_up = config.sft.epochs * self.footprint.training_work(real) / rate
            yield Seconds("warm start", warm_up, 0.0, warm_up)
        generate = self._generation_seconds(rows, config.generation.shard_rows)
        yield phase("generate", lambda _: generate)
        yield phase("score", lambda times: times * score)
        yield phase("train", lambda times: times * config.train.epochs * train)
        yield Seconds("evaluate", evaluate, evaluate, (config.iterations + 1) * evaluate)

    def _generation_seconds(self, rows: int, shard: int) -> float:
        """Decoding steps, each of which computes and moves bytes, and the prompts before them."""
        footprint, machine = self.footprint, self.machine
        steps = (rows // shard * math.ceil(shard / self.width) + math.ceil(rows % shard / self.width)) * self.new_tokens
        at_once = max(1, round(rows * self.new_tokens / steps))
        mean_prompt = sum(prompt for prompt, _ in self.rows.lengths) / len(self.rows.lengths)
        moved = footprint.step_bytes(at_once, round(mean_prompt + self.new_tokens / 2), unpacked=self.unpacked() > 0)
        a_step = footprint.step_work(at_once) / machine.flops + moved / machine.bandwidth
        prompts = Batch.of([(prompt, 0, 0) for prompt, _, _ in self.groups], self.rows.prefix)
        first = footprint.forward_work(prompts) * rows / len(self.rows.lengths) / machine.flops
        return steps * a_step / DECODING[machine.device] + first / PASSES[machine.device]

    def disk(self) -> Iterator[tuple[str, int]]:
        footprint, config = self.footprint, self.config
        if not Path(config.model.id).expanduser().is_dir():
            yield "the base's 16-bit weights, in the cache", 2 * footprint.shape.parameters
        yield f"{config.iterations} adapters", 4 * footprint.adapter_weights * config.iterations
        pairs = int(PAIR_BYTES * sum(map(sum, self.groups)) * config.iterations)
        yield "pairs of all iterations", pairs
        snapshot = 4 * footprint.adapter_weights + footprint.optimizer(config.train.optimizer)
        yield "snapshots while training, two at most", 2 * snapshot
