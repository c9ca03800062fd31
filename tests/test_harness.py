"""What lm-eval asks of a player is answered as its own HFLM does on the same weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import HOUSE_STYLE, moved_adapter
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from test_scoring import plain_twin

from qspin.errors import QspinError
from qspin.fitting.memory import OutOfMemory
from qspin.run_dir import RunDir
from qspin.trials import harness
from qspin.trials.harness import Player, Sampling
from qspin.trials.loaded import Loaded

TEXTS = [row["prompt"] for row in map(json.loads, (HOUSE_STYLE / "train.jsonl").read_text().splitlines())][:40]


@pytest.fixture(scope="module")
def loaded(exact: RunDir) -> Loaded:
    """With a player in the slot that is far from the base."""
    found = Loaded.open(exact, "base")
    found.model.set_adapter(moved_adapter(found.model))
    return found


@pytest.fixture(scope="module")
def player(loaded: Loaded) -> Player:
    return Player(loaded, lambda _count: None)


@pytest.fixture(scope="module")
def peer(loaded: Loaded, tiny_folder: Callable[[str], Path], tokenizer: Any) -> HFLM:
    twin = plain_twin(loaded.model, tiny_folder("llama")).base_model.model
    return HFLM(pretrained=twin, tokenizer=tokenizer, backend="causal", batch_size=4, max_length=512)


def asked(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


PAIRS = [
    *((f"Q: {text}\nA:", f" {choice}") for text in TEXTS[:6] for choice in ("yes", "no", "a parrot, I say")),
    ("a context that ends in blanks  ", "goes on"),
    ("", "no context at all"),
    ("the water is o", "ver there"),  # tokens are those of both together
    ("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "Hello.<|im_end|>"),
    ("<|endoftext|>begun already", " and on"),
    (" ".join(TEXTS), " cut from the left"),
]


# --- likelihoods ---


def test_likelihoods_are_those_of_hflm(player: Player, peer: HFLM) -> None:
    ours, theirs = (lm.loglikelihood(asked("loglikelihood", *PAIRS)) for lm in (player, peer))
    for pair, (logp, greedy), (their_logp, their_greedy) in zip(PAIRS, ours, theirs, strict=True):
        assert logp == pytest.approx(their_logp, rel=1e-4), pair
        assert greedy == their_greedy, pair
    assert len(peer.tok_encode(PAIRS[-1][0])) > 512, "none was cut"
    # the same text with another boundary is another question
    (moved, _), (whole, _) = player.loglikelihood(
        asked("loglikelihood", ("the water is ove", "r there"), ("the water is o", "ver there"))
    )
    assert abs(moved - whole) > 0.1


def test_what_it_would_say_is_greedy(player: Player, peer: HFLM) -> None:
    prompts = [f"Q: {text}\nA:" for text in TEXTS[:4]]
    said = player.generate_until(asked("generate_until", *((prompt, {"max_gen_toks": 3}) for prompt in prompts)))
    pairs = [pair for prompt, text in zip(prompts, said, strict=True) for pair in ((prompt, text), (prompt, "zebra"))]
    ours, theirs = (lm.loglikelihood(asked("loglikelihood", *pairs)) for lm in (player, peer))
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert {greedy for _, greedy in ours} == {True, False}


def test_rolling_likelihoods_are_those_of_hflm(loaded: Loaded, peer: HFLM) -> None:
    heard: list[float] = []
    player = Player(loaded, heard.append)
    texts = [(TEXTS[0],), (" ".join(TEXTS[:10]),), (" ".join(TEXTS),)]
    assert len(peer.tok_encode(texts[-1][0])) > 512, "none takes two windows"
    ours, theirs = (lm.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) for lm in (player, peer))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert sum(heard) == pytest.approx(len(texts))


def test_another_player_answers_otherwise(loaded: Loaded, player: Player) -> None:
    question = asked("loglikelihood", PAIRS[0])
    moved = player.loglikelihood(question)
    was = loaded.model.adapter()
    loaded.seat("base")
    assert abs(player.loglikelihood(question)[0][0] - moved[0][0]) > 0.1
    loaded.model.set_adapter(was)
    assert player.loglikelihood(question) == moved


# --- answers ---

GENERATIONS: list[tuple[str, dict[str, Any]]] = [
    *((f"Q: {text}\nA:", {"until": ["\n", "the"], "max_gen_toks": 24}) for text in TEXTS[:6]),
    *((text, {"until": ["<|im_end|>", "e"], "max_gen_toks": 24, "do_sample": False}) for text in TEXTS[6:9]),
    *((text, {"max_gen_toks": 30, "temperature": 0.0}) for text in TEXTS[9:12]),
    (TEXTS[12], {"until": "a", "max_new_tokens": 24}),
    (" ".join(TEXTS), {"until": [], "max_gen_toks": 8}),
]


def test_greedy_answers_are_those_of_hflm(player: Player, peer: HFLM) -> None:
    ours, theirs = (
        # HFLM adds to the settings that it is given
        lm.generate_until(asked("generate_until", *((text, json.loads(json.dumps(how))) for text, how in GENERATIONS)))
        for lm in (player, peer)
    )
    assert ours == theirs
    assert len(set(ours)) > len(ours) / 2
    longest = player.generate_until(asked("generate_until", (GENERATIONS[0][0], {"max_gen_toks": 24})))[0]
    assert ours[0] != longest, "nothing was cut"


def test_an_empty_text_is_gone_on_from(player: Player) -> None:
    how = {"max_gen_toks": 4}
    first, second = player.generate_until(asked("generate_until", ("", how), ("<|endoftext|>", how)))
    assert first == second


def test_conversations_are_rendered_as_hflm_does(player: Player, peer: HFLM) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Who?"},
        {"role": "assistant", "content": "A parrot."},
        {"role": "user", "content": "Since when?"},
    ]
    assert player.apply_chat_template(turns) == peer.apply_chat_template(turns)
    begun = [*turns, {"role": "assistant", "content": "Since I"}]
    assert player.apply_chat_template(begun, add_generation_prompt=False) == peer.apply_chat_template(
        begun, add_generation_prompt=False
    )
    assert player.tokenizer_name.startswith("tiny-llama")


def test_samples_are_drawn_and_drawn_alike(player: Player) -> None:
    def said(temperature: float, **more: Any) -> list[str]:
        how = {"do_sample": True, "temperature": temperature, "max_gen_toks": 12, **more}
        return player.generate_until(asked("generate_until", (TEXTS[0], how), (TEXTS[0], how)))

    first, second = said(1.0)
    assert first != second
    assert said(1.0) == [first, second]
    assert said(2.0) != [first, second]
    assert said(1.0, top_p=0.01) == said(0.0)


def test_settings_that_are_not_known_are_refused() -> None:
    assert Sampling.of({"num_beams": 1, "top_k": 5, "until": "x"}) == Sampling(256, 0.0, 1.0, ("x",))
    assert Sampling.of({"do_sample": True}).temperature == 1.0
    assert Sampling.of({"do_sample": False, "temperature": 0.7}).temperature == 0.0
    for strange in ({"num_beams": 4}, {"do_sample": True, "top_k": 5}, {"repetition_penalty": 1.1}):
        with pytest.raises(QspinError, match="want what qspin does not do"):
            Sampling.of(strange)


def test_lengths_that_do_not_fit(player: Player) -> None:
    with pytest.raises(QspinError, match="512 new tokens; the model's context is 512"):
        player.generate_until(asked("generate_until", ("Hi", {"max_gen_toks": 512})))
    with pytest.raises(QspinError, match="between 1 and the 512 of the model's context"):
        player.loglikelihood(asked("loglikelihood", ("Hi", "")))


def test_answers_go_on_when_memory_runs_out(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[float] = []
    player = Player(loaded, heard.append)
    questions = asked("generate_until", *((text, {"max_gen_toks": 12}) for text in TEXTS[:6]))
    whole, inner, widths = player.generate_until(questions), harness.generate, []
    assert sum(heard) == pytest.approx(len(questions))
    monkeypatch.setattr(harness, "rows_at_once", lambda *_: 4)

    def refuse(*answered: int) -> None:
        """After so many answers, at each of the first tries."""
        widths.clear()

        def refusing(model: Any, requests: Any, **settings: Any) -> Any:
            widths.append(settings["width"])
            if len(widths) > len(answered):
                return inner(model, requests, **settings)
            if some := answered[len(widths) - 1]:
                inner(model, requests[:some], **settings)
            raise OutOfMemory("no room")

        monkeypatch.setattr(harness, "generate", refusing)

    refuse(3, 0)
    assert player.generate_until(questions) == whole
    assert widths == [4, 2, 1]
    assert sum(heard) == pytest.approx(2 * len(questions))
    refuse(0, 1, 0, 1, 1)  # never three without an answer between
    assert player.generate_until(questions) == whole
    assert widths == [4, 2, 1, 1, 1, 1]
    refuse(0, 1, 0, 0)
    with pytest.raises(QspinError, match="out of memory 3 times in a row while answering"):
        player.generate_until(questions)
    assert widths == [4, 2, 1, 1]
