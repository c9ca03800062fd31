"""How much work a model of a known shape is: arithmetic, free of torch.

In floating-point operations, two for each weight that a number is multiplied by; of a step of decoding also in bytes
that are read and written. Letters as in footprint.py, which has what the same model takes in memory.
"""

from __future__ import annotations

from qspin.fitting.footprint import Batch, Footprint
from qspin.fitting.shape import POST_NORMS, linears, widths

# Rows up to which bitsandbytes 0.50.2 multiplies by the 4 bits of gate and up of a 7B on each of machine.py's cards, by
# its backends/cuda/ops.py. Of other layers it makes W from fewer on, of queries' and outputs' from 33 (RTX 4060 Ti) or
# 65 (3090); on other cards from 9 rows (4090, 5080, 5090) or 6 (A100), of gate and up from 129 (4090, 5080) or 65.
PACKED_ROWS = 128
# What dequantising for a pass over a micro-batch takes, as the work of so many tokens: measured on a CPU
# (benchmarks/results/parts-cpu.json); of 60 to 130 by the published rates of the cards in machine.py, which read and
# write the weights once.
A_PASS: dict[str, int] = {"cpu": 36, "cuda": 100}
# Seconds of a GPU's best rate that go by while Python launches a layer's kernels once: 3.6 ms with its part of the
# optimiser's, by pairs of real lengths on an H200, which does larger work at 0.55 of that rate
# (benchmarks/results/gpu-cuda.json). What takes the GPU less has to wait for it.
LAUNCH = 2e-3


def forward_work(footprint: Footprint, batch: Batch) -> int:
    """A pass without gradients, the head's for C tokens included."""
    return _layers_work(footprint, batch) + _head_work(footprint, batch.predicted)


def training_work(footprint: Footprint, batch: Batch) -> int:
    """Forward and backward: as much again for W and its gradient of x, twice for A, B and attention.

    The head's gradient is summed in its forward pass: as much again. The forward pass of recomputed layers is made
    twice, but for the product with W that ends a layer, unless a norm after it keeps what it gives.
    """
    shape = footprint.shape
    base = 2 * footprint.linear_weights * batch.tokens
    layers = _layers_work(footprint, batch)
    last = 0 if shape.family in POST_NORMS else 2 * linears(shape)[-1].weights * batch.tokens
    again = (layers // shape.layers - last) * footprint.recomputed
    return 2 * base + 3 * (layers - base) + again + 2 * _head_work(footprint, batch.predicted)


def work_with_launches(footprint: Footprint, batch: Batch, launch: float, *, training: bool) -> float:
    """Of a micro-batch forward and backward, or in a pass without gradients, with what dequantising takes; or what the
    device could have done while all that was launched, if that is more. In floating-point operations."""
    layers = footprint.shape.layers
    passes = 2 * layers + footprint.recomputed if training else layers
    aside = passes / layers * 2 * footprint.linear_weights * A_PASS[footprint.device]
    work = training_work(footprint, batch) if training else forward_work(footprint, batch)
    return max(work + aside, passes * launch)


def step_work(footprint: Footprint, rows: int) -> int:
    """One decoding step of so many rows, attention aside."""
    return 2 * (footprint.linear_weights + footprint.adapter_weights) * rows + _head_work(footprint, rows)


def step_bytes(footprint: Footprint, rows: int, places: int, *, unpacked: bool) -> int:
    """What a decoding step reads and writes: the weights, the rows' keys and values, and their logits.

    Where the base is not unpacked, each step reads its 4 bits, writes it in the compute type and reads that; on a
    GPU few rows are multiplied by the 4 bits as they are.
    """
    shape = footprint.shape
    base, packed = footprint.linear_weights * footprint.itemsize, footprint.linear_weights * 9 // 16
    if footprint.device == "cuda" and rows <= PACKED_ROWS:
        base = packed
    elif not unpacked:
        base = 2 * base + packed
    cache = 2 * shape.layers * widths(shape).keys * places * footprint.itemsize
    return base + footprint.head_bytes + rows * (cache + 24 * shape.vocabulary)


def _layers_work(footprint: Footprint, batch: Batch) -> int:
    linear = 2 * (footprint.linear_weights + footprint.adapter_weights) * batch.tokens
    return linear + 4 * footprint.shape.layers * widths(footprint.shape).queries * batch.scores


def _head_work(footprint: Footprint, predicted: int) -> int:
    return 2 * footprint.shape.vocabulary * footprint.shape.hidden * predicted
