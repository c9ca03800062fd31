"""A whole run beside the same steps in plain transformers, PEFT and torch: one sequence at a time, without our engine.

What is taken from the run is what chance or a choice has made of it: the first adapter, and which pairs make a batch.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import bitsandbytes.functional
import peft
import pytest
import torch
import transformers
from torch import Tensor

from qspin.adapters import load_adapter
from qspin.base import find_base
from qspin.config import RunConfig, at_iteration, load_config
from qspin.figures.evaluation import panel, read_evaluation
from qspin.files import read_json, read_jsonl
from qspin.model import SlotModel
from qspin.prepare import prepare
from qspin.records import Pair, Score
from qspin.run_dir import RunDir
from qspin.sampling import noise_key, uniform
from qspin.spin import run
from qspin.watch.progress import Silent

DATE = datetime.date(2026, 1, 2)
# everything uneven: lengths, the last batch, micro-batches, and what changes from iteration to iteration
SETTINGS: dict[str, Any] = {
    "model.dtype": "float32",
    "lora.rank": 4,
    "lora.alpha": 8,
    "data.heldout_rows": 6,
    "generation.max_new_tokens": 10,
    "generation.width": 5,
    "generation.shard_rows": 7,
    "generation.temperature": 1.3,
    "generation.top_p": 0.9,
    "train.batch_size": 5,
    "train.tokens_per_micro_batch": 90,
    "train.epochs": 2,
    "train.lr": [0.02, 0.01],
    "train.beta": [0.1, 0.4],
    "train.warmup": 0.25,
    "train.sft_weight": 0.3,
    "train.weight_decay": 0.01,
    "evaluation.stop": "never",
    "iterations": 2,
}


@dataclass(frozen=True)
class Oracle:
    """A run that was played, and its base as plain transformers compute with its 4-bit weights."""

    dir: RunDir
    config: RunConfig
    rows: list[dict[str, str]]
    base: Callable[[], Any]

    def slot(self, adapter: dict[str, Tensor]) -> Any:
        lora = self.config.lora
        model = peft.get_peft_model(
            self.base(), peft.LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets)
        )
        peft.set_peft_model_state_dict(model, adapter)
        return model

    def opponent(self, iteration: int) -> Any:
        if iteration == 0:
            return self.base()
        return peft.PeftModel.from_pretrained(self.base(), str(self.dir.iteration(iteration - 1).adapter))

    def generated(self, iteration: int) -> list[Pair]:
        shards = sorted(self.dir.iteration(iteration).generated(0).parent.glob("shard-*.jsonl"))
        return [Pair.from_json(row) for path in shards for row in read_jsonl(path)]

    def trained_on(self, iteration: int) -> list[Pair]:
        return [pair for past in range(iteration + 1) for pair in self.generated(past)]  # mix_previous is 1

    def scores(self, iteration: int) -> dict[str, Score]:
        shards = self.dir.iteration(iteration).scores(0).parent.glob("shard-*.jsonl")
        found = [Score(**row) for path in shards for row in read_jsonl(path)]
        return {score.key: score for score in found}


@pytest.fixture(scope="module")
def oracle(tiny_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder, model = tmp_path_factory.mktemp("oracle"), tiny_folder("mistral")  # it has a sliding window
    rows = [
        {"prompt": f"What is {n}?" + " Please." * (n % 5), "completion": f"It is {n * 7}, I say." + " Yes." * (n % 7)}
        for n in range(32)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(None, SETTINGS | {"model.id": str(model), "data.source": str(folder / "rows.jsonl")})
    run(prepare(config, DATE), folder / "run", Silent())
    nf4 = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantised = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.float32, device_map={"": "cpu"}, quantization_config=nf4
    )

    def base() -> Any:
        found = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="eager"
        )
        weights = found.state_dict()
        for name, parameter in quantised.named_parameters():
            if (state := getattr(parameter, "quant_state", None)) is not None:
                whole = bitsandbytes.functional.dequantize_4bit(parameter.data, state)
                weights[name].copy_(whole.view(weights[name].shape))
        return found.eval()

    return Oracle(RunDir(folder / "run"), config, rows, base)


def logp(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Of a completion, summed over its tokens."""
    logps = model(input_ids=torch.tensor([[*prompt, *completion]])).logits[0].log_softmax(-1)
    places = torch.arange(len(completion)) + len(prompt) - 1
    return logps[places, torch.tensor(completion)].sum()


@torch.no_grad()
def sampled(model: Any, prompt: Sequence[int], key: int, config: RunConfig, *, plain: bool = False) -> tuple[int, ...]:
    """By the definition: the first token, in their order, up to which the distribution holds more than the number."""
    found: list[int] = []
    while len(found) < config.generation.max_new_tokens and 2 not in found:
        logits = model(input_ids=torch.tensor([[*prompt, *found]])).logits[0, -1].double()
        weights = (logits if plain else logits / config.generation.temperature).softmax(-1)
        if not plain:
            likeliest = weights.argsort(descending=True)
            inside = likeliest[: int((weights[likeliest].cumsum(0) < config.generation.top_p).sum()) + 1]
            nucleus = torch.zeros_like(weights).index_copy(0, inside, weights[inside])
            weights = nucleus / nucleus.sum()
        found.append(int((weights.cumsum(0) <= uniform(key, len(found))).sum()))
    return tuple(found)


def test_rows_are_the_tokens_of_the_chat_template(oracle: Oracle) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(oracle.config.model.id)
    for pair in oracle.generated(0):
        row = oracle.rows[int(pair.record_id.removeprefix("row-")) - 1]
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        prompt = tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
        whole = tokenizer.apply_chat_template(turns, return_dict=False)
        assert pair.prompt_ids == tuple(prompt)
        assert (*pair.prompt_ids, *pair.real_ids, *tokenizer.encode("\n")) == tuple(whole)


@pytest.mark.parametrize("iteration", [0, 1])
def test_completions_are_drawn_from_the_opponents_distribution(iteration: int, oracle: Oracle) -> None:
    opponent, pairs = oracle.opponent(iteration), oracle.generated(iteration)
    assert {pair.record_id for pair in pairs} == {pair.record_id for pair in oracle.generated(0)}
    for pair in pairs[::3]:
        key = noise_key(oracle.config.seed, iteration, pair.record_id)
        assert pair.generated_ids == sampled(opponent, pair.prompt_ids, key, oracle.config)


@pytest.mark.parametrize("iteration", [0, 1])
@torch.no_grad()
def test_scores_are_the_opponents_log_probs(iteration: int, oracle: Oracle) -> None:
    opponent, scores = oracle.opponent(iteration), oracle.scores(iteration)
    pairs = oracle.trained_on(iteration)
    assert {pair.key for pair in pairs} == set(scores)
    for pair in pairs:
        found = [float(logp(opponent, pair.prompt_ids, ids)) for ids in (pair.real_ids, pair.generated_ids)]
        score = scores[pair.key]
        assert found == pytest.approx([score.opponent_real_logps, score.opponent_generated_logps], abs=1e-3)


def trained(oracle: Oracle, iteration: int, *, beta: float) -> tuple[dict[str, Tensor], list[dict[str, float]]]:
    """The adapter that an iteration ends with, and the figures of its steps."""
    config, folder, scores = oracle.config.train, oracle.dir.iteration(iteration), oracle.scores(iteration)
    if iteration == 0:
        settings = oracle.config
        begun = SlotModel.load(
            find_base(settings.model), settings.model, settings.lora, seed=settings.seed, device=torch.device("cpu")
        ).adapter()
    else:
        begun = load_adapter(oracle.dir.iteration(iteration - 1).adapter)
    model, pairs = oracle.slot(begun), oracle.trained_on(iteration)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(weights, weight_decay=config.weight_decay)
    batches = [[pairs[i] for part in batch for i in part] for batch in read_json(folder.training_plan)["batches"]]
    generator = torch.Generator().manual_seed(oracle.config.seed + iteration)
    order = [*range(len(batches)), *torch.randperm(len(batches), generator=generator).tolist()]
    rising = math.ceil(config.warmup * len(order))
    steps = []
    for step, index in enumerate(order):
        falling = (len(order) - step) / (len(order) - rising)
        rate = at_iteration(config.lr, iteration) * ((step + 1) / rising if step < rising else falling)
        loss, figures = torch.zeros(()), []
        for pair in batches[index]:
            score = scores[pair.key]
            real = logp(model, pair.prompt_ids, pair.real_ids)
            real_reward = beta * (real - score.opponent_real_logps)
            margin = real_reward - beta * (
                logp(model, pair.prompt_ids, pair.generated_ids) - score.opponent_generated_logps
            )
            game, nll = torch.log1p(torch.exp(-margin)), -real / len(pair.real_ids)
            loss = loss + (game + config.sft_weight * nll) / len(batches[index])
            figures.append(torch.stack([game, margin, real_reward, nll]).detach())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = float(torch.nn.utils.clip_grad_norm_(weights, config.max_grad_norm))
        optimiser.param_groups[0]["lr"] = rate
        optimiser.step()
        means = torch.stack(figures).mean(0).tolist()
        steps.append(dict(zip(("loss", "margin", "real_reward", "real_nll"), means, strict=True)))
        steps[-1] |= {"step": step, "lr": rate, "grad_norm": norm}
    return peft.get_peft_model_state_dict(model), steps


def furthest(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


@pytest.mark.parametrize(("iteration", "beta"), [(0, 0.1), (1, 0.4)])
def test_an_iteration_is_what_plain_torch_makes_of_its_pairs(iteration: int, beta: float, oracle: Oracle) -> None:
    adapter, steps = trained(oracle, iteration, beta=beta)
    folder = oracle.dir.iteration(iteration)
    kept = read_jsonl(folder.metrics)
    assert len(kept) == len(steps)
    for ours, theirs in zip(kept, steps, strict=True):
        assert {name: ours[name] for name in theirs} == pytest.approx(theirs, rel=2e-3, abs=2e-3)
    assert furthest(adapter, load_adapter(folder.adapter)) < 1e-3


def test_control_another_beta_ends_elsewhere(oracle: Oracle) -> None:
    adapter, _ = trained(oracle, 0, beta=0.2)
    assert furthest(adapter, load_adapter(oracle.dir.iteration(0).adapter)) > 1e-2


@pytest.mark.parametrize("iteration", [0, 1])
@torch.no_grad()
def test_an_evaluation_is_of_the_player_on_held_out_rows(iteration: int, oracle: Oracle) -> None:
    player, opponent = oracle.opponent(iteration + 1), oracle.opponent(iteration)
    found = read_evaluation(oracle.dir.iteration(iteration).evaluation)
    heldout = prepare(oracle.config, DATE).heldout
    assert {row.record_id for row in heldout}.isdisjoint(pair.record_id for pair in oracle.generated(0))
    rewards = []
    for index, row in enumerate(heldout):
        key = noise_key(oracle.config.seed, 0, f"held-out {row.record_id}")
        theirs = sampled(opponent, row.prompt_ids, key, oracle.config, plain=True)
        assert tuple(found.generated_ids[index]) == sampled(player, row.prompt_ids, key, oracle.config, plain=True)
        real = [float(logp(model, row.prompt_ids, row.real_ids)) for model in (player, opponent)]
        generated = [float(logp(model, row.prompt_ids, theirs)) for model in (player, opponent)]
        assert found.real_nll[index] == pytest.approx(-real[0], abs=1e-3)
        rewards.append((real[0] - real[1], generated[0] - generated[1], real[0], len(row.real_ids), len(theirs)))
    rows = found.rows("report")
    real_rewards, generated_rewards, logps, tokens, theirs_tokens = zip(*(rewards[row] for row in rows), strict=True)
    wins = [(one > other) + 0.5 * (one == other) for one in real_rewards for other in generated_rewards]
    figures = panel(found, "report", seed=oracle.config.seed)
    assert figures["nll"].value == pytest.approx(-sum(logps) / sum(tokens), abs=1e-4)
    assert figures["reward_auc"].value == pytest.approx(sum(wins) / len(wins))
    assert figures["kl"].value == pytest.approx(-sum(generated_rewards) / sum(theirs_tokens), abs=1e-4)
