"""Whether what we compute is what a model computes by itself: asked of each base as it is loaded, on 8 tokens.

reference = own_logits(causal_lm, base.name, device)      # as transformers has it
...                                                       # its layers and attention replaced by ours
check_logits(reference, ours, causal_lm.config, base.name, device)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from qspin.errors import QspinError, one_line
from qspin.fitting.memory import refusals_told
from qspin.layers.attention import Layout, Lengths, Packed, Rules
from qspin.layers.refit import in_one_mode

# a layer's kind in transformers' words, the first of them an older one → whether it attends in a window
KINDS = {"attention": False, "full_attention": False, "sliding_attention": True}


class _Asking(Packed):
    """Refuses what 8 tokens would not show: a layer that attends twice in a pass, for whose keys a cache has no second
    place, and one whose window, longer than that, is in its mask alone, which we do without."""

    def __init__(self, texts: int, count: int, kinds: list[str], device: torch.device) -> None:
        super().__init__([Lengths(count)] * texts, device)
        self._kinds = dict(enumerate(kinds))
        self._asked: set[int] = set()

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, rules: Rules) -> Tensor:
        if layer in self._asked:
            raise RuntimeError(f"layer {layer} attends more than once in a pass")
        self._asked.add(layer)
        kind = self._kinds.get(layer)
        if kind is not None and KINDS.get(kind) != (rules.window is not None):
            seen = "all that is before" if rules.window is None else f"{rules.window} tokens back"
            raise RuntimeError(f"layer {layer} is of {kind}, and its attention is asked for {seen}")
        return super().attend(layer, query, key, value, rules)


def own_logits(causal_lm: Any, name: str, device: torch.device) -> Tensor:
    """(8, V) fp32: logits of a model as it came.

    Raises:
        QspinError: it can't be trained here: its own pass fails, or nothing of it can be computed again.
    """
    if not causal_lm.supports_gradient_checkpointing:
        raise QspinError(
            f"model.id: {name} ({causal_lm.config.model_type}) has no gradient checkpointing in transformers, which "
            "training relies on where memory is short; take a model of another family"
        )
    in_one_mode(causal_lm)
    with torch.no_grad(), _refused(causal_lm.config, name):
        ids = _some_ids(causal_lm.get_output_embeddings().weight.shape[0])
        logits: Tensor = causal_lm(input_ids=ids[None].to(device), use_cache=False).logits[0]
    return logits.float()


def check_logits(
    reference: Tensor,
    ours: Callable[[Tensor, Tensor, Layout], Tensor],
    config: Any,
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    advice: str = "",
) -> None:
    """Some families scale, cap or mix in a way of theirs.

    Args:
        reference: `own_logits`.
        ours: a row's ids (T,), positions (T,) and layout → (T, V) fp32.
        advice: what may help where ours is something else.

    Raises:
        QspinError: what we compute is something else.
    """
    if not bool(torch.isfinite(reference).all()):
        raise QspinError(
            f"model.id: {name}'s own logits are not finite numbers in {dtype}; set model.dtype to a type of larger "
            "range, or take another base"
        )
    count, vocabulary = reference.shape
    ids, family = _some_ids(vocabulary), config.model_type
    row = torch.cat([ids, ids.flip(0), ids])  # the same text at a row's beginning, and after another one
    positions = torch.arange(count, device=device).repeat(3)
    layout = _Asking(3, count, getattr(config.get_text_config(), "layer_types", None) or [], device)
    with torch.no_grad(), _refused(config, name, advice):
        first, _, later = ours(row, positions, layout).chunk(3)
    # 16-bit rounding adds up over layers; a wrong scale or formula is far beyond it
    known = apart = 1e-3 if dtype == torch.float32 else 0.1
    if device.type == "cpu":  # where a text's place in a row does not change how its sums are rounded
        apart /= 2
    largest = reference.abs().max()
    if not bool((first - reference).abs().max() <= known * largest):
        raise QspinError(
            f"model.id: {name} ({family}) computes its logits in a way that qspin does not know; please report the "
            f"model{advice}"
        )
    if not bool((later - first).abs().max() <= apart * largest):
        raise QspinError(
            f"model.id: {name} ({family}) carries something from one text to the next in a row, as recurrent and "
            "convolutional layers do, and qspin packs texts side by side; take a model whose layers mix tokens by "
            f"attention alone{advice}"
        )


@contextlib.contextmanager
def _refused(config: Any, name: str, advice: str = "") -> Iterator[None]:
    try:
        with refusals_told():
            yield
    except torch.AcceleratorError:  # the GPU itself
        raise
    except (RuntimeError, AttributeError, TypeError) as error:  # a decoder that ours does not fit into
        raise QspinError(
            f"model.id: {name} ({config.model_type}) has layers that qspin can't compute (keys and values of two "
            f"sizes, or an attention of their own): {one_line(error)}{advice}"
        ) from None


def _some_ids(vocabulary: int) -> Tensor:
    return torch.arange(8) * 37 % vocabulary
