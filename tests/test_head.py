"""Logits a part of the vocabulary at a time, and their gradients, against plain arithmetic; a head that lies aside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from qspin.fitting import footprint
from qspin.generation import Completion, Request, generate
from qspin.layers.head import Head
from qspin.model import SlotModel

TOKENS, WIDTH, ROWS = 100, 16, 5


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_parts_make_up_the_whole(softcap: float | None, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH, TOKENS, bias=bias).requires_grad_(False)
    head = Head(linear, softcap, torch.device("cpu"))
    hidden = torch.randn(ROWS, WIDTH, requires_grad=True)
    wanted = linear(hidden) if softcap is None else softcap * torch.tanh(linear(hidden) / softcap)
    grad = torch.randn(ROWS, TOKENS)
    (wanted_grad,) = torch.autograd.grad(wanted, hidden, grad, retain_graph=True)
    chosen = torch.tensor([3, 99, 3, 0, 41])
    (of_chosen,) = torch.autograd.grad(wanted.gather(1, chosen[:, None]).sum(), hidden)

    assert torch.allclose(head.logits(hidden), wanted, atol=1e-6)
    monkeypatch.setitem(footprint.MOST_WIDTH, "cpu", 30)  # parts of 30, 30, 30 and 10
    found = head.logits(hidden)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert not found.requires_grad
    parts = [(head.part(tokens), tokens) for tokens in (slice(0, 60), slice(60, TOKENS))]
    found_grad = sum(part.backward(grad[:, tokens], head.slope(found[:, tokens])) for part, tokens in parts)
    assert torch.allclose(found_grad, wanted_grad, atol=1e-6)
    slope = head.slope(found.gather(1, chosen[:, None])[:, 0])
    assert torch.allclose(head.gradients(chosen, slope), of_chosen, atol=1e-6)


@pytest.mark.parametrize("architecture", ["gemma2", "llama"])
def test_decoding_with_a_head_aside(
    architecture: str, tiny_model: Callable[..., SlotModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU has no other memory to lie in: only the order of a step is seen, the head after what a GPU would record."""
    model = tiny_model(architecture, moved=True)
    requests = [Request(tuple(range(3, 12 + n)), n) for n in range(5)]

    def complete() -> list[Completion]:
        return generate(
            model, requests, max_new_tokens=12, temperature=1.0, top_p=1.0, width=4, stop_ids=frozenset({7}),
            on_step=lambda _new, _work: None,
        )  # fmt: skip

    wanted = complete()
    assert len(set(wanted)) > 1
    monkeypatch.setattr(Head, "aside", True)
    assert model.footprint.head_aside
    assert complete() == wanted
