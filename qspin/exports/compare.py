"""The trained model and what was exported of it, on the same held-out rows: how likely, and what they answer.

    trained = Trained(run_dir, index)
    check = compared(trained, read_exported(model, trained))        # merge-check.json

`Trained` is what every export of an iteration begins with; its 4-bit model is loaded once, however many there are.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from qspin.adapters import load_adapter
from qspin.config import RunConfig
from qspin.errors import QspinError
from qspin.exports.names import Weights, weights_of
from qspin.exports.recipe import recorded_config
from qspin.exports.safetensors_file import read_folder
from qspin.files import ADAPTER_WEIGHTS, check_folder, sha256_of
from qspin.generation import Request, generate
from qspin.machine import computing_device
from qspin.model import SlotModel
from qspin.packing import pack_row
from qspin.prepare import Prepared, Speech
from qspin.record import check_rows, load_recorded, prepare_run, recorded_speech
from qspin.records import Example, Pair
from qspin.run_dir import RunDir

CHECK = "merge-check.json"
ROWS = 64  # held-out rows compared, at most
COMPLETIONS = 3
UNROUNDED = ("float32", "f32")  # what a merge onto the dequantised weights may be written in
PLACES = 128  # whose logits exist at once in fp32
MOST_NLL, MOST_ELSEWHERE = 0.05, 0.1  # a drift beyond is told aloud: nats a token; share of places

WARNING = (
    "WARNING: the exported model is another than the trained one, better or worse: the figures differ by more than "
    f"rounding. Compare the completions in {CHECK} before you use it; merged-16bit --onto dequantised --dtype float32 "
    "is the trained model, but for the run's own rounding."
)


def drifted(check: dict[str, Any]) -> bool:
    """Whether the exported model is another than the trained one, by the figures of merge-check.json."""
    far = abs(check["nll_difference"]) > MOST_NLL or 1 - check["top1_agreement"] > MOST_ELSEWHERE
    return bool(far and not _only_rounding(check))


def _only_rounding(check: dict[str, Any]) -> bool:
    """Whether the weights are those that were trained, unrounded, and the run computed with them in 16 bits: its own
    rounding is all that the figures can differ by, which may be more than a merge onto other weights changes."""
    exact = check.get("onto") == "dequantised" and check["dtype"] in UNROUNDED
    return exact and check["trained_in"] != "float32"


def summary(check: dict[str, Any]) -> str:
    """The figures of merge-check.json in a line."""
    told = f"; these are the trained weights, and the run's {check['trained_in']} rounding is what differs"
    told = told if _only_rounding(check) else ""
    return (
        f"{check['rows']} held-out rows: NLL {check['nll_trained']:.3f} trained, {check['nll_exported']:.3f} exported "
        f"({check['nll_difference']:+.4f} nats a token); the same token likeliest at {check['top1_agreement']:.1%} "
        f"of the places{told}"
    )


@dataclass(slots=True)
class Reading:
    """What a model makes of held-out rows."""

    nll: float = 0.0  # nats of all real completions together
    tokens: int = 0
    likeliest: list[int] = field(default_factory=list)  # token at each place of them
    completions: list[str] = field(default_factory=list)  # greedy

    def add(self, blocks: Iterable[Tensor], targets: Sequence[int]) -> None:
        """`blocks` of logits, (n, V) each, one row for each target in turn."""
        at = 0
        for block in blocks:
            wanted = torch.tensor(targets[at : at + len(block)], device=block.device)
            logps = block.float().log_softmax(-1)
            self.nll -= float(logps.gather(1, wanted[:, None]).sum())
            self.likeliest += logps.argmax(-1).tolist()
            at += len(block)
        self.tokens += at


class Trained:
    """A finished iteration: the run's record and rows, the 4-bit model, and what that makes of the held-out rows.
    Everything is had when it is first asked for, and once."""

    def __init__(self, run_dir: RunDir, index: int) -> None:
        self.run_dir, self.index = run_dir, index
        self.device = computing_device()

    @functools.cached_property
    def adapter(self) -> Path:
        """The iteration's own. Raises a QspinError: it is not as it was written."""
        folder = self.run_dir.iteration(self.index).adapter
        check_folder(folder)
        return folder

    @functools.cached_property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = self.run_dir.read_record()
        return found

    @functools.cached_property
    def config(self) -> RunConfig:
        return recorded_config(self.run_dir)

    @functools.cached_property
    def speech(self) -> Speech:
        """Raises a QspinError: the base is not to be had as it was."""
        return recorded_speech(self.run_dir, self.config)

    @functools.cached_property
    def _prepared(self) -> Prepared:
        try:
            prepared = prepare_run(self.config, self.run_dir, keep_rejects=False)
            check_rows(self.run_dir, prepared)
        except QspinError as error:
            raise QspinError(
                f"{error}. A merge is compared with the trained model on the run's held-out rows; an adapter needs none"
            ) from None
        return prepared

    @property
    def rows(self) -> tuple[Example, ...]:
        """Held-out rows to compare on. Raises a QspinError where they are not to be had as they were."""
        return self._prepared.heldout[:ROWS]

    @property
    def prompts(self) -> tuple[str, ...]:
        """The last user turn of each of the rows."""
        return self._prepared.heldout_prompts[:ROWS]

    @functools.cached_property
    def model(self) -> SlotModel:
        model = load_recorded(self.run_dir, self.speech.base, self.config, self.device)
        model.set_adapter(load_adapter(self.adapter))
        return model

    @functools.cached_property
    def weights(self) -> Weights:
        files = read_folder(self.speech.base.weights_folder())
        return weights_of(self.model, [name for file in files.values() for name in file])

    @functools.cached_property
    def reading(self) -> Reading:
        """What the trained model makes of the rows. The model is let go then."""
        assert self.weights  # while the model is there
        reading = self._read()
        del self.model
        gc.collect()  # its layers refer to each other
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return reading

    @torch.no_grad()
    def _read(self) -> Reading:
        model, reading = self.model, Reading()
        for row in self.rows:
            packed = pack_row([Pair(row.record_id, 0, row.prompt_ids, row.real_ids, (), ended=True)], model.device)
            embedded = model.embed(packed.input_ids)
            hidden = model.hidden(embedded, packed.position_ids, packed.layout)[packed.predictors]
            reading.add((model.logits(part) for part in torch.split(hidden, PLACES)), row.real_ids)
        answers = generate(
            model,
            [Request(row.prompt_ids, 0) for row in self.rows[:COMPLETIONS]],
            max_new_tokens=self.config.generation.max_new_tokens,
            temperature=0.0,
            top_p=1.0,
            width=COMPLETIONS,
            stop_ids=self.speech.stop_ids,
        )
        reading.completions = [self.speech.renderer.completion_text(answer.ids) for answer in answers]
        return reading


@torch.no_grad()
def read_exported(model: Any, trained: Trained) -> Reading:
    """What a model that plain transformers loaded makes of the rows."""
    stops = sorted(trained.speech.stop_ids)
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=trained.config.generation.max_new_tokens,
        eos_token_id=stops,
        pad_token_id=stops[0],
    )
    embeddings = model.get_input_embeddings().weight
    device = trained.device if embeddings.is_meta else embeddings.device  # meta: copied over when it is needed
    reading = Reading()
    for row in trained.rows:
        reading.add(_logits(model, row, device), row.real_ids)
    for row in trained.rows[:COMPLETIONS]:
        prompt = torch.tensor([row.prompt_ids], device=device)
        ids = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt))[0, len(row.prompt_ids) :]
        reading.completions.append(trained.speech.renderer.completion_text(ids.tolist()))
    return reading


def _logits(model: Any, row: Example, device: torch.device) -> Iterator[Tensor]:
    ids = torch.tensor([[*row.prompt_ids, *row.real_ids]], device=device)
    count = len(row.real_ids)
    logits = model(input_ids=ids, use_cache=False, logits_to_keep=count + 1).logits[0, :-1]  # (count, V)
    yield from torch.split(logits, PLACES)


def compared(trained: Trained, exported: Reading) -> dict[str, Any]:
    """The figures of merge-check.json."""
    reading = trained.reading
    same = sum(a == b for a, b in zip(reading.likeliest, exported.likeliest, strict=True))
    before, after = reading.nll / reading.tokens, exported.nll / exported.tokens
    return {
        "adapter": sha256_of(trained.adapter / ADAPTER_WEIGHTS),
        "rows": len(trained.rows),
        "trained_in": str(trained.weights.dtype).removeprefix("torch."),
        "nll_trained": before,
        "nll_exported": after,
        "nll_difference": after - before,
        "top1_agreement": same / reading.tokens,
        "completions": [
            {"prompt": prompt, "trained": old, "exported": new}
            for prompt, old, new in zip(trained.prompts, reading.completions, exported.completions, strict=False)
        ],
    }
