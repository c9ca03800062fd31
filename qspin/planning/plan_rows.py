"""How long the rows of a run are, which is what a plan needs to know of them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qspin.config import DataConfig, RunConfig
from qspin.errors import QspinError
from qspin.records import Record

ASSUMED_ROWS, MOST_ROWS = 1000, 1_000_000
ASSUMED_PROMPT, ASSUMED_COMPLETION = 128, 256  # tokens of a row, where no data are given
CHARACTERS = 4  # a token, in English, where there is no tokenizer to ask


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens of the training rows."""

    lengths: tuple[tuple[int, int], ...]  # prompt, real completion
    prefix: int  # tokens that all prompts begin with
    source: str  # a sentence
    assumed: bool = False  # typical lengths: the longest row is then what the settings allow

    def under(self, data: DataConfig) -> Rows:
        """Those that the settings leave, as `Renderer.example` does."""
        longest, prompt = data.max_completion_tokens, data.max_prompt_tokens
        if self.assumed or data.long_completions == "cut":
            capped = (
                (min(asked, prompt) if self.assumed else asked, min(real, longest)) for asked, real in self.lengths
            )
        else:
            capped = (pair for pair in self.lengths if pair[1] <= longest)
        return replace(self, lengths=tuple(pair for pair in capped if pair[0] <= prompt))


def assumed_rows(count: int, unread: str | None = None) -> Rows:
    """Rows of typical lengths, for plans without data, or at once, with data `unread`."""
    if count > MOST_ROWS:
        raise QspinError(f"data.limit, --rows: {count} rows are more than a plan is made for ({MOST_ROWS})")
    why = "no data given" if unread is None else f"{unread} is not read unless --data names it"
    source = (
        f"{why}: {count} rows assumed, of {ASSUMED_PROMPT} tokens of prompt and {ASSUMED_COMPLETION} of "
        "completion; memory is planned for the longest that the settings allow"
    )
    return Rows(((ASSUMED_PROMPT, ASSUMED_COMPLETION),) * count, 0, source, assumed=True)


def rows_of_data(config: RunConfig) -> Rows:
    """The lengths of a configuration's rows: in tokens where the base's tokenizer is at hand, else by characters.

    Raises:
        QspinError: the data can't be read.
    """
    from qspin.base import find_base, load_tokenizer
    from qspin.packing import common_prefix
    from qspin.prepare import prepare

    try:
        load_tokenizer(find_base(config.model))
    except QspinError:
        return _rows_by_characters(config)
    prepared = prepare(config, datetime.date.today())
    good = len(prepared.train) + (0 if config.data.heldout_source else len(prepared.heldout))
    return Rows(
        lengths=tuple((len(example.prompt_ids), len(example.real_ids)) for example in prepared.train),
        prefix=common_prefix([example.prompt_ids for example in prepared.train]),
        source=f"{config.data.source}: {_counted(len(prepared.train), good, config.data.limit)}, in the model's own "
        "tokens",
    )


def _rows_by_characters(config: RunConfig) -> Rows:
    from qspin.data import split_heldout
    from qspin.prepare import load_rows

    source = config.data.source
    assert source is not None
    dataset = load_rows(config, source, config.data.limit)
    train: Sequence[Record] = dataset.records
    if config.data.heldout_source is None:
        train, _ = split_heldout(source, train, config.data.heldout_rows, config.seed, limited=dataset.cut)

    def tokens(text: str) -> int:
        return math.ceil(len(text) / CHARACTERS) + 5  # with the marks that a template puts around a turn

    lengths = ((sum(tokens(m.content) for m in r.prompt), tokens(r.completion)) for r in train)
    counted = _counted(len(train), len(dataset.records), config.data.limit)
    return Rows(
        lengths=tuple(lengths),
        prefix=0,
        source=f"{source}: {counted}, a token taken for {CHARACTERS} characters since the model's tokenizer is not "
        "here",
    )


def _counted(rows: int, good: int, limit: int | None) -> str:
    """Of so many good rows, with those that are held out."""
    return f"{rows} rows" + (f" ({limit} were asked for, and {good} are good)" if limit and good < limit else "")
