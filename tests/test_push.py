"""A real run, published by the real client over HTTP: what arrives, what a failure leaves; and no token is seen."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet
import pytest
import torch
import transformers
import yaml
from command_line import Answer
from conftest import CHATML, played_on_markup
from hub_server import SIGNATURE, TOKEN, HubServer
from made import IN_FOLDER, IN_PACKAGE, ON_HUB
from pusher import Pusher
from safetensors.torch import load_file

from qspin.config import changed_results, load_config
from qspin.errors import QspinError
from qspin.exports.push import Content, _explain, check_login, make_upload, send
from qspin.exports.recipe import recorded_config
from qspin.files import read_json, read_jsonl, sha256_of, write_json
from qspin.prepare import prepare
from qspin.record import template_date
from qspin.run_dir import RunDir

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def run(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    return played_on_markup(tiny_folder("llama"), tmp_path_factory.mktemp("push"))


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with HubServer() as started:
        yield started


@pytest.fixture(scope="module")
def push(server: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pusher]:
    pusher = Pusher(tmp_path_factory.mktemp("pusher"), server.environment())
    yield pusher
    pusher.close()


@pytest.fixture
def hub(server: HubServer) -> HubServer:
    """Empty."""
    server.reset()
    return server


# --- a push ---


def test_an_adapter_is_published_once_and_loads(
    run: RunDir, hub: HubServer, push: Pusher, tiny_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    done = push(run, "me/mine")
    assert (done.code, done.out.splitlines()[-1]) == (0, f"{hub.url}/me/mine"), done.err
    repo = hub.repos["model", "me/mine"]
    assert not repo.private
    assert set(repo.files) == {"README.md", "config.yaml", "template.jinja", WEIGHTS, "adapter_config.json"}
    assert repo.lfs == {WEIGHTS: sha256_of(run.iteration(1).adapter / WEIGHTS)}
    assert not any(TOKEN.encode() in content for content in [*repo.files.values(), *hub.store.values()])
    assert not any(str(run.path.parent).encode() in content for content in repo.files.values()), "no path"
    assert not any(b"alert(1)" in content for content in repo.files.values()), "no prompt, no completion"

    for name, content in repo.files.items():
        (tmp_path / name).write_bytes(content)
    assert json.loads(repo.files["adapter_config.json"])["base_model_name_or_path"] == "tiny-llama"
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    peft.PeftModel.from_pretrained(base, tmp_path)

    # the recipe is the run's configuration, the base and the data aside
    given = {"model.id": str(tiny_folder("llama")), "data.source": "mine.jsonl"}
    assert changed_results(recorded_config(run), load_config(tmp_path / "config.yaml", given)) == []
    assert (tmp_path / "template.jinja").read_text() == CHATML

    # once more: nothing is sent, no commit is made
    done = push(run, "me/mine")
    assert (done.code, done.out.splitlines()[-1]) == (0, f"{hub.url}/me/mine"), done.err
    assert (len(repo.commits), hub.count("PUT /lfs/")) == (1, 1)


def test_a_push_that_fails_at_the_commit_does_not_send_the_weights_again(
    run: RunDir, hub: HubServer, push: Pusher
) -> None:
    hub.fail("POST /api/models/me/mine/commit", status=500)
    done = push(run, "me/mine")
    assert done.code == 1
    assert done.err.splitlines()[-1] == (
        "error: me/mine: the Hub refused (HTTP 500: out of order); the same command goes on where it stopped"
    )
    assert "Traceback" not in done.err
    assert (hub.repos["model", "me/mine"].files, hub.count("PUT /lfs/")) == ({}, 1)

    done = push(run, "me/mine")
    assert done.code == 0, done.err
    assert WEIGHTS in hub.repos["model", "me/mine"].files
    assert hub.count("PUT /lfs/") == 1, "the weights were there already"


@pytest.mark.parametrize("status", [503, None])
def test_an_upload_that_fails_once_is_tried_again(
    run: RunDir, hub: HubServer, push: Pusher, status: int | None
) -> None:
    hub.fail("PUT /lfs/", status=status)
    done = push(run, "me/mine", "--iteration", "0")
    assert done.code == 0, done.err
    assert hub.count("PUT /lfs/") == 2
    [stored] = hub.store.values()
    assert stored == (run.iteration(0).adapter / WEIGHTS).read_bytes()


def test_pairs_are_published_for_others_to_train_on(run: RunDir, hub: HubServer, push: Pusher, tmp_path: Path) -> None:
    done = push(run, "me/pairs", "--dataset", "--private")
    assert (done.code, done.out.splitlines()[-1]) == (0, f"{hub.url}/datasets/me/pairs"), done.err
    repo = hub.repos["dataset", "me/pairs"]
    assert repo.private
    repo.files |= {"data/iteration-7.parquet": b"of a longer run", "data/mine.parquet": b"kept"}
    assert push(run, "me/pairs", "--dataset", "--private").code == 0, "it is there, and private"
    assert "data/iteration-7.parquet" not in repo.files
    assert "data/mine.parquet" in repo.files
    tables = []
    for iteration in (0, 1):
        path = tmp_path / f"{iteration}.parquet"
        path.write_bytes(repo.files[f"data/iteration-{iteration}.parquet"])
        tables.append(pyarrow.parquet.read_table(path).to_pylist())
    assert [len(rows) for rows in tables] == [10, 10]
    lines = (run.path.parent / "mine.jsonl").read_text(encoding="utf-8").splitlines()
    source = {row["prompt"]: row["completion"] for row in map(json.loads, lines)}
    renderer = prepare(recorded_config(run), template_date(run)).renderer
    for iteration, rows in enumerate(tables):
        generated = read_jsonl(run.iteration(iteration).generated(0))
        for row, pair in zip(rows, generated, strict=True):
            assert (row["id"], row["iteration"], row["ended"]) == (pair["record_id"], iteration, pair["ended"])
            [asked] = row["prompt"]
            assert asked["role"] == "user"
            assert row["chosen"] == [{"role": "assistant", "content": source[asked["content"]]}]
            answer = renderer.completion_text(pair["generated_ids"])
            assert row["rejected"] == [{"role": "assistant", "content": answer}]
            assert row["real"] == row["prompt"] + row["chosen"]
            assert row["generated"] == row["prompt"] + row["rejected"]
    card = repo.files["README.md"].decode()
    assert "<script" not in card
    assert yaml.safe_load(card.split("---\n")[1])["configs"][0]["data_files"][0]["path"] == "data/*.parquet"


def test_xet_is_used_where_it_is_to_be_had(run: RunDir, hub: HubServer, tmp_path: Path) -> None:
    """The client's own store in a folder, in the place of the real one; and no store at all."""
    push = Pusher(tmp_path, {**hub.environment(), "HF_HUB_DISABLE_XET": "0"})
    hub.xet_store = f"local://{tmp_path / 'store'}"
    done = push(run, "me/mine")
    assert done.code == 0, done.err
    assert hub.repos["model", "me/mine"].lfs == {WEIGHTS: sha256_of(run.iteration(1).adapter / WEIGHTS)}
    assert hub.count("PUT /lfs/") == 0

    hub.xet_store = None
    done = push(run, "me/other")
    assert done.code == 1
    said = done.err.splitlines()[-1]
    assert said.startswith("error: me/other: the upload failed (")
    assert "404 Not Found" in said
    assert said.endswith("; the same command goes on where it stopped")
    assert "Traceback" not in done.err
    push.close()


# --- one clear line ---


def refusal(done: Answer) -> str:
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    return done.err.removeprefix("error: ").strip()


@pytest.mark.parametrize("what", ["adapter", "merged"])
def test_nobody_is_logged_in(what: str, run: RunDir, hub: HubServer, push: Pusher, tmp_path: Path) -> None:
    """It is told before anything is made; a look at what would be uploaded needs no login."""
    copy = RunDir(Path(shutil.copytree(run.path, tmp_path / "run")))
    said = refusal(push(copy, "me/mine", "--what", what, token=""))
    assert said == "me/mine: not logged in to the Hub; run `hf auth login`, or set HF_TOKEN"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert hub.repos == {}
    assert push(copy, "me/mine", "--dry-run", token="").code == 0


def test_a_token_that_the_hub_does_not_know_is_not_shown(run: RunDir, push: Pusher) -> None:
    done = push(run, "me/mine", token="hf_unknownSecret")
    assert "unknownSecret" not in done.out + done.err
    assert refusal(done) == (
        "me/mine: the Hub does not accept the token (HTTP 401: Invalid username or password.); "
        "set HF_TOKEN anew, or unset it and run `hf auth login`"
    )


def test_a_wrong_token_of_a_login_is_mended_by_another_login(run: RunDir, push: Pusher) -> None:
    kept = push.home / "token"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("hf_unknownSecret", encoding="ascii")
    said = refusal(push(run, "me/mine", token=""))
    kept.unlink()
    assert said.endswith("(HTTP 401: Invalid username or password.); run `hf auth login` again")


@pytest.mark.parametrize("token", ["hf_bent\x0bSecret", "hf_bentéSecret"])
def test_a_token_that_cannot_be_sent_is_not_shown(token: str, run: RunDir, push: Pusher) -> None:
    done = push(run, "me/mine", token=token)
    assert "Secret" not in done.out + done.err
    assert refusal(done) == (
        "me/mine: the token has characters that no token has; set HF_TOKEN anew, or unset it and run `hf auth login`"
    )


def test_a_name_that_is_not_ones_own(run: RunDir, hub: HubServer, push: Pusher) -> None:
    hub.unwritable.add("them")
    assert refusal(push(run, "them/theirs")) == (
        "them/theirs: the token may not write there (HTTP 403: You don't have the rights to create a model under this "
        "namespace); take one with write access, or a repository of your own"
    )


def test_private_is_not_promised_of_what_is_public(run: RunDir, hub: HubServer, push: Pusher) -> None:
    assert push(run, "me/mine", "--iteration", "0").code == 0
    before = dict(hub.repos["model", "me/mine"].files)
    said = refusal(push(run, "me/mine", "--private"))
    assert said.startswith("me/mine is there already and public, so --private would not hold; nothing was uploaded")
    assert hub.repos["model", "me/mine"].files == before


def test_a_connection_that_breaks(run: RunDir, hub: HubServer, push: Pusher) -> None:
    hub.fail("POST /api/repos/create", status=None)
    assert refusal(push(run, "me/mine")) == (
        "me/mine: the Hub can't be reached (Server disconnected without sending a response.); check the connection, "
        "then the same command goes on where it stopped"
    )


def test_offline(run: RunDir) -> None:
    """As the tests run: the client was told so when it was imported."""
    upload = make_upload(run, "me/mine", content="adapter", iteration="last", say=lambda _: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        for ask in (lambda: send(upload, private=False), lambda: check_login("me/mine")):
            with pytest.raises(QspinError) as caught:
                ask()
            assert str(caught.value) == (
                "me/mine: HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or look with --dry-run"
            )


def test_what_a_server_says_is_one_line_without_signatures() -> None:
    error = RuntimeError(f"bad\nthing at https://store/x?{SIGNATURE}&y=1 \x1b[31mred")
    assert _explain(error) == (
        "the upload failed (bad thing at https://store/x [31mred); the same command goes on where it stopped"
    )


# --- what would be uploaded ---


@pytest.mark.parametrize("content", ["adapter", "dataset"])
def test_a_dry_run_writes_all_and_sends_nothing(content: Content, run: RunDir, hub: HubServer, push: Pusher) -> None:
    options = ["--dataset"] if content == "dataset" else []
    done = push(run, "me/mine", "--dry-run", *options)
    assert done.code == 0, done.err
    assert done.err == ""
    upload = make_upload(run, "me/mine", content=content, iteration="last", say=lambda _: None)
    assert upload.folder == run.path.with_name("run-push") / f"{content}-1"
    assert re.findall(r"^ *[\d,]+ bytes  (.*)$", done.out, re.MULTILINE) == list(upload.files)
    assert {path.relative_to(upload.folder).as_posix() for path in upload.folder.rglob("*") if path.is_file()} == {
        *upload.files
    }
    assert hub.requests == [], "a base in a folder has no card to ask for"
    staged = [path for path in run.path.with_name("run-push").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in staged)


def test_a_stray_file_is_not_uploaded(run: RunDir, hub: HubServer, push: Pusher) -> None:
    upload = make_upload(run, "me/mine", content="adapter", iteration="0", say=lambda _: None)
    (upload.folder / ".env").write_text("secret")
    done = push(run, "me/mine", "--iteration", "0")
    (upload.folder / ".env").unlink()
    assert done.code == 0, done.err
    assert ".env" not in hub.repos["model", "me/mine"].files


def test_merged_weights_are_published_with_their_check(run: RunDir, hub: HubServer, push: Pusher) -> None:
    assert push(run, "me/whole", "--what", "merged", "--dry-run").code == 0
    folder = run.path.with_name("run-push") / "merged-1"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    done = push(run, "me/whole", "--what", "merged")
    assert done.code == 0, done.err
    assert (folder / "model.safetensors").stat().st_mtime_ns == written, "merged once"
    repo = hub.repos["model", "me/whole"]
    repo.files["model-00002-of-00002.safetensors"] = b"of a larger model"
    check = read_json(folder / "merge-check.json")
    write_json(folder / "merge-check.json", check | {"adapter": "another run's"})
    told = folder / "merge-check.json"
    manifest = read_json(folder / "manifest.json")
    manifest[told.name] = {"bytes": told.stat().st_size, "sha256": sha256_of(told)}
    write_json(folder / "manifest.json", manifest)
    assert push(run, "me/whole", "--what", "merged").code == 0
    assert read_json(folder / "merge-check.json") == check, "merged anew"
    assert "model-00002-of-00002.safetensors" not in repo.files
    assert {"README.md", "config.yaml", "template.jinja", "config.json", "tokenizer.json"} <= set(repo.files)
    assert not {"manifest.json", "merge-check.json"} & set(repo.files)
    assert not any(b"alert(1)" in content for content in repo.files.values()), "no held-out prompt"
    assert not any(str(run.path.parent).encode() in content for content in repo.files.values()), "no path"
    assert repo.lfs["model.safetensors"] == sha256_of(folder / "model.safetensors")
    card = repo.files["README.md"].decode()
    assert f"| NLL as published, nats a token | {check['nll_exported']:.4f} |" in card
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "transformers"
    transformers.AutoModelForCausalLM.from_pretrained(folder)


def test_merged_weights_take_the_place_of_an_adapter(run: RunDir, hub: HubServer, push: Pusher, tmp_path: Path) -> None:
    assert push(run, "me/mine", "--iteration", "0").code == 0
    assert push(run, "me/mine", "--what", "merged").code == 0
    files = hub.repos["model", "me/mine"].files
    assert not [name for name in files if name.startswith("adapter")]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    merged = load_file(run.path.with_name("run-push") / "merged-1" / "model.safetensors")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in merged.items())


# --- the licence of the base ---


def test_the_licence_is_that_of_the_bases_card(run: RunDir, hub: HubServer, push: Pusher, tmp_path: Path) -> None:
    hub.cards["some/base-7b"] = {"license": "other", "license_name": "theirs", "license_link": "LICENSE.md"}
    hub.cards[IN_PACKAGE["name"]] = {"license": "apache-2.0"}
    hub.cards["some/bare"] = {"tags": ["x"]}
    link = f"https://huggingface.co/some/base-7b/blob/{ON_HUB['revision']}/LICENSE.md"
    wanted: list[tuple[dict[str, Any], dict[str, str]]] = [
        (ON_HUB, {"license": "other", "license_name": "theirs", "license_link": link}),
        (IN_PACKAGE, {"license": "apache-2.0"}),
        ({**ON_HUB, "name": "some/bare"}, {}),
        ({**ON_HUB, "name": "some/unknown"}, {}),
        (IN_FOLDER, {}),
    ]
    other = RunDir(Path(shutil.copytree(run.path, tmp_path / "run")))
    record = read_json(other.record)
    for base, licence in wanted:
        write_json(other.record, {**record, "base": base})
        done = push(other, "me/mine", "--dry-run")
        assert done.code == 0, done.err
        card = (tmp_path / "run-push" / "adapter-1" / "README.md").read_text()
        found = yaml.safe_load(card.split("---\n")[1])
        assert {key: value for key, value in found.items() if key.startswith("license")} == licence
        told = "note: the base's licence could not be had; the card says to look it up" in done.out
        assert told == (licence == {})
