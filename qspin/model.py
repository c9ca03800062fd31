"""The 4-bit base and its one adapter slot.

    model = SlotModel.load(base, config.model, config.lora, seed=0, device=torch.device("cpu"))
    model.set_adapter(opponent)                 # whoever is in the slot plays
    h = model.hidden(model.embed(input_ids), position_ids, layout)
    logits = model.logits(h[-1:])

Players are swapped by copying weights into the slot: no second base, no second adapter on the device. The LoRA
master weights are fp32 whatever the compute type.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from qspin.adapters import Adapter
from qspin.base import Base
from qspin.config import BackendName, LoraConfig, ModelConfig
from qspin.errors import QspinError, one_line
from qspin.files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from qspin.fitting.footprint import Footprint
from qspin.fitting.memory import free_bytes
from qspin.fitting.shape import read_shape
from qspin.four_bits import compute_dtype, load_in_4_bits
from qspin.layers.attention import Layout
from qspin.layers.backends import check_kernels, unsloth_kernels
from qspin.layers.flash import has_flash
from qspin.layers.head import Head
from qspin.layers.kernels import Kernels
from qspin.layers.lora import FusedLayers
from qspin.layers.probe import check_logits, own_logits
from qspin.layers.refit import SLOT, refit

# it replaces some families' layers as it is imported; which ones is known only of those in `backends.REWRITTEN`
WITHOUT_UNSLOTH = "; Unsloth rewrites some families: --set model.backend=transformers may play this one"


class SlotModel:
    """A causal language model in NF4 with a LoRA slot, called on packed rows."""

    def __init__(
        self, peft_model: Any, base: Base, device: torch.device, dtype: torch.dtype, layers: Sequence[FusedLayers]
    ) -> None:
        self.base = base
        self.device = device
        self.dtype = dtype
        self.peft_model = peft_model
        self._causal_lm = peft_model.get_base_model()
        self._decoder = self._causal_lm.get_decoder()
        self._embeddings = self._causal_lm.get_input_embeddings()
        # of a model that takes images as well it stands in the part for texts
        softcap: float | None = getattr(self._causal_lm.config.get_text_config(), "final_logit_softcapping", None)
        self.head = Head(self._causal_lm.get_output_embeddings(), softcap, device)
        self._layers = layers

    @staticmethod
    def load(
        base: Base,
        model: ModelConfig,
        lora: LoraConfig,
        *,
        seed: int,
        device: torch.device,
        backend: BackendName = "transformers",
    ) -> SlotModel:
        """Quantise the base to NF4 and put a fresh adapter (B = 0: it plays as the base) into the slot.

        Args:
            backend: see `backends.choose_backend`.

        Raises:
            QspinError: the base can't be loaded, or its architecture computes logits in a way not known here; torch
                has no kernels for the GPU.
        """
        check_kernels(device)
        gc.collect()  # of an earlier base, whose layers refer to each other
        if device.type == "cuda":
            torch.cuda.empty_cache()
        dtype = compute_dtype(model, device)
        kernels = unsloth_kernels() if backend == "unsloth" else Kernels()
        causal_lm = load_in_4_bits(base, model, device, dtype)
        reference = own_logits(causal_lm, base.name, device)
        torch.manual_seed(seed)
        slot = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=lora.targets,
            exclude_modules=_beside_the_decoder(causal_lm),
            lora_dropout=0.0,
            bias="none",
            task_type="CAUSAL_LM",
        )
        try:
            with warnings.catch_warnings(action="ignore"):  # of PEFT's own ways to train and merge
                peft_model = peft.get_peft_model(causal_lm, slot, adapter_name=SLOT)
        except ValueError as error:  # no such layers, or of a kind that can't be adapted
            raise QspinError(f"lora.targets: {base.name}: {one_line(error)}") from None
        _check_targets(peft_model, base)
        layers = refit(peft_model, kernels)
        loaded = SlotModel(peft_model, base, device, dtype, layers)
        loaded._set_aside()
        advice = WITHOUT_UNSLOTH if backend == "unsloth" else ""
        check_logits(reference, loaded._row_logits, causal_lm.config, base.name, dtype, device, advice)
        return loaded

    def embed(self, input_ids: Tensor) -> Tensor:
        """(T,) on the CPU → (T, D): what the decoder takes in, looked up where the table is."""
        embedded: Tensor = self._embeddings(input_ids.to(self._embeddings.weight.device))
        return embedded.to(self.device)

    def hidden(self, embedded: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
        """(T, D), (T,) → (T, D): the decoder's last hidden state, after its final norm."""
        for layers in self._layers:
            layers.let_go()
        output = self._decoder(
            inputs_embeds=embedded[None], position_ids=position_ids[None], use_cache=False, layout=layout
        )
        hidden: Tensor = output.last_hidden_state.squeeze(0)
        return hidden

    @property
    def unpacked_bytes(self) -> int:
        """What the base takes in the compute type, for `decoding`; 0 where that is of no use, or too much."""
        weights = sum(layers.weights for layers in self._layers) + self.head.weight.numel()
        size = weights * self.dtype.itemsize
        return size if self.device.type == "cpu" and size <= free_bytes(self.device) / 2 else 0

    @contextlib.contextmanager
    def decoding(self, unpacked: bool | None = None) -> Iterator[None]:
        """For generation, by whoever is in the slot: products of few rows.

        On a GPU kernels multiply by the 4 bits as they are. On a CPU making W of them takes as long as a decoding step
        does for the rest, so that the base is there in the compute type beside its 4 bits if `unpacked`; None: if
        there is room for it.
        """
        try:
            if self.device.type == "cuda":
                for layers in self._layers:
                    layers.few_rows = True
            elif self.unpacked_bytes if unpacked is None else unpacked:
                for layers in self._layers:
                    layers.unpack(self.dtype)
                self.head.unpack()
            yield
        finally:
            for layers in self._layers:
                layers.pack()
                layers.few_rows = False
            self.head.pack()

    def forget(self) -> None:
        """Free what was kept of the player in the slot: within the next work it would be freed unseen."""
        for layers in self._layers:
            layers.forget()

    @property
    def footprint(self) -> Footprint:
        """What work with it takes, piece by piece."""
        lora = self.peft_model.peft_config[SLOT]
        return Footprint(
            shape=read_shape(self._causal_lm.config.get_text_config().to_dict(), self.base.name),
            rank=lora.r,
            targets=frozenset(name.rpartition(".")[2] for name in lora.target_modules),
            device="cpu" if self.device.type == "cpu" else "cuda",
            itemsize=self.dtype.itemsize,
            recomputed=sum(layer.gradient_checkpointing for layer in self._recomputable),
            flash=self.device.type == "cuda" and has_flash(self.device),
            head_aside=self.head.aside,
        )

    @property
    def vocabulary(self) -> int:
        """V: how many tokens the head knows."""
        return len(self.head.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) → (N, V) fp32, without a graph."""
        return self.head.logits(hidden)

    def _row_logits(self, input_ids: Tensor, position_ids: Tensor, layout: Layout) -> Tensor:
        return self.logits(self.hidden(self.embed(input_ids), position_ids, layout))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The slot's weights, by PEFT's names in a fixed order."""
        named = {name.replace(f".{SLOT}.", "."): p for name, p in self.peft_model.named_parameters() if p.requires_grad}
        return dict(sorted(named.items()))

    def adapter(self) -> Adapter:
        """A copy of what is in the slot."""
        return {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}

    def set_adapter(self, adapter: Mapping[str, Tensor]) -> None:
        """Put a player into the slot.

        Raises:
            QspinError: its weights are not of the slot's names and shapes.
        """
        slot = self.parameters
        wrong = sorted(set(slot) ^ set(adapter)) or [n for n in slot if slot[n].shape != adapter[n].shape]
        if wrong:
            targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in adapter})
            raise QspinError(
                f"the adapter does not fit the slot: {len(wrong)} weights differ in name or shape, the first "
                f"{wrong[0]}; lora.rank and lora.targets must be those it was trained with, here on "
                f"{', '.join(targets)[:200]}"
            )
        with torch.no_grad():
            for name, parameter in slot.items():
                parameter.copy_(adapter[name])  # never through .data: kernels cache by version

    def save_adapter(self, folder: Path) -> None:
        """Write what is in the slot in PEFT's format, the same bytes for the same weights."""
        save_file(self.adapter(), folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        config = self.peft_model.peft_config[SLOT].to_dict()
        config = {key: sorted(value) if isinstance(value, set | list) else value for key, value in config.items()}
        config |= {"base_model_name_or_path": self.base.name, "revision": self.base.revision, "inference_mode": True}
        (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True, default=str) + "\n")

    def base_hash(self) -> str:
        """sha256 over every weight that training must not move: NF4 data and constants, and the 16-bit rest."""
        digest = hashlib.sha256()
        slot = {id(p) for p in self.parameters.values()}
        for name, parameter in self.peft_model.named_parameters():
            if id(parameter) in slot:
                continue
            digest.update(name.encode())
            digest.update(_bytes(parameter.detach()))
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                for tensor in (state.absmax, *((state.state2.absmax, state.offset) if state.nested else ())):
                    digest.update(_bytes(tensor))
        return digest.hexdigest()

    def use_gradient_checkpointing(self, recomputed: int) -> None:
        """Let the first so many decoder layers keep their input alone, and compute them again in the backward pass."""
        # not the last ones: of those the first would be recomputed while all that the others keep is still there
        if recomputed:
            # nothing in a layer is random, and older torch can't read a GPU's random state while decoding is recorded
            self._causal_lm.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
            self._causal_lm.disable_input_require_grads()  # which reentrant recomputation alone would need
        for index, layer in enumerate(self._recomputable):
            layer.gradient_checkpointing = index < recomputed
            own = {id(parameter) for parameter in layer.parameters()}
            for layers in self._layers:
                if id(layers.a[0]) in own:
                    layers.recomputed = index < recomputed

    def _set_aside(self) -> None:
        """Put the embedding table into main memory where a GPU has little room: a pass reads a row of it a token.

        Where it is the head too, all of it is copied from there: from pinned memory if there is so much, which WSL may
        not have (github.com/microsoft/WSL/issues/14078), else the driver makes a copy of its own first.
        """
        if self.device.type == "cuda" and self.footprint.set_aside(max(0, free_bytes(self.device))):
            table = self._embeddings.to("cpu").weight
            if self.head.aside:
                with contextlib.suppress(torch.AcceleratorError):
                    table.data = table.data.pin_memory()
            torch.cuda.empty_cache()

    @property
    def _recomputable(self) -> list[GradientCheckpointingLayer]:
        """The decoder's layers."""
        return [module for module in self._decoder.modules() if isinstance(module, GradientCheckpointingLayer)]


def _beside_the_decoder(causal_lm: Any) -> str | None:
    """A pattern for what takes in images or sound, which no text reaches: weights there would never learn."""
    decoder = causal_lm.get_decoder()
    path = next(name for name, module in causal_lm.named_modules() if module is decoder).split(".")
    beside = set()
    for name, module in causal_lm.named_modules():
        parts = name.split(".")
        if hasattr(getattr(module, "weight", None), "quant_state") and parts[: len(path)] != path:
            shared = next(index for index, (ours, its) in enumerate(zip(path, parts, strict=False)) if ours != its)
            beside.add(".".join(parts[: shared + 1]))
    return rf"({'|'.join(map(re.escape, sorted(beside)))})(\..*)?" if beside else None


def _check_targets(peft_model: Any, base: Base) -> None:
    """Log-probs are made of the head's own weights, so that an adapter of it would never learn, and an embedding's has
    names that PEFT would not find again."""
    causal_lm = peft_model.get_base_model()
    parts = {"embeddings": causal_lm.get_input_embeddings(), "head": causal_lm.get_output_embeddings()}
    for name, module in parts.items():
        if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer):
            raise QspinError(f"lora.targets: {base.name}: the {name} can't be adapted; name layers between them")


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).cpu().numpy().data
