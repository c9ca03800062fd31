"""What surrounds the flash kernel: which keys a span sees, and whose gradients are summed. The kernel: gpu/."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from stand_in import plain_flash
from torch import Tensor

from qspin.layers.attention import Lengths, Packed, Rules, _SpanAttention
from qspin.layers.flash import FlashAttention, Spans, can_flash

CPU = torch.device("cpu")


def spans_of(row: Packed) -> Spans:
    return Spans([queries.stop - queries.start for queries in row.queries], row.places, row.prefix, CPU)


def test_lengths_and_keys_by_hand() -> None:
    spans = spans_of(Packed([Lengths(2, 1, 2), Lengths(1, 2)], CPU, prefix=1))
    # the row: prefix 0 · prompt 1 2, real 3, generated 4 5 · prompt 6, real 7 8
    assert spans.query_ends.tolist() == [0, 1, 4, 6, 9]
    assert spans.key_places.tolist() == [0, 0, 1, 2, 3, 0, 1, 2, 4, 5, 0, 6, 7, 8]
    assert spans.key_ends.tolist() == [0, 1, 5, 10, 14]
    assert (spans.most_queries, spans.most_keys) == (3, 5)


@pytest.mark.parametrize("prefix", [0, 3])
def test_gradients_go_to_the_places_that_were_read(prefix: int) -> None:
    spans = spans_of(Packed([Lengths(2, 3, 4), Lengths(5, 1), Lengths(1, 2, 2)], CPU, prefix))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 20 + prefix, 8, generator=generator, requires_grad=True)
    gathered = spans.gather(x)
    grad = torch.randn(gathered.shape, generator=generator)
    gathered.backward(grad)
    assert x.grad is not None
    torch.testing.assert_close(spans.gather_backward(grad), x.grad)
    rounded = grad.bfloat16()
    (wanted,) = torch.autograd.grad(spans.gather(x), x, rounded.float())
    assert torch.equal(spans.gather_backward(rounded), wanted.bfloat16()), "rounded more than once"


@pytest.fixture
def kernel() -> Iterator[None]:
    """A CPU has none: one in its place."""
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", plain_flash.forward, "AutogradCPU")
        library.impl("_flash_attention_backward", plain_flash.backward, "AutogradCPU")
        yield


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 4)])
def test_each_span_is_plain_attention(prefix: int, window: int | None, heads: int, kv_heads: int) -> None:
    row = Packed([Lengths(3, 5, 7), Lengths(5, 9, 1), Lengths(1, 6), Lengths(2, 1, 4)], CPU, prefix)
    tokens, size = prefix + sum(group.total for group in row.groups), 8
    generator = torch.Generator().manual_seed(0)
    shapes = ((heads, tokens, size), (kv_heads, tokens, size), (kv_heads, tokens, size), (tokens, heads, size))
    *inputs, grad = (torch.randn(shape, generator=generator) for shape in shapes)

    def both(function: Any, *rules: Any) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        output = function.apply(*leaves, *rules)
        return [output.detach(), *torch.autograd.grad(output, leaves, grad)]

    found = both(FlashAttention, spans_of(row), 0.3, window)
    wanted = both(_SpanAttention, row, Rules(0.3, window, None))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("other", "wanted"),
    [
        ({}, True),
        ({"capability": (12, 0)}, True),
        ({"capability": (7, 5)}, False),
        ({"dtype": torch.float32}, False),
        ({"size": 264}, False),
        ({"size": 100}, False),
        ({"built": False}, False),
        ({"hip": "7.0"}, False),  # its causal mask is another one
    ],
)
def test_which_gpus_have_the_kernel(other: dict[str, Any], wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case: dict[str, Any] = {
        "capability": (8, 6), "dtype": torch.bfloat16, "size": 128, "built": True, "hip": None, **other
    }  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: case["capability"])
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: case["built"])
    monkeypatch.setattr(torch.version, "hip", case["hip"])
    query: Any = SimpleNamespace(device=torch.device("cuda"), dtype=case["dtype"], shape=(8, 20, case["size"]))
    assert can_flash(query) is wanted
