"""Where a run doesn't fit, what would: the nearest settings, or a smaller model.

change = None if plan.fits else nearest_change(plan)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qspin.config import RunConfig, load_config
from qspin.config_files import preset_names
from qspin.machine import Machine
from qspin.planning.plan import Plan, fits, make_plan, shape_of


@dataclass(frozen=True, slots=True)
class Change:
    """Settings that make a run fit, and the plan with them."""

    settings: dict[str, Any]
    preset: str | None  # another preset, where no settings do
    plan: Plan


def nearest_change(plan: Plan) -> Change | None:
    """Settings that make it fit: added up in order, those first that change no result, and then the ones left out
    again that were not needed; else the largest model of a preset that fits as it is. None if nothing does."""

    def enough(changes: list[dict[str, Any]]) -> bool:
        return fits(with_settings(plan.config, _together(changes)), plan.machine, plan.rows)

    taken: list[dict[str, Any]] = []
    for step in _steps(plan.config, plan.machine):
        taken = [other for other in taken if not other.keys() <= step.keys()] + [step]
        if enough(taken):
            for other in tuple(taken):
                fewer = [kept for kept in taken if kept is not other]
                taken = fewer if enough(fewer) else taken
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
        # asked first: a preset may leave none of rows as long as these
        if shape_of(config).parameters < plan.shape.parameters and fits(config, plan.machine, plan.rows):
            return Change({}, name, make_plan(config, plan.machine, plan.rows))
    return None


def with_settings(config: RunConfig, settings: dict[str, Any]) -> RunConfig:
    """The configuration with some settings of its parts changed."""
    for key, value in settings.items():
        part, name = key.split(".")
        changed = getattr(config, part).model_copy(update={name: value})
        config = config.model_copy(update={part: changed})
    return config
