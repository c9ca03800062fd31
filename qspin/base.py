"""Which base model: an installed package that carries one, a local folder, or a hub id; and its tokenizer.

base = find_base(config.model)
tokenizer = load_tokenizer(base)        # no weights are read
folder = base.weights()                 # the first time, a GGUF is dequantised into the cache
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import filelock
import httpx
import huggingface_hub
import torch
import transformers

from qspin.config import ModelConfig
from qspin.errors import QspinError
from qspin.files import commit_folder, full_disk_told, make_folder, sha256_of
from qspin.safe_text import at_home, redact_logs

# what a hub download raises when it can't be had; transformers wraps most of huggingface_hub's in OSError. The others
# are of files that hold something else than what they are named for.
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError)
GENERATION_CONFIG = "generation_config.json"
OF_SAVING = ("_name_or_path", "transformers_version")  # in a config.json: of how it came there, and nothing else


@dataclass(frozen=True, slots=True)
class Base:
    """Where a base model's files are, and the name it is known by."""

    name: str  # hub id where there is one, else the folder's name: never a path
    location: str  # a folder, or a hub id to download
    revision: str | None
    gguf: Path | None  # the file to dequantise
    origin: dict[str, str]  # for the run's record

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"gguf": None if self.gguf is None else str(self.gguf)}

    @staticmethod
    def from_json(value: dict[str, Any]) -> Base:
        return Base(**value | {"gguf": None if value["gguf"] is None else Path(value["gguf"])})

    def weights(self) -> str:
        """Folder or hub id with 16-bit safetensors."""
        return self.location if self.gguf is None else str(_dequantised_weights(self.gguf, self.origin))

    def weights_folder(self) -> Path:
        """The same as a folder, of a hub id in the hub's cache: weights, config.json, generation_config.json.

        Raises:
            QspinError: a file can't be had from the hub.
        """
        if Path(self.weights()).is_dir():
            return Path(self.weights())
        try:
            return Path(
                huggingface_hub.snapshot_download(
                    self.location, revision=self.revision, allow_patterns=["model*.safetensors*", "*config.json"]
                )
            )
        except (OSError, ValueError, httpx.HTTPError) as error:
            raise unreachable(self, error) from None


def find_base(config: ModelConfig) -> Base:
    """Look in the named package first, then for a local folder, else take a hub id.

    Raises:
        QspinError: neither a package, a folder nor a hub id is named, or the folder holds no model.
    """
    if config.package is not None:
        gguf = _gguf_of_package(config.package)
        if gguf is not None:
            version = importlib.metadata.version(config.package)
            origin = {"package": f"{config.package} {version}", "file": gguf.name, "sha256": sha256_of(gguf)}
            return Base(config.id, str(gguf.parent), None, gguf, origin)
    if not config.id:
        raise QspinError("model.id is not set: give --model a hub id or a local folder, or start from a preset")
    folder = at_home(config.id)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise QspinError(f"model.id: {folder} holds no config.json; name a folder saved with save_pretrained")
        origin = {"folder": folder.resolve().name, "config": _config_hash(folder / "config.json")}
        return Base(folder.resolve().name, str(folder), None, None, origin)
    if folder.is_file():
        raise QspinError(f"model.id: {folder} is a file; name a folder saved with save_pretrained, or a hub id")
    if config.id.count("/") != 1 or config.id.startswith((".", "/", "~")):
        raise QspinError(f"model.id: {config.id} is neither a folder here nor a hub id of the form owner/name")
    return _find_on_hub(config.id, config.revision)


def _config_hash(path: Path) -> str:
    """SHA-256 of what it says of how the model computes, which the weights don't tell; a hub id has a commit."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # told of in transformers' words as it is read
        return ""
    said = {key: config[key] for key in config if key not in OF_SAVING} if isinstance(config, dict) else config
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _find_on_hub(name: str, revision: str | None) -> Base:
    """A hub id at the commit that its revision means now; without a connection, at the commit in the cache.

    Asked here once, so that an id that can't be had is told at once: transformers would ask for each file, and try
    each five times.
    """
    try:
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise huggingface_hub.errors.OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
        commit = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=10, expand=["sha"]).sha
        return Base(name, name, commit, None, {"hub": name, "commit": str(commit)})
    except (OSError, httpx.HTTPError, huggingface_hub.errors.HFValidationError) as error:
        try:
            snapshot = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
        except (OSError, ValueError):
            raise unreachable(Base(name, name, revision, None, {}), error) from None
        return Base(name, str(snapshot), snapshot.name, None, {"hub": name, "commit": snapshot.name})


def load_tokenizer(base: Base) -> Any:
    """The base's tokenizer. Reads no weights."""
    return _load_described(base, transformers.AutoTokenizer)


def load_model_config(base: Base) -> Any:
    """The base's architecture, as a transformers configuration. Reads no weights."""
    return _load_described(base, transformers.AutoConfig)


def _load_described(base: Base, kind: Any) -> Any:
    try:
        if base.gguf is not None:
            return kind.from_pretrained(_description(base.gguf, base.origin), trust_remote_code=False)
        return kind.from_pretrained(base.location, revision=base.revision, trust_remote_code=False)
    except _LOAD_ERRORS as error:
        raise unreachable(base, error) from None


def stop_tokens(base: Base) -> tuple[int, ...]:
    """The stop tokens of the model's generation_config; the rest of that file is not ours to follow.

    Raises:
        QspinError: the file is damaged.
    """
    if base.gguf is not None:
        return ()
    try:
        generation = transformers.GenerationConfig.from_pretrained(base.location, revision=base.revision)
    except _LOAD_ERRORS as error:
        if isinstance(error, OSError) and not Path(base.location, GENERATION_CONFIG).is_file():  # many have none
            return ()
        raise unreachable(base, error) from None
    found = token_ids(generation.eos_token_id)
    if not all(isinstance(token, int) for token in found):
        raise QspinError(
            f"model.id: {base.location}: eos_token_id in {GENERATION_CONFIG} is {generation.eos_token_id!r}, no number "
            "of a token; mend the file"
        )
    return found


def token_ids(found: int | list[int] | None) -> tuple[int, ...]:
    """What a configuration calls EOS, which is one token, several or none."""
    return () if found is None else tuple(found) if isinstance(found, list) else (found,)


def unreachable(base: Base, error: Exception) -> QspinError:
    """One line for a base that can't be loaded."""
    first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if Path(base.location).is_dir():
        return QspinError(f"model.id: {base.location} can't be loaded: {first_line}")
    revision = f" at revision {base.revision}" if base.revision else ""
    return QspinError(
        f"model.id: {base.location}{revision} can't be had from the hub (offline, a wrong id, or a gated model that "
        f"needs `hf auth login`): {first_line}"
    )


def quiet_libraries() -> None:
    """transformers' warnings and bars speak of its own API; a download's bar stays."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    redact_logs(("huggingface_hub", "transformers"))


def read_gguf(path: Path, **options: Any) -> Any:
    """A model as transformers reads it from a GGUF file, without the bar that it draws past its own switch."""
    with contextlib.redirect_stderr(io.StringIO()):
        return transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, **options)


def cache_dir() -> Path:
    """$QSPIN_CACHE, else qspin's folder in the user's cache; a variable that is empty is as one that is not set.

    Raises:
        QspinError: it lies in a home folder that there is not.
    """
    named = os.environ.get("QSPIN_CACHE") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "qspin"))
    try:
        return Path(named).expanduser()
    except RuntimeError:
        raise QspinError(
            f"{named}: there is no such home folder to keep models in; name another folder in QSPIN_CACHE"
        ) from None


@contextlib.contextmanager
def cache_told() -> Iterator[None]:
    """Turn a refusal to write into the cache into a `QspinError`.

    Raises:
        QspinError: it can't be written to.
    """
    try:
        with full_disk_told(cache_dir()):
            yield
    except OSError as error:
        raise QspinError(
            f"QSPIN_CACHE: {cache_dir()} can't be written to ({error.strerror}); name another folder in QSPIN_CACHE"
        ) from None


def _gguf_of_package(package: str) -> Path | None:
    """The GGUF file that an installed package carries; the package itself is not imported."""
    try:
        spec = importlib.util.find_spec(package.replace("-", "_"))
    except (ModuleNotFoundError, ValueError):  # of a name with a point in it the first part is imported; an empty one
        return None
    if spec is None or spec.origin is None:
        return None
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    return files[0] if files else None


def _description(gguf: Path, origin: dict[str, str]) -> Path:
    """The GGUF's tokenizer and configuration in the cache: reading them from it takes seconds. Versions of
    transformers read them differently; 5.17 takes BOS for EOS, and no padding, so what the file says is put right."""

    def make(folder: Path) -> None:
        tokenizer, config = (
            kind.from_pretrained(gguf.parent, gguf_file=gguf.name)
            for kind in (transformers.AutoTokenizer, transformers.AutoConfig)
        )
        for name in ("bos_token", "eos_token", "pad_token"):
            if (token := getattr(config, f"{name}_id")) is not None:
                setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(token))
        for part in (tokenizer, config):
            part.save_pretrained(folder)

    return _made_once(_cached(gguf, origin) / f"description-2-{transformers.__version__}", make)


def _dequantised_weights(gguf: Path, origin: dict[str, str]) -> Path:
    """The GGUF's weights as 16-bit safetensors in the cache.

    `save_pretrained` refuses a model that was read from a GGUF, so its weights move into a fresh one.
    """

    def make(folder: Path) -> None:
        source = read_gguf(gguf, dtype=torch.bfloat16)
        plain = transformers.AutoConfig.from_pretrained(_description(gguf, origin))
        fresh = transformers.AutoModelForCausalLM.from_config(plain, dtype=torch.bfloat16)
        fresh.load_state_dict(source.state_dict())
        fresh.save_pretrained(folder)
        (folder / "ORIGIN.txt").write_text("".join(f"{key}: {value}\n" for key, value in origin.items()))

    return _made_once(_cached(gguf, origin) / "weights", make)


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache; of two processes that want it, one makes it and the other waits."""
    with contextlib.ExitStack() as held:
        with cache_told():  # before `make`, whose refusals are the model's
            if folder.is_dir():
                return folder
            make_folder(folder.parent)
            with tempfile.TemporaryFile(dir=folder.parent):
                pass
            held.enter_context(filelock.FileLock(folder.with_name(f".{folder.name}.lock")))
        if not folder.is_dir():
            with commit_folder(folder) as temporary:
                make(temporary)
    return folder


def _cached(gguf: Path, origin: dict[str, str]) -> Path:
    return cache_dir() / f"{gguf.stem}-{origin['sha256'][:16]}"
