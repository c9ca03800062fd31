"""From a file to examples: what is told, what is refused and where, and that each row ends on one side."""

from __future__ import annotations

import datetime
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHATML, Notes
from transformers import AutoTokenizer

from qspin.config import load_config
from qspin.data import LeftOut
from qspin.errors import QspinError
from qspin.files import read_jsonl
from qspin.prepare import Prepared, prepare, write_rejects
from qspin.records import Place, Reject
from qspin.watching import _notes

Prepare = Callable[..., Prepared]
USER = {"role": "user", "content": "Hi"}


@pytest.fixture
def ready(tiny_folder: Callable[[str], Path]) -> Prepare:
    def ready(source: Path, **changes: Any) -> Prepared:
        settings = {"model.id": str(tiny_folder("llama")), "data.source": str(source), "data.heldout_rows": 4}
        return prepare(load_config(None, settings | changes), datetime.date(2026, 1, 1))

    return ready


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def good(count: int, per_prompt: int = 1) -> list[dict[str, Any]]:
    return [{"prompt": f"What is {n // per_prompt}?", "completion": f"It is {n}."} for n in range(count)]


def test_how_many_rows_are_used_is_told_before_a_run(ready: Prepare, tmp_path: Path) -> None:
    long = {"prompt": "What is " + "so very " * 400 + "long?", "completion": "This."}
    found = ready(write(tmp_path / "rows.jsonl", *good(20), long), **{"data.max_prompt_tokens": 100})
    told = Notes()
    _notes(found, told)
    (said,) = [note for note in told.notes if "training rows" in note]
    assert re.fullmatch(
        r"1\d training rows, 4 held out, 1 left out: 1 long-prompt \(line 21 the prompt has \d+ tokens; "
        r"data.max_prompt_tokens is 100\)",
        said,
    )


def test_what_is_odd_about_good_rows_is_told(ready: Prepare, tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.jsonl",
        *good(20),
        {"prompt": "What ends a turn?", "completion": "It is <|im_end|>.", "id": "a"},
        {"prompt": "And what begins one?", "completion": "<|im_start|>", "id": "a"},
        {"prompt": "Right?", "completion": "to\u202eleft", "id": "a", "prompt_id": "b"},
        {"prompt": "Zero\u200bwidth?", "completion": "Yes.", "id": "a", "prompt_id": "b"},
    )
    found = ready(path)
    assert found.notes == (
        f"{path}: 24 good rows of 24, format prompt-completion",
        f"{path}: 2 rows have the id of an earlier row and say something else (first: line 22, 'a'); they are kept, "
        "and called after their place",
        f"{path}: 2 rows hold zero-width characters or ones that turn the text's direction (first: line 23, U+202E); "
        "they are kept as they are",
        f"{path}: 2 rows hold the text of a control token (first: line 21, '<|im_end|>'); it is encoded as plain text",
    )
    assert found.rejects == ()
    assert {e.record_id for e in (*found.train, *found.heldout)} >= {"a", "b", "row-22", "row-24"}


@pytest.mark.parametrize(("long", "told"), [(2, False), (10, True)])
def test_many_real_completions_beyond_the_cap_of_generated_ones_are_told(
    long: int, told: bool, ready: Prepare, tmp_path: Path
) -> None:
    rows = [*good(40 - long), *({"prompt": f"And {n}?", "completion": "and on " * 40} for n in range(long))]
    found = ready(write(tmp_path / "rows.jsonl", *rows), **{"generation.max_new_tokens": 30})
    beyond = sum(len(row.real_ids) > 30 for row in found.train)
    assert 0 < beyond <= long
    said = (
        f"{beyond} of {len(found.train)} real completions are longer than the 30 tokens of "
        "generation.max_new_tokens, so their length tells them from generated ones; raise it, or lower "
        "data.max_completion_tokens to leave them out"
    )
    assert (said in found.notes) == told == any("real completions" in note for note in found.notes)


def test_a_template_that_can_not_be_read_is_named(ready: Prepare, tmp_path: Path) -> None:
    rows = write(tmp_path / "rows.jsonl", *good(8))
    (tmp_path / "latin.jinja").write_bytes("é".encode("latin-1"))
    for template in (tmp_path / "latin.jinja", tmp_path / "nowhere.jinja"):
        with pytest.raises(QspinError, match=rf"^chat\.template: {template} can't be read \("):
            ready(rows, **{"chat.template": str(template)})


def test_template_and_adapter_may_lie_in_a_home_folder(
    ready: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.jinja").write_text(CHATML)
    write(tmp_path / "rows.jsonl", *good(20))
    assert ready(Path("~/rows.jsonl"), **{"chat.template": "~/mine.jinja"}).inputs["chat.template"]
    with pytest.raises(QspinError, match=f"^model.init_adapter: {tmp_path}/adapter: no such folder; "):
        ready(Path("~/rows.jsonl"), **{"model.init_adapter": "~/adapter"})


def test_a_template_without_a_system_turn_is_told_of(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    own = AutoTokenizer.from_pretrained(tiny_folder("llama")).chat_template
    template.write_text("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + own)
    turns = [{"role": "system", "content": "Be kind."}, USER]
    rows = [{"messages": [*turns, {"role": "assistant", "content": f"{n}"}]} for n in range(10)]
    rows += [{"messages": [USER, {"role": "assistant", "content": f"{n}"}]} for n in range(2)]
    settings = {
        "model.id": str(tiny_folder("llama")),
        "data.source": str(write(tmp_path / "rows.jsonl", *rows)),
        "chat.template": str(template),
        "data.heldout_rows": 2,
    }
    found = prepare(load_config(None, settings), datetime.date(2026, 1, 1))
    assert found.notes[1] == (
        "The chat template refuses a system text (no system); it is put before the first user turn's text, after it "
        "a blank line."
    )
    texts = {"".join(text for kind, text in found.renderer.pieces(e) if kind == "prompt") for e in found.train}
    assert texts == {"<|im_start|>user\nBe kind.\n\nHi<|im_end|>\n<|im_start|>assistant\n"}


# --- rows that are left out ---

LONG = {"prompt": "why " * 400, "completion": "So."}
ROWS = [*good(50), good(1)[0], LONG, {"prompt": "Why?", "completion": ""}]


def test_rejects_of_reading_and_rendering_are_in_order_with_their_source(ready: Prepare, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS[0], *ROWS[50:], *ROWS[1:50])
    other = write(tmp_path / "other.jsonl", {"prompt": "Other?", "completion": None}, *good(2), *good(9)[2:])
    more = [{"prompt": f"And {n}?", "completion": "So."} for n in range(40)]
    write(other, *more[:30], {"prompt": "Other?", "completion": None}, good(3)[2], *more[30:])
    found = ready(path, **{"data.heldout_source": str(other), "data.heldout_rows": 99, "data.max_prompt_tokens": 64})
    assert [(source, reject.place.number, reject.code, reject.malformed) for source, reject in found.rejects] == [
        (str(path), 2, "duplicate", False),
        (str(path), 3, "long-prompt", False),
        (str(path), 4, "empty-completion", True),
        (str(other), 31, "not-text", True),
        (str(other), 32, "trained-on", False),
    ]
    assert f"{other}: 1 rows left out, their prompts are trained on" in found.notes
    assert (len(found.train), len(found.heldout)) == (50, 40)
    write_rejects(tmp_path / "rejects.jsonl", found.rejects)
    assert read_jsonl(tmp_path / "rejects.jsonl")[4] == {
        "source": str(other),
        "line": 32,
        "code": "trained-on",
        "reason": "has the prompt of training line 6",
        "malformed": False,
    }


@pytest.mark.parametrize(
    ("rows", "changes", "said"),
    [
        (ROWS, {}, "3 of 53 rows can't be used, and --strict (data.strict) allows none: the first is line 51, "
         "duplicate: says the same as line 1; mend them, or go on without"),
        ([LONG, *good(50)], {}, "1 of 51 rows can't be used, and --strict (data.strict) allows none: the first is line "
         "1, long-prompt: the prompt has 813 tokens; data.max_prompt_tokens is 64; mend them, or go on without"),
        ([*good(50), {"prompt": "Why?", "completion": "so " * 90}], {"data.max_completion_tokens": 32}, "1 of 51 rows "
         "can't be used, and --strict (data.strict) allows none: the first is line 51, long-completion: it has 92 "
         "tokens; data.max_completion_tokens is 32; mend them, or go on without"),
    ],
)  # fmt: skip
def test_strict_stops_where_a_row_would_be_left_out(
    ready: Prepare, tmp_path: Path, rows: list[Any], changes: dict[str, Any], said: str
) -> None:
    path = write(tmp_path / "rows.jsonl", *rows)
    changes = {"data.max_prompt_tokens": 64, "data.max_malformed_share": 1, **changes}
    rejects = ready(path, **changes).rejects  # without it, the run goes on
    with pytest.raises(LeftOut) as caught:
        ready(path, **changes, **{"data.strict": True})
    assert str(caught.value) == f"{path}: {said}"
    assert caught.value.rejects == list(rejects)


def test_a_run_that_malformed_rows_stop_lists_all_rows_that_it_would_leave_out(ready: Prepare, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *ROWS, {"prompt": "\ufdd0?", "completion": "So."})
    with pytest.raises(LeftOut, match="2 of 54 rows are malformed") as caught:
        ready(path, **{"data.max_prompt_tokens": 64, "data.max_malformed_share": 0.01})
    assert [(reject.place.number, reject.code) for _source, reject in caught.value.rejects] == [
        (51, "duplicate"),
        (52, "long-prompt"),
        (53, "empty-completion"),
        (54, "encoding"),
    ]


def test_strict_is_for_held_out_rows_too(ready: Prepare, tmp_path: Path) -> None:
    path, other = write(tmp_path / "rows.jsonl", *good(9)), write(tmp_path / "other.jsonl", *good(12)[8:])
    changes = {"data.heldout_source": str(other), "data.strict": True}
    with pytest.raises(LeftOut) as caught:
        ready(path, **changes)
    assert caught.value.rejects == [
        (str(other), Reject(Place(1), "trained-on", "has the prompt of training line 9", malformed=False))
    ]
    assert len(ready(path, **{**changes, "data.strict": False}).heldout) == 3
    assert len(ready(write(path, *good(8)), **changes).heldout) == 4, "where none is left out, it is as without"


def test_rows_of_both_sources_are_listed_where_either_stops_a_run(ready: Prepare, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *good(9), "{\n", *good(1))
    other = write(tmp_path / "other.jsonl", *good(12)[8:], LONG, {"prompt": "Why?", "completion": ""})
    changes = {"data.heldout_source": str(other), "data.max_prompt_tokens": 64, "data.heldout_rows": 10}
    with pytest.raises(LeftOut) as caught:
        ready(path, **changes, **{"data.strict": True})
    assert re.fullmatch(
        rf"{path}: 2 of 11 rows can't be used, and --strict .* the first is line 10, broken-json: .*; mend them, or go "
        rf"on without; {other}: 3 of 6 rows can't be used, and --strict .* the first is line 1, trained-on: .*",
        str(caught.value),
    )
    rows = [(source, reject.place.number, reject.code) for source, reject in caught.value.rejects]
    assert rows == [
        (str(path), 10, "broken-json"),
        (str(path), 11, "duplicate"),
        (str(other), 1, "trained-on"),
        (str(other), 5, "long-prompt"),
        (str(other), 6, "empty-completion"),
    ]
    with pytest.raises(LeftOut, match=rf"^{other}: 1 of 6 rows are malformed[^;]*; mend them, or raise it$") as caught:
        ready(path, **changes, **{"data.max_malformed_share": 0.1})
    assert [(source, reject.place.number, reject.code) for source, reject in caught.value.rejects] == rows


def test_rows_that_are_too_few_to_split_are_listed_with_those_that_are_too_long(ready: Prepare, tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", *good(7), LONG, good(1)[0])
    with pytest.raises(LeftOut) as caught:
        ready(path, **{"data.max_prompt_tokens": 64})
    assert re.fullmatch(r".*: 8 good rows .*; left out: 1 long-prompt .*, 1 duplicate \(line 9 .*", str(caught.value))
    rows = [(reject.place.number, reject.code) for _, reject in caught.value.rejects]
    assert rows == [(8, "long-prompt"), (9, "duplicate")]


def test_prompts_that_are_the_same_tokens_are_not_held_out(tiny_folder: Callable[[str], Path], tmp_path: Path) -> None:
    """The template writes a system text by itself, which half of the rows spell out."""
    own = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
    (tmp_path / "own.jinja").write_text(own)
    plain = [
        [{"role": "user", "content": f"What is {n}?"}, {"role": "assistant", "content": f"It is {n}."}]
        for n in range(40)
    ]
    spelt = [[{"role": "system", "content": "Be kind."}, *turns] for turns in plain[20:]]
    source = write(tmp_path / "rows.jsonl", *({"messages": turns} for turns in plain + spelt))
    settings = {"model.id": str(tiny_folder("llama")), "data.heldout_rows": 12, "data.source": str(source)}
    found = prepare(
        load_config(None, settings | {"chat.template": str(tmp_path / "own.jinja")}), datetime.date(2026, 1, 1)
    )
    assert not {row.prompt_ids for row in found.heldout} & {row.prompt_ids for row in found.train}
    left = [reject for _, reject in found.rejects]
    assert len(found.heldout) + len(left) == 12 and left
    assert {reject.code for reject in left} == {"trained-on"}
    assert re.fullmatch(r"is, as tokens, the prompt of training line \d+", left[0].reason)


def test_one_prompt_with_several_completions_is_kept_on_one_side(ready: Prepare, tmp_path: Path) -> None:
    found = ready(write(tmp_path / "rows.jsonl", *good(30, per_prompt=3)), **{"data.heldout_rows": 6})
    assert (len(found.train), len(found.heldout), found.rejects) == (24, 6, ())
    assert not {e.prompt_ids for e in found.train} & {e.prompt_ids for e in found.heldout}
    assert len({e.prompt_ids for e in found.heldout}) == 2


# --- what stops a run ---


LAST = "and 2 are needed; the last row left out, line"
REFUSED: list[tuple[list[Any], list[Any], dict[str, Any], str]] = [
    (good(9), [], {}, "rows.jsonl: 9 good rows with 9 different prompts are too few to hold out two or more by prompt "
     "and at most a fifth: 10 with prompts of their own would do; add rows, or give data.heldout_source"),
    (good(20), [], {"data.limit": 9}, "rows.jsonl: 9 good rows with 9 different prompts are too few to hold out two or "
     "more by prompt and at most a fifth: 10 with prompts of their own would do; raise data.limit, or give "
     "data.heldout_source"),
    (good(9), [], {"data.limit": 9}, "rows.jsonl: 9 good rows with 9 different prompts are too few to hold out two or "
     "more by prompt and at most a fifth: 10 with prompts of their own would do; add rows, or give "
     "data.heldout_source"),
    (good(1) * 3, [], {}, "rows.jsonl: 1 good rows with 1 different prompts are too few to hold out two or more by "
     "prompt and at most a fifth: 10 with prompts of their own would do; add rows, or give data.heldout_source; left "
     "out: 2 duplicate (line 2 says the same as line 1)"),
    (good(9), good(9), {}, f"other.jsonl: 0 held-out rows are left, {LAST} 4: has the prompt of training line 4; "
     "raise data.heldout_rows, or add rows; without data.heldout_source rows are split off by themselves"),
    ([LONG, *good(1)], good(9)[2:], {}, f"rows.jsonl: 1 training rows are left, {LAST} 1: the prompt has 813 tokens; "
     "data.max_prompt_tokens is 64; raise that, or add rows"),
    (good(9), good(20)[9:], {"data.limit": 1}, "rows.jsonl: 1 training rows are left, and 2 are needed; raise "
     "data.limit"),
    (good(1), good(20)[9:], {"data.limit": 1}, "rows.jsonl: 1 training rows are left, and 2 are needed; add rows"),
    (["{\n", *good(9)], [], {}, "rows.jsonl: 1 of 10 rows are malformed, more than data.max_malformed_share = 0.05 "
     "allows: 1 broken-json (line 1 goes on in the next line; write each on a line of its own); mend them, or raise "
     "it"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "heldout", "changes", "said"), REFUSED)
def test_a_run_that_cannot_be_is_one_line_that_names_the_file(
    ready: Prepare, tmp_path: Path, rows: list[Any], heldout: list[Any], changes: dict[str, Any], said: str
) -> None:
    source = write(tmp_path / "rows.jsonl", *rows)
    changes = {"data.max_prompt_tokens": 64, **changes}
    if heldout:
        changes["data.heldout_source"] = str(write(tmp_path / "other.jsonl", *heldout))
    with pytest.raises(QspinError) as caught:
        ready(source, **changes)
    assert str(caught.value) == f"{tmp_path}/{said}"
    assert str(caught.value).isprintable()
    assert isinstance(caught.value, LeftOut) == any(word in said for word in ("left out", "malformed")), "to be listed"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"generation.max_new_tokens": 600}, "generation.max_new_tokens: a prompt of .* more than the model's 512; lo"),
        ({"data.max_completion_tokens": 600}, "data.max_completion_tokens: row-21 has .* than the model's 512; lower"),
    ],
)
def test_what_is_longer_than_the_models_context(
    ready: Prepare, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    path = write(tmp_path / "rows.jsonl", *good(20), {"prompt": "Why?", "completion": "so " * 510})
    with pytest.raises(QspinError, match=said):
        ready(path, **changes)


def test_longrope_holds_to_its_first_length(tiny_folder: Callable[[str], Path], ready: Prepare, tmp_path: Path) -> None:
    """As Phi-4-mini's config.json has it: 4,096 of its 131,072 tokens."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("phi3"), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"]
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    config |= {"rope_scaling": {"type": "longrope", **factors}, "original_max_position_embeddings": 100}
    (folder / "config.json").write_text(json.dumps(config))
    path = write(tmp_path / "rows.jsonl", *good(20))
    ready(path, **{"model.id": str(folder), "generation.max_new_tokens": 60})
    with pytest.raises(
        QspinError, match=r"^generation\.max_new_tokens: a prompt of .* are more than the model's 100; lo"
    ):
        ready(path, **{"model.id": str(folder), "generation.max_new_tokens": 95})


def test_a_tokenizer_of_another_model(tiny_folder: Callable[[str], Path], ready: Prepare, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"word{n}" for n in range(9)])
    tokenizer.save_pretrained(folder)
    path = write(tmp_path / "rows.jsonl", *good(20), {"prompt": "Is it word8?", "completion": "Yes."})
    with pytest.raises(QspinError) as caught:
        ready(path, **{"model.id": str(folder)})
    assert str(caught.value) == (
        "model.id: the tokenizer writes token 520, but 512 have an embedding; take the tokenizer that was saved with "
        "this model"
    )
