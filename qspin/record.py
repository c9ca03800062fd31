"""The run's record, run.json: what the run is a function of. A folder is only ever continued as the same run."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

import qspin
from qspin.base import Base
from qspin.chat import Renderer
from qspin.chat_template import UnfitError
from qspin.config import RunConfig, changed_results, dump_config
from qspin.data import LeftOut
from qspin.errors import QspinError
from qspin.files import remove, write_json, write_text
from qspin.fitting.memory import OutOfMemory, refusals_told
from qspin.layers.backends import unsloth_missing
from qspin.model import SlotModel
from qspin.prepare import Prepared, Speech, find_speech, prepare, write_rejects
from qspin.processes.workers import ALONE, Crew
from qspin.records import Message
from qspin.run_dir import RunDir

ORIGINS = {"package": "the installed package", "folder": "the folder", "hub": "the hub's"}  # of a base: where from
_SPELT = Message(
    "user",
    "The quick brown fox jumps over the lazy dog, and asks: why is the sky blue, what is 1,234 times 56, who wrote "
    "this program?\n\ndef answer(question):\n    return sorted(question.split())[0]\n\nPlease explain it in one "
    "sentence.",
)
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "tokenizers", "safetensors")


def template_date(run_dir: RunDir) -> datetime.date:
    """The date that this run tells its template: today for a new run, then always the same."""
    if run_dir.record.is_file():
        return datetime.date.fromisoformat(run_dir.read_record()["template_date"])
    return datetime.date.today()


def prepare_run(
    config: RunConfig, run_dir: RunDir, *, keep_rejects: bool, date: datetime.date | None = None
) -> Prepared:
    """What `prepare` makes for a run's folder; rows that a run stops at are listed where one that goes on lists those
    it leaves out.

    Args:
        date: for the template of a new run, if not today.
    """
    try:
        date = date if date and not run_dir.record.is_file() else template_date(run_dir)
        return prepare(config, date, commit_of(run_dir, config))
    except LeftOut as error:
        if not keep_rejects or run_dir.record.is_file():
            raise
        with run_dir.lock():
            write_rejects(run_dir.rejects, error.rejects)
        raise QspinError(f"{error}; all that were left out: {run_dir.rejects}") from None


def commit_of(run_dir: RunDir, config: RunConfig) -> str | None:
    """The commit that the run's base was at when it began, where it is a hub id: its branch may have moved since."""
    if not run_dir.record.is_file():
        return None
    record = run_dir.read_record()
    model = record["config"]["model"]
    asked_alike = (model["id"], model["revision"]) == (config.model.id, config.model.revision)
    commit: str | None = record["base"].get("commit") if asked_alike else None
    return commit


def recorded_speech(run_dir: RunDir, config: RunConfig) -> Speech:
    """How one talks with the run's base, which must be had from where the run had it, with the same template.

    Raises:
        QspinError: it can't be had, or is another.
    """
    speech = find_speech(config, template_date(run_dir), commit_of(run_dir, config))
    record = run_dir.read_record()
    was, found = (next(kind for kind in ORIGINS if kind in origin) for origin in (record["base"], speech.base.origin))
    if was != found:
        raise QspinError(
            f"model.id: {run_dir.path} was made with {ORIGINS[was]} {record['base'][was]}, and here {config.model.id} "
            f"is {ORIGINS[found]}; bring the old one back"
        )
    check_input(run_dir, "chat.template", speech.renderer.template_hash)
    _refuse_other_config(record, speech.base, run_dir)
    said = {"end_of_turn": speech.renderer.end_of_turn, "stop_ids": sorted(speech.stop_ids)}
    said["spelling"] = _spelling(speech.renderer)
    if any(record.get(key, found) != found for key, found in said.items()):  # spelling: runs of before did not tell
        raise QspinError(
            f"model.id: the tokens of {speech.base.name}, or those that end an answer, are not what {run_dir.path} "
            "began with, so its files, or transformers or tokenizers that read them, have changed; bring the old ones "
            "back"
        )
    return speech


def _spelling(renderer: Renderer) -> str:
    """SHA-256 of what a known text is as tokens, for where the run's rows, whose tokens tell more, are not read."""
    try:
        return hashlib.sha256(repr(renderer.prompt_ids([_SPELT])).encode()).hexdigest()
    except UnfitError:  # of a vocabulary where one of these characters is a control token
        return ""


def check_input(run_dir: RunDir, name: str, found: str) -> None:
    """Raises a QspinError: a file that a setting names is another than when the run began, by its hash."""
    if run_dir.read_record()["inputs"][name] != found:
        raise QspinError(f"{name}: its content is not what {run_dir.path} began with; bring it back")


def open_run(prepared: Prepared, run_dir: RunDir) -> int:
    """Record a new run, or check that an old one is continued as what it is; the number of threads to compute with.

    Much shows only as the base is loaded: a setting that it has no use for, too little memory or disk. A run that made
    nothing is as good as none, so the record is written anew, and the setting may be put right in the same folder.

    Raises:
        QspinError: settings that define the result, or the data, differ from the record.
    """
    if run_dir.record.is_file() and run_dir.made():
        record = run_dir.read_record()
        _refuse_changes(record, prepared, run_dir)
    else:
        record = _new_record(prepared)
        write_json(run_dir.record, record)
    if prepared.config.chat.template is not None:
        write_text(run_dir.template, prepared.renderer.template)
    write_text(run_dir.config, dump_config(_from_anywhere(prepared.config, prepared.base, run_dir)))
    if prepared.config.chat.template is None:  # one that made nothing may have had a template
        remove(run_dir.template)
    write_rejects(run_dir.rejects, prepared.rejects)
    threads: int = record["threads"]
    return threads


def _from_anywhere(config: RunConfig, base: Base, run_dir: RunDir) -> RunConfig:
    """With whole paths to the files that it names, as what is done with the run later may be done in another folder.
    The template is the run's own copy, and found beside the configuration wherever both are moved."""
    data, template, adapter = config.data, config.chat.template, config.model.init_adapter
    sources = {"source": data.source, "heldout_source": data.heldout_source}
    files = {
        name: str(Path(source).absolute())
        for name, source in sources.items()
        if source and os.path.isfile(source)  # noqa: PTH113 (Path.is_file raises)
    }
    chat = config.chat.model_copy(update={"template": template and run_dir.template.name})
    model = config.model.model_copy(
        update={
            "id": str(Path(base.location).absolute()) if "folder" in base.origin else config.model.id,
            "init_adapter": adapter and str(Path(adapter).absolute()),
        }
    )
    return config.model_copy(update={"model": model, "data": data.model_copy(update=files), "chat": chat})


def remembered(run_dir: RunDir, key: str, make: Callable[[], Any]) -> Any:
    """What the record holds under a key; made and recorded when first asked for."""
    record = run_dir.read_record()
    if key not in record:
        record[key] = make()
        write_json(run_dir.record, record)
    return record[key]


def load_recorded(run_dir: RunDir, base: Base, config: RunConfig, device: torch.device) -> SlotModel:
    """The 4-bit base as the run computed with it: its threads, and its kernels where they are to be had.

    Raises:
        QspinError: it can't be loaded, or does not fit into memory.
    """
    record = run_dir.read_record()
    torch.set_num_threads(record["threads"])  # 16-bit rounding and the constants of NF4 depend on it
    backend = record.get("backend", "transformers")  # a run that was cut off before it chose has none
    if unsloth_missing(device):  # another machine's kernels: the same within rounding
        backend = "transformers"
    try:
        with refusals_told():
            return SlotModel.load(base, config.model, config.lora, seed=config.seed, device=device, backend=backend)
    except OutOfMemory as error:
        raise QspinError(
            f"out of memory ({error}); close other programs: {base.name} does not fit beside them"
        ) from None


def verify_base(run_dir: RunDir, model: SlotModel, crew: Crew = ALONE) -> None:
    """The base's weights, in every process, are those that the run began with; the first call records them.

    Raises:
        QspinError: they are others.
    """
    found, others = crew.share("base_hash", [None] * (crew.count - 1), model.base_hash)
    if {remembered(run_dir, "base_hash", lambda: found), *others} != {found}:
        raise QspinError(
            f"model.id: the 4-bit weights of {model.base.name} are not those that {run_dir.path} began with "
            "(another model, revision, device or version of bitsandbytes); choose another --out"
        )
    remembered(run_dir, "quantised_by", lambda: _quantised_by(model))


def check_base(run_dir: RunDir, model: SlotModel, say: Callable[[str], None]) -> None:
    """The base's weights are those that the run was made with. Where they were quantised by something else, which may
    round otherwise, others are let by, and `say` hears of it.

    Raises:
        QspinError: they are others, and nothing but the base can have changed.
    """
    record = run_dir.read_record()
    if "base_hash" not in record or model.base_hash() == record["base_hash"]:  # without: it never came to its base
        return
    told = f"the 4-bit weights of {model.base.name} are not those that {run_dir.path} began with"
    if record.get("quantised_by") == _quantised_by(model):
        raise QspinError(f"model.id: {told}: the base's files have changed; bring the old ones back")
    say(
        f"{told} (another device, version of torch or of bitsandbytes, or other files of the base); what is said and "
        "measured here is of the weights made here"
    )


def _quantised_by(model: SlotModel) -> str:
    """All but a base's files that its bytes in memory depend on: how sums round, and the type of what is not NF4."""
    cuda = model.device.type == "cuda"
    device = torch.cuda.get_device_name(model.device) if cuda else f"CPU, {torch.backends.cpu.get_cpu_capability()}"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "bitsandbytes"))
    return f"{device}, {model.dtype}, {versions}"


def check_rows(run_dir: RunDir, prepared: Prepared) -> None:
    """Raises a QspinError: the data is not the run's, or reads otherwise, so its held-out rows are others."""
    record = run_dir.read_record()
    if record["data"]["fingerprint"] != prepared.fingerprint:
        raise QspinError(
            f"{prepared.config.data.source}: the rows are not those that {run_dir.path} began with; bring the old "
            "file back"
        )
    _refuse_other_tokens(record, prepared, run_dir)


def heldout_prompts(run_dir: RunDir, config: RunConfig, say: Callable[[str], None]) -> Sequence[str] | None:
    """The last user turn of each held-out row, read from the data again; None where it is not to be had as it was, and
    `say` hears why."""
    try:
        prepared = prepare_run(config, run_dir, keep_rejects=False)
        check_rows(run_dir, prepared)
    except QspinError as error:
        say(f"without prompts, which are read from the data: {error}")
        return None
    return prepared.heldout_prompts


def _new_record(prepared: Prepared) -> dict[str, Any]:
    return {
        "qspin": qspin.__version__,
        "config": prepared.config.model_dump(mode="json"),
        "base": {"name": prepared.base.name, "revision": prepared.base.revision, **prepared.base.origin},
        "data": {
            "format": prepared.format,
            "fingerprint": prepared.fingerprint,
            "tokens": prepared.tokens_hash,
            "train_rows": len(prepared.train),
            "heldout_rows": len(prepared.heldout),
            "rejected_rows": len(prepared.rejects),
        },
        "inputs": prepared.inputs,
        "template_date": prepared.date.isoformat(),
        "end_of_turn": prepared.renderer.end_of_turn,
        "stop_ids": sorted(prepared.stop_ids),
        "spelling": _spelling(prepared.renderer),
        # 16-bit rounding depends on how a product is shared out among threads
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def _versions() -> dict[str, str]:
    """Of the packages that compute."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def other_versions(run_dir: RunDir) -> str:
    """What computes here and is of another version than when the run began; empty if all are the same."""
    record, here = run_dir.read_record(), {"qspin": qspin.__version__, **_versions()}
    began = {"qspin": record["qspin"], **record["versions"]}
    return ", ".join(f"{name} {began[name]} -> {now}" for name, now in here.items() if began[name] != now)


def _refuse_changes(record: dict[str, Any], prepared: Prepared, run_dir: RunDir) -> None:
    try:
        recorded = RunConfig.model_validate(record["config"])
    except ValidationError:
        raise QspinError(
            f"{run_dir.record}: its settings are not those of this version of qspin ({qspin.__version__}; it was "
            f"written by {record['qspin']}); go on with that version, or choose another --out"
        ) from None
    folders = "folder" in record["base"] and "folder" in prepared.base.origin
    changes = changed_results(recorded, prepared.config, folder=folders)
    if changes:
        diff = "\n".join(f"  {key}: {old!r} -> {new!r}" for key, old, new in changes)
        raise QspinError(
            f"{run_dir.path} is a run with other settings; choose another --out, or go on with its own:\n{diff}"
        )
    if record["data"]["fingerprint"] != prepared.fingerprint:
        raise QspinError(
            f"{prepared.config.data.source}: the rows are not those that {run_dir.path} began with; "
            "choose another --out, or bring the old file back"
        )
    _refuse_other_config(record, prepared.base, run_dir)
    for name, ours in (("end_of_turn", prepared.renderer.end_of_turn), ("stop_ids", sorted(prepared.stop_ids))):
        if record[name] != ours:
            raise QspinError(
                f"model.id: answers of {prepared.base.name} end in other tokens than when {run_dir.path} began "
                f"({name}: {record[name]} -> {ours}), so its files have changed; bring them back, or choose another "
                "--out"
            )
    for name, found in prepared.inputs.items():
        if record["inputs"][name] != found:
            raise QspinError(
                f"{name}: its content is not what {run_dir.path} began with; choose another --out, or bring it back"
            )
    _refuse_other_tokens(record, prepared, run_dir)


def _refuse_other_config(record: dict[str, Any], base: Base, run_dir: RunDir) -> None:
    """The same weights: rope, the norms' epsilon and the like would be another model's from here on."""
    found = base.origin.get("config")
    if record["base"].get("config", found) == found:  # runs of before did not tell
        return
    mend = "bring the old one back"
    if record["base"]["folder"] != base.origin.get("folder"):  # which may be the same, moved
        mend = f"choose another --out if it is not {record['base']['folder']}, with which that began"
    raise QspinError(f"model.id: config.json of {base.name} is not what {run_dir.path} began with; {mend}")


def _refuse_other_tokens(record: dict[str, Any], prepared: Prepared, run_dir: RunDir) -> None:
    """The same texts: half of a run would be trained and measured on other tokens than the rest."""
    found = prepared.tokens_hash
    if record["data"].get("tokens", found) != found:  # runs of before did not tell
        raise QspinError(
            f"model.id: the rows are other tokens than when {run_dir.path} began, so {prepared.base.name}'s tokenizer, "
            "or transformers or tokenizers that read it, have changed; bring the old ones back"
        )
