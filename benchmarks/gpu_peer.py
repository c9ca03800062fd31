"""A peer of qspin's on this GPU: DPO training with TRL, on Unsloth or on Transformers and PEFT, and generation.

    python benchmarks/gpu_peer.py --peer unsloth --model FOLDER --rows ROWS.jsonl --cap-gb 16 --batch 8 --out peer.json
    python benchmarks/gpu_peer.py --peer transformers --model FOLDER --generate 32 128 256 --cap-gb 16 --out peer.json

FOLDER holds a 16-bit Llama or Mistral, maybe without a tokenizer: one that TRL and Unsloth accept is then written into
it. The model is loaded in NF4 under LoRA. ROWS.jsonl has a pair a line, in tokens: {"prompt": [...], "real": [...],
"generated": [...]}. TRL's sigmoid loss is SPIN's logistic one.

A process measures one setting, as the cap on memory and Unsloth's patches last for the process. What is measured goes
to --out; out of memory is a result too: "oom" there, and exit code 0.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from turns import wait_for_turn

RANK, ALPHA = 16, 32
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
PACKAGES = ["torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "unsloth", "unsloth_zoo", "xformers"]
FEWEST_STEPS = 5  # timed

# Set before anything reads them, unless the caller did.
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "UNSLOTH_COMPILE_LOCATION": str(Path(tempfile.gettempdir()) / "unsloth_compiled_cache"),
    "TOKENIZERS_PARALLELISM": "false",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",  # Unsloth's choice, for both peers
    "UNSLOTH_DECODE_CUDA_GRAPHS": "1",  # off by default, and faster (for Llama; Unsloth has none for Mistral)
}


def main() -> None:
    options = arguments()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if options.fused_loss:
        os.environ["UNSLOTH_FUSED_PREFERENCE_LOSS"] = "1"
    result: dict[str, Any] = {
        "peer": options.peer,
        "model": options.model.name,
        "cap_gb": options.cap_gb,
        "batch": options.batch,
        "checkpointing": options.checkpointing,
        "fused_loss": options.fused_loss,
        "oom": False,
        "settings": {name: os.environ[name] for name in ENVIRONMENT if name.startswith("UNSLOTH_D")},
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
    }
    try:
        measure(options, result)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if "out of memory" not in str(error).lower():
            raise
        result["oom"] = True
    text = json.dumps(result, indent=2)
    options.out.write_text(text + "\n")
    print(text, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--peer", choices=("unsloth", "transformers"), required=True)
    parser.add_argument("--model", type=Path, required=True, help="folder of a 16-bit model")
    parser.add_argument("--rows", type=Path, help="pairs to train on; none, no training")
    parser.add_argument("--cap-gb", type=float, required=True, help="GiB that PyTorch may take of the GPU")
    parser.add_argument("--batch", type=int, default=8, help="pairs an optimizer step, in one go (default 8)")
    parser.add_argument(
        "--checkpointing",
        choices=("none", "plain", "unsloth"),
        default="none",
        help="recompute activations in the backward pass; unsloth: and keep layers' inputs in main memory meanwhile",
    )
    parser.add_argument("--fused-loss", action="store_true", help="Unsloth's loss, a part of the logits at a time")
    parser.add_argument("--warmup", type=int, default=2, help="first steps, not timed (default 2)")
    parser.add_argument("--generate", type=int, nargs=3, metavar=("WIDTH", "NEW", "PROMPT_LENGTH"))
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the results")
    parser.add_argument("--turn", type=Path, help="wait for this file, before the last step that is not timed")
    options = parser.parse_args()
    if options.rows is None and options.generate is None:
        parser.error("nothing to measure: give --rows, --generate or both")
    return options


def measure(options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Fill `result` step by step, so that what was measured before memory ran out stays."""
    if options.peer == "unsloth":
        import unsloth  # noqa: F401  # it must come before what it patches
    import torch

    rows = read_rows(options) if options.rows else []
    result["device"] = torch.cuda.get_device_name()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap_gb * 2**30 / total), 0)
    add_tokenizer(options.model)
    window = -(-max([*lengths(rows), sum(options.generate[1:]) if options.generate else 0]) // 8) * 8
    started = time.perf_counter()
    model, tokenizer = (load_unsloth if options.peer == "unsloth" else load_transformers)(options, window)
    result["load_seconds"] = time.perf_counter() - started
    result["loaded_bytes"] = torch.cuda.memory_allocated()
    if rows:
        result["training"] = train(options, model, tokenizer, rows, window)
        options.out.write_text(json.dumps(result, indent=2))
    if options.generate:
        wait_for_turn(options.turn)
        result["generation"] = generate(options, model)


def read_rows(options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Whole batches of the file's pairs, under the names of TRL's collator."""
    names = {"prompt_ids": "prompt", "chosen_ids": "real", "rejected_ids": "generated"}
    pairs = [json.loads(line) for line in options.rows.read_text().splitlines() if line.strip()]
    fewest = options.batch * (options.warmup + FEWEST_STEPS)
    if len(pairs) < fewest:
        raise SystemExit(f"{options.rows}: {len(pairs)} pairs, and --batch {options.batch} needs {fewest} of them")
    whole = len(pairs) - len(pairs) % options.batch
    return [{name: pair[ours] for name, ours in names.items()} for pair in pairs[:whole]]


def lengths(rows: list[dict[str, list[int]]]) -> list[int]:
    return [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in rows]


def add_tokenizer(folder: Path) -> None:
    """Write a word-for-a-token tokenizer if FOLDER has none: the trainer wants a padding token, Unsloth wants files."""
    if (folder / "tokenizer_config.json").exists():
        return
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    words = SPECIAL + [f"t{i}" for i in range(len(SPECIAL), size)]
    model = WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(model), unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(folder)


def load_unsloth(options: argparse.Namespace, window: int) -> tuple[Any, Any]:
    """NF4 with double quantisation is how Unsloth loads 4 bits; the adapter is in place."""
    from unsloth import FastLanguageModel  # isort: skip  # it must come before what it patches
    import torch

    model, tokenizer = FastLanguageModel.from_pretrained(
        str(options.model),
        max_seq_length=window,
        dtype=torch.bfloat16,
        load_in_4bit=True,
        use_exact_model_name=True,
    )
    model = FastLanguageModel.get_peft_model(
        model,
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=LINEARS,
        lora_dropout=0,
        bias="none",
        use_gradient_checkpointing={"none": False, "plain": True, "unsloth": "unsloth"}[options.checkpointing],
    )
    return model, tokenizer


def load_transformers(options: argparse.Namespace, _window: int) -> tuple[Any, Any]:
    """The adapter is not in place yet when there are rows: given its config, the trainer adds one in bfloat16."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        options.model,
        dtype=torch.bfloat16,
        device_map={"": 0},
        attn_implementation="sdpa",
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
    )
    if not options.rows:
        model = get_peft_model(model, lora())
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.bfloat16)  # as the trainer would
    return model, AutoTokenizer.from_pretrained(options.model)


def lora() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=LINEARS, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM"
    )


def dpo_trainer(
    options: argparse.Namespace, model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], window: int, output: str
) -> Any:
    """TRL's trainer with its fastest settings, as far as they exist:

    - The reference's log-probs are known before the first step, as with precompute_ref_log_probs. TRL's own function
      scores them here, because the flag also hashes the whole model, which is seconds of GPU time for a file's name.
    - padding_free and use_liger_kernel stay off: TRL 1.15 ignores the first for DPO, and its own chunked LM head, which
      makes logits for completion tokens only and never keeps them, has replaced the second.
    - Padding goes to a multiple of 8: it costs little and keeps matrices aligned and compiled shapes few.
    - Unsloth's users train with 8-bit AdamW, which is its default; TRL's default is PyTorch's fused AdamW.
    """
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class PairsTrainer(DPOTrainer):  # type: ignore[misc]
        """Rows come in tokens, so there is nothing to prepare."""

        def _prepare_dataset(self, dataset: Dataset, *_args: Any, **_kwargs: Any) -> Dataset:
            return dataset

    trainer = PairsTrainer(
        model=model,
        args=DPOConfig(
            output_dir=output,
            per_device_train_batch_size=options.batch,
            gradient_accumulation_steps=1,
            max_steps=len(rows) // options.batch,
            learning_rate=5e-5,
            bf16=True,
            optim="adamw_8bit" if options.peer == "unsloth" else "adamw_torch_fused",
            gradient_checkpointing=options.checkpointing != "none",
            beta=0.1,
            loss_type=["sigmoid"],
            max_length=window,
            pad_to_multiple_of=8,
            train_sampling_strategy="sequential",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=None if options.peer == "unsloth" else lora(),
    )
    trainer.model.eval()  # Unsloth compiles what it trains with, and would compile it for this pass alone
    trainer.train_dataset = trainer._precompute_ref_logps(trainer.train_dataset, "train", options.batch)
    trainer.precompute_ref_logps = True
    trainer.model.train()
    return trainer


def watched(trainer: Any, warmup: int, turn: Path | None) -> Any:
    """A callback that keeps when each step `ends`, and its `margins`; peak memory counts from the end of the warmup.

    It waits for its turn a step before that, with memory given back: others have the GPU meanwhile.
    """
    import torch
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ends: list[float] = []
            self.margins: list[float] = []

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_kwargs: Any) -> None:
            torch.cuda.synchronize()
            self.ends.append(time.perf_counter())
            self.margins += trainer._metrics["train"]["rewards/margins"][-1:]
            if turn is not None and state.global_step == max(1, warmup - 1):
                torch.cuda.empty_cache()
                wait_for_turn(turn)
            if state.global_step == warmup:
                torch.cuda.reset_peak_memory_stats()

    watch = Watch()
    trainer.add_callback(watch)
    return watch


def train(
    options: argparse.Namespace, model: Any, tokenizer: Any, rows: list[dict[str, list[int]]], window: int
) -> dict[str, Any]:
    """One pass over the rows in the file's order; seconds and bytes of the steps after the warmup."""
    import torch

    with tempfile.TemporaryDirectory() as output:
        trainer = dpo_trainer(options, model, tokenizer, rows, window, output)
        torch.cuda.empty_cache()
        watch = watched(trainer, options.warmup, options.turn)
        started = time.perf_counter()
        outcome = trainer.train()
    ends = [started, *watch.ends][options.warmup :]
    seconds = ends[-1] - ends[0]
    timed = rows[options.warmup * options.batch :]
    prompts = sum(len(row["prompt_ids"]) for row in timed)
    completions = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in timed)
    return {
        "steps": len(ends) - 1,
        "seconds_a_step": seconds / (len(ends) - 1),
        "pairs_a_second": len(timed) / seconds,
        "tokens_a_second": (2 * prompts + completions) / seconds,  # TRL computes a prompt twice
        "useful_tokens_a_second": (prompts + completions) / seconds,  # a prompt counts once
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        "padding_free": bool(getattr(trainer, "padding_free", False)),
        "optimizer": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
        "trained_parameters": sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
        "mean_loss": outcome.training_loss,  # ln 2 at first
        "margins": watch.margins,  # 0 at first
        "warmup_seconds": ends[0] - started,
        "each_step_seconds": [end - start for start, end in itertools.pairwise(ends)],
    }


def generate(options: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Sample from the adapted model: a short warm-up, then one measured batch, prefill and all."""
    import torch

    width, new, length = options.generate
    if options.peer == "unsloth":
        from unsloth import FastLanguageModel

        FastLanguageModel.for_inference(model)
    model.eval()
    torch.manual_seed(0)
    prompts = torch.randint(len(SPECIAL), model.config.vocab_size, (width, length), device="cuda")

    def sample(tokens: int) -> int:
        output = model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            do_sample=True,
            use_cache=True,
            pad_token_id=SPECIAL.index("<pad>"),
        )
        torch.cuda.synchronize()
        return width * (output.shape[1] - length)

    sample(8)
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    tokens = sample(new)
    seconds = time.perf_counter() - started
    return {
        "width": width,
        "prompt_tokens": length,
        "new_tokens": tokens,
        "seconds": seconds,
        "new_tokens_a_second": tokens / seconds,
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
