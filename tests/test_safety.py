"""What comes from outside stays text: markup is inert, names stay names, code is not run. And no secret goes out."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from command_line import call
from conftest import ROOT
from hub_server import TOKEN, HubServer
from markdown_it import MarkdownIt
from rich.console import Console

import qspin
from qspin.base import find_base, quiet_libraries
from qspin.chat import PieceKind
from qspin.config import ModelConfig, load_config
from qspin.errors import QspinError
from qspin.exports.push import make_upload
from qspin.figures.report import Answers, Column, Results
from qspin.figures.terminal import completions_table, notes_table, results_table
from qspin.files import read_plain_json
from qspin.planning.dry_run import example_text
from qspin.run_dir import RunDir
from qspin.safe_text import breaks_shown, check_path, redacted, secret_keys, show_traceback, visible
from qspin.watch import view

CANARY = "canaryInACoalMine0123"
HF_CANARY = "hf_" + "Canary" * 6
EVIL = "<script>alert(1)</script>[red]red[/red][link=http://evil]x[/link]\x1b[31mred\x1b]0;title\x07\x9b2J\r\x08"
OBEYED = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")  # by terminals, but for line ends


@pytest.fixture(scope="module")
def played(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run whose rows, base and file are named and filled with markup, made with secrets in the environment."""
    folder = tmp_path_factory.mktemp("safety")
    base = Path(shutil.copytree(tiny_folder("llama"), folder / "<b>[red]\x1b[31mbase"))
    rows = [{"id": f"{n}{EVIL}", "prompt": f"What is {n}? {EVIL}", "completion": f"{7 * n} {EVIL}"} for n in range(12)]
    (folder / "[red]rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = (
        *("model.dtype=float32", "generation.max_new_tokens=6", "data.heldout_rows=2", "train.batch_size=8"),
        *("lora.rank=4", "train.epochs=1"),
    )
    options = [part for setting in settings for part in ("--set", setting)]
    command = ("run", "--model", base, "--data", folder / "[red]rows.jsonl", "--iterations", "1", *options)
    variables = {"HF_TOKEN": HF_CANARY, "WANDB_API_KEY": CANARY, "HTTPS_PROXY": f"http://me:{CANARY}@127.0.0.1:9"}
    said = {
        "plan": call(*command, "--out", folder / "run", "--dry-run", **variables),
        "people": call(*command, "--out", folder / "run", "--track", "tensorboard", **variables),
        "json": call(*command, "--out", folder / "again", "--json", **variables),
        "status": call("status", folder / "run", **variables),
        "adapter": call("export", folder / "run", "--to", "adapter", **variables),
        "ollama": call("export", folder / "run", "--to", "ollama", **variables),
        "push": call("push", folder / "run", "me/mine", "--what", "merged", "--dry-run", **variables),
        "pairs": call("push", folder / "run", "me/mine", "--dataset", "--dry-run", **variables),
    }
    return {"folder": folder, "said": said}


def test_every_command_worked(played: dict[str, Any]) -> None:
    assert {name: answer.code for name, answer in played["said"].items()} == dict.fromkeys(played["said"], 0)


# --- markup ---


def test_a_terminal_is_told_nothing(played: dict[str, Any]) -> None:
    """No escape reaches it, and square brackets are not read as Rich's markup."""
    for name, answer in played["said"].items():
        # a library's progress bar goes back to its line's beginning
        assert OBEYED.search(answer.out + answer.err.replace("\r", "")) is None, name
    for name in ("plan", "people"):
        assert "[red]" in played["said"][name].out, name
    for line in played["said"]["json"].out.splitlines():
        json.loads(line)


def test_a_live_panel_and_tables_on_a_terminal_show_what_they_are_given() -> None:
    """On a terminal Rich writes escapes of its own, so that each kind of text is drawn with and without evil in it."""

    def drawn(text: str) -> str:
        stream = io.StringIO()
        console = Console(file=stream, force_terminal=True, width=400, color_system="truecolor")
        console.print(results_table(Results("", (Column("player", ""),), [[text]])))
        console.print(notes_table([text]))
        console.print(completions_table([Answers(text, {text: text, "base": text})]))
        kinds: list[tuple[PieceKind, str]] = [("prompt", text), ("completion", text), ("end-of-turn", text)]
        console.print(example_text(kinds))
        console.print(view._note(text))
        return re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())

    assert OBEYED.search(drawn(EVIL)) is None
    assert "[red]red[/red]" in drawn(EVIL)
    assert "\ufffd[31mred" in drawn(EVIL)


def test_text_of_a_model_is_harmless() -> None:
    text = "a\n\tb\x1b[2J\x07\r\x9b31m \u202egnp.exe\u2028 [red]c[/red] é 漢字 \ud800"
    shown = breaks_shown(text)
    assert shown == "a↵ b\ufffd[2J\ufffd \ufffd31m \ufffdgnp.exe  [red]c[/red] é 漢字 \ufffd"
    assert shown.isprintable()


def test_cards_and_summaries_hold_no_html(played: dict[str, Any]) -> None:
    folder = played["folder"]
    pages = [folder / "run" / "SUMMARY.md", *folder.glob("run-push/*/README.md")]
    assert len(pages) == 3
    for page in pages:
        text = page.read_text().removeprefix("---\n")
        assert "<" not in re.sub(r"\]\(<[^<>]*>\)", "", text.rpartition("\n---\n")[2]), page
        rendered = MarkdownIt("commonmark").enable("table").render(text.rpartition("\n---\n")[2])
        assert not {"script", "b", "img"} & set(re.findall(r"<(\w+)", rendered)), page
        assert OBEYED.search(text) is None, page


def test_a_bases_name_says_nothing_in_a_modelfile(played: dict[str, Any]) -> None:
    lines = (played["folder"] / "run-iteration-0-ollama" / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./_b_red_31mbase-f16.gguf"
    assert (played["folder"] / "run-iteration-0-ollama" / "_b_red_31mbase-f16.gguf").is_file()
    assert [line.split()[0] for line in lines] == ["FROM", "TEMPLATE", *(len(lines) - 2) * ["PARAMETER"]]


# --- secrets ---


def test_no_secret_of_the_environment_is_in_anything_written_or_said(played: dict[str, Any]) -> None:
    files = [path for path in played["folder"].rglob("*") if path.is_file()]
    assert any("tfevents" in path.name for path in files)
    assert {"status.json", "run.json", "README.md", "metrics.jsonl"} <= {path.name for path in files}
    for path in files:
        content = path.read_bytes()
        assert CANARY.encode() not in content and HF_CANARY.encode() not in content, path
    for name, answer in played["said"].items():
        assert CANARY not in answer.out + answer.err and HF_CANARY not in answer.out + answer.err, name


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.source", f"https://me:{CANARY}@host/rows.jsonl"),
        ("model.id", f"https://me:{CANARY}@host/owner/name"),
        ("model.id", HF_CANARY),
        ("model.revision", CANARY),
        ("about", f"made with {HF_CANARY}"),
        ("chat.template_kwargs", {"deep": [{"key": HF_CANARY}]}),
    ],
)
def test_a_secret_in_a_setting_is_refused_and_not_repeated(
    key: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", CANARY)
    with pytest.raises(QspinError) as caught:
        load_config("quickstart", {key: value})
    assert str(caught.value).startswith(key)
    assert "holds a token or a password" in str(caught.value)
    answer = call("run", "quickstart", "--out", tmp_path / "run", "--set", f"{key}={json.dumps(value)}")
    assert answer.code == 1
    assert answer.err.startswith(f"error: {key}")
    assert CANARY not in answer.out + answer.err and HF_CANARY not in answer.out + answer.err
    assert list(tmp_path.iterdir()) == []


def test_every_preset_is_free_of_secrets() -> None:
    for preset in (ROOT / "presets").glob("*.yaml"):
        assert list(secret_keys(load_config(preset.stem).model_dump(mode="json"))) == []


def test_an_address_with_a_login_is_not_told_when_the_hub_fails(tmp_path: Path) -> None:
    """The client's own log and errors name the address that was asked, and retries are logged."""
    with HubServer() as hub:
        address = hub.url.replace("://", f"://me:{CANARY}@")
        done = subprocess.run(
            [sys.executable, str(ROOT / "cli.py"), "run", "--model", "some/model", "--data", "x.jsonl", "--out", "run"],
            env={**os.environ, **hub.environment(), "HF_ENDPOINT": address, "HF_TOKEN": HF_CANARY, "HF_DEBUG": "1"},
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: model.id: some/model can't be had from the hub")
    assert CANARY not in done.stdout + done.stderr
    assert HF_CANARY not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_libraries_log_is_redacted() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger("huggingface_hub").addHandler(handler)
    quiet_libraries()
    logging.getLogger("huggingface_hub.utils").error("retrying %s\x1b[31m", f"https://me:{CANARY}@host/x")
    logging.getLogger("huggingface_hub").removeHandler(handler)
    assert stream.getvalue() == "retrying https://***@host/x\ufffd[31m\n"


def test_a_traceback_is_redacted(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", CANARY)
    try:
        raise RuntimeError(f"401 for https://me:pass@host/x with {CANARY} and {HF_CANARY}")
    except RuntimeError as error:
        show_traceback(type(error), error, None)
        assert CANARY in traceback.format_exc()
    assert capfd.readouterr().err.endswith("RuntimeError: 401 for https://***@host/x with *** and ***\n")


def test_what_is_no_secret_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "x")  # as some set it to quieten a client
    for text in ("https://host/a@b", "me@host: extra", "hf_dataset/name", "a: //b @ c", ""):
        assert redacted(text) == text
    assert visible("two\nlines\t\u00e9 \U0001f642") == "two\nlines \u00e9 \U0001f642"


# --- names ---


@pytest.mark.parametrize("command", ["run", "export", "status", "push", "init"])
@pytest.mark.parametrize("name", ["x" * 300, "a/" * 2000, f"../{'x' * 300}"], ids=["long", "deep", "long above"])
def test_a_name_that_no_file_can_have(command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = {
        "run": ("quickstart", "--out", name, "--dry-run"),
        "export": (tmp_path, "--to", "adapter", "--out", name),
        "status": (name,),
        "push": (name, "me/mine"),
        "init": ("quickstart", "--output", name),
    }
    answer = call(command, *arguments[command])
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith("error: ")
    assert "is too long for a file's name" in answer.err
    assert answer.err.count("\n") == 1
    assert len(answer.err) < 300
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["model.id", "model.init_adapter", "chat.template", "data.source"])
@pytest.mark.parametrize("value", ["a\0b", "x" * 300])
def test_a_setting_that_no_file_can_have(key: str, value: str, tmp_path: Path) -> None:
    group, name = key.split(".")
    (tmp_path / "c.yaml").write_text(json.dumps({"preset": "quickstart", group: {name: value}}))
    with pytest.raises(QspinError, match=rf"^{re.escape(key)}: .* (has a NUL character in it|is too long)"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize(
    ("option", "key", "said"),
    [
        (("--data", "/caf\udce9.jsonl"), "data.source", r"/caf\udce9.jsonl"),  # a name in Latin 1, as Python has it
        (("--set", r'evaluation.style="\ud800"'), "evaluation.style", r"\ud800"),  # half a character
    ],
)
def test_a_setting_that_no_file_can_hold(option: tuple[str, str], key: str, said: str, tmp_path: Path) -> None:
    answer = call("run", "quickstart", "--out", tmp_path / "run", *option)
    assert (answer.code, answer.out) == (1, "")
    assert answer.err.startswith(f"error: {key}: {said} is not UTF-8, in which settings are kept in the run's folder; ")
    assert answer.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


LATIN = "nu\udce9"  # a name in Latin 1, as Python has it
ADVICE = "is not UTF-8, as the names of a run's files and folders have to be; "
no_such_names = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")


@no_such_names
def test_a_folder_whose_name_is_no_text_is_told_before_anything_is_made(tmp_path: Path) -> None:
    config, out = load_config("quickstart"), tmp_path / LATIN
    commands: list[tuple[str | Path, ...]] = [
        ("run", "quickstart", "--out", out),
        ("sweep", "quickstart", "--vary", "seed=1,2", "--out", out),
        ("init", "quickstart", "--output", out),
        ("status", out),
    ]
    for command, option in zip(commands, ["--out", "--out", "-o", "RUN"], strict=True):
        answer = call(*command)
        assert (answer.code, answer.out) == (1, "")
        assert answer.err.startswith(f"error: {option}: {tmp_path}/nu\\udce9 {ADVICE}")
        assert answer.err.count("\n") == 1
    calls: list[Callable[[], object]] = [
        lambda: qspin.run(config, out, progress=qspin.Silent()),
        lambda: qspin.sweep("quickstart", {"seed": [1]}, out),
        lambda: qspin.results(out),
        lambda: qspin.load(out),
        lambda: qspin.export(tmp_path, to="adapter", out=out),
    ]
    for work in calls:
        with pytest.raises(QspinError, match=re.escape(f"nu\\udce9 {ADVICE}")):
            work()
    assert list(tmp_path.iterdir()) == []


@no_such_names
def test_nor_can_a_run_be_in_such_a_folder_or_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / LATIN
    here.mkdir()
    (here / "rows.jsonl").write_text("{}")
    monkeypatch.chdir(here)
    for option, name, out in (("--out", "mine", Path("mine")), ("data.source", "rows.jsonl", tmp_path / "run")):
        answer = call("run", "quickstart", "--data", "rows.jsonl", "--out", out)
        assert (answer.code, answer.out) == (1, "")
        assert answer.err.startswith(f"error: {option}: {tmp_path}/nu\\udce9/{name} {ADVICE}")
    assert load_config("quickstart", {"data.source": "owner/name"}).data.source == "owner/name", "of the hub"
    assert sorted(path.name for path in tmp_path.rglob("*")) == [LATIN, "rows.jsonl"]


def test_names_that_are_only_odd_are_names() -> None:
    for name in ("../x", "/abs/olute", "CON", "a b", "[red]", "x" * 200):
        assert check_path(name, "--out") == Path(name)


def test_an_export_follows_no_link(played: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    for target in (tmp_path / "elsewhere", tmp_path / "nowhere"):
        (tmp_path / "out").symlink_to(target)
        answer = call("export", played["folder"] / "run", "--to", "adapter", "--out", tmp_path / "out")
        assert (answer.code, answer.out) == (1, "")
        assert answer.err == f"error: --out: {tmp_path / 'out'} is there already; name a new folder\n"
        (tmp_path / "out").unlink()
    assert [path.name for path in tmp_path.rglob("*")] == ["elsewhere"]


@pytest.mark.parametrize("link", ["run-push", "run-push/adapter-0", "run-push/adapter-0/adapter_model.safetensors"])
def test_a_push_writes_through_no_link(link: str, played: dict[str, Any], tmp_path: Path) -> None:
    run = RunDir(Path(shutil.copytree(played["folder"] / "run", tmp_path / "run")))
    (tmp_path / "elsewhere").write_text("precious")
    (tmp_path / link).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / link).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(QspinError, match=r"is a link, and what is uploaded would be written elsewhere|can't be made"):
        make_upload(run, "me/mine", content="adapter", iteration="last", say=lambda _: None)
    assert (tmp_path / "elsewhere").read_text() == "precious"


# --- code, and what a name stands for ---


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_not_run(
    file: str, tiny_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anyone asked whether it should be."""
    folder = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "model"))
    (folder / "evil.py").write_text("from pathlib import Path\nPath('exploded').write_text('')\n")
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    auto_map = {name: f"evil.{name.removeprefix('Auto')}" for name in names}
    auto_map["AutoTokenizer"] = ["evil.Slow", "evil.Fast"]  # type: ignore[assignment]
    changes: dict[str, Any] = {"auto_map": auto_map}
    changes |= {"model_type": "evil"} if file == "config.json" else {"tokenizer_class": "EvilTokenizer"}
    (folder / file).write_text(json.dumps(read_plain_json(folder / file) | changes))
    (tmp_path / "rows.jsonl").write_text("".join(f'{{"prompt": "{n}?", "completion": "!"}}\n' for n in range(40)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    command = ("run", "--model", folder, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "run", "--dry-run")
    answer = call(*command, "--set", "data.heldout_rows=4")
    if answer.code:  # where the class is known without the code, that is used
        assert answer.err.startswith(f"error: model.id: {folder} can't be loaded: ")
        assert answer.err.count("\n") == 1
    assert file != "config.json" or answer.code == 1
    assert not (tmp_path / "exploded").exists()


def test_there_is_no_way_to_trust_a_models_code() -> None:
    found = [
        line.strip()
        for path in (ROOT / "qspin").rglob("*.py")
        for line in path.read_text().splitlines()
        if "trust_remote_code" in line
    ]
    assert len(found) == 3
    assert all("trust_remote_code=False" in line for line in found)


def test_a_revision_is_pinned_to_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch moves; what is kept, loaded and published is the commit that it was."""
    with HubServer() as hub:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        hub.cards["some/base"] = {}
        hub.commits["some/base"] = "c" * 40
        for revision in (None, "main"):
            base = find_base(ModelConfig(id="some/base", revision=revision))
            assert (base.name, base.revision) == ("some/base", "c" * 40)
            assert base.origin == {"hub": "some/base", "commit": "c" * 40}
