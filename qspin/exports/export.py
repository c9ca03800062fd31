"""A finished iteration as something to use elsewhere: an adapter, a merged model, a GGUF file, a folder for Ollama.

    export(Trained(run_dir, index), to="merged-16bit", out=out, onto="original", dtype=None)

An adapter was trained on the base's 4-bit weights. Merged onto the original 16-bit ones it is a slightly different
model, often a better one; merged onto the dequantised ones it is the trained model exactly. Whatever is written is
loaded again, by plain transformers, and compared with the trained model on held-out rows: `merge-check.json`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import transformers

from qspin.base import load_model_config, load_tokenizer, read_gguf, stop_tokens, token_ids
from qspin.errors import QspinError
from qspin.exports.compare import CHECK, Trained, compared, read_exported
from qspin.exports.gguf_file import KINDS, check_quantizer, check_supported, file_size, quantize_file, write_gguf
from qspin.exports.gguf_vocabulary import Vocabulary
from qspin.exports.merge import Dequantised, Merged, write_safetensors
from qspin.exports.ollama import modelfile
from qspin.exports.targets import Onto, Target
from qspin.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    check_place,
    commit_folder,
    existing,
    read_plain_json,
    write_json,
    write_plain_json,
    write_text,
)
from qspin.fitting.memory import OutOfMemory, free_bytes, refusals_told
from qspin.four_bits import nf4
from qspin.prepare import Speech
from qspin.records import Message
from qspin.run_dir import check_outside

OFFLOAD = "offload"  # weights that memory did not hold while the exported model was compared
Q4 = "q4_k_m"
GGUF = (*KINDS, Q4)
DTYPES: dict[Target, tuple[str, ...]] = {  # target → what --dtype may name
    "adapter": (),
    "merged-16bit": ("float32",),
    "merged-4bit": (),
    "gguf": GGUF,
    "ollama": GGUF,
}

Say = Callable[[str], None]


def export(
    trained: Trained,
    *,
    to: Target,
    out: Path,
    onto: Onto = "original",
    dtype: str | None = None,
    say: Say = lambda _text: None,
) -> Path:
    """Write an iteration's policy into a new folder, whole or not at all; `say` hears of what is being done.

    `dtype` is what the weights are written in: by default the base's own, and f16 in a GGUF.

    Raises:
        QspinError: an option, the run or its base does not fit; nothing is written then.
    """
    _check_options(to, onto, dtype)
    _check_place(out)
    _ = trained.adapter  # a damaged one is told before the base is loaded
    try:
        with commit_folder(out) as folder, refusals_told():
            if to == "adapter":
                _write_adapter(trained, folder)
            else:
                _Export(trained, to, onto, dtype, say).write(folder)
    except OutOfMemory as error:
        raise QspinError(f"out of memory ({error}); close other programs and export again") from None
    return out


def _check_options(to: Target, onto: Onto, dtype: str | None) -> None:
    if to not in DTYPES:
        raise QspinError(f"--to: there is no {to!r}; there are {', '.join(DTYPES)}")
    if onto not in get_args(Onto):
        raise QspinError(f"--onto: there is no {onto!r}; there are {' and '.join(get_args(Onto))}")
    if to == "adapter" and onto != "original":
        raise QspinError("--onto: an adapter is merged into nothing; leave it out")
    if dtype is not None and dtype not in DTYPES[to]:
        raise QspinError(f"--dtype: {to} is not written in {dtype!r}; it takes {', '.join(DTYPES[to]) or 'none'}")


def _check_place(out: Path) -> None:
    if os.path.lexists(out):  # a link that leads nowhere as well
        raise QspinError(f"--out: {out} is there already; name a new folder")
    check_place(out, "name another folder")
    check_outside(out)


def _check_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(existing(folder)).free
    if need > free:
        raise QspinError(f"--out: {need:,} bytes are needed in {folder.parent}, {free:,} are free; name another disk")


def _write_adapter(trained: Trained, folder: Path) -> None:
    """PEFT's two files and the tokenizer. The base is named by its id, never by a path of this machine."""
    shutil.copy(trained.adapter / ADAPTER_WEIGHTS, folder)
    name = trained.speech.base.name
    content = read_plain_json(trained.adapter / ADAPTER_CONFIG) | {"base_model_name_or_path": name}
    write_text(folder / ADAPTER_CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n")
    _save_tokenizer(trained.speech, folder)


def _save_tokenizer(speech: Speech, folder: Path) -> None:
    """With the chat template that was trained on."""
    tokenizer = load_tokenizer(speech.base)
    tokenizer.chat_template = speech.renderer.portable_template
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True, slots=True)
class _Gguf:
    """A GGUF file but for its weights."""

    file: str
    architecture: dict[str, Any]
    vocabulary: Vocabulary
    modelfile: str | None


class _Export:
    """One merged model, from the trained one to its files and the comparison of both."""

    def __init__(self, trained: Trained, to: Target, onto: Onto, dtype: str | None, say: Say) -> None:
        self.trained, self.speech, self.base = trained, trained.speech, trained.speech.base
        self.to, self.onto, self.dtype, self.say = to, onto, dtype, say

    def write(self, folder: Path) -> None:
        trained = self.trained
        self._check_mergeable()
        gguf = self._describe_gguf() if self.to in {"gguf", "ollama"} else None
        self.say(f"{self.base.name}, iteration {trained.index}: the trained model on {len(trained.rows)} held-out rows")
        self._check_base()
        merged = self.merged()
        _check_room(folder, self.need(merged))
        assert trained.reading  # before the weights of another model are in memory
        self.say(f"merging onto the {self.onto} weights: {self.to}")
        if gguf is not None:
            exported = self.write_gguf(merged, gguf, folder)
        elif self.to == "merged-4bit":
            exported = self.write_4bit(merged, folder)
        else:
            exported = self.write_16bit(merged, folder)
        self.say("the exported model on the same rows")
        reading = read_exported(exported, trained)
        del exported
        shutil.rmtree(folder / OFFLOAD, ignore_errors=True)
        about = {"to": self.to, "iteration": trained.index, "base": trained.record["base"]}
        about |= {"onto": self.onto, "dtype": self.dtype}
        write_json(folder / CHECK, about | compared(trained, reading))

    def _check_mergeable(self) -> None:
        if getattr(load_model_config(self.base), "quantization_config", None) is not None:
            raise QspinError(
                f"--to: {self.base.name} came in 4 bits, which nothing can be merged onto; export the adapter "
                "(--to adapter), which fits the 16-bit model that it was made of"
            )

    def _check_base(self) -> None:
        if self.trained.weights.base_hash == self.trained.record["base_hash"]:
            return
        told = (
            f"the 4-bit weights of {self.base.name} made here are not those that {self.trained.run_dir.path} was "
            "trained on (another device, or version of bitsandbytes)"
        )
        if self.onto == "dequantised":
            raise QspinError(f"--onto: {told}; export where it was trained, or --onto original")
        self.say(f"note: {told}; the comparison is with the adapter on the weights made here")

    def merged(self) -> Merged:
        weights, onto = self.trained.weights, None
        if self.onto == "dequantised":
            onto = Dequantised(
                weights.quantised, weights.dtype, self.trained.config.model.double_quant, self.trained.device
            )
        wide = self.dtype == "float32" or self.to in {"gguf", "ollama"}  # whose types are made from fp32
        merged = Merged(
            self.base.weights_folder(),
            self.trained.adapter,
            tied=weights.tied,
            renamed=weights.renamed,
            onto=onto,
            dtype=torch.float32 if wide else None,
        )
        defaults = {"merged-16bit": str(merged.main_dtype).removeprefix("torch."), "merged-4bit": "nf4"}
        self.dtype = self.dtype or defaults.get(self.to, "f16")
        return merged

    def need(self, merged: Merged) -> int:
        """Bytes of disk, what is only passed through included."""
        if self.to in {"gguf", "ollama"}:
            return file_size(merged, "f16") * 3 // 2 if self.dtype == Q4 else file_size(merged, str(self.dtype))
        size = sum(map(merged.size, merged.names))
        return size * 3 // 2 if self.to == "merged-4bit" else size

    def write_16bit(self, merged: Merged, folder: Path) -> Any:
        write_safetensors(merged, folder)
        self._write_config(merged.base, folder)
        self._write_beside(merged.base, folder)
        return _load(folder)

    def write_4bit(self, merged: Merged, folder: Path) -> Any:
        """Merged in 16 bits, then quantised again and saved by transformers."""
        whole = folder / "16bit"
        whole.mkdir()
        write_safetensors(merged, whole)
        self._write_config(merged.base, whole)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            whole,
            dtype="auto",
            device_map={"": self.trained.device},
            quantization_config=nf4(self.trained.config.model, merged.main_dtype),
        )
        model.generation_config = transformers.GenerationConfig()  # the base's may be refused, and is written below
        model.save_pretrained(folder)
        del model
        shutil.rmtree(whole)
        self._write_generation_config(merged.base, folder)
        self._write_beside(merged.base, folder)
        return _load(folder)

    def write_gguf(self, merged: Merged, gguf: _Gguf, folder: Path) -> Any:
        path = folder / gguf.file
        name = f"{path.stem}, qspin iteration {self.trained.index}"
        if self.dtype == Q4:
            whole = path.with_suffix(".f16")
            write_gguf(whole, merged, gguf.architecture, gguf.vocabulary, name=name, kind="f16")
            quantize_file(whole, path)
            whole.unlink()
        else:
            write_gguf(path, merged, gguf.architecture, gguf.vocabulary, name=name, kind=str(self.dtype))
        if gguf.modelfile is not None:
            (folder / "Modelfile").write_text(gguf.modelfile, encoding="utf-8")
        return _load_gguf(path, load_model_config(self.base).get_text_config(), sum(map(merged.size, merged.names)))

    def _describe_gguf(self) -> _Gguf:
        """All but the weights; what can't be written is told before any work is done."""
        architecture = load_model_config(self.base).get_text_config()
        vocabulary = self._vocabulary(architecture)
        check_supported(architecture.to_dict(), vocabulary)
        if self.dtype == Q4:
            check_quantizer()
        # in the Modelfile as well, where a folder's name could say more than a name
        name = re.sub(r"[^\w.-]+", "_", self.base.name.rpartition("/")[2])
        file = f"{name}-{self.dtype or 'f16'}.gguf"
        text = None
        if self.to == "ollama":
            stops = [self._token(token) for token in sorted(self.speech.stop_ids)]
            text = modelfile(file, lambda messages: self._ollama_prompt(vocabulary, messages), stops)
        return _Gguf(file, architecture.to_dict(), vocabulary, text)

    def _write_config(self, base: Path, folder: Path) -> None:
        config = read_plain_json(base / "config.json")
        config.pop("_name_or_path", None)  # where someone had it once
        if self.dtype == "float32":
            config["torch_dtype" if "torch_dtype" in config else "dtype"] = "float32"
        write_plain_json(folder / "config.json", config)
        self._write_generation_config(base, folder)

    def _write_generation_config(self, base: Path, folder: Path) -> None:
        """The base's own, which stops at the tokens that training stopped at."""
        path = base / "generation_config.json"
        config = read_plain_json(path) if path.is_file() else {}
        config.pop("_from_model_config", None)  # or transformers would make another
        config["eos_token_id"] = sorted(self.speech.stop_ids)
        write_plain_json(folder / "generation_config.json", config)

    def _write_beside(self, base: Path, folder: Path) -> None:
        """The tokenizer; and how images become numbers, of a base that takes them."""
        _save_tokenizer(self.speech, folder)
        for path in base.glob("*processor_config.json"):
            shutil.copy(path, folder)

    def _vocabulary(self, architecture: Any) -> Vocabulary:
        tokenizer, renderer = load_tokenizer(self.base), self.speech.renderer
        asked = [Message("user", "?"), Message("assistant", "!"), Message("user", "?")]
        prompt = renderer.prompt_ids(asked)
        ends = stop_tokens(self.base) or token_ids(architecture.eos_token_id)
        bos = architecture.bos_token_id
        return Vocabulary(
            tokenizer=json.loads(tokenizer.backend_tokenizer.to_str()),
            template=renderer.portable_template,
            bos=bos,
            eos=renderer.end_of_turn if renderer.end_of_turn in ends or not ends else ends[0],
            end_of_turn=renderer.end_of_turn,
            unknown=tokenizer.unk_token_id,
            padding=architecture.pad_token_id,
            # as the template does: chats then read the same, whoever writes it; some models' BOS begins every turn
            add_bos=prompt[0] == bos and prompt.count(bos) == 1,
        )

    def _token(self, token: int | None) -> str:
        return str(load_tokenizer(self.base).convert_ids_to_tokens(token))

    def _ollama_prompt(self, vocabulary: Vocabulary, messages: Sequence[Message]) -> str:
        text = self.speech.renderer.prompt_text(messages)
        return text.removeprefix(self._token(vocabulary.bos)) if vocabulary.add_bos else text


def _load(folder: Path) -> Any:
    """As anyone would; what memory does not hold stays on disk."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map="auto", offload_folder=folder / OFFLOAD
    )


def _load_gguf(path: Path, architecture: Any, size: int) -> Any:
    """In fp32, as llama.cpp computes on a CPU, if memory holds these bytes (twice while loading), else in bfloat16."""
    dtype = torch.float32 if 2 * size < free_bytes(torch.device("cpu")) else torch.bfloat16
    # the configuration that transformers reads from a GGUF lacks Llama's biases and Llama 3's rope
    return read_gguf(path, config=architecture, dtype=dtype)
