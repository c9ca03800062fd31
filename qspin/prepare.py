"""Everything before the first weight is read: base, template, rows as tokens, and the checks that need no model."""

from __future__ import annotations

import datetime
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from qspin.adapters import check_config, check_folder_named, load_adapter
from qspin.base import Base, find_base, load_model_config, load_tokenizer, stop_tokens
from qspin.chat import Renderer
from qspin.chat_template import Tokenizer
from qspin.config import RunConfig
from qspin.data import (
    Dataset,
    LeftOut,
    check_rejects,
    load_records,
    most_common,
    of_source,
    remove_overlap,
    split_heldout,
)
from qspin.errors import QspinError
from qspin.files import ADAPTER_WEIGHTS, sha256_of, write_jsonl
from qspin.records import Example, Record, Reject

MANY = 0.1  # of the real completions, beyond the cap of generated ones: of fewer there is little to learn by


@dataclass(frozen=True, slots=True)
class Prepared:
    """A configuration with its data as tokens; loading the weights is all that is left."""

    config: RunConfig
    date: datetime.date  # what a template that asks for today's date is told
    base: Base
    renderer: Renderer
    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    train_prompts: tuple[str, ...]  # the last user turn of each row, for showing
    heldout_prompts: tuple[str, ...]
    rejects: tuple[tuple[str, Reject], ...]  # with the source they came from
    stop_ids: frozenset[int]
    format: str
    fingerprint: str  # of training and held-out data together
    inputs: dict[str, str | None]  # setting → hash of the content that it names, beside the data
    notes: tuple[str, ...]  # for the user

    @property
    def tokens_hash(self) -> str:
        """SHA-256 of what the rows are as tokens: of tokenizer, template and limits as well as of texts."""
        digest = hashlib.sha256(str(len(self.train)).encode())
        for example in (*self.train, *self.heldout):
            digest.update(repr((example.record_id, example.prompt_ids, example.real_ids)).encode())
        return digest.hexdigest()

    @property
    def counts(self) -> str:
        """How many rows are used, and why others are not."""
        reasons = f": {most_common([reject for _, reject in self.rejects])}" if self.rejects else ""
        return f"{len(self.train)} training rows, {len(self.heldout)} held out, {len(self.rejects)} left out{reasons}"


def prepare(config: RunConfig, date: datetime.date, commit: str | None = None) -> Prepared:
    """Resolve the base, read and judge the rows, render and tokenise them.

    Args:
        commit: of a hub id, in place of what its revision means today.

    Raises:
        QspinError: the base, the template or the data can't be used; says which and what to do.
    """
    if config.data.source is None:
        raise QspinError("data.source is not set: give --data a file of prompts and answers, or a hub id")
    speech = find_speech(config, date, commit)
    base, renderer = speech.base, speech.renderer
    rows = _read_rows(config, config.data.source, renderer)
    _check_enough(config, rows)
    _check_context(config, [*rows.train, *rows.heldout], speech.context)
    return Prepared(
        config=config,
        date=date,
        base=base,
        renderer=renderer,
        stop_ids=speech.stop_ids,
        inputs={"chat.template": renderer.template_hash, "model.init_adapter": _adapter_hash(config, base)},
        notes=(*speech.notes, *rows.notes, *_on_long_completions(config, rows.train)),
        train=rows.train,
        heldout=rows.heldout,
        train_prompts=rows.train_prompts,
        heldout_prompts=rows.heldout_prompts,
        rejects=rows.rejects,
        format=rows.format,
        fingerprint=rows.fingerprint,
    )


class Speech(NamedTuple):
    """How one talks with a base: all of it but the weights."""

    base: Base
    renderer: Renderer
    stop_ids: frozenset[int]
    context: int  # tokens that a prompt and its completion may have together
    notes: tuple[str, ...]


def find_speech(config: RunConfig, date: datetime.date, commit: str | None = None) -> Speech:
    """Resolve the base, and probe its template; as `prepare`."""
    base = find_base(config.model if commit is None else config.model.model_copy(update={"revision": commit}))
    architecture = load_model_config(base).get_text_config()
    tokenizer = load_tokenizer(base)
    renderer = Renderer.build(
        tokenizer,
        template=_template(config),
        template_kwargs=config.chat.template_kwargs,
        date=date,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_completion_tokens=config.data.max_completion_tokens,
        long_completions=config.data.long_completions,
        vocab_size=architecture.vocab_size,
    )
    return Speech(
        base=base,
        renderer=renderer,
        stop_ids=frozenset({renderer.end_of_turn, *stop_tokens(base)}),
        context=_context(architecture),
        notes=(*_replaced_template(config, tokenizer), *renderer.notes),
    )


def _context(architecture: Any) -> int:
    """What the model was made for. With longrope, all positions turn by other angles once one is beyond the length that
    the model had at first: what was decoded before would be of another model, and so would the short rows that a long
    one is packed with."""
    rope = getattr(architecture, "rope_parameters", None) or {}
    context: int = architecture.max_position_embeddings
    return rope["original_max_position_embeddings"] if rope.get("rope_type") == "longrope" else context


class _Rows(NamedTuple):
    """As in `Prepared`."""

    train: tuple[Example, ...]
    heldout: tuple[Example, ...]
    train_prompts: tuple[str, ...]
    heldout_prompts: tuple[str, ...]
    rejects: tuple[tuple[str, Reject], ...]
    format: str
    fingerprint: str
    notes: tuple[str, ...]
    cut: bool  # whether data.limit left some unread
    heldout_cut: bool  # whether data.heldout_rows did, of a source of their own


def _read_rows(config: RunConfig, source: str, renderer: Renderer) -> _Rows:
    """Training and held-out rows, from two sources or split from one."""
    settings = config.data
    if settings.heldout_source is None:
        data = load_rows(config, source, settings.limit, renderer)
    else:
        data = _load(config, source, settings.limit)
    of = f"the first {data.rows}, as data.limit says" if data.cut else f"{data.rows}"
    notes = [f"{source}: {len(data.records)} good rows of {of}, format {data.format}", *data.notes]
    notes += _on_control_tokens(source, renderer, data.records)
    if settings.heldout_source is None:
        train_records, heldout_records = _split(config, source, data, renderer)
        if len(heldout_records) < settings.heldout_rows:
            notes.append(
                f"{source}: {len(heldout_records)} rows are held out, not the {settings.heldout_rows} of "
                "data.heldout_rows: whole prompts, and a fifth of the good rows at most"
            )
        (train, train_rejects), (heldout, heldout_rejects) = _render_apart(renderer, train_records, heldout_records)
        rejects = _all_rejects(config, (source, data, [*train_rejects, *heldout_rejects]))
        fingerprint, heldout_cut = data.fingerprint, False
    else:
        other = _load(config, settings.heldout_source, settings.heldout_rows)
        heldout_cut = other.cut
        first = f", the first {other.rows}, as data.heldout_rows says" if heldout_cut else ""
        notes += [f"{settings.heldout_source}: held-out rows, read from there{first}", *other.notes]
        notes += [*_on_control_tokens(settings.heldout_source, renderer, other.records)]
        train_records = data.records
        heldout_records, overlap = remove_overlap(other.records, train_records)
        if overlap:
            notes.append(f"{settings.heldout_source}: {len(overlap)} rows left out, their prompts are trained on")
        (train, train_rejects), (heldout, heldout_rejects) = _render_apart(renderer, train_records, heldout_records)
        rejects = _all_rejects(
            config, (source, data, train_rejects), (settings.heldout_source, other, [*overlap, *heldout_rejects])
        )
        fingerprint = f"{data.fingerprint}+{other.fingerprint}"
    return _Rows(
        train=tuple(train),
        heldout=tuple(heldout),
        train_prompts=_asked(train_records, train),
        heldout_prompts=_asked(heldout_records, heldout),
        rejects=tuple(rejects),
        format=data.format,
        fingerprint=fingerprint,
        notes=tuple(notes),
        cut=data.cut,
        heldout_cut=heldout_cut,
    )


def _split(
    config: RunConfig, source: str, data: Dataset, renderer: Renderer
) -> tuple[Sequence[Record], Sequence[Record]]:
    try:
        return split_heldout(source, data.records, config.data.heldout_rows, config.seed, limited=data.cut)
    except QspinError as error:
        rejects = of_source(source, [*data.rejects, *_render(renderer, data.records)[1]])
        if not rejects:
            raise
        raise LeftOut(f"{error}; left out: {most_common([reject for _, reject in rejects])}", rejects) from None


def _on_long_completions(config: RunConfig, train: Sequence[Example]) -> Iterator[str]:
    """Generated completions end at a cap that real ones don't know."""
    cap = config.generation.max_new_tokens
    long = sum(len(row.real_ids) > cap for row in train)
    if long > MANY * len(train):
        yield (
            f"{long} of {len(train)} real completions are longer than the {cap} tokens of generation.max_new_tokens, "
            "so their length tells them from generated ones; raise it, or lower data.max_completion_tokens to leave "
            "them out"
        )


def _asked(records: Sequence[Record], examples: Sequence[Example]) -> tuple[str, ...]:
    """The last user turn of each example."""
    turns = {record.id: record.prompt[-1].content for record in records}
    return tuple(turns[example.record_id] for example in examples)


def load_rows(config: RunConfig, source: str, limit: int | None, renderer: Renderer | None = None) -> Dataset:
    """The first rows of a source, read as the configuration says.

    Args:
        renderer: where rows stop a run, those that it would leave out are counted and listed too.

    Raises:
        QspinError: it can't be read, or too many of its rows are malformed.
    """
    dataset = _load(config, source, limit)
    # before anything is made of the good rows: a file of bad ones should be called that, not too short
    try:
        _all_rejects(config, (source, dataset, []))
    except LeftOut:
        if renderer is not None:
            _all_rejects(config, (source, dataset, _render(renderer, dataset.records)[1]))
        raise
    return dataset


def _load(config: RunConfig, source: str, limit: int | None) -> Dataset:
    data = config.data
    return load_records(
        source,
        split=data.split,
        config=data.config,
        format=data.format,
        columns=data.columns,
        turns=data.turns,
        limit=limit,
    )


def write_rejects(path: Path, rejects: Sequence[tuple[str, Reject]]) -> None:
    """A line for each row that was left out, with its source."""
    write_jsonl(path, ({"source": source, **reject.to_json()} for source, reject in rejects))


def _all_rejects(config: RunConfig, *sources: tuple[str, Dataset, Sequence[Reject]]) -> list[tuple[str, Reject]]:
    """The rows that reading or rendering left out of sources, each of which is named with what was read of it and what
    rendering left out; raises if they are too many of any, with those of all."""
    data = config.data
    rejects: list[tuple[str, Reject]] = []
    refusals = []
    for source, dataset, rendering in sources:
        found = of_source(source, [*dataset.rejects, *rendering])
        rejects += found
        judged = replace(dataset, rejects=tuple(reject for _, reject in found))
        try:
            check_rejects(source, judged, strict=data.strict, max_malformed_share=data.max_malformed_share)
        except LeftOut as error:
            refusals.append(str(error))
    if refusals:
        raise LeftOut("; ".join(refusals), rejects)
    return rejects


def _on_control_tokens(source: str, renderer: Renderer, records: Sequence[Record]) -> list[str]:
    """A text about chat templates is one; a text that was rendered before is a mistake that a person should see."""
    found = [(record.place, name) for record in records if (name := renderer.control_token_in(record))]
    if not found:
        return []
    place, name = found[0]
    return [
        f"{source}: {len(found)} rows hold the text of a control token (first: {place}, {name!r}); "
        "it is encoded as plain text"
    ]


def _template(config: RunConfig) -> str | None:
    if config.chat.template is None:
        return None
    try:
        return Path(config.chat.template).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise QspinError(f"chat.template: {config.chat.template} can't be read ({error})") from None


def _replaced_template(config: RunConfig, tokenizer: Tokenizer) -> list[str]:
    """A preset's template goes on with another --model, for which it may be wrong."""
    if config.chat.template is None or not tokenizer.chat_template:
        return []
    return [f"chat.template: {config.chat.template} takes the place of the tokenizer's own template"]


def _adapter_hash(config: RunConfig, base: Base) -> str | None:
    if config.model.init_adapter is None:
        return None
    folder = Path(config.model.init_adapter)
    check_folder_named(folder)
    load_adapter(folder)  # what is wrong with it should be heard of before the base is loaded
    check_config(folder, base.name, config.lora)
    return sha256_of(folder / ADAPTER_WEIGHTS)


def _render(renderer: Renderer, records: Sequence[Record]) -> tuple[list[Example], list[Reject]]:
    examples, rejects = [], []
    for record in records:
        rendered = renderer.example(record)
        if isinstance(rendered, Reject):
            rejects.append(rendered)
        else:
            examples.append(rendered)
    return examples, rejects


def _render_apart(
    renderer: Renderer, train_records: Sequence[Record], heldout_records: Sequence[Record]
) -> tuple[tuple[list[Example], list[Reject]], tuple[list[Example], list[Reject]]]:
    """Training and held-out rows, but for those whose prompt is trained on: prompts of other texts can be the same
    tokens, as where one spells out the system text that the template writes by itself."""
    train, heldout = _render(renderer, train_records), _render(renderer, heldout_records)
    places = {record.id: record.place for record in train_records}
    trained = {example.prompt_ids: places[example.record_id] for example in train[0]}
    own = {record.id: record.place for record in heldout_records}
    overlap = [
        Reject(own[row.record_id], "trained-on", f"is, as tokens, the prompt of training {place}", malformed=False)
        for row in heldout[0]
        if (place := trained.get(row.prompt_ids)) is not None
    ]
    return train, ([row for row in heldout[0] if row.prompt_ids not in trained], [*heldout[1], *overlap])


def _check_enough(config: RunConfig, rows: _Rows) -> None:
    heldout_source = config.data.heldout_source or config.data.source
    for source, name, found in (
        (config.data.source, "training", rows.train),
        (heldout_source, "held-out", rows.heldout),
    ):
        if len(found) < 2:
            reasons = [reject for place, reject in rows.rejects if place == source]
            last = f"the last row left out, {reasons[-1].place}: {reasons[-1].reason}; " if reasons else ""
            limit = "raise that, or " if reasons and reasons[-1].code in {"long-prompt", "long-completion"} else ""
            more = "raise data.limit" if rows.cut and source == config.data.source else "add rows"
            if rows.heldout_cut and name == "held-out":
                more = "raise data.heldout_rows, or add rows"
            if config.data.heldout_source is not None and reasons and reasons[-1].code == "trained-on":
                more += "; without data.heldout_source rows are split off by themselves"
            message = f"{source}: {len(found)} {name} rows are left, and 2 are needed; {last}{limit}{more}"
            raise LeftOut(message, rows.rejects) if reasons else QspinError(message)


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
