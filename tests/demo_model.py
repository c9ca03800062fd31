"""What the embedded model does wherever it is: asked of it on a CPU by test_smollm2.py, on a GPU by gpu/."""

from __future__ import annotations

from pathlib import Path

from qspin.generation import Request, generate
from qspin.model import SlotModel
from qspin.packing import common_prefix, pack_row
from qspin.prepare import Prepared
from qspin.records import Message, Pair
from qspin.sampling import noise_key
from qspin.scoring import pair_logps, score_pairs


def answers(model: SlotModel, prepared: Prepared, prompts: list[tuple[int, ...]], temperature: float) -> list[Pair]:
    completions = generate(
        model,
        [Request(prompt, noise_key(0, 0, str(index))) for index, prompt in enumerate(prompts)],
        max_new_tokens=24,
        temperature=temperature,
        top_p=1.0,
        width=4,
        stop_ids=prepared.stop_ids,
        on_step=lambda _tokens, _rows: None,
    )
    return [
        Pair(str(index), 0, prompt, example.real_ids, completion.ids, completion.ended)
        for index, (prompt, example, completion) in enumerate(zip(prompts, prepared.train, completions, strict=False))
    ]


def check_knowledge(model: SlotModel, prepared: Prepared) -> None:
    questions = ["What is the capital of France?", "What is 2 + 2?", "What colour is grass?"]
    prompts = [prepared.renderer.prompt_ids([Message("user", question)]) for question in questions]
    paris, four, green = (
        prepared.renderer.completion_text(pair.generated_ids) for pair in answers(model, prepared, prompts, 0.0)
    )
    assert "Paris" in paris
    assert "4" in four
    assert "green" in green.lower()


def check_playing(model: SlotModel, prepared: Prepared, folder: Path, recomputed: int) -> None:
    """Generate, save, score, then the training forward: the same bits under the same weights."""
    before = model.base_hash()
    pairs = answers(model, prepared, [example.prompt_ids for example in prepared.train], 1.0)
    model.save_adapter(folder)
    prefix = common_prefix([pair.prompt_ids for pair in pairs])
    assert prefix > 20  # the template's system message
    [scores] = score_pairs(model, pairs, [list(range(len(pairs)))], prefix)
    model.use_gradient_checkpointing(recomputed)
    real, generated = pair_logps(model, pack_row(pairs, model.device, prefix))
    (real - generated).sum().backward()
    assert real.tolist() == [score.opponent_real_logps for score in scores]
    assert generated.tolist() == [score.opponent_generated_logps for score in scores]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters.values())
    assert model.base_hash() == before
    # its own samples are likelier to it than other people's answers
    assert sum(s.opponent_generated_logps for s in scores) / sum(len(p.generated_ids) for p in pairs) > (
        sum(s.opponent_real_logps for s in scores) / sum(len(p.real_ids) for p in pairs)
    )
