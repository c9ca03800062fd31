"""Everything before the first weight is read: base, template, rows as tokens, and the checks that need no model."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qspin.base import Base, find_base, load_model_config, load_tokenizer, stop_tokens
from qspin.chat import Renderer
from qspin.config import RunConfig
from qspin.data import Dataset, check_malformed_share, load_records, remove_overlap, split_heldout
from qspin.errors import QspinError
from qspin.records import Example, Record, Reject


@dataclass(frozen=True, slots=True)
class Prepared:
    """A configuration with its data as tokens; loading the weights is all that is left."""

    config: RunConfig
    date: datetime.date  # what a template that asks for today's date is told
    base: Base
    renderer: Renderer
    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    heldout_prompts: tuple[str, ...]  # the last user turn of each, for showing
    rejects: tuple[tuple[str, Reject], ...]  # with the source they came from
    stop_ids: frozenset[int]
    format: str
    fingerprint: str  # of training and held-out data together
    notes: tuple[str, ...]  # for the user


def prepare(config: RunConfig, date: datetime.date) -> Prepared:
    """Resolve the base, read and judge the rows, render and tokenise them.

    Raises:
        QspinError: the base, the template or the data can't be used; says which and what to do.
    """
    if config.data.source is None:
        raise QspinError("data.source is not set: give --data a file of prompts and answers, or a hub id")
    base = find_base(config.model)
    architecture = load_model_config(base).get_text_config()
    renderer = Renderer.build(
        load_tokenizer(base),
        template=_template(config),
        template_kwargs=config.chat.template_kwargs,
        date=date,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_completion_tokens=config.data.max_completion_tokens,
        long_completions=config.data.long_completions,
        vocab_size=architecture.vocab_size,
    )
    notes = list(renderer.notes)
    dataset = _load(config, config.data.source, config.data.limit)
    rejects = [(config.data.source, reject) for reject in dataset.rejects]
    notes.append(f"{config.data.source}: {len(dataset.records)} good rows of {dataset.rows}, format {dataset.format}")
    fingerprint = dataset.fingerprint
    if config.data.heldout_source is None:
        train_records, heldout_records = split_heldout(dataset.records, config.data.heldout_rows, config.seed)
    else:
        heldout_data = _load(config, config.data.heldout_source, config.data.heldout_rows)
        rejects += [(config.data.heldout_source, reject) for reject in heldout_data.rejects]
        fingerprint += f"+{heldout_data.fingerprint}"
        train_records = dataset.records
        heldout_records, overlap = remove_overlap(heldout_data.records, train_records)
        if overlap:
            notes.append(f"{config.data.heldout_source}: {overlap} rows left out, their prompts are trained on")
    train, train_rejects = _render(renderer, train_records)
    heldout, heldout_rejects = _render(renderer, heldout_records)
    rejects += [(config.data.source, reject) for reject in train_rejects]
    rejects += [(config.data.heldout_source or config.data.source, reject) for reject in heldout_rejects]
    asked = {record.id: record.prompt[-1].content for record in heldout_records}
    _check_enough(config, train, heldout, [reject for _, reject in rejects])
    _check_context(config, [*train, *heldout], architecture.max_position_embeddings)
    return Prepared(
        config=config,
        date=date,
        base=base,
        renderer=renderer,
        train=tuple(train),
        heldout=tuple(heldout),
        heldout_prompts=tuple(asked[example.record_id] for example in heldout),
        rejects=tuple(rejects),
        stop_ids=frozenset({renderer.end_of_turn, *stop_tokens(base)}),
        format=dataset.format,
        fingerprint=fingerprint,
        notes=tuple(notes),
    )


def _load(config: RunConfig, source: str, limit: int | None) -> Dataset:
    data = config.data
    dataset = load_records(
        source,
        split=data.split,
        config=data.config,
        format=data.format,
        columns=data.columns,
        turns=data.turns,
        limit=limit,
    )
    check_malformed_share(dataset, data.max_malformed_share)
    return dataset


def _template(config: RunConfig) -> str | None:
    if config.chat.template is None:
        return None
    try:
        return Path(config.chat.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise QspinError(f"chat.template: {config.chat.template} can't be read ({error})") from None


def _render(renderer: Renderer, records: Sequence[Record]) -> tuple[list[Example], list[Reject]]:
    examples, rejects = [], []
    for record in records:
        rendered = renderer.example(record, record.line)
        if isinstance(rendered, Reject):
            rejects.append(rendered)
        else:
            examples.append(rendered)
    return examples, rejects


def _check_enough(
    config: RunConfig, train: Sequence[Example], heldout: Sequence[Example], rejects: Sequence[Reject]
) -> None:
    for name, rows in (("training", train), ("held-out", heldout)):
        if len(rows) < 2:
            last = f"; the last row left out: {rejects[-1].reason}" if rejects else ""
            raise QspinError(f"{config.data.source}: {len(rows)} {name} rows are left of the good ones{last}")


def _check_context(config: RunConfig, examples: Sequence[Example], context: int) -> None:
    longest = max(examples, key=lambda example: len(example.prompt_ids))
    need = len(longest.prompt_ids) + config.generation.max_new_tokens
    if need > context:
        raise QspinError(
            f"generation.max_new_tokens: a prompt of {len(longest.prompt_ids)} tokens ({longest.record_id}) and "
            f"{config.generation.max_new_tokens} new ones are more than the model's {context}; "
            "lower it or data.max_prompt_tokens"
        )
    longest = max(examples, key=lambda example: len(example.prompt_ids) + len(example.real_ids))
    need = len(longest.prompt_ids) + len(longest.real_ids)
    if need > context:
        raise QspinError(
            f"data.max_completion_tokens: {longest.record_id} has {need} tokens, more than the model's {context}; "
            "lower it or data.max_prompt_tokens"
        )
