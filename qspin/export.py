"""A finished iteration as something to use elsewhere: an adapter, a merged model, a GGUF file, a folder for Ollama.

    export(RunDir(path), to="merged-16bit", iteration="last", out=out, onto="original", dtype=None)

An adapter was trained on the base's 4-bit weights. Merged onto the original 16-bit ones it is a slightly different
model, often a better one; merged onto the dequantised ones it is the trained model exactly. Whatever is written is
loaded again, by plain transformers, and compared with the trained model on held-out rows: `merge-check.json`.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import ValidationError
from torch import Tensor

from qspin.base import Base, load_model_config, load_tokenizer, stop_tokens
from qspin.config import RunConfig
from qspin.errors import QspinError
from qspin.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    commit_folder,
    existing,
    read_json,
    read_plain_json,
    write_json,
    write_plain_json,
    write_text,
)
from qspin.generation import Request, generate
from qspin.gguf_file import KINDS, Vocabulary, check_quantizer, check_supported, file_size, quantize_file, write_gguf
from qspin.memory import OutOfMemory, free_bytes, refusals_told
from qspin.merge import Dequantised, Merged, write_safetensors
from qspin.model import SlotModel, load_adapter
from qspin.ollama import modelfile
from qspin.packing import pack_row
from qspin.players import chosen_iteration
from qspin.prepare import Prepared, prepare
from qspin.record import template_date
from qspin.records import Example, Message, Pair
from qspin.run_dir import RunDir

CHECK = "merge-check.json"
OFFLOAD = "offload"  # weights that memory did not hold while the exported model was compared
Q4 = "q4_k_m"
GGUF = (*KINDS, Q4)
DTYPES: dict[str, tuple[str, ...]] = {  # target → what --dtype may name
    "adapter": (),
    "merged-16bit": ("float32",),
    "merged-4bit": (),
    "gguf": GGUF,
    "ollama": GGUF,
}
ONTO = ("original", "dequantised")

ROWS = 64  # held-out rows compared, at most
COMPLETIONS = 3
PLACES = 128  # whose logits exist at once in fp32
MOST_NLL, MOST_ELSEWHERE = 0.05, 0.1  # a drift beyond is told aloud: nats a token; share of places

WARNING = (
    "WARNING: the exported model is another than the trained one, better or worse: the figures differ by more than "
    f"rounding. Compare the completions in {CHECK} before you use it; merged-16bit --onto dequantised --dtype float32 "
    "is the trained model exactly."
)

Say = Callable[[str], None]


def export(
    run_dir: RunDir,
    *,
    to: str,
    iteration: str,
    out: Path,
    onto: str = "original",
    dtype: str | None = None,
    say: Say = lambda _text: None,
) -> Path:
    """Write one iteration's policy into a new folder, whole or not at all; `say` hears of what is being done.

    `dtype` is what the weights are written in: by default the base's own, and f16 in a GGUF.

    Raises:
        QspinError: an option, the run or its base does not fit; nothing is written then.
    """
    _check_options(to, onto, dtype)
    index = chosen_iteration(run_dir, iteration)
    _check_place(out)
    config = _config(run_dir)
    try:
        with commit_folder(out) as folder, refusals_told():
            if to == "adapter":
                _write_adapter(run_dir, index, config, folder)
            else:
                _Export(run_dir, index, config, to, onto, dtype, say).write(folder)
    except OutOfMemory as error:
        raise QspinError(f"out of memory ({error}); close other programs and export again") from None
    return out


def drifted(check: dict[str, Any]) -> bool:
    """Whether the exported model is another than the trained one, by the figures of merge-check.json."""
    return bool(abs(check["nll_difference"]) > MOST_NLL or 1 - check["top1_agreement"] > MOST_ELSEWHERE)


def summary(check: dict[str, Any]) -> str:
    """The figures of merge-check.json in a line."""
    return (
        f"{check['rows']} held-out rows: NLL {check['nll_trained']:.3f} trained, {check['nll_exported']:.3f} exported "
        f"({check['nll_difference']:+.4f} nats a token); the same token likeliest at {check['top1_agreement']:.1%} "
        "of the places"
    )


def _check_options(to: str, onto: str, dtype: str | None) -> None:
    if to not in DTYPES:
        raise QspinError(f"--to: there is no {to!r}; there are {', '.join(DTYPES)}")
    if onto not in ONTO:
        raise QspinError(f"--onto: there is no {onto!r}; there are {' and '.join(ONTO)}")
    if dtype is not None and dtype not in DTYPES[to]:
        raise QspinError(f"--dtype: {to} is not written in {dtype!r}; it takes {', '.join(DTYPES[to]) or 'none'}")


def _check_place(out: Path) -> None:
    if out.exists():
        raise QspinError(f"--out: {out} is there already; name a new folder")
    parent = existing(out)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise QspinError(f"--out: {out} can't be made: no permission to write in {parent}")


def _check_room(folder: Path, need: int) -> None:
    free = shutil.disk_usage(existing(folder)).free
    if need > free:
        raise QspinError(
            f"--out: {need / 1e9:.1f} GB are needed in {folder.parent}, {free / 1e9:.1f} GB are free; name another disk"
        )


def _config(run_dir: RunDir) -> RunConfig:
    try:
        return RunConfig.model_validate(read_json(run_dir.record)["config"])
    except ValidationError:
        raise QspinError(
            f"{run_dir.record}: its settings are not those of this version of qspin; export with the version that "
            f"played ({read_json(run_dir.record)['qspin']})"
        ) from None


def _write_adapter(run_dir: RunDir, index: int, config: RunConfig, folder: Path) -> None:
    """PEFT's two files and the tokenizer. The base is named by its id, never by a path of this machine."""
    prepared = prepare(config, template_date(run_dir))
    source = run_dir.iteration(index).adapter
    shutil.copy(source / ADAPTER_WEIGHTS, folder)
    content = read_plain_json(source / ADAPTER_CONFIG) | {"base_model_name_or_path": prepared.base.name}
    write_text(folder / ADAPTER_CONFIG, json.dumps(content, indent=2, sort_keys=True) + "\n")
    _save_tokenizer(prepared, folder)


def _save_tokenizer(prepared: Prepared, folder: Path) -> None:
    """With the chat template that was trained on."""
    tokenizer = load_tokenizer(prepared.base)
    tokenizer.chat_template = prepared.renderer.portable_template
    tokenizer.save_pretrained(folder)


@dataclass(slots=True)
class _Reading:
    """What a model makes of held-out rows."""

    nll: float = 0.0  # nats of all real completions together
    tokens: int = 0
    likeliest: list[int] = field(default_factory=list)  # token at each place of them
    completions: list[str] = field(default_factory=list)  # greedy

    def add(self, blocks: Iterable[Tensor], targets: Sequence[int]) -> None:
        """`blocks` of logits, (n, V) each, one row for each target in turn."""
        at = 0
        for block in blocks:
            wanted = torch.tensor(targets[at : at + len(block)], device=block.device)
            logps = block.float().log_softmax(-1)
            self.nll -= float(logps.gather(1, wanted[:, None]).sum())
            self.likeliest += logps.argmax(-1).tolist()
            at += len(block)
        self.tokens += at


@dataclass(frozen=True, slots=True)
class _Gguf:
    """A GGUF file but for its weights."""

    file: str
    architecture: dict[str, Any]
    vocabulary: Vocabulary
    modelfile: str | None


class _Export:
    """One merged model, from the trained one to its files and the comparison of both."""

    def __init__(
        self, run_dir: RunDir, index: int, config: RunConfig, to: str, onto: str, dtype: str | None, say: Say
    ) -> None:
        self.run_dir, self.index, self.config = run_dir, index, config
        self.to, self.onto, self.dtype, self.say = to, onto, dtype, say
        self.record = read_json(run_dir.record)
        self.prepared = prepare(config, template_date(run_dir))
        if self.prepared.fingerprint != self.record["data"]["fingerprint"]:
            raise QspinError(
                f"{config.data.source}: the rows are not those that {run_dir.path} was trained on, so the export can't "
                "be compared with the trained model on its held-out rows; bring the old file back"
            )
        self.base: Base = self.prepared.base
        self.rows = self.prepared.heldout[:ROWS]
        self.adapter = run_dir.iteration(index).adapter
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def write(self, folder: Path) -> None:
        gguf = self._describe_gguf() if self.to in {"gguf", "ollama"} else None
        torch.set_num_threads(self.record["threads"])  # 16-bit rounding and the constants of NF4 depend on it
        self.say(f"{self.base.name}, iteration {self.index}: the trained model on {len(self.rows)} held-out rows")
        model = SlotModel.load(
            self.base, self.config.model, self.config.lora, seed=self.config.seed, device=self.device
        )
        self._check_base(model)
        merged = self.merged(model)
        _check_room(folder, self.need(merged))
        trained = self.read_trained(model)
        del model
        gc.collect()  # its layers refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(f"merging onto the {self.onto} weights: {self.to}")
        if gguf is not None:
            exported = self.write_gguf(merged, gguf, folder)
        elif self.to == "merged-4bit":
            exported = self.write_4bit(merged, folder)
        else:
            exported = self.write_16bit(merged, folder)
        self.say("the exported model on the same rows")
        reading = self.read_exported(exported)
        del exported
        shutil.rmtree(folder / OFFLOAD, ignore_errors=True)
        write_json(folder / CHECK, self.check(trained, reading))

    # --- the trained model ---

    @torch.no_grad()
    def read_trained(self, model: SlotModel) -> _Reading:
        """What the trained model makes of the rows."""
        model.set_adapter(load_adapter(self.adapter))
        reading = _Reading()
        for row in self.rows:
            packed = pack_row([Pair(row.record_id, 0, row.prompt_ids, row.real_ids, (), ended=True)], model.device)
            hidden = model.hidden(packed.input_ids, packed.position_ids, packed.layout)[packed.predictors]
            reading.add((model.logits(part) for part in torch.split(hidden, PLACES)), row.real_ids)
        answers = generate(
            model,
            [Request(row.prompt_ids, 0) for row in self.rows[:COMPLETIONS]],
            max_new_tokens=self.config.generation.max_new_tokens,
            temperature=0.0,
            top_p=1.0,
            width=COMPLETIONS,
            stop_ids=self.prepared.stop_ids,
            on_step=lambda _tokens, _rows: None,
        )
        reading.completions = [self.prepared.renderer.completion_text(answer.ids) for answer in answers]
        return reading

    def _check_base(self, model: SlotModel) -> None:
        if model.base_hash() == self.record["base_hash"]:
            return
        told = (
            f"the 4-bit weights of {self.base.name} made here are not those that {self.run_dir.path} was trained on "
            "(another device, or version of bitsandbytes)"
        )
        if self.onto == "dequantised":
            raise QspinError(f"--onto: {told}; export where it was trained, or --onto original")
        self.say(f"note: {told}; the comparison is with the adapter on the weights made here")

    # --- what is written ---

    def merged(self, model: SlotModel) -> Merged:
        onto = None
        if self.onto == "dequantised":
            onto = Dequantised(quantised_names(model), model.dtype, self.config.model.double_quant, self.device)
        wide = self.dtype == "float32" or self.to in {"gguf", "ollama"}  # whose types are made from fp32
        merged = Merged(
            self.base.weights_folder(),
            self.adapter,
            tied=tied_names(model),
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
        _save_tokenizer(self.prepared, folder)
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
            device_map={"": self.device},
            quantization_config=transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=self.config.model.double_quant,
                bnb_4bit_compute_dtype=merged.main_dtype,
            ),
        )
        model.save_pretrained(folder)
        del model
        shutil.rmtree(whole)
        self._write_generation_config(merged.base, folder)
        _save_tokenizer(self.prepared, folder)
        return _load(folder)

    def write_gguf(self, merged: Merged, gguf: _Gguf, folder: Path) -> Any:
        path = folder / gguf.file
        name = f"{path.stem}, qspin iteration {self.index}"
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
        file = f"{self.base.name.rpartition('/')[2]}-{self.dtype or 'f16'}.gguf"
        text = None
        if self.to == "ollama":
            stops = [self._token(token) for token in sorted(self.prepared.stop_ids)]
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
        config["eos_token_id"] = sorted(self.prepared.stop_ids)
        write_plain_json(folder / "generation_config.json", config)

    def _vocabulary(self, architecture: Any) -> Vocabulary:
        tokenizer, renderer = load_tokenizer(self.base), self.prepared.renderer
        asked = [Message("user", "?"), Message("assistant", "!"), Message("user", "?")]
        prompt = renderer.prompt_ids(asked)
        ends = stop_tokens(self.base) or _ids(architecture.eos_token_id)
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
        text = self.prepared.renderer.prompt_text(messages)
        return text.removeprefix(self._token(vocabulary.bos)) if vocabulary.add_bos else text

    # --- the exported model ---

    @torch.no_grad()
    def read_exported(self, model: Any) -> _Reading:
        """What the exported model makes of the rows."""
        model.generation_config = transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=self.config.generation.max_new_tokens,
            eos_token_id=sorted(self.prepared.stop_ids),
            pad_token_id=min(self.prepared.stop_ids),
        )
        device = self.device if hasattr(model, "hf_device_map") else torch.device("cpu")
        reading = _Reading()
        for row in self.rows:
            reading.add(_logits(model, row, device), row.real_ids)
        for row in self.rows[:COMPLETIONS]:
            prompt = torch.tensor([row.prompt_ids], device=device)
            ids = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))[0, len(row.prompt_ids) :]
            reading.completions.append(self.prepared.renderer.completion_text(ids.tolist()))
        return reading

    def check(self, trained: _Reading, exported: _Reading) -> dict[str, Any]:
        """merge-check.json."""
        same = sum(a == b for a, b in zip(trained.likeliest, exported.likeliest, strict=True))
        before, after = trained.nll / trained.tokens, exported.nll / exported.tokens
        return {
            "to": self.to,
            "iteration": self.index,
            "base": self.record["base"],
            "onto": self.onto,
            "dtype": self.dtype,
            "rows": len(self.rows),
            "nll_trained": before,
            "nll_exported": after,
            "nll_difference": after - before,
            "top1_agreement": same / trained.tokens,
            "completions": [
                {"prompt": prompt, "trained": old, "exported": new}
                for prompt, old, new in zip(
                    self.prepared.heldout_prompts, trained.completions, exported.completions, strict=False
                )
            ],
        }


def _load(folder: Path) -> Any:
    """As anyone would; what memory does not hold stays on disk."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map="auto", offload_folder=folder / OFFLOAD
    )


def _load_gguf(path: Path, architecture: Any, size: int) -> Any:
    """In fp32, as llama.cpp computes on a CPU, if memory holds these bytes (twice while loading), else in bfloat16."""
    dtype = torch.float32 if 2 * size < free_bytes(torch.device("cpu")) else torch.bfloat16
    # the configuration that transformers reads from a GGUF lacks Llama's biases and Llama 3's rope
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=architecture, dtype=dtype
    )


def _logits(model: Any, row: Example, device: torch.device) -> Iterator[Tensor]:
    ids = torch.tensor([[*row.prompt_ids, *row.real_ids]], device=device)
    count = len(row.real_ids)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits[0, :-1]  # (count, V)
    yield from torch.split(logits, PLACES)


def quantised_names(model: SlotModel) -> frozenset[str]:
    """Names of the weights that are in 4 bits, as the base's files call them."""
    named = model.peft_model.get_base_model().named_parameters()
    found = (name for name, parameter in named if getattr(parameter, "quant_state", None) is not None)
    return frozenset(name.replace(".base_layer.", ".") for name in found)


def tied_names(model: SlotModel) -> frozenset[str]:
    """Names of the embedding matrix and of the output layer, if they are one."""
    causal_lm = model.peft_model.get_base_model()
    ends = (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    if ends[0].weight is not ends[1].weight:
        return frozenset()
    return frozenset(f"{name}.weight" for name, module in causal_lm.named_modules() if module in ends)


def _ids(tokens: int | list[int] | None) -> tuple[int, ...]:
    return () if tokens is None else tuple(tokens) if isinstance(tokens, list) else (tokens,)
