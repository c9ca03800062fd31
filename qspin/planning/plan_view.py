"""A plan as a page for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from qspin.machine import USABLE, Machine
from qspin.planning.plan import DECODING, PASSES, Plan, make_plan
from qspin.planning.plan_change import Change, with_settings
from qspin.units import GIB, gib


def render(plan: Plan, change: Change | None) -> Group:
    """A plan for the terminal, in 80 columns."""
    rates = "rates measured here" if plan.machine.measured else f"the published rates of an {plan.machine.name}"
    assumed = Table.grid(padding=(0, 1))
    for line in _assumptions(plan):
        assumed.add_row("-", Text(line))
    return Group(
        Text(plan.config.model.id or plan.shape.family, style="bold"),
        Text(f"{plan.shape.parameters / 1e9:.2g} billion parameters, on {_where(plan.machine)}"),
        Text(_verdict(plan, change), style="green" if plan.fits else "red"),
        *_section("Memory, GiB", _memory_table(plan)),
        *_section("Settings", _settings_table(plan)),
        *_section(f"Time, estimated from {rates}", _time_table(plan)),
        *_section("Disk, GB", _disk_table(plan)),
        *_section("Assumed", assumed),
    )


def _section(title: str, table: Table) -> tuple[Text, Table]:
    return Text(f"\n{title}", style="bold"), table


def _where(machine: Machine) -> str:
    size = f"{machine.memory / GIB:.3g} GiB"
    if machine.device == "cpu":
        return f"{machine.name} with {size} of free memory"
    return f"this {machine.name} with {size} free" if machine.measured else f"a card with {size} for CUDA"


def _verdict(plan: Plan, change: Change | None) -> str:
    largest = plan.largest
    need = f"{largest.total / GIB:.1f} of {plan.machine.memory / GIB:.3g} GiB"
    if plan.fits:
        return f"Fits: no phase takes more than {need}, margin included."
    said = f"Does not fit: {largest.name} takes {need}. "
    if plan.rows.assumed:
        said += "Rows shorter than the settings allow may fit: give --data. "
    if change is None:
        return f"{said}No smaller preset fits either."
    rows, left = len(plan.rows.lengths), len(change.plan.rows.lengths)
    then = f"with {gib(change.plan.largest.total)}" + (f" and {left} of {rows} rows" if left < rows else "")
    if change.preset is not None:
        return f"{said}The largest preset of a smaller model that fits, {then}: {change.preset}"
    settings = "".join(f"\n  --set {key}={_yaml(value)}" for key, value in change.settings.items())
    return f"{said}The nearest change that fits, {then}:{settings}"


def _yaml(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _table(*headings: str) -> Table:
    """Names on the left, figures on the right; without a heading no line for it."""
    table = Table(box=box.SIMPLE_HEAD if any(headings) else None, show_header=any(headings), pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", overflow="fold")
    return table


def _memory_table(plan: Plan) -> Table:
    table = _table("", *(phase.name for phase in plan.phases))
    names = list(dict.fromkeys(name for phase in plan.phases for name, _ in phase.parts))
    names.append(names.pop(next(i for i, name in enumerate(names) if name.startswith("margin"))))
    sizes = [dict(phase.parts) for phase in plan.phases]
    for name in names:
        table.add_row(name, *(f"{phase[name] / GIB:.2f}" if name in phase else "" for phase in sizes))
    table.add_section()
    table.add_row("in all", *(f"{phase.total / GIB:.2f}" for phase in plan.phases))
    return table


def _settings_table(plan: Plan) -> Table:
    config = plan.config
    table = _table("", "", "")
    for column in table.columns[:2]:
        column.no_wrap = True  # names and values are there to be copied
    table.columns[2].justify = "left"
    tokens, width = config.train.tokens_per_micro_batch, config.generation.width
    longest = f"the longest pair, {plan.longest}, goes alone" if plan.longest > plan.tokens else ""
    auto = "auto" if tokens == "auto" else ""
    table.add_row("train.tokens_per_micro_batch", str(plan.tokens), "; ".join(filter(None, (auto, longest))))
    table.add_row("generation.width", str(plan.width), "auto" if width == "auto" else "")
    table.add_row("train.gradient_checkpointing", _yaml(config.train.gradient_checkpointing), _recomputed(plan))
    table.add_row("train.optimizer", config.train.optimizer, "")
    table.add_row("lora.rank", str(config.lora.rank), "")
    return table


def _recomputed(plan: Plan) -> str:
    """What was chosen, or where it is set, what leaving it to qspin would spare."""
    if plan.config.train.gradient_checkpointing == "auto":
        return f"{plan.recomputed} of {plan.shape.layers} layers recomputed"
    auto = make_plan(with_settings(plan.config, {"train.gradient_checkpointing": "auto"}), plan.machine, plan.rows)
    spared = plan.seconds - auto.seconds
    return f"auto: {_duration(spared)} less" if auto.fits and spared >= 1 else ""


def _time_table(plan: Plan) -> Table:
    table = _table("", "first iteration", "last", f"all {plan.config.iterations}")
    for time in plan.times:
        table.add_row(time.phase, *(_duration(seconds) for seconds in (time.first, time.last, time.run)))
    table.add_section()
    table.add_row("in all", "", "", _duration(plan.seconds))
    return table


def _disk_table(plan: Plan) -> Table:
    table = _table("", "")
    for name, size in plan.disk:
        table.add_row(name, f"{size / 1e9:.2f}")
    return table


def _assumptions(plan: Plan) -> Iterator[str]:
    machine = plan.machine
    yield plan.rows.source
    yield f"generated completions run to generation.max_new_tokens ({plan.config.generation.max_new_tokens})"
    rates = f"{machine.flops / 1e12:.3g} TFLOP/s and {machine.bandwidth / 1e9:.0f} GB/s"
    basis = "measured" if machine.measured else "published"
    shares = f"{PASSES[machine.device]:.0%} in scoring and training, {DECODING[machine.device]:.0%} in decoding"
    yield f"of {rates}, which are {basis}, a run reaches {shares}"
    if machine.device == "cuda":
        yield "no such card was measured; what CUDA itself takes differs by driver"
    if machine.device == "cuda" and not machine.measured:
        yield f"of a card's memory {USABLE:.0%} are there for CUDA; where ECC is on, as in a T4, it is less"


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s" if seconds else ""
