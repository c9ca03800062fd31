"""Where what is made of a base is kept, and what is said where it can't be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import call
from conftest import as_nobody

from qspin import base
from qspin.base import cache_dir, find_base, load_tokenizer
from qspin.config import ModelConfig, load_config
from qspin.doctor.doctor import cache
from qspin.errors import QspinError

NO_HOME = "{}: there is no such home folder to keep models in; name another folder in QSPIN_CACHE"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom the system knows no home of, as in a container."""

    def unknown(_uid: int) -> None:
        raise KeyError

    for name in ("HOME", "USERPROFILE", "QSPIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({}, "home/.cache/qspin"),
        ({"XDG_CACHE_HOME": "xdg"}, "xdg/qspin"),
        ({"XDG_CACHE_HOME": "~/xdg"}, "home/xdg/qspin"),
        ({"QSPIN_CACHE": "own", "XDG_CACHE_HOME": "xdg"}, "own"),
        ({"QSPIN_CACHE": "~/own"}, "home/own"),
        ({"QSPIN_CACHE": "", "XDG_CACHE_HOME": ""}, "home/.cache/qspin"),
        ({"QSPIN_CACHE": "", "XDG_CACHE_HOME": "xdg"}, "xdg/qspin"),
    ],
)
def test_the_cache_is_where_the_variables_say(
    variables: dict[str, str], folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("QSPIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"HOME": "home", **variables}.items():
        monkeypatch.setenv(name, value)
    assert cache_dir() == Path(folder)


def test_without_a_home_folder_one_is_asked_for(homeless: None, tmp_path: Path) -> None:  # noqa: ARG001
    out = tmp_path / "run"
    for variables, named in (({}, "~/.cache/qspin"), ({"QSPIN_CACHE": "~nobodyx/c"}, "~nobodyx/c")):
        answer = call("run", "quickstart", "--out", out, "--dry-run", **variables)
        assert (answer.code, answer.out, answer.err) == (1, "", f"error: {NO_HOME.format(named)}\n")
    assert cache().advice == "name another folder in QSPIN_CACHE"


def test_a_model_in_nobodys_home_is_one_line(homeless: None, tmp_path: Path) -> None:  # noqa: ARG001
    for name in ("~/model", "~nobodyx/model"):
        with pytest.raises(QspinError, match=f"^model.id: {name} is neither a folder here nor a hub id"):
            find_base(ModelConfig(id=name))
        answer = call("plan", "quickstart", "--set", f"model.id={name}", "--vram", "24")
        assert (answer.code, answer.err.partition(" is no local folder")[0]) == (
            1,
            f"error: model.architecture is not set, and model.id ({name!r})",
        )
    assert list(tmp_path.iterdir()) == []


def test_a_cache_that_can_not_be_written_to_is_not_the_models_fault(
    closed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_base(load_config("quickstart").model)
    file = closed.parent / "file"
    file.write_text("")
    for cached, why in ((closed / "cache", "Permission denied"), (file, "File exists"), (closed, "Permission denied")):
        monkeypatch.setenv("QSPIN_CACHE", str(cached))
        with as_nobody(), pytest.raises(QspinError) as caught:
            load_tokenizer(found)
        said = f"can't be written to ({why}); name another folder in QSPIN_CACHE"
        assert str(caught.value) == f"QSPIN_CACHE: {cached} {said}"


def test_a_model_that_can_not_be_read_is_not_the_caches_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QSPIN_CACHE", str(tmp_path))

    def fail(_name: str, **_options: object) -> None:
        raise OSError("no such model")

    monkeypatch.setattr(base.transformers.AutoTokenizer, "from_pretrained", fail)
    with pytest.raises(QspinError, match=r"^model\.id: .* can't be loaded: no such model$"):
        load_tokenizer(find_base(load_config("quickstart").model))


def test_a_package_that_is_not_there_is_done_without(tiny_folder: Callable[[str], Path]) -> None:
    folder = str(tiny_folder("llama"))
    for package in ("nothing-like-it", "nothing.like.it", ""):
        assert find_base(ModelConfig(id=folder, package=package)).location == folder
