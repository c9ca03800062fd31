"""Real parts, made small: random models of real architectures, a tokenizer trained on the embedded data, and runs."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from command_line import Played, call
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from qspin.adapters import load_adapter
from qspin.base import find_base
from qspin.config import Architecture, LoraConfig, ModelConfig, load_config
from qspin.errors import QspinError
from qspin.files import ADAPTER_WEIGHTS
from qspin.model import SlotModel
from qspin.prepare import prepare
from qspin.record import template_date
from qspin.records import Message, Record
from qspin.run_dir import RunDir
from qspin.spin import run
from qspin.trials.loaded import Loaded
from qspin.watch.progress import Silent

# Two threads that wait for each other cost a small model more than they save, and everything on a busy machine.
torch.set_num_threads(1)

pytest_plugins = ["mtbench_parts"]  # whose fixtures four files share

ROOT = Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"
HOUSE_STYLE = ROOT / "presets" / "house-style"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MULTI_TURN = Record(
    "multi",
    (
        Message("system", "Be brief."),
        Message("user", "Who are you?"),
        Message("assistant", "A parrot."),
        Message("user", "Since when?"),
    ),
    "Since I hatched.",
)
VOCABULARY = 512
ANSI = "\x1b["

# Every architecture that presets name, with what is peculiar to it made small enough to matter on short rows.
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.15,  # larger than usual: a random model whose log-probs differ from token to token
}
ARCHITECTURES: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SHAPE, sliding_window=7),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=32),
    "gemma2": lambda: transformers.Gemma2Config(
        **SHAPE,
        head_dim=32,
        query_pre_attn_scalar=32,
        sliding_window=7,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE),
    "phi3": lambda: transformers.Phi3Config(**SHAPE),
}
FAMILIES = ARCHITECTURES | {  # whose memory is counted
    "gemma3_text": lambda: transformers.Gemma3TextConfig(
        **SHAPE, head_dim=32, query_pre_attn_scalar=32, sliding_window=7
    ),
}
TINY = Architecture(  # the llama
    family="llama",
    layers=3,
    hidden=64,
    intermediate=128,
    heads=4,
    kv_heads=2,
    head_size=16,
    vocabulary=512,
    tied_embeddings=True,
    parameters=143_808,
)


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE of 512 tokens with ChatML."""
    rows = [json.loads(line) for line in (HOUSE_STYLE / "train.jsonl").read_text().splitlines()]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([text for row in rows for text in row.values()], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    wrapped.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    wrapped.chat_template = CHATML
    return wrapped


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Callable[[str], Path]:
    """A folder with a random fp32 model of an architecture, and the tokenizer."""
    made: dict[str, Path] = {}

    def folder(architecture: str) -> Path:
        if architecture not in made:
            path = tmp_path_factory.mktemp("models") / f"tiny-{architecture}"
            torch.manual_seed(1)
            model = transformers.AutoModelForCausalLM.from_config(FAMILIES[architecture](), dtype=torch.float32)
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
            made[architecture] = path
        return made[architecture]

    return folder


@pytest.fixture
def tiny_model(tiny_folder: Callable[[str], Path]) -> Callable[..., SlotModel]:
    """A random model in NF4 with a fresh slot; B is not zero if `moved`, as after some training."""

    def load(
        architecture: str = "llama", *, dtype: str = "float32", double_quant: bool = True, moved: bool = False
    ) -> SlotModel:
        config = ModelConfig(id=str(tiny_folder(architecture)), dtype=dtype, double_quant=double_quant)  # type: ignore[arg-type]
        model = SlotModel.load(
            find_base(config), config, LoraConfig(rank=4, alpha=8), seed=0, device=torch.device("cpu")
        )
        if moved:
            model.set_adapter(moved_adapter(model))
        return model

    return load


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str], Path]:
    """Make a file in the test's own folder."""

    def written(name: str, text: str) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return written


def pytest_collection_finish() -> None:
    """What was imported stays: loading a base collects garbage, and to look through all that took most of the time."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests begin first, so that none of them is still at work when all others have ended."""
    first = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in first)


def config_refusal(source: str | Path | None, overrides: dict[str, Any] | None = None) -> str:
    """What is said of settings that do not fit."""
    with pytest.raises(QspinError) as caught:
        load_config(source, overrides)
    return str(caught.value)


def moved_adapter(model: SlotModel, seed: int = 3, scale: float = 0.1) -> dict[str, torch.Tensor]:
    """The slot's adapter with random B: a player that is not the base."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * scale if "lora_B" in name else tensor
        for name, tensor in model.adapter().items()
    }


def small_run(model: Path, data: Path, rows: int, aside: str = "") -> dict[str, Any]:
    """Settings of a run that takes seconds, and its rows: sums that no two of are alike."""
    numbers = [{"prompt": f"What is {n}?{aside}", "completion": f"It is {n * 7}, I say.{aside}"} for n in range(rows)]
    data.write_text("".join(json.dumps(row) + "\n" for row in numbers))
    return {
        "model.id": str(model),
        "data.source": str(data),
        "data.heldout_rows": 6,
        "generation.max_new_tokens": 10,
        "train.batch_size": 4,
        "train.lr": 0.02,
        "evaluation.stop": "never",
    }


def played_small(model: Path, folder: Path) -> RunDir:
    """Two iterations of a `small_run`, to its end."""
    # of one type, or what it says would depend on the processor
    settings = {"iterations": 2, "model.dtype": "bfloat16"}
    config = load_config(None, small_run(model, folder / "rows.jsonl", rows=18) | settings)
    run(prepare(config, datetime.date(2026, 1, 2)), folder / "run", Silent())
    return RunDir(folder / "run")


@pytest.fixture(scope="session")
def played_run(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Two iterations of the llama, to be read, or copied by who changes something in it."""
    return played_small(tiny_folder("llama"), tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="session")
def loaded(played_run: RunDir) -> Loaded:
    """Its players, whoever of them sits in the slot."""
    return Loaded.open(played_run)


def played_on_markup(model: Path, folder: Path) -> RunDir:
    """Two iterations on rows full of markup, with a template of its own."""
    evil = "<script>alert(1)</script> | `x`\n---\nlicense: mit"
    rows = [{"prompt": f"What is {n}? {evil}", "completion": f"{7 * n} {evil}"} for n in range(12)]
    rows += [{"prompt": "", "completion": "nothing was asked"}]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own.jinja").write_text(CHATML)
    config = load_config(
        None,
        {
            "model.id": str(model),
            "model.dtype": "float32",
            "chat.template": str(folder / "own.jinja"),
            "data.source": str(folder / "mine.jsonl"),
            "data.heldout_rows": 2,
            "data.max_malformed_share": 0.1,
            "generation.max_new_tokens": 6,
            "train.batch_size": 8,
            "train.lr": 0.003,
            "train.epochs": 1,
            "lora.rank": 4,
            "iterations": 2,
        },
    )
    made = RunDir(folder / "run")
    run(prepare(config, template_date(made)), made.path, Silent())
    return made


def ordered(tensor: torch.Tensor) -> torch.Tensor:
    """Floats as integers that count in units in the last place."""
    kinds = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFFFFFF)}
    kind, mask = kinds[tensor.dtype.itemsize]
    bits = tensor.contiguous().view(kind).long()
    return torch.where(bits < 0, -(bits & mask), bits)


@pytest.fixture(scope="session")
def exact(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """One iteration of it in fp32, likewise."""
    folder = tmp_path_factory.mktemp("exact")
    settings = small_run(tiny_folder("llama"), folder / "rows.jsonl", rows=18)
    config = load_config(None, settings | {"model.dtype": "float32", "iterations": 1})
    run(prepare(config, datetime.date(2026, 1, 2)), folder / "run", Silent())
    return RunDir(folder / "run")


def flip_byte(adapter: Path) -> str:
    """Alter a weight of an adapter, which stays a readable file; what is said of it."""
    weights = adapter / ADAPTER_WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-4] ^= 1  # the lowest byte of an fp32
    weights.write_bytes(data)
    assert load_adapter(adapter)
    return f"{weights}: missing or altered since it was written; delete {adapter} and run again"


@pytest.fixture(scope="session")
def tiny(tiny_folder: Callable[[str], Path]) -> Path:
    return tiny_folder("llama")


@pytest.fixture(scope="session")
def played(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Played:
    """Two iterations by the command; whoever would change the folder takes a copy."""
    folder = tmp_path_factory.mktemp("played")
    rows = [{"prompt": f"What is [red]{n}[/red]?", "completion": f"It is {7 * n}."} for n in range(24)]
    rows += [{"prompt": "", "completion": "nothing was asked"}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ["model.dtype=float32", "generation.max_new_tokens=8", "generation.width=8", "data.heldout_rows=4"]
    settings += ["train.batch_size=8", "train.lr=0.003", "evaluation.style='.*'", "lora.rank=4"]
    command: list[str | Path] = ["run", "--model", tiny, "--data", folder / "rows.jsonl", "--iterations", "2"]
    command += [part for setting in settings for part in ("--set", setting)]
    return Played(command, folder / "run", folder / "rows.jsonl", call(*command, "--out", folder / "run"))


class Notes(Silent):
    """A progress of which only the notes are kept."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """As a user whom permissions hold for, which they don't for root."""
    root = os.geteuid() == 0
    if root and not all(folder.stat().st_mode & 0o001 for folder in (ROOT, *ROOT.parents)):
        pytest.skip(f"{ROOT} is closed to other users, who could not import what is tested")
    if root:
        os.setresuid(65534, 65534, 0)  # os.access asks for the real user
    try:
        yield
    finally:
        if root:
            os.setresuid(0, 0, 0)


@pytest.fixture
def closed() -> Iterator[Path]:
    """A folder with a file and a folder in it, which nobody may look into; the one above it everybody may use."""
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "closed"
        (folder / "sub").mkdir(parents=True)
        (folder / "file").write_text("text")
        Path(above).chmod(0o777)
        folder.chmod(0)
        yield folder
        folder.chmod(0o700)
