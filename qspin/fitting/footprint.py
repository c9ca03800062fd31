"""What a model of a known shape takes in memory: arithmetic, free of torch.

`plan.py` adds it up for machines and models that are not here, `budget.py` for those that are. Every formula follows
the code that it speaks of: a change of what a layer keeps belongs here too, and tests hold both against each other.

Letters: L layers of width D with an MLP of width I; H query heads and J key heads of size h, so Q = H·h numbers a
token for queries and K = J·h for keys, as many for values; V tokens in the vocabulary; r the adapter's rank; s bytes
a number in the compute type. A row has T tokens, of which C are predicted; each of its spans is t queries at s keys
(attention.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from qspin.config import Architecture
from qspin.fitting.shape import POST_NORMS, QUERY_NORMS, Linear, linears, widths
from qspin.units import NESTED_BLOCK, NF4_BLOCK

Device = Literal["cpu", "cuda"]

# more than this makes nothing faster (docs/performance.md for the CPU; the GPU's are estimates)
MOST_TOKENS: dict[str, int] = {"cpu": 4096, "cuda": 16384}
MOST_ROWS: dict[str, int] = {"cpu": 128, "cuda": 256}
SHARE = 0.8  # of the memory that the loaded model leaves; the rest is for what is not counted, and for others
ASIDE = 0.1  # of what the loaded model leaves: an embedding table that is more goes to main memory
HEAD_ASIDE = 0.5  # the same of one that is the head too, which each pass copies from there

# fp32 logits that exist at once, ten bytes each: on a CPU what its cache holds, on a GPU what keeps it busy
LOGITS_AT_ONCE: dict[str, int] = {"cpu": 2**22, "cuda": 2**24}
WIDTH: dict[str, int] = {"cpu": 1, "cuda": 64}  # products as wide as a multiple of it have the fastest kernels
MOST_WIDTH: dict[str, int] = {"cpu": 2**22, "cuda": 2**15}  # at most; of a head in main memory their weights are there
PREFILL_TOKENS = 2048  # prompt tokens computed at once
EVALUATED_ROWS = 64  # held-out rows answered between two signs of life
# positions that a cache grows by: on a GPU each time costs a decoding step recorded anew (decoding.py)
GROWTH: dict[str, int] = {"cpu": 64, "cuda": 128}

# sampling with a nucleus, bytes a logit: logits, weights, their share, sorted, order (8), sums twice, and a mask
SAMPLING = 33
# on a CPU, tensors of so many bytes and more are mapped by themselves (`memory.keep_freed_memory`); in the heap each
# layer's W would leave a hole of its size, gigabytes in all for a 7B model
MAPPED = 32 << 20
HOLES = 0.3  # what the heap of smaller ones holds between them, of the activations kept
OPTIMIZERS: dict[str, float] = {"adamw": 8.0, "rmsprop": 4.0, "paged_adamw_8bit": 2 + 8 / 256}  # bytes a weight


def vocabulary_step(device: str, predicted: int) -> int:
    """How many of the vocabulary's tokens have their logits made at once, for C predicted tokens."""
    most = max(1, min(MOST_WIDTH[device], LOGITS_AT_ONCE[device] // max(1, predicted)))
    return most - most % WIDTH[device] if most > WIDTH[device] else most


@dataclass(frozen=True, slots=True)
class Batch:
    """What memory and work of a packed row depend on."""

    tokens: int  # T
    predicted: int  # C
    seen: int  # keys of all spans
    scores: int  # Σ t·s over spans
    largest: int  # the largest t·s

    @staticmethod
    def of(groups: Iterable[tuple[int, int, int]], prefix: int = 0) -> Batch:
        """Of groups of (prompt, real, generated) tokens after a common prefix, as `attention.Packed` cuts them."""
        spans = [(prefix, prefix)]
        predicted = 0
        for prompt, real, generated in groups:
            spans.append((prompt + real, prefix + prompt + real))
            spans.append((generated, prefix + prompt + generated if generated else 0))
            predicted += real + generated
        return Batch(
            tokens=sum(queries for queries, _ in spans),
            predicted=predicted,
            seen=sum(keys for _, keys in spans),
            scores=sum(queries * keys for queries, keys in spans),
            largest=max(queries * keys for queries, keys in spans),
        )


@dataclass(frozen=True, slots=True)
class Footprint:
    """A model with an adapter on a kind of device. Sizes are bytes unless they say what else they count."""

    shape: Architecture
    rank: int
    targets: frozenset[str] | None  # names of adapted layers; None: all but the head
    device: Device
    itemsize: int  # s: 2 or 4
    recomputed: int  # layers, the first ones, which keep their input alone for the backward pass
    flash: bool = True  # the GPU has the flash kernel: none from before Ampere, and none of AMD's
    head_aside: bool = False  # in main memory, a part of it on the GPU at a time

    # --- what is there all the time

    @property
    def linear_weights(self) -> int:
        """How many weights are in 4 bits: L·(D·(Q + 2K) + Q·D + 3·D·I)."""
        return self.shape.layers * sum(linear.weights for linear in linears(self.shape))

    def quantised(self, double_quant: bool) -> int:
        """The 4-bit weights with their constants.

        Half a byte a weight, 64 bytes of code a layer, and a constant a block of 64: four bytes, or with double
        quantisation one, four more for each 256 of them, and 1028 a layer for their own code and offset. On a CPU the
        constants are there in fp32 once more (`lora._stacked`).
        """
        total = 0
        for linear in linears(self.shape):
            blocks = math.ceil(linear.weights / NF4_BLOCK)
            nested = blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 1028
            unpacked = 4 * blocks if self.device == "cpu" else 0
            total += math.ceil(linear.weights / 2) + 64 + (nested if double_quant else 4 * blocks) + unpacked
        return self.shape.layers * total

    def unquantised(self) -> int:
        """Embeddings, head, norms and biases in the compute type."""
        return (self.shape.parameters - self.linear_weights) * self.itemsize

    def set_aside(self, free: float) -> int:
        """Of those, what is put into main memory once all is loaded and leaves so many bytes free.

        On a GPU the embedding table, where it is more than ASIDE of them, or HEAD_ASIDE if it is the head too.
        """
        most = (HEAD_ASIDE if self.shape.tied_embeddings else ASIDE) * free
        return self.head_bytes if self.device == "cuda" and 0 <= most < self.head_bytes else 0

    @property
    def head_bytes(self) -> int:
        """The head's weights, or as many of embeddings: V·D in the compute type."""
        return self.shape.vocabulary * self.shape.hidden * self.itemsize

    @property
    def adapter_weights(self) -> int:
        """How many weights the adapter has: L·Σ r·(inputs + outputs) over adapted layers."""
        return self.shape.layers * sum(self.rank * (linear.inputs + linear.outputs) for linear in self._adapted)

    def adapter(self) -> int:
        """The slot in fp32. Of the first opponent, whom `game.py` keeps in main memory, there is a copy on a CPU."""
        return 4 * self.adapter_weights * (2 if self.device == "cpu" else 1)

    # --- training

    def gradients(self) -> int:
        """Of the adapter, fp32."""
        return 4 * self.adapter_weights

    def optimizer(self, name: str) -> int:
        """Its state: two fp32 moments a weight, one, or two of 8 bits with a constant each 256."""
        return int(OPTIMIZERS[name] * self.adapter_weights)

    def activations(self, batch: Batch) -> int:
        """The most that a forward and backward pass holds at once, beside weights and gradients."""
        return self.kept(batch) + self.working(batch)

    def kept(self, batch: Batch) -> int:
        """What is kept for the backward pass: of every layer, or of those that are recomputed the input alone.

        Beside that the last layer's output and the hidden state that the norm makes of it, what the head's backward
        pass takes (a direction a predicted token), positions as cosine and sine, and the masks.
        """
        width = self.shape.hidden
        inputs = self.recomputed * self.itemsize * width * batch.tokens
        whole = (self.shape.layers - self.recomputed) * self._kept_by_layer(batch)
        around = width * (2 * batch.tokens + batch.predicted) + 2 * self.shape.head_size * batch.tokens
        return inputs + whole + self.itemsize * around + self._masks(batch)

    def working(self, batch: Batch) -> int:
        """What is held for a moment while all of that is: by the head, or by the last layer's backward pass.

        A layer that is recomputed keeps for a moment what the others keep: on top of all that where it is the last one;
        before the first ones are recomputed, those that kept more are done with.
        """
        again = self._kept_by_layer(batch) if self.recomputed == self.shape.layers else 0
        layer = self._backward(batch) + again
        return max(self._head(batch.predicted, training=True), layer)

    def holes(self, batch: Batch) -> int:
        """What the heap holds between tensors on a CPU: an estimate of what was seen (docs/fitting.md).

        glibc's aligned blocks rarely go back into a hole of their own size, so the largest W of each layer leaves one,
        mapped ones aside, and so do activations.
        """
        if self.device != "cpu":
            return 0
        width, inner, queries, keys = widths(self.shape)
        rows = (queries + 2 * keys, queries, 2 * inner, inner)  # times the width: as many W as are made at once
        sizes = [self.itemsize * width * count for count in rows]
        largest = max((size for size in sizes if size < MAPPED), default=0)
        return self.shape.layers * largest + int(HOLES * self.kept(batch))

    def _kept_by_layer(self, batch: Batch) -> int:
        """What one layer keeps of a row for its backward pass.

        Two norms keep their inputs (D each), attention its result (Q), the MLP gate and up (2I), each group of 4-bit
        layers x·Aᵀ (r an adapted layer), and A and B in the compute type. Norms of queries and keys keep theirs
        (Q + K), norms after attention and MLP too (2D); where one layer makes queries, keys and values, the first
        two are kept with the third; and an MLP that is not fused keeps activation and product (2I).
        """
        width, inner, queries, keys = widths(self.shape)
        numbers = 2 * width + queries + 2 * inner + self.rank * len(self._adapted)
        family = self.shape.family
        if family in QUERY_NORMS:
            numbers += queries + keys
        if family in POST_NORMS:
            numbers += 2 * width
        if family == "phi3":
            numbers += queries + keys + 2 * inner
        low_rank = self.adapter_weights // self.shape.layers
        return self.itemsize * (numbers * batch.tokens + low_rank) + self._attention_kept(batch)

    def _attention_kept(self, batch: Batch) -> int:
        """Queries, keys, values, and what attention makes of them.

        Our own spans keep the weights (H·Σ t·s), and the capped scores; the flash kernel one sum a query and head.
        """
        _, _, queries, keys = widths(self.shape)
        heads = self.shape.heads
        inputs = self.itemsize * (queries + 2 * keys) * batch.tokens
        if self._own_attention:
            return inputs + self.itemsize * heads * batch.scores * (2 if self._softcap else 1)
        return inputs + 4 * heads * batch.tokens

    def _backward(self, batch: Batch) -> int:
        """What a layer's backward pass takes beside what is kept: the most of its steps.

        The final norm computes five times D in fp32. In the MLP it is the down projection (activation, product and
        its gradient; W), the gate (activation and three gradients), or gate and up (two gradients; on a CPU both W at
        once). In attention, gathered keys and values with their gradients, also in fp32, and scores and their
        gradient of one span, or the flash kernel's fp32 gradient of queries and its gradients of keys and values of
        every query head; by then what the MLP kept is let go.
        """
        width, inner, queries, keys = widths(self.shape)
        s, tokens = self.itemsize, batch.tokens
        matrix = width * inner
        mlp = max(3 * inner * tokens + matrix, 4 * inner * tokens, 2 * inner * tokens + self._stacked * matrix)
        if self._own_attention:
            inside = s * 2 * self.shape.heads * batch.largest * (2 if self._softcap else 1)
        else:
            inside = 4 * queries * tokens + s * 2 * queries * batch.seen
        attention = s * (2 * queries * tokens + 4 * keys * batch.seen) + max(inside, 8 * keys * (batch.seen + tokens))
        let_go = s * (2 * inner + width) * tokens
        return max(20 * width * tokens, s * (mlp + 2 * width * tokens), s * width * tokens + attention - let_go)

    # --- scoring, and every other pass that keeps nothing

    def forward(self, batch: Batch) -> int:
        """The most that a pass without gradients holds at once: in attention, in an MLP, or in the head.

        Beside that it keeps all A and B in the compute type, for the next pass.
        """
        width, inner, queries, keys = widths(self.shape)
        s, tokens = self.itemsize, batch.tokens
        mlp = max((2 * width + 4 * inner) * tokens, (2 * width + 2 * inner) * tokens + self._stacked * width * inner)
        spans = 0
        if self._own_attention:
            spans = s * self.shape.heads * ((2 if self._softcap else 1) * batch.scores + batch.largest)
        attention = s * ((2 * width + 3 * queries + 4 * keys) * tokens + 2 * keys * batch.seen) + spans
        head = s * width * (tokens + batch.predicted) + self._head(batch.predicted, training=False)
        return max(s * mlp, attention, head) + s * self.adapter_weights + self._masks(batch)

    def _head(self, predicted: int, *, training: bool) -> int:
        """Log-probs of C tokens, a block of the vocabulary at a time, whatever C is.

        A block of n logits is made in the compute type and turned to fp32 while the last one is still there; with a
        soft-cap there are three of it, and its slope. In training the directions are summed in fp32 (C·D), and put
        together from as many four times over. Of a head in main memory the weights of a block are there too.
        """
        step = vocabulary_step(self.device, predicted)
        block = min(self.shape.vocabulary, step) * predicted
        last = 4 if step < self.shape.vocabulary else 0
        own = 12 + last if self._softcap else 6 if self.itemsize == 2 else 4
        weights = self.itemsize * self.shape.hidden * min(self.shape.vocabulary, step) if self.head_aside else 0
        logits = (last + own) * block + weights
        if not training:
            return logits
        directions = predicted * self.shape.hidden
        return max(4 * directions + logits, 4 * block + weights + 18 * directions)

    # --- generation

    def unpacked(self) -> int:
        """The base in the compute type, which generation on a CPU holds if there is room (`SlotModel.decoding`)."""
        if self.device != "cpu":
            return 0
        return self.linear_weights * self.itemsize + self.head_bytes

    def row(self, places: int) -> int:
        """One completion while it is decoded, of up to so many tokens, prompt included.

        Keys and values (2·L·K a place, in steps of GROWTH; one layer's are there twice while they grow), scores,
        and what sampling makes of V logits.
        """
        growth = GROWTH[self.device]
        grown = math.ceil(places / growth) * growth
        cache = 2 * (self.shape.layers + 1) * widths(self.shape).keys * grown * self.itemsize
        scores = (2 * self.shape.heads + self.shape.kv_heads) * grown * self.itemsize
        return cache + scores + SAMPLING * self.shape.vocabulary

    def prefill(self, places: int) -> int:
        """Computing prompts of up to so many tokens."""
        return self.forward(Batch.of([(places, 0, 0)] * max(1, PREFILL_TOKENS // places)))

    def rows_that_fit(self, room: float, places: int) -> int:
        """Completions to decode side by side in so many bytes; 0 if not one."""
        fit = int((room - self.prefill(places)) / self.row(places))
        return max(0, min(MOST_ROWS[self.device], fit))

    # --- parts of the above

    @property
    def _adapted(self) -> list[Linear]:
        return [linear for linear in linears(self.shape) if self.targets is None or linear.name in self.targets]

    @property
    def _softcap(self) -> bool:
        return self.shape.family == "gemma2"

    @property
    def _own_attention(self) -> bool:
        """Where `flash.can_flash` says no."""
        return self.device == "cpu" or not self.flash or self._softcap or self.itemsize == 4

    @property
    def _stacked(self) -> int:
        """How many W of gate and up are there at once in the compute type."""
        return 2 if self.device == "cpu" or self.shape.family == "phi3" else 1

    def _masks(self, batch: Batch) -> int:
        """One a span, if no two are of the same lengths, a row for each query head that shares a key head."""
        if not self._own_attention:
            return 0
        return self.itemsize * self.shape.heads // self.shape.kv_heads * batch.scores
