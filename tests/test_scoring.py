"""Log-probs and adapter gradients against plain transformers and PEFT, one sequence at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import transformers
from conftest import ARCHITECTURES, VOCABULARY
from torch import Tensor

from qspin.fitting import footprint
from qspin.model import SlotModel
from qspin.packing import lengths_of, pack_row, plan_batches
from qspin.records import Pair, Score
from qspin.scoring import pair_logps, score_pairs

LoadModel = Callable[..., SlotModel]
TinyFolder = Callable[[str], Path]


# --- the reference: nothing of qspin's attention, LoRA or head; test_generation uses it too ---


def plain_twin(model: SlotModel, folder: Path) -> Any:
    """The player in the slot as a plain fp32 PEFT model with eager attention on the dequantised base."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    weights = dict(base.named_parameters())
    copied = 0
    with torch.no_grad():
        for name, module in model.peft_model.get_base_model().named_modules():
            if isinstance(module, bnb.nn.Linear4bit):
                matrix = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
                weights[name.removesuffix(".base_layer") + ".weight"].copy_(matrix)
                copied += 1
    assert copied > 0
    config = model.peft_model.peft_config["default"]
    twin = peft.get_peft_model(
        base,
        peft.LoraConfig(r=config.r, lora_alpha=config.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    slot = adapter_of(twin)
    assert slot.keys() == model.adapter().keys()
    with torch.no_grad():
        for name, tensor in model.adapter().items():
            slot[name].copy_(tensor)
    return twin.eval()


def adapter_of(twin: Any) -> dict[str, torch.nn.Parameter]:
    return {
        name.replace(".default.", "."): parameter
        for name, parameter in twin.named_parameters()
        if parameter.requires_grad
    }


def logps_after(twin: Any, context: Sequence[int], completion: Sequence[int]) -> Tensor:
    """The summed log-prob of a completion after a context: one plain causal sequence, full logits."""
    ids = torch.tensor([[*context, *completion]])
    logps = twin(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)  # (T, V)
    predicted: Tensor = logps[len(context) - 1 : -1].gather(1, torch.tensor(completion)[:, None])
    return predicted.sum()


def plain_logps(twin: Any, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    return (
        torch.stack([logps_after(twin, pair.prompt_ids, pair.real_ids) for pair in pairs]),
        torch.stack([logps_after(twin, pair.prompt_ids, pair.generated_ids) for pair in pairs]),
    )


# --- rows ---


def make_pair(name: str, prompt: int, real: int, generated: int, *, seed: int = 0) -> Pair:
    """A pair of so many random tokens."""
    generator = random.Random(f"{seed} {name}")

    def ids(count: int) -> tuple[int, ...]:
        return tuple(generator.randrange(VOCABULARY) for _ in range(count))

    return Pair(name, 0, ids(prompt), ids(real), ids(generated), ended=True)


# Windows of 7 positions end within the prompt, at its end, and within a completion.
PAIRS = [
    make_pair("ordinary", 9, 11, 6),
    make_pair("one-token-sides", 5, 1, 1),
    make_pair("one-token-real", 12, 1, 9),
    make_pair("one-token-generated", 4, 10, 1),
    make_pair("one-token-prompt", 1, 7, 8),
    make_pair("one-token-everything", 1, 1, 1),
    make_pair("longer-than-the-budget", 30, 25, 20),
    replace(twice := make_pair("identical", 6, 8, 0), generated_ids=twice.real_ids),
]
ORDINARY, IDENTICAL = PAIRS[0], PAIRS[-1]
SYSTEM = (3, 1, 4, 1, 5, 9, 2, 6, 5)  # begins every prompt of these, and is computed once a row
WITH_SYSTEM = [replace(pair, prompt_ids=SYSTEM + pair.prompt_ids) for pair in PAIRS]
CPU = torch.device("cpu")


def micro_batches_of(pairs: Sequence[Pair], budget: int, prefix: int = 0) -> list[list[int]]:
    lengths = [lengths_of(pair, prefix) for pair in pairs]
    (batch,) = plan_batches(lengths, batch_size=len(pairs), token_budget=budget, seed=0)
    return batch


def assert_same_gradients(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        other = theirs[name]
        assert other.norm() > 1e-3, name  # else nothing is compared
        assert (gradient - other).norm() < 1e-3 * other.norm(), name
        assert torch.cosine_similarity(gradient.flatten(), other.flatten(), dim=0) > 0.9999, name


def gradients_of(parameters: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}


def scalar(real: Tensor, generated: Tensor) -> Tensor:
    """Something to differentiate that weighs each completion differently: a mixed-up owner shows."""
    weights = torch.linspace(0.5, 1.5, len(real))
    return (weights * real).sum() - (weights.flip(0) * generated).sum()


@pytest.mark.parametrize(("pairs", "prefix"), [(PAIRS, 0), (WITH_SYSTEM, len(SYSTEM))], ids=["plain", "prefix"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logps_and_gradients_are_those_of_plain_sequences(
    architecture: str, pairs: list[Pair], prefix: int, tiny_model: LoadModel, tiny_folder: TinyFolder
) -> None:
    model = tiny_model(architecture, moved=True)
    twin = plain_twin(model, tiny_folder(architecture))
    expected_real, expected_generated = plain_logps(twin, pairs)
    scalar(expected_real, expected_generated).backward()

    micro_batches = micro_batches_of(pairs, 40, prefix)
    assert 1 < len(micro_batches) < len(pairs)  # pairs side by side, and one by itself that exceeds the budget
    real, generated = torch.zeros(len(pairs)), torch.zeros(len(pairs))
    for micro_batch in micro_batches:
        index = torch.tensor(micro_batch)
        logps = pair_logps(model, pack_row([pairs[i] for i in micro_batch], CPU, prefix))
        real, generated = real.index_add(0, index, logps[0]), generated.index_add(0, index, logps[1])
    scalar(real, generated).backward()

    torch.testing.assert_close(real, expected_real, rtol=1e-4, atol=0)
    torch.testing.assert_close(generated, expected_generated, rtol=1e-4, atol=0)
    assert_same_gradients(gradients_of(model.parameters), gradients_of(adapter_of(twin)))


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_control_a_generated_side_that_sees_the_real_one_differs(
    architecture: str, tiny_model: LoadModel, tiny_folder: TinyFolder
) -> None:
    # what plain causal attention over the packed row would compute
    model = tiny_model(architecture, moved=True)
    twin = plain_twin(model, tiny_folder(architecture))
    with torch.no_grad():
        _, generated = pair_logps(model, pack_row([ORDINARY], CPU))
        apart = logps_after(twin, ORDINARY.prompt_ids, ORDINARY.generated_ids)
        leaking = logps_after(twin, ORDINARY.prompt_ids + ORDINARY.real_ids, ORDINARY.generated_ids)
    assert abs(generated - apart) < 1e-4 * abs(apart)
    assert abs(generated - leaking) > 1e-2 * abs(leaking)


@pytest.mark.parametrize(
    ("architecture", "peculiarity"),
    [
        ("mistral", "sliding_window"),
        ("gemma2", "sliding_window"),
        ("gemma2", "attn_logit_softcapping"),
        ("gemma2", "final_logit_softcapping"),
    ],
)
def test_control_peculiarities_bite_on_these_rows(
    architecture: str, peculiarity: str, tiny_model: LoadModel, tiny_folder: TinyFolder
) -> None:
    # else the comparison above would say nothing on them
    twin = plain_twin(tiny_model(architecture, moved=True), tiny_folder(architecture))
    with torch.no_grad():
        bitten = logps_after(twin, ORDINARY.prompt_ids, ORDINARY.real_ids)
        for part in (twin.get_base_model().config, *twin.modules()):  # read here by one, there by another
            value = getattr(part, peculiarity, None)
            if value is not None:
                setattr(part, peculiarity, type(value)(10_000))
        free = logps_after(twin, ORDINARY.prompt_ids, ORDINARY.real_ids)
    assert abs(bitten - free) > 1e-2 * abs(bitten)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_company_does_not_matter(architecture: str, tiny_model: LoadModel) -> None:
    model = tiny_model(architecture, moved=True)
    with torch.no_grad():
        together = pair_logps(model, pack_row(PAIRS, CPU))
        alone = [pair_logps(model, pack_row([pair], CPU)) for pair in PAIRS]
    for side in (0, 1):
        torch.testing.assert_close(together[side], torch.cat([logps[side] for logps in alone]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_gradient_is_written_into_zeros_as_that_of_a_batch_of_one(architecture: str, tiny_model: LoadModel) -> None:
    """It would be two launches more on a GPU, and all of it written twice."""
    logps, _ = pair_logps(tiny_model(architecture), pack_row(PAIRS[:2], CPU))
    nodes: list[Any] = [logps.grad_fn]
    seen = set(nodes)
    for node in nodes:
        following = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= following
        nodes += following
    names = [node.name() for node in nodes]
    assert sum("Attention" in name for name in names) == 3  # a layer
    assert "SelectBackward0" not in names


def test_a_shared_prefix_does_not_matter(tiny_model: LoadModel) -> None:
    # computed once or with every prompt; alone or together
    model = tiny_model("mistral", moved=True)
    with torch.no_grad():
        whole = pair_logps(model, pack_row(WITH_SYSTEM, CPU))
        for prefix in (1, 5, len(SYSTEM)):
            torch.testing.assert_close(
                pair_logps(model, pack_row(WITH_SYSTEM, CPU, prefix)), whole, rtol=1e-5, atol=1e-5
            )


def test_identical_completions_have_equal_logps_and_pull_nowhere(tiny_model: LoadModel) -> None:
    model = tiny_model(moved=True)
    real, generated = pair_logps(model, pack_row([IDENTICAL, ORDINARY], CPU))
    torch.testing.assert_close(real[0], generated[0], rtol=1e-6, atol=0)
    assert abs(real[1] - generated[1]) > 1
    size = torch.autograd.grad(real[0], list(model.parameters.values()), retain_graph=True)
    pull = torch.autograd.grad(real[0] - generated[0], list(model.parameters.values()))
    assert all(p.norm() < 1e-4 * s.norm() for p, s in zip(pull, size, strict=True))


def test_an_empty_side_scores_zero(tiny_model: LoadModel) -> None:
    # as when only the real completions of held-out rows are scored
    model = tiny_model(moved=True)
    empty = [replace(pair, generated_ids=()) for pair in PAIRS]
    with torch.no_grad():
        real, generated = pair_logps(model, pack_row(empty, CPU))
        both, _ = pair_logps(model, pack_row(PAIRS, CPU))
    assert generated.tolist() == [0.0] * len(PAIRS)
    torch.testing.assert_close(real, both, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_vocabulary_blocks_change_nothing(
    architecture: str, tiny_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the vocabulary's 512 tokens at once, then 3 at a time
    model = tiny_model(architecture, moved=True)
    results = []
    for tokens in (VOCABULARY, 3):
        completion_tokens = sum(len(pair.real_ids) + len(pair.generated_ids) for pair in PAIRS)
        monkeypatch.setitem(footprint.LOGITS_AT_ONCE, "cpu", tokens * completion_tokens)
        model.peft_model.zero_grad()
        real, generated = pair_logps(model, pack_row(PAIRS, CPU))
        scalar(real, generated).backward()
        results.append((real.detach(), generated.detach(), gradients_of(model.parameters)))
    (real, generated, gradients), (real_3, generated_3, gradients_3) = results
    torch.testing.assert_close(real_3, real, rtol=1e-6, atol=0)
    torch.testing.assert_close(generated_3, generated, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients_3, gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "dtype"),
    [
        ("llama", "float32"),
        ("llama", "bfloat16"),
        ("mistral", "bfloat16"),
        ("gemma2", "float32"),
        ("gemma2", "bfloat16"),
    ],
)
def test_scoring_is_the_training_forward_bit_for_bit(architecture: str, dtype: str, tiny_model: LoadModel) -> None:
    model = tiny_model(architecture, dtype=dtype, moved=True)
    row = [WITH_SYSTEM[0], WITH_SYSTEM[2], WITH_SYSTEM[4]]
    with torch.no_grad():
        before = pair_logps(model, pack_row(row, CPU, len(SYSTEM)))
    training = pair_logps(model, pack_row(row, CPU, len(SYSTEM)))
    (training[0] - training[1]).sum().backward()
    model.peft_model.zero_grad()
    with torch.no_grad():
        after = pair_logps(model, pack_row(row, CPU, len(SYSTEM)))
    for side in (0, 1):
        assert training[side].requires_grad
        assert training[side].dtype == torch.float32
        assert torch.equal(training[side].detach(), before[side])
        assert torch.equal(after[side], before[side])


def test_scores_carry_the_pairs_keys_and_survive_their_file(tiny_model: LoadModel) -> None:
    model = tiny_model(moved=True)
    pairs = [replace(pair, iteration=index % 2) for index, pair in enumerate(WITH_SYSTEM)]
    micro_batches = micro_batches_of(pairs, 40, len(SYSTEM))
    shards = list(score_pairs(model, pairs, micro_batches, len(SYSTEM)))
    assert [[score.key for score in shard] for shard in shards] == [
        [pairs[index].key for index in micro_batch] for micro_batch in micro_batches
    ]
    for shard, micro_batch in zip(shards, micro_batches, strict=True):
        with torch.no_grad():
            real, generated = pair_logps(model, pack_row([pairs[index] for index in micro_batch], CPU, len(SYSTEM)))
        kept = [Score(**json.loads(json.dumps(score.to_json()))) for score in shard]
        # fp32 numbers come back from JSON as the same fp32 numbers
        assert torch.equal(torch.tensor([score.opponent_real_logps for score in kept]), real)
        assert torch.equal(torch.tensor([score.opponent_generated_logps for score in kept]), generated)
