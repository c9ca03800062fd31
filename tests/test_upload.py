"""What would be uploaded of a run: the same bytes each time, no path, no pair that is none; else what it lacks."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet
import pytest
from conftest import flip_byte, played_on_markup
from made import IN_PACKAGE, ON_HUB

from qspin.errors import QspinError
from qspin.exports.card import Licence
from qspin.exports.push import _licence, make_upload
from qspin.files import read_jsonl, read_plain_json, sha256_of, write_json, write_jsonl, write_plain_json
from qspin.run_dir import RunDir


@pytest.fixture(scope="module")
def run(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return played_on_markup(tiny_folder("llama"), tmp_path_factory.mktemp("upload"))


def copied(run: RunDir, path: Path) -> RunDir:
    return RunDir(Path(shutil.copytree(run.path, path)))


def test_the_same_run_makes_the_same_bytes(run: RunDir) -> None:
    """So that what is on the Hub already is known for what it is."""
    for content in ("adapter", "dataset"):
        hashes = []
        for _ in range(2):
            upload = make_upload(run, "me/mine", content=content, iteration="last", say=lambda _: None)
            hashes.append([sha256_of(upload.folder / name) for name in upload.files])
        assert hashes[0] == hashes[1]


def test_a_path_in_an_adapters_configuration_is_not_published(run: RunDir, tmp_path: Path) -> None:
    """Whatever wrote it: the record has the base's name."""
    other = copied(run, tmp_path / "run")
    adapter = other.iteration(1).adapter
    config = read_plain_json(adapter / "adapter_config.json")
    write_plain_json(adapter / "adapter_config.json", config | {"base_model_name_or_path": "/home/me/base"})
    write_json(adapter / "manifest.json", {})
    upload = make_upload(other, "me/mine", content="adapter", iteration="last", say=lambda _: None)
    assert read_plain_json(upload.folder / "adapter_config.json")["base_model_name_or_path"] == "tiny-llama"


def test_a_completion_equal_to_the_real_one_is_no_pair(run: RunDir, tmp_path: Path) -> None:
    """Training left it out too."""
    other = copied(run, tmp_path / "run")
    shard = other.iteration(1).generated(0)
    same, *rest = read_jsonl(shard)
    write_jsonl(shard, [{**same, "generated_ids": same["real_ids"]}, *rest])
    upload = make_upload(other, "me/pairs", content="dataset", iteration="last", say=lambda _: None)
    table = pyarrow.parquet.read_table(upload.folder / "data" / "iteration-1.parquet")
    assert table["id"].to_pylist() == [row["record_id"] for row in rest]
    card = (upload.folder / "README.md").read_text()
    assert "| 0 | 10 | 0 |\n| 1 | 9 | 1 |" in card


def test_pairs_of_which_all_are_alike_are_not_published(run: RunDir, tmp_path: Path) -> None:
    other = copied(run, tmp_path / "run")
    for iteration in (0, 1):
        for shard in other.iteration(iteration).generated(0).parent.glob("shard-*.jsonl"):
            write_jsonl(shard, [{**row, "generated_ids": row["real_ids"]} for row in read_jsonl(shard)])
        if iteration == 0:  # a later one has pairs, as with sft_weight
            upload = make_upload(other, "me/pairs", content="dataset", iteration="last", say=lambda _: None)
            assert "| 0 | 0 | 10 |\n| 1 | 10 | 0 |" in (upload.folder / "README.md").read_text()
    with pytest.raises(QspinError, match="every completion is the real one, so there is no pair to publish"):
        make_upload(other, "me/pairs", content="dataset", iteration="last", say=lambda _: None)


def test_the_embedded_models_licence_is_known_without_the_hub() -> None:
    assert _licence({"base": IN_PACKAGE}) == Licence("apache-2.0", None, None, "as the package that carries it says")
    assert _licence({"base": ON_HUB}) is None


# --- what can't be uploaded ---


@pytest.mark.parametrize("repo", ["../x", "/etc/x", "a/b\0", "x" * 300, f"a/{'x' * 300}", "<script>/x", "mine"])
def test_a_name_that_is_no_hub_id(repo: str, run: RunDir) -> None:
    with pytest.raises(QspinError) as caught:
        make_upload(run, repo, content="adapter", iteration="last", say=lambda _: None)
    said = str(caught.value)
    assert said.startswith("OWNER/NAME: ")
    assert said.endswith(" is not a hub id: give owner/name, each at most 96 letters, digits, '-', '_' or '.'")
    assert said.isprintable()
    assert len(said) < 150


def test_an_iteration_that_is_not_there(run: RunDir) -> None:
    with pytest.raises(QspinError) as caught:
        make_upload(run, "me/mine", content="adapter", iteration="2", say=lambda _: None)
    assert str(caught.value) == f"--iteration: '2' is not finished in {run.path}; last, best or 0 to 1 are"


def test_a_run_without_a_finished_iteration(run: RunDir, tmp_path: Path) -> None:
    young = copied(run, tmp_path / "run")
    young.iteration(0).evaluation.unlink()
    with pytest.raises(QspinError) as caught:
        make_upload(young, "me/mine", content="adapter", iteration="last", say=lambda _: None)
    assert str(caught.value).startswith(f"{young.path} has no finished iteration yet")


def test_damaged_weights_are_not_published(run: RunDir, tmp_path: Path) -> None:
    damaged = copied(run, tmp_path / "run")
    told = flip_byte(damaged.iteration(1).adapter)
    with pytest.raises(QspinError) as caught:
        make_upload(damaged, "me/mine", content="adapter", iteration="last", say=lambda _: None)
    assert str(caught.value) == told


def test_another_template_is_not_published(run: RunDir) -> None:
    template = run.template
    text = template.read_text()
    for change in (lambda: template.write_text(text + " "), template.unlink):
        change()
        with pytest.raises(QspinError) as caught:
            make_upload(run, "me/mine", content="adapter", iteration="last", say=lambda _: None)
        assert str(caught.value).startswith(f"chat.template: {template} ")
    template.write_text(text)


def test_other_rows_are_not_published(run: RunDir) -> None:
    data = run.path.parent / "mine.jsonl"
    text = data.read_text()
    data.write_text(text.replace("What is 3", "What was 3"))
    with pytest.raises(QspinError) as caught:
        make_upload(run, "me/pairs", content="dataset", iteration="last", say=lambda _: None)
    data.write_text(text)
    assert str(caught.value) == f"{data}: the rows are not those that {run.path} began with; bring the old file back"
