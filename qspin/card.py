"""Cards for the Hub: a run's folder → README.md of a model or of a data set. Asks no network.

    text = model_card(run_dir, "me/model", content="adapter", iteration=1, licence=None, merge_check=None)

Whatever comes from data, from files' names or from the Hub goes through `plain` or the YAML writer, so that none of
it is read as markup.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import DatasetCardData, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from qspin import report
from qspin.config import RunConfig, changed_results, load_config
from qspin.errors import QspinError
from qspin.files import read_json, read_jsonl
from qspin.run_dir import RunDir
from qspin.sources import READERS

CONFIG, TEMPLATE = "config.yaml", "template.jinja"  # their names beside a card

HUB = "https://huggingface.co"
PAPER = "https://arxiv.org/abs/2401.01335"
CITATION = """\
@inproceedings{chen2024selfplay,
  title     = {Self-Play Fine-Tuning Converts Weak Language Models to Strong Language Models},
  author    = {Zixiang Chen and Yihe Deng and Huizhuo Yuan and Kaixuan Ji and Quanquan Gu},
  booktitle = {Proceedings of the 41st International Conference on Machine Learning},
  year      = {2024},
  url       = {https://arxiv.org/abs/2401.01335}
}"""


@dataclass(frozen=True, slots=True)
class Licence:
    """The base's licence in the Hub's terms."""

    id: str  # as apache-2.0, llama3.1 or other
    name: str | None  # of one that the Hub has no id for
    link: str | None
    source: str  # who says so, as a clause


@dataclass(frozen=True, slots=True)
class Example:
    """One pair to show: the last turn of a prompt, and both completions."""

    prompt: str
    real: str
    generated: str


def recorded_config(run_dir: RunDir) -> RunConfig:
    """What the run was made with; settings that change no result are as it was last started.

    Raises:
        QspinError: there is no run, or its config.yaml was changed by hand.
    """
    if not run_dir.record.is_file():
        raise QspinError(f"{run_dir.path} holds no run (no {run_dir.record.name}); name the --out of a qspin run")
    config = load_config(run_dir.config)
    changes = changed_results(load_config(None, read_json(run_dir.record)["config"]), config)
    if changes:
        keys = ", ".join(key for key, _, _ in changes)
        raise QspinError(f"{run_dir.config}: changed since the run was made ({keys}); put the old values back")
    return config


def recipe(config: RunConfig, record: Mapping[str, Any], iteration: int) -> RunConfig:
    """The configuration that makes the run again, without a path of this machine; the base at its commit."""
    model, chat, data = config.model, config.chat, config.data
    revision = record["base"].get("commit", model.revision)
    package = model.package if "package" in record["base"] else None
    model = model.model_copy(update={"revision": revision, "package": package, "init_adapter": None})
    if "folder" in record["base"]:
        model = model.model_copy(update={"id": ""})
    if chat.template is not None:
        chat = chat.model_copy(update={"template": TEMPLATE})
    sources = {"source": _hub_source(data.source), "heldout_source": _hub_source(data.heldout_source)}
    return config.model_copy(
        update={
            "model": model,
            "chat": chat,
            "data": data.model_copy(update=sources),
            "iterations": iteration + 1,
        }
    )


def command(config: RunConfig, record: Mapping[str, Any]) -> str:
    """What to type, beside the recipe, to make the run again."""
    parts = ["qspin", "run", CONFIG]
    if "folder" in record["base"]:
        parts += ["--model", _their_copy(record["base"]["folder"])]
    if config.model.init_adapter is not None:
        parts += ["--init-adapter", _their_copy(Path(config.model.init_adapter).name)]
    if config.data.source is not None and _hub_source(config.data.source) is None:
        parts += ["--data", _their_copy(Path(config.data.source).name)]
    if config.data.heldout_source is not None and _hub_source(config.data.heldout_source) is None:
        parts += ["--set", f"data.heldout_source={_their_copy(Path(config.data.heldout_source).name)}"]
    return shlex.join([*parts, "--out", "runs/again"])


def model_card(
    run_dir: RunDir,
    repo: str,
    *,
    content: Literal["adapter", "merged"],
    iteration: int,
    licence: Licence | None,
    merge_check: Mapping[str, Any] | None,
) -> str:
    """README.md of a model: the adapter of one iteration, or the base with it merged in.

    `merge_check` is the merge's own record (merge-check.json), for merged weights.
    """
    record, config = read_json(run_dir.record), recorded_config(run_dir)
    base = base_id(record)
    source = _hub_source(config.data.source)
    data = ModelCardData(
        base_model=base,
        base_model_relation=None if base is None else "adapter" if content == "adapter" else "finetune",
        datasets=None if source is None else [source],
        library_name="peft" if content == "adapter" else "transformers",
        license=_one_line(licence.id) if licence else None,
        license_name=_one_line(licence.name) if licence and licence.name else None,
        license_link=licence.link if licence else None,
        pipeline_tag="text-generation",
        tags=[*(["lora"] if content == "adapter" else []), "spin", "self-play", "qspin"],
    )
    what = "A LoRA adapter for" if content == "adapter" else "A LoRA adapter merged into"
    return _document(
        data.to_yaml(),
        f"# {plain(repo.partition('/')[2])}",
        f"{what} {_base(record)}, made by {_count(iteration + 1, 'iteration')} of self-play fine-tuning "
        f"([SPIN]({PAPER})) with qspin {_code(record['qspin'])}.",
        *_use(repo, content, record, config),
        *_results(run_dir, config, record, iteration),
        *_training_data(run_dir, config, record),
        *_method(config),
        *_recipe(config, record),
        *_merge(content, merge_check),
        *_limitations(record, content),
        *_licence(licence),
    )


def dataset_card(
    run_dir: RunDir, repo: str, *, pairs: Sequence[int], identical: Sequence[int], example: Example
) -> str:
    """README.md of a run's pairs.

    Args:
        pairs: how many of each iteration are in the data set.
        identical: how many of each were left out, since the opponent's completion was the real one.
        example: a pair to show.
    """
    record, config = read_json(run_dir.record), recorded_config(run_dir)
    data = DatasetCardData(
        task_categories=["text-generation"],
        tags=["preference", "dpo", "trl", "spin", "self-play", "qspin"],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    )
    counts = [
        (str(index), str(kept), str(left)) for index, (kept, left) in enumerate(zip(pairs, identical, strict=True))
    ]
    return _document(
        data.to_yaml(),
        f"# {plain(repo.partition('/')[2])}",
        f"Pairs from [SPIN]({PAPER}) (self-play fine-tuning): to each prompt the human's answer and the answer of the "
        f"last iteration's model. Generated by {_base(record)} and by the adapters that qspin "
        f"{_code(record['qspin'])} made of it, with temperature {config.generation.temperature:g}, top-p "
        f"{config.generation.top_p:g} and at most {config.generation.max_new_tokens} tokens.",
        _table(["iteration of the opponent", "pairs", "left out: the same as the real answer"], counts),
        "## Columns",
        _table(
            ["column", "what it holds"],
            [
                ("id", "the row's own id in the source, else its number"),
                ("iteration", "whose opponent answered: 0 is the model that self-play began with"),
                ("real", "the conversation with the human's answer, as the official SPIN code reads it"),
                ("generated", "the same with the opponent's answer"),
                ("prompt", "the conversation up to the answer, as TRL reads it"),
                ("chosen", "the human's answer alone"),
                ("rejected", "the opponent's answer alone"),
                ("ended", "whether the opponent's answer ended by itself, before the cap"),
            ],
        ),
        "Answers are texts as trained on, without their end-of-turn token.",
        "An example:",
        _table(
            ["prompt", "real", "generated"],
            [[plain(text) for text in (example.prompt, example.real, example.generated)]],
        ),
        *_training_data(run_dir, config, record),
        *_method(config),
        *_recipe(config, record),
        "## Limitations",
        "The generated answers are what a model says: unchecked, and often wrong. “Rejected” means that a model wrote "
        "it, not that anybody judged it.",
        "## Licence",
        "qspin does not know the licence of the prompts and human answers; see their source. What the generated "
        "answers may be used for can depend on the base's licence.",
    )


def is_hub_id(text: str) -> bool:
    """Whether a text can be the name of a repository on the Hub, `owner/name`."""
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return "/" in text


def base_id(record: Mapping[str, Any]) -> str | None:
    """The base's hub id; None for a local folder."""
    base = record["base"]
    return base["name"] if "folder" not in base and is_hub_id(base["name"]) else None


# --- parts of a card ---


def _base(record: Mapping[str, Any]) -> str:
    base, name = record["base"], base_id(record)
    if "folder" in base:
        return f"a model from a local folder called “{plain(base['folder'])}”"
    shown = plain(base["name"]) if name is None else f"[{plain(name)}]({HUB}/{name})"
    if "package" in base:
        return f"{shown} (as the file {_code(base['file'])} of the PyPI package {_code(base['package'])} has it)"
    return f"{shown} (revision {_code(base['revision'])})"


def _use(repo: str, content: str, record: Mapping[str, Any], config: RunConfig) -> Iterable[str]:
    base, revision = base_id(record) or "path/to/the/base", record["base"]["revision"]
    at = "" if base_id(record) is None or revision is None else f", revision={revision!r}"
    yield "## Use"
    if content == "merged":
        yield _fenced(
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{repo}", dtype="auto")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
        )
    else:
        yield _fenced(
            "python",
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig\n\n"
            "nf4 = BitsAndBytesConfig(  # the base as it stood in training\n"
            '    load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            f"bnb_4bit_use_double_quant={config.model.double_quant}\n"
            ")\n"
            f'base = AutoModelForCausalLM.from_pretrained("{base}"{at}, quantization_config=nf4)\n'
            f'model = PeftModel.from_pretrained(base, "{repo}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{base}"{at})',
        )
    if config.chat.template is not None:
        yield f"It was trained with the chat template in {_code(TEMPLATE)}, not with the tokenizer's own."


def _results(run_dir: RunDir, config: RunConfig, record: Mapping[str, Any], iteration: int) -> Iterable[str]:
    yield "## On held-out rows"
    yield f"This is player {iteration} of the tables."
    for table in report.tables(run_dir, config):
        yield f"### {table.title}"
        yield _table([column.heading for column in table.columns], table.rows)
        yield "\n".join(f"- **{column.heading}**: {column.meaning}" for column in table.columns)
    yield (
        f"{report.measured_on(run_dir, config)} None of the {record['data']['heldout_rows']} rows was trained on. It "
        "was one run with one seed: an interval over rows tells nothing of how another run would end."
    )


def _training_data(run_dir: RunDir, config: RunConfig, record: Mapping[str, Any]) -> Iterable[str]:
    data = record["data"]
    yield "## Training data"
    heldout = config.data.heldout_source
    apart = "split off by prompt" if heldout is None else f"from {_source(heldout)}"
    yield (
        f"{data['train_rows']} rows to train on, from {_source(config.data.source or '')}, and {data['heldout_rows']} "
        f"held out ({apart}); read as {_code(data['format'])}."
    )
    yield f"Fingerprint of the rows (SHA-256, the same under another file name or format): {_code(data['fingerprint'])}"
    codes = Counter(row["code"] for row in read_jsonl(run_dir.rejects))
    yield f"{_count(codes.total(), 'row')} left out{':' if codes else '.'}"
    if codes:
        yield _table(["reason", "rows"], [(_code(code), str(count)) for code, count in sorted(codes.items())])


def _method(config: RunConfig) -> Iterable[str]:
    train, generation = config.train, config.generation
    yield "## Method"
    yield (
        f"[SPIN]({PAPER}): in each iteration the model of the last one answers every training prompt, and the next "
        "model learns to find the human's answer likelier than that one, relative to the last model. Trained is a LoRA "
        "adapter on a base in 4 bits ([NF4](https://arxiv.org/abs/2305.14314)), which stays as it is."
    )
    settings = {
        "loss": train.loss,
        "beta (λ in the paper)": _numbers(train.beta),
        "learning rate": _numbers(train.lr),
        "optimiser": train.optimizer,
        "epochs an iteration": str(train.epochs),
        "pairs a step": str(train.batch_size),
        "earlier iterations trained on again": str(train.mix_previous),
        "LoRA rank / alpha": f"{config.lora.rank} / {config.lora.alpha:g}",
        "sampling": f"temperature {generation.temperature:g}, top-p {generation.top_p:g}, "
        f"at most {generation.max_new_tokens} tokens",
        "seed": str(config.seed),
    }
    if config.sft.epochs:
        settings["supervised warm start"] = f"{_count(config.sft.epochs, 'epoch')} at {config.sft.lr:g}"
    yield _table(["setting", "value"], list(settings.items()))
    yield _fenced("bibtex", CITATION)


def _recipe(config: RunConfig, record: Mapping[str, Any]) -> Iterable[str]:
    yield "## Recipe"
    yield f"With {_code(CONFIG)} from this repository:"
    yield _fenced("bash", f"pip install qspin=={record['qspin']}\n{command(config, record)}")
    if config.model.init_adapter is not None:
        adapter = record["inputs"]["model.init_adapter"]
        yield (
            f"It began with an adapter from a local folder called “{plain(Path(config.model.init_adapter).name)}”; "
            f"SHA-256 of its weights: {_code(adapter)}"
        )
    if "base_hash" in record:
        yield f"SHA-256 of the base's 4-bit weights: {_code(record['base_hash'])}"
    versions = ", ".join(f"{plain(name)} {_code(version)}" for name, version in record["versions"].items())
    yield f"Made with {versions}. Other versions and other machines round differently."


def _merge(content: str, check: Mapping[str, Any] | None) -> Iterable[str]:
    yield "## Merge check"
    if content == "adapter" or check is None:
        yield "None: this is the adapter itself, not merged into anything."
        return
    yield (
        f"The adapter was merged onto the base's {_code(check['onto'])} weights, in {_code(check['dtype'])}. What was "
        f"trained (4-bit base and adapter) and what is published, on {_count(check['rows'], 'held-out row')}:"
    )
    yield _table(
        ["", "value"],
        [
            ("NLL as trained, nats a token", f"{check['nll_trained']:.4f}"),
            ("NLL as published, nats a token", f"{check['nll_exported']:.4f}"),
            ("difference", f"{check['nll_difference']:+.4f}"),
            ("likeliest token the same", f"{check['top1_agreement']:.1%}"),
        ],
    )


def _limitations(record: Mapping[str, Any], content: str) -> Iterable[str]:
    yield "## Limitations"
    points = [
        "It learned to sound like the training answers. Whether what it says is true, safe or fair was not checked; "
        "what is wrong with the base is to be expected here as well.",
        "It was measured by the likelihood of held-out answers of the same source and by its own answers' form, not "
        "by benchmarks or by people.",
    ]
    if content == "adapter":
        points.append("It was trained and measured on the base in 4 bits (NF4), not on 16-bit weights.")
    else:
        points.append(
            "The table is of what was trained. How far the merged weights are from it, the merge check tells."
        )
    if "package" in record["base"]:
        points.append(
            "The base was dequantised from a GGUF file, so its weights are near those on the Hub, not the same."
        )
    yield "\n".join(f"- {point}" for point in points)


def _licence(licence: Licence | None) -> Iterable[str]:
    yield "## Licence"
    if licence is None:
        yield "The base's licence was not to be had: look it up before you use this or pass it on. It applies here too."
        return
    name = plain(licence.name or licence.id)
    shown = f"[{name}](<{licence.link}>)" if licence.link is not None else name
    yield f"{shown}: the base's licence, {plain(licence.source)}. It applies to what is made of the base."


# --- text that is not markup ---


def plain(text: str) -> str:
    """Text from outside on one line, shown by Markdown as it is, in a table as well."""
    return _MARKUP.sub(_inert, _one_line(text))


def _one_line(text: str) -> str:
    return " ".join("".join(character if character.isprintable() else " " for character in text).split())


_MARKUP = re.compile(r"[\\`*_{}\[\]<>&|#~$:@]")


def _inert(found: re.Match[str]) -> str:
    # entities for what would be HTML, should a reader know of HTML alone
    return {"&": "&amp;", "<": "&lt;", ">": "&gt;"}.get(found[0], f"\\{found[0]}")


def _code(text: str) -> str:
    """Hashes, versions and our own names, set as code."""
    return f"`{text}`" if re.fullmatch(r"[\w.+/ -]+", text) else plain(text)


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are Markdown already."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows))


def _document(metadata: str, *parts: str) -> str:
    return "\n\n".join([f"---\n{metadata}\n---", *parts]) + "\n"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _numbers(value: float | list[float]) -> str:
    return ", ".join(f"{number:g}" for number in value) if isinstance(value, list) else f"{value:g}"


# --- names in place of paths ---


def _hub_source(source: str | None) -> str | None:
    """A data source if it is a hub id; every file that rows are read from has one of the readers' extensions."""
    if source is None or Path(source).suffix.lower() in READERS or not is_hub_id(source):
        return None
    return source


def _source(source: str) -> str:
    hub = _hub_source(source)
    if hub is not None:
        return f"[{plain(hub)}]({HUB}/datasets/{hub})"
    return f"a file called “{plain(Path(source).name)}”"


def _their_copy(name: str) -> str:
    """A path to be filled in, with nothing in it that a shell or a code block would heed."""
    return f"path/to/{re.sub(r'[^A-Za-z0-9._-]+', '_', name)}"
