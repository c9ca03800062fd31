"""The contestants: qspin and its peers at the same job, each as a function to run in a process of its own.

All have the same model in NF4 with the same LoRA, the same tokens, compute type, effective batch, epochs and rate.
"""

from __future__ import annotations

import datetime
import itertools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from harness import Measurement, measured

from qspin.base import load_tokenizer
from qspin.budget import rows_at_once, token_budget
from qspin.config import ModelConfig, RunConfig, load_config
from qspin.config_files import presets_dir
from qspin.fitting.memory import keep_freed_memory
from qspin.four_bits import compute_dtype
from qspin.generation import Completion, Request, generate
from qspin.model import SlotModel
from qspin.packing import Plan, common_prefix, lengths_of, plan_batches
from qspin.prepare import Prepared, prepare
from qspin.records import Example, Pair
from qspin.sampling import noise_key
from qspin.scoring import score_pairs
from qspin.training import Task, train

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = compute_dtype(ModelConfig(), DEVICE)  # all compute in: fp32 on a CPU that has no bfloat16 of its own
HF_WIDTH = 64  # completions side by side in HF generate's best settings


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done."""

    config: RunConfig
    pairs: tuple[Pair, ...] = ()  # for training
    examples: tuple[Example, ...] = ()  # for generation


def results_name(benchmark: str) -> str:
    """Results in fp32 stand beside those in bfloat16."""
    return f"{benchmark}-fp32" if DTYPE is torch.float32 else benchmark


def make_config(data: Path | None, *, rows: int, cap: int, batch_size: int) -> RunConfig:
    """The embedded model; every row counts, so real completions are cut at the cap rather than dropped."""
    house_style = presets_dir() / "house-style"
    return load_config(
        "smollm2-135m",
        {
            "data.source": str(data or house_style / "train.jsonl"),
            "data.limit": rows,
            "data.heldout_source": str(house_style / "heldout.jsonl"),
            "data.heldout_rows": 2,
            "data.max_completion_tokens": cap,
            "data.long_completions": "cut",
            "generation.max_new_tokens": cap,
            "train.batch_size": batch_size,
            "train.epochs": 2,
            "train.sft_weight": 0.0,  # as TRL
            "train.warmup": 0.0,  # where there is one, TRL's first step has a rate of 0
            "train.snapshot_minutes": 60,
        },
    )


def prepared(config: RunConfig) -> Prepared:
    return prepare(config, datetime.date(2026, 1, 1))


# --- training: score the opponent once, then two epochs


def opponents_pairs(config: RunConfig) -> tuple[Pair, ...]:
    """The rows with the base's completions: what iteration 0 trains on."""
    ready = prepared(config)
    completions = _complete(slot_model(config, ready), config, ready)
    return tuple(
        Pair(e.record_id, 0, e.prompt_ids, e.real_ids, completion.ids, completion.ended)
        for e, completion in zip(ready.train, completions, strict=True)
    )


def train_qspin(job: Job) -> Measurement:
    config, pairs = job.config, job.pairs
    model = slot_model(config, prepared(config))
    plan = _plan(model, config, pairs)  # as the peer's batch size, the budget is known when the work begins
    with tempfile.TemporaryDirectory() as folder, measured() as result:
        metrics = _play(model, config, pairs, plan, Path(folder))
    last = [step for step in metrics if step["epoch"] == config.train.epochs - 1]
    result.figures = {
        "seconds_a_pair": result.seconds / len(pairs),
        "first_loss": metrics[0]["loss"],
        "last_epoch_margin": sum(step["margin"] for step in last) / len(last),
    }
    return result


def train_trl(job: Job) -> Measurement:
    return _train_trl(job, precompute=False)


def train_trl_precompute(job: Job) -> Measurement:
    return _train_trl(job, precompute=True)


def _train_trl(job: Job, *, precompute: bool) -> Measurement:
    config, pairs = job.config, job.pairs
    ready = prepared(config)
    trainer_class, dpo_config = _trl()
    model = _no_repacking(_causal_lm(ready, config))
    with tempfile.TemporaryDirectory() as folder, measured() as result:
        log = _dpo(trainer_class, dpo_config, model, ready, config, pairs, Path(folder), precompute=precompute)
    margins = [entry["rewards/margins"] for entry in log if "rewards/margins" in entry]
    result.figures = {
        "seconds_a_pair": result.seconds / len(pairs),
        "first_loss": next(entry["loss"] for entry in log if "loss" in entry),
        "last_epoch_margin": sum(margins[len(margins) // 2 :]) / (len(margins) - len(margins) // 2),
    }
    return result


# --- generation


def generate_qspin(job: Job) -> Measurement:
    ready = prepared(job.config)
    model = slot_model(job.config, ready)
    with measured() as result:
        completions = _complete(model, job.config, ready)
    return _throughput(result, [completion.ids for completion in completions])


def generate_official(job: Job) -> Measurement:
    """As the official SPIN script drives it: dataset order, batches of 16, each until its longest row ends."""
    return _generate_hf(job, width=16, by_length=False)


def generate_batched(job: Job) -> Measurement:
    """HF's best batched settings: prompts by length, 64 side by side."""
    return _generate_hf(job, width=HF_WIDTH, by_length=True)


def generate_continuous(job: Job) -> Measurement:
    """transformers' own continuous batching."""
    from transformers import ContinuousBatchingConfig

    ready = prepared(job.config)
    model = _with_adapter(_causal_lm(ready, job.config), job.config).get_base_model()
    settings = _sampling_settings(ready, job.config)
    model.set_attn_implementation("paged|sdpa")
    prompts = [list(example.prompt_ids) for example in ready.train]
    blocks = ContinuousBatchingConfig(block_size=32, num_blocks=HF_WIDTH * 8 * 4, max_batch_tokens=1024)
    with measured() as result:
        outputs = model.generate_batch(prompts, generation_config=settings, continuous_batching_config=blocks)
    return _throughput(result, [output.generated_tokens for output in outputs.values()])


def _generate_hf(job: Job, *, width: int, by_length: bool) -> Measurement:
    ready = prepared(job.config)
    model = _with_adapter(_causal_lm(ready, job.config), job.config)
    with measured() as result:
        completions = _hf_completions(model, ready, job.config, width=width, by_length=by_length)
    return _throughput(result, completions)


def _throughput(result: Measurement, completions: Sequence[Sequence[int]]) -> Measurement:
    tokens = sum(map(len, completions))
    result.figures = {"useful_tokens": tokens, "tokens_a_second": tokens / result.seconds}
    return result


# --- a whole iteration: generate, score, two epochs


def iterate_qspin(job: Job) -> Measurement:
    config = job.config
    ready = prepared(config)
    model = slot_model(config, ready)
    with tempfile.TemporaryDirectory() as folder, measured() as result:
        completions = _complete(model, config, ready)
        pairs = _pairs(ready.train, [completion.ids for completion in completions])
        _play(model, config, pairs, _plan(model, config, pairs), Path(folder))
    return _per_row(result, len(ready.train), [pair.generated_ids for pair in pairs])


def iterate_peers(job: Job) -> Measurement:
    """HF generate in its best batched settings, then TRL with its reference precomputed: two scripts, so two models."""
    config = job.config
    ready = prepared(config)
    trainer_class, dpo_config = _trl()
    generating = _with_adapter(_causal_lm(ready, config), config)
    model = _no_repacking(_causal_lm(ready, config))
    with tempfile.TemporaryDirectory() as folder, measured() as result:
        completions = _hf_completions(generating, ready, config, width=HF_WIDTH, by_length=True)
        pairs = _pairs(ready.train, completions)
        _dpo(trainer_class, dpo_config, model, ready, config, pairs, Path(folder), precompute=True)
    return _per_row(result, len(ready.train), completions)


def _per_row(result: Measurement, rows: int, completions: Sequence[Sequence[int]]) -> Measurement:
    result.figures = {"seconds_a_row": result.seconds / rows, "generated_tokens": sum(map(len, completions))}
    return result


# --- qspin's side


def slot_model(config: RunConfig, ready: Prepared) -> SlotModel:
    keep_freed_memory()
    return SlotModel.load(ready.base, config.model, config.lora, seed=config.seed, device=DEVICE)


def _complete(model: SlotModel, config: RunConfig, ready: Prepared) -> list[Completion]:
    places = max(len(example.prompt_ids) for example in ready.train) + config.generation.max_new_tokens
    return generate(
        model,
        [Request(e.prompt_ids, noise_key(config.seed, 0, e.record_id)) for e in ready.train],
        max_new_tokens=config.generation.max_new_tokens,
        temperature=1.0,
        top_p=1.0,
        width=rows_at_once(model, places),
        stop_ids=ready.stop_ids,
        on_step=lambda _tokens, _rows: None,
    )


def _pairs(examples: Sequence[Example], completions: Sequence[Sequence[int]]) -> tuple[Pair, ...]:
    return tuple(
        Pair(e.record_id, 0, e.prompt_ids, e.real_ids, tuple(ids), ended=False)
        for e, ids in zip(examples, completions, strict=True)
    )


def _plan(model: SlotModel, config: RunConfig, pairs: Sequence[Pair]) -> Plan:
    prefix = common_prefix([pair.prompt_ids for pair in pairs])
    lengths = [lengths_of(pair, prefix) for pair in pairs]

    def plan_for(budget: int) -> Plan:
        return plan_batches(lengths, batch_size=config.train.batch_size, token_budget=budget, seed=config.seed)

    budget = token_budget(model, pairs, plan_for, prefix, config.train)
    model.use_gradient_checkpointing(budget.recomputed)
    return plan_for(budget.tokens)


def _play(
    model: SlotModel, config: RunConfig, pairs: Sequence[Pair], plan: Plan, folder: Path
) -> list[dict[str, float]]:
    prefix = common_prefix([pair.prompt_ids for pair in pairs])
    parts = score_pairs(model, pairs, list(itertools.chain(*plan)), prefix)
    scores = {score.key: score for part in parts for score in part}
    task = Task(pairs, scores, plan, 0, config.seed, prefix)
    return train(model, task, config.train, snapshots=folder, on_step=lambda _metrics, _pairs: None)


# --- the peers' side


def _causal_lm(ready: Prepared, config: RunConfig) -> Any:
    """The same base in NF4, as a person loads it."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        ready.base.weights(),
        dtype=DTYPE,
        device_map={"": DEVICE},
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=config.model.double_quant,
            bnb_4bit_compute_dtype=DTYPE,
        ),
    )


def _no_repacking(model: Any) -> Any:
    """Spare the peer a bug of bitsandbytes: on CPUs with AVX512-BF16, a forward in eval mode repacks the 4-bit layers,
    and training through them has wrong gradients."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _lora(config: RunConfig) -> Any:
    import peft

    return peft.LoraConfig(
        r=config.lora.rank, lora_alpha=config.lora.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )


def _with_adapter(model: Any, config: RunConfig) -> Any:
    import peft

    return peft.get_peft_model(model, _lora(config)).eval()


def _sampling_settings(ready: Prepared, config: RunConfig) -> Any:
    import transformers

    return transformers.GenerationConfig(
        max_new_tokens=config.generation.max_new_tokens,
        do_sample=True,
        temperature=1.0,
        top_p=1.0,
        top_k=0,  # 50 by default: not the whole distribution
        eos_token_id=sorted(ready.stop_ids),
        pad_token_id=min(ready.stop_ids),
    )


def _hf_completions(model: Any, ready: Prepared, config: RunConfig, *, width: int, by_length: bool) -> list[list[int]]:
    settings = _sampling_settings(ready, config)
    rows = range(len(ready.train))
    order = sorted(rows, key=lambda i: -len(ready.train[i].prompt_ids)) if by_length else list(rows)
    found: dict[int, list[int]] = {}
    torch.manual_seed(config.seed)
    for start in range(0, len(order), width):
        batch = order[start : start + width]
        prompts = [ready.train[i].prompt_ids for i in batch]
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=DEVICE)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        for i, row in zip(batch, output[:, longest:].tolist(), strict=True):
            end = next((place + 1 for place, token in enumerate(row) if token in ready.stop_ids), len(row))
            found[i] = row[:end]
    return [found[i] for i in rows]


def _trl() -> tuple[Any, Any]:
    from trl import DPOConfig, DPOTrainer

    class Trainer(DPOTrainer):  # type: ignore[misc]
        """Takes tokens as they are, so that both sides train on the same ones."""

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

    return Trainer, DPOConfig


def _dpo(
    trainer_class: Any,
    dpo_config: Any,
    model: Any,
    ready: Prepared,
    config: RunConfig,
    pairs: Sequence[Pair],
    folder: Path,
    *,
    precompute: bool,
) -> list[dict[str, float]]:
    """DPOTrainer at its fastest here: no checkpointing, one forward for an effective batch."""
    import datasets

    rows = [
        {"prompt_ids": list(p.prompt_ids), "chosen_ids": list(p.real_ids), "rejected_ids": list(p.generated_ids)}
        for p in pairs
    ]
    datasets.Dataset.from_list(rows).save_to_disk(folder / "data")  # precomputing writes its cache beside it
    trainer = trainer_class(
        model=model,
        args=dpo_config(
            output_dir=str(folder),
            per_device_train_batch_size=config.train.batch_size,
            num_train_epochs=config.train.epochs,
            learning_rate=config.train.lr,
            beta=config.train.beta,
            warmup_steps=config.train.warmup,
            max_grad_norm=config.train.max_grad_norm,
            precompute_ref_log_probs=precompute,
            gradient_checkpointing=False,
            max_length=None,
            bf16=DTYPE is torch.bfloat16,
            fp16=DTYPE is torch.float16,
            use_cpu=DEVICE.type == "cpu",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=datasets.load_from_disk(folder / "data"),
        processing_class=load_tokenizer(ready.base),
        peft_config=_lora(config),
    )
    trainer.train()
    return list(trainer.state.log_history)
